"""A small CNN that classifies the digit, the colour and the background of a picture of the demo world.

`accuracy` measures how many pictures show what their captions say, and `features` gives the features of the Frechet
distance; `evaluate_lcm.py` takes them as --extra_metric and --feature_network. To train the classifier again:

    python demo/make_teacher.py --stage classifier
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import digits
import torch
from torch import nn

FEATURES = 64
CLASSES = (10, 5, 2)  # digits, colours, backgrounds: the order of `digits.parse_caption`
WEIGHTS = Path(__file__).parent / "classifier.safetensors"


class Classifier(nn.Module):
    """Four convolutions to 64 features, and one linear head for each of digit, colour and background."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.GELU(),
            nn.Conv2d(2 * width, 3 * width, 3, padding=1),
            nn.GroupNorm(8, 3 * width),
            nn.GELU(),
            nn.Conv2d(3 * width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * 16, FEATURES),
            nn.GELU(),
        )
        self.heads = nn.ModuleList(nn.Linear(FEATURES, classes) for classes in CLASSES)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the penultimate features (B, 64), float32, of pictures (B, 3, 32, 32) in [-1, 1]."""
        return self.body(pixels)

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of digit (B, 10), colour (B, 5) and background (B, 2)."""
        features = self.features(pixels)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, 3) int64: the predicted digit, colour and background index of uint8 pictures (N, 3, 32, 32)."""
        chunks = (images.float() / 127.5 - 1).split(500)
        return torch.cat([torch.stack([logits.argmax(1) for logits in self(chunk)], dim=1) for chunk in chunks])


@functools.cache
def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """Return the trained classifier, frozen, from its safetensors file."""
    from safetensors.torch import load_file

    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


def features(images: torch.Tensor) -> torch.Tensor:
    """Return the classifier's features (N, 64) of uint8 pictures (N, 3, 32, 32)."""
    return load_classifier().features(images.float() / 127.5 - 1)


def accuracy(images: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Return the shares in [0, 1] of uint8 pictures (N, 3, 32, 32) that show the digit, the colour, and everything in
    their caption.

    The last is stricter than the first two: digit, colour and background are right in the same picture.
    """
    expected = torch.tensor([digits.parse_caption(text) for text in captions])
    right = load_classifier().read(images) == expected
    return {
        "digit": right[:, 0].double().mean().item(),
        "colour": right[:, 1].double().mean().item(),
        "all right": right.all(1).double().mean().item(),
    }
