"""One training run but for the passes of Algorithm 1: what comes before, around and after them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from lcm.data.config import data_config
from lcm.data.loader import TrainingData
from lcm.models.family import Family
from lcm.models.networks import Networks
from lcm.models.speed import enable_memory_savers
from lcm.options.plan import Plan
from lcm.options.types import Options
from lcm.pictures.samplers import student_scheduler
from lcm.pictures.validation import Validation
from lcm.results.finish import Results
from lcm.run.checkpoints import Checkpoints, TrainingState
from lcm.run.describe import describe_run
from lcm.run.optimizers import make_lr_scheduler, make_optimizer
from lcm.run.progress import Progress
from lcm.run.start import leave_process_group, step_generator
from lcm.run.trackers import Trackers
from lcm_common import DDIMSolver


class Session:
    """Data, optimizer, checkpoints, trackers, progress, validation and results of one run.

    The script runs the passes: it iterates over `batches`, calls `record` after each backward pass and `check` before
    each optimizer step, and `finish` at the end. `optimizer` is the one to step. All processes call all methods.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: Options,
        plan: Plan,
        family: Family,
        networks: Networks,
        solver: DDIMSolver,
    ):
        self.accelerator, self.args, self.plan, self.networks = accelerator, args, plan, networks
        enable_memory_savers(args, accelerator, networks)
        self.data = TrainingData(data_config(args, plan, accelerator.process_index), accelerator.device)
        optimizer = make_optimizer(args, plan, networks.trainable_parameters())
        self.lr_scheduler = make_lr_scheduler(args, plan, optimizer)
        self.optimizer = networks.prepare(accelerator, optimizer)
        sampler = student_scheduler(family.noise_schedule, args)
        self.trackers = Trackers(accelerator, args, plan)
        state = TrainingState(networks, self.optimizer, self.lr_scheduler, self.data, sampler)
        self.checkpoints = Checkpoints(accelerator, args, plan, self.trackers, state)
        self.validation = Validation(accelerator, args, plan, family, networks, self.trackers.log_pictures)
        self.results = Results(accelerator, args, plan, networks, sampler)
        describe_run(args, plan, accelerator.device, networks, solver, self.data.config)
        self.step = self.checkpoints.resume()  # finished optimizer steps
        self.trackers.start(self.step)
        self.validation.draw_teacher(self.step)
        self.progress = Progress(accelerator, args, plan, self.trackers, len(solver.alphas), self.step)

    def batches(self) -> Iterator[tuple[dict[str, Any], torch.Generator]]:
        """Yield (batch, generator) for each forward pass, until the last step or a stop signal.

        The generator's draws are a function of the seed, the process and the pass. When an optimizer step is done, its
        metrics, checkpoint and pictures come before the next batch.
        """
        if self.step == self.plan.max_train_steps:
            return
        rank, device = self.accelerator.process_index, self.accelerator.device
        first_pass = self.step * self.plan.gradient_accumulation_steps
        with self.closing_on_error():
            for forward_pass, batch in enumerate(self.progress.timed(self.data), first_pass):
                yield batch, step_generator(self.plan.seed, rank, forward_pass, device)
                if self.accelerator.sync_gradients:
                    self.end_step()
                    if self.step == self.plan.max_train_steps or self.progress.stopping:
                        return

    def record(self, losses: torch.Tensor, t: torch.Tensor) -> None:
        """Keep the losses of one pass and their timesteps, both (B,), for the metrics."""
        self.progress.add_losses(losses, t)

    def check(self, gradient_norm: torch.Tensor) -> None:
        """Share losses and the stop flag. Raises UserError, on all processes, if loss or norm are not finite."""
        with self.closing_on_error():
            self.progress.check(self.step + 1, gradient_norm, self.networks.weights, self.networks.averaged)

    @property
    def progress_made(self) -> float:
        """The part of the optimizer steps that are done, in [0, 1)."""
        return self.step / self.plan.max_train_steps

    @property
    def step_was_taken(self) -> bool:
        """Whether the weights have just changed: not while gradients accumulate, nor if they overflowed fp16.

        `Accelerator.optimizer_step_was_skipped` does not see it if a fused optimizer skips a step.
        """
        return self.accelerator.sync_gradients and not self.progress.has_overflowed

    def end_step(self) -> None:
        """What follows an optimizer step: learning rate, metrics, and at times a checkpoint and pictures."""
        learning_rate = float(self.lr_scheduler.get_last_lr()[0])
        if self.step_was_taken:
            self.lr_scheduler.step()
        self.step += 1
        self.progress.step(self.step, learning_rate)
        if self.step % self.args.checkpointing_steps == 0 or self.progress.stopping:
            self.checkpoints.save(self.step)
        if self.step == self.plan.max_train_steps or self.progress.stopping:
            return
        if self.step % self.args.validation_steps == 0:
            self.validation.run(self.step)
        self.progress.restart_clock()

    def finish(self) -> Callable[[], None]:
        """Draw, save and publish what was trained; or, after a stop signal, say how to resume.

        Returns a function that ends the process group and restores the signal handlers, to be called once the networks
        are freed. Until then a stop signal does not make a complete run a failed one.
        """
        with self.closing_on_error():
            if self.step < self.plan.max_train_steps:
                self.results.stop(self.step, self.progress.close())
                self.trackers.finish()
            else:
                self.validation.run(self.step)
                seconds, tally = self.progress.close(), self.data.totals()
                self.trackers.log(tally.as_scalars(), self.step)
                self.results.save(self.step, seconds, tally)
                self.trackers.finish()  # before the upload, which may fail
                self.results.push(self.step)
        restore_signals = self.progress.signals.restore

        def leave() -> None:  # must not hold the session
            leave_process_group()
            restore_signals()

        return leave

    @contextlib.contextmanager
    def closing_on_error(self) -> Iterator[None]:
        """Close the progress bar and restore the signal handlers before an error is shown."""
        try:
            yield
        except BaseException:
            self.progress.close()
            self.progress.signals.restore()
            raise
