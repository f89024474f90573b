"""Which checkpoints a run goes on from, with which options, and what then holds.

What is refused whatever is given, such as damaged files, is in `test_errors.py`; that an unchanged resume is exact, in
`test_train.py`.
"""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, common_options

from lcm.errors import UserError
from lcm.options.plan import make_plan
from lcm.run import resume
from lcm.secrets import public_options

CHANGED = "--resume_with_changed_options"
REFUSED, WARNED, SILENT = "refused", "warned", "silent"
ADDRESS = "--train_shards_path_or_url="
OTHER_RUN = "the checkpoint was trained with"


def parsed(name, folder, *more):
    module = importlib.import_module(f"train_lcm_distill_{name}_wds")
    return module.parse_args(common_options("teacher", "a.tar", folder, *SCRIPTS[name], *more))


def without(*names):
    """The checkpoint of a version that had no such options."""
    return lambda state: [state["options"].pop(name) for name in names]


def with_options(**options):
    """The checkpoint of a version that had these options too, or other values of them."""
    return lambda state: state["options"].update(options)


def of_script(name):
    return lambda state: state.update(script=name)


def unnamed(*names):
    """The checkpoint of a version that stored no script's name, and had no such options."""
    return lambda state: [state.pop("script"), *without(*names)(state)]


