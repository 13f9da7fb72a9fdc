"""The evaluation of a model (fid.py, section 6): each number against a closed form, or against a model for which it is
known. And results/features/train.py, which makes feature networks."""

import dataclasses
import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, data_of, draw_all, oracle, settings
from test_fid import Colours, save_folder, smooth_images

import common
import fid
import stage1_baseline

spec = importlib.util.spec_from_file_location("train_features", fid.FEATURES / "train.py")
train_features = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_features)


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """One whose features are the mean colours of images. What it keeps lies in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return fid.Scorer(Colours(), data_of(200, 60))


@pytest.fixture
def pictures(monkeypatch):
    """The rows and titles of what would have been drawn, by the name of the file."""
    found = {}
    monkeypatch.setattr(common, "save_grid", lambda path, rows, titles=(): found.update({path.name: (rows, titles)}))
    return found


def chosen(**changes):
    return settings(prior="gaussian", sample_steps=4, eval_samples=60, probe_samples=45, probe_steps=3) | changes


def of_kind(kind, model):
    """`model` as a VAE alone, a diffusion model alone, or latent diffusion. A `pair` refines x_hat to its negative, and
    has a second prior, far from the first."""
    far = {"far": common.GaussianMixture(torch.ones(1), 2 * torch.ones(1, 8), 0.1 * torch.eye(8)[None])}
    grey = torch.zeros(1, 3, 32, 32)
    if kind == "pair":
        return dataclasses.replace(model, priors=model.priors | far,
                                   denoiser=lambda x_hat, z: oracle(model.diffusion, -x_hat))
    if kind == "vae":
        return dataclasses.replace(model, priors=model.priors | far, denoiser=None, diffusion=None)
    if kind == "diffusion":
        return dataclasses.replace(model, vae=None, priors={}, denoiser=lambda x_hat, z: oracle(model.diffusion, grey))
    return dataclasses.replace(model, vae=None, priors={}, shape=(8,), decode=model.vae.decoder,
                               diffusion=Points("v"), denoiser=lambda x_hat, z: oracle(Points("v"), torch.zeros(1, 8)))


class Points(common.Diffusion):
    """Diffusion of the codes of a VAE, which are no images."""

    def scales(self, t):
        return tuple(scale.flatten(1) for scale in super().scales(t))


# ---- Scores of a model -----------------------------------------------------------------------------------------------

def test_measure(tiny, scorer):
    """Scores are those of the refined images. There are at most `start` steps, and each may evaluate two networks."""
    model = of_kind("pair", tiny)
    row, x_hat, images = fid.measure(model, chosen(), scorer)
    assert (row["prior"], row["sampler"], row["steps"], row["nfe"], row["n_generated"]) == ("gaussian", "dpm", 4, 4, 60)
    assert (images.int() + x_hat.int() - 255).abs().max() <= 1 and row["seconds_per_image"] > 0
    assert scorer(images).items() <= row.items() and row["fd_local"] != scorer(x_hat)["fd_local"]
    model.diffusion, model.evaluations = common.Diffusion("v", start=5), 2
    row, _, _ = fid.measure(model, chosen(sample_steps=9), scorer)
    assert (row["steps"], row["nfe"]) == (5, 10)


@pytest.mark.parametrize("kind, expected", [
    ("pair", [("gaussian", "dpm", 4, 60), ("gaussian", "none", 0, 60), ("far", "dpm", 4, 45),
              ("gaussian", "ddim", 2, 45)]),
    ("vae", [("gaussian", "none", 0, 60), ("far", "none", 0, 60)]),
    ("diffusion", [("none", "dpm", 4, 60), ("none", "ddim", 2, 45)]),
    ("latent", [("none", "dpm", 4, 60), ("none", "ddim", 2, 45)])])
def test_rows_of_scores(kind, expected, tiny, scorer, tmp_path):
    """The headline comes first. The second row of a pair has the headline's x_hat before refinement."""
    model = of_kind(kind, tiny)
    rows = fid.score(tmp_path, model, chosen(grid=[["ddim", 2]]), scorer)
    assert [(row["prior"], row["sampler"], row["steps"], row["n_generated"]) for row in rows] == expected
    x_hat, images, _ = common.generate(model, chosen())
    assert rows[0]["fd_local"] == scorer(images)["fd_local"] and len(images) == 60
    if kind == "pair":
        assert scorer(x_hat).items() <= rows[1].items() and rows[1]["fd_local"] != rows[0]["fd_local"]
    drawn = {"samples.png", "trajectory.png"} if kind == "pair" else {"samples.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == drawn


def test_trajectory(tiny, tmp_path, pictures):
    """Two rows for each of four codes: from x_hat over all x_t, or over what is predicted from them, to the image."""
    real = draw_all(4, 1)[0]
    tiny.diffusion = common.Diffusion("v", start=400)
    tiny.denoiser = lambda x_hat, z: oracle(tiny.diffusion, common.to_float(real))
    for steps in (5, 1):
        fid.draw_trajectory(tmp_path, tiny, chosen(probe_steps=steps))
        rows, titles = pictures["trajectory.png"]
        assert titles == ["x_hat", *(f"t = {common.time_grid(400, steps)[i]}" for i in range(steps, 0, -1)), "image"]
        assert list(rows) == [f"{k} {label}" for k in (1, 2, 3, 4) for label in ("x_t", "x0")]
        for k in range(4):
            noisy, predicted = rows[f"{k + 1} x_t"], rows[f"{k + 1} x0"]
            assert len(noisy) == len(titles) and torch.equal(noisy[0], predicted[0])
            assert (predicted[1:].int() - real[k].int()).abs().max() <= 1
            assert (noisy[-1].int() - real[k].int()).abs().max() <= 1
            errors = [float((image.float() - real[k].float()).std()) for image in noisy[1:-1]]
            assert errors == sorted(errors, reverse=True) and errors[0] > 50


def test_robustness(tiny, scorer, tmp_path, pictures):
    """A refiner that knows the clean x_hat has the same distance at every strength. One that copies what it is shown
    has that of the noisy x_hat, as a VAE alone has. The mean is that over the strengths above 0."""
    knows = dataclasses.replace(tiny, denoiser=lambda x_hat, z: oracle(tiny.diffusion, tiny.vae.decoder(z)))
    flat, rising, alone = (fid.robustness(tmp_path, model, chosen(), scorer)
                           for model in (knows, tiny, of_kind("vae", tiny)))
    clean, *noisy = flat["fd"].values()
    assert list(flat["fd"]) == ["0.0", "0.1", "0.2", "0.4"] and flat["images"] == 45
    assert noisy == pytest.approx([clean] * 3, rel=1e-4) and flat["mean"] == pytest.approx(clean, rel=1e-4)
    assert clean == pytest.approx(rising["fd"]["0.0"], rel=1e-3)
    assert list(rising["fd"].values()) == pytest.approx(list(alone["fd"].values()), rel=1e-3)
    assert rising["mean"] == pytest.approx(sum(list(rising["fd"].values())[1:]) / 3)
    assert abs(rising["fd"]["0.4"] - clean) > 1e-3 * clean
    assert list(pictures["robustness.png"][0]) == [f"noise {sd}" for sd in fid.NOISE]


def test_noise_on_latents(tiny, scorer, tmp_path, pictures):
    """It is added before they are decoded: here all latents are 0, so that only noise tells images apart."""
    model = of_kind("latent", tiny)
    fid.robustness(tmp_path, model, chosen(), scorer)
    spreads = [float(images.float().std(0).mean()) for images in pictures["robustness.png"][0].values()]
    assert spreads[0] < 1 < spreads[1] < spreads[2] < spreads[3]


# ---- The latent space ------------------------------------------------------------------------------------------------

def test_slerp():
    """It starts at a and ends at b. On a circle, it moves by equal angles. Equal and opposite codes give no nan."""
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]])
    for w in (0, 0.25, 0.5, 1):
        angle = w * math.pi / 2
        assert fid.slerp(a, b, w)[0].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)
    a, b = torch.randn(2, 5, 64, generator=common.generator(0, "")).unbind()
    torch.testing.assert_close(fid.slerp(a, b, 0), a)
    torch.testing.assert_close(fid.slerp(a, b, 1), b)
    torch.testing.assert_close(fid.slerp(a, a, 0.3), a, rtol=1e-3, atol=1e-3)
    assert fid.slerp(a, -a, 0.5).isfinite().all()


