"""evaluate_lcm.py: rows, measures and pictures against what diffusers, transformers, scipy and numpy say of the same.

Real runs on tiny teachers: what the pipelines drew is watched, and measured again by other means.
"""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, SCRIPTS, Script, encode_image, hub, make_tokenizer, make_vae, text_config, write_tar
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)
from PIL import Image

import evaluate_lcm
from lcm.evaluation import features as lcm_features
from lcm.evaluation import measures, sampling
from lcm.pictures.grid import picture_grid
from lcm_common import guidance_embedding

PROMPTS = ["a fox", "a cat and a star, night", "a tree, snow"]
GRID = 10  # points of the grid that was trained, unlike a new LCMScheduler's 50
METRICS = """
import torch


def features(images):
    return torch.cat([images.float().mean((2, 3)), images.float().std((2, 3))], dim=1)


class Network(torch.nn.Module):
    def forward(self, images):
        return features(images)


network = Network()


def extra(images, prompts):
    return {"brightness": images.float().mean(), "words": sum(len(prompt.split()) for prompt in prompts)}


def broken(images, *prompts):
    raise ValueError("no such luck")


def flat(images):
    return images.float().mean((1, 2, 3))


def no_number(images, prompts):
    return {"word": "many"}


def not_finite(images, prompts):
    return {"ratio": float("nan")}


number = 3
"""


# Models, and a run of the command.


@dataclass
class Home:
    """A folder with what the tests evaluate: four outputs of the training scripts, a CLIP model, metrics.py."""

    path: Path
    teachers: dict  # "sd" and "sdxl" to their folders

    def __truediv__(self, name):
        return str(self.path / name)


