"""The options of the training scripts, in groups.

A script adds the groups that it needs, and passes its own defaults where the scripts differ.
"""

import argparse

from lcm.options.choices import (
    BASE_PRECISIONS,
    INTERPOLATIONS,
    LOSSES,
    LR_SCHEDULES,
    OPTIMIZERS,
    PRECISIONS,
    RESOLUTION_TYPES,
    TARGETS,
    TRACKERS,
    VALIDATION_PROMPTS,
)
from lcm.options.shapes import buckets
from lcm.options.types import Parser, integer, model, names, number, ranks, sizes, text

Group = argparse._ArgumentGroup


def add_model_options(parser: Parser, required: bool = True) -> Group:
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--config", type=text, metavar="FILE",
        help="A YAML, TOML or JSON file with options, by name without the dashes; those on the command line win. Also "
             "a checkpoint's training_state.json.")
    add("--pretrained_teacher_model", type=model, required=required, metavar="ID_OR_FOLDER",
        help="The model to distil: a Hub id or a local folder in the layout of diffusers.")
    add("--pretrained_vae_model_name_or_path", type=model, metavar="ID_OR_FOLDER",
        help="A VAE to use instead of the teacher's own, at its default revision.")
    add("--teacher_revision", type=text, metavar="REV",
        help="Revision (branch, tag or commit) of the teacher on the Hub, for all of its parts.")
    add("--revision", type=text, metavar="REV",
        help="The same; used where --teacher_revision is not given.")
    add("--cache_dir", type=text, metavar="FOLDER",
        help="Where downloaded models and data sets are kept, instead of the Hub client's own cache.")
    return group


def add_output_options(parser: Parser) -> None:
    group = parser.add_argument_group("output, logging and resuming")
    add = group.add_argument
    add("--output_dir", type=text, default="lcm-xl-distilled", metavar="FOLDER",
        help="Where networks, checkpoints, pictures and logs are written.")
    add("--seed", type=integer(0, 2**32 - 1),
        help="Decides data order, noise, timesteps and guidance. Drawn, logged and stored if not given.")
    add("--logging_dir", type=text, default="logs", metavar="FOLDER",
        help="Folder of the trackers' files, inside --output_dir.")
    add("--report_to", default="tensorboard", choices=[*TRACKERS, "all", "none"],
        help="Where metrics and pictures are logged; `all` takes every tracker that is installed. mlflow, dvclive and "
             "trackio get metrics alone.")
    add("--tracker_project_name", type=text, default="text2image-fine-tune", metavar="NAME",
        help="The project under which the trackers file this run.")
    add("--tracker_run_name", type=text, metavar="NAME",
        help="The trackers' name of this run, inside the project. If unset, each makes one up.")
    add("--logging_steps", type=integer(1), default=10, metavar="STEPS",
        help="Log metrics every so many optimizer steps, as means over them, to the trackers and metrics.jsonl.")
    add("--checkpointing_steps", type=integer(1), default=500, metavar="STEPS",
        help="Save all that an exact resume needs, every so many optimizer steps.")
    add("--checkpoints_total_limit", type=integer(1), metavar="N",
        help="Keep the newest N checkpoints; older ones are removed once the new one is safe. If unset, all are kept.")
    add("--resume_from_checkpoint", metavar="latest|FOLDER",
        help="Resume from a checkpoint, by name in --output_dir or by path; `latest`, without one, starts a new run.")
    add("--resume_with_changed_options", action="store_true",
        help="Resume although options, or the number of processes, differ from the checkpoint's: each difference is a "
             "warning, not an error. The resume is then not exact to the last bit. "
             "If the order of the data changes, a new pass over it begins. The script and the shapes of the trained "
             "weights cannot change.")


def add_shards_option(group: Group, required: bool) -> None:
    group.add_argument("--train_shards_path_or_url", action="append", required=required, metavar="SHARDS",
        help="WebDataset shards: paths, http(s):// or pipe: addresses, with {000..123} ranges and :: between several. "
             "May be repeated. Only pictures, captions and JSON are read; nothing is unpickled.")  # fmt: skip


