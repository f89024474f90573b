"""The data: what is read and how, what is counted, in which order, and that a resume goes on exactly.

Most tests read one stream with `shuffle_buffer_size=1`, which keeps the order of the shard; where a bad sample is
followed by a good one, the first batch then tells exactly what was skipped before it.
"""

import contextlib
import functools
import gc
import http.server
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import struct
import threading
import time
import warnings
import weakref
import zlib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import encode_image, write_shards, write_tar
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.gopen import Pipe, gopen_schemes

from lcm.data import commands, loader, pictures, samples, tally
from lcm.data import config as lcm_config
from lcm.data import shards as lcm_shards
from lcm.data import stream as lcm_stream
from lcm.data.config import DataConfig
from lcm.data.loader import TrainingData
from lcm.data.shards import expand_shards
from lcm.errors import UserError

GREY = np.full((16, 16, 3), 128, np.uint8)
PNG = encode_image(GREY)
CUT_SHORT = "shard unreadable or cut short"
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
FEW_EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def watchdog():
    """Fails a test that hangs. pytest's failure is no Exception, so that no reader's handler can swallow it."""

    def give_up(*_):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def config(*shards, **options):
    defaults = {"batch_size": 1, "resolution": 16, "seed": 0, "shuffle_buffer_size": 1, "center_crop": True}
    return DataConfig(shards=tuple(map(str, shards)), **{**defaults, **options})


def take(data, count):
    """The next batches of `data`; nothing of its iterator is left behind."""
    iterator = iter(data)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def captions(batches):
    return [caption for batch in batches for caption in batch["captions"]]


def members(key, caption=None, picture=PNG, **more):
    """(name, bytes) pairs of one sample; `more` are suffixes and their bytes."""
    sample = {"png": picture, "txt": caption.encode() if caption is not None else None, **more}
    return [(f"{key}.{suffix}", data) for suffix, data in sample.items() if data is not None]


def shard_of(path, *names, picture=PNG):
    """A shard with that picture for each caption."""
    return write_tar(path, [pair for i, name in enumerate(names) for pair in members(f"{i:04d}", name, picture)])


def first_after(tmp_path, bad_members, **options):
    """Read a shard of `bad_members` and then one good sample. Returns (captions up to the good one, skip tally)."""
    path = write_tar(tmp_path / "bad.tar", [*bad_members, *members("zzz", "the good one")])
    data = TrainingData(config(path, **options))
    seen = []
    for batch in data:
        seen += batch["captions"]
        if "the good one" in seen:
            return seen[:-1], dict(data.tally.skipped)


def read_one(tmp_path, picture, suffix="png", resolution=16, **options):
    """The one batch of one picture of the given bytes."""
    path = write_tar(tmp_path / "one.tar", [(f"a.{suffix}", picture), ("a.txt", b"")])
    return take(TrainingData(config(path, resolution=resolution, **options)), 1)[0]


def frozen(batches):
    """What can be compared bit for bit."""
    return [
        (b["pixels"].numpy().tobytes(), b["captions"], b["original_sizes"].tolist(), b["crops"].tolist())
        for b in batches
    ]


