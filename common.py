"""What the stages share, to be called by name: primitives, no frame. Nothing here knows a stage.

Part I    1 diffusion, 2 networks, 3 priors over z, 4 training
Part II   5 the built-in data, 6 files, 7 settings, 8 data sets, 9 devices and processes, 10 runs and pictures

For stage 1, read Diffusion, VAE, UNet and Part I's section 4. Look up the rest when its name comes along.

Conventions, used by every file:
    "As published" refers to DiffuseVAE (Pandey et al. 2022), which stage 1 replicates.
    Images `x0` are float32 tensors (B, 3, H, W) with values in [-1, 1]. Stored data, and all that fid.py scores, are
    uint8 tensors.
    `x_hat` is the coarse image that the VAE decodes from its code z, also in [-1, 1].
    Times `t` run from 1 to T. Time 0 is the clean image, so alpha_bar[0] = 1.
    Losses have the shape (B,), one value per image. A KL or a bound is in nats.
    Random draws come from generators that are seeded with --seed and a purpose. Only initial weights and dropout use
    torch's global generator, which is seeded just before them.
    `settings` is one flat dictionary (section 7).
"""

import atexit
import datetime
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy.cluster.vq import kmeans2
from torch import distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # this process, their number: see 9
bar = partial(tqdm, leave=False, delay=1, disable=RANK > 0)  # a progress bar with the time left


