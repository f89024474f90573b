"""notebooks/: every cell is run, on the built-in teacher. Only the parameters differ from what a user runs."""

import re
import tarfile

import nbformat
import pytest
from conftest import DEMO_TEACHER, ROOT
from nbclient import NotebookClient
from safetensors.torch import load_file

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_small_and_has_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = cells(notebook, "code")
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert len(notebook.cells) <= 20 and sum(len(cell.source.splitlines()) for cell in code) <= 100
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", "".join(cell.source for cell in cells(notebook, "markdown"))):
        assert (path.parent / target).exists(), target
    # Whoever opened the file alone gets what the scripts need; nothing of it is imported before that.
    install = next(i for i, cell in enumerate(code) if '"requirements.txt"' in cell.source)
    assert not any(re.search(r"import (torch|diffusers)|from diffusers", cell.source) for cell in code[:install])


def test_own_pictures(tmp_path):
    """Some pictures with captions and one without; installing and cloning are left out, since all of it is there."""
    folder = tmp_path / "pictures"
    with tarfile.open(ROOT / "demo" / "shards" / "heldout-00000.tar") as shard:
        names = [name for name in shard.getnames() if name.endswith((".png", ".txt"))][:16]
        shard.extractall(folder, [shard.getmember(name) for name in names], filter="data")
    without = sorted(folder.glob("*.txt"))[0]
    without.unlink()
    changed = {
        "install": False,
        "pictures": str(folder),
        "caption": "a cat, night",
        "work": str(tmp_path / "work"),
        "teacher": str(DEMO_TEACHER),
        "resolution": 64,
        "rank": 4,
        "guidance_scale": 3.0,
        "batch_size": 4,
        "steps": 2,
        "precision": "no",
        "prompts": ["a fox and a star, night"],
    }
    notebook = nbformat.read(ROOT / "notebooks" / "own_pictures.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in changed.items():
        parameters.source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", parameters.source, flags=re.M)
        assert count == 1, name
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}  # the working directory of a notebook is its folder
    NotebookClient(notebook, timeout=600, resources=resources).execute()

    assert without.read_text() == "a cat, night"
    weights = load_file(tmp_path / "work" / "lora" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    printed = "".join(output.get("text", "") for cell in cells(notebook, "code") for output in cell.outputs)
    assert "8 pictures in" in printed and "Trained to step 2" in printed and "a fox and a star, night" in printed
    shown = [
        output for cell in cells(notebook, "code") for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 2  # the grid, and the picture of the prompt
