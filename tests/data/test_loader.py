"""What a run sees of its data: errors, workers, nothing that is left behind."""

import gc
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import encode_image, write_tar
from data_tools import CUT_SHORT, GREY, captions, config, frozen, members, shard_of, take

from lcm.data import config as lcm_config
from lcm.data import samples
from lcm.data.config import DataConfig
from lcm.data.loader import TrainingData
from lcm.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("watchdog"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


def test_every_option_reaches_the_config():
    named = {
        "resolution": 40, "seed": 7, "interpolation_type": "box", "center_crop": True, "random_flip": True,
        "proportion_empty_prompts": 0.1, "caption_key": "a", "width_key": "b", "height_key": "c", "min_image_size": 3,
        "min_image_area": 0.5,
        "max_watermark_probability": 0.2, "shuffle_buffer_size": 9, "shuffle_buffer_mb": 3.5, "shard_timeout": 4.5,
    }  # fmt: skip
    more = {"train_batch_size": 5, "dataloader_num_workers": 2, "learning_rate": 1}
    plan = SimpleNamespace(cache=None, shards=("a.tar",), seed=7, num_processes=3)
    for buckets, shapes in ((None, ()), ("16,24;8,8", ((16, 24), (8, 8)))):
        args = SimpleNamespace(**named, **more, aspect_ratio_buckets=buckets)
        made = lcm_config.data_config(args, plan, rank=1)
        expected = {"batch_size": 5, "num_workers": 2, "rank": 1, "num_processes": 3, "buckets": shapes}
        assert made == DataConfig(shards=("a.tar",), **expected, **named)
    assert made.shapes == shapes and DataConfig(("a.tar",), 1, 40, 0).shapes == ((40, 40),)


@pytest.mark.parametrize(("num_workers", "num_processes"), [(0, 1), (2, 1), (0, 2), (2, 2), (3, 1), (0, 5)])
def test_a_pass_without_a_usable_sample_is_an_error(tmp_path, num_workers, num_processes):
    shards = [
        write_tar(tmp_path / "a.tar", members("a") + members("b", "x", b"")),
        write_tar(tmp_path / "b.tar", members("a", "x", encode_image(GREY[:8]))),
        write_tar(tmp_path / "c.tar", []),
    ]
    for rank in range(num_processes):
        split = {"num_workers": num_workers, "num_processes": num_processes, "rank": rank}
        data = TrainingData(config(*shards, min_image_size=10, **split))
        with pytest.raises(UserError, match=r"^--train_shards_path_or_url: ") as caught:
            next(iter(data))
        for reason in ("no caption", "picture unreadable", "smaller than --min_image_size"):
            assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("num_workers", "num_processes"), [(0, 1), (2, 1), (3, 1), (0, 2), (0, 3), (2, 2), (0, 5)])
@pytest.mark.parametrize("again", [False, True])
def test_shards_that_went_bad_on_the_way_are_an_error(tmp_path, num_workers, num_processes, again):
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path in paths:
        shard_of(path, *"abcdef")
    shards = [*paths, paths[0]] if again else paths  # one that is named twice is read twice
    data = TrainingData(config(*shards, num_workers=num_workers, num_processes=num_processes, seed=8))
    batches = iter(data)
    assert len(list(itertools.islice(batches, 9))) == 9
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match=CUT_SHORT):
        for _ in batches:
            pass


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_bad", [0, 1, 7])
def test_one_good_sample_is_found(tmp_path, num_processes, num_bad):
    bad = [write_tar(tmp_path / f"{i}.tar", members("a")) for i in range(num_bad)]
    good = shard_of(tmp_path / "good.tar", "good")
    for seed, rank in itertools.product(range(8), range(num_processes)):
        data = TrainingData(config(good, *bad, seed=seed, rank=rank, num_processes=num_processes, batch_size=2))
        assert captions(take(data, 2)) == ["good"] * 4


@pytest.mark.parametrize("num_bad", [0, 5])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_one_good_sample_is_found_by_workers(tmp_path, num_bad, num_processes):
    bad = [write_tar(tmp_path / f"{i}.tar", members("a")) for i in range(num_bad)]
    good = shard_of(tmp_path / "good.tar", "good")
    for seed in range(3):
        data = TrainingData(config(good, *bad, seed=seed, num_workers=2, num_processes=num_processes, batch_size=2))
        assert captions(take(data, 3)) == ["good"] * 6


@pytest.mark.usefixtures("deaths_show_soon")
def test_data_workers_that_die_again_and_again_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "transform", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    data = TrainingData(config(shard_of(tmp_path / "a.tar", "a"), num_workers=1))
    with pytest.raises(UserError, match=r"^--dataloader_num_workers: data workers died 3 times in a row"):
        take(data, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_random_states_are_left_alone(clean_shards, num_workers):
    def states():
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), rest)

    before = states()
    options = {"center_crop": False, "random_flip": True, "shuffle_buffer_size": 8, "proportion_empty_prompts": 0.5}
    take(TrainingData(config(*clean_shards, num_workers=num_workers, **options)), 10)
    assert states() == before
    torch.manual_seed(1)
    random.seed(1)
    again = take(TrainingData(config(*clean_shards, num_workers=num_workers, **options)), 4)
    torch.manual_seed(2)
    random.seed(2)
    assert frozen(again) == frozen(take(TrainingData(config(*clean_shards, num_workers=num_workers, **options)), 4))


def test_nothing_is_left_running(clean_shards):
    def running():
        return {*threading.enumerate(), *multiprocessing.active_children()}

    before = running()
    take(TrainingData(config(*clean_shards, num_workers=2)), 3)
    gc.collect()
    deadline = time.monotonic() + 30
    while running() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() <= before