def generator(seed, purpose, device="cpu"):
    """A torch.Generator on `device`, another one for another seed or purpose (a text)."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


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

    def __init__(self, objective, start=1000, device="cpu", T=1000):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        self.T = T
        self.objective = objective
        self.start = start
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

    def draw_t(self, count, gen):
        """`count` training times, uniform on 1..start."""
        return (self.start * torch.rand(count, generator=gen, device=gen.device)).long() + 1

    def target(self, x0, t, eps):
        """What the network is trained to predict at x_t."""
        a, sigma = self.scales(t)
        return eps if self.objective == "eps" else a * eps - sigma * x0

    def level_weight(self, t):
        """A weight of the squared error at times t (B,), so that all noise levels count alike: (B,).

        The plain squared error of v, on our data, is about 0.01 / sigma_t: far larger at the lowest noise levels, where
        the grain of the image is decided, than at the highest, where shapes are. (Karras et al. 2024, arXiv:2312.02696,
        eq. 14 to 21, learn such a weight.)"""
        return 100 * self.eps_scale[t]

    def times(self, settings):
        """The times that sampling visits, falling from `start` to `last_time`, and 0:
            last_time + (start - last_time) (i / (steps - 1))^2 for i = steps - 1, ..., 0, rounded
        such as 400, 232, 112, 40, 16, 0 in five steps from 400.
        The square puts most steps at small times, where fine detail is decided. The maximum with i + 1 keeps the last
        times apart. (Below a time of about 16, on photographs, our networks add grain.)

        A process that begins with pure noise needs more steps, and has a setting of its own for their number."""
        steps = min(settings["sample_steps" if self.start < self.T else "sample_steps_from_T"], self.start)
        last = min(settings["last_time"], self.start)
        times = [last + (self.start - last) * (i / max(1, steps - 1)) ** 2 for i in range(steps)]  # rising
        return [self.start, *(max(round(times[i]), i + 1) for i in range(steps - 2, -1, -1)), 0]

    def x_start(self, x_hat, eps, temperature=1.0):
        """The noisy image from which the reverse process begins: x_hat (B, C, H, W) takes the place of x0. A
        `temperature` above 1 makes up for detail that x_hat lacks. If the process begins at T, this is `eps` alone, as
        published."""
        if self.start == self.T:
            return eps
        return self.x0_scale[self.start] * x_hat + self.eps_scale[self.start] * temperature * eps

    def to_x0(self, prediction, x_t, t, clamp=True):
        """Solve the network's prediction at x_t for x0. `clamp` limits it to [-1, 1]."""
        a, sigma = self.scales(t)
        if self.objective == "eps":
            x0 = (x_t - sigma * prediction) / a  # from x_t = a x0 + sigma eps
        else:
            x0 = a * x_t - sigma * prediction  # a x_t - sigma v = (a^2 + sigma^2) x0 = x0
        return x0.clamp(-1, 1) if clamp else x0

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

    def step(self, sampler, x, x0, times, i, x0_before=None, gen=None):
        """One step of sampling: x at times[i] -> x at times[i + 1]. x0 is the prediction at times[i], x0_before that of
        the step before.

        ddpm   Random (DDPM, algorithm 2): a draw from the posterior. The noise comes from `gen`, a CPU generator.
        ddim   Deterministic (Song et al. 2021, with eta = 0). With x_t = a_t x0 + sigma_t eps it keeps x0
               and eps, and mixes them with the factors of t_next:
                   x_next = sigma_next / sigma_t x_t + (a_next - a_t sigma_next / sigma_t) x0
        dpm    DPM-Solver++(2M) (Lu et al. 2022, algorithm 2). DDIM is exact if the prediction x0 stays the same during
               the step. It does not, so this solver takes it at the middle of the step: the line through the last two
               predictions, as a function of lambda = log(a / sigma), is extended by half a step:
                   x0_middle = x0 + (x0 - x0_before) / (2 r)
                   r = (lambda_t - lambda_before) / (lambda_next - lambda_t)
        """
        t, t_next = times[i], times[i + 1]
        if sampler == "ddpm":
            x0_factor, xt_factor, variance = map(float, self.posterior(t, t_next))  # the last variance is 0
            return x0_factor * x0 + xt_factor * x + math.sqrt(variance) * randn(x.shape, gen).to(x.device)
        if sampler == "dpm" and i > 0 and t_next > 0:  # lambda is infinite at time 0
            alpha_bar = self.alpha_bar[[times[i - 1], t, t_next]]
            lambda_before, lambda_t, lambda_next = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
            r = float((lambda_t - lambda_before) / (lambda_next - lambda_t))
            x0 = x0 + (x0 - x0_before) / (2 * r)
        a_t = float(self.alpha_bar[t].sqrt())
        a_next = float(self.alpha_bar[t_next].sqrt())
        sigma_ratio = math.sqrt((1 - a_next**2) / (1 - a_t**2))
        return sigma_ratio * x + (a_next - a_t * sigma_ratio) * x0


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
    """The U-Net's block (DDPM): GroupNorm, SiLU, 3x3 convolution, twice, with the time embedding added in between; then
    attention, if it has `heads`. x (B, width_in, H, W), emb (B, emb_dim) -> (B, width_out, H, W). `emb` has been
    through a SiLU already."""

    def __init__(self, width_in, width_out, emb_dim, dropout, heads=0):
        super().__init__()
        self.norm1 = GroupNorm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, width_out)
        self.norm2 = GroupNorm(width_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(width_out, width_out, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.attention = Attention(width_out, heads) if heads else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h)))))


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

    `table` lists its levels (resolution, width, blocks on the way down, blocks on the way up), from the image down.
    With [(32, 32, 1, 1), (16, 64, 1, 1)], and ---> for a feature map (a skip) that is joined to a block's input later:

        stem, block (32 wide) ------------------------------------> block --> out
              halve, block (64 wide) -----------------> block, double
                     block with attention, block

    Each block down leaves a skip, and each block up takes the one that was left last. In DDPM each level has one more
    block up than down, (32, 128, 2, 3), which takes the level's input. Our small networks save some of those blocks.
    `attention` lists the resolutions that have self-attention beside the middle. `extra`
    (B, 4 * first width), if given, is added to the time embedding; stage 3 uses it. To double the resolution, a
    convolution follows nearest upsampling, as published, if `pool`; else it comes before, at a quarter of the work."""

    def __init__(self, table, in_channels, out_channels=3, attention=(16,), heads=1, dropout=0.0, pool=True):
        super().__init__()
        width = table[0][1]  # at the place that we have reached
        self.frequency_count = width // 2  # the time embedding has a sine and a cosine for each
        emb_dim = 4 * width  # as in DDPM
        self.time = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        skip_widths = []

        self.down = nn.ModuleList()
        self.input_is_skip = [up_blocks > down_blocks for _, _, down_blocks, up_blocks in table]  # of each level
        for level, (resolution, level_width, down_blocks, _) in enumerate(table):
            if level == 0:
                enter = nn.Conv2d(in_channels, width, 3, padding=1)
            else:
                enter = nn.Conv2d(width, width, 3, stride=2, padding=1)
            if self.input_is_skip[level]:
                skip_widths.append(width)
            blocks = nn.ModuleList()
            for _ in range(down_blocks):
                blocks.append(ResidualBlock(width, level_width, emb_dim, dropout,
                                            heads if resolution in attention else 0))
                width = level_width
                skip_widths.append(width)
            self.down.append(nn.ModuleDict({"enter": enter, "blocks": blocks}))
        self.middle = nn.ModuleList([ResidualBlock(width, width, emb_dim, dropout, heads),
                                     ResidualBlock(width, width, emb_dim, dropout)])

        self.up = nn.ModuleList()
        for level, (resolution, level_width, _, up_blocks) in reversed([*enumerate(table)]):
            blocks = nn.ModuleList()
            for _ in range(up_blocks):
                blocks.append(ResidualBlock(width + skip_widths.pop(), level_width, emb_dim, dropout,
                                            heads if resolution in attention else 0))
                width = level_width
            leave = nn.Identity()
            if level > 0:
                conv, double = nn.Conv2d(width, width, 3, padding=1), nn.Upsample(scale_factor=2)
                leave = nn.Sequential(double, conv) if pool else nn.Sequential(conv, double)
            self.up.append(nn.ModuleDict({"blocks": blocks, "leave": leave}))
        self.norm = GroupNorm(width)
        self.out = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x, t, extra=None):
        # The time as sines and cosines of many frequencies, from 1 down towards 1/10,000 (Vaswani et al. 2017, 3.5)
        exponent = torch.arange(self.frequency_count, device=x.device) / self.frequency_count
        angle = t[:, None].float() * torch.exp(-math.log(10_000) * exponent)  # (B, frequency_count)
        emb = self.time(torch.cat([angle.cos(), angle.sin()], 1))  # (B, 4 * first width)
        emb = F.silu(emb if extra is None else emb + extra)
        h, skips = x, []
        for level, input_is_skip in zip(self.down, self.input_is_skip, strict=True):
            h = level["enter"](h)
            if input_is_skip:
                skips.append(h)
            for block in level["blocks"]:
                h = block(h, emb)
                skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for level in self.up:
            for block in level["blocks"]:
                h = block(torch.cat([h, skips.pop()], 1), emb)
            h = level["leave"](h)
        return self.out(F.silu(self.norm(h))).float()


def build_vae(settings):
    """The VAE of the settings."""
    return VAE(settings["vae_table"], settings["pool"])


def build_unet(settings, in_channels):
    """The U-Net of the settings. Its input is x_t (3 channels), followed by what conditions it."""
    return UNet(settings["unet_table"], in_channels, attention=settings["attention"], heads=settings["heads"],
                dropout=settings["dropout"], pool=settings["pool"])


def frozen(network, weights, device):
    """Load weights into a network; put it on the device, in evaluation mode and without gradients. Returns it."""
    network.load_state_dict(weights)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def encode(encoder, images, device, batch=100):
    """uint8 images (N, 3, H, W) -> mu, logvar of q(z | x), each (N, d) on the CPU."""
    parts = [encoder(to_float(part.to(device))) for part in images.split(batch)]
    mu, logvar = zip(*parts, strict=True)
    return torch.cat(mu).cpu(), torch.cat(logvar).cpu()


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
        """The mixture fitted to codes z (N, d), N larger than `components`, by `rounds` of EM. It begins with clusters,
        and with the covariance of the codes about the mean of their cluster. (Tied, with thousands of components, each
        is a bump around a few codes, and the mixture nearly a kernel density estimate.)"""
        z = z[torch.randperm(len(z), generator=generator(seed, "mixture"))]
        if tied:  # random codes, since k-means would take minutes for thousands of clusters
            means = z[:components]
        else:  # k-means on a part of the codes, which is enough to begin with
            means = torch.from_numpy(kmeans2(z[:10_000].numpy(), components, minit="++", rng=seed)[0])
        nearest = torch.cat([torch.cdist(part, means).argmin(1) for part in z.split(1000)])  # (N,)
        covariance = (z - means[nearest]).T.cov()  # (d, d); cov wants a row for each dimension
        mixture = cls(torch.full((components,), 1 / components), means, cls.factors_of(covariance[None]))
        for _ in bar(range(rounds), desc=f"fitting {components:,} Gaussians", unit="round"):
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


def fit_mixture(vae, images, settings, device):
    """The Gaussian mixture fitted to codes z ~ q(z | x) of the training images: one to ten of each, so that there are
    about 30,000 if possible. Returns its attributes, for a checkpoint."""
    mu, logvar = encode(vae.encoder, images, device)
    gen = generator(settings["seed"], "codes of training images")
    draws = max(1, min(10, 30_000 // len(mu)))
    z = torch.cat([reparameterise(mu, logvar, randn(mu.shape, gen)) for _ in range(draws)])
    return vars(GaussianMixture.fit(z, settings["components"], settings["seed"], settings["tied"]))


def load_vae(checkpoint, device):
    """The VAE of a checkpoint, and the priors over its codes: N(0, I), and the mixture that was fitted to them."""
    vae = frozen(build_vae(checkpoint["settings"]), checkpoint["vae"], device)
    return vae, {"gaussian": GaussianMixture.standard_normal(vae.latent_dim),
                 "gmm": GaussianMixture(**checkpoint["gmm"])}


# ---- 4. Training -----------------------------------------------------------------------------------------------------

def draw_batch(images, settings, gen, flip):
    """A random batch of uint8 images (N, 3, H, W) as floats (B, 3, H, W), each mirrored with a probability of one half
    if `flip`. Several processes share a batch."""
    index = torch.randint(len(images), (settings["batch"] // RANKS,), generator=gen, device=gen.device)
    x = to_float(images[index]).contiguous(memory_format=torch.channels_last)
    if flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=gen, device=gen.device) < 0.5, x.flip(3), x)
    return x


def orthogonalise(matrices, rounds=5):
    """Matrices (K, m, n), each U S V^T -> about U V^T: the singular values become 0.7 to 1.2, except for tiny ones.

    Newton-Schulz iteration with the coefficients of Jordan et al. 2024. (x x^T) x = U S^3 V^T. So matrix products alone
    can turn every singular value s into 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which each round does. That need not be
    precise, so it is done in bfloat16 where that is faster."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values between 0 and 1
    x = x.bfloat16() if has_bfloat16(x.device) else x
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
            if p.grad is None:
                continue
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 1 - momentum)  # average = momentum average + (1 - momentum) gradient
            update = p.grad.lerp(average, momentum).flatten(1)  # Nesterov: (1 - momentum) gradient + momentum average
            updates.setdefault(update.shape, []).append((p, update))
        for (rows, columns), pairs in updates.items():
            scale = max(1, rows / columns) ** 0.5  # Jordan's: of a convolution, the root of outputs / inputs
            orthogonal = orthogonalise(torch.stack([update for _, update in pairs]))
            for (p, _), update in zip(pairs, orthogonal, strict=True):
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


