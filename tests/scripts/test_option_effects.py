"""Every option of the four scripts does what it says, seen in a real run and never in a parsed value.

A run is a script's `main` on a tiny teacher, watched from outside: which batches it read, what the networks and the
VAE were called with, what the optimizer did, what lies in its folder afterwards. Runs with the same options are made
once. `@covers` names the options that a test observes, and the scripts that it runs; what only LoRA or SDXL have is in
`test_option_effects_lora_sdxl.py`, whose last test asks that no option of any script is left out.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.util
import io
import json
import logging
import math
import re
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import (
    DEMO_TEACHER,
    common_options,
    encode_image,
    hub,
    make_sdxl_teacher,
    make_teacher,
    write_shards,
    write_tar,
)
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file

import lcm_common
from lcm import session
from lcm.data import loader, stream
from lcm.data.shards import read_shard
from lcm.models import family, prompts
from lcm.options import choices
from lcm.pictures import validation
from lcm.run import progress

FULL, LORA = ("sd", "sdxl"), ("lora_sd", "lora_sdxl")
ALL = FULL + LORA
SCRIPTS = {name: importlib.import_module(f"train_lcm_distill_{name}_wds") for name in ALL}
COVERED = {name: set() for name in ALL}
MADE = {}  # the runs that were made, by their arguments
LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "lcm_lora_kohya.safetensors"


def runs_of(*scripts):
    """Mark a test as one whose `run` is of these scripts, one after the other; without it, of `sd` alone."""
    return pytest.mark.parametrize("run", scripts, indirect=True)


def covers(*options, by=("sd",)):
    """Mark a test as one that observes these options in runs of the scripts `by`."""

    def mark(test):
        for name in by:
            COVERED[name].update(options)
        return runs_of(*by)(test)

    return mark


# A watched run.


@dataclass
class Call:
    """One forward pass of a U-Net: what went in and came out, and the state of the U-Net at that moment."""

    z: torch.Tensor
    t: list
    cond: dict  # `encoder_hidden_states`, and for SDXL `text_embeds` and `time_ids`
    w_emb: torch.Tensor | None
    output: torch.Tensor
    dtype: torch.dtype  # of the weights; of a LoRA's base
    grad: bool
    adapters: tuple | None  # the active ones, () where they are switched off, None where there are none
    dropout: bool  # whether any is at work


@dataclass
class Run:
    """What was seen of a run."""

    script: str
    folder: Path
    status: int = 0
    log: str = ""
    printed: str = ""
    batches: list = field(default_factory=list)
    encoded: list = field(default_factory=list)  # (batch size, dtype) of each call of the VAE's encoder
    vae_outputs: list = field(default_factory=list)  # dtype of each picture that the VAE decoded
    calls: list = field(default_factory=list)  # of the U-Nets, while training
    drawn: list = field(default_factory=list)  # of the U-Nets, while drawing pictures
    w: list = field(default_factory=list)  # guidance weights, one per sample
    losses: list = field(default_factory=list)  # (prediction, target, loss) of each forward pass
    steps: list = field(default_factory=list)  # (step, loss) as reported
    rates: list = field(default_factory=list)  # learning rate of each optimizer step
    norms: list = field(default_factory=list)  # norm of all gradients at each optimizer step
    optimizer: type = None
    settings: dict = field(default_factory=dict)  # of the optimizer
    trained: list = field(default_factory=list)  # dtypes of the parameters it was given
    tf32: bool = False
    distributed: bool = False
    decoded_here: int = 0  # samples that were decoded in this process
    recomputed: int = 0  # calls of PyTorch's gradient checkpointing

    @property
    def captions(self):
        return [caption for batch in self.batches for caption in batch["captions"]]

    @property
    def pixels(self):
        """All pictures that were trained on, as (N, H, W, 3) uint8."""
        pixels = torch.cat([batch["pixels"] for batch in self.batches])
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    @property
    def teacher_calls(self):
        return [call for call in self.calls if not call.grad and call.w_emb is None and not call.adapters]

    @property
    def student_calls(self):
        return [call for call in self.calls if call.grad]

    @property
    def target_calls(self):
        return [call for call in self.calls if not call.grad and (call.w_emb is not None or call.adapters)]

    @property
    def networks(self):
        """Names of what was trained, for `weights`; the first is the student, unless a LoRA has a moving average."""
        if self.script in FULL:
            return ["unet", "unet_target"]
        return [name for name in (".", "student") if (self.folder / name / LORA_FILE).exists()]

    def weights(self, name=None, of="."):
        """A network of `networks`, the first by default, in the output folder or in a checkpoint."""
        folder = self.folder / of / (name or self.networks[0])
        return load_file(folder / (LORA_FILE if self.script in LORA else "diffusion_pytorch_model.safetensors"))

    def config(self, name="unet", file="config.json"):
        return json.loads((self.folder / name / file).read_text())

    def state(self, step):
        return json.loads((self.folder / f"checkpoint-{step}" / "training_state.json").read_text())

    def pictures(self):
        return sorted(path.name for path in (self.folder / "validation").iterdir())

    def error(self):
        """The one line, apart from the log and the progress bar, that a run ended with."""
        lines = [line for line in re.split(r"[\r\n]+", self.log) if line.strip()]
        lines = [line for line in lines if not re.match(r"\d\d:\d\d:\d\d [A-Z]+ |Steps: ", line)]
        assert self.status == 1
        assert len(lines) == 1, self.log
        assert not [name for name in ("unet", LORA_FILE, "README.md") if (self.folder / name).exists()]
        return lines[0]


def adapter_state(unet):
    """`adapters` and `dropout` of a Call."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    states = {() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers}
    assert len(states) <= 1, "the layers of a U-Net differ in their adapters"
    dropouts = [module for module in unet.modules() if isinstance(module, torch.nn.Dropout)]
    return next(iter(states), None), any(module.training and module.p > 0 for module in dropouts)


def watch(patch, run):
    """Patch what a run goes through, so that `run` records it. Nothing is changed on the way."""
    drawing = []

    def wrap(owner, name, record):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            return record(original, *args, **kwargs)

        patch.setattr(owner, name, wrapped)

    def unet(original, self, sample, t, encoder_hidden_states, timestep_cond=None, **kwargs):
        state = adapter_state(self)
        output = original(self, sample, t, encoder_hidden_states, timestep_cond=timestep_cond, **kwargs)
        tensor = (output[0] if isinstance(output, tuple) else output.sample).detach().cpu()
        cond = {"encoder_hidden_states": encoder_hidden_states, **(kwargs.get("added_cond_kwargs") or {})}
        cond = {name: value.cpu() for name, value in cond.items()}
        w_emb = None if timestep_cond is None else timestep_cond.cpu()
        seen = (sample.cpu(), t.reshape(-1).tolist(), cond, w_emb, tensor, self.dtype, torch.is_grad_enabled(), *state)
        (run.drawn if drawing else run.calls).append(Call(*seen))
        return output

    def encode(original, self, pixels, *args, **kwargs):
        run.encoded.append((len(pixels), self.dtype))
        return original(self, pixels, *args, **kwargs)

    def decode(original, self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        run.vae_outputs.append(output.sample.dtype)
        return output

    def draw(original, *args, **kwargs):
        drawing.append(True)
        try:
            return original(*args, **kwargs)
        finally:
            drawing.clear()

    def batches(original, self):
        for batch in original(self):
            run.batches.append(batch)
            yield batch

    def sample(original, *args):
        run.decoded_here += 1
        return original(*args)

    def recompute(original, *args, **kwargs):
        run.recomputed += 1
        return original(*args, **kwargs)

    def guidance(original, cond_output, uncond_output, w):
        run.w += w.tolist()
        return original(cond_output, uncond_output, w)

    def loss(original, prediction, target, *args):
        value = original(prediction, target, *args)
        run.losses.append((prediction.detach().cpu().double(), target.cpu().double(), value.mean().item()))
        return value

    def optimizer(original, args, plan, parameters, *more):
        made = original(args, plan, parameters, *more)
        run.optimizer, run.settings = type(made), {k: v for k, v in made.param_groups[0].items() if k != "params"}
        run.trained = [parameter.dtype for parameter in parameters]

        def before_step(*_):
            run.rates.append(made.param_groups[0]["lr"])
            gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
            run.norms.append(torch.cat(gradients).norm().item())

        made.register_step_pre_hook(before_step)
        return made

    def step(original, self, number, *args):
        run.steps.append((number, self.loss))
        run.tf32 = torch.backends.cuda.matmul.allow_tf32
        run.distributed = torch.distributed.is_initialized()
        return original(self, number, *args)

    wrap(UNet2DConditionModel, "forward", unet)
    wrap(AutoencoderKL, "encode", encode)
    wrap(AutoencoderKL, "decode", decode)
    wrap(validation.Validation, "run", draw)
    wrap(validation.Validation, "draw_teacher", draw)
    wrap(loader.TrainingData, "__iter__", batches)
    wrap(stream, "decode_sample", sample)
    wrap(torch.utils.checkpoint, "checkpoint", recompute)
    wrap(prompts, "apply_guidance", guidance)
    wrap(lcm_common, "consistency_loss", loss)
    wrap(session, "make_optimizer", optimizer)
    wrap(progress.Progress, "step", step)


def watched_run(script, options, folder, env=()):
    """The script's `main(options)` in this process, as a Run; exits are recorded, exceptions go through."""
    run, log, printed = Run(script, Path(folder)), io.StringIO(), io.StringIO()
    reset_accelerate()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "")  # noted here, so that it is put back whatever the run sets
        patch.delenv("LOCAL_RANK")
        for name, value in env:
            patch.setenv(name, value)
        watch(patch, run)
        try:
            with contextlib.redirect_stderr(log), contextlib.redirect_stdout(printed):
                SCRIPTS[script].main(options)
        except SystemExit as stop:
            run.status = stop.code
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32
    run.log, run.printed = log.getvalue(), printed.getvalue()
    return run


