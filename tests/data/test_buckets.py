"""Aspect-ratio buckets: which shapes there are, which picture goes where, and that every sample is used."""

import io
import json
import math
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, Script, encode_image, write_tar
from data_tools import FEW_EXAMPLES, RANDOM, assert_resumes_exactly, config, take
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import precompute_lcm
from lcm.data.loader import TrainingData
from lcm.options.shapes import as_text, covering_size, make_buckets, nearest_shape

pytestmark = [
    pytest.mark.usefixtures("watchdog"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]
SIDES = st.integers(1, 3000)
BUCKETS = ((16, 16), (16, 24), (24, 16), (16, 32), (32, 16), (24, 24), (8, 32))


# The shapes.


@given(resolution=st.integers(2, 160).map(lambda n: 8 * n), rounding=st.sampled_from([8, 16, 64]))
def test_shapes_that_are_made(resolution, rounding):
    areas = make_buckets(resolution, rounding, "area")
    assert areas == sorted(set(areas)) and {(w, h) for h, w in areas} == set(areas)
    assert bool(areas) == (resolution >= rounding)
    for height, width in areas:
        assert height % rounding == width % rounding == 0 and max(height, width) <= 2 * min(height, width)
        assert height * width <= resolution**2
        assert (height + rounding) * width > resolution**2 or height + rounding > 2 * width  # it could not be higher
    pixels = make_buckets(resolution, rounding, "pixel")
    assert {min(shape) for shape in pixels} == {resolution} and max(map(max, pixels)) <= 2 * resolution
    assert all((max(shape) - resolution) % rounding == 0 for shape in pixels)


def test_shapes_of_1024():
    """Those of SDXL's own table between 1:2 and 2:1, but for what it rounds up."""
    assert as_text(make_buckets(1024, 64, "area")) == (
        "704,1408;768,1344;832,1216;896,1152;960,1088;1024,1024;1088,960;1152,896;1216,832;1344,768;1408,704"
    )


@given(size=st.tuples(SIDES, SIDES), shape=st.tuples(SIDES, SIDES))
def test_a_picture_just_covers_its_shape(size, shape):
    width, height = covering_size(shape, size)
    assert width >= shape[1] and height >= shape[0] and (width == shape[1] or height == shape[0])
    wanted = max(shape[0] / size[1], shape[1] / size[0])
    assert abs(width - wanted * size[0]) <= 1 and abs(height - wanted * size[1]) <= 1


@given(size=st.tuples(SIDES, SIDES), shapes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=9))
def test_least_is_cropped(size, shapes):
    """Of all shapes the nearest keeps the largest part of a picture."""

    def kept(shape):
        width, height = size
        scale = max(shape[0] / height, shape[1] / width)
        return shape[0] * shape[1] / (scale**2 * width * height)

    assert kept(nearest_shape(shapes, size)) >= max(map(kept, shapes)) - 1e-6


def test_of_one_ratio_the_largest_that_is_filled():
    shapes = [(512, 512), (1024, 1024), (768, 768), (512, 1024)]
    sizes = {(400, 400): 512, (512, 512): 512, (800, 800): 768, (767, 768): 512, (3000, 2999): 1024}
    for size, side in sizes.items():
        assert nearest_shape(shapes, size) == (side, side)


