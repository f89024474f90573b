"""What is drawn: the pictures of the documented code, whoever else draws; and what a visitor may ask for."""

import base64
import copy
import dataclasses
import io
import math
import threading

import numpy as np
import pytest
import torch
from conftest import DEMO_TEACHER
from PIL import Image
from playing import GRID, NIGHT, SIZE, SNOW, parse, trained  # noqa: F401

import playground
from lcm.errors import UserError
from lcm.evaluation.sampling import picture_generators, sample, starting_noise
from lcm.pictures.samplers import make_scheduler
from lcm.playground.cards import Card, data_address, show
from lcm.playground.drawing import Drawing
from lcm.playground.shelf import Shelf, training_options
from lcm.playground.sweep import draw_sweep, sweep_wishes
from lcm.playground.turns import FIRST, Superseded, Turns, Visitor
from lcm.playground.wishes import AS_TRAINED, MOST_BYTES, MOST_LETTERS, Bounds, Wish

pytestmark = pytest.mark.usefixtures("watchdog")
VALUES = {
    "prompt": NIGHT, "negative prompt": "", "networks": ["student"], "steps": 2, "guidance": 3, "seed": 5,
    "size": SIZE, "sampler": AS_TRAINED, "teacher's sampler": "ddim", "LoRA guidance": 1, "LoRA strength": 1,
    "picture": "", "change": 0.5,
}  # fmt: skip
NETWORKS = ["student", "LoRA", "teacher"]


def wish(**more):
    return dataclasses.replace(Bounds(NETWORKS, 256).read(list(VALUES.values())), **more)


def pixels(picture):
    return np.asarray(picture, dtype=int)


@pytest.fixture(scope="module")
def drawing(trained):  # noqa: F811
    shelf = Shelf(parse(trained))
    assert shelf.pipeline is None and shelf.missing("LoRA") == ["teacher", "LoRA"]
    for label in ("teacher", "LoRA", "student"):
        shelf.load(label)
        assert shelf.missing(label) == []
    return Drawing(shelf, Turns(), teacher_steps=6)


def draw(drawing, label, one, ticket=None):
    return drawing.draw(label, one, ticket or Visitor().begin("cards"), FIRST)


