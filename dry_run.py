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
import sys
from typing import TYPE_CHECKING

from lcm.errors import UserError, run
from lcm.options.types import integer, make_parser, number

if TYPE_CHECKING:
    from lcm.simulation.many import Command
    from lcm.simulation.training import Record

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
        help="Memory of the card, in 10^9 bytes. Says whether it is enough; if not, simulates options that save "
        "memory and says which to add.",
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
    from lcm.simulation.many import Command
    from lcm.simulation.report import describe

    command = Command(
        args.script.removesuffix(".py"),
        tuple(args.options),
        with_pictures=True,
        num_processes=args.processes,
        config_file=args.config_file,
    )
    print(f"Simulating two steps of {args.script}; this takes up to a minute", file=sys.stderr, flush=True)
    record = command.run()
    print(describe(record))
    if args.json:
        try:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(record) | {"peak": record.peak}, file, indent=2)
        except OSError as error:
            raise UserError(f"--json: {error}") from None
    if args.gpu_memory:
        print(f"\n{advice(command, record, args.gpu_memory)}")


def advice(command: "Command", record: "Record", gpu_memory: float) -> str:
    """Whether the run fits on a card of `gpu_memory` GB; if not, which options help."""
    from lcm.simulation.advice import Advice
    from lcm.simulation.report import LEAST_MORE, MOST_MORE

    size, peak = f"{gpu_memory:g} GB", record.peak
    if peak <= gpu_memory * 1e9:
        free = gpu_memory - peak / 1e9
        verdict = "fits" if free >= MOST_MORE else "may fit" if free >= LEAST_MORE else "hardly fits"
        return f"{peak / 1e9:.1f} GB {verdict} in {size}: {free:.1f} GB are left for what is not included."
    print(f"\n{peak / 1e9:.1f} GB does not fit in {size}. With other options:", flush=True)
    print("Simulating those; this takes a few minutes", file=sys.stderr, flush=True)
    parsed = importlib.import_module(record.script).parse_args([*record.options, "--max_train_steps=1"])
    return Advice(command, parsed, record.peaks, gpu_memory * 1e9, record.is_sharded).describe()


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
