"""From the bytes of a picture to pixels."""

import itertools

import numpy as np
import pytest
import torch
from conftest import encode_image
from data_tools import GREY, config, read_one, shard_of, take
from PIL import ExifTags, Image, JpegImagePlugin

from lcm.data import pictures
from lcm.data.loader import TrainingData
from lcm.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("watchdog"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG", "Png", "WEBP"])
def test_picture_formats(tmp_path, suffix):
    picture = np.full((16, 16, 3), (250, 128, 5), np.uint8)
    pixels = read_one(tmp_path, encode_image(picture, suffix.lower(), quality=95), suffix)["pixels"]
    assert pixels.shape == (1, 3, 16, 16) and pixels.dtype == torch.float32
    expected = torch.tensor([250, 128, 5]) / 127.5 - 1
    assert (pixels - expected[:, None, None]).abs().max() < 0.05


def test_the_picture_decides_over_its_suffix(tmp_path):
    assert read_one(tmp_path, encode_image(GREY, "webp", lossless=True), "jpg")["pixels"].unique().numel() == 1


def test_pixel_values_are_exact(tmp_path):
    picture = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    pixels = read_one(tmp_path, encode_image(picture))["pixels"]
    assert pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(pixels[0, 0], torch.arange(256).reshape(16, 16) / 127.5 - 1)


def test_center_crop_takes_the_middle(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    for upright in (False, True):
        given_picture = picture.transpose(1, 0, 2) if upright else picture
        middle = given_picture[16:32] if upright else given_picture[:, 16:32]
        batch = read_one(tmp_path, encode_image(given_picture))
        np.testing.assert_array_equal(((batch["pixels"][0] + 1) * 127.5).round(), middle.transpose(2, 0, 1))
        assert batch["crops"].tolist() == [[16, 0] if upright else [0, 16]] and batch["crops"].dtype == torch.int64
        assert batch["original_sizes"].tolist() == [[48, 16] if upright else [16, 48]]


def test_random_crop_varies_and_is_what_is_reported(tmp_path):
    # torchvision's rule: the longer side becomes int(16 * 37 / 20) = 29, not 30, so that 14 crops fit.
    picture = np.random.default_rng(0).integers(0, 256, (20, 37, 3), dtype=np.uint8)
    path = shard_of(tmp_path / "a.tar", *[""] * 100, picture=encode_image(picture))
    batches = take(TrainingData(config(path, batch_size=100, center_crop=False)), 3)
    tops, lefts = torch.cat([b["crops"] for b in batches]).T.tolist()
    assert set(tops) == {0} and set(lefts) == set(range(14))
    by_left = {left: p for b in batches for (_, left), p in zip(b["crops"].tolist(), b["pixels"], strict=True)}
    for left in range(13):  # neighbouring crops are the same picture, moved by a pixel
        assert torch.equal(by_left[left][:, :, 1:], by_left[left + 1][:, :, :-1])
    center = take(TrainingData(config(path)), 1)[0]
    assert center["crops"].tolist() == [[0, 6]] and torch.equal(center["pixels"][0], by_left[6])


def test_random_flip_mirrors_half(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = shard_of(tmp_path / "a.tar", *[""] * 200, picture=encode_image(picture))
    upright = torch.from_numpy(picture.transpose(2, 0, 1).copy()) / 127.5 - 1
    pixels = take(TrainingData(config(path, batch_size=200, random_flip=True)), 1)[0]["pixels"]
    mirrored = [torch.equal(p, upright.flip(2)) for p in pixels]
    assert 60 < sum(mirrored) < 140
    assert all(was_mirrored or torch.equal(p, upright) for p, was_mirrored in zip(pixels, mirrored, strict=True))
    assert torch.equal(take(TrainingData(config(path)), 1)[0]["pixels"][0], upright)


def test_interpolation_types(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    resized = {
        name: (read_one(tmp_path, encode_image(picture), interpolation_type=name)["pixels"][0] + 1) * 127.5
        for name in ("bilinear", "bicubic", "box", "nearest", "nearest_exact", "hamming", "lanczos")
    }
    np.testing.assert_array_equal(resized["nearest_exact"].round(), picture[1::2, 1::2].transpose(2, 0, 1))
    means = picture.reshape(16, 2, 16, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(resized["box"].numpy() - means).max() < 1.01  # Pillow rounds twice
    assert torch.equal(resized.pop("nearest"), resized["nearest_exact"])
    for one, other in itertools.combinations(resized, 2):
        assert (resized[one] - resized[other]).abs().max() > 2, (one, other)


def test_small_pictures_are_enlarged(tmp_path):
    batch = read_one(tmp_path, encode_image(GREY[:3, :5]))
    assert batch["pixels"].shape == (1, 3, 16, 16) and batch["original_sizes"].tolist() == [[3, 5]]
    assert (batch["pixels"] - (128 / 127.5 - 1)).abs().max() < 1e-6


# An orientation says where the picture's first row and column belong; all of these are shown red above blue.
@pytest.mark.parametrize(("orientation", "rot90"), [(1, 0), (3, 2), (6, 1), (8, 3)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(tmp_path, suffix, orientation, rot90):
    shown = np.zeros((32, 16, 3), np.uint8)
    shown[:16, :, 0] = shown[16:, :, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(np.rot90(shown, rot90))
    batch = read_one(tmp_path, encode_image(stored, suffix, exif=exif, quality=95))
    assert batch["original_sizes"].tolist() == [[32, 16]] and batch["crops"].tolist() == [[8, 0]]
    red, _, blue = batch["pixels"][0]
    assert red[:7].min() > 0.8 > -0.8 > blue[:7].max() and blue[9:].min() > 0.8 > -0.8 > red[9:].max()


def palette_picture(transparency=None):
    """Top half index 0, red; lower half index 1, green. `transparency` is an index, or an alpha for each."""
    image = Image.fromarray(np.repeat([0, 1], 128).astype(np.uint8).reshape(16, 16)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    return encode_image(image, **({} if transparency is None else {"transparency": transparency}))


def constant(mode, value):
    return Image.new(mode, (16, 16), value)


@pytest.mark.parametrize(
    ("picture", "top", "bottom"),
    [
        (encode_image(constant("1", 1)), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("L", 77)), (77, 77, 77), (77, 77, 77)),
        (encode_image(constant("L", 77), "jpg"), (77, 77, 77), (77, 77, 77)),
        (encode_image(np.full((16, 16), 0x8001, np.uint16)), (128, 128, 128), (128, 128, 128)),
        (encode_image(np.full((16, 16), 0xFFFF, np.uint16)), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("LA", (0, 0))), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("LA", (10, 255))), (10, 10, 10), (10, 10, 10)),
        (encode_image(constant("RGBA", (255, 0, 0, 0))), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("RGBA", (200, 0, 0, 51))), (244, 204, 204), (244, 204, 204)),  # a fifth of the colour
        (encode_image(constant("RGBA", (9, 8, 7, 0)), "webp", lossless=True), (255, 255, 255), (255, 255, 255)),
        (encode_image(constant("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255), (255, 255, 255)),
        (palette_picture(), (255, 0, 0), (0, 255, 0)),
        (palette_picture(1), (255, 0, 0), (255, 255, 255)),
        (palette_picture(b"\x00\xff"), (255, 255, 255), (0, 255, 0)),
        (encode_image(constant("CMYK", (0, 255, 255, 0)), "jpg"), (255, 0, 0), (255, 0, 0)),
    ],
    ids=["bits", "grey", "grey-jpeg", "grey16", "white16", "LA-clear", "LA", "RGBA-clear", "RGBA-fifth", "webp-clear",
         "RGB-key", "palette", "palette-index", "palette-alphas", "CMYK"],
)  # fmt: skip
def test_colour_modes(tmp_path, picture, top, bottom):
    pixels = (read_one(tmp_path, picture)["pixels"][0] + 1) * 127.5
    for rows, colour in ((pixels[:, :8], top), (pixels[:, 8:], bottom)):
        assert (rows - torch.tensor(colour)[:, None, None]).abs().max() < 1.5


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = {"save_all": True, "append_images": [constant("RGB", "blue")]}
    for suffix, options in (("webp", {"lossless": True}), ("png", {})):
        pixels = read_one(tmp_path, encode_image(constant("RGB", "red"), suffix, **frames, **options))["pixels"]
        assert pixels[0, :, 0, 0].tolist() == [1, -1, -1]


def test_running_out_of_memory_is_no_unreadable_picture(tmp_path, monkeypatch):
    def transpose(image, in_place):
        raise MemoryError

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", transpose)
    path = shard_of(tmp_path / "a.tar", "a")
    for num_workers in (0, 2):
        with pytest.raises(UserError, match=r"^--shuffle_buffer_mb: out of memory .*--dataloader_num_workers"):
            take(TrainingData(config(path, num_workers=num_workers)), 1)


@pytest.mark.parametrize("orientation", [1, 6, 9])
def test_a_large_jpeg_is_decoded_smaller(tmp_path, monkeypatch, orientation):
    """At 1/2, 1/4 or 1/8 of its size, where that is not below the resolution; what is told about it stays the same."""
    row, column = np.mgrid[:76, :130]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = np.stack([row * 3, column, row + column], 2).astype(np.uint8)
    data = encode_image(picture, "jpg", quality=100, subsampling=0, exif=exif)
    decoded, resize = [], pictures.resize
    monkeypatch.setattr(pictures, "resize", lambda p, *more: decoded.append(p) or resize(p, *more))
    resolutions = (16, 19, 20, 38, 39, 76)
    smaller = [read_one(tmp_path, data, "jpg", resolution) for resolution in resolutions]
    sizes = [(33, 19), (33, 19), (65, 38), (65, 38), (130, 76), (130, 76)]
    assert [p.image.size for p in decoded] == [size[::-1] if orientation == 6 else size for size in sizes]
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None)
    for batch, resolution in zip(smaller, resolutions, strict=True):
        whole = read_one(tmp_path, data, "jpg", resolution)
        assert batch["original_sizes"].tolist() == [[130, 76] if orientation == 6 else [76, 130]]
        assert batch["original_sizes"].tolist() == whole["original_sizes"].tolist()
        assert batch["crops"].tolist() == whole["crops"].tolist()
        assert (batch["pixels"] - whole["pixels"]).abs().max() < 0.05
    assert {p.image.size for p in decoded[len(sizes) :]} == {decoded[-1].size}


def test_other_readers_decode_a_jpeg_whole():
    """The reference pictures of an evaluation are as they are."""
    data = encode_image(np.zeros((64, 64, 3), np.uint8), "jpg")
    assert pictures.open_picture(data).image.size == (64, 64)
    assert pictures.open_picture(data, lambda size: (16, 16)).image.size == (16, 16)