class Optimizer:
    """Muon for the weight matrices of a network, Adam for all other parameters; Adam for all if the setting
    NAME_muon_lr is 0. The base learning rates are NAME_lr (Adam) and NAME_muon_lr (Muon)."""

    def __init__(self, network, settings, name):
        muon_lr = settings[f"{name}_muon_lr"]
        matrices = [p for p in network.parameters() if p.dim() > 1 and muon_lr > 0]
        others = [p for p in network.parameters() if p.dim() <= 1 or muon_lr == 0]
        self.parts = [(torch.optim.Adam(others), settings[f"{name}_lr"])]  # optimizers and their base rates
        if matrices:
            self.parts.append((Muon(matrices), muon_lr))

    def zero_grad(self):
        for optimizer, _ in self.parts:
            optimizer.zero_grad()

    def step(self, rate):
        """One step at `rate` times the base learning rates."""
        for optimizer, base_rate in self.parts:
            optimizer.param_groups[0]["lr"] = rate * base_rate
            optimizer.step()

    def state_dict(self):
        return {"parts": [optimizer.state_dict() for optimizer, _ in self.parts]}

    def load_state_dict(self, state):
        for (optimizer, _), its_state in zip(self.parts, state["parts"], strict=True):
            optimizer.load_state_dict(its_state)


def rate_factor(step, steps, settings):
    """The factor of the base learning rates at a step: a linear rise to 1, then 1 or, with `decay`, a linear fall to 0
    at the end."""
    rise = (step + 1) / max(1, settings["warmup"])
    fall = (steps - step) / max(1, steps - settings["warmup"]) if settings["decay"] else 1
    return min(1, rise, fall)


class MovingAverage:
    """The moving average of a network's weights, {name: tensor}, which is what is sampled from.

    Early on the decay is smaller: 2/11, 3/12, ... towards 1. With 0.9999 alone, a third of the average of a run of
    10,000 steps would be its initial weights (0.9999^10000 = 0.37)."""

    def __init__(self, network, decay):
        self.network = network
        self.decay = decay
        self.weights = {name: value.clone() for name, value in network.state_dict().items()}

    def update(self, step):
        decay = min(self.decay, (2 + step) / (11 + step))
        # average += (1 - decay) * (weight - average), for all tensors at once
        torch._foreach_lerp_([*self.weights.values()], [*self.network.state_dict().values()], 1 - decay)

    def state_dict(self):
        return self.weights

    def load_state_dict(self, weights):
        for name, value in weights.items():
            self.weights[name].copy_(value)


