"""The four scripts, whole, differ in these lines only."""

import difflib

import pytest
from conftest import ROOT

# SDXL has other defaults, and parts of its own.
SDXL = """
- groups.add_data_options(parser, resolution=512)
+ groups.add_sdxl_options(groups.add_data_options(parser, resolution=1024, max_watermark_probability=0.5))
- distillation = groups.add_distillation_options(parser, w_min=5.0)
+ distillation = groups.add_distillation_options(parser, w_min=3.0)
- from lcm.models.family import StableDiffusion
+ from lcm.models.family import SDXL
- family = StableDiffusion(args, accelerator, plan.cache)
+ family = SDXL(args, accelerator, plan.cache)
""".strip().splitlines()

# A LoRA has options of its own, no guidance input, an EMA only if one is asked for, and cannot be sharded.
LORA = """
- groups.add_full_model_options(distillation)
+ groups.add_lora_options(distillation)
- groups.add_validation_options(parser)
+ groups.add_validation_options(parser, guidance_scale=1.0)
- guidance_embedding,
- accelerator, plan = start(args, can_shard=True)
+ accelerator, plan = start(args)
- w_emb = guidance_embedding(w, args.unet_time_cond_proj_dim)
- # f_{theta^-}(z^_{t_n}, w, c, t_n)
+ # f_{theta^-}(z^_{t_n}, c, t_n)
- output = target(z_n, t_n, timestep_cond=w_emb, **cond).sample
+ output = target(z_n, t_n, **cond).sample
- # L = d(f_theta(z_{t_{n+k}}, w, c, t_{n+k}), f_{theta^-}(z^_{t_n}, w, c, t_n))
+ # L = d(f_theta(z_{t_{n+k}}, c, t_{n+k}), f_{theta^-}(z^_{t_n}, c, t_n))
- output = student(z_nk, t_nk, timestep_cond=w_emb, **cond).sample
+ output = student(z_nk, t_nk, **cond).sample
- if session.step_was_taken:
+ if session.step_was_taken and networks.averaged:
""".strip().splitlines()


def code_of(name):
    """The lines of a script after its docstring."""
    source = (ROOT / f"train_lcm_distill_{name}_wds.py").read_text()
    return [line.strip() for line in source[source.index('"""\n', 3) + 4 :].splitlines() if line.strip()]


def without_load_networks(lines):
    """The lines but for how the networks come about, which differs between a U-Net and a LoRA altogether."""
    first = next(i for i, line in enumerate(lines) if line.startswith("def load_networks("))
    return lines[:first] + lines[lines.index("def train(args):") :]


def difference(one, other):
    """The lines that only one of two lists has, with - and +."""
    return [f"{line[0]} {line[2:]}" for line in difflib.ndiff(one, other) if line[0] in "+-"]


@pytest.mark.parametrize("kind", ["", "lora_"])
def test_sdxl_differs_in_the_listed_lines_only(kind):
    assert difference(code_of(f"{kind}sd"), code_of(f"{kind}sdxl")) == SDXL


def test_lora_differs_in_the_listed_lines_only():
    whole, lora = (without_load_networks(code_of(name)) for name in ("sd", "lora_sd"))
    assert difference(whole, lora) == LORA
