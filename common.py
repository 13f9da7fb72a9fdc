"""The ground that every stage stands on: the models (Part I, to be read) and the machinery (Part II, to be looked up).

Part I    1 diffusion, 2 networks, 3 priors over z, 4 a model: what a stage hands to sampling
Part II   5 the likelihood bound, 6 the built-in data, 7 messages and files, 8 budgets, 9 data sets, 10 processes,
          11 random numbers, precision, cost, 12 training, 13 runs, 14 pictures

For stage 1, read Part I, the settings in TRAIN and EVAL (section 8), the class Training (section 12) and finished_state
(section 13). The rest can be looked up when a stage uses it. `fid.py` builds on this file and holds the scores and the
evaluation of a model.

Conventions, used by every file:
    "As published" refers to DiffuseVAE (Pandey et al. 2022), which stage 1 replicates.
    Images `x0` are float32 tensors (B, 3, H, W) with values in [-1, 1]. Stored data and everything that `fid.py` scores
    are uint8 tensors.
    `x_hat` is the coarse image that the VAE decodes from its code z, also in [-1, 1].
    Networks and training batches have the memory format channels_last, in which convolutions are faster (see
    `memory_format`). Shapes stay the same.
    Times `t` run from 1 to T. Time 0 is the clean image, so `alpha_bar[0] = 1`.
    Losses have the shape (B,), one value per image. A KL or a bound is in nats.
    Every random draw that decides a result comes from an explicit generator. Its seed is --seed, in most cases plus a
    number that depends on the purpose (SEEDS, section 11). Where all runs should draw alike, it is a constant. Initial
    weights and dropout masks are the exceptions: they use torch's global generator, which is seeded before a network is
    built and before every step with dropout.
    Training steps, `generate` and `refine` run networks in bfloat16 where that is fast (`autocast`). What leaves a VAE
    or a U-Net is float32 again.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import secrets
import signal
import statistics
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy.cluster.vq import kmeans2
from torch import distributed, nn
from tqdm import tqdm


def generator(seed, device="cpu"):
    """A seeded torch.Generator on `device`."""
    return torch.Generator(device).manual_seed(seed)


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

class Posterior(NamedTuple):
    """q(x_next | x_t, x0), a Gaussian with mean x0_factor * x0 + xt_factor * x_t. ("Next" means next in sampling, which
    runs backwards in time: t_next < t, and x_next has less noise than x_t.) Two choices of the variance are in use
    (DDPM, section 3.2). `small_variance` (beta_tilde there) is the posterior's own. `large_variance` (beta there) is
    the variance of the noise that the forward process adds on its way from x_next to x_t."""

    x0_factor: float
    xt_factor: float
    small_variance: float
    large_variance: float


class Diffusion:
    """The Gaussian diffusion process of DDPM (Ho et al. 2020), with a linear schedule: beta from 1e-4 to 0.02 in T
    steps.

    `objective` is what the network predicts: `eps`, or `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0` (Salimans &
    Ho 2022). At high noise, x0 is computed from eps by a division by sqrt(alpha_bar), which is small. This magnifies
    the network's errors, which matters most after a short training. From v, x0 is computed without a division. `start`
    is the time at which the reverse process begins: T, or a smaller one where an x_hat already shows roughly what x0
    looks like. Only the times 1..start are trained and sampled."""

    def __init__(self, objective, T=1000, device="cpu", start=None):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        self.T, self.objective, self.start = T, objective, start or T
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
        """Uniform random numbers u in [0, 1), (B,) -> training times, uniform on 1..start, (B,). (The training loop
        draws u, as it draws all random numbers of a step.)"""
        return (self.start * u).long() + 1

    def x_start(self, x_hat, eps):
        """The noisy image from which the reverse process begins: x_hat (B, C, H, W) takes the place of x0.

        If the process begins at T this is `eps` alone, as published. (The factor of x_hat would be 0.006 there.)"""
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
        """The Posterior of x at the time t_next < t, given x_t and x0 (DDPM eq. 6-7). With t_next = t - 1 these are
        DDPM's formulas. Other values of t_next describe a process that skips times. (tests/test_common.py:
        test_posterior_is_bayes)"""
        bar_t, bar_next = float(self.alpha_bar[t]), float(self.alpha_bar[t_next])
        beta = 1 - bar_t / bar_next  # variance of the noise added from t_next to t; DDPM's beta_t if t_next = t - 1
        return Posterior(x0_factor=math.sqrt(bar_next) * beta / (1 - bar_t),
                         xt_factor=math.sqrt(bar_t / bar_next) * (1 - bar_next) / (1 - bar_t),
                         small_variance=beta * (1 - bar_next) / (1 - bar_t),
                         large_variance=beta)


def time_grid(start, steps):
    """The times that sampling in `steps` steps visits, in rising order: 0 = tau_0 < ... < tau_steps = start.

    tau_i = max(round(start (i / steps)^2), i). The square puts most steps at small times, where fine detail is decided.
    The maximum with i keeps all times distinct: at first the squares lie so close together that they would round to the
    same times."""
    return [max(round(start * (i / steps) ** 2), i) for i in range(steps + 1)]


def dpm_step(diffusion, x, x0, t, t_next, previous):
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) from x_t to x at t_next, with the predicted x0.
    `previous` is (t, x0) of the step before, or None in the first step.

    With ever more steps, the path of DDIM (the deterministic sampler, see `sample`) from noise to image approaches a
    smooth curve (the "probability flow ODE"). A solver follows this curve in few steps. Write
    x_t = a_t x0 + sigma_t eps, with a_t^2 = alpha_bar_t and sigma_t^2 = 1 - alpha_bar_t. If the predicted x0 were
    constant during the step, this would be exact:
        x_next = sigma_ratio x_t + (a_next - a_t sigma_ratio) x0,   sigma_ratio = sigma_next / sigma_t
    (It is a_next x0 + sigma_next eps, with eps = (x_t - a_t x0) / sigma_t. If x0 stays the same, so does eps, and many
    small steps end where one long step does.)
    DDIM takes this step with the x0 that is predicted at its beginning, as Euler's method would. This solver takes the
    x0 of the middle of the step, as the midpoint rule does, and so is of second order. The network is not asked there:
    the line through the two latest predictions is extended by half a step. Positions on the path are measured in
    lambda = log(a / sigma), for a reason given below. With h = lambda_next - lambda_t and
    h_before = lambda_t - lambda_before,
        x0_middle = x0 + (x0 - x0_before) / h_before * h / 2 = x0 + (x0 - x0_before) / (2 r),   r = h_before / h

    Why lambda? x / sigma = exp(lambda) x0 + eps. A step of DDIM keeps x0 and eps, so it changes x / sigma by x0 times
    the change of exp(lambda). In the limit of small steps, d(x / sigma) = x0 exp(lambda) d lambda. exp(lambda) is
    integrated exactly, which gives the formula above. Only x0 is taken at the middle."""
    a_t, a_next = math.sqrt(float(diffusion.alpha_bar[t])), math.sqrt(float(diffusion.alpha_bar[t_next]))
    sigma_ratio = math.sqrt((1 - a_next**2) / (1 - a_t**2))
    if previous is not None and t_next > 0:  # not in the first step, nor in the final one: its lambda_next is infinite
        t_before, x0_before = previous
        # lambda is half the logit of alpha_bar, since a^2 = alpha_bar and sigma^2 = 1 - alpha_bar.
        lambda_before, lambda_t, lambda_next = diffusion.alpha_bar[[t_before, t, t_next]].logit() / 2
        r = float((lambda_t - lambda_before) / (lambda_next - lambda_t))  # the step before, as a multiple of this one
        x0 = x0 + (x0 - x0_before) / (2 * r)
    return sigma_ratio * x + (a_next - a_t * sigma_ratio) * x0


@torch.no_grad()
def sample(diffusion, denoise, x, sampler, steps, gen=None, clamp=True, trajectory=None):
    """Run the reverse process from x = x_start (B, C, H, W) to a clean image, calling `denoise(x, t) -> prediction`
    once in each of `steps` steps. There cannot be more steps than times, so at most `start` are taken.

    `sampler` is one of
        ddpm   random (DDPM, algorithm 2). The noise that each step adds comes from `gen`. Its variance is
               large_variance if every time is visited (the two variances are nearly equal then, except at the smallest
               times). With skipped times it is small_variance: after a long step with the large one, x_next has far
               more noise than the network expects at time t_next.
        ddim   deterministic, of first order (Song et al. 2021, eq. 12 with sigma_t = 0)
        dpm    deterministic, of second order (DPM-Solver++)
    `trajectory`, a list, receives (t, x_t, predicted x0) of every step.
    (tests/test_common.py: test_oracle_returns_x0, test_samplers_improve_in_their_order)"""
    steps = min(steps, diffusion.start)
    previous = None  # (t, x0) of the step before, for dpm
    times = time_grid(diffusion.start, steps)
    for i in range(steps, 0, -1):
        t, t_next = times[i], times[i - 1]
        t_batch = torch.full((len(x),), t, device=x.device)  # (B,)
        x0, eps = diffusion.to_x0_and_eps(denoise(x, t_batch), x, t_batch, clamp)
        if trajectory is not None:
            trajectory.append((t, x, x0))
        if sampler == "ddpm":  # the posterior's mean, and noise in every step but the last
            posterior = diffusion.posterior(t, t_next)
            variance = posterior.large_variance if steps == diffusion.start else posterior.small_variance
            noise = randn(x.shape, gen) if t_next > 0 else 0.0
            x = posterior.x0_factor * x0 + posterior.xt_factor * x + math.sqrt(variance) * noise
        elif sampler == "ddim":  # the same x0 and eps, mixed with the factors of t_next
            x = diffusion.q_sample(x0, torch.full_like(t_batch, t_next), eps)
        else:  # "dpm"
            x = dpm_step(diffusion, x, x0, t, t_next, previous)
            previous = t, x0
    return x


# ---- 2. Networks -----------------------------------------------------------------------------------------------------

class BottleneckBlock(nn.Module):
    """The VAE's residual block (VDVAE, Child 2021, as DiffuseVAE uses it): (B, C, H, W) -> the same shape.

    Four convolutions (1x1, 3x3, 3x3, 1x1) with a GELU before each, half as many channels in between, and no
    normalisation. At resolution 1 all of a 3x3 window but its centre is padding, so the convolutions are 1x1. (The
    autoencoder of bonus_latent.py, whose resolution never falls to 1, passes no resolution.)"""

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


def init_keeping_variance(conv, fan_in):
    """Draw a layer's weights so that its output has its input's variance. `fan_in`: inputs that add up to an output.
    For the strided layers: no skip connection leads around them, and with torch's weights each of them would shrink the
    variance to a third or less."""
    nn.init.normal_(conv.weight, std=fan_in**-0.5)
    return conv


class Encoder(nn.Module):
    """x (B, 3, H, W) -> mean and log-variance of q(z | x), each (B, d).

    `table` lists (resolution, width, blocks) from the image down to resolution 1, whose width is d, as in [(32, 32, 0),
    (16, 64, 1), ..., (1, 128, 1)]. (16, 64, 1), (8, 96, 1) means two blocks at 16x16 with 64 channels, then a layer
    from 16x16 to 8x8 and from 64 channels to 96. There are blocks + 1 blocks before the resolution changes: the
    published tables count the last one as a part of the change. (The lowest level has `blocks` of them.)

    If `pool`, the resolution changes as published, by average pooling and a 1x1 convolution. Otherwise it changes by a
    strided convolution, which has a weight for every position in its window. An average does not tell positions apart,
    and the published network averages all the way down to 1x1. (Its 3x3 convolutions do the same at every position.) So
    only the zero padding at the border can tell it where things are, and it does not learn this in a short training.

    (PatchConv2d is an nn.Conv2d that is computed as a matrix product, since some processors compute such a convolution
    wrongly in bfloat16; see section 11.)"""

    def __init__(self, table, pool):
        super().__init__()
        layers = [nn.Conv2d(3, table[0][1], 3, padding=1, bias=False)]
        for level, level_below in itertools.pairwise(table):
            resolution, width, blocks = level
            resolution_below, width_below, _ = level_below
            layers += [BottleneckBlock(width, resolution) for _ in range(blocks + 1)]
            k = resolution // resolution_below
            if pool:
                layers += [nn.AvgPool2d(k), nn.Conv2d(width, width_below, 1, bias=False)]
            else:
                conv = PatchConv2d(width, width_below, k, stride=k, bias=False)
                layers += [init_keeping_variance(conv, fan_in=k * k * width)]
        resolution, d, blocks = table[-1]
        layers += [BottleneckBlock(d, resolution) for _ in range(blocks)]
        self.body = nn.Sequential(*layers)
        self.mu = nn.Conv2d(d, d, 1, bias=False)
        self.logvar = nn.Conv2d(d, d, 1, bias=False)

    def forward(self, x):
        h = self.body(x)  # (B, d, 1, 1)
        return self.mu(h).flatten(1).float(), self.logvar(h).flatten(1).float()


