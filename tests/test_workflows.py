"""configs/comfyui/: workflows that ComfyUI opens, held against its node definitions and what the scripts write.

The facts are those of ComfyUI 0.3.64 (commit a125cd84b054a57729b5eecab930ca9408719832 of 2025-10-11): nodes.py,
comfy_extras/nodes_model_advanced.py, comfy/samplers.py. The files have the format of its editor, which opens them by
drag and drop.
"""

import importlib
import json
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

from lcm.models.comfyui import guidance_file, guidance_scales
from lcm.models.lora_files import KOHYA_FILE
from lcm.models.usage import Machine, lora_code, unet_code
from lcm.options.checks import default_guidance_scale

FOLDER = ROOT / "configs" / "comfyui"
WORKFLOWS = sorted(path.stem for path in FOLDER.iterdir())
DOCUMENT = (ROOT / "docs" / "inference.md").read_text()


def whole(low, high, step=1):
    return lambda value: isinstance(value, int) and low <= value <= high and (value - low) % step == 0


def number(low, high):
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def one_of(*names):
    return lambda value: value in names


def text(value):
    return isinstance(value, str)


def file(value):
    return text(value) and value.endswith(".safetensors")


# Of each node: its linked inputs, its widgets in the order in which the editor stores their values, its outputs. All
# of them are required. After a seed the editor stores what happens to it after a run.
NODES = {
    "CheckpointLoaderSimple": ({}, {"ckpt_name": file}, ["MODEL", "CLIP", "VAE"]),
    "UNETLoader": (
        {},
        {"unet_name": file, "weight_dtype": one_of("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")},
        ["MODEL"],
    ),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, {"lora_name": file, "strength_model": number(-100, 100)}, ["MODEL"]),
    "ModelSamplingDiscrete": (
        {"model": "MODEL"},
        {
            "sampling": one_of("eps", "v_prediction", "lcm", "x0", "img_to_img"),
            "zsnr": lambda value: isinstance(value, bool),
        },
        ["MODEL"],
    ),
    "CLIPTextEncode": ({"clip": "CLIP"}, {"text": text}, ["CONDITIONING"]),
    "EmptyLatentImage": (
        {},
        {"width": whole(16, 16384, 8), "height": whole(16, 16384, 8), "batch_size": whole(1, 4096)},
        ["LATENT"],
    ),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {
            "seed": whole(0, 2**64 - 1),
            "control_after_generate": one_of("fixed", "increment", "decrement", "randomize"),
            "steps": whole(1, 10000),
            "cfg": number(0, 100),
            "sampler_name": one_of("euler", "lcm"),  # of many
            "scheduler": one_of("simple", "sgm_uniform", "normal"),  # of many
            "denoise": number(0, 1),
        },
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, {}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE"}, {"filename_prefix": text}, []),
    "Note": ({}, {"text": text}, []),  # of the editor alone
}


@pytest.fixture(params=WORKFLOWS)
def name(request):
    return request.param


