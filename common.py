"""The ground that every stage stands on: the models (Part I, to be read) and the machinery (Part II, to be looked up).

Part I    1 diffusion, 2 networks, 3 priors over z, 4 a model: what a stage hands to sampling
Part II   5 the likelihood bound, 6 the built-in data, 7 files, 8 settings, 9 data sets, 10 devices and processes,
          11 training, 12 runs, 13 pictures

For stage 1, read Part I, the settings (section 8) and the class Training (section 11).

Conventions, used by every file:
    "As published" refers to DiffuseVAE (Pandey et al. 2022), which stage 1 replicates.
    Images `x0` are float32 tensors (B, 3, H, W) with values in [-1, 1]. Stored data, and all that fid.py scores, are
    uint8 tensors.
    `x_hat` is the coarse image that the VAE decodes from its code z, also in [-1, 1].
    Times `t` run from 1 to T. Time 0 is the clean image, so alpha_bar[0] = 1.
    Losses have the shape (B,), one value per image. A KL or a bound is in nats.
    Random draws come from generators that are seeded with --seed and a purpose. Only initial weights and dropout use
    torch's global generator, which is seeded just before them.
    Networks train and sample in float32 on a CPU, in bfloat16 on a GPU (`autocast`). Their outputs are float32.
"""

import atexit
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy.cluster.vq import kmeans2
from torch import distributed, nn
from tqdm import tqdm


def seed_of(seed, purpose):
    """A number below 2^56 that is another one for another seed or purpose, a text."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:7], "little")


def generator(seed, purpose, device="cpu"):
    """A torch.Generator on `device` for a purpose."""
    return torch.Generator(device).manual_seed(seed_of(seed, purpose))


def randn(shape, gen):
    """Standard normal draws of `shape`, on the device of the generator."""
    return torch.randn(shape, generator=gen, device=gen.device)


def to_float(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float (B, 3, H, W) in [-1, 1] -> uint8. Clamps, then rounds: truncating would darken by half a level."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ---- 1. Diffusion ----------------------------------------------------------------------------------------------------

class Diffusion:
    """The Gaussian diffusion process of DDPM (Ho et al. 2020): beta rises linearly from 1e-4 to 0.02 in T steps.

    `objective` is what the network predicts: `eps`, or `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0` (Salimans &
    Ho 2022). At high noise, x0 follows from eps by a division by a small number, which magnifies the network's errors.
    From v it follows without one. `start` is the time at which the reverse process begins: T, or a smaller one where an
    x_hat already shows roughly what x0 looks like. Only the times 1..start are trained and sampled."""

    def __init__(self, objective, T=1000, device="cpu", start=None):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        self.T = T
        self.objective = objective
        self.start = start or T
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])  # (T + 1,), [0] = 1
        self.x0_scale = self.alpha_bar.sqrt().float().to(device)  # (T + 1,), the factor of x0 in x_t
        self.eps_scale = (1 - self.alpha_bar).sqrt().float().to(device)  # (T + 1,), the factor of eps in x_t

    def scales(self, t):
        """t (B,) -> the factors of x0 and of eps in x_t, each (B, 1, 1, 1)."""
        return self.x0_scale[t][:, None, None, None], self.eps_scale[t][:, None, None, None]

    def q_sample(self, x0, t, eps):
        """Draw x_t ~ q(x_t | x0) = N(sqrt(alpha_bar) x0, 1 - alpha_bar), with `eps` as the noise (DDPM eq. 4)."""
        a, sigma = self.scales(t)
        return a * x0 + sigma * eps

    def draw_t(self, u):
        """Uniform random numbers u in [0, 1), (B,) -> training times, uniform on 1..start, (B,)."""
        return (self.start * u).long() + 1

    def x_start(self, x_hat, eps):
        """The noisy image from which the reverse process begins: x_hat (B, C, H, W) takes the place of x0. If the
        process begins at T this is `eps` alone, as published."""
        if self.start == self.T:
            return eps
        return self.x0_scale[self.start] * x_hat + self.eps_scale[self.start] * eps

    def target(self, x0, t, eps):
        """What the network is trained to predict at x_t."""
        a, sigma = self.scales(t)
        return eps if self.objective == "eps" else a * eps - sigma * x0

    def simple_loss(self, denoise, x0, t, eps):
        """Squared error of the network's prediction `denoise(x_t, t)`, mean over pixel values: (B,). (DDPM eq. 14, if
        the network predicts eps.)"""
        prediction = denoise(self.q_sample(x0, t, eps), t)  # (B, C, H, W)
        return ((prediction - self.target(x0, t, eps)) ** 2).flatten(1).mean(1)

    def to_x0_and_eps(self, prediction, x_t, t, clamp=True):
        """Solve the network's prediction at x_t for x0 and eps. `clamp` limits x0 to [-1, 1]; eps is computed from the
        clamped x0, so that both still add up to x_t."""
        a, sigma = self.scales(t)
        if self.objective == "eps":
            x0 = (x_t - sigma * prediction) / a  # from x_t = a x0 + sigma eps
        else:
            x0 = a * x_t - sigma * prediction  # a x_t - sigma v = (a^2 + sigma^2) x0 = x0
        x0 = x0.clamp(-1, 1) if clamp else x0
        return x0, (x_t - a * x0) / sigma

    def posterior(self, t, t_next):
        """q(x at t_next | x_t, x0), where t_next < t is the next time that sampling visits. It is a Gaussian with the
        mean x0_factor x0 + xt_factor x_t (DDPM eq. 6-7, if t_next = t - 1). Returns x0_factor, xt_factor and the
        variance, float64. The times are numbers or tensors (B,)."""
        bar_t = self.alpha_bar[t]
        bar_next = self.alpha_bar[t_next]
        added = 1 - bar_t / bar_next  # variance of the noise added from t_next to t; DDPM's beta_t if t_next = t - 1
        x0_factor = bar_next.sqrt() * added / (1 - bar_t)
        xt_factor = (bar_t / bar_next).sqrt() * (1 - bar_next) / (1 - bar_t)
        return x0_factor, xt_factor, added * (1 - bar_next) / (1 - bar_t)


def time_grid(start, steps):
    """The times that sampling in `steps` steps visits, in rising order: 0 = tau_0 < ... < tau_steps = start.

    tau_i = max(round(start (i / steps)^2), i). The square puts most steps at small times, where fine detail is decided.
    The maximum with i keeps the first times apart."""
    return [max(round(start * (i / steps) ** 2), i) for i in range(steps + 1)]


def dpm_step(diffusion, x, x0, t, t_next, previous):
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2). With x_t = a_t x0 + sigma_t eps and lambda =
    log(a / sigma),

        x_next    = sigma_next / sigma_t x_t + (a_next - a_t sigma_next / sigma_t) x0_middle
        x0_middle = x0 + (x0 - x0_before) / (2 r)
        r         = (lambda_t - lambda_before) / (lambda_next - lambda_t)

    x0 is the prediction at t, x0_before that of the step before; `previous` is (its time, x0_before), or None at first.
    With x0 in the place of x0_middle, this is a step of DDIM: exact, if the prediction stayed the same during the step.
    It does not, so the solver takes it at the middle of the step: the line through the last two predictions, as a
    function of lambda, is extended by half a step."""
    a_t = float(diffusion.alpha_bar[t].sqrt())
    a_next = float(diffusion.alpha_bar[t_next].sqrt())
    sigma_ratio = math.sqrt((1 - a_next**2) / (1 - a_t**2))
    if previous is not None and t_next > 0:  # lambda is infinite at time 0
        t_before, x0_before = previous
        bar = diffusion.alpha_bar[[t_before, t, t_next]]
        lambda_before, lambda_t, lambda_next = 0.5 * (bar / (1 - bar)).log()
        r = float((lambda_t - lambda_before) / (lambda_next - lambda_t))
        x0 = x0 + (x0 - x0_before) / (2 * r)
    return sigma_ratio * x + (a_next - a_t * sigma_ratio) * x0


@torch.no_grad()
def sample(diffusion, denoise, x, sampler, steps, gen=None, clamp=True):
    """Run the reverse process from x = x_start (B, C, H, W) to a clean image, calling `denoise(x, t) -> prediction`
    once in each of `steps` steps (at most `start`: there cannot be more steps than times).

    `sampler` is one of
        ddpm   random (DDPM, algorithm 2). The noise that each step adds comes from `gen`, a CPU generator.
        ddim   deterministic, of first order (Song et al. 2021, eq. 12 with sigma_t = 0)
        dpm    deterministic, of second order (DPM-Solver++)"""
    steps = min(steps, diffusion.start)
    previous = None  # (t, x0) of the step before, for dpm
    times = time_grid(diffusion.start, steps)
    for i in range(steps, 0, -1):
        t, t_next = times[i], times[i - 1]
        t_batch = torch.full((len(x),), t, device=x.device)  # (B,)
        x0, eps = diffusion.to_x0_and_eps(denoise(x, t_batch), x, t_batch, clamp)
        if sampler == "ddpm":  # the posterior's mean, and noise of its variance (which is 0 in the last step)
            x0_factor, xt_factor, variance = map(float, diffusion.posterior(t, t_next))
            x = x0_factor * x0 + xt_factor * x + math.sqrt(variance) * randn(x.shape, gen).to(x.device)
        elif sampler == "ddim":  # the same x0 and eps, mixed with the factors of t_next
            x = diffusion.q_sample(x0, torch.full_like(t_batch, t_next), eps)
        else:
            x = dpm_step(diffusion, x, x0, t, t_next, previous)
            previous = t, x0
    return x


