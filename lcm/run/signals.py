"""SIGTERM and SIGINT."""

import contextlib
import os
import signal
import threading


class StopSignals:
    """SIGTERM and SIGINT. In the loop they ask for a checkpoint and a clean end after the current step; after it the
    pictures and results are finished, which is all there is left to do. A second one ends at once.
    """

    def __init__(self, speaks, after_loop=False):
        self.received, self.speaks, self.after_loop = None, speaks, after_loop
        self.previous = {}
        if threading.current_thread() is threading.main_thread():  # nowhere else can a handler be set
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number).name
        if self.speaks:
            what = "finishing the step, then saving a checkpoint"
            if self.after_loop:
                what = "all steps are done; finishing pictures, results and uploads"
            words = f"\n{self.received}: {what}; once more ends at once\n"
            with contextlib.suppress(OSError):  # a closed terminal must not cost the checkpoint
                os.write(2, words.encode())  # not by `logging`, which may be in the middle of a line

    def restore(self):
        """Put the handlers of before back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
