"""The parser, and the types of option values."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lcm.options.config import expand
from lcm.secrets import redact


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that begins with the option, and which knows `--config`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if "--config" not in self._option_string_actions:
            return super().parse_known_args(args, namespace)
        line = list(sys.argv[1:] if args is None else args)
        try:
            expanded = expand(self, line)
        except ValueError as error:
            self.error(str(error))
        parsed, unknown = super().parse_known_args(expanded, namespace)
        if parsed.config is not None and expanded == line:
            self.error("argument --config: no other spelling is allowed")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--\w+|[A-Z]+)(/[^:]+)?: ", r"\1: ", message)
        message = re.sub(r"^the following arguments are required: (.+)$", r"\1: required, but not given", message)
        message = re.sub(r"^(--\w+): ignored explicit argument (.+)$", r"\1: \2 given; allowed: no value", message)
        ambiguous = re.match(r"^ambiguous option: ([^\s=]+)\S* could match (.+)$", message)
        if ambiguous:  # the value is left out: it may be a token
            message = f"{ambiguous[1]}: ambiguous; allowed: {ambiguous[2]}"
        unknown = re.match(r"^unrecognized arguments: (\S+)", message)
        if unknown:
            name = unknown[1].split("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, n=1)
            message = f"{name}: no such option" + (f"; did you mean {close[0]}?" if close else "; see --help")
        self.exit(2, redact(message).replace("\n", " ") + "\n")


class Options(argparse.Namespace):
    """A script's options; `vars()` gives only these. A resume also needs three things: the file name of the `script`,
    the parser's `defaults` by name, and the names of the options `left_at_default`, even if they are set later. The
    model card shows the `command_line`: the words after the script, without secrets, after those of `--config`."""

    command_line: list[str]
    defaults: dict[str, Any]
    left_at_default: set[str]
    script: str
    __slots__ = ("command_line", "defaults", "is_frozen", "left_at_default", "script")

    def freeze(self) -> None:
        """Make every later change of an option an AttributeError."""
        self.is_frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "is_frozen", False):
            raise AttributeError(f"{name}: options do not change once they are parsed")
        super().__setattr__(name, value)

    def __setstate__(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """For copies and pickles, which set the attributes one after the other."""
        vars(self).update(state[0])
        for name, value in state[1].items():
            object.__setattr__(self, name, value)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and adds the defaults, except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.required:
            return action.help
        if isinstance(action.default, list):
            quoted = (f'"{value}"' if isinstance(value, str) else f"{value:g}" for value in action.default)
            return f"{action.help} (default: {' '.join(quoted)})"
        return super()._get_help_string(action)


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in [low, high]."""
    allowed = f"an integer from {low} to {high}" if high is not None else f"an integer of at least {low}"

    def parse(text: str) -> int:
        try:
            value: int | None = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} given; allowed: {allowed}")
        return value

    return parse


def number(
    low: float, high: float = math.inf, below: float = math.inf, above: float = -math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite number in [low, high], smaller than `below` and larger than `above`."""
    upper = f" and at most {high:g}" if high < math.inf else f" and less than {below:g}" if below < math.inf else ""
    allowed = (f"a number larger than {above:g}" if above > -math.inf else f"a number of at least {low:g}") + upper

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and above < value < below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} given; allowed: {allowed}")
        return value

    return parse


def sizes(value: str) -> list[tuple[int, int]]:
    """An argparse type: `1024x1024,1280x768` or `1024` as a list of (width, height) in pixels, multiples of 8."""
    found = [re.fullmatch(r"(\d+)(?:x(\d+))?", part.strip()) for part in value.split(",")]
    pairs = [(int(match[1]), int(match[2] or match[1])) for match in found if match]
    if len(pairs) < len(found) or not all(side >= 8 and side % 8 == 0 for pair in pairs for side in pair):
        raise argparse.ArgumentTypeError(
            f"{value!r} given; allowed: WIDTHxHEIGHT, or one number, in multiples of 8, joined by commas"
        )
    return pairs


def text(value: str) -> str:
    """An argparse type: some text. An empty value is most often a shell variable that is not set."""
    if not value.strip():
        raise argparse.ArgumentTypeError(f"{value!r} given; allowed: some text")
    return value


def is_repository_name(name: str) -> bool:
    """Whether a repository on the Hub can have this name, with or without an owner."""
    fits = re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", name, re.ASCII)
    return bool(fits) and not re.search(r"--|\.\.|\.git$", name)


def model(value: str) -> str:
    """An argparse type: a folder, or a name that a repository on the Hub can have."""
    if not os.path.isdir(value) and not is_repository_name(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not a folder; allowed: a folder, or an id on the Hub")
    return value


def names(value: str) -> str:
    """An argparse type: names joined by commas; returned as given."""
    if not all(name.strip() for name in value.split(",")):
        raise argparse.ArgumentTypeError(f"{value!r} given; allowed: names joined by commas, none of them empty")
    return value


def ranks(value: str) -> str:
    """An argparse type: NAME=RANK joined by commas; returned as given, for `rank_pattern`."""
    try:
        if min(rank_pattern(value).values()) >= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{value!r} given; allowed: NAME=RANK joined by commas, such as conv1=16,conv2=8")


def rank_pattern(value: str | None) -> dict[str, int]:
    """The ranks by name in a value of `ranks`. Raises ValueError."""
    pairs = [part.split("=") for part in value.split(",")] if value is not None else []
    if not all(len(pair) == 2 and pair[0].strip() for pair in pairs):
        raise ValueError(value)
    return {name.strip(): int(rank) for name, rank in pairs}


def make_parser(description: str | None, script: str | None = None) -> Parser:
    """A parser without options; `description` is the script's docstring, and `script` its path."""
    name = script and os.path.basename(script)
    return Parser(name, "%(prog)s OPTIONS", description=description, formatter_class=HelpFormatter)