def png_header(width, height):
    """A PNG that is a header of that size and nothing else."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"0" * 16))
        + chunk(b"IEND", b"")
    )


# What is read.


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_ever_unpickled(tmp_path):
    trace = tmp_path / "it_ran"
    pickled = pickle.dumps(Payload(trace))
    numpy_file = tmp_path / "payload.npy"
    np.save(numpy_file, np.array([Payload(trace)], dtype=object), allow_pickle=True)
    torch.save(Payload(trace), tmp_path / "payload.pth")
    hostile = {
        "pyd": pickled, "pickle": pickled, "pkl": pickled, "npy": numpy_file.read_bytes(),
        "pth": (tmp_path / "payload.pth").read_bytes(), "PYD": pickled, "txt.pyd": pickled, "json.pickle": pickled,
    }  # fmt: skip
    trace.unlink(missing_ok=True)
    path = write_tar(tmp_path / "a.tar", members("a", "used", **hostile) + members("b", "used too"))
    assert captions(take(TrainingData(config(path)), 2)) == ["used", "used too"]
    assert not trace.exists()
    pickle.loads(pickled).close()
    assert trace.exists()  # the payload is a real one


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG", "Png", "WEBP"])
def test_picture_formats(tmp_path, suffix):
    picture = np.full((16, 16, 3), (250, 128, 5), np.uint8)
    pixels = read_one(tmp_path, encode_image(picture, suffix.lower(), quality=95), suffix)["pixels"]
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == torch.float32
    expected = torch.tensor([250, 128, 5]) / 127.5 - 1
    assert (pixels - expected[:, None, None]).abs().max() < 0.05


def test_the_picture_decides_over_its_suffix(tmp_path):
    assert read_one(tmp_path, encode_image(GREY, "webp", lossless=True), "jpg")["pixels"].unique().numel() == 1


def test_captions(tmp_path):
    lists = json.dumps({"caption": ["one", "two"], "text": "three"}).encode()
    pairs = [
        *members("a", " a caption\n"),
        *members("b", text="ärger 猫".encode()),
        *members("c", caption=None, CAPTION=b"upper case"),
        *members("d", json=json.dumps({"caption": "in the JSON"}).encode()),
        *members("e", "the file wins", json=lists),
        *members("f", ""),
        *members("g", json=b'{"caption": ""}'),
        *members("h", txt="\ufeffwith a byte order mark".encode()),
        *members("i", json=lists),
    ]
    path = write_tar(tmp_path / "a.tar", pairs)
    data = TrainingData(config(path))
    *fixed, from_list = captions(take(data, 9))
    assert fixed == [
        "a caption", "ärger 猫", "upper case", "in the JSON", "the file wins", "", "", "with a byte order mark",
    ]  # fmt: skip
    assert from_list in ("one", "two") and not data.tally.skipped
    assert set(captions(take(data, 180))[8::9]) == {"one", "two"}  # any of the list, over some passes
    assert captions(take(TrainingData(config(path, caption_key="text")), 7))[-1] == "three"


@pytest.mark.parametrize(("proportion", "low", "high"), [(0, 0, 0), (0.25, 60, 140), (1, 400, 400)])
def test_proportion_of_empty_prompts(tmp_path, proportion, low, high):
    path = shard_of(tmp_path / "a.tar", *["full"] * 40)
    emptied = captions(take(TrainingData(config(path, batch_size=40, proportion_empty_prompts=proportion)), 10))
    assert low <= emptied.count("") <= high and set(emptied) <= {"", "full"}


# From pictures to pixels.


def test_pixel_values_are_exact(tmp_path):
    picture = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    pixels = read_one(tmp_path, encode_image(picture))["pixels"]
    assert pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(pixels[0, 0], torch.arange(256).reshape(16, 16) / 127.5 - 1)


def test_center_crop_takes_the_middle(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    for upright in (False, True):
        given_picture = picture.transpose(1, 0, 2) if upright else picture
        middle = given_picture[16:32] if upright else given_picture[:, 16:32]
        batch = read_one(tmp_path, encode_image(given_picture))
        np.testing.assert_array_equal(((batch["pixels"][0] + 1) * 127.5).round(), middle.transpose(2, 0, 1))
        assert batch["crops"].tolist() == [[16, 0] if upright else [0, 16]] and batch["crops"].dtype == torch.int64
        assert batch["original_sizes"].tolist() == [[48, 16] if upright else [16, 48]]


def test_random_crop_varies_and_is_what_is_reported(tmp_path):
    # torchvision's rule: the longer side becomes int(16 * 37 / 20) = 29, not 30, so that 14 crops fit.
    picture = np.random.default_rng(0).integers(0, 256, (20, 37, 3), dtype=np.uint8)
    path = shard_of(tmp_path / "a.tar", *[""] * 100, picture=encode_image(picture))
    batches = take(TrainingData(config(path, batch_size=100, center_crop=False)), 3)
    tops, lefts = torch.cat([b["crops"] for b in batches]).T.tolist()
    assert set(tops) == {0} and set(lefts) == set(range(14))
    by_left = {left: p for b in batches for (_, left), p in zip(b["crops"].tolist(), b["pixels"], strict=True)}
    for left in range(13):  # neighbouring crops are the same picture, moved by a pixel
        assert torch.equal(by_left[left][:, :, 1:], by_left[left + 1][:, :, :-1])
    center = take(TrainingData(config(path)), 1)[0]
    assert center["crops"].tolist() == [[0, 6]] and torch.equal(center["pixels"][0], by_left[6])


def test_random_flip_mirrors_half(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = shard_of(tmp_path / "a.tar", *[""] * 200, picture=encode_image(picture))
    upright = torch.from_numpy(picture.transpose(2, 0, 1).copy()) / 127.5 - 1
    pixels = take(TrainingData(config(path, batch_size=200, random_flip=True)), 1)[0]["pixels"]
    mirrored = [torch.equal(p, upright.flip(2)) for p in pixels]
    assert 60 < sum(mirrored) < 140
    assert all(was_mirrored or torch.equal(p, upright) for p, was_mirrored in zip(pixels, mirrored, strict=True))
    assert torch.equal(take(TrainingData(config(path)), 1)[0]["pixels"][0], upright)


def test_interpolation_types(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    resized = {
        name: (read_one(tmp_path, encode_image(picture), interpolation_type=name)["pixels"][0] + 1) * 127.5
        for name in ("bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos")
    }
    np.testing.assert_array_equal(resized["nearest_exact"].round(), picture[1::2, 1::2].transpose(2, 0, 1))
    means = picture.reshape(16, 2, 16, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(resized["box"].numpy() - means).max() < 1.01  # Pillow rounds twice
    assert torch.equal(resized.pop("nearest"), resized["nearest_exact"])
    for one, other in itertools.combinations(resized, 2):
        assert (resized[one] - resized[other]).abs().max() > 2, (one, other)


def test_small_pictures_are_enlarged(tmp_path):
    batch = read_one(tmp_path, encode_image(GREY[:3, :5]))
    assert batch["pixels"].shape == (1, 3, 16, 16) and batch["original_sizes"].tolist() == [[3, 5]]
    assert (batch["pixels"] - (128 / 127.5 - 1)).abs().max() < 1e-6


# An orientation says where the picture's first row and column belong; all of these are shown red above blue.
@pytest.mark.parametrize(("orientation", "rot90"), [(1, 0), (3, 2), (6, 1), (8, 3)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(tmp_path, suffix, orientation, rot90):
    shown = np.zeros((32, 16, 3), np.uint8)
    shown[:16, :, 0] = shown[16:, :, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(np.rot90(shown, rot90))
    batch = read_one(tmp_path, encode_image(stored, suffix, exif=exif, quality=95))
    assert batch["original_sizes"].tolist() == [[32, 16]] and batch["crops"].tolist() == [[8, 0]]
    red, _, blue = batch["pixels"][0]
    assert red[:7].min() > 0.8 > -0.8 > blue[:7].max() and blue[9:].min() > 0.8 > -0.8 > red[9:].max()


def palette_picture(transparency=None):
    """Top half index 0, red; lower half index 1, green. `transparency` is an index, or an alpha for each."""
    image = Image.fromarray(np.repeat([0, 1], 128).astype(np.uint8).reshape(16, 16)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    return encode_image(image, **({} if transparency is None else {"transparency": transparency}))


def constant(mode, value):
    return Image.new(mode, (16, 16), value)


@pytest.mark.parametrize(
    ("picture", "top", "bottom"),
    [
        (encode_image(constant("1", 1)), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("L", 77)), (77, 77, 77), (77, 77, 77)),
        (encode_image(constant("L", 77), "jpg"), (77, 77, 77), (77, 77, 77)),
        (encode_image(np.full((16, 16), 0x8001, np.uint16)), (128, 128, 128), (128, 128, 128)),
        (encode_image(np.full((16, 16), 0xFFFF, np.uint16)), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("LA", (0, 0))), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("LA", (10, 255))), (10, 10, 10), (10, 10, 10)),
        (encode_image(constant("RGBA", (255, 0, 0, 0))), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("RGBA", (200, 0, 0, 51))), (244, 204, 204), (244, 204, 204)),  # a fifth of the colour
        (encode_image(constant("RGBA", (9, 8, 7, 0)), "webp", lossless=True), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255), (255, 255, 255)),
        (palette_picture(), (255, 0, 0), (0, 255, 0)),
        (palette_picture(1), (255, 0, 0), (255, 255, 255)),
        (palette_picture(b"\x00\xff"), (255, 255, 255), (0, 255, 0)),
        (encode_image(constant("CMYK", (0, 255, 255, 0)), "jpg"), (255, 0, 0), (255, 0, 0)),
    ],
    ids=["bits", "grey", "grey-jpeg", "grey16", "white16", "LA-clear", "LA", "RGBA-clear", "RGBA-fifth", "webp-clear",
         "RGB-key", "palette", "palette-index", "palette-alphas", "CMYK"],
)  # fmt: skip
def test_colour_modes(tmp_path, picture, top, bottom):
    pixels = (read_one(tmp_path, picture)["pixels"][0] + 1) * 127.5
    for rows, colour in ((pixels[:, :8], top), (pixels[:, 8:], bottom)):
        assert (rows - torch.tensor(colour)[:, None, None]).abs().max() < 1.5


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = {"save_all": True, "append_images": [constant("RGB", "blue")]}
    for suffix, options in (("webp", {"lossless": True}), ("png", {})):
        pixels = read_one(tmp_path, encode_image(constant("RGB", "red"), suffix, **frames, **options))["pixels"]
        assert pixels[0, :, 0, 0].tolist() == [1, -1, -1]


# What cannot be used is counted, and never stops a stream.

CUT_PICTURE = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[:2000]
WIDE = {"width_key": "width", "height_key": "height", "min_image_size": 10}
SCORED = {"max_watermark_probability": 0.5}


@pytest.mark.parametrize(
    ("bad", "options", "reason"),
    [
        (members("a", "x", CUT_PICTURE), {}, "picture unreadable"),
        (members("a", "x", None, jpg=encode_image(GREY, "jpg")[:-20]), {}, "picture unreadable"),
        (members("a", "x", None, webp=encode_image(GREY, "webp")[:-20]), {}, "picture unreadable"),
        (members("a", "x", b"this is no picture"), {}, "picture unreadable"),
        (members("a", "x", b""), {}, "picture unreadable"),
        (members("a", "x", b"GIF89a" + bytes(50)), {}, "picture unreadable"),
        (members("a", "x", png_header(100_000, 100_000)), {}, "picture too large"),
        (members("a", "x", encode_image(GREY[:1].repeat(64, 1))), {}, "picture too thin"),
        (members("a", "x", png_header(60_000, 1)), {}, "picture too thin"),
        (members("a", "x" * (1 << 20) + "y"), {}, "member too large"),
        (members("a", "x", json=b'{"a": "' + b"x" * (1 << 20) + b'"}'), {}, "member too large"),
        (members("a", "x", encode_image(GREY) + bytes(1 << 28)), {}, "member too large"),
        (members("a"), {}, "no caption"),
        (members("a", json=b'{"text": "x"}'), {}, "no caption"),
        (members("a", json=b'{"caption": null}'), {}, "no caption"),
        (members("a", json=b'{"caption": []}'), {}, "no caption"),
        (members("a", json=b'{"caption": [3]}'), {}, "no caption"),
        (members("a", text=b"caf\xe9"), {}, "caption is not UTF-8"),
        (members("a", json=b'{"caption": "cut short \\ud83d"}'), {}, "caption is not UTF-8"),
        (members("a", json=b'{"caption": ["\\udc00"]}'), {}, "caption is not UTF-8"),
        (members("a", json=b"[]"), {}, "JSON unreadable"),
        (members("a", json=b"NaN"), {}, "JSON unreadable"),
        (members("a", json=b"{"), {}, "JSON unreadable"),
        (members("a", json=b""), {}, "JSON unreadable"),
        (members("a", json=b"\xff\xfe\xff"), {}, "JSON unreadable"),
        (members("a", json=b"[" * 200_000), {}, "JSON unreadable"),
        (members("a", json=b'{"a":' * 100_000), {}, "JSON unreadable"),
        (members("a", json=b'{"caption": ' + b"9" * 5000 + b"}"), {}, "JSON unreadable"),
        (members("a", "x", None), {}, "no picture"),
        (members("a", "x", None, gif=b"GIF89a"), {}, "no picture"),
        (members("a", None, None, gif=b"GIF89a"), {}, "no picture"),
        (members("a.with.dots", "x"), {}, "no picture"),
        (members("a", "x", json=b"{}"), WIDE, "JSON lacks a number"),
        (members("a", "x"), WIDE, "JSON lacks a number"),
        (members("a", "x", json=b'{"width": 99, "height": "99"}'), WIDE, "JSON lacks a number"),
        (members("a", "x", json=b'{"width": 99, "height": true}'), WIDE, "JSON lacks a number"),
        (members("a", "x", json=b'{"width": NaN, "height": 99}'), WIDE, "JSON lacks a number"),
        (members("a", "x", json=b'{"width": -Infinity, "height": 99}'), WIDE, "JSON lacks a number"),
        (members("a", "x", json=b'{"width": 1e30, "height": 1e30}'), WIDE, "JSON lacks a number"),
        (members("a", "x", json=b'{"width": 1%b, "height": 99}' % (b"0" * 400)), WIDE, "JSON lacks a number"),
        (members("a", "x", json=b'{"width": 99, "height": 9}'), WIDE, "smaller than --min_image_size"),
        (members("a", "x", encode_image(GREY[:9])), {"min_image_size": 10}, "smaller than --min_image_size"),
        (members("a", "x", json=b'{"pwatermark": 0.51}'), SCORED, "watermark too probable"),
        (members("a", "x", json=b'{"pwatermark": 1%b}' % (b"0" * 400)), SCORED, "JSON lacks a number"),
        (members("a", "x", json=b'{"pwatermark": "0.1"}'), SCORED, "JSON lacks a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_counted(tmp_path, bad, options, reason):
    scores = b'{"width": 10, "height": 10, "pwatermark": 0.5}'  # on the edge of what the filters let through
    path = write_tar(tmp_path / "a.tar", bad + members("b", "good", json=scores))
    data = TrainingData(config(path, **options))
    (batch,) = take(data, 1)
    assert batch["captions"] == ["good"]
    assert dict(data.tally.skipped) == {reason: 1} and data.tally.used == 1


@pytest.mark.parametrize("json", [b"{}", b'{"pwatermark": null}', None])
def test_samples_without_a_score_pass_the_filter_and_are_counted(tmp_path, json):
    """As in the public scripts. Where there is no JSON at all nothing is counted: such a data set has no scores."""
    path = write_tar(tmp_path / "a.tar", members("a", "x", json=json) + members("b", "y", json=b'{"pwatermark": 0.1}'))
    for limit, counted in ((0.5, json is not None), (None, False)):
        data = TrainingData(config(path, max_watermark_probability=limit))
        assert captions(take(data, 2)) == ["x", "y"] and not data.tally.skipped
        assert data.tally.unscored == counted
    assert tally.Tally(3, 2).as_scalars() == {"samples/used": 3, "samples/without_pwatermark": 2}


def test_sizes_come_from_the_json_or_from_the_picture(tmp_path):
    path = write_tar(tmp_path / "a.tar", members("a", "x", json=b'{"w": 640.0, "h": 480}'))
    named = take(TrainingData(config(path, width_key="w", height_key="h", min_image_size=480)), 1)[0]
    assert named["original_sizes"].tolist() == [[480, 640]] and named["original_sizes"].dtype == torch.int64
    assert take(TrainingData(config(path)), 1)[0]["original_sizes"].tolist() == [[16, 16]]


def test_duplicate_members_are_counted_and_the_first_is_used(tmp_path):
    bad = [*members("a", "first"), ("a.txt", b"second"), ("a.PNG", b"third")]
    assert first_after(tmp_path, bad) == (["first"], {"duplicate member": 2})


def test_the_tally_of_several_passes(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*members("a"), *members("b", "x", b""), *members("c"), *members("d", "ok")])
    data = TrainingData(config(path, batch_size=2))
    take(data, 5)
    assert dict(data.tally.skipped) == {"no caption": 20, "picture unreadable": 10} and data.tally.used == 10
    assert tally.describe(data.tally.skipped) == "20 x no caption, 10 x picture unreadable"


def test_a_problem_is_told_once_and_counted_ever_after(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG), ("b.png", PNG), ("c.png", PNG), *members("z", "good")])
    take(TrainingData(config(path)), 4)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "no caption" in record.getMessage() and path in record.getMessage()


def cut_tar(tmp_path, size):
    whole = shard_of(tmp_path / "whole.tar", *(f"picture {i}" for i in range(6)))
    cut = tmp_path / "cut.tar"
    with open(whole, "rb") as file:
        cut.write_bytes(file.read()[:size])
    return cut


# A sample is four blocks of 512 bytes: the picture's header, the picture, the caption's header, the caption.
@pytest.mark.parametrize(
    "size", [3 * 2048 + 600, 3 * 2048 + 512, 3 * 2048 + 100, 3 * 2048, 3 * 2048 + 1024, 3 * 2048 + 1600]
)
def test_a_shard_that_is_cut_short(tmp_path, size):
    assert len(PNG) < 512
    data = TrainingData(config(cut_tar(tmp_path, size), shard_of(tmp_path / "good.tar", "good")))
    seen = captions(take(data, 12))
    assert {"picture 0", "picture 1", "good"} <= set(seen) <= {"picture 0", "picture 1", "picture 2", "good"}
    # A sample at the cut may have lost its caption, or a JSON that would have followed: it need not be used.
    assert data.tally.skipped[CUT_SHORT] in (2, 3, 4, 5) and set(data.tally.skipped) <= {CUT_SHORT, "no caption"}


def test_a_broken_header_in_the_middle_is_no_end(tmp_path):
    path = tmp_path / "a.tar"
    shard_of(path, *(f"picture {i}" for i in range(6)))
    content = bytearray(path.read_bytes())
    content[3 * 2048 : 3 * 2048 + 50] = b"\xff" * 50
    path.write_bytes(content)
    data = TrainingData(config(path))
    assert set(captions(take(data, 8))) <= {"picture 0", "picture 1", "picture 2"}
    assert data.tally.skipped[CUT_SHORT] >= 2


@pytest.mark.parametrize("content", [b"", b"this is no tar", bytes(511), b"\x1f\x8b\x08broken gzip", b"\xff" * 5000])
def test_a_shard_that_is_no_tar(tmp_path, content):
    (tmp_path / "bad.tar").write_bytes(content)
    data = TrainingData(config(tmp_path / "bad.tar", shard_of(tmp_path / "good.tar", "good"), seed=1))
    assert set(captions(take(data, 4))) == {"good"}
    assert set(data.tally.skipped) == {CUT_SHORT} and data.tally.skipped[CUT_SHORT] in (3, 4)


def test_a_shard_that_vanished_and_one_that_is_a_folder(tmp_path):
    good = shard_of(tmp_path / "good.tar", "good")
    data = TrainingData(config(tmp_path / "gone.tar", tmp_path, good, "unknown://x/y.tar"))
    assert set(captions(take(data, 4))) == {"good"}
    assert set(data.tally.skipped) == {CUT_SHORT} and 9 <= data.tally.skipped[CUT_SHORT] <= 12


def test_a_pipe(tmp_path):
    path = shard_of(tmp_path / "a.tar", "a", "b")
    data = TrainingData(config(f"pipe:cat {path}"))
    assert captions(take(data, 4)) == ["a", "b", "a", "b"] and not data.tally.skipped


def test_a_command_that_fails_is_counted_and_loses_nothing_that_it_wrote(tmp_path):
    path = shard_of(tmp_path / "a.tar", *"abcdef")
    for _ in range(5):  # whichever is faster, the command or its reader
        data = TrainingData(config(f"pipe:cat {path}; exit 3"))
        assert captions(take(data, 7)) == list("abcdefa")
        assert dict(data.tally.skipped) == {CUT_SHORT: 1}
    data = TrainingData(config("pipe:exit 3", path))
    assert set(captions(take(data, 12))) == set("abcdef") and set(data.tally.skipped) == {CUT_SHORT}


def test_a_command_that_is_left_early_complains_to_nobody(tmp_path):
    large = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = shard_of(tmp_path / "a.tar", *map(str, range(40)), picture=large)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pytest.PytestUnraisableExceptionWarning)
        for shard in (f"pipe:cat {path} || exit 1", f"pipe:dd if={path} bs=1k 2>&1 || exit 1"):
            assert captions(take(TrainingData(config(shard)), 1)) == ["0"]
            reader = lcm_shards.read_shard(shard)
            next(reader)
            reader.close()
            gc.collect()


def children_of(process):
    """The processes below this one, by their commands."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(child.cmdline()))
    return found


