"""common.py against closed forms, oracles and small files built here. Every test can fail; none needs the network."""

import gc
import io
import json
import math
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common

T = 1000
STEPS = (1, 2, 3, 7, 25, 999, 1000)
SAMPLERS = ({"sampler": "ddpm"}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "dpm"})


def expect_error(capsys, call, *words):
    """`call` must exit with status 2 and print one line `error: ...` that contains every word."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    text = capsys.readouterr().err.replace("\x1b[A", "")  # tqdm's cursor movements
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip() and "%|" not in line]  # progress bars apart
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]


def settings(*argv):
    """The shared flags, parsed and checked."""
    import argparse
    parser = argparse.ArgumentParser()
    common.add_flags(parser)
    return common.read_settings(parser.parse_args(argv))


# --- Small things ----------------------------------------------------------------------------------------------------


def test_uint8_round_trip_is_the_identity_and_rounds():
    """All 256 values survive; 0.4 of a level rounds down, 0.6 up (truncation would send both down); then clamped."""
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(u)), u)
    x = common.to_float(torch.tensor([100.4, 100.6, -20, 300]))
    assert common.to_uint8(x).tolist() == [100, 101, 0, 255]
    assert common.to_float(u).min() == -1 and common.to_float(u).max() == 1


def test_atomic_replaces_only_on_success(tmp_path):
    """Success renames; an exception keeps the old file; in neither case a temporary file stays."""
    path = tmp_path / "deep" / "file.txt"
    with common.atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ValueError), common.atomic(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with common.atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_atomic_names_a_path_that_cannot_be_written(tmp_path, capsys):
    """A folder that is really a file: one line, no traceback."""
    (tmp_path / "file").write_text("")
    expect_error(capsys, lambda: common.write_json(tmp_path / "file" / "a.json", {}), "a.json")


def test_an_error_while_forgotten_bars_are_about(capsys):
    """Bars in reference cycles, which nobody closed, are not collected in the midst of printing the error."""
    class Stream(io.StringIO):
        def __eq__(self, other):  # tqdm asks this as it goes through its bars
            gc.collect()
            return False

    gc.disable()
    alive = common.tqdm(total=3, file=Stream())
    for _ in range(5):
        bar = common.tqdm(total=3, file=io.StringIO())
        bar.itself = bar
    del bar
    try:
        expect_error(capsys, lambda: common.fail("this went wrong"), "this went wrong")
    finally:
        gc.enable()
        alive.close()


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:x", "cpu:", ""])
def test_unknown_device(name, capsys):
    """Devices that no machine has."""
    expect_error(capsys, lambda: common.choose_device(name), "--device")


def test_missing_cuda(monkeypatch, capsys):
    """--device cuda on a machine without one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    expect_error(capsys, lambda: common.choose_device("cuda"), "--device cuda", "--device cpu")
    assert common.choose_device("cpu").type == "cpu"


def test_first_difference():
    assert common.first_difference({"a": 1, "b": 2}, {"b": 2, "a": 1}) is None
    assert common.first_difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b was 2, is now 3"
    assert "c" in common.first_difference({"a": 1}, {"a": 1, "c": 0})


# --- Data ------------------------------------------------------------------------------------------------------------


def test_shapes_are_deterministic_and_their_factors_in_range():
    images, labels, factors = common.draw_shapes(1500, seed=1)
    again, other = common.draw_shapes(1500, seed=1), common.draw_shapes(1500, seed=2)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1]) and torch.equal(factors, again[2])
    assert not torch.equal(images, other[0])
    assert images.shape == (1500, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(len(common.SHAPE_CLASSES)))
    assert factors.shape == (1500, len(common.FACTORS)) and factors.dtype == torch.float32
    assert factors.abs().max() <= 1 and factors[:, :7].min() < -0.9 and factors[:, :7].max() > 0.9
    for pair in (factors[:, 3:5], factors[:, 5:7]):  # sine and cosine of one angle
        assert torch.allclose(pair.square().sum(1), torch.ones(1500), atol=1e-5)
    assert factors[:, 7].unique().tolist() == [-1, 1] and factors[:, 8].unique().tolist() == [-1, 0, 1]


def test_shapes_factors_are_true():
    """Discs: the bands' rows, columns or diagonals repeat with the stated period; the disc lies where x, y say."""
    images, labels, factors = common.draw_shapes(400, seed=3)
    for image, factor in zip(images[labels == 0].float(), factors[labels == 0], strict=True):
        x, y, radius = 16 + 5 * factor[1], 16 + 5 * factor[2], 0.9 * (10.5 + 2.5 * factor[0])
        period, direction = round((float(factor[7]) + 7) / 2), round(float(factor[8]) + 1)
        rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
        well_inside = torch.hypot(columns - x, rows - y) < radius - 1
        shift = {0: (period, 0), 1: (0, period), 2: (period, 0)}[direction]
        both = well_inside & well_inside.roll(shift, (0, 1))
        assert torch.equal(image[:, both], image.roll(shift, (1, 2))[:, both])
        assert image[:, well_inside].reshape(3, -1).unique(dim=1).shape[1] == 2  # two tones, nothing else


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def noise_image(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ramp(height, width, step=1):
    """An image that knows its coordinates: red = step * column, green = step * row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * step, rows * step, 0 * rows], 2).astype(np.uint8)


def test_cifar10_class_folders(tmp_path):
    """PNG keeps every bit, labels follow the folders' alphabetical order, JPEG is named in the note."""
    for k, name in enumerate(["bird", "airplane", "cat"]):
        for split in ("train", "test"):
            save(tmp_path / "cifar10" / split / name / "b.png", noise_image(k))
    data = common.load_images("cifar10", "train", tmp_path)
    assert data.labels.tolist() == [0, 1, 2] and data.note == "" and data.crop == "none" and data.name == "cifar10"
    for row, k in enumerate([1, 0, 2]):
        assert np.array_equal(data.images[row].permute(1, 2, 0).numpy(), noise_image(k))
    save(tmp_path / "cifar10" / "train" / "cat" / "a.jpg", ramp(32, 32, 4), quality=95)
    data = common.load_images("cifar10", "train", tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 2] and "JPEG" in data.note  # a.jpg sorts before b.png
    assert np.abs(data.images[2].permute(1, 2, 0).numpy().astype(int) - ramp(32, 32, 4)).mean() < 12


def test_held_out_files_come_in_random_order_with_their_labels(tmp_path):
    """Class folders are read class by class; the test split is shuffled, always alike, so that a prefix has all."""
    for k, name in enumerate("abcd"):
        for i in range(8):
            for split in ("train", "test"):
                save(tmp_path / "cifar10" / split / name / f"{i}.png", np.full((32, 32, 3), 10 * k + i, np.uint8))
    train, test, again = (common.load_images("cifar10", split, tmp_path) for split in ("train", "test", "test"))
    assert train.labels.tolist() == sorted(train.labels.tolist()) and len(set(test.labels[:16].tolist())) == 4
    assert torch.equal(test.images[:, 0, 0, 0] // 10, test.labels)
    assert sorted(test.images[:, 0, 0, 0].tolist()) == train.images[:, 0, 0, 0].tolist()
    assert torch.equal(test.images, again.images) and torch.equal(test.labels, again.labels)


def test_cifar10_torchvision_layout(tmp_path, monkeypatch):
    """torchvision's pickled batches, written here; only their checksums are taken out."""
    from torchvision.datasets import CIFAR10
    names = [f"data_batch_{i}" for i in range(1, 6)]
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for i, name in enumerate([*names, "test_batch"]):
        pixels = np.stack([noise_image(10 * i + j).transpose(2, 0, 1).reshape(-1) for j in range(2)])
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i, 9 - i]}))
    train, test = (common.load_images("cifar10", split, tmp_path) for split in ("train", "test"))
    assert train.images.shape == (10, 3, 32, 32) and train.images.dtype == torch.uint8 and train.note == ""
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and test.labels.tolist() == [5, 4]
    assert np.array_equal(train.images[3].permute(1, 2, 0).numpy(), noise_image(11))


