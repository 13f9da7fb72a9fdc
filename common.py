"""What two or more stages share. Part I is the models, to be read once; Part II is the machinery, to be looked up.

Part I    1 diffusion, 2 networks, 3 priors, 4 the built-in data, 5 a model: what a stage hands to sampling
Part II   6 budgets, 7 image files, 8 processes, 9 training, 10 runs, 11 evaluation, 12 pictures
For stage 1 read sections 1 to 3 and 5, TRAIN in section 6 and the class Training in section 9; Setup, trained and
evaluate (10, 11) are what their names say. In one process RANKS is 1 and gather (8) returns what it is given.

Conventions (used by every file)
    Images `x0` are float32 (B, 3, H, W) in [-1, 1]; stored data and whatever `fid.py` sees are uint8. Saving rounds.
    `x_hat` is the VAE's image in [-1, 1]; its squared error `sse` is counted in [0, 1] units (SSE / 4).
    Time `t` runs 1..T and `alpha_bar[0] = 1`. Schedule constants are float64, cast where they are used.
    Losses have shape (B,): a KL or a bound in nats per image, `sse` a sum over pixels, `*_mse` a mean over them.
    Every random draw that decides a result comes from an explicit generator, but for initial weights and dropout:
    these use torch's global one, seeded before the network is built and anew in every step.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from tqdm import tqdm

import fid
from fid import autocast, fail, write  # fid.py is the lowest layer; its section 1 has small things for all files


def generator(seed, device="cpu"):
    """A seeded torch.Generator on `device`."""
    return torch.Generator(device).manual_seed(seed)


def randn(shape, gen):
    """Standard normal draws of `shape` on the generator's own device."""
    return torch.randn(shape, generator=gen, device=gen.device)


def to_float(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float (B, 3, H, W) in [-1, 1] -> uint8: clamped and rounded (truncating would darken by half a level)."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---- 1. Diffusion ----------------------------------------------------------------------------------------------------

class Diffusion:
    """The Gaussian diffusion process of DDPM (Ho et al. 2020): linear beta from 1e-4 to 0.02 over T steps.
    `objective` says what the network predicts: `eps`, or `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0`
    (Salimans & Ho 2022), which stays well conditioned at every noise level and so suits short trainings.
    `start` is the time at which the reverse process begins: T, or earlier where an x_hat tells what x0 is about. Only
    times 1..start are trained and sampled."""

    def __init__(self, objective="eps", T=1000, device="cpu", start=None):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        self.T, self.objective, self.start = T, objective, start or T
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])  # (T + 1,), [0] = 1
        self.signal = self.alpha_bar.sqrt().float().to(device)  # (T + 1,) factor of x0 in x_t
        self.noise = (1 - self.alpha_bar).sqrt().float().to(device)  # (T + 1,) factor of eps in x_t

    def scales(self, t):
        """t (B,) -> what multiplies x0 and eps in x_t, each (B, 1, 1, 1)."""
        return self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]

    def q_sample(self, x0, t, eps):
        """Draw x_t ~ q(x_t | x0) = N(sqrt(alpha_bar) x0, 1 - alpha_bar), with `eps` as the noise (DDPM eq. 4)."""
        a, sigma = self.scales(t)
        return a * x0 + sigma * eps

    def draw_t(self, u):
        """Training times, uniform on 1..start, for uniform u in [0, 1) (B,): (B,)."""
        return (self.start * u).long() + 1

    def begin(self, x_hat, eps):
        """x_start, from which the reverse process begins: x_hat (B, C, H, W) stands in for x0, with `eps` as the noise.
        At T it is eps alone, as published (x_hat would count for less than a hundredth)."""
        return eps if self.start == self.T else self.signal[self.start] * x_hat + self.noise[self.start] * eps

    def target(self, x0, t, eps):
        """What the network is trained to predict at x_t."""
        a, sigma = self.scales(t)
        return eps if self.objective == "eps" else a * eps - sigma * x0

    def simple_loss(self, denoise, x0, t, eps):
        """Mean squared error of the prediction `denoise(x_t, t)` (DDPM eq. 14), mean over dimensions: (B,)."""
        return ((denoise(self.q_sample(x0, t, eps), t) - self.target(x0, t, eps)) ** 2).flatten(1).mean(1)

    def predict(self, prediction, xt, t, clamp=True):
        """A prediction of the target -> (x0, eps); x0 is clamped to [-1, 1], eps follows from it, so they agree."""
        a, sigma = self.scales(t)
        x0 = (xt - sigma * prediction) / a if self.objective == "eps" else a * xt - sigma * prediction
        x0 = x0.clamp(-1, 1) if clamp else x0
        return x0, (xt - a * x0) / sigma

    def posterior(self, t, s):
        """q(x_s | x_t, x0) for integers s < t as (c_x0, c_xt, beta_tilde, beta): its mean is c_x0 x0 + c_xt x_t (DDPM
        eq. 7), its variance beta_tilde (`fixedsmall`); beta = 1 - alpha_bar[t] / alpha_bar[s] is the other choice
        (`fixedlarge`). With s = t - 1 these are DDPM's; other s give the respaced process."""
        bar_t, bar_s = float(self.alpha_bar[t]), float(self.alpha_bar[s])
        beta = 1 - bar_t / bar_s
        c_x0 = math.sqrt(bar_s) * beta / (1 - bar_t)
        c_xt = math.sqrt(bar_t / bar_s) * (1 - bar_s) / (1 - bar_t)
        return c_x0, c_xt, beta * (1 - bar_s) / (1 - bar_t), beta


def time_grid(start, steps):
    """0 = tau_0 < ... < tau_steps = start, tau_i = max(round(start (i/n)^2), i): dense near 0, where fine detail is
    decided. Strictly increasing for every 1 <= steps <= start."""
    return [max(round(start * (i / steps) ** 2), i) for i in range(steps + 1)]


def dpm_step(diffusion, x, x0, t, s, before):
    """DPM-Solver++(2M) (Lu et al. 2022) algorithm 2: extrapolate x0 from the last two predictions, then one exact
    step of the linear part. `before` is the last step's (t, x0), or None. With sigma ratios in place of exp(-h) it
    also holds at s = 0, where it returns x0."""
    a_t, a_s = (math.sqrt(float(diffusion.alpha_bar[k])) for k in (t, s))
    ratio = math.sqrt((1 - a_s**2) / (1 - a_t**2))  # sigma_s / sigma_t
    if before is not None and s > 0:  # the first and the last step are of first order
        t_before, x0_before = before
        lam_before, lam_t, lam_s = diffusion.alpha_bar[[t_before, t, s]].logit() / 2  # the paper's, log(signal / noise)
        r = float((lam_t - lam_before) / (lam_s - lam_t))
        x0 = x0 + (x0 - x0_before) / (2 * r)
    return ratio * x + (a_s - a_t * ratio) * x0


@torch.no_grad()
def sample(diffusion, denoise, x, sampler="dpm", steps=25, gen=None, clamp=True):
    """Run the reverse process from x = x_start (B, C, H, W) to x_0 with `steps` evaluations of `denoise(x, t) ->
    prediction`, at most `start`.
    `sampler`: `ddpm` (fixedlarge on all steps, fixedsmall when respaced: fixedlarge then leaves visible noise; its
    noise comes from `gen`), `ddim` or `dpm`."""
    steps, before = min(steps, diffusion.start), None
    grid = time_grid(diffusion.start, steps)
    for i in range(steps, 0, -1):
        t, s = grid[i], grid[i - 1]
        times = torch.full((len(x),), t, device=x.device)
        x0, eps = diffusion.predict(denoise(x, times), x, times, clamp)
        if sampler == "ddpm":  # algorithm 2: the posterior's mean plus noise (none in the last step, s = 0)
            c_x0, c_xt, small, large = diffusion.posterior(t, s)
            noise = randn(x.shape, gen) if s > 0 else 0.0
            x = c_x0 * x0 + c_xt * x + math.sqrt(large if steps == diffusion.start else small) * noise
        elif sampler == "ddim":  # Song et al. 2021, eq. 12 with eta = 0: the same x0 and eps at the noise level of s
            x = diffusion.q_sample(x0, torch.full_like(times, s), eps)
        else:
            x, before = dpm_step(diffusion, x, x0, t, s, before), (t, x0)
    return x


