"""common.py against closed forms, oracles and small files built here. Every test can fail; none needs the network."""

import ast
import colorsys
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import shutil
import struct
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, draw_all, expect_error, flags, oracle, plant_wrong_bfloat16, same, settings
from PIL import Image
from scipy.cluster.vq import kmeans2
from torch import nn

import common
import fid

T = 1000
SAMPLERS = ("ddpm", "ddim", "dpm")
FAST_BFLOAT16 = common.fast_bfloat16  # in the tests, another function takes its place (conftest.py)
Normal, kl_divergence = torch.distributions.Normal, torch.distributions.kl_divergence


# ---- Small things ----------------------------------------------------------------------------------------------------

def test_uint8_round_trip_is_the_identity_and_rounds():
    """0.4 of a level is rounded down and 0.6 up. (Truncation would round both down.) Values out of range are
    clamped."""
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(u)), u)
    assert common.to_uint8(common.to_float(torch.tensor([100.4, 100.6, -20, 300]))).tolist() == [100, 101, 0, 255]
    assert common.to_float(u).min() == -1 and common.to_float(u).max() == 1


def test_common_is_the_ground():
    """common.py imports nothing of the project, and fid.py only common.py."""
    project = {path.stem for path in Path(common.__file__).parent.glob("*.py")}
    for module, expected in ((common, set()), (fid, {"common"})):
        nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text())))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert imported & project == expected and "torch" in imported


def test_devices(monkeypatch, capsys):
    """The error names a device that no machine has, or that this one lacks. `auto` takes what there is. If this torch
    cannot use the GPU, one line says so and it takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda:99", "gpu", "cuda:x", "cpu:", "", "meta", "hpu"):
        expect_error(capsys, lambda name=name: common.choose_device(name), f"--device {name}", "auto")
    assert common.choose_device("cpu") == common.choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fail(*arguments, **options):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", fail)
    capsys.readouterr()
    assert common.choose_device("auto") == CPU
    assert capsys.readouterr().err == "the device cuda does not work with this torch; the CPU is used\n"


def test_devices_of_several_processes(monkeypatch, capsys):
    """Each process has the GPU of its own number, so none can be named. `auto` takes mps for a single process only."""
    tried, current = [], []
    monkeypatch.setattr(torch, "ones", lambda count, device: tried.append(device) or torch.zeros(count))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    common.choose_device("auto")
    monkeypatch.setattr(common, "RANKS", 2)
    assert common.choose_device("auto") == CPU and tried == ["mps", "cpu"]
    for name in ("mps", "cuda:3"):
        expect_error(capsys, lambda name=name: common.choose_device(name), f"--device {name}", "several processes",
                     "need cpu, or cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.choose_device("auto") == common.choose_device("cuda") == torch.device("cuda:1")
    assert current == 2 * [torch.device("cuda:1")]
    monkeypatch.delenv("LOCAL_RANK")
    expect_error(capsys, lambda: common.choose_device("cuda"), "LOCAL_RANK", "torchrun")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def no_such_gpu(count, device):
        raise RuntimeError

    monkeypatch.setattr(torch, "ones", no_such_gpu)
    expect_error(capsys, lambda: common.choose_device("auto"), "cuda:1 cannot be used", "each of the 2 processes")


def test_messages_between_processes(monkeypatch):
    """The second of two processes gets the first one's value, and batches that were shared come back in order."""
    assert common.from_first("mine") == "mine" and common.gather([1, 2]) == [1, 2]
    monkeypatch.setattr(common, "RANKS", 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda values: values.__setitem__(0, "the first's"))
    assert common.from_first("mine") == "the first's"
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda of_each, parts: of_each.__setitem__(
        slice(None), [[0, 2, 4], parts]))
    assert common.gather([1, 3]) == [0, 1, 2, 3, 4]


# ---- Reduced precision -----------------------------------------------------------------------------------------------

def test_patch_convolutions_on_mps(monkeypatch):
    """There they are torch's own, with the same weights."""
    for ours, theirs in ((common.PatchConv2d, nn.Conv2d), (common.PatchConvTranspose2d, nn.ConvTranspose2d)):
        monkeypatch.setattr(theirs, "forward", lambda layer, x: "torch's")
        layer = ours(3, 4, 2, stride=2, bias=False)
        assert layer(SimpleNamespace(device=torch.device("mps"))) == "torch's"
        assert layer(torch.ones(1, 3, 2, 2)).shape[1] == 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_patch_convolutions_are_torchs(k, layout):
    """Names, shapes and initial draws of the weights, outputs and gradients are those of nn.Conv2d (with a bias and
    without) and nn.ConvTranspose2d in float32. In bfloat16 they are within rounding of float32."""
    gen = common.generator(0)
    for ours, theirs, shape, bias in ((common.PatchConv2d, nn.Conv2d, (2, 6, 2 * k, 3 * k), False),
                                      (common.PatchConv2d, nn.Conv2d, (2, 6, 2 * k, 3 * k), True),
                                      (common.PatchConvTranspose2d, nn.ConvTranspose2d, (2, 6, 2, 3), False)):
        layers = []
        for kind in (ours, theirs):
            torch.manual_seed(0)
            layers.append(kind(6, 10, k, stride=k, bias=bias).to(memory_format=layout))
        assert same(layers[0].state_dict(), layers[1].state_dict())
        x, found = common.randn(shape, gen).contiguous(memory_format=layout), []
        for layer, reduced in ((layers[1], False), (layers[0], False), (layers[0], True)):
            layer.zero_grad()
            values = x.clone().requires_grad_()
            with common.autocast(CPU, reduced):
                y = layer(values)
            assert y.dtype == (torch.bfloat16 if reduced else torch.float32)
            (y.float() ** 3).sum().backward()
            found.append([y.detach(), values.grad, *(p.grad for p in layer.parameters())])
        assert all(a.shape == b.shape for a, b in zip(*found[:2], strict=True))
        assert common.relative_errors(*found[:2]).max() < 1e-6
        assert common.relative_errors(found[0], found[2]).max() < 0.02


def test_errors_that_rounding_explains(capsys):
    """|exact - reduced| / |exact| by hand. Up to the limit an error is rounding. Above it, one line says which model
    uses float32."""
    exact = [torch.tensor([3.0, 4.0]), torch.ones(2, 2)]
    errors = common.relative_errors(exact, [torch.tensor([3.0, 4.5]).bfloat16(), torch.ones(2, 2)])
    assert errors.tolist() == [pytest.approx(0.1), 0]
    not_finite = [torch.tensor([1.0, math.inf])]  # in float32, too
    assert common.rounding_explains(common.relative_errors(not_finite, not_finite), "form1")
    assert common.rounding_explains(torch.tensor([0.01, 0.28]), "form1")
    assert not common.rounding_explains(torch.tensor([0.32, 0.01]), "form1")
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("form1: ") and "32%" in line and "float32 is used instead" in line


@pytest.mark.parametrize("has,ratio,fast", [(True, 0.6, True), (True, 1.6, False), (False, 0.6, False)])
def test_bfloat16_is_used_where_it_is_faster(has, ratio, fast, monkeypatch, capsys):
    """A processor that has it but computes slower in it uses float32, and one line says so, once. What is timed is a
    convolution with its gradients, in each precision. Other work that slows some turns does not count."""
    clock, begun, dtypes, right = [0.0], [False], [], F.conv2d

    def perf_counter():
        if begun[0]:  # the end of a turn: in what precision it was, and how long it took
            seconds = 2.0 * ratio if dtypes[-1] == torch.bfloat16 else 2.0
            clock[0] += seconds * (1 + len(dtypes) * 7 % 5)  # in some turns nothing else runs
        begun[0] = not begun[0]
        return clock[0]

    def convolve(*arguments, **options):
        y = right(*arguments, **options)
        dtypes.append(y.dtype)
        return y

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has}, raising=False)
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=perf_counter))
    monkeypatch.setattr(F, "conv2d", convolve)
    measure = cache(FAST_BFLOAT16.__wrapped__)  # with nothing remembered
    with torch.no_grad():  # as where a model is loaded to sample
        assert measure(CPU) == measure(CPU) == fast and common.has_bfloat16(CPU) == has
    assert {*dtypes} == ({torch.float32, torch.bfloat16} if has else set())
    lines = capsys.readouterr().err.splitlines()
    assert lines == (["bfloat16 takes 160% of the time of float32 here; float32 is used"] if ratio > 1 else [])


@pytest.mark.parametrize("wrong", [None, "vae", "encoder", "unet", "decode"])
def test_a_model_with_a_wrong_kernel_samples_in_float32(wrong, tiny, monkeypatch, capsys):
    """The decoder, the encoder (which the bound on the likelihood needs), the denoiser and the decoding of a latent are
    all tried. What is right samples in bfloat16."""
    train = settings()
    unet, decode = common.build_unet(train, 3), nn.Conv2d(3, 3, 3)
    nn.init.normal_(unet.out.weight, std=0.1)
    model = dataclasses.replace(tiny, denoiser_for=lambda x_hat, z, clean: unet, decode=decode)
    common.choose_precision(model)
    assert not model.reduced
    monkeypatch.setattr(common, "fast_bfloat16", lambda device: True)
    if wrong:
        parts = {"vae": model.vae.decoder, "encoder": model.vae.encoder, "unet": unet, "decode": decode}
        layers = {*parts[wrong].modules()}
        plant_wrong_bfloat16(monkeypatch, layers.__contains__)
    common.choose_precision(model)
    lines = capsys.readouterr().err.splitlines()
    assert model.reduced == (wrong is None) and len(lines) == (wrong is not None)
    assert all(line.startswith("tiny: bfloat16") for line in lines)
    for part in ("vae", "denoiser_for", "decode"):  # models that lack a part
        for changes in ({part: None}, {part: None, "decode": None}):
            other = dataclasses.replace(model, reduced=False, **changes)
            common.choose_precision(other)
            parts_of = {"vae": ("vae", "encoder"), "denoiser_for": ("unet",), "decode": ("decode",)}
            assert other.reduced == (wrong is None or any(wrong in parts_of[name] for name in changes))


