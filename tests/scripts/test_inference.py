"""docs/inference.md, run: its code blocks are executed on tiny models, trained here by the four scripts.

The tests work in a folder in which local folders bear the names that stand in the document, so that nothing of a block
is replaced but the device and the precision.
"""

import contextlib
import copy
import importlib
import logging
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, common_options, make_teacher, sd_options
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcm.models import lora as lcm_lora
from lcm.models import lora_files, networks
from lcm.models.loading import DTYPE

DOCUMENT = (ROOT / "docs" / "inference.md").read_text()
ON_CPU = [('"cuda"', '"cpu"'), ("torch.float16", "torch.float32")]
PICTURE = "lighthouse.png"  # what every block writes
EXPECTED = (
    "No LoRA keys associated to CLIPTextModel",  # of every LoRA that leaves the text encoders alone
    "Already found a `peft_config` attribute",  # of a second LoRA
    "The following part of your input was truncated because CLIP can only handle sequences up to 16",  # ours only
    "Pipelines loaded with `dtype=torch.float16` cannot run with `cpu` device",  # they can
    "There are modules in AutoencoderKL that should be kept in float32: []",  # with the next one, of SDXL in float16:
    "`upcast_vae` is deprecated",  # the pipeline's own call
)

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
STYLE = "TheLastBen/Papercut_SDXL"
FULL_OPTIONS = ["--ema_decay=0.5", "--checkpointing_steps=2"]
LORA_OPTIONS = ["--lora_rank=4", "--lora_alpha=8", "--learning_rate=1e-2", "--checkpointing_steps=2"]
UNGUIDED = ["--w_min=0", "--w_max=0", "--proportion_empty_prompts=0.1"]
# Output folder: script, base model, options. One LoRA with a moving average and one without.
RUNS = {
    "lcm-sd15": ("sd", SD15, FULL_OPTIONS),
    "lcm-sdxl": ("sdxl", SDXL, FULL_OPTIONS),
    "lcm-lora-sd15": ("lora_sd", SD15, LORA_OPTIONS),
    "lcm-lora-sdxl": ("lora_sdxl", SDXL, [*LORA_OPTIONS, "--ema_decay=0.5"]),
    "phased-sd15": ("sd", SD15, [*FULL_OPTIONS, "--target=phased"]),
    "trajectory-lora-sd15": ("lora_sd", SD15, [*LORA_OPTIONS, "--target=trajectory"]),
    "unguided-sd15": ("sd", SD15, [*FULL_OPTIONS, *UNGUIDED]),
}


def code_blocks(text):
    """(heading above it, language, code) of every fenced block, in order."""
    blocks, heading, language, code = [], None, None, []
    for line in text.splitlines():
        if line.startswith("```") and language is None:
            language, code = line[3:], []
        elif line.startswith("```"):
            blocks.append((heading, language, "\n".join(code) + "\n"))
            language = None
        elif language is not None:
            code.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return blocks


RECIPES = {heading: code for heading, _, code in code_blocks(DOCUMENT)}


# What the blocks find in their folder.


def random_picture(seed):
    """Four large areas of random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)).resize((16, 16), 0)


def write_style_lora(base, folder):
    """A LoRA of the attention layers, with random weights, as diffusers' own training scripts save theirs."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    targets = ["to_k", "to_out.0", "to_q", "to_v"]
    torch.manual_seed(7)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), "style")
    StableDiffusionXLPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="style"),
        unet_lora_adapter_metadata={"r": 2, "lora_alpha": 2, "target_modules": targets, "rank_pattern": {}},
        weight_name="papercut.safetensors",
    )