def test_path_over_distance():
    """1 of a straight line, pi / 2 of half a circle. Long paths count for more: lengths are averaged before."""
    line = torch.linspace(0, 1, 9)[None, :, None] * torch.tensor([3.0, 4.0])
    angle = torch.linspace(0, math.pi, 200)
    circle = torch.stack([angle.cos(), angle.sin()], 1)[None]
    assert fid.path_over_distance(line) == pytest.approx(1)
    assert fid.path_over_distance(circle) == pytest.approx(math.pi / 2, rel=1e-3)
    there_and_back = torch.tensor([[[0.0], [9], [1]], [[0.0], [1], [2]]])  # lengths 17 and 2, ends 1 and 2 apart
    assert fid.path_over_distance(there_and_back) == pytest.approx(19 / 3)


@pytest.mark.parametrize("kind", ["pair", "vae"])
def test_latent_space(kind, tiny, scorer, tmp_path, monkeypatch, pictures):
    """With planted codes: a tiny `size`, x, and the class. So the probes know the class and these two factors alone.
    Paths begin and end at reconstructions."""
    train, test = scorer.data
    test.factors[:, 1] += 0.001  # so that images have other codes than they would have among the training images

    def encode(encoder, images, device):
        data = train if len(images) > len(test.images) else test
        index = (data.images[None] == images[:, None]).flatten(2).all(2).float().argmax(1)
        mu = torch.cat([data.factors[index, :2] * torch.tensor([0.05, 1]), F.one_hot(data.labels[index], 6)], 1)
        return mu, torch.full_like(mu, -2.0)

    monkeypatch.setattr(common, "encode", encode)
    model, side = of_kind(kind, tiny), chosen(sampler="dpm", sample_steps=3)
    model.priors["far"] = SimpleNamespace(log_prob=lambda z: torch.full((len(z),), -100.0))
    found = fid.latent_space(tmp_path, model, chosen(), scorer)
    mu, _ = encode(None, test.images, CPU)
    q = torch.distributions.Normal(mu, math.exp(-1))
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert found["kl_nats"] == pytest.approx(kl.item(), rel=1e-5)
    assert found["images"] == 60
    density = -0.5 * (8 * math.log(2 * math.pi) + (mu**2).sum(1).mean().item() + 8 * math.exp(-2))
    assert found["log_density"] == {"gaussian": pytest.approx(density, abs=0.2), "far": -100}

    assert found["probe_accuracy"] == 1
    r2 = found["probe_r2"]
    assert list(r2) == list(common.FACTORS) and min(r2["size"], r2["x"]) > 0.99
    assert max(value for name, value in r2.items() if name not in ("size", "x")) < 0.5

    _, paths = fid.images_along_paths(model, side, mu[:16], mu[16:32])
    features, _ = fid.extract(scorer.extractor, paths.flatten(0, 1))
    assert found["path_over_distance"] == pytest.approx(fid.path_over_distance(features.view(16, 9, -1)), rel=1e-3)
    assert found["path_over_distance"] > 1
    shown, _ = pictures["reconstructions.png"]
    x_hat = common.to_uint8(model.vae.decoder(mu[:12]))
    assert torch.equal(shown["real"], test.images[:12]) and (shown["VAE"].int() - x_hat.int()).abs().max() <= 1
    rows, _ = pictures["interpolation.png"]
    assert len(rows) == 6 and all(len(row) == 9 for row in rows.values())


