"""What a run leaves behind: what was trained, the scheduler that fits, a model card, and all of it on the Hub.

`FullModel` here and `LoraModel` in `models/lora.py` know the files of what was trained; `Export` writes, pushes them.
"""

import json
import logging
import os

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import CommitOperationAdd, create_commit, create_repo

from lcm.models import sharding as lcm_sharding
from lcm.options.groups import UserError, default_guidance_scale, first_line, repository_name
from lcm.pictures.validation import pages_of
from lcm.results.card import Machine, draw_curves, model_card, report_name, teacher_name
from lcm.run.checkpoints import whole_entries
from lcm.run.progress import METRICS_FILE, MetricsFile

logger = logging.getLogger(__name__)

CURVES_FILE = "training.png"


class FullModel:
    """A whole U-Net that was trained, and its moving average, in the layout of diffusers.

    `networks` maps folder names to the models, unwrapped; `exported` names the one to sample from, which
    `scheduler` fits.
    """

    title = "A latent consistency model"
    tags = ["latent-consistency-model", "stable-diffusion", "text-to-image"]
    relation = "finetune"

    def __init__(self, args, networks, exported, scheduler):
        self.args, self.networks, self.exported, self.scheduler = args, networks, exported, scheduler
        self.outputs = [*networks, "scheduler"]

    def gathered(self):
        """The same with whole networks, where FSDP splits them over processes; all processes call this together, and
        the first one's is of use."""
        networks = {name: lcm_sharding.gathered(network) for name, network in self.networks.items()}
        return FullModel(self.args, networks, self.exported, self.scheduler)

    def save(self, folder):
        """Write what a checkpoint needs, and the scheduler, so that it can be sampled from, to `folder`."""
        for name, network in self.networks.items():
            network.save_pretrained(os.path.join(folder, name))
        self.scheduler.save_pretrained(os.path.join(folder, "scheduler"))

    def load(self, folder):
        """Read what `save` wrote."""
        for name, network in self.networks.items():
            saved = UNet2DConditionModel.from_pretrained(folder, subfolder=name)
            lcm_sharding.load_weights(network, saved.state_dict())

    def export(self, folder):
        """Write each network to its own folder in `folder`, in float32 and as fp16 variant."""
        self.save(folder)
        for name, network in self.networks.items():
            weights = {key: tensor.to("cpu", torch.float16) for key, tensor in network.state_dict().items()}
            with torch.device("meta"):  # no second copy in float32, on the GPU or here
                half = type(network).from_config(network.config)
            half.load_state_dict(weights, assign=True)
            half.save_pretrained(os.path.join(folder, name), variant="fp16")

    def describe(self, output_dir):
        """Lines that say what `export` wrote."""
        names = ", ".join(os.path.join(output_dir, name) for name in self.networks)
        return [f'{names}: the networks, also as variant="fp16"; use {self.exported}']

    def pushed_files(self, output_dir):
        """What goes to the Hub, as {path in the repository: path here}: the exported network lies in the root."""
        folder = os.path.join(output_dir, self.exported)
        return {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}

    def usage_code(self, teacher, source, on_hub, machine):
        """Python that samples from `source`, a repository if `on_hub`, else this run's output folder, on a Machine."""
        args = self.args
        where = "" if on_hub else f', subfolder="{self.exported}"'
        where += ', variant="fp16"' if machine.device != "cpu" else ""
        scale, steps = default_guidance_scale(args), min(4, args.num_ddim_timesteps)
        return f"""\
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel

{machine.other_kind}
unet = UNet2DConditionModel.from_pretrained("{source}"{where}, {machine.dtype})
scheduler = LCMScheduler.from_pretrained("{source}", subfolder="scheduler")
pipeline = DiffusionPipeline.from_pretrained(
    "{teacher}", unet=unet, scheduler=scheduler, {machine.dtype}
){machine.move}

# Trained for guidance scales from {args.w_min + 1:g} to {args.w_max + 1:g}; a negative prompt has no effect.
prompt = {json.dumps(args.validation_prompts[0], ensure_ascii=False)}
image = pipeline(prompt, num_inference_steps={steps}, guidance_scale={scale:g}).images[0]
image.save("lcm.png")
"""

    def card_text(self):
        """A sentence on what it is and how it is used."""
        return "This U-Net samples in 1 to 8 steps. The guidance scale is one of its inputs and costs nothing extra."

    def card_rows(self):
        """Rows for the card's table on the training, as a dict."""
        return {"guidance embedding": self.args.unet_time_cond_proj_dim, "EMA decay": self.args.ema_decay}


