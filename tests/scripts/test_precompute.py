"""precompute_lcm.py: what it stores, whatever happens on the way; and trainings on cached shards."""

import json
import os
import re
import shutil
import signal
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (
    EVERYTHING_AT_RANDOM,
    ROOT,
    SCRIPTS,
    Script,
    encode_image,
    forked,
    launch_two,
    make_vae,
    read_tars,
    write_tar,
)  # fmt: skip
from diffusers import DiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import precompute_lcm
from lcm import cache
from lcm.data import samples, writer
from lcm.data.config import DataConfig
from lcm.data.loader import TrainingData
from lcm.data.pictures import Unusable
from lcm.data.shards import expand_shards, find_cache
from lcm.errors import UserError
from lcm.models import family

FEW_EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TRAINING = ["--center_crop", "--proportion_empty_prompts=0.4"]


def options(teacher, shards, folder, *more):
    own = ["--resolution=16", "--batch_size=4", "--mixed_precision=no", "--dtype=float32", *map(str, more)]
    return [f"--pretrained_teacher_model={teacher}", f"--train_shards_path_or_url={shards}", f"--output_dir={folder}",
            *own]  # fmt: skip


@pytest.fixture(scope="module")
def cached(script, tmp_path_factory):
    """The shards of a script's tests, cached in float32 with crops in the middle."""
    folder = tmp_path_factory.mktemp("cached")
    precompute_lcm.main(options(script.teacher, script.shards, folder, "--center_crop"))
    return replace(script, shards=str(folder / "{00000..00002}.tar"))


def test_trains_like_pictures(script, cached, tmp_path):
    """The same draws, so the same losses and weights, to the rounding of another batch size in the encoders."""
    # Dropout draws from torch's global generator, which the loading of the VAE advances.
    more = [*TRAINING, "--learning_rate=1e-3", *["--lora_dropout=0"] * script.is_lora]
    script.main(tmp_path / "pictures", *more)
    cached.main(tmp_path / "cached", *more)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("pictures", "cached")
    ]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    ours, theirs = script.weights(tmp_path / "cached"), script.weights(tmp_path / "pictures")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3)
    assert len(list((tmp_path / "cached" / "validation").iterdir())) == 1


