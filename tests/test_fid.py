"""fid.py against closed forms, brute force, torchvision's blocks, a frozen fingerprint and a local download server."""

import gc
import hashlib
import http.server
import io
import json
import math
import os
import re
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import fid


def expect_error(capsys, call, *words):
    """`call` must exit with status 2 and print one line `error: ...` that contains every word."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    text = capsys.readouterr().err.replace("\x1b[A", "")  # tqdm's cursor movements
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip() and "B/s]" not in line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]


def gaussian(n, d, seed=0, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.RandomState(seed).randn(n, d) * scale + shift)


def stats(x, *more):
    result = fid.FeatureStats().update(x)
    for part in more:
        result.update(part)
    return result


def exact_stats(mean, cov, count=1000):
    """Statistics with just this mean and covariance."""
    mean, cov = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, cov))
    return fid.FeatureStats(count, mean, cov * (count - 1))


def random_images(n, size=32, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (n, 3, size, size), dtype=np.uint8))


def smooth_images(n, size=32, seed=0):
    """Images with some structure: coarse noise, enlarged."""
    coarse = torch.from_numpy(np.random.RandomState(seed).rand(n, 3, 4, 4)).float()
    return (F.interpolate(coarse, (size, size), mode="bilinear") * 255).round().to(torch.uint8)


def save_folder(images, folder, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04}.{suffix}")
    return str(folder)


# ---- Small things ----------------------------------------------------------------------------------------------------

def test_write_replaces_only_whole_files(tmp_path, monkeypatch, capsys):
    """Success renames; a failure keeps the old file and names the path; in neither case a temporary file stays."""
    path = tmp_path / "deep" / "file.bin"
    fid.write(path, b"old")
    fid.write(str(path), b"new")
    assert path.read_bytes() == b"new"
    write_bytes = type(path).write_bytes

    def full_disk(self, data):
        write_bytes(self, data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full_disk)
    expect_error(capsys, lambda: fid.write(path, b"newer"), str(path), "No space left", "--out")
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *a: 1 / 0)  # whatever happens, the temporary file goes
    with pytest.raises(ZeroDivisionError):
        fid.write(path, b"newer")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["file.bin"]
    expect_error(capsys, lambda: fid.write(path / "below-a-file", b""), "below-a-file", "--data-dir")


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(fid.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(fid.distributed, "get_rank", lambda rank=rank: rank)
        fid.write(tmp_path / "a" / f"{rank}", b"")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "0"]


def test_an_error_while_forgotten_bars_are_about(capsys):
    """Bars in reference cycles, which nobody closed, are not collected in the midst of printing the error."""
    class Stream(io.StringIO):
        def __eq__(self, other):  # tqdm asks this as it goes through its bars
            gc.collect()
            return False

    gc.disable()
    alive = fid.tqdm(total=3, file=Stream())
    for _ in range(5):
        forgotten = [fid.tqdm(total=3, file=Stream())]
        forgotten.append(forgotten)
    del forgotten
    expect_error(capsys, lambda: fid.fail("this or that"), "this or that")
    alive.close()
    gc.enable()


def test_find_images(tmp_path):
    """Below a folder, whatever the case of the suffix, sorted by path; a hidden folder above does not matter."""
    home = tmp_path / ".above" / "photos"
    for name in ("b.PNG", "a/z.jpeg", "a/é 1.Webp", ".hidden/no.png", "a/.no.png", "notes.txt", "c.npz"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    found = [str(path.relative_to(home)) for path in fid.find_images(str(home))]
    assert found == ["a/z.jpeg", "a/é 1.Webp", "b.PNG"] and fid.find_images(home / "nowhere") == []


def test_read_image(tmp_path, capsys):
    """16-bit grey keeps its upper 8 bits (PIL alone clips it to white), palettes are looked up, EXIF turns upright."""
    grey = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
    colours = np.random.RandomState(0).randint(0, 256, (20, 40, 3), dtype=np.uint8)
    palette, turned = Image.fromarray(colours).convert("P"), Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    Image.fromarray(grey).save(tmp_path / "grey é 16.png")  # names with spaces and other letters are names, too
    palette.save(tmp_path / "palette.png")
    Image.fromarray(colours).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.dstack([colours, colours[..., :1]])).save(tmp_path / "clear.png")
    read = lambda name: np.asarray(fid.read_image(tmp_path / name))  # noqa: E731
    assert (read("grey é 16.png") == (grey >> 8)[..., None]).all()
    assert np.array_equal(read("palette.png"), np.asarray(palette.convert("RGB")))
    assert np.array_equal(read("turned.png"), np.rot90(colours, -1)) and np.array_equal(read("clear.png"), colours)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for name in ("broken.png", "absent.png"):
        expect_error(capsys, lambda name=name: fid.read_image(tmp_path / name), name, "cannot be read as an image")


def test_the_lowest_layer():
    """Nothing of the project is imported, but inside the two functions that take data sets by name."""
    lines = open(fid.__file__).read().splitlines()
    imports = [line for line in lines if re.match(r" *(import|from) (common|stage|bonus|final)", line)]
    assert imports == ["    import common"] * 2


# ---- Inception -------------------------------------------------------------------------------------------------------

def seeded_state(net):
    """Well-scaled random weights from numpy's frozen generator; torch's defaults would make the features collapse."""
    random, state = np.random.RandomState(0), {}
    for key, value in net.state_dict().items():
        shape = tuple(value.shape)
        if key.endswith("num_batches_tracked"):
            continue
        if "bn.weight" in key or "running_var" in key:
            new = random.uniform(0.7, 1.3, shape)
        elif "bn.bias" in key or "running_mean" in key:
            new = random.normal(0, 0.1, shape)
        else:
            new = random.standard_normal(shape) * math.sqrt((2 if "conv" in key else 1) / max(1, math.prod(shape[1:])))
        state[key] = torch.from_numpy(np.asarray(new, dtype=np.float32))
    return state


@pytest.fixture(scope="module")
def net():
    net = fid.InceptionV3()
    net.load_state_dict(seeded_state(net), strict=False)
    return net


@pytest.fixture(scope="module")
def picture():
    return smooth_images(1, 64, seed=3)


@pytest.fixture(scope="module")
def answer(net, picture):
    with torch.no_grad():
        return net(picture)


def normalised(picture):
    rows = fid.resize_matrix(picture.shape[-1], 299)
    return (rows @ picture.float() @ rows.T - 128) / 128


def layers(net, x):
    """Normalised (B, 3, 299, 299) -> pool3 (B, 2048)."""
    with torch.no_grad():
        return torch.nn.Sequential(*[*net.children()][:-2])(x).flatten(1)


FINGERPRINT = [0.02658, 0.13193, 0.8576, 2.8705, 1.75571, 0.01476, 0.99666, 0.01696,  # pool3[::256]
               0.65822, 0.53752, 0.14517, 1.40225, -1.24928, 0.12982, -1.22742, 1.89449]  # logits[::126]


def test_inception_fingerprint_is_frozen(net, answer):
    """Numbers from another implementation, of every block by hand."""
    pool3, logits = answer
    assert pool3.shape == (1, 2048) and logits.shape == (1, 1008)
    assert [*pool3[0, ::256].tolist(), *logits[0, ::126].tolist()] == pytest.approx(FINGERPRINT, abs=1e-4)
    torch.testing.assert_close(net.fc(pool3) - net.fc.bias, logits, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in net.parameters()) == 23_850_960 and len(net.state_dict()) == 566


def wrong_average(net):
    fid.change_pool(net.Mixed_5b, partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1))


def wrong_last_pool(net):
    fid.change_pool(net.Mixed_7c, partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False))


def wrong_epsilon(net):
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-5


@pytest.mark.parametrize("mutate", [wrong_average, wrong_last_pool, wrong_epsilon])
def test_each_wrong_patch_is_caught(mutate, net, picture, answer):
    wrong = fid.InceptionV3()
    wrong.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(wrong(picture)[0], answer[0], atol=1e-5, rtol=0)
        mutate(wrong)
        assert (wrong(picture)[0] - answer[0]).abs().max() > 1e-4


def test_wrong_scaling_resize_and_classes_are_caught(net, picture, answer):
    x = normalised(picture)
    torch.testing.assert_close(layers(net, x), answer[0], atol=1e-5, rtol=0)
    half_pixel = F.interpolate(picture.float(), (299, 299), mode="bilinear")
    for wrong in ((x * 128 + 128) / 127.5 - 1, (half_pixel - 128) / 128):
        assert (layers(net, wrong) - answer[0]).abs().max() > 1e-4
    state = dict(net.state_dict(), **{"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        fid.InceptionV3().load_state_dict(state)


def test_pools_block_by_block(net):
    blocks = {name: block for name, block in net.named_children() if hasattr(block, "branch_pool")}
    assert len(blocks) == 9
    for name, block in blocks.items():
        seen = []
        handle = block.branch_pool.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        ones = torch.ones(1, block.branch_pool.conv.in_channels, 5, 5)
        spike = torch.zeros_like(ones)
        spike[..., 2, 2] = 7
        with torch.no_grad():
            block(ones), block(spike)
        handle.remove()
        assert torch.equal(seen[0], ones)  # padding is not counted
        centre = torch.full((3, 3), 7.0 if name == "Mixed_7c" else 7 / 9)
        torch.testing.assert_close(seen[1][0, 0, 1:4, 1:4], centre)


# ---- Resize ----------------------------------------------------------------------------------------------------------

def test_resize_by_hand():
    assert fid.resize_matrix(2, 4).tolist() == [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    image, m = torch.tensor([[0.0, 4.0], [8.0, 12.0]]), fid.resize_matrix(2, 4)
    assert (m @ image @ m.T).tolist() == [[0, 2, 4, 4], [4, 6, 8, 8], [8, 10, 12, 12], [8, 10, 12, 12]]
    assert torch.equal(fid.resize_matrix(299, 299), torch.eye(299))


@pytest.mark.parametrize("size", [1, 31, 32, 64, 299, 500])
def test_resize_keeps_constants_and_equals_interpolation(size):
    m, x = fid.resize_matrix(size, 299), np.random.RandomState(size).rand(size) * 255
    torch.testing.assert_close(m.sum(1), torch.ones(299))
    peer = np.interp(np.arange(299) * size / 299, np.arange(size), x)  # TensorFlow 1's rule, beyond the edge constant
    np.testing.assert_allclose(m.numpy() @ x, peer, atol=1e-3)


# ---- The Frechet distance --------------------------------------------------------------------------------------------

def test_frechet_closed_forms():
    one = fid.frechet_distance(exact_stats([1.0], [[4.0]]), exact_stats([3.0], [[9.0]]))
    assert one == pytest.approx(4 + 1, rel=1e-12)  # (mu - mu')^2 + (sigma - sigma')^2
    a, b = torch.rand(6, dtype=torch.float64) + 0.1, torch.rand(6, dtype=torch.float64) + 0.1
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert fid.frechet_distance(exact_stats(a * 0, a.diag()), exact_stats(a * 0, b.diag())) == pytest.approx(expected)
    q = torch.linalg.qr(gaussian(6, 6))[0]  # commuting: the same eigenvectors
    assert fid.frechet_distance(exact_stats(a * 0, q @ a.diag() @ q.T), exact_stats(a * 0, q @ b.diag() @ q.T)) \
        == pytest.approx(expected, rel=1e-11)
    eye = torch.eye(5)
    assert fid.frechet_distance(exact_stats(torch.zeros(5), eye), exact_stats(torch.full((5,), 2.0), eye)) \
        == pytest.approx(20, rel=1e-12)


def test_frechet_invariances():
    x, y = gaussian(300, 8), gaussian(200, 8, seed=1) * torch.arange(1, 9) + 0.5
    value = fid.frechet_distance(stats(x), stats(y))
    q = torch.linalg.qr(gaussian(8, 8, seed=2))[0]
    assert value > 1
    assert fid.frechet_distance(stats(y), stats(x)) == pytest.approx(value, rel=1e-11)
    assert fid.frechet_distance(stats(x @ q + 3), stats(y @ q + 3)) == pytest.approx(value, rel=1e-10)
    assert fid.frechet_distance(stats(5 * x), stats(5 * y)) == pytest.approx(25 * value, rel=1e-10)
    assert fid.frechet_distance(stats(x), stats(x)) < 1e-10
    with pytest.raises(ValueError, match="8 and 7"):
        fid.frechet_distance(stats(x), stats(y[:, :7]))


def sqrtm_distance(x, y):
    """The form of the peers, here only to be compared with."""
    (m1, s1), (m2, s2) = ((v.mean(0), np.cov(v, rowvar=False)) for v in (x.numpy(), y.numpy()))
    return np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2)).real


@pytest.mark.parametrize("n, d, tolerance", [(400, 64, 1e-9), (1200, 512, 1e-9), (40, 64, 1e-5), (100, 128, 1e-5)])
def test_frechet_against_sqrtm(n, d, tolerance):
    x, y = gaussian(n, d), gaussian(n + 10, d, seed=1, scale=1.3, shift=0.2)
    assert fid.frechet_distance(stats(x), stats(y)) == pytest.approx(sqrtm_distance(x, y), rel=tolerance)


def test_frechet_where_covariances_are_singular():
    x, y = gaussian(500, 16), gaussian(400, 16, seed=1, scale=1.4)
    value = fid.frechet_distance(stats(x), stats(y))
    dead = torch.zeros(1, 48, dtype=torch.float64)
    wide = [stats(torch.cat([v, dead.expand(len(v), -1)], 1)) for v in (x, y)]
    assert fid.frechet_distance(*wide) == pytest.approx(value, rel=1e-10)  # dead columns change nothing
    few, many = gaussian(10, 64), gaussian(3000, 64, seed=1)
    cross = torch.linalg.svdvals((few - few.mean(0)) @ (many - many.mean(0)).T).sum() / math.sqrt(9 * 2999)
    exact = (few.mean(0) - many.mean(0)).square().sum() + stats(few).cov.trace() + stats(many).cov.trace() - 2 * cross
    assert stats(few).root.shape == (64, 9)
    assert fid.frechet_distance(stats(few), stats(many)) == pytest.approx(exact.item(), rel=1e-10)
    repeated = few[:8].repeat(64, 1)
    assert stats(repeated).root.shape == (64, 7) and fid.frechet_distance(stats(repeated), stats(repeated)) < 1e-10
    flat = stats(torch.ones(5, 64))  # no spread at all
    assert fid.frechet_distance(flat, stats(many)) == pytest.approx(
        ((1 - many.mean(0)).square().sum() + stats(many).cov.trace()).item(), rel=1e-12)


# ---- Streaming -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("splits", [[200], [1] * 200, [1, 150, 49], [99, 101]])
def test_streaming_equals_two_passes(offset, splits):
    x = gaussian(200, 7) * torch.arange(1, 8) + offset
    streamed = stats(*x.split(splits))
    assert streamed.count == 200 and streamed.mean.dtype == torch.float64
    np.testing.assert_allclose(streamed.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(streamed.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10)


def test_merging_and_refusals():
    x = gaussian(90, 5, shift=100)
    merged = stats(x[:30]).merge(stats(x[30:])).merge(fid.FeatureStats())
    torch.testing.assert_close(merged.cov, stats(x).cov, rtol=1e-12, atol=1e-12)
    assert merged.count == 90
    root = merged.root
    assert merged.root is root  # kept ...
    merged.update(x[:3])
    assert merged.root is not root  # ... until more is seen
    for few in (fid.FeatureStats(), stats(x[:1])):
        with pytest.raises(ValueError, match="at least 2"):
            few.cov  # noqa: B018


# ---- Inception Score -------------------------------------------------------------------------------------------------

def slow_inception_score(logits, splits, order):
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True))[order]
    values = []
    for i in range(splits):
        part = p[i * len(p) // splits:(i + 1) * len(p) // splits]
        values.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return np.mean(values), np.std(values)


def test_inception_score_closed_forms():
    assert fid.inception_score(torch.ones(50, 7)) == pytest.approx((1, 0), abs=1e-12)
    one_hot = 1e4 * torch.eye(10).repeat(30, 1)  # every class equally often; logits of 1e4 give no nan
    assert fid.inception_score(one_hot, splits=1)[0] == pytest.approx(10, rel=1e-12)
    ordered = one_hot[one_hot.argmax(1).argsort()]
    assert fid.inception_score(ordered, seed=None)[0] == pytest.approx(1, rel=1e-12)  # sorted: one class per part
    assert fid.inception_score(ordered)[0] > 7


@pytest.mark.parametrize("n, splits", [(100, 10), (103, 10), (25, 10), (7, 3)])
def test_inception_score_equals_the_plain_formula(n, splits):
    logits = gaussian(n, 12, scale=2)
    plain = slow_inception_score(logits.numpy(), splits, np.arange(n))
    assert fid.inception_score(logits, splits, seed=None) == pytest.approx(plain, rel=1e-9)
    shuffled = slow_inception_score(logits.numpy(), splits, np.random.RandomState(2020).permutation(n))
    assert fid.inception_score(logits, splits) == pytest.approx(shuffled, rel=1e-9)  # torch-fidelity's order
    assert fid.inception_score(logits.roll(1, 0), splits)[0] != pytest.approx(shuffled[0], rel=1e-9)


# ---- KID -------------------------------------------------------------------------------------------------------------

def slow_kid(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n, m, xx, yy = len(x), len(y), kernel(x, x), kernel(y, y)
    return ((xx.sum() - np.trace(xx)) / n / (n - 1) + (yy.sum() - np.trace(yy)) / m / (m - 1) - 2 * kernel(x, y).mean())


def test_kid_equals_brute_force(monkeypatch):
    x, y = gaussian(90, 6).float(), gaussian(70, 6, seed=1, shift=0.5).float()
    for chunk in (512, 90, 32, 1):
        monkeypatch.setattr(fid, "CHUNK", chunk)
        assert fid.kid(x, y, size=None) == pytest.approx(slow_kid(x, y), rel=1e-12)
        assert fid.kid(x, x, size=None) == pytest.approx(slow_kid(x, x), rel=1e-12)  # one array on both sides
    random, values = np.random.RandomState(2020), []
    for _ in range(5):  # torch-fidelity's order of draws
        i, j = random.choice(90, 40, replace=False), random.choice(70, 40, replace=False)
        values.append(slow_kid(x[i], y[j]))
    assert fid.kid(x, y, subsets=5, size=40) == pytest.approx(np.mean(values), rel=1e-12)
    with pytest.raises(ValueError, match="subsets of 71"):
        fid.kid(x, y, size=71)


def test_kid_is_unbiased():
    values = [fid.kid(gaussian(60, 8, seed=2 * i), gaussian(60, 8, seed=2 * i + 1), size=None) for i in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(60)
    assert min(values) < 0 < fid.kid(gaussian(60, 8), gaussian(60, 8, seed=1, shift=0.5), size=None)


# ---- Precision and recall --------------------------------------------------------------------------------------------

def slow_precision_recall(real, generated, k):
    def covered(x, centres):
        radius = [sorted(math.dist(c, o) for o in centres)[k] for c in centres]
        return np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, radius, strict=True)) for p in x])

    real, generated = real.tolist(), generated.tolist()
    return covered(generated, real), covered(real, generated)


def test_precision_recall_by_hand():
    real, generated = torch.tensor([[0.0], [1], [2], [10]]), torch.tensor([[0.5], [1.5], [30], [31]])
    # k=1: real balls reach 1, 1, 1, 8; generated ones 1, 1, 1, 1
    assert fid.precision_recall(real, generated, k=1) == (0.5, 0.75)
    assert fid.precision_recall(generated, real, k=1) == (0.75, 0.5)


@pytest.mark.parametrize("chunk", [512, 50, 7])
def test_precision_recall_equals_brute_force(chunk, monkeypatch):
    monkeypatch.setattr(fid, "CHUNK", chunk)
    real, generated = gaussian(50, 3), gaussian(60, 3, seed=1, scale=1.2, shift=0.8)
    precision, recall = fid.precision_recall(real, generated)
    assert (precision, recall) == pytest.approx(slow_precision_recall(real, generated, 3)) and recall != precision < 1


def test_precision_recall_of_collapse_duplicates_and_too_few():
    real = gaussian(200, 4)
    precision, recall = fid.precision_recall(real, real[:1] + 0.001 * gaussian(200, 4, seed=1))
    assert precision == 1 and recall < 0.05
    twice = (gaussian(30, 2048).float() * 3 + 1).repeat(5, 1)  # five copies of each: radius 0, found only by `<=`
    assert fid.precision_recall(twice, twice) == (1, 1)
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(real, real[:3])


def test_diversity():
    x = gaussian(60, 5)
    assert fid.diversity(x, x) == pytest.approx(1, rel=1e-12)
    assert fid.diversity(x, 0.5 * x + 7) == pytest.approx(0.5, rel=1e-9)
    assert fid.diversity(x, x[:1].repeat(60, 1)) == 0
    y = gaussian(50, 5, seed=1, scale=2)
    distances = [np.mean([math.dist(a, b) for i, a in enumerate(v) for b in v[:i]]) for v in (x.tolist(), y.tolist())]
    assert fid.diversity(x, y) == pytest.approx(distances[1] / distances[0], rel=1e-9)


# ---- The door, batches, weights --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def local():
    """A local network with seeded random weights and honest batch statistics."""
    torch.manual_seed(0)
    net = fid.LocalNet(6)
    with torch.no_grad():
        for _ in range(20):
            net.body(smooth_images(64).float() / 127.5 - 1)
    return net.eval()


def test_batch_size_changes_nothing(local, net):
    images = random_images(23)
    whole = fid.extract(local, images, batch_size=23)
    for other in (fid.extract(local, images, batch_size=1), fid.extract(local, images, batch_size=7),
                  fid.extract(local, list(images))):
        torch.testing.assert_close(other[0], whole[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other[1], whole[1], atol=1e-5, rtol=1e-4)
    assert whole[0].shape == (23, 64) and whole[1].shape == (23, 6) and whole[0].dtype == torch.float32
    torch.testing.assert_close(fid.extract(local.train(), images)[0], whole[0])  # it is put into eval mode
    mixed = [images[0], random_images(1, 48)[0]]  # other sizes are resized
    torch.testing.assert_close(fid.extract(local, mixed)[0][1:], fid.extract(local, mixed[1][None])[0])
    two = fid.extract(net, images[:2], batch_size=2)[0]
    torch.testing.assert_close(fid.extract(net, images[:2], batch_size=1)[0], two, atol=1e-4, rtol=1e-4)


def test_only_uint8_enters(local, net):
    for extractor in (local, net):
        for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8),
                      torch.zeros(1, 4, 8, 8, dtype=torch.uint8)):
            with pytest.raises(ValueError, match=r"uint8.*round\(\)"):
                extractor(wrong)
    grey = random_images(2)[:, :1]
    torch.testing.assert_close(local(grey)[0], local(grey.repeat(1, 3, 1, 1))[0])


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A weights server on the loopback address: .body is what it sends, .length what it promises."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if answer.body else 404)
            self.send_header("Content-Length", str(answer.length or len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_):
            pass

    answer = SimpleNamespace(body=b"", length=None, cache=tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE)
    daemon = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=daemon.serve_forever, daemon=True).start()
    monkeypatch.setattr(fid, "INCEPTION_URL", f"http://127.0.0.1:{daemon.server_port}/weights.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    yield answer
    daemon.shutdown()
    daemon.server_close()


@pytest.fixture(scope="module")
def weight_bytes(net):
    buffer = io.BytesIO()
    torch.save({key: value for key, value in net.state_dict().items() if not key.endswith("tracked")}, buffer)
    return buffer.getvalue()


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_download_cache_path_and_variable(server, weight_bytes, net, monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(weight_bytes).hexdigest())
    server.body = weight_bytes
    loaded = fid.load_extractor("inception", "cifar10")
    assert files_in(tmp_path) == [server.cache] and server.cache.read_bytes() == weight_bytes
    assert torch.equal(loaded.fc.weight, net.fc.weight) and torch.equal(loaded.Mixed_7c.branch_pool.bn.running_var,
                                                                      net.Mixed_7c.branch_pool.bn.running_var)
    assert loaded.name == f"inception-{fid.INCEPTION_SHA256[:8]}" and (loaded.suffix, loaded.dim) == ("", 2048)
    server.body = b""  # no second download: the cache serves
    assert fid.load_inception().name == loaded.name
    moved = tmp_path / "mine.pth"
    server.cache.rename(moved)
    assert fid.load_inception(weights=str(moved)).name == loaded.name
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", str(moved))
    assert fid.load_inception().name == loaded.name and files_in(tmp_path) == [moved]


def test_bad_downloads_leave_no_file(server, weight_bytes, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(weight_bytes).hexdigest())
    cases = [(b"x" * 1000, None, "invalid hash value"),  # another file
             (weight_bytes[:50_000], len(weight_bytes), ""),  # cut off
             (b"", None, "404")]
    for server.body, server.length, message in cases:
        expect_error(capsys, lambda: fid.load_extractor("inception", "cifar10"), message, "no download", "--weights",
                     "--features local", "FID_INCEPTION_WEIGHTS")
        assert files_in(tmp_path) == []


def test_offline_and_damaged_files_name_the_flag(server, monkeypatch, tmp_path, weight_bytes, capsys):
    monkeypatch.setattr(fid, "INCEPTION_URL", "http://127.0.0.1:9/nothing")  # nobody listens there
    expect_error(capsys, fid.load_inception, "no download", "--weights", "--features local")
    absent, half, other = (str(tmp_path / name) for name in ("absent.pth", "half.pth", "other.pth"))
    expect_error(capsys, lambda: fid.load_inception(absent), f"--weights {absent}: No such file", "--features local")
    (tmp_path / "half.pth").write_bytes(weight_bytes[:1000])
    expect_error(capsys, lambda: fid.load_inception(half), "half.pth: 1,000 bytes, wrong sha256", "--features local")
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", half)
    expect_error(capsys, fid.load_inception, "half.pth: 1,000 bytes, wrong sha256")
    assert (tmp_path / "half.pth").is_file()  # the user's own file is not touched
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS")
    server.cache.parent.mkdir(parents=True, exist_ok=True)
    server.cache.write_bytes(b"cut off by another program")  # found in the cache: checked, too
    expect_error(capsys, fid.load_inception, "wrong sha256")
    buffer = io.BytesIO()
    torch.save({"conv.weight": torch.zeros(1)}, buffer)
    (tmp_path / "other.pth").write_bytes(buffer.getvalue())
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    with pytest.raises(RuntimeError, match="conv.weight"):
        fid.load_inception(other)


@pytest.fixture
def features_dir(monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "FEATURES_DIR", tmp_path / "features")
    return tmp_path / "features"


def test_local_files_are_pinned_by_hash(features_dir, local, capsys):
    load = partial(fid.load_extractor, "local", "shapes")
    expect_error(capsys, load, "--features local: 0 files", "shapes-<hash8>.pt", "--weights", "--train-local shapes")
    path = fid.save_local(local, "shapes")
    assert path.stem == "shapes-" + hashlib.sha256(path.read_bytes()).hexdigest()[:8] and path.stat().st_size < 2e6
    assert fid.save_local(local, "shapes") == path  # the same weights give the same bytes
    loaded = load()
    assert (loaded.name, loaded.suffix, loaded.classes, loaded.dim) == (f"local-{path.stem}", "_local", 6, 64)
    torch.testing.assert_close(loaded(random_images(4))[0], local(random_images(4))[0], atol=0.02, rtol=0)
    assert fid.load_extractor("local", "folder", data_dir="some/where/shapes").name == loaded.name
    assert fid.load_extractor("local", "cifar10", weights=str(path)).name == loaded.name
    path.write_bytes(path.read_bytes() + b" ")
    expect_error(capsys, load, path.name, "has not its name's sha256")
    (features_dir / "shapes-00000000.pt").write_bytes(b"")
    expect_error(capsys, load, "2 files")
    expect_error(capsys, lambda: load(weights="gone.pt"), "--weights gone.pt: no such file", "--train-local shapes")


# ---- Statistics ------------------------------------------------------------------------------------------------------

def test_floor_law():
    """E[FD] of two samples of one Gaussian, against the formula, within 10%."""
    spread = torch.linspace(0.3, 2, 24).double()
    values = [fid.frechet_distance(stats(gaussian(300, 24, seed=2 * i) * spread),
                                   stats(gaussian(600, 24, seed=2 * i + 1) * spread)) for i in range(30)]
    formula = fid.expected_floor(exact_stats(spread * 0, spread.square().diag(), count=600), 300)
    assert np.mean(values) == pytest.approx(formula, rel=0.1)


def test_jackknife_leaves_every_group_out():
    seen = []
    rows = torch.arange(43)
    result = fid.jackknife(lambda x, y: seen.append((x, y)) or x.double().mean().item(), rows, rows + 1)
    assert result["value"] == 21 and result["low"] < 21 < result["high"] and len(seen) == 21
    for g, (x, y) in enumerate(seen[1:]):
        assert x.tolist() == [i for i in range(43) if i % 20 != g] and torch.equal(y, x + 1)
    assert fid.jackknife(lambda x: 3.0, torch.ones(39)) == {"value": 3.0, "low": None, "high": None}


def test_jackknife_is_the_classic_interval_for_a_mean():
    """For a mean with equal groups the grouped jackknife is the t interval of the group means."""
    x = torch.from_numpy(np.random.RandomState(0).randn(200))
    result, means = fid.jackknife(lambda x: x.mean().item(), x), x.view(10, 20).mean(0)
    mean, half = x.mean().item(), 2.093024 * means.std().item() / math.sqrt(20)
    assert (result["low"], result["high"]) == pytest.approx((mean - half, mean + half))


def test_jackknife_of_pairs_equals_leaving_out():
    """To first order: within 5% of the width that computing every pair again gives."""
    real, x = gaussian(300, 4, seed=9), gaussian(403, 4, shift=0.3)
    own = fid.pair_means(fid.cubic, x) - fid.pair_means(fid.cubic, x, real)
    spread = fid.pair_means(fid.distances, x) / fid.pair_means(fid.distances, real).mean()
    for score, parts in ((partial(fid.kid, real, size=None), own), (partial(fid.diversity, real), spread)):
        exact, quick = fid.jackknife(score, x), fid.jackknife_pairs(score(x), parts)
        assert quick["value"] == pytest.approx(exact["value"], rel=1e-12)
        assert quick["high"] - quick["low"] == pytest.approx(exact["high"] - exact["low"], rel=0.05)


def test_intervals_cover_the_expected_value():
    """FD of 200 draws against a fixed reference: 95% intervals cover its mean about 95% of the time."""
    ref = stats(gaussian(2000, 6, seed=999))
    results = []
    for i in range(60):
        x = gaussian(200, 6, seed=i, shift=0.3)
        results.append(fid.jackknife(lambda x: fid.frechet_distance(stats(x), ref), x))
    truth = np.mean([r["value"] for r in results])
    covered = np.mean([r["low"] <= truth <= r["high"] for r in results])
    assert 0.85 <= covered < 1 or covered == 1 and np.mean([r["high"] - r["low"] for r in results]) < truth


# ---- The row of scores, the reference and its cache ------------------------------------------------------------------

def image_data(images, name="toy", split="train", **more):
    return SimpleNamespace(**{**dict(images=images, name=name, split=split, crop="none", note="", labels=None,
                                     factors=None), **more})


@pytest.fixture(scope="module")
def real(local):
    return fid.make_reference(local, smooth_images(400), smooth_images(200, seed=1))


KEYS = ["fd_local", "is_local", "kid_local", "precision_local", "recall_local", "floor_local", "diversity_local"]


def test_scores_of_real_and_of_noise(local, real):
    good, bad = fid.scores(local, smooth_images(100, seed=2), real), fid.scores(local, random_images(100), real)
    assert sorted(good) == sorted(KEYS)
    assert good["fd_local"]["value"] == pytest.approx(good["floor_local"]["value"], rel=0.5)
    assert bad["fd_local"]["value"] > 10 * good["fd_local"]["value"] and bad["precision_local"]["value"] < 0.1
    assert abs(good["diversity_local"]["value"] - 1) < 0.1 and bad["kid_local"]["value"] > good["kid_local"]["value"]
    for key, score in good.items():
        if key.split("_")[0] in ("fd", "is", "kid", "diversity"):
            assert score["low"] < score["value"] < score["high"]
        else:
            assert score["low"] is None and score["high"] is None
    features, logits = fid.extract(local, smooth_images(100, seed=2))
    assert good["fd_local"]["value"] == pytest.approx(fid.frechet_distance(stats(features), real.stats), rel=1e-9)
    held_out = stats(real.test_features[:100])
    assert good["floor_local"]["value"] == pytest.approx(fid.frechet_distance(held_out, real.stats), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 30, 64])
def test_scores_of_few_images_are_finite(local, real, count, capsys):
    row = fid.scores(local, smooth_images(count, seed=2), real)
    assert all(math.isfinite(score["value"]) for score in row.values())
    assert all((score["low"] is None) == (count < 40 or key[:3] in ("pre", "rec", "flo")) for key, score in row.items())
    json.dumps(row, allow_nan=False)
    expect_error(capsys, lambda: fid.scores(local, smooth_images(1), real), "at least 2")


def test_scores_of_thousands(local, monkeypatch):
    """From 2,000 images on KID takes subsets; without held-out images the floor is a formula."""
    ref = fid.Reference(gaussian(2500, 64, seed=1).float())
    features, logits = gaussian(2100, 64, seed=2, scale=1.1).float(), gaussian(2100, 6).float()
    monkeypatch.setattr(fid, "extract", lambda *a, **k: (features, logits))
    row, x, p = fid.scores(local, features, ref), fid.shuffle(features, 1), fid.shuffle(logits, 1)
    expected = {"fd": fid.frechet_distance(stats(x), ref.stats), "is": fid.inception_score(p)[0],
                "kid": fid.kid(ref.features, x), "diversity": fid.diversity(ref.features[:2000], x[:2000])}
    for key, value in expected.items():
        assert row[f"{key}_local"]["value"] == pytest.approx(value, rel=1e-12)
        assert row[f"{key}_local"]["low"] < value < row[f"{key}_local"]["high"]
    assert row["floor_local"]["value"] == pytest.approx(fid.expected_floor(ref.stats, 2100))
    precision, recall = fid.precision_recall(ref.features[:2100], x)
    assert (row["precision_local"]["value"], row["recall_local"]["value"]) == (precision, recall)


def test_reference_is_cached_by_everything_that_matters(local, tmp_path):
    train, test = smooth_images(60), smooth_images(30, seed=1)
    first = fid.reference(local, image_data(train), image_data(test, split="test"), tmp_path)
    files = set(tmp_path.iterdir())
    again = fid.reference(local, image_data(train), image_data(test, split="test"), tmp_path)
    assert set(tmp_path.iterdir()) == files and len(files) == 1
    assert torch.equal(again.stats.cov, first.stats.cov) and torch.equal(again.stats.root, first.stats.root)
    assert torch.equal(again.features, first.features) and torch.equal(again.test_logits, first.test_logits)
    assert again.stats.count == 60
    changed = train.clone()
    changed[0, 0, 0, 0] ^= 1
    other = fid.LocalNet(6).eval()
    other.name = "local-other"
    variants = [(local, image_data(changed)), (local, image_data(train, name="other")), (other, image_data(train)),
                (local, image_data(train, crop="centre")), (local, image_data(train[:50]))]
    for i, (extractor, data) in enumerate(variants, 2):
        fid.reference(extractor, data, image_data(test, split="test"), tmp_path)
        assert len(set(tmp_path.iterdir())) == i
    next(iter(files)).write_bytes(b"half a file")
    repaired = fid.reference(local, image_data(train), image_data(test, split="test"), tmp_path)
    assert torch.equal(repaired.stats.cov, first.stats.cov)


# ---- Training local networks -----------------------------------------------------------------------------------------

def test_augmentations():
    gen = torch.Generator().manual_seed(0)
    x = random_images(64, 16).float() / 127.5 - 1
    moved = fid.augment(x, gen)
    assert moved.shape == x.shape and not torch.equal(moved, x)
    # whole pixels: the inside of each view is a shift of the image or of its mirror, to the bit of rounding
    for image, view in zip(x[:16], moved[:16], strict=True):
        errors = [(torch.roll(base, (dy, dx), (1, 2)) - view)[:, 4:-4, 4:-4].abs().max()
                  for base in (image, image.flip(2)) for dy in range(-2, 3) for dx in range(-2, 3)]
        assert min(errors) < 1e-4
    assert fid.augment(x, gen, crop=True).shape == x.shape


def test_contrastive_loss_by_hand():
    u, v = gaussian(3, 4).float(), gaussian(3, 4, seed=1).float()
    z = F.normalize(torch.cat([u, v]))
    losses = []
    for i in range(6):
        others = [math.exp(z[i] @ z[j] / 0.2) for j in range(6) if j != i]
        losses.append(-math.log(math.exp(z[i] @ z[(i + 3) % 6] / 0.2) / sum(others)))
    assert fid.contrastive_loss(u, v).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_training_learns_with_labels(monkeypatch):
    monkeypatch.setitem(fid.IMAGES_SEEN, "toy", 3000)
    labels = torch.arange(300) % 2
    images = (smooth_images(300).float() / 4 + 150 * labels[:, None, None, None]).to(torch.uint8)
    net = fid.train_network(image_data(images, labels=labels, factors=gaussian(300, 9).float()), batch=50)
    assert (fid.extract(net, images)[1].argmax(1) == labels).float().mean() > 0.95


def test_train_local_on_a_folder(monkeypatch, tmp_path, features_dir, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fid.IMAGES_SEEN, "mine", 200)
    folder = save_folder(smooth_images(80, 40), tmp_path / "mine")
    fid.main(["--train-local", folder])
    path, = features_dir.glob("mine-*.pt")
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["classes"] == 20 and 0 <= report["retrieval"] <= 1 and report["n_test"] == 8
    assert {"extractor", "note", "floor", "noise", "blur", "sample_size", "half_the_classes",
            "fifty_images_repeated_recall", "real_recall", "real_is"} <= set(report)
    before = path.read_bytes()
    fid.main(["--train-local", folder])  # there already: examined, not trained again
    assert path.read_bytes() == before and [*features_dir.glob("*.pt")] == [path]
    again = json.loads(path.with_suffix(".json").read_text())
    assert again == report and path.stem in capsys.readouterr().out
    expect_error(capsys, lambda: fid.main(["--train-local", "nowhere"]), "--train-local nowhere: no such folder")


@pytest.mark.parametrize("name", fid.DATASETS)
def test_committed_extractors_keep_their_promises(name):
    extractor = fid.load_extractor("local", name)  # checks the hash
    path = fid.FEATURES_DIR / f"{extractor.name.removeprefix('local-')}.pt"
    report = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size <= 2e6 and report["extractor"] == extractor.name
    assert report["classes"] == extractor.classes == {"cifar10": 10, "celeba64": 20}.get(name, extractor.classes)
    if name == "cifar10":
        assert report["accuracy"] >= 0.86 and "JPEG" in report["note"]
    rising = lambda steps: all(a < b for a, b in zip(steps, steps[1:], strict=False))  # noqa: E731
    least, *noise, most = report["noise"].values()  # at 0.02, 0.05, 0.1, 0.2, 0.4
    assert rising([report["floor"], least, *noise]) and rising([report["floor"], *report["blur"].values()])
    assert most > noise[-1] or name == "shapes" and most > 0.9 * noise[-1]  # saturated: nothing is left of the image
    assert report["half_the_classes"] >= 5 * report["floor"]
    assert report["fifty_images_repeated_recall"] < 0.1 < report["real_recall"]


# ---- The command -----------------------------------------------------------------------------------------------------

@pytest.fixture
def folders(tmp_path, features_dir, local):
    weights = fid.save_local(local, "toy")
    save_folder(smooth_images(60), tmp_path / "real" / "deep" / "down")
    save_folder(smooth_images(50, seed=1), tmp_path / "good")
    save_folder(random_images(50), tmp_path / "noise")
    return SimpleNamespace(weights=str(weights), **{k: str(tmp_path / k) for k in ("real", "good", "noise")})


def test_command_on_two_folders(folders, capsys):
    arguments = ["--weights", folders.weights, "--json", "--device", "cpu"]
    fid.main([folders.real, folders.good, *arguments])
    captured = capsys.readouterr()
    good = json.loads(captured.out)
    assert "warning: 50 images are few for 64 features" in captured.err and "JPEG" not in captured.err
    fid.main([folders.real, folders.noise, *arguments])
    noise = json.loads(capsys.readouterr().out)
    assert (good["n_real"], good["n_generated"], good["features"]) == (60, 50, "local-" + folders.weights[-15:-3])
    assert noise["scores"]["fd_local"]["value"] > 5 * good["scores"]["fd_local"]["value"]
    fid.main([folders.real, folders.good, *arguments[:2], "--count", "45"])
    captured = capsys.readouterr()
    assert "45 images of" in captured.out and "60 of" in captured.out and "floor" in captured.out
    assert "warning: 45 images are few" in captured.err


def test_command_reads_any_size_colour_and_suffix(folders, capsys, tmp_path):
    mixed = tmp_path / "mixed"
    save_folder(smooth_images(20), mixed)
    Image.new("L", (40, 20), 90).save(mixed / "grey.JPG")
    Image.new("RGBA", (33, 32), (1, 2, 3, 4)).save(mixed / "deeper.png")
    (mixed / "notes.txt").write_text("no image")
    images, jpeg = fid.read_folder(mixed, "GENERATED")
    assert len(images) == 22 and not jpeg
    assert {tuple(x.shape) for x in images} == {(3, 32, 32), (3, 20, 40), (3, 32, 33)}
    fid.main([folders.real, str(mixed), "--weights", folders.weights, "--json"])
    assert json.loads(capsys.readouterr().out)["n_generated"] == 22
    jpegs = save_folder(smooth_images(20), tmp_path / "jpegs", "jpg")
    fid.main([folders.real, jpegs, "--weights", folders.weights, "--json"])
    assert "warning: only one side is JPEG" in capsys.readouterr().err
    fid.main([jpegs, jpegs, "--weights", folders.weights, "--json"])
    captured = capsys.readouterr()
    assert "JPEG" not in captured.err and json.loads(captured.out)["scores"]["fd_local"]["value"] < 1e-9


def test_command_on_a_data_set(folders, capsys, tmp_path, monkeypatch):
    import common
    data = {split: image_data(smooth_images(80, seed=i), name="shapes", split=split)
            for i, split in enumerate(("train", "test"))}
    monkeypatch.setattr(common, "load_images", lambda name, split, data_dir: data[split])
    fid.main(["shapes", folders.good, "--weights", folders.weights, "--data-dir", str(tmp_path / "data")])
    out = capsys.readouterr().out
    assert "80 of shapes" in out and "50 held-out images; IS of real ones (K = 6)" in out
    assert len(files_in(tmp_path / "data" / "cache")) == 1


def test_command_errors_are_one_line(folders, capsys, tmp_path, server, monkeypatch):
    single, broken = save_folder(smooth_images(1), tmp_path / "single"), tmp_path / "broken"
    save_folder(smooth_images(5), broken)
    (broken / "0000.png").write_bytes(b"not an image")
    weights = ["--weights", folders.weights]
    cases = [([folders.real, single, *weights], "GENERATED", "found 1 image"),
             ([single, folders.good, *weights], "REAL", "found 1 images"),
             ([folders.real, str(tmp_path / "nowhere"), *weights], "nowhere", "found 0 images"),
             ([folders.real, folders.good, *weights, "--count", "51"], "--count 51", "50"),
             ([folders.real, folders.good, *weights, "--count", "-1"], "--count -1", "50"),
             ([folders.real, str(broken), *weights], "0000.png", "cannot be read"),
             ([folders.real, folders.good], "--features local", "--train-local"),
             ([folders.real, folders.good, "--features", "inception"], "--weights", "--features local"),
             ([folders.real, folders.good, *weights, "--device", "tpu"], "--device tpu", "cpu"),
             ([folders.real], "GENERATED", "--help")]
    monkeypatch.setattr(fid, "extract", None)  # no work is begun
    for arguments, named, remedy in cases:
        expect_error(capsys, partial(fid.main, arguments), named, remedy)
