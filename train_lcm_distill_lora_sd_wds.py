"""Distil Stable Diffusion 1.x or 2.x into an LCM-LoRA, with which it and its fine-tunes sample in 1 to 8 steps.

accelerate launch train_lcm_distill_lora_sd_wds.py \\
    --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --train_shards_path_or_url="path/to/shards/{00000..01099}.tar" \\
    --output_dir=lcm-lora-sd15 --mixed_precision=fp16 --gradient_checkpointing --lora_rank=64 \\
    --w_min=7.5 --w_max=7.5 --learning_rate=1e-4 --loss_type=huber --max_train_steps=1000 \\
    --train_batch_size=12 --dataloader_num_workers=8

There is one U-Net: with its adapter switched off it is the teacher, without dropout the target. Writes
output_dir/pytorch_lora_weights.safetensors for diffusers, output_dir/lcm_lora_kohya.safetensors for ComfyUI and A1111,
and output_dir/scheduler.
"""

from functools import partial

from lcm.errors import run
from lcm.options.checks import default_guidance_scale, parse
from lcm.options.groups import (
    add_data_options,
    add_distillation_options,
    add_hub_options,
    add_lora_options,
    add_model_options,
    add_output_options,
    add_precision_options,
    add_training_options,
    add_validation_options,
)
from lcm.options.types import make_parser


def parse_args(argv=None):
    """The options, checked; heavy imports come after this, so that a mistake is answered at once."""
    parser = make_parser(__doc__, __file__)
    add_model_options(parser)
    add_output_options(parser)
    add_data_options(parser, resolution=512)
    add_training_options(parser)
    distillation = add_distillation_options(parser, w_min=5.0, vae_encode_batch_size=32)
    add_lora_options(distillation)
    add_precision_options(parser)
    add_validation_options(parser, guidance_scale=1.0)
    add_hub_options(parser)
    return parse(parser, argv)


def load_models(args, accelerator, encode_prompts):
    """Teacher, student and target: three ways to call one U-Net.

    The student is the U-Net with a float32 adapter, on frozen weights in the mixed precision. The teacher is the same
    without the adapter. The target is the student without dropout, or with `--ema_decay` its moving average. A call of
    teacher or target leaves the student as it was.
    """
    from lcm.models.loading import weight_dtype
    from lcm.models.lora import EMA, TRAINED, AdapterView, add_adapters
    from lcm.models.unet import load_unet

    student = load_unet(args, encode_prompts, dtype=weight_dtype(accelerator))
    add_adapters(student, args)
    student.to(accelerator.device).train()
    teacher = AdapterView(student, None)
    target = AdapterView(student, TRAINED if args.ema_decay is None else EMA)
    return teacher, student, target


