"""The real `train` of a script on a simulated GPU: models from their configuration files, batches of no content."""

import contextlib
import importlib
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import accelerate
import accelerate.optimizer
import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from lcm.cache import Cache
from lcm.data.loader import TrainingData
from lcm.data.order import Position
from lcm.data.shards import expand_shards, find_cache
from lcm.data.stream import Item
from lcm.data.tally import Tally
from lcm.errors import UserError, first_line
from lcm.models import family, loading, quantize
from lcm.models.lora import AdapterView
from lcm.models.networks import Networks
from lcm.options.types import Options
from lcm.pictures import validation
from lcm.pictures.validation import Validation
from lcm.results import finish
from lcm.results.finish import Results
from lcm.run import start
from lcm.run.checkpoints import Checkpoints
from lcm.run.progress import Progress
from lcm.run.signals import StopSignals
from lcm.session import Session
from lcm.simulation import processes
from lcm.simulation.device import SimulatedCuda
from lcm.simulation.files import patch_files
from lcm.simulation.quantized import PackedLinear

NUM_STEPS = 2  # in the first one the optimizer makes its states; the second one is like all that follow


@dataclass
class Step:
    """What happened in one optimizer step. Sizes are in bytes."""

    start: int  # what was in memory before it
    peak: int
    peak_phase: str
    at_peak: dict[str, int]  # by owner
    phase_peaks: dict[str, int]
    flops: dict[str, dict[str, int]]  # {phase: {dtype: FLOPs}}
    bytes_moved: dict[str, int]  # by phase
    kernels: dict[str, int]  # by phase: operations that read or write memory of the device
    waits: list[tuple[str, str, str, int]]  # phase, kind, place, how often
    float32_places: list[tuple[str, str, int]]  # phase, place, FLOPs
    float64_places: list[tuple[str, str, int]]  # phase, place, operations


@dataclass
class Record:
    """What a simulated run did."""

    script: str
    options: list[str]
    num_processes: int = 1  # of which this is one
    is_sharded: bool = False  # by FSDP
    steps: list[Step] = field(default_factory=list)
    loaded: int = 0  # bytes before the first step
    dtypes: dict[str, dict[str, str]] = field(default_factory=dict)  # {network: {argument: dtype}} of each call
    pictures: int = 0  # peak in bytes while pictures are drawn, 0 if none were
    checkpoints: int = 0  # peak in bytes while checkpoints are saved and loaded
    export: int = 0  # peak in bytes while the results are written
    seconds: float = 0.0

    @property
    def peaks(self) -> dict[str, int]:
        """{part of the run: its peak of memory in bytes}: the phases of the steps, pictures, checkpoints, results."""
        found = {what: getattr(self, what) for what in ("pictures", "checkpoints", "export")}
        for step in self.steps:
            for phase, peak in {"start": step.start, **step.phase_peaks}.items():
                found[phase] = max(found.get(phase, 0), peak)
        return found

    @property
    def peak(self) -> int:
        """The peak of memory in bytes: of the steps, of checkpoints and results, of pictures if they were drawn."""
        return max(self.peaks.values())


def build(loader: Any, option: str, source: str, **kwargs: Any) -> torch.nn.Module:
    """A network like that of `loading.load_pretrained`, from its configuration file alone. Raises UserError."""
    subfolder, dtype = kwargs.get("subfolder") or "", kwargs.get("dtype") or torch.float32
    place = {name: kwargs[name] for name in ("cache_dir", "revision") if kwargs.get(name) is not None}
    try:
        with unset_fake_temporarily():
            if issubclass(loader, diffusers.ModelMixin):
                config = loader.load_config(source, subfolder=subfolder, **place)
            else:
                config = loader.config_class.from_pretrained(source, subfolder=subfolder, **place)
        network = loader.from_config(config) if isinstance(config, dict) else loader._from_config(config)
    except Exception as error:
        raise UserError(f"{option}: cannot load the configuration of {source!r}: {first_line(error)}") from error
    return network.to(dtype).eval()