class Progress:
    """Counts the steps of a training, with a progress bar, a log, and a file to go on from:

        progress = Progress(folder, settings, steps, gen, vae=vae, optimizer=optimizer, average=average)
        for step in progress:
            ...
            progress.log(sse=sse)
        checkpoint = progress.finish(vae=average.weights)

    `parts` are all that has a state_dict. About once a minute their states are saved in FOLDER/unfinished.pt, with
    those of the generators. A Progress that finds this file goes on from there and, on a CPU with one process, ends
    with the same bits as if it had never been stopped."""

    def __init__(self, folder, settings, steps, gen, **parts):
        self.folder, self.settings, self.steps, self.gen, self.parts = folder, settings, steps, gen, parts
        self.done, self.seconds = 0, 0.0  # so far
        self.commit = this_commit()
        self.rows, self.sums = [], {}  # of the log; sums of the logged terms since the last row
        if (folder / "unfinished.pt").is_file():
            state = load_state(folder / "unfinished.pt")
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            self.done, self.seconds, self.rows = state["done"], state["seconds"], state["rows"]
            self.commit = state["commit"]
            gen.set_state(state["generator"])
            torch.set_rng_state(state["dropout"])
            if RANK > 0:  # what is saved is that of the first process
                gen.manual_seed(self.done * RANKS + RANK)

    def __iter__(self):
        saved = time.time()
        self.began = saved - self.seconds
        with bar(total=self.steps, initial=self.done, unit="step", desc=self.folder.name, leave=True) as progress_bar:
            while self.done < self.steps:
                yield self.done
                self.done += 1
                self.seconds = time.time() - self.began
                progress_bar.update()
                if self.done % self.settings["every"] == 0 or self.done == self.steps:
                    self.write_row(progress_bar)
                    if time.time() - saved > 60:  # here, since the sums of the log are empty and need not be saved
                        self.save()
                        saved = time.time()

    def log(self, **terms):
        """Log tensors or numbers, as means over the steps since the last row of the log."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).detach().mean()

    def write_row(self, progress_bar):
        """Add a row to the log. Exits if a mean is not finite."""
        steps = self.done - (self.rows[-1]["step"] if self.rows else 0)
        means = {name: float(value) / steps for name, value in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                fail(f"{self.folder.name}: {name} is {mean} by step {self.done}; try a lower learning rate")
        self.rows.append({"step": self.done, **means})
        self.sums = {}
        progress_bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})

    def save(self):
        save_state(self.folder / "unfinished.pt", {
            "settings": self.settings, "done": self.done, "seconds": self.seconds, "rows": self.rows,
            "commit": self.commit, "generator": self.gen.get_state(), "dropout": torch.get_rng_state(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()}})

    def finish(self, base=None, **parts):
        """Save the finished checkpoint and return it, on the CPU: `parts`, all that the model consists of, with the
        settings, the log, the commit of the code, and the minutes, including those of fitting after training, and of
        `base`, the checkpoint that this one builds on."""
        minutes = (time.time() - self.began) / 60 + (base["minutes"] if base else 0)
        save_state(self.folder / "checkpoint.pt", parts | {
            "settings": self.settings, "minutes": minutes, "log": self.rows, "commit": self.commit})
        if RANK == 0:
            (self.folder / "unfinished.pt").unlink(missing_ok=True)
        if RANKS > 1:
            distributed.barrier()
        return load_state(self.folder / "checkpoint.pt")


# ---- 5. The built-in data --------------------------------------------------------------------------------------------

FACTORS = ("size", "x", "y", "hue sine", "hue cosine", "tilt", "lightness", "detail", "band direction", "contrast",
           "spot size")


def draw_shapes(count, seed):
    """The built-in data set: `count` anti-aliased shapes on a grey ground, of random sizes, places and colours.

    A third of the shapes are plain, a third have broad bands, a third are spotted. Outline, colour and bands fit into
    the code of a small VAE. Where each spot lies does not. So the VAE draws a flat tone in place of spots, and the
    refiner has to invent them.
    Returns uint8 images (count, 3, 32, 32), int64 labels (count,) and the FACTORS, float32 (count, 11) in about -1..1.
    """
    gen = torch.Generator().manual_seed(seed)
    parts = [draw_some_shapes(min(1000, count - first), gen) for first in range(0, count, 1000)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def draw_some_shapes(count, gen, size=32):
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
    level = torch.maximum(u.abs() - 0.95, v.abs() - 0.33)
    upright = torch.maximum(u.abs() - 0.33, v.abs() - 0.95)
    distances = torch.stack([
        rho - 0.9,  # disc
        (rho - 0.68).abs() - 0.25,  # ring
        torch.maximum(u.abs(), v.abs()) - 0.78,  # square
        torch.maximum(v, 0.866 * u.abs() - v / 2) - 0.53,  # triangle with equal sides: 0.866 = sin 60 degrees
        # Star: a straight edge from a tip (radius 1) to a notch (radius 1/2); (0.443, 0.897) is the edge's normal.
        0.443 * (rho * to_tip.cos() - 1) + 0.897 * rho * to_tip.sin(),
        torch.minimum(level, upright),  # cross, of two rectangles
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


# ---- 6. Files --------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def fail(message):
    """Print one line that says what is wrong and what to do about it, and exit with status 2."""
    print(f"\nerror: {message}", file=sys.stderr)
    raise SystemExit(2)


def save_state(path, state):
    """Write `state` (tensors and plain values) under a temporary name, then rename the file, so that nobody ever sees
    half of it. Of several processes the first one writes."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        torch.save(state, temporary)
        os.replace(temporary, path)


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


# ---- 7. Settings -----------------------------------------------------------------------------------------------------