@pytest.mark.parametrize("width,height", [(178, 218), (89, 109)])
def test_celeba_crop(tmp_path, width, height):
    """Of an image that knows its coordinates the crop must be the box (15, 40, 163, 188) of 178x218, in proportion."""
    step = 178 // width
    for i in range(10):
        save(tmp_path / "celeba" / "img_align_celeba" / f"{i:06}.png", ramp(height, width, step))
    data = common.load_images("celeba64", "train", tmp_path)
    assert data.images.shape == (9, 3, 64, 64) and data.crop == "celeba-148" and data.labels is None
    assert data.note == ("" if width == 178 else "JPEG copies at 89x109")
    centre = (torch.arange(64) + 0.5) * 148 / 64  # of output pixel j, from the box's edge, in full-size pixels
    red, green = data.images[0, 0].float(), data.images[0, 1].float()
    assert (red - (15 + centre - step / 2)).abs().max() <= 1
    assert (green - (40 + centre - step / 2)[:, None]).abs().max() <= 1


def test_celeba_splits(tmp_path):
    """The partition file decides (0 train, 1 neither, 2 test); without one the last tenth by name is the test split."""
    home = tmp_path / "celeba"
    for i in range(20):
        save(home / "img_align_celeba" / f"{i:06}.png", np.full((218, 178, 3), i, np.uint8))

    def values(split):
        images = common.load_images("celeba64", split, tmp_path).images[:, 0, 0, 0].tolist()
        return sorted(images) if split == "test" else images

    assert values("train") == list(range(18)) and values("test") == [18, 19]
    (home / "list_eval_partition.txt").write_text("".join(f"{i:06}.png {i % 3}\n" for i in range(20)))
    assert values("train") == list(range(0, 20, 3)) and values("test") == list(range(2, 20, 3))


def test_celeba_wrong_shape(tmp_path, capsys):
    """An image that is not an aligned CelebA one is named."""
    for i in range(10):
        save(tmp_path / "celeba" / "img_align_celeba" / f"{i:06}.png", noise_image(i, 100, 178))
    expect_error(capsys, lambda: common.load_images("celeba64", "train", tmp_path), "000000.png", "178x218")


def make_folder(home, count=30):
    for i in range(count):
        save(home / "photos" / f"{i:02}.png", noise_image(i, 40 + i % 3, 40 + i % 5))
    return home / "photos"


def test_folder_of_odd_images(tmp_path, monkeypatch):
    """Any size, mode and orientation, in nested folders: centre square, RGB; the last tenth is the test split."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "photos"
    for i in range(16):
        save(home / "more" / f"{i:02}.png", noise_image(i, 30 + i, 50 - i))
    save(home / "a_wide.png", ramp(64, 128))
    save(home / "b_tall.png", ramp(128, 64))
    save(home / "c_grey.png", np.full((70, 70), 77, np.uint8))
    save(home / "d_clear.png", np.full((64, 64, 4), 200, np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees
    save(home / "e_turned.jpg", ramp(64, 128), exif=turned, quality=100, subsampling=0)
    save(home / ".hidden" / "no.png", noise_image(0))
    (home / "notes.txt").write_text("not an image")
    train, test = (common.load_images("folder", split, home, 64) for split in ("train", "test"))
    assert train.images.shape == (19, 3, 64, 64) and test.images.shape == (2, 3, 64, 64)
    assert train.crop == "centre" and train.name == "photos" and train.labels is None
    column = torch.arange(64.0).expand(64, 64)
    assert torch.equal(train.images[0, 0].float(), column + 32) and torch.equal(train.images[0, 1].float(), column.T)
    assert torch.equal(train.images[1, 0].float(), column) and torch.equal(train.images[1, 1].float(), column.T + 32)
    assert (train.images[2] == 77).all() and (train.images[3] == 200).all()
    assert (train.images[4, 0].float() - column.T - 32).abs().mean() < 2  # red, once along columns, now along rows


def test_sixteen_bits_and_palettes(tmp_path):
    """16-bit grey keeps its upper 8 bits (PIL alone would clip it to white); a palette's colours are looked up."""
    grey = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey é 16.png")  # names with spaces and other letters are names, too
    assert (np.asarray(common.open_image(tmp_path / "grey é 16.png")) == (grey >> 8)[..., None]).all()
    palette = Image.fromarray(ramp(64, 64)).convert("P")
    palette.save(tmp_path / "palette.png")
    found = common.open_image(tmp_path / "palette.png")
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(palette.convert("RGB")))


def test_cache_is_used_and_rebuilt(tmp_path, monkeypatch):
    """A second load decodes nothing; a new, changed or removed file, another size or a damaged cache decodes again."""
    monkeypatch.chdir(tmp_path)
    folder, decode, count = make_folder(tmp_path), common.decode, []
    monkeypatch.setattr(common, "decode", lambda *a: count.append(a) or decode(*a))

    def load(size=32):
        count.clear()
        return common.load_images("folder", "train", folder, size).images, len(count)

    first, decoded = load()
    assert decoded == 27
    again, decoded = load()
    assert decoded == 0 and torch.equal(first, again)
    assert load(64)[1] == 27 and load(32)[1] == 0  # both sizes are kept
    save(folder / "00.png", noise_image(99, 50, 50))
    changed, decoded = load()
    assert decoded == 27 and not torch.equal(first[0], changed[0]) and torch.equal(first[1:], changed[1:])
    (folder / "01.png").unlink()
    assert load()[0].shape[0] == 27 and load()[1] == 0  # 29 files: two for the test split
    (cache,) = (tmp_path / "data" / "cache").glob("photos-train-*-32.npz")
    whole = cache.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not a zip archive", whole[:2000] + bytes(500) + whole[2500:]):
        cache.write_bytes(damage)
        images, decoded = load()
        assert decoded == 27 and torch.equal(images[0], changed[0])
        assert load()[1] == 0


def test_cache_notices_a_file_of_the_same_size(tmp_path, monkeypatch):
    """An uncompressed image edited in place keeps its size in bytes; the cache must not hide the edit."""
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        save(tmp_path / "photos" / f"{i:02}.bmp", np.full((32, 32, 3), i, np.uint8))
    common.load_images("folder", "train", tmp_path / "photos", 32)
    save(tmp_path / "photos" / "00.bmp", np.full((32, 32, 3), 200, np.uint8))
    assert (common.load_images("folder", "train", tmp_path / "photos", 32).images[0] == 200).all()


def test_cache_of_two_folders_of_one_name(tmp_path, monkeypatch):
    """Two folders with the same name, file names and file sizes: each gives its own images."""
    monkeypatch.chdir(tmp_path)
    for home, value in (("one", 10), ("two", 20)):
        for i in range(20):
            save(tmp_path / home / "photos" / f"{i:02}.bmp", np.full((32, 32, 3), value, np.uint8))
    for home, value in (("one", 10), ("two", 20)):
        assert (common.load_images("folder", "train", tmp_path / home / "photos", 32).images == value).all()


