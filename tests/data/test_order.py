"""In which order samples come, which stream reads which, and how many it holds."""

import itertools
import weakref
from collections import Counter
from dataclasses import replace

import pytest
from data_tools import FEW_EXAMPLES, captions, config, frozen, shard_of, take
from hypothesis import given
from hypothesis import strategies as st

from lcm.data import shards as lcm_shards
from lcm.data import stream as lcm_stream
from lcm.data.loader import TrainingData

pytestmark = [
    pytest.mark.usefixtures("watchdog"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]

ALL_CAPTIONS = sorted(f"picture {shard} {i}" for shard in range(5) for i in range(4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_seed_decides_the_batches(clean_shards, num_workers):
    def batches(seed):
        options = {"random_flip": True, "center_crop": False, "shuffle_buffer_size": 8, "batch_size": 3}
        return frozen(take(TrainingData(config(*clean_shards, seed=seed, num_workers=num_workers, **options)), 12))

    first = batches(3)
    assert first == batches(3)
    assert [b[1] for b in first] != [b[1] for b in batches(4)]


@pytest.mark.parametrize("block", [1, 3, 4, 7, 20, 1000])
def test_a_pass_holds_every_sample_once(clean_shards, block):
    data = TrainingData(config(*clean_shards, shuffle_buffer_size=block))
    passes = [captions(take(data, 20)) for _ in range(3)]
    assert all(sorted(one) == ALL_CAPTIONS for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_samples_are_shuffled(clean_shards):
    in_blocks = captions(take(TrainingData(config(*clean_shards, shuffle_buffer_size=4)), 20))
    unshuffled = captions(take(TrainingData(config(*clean_shards)), 20))
    assert [sorted(in_blocks[i : i + 4]) for i in range(0, 20, 4)] == [unshuffled[i : i + 4] for i in range(0, 20, 4)]
    assert in_blocks != unshuffled
    assert unshuffled[::4] != sorted(unshuffled[::4])  # the shards are shuffled even then
    # In one large block samples of different shards mix: rarely are two neighbours of one shard.
    mixed = captions(take(TrainingData(config(*clean_shards, shuffle_buffer_size=100)), 20))
    assert sum(one[:9] == other[:9] for one, other in itertools.pairwise(mixed)) < 10


def one_pass(stream_config, index):
    """The captions of a stream's first pass. Batches must be of one sample."""
    items = iter(lcm_stream.Stream(stream_config, index))
    mine = itertools.takewhile(lambda item: item.batch is not None and item.position.pass_index == 0, items)
    return [item.batch["captions"][0] for item in mine]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 2), (2, 0), (2, 2), (3, 1), (2, 3), (7, 0), (3, 8)])
def test_all_streams_together_use_every_sample_once(clean_shards, num_shards, num_processes, num_workers):
    shared = config(
        *clean_shards[:num_shards], num_workers=num_workers, num_processes=num_processes, shuffle_buffer_size=3
    )
    used = [
        one_pass(replace(shared, rank=rank), index)
        for rank in range(num_processes)
        for index in range(max(1, num_workers))
    ]
    assert sorted(itertools.chain.from_iterable(used)) == ALL_CAPTIONS[: 4 * num_shards]
    if len(used) <= num_shards * 4:
        assert all(used)


def test_workers_and_processes_see_different_samples(clean_shards):
    data = TrainingData(config(*clean_shards[:4], num_workers=2))
    assert sorted(captions(take(data, 16))) == ALL_CAPTIONS[:16]  # two streams of two shards each, in turn
    ranks = [TrainingData(config(*clean_shards[:4], num_workers=2, num_processes=2, rank=rank)) for rank in (0, 1)]
    of_rank = [captions(take(data, 8)) for data in ranks]
    assert sorted(of_rank[0] + of_rank[1]) == ALL_CAPTIONS[:16]


def uses(shards, num_streams, num_passes, **options):
    """How often each caption was used, over so many passes of `num_streams` processes that step together."""
    run = config(*shards, num_processes=num_streams, **options)
    ranks = [iter(TrainingData(replace(run, rank=rank))) for rank in range(num_streams)]
    counts, total = Counter(), sum(1 for shard in set(shards) for _ in lcm_shards.read_shard(str(shard)))
    for rank in itertools.islice(itertools.cycle(ranks), num_passes * total):
        counts.update(next(rank)["captions"])
    assert len(counts) == total or num_passes == 1
    for rank in ranks:
        rank.close()
    return counts


def test_all_samples_are_used_equally_often(tmp_path):
    sizes = {"equal": [6, 6, 6], "unequal": [20, 20, 2]}
    for kind, counts in sizes.items():
        shards = [shard_of(tmp_path / f"{kind}{i}.tar", *(f"{i} {j}" for j in range(n))) for i, n in enumerate(counts)]
        for block in (1, 4, 100):
            counted = uses(shards, 4, num_passes=20, shuffle_buffer_size=block)
            assert max(counted.values()) <= 1.1 * min(counted.values())


@FEW_EXAMPLES
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    num_streams=st.integers(1, 7),
    block=st.integers(1, 20),
    cycles=st.integers(1, 3),
    more=st.integers(0, 200),
)
def test_each_stream_uses_each_sample_once_a_cycle(monkeypatch, sizes, num_streams, block, cycles, more):
    """The law behind it: after as many passes as there are streams all samples were used exactly as often, and in
    between no two differ by more than the number of streams."""
    monkeypatch.setattr(lcm_stream, "read_shard", lambda url, _: ((url, i) for i in range(sizes[int(url)])))
    run = config(*range(len(sizes)), num_processes=num_streams, shuffle_buffer_size=block)
    streams = [lcm_stream.Stream(replace(run, rank=rank), 0).shuffled() for rank in range(num_streams)]
    streams = [(read.sample for read in stream if isinstance(read, lcm_stream.Read)) for stream in streams]
    counts = Counter({(str(shard), i): 0 for shard, size in enumerate(sizes) for i in range(size)})
    for stream in streams:
        counts.update(itertools.islice(stream, cycles * sum(sizes)))
    assert set(counts.values()) == {cycles * num_streams}
    counts.update(next(stream) for stream in itertools.islice(itertools.cycle(streams), more))
    assert max(counts.values()) - min(counts.values()) <= num_streams


