"""fid.py against closed forms, brute force, a frozen fingerprint and downloads from a file."""

import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from helpers import draw_all, expect_error, same
from PIL import Image

import common
import fid
from fid import moments


def gaussian(n, d, seed=0, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.RandomState(seed).randn(n, d) * scale + shift)


def exact_stats(mean, cov, count=1000):
    """Statistics with just this mean and covariance."""
    mean, cov = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, cov))
    return fid.Moments(count, mean, cov)


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


# ---- Inception -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def net():
    """Inception with well-scaled random weights from numpy's generator, which gives the same numbers in every version.
    With torch's default weights the features would be almost constant."""
    net, random = fid.InceptionV3(), np.random.RandomState(0)
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
        value.copy_(torch.from_numpy(new))
    return net


def test_inception_fingerprint_is_frozen(net):
    """The expected numbers come from another implementation that writes out every block. A wrong pool in any one block,
    torch's own epsilon, x / 127.5 - 1, or half-pixel resizing moves at least one of them by more than 1e-3."""
    with torch.no_grad():
        pool3, logits = net(smooth_images(1, 64, seed=3))
    assert pool3.shape == (1, 2048) and logits.shape == (1, 1008)
    assert pool3[0, ::256].tolist() == pytest.approx(
        [0.02658, 0.13193, 0.8576, 2.8705, 1.75571, 0.01476, 0.99666, 0.01696], abs=1e-4)
    assert logits[0, ::126].tolist() == pytest.approx(
        [0.65822, 0.53752, 0.14517, 1.40225, -1.24928, 0.12982, -1.22742, 1.89449], abs=1e-4)
    torch.testing.assert_close(net.fc(pool3) - net.fc.bias, logits, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in net.parameters()) == 23_850_960 and len(net.state_dict()) == 566


# ---- Moments and the Frechet distance --------------------------------------------------------------------------------

def test_frechet_closed_forms():
    """Singular covariances: fewer rows than numbers, repeated rows, no spread at all."""
    few, many = gaussian(10, 64), gaussian(3000, 64, seed=1)
    cross = torch.linalg.svdvals((few - few.mean(0)) @ (many - many.mean(0)).T).sum() / math.sqrt(9 * 2999)
    few, many, repeated = (moments(x) for x in (few, many, few[:8].repeat(64, 1)))
    exact = (few.mean - many.mean).square().sum() + few.cov.trace() + many.cov.trace() - 2 * cross
    assert few.root.shape == (64, 9)
    assert fid.frechet_distance(few, many) == pytest.approx(exact.item(), rel=1e-10)
    assert repeated.root.shape == (64, 7) and fid.frechet_distance(repeated, repeated) < 1e-10
    flat = moments(torch.ones(5, 64))  # no spread at all
    assert fid.frechet_distance(flat, many) == pytest.approx(
        ((1 - many.mean).square().sum() + many.cov.trace()).item(), rel=1e-12)


