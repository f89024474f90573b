"""Redaction of secrets: in everything that is logged, stored or shown, *** replaces them.

Only the standard library is imported here.
"""

import contextlib
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

# A shell word: quoted, plain, or both joined. In a word that begins unquoted, a quote before a space may close a quote
# that was opened before the word; it is not part of the word.
PLAIN = r"""(?:\\.|(?!::)[^\s&;|<>()'"\\])"""
QUOTED = r"""(?:"[^"]*"|'[^']*')"""
WORD = rf"""(?:{QUOTED}(?:{QUOTED}|{PLAIN})*|{PLAIN}+(?:"[^"\s]*"|'[^'\s]*'|{PLAIN})*)"""
NAMES = (
    r"(?:token|secret|password|passwd|passphrase|signature|credentials?|oauth2-bearer|"
    r"(?:api|private|access|secret|account)[_-]?key(?:[_-]?id)?)"
)
SECRET_OPTION = rf"--?[\w-]*(?:{NAMES}|pass)"
SECRET_HEADER = r"[\w-]*(?:key|token|secret|auth|password|cookie)[\w-]*\s*:"
# (pattern, replacement); the first group of each pattern is kept.
RULES = [
    # https://user:password@host. For other schemes only with a password: a user name alone is not a secret.
    (r"(?i)(\bhttps?://)[^\s/?#'\"]+@", r"\1***@"),
    (r"(?i)(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\":]*:[^\s/?#'\"]+@", r"\1***@"),
    # The same with a / or # in the password, which no client accepts. A port after the colon does not match.
    (r"(?i)(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\":@\[]*:(?!\d*(?:[/?#:\s{]|$))(?:(?!::)[^\s'\"@])+@", r"\1***@"),
    # curl user:password@host.org/a.tar
    (r"(?i)((?<![\w/:.@+%*-]))(?!mailto:|pipe:)[\w.+%-]+:[^\s/@:'\"]+@(?=[\w-]+(?:\.[\w-]+)+[:/])", r"\1***@"),
    # ?X-Amz-Signature=..., &sig=..., ;Policy=...
    (rf"(?i)([?&;](?:sig|[\w-]*key|auth|hmac|pass|pwd|session|code|policy|key-pair-id|hdnea|jwt)=){WORD}", r"\1***"),
    # HF_TOKEN=..., --password=..., AWS_SECRET_ACCESS_KEY=..., and parameters with such names
    (rf"(?i)((?<![\w-])[\w-]*{NAMES}(?:=|%3D)){WORD}", r"\1***"),
    (rf"((?<!\w)[A-Z0-9_]*(?:KEY|PASS|PWD|PAT|AUTH)=){WORD}", r"\1***"),
    (rf"(?i)((?:(?:^|\s){SECRET_OPTION}|\bsshpass\s+-p)\s+){WORD}", r"\1***"),
    # "password": "..."
    (rf"""(?i)(["'][\w-]*{NAMES}\\?["']\s*:\s*)(?:\\?"[^"]*"|'[^']*')""", r"\1***"),
    # curl -u name:password, -sSu name:password
    (rf"""((?:^|\s)(?:-[a-zA-Z]*[uU]|--user|--proxy-user|--cert)[\s=]?)\$?(?!\w+://)(?="[^"]*:|'[^']*:|\S*:){WORD}""",
     r"\1***"),
    # curl -b name=value
    (rf"((?:^|\s)(?:-b|--cookie)[\s=]+)(?=\S*=){WORD}", r"\1***"),
    # -H "X-Api-Key: ..."; without quotes, one word; the same header without -H
    (rf"""(?i)((?:^|\s)(?:-H|--header)[\s=]*"{SECRET_HEADER}\s*)[^"]+""", r"\1***"),
    (rf"""(?i)((?:^|\s)(?:-H|--header)[\s=]*'{SECRET_HEADER}\s*)[^']+""", r"\1***"),
    (rf"(?i)((?:^|\s)(?:-H|--header)[\s=]*{SECRET_HEADER}){WORD}", r"\1***"),
    (r"(?i)(\b(?:proxy-)?authorization\s*:(?!\s*\*\*\*)\s*)[^'\"\n]+", r"\1***"),
    (r"(?i)((?<![\w-])(?:x-[\w-]*(?:key|token|secret|auth)|api-key|private-token)\s*:(?!\s*\*\*\*)\s*)[^'\"\n]+",
     r"\1***"),
    (r"(?i)(\bcookie\s*:(?!\s*\*\*\*)\s*)(?=[\w-]+=)[^'\"\n]+", r"\1***"),
    # Only with a digit, or longer than any word: "the ring bearer standing in a field" is kept.
    (r"(?i)(\bbearer\s+)(?=[\w.~+/=-]*\d|[\w.~+/=-]{20})[\w.~+/=-]{8,}", r"\1***"),
    # Known token formats, anywhere in the text: Hugging Face, GitHub, GitLab, AWS, JSON web tokens.
    (r"(?<!/)\b(hf_)[A-Za-z0-9]{10,}(?![\w/-]|\.\w)", r"\1***"),  # a short one, unless it is part of a path
    (r"\b(hf_)[A-Za-z0-9]{30,}", r"\1***"),
    (r"\b(gh[pousr]_|github_pat_)\w{20,}", r"\1***"),
    (r"\b(glpat-)[\w-]{20,}", r"\1***"),
    (r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", r"\1***"),
    (r"\b(eyJ)[\w-]{8,}\.[\w-]+\.[\w-]+", r"\1***"),
]  # fmt: skip
COMPILED_RULES = [(re.compile(pattern), replacement) for pattern, replacement in RULES]


def redact(text: str) -> str:
    """`text` with its access tokens, passwords and signatures replaced by ***. Redacting twice changes nothing."""
    before = None
    while text != before:  # the replacement of one rule may create a match for another
        before = text
        for pattern, replacement in COMPILED_RULES:
            text = pattern.sub(replacement, text)
    return text


def without_credentials(shards: str) -> str:
    """A value of --train_shards_path_or_url in a form that is the same for every user and at any time: its addresses
    without user names, passwords and queries, other secrets redacted."""
    shards = re.sub(r"(\b[a-z][a-z0-9+.-]*://(?:(?!::)[^\s?#'\"])*)[?#](?:(?!::)[^\s'\"])*", r"\1", redact(shards))
    return shards.replace("://***@", "://")


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, redacted; the whole value of an option such as --hub_token becomes ***."""
    before = ["", *arguments]
    is_secret = [bool(re.fullmatch(f"(?i){SECRET_OPTION}", option)) for option in before]
    return ["***" if secret else redact(part) for secret, part in zip(is_secret, arguments, strict=False)]


@contextlib.contextmanager
def redacted_command_line() -> Iterator[None]:
    """Redact `sys.argv` inside the block: W&B and Comet record it when they start."""
    given = sys.argv
    sys.argv = redact_arguments(given)
    try:
        yield
    finally:
        sys.argv = given


def without_secrets(value: Any) -> Any:
    """An option's value with its secrets redacted."""
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def public_options(args: Namespace) -> dict[str, Any]:
    """The options as a dict without secrets, which may be logged, stored and shown."""
    return {name: without_secrets(value) for name, value in vars(args).items() if name != "hub_token"}
