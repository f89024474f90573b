"""What only LoRA or only SDXL have among the options.

Seen in the watched runs of `test_option_effects.py`. The last test asks that no option of any script is left out.
"""

import json
import re

import numpy as np
import pytest
import test_option_effects as effects
import torch
from conftest import encode_image, make_sdxl_teacher, write_tar
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_option_effects import (
    ALL,
    COVERED,
    KOHYA_FILE,
    LORA,
    LORA_FILE,
    SCRIPTS,
    WATCHED,
    covers,
    same,
)

SDXL = ("sdxl", "lora_sdxl")
run, json_shard = effects.run, effects.json_shard
leave_nothing_behind = effects.leave_nothing_behind

# The layers that the public script adapts by default, as the contract lists them.
DEFAULT_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


# LoRA: what is computed.


def base_unet(run):
    """The teacher's U-Net, as the stock library loads it."""
    return UNet2DConditionModel.from_pretrained(run.teacher, subfolder="unet")


def merged(run, weights, scale):
    """The teacher's U-Net with scale * B A added to the weights that a LoRA adapts: what a LoRA is, without peft."""
    unet = base_unet(run)
    state = unet.state_dict()
    for name, a in weights.items():
        if ".lora_A." in name:
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            base = state[name.removeprefix("unet.").replace(".lora_A.", ".")]
            base += scale * (b.flatten(1) @ a.flatten(1)).reshape(base.shape)
    return unet


@torch.no_grad()
def output_of(unet, call):
    """What a U-Net makes of the inputs of a Call."""
    added = {name: value for name, value in call.cond.items() if name != "encoder_hidden_states"}
    hidden = call.cond["encoder_hidden_states"]
    return unet(call.z, torch.tensor(call.t), hidden, added_cond_kwargs=added or None).sample


def computes(unet, call):
    return torch.allclose(output_of(unet, call), call.output, rtol=1e-3, atol=1e-4)