class Export:
    """Saves what was trained and, if asked, pushes it. The repository is made at once, so that a wrong name or a
    missing token shows before training; raises UserError then.

    `trained` is a FullModel or a LoraModel.
    """

    def __init__(self, accelerator, args, trackers, trained):
        self.accelerator, self.args, self.trackers, self.trained = accelerator, args, trackers, trained
        if args.push_to_hub and accelerator.is_main_process:
            name = repository_name(args)
            try:
                self.repo_id = create_repo(name, exist_ok=True, private=args.hub_private, token=args.hub_token).repo_id
            except Exception as error:
                raise UserError(f"--push_to_hub: cannot make {name!r} on the Hub: {first_line(error)}") from error

    def finish(self, steps, seconds, data):
        """Write what was trained and the report to `output_dir`, push, and say where everything is."""
        tally = data.totals()
        self.trackers.log(tally.as_scalars(), step=steps)
        trained = self.trained.gathered()
        if self.accelerator.is_main_process:
            output_dir = self.args.output_dir
            here = Machine(self.accelerator.device.type)
            code = trained.usage_code(self.args.pretrained_teacher_model, output_dir, False, here)
            self.draw_curves()
            pictures = {
                what: [os.path.relpath(path, output_dir) for path in paths]
                for what, paths in self.pictures(steps).items()
            }
            report = report_name(output_dir, "model_card")
            if report != "README.md":
                logger.warning("%s/README.md is not a run's report and stays; the report is %s", output_dir, report)
            try:
                with whole_entries(output_dir) as folder:
                    trained.export(folder)
                    card = model_card(self.args, trained, code, steps, pictures)
                    card.save(os.path.join(folder, report))
            except Exception as error:  # for a full disk safetensors raises an error of its own
                raise UserError(
                    f"--output_dir: cannot write to {output_dir!r}: {first_line(error)}; checkpoints are intact"
                ) from error
            lines = [
                f"\nTrained to step {steps}, {seconds:.0f} s in this session. {tally}.\n",
                *trained.describe(output_dir),
                f"{output_dir}/scheduler: the scheduler that fits",
                f"{output_dir}/validation: pictures; {output_dir}/{CURVES_FILE}: curves; {output_dir}/{report}: the "
                "report with both",
                f"{output_dir}/{METRICS_FILE}, {output_dir}/{self.args.logging_dir}: the curves as numbers\n",
            ]
            print("\n".join(lines) + f"\n{code}")
        self.trackers.finish()  # their run is complete, whatever becomes of the upload
        if self.args.push_to_hub and self.accelerator.is_main_process:
            self.push(steps)

    def draw_curves(self):
        """Draw the metrics of the whole run. A failure is logged: a picture is not worth the run."""
        try:
            rows = MetricsFile(self.args.output_dir).read()
            draw_curves(rows, os.path.join(self.args.output_dir, CURVES_FILE))
        except Exception as error:
            logger.warning("No curves: %s", first_line(error))

    def pictures(self, steps):
        """Paths of those pictures of the report that there are: {"validation": pages, "training": curves}, lists."""
        curves = os.path.join(self.args.output_dir, CURVES_FILE)
        return {
            "validation": pages_of(self.args.output_dir, steps),
            "training": [curves] if os.path.isfile(curves) else [],
        }

    def stop(self, steps, seconds):
        """Say where a run that was told to stop goes on."""
        if self.accelerator.is_main_process:
            folder = os.path.join(self.args.output_dir, f"checkpoint-{steps}")
            print(
                f"\nStopped at step {steps}, {seconds:.0f} s in this session. Everything is in {folder}; the same "
                "command with --resume_from_checkpoint=latest goes on."
            )
        self.trackers.finish()

    def push(self, steps):
        """Upload what was trained, the scheduler, the pictures and a card, in one commit.

        Nothing else: no optimizer states, logs or local paths. Raises UserError if the upload still fails after the
        client's own retries; everything is on disk by then.
        """
        output_dir = self.args.output_dir
        code = self.trained.usage_code(teacher_name(self.args), self.repo_id, True, Machine("cuda"))
        pictures = {  # {path in the repository: path here}
            what: {f"{what}{f'-{i}' if len(paths) > 1 else ''}.png": path for i, path in enumerate(paths, 1)}
            for what, paths in self.pictures(steps).items()
        }
        card = model_card(self.args, self.trained, code, steps, {what: [*names] for what, names in pictures.items()})
        files = {
            **self.trained.pushed_files(output_dir),
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