def test_resume_is_exact(cached, tmp_path):
    """Cut in the middle and resumed, with several crops and everything at random: the same to the last bit."""
    folder = tmp_path / "crops"
    more = ["--crops_per_picture=2", "--random_flip", "--dtype=float16"]
    pictures = "demo/shards/heldout-00000.tar"
    precompute_lcm.main(options(cached.teacher, ROOT / pictures, folder, *more))
    script = replace(cached, shards=str(folder / "00000.tar"))
    everything = [*EVERYTHING_AT_RANDOM, "--max_train_steps=3", "--checkpointing_steps=1"]
    script.main(tmp_path / "whole", *everything)
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    script.main(tmp_path / "resumed", *everything)
    whole, resumed = script.weights(tmp_path / "whole"), script.weights(tmp_path / "resumed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_is_stored(kind, teacher, sdxl_teacher, shards, tmp_path, capsys):
    """Moments are those of the VAE for each crop and its mirror image; embeddings those of the pipeline."""
    source = teacher if kind == "sd" else sdxl_teacher
    more = ["--crops_per_picture=3", "--random_flip", "--keep_pictures"]
    precompute_lcm.main(options(source, shards, tmp_path, *more))
    printed = capsys.readouterr().out
    assert "3 shards, " in printed and "30 samples used, skipped: none." in printed
    assert f'--train_shards_path_or_url="{tmp_path}/{{00000..00002}}.tar"' in printed
    found = read_tars(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(source, safety_checker=None)
    key = "00001.tar/" + next(name for name in found if name.startswith("00001.tar/")).split("/")[1].split(".")[0]
    tensors = safetensors.torch.load(found[f"{key}.safetensors"])
    assert tensors["moments"].shape[0] == 6 == len(tensors["crops"]) and tensors["moments"].dtype == torch.float32
    name = next(name for name in found if name.startswith(f"{key}.") and name.endswith(("png", "jpg", "webp")))
    (tmp_path / "picture").write_bytes(found[name])
    image = Image.open(tmp_path / "picture").convert("RGB")
    assert tensors["original_size"].tolist() == [image.height, image.width]
    side = min(image.size)
    size = (int(16 * image.width / side), int(16 * image.height / side))
    image = image.resize(size, Image.Resampling.BILINEAR)
    for number, (top, left) in enumerate(tensors["crops"].tolist()):
        turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 2 else image
        square = np.asarray(turned.crop((left, top, left + 16, top + 16)))
        pixels = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected = pipeline.vae.encode(pixels).latent_dist.parameters[0]
        torch.testing.assert_close(tensors["moments"][number], expected, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        for data, text in ((found[f"{key}.safetensors"], found[f"{key}.txt"].decode()),
                           (found[f"{key}.empty.safetensors"], "")):  # fmt: skip
            stored = safetensors.torch.load(data)
            encoded = pipeline.encode_prompt(
                text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            torch.testing.assert_close(stored["hidden_states"], encoded[0][0], rtol=1e-4, atol=1e-5)
            if kind == "sdxl":
                torch.testing.assert_close(stored["pooled"], encoded[2][0], rtol=1e-4, atol=1e-5)


def test_stored_in_half_the_bytes(teacher, shards, tmp_path):
    """By default in float16; and what cannot be stored in it is skipped and counted."""
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e5)
    vae.save_pretrained(tmp_path / "vae")
    base = [name for name in options(teacher, shards, tmp_path / "half") if name != "--dtype=float32"]
    precompute_lcm.main(base)
    tensors = safetensors.torch.load(
        next(data for name, data in read_tars(tmp_path / "half").items() if name.endswith("txt") is False)
    )
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float16}
    base = [name for name in options(teacher, shards, tmp_path / "none") if name != "--dtype=float32"]
    precompute_lcm.main([*base, f"--pretrained_vae_model_name_or_path={tmp_path / 'vae'}"])
    about = json.loads((tmp_path / "none" / "00000.json").read_text())
    assert about["samples"] == 0 and about["skipped"] == {"not finite in this precision": 10}


def test_killed_at_any_moment(teacher, shards, tmp_path):
    """At most one shard is lost, and the next run makes the bytes of an unbroken one."""
    precompute_lcm.main(options(teacher, shards, tmp_path / "unbroken"))
    unbroken = read_tars(tmp_path / "unbroken")

    def dying_at(moment):
        count = iter(range(999))
        write = writer.webdataset.TarWriter.write

        def write_or_die(*args):
            if next(count) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args)

        writer.webdataset.TarWriter.write = write_or_die
        precompute_lcm.main(options(teacher, shards, tmp_path / "killed"))

    for moment in sorted({*range(0, 30, 2), 1, 9, 11, 19, 29}):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        assert forked(lambda moment=moment: dying_at(moment)).returncode == -signal.SIGKILL
        complete = [path.name for path in (tmp_path / "killed").glob("*.tar")]
        assert len(complete) == moment // 10
        precompute_lcm.main(options(teacher, shards, tmp_path / "killed"))
        assert read_tars(tmp_path / "killed") == unbroken
        assert not list((tmp_path / "killed").glob("*.partial"))


def test_two_processes_share_the_shards(teacher, shards, tmp_path):
    precompute_lcm.main(options(teacher, shards, tmp_path / "one"))
    done = launch_two("precompute_lcm.py", options(teacher, shards, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Train with:") == 1 and "30 samples used" in done.stdout
    assert read_tars(tmp_path / "two") == read_tars(tmp_path / "one")


def test_bad_data_is_counted(teacher, tmp_path, capsys):
    picture = encode_image(np.zeros((20, 20, 3), np.uint8))
    write_tar(tmp_path / "a.tar", [
        ("0.png", picture), ("0.txt", b"good"), ("1.png", b"no picture"), ("1.txt", b"bad"), ("2.png", picture),
        ("3.png", picture), ("3.txt", b"good"), ("3.json", b'{"pwatermark": 0.9}'),
    ])  # fmt: skip
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1700])
    both = f"{tmp_path}/a.tar::{tmp_path}/b.tar"
    precompute_lcm.main(options(teacher, both, tmp_path / "out", "--max_watermark_probability=0.5"))
    assert "1 samples used, skipped: 1 x picture unreadable, 1 x no caption, 1 x watermark" in capsys.readouterr().out
    stored = {name.removeprefix("00000.tar/") for name in read_tars(tmp_path / "out")}
    assert stored == {"0.safetensors", "0.txt", "0.empty.safetensors"}
    assert json.loads((tmp_path / "out" / "00001.json").read_text())["samples"] == 0


@pytest.mark.parametrize(("more", "start"), [
    (["--resolution=24"], "--resolution: 24 given, but the shards in "),
    (["--dtype=float16"], "--dtype: 'float16' given, but "),
    (["--seed=1"], "--seed: 1 given, but "),
    (["--random_flip"], "--random_flip: True given, but "),
])  # fmt: skip
def test_other_options_are_not_mixed(teacher, shards, tmp_path, more, start, capsys):
    precompute_lcm.main(options(teacher, shards, tmp_path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        precompute_lcm.main([*options(teacher, shards, tmp_path), *more])
    assert stop.value.code == 1 and capsys.readouterr().err.startswith(start)


@pytest.mark.parametrize(("more", "start"), [
    (["--resolution=12"], "--resolution: 12 given; allowed: multiples of 8"),
    (["--width_key=w"], "--width_key: given without --height_key"),
    (["--center_crop", "--crops_per_picture=2"], "--crops_per_picture: 2 given, but --center_crop leaves one place"),
    (["--dtype=int8"], "--dtype: invalid choice: 'int8'"),
    (["--output_dir=file/x"], "--output_dir: 'file/x' given, but "),
])  # fmt: skip
def test_wrong_options(teacher, shards, tmp_path, monkeypatch, more, start, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        precompute_lcm.main([*options(teacher, shards, tmp_path / "out"), *more])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(start)


def test_a_full_disk_is_seen_before_it_starts(teacher, shards, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")(10, 10, 5_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SystemExit):
        precompute_lcm.main(options(teacher, shards, tmp_path / "out"))
    assert "--output_dir: about " in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar*"))


@pytest.fixture(scope="module")
def sd(teacher, shards, tmp_path_factory):
    """The Stable Diffusion script with cached shards."""
    folder = tmp_path_factory.mktemp("sd")
    precompute_lcm.main(options(teacher, shards, folder, "--center_crop"))
    return Script("sd", teacher, str(folder / "{00000..00002}.tar"), SCRIPTS["sd"])


def changed_teacher(teacher, folder, part, file):
    """A copy of a teacher with one other weight in one part."""
    shutil.copytree(teacher, folder)
    weights = safetensors.torch.load_file(folder / part / file)
    next(iter(weights.values())).view(-1)[0] += 1
    safetensors.torch.save_file(weights, folder / part / file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("part", "file", "what"), [
    ("vae", "diffusion_pytorch_model.safetensors", "VAE"),
    ("text_encoder", "model.safetensors", "text encoder"),
])  # fmt: skip
def test_shards_of_another_model_are_refused(sd, tmp_path, part, file, what, capsys):
    other = replace(sd, teacher=changed_teacher(sd.teacher, tmp_path / "teacher", part, file))
    with pytest.raises(SystemExit) as stop:
        other.main(tmp_path / "out", "--center_crop")
    expected = f"--train_shards_path_or_url: these shards were cached with another {what} than this run's"
    assert stop.value.code == 1 and expected in capsys.readouterr().err


@pytest.mark.parametrize(("more", "start"), [
    (["--resolution=24", "--center_crop"], "cached with --resolution 16, not 24"),
    ([], "cached with --center_crop True, not False"),
    (["--center_crop", "--random_flip"], "cached with --random_flip False, not True"),
    (["--center_crop", "--interpolation_type=lanczos"], "cached with --interpolation_type bilinear, not lanczos"),
])  # fmt: skip
def test_other_options_than_those_of_the_shards_are_refused(sd, tmp_path, more, start, capsys):
    with pytest.raises(SystemExit):
        sd.main(tmp_path / "out", *more)
    assert start in capsys.readouterr().err


def test_shards_of_the_other_family_are_refused(sd, sdxl_teacher, tmp_path, capsys):
    with pytest.raises(SystemExit):
        Script("lora_sdxl", sdxl_teacher, sd.shards, SCRIPTS["lora_sdxl"]).main(tmp_path / "out", "--center_crop")
    assert "cached with another kind of model than this run's" in capsys.readouterr().err


def test_neither_vae_nor_text_encoder_is_loaded(sd, tmp_path, monkeypatch):
    """Unless pictures are drawn; after that they are gone again."""
    kept = []
    real = family.Family.__init__

    def init(self, *args):
        kept.append(self)
        real(self, *args)

    monkeypatch.setattr(family.Family, "__init__", init)
    loads = []
    real_vae = family.load_vae
    monkeypatch.setattr(family, "load_vae", lambda *args, **kwargs: loads.append(1) or real_vae(*args, **kwargs))
    sd.main(tmp_path / "out", "--center_crop", "--validation_steps=2")
    assert len(loads) == 2  # the pictures of steps 2 and 4
    assert kept[0].vae is None and kept[0].encode_prompts.encoders() == []
    assert len(list((tmp_path / "out" / "validation").iterdir())) == 2


def test_guidance_leads_away_from_a_prompt(sd, shards, tmp_path):
    """The text encoder is loaded for it, once: the same training as on pictures."""
    more = ["--center_crop", "--teacher_negative_prompt=a blue two", "--max_train_steps=2"]
    pictures = replace(sd, shards=shards)
    sd.main(tmp_path / "cached", *more)
    pictures.main(tmp_path / "pictures", *more)
    ours, theirs = sd.weights(tmp_path / "cached"), sd.weights(tmp_path / "pictures")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-3)


def test_pictures_among_cached_shards_are_counted(sd, shards, tmp_path, capsys):
    mixed = replace(sd, shards=f"{sd.shards}::{shards}")
    mixed.main(tmp_path / "out", "--center_crop", "--max_train_steps=12")
    assert "x not cached" in capsys.readouterr().out
    replace(sd, shards=f"{shards}::{sd.shards}").main(tmp_path / "other", "--max_train_steps=12")
    assert "x cached, unlike the first shard" in capsys.readouterr().out


SHAPES = '{"hidden_states": [2, 3], "moments": [4, 2, 2], "original_size": [2]}'
ORIGIN = {"format": cache.FORMAT, "resolution": "16", "shapes": SHAPES}


DELETED = object()


def tensors(**other):
    return {
        "moments": torch.zeros(3, 4, 2, 2),
        "crops": torch.zeros(3, 2, dtype=torch.int32),
        "original_size": torch.tensor([5, 6], dtype=torch.int32),
        "hidden_states": torch.zeros(2, 3),
        **other,
    }


def row_of(data):
    sample = {"__key__": "k", "__url__": "u", "safetensors": data, "txt": b"caption"}
    return samples.decode_sample(sample, DataConfig(("u",), 1, 16, 0, origin=ORIGIN), np.random.default_rng(0))


@pytest.mark.parametrize("other", [
    {"moments": torch.full((3, 4, 2, 2), float("nan"))},
    {"moments": torch.zeros(0, 4, 2, 2), "crops": torch.zeros(0, 2)},
    {"moments": torch.zeros(3, 4, 2, 3)},
    {"moments": torch.zeros(3, 4, 2, 2, dtype=torch.int32)},
    {"crops": torch.zeros(2, 2)},
    {"hidden_states": torch.zeros(2, 4)},
    {"pooled": torch.zeros(2)},
])  # fmt: skip
def test_what_does_not_fit_is_unusable(other):
    row = row_of(cache.pack(tensors(), ORIGIN))
    assert row["moments"].shape == (4, 2, 2) and row["original_size"] == (5, 6) and row["caption"] == "caption"
    with pytest.raises(Unusable):
        row_of(cache.pack(tensors(**other), ORIGIN))
    with pytest.raises(Unusable, match="other origin"):
        row_of(cache.pack(tensors(), {**ORIGIN, "vae": "another"}))


@FEW_EXAMPLES
@given(st.data())
def test_damaged_bytes_are_unusable_or_harmless(data):
    """Whatever is in a member, it is skipped or becomes a row of the right shapes; nothing else is ever raised."""
    good = bytearray(cache.pack(tensors(), ORIGIN))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(good[: data.draw(st.integers(0, len(good)))]) if data.draw(st.booleans()) else bytes(good)
    try:
        row = row_of(damaged)
    except Unusable:
        return
    assert row["moments"].shape == (4, 2, 2) and row["hidden_states"].shape == (2, 3)


@FEW_EXAMPLES
@given(st.binary(max_size=300))
def test_a_first_member_of_any_bytes(tmp_path, data):
    """A shard says that it is cached, and its first member is rubbish: one line, no traceback."""
    write_tar(tmp_path / "a.tar", [("0.safetensors", data), ("0.empty.safetensors", data), ("0.txt", b"x")])
    with pytest.raises(UserError, match=r"^--train_shards_path_or_url: .*a\.tar: "):
        find_cache([str(tmp_path / "a.tar")], 10)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["moments", "x"]), inner, max_size=2),
    max_leaves=5,
)


@FEW_EXAMPLES
@given(
    st.sampled_from(["format", "shapes", "dtype", "scaling_factor"]), JSON | JSON.map(json.dumps) | st.just(DELETED)
)
def test_a_manifest_of_any_content(tmp_path, name, value):
    """What made the samples is missing or nonsense: one line, or sizes that can be computed."""
    origin = {**ORIGIN, "dtype": "float32", "scaling_factor": "0.18", name: value}
    if value is DELETED:
        del origin[name]
    data = cache.pack(tensors(), origin)
    write_tar(tmp_path / "a.tar", [("0.safetensors", data), ("0.empty.safetensors", data), ("0.txt", b"x")])
    try:
        found = find_cache([str(tmp_path / "a.tar")], 10)
    except UserError as error:
        assert re.match(r"--train_shards_path_or_url: .*a\.tar: its (format|metadata)", str(error))
        return
    assert cache.sample_bytes(found.origin) > 0 and float(found.origin["scaling_factor"]) > 0
    assert value is not DELETED and name != "format"


def test_batches_of_cached_samples(sd):
    """Moments of one of the crops; embeddings; sizes. No pixels."""
    shards = expand_shards([sd.shards])
    found = find_cache(shards, 10)
    options = {"batch_size": 3, "resolution": 16, "seed": 0, "proportion_empty_prompts": 1.0}
    batch = next(iter(TrainingData(DataConfig(shards, origin=found.origin, **options))))
    assert "pixels" not in batch and batch["moments"].shape == (3, 8, 8, 8) and batch["is_empty"].all()
    assert batch["hidden_states"].shape[1:] == found.empty[0].shape and batch["captions"] == [""] * 3