@pytest.mark.parametrize("name,dataset,size", [("smoke", "shapes", 32), ("smoke", "celeba64", 64),
                                               ("cpu", "shapes", 32), ("cpu", "cifar10", 32), ("cpu", "celeba64", 64)])
def test_rounding_and_wrong_kernels_can_be_told_apart(name, dataset, size):
    """Outputs and gradients of the real networks, as they are trained (channels_last): bfloat16 changes them by less
    than 10% where the processor is right, and by more than half where it is not. The limit of rounding_explains, 30%,
    lies between."""
    torch.manual_seed(0)
    train, gen = common.budget(name, dataset, size)[0], common.generator(0)
    vae, unet = common.build_vae(train), common.build_unet(train, 6)
    vae, unet = (network.to(memory_format=torch.channels_last) for network in (vae, unet))
    nn.init.normal_(unet.out.weight, std=0.1)
    x0 = common.to_float(torch.randint(256, (4, 3, size, size), generator=gen)).contiguous(
        memory_format=torch.channels_last)
    noise, t = common.randn((4, vae.latent_dim), gen), torch.tensor([10, 200, 500, 900])

    def measure(reduced):
        vae.zero_grad()
        unet.zero_grad()
        with common.autocast(CPU, reduced):
            x_hat, mu, logvar = vae(x0, noise)
            loss = (x_hat - x0).square().sum() + common.gaussian_kl(mu, logvar).sum()
            out = unet(torch.cat([x0, x_hat.detach()], 1), t)
        (loss + (out - x0).square().sum()).backward()
        gradients = [torch.cat([p.grad.flatten() for p in n.parameters() if p.grad is not None])
                     for n in (vae.encoder, vae.decoder, unet)]
        return [mu.detach(), x_hat.detach(), out.detach(), *gradients]

    errors = common.relative_errors(measure(False), measure(True))
    assert all(0 < error < 0.1 or error > 0.5 for error in errors), errors


# ---- Data ------------------------------------------------------------------------------------------------------------

def test_shapes():
    """The images of a seed are always the same. All classes and details are equally frequent, the factors are in range,
    and areas, centres, colours and bands are those that the factors describe."""
    images, labels, factors = common.draw_shapes(3000, seed=1)
    again, other = common.draw_shapes(3000, seed=1), common.draw_shapes(3000, seed=2)
    assert all(map(torch.equal, (images, labels, factors), again)) and not torch.equal(images, other[0])
    assert images.shape == (3000, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert factors.shape == (3000, len(common.FACTORS)) and factors.dtype == torch.float32
    assert factors.abs().max() <= 1 and (factors.amin(0)[:7] < -0.9).all() and (factors.amax(0)[:7] > 0.9).all()
    assert torch.allclose(factors[:, 3:5].square().sum(1), torch.ones(3000), atol=1e-5)  # sine and cosine of one angle
    size, x, y, sine, cosine, _, _, detail, direction = factors.T
    for values, kinds in ((labels, 6), (detail + 1, 3), (direction[detail >= 0] + 1, 3)):
        counts = values.long().bincount() / len(values)
        assert len(counts) == kinds and (counts - 1 / kinds).abs().max() < 4 * (len(values) * kinds) ** -0.5
    assert (direction[detail < 0] == 0).all()

    plain, centres = images[detail < 0].float(), torch.arange(32) + 0.5
    cover = (plain.amax(1) - plain.amin(1)) / (0.75 * 255)  # (N, H, W): the ground is grey
    radius = 10.5 + 1.5 * size[detail < 0]
    star = 5 * math.sin(math.pi / 5) * 0.443 / (0.443 * math.cos(math.pi / 5) + 0.897 * math.sin(math.pi / 5))
    areas = torch.tensor([math.pi * 0.9**2, math.pi * (0.93**2 - 0.43**2), 1.56**2, 27**0.5 * 0.53**2, star,
                          4 * (2 * 0.95 * 0.33) - 0.66**2])[labels[detail < 0]]
    assert torch.allclose(cover.sum((1, 2)) / radius**2, areas, rtol=0.01)
    for axis, place in ((1, x), (2, y)):
        centre = (cover.sum(axis) * centres).sum(1) / cover.sum((1, 2))
        assert torch.allclose(centre, 16 + 3 * place[detail < 0], atol=0.05)
    hue = torch.atan2(sine, cosine)[detail < 0] / (2 * math.pi) % 1
    for image, share, h in zip(plain, cover, hue.tolist(), strict=True):
        colour = torch.tensor(colorsys.hsv_to_rgb(h, 1, 1)) * 0.75 + 0.2
        assert torch.allclose(image.flatten(1)[:, share.argmax()], 255 * colour, atol=1.5)

    # Inside discs, bands repeat with their period along rows, columns or diagonals, and have two tones.
    rows, columns, periods = centres[:, None], centres, []
    for image, factor in zip(images[labels == 0].float(), factors[labels == 0], strict=True):
        well_inside = torch.hypot(columns - 16 - 3 * factor[1], rows - 16 - 3 * factor[2]) < (
            0.9 * (10.5 + 1.5 * factor[0]) - 1)
        fits = []
        for period in {-1: (1,), 0: (8,), 1: (3, 4)}[int(factor[7])]:
            shift = (0, period) if factor[8] == 0 else (period, 0)
            both = well_inside & well_inside.roll(shift, (0, 1))
            fits += [period] if torch.equal(image[:, both], image.roll(shift, (1, 2))[:, both]) else []
        assert len(fits) == 1 and image[:, well_inside].unique(dim=1).shape[1] == (1 if factor[7] < 0 else 2)
        periods += fits
    assert 0.3 < periods.count(3) / (periods.count(3) + periods.count(4)) < 0.7
    power = [fid.high_frequency_power(images[detail == which]).median() for which in (-1, 0, 1)]
    assert 2 * power[0] < power[1] and 3 * power[1] < power[2]  # fine bands have far more power in high frequencies


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def noise_image(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def flat(value, height=32, width=32):
    return np.full((height, width, 3), value, np.uint8)


def ramp(height, width, step=1):
    """An image that knows its coordinates: red = step * column, green = step * row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * step, rows * step, 0 * rows], 2).astype(np.uint8)


def test_missing_images_are_downloaded(tmp_path, monkeypatch):
    """By torchvision, into the data folder. It reads CIFAR-10; CelebA is read as if its files had been there."""
    def planted_cifar10(root, train, download):
        return SimpleNamespace(data=np.full((7, 32, 32, 3), 100 * download, np.uint8), targets=[int(train)] * 7)

    def planted_celeba(root, split, download):
        for i in range(60 if download and split == "all" else 0):
            save(Path(root) / "celeba" / "img_align_celeba" / f"{i:06}.jpg", flat(i, 218, 178))

    from torchvision import datasets
    monkeypatch.setattr(datasets, "CIFAR10", planted_cifar10)
    monkeypatch.setattr(datasets, "CelebA", planted_celeba)
    cifar10, celeba = (common.load_images(name, "train", tmp_path) for name in ("cifar10", "celeba64"))
    assert cifar10.images.shape == (7, 3, 32, 32) and cifar10.images.unique().tolist() == [100]
    assert cifar10.labels.tolist() == [1] * 7 and cifar10.note == "as published"
    assert celeba.images.shape == (54, 3, 64, 64) and celeba.note == "as published (JPEG)"
    (tmp_path / "cifar-10-batches-py").mkdir()  # then it is there, and nothing is downloaded
    assert common.load_images("cifar10", "test", tmp_path).images.unique().tolist() == [0]


def test_cifar10_class_folders(tmp_path):
    """PNG files keep every bit. Labels follow the alphabetical order of the classes of both splits. The first test
    images have all classes."""
    home = tmp_path / "cifar10"
    for (k, name), i in itertools.product(enumerate(["bird", "airplane", "cat", "dog"]), range(8)):
        save(home / "train" / name / f"{i}.png", noise_image(10 * k + i))
        if name != "airplane":
            save(home / "test" / name / f"{i}.png", flat(10 * k + i))
    train, test, again = (common.load_images("cifar10", split, tmp_path) for split in ("train", "test", "test"))
    assert train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    assert (train.note, train.crop, train.name, train.factors) == ("lossless", "none", "cifar10", None)
    for row, k in ((0, 10), (9, 1), (31, 37)):  # airplane 0, bird 1, dog 7
        assert np.array_equal(train.images[row].permute(1, 2, 0).numpy(), noise_image(k))
    value = test.images[:, 0, 0, 0].long()
    assert sorted(value.tolist()) == [*range(8), *range(20, 28), *range(30, 38)]
    assert torch.equal(torch.tensor([1, 0, 2, 3])[value // 10], test.labels)
    assert set(test.labels[:12].tolist()) == {1, 2, 3} and torch.equal(test.images, again.images)
    save(home / "train" / "cat" / "a.jpg", ramp(32, 32, 4), quality=95)
    train = common.load_images("cifar10", "train", tmp_path)
    assert len(train.images) == 33 and train.labels[24] == 2 and "JPEG" in train.note
    assert np.abs(train.images[24].permute(1, 2, 0).numpy().astype(int) - ramp(32, 32, 4)).mean() < 12
    save(home / "train" / "1.png", flat(1))  # it belongs to no class
    assert len(common.load_images("cifar10", "train", tmp_path).images) == 33


@pytest.mark.parametrize("split,other", [("train", "test"), ("test", "train")])
def test_cifar10_with_one_split_missing(split, other, tmp_path, capsys):
    """It must not come from elsewhere, since copies and published files are two data sets."""
    save(tmp_path / "cifar10" / other / "cat" / "0.png", noise_image(0))
    expect_error(capsys, lambda: common.load_images("cifar10", split, tmp_path),
                 f"{tmp_path / 'cifar10' / split}: no images")


def test_cifar10_torchvision_layout(tmp_path, monkeypatch):
    """torchvision's pickled batches are read. They are written here, so their checksums are not compared."""
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
    assert train.images.shape == (10, 3, 32, 32) and train.images.dtype == torch.uint8 and train.note == "as published"
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] and test.labels.tolist() == [5, 4]
    assert np.array_equal(train.images[3].permute(1, 2, 0).numpy(), noise_image(11))


@pytest.mark.parametrize("width,height", [(178, 218), (89, 109)])
def test_celeba_crop(tmp_path, width, height, capsys):
    """The crop is the box (15, 40, 163, 188) of 178x218 pixels, in proportion for smaller copies. The error names an
    image of another shape, or one that is broken."""
    step, home = 178 // width, tmp_path / "celeba" / "img_align_celeba"
    for i in range(60):
        save(home / f"{i:06}.png", ramp(height, width, step))
    data = common.load_images("celeba64", "train", tmp_path)
    assert data.images.shape == (54, 3, 64, 64) and data.labels is None
    assert (data.crop, data.note) == ("celeba-148", f"lossless copies at {width}x{height}")
    centre = (torch.arange(64) + 0.5) * 148 / 64  # of output pixel j, from the box's edge, in full-size pixels
    red, green = data.images[0, 0].float(), data.images[0, 1].float()
    assert (red - (15 + centre - step / 2)).abs().max() <= 1
    assert (green - (40 + centre - step / 2)[:, None]).abs().max() <= 1
    save(home / "000003.png", noise_image(0, 100, 178))
    expect_error(capsys, lambda: common.load_images("celeba64", "train", tmp_path), "000003.png", "178x218")
    (home / "000003.png").write_bytes((home / "000004.png").read_bytes()[:-40])
    expect_error(capsys, lambda: common.load_images("celeba64", "train", tmp_path), "000003.png", "cannot be read")
    (home / "000000.png").write_bytes(b"this is not an image")  # whose size says which copies these are
    expect_error(capsys, lambda: common.load_images("celeba64", "train", tmp_path), "000000.png", "cannot be read")


def test_celeba_splits(tmp_path, capsys):
    """The partition file decides (0 train, 1 neither, 2 test). Without one the last tenth by name is the test split."""
    home = tmp_path / "celeba"
    for i in range(60):
        save(home / "img_align_celeba" / f"{i:06}.png", flat(i, 218, 178))
    for train, test in (((0, 54, 1), (54, 60, 1)), ((0, 60, 3), (2, 60, 3))):
        for split, expected in (("train", train), ("test", test)):
            values = common.load_images("celeba64", split, tmp_path).images[:, 0, 0, 0].tolist()
            assert (sorted(values) if split == "test" else values) == list(range(*expected))
        # Published are .jpg files; here they are copies of another kind.
        (home / "list_eval_partition.txt").write_text("".join(f"{i:06}.jpg {i % 3}\n" for i in range(60)))
    (home / "list_eval_partition.txt").write_text("".join(f"{i:06}.jpg 0\n" for i in range(60)))
    expect_error(capsys, lambda: common.load_images("celeba64", "test", tmp_path), "list_eval_partition.txt",
                 "none of the 60 images is in its test part", "remove this file")
    for scale, note in ((1, "JPEG copies at 89x109"), (2, "as published (JPEG)")):
        folder = tmp_path / f"jpegs{scale}"
        for i in range(60):
            save(folder / "celeba" / "img_align_celeba" / f"{i:06}.jpg", flat(0, scale * 109, scale * 89))
        assert common.list_split("celeba64", "train", folder)[2:] == ("celeba-148", note)


def test_folder_of_odd_images(tmp_path, monkeypatch):
    """Images of any size, mode and suffix, in nested folders, become RGB squares from their centres. Every tenth one
    by path is in the test split, so that a folder for each person or class is in both splits."""
    monkeypatch.chdir(tmp_path)
    home, column = tmp_path / "photos", torch.arange(64.0).expand(64, 64)
    for i in range(57):
        save(home / "more" / f"{i:02}.jpg", noise_image(i, 30 + i % 17, 50 - i % 17))
    save(home / "a_wide.png", ramp(64, 128))
    save(home / "b_tall.png", ramp(128, 64))
    save(home / "c_grey.png", np.full((70, 70), 77, np.uint8))
    train, test = (common.load_images("folder", split, home, 64) for split in ("train", "test"))
    assert train.images.shape == (54, 3, 64, 64) and test.images.shape == (6, 3, 64, 64)
    assert (train.crop, train.name, train.labels, train.note) == ("centre", "photos", None, "JPEG files")
    assert torch.equal(train.images[0, 0].float(), column + 32) and torch.equal(train.images[0, 1].float(), column.T)
    assert torch.equal(train.images[1, 0].float(), column) and torch.equal(train.images[1, 1].float(), column.T + 32)
    assert (train.images[2] == 77).all()
    names = [path.name for path in common.find_images(home)]
    train_names, test_names = ([path.name for path in common.list_split("folder", split, home)[0]]
                               for split in ("train", "test"))
    assert test_names == [names[i] for i in (9, 19, 29, 39, 49, 59)] and train_names == [
        name for name in names if name not in test_names]


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path, capsys):
    save(tmp_path / "photos" / "0.png", noise_image(0, 40, 44))
    (tmp_path / "cache").write_text("a file where the folder of the cache should be")
    files = common.find_images(tmp_path / "photos")
    assert len(common.decode_files(files, 32, "centre", tmp_path / "cache" / "photos.npz")) == 1
    assert f"warning: cannot write {tmp_path / 'cache' / 'photos.npz'}" in capsys.readouterr().err