@pytest.mark.parametrize("command", ["cat {path}; sleep 1234", "head -c 3000 {path}; sleep 1234 | cat", "sleep 1234"])
def test_a_command_that_stalls_is_ended_and_counted(tmp_path, caplog, command):
    path = shard_of(tmp_path / "a.tar", *"abc")
    good = shard_of(tmp_path / "good.tar", "good")
    data = TrainingData(config("pipe:" + command.format(path=path), good, shard_timeout=0.3))
    seen = captions(take(data, 8))
    assert "good" in seen and set(seen) <= {"a", "b", "c", "good"}
    assert data.tally.skipped[CUT_SHORT] >= 1
    assert "0.3 s (--shard_timeout)" in caplog.text
    assert not [line for line in children_of(psutil.Process()) if "sleep 1234" in line]


def test_a_slow_command_is_not_a_stalled_one(tmp_path):
    path = shard_of(tmp_path / "a.tar", *"abc")
    slow = f"pipe:for i in 1 2 3 4 5 6 7; do dd if={path} bs=1536 skip=$((i-1)) count=1 status=none; sleep 0.2; done"
    data = TrainingData(config(slow, shard_timeout=0.9))
    assert captions(take(data, 3)) == ["a", "b", "c"] and not data.tally.skipped


def test_a_run_that_ends_leaves_no_command_behind(tmp_path):
    large = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = shard_of(tmp_path / "a.tar", *"abcdef", picture=large)
    data = TrainingData(config(f"pipe:cat {path}; sleep 1235", num_workers=2))
    iterator = iter(data)
    assert next(iterator)["captions"]
    iterator.close()
    del iterator
    gc.collect()
    assert not [line for line in children_of(psutil.Process()) if "sleep 1235" in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_does_not_reach_the_commands(tmp_path, number):
    path = shard_of(tmp_path / "a.tar", *"abc")
    data = TrainingData(config(f"pipe:head -c 2048 {path}; sleep 0.5; tail -c +2049 {path}"))
    before = signal.signal(number, lambda *_: None)  # as a training process has one

    def send():
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.send_signal(number)

    timer = threading.Timer(0.2, send)
    timer.start()
    try:
        assert captions(take(data, 3)) == ["a", "b", "c"] and not data.tally.skipped
    finally:
        timer.join()
        signal.signal(number, before)


# What is not the data's fault.


def test_running_out_of_memory_is_no_unreadable_picture(tmp_path, monkeypatch):
    def transpose(image):
        raise MemoryError

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", transpose)
    path = shard_of(tmp_path / "a.tar", "a")
    for num_workers in (0, 2):
        with pytest.raises(UserError, match=r"^--shuffle_buffer_mb: out of memory .*--dataloader_num_workers"):
            take(TrainingData(config(path, num_workers=num_workers)), 1)


def test_an_error_in_our_own_code_is_no_unreadable_shard(tmp_path, monkeypatch):
    def max_size(name):
        raise KeyError("a mistake")

    monkeypatch.setattr(lcm_shards, "max_size", max_size)
    with pytest.raises(KeyError, match="a mistake"):
        list(lcm_shards.read_shard(shard_of(tmp_path / "a.tar", "a")))


def kill_a_worker():
    """Kill one data worker of this process, as the kernel does where memory is short."""
    multiprocessing.active_children()[0].kill()


@pytest.mark.parametrize("moments", [{0}, {3, 6}])
def test_a_data_worker_that_died_is_started_anew_at_its_place(messy_shards, caplog, moments):
    run = config(*messy_shards, num_workers=2, batch_size=2, shuffle_buffer_size=3, **RANDOM)
    whole, data = TrainingData(run), TrainingData(run)
    expected, seen = take(whole, 9), []
    batches = iter(data)
    for step in range(9):
        seen.append(next(batches))
        if step in moments:
            kill_a_worker()
            for _ in range(50):  # nothing is raised while the training step runs
                time.sleep(0.001)
    batches.close()
    assert frozen(seen) == frozen(expected) and data.state_dict() == whole.state_dict()
    assert "restarting all of them" in caplog.text


def test_data_workers_that_die_again_and_again_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "transform", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(loader, "MAX_DEATHS_IN_A_ROW", 2)  # torch takes 5 s to see each
    data = TrainingData(config(shard_of(tmp_path / "a.tar", "a"), num_workers=1))
    with pytest.raises(UserError, match=r"^--dataloader_num_workers: data workers died 2 times in a row"):
        take(data, 1)


def test_a_token_in_a_failed_command_is_not_logged(tmp_path, monkeypatch, caplog):
    # As webdataset's own hf:// does, which takes the token from the Hub client's settings, not from our options.
    def opener(url, mode, bufsize):
        return Pipe(["sh", "-c", "exit 22", "Authorization:Bearer hf_secret"], mode=mode)

    monkeypatch.setitem(gopen_schemes, "hf", opener)
    data = TrainingData(config("hf://datasets/x/y.tar", shard_of(tmp_path / "good.tar", "good")))
    take(data, 3)
    assert data.tally.skipped[CUT_SHORT] >= 2 and "hf://datasets/x/y.tar" in caplog.text
    assert "hf_secret" not in caplog.text


def test_shards_from_a_web_server(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    shard_of(tmp_path / "a.tar", "a", "b")
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        (shard,) = expand_shards([f"{address}/a.tar"])
        data = TrainingData(config(shard))
        assert captions(take(data, 4)) == ["a", "b", "a", "b"] and not data.tally.skipped
        data = TrainingData(config(shard, f"{address}/missing.tar"))
        assert set(captions(take(data, 5))) == {"a", "b"}
        assert set(data.tally.skipped) == {CUT_SHORT} and data.tally.skipped[CUT_SHORT] in (2, 3)
        server.shutdown()


# A pass without a usable sample.


@pytest.mark.parametrize(("num_workers", "num_processes"), [(0, 1), (2, 1), (0, 2), (2, 2), (3, 1), (0, 5)])
def test_a_pass_without_a_usable_sample_is_an_error(tmp_path, num_workers, num_processes):
    shards = [
        write_tar(tmp_path / "a.tar", members("a") + members("b", "x", b"")),
        write_tar(tmp_path / "b.tar", members("a", "x", encode_image(GREY[:8]))),
        write_tar(tmp_path / "c.tar", []),
    ]
    for rank in range(num_processes):
        split = {"num_workers": num_workers, "num_processes": num_processes, "rank": rank}
        data = TrainingData(config(*shards, min_image_size=10, **split))
        with pytest.raises(UserError, match=r"^--train_shards_path_or_url: ") as caught:
            next(iter(data))
        for reason in ("no caption", "picture unreadable", "smaller than --min_image_size"):
            assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("num_workers", "num_processes"), [(0, 1), (2, 1), (3, 1), (0, 2), (0, 3), (2, 2), (0, 5)])
@pytest.mark.parametrize("again", [False, True])
def test_shards_that_went_bad_on_the_way_are_an_error(tmp_path, num_workers, num_processes, again):
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path in paths:
        shard_of(path, *"abcdef")
    shards = [*paths, paths[0]] if again else paths  # one that is named twice is read twice
    data = TrainingData(config(*shards, num_workers=num_workers, num_processes=num_processes, seed=8))
    batches = iter(data)
    assert len(list(itertools.islice(batches, 9))) == 9
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match=CUT_SHORT):
        for _ in batches:
            pass


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_bad", [0, 1, 7])
def test_one_good_sample_is_found(tmp_path, num_processes, num_bad):
    bad = [write_tar(tmp_path / f"{i}.tar", members("a")) for i in range(num_bad)]
    good = shard_of(tmp_path / "good.tar", "good")
    for seed, rank in itertools.product(range(8), range(num_processes)):
        data = TrainingData(config(good, *bad, seed=seed, rank=rank, num_processes=num_processes, batch_size=2))
        assert captions(take(data, 2)) == ["good"] * 4


