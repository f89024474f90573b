"""A small CNN that reads the things and the background of a picture of the demo world.

`accuracy` measures how many pictures show what their captions say, and `features` gives the features of the Frechet
distance; `evaluate_lcm.py` takes them as --extra_metric and --feature_network. To train the classifier again:

    python demo/make_teacher.py --stage classifier
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
import world
from torch import nn

FEATURES = 64
WEIGHTS = Path(__file__).parent / "classifier.safetensors"


class Classifier(nn.Module):
    """Five convolutions to 64 features, then a logit for each thing and one for each background."""

    def __init__(self, width: int = 24):
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        blocks = [
            layer
            for before, after in itertools.pairwise(widths)
            for layer in (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU())
        ]
        self.body = nn.Sequential(
            *blocks,
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * width * 16, FEATURES),
            nn.GELU(),
        )
        self.things = nn.Linear(FEATURES, len(world.THINGS))
        self.background = nn.Linear(FEATURES, len(world.BACKGROUNDS))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the penultimate features (B, 64), float32, of pictures (B, 3, 64, 64) in [-1, 1]."""
        return self.body(pixels)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the things (B, 12), each for itself, and of the backgrounds (B, 6)."""
        features = self.features(pixels)
        return self.things(features), self.background(features)

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> torch.Tensor:
        """Return the labels that are read in uint8 pictures (N, 3, 64, 64), as `world.labels` has them, (N, 13)."""
        read = []
        for chunk in (images.float() / 127.5 - 1).split(500):
            things, background = self(chunk)
            read.append(torch.cat([(things > 0).long(), background.argmax(1, keepdim=True)], dim=1))
        return torch.cat(read)


@functools.cache
def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """Return the trained classifier, frozen, from its safetensors file."""
    from safetensors.torch import load_file

    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


def features(images: torch.Tensor) -> torch.Tensor:
    """Return the classifier's features (N, 64) of uint8 pictures (N, 3, 64, 64)."""
    return load_classifier().features(images.float() / 127.5 - 1)


def accuracy(images: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Return the shares in [0, 1] of uint8 pictures (N, 3, 64, 64) that show the things, the background, and both of
    their caption.

    The things are right if those of the caption, and no others, are read in the picture.
    """
    expected = torch.tensor([world.labels(*world.parse_caption(text)) for text in captions])
    right = load_classifier().read(images) == expected
    things, background = right[:, :-1].all(1), right[:, -1]
    return {
        "things": things.double().mean().item(),
        "background": background.double().mean().item(),
        "all right": (things & background).double().mean().item(),
    }