def empty_items(data: TrainingData) -> Iterator[Item]:
    """Items as from the streams, with pictures, or cached tensors, of zeros."""
    config = data.config
    largest = max(config.shapes, key=math.prod)
    shapes: dict[str, list[int]] = {"pixels": [3, *largest]}
    dtypes = {"pixels": torch.uint8, "is_empty": torch.bool}
    if config.origin:
        shapes = {**json.loads(config.origin["shapes"]), "is_empty": []}
        del shapes["original_size"]
        dtypes |= {name: getattr(torch, config.origin["dtype"]) for name in shapes.keys() - dtypes.keys()}
    while True:
        batch = {
            **{name: torch.zeros(config.batch_size, *shape, dtype=dtypes[name]) for name, shape in shapes.items()},
            "captions": ["a caption"] * config.batch_size,
            "original_sizes": torch.tensor([largest] * config.batch_size),
            "target_size": largest,
            "crops": torch.zeros(config.batch_size, 2, dtype=torch.int64),
        }
        yield Item(0, Position(), 0, [], [], batch, Tally(used=config.batch_size))


def few_pictures(args: Options) -> list[str]:
    """Options that draw one picture of each kind and size, in one step. More would not take more memory."""
    fewer = ["--validation_prompts=a prompt", "--num_validation_images=1", "--validation_num_inference_steps=1"]
    return fewer + ["--validation_teacher_steps=1"] * bool(args.validation_teacher_steps)


