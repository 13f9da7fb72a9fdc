"""common.py against closed forms, oracles and small files built here. No test needs the network."""

import argparse
import colorsys
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, draw_all, expect_error, oracle, same, settings, tiny_model
from PIL import Image
from scipy.cluster.vq import kmeans2
from torch import nn

import common

T = 1000
SAMPLERS = ("ddpm", "ddim", "dpm")
Normal, kl_divergence = torch.distributions.Normal, torch.distributions.kl_divergence


def randn(*shape, seed=0):
    """Standard normal draws, the same ones for the same seed."""
    return torch.randn(shape, generator=seeded(seed))


def seeded(seed=0):
    """A generator for the draws of a test."""
    return torch.Generator().manual_seed(seed)


# ---- Small things ----------------------------------------------------------------------------------------------------

def test_generator():
    """Its seed depends on seed and purpose, and on nothing else: it is the same in every process."""
    assert len({common.generator(*both).initial_seed() for both in ((1, "a"), (1, "b"), (11, "a"), (1, "1 a"))}) == 4
    assert common.generator(0, "training, process 0").initial_seed() == 65534209867069308


def test_uint8_round_trip_is_the_identity_and_rounds():
    """0.4 of a level is rounded down and 0.6 up. (Truncation would round both down.) Values out of range are
    clamped."""
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(u)), u)
    assert common.to_uint8(common.to_float(torch.tensor([100.4, 100.6, -20, 300]))).tolist() == [100, 101, 0, 255]


def test_devices(monkeypatch, capsys):
    """The error names a device that this machine lacks. `auto` takes what there is, and each of
    several processes the GPU of its own number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    expect_error(capsys, lambda: common.choose_device("cuda:99"), "--device cuda:99")
    assert common.choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for ranks, expected in ((1, "cuda"), (2, "cuda:1")):
        monkeypatch.setattr(common, "RANKS", ranks)
        assert common.choose_device("auto") == torch.device(expected)


def test_precision(monkeypatch):
    """Networks run in bfloat16 on a GPU or CPU that has it, in float32 on older ones."""
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: dtype if enabled else torch.float32)
    for device, found, dtype in (("cpu", False, torch.float32), ("cpu", True, torch.bfloat16),
                                 ("cuda", (7, 5), torch.float32), ("cuda", (8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=found: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=found: found)
        assert common.autocast(torch.device(device)) == dtype, found


# ---- Diffusion -------------------------------------------------------------------------------------------------------

def test_forward_marginals():
    """Composing x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps for t = 1..T gives q(x_t | x0). alpha_bar[0] is 1."""
    diffusion, mean, variance = common.Diffusion("eps"), 1.0, 0.0
    assert float(diffusion.alpha_bar[0]) == 1 and len(diffusion.alpha_bar) == T + 1
    for t in range(1, T + 1):
        beta = 1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        x_t = diffusion.q_sample(torch.full((1, 1, 1, 2), 0.8), torch.tensor([t]), torch.tensor([0.0, 1.0]))
        assert x_t.flatten().tolist() == pytest.approx([0.8 * mean, 0.8 * mean + variance**0.5], rel=1e-5)


@pytest.mark.parametrize("start", [T, 400, 1])
def test_training_times(start, monkeypatch):
    """Times are in 1..start, all equally often. Both of float32's extreme draws stay in the range."""
    diffusion = common.Diffusion("eps", start)
    grid = (torch.arange(50 * start) + 0.5) / (50 * start)
    monkeypatch.setattr(torch, "rand", lambda count, **how: grid if count > 2 else torch.tensor([0.0, 1 - 2**-24]))
    assert diffusion.draw_t(len(grid), seeded()).bincount().tolist() == [0] + [50] * start
    assert diffusion.draw_t(2, seeded()).tolist() == [1, start]


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_predictions(objective):
    """The target at x_t, solved for x0, gives it back. It is clamped only if asked for."""
    diffusion, t = common.Diffusion(objective), torch.tensor([1, 30, 500, T])
    x0, eps = randn(2, 4, 3, 2, 2)
    x_t, target = diffusion.q_sample(x0, t, eps), diffusion.target(x0, t, eps)
    assert torch.allclose(diffusion.to_x0(target, x_t, t, clamp=False), x0, atol=2e-3) and x0.abs().max() > 1.5
    assert torch.allclose(diffusion.to_x0(target, x_t, t), x0.clamp(-1, 1), atol=2e-3)


