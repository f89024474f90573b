"""The four scripts, run for real on tiny models: in process and by `accelerate launch`."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import EVERYTHING_AT_RANDOM, ROOT, forked, hub, make_sdxl_teacher, sd_options, write_shards, write_tar
from hub_server import HubServer, client_env
from PIL import Image
from safetensors.torch import load_file

from lcm import session, storage
from lcm.data import loader
from lcm.models.family import SDXL, StableDiffusion
from lcm.pictures import validation
from lcm.run import checkpoints, progress, resume
from lcm.run import start as lcm_start
from train_lcm_distill_sd_wds import load_networks, main, parse_args


def weights(folder, name="unet_target"):
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def assert_same_weights(a, b):
    """Bit for bit, student and target."""
    for name in ("unet", "unet_target"):
        left, right = weights(a, name), weights(b, name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []


def assert_same_outputs(script, a, b):
    """Everything that was trained, bit for bit."""
    left, right = script.weights(a), script.weights(b)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def run_python(*arguments, env=None, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


# What a run leaves behind.


FULL_OUTPUTS = {"unet", "unet_target", "comfyui", "scheduler"}
OUTPUTS = {
    "sd": FULL_OUTPUTS,
    "sdxl": FULL_OUTPUTS,
    "lora_sd": {"pytorch_lora_weights.safetensors", "lcm_lora_kohya.safetensors", "scheduler"},
    "lora_sdxl": {"pytorch_lora_weights.safetensors", "lcm_lora_kohya.safetensors", "scheduler", "student"},
}
REPORT = {"README.md", "validation", "training.png", "metrics.jsonl"}


@pytest.fixture(scope="module")
def output(script, tmp_path_factory):
    """The output folder of one short run with every kind of output, and what it printed."""
    folder = tmp_path_factory.mktemp("output")
    script.main(folder, "--checkpointing_steps=2", "--validation_steps=2")
    return folder


@pytest.fixture(scope="module")
def finished(teacher, shards, tmp_path_factory):
    """The same of the Stable Diffusion script alone."""
    folder = tmp_path_factory.mktemp("finished")
    main(sd_options(teacher, shards, folder, "--checkpointing_steps=2", "--validation_steps=2", "--ema_decay=0.5"))
    return folder


def test_files_of_a_run(script, output):
    files = {path.name for path in output.iterdir()}
    assert files == OUTPUTS[script.name] | REPORT | {"checkpoint-2", "checkpoint-4"}
    assert {path.name for path in (output / "validation").iterdir()} == {"step-000002.png", "step-000004.png"}
    card = (output / "README.md").read_text()
    assert "from_pretrained" in card and "LCMScheduler" in card
    assert "load_lora_weights" in card if script.is_lora else 'subfolder="unet_target"' in card


def test_files_have_the_permissions_of_new_files(output, tmp_path):
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    files = [path for path in output.rglob("*") if path.is_file() and "logs" not in path.parts]
    assert len(files) > 8 and {path.stat().st_mode for path in files} == {expected}


@pytest.mark.parametrize("folder", [".", "checkpoint-4"])
def test_output_and_checkpoint_sample_in_the_stock_pipeline(script, output, folder):
    """Whole, float32, no key too few or too many; the networks as fp16 variant too, but for the checkpoint's."""
    from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel

    pipeline = DiffusionPipeline.from_pretrained(script.teacher)
    if script.is_lora:
        pipeline.load_lora_weights(output / folder)
    else:
        for name in ("unet", "unet_target"):
            where = {"subfolder": name, "output_loading_info": True}
            pipeline.unet, info = UNet2DConditionModel.from_pretrained(output / folder, **where)
            assert not any(info.values()), info
            assert pipeline.unet.dtype == torch.float32
            if folder == ".":
                where |= {"variant": "fp16", "torch_dtype": torch.float16}
                half, info = UNet2DConditionModel.from_pretrained(output, **where)
                assert not any(info.values()) and half.dtype == torch.float16
                for name, tensor in half.state_dict().items():
                    assert torch.equal(tensor, pipeline.unet.state_dict()[name].half())
    pipeline.scheduler = LCMScheduler.from_pretrained(output / folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    for steps in (1, 2, 4):
        image = pipeline("a red three", num_inference_steps=steps, guidance_scale=1, height=16, width=16).images[0]
        assert image.size == (16, 16)


@pytest.mark.parametrize("script", ["sd", "sdxl"], indirect=True)
def test_guidance_scale_reaches_the_student(script, output):
    from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(output, subfolder="unet")
    assert unet.time_embedding.cond_proj.weight.abs().max() > 0
    pipeline = DiffusionPipeline.from_pretrained(script.teacher, unet=unet)
    pipeline.scheduler = LCMScheduler.from_pretrained(output, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)

    def latents(scale):
        size = {"height": 16, "width": 16, "num_inference_steps": 2}
        generator = torch.manual_seed(0)
        return pipeline("x", guidance_scale=scale, generator=generator, output_type="latent", **size).images

    assert not torch.equal(latents(6.0), latents(12.0))


def test_saved_scheduler_carries_grid_and_scaling(script, tmp_path):
    from diffusers import LCMScheduler

    script.main(tmp_path, "--num_ddim_timesteps=20", "--timestep_scaling_factor=7", "--max_train_steps=1")
    scheduler = LCMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 20
    assert scheduler.config.timestep_scaling == 7
    assert scheduler.config.beta_schedule == "scaled_linear"
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == [50 * i - 1 for i in range(20, 0, -1)]


def test_moving_average_lags_behind_the_student(script, output):
    trained = script.weights(output)
    if script.name == "lora_sd":  # it has none
        assert not [name for name in trained if name.startswith("student")]
        return
    student, average = ("student/", "") if script.is_lora else ("unet/", "unet_target/")
    pairs = [(trained[f"{average}{name.removeprefix(student)}"], trained[name]) for name in trained
             if name.startswith(student)]  # fmt: skip
    assert len(pairs) > 50 and any(not torch.equal(a, b) for a, b in pairs)


def test_closing_lines_can_be_run(script, tmp_path, capsys, monkeypatch):
    script.main(tmp_path)
    printed = capsys.readouterr().out
    assert "Trained to step 4" in printed and "skipped: none" in printed
    assert all(str(tmp_path / name) in printed for name in OUTPUTS[script.name])
    code = printed[printed.index("import torch") :]
    assert code.strip() in (tmp_path / "README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exec(code, {})  # as it stands
    assert Image.open("lcm.png").size == (16, 16)


# The networks.


def made_networks(args, load=load_networks, family=StableDiffusion):
    accelerator, plan = lcm_start.start(args)
    networks = load(args, plan, family(args, accelerator), accelerator.device)
    return networks.teacher, networks.student, networks.target


@pytest.mark.parametrize("cast", [False, True])
def test_student_is_the_teacher_plus_a_guidance_projection(teacher, shards, tmp_path, cast):
    more = ["--mixed_precision=bf16", "--cast_teacher_unet"] if cast else []
    args = parse_args(sd_options(teacher, shards, tmp_path, *more))
    teacher_unet, student, target = made_networks(args)
    assert teacher_unet.dtype == (torch.bfloat16 if cast else torch.float32)
    z, t, hidden = torch.randn(2, 4, 8, 8), torch.tensor([19, 999]), torch.randn(2, 16, 16)
    w_emb = torch.randn(2, 16)
    for network in (student, target):
        assert network.dtype == torch.float32
        if not cast:
            without_guidance = network(z, t, hidden, timestep_cond=0 * w_emb).sample
            assert torch.equal(without_guidance, teacher_unet(z, t, hidden).sample)
            assert not torch.equal(without_guidance, network(z, t, hidden, timestep_cond=w_emb).sample)
    assert torch.equal(student.time_embedding.cond_proj.weight, target.time_embedding.cond_proj.weight)
    assert student.training and not target.training and not teacher_unet.training
    assert not any(p.requires_grad for network in (teacher_unet, target) for p in network.parameters())


def test_guidance_projection_is_the_same_on_every_process(teacher, shards, tmp_path):
    """Each process seeds the global generators differently; the target is never broadcast, so this must not matter."""
    args = parse_args(sd_options(teacher, shards, tmp_path))
    accelerator, plan = lcm_start.start(args)
    family = StableDiffusion(args, accelerator)
    projections = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        networks = load_networks(args, plan, family, accelerator.device)
        projections.append(networks.target.time_embedding.cond_proj.weight)
    assert torch.equal(*projections)


def test_first_loss_is_that_of_the_formulas(script, tmp_path, monkeypatch):
    """The first loss of a run equals Algorithm 1 written out with diffusers' own classes."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    batches, losses = [], []
    unwrapped = loader.TrainingData.__iter__

    def recording(self):
        for batch in unwrapped(self):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(loader.TrainingData, "__iter__", recording)
    monkeypatch.setattr(progress.Progress, "step", lambda self, step, lr: losses.append(self.loss))
    script.main(tmp_path, "--max_train_steps=1", "--validation_steps=9")

    pipeline = DiffusionPipeline.from_pretrained(script.teacher)
    args = script.module.parse_args(script.options(tmp_path))
    if script.is_lora:
        student = pipeline.unet  # a new LoRA changes nothing
    else:
        family = SDXL if script.is_sdxl else StableDiffusion
        student = made_networks(args, script.module.load_networks, family)[1]
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    generator = lcm_start.step_generator(0, 0, 0, "cpu")

    def conditioning(i):
        """What the pipelines give their U-Net for sample i, with its caption and without."""
        caption = batches[0]["captions"][i]
        if not script.is_sdxl:
            return [{"encoder_hidden_states": part} for part in pipeline.encode_prompt(caption, "cpu", 1, True)]
        cond, uncond, pooled, negative_pooled = pipeline.encode_prompt(caption, do_classifier_free_guidance=True)
        sizes = (*batches[0]["original_sizes"][i].tolist(), *batches[0]["crops"][i].tolist(), 16, 16)
        time_ids = torch.tensor([sizes])
        return [
            {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": time_ids}}
            for hidden, text_embeds in ((cond, pooled), (uncond, negative_pooled))
        ]

    with torch.no_grad():
        z_0 = pipeline.vae.encode(batches[0]["pixels"]).latent_dist.sample(generator)
        z_0 = z_0 * pipeline.vae.config.scaling_factor
        n = torch.randint(50, (2,), generator=generator)
        w = args.w_min + (args.w_max - args.w_min) * torch.rand(2, generator=generator)
        noise = torch.randn(z_0.shape, generator=generator)
        total = 0
        for i in range(2):
            cond, uncond = conditioning(i)
            t = 20 * (int(n[i]) + 1) - 1
            previous = max(t - 20, 0)
            z = scheduler.add_noise(z_0[i : i + 1], noise[i : i + 1], torch.tensor([t]))

            def consistent(output, z, t):
                alpha = scheduler.alphas_cumprod[t]
                x_0 = (z - (1 - alpha).sqrt() * output) / alpha.sqrt()
                c_skip = 0.25 / ((10 * t) ** 2 + 0.25)
                return c_skip * z + 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5 * x_0

            guided = (1 + w[i]) * pipeline.unet(z, t, **cond).sample - w[i] * pipeline.unet(z, t, **uncond).sample
            alpha, alpha_previous = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[previous]
            x_0 = (z - (1 - alpha).sqrt() * guided) / alpha.sqrt()
            z_n = alpha_previous.sqrt() * x_0 + (1 - alpha_previous).sqrt() * guided
            if not script.is_lora:
                w_emb = guidance_embedding(w[i : i + 1])
                cond = {**cond, "timestep_cond": w_emb}
            f_student = consistent(student(z, t, **cond).sample, z, t)
            f_target = consistent(student(z_n, previous, **cond).sample, z_n, previous)
            total += (f_student - f_target).square().mean() / 2
    assert losses[0] == pytest.approx(total.item(), rel=1e-4)


def guidance_embedding(w):
    """diffusers' own embedding of the guidance weight, in 16 dimensions."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=16)


@pytest.mark.parametrize("script", ["sdxl", "lora_sdxl"], indirect=True)
def test_teacher_with_blocks_as_in_ssd_1b(script, tmp_path):
    """No middle block, other depths on the way up: trained, saved, and loaded by the stock pipeline."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    teacher = make_sdxl_teacher(
        tmp_path / "teacher",
        unet_config={
            "block_out_channels": (8, 16),
            "mid_block_type": None,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (0, (2,)),
            "reverse_transformer_layers_per_block": ((2, 1), (0, 0)),
        },
    )
    script.module.main(script.options(tmp_path / "out", teacher=teacher))
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    if script.is_lora:
        pipeline.load_lora_weights(tmp_path / "out")
        assert pipeline.get_list_adapters()["unet"]
    else:
        _, info = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet", output_loading_info=True)
        assert not any(info.values())


# The same run again, and a run that is killed.


@pytest.mark.parametrize("script", ["sd", "lora_sdxl"], indirect=True)
def test_same_seed_same_weights_with_two_workers(script, tmp_path):
    more = ["--dataloader_num_workers=2", "--random_flip"]
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        script.main(tmp_path / name, *more, f"--seed={seed}")
    assert_same_outputs(script, tmp_path / "a", tmp_path / "b")
    other, same = script.weights(tmp_path / "c"), script.weights(tmp_path / "a")
    assert any(not torch.equal(other[name], same[name]) for name in same)


UNBROKEN = ["--max_train_steps=9", "--checkpointing_steps=2", *EVERYTHING_AT_RANDOM]


def test_killed_and_resumed_equals_unbroken(script, tmp_path):
    """SIGKILL before the first checkpoint, then between two, inside a shard; then the same command a third time.

    With accumulation, two workers, flips and dropped captions; the LoRA has dropout, or a moving average.
    """
    script.main(tmp_path / "unbroken", *UNBROKEN)

    def killed_at(number):
        step = progress.Progress.step

        def step_or_die(self, *args):
            if args[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, *args)

        progress.Progress.step = step_or_die
        script.main(tmp_path / "killed", *UNBROKEN)

    for number in (1, 5):
        killed = forked(partial(killed_at, number))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = {path.name for path in (tmp_path / "killed").iterdir()}
    assert {"checkpoint-2", "checkpoint-4"} <= found and not found & OUTPUTS[script.name]
    script.main(tmp_path / "killed", *UNBROKEN)
    assert_same_outputs(script, tmp_path / "killed", tmp_path / "unbroken")


@pytest.mark.parametrize(
    "target",
    [["--target=phased", "--num_phases", "8", "4", "2"], ["--target=trajectory", "--num_solver_steps=2", "--w_min=0"]],
    ids=lambda options: options[0],
)
@pytest.mark.parametrize("script", ["sd", "lora_sdxl"], indirect=True)
def test_other_targets_resume_exactly(script, tmp_path, target):
    """The phases are those of the step, and what is drawn is that of the step."""
    more = [*target, "--max_train_steps=6", "--checkpointing_steps=3"]
    script.main(tmp_path / "unbroken", *more)
    script.main(tmp_path / "resumed", *more, f"--resume_from_checkpoint={tmp_path / 'unbroken' / 'checkpoint-3'}")
    assert_same_outputs(script, tmp_path / "unbroken", tmp_path / "resumed")


def test_resume_restores_the_tally_and_the_seed(teacher, shards, tmp_path):
    """Without --seed one is drawn and stored; the resumed run takes it from there."""
    options = [o for o in sd_options(teacher, shards, tmp_path, "--checkpointing_steps=2") if "--seed" not in o]
    main([*options, "--max_train_steps=2"])
    main([*options, "--resume_from_checkpoint=latest"])
    states = [json.loads((tmp_path / f"checkpoint-{n}" / "training_state.json").read_text()) for n in (2, 4)]
    assert states[0]["options"]["seed"] == states[1]["options"]["seed"] is not None
    assert [state["data"][0]["num_used"] for state in states] == [4, 8]


def test_validation_does_not_disturb_the_run(script, tmp_path):
    """Pictures of teacher and student, of all kinds, and a tracker, or none: the weights are the same, bit for bit."""
    pictures = ["--validation_steps=1", "--validation_teacher_steps", "2", "--num_validation_images=2"]
    more = ["--validation_resolution=16,24x16", "--validation_negative_prompt=blue", "--validation_guidance_scale=7"]
    script.main(tmp_path / "often", *pictures, *more, "--report_to=tensorboard")
    script.main(tmp_path / "never", "--validation_steps=100", "--logging_steps=3")
    assert_same_outputs(script, tmp_path / "often", tmp_path / "never")


# Bad data.


def test_skips_reach_the_log_the_tracker_and_the_summary(teacher, tmp_path, capfd):
    """With their reasons, at each checkpoint and at the end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pattern = write_shards(tmp_path / "shards", num_shards=1, samples_per_shard=4)
    write_tar(tmp_path / "shards" / "00001.tar", [("a.png", b"no picture"), ("a.txt", b"a"), ("b.txt", b"b")])
    options = sd_options(teacher, pattern.replace("00000..00000", "00000..00001"), tmp_path / "out")
    main([*options, "--report_to=tensorboard", "--checkpointing_steps=2"])
    captured = capfd.readouterr()
    assert "Skipped: picture unreadable" in captured.err and "Skipped: no picture" in captured.err
    assert re.search(r"skipped: .*picture unreadable", captured.out)
    log = EventAccumulator(str(next((tmp_path / "out/logs/text2image-fine-tune").glob("events*")))).Reload()
    assert [event.step for event in log.Scalars("samples/used")] == [2, 4, 4]
    assert log.Scalars("samples/used")[-1].value == 8
    assert log.Scalars("samples/skipped/picture_unreadable")[-1].value >= 1
    assert log.Scalars("samples/skipped/no_picture")[-1].value >= 1


# Checkpoints.


def test_unfinished_checkpoint_is_never_taken(teacher, shards, tmp_path):
    main(sd_options(teacher, shards, tmp_path, "--checkpointing_steps=2", "--max_train_steps=2"))
    (tmp_path / "checkpoint-9.partial").mkdir()
    (tmp_path / "checkpoint-8").mkdir()  # as the public scripts leave it when they are killed
    main(sd_options(teacher, shards, tmp_path, "--checkpointing_steps=2", "--resume_from_checkpoint=latest"))
    assert not (tmp_path / "checkpoint-9.partial").exists()
    assert (tmp_path / "checkpoint-4").exists()


def test_old_checkpoints_survive_a_failed_save(teacher, shards, tmp_path, monkeypatch, capsys):
    """The disk fills up while the second checkpoint is written: the first stays, one line says so."""
    publish = storage.publish

    def full_disk(partial, path):
        if path.endswith("checkpoint-4"):
            raise OSError(28, "No space left on device")
        publish(partial, path)

    monkeypatch.setattr(checkpoints, "publish", full_disk)
    with pytest.raises(SystemExit) as exit_info:
        main(sd_options(teacher, shards, tmp_path, "--checkpointing_steps=2", "--checkpoints_total_limit=1"))
    assert exit_info.value.code == 1
    assert "No space left" in capsys.readouterr().err
    assert resume.list_checkpoints(tmp_path) == [str(tmp_path / "checkpoint-2")]


def run_with_scaler(monkeypatch, options, overflows):
    """A run with a real gradient scaler, which on a CPU accelerate would leave out; `overflows` are forward passes
    whose loss is finite, but not its gradients once they are scaled."""
    import lcm_common

    start, consistency_loss, calls = lcm_start.start, lcm_common.consistency_loss, []

    def start_with_scaler(*args, **more):
        accelerator, plan = start(*args, **more)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        return accelerator, plan

    def overflowing(*args):
        calls.append(1)
        return consistency_loss(*args) * (1e37 if len(calls) in overflows else 1.0)

    monkeypatch.setattr(lcm_start, "start", start_with_scaler)
    monkeypatch.setattr(lcm_common, "consistency_loss", overflowing)
    main(options)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(teacher, shards, tmp_path, monkeypatch, fused):
    """Neither weights nor moving average nor learning rate; also with an optimizer that cannot look at the scaler."""
    if not fused:
        monkeypatch.setattr(session, "make_optimizer", lambda args, plan, p: torch.optim.AdamW(p, args.learning_rate))
    more = ["--checkpointing_steps=1", "--max_train_steps=3", "--lr_scheduler=linear", "--lr_warmup_steps=1"]
    run_with_scaler(monkeypatch, sd_options(teacher, shards, tmp_path, *more), overflows={2})
    one, two, three = (tmp_path / f"checkpoint-{n}" for n in (1, 2, 3))
    assert_same_weights(one, two)
    assert any(not torch.equal(a, b) for a, b in zip(weights(two).values(), weights(three).values(), strict=True))
    schedules = [json.loads((folder / "training_state.json").read_text())["lr_scheduler"] for folder in (one, two)]
    assert schedules[0] == schedules[1]


def test_a_checkpoint_without_a_scaler_is_gone_on_from_with_one(teacher, shards, tmp_path, monkeypatch, capsys):
    """With the override, for a run that changes to fp16."""
    more = ["--checkpointing_steps=2", "--resume_from_checkpoint=latest"]
    main(sd_options(teacher, shards, tmp_path, *more, "--max_train_steps=2"))
    with pytest.raises(SystemExit):
        run_with_scaler(monkeypatch, sd_options(teacher, shards, tmp_path, *more), overflows=())
    assert "scaler.pt" in capsys.readouterr().err
    more += ["--resume_with_changed_options", "--w_max=9"]
    run_with_scaler(monkeypatch, sd_options(teacher, shards, tmp_path, *more), overflows=())
    assert (tmp_path / "checkpoint-4" / "scaler.pt").exists()


def test_many_skipped_steps_in_a_row_are_an_error(teacher, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "MAX_SKIPPED_IN_A_ROW", 3)
    options = sd_options(teacher, shards, tmp_path, "--checkpointing_steps=1", "--max_train_steps=9")
    with pytest.raises(SystemExit):
        run_with_scaler(monkeypatch, options, overflows={2, 4, 5, 6})
    assert "the gradients overflowed fp16 3 times in a row at step 6" in capsys.readouterr().err
    assert (tmp_path / "checkpoint-5").exists() and not (tmp_path / "checkpoint-6").exists()


def test_failed_pictures_cost_nothing_but_pictures(teacher, shards, tmp_path, monkeypatch, capfd):

    def out_of_memory(*args):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(validation.Validation, "show", out_of_memory)
        main(sd_options(teacher, shards, tmp_path / "without", "--validation_steps=2"))
    assert "No pictures at step 2: CUDA out of memory" in capfd.readouterr().err
    main(sd_options(teacher, shards, tmp_path / "with", "--validation_steps=2"))
    assert_same_weights(tmp_path / "without", tmp_path / "with")


def test_full_disk_is_one_line_and_leaves_the_last_checkpoint(teacher, shards, tmp_path):
    """No file can grow past 100 kB while the second checkpoint is written: the libraries' own errors, for real."""
    more = ["--checkpointing_steps=2", "--checkpoints_total_limit=1"]

    def on_a_full_disk():
        save = checkpoints.Checkpoints.save

        def save_on_a_full_disk(self, step):
            if step == 4:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            save(self, step)

        checkpoints.Checkpoints.save = save_on_a_full_disk
        main(sd_options(teacher, shards, tmp_path, *more))

    done = forked(on_a_full_disk)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("--output_dir: cannot write")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    main(sd_options(teacher, shards, tmp_path, *more, "--resume_from_checkpoint=latest"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_folder_that_was_just_being_replaced_is_put_back(tmp_path):
    """A kill between the two renames of `publish`; what is not ours is left alone."""
    for name in ("unet.old.partial", "unet.partial", "checkpoint-3.partial", "mine.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "unet.old.partial" / "weights").touch()
    (tmp_path / "notes.partial").touch()
    storage.remove_leftovers(tmp_path, ["unet", "scheduler"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.partial", "notes.partial", "unet"]
    assert (tmp_path / "unet" / "weights").exists()


def test_token_in_a_shard_address_is_stored_and_logged_nowhere(teacher, shards, tmp_path, capfd):
    first = shards.replace("{00000..00002}", "00000")
    address = f"pipe:true 'Authorization: Bearer hf_abcdefghij'; cat {first}"
    broken = "pipe:echo hf_abcdefghij"
    options = sd_options(teacher, address, tmp_path, f"--train_shards_path_or_url={broken}", "--report_to=tensorboard")
    main([*options, "--checkpointing_steps=8", "--max_train_steps=16"])
    captured = capfd.readouterr()
    assert "hf_***" in captured.err and "hf_abcdefghij" not in captured.err + captured.out
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hf_abcdefghij" not in path.read_bytes(), path


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.cuda)])
def test_half_precision(script, tmp_path, precision):
    """Trains, draws, saves and goes on; the trained weights stay float32 and finite. fp16 needs a GPU."""
    more = ["--checkpointing_steps=2", "--gradient_checkpointing", "--cast_teacher_unet"]
    script.main(tmp_path, f"--mixed_precision={precision}", *more)
    more += ["--resume_from_checkpoint=latest", "--max_train_steps=6"]
    script.main(tmp_path, f"--mixed_precision={precision}", *more)
    trained = script.weights(tmp_path)
    for name, tensor in trained.items():
        is_half = "fp16" in name or "kohya" in name
        assert tensor.dtype == (torch.float16 if is_half else torch.float32) and tensor.isfinite().all()
    assert (tmp_path / "validation" / "step-000006.png").exists()


# As users start it.


@pytest.mark.parametrize("script", ["sd", "lora_sdxl"], indirect=True)
def test_accelerate_launch(script, tmp_path):
    """The same weights as the run in process, with a TensorBoard log and pictures. The public commands start all."""
    options = script.options(tmp_path / "launched", "--report_to=tensorboard")
    launch = ["-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no",
              "--dynamo_backend=no", "--cpu"]  # fmt: skip
    done = run_python(*launch, script.path, *options)
    assert "trainable parameters" in done.stderr and "loss" in done.stderr
    script.main(tmp_path / "in_process")
    assert_same_outputs(script, tmp_path / "launched", tmp_path / "in_process")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next((tmp_path / "launched" / "logs" / "text2image-fine-tune").glob("events*"))
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in log.Images("validation")] == [4]


# The commands of the public folder's READMEs and of the diffusers guide: what all four have, and what is one's own.
PUBLIC_COMMAND = """
    --mixed_precision=fp16 --resolution=16 --loss_type=huber --adam_weight_decay=0.0 --max_train_steps=4
    --max_train_samples=4000000 --dataloader_num_workers=2 --validation_steps=2 --checkpointing_steps=2
    --checkpoints_total_limit=10 --train_batch_size=4 --gradient_checkpointing
    --enable_xformers_memory_efficient_attention --gradient_accumulation_steps=1 --use_8bit_adam
    --resume_from_checkpoint=latest --report_to=tensorboard --seed=453645634 --push_to_hub
"""
OWN_OPTIONS = {
    "sd": ["--learning_rate=1e-6", "--ema_decay=0.95"],
    "sdxl": ["--learning_rate=1e-6", "--ema_decay=0.95", "--use_fix_crop_and_size"],
    "lora_sd": ["--learning_rate=1e-4", "--lora_rank=64"],
    "lora_sdxl": ["--learning_rate=1e-4", "--lora_rank=64", "--use_fix_crop_and_size"],
}
FULL_FILES = {"config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
# The guidance scales from `--w_min` + 1 to `--w_max` + 1, and that of the printed code.
GUIDANCE_FILES = {
    "sd": {f"comfyui/lcm_guidance_{scale}.safetensors" for scale in (*range(6, 17), 7.5)},
    "sdxl": {f"comfyui/lcm_guidance_{scale}.safetensors" for scale in (*range(4, 17), 7.5)},
}
LORA_FILES = {"pytorch_lora_weights.safetensors", "lcm_lora_kohya.safetensors"}

GUIDE_SNIPPET = """
unet = UNet2DConditionModel.from_pretrained(repo, torch_dtype=torch.float16, variant="fp16")
assert unet.dtype == torch.float16 and unet.config.time_cond_proj_dim
pipeline = DiffusionPipeline.from_pretrained(teacher, unet=unet.float())
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
"""
LORA_SNIPPET = """
pipeline = DiffusionPipeline.from_pretrained(teacher)
pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
pipeline.load_lora_weights(repo)
"""
USE_WHAT_WAS_PUSHED = """
import re, sys
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from huggingface_hub import ModelCard

repo, teacher, snippet = sys.argv[1:]
exec(snippet)
pipeline("sushi", num_inference_steps=4, guidance_scale=1.0, height=16, width=16).images[0]

card = ModelCard.load(repo)
code = re.search(r"```python\\n(.*?)```", card.text, re.S)[1]
code = code.replace('.to("cuda")', "").replace("float16", "float32")
code = code.replace('"' + teacher.rpartition("/")[2] + '"', repr(teacher))
exec(code.replace("num_inference_steps=4", "num_inference_steps=4, height=16, width=16"))
assert image.size == (16, 16)
assert LCMScheduler.from_pretrained(repo, subfolder="scheduler").config.original_inference_steps == 50
print(card.data.tags)
"""


def test_public_command_and_what_it_pushes(script, tmp_path):
    """The public command with model, shards, tracker, steps and resolution replaced, against a stand-in Hub.

    Then what lies in the repository, the guide's snippet, and the code on the card, run as a stranger would.
    """
    vae = [f"--pretrained_vae_model_name_or_path={script.teacher / 'vae'}"] if script.is_sdxl else []
    output = tmp_path / "saved-model"
    with HubServer() as server:
        env = client_env(server, tmp_path / "home")
        run_python(
            "-m", "accelerate.commands.launch", "--cpu", script.path,
            *PUBLIC_COMMAND.split(), *OWN_OPTIONS[script.name], *vae,
            f"--pretrained_teacher_model={script.teacher}", f"--output_dir={output}",
            f"--train_shards_path_or_url=pipe:cat {script.shards}", env=env,
        )  # fmt: skip
        pushed = server.files("tester/saved-model")
        always = {".gitattributes", "README.md", "scheduler/scheduler_config.json", "validation.png", "training.png"}
        assert set(pushed) == always | (LORA_FILES if script.is_lora else FULL_FILES | GUIDANCE_FILES[script.name])
        assert server.private("tester/saved-model")
        for text in (str(tmp_path), str(script.teacher), server.token):
            assert not [name for name, data in pushed.items() if text.encode() in data]
        snippet = LORA_SNIPPET if script.is_lora else GUIDE_SNIPPET
        done = run_python(
            "-c", USE_WHAT_WAS_PUSHED, "tester/saved-model", script.teacher, snippet, env=env, cwd=tmp_path
        )  # fmt: skip
        assert ("'lora'" in done.stdout) == script.is_lora and "latent-consistency-model" in done.stdout
    written = {path.name for path in output.iterdir()}
    assert {"checkpoint-2", "checkpoint-4"} | (OUTPUTS[script.name] - {"student"}) <= written


def test_interrupted_upload_loses_nothing(teacher, shards, tmp_path, capsys):
    with hub() as server:
        server.fail_next(1, path_contains="/commit/")
        more = ["--push_to_hub", "--hub_model_id=mine", "--no-hub_private", f"--hub_token={server.token}"]
        with pytest.raises(SystemExit) as stop:
            main(sd_options(teacher, shards, tmp_path / "out", *more))
        error = capsys.readouterr().err
        assert stop.value.code == 1
        assert "--push_to_hub: the upload failed" in error.splitlines()[-1]
        assert "Traceback" not in error
        assert not server.private("tester/mine")
        assert weights(tmp_path / "out")


def test_wrong_token_shows_before_training(teacher, shards, tmp_path, capsys, monkeypatch):
    with hub():
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(SystemExit) as stop:
            main(sd_options(teacher, shards, tmp_path / "out", "--push_to_hub"))
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.splitlines()[-1].startswith("--push_to_hub: cannot make 'out' on the Hub")
    assert "Steps" not in error