# Script, options of the checkpoint's run, what an earlier version stored otherwise, options given, what happens and
# what is said of it.
TABLE = [
    ("sd", [], None, [], SILENT, ""),
    # Options that the checkpoint lacks have their default's meaning, also where it is filled in later.
    ("sd", [], without("w_max"), [], SILENT, ""),
    ("sd", [], without("w_max"), ["--w_max=15"], SILENT, ""),
    ("sd", [], without("w_max"), ["--w_max=9"], REFUSED, "--w_max: 9.0 given, but "),
    ("sd", [], without("random_flip"), ["--random_flip"], REFUSED, "--random_flip: True given"),
    ("sd", ["--w_max=9"], without("loss_type"), ["--w_max=9"], SILENT, ""),
    ("sd", [], without("mixed_precision"), [], SILENT, ""),
    ("sd", [], without("mixed_precision"), ["--mixed_precision=bf16"], REFUSED, "--mixed_precision: 'bf16' given"),
    ("sd", [], without("validation_teacher_steps", "resume_with_changed_options"), [], SILENT, ""),
    ("sdxl", [], without("max_watermark_probability"), [], SILENT, ""),
    ("sd", [], without("max_watermark_probability"), ["--max_watermark_probability=0.5"], REFUSED, "--max_watermark"),
    ("lora_sd", [], without("ema_decay"), [], SILENT, ""),
    ("lora_sd", [], without("ema_decay"), ["--ema_decay=0.9"], REFUSED, f"{OTHER_RUN} None"),
    # Those that only the checkpoint has are named and ignored.
    ("sd", [], with_options(old_option=3), [], WARNED, "the checkpoint's --old_option (3) is ignored"),
    # What an earlier version stored of secrets is not shown.
    ("sd", [], with_options(train_shards_path_or_url=["a.tar", "https://host/b.tar?sig=old"]), [], REFUSED,
     "'https://host/b.tar?sig=***'"),
    ("sd", [], with_options(train_shards_path_or_url=None), [], REFUSED, f"{OTHER_RUN} None"),
    ("sd", [], with_options(old_option="curl -u me:old"), [], WARNED, "--old_option ('curl -u ***') is ignored"),
    # Another script's.
    ("sd", [], of_script("train_lcm_distill_sdxl_wds.py"), [], REFUSED, "another script, train_"),
    ("sd", [], of_script("train_lcm_distill_sdxl_wds.py"), [CHANGED], REFUSED, "of train_lcm_distill_sd_wds.py"),
    ("sd", [], of_script(None), [], REFUSED, "another script, None"),
    *((name, [], unnamed("w_max"), [], SILENT, "") for name in SCRIPTS),
    ("lora_sd", [], unnamed("lora_rank"), [], REFUSED, "another script"),
    ("sdxl", [], unnamed("use_fix_crop_and_size"), [CHANGED], REFUSED, "another script"),
    ("sd", [], lambda state: (unnamed()(state), with_options(use_fix_crop_and_size=False)(state)), [], REFUSED,
     "another script"),
    # Memory and patience may change; what changes the order of the data may not.
    ("sd", [], None, ["--vae_encode_batch_size=1", "--gradient_checkpointing", "--shard_timeout=9"], SILENT, ""),
    ("sd", [], None, ["--shuffle_buffer_size=9"], REFUSED, "--shuffle_buffer_size: 9 given"),
    ("sd", [], None, ["--shuffle_buffer_mb=9"], REFUSED, "--shuffle_buffer_mb: 9.0 given"),
    # The same shards under renewed signatures; and others.
    ("sd", [f"{ADDRESS}https://host/{{0..9}}.tar?X-Amz-Signature=a1&X-Amz-Date=2"], None,
     [f"{ADDRESS}https://host/{{0..9}}.tar?X-Amz-Signature=b2&X-Amz-Date=3"], SILENT, ""),
    ("sd", [f"{ADDRESS}pipe:curl -s 'https://me:old@host/a.tar?sig=1' | cat"], None,
     [f"{ADDRESS}pipe:curl -s 'https://me:new@host/a.tar?sig=2' | cat"], SILENT, ""),
    ("sd", [f"{ADDRESS}https://h/a.tar?x=1::https://h/b.tar?x=1"], None,
     [f"{ADDRESS}https://h/a.tar?x=2::https://h/b.tar?x=2"], SILENT, ""),
    ("sd", [f"{ADDRESS}https://h/a.tar?x=1::https://h/b.tar?x=1"], None,
     [f"{ADDRESS}https://h/a.tar?x=1::https://h/c.tar?x=1"], REFUSED, "--train_shards_path_or_url: "),
    ("sd", [f"{ADDRESS}pipe:cat a.tar"], None, [f"{ADDRESS}pipe:cat b.tar"], REFUSED, "--train_shards_path_or_url: "),
    # The override, for what a checkpoint can be loaded with.
    ("sd", [], None, [CHANGED], SILENT, ""),
    ("sd", [], None, ["--w_max=9"], REFUSED, f"{CHANGED} resumes all the same, but not bit for bit"),
    ("sd", [], None, ["--w_max=9", CHANGED], WARNED, "--w_max: 9.0 given, but the checkpoint was trained with 15.0"),
    ("sd", [], None, ["--dataloader_num_workers=2", CHANGED], WARNED, "--dataloader_num_workers: 2 given"),
    ("sd", [], None, [f"{ADDRESS}b.tar", CHANGED], WARNED, "--train_shards_path_or_url: ['a.tar', 'b.tar'] given"),
    ("sd", [], without("w_max"), ["--w_max=9", CHANGED], WARNED, "--w_max: 9.0 given"),
    ("sd", [], None, ["--ema_decay=0.9", CHANGED], WARNED, "--ema_decay: 0.9 given"),
    ("lora_sd", [], None, ["--lora_alpha=2", CHANGED], WARNED, "--lora_alpha: 2 given"),
    *((name, [], None, [option, CHANGED], REFUSED, f"{option.split('=')[0]}: ") for name, option in (
        ("sd", "--unet_time_cond_proj_dim=8"), ("sdxl", "--use_8bit_adam"), ("lora_sd", "--lora_rank=2"),
        ("lora_sd", "--lora_target_modules=to_q"), ("lora_sd", "--ema_decay=0.5"))),
    ("lora_sd", [], None, ["--w_max=9", "--lora_rank=2", CHANGED], REFUSED, f"{CHANGED} does not help"),
]  # fmt: skip


def check(args):
    """`check_resume` as a run on one process would call it."""
    accelerator = SimpleNamespace(
        gradient_accumulation_steps=args.gradient_accumulation_steps, num_processes=1,
        mixed_precision=args.mixed_precision,
    )  # fmt: skip
    resume.check_resume(args, make_plan(args, accelerator, args.seed, shards=()))


@pytest.mark.parametrize(("name", "saved", "change", "given", "happens", "says"), TABLE)
def test_what_may_differ(name, saved, change, given, happens, says, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: f"the package {name}")
    args = parsed(name, tmp_path, *saved)
    state = {
        "step": 2, "script": args.script, "options": json.loads(json.dumps(public_options(args))), "data": [{}],
        "lr_scheduler": {},
    }  # fmt: skip
    if change:
        change(state)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / resume.STATE_FILE).write_text(json.dumps(state))
    args = parsed(name, tmp_path, *given, "--resume_from_checkpoint=latest")
    if happens == REFUSED:
        with pytest.raises(UserError) as error:
            check(args)
        assert says in str(error.value) and str(error.value).startswith("--")
        assert caplog.messages == []
    else:
        check(args)
        assert len(caplog.messages) == (happens == WARNED)
        assert all(says in message for message in caplog.messages)