# ---- 2. Networks -----------------------------------------------------------------------------------------------------

class BottleneckBlock(nn.Module):
    """The VAE's residual block (VDVAE, Child 2021, as DiffuseVAE uses it): (B, C, H, W) -> the same shape. Four
    convolutions with a GELU before each, half as many channels in between, and no normalisation. At resolution 1 all of
    a 3x3 window but its centre is padding, so the convolutions are 1x1."""

    def __init__(self, width, resolution=None):
        super().__init__()
        inner = width // 2
        kernel = 1 if resolution == 1 else 3
        shapes = [(width, inner, 1), (inner, inner, kernel), (inner, inner, kernel), (inner, width, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in shapes)
        for conv in self.convs:
            nn.init.zeros_(conv.bias)  # as in VDVAE's code

    def forward(self, x):
        h = x
        for conv in self.convs:
            h = conv(F.gelu(h))
        return x + h


def keep_variance(conv, fan_in):
    """Draw a layer's weights so that its output has its input's variance, which torch's own weights would shrink.
    `fan_in`: inputs that add up to an output."""
    nn.init.normal_(conv.weight, std=fan_in**-0.5)
    return conv


class Encoder(nn.Module):
    """x (B, 3, H, W) -> mean and log-variance of q(z | x), each (B, d).

    `table` lists (resolution, width, blocks of the encoder, blocks of the decoder) from the image down to resolution 1,
    whose width is d. Between two levels the resolution falls by a strided convolution or, if `pool`, as published, by
    average pooling and a 1x1 convolution. A strided convolution keeps positions. Average pooling down to 1x1 does not,
    and a short training does not learn to make up for it."""

    def __init__(self, table, pool):
        super().__init__()
        layers = [nn.Conv2d(3, table[0][1], 3, padding=1, bias=False)]
        for (resolution, width, blocks, _), (resolution_below, width_below, _, _) in itertools.pairwise(table):
            layers += [BottleneckBlock(width, resolution) for _ in range(blocks)]
            k = resolution // resolution_below
            if pool:
                layers += [nn.AvgPool2d(k), nn.Conv2d(width, width_below, 1, bias=False)]
            else:
                conv = nn.Conv2d(width, width_below, k, stride=k, bias=False)
                layers += [keep_variance(conv, fan_in=k * k * width)]
        _, d, blocks, _ = table[-1]
        layers += [BottleneckBlock(d, resolution=1) for _ in range(blocks)]
        self.body = nn.Sequential(*layers)
        self.mu = nn.Conv2d(d, d, 1, bias=False)
        self.logvar = nn.Conv2d(d, d, 1, bias=False)

    def forward(self, x):
        h = self.body(x)  # (B, d, 1, 1)
        return self.mu(h).flatten(1).float(), self.logvar(h).flatten(1).float()


class Decoder(nn.Module):
    """z (B, d) -> x_hat (B, 3, H, W) in [-1, 1]. The encoder's mirror image, from the last row of `table` to the first.
    Between two levels there is a transposed convolution or, if `pool`, as published, nearest upsampling and a 1x1
    convolution."""

    def __init__(self, table, pool):
        super().__init__()
        layers = []
        for (resolution, width, _, blocks), (resolution_above, width_above, _, _) in itertools.pairwise(table[::-1]):
            layers += [BottleneckBlock(width, resolution) for _ in range(blocks)]
            k = resolution_above // resolution
            if pool:
                layers += [nn.Upsample(scale_factor=k), nn.Conv2d(width, width_above, 1, bias=False)]
            else:
                conv = nn.ConvTranspose2d(width, width_above, k, stride=k, bias=False)
                layers += [keep_variance(conv, fan_in=width)]  # each output pixel comes from one input pixel
        resolution, width, _, blocks = table[0]
        layers += [BottleneckBlock(width, resolution) for _ in range(blocks)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z):
        pixels = torch.sigmoid(self.body(z[:, :, None, None]).float())  # (B, 3, H, W) in [0, 1], as published
        return 2 * pixels - 1


class VAE(nn.Module):
    """The bottleneck-residual VAE of DiffuseVAE (Pandey et al. 2022); its code z is a vector, (B, d)."""

    def __init__(self, table, pool):
        super().__init__()
        self.encoder = Encoder(table, pool)
        self.decoder = Decoder(table, pool)
        self.latent_dim = table[-1][1]

    def forward(self, x0, noise):
        """x0 (B, 3, H, W), noise (B, d) standard normal -> x_hat, mu, logvar."""
        mu, logvar = self.encoder(x0)
        return self.decoder(reparameterise(mu, logvar, noise)), mu, logvar


def reparameterise(mu, logvar, noise):
    """z ~ N(mu, exp(logvar)), computed from standard normal noise so that gradients reach mu and logvar (Kingma &
    Welling 2014, 2.4). All (B, d)."""
    return mu + (0.5 * logvar).exp() * noise


def squared_error(x_hat, x0):
    """Sum of squared differences of two images (B, 3, H, W) in [-1, 1], in units of images in [0, 1]: (B,). (Squares
    are four times as large in the wider range.)"""
    return ((x_hat - x0) ** 2).flatten(1).sum(1) / 4


def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)) of each image: (B,) nats."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with 32 groups as published, or fewer in narrow layers, so that a group has at least four channels:
    widths 128, 96 and 48 have 32, 8 and 4 groups."""

    def __init__(self, width):
        super().__init__(math.gcd(32, width // 4), width)


def zero_init(module):
    """Set a layer's parameters to zero. If it is the last one of a block, the block adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """The U-Net's block (DDPM): GroupNorm, SiLU, 3x3 convolution, twice, with the time embedding added in between.
    x (B, width_in, H, W), emb (B, emb_dim) -> (B, width_out, H, W). `emb` has been through a SiLU already."""

    def __init__(self, width_in, width_out, emb_dim, dropout):
        super().__init__()
        self.norm1 = GroupNorm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, width_out)
        self.norm2 = GroupNorm(width_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(width_out, width_out, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    """Self-attention over all positions: (B, C, H, W) -> the same shape. The output projection starts at zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, GroupNorm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zero_init(nn.Conv2d(width, width, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x))  # (B, 3 C, H, W)
        qkv = qkv.reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)  # (B, 3, heads, H W, C / heads)
        q, k, v = qkv.unbind(1)  # each (B, heads, H W, C / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        return x + self.out(y)


