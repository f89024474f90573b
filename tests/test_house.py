"""The rooms of lcm/ and the imports between them: arrows point down only, and there are no circles."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest
from conftest import ROOT

COMMANDS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "lcm_common")
FILES = [ROOT / f"{name}.py" for name in (*COMMANDS, "lcm_common")] + sorted((ROOT / "lcm").rglob("*.py"))
OWN = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

# What each room may import besides itself. Rooms and modules that stand in no line are in no other line either.
BASE = {"lcm", "lcm.errors", "lcm.secrets", "lcm.storage"}
OPTIONS = BASE | {"lcm.options", "lcm.cache"}
MADE_OF = OPTIONS | {"lcm.data", "lcm.models", "lcm_common"}
DRAWN = MADE_OF | {"lcm.pictures"}
RUN = DRAWN | {"lcm.results", "lcm.run"}
MAY_IMPORT = {
    **{name: set() for name in ("lcm_common", "lcm", "lcm.secrets", "lcm.storage")},
    "lcm.errors": {"lcm.secrets"},
    "lcm.options": BASE,
    "lcm.cache": BASE,
    "lcm.data": OPTIONS,
    "lcm.models": MADE_OF - {"lcm.data"},
    "lcm.pictures": MADE_OF,
    "lcm.evaluation": DRAWN,
    "lcm.results": DRAWN,
    "lcm.run": RUN,
    "lcm.session": RUN,
    "lcm.precompute": MADE_OF,
    "lcm.drawing": DRAWN | {"lcm.evaluation"},
    "lcm.playground": RUN | {"lcm.evaluation"},
    "lcm.simulation": RUN | {"lcm.session"},
    "command": RUN
    | {"lcm.session", "lcm.precompute", "lcm.drawing", "lcm.evaluation", "lcm.playground", "lcm.simulation"},
}
STANDARD_LIBRARY_ONLY = {*BASE, "lcm.options"}


def room(module):
    """lcm.data of lcm.data.shards, lcm.errors of itself; all scripts at the top are alike."""
    return "command" if module in COMMANDS else ".".join(module.split(".")[:2])


def imports(module):
    """(line, name of the imported module) of each import in a file, those within functions too."""
    for node in ast.walk(ast.parse(OWN[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{OWN[module]}:{node.lineno}: a relative import"
            for alias in node.names:  # `from lcm.data import shards` names a module, too
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in OWN else node.module


def at(module, line):
    return f"{OWN[module].relative_to(ROOT)}:{line}"


def is_wrong(module, name):
    """What is wrong with an import, or None."""
    own_room, top = room(module), name.partition(".")[0]
    if name in OWN:
        if room(name) not in MAY_IMPORT[own_room] and (room(name) != own_room or own_room == "command"):
            return "not allowed"
    elif own_room in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names:
        return "standard library only"
    elif own_room == "lcm_common" and top != "torch":
        return "torch only"


def test_imports_point_down():
    assert {room(module) for module in OWN} <= MAY_IMPORT.keys()
    wrong = [
        f"{at(module, line)}: {room(module)} -> {name}: {is_wrong(module, name)}"
        for module in OWN
        for line, name in imports(module)
        if is_wrong(module, name)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_circles():
    """Between modules, those of one room too."""
    arrows = {module: {name: line for line, name in imports(module) if name in OWN} for module in OWN}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]
        steps = [f"{at(a, arrows[a][b])}: {a} -> {b}" for a, b in pairwise(circle)]
        pytest.fail("a circle of imports:\n" + "\n".join(steps))
