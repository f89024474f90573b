"""What the README says and a machine can check: its commands, its figures that are counted, its links."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^accelerate launch (train_\w+)\.py ((?:.*\\\n)*.*)$", README, re.M)


def test_every_script_has_its_command():
    assert sorted(script for script, _ in COMMANDS) == sorted(f"train_lcm_distill_{name}_wds" for name in SCRIPTS)


@pytest.mark.parametrize(("script", "options"), COMMANDS, ids=[script for script, _ in COMMANDS])
def test_command_is_understood(script, options):
    """Each real command is parsed by its script as it stands."""
    args = importlib.import_module(script).parse_args(shlex.split(options.replace("\\\n", " ")))
    assert args.max_train_steps == 1000 and args.resume_from_checkpoint == "latest"
    if "lora" in script:
        assert args.w_min == args.w_max == 7.5


def test_docstrings_commands_are_understood():
    """The launch command at the top of each script, too."""
    for name in SCRIPTS:
        module = importlib.import_module(f"train_lcm_distill_{name}_wds")
        (options,) = re.findall(rf"^accelerate launch {module.__name__}\.py ((?:.*\\\n)*.*)$", module.__doc__, re.M)
        assert module.parse_args(shlex.split(options.replace("\\\n", " "))).pretrained_teacher_model


def test_estimate_of_memory_is_what_the_command_prints():
    done = subprocess.run(
        [sys.executable, "benchmarks/estimate.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 6
    for label, *figures in rows:
        script = label.strip("| ").split(",")[0]
        assert any(f"`{script}`" in line and line.endswith(" | ".join(figures)) for line in README.splitlines())


@pytest.mark.parametrize("document", ["README.md", "demo/README.md", "docs/inference.md"])
def test_links_and_code(document):
    """Relative links lead somewhere; Python blocks are Python."""
    path = ROOT / document
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        compile(block, document, "exec")


def test_lower_bounds_are_those_of_the_oldest_versions():
    """requirements.txt allows from the pin of constraints-oldest.txt on, which `make test-oldest` runs."""

    def versions(name, operator):
        rows = re.findall(rf"^([\w-]+){operator}([\w.]+)", (ROOT / name).read_text(), re.M)
        return {package.lower().replace("_", "-"): version for package, version in rows}

    bounds, oldest = versions("requirements.txt", ">="), versions("constraints-oldest.txt", "==")
    assert bounds and bounds == {package: oldest[package] for package in bounds}
    assert bounds.keys() <= versions("constraints.txt", "==").keys()


def test_every_fault_names_tests_that_exist():
    named = re.findall(r"`([\w/]*test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
