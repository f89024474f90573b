"""A run that is killed at any moment, and started again with the same command, ends as if nothing had been.

A moment is a forward pass, or the instant before a file or folder in the output folder is opened, made, renamed or
removed, or one is flushed: start, steps, checkpoint writing, rotation, and the results at the end. They are counted in
an unbroken run; then SIGKILL comes at moments spread evenly over them. KILL_MOMENTS=36 tries as many (default: 6).
"""

import os
import signal
import sys

import torch
from conftest import EVERYTHING_AT_RANDOM, forked

from lcm.models import family
from lcm.run import progress

KILL_MOMENTS = int(os.environ.get("KILL_MOMENTS", "6"))
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
OPTIONS = [
    "--max_train_steps=5",
    "--checkpointing_steps=1",
    "--checkpoints_total_limit=2",
    "--validation_steps=2",
    *EVERYTHING_AT_RANDOM,
]


def run(script, folder, kill_at=None):
    """Run a script in a process of its own, and kill it at that moment, counted from 1.

    Returns the names of the moments that it came to.
    """
    log = folder.parent / f"{folder.name}.moments"

    def watched():
        lead_a_dangerous_life(folder, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), kill_at)
        script.main(folder, *OPTIONS)

    done = forked(watched)
    assert done.returncode == (0 if kill_at is None else -signal.SIGKILL), done.stderr
    return log.read_text().splitlines()


def lead_a_dangerous_life(folder, log, kill_at):
    """Note every moment in the file `log`, and end this process at one of them."""
    process, count = os.getpid(), 0

    def moment(name):
        nonlocal count
        if os.getpid() == process:  # not in the data workers
            count += 1
            os.write(log, f"{name}\n".encode())
            if count == kill_at:
                os.kill(process, signal.SIGKILL)

    def on_event(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            moment(f"{event} {os.path.relpath(arguments[0], folder)}")

    def wrap(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            moment(name)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    wrap(family, "load_unet")
    wrap(progress.Progress, "add_losses")
    wrap(progress.Progress, "check")
    sys.addaudithook(on_event)


def test_killed_at_any_moment(script, tmp_path):
    """Bit for bit, with accumulation, two workers, flips, dropped captions, rotation; the LoRA with dropout."""
    moments = run(script, tmp_path / "unbroken")
    for part in ("load_unet", "add_losses", "open checkpoint-2.partial", "os.rename checkpoint-3.partial",
                 "shutil.rmtree checkpoint-1.partial", "open export.partial", "os.rename export.partial"):  # fmt: skip
        assert any(moment.startswith(part) for moment in moments), part
    unbroken = script.weights(tmp_path / "unbroken")
    for i in range(KILL_MOMENTS):
        kill_at = 1 + i * (len(moments) - 1) // max(1, KILL_MOMENTS - 1)
        folder = tmp_path / f"killed-{kill_at}"
        seen = run(script, folder, kill_at)
        assert len(seen) == kill_at
        run(script, folder)
        resumed = script.weights(folder)
        assert unbroken.keys() == resumed.keys()
        wrong = [key for key in unbroken if not torch.equal(unbroken[key], resumed[key])]
        assert not wrong, f"killed at {seen[-1]}: {len(wrong)} tensors differ, such as {wrong[0]}"
        assert not list(folder.glob("*.partial")), f"killed at {seen[-1]}"