def make_clip(folder):
    """A random CLIP model with tokenizer and picture processor, for pictures of 12 x 12 pixels."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    from lcm.evaluation.features import CLIPImageProcessorPil

    torch.manual_seed(5)
    tokenizer = make_tokenizer()
    text = text_config(tokenizer).to_dict()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=12, patch_size=4
    ).to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}).save_pretrained(folder)


@pytest.fixture(scope="session")
def home(tmp_path_factory, teacher, sdxl_teacher, shards):
    path = tmp_path_factory.mktemp("evaluate")
    for name, own in SCRIPTS.items():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, own)
        script.main(path / name, "--max_train_steps=2", f"--num_ddim_timesteps={GRID}", "--checkpointing_steps=1")
    make_clip(path / "clip")
    (path / "metrics.py").write_text(METRICS)
    return Home(path, {"sd": str(teacher), "sdxl": str(sdxl_teacher)})


@pytest.fixture
def evaluate(home, tmp_path, capsys, caplog):
    """Run the command: `evaluate(option=value)` returns what it wrote, and what it drew as {"teacher, 3 steps": ...}.

    CLIP and features, which take time, are left out unless they are asked for.
    """
    usual = {
        "pretrained_teacher_model": home.teachers["sd"],
        "trained": f"LoRA={home / 'lora_sd'}",
        "output_dir": tmp_path / "out",
        "prompts": PROMPTS,
        "num_images": 4,
        "num_inference_steps": 2,
        "teacher_num_inference_steps": 3,
        "batch_size": 3,
        "clip_model": "none",
        "feature_network": "none",
        "seed": 3,
    }

    def call(on_gpu=False, **options):
        drawn, sample = {}, sampling.sample

        def watched(pipeline, prompts, noise, steps, scale, generator, batch_size, progress):
            images, seconds = sample(pipeline, prompts, noise, steps, scale, generator, batch_size, progress)
            drawn.setdefault(progress.desc.removesuffix(": "), SimpleNamespace(
                images=images, noise=noise, prompts=prompts, scale=scale, scheduler=pipeline.scheduler,
                dtype=pipeline.unet.dtype, adapters=len(getattr(pipeline.unet, "peft_config", {})),
            ))  # fmt: skip
            return images, seconds

        argv = []
        for name, value in {**usual, **options}.items():
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "sample", watched)
            if not on_gpu:
                patch.setattr(torch.cuda, "is_available", lambda: False)
            caplog.clear()
            capsys.readouterr()
            evaluate_lcm.main(argv)
        out = options.get("output_dir", usual["output_dir"])
        results = json.loads((out / "results.json").read_text())
        return SimpleNamespace(
            drawn=drawn, results=results, rows=results["rows"], readme=(out / "README.md").read_text(),
            printed=capsys.readouterr().out, log=caplog.text, grid=Image.open(out / "grid.png"),
        )  # fmt: skip

    return call


@pytest.fixture
def error(evaluate, capsys):
    """The one line on standard error, and the exit status, with which options are refused."""

    def call(**options):
        with pytest.raises(SystemExit) as exit_info:
            evaluate(**options)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--")]
        assert len(lines) == 1
        return lines[0], exit_info.value.code

    return call


def user_pipeline(home, name, folder=None):
    """The pipeline that the main README puts together with what a script wrote."""
    teacher, folder = home.teachers["sdxl" if "sdxl" in name else "sd"], folder or home / name
    scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    if "lora" not in name:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet_target")
        return DiffusionPipeline.from_pretrained(teacher, unet=unet, scheduler=scheduler)
    pipeline = DiffusionPipeline.from_pretrained(teacher, scheduler=scheduler)
    pipeline.load_lora_weights(folder)
    return pipeline


def draw(pipeline, one, steps, scale, seed=3):
    """The pictures (N, 3, H, W) of a pipeline, one by one, from the noise of a row that was drawn."""
    pictures = []
    for i, prompt in enumerate(one.prompts):
        generator = sampling.picture_generators(len(one.prompts), seed)[i]
        image = pipeline(
            prompt, num_inference_steps=steps, guidance_scale=scale, latents=one.noise[i : i + 1], generator=generator,
            height=16, width=16, output_type="np",
        ).images[0]  # fmt: skip
        pictures.append((image * 255).round().astype(np.uint8).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(pictures))


def difference(images, others):
    return (images.int() - others.int()).abs().max().item()


def drawn_rows(run):
    return {(row["network"], row["steps"]): row for row in run.rows}


# Rows, columns and files.


def test_rows_columns_and_files(evaluate, home):
    """Rows in the order in which the networks were given, though LoRAs are drawn first; everything that is written."""
    run = evaluate(
        trained=[f"whole U-Net={home / 'sd'}", home / "lora_sd"], num_inference_steps=[1, 2],
        clip_model=home / "clip", feature_network=f"{home / 'metrics.py'}:features",
        extra_metric=f"{home / 'metrics.py'}:extra",
    )  # fmt: skip
    settings = [(row["network"], row["steps"], row["sampler"], row["guidance_scale"]) for row in run.rows]
    assert settings == [
        ("teacher", 3, "ddim", 7.5), ("teacher", 1, "ddim-trailing", 7.5), ("teacher", 2, "ddim-trailing", 7.5),
        ("whole U-Net", 1, "lcm", 7.5), ("whole U-Net", 2, "lcm", 7.5),
        ("lora_sd", 1, "lcm", 1), ("lora_sd", 2, "lcm", 1),
    ]  # fmt: skip
    assert [name.split(",")[0] for name in run.drawn] == ["teacher"] * 3 + ["lora_sd"] * 2 + ["whole U-Net"] * 2
    headings = [
        "network", "steps", "sampler", "guidance", "s / image", "CLIP score",
        "Frechet distance to the teacher's 3 steps", "RMSE to teacher, 3 steps", "brightness", "words",
    ]  # fmt: skip
    table = [line for line in run.printed.splitlines() if line.startswith("|")]
    assert table[0] == "| " + " | ".join(headings) + " |" and len(table) == 2 + 7
    assert evaluate_lcm.as_markdown(run.results).splitlines() == table  # what was stored makes the table again
    assert "\n".join(table) in run.readme and "(grid.png)" in run.readme
    assert "\npython evaluate_lcm.py --pretrained_teacher_model " in run.readme
    assert all(f"- {line}\n" in run.readme for line in run.results["measured"])
    assert all(row["seconds"] > 0 and row["words"] == 2 + 6 + 3 + 2 for row in run.rows)
    images = run.drawn["lora_sd, 2 steps"].images
    assert drawn_rows(run)["lora_sd", 2]["brightness"] == pytest.approx(images.float().mean().item())

    counts = {1: "1 step", 2: "2 steps", 3: "3 steps"}
    columns = [run.drawn[f"{name}, {counts[steps]}"].images for name, steps, *_ in settings]
    pictures = [[Image.fromarray(column[i].permute(1, 2, 0).numpy()) for column in columns] for i in range(3)]
    labels = [f"{name}\n{counts[steps]}\n{sampler}\nguidance {scale:g}" for name, steps, sampler, scale in settings]
    expected = picture_grid(pictures, PROMPTS, labels, 96, group_gap=[1, 3, 5])
    assert run.grid.size == expected.size and np.array_equal(np.asarray(run.grid), np.asarray(expected))


def test_teacher_against_itself(evaluate):
    """With as many steps and the same sampler, a row's pictures are the very same; and not with other ones."""
    run = evaluate(teacher_scheduler="ddim", num_inference_steps=[2, 3])
    distances = {(row["network"], row["steps"]): row["teacher_rmse"] for row in run.rows}
    assert [row["teacher_rmse"] for row in run.rows if row["network"] == "teacher"][::2] == [0, 0]
    assert distances["teacher", 2] > 0 and distances["LoRA", 3] > 0


