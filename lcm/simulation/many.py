"""Several simulated runs at a time, each in a process of its own."""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from lcm.errors import UserError, first_line

if TYPE_CHECKING:
    from lcm.simulation.training import Record

# Forked from a server that has imported all there is, and never ran a backward pass: autograd notes which devices
# there are when it starts.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lcm.simulation.training"])
Peaks = dict[str, int]  # {part of a run: its peak of memory in bytes}


@dataclasses.dataclass(frozen=True)
class Command:
    """A script and its options."""

    script: str  # the module's name
    options: tuple[str, ...]
    with_pictures: bool = False
    num_processes: int = 1
    config_file: str | None = None

    def with_more(self, more: Iterable[str]) -> "Command":
        """The same with more options, which replace earlier ones of the same names."""
        return dataclasses.replace(self, options=(*self.options, *more))

    def run(self) -> "Record":
        """Simulate it in this process. Raises UserError for what the script itself refuses."""
        from lcm.simulation.training import Simulation

        return Simulation(**dataclasses.asdict(self) | {"options": list(self.options)}).run()


def num_cores() -> int:
    """How many runs to simulate at a time."""
    return len(os.sched_getaffinity(0))


def be_silent() -> None:
    """Print nothing from here on, in this process."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)


def answer_of(work: Callable[..., None], *args: Any) -> Any:
    """What `work(*args, connection)` sends from a process of its own, or a line if the process dies before."""
    receiving, sending = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=work, args=(*args, sending), daemon=True)
    process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        return "its process was killed"
    finally:
        process.join()


def simulate(command: Command, sending: Connection) -> None:
    """Send the peaks of a command's parts, or in one line why there are none. Nothing is printed."""
    be_silent()
    try:
        sending.send(command.run().peaks)
    except BaseException as error:
        sending.send(first_line(error))


def peaks_of(command: Command) -> Peaks:
    """Simulate a command in another process. Raises UserError if that fails."""
    answer = answer_of(simulate, command)
    if isinstance(answer, str):
        raise UserError(f"dry run: {command.script} {' '.join(command.options)} fails: {answer}")
    return answer


def make_pool() -> ThreadPoolExecutor:
    """Threads that wait for as many simulated runs as there are cores."""
    return ThreadPoolExecutor(num_cores())