def test_where_sampling_begins():
    """At T, the noise alone, whatever the temperature. Earlier, q(x_start | x0) with x_hat in place of x0; there the
    temperature multiplies the noise."""
    x_hat, eps = randn(2, 2, 3, 4, 4)
    assert torch.equal(common.Diffusion("v").x_start(x_hat, eps, 1.1), eps)
    early, t = common.Diffusion("v", 400), torch.tensor([400, 400])
    for temperature in (1.0, 1.1):
        assert torch.allclose(early.x_start(x_hat, eps, temperature), early.q_sample(x_hat, t, temperature * eps))


@pytest.mark.parametrize("t,s", [(T, 999), (500, 499), (2, 1), (T, 500), (300, 7)])
def test_posterior_is_bayes(t, s):
    """q(x_s | x_t, x0) is proportional to q(x_t | x_s) q(x_s | x0), a product of two Gaussians: their precisions add
    up, and the means are weighted with them."""
    diffusion, x0, xt = common.Diffusion("eps"), 0.7, -0.4
    bar_t, bar_s = diffusion.alpha_bar[[t, s]].tolist()
    shrink = math.sqrt(bar_t / bar_s)  # x_t = shrink x_s + noise
    likelihood, prior = shrink**2 / (1 - shrink**2), 1 / (1 - bar_s)
    mean = (likelihood * xt / shrink + prior * math.sqrt(bar_s) * x0) / (likelihood + prior)
    x0_factor, xt_factor, variance = map(float, diffusion.posterior(t, s))
    assert x0_factor * x0 + xt_factor * xt == pytest.approx(mean, rel=1e-9)
    assert variance == pytest.approx(1 / (likelihood + prior), rel=1e-9)


def test_sampling_times():
    """Times fall strictly from the start to 0 for every number of steps in 1..start, which a process that begins at T
    takes from a setting of its own. With `start` or more steps all times are visited. The last one but 0 is last_time,
    if there is room. Most are close to it."""
    for start, name in ((T, "sample_steps_from_T"), (137, "sample_steps")):
        diffusion, chosen = common.Diffusion("v", start), {"sample_steps": 1, "sample_steps_from_T": 1, "last_time": 1}
        for n in range(1, start + 2):
            times = diffusion.times(chosen | {name: n})
            assert len(times) == min(n, start) + 1 and times[0] == start and times[-1] == 0
            assert times == sorted(set(times), reverse=True), n
        assert times == [*range(start, -1, -1)]
    chosen = {"sample_steps": 5, "last_time": 16}
    assert common.Diffusion("v", 400).times(chosen) == [400, 232, 112, 40, 16, 0]  # 16 + 384 (i / 4)^2


def sample(diffusion, network, x, sampler, steps, gen=None, clamp=True):
    """The images that `network(x_t, t)` leads to from x."""
    last_time = max(1, round(diffusion.start / steps**2))  # so that all steps shrink alike with their number
    times, x0 = diffusion.times(common.sampling_settings(sampler, steps) | {"last_time": last_time}), None
    for i, time in enumerate(times[:-1]):
        t = torch.full((len(x),), time)
        x0_before, x0 = x0, diffusion.to_x0(network(x, t), x, t, clamp)
        x = diffusion.step(sampler, x, x0, times, i, x0_before, gen)
    return x


@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_oracle_returns_x0(sampler, objective):
    """With a perfect prediction every sampler ends at x0, from every start and in every number of steps."""
    x0 = randn(2, 3, 2, 2).clamp(-1, 1)
    for start, steps in (*((T, n) for n in (1, 2, 7, 60, T)), (60, 7), (60, 61)):
        diffusion = common.Diffusion(objective, start)
        x = sample(diffusion, oracle(diffusion, x0), randn(*x0.shape, seed=1), sampler, steps, seeded())
        assert torch.allclose(x, x0, atol=1e-4), (start, steps)


MEAN, SD = 0.2, 0.5


