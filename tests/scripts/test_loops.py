"""The four training loops stand in four scripts, and differ in these lines only."""

import ast
import difflib

import pytest
from conftest import ROOT

FULL = "train_lcm_distill_sd_wds.py"


def loop_of(script):
    """The lines of the loop over batches, comments included."""
    source = (ROOT / script).read_text()
    (loop,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.For) and ast.unparse(node.target) == "batch"
    )
    return source.splitlines()[loop.lineno - 1 : loop.end_lineno]


def difference(script, other):
    """Lines that only one of two loops has, in the order of the loops, with - and +."""
    lines = difflib.ndiff(loop_of(script), loop_of(other))
    return [f"{line[0]} {line[2:].strip()}" for line in lines if line[0] in "+-"]


# A LoRA has no guidance input, and a moving average only if one is asked for.
LORA = """
- w_emb = guidance_embedding(w, args.unet_time_cond_proj_dim)
- # f_{theta^-}(z^_{t_n}, w, c, t_n)
+ # f_{theta^-}(z^_{t_n}, c, t_n)
- output = target(z_n, t_n, timestep_cond=w_emb, **cond).sample
+ output = target(z_n, t_n, **cond).sample
- # L = d(f_theta(z_{t_{n+k}}, w, c, t_{n+k}), f_{theta^-}(z^_{t_n}, w, c, t_n))
+ # L = d(f_theta(z_{t_{n+k}}, c, t_{n+k}), f_{theta^-}(z^_{t_n}, c, t_n))
- output = student(z_nk, t_nk, timestep_cond=w_emb, **cond).sample
+ output = student(z_nk, t_nk, **cond).sample
+ if averaged:
- update_ema(averaged, weights, args.ema_decay)
+ update_ema(averaged, weights, args.ema_decay)
""".strip().splitlines()

ALLOWED = {
    "train_lcm_distill_sdxl_wds.py": [],
    "train_lcm_distill_lora_sd_wds.py": LORA,
    "train_lcm_distill_lora_sdxl_wds.py": LORA,
}


@pytest.mark.parametrize("script", ALLOWED)
def test_loop_differs_in_the_listed_lines_only(script):
    assert difference(FULL, script) == ALLOWED[script]


@pytest.mark.parametrize("script", [FULL, *ALLOWED])
def test_loop_can_be_read_in_one_sitting(script):
    """At most 80 lines, at most four levels of indentation inside the loop."""
    lines = [line for line in loop_of(script) if line.strip()]
    assert 40 < len(lines) <= 80
    base = len(lines[0]) - len(lines[0].lstrip())
    assert max(len(line) - len(line.lstrip()) for line in lines) <= base + 4 * 4


def test_no_script_imports_another():
    for script in (FULL, *ALLOWED):
        tree = ast.walk(ast.parse((ROOT / script).read_text()))
        modules = [node.module for node in tree if isinstance(node, ast.ImportFrom)]
        assert modules and not [name for name in modules if name.startswith("train_")]
