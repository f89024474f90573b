"""`--config`: what a file says is what the command line would have said, and configs/ is right."""

import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT, SCRIPTS, Script

README = (ROOT / "README.md").read_text()
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
WRITTEN = {
    "run.yaml": """
        learning_rate: 1e-4
        mixed_precision: no     # not False
        gradient_checkpointing: true
        random_flip: no
        hub_private: false
        hub_model_id: ~
        caption_key:
        train_shards_path_or_url: [a.tar, "b{0..3}.tar"]
        validation_num_inference_steps: [1, 4]
        validation_resolution: [16x24, 32]
        validation_prompts: "a prompt: with a colon"
        validation_teacher_steps: []
    """,
    "run.toml": """
        learning_rate = 1e-4
        mixed_precision = "no"
        gradient_checkpointing = true
        random_flip = false
        hub_private = false
        train_shards_path_or_url = ["a.tar", "b{0..3}.tar"]
        validation_num_inference_steps = [1, 4]
        validation_resolution = "16x24,32"
        validation_prompts = ["a prompt: with a colon"]
        validation_teacher_steps = []
    """,
    "run.json": """{
        "learning_rate": 0.0001, "mixed_precision": "no", "gradient_checkpointing": true, "random_flip": false,
        "hub_private": false, "hub_model_id": null, "train_shards_path_or_url": ["a.tar", "b{0..3}.tar"],
        "validation_num_inference_steps": [1, 4], "validation_resolution": [[16, 24], [32, 32]],
        "validation_prompts": ["a prompt: with a colon"], "validation_teacher_steps": []
    }""",
}
LINE = shlex.split(
    "--learning_rate=1e-4 --mixed_precision=no --gradient_checkpointing --no-hub_private "
    "--train_shards_path_or_url=a.tar --train_shards_path_or_url=b{0..3}.tar --validation_num_inference_steps 1 4 "
    "--validation_resolution=16x24,32 --validation_prompts 'a prompt: with a colon' --validation_teacher_steps"
)


def parse(*line, name="sd"):
    return vars(Script(name, None, None, None).module.parse_args(["--pretrained_teacher_model=t", *line]))


@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_says_what_the_command_line_says(tmp_path, name):
    path = tmp_path / name
    path.write_text(re.sub(r"(?m)^ {8}", "", WRITTEN[name]))
    found = parse(f"--config={path}", "--max_train_steps=5")
    assert found.pop("config") == str(path)
    expected = parse(*LINE, "--max_train_steps=5")
    assert expected.pop("config") is None and found == expected


def test_the_command_line_wins(tmp_path):
    """Wherever it stands; an option that is collected is not collected from both."""
    path = tmp_path / "run.yaml"
    path.write_text("train_shards_path_or_url: a.tar\nmax_train_steps: 5\nvalidation_prompts: [a, b]\nseed: 3\n")
    for line in (["--config", str(path)], [f"--config={path}"]):
        more = ["--max_train_steps=7", "--train_shards_path_or_url=c.tar", "--validation_prompts", "d"]
        for given in (line + more, more + line):
            found = parse(*given)
            assert (found["max_train_steps"], found["seed"]) == (7, 3)
            assert (found["train_shards_path_or_url"], found["validation_prompts"]) == (["c.tar"], ["d"])