def test_shown_prompts_are_different_and_far_apart():
    prompts = [f"prompt {i}" for i in range(100)]
    assert evaluate_lcm.shown_prompts(prompts + prompts) == [0, 25, 50, 74, 99]
    assert evaluate_lcm.shown_prompts(["a", "a", "b", "a", "c"]) == [0, 2, 4]
    assert evaluate_lcm.shown_prompts(["a", "a"]) == [0]


# Networks are loaded and drawn from as users do it.


@pytest.mark.parametrize("name", SCRIPTS)
def test_pictures_are_those_of_the_readmes_code(evaluate, home, name):
    """With the run's own scheduler, grid and all; a LoRA of random B is not the teacher's U-Net."""
    kind = name.removeprefix("lora_")
    options = {"guidance_scale": 3, "lora_guidance_scale": 1.5, "pretrained_teacher_model": home.teachers[kind]}
    run = evaluate(trained=home / name, **options)
    scale = 1.5 if "lora" in name else 3
    one = run.drawn[f"{name}, 2 steps"]
    pipeline = user_pipeline(home, name)
    assert one.scheduler.config == pipeline.scheduler.config
    assert one.scheduler.config.original_inference_steps == GRID
    expected = draw(pipeline, one, 2, scale)
    assert difference(one.images, expected) <= 1  # in batches of 3, and one by one
    base = DiffusionPipeline.from_pretrained(home.teachers[kind], scheduler=pipeline.scheduler)
    assert difference(one.images, draw(base, one, 2, scale)) > 1
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    assert difference(run.drawn["teacher, 2 steps"].images, draw(base, one, 2, 3)) <= 1


def test_what_was_sampled_before_leaves_no_trace(evaluate, home):
    """The same LoRA and the same U-Net twice, each after another network: the same figures."""
    names = {"A": "lora_sd", "B": "sd", "C": "lora_sd", "D": "sd"}
    run = evaluate(trained=[f"{label}={home / name}" for label, name in names.items()])
    a, b, c, d = (run.drawn[f"{label}, 2 steps"].images for label in names)
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, b)
    assert [one.adapters for one in run.drawn.values()] == [0, 0, 1, 1, 0, 0]
    alone = evaluate(trained=home / "sd")
    assert torch.equal(run.drawn["teacher, 3 steps"].images, alone.drawn["teacher, 3 steps"].images)
    assert torch.equal(run.drawn["B, 2 steps"].images, alone.drawn["sd, 2 steps"].images)