@pytest.mark.parametrize("dataset", ["cifar10", "celeba64"])
def test_missing_data_and_no_network(dataset, tmp_path, monkeypatch, capsys):
    """The error names the flag, the folder, the accepted layout and the way out."""
    def offline(*args):
        raise OSError("no network")

    monkeypatch.setattr(common, "download", offline)
    layout = {"cifar10": "cifar10/{train,test}/<class>/*.png", "celeba64": "celeba/img_align_celeba/*.jpg"}[dataset]
    expect_error(capsys, lambda: common.load_images(dataset, "train", tmp_path), f"--dataset {dataset}", str(tmp_path),
                 layout, "--data-dir", "--dataset shapes")


@pytest.mark.parametrize("count", [0, 5, 12, 19])
def test_folder_with_too_few_images(count, tmp_path, monkeypatch, capsys):
    """Empty, or below the 20 that the message asks for: an error in one of the two splits, before any training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    make_folder(tmp_path, count)
    expect_error(capsys, lambda: [common.load_images("folder", s, tmp_path / "photos", 32) for s in ("train", "test")],
                 "--data-dir", "photos", f"{count} images", "20")


def test_missing_folder(tmp_path, capsys):
    expect_error(capsys, lambda: common.load_images("folder", "train", tmp_path / "nowhere", 32), "--data-dir",
                 "nowhere")


@pytest.mark.parametrize("kind", ["truncated.png", "truncated.jpg", "text.png", "empty.jpg"])
@pytest.mark.parametrize("dataset", ["folder", "cifar10", "celeba64"])
def test_bad_image_is_named(dataset, kind, tmp_path, monkeypatch, capsys):
    """A truncated image or a file that is none, first by name among good ones, whatever the data set."""
    monkeypatch.chdir(tmp_path)
    home = {"folder": tmp_path / "photos", "cifar10": tmp_path / "cifar10" / "train" / "a",
            "celeba64": tmp_path / "celeba" / "img_align_celeba"}[dataset]
    for i in range(20):
        save(home / f"z{i:02}.png", noise_image(i, 218, 178))
    whole = io.BytesIO()
    Image.fromarray(noise_image(0, 218, 178)).save(whole, "PNG" if kind.endswith("png") else "JPEG")
    content = {"truncated": whole.getvalue()[: len(whole.getvalue()) // 2], "text": b"hello", "empty": b""}
    (home / kind).write_bytes(content[kind.split(".")[0]])
    folder = home if dataset == "folder" else tmp_path
    expect_error(capsys, lambda: common.load_images(dataset, "train", folder), kind)


# --- Networks --------------------------------------------------------------------------------------------------------


def test_kl_against_torch_distributions():
    gen = common.generator(0)
    mu, logvar = common.randn((5, 7), gen), common.randn((5, 7), gen)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0, 1)).sum(1)
    assert torch.allclose(common.gaussian_kl(mu, logvar), exact, rtol=1e-5)
    assert common.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_cost_of_one_convolution_by_hand():
    """3 -> 8 channels, 3x3, on 10x12: 27 multiply-adds for each of 8 * 120 outputs."""
    with torch.device("meta"):
        cost = common.count_cost(nn.Conv2d(3, 8, 3, padding=1), torch.empty(1, 3, 10, 12))
    assert cost == {"parameters": 3 * 9 * 8 + 8, "gflops": 2 * 27 * 8 * 120 / 1e9}


def test_cost_of_one_attention_by_hand():
    """Width 16, 2 heads, N = 64 positions: qkv and projection 2*N*C*4C, scores and mixture 2*2*N*N*C."""
    with torch.device("meta"):
        cost = common.count_cost(common.Attention(16, 2), torch.empty(1, 16, 8, 8))
    assert cost["parameters"] == 2 * 16 + (16 * 48 + 48) + (16 * 16 + 16)
    assert cost["gflops"] == pytest.approx((2 * 64 * 16 * 64 + 4 * 64 * 64 * 16) / 1e9)


def test_attention_by_hand():
    """Softmax attention written out with einsum, heads apart; the zero-initialised projection is replaced."""
    torch.manual_seed(0)
    layer, x = common.Attention(8, 2), torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x), x)
    nn.init.normal_(layer.out.weight)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 4, 9).unbind(1)
    weights = (torch.einsum("bhcn,bhcm->bhnm", q, k) / 2).softmax(-1)  # / sqrt(C / heads)
    y = torch.einsum("bhnm,bhcm->bhcn", weights, v).reshape(2, 8, 3, 3)
    assert torch.allclose(layer(x), x + layer.out(y), atol=1e-5)


def published(size):
    train = common.budget("paper", "cifar10" if size == 32 else "celeba64", size)[0]
    with torch.device("meta"):
        return (common.VAE(train["encoder"], train["decoder"], train["pool"]),
                common.UNet(train["unet"], 6, attention=train["attention"], heads=train["heads"]))


@pytest.mark.parametrize("size,vae_millions,unet_millions,blocks", [(32, 9.24, 35.75, (25, 28)),
                                                                    (64, 14.01, 78.70, (31, 31))])
def test_published_networks(size, vae_millions, unet_millions, blocks):
    """Parameter and block counts of the paper's networks; attention at 16x16 (2 down, 3 up) and in the middle."""
    vae, unet = published(size)
    for network, millions in ((vae, vae_millions), (unet, unet_millions)):
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    for half, expected in zip((vae.encoder, vae.decoder), blocks, strict=True):
        assert sum(isinstance(m, common.BottleneckBlock) for m in half.modules()) == expected
    seen = []
    for module in unet.modules():
        if isinstance(module, common.Attention):
            module.register_forward_hook(lambda m, inputs, output: seen.append(tuple(inputs[0].shape[2:])))
    out = unet(torch.empty(2, 6, size, size, device="meta"), torch.ones(2, device="meta"))
    assert out.shape == (2, 3, size, size) and sorted(seen) == [(4, 4)] + 5 * [(16, 16)]
    x_hat, mu, logvar = vae(torch.empty(2, 3, size, size, device="meta"), torch.empty(2, 512, device="meta"))
    assert x_hat.shape == (2, 3, size, size) and mu.shape == logvar.shape == (2, 512)


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu", "paper"])
@pytest.mark.parametrize("dataset,size", [("shapes", 32), ("cifar10", 32), ("celeba64", 64), ("folder", 32)])
def test_every_budget_builds_and_is_plain_json(name, dataset, size):
    train, evaluation = common.budget(name, dataset, size)
    assert json.loads(json.dumps(train)) == train and json.loads(json.dumps(evaluation)) == evaluation
    assert train["flip"] == ("none" if dataset == "shapes" else "refiner" if name == "paper" else "both")
    with torch.device("meta"):
        vae = common.VAE(train["encoder"], train["decoder"], train["pool"])
        unet = common.UNet(train["unet"], 6, attention=train["attention"], heads=train["heads"])
        x_hat = vae(torch.empty(2, 3, size, size), torch.empty(2, vae.latent_dim))[0]
        assert x_hat.shape == unet(torch.empty(2, 6, size, size), torch.ones(2)).shape == (2, 3, size, size)


def test_unet_starts_at_zero_and_uses_time_extra_and_every_skip():
    torch.manual_seed(0)
    table = [(16, 8, 2, 3), (8, 16, 2, 3)]
    unet = common.UNet(table, 6, attention=(8,), heads=2)
    x, t = torch.randn(2, 6, 16, 16), torch.tensor([1, 1000])
    assert torch.equal(unet(x, t), torch.zeros(2, 3, 16, 16))
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    out = unet(x, t)
    assert not torch.allclose(out, unet(x, t.flip(0)), atol=1e-4)
    assert not torch.allclose(out, unet(x, t, torch.ones(2, 32)), atol=1e-4)
    assert torch.equal(out, unet(x, t, torch.zeros(2, 32)))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


