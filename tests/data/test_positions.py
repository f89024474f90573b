"""A resume goes on exactly: the same samples, crops, flips and captions."""

import json
import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import encode_image, write_tar
from data_tools import FEW_EXAMPLES, RANDOM, assert_resumes_exactly, captions, config, frozen, members, shard_of, take
from hypothesis import given
from hypothesis import strategies as st

from lcm.data import commands
from lcm.data import stream as lcm_stream
from lcm.data.loader import TrainingData
from lcm.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("watchdog"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


@pytest.fixture(scope="module")
def messy_shards(tmp_path_factory):
    """Shards with everything in them: good samples, bad ones, none at all, a cut, garbage."""
    folder = tmp_path_factory.mktemp("messy")
    rng = np.random.default_rng(0)

    def good(shard, count):
        pairs = []
        for i in range(count):
            picture = encode_image(rng.integers(0, 256, (17, 25, 3), dtype=np.uint8))
            names = json.dumps({"caption": [f"{shard}.{i} one", f"{shard}.{i} two"]}).encode()
            pairs += members(f"{i:03d}", picture=picture, json=names)
        return pairs

    (folder / "garbage.tar").write_bytes(b"garbage" * 100)
    cut = folder / "cut.tar"
    write_tar(cut, good(3, 4))
    cut.write_bytes(cut.read_bytes()[:-9000])
    return (
        write_tar(folder / "0.tar", good(0, 5)),
        write_tar(folder / "1.tar", members("x") + good(1, 3) + members("y", "", b"") + [("y.txt", b"again")]),
        write_tar(folder / "2.tar", members("x") + members("y", "", b"")),
        str(cut),
        str(folder / "garbage.tar"),
    )


@FEW_EXAMPLES
@given(
    block=st.integers(1, 30),
    batch_size=st.integers(1, 5),
    consumed=st.integers(0, 20),
    num_processes=st.integers(1, 3),
    chosen=st.sets(st.integers(0, 4)).map(lambda indices: indices | {0}),
    seed=st.integers(0, 3),
)
def test_resume_is_exact(messy_shards, block, batch_size, consumed, num_processes, chosen, seed):
    run = config(
        *[messy_shards[i] for i in sorted(chosen)], batch_size=batch_size, shuffle_buffer_size=block, seed=seed,
        num_processes=num_processes, rank=seed % num_processes, **RANDOM,
    )  # fmt: skip
    assert_resumes_exactly(run, consumed, more=7)


@pytest.mark.parametrize(("block", "batch_size", "consumed"), [(4, 2, 5), (1, 3, 6), (50, 1, 13)])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_resume_is_exact_with_workers(messy_shards, num_workers, block, batch_size, consumed):
    options = {"num_workers": num_workers, "batch_size": batch_size, "shuffle_buffer_size": block, **RANDOM}
    assert_resumes_exactly(config(*messy_shards, **options), consumed, more=6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_through_passes_without_a_usable_sample(tmp_path, num_workers):
    bad = [write_tar(tmp_path / f"{i}.tar", members("a") + members("b", "", b"")) for i in range(4)]
    good = shard_of(tmp_path / "good.tar", "good")
    # Three passes or more that hold the good shard, with dry ones between them, make a batch.
    split = {"num_workers": num_workers, "num_processes": 1 if num_workers else 3}
    run = config(good, *bad, batch_size=3, shuffle_buffer_size=2, **split)
    data = TrainingData(run)
    batches, states = iter(data), []
    for _ in range(8):
        next(batches)
        states.append(data.state_dict())
    batches.close()
    if num_workers:  # a single stream's dry passes are over when its batch is there
        assert any(any(state["empty_passes"]) for state in states)
    for consumed in range(7):
        assert_resumes_exactly(run, consumed, more=4)


def test_resume_at_every_batch_of_two_passes(clean_shards):
    for consumed in range(15):
        assert_resumes_exactly(config(*clean_shards, batch_size=3, shuffle_buffer_size=5), consumed, more=4)


def test_resume_twice_and_within_one_object(clean_shards):
    run = config(*clean_shards, batch_size=3, shuffle_buffer_size=6, **RANDOM)
    whole = frozen(take(TrainingData(run), 12))
    data, pieces = TrainingData(run), []
    for count in (1, 4, 2, 5):
        pieces += frozen(take(data, count))
        state = json.loads(json.dumps(data.state_dict()))
        if count != 2:  # once it just goes on
            data = TrainingData(run)
            data.load_state_dict(state)
    assert pieces == whole


def test_no_worker_and_one_worker_are_the_same_stream(messy_shards):
    run = config(*messy_shards, batch_size=2, shuffle_buffer_size=4, **RANDOM)
    data = TrainingData(run)
    first = take(data, 5)
    state = data.state_dict()
    second = take(data, 5)
    worker = TrainingData(replace(run, num_workers=1))
    assert frozen(take(worker, 10)) == frozen(first + second)
    worker = TrainingData(replace(run, num_workers=1))
    worker.load_state_dict(state)
    assert frozen(take(worker, 5)) == frozen(second)


def test_a_saved_state_stays_as_it_is(tmp_path):
    bad = [write_tar(tmp_path / f"{i}.tar", members("a")) for i in range(3)]
    data = TrainingData(config(shard_of(tmp_path / "good.tar", "good"), *bad, batch_size=2, num_workers=2))
    batches, kept = iter(data), []
    for _ in range(8):
        next(batches)
        state = data.state_dict()
        kept.append((state, json.dumps(state)))
    batches.close()
    for state, text in kept:
        assert json.dumps(state) == text


def test_a_resume_reads_one_block_again_and_nothing_else(clean_shards, monkeypatch):
    run = config(*clean_shards, batch_size=2, shuffle_buffer_size=4)
    data = TrainingData(run)
    take(data, 9)  # 18 of 20 samples: in the middle of the last shard, which is the last block
    decoded, opened = [], []
    decode, gopen = lcm_stream.decode_sample, commands.gopen
    monkeypatch.setattr(lcm_stream, "decode_sample", lambda *args: decoded.append(args) or decode(*args))
    monkeypatch.setattr(commands, "gopen", lambda url, *args: opened.append(url) or gopen(url, *args))
    resumed = TrainingData(run)
    resumed.load_state_dict(data.state_dict())
    take(resumed, 1)
    assert len(decoded) == 2  # nothing that was used is decoded again
    assert len(opened) <= 2  # the block's shard, and the one from which the next block is read ahead


def test_a_block_ends_early_where_its_samples_are_large(tmp_path):
    large = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = shard_of(tmp_path / "a.tar", *(f"{i:02d}" for i in range(12)), picture=large)
    run = config(path, shuffle_buffer_size=1000, shuffle_buffer_mb=3.5 * len(large) / 1e6)
    seen = captions(take(TrainingData(run), 12))
    assert [sorted(seen[i : i + 4]) for i in (0, 4, 8)] == [[f"{i + j:02d}" for j in range(4)] for i in (0, 4, 8)]
    assert seen != sorted(seen)
    for consumed in range(12):
        assert_resumes_exactly(run, consumed, more=6)


def test_another_number_of_workers_is_refused(clean_shards):
    state = TrainingData(config(*clean_shards, num_workers=2)).state_dict()
    for num_workers in (0, 1, 3):
        with pytest.raises(UserError, match=r"^--dataloader_num_workers: .* 2 .* [13]$"):
            TrainingData(config(*clean_shards, num_workers=num_workers)).load_state_dict(state)


def kill_a_worker():
    """Kill one data worker of this process, as the kernel does where memory is short."""
    multiprocessing.active_children()[0].kill()


@pytest.mark.usefixtures("deaths_show_soon")
@pytest.mark.parametrize("moments", [{0}, {3, 6}])
def test_a_data_worker_that_died_is_started_anew_at_its_place(messy_shards, caplog, moments):
    run = config(*messy_shards, num_workers=2, batch_size=2, shuffle_buffer_size=3, **RANDOM)
    whole, data = TrainingData(run), TrainingData(run)
    expected, seen = take(whole, 9), []
    batches = iter(data)
    for step in range(9):
        seen.append(next(batches))
        if step in moments:
            kill_a_worker()
            for _ in range(50):  # nothing is raised while the training step runs
                time.sleep(0.001)
    batches.close()
    assert frozen(seen) == frozen(expected) and data.state_dict() == whole.state_dict()
    assert "restarting all of them" in caplog.text


@pytest.mark.parametrize("kind", [ConnectionResetError, EOFError])
def test_a_data_worker_that_died_while_it_sent_a_batch(messy_shards, monkeypatch, kind):
    """Then the connection breaks in the training process. An error that was raised in a worker is no death."""
    run, load, failures = config(*messy_shards, num_workers=2, batch_size=2, **RANDOM), TrainingData.load, []

    def load_and_break(self):
        for number, item in enumerate(load(self)):
            if number == 2 and len(failures) < 2:
                failures.append(kind())
                raise failures[-1]
            yield item

    expected = take(TrainingData(run), 6)
    monkeypatch.setattr(TrainingData, "load", load_and_break)
    assert frozen(take(TrainingData(run), 6)) == frozen(expected) and len(failures) == 2

    def fail(self):
        raise kind("Caught an error in DataLoader worker process 0.")
        yield

    monkeypatch.setattr(TrainingData, "load", fail)
    with pytest.raises(kind):
        take(TrainingData(run), 1)
