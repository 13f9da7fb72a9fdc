"""common.py against closed forms, oracles and small files built here. Every test can fail; none needs the network."""

import argparse
import colorsys
import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, draw_all, expect_error, oracle, same, settings, small_shapes
from PIL import Image
from scipy.cluster.vq import kmeans2
from torch import nn

import common
import fid
import stage3_adaptive as stage3

T = 1000
SAMPLERS = ("ddpm", "ddim", "dpm")
Normal, kl_divergence = torch.distributions.Normal, torch.distributions.kl_divergence


def seeded(seed=0):
    """A generator for the draws of a test."""
    return torch.Generator().manual_seed(seed)


# ---- Small things ----------------------------------------------------------------------------------------------------

def test_generator():
    """Its draws depend on seed and purpose alone, also in another process, in which Python's own hashes differ."""
    draws = {(seed, purpose): float(common.randn((1,), common.generator(seed, purpose)))
             for seed in (0, 1, 11) for purpose in ("a", "b", "1 a")}
    assert len(set(draws.values())) == 9
    assert float(common.randn((1,), common.generator(1, "a"))) == draws[1, "a"]
    assert common.generator(0, "training, process 0").initial_seed() == 65534209867069308


def test_uint8_round_trip_is_the_identity_and_rounds():
    """0.4 of a level is rounded down and 0.6 up. (Truncation would round both down.) Values out of range are
    clamped."""
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.to_float(u)), u)
    assert common.to_uint8(common.to_float(torch.tensor([100.4, 100.6, -20, 300]))).tolist() == [100, 101, 0, 255]
    assert common.to_float(u).min() == -1 and common.to_float(u).max() == 1


def test_devices(monkeypatch, capsys):
    """The error names a device that no machine has, or that this one lacks. `auto` takes what there is, and each of
    several processes the GPU of its own number. Networks run in float32 on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda:99", "gpu", "cuda:x"):
        expect_error(capsys, lambda name=name: common.choose_device(name), f"--device {name}", "auto")
    assert common.choose_device("cpu") == common.choose_device("auto") == CPU
    with common.autocast(CPU):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32

    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    common.choose_device("auto")
    monkeypatch.setattr(common, "RANKS", 2)
    common.choose_device("auto")
    assert current == [torch.device("cuda"), torch.device("cuda:1")]


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


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_predictions(objective):
    """The target at x_t, solved for x0 and eps, gives them back. Both add up to x_t if x0 was clamped, too. The loss of
    a prediction that is off by 0.5 is 0.25 for each image."""
    diffusion, t = common.Diffusion(objective), torch.tensor([1, 30, 500, 1000])
    x0, eps = torch.randn(2, 4, 3, 2, 2, generator=seeded()) * 0.3
    x_t, target = diffusion.q_sample(x0, t, eps), diffusion.target(x0, t, eps)
    found, its_eps = diffusion.to_x0_and_eps(target, x_t, t)
    assert torch.allclose(found, x0, atol=2e-3) and torch.allclose(its_eps, eps, atol=1e-3)
    found, its_eps = diffusion.to_x0_and_eps(target + 9, x_t, t)
    assert found.abs().max() == 1 and torch.allclose(diffusion.q_sample(found, t, its_eps), x_t, atol=1e-5)
    loss = diffusion.simple_loss(lambda x, t: target + 0.5 + (x - x_t), x0, t, eps)
    assert torch.allclose(loss, torch.full((4,), 0.25))


@pytest.mark.parametrize("t,s", [(1000, 999), (500, 499), (2, 1), (1000, 500), (300, 7), (25, 1)])
def test_posterior_is_bayes(t, s):
    """q(x_s | x_t, x0) is proportional to q(x_t | x_s) q(x_s | x0), which is computed on a grid of x_s and integrated
    numerically."""
    diffusion, x0, xt = common.Diffusion("eps"), 0.7, -0.4
    bar_t, bar_s = float(diffusion.alpha_bar[t]), float(diffusion.alpha_bar[s])
    x0_factor, xt_factor, variance = map(float, diffusion.posterior(t, s))
    centre, width = x0_factor * x0 + xt_factor * xt, math.sqrt(variance)
    x_s = torch.linspace(centre - 12 * width, centre + 12 * width, 20_001, dtype=torch.float64)
    log_density = (-(xt - math.sqrt(bar_t / bar_s) * x_s) ** 2 / (2 * (1 - bar_t / bar_s))
                   - (x_s - math.sqrt(bar_s) * x0) ** 2 / (2 * (1 - bar_s)))
    weight = log_density.softmax(0)
    mean = float((weight * x_s).sum())
    assert mean == pytest.approx(centre, abs=1e-6 * width)
    assert float((weight * (x_s - mean) ** 2).sum()) == pytest.approx(width**2, rel=1e-6)


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
    gen = seeded()
    x0 = torch.rand(2, 3, 2, 2, generator=gen) * 2 - 1

    def run(start, steps):
        diffusion, calls = common.Diffusion(objective, start=start), []
        denoise = oracle(diffusion, x0)
        return common.sample(diffusion, lambda x, t: calls.append(t.tolist()) or denoise(x, t),
                             common.randn(x0.shape, gen), sampler, steps, gen), calls

    for start, steps in (*((T, n) for n in (1, 2, 7, 60, T)), (60, 7), (60, 60), (60, 61)):
        x, calls = run(start, steps)
        assert torch.allclose(x, x0, atol=1e-4), (start, steps)
        assert calls == [[t, t] for t in common.time_grid(start, min(start, steps))[:0:-1]]


MEAN, SD = 0.2, 0.5


def gaussian_result(sampler, steps, start=None, mean=MEAN, sd=SD):
    """Mean and standard deviation of samples that are drawn with the exact prediction for data from N(mean, sd^2). DDIM
    and DPM-Solver++ are affine maps of the noise, so that two points determine them."""
    diffusion, gen = common.Diffusion("eps", start=start), seeded()

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
    steps DPM-Solver++ has a smaller error than DDIM, and DDIM than DDPM. Fine detail, data from N(0, 0.05^2), keeps
    most of its energy in 25 steps. On a uniform grid, whose steps lie where coarse structure is decided, it loses
    most."""
    error = {(s, n): abs(gaussian_result(s, n)[1] / SD - 1) for s in ("ddim", "dpm") for n in (10, 20, 40, 80)}
    for n in (10, 20, 40):
        assert 1.6 < error["ddim", n] / error["ddim", 2 * n] < 2.4
        assert error["dpm", n] < 0.5 * error["ddim", n]
    for n in (20, 40):
        assert 3 < error["dpm", n] / error["dpm", 2 * n] < 7
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
    diffusion = SimpleNamespace(posterior=lambda t, t_next: (0, 0, torch.tensor(sd**2, dtype=torch.float64)))
    for mean in (-1.0, -0.993, -0.3, 0.0, 0.0039, 0.98, 1.0, 1.3):
        total = (-common.data_nats(diffusion, values, torch.full((256, 1), mean)).double()).exp().sum()
        assert float(total) == pytest.approx(1, abs=2e-5)  # float32 pixel values leave gaps of 1e-8 between the bins
    x0 = values[128].expand(2, 3, 2, 2)
    log_p = -common.data_nats(diffusion, x0, x0)
    assert log_p.tolist() == pytest.approx(2 * [12 * math.log(math.erf(1 / 255 / (sd * 2**0.5)))], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("start", [T, 350])
def test_terms_of_the_bound(start):
    """If the predicted x0 is off by 0.1 everywhere, each term is the KL of two Gaussians of variance beta_tilde. The
    prior's is that from q(x_start | x0) to N(0, I), or to q(x_start | x_hat) from an earlier start. In the data's the
    variance is beta_tilde of t = 2."""
    diffusion, offset, t = common.Diffusion("v", start=start), 0.1, torch.arange(2, start + 1)
    x0, x_hat = (0.4 * common.randn((start - 1, 3, 2, 2), seeded(k)) for k in (0, 1))
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)[:start]  # the schedule's definition
    bar, beta = (1 - beta).cumprod(0), beta[1:]
    sd = (beta * (1 - bar[:-1]) / (1 - bar[1:])).sqrt()  # t = 2..start
    mean = bar[:-1].sqrt() * beta / (1 - bar[1:]) * offset
    found = common.kl_step(diffusion, x0, x0 + offset, t)
    assert torch.allclose(found.double(), 12 * kl_divergence(Normal(0 * mean, sd), Normal(mean, sd)), rtol=1e-3)
    a, s = bar[-1].sqrt(), (1 - bar[-1]).sqrt()
    exact = kl_divergence(Normal(a * x0, s), Normal(0.0, 1.0) if start == T else Normal(a * x_hat, s)).flatten(1).sum(1)
    assert torch.allclose(common.kl_prior(diffusion, x0, x_hat).double(), exact.double(), rtol=1e-2)
    x0, offset = common.to_float(torch.full((1, 3, 2, 2), 90.0)), 0.005
    edge = torch.tensor([1 / 255 - offset, -1 / 255 - offset]).double()
    upper, lower = Normal(0, sd[0]).cdf(edge)
    assert float(common.data_nats(diffusion, x0, x0 + offset)) == pytest.approx(-12 * float((upper - lower).log()))