def add_picture_options(group: Group) -> None:
    """Pictures that are not in shards."""
    add = group.add_argument
    add("--train_data_dir", type=text, metavar="FOLDER",
        help="A folder with pictures. Captions are in a .txt file beside each, one in each line, or in a "
             "metadata.jsonl or metadata.csv with the columns file_name and --caption_column.")
    add("--dataset_name", type=text, metavar="ID_OR_FOLDER",
        help="A data set for the library `datasets`: on the Hub, or a folder with parquet or arrow files.")
    add("--dataset_config_name", type=text, metavar="NAME",
        help="The data set's configuration.")
    add("--image_column", type=text, default="image", metavar="COLUMN",
        help="Where the data set has its pictures.")
    add("--caption_column", type=text, default="text", metavar="COLUMN",
        help="Where the data set, or the folder's metadata, has a caption, or a list of captions.")


def add_crop_options(group: Group, resolution: int | None) -> None:
    """How pictures are resized and cropped."""
    add = group.add_argument
    add("--resolution", type=integer(8), default=resolution, metavar="PIXELS",
        help="Pictures are resized so that their shorter side has this length, then cropped to a square.")
    add("--aspect_ratio_buckets", type=buckets, metavar="H,W;H,W;...",
        help="Crop each picture to that of these shapes, in pixels, whose aspect ratio is nearest to its own, instead "
             "of a square; every batch has one shape. `auto` makes shapes from --resolution.")
    add("--aspect_bucket_rounding", type=integer(8), default=64, metavar="PIXELS",
        help="The sides of the shapes that `auto` makes are multiples of this.")
    add("--resolution_type", default="area", choices=RESOLUTION_TYPES,
        help="The shapes that `auto` makes have the area of the square (`area`), or its side as their shorter one "
             "(`pixel`).")
    add("--interpolation_type", default="bilinear",
        choices=INTERPOLATIONS,
        help="How Pillow resizes.")
    add("--center_crop", action="store_true",
        help="Crop the middle; otherwise the crop's place is random.")
    add("--random_flip", action="store_true",
        help="Mirror half of the pictures.")


def add_sample_options(group: Group, max_watermark_probability: float | None) -> None:
    """What is read of a sample's JSON, and which samples are skipped."""
    add = group.add_argument
    add("--caption_key", type=text, default="caption", metavar="KEY",
        help="Key of the caption in a sample's JSON, used where there is no .txt, .text or .caption.")
    add("--width_key", type=text, metavar="KEY",
        help="Key of the picture's original width in the JSON. Measured on the picture if unset.")
    add("--height_key", type=text, metavar="KEY",
        help="Key of the picture's original height in the JSON. Measured on the picture if unset.")
    add("--min_image_size", type=integer(0), default=0, metavar="PIXELS",
        help="Skip, and count, pictures whose shorter side is smaller.")
    add("--min_image_area", type=number(0), default=0.0, metavar="MEGAPIXELS",
        help="Skip, and count, pictures with less than so many million pixels.")
    add("--max_watermark_probability", type=number(0, 1), default=max_watermark_probability, metavar="P",
        help="Skip, and count, samples whose JSON gives a larger `pwatermark`. Those without are kept, and counted.")


def add_timeout_option(group: Group) -> None:
    add = group.add_argument
    add("--shard_timeout", type=number(0, high=86400, above=0), default=300.0, metavar="SECONDS",
        help="A shard's command without any output for so long is ended, and the shard counted as unreadable. An "
             "http(s):// connection is retried sooner.")