def kl_step(diffusion, x0, x0_hat, t):
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) where the model, of variance fixedlarge, puts x0_hat in place of x0:
    (B,) nats, t in 2..T."""
    c_x0, _, small, large = torch.tensor([diffusion.posterior(j, j - 1) for j in t.tolist()], device=x0.device).T
    constant = 0.5 * x0[0].numel() * (large.log() - small.log() + small / large - 1)
    return constant + c_x0**2 / (2 * large) * ((x0 - x0_hat) ** 2).flatten(1).sum(1)


def kl_prior(diffusion, x0, x_hat=None):
    """The bound's first term, (B,) nats: KL(q(x_start | x0) || p(x_start)). From T that is L_T, to N(0, I), and almost
    nothing; from an earlier start both are Gaussians of one variance, about x0 and about x_hat."""
    bar = float(diffusion.alpha_bar[diffusion.start])
    if diffusion.start == diffusion.T:
        return 0.5 * (bar * x0**2 - bar - math.log(1 - bar)).flatten(1).sum(1)
    return bar / (2 * (1 - bar)) * ((x0 - x_hat) ** 2).flatten(1).sum(1)


def data_nats(diffusion, x0, x0_hat):
    """L_0 = -log p(x0 | x_1), (B,) nats, of x0 = to_float(pixels): p is N(x0_hat, sd^2) over the bin of the pixel's
    value, x0 +- 1/255; the outermost bins reach to infinity (DDPM eq. 13). As in DDPM's code sd^2 is beta_tilde_2 and
    p is at least 1e-12, else a single value could cost any number of nats. In float64 on the CPU."""
    sd = math.sqrt(diffusion.posterior(2, 1)[2])
    x, mean = x0.cpu().double(), x0_hat.cpu().double()
    upper = torch.special.ndtr((x + 1 / 255 - mean) / sd).where(x < 0.999, torch.ones_like(x))
    lower = torch.special.ndtr((x - 1 / 255 - mean) / sd).where(x > -0.999, torch.zeros_like(x))
    return -(upper - lower).clamp(min=1e-12).log().flatten(1).sum(1).float().to(x0.device)


@torch.no_grad()
def diffusion_nats(diffusion, denoise, images, x_hat, draws, gen):
    """The parts of the variational bound of the diffusion model on uint8 `images`, each (B,) nats (DDPM eq. 5):
    `prior`, see kl_prior, `diffusion` sum of KL_t for t = 2..start, `data` L_0. The sum over t is estimated from
    `draws` stratified times (`draws = start - 1` takes each once). With the VAE's KL added, their sum bounds
    -log p(x)."""
    x0, terms = to_float(images), diffusion.start - 1
    total = torch.zeros(len(x0), device=x0.device)
    for k in range(draws):
        u = torch.rand(len(x0), generator=gen, device=gen.device)
        t = 2 + ((k + u.cpu().double()) * terms / draws).long().clamp(max=terms - 1).to(x0.device)  # (B,)
        xt = diffusion.q_sample(x0, t, randn(x0.shape, gen))
        x0_hat, _ = diffusion.predict(denoise(xt, t), xt, t)
        total += kl_step(diffusion, x0, x0_hat, t) * terms / draws
    one = torch.ones(len(x0), dtype=torch.long, device=x0.device)
    x1 = diffusion.q_sample(x0, one, randn(x0.shape, gen))
    x0_hat, _ = diffusion.predict(denoise(x1, one), x1, one)
    return {"prior": kl_prior(diffusion, x0, x_hat).cpu(), "diffusion": total.cpu(),
            "data": data_nats(diffusion, x0, x0_hat).cpu()}


# ---- 2. Networks -----------------------------------------------------------------------------------------------------

class BottleneckBlock(nn.Module):
    """Residual block of the VAE: GELU before each of 1x1, 3x3, 3x3, 1x1 convolutions, half the width inside, no
    normalisation (VDVAE, Child 2021, as DiffuseVAE uses it). At resolution 1 the 3x3s are 1x1. (B, C, H, W) kept."""

    def __init__(self, width, resolution=None):
        super().__init__()
        inner, kernel = width // 2, 1 if resolution == 1 else 3
        shapes = [(width, inner, 1), (inner, inner, kernel), (inner, inner, kernel), (inner, width, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in shapes)
        for conv in self.convs:
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        h = x
        for conv in self.convs:
            h = conv(F.gelu(h))
        return x + h


def keep_variance(conv, fan_in):
    """Draw the weights of a linear layer so that its output has its input's variance at the start."""
    nn.init.normal_(conv.weight, std=fan_in**-0.5)
    return conv


class Encoder(nn.Module):
    """x (B, 3, H, W) -> mu, logvar, each (B, d). `table` lists (resolution, width, blocks) from the image down to
    resolution 1, whose width is d: [(32, 32, 0), (16, 64, 1), ..., (1, 128, 1)]. Between resolutions: one block more,
    then `pool`, as published (average pooling and a bias-free 1x1 convolution), or a strided convolution over the same
    window, which keeps where things are: the published one has to learn that from the zero padding, which takes far
    more images than a short training sees."""

    def __init__(self, table, pool):
        super().__init__()
        layers = [nn.Conv2d(3, table[0][1], 3, padding=1, bias=False)]
        for (resolution, width, blocks), below in zip(table, table[1:] + [None], strict=True):
            layers += [BottleneckBlock(width, resolution) for _ in range(blocks + bool(below))]
            if below:
                k = resolution // below[0]
                layers += ([nn.AvgPool2d(k), nn.Conv2d(width, below[1], 1, bias=False)] if pool
                           else [keep_variance(nn.Conv2d(width, below[1], k, stride=k, bias=False), k * k * width)])
        self.body = nn.Sequential(*layers)
        self.mu = nn.Conv2d(table[-1][1], table[-1][1], 1, bias=False)
        self.logvar = nn.Conv2d(table[-1][1], table[-1][1], 1, bias=False)

    def forward(self, x):
        h = self.body(x)  # (B, d, 1, 1)
        return self.mu(h).flatten(1).float(), self.logvar(h).flatten(1).float()


class Decoder(nn.Module):
    """z (B, d) -> x_hat (B, 3, H, W) in [-1, 1]. `table` lists (resolution, width, blocks) from resolution 1 up.
    Between resolutions, as published, nearest upsampling and a bias-free 1x1 convolution (`pool`), or a transposed
    convolution (see Encoder). Ends in a 3x3 convolution, sigmoid, 2y - 1."""

    def __init__(self, table, pool):
        super().__init__()
        layers = []
        for (resolution, width, blocks), above in zip(table, table[1:] + [None], strict=True):
            layers += [BottleneckBlock(width, resolution) for _ in range(blocks)]
            if above:
                k = above[0] // resolution
                layers += ([nn.Upsample(scale_factor=k), nn.Conv2d(width, above[1], 1, bias=False)] if pool
                           else [keep_variance(nn.ConvTranspose2d(width, above[1], k, k, bias=False), width)])
        self.body = nn.Sequential(*layers, nn.Conv2d(table[-1][1], 3, 3, padding=1))

    def forward(self, z):
        return 2 * torch.sigmoid(self.body(z[:, :, None, None]).float()) - 1


class VAE(nn.Module):
    """The bottleneck-residual VAE of DiffuseVAE (Pandey et al. 2022) with a vector latent z of shape (B, d)."""

    def __init__(self, encoder, decoder, pool=True):
        super().__init__()
        self.encoder, self.decoder = Encoder(encoder, pool), Decoder(decoder, pool)
        self.latent_dim = encoder[-1][1]

    def forward(self, x0, noise):
        """x0 (B, 3, H, W), noise (B, d) standard normal -> x_hat, mu, logvar."""
        mu, logvar = self.encoder(x0)
        return self.decoder(reparameterise(mu, logvar, noise)), mu, logvar


def reparameterise(mu, logvar, noise):
    """z ~ N(mu, exp(logvar)) from standard normal noise, all (B, d), so that z has a gradient to both (Kingma & Welling
    2014, 2.4)."""
    return mu + (0.5 * logvar).exp() * noise


def squared_error(x_hat, x0):
    """SSE of images in [-1, 1], counted in [0, 1] units: (B, 3, H, W) twice -> (B,)."""
    return ((x_hat - x0) ** 2).flatten(1).sum(1) / 4


def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)) summed over dimensions: (B, d), (B, d) -> (B,) nats."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)


def active_units(mu):
    """Which latent dimensions carry anything: those whose mean, (N, d), varies (Burda et al. 2016, 5.2): (d,)."""
    return mu.var(0) > 0.01


def gaussian_log_prob(z, mu, logvar):
    """log N(z; mu, exp(logvar)) summed over dimensions: three (B, d) -> (B,) nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32, with as many groups as divide a quarter of the width and 32: 32 at the published widths.
    On a GPU autocast does that; on a CPU it takes bfloat16, which is coarser and four times as slow."""

    def __init__(self, width):
        super().__init__(math.gcd(32, width // 4), width)

    def forward(self, x):
        return super().forward(x.float())


def zero_init(module):
    """Zero a layer's parameters, so that its block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """GroupNorm-SiLU-conv twice with the time embedding added between (DDPM, Ho et al. 2020); second conv from zero."""

    def __init__(self, width_in, width_out, emb_dim, dropout):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(width_in), nn.Conv2d(width_in, width_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, width_out)
        self.norm2, self.dropout = GroupNorm(width_out), nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(width_out, width_out, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    """Self-attention over all positions, (B, C, H, W) kept; the projection starts from zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, GroupNorm(width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), zero_init(nn.Conv2d(width, width, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # (B, heads, H*W, C/heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        return x + self.out(y)


class UNet(nn.Module):
    """The DDPM U-Net. `table` lists (resolution, width, blocks down, blocks up) from the image's resolution down, as
    [(32, 128, 2, 3), (16, 256, 2, 3), ...]; `attention` the resolutions with self-attention. DDPM has one block more
    going up than down, so that every skip is used; equal numbers (the first skip of a level then goes unused) are
    cheaper where resolution is dear. The output starts at zero.
    x (B, in_channels, H, W), t (B,) in 1..T -> (B, out_channels, H, W). `extra` (B, 4 * first width), where given, is
    added to the time embedding."""

    def __init__(self, table, in_channels, out_channels=3, attention=(16,), heads=1, dropout=0.0):
        super().__init__()
        width = table[0][1]
        emb_dim = 4 * width
        self.time = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)

        def layer(width_in, width_out, resolution):
            return nn.ModuleList([ResidualBlock(width_in, width_out, emb_dim, dropout),
                                  Attention(width_out, heads) if resolution in attention else nn.Identity()])

        self.down, self.shrink, levels = nn.ModuleList(), nn.ModuleList(), []
        for resolution, out, down, _ in table:
            widths = [width] + down * [out]  # of the features that enter the level and leave each of its blocks
            self.down.append(nn.ModuleList(layer(w, out, resolution) for w in widths[:-1]))
            levels.append(widths)
            width = out
            self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.middle = nn.ModuleList([ResidualBlock(width, width, emb_dim, dropout), Attention(width, heads),
                                     ResidualBlock(width, width, emb_dim, dropout)])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for (resolution, out, _, up), widths in zip(reversed(table), reversed(levels), strict=True):
            blocks = nn.ModuleList()
            for _ in range(up):
                blocks.append(layer(width + widths.pop(), out, resolution))
                width = out
            self.up.append(blocks)
            self.grow.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        self.shrink[-1] = self.grow[-1] = nn.Identity()  # nothing below the last level, nothing above the first
        self.norm, self.out = GroupNorm(width), zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x, t, extra=None):
        half = self.time[0].in_features // 2
        frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=x.device) / half)
        angle = t[:, None].float() * frequency  # (B, half)
        emb = self.time(torch.cat([angle.cos(), angle.sin()], 1))  # (B, 4 * first width)
        emb = F.silu(emb if extra is None else emb + extra)
        h, levels = self.stem(x), []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            levels.append([h])
            for residual, attention in blocks:
                h = attention(residual(h, emb))
                levels[-1].append(h)
            h = shrink(h)
        h = self.middle[2](self.middle[1](self.middle[0](h, emb)), emb)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            skips = levels.pop()
            for residual, attention in blocks:
                h = attention(residual(torch.cat([h, skips.pop()], 1), emb))
            h = grow(h)
        return self.out(F.silu(self.norm(h))).float()


def build_vae(train):
    """The VAE of the train settings (see budget)."""
    return VAE(train["encoder"], train["decoder"], train["pool"])


def build_unet(train, in_channels):
    """The U-Net of the train settings; it sees the 3 channels of x_t, then those that condition it."""
    return UNet(train["unet"], in_channels, attention=train["attention"], heads=train["heads"],
                dropout=train["dropout"])


