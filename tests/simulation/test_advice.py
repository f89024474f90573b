"""What is advised if a command does not fit, for made-up figures of memory; and runs beside each other."""

import os

import pytest

import train_lcm_distill_lora_sd_wds
import train_lcm_distill_sd_wds
from lcm.errors import UserError
from lcm.simulation import advice, many
from lcm.simulation.advice import Advice, savers
from lcm.simulation.many import Command, make_pool, peaks_of

SAVES = {"--gradient_checkpointing": 6, "--offload": 8, "--offload_ema": 10, "--cast_teacher_unet": 4,
         "--use_8bit_adam": 12}  # fmt: skip
ALL = " ".join(SAVES)
GIVEN = ["--pretrained_teacher_model=x", "--train_shards_path_or_url=x.tar", "--max_train_steps=1",
         "--mixed_precision=fp16"]  # fmt: skip


def sizes_of(command):
    """(Batch, passes) of a command."""
    last = dict(option.partition("=")[::2] for option in command.options)
    return int(last["--train_batch_size"]), int(last.get("--gradient_accumulation_steps", 1))


def make_memory(overlap=0, gradients=10):
    """Peaks by a command: 60, less what the options save, 1 for each sample, and `gradients` while they accumulate.
    `--offload` and `--offload_ema` together save less than the sum, by `overlap`."""

    def memory_of(command):
        size, passes = sizes_of(command)
        saved = sum(SAVES.get(option, 0) for option in command.options)
        saved -= overlap * ({"--offload", "--offload_ema"} <= {*command.options})
        peak = 60 - saved + size + gradients * (passes > 1)
        return {"backward": peak * 10**9, "export": 5 * 10**9}

    return memory_of


DEFAULT = make_memory()


@pytest.fixture
def ask(monkeypatch):
    """A function of the card's GB: (lines of the table, what the last line says, commands that were simulated)."""

    def asked(memory, *more, size=12, memory_of=DEFAULT):
        simulated = []
        monkeypatch.setattr(advice, "peaks_of", lambda command: simulated.append(command) or memory_of(command))
        options = (*GIVEN, f"--train_batch_size={size}", *more)
        command, args = Command("train_lcm_distill_sd_wds", options), train_lcm_distill_sd_wds.parse_args(options)
        *lines, blank, last = Advice(command, args, memory_of(command), memory * 1e9).describe().splitlines()
        assert blank == ""
        if last != "Even a batch of 1 does not fit.":
            start, last = last.split(": ")
            assert start == "Options to add"
        return [" ".join(line.split()) for line in lines], last, simulated

    monkeypatch.setattr(advice, "num_cores", lambda: 1)
    return asked


def test_one_option_that_is_enough(ask, capsys):
    """The first that fits, though others save more. All that was tried is said at once, and in the table in order."""
    lines, last, _ = ask(66)
    assert last == "--gradient_checkpointing"
    assert lines == [
        "in addition peak GB",
        "--gradient_checkpointing 66.0 fits",
        "--offload 64.0 fits",
        "--offload_ema 62.0 fits",
        "--cast_teacher_unet 68.0",
        "--use_8bit_adam 60.0 fits",
        "all of these 32.0 fits",
    ]
    said = {f"{option}: {72 - saved}.0 GB" for option, saved in SAVES.items()} | {"all of these: 32.0 GB"}
    assert {*capsys.readouterr().err.splitlines()} == said


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (60, "--use_8bit_adam"),
        (54, "--offload --offload_ema"),  # so would --gradient_checkpointing --use_8bit_adam
        (49, "--gradient_checkpointing --offload --offload_ema"),
        (32, ALL),
    ],
)
def test_the_smallest_set(ask, memory, options):
    """Of as large ones the first, which does without 8-bit AdamW. Sets that cannot fit are not simulated."""
    _, last, simulated = ask(memory)
    assert last == options
    assert len(simulated) <= len(SAVES) + 2


def test_options_that_save_the_same(ask):
    """A set that should fit is simulated, and if it does not, the next one is."""
    given = ["--gradient_checkpointing", "--use_8bit_adam"]  # 54
    assert ask(42, *given)[1] == "--offload --offload_ema"
    lines, last, _ = ask(42, *given, memory_of=make_memory(overlap=8))
    assert "--offload --offload_ema 44.0" in lines
    assert last == "--offload --cast_teacher_unet"


@pytest.mark.parametrize(
    ("memory", "gradients", "given", "sizes"),
    [
        (27, 2, [], "--train_batch_size=4 --gradient_accumulation_steps=3"),  # 5 fits, and does not divide 12
        (27, 2, ["--gradient_accumulation_steps=5"], "--train_batch_size=5 --gradient_accumulation_steps=12"),
        (27, 10, [], "--train_batch_size=7 --gradient_accumulation_steps=1"),
        (40, 20, ["--gradient_accumulation_steps=5"], "--train_batch_size=12 --gradient_accumulation_steps=1"),
    ],
)
def test_the_largest_batch(ask, memory, gradients, given, sizes):
    """The samples of a step stay as many, unless gradients that accumulate take too much."""
    _, last, simulated = ask(memory, *given, memory_of=make_memory(gradients=gradients))
    assert last == f"{ALL} {sizes}"
    assert max(passes for _, passes in map(sizes_of, simulated)) <= 2


def test_few_batches_are_simulated(ask):
    lines, last, simulated = ask(522.5, size=1000, memory_of=make_memory(gradients=2))
    assert "--train_batch_size=500 --gradient_accumulation_steps=2" in last
    assert "all of these, a batch of 500, accumulated 522.0 fits" in lines
    assert [line for line in lines if "a batch of 501" in line] == ["all of these, a batch of 501, accumulated 523.0"]
    assert len(simulated) <= len(SAVES) + 5


@pytest.mark.parametrize("size", [1, 2, 12])
def test_no_batch_fits(ask, size):
    assert ask(20, size=size)[1] == "Even a batch of 1 does not fit."


def test_which_options_are_tried():
    """Those that the command lacks, and that can save memory."""

    def tried(script, *more):
        return " ".join(option for (option,) in savers(script.parse_args([*GIVEN, *more])))

    whole, lora = train_lcm_distill_sd_wds, train_lcm_distill_lora_sd_wds
    assert tried(whole) == ALL
    assert tried(lora) == "--gradient_checkpointing --offload --use_8bit_adam --base_model_precision=nf4"
    assert tried(whole, *ALL.split()) == ""
    assert tried(lora, "--vae_encode_batch_size=4") == tried(lora)
    assert "--vae_encode_batch_size=1" in tried(lora, "--vae_encode_batch_size=5")
    assert ("--offload_ema",) not in savers(whole.parse_args(GIVEN), is_sharded=True)  # which FSDP refuses


def die(command, sending):
    os._exit(1)


def test_a_simulated_run_that_fails_is_one_line(tmp_path, monkeypatch):
    """Those beside it do not hang."""
    command = Command("train_lcm_distill_sd_wds", (f"--pretrained_teacher_model={tmp_path}", *GIVEN[1:]))
    with (
        pytest.raises(UserError, match=r"^dry run: .* fails: --pretrained_teacher_model: cannot load [^\n]*$"),
        make_pool() as pool,
    ):
        list(pool.map(peaks_of, [command, command]))
    monkeypatch.setattr(many, "simulate", die)
    with pytest.raises(UserError, match="fails: its process was killed"):
        peaks_of(command)
