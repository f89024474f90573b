"""Pictures that are not in shards: folders, metadata files, data sets; into shards, into a training."""

import csv
import io
import json
import os
import random
import signal
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, Script, encode_image, forked, launch_two, read_tars
from PIL import Image

import make_shards
from lcm.data import packing, sources, writer
from lcm.data.pictures import open_picture

SIZES = [(24, 24), (36, 24), (24, 40), (64, 48)]  # width, height


def picture(number, suffix="png", **more):
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode_image(pixels, suffix, **more)


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


@pytest.fixture
def folder(tmp_path):
    """Seven pictures in two folders, in four formats, with captions beside them; and things that are no pictures."""
    files = {f"{'sub/' if i > 3 else ''}{i}.{('png', 'jpg', 'webp', 'JPEG')[i % 4]}": picture(i, ("png", "jpg", "webp",
             "jpg")[i % 4]) for i in range(7)}  # fmt: skip
    files |= {f"{'sub/' if i > 3 else ''}{i}.txt": f"picture {i}" for i in range(7)}
    files |= {"notes.md": "mine", ".hidden/8.png": picture(8), "._0.jpg": "resource fork", "__MACOSX/9.png": "no"}
    return write(tmp_path / "pictures", files)


def made(folder, *more):
    """{key: (picture's bytes, its suffix, text or None, JSON)} of what make_shards.py makes of the options."""
    make_shards.main([*map(str, more), f"--output_dir={folder}"])
    found = {}
    for name, data in read_tars(folder).items():
        key, _, suffix = name.partition("/")[2].partition(".")
        found.setdefault(key, {})[suffix] = data
    return {
        key: (next((m[s], s) for s in m if s not in ("txt", "json")), m.get("txt"), json.loads(m["json"]))
        for key, m in found.items()
    }


def test_a_folder_with_captions(folder, tmp_path, capsys):
    """Pictures are copied byte for byte, in the order of their names, with captions and sizes."""
    found = made(tmp_path / "shards", f"--train_data_dir={folder}", "--shard_size=3")
    names = [about["file"] for _, _, about in found.values()]
    assert names == ["0.png", "1.jpg", "2.webp", "3.JPEG", "sub/4.png", "sub/5.jpg", "sub/6.webp"]
    for (data, suffix), text, about in found.values():
        path = folder / about["file"]
        assert data == path.read_bytes() and suffix == path.suffix[1:].lower().replace("jpeg", "jpg")
        assert text.decode() == about["caption"] == f"picture {path.stem}"
        size = [about[name] for name in ("width", "height", "original_width", "original_height")]
        assert size == [*Image.open(path).size] * 2
    out = capsys.readouterr().out
    assert "7 samples used, skipped: none" in out and '{00000..00002}.tar"' in out


def test_several_captions_are_kept(tmp_path):
    files = {"a.png": picture(0), "a.txt": "one\n\n two \n", "b.png": picture(1), "b.txt": "\n"}
    found = made(tmp_path / "shards", f"--train_data_dir={write(tmp_path / 'in', files)}")
    assert [(text, about["caption"]) for _, text, about in found.values()] == [(None, ["one", "two"]), (b"", "")]