@pytest.mark.parametrize("name,dataset,size", [("smoke", "shapes", 32), ("smoke", "celeba64", 64),
                                               ("cpu", "shapes", 32), ("cpu", "cifar10", 32), ("cpu", "celeba64", 64)])
def test_reduced_precision_agrees_with_float32(name, dataset, size):
    """Outputs and gradients of the small budgets' networks as they are trained (autocast, channels_last) against
    float32: a few percent. Some fast kernels for bfloat16 are plainly wrong at small widths; where there is no native
    bfloat16 the two are the same."""
    torch.manual_seed(0)
    train, gen = common.budget(name, dataset, size)[0], common.generator(0)
    vae = common.VAE(train["encoder"], train["decoder"], train["pool"]).to(memory_format=torch.channels_last)
    unet = common.UNet(train["unet"], 6, attention=train["attention"], heads=train["heads"])
    nn.init.normal_(unet.to(memory_format=torch.channels_last).out.weight, std=0.1)
    x0 = common.to_float(torch.randint(256, (4, 3, size, size), generator=gen)).contiguous(
        memory_format=torch.channels_last)
    noise, t = common.randn((4, vae.latent_dim), gen), torch.tensor([10, 200, 500, 900])

    def measure(exact):
        vae.zero_grad()
        unet.zero_grad()
        with torch.autocast("cpu", enabled=False) if exact else common.autocast(torch.device("cpu")):
            x_hat, mu, logvar = vae(x0, noise)
            loss = (x_hat - x0).square().sum() + common.gaussian_kl(mu, logvar).sum()
            out = unet(torch.cat([x0, x_hat.detach()], 1), t)
        (loss + (out - x0).square().sum()).backward()
        gradients = [torch.cat([p.grad.flatten() for p in n.parameters() if p.grad is not None])
                     for n in (vae.encoder, vae.decoder, unet)]
        return [mu.detach(), x_hat.detach(), out.detach(), *gradients]

    errors = [float((a - b).norm() / a.norm()) for a, b in zip(measure(True), measure(False), strict=True)]
    assert max(errors[:3]) < 0.03 and max(errors[3:]) < 0.1, errors