class UNet(nn.Module):
    """The U-Net of DDPM: x (B, in_channels, H, W), t (B,) in 1..T -> (B, out_channels, H, W), zero before training.

    `table` lists (resolution, width, blocks on the way down, blocks on the way up), from the image down. With
    [(32, 32, 1, 1), (16, 64, 1, 1)], and ---> for a feature map that is joined to a block's input later:

        stem                                                               block --> out
            block (32 wide) -------------------------------------------->
                halve                                             double
                    block (64 wide) ---------------------->  block
                                   block, attention, block

    A level keeps its input and the output of each of its blocks, and on the way up each block takes the map that was
    kept last. In DDPM each level has one more block up than down, so all maps are taken: (32, 128, 2, 3). Our small
    networks save some of those blocks. `attention` lists the resolutions that have self-attention beside the middle.
    `extra` (B, 4 * first width), if given, is added to the time embedding; stage 3 uses it. To double the resolution, a
    convolution follows nearest upsampling, as published, if `pool`; else it comes before, at a quarter of the work."""

    def __init__(self, table, in_channels, out_channels=3, attention=(16,), heads=1, dropout=0.0, pool=True):
        super().__init__()
        first_width = table[0][1]
        self.frequency_count = first_width // 2  # the time embedding has a sine and a cosine for each
        emb_dim = 4 * first_width  # as in DDPM
        self.time = nn.Sequential(nn.Linear(first_width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.stem = nn.Conv2d(in_channels, first_width, 3, padding=1)

        def block(width_in, width_out, resolution):
            return nn.ModuleList([ResidualBlock(width_in, width_out, emb_dim, dropout),
                                  Attention(width_out, heads) if resolution in attention else nn.Identity()])

        # The way down. `here` is the width at the place that we have reached, kept_widths those of the maps kept.
        here, kept_widths = first_width, []
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        for resolution, width, down_blocks, _ in table:
            kept_widths.append([here])
            self.down.append(nn.ModuleList())
            for _ in range(down_blocks):
                self.down[-1].append(block(here, width, resolution))
                here = width
                kept_widths[-1].append(here)
            lowest = resolution == table[-1][0]
            self.shrink.append(nn.Identity() if lowest else nn.Conv2d(here, here, 3, stride=2, padding=1))
        self.middle = nn.ModuleList([ResidualBlock(here, here, emb_dim, dropout), Attention(here, heads),
                                     ResidualBlock(here, here, emb_dim, dropout)])

        # The way up, from the lowest level to the highest.
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for resolution, width, _, up_blocks in reversed(table):
            widths = kept_widths.pop()
            self.up.append(nn.ModuleList())
            for _ in range(up_blocks):
                self.up[-1].append(block(here + widths.pop(), width, resolution))
                here = width
            highest = resolution == table[0][0]
            double = nn.Upsample(scale_factor=2)
            conv = nn.Conv2d(here, here, 3, padding=1)
            grow = [double, conv] if pool else [conv, double]
            self.grow.append(nn.Identity() if highest else nn.Sequential(*grow))
        self.norm = GroupNorm(here)
        self.out = zero_init(nn.Conv2d(here, out_channels, 3, padding=1))

    def forward(self, x, t, extra=None):
        # The time as sines and cosines of many frequencies, from 1 down towards 1/10,000 (Vaswani et al. 2017, 3.5)
        exponent = torch.arange(self.frequency_count, device=x.device) / self.frequency_count
        angle = t[:, None].float() * torch.exp(-math.log(10_000) * exponent)  # (B, frequency_count)
        emb = self.time(torch.cat([angle.cos(), angle.sin()], 1))  # (B, 4 * first width)
        emb = F.silu(emb if extra is None else emb + extra)
        h, kept = self.stem(x), []  # kept: for each level a list of feature maps
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            kept.append([h])
            for residual, attention in blocks:
                h = attention(residual(h, emb))
                kept[-1].append(h)
            h = shrink(h)
        residual1, attention, residual2 = self.middle
        h = residual2(attention(residual1(h, emb)), emb)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            maps = kept.pop()
            for residual, attention in blocks:
                h = attention(residual(torch.cat([h, maps.pop()], 1), emb))
            h = grow(h)
        return self.out(F.silu(self.norm(h))).float()


def build_vae(settings):
    """The VAE of `settings`, a dictionary (section 8)."""
    return VAE(settings["vae_table"], settings["pool"])


def build_unet(settings, in_channels):
    """The U-Net of `settings`. Its input is x_t (3 channels), followed by what conditions it."""
    return UNet(settings["unet_table"], in_channels, attention=settings["attention"], heads=settings["heads"],
                dropout=settings["dropout"], pool=settings["pool"])


def frozen(network, weights, device):
    """Load weights into a network; put it on the device, in evaluation mode and without gradients. Returns it."""
    network.load_state_dict(weights)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ---- 3. Priors over z ------------------------------------------------------------------------------------------------

class GaussianMixture:
    """A Gaussian mixture, fitted after the VAE is trained ("ex post") by expectation maximisation (EM; Bishop 2006,
    9.2.2). As published, each of K components has a covariance of its own. If they are `tied`, all share one; then
    thousands can be fitted. Attributes, float32 on the CPU:
        weights (K,)
        means   (K, d)
        factors (K, d, d) or, if tied, (1, d, d): the lower Cholesky factors of the covariances"""

    def __init__(self, weights, means, factors):
        self.weights = weights.float()
        self.means = means.float()
        self.factors = factors.float()

    @classmethod
    def standard_normal(cls, d):
        """N(0, I), a mixture of one: what the KL term of the VAE's loss pulls codes towards."""
        return cls(torch.ones(1), torch.zeros(1, d), torch.eye(d)[None])

    @classmethod
    def fit(cls, z, components, seed, tied=False, rounds=3):
        """The mixture fitted to codes z (N, d), N much larger than `components`, by `rounds` of EM. It begins with
        clusters, and with the covariance of the codes about the mean of their cluster."""
        z = z[torch.randperm(len(z), generator=generator(seed, "mixture"))]
        if tied:  # random codes, since k-means would take minutes for thousands of clusters
            means = z[:components]
        else:  # k-means on a part of the codes, which is enough to begin with
            means = torch.from_numpy(kmeans2(z[:10_000].numpy(), components, minit="++", rng=seed)[0])
        nearest = torch.cat([torch.cdist(part, means).argmin(1) for part in z.split(1000)])  # (N,)
        covariance = (z - means[nearest]).T.cov()  # (d, d); cov wants a row for each dimension
        mixture = cls(torch.full((components,), 1 / components), means, cls.factors_of(covariance[None]))
        for _ in tqdm(range(rounds), desc=f"fitting {components:,} Gaussians", unit="round", leave=False):
            mixture = mixture.em_round(z, tied)
        return mixture

    @staticmethod
    def factors_of(covariances):
        """The lower Cholesky factors of covariances (K, d, d). A ridge of 0.001 I is added, so that they can be
        inverted even where a component has hardly any z."""
        return torch.linalg.cholesky(covariances + 1e-3 * torch.eye(covariances.shape[1]))

    def em_round(self, z, tied):
        """One round of EM on z (N, d): the mixture that follows this one."""
        K, d = self.means.shape

        # E step: the sums over all z that the M step needs, each z weighted by how much it belongs to a component.
        mass = torch.full((K,), 1e-9)  # positive so that it can be divided by
        sums = torch.zeros(K, d)  # of z
        products = torch.zeros(1 if tied else K, d, d)  # of z z^T
        for part in z.split(1000):  # n at a time
            belongs = self.log_joint(part).softmax(1)  # (n, K), rows add up to 1
            mass = mass + belongs.sum(0)
            sums = sums + belongs.T @ part
            if tied:  # summed over all components: sum_k belongs_k z z^T = z z^T, since each row adds up to 1
                products[0] += part.T @ part
            else:
                products += torch.einsum("nk,ni,nj->kij", belongs, part, part)

        # M step: new weights, means and covariances. A covariance is E[z z^T] - mean mean^T. If it is shared, it is
        # 1/N sum_n z z^T - 1/N sum_k mass_k mean_k mean_k^T, where mass_k mean_k = sums_k.
        means = sums / mass[:, None]
        if tied:
            covariances = ((products[0] - sums.T @ means) / len(z))[None]
        else:
            covariances = products / mass[:, None, None] - means[:, :, None] * means[:, None]
        return GaussianMixture(mass / mass.sum(), means, self.factors_of(covariances))

    def log_joint(self, z):
        """log(weight_k N(z; mean_k, covariance_k)) for z (n, d) and all k: (n, K). With a covariance's factor L it is
            log weight_k - log det L - 1/2 |L^-1 z - L^-1 mean_k|^2 - d/2 log(2 pi)"""
        K, d = self.means.shape
        groups = len(self.factors)  # number of covariances: K groups of one mean or, if tied, one group of K means
        inverse = torch.linalg.solve_triangular(self.factors, torch.eye(d), upper=False)  # L^-1, (groups, d, d)
        means = self.means.view(groups, K // groups, d) @ inverse.mT  # L^-1 mean_k, (groups, K / groups, d)
        square = torch.cdist(z @ inverse.mT, means) ** 2  # (groups, n, K / groups)
        log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)  # (groups,)
        square = square.movedim(0, 1).flatten(1)  # (n, K)
        return self.weights.log() - log_det - 0.5 * d * math.log(2 * math.pi) - 0.5 * square

    def log_prob(self, z):
        """Log density: (N, d) -> (N,) nats."""
        return torch.cat([self.log_joint(part).logsumexp(1) for part in z.cpu().split(1000)])

    def sample(self, count, gen):
        """`count` draws (count, d) from a CPU generator."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=gen)  # a component for each draw
        noise = torch.randn(count, self.means.shape[1], 1, generator=gen)
        factors = self.factors[k] if len(self.factors) > 1 else self.factors  # (count, d, d) or (1, d, d)
        return self.means[k] + (factors @ noise)[:, :, 0]


# ---- 4. A model: draw z, decode it to x_hat, add noise (x_start), refine ---------------------------------------------

@dataclass
class Model:
    """What every stage hands to sampling and evaluation: a VAE, a diffusion model, or both."""

    device: torch.device
    shape: tuple  # (C, H, W) of what is diffused
    networks: tuple = ()  # all that it consists of: their parameters are counted
    vae: VAE | None = None
    priors: dict = field(default_factory=dict)  # over z, by name; each has sample(count, gen) and log_prob(z)
    diffusion: Diffusion | None = None  # none in a VAE alone
    # denoiser(x_hat, z), called for each batch, returns the denoise(x, t) of `sample`. (Only stage 3 uses z.)
    denoiser: Callable | None = None
    decode: Callable | None = None  # from latents to images, if it is latents that are diffused (bonus_latent.py)
    evaluations: int = 1  # how many networks run in each sampling step


def load_vae(checkpoint, device):
    """The VAE of a checkpoint, and the priors over its codes: N(0, I), and the mixture that was fitted to them."""
    vae = frozen(build_vae(checkpoint["settings"]), checkpoint["vae"], device)
    return vae, {"gaussian": GaussianMixture.standard_normal(vae.latent_dim),
                 "gmm": GaussianMixture(**checkpoint["gmm"])}


@torch.no_grad()
def encode(encoder, images, device, batch=100):
    """uint8 images (N, 3, H, W) -> mu, logvar of q(z | x), each (N, d) on the CPU."""
    parts = [encoder(to_float(part.to(device))) for part in images.split(batch)]
    mu, logvar = zip(*parts, strict=True)
    return torch.cat(mu).cpu(), torch.cat(logvar).cpu()


def draw_codes(vae, images, seed, device):
    """Codes z ~ q(z | x) of the training images, (N, d) on the CPU, to which priors are fitted: about 30,000, but at
    most ten of each image."""
    mu, logvar = encode(vae.encoder, images, device)
    gen = generator(seed, "codes of training images")
    draws = max(1, min(10, 30_000 // len(mu)))
    return torch.cat([reparameterise(mu, logvar, randn(mu.shape, gen)) for _ in range(draws)])


def fit_mixture(vae, images, settings, device):
    """The Gaussian mixture fitted to codes of the training images: its attributes, for a checkpoint."""
    z = draw_codes(vae, images, settings["seed"], device)
    return vars(GaussianMixture.fit(z, settings["components"], settings["seed"], settings["tied"]))


@torch.no_grad()
def refine(model, settings, x_hat, z, gen):
    """Refine x_hat (B, C, H, W) with its code z (B, d): images in [-1, 1], or latents. Of a VAE alone, x_hat itself
    comes back. The noise comes from `gen`, a CPU generator, so that it is the same on every device. `settings` has the
    sampler, its steps, and the temperature: the factor of the noise in x_start."""
    if model.denoiser is None:
        return x_hat
    noise = settings["temperature"] * randn(x_hat.shape, gen).to(model.device)
    with autocast(model.device):
        return sample(model.diffusion, model.denoiser(x_hat, z), model.diffusion.x_start(x_hat, noise),
                      settings["sampler"], settings["sample_steps"], gen,
                      clamp=model.decode is None)  # a latent has no range to be clamped to


@torch.no_grad()
def generate(model, settings, z=None, damage=0.0):
    """Generate settings["eval_samples"] images, with codes from settings["prior"], or one image for each of the codes z
    (N, d). Returns x_hat and the refined images, uint8 (N, 3, H, W) on the CPU, and the seconds per image. (Without a
    VAE, x_hat is grey.)

    `damage` is the standard deviation of noise that is added to x_hat before it is refined, or to a diffused latent
    before it is decoded: a test of how well a model copes with a bad x_hat.
    Every batch has its own generators, so image k is made from the same z and noise whatever the sampler, its steps and
    the damage. Several processes share the batches (section 10: this one is RANK of RANKS)."""
    count = len(z) if z is not None else settings["eval_samples"]
    batch = settings["eval_batch"]
    parts = []
    for first in tqdm(range(0, count, batch)[RANK::RANKS], desc="sampling", leave=False, disable=count <= batch):
        clock = time.time()
        seed = settings["seed"]
        n = min(batch, count - first)
        gen = generator(seed, f"noise {first}")
        damage_noise = damage * randn((n, *model.shape), gen).to(model.device)
        codes = None
        x_hat = torch.zeros(n, *model.shape, device=model.device)
        if model.vae is not None:
            if z is None:
                codes = model.priors[settings["prior"]].sample(n, generator(seed, f"codes {first}")).to(model.device)
            else:
                codes = z[first : first + n].to(model.device)
            with autocast(model.device):
                x_hat = model.vae.decoder(codes) + damage_noise
        x = refine(model, settings, x_hat, codes, gen)
        if model.decode is not None:
            with autocast(model.device):
                x = model.decode(x + damage_noise)
        parts.append((to_uint8(x_hat).cpu(), to_uint8(x).cpu(), time.time() - clock))
    before, after, seconds = zip(*gather(parts), strict=True)
    return torch.cat(before), torch.cat(after), sum(seconds) / count


# ==== Part II, the machinery: how the models above are fed, trained and kept. To be looked up. ========================

# ---- 5. The likelihood bound of a diffusion model --------------------------------------------------------------------

# The variational bound of a diffusion model, in nats per image (DDPM eq. 5):
#     -log p(x0) <= KL(q(x_start | x0) || p(x_start)) + sum over t = 2..start of KL_t + L_0
# Stage 2 trains with it (--loss bound).

def kl_step(diffusion, x0, x0_predicted, t):
    """KL_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for times t (B,) from 2 on, (B,) nats. The model p has the
    predicted x0 in place of x0, and the same variance."""
    x0_factor, _, variance = diffusion.posterior(t.cpu(), t.cpu() - 1)  # (B,)
    factor = (x0_factor**2 / (2 * variance)).float().to(x0.device)
    return factor * ((x0 - x0_predicted) ** 2).flatten(1).sum(1)


def kl_prior(diffusion, x0, x_hat=None):
    """The bound's first term, KL(q(x_start | x0) || p(x_start)), (B,) nats. If the process begins at T, p is N(0, I).
    If it begins earlier, p and q have the same variance, and their means are sqrt(alpha_bar) x_hat and
    sqrt(alpha_bar) x0."""
    bar = float(diffusion.alpha_bar[diffusion.start])
    if diffusion.start == diffusion.T:
        return 0.5 * (bar * x0**2 - bar - math.log(1 - bar)).flatten(1).sum(1)
    return bar / (2 * (1 - bar)) * ((x0 - x_hat) ** 2).flatten(1).sum(1)


def data_nats(diffusion, x0, x0_predicted):
    """The bound's last term, L_0 = -log p(x0 | x_1), (B,) nats, where x0 = to_float(pixels) (DDPM eq. 13).

    A pixel's probability is the mass of N(x0_predicted, sd^2) between the edges of its bin, x0 - 1/255 and x0 + 1/255;
    the bins of the values 0 and 255 reach to infinity. As in DDPM's code, sd^2 is the variance at t = 2, and no
    probability is below 1e-12. In float64 on the CPU."""
    sd = float(diffusion.posterior(2, 1)[2].sqrt())
    x = x0.cpu().double()
    mean = x0_predicted.cpu().double()
    ndtr = torch.special.ndtr  # the distribution function of N(0, 1)

    # 1 for the value 255, whose bin has no upper edge; 0 for the value 0, whose bin has no lower one
    below_upper = torch.where(x < 0.999, ndtr((x + 1 / 255 - mean) / sd), 1.0)
    below_lower = torch.where(x > -0.999, ndtr((x - 1 / 255 - mean) / sd), 0.0)
    return -(below_upper - below_lower).clamp(min=1e-12).log().flatten(1).sum(1).float().to(x0.device)


# ---- 6. The built-in data --------------------------------------------------------------------------------------------

FACTORS = ("size", "x", "y", "hue sine", "hue cosine", "tilt", "lightness", "detail", "band direction", "contrast",
           "spot size")


def draw_shapes(count, seed, flat_spots=False):
    """The built-in data set: `count` anti-aliased shapes on a grey ground, of random sizes, places and colours.

    A third of the shapes are plain, a third have broad bands, a third are spotted. Outline, colour and bands fit into
    the code of a small VAE. Where each spot lies does not. So the VAE draws a flat tone in place of spots, and the
    refiner has to invent them. `flat_spots` draws each spotted shape in its mean tone.
    Returns uint8 images (count, 3, 32, 32), int64 labels (count,) and the FACTORS, float32 (count, 11) in about -1..1.
    """
    gen = torch.Generator().manual_seed(seed)
    parts = [draw_some_shapes(min(1000, count - first), gen, flat_spots) for first in range(0, count, 1000)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def draw_some_shapes(count, gen, flat_spots, size=32):
    """See draw_shapes. Numbers of images have the shape (N, 1, 1), to meet the pixels (H, W)."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(count, 1, 1, generator=gen)

    label = torch.randint(6, (count,), generator=gen)
    detail = torch.randint(3, (count, 1, 1), generator=gen)  # 0 plain, 1 broad bands, 2 spotted
    direction = torch.randint(3, (count, 1, 1), generator=gen)  # of bands: horizontal, vertical or diagonal
    radius = uniform(9, 12)
    cx = uniform(13, 19)
    cy = uniform(13, 19)
    tilt = uniform(-0.25, 0.25)
    hue = uniform(0, 1)
    lightness, lighter_side = uniform(0.1, 0.55), uniform(0, 2 * math.pi)  # of the ground, and where it gets lighter
    dark, spot = uniform(0.25, 0.7), uniform(0.7, 1.2)  # the darker tone, relative to the lighter; size of the spots

    # HSV to RGB at full saturation and value: red is at hue 0, green at 2/6, blue at 4/6 of the circle. A channel is 1
    # within 1/6 of its own hue, and falls to 0 over the next 1/6.
    channels = torch.tensor([0.0, 4.0, 2.0]).view(3, 1, 1)
    pure_hue = ((hue[:, None] * 6 + channels) % 6 - 3).abs().sub(1).clamp(0, 1)  # (N, 3, 1, 1)

    # The outline: signed distances from six of them, negative inside, nearly exact close to them.
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    x, y = columns + 0.5 - cx, rows + 0.5 - cy  # (N, H, W)
    u = (x * tilt.cos() + y * tilt.sin()) / radius  # the shape's own frame, in which it has radius 1
    v = (y * tilt.cos() - x * tilt.sin()) / radius
    rho = torch.hypot(u, v)
    half = math.pi / 5  # half the angle between two tips of the star
    to_tip = ((torch.atan2(u, -v) + half) % (2 * half) - half).abs()  # angle to the star's nearest tip
    arm = torch.maximum(u.abs() - 0.95, v.abs() - 0.33)
    bar = torch.maximum(u.abs() - 0.33, v.abs() - 0.95)
    distances = torch.stack([
        rho - 0.9,  # disc
        (rho - 0.68).abs() - 0.25,  # ring
        torch.maximum(u.abs(), v.abs()) - 0.78,  # square
        torch.maximum(v, 0.866 * u.abs() - v / 2) - 0.53,  # triangle with equal sides: 0.866 = sin 60 degrees
        # Star: a straight edge from a tip (radius 1) to a notch (radius 1/2); (0.443, 0.897) is the edge's normal.
        0.443 * (rho * to_tip.cos() - 1) + 0.897 * rho * to_tip.sin(),
        torch.minimum(arm, bar),  # cross, of two rectangles
    ], dim=1)  # (N, 6, H, W)
    distance = distances[torch.arange(count), label]  # (N, H, W)
    cover = (0.5 - distance * radius).clamp(0, 1)[:, None]  # in pixels; share of the pixel inside the outline

    # Spots: white noise, of which a band of frequencies is kept, the difference of two Gaussian blurs. A blur of sd s
    # multiplies each frequency f by exp(-2 pi^2 f^2 s^2).
    frequency = torch.fft.fftfreq(size)
    f2 = frequency[:, None] ** 2 + frequency**2  # (H, W)
    band = torch.exp(-2 * math.pi**2 * f2 * spot**2) - torch.exp(-2 * math.pi**2 * f2 * (2 * spot) ** 2)
    field = torch.fft.ifft2(torch.fft.fft2(torch.randn(count, size, size, generator=gen)) * band).real
    spots = (0.5 + 1.5 * field / field.std((1, 2), keepdim=True)).clamp(0, 1)  # nearly two tones, with crisp edges
    if flat_spots:
        spots = spots.mean((1, 2), keepdim=True)

    bands = torch.where(direction == 0, rows, torch.where(direction == 1, columns, rows + columns)) % 8 < 4
    light = torch.where(detail == 0, 1.0, torch.where(detail == 1, bands.float(), spots))  # (N, H, W)
    inside = (pure_hue * 0.75 + 0.2) * (dark + (1 - dark) * light)[:, None]  # (N, 3, H, W)
    ground = lightness + 0.3 * ((columns - 16) * lighter_side.cos() + (rows - 16) * lighter_side.sin()) / size
    image = ground[:, None] * (1 - cover) + inside * cover
    factors = [(radius - 10.5) / 1.5, (cx - 16) / 3, (cy - 16) / 3, (2 * math.pi * hue).sin(),
               (2 * math.pi * hue).cos(), tilt * 4, (lightness - 0.325) * 4.4, detail - 1.0,
               (direction - 1.0) * (detail == 1), (0.475 - dark) * 4.4 * (detail > 0),
               (spot - 0.95) * 4 * (detail == 2)]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), label, torch.cat(factors, 1)[:, :, 0]


# ---- 7. Files --------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def fail(message):
    """Print one line that says what is wrong and what to do about it, and exit with status 2."""
    print(f"\nerror: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, data):
    """Write bytes under a temporary name, then rename the file, so that nobody ever sees half of it. Of several
    processes only the first writes."""
    if RANK > 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_with(path, save, **options):
    """Write what `save(file, **options)` produces: a picture's .save, a figure's .savefig, np.savez."""
    buffer = io.BytesIO()
    save(buffer, **options)
    write(path, buffer.getvalue())


def write_json(path, data):
    """Write `data` as JSON. Raises ValueError if a number in it is not finite."""
    write(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def save_state(path, state):
    """Write `state` (tensors and plain values) with torch.save."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def load_state(path):
    """What save_state wrote, on the CPU. (`weights_only`: a file cannot run code.)"""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        fail(f"{path}: cannot be loaded ({error!r:.80}); replace or remove this file")


def half(weights):
    """Weights {name: tensor} with their matrices in half precision, for files. Loading makes them float32 again."""
    return {key: value.half() if value.dim() > 1 else value for key, value in weights.items()}


def find_images(folder):
    """All image files in a folder and below it, sorted by path. Hidden files are left out."""
    return sorted(path for path in Path(folder).rglob("*")
                  if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def read_image(path):
    """An image file as an upright RGB PIL image. Fails, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL raises many kinds for damaged files
        fail(f"{path}: cannot be read as an image ({error}); replace or remove this file")


# ---- 8. Settings -----------------------------------------------------------------------------------------------------

# `settings` is one flat dictionary: TRAINING and EVALUATION, with what CHANGES says of the budget and the data set, and
# with what flags change. Most values were found by short sweeps on the built-in data.
TRAINING = {
    "batch": 32,  # images per step
    "vae_steps": 4000, "unet_steps": 4000,  # optimisation steps
    "flow_steps": 4000,  # of fitting flow and uncertainty after the VAE is trained (stage 3)
    "vae_muon_lr": 0.02, "unet_muon_lr": 0.01,  # learning rate of Muon, for matrices (section 11); 0: Adam for all
    "vae_lr": 2e-3, "unet_lr": 2e-3,  # learning rate of Adam, for all other parameters
    "warmup": 200,  # steps in which the rates rise from 0
    "decay": True,  # then they fall linearly to 0; False: they stay
    "vae_clip": 200.0, "unet_clip": 1.0,  # largest norm of a gradient (the VAE's loss is a sum over pixels)
    "vae_ema": 0.995, "unet_ema": 0.995,  # decay of the moving average of the weights; 0: the weights themselves
    "objective": "v",  # what the U-Net predicts, v or eps; see Diffusion
    "even_levels": True,  # weight noise levels so that all count alike; see level_weight
    "start": 400,  # time at which refinement begins, of 1000; without an x_hat it is always 1000
    "beta": 0.25,  # weight of the KL in the VAE's loss
    "pool": False,  # True: resolution changes as published; see Encoder and UNet
    "attention": [],  # resolutions at which the U-Net has attention, beside its middle
    "heads": 1,  # of the attention
    "dropout": 0.0,  # of the U-Net
    "guidance": 0.3,  # `guided` adds guidance * (refiner - guide) to the prediction (stage 1)
    "diffusion_weight": 0.03,  # lambda of joint training (stage 2)
    "vae_flip": True, "unet_flip": True,  # whether training images are mirrored at random
    "components": 30, "tied": False,  # of the mixture that is fitted ex post; see GaussianMixture
    "ae_width": 32,  # of the autoencoder of bonus_latent.py
    "latent_table": [[1, 96, 1, 1], [2, 128, 1, 1]],  # its U-Net; see build_latent_unet there
    "every": 50,  # steps between two rows of the log
}
EVALUATION = {  # how a trained model is sampled and scored
    "prior": "gmm",  # over z: gaussian, gmm or (stage 3) flow
    "sampler": "dpm", "sample_steps": 10,
    "temperature": 1.0,  # factor of the noise in x_start; above 1 it makes up for detail that x_hat lacks
    "eval_samples": 1000,  # images of the first row of scores
    "eval_batch": 100,  # images sampled at a time
    "grid": [["ddim", 5], ["dpm", 2], ["dpm", 5], ["dpm", 10]],  # samplers and steps of further rows
    "probe_samples": 300,  # images of each further row, and of other measurements (noise, paths)
    "probe_steps": 5,  # DPM-Solver++ steps in other measurements
    "features": "local",  # network of the scores: local or inception
    "export": 0,  # how many samples are written as PNG files
}
CHANGES = {  # by size, data set, budget, "budget size" and "budget dataset": in this order, and the last one wins
    # Rows of vae_table: (resolution, width, blocks of the encoder, blocks of the decoder).
    # Rows of unet_table: (resolution, width, blocks on the way down, blocks on the way up).
    # Sized for two CPU cores: minutes on shapes, an hour on photographs
    "32": {"vae_table": [[32, 32, 1, 1], [16, 64, 2, 1], [8, 96, 2, 1], [4, 128, 2, 1], [1, 128, 1, 1]],
           "unet_table": [[32, 32, 1, 1], [16, 64, 1, 1], [8, 96, 1, 1]]},
    "64": {"vae_table": [[64, 16, 1, 1], [32, 32, 2, 1], [16, 64, 2, 1], [8, 96, 2, 1], [4, 128, 2, 1], [1, 128, 1, 1]],
           "unet_table": [[64, 32, 0, 1], [32, 48, 1, 1], [16, 64, 1, 1], [8, 96, 1, 1]],
           "vae_steps": 2000, "unet_steps": 2400, "flow_steps": 2300},
    "cifar10": {"guidance": 0.5},  # which elsewhere adds more detail than real images have
    # A small weight of the KL keeps outlines in the code; such codes lie in many clusters, so the mixture has thousands
    # of components. No mirroring: slanted bands would run the other way, as in no image of the data.
    "shapes": {"beta": 0.04, "components": 6000, "tied": True, "vae_flip": False, "unet_flip": False},
    "cpu shapes": {"vae_table": [[32, 32, 1, 1], [16, 64, 1, 0], [8, 96, 2, 1], [4, 128, 2, 1], [1, 64, 1, 1]],
                   "unet_table": [[32, 32, 0, 1], [16, 48, 1, 1], [8, 64, 1, 1]],
                   "vae_steps": 550, "unet_steps": 550, "flow_steps": 3000, "unet_muon_lr": 0.02, "warmup": 40,
                   "sample_steps": 5, "temperature": 1.1, "probe_samples": 200},
    "smoke": {"vae_steps": 8, "unet_steps": 8, "flow_steps": 8, "warmup": 0, "attention": [16], "components": 2,
              "ae_width": 16, "latent_table": [[1, 16, 1, 1]], "every": 4,
              "sample_steps": 4, "eval_samples": 60, "eval_batch": 64, "grid": [["ddim", 2]], "probe_samples": 60,
              "probe_steps": 2},
    "smoke 32": {"vae_table": [[32, 8, 1, 0], [16, 16, 1, 0], [4, 32, 2, 1], [1, 8, 0, 0]],
                 "unet_table": [[32, 8, 1, 1], [16, 16, 1, 1]]},
    "smoke 64": {"vae_table": [[64, 8, 1, 0], [16, 16, 1, 0], [4, 32, 2, 1], [1, 8, 0, 0]],
                 "unet_table": [[64, 8, 1, 1], [32, 8, 1, 1], [16, 16, 1, 1]]},
    # Sized for half an hour of one data-centre GPU; not timed
    "gpu": {"batch": 256, "vae_steps": 12_000, "unet_steps": 12_000, "warmup": 600, "unet_ema": 0.9995, "dropout": 0.1,
            "attention": [16], "heads": 4, "ae_width": 96, "latent_table": [[1, 192, 2, 3], [2, 256, 2, 3]],
            "sample_steps": 25, "eval_samples": 10_000, "eval_batch": 500, "probe_samples": 2000, "probe_steps": 25},
    "gpu 32": {"unet_table": [[32, 96, 2, 3], [16, 192, 2, 3], [8, 192, 2, 3]]},
    "gpu 64": {"unet_table": [[64, 64, 2, 3], [32, 128, 2, 3], [16, 192, 2, 3], [8, 192, 2, 3]]},
    # The published configuration (cifar10/train.yaml and celeba64/train.yaml of DiffuseVAE's code): VAEs of 9.24M and
    # 14.01M parameters, for 500 and 245 epochs; U-Nets of 35.75M and 78.70M, for 2,850 and 500 epochs
    "paper": {"batch": 128, "vae_lr": 1e-4, "unet_lr": 2e-4, "vae_muon_lr": 0.0, "unet_muon_lr": 0.0, "warmup": 5000,
              "decay": False, "vae_clip": 1e9, "vae_ema": 0.0, "unet_ema": 0.9999, "pool": True, "objective": "eps",
              "even_levels": False, "start": 1000, "beta": 1.0, "attention": [16], "heads": 8, "vae_flip": False,
              "ae_width": 128, "latent_table": [[1, 256, 2, 3], [2, 512, 2, 3]], "every": 100,
              "sampler": "ddpm", "sample_steps": 1000, "eval_samples": 50_000, "eval_batch": 500,
              "probe_samples": 10_000, "probe_steps": 25},
    "paper 32": {"vae_table": [[32, 64, 8, 15], [16, 128, 5, 7], [8, 256, 5, 3], [4, 256, 4, 2], [1, 512, 3, 1]],
                 "unet_table": [[32, 128, 2, 3], [16, 256, 2, 3], [8, 256, 2, 3], [4, 256, 2, 3]],
                 "vae_steps": 195_000, "unet_steps": 1_110_000, "dropout": 0.3, "components": 50},
    "paper 64": {"vae_table": [[64, 64, 8, 10], [32, 128, 5, 8], [16, 256, 8, 7], [8, 256, 4, 3], [4, 256, 4, 2],
                               [1, 512, 2, 1]],
                 "unet_table": [[64, 128, 2, 3], [32, 256, 2, 3], [16, 256, 2, 3], [8, 256, 2, 3], [4, 512, 2, 3]],
                 "batch": 32, "vae_steps": 1_246_000, "unet_steps": 2_543_000, "dropout": 0.1, "components": 75},
}


def budget_settings(budget, dataset):
    """The settings of a budget for a data set."""
    size = DATASETS[dataset]
    settings = {"dataset": dataset, "image_size": size, "budget": budget} | TRAINING | EVALUATION
    for key in (str(size), dataset, budget, f"{budget} {size}", f"{budget} {dataset}"):
        settings |= CHANGES.get(key, {})
    return settings


def add_flags(parser, priors=("gaussian", "gmm"), prior="gmm"):
    """Add the flags that all stages share. `priors` are the names of the stage's priors over z, `prior` is its default.
    """
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="shapes", help="default: shapes; all others read --data-dir")
    add("--data-dir", default="data", help="where cifar10/ or celeba/ lie, or a folder of images (default: data)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--budget", choices=("auto", "smoke", "cpu", "gpu", "paper"), default="auto", help="gpu with CUDA, else cpu")
    add("--set", nargs="+", action="extend", metavar="KEY=VALUE", default=[], help="change settings (see --dry-run)")
    add("--seed", type=int, default=0)
    add("--out", default="runs", help="folder for runs (default: runs)")
    add("--resume", action="store_true", help="continue an unfinished run")
    add("--prior", choices=priors, default=prior, help="over z (default: %(default)s)")
    add("--sampler", choices=("ddpm", "ddim", "dpm"))
    add("--sample-steps", type=int)
    add("--eval-samples", type=int)
    add("--export", type=int, metavar="N", help="write N samples as PNG files")
    add("--features", choices=("auto", "inception", "local"), default="auto", help="network of the scores")
    add("--weights", help="of the feature network")
    add("--dry-run", action="store_true", help="print all settings and stop")


def read_settings(args):
    """The settings that the flags choose, and the device. The training settings that --set changes become a part of the
    name of the folder settings["home"], such as runs/shapes-cpu-beta=0.1. So all runs in a folder share all training
    settings but the seed."""
    device = choose_device(args.device)
    budget = args.budget
    if budget == "auto":
        budget = "gpu" if device.type == "cuda" else "cpu"
    settings = budget_settings(budget, args.dataset)
    if args.features != "auto":
        settings["features"] = args.features
    elif budget in ("gpu", "paper") and args.dataset != "shapes":
        settings["features"] = "inception"
    for key in ("prior", "sampler", "sample_steps", "eval_samples", "export"):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)

    changes = {}
    for text in args.set:
        key, _, value = text.partition("=")
        if key not in settings or key in ("dataset", "image_size", "budget"):
            fail(f"--set {text}: no such setting; there are {', '.join(settings)}")
        try:
            value = json.loads(value)
        except ValueError:
            pass  # a text, such as eps
        whole_number_for_float = type(value) is int and type(settings[key]) is float
        if type(value) is not type(settings[key]) and not whole_number_for_float:
            fail(f"--set {text}: not of the type of {settings[key]!r}")
        changes[key] = value
    settings |= changes
    settings["probe_samples"] = min(settings["probe_samples"], settings["eval_samples"])
    changes = {key: value for key, value in changes.items() if key not in EVALUATION}
    name = "-".join([f"{args.dataset}-{budget}", *(f"{key}={value}" for key, value in changes.items())])
    if args.dataset == "folder":
        name = f"{Path(args.data_dir).resolve().name}-{name}"
    return settings | {"changes": changes, "seed": args.seed, "home": str(Path(args.out) / name)}, device


def print_settings(settings, **networks):
    """What --dry-run shows, as one JSON object."""
    parameters = {name: count_parameters(network) for name, network in networks.items()}
    print(json.dumps(settings | {"networks": parameters}, indent=1))


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


# ---- 9. Data sets ----------------------------------------------------------------------------------------------------

DATASETS = {"shapes": 32, "cifar10": 32, "celeba64": 64, "folder": 64}  # name: size of an image's side, in pixels
LAYOUTS = {"cifar10": "cifar-10-batches-py/ or cifar10/{train,test}/<class>/*.{png,jpg}",
           "celeba64": "celeba/img_align_celeba/*.jpg"}


@dataclass
class ImageData:
    """One split of a data set, held whole in memory."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    note: str  # what every result must say about its data, such as "JPEG copies"
    labels: torch.Tensor | None = None  # int64 (N,)
    factors: torch.Tensor | None = None  # float32 (N, len(FACTORS)), of shapes


class Data(NamedTuple):
    train: ImageData
    test: ImageData  # held out


def load_data(dataset, data_dir="data"):
    """Both splits of a data set, as Data. Decoded images are kept in data/cache. Of several processes the first one
    goes first, so that it alone downloads and decodes."""
    if RANKS > 1 and RANK > 0:
        distributed.barrier()
    splits = []
    for split, count in (("train", 20_000), ("test", 4_000)):
        if dataset == "shapes":
            images, labels, factors = draw_shapes(count, seed=len(splits) + 1)
            splits.append(ImageData(images, "drawn by the program", labels, factors))
        else:
            splits.append(load_split(dataset, split, Path(data_dir)))
    if RANKS > 1 and RANK == 0:
        distributed.barrier()
    return Data(*splits)


def load_split(dataset, split, folder):
    """The split `train` or `test` of real images."""
    try:
        from torchvision.datasets import CIFAR10, CelebA
        if dataset == "cifar10" and not (folder / "cifar10").is_dir():
            source = CIFAR10(str(folder), split == "train", download=True)
            images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
            return ImageData(images, "as published", torch.tensor(source.targets))
        if dataset == "celeba64" and not (folder / "celeba" / "img_align_celeba").is_dir():
            CelebA(str(folder), split="all", download=True)  # needs the package gdown
    except Exception as error:  # no network, no gdown, a broken archive: the remedy is the same
        fail(f"no images of {dataset} in --data-dir {folder.resolve()}, and no download "
             f"({error!r:.80}); name the folder of {LAYOUTS[dataset]}")
    files = list_files(dataset, split, folder)
    if len(files) < 6:
        fail(f"--data-dir {folder.resolve()}: {len(files)} images of {dataset} in the {split} part; more are needed")
    images = torch.from_numpy(decode_files(dataset, split, files, DATASETS[dataset]))
    width, height = read_image(files[0]).size
    kind = "JPEG" if files[0].suffix.lower() in (".jpg", ".jpeg") else "lossless"
    labels = None
    if dataset == "cifar10":
        classes = sorted({path.parent.name for path in files})
        labels = torch.tensor([classes.index(path.parent.name) for path in files])
    if split == "test":  # files may come class by class; in random order the first N images stand for all
        order = torch.randperm(len(images), generator=generator(0, "order of held-out images"))
        images = images[order]
        labels = None if labels is None else labels[order]
    return ImageData(images, f"{kind} copies at {width}x{height}", labels)


def list_files(dataset, split, folder):
    """The image files of a split. Of CelebA the last tenth by name is the test split, unless there is the official
    list_eval_partition.txt. Of a user's own folder it is every tenth file."""
    if dataset == "cifar10":
        return find_images(folder / "cifar10" / split)
    if dataset == "folder":
        files = find_images(folder)
        return [path for i, path in enumerate(files) if (i % 10 == 9) == (split == "test")]
    files = find_images(folder / "celeba" / "img_align_celeba")
    partition = folder / "celeba" / "list_eval_partition.txt"
    if partition.is_file():
        part = dict(line.split() for line in partition.read_text().splitlines())  # {name: number}
        return [path for path in files if part[path.name] == {"train": "0", "test": "2"}[split]]
    edge = len(files) - len(files) // 10
    return files[:edge] if split == "train" else files[edge:]


def decode_files(dataset, split, files, size):
    """Image files -> uint8 array (N, 3, size, size), kept in data/cache until a file's path, size or time changes."""
    listing = "".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}\n" for path in files)
    key = hashlib.sha256(listing.encode()).hexdigest()[:8]
    cache = Path("data") / "cache" / f"{dataset}-{split}-{size}-{key}.npy"
    if cache.is_file():
        return np.load(cache)
    images = np.empty((len(files), 3, size, size), np.uint8)
    for i, path in enumerate(tqdm(files, desc=f"decoding {dataset} {split}", unit="image")):
        images[i] = crop(read_image(path), dataset, size).transpose(2, 0, 1)
    write_with(cache, np.save, arr=images)
    return images


