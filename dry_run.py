"""Will it fit? Run a training command on a simulated GPU: no GPU, no weights and no shards are needed.

python dry_run.py train_lcm_distill_lora_sdxl_wds.py \\
    --pretrained_teacher_model=stabilityai/stable-diffusion-xl-base-1.0 \\
    --train_shards_path_or_url="path/to/shards/{00000..01099}.tar" \\
    --mixed_precision=fp16 --gradient_checkpointing --train_batch_size=4

Put it in place of `accelerate launch`. The script's own code runs for two steps with tensors that have shapes and
dtypes, but no values. Of the teacher only configuration files and tokenizers are read.
"""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from lcm.errors import UserError, run
from lcm.options.types import integer, make_parser, number

SCRIPTS = [f"train_lcm_distill_{kind}_wds.py" for kind in ("sd", "sdxl", "lora_sd", "lora_sdxl")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of this command, and the script with its own."""
    parser = make_parser(__doc__, __file__)
    parser.usage = "%(prog)s [OPTIONS OF ITS OWN] SCRIPT OPTIONS"
    add = parser.add_argument
    add(
        "--gpu_memory",
        type=number(0, above=0),
        metavar="GB",
        help="Memory of the card, in 10^9 bytes. Says whether it is enough; if not, tries options that save memory.",
    )
    add(
        "--pictures",
        action="store_true",
        help="Also draw the validation pictures, whose memory may be the largest. Takes longer.",
    )
    add(
        "--processes",
        type=integer(1),
        default=1,
        metavar="N",
        help="Simulate one process of N: DistributedDataParallel, or FSDP if accelerate is configured for it.",
    )
    add(
        "--config_file",
        metavar="FILE",
        help="That of `accelerate launch`, for --processes. Default: that of `accelerate config`, if there is one.",
    )
    add("--json", metavar="FILE", help="Also write the figures to a file.")
    add("script", choices=SCRIPTS, metavar="SCRIPT", help=f"One of {', '.join(SCRIPTS)}.")
    add("options", nargs=argparse.REMAINDER, metavar="OPTIONS", help="The script's options.")
    return parser.parse_args(argv)


def dry_run(args: argparse.Namespace) -> None:
    """Simulate the command, print what it needs, and if it does not fit, which options help."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from lcm.simulation.report import describe, table
    from lcm.simulation.training import Simulation

    script = args.script.removesuffix(".py")
    record = Simulation(script, args.options, args.pictures, args.processes, args.config_file).run()
    print(describe(record))
    if args.json:
        try:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(record) | {"peak": record.peak}, file, indent=2)
        except OSError as error:
            raise UserError(f"--json: {error}") from None
    if not args.gpu_memory:
        return
    if fits(record.peak, args):
        print(f"\n{record.peak / 1e9:.1f} GB fits in {args.gpu_memory:g} GB, before what is not included.")
        return
    print(f"\n{record.peak / 1e9:.1f} GB does not fit in {args.gpu_memory:g} GB. With other options:", flush=True)
    rows = [["in addition", "peak GB", ""]]
    for more in alternatives(args):
        peak = peak_of([*(["--pictures"] if args.pictures else []), args.script, *args.options, *more])
        rows.append([" ".join(more), f"{peak / 1e9:.1f}", "fits" if fits(peak, args) else ""])
        if fits(peak, args):
            break
    print("\n".join(table(rows)))


def fits(peak: float, args: argparse.Namespace) -> bool:
    """Whether a peak in bytes is at most the memory of the card."""
    return peak <= args.gpu_memory * 1e9


def alternatives(args: argparse.Namespace) -> Iterator[list[str]]:
    """Options that save memory: each alone, all together, then with smaller batches, whose sum stays the same."""
    module = importlib.import_module(args.script.removesuffix(".py"))
    parsed = module.parse_args([*args.options, "--max_train_steps=1"])
    savers = {
        "--gradient_checkpointing": parsed.gradient_checkpointing,
        "--use_8bit_adam": parsed.use_8bit_adam,
        "--cast_teacher_unet": parsed.cast_teacher_unet or "lora" in args.script or parsed.mixed_precision is None,
        "--vae_encode_batch_size=1": parsed.vae_encode_batch_size == 1,
    }
    unused = [option for option, is_used in savers.items() if not is_used]
    yield from ([option] for option in unused)
    if len(unused) > 1:
        yield unused
    size, passes = parsed.train_batch_size, parsed.gradient_accumulation_steps
    while size > 1:
        size, passes = size // 2, passes * 2
        yield [*unused, f"--train_batch_size={size}", f"--gradient_accumulation_steps={passes}"]


def peak_of(command: list[str]) -> float:
    """The peak in bytes of another command, simulated in a process of its own. Raises UserError."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        call = [sys.executable, os.path.abspath(__file__), "--json", file.name, *command]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"--gpu_memory: {' '.join(command)} fails: {done.stderr.strip().splitlines()[-1]}")
        return json.load(file)["peak"]


def main(argv: list[str] | None = None) -> None:
    args, status = parse_args(argv), 0
    try:
        run(dry_run, args, interrupted="Stopped.")
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the simulated device cannot be taken out of torch again, which would crash in the regular way


if __name__ == "__main__":
    main(sys.argv[1:])
