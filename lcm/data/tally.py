"""How many samples were used, and how many were skipped, by reason."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from lcm.data.shards import Problem
from lcm.secrets import redact

logger = logging.getLogger(__name__)


def describe(skipped: Counter[str]) -> str:
    """A Counter of skipped samples in one line, the most frequent reason first."""
    return ", ".join(f"{count} x {reason}" for reason, count in skipped.most_common()) or "none"


def describe_shapes(shapes: Counter[str]) -> str:
    """A Counter of shapes in one line, the most frequent first."""
    return ", ".join(f"{count} of {shape}" for shape, count in shapes.most_common())


@dataclass
class Tally:
    """Numbers of samples so far."""

    used: int = 0
    unscored: int = 0  # of the used ones: passed --max_watermark_probability because their JSON has no `pwatermark`
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    shapes: Counter[str] = field(default_factory=Counter)  # used ones by HEIGHTxWIDTH, with --aspect_ratio_buckets

    def __add__(self, other: "Tally") -> "Tally":
        used, unscored = self.used + other.used, self.unscored + other.unscored
        return Tally(used, unscored, self.skipped + other.skipped, self.shapes + other.shapes)

    def __str__(self) -> str:
        unscored = f"{self.unscored} of them without a `pwatermark`, " if self.unscored else ""
        shapes = f" ({describe_shapes(self.shapes)})" if self.shapes else ""
        return f"{self.used} samples used{shapes}, {unscored}skipped: {describe(self.skipped)}"

    def skip(self, problem: Problem) -> None:
        """Count a sample that cannot be used; log the first one for each reason with its details."""
        self.skipped[problem.reason] += 1
        if self.skipped[problem.reason] == 1:
            logger.warning("Skipped: %s (%s). More are only counted.", problem.reason, redact(problem.detail))

    def as_scalars(self) -> dict[str, int]:
        """The tally for the trackers: {"samples/used": n, "samples/skipped/the_reason": n, ...}."""
        reasons = {f"samples/skipped/{name.replace(' ', '_')}": count for name, count in sorted(self.skipped.items())}
        unscored = {"samples/without_pwatermark": self.unscored} if self.unscored else {}
        shapes = {f"samples/shape/{name}": count for name, count in sorted(self.shapes.items())}
        return {"samples/used": self.used, **unscored, **reasons, **shapes}
