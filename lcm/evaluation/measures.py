"""What pictures are worth: CLIP score, Frechet distance, distance to the teacher's, and measures of the user's own.

Pictures are (N, 3, H, W) uint8 tensors on the CPU throughout, and belong to a list of N prompts.
"""

import importlib
import importlib.util
import itertools
import logging
import math
import os
import sys
from collections import Counter
from pathlib import Path

import diffusers
import torch
import transformers

from lcm.data.loader import DataConfig, describe, expand_shards
from lcm.data.samples import IMAGE_SUFFIXES, Problem, Unusable, open_image, read_shard, transform
from lcm.models.prompts import load_pretrained
from lcm.options.groups import UserError, first_line
from lcm.options.secrets import redact

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:  # transformers 4, whose only one it is
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

logger = logging.getLogger(__name__)


# What pictures are compared with.


def reference_pictures(source, resolution, limit, batch_size):
    """Yield up to `limit` pictures of a folder (with the folders in it, by name), or of shards, in batches.

    Each is resized to `resolution` and its middle cropped, as in training. What cannot be read is left out and told.
    Raises UserError if fewer than two are left.
    """
    config = DataConfig(shards=(), batch_size=batch_size, resolution=resolution, seed=0, center_crop=True)
    skipped = Counter()

    def usable():
        for data in encoded_pictures(source):
            try:
                if isinstance(data, Problem):
                    raise Unusable(data.reason)
                yield torch.from_numpy(transform(open_image(data), config, rng=None)[0].copy())
            except Unusable as error:
                skipped[error.args[0]] += 1

    pictures, count = itertools.islice(usable(), limit), 0
    while batch := list(itertools.islice(pictures, batch_size)):
        count += len(batch)
        yield torch.stack(batch)
    if skipped:
        logger.warning("--reference_images: skipped: %s", describe(skipped))
    if count < 2:
        raise UserError(
            f"--reference_images: {redact(source)!r} holds {count} usable pictures; allowed: a folder or shards with "
            f"at least 2 (.{', .'.join(IMAGE_SUFFIXES)})"
        )


def encoded_pictures(source):
    """Yield the bytes of every picture in a folder or in shards, and a Problem for each sample without one."""
    if os.path.isdir(source):
        for path in sorted(Path(source).rglob("*")):
            if path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES:
                yield path.read_bytes()
        return
    for sample in itertools.chain.from_iterable(map(read_shard, expand_shards([source], "--reference_images"))):
        if isinstance(sample, Problem):
            yield sample
        else:
            found = (sample[suffix] for suffix in IMAGE_SUFFIXES if sample.get(suffix) is not None)
            yield next(found, Problem("no picture", sample["__key__"]))


# Features and distances.


def root_mean_square(images, others):
    """The root of the mean squared difference of two sets of pictures, with pixels in [0, 1]."""
    squares = ((a.double() - b.double()).square().sum() for a, b in zip(images, others, strict=True))
    return (sum(squares).item() / images.numel()) ** 0.5 / 255


class Clip:
    """A CLIP model: transformers' own, with its own tokenizer and picture processor, in float32."""

    def __init__(self, name, device, cache_dir=None):
        load = {"option": "--clip_model", "source": name, "cache_dir": cache_dir}
        model = load_pretrained(transformers.CLIPModel, dtype=torch.float32, **load)
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = load_pretrained(transformers.CLIPTokenizer, **load)
        self.processor = load_pretrained(CLIPImageProcessorPil, **load)

    def image_features(self, images):
        """The embeddings (B, D) of pictures (B, 3, H, W) uint8, not normalised."""
        pixels = self.processor(list(images.numpy()), input_data_format="channels_first", return_tensors="pt")
        pooled = self.model.vision_model(pixels["pixel_values"].to(self.model.device)).pooler_output
        return self.model.visual_projection(pooled)

    def text_features(self, prompts):
        """The embeddings (B, D) of B strings, which are cut to what the model takes; not normalised."""
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model.text_projection(self.model.text_model(**inputs.to(self.model.device)).pooler_output)


def clip_score(image_features, text_features):
    """100 times the cosine of the angle between a picture's embedding and its prompt's, (N, D) both, in the mean."""
    return 100 * torch.cosine_similarity(image_features, text_features).mean().item()


def load_function(option, text):
    """The function that `path/to/file.py:name` or `module:name` stands for. Raises UserError if there is none.

    A file may import what lies beside it, a module what lies in the current folder.
    """
    source, _, name = text.rpartition(":")
    is_file = source.endswith(".py")
    sys.path.append(os.path.dirname(os.path.abspath(source)) if is_file else os.getcwd())
    try:
        if is_file:
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    except Exception as error:  # whatever the file does
        raise UserError(f"{option}: cannot load {text!r}: {first_line(error)}") from error
    if not callable(function):
        raise UserError(f"{option}: {text!r} is no function")
    return function


def load_feature_network(name, clip, device):
    """What maps pictures (B, 3, H, W) uint8 to features (B, F), for a value of --feature_network; None for `none`.

    A torch module is moved to `device` and given pictures there; a function gets them on the CPU. Raises UserError.
    """
    if name == "none":
        return None
    if name == "clip":
        return clip.image_features
    if name == "inception":
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            network = FrechetInceptionDistance(feature=2048).inception
        except Exception as error:  # its weights are downloaded
            raise UserError(f"--feature_network: cannot load inception: {first_line(error)}") from error
    else:
        network = load_function("--feature_network", name)
    if isinstance(network, torch.nn.Module):
        module = network.eval().to(device)
        return lambda images: module(images.to(device))
    return network