def write_controlnet(base, folder):
    """A ControlNet for 16x16 pictures whose output layers, zero in a new one, are random."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(8)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    for layer in (
        controlnet.controlnet_cond_embedding.conv_out,
        *controlnet.controlnet_down_blocks,
        controlnet.controlnet_mid_block,
    ):
        torch.nn.init.normal_(layer.weight, std=0.3)
    controlnet.save_pretrained(folder)


def write_t2i_adapter(folder):
    """A T2I-Adapter with the widths of the tiny U-Net."""
    from diffusers import T2IAdapter

    torch.manual_seed(9)
    adapter = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    adapter.save_pretrained(folder)


def write_fp16_variant(base):
    """Beside a pipeline's float32 files, as in SDXL's repository."""
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(base).to(torch.float16).save_pretrained(base, variant="fp16")


def push(trained, output_dir, repository):
    """Copy what `--push_to_hub` uploads, in the layout it gets there."""
    files = {**trained.pushed_files(output_dir), "scheduler/scheduler_config.json": None}
    for name, source in files.items():
        target = repository / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source or output_dir / name, target)


def train(name, home, shards, patch):
    """Run the script of one entry of RUNS; returns its networks as they were exported."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    script, base, more = RUNS[name]
    kind = networks.Lora if "lora" in script else networks.WholeUNet
    export, exported = kind.export, []

    def export_and_keep(self, folder):
        exported.append(self)
        export(self, folder)

    patch.setattr(kind, "export", export_and_keep)
    options = common_options if "lora" in script or more[-3:] == UNGUIDED else sd_options  # which names an input for w
    importlib.import_module(f"train_lcm_distill_{script}_wds").main(options(home / base, shards, home / name, *more))
    (home / name / "checkpoint-2").rename(home / name / "checkpoint-500")
    return exported[0]


class Home:
    """The folder in which the blocks run. `trained` maps output folders to what they were written from."""

    def __init__(self, path, trained):
        self.path, self.trained, self.pictures = path, trained, {}

    def execute(self, heading, *changes, replaced=ON_CPU):
        """Run a block, with (old, new) replacements; returns its variables. It must not complain, and draw 16x16."""
        code = RECIPES[heading]
        for old, new in (*replaced, *changes):
            assert old in code, f"{old!r} is not in the block under {heading!r}"
            code = code.replace(old, new)
        code = re.sub(r"\bdtype=", f"{DTYPE}=", code)
        variables = {}
        with contextlib.chdir(self.path), complaints() as found:
            exec(compile(code, heading, "exec"), variables)
        assert found == []
        assert variables["image"].size == (16, 16)
        return variables

    def draw(self, heading, *changes):
        """The file that a block writes, as an array; each is drawn once."""
        if (heading, changes) not in self.pictures:
            self.execute(heading, *changes)
            self.pictures[heading, changes] = np.asarray(Image.open(self.path / PICTURE)).astype(int)
            (self.path / PICTURE).unlink()
        return self.pictures[heading, changes]