def frozen(network, weights, device):
    """A network with these weights, on the device, in evaluation mode and without gradients."""
    network.load_state_dict(weights)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ---- 3. Priors over z ------------------------------------------------------------------------------------------------

class StandardNormal:
    """N(0, I) over z of dimension d: what the VAE's KL term pulls towards."""

    def __init__(self, d):
        self.d = d

    def log_prob(self, z):
        """Log density: (N, d) -> (N,) nats."""
        return torch.distributions.Normal(0, 1).log_prob(z).sum(1)

    def sample(self, count, gen):
        """`count` draws (count, d) from a CPU generator."""
        return torch.randn(count, self.d, generator=gen)


class GaussianMixture:
    """Gaussian mixture fitted by EM (Bishop 2006, 9.2.2): the ex-post prior. As published each component has its own
    covariance; `tied`, all share one, so that thousands can be fitted, each to a few z.
    Attributes, float32: weights (K,), means (K, d), factors (lower Cholesky) (K, d, d), tied (1, d, d)."""

    def __init__(self, weights, means, factors):
        self.weights, self.means, self.factors = weights.float(), means.float(), factors.float()

    @classmethod
    def fit(cls, z, components, seed, tied=False, rounds=6, few=10_000):
        """z (N, d) -> the mixture, from random z as means (so of N components at most), after `rounds` of EM on `few` z
        (or twenty a component, if that is more), which bring it near, and two on all."""
        z = z.cpu()[torch.randperm(len(z), generator=generator(seed))]  # image files come class by class
        ridge = 1e-3 * torch.eye(z.shape[1])  # keeps every covariance regular
        means, factor = z[:components], torch.linalg.cholesky(z.T.cov() + ridge)
        mixture = cls(torch.full((len(means),), 1 / len(means)), means, factor[None])
        for some in [z[: max(few, 20 * components)]] * rounds + [z] * 2:
            mass, sums = 1e-9, 0  # sums of shares (K,), of shares of z (K, d), of z z' (K, d, d), tied (d, d)
            products = some.T @ some if tied else torch.zeros(len(means), *ridge.shape)
            for part in some.split(2000):
                belongs = mixture.log_joint(part).softmax(1)  # the E step: (n, K)
                mass, sums = mass + belongs.sum(0), sums + belongs.T @ part
                if not tied:
                    for k, share in enumerate(belongs.T):
                        mine = share > 0  # in many dimensions, few z belong to more than one component
                        products[k] += (share[mine, None] * part[mine]).T @ part[mine]
            means = sums / mass[:, None]  # the M step; a covariance is the mean of z z' less that of its mean
            cov = ((products - sums.T @ means)[None] / len(some) if tied else
                   products / mass[:, None, None] - means[:, :, None] * means[:, None])
            mixture = cls(mass / mass.sum(), means, torch.linalg.cholesky(cov + ridge))
        return mixture

    @torch.autocast("cpu", enabled=False)  # bfloat16 would err by nats
    def log_joint(self, z):
        """log(weight_k N(z | k)): (N, d) -> (N, K)."""
        d, rows = self.means.shape[1], []
        whiten = torch.linalg.solve_triangular(self.factors, torch.eye(d), upper=False)  # (K, d, d) or (1, d, d)
        centres = (whiten @ self.means[:, :, None]).view(len(whiten), -1, d)  # (K, 1, d); tied (1, K, d)
        constant = self.weights.log() - self.factors.diagonal(dim1=1, dim2=2).log().sum(1)  # (K,)
        for part in z.cpu().split(100):  # few enough to stay in a processor's cache
            white = part @ whiten.mT  # (K, n, d); tied (1, n, d)
            # |white - centre|^2, multiplied out: (K, n, 1); tied (1, n, K)
            square = white.square().sum(2, keepdim=True) - 2 * white @ centres.mT + centres.square().sum(2)[:, None]
            rows.append(constant - 0.5 * (square.movedim(0, 1).flatten(1) + d * math.log(2 * math.pi)))
        return torch.cat(rows)

    def log_prob(self, z):
        """Log density: (N, d) -> (N,) nats."""
        return self.log_joint(z).logsumexp(1)

    def sample(self, count, gen):
        """`count` draws (count, d) from a CPU generator, in random order (the component is drawn per row)."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=gen)
        noise = torch.randn(count, self.means.shape[1], generator=gen)
        factors = self.factors.expand(len(self.means), -1, -1)[k]  # (count, d, d)
        return self.means[k] + (factors @ noise[:, :, None])[:, :, 0]


# ---- 4. The built-in data --------------------------------------------------------------------------------------------

FACTORS = ("size", "x", "y", "hue sine", "hue cosine", "tilt", "lightness", "detail", "band direction")


@dataclasses.dataclass
class ImageData:
    """One split of a data set, held whole in memory: images uint8 (N, 3, H, W), labels int64 (N,) or None,
    factors float32 (N, len(FACTORS)) or None, and what a result must say about its data."""

    images: torch.Tensor
    labels: torch.Tensor | None
    factors: torch.Tensor | None
    name: str
    crop: str
    note: str


def draw_shapes(count, seed):
    """The built-in data set: `count` anti-aliased shapes, a third plain, a third with broad bands, a third with fine.
    Outline, place, colour and broad bands are what a small VAE can keep; fine bands and crisp edges are what it cannot.
    So the refiner has something to restore, and images differ in how much. Bands have two tones and are fixed to the
    pixel grid: horizontal, vertical or diagonal, with a period of 8 pixels (broad) or of 3 or 4 (fine).
    Returns uint8 images (count, 3, 32, 32), int64 labels (count,), float32 factors (count, 9), see FACTORS."""
    gen, size = generator(seed), 32

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=gen)

    label, detail, direction = (torch.randint(n, (count,), generator=gen) for n in (6, 3, 3))
    period = torch.where(detail == 2, torch.randint(3, 5, (count,), generator=gen), 8)
    radius, cx, cy, tilt, hue = uniform(9, 12), uniform(13, 19), uniform(13, 19), uniform(-0.25, 0.25), uniform(0, 1)
    lightness, towards = uniform(0.1, 0.55), uniform(0, 2 * math.pi)  # of the grey ground, and where it gets lighter
    full = ((hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3).abs().sub(1).clamp(0, 1)  # (N, 3) pure hue
    colour = full * 0.75 + 0.2
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for part in torch.arange(count).split(1000):
        at = lambda v, part=part: v[part][:, None, None]  # noqa: E731 - (P,) -> (P, 1, 1), to meet (H, W)
        x, y = columns + 0.5 - at(cx), rows + 0.5 - at(cy)
        u = (x * at(tilt).cos() + y * at(tilt).sin()) / at(radius)  # the shape's own frame, radius 1
        v = (y * at(tilt).cos() - x * at(tilt).sin()) / at(radius)
        rho = torch.hypot(u, v)
        fifth = math.pi / 5
        fold = ((torch.atan2(u, -v) + fifth) % (2 * fifth) - fifth).abs()  # angle to a star's next tip
        arm, bar = torch.maximum(u.abs() - 0.95, v.abs() - 0.33), torch.maximum(u.abs() - 0.33, v.abs() - 0.95)
        distances = torch.stack([  # signed distance to each outline (negative inside), about exact near it
            rho - 0.9,  # disc
            (rho - 0.68).abs() - 0.25,  # ring
            torch.maximum(u.abs(), v.abs()) - 0.78,  # square
            torch.maximum(v, 0.866 * u.abs() - v / 2) - 0.53,  # triangle
            0.443 * (rho * fold.cos() - 1) + 0.897 * rho * fold.sin(),  # star
            torch.minimum(arm, bar),  # cross
        ], dim=1)  # (P, 6, H, W)
        distance = distances[torch.arange(len(part)), label[part]]  # (P, H, W)
        cover = (0.5 - distance * at(radius)).clamp(0, 1)[:, None]  # share of the pixel inside the outline
        along = torch.stack([rows + 0 * columns, columns + 0 * rows, rows + columns])[direction[part]]  # (P, H, W)
        light = (at(detail) == 0) | (along % at(period) < at(period) // 2)  # two tones: light or dark
        ground = at(lightness) + 0.3 * ((columns - 16) * at(towards).cos() + (rows - 16) * at(towards).sin()) / size
        inside = colour[part][:, :, None, None] * torch.where(light, 1.0, 0.65)[:, None]  # (P, 3, H, W)
        image = ground[:, None] * (1 - cover) + inside * cover
        images[part] = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    factors = torch.stack([(radius - 10.5) / 1.5, (cx - 16) / 3, (cy - 16) / 3, (2 * math.pi * hue).sin(),
                           (2 * math.pi * hue).cos(), tilt * 4, (lightness - 0.325) * 4.4, detail - 1.0,
                           (direction - 1.0) * (detail > 0)], dim=1)
    return images, label, factors


# ---- 5. A model: z ~ prior, x_hat = Dec(z), noise to x_start, refine -------------------------------------------------

@dataclasses.dataclass
class Model:
    """What every stage hands to sampling and evaluation: a VAE, a diffusion model, or the one behind the other."""

    name: str
    device: torch.device
    shape: tuple  # (C, H, W) of what is diffused
    diffusion: Diffusion
    vae: VAE | None = None
    priors: dict = dataclasses.field(default_factory=dict)  # over z, by name: each has sample(count, gen), log_prob(z)
    condition: Callable | None = None  # condition(x_hat, z) -> denoise(x, t), see sample; None: a VAE alone
    decode: Callable | None = None  # from what is diffused to images, where that is a latent
    temperature: float = 1.0  # of the noise in x_start: 1 as trained, below 1 fewer artefacts and less detail


@torch.no_grad()
def encode(vae, images, device, batch=500):
    """uint8 images (N, 3, H, W) -> mu, logvar of q(z|x), each (N, d) on the CPU."""
    parts = [vae.encoder(to_float(chunk.to(device))) for chunk in images.split(batch)]
    mu, logvar = zip(*parts, strict=True)
    return torch.cat(mu).cpu(), torch.cat(logvar).cpu()


def fit_mixture(vae, images, train, device):
    """The ex-post prior: a mixture fitted to z ~ q(z|x) of the training images; its state, for a checkpoint. Of few
    images up to ten z each are drawn, 60,000 in all: to one z of each, the mixture would fit the noise of the draw."""
    gen = generator(train["seed"] + 2)
    mu, logvar = encode(vae, images, device)
    draws = max(1, min(10, 60_000 // len(mu)))
    z = torch.cat([reparameterise(mu, logvar, randn(mu.shape, gen)) for _ in range(draws)])
    if not (z.abs() < 100).all():  # nor nan
        fail("the VAE diverged: a latent is not finite, or beyond 100; take a larger --batch-size or lower rates")
    return vars(GaussianMixture.fit(z, train["components"], train["seed"], train["tied"]))


def ridge_regression(x, y, ridge=1e-3):
    """Linear regression in closed form, y ~ x @ weight + bias: x (N, d), y (N, k) -> weight (d, k), bias (k,). The
    penalty ridge N |weight|^2 is on standardised x, so that its units do not matter."""
    mean, sd = x.mean(0), x.std(0).clamp(min=1e-6)
    a = (x - mean) / sd
    weight = torch.linalg.solve(a.T @ a + ridge * len(a) * torch.eye(a.shape[1]), a.T @ (y - y.mean(0))) / sd[:, None]
    return weight, y.mean(0) - mean @ weight


@torch.no_grad()
def refine(model, x_hat, z, gen, sampler, steps):
    """x_hat (B, 3, H, W), z (B, d) -> refined images in [-1, 1] (x_hat itself if the model is a VAE alone). The noise
    of x_start comes from `gen`, a CPU generator, that of the steps from its seed + 1, on the device."""
    if model.condition is None:
        return x_hat
    x_start = model.diffusion.begin(x_hat, model.temperature * randn(x_hat.shape, gen).to(model.device))
    step_gen = generator(gen.initial_seed() + 1, model.device)
    with autocast(model.device):
        return sample(model.diffusion, model.condition(x_hat, z), x_start, sampler, steps, step_gen,
                      clamp=model.decode is None)  # latents have no [-1, 1]


@torch.no_grad()
def generate(model, count, prior, sampler, steps, seed, batch, damage=0.0, first=0):
    """Draw `count` images: uint8 x_hat (grey without a VAE) and refined, each (count, 3, H, W) on the CPU, and seconds
    per image. Each batch has its own generator: at an equal `batch`, image k has the same z and noise whatever the
    sampler, the steps and the count. `first`, a multiple of `batch`, is the number of the first image that is drawn.
    `damage` is the sd of noise added to x_hat before refinement, or to a diffused latent before it is decoded."""
    parts, offsets = [], range(first, first + count, batch)[RANK :: RANKS]  # batches are shared out
    for offset in tqdm(offsets, desc=f"{model.name} {prior} {sampler} {steps}", leave=False, disable=len(offsets) < 2):
        gen, clock = generator(1_000_000 * (seed + 1) + offset), time.time()
        damage_gen = generator(gen.initial_seed() + 2)
        z = model.priors[prior].sample(batch, gen).to(model.device) if model.vae is not None else None
        x_hat = torch.zeros(batch, *model.shape, device=model.device)
        with autocast(model.device):
            if model.vae is not None:
                x_hat = model.vae.decoder(z) + damage * randn(x_hat.shape, damage_gen).to(model.device)
            x = refine(model, x_hat, z, gen, sampler, steps)
            if model.decode is not None:
                x = model.decode(x + damage * randn(x.shape, damage_gen).to(model.device))
        parts.append((to_uint8(x_hat).cpu(), to_uint8(x).cpu(), time.time() - clock))
    before, after, seconds = zip(*gather(parts), strict=True)
    return torch.cat(before)[:count], torch.cat(after)[:count], sum(seconds) / (batch * len(seconds))


# ==== Part II, the machinery: how the models above are fed, trained, kept and measured. To be looked up. ==============

# ---- 6. Budgets ------------------------------------------------------------------------------------------------------

# (resolution, width, blocks down, blocks up): down is the VAE's encoder, up its decoder
VAE_TABLES = {
    "smoke 32": [(32, 8, 0, 0), (16, 16, 0, 0), (4, 32, 1, 1), (1, 8, 0, 0)],
    "smoke 64": [(64, 8, 0, 0), (16, 16, 0, 0), (4, 32, 1, 1), (1, 8, 0, 0)],
    "shapes 32": [(32, 32, 0, 1), (16, 64, 0, 0), (8, 96, 1, 1), (4, 128, 1, 1), (1, 64, 1, 1)],
    "cpu 32": [(32, 32, 0, 1), (16, 64, 1, 1), (8, 96, 1, 1), (4, 128, 1, 1), (1, 128, 1, 1)],
    "cpu 64": [(64, 16, 0, 1), (32, 32, 1, 1), (16, 64, 1, 1), (8, 96, 1, 1), (4, 128, 1, 1), (1, 128, 1, 1)],
    # Published (DiffuseVAE's cifar10 and celeba64 train.yaml): 9.24M and 14.01M parameters
    "paper 32": [(32, 64, 7, 15), (16, 128, 4, 7), (8, 256, 4, 3), (4, 256, 3, 2), (1, 512, 3, 1)],
    "paper 64": [(64, 64, 7, 10), (32, 128, 4, 8), (16, 256, 7, 7), (8, 256, 3, 3), (4, 256, 3, 2), (1, 512, 2, 1)],
}
UNET_TABLES = {
    "smoke 32": [(32, 8, 1, 1), (16, 16, 1, 1)],
    "smoke 64": [(64, 8, 1, 1), (32, 8, 1, 1), (16, 16, 1, 1)],
    "shapes 32": [(32, 32, 0, 1), (16, 48, 1, 1), (8, 64, 1, 1)],
    "cpu 32": [(32, 32, 1, 1), (16, 64, 1, 1), (8, 96, 1, 1)],
    "cpu 64": [(64, 32, 0, 1), (32, 48, 1, 1), (16, 64, 1, 1), (8, 96, 1, 1)],  # 16 wide at 64x64 left speckle on faces
    "gpu 32": [(32, 96, 2, 3), (16, 192, 2, 3), (8, 192, 2, 3)],
    "gpu 64": [(64, 64, 2, 3), (32, 128, 2, 3), (16, 192, 2, 3), (8, 192, 2, 3)],
    # Published, with attention truly at 16x16: 35.75M and 78.70M parameters
    "paper 32": [(32, 128, 2, 3), (16, 256, 2, 3), (8, 256, 2, 3), (4, 256, 2, 3)],
    "paper 64": [(64, 128, 2, 3), (32, 256, 2, 3), (16, 256, 2, 3), (8, 256, 2, 3), (4, 512, 2, 3)],
}

# What every budget but `paper` trains with: v-prediction, stable in short trainings; Muon; refinement from `start`,
# where the noise over the signal is ten to twenty times the sd of what the VAE leaves over. `steps` are a budget's own.
TRAIN = {
    "batch": 32,  # each network sees steps * batch images
    "vae_lr": 2e-3, "unet_lr": 2e-3, "warmup": 0.05, "decay": True,  # see learning_rate
    "vae_muon_lr": 0.02, "unet_muon_lr": 0.01,  # Muon's, for matrices and convolutions; 0: Adam for all
    "vae_clip": 200.0, "unet_clip": 1.0,  # largest norm of a gradient: of a sum over pixels, of a mean; 0: any
    "vae_ema": 0.995, "unet_ema": 0.995,  # decay of the moving average of the weights
    "objective": "v", "start": 400,  # see Diffusion; without an x_hat the process starts at T
    "beta": 1.0, "pool": False,  # weight of the VAE's KL; see Encoder
    "dropout": 0.0, "heads": 1, "attention": [],  # of the U-Net; resolutions with attention
    "flip": "both",  # who sees images mirrored at random: both networks, refiner (and what trains with it), none
    "components": 20, "tied": False,  # of the mixture fitted ex post; see GaussianMixture
    "flow_steps": 5000,  # of the flow fitted ex post
    "every": 50,  # steps between two rows of the log
    "compile": False,
}
EVAL = {
    "sampler": "dpm", "sample_steps": 10, "count": 1000,  # of the headline row
    "batch": 100, "temperature": 1.0,  # of every row
    "grid": [["ddim", 6], ["ddim", 100], ["dpm", 6], ["dpm", 10], ["dpm", 25]],
    "grid_count": 500,  # images for each row of the grid, and for each probe
    "probe_steps": 10,  # of DPM-Solver++ in the probes: noise, interpolations, uncertainty
    "bits_images": 128, "bits_draws": 40,  # see bits_per_dim, diffusion_nats
}


def budget(name, dataset, size):
    """The settings of a budget for a data set at image size 32 or 64: (train, eval), plain dictionaries."""
    train, evaluation = dict(TRAIN), dict(EVAL)
    tables = "shapes" if (name, dataset) == ("cpu", "shapes") else name
    if name == "smoke":
        train |= {"steps": 8, "attention": [16], "components": 2, "flow_steps": 8, "every": 4}
        evaluation |= {"sample_steps": 4, "count": 64, "batch": 64, "grid": [["dpm", 2], ["dpm", 4]], "grid_count": 64,
                       "probe_steps": 2, "bits_images": 8, "bits_draws": 4, "temperature": 0.9}
    elif tables == "shapes":
        # so small a beta keeps outlines, so rich a code needs a fine mixture
        train |= {"steps": 700, "beta": 0.08, "components": 3000, "tied": True}
        evaluation |= {"grid_count": 200}
    elif name == "cpu":
        steps = 5000 if size == 32 else 3000
        train |= {"steps": steps, "flow_steps": steps, "components": 30, "beta": 0.25}
        evaluation |= {"count": 2000, "grid_count": 300}
    elif name == "gpu":  # sized for 25 minutes of one data-centre GPU; not measured yet
        train |= {"batch": 256, "steps": 12_000, "unet_ema": 0.9995, "dropout": 0.1, "heads": 4, "attention": [16],
                  "components": 50}
        evaluation |= {"sample_steps": 25, "count": 10_000, "batch": 500, "grid_count": 2000, "probe_steps": 25,
                       "bits_images": 256, "bits_draws": 100}
    else:  # paper: DiffuseVAE's own settings (eps, from T, Adam, no VAE EMA, no flips for the VAE, constant rates)
        train |= {"batch": 128, "vae_lr": 1e-4, "unet_lr": 2e-4, "vae_muon_lr": 0.0, "unet_muon_lr": 0.0,
                  "warmup": 5000, "decay": False, "vae_clip": 0.0, "vae_ema": 0.0, "unet_ema": 0.9999, "pool": True,
                  "objective": "eps", "start": 1000, "heads": 8, "attention": [16], "flip": "refiner", "every": 100}
        train |= ({"steps": 1_110_000, "dropout": 0.3, "components": 50} if size == 32 else
                  {"steps": 2_535_000, "dropout": 0.1, "components": 75, "batch": 32})
        grid = [[sampler, steps] for sampler in ("ddim", "dpm") for steps in (5, 10, 25, 50, 100)] + [["ddpm", 1000]]
        evaluation |= {"sampler": "ddpm", "sample_steps": 1000, "count": 50_000, "batch": 500, "grid": grid,
                       "grid_count": 10_000, "probe_steps": 25, "bits_images": 256, "bits_draws": 999}
    vae = VAE_TABLES[f"{'cpu' if name == 'gpu' else tables} {size}"]
    train |= {"encoder": [row[:3] for row in vae], "decoder": [(r, width, up) for r, width, _, up in reversed(vae)],
              "unet": UNET_TABLES[f"{tables} {size}"], "flip": "none" if dataset == "shapes" else train["flip"]}
    return json.loads(json.dumps(train)), evaluation  # tuples become lists, as in a file


def count_cost(model, *inputs):
    """Parameters and forward GFLOPs (a multiply-add counts 2) of a `model`, which may be on the `meta` device."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused CPU attention counts as 0
        model(*inputs)
    return {"parameters": sum(p.numel() for p in model.parameters()), "gflops": counter.get_total_flops() / 1e9}