def reset_accelerate():
    """accelerate keeps its state for the life of a process, and refuses another mixed precision after the first."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module", autouse=True)
def leave_nothing_behind():
    """Global state that runs change is put back for the tests of other files."""
    gc.freeze()  # the libraries' objects stay anyway; the collector went through them a hundred times
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    reset_accelerate()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


SMALL_FULL, SMALL_LORA = ["--unet_time_cond_proj_dim=16"], ["--lora_rank=4", "--lora_alpha=8"]


@dataclass
class Runner:
    """run(*options, drop=names, env=pairs, teacher=folder, shards=pattern): a watched run of two steps, or the one
    that was made before with the same arguments. `drop` takes options out of the standard ones."""

    script: str
    teacher: Path
    shards: str
    new_folder: callable

    @property
    def is_lora(self):
        return self.script in LORA

    @property
    def is_sdxl(self):
        return self.script.endswith("sdxl")

    def __call__(self, *more, drop=(), env=(), teacher=None, shards=None, folder=None):
        teacher, shards = teacher or self.teacher, self.shards if shards is None else shards
        key = (self.script, more, drop, env, teacher, shards)
        if folder is not None or key not in MADE:
            where = folder or self.new_folder("run")
            standard = [*(SMALL_LORA if self.is_lora else SMALL_FULL), "--max_train_steps=2", "--validation_steps=99"]
            options = common_options(teacher, shards, where, *standard, *more)
            options = [option for option in options if option.split("=")[0].removeprefix("--") not in drop]
            watched = watched_run(self.script, options, where, env)
            assert "No pictures at step" not in watched.log
            if folder is not None:
                return watched
            MADE[key] = watched
        return MADE[key]


@pytest.fixture
def run(request, teacher, sdxl_teacher, shards, tmp_path_factory):
    """The Runner of the script that `covers` or `runs_of` names."""
    script = getattr(request, "param", "sd")
    own_teacher = sdxl_teacher if script.endswith("sdxl") else teacher
    return Runner(script, own_teacher, shards, tmp_path_factory.mktemp)


# The second step sees what the first one wrote into its checkpoint; at this rate it shows.
WATCHED = ("--checkpointing_steps=1", "--learning_rate=0.05")


def same(a, b):
    """Whether two runs ended with the same weights, bit for bit."""
    assert a.status == b.status == 0, a.log + b.log
    assert a.networks == b.networks
    pairs = [(a.weights(name), b.weights(name)) for name in a.networks]
    return all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs)


# Models.


def other_teacher(run):
    """A teacher with other weights, in the layout that the script takes."""
    key = ("other teacher", run.is_sdxl)
    if key not in MADE:
        make = make_sdxl_teacher if run.is_sdxl else make_teacher
        MADE[key] = make(run.new_folder("other_teacher"), seed=1)
    return MADE[key]


def hub_cache(run):
    """A cache as the Hub's client keeps it: org/teacher with the revisions main and old, org/vae with main alone."""
    cache, other = run.new_folder("cache"), other_teacher(run)
    for name, ref, commit, source in (
        ("teacher", "main", "a" * 40, run.teacher),
        ("teacher", "old", "b" * 40, other),
        ("vae", "main", "c" * 40, run.teacher / "vae"),
    ):
        folder = cache / f"models--org--{name}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        shutil.copytree(source, folder / "snapshots" / commit)
    return cache


@covers("pretrained_teacher_model", "pretrained_vae_model_name_or_path", by=ALL)
def test_teacher_and_vae_decide_the_weights(run, tmp_path):
    other = other_teacher(run)
    vae = f"--pretrained_vae_model_name_or_path={other / 'vae'}"
    assert not same(run(), run(teacher=other))
    assert not same(run(), run(vae))
    both = shutil.copytree(run.teacher, tmp_path / "both")
    shutil.rmtree(both / "vae")
    shutil.copytree(other / "vae", both / "vae")
    assert same(run(vae), run(teacher=both))


@covers("teacher_revision", "revision", "cache_dir", by=ALL)
def test_revisions_come_from_the_cache_folder(run):
    """A teacher's revision is not the VAE's, which has none of that name; `--teacher_revision` comes first."""
    cache, vae = f"--cache_dir={hub_cache(run)}", "--pretrained_vae_model_name_or_path="
    old = run(cache, "--revision=old", f"{vae}org/vae", teacher="org/teacher")
    assert same(old, run(f"{vae}{run.teacher / 'vae'}", teacher=other_teacher(run)))
    missing = run(cache, "--revision=old", "--teacher_revision=nosuch", teacher="org/teacher")
    assert missing.error().startswith("--pretrained_teacher_model: cannot load 'org/teacher'")


@covers("teacher_revision", "revision", "cache_dir")
def test_the_main_revision_is_the_default_and_only_the_cache_folder_has_it(run):
    cache = f"--cache_dir={hub_cache(run)}"
    assert same(run(cache, teacher="org/teacher"), run())
    old = run(cache, "--revision=main", "--teacher_revision=old", teacher="org/teacher")
    assert same(old, run(teacher=other_teacher(run)))
    assert run(teacher="org/teacher").error().startswith("--pretrained_teacher_model: cannot load 'org/teacher'")


# Output, logs, checkpoints.


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = Path(folder).glob("events*")
    return EventAccumulator(str(file)).Reload()


def exported(run):
    """What a run of two steps leaves in its output folder."""
    weights = {LORA_FILE, KOHYA_FILE} if run.is_lora else {"unet", "unet_target", "comfyui"}
    return {*weights, "scheduler", "validation", "README.md", "training.png", "metrics.jsonl"}


