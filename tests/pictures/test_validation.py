"""Pictures while training: what a user would get from the stock pipelines, for all networks, sizes and seeds."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, Script
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from lcm.options.checks import default_guidance_scale
from lcm.pictures import grid as lcm_grid
from lcm.pictures import validation
from lcm.pictures.grid import picture_grid
from lcm.run import trackers


@pytest.fixture
def logged(monkeypatch):
    """All pictures that the trackers are given: {step: {name: [(picture, caption), ...]}}."""
    seen = {}

    def log_pictures(self, pictures, step):
        seen.setdefault(step, {}).update(pictures)

    monkeypatch.setattr(trackers.Trackers, "log_pictures", log_pictures)
    return seen


def stock_pipeline(script, folder, network):
    """The teacher's pipeline with a trained network of `folder`, put together as the documentation says."""
    from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, UNet2DConditionModel

    pipeline = DiffusionPipeline.from_pretrained(script.teacher)
    pipeline.set_progress_bar_config(disable=True)
    if network == "teacher":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        return pipeline
    pipeline.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    if network == "LoRA":
        pipeline.load_lora_weights(folder)
    else:
        subfolder = {"student": "unet", "EMA": "unet_target"}[network]
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder=subfolder)
    return pipeline


def stock_picture(pipeline, prompt, steps, guidance_scale, width=16, height=16, seed=0, negative_prompt=None):
    return pipeline(
        prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


def assert_close(a, b):
    difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int))
    assert a.size == b.size and difference.max() <= 1


GRID = [
    "--validation_prompts", "a red three", "a blue two",
    "--validation_num_inference_steps", "1", "3",
    "--validation_teacher_steps", "2", "5",
    "--validation_resolution=16x24,32",
    "--num_validation_images=2",
    "--validation_negative_prompt=blue",
    "--seed=7",
    "--validation_steps=2",
]  # fmt: skip


def test_pictures_are_those_of_the_stock_pipelines(script, logged, tmp_path):
    """Every network, step count, prompt, size and seed, from the files that the run wrote; with a negative prompt."""
    scale = 1.5 if script.is_lora else 9
    script.main(tmp_path, *GRID, f"--validation_guidance_scale={scale}", "--learning_rate=1e-2")
    teacher_scale = 7.5 if script.is_lora else 9
    networks = ["LoRA"] if script.is_lora else ["student", "EMA"]
    expected = {(name, steps, scale) for name in networks for steps in (1, 3)}
    drawn = {("teacher", steps, teacher_scale) for steps in (2, 5)}
    assert sorted(logged) == [0, 2, 4]
    for step, columns in ((0, drawn), (4, expected)):
        names = {f"validation/{n}, {s} step{'s' * (s > 1)}, guidance {g:g}": (n, s, g) for n, s, g in columns}
        assert logged[step].keys() - {"validation"} == names.keys()
        for name, (network, steps, guidance) in names.items():
            pipeline = stock_pipeline(script, tmp_path, network)
            assert len(logged[step][name]) == 8
            cells = iter(logged[step][name])
            for prompt in ("a red three", "a blue two"):
                for size in ((16, 24), (32, 32)):
                    for i in range(2):
                        picture, caption = next(cells)
                        assert caption == f"{prompt}, {size[0]} x {size[1]}, noise {i + 1}, negative prompt: blue"
                        more = {"negative_prompt": "blue", "seed": 7 + i}
                        assert_close(picture, stock_picture(pipeline, prompt, steps, guidance, *size, **more))
    assert logged[2].keys() == logged[4].keys()