@contextlib.contextmanager
def complaints():
    """Yield a list of what diffusers, transformers and peft warn of while the block runs, but for EXPECTED."""
    import diffusers

    found = []

    class Listener(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    listener, verbosity = Listener(logging.WARNING), diffusers.utils.logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    diffusers.utils.logging.set_verbosity_warning()
    for logger in loggers:
        logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            yield found
        found += [str(warning.message) for warning in recorded]
        found[:] = [message for message in found if not message.startswith(EXPECTED)]
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
        diffusers.utils.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def home(teacher, sdxl_teacher, shards, tmp_path_factory):
    """A folder with everything that the document names, trained or made at random."""
    path = tmp_path_factory.mktemp("home")
    shutil.copytree(teacher, path / SD15)
    shutil.copytree(sdxl_teacher, path / SDXL)
    write_fp16_variant(path / SDXL)
    make_teacher(path / "Lykon" / "dreamshaper-7", seed=1)
    write_controlnet(teacher, path / "lllyasviel" / "sd-controlnet-canny")
    write_t2i_adapter(path / "TencentARC" / "t2i-adapter-canny-sdxl-1.0")
    write_style_lora(sdxl_teacher, path / STYLE)
    for seed, name in enumerate(["sketch.png", "edges.png", "other.png"]):
        random_picture(seed).save(path / name)
    with pytest.MonkeyPatch.context() as patch:
        trained = {}
        for name in RUNS:
            with patch.context() as one:
                trained[name] = train(name, path, shards, one)
    for name in ("lcm-sdxl", "lcm-lora-sd15"):
        push(trained[name], path / name, path / "your-name" / name)
    return Home(path, trained)


# Every block runs and does what it is for.


SCALE_8, SCALE_1 = "guidance_scale=8", "guidance_scale=1,"
NEGATIVE = "negative_prompt='people'"
NO_LORA_SD15 = ('pipeline.load_lora_weights("lcm-lora-sd15")\n', "")
NO_LORA_SDXL = ('pipeline.load_lora_weights("lcm-lora-sdxl")\n', "")
NO_STYLE = (f'pipeline.load_lora_weights("{STYLE}", weight_name="papercut.safetensors")\n', "")
NO_SCHEDULER = ('pipeline.scheduler = LCMScheduler.from_pretrained("lcm-lora-sdxl", subfolder="scheduler")\n', "")
OTHER_EDGES = ("edges.png", "other.png")

# Heading, what is changed in its block, whether the picture then is another one.
EFFECTS = [
    ("Text to image, Stable Diffusion 1.5", (SCALE_8, "guidance_scale=14"), True),
    ("Text to image, Stable Diffusion 1.5", (SCALE_8, f"{SCALE_8}, {NEGATIVE}"), False),
    ("Text to image, Stable Diffusion 1.5", ("manual_seed(0)", "manual_seed(1)"), True),
    ("Text to image, Stable Diffusion 1.5", ("scheduler=scheduler, ", ""), True),
    ("Text to image, SDXL", (SCALE_8, "guidance_scale=14"), True),
    ("Text to image, SDXL", (SCALE_8, f"{SCALE_8}, {NEGATIVE}"), False),
    ("Image to image", ("sketch.png", "other.png"), True),
    ("Image to image", ("strength=0.5", "strength=0.75"), True),
    ("Image to image", (SCALE_8, "guidance_scale=14"), True),
    ("Image to image", (SCALE_8, f"{SCALE_8}, {NEGATIVE}"), False),
    ("ControlNet", OTHER_EDGES, True),
    ("ControlNet", ("conditioning_scale=0.8", "conditioning_scale=0.2"), True),
    ("ControlNet", (SCALE_8, "guidance_scale=14"), True),
    ("ControlNet", (SCALE_8, f"{SCALE_8}, {NEGATIVE}"), False),
    ("T2I-Adapter", OTHER_EDGES, True),
    ("T2I-Adapter", ("conditioning_scale=0.8", "conditioning_scale=0.2"), True),
    ("T2I-Adapter", (SCALE_8, "guidance_scale=14"), True),
    ("T2I-Adapter", (SCALE_8, f"{SCALE_8}, {NEGATIVE}"), False),
    ("A style LoRA on a whole model", NO_STYLE, True),
    ("A style LoRA on a whole model", (SCALE_8, "guidance_scale=14"), True),
    ("A style LoRA on a whole model", (SCALE_8, f"{SCALE_8}, {NEGATIVE}"), False),
    ("An LCM-LoRA on its base", NO_LORA_SDXL, True),
    ("An LCM-LoRA on its base", (SCALE_1, f"{SCALE_1} {NEGATIVE},"), False),
    ("An LCM-LoRA on its base", NO_SCHEDULER, True),
    ("An LCM-LoRA on a fine-tune of its base", NO_LORA_SD15, True),
    ("An LCM-LoRA on a fine-tune of its base", ("Lykon/dreamshaper-7", SD15), True),
    ("An LCM-LoRA and a style LoRA", ("[1.0, 0.8]", "[1.0, 0.0]"), True),
    ("An LCM-LoRA and a style LoRA", ("[1.0, 0.8]", "[0.0, 0.8]"), True),
    ("An LCM-LoRA and a style LoRA", ("[1.0, 0.8]", "[1.0, 0.4]"), True),
    ("A negative prompt", ('negative_prompt="people, boats"', 'negative_prompt=""'), True),
    ("A negative prompt", NO_LORA_SD15, True),
    ("ControlNet with an LCM-LoRA", OTHER_EDGES, True),
    ("ControlNet with an LCM-LoRA", ("conditioning_scale=0.8", "conditioning_scale=0.2"), True),
    ("ControlNet with an LCM-LoRA", NO_LORA_SD15, True),
    ("A whole model of `--target phased`", (SCALE_8, "guidance_scale=14"), True),
    ("A whole model of `--target phased`", ("scheduler=scheduler, ", ""), True),
    ("A whole model of `--target phased`", ('"phased-sd15", subfolder="unet', '"lcm-sd15", subfolder="unet'), True),
    ("A LoRA of `--target trajectory`", ("eta=0.3", "eta=0.9"), True),
    ("A LoRA of `--target trajectory`", ('pipeline.load_lora_weights("trajectory-lora-sd15")\n', ""), True),
    ("A whole model of `--w_max 0`", ("guidance_scale=4", "guidance_scale=8"), True),
    ("A whole model of `--w_max 0`", ('negative_prompt="people, boats"', 'negative_prompt=""'), True),
    ("From a checkpoint of a whole model", ("checkpoint-500", "checkpoint-4"), True),
    ("From a checkpoint of an LCM-LoRA", ("checkpoint-500", "checkpoint-4"), True),
    ("A whole model from the Hub", (SCALE_8, "guidance_scale=14"), True),
    ("An LCM-LoRA from the Hub", ('pipeline.load_lora_weights("your-name/lcm-lora-sd15")\n', ""), True),
]


def difference(a, b):
    """The largest one between two pictures, in steps of 1/255."""
    return abs(a - b).max()


def share_that_differs(a, b):
    """Of all values of two pictures. An effect moves most of them, rounding hardly any."""
    return np.mean(a != b)


def test_every_heading_has_one_block_at_most_and_every_block_a_test():
    blocks = code_blocks(DOCUMENT)
    assert len(blocks) == DOCUMENT.count("```") / 2 == len(RECIPES)
    assert {language for _, language, _ in blocks} == {"python"}
    assert {heading for heading, *_ in EFFECTS} == RECIPES.keys()


@pytest.mark.parametrize("heading", RECIPES)
def test_block_runs_without_a_warning(home, heading):
    """`Home.execute` checks the size and that nothing is reported missing, unexpected or deprecated."""
    assert home.draw(heading).std() > 1


def test_weights_that_fit_in_part_would_be_noticed(home, tmp_path):
    """The loader only warns of them, and goes on."""
    rewrite_lora(home.path / "lcm-lora-sd15", tmp_path, lambda key, tensor: (key.replace("to_q", "to_x"), tensor))
    load = "pipeline.load_lora_weights("
    with pytest.raises(AssertionError, match="unexpected keys"):
        home.execute("An LCM-LoRA on a fine-tune of its base", (f'{load}"lcm-lora-sd15"', f"{load}{str(tmp_path)!r}"))


@pytest.mark.parametrize("heading", RECIPES)
def test_block_runs_in_half_precision(home, heading):
    """All parts get the same dtype; float16 works on a CPU too, slowly."""
    assert np.asarray(home.execute(heading, replaced=ON_CPU[:1])["image"]).std() > 1


@pytest.mark.cuda
@pytest.mark.parametrize("heading", RECIPES)
def test_block_runs_as_written_on_a_gpu(home, heading):
    assert np.asarray(home.execute(heading, replaced=[])["image"]).std() > 1


@pytest.mark.parametrize("heading, change, differs", EFFECTS)
def test_effect(home, heading, change, differs):
    """What a block adds shows in the picture; what has no effect leaves every pixel as it is."""
    found = share_that_differs(home.draw(heading), home.draw(heading, change))
    assert found > 0.1 if differs else found == 0


def test_negative_prompt_of_a_lora_needs_guidance(home):
    """At 1 it has no effect; the picture is that of no guidance."""
    at_one = ("guidance_scale=1.5", "guidance_scale=1.0")
    pictures = [
        home.draw("A negative prompt", at_one, ('negative_prompt="people, boats"', f'negative_prompt="{negative}"'))
        for negative in ("people, boats", "")
    ]
    assert difference(*pictures) == 0
    assert share_that_differs(pictures[0], home.draw("A negative prompt")) > 0.1


# Things that are the same.


ALL_IN_FLOAT32 = (', variant="fp16"', "")
FOR_SD15 = [("lcm-lora-sdxl", "lcm-lora-sd15"), (SDXL, SD15), ALL_IN_FLOAT32]
OF_OUTPUT = {
    "lcm-sd15": ("Text to image, Stable Diffusion 1.5", [ALL_IN_FLOAT32]),
    "lcm-sdxl": ("Text to image, SDXL", [ALL_IN_FLOAT32]),
    "lcm-lora-sd15": ("An LCM-LoRA on its base", FOR_SD15),
    "lcm-lora-sdxl": ("An LCM-LoRA on its base", [ALL_IN_FLOAT32]),
}


def latents(variables, unet=None):
    """What a block's pipeline, or that with another U-Net, makes of the prompt before the VAE.

    A copy of the U-Net is used: loaded weights lie in memory as they do in the file, and where they are not aligned
    the same product is rounded differently.
    """
    pipeline = variables["pipeline"]
    scale = 8 if pipeline.unet.config.time_cond_proj_dim else 1
    generator = torch.manual_seed(3)
    pipeline.unet = copy.deepcopy(unet or pipeline.unet).to("cpu").eval()
    return pipeline(
        variables["prompt"], num_inference_steps=4, guidance_scale=scale, generator=generator, output_type="latent"
    ).images


@pytest.mark.parametrize("name", OF_OUTPUT)
def test_loaded_weights_are_the_trained_ones(home, name):
    """Bit for bit the latents of the network in memory. For LoRAs: alpha is not the rank, convolutions are adapted."""
    heading, changes = OF_OUTPUT[name]
    trained, variables = home.trained[name], home.execute(heading, *changes)
    loaded = latents(variables)
    if name.startswith("lcm-lora"):
        config = trained.unet.peft_config[trained.exported]
        assert (config.r, config.lora_alpha) == (4, 8) and "conv1" in config.target_modules
        weights = lora_files.adapter_weights(trained.unet, trained.exported)
        assert min(tensor.abs().max() for key, tensor in weights.items() if "lora_B" in key) > 1e-4
        with lcm_lora.AdapterView(trained.unet, trained.exported).active() as unet:
            assert torch.equal(loaded, latents(variables, unet))
    else:
        assert torch.equal(loaded, latents(variables, trained.target))


def rewrite_lora(source, target, change):
    """Copy a folder's LoRA for diffusers and its metadata; `change` maps each (key, tensor) to another."""
    path = source / lora_files.DIFFUSERS_FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = dict(change(key, tensor) for key, tensor in load_file(path).items())
    save_file(tensors, target / lora_files.DIFFUSERS_FILE, metadata)


@pytest.mark.parametrize("name", ["lcm-lora-sd15", "lcm-lora-sdxl"])
def test_file_for_comfyui_draws_the_same(home, name, tmp_path):
    """It is float16: the same latents as diffusers' file rounded to that, nearly the same picture as the exact one."""
    heading, changes = OF_OUTPUT[name]
    load = f'load_lora_weights("{name}")'
    kohya = (load, f'load_lora_weights("{name}", weight_name="lcm_lora_kohya.safetensors")')
    assert kohya[1].replace(name, "lcm-lora-sd15") in DOCUMENT
    assert difference(home.draw(heading, *changes), home.draw(heading, *changes, kohya)) <= 2

    rewrite_lora(home.path / name, tmp_path, lambda key, tensor: (key, tensor.half().float()))
    of_rounded = home.execute(heading, *changes, (load, f"load_lora_weights({str(tmp_path)!r})"))
    of_kohya = home.execute(heading, *changes, kohya)
    assert torch.equal(latents(of_rounded), latents(of_kohya))


@pytest.mark.parametrize("name, checkpoint", [
    ("lcm-sd15", "From a checkpoint of a whole model"), ("lcm-lora-sd15", "From a checkpoint of an LCM-LoRA"),
])  # fmt: skip
def test_last_checkpoint_is_the_output(home, name, checkpoint):
    heading, changes = OF_OUTPUT[name]
    last = home.draw(checkpoint, ("checkpoint-500", "checkpoint-4"))
    assert difference(last, home.draw(heading, *changes)) <= 1
    assert not list((home.path / name / "checkpoint-4").rglob("*fp16*"))
    assert not list((home.path / name / "checkpoint-4").rglob(lora_files.KOHYA_FILE))


def test_hub_layout_gives_the_picture_of_the_output(home):
    whole = home.draw("A whole model from the Hub")
    assert difference(whole, home.draw("Text to image, SDXL")) == 0
    lora = home.draw("An LCM-LoRA from the Hub")
    assert difference(lora, home.draw("An LCM-LoRA on its base", *FOR_SD15)) == 0


def test_style_at_zero_is_the_lcm_lora_alone(home):
    both, prompt = "An LCM-LoRA and a style LoRA", ("papercut, a lighthouse on a cliff", "a lighthouse")
    alone = home.draw("An LCM-LoRA on its base", ("a lighthouse on a cliff at dusk, watercolour", "a lighthouse"))
    assert difference(home.draw(both, prompt, ("[1.0, 0.8]", "[1.0, 0.0]")), alone) <= 1


# What the document says in words.


def rows_of_the_unet(variables, **more):
    """How many rows the U-Net is given in each step."""
    rows = []
    pipeline = variables["pipeline"]
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len((args or [kwargs["sample"]])[0])), with_kwargs=True
    )
    pipeline("a lighthouse", num_inference_steps=2, **more)
    hook.remove()
    return rows