class Decoder(nn.Module):
    """z (B, d) -> x_hat (B, 3, H, W) in [-1, 1].

    `table` lists (resolution, width, blocks) from resolution 1 up to the image. (Here each level has `blocks` blocks;
    the encoder's `blocks + 1` does not apply.) Between two levels there is nearest upsampling and a 1x1 convolution as
    published (`pool`), or a transposed convolution (see Encoder)."""

    def __init__(self, table, pool):
        super().__init__()
        layers = []
        for level, level_above in itertools.pairwise(table):
            resolution, width, blocks = level
            resolution_above, width_above, _ = level_above
            layers += [BottleneckBlock(width, resolution) for _ in range(blocks)]
            k = resolution_above // resolution
            if pool:
                layers += [nn.Upsample(scale_factor=k), nn.Conv2d(width, width_above, 1, bias=False)]
            else:
                conv = PatchConvTranspose2d(width, width_above, k, stride=k, bias=False)
                # Windows do not overlap (k is also the stride), so each output pixel is made from one input pixel.
                layers += [init_keeping_variance(conv, fan_in=width)]
        resolution, width, blocks = table[-1]
        layers += [BottleneckBlock(width, resolution) for _ in range(blocks)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z):
        pixels = torch.sigmoid(self.body(z[:, :, None, None]).float())  # (B, 3, H, W) in [0, 1], as published
        return 2 * pixels - 1


class VAE(nn.Module):
    """The bottleneck-residual VAE of DiffuseVAE (Pandey et al. 2022); its code z is a vector, (B, d)."""

    def __init__(self, encoder_table, decoder_table, pool):
        super().__init__()
        self.encoder, self.decoder = Encoder(encoder_table, pool), Decoder(decoder_table, pool)
        self.latent_dim = encoder_table[-1][1]

    def forward(self, x0, noise):
        """x0 (B, 3, H, W), noise (B, d) standard normal -> x_hat, mu, logvar."""
        mu, logvar = self.encoder(x0)
        return self.decoder(reparameterise(mu, logvar, noise)), mu, logvar


def reparameterise(mu, logvar, noise):
    """z ~ N(mu, exp(logvar)), computed from standard normal noise so that gradients reach mu and logvar (Kingma &
    Welling 2014, 2.4). All (B, d)."""
    return mu + (0.5 * logvar).exp() * noise


def squared_error(x_hat, x0):
    """Sum of squared differences of two images (B, 3, H, W) in [-1, 1], in units of images in [0, 1]: (B,). The range
    [-1, 1] is twice as wide, which makes squares four times as large; hence the division."""
    return ((x_hat - x0) ** 2).flatten(1).sum(1) / 4


def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)), summed over the dimensions of (B, d): (B,) nats."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)


def gaussian_log_prob(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over the dimensions of (B, d): (B,) nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(1)


def active_units(mu):
    """Which dimensions of the code are in use: those whose mean mu (N, d) has a variance above 0.01 over the images
    (the threshold of Burda et al. 2016, 5.2): (d,) of bool."""
    return mu.var(0) > 0.01


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32, with 32 groups as published. Widths that are no multiple of 128 have fewer: the largest
    power of two that divides a quarter of the width. So a group has at least four channels.

    (Where networks run in bfloat16, by torch.autocast, torch itself takes float32 for this layer on a GPU. On a CPU it
    would not, which is coarser and was four times as slow.)"""

    def __init__(self, width):
        super().__init__(math.gcd(32, width // 4), width)  # widths 128, 96 and 48: 32, 8 and 4 groups

    def forward(self, x):
        return super().forward(x.float())


def zero_init(module):
    """Set a layer's parameters to zero. If it is the last one of a residual block, the block adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """The U-Net's block (DDPM): GroupNorm, SiLU, 3x3 convolution, twice, with the time embedding added in between.
    x (B, width_in, H, W), emb (B, emb_dim) -> (B, width_out, H, W). The second convolution starts at zero. `emb` has
    been through a SiLU already, once for all blocks."""

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
    """Self-attention over all positions: (B, C, H, W) -> the same shape. The output projection starts at zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, GroupNorm(width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), zero_init(nn.Conv2d(width, width, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x))  # (B, 3 C, H, W)
        qkv = qkv.view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2)  # (B, 3, heads, H W, C / heads)
        q, k, v = qkv.unbind(1)  # each (B, heads, H W, C / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        return x + self.out(y)


class UNet(nn.Module):
    """The U-Net of DDPM: x (B, in_channels, H, W), t (B,) in 1..T -> (B, out_channels, H, W), zero before training.

    `table` lists (resolution, width, blocks on the way down, blocks on the way up) from the image's resolution down:
    [(32, 128, 2, 3), (16, 256, 2, 3), ...]. On the way down every level makes a stack of feature maps: the one that
    enters the level, and the output of each of its blocks. On the way up each block of the level takes the map from the
    stack that was put there last, and sees it beside its input (a skip connection).
        In DDPM every level has one more block on the way up than on the way down, and all maps are taken: (32, 128, 2,
        3) puts three maps on the stack and takes three.
        Most levels of our small networks have only as many blocks up as down, to save time. Then the first map, the one
        that entered the level, is never used: (32, 32, 1, 1) puts two maps on the stack and takes one.
    As an example, [(32, 32, 1, 1), (16, 64, 1, 1)] makes skip_widths [[32, 32], [32, 64]]. On the way up, the block at
    resolution 16 takes the map with 64 channels, and the block at 32 the second of its two maps with 32.
    `attention` lists the resolutions that have self-attention; the middle of the network always has it. `extra` (B, 4 *
    first width), if given, is added to the time embedding. Stage 3 uses it."""

    def __init__(self, table, in_channels, out_channels=3, attention=(16,), heads=1, dropout=0.0):
        super().__init__()
        width = table[0][1]  # from here on: the number of channels at the place that we have reached
        # The embedding of t has a sine and a cosine for each frequency, `width` numbers in all.
        self.frequencies = width // 2
        emb_dim = 4 * width  # as in DDPM
        self.time = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)

        def block(width_in, width_out, resolution):
            return nn.ModuleList([ResidualBlock(width_in, width_out, emb_dim, dropout),
                                  Attention(width_out, heads) if resolution in attention else nn.Identity()])

        # The way down. skip_widths has, for every level, the widths of the feature maps on its stack.
        self.down, self.shrink, skip_widths = nn.ModuleList(), nn.ModuleList(), []
        for resolution, level_width, down_blocks, _ in table:
            skip_widths.append([width])
            self.down.append(nn.ModuleList())
            for _ in range(down_blocks):
                self.down[-1].append(block(width, level_width, resolution))
                width = level_width
                skip_widths[-1].append(width)
            self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))  # the last one is dropped below
        self.middle = nn.ModuleList([ResidualBlock(width, width, emb_dim, dropout), Attention(width, heads),
                                     ResidualBlock(width, width, emb_dim, dropout)])
        # The way up, from the lowest level to the highest. Each block takes the topmost feature map from the stack.
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for resolution, level_width, _, up_blocks in reversed(table):
            widths = skip_widths.pop()
            self.up.append(nn.ModuleList())
            for _ in range(up_blocks):
                skip_width = widths.pop()
                self.up[-1].append(block(width + skip_width, level_width, resolution))
                width = level_width
            self.grow.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        # Nothing lies below the lowest level or above the highest, so these two convolutions are dropped again. (They
        # were made only to use up the random numbers that they used in the committed results.)
        self.shrink[-1] = self.grow[-1] = nn.Identity()
        self.norm, self.out = GroupNorm(width), zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x, t, extra=None):
        # The time as sines and cosines of many frequencies, from 1 down towards 1/10,000 (Vaswani et al. 2017, 3.5)
        frequency = torch.exp(-math.log(10_000) * torch.arange(self.frequencies, device=x.device) / self.frequencies)
        angle = t[:, None].float() * frequency  # (B, frequencies)
        emb = self.time(torch.cat([angle.cos(), angle.sin()], 1))  # (B, 4 * first width)
        emb = F.silu(emb if extra is None else emb + extra)  # every block's linear layer expects it after a SiLU
        h, skips = self.stem(x), []  # skips: the stack of every level
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            skips.append([h])
            for residual, attention in blocks:
                h = attention(residual(h, emb))
                skips[-1].append(h)
            h = shrink(h)
        residual1, attention, residual2 = self.middle
        h = residual2(attention(residual1(h, emb)), emb)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            level_skips = skips.pop()
            for residual, attention in blocks:
                h = attention(residual(torch.cat([h, level_skips.pop()], 1), emb))
            h = grow(h)
        return self.out(F.silu(self.norm(h))).float()


def build_vae(train):
    """The VAE of the settings `train`, a dictionary as `budget` makes it (section 8)."""
    return VAE(train["encoder"], train["decoder"], train["pool"])


def build_unet(train, in_channels):
    """The U-Net of the settings `train`. Its input is x_t (3 channels), followed by what conditions it."""
    return UNet(train["unet"], in_channels, attention=train["attention"], heads=train["heads"],
                dropout=train["dropout"])


def frozen(network, weights, device):
    """Load weights into a network; put it on the device, in evaluation mode and without gradients. Returns it."""
    network.load_state_dict(weights)
    return network.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)


# ---- 3. Priors over z ------------------------------------------------------------------------------------------------

class StandardNormal:
    """N(0, I) over codes z of dimension d: what the KL term of the VAE's loss pulls towards."""

    def __init__(self, d):
        self.d = d

    def log_prob(self, z):
        """Log density: (N, d) -> (N,) nats."""
        return torch.distributions.Normal(0, 1).log_prob(z).sum(1)

    def sample(self, count, gen):
        """`count` draws (count, d) from a CPU generator."""
        return torch.randn(count, self.d, generator=gen)