def test_images_along_paths(tiny):
    """From what one code is decoded to, by way of the middle of the arc, to what the other one is decoded to. All are
    refined with the same noise: by a refiner that returns its first noisy image, to images that are alike."""
    first, last = torch.randn(2, 5, 8, generator=common.generator(0, "")).unbind()
    x_hat, images = fid.images_along_paths(of_kind("pair", tiny), chosen(), first, last)
    assert x_hat.shape == images.shape == (5, 9, 3, 32, 32)
    for k, z in ((0, first), (4, fid.slerp(first, last, 0.5)), (8, last)):
        expected = common.to_uint8(tiny.vae.decoder(z))
        assert (x_hat[:, k].int() - expected.int()).abs().max() <= 1
        assert (images[:, k].int() - 255 + expected.int()).abs().max() <= 1
    noise = []
    tiny.denoiser = lambda x_hat, z: lambda x, t: noise.append(x) or torch.zeros_like(x)
    fid.images_along_paths(tiny, chosen(), first, last)
    assert all(torch.equal(x, noise[0]) for x in noise[::4]) and len(noise) == 36  # four steps for each of nine images


def test_distance_to_originals(scorer):
    """Mean colours of images that are lighter by 5 are at the distance 3 * 5^2."""
    images = smooth_images(40) // 2
    assert fid.fd_to_originals(scorer, images, images) < 1e-6
    assert fid.fd_to_originals(scorer, images + 5, images) == pytest.approx(75, rel=1e-3)