def test_ema_warm_up():
    """decay_n = min(decay, (1 + n) / (10 + n)): 2/11, 3/12, 4/13, ... then the plain decay; 0 copies every bit."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema, copy, value = common.EMA(model, 0.3), common.EMA(model, 0.0), 0.0
    for n in range(1, 8):
        nn.init.constant_(model.weight, n / 3)
        ema.update(model)
        copy.update(model)
        decay = [None, 2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3, 0.3][n]  # 4/13 is above 0.3
        value = decay * value + (1 - decay) * n / 3
        assert float(ema.weights["weight"]) == pytest.approx(value, rel=1e-5)
        assert torch.equal(copy.weights["weight"], model.weight)


# --- Diffusion -------------------------------------------------------------------------------------------------------


def test_forward_marginals():
    """Composing x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) e, t = 1..T, gives q(x_t | x0); alpha_bar[0] = 1."""
    diffusion, mean, variance = common.Diffusion(), 1.0, 0.0
    assert float(diffusion.alpha_bar[0]) == 1 and len(diffusion.alpha_bar) == T + 1
    for t in range(1, T + 1):
        beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert float(diffusion.signal[t]) == pytest.approx(mean, rel=1e-5)
        assert float(diffusion.noise[t]) ** 2 == pytest.approx(variance, rel=1e-5)
    gen = common.generator(0)
    for t in (1, 250, 1000):
        x0 = torch.full((50_000, 1, 1, 1), 0.8)
        xt = diffusion.q_sample(x0, torch.full((50_000,), t), common.randn(x0.shape, gen))
        a, s = (float(f) for f in (diffusion.signal[t], diffusion.noise[t]))
        assert float(xt.mean()) == pytest.approx(0.8 * a, abs=4 * s / 50_000**0.5)
        assert float(xt.std()) == pytest.approx(s, rel=0.015)


@pytest.mark.parametrize("t,s", [(1000, 999), (500, 499), (2, 1), (1000, 500), (300, 7), (25, 1)])
def test_posterior_is_bayes(t, s):
    """q(x_s | x_t, x0) ~ q(x_t | x_s) q(x_s | x0), multiplied on a grid of x_s and integrated numerically."""
    diffusion, x0, xt = common.Diffusion(), 0.7, -0.4
    bar_t, bar_s = float(diffusion.alpha_bar[t]), float(diffusion.alpha_bar[s])
    c_x0, c_xt, variance, beta = diffusion.posterior(t, s)
    centre, width = c_x0 * x0 + c_xt * xt, math.sqrt(variance)
    x_s = torch.linspace(centre - 12 * width, centre + 12 * width, 20_001, dtype=torch.float64)
    log_density = (-(xt - math.sqrt(bar_t / bar_s) * x_s) ** 2 / (2 * (1 - bar_t / bar_s))
                   - (x_s - math.sqrt(bar_s) * x0) ** 2 / (2 * (1 - bar_s)))
    weight = log_density.softmax(0)
    mean = float((weight * x_s).sum())
    assert mean == pytest.approx(centre, abs=1e-6 * width)
    assert float((weight * (x_s - mean) ** 2).sum()) == pytest.approx(variance, rel=1e-6)
    assert beta == pytest.approx(1 - bar_t / bar_s)


def test_posterior_of_the_last_step_is_x0():
    c_x0, c_xt, variance, beta = common.Diffusion().posterior(1, 0)
    assert (c_x0, c_xt, variance) == (pytest.approx(1), 0, 0) and beta == pytest.approx(1e-4)


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_predict_inverts_target(objective):
    """From the training target the exact x0 and eps come back; once x0 is clamped, eps still agrees with x_t."""
    diffusion, gen = common.Diffusion(objective), common.generator(0)
    x0, eps = common.randn((6, 3, 4, 4), gen).clamp(-1, 1), common.randn((6, 3, 4, 4), gen)
    t = torch.tensor([1, 2, 50, 300, 700, 1000])
    xt = diffusion.q_sample(x0, t, eps)
    x0_hat, eps_hat = diffusion.predict(diffusion.target(x0, t, eps), xt, t, clamp=False)
    assert torch.allclose(x0_hat, x0, atol=1e-4) and torch.allclose(eps_hat, eps, atol=1e-4)
    x0_hat, eps_hat = diffusion.predict(common.randn(x0.shape, gen) * 5, xt, t)
    assert x0_hat.abs().max() <= 1
    assert torch.allclose(diffusion.q_sample(x0_hat, t, eps_hat), xt, atol=1e-5)


@pytest.mark.parametrize("spacing", ["quadratic", "uniform"])
def test_time_grid(spacing):
    """Strictly increasing from 0 to T for every n in 1..T; the identity at n = T; quadratic is dense near 0."""
    for n in range(1, T + 1):
        grid = common.time_grid(T, n, spacing)
        assert len(grid) == n + 1 and grid[0] == 0 and grid[-1] == T
        assert all(a < b for a, b in zip(grid, grid[1:], strict=False)), n
    assert grid == list(range(T + 1))
    assert common.time_grid(T, 10, spacing)[:3] == ([0, 10, 40] if spacing == "quadratic" else [0, 100, 200])


def oracle(diffusion, x0):
    """A denoiser that knows x0."""
    def denoise(xt, t):
        a, s = diffusion.factors(t)
        return diffusion.target(x0, t, (xt - a * x0) / s)
    return denoise


@pytest.mark.parametrize("spacing", ["quadratic", "uniform"])
@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize("options", SAMPLERS)
def test_oracle_returns_x0(options, objective, spacing):
    """A denoiser that knows x0 leads every sampler to x0 for every number of steps."""
    diffusion, gen = common.Diffusion(objective), common.generator(0)
    x0 = torch.rand(2, 3, 2, 2, generator=gen) * 2 - 1
    for steps in STEPS:
        x = common.sample(diffusion, oracle(diffusion, x0), common.randn(x0.shape, gen), steps=steps, gen=gen,
                          spacing=spacing, **options)
        assert torch.allclose(x, x0, atol=1e-4), steps


@pytest.mark.parametrize("options", SAMPLERS)
def test_every_number_of_steps_works(options):
    """Odd, prime and large counts with a denoiser that is no oracle: as many calls as steps, a finite result in range
    (the last step returns a clamped x0)."""
    diffusion, calls = common.Diffusion("v"), []

    def denoise(x, t):
        calls.append(int(t[0]))
        return torch.sin(3 * x + t[:, None, None, None] / 100)

    gen = common.generator(0)
    for steps in (1, 2, 3, 5, 7, 13, 27, 60, 75, 99, 128, 333, 997):
        calls.clear()
        x = common.sample(diffusion, denoise, common.randn((1, 3, 2, 2), gen), steps=steps, gen=gen, **options)
        assert calls == common.time_grid(T, steps)[:0:-1]
        assert x.shape == (1, 3, 2, 2) and x.abs().max() <= 1.00001


MEAN, SD = 0.2, 0.5


def gaussian_denoiser(diffusion):
    """E[eps | x_t] for data N(MEAN, SD^2): the exact score, up to its factor."""
    def denoise(xt, t):
        a, s = diffusion.factors(t)
        return s / (a**2 * SD**2 + s**2) * (xt - a * MEAN)
    return denoise


def gaussian_result(sampler, steps, **options):
    """Mean and sd of the samples. DDIM (eta 0) and DPM-Solver++ are affine maps of x_T here: two points tell all."""
    diffusion, gen = common.Diffusion(), common.generator(0)
    noisy = sampler == "ddpm" or options.get("eta")
    x_T = common.randn((100_000, 1, 1, 1), gen) if noisy else torch.tensor([0.0, 1.0])[:, None, None, None]
    x = common.sample(diffusion, gaussian_denoiser(diffusion), x_T, sampler, steps, gen, clamp=False, **options)
    return (float(x.mean()), float(x.std())) if noisy else (float(x[0]), float(x[1] - x[0]))


@pytest.mark.parametrize("options", SAMPLERS)
def test_exact_score_gives_the_gaussian(options):
    """With the exact score of N(0.2, 0.5^2), no clamp and 1000 steps: mean within 0.01, sd within 2%."""
    mean, sd = gaussian_result(steps=T, **options)
    assert mean == pytest.approx(MEAN, abs=0.01) and sd == pytest.approx(SD, rel=0.02)


def test_samplers_improve_in_their_order():
    """Halving the steps' size halves DDIM's error (first order) and quarters DPM-Solver++'s (second order);
    at equal steps DPM-Solver++ beats DDIM, and DDIM beats respaced DDPM."""
    error = {(s, n): abs(gaussian_result(s, n)[1] / SD - 1) for s in ("ddim", "dpm") for n in (10, 20, 40, 80)}
    for n in (10, 20, 40):
        assert 1.6 < error["ddim", n] / error["ddim", 2 * n] < 2.4
        assert error["dpm", n] < 0.5 * error["ddim", n]
    for n in (20, 40):
        assert 3 < error["dpm", n] / error["dpm", 2 * n] < 7
    ddpm = [abs(gaussian_result("ddpm", n)[1] / SD - 1) for n in (10, 20, 40)]
    assert ddpm[0] > ddpm[1] > ddpm[2] and all(e > error["ddim", n] for e, n in zip(ddpm, (10, 20, 40), strict=True))


def test_ddim_eta_1_is_ddpm_fixedsmall():
    """Same noise, all T steps: the two updates are one. (`sample` takes fixedlarge there: the loop is written out.)
    Respaced, `sample` itself takes fixedsmall."""
    diffusion, gen = common.Diffusion(), common.generator(0)
    x_T, denoise = common.randn((4, 1, 2, 2), gen), gaussian_denoiser(diffusion)
    x, noise = x_T, common.generator(1)
    for t in range(T, 0, -1):
        times = torch.full((4,), t)
        x0, _ = diffusion.predict(denoise(x, times), x, times)
        x = common.ddpm_step(diffusion, x, x0, t, t - 1, "fixedsmall", noise)
    assert torch.allclose(x, common.sample(diffusion, denoise, x_T, "ddim", T, common.generator(1), eta=1.0), atol=1e-4)
    for steps in (7, 50):
        ddpm = common.sample(diffusion, denoise, x_T, "ddpm", steps, common.generator(1))
        ddim = common.sample(diffusion, denoise, x_T, "ddim", steps, common.generator(1), eta=1.0)
        assert torch.allclose(ddpm, ddim, atol=1e-5)


def test_ddim_eta_scales_the_sd():
    """DDIM eq. 16: sigma = eta sqrt(beta_tilde); mean and noise together keep the marginal at s, whatever eta."""
    diffusion, zero, t, s = common.Diffusion(), torch.zeros(100_000, 1, 1, 1), 400, 300
    eps = common.randn(zero.shape, common.generator(0))
    for eta in (0.3, 0.7):
        step = common.ddim_step(diffusion, zero, zero, t, s, eta, common.generator(1))
        assert float(step.std()) == pytest.approx(eta * diffusion.posterior(t, s)[2] ** 0.5, rel=0.01)
        step = common.ddim_step(diffusion, zero, eps, t, s, eta, common.generator(1))
        assert float(step.std()) == pytest.approx(float(diffusion.noise[s]), rel=0.01)


def test_full_ddpm_takes_fixedlarge():
    """Noise variance of one ancestral step at full T is beta_t, respaced beta_tilde: measured over many draws."""
    diffusion, x = common.Diffusion(), torch.zeros(100_000, 1, 1, 1)
    _, _, small, large = diffusion.posterior(3, 1)
    for variance, expected in (("fixedsmall", small), ("fixedlarge", large)):
        step = common.ddpm_step(diffusion, x, x, 3, 1, variance, common.generator(0))
        assert float(step.var()) == pytest.approx(expected, rel=0.02)
    seen = []
    original, common_step = common.ddpm_step, lambda *a: seen.append(a[5]) or original(*a)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "ddpm_step", common_step)
        for steps in (10, T):
            common.sample(diffusion, gaussian_denoiser(diffusion), x[:1], "ddpm", steps, common.generator(0))
    assert seen == 10 * ["fixedsmall"] + T * ["fixedlarge"]


def test_last_step_is_deterministic():
    """At s = 0 no sampler needs a generator, and each returns x0 itself."""
    diffusion, x, x0 = common.Diffusion(), torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    for t in (1, 40, 1000):
        for variance in ("fixedsmall", "fixedlarge"):
            assert torch.allclose(common.ddpm_step(diffusion, x, x0, t, 0, variance, None), x0, atol=1e-6)
        assert torch.allclose(common.ddim_step(diffusion, x0, x, t, 0, 1.0, None), x0)
        assert torch.allclose(common.dpm_step(diffusion, x, x0, x + 1, 1.0, t, 0), x0)


def test_dpm_step_is_the_published_formula():
    """DPM-Solver++(2M): x_s = sigma_s/sigma_t x - alpha_s (exp(-h) - 1) D with h = lambda_s - lambda_t,
    D = (1 + 1/2r) x0 - 1/2r x0_before."""
    diffusion, (t, s, before) = common.Diffusion(), (300, 200, 450)
    gen = common.generator(0)
    x, x0, x0_before = (common.randn((2, 3, 2, 2), gen).double() for _ in range(3))
    alpha, sigma = diffusion.alpha_bar.sqrt(), (1 - diffusion.alpha_bar).sqrt()
    lam = (alpha / sigma).log()
    h = lam[s] - lam[t]
    r = (lam[t] - lam[before]) / h
    d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
    expected = sigma[s] / sigma[t] * x - alpha[s] * (torch.exp(-h) - 1) * d
    assert torch.allclose(common.dpm_step(diffusion, x, x0, x0_before, float(r), t, s), expected)


@pytest.mark.parametrize("mean", [-1.0, -0.993, -0.3, 0.0, 0.0039, 0.98, 1.0, 1.3])
@pytest.mark.parametrize("sd", [0.003, 0.0074, 0.1, 1.0])
def test_discretised_likelihood_sums_to_one(mean, sd):
    """Over the 256 values, whatever the mean (at and beyond the edges too) and the sd."""
    values = common.to_float(torch.arange(256, dtype=torch.uint8))[:, None]  # 256 images of one pixel
    total = common.discretised_log_likelihood(values, torch.full((256, 1), mean), sd).exp().sum()
    assert float(total) == pytest.approx(1, abs=2e-5)  # float32 pixel values leave gaps of 1e-8 between the bins


def test_discretised_likelihood_of_one_value():
    """128 is at x = 1/255: with mean there, the bin is +-1/255 wide: erf(1/255 / (sd sqrt 2)). Sums over pixels."""
    x0 = common.to_float(torch.full((2, 3, 2, 2), 128, dtype=torch.uint8))
    log_p = common.discretised_log_likelihood(x0, x0, 0.01)
    assert log_p.shape == (2,)
    assert float(log_p[0]) == pytest.approx(12 * math.log(math.erf(1 / 255 / (0.01 * 2**0.5))), rel=1e-4)


def betas():
    """beta_t and beta_tilde_t for t = 2..T, from the schedule's definition."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    return beta[1:], beta[1:] * (1 - bar[:-1]) / (1 - bar[1:]), bar


@pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge"])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_diffusion_nats_of_a_known_case(variance, offset):
    """A denoiser whose x0 is off by `offset` everywhere: every part has a closed form. With the oracle (offset 0) and
    fixedsmall the diffusion part is 0; with fixedlarge it is D/2 sum(log(b/bt) + bt/b - 1)."""
    diffusion, gen = common.Diffusion("v"), common.generator(0)
    images = torch.randint(1, 200, (2, 3, 2, 2), generator=gen).to(torch.uint8)
    x0 = common.to_float(images)
    parts = common.diffusion_nats(diffusion, oracle(diffusion, x0 + offset), images, T - 1, gen, variance)
    beta, small, bar = betas()
    model = small if variance == "fixedsmall" else beta
    c_x0 = bar[:-1].sqrt() * beta / (1 - bar[1:])
    exact = 12 * (0.5 * ((model / small).log() + small / model - 1) + c_x0**2 * offset**2 / (2 * model)).sum()
    assert torch.allclose(parts["diffusion"].double(), exact.expand(2), rtol=3e-4, atol=1e-3)
    sd = float(small[0].sqrt())  # both variances take beta_tilde_2 at t = 1
    cdf = torch.distributions.Normal(0, sd).cdf
    bin_mass = cdf(torch.tensor(1 / 255 - offset).double()) - cdf(torch.tensor(-1 / 255 - offset).double())
    assert torch.allclose(parts["data"].double(), -12 * bin_mass.clamp(min=1e-12).log().expand(2), rtol=1e-3)
    normal = torch.distributions.Normal
    q_T = normal(bar[-1].sqrt() * x0.double(), (1 - bar[-1]).sqrt())
    prior = torch.distributions.kl_divergence(q_T, normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(parts["prior"].double(), prior, rtol=1e-2)
    assert all(part.shape == (2,) for part in parts.values())


def test_diffusion_nats_takes_each_time_once():
    """draws = T - 1: every image meets each t in 2..T once, then t = 1 for the data part; 40 draws: one per stratum."""
    diffusion, seen, images = common.Diffusion(), [], torch.zeros(3, 3, 2, 2, dtype=torch.uint8)

    def denoise(x, t):
        seen.append(t)
        return x

    common.diffusion_nats(diffusion, denoise, images, T - 1, common.generator(0))
    times = torch.stack(seen)  # (T, 3)
    assert (times[-1] == 1).all()
    assert torch.equal(times[:-1].sort(0).values, torch.arange(2, T + 1)[:, None].expand(T - 1, 3))
    seen.clear()
    common.diffusion_nats(diffusion, denoise, images, 40, common.generator(0))
    for k, t in enumerate(seen[:-1]):
        assert k * (T - 1) // 40 <= (t - 2).min() and (t - 2).max() <= (k + 1) * (T - 1) // 40


# --- Gaussian mixture ------------------------------------------------------------------------------------------------


def known_mixture():
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-2.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    covariances = torch.tensor([[[1.0, 0.6], [0.6, 0.8]], [[0.5, -0.2], [-0.2, 1.2]]], dtype=torch.float64)
    return common.GaussianMixture(weights, means, torch.linalg.cholesky(covariances))


def test_gmm_density_against_torch_distributions():
    gmm, z = known_mixture(), common.randn((50, 2), common.generator(0)).double() * 3
    components = torch.distributions.MultivariateNormal(gmm.means, scale_tril=gmm.factors)
    exact = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(gmm.weights), components)
    assert torch.allclose(gmm.log_prob(z), exact.log_prob(z), rtol=1e-10)


def test_gmm_recovers_a_known_mixture():
    """From 8000 draws: weights, means and covariances within 4 standard errors or so, and the true log-likelihood."""
    true, gen = known_mixture(), common.generator(0)
    fit = common.GaussianMixture.fit(true.sample(8000, gen), 2, seed=0)
    order = fit.means[:, 0].argsort()
    assert torch.allclose(fit.weights[order], true.weights, atol=0.02)
    assert torch.allclose(fit.means[order], true.means, atol=0.08)
    covariance = fit.factors @ fit.factors.mT
    assert torch.allclose(covariance[order], true.factors @ true.factors.mT, atol=0.1)
    held_out = true.sample(8000, gen)
    assert float(fit.log_prob(held_out).mean()) == pytest.approx(float(true.log_prob(held_out).mean()), abs=0.01)
    again = common.GaussianMixture.fit(true.sample(8000, common.generator(0)), 2, seed=0)
    assert torch.equal(again.means, fit.means) and torch.equal(again.factors, fit.factors)


def test_gmm_draws_have_its_moments_and_are_shuffled():
    """Mean and covariance of the mixture in closed form; neighbours share a component as often as chance (0.58)."""
    gmm = known_mixture()
    z = gmm.sample(20_000, common.generator(0)).double()
    mean = gmm.weights @ gmm.means
    covariance = ((gmm.weights[:, None, None] * (gmm.factors @ gmm.factors.mT)).sum(0)
                  + (gmm.weights[:, None] * (gmm.means - mean)).T @ (gmm.means - mean))
    assert torch.allclose(z.mean(0), mean, atol=0.06) and torch.allclose(z.T.cov(), covariance, atol=0.12)
    component = gmm.log_joint(z).argmax(1)
    assert float((component[1:] == component[:-1]).double().mean()) == pytest.approx(0.58, abs=0.02)