def gaussian_result(sampler, steps, start=T, mean=MEAN, sd=SD):
    """Mean and standard deviation of samples that are drawn with the exact prediction for data from N(mean, sd^2). DDIM
    and DPM-Solver++ are affine maps of the noise, so that two points determine them."""
    diffusion = common.Diffusion("eps", start)

    def network(xt, t):  # E[eps | x_t]
        a, s = diffusion.scales(t)
        return s / (a**2 * sd**2 + s**2) * (xt - a * mean)

    eps = (randn(50_000) if sampler == "ddpm" else torch.tensor([0.0, 1.0]))[:, None, None, None]
    x = diffusion.x_start(torch.full_like(eps, mean), eps)
    x = sample(diffusion, network, x, sampler, steps, seeded(1), clamp=False)
    return (float(x.mean()), float(x.std())) if sampler == "ddpm" else (float(x[0]), float(x[1] - x[0]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("start,mean,sd,slack", [(T, MEAN, SD, 0.02), (403, -0.7, 0.09, 0.045)])
def test_exact_score_gives_the_gaussian(sampler, start, mean, sd, slack):
    """With all steps and without clamping, mean and standard deviation are right to `slack` * sd: if the process begins
    at T, and if it begins where the noise is ten times sd."""
    found = gaussian_result(sampler, start, start, mean, sd)
    assert found == (pytest.approx(mean, abs=slack * sd), pytest.approx(sd, rel=slack))


def test_samplers_improve_in_their_order():
    """With twice the steps DDIM's error is half (first order), and DPM-Solver++'s a quarter (second order). With equal
    steps DPM-Solver++ has a smaller error than DDIM, and DDIM than DDPM. Fine detail, data from N(0, 0.05^2), keeps
    most of its energy in 25 steps."""
    counts = (10, 20, 40, 80)
    ddpm, ddim, dpm = ([abs(gaussian_result(sampler, n)[1] / SD - 1) for n in counts] for sampler in SAMPLERS)
    for k in range(3):
        assert 1.6 < ddim[k] / ddim[k + 1] < 2.4 and dpm[k] < 0.5 * ddim[k]
        assert ddpm[k] > ddpm[k + 1] and ddpm[k] > ddim[k]
    assert all(3 < dpm[k] / dpm[k + 1] < 7 for k in (1, 2))
    for sampler, kept in (("ddim", 0.65), ("dpm", 0.9)):
        assert (gaussian_result(sampler, 25, mean=0.0, sd=0.05)[1] / 0.05) ** 2 > kept


# ---- Networks --------------------------------------------------------------------------------------------------------

def test_densities_and_errors_against_torch_distributions():
    """KLs are summed over the dimensions. The squared error is that of images in [0, 1]."""
    mu, logvar, z = randn(3, 5, 7)
    q = Normal(mu, (0.5 * logvar).exp())
    assert torch.allclose(common.gaussian_kl(mu, logvar), kl_divergence(q, Normal(0, 1)).sum(1), rtol=1e-5)
    assert torch.allclose(q.cdf(common.reparameterise(mu, logvar, z)), Normal(0, 1).cdf(z), atol=1e-6)
    a, b = torch.rand(2, 4, 3, 5, 5, generator=seeded())
    assert torch.allclose(common.squared_error(2 * a - 1, 2 * b - 1), (a - b).square().sum((1, 2, 3)))


def test_attention_by_hand():
    """Softmax attention written out with einsum for each head. It adds nothing at first."""
    torch.manual_seed(0)
    layer, x = common.Attention(8, 2), torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x), x)
    nn.init.normal_(layer.out.weight)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 4, 9).unbind(1)
    weights = (torch.einsum("bhcn,bhcm->bhnm", q, k) / 2).softmax(-1)  # / sqrt(C / heads)
    y = torch.einsum("bhnm,bhcm->bhcn", weights, v).reshape(2, 8, 3, 3)
    assert torch.allclose(layer(x), x + layer.out(y), atol=1e-5)


@pytest.mark.parametrize("dataset,size,millions", [("cifar10", 32, (9.24, 35.75)), ("celeba64", 64, (14.01, 78.70))])
def test_published_networks(dataset, size, millions):
    """Numbers of parameters are the paper's. There is attention at 16x16 (2 on the way down, 3 on the way
    up) and in the middle."""
    paper = common.budget_settings("paper", dataset)
    with torch.device("meta"):
        vae, unet = common.build_vae(paper), common.build_unet(paper, 6)
    for network, expected in zip((vae, unet), millions, strict=True):
        assert common.count_parameters(network) / 1e6 == pytest.approx(expected, rel=0.01)
    seen = []
    for module in unet.modules():
        if isinstance(module, common.Attention):
            module.register_forward_hook(lambda m, inputs, output: seen.append(tuple(inputs[0].shape[2:])))
    unet(torch.empty(2, 6, size, size, device="meta"), torch.ones(2, device="meta"))
    assert sorted(seen) == [(4, 4)] + 5 * [(16, 16)] and vae.latent_dim == 512


