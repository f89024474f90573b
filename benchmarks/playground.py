"""From a key press in the browser to the new picture: the playground, in a headless Chromium.

    python benchmarks/playground.py --pretrained_teacher_model demo/teacher --trained student=lcm-demo

Starts the real command and opens its page. Types one letter after another, each once the picture of the last is there,
and prints medians in ms over `--keys` keys:

key to picture   from the browser's event of the key to the frame in which the first network's new picture stands
drawing          the part of it in which the server draws, as the page shows it
rest             the difference: browser, Gradio, the picture's way
first byte       a request to the server that draws nothing, for comparison

Needs gradio, playwright and Chromium. Options that are not listed go to playground.py.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LETTERS = "a fox and a star, night" * 20
WATCH = """label => {
  window.times = [];
  let key = null, pressed = null;
  const prompt = document.querySelector('#prompt');
  prompt.addEventListener('keydown', event => { key = event.timeStamp; }, true);
  prompt.addEventListener('input', () => { pressed = key; }, true);  // the letter is now in the field
  new MutationObserver(() => {
    const image = document.querySelector(`.card[data-network="${label}"]:not(.stale) img`);
    const typed = document.querySelector('#prompt textarea').value.trim();
    if (pressed === null || !image || image.alt !== `${label}: ${typed}`) return;
    const start = pressed;
    pressed = null;
    requestAnimationFrame(() => times.push(performance.now() - start));  // it is decoded with the frame
  }).observe(document.querySelector('#cards'), {childList: true, attributes: true, subtree: true});
}"""


def measure(page, label: str, keys: int, pause: float) -> tuple[list[float], list[float]]:
    """Milliseconds from key to picture, and those of them in which the server drew."""
    card = page.locator(f'.card[data-network="{label}"]:not(.stale)')
    page.locator("#prompt textarea").press_sequentially("x")
    card.locator("img").wait_for(timeout=120_000)
    page.wait_for_timeout(3000)  # the other networks are loaded
    page.evaluate(WATCH, label)
    drawing = []
    for letter in [letter for letter in LETTERS if letter != " "][:keys]:  # a space at the end changes no picture
        count = page.evaluate("times.length")
        page.keyboard.press(letter)
        page.wait_for_function(f"times.length > {count}", polling=10)
        seconds = re.match(r"([\d.]+) s", card.locator(".figures").inner_text())
        drawing.append(float(seconds[1]) * 1000)
        page.wait_for_timeout(pause * 1000)
    return page.evaluate("times"), drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=50, help="keys that are pressed (default: 50)")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between a picture and the next key")
    parser.add_argument("--steps", type=int, default=2, help="steps of the trained networks (default: 2)")
    args, more = parser.parse_known_args()
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    server = subprocess.Popen([sys.executable, "playground.py", *more], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://[\d.:]+", server.stdout.readline())[0]
        with sync_playwright() as playwright:
            more = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
            page = playwright.chromium.launch(executable_path=chromium, args=more).new_page()
            page.goto(address)
            page.get_by_text("Type what to draw.").wait_for()
            page.locator("#steps input[type=range]").fill(str(args.steps))
            label = page.locator(".card").first.get_attribute("data-network")
            times, drawing = measure(page, label, args.keys, args.pause)
            empty = []
            for _ in range(args.keys):
                start = time.perf_counter()
                page.request.get(f"{address}/config")
                empty.append((time.perf_counter() - start) * 1000)
    finally:
        server.terminate()
        server.wait()
    rest = [whole - part for whole, part in zip(times, drawing, strict=True)]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{label}, {len(times)} keys, {args.steps} steps, {os.cpu_count()} cores, load average {load}")
    for name, values in (("key to picture", times), ("drawing", drawing), ("rest", rest), ("first byte", empty)):
        low, high = statistics.quantiles(values, n=10)[0], statistics.quantiles(values, n=10)[-1]
        print(f"{name:14}  {statistics.median(values):6.0f} ms  (a tenth below {low:.0f}, a tenth above {high:.0f})")


if __name__ == "__main__":
    main()