def test_guidance_scale_is_an_input_of_a_whole_unet(evaluate, home, monkeypatch):
    seen, forward = [], UNet2DConditionModel.forward

    def watched(self, *args, timestep_cond=None, **kwargs):
        seen.append(timestep_cond)
        return forward(self, *args, timestep_cond=timestep_cond, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    evaluate(trained=home / "sd", guidance_scale=4, num_inference_steps=1)
    teacher, student = [cond for cond in seen if cond is None], [cond for cond in seen if cond is not None]
    assert len(teacher) > 0 and len(student) == 1 + 2  # a warm-up and two batches
    expected = guidance_embedding(torch.tensor([4.0 - 1]), 16)
    assert all(torch.allclose(cond, expected.expand(len(cond), -1), atol=1e-5) for cond in student)


@pytest.mark.parametrize("name", ["sd", "lora_sd"])
def test_checkpoints_and_single_folders(evaluate, home, name, tmp_path):
    """The last checkpoint of a run holds what its output folder holds; a U-Net's own folder has no scheduler."""
    trained = [f"run={home / name}", f"{home / name}/checkpoint-2", f"{home / name}/checkpoint-1"]
    if name == "sd":
        trained.append(f"{home / name}/unet_target")
    run = evaluate(trained=trained, num_inference_steps=1)
    images = [run.drawn[f"{label}, 1 step"].images for label in ("run", "checkpoint-2", "checkpoint-1")]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert ("has no scheduler/; a grid of 50 points is assumed" in run.log) == (name == "sd")
    if name == "sd":
        assert run.drawn["unet_target, 1 step"].scheduler.config.original_inference_steps == 50


def with_scheduler(home, kind, folder):
    """A copy of the trained LoRA whose scheduler/ is of another class."""
    shutil.copytree(home / "lora_sd", folder, ignore=shutil.ignore_patterns("checkpoint*", "logs"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": kind}))
    return folder


def test_the_scheduler_is_the_one_that_was_saved(evaluate, error, home, tmp_path):
    """Of another target it is a TCDScheduler; the pictures are those of the pipeline with it. Others are refused."""
    folder = with_scheduler(home, "TCDScheduler", tmp_path / "tcd")
    run = evaluate(trained=f"LoRA={folder}", num_images=2)
    assert [row["sampler"] for row in run.rows] == ["ddim", "ddim-trailing", "tcd"]
    one = run.drawn["LoRA, 2 steps"]
    assert type(one.scheduler) is TCDScheduler and one.scheduler.config.original_inference_steps == GRID
    pipeline = DiffusionPipeline.from_pretrained(home.teachers["sd"])
    pipeline.scheduler = TCDScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.load_lora_weights(folder)
    drawn = pipeline(
        PROMPTS[0], num_inference_steps=2, guidance_scale=1, latents=one.noise[:1], output_type="pt"
    ).images
    torch.testing.assert_close((drawn * 255).round(), one.images[:1].float(), rtol=0, atol=1)
    line, code = error(trained=str(with_scheduler(home, "EulerDiscreteScheduler", tmp_path / "euler")))
    assert line.endswith("has a scheduler EulerDiscreteScheduler; allowed: LCMScheduler, TCDScheduler") and code == 1


def test_from_the_hub(evaluate, home, tmp_path):
    """What `--push_to_hub` uploads: a U-Net in the root of its repository; downloads go to --cache_dir."""
    pushed = {"mine": {"unet_target": ""}, "mine-lora": {"pytorch_lora_weights.safetensors": ""}}
    with hub() as server:
        for repository, (source, part) in {"mine": ("sd", "unet_target"), "mine-lora": ("lora_sd", "")}.items():
            folder = tmp_path / repository
            shutil.copytree(f"{home / source}/{part}", folder, ignore=shutil.ignore_patterns("checkpoint*", "logs"))
            shutil.copytree(f"{home / source}/scheduler", folder / "scheduler", dirs_exist_ok=True)
            huggingface_hub.create_repo(repository, token=server.token)
            huggingface_hub.upload_folder(repo_id=f"tester/{repository}", folder_path=folder, token=server.token)
            shutil.rmtree(folder)
        run = evaluate(trained=[f"tester/{name}" for name in pushed], cache_dir=tmp_path / "cache")
    local = evaluate(trained=[f"mine={home / 'sd'}", f"mine-lora={home / 'lora_sd'}"])
    for name in pushed:
        assert torch.equal(run.drawn[f"{name}, 2 steps"].images, local.drawn[f"{name}, 2 steps"].images)
        assert (tmp_path / "cache" / f"models--tester--{name}").is_dir()


# Noise.


def test_noise_is_a_function_of_seed_and_number(evaluate, home):
    """Whatever the batch size and the number of pictures; LCM's noise between the steps, too."""
    trained = [home / "lora_sd", home / "sd"]
    run, other = evaluate(trained=trained), evaluate(trained=trained, batch_size=2, num_images=3)
    for name, one in run.drawn.items():
        assert torch.equal(one.noise[:3], other.drawn[name].noise)
        assert difference(one.images[:3], other.drawn[name].images) <= 1
        assert difference(one.images[0], one.images[3]) > 1  # the same prompt, other noise
        assert one.prompts == [*PROMPTS, PROMPTS[0]]
    other = evaluate(trained=trained, seed=4)
    assert difference(run.drawn["sd, 2 steps"].images, other.drawn["sd, 2 steps"].images) > 1
    states = [generator.initial_seed() for seed in (3, 4) for generator in sampling.picture_generators(50, seed)]
    assert len(set(states)) == 100


# Measures.


def frechet(features, others):
    """The formula, with scipy's matrix root."""
    features, others = features.double().numpy(), others.double().numpy()
    mean = features.mean(0) - others.mean(0)
    a, b = np.cov(features.T), np.cov(others.T)
    return mean @ mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


def mean_and_std(images):
    images = images.float()
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def test_measures(evaluate, home):
    """Every figure against another computation of it; `module:name` and a torch module give the same."""
    options = {"num_images": 20, "prompts": PROMPTS[:2], "extra_metric": f"{home / 'metrics.py'}:extra"}
    run = evaluate(clip_model=home / "clip", feature_network=f"{home / 'metrics.py'}:network", **options)
    teacher = run.drawn["teacher, 3 steps"].images
    for (network, steps), row in drawn_rows(run).items():
        images = run.drawn[f"{network}, {steps} steps"].images
        expected = np.sqrt(np.mean((images.numpy() / 255 - teacher.numpy() / 255) ** 2))
        assert row["teacher_rmse"] == pytest.approx(expected, rel=1e-6)
        expected = frechet(mean_and_std(images), mean_and_std(teacher))
        assert row["frechet_distance"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert drawn_rows(run)["LoRA", 2]["frechet_distance"] > 1 > abs(drawn_rows(run)["teacher", 3]["frechet_distance"])
    assert "20 pictures for 6 features" not in run.log
    assert "in the 6 features of" in run.readme


def test_clip(evaluate, home):
    """Score and features against transformers' own processor and forward pass."""
    from transformers import CLIPModel, CLIPProcessor

    run = evaluate(clip_model=home / "clip", feature_network="clip", num_images=16, dtype="bfloat16")
    model, processor = CLIPModel.from_pretrained(home / "clip"), CLIPProcessor.from_pretrained(home / "clip")
    features = {}
    for row in run.rows:
        one = run.drawn[f"{row['network']}, {row['steps']} steps"]
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in one.images]
        with torch.no_grad():
            inputs = processor(text=one.prompts, images=pictures, return_tensors="pt", padding=True)
            out, pooled = model(**inputs), model.vision_model(inputs["pixel_values"]).pooler_output
            features[row["network"], row["steps"]] = model.visual_projection(pooled)
        expected = 100 * (out.image_embeds * out.text_embeds).sum(1).mean().item()
        assert row["clip_score"] == pytest.approx(expected, abs=1e-3)
    expected = frechet(features["LoRA", 2], features["teacher", 3])
    assert drawn_rows(run)["LoRA", 2]["frechet_distance"] == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert len({round(row["clip_score"], 3) for row in run.rows}) == 3


def test_long_prompts_and_not_a_number(evaluate, home):
    """The former are cut to what CLIP takes; the latter is null in JSON."""
    options = {"clip_model": home / "clip", "extra_metric": f"{home / 'metrics.py'}:not_finite"}
    run = evaluate(prompts=" ".join(["word"] * 200), num_inference_steps=1, **options)
    assert all(-100 <= row["clip_score"] <= 100 for row in run.rows)
    assert [row["ratio"] for row in run.rows] == [None] * 3 and "| none |" in run.readme


def test_frechet_distance_is_scipys():
    torch.manual_seed(0)
    features, others = torch.randn(300, 8) @ torch.randn(8, 8), 1 + 2 * torch.randn(400, 8)
    expected = frechet(features, others)
    assert measures.frechet_distance(features, others) == pytest.approx(expected, rel=1e-5)
    assert measures.frechet_distance(others, features) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """The same seven pictures, 24 x 20, as a folder and as a shard; and their middles at 16 x 16 as tensors."""
    path, rng, members = tmp_path_factory.mktemp("references"), np.random.default_rng(0), []
    (path / "pictures" / "more").mkdir(parents=True)
    for i in range(7):
        data = encode_image(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8) // (1 + i))
        (path / "pictures" / ("more" if i % 2 else "") / f"{i}.png").write_bytes(data)
        members.append((f"{i}.png", data))
    (path / "pictures" / "notes.txt").write_text("no picture")
    (path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    write_tar(path / "other.tar", [("x.txt", b"a caption"), ("y.png", b"broken"), *members])
    pictures = [Image.open(io.BytesIO(data)).resize((19, 16), Image.Resampling.BILINEAR) for _, data in members]
    return path, torch.from_numpy(np.stack([np.asarray(p)[:, 1:17].transpose(2, 0, 1) for p in pictures]))


def test_references(evaluate, home, references):
    """A folder and shards of the same pictures: the same distance, which is that to their middles."""
    path, pictures = references
    network = f"{home / 'metrics.py'}:features"
    distances = {}
    for source in ("pictures", "other.tar"):
        run = evaluate(reference_images=path / source, feature_network=network, num_inference_steps=1)
        distances[source] = [row["frechet_distance"] for row in run.rows]
        assert f"| Frechet distance to 7 pictures of {source} |" in run.printed
        assert "1 x picture unreadable" in run.log and ("1 x no picture" in run.log) == (source == "other.tar")
    assert distances["other.tar"] == pytest.approx(distances["pictures"], rel=1e-5)
    for row, distance in zip(run.rows, distances["other.tar"], strict=True):
        images = run.drawn[f"{row['network']}, {row['steps']} step{'s' * (row['steps'] > 1)}"].images
        assert distance == pytest.approx(frechet(mean_and_std(images), mean_and_std(pictures)), rel=1e-4)
    assert "--num_images: 4 pictures for 6 features" in run.log
    options = {"num_reference_images": 5, "teacher_num_inference_steps": 1, "num_inference_steps": 1}
    run = evaluate(reference_images=path / "other.tar", feature_network=network, **options)
    assert "to 5 pictures of" in run.printed
    expected = frechet(mean_and_std(run.drawn["LoRA, 1 step"].images), mean_and_std(pictures[:5]))
    assert run.rows[-1]["frechet_distance"] == pytest.approx(expected, rel=1e-4)


def test_inception_is_torchmetrics(monkeypatch):
    """Its weights cannot be had here, so that the network is a stand-in."""
    import torchmetrics.image.fid

    asked = []

    class Metric:
        def __init__(self, feature):
            asked.append(feature)
            self.inception = torch.nn.Flatten()

    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", Metric)
    network = lcm_features.load_feature_network("inception", None, torch.device("cpu"))
    assert network(torch.zeros(2, 3, 4, 4)).shape == (2, 48) and asked == [2048]


# Options.


@pytest.mark.cuda
def test_gpu(evaluate, home):
    """float16 unless another dtype is asked for; float32 draws what the CPU draws, whatever noise it takes."""
    options = {"trained": [home / "sd", home / "lora_sd"], "clip_model": home / "clip", "feature_network": "clip"}
    cpu, gpu = evaluate(**options), evaluate(on_gpu=True, dtype="float32", **options)
    for name, one in gpu.drawn.items():
        assert difference(one.images, cpu.drawn[name].images) <= 2
    half = evaluate(on_gpu=True, **options)
    assert {one.dtype for one in half.drawn.values()} == {torch.float16}
    assert torch.cuda.get_device_name() in half.readme and all(row["seconds"] > 0 for row in half.rows)


def test_options_of_sampling(evaluate, home):
    run = evaluate(resolution=24, dtype="bfloat16", num_images=2, teacher_scheduler="own", prompts="one word")
    one = run.drawn["LoRA, 2 steps"]
    assert one.images.shape == (2, 3, 24, 24) and one.noise.shape == (2, 4, 12, 12) and one.dtype == torch.bfloat16
    assert [row["sampler"] for row in run.rows] == ["own", "own", "lcm"]
    assert run.drawn["teacher, 2 steps"].scheduler.config.timestep_spacing == "leading"
    assert "of 24 x 24 pixels" in run.readme and "bfloat16" in run.readme and one.prompts == ["one word"] * 2


def test_prompts_from_files(evaluate, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufefffirst, with a comma\n\n  second \n", encoding="utf-8")
    run = evaluate(
        prompts=["zeroth", tmp_path / "prompts.txt"], num_images=5, num_inference_steps=1,
        teacher_scheduler="euler-trailing",
    )  # fmt: skip
    expected = ["zeroth", "first, with a comma", "second", "zeroth", "first, with a comma"]
    assert run.drawn["teacher, 3 steps"].prompts == expected
    assert "of 3 prompts" in run.readme
    assert all(type(run.drawn[f"teacher, {n}"].scheduler) is EulerDiscreteScheduler for n in ("3 steps", "1 step"))


def test_options_of_the_teacher(evaluate, error, home, tmp_path, monkeypatch):
    """Another VAE, and a variant; where it comes from is handed on to the loader."""
    torch.manual_seed(8)
    make_vae().save_pretrained(tmp_path / "vae")
    usual, other = evaluate(), evaluate(pretrained_vae_model_name_or_path=tmp_path / "vae")
    assert difference(usual.drawn["LoRA, 2 steps"].images, other.drawn["LoRA, 2 steps"].images) > 1
    one = usual.drawn["teacher, 3 steps"]
    assert one.images.shape == (4, 3, 16, 16) and one.dtype == torch.float32
    assert type(one.scheduler) is DDIMScheduler and one.scheduler.config.timestep_spacing == "leading"
    DiffusionPipeline.from_pretrained(home.teachers["sd"]).to(torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    half = evaluate(pretrained_teacher_model=tmp_path / "half", variant="fp16")
    assert difference(usual.drawn["teacher, 3 steps"].images, half.drawn["teacher, 3 steps"].images) < 20
    asked = []

    def watched(cls, source, revision, cache_dir, **kwargs):
        asked.append((revision, cache_dir))
        raise OSError("not today")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(watched))
    for options in ({"teacher_revision": "v2", "revision": "v1", "cache_dir": tmp_path}, {"revision": "v1"}):
        line, code = error(**options)
        assert line.startswith("--pretrained_teacher_model: ") and line.endswith("not today") and code == 1
    assert asked == [("v2", str(tmp_path)), ("v1", None)]


def edited(source, folder, **changes):
    """A copy of a folder with a scheduler/, whose config says something else, and nothing where that is None."""
    path = shutil.copytree(source, folder) / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if "_class_name" in changes:  # what pipelines go by
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": ["diffusers", config["_class_name"]]}))
    return folder


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 999),
        ({"timestep_spacing": "linspace", "clip_sample": None}, 999),
        ({"timestep_spacing": None, "steps_offset": None, "clip_sample": True}, 981),  # as the pipeline corrects it
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": None, "thresholding": True}, 999),
    ],
)  # fmt: skip
def test_the_reference_row_steps_as_the_teachers_own_scheduler(evaluate, home, tmp_path, changes, first):
    """DDIM's spacing and offset are those that the teacher comes with; its clipping is not."""
    teacher = edited(home.teachers["sd"], tmp_path / "teacher", **changes)
    run = evaluate(pretrained_teacher_model=teacher, teacher_num_inference_steps=50, num_images=2)
    one = run.drawn["teacher, 50 steps"]
    assert type(one.scheduler) is DDIMScheduler and one.scheduler.timesteps[0] == first
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    own = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    pipeline.scheduler = DDIMScheduler.from_config(own, clip_sample=False, thresholding=False)
    assert difference(one.images, draw(pipeline, one, 50, 7.5)) <= 1


def test_nothing_that_is_sampled_clips_latents(evaluate, home, tmp_path):
    """Neither with the teacher's own scheduler nor with one that was saved with what was trained; and nothing is
    changed for the next row."""
    clipping = {"thresholding": True, "clip_sample": True}
    lora = edited(home / "lora_sdxl", tmp_path / "lora", **clipping)
    teacher = edited(home.teachers["sdxl"], tmp_path / "teacher", **clipping)
    usual = {"pretrained_teacher_model": home.teachers["sdxl"], "trained": f"LoRA={home / 'lora_sdxl'}"}
    for sampler in ("own", "ddim"):
        expected = evaluate(teacher_scheduler=sampler, **usual)
        run = evaluate(pretrained_teacher_model=teacher, trained=f"LoRA={lora}", teacher_scheduler=sampler)
        assert "clips latents" in run.log and "clips latents" not in expected.log
        assert all(torch.equal(one.images, expected.drawn[name].images) for name, one in run.drawn.items())
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    clipped = draw(pipeline, run.drawn["teacher, 3 steps"], 3, 7.5)
    assert difference(clipped, run.drawn["teacher, 3 steps"].images) > 1  # so the test could fail
    assert len({id(one.scheduler) for one in run.drawn.values()}) == len(run.drawn)


def test_a_teacher_without_betas(error, home, tmp_path):
    """Flow matching, which the training scripts refuse, too."""
    teacher = edited(home.teachers["sd"], tmp_path / "teacher", _class_name="FlowMatchEulerDiscreteScheduler")
    line, code = error(pretrained_teacher_model=teacher)
    assert line.startswith("--pretrained_teacher_model: ") and "has no betas" in line and code == 1


# Errors.


@pytest.mark.parametrize(
    ("options", "start", "says", "status"),
    [
        ({"trained": "{home}/clip"}, "--trained: ", "has _class_name = None; allowed: UNet2DConditionModel", 1),
        ({"trained": "{home}/sd/logs"}, "--trained: ", "neither a folder nor", 1),
        ({"trained": "{home}/sd/validation"}, "--trained: ", "holds neither pytorch_lora_weights.safetensors nor", 1),
        ({"trained": "{home}/sdxl"}, "--trained: ", "cross_attention_dim = 40; allowed: 16", 1),
        ({"trained": "{home}/lora_sdxl"}, "--trained: ", "does not fit the teacher: ", 1),
        ({"trained": ["x={home}/sd", "x={home}/lora_sd"]}, "--trained: ", "two networks are called 'x'", 2),
        ({"trained": "teacher={home}/sd"}, "--trained: ", "two networks are called 'teacher'", 2),
        ({"num_inference_steps": [1, 11]}, "--num_inference_steps: 11 given", "allowed: at most 10", 1),
        ({"num_inference_steps": 0}, "--num_inference_steps: ", "an integer from 1 to 1000", 2),
        ({"teacher_scheduler": "lcm"}, "--teacher_scheduler: ", "ddim-trailing", 2),
        ({"resolution": 20}, "--resolution: 20 given", "multiples of 8", 2),
        ({"prompts": "{home}/empty.txt"}, "--prompts: ", "has no prompts", 2),
        ({"prompts": "{home}/clip/model.safetensors"}, "--prompts: cannot read ", "UTF-8", 2),
        ({"trained": "={home}/sd"}, "--trained: ", "a label is empty", 2),
        ({"reference_images": "x", "feature_network": "none"}, "--reference_images: 'x' given", "compares nothing", 2),
        ({"prompts": "nofile.txt"}, "--prompts: 'nofile.txt' is not a file", "a text file", 2),
        ({"feature_network": "clip"}, "--feature_network: clip ", "--clip_model, which is none", 2),
        ({"feature_network": "dino"}, "--feature_network: 'dino' given", "FILE.py:NAME", 2),
        ({"feature_network": "inception"}, "--feature_network: inception given", "torch_fidelity is not installed", 2),
        ({"feature_network": "{home}/metrics.py:nothing"}, "--feature_network: cannot load", "nothing", 1),
        ({"feature_network": "no.such.module:f"}, "--feature_network: cannot load", "No module named", 1),
        ({"feature_network": "{home}/metrics.py:number"}, "--feature_network: ", "number' is not a function", 1),
        ({"feature_network": "{home}/metrics.py:flat"}, "--feature_network: ", "shape (2,); allowed: ", 1),
        ({"extra_metric": "accuracy"}, "--extra_metric: 'accuracy' given", "FILE.py:NAME", 2),
        ({"extra_metric": "{home}/metrics.py:broken"}, "--extra_metric: ", "ValueError: no such luck", 1),
        ({"extra_metric": "{home}/metrics.py:no_number"}, "--extra_metric: ", "could not convert", 1),
        ({"clip_model": "{home}/sd"}, "--clip_model: cannot load ", "sd", 1),
        ({"reference_images": "{home}/sd/validation/x.tar", "feature_network": "{home}/metrics.py:features"},
         "--reference_images: ", "matches no shard", 1),
        ({"reference_images": "{home}/empty", "feature_network": "{home}/metrics.py:features"},
         "--reference_images: ", "holds 0 usable pictures", 1),
        ({"pretrained_teacher_model": "{home}/clip"}, "--pretrained_teacher_model: cannot load ", "model_index", 1),
        ({"output_dir": "{home}/metrics.py"}, "--output_dir: ", "is a file", 2),
        ({"output_dir": "{home}/metrics.py/inside"}, "--output_dir: ", "Not a directory", 1),
    ],
)  # fmt: skip
def test_errors(error, home, options, start, says, status):
    (home.path / "empty").mkdir(exist_ok=True)
    (home.path / "empty.txt").write_text("\n \n")
    fill = lambda value: [fill(v) for v in value] if isinstance(value, list) else str(value).format(home=home.path)  # noqa: E731
    line, code = error(**{name: fill(value) for name, value in options.items()})
    assert line.startswith(start) and says in line and code == status, line


def test_out_of_memory_names_the_batch_size(error, monkeypatch):
    def sample(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nAnd more")

    monkeypatch.setattr(sampling, "sample", sample)
    assert error() == ("--batch_size: 3 given, but CUDA out of memory. Tried to allocate 3 GiB.", 1)


def test_help_needs_nothing_but_the_standard_library():
    command = [sys.executable, "-S", "-E", ROOT / "evaluate_lcm.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    options = re.findall(r"^  --(\w+)\b", done.stdout, re.MULTILINE)
    assert len(options) == len(set(options)) == 25
    for group in ("models", "what is compared", "sampling", "measures"):
        assert f"\n{group}:\n" in done.stdout
    code = "import sys, evaluate_lcm as e; e.parse_args(sys.argv[1:]); print(*sys.modules)"
    options = ["--pretrained_teacher_model=x", "--trained=y"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "numpy", "PIL", "torchmetrics"} & set(done.stdout.split())
