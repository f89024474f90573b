"""Measures of pictures: CLIP score, Frechet distance, difference to the teacher's pictures, and the user's own.

Pictures are (N, 3, H, W) uint8 tensors on the CPU, one for each of N prompts.
"""

import logging
import math
import os
from argparse import Namespace
from typing import Any

import diffusers
import torch
import transformers

from lcm.errors import UserError, first_line
from lcm.evaluation.candidates import dtype_name
from lcm.evaluation.features import Clip, features_of, load_feature_network, load_function, reference_pictures
from lcm.secrets import redact

logger = logging.getLogger(__name__)


def root_mean_square(images: torch.Tensor, others: torch.Tensor) -> float:
    """The root of the mean squared difference of two sets of pictures, with pixels in [0, 1]."""
    squares = ((a.double() - b.double()).square().sum() for a, b in zip(images, others, strict=True))
    return (sum(squares).item() / images.numel()) ** 0.5 / 255


def clip_score(image_features: torch.Tensor, text_features: torch.Tensor) -> float:
    """The mean of 100 times the cosine similarity of a picture's and its prompt's embedding, both (N, D)."""
    return 100 * torch.cosine_similarity(image_features, text_features).mean().item()


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """The Frechet distance between normal distributions with the means and covariances of (N, F) and (M, F) features.

    torchmetrics' FrechetInceptionDistance, in float64. It is too large unless N and M are well above F.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = torch.nn.Identity()  # the metric gets features instead of pictures
    identity.num_features = features.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(reference, real=True)
    metric.update(features, real=False)
    return metric.compute().item()


class Measures:
    """Measures the pictures of each row of the table. The first row must be the teacher's at many steps.

    `resolution` is in pixels. Raises UserError, before anything is drawn, if a network or a function of the measures
    cannot be used.
    """

    def __init__(self, args: Namespace, prompts: list[str], device: torch.device, resolution: int):
        self.args, self.prompts, self.device, self.resolution = args, prompts, device, resolution
        self.clip = None if args.clip_model == "none" else Clip(args.clip_model, device, args.cache_dir)
        self.network: Any = load_feature_network(args.feature_network, self.clip, device)
        self.extra_metric = args.extra_metric and load_function("--extra_metric", args.extra_metric)
        self.teacher_images: torch.Tensor | None = None
        self.reference: Any = None  # features (M, F); None until the first row without --reference_images
        if self.clip:
            batches = (prompts[i : i + args.batch_size] for i in range(0, len(prompts), args.batch_size))
            self.text_features = torch.cat([self.clip.text_features(batch).cpu() for batch in batches])
        if self.network:
            size = self.features(torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8)).shape[1]
            if args.reference_images:
                source = args.reference_images, resolution, args.num_reference_images, args.batch_size
                self.reference = torch.cat([self.features(batch) for batch in reference_pictures(*source)])
            num_pictures = min(len(prompts), len(prompts) if self.reference is None else len(self.reference))
            self.is_biased = num_pictures < 2 * size
            if self.is_biased:
                logger.warning(
                    "--num_images: %d pictures for %d features; the Frechet distance is biased below about %d",
                    num_pictures, size, 2 * size,
                )  # fmt: skip

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return features_of(images, self.network, self.args.batch_size)

    def __call__(self, images: torch.Tensor) -> dict[str, float | None]:
        """The numbers of a row: `clip_score`, `frechet_distance`, `teacher_rmse` and those of the extra metric; None
        instead of infinity and NaN. `images` are (N, 3, H, W) uint8, one for each prompt."""
        row = {}
        if self.teacher_images is None:
            self.teacher_images = images
        if self.clip:
            embeddings = features_of(images, self.clip.image_features, self.args.batch_size)
            row["clip_score"] = clip_score(embeddings, self.text_features)
        if self.network:
            features = self.features(images)
            self.reference = features if self.reference is None else self.reference
            row["frechet_distance"] = frechet_distance(features, self.reference)
        row["teacher_rmse"] = root_mean_square(images, self.teacher_images)
        if self.extra_metric:
            row |= self.extra(images)
        return {name: value if math.isfinite(value) else None for name, value in row.items()}

    def extra(self, images: torch.Tensor) -> dict[str, float]:
        """The numbers of the extra metric. Raises UserError if it fails, or does not return a dict of numbers."""
        try:
            return {str(name): float(value) for name, value in self.extra_metric(images, self.prompts).items()}
        except Exception as error:  # the function may raise anything
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"--extra_metric: {self.args.extra_metric} fails with {reason}") from error

    @property
    def reference_name(self) -> str:
        """The reference of the Frechet distance, in words."""
        args = self.args
        if not args.reference_images:
            return f"the teacher's {args.teacher_num_inference_steps} steps"
        name = os.path.basename(redact(args.reference_images).rstrip("/"))
        return f"{len(self.reference)} pictures of {name}"

    def describe(self) -> list[str]:
        """How the rows were measured, as lines of text."""
        args, cuda = self.args, self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else f"a CPU, {torch.get_num_threads()} threads"
        lines = [
            f"{len(self.prompts)} pictures a row of {self.resolution} x {self.resolution} pixels, of "
            f"{len(set(self.prompts))} prompts; the noise of a picture is the same in every row (seed {args.seed})",
            f"s / image: text encoder, U-Net and VAE in batches of {args.batch_size}, {dtype_name(args)}, on "
            f"{device}; after a warm-up",
            "RMSE to teacher: root mean square difference, pixels in [0, 1], to the first row's picture of the same "
            "prompt and noise; LCM's sampler adds new noise between its steps, so its RMSE grows with the number of "
            "steps and does not measure quality",
        ]
        if self.clip:
            lines.append(f"CLIP score: 100 times the cosine similarity of picture and prompt, with {args.clip_model}")
        if self.network:
            network = args.clip_model if args.feature_network == "clip" else args.feature_network
            lines.append(
                f"Frechet distance to {self.reference_name}, in the {self.reference.shape[1]} features of {network}; "
                "compare it only with distances in the same features and to the same pictures"
                + ("; with so few pictures it is too large" if self.is_biased else "")
            )
        if self.extra_metric:
            lines.append(f"The other columns: {args.extra_metric}")
        versions = (f"{module.__name__} {module.__version__}" for module in (torch, diffusers, transformers))
        return [*lines, ", ".join(versions)]
