"""fid.py against closed forms, brute force, torchvision's blocks, a frozen fingerprint and a local download server."""

import hashlib
import http.server
import io
import json
import math
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import fid


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


# ---- Groups 1 to 3: the Inception network ----------------------------------------------------------------------------


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


class Pools:
    """torch.nn.functional as torchvision's blocks see it, with the two patches of the 2015 network."""

    maximum = False

    def __getattr__(self, name):
        return getattr(F, name)

    def avg_pool2d(self, x, kernel_size, stride, padding):
        if self.maximum:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)


def test_inception_equals_torchvision_with_patched_blocks(net, monkeypatch):
    peer = torchvision.models.Inception3(1008, aux_logits=False, transform_input=False, init_weights=False).eval()
    missing, unexpected = peer.load_state_dict(net.state_dict(), strict=False)
    assert not missing and not unexpected
    assert sum(p.numel() for p in net.parameters()) == 23_850_960 and len(net.state_dict()) == 566
    pools, seen = Pools(), {}
    monkeypatch.setattr(torchvision.models.inception, "F", pools)
    peer.Mixed_7c.register_forward_pre_hook(lambda *_: setattr(pools, "maximum", True))
    peer.avgpool.register_forward_hook(lambda _module, _inputs, output: seen.update(pool=output.flatten(1)))
    x = (torch.from_numpy(np.random.RandomState(1).rand(1, 3, 299, 299)).float() * 2) - 1
    with torch.no_grad():
        theirs = peer(x)
        ours = net.pool3(x)
    assert ours.std() > 0.05  # the comparison is not of collapsed features
    torch.testing.assert_close(ours, seen["pool"], atol=1e-5, rtol=0)
    torch.testing.assert_close(net.fc(ours), theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours @ net.fc.weight.T, theirs - peer.fc.bias, atol=1e-5, rtol=0)


FINGERPRINT = [0.02658, 0.13193, 0.8576, 2.8705, 1.75571, 0.01476, 0.99666, 0.01696,  # pool3[::256]
               0.65822, 0.53752, 0.14517, 1.40225, -1.24928, 0.12982, -1.22742, 1.89449]  # logits[::126]


def test_inception_fingerprint_is_frozen(answer):
    pool3, logits = answer
    assert pool3.shape == (1, 2048) and logits.shape == (1, 1008)
    assert [*pool3[0, ::256].tolist(), *logits[0, ::126].tolist()] == pytest.approx(FINGERPRINT, abs=1e-4)


def wrong_average(net):
    net.Mixed_5b.pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)


def wrong_last_pool(net):
    net.Mixed_7c.pool = fid.average_pool


def wrong_epsilon(net):
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-5


def wrong_scaling_and_resize(net):
    net.compat = True


@pytest.mark.parametrize("mutate", [wrong_average, wrong_last_pool, wrong_epsilon, wrong_scaling_and_resize])
def test_each_wrong_patch_is_caught(mutate, net, picture, answer):
    wrong = fid.InceptionV3()
    wrong.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(wrong(picture)[0], answer[0], atol=1e-5, rtol=0)
        mutate(wrong)
        assert (wrong(picture)[0] - answer[0]).abs().max() > 1e-4