def test_cache_is_used_and_rebuilt(tmp_path, monkeypatch):
    """Images are decoded again if a file was changed (even to one of the same size) or removed, for another folder of
    the same name, for another size, and if the cache is damaged."""
    monkeypatch.chdir(tmp_path)
    folder, decode, count = tmp_path / "photos", common.decode_file, []
    monkeypatch.setattr(common, "decode_file", lambda *a: count.append(a) or decode(*a))
    for i in range(70):  # uncompressed, so that a file with other pixels has the same size
        save(folder / f"{i:02}.bmp", noise_image(i, 40, 44))

    def load(size=32, folder=folder):
        count.clear()
        return common.load_images("folder", "train", folder, size).images, len(count)

    (first, decoded), (again, decoded_again) = load(), load()
    assert (decoded, decoded_again) == (63, 0) and torch.equal(first, again)
    assert load(64)[1] == 63 and load()[1] == 0  # both sizes are kept
    save(folder / "00.bmp", noise_image(99, 40, 44))
    changed, decoded = load()
    assert decoded == 63 and not torch.equal(first[0], changed[0]) and torch.equal(first[1:], changed[1:])
    (folder / "01.bmp").unlink()
    assert load()[0].shape[0] == 63 and load()[1] == 0  # 69 files: six for the test split
    (cache,) = (tmp_path / "data" / "cache").glob("photos-train-*-32.npz")
    whole = cache.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:2000] + bytes(500) + whole[2500:]):
        cache.write_bytes(damage)
        images, decoded = load()
        assert decoded == 63 and torch.equal(images[0], changed[0]) and load()[1] == 0
    assert load(folder=shutil.copytree(folder, tmp_path / "other" / "photos"))[1] == 63  # names, sizes and times alike


def test_missing_data_say_what_to_do(tmp_path, monkeypatch, capsys):
    """The message names --data-dir, its whole path, and what the folder must hold."""
    monkeypatch.chdir(tmp_path)
    for kind in ("CIFAR10", "CelebA"):
        def no_network(*arguments, **options):
            raise RuntimeError("no network\nsecond line")

        monkeypatch.setattr(f"torchvision.datasets.{kind}", no_network)
    for dataset, folder, layout in (("cifar10", "data", "cifar-10-batches-py/ or cifar10/{train,test}/"),
                                    ("celeba64", "data/celeba", "celeba/img_align_celeba/")):
        expect_error(capsys, lambda d=dataset, f=folder: common.load_images(d, "train", f), f"no images of {dataset}",
                     f"--data-dir {tmp_path / folder} ", "(no network)", f"the folder in which {layout}", "use shapes")
    expect_error(capsys, lambda: common.load_images("folder", "train", "nowhere"), "nowhere: found 0 images",
                 "--data-dir")


# ---- Networks --------------------------------------------------------------------------------------------------------

def test_densities_and_errors_against_torch_distributions():
    """Densities are summed over the dimensions. The squared error is that of images in [0, 1]."""
    gen = common.generator(0)
    mu, logvar, z = (common.randn((5, 7), gen) for _ in range(3))
    q = Normal(mu, (0.5 * logvar).exp())
    assert torch.allclose(common.gaussian_kl(mu, logvar), kl_divergence(q, Normal(0, 1)).sum(1), rtol=1e-5)
    assert torch.allclose(common.gaussian_log_prob(z, mu, logvar), q.log_prob(z).sum(1), rtol=1e-5)
    assert torch.allclose(q.cdf(common.reparameterise(mu, logvar, z)), Normal(0, 1).cdf(z), atol=1e-6)
    a, b = torch.rand(2, 4, 3, 5, 5, generator=gen)
    assert torch.allclose(common.squared_error(2 * a - 1, 2 * b - 1), (a - b).square().sum((1, 2, 3)))