@pytest.mark.parametrize("n, d, tolerance", [(400, 64, 1e-9), (1200, 512, 1e-9), (40, 64, 1e-5), (100, 128, 1e-5)])
def test_frechet_against_sqrtm(n, d, tolerance):
    """Other implementations compute |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrtm(S1 S2). The distance is symmetric, and 0
    from a set to itself."""
    x, y = gaussian(n, d), gaussian(n + 10, d, seed=1, scale=1.3, shift=0.2)
    (m1, s1), (m2, s2) = ((v.mean(0), np.cov(v, rowvar=False)) for v in (x.numpy(), y.numpy()))
    peer = np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(scipy.linalg.sqrtm(s1 @ s2)).real
    x, y = moments(x), moments(y)
    value = fid.frechet_distance(x, y)
    assert value == pytest.approx(peer, rel=tolerance)
    assert fid.frechet_distance(y, x) == pytest.approx(value, rel=1e-10)
    assert fid.frechet_distance(x, x) < 1e-10 * value


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments(offset):
    """They agree with numpy's, with a large offset, too. Fewer than two rows, or features of different lengths, are an
    error."""
    x = gaussian(200, 7) * torch.arange(1, 8) + offset
    ours = moments(x)
    assert ours.count == 200 and moments(x.float()).cov.dtype == torch.float64 and ours.root is ours.root
    np.testing.assert_allclose(ours.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(ours.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="at least 2"):
        moments(x[:1])
    with pytest.raises(ValueError, match="7 and 4"):
        fid.frechet_distance(moments(x), moments(x[:, :4]))


# ---- The other scores ------------------------------------------------------------------------------------------------

def test_inception_score():
    """It agrees with the plain formula, in the given order and in torch-fidelity's, and with closed forms."""
    for n, splits in ((100, 10), (103, 10), (25, 10), (7, 3)):
        logits, shuffled = gaussian(n, 12, scale=2), np.random.RandomState(2020).permutation(n)
        p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
        for seed, order in ((None, np.arange(n)), (2020, shuffled)):
            parts = [p[order][i * n // splits:(i + 1) * n // splits] for i in range(splits)]
            values = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
            plain = np.mean(values), np.std(values)
            assert fid.inception_score(logits, splits, seed=seed) == pytest.approx(plain, rel=1e-9)
        assert fid.inception_score(logits, splits) == pytest.approx(plain, rel=1e-9)
    assert fid.inception_score(torch.ones(50, 7)) == pytest.approx((1, 0), abs=1e-12)
    one_hot = 1e4 * torch.eye(10).repeat(30, 1)  # every class equally often; logits of 1e4 give no nan
    assert fid.inception_score(one_hot, splits=1)[0] == pytest.approx(10, rel=1e-12)


def slow_kid(x, y):
    """KID of all pairs, in numpy."""
    x, y = x.double().numpy(), y.double().numpy()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n, m, xx, yy = len(x), len(y), kernel(x, x), kernel(y, y)
    return ((xx.sum() - np.trace(xx)) / n / (n - 1) + (yy.sum() - np.trace(yy)) / m / (m - 1) - 2 * kernel(x, y).mean())


def test_kid_equals_brute_force(monkeypatch):
    """All pairs, whatever the size of the chunks, and random subsets, drawn as torch-fidelity draws them."""
    x, y = gaussian(90, 6).float(), gaussian(70, 6, seed=1, shift=0.5).float()
    for chunk in (512, 90, 32, 1):
        monkeypatch.setattr(fid, "CHUNK", chunk)
        assert fid.kid(x, y, size=None) == pytest.approx(slow_kid(x, y), rel=1e-12)
        assert fid.kid(x, x, size=None) == pytest.approx(slow_kid(x, x), rel=1e-12)  # the same array on both sides
    random, values = np.random.RandomState(2020), []
    for _ in range(5):  # torch-fidelity's order of draws
        i, j = random.choice(90, 40, replace=False), random.choice(70, 40, replace=False)
        values.append(slow_kid(x[i], y[j]))
    assert fid.kid(x, y, subsets=5, size=40) == pytest.approx(np.mean(values), rel=1e-12)
    with pytest.raises(ValueError, match="subsets of 71"):
        fid.kid(x, y, size=71)


def test_precision_recall(monkeypatch):
    """By hand with k = 1, for copies (whose balls have radius 0), and by brute force, whatever the size of the
    chunks."""
    real, generated = torch.tensor([[0.0], [1], [2], [10]]), torch.tensor([[0.5], [1.5], [30], [31]])
    assert fid.precision_recall(real, generated, k=1) == (0.5, 0.75)  # real balls reach 1, 1, 1, 8; the others 1
    twice = (gaussian(30, 2048).float() * 3 + 1).repeat(5, 1)  # five copies of each, found only by `<=`
    assert fid.precision_recall(twice, twice) == (1, 1)
    real = gaussian(200, 3)
    assert fid.precision_recall(real, gaussian(10, 3, seed=1).repeat(4, 1))[1] < 0.1  # few images, with balls of 0

    def covered(x, centres):
        radius = [sorted(math.dist(c, o) for o in centres)[3] for c in centres]
        return np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, radius, strict=True)) for p in x])

    real, generated = gaussian(50, 3), gaussian(60, 3, seed=1, scale=1.2, shift=0.8)
    slow = covered(generated.tolist(), real.tolist()), covered(real.tolist(), generated.tolist())
    for chunk in (512, 50, 7):
        monkeypatch.setattr(fid, "CHUNK", chunk)
        assert fid.precision_recall(real, generated) == pytest.approx(slow) and slow[1] != slow[0] < 1
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(real, real[:3])


def test_diversity():
    """Identical images have none. Else it agrees with brute force."""
    x, y = gaussian(60, 5), gaussian(50, 5, seed=1, scale=2)
    assert fid.diversity(x, x[:1].repeat(60, 1)) == 0
    distances = [np.mean([math.dist(a, b) for i, a in enumerate(v) for b in v[:i]]) for v in (x.tolist(), y.tolist())]
    assert fid.diversity(x, y) == pytest.approx(distances[1] / distances[0], rel=1e-9)


# ---- What enters, batches, weights -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def local():
    """A local network with seeded random weights whose batch statistics are those of images."""
    torch.manual_seed(0)
    net = fid.LocalNet(6)
    with torch.no_grad():
        for _ in range(20):
            net.body(smooth_images(64).float() / 127.5 - 1)
    return net.eval()


def test_batch_size_changes_nothing(local, net, monkeypatch):
    """Nor does a list in place of a tensor. Images of other sizes are cut to their central square and resized."""
    images = random_images(23)
    whole = fid.extract(local, images)
    torch.testing.assert_close(fid.extract(local, list(images)), whole, atol=1e-5, rtol=1e-4)
    for batch in (1, 7):
        monkeypatch.setattr(local, "batch", batch)
        torch.testing.assert_close(fid.extract(local, images), whole, atol=1e-5, rtol=1e-4)
    monkeypatch.undo()
    assert whole[0].shape == (23, 64) and whole[1].shape == (23, 6) and whole[0].dtype == torch.float32
    torch.testing.assert_close(fid.extract(local.train(), images)[0], whole[0])  # it is put into eval mode
    mixed = [images[0], random_images(1, 48)[0]]  # other sizes are resized
    torch.testing.assert_close(fid.extract(local, mixed)[0][1:], fid.extract(local, mixed[1][None])[0])
    wide = torch.cat([images.flip(0)[..., :8], images, images.flip(0)[..., :8]], 3)  # and cut to the centred square
    torch.testing.assert_close(fid.extract(local, wide)[0], whole[0])
    two = fid.extract(net, images[:2])[0]
    torch.testing.assert_close(fid.extract(net, list(images[:2]))[0], two, atol=1e-4, rtol=1e-4)


def test_only_uint8_enters(local, net):
    """Grey images count as three equal channels."""
    for extractor in (local, net):
        for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8),
                      torch.zeros(1, 4, 8, 8, dtype=torch.uint8)):
            with pytest.raises(ValueError, match=r"uint8.*round\(\)"):
                extractor(wrong)
    grey = random_images(2)[:, :1]
    torch.testing.assert_close(local(grey)[0], local(grey.repeat(1, 3, 1, 1))[0])