class Simulation:
    """Runs `train` of a script for NUM_STEPS steps on a simulated device; `record` says what happened.

    With `num_processes` it is one of several, as accelerate's `config_file` and the environment say.
    """

    def __init__(
        self,
        script: str,
        options: list[str],
        with_pictures: bool = False,
        num_processes: int = 1,
        config_file: str | None = None,
    ):
        self.module = importlib.import_module(script)
        self.options, self.with_pictures = options, with_pictures
        self.num_processes, self.config_file = num_processes, config_file
        self.device, self.record = SimulatedCuda(), Record(script, options, num_processes)
        self.ledger = self.device.ledger

    def run(self) -> Record:
        """Run it. Raises UserError for what the script itself refuses."""
        with tempfile.TemporaryDirectory() as folder:
            return self.run_in(folder)

    def run_in(self, folder: str, num_steps: int = NUM_STEPS) -> Record:
        """Run it up to a step, with this output folder, whose checkpoint `--resume_from_checkpoint=latest` resumes."""
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            own = [f"--output_dir={folder}", f"--max_train_steps={num_steps}", f"--checkpointing_steps={NUM_STEPS}"]
            args = self.module.parse_args([*self.options, *own, "--report_to=none"])
            if self.with_pictures:
                args = self.module.parse_args([*self.options, *own, "--report_to=none", *few_pictures(args)])
            stack.callback(self.device.close)
            self.patch_inputs(args)
            self.patch_results()
            self.patch_numbers()
            self.patch_phases()
            stack.enter_context(self.device)
            if self.num_processes > 1:
                processes.launch(self.device, self.num_processes, self.config_file)
            self.module.train(args)
        self.record.seconds = time.perf_counter() - began
        return self.record

    def patch_inputs(self, args: Options) -> None:
        """Networks come from configuration files, batches from `empty_items`."""
        real_load, real_schedule = loading.load_pretrained, family.load_noise_schedule

        def load(loader: Any, option: str, source: str, **kwargs: Any) -> Any:
            if issubclass(loader, torch.nn.Module):
                return build(loader, option, source, **kwargs)
            with unset_fake_temporarily():
                return real_load(loader, option, source, **kwargs)

        def load_schedule(args: Any) -> Any:
            with unset_fake_temporarily():
                return real_schedule(args)

        self.device.patch(loading, "load_pretrained", load)
        self.device.patch(quantize, "make_layer", PackedLinear)
        self.device.patch(family, "load_noise_schedule", load_schedule)
        self.device.patch(start, "find_shards", lambda args: ("simulated.tar",))
        self.device.patch(start, "find_cache", lambda *_: self.find_cache(args))
        self.device.patch(family.Family, "origin", lambda *_: {})
        self.device.patch(TrainingData, "items", empty_items)
        for name in ("run", "draw_teacher"):
            if self.with_pictures:
                self.note_peak(Validation, name, "pictures")
            else:
                self.device.patch(Validation, name, lambda *_: None)
        if self.with_pictures:
            self.patch_pictures()

    def find_cache(self, args: Options) -> Cache | None:
        """What real shards have in common if they are cached, with an embedding of zeros. Shards need not exist."""
        if args.train_shards_path_or_url is None:
            return None
        try:
            with unset_fake_temporarily():
                cache = find_cache(expand_shards(args.train_shards_path_or_url), args.shard_timeout)
        except UserError:
            return None
        return cache and Cache(cache.origin, tuple(torch.zeros(part.shape, dtype=part.dtype) for part in cache.empty))

    def patch_results(self) -> None:
        """Files of tensors have no content. Results, which soon are gone, are neither announced nor pushed."""
        patch_files(self.device)
        self.device.patch(finish, "create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
        for name in ("push", "draw_curves"):
            self.device.patch(Results, name, lambda *_: None)
        for name in ("save", "load_state"):
            self.note_peak(Checkpoints, name, "checkpoints")
        self.note_peak(Results, "save", "export")
        real_save = Results.save

        def save(*args: Any) -> None:
            with contextlib.redirect_stdout(None):
                real_save(*args)

        self.device.patch(Results, "save", save)

    def patch_pictures(self) -> None:
        """Pictures are blank, and a failure to draw them is an error, not a line in the log."""

        def postprocess(processor: Any, image: torch.Tensor, output_type: str = "pil", *_: Any, **__: Any) -> Any:
            return image if output_type == "latent" else [Image.new("RGB", (image.shape[-1], image.shape[-2]))]

        def raise_again(error: Exception) -> str:
            raise error

        self.device.patch(VaeImageProcessor, "postprocess", postprocess)
        # It compares timesteps, which have no values.
        for kind in (diffusers.LCMScheduler, diffusers.TCDScheduler):
            self.device.patch(kind, "_init_step_index", lambda self, t: setattr(self, "_step_index", 0))
        self.device.patch(validation, "first_line", raise_again)

    def patch_numbers(self) -> None:
        """Numbers that nobody computes: those of `Progress.check` are finite. No signal comes: Ctrl-C ends the run."""
        ledger = self.ledger

        def tolist(tensor: FakeTensor) -> list[float]:
            if tensor.device.type == "cuda":
                ledger.wait("tolist")
            return [1.0] * tensor.numel()

        def check(progress: Progress, *args: Any) -> None:
            with ledger.within("check"):
                real_check(progress, *args)
            progress.stopping = False

        def no_handlers(signals: StopSignals, *_: Any, **__: Any) -> None:
            signals.received, signals.previous = None, {}

        self.device.patch(FakeTensor, "tolist", tolist)
        self.device.patch(StopSignals, "__init__", no_handlers)
        real_check = self.device.patch(Progress, "check", check)

    def patch_phases(self) -> None:
        """Name phases and owners of memory, and note what each step did."""
        device, ledger = self.device, self.ledger
        device.wrap(family.Family, "latents", "VAE")
        device.wrap(family.Family, "conditions", "text encoders")
        device.wrap(accelerate.Accelerator, "backward", "backward")
        device.wrap(accelerate.Accelerator, "clip_grad_norm_", "clipping")
        real_prepare, real_optimizer_step = Networks.prepare, accelerate.optimizer.AcceleratedOptimizer.step
        real_step, real_timed, real_init = Progress.step, Progress.timed, Session.__init__

        def init(
            session: Session, accelerator: Any, args: Any, plan: Any, parts: Any, networks: Any, *more: Any
        ) -> None:
            if parts.vae:  # there is none with cached samples
                ledger.assign(tensors_of(parts.vae), "weights of the VAE")
            for part in parts.encode_prompts.encoders():
                ledger.assign(tensors_of(part), "weights of text encoders")
            self.name_networks(networks)
            real_init(session, accelerator, args, plan, parts, networks, *more)
            if networks.is_sharded:
                ledger.assign(tensors_of(networks.target), "weights of the target")

        def prepare(networks: Networks, *args: Any) -> Any:
            optimizer = real_prepare(networks, *args)
            self.record.is_sharded = networks.is_sharded
            ledger.assign(tensors_of(networks.unet), "weights of the student")
            for parameter in networks.trainable_parameters():
                ledger.assign([parameter], "weights that are trained")
                parameter.register_post_accumulate_grad_hook(lambda p: ledger.assign([p.grad], "gradients"))
            return optimizer

        def optimizer_step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            with ledger.within("optimizer"):
                result = real_optimizer_step(optimizer, *args, **kwargs)
            states = (value for state in optimizer.optimizer.state.values() for value in state.values())
            ledger.assign((value for value in states if isinstance(value, torch.Tensor)), "states of the optimizer")
            return result

        def timed(progress: Progress, batches: Iterable[Any]) -> Iterator[Any]:
            for batch in real_timed(progress, batches):
                if not self.record.loaded:
                    self.record.loaded = ledger.current
                    ledger.phase = "loop"
                    ledger.start_step()
                yield batch

        def step(progress: Progress, number: int, learning_rate: float) -> None:
            self.record.steps.append(self.snapshot())
            real_step(progress, number, learning_rate)
            ledger.start_step()

        device.patch(Session, "__init__", init)
        device.patch(Networks, "prepare", prepare)
        device.patch(accelerate.optimizer.AcceleratedOptimizer, "step", optimizer_step)
        device.patch(Progress, "timed", timed)
        device.patch(Progress, "step", step)

    def note_peak(self, owner: type, name: str, what: str) -> None:
        """Note the peak of memory in a method, which is not part of a step, as this entry of the record."""
        method, ledger, record = getattr(owner, name), self.ledger, self.record

        def noted(*args: Any) -> Any:
            ledger.start_step()
            with ledger.within(what):
                result = method(*args)
            setattr(record, what, max(getattr(record, what), ledger.peak))
            ledger.start_step()
            return result

        self.device.patch(owner, name, noted)

    def name_networks(self, networks: Networks) -> None:
        """Count each network's calls as a phase, and note the dtypes that it is given and returns."""
        phases = {"teacher": networks.teacher, "target": networks.target, "student": networks.student}
        for name, network in phases.items():
            if isinstance(network, torch.nn.Module):
                self.ledger.assign(tensors_of(network), f"weights of the {name}")

        def call(phase: str, original: Any, args: Any, kwargs: Any) -> Any:
            if self.ledger.phase in (*phases, "pictures"):  # the U-Net inside of a view, or of a pipeline
                return original(*args, **kwargs)
            with self.ledger.within(phase):
                self.record.dtypes.setdefault(phase, {}).update(dtypes_of(args, kwargs))
                output = original(*args, **kwargs)
            self.record.dtypes[phase]["output"] = dtype_of(getattr(output, "sample", output))
            return output

        for name, network in phases.items():
            if isinstance(network, AdapterView):
                continue
            original = network.forward
            network.forward = lambda *a, name=name, original=original, **k: call(name, original, a, k)  # type: ignore[misc]
        views = {id(view): name for name, view in phases.items() if isinstance(view, AdapterView)}
        if views:
            original_view = AdapterView.__call__
            self.device.patch(
                AdapterView, "__call__", lambda view, *a, **k: call(views[id(view)], original_view.__get__(view), a, k)
            )

    def snapshot(self) -> Step:
        """The ledger's figures for the step that has just ended."""
        ledger = self.ledger
        return Step(
            ledger.at_start,
            ledger.peak,
            ledger.peak_phase,
            positive(ledger.at_peak),
            dict(ledger.phase_peaks),
            {phase: dict(flops) for phase, flops in ledger.flops.items()},
            dict(ledger.bytes_moved),
            dict(ledger.kernels),
            [(*key, count) for key, count in sorted(ledger.waits.items())],
            [(*key, count) for key, count in ledger.float32_places.most_common()],
            [(*key, count) for key, count in ledger.float64_places.most_common()],
        )


def positive(sizes: Counter[str]) -> dict[str, int]:
    """The entries that are not 0, largest first."""
    return {owner: size for owner, size in sizes.most_common() if size > 0}


def tensors_of(network: torch.nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def dtype_of(value: Any) -> str:
    value = value[0] if isinstance(value, tuple) else value
    return str(value.dtype).removeprefix("torch.")


def dtypes_of(args: Any, kwargs: dict[str, Any]) -> dict[str, str]:
    """{name of the argument: its dtype} of the tensors of one call of a U-Net."""
    named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
    named |= named.pop("added_cond_kwargs", None) or {}
    return {name: dtype_of(value) for name, value in named.items() if isinstance(value, torch.Tensor)}