@covers(
    "output_dir", "logging_dir", "report_to", "tracker_project_name", "tracker_run_name", "hub_token",
    "checkpointing_steps", "checkpoints_total_limit", "seed",
    by=ALL,
)  # fmt: skip
def test_files_lie_in_the_output_folder_and_hold_no_token(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    token = "hf_abcdefghijklmnopqrstuvwxyz"
    more = [
        "--report_to=tensorboard",
        "--logging_dir=scalars",
        "--tracker_project_name=mine",
        "--tracker_run_name=first",
        "--checkpointing_steps=1",
        "--checkpoints_total_limit=1",
    ]
    done = run(*more, f"--hub_token={token}", folder=Path("a") / "deep" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name for path in done.folder.iterdir()} == exported(run) | {"checkpoint-2", "scalars"}
    assert "Saved a/deep/folder/checkpoint-1\n" in done.log
    log = events(done.folder / "scalars" / "mine" / "first")
    assert [event.step for event in log.Scalars("loss")] == [1, 2]
    assert [event.value for event in log.Scalars("loss")] == pytest.approx([loss for _, loss in done.steps])
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    assert token not in done.log + done.printed
    assert same(done, run())


@covers("report_to", by=ALL)
def test_no_tracker(run):
    assert {path.name for path in run().folder.iterdir()} == exported(run)


@covers("push_to_hub", "hub_model_id", "hub_token", "hub_private", by=ALL)
def test_push_under_a_name_with_a_token(run):
    """`test_train.py` looks at what else is in a repository, and runs what its card says."""
    with hub() as server:
        push = ("--push_to_hub", "--hub_model_id=mine", f"--hub_token={server.token}")
        done = run(*push, "--no-hub_private")
        assert done.status == 0, done.log
        names = [LORA_FILE, KOHYA_FILE] if run.is_lora else ["diffusion_pytorch_model.safetensors"]
        folder = done.folder if run.is_lora else done.folder / "unet_target"
        for name in names:
            assert server.files("tester/mine")[name] == (folder / name).read_bytes()
        assert not server.private("tester/mine")
        assert server.token.encode() not in b"".join(server.files("tester/mine").values())
        refused = run("--push_to_hub", "--hub_model_id=other", "--hub_token=hf_wrong")
        assert refused.error().startswith("--push_to_hub: cannot make 'other' on the Hub: ") and not refused.batches


@covers("report_to", "logging_dir")
@pytest.mark.parametrize("report_to", ["wandb", "all"])
def test_wandb(run, tmp_path, monkeypatch, report_to):
    """Offline. What W&B writes lies in the folder of the trackers' files, and holds no token from the environment."""
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    token = "hf_abcdefghijklmnopqrstuvwxyz"
    env = (("WANDB_SILENT", "true"), ("WANDB_MODE", "offline"), ("HF_TOKEN", token))
    done = run(f"--report_to={report_to}", "--tracker_project_name=mine", env=env, folder=tmp_path / "out")
    assert done.status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (record,) = (done.folder / "logs").rglob("*.wandb")
    for _ in range(100):  # W&B's own process closes the file in its own time
        if b"images_per_second" in record.read_bytes():
            break
        time.sleep(0.1)
    assert b"mine" in record.read_bytes() and b"images_per_second" in record.read_bytes()
    assert [path for path in done.folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()] == []
    assert list(record.parent.rglob("validation*.png"))
    assert (report_to == "all") == bool(list((done.folder / "logs" / "mine").glob("events*")))


@covers("checkpointing_steps", "checkpoints_total_limit")
def test_checkpoints(run):
    def checkpoints(*more):
        return sorted(path.name for path in run("--max_train_steps=4", *more).folder.glob("checkpoint-*"))

    assert checkpoints() == []
    assert checkpoints("--checkpointing_steps=2") == ["checkpoint-2", "checkpoint-4"]
    assert checkpoints("--checkpointing_steps=3") == ["checkpoint-3"]
    assert checkpoints("--checkpointing_steps=1", "--checkpoints_total_limit=2") == ["checkpoint-3", "checkpoint-4"]
    assert checkpoints("--checkpointing_steps=2", "--checkpoints_total_limit=1") == ["checkpoint-4"]


@covers("checkpoints_total_limit")
def test_a_checkpoint_never_removes_itself(run, tmp_path):
    """A new run in the folder of an older one, whose checkpoints have larger numbers."""
    run("--max_train_steps=4", "--checkpointing_steps=4", folder=tmp_path)
    run("--checkpointing_steps=2", "--checkpoints_total_limit=1", folder=tmp_path)
    assert (tmp_path / "checkpoint-2").exists()


@covers("resume_from_checkpoint")
def test_resume_by_name_by_path_and_from_elsewhere(run, tmp_path, monkeypatch):
    unbroken = ("--max_train_steps=4", "--checkpointing_steps=2", "--lr_scheduler=cosine", "--lr_warmup_steps=1")
    straight = run(*unbroken)
    monkeypatch.chdir(tmp_path)
    for name in ("named", "elsewhere"):
        shutil.copytree(straight.folder / "checkpoint-2", tmp_path / name / "checkpoint-2")
    for out, checkpoint, found in (
        ("named", "checkpoint-2", "named/checkpoint-2"),
        ("by_path", "elsewhere/checkpoint-2", "elsewhere/checkpoint-2"),
        ("named", "latest", "named/checkpoint-4"),
    ):
        resumed = run(*unbroken, f"--resume_from_checkpoint={checkpoint}", folder=Path(out))
        assert f"Resuming from {found}\n" in resumed.log
        assert [step for step, _ in resumed.steps] == ([] if checkpoint == "latest" else [3, 4])
        assert resumed.steps == straight.steps[-len(resumed.steps) :] or checkpoint == "latest"
        assert same(straight, resumed)
    fresh = run(*unbroken, "--resume_from_checkpoint=latest", folder=tmp_path / "fresh")
    assert "No checkpoint in" in fresh.log and same(straight, fresh)


@covers("resume_from_checkpoint", by=ALL)
def test_going_on_is_exact(run, tmp_path):
    straight = run(*WATCHED)
    resumed = run(*WATCHED, f"--resume_from_checkpoint={straight.folder / 'checkpoint-1'}", folder=tmp_path)
    assert resumed.steps == straight.steps[1:] and same(straight, resumed)


@covers("resume_with_changed_options", by=ALL)
@pytest.mark.parametrize("course", ["constant", "polynomial"])
def test_given_options_of_the_optimizer_hold_after_a_resume(run, tmp_path, course):
    """Though the checkpoint has the optimizer's groups and the schedule's rates."""
    straight = run(*WATCHED)
    given = {"lr": 1e-3, "betas": (0.5, 0.75), "weight_decay": 0.25, "eps": 1e-4}
    resumed = run(
        *WATCHED,
        "--learning_rate=1e-3", "--adam_beta1=0.5", "--adam_beta2=0.75", "--adam_weight_decay=0.25",
        "--adam_epsilon=1e-4", f"--lr_scheduler={course}", "--lr_warmup_steps=0", "--max_train_steps=3",
        "--resume_with_changed_options", f"--resume_from_checkpoint={straight.folder / 'checkpoint-1'}",
        folder=tmp_path,
    )  # fmt: skip
    assert resumed.status == 0, resumed.log
    assert resumed.log.count("the checkpoint was trained with") == 6 + (course == "polynomial")
    factors = [1, 1] if course == "constant" else [2 / 3 + 1e-4 / 3, 1 / 3 + 2e-4 / 3]
    assert resumed.rates == pytest.approx([factor * 1e-3 for factor in factors], rel=1e-6)
    (group,) = torch.load(tmp_path / "checkpoint-3" / "optimizer.bin")["param_groups"]
    last = 1e-3 if course == "constant" else 1e-7
    assert {name: group[name] for name in given} == {**given, "lr": pytest.approx(last)}
    assert resumed.batches[0]["captions"] == straight.batches[1]["captions"]  # the data goes on where it was


@covers("seed", by=ALL)
def test_another_seed_is_another_run(run):
    other = run("--seed=1")
    assert not same(run(), other) and other.captions != run().captions


@covers("seed")
def test_seed(run, tmp_path):
    again = run(folder=tmp_path / "again")
    assert same(run(), again) and run().captions == again.captions
    drawn = run("--checkpointing_steps=2", drop=("seed",))
    seed = int(re.search(r"--seed was not given; drew (\d+)", drawn.log)[1])
    assert drawn.state(2)["options"]["seed"] == seed
    assert f"seed {seed}" in drawn.log and f"| seed | {seed} |" in (drawn.folder / "README.md").read_text()
    assert same(drawn, run(f"--seed={seed}"))
    assert run("--seed=2147483647", "--max_train_steps=1").status == 0


# Data. One picture of 24 x 20 pixels becomes 19 x 16, of which a square of 16 is cut.


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (20, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def one_picture(picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "one.tar"
    return write_tar(path, [("0.png", encode_image(picture)), ("0.txt", b"the picture")])


@pytest.fixture(scope="module")
def json_shard(tmp_path_factory):
    """Ten pictures without caption files; everything about them is in the JSON. Odd ones are small and marked."""
    rng, members = np.random.default_rng(0), []
    for i in range(10):
        info = {"title": f"title {i}", "caption": f"caption {i}", "w": [900, 10][i % 2], "h": 1000}
        info["pwatermark"] = [0.25, 0.75][i % 2]
        members.append((f"{i}.png", encode_image(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))))
        members.append((f"{i}.json", json.dumps(info).encode()))
    return write_tar(tmp_path_factory.mktemp("json") / "json.tar", members)


@covers("train_shards_path_or_url")
def test_repeated_shards_are_all_read(run, shards, one_picture, json_shard):
    """Forty-one samples, and each once in forty of the first pass."""
    more = (f"--train_shards_path_or_url={one_picture}::{json_shard}", "--train_batch_size=8", "--max_train_steps=5")
    captions = run(*more, "--shuffle_buffer_size=41").captions
    assert len(set(captions)) == 40
    possible = {f"picture {s} {i}" for s in range(3) for i in range(10)} | {f"caption {i}" for i in range(10)}
    assert set(captions) < possible | {"the picture"}


@covers(
    "train_shards_path_or_url", "resolution", "interpolation_type", "center_crop", "random_flip",
    "proportion_empty_prompts", "caption_key", "width_key", "height_key", "min_image_size",
    "max_watermark_probability", "shuffle_buffer_size", "dataloader_num_workers", "train_batch_size",
    by=ALL,
)  # fmt: skip
def test_every_script_reads_the_data_as_it_is_told(run, tmp_path):
    """All options of the data at once; the tests below take them one by one, with one script. Of nine pictures every
    second is small and every third is marked, so that 1, 5 and 7 can be used, in this order, from either shard."""
    rng, pictures, shards = np.random.default_rng(0), {}, []
    for shard in range(2):
        members = []
        for i in range(1, 10):
            pictures[f"{shard} {i}"] = image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            info = {"title": f"{shard} {i}", "caption": "not this", "w": [10, 900][i % 2], "h": 1000}
            info["pwatermark"] = 0.75 if i % 3 == 0 else 0.25
            members += [(f"{i}.png", encode_image(image)), (f"{i}.json", json.dumps(info).encode())]
        shards.append(write_tar(tmp_path / f"{shard}.tar", members))
    done = run(
        f"--train_shards_path_or_url={shards[1]}",
        "--resolution=32",
        "--interpolation_type=lanczos",
        "--center_crop",
        "--random_flip",
        "--proportion_empty_prompts=0.3",
        "--caption_key=title",
        "--width_key=w",
        "--height_key=h",
        "--min_image_size=500",
        "--max_watermark_probability=0.5",
        "--shuffle_buffer_size=1",
        "--dataloader_num_workers=1",
        "--train_batch_size=3",
        "--max_train_steps=4",
        shards=shards[0],
    )
    middles = {
        title: np.asarray(picture.resize((38, 32), Image.Resampling.LANCZOS))[:, 3:35]
        for title, picture in pictures.items()
    }
    seen, flips = [], 0
    for pixels in done.pixels[:12]:
        (match,) = (
            (title, flipped)
            for title, middle in middles.items()
            for flipped in (False, True)
            if np.array_equal(pixels, middle[:, ::-1] if flipped else middle)
        )
        seen.append(match[0])
        flips += match[1]
    first, second = seen[:3], seen[3:6]  # a pass reads both shards, in either order
    assert sorted([first, second]) == [["0 1", "0 5", "0 7"], ["1 1", "1 5", "1 7"]]
    assert sorted([seen[6:9], seen[9:12]]) == sorted([first, second])
    assert 0 < flips < 12
    assert {caption for caption, title in zip(done.captions, seen, strict=False) if caption != title} == {""}
    assert 0 < done.captions[:12].count("") < 12
    sizes = torch.cat([batch["original_sizes"] for batch in done.batches])
    assert set(map(tuple, sizes.tolist())) == {(1000, 900)}
    assert {call.z.shape for call in done.student_calls} == {(3, 4, 16, 16)}
    assert done.decoded_here == 0 and run().decoded_here > 0
    assert "x smaller than --min_image_size" in done.printed and "x watermark too probable" in done.printed


INTERPOLATION = {name: getattr(Image.Resampling, name.upper()) for name in
                 ("bilinear", "bicubic", "box", "nearest", "hamming", "lanczos")}  # fmt: skip


@covers("interpolation_type", "resolution", "center_crop")
@pytest.mark.parametrize("name", [*INTERPOLATION, "nearest_exact"])
def test_resizing_and_cropping_the_middle(run, picture, one_picture, name):
    resampling = INTERPOLATION[name.removesuffix("_exact")]
    resized = np.asarray(picture.resize((19, 16), resampling))
    done = run("--center_crop", f"--interpolation_type={name}", "--max_train_steps=1", shards=one_picture)
    assert np.array_equal(done.pixels, [resized[:, 1:17]] * 2)


@covers("resolution")
def test_resolution(run, one_picture, picture):
    done = run("--center_crop", "--resolution=24", shards=one_picture)
    resized = np.asarray(picture.resize((28, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(done.pixels, [resized[:, 2:26]] * 4)
    assert done.losses[0][0].shape == (2, 4, 12, 12)
    assert not same(done, run("--center_crop", shards=one_picture))


@covers("center_crop", "random_flip")
def test_random_crops_and_flips(run, one_picture, picture):
    resized = np.asarray(picture.resize((19, 16), Image.Resampling.BILINEAR))
    middle = resized[:, 1:17]

    def kinds(pictures, *more):
        done = run("--train_batch_size=8", *more, shards=one_picture)
        return [next(i for i, p in enumerate(pictures) if np.array_equal(p, seen)) for seen in done.pixels]

    assert set(kinds([resized[:, left : left + 16] for left in range(4)])) == {0, 1, 2, 3}
    assert set(kinds([middle], "--center_crop")) == {0}
    flipped = kinds([middle, middle[:, ::-1]], "--center_crop", "--random_flip")
    assert 4 <= sum(flipped) <= 12


@covers("proportion_empty_prompts")
def test_empty_prompts(run):
    def share(proportion):
        captions = run("--train_batch_size=8", f"--proportion_empty_prompts={proportion}").captions
        return captions.count("") / len(captions)

    assert share(0) == 0
    assert share(1) == 1
    assert 0.2 < share(0.5) < 0.8
    everything = run("--train_batch_size=8", "--proportion_empty_prompts=0")
    nothing = run("--train_batch_size=8", "--proportion_empty_prompts=1")
    assert np.array_equal(everything.pixels, nothing.pixels)
    assert not same(everything, nothing)


@covers("dataloader_num_workers")
def test_data_workers(run):
    """With workers nothing is decoded in this process, and each worker has a place in the data of its own."""
    for workers in (0, 2):
        done = run(f"--dataloader_num_workers={workers}", "--checkpointing_steps=2")
        assert len(done.captions) == 4
        assert (done.decoded_here > 0) == (workers == 0)
        assert len(done.state(2)["data"][0]["positions"]) == max(1, workers)


@covers("shuffle_buffer_size")
def test_shuffling(run, tmp_path):
    shard = write_shards(tmp_path, num_shards=1)

    def order(size):
        done = run(f"--shuffle_buffer_size={size}", "--train_batch_size=5", shards=shard)
        return [int(caption.split()[-1]) for caption in done.captions]

    assert order(1) == list(range(10))
    assert order(10) != sorted(order(10)) == list(range(10))
    halves = order(5)
    assert sorted(halves[:5]) == list(range(5)) and halves != list(range(10))


@covers("shuffle_buffer_mb", by=ALL)
def test_shuffling_within_a_bound_of_memory(run, tmp_path):
    shard = write_shards(tmp_path, num_shards=1)
    samples = list(read_shard(shard.replace("{00000..00000}", "00000")))
    five = sum(stream.num_bytes(sample) for sample in samples[:5]) / 1e6
    done = run(f"--shuffle_buffer_mb={five}", "--shuffle_buffer_size=10", "--train_batch_size=5", shards=shard)
    halves = [int(caption.split()[-1]) for caption in done.captions]
    assert sorted(halves[:5]) == list(range(5)) and halves != list(range(10))
    assert f"up to {five / 1e3 + 5 * 3 * 16**2 / 1e9:.2g} GB" in done.log


@covers("shard_timeout", by=ALL)
def test_a_shard_that_stalls(run, shards):
    stalled = "--train_shards_path_or_url=pipe:sleep 1236"
    done = run(stalled, "--shard_timeout=0.2", "--train_batch_size=16", shards=shards)
    assert done.status == 0 and "no byte for 0.2 s" in done.log and "x shard unreadable" in done.printed


AUTO_SHAPES = ("--aspect_ratio_buckets=auto", "--resolution=32", "--aspect_bucket_rounding=8")


def assert_shape(done, shape):
    """All pictures, and what the networks see of them, have this (height, width)."""
    assert {batch["target_size"] for batch in done.batches} == {shape}
    assert {tuple(batch["pixels"].shape[2:]) for batch in done.batches} == {shape}
    assert {call.z.shape[2:] for call in done.calls} == {(shape[0] // 2, shape[1] // 2)}
    assert f"4 of {shape[0]}x{shape[1]}" in done.printed


@covers("aspect_ratio_buckets", "aspect_bucket_rounding", "resolution_type", "min_image_area", by=ALL)
def test_pictures_of_another_shape(run):
    """The pictures are 24 wide and 20 high."""
    done = run(*AUTO_SHAPES, "--resolution_type=pixel", "--min_image_area=0.00047")
    assert_shape(done, (32, 40))
    if run.is_sdxl:
        assert {tuple(row) for call in done.calls for row in call.cond["time_ids"][:, 4:].tolist()} == {(32, 40)}


@covers("aspect_ratio_buckets", "aspect_bucket_rounding", "resolution_type", "min_image_area")
def test_shapes_of_pictures(run):
    assert_shape(run(*AUTO_SHAPES), (32, 32))
    assert_shape(run(*AUTO_SHAPES[:2], "--aspect_bucket_rounding=16", "--resolution_type=pixel"), (32, 32))
    assert_shape(run("--aspect_ratio_buckets=16,24;24,16"), (16, 24))
    assert "30 x smaller than --min_image_area" in run("--min_image_area=0.00049").error()


@covers("config", by=ALL)
def test_options_in_a_file(run, tmp_path):
    """They are in effect, but for those that are given on the command line too."""
    (tmp_path / "run.yaml").write_text("learning_rate: 0.05\nmax_train_steps: 7\nloss_type: huber\nw_max: 9\n")
    of_file = run(f"--config={tmp_path}/run.yaml", drop=("learning_rate",))
    assert same(of_file, run("--learning_rate=0.05", "--loss_type=huber", "--w_max=9")) and len(of_file.steps) == 2


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory):
    """The same four pictures as a folder with metadata, and as the second configuration of a data set."""
    datasets = pytest.importorskip("datasets")
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(3)
    (folder / "set").mkdir()
    (folder / "folder").mkdir()
    names, titles = [f"{i}.png" for i in range(4)], [f"title {i}" for i in range(4)]
    for name in names:
        (folder / "folder" / name).write_bytes(encode_image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)))
    rows = [json.dumps({"file_name": name, "title": title}) for name, title in zip(names, titles, strict=True)]
    (folder / "folder" / "metadata.jsonl").write_text("\n".join(rows))
    paths = [str(folder / "folder" / name) for name in names]
    table = datasets.Dataset.from_dict({"pic": paths, "title": titles}).cast_column("pic", datasets.Image())
    table.to_parquet(str(folder / "set" / "b.parquet"))
    table.select([0]).to_parquet(str(folder / "set" / "a.parquet"))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in "ab")
    (folder / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


@covers("train_data_dir", "dataset_name", "dataset_config_name", "image_column", "caption_column", by=ALL)
def test_pictures_that_are_not_in_shards(run, own_pictures):
    """They are put into shards in the output folder, and trained on as if those had been given."""
    more = ("--train_batch_size=4", "--max_watermark_probability=1", "--caption_column=title")
    of_folder = run(*more, f"--train_data_dir={own_pictures}/folder", drop=("train_shards_path_or_url",))
    assert sorted(of_folder.captions[:4]) == [f"title {i}" for i in range(4)]
    of_set = run(
        *more, f"--dataset_name={own_pictures}/set", "--dataset_config_name=b", "--image_column=pic",
        drop=("train_shards_path_or_url",),
    )  # fmt: skip
    assert same(of_folder, of_set) and of_set.captions == of_folder.captions
    assert same(of_folder, run(*more[:2], shards=f"{of_set.folder}/shards/00000.tar"))
    shown = [np.asarray(Image.open(own_pictures / "folder" / f"{i}.png")) for i in range(4)]
    assert all(any(np.array_equal(pixels, picture) for picture in shown) for pixels in of_set.pixels)


@covers("caption_key")
def test_caption_key(run, json_shard):
    whole_pass = ("--train_batch_size=5",)
    assert set(run(*whole_pass, shards=json_shard).captions) == {f"caption {i}" for i in range(10)}
    titles = run(*whole_pass, "--caption_key=title", shards=json_shard)
    assert set(titles.captions) == {f"title {i}" for i in range(10)}
    nothing = run("--caption_key=nosuch", shards=json_shard)
    assert nothing.error().startswith("--train_shards_path_or_url: ") and "10 x no caption" in nothing.error()


@covers("width_key", "height_key", "min_image_size")
def test_sizes_from_the_json_and_from_the_picture(run, json_shard):
    keys = ("--width_key=w", "--height_key=h")
    even = {f"caption {i}" for i in range(0, 10, 2)}
    assert set(run(*keys, "--min_image_size=500", "--train_batch_size=5", shards=json_shard).captions) == even
    odd_too = run(*keys, "--min_image_size=10", "--train_batch_size=5", shards=json_shard)
    assert len(set(odd_too.captions)) == 10
    assert run(*keys, "--min_image_size=901", shards=json_shard).status == 1
    swapped = run("--width_key=h", "--height_key=w", "--min_image_size=500", "--train_batch_size=5", shards=json_shard)
    sizes = torch.cat([batch["original_sizes"] for batch in swapped.batches])
    assert set(map(tuple, sizes.tolist())) == {(900, 1000)}
    measured = run("--min_image_size=20", "--train_batch_size=5", shards=json_shard)
    sizes = torch.cat([batch["original_sizes"] for batch in measured.batches])
    assert set(map(tuple, sizes.tolist())) == {(20, 24)}
    refused = run("--min_image_size=21", shards=json_shard)
    assert "10 x smaller than --min_image_size" in refused.error()


@covers("max_watermark_probability")
def test_watermarks(run, json_shard, tmp_path):
    done = run("--max_watermark_probability=0.5", "--train_batch_size=5", shards=json_shard)
    assert set(done.captions) == {f"caption {i}" for i in range(0, 10, 2)}
    assert "x watermark too probable" in done.printed
    assert "skipped: none" in run("--max_watermark_probability=0.75", shards=json_shard).printed
    assert "10 x watermark too probable" in run("--max_watermark_probability=0.1", shards=json_shard).error()
    assert "without a `pwatermark`" not in done.printed
    unscored = write_shards(tmp_path, with_json=True)
    kept = run("--max_watermark_probability=0", shards=unscored).printed  # as the public scripts keep them
    assert "4 samples used, 4 of them without a `pwatermark`, skipped: none" in kept
    assert "pwatermark" not in run("--max_watermark_probability=0").printed  # there is no JSON


# Length and batches.


@covers("train_batch_size", "max_train_steps")
def test_batches_and_steps(run):
    done = run("--train_batch_size=3", "--max_train_steps=3")
    assert [len(batch["captions"]) for batch in done.batches[:3]] == [3, 3, 3]
    assert [step for step, _ in done.steps] == [1, 2, 3]
    assert [len(call.t) for call in done.teacher_calls] == [6, 6, 6]  # conditional and unconditional
    assert [len(call.t) for call in done.student_calls] == [3, 3, 3]


@covers("max_train_samples", "num_train_epochs", "gradient_accumulation_steps")
def test_length_by_epochs(run):
    """Six samples are three batches of two, which are two optimizer steps of two passes: an epoch."""
    more = ("--max_train_samples=6", "--gradient_accumulation_steps=2")
    done = run(*more, "--num_train_epochs=2", drop=("max_train_steps",))
    assert [step for step, _ in done.steps] == [1, 2, 3, 4]
    assert len(done.student_calls) == 8
    assert [step for step, _ in run(*more, "--num_train_epochs=1", drop=("max_train_steps",)).steps] == [1, 2]
    both = run(*more, "--num_train_epochs=1", "--max_train_steps=3")
    assert [step for step, _ in both.steps] == [1, 2, 3]
    assert "1.5 epochs of 2" in both.log
    assert len(set(done.captions)) > 6  # the length of an epoch, not a subset


@covers("gradient_accumulation_steps")
def test_accumulation(run):
    done = run("--gradient_accumulation_steps=2")
    assert len(done.losses) == 4 and len(done.rates) == 2
    means = [(done.losses[i][2] + done.losses[i + 1][2]) / 2 for i in (0, 2)]
    assert [loss for _, loss in done.steps] == pytest.approx(means)
    # The mean of two passes' gradients, so no larger than the larger one; a sum would be about twice that.
    free = ("--max_grad_norm=1e9", "--learning_rate=0")
    one = run(*free, "--max_train_steps=4").norms
    two = run(*free, "--gradient_accumulation_steps=2").norms
    for i in (0, 1):
        a, b = one[2 * i : 2 * i + 2]
        assert abs(a - b) / 2 * 0.999 <= two[i] <= (a + b) / 2 * 1.001


@covers("gradient_accumulation_steps", "scale_lr")
def test_accumulation_from_accelerate_config_holds(run):
    env = (("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2"),)
    configured = run("--scale_lr", env=env)
    assert "--gradient_accumulation_steps: 1 given, but `accelerate config` says 2" in configured.log
    assert same(configured, run("--scale_lr", "--gradient_accumulation_steps=2"))
    assert configured.rates == pytest.approx([4e-3, 4e-3])
    same_value = run("--gradient_accumulation_steps=2", env=env)
    assert "--gradient_accumulation_steps:" not in same_value.log


@covers("local_rank", by=ALL)
def test_local_rank_makes_the_run_a_distributed_one(run, tmp_path):
    """As an old launcher starts it: the rank as an option, the rest in the environment. One process of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port))
    try:
        done = run("--local_rank=0", env=env, folder=tmp_path)
        assert done.distributed and not run().distributed
        assert same(done, run())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# Optimizer and learning rate.


@covers(
    "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "gradient_accumulation_steps",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "max_train_samples", "num_train_epochs",
    by=ALL,
)  # fmt: skip
def test_every_script_optimizes_as_it_is_told(run):
    """All options of the optimizer at once; the tests below take them one by one, with one script. Two epochs of five
    samples are two of two batches of three, which are one optimizer step."""
    done = run(
        "--learning_rate=2e-3",
        "--scale_lr",
        "--lr_scheduler=linear",
        "--lr_warmup_steps=1",
        "--gradient_accumulation_steps=2",
        "--train_batch_size=3",
        "--max_train_samples=5",
        "--num_train_epochs=2",
        "--adam_beta1=0.5",
        "--adam_beta2=0.6",
        "--adam_weight_decay=0.7",
        "--adam_epsilon=0.01",
        "--max_grad_norm=1e-4",
        drop=("max_train_steps",),
    )
    assert [len(batch["captions"]) for batch in done.batches[:4]] == [3, 3, 3, 3] and len(done.losses) == 4
    means = [(done.losses[i][2] + done.losses[i + 1][2]) / 2 for i in (0, 2)]
    assert done.steps == [(1, pytest.approx(means[0])), (2, pytest.approx(means[1]))]
    assert done.rates == pytest.approx([0, 2e-3 * 2 * 3])
    assert done.norms == pytest.approx([1e-4, 1e-4], rel=1e-3)
    settings = done.settings
    assert (settings["betas"], settings["weight_decay"], settings["eps"]) == ((0.5, 0.6), 0.7, 0.01)
    assert done.optimizer is torch.optim.AdamW


@covers("use_8bit_adam", by=ALL)
def test_8bit_adam(run):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    done = run("--use_8bit_adam", "--adam_beta1=0.5", "--learning_rate=2e-3")
    assert done.optimizer is bitsandbytes.optim.AdamW8bit
    assert (done.settings["lr"], tuple(done.settings["betas"])) == (2e-3, (0.5, 0.999))
    assert all(value.isfinite().all() for value in done.weights().values())


@covers("base_model_precision", by=ALL)
def test_quantized_base(run):
    """The teacher answers a little differently; what is trained keeps its precision."""
    pytest.importorskip("bitsandbytes")
    plain, small = run("--learning_rate=0"), run("--learning_rate=0", "--base_model_precision=nf4")
    assert "nf4: " in small.log and "linear layers" in small.log and set(small.trained) == {torch.float32}
    pairs = list(zip(plain.teacher_calls, small.teacher_calls, strict=True))
    assert pairs and all(torch.equal(a.z, b.z) for a, b in pairs[:1])
    distance = [((a.output - b.output).norm() / a.output.norm()).item() for a, b in pairs]
    assert 0 < max(distance) < 0.3
    if not run.is_lora:
        assert same(plain, small)


OPTIMIZERS = {
    "adamw_bf16": ("AdamW", (0.9, 0.99), {"exp_avg", "exp_avg_sq", "kahan_comp"}),
    "prodigy": ("Prodigy", (0.9, 0.999), {"exp_avg", "exp_avg_sq", "s", "p0"}),
    "adamw8bit": ("AdamW8bit", (0.9, 0.999), {"state1", "state2"}),
    "paged_adamw8bit": ("PagedAdamW8bit", (0.9, 0.999), {"state1", "state2"}),
    "lion": ("Lion", (0.9, 0.99), {"state1"}),
    "lion8bit": ("Lion8bit", (0.9, 0.99), {"state1"}),
    "adafactor": ("Adafactor", None, {"row_var", "col_var", "variance"}),
}


@covers("optimizer")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(run, tmp_path, name):
    """Each trains, with its own settings and states, and goes on exactly."""
    class_name, betas, states = OPTIMIZERS[name]
    pytest.importorskip(choices.OPTIMIZERS[name].module)
    more = (f"--optimizer={name}", "--adam_weight_decay=0.03", "--checkpointing_steps=1", "--learning_rate=1e-3")
    if name == "prodigy":
        more, run = more[:-1], functools.partial(run, drop=("learning_rate",))
    if name == "adamw_bf16":
        more += ("--mixed_precision=bf16",)
    straight = run(*more)
    assert straight.optimizer.__name__ == class_name and f"Optimizer: {class_name}," in straight.log
    assert (straight.settings["lr"], straight.settings["weight_decay"]) == (1 if name == "prodigy" else 1e-3, 0.03)
    settings = straight.settings
    assert ((settings["beta1"], settings["beta2"]) if "beta1" in settings else settings.get("betas")) == betas
    saved = torch.load(straight.folder / "checkpoint-1" / "optimizer.bin")["state"]
    saved = [state.get("__bnb_optimizer_quant_state__", {}) | state for state in saved.values()]
    found = {key for state in saved for key in state if not key.startswith(("qmap", "absmax", "__"))}
    assert found - {"step"} == states
    assert not same(straight, run(*more[1:]))
    assert same(straight, run(*more, f"--resume_from_checkpoint={straight.folder / 'checkpoint-1'}", folder=tmp_path))
    if name == "lion":
        assert run(*more, "--adam_beta2=0.999").settings["betas"] == (
            0.9,
            0.999,
        )  # given, though it is AdamW's default
    if name == "adamw8bit":
        assert same(straight, run("--use_8bit_adam", *more[1:]))


@covers("optimizer", by=ALL)
def test_weights_in_bfloat16(run):
    """They and the states are in bfloat16; a moving average, and the files of a LoRA, in float32."""
    more = ("--mixed_precision=bf16", "--checkpointing_steps=1", "--learning_rate=1e-3", "--adam_beta2=0.99")
    done = run(*more, "--optimizer=adamw_bf16")
    saved = torch.load(done.folder / "checkpoint-2" / "optimizer.bin")["state"]
    assert {value.dtype for state in saved.values() for value in state.values()} == {torch.bfloat16}
    for name in done.networks:
        weights = done.weights(name)
        assert {value.dtype for value in weights.values()} == {torch.bfloat16 if name == "unet" else torch.float32}
        assert all(value.isfinite().all() for value in weights.values())
    assert not same(done, run(*more, "--optimizer=adamw_bf16", "--learning_rate=0"))


@covers("optimizer", by=ALL)
def test_every_script_takes_the_optimizers(run):
    done = run("--optimizer=adafactor")
    assert done.optimizer is torch.optim.Adafactor
    assert all(value.isfinite().all() for value in done.weights().values())


@covers("learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("learning_rate=3e-4", "lr", 3e-4),
        ("adam_beta1=0.5", "betas", (0.5, 0.999)),
        ("adam_beta2=0.5", "betas", (0.9, 0.5)),
        ("adam_weight_decay=0.5", "weight_decay", 0.5),
        ("adam_epsilon=0.01", "eps", 0.01),
    ],
)
def test_optimizer_options(run, option, key, value):
    done = run(f"--{option}")
    assert done.optimizer is torch.optim.AdamW
    assert done.settings[key] == value
    assert not same(done, run())


@covers("learning_rate", by=FULL)
def test_without_learning_the_student_stays_the_teacher(run):
    start = load_file(run.teacher / "unet" / "diffusion_pytorch_model.safetensors")
    done = run("--learning_rate=0")
    for name in ("unet", "unet_target"):
        weights = done.weights(name)
        assert all(torch.equal(weights[key], start[key]) for key in start)
        assert weights.keys() - start.keys() == {"time_embedding.cond_proj.weight"}


@covers("scale_lr")
def test_scaled_learning_rate(run):
    scaled = run("--scale_lr", "--gradient_accumulation_steps=3", "--train_batch_size=4", "--max_train_steps=1")
    assert scaled.rates == pytest.approx([12e-3])
    assert "learning rate 0.012" in scaled.log
    plain = run("--gradient_accumulation_steps=3", "--train_batch_size=4", "--max_train_steps=1")
    assert plain.rates == pytest.approx([1e-3])
    assert "learning rate 0.001" in plain.log


@covers("lr_scheduler", "lr_warmup_steps")
@pytest.mark.parametrize(
    ("course", "warmup", "expected"),
    [
        ("constant", 1, [1, 1, 1, 1]),
        ("constant_with_warmup", 1, [0, 1, 1, 1]),
        ("constant_with_warmup", 4, [0, 0.25, 0.5, 0.75]),
        ("linear", 1, [0, 1, 2 / 3, 1 / 3]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 1, [0, 1, 0.75, 0.25]),
        ("cosine_with_restarts", 1, [0, 1, 0.75, 0.25]),
        ("polynomial", 1, [0, 1, 2 / 3 + 1e-4 / 3, 1 / 3 + 2e-4 / 3]),
    ],
)
def test_course_of_the_learning_rate(run, course, warmup, expected):
    done = run(f"--lr_scheduler={course}", f"--lr_warmup_steps={warmup}", "--max_train_steps=4")
    assert done.rates == pytest.approx([rate * 1e-3 for rate in expected], rel=1e-6, abs=1e-12)


@covers("lr_num_cycles", "lr_power", by=ALL)
def test_cycles_and_powers_of_the_learning_rate(run):
    four = ("--lr_warmup_steps=0", "--max_train_steps=4")
    twice = run("--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=2", *four)
    assert twice.rates == pytest.approx([1e-3, 0.5e-3, 1e-3, 0.5e-3])
    squared = run("--lr_scheduler=polynomial", "--lr_power=2", *four)
    assert squared.rates == pytest.approx([(1e-3 - 1e-7) * (1 - i / 4) ** 2 + 1e-7 for i in range(4)])


@covers("use_8bit_adam")
def test_8bit_adam_goes_on_exactly(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    more = ("--use_8bit_adam", "--checkpointing_steps=1")
    straight = run(*more)
    assert not same(straight, run())
    resumed = run(*more, f"--resume_from_checkpoint={straight.folder / 'checkpoint-1'}", folder=tmp_path)
    assert same(straight, resumed)


@covers("max_grad_norm")
def test_gradients_are_clipped(run):
    free, clipped = run("--max_grad_norm=1e9"), run("--max_grad_norm=0.01")
    assert min(free.norms) > 0.1
    assert max(clipped.norms) == pytest.approx(0.01, rel=1e-3)
    assert not same(free, clipped)


# Latent consistency distillation.


def expected_f(call, factor):
    """f of the boundary conditions, from what an epsilon-predicting network was given and returned."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    t, shape = torch.tensor(call.t), (-1, 1, 1, 1)
    alpha_bar = (1 - betas).cumprod(0)[t].reshape(shape)
    z, scaled_t = call.z.double(), (factor * t.double()).reshape(shape)
    x_0 = (z - (1 - alpha_bar).sqrt() * call.output.double()) / alpha_bar.sqrt()
    return 0.25 / (scaled_t**2 + 0.25) * z + scaled_t / (scaled_t**2 + 0.25).sqrt() * x_0


@covers(
    "w_min", "w_max", "num_ddim_timesteps", "timestep_scaling_factor", "loss_type", "huber_c",
    "vae_encode_batch_size", "allow_tf32", "enable_xformers_memory_efficient_attention",
    "validation_prompts", "validation_num_inference_steps", "validation_steps", "validation_guidance_scale",
    "max_train_steps",
    by=ALL,
)  # fmt: skip
def test_every_script_distils_as_it_is_told(run):
    """Options of the method, of memory and of the pictures at once; the tests below take them one by one."""
    done = run(
        "--w_min=3.5",
        "--w_max=4",
        "--num_ddim_timesteps=4",
        "--timestep_scaling_factor=0.01",
        "--loss_type=huber",
        "--huber_c=0.5",
        "--vae_encode_batch_size=2",
        "--train_batch_size=5",
        "--allow_tf32",
        "--enable_xformers_memory_efficient_attention",
        "--validation_prompts",
        "one",
        "two",
        "--validation_num_inference_steps",
        "1",
        "2",
        "--validation_steps=1",
        "--validation_guidance_scale=3.5",
    )
    assert [step for step, _ in done.steps] == [1, 2]
    assert len(done.w) == 10 and all(3.5 <= w <= 4 for w in done.w) and len(set(done.w)) == 10
    for i, (student, target, teacher) in enumerate(
        zip(done.student_calls, done.target_calls, done.teacher_calls, strict=True)
    ):
        assert set(student.t) <= {249, 499, 749, 999} and teacher.t == student.t * 2
        assert target.t == [max(t - 250, 0) for t in student.t]
        assert torch.equal(teacher.z, torch.cat([student.z, student.z]))
        prediction, goal, loss = done.losses[i]
        torch.testing.assert_close(prediction, expected_f(student, 0.01), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(goal, expected_f(target, 0.01), rtol=1e-3, atol=1e-4)
        difference = prediction - goal
        assert loss == pytest.approx(((difference**2 + 0.25).sqrt() - 0.5).mean().item(), rel=1e-4)
        if not run.is_lora:
            w_emb = lcm_common.guidance_embedding(torch.tensor(done.w[5 * i : 5 * i + 5]), 16)
            assert torch.equal(student.w_emb, w_emb) and torch.equal(target.w_emb, w_emb)
    scheduler = done.config("scheduler", "scheduler_config.json")
    assert (scheduler["original_inference_steps"], scheduler["timestep_scaling"]) == (4, 0.01)
    assert [size for size, _ in done.encoded[:3]] == [2, 2, 1]
    assert done.tf32 and not run().tf32
    if not torch.cuda.is_available():
        assert "WARNING --enable_xformers_memory_efficient_attention: needs xformers and CUDA" in done.log
    # After each of two steps two prompts, with 1 + 2 steps, by one network, or by the student and its moving average.
    assert done.pictures() == ["step-000001.png", "step-000002.png"]
    assert len(done.drawn) == 2 * 2 * 3 * (1 if run.is_lora else 2)
    assert 'prompt = "one"' in done.printed
    # Guidance is an input of a network, and for a LoRA the pipeline's second row, for a negative prompt.
    for call in done.drawn:
        assert len(call.z) == (2 if run.is_lora else 1)
        if not run.is_lora:
            expected = lcm_common.guidance_embedding(torch.tensor([2.5]), 16)
            torch.testing.assert_close(call.w_emb.float(), expected, rtol=0, atol=2e-3)
    # The weight is not an input of a LoRA, and the log says what follows from that.
    assert ("the guidance weight is not an input of a LoRA" in done.log) == run.is_lora


@covers("w_min", "w_max")
def test_guidance_weights(run):
    drawn = run("--w_min=2", "--w_max=4", "--train_batch_size=16")
    assert len(drawn.w) == 32 and all(2 <= w <= 4 for w in drawn.w)
    assert min(drawn.w) < 2.4 and max(drawn.w) > 3.6
    assert set(run("--w_min=8", "--w_max=8").w) == {8.0}
    assert not same(run("--w_min=8", "--w_max=8"), run("--w_min=9", "--w_max=9"))
    assert "guidance_scale 3 to 5" in drawn.printed
    assert "| guidance_scale | 3 to 5 (w = 2 to 4) |" in (drawn.folder / "README.md").read_text()


@covers("w_min", "w_max", by=("lora_sdxl",))
def test_one_guidance_weight_for_a_lora(run):
    done = run("--w_min=8", "--w_max=8")
    assert set(done.w) == {8.0} and not same(done, run())
    assert "is not an input of a LoRA" not in done.log


@covers("num_ddim_timesteps")
@pytest.mark.parametrize("num_steps", [4, 50, 300])
def test_timesteps_lie_on_the_grid(run, num_steps):
    done = run(f"--num_ddim_timesteps={num_steps}", "--train_batch_size=8")
    k = 1000 // num_steps
    starts = [t for call in done.student_calls for t in call.t]
    ends = [t for call in done.target_calls for t in call.t]
    assert len(set(starts)) >= min(4, num_steps)
    assert all((t + 1) % k == 0 and k - 1 <= t < num_steps * k for t in starts)
    assert ends == [max(t - k, 0) for t in starts]
    assert [t for call in done.teacher_calls for t in call.t[:8]] == starts
    assert done.config("scheduler", "scheduler_config.json")["original_inference_steps"] == num_steps
    assert ("--num_ddim_timesteps: 300 does not divide" in done.log) == (num_steps == 300)


@covers("loss_type", "huber_c")
def test_losses(run):
    def check(done, formula):
        assert [loss for _, _, loss in done.losses] == pytest.approx(
            [formula(prediction - target).mean().item() for prediction, target, _ in done.losses], rel=1e-4
        )

    check(run(), lambda d: d**2)
    check(run("--huber_c=0.5"), lambda d: d**2)
    check(run("--loss_type=huber"), lambda d: (d**2 + 0.001**2).sqrt() - 0.001)
    check(run("--loss_type=huber", "--huber_c=0.5"), lambda d: (d**2 + 0.5**2).sqrt() - 0.5)
    assert same(run(), run("--huber_c=0.5"))
    assert not same(run(), run("--loss_type=huber"))
    assert not same(run("--loss_type=huber"), run("--loss_type=huber", "--huber_c=0.5"))


def expected_jump(call, ends):
    """alpha_s / alpha_t z + (sigma_s - alpha_s sigma_t / alpha_t) eps: DDIM to the timesteps `ends`, from what an
    epsilon-predicting network was given and returned."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    t, s = (alphas_cumprod[torch.tensor(steps)].reshape(-1, 1, 1, 1) for steps in (call.t, ends))
    ratio = (s / t).sqrt()
    return ratio * call.z.double() + ((1 - s).sqrt() - ratio * (1 - t).sqrt()) * call.output.double()


@covers("target", "num_phases", "num_solver_steps", "teacher_negative_prompt", by=ALL)
def test_phases_solver_steps_and_a_negative_prompt(run):
    """Two phases, then one; two steps of the teacher between grid points, guided away from a prompt of its own."""
    more = ("--num_ddim_timesteps=4", "--num_solver_steps=2", "--teacher_negative_prompt=blurry")
    done = run("--target=phased", *more, "--num_phases", "2", "1")
    lower_edge = [{999: 499, 749: 499, 499: 0, 249: 0}, dict.fromkeys((999, 749, 499, 249), 0)]
    for step, (student, target) in enumerate(zip(done.student_calls, done.target_calls, strict=True)):
        first, second = done.teacher_calls[2 * step : 2 * step + 2]
        half_way = [t - (t - max(t - 250, 0)) // 2 for t in student.t]
        assert first.t == student.t * 2 and second.t == half_way * 2
        assert torch.equal(first.z, torch.cat([student.z, student.z])) and not torch.equal(second.z, first.z)
        prediction, goal, _ = done.losses[step]
        ends = [lower_edge[step][t] for t in student.t]
        torch.testing.assert_close(prediction, expected_jump(student, ends), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(goal, expected_jump(target, ends), rtol=1e-3, atol=1e-4)
        for call in (first, second):
            for name, value in call.cond.items():
                captions, negative = value.chunk(2)
                assert torch.equal(captions, student.cond[name])
                if name != "time_ids":
                    assert torch.equal(negative[0], negative[1]) and negative.any()
    assert done.config("scheduler", "scheduler_config.json")["_class_name"] == "LCMScheduler"
    assert "target phased (2, 1 phases)" in done.log
    assert "| target | phased (2, 1 phases) |" in (done.folder / "README.md").read_text()


@covers("target", by=ALL)
def test_trajectories(run):
    done = run("--target=trajectory", "--train_batch_size=4")
    ends = set()
    for i, (student, target) in enumerate(zip(done.student_calls, done.target_calls, strict=True)):
        prediction, goal, _ = done.losses[i]
        for b, t_n in enumerate(target.t):
            one, other = one_sample(student, b), one_sample(target, b)
            landed = [s for s in range(t_n + 1) if expected_jump(one, [s]).sub(prediction[b]).abs().max() < 2e-3]
            assert landed and any(expected_jump(other, [s]).sub(goal[b]).abs().max() < 2e-3 for s in landed)
            ends.add(landed[0])
    assert len(ends) > 4
    scheduler = done.config("scheduler", "scheduler_config.json")
    assert (scheduler["_class_name"], scheduler["original_inference_steps"]) == ("TCDScheduler", 50)
    assert "TCDScheduler.from_pretrained" in done.printed and not same(done, run("--train_batch_size=4"))


def one_sample(call, b):
    """The part of a Call that belongs to sample `b`."""
    return dataclasses.replace(call, z=call.z[b : b + 1], t=call.t[b : b + 1], output=call.output[b : b + 1])


@covers("w_min", "w_max", by=ALL)
def test_without_guidance(run):
    """The teacher has one pass, and guidance and negative prompts are left to those who sample."""
    pictures = ("--validation_guidance_scale=2", "--validation_negative_prompt=blurry", "--validation_teacher_steps=1")
    done = run("--w_min=0", "--w_max=0", *pictures, drop=("unet_time_cond_proj_dim",))
    assert len(done.calls) == 6 and not done.w
    for teacher, target, student in zip(*[iter(done.calls)] * 3, strict=True):
        assert teacher.w_emb is target.w_emb is student.w_emb is None and student.grad
        assert torch.equal(teacher.z, student.z) and teacher.t == student.t
        assert all(torch.equal(teacher.cond[name], student.cond[name]) for name in student.cond)
    assert all(len(call.z) == 2 for call in done.drawn)  # with the negative prompt, the teacher's too
    assert "no guidance, so one pass of the teacher" in done.log
    assert "a negative prompt work as they do in the teacher" in done.printed
    if not run.is_lora:
        assert done.config()["time_cond_proj_dim"] is None
        asked = run("--w_min=0", "--w_max=0")
        assert asked.config()["time_cond_proj_dim"] == 16 and len(asked.teacher_calls[0].z) == 2
        assert all(call.w_emb is not None for call in asked.student_calls)


@covers("unet_time_cond_proj_dim", by=FULL)
@pytest.mark.parametrize("dim", [4, 33])
def test_size_of_the_guidance_embedding(run, dim):
    done = run(f"--unet_time_cond_proj_dim={dim}")
    for name in ("unet", "unet_target"):
        assert done.config(name)["time_cond_proj_dim"] == dim
        assert done.weights(name)["time_embedding.cond_proj.weight"].shape[1] == dim
    assert {call.w_emb.shape for call in done.student_calls + done.target_calls} == {(2, dim)}


@covers("ema_decay", by=FULL)
def test_moving_average(run):
    start = run("--ema_decay=1").weights("unet_target")
    for key, value in load_file(run.teacher / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(start[key], value)
    for decay in (0, 0.25):
        done = run(f"--ema_decay={decay}", "--max_train_steps=1")
        student, target = done.weights("unet"), done.weights("unet_target")
        assert any(not torch.equal(student[key], start[key]) for key in start)
        for key, value in student.items():
            torch.testing.assert_close(target[key], decay * start[key] + (1 - decay) * value, rtol=0, atol=1e-7)


@covers("vae_encode_batch_size")
def test_the_vae_sees_so_many_pictures(run):
    more = ("--train_batch_size=5", "--max_train_steps=1")
    assert [size for size, _ in run(*more, "--vae_encode_batch_size=2").encoded] == [2, 2, 1]
    assert [size for size, _ in run(*more).encoded] == [5]
    split, whole = run(*more, "--vae_encode_batch_size=2").losses[0], run(*more).losses[0]
    assert split[0].shape == whole[0].shape == (5, 4, 8, 8)
    torch.testing.assert_close(split[0], whole[0], rtol=1e-3, atol=1e-4)  # the same noise


def test_without_the_option_the_vae_sees_so_many_pixels(run, tmp_path, monkeypatch):
    monkeypatch.setattr(family, "PIXELS_AT_ONCE", 1024)
    more = ("--train_batch_size=5", "--max_train_steps=1", "--resolution=16")
    assert [size for size, _ in run(*more, folder=tmp_path).encoded] == [4, 1]


@covers("timestep_scaling_factor")
@pytest.mark.parametrize("factor", [0.01, 10])
def test_timestep_scaling(run, factor):
    done = run(f"--timestep_scaling_factor={factor}")
    assert done.config("scheduler", "scheduler_config.json")["timestep_scaling"] == factor
    assert same(run(), done) == (factor == 10)
    for (prediction, goal, _), student, target in zip(done.losses, done.student_calls, done.target_calls, strict=True):
        torch.testing.assert_close(prediction, expected_f(student, factor), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(goal, expected_f(target, factor), rtol=1e-3, atol=1e-4)


# Precision, memory, speed.


@covers("mixed_precision", by=ALL)
def test_bfloat16(run):
    """Arithmetic and frozen networks in bfloat16, what is trained in float32. SDXL's VAE is another test's."""
    done = run("--mixed_precision=bf16")
    assert {call.output.dtype for call in done.calls} == {torch.bfloat16}
    assert {call.dtype for call in done.calls} == {torch.bfloat16 if run.is_lora else torch.float32}
    assert {call.cond["encoder_hidden_states"].dtype for call in done.calls} == {torch.bfloat16}
    assert set(done.trained) == {torch.float32}
    assert {value.dtype for value in done.weights().values()} == {torch.float32}
    if not run.is_sdxl:
        assert {dtype for _, dtype in done.encoded} == set(done.vae_outputs) == {torch.bfloat16}
    assert {call.output.dtype for call in run().calls} == {torch.float32}
    assert {call.dtype for call in run().calls} == {torch.float32}
    assert {dtype for _, dtype in run().encoded} == set(run().vae_outputs) == {torch.float32}
    assert all(math.isfinite(loss) for _, loss in done.steps) and not same(run(), done)


@covers("mixed_precision")
def test_precision_of_accelerate_config_holds_unless_another_is_given(run):
    env = (("ACCELERATE_MIXED_PRECISION", "bf16"),)
    assert same(run(env=env), run("--mixed_precision=bf16"))
    assert same(run("--mixed_precision=no", env=env), run())
    assert "| mixed precision | bf16 |" in (run(env=env).folder / "README.md").read_text()


@covers("mixed_precision", by=("sd", "lora_sdxl"))
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_float16_on_a_cpu_is_float32_and_says_so(run):
    done = run("--mixed_precision=fp16")
    assert "WARNING --mixed_precision: fp16 needs a GPU" in done.log
    assert same(done, run())


@covers("cast_teacher_unet", by=FULL)
def test_cast_teacher(run):
    done = run("--mixed_precision=bf16", "--cast_teacher_unet")
    assert {call.dtype for call in done.teacher_calls} == {torch.bfloat16}
    assert {call.dtype for call in done.student_calls + done.target_calls} == {torch.float32}
    assert {call.dtype for call in run("--mixed_precision=bf16").teacher_calls} == {torch.float32}
    assert same(run("--cast_teacher_unet"), run())  # there is no mixed precision to cast to


@covers("gradient_checkpointing", by=FULL)
def test_gradient_checkpointing(run):
    done = run("--gradient_checkpointing")
    assert done.recomputed > 0 and run().recomputed == 0
    for name in done.networks:
        for key, value in run().weights(name).items():
            torch.testing.assert_close(done.weights(name)[key], value, rtol=1e-4, atol=1e-5)


@covers("offload", by=ALL)
def test_offloaded_networks_compute_the_same(run):
    """On a CPU their weights are swapped as on a GPU, but stay where they are."""
    done = run("--offload")
    assert "In host memory while not used: VAE, " in done.log and "In host memory" not in run().log
    assert same(done, run())
    assert "WARNING --offload: saves memory of a GPU" in done.log or torch.cuda.is_available()


@covers("offload_ema", by=FULL)
def test_an_offloaded_moving_average_is_the_same(run):
    done = run("--offload_ema", "--ema_decay=0.5")
    assert "In host memory while not used: moving average, " in done.log
    assert same(done, run("--ema_decay=0.5"))


@covers("enable_xformers_memory_efficient_attention")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_xformers_without_cuda_is_a_warning(run):
    done = run("--enable_xformers_memory_efficient_attention")
    assert "WARNING --enable_xformers_memory_efficient_attention: needs xformers and CUDA" in done.log
    assert same(done, run())


# Pictures and metrics; test_validation.py and test_progress.py look closer.


@covers(
    "logging_steps", "validation_negative_prompt", "num_validation_images", "validation_resolution",
    "validation_teacher_steps",
    by=ALL,
)  # fmt: skip
def test_every_script_shows_what_it_is_told(run):
    shown = ("--num_validation_images=2", "--validation_resolution=16x24", "--validation_guidance_scale=3")
    more = ("--logging_steps=2", "--validation_negative_prompt=blue", "--validation_teacher_steps", "2", "1")
    done = run(*shown, *more)
    plain = run(*shown)
    networks = 1 if run.is_lora else 2
    assert len(done.drawn) == 2 * (2 + 1) + 2 * networks and len(plain.drawn) == 2 * networks
    teacher, trained = done.drawn[:6], done.drawn[6:]
    assert all(call.w_emb is None and not call.adapters and len(call.z) == 2 for call in teacher)
    assert all(call.z.shape[-2] * 2 == call.z.shape[-1] * 3 for call in done.drawn)
    assert not torch.equal(trained[0].z, trained[1].z)  # each picture of a prompt from noise of its own
    assert torch.equal(trained[0].z, plain.drawn[0].z)
    if run.is_lora:
        hidden, without = (calls[0].cond["encoder_hidden_states"] for calls in (trained, plain.drawn))
        assert torch.equal(hidden[1], without[1]) and not torch.equal(hidden[0], without[0])
    files = [(one.folder / "metrics.jsonl").read_text() for one in (done, plain)]
    assert [[json.loads(line)["step"] for line in file.splitlines()] for file in files] == [[2], [1, 2]]
    assert same(done, plain)


@covers("validation_steps")
def test_when_pictures_are_drawn(run):
    assert run("--max_train_steps=3", "--validation_steps=2").pictures() == ["step-000002.png", "step-000003.png"]
    assert run().pictures() == ["step-000002.png"]


@covers("validation_prompts", "validation_num_inference_steps")
def test_a_row_per_prompt_and_a_column_per_step_count(run, tmp_path):
    def size(done):
        with Image.open(done.folder / "validation" / "step-000002.png") as grid:
            return grid.size

    grid = ("--validation_prompts", "one", "two", "three", "--validation_num_inference_steps", "1", "2", "4")
    done = run(*grid)
    # Three prompts, each with 1 + 2 + 4 steps, by student and moving average; a cell is 96 pixels and a gap of 4.
    assert len(done.drawn) == 3 * 7 * 2
    width, height = size(run())
    assert size(done) == (width + 4 * 100, height + 2 * 100)
    assert 'prompt = "one"' in done.printed


@covers("validation_prompts")
def test_any_prompt_leaves_code_that_can_be_run(run):
    prompt = 'a "red" three\\n'
    done = run(f"--validation_prompts={prompt}")
    scope = {}
    code = done.printed[done.printed.index("import torch") :]
    exec("\n".join(line for line in code.splitlines() if line.startswith("prompt = ")), scope)
    assert scope["prompt"] == prompt


@covers("validation_guidance_scale")
@pytest.mark.parametrize(
    ("more", "w"),
    [
        (["--validation_guidance_scale=9"], 8),
        ([], 6.5),
        (["--w_min=8"], 8),
        (["--w_max=6"], 6),
        (["--w_min=0", "--w_max=0"], 0),
        (["--validation_guidance_scale=1"], 0),
    ],
)
def test_guidance_of_the_pictures(run, more, w):
    done = run(*more)
    expected = lcm_common.guidance_embedding(torch.tensor([float(w)]), 16)
    assert len(done.drawn) == 2
    for call in done.drawn:
        torch.testing.assert_close(call.w_emb.float(), expected, rtol=0, atol=2e-3)


@covers("validation_guidance_scale", by=("sdxl", *LORA))
def test_default_guidance_of_the_pictures(run):
    """Of a whole U-Net 7.5, where that was trained; of a LoRA 1, which adds none to what was learned."""
    assert [len(call.z) for call in run().drawn] == ([1] if run.is_lora else [1, 1])


@covers("resume_from_checkpoint", "validation_steps")
def test_killed_after_the_last_step_and_resumed_still_has_its_picture(run, tmp_path):
    straight = run("--max_train_steps=4", "--checkpointing_steps=2")
    shutil.copytree(straight.folder / "checkpoint-4", tmp_path / "checkpoint-4")
    resumed = run("--max_train_steps=4", "--checkpointing_steps=2", "--resume_from_checkpoint=latest", folder=tmp_path)
    assert resumed.status == 0
    for picture in re.findall(r"!\[.*\]\((.*)\)", (tmp_path / "README.md").read_text()):
        assert (tmp_path / picture).is_file()


# Teachers of other kinds; those that cannot be used are in `test_errors.py`.


def edited(teacher, folder, name, **changes):
    """A copy of a teacher with other entries in one of its JSON files; None takes an entry out."""
    shutil.copytree(teacher, folder)
    path = folder / name
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


SCHEDULER = "scheduler/scheduler_config.json"


def test_the_tokenizer_of_the_published_models(run, teacher, tmp_path):
    """In the files that those have."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(DEMO_TEACHER / "tokenizer", folder / "tokenizer")
    assert same(run(), run(teacher=folder))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_prediction_types_train(run, teacher, tmp_path, prediction_type, zero_snr):
    changes = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    done = run("--w_max=6", teacher=edited(teacher, tmp_path / "teacher", SCHEDULER, **changes))
    assert done.status == 0 and all(math.isfinite(loss) for _, loss in done.steps)
    assert all(value.isfinite().all() for name in ("unet", "unet_target") for value in done.weights(name).values())
    scheduler = done.config("scheduler", "scheduler_config.json")
    assert scheduler["prediction_type"] == prediction_type and scheduler["rescale_betas_zero_snr"] == zero_snr
    assert not same(done, run("--w_max=6"))