def network_cost(train, vae=True, channels=6):
    """count_cost by name: of the VAE if `vae`, of a U-Net with so many input channels if any."""
    size, cost = train["image_size"], {}
    with torch.device("meta"):
        if vae:
            net = build_vae(train)
            cost["vae"] = count_cost(net, torch.empty(1, 3, size, size), torch.empty(1, net.latent_dim))
        if channels:
            cost["unet"] = count_cost(build_unet(train, channels), torch.empty(1, channels, size, size), torch.ones(1))
    return cost


# ---- 7. Image files --------------------------------------------------------------------------------------------------

def decode_file(path, size, crop):
    """One image file -> uint8 array (size, size, 3). `crop`: `none` and `centre` take the centred square, `celeba-148`
    the 148x148 box at (15, 40) of the 178x218 aligned image, in proportion for smaller copies (as NVAE crops)."""
    image = fid.read_image(path)
    if crop != "celeba-148":
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))  # anti-aliased when it shrinks
    (width, height), scale = image.size, image.width / 178
    if 188 * scale > height:
        fail(f"{path}: {width}x{height} is not an aligned CelebA image (178x218 or smaller in proportion)")
    box = (15 * scale, 40 * scale, 163 * scale, 188 * scale)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def list_split(dataset, split, folder):
    """The files of a split, their labels (or None), the name of the crop, and what results must say of the data."""
    below = {"cifar10": f"cifar10/{split}", "celeba64": "celeba/img_align_celeba", "folder": "."}
    files = fid.find_images(folder / below[dataset])
    jpeg = any(p.suffix.lower() in (".jpg", ".jpeg") for p in files)  # which moves every distance
    if dataset == "cifar10":
        classes = sorted({p.name for p in (folder / "cifar10").glob("*/*") if p.is_dir()})  # of both splits
        files = [p for p in files if p.parent.name in classes]
        return files, [classes.index(p.parent.name) for p in files], "none", "JPEG copies" if jpeg else "lossless"
    edge = len(files) - len(files) // 10  # the last tenth by name is the test split, unless there is a partition file
    chosen = files[:edge] if split == "train" else files[edge:]
    if dataset == "folder":
        return chosen, None, "centre", "JPEG files" if jpeg else "lossless"
    partition = folder / "celeba" / "list_eval_partition.txt"
    if partition.is_file():
        part = dict(line.split()[:2] for line in partition.read_text().splitlines() if line.strip())
        chosen = [p for p in files if part.get(p.name) == {"train": "0", "test": "2"}[split]]
    width, height = fid.read_image(chosen[0]).size if chosen else (178, 218)
    return chosen, None, "celeba-148", "as published" if width == 178 else f"JPEG copies at {width}x{height}"