@pytest.mark.parametrize("count,components", [(18, 30), (40, 2)])
def test_gmm_of_few_points_stays_finite(count, components):
    """Fewer points than components, and repeated points: the ridge keeps every covariance regular."""
    z = common.randn((count, 4), common.generator(0))
    z[: count // 2] = z[0]
    gmm = common.GaussianMixture.fit(z, components, seed=0)
    assert gmm.log_prob(z).isfinite().all() and gmm.sample(50, common.generator(0)).isfinite().all()


# --- Budgets and runs ------------------------------------------------------------------------------------------------


def test_learning_rate_end_points():
    rate = lambda step, **k: common.learning_rate(2.0, step, **({"steps": 100, "warmup": 0.1, "decay": True} | k))  # noqa: E731
    assert rate(0) == pytest.approx(0.2) and rate(9) == 2.0 and rate(10) == 2.0  # a tenth of the steps to warm up
    assert rate(55) == pytest.approx(1.0) and rate(99) == pytest.approx(2 / 90) and rate(100) == 0
    assert rate(99, decay=False) == 2.0 and rate(0, warmup=20) == pytest.approx(0.1) and rate(19, warmup=20) == 2.0
    assert rate(0, steps=1) == 2.0 and all(0 < rate(s, steps=n) <= 2 for n in range(1, 9) for s in range(n))


@pytest.mark.parametrize("flag,value", [("--steps", "0"), ("--steps", "-5"), ("--batch-size", "0"),
                                        ("--sample-steps", "0"), ("--sample-steps", "1001"), ("--seed", "-1"),
                                        ("--eval-samples", "1"), ("--eval-samples", "0")])
def test_numbers_out_of_range(flag, value, capsys, tmp_path):
    expect_error(capsys, lambda: settings(flag, value, "--out", str(tmp_path)), f"{flag} {value}", "between")


@pytest.mark.parametrize("argv", [["--dataset", "imagenet"], ["--budget", "huge"], ["--sampler", "euler"],
                                  ["--features", "clip"], ["--image-size", "48"], ["--steps", "many"],
                                  ["--no-such-flag"]])
def test_unknown_choice(argv, capsys):
    """argparse's refusals, too, are one line with status 2 that names the flag."""
    expect_error(capsys, lambda: settings(*argv), argv[0])


@pytest.mark.parametrize("below", ["", "/runs"])
def test_output_folder_that_cannot_be_written(below, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    expect_error(capsys, lambda: settings("--out", f"{tmp_path}/file{below}"), "--out", "file", "another folder")


def test_flags_replace_the_budget(tmp_path):
    train, evaluation, device = settings("--budget", "smoke", "--steps", "5", "--batch-size", "3", "--seed", "7",
                                         "--sampler", "ddim", "--sample-steps", "9", "--eval-samples", "50",
                                         "--device", "cpu", "--out", str(tmp_path / "new" / "runs"))
    assert (train["steps"], train["batch"], train["seed"]) == (5, 3, 7) and device.type == "cpu"
    assert (evaluation["sampler"], evaluation["sample_steps"], evaluation["count"]) == ("ddim", 9, 50)
    assert evaluation["features"] == "local" and not any((tmp_path / "new" / "runs").iterdir())


def test_checkpoint_round_trip_and_damage(tmp_path, capsys):
    """What is saved comes back; truncated, empty, foreign, absent files: one line that names the file."""
    path = tmp_path / "checkpoint.pt"
    state = {"train": {"seed": 0}, "finished": True, "weights": {"w": torch.arange(3.0)}, "rng": torch.get_rng_state()}
    common.save_checkpoint(path, state)
    loaded = common.load_checkpoint(path)
    assert loaded["train"] == {"seed": 0} and torch.equal(loaded["weights"]["w"], torch.arange(3.0))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-30], b"", b"garbage"):
        path.write_bytes(damaged)
        expect_error(capsys, lambda: common.load_checkpoint(path), "checkpoint.pt", "remove")
    torch.save({"other": 1}, path)
    expect_error(capsys, lambda: common.load_checkpoint(path), "checkpoint.pt")
    torch.save([1, 2], path)
    expect_error(capsys, lambda: common.load_checkpoint(path), "checkpoint.pt")
    expect_error(capsys, lambda: common.load_checkpoint(tmp_path / "none.pt"), "none.pt")