@pytest.mark.parametrize("budget,dataset", [*itertools.product(common.BUDGETS, ("shapes", "cifar10", "celeba64"))])
def test_every_budget_builds_and_is_plain_json(budget, dataset):
    """The networks of every budget can be built and fit together. The settings survive
    JSON. Shapes are not mirrored."""
    found = common.budget_settings(budget, dataset)
    assert json.loads(json.dumps(found)) == found and found["unet_flip"] == (dataset != "shapes")
    size = 64 if dataset == "celeba64" else 32
    with torch.device("meta"):
        vae, unet = common.build_vae(found), common.build_unet(found, 6)
        x_hat, mu, _ = vae(torch.empty(2, 3, size, size), torch.empty(2, vae.latent_dim))
        assert x_hat.shape == unet(torch.empty(2, 6, size, size), torch.ones(2)).shape == (2, 3, size, size)
        assert mu.shape == (2, vae.latent_dim)


@pytest.mark.parametrize("pool", [False, True])
def test_vae(pool):
    """Every parameter has a gradient, and the code is mu plus noise of q's own deviation."""
    torch.manual_seed(0)
    vae, x0, noise = common.build_vae(settings(pool=pool)), 2 * torch.rand(2, 3, 32, 32) - 1, torch.randn(2, 8)
    x_hat, mu, logvar = vae(x0, noise)
    assert torch.equal(x_hat, vae.decoder(mu + (logvar / 2).exp() * noise))
    ((x_hat - x0).square().sum() + common.gaussian_kl(mu, logvar).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


@pytest.mark.parametrize("pool,table", [(True, [(16, 8, 2, 3), (8, 16, 2, 3)]),
                                        (False, [(16, 8, 0, 1), (8, 16, 1, 1)])])
def test_unet_starts_at_zero_and_uses_time_extra_and_every_skip(pool, table):
    """The output is zero at first. With other weights it depends on `extra`, and every parameter has a gradient. The
    time embedding is cosines, then sines, of t times frequencies from 1 down towards 1/10,000."""
    torch.manual_seed(0)
    unet, seen = common.UNet(table, 6, attention=(8,), heads=2, pool=pool), []
    x, t = torch.randn(2, 6, 16, 16), torch.tensor([1, 700])
    unet.time.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    assert torch.equal(unet(x, t), torch.zeros(2, 3, 16, 16))
    angles = torch.tensor([[time * 10_000 ** (-k / 4) for k in range(4)] for time in (1, 700)])
    assert torch.allclose(seen[0], torch.cat([angles.cos(), angles.sin()], 1), atol=1e-3)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    out = unet(x, t)
    assert not torch.allclose(out, unet(x, t, torch.ones(2, 32)), atol=1e-4)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


# ---- Priors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_mixture_against_torch_distributions(tied):
    """Densities agree, and draws have the moments of those of torch."""
    factors = torch.tensor([[[1.0, 0.0], [0.6, 0.7]], [[0.7, 0.0], [-0.3, 1.1]]])[: 2 - tied]
    gmm = common.GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-2.0, 1.0], [2.0, 0.0]]), factors)
    exact = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(gmm.weights),
        torch.distributions.MultivariateNormal(gmm.means, scale_tril=factors.expand(2, 2, 2)))
    torch.manual_seed(0)
    z, other = gmm.sample(20_000, seeded()), exact.sample((20_000,))
    assert torch.allclose(gmm.log_prob(z), exact.log_prob(z), rtol=1e-4)
    assert torch.allclose(z.mean(0), exact.mean, atol=0.06) and torch.allclose(z.T.cov(), other.T.cov(), atol=0.12)


@pytest.mark.parametrize("tied", [False, True])
def test_em_by_hand(tied):
    """Two rounds agree with float64, on more z than are processed at a time."""
    z = randn(2500, 3) * torch.tensor([1.0, 2.0, 0.5]) + 1
    fit = common.GaussianMixture.fit(z, 4, 0, tied, rounds=2)
    z = z[torch.randperm(2500, generator=common.generator(0, "mixture"))]
    means = z[:4] if tied else torch.from_numpy(kmeans2(z.numpy(), 4, minit="++", rng=0)[0])
    z, means, weights, ridge = z.double(), means.double(), torch.full((4,), 0.25).double(), 1e-3 * torch.eye(3).double()
    nearest = (z[:, None] - means).square().sum(2).argmin(1)
    cov = ((z - means[nearest]).T.cov() + ridge).expand(4, 3, 3)
    for _ in range(2):
        joint = weights.log() + torch.distributions.MultivariateNormal(means, cov).log_prob(z[:, None])
        belongs = joint.softmax(1)
        mass = belongs.sum(0)
        weights, means = mass / 2500, belongs.T @ z / mass[:, None]
        centred = z[:, None] - means
        cov = torch.einsum("nk,nki,nkj->kij", belongs, centred, centred) / mass[:, None, None]
        cov = (torch.einsum("k,kij->ij", weights, cov).expand(4, 3, 3) if tied else cov) + ridge
    assert torch.allclose(fit.weights.double(), weights, atol=1e-4)
    assert torch.allclose(fit.means.double(), means, atol=1e-3)
    assert torch.allclose((fit.factors @ fit.factors.mT).double(), cov[: len(fit.factors)], atol=1e-3)