def test_attention_and_costs_by_hand():
    """Softmax attention written out with einsum for each head. A multiply-add counts as two operations."""
    torch.manual_seed(0)
    layer, x = common.Attention(8, 2), torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x), x)
    nn.init.normal_(layer.out.weight)  # in place of its zeros
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 4, 9).unbind(1)
    weights = (torch.einsum("bhcn,bhcm->bhnm", q, k) / 2).softmax(-1)  # / sqrt(C / heads)
    y = torch.einsum("bhnm,bhcm->bhcn", weights, v).reshape(2, 8, 3, 3)
    assert torch.allclose(layer(x), x + layer.out(y), atol=1e-5)
    with torch.device("meta"):
        attention, feature_map = common.Attention(16, 2), torch.empty(1, 16, 8, 8)
    assert common.count_parameters(attention) == 2 * 16 + (16 * 48 + 48) + (16 * 16 + 16)
    # N = 64, C = 16: qkv and projection 2 * N * C * 4C, scores and mixture 2 * 2 * N * N * C
    assert common.count_gflops(lambda: attention(feature_map)) == pytest.approx(
        (2 * 64 * 16 * 64 + 4 * 64 * 64 * 16) / 1e9)


def test_time_in_turn(monkeypatch):
    """The functions are called in turn, twice before any second counts. The median ignores a slow run. Seconds end when
    the device has done its work."""
    now, order = [0], []
    seconds = {"a": iter([90, 90, 1, 1, 60, 2, 3, 5, 1, 5, 1]), "b": iter([7, 7, 20, 20, 21, 25, 30, 2, 2, 2, 2])}

    def run(name):
        order.append(name)
        now[0] += next(seconds[name])

    monkeypatch.setattr(common.time, "perf_counter", lambda: now[0])
    runs = {name: partial(run, name) for name in seconds}
    assert common.time_in_turn(runs, CPU, repeats=5) == {"a": 2, "b": 21} and order == 7 * ["a", "b"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: now.insert(0, now[0] + 100))
    assert common.time_in_turn(runs, torch.device("cuda"), repeats=2) == {"a": 103, "b": 102}
    monkeypatch.setattr(torch.mps, "synchronize", lambda: now.insert(0, now[0] + 10))
    runs = {"a": lambda: order.append("c")}
    assert common.time_in_turn(runs, torch.device("mps")) == {"a": 10} and order.count("c") == 9


@pytest.mark.parametrize("dataset,size,blocks,millions", [("cifar10", 32, (25, 28), (9.24, 35.75)),
                                                          ("celeba64", 64, (31, 31), (14.01, 78.70))])
def test_published_networks(dataset, size, blocks, millions):
    """Numbers of blocks and parameters are the paper's. There is attention at 16x16 (2 on the way down, 3 on the way
    up) and in the middle."""
    train = common.budget("paper", dataset, size)[0]
    with torch.device("meta"):
        vae, unet = common.build_vae(train), common.build_unet(train, 6)
    for half, expected in zip((vae.encoder, vae.decoder), blocks, strict=True):
        assert sum(isinstance(m, common.BottleneckBlock) for m in half.modules()) == expected
    for network, expected in zip((vae, unet), millions, strict=True):
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(expected, rel=0.01)
    seen = []
    for module in unet.modules():
        if isinstance(module, common.Attention):
            module.register_forward_hook(lambda m, inputs, output: seen.append(tuple(inputs[0].shape[2:])))
    unet(torch.empty(2, 6, size, size, device="meta"), torch.ones(2, device="meta"))
    assert sorted(seen) == [(4, 4)] + 5 * [(16, 16)] and vae.latent_dim == 512
    published = {"objective": "eps", "start": 1000, "beta": 1.0, "pool": True, "heads": 8,
                 "vae_flip": False, "unet_flip": True, "batch": 128,
                 "vae_lr": 1e-4, "unet_lr": 2e-4, "vae_muon_lr": 0.0, "unet_muon_lr": 0.0, "warmup": 5000,
                 "decay": False, "vae_clip": 0.0, "unet_clip": 1.0, "vae_ema": 0.0, "unet_ema": 0.9999,
                 "vae_steps": 195_000, "unet_steps": 1_110_000, "even_levels": False, "dropout": 0.3,
                 "components": 50, "tied": False, "attention": [16], "flow_steps": 5000}
    if size == 64:
        published |= {"batch": 32, "vae_steps": 1_246_000, "unet_steps": 2_543_000, "dropout": 0.1, "components": 75}
    assert {key: train[key] for key in published} == published
    assert set(train) - set(published) == {"encoder", "decoder", "unet", "every", "guidance"}


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu", "paper"])
@pytest.mark.parametrize("dataset,size", [("shapes", 32), ("cifar10", 32), ("celeba64", 64)])
def test_every_budget_builds_and_is_plain_json(name, dataset, size):
    """The networks of every budget can be built and fit together. The settings survive JSON."""
    train, evaluation = common.budget(name, dataset, size)
    assert json.loads(json.dumps([train, evaluation])) == [train, evaluation]
    assert train["unet_flip"] == (dataset != "shapes")  # the bands of a mirrored shape would run the other way
    assert train["vae_flip"] == (dataset != "shapes" and name != "paper")
    with torch.device("meta"):
        vae, unet = common.build_vae(train), common.build_unet(train, 6)
        x_hat, mu, _ = vae(torch.empty(2, 3, size, size), torch.empty(2, vae.latent_dim))
        assert x_hat.shape == unet(torch.empty(2, 6, size, size), torch.ones(2)).shape == (2, 3, size, size)
        assert mu.shape == (2, vae.latent_dim)


def test_unet_starts_at_zero_and_uses_time_extra_and_every_skip():
    """The output is zero at first. With other weights it depends on t and on `extra`, and every parameter has a
    gradient."""
    torch.manual_seed(0)
    unet = common.UNet([(16, 8, 2, 3), (8, 16, 2, 3)], 6, attention=(8,), heads=2)
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


def test_time_embedding_by_hand():
    """Cosines, then sines, of t times frequencies from 1 down towards 1/10,000. (Committed weights depend on it.)"""
    unet, seen = common.UNet([(16, 8, 1, 1)], 6), []
    unet.time.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    unet(torch.zeros(2, 6, 16, 16), torch.tensor([1, 700]))
    angles = torch.tensor([[t * 10_000 ** (-k / 4) for k in range(4)] for t in (1, 700)])
    assert torch.allclose(seen[0], torch.cat([angles.cos(), angles.sin()], 1), atol=1e-3)


def test_which_units_are_in_use():
    """Those whose mean has a variance above 0.01."""
    unit = torch.tensor([-1.0, 0.0, 1.0])  # of variance 1
    assert common.active_units(torch.stack([0.09 * unit, 0.11 * unit, 5 + 0.09 * unit], 1)).tolist() == [
        False, True, False]


# ---- Diffusion -------------------------------------------------------------------------------------------------------

def test_forward_marginals():
    """Composing x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps for t = 1..T gives q(x_t | x0). alpha_bar[0] is 1."""
    diffusion, mean, variance = common.Diffusion("eps"), 1.0, 0.0
    assert float(diffusion.alpha_bar[0]) == 1 and len(diffusion.alpha_bar) == T + 1
    for t in range(1, T + 1):
        beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert float(diffusion.x0_scale[t]) == pytest.approx(mean, rel=1e-5)
        assert float(diffusion.eps_scale[t]) ** 2 == pytest.approx(variance, rel=1e-5)
    x0, eps, t = torch.full((3, 1, 1, 2), 0.8), torch.ones(3, 1, 1, 2), torch.tensor([1, 250, 1000])
    expected = 0.8 * diffusion.x0_scale[t] + diffusion.eps_scale[t]
    assert torch.allclose(diffusion.q_sample(x0, t, eps)[:, 0, 0, 1], expected)


@pytest.mark.parametrize("start", [None, 400, 1])
def test_training_times(start):
    """Times are in 1..start, all equally often, and both ends occur."""
    diffusion, last = common.Diffusion("eps", start=start), start or T
    t = diffusion.draw_t((torch.arange(50 * last, dtype=torch.float64) + 0.5) / (50 * last))
    assert t.bincount().tolist() == [0] + last * [50] and diffusion.start == last
    assert diffusion.draw_t(torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, last]  # float32, as in training


@pytest.mark.parametrize("t,s", [(1000, 999), (500, 499), (2, 1), (1000, 500), (300, 7), (25, 1)])
def test_posterior_is_bayes(t, s):
    """q(x_s | x_t, x0) is proportional to q(x_t | x_s) q(x_s | x0), which is computed on a grid of x_s and integrated
    numerically."""
    diffusion, x0, xt = common.Diffusion("eps"), 0.7, -0.4
    bar_t, bar_s = float(diffusion.alpha_bar[t]), float(diffusion.alpha_bar[s])
    posterior = diffusion.posterior(t, s)
    centre = posterior.x0_factor * x0 + posterior.xt_factor * xt
    width = math.sqrt(posterior.small_variance)
    x_s = torch.linspace(centre - 12 * width, centre + 12 * width, 20_001, dtype=torch.float64)
    log_density = (-(xt - math.sqrt(bar_t / bar_s) * x_s) ** 2 / (2 * (1 - bar_t / bar_s))
                   - (x_s - math.sqrt(bar_s) * x0) ** 2 / (2 * (1 - bar_s)))
    weight = log_density.softmax(0)
    mean = float((weight * x_s).sum())
    assert mean == pytest.approx(centre, abs=1e-6 * width)
    assert float((weight * (x_s - mean) ** 2).sum()) == pytest.approx(width**2, rel=1e-6)
    assert posterior.large_variance == pytest.approx(1 - bar_t / bar_s)


def test_time_grid():
    """Times rise strictly from 0 to the start for every number of steps in 1..start. With `start` steps all times are
    visited. Most are close to 0."""
    for start in (T, 137):
        for n in range(1, start + 1):
            grid = common.time_grid(start, n)
            assert len(grid) == n + 1 and grid[0] == 0 and grid[-1] == start and grid == sorted(set(grid)), n
        assert grid == list(range(start + 1))
    assert common.time_grid(T, 10)[:3] == [0, 10, 40]


