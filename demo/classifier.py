"""A small CNN that reads the digit, the colour and the background of a picture: the examiner of the demo world.

It judges whether a sampled picture shows what its caption asked for (`accuracy`) and gives the features of the Frechet
distance (`features`): what `evaluate_lcm.py` takes as --extra_metric and --feature_network. To train it anew:

    python demo/make_teacher.py --stage classifier
"""

import functools
from pathlib import Path

import digits
import torch
from torch import nn

FEATURES = 64
CLASSES = (10, 5, 2)  # digits, colours, backgrounds: the order of `digits.parse_caption`
WEIGHTS = Path(__file__).parent / "classifier.safetensors"


class Classifier(nn.Module):
    """Four convolutions to 64 features, and one linear head for each of digit, colour and background."""

    def __init__(self, width=32):
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

    def features(self, pixels):
        """Return the penultimate features (B, 64), float32, of pictures (B, 3, 32, 32) in [-1, 1]."""
        return self.body(pixels)

    def forward(self, pixels):
        """Return the logits of digit (B, 10), colour (B, 5) and background (B, 2)."""
        features = self.features(pixels)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, images):
        """Return (N, 3) int64: the digit, colour and background index seen in each uint8 picture (N, 3, 32, 32)."""
        chunks = (images.float() / 127.5 - 1).split(500)
        return torch.cat([torch.stack([logits.argmax(1) for logits in self(chunk)], dim=1) for chunk in chunks])


@functools.cache
def load_classifier(path=WEIGHTS):
    """Return the trained classifier, frozen, from its safetensors file."""
    from safetensors.torch import load_file

    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


def features(images):
    """Return the classifier's features (N, 64) of uint8 pictures (N, 3, 32, 32)."""
    return load_classifier().features(images.float() / 127.5 - 1)


def accuracy(images, captions):
    """Return the shares in [0, 1] of uint8 pictures that show the digit, the colour, and all that was asked for.

    The last is stricter than the first two: digit, colour and background are right in the same picture.
    """
    asked = torch.tensor([digits.parse_caption(text) for text in captions])
    right = load_classifier().read(images) == asked
    return {
        "digit": right[:, 0].double().mean().item(),
        "colour": right[:, 1].double().mean().item(),
        "all right": right.all(1).double().mean().item(),
    }
