"""Errors that the user can mend, and the boundary that turns them into one line."""

import logging
import os
import sys

from lcm.secrets import redact


class UserError(Exception):
    """Something the user can mend; scripts print it in one line and exit with status 1."""


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run(train, args, interrupted="Stopped before the first step."):
    """Call `train(args)`; a UserError becomes one line on standard error and exit status 1.

    If `train` returns a function, it is called once the objects of `train` are freed. `interrupted` is what Ctrl-C
    prints; a training run takes it as a signal from its first step to its end.
    """
    # What the libraries say while they are imported (absent torchvision, absent kernels) concerns nothing here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
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
