"""One process of a run for test_distributed.py: `python tests/scripts/distributed_run.py KIND SCRIPT OPTIONS...`.

KIND `ddp` runs a script's `main` as it is. `fsdp` runs it with a student that torch's `fully_shard` splits over the
processes by gloo: accelerate 1.15 reaches FSDP on GPUs only, so `prepare` and the sharding of the target are replaced;
all else, from the loop to the files, is the product's. `joint` is one process that sees what two would: twice the
batch, made of the samples and draws of both.

Each writes the gradients of its first optimizer step to `gradients.pt` in its output folder.
"""

import gc
import importlib
import os
import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lcm import session
from lcm.data import loader
from lcm.models import family, networks, sharding

# FSDP2 without GPUs.


def shard(network):
    """Split each block, then what is left, as accelerate does; blocks lie within blocks, so from the inside out."""
    for module in reversed(list(network.modules())):
        if type(module).__name__ in network._no_split_modules or module is network:
            fully_shard(module)
    return network


def prepare_sharded(self, student, optimizer):
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    order = [names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
    parameters = dict(shard(student).named_parameters())
    optimizer.param_groups[0]["params"] = [parameters[name] for name in order]
    return student, self.prepare_optimizer(optimizer)


def shard_target(accelerator, network):
    network = shard(network)
    sharding.reshard_after_forward(network)
    return network


# Two processes in one.


class Pair(tuple):
    """The generators of both processes, in the place of one."""

    device = torch.device("cpu")


def halved(draw, size_at):
    """`draw` with the first dimension of its size, the argument at `size_at`, drawn half from each generator."""

    def drawn(*args, generator=None, **kwargs):
        if not isinstance(generator, Pair):
            return draw(*args, generator=generator, **kwargs)
        size = (args[size_at],) if isinstance(args[size_at], int) else args[size_at]
        half = (*args[:size_at], (size[0] // 2, *size[1:]), *args[size_at + 1 :])
        return torch.cat([draw(*half, generator=one, **kwargs) for one in generator])

    return drawn


def joint_batches(self):
    streams = [
        self.single_iter(loader.TrainingData(replace(self.config, batch_size=self.config.batch_size // 2,
                                                       rank=rank, num_processes=2)))
        for rank in (0, 1)
    ]  # fmt: skip
    for first, second in zip(*streams, strict=True):
        yield {
            name: torch.cat([value, second[name]]) if isinstance(value, torch.Tensor) else value + second[name]
            for name, value in first.items()
        }


def be_two_processes():
    one, sample = session.step_generator, family.sample_latents
    session.step_generator = lambda seed, rank, step, device: Pair(one(seed, r, step, device) for r in (0, 1))
    family.sample_latents = lambda moments, scaling_factor, pair: torch.cat(
        [sample(half, scaling_factor, one) for half, one in zip(moments.chunk(2), pair, strict=True)]
    )
    loader.TrainingData.single_iter = staticmethod(loader.TrainingData.__iter__)
    loader.TrainingData.__iter__ = joint_batches
    torch.randint = halved(torch.randint, 1)
    torch.randn, torch.rand = halved(torch.randn, 0), halved(torch.rand, 0)


def record_gradients():
    make = session.make_optimizer

    def recording(args, *more):
        optimizer = make(args, *more)

        def before_step(*_):
            path = os.path.join(args.output_dir, "gradients.pt")
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
            if not os.path.exists(path) and os.environ.get("RANK", "0") == "0":
                torch.save(gradients, path)

        optimizer.register_step_pre_hook(before_step)
        return optimizer

    session.make_optimizer = recording


def check_that_ddp_is_gone():
    """DistributedDataParallel that outlives the process group makes gloo hang at times: see `leave_process_group`."""
    destroy = torch.distributed.destroy_process_group

    def checked(*args):
        assert not any(issubclass(type(thing), DistributedDataParallel) for thing in gc.get_objects())
        destroy(*args)

    torch.distributed.destroy_process_group = checked


def main(kind, script, options):
    if kind == "fsdp":
        Accelerator.prepare = prepare_sharded
        networks.shard_like_student = shard_target
    if kind == "joint":
        be_two_processes()
    record_gradients()
    check_that_ddp_is_gone()
    importlib.import_module(script).main(options)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