@pytest.mark.parametrize("num_bad", [0, 5])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_one_good_sample_is_found_by_workers(tmp_path, num_bad, num_processes):
    bad = [write_tar(tmp_path / f"{i}.tar", members("a")) for i in range(num_bad)]
    good = shard_of(tmp_path / "good.tar", "good")
    for seed in range(3):
        data = TrainingData(config(good, *bad, seed=seed, num_workers=2, num_processes=num_processes, batch_size=2))
        assert captions(take(data, 3)) == ["good"] * 6


# Order.


@pytest.fixture(scope="module")
def clean_shards(tmp_path_factory):
    """Five shards of four samples with captions "picture <shard> <index>"."""
    return expand_shards([write_shards(tmp_path_factory.mktemp("clean"), num_shards=5, samples_per_shard=4)])


ALL_CAPTIONS = sorted(f"picture {shard} {i}" for shard in range(5) for i in range(4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_seed_decides_the_batches(clean_shards, num_workers):
    def batches(seed):
        options = {"random_flip": True, "center_crop": False, "shuffle_buffer_size": 8, "batch_size": 3}
        return frozen(take(TrainingData(config(*clean_shards, seed=seed, num_workers=num_workers, **options)), 12))

    first = batches(3)
    assert first == batches(3)
    assert [b[1] for b in first] != [b[1] for b in batches(4)]


@pytest.mark.parametrize("block", [1, 3, 4, 7, 20, 1000])
def test_a_pass_holds_every_sample_once(clean_shards, block):
    data = TrainingData(config(*clean_shards, shuffle_buffer_size=block))
    passes = [captions(take(data, 20)) for _ in range(3)]
    assert all(sorted(one) == ALL_CAPTIONS for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_samples_are_shuffled(clean_shards):
    in_blocks = captions(take(TrainingData(config(*clean_shards, shuffle_buffer_size=4)), 20))
    unshuffled = captions(take(TrainingData(config(*clean_shards)), 20))
    assert [sorted(in_blocks[i : i + 4]) for i in range(0, 20, 4)] == [unshuffled[i : i + 4] for i in range(0, 20, 4)]
    assert in_blocks != unshuffled
    assert unshuffled[::4] != sorted(unshuffled[::4])  # the shards are shuffled even then
    # In one large block samples of different shards mix: rarely are two neighbours of one shard.
    mixed = captions(take(TrainingData(config(*clean_shards, shuffle_buffer_size=100)), 20))
    assert sum(one[:9] == other[:9] for one, other in itertools.pairwise(mixed)) < 10


def one_pass(stream_config, index):
    """The captions of a stream's first pass. Batches must be of one sample."""
    items = iter(lcm_stream.Stream(stream_config, index))
    mine = itertools.takewhile(lambda item: item.batch is not None and item.position.pass_index == 0, items)
    return [item.batch["captions"][0] for item in mine]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 2), (2, 0), (2, 2), (3, 1), (2, 3), (7, 0), (3, 8)])