@pytest.mark.parametrize(("text", "message"), [
    ("learning_rat: 1", "--learning_rat: no such option; did you mean --learning_rate?"),
    ("lora_rank: 4", "--lora_rank: no such option"),
    ("config: other.yaml", "--config: no such option"),
    ("learning_rate: fast", "--learning_rate: 'fast' given; allowed: a number of at least 0"),
    ("learning_rate: {a: 1}", "--learning_rate: {'a': '1'} given; allowed: a value, or a list of values"),
    ("loss_type: l1", "--loss_type: invalid choice: 'l1'"),
    ("random_flip: maybe", "--random_flip: 'maybe' given; allowed: true or false"),
    ("report_to: wandb\nhub_token: hf_secretsecretsecret", "--hub_token: trackers may record it"),
    ("- a\n- b", "--config: 'run.yaml' has no options; allowed: lines of a name and a value"),
    ("", "--config: 'run.yaml' has no options"),
    ("a: [", "--config: cannot read 'run.yaml': while parsing"),
])  # fmt: skip
def test_mistakes_in_a_file(tmp_path, monkeypatch, capsys, text, message):
    """They are answered as those on the command line are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse("--config=run.yaml", "--train_shards_path_or_url=a.tar", "--max_train_steps=1")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(message) and err.count("\n") == 1 and "hf_secret" not in err


@pytest.mark.parametrize(("line", "message"), [
    (["--config"], "--config: expected one argument"),
    (["--config="], "--config: '' given; allowed: some text"),
    (["--config=run.ini"], "--config: 'run.ini' given; allowed: a file that ends in .yaml, .yml, .toml, .json"),
    (["--config=nosuch.toml"], "--config: [Errno 2] No such file or directory: 'nosuch.toml'"),
    (["--confi=run.json"], "--config: no other spelling is allowed"),
    (["--config=run.json"], "--config: cannot read 'run.json': Expecting value"),
])  # fmt: skip
def test_wrong_files(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text("")
    with pytest.raises(SystemExit) as stop:
        parse("--train_shards_path_or_url=a.tar", "--max_train_steps=1", *line)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("name", SCRIPTS)
def test_stored_options_can_be_passed_back(name, teacher, sdxl_teacher, shards, tmp_path):
    """A checkpoint's training_state.json is a configuration: of the run that saved it."""
    script = Script(name, sdxl_teacher if "sdxl" in name else teacher, shards, SCRIPTS[name])
    more = ["--target=phased", "--num_phases", "2", "1", "--validation_resolution=16x24", "--max_train_steps=2"]
    script.main(tmp_path / "a", *more, "--checkpointing_steps=2", "--random_flip")
    stored = tmp_path / "a" / "checkpoint-2" / "training_state.json"
    args = vars(script.module.parse_args([f"--config={stored}"]))
    expected = json.loads(stored.read_text())["options"]
    assert {**args, "config": None} == {
        **expected, "config": None, "hub_token": None, "validation_resolution": [(16, 24)],
    }  # fmt: skip
    script.module.main([f"--config={stored}", f"--output_dir={tmp_path / 'b'}"])
    ours, first = script.weights(tmp_path / "b"), script.weights(tmp_path / "a")
    assert ours.keys() == first.keys() and all((ours[key] == first[key]).all() for key in ours)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_configs_are_understood(path, monkeypatch):
    """Each file's first line is its command."""
    monkeypatch.chdir(ROOT)
    command = re.fullmatch(
        r"# accelerate launch (train_\w+)\.py (--config configs/\S+)", path.open().readline().strip()
    )
    assert command and command[2].endswith(path.name)
    args = importlib.import_module(command[1]).parse_args(command[2].split())
    assert args.max_train_steps >= 1000


@pytest.mark.parametrize("name", SCRIPTS)
def test_configs_of_the_readme_are_its_commands(name):
    module = importlib.import_module(f"train_lcm_distill_{name}_wds")
    (line,) = re.findall(rf"^accelerate launch {module.__name__}\.py ((?:.*\\\n)*.*)$", README, re.M)
    in_file = vars(module.parse_args([f"--config={ROOT / 'configs' / f'readme_{name}.yaml'}"]))
    typed = vars(module.parse_args(shlex.split(line.replace("\\\n", " "))))
    assert {**in_file, "config": None} == typed


def test_other_commands_take_a_file_too(teacher, shards, tmp_path):
    """And do not mind from which file the options of a folder came."""
    import precompute_lcm

    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(f"pretrained_teacher_model: {teacher}\nresolution: 16\ndtype: float32\n")
        more = [f"--train_shards_path_or_url={shards}", f"--output_dir={tmp_path / 'cached'}"]
        precompute_lcm.main([f"--config={tmp_path / name}", *more])
    assert len(list((tmp_path / "cached").glob("*.tar"))) == 3