@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_oracle_returns_x0(sampler, objective):
    """With a perfect prediction every sampler ends at x0, from every start and in every number of steps. It takes no
    more steps than there are times."""
    gen = common.generator(0)
    x0 = torch.rand(2, 3, 2, 2, generator=gen) * 2 - 1

    def run(start, steps):
        diffusion, calls = common.Diffusion(objective, start=start), []
        denoise = oracle(diffusion, x0)
        return common.sample(diffusion, lambda x, t: calls.append(t.tolist()) or denoise(x, t),
                             common.randn(x0.shape, gen), sampler, steps, gen), calls

    for start, steps in (*((T, n) for n in (1, 2, 3, 7, 25, 60, 333, T)), (60, 7), (60, 60), (60, 61)):
        x, calls = run(start, steps)
        assert torch.allclose(x, x0, atol=1e-4), (start, steps)
        assert calls == [[t, t] for t in common.time_grid(start, min(start, steps))[:0:-1]]


MEAN, SD = 0.2, 0.5


def gaussian_result(sampler, steps, start=None, mean=MEAN, sd=SD):
    """Mean and standard deviation of samples that are drawn with the exact prediction for data from N(mean, sd^2). DDIM
    and DPM-Solver++ are affine maps of the noise, so that two points determine them."""
    diffusion, gen = common.Diffusion("eps", start=start), common.generator(0)

    def denoise(xt, t):  # E[eps | x_t]
        a, s = diffusion.scales(t)
        return s / (a**2 * sd**2 + s**2) * (xt - a * mean)

    eps = common.randn((50_000, 1, 1, 1), gen) if sampler == "ddpm" else torch.tensor([0.0, 1.0])[:, None, None, None]
    x = common.sample(diffusion, denoise, diffusion.x_start(torch.full_like(eps, mean), eps), sampler, steps, gen,
                      clamp=False)
    return (float(x.mean()), float(x.std())) if sampler == "ddpm" else (float(x[0]), float(x[1] - x[0]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("start,mean,sd,slack", [(T, MEAN, SD, 0.02), (403, -0.7, 0.09, 0.045)])
def test_exact_score_gives_the_gaussian(sampler, start, mean, sd, slack):
    """With all steps and without clamping, mean and standard deviation are right to `slack` * sd: if the process begins
    at T, and if it begins where the noise is ten times sd."""
    assert start == T or float(common.Diffusion("eps").eps_scale[start]) == pytest.approx(10 * sd, rel=0.01)
    found = gaussian_result(sampler, start, start, mean, sd)
    assert found == (pytest.approx(mean, abs=slack * sd), pytest.approx(sd, rel=slack))


def test_samplers_improve_in_their_order(monkeypatch):
    """With twice the steps DDIM's error is half (first order), and DPM-Solver++'s a quarter (second order). With equal
    steps DPM-Solver++ has a smaller error than DDIM, and DDIM than DDPM with skipped times. Fine detail, data from N(0,
    0.05^2), keeps most of its energy in 25 steps. On a uniform grid, whose steps lie where coarse structure is decided,
    it loses most."""
    error = {(s, n): abs(gaussian_result(s, n)[1] / SD - 1) for s in ("ddim", "dpm") for n in (10, 20, 40, 80)}
    for n in (10, 20, 40):
        assert 1.6 < error["ddim", n] / error["ddim", 2 * n] < 2.4
        assert error["dpm", n] < 0.5 * error["ddim", n]
    for n in (20, 40):
        assert 3 < error["dpm", n] / error["dpm", 2 * n] < 7
    assert gaussian_result("dpm", 10, 403, 0.3, 0.09) == (pytest.approx(0.3), pytest.approx(0.09, rel=0.02))
    ddpm = [abs(gaussian_result("ddpm", n)[1] / SD - 1) for n in (10, 20, 40)]
    assert ddpm[0] > ddpm[1] > ddpm[2] and all(e > error["ddim", n] for e, n in zip(ddpm, (10, 20, 40), strict=True))

    def kept(sampler):
        return (gaussian_result(sampler, 25, mean=0.0, sd=0.05)[1] / 0.05) ** 2

    assert kept("ddim") > 0.65 and kept("dpm") > 0.9
    monkeypatch.setattr(common, "time_grid", lambda start, steps: [round(start * i / steps) for i in range(steps + 1)])
    assert kept("ddim") < 0.2 and kept("dpm") < 0.2


@pytest.mark.parametrize("sd", [0.003, 0.0074, 0.1, 1.0])
def test_data_nats(sd):
    """The probabilities of all 256 values add up to 1. A value whose bin of +-1/255 is centred on the mean has the
    probability erf(1/255 / (sd sqrt 2))."""
    values = common.to_float(torch.arange(256, dtype=torch.uint8))[:, None]  # 256 images of one pixel
    diffusion = SimpleNamespace(posterior=lambda t, t_next: SimpleNamespace(small_variance=sd**2))
    for mean in (-1.0, -0.993, -0.3, 0.0, 0.0039, 0.98, 1.0, 1.3):
        total = (-common.data_nats(diffusion, values, torch.full((256, 1), mean)).double()).exp().sum()
        assert float(total) == pytest.approx(1, abs=2e-5)  # float32 pixel values leave gaps of 1e-8 between the bins
    x0 = values[128].expand(2, 3, 2, 2)
    log_p = -common.data_nats(diffusion, x0, x0)
    assert log_p.tolist() == pytest.approx(2 * [12 * math.log(math.erf(1 / 255 / (sd * 2**0.5)))], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("start,offset", [(T, 0.0), (T, 0.1), (350, 0.1)])
def test_diffusion_nats_of_a_known_case(start, offset):
    """If the predicted x0 is off by `offset` everywhere, every part has a closed form. Without an offset the diffusion
    part is D/2 sum(log(b/bt) + bt/b - 1). The prior part is the KL from q(x_start | x0) to N(0, I), or to q(x_start |
    x_hat) from an earlier start. With start - 1 draws every image uses each t in 2..start once, and then t = 1 for the
    data part. With 40 draws one t comes from each of 40 equal pieces."""
    diffusion, gen, seen = common.Diffusion("v", start=start), common.generator(0), []
    images = torch.randint(1, 200, (2, 3, 2, 2), generator=gen).to(torch.uint8)
    x0, x_hat = common.to_float(images), common.randn((2, 3, 2, 2), gen)
    off = oracle(diffusion, x0 + offset)
    parts = common.diffusion_nats(diffusion, lambda x, t: seen.append(t) or off(x, t), images, x_hat, start - 1, gen)
    times = torch.stack(seen)  # (start, 2)
    assert (times[-1] == 1).all()
    assert torch.equal(times[:-1].sort(0).values, torch.arange(2, start + 1)[:, None].expand(start - 1, 2))
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)[:start]  # the schedule's definition
    bar, beta = (1 - beta).cumprod(0), beta[1:]
    small = beta * (1 - bar[:-1]) / (1 - bar[1:])  # beta_tilde, t = 2..T
    c_x0 = bar[:-1].sqrt() * beta / (1 - bar[1:])
    exact = 12 * (0.5 * ((beta / small).log() + small / beta - 1) + c_x0**2 * offset**2 / (2 * beta)).sum()
    assert torch.allclose(parts["diffusion"].double(), exact.expand(2), rtol=3e-4, atol=1e-3)
    cdf = Normal(0, float(small[0].sqrt())).cdf  # at t = 1 the model takes beta_tilde_2
    bin_mass = cdf(torch.tensor(1 / 255 - offset).double()) - cdf(torch.tensor(-1 / 255 - offset).double())
    assert torch.allclose(parts["data"].double(), -12 * bin_mass.clamp(min=1e-12).log().expand(2), rtol=1e-3)
    a, s = bar[-1].sqrt(), (1 - bar[-1]).sqrt()
    prior = kl_divergence(Normal(a * x0, s), Normal(0.0, 1.0) if start == T else Normal(a * x_hat, s))
    assert torch.allclose(parts["prior"].double(), prior.flatten(1).sum(1), rtol=1e-2 if start == T else 1e-5)
    assert all(part.shape == (2,) for part in parts.values())
    seen.clear()
    common.diffusion_nats(diffusion, lambda x, t: seen.append(t) or x, images, x_hat, 40, gen)
    for k, t in enumerate(seen[:-1]):
        assert k * (start - 1) // 40 <= (t - 2).min() and (t - 2).max() <= (k + 1) * (start - 1) // 40


def nearest_component(gmm, z):
    """The component that each z (N, d) most probably belongs to: (N,)."""
    return torch.cat([log_joint.argmax(1) for _, log_joint in gmm.log_joints(z)])


# ---- Priors ----------------------------------------------------------------------------------------------------------

def test_priors_against_torch_distributions_and_moments():
    """Densities and moments of draws agree. Neighbouring draws have the same component as often as chance has it
    (0.58). Fitted to draws, the mixture is found again."""
    covariances = torch.tensor([[[1.0, 0.6], [0.6, 0.8]], [[0.5, -0.2], [-0.2, 1.2]]])
    gmm = common.GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-2.0, 1.0], [2.0, 0.0]]),
                                 torch.linalg.cholesky(covariances))
    components = torch.distributions.MultivariateNormal(gmm.means, scale_tril=gmm.factors)
    exact = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(gmm.weights), components)
    z, gen = gmm.sample(20_000, common.generator(0)), common.generator(1)
    assert torch.allclose(gmm.log_prob(z), exact.log_prob(z), rtol=1e-5)
    assert torch.allclose(z.mean(0), exact.mean, atol=0.06)
    spread = (gmm.weights[:, None] * (gmm.means - exact.mean)).T @ (gmm.means - exact.mean)  # of the components' means
    assert torch.allclose(z.T.cov(), spread + torch.einsum("k,kij->ij", gmm.weights, covariances), atol=0.12)
    component = nearest_component(gmm, z)
    assert float((component[1:] == component[:-1]).double().mean()) == pytest.approx(0.58, abs=0.02)

    fit, again = (common.GaussianMixture.fit(z[component.argsort()], 2, 0, rounds=100, subset=4000) for _ in range(2))
    order, held_out = fit.means[:, 0].argsort(), gmm.sample(8000, gen)
    assert torch.allclose(fit.weights[order], gmm.weights, atol=0.015)
    assert torch.allclose(fit.means[order], gmm.means, atol=0.05)
    assert torch.allclose((fit.factors @ fit.factors.mT)[order], covariances, atol=0.07)
    assert float(fit.log_prob(held_out).mean()) == pytest.approx(float(gmm.log_prob(held_out).mean()), abs=0.003)
    assert torch.equal(again.means, fit.means) and torch.equal(again.factors, fit.factors)