@pytest.mark.parametrize("count,components", [(33, 30), (40, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_mixture_of_few_points_stays_finite(count, components, tied):
    """With few points for each component, far from 0, or with repeated points, the ridge keeps every covariance
    regular."""
    z = randn(count, 4)
    z[: count // 2] = z[0]
    for points in (z, 10 * z + 10):
        gmm = common.GaussianMixture.fit(points, components, 0, tied)
        assert gmm.log_prob(z).isfinite().all() and gmm.sample(50, seeded()).isfinite().all()



def test_codes_and_the_mixture_fitted_to_them(monkeypatch):
    """The batch size changes no code. The mixture is fitted to z from q(z | x), each with its own noise: to about
    30,000, but at most ten of an image."""
    vae, images = tiny_model().vae, draw_all(30, 5)[0]
    whole, parts = (torch.cat(common.encode(vae.encoder, images, CPU, batch)) for batch in (30, 7))
    assert torch.allclose(whole, parts, atol=1e-4)
    monkeypatch.setattr(common.GaussianMixture, "fit", lambda z, *how: SimpleNamespace(z=z))
    for count, draws in ((200, 10), (10_000, 3), (70_000, 1)):
        monkeypatch.setattr(common, "encode", lambda *a, n=count: (torch.ones(n, 1), torch.full((n, 1), math.log(4.0))))
        z = common.fit_mixture(vae, images, settings(), CPU)["z"]
        assert len(z) == draws * count and len(z.unique()) > 0.99 * draws * count
        assert float(z.mean()) == pytest.approx(1, abs=0.15) and float(z.std()) == pytest.approx(2, abs=0.15)


# ---- Data ------------------------------------------------------------------------------------------------------------

def discs(images, factors, labels):
    """The discs among the images: for each, its pixels' tones as shares of its own colour, (H, W), the mask of those
    well inside, and the factors."""
    rows, columns = torch.arange(32)[:, None] + 0.5, torch.arange(32) + 0.5
    for image, factor in zip(images[labels == 0].float(), factors[labels == 0], strict=True):
        radius = 0.9 * (10.5 + 1.5 * factor[0])
        inside = torch.hypot(columns - 16 - 3 * factor[1], rows - 16 - 3 * factor[2]) < radius - 1
        yield image.amax(0) / (0.95 * 255), inside, factor


def test_shapes():
    """The images of a seed are always the same. All classes and details are equally frequent, the factors are in range,
    and areas, centres, colours and bands are those that the factors describe."""
    images, labels, factors = common.draw_shapes(3000, seed=1)
    assert same((images, labels, factors), common.draw_shapes(3000, seed=1))
    assert factors.abs().max() <= 1 and (factors.amin(0) < -0.9).all() and (factors.amax(0) > 0.9).all()
    size, x, y, sine, cosine, _, _, detail, direction, *_ = factors.T
    for values, kinds in ((labels, 6), (detail + 1, 3), (direction[detail == 0] + 1, 3)):
        assert (values.long().bincount(minlength=kinds) / len(values) - 1 / kinds).abs().max() < 0.05

    plain, centres = images[detail < 0].float(), torch.arange(32) + 0.5
    cover = (plain.amax(1) - plain.amin(1)) / (0.75 * 255)  # (N, H, W): the ground is grey
    radius = 10.5 + 1.5 * size[detail < 0]
    areas = torch.tensor([2.5447, 2.1363, 2.4336, 1.4596, 1.4701, 2.0724])  # of disc, ring, ..., cross of radius 1
    assert torch.allclose(cover.sum((1, 2)) / radius**2, areas[labels[detail < 0]], rtol=0.01)
    for axis, place in ((1, x), (2, y)):
        centre = cover.sum(axis) @ centres / cover.sum((1, 2))
        assert torch.allclose(centre, 16 + 3 * place[detail < 0], atol=0.05)
    hue = torch.atan2(sine, cosine)[detail < 0] / (2 * math.pi) % 1
    for image, share, h in zip(plain, cover, hue.tolist(), strict=True):
        colour = torch.tensor(colorsys.hsv_to_rgb(h, 1, 1)) * 0.75 + 0.2
        assert torch.allclose(image.flatten(1)[:, share.argmax()], 255 * colour, atol=1.5)

    banded = detail == 0
    for tone, inside, factor in discs(images[banded], factors[banded], labels[banded]):
        shift = (0, 8) if factor[8] == 0 else (8, 0)  # bands repeat after 8 pixels along rows, columns or diagonals
        both = inside & inside.roll(shift, (0, 1))
        assert torch.equal(tone[both], tone.roll(shift, (0, 1))[both])
        assert tone[inside].unique().tolist() == pytest.approx([float(0.475 - factor[9] / 4.4), 1], abs=0.01)


def test_splits_of_shapes(small):
    """Training, held-out and reference images are three draws that share no image. All have labels and factors. The
    hash is another one for other images."""
    data = common.load_data("shapes")
    assert [len(part.images) for part in data] == [1000, 200, 500]
    assert len(torch.cat([part.images for part in data]).flatten(1).unique(dim=0)) == 1700
    assert data.reference.labels.shape == (500,) and data.test.factors.shape == (200, len(common.FACTORS))
    hashes = [common.hash_images(part.images) for part in data]
    images = data.train.images.clone()
    assert common.hash_images(images) == hashes[0]
    images[-1, 2, 31, 31] ^= 1
    assert len({*hashes, common.hash_images(images)}) == 4


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


def test_cifar10_is_downloaded(small, monkeypatch):
    """By torchvision, into the data folder, if there are no class folders."""
    def planted(root, train, download):
        return SimpleNamespace(data=np.full((7, 32, 32, 3), 100 * download, np.uint8), targets=[int(train)] * 7)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", planted)
    train, test, reference = common.load_data("cifar10", small)
    assert torch.equal(train.images, torch.full((7, 3, 32, 32), 100)) and reference is train
    assert train.labels.tolist() == [1] * 7 and test.labels.tolist() == [0] * 7


def test_cifar10_class_folders(small):
    """Labels follow the alphabetical order of the classes. The first test images have all classes, and their own
    labels."""
    for split, k, i in itertools.product(("train", "test"), range(4), range(8)):
        save(small / "cifar10" / split / ["bird", "airplane", "cat", "dog"][k] / f"{i}.png", flat(k))
    train, test, _ = common.load_data("cifar10", small)
    assert train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8 and "lossless" in train.note
    for split in (train, test):
        assert torch.equal(torch.tensor([1, 0, 2, 3])[split.images[:, 0, 0, 0].long()], split.labels)
    assert test.labels[:16].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("width,height", [(178, 218), (89, 109)])
def test_celeba_crop(width, height):
    """The crop is the box (15, 40, 163, 188) of 178x218 pixels, in proportion for smaller copies."""
    step = 178 // width
    red, green, _ = common.crop(Image.fromarray(ramp(height, width, step)), "celeba64", 64).transpose(2, 0, 1)
    centre = (np.arange(64) + 0.5) * 148 / 64 - step / 2  # of output pixel j, from the box's edge, in full-size pixels
    assert abs(red - (15 + centre)).max() <= 1 and abs(green - (40 + centre[:, None])).max() <= 1


def test_celeba_splits(small):
    """The partition file decides (0 train, 1 neither, 2 test). Without one the last tenth by name is the test split."""
    for i in range(60):
        save(small / "celeba" / "img_align_celeba" / f"{i:06}.png", flat(i, 218, 178))
    for expected in (range(54), range(54, 60)), (range(0, 60, 3), range(2, 60, 3)):
        train, test, _ = common.load_data("celeba64", small)
        for split, values in zip((train, test), expected, strict=True):
            assert sorted(split.images[:, 0, 0, 0].tolist()) == [*values]
        (small / "celeba" / "list_eval_partition.txt").write_text("".join(f"{i:06}.png {i % 3}\n" for i in range(60)))


def test_folder_of_odd_images(small):
    """Images of any size, mode and suffix, in nested folders, become RGB squares from their centres. Hidden files are
    left out; a hidden folder above does not matter. Every tenth one by path is in the test split."""
    photos, column = small / ".above" / "photos", torch.arange(64).expand(64, 64)
    save(photos / "a_wide.png", ramp(64, 128))
    save(photos / "b_tall.PNG", ramp(128, 64))
    save(photos / "c_grey.webp", np.full((70, 70), 77, np.uint8), lossless=True)
    for i in range(3, 60):
        save(photos / "more" / f"é {i:02}.bmp", flat(i, 30 + i % 17, 50 - i % 17))
    save(photos / ".hidden.png", flat(0))
    train, test, _ = common.load_data("folder", photos)
    assert train.images.shape == (54, 3, 64, 64) and set(test.images.unique().tolist()) == {*range(9, 60, 10)}
    for image, down, right in zip(train.images, (0, 32), (32, 0), strict=False):
        assert torch.equal(image[0], column + right) and torch.equal(image[1], column.T + down)
    assert (train.images[2] == 77).all()


def test_cache_is_used_and_rebuilt(small, monkeypatch):
    """Images are decoded again if a file was changed (even to one of the same size), for another folder of the same
    names, and for another size."""
    folder, read, count = small / "photos", common.read_image, []
    monkeypatch.setattr(common, "read_image", lambda path: count.append(path) or read(path))

    def decode(size=32, folder=folder):
        return common.decode_files("folder", "train", common.find_images(folder), size)

    for i in range(10):  # uncompressed, so that a file with other pixels has the same size
        save(folder / f"{i:02}.bmp", noise_image(i, 40, 44))
    first = decode()
    assert torch.equal(decode(), first) and len(count) == 10
    assert decode(64).shape == (10, 3, 64, 64)
    save(folder / "00.bmp", noise_image(99, 40, 44))
    assert (decode() == first).flatten(1).all(1).tolist() == [False] + [True] * 9
    folder.rename(small / "other")
    decode(folder=small / "other")
    assert len(count) == 40


def test_missing_and_broken_data_say_what_to_do(small, monkeypatch, capsys):
    """The message names --data-dir, its whole path, and what the folder must hold; or the file that is broken."""
    def no_network(*arguments, **options):
        raise RuntimeError("no network\nsecond line")

    for dataset, kind, layout in (("cifar10", "CIFAR10", "cifar10/{train,test}/"),
                                  ("celeba64", "CelebA", "celeba/img_align_celeba/")):
        monkeypatch.setattr(f"torchvision.datasets.{kind}", no_network)
        expect_error(capsys, lambda d=dataset: common.load_data(d), f"--data-dir {small / 'data'}", layout)
    expect_error(capsys, lambda: common.load_data("folder", "nowhere"), "nowhere: 0 images", "0 held out")
    for i in range(60):
        save(small / "photos" / f"{i:02}.png", noise_image(i))
    broken = small / "photos" / "13.png"
    broken.write_bytes(broken.read_bytes()[:-900])
    expect_error(capsys, lambda: common.load_data("folder", "photos"), "13.png")


# ---- Files -----------------------------------------------------------------------------------------------------------

def test_states(tmp_path, monkeypatch, capsys):
    """A state survives its file. A process that stops half way leaves the old file as it was. A damaged file, or one
    that contains code, is refused."""
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    path, state = tmp_path / "deep" / "checkpoint.pt", {"settings": {"seed": 0}, "unet": {"w": randn(50, 50)}}
    common.save_state(path, state)
    assert same(common.load_state(path), state)

    def stop_half_way(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", stop_half_way)
        common.save_state(path, {})
    assert same(common.load_state(path), state)
    path.write_bytes(path.read_bytes()[:5000])
    expect_error(capsys, lambda: common.load_state(path), "checkpoint.pt")
    torch.save({"x": Malicious()}, path)
    expect_error(capsys, lambda: common.load_state(path), "checkpoint.pt")
    assert not (tmp_path / "made").exists()


def test_read_image(tmp_path):
    """EXIF orientation is applied."""
    colours, turned = noise_image(0, 20, 40), Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    save(tmp_path / "turned.png", colours, exif=turned)
    assert np.array_equal(common.read_image(tmp_path / "turned.png"), np.rot90(colours, -1))


# ---- Settings --------------------------------------------------------------------------------------------------------

def read(text):
    """The settings that the flags in `text` choose, in the smoke budget on a CPU unless they say otherwise."""
    parser = argparse.ArgumentParser()
    common.add_flags(parser)
    return common.read_settings(parser.parse_args(["--budget", "smoke", "--device", "cpu", *text.split()]))[0]


def test_flags_replace_the_budget():
    """A flag changes its own setting and nothing else. What only concerns sampling and scores names no folder."""
    plain = common.budget_settings("smoke", "shapes")
    found = read("--set batch=3 temperature=0.8 --seed 7")
    assert found == plain | {"batch": 3, "temperature": 0.8, "changes": {"batch": 3}, "seed": 7,
                             "home": "runs/shapes-smoke-batch=3"}
    assert common.run_folder(found, "stage1-vae") == Path("runs/shapes-smoke-batch=3/stage1-vae-s7")
    for flags, size, features in (("folder", 64, "imagenet"), ("celeba64 --features local", 64, "local"),
                                  ("shapes", 32, "local"), ("cifar10 --budget cpu", 32, "imagenet")):
        found = read(f"--budget paper --dataset {flags}")
        assert (found["image_size"], found["features"]) == (size, features), flags
    found = read("--prior gaussian --sampler ddim --sample-steps 99 --eval-samples 50 --features inception --export")
    assert found == plain | {"prior": "gaussian", "sampler": "ddim", "sample_steps": 99, "sample_steps_from_T": 99,
                             "eval_samples": 50, "probe_samples": 50, "features": "inception", "export": True,
                             "changes": {}, "seed": 0, "home": "runs/shapes-smoke"}


def test_settings_that_are_changed():
    """Every value has its setting's type, and of two the last one counts. In the folder's name they come in the order
    in which they are given. The photos of two folders do not share a folder of runs."""
    found = read("--set batch=3 beta=2 start=300 tied=true objective=eps vae_lr=1e-5 warmup=0 --set beta=0.5 batch=6")
    changes = {"batch": 6, "beta": 0.5, "start": 300, "tied": True, "objective": "eps", "vae_lr": 1e-5, "warmup": 0}
    assert found["changes"] == changes and found | changes == found
    assert "shapes-smoke-batch=6-beta=0.5-start=300-tied=True-objective=eps-vae_lr=1e-05" in found["home"]
    homes = [read(f"--dataset folder --data-dir {name} --out elsewhere")["home"] for name in ("a/cats", "a/dogs")]
    assert homes == ["elsewhere/cats-folder-smoke", "elsewhere/dogs-folder-smoke"]


@pytest.mark.parametrize("text", [
    "steps=5", "Beta=1", "beta", "beta=much", "beta=nan", "beta=-1", "components=1.5", "tied=1", "vae_steps=5,beta=1",
    "attention=[16]", "objective=epsilon", "objective=../../x", "sampler=heun", "prior=nonsense", "batch=0", "batch=-3",
    "start=1001", "sample_steps=0", "eval_samples=0"])
def test_values_that_are_refused(text, capsys):
    """The line names the setting. A flag of the same name refuses the value, too."""
    name, _, value = text.partition("=")
    expect_error(capsys, lambda: read(f"--set pool=true {text}"), name)
    if name in ("sample_steps", "eval_samples"):
        expect_error(capsys, lambda: read(f"--{name.replace('_', '-')} {value}"), name)


def test_processes_share_a_batch(monkeypatch, capsys):
    monkeypatch.setattr(common, "RANKS", 3)
    monkeypatch.setattr(common, "choose_device", torch.device)
    assert read("--set batch=33")["batch"] == 33
    expect_error(capsys, lambda: read("--set batch=32"), "batch=32", "3 processes")


# ---- Runs ------------------------------------------------------------------------------------------------------------

def test_where_training_begins(tmp_path, capsys):
    """A new folder: None. A finished run: its checkpoint, whatever is asked of sampling. An unfinished one: None with
    --resume, else an error. With other settings or images: an error that says so."""
    mine, folder = settings(images="a"), tmp_path / "run"
    assert common.finished(folder, mine, False) is None
    for name in ("unfinished.pt", "checkpoint.pt"):
        common.save_state(folder / name, {"settings": mine})
        if name == "unfinished.pt":
            expect_error(capsys, lambda: common.finished(folder, mine, False), str(folder), "--resume")
            assert common.finished(folder, mine, True) is None
        expect_error(capsys, lambda: common.finished(folder, mine | {"unet_steps": 9}, True), "unet_steps was 8")
        expect_error(capsys, lambda: common.finished(folder, mine | {"images": "b"}, True), "other training images")
    assert common.finished(folder, mine | {"sample_steps": 77, "home": "elsewhere"}, False) == {"settings": mine}