def test_scaling_alone_and_class_count_are_caught(net, picture, answer):
    rows = fid.resize_matrix(64, 299)
    x = rows @ picture.float() @ rows.T
    with torch.no_grad():
        torch.testing.assert_close(net.pool3((x - 128) / 128), answer[0], atol=1e-5, rtol=0)
        assert (net.pool3(x / 127.5 - 1) - answer[0]).abs().max() > 1e-4
    state = dict(net.state_dict(), **{"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        fid.InceptionV3().load_state_dict(state)


def test_pools_block_by_block():
    ones, spike = torch.ones(1, 2, 5, 5), torch.zeros(1, 1, 5, 5)
    spike[0, 0, 2, 2] = 7
    for name, block in fid.InceptionV3().named_children():
        if name.startswith("Mixed") and name not in ("Mixed_6a", "Mixed_7a"):
            assert torch.equal(block.pool(ones), ones)  # padding is not counted
            centre = block.pool(spike)[0, 0, 1:4, 1:4]
            torch.testing.assert_close(centre, torch.full((3, 3), 7.0 if name == "Mixed_7c" else 7 / 9))
    assert fid.shrink_pool(spike).tolist() == [[[[7, 7], [7, 7]]]]


def test_bf16_is_another_pass_under_another_name(net, picture, answer):
    half = fid.InceptionV3(bf16=True)
    half.load_state_dict(net.state_dict())
    with torch.no_grad():
        error = (half(picture)[0] - answer[0]).abs().max()
    assert 1e-5 < error < 0.1 * answer[0].abs().max()


# ---- Group 4: resize -------------------------------------------------------------------------------------------------


def test_resize_tables():
    tf1 = [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    half = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    assert fid.resize_matrix(2, 4).tolist() == tf1 and fid.resize_matrix(2, 4, half_pixel=True).tolist() == half
    image, m = torch.tensor([[0.0, 4.0], [8.0, 12.0]]), fid.resize_matrix(2, 4)
    assert (m @ image @ m.T).tolist() == [[0, 2, 4, 4], [4, 6, 8, 8], [8, 10, 12, 12], [8, 10, 12, 12]]


@pytest.mark.parametrize("size", [1, 31, 32, 64, 299, 500])
def test_resize_keeps_constants_and_equals_interpolate(size):
    for rule in (False, True):
        torch.testing.assert_close(fid.resize_matrix(size, 299, rule).sum(1), torch.ones(299))
    x, m = random_images(1, size).double(), fid.resize_matrix(size, 299, half_pixel=True).double()
    peer = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(m @ x @ m.T, peer, atol=1e-3, rtol=0)
    if size == 299:
        assert torch.equal(fid.resize_matrix(299, 299), torch.eye(299))


# ---- Group 5: the Frechet distance -----------------------------------------------------------------------------------


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


# ---- Group 6: streaming ----------------------------------------------------------------------------------------------


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


# ---- Group 7: Inception Score ----------------------------------------------------------------------------------------


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


# ---- Group 8: KID ----------------------------------------------------------------------------------------------------


def slow_kid(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n, m, xx, yy = len(x), len(y), kernel(x, x), kernel(y, y)
    return ((xx.sum() - np.trace(xx)) / n / (n - 1) + (yy.sum() - np.trace(yy)) / m / (m - 1) - 2 * kernel(x, y).mean())


def test_kid_equals_brute_force():
    x, y = gaussian(90, 6).float(), gaussian(70, 6, seed=1, shift=0.5).float()
    for chunk in (512, 90, 32, 1):
        assert fid.kid(x, y, size=None, chunk=chunk) == pytest.approx(slow_kid(x, y), rel=1e-12)
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


# ---- Group 9: precision and recall -----------------------------------------------------------------------------------


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
def test_precision_recall_equals_brute_force(chunk):
    real, generated = gaussian(50, 3), gaussian(60, 3, seed=1, scale=1.2, shift=0.8)
    precision, recall = fid.precision_recall(real, generated, chunk=chunk)
    assert (precision, recall) == pytest.approx(slow_precision_recall(real, generated, 3)) and recall != precision < 1


def test_precision_recall_of_collapse_duplicates_and_too_few():
    real = gaussian(200, 4)
    precision, recall = fid.precision_recall(real, real[:1] + 0.001 * gaussian(200, 4, seed=1))
    assert precision == 1 and recall < 0.05
    twice = (gaussian(30, 2048).float() * 3 + 1).repeat(5, 1)  # five copies of each: radius 0, found only by `<=`
    assert fid.precision_recall(twice, twice, chunk=64) == (1, 1)
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


# ---- Group 10: the door, batches, weights ----------------------------------------------------------------------------


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
    two = fid.extract(net, images[:2], batch_size=2)[0]
    torch.testing.assert_close(fid.extract(net, images[:2], batch_size=1)[0], two, atol=1e-4, rtol=1e-4)


def test_extract_is_immune_to_train_mode(local):
    images = random_images(8)
    before = fid.extract(local, images)[0]
    torch.testing.assert_close(fid.extract(local.train(), images)[0], before)
    torch.testing.assert_close(fid.extract(local, images)[0], before)


def test_only_uint8_enters(local, net):
    for extractor in (local, net):
        for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8),
                      torch.zeros(1, 4, 8, 8, dtype=torch.uint8)):
            with pytest.raises(ValueError, match=r"uint8.*round\(\)"):
                extractor(wrong)
    grey = random_images(2)[:, :1]
    torch.testing.assert_close(local(grey)[0], local(grey.repeat(1, 3, 1, 1))[0])


def test_other_sizes_are_resized(local):
    assert fid.extract(local, random_images(3, 48))[0].shape == (3, 64)
    mixed = [random_images(1, 32)[0], random_images(1, 48)[0]]
    torch.testing.assert_close(fid.extract(local, mixed)[0][1:], fid.extract(local, mixed[1][None])[0])


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
    assert fid.load_inception(compat=True, bf16=True).name == loaded.name + "-pytorchfid-bf16"
    moved = tmp_path / "mine.pth"
    server.cache.rename(moved)
    assert fid.load_inception(weights=str(moved)).name == loaded.name
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", str(moved))
    assert fid.load_inception().name == loaded.name and files_in(tmp_path) == [moved]


def test_bad_downloads_leave_no_file(server, weight_bytes, monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(weight_bytes).hexdigest())
    cases = [(b"x" * 1000, None, "1,000 bytes, wrong sha256"),  # another file
             (weight_bytes[:50_000], len(weight_bytes), "50,000 bytes, wrong sha256"),  # cut off
             (b"", None, "no download")]  # 404
    for body, length, message in cases:
        server.body, server.length = body, length
        with pytest.raises(fid.UserError, match=message) as caught:
            fid.load_extractor("inception", "cifar10")
        text = str(caught.value)
        assert all(word in text for word in ("--weights", "--features local", "FID_INCEPTION_WEIGHTS"))
        assert "\n" not in text
        assert files_in(tmp_path) == []


def test_offline_and_damaged_files_name_the_flag(server, monkeypatch, tmp_path, weight_bytes):
    monkeypatch.setattr(fid, "INCEPTION_URL", "http://127.0.0.1:9/nothing")  # nobody listens there
    with pytest.raises(fid.UserError, match=r"no download.*--weights.*--features local"):
        fid.load_inception()
    with pytest.raises(fid.UserError, match=r"--weights .*absent.pth: unreadable"):
        fid.load_inception(weights=str(tmp_path / "absent.pth"))
    (tmp_path / "half.pth").write_bytes(weight_bytes[:1000])
    with pytest.raises(fid.UserError, match=r"half.pth: 1,000 bytes, wrong sha256"):
        fid.load_inception(weights=str(tmp_path / "half.pth"))
    assert (tmp_path / "half.pth").is_file()  # the user's own file is not touched
    buffer = io.BytesIO()
    torch.save({"conv.weight": torch.zeros(1)}, buffer)
    (tmp_path / "other.pth").write_bytes(buffer.getvalue())
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    with pytest.raises(fid.UserError, match="do not fit"):
        fid.load_inception(weights=str(tmp_path / "other.pth"))


@pytest.fixture
def features_dir(monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "FEATURES_DIR", tmp_path / "features")
    return tmp_path / "features"


def test_local_files_are_pinned_by_hash(features_dir, local):
    with pytest.raises(fid.UserError, match=r"--features local: 0 files .*shapes-<hash8>.pt.*--train-local shapes"):
        fid.load_extractor("local", "shapes")
    path = fid.save_local(local, "shapes", features_dir)
    assert path.stem == "shapes-" + hashlib.sha256(path.read_bytes()).hexdigest()[:8] and path.stat().st_size < 2e6
    assert fid.save_local(local, "shapes", features_dir) == path  # the same weights give the same bytes
    loaded = fid.load_extractor("local", "shapes")
    assert (loaded.name, loaded.suffix, loaded.classes, loaded.dim) == (f"local-{path.stem}", "_local", 6, 64)
    torch.testing.assert_close(loaded(random_images(4))[0], local(random_images(4))[0], atol=0.02, rtol=0)
    assert fid.load_extractor("local", "folder", data_dir="some/where/shapes").name == loaded.name
    assert fid.load_extractor("local", "cifar10", weights=str(path)).name == loaded.name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(fid.UserError, match="has not its name's sha256"):
        fid.load_extractor("local", "shapes")
    (features_dir / "shapes-00000000.pt").write_bytes(b"")
    with pytest.raises(fid.UserError, match="2 files"):
        fid.load_extractor("local", "shapes")
    with pytest.raises(fid.UserError, match="--weights gone.pt: no such file"):
        fid.load_extractor("local", "shapes", weights="gone.pt")


# ---- Group 11: statistics --------------------------------------------------------------------------------------------


def test_floor_law():
    """E[FD] of two samples of one Gaussian, against the formula, within 10%."""
    spread = torch.linspace(0.3, 2, 24).double()
    values = [fid.frechet_distance(stats(gaussian(300, 24, seed=2 * i) * spread),
                                   stats(gaussian(600, 24, seed=2 * i + 1) * spread)) for i in range(30)]
    formula = fid.expected_floor(exact_stats(spread * 0, spread.square().diag(), count=600), 300)
    assert np.mean(values) == pytest.approx(formula, rel=0.1)


def test_leave_out_equals_leaving_out():
    n, real = 103, gaussian(90, 4, seed=9)
    x, keep = gaussian(n, 4, shift=0.3), fid.leave_out(n)
    kids, spreads = fid.kid(real, x, size=None, keep=keep), fid.diversity(real, x, keep=keep)
    first = fid.inception_score(x, splits=1, keep=keep)[0]
    assert len(kids) == len(spreads) == len(first) == 21
    for column, rest in ((0, torch.ones(n, dtype=torch.bool)), (4, torch.arange(n) % 20 != 3)):
        assert torch.equal(keep[:, column].bool(), rest)
        assert kids[column] == pytest.approx(slow_kid(real, x[rest]), rel=1e-10)
        assert spreads[column] == pytest.approx(fid.diversity(real, x[rest]), rel=1e-10)
        assert first[column] == pytest.approx(fid.inception_score(x[rest], splits=1)[0], rel=1e-10)
    assert fid.leave_out(39).shape == (39, 1)


def test_interval_is_the_classic_one_for_a_mean():
    """For a mean with equal groups the grouped jackknife is the t interval of the group means."""
    x = np.random.RandomState(0).randn(200)
    means = x.reshape(10, 20).mean(0)
    left = [np.delete(x, np.s_[g::20]).mean() for g in range(20)]
    result = fid.interval([x.mean(), *left])
    half = 2.093024 * means.std(ddof=1) / math.sqrt(20)
    assert (result["low"], result["high"]) == pytest.approx((x.mean() - half, x.mean() + half))
    assert fid.interval(3.0) == {"value": 3.0, "low": None, "high": None}


def test_intervals_cover_the_expected_value():
    """FD of 200 draws against a fixed reference: 95% intervals cover its mean about 95% of the time."""
    ref = stats(gaussian(2000, 6, seed=999))
    results = []
    for i in range(60):
        x = gaussian(200, 6, seed=i, shift=0.3)
        values = [fid.frechet_distance(stats(x[kept]), ref) for kept in fid.leave_out(200).T.bool()]
        results.append(fid.interval(values))
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
def test_scores_of_few_images_are_finite(local, real, count):
    row = fid.scores(local, smooth_images(count, seed=2), real)
    assert all(math.isfinite(score["value"]) for score in row.values())
    assert all((score["low"] is None) == (count < 40 or key[:3] in ("pre", "rec", "flo")) for key, score in row.items())
    json.dumps(row, allow_nan=False)
    with pytest.raises(fid.UserError, match="at least 2"):
        fid.scores(local, smooth_images(1), real)


def test_scores_with_subsets_of_a_thousand(local):
    """Above 2,000 images KID takes subsets; precision and recall take as many real images as generated."""
    ref = fid.make_reference(local, smooth_images(2500, 32))
    kids = fid.kid(ref.features, ref.features[:2100], keep=fid.leave_out(2100), subsets=2)
    assert len(kids) == 21 and all(abs(v - kids[0]) < 0.1 * (1 + abs(kids[0])) for v in kids)
    assert ref.test_features is None
    row = fid.scores(local, smooth_images(100, seed=1), ref)
    assert row["floor_local"]["value"] == pytest.approx(fid.expected_floor(ref.stats, 100))


def test_reference_is_cached_by_everything_that_matters(local, tmp_path):
    train, test = smooth_images(60), smooth_images(30, seed=1)
    first = fid.reference(local, image_data(train), image_data(test, split="test"), tmp_path)
    files = set(tmp_path.iterdir())
    again = fid.reference(local, image_data(train), image_data(test, split="test"), tmp_path)
    assert set(tmp_path.iterdir()) == files and len(files) == 1
    assert torch.equal(again.stats.cov, first.stats.cov) and torch.equal(again.stats.root, first.stats.root)
    assert torch.equal(again.features, first.features) and torch.equal(again.test_logits, first.test_logits)
    assert again.count == 60
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
    assert report["classes"] == 20 and 0 <= report["retrieval"] <= 1 and report["train_seconds"] is not None
    assert {"floor", "noise", "blur", "half_the_classes", "fifty_images_repeated_recall", "real_is"} <= set(report)
    before = path.read_bytes()
    fid.main(["--train-local", folder])  # there already: examined, not trained again
    assert path.read_bytes() == before and [*features_dir.glob("*.pt")] == [path]
    again = json.loads(path.with_suffix(".json").read_text())
    assert again == report and path.stem in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        fid.main(["--train-local", "no-such-folder"])
    assert caught.value.code == 2 and "--train-local no-such-folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", fid.DATASETS)
def test_committed_extractors_keep_their_promises(name):
    extractor = fid.load_extractor("local", name)  # checks the hash
    path = fid.FEATURES_DIR / f"{extractor.name.removeprefix('local-')}.pt"
    report = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size <= 2e6 and report["extractor"] == extractor.name
    assert report["classes"] == extractor.classes == {"shapes": 8, "cifar10": 10, "celeba64": 20}[name]
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
    weights = fid.save_local(local, "toy", features_dir)
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
    images, lossy = fid.read_folder(mixed, "GENERATED")
    assert len(images) == 22 and not lossy
    assert {tuple(x.shape) for x in images} == {(3, 32, 32), (3, 20, 40), (3, 32, 33)}
    fid.main([folders.real, str(mixed), "--weights", folders.weights, "--json"])
    assert json.loads(capsys.readouterr().out)["n_generated"] == 22
    jpegs = save_folder(smooth_images(20), tmp_path / "jpegs", "jpg")
    fid.main([folders.real, jpegs, "--weights", folders.weights, "--json"])
    assert "warning: only one side is JPEG" in capsys.readouterr().err
    fid.main([jpegs, jpegs, "--weights", folders.weights, "--json"])
    captured = capsys.readouterr()
    assert "JPEG" not in captured.err and json.loads(captured.out)["scores"]["fd_local"]["value"] < 1e-9


def test_command_keeps_sixteen_bits_of_grey(tmp_path):
    """The upper 8 of 16 bits, where PIL alone clips to white."""
    grey = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
    for name in "ab":
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
    images, _ = fid.read_folder(tmp_path, "REAL")
    assert images.shape == (2, 3, 64, 64) and (images[0].numpy() == grey >> 8).all()


def test_command_on_a_data_set(folders, capsys, tmp_path, monkeypatch):
    import common
    data = {split: image_data(smooth_images(80, seed=i), name="shapes", split=split)
            for i, split in enumerate(("train", "test"))}
    monkeypatch.setattr(common, "load_images", lambda name, split, data_dir: data[split])
    fid.main(["shapes", folders.good, "--weights", folders.weights, "--data-dir", str(tmp_path / "data")])
    out = capsys.readouterr().out
    assert "80 of shapes" in out and "50 held-out images; IS of real ones (K = 6)" in out
    assert len(files_in(tmp_path / "data" / "cache")) == 1


def test_command_errors_are_one_line(folders, capsys, tmp_path, server):
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
    for arguments, named, remedy in cases:
        with pytest.raises(SystemExit) as caught:
            fid.main(arguments)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and last.startswith("error: ") and named in last and remedy in last


def test_fewer_images_a_larger_distance():
    """Features of one distribution: the distance to a large reference falls like 1 / count."""
    gen = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, 16, generator=gen, dtype=torch.float64)  # noqa: E731
    found = fid.sample_size_bias(draw(2000), SimpleNamespace(stats=fid.FeatureStats().update(draw(50_000))))
    assert list(found) == [100, 250, 500, 1000, 2000]
    assert found[100] / found[1000] == pytest.approx(10, rel=0.3)