def test_metadata_files(tmp_path):
    """metadata.jsonl and .csv, above or beside the pictures; they count more than text files."""
    files = {f"x/{i}.png": picture(i) for i in range(5)} | {"x/0.txt": "not this", "x/3.txt": "beside"}
    rows = [
        {"file_name": "x/0.png", "prompt": "first", "pwatermark": 0.1, "more": {"a": 1}},
        {"file_name": "x/1.png", "prompt": ["second", "2nd"]},
        {"file_name": "x/gone.png", "prompt": "third"},
        {"file_name": "x/4.png", "prompt": None},
    ]
    files["metadata.jsonl"] = "\n".join(map(json.dumps, rows)) + "\n\n"
    table = io.StringIO()
    writer_ = csv.DictWriter(table, ["file_name", "prompt"])
    writer_.writeheader()
    writer_.writerow({"file_name": "2.png", "prompt": "of, the\ntable"})
    files["x/metadata.csv"] = table.getvalue()
    folder = write(tmp_path / "in", files)
    found = made(tmp_path / "shards", f"--train_data_dir={folder}", "--caption_column=prompt")
    captions = {about["file"]: about["caption"] for _, _, about in found.values()}
    assert captions == {
        "x/0.png": "first", "x/1.png": ["second", "2nd"], "x/2.png": "of, the\ntable", "x/3.png": "beside",
    }  # fmt: skip
    first = found["000000000"][2]
    assert first["pwatermark"] == 0.1 and "more" not in first
    counts = json.loads((tmp_path / "shards" / "00000.json").read_text())["skipped"]
    assert counts == {"picture is missing or unreadable": 1, "no caption": 1}


def test_what_cannot_be_used_is_counted_by_reason(tmp_path, capsys):
    good = picture(3, "jpg")
    files = {
        "cut.jpg": good[: len(good) // 2], "text.png": "no picture", "thin.png": encode_image(np.zeros((1, 99), "u1")),
        "silent.png": picture(0), "latin.png": picture(1), "latin.txt": b"caf\xe9", "good.jpg": good, "good.txt": "ok",
        **{f"{name}.txt": "x" for name in ("cut", "text", "thin")},
    }  # fmt: skip
    found = made(tmp_path / "shards", f"--train_data_dir={write(tmp_path / 'in', files)}")
    assert [about["file"] for _, _, about in found.values()] == ["good.jpg"]
    counts = json.loads((tmp_path / "shards" / "00000.json").read_text())
    assert counts["samples"] == 1 and counts["skipped"] == {
        "picture unreadable": 2, "picture too thin": 1, "no caption": 1, "caption is not UTF-8": 1,
    }  # fmt: skip
    assert sorted(line.split(":")[0] for line in counts["problems"]) == [
        "cut.jpg", "latin.png", "silent.png", "text.png", "thin.png",
    ]  # fmt: skip
    assert "silent.png" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_are_made_smaller(tmp_path, suffix):
    """The longer ones only; upright; the original sizes stay in the JSON."""
    turned = Image.Exif()
    turned[0x0112] = 6  # 64 x 48, to be turned by 90 degrees
    big = Image.fromarray(np.add.outer(np.arange(96), np.arange(128)).astype(np.uint8)).convert("RGB")
    files = {"big.jpg": encode_image(big, "jpg", quality=95), "big.txt": "a", "small.png": picture(0),
             "small.txt": "b", "turned.jpg": picture(3, "jpg", exif=turned), "turned.txt": "c"}  # fmt: skip
    folder = write(tmp_path / "in", files)
    options = ["--max_shorter_side=32", f"--picture_format={suffix}"]
    found = made(tmp_path / "shards", f"--train_data_dir={folder}", *options)
    about = {entry["file"]: (data, kind, entry) for (data, kind), _, entry in found.values()}
    names = ("width", "height", "original_width", "original_height")
    assert [about["big.jpg"][2][name] for name in names] == [43, 32, 128, 96]
    assert [about["turned.jpg"][2][name] for name in names] == [32, 43, 48, 64]
    assert about["small.png"][0] == (folder / "small.png").read_bytes()
    for name in ("big.jpg", "turned.jpg"):
        data, kind, entry = about[name]
        assert kind == suffix and open_picture(data).size == (entry["width"], entry["height"])
    expected = np.asarray(big.resize((43, 32), Image.Resampling.LANCZOS), int)
    assert np.abs(np.asarray(open_picture(about["big.jpg"][0]).image, int) - expected).max() < 6


def test_killed_and_started_again(folder, tmp_path):
    """At any moment: the shards are those of an unbroken run."""
    options = [f"--train_data_dir={folder}", "--shard_size=2"]
    made(tmp_path / "unbroken", *options)
    unbroken = read_tars(tmp_path / "unbroken")
    rng = random.Random(0)
    for attempt in range(4):
        out = tmp_path / f"killed{attempt}"

        def dying(out=out, moment=rng.randrange(8)):  # noqa: B008
            real, count = writer.make_captioned, iter(range(99))

            def make_or_die(*args):
                if next(count) == moment % 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            packing.make_captioned, packing.THREADS = make_or_die, 1
            make_shards.main([*options, f"--output_dir={out}"])

        assert forked(dying).returncode == -signal.SIGKILL
        made(out, *options)
        assert read_tars(out) == unbroken
        assert not list(out.glob("*.partial"))


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch, capsys):
    class Full(writer.webdataset.TarWriter):
        def write(self, sample):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.webdataset, "TarWriter", Full)
    with pytest.raises(SystemExit) as stop:
        made(tmp_path / "shards", f"--train_data_dir={folder}")
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "--output_dir: [Errno 28] No space left on device"
    assert not list((tmp_path / "shards").glob("*.tar"))


