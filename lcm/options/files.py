"""Options that name files, folders and repositories."""

import os

from lcm.options.types import Options, Parser


def read_prompts(parser: Parser, option: str, values: list[str]) -> list[str]:
    """The values of `option`. The name of a text file is replaced by the lines of the file that are not empty."""
    prompts: list[str] = []
    for value in values:
        if not os.path.isfile(value):
            if value.endswith(".txt") or os.path.isdir(value):
                parser.error(f"{option}: {value!r} is not a file; allowed: prompts, or a text file, one prompt a line")
            prompts.append(value)
            continue
        try:
            with open(value, encoding="utf-8-sig") as file:
                lines = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"{option}: cannot read {value!r} as text in UTF-8: {error}")
        if not lines:
            parser.error(f"{option}: {value!r} has no prompts; allowed: prompts, or a text file, one prompt a line")
        prompts += lines
    return prompts


def split_label(value: str) -> tuple[str, str]:
    """(label, source) of `label=source`; the label of a source alone is the last part of its path."""
    label, equals, source = value.partition("=")
    if equals and not os.path.exists(value):
        return label, source
    return os.path.basename(os.path.abspath(value)), value


def read_labels(parser: Parser, option: str, values: list[str]) -> list[tuple[str, str]]:
    """(label, source) of each value of `option`, which names networks beside the teacher."""
    pairs = [split_label(value) for value in values]
    labels = ["teacher"] + [label for label, _ in pairs]
    duplicate = next((label for label in labels if labels.count(label) > 1), None)
    if duplicate is not None:
        parser.error(
            f"{option}: two networks are called {duplicate!r}; allowed: different names, not teacher, as LABEL=FOLDER"
        )
    if not all(labels):
        parser.error(f"{option}: a label is empty; allowed: LABEL=FOLDER_OR_ID, or FOLDER_OR_ID")
    return pairs


def existing_parent(path: str) -> str:
    """`path` if it exists, else the nearest folder above it that does."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def find_checkpoint(output_dir: str, name: str) -> str | None:
    """The folder with the name or path of a checkpoint, None if there is none."""
    return next((path for path in (os.path.join(output_dir, name), name) if name and os.path.isdir(path)), None)


def repository_name(args: Options) -> str:
    """The repository to push to."""
    return args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