# ---- Networks --------------------------------------------------------------------------------------------------------

def test_densities_and_errors_against_torch_distributions():
    """Densities are summed over the dimensions. The squared error is that of images in [0, 1]."""
    gen = seeded()
    mu, logvar, z = (common.randn((5, 7), gen) for _ in range(3))
    q = Normal(mu, (0.5 * logvar).exp())
    assert torch.allclose(common.gaussian_kl(mu, logvar), kl_divergence(q, Normal(0, 1)).sum(1), rtol=1e-5)
    assert torch.allclose(stage3.gaussian_log_prob(z, mu, logvar), q.log_prob(z).sum(1), rtol=1e-5)
    assert torch.allclose(q.cdf(common.reparameterise(mu, logvar, z)), Normal(0, 1).cdf(z), atol=1e-6)
    standard = common.GaussianMixture.standard_normal(7)
    assert torch.allclose(standard.log_prob(z), Normal(0, 1).log_prob(z).sum(1))
    assert float(standard.sample(5000, gen).var()) == pytest.approx(1, abs=0.03)
    a, b = torch.rand(2, 4, 3, 5, 5, generator=gen)
    assert torch.allclose(common.squared_error(2 * a - 1, 2 * b - 1), (a - b).square().sum((1, 2, 3)))


def test_attention_by_hand():
    """Softmax attention written out with einsum for each head."""
    torch.manual_seed(0)
    layer, x = common.Attention(8, 2), torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x), x)
    nn.init.normal_(layer.out.weight)  # in place of its zeros
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 4, 9).unbind(1)
    weights = (torch.einsum("bhcn,bhcm->bhnm", q, k) / 2).softmax(-1)  # / sqrt(C / heads)
    y = torch.einsum("bhnm,bhcm->bhcn", weights, v).reshape(2, 8, 3, 3)
    assert torch.allclose(layer(x), x + layer.out(y), atol=1e-5)