def add_data_options(parser: Parser, resolution: int, max_watermark_probability: float | None = None) -> Group:
    """Add the options of the data; returns their group, for options of SDXL."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add_shards_option(group, required=False)
    add_picture_options(group)
    add_crop_options(group, resolution)
    add("--proportion_empty_prompts", type=number(0, 1), default=0, metavar="P",
        help="Share of captions that are replaced by an empty one.")
    add_sample_options(group, max_watermark_probability)
    add("--shuffle_buffer_size", type=integer(1), default=1000, metavar="SAMPLES",
        help="Samples are shuffled in blocks of this many, in each data worker; a resume re-reads one such block.")
    add("--shuffle_buffer_mb", type=number(0, above=0), default=512.0, metavar="MB",
        help="A block ends early once its samples take this much memory, as they lie in the shard (10^6 bytes).")
    add_timeout_option(group)
    add("--dataloader_num_workers", type=integer(0), default=0, metavar="N",
        help="Processes that read data; 0 reads in the training process.")
    return group


def add_training_options(parser: Parser) -> None:
    group = parser.add_argument_group("length and batches")
    add = group.add_argument
    add("--train_batch_size", type=integer(1), default=16, metavar="SAMPLES",
        help="Samples per process in one forward and backward pass.")
    add("--gradient_accumulation_steps", type=integer(1), default=1, metavar="N",
        help="Passes per optimizer step. A value in `accelerate config` overrides this one; the log says so.")
    add("--max_train_steps", type=integer(1), metavar="STEPS",
        help="Optimizer steps of the run. If unset: --num_train_epochs times the steps of an epoch.")
    add("--num_train_epochs", type=integer(1), default=100, metavar="N",
        help="Length of the run where --max_train_steps is not given.")
    add("--max_train_samples", type=integer(1), metavar="SAMPLES",
        help="The length of an epoch. Not a subset: all shards are read. Needed unless --max_train_steps is given.")
    add("--local_rank", type=integer(-1), default=-1, metavar="N",
        help="Set by some launchers; the environment's LOCAL_RANK wins.")

    group = parser.add_argument_group("optimizer and learning rate")
    add = group.add_argument
    add("--learning_rate", type=number(0), default=1e-4, metavar="LR",
        help="Learning rate after the warm-up. For prodigy 1, if this is not given.")
    add("--scale_lr", action="store_true",
        help="Multiply the learning rate by processes x accumulation x batch size.")
    add("--lr_scheduler", default="constant",
        choices=LR_SCHEDULES,
        help="Schedule of the learning rate. `constant` has no warm-up.")
    add("--lr_warmup_steps", type=integer(0), default=500, metavar="STEPS",
        help="Optimizer steps over which the rate rises from 0, for every schedule but `constant`.")
    add("--lr_num_cycles", type=integer(1), default=1, metavar="N",
        help="How often a schedule with restarts falls to 0.")
    add("--lr_power", type=number(0, above=0), default=1.0, metavar="POWER",
        help="The power of the polynomial schedule.")
    add("--optimizer", default="adamw", choices=OPTIMIZERS,
        help="Bytes of states for each trained weight: adamw 8, adamw_bf16 6, lion 4, adamw8bit 2, lion8bit 1, "
             "prodigy 16, adafactor next to none. adamw_bf16 trains weights in bfloat16, which with their gradients "
             "take 4 bytes, not 8. paged_ moves states to host memory when the GPU's is full. lion wants a learning "
             "rate that is 3 to 10 times smaller. prodigy finds its own: leave it at 1.")
    add("--use_8bit_adam", action="store_true",
        help="The same as --optimizer adamw8bit.")
    add("--adam_beta1", type=number(0, below=1), default=0.9, metavar="BETA",
        help="Decay of the first moment, for AdamW, lion and prodigy.")
    add("--adam_beta2", type=number(0, below=1), default=0.999, metavar="BETA",
        help="Decay of AdamW's second moment. For adamw_bf16, and for lion's momentum, 0.99 if this is not given.")
    add("--adam_weight_decay", type=number(0), default=1e-2, metavar="DECAY",
        help="The optimizer's weight decay.")
    add("--adam_epsilon", type=number(0, above=0), default=1e-8, metavar="EPS",
        help="Epsilon of AdamW and prodigy.")
    add("--max_grad_norm", type=number(0, above=0), default=1.0, metavar="NORM",
        help="Gradients are scaled down to this norm.")


def add_distillation_options(parser: Parser, w_min: float) -> Group:
    """Add the options of the method; returns their group, for options of a U-Net or of a LoRA."""
    group = parser.add_argument_group("latent consistency distillation")
    add = group.add_argument
    add("--w_min", type=number(0), default=w_min, metavar="W",
        help="Smallest guidance weight. guided = cond + w (cond - uncond), so w is a pipeline's guidance_scale - 1.")
    add("--w_max", type=number(0), default=15.0, metavar="W",
        help="Largest guidance weight; w is drawn evenly between the two. With 0 the teacher is not guided, which "
             "saves its second pass; guidance_scale and negative prompts then work when sampling.")
    add("--teacher_negative_prompt", type=text, metavar="PROMPT",
        help="What the teacher's guidance leads away from, instead of the empty prompt.")
    add("--num_ddim_timesteps", type=integer(1, 1000), default=50, metavar="N",
        help="Points of the teacher's DDIM grid. The student learns to jump along the grid, and to sample on it.")
    add("--num_solver_steps", type=integer(1, 1000), default=1, metavar="STEPS",
        help="DDIM steps of the teacher from one grid point to the one before. Each costs a pass of the teacher.")
    add("--target", default="lcm", choices=TARGETS,
        help="Where the student's jump lands: `lcm` at the clean picture, `phased` at the lower edge of the phase it "
             "starts in, `trajectory` at a random point below. The saved scheduler is the one that fits.")
    add("--num_phases", nargs="+", type=integer(1, 1000), metavar="N",
        help="Phases of `--target phased`. Several numbers, such as 8 4 2 1, are used one after the other, each for "
             "an equal part of the run. If unset: 4.")
    add("--loss_type", default="l2", choices=LOSSES,
        help="Squared error, or sqrt(d^2 + c^2) - c, which outliers sway less.")
    add("--huber_c", type=number(0, high=1e6, above=0), default=0.001, metavar="C",
        help="The c of the Huber loss.")
    add("--timestep_scaling_factor", type=number(0, above=0), default=10.0, metavar="S",
        help="Scale of t in the boundary conditions of `--target lcm`; the saved scheduler carries it.")
    add("--vae_encode_batch_size", type=integer(1), metavar="SAMPLES",
        help="Pictures that the VAE encodes at once. If unset: as many as have 2^20 pixels (4 of 512 x 512, 1 of "
             "1024 x 1024), so that the VAE is not the peak of memory. Changes rounding at most.")
    return group


def add_full_model_options(group: Group) -> None:
    """Options of the two scripts that train all weights of a U-Net."""
    add = group.add_argument
    add("--unet_time_cond_proj_dim", type=integer(4), metavar="DIM",
        help="Size of the guidance embedding that the student is fed. If unset: 256, or no such input with --w_max 0.")
    add("--ema_decay", type=number(0, 1), default=0.95, metavar="DECAY",
        help="Decay of the student's moving average: the target network, and the one to sample from.")
    add("--offload_ema", action="store_true",
        help="Keep the moving average in host memory while it is not used. Less memory on the GPU, time for copies in "
             "each step, the same results.")
    add("--cast_teacher_unet", action="store_true",
        help="Hold the teacher's weights in the mixed precision too: half its memory.")


def add_lora_options(group: Group) -> None:
    """Options of the two scripts that train a LoRA."""
    add = group.add_argument
    add("--lora_rank", type=integer(1), default=64, metavar="RANK",
        help="Rank of the adapter in each layer.")
    add("--lora_rank_pattern", type=ranks, metavar="NAME=RANK,...",
        help="Other ranks for some layers, by names or ends of names, such as conv1=16,conv2=16.")
    add("--lora_alpha", type=integer(1), default=64, metavar="ALPHA",
        help="The adapter's output is scaled by alpha / rank, where rank is that of the layer.")
    add("--use_rslora", action="store_true",
        help="Scale by alpha / sqrt(rank) instead (arXiv 2312.03732). The files are written for what loads any LoRA.")
    add("--lora_weights", type=text, metavar="FOLDER_OR_FILE",
        help="Start from this LoRA, in the format that the scripts write for diffusers, with the same ranks and "
             "layers.")
    add("--lora_dropout", type=number(0, below=1), default=0.0, metavar="P",
        help="Dropout on the adapter's input, for the student alone: neither teacher nor target sees it.")
    add("--lora_target_modules", type=names, metavar="NAMES",
        help="Names, or ends of names, of the layers that are adapted, joined by commas. If unset: the linear and "
             "convolutional layers of all blocks.")
    add("--ema_decay", type=number(0, 1), metavar="DECAY",
        help="Keep a moving average of the LoRA as target network, and save that one. Off if unset.")
    add("--cast_teacher_unet", action="store_true",
        help="Changes nothing: the teacher is the LoRA's own base, and is held in the mixed precision in any case.")


def add_sdxl_options(group: Group) -> None:
    """Options of the two scripts for SDXL."""
    add = group.add_argument
    add("--use_fix_crop_and_size", action="store_true",
        help="Tell the networks that pictures are not cropped: original size = resolution, crop at (0, 0).")


def add_precision_options(parser: Parser) -> None:
    group = parser.add_argument_group("precision, memory and speed")
    add = group.add_argument
    add("--mixed_precision", choices=PRECISIONS,
        help="Precision of the networks' arithmetic. If unset, what `accelerate config` says. Trained weights stay "
             "float32. fp16 needs a GPU.")
    add("--base_model_precision", default="no_change", choices=BASE_PRECISIONS,
        help="Hold the linear layers of the frozen U-Net, a LoRA's base or the teacher of a whole U-Net, in 8 or 4 "
             "bits by bitsandbytes. What is trained is not touched, and a LoRA works on the unquantized model too.")
    add("--allow_tf32", action="store_true",
        help="Let float32 matrix products on Ampere and later run as TF32, as PyTorch lets convolutions anyway.")
    add("--gradient_checkpointing", action="store_true",
        help="Recompute activations in the backward pass: less memory, more time.")
    add("--offload", action="store_true",
        help="Keep VAE, text encoders and, for a whole U-Net, the teacher in host memory while they are not used. "
             "Less memory on the GPU, some time for copies in each step, the same results.")
    add("--enable_xformers_memory_efficient_attention", action="store_true",
        help="Use xformers' attention on CUDA. PyTorch's own, the default, is usually as fast.")


def add_validation_options(parser: Parser, guidance_scale: float | None = None) -> None:
    """`guidance_scale` is the default; None stands for 7.5, moved into the range of the training."""
    group = parser.add_argument_group("validation pictures")
    add = group.add_argument
    add("--validation_steps", type=integer(1), default=200, metavar="STEPS",
        help="Draw pictures every so many optimizer steps, and at the end.")
    add("--validation_prompts", nargs="+", default=VALIDATION_PROMPTS, metavar="PROMPT",
        help="What to draw, one row each. The name of a text file stands for its lines.")
    add("--validation_negative_prompt", type=text, metavar="PROMPT",
        help="What not to draw. Has an effect on the teacher, and on a LoRA at a guidance scale above 1.")
    add("--num_validation_images", type=integer(1), default=1, metavar="N",
        help="Rows for each prompt, each from noise of its own; all columns start from the same.")
    add("--validation_resolution", type=sizes, metavar="WxH,...",
        help="Sizes in pixels, as 1024x1024,1280x768, one row each. If unset: --resolution.")
    add("--validation_num_inference_steps", nargs="+", type=integer(1), default=[4], metavar="STEPS",
        help="With how many steps, one column each.")
    add("--validation_guidance_scale", nargs="+", type=number(1),
        default=None if guidance_scale is None else [guidance_scale], metavar="SCALE",
        help="A pipeline's guidance_scale, one column each." + (
            " If unset: 7.5, moved into [w_min + 1, w_max + 1]." if guidance_scale is None else ""))
    add("--validation_teacher_steps", nargs="*", type=integer(1, 1000), metavar="STEPS",
        help="With how many steps of DDIM the teacher draws the same once, for columns beside. If unset: the most of "
             "--validation_num_inference_steps, and 25. Nothing after the option: no columns.")


def add_hub_options(parser: Parser) -> None:
    group = parser.add_argument_group("Hugging Face Hub")
    add = group.add_argument
    add("--push_to_hub", action="store_true",
        help="Upload what was trained, with a model card, at the end.")
    add("--hub_model_id", type=text, metavar="NAME",
        help="Repository to push to; the name of --output_dir if unset.")
    add("--hub_token", type=text, metavar="TOKEN",
        help="Access token. Better: `hf auth login`, or HF_TOKEN in the environment. Never logged or stored.")
    add("--hub_private", action=argparse.BooleanOptionalAction, default=True,
        help="Whether a repository that is made here is private.")