def test_streams_of_equal_shards_begin_apart(clean_shards):
    for num_streams in (1, 2, 3, 5):
        counted = uses(clean_shards, num_streams, num_passes=1, shuffle_buffer_size=1000)
        assert max(counted.values()) <= 2  # 5 shards in 2 or 3 shares cannot be cut evenly
        if num_streams in (1, 5):
            assert sorted(counted) == ALL_CAPTIONS


class Held(dict):
    """A sample that can be seen to be let go of."""

    __hash__ = object.__hash__


def test_one_block_and_no_more_is_held(monkeypatch):
    held, most = weakref.WeakSet(), 0

    def read(url, timeout):
        for i in range(500):
            held.add(sample := Held(png=bytes(100), number=i))
            yield sample

    monkeypatch.setattr(lcm_stream, "read_shard", read)
    stream = lcm_stream.Stream(config("a", shuffle_buffer_size=100), 0).shuffled()
    for _ in itertools.islice(stream, 1000):
        most = max(most, len(held))
    assert 100 <= most <= 103  # one is with the consumer, and one was just read


def test_what_the_streams_may_hold():
    run = config("a", batch_size=10, resolution=100, shuffle_buffer_mb=5)
    assert run.max_bytes == 5e6 + 300_000  # a block, and a batch
    assert replace(run, num_workers=2).max_bytes == 2 * (5e6 + 3 * 300_000)  # each has two batches more ahead


def test_every_sample_stream_and_pass_has_its_own_chance(tmp_path):
    path = shard_of(tmp_path / "a.tar", *["full"] * 64)
    options = {"batch_size": 32, "shuffle_buffer_size": 32, "proportion_empty_prompts": 0.5, "num_processes": 2}
    batches = [batch for rank in (0, 1) for batch in take(TrainingData(config(path, rank=rank, **options)), 3)]
    drops = [batch["captions"] for batch in batches]
    assert all(8 < one.count("") < 24 for one in drops)
    assert len(set(map(tuple, drops))) == len(drops) == 6
