"""Distil Stable Diffusion 1.x or 2.x into a latent consistency model that samples in 1 to 8 steps.

accelerate launch train_lcm_distill_sd_wds.py \\
    --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --train_shards_path_or_url="path/to/shards/{00000..01099}.tar" \\
    --output_dir=lcm-sd15 --mixed_precision=fp16 --learning_rate=1e-6 --loss_type=huber \\
    --max_train_steps=1000 --train_batch_size=12 --dataloader_num_workers=8

Writes output_dir/unet (the student), output_dir/unet_target (its moving average: sample from this one) and
output_dir/scheduler.
"""

from lcm.errors import run
from lcm.options import groups
from lcm.options.checks import parse
from lcm.options.types import make_parser


def parse_args(argv=None):
    """The options, checked; heavy imports come after this, so that a mistake is answered at once."""
    parser = make_parser(__doc__, __file__)
    groups.add_model_options(parser)
    groups.add_output_options(parser)
    groups.add_data_options(parser, resolution=512)
    groups.add_training_options(parser)
    distillation = groups.add_distillation_options(parser, w_min=5.0)
    groups.add_full_model_options(distillation)
    groups.add_precision_options(parser)
    groups.add_validation_options(parser)
    groups.add_hub_options(parser)
    return parse(parser, argv)


def load_networks(args, plan, family, device):
    """The frozen teacher, the student that is trained, and the target, which is the student's EMA.

    The student is the teacher plus an input for w, unless nothing is guided. This input starts at random, the same on
    every process. Starting it at zero, so that the student is the teacher at step 0, was tried on the demo and did not
    help. Weights are float32; the teacher's are in the mixed precision with `--cast_teacher_unet`.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from lcm.models.networks import WholeUNet
    from lcm.models.quantize import quantize

    teacher = family.load_unet(dtype=torch.float32)
    student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=args.unet_time_cond_proj_dim)
    student.load_state_dict(teacher.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(plan.seed)
    if args.unet_time_cond_proj_dim is not None:
        torch.nn.init.kaiming_uniform_(student.time_embedding.cond_proj.weight, a=5**0.5, generator=generator)
    target = UNet2DConditionModel.from_config(student.config)
    target.load_state_dict(student.state_dict())

    quantize(teacher, args, family.dtype)
    teacher.requires_grad_(False).eval().to(device, family.dtype if args.cast_teacher_unet else torch.float32)
    target.requires_grad_(False).eval().to(device)
    return WholeUNet(args, teacher, student.train(), target)


def train(args):
    """Run the distillation that the options describe."""
    import torch

    from lcm.models.family import StableDiffusion
    from lcm.models.prompts import guided_output
    from lcm.run.start import start
    from lcm.session import Session
    from lcm_common import (
        DDIMSolver,
        consistency_loss,
        guidance_embedding,
        make_consistency_function,
        update_ema,
    )

    # The teacher's parts, the networks, and all that is around the loop.
    accelerator, plan = start(args, can_shard=True)
    device = accelerator.device
    family = StableDiffusion(args, accelerator, plan.cache)
    schedule = family.noise_schedule
    solver = DDIMSolver(
        schedule.alphas_cumprod.to(device),
        args.num_ddim_timesteps,
        schedule.config.prediction_type,
        args.num_solver_steps,
    )
    f = make_consistency_function(args.target, solver, args.timestep_scaling_factor, args.num_phases)
    networks = load_networks(args, plan, family, device)
    session = Session(accelerator, args, plan, family, networks, solver)
    teacher, student, target = networks.teacher, networks.student, networks.target
    optimizer = session.optimizer

    # Algorithm 1. B samples; latents z_* and outputs (B, C, h, w); n, t_nk, t_n, w are (B,).
    for batch, generator in session.batches():
        with accelerator.accumulate(student):
            with torch.no_grad():
                # Sample (z, c), n ~ U[1, N - k], w ~ U[w_min, w_max]; f lands at s, which is 0 for LCM.
                z_0 = family.latents(batch, generator)
                cond, uncond = family.conditions(batch)
                n = torch.randint(solver.num_steps, (len(z_0),), generator=generator, device=device)
                t_nk, t_n = solver.interval(n)
                s = f.end(t_n, session.progress_made, generator)
                w = args.w_min + (args.w_max - args.w_min) * torch.rand(len(z_0), generator=generator, device=device)
                w_emb = guidance_embedding(w, args.unet_time_cond_proj_dim)

                # Sample z_{t_{n+k}} ~ N(alpha z, sigma^2 I).
                noise = torch.randn(z_0.shape, generator=generator, device=device)
                z_nk = solver.add_noise(z_0, noise, t_nk)

                # z^_{t_n} = z_{t_{n+k}} + (1 + w) Psi(z, c) - w Psi(z, empty): guided DDIM steps of the teacher.
                z_n = z_nk
                for t, t_next in solver.path(t_nk, t_n):
                    with accelerator.autocast():
                        output = guided_output(teacher, z_n, t, cond, uncond, w)
                    x_0, eps = solver.origin_and_noise(output, t, z_n)
                    z_n = solver.step(x_0, eps, t_next)

                # f_{theta^-}(z^_{t_n}, w, c, t_n)
                with accelerator.autocast():
                    output = target(z_n, t_n, timestep_cond=w_emb, **cond).sample
                f_target = f(output, t_n, z_n, s)

            # L = d(f_theta(z_{t_{n+k}}, w, c, t_{n+k}), f_{theta^-}(z^_{t_n}, w, c, t_n))
            with accelerator.autocast():
                output = student(z_nk, t_nk, timestep_cond=w_emb, **cond).sample
            f_student = f(output, t_nk, z_nk, s)
            losses = consistency_loss(f_student, f_target, args.loss_type, args.huber_c)

            # theta <- theta - eta grad L; theta^- <- stopgrad(mu theta^- + (1 - mu) theta)
            accelerator.backward(losses.mean())
            session.record(losses, t_nk)
            if accelerator.sync_gradients:
                session.check(accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if session.step_was_taken:
            update_ema(networks.averaged, networks.weights, args.ema_decay)

    return session.finish()


def main(argv=None):
    run(train, parse_args(argv))


if __name__ == "__main__":
    main()