# ---- What is written -------------------------------------------------------------------------------------------------

def test_metrics_and_printed_table(tiny, scorer, tmp_path, capsys):
    """Facts, rows and tables of a run. The printed table has a line for each run."""
    plan = chosen(home=str(tmp_path / "home"), export=3, seed=3)
    tiny.networks = (torch.nn.Linear(3, 4), torch.nn.Linear(2, 3))  # 16 and 9 parameters
    checkpoint = {"minutes": 1.25, "log": [{"step": 1, "sse": 2.0}, {"step": 20, "sse": 1.5}]}
    row, _, _ = fid.measure(tiny, plan, scorer)
    for name, rows in (("form1", [row]), ("form2", [row | {"steps": 7}])):
        fid.write_metrics(Path(plan["home"]) / f"{name}-s3", checkpoint, tiny, plan, scorer, rows, {"a": 1})
    folder = Path(plan["home"]) / "form1-s3"
    metrics = json.loads((folder / "metrics.json").read_text())
    facts = {"dataset": "shapes", "variant": "form1", "budget": "smoke", "seed": 3, "features": "colours",
             "minutes": 1.25, "parameters": 25, "device": "cpu", "settings": plan, "data_note": "drawn by the program"}
    assert facts.items() <= metrics["run"].items() and metrics["schema"] == 1
    assert metrics["rows"] == [row] and metrics["tables"] == {"a": 1, "training": checkpoint["log"]}
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["00000.png", "00001.png", "00002.png"]
    capsys.readouterr()
    fid.print_results(plan, scorer)
    head, first, second, *notes = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "prior,", "sampler"] and head.split()[-1] == "hf_energy"
    assert first.split()[:5] == ["form1-s3", "gaussian,", "dpm", "4", "60"] and second.split()[3] == "7"
    assert first.index("1.2 ") == head.index("minutes") and first.split()[-1] == fid.show(row["hf_energy"])
    assert f"  {fid.show(row['fd_local'])}  " in first and len(fid.show(row["fd_local"])) > 16  # however wide it is
    assert len(notes) == 2 and "colours" in notes[0] and plan["home"] in notes[1]


def test_show():
    assert fid.show({"value": 1234.5}) == "1.23e+03" and fid.show({"value": 0.12345}) == "0.123"
    assert fid.show({"value": 12.345, "low": 11.111, "high": 13.579}) == "12.3 [11.1, 13.6]"


# ---- Making a feature network (results/features/train.py) ------------------------------------------------------------

def test_cropped_views():
    """Such a view shows a square of 25 to 100% of the area, mirrored or not, with jitter. On a ramp from left to right,
    the slope inside is the side of the view."""
    gen, ramp = common.generator(0, ""), torch.linspace(-0.5, 0.5, 32).expand(4000, 3, 32, 32)
    views = train_features.augment(ramp, gen)
    middle = views[:, :, :, 15:17].mean((1, 2))  # (B, 2), two columns in the middle
    slope = (middle[:, 1] - middle[:, 0]) * 31
    assert 0.4 < (slope < 0).float().mean() < 0.6
    # Contrast changes it by a factor of 0.6 to 1.4, evenly. The mean of the factor's square is 1 + 0.8^2 / 12.
    assert slope.square().mean() / (1 + 0.8**2 / 12) == pytest.approx((0.25 + 1) / 2, rel=0.03)
    assert slope.square().max() < 1.4**2 and slope.square().min() > 0.6**2 * 0.25 * 0.9
    shift = train_features.augment(torch.zeros(400, 3, 16, 16), gen)  # brightness alone
    assert shift.std((1, 2, 3)).max() < 1e-6 and 0.28 < shift.abs().max() < 0.3


