"""The Gradio page: its fields, their limits, and the server."""

import json
import os
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is sent anywhere

import gradio as gr
from starlette.middleware import Middleware

from lcm.errors import UserError, first_line
from lcm.options.checks import span
from lcm.options.choices import STUDENT_SAMPLERS
from lcm.playground.answers import Answers
from lcm.playground.guard import LOCAL_HOST, Guard
from lcm.playground.shelf import Shelf
from lcm.playground.turns import MOST_VISITORS
from lcm.playground.wishes import AS_TRAINED, MOST_LETTERS, MOST_STEPS, MOST_STRENGTH, TEACHER_SAMPLERS

HERE = Path(__file__).parent
FONTS, FIXED_FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # Gradio's own come from another site
MOST_EXAMPLES = 4  # prompts to choose from, those with which the networks were validated
REFRESH_SECONDS = 2  # between two looks at the folder of the run
MOST_WAITING, MOST_AT_ONCE = 64, 32  # requests of all visitors: in Gradio's queue, and out of it
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "multiple"}
NOT_READY = '<p class="message">One moment ...</p>'
WITH_TIME = "(time, ...values) => [performance.now(), ...values]"
DICE = "() => Math.floor(Math.random() * 4294967296)"


# A slider's limits are for its handle. What is typed beside it goes to the server, whose errors name the field, unlike
# Gradio's. A subclass would not do: Gradio writes a file beside its module.
gr.Slider.preprocess = lambda slider, payload: payload  # type: ignore[method-assign, assignment]


def words_about(shelf: Shelf) -> str:
    """The guidance scales that fit the training of each whole U-Net, as one line; empty if none is known."""
    found = [(network.label, *network.guidance) for network in shelf.networks.values() if network.guidance]
    texts = [f"{label}: {span(low, high)}" for label, low, high in found if not shelf.networks[label].is_lora]
    return f"trained for {', '.join(texts)}" if texts else ""


def draw_tab(args: Namespace, shelf: Shelf, answers: Answers, page: gr.Blocks) -> None:
    """The tab that draws while one types."""
    networks = list(shelf.networks)
    trained, has_loras = networks[:-1], any(network.is_lora for network in shelf.networks.values())
    scale = args.guidance_scale or shelf.default_guidance_scale
    fits = [network.guidance[1] for network in shelf.networks.values() if network.guidance and not network.is_lora]
    examples = [prompt for network in shelf.networks.values() for prompt in network.prompts]
    prompt = gr.Textbox(
        label="Prompt", elem_id="prompt", placeholder="What to draw", max_length=MOST_LETTERS, autofocus=True
    )
    if examples:
        with gr.Row(elem_id="examples"):
            for text in list(dict.fromkeys(examples))[:MOST_EXAMPLES]:
                button = gr.Button(text, size="sm", min_width=0)
                button.click(None, None, prompt, js=f"() => {json.dumps(text)}", **PRIVATE)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            cards = gr.HTML(NOT_READY, elem_id="cards")
            with gr.Accordion("Start from a picture", open=False):
                picture = gr.HTML(
                    "", html_template=(HERE / "sketch.html").read_text(), js_on_load=(HERE / "sketch.js").read_text(),
                    elem_id="sketch",
                )  # fmt: skip
                strength = gr.Slider(0.1, 1, 0.6, step=0.05, label="Change", elem_id="strength",
                                     info="how much is new; 1 leaves nothing of the picture")  # fmt: skip
            if trained:
                sweep, sweep_fields, grid = sweep_part(shelf, trained, scale)
        with gr.Column(scale=2, min_width=280):
            steps = gr.Slider(1, MOST_STEPS, 2, step=1, label="Steps", info="of the trained networks", elem_id="steps")
            guidance = gr.Slider(1, max(1.5 * max(fits, default=10), 6), scale, step=0.1, label="Guidance",
                                 elem_id="guidance", info=words_about(shelf))  # fmt: skip
            with gr.Row(equal_height=True):
                seed = gr.Number(args.seed, label="Seed", elem_id="seed", min_width=120, scale=3)
                dice = gr.Button("Another seed", elem_id="dice", min_width=120, scale=2)
            shown = gr.CheckboxGroup(networks, value=networks, label="Networks", elem_id="networks")
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(
                    label="Negative prompt", elem_id="negative", max_length=MOST_LETTERS,
                    info="acts on the teacher, and on LoRAs at a guidance above 1",
                )  # fmt: skip
                side = shelf.size(args.max_size)
                size = gr.Slider(8, min(4 * side, args.max_size), side, step=8, label="Size", elem_id="size",
                                 info=f"pixels a side; the teacher's own is {side}")  # fmt: skip
                lora_guidance = gr.Slider(1, 4, 1, step=0.1, label="Guidance of LoRAs", visible=has_loras,
                                          elem_id="lora-guidance", info="1 adds none to what was learned")  # fmt: skip
                lora_strength = gr.Slider(0, MOST_STRENGTH, 1, step=0.05, label="LoRA strength", visible=has_loras,
                                          elem_id="lora-strength")  # fmt: skip
                sampler = gr.Dropdown([AS_TRAINED, *STUDENT_SAMPLERS], label="Sampler", elem_id="sampler",
                                      info="of the trained networks")  # fmt: skip
                teacher_sampler = gr.Dropdown(TEACHER_SAMPLERS, label="Sampler of the teacher")
    fields = [prompt, negative, shown, steps, guidance, seed, size, sampler, teacher_sampler, lora_guidance,
              lora_strength, picture, strength]  # fmt: skip
    # A textbox's `input` misses the backspace key and what is pasted; a slider's `change` has its arrow keys.
    changed = [field.change for field in (prompt, negative, steps, guidance, seed, size, lora_guidance, lora_strength)]
    chosen = [shown.input, sampler.input, teacher_sampler.input, picture.input, strength.change]
    asked = gr.Number(visible=False)  # when, by the browser's clock
    gr.on([page.load, *changed, *chosen], answers.draw, [asked, *fields], cards, js=WITH_TIME,
          concurrency_limit=MOST_AT_ONCE, **PRIVATE)  # fmt: skip
    dice.click(None, None, seed, js=DICE, **PRIVATE)
    if trained:
        inputs = [*sweep_fields, *fields]
        sweep.click(answers.sweep, inputs, grid, concurrency_limit=MOST_AT_ONCE, **PRIVATE)