def crop(image, dataset, size):
    """A PIL image -> array (size, size, 3). Of CelebA's aligned images (178x218, or smaller in proportion) the 148x148
    box at (15, 40), as NVAE crops them; of others the centred square."""
    if dataset != "celeba64":
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    scale = image.width / 178
    box = (15 * scale, 40 * scale, 163 * scale, 188 * scale)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


# ---- 10. Devices and processes ---------------------------------------------------------------------------------------

# `torchrun --nproc_per_node N stageX.py ...` starts N processes of the same script. Each draws its own part of a batch,
# and gradients are averaged, so their networks stay equal. They share the images to be sampled. The first one writes.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # this process's number; how many


def choose_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` -> torch.device, and meet the other processes, if there are any. Exits
    if this machine does not have the device. Of several processes each gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and RANKS > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError):
        fail(f"--device {name}: not a device of this machine; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if RANKS > 1 and not distributed.is_initialized():
        patience = datetime.timedelta(hours=2)  # the others wait while the first one decodes images
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        atexit.register(distributed.destroy_process_group)
        if RANK > 0:  # the first process speaks for all
            sys.stdout = sys.stderr = open(os.devnull, "w")
    return device


def autocast(device):
    """A context in which networks run in bfloat16 on a GPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def average_over_processes(tensors):
    """Replace tensors, such as gradients, by their means over all processes, in place."""
    if RANKS > 1:
        flat = torch.cat([x.flatten() for x in tensors])  # one message in place of many
        distributed.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x) / RANKS)


def gather(parts):
    """Process r has made the batches r, r + RANKS, r + 2 RANKS, ... Returns the list of all batches, in order."""
    if RANKS == 1:
        return parts
    of_each = [None] * RANKS
    distributed.all_gather_object(of_each, parts)
    return [of_each[i % RANKS][i // RANKS] for i in range(sum(map(len, of_each)))]


# ---- 11. Training ----------------------------------------------------------------------------------------------------

def orthogonalise(matrices, rounds=5):
    """Matrices (K, m, n), each U S V^T -> about U V^T: the singular values become 0.7 to 1.2, except for tiny ones.

    Newton-Schulz iteration with the coefficients of Jordan et al. 2024. (x x^T) x = U S^3 V^T. So matrix products alone
    can turn every singular value s into 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which each round does."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values between 0 and 1
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Gradient descent with an orthogonalised momentum (Jordan et al. 2024). The update of a weight matrix has singular
    values near 1, so directions that are rare in the gradients move as far as common ones.

    A convolution's weights count as a matrix (out, in k k), a transposed convolution's as (in, out k k). (torch's own
    Muon takes matrices alone.)"""

    def __init__(self, params, momentum=0.95):
        super().__init__(params, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        momentum, updates = group["momentum"], {}  # updates: by shape, since equal shapes are faster together
        for p in group["params"]:
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - momentum)  # average = momentum average + (1 - momentum) gradient
            update = p.grad.lerp(average, momentum).flatten(1)  # Nesterov: (1 - momentum) gradient + momentum average
            updates.setdefault(update.shape, []).append((p, update))
        for (rows, columns), pairs in updates.items():
            scale = max(1, rows / columns) ** 0.5  # Jordan's: the root of outputs / inputs
            orthogonal = orthogonalise(torch.stack([update for _, update in pairs]))
            for (p, _), update in zip(pairs, orthogonal, strict=True):
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def level_weight(settings, diffusion, t):
    """The weight of the refiner's loss at times t (B,): (B,).

    The plain squared error of v, on our data, is about 0.01 / sigma_t: far larger at the lowest noise levels, where the
    grain of the image is decided, than at the highest, where shapes are. The weight 100 sigma_t lets all count alike.
    (Karras et al. 2024, arXiv:2312.02696, eq. 14 to 21, learn such a weight.)"""
    return 100 * diffusion.eps_scale[t] if settings["even_levels"] else torch.ones_like(diffusion.eps_scale[t])


def scale_gradient(x, scale):
    """The values of x, but gradients that pass back are multiplied by `scale`, a number or a scalar tensor."""
    return x.detach() + scale * (x - x.detach())


class Training:
    """The training loop that all stages share. A stage iterates over batches, computes a loss from each, and hands it
    to `step`:

        training = Training(folder, settings, device, images, steps, flip, vae=vae)
        for x0 in training:
            with common.autocast(device):
                loss = ...                          # (B,)
            training.step(loss, {"sse": sse})       # what to log
        checkpoint = training.finish(...)

    `networks` are given by name. For each NAME, the settings hold the learning rates NAME_lr (Adam) and NAME_muon_lr
    (Muon), the largest norm of a gradient NAME_clip, and the decay NAME_ema of the moving average of the weights.

    About once a minute all that is needed to go on is saved in FOLDER/unfinished.pt. A Training that finds this file
    goes on from there and, on a CPU, ends with the same bits as if it had never been stopped."""

    def __init__(self, folder, settings, device, images, steps, flip, **networks):
        self.folder = Path(folder)
        self.settings = settings
        self.device = device
        self.networks = networks
        self.images = images.to(device)
        self.flip = flip
        self.steps = steps
        self.averages, self.optimizers = {}, []  # optimizers: pairs of an optimizer and its learning rate
        for name, network in networks.items():
            network.to(device, memory_format=torch.channels_last).train()
            self.averages[name] = {key: value.clone() for key, value in network.state_dict().items()}
            muon_lr = settings[f"{name}_muon_lr"]
            matrices = [p for p in network.parameters() if p.dim() > 1 and muon_lr > 0]
            others = [p for p in network.parameters() if p.dim() <= 1 or muon_lr == 0]
            if matrices:
                self.optimizers.append((Muon(matrices), muon_lr))
            self.optimizers.append((torch.optim.Adam(others), settings[f"{name}_lr"]))
        self.gen = generator(settings["seed"], f"training, process {RANK}", device)
        self.steps_taken, self.seconds = 0, 0.0  # so far
        self.log, self.sums = [], {}  # rows of the log; sums of the logged terms since the last row
        if (self.folder / "unfinished.pt").is_file():
            self.load(load_state(self.folder / "unfinished.pt"))

    def load(self, state):
        """Go on from what `save` saved."""
        for name, network in self.networks.items():
            network.load_state_dict(state["weights"][name])
            self.averages[name] = {key: value.to(self.device) for key, value in state["averages"][name].items()}
        for (optimizer, _), its_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        self.steps_taken = state["steps"]
        self.seconds = state["seconds"]
        self.log = state["log"]
        if RANK == 0:
            self.gen.set_state(state["generator"])
        else:  # only the first process's generator is saved; a new one for the others
            self.gen = generator(self.settings["seed"], f"process {RANK} from {self.steps_taken}", self.device)

    def save(self):
        """Write all that is needed to go on. (Of several processes the first one writes.)"""
        save_state(self.folder / "unfinished.pt", {
            "settings": self.settings, "steps": self.steps_taken, "seconds": self.seconds, "log": self.log,
            "generator": self.gen.get_state(), "averages": self.averages,
            "weights": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers]})

    def __iter__(self):
        self.began = time.time() - self.seconds
        saved = time.time()
        with tqdm(total=self.steps, initial=self.steps_taken, unit="step", desc=self.folder.name) as bar:
            while self.steps_taken < self.steps:
                yield self.batch()  # the stage computes the loss and calls self.step, which counts
                bar.update()
                self.seconds = time.time() - self.began
                if self.steps_taken % self.settings["every"] == 0 or self.steps_taken == self.steps:
                    self.write_row(bar)
                    if time.time() - saved > 60:  # here, since the sums of the log are empty and need not be saved
                        self.save()
                        saved = time.time()

    def batch(self):
        """A random batch of training images, as floats, mirrored at random if `flip`. (The bonus trains on latents,
        which are floats already.)"""
        if self.settings["dropout"]:  # its masks depend on the step alone, so that a resumed run has the same
            torch.manual_seed(seed_of(self.settings["seed"], f"dropout {self.steps_taken}, process {RANK}"))
        size = self.settings["batch"] // RANKS
        x = self.images[torch.randint(len(self.images), (size,), generator=self.gen, device=self.device)]
        x = (to_float(x) if x.dtype == torch.uint8 else x).contiguous(memory_format=torch.channels_last)
        if self.flip:
            x = torch.where(self.uniform(1, 1, 1) < 0.5, x.flip(3), x)
        return x

    def normal(self, *shape):
        """Standard normal noise (B, *shape)."""
        return randn((self.settings["batch"] // RANKS, *shape), self.gen)

    def uniform(self, *shape):
        """Uniform random numbers in [0, 1), (B, *shape)."""
        return torch.rand(self.settings["batch"] // RANKS, *shape, generator=self.gen, device=self.device)

    def step(self, loss, terms):
        """Take one step of every optimizer on the mean of `loss` (B,). The `terms` {name: tensor or number} are logged
        as means over the steps since the last row of the log."""
        # Compute gradients.
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad()
        loss.mean().backward()
        average_over_processes([p.grad for network in self.networks.values() for p in network.parameters()])

        # Clip them and update the weights.
        for name, network in self.networks.items():
            nn.utils.clip_grad_norm_(network.parameters(), self.settings[f"{name}_clip"])
        for optimizer, base_rate in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(base_rate, self.steps_taken, self.steps, self.settings)
            optimizer.step()
        self.steps_taken += 1

        # Update the moving averages. Early on the decay is smaller: 2/11, 3/12, ... towards 1. With 0.9999 alone, a
        # third of the average of a run of 10,000 steps would be its initial weights (0.9999^10000 = 0.37).
        early = (1 + self.steps_taken) / (10 + self.steps_taken)
        for name, network in self.networks.items():
            decay = min(self.settings[f"{name}_ema"], early)
            # average += (1 - decay) * (weight - average), for all tensors at once
            torch._foreach_lerp_(list(self.averages[name].values()), list(network.state_dict().values()), 1 - decay)

        # Log.
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).detach().mean()

    def write_row(self, bar):
        """Add a row to the log: means since the last row. Exits if one is not finite."""
        steps = self.steps_taken - (self.log[-1]["step"] if self.log else 0)
        means = {name: float(value) / steps for name, value in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                fail(f"{self.folder.name}: {name} is {mean} by step {self.steps_taken}; try a lower learning rate")
        self.log.append({"step": self.steps_taken, **means})
        self.sums = {}
        bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})

    def finish(self, base=None, **parts):
        """Save the finished checkpoint and return it, on the CPU: the averaged weights of each network under its name,
        and `parts`, whatever else the model consists of (which win over averages of the same name). Its `minutes`
        contain what was fitted after training, and those of `base`, the checkpoint that it builds on."""
        minutes = (time.time() - self.began) / 60 + (base["minutes"] if base else 0)
        checkpoint = {"settings": self.settings, "minutes": minutes, "log": self.log} | self.averages | parts
        save_state(self.folder / "checkpoint.pt", checkpoint)
        if RANK == 0:
            (self.folder / "unfinished.pt").unlink(missing_ok=True)
        if RANKS > 1:
            distributed.barrier()
        return load_state(self.folder / "checkpoint.pt")


def learning_rate(base, step, steps, settings):
    """The learning rate at a step: a linear rise, then constant or, with `decay`, a linear fall to 0 at the end."""
    rise = (step + 1) / max(1, settings["warmup"])
    fall = (steps - step) / max(1, steps - settings["warmup"]) if settings["decay"] else 1
    return base * min(1, rise, fall)


# ---- 12. Runs --------------------------------------------------------------------------------------------------------

def run_folder(settings, name):
    """The folder of a run, such as runs/shapes-cpu/stage1-form1-s0."""
    return Path(settings["home"]) / f"{name}-s{settings['seed']}"


def finished(folder, settings, resume):
    """The finished checkpoint of a run's folder, or None if it has to be trained:

        checkpoint = common.finished(folder, settings, args.resume) or train_vae(folder, ...)

    Exits if the folder holds a run with other settings (those of EVALUATION may differ), or an unfinished run and no
    --resume was given."""
    for name in ("checkpoint.pt", "unfinished.pt"):
        if not (folder / name).is_file():
            continue
        state = load_state(folder / name)
        for key in settings:
            old, new = state["settings"].get(key), settings[key]
            if key not in (*EVALUATION, "changes", "home") and old != new:
                fail(f"{folder} holds a run with other settings ({key} was {old}, is now {new}); choose another --out "
                     "or remove it")
        if name == "checkpoint.pt":
            return state
        if not resume:
            fail(f"{folder} holds an unfinished run; add --resume to continue it, or remove it")
    return None


def this_commit():
    """The commit of this code, ending in "-dirty" if files were changed since, or "unknown" without git."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True,
                              cwd=Path(__file__).resolve().parent).stdout.strip() or "unknown"
    except OSError:  # git is not installed
        return "unknown"


def export(folder, model, settings):
    """Write settings["export"] samples as FOLDER/samples/00000.png, ..."""
    _, images, _ = generate(model, settings | {"eval_samples": settings["export"]})
    for k, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()  # (H, W, 3)
        write_with(folder / "samples" / f"{k:05}.png", Image.fromarray(pixels).save, format="png")
    print(folder / "samples")


# ---- 13. Pictures ----------------------------------------------------------------------------------------------------

def save_grid(path, rows, columns=()):
    """Save rows of uint8 images {label: (N, 3, H, W)} as one picture, with labels on the left and, if given, titles
    above the columns."""
    size = next(iter(rows.values())).shape[-1]
    scale = max(1, 96 // size)
    margin = 8 + 7 * max(map(len, rows))  # a letter is 6 pixels wide
    side, top = scale * size, 16 if columns else 0
    width = margin + max(map(len, rows.values())) * (side + 2)
    page = Image.new("RGB", (width, top + len(rows) * (side + 2)), "white")
    draw = ImageDraw.Draw(page)
    for j, title in enumerate(columns):
        draw.text((margin + j * (side + 2) + 4, 2), title, fill="black")
    for i, (label, row) in enumerate(rows.items()):
        y = top + i * (side + 2)
        draw.text((4, y + side // 2 - 6), label, fill="black")
        for j, image in enumerate(row):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            page.paste(tile.resize((side, side), Image.Resampling.NEAREST), (margin + j * (side + 2), y))
    write_with(path, page.save, format="png")


def draw_samples(folder, parts):
    """samples.png: the first 36 images of each of `parts` {label: uint8 (N, 3, H, W)}, twelve in a row, with the rows
    of all parts in turn."""
    rows = {}
    for i in range(3):
        for label, images in parts.items():
            if len(images) > 12 * i:
                rows[f"{label} {i}"] = images[12 * i : 12 * i + 12]
    save_grid(folder / "samples.png", rows)