@pytest.mark.parametrize("dataset,size,blocks,millions", [("cifar10", 32, (25, 28), (9.24, 35.75)),
                                                          ("celeba64", 64, (31, 31), (14.01, 78.70))])
def test_published_networks(dataset, size, blocks, millions):
    """Numbers of blocks and parameters are the paper's. There is attention at 16x16 (2 on the way down, 3 on the way
    up) and in the middle."""
    paper = common.budget_settings("paper", dataset)
    with torch.device("meta"):
        vae, unet = common.build_vae(paper), common.build_unet(paper, 6)
    for half, expected in zip((vae.encoder, vae.decoder), blocks, strict=True):
        assert sum(isinstance(m, common.BottleneckBlock) for m in half.modules()) == expected
    for network, expected in zip((vae, unet), millions, strict=True):
        assert common.count_parameters(network) / 1e6 == pytest.approx(expected, rel=0.01)
    seen = []
    for module in unet.modules():
        if isinstance(module, common.Attention):
            module.register_forward_hook(lambda m, inputs, output: seen.append(tuple(inputs[0].shape[2:])))
    unet(torch.empty(2, 6, size, size, device="meta"), torch.ones(2, device="meta"))
    assert sorted(seen) == [(4, 4)] + 5 * [(16, 16)] and vae.latent_dim == 512


@pytest.mark.parametrize("budget", ["smoke", "cpu", "gpu", "paper"])
@pytest.mark.parametrize("dataset,size", [("shapes", 32), ("cifar10", 32), ("celeba64", 64)])
def test_every_budget_builds_and_is_plain_json(budget, dataset, size):
    """The networks of every budget can be built and fit together. The settings survive JSON."""
    found = common.budget_settings(budget, dataset)
    assert json.loads(json.dumps(found)) == found
    assert found["unet_flip"] == (dataset != "shapes")  # the bands of a mirrored shape would run the other way
    with torch.device("meta"):
        vae, unet = common.build_vae(found), common.build_unet(found, 6)
        x_hat, mu, _ = vae(torch.empty(2, 3, size, size), torch.empty(2, vae.latent_dim))
        assert x_hat.shape == unet(torch.empty(2, 6, size, size), torch.ones(2)).shape == (2, 3, size, size)
        assert mu.shape == (2, vae.latent_dim)


@pytest.mark.parametrize("pool", [False, True])
def test_vae(pool):
    """Images are in [-1, 1], every parameter has a gradient, and the code is mu plus noise of q's own deviation."""
    torch.manual_seed(0)
    vae = common.build_vae(settings(pool=pool))
    x0, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 8)
    x_hat, mu, logvar = vae(x0, noise)
    assert x_hat.abs().max() <= 1 and torch.equal(x_hat, vae.decoder(mu + (logvar / 2).exp() * noise))
    ((x_hat - x0).square().sum() + common.gaussian_kl(mu, logvar).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_strided_layers_keep_the_variance():
    torch.manual_seed(0)
    for kind, fan_in in ((nn.Conv2d, 4 * 64), (nn.ConvTranspose2d, 64)):
        layer = common.keep_variance(kind(64, 64, 2, stride=2, bias=False), fan_in)
        assert float(layer(torch.randn(8, 64, 8, 8)).detach().var()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("pool", [False, True])
def test_unet_starts_at_zero_and_uses_time_extra_and_every_skip(pool):
    """The output is zero at first. With other weights it depends on t and on `extra`, and every parameter has a
    gradient."""
    torch.manual_seed(0)
    unet = common.UNet([(16, 8, 2, 3), (8, 16, 2, 3)], 6, attention=(8,), heads=2, pool=pool)
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


# ---- Priors ----------------------------------------------------------------------------------------------------------

def nearest_component(gmm, z):
    """The component that each z (N, d) most probably belongs to: (N,)."""
    return torch.cat([gmm.log_joint(part).argmax(1) for part in z.split(1000)])


def test_mixture_against_torch_distributions_and_moments():
    """Densities and moments of draws agree. Fitted to draws, in any order, the mixture is
    found again."""
    covariances = torch.tensor([[[1.0, 0.6], [0.6, 0.8]], [[0.5, -0.2], [-0.2, 1.2]]])
    gmm = common.GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-2.0, 1.0], [2.0, 0.0]]),
                                 torch.linalg.cholesky(covariances))
    components = torch.distributions.MultivariateNormal(gmm.means, scale_tril=gmm.factors)
    exact = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(gmm.weights), components)
    z = gmm.sample(20_000, seeded())
    assert torch.allclose(gmm.log_prob(z), exact.log_prob(z), rtol=1e-4)
    assert torch.allclose(z.mean(0), exact.mean, atol=0.06)
    spread = (gmm.weights[:, None] * (gmm.means - exact.mean)).T @ (gmm.means - exact.mean)  # of the components' means
    assert torch.allclose(z.T.cov(), spread + torch.einsum("k,kij->ij", gmm.weights, covariances), atol=0.12)

    fit = common.GaussianMixture.fit(z[nearest_component(gmm, z).argsort()], 2, 0, rounds=50)
    order, held_out = fit.means[:, 0].argsort(), gmm.sample(8000, seeded(1))
    assert torch.allclose(fit.weights[order], gmm.weights, atol=0.015)
    assert torch.allclose(fit.means[order], gmm.means, atol=0.05)
    assert torch.allclose((fit.factors @ fit.factors.mT)[order], covariances, atol=0.07)
    assert float(fit.log_prob(held_out).mean()) == pytest.approx(float(gmm.log_prob(held_out).mean()), abs=0.003)