def load_images(dataset, split, data_dir="data", image_size=None):
    """One split (`train` or `test`) of a data set: an ImageData. What is decoded is kept in `DATA_DIR/cache`, of a
    folder in `data/cache`. Exits, naming the folder, the layouts and the remedy, if there is nothing to load."""
    if dataset == "shapes":
        images, labels, factors = draw_shapes(20_000 if split == "train" else 4_000, seed=1 if split == "train" else 2)
        return ImageData(images, labels, factors, "shapes", "none", "drawn by the program")
    folder, size = Path(data_dir), image_size or {"cifar10": 32}.get(dataset, 64)
    if dataset == "folder" and (found := len(fid.find_images(folder))) < 60:  # a tenth is held out
        fail(f"--data-dir {folder}: found {found} images there; give a folder that holds at least 60")
    files, labels, crop, note = list_split(dataset, split, folder)
    if not files:
        try:
            from torchvision.datasets import CIFAR10, CelebA
            if dataset == "cifar10":
                source = CIFAR10(str(folder), split == "train", download=not (folder / "cifar-10-batches-py").is_dir())
                images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
                return ImageData(images, torch.tensor(source.targets), None, dataset, "none", "as published")
            CelebA(str(folder), split="all", download=True)  # needs the package gdown
        except Exception as error:  # no gdown, no network, a broken archive: the remedy is the same
            reason = str(error).split("\n")[0][:100]
            layout = {"cifar10": "cifar-10-batches-py/ or cifar10/{train,test}/<class>/*.{png,jpg}",
                      "celeba64": "celeba/img_align_celeba/*.jpg"}[dataset]
            fail(f"--dataset {dataset}: nothing in {folder.resolve()} and no download ({reason}); "
                 f"put {layout} there, name its folder with --data-dir, or use --dataset shapes")
        files, labels, crop, note = list_split(dataset, split, folder)
    name = folder.resolve().name if dataset == "folder" else dataset
    cache = (Path("data") if dataset == "folder" else folder) / "cache" / f"{name}-{split}-{crop}-{size}.npz"
    images = torch.from_numpy(decode_files(files, size, crop, cache))
    # files come class by class: in random order the first N held-out images stand for all
    order = torch.randperm(len(images), generator=generator(0)) if split == "test" else slice(None)
    return ImageData(images[order], torch.tensor(labels)[order] if labels else None, None, name, crop, note)


def decode_files(files, size, crop, cache):
    """Image files -> uint8 array (N, 3, size, size), kept in `cache` until a file's path, size or time changes."""
    listing = "".join(f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in files)
    key = hashlib.sha256(f"{crop} {size}\n{listing}".encode()).hexdigest()
    with contextlib.suppress(Exception):  # there is none, or it is damaged: decode again
        stored = np.load(cache)
        if str(stored["key"]) == key:
            return stored["images"]
    images = np.stack([decode_file(p, size, crop) for p in tqdm(files, desc=f"decoding {cache.stem}", unit="image")])
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    save_as(cache, np.savez, images=images, key=key)
    return images


# ---- 8. Processes ----------------------------------------------------------------------------------------------------

# torchrun --nproc_per_node N stageX.py ...: all processes run the same script on the same random numbers, take their
# slice of every training batch, average the gradients, and share out what is sampled. So they stay equal, the number of
# processes changes nothing but the speed (and dropout's masks), and the first one alone writes. This is what
# DistributedDataParallel does, without its overlap of sending and computing.
RANK, RANKS = fid.RANK, int(os.environ.get("WORLD_SIZE", 1))  # this process's number, and how many there are