def sweep_part(shelf: Shelf, trained: list[str], scale: float) -> tuple[gr.Button, list[Any], gr.HTML]:
    """Steps x guidance of one trained network: (the button, its fields, the place for the grid)."""

    def scales_for(label: str) -> str:
        """Three guidance scales that fit a network."""
        low, high = (shelf.networks[label].guidance if label in trained else None) or (1.0, scale)
        return ", ".join(f"{value:g}" for value in dict.fromkeys((low, (low + high) / 2, high)))

    with gr.Accordion("Sweep: steps x guidance", open=False):
        with gr.Row():
            network = gr.Dropdown(trained, label="Network", elem_id="sweep-network", min_width=120)
            steps = gr.Textbox("1, 2, 4, 8", label="Steps", elem_id="sweep-steps", max_length=100, min_width=120)
            scales = gr.Textbox(scales_for(trained[0]), label="Guidance", elem_id="sweep-guidance", max_length=100,
                                min_width=120)  # fmt: skip
        button = gr.Button("Draw the grid", elem_id="sweep-draw")
        grid = gr.HTML(elem_id="sweep")
    network.input(scales_for, network, scales, **PRIVATE)
    return button, [network, steps, scales], grid


def run_tab(answers: Answers) -> None:
    """The tab of the run, which is read again while the run goes on."""
    if answers.run is None:
        gr.HTML('<p class="message">Start the playground with --output_dir to see a run here.</p>')
        return
    seen = gr.State(("", 0))
    facts = gr.HTML(elem_id="facts")
    curves = gr.HTML(elem_id="curves")
    position = gr.Slider(1, 2, 1, step=1, label="Validation pictures", elem_id="position",
                         info="1 is the first grid, the last one the newest")  # fmt: skip
    pictures = gr.HTML(elem_id="validation")
    outputs = [seen, facts, curves, position, pictures]
    timer = gr.Timer(REFRESH_SECONDS)
    gr.on([timer.tick], answers.refresh, [seen, position], outputs, concurrency_limit=4, **PRIVATE)
    position.input(answers.turn_to, position, pictures, concurrency_limit=4, **PRIVATE)


def make_page(args: Namespace, shelf: Shelf) -> gr.Blocks:
    """The page. Nothing is loaded yet."""
    answers = Answers(args, shelf)
    with gr.Blocks(title="LCM playground", analytics_enabled=False) as page:
        gr.HTML('<div class="head"><h1>LCM playground</h1><p>It draws while you type.</p></div>')
        with gr.Tab("Draw"):
            draw_tab(args, shelf, answers, page)
        with gr.Tab("The run"):
            run_tab(answers)
        page.load(answers.stay, concurrency_limit=MOST_VISITORS, **PRIVATE)
        page.unload(answers.leave)
    page.queue(max_size=MOST_WAITING, api_open=False)
    return page


def serve(args: Namespace, wait: bool = True) -> gr.Blocks:
    """Start the server; with `wait` until Ctrl-C. Raises UserError."""
    page = make_page(args, Shelf(args))
    is_local = bool(LOCAL_HOST.fullmatch(args.host)) and not args.share
    try:
        _, address, public = page.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            inbrowser=args.open,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            footer_links=[],
            allowed_paths=[],
            max_file_size=1,
            app_kwargs={"middleware": [Middleware(Guard, is_local=is_local)]},
            state_session_capacity=MOST_VISITORS,
            max_threads=MOST_VISITORS + 2 * MOST_AT_ONCE,  # requests at once, those of `stay` too
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Default(font=FONTS, font_mono=FIXED_FONTS).set(
                block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
            ),
            css=(HERE / "page.css").read_text(),
        )
    except OSError as error:
        raise UserError(f"--port: {first_line(error)}") from error
    print(f"The playground is at {public or address}  (Ctrl-C stops it)", flush=True)
    if wait:
        threading.Event().wait()  # Gradio's own wait takes seconds to end while pages are open
    return page