@pytest.mark.parametrize("count,components,tied", [(18, 30, False), (40, 2, False), (18, 30, True), (40, 2, True)])
def test_gmm_of_few_points_stays_finite(count, components, tied):
    """With fewer points than components, or with repeated points, the ridge keeps every covariance regular."""
    z = common.randn((count, 4), common.generator(0))
    z[: count // 2] = z[0]
    gmm = common.GaussianMixture.fit(z, components, 0, tied)
    assert gmm.log_prob(z).isfinite().all() and gmm.sample(50, common.generator(0)).isfinite().all()


@pytest.mark.parametrize("scale", [3, 30])
def test_gmm_of_codes_far_from_0(scale):
    """Few codes for each component, and far from 0 (a VAE without a KL has such codes). Rounding then makes some
    covariances less than positive, by more than the usual ridge."""
    gen = common.generator(0)
    z = common.randn((600, 64), gen) * scale * torch.exp(0.7 * common.randn((600, 1), gen))
    gmm = common.GaussianMixture.fit(z.clamp(-99, 99), 10, 0)
    assert gmm.log_prob(z).isfinite().all() and gmm.sample(50, gen).isfinite().all()


def test_covariances_that_no_ridge_mends(capsys):
    expect_error(capsys, lambda: common.GaussianMixture.factors_of(torch.full((1, 2, 2), math.nan)),
                 "mixture of Gaussians cannot be fitted", "larger beta")


@pytest.mark.parametrize("tied", [False, True])
def test_em_by_hand(tied):
    """Two rounds agree with float64, on more z than are processed at a time."""
    z = common.randn((2500, 3), common.generator(0)) * torch.tensor([1.0, 2.0, 0.5]) + 1
    fit = common.GaussianMixture.fit(z, 4, 0, tied, rounds=0)
    z = z[torch.randperm(2500, generator=common.generator(0))].double()
    ridge, weights, means = 1e-3 * torch.eye(3).double(), torch.full((4,), 0.25).double(), z[:4]
    errors = z
    if not tied:  # it begins with k-means
        means, cluster = map(torch.from_numpy, kmeans2((z - z.mean(0)).float().numpy(), 4, minit="++", rng=0))
        means = means.double() + z.mean(0)
        errors = z - means[cluster.long()]
    cov = (errors.T.cov() + ridge).expand(4, 3, 3)
    for _ in range(2):
        joint = weights.log() + torch.distributions.MultivariateNormal(means, cov).log_prob(z[:, None])
        belongs = joint.softmax(1)
        mass = belongs.sum(0)
        weights, means = mass / 2500, belongs.T @ z / mass[:, None]
        centred = z[:, None] - means
        cov = torch.einsum("nk,nki,nkj->kij", belongs, centred, centred) / mass[:, None, None]
        cov = (torch.einsum("k,kij->ij", weights, cov).expand(4, 3, 3) if tied else cov) + ridge
    assert torch.allclose(fit.weights.double(), weights, atol=1e-5)
    assert torch.allclose(fit.means.double(), means, atol=1e-4)
    assert torch.allclose((fit.factors @ fit.factors.mT).double(), cov[: len(fit.factors)], atol=1e-4)


def test_mixture_finds_clusters():
    """Of 25 separate clusters with as many components, it is as likely as the true mixture, but for what 25 fitted
    means and covariances lose. (From random codes eight rounds would lose 0.6 nats: clusters are merged.)"""
    gen = common.generator(3)
    means = 5 * common.randn((25, 6), gen)

    def draw(count):
        return means[torch.randint(25, (count,), generator=gen)] + common.randn((count, 6), gen)

    truth = common.GaussianMixture(torch.full((25,), 1 / 25), means, torch.eye(6)[None])
    fit, held_out = common.GaussianMixture.fit(draw(8000), 25, 0), draw(4000)
    assert float((truth.log_prob(held_out) - fit.log_prob(held_out)).mean()) < 0.3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("offset", [20, 30, 90])
def test_mixture_of_codes_far_from_zero(offset, tied):
    """The fit is that of centred codes, moved. (In float32 the covariance of such codes would be lost in the difference
    E[z z'] - mean mean'.)"""
    z = common.randn((3000, 16), common.generator(0)) * torch.linspace(0.02, 1, 16)
    centred, moved = (common.GaussianMixture.fit(codes, 10, 0, tied) for codes in (z, z + offset))
    assert torch.allclose(moved.means - offset, centred.means, atol=1e-3)
    assert torch.allclose(moved.factors, centred.factors, atol=1e-3)


def test_a_starving_component_keeps_a_covariance(monkeypatch):
    """A component that has hardly a share of any z has the covariance of all z: its three sums are weighted alike."""
    z = common.randn((1000, 2), common.generator(0)) + 3
    monkeypatch.setattr(common.GaussianMixture, "log_joints", lambda _, z: [
        (z, torch.tensor([0, -21.0]).expand(len(z), 2))])
    fit = common.GaussianMixture.fit(z, 2, 0)
    assert torch.allclose(fit.factors[1] @ fit.factors[1].T, z.T.cov(), atol=0.02)


def test_tied_mixture():
    """One covariance for all components. Its density (under bfloat16's autocast, too) and the covariance of draws are
    right. Fitted to few points, such a mixture has a higher held-out density than one with a covariance for each
    component. Fitted to many points, with more components than there are, it finds the covariance."""
    gen = common.generator(0)
    means, factor = 3 * common.randn((20, 10), gen), torch.eye(10) + 0.3 * torch.ones(10, 10).tril(-1)
    gmm = common.GaussianMixture(torch.arange(1, 21) / 210, means, factor[None])
    exact = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(gmm.weights), torch.distributions.
                                                  MultivariateNormal(means, scale_tril=factor.expand(20, -1, -1)))
    points, held_out = (gmm.sample(600, gen) for _ in range(2))
    expected = exact.log_prob(points)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(gmm.log_prob(points), expected, rtol=1e-5)
    z = gmm.sample(20_000, gen)
    within = (z - means[nearest_component(gmm, z)]).T.cov()  # the components lie far apart
    assert torch.allclose(within, factor @ factor.T, atol=0.15)
    own, tied = (common.GaussianMixture.fit(points, 20, 0, tied) for tied in (False, True))
    assert own.factors.shape == (20, 10, 10) and tied.factors.shape == (1, 10, 10)
    assert tied.log_prob(held_out).mean() > own.log_prob(held_out).mean() + 1
    many = common.GaussianMixture.fit(z, 60, 0, True)
    assert float((many.factors[0] @ many.factors[0].T - factor @ factor.T).abs().max()) < 0.3
    assert float(many.log_prob(held_out).mean()) == pytest.approx(float(gmm.log_prob(held_out).mean()), abs=0.4)


# ---- Messages and files ----------------------------------------------------------------------------------------------

def test_write(tmp_path, monkeypatch, capsys):
    """A failure names the path and the remedy, and the old file stays. No temporary file is left. Of several processes
    the first writes."""
    path = tmp_path / "deep" / "file.bin"
    common.write(path, b"old")
    common.write(str(path), b"new")
    assert path.read_bytes() == b"new"
    write_bytes = type(path).write_bytes

    def fail_half_way(self, data):
        write_bytes(self, data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", fail_half_way)
    expect_error(capsys, lambda: common.write(path, b"newer"), str(path), "No space left on device", "free some space",
                 "--out")
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *a: 1 / 0)  # whatever happens, the temporary file goes
    with pytest.raises(ZeroDivisionError):
        common.write(path, b"newer")
    assert path.read_bytes() == b"new"
    expect_error(capsys, lambda: common.write(path / "below-a-file", b""), "below-a-file", "--data-dir")
    monkeypatch.undo()
    for rank in (1, 0):
        monkeypatch.setattr(common, "RANK", rank)
        common.write(path.with_name(f"rank{rank}"), b"")
    assert {p.name for p in path.parent.iterdir()} == {"file.bin", "rank0"}


def test_load_hashed(tmp_path, capsys):
    """The hash must stand whole in the file's name, unless it is given: a name that has only its first digit, or none,
    proves nothing. (The published Inception weights have other names, and their hash is given.)"""
    path = common.save_state(tmp_path / "net-*.pt", {"w": 1})
    digits = path.stem[-8:]
    assert common.load_hashed([path], "what", "advice") == {"w": 1}
    for name in (f"{digits[0]}.pt", f"{digits}.pt", f"net-{digits}.pth", f"net{digits}.pt"):
        other = shutil.copy(path, tmp_path / name)
        expect_error(capsys, lambda other=other: common.load_hashed([other], "what", "advice"), name, "must end in",
                     "advice")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert common.load_hashed([tmp_path / f"net-{digits}.pth"], "what", "advice", sha256) == {"w": 1}