@pytest.fixture
def origin(monkeypatch, tmp_path, tmp_path_factory, weight_bytes):
    """The file that weights are downloaded from."""
    path = tmp_path_factory.mktemp("origin") / "weights.pth"
    path.write_bytes(weight_bytes)
    monkeypatch.setattr(fid, "INCEPTION_URL", path.as_uri())
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(weight_bytes).hexdigest())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    return path


@pytest.fixture(scope="module")
def weight_bytes(net):
    buffer = io.BytesIO()
    torch.save({key: value for key, value in net.state_dict().items() if not key.endswith("tracked")}, buffer)
    return buffer.getvalue()


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_download_cache_path_and_variable(origin, weight_bytes, net, monkeypatch, tmp_path):
    """Weights are downloaded once. --weights, then the environment variable, come before the cache."""
    cache, moved = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE, tmp_path / "mine.pth"
    loaded = fid.load_extractor("inception", "cifar10")
    assert files_in(tmp_path) == [cache] and cache.read_bytes() == weight_bytes
    assert same(loaded.state_dict(), net.state_dict())
    assert loaded.name == f"inception-{fid.INCEPTION_SHA256[:8]}" and (loaded.suffix, loaded.dim) == ("", 2048)
    origin.unlink()  # no second download: the cache serves
    monkeypatch.setattr(fid, "InceptionV3", lambda: loaded)  # building it takes seconds
    assert fid.load_inception() is loaded
    cache.rename(moved)
    assert fid.load_inception(weights=str(moved)) is loaded
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", str(moved))
    assert fid.load_inception() is loaded and files_in(tmp_path) == [moved]


def test_weights_that_cannot_be_had(origin, weight_bytes, monkeypatch, tmp_path, capsys):
    """A failed download leaves no file. A file that is absent, cut off, or another one is named in the error, with the
    ways out, and stays as it is."""
    absent, half, other = (tmp_path / name for name in ("absent.pth", "half.pth", "other.pth"))
    ways_out = "no download", "--weights", "--features local", "FID_INCEPTION_WEIGHTS"
    for body, url, message in ((b"x" * 1000, fid.INCEPTION_URL, "invalid hash value"),  # another file
                               (weight_bytes[:50_000], fid.INCEPTION_URL, "invalid hash value"),  # cut off
                               (b"", "http://127.0.0.1:9/nothing", "refused")):  # nobody listens there
        origin.write_bytes(body)
        monkeypatch.setattr(fid, "INCEPTION_URL", url)
        expect_error(capsys, lambda: fid.load_extractor("inception", "cifar10"), message, *ways_out)
        assert files_in(tmp_path) == []
    expect_error(capsys, lambda: fid.load_inception(absent), f"--weights {absent}: No such file", "--features local")
    half.write_bytes(weight_bytes[:1000])
    expect_error(capsys, lambda: fid.load_inception(half), "half.pth: 1,000 bytes, wrong sha256", "--features local")
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", str(half))
    expect_error(capsys, fid.load_inception, "half.pth: 1,000 bytes, wrong sha256")
    assert half.is_file()  # the user's own file is not touched
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS")
    cache = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    cache.write_bytes(b"cut off by another program")  # the cache is checked, too
    expect_error(capsys, fid.load_inception, "wrong sha256")
    torch.save({"conv.weight": torch.zeros(1)}, other)
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(other.read_bytes()).hexdigest())
    with pytest.raises(RuntimeError, match="conv.weight"):
        fid.load_inception(other)


@pytest.fixture
def features_dir(monkeypatch, tmp_path):
    """An empty folder for the networks of data sets. Those of own folders go below the current folder, which is empty,
    too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "FEATURES_DIR", tmp_path / "features")
    return tmp_path / "features"


def test_local_files_are_pinned_by_hash(features_dir, local, capsys, tmp_path):
    """A file is found by the name of its data set, or named with --weights. One whose bytes do not fit its name, one of
    two, or one of another kind is refused."""
    load = partial(fid.load_extractor, "local", "shapes")
    expect_error(capsys, load, "--features local", "0 files", "shapes-<hash8>.pt", "--weights", "--train-local shapes")
    path = fid.save_local(local, features_dir, "shapes")
    assert path.stem == "shapes-" + hashlib.sha256(path.read_bytes()).hexdigest()[:8] and path.stat().st_size < 2e6
    assert fid.save_local(local, features_dir, "shapes") == path  # the same weights give the same bytes
    loaded = load()
    assert (loaded.name, loaded.suffix, loaded.classes, loaded.dim) == (f"local-{path.stem}", "_local", 6, 64)
    torch.testing.assert_close(loaded(random_images(4))[0], local(random_images(4))[0], atol=0.02, rtol=0)
    assert fid.load_extractor("local", "cifar10", weights=str(path)).name == loaded.name
    path.write_bytes(path.read_bytes() + b" ")
    expect_error(capsys, load, path.name, "wrong sha256")
    (features_dir / "shapes-00000000.pt").write_bytes(b"")
    expect_error(capsys, load, "2 files", f"there are {features_dir / 'shapes-00000000.pt'}, {path})")
    expect_error(capsys, lambda: load(weights="gone.pt"), "--weights gone.pt: No such file", "--train-local shapes")
    other = common.save_state(tmp_path / "form1-*.pt", {"refiner": {}})
    expect_error(capsys, lambda: load(weights=other), other.name, "not a local feature network")


# ---- Intervals, the row of scores, the reference --------------------------------------------------------------

def test_jackknife():
    """Each of 20 groups is left out once. For the mean of equal groups the interval is the t interval of the group
    means."""
    seen, rows = [], torch.arange(43)
    result = fid.jackknife(lambda x: seen.append(x) or x.double().mean().item(), rows)
    assert result["value"] == 21 and result["low"] < 21 < result["high"] and len(seen) == 21
    for g, x in enumerate(seen[1:]):
        assert x.tolist() == [i for i in range(43) if i % 20 != g]
    assert fid.jackknife(lambda x: 3.0, torch.ones(39)) == {"value": 3.0, "low": None, "high": None}
    x = gaussian(200, 1)[:, 0]
    result, means = fid.jackknife(lambda x: x.mean().item(), x), x.view(10, 20).mean(0)
    mean, half = x.mean().item(), 2.093024 * means.std().item() / math.sqrt(20)
    assert (result["low"], result["high"]) == pytest.approx((mean - half, mean + half))


def test_jackknife_of_pairs_equals_leaving_out():
    """The interval's width is within 5% of the width that computing every pair again gives."""
    real, x = gaussian(300, 4, seed=9), gaussian(403, 4, shift=0.3)
    own = fid.pair_means(fid.cubic, x) - fid.pair_means(fid.cubic, x, real)
    spread = fid.pair_means(fid.distances, x) / fid.pair_means(fid.distances, real).mean()
    for score, parts in ((partial(fid.kid, real, size=None), own), (partial(fid.diversity, real), spread)):
        exact, quick = fid.jackknife(score, x), fid.jackknife_pairs(score(x), parts)
        assert quick["value"] == pytest.approx(exact["value"], rel=1e-12)
        assert quick["high"] - quick["low"] == pytest.approx(exact["high"] - exact["low"], rel=0.05)