# The batches.


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards, in which some shapes are frequent and one has a single picture; and things that are none."""
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    sizes = [(20, 20)] * 9 + [(20, 31)] * 7 + [(40, 20)] * 5 + [(30, 21)] * 2 + [(9, 36)]  # height, width
    paths = []
    for shard in range(3):
        members = [("bad.png", b"bad"), ("bad.txt", b"")]
        for i in rng.permutation(len(sizes)):
            pixels = rng.integers(0, 256, (*sizes[i], 3), dtype=np.uint8)
            members += [(f"{i:03d}.png", encode_image(pixels)), (f"{i:03d}.txt", f"{shard} {i}".encode())]
        paths.append(write_tar(folder / f"{shard}.tar", members))
    return paths


def test_every_batch_has_one_shape(shards):
    data = TrainingData(config(*shards, batch_size=3, buckets=BUCKETS, shuffle_buffer_size=10, **RANDOM))
    shapes = Counter()
    for batch in take(data, 60):
        assert batch["pixels"].shape == (3, 3, *batch["target_size"])
        sizes = {nearest_shape(BUCKETS, (width, height)) for height, width in batch["original_sizes"].tolist()}
        assert sizes == {batch["target_size"]}
        shapes[f"{batch['target_size'][0]}x{batch['target_size'][1]}"] += 3
    assert data.tally.shapes == shapes and data.tally.used == 180 and len(shapes) == 5
    assert "180 samples used (" in str(data.tally) and "of 16x16" in str(data.tally)
    assert data.tally.as_scalars()["samples/shape/8x32"] == shapes["8x32"] > 0


@settings(FEW_EXAMPLES, max_examples=12)
@given(batch_size=st.integers(1, 5), block=st.integers(1, 90), seed=st.integers(0, 3), num_streams=st.integers(1, 3))
def test_every_sample_is_used_equally_often(shards, batch_size, block, seed, num_streams):
    """But for those that wait: after ten passes none was used more than ten times, and the rest waits."""
    run = config(*shards, batch_size=batch_size, buckets=BUCKETS, shuffle_buffer_size=block, seed=seed, resolution=16)
    used = Counter()
    for rank in range(num_streams):
        data = TrainingData(replace(run, rank=rank, num_processes=num_streams))
        passes = 10 * num_streams
        for batch in data:
            (position,), (waiting,) = data.positions, data.waiting
            if position.pass_index >= passes:
                break
            used.update(batch["captions"])
            last = waiting
        assert len(last) <= 5 * (batch_size - 1)
    assert len(used) == 72
    most = 10 * num_streams
    assert max(used.values()) <= most and sum(most - n for n in used.values()) <= num_streams * 6 * batch_size


@FEW_EXAMPLES
@given(batch_size=st.integers(1, 4), block=st.integers(1, 90), seed=st.integers(0, 3), consumed=st.integers(0, 40))
def test_resume_is_exact(shards, batch_size, block, seed, consumed):
    run = config(*shards, batch_size=batch_size, buckets=BUCKETS, shuffle_buffer_size=block, seed=seed, **RANDOM)
    assert_resumes_exactly(run, consumed, more=9)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_resume_is_exact_with_workers(shards, num_workers):
    options = {"num_workers": num_workers, "batch_size": 3, "shuffle_buffer_size": 20, **RANDOM}
    assert_resumes_exactly(config(*shards, buckets=BUCKETS, **options), 25, more=12)


def test_a_shard_that_has_changed_does_not_stop_a_resume(shards, tmp_path):
    """A sample that waited and is gone is left out."""
    path = tmp_path / "0.tar"
    shutil.copy(shards[0], path)
    run = config(path, batch_size=4, buckets=BUCKETS)
    data = TrainingData(run)
    take(data, 3)
    state = json.loads(json.dumps(data.state_dict()))
    assert state["waiting"][0]
    write_tar(path, [("a.png", encode_image(np.zeros((20, 20, 3), np.uint8))), ("a.txt", b"new")])
    resumed = TrainingData(run)
    resumed.load_state_dict(state)
    assert take(resumed, 2)[1]["captions"] == ["new"] * 4


def test_a_state_without_samples_that_wait_is_of_an_older_version(shards):
    data = TrainingData(config(*shards))
    state = data.state_dict()
    del state["waiting"], state["shapes"]
    data.load_state_dict(state)
    assert data.waiting == [[]]
    for bad in ([[[0, 0, 0, 0]]], [[[0, 0, 0, 0, -1]]], [[[0, 0, 0, 0, "1"]]]):
        with pytest.raises((TypeError, ValueError)):
            data.load_state_dict({**state, "waiting": bad})


def test_small_areas_are_skipped(shards):
    data = TrainingData(config(*shards, buckets=BUCKETS, min_image_area=0.0005))
    take(data, 30)
    assert data.tally.skipped["smaller than --min_image_area"] > 0 and "16x16" not in data.tally.shapes


# A training.


def sdxl_run(sdxl_teacher, shards, folder, monkeypatch, *more):
    """Train, and return what the student was called with: (latents' shape, time ids) of each pass, and the batches."""
    from lcm.data import loader
    from lcm.models import prompts

    batches, ids = [], []
    unwrapped, real = loader.TrainingData.__iter__, prompts.SDXLPromptEncoder.time_ids

    def recording(self):
        for batch in unwrapped(self):
            batches.append(batch)
            yield batch

    def time_ids(self, batch):
        ids.append(real(self, batch))
        return ids[-1]

    with monkeypatch.context() as patch:
        patch.setattr(loader.TrainingData, "__iter__", recording)
        patch.setattr(prompts.SDXLPromptEncoder, "time_ids", time_ids)
        script = Script("lora_sdxl", sdxl_teacher, "::".join(shards), SCRIPTS["lora_sdxl"])
        script.main(folder, f"--aspect_ratio_buckets={as_text(BUCKETS)}", "--max_watermark_probability=1", *more)
    return script, batches, ids


@pytest.fixture(scope="module")
def seven_shapes(tmp_path_factory):
    """Pictures of seven shapes whose pixels tell where they are: red is the row, green the column, blue the number."""
    members, folder = [], tmp_path_factory.mktemp("seven")
    sizes = [(18, 18), (35, 50), (52, 34), (32, 66), (65, 32), (60, 61), (20, 79)]
    for i in range(28):
        height, width = sizes[i % 7]
        row, column = np.mgrid[:height, :width]
        pixels = np.stack([row * 3, column * 3, np.full_like(row, 9 * i)], 2).astype(np.uint8)
        members += [(f"{i:03d}.png", encode_image(pixels)), (f"{i:03d}.txt", f"{i}".encode())]
    return [write_tar(folder / "0.tar", members)], members


def test_sdxl_is_told_what_was_done(sdxl_teacher, seven_shapes, tmp_path, monkeypatch):
    """Every row of time ids and every crop of pictures of seven shapes, against the picture it came from."""
    shards, members = seven_shapes
    pictures = {members[i + 1][1].decode(): members[i][1] for i in range(0, len(members), 2)}
    more = ["--max_train_steps=12", "--random_flip", "--interpolation_type=nearest"]
    _, batches, ids = sdxl_run(sdxl_teacher, shards, tmp_path / "out", monkeypatch, *more)
    seen = set()
    for batch, rows in zip(batches, ids, strict=False):
        for pixels, caption, row in zip(batch["pixels"], batch["captions"], rows.tolist(), strict=True):
            image = Image.open(io.BytesIO(pictures[caption]))
            original_height, original_width, top, left, height, width = map(int, row)
            assert (original_width, original_height) == image.size
            assert (height, width) == batch["target_size"] == nearest_shape(BUCKETS, image.size)
            assert pixels.shape == (3, height, width)
            resized = image.resize(covering_size((height, width), image.size), Image.Resampling.NEAREST)
            found = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            as_it_is, mirrored = np.asarray(resized), np.asarray(resized)[:, ::-1]
            part = (slice(top, top + height), slice(left, left + width))
            assert np.array_equal(found, as_it_is[part]) or np.array_equal(found, mirrored[part])
            seen.add((height, width))
    assert seen == set(BUCKETS)


def test_sdxl_resumes_bit_for_bit(sdxl_teacher, seven_shapes, tmp_path, monkeypatch):
    more = ["--gradient_accumulation_steps=2", "--dataloader_num_workers=2", "--random_flip", "--train_batch_size=3"]
    shards, _ = seven_shapes
    script, batches, _ = sdxl_run(sdxl_teacher, shards, tmp_path / "whole", monkeypatch, *more)
    sdxl_run(sdxl_teacher, shards, tmp_path / "cut", monkeypatch, *more, "--max_train_steps=2",
             "--checkpointing_steps=2")  # fmt: skip
    state = json.loads((tmp_path / "cut" / "checkpoint-2" / "training_state.json").read_text())
    assert any(state["data"][0]["waiting"])
    sdxl_run(sdxl_teacher, shards, tmp_path / "cut", monkeypatch, *more, "--resume_from_checkpoint=latest")
    whole, resumed = script.weights(tmp_path / "whole"), script.weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len({batch["target_size"] for batch in batches}) > 2


def test_cached_shards_of_several_shapes(sdxl_teacher, seven_shapes, tmp_path, monkeypatch, capsys):
    """The same batches and the same training as on pictures; other shapes are refused."""
    shards, _ = seven_shapes
    shapes = f"--aspect_ratio_buckets={as_text(BUCKETS)}"
    options = [f"--pretrained_teacher_model={sdxl_teacher}", "--resolution=16", "--center_crop", shapes]
    precompute_lcm.main([*options, f"--train_shards_path_or_url={shards[0]}", f"--output_dir={tmp_path / 'cached'}",
                         "--dtype=float32", "--batch_size=5"])  # fmt: skip
    more = ["--center_crop", "--lora_dropout=0"]
    script, pictures, ids = sdxl_run(sdxl_teacher, shards, tmp_path / "a", monkeypatch, *more)
    cached = [f"{tmp_path}/cached/00000.tar"]
    _, moments, cached_ids = sdxl_run(sdxl_teacher, cached, tmp_path / "b", monkeypatch, *more)
    for a, b in zip(pictures, moments, strict=True):
        assert (a["captions"], a["target_size"]) == (b["captions"], b["target_size"])
        assert b["moments"].shape[2:] == tuple(side // 2 for side in b["target_size"])
    assert all(torch.equal(a, b) for a, b in zip(ids, cached_ids, strict=True))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open() if '"loss"' in line]
        for name in "ab"
    ]
    assert len(losses[0]) == 4 and np.allclose(*losses, rtol=1e-3)
    capsys.readouterr()
    for other in ("16,16", None):
        options = script.options(tmp_path / "c", "--center_crop", "--max_watermark_probability=1")
        options = [option for option in options if not option.startswith("--train_shards")]
        with pytest.raises(SystemExit):
            script.module.main([*options, f"--train_shards_path_or_url={cached[0]}",
                                *([f"--aspect_ratio_buckets={other}"] if other else [])])  # fmt: skip
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"these shards were cached with --aspect_ratio_buckets {as_text(BUCKETS)}, not {other}" in error


def test_auto_is_the_list_that_it_makes(teacher, tmp_path):
    module = Script("sd", teacher, "x.tar", SCRIPTS["sd"]).module
    given = ["--pretrained_teacher_model=t", "--train_shards_path_or_url=x", "--max_train_steps=1"]
    from lcm.options.shapes import training_shapes

    for more, expected in (
        (["--resolution=512"], make_buckets(512, 64, "area")),
        (["--resolution=64", "--aspect_bucket_rounding=8"], make_buckets(64, 8, "area")),
        (["--resolution=64", "--aspect_bucket_rounding=8", "--resolution_type=pixel"], make_buckets(64, 8, "pixel")),
    ):
        assert list(training_shapes(module.parse_args([*given, "--aspect_ratio_buckets=auto", *more]))) == expected
    assert math.isclose(sum(h * w for h, w in make_buckets(512, 64, "area")) / 5, 512**2, rel_tol=0.1)
