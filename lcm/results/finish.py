"""The results of a run: networks, scheduler and model card, in the output folder and on the Hub."""

import logging
import os

from accelerate import Accelerator
from diffusers import SchedulerMixin
from huggingface_hub import CommitOperationAdd, create_commit, create_repo

from lcm.data.tally import Tally
from lcm.errors import UserError, first_line
from lcm.models.networks import Networks
from lcm.models.usage import Machine
from lcm.options.files import repository_name
from lcm.options.plan import Plan
from lcm.options.types import Options
from lcm.pictures.validation import pages_of
from lcm.results.card import model_card, report_name, teacher_name
from lcm.results.curves import CURVES_FILE, draw_curves
from lcm.results.metrics import METRICS_FILE, MetricsFile
from lcm.storage import complete_entries

logger = logging.getLogger(__name__)


class Results:
    """Saves the trained networks and, with `--push_to_hub`, uploads them. `sampler` is the scheduler to sample with.

    The repository is made at once, so that a wrong name or a missing token shows before training: raises UserError.
    """

    def __init__(
        self, accelerator: Accelerator, args: Options, plan: Plan, networks: Networks, sampler: SchedulerMixin
    ):
        self.accelerator, self.args, self.plan = accelerator, args, plan
        self.networks, self.sampler = networks, sampler
        if args.push_to_hub and accelerator.is_main_process:
            name = repository_name(args)
            try:
                self.repo_id = create_repo(name, exist_ok=True, private=args.hub_private, token=args.hub_token).repo_id
            except Exception as error:
                raise UserError(f"--push_to_hub: cannot make {name!r} on the Hub: {first_line(error)}") from error

    def save(self, steps: int, seconds: float, tally: Tally) -> None:
        """Write the networks and the model card to the output folder, and print where everything is.

        All processes call this. Raises UserError if the folder cannot be written to.
        """
        complete = self.networks.gathered()
        if self.accelerator.is_main_process:
            output_dir = self.args.output_dir
            here = Machine(self.accelerator.device.type)
            code = complete.usage_code(self.args.pretrained_teacher_model, output_dir, False, here)
            self.draw_curves()
            pictures = {
                what: [os.path.relpath(path, output_dir) for path in paths]
                for what, paths in self.pictures(steps).items()
            }
            report = report_name(output_dir, "model_card")
            if report != "README.md":
                logger.warning("%s/README.md is not a run's report and stays; the report is %s", output_dir, report)
            try:
                with complete_entries(output_dir) as folder:
                    complete.export(folder)
                    self.sampler.save_pretrained(os.path.join(folder, "scheduler"))
                    card = model_card(self.args, self.plan, complete, code, steps, pictures)
                    card.save(os.path.join(folder, report))
            except Exception as error:  # on a full disk safetensors raises an error of its own
                raise UserError(
                    f"--output_dir: cannot write to {output_dir!r}: {first_line(error)}; checkpoints are intact"
                ) from error
            lines = [
                f"\nTrained to step {steps}, {seconds:.0f} s in this session. {tally}.\n",
                *complete.describe(output_dir),
                f"{output_dir}/scheduler: the scheduler that fits",
                f"{output_dir}/validation: pictures; {output_dir}/{CURVES_FILE}: curves; {output_dir}/{report}: the "
                "report with both",
                f"{output_dir}/{METRICS_FILE}, {output_dir}/{self.args.logging_dir}: the curves as numbers\n",
            ]
            print("\n".join(lines) + f"\n{code}")

    def draw_curves(self) -> None:
        """Draw the metrics of the run. A failure is logged and does not end the run."""
        try:
            rows = MetricsFile(self.args.output_dir).read()
            draw_curves(rows, os.path.join(self.args.output_dir, CURVES_FILE))
        except Exception as error:
            logger.warning("No curves: %s", first_line(error))

    def pictures(self, steps: int) -> dict[str, list[str]]:
        """Paths of the existing pictures for the model card: {"validation": pages, "training": curves}."""
        curves = os.path.join(self.args.output_dir, CURVES_FILE)
        return {
            "validation": pages_of(self.args.output_dir, steps),
            "training": [curves] if os.path.isfile(curves) else [],
        }

    def stop(self, steps: int, seconds: float) -> None:
        """After a stop signal, print how to resume."""
        if self.accelerator.is_main_process:
            folder = os.path.join(self.args.output_dir, f"checkpoint-{steps}")
            print(
                f"\nStopped at step {steps}, {seconds:.0f} s in this session. Everything is in {folder}; the same "
                "command with --resume_from_checkpoint=latest resumes."
            )

    def push(self, steps: int) -> None:
        """With `--push_to_hub`, upload the networks, the scheduler, the pictures and a model card, in one commit.

        No optimizer states, logs or local paths are uploaded. Raises UserError if the upload still fails after the
        client's own retries; everything is on disk by then.
        """
        if not (self.args.push_to_hub and self.accelerator.is_main_process):
            return
        output_dir = self.args.output_dir
        code = self.networks.usage_code(teacher_name(self.args), self.repo_id, True, Machine("cuda"))
        pictures = {  # {path in the repository: path here}
            what: {f"{what}{f'-{i}' if len(paths) > 1 else ''}.png": path for i, path in enumerate(paths, 1)}
            for what, paths in self.pictures(steps).items()
        }
        names = {what: [*paths] for what, paths in pictures.items()}
        card = model_card(self.args, self.plan, self.networks, code, steps, names, is_published=True)
        files: dict[str, str | bytes] = {
            **self.networks.pushed_files(output_dir),
            "scheduler/scheduler_config.json": os.path.join(output_dir, "scheduler", "scheduler_config.json"),
            **pictures["validation"],
            **pictures["training"],
            "README.md": str(card).encode(),
        }
        try:
            create_commit(
                self.repo_id,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()],
                commit_message="End of training",
                token=self.args.hub_token,
            )
        except Exception as error:
            reason = f"the upload failed ({first_line(error)}); everything is in {output_dir!r}"
            raise UserError(f"--push_to_hub: {reason}") from error
        print(f"Pushed to {self.repo_id}")
