"""Stop signals: SIGTERM, as from SLURM, and SIGINT, as from Ctrl-C."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Handlers of SIGTERM and SIGINT. The first signal is kept in `received`; a second one ends the process at once.

    In the loop a signal leads to a checkpoint and a clean end after the current step. After the loop (`after_loop`)
    only pictures and results are left, and are finished. `prints` says whether this process tells the user so.
    """

    def __init__(self, prints: bool, after_loop: bool = False):
        self.received: str | None = None
        self.prints, self.after_loop = prints, after_loop
        self.previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # only there can a handler be set
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name
        if self.prints:
            what = "finishing the step, then saving a checkpoint"
            if self.after_loop:
                what = "all steps are done; finishing pictures, results and uploads"
            message = f"\n{self.received}: {what}; once more ends at once\n"
            with contextlib.suppress(OSError):  # a closed terminal must not cost the checkpoint
                os.write(2, message.encode())  # `logging` may be in the middle of a line

    def restore(self) -> None:
        """Restore the handlers of before. May be called again."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