def test_cost_of_guidance(home):
    """None for a whole model at any scale; a second pass for a LoRA above 1."""
    whole = home.execute("Text to image, SDXL")
    assert rows_of_the_unet(whole, guidance_scale=1) == rows_of_the_unet(whole, guidance_scale=16) == [1, 1]
    lora = home.execute("An LCM-LoRA on its base")
    assert rows_of_the_unet(lora, guidance_scale=1) == [1, 1]
    assert rows_of_the_unet(lora, guidance_scale=1.5) == [2, 2]


def test_strength_decides_how_many_steps_are_run(home):
    assert "4 of 8" in DOCUMENT
    assert home.execute("Image to image")["pipeline"].num_timesteps == 4


def test_defaults_are_as_the_document_says():
    for name, (script, *_) in RUNS.items():
        module = importlib.import_module(f"train_lcm_distill_{script}_wds")
        required = ["--pretrained_teacher_model=x", "--train_shards_path_or_url=x", "--max_train_steps=1"]
        args = module.parse_args([*required, "--report_to=none"])
        low, model = (6, "Stable Diffusion 1.5") if "sd15" in name else (4, "SDXL")
        assert (args.w_min + 1, args.w_max + 1) == (low, 16)
        assert f"{low} to 16" in DOCUMENT and model in DOCUMENT
        assert (args.num_ddim_timesteps, args.timestep_scaling_factor) == (50, 10)
        assert "a grid of 50 points" in DOCUMENT and "scaling of 10" in DOCUMENT