def choose_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps` -> torch.device; exits if that device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()  # a `meta` tensor cannot be read
        return torch.device(name)
    except (RuntimeError, AssertionError):  # an unknown name, a missing device, a build without it
        fail(f"--device {name}: not a device of this machine; use auto, cpu, cuda, cuda:N or mps")


def join_ranks(device, batch):
    """Meet the other processes, if torchrun started any (gloo on a CPU, nccl on GPUs); returns this one's device."""
    if RANKS == 1:
        return device
    if batch % RANKS:
        fail(f"--batch-size {batch}: must be a multiple of the {RANKS} processes")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(distributed.destroy_process_group)
    if RANK > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    return device


def wait_for_ranks():
    """Go on when all processes have come this far."""
    if RANKS > 1:
        distributed.barrier()


def average_over_ranks(tensors):
    """Replace tensors, such as the gradients of equally large slices, by their means over all processes, in place."""
    if RANKS > 1 and tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        distributed.all_reduce(flat)
        torch._foreach_copy_(tensors, [part.view_as(x) / RANKS for part, x in
                                       zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)])


def gather(parts):
    """Lists of batches, one list per process, in turn: process r has made batch r, r + ranks, ... Returns all."""
    if RANKS == 1:
        return parts
    lists = [None] * RANKS
    distributed.all_gather_object(lists, parts)
    return [lists[i % RANKS][i // RANKS] for i in range(sum(map(len, lists)))]


def keep_freed_memory():
    """Let glibc keep what is freed: handing every large tensor back to the kernel costs 33,000 page faults, a tenth of
    the time, in each training step on a CPU. Does nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


# ---- 9. Training -----------------------------------------------------------------------------------------------------

def orthogonalise(matrix, rounds=5):
    """The matrix (m, n) with singular values brought to about 1 (0.7 to 1.2; the tiniest stay below), its directions
    kept: Newton-Schulz iteration with the quintic of Jordan et al. 2024, matrix products alone."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): the update of a weight matrix has all singular values near 1, so
    that rare directions of the gradient move as far as common ones. A convolution is a matrix of (out, in k k), a
    transposed one of (in, out k k)."""

    def __init__(self, params, lr=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"]).flatten(1)  # looks ahead, after Nesterov
                size = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(orthogonalise(update).reshape(p.shape), alpha=-group["lr"] * size)


class Training:
    """A training loop without its maths: a stage iterates over batches and hands over a loss (stage1_baseline.py).
    It owns the optimisers, the clipping and the moving average of every network (`train` holds NAME_lr, NAME_muon_lr,
    NAME_clip and NAME_ema for each name), the log, and a checkpoint every minute and on SIGTERM or Ctrl-C, from which
    (`state`) a run goes on to the same bits. Of several processes each gets its part of every batch."""

    def __init__(self, folder, state, train, device, data, flip, **networks):
        self.folder, self.train, self.device, self.networks = Path(folder), train, device, networks
        self.data, self.flip = data.to(device), flip
        self.averages, self.optimizers = {}, {}  # optimizers: by the setting that holds their learning rate
        for name, network in networks.items():
            network.to(device, memory_format=torch.channels_last).train()
            for part in network.modules():
                if train["compile"] and isinstance(part, (Encoder, Decoder, UNet)):
                    part.compile()  # in place: parameters keep their names
            self.averages[name] = {key: value.clone() for key, value in network.state_dict().items()}
            muon = [p for p in network.parameters() if p.dim() > 1 and train[f"{name}_muon_lr"]]
            adam = [p for p in network.parameters() if p.dim() == 1 or not train[f"{name}_muon_lr"]]
            if muon:
                self.optimizers[f"{name}_muon_lr"] = Muon(muon)
            self.optimizers[f"{name}_lr"] = torch.optim.Adam(adam, fused=device.type in ("cpu", "cuda"))
        self.gen = generator(train["seed"] + 1, device)
        self.steps, self.seconds, self.every = 0, 0.0, min(train["every"], train["steps"])
        self.log, self.sums = [], {}  # sums: since the last row of the log
        if state:  # go on where it was written
            for name, network in networks.items():
                network.load_state_dict(state["weights"][name])
                self.averages[name] = {key: value.to(device) for key, value in state["averages"][name].items()}
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            self.gen.set_state(state["generator"])
            self.sums = {name: value.to(device) for name, value in state["sums"].items()}
            self.steps, self.seconds, self.log = state["steps"], state["seconds"], state["log"]

    def __iter__(self):
        stop = []  # where SIGTERM and Ctrl-C leave their number (handlers set below, undone by `after`), to save first
        self.started = time.time()  # of this process, or since the last checkpoint
        with contextlib.ExitStack() as after, tqdm(total=self.train["steps"], initial=self.steps, unit="step",
                                                   desc=self.folder.name) as self.bar:
            for number in (signal.SIGTERM, signal.SIGINT):
                after.callback(signal.signal, number, signal.signal(number, lambda number, _: stop.append(number)))
            while self.steps < self.train["steps"]:
                yield self.batch()  # the stage calls self.step, which counts
                ends = stop and RANK == 0  # the first process saves and ends; the others end with it
                if ends or time.time() - self.started > 60:
                    self.checkpoint()
                if ends:
                    print(f"\nstopped at step {self.steps}; continue with --resume", file=sys.stderr)
                    raise SystemExit(128 + stop[-1])
        self.checkpoint()

    def batch(self):
        """Random training data, this process's part: images as floats, mirrored at random if `flip`."""
        if self.train["dropout"]:  # its global generators, of every device, start anew in each step
            torch.manual_seed((self.train["seed"] * 2**24 + self.steps) * RANKS + RANK)
        x = self.data[self.draw(lambda count, **how: torch.randint(len(self.data), (count,), **how))]
        x = (to_float(x) if x.dtype == torch.uint8 else x).contiguous(memory_format=torch.channels_last)
        if self.flip:
            x = torch.where(self.draw(torch.rand, 1, 1, 1) < 0.5, x.flip(3), x)
        return x

    def draw(self, random, *shape):
        """Draws (B, *shape) of `random`, called like torch.randn, the same whatever the number of processes."""
        whole = random(self.train["batch"], *shape, generator=self.gen, device=self.device)
        return whole.chunk(RANKS)[RANK]  # this process's part

    def step(self, loss, terms, watch=lambda: {}):
        """One step of every optimiser down the mean of `loss` (B,). The log gets the means of `terms` {name: tensor}
        (or numbers) over the steps since its last row, and what `watch()` returns when a row is due."""
        train = self.train
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.mean().backward()
        for name, network in self.networks.items():
            average_over_ranks([p.grad for p in network.parameters()])
            nn.utils.clip_grad_norm_(network.parameters(), train[f"{name}_clip"] or math.inf)
        for rate, optimizer in self.optimizers.items():
            group, = optimizer.param_groups
            group["lr"] = learning_rate(train[rate], self.steps, train["steps"], train["warmup"], train["decay"])
            optimizer.step()
        self.steps += 1
        warm = (1 + self.steps) / (10 + self.steps)  # else a short run's average is its start: 0.9999^10000 = 0.37
        for name, network in self.networks.items():
            decay = min(train[f"{name}_ema"], warm)  # 0 copies
            torch._foreach_lerp_(list(self.averages[name].values()), list(network.state_dict().values()), 1 - decay)
        means = {name: torch.as_tensor(value, device=self.device).detach().mean() for name, value in terms.items()}
        average_over_ranks(list(means.values()))
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + mean
        if self.steps % self.every == 0:
            self.write_row(watch())
        self.bar.update()

    @torch.no_grad()
    def check_finite(self):
        """Exit naming what is not finite, before it is written anywhere."""
        weights = {f"weights of {name}": sum(p.sum() for p in network.parameters())
                   for name, network in self.networks.items()}
        bad = [name for name, value in (self.sums | weights).items() if not torch.isfinite(value)]
        if bad:
            fail(f"{self.folder.name}: {' and '.join(bad)} not finite by step {self.steps}; restart with a lower rate "
                 f"or look at the data (the last good checkpoint is in {self.folder})")

    def write_row(self, watched):
        """Add a row to the log: means since the last one, and what was watched. log.csv is a copy of all rows."""
        self.check_finite()
        means = {name: float(value) / self.every for name, value in self.sums.items()} | watched
        self.log.append({"step": self.steps, **means})
        self.sums = {}
        lines = [self.log[0].keys(), *(row.values() for row in self.log)]
        write(self.folder / "log.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())
        self.bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})

    def checkpoint(self):
        """All that is needed to go on to the same bits."""
        self.check_finite()
        now = time.time()
        self.seconds, self.started = self.seconds + now - self.started, now
        if RANK == 0:
            fid.save(self.folder / "checkpoint.pt", {
                "train": self.train, "finished": False, "steps": self.steps, "seconds": self.seconds, "log": self.log,
                "sums": self.sums, "generator": self.gen.get_state(), "averages": self.averages,
                "weights": {name: network.state_dict() for name, network in self.networks.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}})

    def finish(self, **parts):
        """The finished checkpoint, on the CPU: averaged weights by network, and `parts`, what a model needs beside."""
        if RANK == 0:
            state = {"train": self.train, "finished": True, "seconds": self.seconds, "log": self.log}
            fid.save(self.folder / "checkpoint.pt", state | self.averages | parts)
        wait_for_ranks()
        return load_checkpoint(self.folder / "checkpoint.pt")


def learning_rate(base, step, steps, warmup, decay):
    """Linear warm-up (over `warmup` steps, or that share of all if below 1), then linear decay to 0 or constant."""
    warmup = warmup * steps if warmup < 1 else warmup
    return base * min(1, (step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup) if decay else 1)


# ---- 10. Runs --------------------------------------------------------------------------------------------------------

def add_flags(parser, *priors):
    """The flags that all stages share, with the stage's priors over z, if any, of which the last is the default."""
    parser.error, parser.allow_abbrev = fail, False
    add = parser.add_argument
    add("--dataset", choices=(*fid.DATASETS, "folder"), default="shapes",
        help="default: %(default)s; all others read --data-dir")
    add("--data-dir", default="data",
        help="where cifar10/ or celeba/ lie (or are downloaded), or a folder of images (default: %(default)s)")
    add("--image-size", type=int, choices=(32, 64), default=64, help="for --dataset folder (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--budget", choices=("auto", "smoke", "cpu", "gpu", "paper"), default="auto",
        help="auto, the default: gpu with a GPU, else cpu")
    add("--steps", type=int, help="optimisation steps of each network, in place of the budget's")
    add("--batch-size", type=int, help="images per step, in place of the budget's")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--out", default="runs", help="folder for runs (default: %(default)s)")
    add("--resume", action="store_true", help="continue an unfinished run, if there is one")
    add("--sampler", choices=("ddpm", "ddim", "dpm"), help="headline sampler, in place of the budget's")
    add("--sample-steps", type=int, help="its number of steps, cut to the `start` of refinement")
    add("--temperature", type=float, help="factor of the noise sampling starts from: below 1 cleaner, less detail")
    add("--eval-samples", type=int, help="images generated for the headline scores, and at most for each other row")
    add("--export", type=int, metavar="N", help="write N samples as PNG files into the run's folder")
    add("--features", choices=("auto", "inception", "local"), default="auto",
        help="feature network of the scores; auto, the default: inception for gpu and paper on real images, else local")
    add("--weights", help="file of the feature network: Inception weights, or NAME-<hash8>.pt")
    add("--compile", action="store_true", help="torch.compile the networks for training, on a GPU (slower on a CPU)")
    add("--dry-run", action="store_true", help="print settings and network sizes as JSON, and stop")
    if priors:
        add("--prior", choices=priors, default=priors[-1], help="over z, of the headline row (default: %(default)s)")


def read_settings(args):
    """Check the shared flags and resolve what is `auto`. Returns train settings, evaluation settings, device."""
    sys.excepthook = fid.end_in_a_line
    device = choose_device(args.device)
    name = args.budget if args.budget != "auto" else "gpu" if device.type == "cuda" else "cpu"
    size = {"shapes": 32, "cifar10": 32, "celeba64": 64}.get(args.dataset, args.image_size)
    train, evaluation = budget(name, args.dataset, size)
    for flag, low, high in (("steps", 1, 10**9), ("batch_size", 1, 10**5), ("seed", 0, 2**31), ("temperature", 0, 2),
                            ("sample_steps", 1, 1000), ("eval_samples", 40, 10**6), ("export", 1, 10**6)):
        if (value := vars(args)[flag]) is not None and not low <= value <= high:
            fail(f"--{flag.replace('_', '-')} {value}: must lie between {low} and {high}")
    for settings, given in ((train, {"steps": args.steps, "batch": args.batch_size, "compile": args.compile}),
                            (evaluation, {"sampler": args.sampler, "sample_steps": args.sample_steps,
                                          "count": args.eval_samples, "temperature": args.temperature})):
        settings |= {key: value for key, value in given.items() if value is not None}
    train |= {"dataset": args.dataset, "image_size": size, "budget": name, "seed": args.seed}
    inception = name in ("gpu", "paper") and args.dataset != "shapes"
    evaluation["grid_count"] = min(evaluation["grid_count"], evaluation["count"])
    evaluation["features"] = ("inception" if inception else "local") if args.features == "auto" else args.features
    evaluation["prior"] = vars(args).get("prior", "none")
    return train, evaluation, device


def print_settings(train, evaluation, networks):
    """What --dry-run shows: one JSON object."""
    print(json.dumps({"settings": {"train": train, "eval": evaluation}, "networks": networks}, indent=1))


class Setup:
    """What a command works with. Making it tries what can fail before any training: processes, features, the data."""

    def __init__(self, args, train, evaluation, device):
        keep_freed_memory()
        self.device = join_ranks(device, train["batch"])
        if RANK > 0:
            wait_for_ranks()  # the first process downloads and decodes for all
        self.extractor = fid.load_extractor(evaluation["features"], args.dataset, args.weights, self.device,
                                            args.data_dir)
        self.fd = "fd_local" if self.extractor.suffix else "fid"  # the name of the Frechet distance
        self.data, self.test = (load_images(args.dataset, split, args.data_dir, train["image_size"])
                                for split in ("train", "test"))
        if RANK == 0:
            wait_for_ranks()
        self.cache = Path("data" if args.dataset in ("shapes", "folder") else args.data_dir) / "cache"
        self.train = train | {"crop": self.data.crop, "n_train": len(self.data.images), "data_note": self.data.note}
        if args.dataset == "folder":  # another folder of the same name is other data
            self.train["data_dir"] = str(Path(args.data_dir).resolve())
        self.evaluation = evaluation | {"features": self.extractor.name}
        self.home = Path(args.out) / f"{self.data.name}-{train['budget']}"  # the folder of the runs

    @functools.cached_property
    def reference(self):
        """What the scores compare with: the training split's features, cached beside the data."""
        return fid.reference(self.extractor, self.data, self.test, self.cache)


def first_difference(old, new):
    """The first key in which two settings differ, with both values, or None."""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return f"{keys[0]} was {old.get(keys[0])}, is now {new.get(keys[0])}" if keys else None


def save_as(path, save, **options):
    """Write what `save(file, **options)` saves, atomically: a picture's .save, a figure's .savefig, np.savez."""
    buffer = io.BytesIO()
    save(buffer, **options)
    write(path, buffer.getvalue())


def write_json(path, data):
    """Write `data` as JSON, atomically; ValueError if a number in it is not finite."""
    write(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def trained(folder, train, resume, begin):
    """The finished checkpoint of a run: the one in its folder, if there is one, else what `begin(state)` returns, a
    stage's training, from scratch (state None) or from an unfinished checkpoint, which needs --resume. Exits naming a
    setting that differs."""
    checkpoint = Path(folder) / "checkpoint.pt"
    if not checkpoint.is_file():
        write_json(Path(folder) / "config.json", {"train": train})  # to be looked up
        (Path(folder) / "metrics.json").unlink(missing_ok=True)  # of weights that are gone
        if resume:
            print(f"nothing to resume in {folder}: it starts at step 0")
        return begin(None)
    state = load_checkpoint(checkpoint)
    if difference := first_difference(state["train"], train):
        fail(f"{folder} holds a run with other settings ({difference}); choose another --out or remove it")
    if not resume and not state["finished"]:
        fail(f"{folder} holds an unfinished run; add --resume to continue it, or remove the folder")
    return state if state["finished"] else begin(state)


def load_checkpoint(path):
    """Load a checkpoint onto the CPU; exits with one line if it is damaged. `weights_only`: it cannot run code."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums that torch.save wrote
            if archive.testzip():
                raise ValueError(f"wrong checksum of {archive.testzip()}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"train", "finished"} <= state.keys():
            raise ValueError("a file of another kind")
        return state
    except FileNotFoundError:
        fail(f"{path}: no such checkpoint")
    except Exception as error:  # torch.load raises many kinds
        reason = str(error).split("\n")[0][:80]
        fail(f"{path}: damaged or not a checkpoint ({type(error).__name__}: {reason}); remove it to train again")


def read_metrics(path, evaluation=None):
    """An earlier evaluation (with these settings, if given), or None: there is none, a damaged one, another schema."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        metrics = json.loads(Path(path).read_text())
        if metrics["schema"] == 1 and metrics["rows"] and evaluation in (None, metrics["run"]["eval"]):
            return metrics
    return None


# ---- 11. Evaluation --------------------------------------------------------------------------------------------------

NOISE = {"clean": 0.0, "noise 0.1": 0.1, "noise 0.2": 0.2, "noise 0.4": 0.4}  # sd; images span [-1, 1]


def mean_score(values):
    """The mean of values (N,) as a score dictionary, with a 95% interval over them."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half}


def high_frequency_power(images):
    """Mean power of the grey image above 1/4 cycle per pixel, under a Hann window: uint8 (N, 3, H, W) -> (N,)."""
    grey = images.float().mean(1)  # (N, H, W)
    size = grey.shape[-1]
    window = torch.hann_window(size, periodic=False, device=grey.device)
    spectrum = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window)
    frequency = torch.fft.fftfreq(size, device=grey.device)  # cycles per pixel
    return spectrum.abs().square()[:, torch.hypot(frequency[:, None], frequency) > 0.25].mean(1)


def hf_energy(images, real):
    """Sharpness (1: as real), a score: high-frequency power of `images` over that of `real`, uint8 (N, 3, H, W)."""
    return mean_score(high_frequency_power(images) / high_frequency_power(real).mean())


def psnr_db(images, real):
    """Mean peak signal-to-noise ratio of uint8 images (N, 3, H, W), in decibels."""
    return float(-10 * (images.float() - real.float()).div(255).square().mean((1, 2, 3)).log10().mean())


def measure(model, setup, prior, sampler, steps, count, damage):
    """Draw `count` images and score them: one row of metrics.json, and the images before and after refinement."""
    x_hat, images, seconds = generate(model, count, prior, sampler, steps, setup.train["seed"],
                                      setup.evaluation["batch"], damage)
    row = {"prior": prior, "sampler": sampler, "nfe": min(steps, model.diffusion.start), "n_generated": count,
           "seconds_per_image": seconds} | fid.scores(setup.extractor, images, setup.reference)
    return row | {"hf_energy": hf_energy(images, setup.test.images)}, x_hat, images


def evaluate(folder, setup, state, model, cost, more=lambda model: {}):
    """The metrics of a finished run: read if its folder holds them for these settings and this training, which its
    seconds tell, else measured and written, with figures. `model` is that of the checkpoint `state`, `cost` its
    network_cost; `more` gives its stage's own tables."""
    metrics = read_metrics(folder / "metrics.json", setup.evaluation)
    if metrics is not None and metrics["run"]["train_seconds"] == state["seconds"]:
        return metrics
    train, data = state["train"], setup.data
    model = dataclasses.replace(model, temperature=setup.evaluation["temperature"])
    rows, tables = measure_samples(folder, model, setup)
    if model.vae is not None:
        tables |= measure_vae(folder, model, setup)
        for table in (tables["latent"], tables.get("start")):
            if table and train["budget"] != "smoke":  # its few steps tell nothing
                print(f"{folder.name}: {table['verdict']}")
    if model.condition is not None and model.decode is None:
        tables["bits_per_dim"] = bits_per_dim(model, rows[0]["prior"], setup)
    tables["training"] = draw_training(folder, state["log"])
    tables |= more(model)
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                cwd=Path(__file__).parent).stdout.strip()
    hardware = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    variant = folder.name.removesuffix(f"-s{train['seed']}")
    run = {"dataset": data.name, "crop": data.crop, "data_note": data.note, "variant": variant,
           "budget": train["budget"], "seed": train["seed"], "features": setup.extractor.name,
           "n_real": len(data.images), "parameters": sum(part["parameters"] for part in cost.values()),
           "gflops": sum(part["gflops"] for part in cost.values()),
           "train_images": train["steps"] * train["batch"], "train_seconds": state["seconds"],
           "device": f"{model.device.type} ({hardware}, {torch.get_num_threads()} threads)",
           "commit": commit or "unknown", "torch": torch.__version__, "eval": setup.evaluation}
    metrics = {"schema": 1, "run": run, "rows": rows, "tables": tables}
    write_json(folder / "metrics.json", metrics)
    return metrics


def headline(model, evaluation):
    """Prior, sampler and steps of a model's headline row, of its samples.png and of what it exports."""
    prior = evaluation["prior"] if model.vae is not None else "none"
    return prior, *(("none", 0) if model.condition is None else (evaluation["sampler"], evaluation["sample_steps"]))


def export(args, folder, state, model, evaluation):
    """--export N: the first N samples as FOLDER/samples/00000.png, ..., and below samples-vae what a refiner was shown.
    The first are the images of the headline row. Batches whose files are all there are not drawn again: an export that
    was killed goes on, a larger one adds to a smaller. Samples of other settings or of another training are refused."""
    if args.export is None:
        return
    model, how = dataclasses.replace(model, temperature=evaluation["temperature"]), headline(model, evaluation)
    settings = dict(zip(("prior", "sampler", "steps"), how, strict=True)) | {
        "temperature": evaluation["temperature"], "batch": evaluation["batch"], "seed": args.seed,
        "train_seconds": state["seconds"]}  # tells one training from another
    both = model.vae is not None and model.condition is not None
    places = [folder / name for name in (("samples", "samples-vae") if both else ("samples",))]
    for note in (place / "settings.json" for place in places):
        if note.is_file() and (difference := first_difference(json.loads(note.read_text()), settings)):
            fail(f"{note.parent} holds other samples ({difference}); choose another --out or remove that folder")
        write_json(note, settings)
    share = evaluation["batch"] * RANKS  # a batch for each process
    for first in tqdm(range(0, args.export, share), desc=f"{folder.name}: samples", unit="batch"):
        names = [f"{k:05}.png" for k in range(first, min(first + share, args.export))]
        if not all((place / name).is_file() for place in places for name in names):
            x_hat, images, _ = generate(model, len(names), *how, args.seed, evaluation["batch"], first=first)
            for place, part in zip(places, (images, x_hat), strict=False):
                for name, image in zip(names, part, strict=True):
                    save_as(place / name, Image.fromarray(image.permute(1, 2, 0).numpy()).save, format="png")
    wait_for_ranks()  # the first process has written all
    print(*places, sep="\n")


def measure_samples(folder, model, setup):
    """Rows and tables of samples: every prior (the headline first), every number of steps, noise; with pictures."""
    evaluation, tables = setup.evaluation, {}
    draw = functools.lru_cache(8)(functools.partial(measure, model, setup))  # the noise's clean row is in the grid too
    prior, sampler, steps = headline(model, evaluation)
    row, x_hat, images = draw(prior, sampler, steps, evaluation["count"], 0.0)
    both = model.vae is not None and model.condition is not None
    draw_samples(folder, {"VAE": x_hat, "refined": images} if both else {model.name: images})
    if both:
        tables["before_refinement"] = fid.scores(setup.extractor, x_hat, setup.reference) | {
            "hf_energy": hf_energy(x_hat, setup.test.images)}
    others = evaluation["count" if model.condition is None else "grid_count"]
    rows = [row, *(draw(name, sampler, steps, others, 0.0)[0] for name in model.priors if name != prior)]
    if model.condition is not None:
        pictures = {}
        for name, n in evaluation["grid"]:
            row, _, images = draw(prior, name, n, evaluation["grid_count"], 0.0)
            rows.append(row)
            pictures[f"{name} {n}"] = images[:12]
        save_grid(folder / "steps.png", pictures)
    if model.vae is not None or model.decode is not None:
        tables["robustness"] = robustness(folder, draw, prior, evaluation, setup.fd, model.condition is not None)
    return rows, tables


def robustness(folder, draw, prior, evaluation, fd, refined):
    """Refine VAE outputs with noise on them, or decode latents with noise (same z, same noise of x_start). The area is
    the mean of score / clean score over noise sd 0 to 0.4: 1 means unharmed. Writes robustness.png."""
    sampler, steps = ("dpm", evaluation["probe_steps"]) if refined else ("none", 0)
    scores, pictures = {}, {}
    for name, sd in NOISE.items():
        row, x_hat, images = draw(prior, sampler, steps, evaluation["grid_count"], sd)
        scores[name] = {fd: row[fd], "hf_energy": row["hf_energy"]}
        pictures |= {name: x_hat[:12]} if prior != "none" else {}
        pictures |= {f"{name}, refined": images[:12]} if refined else {}
    save_grid(folder / "robustness.png", pictures)
    ratio = torch.tensor([score[fd]["value"] for score in scores.values()])
    area = float(torch.trapezoid(ratio / ratio[0], torch.tensor(list(NOISE.values()))) / 0.4)
    return {"nfe": steps, "scores": scores, "area": area}


def measure_vae(folder, model, setup):
    """Tables of a VAE, with the refiner behind it (DPM-Solver++ in as many steps as the headline has, of whatever
    sampler): held-out reconstructions, the latent, the priors' fit."""
    test, seed = setup.test.images, setup.train["seed"]
    mu, logvar = encode(model.vae, test, model.device)
    z = reparameterise(mu, logvar, randn(mu.shape, generator(70_000 + seed)))
    few = min(1000, setup.evaluation["grid_count"])
    real, mu, logvar = test[:few], mu[:few].to(model.device), logvar[:few].to(model.device)
    with torch.no_grad():
        x_hat = model.vae.decoder(mu)
        refined = refine(model, x_hat, mu, generator(50_000 + seed), "dpm", setup.evaluation["sample_steps"])
    x_hat, refined = to_uint8(x_hat).cpu(), to_uint8(refined).cpu()
    parts, begin = {"real": real, "VAE": x_hat}, {}
    if model.condition is not None:
        parts, begin = parts | {"refined": refined}, {"start": check_start(model.diffusion, x_hat, real)}
    save_grid(folder / "reconstructions.png", {label: part[:12] for label, part in parts.items()})
    sharp = hf_energy(x_hat, test)
    table = {"psnr_db": psnr_db(x_hat, real), "kl_nats": float(gaussian_kl(mu, logvar).mean()),
             "hf_energy_vae": sharp, "hf_energy_refined": hf_energy(refined, test)}
    if setup.test.labels is not None and setup.extractor.name.startswith(f"local-{setup.test.name}-"):  # its classes
        for name, images in (("vae", x_hat), ("refined", refined)):
            told = fid.extract(setup.extractor, images)[1].argmax(1)
            table[f"class_kept_{name}"] = float((told == setup.test.labels[: len(real)]).float().mean())
    return {"reconstruction": table, "latent": diagnose(mu, logvar, sharp["value"]), **begin,
            "prior_log_density": {name: mean_score(p.log_prob(z)) for name, p in model.priors.items()}}


def diagnose(mu, logvar, sharpness):
    """Are outputs smooth because the latent is unused, or underfitted, or because a Gaussian decoder averages?"""
    active = int(active_units(mu).sum())
    variance = float(logvar.exp().mean())
    if active < 0.05 * mu.shape[1]:
        text = "almost no latent unit is active (posterior collapse): lower beta or train longer"
    elif variance > 0.9:
        text = "posterior variance is close to the prior's: most units carry little; train longer or lower beta"
    elif sharpness < 0.5:
        text = "the latent is in use; outputs are smooth: a Gaussian decoder averages what z does not hold (yet)"
    else:
        text = "the latent is in use and outputs are not overly smooth"
    return {"active_units": active, "latent_dim": mu.shape[1], "posterior_variance": variance, "verdict": text}


def check_start(diffusion, x_hat, real):
    """Whether refinement begins early enough to mend what x_hat has wrong: the noise over the signal at its start
    should be six times or more the standard deviation of what x_hat, uint8 (N, 3, H, W), leaves of `real`."""
    residual_sd = float((to_float(real) - to_float(x_hat)).std())
    times = float(diffusion.noise[diffusion.start] / diffusion.signal[diffusion.start]) / residual_sd
    text = "early enough" if times >= 6 else "too late to mend it, 6 would do: train the VAE longer, or raise `start`"
    return {"start": diffusion.start, "residual_sd": residual_sd, "times": times, "verdict":
            f"refinement begins at t = {diffusion.start}, at {times:.1f} times the noise of the VAE's error: {text}"}


@torch.no_grad()
def bits_per_dim(model, prior, setup):
    """The valid bound in bits per dimension on held-out images, in parts: those of diffusion_nats
    given x_hat = Dec(z), z ~ q(z|x), plus log q(z|x) - log p(z) under the prior that is named."""
    evaluation, gen = setup.evaluation, generator(60_000 + setup.train["seed"], model.device)
    images = setup.test.images[: evaluation["bits_images"]].to(model.device)
    parts, x_hat, z = {}, None, None
    with autocast(model.device):
        if model.vae is not None:
            mu, logvar = model.vae.encoder(to_float(images))
            z = reparameterise(mu, logvar, randn(mu.shape, gen))
            x_hat = model.vae.decoder(z)
            parts["kl"] = gaussian_log_prob(z, mu, logvar).cpu() - model.priors[prior].log_prob(z.cpu()).cpu()
        denoise, draws = model.condition(x_hat, z), evaluation["bits_draws"]
        parts |= diffusion_nats(model.diffusion, denoise, images, x_hat, draws, gen)
    unit = images[0].numel() * math.log(2)
    return {"bound": mean_score(sum(parts.values()) / unit), "images": len(images), "latent_prior": prior,
            **{name: float((value / unit).mean()) for name, value in parts.items()}}


# ---- 12. Pictures ----------------------------------------------------------------------------------------------------

def save_grid(path, rows):
    """Save rows of uint8 images {label: (N, 3, H, W)} as one picture with the labels on the left."""
    size = next(iter(rows.values())).shape[-1]
    scale = max(1, 96 // size)
    margin, side = 8 + 7 * max(map(len, rows)), scale * size
    page = Image.new("RGB", (margin + max(map(len, rows.values())) * (side + 2), len(rows) * (side + 2)), "white")
    for i, (label, row) in enumerate(rows.items()):
        ImageDraw.Draw(page).text((4, i * (side + 2) + side // 2 - 6), label, fill="black")
        for j, image in enumerate(row):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            page.paste(tile.resize((side, side), Image.Resampling.NEAREST), (margin + j * (side + 2), i * (side + 2)))
    save_as(path, page.save, format="png")


def save_chart(path, panels):
    """Save line charts, three in a row (four: two by two). `panels`: dictionaries with title, x, y (axis names), lines
    {label: (xs, ys)} and perhaps `log_y`."""
    from matplotlib import ticker
    from matplotlib.figure import Figure
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, handles, colours = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained"), {}, {}
    for i, panel in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, i)
        for label, (xs, ys) in panel["lines"].items():
            colour = colours.setdefault(label, f"C{len(colours)}")  # the same in every panel
            handles[label], = axis.plot(xs, ys, colour, marker="o" if len(xs) < 30 else None)
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        if "log_y" in panel:  # plain numbers, not powers of ten
            axis.set_yscale("log")
            axis.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}",
                           minor_formatter=ticker.NullFormatter())
        else:
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))  # from zero, so that small differences look small
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    save_as(path, figure.savefig, format="png", dpi=110)


def draw_samples(folder, parts):
    """samples.png: the first 36 of `parts` {label: uint8 (N, 3, H, W)}, twelve a row, rows of all parts in turn."""
    save_grid(folder / "samples.png", {f"{label} {i}": images[12 * i : 12 * i + 12] for i in range(3)
                                       for label, images in parts.items() if len(images) > 12 * i})


def draw_training(folder, log):
    """Chart the log, a list of rows; returns the last row."""
    columns = {name: [row[name] for row in log] for name in log[0]}
    steps = columns.pop("step")
    save_chart(folder / "training.png", [{"title": f"{folder.name}: {name}", "x": "step", "y": name,
                                          "lines": {name: (steps, values)}} for name, values in columns.items()])
    return {name: value for name, value in log[-1].items() if name != "step"}


def show(score):
    """A score dictionary as text: value [low, high]."""
    interval = f" [{score['low']:.3g}, {score['high']:.3g}]" if score["low"] is not None else ""
    return f"{score['value']:.3g}{interval}"


def print_results(finished, setup):
    """Print the rows of all metrics, {folder: metrics}, as one table, and the paths of pictures and files."""
    suffix = setup.extractor.suffix
    scores = [setup.fd, *(name + suffix for name in ("floor", "is", "precision", "recall")), "hf_energy"]
    table = [["variant", "prior", "sampler", "images", "sec/image", *scores]]
    for metrics in finished.values():
        table += [[metrics["run"]["variant"], row["prior"], f"{row['sampler']} {row['nfe']}", str(row["n_generated"]),
                   f"{row['seconds_per_image']:.3g}", *(show(row[name]) for name in scores)] for row in metrics["rows"]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"\nfeatures: {setup.extractor.name}; data: {setup.data.name} ({setup.data.note}); intervals: 95%, "
          "resampling only, one run; compare scores of equally many images")
    for folder in finished:
        print("\n".join(str(path) for path in sorted(folder.glob("*.png")) + [folder / "metrics.json"]))