# The settings of a run are DEFAULTS, with what BUDGETS changes for its budget and for the data set within it, and what
# flags change. Most values were found by short sweeps.
# Rows of vae_table: (resolution, width, blocks of the encoder, blocks of the decoder).
# Rows of unet_table: (resolution, width, blocks on the way down, blocks on the way up).
VAE_32 = [[32, 32, 1, 1], [16, 64, 2, 1], [8, 96, 2, 1], [4, 128, 2, 1], [1, 128, 1, 1]]
VAE_64 = [[64, 16, 1, 1], [32, 32, 2, 1], [16, 64, 2, 1], [8, 96, 2, 1], [4, 128, 2, 1], [1, 128, 1, 1]]
EVALUATION = {  # how a trained model is sampled and scored
    "prior": "gmm",  # over z: gaussian, gmm or (stage 3) flow
    "sampler": "dpm",  # see Diffusion.step
    "sample_steps": 10,
    "sample_steps_from_T": 25,  # of models that begin with pure noise: see Diffusion.times
    "last_time": 16,  # lowest time at which the network is asked
    "temperature": 1.0,  # factor of the noise in x_start
    "eval_samples": 1000,  # images of the first row of scores
    "eval_batch": 100,  # images sampled at a time
    "grid": [["ddim", 5], ["dpm", 2], ["dpm", 5], ["dpm", 10], ["dpm", 25]],  # samplers and steps of further rows
    "probe_samples": 300,  # images of each further row, and of other measurements (noise, paths)
    "features": "imagenet",  # network of the scores: imagenet, inception or local (see fid.py)
    "export": False,  # whether these samples are written as PNG files, too
}
DEFAULTS = EVALUATION | {
    "batch": 32,  # images per step
    "vae_steps": 4000, "unet_steps": 4000,  # optimisation steps
    "flow_steps": 4000,  # of fitting flow and uncertainty after the VAE is trained (stage 3)
    "vae_muon_lr": 0.02, "unet_muon_lr": 0.01,  # learning rate of Muon, for matrices; 0: Adam for all
    "vae_lr": 2e-3, "unet_lr": 2e-3,  # learning rate of Adam, for all other parameters
    "warmup": 200,  # steps in which the rates rise from 0
    "decay": True,  # then they fall linearly to 0; False: they stay
    "vae_clip": 200.0, "unet_clip": 1.0,  # largest norm of a gradient (the VAE's loss is a sum over pixels)
    "vae_ema": 0.995, "unet_ema": 0.995,  # decay of the moving average of the weights; 0: the weights themselves
    "objective": "v",  # what the U-Net predicts, v or eps; see Diffusion
    "even_levels": True,  # weight noise levels so that all count alike; see Diffusion.level_weight
    "start": 400,  # time at which refinement begins, of 1000; without an x_hat it is always 1000
    "beta": 0.25,  # weight of the KL in the VAE's loss
    "vae_table": VAE_32, "unet_table": [[32, 32, 1, 1], [16, 64, 1, 1], [8, 96, 1, 1]],
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
# A small weight of the KL keeps outlines in the code; such codes lie in many clusters, so the mixture has thousands of
# components. No mirroring: slanted bands would run the other way, as in no image of the data.
SHAPES = {"features": "local", "beta": 0.04, "components": 6000, "tied": True, "vae_flip": False, "unet_flip": False}
BUDGETS = {  # budget: changes for all data sets, and for some
    # Sized for two CPU cores: minutes on shapes, an hour on photographs
    "cpu": ({}, {
        "shapes": SHAPES | {
            "vae_table": [[32, 32, 1, 1], [16, 64, 1, 0], [8, 96, 2, 1], [4, 128, 2, 1], [1, 64, 1, 1]],
            "unet_table": [[32, 32, 0, 1], [16, 48, 1, 1], [8, 64, 1, 1]],
            "vae_steps": 550, "unet_steps": 550, "flow_steps": 3000, "unet_muon_lr": 0.02, "warmup": 40,
            "sample_steps": 5, "temperature": 1.1, "probe_samples": 200},
        "cifar10": {"guidance": 0.5},  # which elsewhere adds more detail than real images have
        "celeba64": {"vae_table": VAE_64, "unet_table": [[64, 32, 0, 1], [32, 48, 1, 1], [16, 64, 1, 1], [8, 96, 1, 1]],
                     "vae_steps": 2000, "unet_steps": 2400, "flow_steps": 2300}}),
    "smoke": ({"vae_steps": 8, "unet_steps": 8, "flow_steps": 8, "warmup": 0, "attention": [16], "components": 2,
               "vae_table": [[32, 8, 1, 0], [16, 16, 1, 0], [4, 32, 2, 1], [1, 8, 0, 0]],
               "unet_table": [[32, 8, 1, 1], [16, 16, 1, 1]], "ae_width": 16, "latent_table": [[1, 16, 1, 1]],
               "every": 4, "sample_steps": 4, "sample_steps_from_T": 4, "eval_samples": 60, "eval_batch": 64,
               "grid": [["ddim", 2]], "probe_samples": 60}, {
        "shapes": SHAPES | {"components": 2},
        "celeba64": {"vae_table": [[64, 8, 1, 0], [16, 16, 1, 0], [4, 32, 2, 1], [1, 8, 0, 0]],
                     "unet_table": [[64, 8, 1, 1], [32, 8, 1, 1], [16, 16, 1, 1]]}}),
    # Sized for half an hour of one data-centre GPU; not timed. See --dry-run for what it takes
    "gpu": ({"vae_table": [[32, 64, 2, 2], [16, 128, 3, 3], [8, 256, 3, 3], [4, 256, 3, 2], [1, 256, 2, 1]],
             "batch": 256, "vae_steps": 12_000, "unet_steps": 12_000, "warmup": 600, "unet_ema": 0.9995,
             "dropout": 0.1, "attention": [16], "heads": 4,
             "unet_table": [[32, 96, 2, 3], [16, 192, 2, 3], [8, 192, 2, 3]], "ae_width": 96,
             "latent_table": [[1, 192, 2, 3], [2, 256, 2, 3]],
             "sample_steps": 25, "eval_samples": 10_000, "eval_batch": 500, "probe_samples": 2000}, {
        "shapes": SHAPES,
        "cifar10": {"guidance": 0.5},
        "celeba64": {"vae_table": [[64, 32, 1, 2], [32, 64, 2, 2], [16, 128, 3, 3], [8, 256, 3, 3], [4, 256, 3, 2],
                                   [1, 256, 2, 1]],
                     "unet_table": [[64, 64, 2, 3], [32, 128, 2, 3], [16, 192, 2, 3], [8, 192, 2, 3]]}}),
    # The published configuration (cifar10/train.yaml and celeba64/train.yaml of DiffuseVAE's code): VAEs of 9.24M and
    # 14.01M parameters, for 500 and 245 epochs; U-Nets of 35.75M and 78.70M, for 2,850 and 500 epochs
    "paper": ({"batch": 128, "vae_lr": 1e-4, "unet_lr": 2e-4, "vae_muon_lr": 0.0, "unet_muon_lr": 0.0, "warmup": 5000,
               "decay": False, "vae_clip": 1e9, "vae_ema": 0.0, "unet_ema": 0.9999, "pool": True, "objective": "eps",
               "even_levels": False, "start": 1000, "beta": 1.0, "attention": [16], "heads": 8, "vae_flip": False,
               "vae_table": [[32, 64, 8, 15], [16, 128, 5, 7], [8, 256, 5, 3], [4, 256, 4, 2], [1, 512, 3, 1]],
               "unet_table": [[32, 128, 2, 3], [16, 256, 2, 3], [8, 256, 2, 3], [4, 256, 2, 3]],
               "vae_steps": 195_000, "unet_steps": 1_110_000, "dropout": 0.3, "components": 50,
               "ae_width": 128, "latent_table": [[1, 256, 2, 3], [2, 512, 2, 3]], "every": 100,
               "sampler": "ddpm", "sample_steps": 1000, "sample_steps_from_T": 1000, "last_time": 1,
               "eval_samples": 50_000, "eval_batch": 500, "probe_samples": 10_000}, {
        "shapes": {"features": "local", "unet_flip": False},
        "celeba64": {"vae_table": [[64, 64, 8, 10], [32, 128, 5, 8], [16, 256, 8, 7], [8, 256, 4, 3], [4, 256, 4, 2],
                                   [1, 512, 2, 1]],
                     "unet_table": [[64, 128, 2, 3], [32, 256, 2, 3], [16, 256, 2, 3], [8, 256, 2, 3], [4, 512, 2, 3]],
                     "batch": 32, "vae_steps": 1_246_000, "unet_steps": 2_543_000, "dropout": 0.1,
                     "components": 75}}),
}
CHOICES = {"objective": ("v", "eps"), "sampler": ("ddpm", "ddim", "dpm"),
           "features": ("imagenet", "inception", "local")}
LEAST = {"warmup": 0, "eval_samples": 40, "probe_samples": 40}  # of other whole numbers it is 1


def budget_settings(budget, dataset):
    """The settings of a budget for a data set. A folder of images has those of celeba64."""
    for_all, for_some = BUDGETS[budget]
    changes = for_some.get("celeba64" if dataset == "folder" else dataset, {})
    return {"dataset": dataset, "image_size": DATASETS[dataset], "budget": budget} | DEFAULTS | for_all | changes


def add_flags(parser, priors=("gaussian", "gmm"), prior="gmm"):
    """Add the flags that all stages share. `priors` are the names of the stage's priors over z, `prior` is its default.
    """
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="shapes", help="default: shapes; all others read --data-dir")
    add("--data-dir", default="data", help="where cifar10/ or celeba/ lie, or a folder of images (default: data)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--budget", choices=("auto", *BUDGETS), default="auto", help="gpu with CUDA, else cpu")
    add("--set", nargs="+", action="extend", metavar="KEY=VALUE", default=[], help="change settings (see --dry-run)")
    add("--seed", type=int, default=0)
    add("--out", default="runs", help="folder for runs (default: runs)")
    add("--resume", action="store_true", help="continue an unfinished run")
    add("--prior", choices=priors, default=prior, help="over z (default: %(default)s)")
    add("--sampler", choices=CHOICES["sampler"])
    add("--sample-steps", type=int)
    add("--eval-samples", type=int)
    add("--export", action="store_true", help="write the samples that are scored as PNG files, too")
    add("--features", choices=("auto", *CHOICES["features"]), default="auto", help="network of the scores; see fid.py")
    add("--weights", help="of the feature network")
    add("--dry-run", action="store_true", help="print all settings and stop")
    parser.set_defaults(priors=priors)


