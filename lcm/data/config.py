"""The settings that decide which batches a run sees, and in which order."""

from dataclasses import dataclass

from lcm.cache import Origin, sample_bytes
from lcm.options.plan import Plan
from lcm.options.shapes import Shape, bucket_shapes
from lcm.options.types import Options

BATCHES_AHEAD = 2  # batches that a data worker prepares ahead; the default of DataLoader


@dataclass(frozen=True)
class DataConfig:
    """The settings that decide which batches a process sees, and in which order."""

    shards: tuple[str, ...]  # local paths, http(s):// or pipe: addresses, without braces
    batch_size: int
    resolution: int  # pixels, both sides
    seed: int
    buckets: tuple[Shape, ...] = ()  # (height, width) in pixels, in place of the square
    interpolation_type: str = "bilinear"
    center_crop: bool = False
    random_flip: bool = False
    proportion_empty_prompts: float = 0.0
    caption_key: str = "caption"  # in the JSON, for samples without a caption file
    width_key: str | None = None  # in the JSON; None measures the picture
    height_key: str | None = None
    min_image_size: int = 0  # pixels, of the shorter side
    min_image_area: float = 0.0  # 10^6 pixels
    max_watermark_probability: float | None = None  # against `pwatermark` in the JSON
    shuffle_buffer_size: int = 1000  # samples a block
    shuffle_buffer_mb: float = 512.0  # 10^6 bytes, after which a block ends early
    shard_timeout: float = 300.0  # seconds without a byte
    origin: Origin | None = None  # what made the samples, if they are cached
    num_workers: int = 0
    rank: int = 0
    num_processes: int = 1

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of pictures, (height, width) in pixels."""
        return self.buckets or ((self.resolution, self.resolution),)

    @property
    def streams_per_process(self) -> int:
        return max(1, self.num_workers)

    @property
    def num_streams(self) -> int:
        return self.num_processes * self.streams_per_process

    @property
    def max_bytes(self) -> float:
        """Most bytes that the streams of a process use: blocks of encoded samples, and prepared batches."""
        pixels = 3 * max(height * width for height, width in self.shapes)
        batch = self.batch_size * (sample_bytes(self.origin) if self.origin else pixels)
        ahead = len(self.shapes) + BATCHES_AHEAD * (self.num_workers > 0)
        return self.streams_per_process * (self.shuffle_buffer_mb * 1e6 + ahead * batch)


def data_config(args: Options, plan: Plan, rank: int) -> DataConfig:
    """The DataConfig of one process."""
    names = DataConfig.__dataclass_fields__.keys() & vars(args).keys() - {"seed"}
    return DataConfig(
        shards=plan.shards,
        buckets=bucket_shapes(args),
        origin=plan.cache.origin if plan.cache else None,
        seed=plan.seed,
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
        rank=rank,
        num_processes=plan.num_processes,
        **{name: getattr(args, name) for name in names},
    )