def test_contrastive_loss():
    """NT-Xent with the sums written out."""
    u, v = torch.randn(2, 3, 4, generator=common.generator(0, "")).unbind()
    z = F.normalize(torch.cat([u, v]))
    losses = []
    for i in range(6):
        others = [math.exp(z[i] @ z[j] / 0.2) for j in range(6) if j != i]
        losses.append(-math.log(math.exp(z[i] @ z[(i + 3) % 6] / 0.2) / sum(others)))
    assert train_features.contrastive_loss(u, v).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_classes_are_learned(monkeypatch):
    """A few steps suffice for classes that differ in brightness."""
    monkeypatch.setitem(train_features.IMAGES_SEEN, "toy", 400)
    labels = torch.arange(300) % 2
    images = (smooth_images(300).float() / 4 + 150 * labels[:, None, None, None]).to(torch.uint8)
    factors = torch.randn(50, 11, generator=common.generator(0, ""))
    net = train_features.train(common.ImageData(images[:50], "", labels[:50], factors), "toy")
    assert (fid.extract(net, images)[1].argmax(1) == labels).float().mean() > 0.95


def test_without_labels_the_class_is_the_nearest_cluster(monkeypatch):
    """The logits are those of Gaussians around the clusters' centres, so their difference tells the distances."""
    monkeypatch.setitem(train_features.IMAGES_SEEN, "toy", 120)
    net = train_features.train(common.ImageData(smooth_images(60), ""), "toy")
    features, logits = fid.extract(net, smooth_images(60))
    by_distance = -torch.cdist(features, net.head.weight).square() / 2
    torch.testing.assert_close(logits.log_softmax(1), by_distance.log_softmax(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("labels, factors, views", [(True, False, 2), (False, False, 4), (True, True, 0)])
def test_what_is_augmented(labels, factors, views, monkeypatch):
    """In two steps: labelled images, unless their factors are known; others are shown in two views each."""
    monkeypatch.setitem(train_features.IMAGES_SEEN, "toy", 48)
    calls, augment = [], train_features.augment
    monkeypatch.setattr(train_features, "augment", lambda x, gen: calls.append(len(x)) or augment(x, gen))
    train_features.train(common.ImageData(smooth_images(24), "", torch.arange(24) % 2 if labels else None,
                                          torch.randn(24, 11) if factors else None), "toy")
    assert calls == [24] * views


def test_a_network_for_own_photos(tmp_path, monkeypatch, capsys):
    """It is written below data/, and a stage scores by it, which is named with --weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_features.IMAGES_SEEN, "my photos", 60)
    save_folder(smooth_images(60, 70), tmp_path / "my photos")
    train_features.main(["my photos"])
    path = Path("data/features/my photos.pt")
    assert f"--weights {path}" in capsys.readouterr().out
    report = json.loads(path.with_suffix(".json").read_text())
    assert report.keys() == {"images", "floor", "noise", "blur"} and report["images"] == 6
    stage1_baseline.main(["--dataset", "folder", "--data-dir", "my photos", "--budget", "smoke", "--variant", "vae",
                          "--device", "cpu", "--weights", str(path)])
    metrics = json.loads(next(Path("runs").rglob("metrics.json")).read_text())
    assert metrics["run"]["features"] == "local-my photos" and metrics["rows"][0]["fd_local"]["value"] > 0


@pytest.mark.parametrize("name", ["shapes", "cifar10", "celeba64"])
def test_committed_networks(name):
    """They load. The reports beside them say that distances rise with noise and blur."""
    path = fid.FEATURES / f"{name}.pt"
    net, report = fid.load_extractor("local", name), json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size < 2e6 and net.size == common.DATASETS[name] and net.name == f"local-{name}"
    _, *noise = report["noise"].values()  # the network of faces does not see the weakest
    for distances in (noise, report["blur"].values()):
        assert all(a < b for a, b in itertools.pairwise([report["floor"], *distances]))
    if name == "shapes":  # the network was trained on these, and sees spots
        images, labels, _ = draw_all(600, seed=3)
        features, logits = fid.extract(net, images)
        assert (logits.argmax(1) == labels).float().mean() > 0.99
        assert features.mean(0).abs().max() < 0.5 and features.var(0).mean() == pytest.approx(1, abs=0.2)
        flat = fid.extract(net, draw_all(600, seed=3, flat_spots=True)[0])[0]
        real, others = (fid.moments(x) for x in (features, fid.extract(net, draw_all(600, seed=4)[0])[0]))
        assert fid.frechet_distance(fid.moments(flat), others) > 5 * fid.frechet_distance(real, others)
