"""What makes a sample; what cannot be used is counted, and never stops a stream."""

import json
import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import encode_image, write_tar
from data_tools import FEW_EXAMPLES, GREY, PNG, captions, config, members, shard_of, take
from hypothesis import example, given
from hypothesis import strategies as st

from lcm.data import tally
from lcm.data.loader import TrainingData

pytestmark = [
    pytest.mark.usefixtures("watchdog"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


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


def first_after(tmp_path, bad_members, **options):
    """Read a shard of `bad_members` and then one good sample. Returns (captions up to the good one, skip tally)."""
    path = write_tar(tmp_path / "bad.tar", [*bad_members, *members("zzz", "the good one")])
    data = TrainingData(config(path, **options))
    seen = []
    for batch in data:
        seen += batch["captions"]
        if "the good one" in seen:
            return seen[:-1], dict(data.tally.skipped)


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