def test_no_room_for_a_checkpoint(tmp_path, capsys):
    """A write that the system cuts short (here: a limit on the size of files) is one clear line, and the last good
    checkpoint is still there, alone."""
    path, limits = tmp_path / "checkpoint.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    common.save_checkpoint(path, {"train": {}, "finished": False, "step": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        big = {"train": {}, "finished": False, "step": 2, "weights": torch.zeros(10_000)}
        expect_error(capsys, lambda: common.save_checkpoint(path, big), "checkpoint.pt", "free some space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert common.load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_a_flipped_bit_is_found(tmp_path, capsys):
    """Wherever one bit of a checkpoint is wrong, either the file is refused or every value is still right."""
    path, rng, refused = tmp_path / "checkpoint.pt", random.Random(0), 0
    state = {"train": {}, "finished": True, "weights": {"w": common.randn((50, 50), common.generator(0))}}
    common.save_checkpoint(path, state)
    whole = path.read_bytes()
    for _ in range(60):
        damaged, where = bytearray(whole), rng.randrange(len(whole))
        damaged[where] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert torch.equal(common.load_checkpoint(path)["weights"]["w"], state["weights"]["w"])
        except SystemExit:
            refused += 1
    assert refused > 40 and "checksum" in capsys.readouterr().err


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_checkpoint_cannot_run_code(tmp_path, capsys):
    """A pickle that would create a file when loaded is refused, and does not."""
    torch.save({"train": {}, "finished": True, "x": Malicious(tmp_path / "made")}, tmp_path / "checkpoint.pt")
    expect_error(capsys, lambda: common.load_checkpoint(tmp_path / "checkpoint.pt"), "checkpoint.pt")
    assert not (tmp_path / "made").exists()


def test_open_run_decides(tmp_path, capsys):
    """New: None. Finished: reused. Unfinished: needs --resume. Other settings: named. Damaged: named."""
    train, folder = {"steps": 8, "seed": 0, "unet": [[32, 8, 1, 1]]}, tmp_path / "run"
    assert common.open_run(folder, train, False) is None
    assert json.loads((folder / "config.json").read_text())["train"] == train
    expect_error(capsys, lambda: common.open_run(folder, train, False), "run", "--resume")  # begun, no checkpoint yet
    assert common.open_run(folder, train, True) is None
    common.save_checkpoint(folder / "checkpoint.pt", {"train": train, "finished": False, "step": 3})
    expect_error(capsys, lambda: common.open_run(folder, train, False), "--resume")
    assert common.open_run(folder, train, True)["step"] == 3
    for resume in (False, True):
        expect_error(capsys, lambda r=resume: common.open_run(folder, train | {"steps": 9}, r), "steps was 8, is now 9")
    common.save_checkpoint(folder / "checkpoint.pt", {"train": train, "finished": True, "step": 8})
    assert common.open_run(folder, train, False)["finished"]
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    expect_error(capsys, lambda: common.open_run(folder, train, True), "checkpoint.pt")
    for text in ("{", "{}", "null", "[]", '{"train": 3}'):
        (folder / "config.json").write_text(text)
        expect_error(capsys, lambda: common.open_run(folder, train, True), "config.json")


def test_two_runs_in_one_folder(tmp_path, capsys):
    """The second process refuses while the first lives; what it left when killed locks nobody out."""
    code = f"import sys; sys.path.insert(0, '{common.fid.FEATURES_DIR.parents[1]}'); import common, pathlib; " \
           f"common.lock(pathlib.Path('{tmp_path}/run')); print('locked', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(SystemExit) as stop:
        common.open_run(tmp_path / "run", {"steps": 1}, False)
    assert stop.value.code == 2 and "in use by another process" in capsys.readouterr().err
    common.HELD.clear()
    other.kill()
    other.wait()
    assert common.open_run(tmp_path / "run", {"steps": 1}, False) is None


def test_log_is_cut_back_on_resume(tmp_path):
    """Rows after the checkpoint's step go, the others stay as they are; step 0 empties."""
    path = tmp_path / "log.csv"
    common.start_log(path, 0)
    for step in (4, 8, 12):
        common.append_log(path, {"step": step, "sse": step / 3})
    common.start_log(path, 9)
    assert common.read_log(path) == {"step": [4, 8], "sse": [4 / 3, 8 / 3]}
    common.append_log(path, {"step": 12, "sse": 1.0})
    assert common.read_log(path)["step"] == [4, 8, 12] and path.read_text().count("step") == 1
    common.start_log(path, 0)
    assert path.read_text() == ""


def test_stop_request_remembers_and_restores():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with common.StopRequest() as stop:
        assert stop.signal == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def good_metrics(suffix="_local", features="local-shapes-01234567"):
    score = {"value": 1.0, "low": 0.5, "high": None}
    run = dict.fromkeys(common.RUN_KEYS, 0) | {"features": features}
    names = [f"{s}_local" if suffix else {"fd": "fid"}.get(s, s) for s in common.SCORES] + ["hf_energy"]
    row = dict.fromkeys(common.ROW_KEYS, 0) | {name: dict(score) for name in names}
    return {"schema": 1, "run": run, "rows": [row], "tables": {}}


def test_check_metrics_accepts_good_ones(tmp_path):
    for metrics in (good_metrics(), good_metrics("", "inception-6726825d")):
        common.write_metrics(tmp_path / "metrics.json", metrics)
        assert common.read_metrics(tmp_path / "metrics.json") == metrics


BREAKS = {
    "schema": lambda m: m.update(schema=2), "no schema": lambda m: m.pop("schema"), "no run": lambda m: m.pop("run"),
    "run lacks a key": lambda m: m["run"].pop("commit"), "no rows": lambda m: m.pop("rows"),
    "empty rows": lambda m: m.update(rows=[]), "row lacks a key": lambda m: m["rows"][0].pop("nfe"),
    "no fd": lambda m: m["rows"][0].pop("fd_local"), "no hf_energy": lambda m: m["rows"][0].pop("hf_energy"),
    "FID with local features": lambda m: m["rows"][0].update(fid=m["rows"][0].pop("fd_local")),
    "bare number": lambda m: m["rows"][0].update(fd_local=1.0),
    "no interval": lambda m: m["rows"][0]["fd_local"].pop("low"),
    "NaN": lambda m: m["rows"][0]["fd_local"].update(value=math.nan),
    "text": lambda m: m["rows"][0]["fd_local"].update(value="1.0"),
    "NaN bound": lambda m: m["rows"][0]["fd_local"].update(low=math.nan),
    "no tables": lambda m: m.pop("tables"), "tables a list": lambda m: m.update(tables=[]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_check_metrics_rejects_broken_ones(name, tmp_path):
    """ValueError, as its docstring says; and write_metrics leaves no file."""
    metrics = good_metrics()
    BREAKS[name](metrics)
    with pytest.raises(ValueError, match="metrics: "):
        common.write_metrics(tmp_path / "metrics.json", metrics)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"schema": 1}', '{"schema": 1, "run": 3}'])
def test_read_metrics_takes_damaged_ones_for_none(text, tmp_path):
    (tmp_path / "metrics.json").write_text(text)
    assert common.read_metrics(tmp_path / "metrics.json") is None
    assert common.read_metrics(tmp_path / "absent.json") is None


def test_run_facts_fit_the_schema():
    data = SimpleNamespace(name="shapes", crop="none", note="", images=[0] * 12)
    train = {"budget": "smoke", "seed": 3, "residual_sd": 0.2}
    facts = common.run_facts(train, {}, data, torch.device("cpu"), "stage1-form1")
    later = {"features", "parameters", "gflops", "train_images", "train_seconds"}
    assert set(facts) == common.RUN_KEYS - later | {"residual_sd"}
    assert facts["stage"] == "stage1" and facts["n_real"] == 12


# --- Pictures --------------------------------------------------------------------------------------------------------


def test_hf_energy_of_real_is_one_and_blur_lowers_it():
    """Real against itself: 1 by definition; a 3x3 mean takes most high frequencies; noise adds them."""
    real = common.draw_shapes(300, seed=5)[0]
    score = common.hf_energy(real, real)
    assert score["value"] == pytest.approx(1, abs=1e-4) and score["low"] < 1 < score["high"]
    blurred = torch.nn.functional.avg_pool2d(real.float(), 3, 1, 1).round().to(torch.uint8)
    noisy = (real.float() + 20 * torch.randn(real.shape, generator=common.generator(0))).clamp(0, 255).to(torch.uint8)
    assert common.hf_energy(blurred, real)["value"] < 0.5 and common.hf_energy(noisy, real)["value"] > 1.1


def test_high_frequency_power_knows_its_band():
    """A grating below 1/4 cycle per pixel has next to none, one above it has plenty; brightness does not count."""
    columns = torch.arange(64.0)
    low, high = (127 + 60 * torch.sin(2 * math.pi * f * columns) for f in (1 / 8, 3 / 8))
    images = torch.stack([low, high, high - 50]).round()[:, None, None, :].expand(3, 3, 64, 64).to(torch.uint8)
    power = common.high_frequency_power(images)
    assert power[1] > 1000 * power[0] and float(power[2]) == pytest.approx(float(power[1]), rel=1e-2)


def test_ranked_by_distance_to_the_nearest_real_image(tmp_path, monkeypatch):
    """Twelve worst first; the best are those that lie on a real image's features."""
    images = torch.arange(40, dtype=torch.uint8)[torch.randperm(40)][:, None, None, None].expand(40, 3, 8, 8)
    monkeypatch.setattr(common.fid, "extract", lambda extractor, x: (x[:, 0, 0, :1].double(), None))
    rows, real = [], SimpleNamespace(features=torch.tensor([[0.0], [100.0]]))
    monkeypatch.setattr(common, "save_grid", lambda path, images, labels: rows.extend(images))
    common.draw_ranked(tmp_path, images, None, real)
    levels = [row[:, 0, 0, 0].tolist() for row in rows]
    assert levels == [list(range(39, 27, -1)), list(range(25, 13, -1)), list(range(11, -1, -1))]


def test_pictures(tmp_path, capsys):
    """The grid has one tile per image, in order; the chart is a picture; the table prints every cell."""
    rows = [torch.full((3, 3, 32, 32), value, dtype=torch.uint8) for value in (10, 250)]
    common.save_grid(tmp_path / "grid.png", rows, ["a", "bb"])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 98, 16 + 3 * 98, 3)
    assert (grid[48, 16 + 48 :: 98] == 10).all() and (grid[98 + 48, 16 + 48 :: 98] == 250).all()
    panel = {"title": "t", "x": "x", "y": "y", "lines": {"a": ([1, 2], [3, 4])}, "log": "log", "level": {"exact": 3.5}}
    common.save_chart(tmp_path / "chart.png", [panel, panel])
    assert Image.open(tmp_path / "chart.png").size[0] > 500
    common.print_table([{"a": {"value": 1.0, "low": 0.5, "high": 2.0}, "b": 3}, {"a": 0.25, "b": "x"}], ["a", "b"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["a", "b"], ["1", "[0.5,", "2]", "3"], ["0.25", "x"]]