def test_each_difference_is_a_warning_of_its_own(tmp_path, caplog):
    args = parsed("sd", tmp_path)
    state = {"step": 2, "script": args.script, "options": public_options(args), "data": [{}] * 3, "lr_scheduler": {}}
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / resume.STATE_FILE).write_text(json.dumps(state))
    given = ["--w_max=9", "--seed=4", "--resume_from_checkpoint=latest"]
    with pytest.raises(UserError):
        check(parsed("sd", tmp_path, *given))
    check(parsed("sd", tmp_path, *given, CHANGED))
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "--seed", "--w_max", "--resume_from_checkpoint"
    ]  # fmt: skip
    assert "saved by 3 processes, but 1 are running" in caplog.messages[-1]


# Real runs.


@pytest.fixture(scope="module")
def unbroken(script, tmp_path_factory):
    """A finished run of four steps, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("unbroken")
    script.main(folder, "--checkpointing_steps=2", "--validation_steps=99")
    return folder


def from_step_2(unbroken, folder):
    """A folder with that checkpoint alone, and its state's path."""
    shutil.copytree(unbroken / "checkpoint-2", folder / "checkpoint-2")
    return folder / "checkpoint-2" / resume.STATE_FILE


def resumed(script, folder, *more):
    script.main(folder, "--checkpointing_steps=2", "--validation_steps=99", "--resume_from_checkpoint=latest", *more)
    return script.weights(folder)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_checkpoint_of_another_version_is_gone_on_from_exactly(script, unbroken, tmp_path):
    """One that knew none of the options that the run left at their defaults, and one that there is no longer; nor did
    it store the script's name."""
    path = from_step_2(unbroken, tmp_path)
    state = json.loads(path.read_text())
    args = script.module.parse_args(script.options(tmp_path))
    telltales = set(resume.TELLTALES)
    state["options"] = {k: v for k, v in state["options"].items() if k not in args.left_at_default - telltales}
    assert len(state["options"]) < 20
    state["options"]["no_longer_there"] = 0.5
    del state["script"]
    path.write_text(json.dumps(state))
    assert_same(resumed(script, tmp_path), script.weights(unbroken))
    saved = json.loads((tmp_path / "checkpoint-4" / resume.STATE_FILE).read_text())
    assert saved["script"] == script.path.name and "no_longer_there" not in saved["options"]


def test_the_override_changes_nothing_where_nothing_differs(script, unbroken, tmp_path):
    from_step_2(unbroken, tmp_path)
    assert_same(resumed(script, tmp_path, CHANGED), script.weights(unbroken))


def test_a_learning_rate_of_0_really_holds(script, unbroken, tmp_path):
    """The optimizer and the schedule of the checkpoint have another: the student must not move by one bit."""
    from_step_2(unbroken, tmp_path)
    after = resumed(script, tmp_path, "--learning_rate=0", CHANGED)
    before = script.weights(unbroken / "checkpoint-2")
    name = "student" if any(key.startswith("student") for key in before) else "pytorch" if script.is_lora else "unet/"
    student = {key: tensor for key, tensor in before.items() if key.startswith(name)}
    assert student
    assert [key for key, tensor in student.items() if not torch.equal(after[key], tensor)] == []


@pytest.mark.parametrize("script", ["sd"], indirect=True)  # the same code for all
def test_another_number_of_workers_begins_a_new_pass(script, unbroken, tmp_path, capfd):
    """Both streams are in a pass that was not begun before; what was counted stays counted."""
    from_step_2(unbroken, tmp_path)
    resumed(script, tmp_path, "--dataloader_num_workers=2", CHANGED)
    assert "a new pass over all of it begins" in capfd.readouterr().err
    old, new = (
        json.loads((folder / f"checkpoint-{step}" / resume.STATE_FILE).read_text())["data"][0]
        for folder, step in ((unbroken, 2), (tmp_path, 4))
    )
    assert len(old["positions"]) == 1 and len(new["positions"]) == 2
    most = max(position["pass_index"] for position in old["positions"])
    assert all(position["pass_index"] > most for position in new["positions"])
    assert (old["num_used"], new["num_used"]) == (4, 8)
    # From there on it is a run as any other: with these options it resumes exactly, without the override.
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    more = ("--dataloader_num_workers=2", "--max_train_steps=6")
    assert_same(resumed(script, tmp_path / "again", *more), resumed(script, tmp_path, *more, CHANGED))