def by_evaluation(trained, label, one, steps):  # noqa: F811
    """The picture by evaluate_lcm.py's own sampling, in a pipeline that has nothing to do with the playground's."""
    from diffusers import StableDiffusionPipeline

    from lcm.evaluation.candidates import load_trained, open_trained

    args = parse(trained)
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_TEACHER)
    scheduler, scale = make_scheduler(one.teacher_sampler, pipeline.scheduler), one.guidance_scale
    if label != "teacher":
        network = open_trained(pipeline.scheduler, args, label, str(trained[label]))
        load_trained(pipeline, network, args)
        scheduler = make_scheduler("own", network.scheduler)
        scale = one.lora_guidance_scale if network.is_lora else scale
    pipeline.scheduler = scheduler
    noise = starting_noise(pipeline, 1, one.seed, one.size)
    images, _ = sample(pipeline, [one.prompt], noise, steps, scale, picture_generators(1, one.seed), 1)
    return images[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize(("label", "steps"), [("student", 2), ("LoRA", 2), ("teacher", 6)])
def test_pictures_are_those_of_the_evaluation(drawing, trained, label, steps):  # noqa: F811
    """Also after the other networks have drawn: the LoRA is an adapter in the teacher's U-Net."""
    for other in NETWORKS:
        draw(drawing, other, wish())
    drawn = draw(drawing, label, wish())
    assert abs(pixels(drawn.picture) - by_evaluation(trained, label, wish(), steps)).max() <= 1
    assert drawn.steps == steps and drawn.seconds > 0 and drawn.steps_per_second > 0 and drawn.words == ()


def test_drawings_of_two_visitors_do_not_mix(drawing):
    """They take turns at each step, and the LoRA shares the teacher's weights."""
    wishes = [
        ("teacher", wish()),
        ("LoRA", wish(prompt=SNOW)),
        ("student", wish(seed=6)),
        ("LoRA", wish(lora_strength=0.5)),
    ]
    alone = [pixels(draw(drawing, *one).picture) for one in wishes]
    together = [[] for _ in wishes]

    def repeat(i):
        together[i] += [pixels(draw(drawing, *wishes[i]).picture) for _ in range(3)]

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(wishes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert len(found) == 3 and all((picture == expected).all() for picture in found)
    assert (alone[1] != alone[3]).any()


def test_superseded_in_the_middle_stops_at_the_next_step(drawing):
    visitor, calls = Visitor(), []

    def hook(*_):
        calls.append(None)
        if len(calls) == 2:
            visitor.begin("cards")  # a key is pressed during the second step

    handle = drawing.shelf.networks["teacher"].unet.register_forward_hook(hook)
    try:
        with pytest.raises(Superseded):
            draw(drawing, "teacher", wish(), visitor.begin("cards"))
    finally:
        handle.remove()
    assert len(calls) == 2
    assert not drawing.turns.is_taken and not drawing.turns.waiting


def test_strength_and_sampler_have_an_effect(drawing):
    teacher = pixels(draw(drawing, "teacher", wish(teacher_sampler="ddim-trailing")).picture)
    assert (teacher != pixels(draw(drawing, "teacher", wish()).picture)).any()
    strengths = [pixels(draw(drawing, "LoRA", wish(lora_strength=s)).picture) for s in (0.0, 1.0, 2.0)]
    assert (strengths[0] != strengths[1]).any() and (strengths[1] != strengths[2]).any()
    samplers = [pixels(draw(drawing, "student", wish(sampler=name)).picture) for name in (AS_TRAINED, "lcm", "tcd")]
    assert (samplers[0] == samplers[1]).all() and (samplers[0] != samplers[2]).any()


@pytest.mark.parametrize("label", NETWORKS)
def test_a_picture_to_start_from(drawing, label):
    """The less is changed, the more of it stays."""
    snow = draw(drawing, "teacher", wish(prompt=SNOW)).picture
    far, near = (draw(drawing, label, wish(picture=snow, picture_strength=s)) for s in (1.0, 0.1))
    distances = [abs(pixels(drawn.picture) - pixels(snow)).mean() for drawn in (far, near)]
    assert distances[1] < distances[0] / 2
    assert near.steps >= 1


def test_words_about_what_does_not_fit(drawing):
    assert (
        "guidance 5 is outside the range that fits its training, 2 to 4"
        in draw(drawing, "student", wish(guidance_scale=5)).words[0]
    )
    assert "its training, 1 to 2" in draw(drawing, "LoRA", wish(lora_guidance_scale=3)).words[0]
    assert draw(drawing, "teacher", wish(guidance_scale=9)).words == ()
    many = draw(drawing, "student", wish(steps=16))
    assert many.steps == GRID and many.words == (f"{GRID} steps, since its grid has {GRID} points",)
    for label, more, acts in (
        ("student", {}, False), ("LoRA", {}, False), ("LoRA", {"lora_guidance_scale": 2}, True), ("teacher", {}, True),
    ):  # fmt: skip
        drawn = draw(drawing, label, wish(negative_prompt="a star", **more))
        assert drawn.words == (() if acts else ("the negative prompt has no effect here",))
        assert (pixels(drawn.picture) != pixels(draw(drawing, label, wish(**more)).picture)).any() == acts


def test_sdxl(sdxl_teacher):
    """Two text encoders, pooled embeddings."""
    shelf = Shelf(playground.parse_args([f"--pretrained_teacher_model={sdxl_teacher}"]))
    shelf.load("teacher")
    drawing = Drawing(shelf, Turns(), teacher_steps=2)
    one = wish(size=16)
    drawn = draw(drawing, "teacher", one)
    pipeline = copy.copy(shelf.pipeline)
    pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler)
    images, _ = sample(pipeline, [NIGHT], starting_noise(pipeline, 1, 5, 16), 2, 3.0, picture_generators(1, 5), 1)
    assert abs(pixels(drawn.picture) - images[0].permute(1, 2, 0).numpy()).max() <= 1
    started = draw(
        drawing, "teacher", dataclasses.replace(one, picture=Image.new("RGB", (16, 16)), picture_strength=0.5)
    )
    assert started.steps == 1


def test_what_is_known_of_a_training(trained, tmp_path):  # noqa: F811
    assert training_options(str(trained["student"])).w_max == 3
    assert training_options(str(trained["student"] / "checkpoint-2")).w_min == 1
    (tmp_path / "README.md").write_text((trained["student"] / "README.md").read_text())
    assert vars(training_options(str(tmp_path))) == {"w_min": 1.0, "w_max": 3.0}
    assert vars(training_options("no/such-folder")) == {}
    shelf = Shelf(parse(trained))
    assert [shelf.networks[name].guidance for name in NETWORKS] == [(2, 4), (1, 2), None]
    assert shelf.default_guidance_scale == 4 and shelf.size(256) == SIZE and shelf.size(32) == 32


def test_sweep(drawing):
    rows = sweep_wishes(wish(), "student", False, "1, 2", "2 3;4")
    assert [[(one.steps, one.guidance_scale) for one in row] for row in rows] == [
        [(1, 2), (1, 3), (1, 4)], [(2, 2), (2, 3), (2, 4)],
    ]  # fmt: skip
    *counts, (total, grid) = draw_sweep(drawing, "student", rows, Visitor().begin("sweep"))
    assert counts == [(i, None) for i in range(1, 7)] and total == 6
    single = draw(drawing, "student", rows[1][2]).picture.resize((96, 96), Image.Resampling.NEAREST)
    right, found = grid.width - 12 - 96, pixels(grid)
    assert any((found[y : y + 96, right : right + 96] == pixels(single)).all() for y in range(grid.height - 96))


# What a visitor may ask for.


def address(picture, form="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


BAD = [
    ("steps", 0), ("steps", 17), ("steps", 10**9), ("steps", 2.5), ("steps", None), ("steps", "2"), ("steps", True),
    ("steps", math.nan), ("guidance", 0.5), ("guidance", 1e9), ("guidance", math.inf), ("seed", -1), ("seed", 2**32),
    ("size", 264), ("size", 0), ("size", 12), ("prompt", "a" * (MOST_LETTERS + 1)), ("prompt", 3), ("prompt", ["a"]),
    ("negative prompt", {"path": "/etc/passwd"}), ("networks", []), ("networks", ["/etc"]), ("networks", None),
    ("networks", "student"), ("sampler", "/etc"), ("sampler", None), ("teacher's sampler", "lcm"),
    ("LoRA guidance", 0), ("LoRA strength", 3), ("LoRA strength", -1), ("change", 0), ("change", 2),
    ("picture", "/etc/passwd"), ("picture", "file:///etc/passwd"), ("picture", {"path": "/etc/passwd"}),
    ("picture", "data:image/png;base64,AAAA"), ("picture", "data:image/png;base64,\u00e4"),
    ("picture", "data:image/svg+xml;base64,AAAA"), ("picture", address(Image.new("RGB", (8, 8)), "GIF")),
    ("picture", "data:image/png;base64," + "A" * MOST_BYTES), ("picture", address(Image.new("1", (4096, 4096)))),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_bad_wishes(field, value):
    with pytest.raises(UserError, match=f"^{field}: .*allowed: "):
        Bounds(NETWORKS, 256).read(list((VALUES | {field: value}).values()))


def test_good_wishes():
    values = VALUES | {
        "networks": ["teacher", "student"],
        "prompt": " a \n cat ",
        "negative prompt": None,
        "steps": 2.0,
    }
    one = Bounds(NETWORKS, 256).read(list((values | {"picture": address(Image.new("L", (30, 20)), "WEBP")}).values()))
    assert isinstance(one, Wish) and one.networks == ("student", "teacher")
    assert (one.prompt, one.negative_prompt, one.steps, one.picture.size) == ("a cat", "", 2, (SIZE, SIZE))


@pytest.mark.parametrize(("steps", "scales", "field"), [
    ("", "2", "steps"), ("0", "2", "steps"), ("17", "2", "steps"), ("1.5", "2", "steps"), (None, "2", "steps"),
    ("1 2 3 4 5 6 7", "2", "steps"), ("two", "2", "steps"), ("2", "0", "guidance"), ("2", "inf", "guidance"),
    ("2", "nan", "guidance"),
])  # fmt: skip
def test_bad_sweeps(steps, scales, field):
    with pytest.raises(UserError, match=f"^sweep's {field}: "):
        sweep_wishes(wish(), "student", False, steps, scales)


def test_cards_escape_what_visitors_write():
    visitor, text = Visitor(), "<img src=x onerror=alert(1)>\"'"
    visitor.cards["a"] = Card(data_address(Image.new("RGB", (8, 8))), True, text, status=text, words=(text,))
    html = show(visitor, ("a", "<b>"), text)
    assert text not in html and html.count("<img") == 1 and "<b>&lt;b&gt;</b>" in html


def test_pictures_are_sent_as_they_are_or_small():
    for size, kind in ((64, "png"), (512, "jpeg")):
        head, _, data = data_address(Image.effect_noise((size, size), 50).convert("RGB")).partition(",")
        assert head == f"data:image/{kind};base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (size, size)


def test_torch_is_not_left_in_another_mode(drawing):
    draw(drawing, "student", wish())
    assert torch.is_grad_enabled()
