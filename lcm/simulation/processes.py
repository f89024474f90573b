"""One process of several, simulated: torch's own DistributedDataParallel or FSDP2, with collectives that do nothing.

The process group is torch's "fake" one: it has N processes, of which this is the first, and the others do not exist.
What accelerate and torch allocate, cast and copy is done by their own code on the simulated device. A few of their
functions need values, or parts of CUDA that this torch may lack. Those are replaced here:

- DistributedDataParallel does not compare or broadcast weights at the start, and has no timers. It keeps the gradient
  buckets of its first step; on a GPU it sorts them once, in the order of the gradients, in the same total size.
- FSDP2 runs on streams and events that do nothing: memory is free once Python frees it. What the allocator keeps for
  a stream longer than that is not counted.
"""

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed.fsdp._fully_shard._fsdp_init as fsdp_init
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_groups
import torch.nn.parallel.distributed as ddp
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from lcm.data import loader
from lcm.errors import UserError, first_line
from lcm.run import checkpoints
from lcm.simulation.device import SimulatedCuda

BUCKETS = "buckets of DistributedDataParallel"
GATHERED = "gathered by FSDP"


def launch(device: SimulatedCuda, num_processes: int, config_file: str | None = None) -> None:
    """Until the device is left, be the first of several processes that `accelerate launch` started.

    `config_file` is that of `accelerate config`; without one the default is read if it exists. Variables of the
    environment count, too. Raises UserError if accelerate refuses the file.
    """
    set_environment(device, launchers_variables(num_processes, config_file))
    with unset_fake_temporarily():
        torch.distributed.init_process_group("fake", rank=0, world_size=num_processes, store=FakeStore())
    device.callback(torch.distributed.destroy_process_group)
    for module in (loader, checkpoints):
        device.patch(module, "gather_object", lambda objects: objects)
    patch_ddp(device)
    patch_fsdp(device)


def launchers_variables(num_processes: int, config_file: str | None) -> dict[str, str]:
    """What `accelerate launch` sets in the environment of the first process."""
    number = str(num_processes)
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    file = config_file or default_config_file
    if config_file is None and not os.path.isfile(file):
        return variables
    try:
        options = [f"--config_file={file}", f"--num_processes={number}", "script"]
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
        return prepare_multi_gpu_env(args) | variables
    except Exception as error:
        raise UserError(f"--config_file: accelerate refuses {file!r}: {first_line(error)}") from error


def set_environment(device: SimulatedCuda, variables: dict[str, str]) -> None:
    """Set variables of the environment until the device is left."""
    before = dict(os.environ)
    device.callback(os.environ.update, before)
    device.callback(os.environ.clear)  # which comes first
    os.environ.update(variables)


# DistributedDataParallel


class Reducer:
    """The reducer of DistributedDataParallel, without two of its habits.

    It does not sort its buckets anew, for which it reads numbers, and it does not count passes, so that it takes no
    times, for which it records events of CUDA.
    """

    def __init__(self, reducer: Any):
        self.reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False

    def prepare_for_forward(self) -> None:
        pass


class Logger:
    """In the place of the statistics of DistributedDataParallel, which need timers of CUDA."""

    def set_runtime_stats_and_log(self) -> None:
        pass


def reduce_nothing(state: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The all-reduce of a bucket in place; a fake process group does not return the bucket."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def patch_ddp(device: SimulatedCuda) -> None:
    """DistributedDataParallel on fake tensors."""

    def init(wrapper: Any, *args: Any, **kwargs: Any) -> None:
        with device.ledger.within(BUCKETS):
            real_init(wrapper, *args, **kwargs)
        wrapper.register_comm_hook(None, reduce_nothing)
        wrapper.reducer, wrapper.logger = Reducer(wrapper.reducer), Logger()

    device.patch(ddp, "_verify_param_shape_across_processes", lambda *args, **kwargs: True)
    device.patch(ddp, "_sync_module_states", lambda *args, **kwargs: None)
    real_init = device.patch(ddp.DistributedDataParallel, "__init__", init)


# FSDP2


class Event:
    """An event or a stream of CUDA. All is done in the order in which it is called."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def nothing(self, *args: Any, **kwargs: Any) -> "Event":
        return self

    record = wait = wait_stream = wait_event = record_event = synchronize = nothing


def patch_fsdp(device: SimulatedCuda) -> None:
    """FSDP2, and what accelerate does for it, on fake tensors."""

    def move(parameters: Iterable[torch.Tensor], buffers: Iterable[torch.Tensor], target: torch.device) -> None:
        tensors = [*parameters, *buffers]
        real_move(tensors, [], target)
        for tensor in tensors:  # it assigned `data`, and a fake tensor then keeps its device
            if isinstance(tensor, FakeTensor):
                tensor.fake_device = target

    def make_mesh(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():  # it reads numbers
            return real_make_mesh(*args, **kwargs)

    stream = Event()
    for name in ("Stream", "Event"):
        device.patch(torch.cuda, name, Event)
    for name in ("current_stream", "default_stream"):
        device.patch(torch.cuda, name, lambda device=None: stream)
    device.patch(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    # accelerate knows parameters by their addresses.
    device.patch(FakeTensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata)
    for name in ("foreach_all_gather", "foreach_all_gather_copy_out", "foreach_reduce"):
        device.wrap(fsdp_groups, name, GATHERED)
    real_move = device.patch(fsdp_init, "_move_states_to_device", move)
    real_make_mesh = device.patch(fsdp_init, "init_device_mesh", make_mesh)