def test_the_grid_shows_them_all(script, logged, tmp_path, monkeypatch):
    """The teacher, then the trained networks; what is the same for all columns stands in the corner."""
    grids = []

    def recording(*args, **kwargs):
        grids.append((args, kwargs))
        return picture_grid(*args, **kwargs)

    monkeypatch.setattr(validation, "picture_grid", recording)
    more = ["--validation_resolution=16x24,32", "--validation_prompts", "one", "two", "--max_train_steps=1"]
    script.main(tmp_path, *more, "--validation_teacher_steps", "2")
    (((rows, row_labels, column_labels), more),) = grids
    assert row_labels == [f"{prompt}\n{size}" for prompt in ("one", "two") for size in ("16 x 24", "32 x 32")]
    if script.is_lora:
        assert column_labels == ["teacher\n2 steps\nguidance 7.5", "LoRA\n1 step\nguidance 1"]
        assert more["corner"] == "step 1"
    else:
        assert column_labels == ["teacher\n2 steps", "student\n1 step", "EMA\n1 step"]
        assert more["corner"] == "step 1\nguidance 7.5"
    columns = [pictures for step in (0, 1) for name, pictures in logged[step].items() if name != "validation"]
    columns = [[picture for picture, _ in pictures] for pictures in columns]
    assert [list(row) for row in rows] == [list(row) for row in zip(*columns, strict=True)]
    ((grid, caption),) = logged[1]["validation"]
    assert caption is None
    assert np.array_equal(grid, Image.open(tmp_path / "validation" / "step-000001.png"))


def test_a_grid_of_pictures_of_two_shapes():
    """Every picture is there whole, in columns of one width, in rows as high as needed; gaps where asked for."""
    colours = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]
    sizes = [(10, 20), (30, 15)]
    rows = [[Image.new("RGB", size, c) for c in row] for size, row in zip(sizes, colours, strict=True)]
    pixels = np.asarray(picture_grid(rows, ["a", "b"], ["x", "y", "z"], cell_size=120, group_gap=[2]))
    boxes = []
    for row in colours:
        for colour in row:
            ys, xs = np.where((pixels == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(axis=2))
            assert len(ys) == (xs.max() - xs.min() + 1) * (ys.max() - ys.min() + 1)
            boxes.append((xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()))
    assert [box[2:] for box in boxes] == [(120, 240)] * 3 + [(120, 60)] * 3
    assert [box[0] for box in boxes[:3]] == [box[0] for box in boxes[3:]]
    assert boxes[0][1] == boxes[1][1] == boxes[2][1] and boxes[3][1] == boxes[0][1] + 240 + 5
    gaps = [boxes[i + 1][0] - boxes[i][0] - 120 for i in (0, 1)]
    assert gaps == [5, 20]


LONG = "a very long prompt, " * 12


@pytest.mark.parametrize("label", [LONG, "https://" + "a/long/address" * 20, "長い文章の例です。" * 30])
def test_labels_fit_into_the_grid(label):
    """Nothing is written outside, over a picture, or cut off: the margins stay white, and long labels make room."""
    red = Image.new("RGB", (40, 30), "red")
    labels = ([[red, red], [red, red]], [label, "short"], ["one\ntwo", "three"], 96)
    grid = picture_grid(*labels, corner="step 1\nguidance 7.5\npage 1 of 12\nand more", footer=label)
    pixels = np.asarray(grid)
    for edge in (pixels[:4], pixels[-4:], pixels[:, :8], pixels[:, -4:]):
        assert (edge == 255).all()
    assert grid.height > picture_grid(*labels).height
    assert picture_grid(*labels).height > picture_grid(labels[0], ["a", "b"], *labels[2:]).height
    assert (pixels == (255, 0, 0)).all(axis=2).sum() == 4 * 96 * 72


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("one two  three\n\nfour", ["one two", "three", "", "four"]),
        ("a_word_too_long for it", ["a_word_", "too_lon", "g for", "it"]),
        ("猫は白。犬 dog", ["猫は", "白。犬", "dog"]),
    ],
)
def test_lines_are_cut_by_their_width(text, lines):
    """By a font whose wide letters are twice as wide as others, which are 1 pixel, in 7 pixels."""

    class Font:
        def getlength(self, text):
            return sum(1 + (ord(letter) > 0x2000) for letter in text)

    assert lcm_grid.wrap(text, 7 if text.isascii() else 6, Font()) == lines