def test_find_images(tmp_path):
    """Images below a folder are sorted by path. The case of a suffix and a hidden folder above do not matter."""
    home = tmp_path / ".above" / "photos"
    for name in ("b.PNG", "a/z.jpeg", "a/é 1.Webp", ".hidden/no.png", "a/.no.png", "notes.txt", "c.npz"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    found = [str(path.relative_to(home)) for path in common.find_images(str(home))]
    assert found == ["a/z.jpeg", "a/é 1.Webp", "b.PNG"] and common.find_images(home / "nowhere") == []


def test_hidden_folders_are_no_classes(tmp_path):
    for place in ("cat", "dog", ".ipynb_checkpoints"):
        for k in range(2):
            save(tmp_path / "cifar10" / "train" / place / f"{k}.png", noise_image(k, 32, 32))
    files, labels, _, _ = common.list_split("cifar10", "train", tmp_path)
    assert labels == [0, 0, 1, 1] and [path.parent.name for path in files] == ["cat", "cat", "dog", "dog"]


@pytest.mark.skipif(os.name == "nt", reason="Windows lets only administrators make links")
def test_links_to_folders_are_followed(tmp_path):
    """Each folder is entered once, even if a link leads back to one above."""
    save(tmp_path / "elsewhere" / "1.png", noise_image(0, 8, 8))
    save(tmp_path / "photos" / "here" / "2.png", noise_image(0, 8, 8))
    (tmp_path / "photos" / "there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "here" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for home in (tmp_path / "photos", tmp_path / "link"):
        found = [str(path.relative_to(home)) for path in common.find_images(home)]
        assert found == ["here/2.png", "there/1.png"]


def test_a_folder_that_cannot_be_listed(tmp_path, capsys, monkeypatch):
    """Its images are not left out silently."""
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    expect_error(capsys, lambda: common.find_images(tmp_path), "closed", "Permission denied")


def test_read_image(tmp_path, capsys, monkeypatch):
    """Of 16-bit grey images the upper 8 bits are kept (PIL alone clips them to white). Palettes are looked up, EXIF
    orientation is applied, transparency dropped."""
    grey = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
    colours = np.random.RandomState(0).randint(0, 256, (20, 40, 3), dtype=np.uint8)
    palette, turned = Image.fromarray(colours).convert("P"), Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    clear = Image.fromarray(np.dstack([colours, colours[..., :1]]))
    cases = [("grey é 16.png", Image.fromarray(grey), {}, np.repeat(grey[..., None] >> 8, 3, 2)),
             ("palette.png", palette, {}, np.asarray(palette.convert("RGB"))),
             ("turned.png", Image.fromarray(colours), {"exif": turned}, np.rot90(colours, -1)),
             ("clear.png", clear, {}, colours)]
    for name, image, options, expected in cases:
        image.save(tmp_path / name, **options)
        assert np.array_equal(common.read_image(tmp_path / name), expected), name
    (tmp_path / "broken.png").write_bytes(b"not an image")
    # The range of these numbers is unknown: all of them could be below 1.
    for name, numbers in (("float.tif", np.float32), ("whole.tif", np.int32)):
        Image.fromarray(np.ones((64, 64), numbers)).save(tmp_path / name)
    for name in ("broken.png", "absent.png", "float.tif", "whole.tif"):
        expect_error(capsys, lambda name=name: common.read_image(tmp_path / name), name, "cannot be read as an image")

    def stumble(image):  # as PIL may do over a damaged EXIF block
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(common.ImageOps, "exif_transpose", stumble)
    expect_error(capsys, lambda: common.read_image(tmp_path / "clear.png"), "clear.png", "cannot be read as an image")


def test_ctrl_c_ends_in_one_line(capsys):
    """Any other error is shown as ever."""
    for kind, shown in ((KeyboardInterrupt, "\nstopped (training of a stage goes on with --resume)\n"),
                        (ValueError, "ValueError: x\n")):
        common.end_in_a_line(kind, kind("x"), None)
        assert capsys.readouterr().err == shown


# ---- Budgets, flags, runs --------------------------------------------------------------------------------------------

def test_flags_replace_the_budget():
    """A flag changes its own setting and nothing else; --steps, those of all networks. The last prior is the default.
    Each data set has its size and its features."""
    train, evaluation, device = common.read_settings(flags(
        *"--budget smoke --steps 5 --batch-size 3 --seed 7 --sampler ddim --sample-steps 999 --eval-samples 50".split(),
        *"--temperature 0.8 --prior gaussian --device cpu".split()))
    plain, measured = common.budget("smoke", "shapes", 32)
    assert train == plain | {"dataset": "shapes", "image_size": 32, "budget": "smoke", "seed": 7, "vae_steps": 5,
                             "unet_steps": 5, "flow_steps": 5, "batch": 3}
    longer, _, _ = common.read_settings(flags(*"--budget smoke --steps 5000 --device cpu".split()))
    assert longer["unet_steps"] == 5000 and longer["flow_steps"] == plain["flow_steps"] < 5000
    assert evaluation == measured | {"sampler": "ddim", "sample_steps": 999, "count": 50, "grid_count": 50,
                                     "temperature": 0.8, "features": "local", "prior": "gaussian"} and device == CPU
    for argv, size, features in ((["folder"], 64, "inception"), (["folder", "--image-size", "32"], 32, "inception"),
                                 (["cifar10"], 32, "inception"), (["celeba64", "--features", "local"], 64, "local"),
                                 (["shapes"], 32, "local")):
        train, evaluation, _ = common.read_settings(flags("--budget", "paper", "--device", "cpu", "--dataset", *argv))
        assert (train["image_size"], evaluation["features"], evaluation["prior"]) == (size, features, "gmm")


def test_flags_that_are_refused(capsys):
    """Values out of range are refused, and an image size where the data set has its own."""
    for argv, words in ((["--batch-size", "100000"], "--batch-size 100000: must lie between 1 and 4096"),
                        (["--batch-size", "0"], "--batch-size 0"), (["--steps", "0"], "--steps 0"),
                        (["--seed", "-1"], "--seed -1"), (["--temperature", "2.1"], "--temperature 2.1"),
                        (["--eval-samples", "39"], "--eval-samples 39"), (["--export", "0"], "--export 0"),
                        (["--sample-steps", "1001"], "--sample-steps 1001"),
                        *((["--image-size", "64", "--dataset", name], "--image-size 64: for --dataset folder alone; "
                           f"{name} has its own size") for name in common.DATASETS)):
        expect_error(capsys, lambda argv=argv: common.read_settings(flags(*argv, "--device", "cpu")), words)


def test_settings_that_are_changed(capsys):
    """Every value has its setting's type, and of two the last one counts. The changes are kept apart from the settings,
    which are the budget's and the flags'. In the name they come in the order in which they are given."""
    argv = "--device cpu --budget smoke --batch-size 3".split()
    given = flags(*argv, "--set", "beta=2", "start=300", "tied=true", "even_levels=FALSE", "objective=eps",
                  "vae_lr=1e-5", "unet_steps=12", "batch=6", "beta=1")
    train, _, _ = common.read_settings(given)
    changes = {"beta": 1.0, "start": 300, "tied": True, "even_levels": False, "objective": "eps", "vae_lr": 1e-5,
               "unet_steps": 12, "batch": 6}
    assert given.changes == changes and [type(value) for value in given.changes.values()] == [
        float, int, bool, bool, str, float, int, int]
    assert train == common.read_settings(flags(*argv))[0] and train["batch"] == 3
    assert common.name_changes(given.changes) == (
        "-beta=1-start=300-tied=True-even_levels=False-objective=eps-vae_lr=1e-05-unet_steps=12-batch=6")
    assert common.name_changes({}) == "" and common.name_changes({"beta": 0.25}) == "-beta=0.25"


def test_warmup_may_be_a_share_with_every_budget():
    for budget in ("smoke", "cpu", "gpu", "paper"):
        given = flags("--device", "cpu", "--budget", budget, "--set", "warmup=0.1")
        common.read_settings(given)
        assert given.changes == {"warmup": 0.1}


SET_ERRORS = [
    (["steps=5", "unet=[]", "attention=16", "heads=3", "encoder=1", "seed=1", "image_size=64", "dataset=cifar10", "=3",
      "Beta=1"],
     ["no such setting", "vae_steps, unet_steps", "beta, pool"]),
    (["beta", "decay", "objective"], ["has no value", "=VALUE"]),
    (["beta=", "beta=much", "beta=nan", "beta=inf", "beta=-0.1", "beta=1,5", "vae_clip=1e10"],
     ["must be a number from 0 to 1,000,000,000"]),
    (["components=many", "components=1.5"], ["must be a whole number from 1 to 1,000,000,000"]),
    (["vae_steps=1.5", "vae_steps=1e3", "unet_steps=10000001"], ["must be a whole number from 1 to 10,000,000"]),
    (["batch=-1", "batch=4097"], ["must be a whole number from 1 to 4,096"]),
    (["vae_steps=1800-unet_steps=1200", "vae_steps=9,beta=1"], ["write a space between several settings"]),
    (["start=1", "start=1001", "start=12.5"], ["must be a whole number from 2 to 1,000"]),
    (["vae_ema=1.5", "unet_ema=-1", "dropout=2"], ["must be a number from 0 to 1"]),
    (["tied=1", "even_levels=yes", "pool="], ["must be true or false"]),
    (["objective=x0", "objective=EPS"], ["must be eps or v"])]


@pytest.mark.parametrize("text,words", [(text, words) for texts, words in SET_ERRORS for text in texts])
def test_changes_that_are_refused(text, words, capsys):
    """One line names the change, and says what is allowed: other settings, or values. Settings that have flags, and
    those that are lists, cannot be set."""
    argv = ["--device", "cpu", "--budget", "smoke", "--set", "tied=true", text]
    expect_error(capsys, lambda: common.read_settings(flags(*argv)), f"--set {text}: ", *words)


@pytest.mark.parametrize("text", ["batch=0", "every=0", "vae_steps=0", "unet_steps=0", "components=0"])
def test_numbers_that_nothing_can_be_made_of(text, capsys):
    """Most settings may be 0, which often means that something is left out. These may not: there is no batch of no
    image, no training of no step, no row of the log after no step, no mixture without components."""
    argv = ["--device", "cpu", "--budget", "smoke", "--set", text]
    expect_error(capsys, lambda: common.read_settings(flags(*argv)), f"--set {text}: must be a whole number from 1 to")


def test_checkpoint_round_trip_and_damage(tmp_path, capsys):
    """A damaged file, or one that contains code, is refused with one line. With one wrong bit a file is refused, unless
    all values are right all the same."""
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    path, rng, refused = tmp_path / "checkpoint.pt", random.Random(0), 0
    state = {"train": {"seed": 0}, "finished": True, "unet": {"w": common.randn((50, 50), common.generator(0))}}
    common.save_state(path, state)
    assert same(common.load_checkpoint(path), state)
    whole = path.read_bytes()
    for _ in range(20):
        damaged, where = bytearray(whole), rng.randrange(len(whole))
        damaged[where] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(common.load_checkpoint(path)["unet"], state["unet"])
        except SystemExit:
            refused += 1
    assert refused > 12 and "checksum" in capsys.readouterr().err
    for foreign in (b"", b"garbage", whole[: len(whole) // 2], whole[:-30], {"other": 1}, [1, 2],
                    state | {"x": Malicious()}):
        torch.save(foreign, path)
        if isinstance(foreign, bytes):
            path.write_bytes(foreign)
        expect_error(capsys, lambda: common.load_checkpoint(path), "checkpoint.pt", "remove")
    assert not (tmp_path / "made").exists()
    expect_error(capsys, lambda: common.load_checkpoint(tmp_path / "none.pt"), "none.pt")


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, capsys):
    """A folder stands for it here, which cannot be opened as a file, either."""
    with pytest.raises(SystemExit):
        common.load_checkpoint(tmp_path)
    assert "damaged" not in (error := capsys.readouterr().err) and "remove" not in error and str(tmp_path) in error


def test_where_training_begins(tmp_path, capsys):
    """A new folder, or one without a checkpoint: None. A finished run: its checkpoint. An unfinished one: None with
    --resume, else an error."""
    train, folder = {"unet_steps": 8, "seed": 0, "unet": [[32, 8, 1, 1]]}, tmp_path / "run"
    checkpoint = folder / "checkpoint.pt"
    for resume in (False, True):
        common.write_json(folder / "metrics.json", {})  # of a damaged checkpoint, removed as the message says
        assert common.finished_state(folder, train, resume) is None and not (folder / "metrics.json").exists()
        assert json.loads((folder / "config.json").read_text()) == {"train": train}
        assert (f"nothing to resume in {folder}" in capsys.readouterr().out) == resume
    common.save_state(checkpoint, {"train": train, "finished": False, "steps": 3})
    expect_error(capsys, lambda: common.finished_state(folder, train, False), str(folder), "--resume")
    assert common.finished_state(folder, train, True) is None
    for resume in (False, True):
        common.save_state(checkpoint, {"train": train, "finished": True, "steps": 8})
        assert common.finished_state(folder, train, resume)["steps"] == 8
        common.save_state(checkpoint, {"train": train | {"unet_steps": 9}, "finished": True})
        expect_error(capsys, lambda r=resume: common.finished_state(folder, train, r), "unet_steps was 9, is now 8",
                     "--out")
        checkpoint.write_bytes(checkpoint.read_bytes()[:-30])
        expect_error(capsys, lambda r=resume: common.finished_state(folder, train, r), str(checkpoint), "remove")


def test_first_difference():
    """What the user has set comes before what follows from it: a size before the network's tables."""
    old = {"a": 1, "decoder": [[1, 8, 0]], "encoder": [[32, 8, 0]], "image_size": 32, "seed": 0, "n_train": 7}
    assert common.first_difference(old, dict(reversed(old.items()))) is None
    assert common.first_difference(old, old | {"decoder": [], "encoder": [], "image_size": 64, "seed": 1}) == (
        "image_size was 32, is now 64")
    assert common.first_difference(old, old | {"n_train": 8, "encoder": []}) == "encoder was [[32, 8, 0]], is now []"
    assert common.first_difference({"a": 1}, {"a": 1, "c": 0}) == "c was None, is now 0"
    steps = {"a": 1, "seed": 0, "unet_steps": 5, "vae_steps": 5}  # those come before the seed, and that before all else
    assert common.first_difference(steps, {"a": 2, "seed": 1, "unet_steps": 6, "vae_steps": 7}) == (
        "vae_steps was 5, is now 7")
    assert common.first_difference(steps, steps | {"a": 2, "seed": 1, "unet_steps": 6}) == "unet_steps was 5, is now 6"


# ---- A model ---------------------------------------------------------------------------------------------------------

def test_generate(tiny):
    """z comes from the named prior, x_hat = Dec(z) is refined if there is a refiner, in the model's precision, and any
    number of images can be drawn."""
    before, after, seconds = common.generate(tiny, 10, "gaussian", "dpm", 3, 0, 4)
    assert before.shape == after.shape == (10, 3, 32, 32) and before.dtype == after.dtype == torch.uint8 and seconds > 0
    assert (before.int() - after.int()).abs().max() <= 1 and len(before.flatten(1).unique(dim=0)) == 10
    alone = common.generate(dataclasses.replace(tiny, denoiser_for=None), 10, "gaussian", "none", 0, 0, 4)
    assert torch.equal(alone[0], before) and torch.equal(alone[1], before)
    assert not torch.equal(common.generate(tiny, 10, "gaussian", "dpm", 3, 1, 4)[0], before)
    tiny.priors["zero"] = SimpleNamespace(sample=lambda count, gen: torch.zeros(count, 8))
    for tiny.reduced in (False, True):
        with common.autocast(CPU, tiny.reduced):
            exact = common.to_uint8(tiny.vae.decoder(torch.zeros(4, 8)))
        assert torch.equal(common.generate(tiny, 4, "zero", "dpm", 2, 0, 4)[0], exact)


def test_seconds_per_image(tiny, monkeypatch):
    """With a clock that is a second later whenever it is read, each batch of four takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(common, "time", SimpleNamespace(time=lambda: float(next(ticks))))
    assert common.generate(tiny, 10, "gaussian", "dpm", 2, 0, 4)[2] == 1 / 4


def test_chart_of_the_training(tmp_path):
    """Returned is the last row of the log: what holds at the end."""
    log = [{"step": 1, "weight": 0.003}, {"step": 50, "weight": 0.03}]
    assert common.draw_training(tmp_path, log) == {"weight": 0.03}
    assert Image.open(tmp_path / "training.png").width > 300


def test_damage_is_not_in_the_clean_x_hat(tiny):
    """The refiner is shown x_hat with noise, and beside it Dec(z) without. If no noise was added, both are the same."""
    shown, denoiser_for = [], tiny.denoiser_for
    tiny.denoiser_for = lambda x_hat, z, clean: shown.append((x_hat, z, clean)) or denoiser_for(x_hat, z, clean)
    for damage in (0.0, 0.3):
        common.generate(tiny, 4, "gaussian", "dpm", 2, 0, 4, damage)
        x_hat, z, clean = shown.pop()
        assert torch.equal(clean, tiny.vae.decoder(z))
        assert float((x_hat - clean).std()) == pytest.approx(damage, rel=0.05)
    common.refine(tiny, x_hat, z, common.generator(0), "dpm", 2)
    assert shown[0][2] is shown[0][0] is x_hat


def test_encode_and_fit_mixture(tiny, monkeypatch, capsys):
    """The batch size changes nothing. Of few images several z are drawn, which gives a better mixture. Codes that are
    not finite, or far out, are refused."""
    (images, *_), (others, *_) = draw_all(300, 5), draw_all(500, 6)
    mu, logvar = common.encode(tiny.vae, images, CPU)
    again = common.encode(tiny.vae, images, CPU, batch=7)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip((mu, logvar), again, strict=True))
    z = common.reparameterise(mu, logvar, common.randn((300, 8), common.generator(0)))
    held_out = common.reparameterise(*common.encode(tiny.vae, others, CPU), common.randn((500, 8), common.generator(9)))
    many = common.GaussianMixture(**common.fit_mixture(tiny.vae, images[:200], settings(), CPU))
    one = common.GaussianMixture.fit(z[:200], 2, 0)
    assert float(many.log_prob(held_out).mean()) > float(one.log_prob(held_out).mean())
    fitted = []
    monkeypatch.setattr(common.GaussianMixture, "fit", lambda *how: fitted.append(how) or one)
    for count, draws in ((200, 10), (20_000, 3), (70_000, 1)):
        monkeypatch.setattr(common, "encode", lambda *a, n=count: torch.zeros(2, n, 1))
        codes = common.draw_codes(None, None, 0, CPU)
        assert len(codes) == draws * count and float(codes.std()) == pytest.approx(1, abs=0.06)
        assert len(codes.unique()) > 0.99 * draws * count  # every draw has its own noise
    common.fit_mixture(None, None, settings(components=7, tied=True), CPU)
    assert torch.equal(fitted[0][0], codes) and fitted[0][1:] == (7, 0, True)
    assert not torch.equal(common.draw_codes(None, None, 1, CPU), codes)
    for value in (101.0, math.nan):
        monkeypatch.setattr(common, "encode", lambda *a, value=value: (torch.full((9, 1), value), torch.zeros(9, 1)))
        expect_error(capsys, lambda: common.draw_codes(None, None, 0, CPU), "the VAE diverged", "beyond 100")


# ---- Pictures --------------------------------------------------------------------------------------------------------

def test_grid(tmp_path):
    """One tile per image, in order, with labels on the left."""
    rows = {"a": [10, 20, 30], "bb": [230, 240, 250]}
    common.save_grid(tmp_path / "grid.png", {label: torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(
        3, 3, 32, 32) for label, values in rows.items()})
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    margin = 8 + 7 * 2
    assert grid.shape == (2 * 98, margin + 3 * 98, 3) and (grid[:98, :margin].min() < 100) and grid[:, -1].min() == 255
    assert grid[48::98, margin + 48 :: 98, 0].tolist() == list(rows.values())