def test_two_processes_share_the_shards(folder, tmp_path):
    options = [f"--train_data_dir={folder}", "--shard_size=2"]
    made(tmp_path / "one", *options)
    done = launch_two("make_shards.py", [*options, f"--output_dir={tmp_path / 'two'}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Train with:") == 1
    assert read_tars(tmp_path / "two") == read_tars(tmp_path / "one")


@pytest.mark.parametrize("kind", ["parquet", "streamed", "saved"])
def test_a_data_set(folder, tmp_path, kind):
    """Of the library `datasets`: the pictures stay as they were encoded; the first split if there is no `train`."""
    datasets = pytest.importorskip("datasets")
    paths = sorted(map(str, [*folder.glob("?.*g"), *folder.glob("sub/*.jpg")]))
    columns = {"image": paths, "caption": [["a", "b"], *map(str, paths[1:])], "n": list(range(len(paths)))}
    columns["caption"] = [["a", "b"]] + [[path] for path in paths[1:]]
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    if kind != "saved":
        (tmp_path / "set").mkdir()
        table.to_parquet(str(tmp_path / "set" / "all.parquet"))
    else:
        datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "set"))
    options = [f"--dataset_name={tmp_path / 'set'}", "--caption_column=caption", "--shard_size=3"]
    found = made(tmp_path / "shards", *options, *["--streaming"] * (kind == "streamed"))
    for path, ((data, _), _, about) in zip(paths, found.values(), strict=True):
        assert Path(path).read_bytes() == data
        assert (about["caption"], about["n"]) == (["a", "b"] if about["n"] == 0 else path, paths.index(path))


def test_a_stream_that_breaks(folder, tmp_path, monkeypatch, capsys):
    """It is one line; the same command again makes what is missing, with or without a stream."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    parts, paths = [tmp_path / "set" / f"{part}.parquet" for part in "ab"], sorted(map(str, folder.glob("?.*g")))
    for i, path in enumerate(parts):
        table = datasets.Dataset.from_dict({"image": [paths[i], paths[i]], "text": ["a", "b"]})
        table.cast_column("image", datasets.Image()).to_parquet(str(path))
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(sources.Stream, "count", lambda self: 4)  # as a data set on the Hub says
    options = [f"--dataset_name={tmp_path / 'set'}", "--shard_size=2"]
    with pytest.raises(SystemExit):
        made(tmp_path / "shards", *options, "--streaming")
    assert capsys.readouterr().err.splitlines()[-1].startswith("--dataset_name: the stream broke: ")
    assert [path.name for path in (tmp_path / "shards").glob("*.tar")] == ["00000.tar"]
    monkeypatch.undo()
    parts[1].write_bytes(whole)
    assert len(made(tmp_path / "shards", *options, "--streaming")) == 4
    assert made(tmp_path / "again", *options) == made(tmp_path / "shards", *options)


def test_data_sets_of_one_name_are_not_mixed_up(tmp_path):
    """The library's own cache takes the second for the first."""
    datasets = pytest.importorskip("datasets")
    for name in ("one", "two"):
        folder = write(tmp_path / name / "set", {"a.png": picture(len(name)), "README.md": "---\nconfigs:\n"
                       "- config_name: b\n  data_files: b.parquet\n---\n"})  # fmt: skip
        table = datasets.Dataset.from_dict({"image": [str(folder / "a.png")], "text": [name]})
        table.cast_column("image", datasets.Image()).to_parquet(str(folder / "b.parquet"))
        found = made(tmp_path / name / "shards", f"--dataset_name={folder}", "--dataset_config_name=b")
        assert [about["caption"] for _, _, about in found.values()] == [name]