@pytest.mark.parametrize("tied", [False, True])
def test_em_by_hand(tied):
    """Two rounds agree with float64, on more z than are processed at a time."""
    z = common.randn((2500, 3), seeded()) * torch.tensor([1.0, 2.0, 0.5]) + 1
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


@pytest.mark.parametrize("count,components,tied", [(33, 30, False), (40, 2, False), (33, 30, True), (40, 2, True)])
def test_mixture_of_few_points_stays_finite(count, components, tied):
    """With few points for each component, or with repeated points, the ridge keeps every covariance regular."""
    z = common.randn((count, 4), seeded())
    z[: count // 2] = z[0]
    gmm = common.GaussianMixture.fit(z, components, 0, tied)
    assert gmm.log_prob(z).isfinite().all() and gmm.sample(50, seeded()).isfinite().all()


def test_mixture_of_codes_far_from_0():
    """A VAE with hardly a KL has codes of a large spread, here up to a hundred, few for each component."""
    gen = seeded()
    z = common.randn((600, 64), gen) * 10 * torch.exp(0.7 * common.randn((600, 1), gen))
    gmm = common.GaussianMixture.fit(z.clamp(-99, 99), 10, 0)
    assert gmm.log_prob(z).isfinite().all() and gmm.sample(50, gen).isfinite().all()


def test_mixture_finds_clusters():
    """Of 25 separate clusters with as many components, it is as likely as the true mixture, but for what 25 fitted
    means and covariances lose. (From random codes some clusters would stay merged.)"""
    gen = seeded(3)
    means = 5 * common.randn((25, 6), gen)
    truth = common.GaussianMixture(torch.full((25,), 1 / 25), means, torch.eye(6)[None])
    points, held_out = truth.sample(8000, gen), truth.sample(4000, gen)
    fit = common.GaussianMixture.fit(points, 25, 0)
    assert float((truth.log_prob(held_out) - fit.log_prob(held_out)).mean()) < 0.3


def test_tied_mixture():
    """One covariance for all components. Density and covariance of draws are right. Fitted to few points, such a
    mixture has a higher held-out density than one with a covariance for each component."""
    gen = seeded()
    means, factor = 3 * common.randn((20, 10), gen), torch.eye(10) + 0.3 * torch.ones(10, 10).tril(-1)
    gmm = common.GaussianMixture(torch.arange(1, 21) / 210, means, factor[None])
    exact = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(gmm.weights), torch.distributions.
                                                  MultivariateNormal(means, scale_tril=factor.expand(20, -1, -1)))
    points, held_out = (gmm.sample(600, gen) for _ in range(2))
    assert torch.allclose(gmm.log_prob(points), exact.log_prob(points), rtol=1e-4)
    z = gmm.sample(20_000, gen)
    within = (z - means[nearest_component(gmm, z)]).T.cov()  # the components lie far apart
    assert torch.allclose(within, factor @ factor.T, atol=0.15)
    own, tied = (common.GaussianMixture.fit(points, 20, 0, tied) for tied in (False, True))
    assert own.factors.shape == (20, 10, 10) and tied.factors.shape == (1, 10, 10)
    assert tied.log_prob(held_out).mean() > own.log_prob(held_out).mean() + 1


def test_ridge_regression():
    """Without a penalty it is least squares. With one, the units of x do not matter, and an x that is constant does no
    harm."""
    gen = seeded()
    x, noise = common.randn((300, 4), gen) + 2, 0.1 * common.randn((300, 2), gen)
    y = x @ common.randn((4, 2), gen) + 3 + noise
    ones = torch.ones(300, 1)
    weight, bias = fid.ridge_regression(x, y, ridge=0)
    exact = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    assert torch.allclose(torch.cat([weight, bias[None]]), exact, atol=1e-4)
    units = torch.tensor([1e-3, 1.0, 50.0, 1e3])
    predictions = []
    for values in (x, x * units, torch.cat([x, ones], 1)):
        weight, bias = fid.ridge_regression(values, y, ridge=0.5)
        predictions.append(values @ weight + bias)
    assert all(torch.allclose(p, predictions[0], atol=1e-3) for p in predictions)
    assert predictions[0].std() < 0.9 * y.std()


# ---- A model ---------------------------------------------------------------------------------------------------------

def few(**changes):
    """Settings of ten images, four at a time."""
    return settings(**{"prior": "gaussian", "eval_samples": 10, "eval_batch": 4, "sample_steps": 3} | changes)


def test_generate(tiny):
    """x_hat = Dec(z) is refined if there is a refiner, and any number of images can be drawn. Another seed draws other
    images. Given codes are decoded in their order."""
    before, after, seconds = common.generate(tiny, few())
    assert before.shape == after.shape == (10, 3, 32, 32) and before.dtype == after.dtype == torch.uint8 and seconds > 0
    assert (before.int() - after.int()).abs().max() <= 1 and len(before.flatten(1).unique(dim=0)) == 10
    alone = common.generate(dataclasses.replace(tiny, denoiser=None), few())
    assert torch.equal(alone[0], before) and torch.equal(alone[1], before)
    assert not torch.equal(common.generate(tiny, few(seed=1))[0], before)
    z = common.randn((6, 8), seeded())
    expected = common.to_uint8(tiny.vae.decoder(z))
    assert (common.generate(tiny, few(), z)[0].int() - expected.int()).abs().max() <= 1


