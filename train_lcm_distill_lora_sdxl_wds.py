"""Distil SDXL into an LCM-LoRA, with which it and its fine-tunes sample in 1 to 8 steps.

accelerate launch train_lcm_distill_lora_sdxl_wds.py \\
    --pretrained_teacher_model=stabilityai/stable-diffusion-xl-base-1.0 \\
    --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix \\
    --train_shards_path_or_url="path/to/shards/{00000..01099}.tar" \\
    --output_dir=lcm-lora-sdxl --mixed_precision=fp16 --gradient_checkpointing --lora_rank=64 \\
    --w_min=7.5 --w_max=7.5 --learning_rate=1e-4 --loss_type=huber --max_train_steps=1000 \\
    --train_batch_size=12 --dataloader_num_workers=8

There is one U-Net: with its adapter switched off it is the teacher, without dropout the target. Writes
output_dir/pytorch_lora_weights.safetensors for diffusers, output_dir/lcm_lora_kohya.safetensors for ComfyUI and A1111,
and output_dir/scheduler.
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
    groups.add_sdxl_options(groups.add_data_options(parser, resolution=1024, max_watermark_probability=0.5))
    groups.add_training_options(parser)
    distillation = groups.add_distillation_options(parser, w_min=3.0)
    groups.add_lora_options(distillation)
    groups.add_precision_options(parser)
    groups.add_validation_options(parser, guidance_scale=1.0)
    groups.add_hub_options(parser)
    return parse(parser, argv)


def load_networks(args, plan, family, device):
    """Teacher, student and target: three ways to call one U-Net.

    The student is the U-Net with a float32 adapter, on frozen weights in the mixed precision. The teacher is the same
    without the adapter. The target is the student without dropout, or with `--ema_decay` its EMA. A call of teacher or
    target leaves the student as it was.
    """
    from lcm.models import lora
    from lcm.models.networks import Lora
    from lcm.models.quantize import quantize

    student = family.load_unet(dtype=family.dtype)
    quantize(student, args, family.dtype)
    lora.add_adapters(student, args, plan.seed)
    student.to(device).train()
    teacher = lora.AdapterView(student, None)
    target = lora.AdapterView(student, lora.TRAINED if args.ema_decay is None else lora.EMA)
    return Lora(args, teacher, student, target)


def train(args):
    """Run the distillation that the options describe."""
    import torch

    from lcm.models.family import SDXL
    from lcm.models.prompts import guided_output
    from lcm.run.start import start
    from lcm.session import Session
    from lcm_common import (
        DDIMSolver,
        consistency_loss,
        make_consistency_function,
        update_ema,
    )

    # The teacher's parts, the networks, and all that is around the loop.
    accelerator, plan = start(args)
    device = accelerator.device
    family = SDXL(args, accelerator, plan.cache)
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

                # f_{theta^-}(z^_{t_n}, c, t_n)
                with accelerator.autocast():
                    output = target(z_n, t_n, **cond).sample
                f_target = f(output, t_n, z_n, s)

            # L = d(f_theta(z_{t_{n+k}}, c, t_{n+k}), f_{theta^-}(z^_{t_n}, c, t_n))
            with accelerator.autocast():
                output = student(z_nk, t_nk, **cond).sample
            f_student = f(output, t_nk, z_nk, s)
            losses = consistency_loss(f_student, f_target, args.loss_type, args.huber_c)

            # theta <- theta - eta grad L; theta^- <- stopgrad(mu theta^- + (1 - mu) theta)
            accelerator.backward(losses.mean())
            session.record(losses, t_nk)
            if accelerator.sync_gradients:
                session.check(accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if session.step_was_taken and networks.averaged:
            update_ema(networks.averaged, networks.weights, args.ema_decay)

    return session.finish()


def main(argv=None):
    run(train, parse_args(argv))


if __name__ == "__main__":
    main()
