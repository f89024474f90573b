"""Secrets in addresses, commands and options: what is logged, stored or shown has *** in their place.

Only the standard library is imported here.
"""

import contextlib
import re
import sys

VALUE = r"""(?:"[^"]*"|'[^']*'|(?:(?!::)[^\s&;|<>()'"#])+)"""
NAMES = r"(?:token|secret|password|passwd|signature|credentials?|(?:api|private|access)[_-]?key(?:[_-]?id)?)"
# (pattern, what stands in its place); the first group of each pattern is kept.
RULES = [
    # https://user:password@host; of other schemes only with a password, since a user's name alone is no secret.
    (r"(?i)(\bhttps?://)[^\s/?#'\"]+@", r"\1***@"),
    (r"(?i)(\b[a-z][a-z0-9+.-]*://)[^\s/?#'\":]*:[^\s/?#'\"]+@", r"\1***@"),
    # ?X-Amz-Signature=..., &sig=..., ;Policy=...
    (rf"(?i)([?&;](?:sig|key|auth|policy|key-pair-id|hdnea|jwt)=){VALUE}", r"\1***"),
    # HF_TOKEN=..., --password=..., AWS_SECRET_ACCESS_KEY=..., and parameters of such names
    (rf"(?i)((?<![a-z0-9])[\w-]*{NAMES}=){VALUE}", r"\1***"),
    (rf"(?i)((?:^|\s)--?[\w-]*{NAMES}\s+){VALUE}", r"\1***"),
    # curl -u name:password
    (r"""((?:^|\s)(?:-u|-U|--user|--proxy-user)[\s=]?)(?:"[^"]*:[^"]*"|'[^']*:[^']*'|[^\s:'"-][^\s:'"]*:[^\s'"]+)""",
     r"\1***"),
    # -H "Authorization: Basic ..."
    (r"(?i)(\b(?:proxy-)?authorization\s*:\s*)[^'\"\n]+", r"\1***"),
    (r"(?i)(\b(?:x-[\w-]*(?:key|token|secret|auth)|api-key|private-token|cookie)\s*:\s*)[^'\"\n]+", r"\1***"),
    (r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}", r"\1***"),
    # what such things look like, wherever they stand: Hugging Face, GitHub, AWS
    (r"\b(hf_)[A-Za-z0-9]{10,}", r"\1***"),
    (r"\b(gh[pousr]_)[A-Za-z0-9]{20,}", r"\1***"),
    (r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", r"\1***"),
]  # fmt: skip
RULES = [(re.compile(pattern), replacement) for pattern, replacement in RULES]


def redact(text):
    """`text` with *** in place of the access tokens, passwords and signatures in it. Twice is the same as once."""
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text


def without_credentials(shards):
    """What a value of --train_shards_path_or_url stands for, whoever asks and whenever: without the names, passwords
    and queries in its addresses, and with other secrets redacted."""
    shards = re.sub(r"(\b[a-z][a-z0-9+.-]*://(?:(?!::)[^\s?#'\"])*)[?#](?:(?!::)[^\s'\"])*", r"\1", redact(shards))
    return shards.replace("://***@", "://")


@contextlib.contextmanager
def redacted_command_line():
    """W&B and Comet record `sys.argv` when they start."""
    given = sys.argv
    sys.argv = redact("\n".join(given)).split("\n")
    try:
        yield
    finally:
        sys.argv = given
