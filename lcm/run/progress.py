"""The progress bar, the metrics, the check for a finite loss, and the stop flag.

Metrics go to the trackers and to `metrics.jsonl` every `--logging_steps`, as means over those steps and all processes.
Each optimizer step costs one all-reduce and one wait for the device; both are shared by the metrics, the check for a
finite loss, and the stop flag.
"""

import contextlib
import math
import resource
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lcm.errors import UserError
from lcm.options.plan import Plan
from lcm.options.types import Options
from lcm.results.metrics import MetricsFile
from lcm.run.signals import StopSignals
from lcm.run.trackers import Trackers
from lcm_common import relative_distance

MAX_SKIPPED_IN_A_ROW = 50  # the gradient scaler halves its scale of 65536 each time: by then it is 0
QUARTERS = 4  # parts of the teacher's timesteps for which the loss is logged


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on a GPU since `reset_peak_memory`, else of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory` on a GPU, without waiting for it.

    Linux could reset a process's peak too, but `time -v` and cluster managers would then report too little.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Window:
    """Sums over the steps since metrics were last logged."""

    def __init__(self) -> None:
        self.losses, self.counts = [0.0] * QUARTERS, [0.0] * QUARTERS  # of samples, by quarter of the timesteps
        self.gradient_norms: list[float] = []
        self.steps = 0
        self.seconds = self.waited = 0.0
        self.peak_memory = 0  # bytes

    def add(self, losses: list[float], counts: list[float], gradient_norm: float) -> None:
        """Add the sums of one optimizer step."""
        self.losses = [a + b for a, b in zip(self.losses, losses, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.gradient_norms += [gradient_norm] * math.isfinite(gradient_norm)  # not if fp16 overflowed
        self.steps += 1

    def means(self, num_timesteps: int) -> dict[str, float]:
        """The metrics; quarters without a drawn timestep are left out."""
        metrics = {"loss": sum(self.losses) / sum(self.counts)}
        if self.gradient_norms:
            metrics["gradient_norm"] = sum(self.gradient_norms) / len(self.gradient_norms)
        edges = [num_timesteps * i // QUARTERS for i in range(QUARTERS + 1)]
        for i, count in enumerate(self.counts):
            if count:
                metrics[f"loss_by_timestep/{edges[i]:03d}-{edges[i + 1] - 1:03d}"] = self.losses[i] / count
        return metrics


class Progress:
    """Progress bar, metrics, check for finite numbers, and stop flag of one run.

    `stopping` is the stop flag: True on all processes if one of them got a stop signal before the last `check`.
    `has_overflowed` says whether the gradient scaler skips the step that was checked last.
    `num_timesteps` is that of the teacher's noise schedule, `first_step` the number of steps that are finished.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: Options,
        plan: Plan,
        trackers: Trackers,
        num_timesteps: int,
        first_step: int,
    ):
        self.accelerator, self.args, self.plan, self.trackers = accelerator, args, plan, trackers
        self.num_timesteps = num_timesteps
        self.bar = tqdm(
            total=plan.max_train_steps,
            initial=first_step,
            desc="Steps",
            unit="step",
            disable=not accelerator.is_local_main_process,
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self.log_above_bar = contextlib.ExitStack()
        self.log_above_bar.enter_context(logging_redirect_tqdm())
        self.file = MetricsFile(args.output_dir)
        if accelerator.is_main_process:
            self.file.resume_from(first_step)
        self.signals = StopSignals(accelerator.is_local_main_process, after_loop=first_step >= plan.max_train_steps)
        self.stopping = self.has_overflowed = False
        self.started = self.last = time.perf_counter()
        self.waited = 0.0
        reset_peak_memory(accelerator.device)
        self.sums = torch.zeros(2, QUARTERS, device=accelerator.device)  # losses, counts
        self.window = Window()
        self.skipped_in_a_row = 0

    def timed(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches; measures how long the loop waits for them."""
        started = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def restart_clock(self) -> None:
        """Exclude pictures and checkpoints, which were just made, from the speed and memory of the steps."""
        self.last = time.perf_counter()
        reset_peak_memory(self.accelerator.device)

    def add_losses(self, losses: torch.Tensor, t: torch.Tensor) -> None:
        """Add the losses of one forward pass at their timesteps, both (B,), without waiting for the device."""
        quarter = t * QUARTERS // self.num_timesteps
        self.sums.index_add_(1, quarter, torch.stack([losses.detach().float(), torch.ones_like(t).float()]))

    def is_logged(self, step: int) -> bool:
        """Whether metrics are logged at this step."""
        return step % self.args.logging_steps == 0 or step == self.plan.max_train_steps

    def check(
        self,
        step: int,
        gradient_norm: torch.Tensor,
        weights: dict[str, torch.Tensor],
        averaged: dict[str, torch.Tensor],
    ) -> None:
        """Share the losses of the next optimizer step, number `step`, between processes; waits for the device.

        `gradient_norm` is a scalar; `weights` and `averaged` are the parameters of the student and of its EMA, the
        second empty without an EMA. Raises UserError, on all processes, if the loss or the norm is not finite. With
        fp16 the gradient scaler skips a step whose gradients overflow; only many such steps in a row are an error.
        """
        # Set before `received` is read. A signal in between saves a checkpoint that was not announced, never the
        # other way round.
        self.signals.after_loop = step >= self.plan.max_train_steps
        stop = self.sums.new_full((1,), float(self.signals.received is not None))  # `new_tensor` would wait
        shared = self.accelerator.reduce(torch.cat([self.sums.flatten(), stop]), reduction="sum")
        alike = [gradient_norm]  # equal on all processes
        if averaged and self.is_logged(step):
            alike.append(relative_distance(averaged, weights))
        # Sharded weights give sharded norms.
        alike = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in alike]
        numbers = torch.cat([shared, torch.stack([value.to(shared) for value in alike])]).tolist()  # the one wait
        losses, counts = numbers[:QUARTERS], numbers[QUARTERS : 2 * QUARTERS]
        stopping, norm, *distance = numbers[2 * QUARTERS :]
        self.sums.zero_()
        self.stopping = stopping > 0
        self.loss, self.distance = sum(losses) / sum(counts), distance
        self.refuse_unless_finite(step, self.loss, norm)
        self.window.add(losses, counts, norm)

    def refuse_unless_finite(self, step: int, loss: float, norm: float) -> None:
        """Raise UserError if the loss is not finite, or the gradients are not for too long."""
        has_scaler = self.accelerator.scaler is not None
        self.has_overflowed = has_scaler and not math.isfinite(norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.has_overflowed else 0
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif not math.isfinite(norm) and not has_scaler:
            problem = f"the norm of the gradients is {norm}"
        elif self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            problem = f"the gradients overflowed fp16 {MAX_SKIPPED_IN_A_ROW} times in a row"
        else:
            return
        raise UserError(
            f"{problem} at step {step}; training stops before the weights change, and the last checkpoint is intact. "
            "A lower --learning_rate, or bf16 instead of fp16, usually helps"
        )

    def step(self, step: int, learning_rate: float) -> None:
        """Show a finished optimizer step, and every `--logging_steps` log the metrics."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.window.seconds += seconds
        self.window.waited += self.waited
        self.waited = 0.0
        self.window.peak_memory = max(self.window.peak_memory, peak_memory(self.accelerator.device))
        images_per_second = self.plan.samples_per_step * self.window.steps / self.window.seconds
        waited = self.window.waited / self.window.seconds
        self.bar.update(1)
        slow = f", waits for data {waited:.0%}" if waited > 0.1 else ""
        self.bar.set_postfix_str(
            f"loss {self.loss:.4g}, lr {learning_rate:.3g}, {images_per_second:.3g} images/s{slow}"
        )
        if not self.is_logged(step) and not self.stopping:
            return
        metrics = {
            **self.window.means(self.num_timesteps),
            "lr": learning_rate,
            "images_per_second": images_per_second,
            "data_wait": min(waited, 1.0),
            "peak_memory_gb": self.window.peak_memory / 1e9,
        }
        if self.distance:
            metrics["ema_distance"] = self.distance[0]
        self.window = Window()
        self.trackers.log(metrics, step)
        if self.accelerator.is_main_process:
            self.file.append({"step": step, **metrics})

    def close(self) -> float:
        """Close the bar; returns the seconds since it was opened. May be called again."""
        self.bar.close()
        self.log_above_bar.close()
        return time.perf_counter() - self.started
