"""What the README and docs/ say and a machine can check: commands, options, computed figures, links, the map."""

import argparse
import importlib
import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "demo", "demo/sprites")
    for path in (ROOT / folder).glob("*.md")
)
# Options of other programs that the documents name: pip, torchrun, SLURM, ruff, pre-commit.
OTHERS = {"--nproc_per_node", "--nnodes", "--signal", "--requeue", "--all-files"}
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


def documented_commands():
    """{(script, its options as words): document} of each command with Python in a block of a document, and within its
    sentences if it stands there with an option."""
    found = {}
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
        sentences = re.findall(r"`([^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        lines = blocks.splitlines() + [" ".join(code.split()) for code in sentences]
        for line in lines:
            command = re.match(r"(?:for .*do )?(?:\w+=\S+ )?(?:srun )?(?:python|accelerate launch|torchrun .*?)"
                               r" ((?:demo/|benchmarks/|tests/)?\w+\.py)\b([^;]*)", line)  # fmt: skip
            if command:
                words = shlex.split(command[2].replace(" ...", ""), comments=True)
                found[command[1], tuple(words)] = document
    return found


PLACEHOLDERS = {"GB": "24"}  # words for a number
OF_DEMO = re.compile(r"(demo|benchmarks)/\w+\.py")


@pytest.fixture
def a_users_folder(tmp_path, monkeypatch):
    """A working directory with the files that the documents' commands name."""
    for folder in ("pictures", "path/to/pictures", "path/to/model", "cached", "shards"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("a lighthouse\n")
    for name in ("demo", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


class Parsed(BaseException):
    """Raised when a script has parsed its options, with those that it did not know."""


@pytest.mark.parametrize(("script", "words"), documented_commands())
def test_every_command_is_understood(script, words, a_users_folder, monkeypatch):
    """By the script's own parser and checks. In scripts of the demo and of the benchmarks nothing runs after that."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    assert (ROOT / script).is_file()
    if script.startswith("tests/"):
        return
    if not OF_DEMO.fullmatch(script):
        needed = [action for action in parser_of(script.removesuffix(".py"))._actions if action.required]
        if words and all(set(action.option_strings) & {word.split("=")[0] for word in words} for action in needed):
            importlib.import_module(script.removesuffix(".py")).parse_args(words)
        return
    if "ArgumentParser" not in (ROOT / script).read_text():
        return  # it takes words, in their order

    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, *args, **kwargs):
        raise Parsed(parse(parser, *args, **kwargs)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr("sys.argv", [script, *words])
    monkeypatch.setattr("sys.path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    passed_on = None
    if "parse_known_args" in (ROOT / script).read_text():  # what they do not know goes to another script
        passed_on = parser_of("train_lcm_distill_sd_wds" if script.startswith("demo/") else "playground")
    for word in parsed.value.args[0]:
        assert passed_on and (not word.startswith("--") or word.split("=")[0] in passed_on._option_string_actions)


def test_readme_is_short():
    assert len(README.splitlines()) <= 250


def parser_of(script):
    """The parser of a script, as it is when it gets its arguments."""

    class Caught(Exception):
        pass

    def catch(parser, *args, **kwargs):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
        with pytest.raises(Caught) as caught:
            importlib.import_module(script).parse_args([])
    return caught.value.args[0]


def options_of(parser, without=()):
    """The options in the order of `--help`, but for `--help` itself and the groups called one of `without`."""
    groups = [group for group in parser._action_groups if group.title not in without]
    actions = [action for group in groups for action in group._group_actions if action.option_strings]
    return [action.option_strings[0] for action in actions if action.dest != "help"]


def documented(heading):
    """The options in the first column of the tables below a heading of docs/options.md, in order."""
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", OPTIONS, re.M | re.S)
    return re.findall(r"^\| `(--\w+)` \|", section, re.M)


# The scripts with options of their own, which each have a section of docs/options.md.
SINGLE = sorted(
    path.stem
    for path in ROOT.glob("*.py")
    if "\ndef parse_args(" in path.read_text() and not re.fullmatch(r"train_lcm_distill_\w+_wds", path.stem)
)


def test_options_of_the_training_scripts_are_documented():
    """docs/options.md has every option of the four scripts, in the order of `--help`, and no other."""
    rows = documented("The training scripts")
    parsers = [options_of(parser_of(f"train_lcm_distill_{name}_wds")) for name in SCRIPTS]
    assert set(rows) == set().union(*parsers) and len(set(rows)) == len(rows)
    for options in parsers:
        assert options == [row for row in rows if row in options]


@pytest.mark.parametrize("script", SINGLE)
def test_options_of_other_scripts_are_documented(script):
    """The same for each other script; the options of the teacher and of the data are documented once."""
    assert documented(f"{script}.py") == options_of(parser_of(script), without=["models", "data"])


def test_groups_are_documented_in_the_order_of_help():
    titles = [group.title for group in parser_of("train_lcm_distill_sd_wds")._action_groups]
    headings = [heading.lower() for heading in re.findall(r"^### (.*)$", OPTIONS, re.M)]
    expected = [title.lower() for title in titles if title not in ("positional arguments", "options")]
    assert headings[: len(expected)] == expected


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_that_documents_name_exist(document):
    """Each `--option` in a document is one of a script, of the demo or of a benchmark."""
    scripts = [f"train_lcm_distill_{name}_wds" for name in SCRIPTS] + SINGLE
    actions = [action for script in scripts for action in parser_of(script)._actions]
    known = OTHERS | {option for action in actions for option in action.option_strings}
    for path in [*ROOT.glob("demo/*.py"), *ROOT.glob("benchmarks/*.py")]:
        known |= set(re.findall(r'"(--\w+)"', path.read_text()))
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert named <= known, sorted(named - known)


def test_every_module_is_on_the_map():
    """docs/house.md has each file of lcm/, once."""
    rows = re.findall(r"^\| `(lcm/[\w/]+\.py)` \|", (ROOT / "docs" / "house.md").read_text(), re.M)
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("lcm/**/*.py") if path.name != "__init__.py"}
    assert files <= set(rows), sorted(files - set(rows))
    assert len(set(rows)) == len(rows)


def test_where_to_put_what_exists():
    """Files, and names in them, in the table of CONTRIBUTING.md."""
    rows = re.findall(r"^\| (?!change|---)[^|]* \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(rows) >= 12
    for row in rows:
        quoted = re.findall(r"`([\w./]+)`", row)
        files = [name for name in quoted if name.endswith(".py")]
        code = "".join((ROOT / name).read_text() for name in files)
        for name in set(quoted) - set(files):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", code), (name, row)


def test_evaluation_has_the_readmes_command():
    """The table in docs/evaluation.md stands beside the command of the README."""
    commands = re.findall(r"^python evaluate_lcm\.py (?:.*\\\n)*.*$", README, re.M)
    assert len(commands) == 1 and commands[0] in (ROOT / "docs" / "evaluation.md").read_text()


def anchors(text):
    """The fragments by which GitHub links to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_code(document):
    """Relative links lead to files and headings that exist; Python blocks are Python."""
    path = ROOT / document
    text = path.read_text()
    for target, fragment in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked.read_text()), (target, fragment)
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
