"""What a run shows while it trains: a bar, metrics, and that it was told to stop.

Metrics go to the trackers and to `metrics.jsonl` every `--logging_steps`, as means over those steps and all processes.
For them, for the check that the loss is a number, and for word of a signal, the processes speak once per optimizer
step, and the host waits for the device once.
"""

import contextlib
import math
import resource
import time

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lcm.errors import UserError
from lcm.results.metrics import MetricsFile
from lcm.run.signals import StopSignals
from lcm_common import relative_distance

MAX_SKIPPED_IN_A_ROW = 50  # the scaler halves its scale of 65536 at each: by then no scale is left
QUARTERS = 4  # of the teacher's timesteps


def peak_memory(device):
    """The most memory in bytes: of the GPU since `reset_peak_memory`, or without one of this process in its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device):
    """Begin to measure `peak_memory` again, without waiting for the device; a process's own peak is left as it is.

    Linux can reset that one, too, but for everyone: `time -v` and cluster managers would then report too little.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Window:
    """Sums over the steps since metrics were last logged."""

    def __init__(self):
        self.losses, self.counts = [0.0] * QUARTERS, [0] * QUARTERS  # of samples, by quarter of the timesteps
        self.gradient_norms, self.steps = [], 0
        self.seconds = self.waited = 0.0
        self.peak_memory = 0  # bytes, of the step that took most

    def add(self, losses, counts, gradient_norm):
        self.losses = [a + b for a, b in zip(self.losses, losses, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.gradient_norms += [gradient_norm] * math.isfinite(gradient_norm)  # it is not where fp16 overflowed
        self.steps += 1

    def means(self, num_timesteps):
        """Metrics as a dict of floats; quarters of which no timestep was drawn are left out."""
        metrics = {"loss": sum(self.losses) / sum(self.counts)}
        if self.gradient_norms:
            metrics["gradient_norm"] = sum(self.gradient_norms) / len(self.gradient_norms)
        edges = [num_timesteps * i // QUARTERS for i in range(QUARTERS + 1)]
        for i, count in enumerate(self.counts):
            if count:
                metrics[f"loss_by_timestep/{edges[i]:03d}-{edges[i + 1] - 1:03d}"] = self.losses[i] / count
        return metrics


class Progress:
    """The bar, the metrics, the check that loss and gradients are numbers, and word of a signal to stop.

    `stopping` is True, on all processes alike, when one of them was told to stop before the last `check`.
    """

    def __init__(self, accelerator, args, plan, trackers, num_timesteps, first_step):
        self.accelerator, self.args, self.plan, self.trackers = accelerator, args, plan, trackers
        self.num_timesteps = num_timesteps  # of the noise schedule
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
            self.file.go_on_from(first_step)
        self.signals = StopSignals(accelerator.is_local_main_process, after_loop=first_step >= plan.max_train_steps)
        self.stopping = False
        self.started = self.last = time.perf_counter()
        self.waited = 0.0
        reset_peak_memory(accelerator.device)
        self.sums = torch.zeros(2, QUARTERS, device=accelerator.device)  # losses, counts
        self.window = Window()
        self.skipped_in_a_row = 0

    def timed(self, batches):
        """The same batches; how long the loop waits for them is measured."""
        started = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def restart_clock(self):
        """Leave what was done since the last step, pictures and checkpoints, out of the speed and memory of steps."""
        self.last = time.perf_counter()
        reset_peak_memory(self.accelerator.device)

    def add_losses(self, losses, t):
        """Keep the losses of one forward pass and their timesteps, both (B,), without waiting for them."""
        quarter = t * QUARTERS // self.num_timesteps
        self.sums.index_add_(1, quarter, torch.stack([losses.detach().float(), torch.ones_like(t).float()]))

    def is_logged(self, step):
        return step % self.args.logging_steps == 0 or step == self.plan.max_train_steps

    def check(self, step, gradient_norm, weights, averaged):
        """Share the losses of an optimizer step, number `step`, that is about to be taken; waits for the device.

        `gradient_norm` is a scalar tensor; `weights` and their moving average `averaged` are dicts of parameters, the
        second one empty if there is none. Raises UserError, on all processes alike, if the loss or the norm is not
        finite. With fp16 the gradient scaler skips a step whose gradients overflow, so that only many such steps in a
        row are an error.
        """
        # Before `received` is read: a signal that comes between the two saves a checkpoint, and promises none.
        self.signals.after_loop = step >= self.plan.max_train_steps
        stop = self.sums.new_tensor([float(self.signals.received is not None)])
        shared = self.accelerator.reduce(torch.cat([self.sums.flatten(), stop]), reduction="sum")
        alike = [gradient_norm]  # on all processes
        if averaged and self.is_logged(step):
            alike.append(relative_distance(averaged, weights))
        # Of weights that are split over processes, the whole.
        alike = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in alike]
        numbers = torch.cat([shared, torch.stack([value.to(shared) for value in alike])]).tolist()  # the one wait
        losses, counts = numbers[:QUARTERS], numbers[QUARTERS : 2 * QUARTERS]
        stop, norm, *distance = numbers[2 * QUARTERS :]
        self.sums.zero_()
        self.stopping = stop > 0
        self.loss, self.distance = sum(losses) / sum(counts), distance
        self.refuse_what_is_no_number(step, self.loss, norm)
        self.window.add(losses, counts, norm)

    def refuse_what_is_no_number(self, step, loss, norm):
        has_scaler = self.accelerator.scaler is not None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if has_scaler and not math.isfinite(norm) else 0
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif not math.isfinite(norm) and not has_scaler:
            problem = f"the norm of the gradients is {norm}"
        elif self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            problem = f"the gradients overflowed fp16 {MAX_SKIPPED_IN_A_ROW} times in a row"
        else:
            return
        raise UserError(
            f"{problem} at step {step}; training stops before the weights are touched, and the last checkpoint is as "
            "it was. A lower --learning_rate, or bf16 in place of fp16, is the usual cure"
        )

    def step(self, step, learning_rate):
        """Show one finished optimizer step, and log the metrics if it is their turn."""
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

    def close(self):
        """End the bar; returns the seconds since it began. May be called again."""
        self.bar.close()
        self.log_above_bar.close()
        return time.perf_counter() - self.started