class GaussianMixture:
    """A Gaussian mixture, fitted after the VAE is trained ("ex post") by expectation maximisation (EM; Bishop 2006,
    9.2.2). Each round first computes how much each code belongs to each component, and then each component's weight,
    mean and covariance from the codes that belong to it.

    As published, each component has a covariance of its own. If they are `tied`, all components share one. Then even
    thousands of components can be fitted, each to a handful of codes.
    Attributes, float32 on the CPU:
        weights (K,)
        means   (K, d)
        factors (K, d, d) or, if all share a covariance, (1, d, d): the lower Cholesky factors of the covariances"""

    def __init__(self, weights, means, factors):
        self.weights, self.means, self.factors = weights.float(), means.float(), factors.float()

    @classmethod
    def fit(cls, z, components, seed, tied=False, rounds=6, subset=10_000):
        """The mixture fitted to codes z (N, d). If `tied`, all components share a covariance.

        It begins with the cluster means of k-means, and one covariance, that of the codes about the mean of their
        cluster. (If it began with random codes, a few rounds of EM would end in a worse mixture: on faces refined
        samples became clearly worse.) If `tied`, there may be thousands of components, for which k-means would take
        minutes. Then a cluster has a few codes only, and each of them can stand for its mean. So it begins with random
        codes, and with the covariance of all codes.

        This first mixture is improved by `rounds` of EM on a part of the codes, for speed (`subset` of them, or 20 for
        each component if that is more), and by two rounds on all codes."""
        # Subtracted while fitting, because em_round computes a covariance as E[z z^T] - mean mean^T. Far from 0, that
        # is a small difference of large numbers.
        centre = z.mean(0)
        # In random order, since the first ones are used below, and image files may be sorted by class.
        order = torch.randperm(len(z), generator=generator(seed))
        z = (z - centre).cpu()[order]
        part = z[: max(subset, 20 * components)]
        if tied:
            means = z[:components]
            residuals = z  # about the mean of all codes, which is 0
        else:
            means, cluster = kmeans2(part.numpy(), min(components, len(part)), minit="++", rng=seed)
            means = torch.from_numpy(means)
            residuals = part - means[torch.from_numpy(cluster).long()]
        weights = torch.full((len(means),), 1 / len(means))
        covariance = residuals.T.cov()  # (d, d); cov wants a row for each dimension
        mixture = cls(weights, means, cls.factors_of(covariance[None]))  # shared by all, at first
        codes_of_rounds = [part] * rounds + [z] * 2
        for codes in tqdm(codes_of_rounds, desc=f"fitting {len(means):,} Gaussians", unit="round", leave=False):
            mixture = mixture.em_round(codes, tied)
        mixture.means += centre.cpu()
        return mixture

    @staticmethod
    def factors_of(covariances):
        """The lower Cholesky factors of covariances (K, d, d). To each a ridge of 0.001 I is added, so that it can be
        inverted even where a component has hardly any z. If the codes are large, the rounding errors of their
        covariances can be larger than that. Then more is added."""
        ridge = torch.full((len(covariances), 1, 1), 1e-3)
        while ridge.max() < 1e3:
            factors, failed = torch.linalg.cholesky_ex(covariances + ridge * torch.eye(covariances.shape[1]))
            if not failed.any():
                return factors
            ridge[failed > 0] *= 10
        fail("the mixture of Gaussians cannot be fitted: the codes are too large; a larger beta may help")

    def em_round(self, z, tied):
        """One round of EM on z (N, d): the mixture that follows this one. (tests/test_common.py: test_em_by_hand)"""
        K, d = self.means.shape
        # E step: the sums over all z that the M step needs, each z weighted by how much it belongs to a component.
        mass = torch.full((K,), 1e-9)  # positive so that it can be divided by
        sums = torch.zeros(K, d)  # of z
        products = torch.zeros(1 if tied else K, d, d)  # of z z^T
        for chunk, log_joint in self.log_joints(z):
            belongs = log_joint.softmax(1)  # (n, K), rows add up to 1
            mass, sums = mass + belongs.sum(0), sums + belongs.T @ chunk
            if tied:  # summed over all components: sum_k belongs_k z z^T = z z^T, since each row adds up to 1
                products[0] += chunk.T @ chunk
            else:
                for k in range(K):
                    own = belongs[:, k] > 0  # in high dimensions most of these are exactly 0 in float32: skip them
                    products[k] += (belongs[own, k, None] * chunk[own]).T @ chunk[own]
        # M step: new weights, means and covariances. A covariance is E[z z^T] - mean mean^T. If it is shared, it is
        # 1/N sum_n z z^T - 1/N sum_k mass_k mean_k mean_k^T, where mass_k mean_k = sums_k.
        means = sums / mass[:, None]
        if tied:
            covariances = ((products[0] - sums.T @ means) / len(z))[None]
        else:
            covariances = products / mass[:, None, None] - means[:, :, None] * means[:, None]
        return GaussianMixture(mass / mass.sum(), means, self.factors_of(covariances))

    def log_joints(self, z):
        """log(weight_k N(z; mean_k, covariance_k)) for z (N, d). Yields a few rows of z at a time, (n, d), and their
        logarithms, (n, K). How it does so is arranged for speed, and can be skipped on first reading.

        With a covariance's Cholesky factor L, a logarithm is
            log weight - log det L - 1/2 |L^-1 z - L^-1 mean|^2 - d/2 log(2 pi)
        The square is multiplied out, so that all distances to all components come from one matrix product."""
        K, d = self.means.shape
        groups = len(self.factors)  # number of covariances: K or, if they share one, 1
        centre = self.means.mean(0)  # subtracted from both sides, since large numbers would lose digits
        inverse = torch.linalg.solve_triangular(self.factors, torch.eye(d), upper=False)  # L^-1, (groups, d, d)
        # L^-1 mean: (K, 1, d) or, with one covariance, (1, K, d)
        white_means = (inverse @ (self.means - centre)[:, :, None]).view(groups, K // groups, d)
        log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)  # of L, (groups,)
        log_scale = (self.weights.log() - log_det).view(groups, 1, -1)  # (K, 1, 1) or (1, 1, K)
        constant = log_scale - 0.5 * white_means.square().sum(2)[:, None] - 0.5 * d * math.log(2 * math.pi)
        rows = max(100, min(2000, 750_000 // K))  # so that a chunk and its logarithms stay in a processor's cache
        for chunk in z.cpu().split(rows):
            white = (chunk - centre) @ inverse.mT  # L^-1 z, (groups, n, d)
            # log_scale - 1/2 |white - white_means|^2 - d/2 log(2 pi), multiplied out: (groups, n, K / groups). It is
            # computed in place, since these are the largest arrays of the fit.
            joint = (white @ white_means.mT).add_(constant).sub_(0.5 * white.square().sum(2, keepdim=True))
            yield chunk, joint.movedim(0, 1).flatten(1)  # (n, groups, K / groups), then (n, K)

    @torch.autocast("cpu", enabled=False)  # (fid.bits_per_dim calls it in bfloat16, which would be wrong by nats)
    def log_prob(self, z):
        """Log density: (N, d) -> (N,) nats."""
        return torch.cat([log_joint.logsumexp(1) for _, log_joint in self.log_joints(z)])

    def sample(self, count, gen):
        """`count` draws (count, d) from a CPU generator. Every row has a random component, so any part of the rows
        is a fair sample, too."""
        components = torch.multinomial(self.weights, count, replacement=True, generator=gen)
        noise = torch.randn(count, self.means.shape[1], generator=gen)
        factors = self.factors.expand(len(self.means), -1, -1)  # (K, d, d)
        z = []
        # A thousand draws at a time, since factors[k] copies a matrix (d, d) for each of them.
        for k, eps in zip(components.split(1000), noise.split(1000), strict=True):
            z.append(self.means[k] + (factors[k] @ eps[:, :, None])[:, :, 0])
        return torch.cat(z)


# ---- 4. A model: draw z, decode it to x_hat, add noise (x_start), refine ---------------------------------------------

@dataclasses.dataclass
class Model:
    """What every stage hands to sampling and evaluation: a VAE, a diffusion model, or a VAE with a diffusion model that
    refines its images."""

    name: str
    device: torch.device
    shape: tuple  # (C, H, W) of what is diffused
    diffusion: Diffusion  # a VAE alone has one, too, only because evaluation and choose_precision read its `start`
    networks: tuple = ()  # all that it consists of: their parameters are counted
    vae: VAE | None = None
    priors: dict = dataclasses.field(default_factory=dict)  # over z, by name; each has sample(count, gen), log_prob(z)
    # denoiser_for(x_hat, z, clean) is called once for each batch. It returns the function denoise(x, t) that `sample`
    # calls in every step. x_hat is what the refiner is shown, and z its code. `clean` is Dec(z): x_hat itself, or
    # x_hat before noise was added to it, to test the refiner (`damage` in `generate`). Only stage 3 uses z and clean. A
    # VAE alone has no denoiser_for.
    denoiser_for: Callable | None = None
    decode: Callable | None = None  # from latents to images, if it is latents that are diffused (bonus_latent.py)
    evaluations: int = 1  # how many networks run in each sampling step
    temperature: float = 1.0  # factor of the noise in x_start; below 1 there are fewer artefacts and less detail
    reduced: bool = False  # whether it samples in bfloat16; see choose_precision


@torch.no_grad()
def encode(vae, images, device, batch=500):
    """uint8 images (N, 3, H, W) -> mu, logvar of q(z | x), each (N, d) on the CPU."""
    parts = [vae.encoder(to_float(chunk.to(device))) for chunk in images.split(batch)]
    mu, logvar = zip(*parts, strict=True)
    return torch.cat(mu).cpu(), torch.cat(logvar).cpu()


def draw_codes(vae, images, seed, device):
    """Codes z ~ q(z | x) of the training images, (N, d) on the CPU, to which priors are fitted.

    There are about 60,000 codes in all, but at least one and at most ten of each image: more codes of the same image
    add little. With only a few codes, a prior would also fit the noise that happened to be drawn."""
    gen = generator(seed + SEEDS["mixture"])
    mu, logvar = encode(vae, images, device)
    draws = max(1, min(10, 60_000 // len(mu)))
    z = torch.cat([reparameterise(mu, logvar, randn(mu.shape, gen)) for _ in range(draws)])
    if not (z.abs() < 100).all():  # so written it also catches nan, for which every comparison is false
        fail("the VAE diverged: its codes are not finite, or beyond 100; a larger --batch-size, with another --out, "
             "may help")
    return z


def fit_mixture(vae, images, train, device):
    """The Gaussian mixture fitted to codes of the training images: its attributes, for a checkpoint."""
    z = draw_codes(vae, images, train["seed"], device)
    mixture = GaussianMixture.fit(z, train["components"], train["seed"], train["tied"])
    return {"weights": mixture.weights, "means": mixture.means, "factors": mixture.factors}


@torch.no_grad()
def refine(model, x_hat, z, gen, sampler, steps, clean=None, trajectory=None):
    """Refine x_hat (B, C, H, W) with its code z (B, d): images in [-1, 1], or latents. Of a VAE alone, x_hat itself
    comes back. If noise was added to x_hat, `clean` is x_hat without it.

    The noise of x_start is drawn from `gen`, a CPU generator, so that it is the same on every device. Of the samplers,
    only `ddpm` draws noise in its steps. It comes from a new generator on the device, for speed, whose seed is that of
    `gen` plus one. `trajectory`: see sample."""
    if model.denoiser_for is None:
        return x_hat
    x_start = model.diffusion.x_start(x_hat, model.temperature * randn(x_hat.shape, gen).to(model.device))
    step_gen = generator(gen.initial_seed() + 1, model.device)  # initial_seed: the number that `gen` was made with
    with autocast(model.device, model.reduced):
        denoise = model.denoiser_for(x_hat, z, x_hat if clean is None else clean)
        return sample(model.diffusion, denoise, x_start, sampler, steps, step_gen,
                      clamp=model.decode is None, trajectory=trajectory)  # a latent has no range to be clamped to


@torch.no_grad()
def generate(model, count, prior, sampler, steps, seed, batch, damage=0.0):
    """Generate `count` images. Returns x_hat and the refined images, uint8 (count, 3, H, W) on the CPU, and the seconds
    per image. (Without a VAE, x_hat is grey, and has the shape of what is diffused.)

    Every batch has a generator of its own. So, at the same `batch`, image k is made from the same z and noise whatever
    the sampler, the steps and the count.

    `damage` is the standard deviation of noise that is added to x_hat before it is refined, or to a diffused latent
    before it is decoded: evaluation tests with it how well a model copes with a bad x_hat. Several processes share the
    batches between them."""
    parts = []
    offsets = range(0, count, batch)[RANK::RANKS]  # the share of process RANK of RANKS; with a single process, all
    for offset in tqdm(offsets, desc=f"{model.name} {prior} {sampler} {steps}", leave=False, disable=len(offsets) < 2):
        clock = time.time()
        # This number differs for every batch and --seed, and from all other seeds (SEEDS, section 11).
        gen = generator(1_000_000 * (seed + 1) + offset)
        damage_gen = generator(gen.initial_seed() + 2)  # plus 1 is taken: `refine` uses it for the noise of ddpm
        if model.vae is None:
            z, x_hat = None, torch.zeros(batch, *model.shape, device=model.device)
            clean = x_hat
        else:
            z = model.priors[prior].sample(batch, gen).to(model.device)
            with autocast(model.device, model.reduced):
                clean = model.vae.decoder(z)
            x_hat = clean + damage * randn(clean.shape, damage_gen).to(model.device)
        x = refine(model, x_hat, z, gen, sampler, steps, clean)
        if model.decode is not None:
            x = x + damage * randn(x.shape, damage_gen).to(model.device)
            with autocast(model.device, model.reduced):
                x = model.decode(x)
        parts.append((to_uint8(x_hat).cpu(), to_uint8(x).cpu(), time.time() - clock))
    before, after, seconds = zip(*gather(parts), strict=True)  # of one process, gather returns `parts` as it is
    return torch.cat(before)[:count], torch.cat(after)[:count], sum(seconds) / (batch * len(seconds))


def headline(model, evaluation):
    """Prior, sampler and steps with which a model is judged first, and with which samples are shown and exported."""
    prior = evaluation["prior"] if model.vae is not None else "none"
    if model.denoiser_for is None:
        return prior, "none", 0
    return prior, evaluation["sampler"], evaluation["sample_steps"]


# ==== Part II, the machinery: how the models above are fed, trained and kept. To be looked up. ========================

# ---- 5. The likelihood bound of a diffusion model --------------------------------------------------------------------

# The variational bound of a diffusion model, in nats per image (DDPM eq. 5):
#     -log p(x0) <= KL(q(x_start | x0) || p(x_start)) + sum over t = 2..start of KL_t + L_0
# The next functions compute its terms, and `diffusion_nats` its three parts for given images.

def kl_step(diffusion, x0, x0_predicted, t):
    """KL_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for times t (B,) from 2 on, (B,) nats. The model p has the
    predicted x0 in place of x0, and large_variance (see Posterior). The means differ by
    x0_factor * (x0 - x0_predicted)."""
    posteriors = [diffusion.posterior(time, time - 1) for time in t.tolist()]
    x0_factor = torch.tensor([p.x0_factor for p in posteriors], device=x0.device)  # (B,)
    small = torch.tensor([p.small_variance for p in posteriors], device=x0.device)  # (B,)
    large = torch.tensor([p.large_variance for p in posteriors], device=x0.device)  # (B,)
    from_variances = 0.5 * x0[0].numel() * (large.log() - small.log() + small / large - 1)
    return from_variances + x0_factor**2 / (2 * large) * ((x0 - x0_predicted) ** 2).flatten(1).sum(1)


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
    the bins of the values 0 and 255 reach to infinity. As in DDPM's code, sd^2 is the small variance at t = 2, and no
    probability counts as less than 1e-12, so a wrong pixel costs 28 nats at most. In float64 on the CPU."""
    sd = math.sqrt(diffusion.posterior(2, 1).small_variance)
    x, mean = x0.cpu().double(), x0_predicted.cpu().double()
    ndtr = torch.special.ndtr  # the distribution function of N(0, 1)
    # 1 for the value 255, whose bin has no upper edge; 0 for the value 0, whose bin has no lower one
    below_upper = torch.where(x < 0.999, ndtr((x + 1 / 255 - mean) / sd), 1.0)
    below_lower = torch.where(x > -0.999, ndtr((x - 1 / 255 - mean) / sd), 0.0)
    return -(below_upper - below_lower).clamp(min=1e-12).log().flatten(1).sum(1).float().to(x0.device)


@torch.no_grad()
def diffusion_nats(diffusion, denoise, images, x_hat, draws, gen):
    """The three parts of the bound for uint8 `images`: {"prior", "diffusion", "data"}, each (B,) nats on the CPU.

    The sum over t is estimated from `draws` random times per image. The range of times is cut into that many equal
    pieces, and one time is drawn from each. (With `draws = start - 1` each time is used exactly once.) With few draws,
    most of the error comes from the smallest times, whose terms are largest. Two models whose `gen` has the same seed
    share this error, so their difference is known far better than each value."""
    x0, terms = to_float(images), diffusion.start - 1
    total = torch.zeros(len(x0), device=x0.device)
    for k in range(draws):
        u = torch.rand(len(x0), generator=gen, device=gen.device)
        position = (k + u.cpu().double()) * terms / draws  # (B,), in the k-th of `draws` pieces of 0..terms
        t = 2 + position.long().clamp(max=terms - 1).to(x0.device)  # (B,); rounding might have given `terms`
        x_t = diffusion.q_sample(x0, t, randn(x0.shape, gen))
        x0_predicted, _ = diffusion.to_x0_and_eps(denoise(x_t, t), x_t, t)
        total += kl_step(diffusion, x0, x0_predicted, t) * terms / draws
    one = torch.ones(len(x0), dtype=torch.long, device=x0.device)
    x1 = diffusion.q_sample(x0, one, randn(x0.shape, gen))
    x0_predicted, _ = diffusion.to_x0_and_eps(denoise(x1, one), x1, one)
    return {"prior": kl_prior(diffusion, x0, x_hat).cpu(), "diffusion": total.cpu(),
            "data": data_nats(diffusion, x0, x0_predicted).cpu()}


# ---- 6. The built-in data --------------------------------------------------------------------------------------------

FACTORS = ("size", "x", "y", "hue sine", "hue cosine", "tilt", "lightness", "detail", "band direction")


def draw_shapes(count, seed):
    """The built-in data set: `count` anti-aliased shapes on a grey ground, drawn in random sizes, places and colours.

    A third of the shapes are plain, a third have broad bands, a third fine bands. Outline, place, colour and broad
    bands are what a small VAE can keep; fine bands and crisp edges are what it loses. So the refiner has something to
    restore, and images differ in how much. The bands have two tones and are fixed to the pixel grid: horizontal,
    vertical or diagonal, with a period of 8 pixels (broad) or of 3 or 4 pixels (fine).
    Returns uint8 images (count, 3, 32, 32), int64 labels (count,) and the FACTORS, float32 (count, 9) in about -1..1.
    """
    gen, size = generator(seed), 32

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=gen)

    label = torch.randint(6, (count,), generator=gen)
    detail = torch.randint(3, (count,), generator=gen)  # 0 plain, 1 broad bands, 2 fine bands
    direction = torch.randint(3, (count,), generator=gen)
    period = torch.where(detail == 2, torch.randint(3, 5, (count,), generator=gen), 8)
    radius, cx, cy, tilt, hue = uniform(9, 12), uniform(13, 19), uniform(13, 19), uniform(-0.25, 0.25), uniform(0, 1)
    lightness, lighter_side = uniform(0.1, 0.55), uniform(0, 2 * math.pi)  # of the ground, and where it gets lighter
    # HSV to RGB at full saturation and value. Hues are a circle of 360 degrees, with red at 0, green at 120 and blue at
    # 240. A channel is 1 within 60 degrees of its own hue, and falls to 0 over the next 60.
    pure_hue = ((hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3).abs().sub(1).clamp(0, 1)  # (N, 3)
    colour = pure_hue * 0.75 + 0.2
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    band_axes = torch.stack([rows, columns, rows + columns])  # (3, H, W): for horizontal, vertical, diagonal bands

    def render(label, colour, direction, *numbers):
        """P images (P, 3, H, W), in [0, 1] or a little outside, from factors (P,) and colours (P, 3)."""
        # Every number (in the order of `numbers` below) becomes (P, 1, 1), to meet the pixels (H, W).
        radius, cx, cy, tilt, lightness, lighter_side, detail, period = (values[:, None, None] for values in numbers)
        x, y = columns + 0.5 - cx, rows + 0.5 - cy  # (P, H, W)
        u = (x * tilt.cos() + y * tilt.sin()) / radius  # the shape's own frame, in which it has radius 1
        v = (y * tilt.cos() - x * tilt.sin()) / radius
        rho = torch.hypot(u, v)
        half = math.pi / 5  # half the angle between two tips of the star
        to_tip = ((torch.atan2(u, -v) + half) % (2 * half) - half).abs()  # angle to the star's nearest tip
        arm, bar = torch.maximum(u.abs() - 0.95, v.abs() - 0.33), torch.maximum(u.abs() - 0.33, v.abs() - 0.95)
        distances = torch.stack([  # signed distance to each outline, negative inside, nearly exact close to it
            rho - 0.9,  # disc
            (rho - 0.68).abs() - 0.25,  # ring
            torch.maximum(u.abs(), v.abs()) - 0.78,  # square
            torch.maximum(v, 0.866 * u.abs() - v / 2) - 0.53,  # triangle with equal sides: 0.866 = sin 60 degrees
            # Star: a straight edge from a tip (radius 1) to a notch (radius 1/2); (0.443, 0.897) is the edge's normal.
            0.443 * (rho * to_tip.cos() - 1) + 0.897 * rho * to_tip.sin(),
            torch.minimum(arm, bar),  # cross, of two rectangles
        ], dim=1)  # (P, 6, H, W)
        distance = distances[torch.arange(len(label)), label]  # (P, H, W)
        cover = (0.5 - distance * radius).clamp(0, 1)[:, None]  # in pixels; share of the pixel inside the outline
        along = band_axes[direction]  # (P, H, W)
        light = (detail == 0) | (along % period < period // 2)  # which of the two tones
        ground = lightness + 0.3 * ((columns - 16) * lighter_side.cos() + (rows - 16) * lighter_side.sin()) / size
        inside = colour[:, :, None, None] * torch.where(light, 1.0, 0.65)[:, None]  # (P, 3, H, W)
        return ground[:, None] * (1 - cover) + inside * cover

    numbers = (radius, cx, cy, tilt, lightness, lighter_side, detail, period)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for part in torch.arange(count).split(1000):  # P images at a time
        image = render(label[part], colour[part], direction[part], *(values[part] for values in numbers))
        images[part] = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    factors = torch.stack([(radius - 10.5) / 1.5, (cx - 16) / 3, (cy - 16) / 3, (2 * math.pi * hue).sin(),
                           (2 * math.pi * hue).cos(), tilt * 4, (lightness - 0.325) * 4.4, detail - 1.0,
                           (direction - 1.0) * (detail > 0)], dim=1)
    return images, label, factors


# ---- 7. Messages and files -------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


def fail(message):
    """Print one line that says what is wrong and what to do about it, and exit with status 2."""
    print(f"\nerror: {message}", file=sys.stderr)  # on a line of its own, should a progress bar be on the screen
    raise SystemExit(2)


def end_in_a_line(kind, error, trace):
    """For sys.excepthook: Ctrl-C ends in one line in place of a traceback. Other errors are shown as ever."""
    if issubclass(kind, KeyboardInterrupt):
        tqdm.write("\nstopped (training of a stage goes on with --resume)", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def write(path, data, optional=False):
    """Write bytes under a temporary name, then rename the file, so that nobody ever sees half of it. Of several
    processes only the first writes. If it cannot be written, an older file of this name stays as it was. Then the
    program ends or, if the file is `optional`, such as a cache, goes on with a warning."""
    if RANK > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut after the renaming could leave an empty file
        os.replace(temporary, path)
    except OSError as error:
        if optional:
            print(f"warning: cannot write {path}: {error.strerror}; going on without it", file=sys.stderr)
            return
        fail(f"cannot write {path}: {error.strerror}; free some space or allow writing there, or choose another --out "
             "/ --data-dir")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_with(path, save, optional=False, **options):
    """Write what `save(file, **options)` produces: a picture's .save, a figure's .savefig, np.savez, torch.save."""
    buffer = io.BytesIO()
    save(buffer, **options)
    write(path, buffer.getbuffer(), optional)


def write_json(path, data):
    """Write `data` as JSON. Raises ValueError if a number in it is not finite."""
    write(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def save_state(path, state, optional=False):
    """Write `state` (tensors and plain values) with torch.save. A `*` in the file's name becomes the first eight digits
    of the sha256 of its bytes. Returns the path."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    path = path.with_name(path.name.replace("*", hashlib.sha256(data).hexdigest()[:8]))
    write(path, data, optional)
    return path


def load_state(path):
    """What save_state wrote, on the CPU. Raises some error if the file is damaged. (`weights_only`: a file cannot run
    code.)"""
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums that torch.save wrote
        if archive.testzip():
            raise ValueError(f"wrong checksum of {archive.testzip()}")
    return torch.load(path, map_location="cpu", weights_only=True)


def find_hashed(folder, name):
    """The files FOLDER/<name>-<hash8>.pt, which `save_state` wrote as FOLDER/<name>-*.pt."""
    return sorted(Path(folder).glob(f"{glob.escape(name)}-{'[0-9a-f]' * 8}.pt"))


def load_hashed(found, what, advice, sha256=None):
    """Load the one file in the list `found`, on the CPU. Fails, saying `what` is loaded and giving `advice`, if there
    is not exactly one, if it cannot be read, or if the sha256 of its bytes is wrong: it must equal `sha256` or, if
    that is not given, begin with the eight digits at the end of the file's name."""
    if len(found) != 1:
        fail(f"{what}: {len(found)} files, one is needed; {advice}")
    try:
        data = found[0].read_bytes()
    except OSError as error:
        fail(f"{what} {found[0]}: {error.strerror}; {advice}")
    if sha256 is None and not found[0].match(f"*-{'[0-9a-f]' * 8}.pt"):
        fail(f"{what} {found[0]}: the name must end in -<8 hexadecimal digits>.pt, the first of its sha256; {advice}")
    if not hashlib.sha256(data).hexdigest().startswith(sha256 or found[0].stem[-8:]):
        fail(f"{what} {found[0]}: {len(data):,} bytes, wrong sha256 (cut off, or another file); {advice}")
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def half(weights):
    """Weights {name: tensor} with their matrices in half precision, for files. Loading makes them float32 again."""
    return {key: value.half() if value.dim() > 1 else value for key, value in weights.items()}


def find_images(folder):
    """All image files in a folder and below it, sorted by path (none if there is no such folder). Hidden files and
    folders are left out. Links to folders are followed, but no folder is entered twice. Fails if a folder cannot be
    listed."""
    def stop(error):
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            fail(f"{error.filename}: {error.strerror}; allow reading it, or move it away")

    found, entered = [], {os.path.realpath(folder)}
    for home, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        chosen = []
        for name in sorted(folders):
            place = os.path.realpath(os.path.join(home, name))
            if not name.startswith(".") and place not in entered:  # a link may lead back to a folder above it
                entered.add(place)
                chosen.append(name)
        folders[:] = chosen  # os.walk enters these alone
        paths = [Path(home, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    return sorted(found)


def read_image(path):
    """An image file as an upright RGB PIL image, without transparency. Of 16-bit grey images the upper 8 bits are kept
    (PIL's own conversion would clip them at 255). Fails, naming the file, if it cannot be read, or if its pixels are
    floats or 32-bit integers."""
    try:
        with Image.open(path) as image:
            # In PNG and PPM, "I" stands for 16 bits, too.
            if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                raise ValueError("which number is white is unknown; save it with 8 or 16 bits")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # PIL raises many kinds for damaged files
        fail(f"{path}: cannot be read as an image ({error}); replace or remove this file")


# ---- 8. Budgets ------------------------------------------------------------------------------------------------------

# (resolution, width, blocks down, blocks up). A VAE's encoder uses the blocks down, with one more where the resolution
# changes (see Encoder), and its decoder the blocks up. A U-Net uses both. `smoke` is a budget that only checks that
# everything runs.
VAE_TABLES = {
    "smoke 32": [(32, 8, 0, 0), (16, 16, 0, 0), (4, 32, 1, 1), (1, 8, 0, 0)],
    "smoke 64": [(64, 8, 0, 0), (16, 16, 0, 0), (4, 32, 1, 1), (1, 8, 0, 0)],
    "shapes 32": [(32, 32, 0, 1), (16, 64, 0, 0), (8, 96, 1, 1), (4, 128, 1, 1), (1, 64, 1, 1)],
    "cpu 32": [(32, 32, 0, 1), (16, 64, 1, 1), (8, 96, 1, 1), (4, 128, 1, 1), (1, 128, 1, 1)],
    "cpu 64": [(64, 16, 0, 1), (32, 32, 1, 1), (16, 64, 1, 1), (8, 96, 1, 1), (4, 128, 1, 1), (1, 128, 1, 1)],
    # Published (cifar10/train.yaml and celeba64/train.yaml of DiffuseVAE's code): 9.24M and 14.01M parameters
    "paper 32": [(32, 64, 7, 15), (16, 128, 4, 7), (8, 256, 4, 3), (4, 256, 3, 2), (1, 512, 3, 1)],
    "paper 64": [(64, 64, 7, 10), (32, 128, 4, 8), (16, 256, 7, 7), (8, 256, 3, 3), (4, 256, 3, 2), (1, 512, 2, 1)],
}
UNET_TABLES = {  # widths of `cpu`: as wide as 30 to 60 minutes allow; those of `gpu` were never timed
    "smoke 32": [(32, 8, 1, 1), (16, 16, 1, 1)],
    "smoke 64": [(64, 8, 1, 1), (32, 8, 1, 1), (16, 16, 1, 1)],
    "shapes 32": [(32, 32, 0, 1), (16, 48, 1, 1), (8, 64, 1, 1)],
    "cpu 32": [(32, 32, 1, 1), (16, 64, 1, 1), (8, 96, 1, 1)],
    "cpu 64": [(64, 32, 0, 1), (32, 48, 1, 1), (16, 64, 1, 1), (8, 96, 1, 1)],  # 16 wide at 64x64 left speckle on faces
    "gpu 32": [(32, 96, 2, 3), (16, 192, 2, 3), (8, 192, 2, 3)],
    "gpu 64": [(64, 64, 2, 3), (32, 128, 2, 3), (16, 192, 2, 3), (8, 192, 2, 3)],
    # Published, 35.75M and 78.70M parameters, with attention at 16x16
    "paper 32": [(32, 128, 2, 3), (16, 256, 2, 3), (8, 256, 2, 3), (4, 256, 2, 3)],
    "paper 64": [(64, 128, 2, 3), (32, 256, 2, 3), (16, 256, 2, 3), (8, 256, 2, 3), (4, 512, 2, 3)],
}

# What every budget trains with unless `budget` below changes it. `paper` changes most of it. Most values were found by
# short sweeps on the built-in data.
TRAIN = {
    "batch": 32,  # images per step
    # Learning rate of the optimizer Muon (Jordan et al. 2024; section 12), for matrices and convolutions; 0: Adam for
    # all. Muon replaces the averaged gradient of a matrix by a matrix with the same singular vectors, whose singular
    # values are all about 1. So directions that are rare in the gradients move as far as common ones. The size of a
    # step depends on this rate and the matrix's shape alone, so the rate cannot be compared with Adam's.
    "vae_muon_lr": 0.02, "unet_muon_lr": 0.01,
    "vae_lr": 2e-3, "unet_lr": 2e-3,  # learning rate of Adam, for all other parameters
    "warmup": 0.05,  # how long the rates rise from 0: below 1 a share of all steps, otherwise a number of steps
    "decay": True,  # then they fall linearly to 0; False: they stay
    # Largest norm of a network's gradient; 0: no limit. It keeps a single odd batch from counting too much in the
    # averages of gradients that Adam and Muon keep. The VAE's loss is a sum over 3,072 pixel values or more, so its
    # gradients are large; the refiner's loss is a mean.
    "vae_clip": 200.0, "unet_clip": 1.0,
    "vae_steps": 0, "unet_steps": 0,  # optimisation steps; see `budget`
    "vae_ema": 0.995, "unet_ema": 0.995,  # decay of the moving average of the weights; 0: the weights themselves
    "objective": "v",  # what the U-Net predicts; see Diffusion
    "even_levels": True,  # whether every noise level's loss is divided by its running mean; see Training.even_levels
    "start": 400,  # time at which refinement begins, of 1000; without an x_hat it is always 1000
    "beta": 1.0,  # weight of the KL in the VAE's loss
    "pool": False,  # True: resolution changes in the VAE as published; see Encoder
    "dropout": 0.0, "heads": 1,  # of the U-Net
    "attention": [],  # resolutions with attention in the U-Net, beside its middle
    "guidance": 0.5,  # `guided` adds guidance * (refiner - guide) to the prediction; see stage 1. Found by trying
    "vae_flip": True, "unet_flip": True,  # whether training images are mirrored at random
    "components": 30, "tied": False,  # of the mixture that is fitted ex post; see GaussianMixture
    "flow_steps": 5000,  # steps of fitting the flow ex post (stage 3)
    "every": 50,  # steps between two rows of the log
}
EVAL = {
    "sampler": "dpm", "sample_steps": 10,  # of the first row of scores, the headline
    "count": 1000,  # images of the headline
    "batch": 100,  # images sampled at a time
    "temperature": 1.0,  # factor of the noise in x_start
    # Samplers and steps of further rows. (dpm 10 is that of the headline, if `budget` does not change it. It is here
    # once more with grid_count images, as the other rows have, so that they can be compared.)
    "grid": [["ddim", 6], ["ddim", 25], ["dpm", 2], ["dpm", 4], ["dpm", 6], ["dpm", 10], ["dpm", 25]],
    # Images of each further row, and of each probe (measurements on the side, such as with noise). In its place, a VAE
    # alone, which is fast, and adaptive refinement (stage 3), whose differences are small, have `count`.
    "grid_count": 500,
    "probe_steps": 10,  # DPM-Solver++ steps in the probes: noise, interpolations, uncertainty
    # The bound on the likelihood is estimated from so many held-out images, with so many diffusion times t for each.
    "bits_images": 128, "bits_draws": 40,
}  # read_settings adds "prior" and "features"


def budget(name, dataset, size):
    """The settings of a budget for a data set at image size 32 or 64: (train, evaluation), two plain dictionaries."""
    train, evaluation = dict(TRAIN), dict(EVAL)
    tables = "shapes" if (name, dataset) == ("cpu", "shapes") else name
    # The built-in shapes are judged by their outlines. A small weight of the KL keeps those in the code, and such codes
    # lie in so many clusters that only a mixture of thousands covers them (results/TABLES.md, components).
    shapes_code = {"beta": 0.04, "components": 6000, "tied": True}
    if name == "smoke":  # everything runs, in seconds
        train |= {"vae_steps": 8, "unet_steps": 8, "attention": [16], "components": 2, "flow_steps": 8, "every": 4}
        evaluation |= {"sample_steps": 4, "count": 64, "batch": 64, "grid": [["dpm", 2], ["dpm", 4]], "grid_count": 64,
                       "probe_steps": 2, "bits_images": 8, "bits_draws": 4}
    elif tables == "shapes":  # the budget `cpu` on shapes
        train |= {"vae_steps": 900, "unet_steps": 600, "unet_muon_lr": 0.02} | shapes_code
        evaluation |= {"grid_count": 200}
    elif name == "cpu":
        steps = 4000 if size == 32 else 2300
        train |= {"vae_steps": steps, "unet_steps": steps, "flow_steps": steps, "beta": 0.25}
        evaluation |= {"count": 2000, "grid_count": 300}
    elif name == "gpu":  # sized for 25 minutes of one data-centre GPU, which was never measured
        train |= {"batch": 256, "vae_steps": 12_000, "unet_steps": 12_000, "unet_ema": 0.9995, "dropout": 0.1,
                  "heads": 4, "attention": [16]}
        train |= shapes_code if dataset == "shapes" else {"beta": 0.25}  # as for `cpu`
        evaluation |= {"sample_steps": 25, "count": 10_000, "batch": 500, "grid_count": 2000, "probe_steps": 25,
                       "bits_images": 256, "bits_draws": 100}
    else:  # paper: the published settings of DiffuseVAE, except for what REPORT.md lists (Details of the method)
        train |= {"batch": 128, "vae_lr": 1e-4, "unet_lr": 2e-4, "vae_muon_lr": 0.0, "unet_muon_lr": 0.0,
                  "warmup": 5000.0, "decay": False, "vae_clip": 0.0, "vae_ema": 0.0, "unet_ema": 0.9999, "pool": True,
                  "objective": "eps", "even_levels": False, "start": 1000, "heads": 8, "attention": [16],
                  "vae_flip": False, "every": 100}
        train |= ({"dropout": 0.3, "components": 50} if size == 32 else
                  {"dropout": 0.1, "components": 75, "batch": 32})
        # The VAE for 500 and 245 epochs (the numbers in the names of the authors' checkpoints), the refiner for 2,850
        # and 500 (their scripts), with the 50,000 and 162,770 training images of CIFAR-10 and CelebA
        train |= ({"vae_steps": 195_000, "unet_steps": 1_110_000} if size == 32 else
                  {"vae_steps": 1_246_000, "unet_steps": 2_543_000})
        grid = [[sampler, steps] for sampler in ("ddim", "dpm") for steps in (5, 10, 25, 50, 100)] + [["ddpm", 1000]]
        evaluation |= {"sampler": "ddpm", "sample_steps": 1000, "count": 50_000, "batch": 500, "grid": grid,
                       "grid_count": 10_000, "probe_steps": 25, "bits_images": 256,
                       "bits_draws": 999}  # each t from 2 to 1000 once
    # `gpu` has the VAE of `cpu`: its time is spent on the refiner.
    vae = VAE_TABLES[f"{'cpu' if name == 'gpu' else tables} {size}"]
    train |= {"encoder": [[resolution, width, falling] for resolution, width, falling, _ in vae],
              "decoder": [[resolution, width, rising] for resolution, width, _, rising in reversed(vae)],
              "unet": [list(row) for row in UNET_TABLES[f"{tables} {size}"]]}
    if dataset == "shapes":  # the slanted bands of a mirrored shape would run the other way, as in no image of the data
        train |= {"vae_flip": False, "unet_flip": False}
    return train, evaluation


# ---- 9. Data sets ----------------------------------------------------------------------------------------------------

DATASETS = {"shapes": 32, "cifar10": 32, "celeba64": 64}  # name: size of an image's side, in pixels


@dataclasses.dataclass
class ImageData:
    """One split of a data set, held whole in memory."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    labels: torch.Tensor | None  # int64 (N,)
    factors: torch.Tensor | None  # float32 (N, len(FACTORS)), of shapes
    name: str
    crop: str  # how images were cut to squares; see decode_file
    note: str  # what every result must say about its data, such as "JPEG copies"


def decode_file(path, size, crop):
    """One image file -> uint8 array (size, size, 3). `crop`: `none` (they are square) and `centre` take the centred
    square, `celeba-148` the 148x148 box at (15, 40) of the 178x218 aligned image, in proportion for smaller copies (as
    NVAE crops)."""
    image = read_image(path)
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
    files = find_images(folder / below[dataset])
    if dataset != "cifar10" and len(files) < 60 and (files or dataset == "folder"):  # a tenth is held out
        fail(f"{folder / below[dataset]}: found {len(files)} images there; give a folder that holds at least 60 (of a "
             "stage: --data-dir)")
    jpeg = any(p.suffix.lower() in (".jpg", ".jpeg") for p in files)  # JPEG's artefacts move every distance
    if dataset == "cifar10":
        classes = sorted({p.name for p in (folder / "cifar10").glob("*/[!.]*") if p.is_dir()})  # of both splits
        files = [p for p in files if p.parent.name in classes]
        here, other = (folder / "cifar10" / part for part in (split, "test" if split == "train" else "train"))
        if not files and find_images(other):  # this split must not come from torchvision, in another quality
            fail(f"{here}: no images in folders of classes, but {other} has some; add them, or remove {other}")
        return files, [classes.index(p.parent.name) for p in files], "none", "JPEG copies" if jpeg else "lossless"
    if dataset == "folder":
        # Every tenth file by path is in the test split. So if there is a folder for each person or class, both splits
        # have images of all.
        held_out = files[9::10]
        chosen = held_out if split == "test" else sorted({*files} - {*held_out})
        return chosen, None, "centre", "JPEG files" if jpeg else "lossless"
    # CelebA: the last tenth by name is the test split, unless a partition file says otherwise. (The numbers in
    # results/ rest on this split, so it is not made like that of a folder.)
    edge = len(files) - len(files) // 10
    chosen = files[:edge] if split == "train" else files[edge:]
    partition = folder / "celeba" / "list_eval_partition.txt"
    if partition.is_file():
        fields = partition.read_text(encoding="utf-8").split()  # name, number, name, number, ...
        # By the name of a file, without its suffix: copies may have another one than the file lists.
        part = {Path(name).stem: number for name, number in zip(fields[::2], fields[1::2], strict=False)}
        chosen = [p for p in files if part.get(p.stem) == {"train": "0", "test": "2"}[split]]
        if files and not chosen:
            fail(f"{partition}: none of the {len(files):,} images is in its {split} part; remove this file to hold out "
                 "the last tenth of the images")
    width, height = read_image(chosen[0]).size if chosen else (178, 218)
    note = f"{'JPEG' if jpeg else 'lossless'} copies at {width}x{height}"
    if jpeg and width == 178:
        note = "as published (JPEG)"
    return chosen, None, "celeba-148", note


def load_images(dataset, split, data_dir="data", image_size=None):
    """One split (`train` or `test`) of a data set, as ImageData. Decoded images are kept in DATA_DIR/cache, those of a
    user's own folder in data/cache. Exits, naming the folder, the layouts and the remedy, if there is nothing to load.
    """
    if dataset == "shapes":
        images, labels, factors = draw_shapes(20_000 if split == "train" else 4_000, seed=1 if split == "train" else 2)
        return ImageData(images, labels, factors, "shapes", "none", "drawn by the program")
    folder, size = Path(data_dir), image_size or DATASETS.get(dataset, 64)
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
            fail(f"no images of {dataset} in --data-dir {folder.resolve()} and no download ({reason}); name the folder "
                 f"in which {layout} lies, or use shapes, which need no data")
        files, labels, crop, note = list_split(dataset, split, folder)
    name = folder.resolve().name if dataset == "folder" else dataset
    cache = (Path("data") if dataset == "folder" else folder) / "cache" / f"{name}-{split}-{crop}-{size}.npz"
    images = torch.from_numpy(decode_files(files, size, crop, cache))
    if split == "test":  # files come class by class; in random order the first N images stand for all
        order = torch.randperm(len(images), generator=generator(0))
        images, labels = images[order], labels and torch.tensor(labels)[order]  # None stays None
    elif labels:
        labels = torch.tensor(labels)
    return ImageData(images, labels, None, name, crop, note)


def decode_files(files, size, crop, cache):
    """Image files -> uint8 array (N, 3, size, size), kept in `cache` until a file's path, size or time changes."""
    listing = "".join(f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in files)
    text = f"{crop} {size}\n{listing}"
    key = hashlib.sha256(os.fsencode(text)).hexdigest()  # a file's name need not be valid UTF-8
    with contextlib.suppress(Exception):  # there is no cache, or it is damaged: decode again
        with np.load(cache) as stored:
            if str(stored["key"]) == key:
                return stored["images"]
    images = np.empty((len(files), 3, size, size), np.uint8)
    for i, path in enumerate(tqdm(files, desc=f"decoding {cache.stem}", unit="image")):
        images[i] = decode_file(path, size, crop).transpose(2, 0, 1)
    write_with(cache, np.savez, optional=True, images=images, key=key)
    return images


# ---- 10. Processes ---------------------------------------------------------------------------------------------------

# `torchrun --nproc_per_node N stageX.py ...` starts N processes of the same script. All of them draw the same random
# numbers, take their own slice of every training batch, and average their gradients, so their networks stay equal. They
# share the images to be sampled between them; the first process alone writes files. The number of processes changes
# nothing but the speed, rounding, and the masks of dropout. (torch's DistributedDataParallel wraps a network's forward
# pass. Here the stages call parts of a network, such as vae.encoder, so the gradients are averaged plainly, after the
# backward pass.)
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # this process's number; how many


def choose_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` -> torch.device. Exits if this machine does not have it. Of several
    processes each gets a GPU of its own."""
    if RANKS > 1 and name not in ("auto", "cpu", "cuda"):
        fail(f"--device {name}: several processes need cpu, or cuda, which gives each of them a GPU of its own")
    automatic = name == "auto"
    if automatic:
        mps = torch.backends.mps.is_available() and RANKS == 1  # processes cannot exchange tensors of mps
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and RANKS > 1:
        if "LOCAL_RANK" not in os.environ:
            fail(f"--device {name}: LOCAL_RANK, the number of this process's GPU, is not set; start the processes with "
                 "torchrun")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        # This fails on an unknown or missing device, on a GPU that is too old for this torch, and on torch's device
        # `meta`, whose tensors have no values.
        torch.ones(1, device=name).mul(2).cpu()
    except (RuntimeError, AssertionError, ImportError):
        if automatic and RANKS == 1:
            print(f"the device {name} does not work with this torch; the CPU is used", file=sys.stderr)
            return torch.device("cpu")
        if RANKS > 1:
            fail(f"{name} cannot be used; each of the {RANKS} processes needs a GPU of its own, or use --device cpu")
        fail(f"--device {name}: not a device of this machine; use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def join_processes(device, batch):
    """Meet the other processes, if torchrun started any."""
    if RANKS == 1:
        return
    if batch % RANKS:
        fail(f"--batch-size {batch}: must be a multiple of the {RANKS} processes")
    patience = datetime.timedelta(hours=12)  # the others wait while the first one decodes images or computes scores
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    atexit.register(distributed.destroy_process_group)
    if RANK > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def wait_for_all():
    """Go on when all processes have come this far."""
    if RANKS > 1:
        distributed.barrier()


def from_first(value):
    """What the first process has as `value`, in all processes."""
    if RANKS == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def average_over_processes(tensors):
    """Replace tensors, such as gradients, by their means over all processes, in place."""
    if RANKS > 1 and tensors:
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


def keep_freed_memory():
    """Let the C library keep freed memory. By default glibc hands every large tensor back to the kernel, which costs
    33,000 page faults, a tenth of the time, in each training step on a CPU. Other C libraries ignore this."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: ask the kernel for no separate blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


# ---- 11. Random numbers, precision, cost -----------------------------------------------------------------------------

# What is added to --seed for each purpose, so that the purposes of a run draw different random numbers. (Runs with
# different --seed share some: to `terciles`, for instance, stage 3 also adds 1,000 and 2,000. So may two purposes where
# 1,000 times --seed is added. It does no harm: their networks or codes differ.)
SEEDS = {
    "training": 1,  # batches, mirroring, noise and times of a training
    "mixture": 2,  # the codes z that the Gaussian mixture is fitted to
    "flow": 3,  # the same for the flow that is fitted after training (stage 3)
    "reconstruction": 50_000,  # noise with which reconstructions of held-out images are refined
    "trajectory": 55_000,  # codes and noise of trajectory.png
    "paths": 56_000,  # codes of paths.png (stage 2)
    "bits_per_dim": 60_000,
    "held_out_codes": 70_000,
    "round_trip": 75_000,  # codes of held-out images whose error is compared with the predicted one (stage 3)
    "terciles": 80_000,  # stage 3: noise with which sure and unsure images are refined; 1,000 times --seed is added
    "adaptive_codes": 85_000,  # stage 3: codes that are refined in different numbers of steps
    "adaptive_noise": 86_000,  # and their noise; 1,000 times --seed is added
    "interpolation": 91_000,  # noise with which stage 2 refines codes; the same along a path
}
# `generate` draws batch by batch and uses 1,000,000 * (seed + 1) + the number of the batch's first image.
# Wherever images are refined, `refine` adds 1 for the noise of the sampling steps, and `generate` adds 2 for damage.


def memory_format(device):
    """How the tensors of convolutions are laid out: as channels_last, in which convolutions are faster. Not so on mps,
    where some versions of torch read weights of that layout in the wrong order (pytorch/pytorch, issue 192212)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def has_bfloat16(device):
    """Whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16", False))


@functools.cache
def fast_bfloat16(device):
    """Whether the device computes in bfloat16 natively and, if it is a CPU, clearly faster than in float32.

    With native bfloat16, `make demo` took 5 minutes in place of 8 on an AMD EPYC. But on an Intel Xeon whose matrix
    unit (AMX) was switched off, convolutions took 1.4 to 2 times as long as in float32. So a convolution is timed in
    both, with its gradients. Other work on the machine can only slow it, so the fastest of several turns counts."""
    if device.type != "cpu" or not has_bfloat16(device):
        return has_bfloat16(device)
    x = torch.ones(8, 64, 16, 16).contiguous(memory_format=memory_format(device)).requires_grad_()
    weights = torch.ones(64, 64, 3, 3).contiguous(memory_format=memory_format(device)).requires_grad_()
    fastest = {False: math.inf, True: math.inf}  # seconds in float32, and in bfloat16
    for _ in range(20):
        for reduced in fastest:
            clock = time.perf_counter()
            with torch.enable_grad(), autocast(device, reduced):  # callers that sample have switched gradients off
                total = F.conv2d(x, weights, padding=1).sum()
            total.backward()
            fastest[reduced] = min(fastest[reduced], time.perf_counter() - clock)
    ratio = fastest[True] / fastest[False]
    if ratio > 0.9:
        print(f"bfloat16 takes {ratio:.0%} of the time of float32 here; float32 is used", file=sys.stderr)
    return ratio <= 0.9


def autocast(device, reduced):
    """A context in which convolutions and matrix products run in bfloat16 if `reduced`, else in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced)


def relative_errors(exact, reduced):
    """Two lists of tensors -> |exact - reduced| / |exact| for each pair, as a tensor. It is infinite if only `reduced`
    has values that are not finite. It is nan if `exact` has such values, or if both are zero."""
    errors = []
    for a, b in zip(exact, reduced, strict=True):
        difference = (a.float() - b.float()).nan_to_num(nan=math.inf)  # nan in `reduced` alone is infinitely wrong
        errors.append(difference.norm() / a.float().norm())
    return torch.stack(errors)


def rounding_explains(errors, name):
    """Whether relative errors between float32 and bfloat16 are small enough to be rounding; prints a line if not.

    Rounding changes outputs and gradients of the networks here by less than 10%, a wrong kernel by 50% or more. An
    error that is nan says nothing against bfloat16, since float32 fails as well."""
    error = float(errors.nan_to_num(nan=0.0, posinf=math.inf).max())
    if error <= 0.3:
        return True
    print(f"{name}: bfloat16 gives results that differ from float32's by {error:.0%}, which is a fault of this "
          "processor or of torch; float32 is used instead", file=sys.stderr)
    return False


@torch.no_grad()
def choose_precision(model):
    """Let a model sample in bfloat16 if it is fast, and if its networks give the same images as in float32."""
    if not from_first(fast_bfloat16(model.device)):  # clocks differ, so one process decides
        return
    gen, outputs = generator(0), {}
    z = None if model.vae is None else torch.randn(4, model.vae.latent_dim, generator=gen).to(model.device)
    x = torch.randn(4, *model.shape, generator=gen).to(model.device)
    t = torch.linspace(1, model.diffusion.start, 4, device=model.device).long()
    for reduced in (False, True):
        with autocast(model.device, reduced):
            x_hat = torch.zeros_like(x) if model.vae is None else model.vae.decoder(z)
            outputs[reduced] = [] if model.vae is None else [x_hat, model.vae.encoder(x)[0]]
            if model.denoiser_for is not None:
                outputs[reduced].append(model.denoiser_for(x_hat, z, x_hat)(x, t))
            if model.decode is not None:
                outputs[reduced].append(model.decode(x))
    model.reduced = rounding_explains(relative_errors(outputs[False], outputs[True]), model.name)


def count_gflops(run):
    """Billions of floating point operations of run(); a multiply-add counts as two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    # torch's fused attention is not counted on a CPU; the plain one is
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def time_in_turn(runs, device, repeats=7):
    """The median seconds of each of {name: function}, after two calls of each to warm up. They are called in turn, so
    that a machine that slows down slows all of them."""
    seconds = {name: [] for name in runs}
    for i in range(repeats + 2):
        for name, run in runs.items():
            clock = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()
            if i >= 2:
                seconds[name].append(time.perf_counter() - clock)
    return {name: statistics.median(values) for name, values in seconds.items()}


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def ridge_regression(x, y, ridge=1e-3):
    """Linear regression in closed form, y ~ x @ weight + bias: x (N, d), y (N, k) -> weight (d, k), bias (k,). Stages 2
    and 3 use it. x is standardised first, so that the penalty ridge * N * |weight|^2 does not depend on its units."""
    mean, sd = x.mean(0), x.std(0).clamp(min=1e-6)
    a = (x - mean) / sd
    penalty = ridge * len(a) * torch.eye(a.shape[1])
    weight = torch.linalg.solve(a.T @ a + penalty, a.T @ (y - y.mean(0)))  # (d, k), for standardised x
    weight = weight / sd[:, None]
    return weight, y.mean(0) - mean @ weight


class PatchConv2d(nn.Conv2d):
    """A convolution whose window equals its stride k: (B, C, H, W) -> (B, out, H/k, W/k).

    Its windows do not overlap. So it is a matrix product: every k x k block of pixels, flattened to k k C numbers, is
    multiplied by the weights. It is computed as one, because for exactly this case some of torch's convolution kernels
    for bfloat16 give wrong results (on processors with AMX). But on mps it is torch's convolution, since there some
    products of matrices are wrong (pytorch/pytorch, issue 177116). The weights have nn.Conv2d's shape, (out, C, k, k).
    """

    def forward(self, x):
        if x.device.type == "mps":
            return super().forward(x)
        (b, c, h, w), k = x.shape, self.stride[0]
        # Axes: image, block row, row within the block, block column, column within the block, channel
        blocks = x.permute(0, 2, 3, 1).reshape(b, h // k, k, w // k, k, c)
        blocks = blocks.transpose(2, 3).reshape(b, h // k, w // k, k * k * c)  # (B, H/k, W/k, k k C)
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)  # (out, k k C), ordered alike
        return F.linear(blocks, matrix, self.bias).permute(0, 3, 1, 2)  # (B, out, H/k, W/k)


class PatchConvTranspose2d(nn.ConvTranspose2d):
    """The reverse of PatchConv2d, without bias: every pixel becomes a k x k block. (B, C, H, W) -> (B, out, k H, k W).
    The weights have the shape that they have in nn.ConvTranspose2d, (C, out, k, k)."""

    def forward(self, x):
        if x.device.type == "mps":
            return super().forward(x)
        (b, _, h, w), k = x.shape, self.stride[0]
        matrix = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (k k out, C)
        blocks = F.linear(x.permute(0, 2, 3, 1), matrix).view(b, h, w, k, k, -1)  # (B, H, W, k, k, out)
        blocks = blocks.transpose(2, 3)  # (B, H, k, W, k, out), so that H and k make the rows, W and k the columns
        return blocks.reshape(b, h * k, w * k, -1).permute(0, 3, 1, 2)  # (B, out, k H, k W)


# ---- 12. Training ----------------------------------------------------------------------------------------------------

def orthogonalise(matrix, rounds=5):
    """A matrix (m, n) -> one with the same singular vectors, whose singular values are about 1 (0.7 to 1.2, except for
    those that were tiny).

    Newton-Schulz iteration with the coefficients of Jordan et al. 2024. (x x^T) x has the singular vectors of x, and
    the cubes of its singular values s. So matrix products alone can turn every s into 3.4445 s - 4.7750 s^3 +
    2.0315 s^5, which each round does."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)  # singular values between 0 and 1
    for _ in range(rounds):
        square = x @ x.T
        # x = 3.4445 x + (-4.7750 square + 2.0315 square^2) x, by products that add to a matrix, which saves time
        factor = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Gradient descent with an orthogonalised momentum (Jordan et al. 2024). The update of a weight matrix has singular
    values near 1, so directions that are rare in the gradients move as far as common ones.

    A convolution's weights count as a matrix (out, in k k), a transposed convolution's as (in, out k k). That is why
    this is written here: torch's own Muon takes matrices alone."""

    def __init__(self, params, lr=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])  # average = momentum average + (1 - momentum) gradient
                update = p.grad.lerp(average, group["momentum"]).flatten(1)  # Nesterov momentum
                # Jordan's factor: the root of outputs / inputs, if that is above 1. It lets a single output change as
                # much as under a square matrix. (A transposed convolution's shape begins with its inputs. Ours have at
                # least as many columns as rows, so the factor is 1.)
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(orthogonalise(update).reshape(p.shape), alpha=-group["lr"] * scale)


def lock(folder):
    """Take the lock of a run's folder and return it as an open file; closing the file or ending the process frees it.
    Fails if another process holds it, which means that it is training there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / "lock", "w")
    except OSError as error:
        fail(f"cannot write {Path(folder) / 'lock'}: {error.strerror}; allow writing there or choose another --out")
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        fail(f"{folder}: another process is training there; wait for it, or choose another --out")
    except (ImportError, OSError):  # a system, or a file system, without locks: go on without
        pass
    return file


# Training.even_levels divides the times into so many noise levels: enough for the loss to be about the same within a
# level, and few enough for a batch of 32 to have images in most of the levels.
NOISE_LEVELS = 20


class Training:
    """The training loop that all stages share. A stage iterates over batches, computes a loss from each, and hands it
    to `step`:

        training = Training(folder, train, device, images, steps, flip, vae=vae)
        for x0 in training:
            with training.autocast():
                loss = ...                          # (B,)
            training.step(loss, {"sse": sse})       # what to log
        state = training.finish(...)                # the finished checkpoint

    `networks` are given by name. For each NAME, the settings `train` hold the learning rates NAME_lr (Adam) and
    NAME_muon_lr (Muon, the optimizer above), the largest norm of a gradient NAME_clip, and the decay NAME_ema of the
    moving average of the weights. A checkpoint is written every minute, on SIGTERM and on Ctrl-C. If the folder has an
    unfinished one, training goes on from there. On a CPU it ends with the same bits as if it had never been stopped
    (tests/test_training.py).

    In the log of all stages, `sse` is the squared error of x_hat, summed over pixel values, with images in [0, 1].
    `eps_mse` and `v_mse` are the squared error of what the U-Net predicts (see Diffusion), a mean over all values, with
    images in [-1, 1]. A KL is in nats.
    """

    def __init__(self, folder, train, device, images, steps, flip, **networks):
        self.folder, self.train, self.device, self.networks = Path(folder), train, device, networks
        self.images, self.flip = images.to(device), flip
        # Optimizers by the setting that is their learning rate: {"vae_lr": Adam, "vae_muon_lr": Muon, ...}
        self.averages, self.optimizers = {}, {}
        for name, network in networks.items():
            network.to(device, memory_format=memory_format(device)).train()
            self.averages[name] = {key: value.clone() for key, value in network.state_dict().items()}
            by_muon = train[f"{name}_muon_lr"] > 0
            matrices = [p for p in network.parameters() if p.dim() > 1 and by_muon]
            others = [p for p in network.parameters() if p.dim() <= 1 or not by_muon]
            if matrices:
                self.optimizers[f"{name}_muon_lr"] = Muon(matrices)
            # `step` sets the learning rates.
            self.optimizers[f"{name}_lr"] = torch.optim.Adam(others, fused=device.type in ("cpu", "cuda"))
        self.parameters = [p for network in networks.values() for p in network.parameters()]
        self.gen = generator(train["seed"] + SEEDS["training"], device)
        self.run_id = secrets.token_hex(8)  # tells this training from every other one
        self.all_steps = steps
        self.steps_taken, self.seconds = 0, 0.0  # so far
        self.every = min(train["every"], steps)
        self.level_means = torch.ones(NOISE_LEVELS, device=device)  # see even_levels
        self.log, self.sums = [], {}  # rows of the log; sums of the logged terms since the last row
        # self.trial is None except while bfloat16 is tried, before the first step (try_reduced_precision): then `step`
        # changes nothing. It can be ignored on a first reading.
        self.reduced, self.trial = fast_bfloat16(device), None
        path = self.folder / "checkpoint.pt"
        state = load_checkpoint(path) if path.is_file() else None
        if state is not None and not state["finished"]:  # finished_state has checked that it may go on
            self.load(state)

    def load(self, state):
        """Go on from an unfinished checkpoint."""
        if state["device"] != self.device.type:  # a generator's state cannot be moved to another kind of device
            fail(f"{self.folder} was begun with --device {state['device']}; resume it with that, or remove it")
        for name, network in self.networks.items():
            network.load_state_dict(state["weights"][name])
            self.averages[name] = {key: value.to(self.device) for key, value in state["averages"][name].items()}
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.gen.set_state(state["generator"])
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.level_means = state["level_means"].to(self.device)
        self.steps_taken, self.seconds, self.log = state["steps"], state["seconds"], state["log"]
        self.run_id = state["run_id"]
        self.reduced = state["reduced"] and has_bfloat16(self.device)  # as it began; a new timing does not count

    def autocast(self):
        """The precision in which the stage computes its loss: bfloat16 where that is fast and right, else float32."""
        return autocast(self.device, self.reduced)

    def __iter__(self):
        # Where bfloat16 is used, it is tested first, on the loss of the stage: the stage gets one batch twice, once for
        # each precision, and treats it like any other. Meanwhile self.trial is a list, and `step` only stores gradients
        # there: it changes no weights.
        yield from self.try_reduced_precision()
        with self.running():
            while self.steps_taken < self.all_steps:
                if self.stopped_by is not None:
                    break
                yield self.batch()  # the stage computes the loss and calls self.step, which counts
                if time.time() - self.clock > 60:
                    self.checkpoint()
            self.checkpoint()
            if self.stopped_by is not None:
                print(f"\nstopped at step {self.steps_taken}; continue with --resume", file=sys.stderr)
                raise SystemExit(128 + self.stopped_by)  # the status that shells give a process which a signal ended

    @contextlib.contextmanager
    def running(self):
        """While it lasts, there is a progress bar, and SIGTERM and Ctrl-C only leave their number in self.stopped_by,
        so that the loop can save a checkpoint before it exits. The run's folder is locked until an error, or until
        `finish` has saved the finished checkpoint, since what a stage fits after the last step can take minutes."""
        def remember(number, frame):
            if RANK == 0:  # if the first process ends, torchrun ends the others
                self.stopped_by = number

        self.stopped_by = None
        self.locked = lock(self.folder) if RANK == 0 else contextlib.ExitStack()  # which has a `close`, too
        name = self.folder.name
        with tqdm(total=self.all_steps, initial=self.steps_taken, unit="step", desc=name) as self.bar:
            previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
            self.clock = time.time()  # self.seconds counts up to this moment
            try:
                yield
            except BaseException:
                self.locked.close()
                raise
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def batch(self):
        """This process's part of a random batch of training images, as floats, mirrored at random if `flip`. (The bonus
        trains on latents, which are floats already.)"""
        if self.train["dropout"]:  # its masks depend on the step alone, so that a resumed run has the same
            # 2**24 is more than the steps of any run (LIMITS), so no two --seed share a seed of a step.
            step_seed = self.train["seed"] * 2**24 + self.steps_taken
            torch.manual_seed(step_seed * RANKS + RANK)
        index = torch.randint(len(self.images), (self.train["batch"],), generator=self.gen, device=self.device)
        x = self.images[self.own_part(index)]
        x = (to_float(x) if x.dtype == torch.uint8 else x).contiguous(memory_format=memory_format(x.device))
        if self.flip:
            x = torch.where(self.uniform(1, 1, 1) < 0.5, x.flip(3), x)
        return x

    def own_part(self, draws):
        """This process's slice of random draws for a whole batch. Every process draws for all, so that the draws do not
        depend on the number of processes."""
        return draws.chunk(RANKS)[RANK]

    def normal(self, *shape):
        """Standard normal noise (B, *shape)."""
        return self.own_part(torch.randn(self.train["batch"], *shape, generator=self.gen, device=self.device))

    def uniform(self, *shape):
        """Uniform random numbers in [0, 1), (B, *shape)."""
        return self.own_part(torch.rand(self.train["batch"], *shape, generator=self.gen, device=self.device))

    def even_levels(self, loss, t, diffusion):
        """Divide every image's loss (B,) by the running mean of the losses at its noise level: (B,). `t` (B,) are the
        times; NOISE_LEVELS intervals of equal length share 1..start. With the setting even_levels off, `loss` itself.

        A plain MSE is far larger at the lowest noise levels, where the network has to tell weak noise from fine
        texture, than at the highest, where shapes are decided. After the division all levels have a mean loss of about
        1, and so an equal say. Karras et al. 2024 (arXiv:2312.02696, eq. 14 to 21) reach the same by learning each
        level's loss with a small network."""
        if not self.train["even_levels"]:
            return loss
        level = (t - 1) * NOISE_LEVELS // diffusion.start  # (B,)
        one_hot = F.one_hot(level, NOISE_LEVELS)  # (B, levels)
        count = one_hot.sum(0).float()  # how many of the batch's images are at each level, (levels,)
        total = (one_hot * loss.detach()[:, None]).sum(0)  # the sum of their losses, (levels,)
        average_over_processes([count, total])
        # (Both were averaged over the processes, which keeps their ratio, but a count may now lie between 0 and 1. So
        # 1e-9, which only keeps the unused quotient 0 / 0 away, must not be 1.)
        mean = torch.where(count > 0, total / count.clamp(min=1e-9), self.level_means)
        self.level_means = self.level_means.lerp(mean, 0.05)  # a mean over the last 20 steps or so
        return loss / self.level_means[level]

    def step(self, loss, terms, watch=None):
        """Take one step of every optimiser on the mean of `loss` (B,).
        (tests/test_training.py: test_rates_clips_and_averages_by_hand)

        `terms` {name: tensor or number} are logged as means over the steps since the last row of the log. `watch()`, if
        given, is called when a row is due; the numbers it returns are logged as they are."""
        # Compute gradients.
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.mean().backward()
        average_over_processes([p.grad for p in self.parameters])
        if self.trial is not None:  # a trial of bfloat16 (try_reduced_precision): keep the gradients, change nothing
            self.trial.append([loss.detach(), *(p.grad.clone() for p in self.parameters)])
            return
        # Clip them and update the weights.
        for name, network in self.networks.items():
            nn.utils.clip_grad_norm_(network.parameters(), self.train[f"{name}_clip"] or math.inf)
        for setting, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = learning_rate(self.train[setting], self.steps_taken, self.all_steps,
                                                            self.train["warmup"], self.train["decay"])
            optimizer.step()
        self.steps_taken += 1
        # Update the moving averages. Early on the decay is smaller: with 0.9999 alone, a third of the average of a
        # run of 10,000 steps would be its initial weights (0.9999^10000 = 0.37).
        early = (1 + self.steps_taken) / (10 + self.steps_taken)  # a usual choice: 2/11, 3/12, ... towards 1
        for name, network in self.networks.items():
            decay = min(self.train[f"{name}_ema"], early)
            # average += (1 - decay) * (weight - average), for all tensors at once
            torch._foreach_lerp_(list(self.averages[name].values()), list(network.state_dict().values()), 1 - decay)
        # Log.
        means = {name: torch.as_tensor(value, device=self.device).detach().mean() for name, value in terms.items()}
        average_over_processes(list(means.values()))
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0) + mean
        if self.steps_taken % self.every == 0:
            self.write_row(watch() if watch else {})
        self.bar.update()

    @torch.no_grad()
    def check_finite(self):
        """Exit, naming what is not finite, before it is written anywhere."""
        weights = {f"weights of {name}": sum(p.sum() for p in network.parameters())
                   for name, network in self.networks.items()}
        bad = [name for name, value in (self.sums | weights).items() if not torch.isfinite(value)]
        if bad:
            saved = ("its last checkpoint is older than that" if (self.folder / "checkpoint.pt").is_file()
                     else "nothing was saved")
            fail(f"{self.folder.name}: {' and '.join(bad)} not finite by step {self.steps_taken}; {saved}; "
                 "try a larger --batch-size or another --seed with another --out, and look at the data")

    def write_row(self, watched):
        """Add a row to the log: means since the last row, and what was watched. log.csv is a copy of all rows."""
        self.check_finite()
        means = {name: float(value) / self.every for name, value in self.sums.items()} | watched
        self.log.append({"step": self.steps_taken, **means})
        self.sums = {}
        lines = [",".join(self.log[0])] + [",".join(map(str, row.values())) for row in self.log]
        write(self.folder / "log.csv", "".join(f"{line}\n" for line in lines).encode(), optional=True)
        self.bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})

    def checkpoint(self):
        """Save all that is needed to go on to the same bits."""
        self.check_finite()
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if RANK == 0:
            save_state(self.folder / "checkpoint.pt", {
                "train": self.train, "finished": False, "run_id": self.run_id, "steps": self.steps_taken,
                "seconds": self.seconds, "log": self.log, "sums": self.sums, "level_means": self.level_means,
                "device": self.device.type, "generator": self.gen.get_state(), "reduced": self.reduced,
                "averages": self.averages,
                "weights": {name: network.state_dict() for name, network in self.networks.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}})

    def finish(self, seconds_before=0.0, **parts):
        """Save the finished checkpoint, and return it as it is read back, on the CPU. It holds the averaged weights of
        each network under its name, and `parts`, whatever else the model consists of. Its `seconds` contain what was
        done after the last training step, such as fitting a prior. `seconds_before` is the training time of the
        checkpoint it builds on, such as the VAE's."""
        seconds = self.seconds + time.time() - self.clock
        if RANK == 0:
            save_state(self.folder / "checkpoint.pt", {
                "train": self.train, "finished": True, "run_id": self.run_id, "seconds": seconds,
                "seconds_before": seconds_before, "log": self.log} | self.averages | parts)
        self.locked.close()
        wait_for_all()
        return load_checkpoint(self.folder / "checkpoint.pt")

    def try_reduced_precision(self):
        """A safety net, to be skipped on first reading. Before training in bfloat16, compute loss and gradients of one
        batch in float32 and in bfloat16. If they differ by more than rounding, train in float32. Afterwards weights,
        random numbers and the means of even_levels are as they were.

        What is tested is whether this machine's bfloat16 routines compute correctly, not the weights. So all matrices
        have random weights meanwhile. With the true weights, a fault could be hidden or imitated: in a new run some are
        zero and let no gradient through; in a resumed run the gradients nearly cancel, so that rounding alone changes
        them by up to a half."""
        self.reduced = from_first(self.reduced)  # clocks differ, so one process decides
        if not self.reduced:
            return
        random_numbers, level_means = self.gen.get_state(), self.level_means
        matrices = [p for p in self.parameters if p.dim() > 1]
        weights, gen = [p.detach().clone() for p in matrices], generator(0)
        with torch.no_grad():
            for p in matrices:
                sd = (3 * p[0].numel()) ** -0.5  # of torch's initial weights, uniform in +-1/sqrt(inputs)
                p.copy_(sd * torch.randn(p.shape, generator=gen))
        self.trial = []  # `step` appends to it, and does nothing else
        for reduced in (False, True):
            self.reduced = reduced
            yield self.batch()
            self.gen.set_state(random_numbers)
            self.level_means = level_means
        errors = relative_errors(*self.trial)
        average_over_processes([errors])  # so that all of them decide alike
        self.trial, self.reduced = None, rounding_explains(errors, self.folder.name)
        with torch.no_grad():
            for p, value in zip(matrices, weights, strict=True):
                p.copy_(value)


def learning_rate(base, step, steps, warmup, decay):
    """The learning rate at a step: a linear rise, then constant or, with `decay`, a linear fall to 0 at the end.
    `warmup` is the number of steps of the rise, or their share of all steps if it is below 1."""
    warmup = warmup * steps if warmup < 1 else warmup
    rise = (step + 1) / max(1, warmup)
    fall = (steps - step) / max(1, steps - warmup) if decay else 1
    return base * min(1, rise, fall)


# ---- 13. Runs --------------------------------------------------------------------------------------------------------

def add_flags(parser, priors=(), default_prior=None):
    """Add the flags that all stages share. `priors`: the names of the stage's priors over z, if it has any."""
    parser.error, parser.allow_abbrev = fail, False
    add = parser.add_argument
    add("--dataset", choices=(*DATASETS, "folder"), default="shapes",
        help="default: %(default)s; all others read --data-dir")
    add("--data-dir", default="data",
        help="where cifar10/ or celeba/ lie (or are downloaded), or a folder of images (default: %(default)s)")
    add("--image-size", type=int, choices=(32, 64), help="for --dataset folder (default: 64)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--budget", choices=("auto", "smoke", "cpu", "gpu", "paper"), default="auto",
        help="auto, the default: gpu with CUDA, else cpu")
    add("--steps", type=int, help="optimisation steps of each network, in place of the budget's")
    add("--batch-size", type=int, help="images per step, in place of the budget's")
    add("--set", nargs="+", action="extend", metavar="KEY=VALUE", default=[],
        help="override training settings that --dry-run shows, except lists; the run's name then contains them")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--out", default="runs", help="folder for runs (default: %(default)s)")
    add("--resume", action="store_true", help="continue an unfinished run, if there is one")
    add("--sampler", choices=("ddpm", "ddim", "dpm"), help="of the headline scores, in place of the budget's")
    add("--sample-steps", type=int, help="its number of steps, at most as many as there are times")
    add("--temperature", type=float, help="factor of the noise that sampling starts from: below 1 cleaner, less detail")
    add("--eval-samples", type=int, help="images generated for the headline scores, and at most for each other row")
    add("--export", type=int, metavar="N", help="write N samples as PNG files into the run's folder")
    add("--features", choices=("auto", "inception", "local"), default="auto",
        help="feature network of the scores; auto, the default: inception for gpu and paper on real images, else local")
    add("--weights", help="file of the feature network: Inception weights, or NAME-<hash8>.pt")
    add("--dry-run", action="store_true", help="print all settings as JSON, and stop")
    if priors:
        add("--prior", choices=priors, default=default_prior, help="over z, of the headline (default: %(default)s)")


LIMITS = {"steps": (1, 10**7), "batch_size": (1, 4096), "seed": (0, 2**31), "temperature": (0, 2),
          "sample_steps": (1, 1000), "eval_samples": (40, 10**6), "export": (1, 10**5)}  # flag: smallest, largest


def read_settings(args, unused=()):
    """Check the shared flags and resolve what is `auto`. Returns train settings, evaluation settings and the device.
    Exits if --set changes a setting whose name begins with one of `unused`: nothing in the run depends on it.
    `args.changes` then holds what --set changes in the train settings. It is kept apart, because a run takes only
    those changes on which it depends (fid.Setup.folder_and_settings)."""
    sys.excepthook = end_in_a_line
    for flag, (low, high) in LIMITS.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            fail(f"--{flag.replace('_', '-')} {value}: must lie between {low} and {high}")
    if args.image_size and args.dataset != "folder":
        fail(f"--image-size {args.image_size}: for --dataset folder alone; {args.dataset} has its own size")
    device = choose_device(args.device)
    name = args.budget if args.budget != "auto" else "gpu" if device.type == "cuda" else "cpu"
    size = DATASETS.get(args.dataset, args.image_size or 64)
    train, evaluation = budget(name, args.dataset, size)
    given = {"vae_steps": args.steps, "unet_steps": args.steps, "batch": args.batch_size}
    if args.steps is not None:
        given["flow_steps"] = min(args.steps, train["flow_steps"])  # of the flow in stage 3, once the VAE is finished
    train |= {key: value for key, value in given.items() if value is not None}
    args.changes = parse_changes(args.set, train)
    for key in args.changes:
        if key.startswith(tuple(unused)):
            fail(f"--set {key}: nothing in this run depends on it; leave it out")
    train |= {"dataset": args.dataset, "image_size": size, "budget": name, "seed": args.seed}
    given = {"sampler": args.sampler, "sample_steps": args.sample_steps, "count": args.eval_samples,
             "temperature": args.temperature}
    evaluation |= {key: value for key, value in given.items() if value is not None}
    evaluation["grid_count"] = min(evaluation["grid_count"], evaluation["count"])
    inception = name in ("gpu", "paper") and args.dataset != "shapes"
    evaluation["features"] = ("inception" if inception else "local") if args.features == "auto" else args.features
    evaluation["prior"] = getattr(args, "prior", "none")
    return train, evaluation, device


# The train settings that matter to the U-Net alone begin with one of these. The VAE of a run does not depend on them.
OF_UNET = ("unet", "objective", "even_levels", "start", "dropout", "heads", "attention", "guidance")
# And those that say what the VAE is. A diffusion model without a VAE does not depend on them.
OF_VAE = ("vae", "encoder", "decoder", "pool", "beta", "components", "tied")


def parse_changes(texts, train):
    """--set KEY=VALUE ... -> {key: value}. Exits if there is no such train setting, or if the value is of another type
    or out of range. Lists, such as the tables of the networks, and `heads` cannot be set."""
    changes = {}
    settable = {key: value for key, value in train.items()
                if not isinstance(value, list) and key != "heads"}
    for text in texts:
        key, equals, word = text.partition("=")
        if key not in settable:
            fail(f"--set {text}: no such setting; there are {', '.join(settable)}")
        if not equals:
            fail(f"--set {text}: has no value; write --set {text}=VALUE")
        old = settable[key]
        if isinstance(old, bool):
            allowed, value = "true or false", {"true": True, "false": False}.get(word.lower())
        elif isinstance(old, str):  # `objective` is the only text
            allowed, value = "eps or v", word if word in ("eps", "v") else None
        else:
            low, high = (1 if isinstance(old, int) else 0), 10**9
            if key == "start":
                low, high = 2, 1000  # the bound on the likelihood needs two times
            elif key == "dropout" or key.endswith("_ema"):
                high = 1
            elif key == "batch":
                high = LIMITS["batch_size"][1]
            elif key.endswith("_steps"):
                high = LIMITS["steps"][1]
            allowed, value = f"a {'whole ' if isinstance(old, int) else ''}number from {low} to {high:,}", None
            with contextlib.suppress(ValueError):
                value = type(old)(word)
            value = value if value is not None and low <= value <= high else None
        if value is None:
            several = "; write a space between several settings" if "=" in word else ""
            fail(f"--set {text}: must be {allowed}{several}")
        changes[key] = value
    return changes


def name_changes(changes):
    """The part of a run's name that says what --set changes: {"start": 300} -> -start=300, nothing -> nothing."""
    return "".join(f"-{key}={value:g}" if type(value) is float else f"-{key}={value}" for key, value in changes.items())


def print_settings(train, evaluation):
    """What --dry-run shows: all settings, as one JSON object."""
    print(json.dumps({"train": train, "eval": evaluation}, indent=1))


def first_difference(old, new):
    """The first setting in which two dictionaries differ, with both values, or None. Settings that are flags come
    before those that follow from them, such as the tables of the networks."""
    flags = ("dataset", "data_dir", "image_size", "budget", "vae_steps", "unet_steps", "batch", "seed")
    keys = [*flags, *sorted((old.keys() | new.keys()) - {*flags})]
    different = [key for key in keys if old.get(key) != new.get(key)]
    return f"{different[0]} was {old.get(different[0])}, is now {new.get(different[0])}" if different else None


def finished_state(folder, train, resume):
    """The finished checkpoint of a run's folder, or None where training has to begin, or to go on:

        state = common.finished_state(folder, train, resume) or train_vae(folder, train, ...)

    Exits if the folder holds a run with other settings, an unfinished run and no --resume was given, or a run that
    another process is training. Where a training is going to begin, config.json is written, and the scores of weights
    that are gone are deleted."""
    checkpoint = Path(folder) / "checkpoint.pt"
    state = load_checkpoint(checkpoint) if checkpoint.is_file() else None
    if RANK == 0 and not (state and state["finished"]):
        lock(folder).close()  # only to see that no other process is training there
    if state is None:
        write_json(Path(folder) / "config.json", {"train": train})  # for people to look up
        if RANK == 0:
            (Path(folder) / "metrics.json").unlink(missing_ok=True)
        if resume:
            print(f"nothing to resume in {folder}: it starts at step 0")
        return None
    if difference := first_difference(state["train"], train):
        fail(f"{folder} holds a run with other settings ({difference}); choose another --out or remove it")
    if state["finished"]:
        return state
    if not resume:
        fail(f"{folder} holds an unfinished run; add --resume to continue it")
    return None


def load_checkpoint(path):
    """Load a checkpoint onto the CPU. Exits with one line if it is damaged."""
    try:
        state = load_state(path)
        if not {"train", "finished"} <= state.keys():
            raise ValueError("a file of another kind")
        return state
    except OSError as error:  # it is not there, or may not be read
        fail(f"{path}: {error.strerror}; allow reading it, or choose another --out")
    except Exception as error:  # torch.load raises many kinds
        reason = str(error).split("\n")[0][:80]
        fail(f"{path}: damaged or not a checkpoint ({type(error).__name__}: {reason}); remove it to train again")


def export(args, folder, model, evaluation):
    """--export N: write the first N samples as FOLDER/samples/00000.png, ... and, of a model with a VAE and a refiner,
    the VAE's images as FOLDER/samples-vae/00000.png, ... They are the first images of the headline scores. The images
    of an earlier export are deleted."""
    prior, sampler, steps = headline(model, evaluation)
    x_hat, images, _ = generate(model, args.export, prior, sampler, steps, args.seed, evaluation["batch"])
    parts = {"samples": images}
    if model.vae is not None and model.denoiser_for is not None:
        parts["samples-vae"] = x_hat
    for name, part in parts.items():
        for image in (folder / name).glob("*.png") if RANK == 0 else ():
            image.unlink()
        for k, image in enumerate(part):
            pixels = image.permute(1, 2, 0).numpy()  # (H, W, 3)
            write_with(folder / name / f"{k:05}.png", Image.fromarray(pixels).save, format="png")
        print(folder / name)
    wait_for_all()  # the first process has written all


# ---- 14. Pictures ----------------------------------------------------------------------------------------------------

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


def draw_training(folder, log):
    """training.png: a chart of every column of the log, a list of rows. Returns the last row."""
    from matplotlib.figure import Figure
    steps = [row["step"] for row in log]
    names = [name for name in log[0] if name != "step"]
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    for i, name in enumerate(names, 1):
        axis = figure.add_subplot(rows, columns, i)
        axis.plot(steps, [row[name] for row in log], marker="o" if len(log) < 30 else None)
        axis.set(title=f"{folder.name}: {name}", xlabel="step")
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))  # from zero, so that small differences look small
    write_with(folder / "training.png", figure.savefig, format="png", dpi=110)
    return {name: log[-1][name] for name in names}