@torch.no_grad()
def features_of(images, network, batch_size):
    """The features (N, F) float32 of pictures, on the CPU. Raises UserError if `network` gives something else."""
    parts = []
    for batch in images.split(batch_size):
        features = network(batch)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(batch):
            shape = getattr(features, "shape", None)
            found = f"shape {tuple(shape)}" if shape is not None else type(features).__name__
            raise UserError(f"--feature_network: {len(batch)} pictures gave {found}; allowed: a tensor (B, F)")
        parts.append(features.float().cpu())
    return torch.cat(parts)


def frechet_distance(features, reference):
    """The Frechet distance between normal distributions with the means and covariances of (N, F) and (M, F) features.

    torchmetrics' FrechetInceptionDistance, in float64. Where N or M is not well above F its value is too large.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    passed_on = torch.nn.Identity()  # it is given features in place of pictures
    passed_on.num_features = features.shape[1]
    metric = FrechetInceptionDistance(feature=passed_on)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute().item()


class Measures:
    """Measures the pictures of one row of the table after the other; the first are the teacher's at many steps.

    Raises UserError, before anything is drawn, if a network or a function that measures cannot be used.
    """

    def __init__(self, args, prompts, device, resolution):
        self.args, self.prompts, self.device, self.resolution = args, prompts, device, resolution
        self.clip = None if args.clip_model == "none" else Clip(args.clip_model, device, args.cache_dir)
        self.network = load_feature_network(args.feature_network, self.clip, device)
        self.extra_metric = args.extra_metric and load_function("--extra_metric", args.extra_metric)
        self.teacher_images = self.reference = None
        if self.clip:
            batches = (prompts[i : i + args.batch_size] for i in range(0, len(prompts), args.batch_size))
            self.texts = torch.cat([self.clip.text_features(batch).cpu() for batch in batches])
        if self.network:
            size = self.features(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8)).shape[1]
            if args.reference_images:
                source = args.reference_images, resolution, args.num_reference_images, args.batch_size
                self.reference = torch.cat([self.features(batch) for batch in reference_pictures(*source)])
            fewest = min(len(prompts), len(prompts) if self.reference is None else len(self.reference))
            self.is_biased = fewest < 2 * size
            if self.is_biased:
                logger.warning(
                    "--num_images: %d pictures for %d features; the Frechet distance is biased below about %d",
                    fewest, size, 2 * size,
                )  # fmt: skip

    def features(self, images):
        return features_of(images, self.network, self.args.batch_size)

    def __call__(self, images):
        """A row's figures as a dict, None for one that is not finite: `clip_score`, `frechet_distance`, `teacher_rmse`
        and what the extra metric gives. `images` are (N, 3, H, W) uint8, one for each prompt."""
        row = {}
        if self.teacher_images is None:
            self.teacher_images = images
        if self.clip:
            embeddings = features_of(images, self.clip.image_features, self.args.batch_size)
            row["clip_score"] = clip_score(embeddings, self.texts)
        if self.network:
            features = self.features(images)
            self.reference = features if self.reference is None else self.reference
            row["frechet_distance"] = frechet_distance(features, self.reference)
        row["teacher_rmse"] = root_mean_square(images, self.teacher_images)
        if self.extra_metric:
            row |= self.extra(images)
        return {name: value if math.isfinite(value) else None for name, value in row.items()}

    def extra(self, images):
        """What the extra metric says of pictures. Raises UserError if it fails, or returns no dict of numbers."""
        try:
            return {str(name): float(value) for name, value in self.extra_metric(images, self.prompts).items()}
        except Exception as error:  # whatever the function does
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"--extra_metric: {self.args.extra_metric} fails with {reason}") from error

    @property
    def reference_name(self):
        """What the Frechet distance compares with, in words."""
        args = self.args
        if not args.reference_images:
            return f"the teacher's {args.teacher_num_inference_steps} steps"
        name = os.path.basename(redact(args.reference_images).rstrip("/"))
        return f"{len(self.reference)} pictures of {name}"

    def describe(self):
        """Lines that say how the rows were measured."""
        args, cuda = self.args, self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else f"a CPU, {torch.get_num_threads()} threads"
        lines = [
            f"{len(self.prompts)} pictures a row of {self.resolution} x {self.resolution} pixels, of "
            f"{len(set(self.prompts))} prompts; a picture starts from the same noise in every row (seed {args.seed})",
            f"s / image: text encoder, U-Net and VAE in batches of {args.batch_size}, {args.dtype}, on {device}; "
            "after a warm-up",
            "RMSE to teacher: root mean square difference, pixels in [0, 1], from the first row's picture of the same "
            "prompt and noise; LCM's sampler adds new noise between its steps, so it grows with them and says nothing "
            "of quality there",
        ]
        if self.clip:
            lines.append(f"CLIP score: 100 times the cosine between picture and prompt, of {args.clip_model}")
        if self.network:
            network = args.clip_model if args.feature_network == "clip" else args.feature_network
            lines.append(
                f"Frechet distance to {self.reference_name}, in the {self.reference.shape[1]} features of {network}; "
                "it compares with distances in the same features and to the same pictures only"
                + "; with as few pictures as here it is too large" * self.is_biased
            )
        if self.extra_metric:
            lines.append(f"The other columns: {args.extra_metric}")
        versions = (f"{module.__name__} {module.__version__}" for module in (torch, diffusers, transformers))
        return [*lines, ", ".join(versions)]
