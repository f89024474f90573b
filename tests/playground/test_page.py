"""The page in a real browser, headless, with a real server: type, wait, look at the pixels.

Every page of these tests is checked at its end: no error in it, no request to any other machine, and one connection
for all answers.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import zip_longest
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from playing import CHROMIUM, NIGHT, SIZE, SNOW, command, needs_browser, parse, trained  # noqa: F401

from lcm.errors import UserError
from lcm.playground.drawing import Drawing
from lcm.playground.run_tab import RunFolder
from lcm.playground.shelf import Shelf, training_options
from lcm.playground.turns import FIRST, Turns, Visitor
from lcm.playground.wishes import AS_TRAINED, Bounds

TEACHER_STEPS = 10
TOKEN = "hf_" + "abcdefghij" * 3
NETWORKS = ["student", "LoRA", "teacher"]
LOCAL = {"127.0.0.1"}


@pytest.fixture(scope="module")
def browser():
    needs_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        with_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=[*with_root, "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of the second tab, in which no run has begun."""
    return tmp_path_factory.mktemp("run") / "output"


@pytest.fixture(scope="module")
def server(trained, run_folder, browser, tmp_path_factory):  # noqa: F811
    """The address of a server that the real command has started."""
    more = ["--output_dir", run_folder, f"--teacher_num_inference_steps={TEACHER_STEPS}", "--guidance_scale=3"]
    more += ["--max_size=256"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_TOKEN": TOKEN}
    log = tmp_path_factory.mktemp("log") / "stderr"
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "playground.py", *command(trained, *more)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("The playground is at http://127.0.0.1:"), line + log.read_text()
        yield re.search(r"http://[\d.:]+", line)[0]
    finally:
        process.terminate()
        process.wait()
    raised = re.findall(r"^[\w.]+(?:Error|Exception)\b.*", log.read_text(), re.M)
    assert all(line.startswith("gradio.exceptions.Error: ") for line in raised), raised  # its own limits


@pytest.fixture
def new_page(browser, server):
    """Opens pages, and checks each at the end of the test."""
    opened = []

    def open_page(**settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        context.set_default_timeout(20_000)
        page = context.new_page()
        found = {"requests": [], "errors": [], "refused": []}
        page.on("request", lambda request: found["requests"].append(request.url))
        page.on("pageerror", lambda error: found["errors"].append(str(error)))
        page.on("console", lambda text: text.type == "error" and found["errors"].append(text.text))
        page.on("response", lambda answer: answer.status >= 400 and found["refused"].append(answer.url))
        opened.append((context, found))
        page.goto(server)
        page.get_by_text("Type what to draw.").wait_for()
        return page

    yield open_page
    for context, found in opened:
        context.close()
        hosts = {urlsplit(url).hostname for url in found["requests"] if not url.startswith(("data:", "blob:"))}
        assert hosts == LOCAL and not found["errors"] and not found["refused"], found
        connections = sum("/queue/data" in url for url in found["requests"])
        assert connections == 1, "the connection of answers was closed: a request at that moment would have been lost"


@pytest.fixture
def page(new_page):
    return new_page()


@pytest.fixture(scope="module")
def expected(trained):  # noqa: F811
    """A function that draws what the page should show, in this process."""
    drawing = Drawing(Shelf(parse(trained)), Turns(), TEACHER_STEPS)
    for label in ("teacher", "student", "LoRA"):
        drawing.shelf.load(label)

    def draw(label, prompt, steps=2, seed=0, guidance=3):
        values = [prompt, "", [label], steps, guidance, seed, SIZE, AS_TRAINED, "ddim", 1, 1, "", 0.5]
        wish = Bounds(NETWORKS, 256).read(values)
        return np.asarray(drawing.draw(label, wish, Visitor().begin("x"), FIRST).picture, dtype=int)

    return draw


def prompt_of(page):
    return page.locator("#prompt textarea")


def card(page, label, prompt):
    """The picture of a network for this prompt, once it is there and not of an earlier request."""
    found = page.locator(f'.card[data-network="{label}"]:not(.stale) img[alt="{label}: {prompt}"]')
    found.wait_for()
    return found


def pixels(image):
    """A picture of the page, as (H, W, 3) integers."""
    _, _, data = image.get_attribute("src").partition(",")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=int)


def figures(page, label):
    return page.locator(f'.card[data-network="{label}"] .figures').inner_text()


def wait_until(condition):
    """Wait until a condition of several elements holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not become true"
        time.sleep(0.05)


def is_near(found, wanted):
    return found.shape == wanted.shape and abs(found - wanted).max() <= 1


def shows(page, label, prompt, wanted):
    """Wait until a network's card has this picture. What an earlier request sent may be seen for a moment before."""
    wait_until(lambda: is_near(pixels(card(page, label, prompt)), wanted))


def test_draws_while_it_is_typed(page, expected):
    """At the end all networks show the whole prompt, the pictures are right, and no older one comes back."""
    seen = []

    def saw(text):  # playwright takes no methods of lists
        seen.append(text)

    page.expose_function("saw", saw)
    page.evaluate(
        """() => new MutationObserver(() => document.querySelectorAll('.card:not(.stale) img').forEach(
            image => saw(image.alt))).observe(
                document.querySelector('#cards'), {childList: true, attributes: true, subtree: true})"""
    )
    prompt_of(page).press_sequentially(NIGHT, delay=40)
    for label in NETWORKS:
        shows(page, label, NIGHT, expected(label, NIGHT))
    for label, steps in (("student", 2), ("LoRA", 2), ("teacher", TEACHER_STEPS)):
        assert re.fullmatch(rf"[\d.]+ s, [\d.]+ steps/s, {steps} steps", figures(page, label))
    prompt_of(page).press_sequentially(" and", delay=40)
    shows(page, "student", f"{NIGHT} and", expected("student", f"{NIGHT} and"))
    page.wait_for_timeout(500)
    assert card(page, "teacher", f"{NIGHT} and").count() == 1
    shown = [text.partition(": ")[2] for text in seen if text.startswith("student: ")]
    assert shown == sorted(shown, key=len), "an older picture has come back"
    assert len({text for text in seen if text.startswith("teacher: ")}) <= len(set(shown))


def test_the_teacher_sees_night_and_snow(page):
    brightness = []
    for prompt in (NIGHT, SNOW):
        prompt_of(page).fill(prompt)
        brightness.append(pixels(card(page, "teacher", prompt)).mean())
    assert brightness[0] < 100 < 180 < brightness[1]


def test_sliders_seed_and_words(page, expected):
    prompt_of(page).fill(NIGHT)
    before = pixels(card(page, "student", NIGHT))
    steps = page.locator("#steps input[type=range]")
    steps.focus()
    steps.press("ArrowRight")
    wait_until(lambda: "3 steps" in figures(page, "student"))
    shows(page, "student", NIGHT, expected("student", NIGHT, steps=3))
    assert page.locator(".word").count() == 0
    page.locator("#guidance input[type=range]").fill("6")
    page.locator('.card[data-network="student"] .word').get_by_text(
        "guidance 6 is outside the range that fits its training, 2 to 4"
    ).wait_for()
    assert page.locator('.card[data-network="teacher"] .word').count() == 0
    page.locator("#dice").click()
    wait_until(lambda: page.locator("#seed input").input_value() != "0")
    seed = int(page.locator("#seed input").input_value())
    wanted = expected("student", NIGHT, steps=3, seed=seed, guidance=6)
    shows(page, "student", NIGHT, wanted)
    assert (before != wanted).any()


def test_a_prompt_of_the_validation_is_drawn_by_a_click(page, expected):
    page.get_by_role("button", name=NIGHT).click()
    shows(page, "student", NIGHT, expected("student", NIGHT))
    assert prompt_of(page).input_value() == NIGHT


def test_networks_are_chosen(page):
    for label in ("student", "teacher"):
        page.get_by_role("checkbox", name=label, exact=True).uncheck()
    prompt_of(page).fill(SNOW)
    card(page, "LoRA", SNOW)
    assert page.locator(".card").count() == 1
    page.get_by_role("checkbox", name="LoRA", exact=True).uncheck()
    page.get_by_text("networks: none given").wait_for()


def test_sweep_and_its_download(page, expected, tmp_path):
    page.get_by_role("button", name="Sweep: steps x guidance").click()
    page.locator("#sweep-draw").click()
    page.get_by_text("prompt: nothing given; allowed: what to draw in the grid").wait_for()
    prompt_of(page).fill(NIGHT)
    field = page.locator("#sweep-steps textarea, #sweep-steps input")
    field.fill("1, 2, 99")
    field.press("Tab")
    page.locator("#sweep-draw").click()
    page.get_by_text("sweep's steps: 99 given; allowed: a whole number from 1 to 16").wait_for()
    field.fill("1, 2")
    field.press("Tab")
    page.locator("#sweep-draw").click()
    with page.expect_download() as download:
        page.get_by_text("Download the grid").click()
    download.value.save_as(tmp_path / "grid.png")
    assert download.value.suggested_filename == "sweep.png"
    grid = np.asarray(Image.open(tmp_path / "grid.png"), dtype=int)
    corner = Image.fromarray(expected("student", NIGHT, steps=2, guidance=4).astype("uint8"))
    last = np.asarray(corner.resize((96, 96), Image.Resampling.NEAREST), dtype=int)
    right = grid.shape[1] - 12 - 96
    assert any(is_near(grid[y : y + 96, right : right + 96], last) for y in range(len(grid) - 96))


def test_bad_input(page):
    """A word on the page; the server goes on."""
    prompt_of(page).fill(NIGHT)
    card(page, "student", NIGHT)
    page.locator("#seed input").fill("-7")
    page.get_by_text("seed: -7 given; allowed: a whole number from 0 to 4294967295").wait_for()
    page.locator("#seed input").fill("")
    page.get_by_text("seed: nothing given").wait_for()
    page.locator("#steps input[type=number]").fill("20")
    page.get_by_text("steps: 20 given; allowed: a whole number from 1 to 16").wait_for()
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#seed input").fill("1.5")
    page.get_by_text("seed: 1.5 given; allowed: a whole number").wait_for()
    page.locator("#seed input").fill("3")
    prompt_of(page).fill("<b>${1+1}</b> {{value}} \\")
    image = page.locator('.card[data-network="student"]:not(.stale) img')
    wait_until(lambda: image.count() and image.get_attribute("alt") == "student: <b>${1+1}</b> {{value}} \\")
    prompt_of(page).fill("")
    page.get_by_text("Type what to draw.").wait_for()


def test_a_refused_request_ends_what_is_drawn(page):
    """The teacher is not said to draw on."""
    page.get_by_role("checkbox", name="student", exact=True).uncheck()
    page.get_by_role("checkbox", name="LoRA", exact=True).uncheck()
    prompt_of(page).fill(NIGHT)
    page.locator(".card .figures").get_by_text("drawing").wait_for()
    page.locator("#seed input").fill("-7")
    page.get_by_text("seed: -7 given").wait_for()
    wait_until(lambda: "drawing" not in figures(page, "teacher"))
    page.locator("#seed input").fill("7")
    card(page, "teacher", NIGHT)


def test_values_that_the_page_does_not_send(page, server):
    """Anyone can call the server without the page: limits hold there, and only a few addresses exist."""
    config = page.request.get(f"{server}/config").json()
    (draw,) = [
        one
        for one in config["dependencies"]
        if one["inputs"] and len(one["outputs"]) == 1 and one["targets"][0][1] == "load"
    ]
    assert all(one["api_visibility"] == "private" for one in config["dependencies"])

    def ask(*values, time=1):
        body = {"data": [time, *values], "fn_index": draw["id"], "session_hash": "someone"}
        assert page.request.post(f"{server}/gradio_api/queue/join", data=body).ok
        return page.request.get(f"{server}/gradio_api/queue/data?session_hash=someone").text()

    good = [NIGHT, "", ["student"], 2, 3, 0, SIZE, AS_TRAINED, "ddim", 1, 1, "", 0.5]
    for place, value, word in (
        (3, 1000, "steps"), (6, 100_000, "size"), (2, ["/etc/passwd"], "networks"), (7, "/etc/passwd", "sampler"),
        (11, "/etc/passwd", "picture"), (0, "a" * 5000, "prompt"),
    ):  # fmt: skip
        answer = ask(*good[:place], value, *good[place + 1 :])
        assert f"{word}: " in answer or "process_completed" in answer
        assert "data:image" not in answer and "root:" not in answer
    assert "time: " in ask(*good, time="now")


REFUSED = [
    ("GET", "gradio_api/file=/etc/passwd"), ("GET", "gradio_api/file/etc/passwd"), ("POST", "gradio_api/upload"),
    ("GET", "gradio_api/proxy=http://127.0.0.1:1/"), ("GET", "static/../../etc/passwd"), ("GET", "monitoring"),
    ("POST", "gradio_api/run/draw"), ("POST", "gradio_api/call/draw"), ("POST", "gradio_api/component_server"),
    ("GET", "docs"), ("GET", "openapi.json"), ("GET", "gradio_api/stream/a/b/c/playlist.m3u8"), ("PUT", ""),
    ("GET", "gradio_api/runs"),
]  # fmt: skip


def test_only_what_the_page_needs_is_answered(browser, server):
    context = browser.new_context()
    for method, path in REFUSED:
        answer = context.request.fetch(f"{server}/{path}", method=method)
        assert answer.status in (404, 405), (path, answer.status)
    assert context.request.get(server, headers={"Host": "evil.example"}).status == 403
    assert context.request.get(f"{server}/config", headers={"Origin": "http://evil.example"}).status == 403
    assert context.request.post(f"{server}/gradio_api/queue/join", data="a" * 5_000_000).status == 413
    assert "default-src 'self'" in context.request.get(server).headers["content-security-policy"]
    for path in ("", "config", "gradio_api/info"):
        text = context.request.get(f"{server}/{path}").text()
        assert TOKEN not in text and str(ROOT) not in text, path
    assert json.loads(context.request.get(f"{server}/gradio_api/info").text())["named_endpoints"] == {}
    context.close()


def test_two_visitors_at_once(new_page, expected):
    """They type in turn; each gets the pictures of the own prompt and steps."""
    pages = {NIGHT: new_page(), SNOW: new_page()}
    pages[SNOW].locator("#steps input[type=range]").fill("4")
    for letters in zip_longest(*pages, fillvalue=""):
        for page, letter in zip(pages.values(), letters, strict=True):
            prompt_of(page).press_sequentially(letter)
    for (prompt, page), steps in zip(pages.items(), (2, 4), strict=True):
        for label in NETWORKS:
            shows(page, label, prompt, expected(label, prompt, steps if label != "teacher" else 2))


def test_keyboard_only(page):
    """Tab reaches every field; nothing is clicked."""

    def focused(place):
        return page.evaluate(f"!!document.activeElement.closest({json.dumps(place)})")

    def tab_to(place):
        for _ in range(40):
            if focused(place):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"Tab does not reach {place}")

    tab_to("#prompt textarea")
    page.keyboard.type(SNOW, delay=40)
    card(page, "student", SNOW)
    tab_to("#steps input[type=range]")
    page.keyboard.press("ArrowRight")
    wait_until(lambda: "3 steps" in figures(page, "student"))
    tab_to("#seed")
    tab_to("#dice")
    page.keyboard.press("Enter")
    wait_until(lambda: page.locator("#seed input").input_value() != "0")
    tab_to("#networks")
    page.keyboard.press("Space")
    wait_until(lambda: page.locator('.card[data-network="student"]').count() == 0)