def test_shapes_are_suggested(tmp_path, capsys):
    files = {f"{i}.png": encode_image(np.zeros((64, 96) if i % 4 else (64, 64), "u1")) for i in range(8)}
    folder = write(tmp_path / "in", files | {f"{i}.txt": "a" for i in range(8)})
    made(tmp_path / "shards", f"--train_data_dir={folder}")
    assert capsys.readouterr().out.splitlines()[-1].startswith("--train_shards_path_or_url=")  # squares will do
    files = {f"{i}.png": encode_image(np.zeros((640, 960), "u1")) for i in range(3)}
    folder = write(tmp_path / "wide", files | {f"{i}.txt": "a" for i in range(3)})
    made(tmp_path / "wide_shards", f"--train_data_dir={folder}")
    assert capsys.readouterr().out.splitlines()[-1] == (
        '--resolution=512 --aspect_ratio_buckets="384,640"   # 100 % 640 x 384'
    )
    wide = {(1600, 1000): 60, (1000, 1600): 30, (1024, 1024): 9.5, (3000, 1000): 0.5}
    advice = packing.advise_shapes(Counter({size: int(10 * count) for size, count in wide.items()}))
    assert advice.startswith('--resolution=1024 --aspect_ratio_buckets="768,1344;1344,768;1024,1024"   # 60 % 1344 x')


@pytest.mark.parametrize(("more", "start"), [
    ([], "--train_data_dir: 0 sources of pictures given; allowed: one of"),
    (["--train_data_dir=in", "--prompts", "a"], "--prompts: 2 sources of pictures given"),
    (["--train_data_dir=in", "--seed=3"], "--seed: given, but it has no effect with --train_data_dir"),
    (["--prompts", "a", "--max_shorter_side=64"], "--max_shorter_side: given, but it has no effect with --prompts"),
    (["--train_data_dir=in", "--pretrained_teacher_model=x"], "--pretrained_teacher_model: given, but it has no"),
    (["--prompts", "a"], "--pretrained_teacher_model: required with --prompts"),
    (["--train_data_dir=nosuch"], "--train_data_dir: 'nosuch' is not a folder"),
    (["--train_data_dir=empty"], "--train_data_dir: 'empty' has no pictures"),
    (["--train_data_dir=silent"], "--train_data_dir: no picture can be used: 0 samples used, skipped: 1 x no caption"),
    (["--train_data_dir=broken"], "--train_data_dir: cannot read 'broken/metadata.jsonl'"),
    (["--train_data_dir=other"], "--caption_column: 'text' given, but row 1 of 'other/metadata.csv' has no such"),
    (["--train_data_dir=nameless"], "--train_data_dir: 'nameless/metadata.jsonl': row 1 has no file_name"),
    (["--dataset_name=empty"], "--dataset_name: cannot load 'empty'"),
    (["--dataset_name=set"], "--caption_column: 'text' given, but the data set has none; allowed: image, prompt"),
    (["--dataset_name=set", "--streaming"], "--dataset_name: cannot load 'set': what save_to_disk wrote is on"),
    (["--train_data_dir=in", "--streaming"], "--streaming: given, but it has no effect with --train_data_dir"),
    (["--dataset_name=set", "--image_column=x"], "--image_column: 'x' given, but the data set has none"),
    (["--dataset_name=set", "--image_column=prompt", "--caption_column=prompt"], "--image_column: 'prompt' has no"),
])  # fmt: skip
def test_wrong_options(tmp_path, monkeypatch, capsys, more, start):
    monkeypatch.chdir(tmp_path)
    files = {"in/a.png": picture(0), "in/a.txt": "a", "silent/a.png": picture(0), "empty/readme": "nothing"}
    files |= {f"{name}/a.png": picture(0) for name in ("broken", "other", "nameless")}
    files |= {"broken/metadata.jsonl": "{", "other/metadata.csv": "file_name,label\na.png,7\n"}
    write(tmp_path, files | {"nameless/metadata.jsonl": '{"text": "x"}'})
    if "set" in more[0] if more else False:
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict({"image": ["in/a.png"], "prompt": [3]})
        table.cast_column("image", datasets.Image()).save_to_disk("set")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        make_shards.main([*more, "--output_dir=out"])
    assert capsys.readouterr().err.splitlines()[-1].startswith(start)