def test_all_streams_together_use_every_sample_once(clean_shards, num_shards, num_processes, num_workers):
    shared = config(
        *clean_shards[:num_shards], num_workers=num_workers, num_processes=num_processes, shuffle_buffer_size=3
    )
    used = [
        one_pass(replace(shared, rank=rank), index)
        for rank in range(num_processes)
        for index in range(max(1, num_workers))
    ]
    assert sorted(itertools.chain.from_iterable(used)) == ALL_CAPTIONS[: 4 * num_shards]
    if len(used) <= num_shards * 4:
        assert all(used)


def test_workers_and_processes_see_different_samples(clean_shards):
    data = TrainingData(config(*clean_shards[:4], num_workers=2))
    assert sorted(captions(take(data, 16))) == ALL_CAPTIONS[:16]  # two streams of two shards each, in turn
    ranks = [TrainingData(config(*clean_shards[:4], num_workers=2, num_processes=2, rank=rank)) for rank in (0, 1)]
    of_rank = [captions(take(data, 8)) for data in ranks]
    assert sorted(of_rank[0] + of_rank[1]) == ALL_CAPTIONS[:16]


def uses(shards, num_streams, num_passes, **options):
    """How often each caption was used, over so many passes of `num_streams` processes that step together."""
    run = config(*shards, num_processes=num_streams, **options)
    ranks = [iter(TrainingData(replace(run, rank=rank))) for rank in range(num_streams)]
    counts, total = Counter(), sum(1 for shard in set(shards) for _ in lcm_shards.read_shard(str(shard)))
    for rank in itertools.islice(itertools.cycle(ranks), num_passes * total):
        counts.update(next(rank)["captions"])
    assert len(counts) == total or num_passes == 1
    for rank in ranks:
        rank.close()
    return counts


