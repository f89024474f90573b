"""Shards of a few samples, and what comes of them, for the tests of the data.

Most tests read one stream with `shuffle_buffer_size=1`, which keeps the order of the shard; where a bad sample is
followed by a good one, the first batch then tells exactly what was skipped before it.
"""

import itertools
import json

import numpy as np
from conftest import encode_image, write_tar
from hypothesis import HealthCheck, settings

from lcm.data.config import DataConfig
from lcm.data.loader import TrainingData

GREY = np.full((16, 16, 3), 128, np.uint8)
PNG = encode_image(GREY)
CUT_SHORT = "shard unreadable or cut short"
RANDOM = {"center_crop": False, "random_flip": True, "proportion_empty_prompts": 0.3}
FEW_EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def config(*shards, **options):
    defaults = {"batch_size": 1, "resolution": 16, "seed": 0, "shuffle_buffer_size": 1, "center_crop": True}
    return DataConfig(shards=tuple(map(str, shards)), **{**defaults, **options})


def take(data, count):
    """The next batches of `data`; nothing of its iterator is left behind."""
    iterator = iter(data)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def captions(batches):
    return [caption for batch in batches for caption in batch["captions"]]


def members(key, caption=None, picture=PNG, **more):
    """(name, bytes) pairs of one sample; `more` are suffixes and their bytes."""
    sample = {"png": picture, "txt": caption.encode() if caption is not None else None, **more}
    return [(f"{key}.{suffix}", data) for suffix, data in sample.items() if data is not None]


def shard_of(path, *names, picture=PNG):
    """A shard with that picture for each caption."""
    return write_tar(path, [pair for i, name in enumerate(names) for pair in members(f"{i:04d}", name, picture)])


def read_one(tmp_path, picture, suffix="png", resolution=16, **options):
    """The one batch of one picture of the given bytes."""
    path = write_tar(tmp_path / "one.tar", [(f"a.{suffix}", picture), ("a.txt", b"")])
    return take(TrainingData(config(path, resolution=resolution, **options)), 1)[0]


def frozen(batches):
    """What can be compared bit for bit."""
    return [
        (b["pixels"].numpy().tobytes(), b["captions"], b["original_sizes"].tolist(), b["crops"].tolist())
        for b in batches
    ]


def assert_resumes_exactly(run, consumed, more):
    """Taking `consumed` batches, a new start from the saved state and `more` batches is as good as one long run."""
    whole = TrainingData(run)
    batches = iter(whole)
    before = frozen(itertools.islice(batches, consumed))
    state = json.dumps(whole.state_dict())
    after = frozen(itertools.islice(batches, more))
    batches.close()
    resumed = TrainingData(run)
    resumed.load_state_dict(json.loads(state))
    assert json.dumps(resumed.state_dict()) == state
    assert frozen(take(resumed, more)) == after
    assert resumed.tally == whole.tally
    assert resumed.state_dict() == whole.state_dict()
    assert len(before) == consumed and len(after) == more