def read_settings(args):
    """The settings that the flags choose, and the device. The training settings that --set changes become a part of the
    name of the folder settings["home"], such as runs/shapes-cpu-beta=0.1. So all runs in a folder share all training
    settings but the seed."""
    device = choose_device(args.device)
    budget = args.budget
    if budget == "auto":
        budget = "gpu" if device.type == "cuda" else "cpu"
    settings = budget_settings(budget, args.dataset) | {"prior": args.prior, "export": args.export}
    if args.features != "auto":
        settings["features"] = args.features
    texts = [f"{key}={getattr(args, key)}" for key in ("sampler", "sample_steps", "eval_samples")
             if getattr(args, key) is not None]
    if args.sample_steps is not None:
        texts.append(f"sample_steps_from_T={args.sample_steps}")
    changes = {}
    for text in texts + args.set:
        key, _, value = text.partition("=")
        if key not in DEFAULTS:
            fail(f"--set {text}: no such setting; there are {', '.join(DEFAULTS)}")
        changes[key] = parse(key, value, CHOICES | {"prior": args.priors})
    settings |= changes
    if settings["batch"] % RANKS > 0:
        fail(f"batch={settings['batch']}: a multiple of the {RANKS} processes is wanted")
    settings["probe_samples"] = min(settings["probe_samples"], settings["eval_samples"])
    changes = {key: value for key, value in changes.items() if key not in EVALUATION}
    name = "-".join([f"{args.dataset}-{budget}", *(f"{key}={value}" for key, value in changes.items())])
    if args.dataset == "folder":
        name = f"{Path(args.data_dir).resolve().name}-{name}"
    return settings | {"changes": changes, "seed": args.seed, "home": str(Path(args.out) / name)}, device