def test_narrow_screen(new_page):
    """Nothing is cut off on a telephone, and pictures stand right below the prompt."""
    page = new_page(viewport={"width": 360, "height": 740}, has_touch=True)
    prompt_of(page).fill(SNOW)
    card(page, "teacher", SNOW)
    for name in ("More settings", "Start from a picture", "Sweep: steps x guidance"):
        page.get_by_role("button", name=name).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("prompt", "cards", "steps", "seed", "dice", "size", "sampler", "strength", "sweep-draw"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, name
    below = page.locator("#cards").bounding_box()["y"]
    assert page.locator("#prompt").bounding_box()["y"] < below < page.locator("#steps").bounding_box()["y"]


def test_a_picture_to_start_from(page, tmp_path):
    """From the canvas, and from a file, which is not uploaded as one."""
    prompt_of(page).fill(NIGHT)
    empty = pixels(card(page, "student", NIGHT))
    page.get_by_role("button", name="Start from a picture").click()
    page.locator("#strength input[type=range]").fill("0.5")
    canvas = page.locator("#sketch canvas")
    card(page, "teacher", NIGHT)  # nothing above the canvas moves any more
    canvas.hover(position={"x": 20, "y": 40})
    page.mouse.down()
    canvas.hover(position={"x": 80, "y": 50})
    canvas.hover(position={"x": 150, "y": 60})
    page.mouse.up()
    wait_until(lambda: "1 step" in figures(page, "student") and "5 steps" in figures(page, "teacher"))
    wait_until(lambda: not is_near(pixels(card(page, "student", NIGHT)), empty))
    drawn = pixels(card(page, "student", NIGHT))
    Image.new("RGB", (30, 50), (240, 240, 250)).save(tmp_path / "white.png")
    page.locator("#sketch input[type=file]").set_input_files(tmp_path / "white.png")
    wait_until(lambda: not is_near(pixels(card(page, "student", NIGHT)), drawn))
    (tmp_path / "text.png").write_text("not a picture")
    page.locator("#sketch input[type=file]").set_input_files(tmp_path / "text.png")
    page.get_by_text("picture: allowed: a PNG, JPEG or WebP picture").wait_for()
    page.get_by_role("button", name="Clear").click()
    shows(page, "student", NIGHT, empty)


def test_the_run_as_it_goes_on(page, run_folder, trained):  # noqa: F811
    """No folder, then metrics, then pictures and a checkpoint: the tab follows without a click."""
    page.get_by_role("tab", name="The run").click()
    page.get_by_text("There are no metrics yet.").wait_for()
    facts = page.locator("#facts")
    source = trained["student"]
    run_folder.mkdir()
    (run_folder / "metrics.jsonl").write_text((source / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    page.get_by_text("not counted without a checkpoint").wait_for()
    curves = page.locator("#curves img")
    curves.wait_for()
    first = curves.get_attribute("src")
    (run_folder / "validation").mkdir()
    for step in (1, 2):
        shutil.copy(source / "validation" / f"step-00000{step}.png", run_folder / "validation")
    shutil.copytree(source / "checkpoint-2", run_folder / "checkpoint-2")
    shutil.copy(source / "metrics.jsonl", run_folder)
    page.get_by_text("Validation pictures at step 2").wait_for()
    assert facts.locator("dt").all_inner_texts()[:2] == ["run", "last metrics"]
    assert page.locator("#facts dd").get_by_text("4", exact=True).count() == 1  # 2 steps of 2 samples
    assert curves.get_attribute("src") != first
    assert page.locator("#validation img").evaluate("image => image.naturalWidth") > 100
    slider = page.locator("#position input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    page.get_by_text("Validation pictures at step 1").wait_for()
    (run_folder / "README.md").write_text("the model card, written at the end")
    facts.get_by_text("finished").wait_for()


@pytest.mark.parametrize(("row", "found"), [("3 to 5 (w = 2 to 4)", (2, 4)), ("3 (w = 2)", (2, 2))])
def test_the_guidance_on_a_card(tmp_path, row, found):
    """It stands for the options where there is no checkpoint."""
    (tmp_path / "README.md").write_text(f"| option | value |\n| guidance_scale | {row} |\n")
    options = training_options(str(tmp_path))
    assert (options.w_min, options.w_max) == found


def test_pictures_of_a_longer_run_before_are_left_out(tmp_path):
    (tmp_path / "validation").mkdir()
    for step, age in ((5, 0), (10, 0), (500, 1000)):  # in one folder: a run up to step 500, and one up to 10
        path = tmp_path / "validation" / f"step-{step:06}.png"
        Image.new("RGB", (8, 8)).save(path)
        os.utime(path, (time.time() - age,) * 2)
    assert RunFolder(str(tmp_path)).steps() == [5, 10]


def test_a_port_that_is_taken(server, trained):  # noqa: F811
    from lcm.playground.page import serve

    with pytest.raises(UserError, match=r"^--port: "):
        serve(parse(trained, f"--port={urlsplit(server).port}"), wait=False)


@pytest.mark.parametrize(("options", "says"), [
    (["--max_size=100"], "--max_size: 100 given; allowed: multiples of 8"),
    (["--trained", "a=x", "a=y"], "--trained: two networks are called 'a'; allowed: "),
    (["--port=0"], "--port: '0' given; allowed: "),
    (["--output_dir=README.md"], "--output_dir: 'README.md' is a file; allowed: "),
    (["--trained=no/such/folder"], "--trained: 'no/such/folder' is neither a folder nor available on the Hub"),
    (["--trained=docs"], "--trained: 'docs' holds neither pytorch_lora_weights.safetensors nor a U-Net"),
    (["--pretrained_teacher_model=docs"], "--pretrained_teacher_model: cannot load 'docs'"),
])  # fmt: skip
def test_wrong_options(options, says, capsys, monkeypatch):
    import playground

    needs_browser()
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        playground.main(["--pretrained_teacher_model=demo/teacher", *options])
    assert end.value.code in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(says)


def test_without_gradio():
    """`-S`: no installed package at all. --help is answered, and else there is one line with what to install."""
    start = [sys.executable, "-S", "-E", ROOT / "playground.py"]
    done = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True)
    assert "--teacher_num_inference_steps" in done.stdout
    done = subprocess.run([*start, "--pretrained_teacher_model=a"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the package gradio is not installed" in done.stderr and "pip install" in done.stderr