def test_a_hairline_shows_where_a_white_picture_ends():
    """It is next to the picture, and not on it."""
    white = Image.new("RGB", (100, 80), "white")
    pixels = np.asarray(picture_grid([[white, white]], ["a"], ["x", "y"]))
    ys, xs = np.where((pixels == 0xD0).all(axis=2))
    left, top = xs.min(), ys.min()
    assert (pixels[top + 1 : top + 81, left + 1 : left + 101] == 255).all()
    assert len(ys) == 2 * (2 * 102 + 2 * 80) and ys.max() - top == 81


def test_a_long_list_of_prompts_is_split_into_pages(teacher, shards, logged, tmp_path, monkeypatch, capfd):
    """As few as can be, and equal; the trackers and the report get all of them; those of an earlier run go."""
    grids = []

    def recording(*args, **more):
        grids.append((args, more))
        return picture_grid(*args, **more)

    monkeypatch.setattr(validation, "picture_grid", recording)
    script, prompts = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"]), [f"number {i}" for i in range(30)]
    more = ["--max_train_steps=1", "--validation_negative_prompt=ugly", "--validation_prompts"]
    script.main(tmp_path, *more, *prompts)
    files = [tmp_path / "validation" / f"step-000001-{number}.png" for number in (1, 2, 3)]
    assert sorted((tmp_path / "validation").iterdir()) == files
    assert [args[1] for args, _ in grids] == [prompts[:10], prompts[10:20], prompts[20:]]
    assert [row for args, _ in grids for row in args[0]] == [
        [picture] for picture, _ in logged[1]["validation/LoRA, 1 step, guidance 1"]
    ]
    assert [args["corner"] for _, args in grids] == [f"step 1\nguidance 1\npage {i} of 3" for i in (1, 2, 3)]
    assert {args["footer"] for _, args in grids} == {"negative prompt: ugly"}
    assert [caption for _, caption in logged[1]["validation"]] == [f"page {i} of 3" for i in (1, 2, 3)]
    for (picture, _), path in zip(logged[1]["validation"], files, strict=True):
        assert np.array_equal(picture, Image.open(path))
    assert f"Drew {files[0]} to step-000001-3.png" in capfd.readouterr().err
    card = (tmp_path / "README.md").read_text()
    assert "![Validation pictures](validation/step-000001-1.png)" in card
    assert "[2](validation/step-000001-2.png), [3](validation/step-000001-3.png)" in card
    script.main(tmp_path, *more, "one")
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["step-000001.png"]


def test_pages_of_high_pictures_have_fewer_rows(teacher, shards, logged, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "MAX_PAGE_HEIGHT", 1000)
    script = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    more = ["--max_train_steps=1", "--validation_resolution=16x48", "--validation_prompts", *map(str, range(7))]
    script.main(tmp_path, *more)
    first, second, last = [picture.height for picture, _ in logged[1]["validation"]]
    assert first == second == last + 2 * (288 + 4)


def test_several_guidance_scales(teacher, shards, logged, tmp_path):
    """A column each, for the teacher too; of a LoRA the teacher's is what was learned."""
    for name, scales in (("sd", {6, 9}), ("lora_sd", {7.5})):
        script = Script(name, teacher, shards, SCRIPTS[name])
        more = ["--validation_guidance_scale", "6", "9", "--validation_teacher_steps", "1", "--max_train_steps=1"]
        logged.clear()
        script.main(tmp_path / name, *more)
        assert set(logged[0]) == {f"validation/teacher, 1 step, guidance {scale:g}" for scale in scales}
        drawn = {key.rpartition("guidance ")[2] for key in logged[1] if "guidance" in key}
        assert drawn == {"6", "9"}


