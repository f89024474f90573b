"""Errors that the user can correct, and how they become one line."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from lcm.secrets import redact


class UserError(Exception):
    """Something that the user can correct. Scripts print it in one line and exit with status 1."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run(
    train: Callable[[Any], Callable[[], None] | None], args: Any, interrupted: str = "Stopped before the first step."
) -> None:
    """Call `train(args)`; a UserError becomes one line on standard error and exit status 1.

    If `train` returns a function, that is called after the objects of `train` are freed. `interrupted` is the message
    after Ctrl-C. Between its first step and its end, a training run handles Ctrl-C itself.
    """
    # Warnings of the libraries at import, about torchvision or kernels that are missing, do not matter here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Threads of a CPU that wait busily for each other make a step many times slower where other work runs beside.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        at_end = train(args)
    except UserError as error:
        print(redact(str(error)).replace("\n", " "), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)
    if at_end is not None:
        at_end()