def test_both_networks_lie_there_in_both_precisions(home):
    for folder in ("unet", "unet_target"):
        names = {path.name for path in (home.path / "lcm-sd15" / folder).iterdir()}
        assert {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"} <= names


def test_scheduler_from_the_base_fits_the_defaults_only(home):
    """With a grid of 50 points and a scaling of 10, which were trained here, it draws the same picture."""
    from diffusers import LCMScheduler

    heading = "An LCM-LoRA on its base"
    saved = 'LCMScheduler.from_pretrained("lcm-lora-sdxl", subfolder="scheduler")'
    of_base = (saved, "LCMScheduler.from_config(pipeline.scheduler.config)")
    assert of_base[1] in DOCUMENT
    assert difference(home.draw(heading), home.draw(heading, of_base)) == 0
    scheduler = LCMScheduler.from_pretrained(home.path / "lcm-lora-sdxl", subfolder="scheduler")
    other = LCMScheduler.from_config({**scheduler.config, "original_inference_steps": 20})
    scheduler.set_timesteps(4)
    other.set_timesteps(4)
    assert scheduler.timesteps.tolist() != other.timesteps.tolist()


@pytest.mark.parametrize("heading, change, error", [
    ("Text to image, SDXL", ("num_inference_steps=4", "num_inference_steps=51"), ValueError),
    ("An LCM-LoRA on its base", ("num_inference_steps=4", "num_inference_steps=51"), ValueError),
    ("Image to image", ("strength=0.5", "strength=0.1"), (RuntimeError, ValueError, IndexError)),
    ("From a checkpoint of a whole model", ('"unet_target"', '"unet_target", variant="fp16"'), OSError),
])  # fmt: skip
def test_mistakes_that_are_refused(home, heading, change, error):
    with pytest.raises(error):
        home.execute(heading, change)


def test_without_set_adapters_the_last_one_works_alone(home):
    heading = "An LCM-LoRA and a style LoRA"
    call = 'set_adapters(["lcm", "style"], adapter_weights=[1.0, 0.8])'
    without, last = (home.draw(heading, (call, new)) for new in ("get_active_adapters()", 'set_adapters(["style"])'))
    assert difference(without, last) == 0