def train(args):
    """Run the distillation that the options describe."""
    import torch
    from diffusers import StableDiffusionPipeline

    from lcm.data.config import data_config
    from lcm.data.loader import TrainingData
    from lcm.data.shards import expand_shards
    from lcm.models.loading import weight_dtype
    from lcm.models.lora import EMA, TRAINED, adapter_parameters
    from lcm.models.networks import LoraModel
    from lcm.models.prompts import PromptEncoder, join_conditioning
    from lcm.models.schedule import load_noise_schedule
    from lcm.models.speed import enable_memory_savers
    from lcm.models.vae import encode_pixels, load_vae
    from lcm.pictures.samplers import lcm_scheduler
    from lcm.pictures.validation import Validation
    from lcm.results.finish import Export
    from lcm.run.checkpoints import Checkpoints
    from lcm.run.optimizers import make_lr_scheduler, make_optimizer
    from lcm.run.plan import describe_run, set_length
    from lcm.run.progress import Progress
    from lcm.run.start import start, step_generator
    from lcm.run.trackers import Trackers
    from lcm_common import (
        DDIMSolver,
        add_noise,
        apply_guidance,
        consistency_function,
        consistency_loss,
        predicted_noise,
        predicted_origin,
        update_ema,
    )

    # The teacher and its parts, the student, the target.
    accelerator = start(args)
    device = accelerator.device
    schedule = load_noise_schedule(args)
    solver = DDIMSolver(schedule.alphas_cumprod.to(device), args.num_ddim_timesteps)
    alphas, sigmas = solver.alphas, solver.sigmas
    prediction_type = schedule.config.prediction_type
    shards = expand_shards(args.train_shards_path_or_url)
    encode_prompts = PromptEncoder(args, accelerator)
    vae = load_vae(args, accelerator, dtype=weight_dtype(accelerator))
    teacher, student, target = load_models(args, accelerator, encode_prompts)
    enable_memory_savers(args, accelerator, student, others=[])

    # Data, optimizer, checkpoints, pictures.
    steps_per_epoch = set_length(args, accelerator.num_processes)
    data = TrainingData(data_config(args, shards, accelerator), device)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(args, parameters, accelerator.num_processes)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    student, optimizer = accelerator.prepare(student, optimizer)
    # Without the wrappers of DistributedDataParallel and torch.compile: the same weights under their plain names.
    unet = accelerator.unwrap_model(student, keep_torch_compile=False)
    scheduler = lcm_scheduler(schedule, args)
    trained = LoraModel(args, unet, scheduler)
    trackers = Trackers(accelerator, args)
    checkpoints = Checkpoints(
        accelerator, args, trackers, student, optimizer, lr_scheduler, trained, data
    )
    validation = Validation(
        accelerator,
        args,
        trackers,
        make_pipeline=partial(StableDiffusionPipeline, vae=vae, **encode_prompts.components),
        noise_schedule=schedule,
        teacher=teacher.active,
        networks={"LoRA": target.active},
        teacher_guidance_scales=[default_guidance_scale(args)],  # what the LoRA learns, and is sampled without
    )
    export = Export(accelerator, args, trackers, trained)
    describe_run(args, accelerator, student, solver, data.config, steps_per_epoch)
    step = checkpoints.resume()
    trackers.start(step)
    validation.draw_teacher(step)
    progress = Progress(accelerator, args, trackers, solver, step)
    forward_pass = step * args.gradient_accumulation_steps
    weights = adapter_parameters(unet, TRAINED)
    averaged = adapter_parameters(unet, EMA)

    # Algorithm 1. B samples; latents z_* and outputs (B, C, h, w); n, t_nk, t_n, w are (B,).
    for batch in progress.timed(data) if step < args.max_train_steps else ():
        with accelerator.accumulate(student):
            generator = step_generator(args.seed, accelerator.process_index, forward_pass, device)
            forward_pass += 1

            with torch.no_grad():
                # Sample (z, c), n ~ U[1, N - k], w ~ U[w_min, w_max].
                z_0 = encode_pixels(vae, batch["pixels"], args.vae_encode_batch_size, generator)
                cond, uncond = encode_prompts(batch)
                n = torch.randint(solver.num_steps, (len(z_0),), generator=generator, device=device)
                t_nk, t_n = solver.interval(n)
                w = args.w_min + (args.w_max - args.w_min) * torch.rand(len(z_0), generator=generator, device=device)

                # Sample z_{t_{n+k}} ~ N(alpha z, sigma^2 I).
                noise = torch.randn(z_0.shape, generator=generator, device=device)
                z_nk = add_noise(z_0, noise, t_nk, alphas, sigmas)

                # z^_{t_n} = z_{t_{n+k}} + (1 + w) Psi(z, c) - w Psi(z, empty): one guided DDIM step of the teacher.
                # Its conditional and unconditional passes are one batch of 2B.
                both = join_conditioning(cond, uncond)
                with accelerator.autocast():
                    output = teacher(torch.cat([z_nk, z_nk]), torch.cat([t_nk, t_nk]), **both).sample
                output = apply_guidance(*output.chunk(2), w)
                x_0 = predicted_origin(output, t_nk, z_nk, alphas, sigmas, prediction_type)
                eps = predicted_noise(output, t_nk, z_nk, alphas, sigmas, prediction_type)
                z_n = solver.step(x_0, eps, t_n)

                # f_{theta^-}(z^_{t_n}, c, t_n)
                with accelerator.autocast():
                    output = target(z_n, t_n, **cond).sample
                f_target = consistency_function(
                    output, t_n, z_n, alphas, sigmas, prediction_type, args.timestep_scaling_factor
                )

            # L = d(f_theta(z_{t_{n+k}}, c, t_{n+k}), f_{theta^-}(z^_{t_n}, c, t_n))
            with accelerator.autocast():
                output = student(z_nk, t_nk, **cond).sample
            f_student = consistency_function(
                output, t_nk, z_nk, alphas, sigmas, prediction_type, args.timestep_scaling_factor
            )
            losses = consistency_loss(f_student, f_target, args.loss_type, args.huber_c)

            # theta <- theta - eta grad L; theta^- <- stopgrad(mu theta^- + (1 - mu) theta)
            accelerator.backward(losses.mean())
            progress.add_losses(losses, t_nk)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm)
                progress.check(step + 1, gradient_norm, weights, averaged)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if not accelerator.sync_gradients:
            continue
        learning_rate = lr_scheduler.get_last_lr()[0]
        if not accelerator.optimizer_step_was_skipped:
            if averaged:
                update_ema(averaged, weights, args.ema_decay)
            lr_scheduler.step()
        step += 1
        progress.step(step, learning_rate)
        if step % args.checkpointing_steps == 0 or progress.stopping:
            checkpoints.save(step)
        if step >= args.max_train_steps or progress.stopping:
            break
        if step % args.validation_steps == 0:
            validation.run(step)
        progress.restart_clock()

    if step < args.max_train_steps:
        return export.stop(step, progress.close())
    validation.run(step)
    export.finish(step, progress.close(), data)


def main(argv=None):
    run(train, parse_args(argv))


if __name__ == "__main__":
    main()
