"""Tiny models and shards for the tests: made here, in a second, with random weights. Nothing comes from a hub."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

# One thread each: the models are tiny, and the order of float additions is then the same everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import HubServer
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

ROOT = Path(__file__).resolve().parent.parent
DEMO_TEACHER = ROOT / "demo" / "teacher"


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist, which would begin with the files of most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in ("scripts", "simulation"))  # the longest files first
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def local_folders_offline():
    """diffusers before 0.40, where nothing may be downloaded, wants a LoRA's file named even in a folder."""
    import diffusers.loaders.lora_base

    diffusers.loaders.lora_base.HF_HUB_OFFLINE = False


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps device and precision for the life of a process, and `--local_rank` sets the environment."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.pop("LOCAL_RANK", None)


def make_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(DEMO_TEACHER / "tokenizer")


def text_config(tokenizer, **more):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **more,
        }
    )


def make_unet(**more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **more,
        }
    )


def make_vae(**more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "sample_size": 16,
            **more,
        }
    )


def make_scheduler(**more):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **{
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **more,
        }
    )


def make_teacher(folder, seed=0, unet_config=None, scheduler_config=None, vae_config=None):
    """Write a Stable Diffusion pipeline of about 0.1 M random weights; 16x16 pictures have (4, 8, 8) latents."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    StableDiffusionPipeline(
        unet=make_unet(**(unet_config or {})),
        vae=make_vae(**(vae_config or {})),
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        scheduler=make_scheduler(**(scheduler_config or {})),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_sdxl_teacher(folder, seed=0, unet_config=None, scheduler_config=None, vae_config=None, **pipeline_config):
    """The same for SDXL: two text encoders of different widths, micro-conditioning, linear projections."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    unet_config = {
        "cross_attention_dim": 16 + 24,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
        **(unet_config or {}),
    }
    StableDiffusionXLPipeline(
        unet=make_unet(**unet_config),
        vae=make_vae(**(vae_config or {})),
        text_encoder=CLIPTextModel(text_config(tokenizer, num_hidden_layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(
            text_config(tokenizer, num_hidden_layers=2, hidden_size=24, projection_dim=12)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=make_scheduler(**(scheduler_config or {})),
        **{"add_watermarker": False, **pipeline_config},
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A folder with a tiny epsilon-predicting teacher."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def sdxl_teacher(tmp_path_factory):
    """A folder with a tiny teacher in the layout of SDXL."""
    return make_sdxl_teacher(tmp_path_factory.mktemp("sdxl_teacher"))


def encode_image(array_or_image, suffix="png", **kwargs):
    """A picture's bytes in the format of that suffix."""
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], **kwargs)
    return buffer.getvalue()


def write_tar(path, members):
    """Write (name, bytes) pairs as a tar file."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def read_tars(folder):
    """{shard/member: bytes} of all shards in a folder."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            found |= {f"{path.name}/{member.name}": shard.extractfile(member).read() for member in shard}
    return found


def launch_two(script, options):
    """What `subprocess.run` returns of a script in two processes on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--cpu"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", script, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


def write_shards(folder, num_shards=3, samples_per_shard=10, size=(20, 24), seed=0, with_json=False):
    """Write shards of random pictures, each captioned "picture <shard> <index>". Returns the brace pattern."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        members = []
        for i in range(samples_per_shard):
            key = f"{shard:03d}{i:05d}"
            members.append((f"{key}.png", encode_image(rng.integers(0, 256, (*size, 3), dtype=np.uint8))))
            members.append((f"{key}.txt", f"picture {shard} {i}".encode()))
            if with_json:
                members.append((f"{key}.json", json.dumps({"width": size[1], "height": size[0]}).encode()))
        write_tar(folder / f"{shard:05d}.tar", members)
    return f"{folder}/{{00000..{num_shards - 1:05d}}}.tar"


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """The pattern of three shards of ten random 24x20 pictures."""
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def clean_shards(tmp_path_factory):
    """Five shards of four samples with captions "picture <shard> <index>"."""
    folder = tmp_path_factory.mktemp("clean")
    write_shards(folder, num_shards=5, samples_per_shard=4)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture
def watchdog():
    """Fails a test that hangs. pytest's failure is no Exception, so that no reader's handler can swallow it."""

    def give_up(*_):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def forked(call, new_session=False):
    """What `subprocess.run` returns of a process that calls `call`; forked from this one, which spares the imports."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if new_session:
                    os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                with open(1, "w", closefd=False) as sys.stdout, open(2, "w", 1, closefd=False) as sys.stderr:
                    call()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return subprocess.CompletedProcess(call, os.waitstatus_to_exitcode(status), *texts)


def sd_options(teacher, shards, output_dir, *more):
    """Options of the SD script for a run of four steps that takes a second or two; later ones override."""
    return ["--unet_time_cond_proj_dim=16", *common_options(teacher, shards, output_dir, *more)]


def common_options(teacher, shards, output_dir, *more):
    """Options that all four scripts take, as in `sd_options`."""
    return [
        f"--pretrained_teacher_model={teacher}",
        f"--train_shards_path_or_url={shards}",
        f"--output_dir={output_dir}",
        "--resolution=16",
        "--train_batch_size=2",
        "--max_train_steps=4",
        "--learning_rate=1e-3",
        "--shuffle_buffer_size=8",
        "--report_to=none",
        "--logging_steps=1",
        "--validation_prompts=a red three",
        "--validation_num_inference_steps=1",
        "--validation_teacher_steps",
        "--seed=0",
        *map(str, more),
    ]


# What a resumed run has to draw, read and schedule again just as the unbroken one did; all scripts take it.
EVERYTHING_AT_RANDOM = [
    "--gradient_accumulation_steps=2",
    "--dataloader_num_workers=2",
    "--random_flip",
    "--proportion_empty_prompts=0.3",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=2",
    "--resume_from_checkpoint=latest",
]


@dataclass
class Script:
    """One of the four training scripts, with a teacher for it and options that make its run short."""

    name: str
    teacher: Path
    shards: str
    own_options: tuple

    @property
    def path(self):
        return ROOT / f"train_lcm_distill_{self.name}_wds.py"

    @property
    def module(self):
        return importlib.import_module(self.path.stem)

    @property
    def is_lora(self):
        return "lora" in self.name

    @property
    def is_sdxl(self):
        return "sdxl" in self.name

    def options(self, output_dir, *more, teacher=None):
        return common_options(teacher or self.teacher, self.shards, output_dir, *self.own_options, *more)

    def main(self, output_dir, *more):
        self.module.main(self.options(output_dir, *more))

    def weights(self, folder):
        """All that was trained and lies in `folder`, as one dict of tensors."""
        files = sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("[su]*/*.safetensors"))
        assert files
        return {
            f"{file.relative_to(folder)}: {name}": tensor for file in files for name, tensor in load_file(file).items()
        }


SCRIPTS = {
    "sd": ("--unet_time_cond_proj_dim=16",),
    "sdxl": ("--unet_time_cond_proj_dim=16", "--ema_decay=0.5"),
    "lora_sd": ("--lora_rank=4", "--lora_alpha=8", "--lora_dropout=0.1", "--learning_rate=1e-2"),
    "lora_sdxl": ("--lora_rank=4", "--lora_alpha=2", "--ema_decay=0.5", "--learning_rate=1e-2"),
}


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request, teacher, sdxl_teacher, shards):
    """Each of the four scripts in turn."""
    name = request.param
    return Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])


@pytest.fixture
def deaths_show_soon(monkeypatch):
    """torch asks every 5 s whether its data workers are alive; here it asks more often."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


@contextlib.contextmanager
def hub():
    """A stand-in for the Hub, that the real client in this process talks to."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # 0.x
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        patch.delenv("HF_TOKEN", raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        close_session = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions  # 0.x
        close_session()  # the next one reads the environment anew
        try:
            yield server
        finally:
            close_session()