def test_guidance_outside_of_the_trained_range_is_warned_about(teacher, shards, tmp_path, capfd):
    """Where it is an input of the network; a LoRA's is another matter."""
    more = ["--max_train_steps=1", "--w_min=2", "--w_max=4", "--validation_guidance_scale"]
    for name, scales, warning in (
        ("sd", ["2.9", "3", "5", "5.5"], "--validation_guidance_scale: 2.9, 5.5 lies outside of [3, 5]"),
        ("sd", ["3", "5"], None),
        ("lora_sd", ["1", "7"], None),
    ):
        Script(name, teacher, shards, SCRIPTS[name]).main(tmp_path / name, *more, *scales)
        log = capfd.readouterr().err
        assert warning in log if warning else "--validation_guidance_scale" not in log


def test_prompts_from_a_file(teacher, shards, logged, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red three\r\n\r\n  ein grünes Pferd \n".encode())
    script = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    more = ["--validation_prompts", "first", str(tmp_path / "prompts.txt"), "--max_train_steps=1"]
    script.main(tmp_path / "out", *more)
    captions = [caption for _, caption in logged[1]["validation/LoRA, 1 step, guidance 1"]]
    assert captions == ["first", "a red three", "ein grünes Pferd"]


@pytest.mark.parametrize(
    ("name", "changes"), [("sd", {"clip_sample": True, "thresholding": True}), ("lora_sdxl", {"clip_sample": None})]
)
def test_pictures_and_schedulers_never_clip_nor_change(name, changes, teacher, sdxl_teacher, shards, logged, tmp_path):
    """Whatever the teacher's config says of clipping, as training does not clip; and the pipelines, which change the
    config of the scheduler they are given, leave no trace in one checkpoint that is not in the other."""
    plain = shutil.copytree(sdxl_teacher if "sdxl" in name else teacher, tmp_path / "plain")
    path = "scheduler/scheduler_config.json"
    config = json.loads((plain / path).read_text()) | {"steps_offset": 0}
    (plain / path).write_text(json.dumps(config))
    pictures, saved = [], []
    for folder, more in ((plain, {}), (shutil.copytree(plain, tmp_path / "other"), changes)):
        other = {key: value for key, value in (config | more).items() if value is not None}
        (folder / path).write_text(json.dumps(other))
        output = tmp_path / f"out-{folder.name}"
        logged.clear()
        more = ["--validation_teacher_steps=2", "--validation_num_inference_steps=2", "--validation_prompts=red"]
        more += ["--max_train_steps=2", "--checkpointing_steps=1", "--validation_steps=1"]
        Script(name, folder, shards, SCRIPTS[name]).main(output, *more)
        pictures.append([np.asarray(p) for step in logged.values() for cells in step.values() for p, _ in cells])
        files = [output / folder / path for folder in ("checkpoint-1", "checkpoint-2", ".")]
        saved += [json.loads(file.read_text()) for file in files]
        assert len(pictures[-1]) >= 5
    assert len(saved) == 6 and all(one == saved[0] for one in saved)
    assert saved[0]["steps_offset"] == 0 and not saved[0]["clip_sample"] and not saved[0]["thresholding"]
    assert all(np.array_equal(*pair) for pair in zip(*pictures, strict=True))


def test_default_columns_of_the_teacher(teacher, shards):
    script = Script("sd", teacher, shards, SCRIPTS["sd"])
    options = [option for option in script.options("out") if option != "--validation_teacher_steps"]
    for more, steps in (([], [1, 25]), (["--validation_num_inference_steps", "2", "8"], [8, 25])):
        assert script.module.parse_args([*options, *more]).validation_teacher_steps == steps
    assert script.module.parse_args(script.options("out")).validation_teacher_steps == []
    args = script.module.parse_args([*options, "--w_min=9"])
    assert default_guidance_scale(args) == 10


def test_a_teacher_that_cannot_be_drawn_costs_its_columns_only(teacher, shards, logged, tmp_path, monkeypatch, capfd):
    """DDIM does not know more steps than the schedule has."""
    draw = validation.Validation.draw

    def out_of_memory(self, network, columns, scheduler):
        if columns[0].network == "teacher":
            raise RuntimeError("CUDA out of memory")
        return draw(self, network, columns, scheduler)

    monkeypatch.setattr(validation.Validation, "draw", out_of_memory)
    script = Script("sd", teacher, shards, SCRIPTS["sd"])
    script.main(tmp_path, "--validation_teacher_steps", "2", "--max_train_steps=1")
    assert "No pictures of the teacher: CUDA out of memory" in capfd.readouterr().err
    assert len(logged[1]) == 3


def test_letters_that_pillows_own_font_lacks():
    """An accent is drawn as what it is, and not as the box that stands for every missing letter."""
    picture = Image.new("RGB", (96, 96))
    accents, others = (np.asarray(picture_grid([[picture]], [label], ["x"])) for label in ("é", "ü"))
    assert not np.array_equal(accents, others)


def make_font(path, letters):
    """Write a font file with a bar for each of `letters`, as high as its place among them, and a box for others."""

    def shape(height, width=600):
        pen = TTGlyphPen(None)
        pen.moveTo((100, 0))
        for point in ((100, height), (width - 100, height), (width - 100, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = [f"letter{ord(letter):x}" for letter in letters]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", *names])
    font.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names, strict=True)})
    heights = {".notdef": 900} | {name: 50 + 20 * i for i, name in enumerate(names)}
    font.setupGlyf({name: shape(height) for name, height in heights.items()})
    font.setupHorizontalMetrics(dict.fromkeys(heights, (600, 100)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return str(path)


@pytest.fixture
def installed(monkeypatch):
    """installed(files): what fonts there are besides matplotlib's own, and nothing is known of them yet."""

    def install(*files):
        monkeypatch.setattr(lcm_grid.font_manager, "findSystemFonts", lambda: list(files))
        monkeypatch.setattr(lcm_grid, "NAMED_LETTERS", set())
        lcm_grid.fonts_for.cache_clear()

    yield install
    lcm_grid.fonts_for.cache_clear()


def test_an_installed_font_that_has_the_letters_is_taken(installed, tmp_path, caplog):
    """Of those that have most of them the plain one; a file that is no font, or one that draws boxes, is none."""
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    some, bold, plain, blank = (
        make_font(tmp_path / f"{name}.ttf", letters)
        for name, letters in {"A-Some": "猫", "A-Bold": "abx猫犬", "B": "abx猫犬", "LastResort": "abx猫犬한"}.items()
    )
    installed(str(tmp_path / "broken.ttf"), some, bold, blank, plain, str(tmp_path / "absent.ttf"))
    assert lcm_grid.label_font(16, ["a猫", "b 犬"]).path == plain
    assert lcm_grid.label_font(16, ["é"]).path.endswith("DejaVuSans.ttf")
    assert not isinstance(getattr(lcm_grid.label_font(16, ["plain"]), "path", None), str)
    assert not caplog.records
    picture = Image.new("RGB", (96, 96))
    cat, dog = (np.asarray(picture_grid([[picture]], [label], ["x"])) for label in "猫犬")
    assert not np.array_equal(cat, dog)


def test_letters_that_no_font_has_are_named_once(installed, tmp_path, caplog):
    """And the rest is drawn; a variation selector or a line break is no letter."""
    installed(make_font(tmp_path / "Some.ttf", "ab猫"))
    picture = Image.new("RGB", (96, 96))
    for label in ("a猫\n犬\ufe0f", "猫犬"):
        picture_grid([[picture]], [label], ["b"], footer=label)
    (record,) = caplog.records
    assert record.getMessage().startswith("No installed font has 犬: ") and "fonts-noto-cjk" in record.getMessage()
