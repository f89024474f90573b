"""Distil SDXL into a latent consistency model that samples in 1 to 8 steps.

accelerate launch train_lcm_distill_sdxl_wds.py \\
    --pretrained_teacher_model=stabilityai/stable-diffusion-xl-base-1.0 \\
    --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix \\
    --train_shards_path_or_url="path/to/shards/{00000..01099}.tar" \\
    --output_dir=lcm-sdxl --mixed_precision=fp16 --cast_teacher_unet --gradient_checkpointing --use_8bit_adam \\
    --learning_rate=1e-6 --loss_type=huber --max_train_steps=1000 --train_batch_size=12 --dataloader_num_workers=8

Writes output_dir/unet (the student), output_dir/unet_target (its moving average: sample from this one) and
output_dir/scheduler.
"""

from functools import partial

from lcm.errors import run
from lcm.options.checks import parse
from lcm.options.groups import (
    add_data_options,
    add_distillation_options,
    add_full_model_options,
    add_hub_options,
    add_model_options,
    add_output_options,
    add_precision_options,
    add_sdxl_options,
    add_training_options,
    add_validation_options,
)
from lcm.options.types import make_parser


def parse_args(argv=None):
    """The options, checked; heavy imports come after this, so that a mistake is answered at once."""
    parser = make_parser(__doc__, __file__)
    add_model_options(parser)
    add_output_options(parser)
    add_sdxl_options(add_data_options(parser, resolution=1024, max_watermark_probability=0.5))
    add_training_options(parser)
    distillation = add_distillation_options(parser, w_min=3.0, vae_encode_batch_size=8)
    add_full_model_options(distillation)
    add_precision_options(parser)
    add_validation_options(parser)
    add_hub_options(parser)
    return parse(parser, argv)


def load_models(args, accelerator, encode_prompts):
    """The frozen teacher, the student that is trained, and the target, its moving average.

    The student is the teacher plus a guidance projection, which starts at random, the same on every process. Starting
    it at zero, so that the student is the teacher at step 0, was tried on the demo and did not help (README). Weights
    are float32; the teacher's are the mixed precision with `--cast_teacher_unet`.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from lcm.models.loading import weight_dtype
    from lcm.models.unet import load_unet

    teacher = load_unet(args, encode_prompts, dtype=torch.float32)
    student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=args.unet_time_cond_proj_dim)
    student.load_state_dict(teacher.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(args.seed)
    torch.nn.init.kaiming_uniform_(student.time_embedding.cond_proj.weight, a=5**0.5, generator=generator)
    target = UNet2DConditionModel.from_config(student.config)
    target.load_state_dict(student.state_dict())

    teacher_dtype = weight_dtype(accelerator) if args.cast_teacher_unet else torch.float32
    teacher.requires_grad_(False).eval().to(accelerator.device, teacher_dtype)
    target.requires_grad_(False).eval().to(accelerator.device)
    return teacher, student.train(), target


def train(args):
    """Run the distillation that the options describe."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    from lcm.data.config import data_config
    from lcm.data.loader import TrainingData
    from lcm.data.shards import expand_shards
    from lcm.models.loading import weight_dtype
    from lcm.models.networks import FullModel
    from lcm.models.prompts import SDXLPromptEncoder, join_conditioning
    from lcm.models.schedule import load_noise_schedule
    from lcm.models.sharding import is_sharded, shard_like_student
    from lcm.models.speed import enable_memory_savers
    from lcm.models.vae import encode_pixels, load_vae
    from lcm.pictures.samplers import lcm_scheduler
    from lcm.pictures.validation import Validation, eval_mode
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
        guidance_embedding,
        predicted_noise,
        predicted_origin,
        update_ema,
    )

    # The teacher and its parts, the student, the target.
    accelerator = start(args, can_shard=True)
    device = accelerator.device
    schedule = load_noise_schedule(args)
    solver = DDIMSolver(schedule.alphas_cumprod.to(device), args.num_ddim_timesteps)
    alphas, sigmas = solver.alphas, solver.sigmas
    prediction_type = schedule.config.prediction_type
    shards = expand_shards(args.train_shards_path_or_url)
    encode_prompts = SDXLPromptEncoder(args, accelerator)
    # SDXL's own VAE overflows in fp16; one that is given in its place is taken to be made for it.
    replaced = args.pretrained_vae_model_name_or_path is not None
    vae_dtype = weight_dtype(accelerator) if replaced else torch.float32
    vae = load_vae(args, accelerator, dtype=vae_dtype)
    teacher, student, target = load_models(args, accelerator, encode_prompts)
    enable_memory_savers(args, accelerator, student, others=[teacher, target])

    # Data, optimizer, checkpoints, pictures.
    steps_per_epoch = set_length(args, accelerator.num_processes)
    data = TrainingData(data_config(args, shards, accelerator), device)
    optimizer = make_optimizer(args, student.parameters(), accelerator.num_processes)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    student, optimizer = accelerator.prepare(student, optimizer)
    if is_sharded(student):
        target = shard_like_student(accelerator, target)
    # Without the wrappers of DistributedDataParallel and torch.compile: the same weights under their plain names.
    unet = accelerator.unwrap_model(student, keep_torch_compile=False)
    scheduler = lcm_scheduler(schedule, args)
    trained = FullModel(args, {"unet": unet, "unet_target": target}, "unet_target", scheduler)
    trackers = Trackers(accelerator, args)
    checkpoints = Checkpoints(
        accelerator, args, trackers, student, optimizer, lr_scheduler, trained, data
    )
    validation = Validation(
        accelerator,
        args,
        trackers,
        make_pipeline=partial(StableDiffusionXLPipeline, vae=vae, **encode_prompts.components),
        noise_schedule=schedule,
        teacher=partial(eval_mode, teacher),
        networks={"student": partial(eval_mode, unet), "EMA": partial(eval_mode, target)},
        together=is_sharded(student),
    )
    export = Export(accelerator, args, trackers, trained)
    describe_run(args, accelerator, student, solver, data.config, steps_per_epoch)
    step = checkpoints.resume()
    trackers.start(step)
    validation.draw_teacher(step)
    progress = Progress(accelerator, args, trackers, solver, step)
    forward_pass = step * args.gradient_accumulation_steps
    weights, averaged = dict(unet.named_parameters()), dict(target.named_parameters())

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
                w_emb = guidance_embedding(w, args.unet_time_cond_proj_dim)

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

                # f_{theta^-}(z^_{t_n}, w, c, t_n)
                with accelerator.autocast():
                    output = target(z_n, t_n, timestep_cond=w_emb, **cond).sample
                f_target = consistency_function(
                    output, t_n, z_n, alphas, sigmas, prediction_type, args.timestep_scaling_factor
                )

            # L = d(f_theta(z_{t_{n+k}}, w, c, t_{n+k}), f_{theta^-}(z^_{t_n}, w, c, t_n))
            with accelerator.autocast():
                output = student(z_nk, t_nk, timestep_cond=w_emb, **cond).sample
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