def parse(key, text, choices):
    """The value of a setting from its text. It must have the type of the default, and be one that makes sense."""
    default = DEFAULTS[key]
    if isinstance(default, list):
        fail(f"--set {key}: tables are changed in common.py")
    if isinstance(default, bool):
        allowed = "true or false"
        value = {"true": True, "false": False}.get(text.lower())
    elif isinstance(default, str):
        allowed = " or ".join(choices[key])
        value = text if text in choices[key] else None
    else:
        kind = type(default)
        least = LEAST.get(key, 1) if kind is int else 0
        most = 1000 if key == "start" else math.inf
        allowed = f"a number from {least} on" if most == math.inf else f"a number from {least} to {most}"
        try:
            value = kind(text) if least <= kind(text) <= most and math.isfinite(kind(text)) else None
        except ValueError:
            value = None
    if value is None:
        fail(f"{key}={text}: {allowed} is wanted")
    return value


def sampling_settings(sampler, count):
    """The evaluation settings of `count` steps of a sampler, wherever it begins."""
    return {"sampler": sampler, "sample_steps": count, "sample_steps_from_T": count}


def print_settings(settings, **networks):
    """What --dry-run shows, as one JSON object: all settings, and what each network takes. `networks` is {name:
    (network, its inputs for one image, steps of training, evaluations for a sample)}. A multiply-add counts as two
    operations, a backward pass as two forward ones. The megabytes are those of float32 weights, gradients, moving
    average and, at most (Adam), two moments; not those of feature maps."""
    facts = {}
    for name, (network, inputs, steps, evaluations) in networks.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(*inputs)
        forward, count = counter.get_total_flops(), count_parameters(network)
        facts[name] = {"parameters": count, "megabytes": round(5 * 4 * count / 2**20),
                       "petaoperations of training": round(3 * forward * settings["batch"] * steps / 1e15, 3),
                       "gigaoperations of a sample": round(evaluations * forward / 1e9, 3)}
    print(json.dumps(settings | {"networks": facts}, indent=1))


def vae_and_unet(settings, unet):
    """The rows of print_settings that stages 1 to 3 share."""
    size, vae = settings["image_size"], build_vae(settings)
    code, image, shown = torch.zeros(1, vae.latent_dim), torch.zeros(1, 3, size, size), torch.zeros(1, 6, size, size)
    return {"vae": (vae, (image, code), settings["vae_steps"], 0), "its decoder": (vae.decoder, (code,), 0, 1),
            "unet": (unet, (shown, torch.ones(1)), settings["unet_steps"], settings["sample_steps"])}


def count_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


# ---- 8. Data sets ----------------------------------------------------------------------------------------------------

DATASETS = {"shapes": 32, "cifar10": 32, "celeba64": 64, "folder": 64}  # name: size of an image's side, in pixels
LAYOUTS = {"cifar10": "cifar-10-batches-py/ or cifar10/{train,test}/<class>/*.{png,jpg}",
           "celeba64": "celeba/img_align_celeba/*.jpg"}


@dataclass
class ImageData:
    """A set of images, held whole in memory."""

    images: torch.Tensor  # uint8 (N, 3, H, W)
    note: str  # what every result must say about its data, such as "JPEG copies"
    labels: torch.Tensor | None = None  # int64 (N,)
    factors: torch.Tensor | None = None  # float32 (N, len(FACTORS)), of shapes


class Data(NamedTuple):
    train: ImageData
    test: ImageData  # held out
    reference: ImageData  # the real images of the scores: as usual the training images, but of shapes a fresh draw


def load_data(dataset, data_dir="data"):
    """A data set, as Data. Decoded images are kept in data/cache. Of several processes the first one goes first, so
    that it alone downloads and decodes."""
    if RANKS > 1 and RANK > 0:
        distributed.barrier()
    if dataset == "shapes":
        data = []
        for seed, count in ((1, 20_000), (2, 4_000), (3, 10_000)):
            images, labels, factors = draw_shapes(count, seed)
            data.append(ImageData(images, "drawn by the program", labels, factors))
    else:
        train, test = (load_split(dataset, split, Path(data_dir)) for split in ("train", "test"))
        data = train, test, train
    if RANKS > 1 and RANK == 0:
        distributed.barrier()
    return Data(*data)


def hash_images(images):
    """A short text that is another one for other images. Settings hold that of the training images, so that a finished
    run is not taken for one of other data."""
    return hashlib.sha256(images.numpy().data).hexdigest()[:12]


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
    files = {part: list_files(dataset, part, folder) for part in ("train", "test")}
    if min(map(len, files.values())) < 6:
        fail(f"--data-dir {folder.resolve()}: {len(files['train'])} images of {dataset} to train on and "
             f"{len(files['test'])} held out; six of each are needed")
    files = files[split]
    images = decode_files(dataset, split, files, DATASETS[dataset])
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
    """Image files -> uint8 (N, 3, size, size), kept in data/cache until a file's path, size or time changes."""
    listing = "".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}\n" for path in files)
    key = hashlib.sha256(listing.encode()).hexdigest()[:8]
    cache = Path("data") / "cache" / f"{dataset}-{split}-{size}-{key}.pt"
    if cache.is_file():
        return load_state(cache)
    images = np.empty((len(files), 3, size, size), np.uint8)
    for i, path in enumerate(bar(files, desc=f"decoding {dataset} {split}", unit="image")):
        images[i] = crop(read_image(path), dataset, size).transpose(2, 0, 1)
    save_state(cache, torch.from_numpy(images))
    return torch.from_numpy(images)