def test_all_samples_are_used_equally_often(tmp_path):
    sizes = {"equal": [6, 6, 6], "unequal": [20, 20, 2]}
    for kind, counts in sizes.items():
        shards = [shard_of(tmp_path / f"{kind}{i}.tar", *(f"{i} {j}" for j in range(n))) for i, n in enumerate(counts)]
        for block in (1, 4, 100):
            counted = uses(shards, 4, num_passes=20, shuffle_buffer_size=block)
            assert max(counted.values()) <= 1.1 * min(counted.values())


@FEW_EXAMPLES
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    num_streams=st.integers(1, 7),
    block=st.integers(1, 20),
    cycles=st.integers(1, 3),
    more=st.integers(0, 200),
)
def test_each_stream_uses_each_sample_once_a_cycle(monkeypatch, sizes, num_streams, block, cycles, more):
    """The law behind it: after as many passes as there are streams all samples were used exactly as often, and in
    between no two differ by more than the number of streams."""
    monkeypatch.setattr(lcm_stream, "read_shard", lambda url, _: ((url, i) for i in range(sizes[int(url)])))
    run = config(*range(len(sizes)), num_processes=num_streams, shuffle_buffer_size=block)
    streams = [lcm_stream.Stream(replace(run, rank=rank), 0).shuffled() for rank in range(num_streams)]
    streams = [(sample for *_, sample in stream if sample is not None) for stream in streams]
    counts = Counter({(str(shard), i): 0 for shard, size in enumerate(sizes) for i in range(size)})
    for stream in streams:
        counts.update(itertools.islice(stream, cycles * sum(sizes)))
    assert set(counts.values()) == {cycles * num_streams}
    counts.update(next(stream) for stream in itertools.islice(itertools.cycle(streams), more))
    assert max(counts.values()) - min(counts.values()) <= num_streams


def test_streams_of_equal_shards_begin_apart(clean_shards):
    for num_streams in (1, 2, 3, 5):
        counted = uses(clean_shards, num_streams, num_passes=1, shuffle_buffer_size=1000)
        assert max(counted.values()) <= 2  # 5 shards in 2 or 3 shares cannot be cut evenly
        if num_streams in (1, 5):
            assert sorted(counted) == ALL_CAPTIONS


class Held(dict):
    """A sample that can be seen to be let go of."""

    __hash__ = object.__hash__


def test_one_block_and_no_more_is_held(monkeypatch):
    held, most = weakref.WeakSet(), 0

    def read(url, timeout):
        for i in range(500):
            held.add(sample := Held(png=bytes(100), number=i))
            yield sample

    monkeypatch.setattr(lcm_stream, "read_shard", read)
    stream = lcm_stream.Stream(config("a", shuffle_buffer_size=100), 0).shuffled()
    for _ in itertools.islice(stream, 1000):
        most = max(most, len(held))
    assert 100 <= most <= 103  # one is with the consumer, and one was just read


def test_a_block_ends_early_where_its_samples_are_large(tmp_path):
    large = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = shard_of(tmp_path / "a.tar", *(f"{i:02d}" for i in range(12)), picture=large)
    run = config(path, shuffle_buffer_size=1000, shuffle_buffer_mb=3.5 * len(large) / 1e6)
    seen = captions(take(TrainingData(run), 12))
    assert [sorted(seen[i : i + 4]) for i in (0, 4, 8)] == [[f"{i + j:02d}" for j in range(4)] for i in (0, 4, 8)]
    assert seen != sorted(seen)
    for consumed in range(12):
        assert_resumes_exactly(run, consumed, more=6)


def test_what_the_streams_may_hold():
    run = config("a", batch_size=10, resolution=100, shuffle_buffer_mb=5)
    assert run.max_bytes == 5e6 + 300_000  # a block, and a batch
    assert replace(run, num_workers=2).max_bytes == 2 * (5e6 + 3 * 300_000)  # each has two batches more ahead


def test_every_sample_stream_and_pass_has_its_own_chance(tmp_path):
    path = shard_of(tmp_path / "a.tar", *["full"] * 64)
    options = {"batch_size": 32, "shuffle_buffer_size": 32, "proportion_empty_prompts": 0.5, "num_processes": 2}
    batches = [batch for rank in (0, 1) for batch in take(TrainingData(config(path, rank=rank, **options)), 3)]
    drops = [batch["captions"] for batch in batches]
    assert all(8 < one.count("") < 24 for one in drops)
    assert len(set(map(tuple, drops))) == len(drops) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_random_states_are_left_alone(clean_shards, num_workers):
    def states():
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), rest)

    before = states()
    options = {"center_crop": False, "random_flip": True, "shuffle_buffer_size": 8, "proportion_empty_prompts": 0.5}
    take(TrainingData(config(*clean_shards, num_workers=num_workers, **options)), 10)
    assert states() == before
    torch.manual_seed(1)
    random.seed(1)
    again = take(TrainingData(config(*clean_shards, num_workers=num_workers, **options)), 4)
    torch.manual_seed(2)
    random.seed(2)
    assert frozen(again) == frozen(take(TrainingData(config(*clean_shards, num_workers=num_workers, **options)), 4))


