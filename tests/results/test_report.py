"""The report that a run leaves: a card whose pictures exist, and curves of the whole run."""

import re
import shlex
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, Script, hub
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from PIL import Image

import evaluate_lcm
from lcm.models import networks, usage
from lcm.pictures import validation
from lcm.results import card as lcm_card
from lcm.results import curves, finish


def pictures_of(folder):
    return re.findall(r"!\[.*?\]\((.*?)\)", (folder / "README.md").read_text())


def test_the_card_shows_pictures_and_curves(script, tmp_path):
    script.main(tmp_path)
    assert pictures_of(tmp_path) == ["validation/step-000004.png", "training.png"]
    for name in pictures_of(tmp_path):
        assert np.asarray(Image.open(tmp_path / name)).std() > 1


def test_a_card_without_pictures(teacher, shards, tmp_path, monkeypatch, capfd):
    """What could not be drawn is not shown, and costs nothing else."""

    def broken(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(validation.Validation, "show", broken)
    monkeypatch.setattr(finish, "draw_curves", broken)
    script = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    script.main(tmp_path)
    assert pictures_of(tmp_path) == []
    assert "No curves: no font" in capfd.readouterr().err
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


def drawn_lines(rows, tmp_path, monkeypatch):
    """{title of a panel: [(x, y) of each solid line]} as matplotlib was given them."""
    figures = []
    monkeypatch.setattr(matplotlib.figure, "Figure", lambda **more: figures.append(Figure(**more)) or figures[-1])
    curves.draw_curves(rows, tmp_path / "training.png")
    return {
        axes.get_title(): [
            (line.get_label(), list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines
            if not line.get_alpha()
        ]
        for axes in figures[0].axes
    }


def test_curves(tmp_path, monkeypatch):
    """One panel each for loss, loss by timestep and gradients; rows in which no timestep of a quarter was drawn."""
    same = {"gradient_norm": 2.0, "loss_by_timestep/000-249": 0.5}
    rows = [{"step": 10 * i, "loss": 1 / i, **same} for i in range(1, 9)]
    rows[3]["loss_by_timestep/750-999"] = 3.0
    lines = drawn_lines(rows, tmp_path, monkeypatch)
    steps = [10 * i for i in range(1, 9)]
    ((_, x, y),) = lines["loss"]
    assert x == steps and np.allclose(y, [1 / i for i in range(1, 9)])
    assert [(label, x, y) for label, x, y in lines["loss by timestep"]] == [
        ("t from 0 to 249", steps, [0.5] * 8),
        ("t from 750 to 999", [40], [3.0]),
    ]
    assert lines["gradient norm, before clipping"][0][1:] == (steps, [2.0] * 8)
    assert Image.open(tmp_path / "training.png").size == (1200, 340)


def test_curves_of_one_row(tmp_path, monkeypatch):
    """And one without a gradient norm, as when fp16 overflowed at every step."""
    lines = drawn_lines([{"step": 4, "loss": 1.0, "loss_by_timestep/000-249": 1.0}], tmp_path, monkeypatch)
    assert lines["loss"][0][1:] == ([4], [1.0]) and lines["gradient norm, before clipping"] == []


def test_a_running_mean_keeps_length_and_level():
    rng = np.random.default_rng(0)
    for count in (1, 2, 19, 20, 41, 1000):
        assert np.allclose(curves.smooth([3.0] * count), 3.0) and len(curves.smooth([3.0] * count)) == count
    noise = rng.normal(size=1000)
    assert curves.smooth(noise).std() < 0.3 * noise.std()
    assert np.allclose(curves.smooth(np.arange(100.0))[10:-10], np.arange(100.0)[10:-10], atol=0.6)


def test_a_readme_that_is_not_ours_stays(teacher, shards, tmp_path, monkeypatch, capfd):
    """As in a folder of sources; our own reports are replaced, under whatever name they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# A project\n")
    script = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    for steps in (1, 2):
        script.main(".", f"--max_train_steps={steps}")
        printed = capfd.readouterr()
        assert "./README.md is not a run's report and stays; the report is model_card.md" in printed.err
        assert "./model_card.md: the report" in printed.out
        assert (tmp_path / "README.md").read_text() == "# A project\n"
        assert f"| optimizer steps | {steps} |" in (tmp_path / "model_card.md").read_text()
    assert sorted(path.name for path in tmp_path.glob("*.md")) == ["README.md", "model_card.md"]
    (tmp_path / "README.md").unlink()
    for steps in (1, 2):
        script.main(".", f"--max_train_steps={steps}")
        assert f"| optimizer steps | {steps} |" in (tmp_path / "README.md").read_text()


def test_names_of_reports(tmp_path):
    """The first that is free or holds a report of the same kind: an evaluation does not replace a model card."""
    names = []
    for kind in ("model_card", "evaluation", "model_card", "evaluation"):
        names.append(lcm_card.report_name(tmp_path, kind))
        (tmp_path / names[-1]).write_text(f"a report\n\n{lcm_card.mark(kind)}\n")
    assert names == ["README.md", "evaluation.md"] * 2
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    (tmp_path / "model_card.md").mkdir()
    assert lcm_card.report_name(tmp_path, "model_card") == "model_card-2.md"


def test_an_evaluation_leaves_a_readme_that_is_not_its_own(tmp_path, capfd):
    (tmp_path / "README.md").write_text("# A project\n")
    row = {"network": "teacher", "steps": 1, "sampler": "ddim", "guidance_scale": 1.0}
    results = {"command": "evaluate", "measured": [], "reference": "nothing", "rows": [row]}
    for _ in range(2):
        evaluate_lcm.write(tmp_path, results, [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], ["a prompt"])
        assert f"{tmp_path}: evaluation.md with this table" in capfd.readouterr().out
    assert (tmp_path / "README.md").read_text() == "# A project\n"
    assert sorted(path.name for path in tmp_path.glob("*.md")) == ["README.md", "evaluation.md"]
    assert (tmp_path / "evaluation.md").read_text().startswith("# Evaluation\n")


def test_all_pages_of_pictures_are_pushed(teacher, shards, tmp_path):
    script = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    prompts = [f"number {i}" for i in range(13)]
    with hub() as server:
        push = ("--push_to_hub", "--hub_model_id=mine", f"--hub_token={server.token}", "--max_train_steps=1")
        script.main(tmp_path, *push, "--validation_prompts", *prompts)
        files = server.files("tester/mine")
    for number in (1, 2):
        local = tmp_path / "validation" / f"step-000001-{number}.png"
        assert files[f"validation-{number}.png"] == local.read_bytes()
    card = files["README.md"].decode()
    assert "![Validation pictures](validation-1.png)" in card and "[2](validation-2.png)" in card
    assert "![Curves of the training](training.png)" in card and "training.png" in files


def written_card(folder):
    return ModelCard.load(folder / "README.md")


def command_of(card, script="train_lcm"):
    """The options of the command on a card."""
    (line,) = re.findall(rf"^(?:accelerate launch|python) ({script}.*)$", card.text, re.M)
    return shlex.split(line)[1:]


@pytest.mark.parametrize("name", ["sd", "lora_sd"])
def test_a_card_is_valid_and_holds_the_command(name, teacher, shards, tmp_path):
    """The client's own check, by the stand-in server's rules, of the card here and of the one that is pushed."""
    script = Script(name, teacher, shards, SCRIPTS[name])
    (tmp_path / "run.yaml").write_text("huber_c: 0.002\nloss_type: huber\n")
    options = (f"--config={tmp_path / 'run.yaml'}", "--push_to_hub", "--hub_model_id=mine", "--max_train_steps=1")
    with hub() as server:
        script.main(tmp_path / "out", *options, f"--hub_token={server.token}")
        pushed = ModelCard(server.files("tester/mine")["README.md"].decode())
        for card in (written_card(tmp_path / "out"), pushed):
            card.validate()
        assert "validation.png" in server.files("tester/mine")
    assert pushed.data.widget == [{"text": "a red three", "output": {"url": "validation.png"}}]
    assert written_card(tmp_path / "out").data.widget[0]["output"]["url"] == "validation/step-000001.png"
    scale = 1 if "lora" in name else 7.5
    assert pushed.data.inference == {"parameters": {"num_inference_steps": 1, "guidance_scale": scale}}
    # The exact command, but for the token; the pushed one has no folders of this machine.
    given = script.module.parse_args(script.options(tmp_path / "out", *options))
    again = script.module.parse_args(
        [word for word in command_of(written_card(tmp_path / "out")) if "hub_token" not in word]
    )
    assert {**vars(given), "config": None} == vars(again)
    assert str(tmp_path) not in str(pushed) and "--output_dir=out " in pushed.text
    assert "--loss_type=huber" in command_of(pushed) and "--hub_token=***" in command_of(pushed)


def test_an_evaluation_in_the_output_folder_is_on_the_card(teacher, shards, tmp_path):
    """With its command, and as `model-index`; not after more training, which it says nothing about."""
    script = Script("lora_sd", teacher, shards, SCRIPTS["lora_sd"])
    resumed = ("--resume_from_checkpoint=latest", "--checkpointing_steps=1")
    script.main(tmp_path, "--max_train_steps=1", "--checkpointing_steps=1")
    setting = {"sampler": "lcm", "guidance_scale": 1.0}
    rows = [{"network": network, "steps": 4, **setting, "clip_score": 30.5} for network in ("teacher", "LoRA")]
    results = {
        "command": f"python evaluate_lcm.py --trained LoRA={tmp_path}",
        "measured": ["seed 0"],
        "reference": "10 pictures of heldout",
        "rows": rows,
    }
    results["table"] = evaluate_lcm.as_markdown(results)
    evaluate_lcm.write(tmp_path, results, [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * 2, ["a prompt"])
    with hub() as server:
        push = ("--push_to_hub", "--hub_model_id=mine", f"--hub_token={server.token}")
        script.main(tmp_path, "--max_train_steps=1", *resumed, *push)
        pushed = ModelCard(server.files("tester/mine")["README.md"].decode())
        pushed.validate()
    (measured,) = pushed.data.eval_results
    assert (measured.metric_type, measured.metric_value, measured.task_type) == ("clip_score", 30.5, "text-to-image")
    assert measured.metric_name == "clip score, steps 4, guidance scale 1"
    for card in (pushed, written_card(tmp_path)):
        assert results["table"] in card.text
    assert command_of(pushed, "evaluate_lcm") == ["--trained", f"LoRA={tmp_path.name}"]
    assert command_of(written_card(tmp_path), "evaluate_lcm") == ["--trained", f"LoRA={tmp_path}"]
    rows[1:1] = [{**rows[1], "network": "another"}]
    assert lcm_card.eval_results(results) == []  # whose figures they are cannot be told
    script.main(tmp_path, "--max_train_steps=2", *resumed)
    assert results["table"] not in written_card(tmp_path).text and not written_card(tmp_path).data.eval_results


@pytest.mark.parametrize(("text", "shown"), [
    ("--output_dir=/home/me/lcm-sd15", "--output_dir=lcm-sd15"),
    ("'pipe:cat /data/shards/{00000..00002}.tar'", "'pipe:cat {00000..00002}.tar'"),
    ("/data/a.tar::/data/b.tar", "a.tar::b.tar"),
    ("pipe:/usr/bin/cat ~/a.tar", "pipe:cat a.tar"),
    ("https://host.org/a/b.tar", "https://host.org/a/b.tar"),
    ("s3://bucket/a/b.tar", "s3://bucket/a/b.tar"),
    ("path/to/shards ../up some/teacher", "path/to/shards ../up some/teacher"),
    ("a red and/or blue 3", "a red and/or blue 3"),
])  # fmt: skip
def test_a_published_card_has_no_folders_of_this_machine(text, shown):
    assert lcm_card.without_folders(text) == shown


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("on_hub", [False, True])
def test_code_for_a_machine(device, on_hub):
    """Half precision and its files where there is a GPU, and a word about the other kind; each is Python."""
    args = SimpleNamespace(
        w_min=2,
        w_max=5,
        ema_decay=None,
        num_ddim_timesteps=50,
        validation_num_inference_steps=[1, 3, 8],
        validation_prompts=['a "quoted" one'],
        target="lcm",
        unet_time_cond_proj_dim=16,
    )
    full = networks.WholeUNet(args, None, None, None)
    lora = networks.Lora(args, SimpleNamespace(active=None), None, SimpleNamespace(active=None))
    for trained in (full, lora):
        code = trained.usage_code("some/teacher", "some/where", on_hub, usage.Machine(device))
        compile(code, "printed", "exec")
        assert "num_inference_steps=3" in code  # of the validation pictures, next to 4
        lines = "".join(line for line in code.splitlines() if not line.startswith("#"))
        assert (f'.to("{device}")' in lines and "float16" in lines) == (device != "cpu")
        assert "float32" in code and "float16" in code  # one of them in the word about the other kind
        assert ('variant="fp16"' in lines) == (trained is full and device != "cpu")
        assert ('subfolder="unet_target"' in code) == (trained is full and not on_hub)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("somewhere/my-finetune", "my-finetune"),
        ("demo/teacher", "demo/teacher"),
        ("demo/teacher/", "demo/teacher"),
        ("runs/dreamy/checkpoint-500", "dreamy/checkpoint-500"),
        ("cats/Model", "cats/Model"),
        ("hub/models--some--thing/snapshots/0123abcd", "some/thing"),
    ],
)
def test_the_name_of_a_local_teacher(tmp_path, monkeypatch, folder, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    for given in (folder, f"./{folder}", str(tmp_path / folder)):
        assert lcm_card.teacher_name(SimpleNamespace(pretrained_teacher_model=given)) == name
    assert lcm_card.teacher_name(SimpleNamespace(pretrained_teacher_model="user/teacher")) == "user/teacher"