def image_data(images, name="toy", **more):
    return SimpleNamespace(**{**dict(images=images, name=name, crop="none", note="", labels=None,
                                     factors=None), **more})


@pytest.fixture(scope="module")
def real(local):
    return fid.make_reference(local, smooth_images(400), smooth_images(200, seed=1))


def test_scores_of_few_images(local, real):
    """All scores are finite whatever the number of images. KID uses all pairs. The floor is that of equally many
    held-out images."""
    for count in (2, 3, 30, 64, 100):
        images = smooth_images(count, seed=2)
        row, x = fid.scores(local, images, real), fid.shuffle(fid.extract(local, images)[0], 1)
        assert sorted(row) == [f"{name}_local" for name in (
            "diversity", "fd", "floor", "is", "kid", "precision", "recall")]
        for key, score in row.items():
            assert (score["low"] is None) == (count < 40 or key[:3] in ("pre", "rec", "flo"))
        json.dumps(row, allow_nan=False)
        floor = fid.frechet_distance(moments(real.test_features[:count]), real.stats)
        assert row["floor_local"]["value"] == pytest.approx(floor, rel=1e-9)
        kid, diversity = fid.kid(real.features, x, size=None), fid.diversity(real.features[:count], x)
        assert row["kid_local"]["value"] == pytest.approx(kid, rel=1e-6)
        assert row["diversity_local"]["value"] == pytest.approx(diversity, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        fid.scores(local, smooth_images(1), real)


def test_scores_of_thousands(local, monkeypatch):
    """From 2,000 images on KID uses subsets. Without held-out images there is no floor."""
    ref = fid.Reference(gaussian(2500, 64, seed=1).float())
    features, logits = gaussian(2100, 64, seed=2, scale=1.1).float(), gaussian(2100, 6).float()
    monkeypatch.setattr(fid, "extract", lambda *a, **k: (features, logits))
    row, x, p = fid.scores(local, features, ref), fid.shuffle(features, 1), fid.shuffle(logits, 1)
    precision, recall = fid.precision_recall(ref.features[:2100], x)
    expected = {"fd": fid.frechet_distance(moments(x), ref.stats), "is": fid.inception_score(p)[0],
                "kid": fid.kid(ref.features, x), "diversity": fid.diversity(ref.features[:2000], x[:2000]),
                "precision": precision, "recall": recall}
    assert row.keys() == {f"{key}_local" for key in expected}
    for key, value in expected.items():
        assert row[f"{key}_local"]["value"] == pytest.approx(value, rel=1e-12)
    for key in ("fd", "is", "kid", "diversity"):
        assert row[f"{key}_local"]["low"] < expected[key] < row[f"{key}_local"]["high"]
    few = fid.scores(local, features, fid.Reference(ref.features[:300]))  # precision and recall of equal numbers
    assert (few["precision_local"]["value"], few["recall_local"]["value"]) == fid.precision_recall(
        ref.features[:300], x[:300])
    monkeypatch.setattr(fid, "extract", lambda *a, **k: (features[:1900], logits[:1900]))  # KID of all pairs
    x, real = fid.shuffle(features[:1900], 1), ref.features[:2000]
    parts = fid.pair_means(fid.cubic, x) - fid.pair_means(fid.cubic, x, real)
    expected = fid.jackknife_pairs(fid.kid(real, x, size=None), parts)
    assert fid.scores(local, x, ref)["kid_local"] == pytest.approx(expected, rel=1e-9)


def test_reference_is_in_a_random_order(local):
    """Where only the first real images are used, they are of all classes, even if the files lie class by class."""
    train, test = smooth_images(60), smooth_images(30, seed=1)
    ref = fid.make_reference(local, train, test)
    for images, features in ((train, ref.features), (test, ref.test_features)):
        order = torch.cdist(features, fid.extract(local, images)[0]).argmin(1)  # the place of each among the images
        assert sorted(order.tolist()) == list(range(len(images))) != order.tolist()
        assert abs(np.corrcoef(order, np.arange(len(images)))[0, 1]) < 0.4


def test_reference_is_cached_by_everything_that_matters(local, tmp_path, capsys):
    """Another pixel, name, crop or network has a reference of its own. A damaged file is made again."""
    train, test = smooth_images(60), image_data(smooth_images(30, seed=1))
    first, again = (fid.cached_reference(local, image_data(train), test, tmp_path) for _ in range(2))
    (file,) = tmp_path.iterdir()
    assert torch.equal(again.stats.cov, first.stats.cov) and torch.equal(again.stats.root, first.stats.root)
    assert torch.equal(again.features, first.features) and torch.equal(again.test_logits, first.test_logits)
    assert again.stats.count == 60
    changed = train.clone()
    changed[0, 0, 0, 0] ^= 1
    other = fid.LocalNet(6).eval()
    other.name = "local-other"
    variants = [(local, image_data(changed), test), (local, image_data(train, name="other"), test),
                (other, image_data(train), test), (local, image_data(train, crop="centre"), test),
                (local, image_data(train), image_data(test.images + 1))]
    for i, (extractor, data, held_out) in enumerate(variants, 2):
        fid.cached_reference(extractor, data, held_out, tmp_path)
        assert len(list(tmp_path.iterdir())) == i
    whole = file.read_bytes()
    wrong_bit = bytearray(whole)
    wrong_bit[whole.index(first.features.numpy().tobytes()) + 3] ^= 1
    for damaged in (b"half a file", wrong_bit):
        file.write_bytes(damaged)
        assert torch.equal(fid.cached_reference(local, image_data(train), test, tmp_path).features, first.features)
    # Where nothing can be written, a warning says so, and it is made each time.
    again = fid.cached_reference(local, image_data(train), test, file / "cache")
    assert torch.equal(again.stats.cov, first.stats.cov) and "warning: cannot write" in capsys.readouterr().err


# ---- Training local networks -----------------------------------------------------------------------------------------

def test_augmentations():
    """A shifted view is the image, or its mirror image, moved by whole pixels, at most by an eighth of its side in each
    direction. All of these moves occur. A cropped view shows a square of 25 to 100% of the area, with jitter."""
    gen = torch.Generator().manual_seed(0)
    x = random_images(1500, 16).float() / 127.5 - 1
    moved = fid.augment(x, gen)
    moves = itertools.product((False, True), range(-2, 3), range(-2, 3))  # mirrored or not, down, to the right
    errors = []
    for mirror, dy, dx in moves:  # compared inside, where the border does not show
        expected = torch.roll(x.flip(3) if mirror else x, (dy, dx), (2, 3))
        errors.append((expected - moved)[:, :, 4:-4, 4:-4].abs().amax((1, 2, 3)))
    smallest, which = torch.stack(errors).min(0)
    assert moved.shape == x.shape and smallest.max() < 1e-4 and len(which.unique()) == 50
    # On a ramp from left to right, the slope inside is the side of the view, and its sign tells whether it is mirrored.
    ramp = torch.linspace(-0.5, 0.5, 32).expand(4000, 3, 32, 32)
    views = fid.augment(ramp, gen, crop=True)
    middle = views[:, :, :, 15:17].mean((1, 2))  # (B, 2), two columns in the middle
    contrast = (middle[:, 1] - middle[:, 0]) * 31
    area, mirrored = contrast.abs() ** 2, contrast < 0
    assert views.shape == ramp.shape and 0.4 < mirrored.float().mean() < 0.6
    # Contrast changes it by a factor of 0.6 to 1.4, evenly. The mean of the factor's square is 1 + 0.8^2 / 12.
    assert area.mean() / (1 + 0.8**2 / 12) == pytest.approx((0.25 + 1) / 2, rel=0.03)
    assert area.max() < 1.4**2 and area.min() > 0.6**2 * 0.25 * 0.9
    shift = fid.augment(torch.zeros(400, 3, 16, 16), gen, crop=True)  # brightness alone
    assert shift.std((1, 2, 3)).max() < 1e-6 and shift.abs().max() < 0.3 < shift.abs().max() + 0.02


def test_contrastive_loss_by_hand():
    """NT-Xent with the sums written out."""
    u, v = gaussian(3, 4).float(), gaussian(3, 4, seed=1).float()
    z = F.normalize(torch.cat([u, v]))
    losses = []
    for i in range(6):
        others = [math.exp(z[i] @ z[j] / 0.2) for j in range(6) if j != i]
        losses.append(-math.log(math.exp(z[i] @ z[(i + 3) % 6] / 0.2) / sum(others)))
    assert fid.contrastive_loss(u, v).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_training_learns_with_labels(monkeypatch):
    """A few steps suffice for classes that differ in brightness."""
    monkeypatch.setitem(fid.IMAGES_SEEN, "toy", 1500)
    labels = torch.arange(300) % 2
    images = (smooth_images(300).float() / 4 + 150 * labels[:, None, None, None]).to(torch.uint8)
    net = fid.train_network(image_data(images[:50], labels=labels[:50], factors=gaussian(50, 9).float()))
    assert (fid.extract(net, images)[1].argmax(1) == labels).float().mean() > 0.95


def test_without_labels_the_class_is_the_nearest_cluster(monkeypatch):
    """The logits are those of Gaussians around the clusters' centres, so their difference tells the distances."""
    monkeypatch.setitem(fid.IMAGES_SEEN, "toy", 120)
    images = smooth_images(60)
    net = fid.train_network(image_data(images))
    features, logits = fid.extract(net, images)
    by_distance = -torch.cdist(features, net.head.weight).square() / 2
    assert torch.allclose(logits.log_softmax(1), by_distance.log_softmax(1), rtol=1e-3, atol=1e-3)


def test_what_is_augmented(monkeypatch):
    """Labelled images are shifted and mirrored, unless their factors are known. Others are shown in two views each."""
    monkeypatch.setattr(fid, "IMAGES_SEEN", {"toy": 48})  # two steps
    views, augment, labels = [], fid.augment, torch.arange(24) % 2
    monkeypatch.setattr(fid, "augment", lambda x, gen, crop=False: (
        views.append((len(x), crop)) or augment(x, gen, crop)))
    for more, expected in (({"labels": labels}, [(24, False)] * 2), ({}, [(24, True)] * 4),
                           ({"labels": labels, "factors": gaussian(24, 9).float()}, [])):
        views.clear()
        fid.train_network(image_data(smooth_images(24), **more))
        assert views == expected


def test_train_local_on_a_folder(monkeypatch, tmp_path, features_dir, capsys):
    """The network of an own folder stays below data/. It is trained once, and kept when the folder's files change."""
    monkeypatch.setitem(fid.IMAGES_SEEN, "mine.v1 [new]", 200)
    folder = save_folder(smooth_images(80, 40), tmp_path / "mine.v1 [new]")  # nothing in a name means anything
    own = tmp_path / "data" / "features"
    fid.main(["--train-local", folder])
    path, = own.glob("mine*.pt")
    before, report = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert len([*own.iterdir()]) == 2 and path.stem.startswith("mine.v1 [new]-") and not features_dir.exists()
    assert report["classes"] == 20 and 0 <= report["retrieval"] <= 1 and report["n_test"] == 8
    assert {"extractor", "note", "floor", "noise", "blur", "sample_size", "half_the_classes",
            "real_recall", "real_is"} <= set(report)
    out = capsys.readouterr().out
    assert f"{path.relative_to(tmp_path)} has the weights" in out and "which is kept" not in out
    assert f"--dataset folder --data-dir '{folder}' --image-size 64" in out  # as large as the images it was trained on
    monkeypatch.setattr(fid, "train_network", None)  # no second training
    save_folder(smooth_images(90, 48), tmp_path / "mine.v1 [new]" / "more")
    fid.main(["--train-local", folder])
    assert path.read_bytes() == before and [*own.glob("*.pt")] == [path]
    assert json.loads(path.with_suffix(".json").read_text()) == report  # that of the training
    assert f"{path.relative_to(tmp_path)}, which is kept and examined; remove it" in capsys.readouterr().out
    other = save_folder(smooth_images(60, 40, seed=3), tmp_path / "elsewhere" / "mine.v1 [new]")
    fid.main([folder, other, "--json"])
    assert json.loads(capsys.readouterr().out)["features"] == f"local-{path.stem}"
    expect_error(capsys, lambda: fid.main([other, folder]), "0 files, one is needed", f"--train-local '{other}'")
    fid.main([other, folder, "--weights", str(path)])
    named = save_folder(smooth_images(4), tmp_path / "shapes")  # not the data set
    fid.save_local(fid.LocalNet(2), features_dir, "shapes")
    expect_error(capsys, lambda: fid.main([named, folder]), "0 files, one is needed", "--train-local")
    expect_error(capsys, lambda: fid.main(["--train-local", "nowhere"]), "--train-local nowhere: no such folder")
    path.write_bytes(before[:5000])
    expect_error(capsys, lambda: fid.main(["--train-local", folder]), path.name, "wrong sha256")


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_every_folder_has_a_network_of_its_own(tmp_path, features_dir, local, capsys):
    """None is found by the name of another folder that is alike, whatever characters are in the names. A folder may be
    named by a relative path, too. Where there is none, the command that makes one can be pasted into a shell."""
    names = ["photos", "photos-2", "photos-12345678", "photos?", "photos*", "photos+", "[p]hotos", "one/photos"]
    own = [fid.own_name(tmp_path / name) for name in names]
    paths = [fid.save_local(local, fid.OWN_FEATURES_DIR, name) for name in own]
    assert len(set(paths)) == len(names)
    for name, path in zip(own, paths, strict=True):
        assert common.find_hashed(fid.OWN_FEATURES_DIR, name) == [path]
    assert own[0] == fid.own_name("photos") == fid.own_name("one/../photos/") and own[0].startswith("photos-")
    save_folder(smooth_images(2), tmp_path / "photos*")
    assert fid.load_extractor("local", "folder", data_dir="photos*").name == f"local-{paths[4].stem}"
    save_folder(smooth_images(2), tmp_path / "my photos")
    with pytest.raises(SystemExit) as stopped:
        fid.load_extractor("local", "folder", data_dir="my photos")
    assert "python fid.py --train-local 'my photos'" in f"{stopped.value}{capsys.readouterr().err}"


def test_the_network_of_a_data_set_is_never_trained_again(monkeypatch, features_dir, local, capsys):
    """Results are pinned to it: it is only examined. The report that was committed beside it stays, since another
    machine rounds otherwise."""
    data = {split: image_data(smooth_images(60, seed=i), name="shapes") for i, split in enumerate(("train", "test"))}
    monkeypatch.setattr(common, "load_images", lambda name, split, data_dir: data[split])
    monkeypatch.setattr(fid, "train_network", None)
    path = fid.save_local(local, features_dir, "shapes")
    path.with_suffix(".json").write_text("committed")
    fid.main(["--train-local", "shapes"])
    assert sorted(features_dir.iterdir()) == [path.with_suffix(".json"), path]
    assert path.with_suffix(".json").read_text() == "committed"
    out = capsys.readouterr().out
    assert '"real_recall"' in out and "which is kept" in out and "the report above" not in out
    assert "next: python stage1_baseline.py --features local --dataset shapes\n" in out


def test_few_images_are_seen_a_hundred_times(monkeypatch):
    """A network for a few hundred photos takes minutes, since it does not see 200,000 images in all."""
    bars = []
    monkeypatch.setattr(fid, "tqdm", lambda batches, **_: bars.append(len(batches)) or batches)
    fid.train_network(image_data(smooth_images(6), labels=torch.arange(6) % 2))
    assert bars == [100]  # batches of all six


def test_examine_few_images():
    """If none of the few held-out images is of the first half of the classes, there is no distance to report."""
    images = smooth_images(38, 32)
    train, test = (common.ImageData(part, torch.full((len(part),), 3), None, "few", "none", "drawn")
                   for part in images.split([30, 8]))
    assert fid.examine(fid.LocalNet(4).eval(), train, test)["half_the_classes"] is None


@pytest.mark.parametrize("name", fid.DATASETS)
def test_committed_extractors_keep_their_promises(name):
    """The reports beside the weights: accuracy, and distances that rise with noise and blur."""
    extractor = fid.load_extractor("local", name)  # checks the hash
    path = fid.FEATURES_DIR / f"{extractor.name.removeprefix('local-')}.pt"
    report = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size <= 2e6 and report["extractor"] == extractor.name
    assert report["classes"] == extractor.classes == {"cifar10": 10, "celeba64": 20}.get(name, extractor.classes)
    if name == "cifar10":
        assert report["accuracy"] >= 0.86 and "JPEG" in report["note"]
    if name == "shapes":  # the network was trained on these, and recognises every class
        images, labels, _ = draw_all(300, seed=3)
        found = fid.extract(extractor, images)[1].argmax(1)
        assert report["accuracy"] >= 0.99 and (found == labels).float().mean() >= 0.99
    rising = lambda steps: all(a < b for a, b in zip(steps, steps[1:], strict=False))  # noqa: E731
    weakest, *noise = report["noise"].values()  # at 0.02, 0.05, 0.1, 0.2, 0.4
    assert rising([report["floor"], *noise]) and weakest < noise[0]  # the face network does not see noise of 0.02
    assert rising([report["floor"], *report["blur"].values()])
    assert report["half_the_classes"] >= 5 * report["floor"]
    assert report["real_recall"] > 0.8


# ---- The command -----------------------------------------------------------------------------------------------------

@pytest.fixture
def folders(tmp_path, features_dir, local):
    """Two folders of images, and the flags that name a local network."""
    save_folder(smooth_images(60), tmp_path / "real" / "deep" / "down")
    weights = ["--weights", str(fid.save_local(local, features_dir, "toy"))]
    return SimpleNamespace(weights=weights, real=str(tmp_path / "real"),
                           good=save_folder(smooth_images(50, seed=1), tmp_path / "good"))


def test_command_on_folders_and_on_a_data_set(folders, capsys, tmp_path, monkeypatch):
    """Numbers of images and warnings, and the floor where images are held out, as JSON and as a table."""
    fid.main([folders.real, folders.good, *folders.weights, "--json", "--device", "cpu"])
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    for folder, count in ((folders.good, 50), (folders.real, 60)):
        assert f"warning: {count} images of {folder} are few for 64 features, so the" in captured.err
    assert "JPEG" not in captured.err and (row["n_real"], row["n_generated"]) == (60, 50) and len(row["scores"]) == 6
    assert row["features"] == "local-" + folders.weights[1][-15:-3]
    fid.main([folders.real, folders.good, *folders.weights, "--count", "45"])
    out = capsys.readouterr().out
    assert "45 images of" in out and "60 of" in out and "floor" not in out
    data = {split: image_data(smooth_images(80, seed=i), name="shapes") for i, split in enumerate(("train", "test"))}
    monkeypatch.setattr(common, "load_images", lambda name, split, data_dir: data[split])
    fid.main(["shapes", folders.good, *folders.weights, "--data-dir", str(tmp_path / "data")])
    out = capsys.readouterr().out
    assert "80 of shapes" in out and "50 held-out images; IS of real ones (K = 6)" in out
    assert len(files_in(tmp_path / "data" / "cache")) == 1
    fid.main(["shapes", folders.good, *folders.weights, "--data-dir", str(tmp_path / "data"), "--json"])
    row = json.loads(capsys.readouterr().out)
    logits = fid.extract(fid.load_extractor("local", "shapes", folders.weights[1]), fid.shuffle(data["test"].images))[1]
    assert (row["n_real"], row["n_floor"]) == (80, 50)
    assert row["real_is"] == pytest.approx(fid.inception_score(logits[:50])[0], rel=1e-5)


def test_command_reads_any_size_colour_and_suffix(folders, capsys, tmp_path):
    """Warnings name the folder whose images differ in size, and the one that is JPEG."""
    mixed = save_folder(smooth_images(20), tmp_path / "mixed")
    Image.new("L", (40, 20), 90).save(tmp_path / "mixed" / "grey.JPG")
    Image.new("RGBA", (33, 32), (1, 2, 3, 4)).save(tmp_path / "mixed" / "deeper.png")
    images, sizes, jpeg = fid.read_folder(mixed, "GENERATED")
    assert len(images) == 22 and not jpeg and sizes == {(32, 32), (20, 40), (32, 33)}
    assert {tuple(x.shape) for x in images} == {(3, 32, 32), (3, 20, 40), (3, 32, 33)}
    fid.main([folders.real, mixed, *folders.weights, "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["n_generated"] == 22 and captured.err.count("differ in size") == 1
    assert f"warning: images of {mixed} differ in size" in captured.err
    fid.main([mixed, folders.real, *folders.weights, "--json"])  # those of REAL, too
    assert f"warning: images of {mixed} differ in size" in capsys.readouterr().err
    jpegs = save_folder(smooth_images(20), tmp_path / "jpegs", "jpg")
    fid.main([folders.real, jpegs, *folders.weights, "--json"])
    assert f"warning: only {jpegs} is JPEG" in capsys.readouterr().err
    fid.main([jpegs, folders.real, *folders.weights, "--json"])
    assert f"warning: only {jpegs} is JPEG" in capsys.readouterr().err
    copies = str(shutil.copytree(jpegs, tmp_path / "copies"))
    fid.main([jpegs, copies, *folders.weights, "--json"])
    captured = capsys.readouterr()
    assert "JPEG" not in captured.err and json.loads(captured.out)["scores"]["fd_local"]["value"] < 1e-9
    assert "differ in size" not in captured.err and "pixels" not in captured.err
    large = save_folder(smooth_images(20).repeat_interleave(2, 2).repeat_interleave(2, 3), tmp_path / "large")
    fid.main([folders.real, large, *folders.weights, "--json"])
    assert (f"warning: images of {folders.real} have 32x32 pixels, those of {large} 64x64; resizing them moves the "
            "distance\n") in capsys.readouterr().err


def test_photographs_are_read_as_small_as_the_network_needs_them(folders, capsys, tmp_path):
    """Each is a square of the network's size, cut and resized as for training on them, so that many fit the memory. The
    warning names their own size."""
    photos = save_folder(torch.randint(0, 256, (6, 3, 90, 120), generator=common.generator(0)).byte(), tmp_path / "big")
    images, sizes, _ = fid.read_folder(photos, "REAL", largest=32)
    by_hand = {common.decode_file(path, 32, "centre").tobytes() for path in common.find_images(photos)}
    assert images.shape == (6, 3, 32, 32) and sizes == {(90, 120)} and len(by_hand) == 6
    assert {image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images} == by_hand
    assert fid.read_folder(photos, "REAL")[0].shape == (6, 3, 90, 120)
    fid.main([folders.real, photos, *folders.weights, "--json"])
    assert f"32x32 pixels, those of {photos} 90x120" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="Windows and macOS allow no such names")
def test_names_need_not_be_utf8(folders, tmp_path):
    """Neither that of a file nor that of its folder. What only looks like an image by its name is left out."""
    strange = os.fsencode(tmp_path / "strange") + b"\xe9"
    shutil.copytree(os.fsencode(folders.good), strange)
    os.rename(strange + b"/0000.png", strange + b"/caf\xe9.png")
    os.mkdir(strange + b"/holiday.jpg")
    folder = os.fsdecode(strange)
    assert len(os.fsencode(fid.own_name(folder))) == len("strange-01234567") + 1
    assert len(common.decode_files(common.find_images(folder), 32, "centre", tmp_path / "cache.npz")) == 50
    fid.main([folders.real, folder, *folders.weights, "--json"])


def test_command_errors_are_one_line(folders, capsys, tmp_path, origin, monkeypatch):
    """Every mistake is named before any work begins."""
    origin.unlink()
    single, broken = (save_folder(smooth_images(n), tmp_path / name) for n, name in ((1, "single"), (5, "broken")))
    (tmp_path / "broken" / "0000.png").write_bytes(b"not an image")
    pair, weights = [folders.real, folders.good], folders.weights
    nowhere, empty = str(tmp_path / "nowhere"), str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    cases = [([folders.real, single, *weights], "GENERATED", "found 1 image"),
             ([single, folders.good, *weights], "REAL", "found 1 images"),
             ([folders.real, nowhere, *weights], "GENERATED", f"no such folder: {nowhere}"),
             ([nowhere, folders.good], "REAL: no such folder", nowhere),
             ([empty, folders.good], f"{empty}: found 0 images", "--data-dir"),
             ([folders.real, nowhere, *weights, "--count", "9"], "GENERATED", f"no such folder: {nowhere}"),
             ([*pair, *weights, "--count", "51"], "--count 51", "50"),
             ([*pair, *weights, "--count", "-1"], "--count -1", "2 or more"),
             ([folders.real, broken, *weights], "0000.png", "cannot be read"),
             (pair, "--features local", "--train-local"),
             ([*pair, "--features", "inception"], "--weights", "--features local"),
             ([*pair, *weights, "--device", "tpu"], "--device tpu", "cpu"),
             ([folders.real, "--train-local", "shapes"], "--train-local shapes", f"leave {folders.real} out"),
             (["--train-local", "shapes", "--device", "cuda"], "runs on the CPU", "leave --device out"),
             ([*pair, "--count", "x"], "--count", "invalid int value"),
             ([*pair, *weights, "--data-dir", "data"], "--data-dir data", "REAL is a folder"),
             (["--train-local", empty, "--data-dir", "data"], "--data-dir data", f"--train-local {empty} is a folder"),
             ([str(tmp_path), folders.good, *weights], "one lies in the other", "move one of them"),
             ([folders.real, str(tmp_path), *weights], "one lies in the other", "move one of them"),
             ([folders.real], "GENERATED", "--help")]
    monkeypatch.setattr(fid, "extract", None)  # no work is begun
    for arguments, named, remedy in cases:
        expect_error(capsys, partial(fid.main, arguments), named, remedy)
    monkeypatch.undo()
    grey = save_folder(torch.full((5, 3, 32, 32), 90, dtype=torch.uint8), tmp_path / "grey")
    expect_error(capsys, partial(fid.main, [grey, folders.good, *weights]), f"all images of {grey} are alike")