def test_nothing_is_left_running(clean_shards):
    def running():
        return {*threading.enumerate(), *multiprocessing.active_children()}

    before = running()
    take(TrainingData(config(*clean_shards, num_workers=2)), 3)
    gc.collect()
    deadline = time.monotonic() + 30
    while running() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() <= before


# Exact resume.


@pytest.fixture(scope="module")
def messy_shards(tmp_path_factory):
    """Shards with everything in them: good samples, bad ones, none at all, a cut, garbage."""
    folder = tmp_path_factory.mktemp("messy")
    rng = np.random.default_rng(0)

    def good(shard, count):
        pairs = []
        for i in range(count):
            picture = encode_image(rng.integers(0, 256, (17, 25, 3), dtype=np.uint8))
            names = json.dumps({"caption": [f"{shard}.{i} one", f"{shard}.{i} two"]}).encode()
            pairs += members(f"{i:03d}", picture=picture, json=names)
        return pairs

    (folder / "garbage.tar").write_bytes(b"garbage" * 100)
    cut = folder / "cut.tar"
    write_tar(cut, good(3, 4))
    cut.write_bytes(cut.read_bytes()[:-9000])
    return (
        write_tar(folder / "0.tar", good(0, 5)),
        write_tar(folder / "1.tar", members("x") + good(1, 3) + members("y", "", b"") + [("y.txt", b"again")]),
        write_tar(folder / "2.tar", members("x") + members("y", "", b"")),
        str(cut),
        str(folder / "garbage.tar"),
    )


def assert_resumes_exactly(run, consumed, more):
    """Taking `consumed` batches, a new start from the saved state and `more` batches is as good as one long run."""
    whole = TrainingData(run)
    batches = iter(whole)
    before = frozen(itertools.islice(batches, consumed))
    state = json.dumps(whole.state_dict())
    after = frozen(itertools.islice(batches, more))
    batches.close()
    resumed = TrainingData(run)
    resumed.load_state_dict(json.loads(state))
    assert json.dumps(resumed.state_dict()) == state
    assert frozen(take(resumed, more)) == after
    assert resumed.tally == whole.tally
    assert resumed.state_dict() == whole.state_dict()
    assert len(before) == consumed and len(after) == more


RANDOM = {"center_crop": False, "random_flip": True, "proportion_empty_prompts": 0.3}


@FEW_EXAMPLES
@given(
    block=st.integers(1, 30),
    batch_size=st.integers(1, 5),
    consumed=st.integers(0, 20),
    num_processes=st.integers(1, 3),
    chosen=st.sets(st.integers(0, 4)).map(lambda indices: indices | {0}),
    seed=st.integers(0, 3),
)
def test_resume_is_exact(messy_shards, block, batch_size, consumed, num_processes, chosen, seed):
    run = config(
        *[messy_shards[i] for i in sorted(chosen)], batch_size=batch_size, shuffle_buffer_size=block, seed=seed,
        num_processes=num_processes, rank=seed % num_processes, **RANDOM,
    )  # fmt: skip
    assert_resumes_exactly(run, consumed, more=7)


