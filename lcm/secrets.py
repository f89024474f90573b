"""Secrets in addresses, commands and options: what is logged, stored or shown has *** in their place.

Only the standard library is imported here.
"""

import contextlib
import re
import sys


def without_secrets(value):
    """An option's value with the secrets in it redacted."""
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def public_options(args):
    """The options as a dict that may be logged, stored and shown: without secrets."""
    return {name: without_secrets(value) for name, value in vars(args).items() if name != "hub_token"}
# A word of a shell: quoted, plain, or both joined. Where it begins unquoted, a quote with a space after it may be the
# end of what is around it, and is left alone.
PLAIN = r"""(?:\\.|(?!::)[^\s&;|<>()'"\\])"""
QUOTED = r"""(?:"[^"]*"|'[^']*')"""
WORD = rf"""(?:{QUOTED}(?:{QUOTED}|{PLAIN})*|{PLAIN}+(?:"[^"\s]*"|'[^'\s]*'|{PLAIN})*)"""
NAMES = (
    r"(?:token|secret|password|passwd|passphrase|signature|credentials?|oauth2-bearer|"
    r"(?:api|private|access|secret|account)[_-]?key(?:[_-]?id)?)"
)
SECRET_OPTION = rf"--?[\w-]*(?:{NAMES}|pass)"
SECRET_HEADER = r"[\w-]*(?:key|token|secret|auth|password|cookie)[\w-]*\s*:"
# (pattern, what stands in its place); the first group of each pattern is kept.
RULES = [
    # https://user:password@host; of other schemes only with a password, since a user's name alone is no secret.
    (r"(?i)(\bhttps?://)[^\s/?#'\"]+@", r"\1***@"),
    (r"(?i)(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\":]*:[^\s/?#'\"]+@", r"\1***@"),
    # The same with a / or # in the password, which no client takes; what follows the colon is no port.
    (r"(?i)(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#'\":@\[]*:(?!\d*(?:[/?#:\s{]|$))(?:(?!::)[^\s'\"@])+@", r"\1***@"),
    # curl user:password@host.org/a.tar
    (r"(?i)((?<![\w/:.@+%*-]))(?!mailto:|pipe:)[\w.+%-]+:[^\s/@:'\"]+@(?=[\w-]+(?:\.[\w-]+)+[:/])", r"\1***@"),
    # ?X-Amz-Signature=..., &sig=..., ;Policy=...
    (rf"(?i)([?&;](?:sig|[\w-]*key|auth|hmac|pass|pwd|session|code|policy|key-pair-id|hdnea|jwt)=){WORD}", r"\1***"),
    # HF_TOKEN=..., --password=..., AWS_SECRET_ACCESS_KEY=..., and parameters of such names
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
    # -H "X-Api-Key: ..."; unquoted, one word; and such lines where they stand alone
    (rf"""(?i)((?:^|\s)(?:-H|--header)[\s=]*"{SECRET_HEADER}\s*)[^"]+""", r"\1***"),
    (rf"""(?i)((?:^|\s)(?:-H|--header)[\s=]*'{SECRET_HEADER}\s*)[^']+""", r"\1***"),
    (rf"(?i)((?:^|\s)(?:-H|--header)[\s=]*{SECRET_HEADER}){WORD}", r"\1***"),
    (r"(?i)(\b(?:proxy-)?authorization\s*:(?!\s*\*\*\*)\s*)[^'\"\n]+", r"\1***"),
    (r"(?i)((?<![\w-])(?:x-[\w-]*(?:key|token|secret|auth)|api-key|private-token)\s*:(?!\s*\*\*\*)\s*)[^'\"\n]+",
     r"\1***"),
    (r"(?i)(\bcookie\s*:(?!\s*\*\*\*)\s*)(?=[\w-]+=)[^'\"\n]+", r"\1***"),
    # with a digit, or as long as no word is: "the ring bearer standing in a field" stays
    (r"(?i)(\bbearer\s+)(?=[\w.~+/=-]*\d|[\w.~+/=-]{20})[\w.~+/=-]{8,}", r"\1***"),
    # what such things look like, wherever they stand: Hugging Face, GitHub, GitLab, AWS, JSON web tokens
    (r"(?<!/)\b(hf_)[A-Za-z0-9]{10,}(?![\w/-]|\.\w)", r"\1***"),  # a short one, if it is no part of a path
    (r"\b(hf_)[A-Za-z0-9]{30,}", r"\1***"),
    (r"\b(gh[pousr]_|github_pat_)\w{20,}", r"\1***"),
    (r"\b(glpat-)[\w-]{20,}", r"\1***"),
    (r"\b(AKIA|ASIA)[A-Z0-9]{16}\b", r"\1***"),
    (r"\b(eyJ)[\w-]{8,}\.[\w-]+\.[\w-]+", r"\1***"),
]  # fmt: skip
RULES = [(re.compile(pattern), replacement) for pattern, replacement in RULES]


def redact(text):
    """`text` with *** in place of the access tokens, passwords and signatures in it. Twice is the same as once."""
    before = None
    while text != before:  # what one rule puts in may be part of what another looks for
        before = text
        for pattern, replacement in RULES:
            text = pattern.sub(replacement, text)
    return text


def without_credentials(shards):
    """What a value of --train_shards_path_or_url stands for, whoever asks and whenever: without the names, passwords
    and queries in its addresses, and with other secrets redacted."""
    shards = re.sub(r"(\b[a-z][a-z0-9+.-]*://(?:(?!::)[^\s?#'\"])*)[?#](?:(?!::)[^\s'\"])*", r"\1", redact(shards))
    return shards.replace("://***@", "://")


def redact_arguments(arguments):
    """The arguments of a command line, each redacted; of an option such as --hub_token, its value altogether."""
    before = [None, *arguments]
    is_secret = [bool(option and re.fullmatch(f"(?i){SECRET_OPTION}", option)) for option in before]
    return ["***" if secret else redact(part) for secret, part in zip(is_secret, arguments, strict=False)]


@contextlib.contextmanager
def redacted_command_line():
    """W&B and Comet record `sys.argv` when they start."""
    given = sys.argv
    sys.argv = redact_arguments(given)
    try:
        yield
    finally:
        sys.argv = given