def test_captions_can_be_added_after_there_were_none(tmp_path, capsys):
    write(tmp_path / "in", {"a.png": picture(0)})
    options = [f"--train_data_dir={tmp_path / 'in'}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit):
        make_shards.main(options)
    assert not os.listdir(tmp_path / "out")
    (tmp_path / "in" / "a.txt").write_text("a")
    make_shards.main(options)
    assert "1 sample" in capsys.readouterr().out


def test_changed_pictures_are_not_mixed(folder, tmp_path, capsys):
    made(tmp_path / "shards", f"--train_data_dir={folder}")
    (folder / "0.txt").write_text("picture O")
    with pytest.raises(SystemExit):
        made(tmp_path / "shards", f"--train_data_dir={folder}")
    assert capsys.readouterr().err.splitlines()[-1].startswith("--train_data_dir: '7 pictures, SHA-256 ")


def train_from_folder(teacher, folder, out, *more):
    script = Script("sd", teacher, "unused", SCRIPTS["sd"])
    options = [part for part in script.options(out, *more) if not part.startswith("--train_shards")]
    script.module.main([*options, f"--train_data_dir={folder}"])
    return script.weights(out)


def test_training_on_a_folder(teacher, folder, tmp_path):
    """As on the shards that make_shards.py makes of it, to the last bit; also after a kill and a resume."""
    made(tmp_path / "shards", f"--train_data_dir={folder}")
    script = Script("sd", teacher, f"{tmp_path}/shards/00000.tar", SCRIPTS["sd"])
    script.main(tmp_path / "of_shards")
    expected = script.weights(tmp_path / "of_shards")
    whole = train_from_folder(teacher, folder, tmp_path / "whole")
    train_from_folder(teacher, folder, tmp_path / "resumed", "--max_train_steps=2", "--checkpointing_steps=2")
    resumed = train_from_folder(teacher, folder, tmp_path / "resumed", "--resume_from_checkpoint=latest")
    for name, value in expected.items():
        assert torch.equal(whole[name], value) and torch.equal(resumed[name], value), name
    with tarfile.open(tmp_path / "resumed" / "shards" / "00000.tar") as shard:
        assert len(shard.getnames()) == 21


@pytest.mark.parametrize(("more", "start"), [
    ([], "--train_shards_path_or_url: required, but not given; allowed: that, or --train_data_dir or --dataset_name"),
    (["--train_data_dir=x", "--dataset_name=y"], "--dataset_name: given beside --train_data_dir"),
    (["--train_data_dir=x", "--image_column=y"], "--image_column: given, but --dataset_name is not"),
    (["--train_shards_path_or_url=x", "--caption_column=y"], "--caption_column: given, but --dataset_name is not"),
])  # fmt: skip
def test_wrong_sources_of_a_training(teacher, tmp_path, capsys, more, start):
    script = Script("sd", teacher, "unused", SCRIPTS["sd"])
    options = [part for part in script.options(tmp_path) if not part.startswith("--train_shards")]
    with pytest.raises(SystemExit) as stop:
        script.module.main([*options, *more])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(start)