@pytest.fixture
def workflow(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def widgets(node):
    return dict(zip(NODES[node["type"]][1], node["widgets_values"], strict=True))


def one(workflow, kind):
    (node,) = (node for node in workflow["nodes"] if node["type"] == kind)
    return node


def source(workflow, node, name):
    """The node that an input is linked to, and which of its outputs."""
    (link,) = (slot["link"] for slot in node["inputs"] if slot["name"] == name)
    (row,) = (row for row in workflow["links"] if row[0] == link)
    return next(node for node in workflow["nodes"] if node["id"] == row[1]), row[2]


def arguments_of(name):
    """The options of the run that a workflow is for: those of the README."""
    module = importlib.import_module(f"train_lcm_distill_{name}_wds")
    return module.parse_args([f"--config={ROOT / 'configs' / f'readme_{name}.yaml'}"])


def test_there_is_one_for_each_script():
    assert sorted(path.stem.removeprefix("readme_") for path in ROOT.glob("configs/readme_*.yaml")) == WORKFLOWS


def test_nodes_are_as_comfyui_defines_them(workflow):
    for node in workflow["nodes"]:
        inputs, kinds, outputs = NODES[node["type"]]
        assert {slot["name"]: slot["type"] for slot in node["inputs"]} == inputs
        assert [slot["type"] for slot in node["outputs"]] == outputs
        for widget, value in widgets(node).items():
            assert kinds[widget](value), (node["type"], widget, value)
        assert node["mode"] == 0  # it is run


def test_links_are_consistent(workflow):
    """Each input is linked, both ends of a link know it, their types are the same, and there is no circle."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    numbers = [row[0] for row in workflow["links"]]
    assert len(set(numbers)) == len(numbers) and max(numbers) == workflow["last_link_id"]
    ends = {"inputs": [], "outputs": []}
    for number, first, output, second, entry, kind in workflow["links"]:
        start, end = nodes[first]["outputs"][output], nodes[second]["inputs"][entry]
        assert number in start["links"] and number == end["link"] and start["type"] == end["type"] == kind
    for node in nodes.values():
        ends["inputs"] += [slot["link"] for slot in node["inputs"]]
        ends["outputs"] += [link for slot in node["outputs"] for link in slot["links"]]
    assert sorted(ends["inputs"]) == sorted(ends["outputs"]) == sorted(numbers)
    order = list(TopologicalSorter({row[3]: {row[1]} for row in workflow["links"]}).static_order())
    assert order  # a circle raises


def test_files_are_those_that_the_script_writes(name, workflow):
    """And the path from them to the sampler: trained weights, then the sampling, then the sampler."""
    args, sampler = arguments_of(name), one(workflow, "KSampler")
    sampling, _ = source(workflow, sampler, "model")
    lora, _ = source(workflow, sampling, "model")
    network, _ = source(workflow, lora, "model")
    assert (sampling["type"], lora["type"]) == ("ModelSamplingDiscrete", "LoraLoaderModelOnly")
    file = KOHYA_FILE if "lora" in name else guidance_file(default_guidance_scale(args))
    assert widgets(lora) == {"lora_name": file, "strength_model": 1}
    if "lora" in name:
        assert network["type"] == "CheckpointLoaderSimple"
    else:
        assert default_guidance_scale(args) in guidance_scales(args)
        assert widgets(network) == {"unet_name": "diffusion_pytorch_model.fp16.safetensors", "weight_dtype": "default"}
    for part, kind, output in (("clip", "CLIPTextEncode", 1), ("vae", "VAEDecode", 2)):
        for node in (node for node in workflow["nodes"] if node["type"] == kind):
            found, slot = source(workflow, node, part)
            assert (found["type"], slot) == ("CheckpointLoaderSimple", output)
    assert file in widgets(one(workflow, "Note"))["text"]


def test_sampling_is_that_of_the_run(name, workflow):
    """Steps and guidance are those of the code that a run prints; sampler, grid and scaling those of the training."""
    args, sampler = arguments_of(name), widgets(one(workflow, "KSampler"))
    machine = Machine("cuda")
    code = (
        lora_code(args, "teacher", "lcm", machine)
        if "lora" in name
        else unet_code(args, "teacher", "lcm", "unet_target", machine)
    )
    steps, scale = re.search(r"num_inference_steps=(\d+), guidance_scale=([\d.]+)", code).groups()
    assert sampler["steps"] == int(steps) and "LCMScheduler" in code
    if "lora" in name:
        assert sampler["cfg"] == float(scale) == 1
    else:  # the scale is in the file; a CFG of 1 is one pass
        assert sampler["cfg"] == 1
        assert widgets(one(workflow, "LoraLoaderModelOnly"))["lora_name"] == guidance_file(float(scale))
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["denoise"]) == ("lcm", "sgm_uniform", 1)
    # ModelSamplingDiscrete's `lcm` has a grid of 50 points, sigma_data 0.5 and a scaling of 10.
    assert widgets(one(workflow, "ModelSamplingDiscrete")) == {"sampling": "lcm", "zsnr": False}
    assert (args.num_ddim_timesteps, args.timestep_scaling_factor) == (50, 10)
    latent = widgets(one(workflow, "EmptyLatentImage"))
    assert latent["width"] == latent["height"] == args.resolution


def test_the_document_names_them(name):
    assert f"../configs/comfyui/{name}.json" in DOCUMENT