@covers("lora_rank", "lora_alpha", by=LORA)
@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (3, 1)])
def test_rank_and_alpha(run, rank, alpha):
    """Student and target are the teacher plus alpha / rank times B A; files, log and card say the same."""
    standard = (rank, alpha) == (4, 8)  # as in every run
    done = run(*WATCHED) if standard else run(f"--lora_rank={rank}", f"--lora_alpha={alpha}", *WATCHED)
    weights = done.weights(of="checkpoint-1")
    assert {tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name} == {rank}
    assert {tensor.shape[1] for name, tensor in weights.items() if ".lora_B." in name} == {rank}
    teacher, student, target = done.teacher_calls[1], done.student_calls[1], done.target_calls[1]
    expected = merged(run, weights, alpha / rank)
    assert computes(expected, student) and computes(expected, target)
    assert not computes(merged(run, weights, 1), student)
    assert computes(base_unet(run), teacher) and not computes(expected, teacher)

    with safe_open(done.folder / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (rank, alpha)
    kohya = load_file(done.folder / KOHYA_FILE)
    assert {tensor.item() for name, tensor in kohya.items() if name.endswith(".alpha")} == {alpha}
    assert {tensor.shape[0] for name, tensor in kohya.items() if ".lora_down." in name} == {rank}
    assert f"LoRA: rank {rank}, alpha {alpha}, dropout 0, in " in done.log
    assert f"| LoRA | rank {rank}, alpha {alpha}, dropout 0 |" in (done.folder / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(run.teacher)
    pipeline.load_lora_weights(done.folder)
    loaded, expected = output_of(pipeline.unet, student), output_of(merged(run, done.weights(), alpha / rank), student)
    torch.testing.assert_close(loaded, expected, rtol=1e-3, atol=1e-4)


@covers("learning_rate", by=LORA)
def test_without_learning_the_lora_changes_nothing(run):
    done = run("--learning_rate=0")
    assert all(bool(tensor.any()) == (".lora_A." in name) for name, tensor in done.weights().items())
    assert all(computes(base_unet(run), call) for call in done.calls)


@covers("lora_dropout", by=LORA)
def test_dropout_is_the_students_alone(run):
    done, without = run("--lora_dropout=0.5", *WATCHED), run(*WATCHED)
    assert {call.dropout for call in done.student_calls} == {True}
    assert {call.dropout for call in done.teacher_calls + done.target_calls + done.drawn} == {False}
    assert {call.dropout for call in without.calls + without.drawn} == {False}
    for seen in (done, without):
        assert {call.adapters for call in seen.teacher_calls} == {()}
        assert {call.adapters for call in seen.student_calls + seen.target_calls + seen.drawn} == {("lcm",)}
        assert len(seen.teacher_calls) == len(seen.target_calls) == len(seen.student_calls) == 2
    network = merged(run, done.weights(of="checkpoint-1"), 2)
    assert computes(network, done.target_calls[1]) and not computes(network, done.student_calls[1])
    assert computes(base_unet(run), done.teacher_calls[1])
    assert not same(done, without)
    assert "dropout 0.5, in " in done.log


@covers("gradient_checkpointing", by=LORA)
def test_gradient_checkpointing_with_dropout(run):
    """The layers run again in the backward pass, after teacher and target switched adapter and dropout off and on."""
    more = ("--lora_dropout=0.5", "--ema_decay=0.5")
    without, done = run(*more), run(*more, "--gradient_checkpointing")
    assert done.recomputed > 0 and without.recomputed == 0
    for name in (".", "student"):
        for key, value in without.weights(name).items():
            torch.testing.assert_close(done.weights(name)[key], value, rtol=1e-4, atol=1e-5)


@covers("ema_decay", by=LORA)
def test_moving_average_is_the_target_and_what_is_exported(run):
    start = run("--learning_rate=0").weights()
    for decay in (0, 0.25):
        done = run(f"--ema_decay={decay}", "--max_train_steps=1")
        average, student = done.weights("."), done.weights("student")
        assert average.keys() == student.keys() == start.keys()
        assert any(not torch.equal(student[name], start[name]) for name in start)
        for name, value in student.items():
            expected = decay * start[name] + (1 - decay) * value
            torch.testing.assert_close(average[name], expected, rtol=0, atol=1e-7)
    done = run("--ema_decay=0.25", *WATCHED)
    assert {call.adapters for call in done.target_calls + done.drawn} == {("ema",)}
    assert {call.adapters for call in done.student_calls} == {("lcm",)}
    assert {call.adapters for call in done.teacher_calls} == {()}
    average, student = (merged(run, done.weights(name, of="checkpoint-1"), 2) for name in (".", "student"))
    assert computes(average, done.target_calls[1]) and not computes(student, done.target_calls[1])
    assert computes(student, done.student_calls[1]) and not computes(average, done.student_calls[1])
    assert not (run(*WATCHED).folder / "student").exists()


@covers("ema_decay", by=LORA)
def test_kohya_file_is_the_moving_average(run):
    done = run("--ema_decay=0.25", *WATCHED)
    average, kohya = done.weights("."), load_file(done.folder / KOHYA_FILE)
    for name, tensor in average.items():
        layer, kind = name.removeprefix("unet.").removesuffix(".weight").rsplit(".", 1)
        key = f"lora_unet_{layer.replace('.', '_')}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"
        assert torch.equal(kohya.pop(key), tensor.half())
    assert all(name.endswith(".alpha") for name in kohya)


@covers("cast_teacher_unet", by=LORA)
def test_the_base_of_a_lora_is_cast_in_any_case(run):
    bf16 = run("--mixed_precision=bf16", "--cast_teacher_unet")
    assert same(bf16, run("--mixed_precision=bf16"))
    assert {call.dtype for call in bf16.calls + run("--mixed_precision=bf16").calls} == {torch.bfloat16}
    assert same(run("--cast_teacher_unet"), run())


# LoRA: which layers.


def layers(run, *endings):
    """The linear and convolutional layers of the teacher's U-Net with one of these endings; all without any."""
    names = [
        name for name, layer in base_unet(run).named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    return {name for name in names if not endings or any(f".{name}".endswith(f".{ending}") for ending in endings)}


def adapted(done):
    """The layers that the saved LoRA adapts; both files are asked."""
    found = {re.sub(r"^unet\.|\.lora_[AB]\.weight$", "", name) for name in done.weights()}
    kohya = {name.split(".")[0] for name in load_file(done.folder / KOHYA_FILE)}
    assert kohya == {f"lora_unet_{name.replace('.', '_')}" for name in found}
    assert f"in {len(found)} layers" in done.log
    return found


@covers("lora_target_modules", "lora_rank", "lora_alpha", by=LORA)
def test_target_modules(run):
    default = run(drop=("lora_rank", "lora_alpha"))
    assert adapted(default) == layers(run, *DEFAULT_TARGETS) < layers(run)
    assert "LoRA: rank 64, alpha 64, dropout 0, in " in default.log
    some = ("to_q", "conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1")
    done = run(f"--lora_target_modules={', '.join(some)}")
    assert adapted(done) == layers(run, *some)
    assert len(adapted(done)) == 3 + sum(name.endswith("to_q") for name in layers(run))
    assert not same(done, run())


@covers("lora_target_modules", by=LORA)
def test_target_modules_that_do_not_exist(run):
    """Refused before training, with a list of what exists: given that list, every layer is adapted."""
    for given, wrong in (
        ("to_q,nosuch", "nosuch"),
        ("o_q", "o_q"),
        ("down_blocks.0", "down_blocks.0"),
    ):
        refused = run(f"--lora_target_modules={given}")
        error = refused.error()
        assert error.startswith(f"--lora_target_modules: {wrong!r} is no ") and not refused.batches
    names = error.rpartition(", as ")[2].split(", ")
    assert {"to_q", "to_out.0", "conv_in", "linear_1"} <= set(names)
    assert adapted(run(f"--lora_target_modules={','.join(names)}")) == layers(run)


# SDXL: sizes and crops. A row of `time_ids` is original height and width, crop top and left, target height and width.


@pytest.fixture(scope="module")
def pictures():
    """A wide and a tall picture, by their captions; the shorter side of both is 20."""
    rng = np.random.default_rng(5)
    return {
        caption: Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
        for caption, size in (("wide", (20, 24, 3)), ("tall", (28, 20, 3)))
    }


@pytest.fixture(scope="module")
def two_pictures(pictures, tmp_path_factory):
    members = []
    for caption, picture in pictures.items():
        members += [(f"{caption}.png", encode_image(picture)), (f"{caption}.txt", caption.encode())]
    return write_tar(tmp_path_factory.mktemp("two") / "two.tar", members)


def time_ids(done):
    """What student, target and, for both halves of its batch, the teacher were told: a row for each sample."""
    for student, target, teacher in zip(done.student_calls, done.target_calls, done.teacher_calls, strict=True):
        rows = student.cond["time_ids"]
        assert rows.dtype == torch.float32
        assert torch.equal(target.cond["time_ids"], rows)
        assert torch.equal(teacher.cond["time_ids"], torch.cat([rows, rows]))
    return [tuple(row) for call in done.student_calls for row in call.cond["time_ids"].int().tolist()]


@covers("resolution", "center_crop", "random_flip", by=SDXL)
@pytest.mark.parametrize("more", [[], ["--random_flip"], ["--center_crop", "--resolution=24"]])
def test_networks_are_told_what_was_cut(run, pictures, two_pictures, more):
    """The crop that `time_ids` name is the one that was trained on, in the picture as resized and mirrored."""
    done = run(*more, "--train_batch_size=8", shards=two_pictures)
    side = 24 if "--resolution=24" in more else 16
    tops, lefts, flips = set(), set(), []
    for row, caption, pixels in zip(time_ids(done), done.captions, done.pixels, strict=False):
        picture = pictures[caption]
        height, width, top, left, *target = row
        assert (height, width, target) == (picture.height, picture.width, [side, side])
        size = [side * length // 20 for length in picture.size]
        resized = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
        cut = [p[top : top + side, left : left + side] for p in (resized, resized[:, ::-1])]
        assert np.array_equal(pixels, cut[0]) != np.array_equal(pixels, cut[1])
        flips.append(np.array_equal(pixels, cut[1]))
        tops.add((caption, top))
        lefts.add((caption, left))
    assert len(flips) == 16 and any(flips) == ("--random_flip" in more) and not all(flips)
    if side == 24:
        assert tops == {("wide", 0), ("tall", 4)} and lefts == {("wide", 2), ("tall", 0)}
    else:
        assert tops > {("wide", 0)} and lefts > {("tall", 0)} and min(len(tops), len(lefts)) > 2
    drawn = {tuple(row) for call in done.drawn for row in call.cond["time_ids"].int().tolist()}
    assert drawn == {(side, side, 0, 0, side, side)}


@covers("width_key", "height_key", by=SDXL)
def test_original_sizes_come_from_the_json(run, json_shard):
    keys = ("--width_key=w", "--height_key=h", "--train_batch_size=5", "--max_watermark_probability=1")
    done = run(*keys, shards=json_shard)
    rows = list(zip(done.captions, time_ids(done), strict=False))
    assert len({caption for caption, _ in rows}) == 10
    for caption, row in rows:
        assert row[:3] == (1000, [900, 10][int(caption.split()[1]) % 2], 0) and row[4:] == (16, 16)
    assert {row[:2] for row in time_ids(run("--train_batch_size=5", shards=json_shard))} == {(20, 24)}


@covers("max_watermark_probability", by=SDXL)
def test_marked_pictures_are_left_out_as_in_the_public_scripts(run, json_shard):
    """Unless another bound is given, those above 0.5."""
    done = run("--train_batch_size=5", shards=json_shard)
    assert set(done.captions) == {f"caption {i}" for i in range(0, 10, 2)}
    assert "x watermark too probable" in done.printed


@covers("use_fix_crop_and_size", by=SDXL)
def test_fixed_crop_and_size(run, json_shard):
    keys = ("--width_key=w", "--height_key=h", "--train_batch_size=5")
    done, without = run(*keys, "--use_fix_crop_and_size", shards=json_shard), run(*keys, shards=json_shard)
    assert set(time_ids(done)) == {(16, 16, 0, 0, 16, 16)}
    assert len({row[3] for row in time_ids(without)}) > 1  # the crop's left
    assert np.array_equal(done.pixels, without.pixels)  # the data is the same
    assert not same(done, without)


# SDXL: prompts and VAE.


@pytest.fixture(scope="module")
def teacher_without_zeros(tmp_path_factory):
    return make_sdxl_teacher(tmp_path_factory.mktemp("teacher"), force_zeros_for_empty_prompt=False)


@covers("proportion_empty_prompts", "pretrained_teacher_model", by=SDXL)
@pytest.mark.parametrize("zeros", [True, False])
def test_captions_and_no_caption_are_encoded_as_the_pipeline_does(run, teacher_without_zeros, zeros):
    """A dropped caption is the encoding of "". Unconditional are zeros or that, as the teacher's index says."""
    teacher = run.teacher if zeros else teacher_without_zeros
    done = run("--proportion_empty_prompts=0.5", "--train_batch_size=8", "--max_train_steps=1", teacher=teacher)
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    captions = done.captions[:8]
    assert 0 < captions.count("") < 8
    hidden, no_hidden, pooled, no_pooled = pipeline.encode_prompt(captions, device="cpu")
    assert (no_hidden.any() or no_pooled.any()) != zeros
    (student,), (target,), (both,) = done.student_calls, done.target_calls, done.teacher_calls
    for call in (student, target):
        torch.testing.assert_close(call.cond["encoder_hidden_states"], hidden)
        torch.testing.assert_close(call.cond["text_embeds"], pooled)
    torch.testing.assert_close(both.cond["encoder_hidden_states"], torch.cat([hidden, no_hidden]))
    torch.testing.assert_close(both.cond["text_embeds"], torch.cat([pooled, no_pooled]))
    dropped = student.cond["encoder_hidden_states"][captions.index("")]
    assert dropped.any()
    assert torch.allclose(dropped, both.cond["encoder_hidden_states"][-1]) != zeros


@covers("pretrained_vae_model_name_or_path", "mixed_precision", by=SDXL)
def test_a_vae_that_is_given_runs_in_the_mixed_precision(run):
    """SDXL's own overflows in 16 bits, so it runs in float32, when it encodes and when it decodes."""
    given = f"--pretrained_vae_model_name_or_path={run.teacher / 'vae'}"

    def dtypes(done):
        assert done.pictures()
        return {dtype for _, dtype in done.encoded}, set(done.vae_outputs)

    assert dtypes(run("--mixed_precision=bf16")) == ({torch.float32}, {torch.float32})
    assert dtypes(run("--mixed_precision=bf16", given)) == ({torch.bfloat16}, {torch.bfloat16})
    assert dtypes(run(given)) == ({torch.float32}, {torch.float32})
    assert same(run(given), run())


@covers("lora_rank_pattern", "use_rslora", "lora_weights", by=LORA)
def test_variants_of_a_lora(run):
    """test_lora.py looks at the files."""
    plain = run()
    pattern, rs = run("--lora_rank_pattern=conv1=2"), run("--use_rslora")
    ranks = {tensor.shape[0] for name, tensor in pattern.weights().items() if "lora_A" in name}
    assert ranks == {2, 4} and "LoRA: rank 4, conv1 2, alpha 8" in pattern.log.replace("\\", "")
    assert {t.shape for t in rs.weights().values()} == {t.shape for t in plain.weights().values()}
    assert not same(rs, plain)
    started = run(f"--lora_weights={plain.folder}", "--learning_rate=0")
    assert same(started, plain) and not same(run("--learning_rate=0"), plain)


# And nothing was forgotten.


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_observed(name, monkeypatch):
    monkeypatch.setattr(SCRIPTS[name], "parse", lambda parser, argv=None: parser)
    options = {action.dest for action in SCRIPTS[name].parse_args([])._actions} - {"help"}
    assert options == COVERED[name]