def test_what_the_refiner_is_shown(tiny):
    """The x_hat with noise of the given strength, and its z. Codes and noise of an image are the same whatever the
    sampler, its steps and the damage. The temperature is the factor of the noise."""
    shown, started, denoiser = [], [], tiny.denoiser

    def record(x_hat, z):
        denoise, begun = denoiser(x_hat, z), []
        shown.append((x_hat, z))

        def first(x, t):
            if not begun:
                begun.append(started.append(x))
            return denoise(x, t)

        return first

    tiny.denoiser = record
    for changes, damage in (({}, 0.0), ({"sampler": "ddpm", "sample_steps": 2}, 0.0), ({}, 0.3),
                            ({"temperature": 0.5}, 0.0)):
        common.generate(tiny, few(eval_samples=4, **changes), damage=damage)
        x_hat, z = shown[-1]
        assert torch.equal(z, shown[0][1])
        assert float((x_hat - tiny.vae.decoder(z)).std()) == pytest.approx(damage, rel=0.05, abs=1e-6)
        assert torch.allclose(started[-1], changes.get("temperature", 1) * started[0])


def test_codes_and_the_mixture_fitted_to_them(tiny, monkeypatch):
    """The batch size changes no code. Of few images several z are drawn, each with its own noise, from q(z | x). The
    mixture has the settings' components and can be made again from what a checkpoint keeps."""
    images = draw_all(300, 5)[0]
    mu, logvar = common.encode(tiny.vae.encoder, images, CPU)
    again = common.encode(tiny.vae.encoder, images, CPU, batch=7)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip((mu, logvar), again, strict=True))
    kept = common.fit_mixture(tiny.vae, images, settings(components=3, tied=True), CPU)
    assert [tuple(kept[name].shape) for name in ("weights", "means", "factors")] == [(3,), (3, 8), (1, 8, 8)]
    z = common.draw_codes(tiny.vae, images, 0, CPU)
    assert common.GaussianMixture(**kept).log_prob(z).mean() > tiny.priors["gaussian"].log_prob(z).mean()
    for count, draws in ((200, 10), (10_000, 3), (70_000, 1)):
        monkeypatch.setattr(common, "encode", lambda *a, n=count: (torch.ones(n, 1), torch.full((n, 1), math.log(4.0))))
        codes = common.draw_codes(tiny.vae, None, 0, CPU)
        assert len(codes) == draws * count and len(codes.unique()) > 0.99 * draws * count
        assert float(codes.mean()) == pytest.approx(1, abs=0.15) and float(codes.std()) == pytest.approx(2, abs=0.15)


# ---- Data ------------------------------------------------------------------------------------------------------------

def discs(images, factors, labels):
    """The discs among the images: pairs of an image's pixels well inside, as shares of its own colour, (H, W) with the
    mask, and the factors."""
    rows, columns = torch.arange(32)[:, None] + 0.5, torch.arange(32) + 0.5
    for image, factor in zip(images[labels == 0].float(), factors[labels == 0], strict=True):
        radius = 0.9 * (10.5 + 1.5 * factor[0])
        inside = torch.hypot(columns - 16 - 3 * factor[1], rows - 16 - 3 * factor[2]) < radius - 1
        yield image.amax(0) / (0.95 * 255), inside, factor


def test_shapes():
    """The images of a seed are always the same. All classes and details are equally frequent, the factors are in range,
    and areas, centres, colours, bands and spots are those that the factors describe."""
    images, labels, factors = common.draw_shapes(3000, seed=1)
    again, other = common.draw_shapes(3000, seed=1), common.draw_shapes(3000, seed=2)
    assert all(map(torch.equal, (images, labels, factors), again)) and not torch.equal(images, other[0])
    assert factors.shape == (3000, len(common.FACTORS))
    assert factors.abs().max() <= 1 and (factors.amin(0) < -0.9).all() and (factors.amax(0) > 0.9).all()
    size, x, y, sine, cosine, _, _, detail, direction, contrast, spot = factors.T
    for values, kinds in ((labels, 6), (detail + 1, 3), (direction[detail == 0] + 1, 3)):
        counts = values.long().bincount() / len(values)
        assert len(counts) == kinds and (counts - 1 / kinds).abs().max() < 4 * (len(values) * kinds) ** -0.5
    assert not direction[detail != 0].any() and not contrast[detail < 0].any() and not spot[detail < 1].any()

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

    sizes, edges = [], []
    for tone, inside, factor in discs(images, factors, labels):
        dark = float(0.475 - factor[9] / 4.4)
        if factor[7] < 0:
            assert tone[inside].min() > 0.99
        elif factor[7] == 0:  # bands of two tones, which repeat after 8 pixels along rows, columns or diagonals
            shift = (0, 8) if factor[8] == 0 else (8, 0)
            both = inside & inside.roll(shift, (0, 1))
            assert torch.equal(tone[both], tone.roll(shift, (0, 1))[both])
            assert tone[inside].unique().tolist() == pytest.approx([dark, 1], abs=0.01)
        else:  # spots: nearly two tones
            light = (tone - dark) / (1 - dark)
            assert 0.5 < float(((light < 0.05) | (light > 0.95))[inside].float().mean()) < 0.95
            both = inside & inside.roll(1, 1)
            sizes.append(float(factor[10]))
            edges.append(float((light - light.roll(1, 1))[both].abs().mean()))
    assert np.corrcoef(sizes, edges)[0, 1] < -0.7  # larger spots, fewer edges


def test_flat_spots():
    """All is equal but the spotted shapes, which have one tone: that of their spots on average."""
    images, labels, factors = common.draw_shapes(1500, seed=1)
    flat = common.draw_shapes(1500, seed=1, flat_spots=True)
    spotted = factors[:, 7] == 1
    assert torch.equal(images[~spotted], flat[0][~spotted]) and same([labels, factors], list(flat[1:]))
    for tone, inside, _ in discs(flat[0][spotted], factors[spotted], labels[spotted]):
        assert len(tone[inside].unique()) == 1
    assert float((images.float() - flat[0].float()).mean()) == pytest.approx(0, abs=1)


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


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder, in which data/cache lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_splits_of_shapes(monkeypatch):
    """Training and held-out images differ, and all have labels and factors."""
    monkeypatch.setattr(common, "draw_shapes", small_shapes)
    train, test = common.load_data("shapes")
    assert (len(train.images), len(test.images)) == (1000, 200)
    assert not (train.images[:200] == test.images).flatten(1).all(1).any()
    assert train.labels.shape == (1000,) and test.factors.shape == (200, len(common.FACTORS))


