"""A page in the browser that draws while you type, with trained networks beside their teacher.

python playground.py --pretrained_teacher_model demo/teacher --trained student=lcm-demo LoRA=lcm-demo/lora

Needs the package gradio. Only this machine reaches the page, unless --host or --share says otherwise. A network is
loaded when it is first asked for. The second tab shows a training run, finished or not: --output_dir.
"""

import importlib.util
import os
from argparse import Namespace
from collections.abc import Sequence

from lcm.errors import run
from lcm.options.files import read_labels
from lcm.options.groups import add_model_options
from lcm.options.types import Options, integer, make_parser, number, text


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The checked options. Heavy imports come later, so that a wrong option is reported at once."""
    parser = make_parser(__doc__)
    add_model_options(parser)
    add = parser.add_argument_group("what is shown").add_argument
    add(
        "--trained",
        nargs="+",
        default=[],
        metavar="[LABEL=]FOLDER_OR_ID",
        help="The trained U-Nets and LoRAs: output folders, checkpoints or Hub ids. Each is sampled with its own "
        "scheduler/. Without any, the teacher alone draws.",
    )
    add("--variant", metavar="NAME", help="Variant of the teacher's weight files, such as fp16.")
    add(
        "--output_dir",
        type=text,
        metavar="FOLDER",
        help="The output folder of a training run, for the second tab; it may still be running, or not have begun. If "
        "unset: the first of --trained that is one.",
    )
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="Dtype of all networks. If unset: float16 on a GPU, else float32.",
    )

    add = parser.add_argument_group("at the start").add_argument
    add(
        "--teacher_num_inference_steps",
        type=integer(1, 1000),
        default=50,
        metavar="STEPS",
        help="Steps of the teacher's pictures.",
    )
    add(
        "--guidance_scale",
        type=number(1, 30),
        metavar="SCALE",
        help="Where the slider of the guidance starts. If unset: 7.5, moved into the range of the training.",
    )
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="The first seed of the noise.")
    add(
        "--max_size",
        type=integer(8, 4096),
        default=1024,
        metavar="PIXELS",
        help="The largest size that a visitor may ask for: width and height.",
    )

    add = parser.add_argument_group("the page").add_argument
    add(
        "--host",
        type=text,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="The address to listen at. 0.0.0.0 lets everyone in the network draw on this machine.",
    )
    add(
        "--port",
        type=integer(1, 65535),
        metavar="PORT",
        help="The port to listen at. If unset: the first that is free, from 7860 on.",
    )
    add(
        "--share",
        action="store_true",
        help="Ask Gradio's servers for a public address: everyone who has it can draw on this machine.",
    )
    add("--open", action="store_true", help="Open the page in the browser.")

    args = parser.parse_args(argv, Options())
    if importlib.util.find_spec("gradio") is None:
        parser.error('playground.py: the package gradio is not installed; allowed: pip install "gradio>=6.17.3"')
    args.trained = read_labels(parser, "--trained", args.trained)
    if args.max_size % 8:
        parser.error(f"--max_size: {args.max_size} given; allowed: multiples of 8")
    if args.output_dir is None:
        args.output_dir = next((source for _, source in args.trained if is_run(source)), None)
    elif os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        parser.error(f"--output_dir: {args.output_dir!r} is a file; allowed: the output folder of a training run")
    args.freeze()
    return args


def is_run(folder: str) -> bool:
    """Whether a folder is the output folder of a run that has written metrics."""
    return os.path.isfile(os.path.join(folder, "metrics.jsonl"))


def play(args: Namespace) -> None:
    """Serve the page until Ctrl-C. Raises UserError."""
    from lcm.playground.page import serve

    serve(args)


def main(argv: Sequence[str] | None = None) -> None:
    run(play, parse_args(argv), interrupted="Stopped.")


if __name__ == "__main__":
    main()