@pytest.mark.parametrize(("block", "batch_size", "consumed"), [(4, 2, 5), (1, 3, 6), (50, 1, 13)])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_resume_is_exact_with_workers(messy_shards, num_workers, block, batch_size, consumed):
    options = {"num_workers": num_workers, "batch_size": batch_size, "shuffle_buffer_size": block, **RANDOM}
    assert_resumes_exactly(config(*messy_shards, **options), consumed, more=6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_through_passes_without_a_usable_sample(tmp_path, num_workers):
    bad = [write_tar(tmp_path / f"{i}.tar", members("a") + members("b", "", b"")) for i in range(4)]
    good = shard_of(tmp_path / "good.tar", "good")
    # Three passes or more that hold the good shard, with dry ones between them, make a batch.
    split = {"num_workers": num_workers, "num_processes": 1 if num_workers else 3}
    run = config(good, *bad, batch_size=3, shuffle_buffer_size=2, **split)
    data = TrainingData(run)
    batches, states = iter(data), []
    for _ in range(8):
        next(batches)
        states.append(data.state_dict())
    batches.close()
    if num_workers:  # a single stream's dry passes are over when its batch is there
        assert any(any(state["empty_passes"]) for state in states)
    for consumed in range(7):
        assert_resumes_exactly(run, consumed, more=4)


def test_resume_at_every_batch_of_two_passes(clean_shards):
    for consumed in range(15):
        assert_resumes_exactly(config(*clean_shards, batch_size=3, shuffle_buffer_size=5), consumed, more=4)


def test_resume_twice_and_within_one_object(clean_shards):
    run = config(*clean_shards, batch_size=3, shuffle_buffer_size=6, **RANDOM)
    whole = frozen(take(TrainingData(run), 12))
    data, pieces = TrainingData(run), []
    for count in (1, 4, 2, 5):
        pieces += frozen(take(data, count))
        state = json.loads(json.dumps(data.state_dict()))
        if count != 2:  # once it just goes on
            data = TrainingData(run)
            data.load_state_dict(state)
    assert pieces == whole


def test_no_worker_and_one_worker_are_the_same_stream(messy_shards):
    run = config(*messy_shards, batch_size=2, shuffle_buffer_size=4, **RANDOM)
    data = TrainingData(run)
    first = take(data, 5)
    state = data.state_dict()
    second = take(data, 5)
    worker = TrainingData(replace(run, num_workers=1))
    assert frozen(take(worker, 10)) == frozen(first + second)
    worker = TrainingData(replace(run, num_workers=1))
    worker.load_state_dict(state)
    assert frozen(take(worker, 5)) == frozen(second)


def test_a_saved_state_stays_as_it_is(tmp_path):
    bad = [write_tar(tmp_path / f"{i}.tar", members("a")) for i in range(3)]
    data = TrainingData(config(shard_of(tmp_path / "good.tar", "good"), *bad, batch_size=2, num_workers=2))
    batches, kept = iter(data), []
    for _ in range(8):
        next(batches)
        state = data.state_dict()
        kept.append((state, json.dumps(state)))
    batches.close()
    for state, text in kept:
        assert json.dumps(state) == text


def test_a_resume_reads_one_block_again_and_nothing_else(clean_shards, monkeypatch):
    run = config(*clean_shards, batch_size=2, shuffle_buffer_size=4)
    data = TrainingData(run)
    take(data, 9)  # 18 of 20 samples: in the middle of the last shard, which is the last block
    decoded, opened = [], []
    decode, gopen = lcm_stream.decode_sample, commands.gopen
    monkeypatch.setattr(lcm_stream, "decode_sample", lambda *args: decoded.append(args) or decode(*args))
    monkeypatch.setattr(commands, "gopen", lambda url, *args: opened.append(url) or gopen(url, *args))
    resumed = TrainingData(run)
    resumed.load_state_dict(data.state_dict())
    take(resumed, 1)
    assert len(decoded) == 2  # nothing that was used is decoded again
    assert len(opened) <= 2  # the block's shard, and the one from which the next block is read ahead


def test_another_number_of_workers_is_refused(clean_shards):
    state = TrainingData(config(*clean_shards, num_workers=2)).state_dict()
    for num_workers in (0, 1, 3):
        with pytest.raises(UserError, match=r"^--dataloader_num_workers: .* 2 .* [13]$"):
            TrainingData(config(*clean_shards, num_workers=num_workers)).load_state_dict(state)


# The options.


def test_expand_shards(tmp_path):
    for name in ("000", "001", "002", "extra", "brackets[1]"):
        shard_of(tmp_path / f"{name}.tar", "x")
    at = str(tmp_path)
    numbered = tuple(f"{at}/{i:03d}.tar" for i in range(3))
    assert expand_shards([f"{at}/{{000..002}}.tar"]) == numbered
    assert expand_shards([f"{at}/00{{0,2}}.tar"]) == (numbered[0], numbered[2])
    assert expand_shards([f"{at}/000.tar::{at}/extra.tar"]) == (numbered[0], f"{at}/extra.tar")
    assert expand_shards([f"{at}/{{000..001}}.tar::{at}/extra.tar", numbered[2]]) == (
        *numbered[:2], f"{at}/extra.tar", numbered[2],
    )  # fmt: skip
    assert expand_shards([f"{at}/0*.tar"]) == numbered
    assert expand_shards([f"{at}/00[12].tar"]) == numbered[1:]
    assert expand_shards([f"{at}/brackets[1].tar"]) == (f"{at}/brackets[1].tar",)


def test_expand_shards_takes_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = shard_of(tmp_path / "a.tar", "x")
    assert expand_shards(["~/a.tar"]) == (path,)


def test_addresses_and_commands_are_not_looked_for():
    assert expand_shards(["https://host/{00..01}.tar::pipe:cat no/such/file?*.tar", "s3://b/x.tar"]) == (
        "https://host/00.tar", "https://host/01.tar", "pipe:cat no/such/file?*.tar", "s3://b/x.tar",
    )  # fmt: skip


@pytest.mark.parametrize("absent", ["{007..009}.tar", "nothing*.tar"])
def test_missing_shards_are_logged_and_left_out(tmp_path, caplog, absent):
    path = shard_of(tmp_path / "000.tar", "x")
    assert expand_shards([path, f"{tmp_path}/{absent}"]) == (path,)
    assert "do not exist" in caplog.text and str(tmp_path) in caplog.text


@pytest.mark.parametrize("pattern", ["{0..9}.tar", "*.tar", "a.tar", "", "a.tar::b.tar"])
def test_no_shard_at_all_is_an_error(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--train_shards_path_or_url: .*matches no shard") as caught:
        expand_shards([pattern])
    assert pattern in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["{0..9.tar", "a{b,c.tar", "a}.tar", "http://host/{000..002.tar"])
def test_unbalanced_braces_are_an_error(pattern):
    with pytest.raises(UserError, match=r"^--train_shards_path_or_url: ") as caught:
        expand_shards([pattern])
    assert pattern in str(caught.value) and "\n" not in str(caught.value)


def test_every_option_reaches_the_config():
    named = {
        "resolution": 40, "seed": 7, "interpolation_type": "box", "center_crop": True, "random_flip": True,
        "proportion_empty_prompts": 0.1, "caption_key": "a", "width_key": "b", "height_key": "c", "min_image_size": 3,
        "max_watermark_probability": 0.2, "shuffle_buffer_size": 9, "shuffle_buffer_mb": 3.5, "shard_timeout": 4.5,
    }  # fmt: skip
    args = SimpleNamespace(**named, train_batch_size=5, dataloader_num_workers=2, learning_rate=1)
    made = lcm_config.data_config(args, SimpleNamespace(shards=("a.tar",), seed=7, num_processes=3), rank=1)
    assert made == DataConfig(shards=("a.tar",), batch_size=5, num_workers=2, rank=1, num_processes=3, **named)


# Anything at all.


@FEW_EXAMPLES
@given(
    changes=st.lists(st.tuples(st.integers(0, 6 * 2048 + 1023), st.integers(0, 255)), max_size=4),
    size=st.one_of(st.none(), st.integers(0, 6 * 2048 + 1024)),
)
def test_any_tar_is_used_or_counted(tmp_path, changes, size):
    path = tmp_path / "a.tar"
    shard_of(path, *(f"picture {i}" for i in range(6)))
    content = bytearray(path.read_bytes())
    intact = [content[at] == value for at, value in changes]
    first = min([at for (at, _), same in zip(changes, intact, strict=True) if not same], default=len(content))
    for at, value in changes:
        content[at] = value
    path.write_bytes(content[:size])
    first = min(first, len(content[:size]))
    # The second shard follows in the same pass, or comes before; after 8 good ones a pass of both was complete.
    data = TrainingData(config(path, shard_of(tmp_path / "good.tar", "good")))
    seen = captions(take(data, 14))
    assert "good" in seen
    # The last sample before the damage is whole for certain only if a header of the next one follows.
    sure = [f"picture {i}" for i in range(6) if (i + 1) * 2048 + 512 <= first]
    assert set(sure) <= set(seen)
    if len(set(seen)) < 7:
        assert data.tally.skipped


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
JSON_OBJECTS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("caption", "w", "h", "pwatermark"), JSON_VALUES | st.integers(0, 99))
)


@FEW_EXAMPLES
@given(
    content=st.one_of(JSON_OBJECTS.map(json.dumps), JSON_VALUES.map(json.dumps), st.text(max_size=9)).map(
        lambda text: text.encode("utf-8", "replace")
    ),
    filters=st.booleans(),
)
@example(content=json.dumps({"caption": "x", "w": 10**400, "h": 10**400, "pwatermark": 0}).encode(), filters=True)
@example(content=json.dumps({"caption": "x", "w": 1e300, "h": 1e300, "pwatermark": 0}).encode(), filters=True)
@example(content=json.dumps({"caption": "x", "w": 9, "h": 9, "pwatermark": 0}).encode(), filters=True)
def test_any_json_is_used_or_counted(tmp_path, content, filters):
    options = {"width_key": "w", "height_key": "h", "max_watermark_probability": 0.5} if filters else {}
    good = members("b", "good", json=b'{"w": 1, "h": 1, "pwatermark": 0}')
    path = write_tar(tmp_path / "a.tar", members("a", json=content) + good)
    data = TrainingData(config(path, **options))
    seen = []
    while "good" not in seen:
        seen += captions(take(data, 1))
    assert len(seen) - 1 + sum(data.tally.skipped.values()) == 1
    for caption in seen:
        caption.encode()  # a tokenizer takes nothing else
