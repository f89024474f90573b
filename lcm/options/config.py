"""Options in a file: `--config run.yaml` stands for the command line that the file describes."""

import argparse
import importlib
import json
import os
import tomllib
from collections.abc import Sequence
from typing import Any

SUFFIXES = (".yaml", ".yml", ".toml", ".json")
UNSET = (None, "", "~", "null")  # YAML is read as text: else it would take `no` for False, and 1e-4 for text
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


def read_config(path: str) -> dict[str, Any]:
    """The options in a file, by name. Raises ValueError for a file that has none, and OSError.

    They are the file's top level, or its `options`, as a checkpoint's training_state.json has them.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path!r} given; allowed: a file that ends in {', '.join(SUFFIXES)}")
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    try:
        if suffix == ".toml":
            found: Any = tomllib.loads(text)
        elif suffix == ".json":
            found = json.loads(text)
        else:
            yaml = importlib.import_module("yaml")
            found = yaml.load(text, Loader=yaml.BaseLoader)
    except ImportError:
        raise ValueError("the package PyYAML is not installed; allowed: .toml or .json") from None
    except Exception as error:  # each library has its own
        raise ValueError(f"cannot read {path!r}: {' '.join(str(error).split())}") from None
    if isinstance(found, dict) and isinstance(found.get("options"), dict):
        found = {name: value for name, value in found["options"].items() if name != "config"}
    if not isinstance(found, dict):
        raise ValueError(f"{path!r} has no options; allowed: lines of a name and a value")
    return found


def item_text(item: Any) -> str:
    """A value as one writes it on the command line. A list of two is a size, as 1024x768."""
    return "x".join(map(str, item)) if isinstance(item, list) else str(item)


def arguments(parser: argparse.ArgumentParser, config: dict[str, Any]) -> list[str]:
    """The command line for a dict of options. Raises ValueError, naming the option, for what cannot be one."""
    line: list[str] = []
    for name, value in config.items():
        action = parser._option_string_actions.get(f"--{name}")
        if action is None or name in ("config", "help"):
            raise ValueError(f"unrecognized arguments: --{name}")
        items = value if isinstance(value, list) else [] if value in UNSET else [value]
        if action.nargs == 0:  # a switch
            word = str(value).lower()
            if word not in (*TRUE, *FALSE, "none", *UNSET):
                raise ValueError(f"argument --{name}: {value!r:.40} given; allowed: true or false")
            opposite = next((option for option in action.option_strings if option.startswith("--no-")), None)
            chosen = f"--{name}" if word in TRUE else opposite if word in FALSE else None
            line += [chosen] if chosen else []
        elif any(isinstance(item, dict) for item in items):
            raise ValueError(f"argument --{name}: {value!r:.40} given; allowed: a value, or a list of values")
        elif action.nargs in ("*", "+"):
            if items or (isinstance(value, list) and action.nargs == "*"):
                line += [f"--{name}", *map(item_text, items)]
        elif isinstance(action, argparse._AppendAction):
            line += [f"--{name}={item}" for item in items]
        elif items:
            line.append(f"--{name}={','.join(map(item_text, items))}")
    return line


def expand(parser: argparse.ArgumentParser, line: Sequence[str]) -> list[str]:
    """The command line with the options of its `--config` in front, so that its own options win.

    An option that is collected, such as --train_shards_path_or_url, is taken from one of the two. Raises ValueError as
    `read_config` and `arguments` do.
    """
    path = None
    for i, part in enumerate(line):
        if part == "--config" and i + 1 < len(line):
            path = line[i + 1]
        elif part.startswith("--config="):
            path = part.partition("=")[2]
    if path is None or not path.strip():
        return list(line)
    try:
        config = read_config(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"argument --config: {error}") from None
    for name in list(config):
        action = parser._option_string_actions.get(f"--{name}")
        given = any(part.split("=")[0] == f"--{name}" for part in line)
        if isinstance(action, argparse._AppendAction) and given:
            del config[name]
    return [*arguments(parser, config), *line]