def crop(image, dataset, size):
    """A PIL image -> array (size, size, 3). Of CelebA's aligned images (178x218, or smaller in proportion) the 148x148
    box at (15, 40), as NVAE crops them; of others the centred square."""
    if dataset != "celeba64":
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    scale = image.width / 178
    box = (15 * scale, 40 * scale, 163 * scale, 188 * scale)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


# ---- 9. Devices and processes ----------------------------------------------------------------------------------------

# `torchrun --nproc_per_node N stageX.py ...` starts N processes of the same script, numbered RANK = 0, ..., N - 1. Each
# draws its own part of a batch, and gradients are averaged, so their networks stay equal. What comes after training,
# sampling and scoring, is done by the first one alone.

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
        if RANK > 0:  # the first process speaks for all; errors of all are shown
            sys.stdout = open(os.devnull, "w")
    return device


def has_bfloat16(device):
    """Whether a device is faster in bfloat16: GPUs of compute capability 8.0 (which T4, V100 and RTX 20 do not reach),
    and CPUs with AMX (Intel's of servers, since 2023)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def autocast(device):
    """A context in which networks run in bfloat16 where the device has it, and in float32 elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def average_gradients(*networks):
    """Replace the gradients of networks by their means over all processes, in place."""
    if RANKS > 1:
        gradients = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message in place of many
        distributed.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient) / RANKS)


# ---- 10. Runs and pictures -------------------------------------------------------------------------------------------

def run_folder(settings, name):
    """The folder of a run, such as runs/shapes-cpu/stage1-form1-s0."""
    return Path(settings["home"]) / f"{name}-s{settings['seed']}"


def finished(folder, settings, resume):
    """The finished checkpoint of a run's folder, or None if it has to be trained:

        checkpoint = common.finished(folder, settings, args.resume) or train_vae(folder, ...)

    Exits if the folder holds a run with other settings (those of EVALUATION may differ) or other images, or an
    unfinished run and no --resume was given."""
    for name in ("checkpoint.pt", "unfinished.pt"):
        if not (folder / name).is_file():
            continue
        state = load_state(folder / name)
        for key in settings:
            old, new = state["settings"].get(key), settings[key]
            if key == "images" and old != new:
                fail(f"{folder} holds a run on other training images; choose another --out or remove it")
            if key not in (*EVALUATION, "changes", "home") and old != new:
                fail(f"{folder} holds a run with other settings ({key} was {old}, is now {new}); choose another --out "
                     "or remove it")
        if name == "checkpoint.pt":
            return state
        if not resume:
            fail(f"{folder} holds an unfinished run; add --resume to continue it, or remove it")
    return None


def what_to_sample(settings, priors, refines=True):
    """The sets of samples that a stage scores: label, settings, number of images. The first is the headline, that of
    the settings. Then come, with fewer images, all priors and, of a model that refines, other samplers and steps."""
    sets = [("", settings, settings["eval_samples"])]
    for prior in priors:
        sets.append((prior, settings | {"prior": prior}, settings["probe_samples"]))
    for sampler, count in settings["grid"] if refines else []:
        sets.append((f"{sampler} {count}", settings | sampling_settings(sampler, count), settings["probe_samples"]))
    return sets


def this_commit():
    """The commit of this code, ending in "-dirty" if files were changed since, or "unknown" without git."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True,
                              cwd=Path(__file__).resolve().parent).stdout.strip() or "unknown"
    except OSError:  # git is not installed
        return "unknown"


def write_metrics(folder, checkpoint, settings, scorer, rows, networks):
    """Write metrics.json: facts of a finished run, and rows of what was measured of it. The first row is the headline.
    """
    run = {"dataset": settings["dataset"], "variant": folder.name.removesuffix(f"-s{settings['seed']}"),
           "changes": settings["changes"], "budget": settings["budget"], "seed": settings["seed"],
           "data_note": scorer.data.train.note, "features": scorer.extractor.name,
           "minutes": checkpoint["minutes"], "parameters": sum(map(count_parameters, networks)),
           "commit": checkpoint["commit"], "evaluated_at": this_commit(), "settings": settings}
    metrics = {"schema": 1, "run": run, "rows": rows, "training": checkpoint["log"]}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")


def print_results(settings, scorer):
    """Print the headline scores of all runs in the folder of the settings as one table, and where pictures are."""
    names = ["fd", "floor", "is", "kid", "precision", "recall", "hf_energy"]
    print("  ".join(f"{title:16}" for title in ("run", "", "prior, sampler", "images", "sec/image", "minutes", *names)))
    for path in sorted(Path(settings["home"]).glob("*/metrics.json")):
        metrics = json.loads(path.read_text())
        row = metrics["rows"][0]
        cells = [f"{row['prior']}, {row['sampler']} {row['steps']}", str(row["n_generated"]),
                 f"{row['seconds_per_image']:.3f}", f"{metrics['run']['minutes']:.1f}",
                 *(show(row[name]) for name in names if name in row)]
        print("  ".join([f"{path.parent.name:34}", *(f"{cell:16}" for cell in cells)]))
    print(f"features {scorer.extractor.name}; data {settings['dataset']} ({scorer.data.train.note}); compare scores of "
          f"equally many images\npictures and metrics.json: {settings['home']}")


def show(score):
    """A score as text: value [low, high]."""
    interval = f" [{score['low']:.3g}, {score['high']:.3g}]" if "low" in score else ""
    return f"{score['value']:.3g}{interval}"


def export(folder, images):
    """Write uint8 images (N, 3, H, W) as FOLDER/samples/00000.png, ..."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "samples" / f"{k:05}.png")
    print(folder / "samples")


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
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def draw_samples(folder, parts):
    """samples.png: the first 36 images of each of `parts` {label: uint8 (N, 3, H, W)}, twelve in a row, with the rows
    of all parts in turn."""
    rows = {}
    for i in range(3):
        for label, images in parts.items():
            if len(images) > 12 * i:
                rows[f"{label} {i}"] = images[12 * i : 12 * i + 12]
    save_grid(folder / "samples.png", rows)