def test_missing_images_are_downloaded(home, monkeypatch):
    """By torchvision, into the data folder. It reads CIFAR-10; CelebA is read as if its files had been there."""
    def planted_cifar10(root, train, download):
        return SimpleNamespace(data=np.full((7, 32, 32, 3), 100 * download, np.uint8), targets=[int(train)] * 7)

    def planted_celeba(root, split, download):
        for i in range(60):
            save(Path(root) / "celeba" / "img_align_celeba" / f"{i:06}.jpg", flat(i, 218, 178))

    from torchvision import datasets
    monkeypatch.setattr(datasets, "CIFAR10", planted_cifar10)
    monkeypatch.setattr(datasets, "CelebA", planted_celeba)
    cifar10, celeba = common.load_data("cifar10", home).train, common.load_data("celeba64", home).train
    assert cifar10.images.shape == (7, 3, 32, 32) and cifar10.images.unique().tolist() == [100]
    assert cifar10.labels.tolist() == [1] * 7 and cifar10.note == "as published"
    assert celeba.images.shape == (54, 3, 64, 64) and celeba.note == "JPEG copies at 178x218"


def test_cifar10_class_folders(home):
    """PNG files keep every bit. Labels follow the alphabetical order of the classes. The first test images have all
    classes, and their own labels."""
    for (k, name), i in itertools.product(enumerate(["bird", "airplane", "cat", "dog"]), range(8)):
        save(home / "cifar10" / "train" / name / f"{i}.png", noise_image(10 * k + i))
        save(home / "cifar10" / "test" / name / f"{i}.png", flat(10 * k + i))
    (train, test), again = common.load_data("cifar10", home), common.load_data("cifar10", home)
    assert train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8 and "lossless" in train.note
    for row, k in ((0, 10), (9, 1), (31, 37)):  # airplane 0, bird 1, dog 7
        assert np.array_equal(train.images[row].permute(1, 2, 0).numpy(), noise_image(k))
    value = test.images[:, 0, 0, 0].long()
    assert torch.equal(torch.tensor([1, 0, 2, 3])[value // 10], test.labels)
    assert set(test.labels[:16].tolist()) == {0, 1, 2, 3} and torch.equal(test.images, again.test.images)


@pytest.mark.parametrize("width,height", [(178, 218), (89, 109)])
def test_celeba_crop(home, width, height):
    """The crop is the box (15, 40, 163, 188) of 178x218 pixels, in proportion for smaller copies."""
    step = 178 // width
    for i in range(60):
        save(home / "celeba" / "img_align_celeba" / f"{i:06}.png", ramp(height, width, step))
    data = common.load_data("celeba64", home).train
    assert data.images.shape == (54, 3, 64, 64) and data.note == f"lossless copies at {width}x{height}"
    centre = (torch.arange(64) + 0.5) * 148 / 64  # of output pixel j, from the box's edge, in full-size pixels
    red, green = data.images[0, 0].float(), data.images[0, 1].float()
    assert (red - (15 + centre - step / 2)).abs().max() <= 1
    assert (green - (40 + centre - step / 2)[:, None]).abs().max() <= 1


def test_celeba_splits(home):
    """The partition file decides (0 train, 1 neither, 2 test). Without one the last tenth by name is the test split."""
    for i in range(60):
        save(home / "celeba" / "img_align_celeba" / f"{i:06}.png", flat(i, 218, 178))
    for expected in (range(54), range(54, 60)), (range(0, 60, 3), range(2, 60, 3)):
        for split, values in zip(common.load_data("celeba64", home), expected, strict=True):
            assert sorted(split.images[:, 0, 0, 0].tolist()) == list(values)
        (home / "celeba" / "list_eval_partition.txt").write_text("".join(f"{i:06}.png {i % 3}\n" for i in range(60)))


def test_folder_of_odd_images(home):
    """Images of any size, mode and suffix, in nested folders, become RGB squares from their centres. Every tenth one
    by path is in the test split, so that a folder for each person or class is in both splits."""
    photos, column = home / "photos", torch.arange(64.0).expand(64, 64)
    for i in range(57):
        save(photos / "more" / f"{i:02}.jpg", noise_image(i, 30 + i % 17, 50 - i % 17))
    save(photos / "a_wide.png", ramp(64, 128))
    save(photos / "b_tall.png", ramp(128, 64))
    save(photos / "c_grey.png", np.full((70, 70), 77, np.uint8))
    train, test = common.load_data("folder", photos)
    assert train.images.shape == (54, 3, 64, 64) and test.images.shape == (6, 3, 64, 64) and train.labels is None
    assert torch.equal(train.images[0, 0].float(), column + 32) and torch.equal(train.images[0, 1].float(), column.T)
    assert torch.equal(train.images[1, 0].float(), column) and torch.equal(train.images[1, 1].float(), column.T + 32)
    assert (train.images[2] == 77).all()
    names = [path.name for path in common.find_images(photos)]
    assert [path.name for path in common.list_files("folder", "test", photos)] == names[9::10]


def test_cache_is_used_and_rebuilt(home, monkeypatch):
    """Images are decoded again if a file was changed (even to one of the same size) or removed, for another folder of
    the same name, and for another size."""
    folder, read, count = home / "photos", common.read_image, []
    monkeypatch.setattr(common, "read_image", lambda path: count.append(path) or read(path))
    for i in range(70):  # uncompressed, so that a file with other pixels has the same size
        save(folder / f"{i:02}.bmp", noise_image(i, 40, 44))

    def decode(size=32, folder=folder):
        count.clear()
        files = common.list_files("folder", "train", folder)
        return common.decode_files("folder", "train", files, size), len(count)

    (first, decoded), (again, decoded_again) = decode(), decode()
    assert (decoded, decoded_again) == (63, 0) and np.array_equal(first, again)
    assert decode(64)[1] == 63 and decode()[1] == 0  # both sizes are kept
    save(folder / "00.bmp", noise_image(99, 40, 44))
    changed, decoded = decode()
    assert decoded == 63 and not np.array_equal(first[0], changed[0]) and np.array_equal(first[1:], changed[1:])
    (folder / "01.bmp").unlink()
    assert decode()[1] == 63
    folder.rename(home / "other")
    assert decode(folder=home / "other")[1] == 63


def test_missing_and_broken_data_say_what_to_do(home, monkeypatch, capsys):
    """The message names --data-dir, its whole path, and what the folder must hold; or the file that is broken."""
    def no_network(*arguments, **options):
        raise RuntimeError("no network\nsecond line")

    for dataset, kind, layout in (("cifar10", "CIFAR10", "cifar-10-batches-py/ or cifar10/{train,test}/"),
                                  ("celeba64", "CelebA", "celeba/img_align_celeba/")):
        monkeypatch.setattr(f"torchvision.datasets.{kind}", no_network)
        expect_error(capsys, lambda d=dataset: common.load_data(d, "data"), f"no images of {dataset}",
                     f"--data-dir {home / 'data'}", "no network", layout)
    expect_error(capsys, lambda: common.load_data("folder", "nowhere"), "nowhere: 0 images", "--data-dir")
    for i in range(30):
        save(home / "photos" / f"{i:02}.png", noise_image(i))
    broken = home / "photos" / "13.png"
    broken.write_bytes(broken.read_bytes()[:-900])
    expect_error(capsys, lambda: common.load_data("folder", "photos"), "13.png", "cannot be read")


# ---- Files -----------------------------------------------------------------------------------------------------------

def test_write(tmp_path, monkeypatch):
    """A process that stops half way leaves the old file as it was. Of several processes the first writes."""
    path = tmp_path / "deep" / "file.bin"
    common.write(path, b"old")
    common.write(str(path), b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["file.bin"]
    write_bytes = type(path).write_bytes

    def fail_half_way(self, data):
        write_bytes(self, data[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(path), "write_bytes", fail_half_way)
        common.write(path, b"newer")
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(common, "RANK", 1)
    common.write(path, b"of the second process")
    assert path.read_bytes() == b"new"
    with pytest.raises(ValueError):
        common.write_json(path, {"fd": math.nan})


def test_state_round_trip_and_damage(tmp_path, capsys):
    """A damaged file, or one that contains code, is refused with one line."""
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / "made"), "w")

    path = tmp_path / "checkpoint.pt"
    state = {"settings": {"seed": 0}, "log": [{"step": 1}], "unet": {"w": common.randn((50, 50), seeded())}}
    common.save_state(path, state)
    assert same(common.load_state(path), state)
    whole = path.read_bytes()
    for foreign in (b"", b"garbage", whole[: len(whole) // 2], state | {"x": Malicious()}):
        torch.save(foreign, path)
        if isinstance(foreign, bytes):
            path.write_bytes(foreign)
        expect_error(capsys, lambda: common.load_state(path), "checkpoint.pt", "remove")
    assert not (tmp_path / "made").exists()
    expect_error(capsys, lambda: common.load_state(tmp_path / "none.pt"), "none.pt")


def test_find_images(tmp_path):
    """Images below a folder are sorted by path. The case of a suffix and a hidden folder above do not matter."""
    photos = tmp_path / ".above" / "photos"
    for name in ("b.PNG", "a/z.jpeg", "a/é 1.Webp", "a/.no.png", "notes.txt", "c.npz"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).touch()
    found = [str(path.relative_to(photos)) for path in common.find_images(str(photos))]
    assert found == ["a/z.jpeg", "a/é 1.Webp", "b.PNG"] and common.find_images(photos / "nowhere") == []


def test_read_image(tmp_path, capsys):
    """Palettes are looked up, and EXIF orientation is applied."""
    colours = np.random.RandomState(0).randint(0, 256, (20, 40, 3), dtype=np.uint8)
    palette, turned = Image.fromarray(colours).convert("P"), Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    for name, image, options, expected in (("palette é 1.png", palette, {}, np.asarray(palette.convert("RGB"))), (
            "turned.png", Image.fromarray(colours), {"exif": turned}, np.rot90(colours, -1))):
        image.save(tmp_path / name, **options)
        assert np.array_equal(common.read_image(tmp_path / name), expected), name
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for name in ("broken.png", "absent.png"):
        expect_error(capsys, lambda name=name: common.read_image(tmp_path / name), name, "cannot be read as an image")


# ---- Settings --------------------------------------------------------------------------------------------------------

def read(text):
    """The settings that the flags in `text` choose, in the smoke budget on a CPU unless they say otherwise."""
    parser = argparse.ArgumentParser()
    common.add_flags(parser)
    return common.read_settings(parser.parse_args(["--budget", "smoke", "--device", "cpu", *text.split()]))[0]


def test_flags_replace_the_budget():
    """A flag changes its own setting and nothing else. What only concerns sampling and scores names no folder."""
    plain = common.budget_settings("smoke", "shapes")
    found = read("--set vae_steps=5 batch=3 temperature=0.8 --seed 7")
    changes = {"vae_steps": 5, "batch": 3}
    name = "shapes-smoke-vae_steps=5-batch=3"
    assert found == plain | changes | {"temperature": 0.8, "changes": changes, "seed": 7,
                                       "home": os.path.join("runs", name)}
    assert common.run_folder(found, "stage1-vae") == Path("runs") / name / "stage1-vae-s7"
    sampling = {"prior": "gaussian", "sampler": "ddim", "sample_steps": 99, "eval_samples": 50, "export": 4,
                "features": "inception"}
    found = read(" ".join(f"--{key.replace('_', '-')} {value}" for key, value in sampling.items()))
    assert found == plain | sampling | {"probe_samples": 50, "changes": {}, "seed": 0,
                                        "home": os.path.join("runs", "shapes-smoke")}


@pytest.mark.parametrize("text,size,features", [
    ("folder", 64, "inception"), ("cifar10", 32, "inception"), ("celeba64 --features local", 64, "local"),
    ("shapes", 32, "local"), ("cifar10 --budget cpu", 32, "local")])
def test_data_sets_have_their_sizes_and_features(text, size, features):
    found = read(f"--budget paper --dataset {text}")
    assert (found["image_size"], found["features"], found["prior"]) == (size, features, "gmm")


def test_settings_that_are_changed():
    """Every value has its setting's type, and of two the last one counts. In the folder's name they come in the order
    in which they are given. The photos of two folders do not share a folder of runs."""
    found = read("--set batch=3 beta=2 start=300 tied=true objective=eps vae_lr=1e-5 attention=[8] "
                 "--set beta=0.5 batch=6")
    changes = {"batch": 6, "beta": 0.5, "start": 300, "tied": True, "objective": "eps", "vae_lr": 1e-5,
               "attention": [8]}
    assert found["changes"] == changes and found | changes == found
    assert "shapes-smoke-batch=6-beta=0.5-start=300-tied=True-objective=eps-vae_lr=1e-05" in found["home"]
    assert read("--set beta=1")["beta"] == 1
    homes = [read(f"--dataset folder --data-dir {name} --out elsewhere")["home"] for name in ("a/cats", "a/dogs")]
    assert homes == [os.path.join("elsewhere", f"{name}-folder-smoke") for name in ("cats", "dogs")]


@pytest.mark.parametrize("text,words", [
    ("steps=5", "no such setting"), ("Beta=1", "no such setting"), ("beta", "not of the type of"),
    ("beta=much", "not of the type of"), ("components=1.5", "not of the type of"), ("tied=1", "not of the type of"),
    ("vae_steps=5,beta=1", "not of the type of"), ("attention=16", "not of the type of")])
def test_changes_that_are_refused(text, words, capsys):
    expect_error(capsys, lambda: read(f"--set pool=true {text}"), f"--set {text}: ", words)


# ---- Runs ------------------------------------------------------------------------------------------------------------

def test_where_training_begins(tmp_path, capsys):
    """A new folder: None. A finished run: its checkpoint, whatever is asked of sampling. An unfinished one: None with
    --resume, else an error. With other settings: an error that names one."""
    mine, folder = settings(), tmp_path / "run"
    assert common.finished(folder, mine, False) is None and common.finished(folder, mine, True) is None
    common.save_state(folder / "unfinished.pt", {"settings": mine, "steps": 3})
    expect_error(capsys, lambda: common.finished(folder, mine, False), str(folder), "--resume")
    assert common.finished(folder, mine, True) is None
    for name in ("unfinished.pt", "checkpoint.pt"):
        common.save_state(folder / name, {"settings": mine, "log": name})
        expect_error(capsys, lambda: common.finished(folder, mine | {"unet_steps": 9}, True),
                     "unet_steps was 8, is now 9", "--out")
    for resume in (False, True):
        elsewhere = mine | {"sample_steps": 77, "home": "elsewhere"}
        assert common.finished(folder, elsewhere, resume)["log"] == "checkpoint.pt"


def test_export(tiny, tmp_path):
    """As many PNG files as asked for, of the refined images."""
    common.export(tmp_path, tiny, few(export=6))
    images = common.generate(tiny, few(eval_samples=6))[1]
    files = common.find_images(tmp_path)
    assert len(files) == 6
    for path, image in zip(files, images, strict=True):
        assert np.array_equal(common.read_image(path), image.permute(1, 2, 0).numpy())


def test_pictures(tmp_path):
    """One tile per image, in order, with labels on the left. In samples.png the rows of all parts come in
    turn."""
    def tiles(values):
        return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)

    rows = {"a": [10, 20, 30], "bb": [230, 240, 250]}
    common.save_grid(tmp_path / "grid.png", {label: tiles(values) for label, values in rows.items()})
    grid, margin = np.asarray(Image.open(tmp_path / "grid.png")), 8 + 7 * 2
    assert grid.shape == (2 * 98, margin + 3 * 98, 3) and (grid[:98, :margin].min() < 100) and grid[:, -1].min() == 255
    assert grid[48::98, margin + 48 :: 98, 0].tolist() == list(rows.values())
    common.draw_samples(tmp_path, {"x": tiles([*range(100, 120)]), "y": tiles([*range(200, 220)])})
    column = np.asarray(Image.open(tmp_path / "samples.png"))[48::98, 8 + 7 * 3 + 48, 0]
    assert column.tolist() == [100, 200, 112, 212]
