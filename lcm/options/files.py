"""Options that name files, folders and repositories."""

import os
import re


def read_prompts(parser, option, values):
    """The values of `option`, those that name a text file replaced by its lines, empty ones left out."""
    prompts = []
    for value in values:
        if not os.path.isfile(value):
            if value.endswith(".txt") or os.path.isdir(value):
                parser.error(f"{option}: {value!r} is no file; allowed: prompts, or a text file with one a line")
            prompts.append(value)
            continue
        try:
            with open(value, encoding="utf-8-sig") as file:
                lines = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"{option}: cannot read {value!r} as text in UTF-8: {error}")
        if not lines:
            parser.error(f"{option}: {value!r} holds no prompt; allowed: prompts, or a text file with one a line")
        prompts += lines
    return prompts


def existing_parent(path):
    """What there is at `path`, or else the nearest of the folders above it."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def find_checkpoint(output_dir, name):
    """The folder that a checkpoint's name or path stands for, None if there is none."""
    return next((path for path in (os.path.join(output_dir, name), name) if name and os.path.isdir(path)), None)


def repository_name(args):
    """The repository to push to."""
    return args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))


def is_repository_name(name):
    """Whether the Hub can have a repository of that name, with or without its owner's."""
    fits = re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", name, re.ASCII)
    return bool(fits) and not re.search(r"--|\.\.|\.git$", name)
