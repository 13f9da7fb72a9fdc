"""Primitives that two or more stages share. Read this file once; each stage then reads as maths.

Contents (in order)
    1. Small things      errors, atomic files, device and precision, random numbers
    2. Data              shapes, cifar10, celeba64, folder
    3. Networks          bottleneck-residual VAE, DDPM U-Net, EMA, counting FLOPs
    4. Diffusion         schedule, q_sample, posterior, samplers (DDPM, DDIM, DPM-Solver++), bits per dimension
    5. Priors            N(0, I), the Gaussian mixture fitted ex post
    6. Budgets           one table: how large, how long, how much is evaluated
    7. Runs              flags, config, log, checkpoints, metrics schema
    8. Pictures          grids, charts, hf_energy, tables
    9. Evaluation        drawing images, damaging x_hat, bits per dimension, everything measured of one model

Conventions (used by every file)
    Images `x0` are float32 (B, 3, H, W) in [-1, 1]; stored data and whatever `fid.py` sees are uint8. Saving rounds.
    `x_hat` is the VAE's reconstruction in [-1, 1]; its squared error `sse` is counted in [0, 1] units (SSE / 4).
    Time `t` runs 1..T and `alpha_bar[0] = 1`. Schedule constants are float64, cast where they are used.
    Losses have shape (B,), in nats per image unless the name says otherwise (`eps_mse`: mean over dimensions).
    Every random draw that decides a result comes from an explicit torch.Generator; dropout alone uses the global one.
"""

import argparse
import atexit
import contextlib
import csv
import ctypes
import functools
import gc
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import distributed, nn
from tqdm import tqdm

import fid

# ---------------------------------------------------------------------------------------------------------------------
# 1. Small things
# ---------------------------------------------------------------------------------------------------------------------


def fail(message):
    """Print one line that says what is wrong and what to do, and exit with status 2."""
    gc.collect()  # else a forgotten bar may be closed while tqdm goes through all bars to clear them, which it resents
    tqdm.write(f"error: {message}", file=sys.stderr)  # tqdm's own print: it does not tear a progress bar
    raise SystemExit(2)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path; rename it to `path` if the block succeeds, so that no half-written file is ever seen. Of
    several processes only the first one's file is kept."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if rank() == 0:
            os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; free some space there or choose another --out / --data-dir")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def choose_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps` -> torch.device; exits if that device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not index.isdigit()):
        fail(f"--device {name}: unknown device; use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu or auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: not available on this machine; use --device cpu or auto")
    return torch.device(name)


def autocast(device):
    """bfloat16 autocast where the hardware has it natively (emulation is slower than float32), else a no-op."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bool(native))


def keep_freed_memory():
    """Let glibc keep what is freed: handing every large tensor back to the kernel costs 33,000 page faults, a tenth of
    the time, in each training step on a CPU. Does nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own from the kernel
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


# Several processes (torchrun --nproc_per_node N stageX.py ...): all of them run the same script on the same random
# numbers, take their slice of every training batch, average the gradients, and share out what is sampled. So they stay
# equal, the number of processes changes nothing but the speed, and the first one alone writes. This is what
# DistributedDataParallel does, without its overlap of sending and computing, and works for stage 2's backward, too.


def rank():
    """This process's number among those that torchrun started: 0 where there is but one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks():
    """How many processes torchrun started."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def join_ranks(device, batch):
    """Meet the other processes, if torchrun started any (gloo on a CPU, nccl on GPUs); returns this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if batch % int(os.environ["WORLD_SIZE"]):
        fail(f"--batch-size {batch}: must be a multiple of the {os.environ['WORLD_SIZE']} processes")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(distributed.destroy_process_group)
    if rank() > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    return device


def wait_for_ranks():
    """Go on when all processes have come this far."""
    if ranks() > 1:
        distributed.barrier()


def share(*batches):
    """This process's slices of tensors that hold a whole batch, each (B, ...) -> (B / ranks, ...)."""
    return [x.chunk(ranks())[rank()] for x in batches]


def average_over_ranks(tensors):
    """Replace tensors, such as gradients, by their means over all processes, in place."""
    if ranks() > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        distributed.all_reduce(flat)
        torch._foreach_copy_(tensors, [part.view_as(x) / ranks() for part, x in
                                       zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)])


def average_gradients(network):
    """Make the gradient of this process's slice that of the whole batch: losses are means, and slices equally large."""
    average_over_ranks([p.grad for p in network.parameters() if p.grad is not None])


def gather(parts):
    """Lists of batches, one list per process, in turn: process r has made batch r, r + ranks, ... Returns all."""
    if ranks() == 1:
        return parts
    lists = [None] * ranks()
    distributed.all_gather_object(lists, parts)
    return [lists[i % ranks()][i // ranks()] for i in range(sum(map(len, lists)))]


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


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data
# ---------------------------------------------------------------------------------------------------------------------

DATASETS = ("shapes", "cifar10", "celeba64", "folder")
SHAPE_CLASSES = ("disc", "ring", "square", "triangle", "flower", "cross", "pill", "crescent")
FACTORS = ("size", "x", "y", "hue sine", "hue cosine", "rotation sine", "rotation cosine", "band period", "band angle")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
CACHE_VERSION = 1  # raise it when decoding changes: older caches are then rebuilt


@dataclass
class ImageData:
    """One split of a data set, held whole in memory: images uint8 (N, 3, H, W), labels int64 (N,) or None,
    factors float32 (N, len(FACTORS)) or None, and what a result must say about its data."""

    images: torch.Tensor
    labels: torch.Tensor | None
    factors: torch.Tensor | None
    name: str
    split: str
    crop: str
    note: str


def hue_to_rgb(hue):
    """Fully saturated colour of hue in [0, 1): (...,) -> (..., 3) in [0, 1]."""
    return ((hue[..., None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6 - 3).abs().sub(1).clamp(0, 1)


def draw_shapes(count, seed, size=32):
    """The built-in data set: `count` anti-aliased shapes over a two-colour gradient, with fine two-tone bands inside.

    A small VAE cannot afford the bands and the exact edges, so it blurs them: what the refiner has to restore.
    The bands are fixed to the image grid (period 3 or 4 pixels; horizontal, vertical or diagonal).
    Returns uint8 images (count, 3, size, size), int64 labels (count,), float32 factors (count, 9), see FACTORS.
    """
    gen = generator(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=gen)

    label = torch.randint(len(SHAPE_CLASSES), (count,), generator=gen)
    radius, cx, cy = uniform(8, 13), uniform(11, 21), uniform(11, 21)
    hue, angle = uniform(0, 1), uniform(0, 2 * math.pi)
    period = torch.randint(3, 5, (count,), generator=gen)
    direction = torch.randint(3, (count,), generator=gen)
    backdrop, tilt = hue_to_rgb(torch.rand(count, 2, generator=gen)) * 0.5 + 0.1, uniform(0, 2 * math.pi)
    colour = hue_to_rgb(hue) * 0.75 + 0.2  # (N, 3)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for part in torch.arange(count).split(1000):
        at = lambda v, part=part: v[part][:, None, None]  # noqa: E731 - (P,) -> (P, 1, 1), to meet (H, W)
        x, y = columns + 0.5 - at(cx), rows + 0.5 - at(cy)
        u = (x * at(angle).cos() + y * at(angle).sin()) / at(radius)  # the shape's own frame, radius 1
        v = (y * at(angle).cos() - x * at(angle).sin()) / at(radius)
        rho, theta = torch.hypot(u, v), torch.atan2(v, u)
        arm, bar = torch.maximum(u.abs() - 0.95, v.abs() - 0.33), torch.maximum(u.abs() - 0.33, v.abs() - 0.95)
        distances = torch.stack([  # signed distance to each outline (negative inside), about exact near it
            rho - 0.9,
            (rho - 0.7).abs() - 0.27,
            torch.maximum(u.abs(), v.abs()) - 0.78,
            torch.maximum(u, torch.maximum(-u / 2 + v * 0.866, -u / 2 - v * 0.866)) - 0.5,
            (rho - 0.72 - 0.24 * torch.cos(5 * theta)) * 0.7,
            torch.minimum(arm, bar),
            torch.hypot((u.abs() - 0.55).clamp(min=0), v) - 0.42,
            torch.maximum(rho - 0.95, 0.75 - torch.hypot(u - 0.5, v)),
        ], dim=1)  # (P, 8, H, W)
        distance = distances[torch.arange(len(part)), label[part]]  # (P, H, W)
        cover = (0.5 - distance * at(radius)).clamp(0, 1)  # share of the pixel inside the outline
        along = torch.stack([rows + 0 * columns, columns + 0 * rows, rows + columns])[direction[part]]  # (P, H, W)
        light = (along % at(period) < at(period) // 2).float()  # two-tone: 1 light, 0 dark
        blend = ((columns - 16) * at(tilt).cos() + (rows - 16) * at(tilt).sin()) / (1.4 * size) + 0.5
        low, high = backdrop[part, 0, :, None, None], backdrop[part, 1, :, None, None]
        ground = low + (high - low) * blend[:, None]  # (P, 3, H, W)
        inside = colour[part][:, :, None, None] * (0.55 + 0.45 * light[:, None])
        images[part] = ((ground + (inside - ground) * cover[:, None]).clamp(0, 1) * 255).round().to(torch.uint8)
    factors = torch.stack([(radius - 10.5) / 2.5, (cx - 16) / 5, (cy - 16) / 5,
                           (2 * math.pi * hue).sin(), (2 * math.pi * hue).cos(), angle.sin(), angle.cos(),
                           period * 2.0 - 7, direction - 1.0], dim=1)
    return images, label, factors


def find_files(folder, pattern="*"):
    """Image files below `folder`, recursively, sorted by their path; hidden ones are left out."""
    found = (p for p in Path(folder).rglob(pattern) if p.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def to_rgb(image):
    """A PIL image of any mode as RGB. Of 16 bits of grey the upper 8 stay: PIL's own conversion clips them at 255."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert("RGB")


def open_image(path):
    """An image file as RGB, upright; exits naming the file if it cannot be read."""
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        fail(f"{path}: cannot be read as an image ({error}); replace or remove this file")


def decode(path, size, crop):
    """One image file -> uint8 array (size, size, 3). `crop`: `none` and `centre` take the centred square, `celeba-148`
    the 148x148 box at (15, 40) of the 178x218 aligned image, in proportion for smaller copies (as NVAE crops)."""
    image = open_image(path)
    width, height = image.size
    if crop == "celeba-148":
        scale = width / 178
        box = (15 * scale, 40 * scale, 163 * scale, 188 * scale)
        if box[3] > height:
            fail(f"{path}: {width}x{height} is not an aligned CelebA image (178x218 or smaller in proportion)")
    else:
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    if (width, height) != (size, size):  # PIL's filter is anti-aliased when it shrinks
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


def list_split(dataset, split, folder):
    """The files of a split, their labels (or None), the crop's name and the data note; None where there are none."""
    if dataset == "cifar10":
        files = find_files(folder / "cifar10" / split)
        classes = sorted({p.name for p in (folder / "cifar10").glob("*/*") if p.is_dir()})  # of both splits
        labels = [classes.index(p.parent.name) for p in files]
        lossy = any(p.suffix.lower() in (".jpg", ".jpeg") for p in files)
        return files, labels, "none", "JPEG copies" if lossy else ""
    if dataset == "celeba64":
        files = find_files(folder / "celeba" / "img_align_celeba")
        partition = folder / "celeba" / "list_eval_partition.txt"
        if partition.is_file():
            part = dict(line.split()[:2] for line in partition.read_text().splitlines() if line.strip())
            files = [p for p in files if part.get(p.name) == {"train": "0", "test": "2"}[split]]
        else:
            edge = len(files) - len(files) // 10  # no partition file: the last tenth by name is the test split
            files = files[:edge] if split == "train" else files[edge:]
        width, height = open_image(files[0]).size if files else (178, 218)
        return files, None, "celeba-148", "" if width == 178 else f"JPEG copies at {width}x{height}"
    files = find_files(folder)
    edge = len(files) - len(files) // 10
    lossy = any(p.suffix.lower() in (".jpg", ".jpeg") for p in files)
    return files[:edge] if split == "train" else files[edge:], None, "centre", "JPEG files" if lossy else ""


def download(dataset, split, folder):
    """Fetch CIFAR-10 or CelebA through torchvision into its own layout; returns images, labels, crop, note."""
    if dataset == "cifar10":
        from torchvision.datasets import CIFAR10
        source = CIFAR10(str(folder), train=split == "train", download=not (folder / "cifar-10-batches-py").is_dir())
        return torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(source.targets), "none", ""
    import gdown  # noqa: F401 - torchvision needs it to fetch CelebA
    from torchvision.datasets import CelebA
    CelebA(str(folder), split="all", download=True)
    return None


def load_images(dataset, split, data_dir="data", image_size=None):
    """Load one split (`train` or `test`) of a data set into memory as uint8; see DATASETS.

    Decoded files are cached as one array (in `DATA_DIR/cache`); the cache is rebuilt when the files change.
    Exits with one line that names the folder, the accepted layouts and the remedy if there is nothing to load.
    """
    if dataset == "shapes":
        images, labels, factors = draw_shapes(20_000 if split == "train" else 4_000, seed=1 if split == "train" else 2)
        return ImageData(images, labels, factors, "shapes", split, "none", "drawn by the program")
    folder, size = Path(data_dir), image_size or {"cifar10": 32}.get(dataset, 64)
    if dataset == "folder" and not folder.is_dir():
        fail(f"--data-dir {folder}: no such folder; give the folder that holds your images")
    files, labels, crop, note = list_split(dataset, split, folder)
    if dataset == "folder" and len(find_files(folder)) < 20:
        fail(f"--data-dir {folder}: found {len(find_files(folder))} images there; at least 20 are needed")
    if not files:
        try:
            loaded = download(dataset, split, folder)
        except Exception as error:  # no gdown, no network, a broken archive: the remedy is the same
            layout = {"cifar10": "cifar-10-batches-py/ or cifar10/{train,test}/<class>/*.png",
                      "celeba64": "celeba/img_align_celeba/*.jpg"}[dataset]
            fail(f"--dataset {dataset}: nothing in {folder.resolve()} and no download ({type(error).__name__}); "
                 f"put {layout} there, name its folder with --data-dir, or use --dataset shapes")
        if loaded is not None:
            return ImageData(loaded[0], loaded[1], None, dataset, split, loaded[2], loaded[3])
        files, labels, crop, note = list_split(dataset, split, folder)
    name = folder.resolve().name if dataset == "folder" else dataset
    listing = "".join(f"{p.relative_to(folder)} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in files)
    key = hashlib.sha256(f"{CACHE_VERSION} {crop} {size} {folder.resolve()}\n{listing}".encode()).hexdigest()
    home = Path("data") if dataset == "folder" else folder
    cache = home / "cache" / f"{name}-{split}-{crop}-{size}.npz"
    images = None
    if cache.is_file():
        with contextlib.suppress(Exception):  # a damaged cache is simply rebuilt
            stored = np.load(cache)
            if str(stored["key"]) == key:
                images = stored["images"]
    if images is None:
        images = np.stack([decode(p, size, crop) for p in tqdm(files, desc=f"decoding {name} {split}", unit="image")])
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        with atomic(cache) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, images=images, key=key)
    images, labels = torch.from_numpy(images), torch.tensor(labels) if labels is not None else None
    if split == "test":  # files come class by class: in random order the first N held-out images stand for all
        order = torch.randperm(len(images), generator=generator(0))
        images, labels = images[order], labels[order] if labels is not None else None
    return ImageData(images, labels, None, name, split, crop, note)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Networks
# ---------------------------------------------------------------------------------------------------------------------


class BottleneckBlock(nn.Module):
    """Residual block of the VAE: GELU before each of 1x1, 3x3, 3x3, 1x1 convolutions, half the width inside, no
    normalisation (VDVAE, Child 2021, as DiffuseVAE uses it). At resolution 1 the 3x3s are 1x1. (B, C, H, W) kept."""

    def __init__(self, width, resolution):
        super().__init__()
        inner, kernel = width // 2, 3 if resolution > 1 else 1
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
    resolution 1, whose width is d. Between resolutions: one block, then `pool`, as published (average pooling and a
    bias-free 1x1 convolution), or a strided convolution over the same window, which keeps where things are: the
    published one has to learn that from the zero padding, which takes far more images than a short training sees."""

    def __init__(self, table, pool):
        super().__init__()
        layers = [nn.Conv2d(3, table[0][1], 3, padding=1, bias=False)]
        for (resolution, width, blocks), below in zip(table, table[1:] + [None], strict=True):
            layers += [BottleneckBlock(width, resolution) for _ in range(blocks)]
            if below:
                k = resolution // below[0]
                layers += [BottleneckBlock(width, resolution)]
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
        """x0 (B, 3, H, W), noise (B, d) standard normal -> x_hat, mu, logvar (reparameterised, Kingma & Welling)."""
        mu, logvar = self.encoder(x0)
        return self.decoder(mu + (0.5 * logvar).exp() * noise), mu, logvar


def gaussian_kl(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)) summed over dimensions: (B, d), (B, d) -> (B,) nats."""
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32, with 32 groups at the published widths and groups of 4 channels in narrow layers. Autocast
    does so on a GPU; on a CPU it leaves it in bfloat16, which is coarser and four times as slow."""

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
    """The DDPM U-Net. `table` lists (resolution, width, blocks down, blocks up) from the image's resolution down;
    `attention` the resolutions with self-attention. DDPM has one block more going up than down, so that every skip
    is used; equal numbers (the first skip of a level then goes unused) are cheaper where resolution is dear.

    x (B, in_channels, H, W), t (B,) in 1..T -> (B, out_channels, H, W). `extra` (B, 4 * first width), where given,
    is added to the time embedding. The output starts at zero.
    """

    def __init__(self, table, in_channels, out_channels=3, attention=(16,), heads=1, dropout=0.0):
        super().__init__()
        width = table[0][1]
        emb_dim = 4 * width
        self.time = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)

        def layer(width_in, width_out, resolution):
            return nn.ModuleList([ResidualBlock(width_in, width_out, emb_dim, dropout),
                                  Attention(width_out, heads) if resolution in attention else nn.Identity()])

        self.down, self.shrink, skips = nn.ModuleList(), nn.ModuleList(), []
        for resolution, out, down, _ in table:
            widths = [width] + down * [out]  # of the features that enter the level and leave each of its blocks
            self.down.append(nn.ModuleList(layer(w, out, resolution) for w in widths[:-1]))
            skips.append(widths)
            width = out
            self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.middle = nn.ModuleList([ResidualBlock(width, width, emb_dim, dropout), Attention(width, heads),
                                     ResidualBlock(width, width, emb_dim, dropout)])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for (resolution, out, _, up), widths in zip(reversed(table), reversed(skips), strict=True):
            blocks = nn.ModuleList()
            for _ in range(up):
                blocks.append(layer(width + widths.pop(), out, resolution))
                width = out
            self.up.append(blocks)
            self.grow.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        del self.shrink[-1], self.grow[-1]  # nothing below the last level, nothing above the first
        self.norm, self.out = GroupNorm(width), zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x, t, extra=None):
        half = self.time[0].in_features // 2
        frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=x.device) / half)
        angle = t[:, None].float() * frequency  # (B, half)
        emb = self.time(torch.cat([angle.cos(), angle.sin()], 1))  # (B, 4 * first width)
        emb = F.silu(emb if extra is None else emb + extra)
        h, levels = self.stem(x), []
        for i, blocks in enumerate(self.down):
            levels.append([h])
            for residual, attention in blocks:
                h = attention(residual(h, emb))
                levels[-1].append(h)
            h = self.shrink[i](h) if i < len(self.shrink) else h
        h = self.middle[2](self.middle[1](self.middle[0](h, emb)), emb)
        for i, blocks in enumerate(self.up):
            skips = levels.pop()
            for residual, attention in blocks:
                h = attention(residual(torch.cat([h, skips.pop()], 1), emb))
            h = self.grow[i](h) if i < len(self.grow) else h
        return self.out(F.silu(self.norm(h))).float()


def build_vae(train):
    """The VAE of the train settings."""
    return VAE(train["encoder"], train["decoder"], train["pool"])


def build_unet(train, in_channels):
    """The U-Net of the train settings; it sees x_t (3 channels) and, below it, what conditions it."""
    return UNet(train["unet"], in_channels, attention=train["attention"], heads=train["heads"],
                dropout=train["dropout"])


def restore(network, weights, device):
    """Load weights into a network, in evaluation mode on the device."""
    network.load_state_dict(weights)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def compile_networks(module, train):
    """torch.compile each encoder, decoder and U-Net within a module, if the settings say so; parameters stay theirs."""
    for part in module.modules():
        if train["compile"] and isinstance(part, (Encoder, Decoder, UNet)):
            part.compile()


class EMA:
    """Exponential moving average of a model's parameters with warm-up: decay = min(decay, (1 + n) / (10 + n)).

    Without the warm-up a short run would be judged on its random start: 0.9999^10000 = 0.37. Decay 0 copies."""

    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in model.state_dict().items()}

    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = list(self.weights.values()), [p.detach() for p in model.state_dict().values()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)


def count_cost(model, *inputs):
    """Parameters and forward GFLOPs (a multiply-add counts 2) of a `model` built on the `meta` device."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused CPU attention counts as 0
        model(*inputs)
    return {"parameters": sum(p.numel() for p in model.parameters()), "gflops": counter.get_total_flops() / 1e9}


def network_cost(train, vae=True, channels=6):
    """count_cost of the VAE (None without `vae`) and of a U-Net with so many input channels (None without)."""
    size, cost = train["image_size"], {}
    with torch.device("meta"):
        if vae:
            net = build_vae(train)
            cost["vae"] = count_cost(net, torch.empty(1, 3, size, size), torch.empty(1, net.latent_dim))
        if channels:
            net = build_unet(train, channels)
            cost["unet"] = count_cost(net, torch.empty(1, channels, size, size), torch.ones(1))
    return cost


# ---------------------------------------------------------------------------------------------------------------------
# 4. Diffusion
# ---------------------------------------------------------------------------------------------------------------------


class Diffusion:
    """The Gaussian diffusion process of DDPM (Ho et al. 2020): linear beta from 1e-4 to 0.02 over T steps.

    `objective` says what the network predicts: `eps`, or `v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0`
    (Salimans & Ho 2022), which stays well conditioned at every noise level and so suits short trainings.
    `residual_sd` above 0 spares it what a blurred image of x0 tells already, see `guess`.
    """

    def __init__(self, objective="eps", T=1000, device="cpu", residual_sd=0.0):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        self.T, self.objective, self.residual_sd = T, objective, residual_sd
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])  # (T + 1,), [0] = 1
        self.signal = self.alpha_bar.sqrt().float().to(device)  # (T + 1,) factor of x0 in x_t
        self.noise = (1 - self.alpha_bar).sqrt().float().to(device)  # (T + 1,) factor of eps in x_t

    def factors(self, t):
        """t (B,) -> the factors of x0 and eps in x_t, each (B, 1, 1, 1)."""
        return self.signal[t][:, None, None, None], self.noise[t][:, None, None, None]

    def q_sample(self, x0, t, eps):
        """Draw x_t ~ q(x_t | x0) = N(sqrt(alpha_bar) x0, 1 - alpha_bar), with `eps` as the noise (DDPM eq. 4)."""
        a, s = self.factors(t)
        return a * x0 + s * eps

    def draw_t(self, count, power, gen):
        """Training times t = ceil(T u^power), u uniform: (count,) in 1..T. A power above 1 prefers low noise."""
        u = torch.rand(count, generator=gen, device=gen.device)
        return (self.T * u**power).long() + 1

    def target(self, x0, t, eps):
        """What the network is trained to predict at x_t."""
        a, s = self.factors(t)
        return eps if self.objective == "eps" else a * eps - s * x0

    def guess(self, xt, x_hat, t):
        """The part of the target that needs no network, given a blurred x_hat (B, C, H, W): its mean, were
        x0 ~ N(x_hat, residual_sd^2 I). The network predicts the rest, in units of `guess_sd`, and need not learn to
        copy x_hat (preconditioning, Karras et al. 2022 section 5). Without residual_sd, as in DiffuseVAE: 0."""
        if self.residual_sd == 0:
            return 0.0
        a, s = self.factors(t)
        eps = (xt - a * x_hat) * s / (a**2 * self.residual_sd**2 + s**2)
        return self.target((xt - s * eps) / a, t, eps)

    def guess_sd(self, t):
        """Standard deviation of the target about the guess, (B, 1, 1, 1); 1 without residual_sd."""
        if self.residual_sd == 0:
            return 1.0
        a, s = self.factors(t)
        return (a if self.objective == "eps" else 1) * self.residual_sd / (a**2 * self.residual_sd**2 + s**2).sqrt()

    def complete(self, output, xt, x_hat, t):
        """The U-Net's output (B, C, H, W), in units of guess_sd about the guess -> the prediction of the target."""
        return self.guess(xt, x_hat, t) + self.guess_sd(t) * output

    def simple_loss(self, denoise, x0, t, eps):
        """Mean squared error of the prediction `denoise(x_t, t)` (DDPM eq. 14), in units of guess_sd (1 without
        residual_sd), mean over dimensions: (B,)."""
        error = denoise(self.q_sample(x0, t, eps), t) - self.target(x0, t, eps)
        return ((error / self.guess_sd(t)) ** 2).flatten(1).mean(1)

    def predict(self, output, xt, t, clamp=True):
        """Network output -> (x0, eps). x0 is clamped to [-1, 1], then eps is derived from it again, so they agree."""
        a, s = self.factors(t)
        x0 = (xt - s * output) / a if self.objective == "eps" else a * xt - s * output
        x0 = x0.clamp(-1, 1) if clamp else x0
        return x0, (xt - a * x0) / s

    def posterior(self, t, s):
        """q(x_s | x_t, x0) for integers s < t as (c_x0, c_xt, variance): mean = c_x0 x0 + c_xt x_t (DDPM eq. 7).

        `variance` is beta_tilde (`fixedsmall`); the other choice, beta = 1 - alpha_bar[t] / alpha_bar[s]
        (`fixedlarge`), comes fourth. With s = t - 1 these are DDPM's; other s give the respaced process.
        """
        bar_t, bar_s = float(self.alpha_bar[t]), float(self.alpha_bar[s])
        beta = 1 - bar_t / bar_s
        c_x0 = math.sqrt(bar_s) * beta / (1 - bar_t)
        c_xt = math.sqrt(bar_t / bar_s) * (1 - bar_s) / (1 - bar_t)
        return c_x0, c_xt, beta * (1 - bar_s) / (1 - bar_t), beta


def time_grid(T, steps, spacing="quadratic"):
    """0 = tau_0 < ... < tau_steps = T. `quadratic`: tau_i = max(round(T (i/n)^2), i), dense near 0, where fine detail
    is decided; `uniform`: tau_i = round(T i/n). Strictly increasing for every 1 <= steps <= T."""
    power = 2 if spacing == "quadratic" else 1
    return [max(round(T * (i / steps) ** power), i) for i in range(steps + 1)]


def ddpm_step(diffusion, x, x0, t, s, variance, gen):
    """Ancestral sampling, DDPM algorithm 2: the posterior's mean plus noise (none in the last step, s = 0)."""
    c_x0, c_xt, small, large = diffusion.posterior(t, s)
    noise = randn(x.shape, gen) if s > 0 else 0.0
    return c_x0 * x0 + c_xt * x + math.sqrt(small if variance == "fixedsmall" else large) * noise


def ddim_step(diffusion, x0, eps, t, s, eta, gen):
    """DDIM (Song et al. 2021) eq. 12: eta = 0 is deterministic, eta = 1 has DDPM's fixedsmall variance."""
    bar_s, sigma2 = float(diffusion.alpha_bar[s]), eta**2 * diffusion.posterior(t, s)[2]
    noise = randn(x0.shape, gen) if sigma2 > 0 else 0.0
    return math.sqrt(bar_s) * x0 + math.sqrt(1 - bar_s - sigma2) * eps + math.sqrt(sigma2) * noise


def dpm_step(diffusion, x, x0, x0_before, r, t, s):
    """DPM-Solver++(2M) (Lu et al. 2022) algorithm 2: extrapolate x0 from the last two predictions, then one exact
    step of the linear part. With sigma ratios in place of exp(-h) it also holds at s = 0, where it returns x0."""
    a_t, a_s = (math.sqrt(float(diffusion.alpha_bar[k])) for k in (t, s))
    ratio = math.sqrt((1 - a_s**2) / (1 - a_t**2))  # sigma_s / sigma_t
    d = x0 if x0_before is None or s == 0 else x0 + (x0 - x0_before) / (2 * r)  # first and last: first order
    return ratio * x + (a_s - a_t * ratio) * d


@torch.no_grad()
def sample(diffusion, denoise, x_T, sampler="dpm", steps=25, gen=None, eta=0.0, clamp=True, spacing="quadratic"):
    """Run the reverse process from x_T (B, C, H, W) to x_0 with `steps` evaluations of `denoise(x, t) -> output`.

    `sampler`: `ddpm` (fixedlarge on all T steps, fixedsmall when respaced: fixedlarge then leaves visible noise),
    `ddim` (with `eta`) or `dpm`. `gen` serves the samplers that add noise.
    """
    grid, x, before = time_grid(diffusion.T, steps, spacing), x_T, None
    log_snr = torch.log(diffusion.alpha_bar / (1 - diffusion.alpha_bar)) / 2  # lambda_t of DPM-Solver; inf at t = 0
    for i in range(steps, 0, -1):
        t, s = grid[i], grid[i - 1]
        times = torch.full((len(x),), t, device=x.device)
        x0, eps = diffusion.predict(denoise(x, times), x, times, clamp)
        if sampler == "ddpm":
            x = ddpm_step(diffusion, x, x0, t, s, "fixedlarge" if steps == diffusion.T else "fixedsmall", gen)
        elif sampler == "ddim":
            x = ddim_step(diffusion, x0, eps, t, s, eta, gen)
        else:
            r = 1.0 if before is None or s == 0 else float((log_snr[t] - log_snr[grid[i + 1]])
                                                           / (log_snr[s] - log_snr[t]))
            x, before = dpm_step(diffusion, x, x0, before, r, t, s), x0
    return x


def discretised_log_likelihood(x0, mean, sd):
    """log P of uint8 values under N(mean, sd^2) on [-1, 1] with bins of +-1/255 and open tails (DDPM eq. 13).
    x0 is to_float() of the pixels; all (B, ...), result (B,) nats, in float64 on the CPU."""
    x0, mean = x0.cpu().double(), mean.cpu().double()
    upper = torch.special.ndtr((x0 + 1 / 255 - mean) / sd).where(x0 < 0.999, torch.ones_like(x0))
    lower = torch.special.ndtr((x0 - 1 / 255 - mean) / sd).where(x0 > -0.999, torch.zeros_like(x0))
    return (upper - lower).clamp(min=1e-12).log().flatten(1).sum(1)


def kl_step(diffusion, x0, x0_hat, t, variance="fixedlarge"):
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) where the model puts x0_hat in place of x0: (B,) nats, t in 2..T."""
    c_x0, _, small, large = torch.tensor([diffusion.posterior(int(j), int(j) - 1) for j in t], device=x0.device).T
    model = large if variance == "fixedlarge" else small
    constant = 0.5 * x0[0].numel() * (model.log() - small.log() + small / model - 1)
    return constant + c_x0**2 / (2 * model) * ((x0 - x0_hat) ** 2).flatten(1).sum(1)


def kl_prior(diffusion, x0):
    """L_T = KL(q(x_T | x0) || N(0, I)): (B,) nats, almost nothing."""
    bar_T = float(diffusion.alpha_bar[diffusion.T])
    return 0.5 * (bar_T * x0**2 - bar_T - math.log(1 - bar_T)).flatten(1).sum(1)


def data_nats(diffusion, x0, x0_hat):
    """L_0 = -log p(x0 | x_1), discretised (DDPM eq. 13), where the model puts x0_hat in place of x0: (B,) nats."""
    sd = math.sqrt(diffusion.posterior(2, 1)[2])  # beta_tilde_2, since beta_tilde_1 = 0
    return -discretised_log_likelihood(x0, x0_hat, sd).float().to(x0.device)


@torch.no_grad()
def diffusion_nats(diffusion, denoise, images, draws, gen, variance="fixedlarge"):
    """The parts of the variational bound of the diffusion model on uint8 `images`, each (B,) nats (DDPM eq. 5):
    `prior` L_T, `diffusion` sum of KL_t for t = 2..T, `data` L_0. The sum over t is estimated from `draws`
    stratified times (`draws = T - 1` takes each once). With the VAE's KL added, their sum bounds -log p(x)."""
    x0, T = to_float(images), diffusion.T
    total = torch.zeros(len(x0), device=x0.device)
    for k in range(draws):
        u = torch.rand(len(x0), generator=gen, device=gen.device)
        t = 2 + ((k + u.double().cpu()) * (T - 1) / draws).long().clamp(max=T - 2).to(x0.device)  # (B,)
        xt = diffusion.q_sample(x0, t, randn(x0.shape, gen))
        x0_hat, _ = diffusion.predict(denoise(xt, t), xt, t)
        total += kl_step(diffusion, x0, x0_hat, t, variance) * (T - 1) / draws
    one = torch.ones(len(x0), dtype=torch.long, device=x0.device)
    x1 = diffusion.q_sample(x0, one, randn(x0.shape, gen))
    x0_hat, _ = diffusion.predict(denoise(x1, one), x1, one)
    return {"prior": kl_prior(diffusion, x0).cpu(), "diffusion": total.cpu(),
            "data": data_nats(diffusion, x0, x0_hat).cpu()}


# ---------------------------------------------------------------------------------------------------------------------
# 5. Priors over z
# ---------------------------------------------------------------------------------------------------------------------


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
    """Full-covariance Gaussian mixture fitted by EM from a k-means start (Bishop 2006, 9.2.2): the ex-post prior.

    Attributes: weights (K,), means (K, d), factors (K, d, d) lower Cholesky factors; all float64.
    """

    def __init__(self, weights, means, factors):
        self.weights, self.means, self.factors = weights, means, factors

    @classmethod
    def fit(cls, z, components, seed, rounds=20, ridge=1e-3):
        """z (N, d) -> the mixture after `rounds` of EM; `ridge` on the diagonals keeps every covariance regular."""
        from scipy.cluster.vq import kmeans2
        z = z.double().cpu()
        _, label = kmeans2(z.numpy(), components, minit="++", rng=np.random.default_rng(seed))
        share = F.one_hot(torch.from_numpy(label).long(), components).double()  # (N, K) responsibilities
        for _ in range(rounds):
            mass = share.sum(0) + 1e-9
            means = share.T @ z / mass[:, None]  # M step
            factors = []
            for k in range(components):
                centred = z - means[k]
                cov = (share[:, k, None] * centred).T @ centred / mass[k]
                factors.append(torch.linalg.cholesky(cov + ridge * torch.eye(z.shape[1], dtype=z.dtype)))
            mixture = cls(mass / mass.sum(), means, torch.stack(factors))
            joint = mixture.log_joint(z)  # E step
            share = (joint - joint.logsumexp(1, keepdim=True)).exp()
        return mixture

    def log_joint(self, z):
        """log(weight_k N(z | k)): (N, d) -> (N, K)."""
        z, columns = z.double().cpu(), []
        for weight, mean, factor in zip(self.weights, self.means, self.factors, strict=True):
            white = torch.linalg.solve_triangular(factor, (z - mean).T, upper=False)  # (d, N)
            columns.append(weight.log() - 0.5 * (white**2).sum(0) - factor.diagonal().log().sum()
                           - 0.5 * z.shape[1] * math.log(2 * math.pi))
        return torch.stack(columns, 1)

    def log_prob(self, z):
        """Log density: (N, d) -> (N,) nats."""
        return self.log_joint(z).logsumexp(1)

    def sample(self, count, gen):
        """`count` draws (count, d) float32 from a CPU generator, in random order (the component is drawn per row)."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=gen)
        noise = torch.randn(count, self.means.shape[1], generator=gen, dtype=torch.float64)
        return (self.means[k] + (self.factors[k] @ noise[:, :, None])[:, :, 0]).float()


# ---------------------------------------------------------------------------------------------------------------------
# 6. Budgets
# ---------------------------------------------------------------------------------------------------------------------

# VAE tables: (resolution, width, blocks). U-Net tables: (resolution, width, blocks down, blocks up).
VAE_TABLES = {
    "tiny 32": ([(32, 8, 0), (16, 16, 0), (4, 32, 1), (1, 8, 0)], [(1, 8, 0), (4, 32, 1), (16, 16, 0), (32, 8, 0)]),
    "tiny 64": ([(64, 8, 0), (16, 16, 0), (4, 32, 1), (1, 8, 0)], [(1, 8, 0), (4, 32, 1), (16, 16, 0), (64, 8, 0)]),
    "shapes 32": ([(32, 32, 0), (16, 64, 0), (8, 96, 1), (4, 128, 1), (1, 64, 1)],
                  [(1, 64, 1), (4, 128, 1), (8, 96, 1), (16, 64, 0), (32, 32, 1)]),
    "cpu 32": ([(32, 32, 0), (16, 64, 1), (8, 96, 1), (4, 128, 1), (1, 128, 1)],
               [(1, 128, 1), (4, 128, 1), (8, 96, 1), (16, 64, 1), (32, 32, 1)]),
    "cpu 64": ([(64, 16, 0), (32, 32, 1), (16, 64, 1), (8, 96, 1), (4, 128, 1), (1, 128, 1)],
               [(1, 128, 1), (4, 128, 1), (8, 96, 1), (16, 64, 1), (32, 32, 1), (64, 16, 1)]),
    # Published (DiffuseVAE's cifar10 and celeba64 train.yaml): 9.24M and 14.01M parameters
    "paper 32": ([(32, 64, 7), (16, 128, 4), (8, 256, 4), (4, 256, 3), (1, 512, 3)],
                 [(1, 512, 1), (4, 256, 2), (8, 256, 3), (16, 128, 7), (32, 64, 15)]),
    "paper 64": ([(64, 64, 7), (32, 128, 4), (16, 256, 7), (8, 256, 3), (4, 256, 3), (1, 512, 2)],
                 [(1, 512, 1), (4, 256, 2), (8, 256, 3), (16, 256, 7), (32, 128, 8), (64, 64, 10)]),
}
UNET_TABLES = {
    "tiny 32": [(32, 8, 1, 1), (16, 16, 1, 1)],
    "tiny 64": [(64, 8, 1, 1), (32, 8, 1, 1), (16, 16, 1, 1)],
    "shapes 32": [(32, 32, 0, 1), (16, 48, 1, 1), (8, 64, 1, 1)],
    "cpu 32": [(32, 32, 1, 1), (16, 64, 1, 1), (8, 96, 1, 1)],
    "cpu 64": [(64, 32, 0, 1), (32, 48, 1, 1), (16, 64, 1, 1), (8, 96, 1, 1)],  # 16 wide at 64x64 left speckle on faces
    "gpu 32": [(32, 96, 2, 3), (16, 192, 2, 3), (8, 192, 2, 3)],
    "gpu 64": [(64, 64, 2, 3), (32, 128, 2, 3), (16, 192, 2, 3), (8, 192, 2, 3)],
    # Published, with attention truly at 16x16: 35.75M and 78.70M parameters
    "paper 32": [(32, 128, 2, 3), (16, 256, 2, 3), (8, 256, 2, 3), (4, 256, 2, 3)],
    "paper 64": [(64, 128, 2, 3), (32, 256, 2, 3), (16, 256, 2, 3), (8, 256, 2, 3), (4, 512, 2, 3)],
}

# What every budget but `paper` trains with. t = ceil(T u^t_power), u uniform: a power above 1 spends more of the
# images at low noise, where detail is decided (on shapes what is in the image matters more: 1 did better);
# v-prediction is stable in short trainings; residual_sd, see Diffusion.guess, is about what the VAE leaves over.
TRAIN = {"batch": 32, "steps": 8, "vae_lr": 1e-3, "unet_lr": 1e-3, "warmup": 0.05, "decay": True, "vae_clip": 200.0,
         "unet_clip": 1.0, "vae_ema": 0.995, "unet_ema": 0.995, "beta": 1.0, "pool": False, "objective": "v",
         "t_power": 1.5, "dropout": 0.0, "heads": 1, "attention": [], "flip": "both", "components": 20, "every": 50,
         "compile": False, "residual_sd": 0.0}
EVAL = {"sampler": "dpm", "sample_steps": 25, "count": 1000, "batch": 100,
        "grid": [["ddim", 5], ["ddim", 10], ["ddim", 25], ["ddim", 50],
                 ["dpm", 5], ["dpm", 10], ["dpm", 25], ["dpm", 50]],
        "grid_count": 500, "probe_steps": 10, "probe_count": 500, "bits_images": 128, "bits_draws": 40,
        "temperature": 1.0}
PAPER_GRID = [["ddim", 5], ["ddim", 10], ["ddim", 25], ["ddim", 50], ["ddim", 100],
              ["dpm", 5], ["dpm", 10], ["dpm", 25], ["dpm", 50], ["dpm", 100], ["ddpm", 1000]]


def budget(name, dataset, size):
    """The settings of a budget for a data set at image size 32 or 64: (train, eval), plain dictionaries.

    `steps` counts optimisation steps of each network, so every network sees steps * batch images.
    """
    train, evaluation = dict(TRAIN), dict(EVAL)
    if name == "smoke":
        tables = "tiny"
        train |= {"steps": 8, "attention": [16], "components": 2, "every": 4, "residual_sd": 0.2}
        evaluation |= {"sample_steps": 4, "count": 64, "batch": 64, "grid": [["dpm", 2], ["dpm", 4]],
                       "grid_count": 64, "probe_steps": 2, "probe_count": 64, "bits_images": 8, "bits_draws": 4,
                       "temperature": 0.9}
    elif name == "cpu" and dataset == "shapes":
        tables = "shapes"
        # Many small batches: at these sizes an image in a batch of 8 teaches more than one in a batch of 32
        train |= {"batch": 8, "steps": 4400, "vae_lr": 2e-3, "unet_lr": 2e-3, "beta": 0.25, "every": 100,
                  "t_power": 1.0}
        evaluation |= {"sample_steps": 10, "grid_count": 200, "probe_count": 200,
                       "grid": [["ddim", 5], ["ddim", 10], ["ddim", 25], ["dpm", 5], ["dpm", 10], ["dpm", 25]]}
    elif name == "cpu":
        tables = "cpu"
        train |= {"batch": 16, "steps": 12_500, "vae_lr": 1.5e-3, "unet_lr": 1.5e-3, "components": 30, "beta": 0.25,
                  "residual_sd": 0.2 if size == 32 else 0.16}
        evaluation |= {"count": 2000, "grid_count": 300, "probe_count": 300, "temperature": 1.0 if size == 32 else 0.7}
    elif name == "gpu":  # sized for 25 minutes of one data-centre GPU; not measured yet
        tables = "gpu"
        train |= {"batch": 256, "steps": 12_000, "vae_lr": 4e-4, "unet_lr": 4e-4, "unet_ema": 0.9995, "dropout": 0.1,
                  "heads": 4, "attention": [16], "components": 50}
        evaluation |= {"sampler": "ddim", "sample_steps": 100, "count": 10_000, "batch": 500, "grid": PAPER_GRID,
                       "grid_count": 2000, "probe_steps": 25, "probe_count": 2000, "bits_images": 256,
                       "bits_draws": 100}
    else:  # paper: DiffuseVAE's own settings (eps, uniform t, no VAE EMA, no flips for the VAE, constant rates)
        tables = "paper"
        train |= {"batch": 128, "vae_lr": 1e-4, "unet_lr": 2e-4, "warmup": 5000, "decay": False, "vae_clip": 0.0,
                  "vae_ema": 0.0, "unet_ema": 0.9999, "pool": True, "objective": "eps", "t_power": 1.0, "heads": 8,
                  "attention": [16], "flip": "refiner", "every": 100}
        train |= ({"steps": 1_110_000, "dropout": 0.3, "components": 50} if size == 32 else
                  {"steps": 2_535_000, "dropout": 0.1, "components": 75, "batch": 32})
        evaluation |= {"sampler": "ddpm", "sample_steps": 1000, "count": 50_000, "batch": 500, "grid": PAPER_GRID,
                       "grid_count": 10_000, "probe_steps": 25, "probe_count": 10_000, "bits_draws": 999,
                       "bits_images": 256}
    if dataset == "shapes":
        train |= {"flip": "none"}
    vae = {"gpu": "cpu"}.get(tables, tables)
    train |= {"encoder": VAE_TABLES[f"{vae} {size}"][0], "decoder": VAE_TABLES[f"{vae} {size}"][1],
              "unet": UNET_TABLES[f"{tables} {size}"]}
    return json.loads(json.dumps(train)), evaluation


def learning_rate(base, step, steps, warmup, decay):
    """Linear warm-up (over `warmup` steps, or that share of all if below 1), then linear decay to 0 or constant."""
    warmup = warmup * steps if warmup < 1 else warmup
    return base * min(1, (step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup) if decay else 1)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Runs
# ---------------------------------------------------------------------------------------------------------------------


def add_flags(parser):
    """The flags that all stages share."""
    parser.formatter_class, parser.error = argparse.ArgumentDefaultsHelpFormatter, fail
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="shapes", help="shapes is built in; the others read --data-dir")
    add("--data-dir", default="data", help="where cifar10/ or celeba/ lie (or are downloaded); a folder of images")
    add("--image-size", type=int, choices=(32, 64), default=64, help="for --dataset folder")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--budget", choices=("auto", "smoke", "cpu", "gpu", "paper"), default="auto",
        help="auto: gpu with a GPU, else cpu")
    add("--steps", type=int, help="optimisation steps of each network, in place of the budget's")
    add("--batch-size", type=int, help="images per step, in place of the budget's")
    add("--seed", type=int, default=0, help="of everything random")
    add("--out", default="runs", help="folder for runs")
    add("--resume", action="store_true", help="continue an unfinished run")
    add("--sampler", choices=("ddpm", "ddim", "dpm"), help="headline sampler, in place of the budget's")
    add("--sample-steps", type=int, help="its number of steps, 1 to 1000")
    add("--temperature", type=float, help="sd of the noise x_T that sampling starts from: below 1 fewer artefacts and "
        "less detail")
    add("--eval-samples", type=int, help="images generated for the headline scores")
    add("--features", choices=("auto", "inception", "local"), default="auto", help="feature network of the scores")
    add("--weights", help="file with the Inception weights, for --features inception")
    add("--compile", action="store_true", help="torch.compile the networks for training (on a CPU: needs a compiler)")
    add("--dry-run", action="store_true", help="print settings and network sizes as JSON, and stop")


def read_settings(args):
    """Check the shared flags and resolve what is `auto`. Returns train settings, evaluation settings, device."""
    for flag, value, low, high in (("--steps", args.steps, 1, 10**9), ("--batch-size", args.batch_size, 1, 10**5),
                                   ("--sample-steps", args.sample_steps, 1, 1000), ("--seed", args.seed, 0, 2**31),
                                   ("--temperature", args.temperature, 0, 2),
                                   ("--eval-samples", args.eval_samples, 40, 10**6)):
        if value is not None and not low <= value <= high:
            fail(f"{flag} {value}: must lie between {low} and {high}")
    device = choose_device("auto" if args.dry_run and not torch.cuda.is_available() else args.device)
    keep_freed_memory()
    name = args.budget if args.budget != "auto" else "gpu" if device.type == "cuda" else "cpu"
    size = {"shapes": 32, "cifar10": 32, "celeba64": 64}.get(args.dataset, args.image_size)
    train, evaluation = budget(name, args.dataset, size)
    train = {"dataset": args.dataset, "image_size": size, "budget": name, "seed": args.seed} | train
    features = args.features
    if features == "auto":
        features = "inception" if name in ("gpu", "paper") and args.dataset != "shapes" else "local"
    evaluation["features"] = features
    given = {"steps": args.steps, "batch": args.batch_size, "compile": args.compile}
    train |= {key: value for key, value in given.items() if value is not None}
    given = {"sampler": args.sampler, "sample_steps": args.sample_steps, "count": args.eval_samples,
             "temperature": args.temperature}
    evaluation |= {key: value for key, value in given.items() if value is not None}
    if not args.dry_run:
        device = join_ranks(device, train["batch"])
        try:
            probe = Path(args.out) / ".writable"
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            fail(f"--out {args.out}: cannot be written ({error.strerror}); choose another folder")
    return train, evaluation, device


def write_json(path, data):
    """Write `data` as JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")


def prepare(args, train, evaluation, device):
    """What can fail is tried before any training: the feature network, the data. Completes both settings; returns the
    folder of the runs, the extractor, the training and the test images."""
    name = Path(args.data_dir).resolve().name if args.dataset == "folder" else args.dataset
    try:
        extractor = fid.load_extractor(evaluation["features"], name, args.weights, device, args.data_dir)
    except ValueError as error:
        fail(error)
    data, test = (load_images(args.dataset, split, args.data_dir, train["image_size"]) for split in ("train", "test"))
    train |= {"crop": data.crop, "n_train": len(data.images)}
    evaluation["features"] = extractor.name
    return Path(args.out) / f"{name}-{train['budget']}", extractor, data, test


def reference(args, extractor, data, test):
    """What the scores compare with: the training split's features, cached beside the data."""
    home = "data" if args.dataset in ("shapes", "folder") else args.data_dir
    return fid.reference(extractor, data, test, Path(home) / "cache")


def first_difference(old, new):
    """The first key in which two settings differ, with both values, or None."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} was {old.get(key)}, is now {new.get(key)}"
    return None


HELD = {}  # open files of the run folders that this process has locked, until it ends


def lock(folder):
    """Keep other processes out of a run's folder until this one ends, however it ends; exits if one is in it."""
    if rank() > 0 or folder in HELD:
        return
    with contextlib.suppress(ImportError):  # fcntl: not on Windows
        import fcntl
        folder.mkdir(parents=True, exist_ok=True)
        HELD[folder] = open(folder / ".lock", "w")
        try:
            fcntl.flock(HELD[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{folder} is in use by another process; wait for it or choose another --out")


def open_run(folder, train, resume):
    """Decide what to do in a run's folder: None (start from scratch) or the checkpoint to continue or to reuse.

    Finished with the same settings: reused. Unfinished: needs --resume. Other settings: exits naming the key.
    """
    folder, config = Path(folder), Path(folder) / "config.json"
    lock(folder.resolve())
    if config.is_file():
        try:
            old = dict(json.loads(config.read_text())["train"])
        except (ValueError, KeyError, TypeError):
            fail(f"{config}: damaged; remove {folder} or choose another --out")
        difference = first_difference(old, train)
        if difference:
            fail(f"{folder} holds a run with other settings ({difference}); choose another --out or remove it")
        if (folder / "checkpoint.pt").is_file():
            state = load_checkpoint(folder / "checkpoint.pt")
            if state["finished"] or resume:
                return state
        if not resume:
            fail(f"{folder} holds an unfinished run; add --resume to continue it, or remove the folder")
        return None
    wait_for_ranks()  # none looks for a config that another has just written
    (folder / "metrics.json").unlink(missing_ok=True)  # of a run whose settings are gone
    write_json(config, {"train": train})
    return None


def save_checkpoint(path, state):
    """Save a dictionary of tensors and plain values, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path):
    """Load a checkpoint onto the CPU; exits with one line if it is damaged. `weights_only`: it cannot run code."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums that torch.save wrote
            if archive.testzip():
                raise ValueError(f"wrong checksum of {archive.testzip()}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["train"], state["finished"]  # noqa: B018 - a file of another kind fails here
        return state
    except FileNotFoundError:
        fail(f"{path}: no such checkpoint")
    except Exception as error:  # torch.load raises many kinds
        reason = str(error).split("\n")[0][:80]
        fail(f"{path}: damaged or not a checkpoint ({type(error).__name__}: {reason}); remove it to train again")


class StopRequest:
    """Context manager that turns SIGTERM and Ctrl-C into `.signal`, so that a loop can save before it ends."""

    def __enter__(self):
        self.signal = 0
        self.before = {s: signal.signal(s, self.remember) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def remember(self, number, frame):
        self.signal = number if rank() == 0 else 0  # the first process saves and ends; the others end with it

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def start_log(path, step):
    """Cut a log back to the rows up to `step` (0 empties it), so that a resumed run writes each row once."""
    rows = list(csv.DictReader(open(path))) if path.is_file() and step else []
    rows = [row for row in rows if int(row["step"]) <= step]
    with atomic(path) as temporary, open(temporary, "w", newline="") as handle:
        if rows:
            writer = csv.DictWriter(handle, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


def training_state(train, step, network, ema, optimizer, gen, seconds, sums):
    """All that a training loop of one network needs to go on to the same bits: a checkpoint."""
    return {"train": train, "step": step, "finished": step == train["steps"], "weights": network.state_dict(),
            "ema": ema.weights, "optimizer": optimizer.state_dict(), "generator": gen.get_state(),
            "global_rng": torch.get_rng_state(), "seconds": seconds, "sums": sums}


def resume_training(state, network, ema, optimizer, gen, device):
    """Put a training_state back in place; returns step, seconds spent and the sums since the last row of the log."""
    network.load_state_dict(state["weights"])
    ema.weights = {name: tensor.to(device) for name, tensor in state["ema"].items()}
    ema.updates = state["step"]
    optimizer.load_state_dict(state["optimizer"])
    gen.set_state(state["generator"])
    torch.set_rng_state(state["global_rng"])
    return state["step"], state["seconds"], {name: value.to(device) for name, value in state["sums"].items()}


def log_means(folder, step, sums, every, bar):
    """Write the means of the last `every` steps to the log and the bar; exits naming a term that is not finite."""
    means = {name: float(value) / every for name, value in sums.items()}
    if not all(map(math.isfinite, means.values())):
        fail(f"{folder.name}: {means} at step {step} is not finite; restart with a lower rate or look at the data (the "
             f"last good checkpoint is in {folder})")
    append_log(folder / "log.csv", {"step": step, **means})
    bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})


def append_log(path, row):
    """Append one row to a CSV log (with a header if it is empty)."""
    if rank() > 0:
        return
    with open(path, "a", newline="") as handle:
        writer = csv.DictWriter(handle, row.keys())
        if handle.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def read_log(path):
    """A CSV log as columns: {name: [floats]}."""
    rows = list(csv.DictReader(open(path)))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def run_facts(train, evaluation, data, device, variant):
    """The `run` part of metrics.json that does not depend on the model."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                         cwd=Path(__file__).parent)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"dataset": data.name, "crop": data.crop, "data_note": data.note, "variant": variant,
            "stage": variant.split("-")[0], "budget": train["budget"], "seed": train["seed"],
            "n_real": len(data.images),
            "device": f"{device.type} ({hardware}, {torch.get_num_threads()} threads)",
            "commit": git.stdout.strip() or "unknown", "eval": evaluation, "residual_sd": train["residual_sd"],
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


RUN_KEYS = {"dataset", "crop", "data_note", "variant", "stage", "budget", "seed", "features", "n_real", "parameters",
            "gflops", "train_images", "train_seconds", "device", "commit", "versions", "eval"}
ROW_KEYS = {"prior", "sampler", "nfe", "n_generated", "seconds_per_image", "peak_memory_mb"}
SCORES = ("fd", "floor", "is", "kid", "precision", "recall", "diversity")


def check_metrics(metrics):
    """The schema of metrics.json. Raises ValueError naming the first key that is missing or of the wrong kind."""
    def need(condition, what):
        if not condition:
            raise ValueError(f"metrics: {what}")

    need(isinstance(metrics, dict) and metrics.get("schema") == 1, "schema must be 1")
    for key, kind in (("run", dict), ("rows", list), ("tables", dict)):
        need(isinstance(metrics.get(key), kind), f"{key} must be a {kind.__name__}")
    missing = RUN_KEYS - metrics["run"].keys()
    need(not missing, f"run lacks {sorted(missing)}")
    need(metrics["rows"], "rows is empty")
    local = metrics["run"]["features"].startswith("local")
    names = {f"{s}_local" if local else {"fd": "fid"}.get(s, s) for s in SCORES} | {"hf_energy"}
    for i, row in enumerate(metrics["rows"]):
        need(not (ROW_KEYS | names) - row.keys(), f"rows[{i}] lacks {sorted((ROW_KEYS | names) - row.keys())}")
        for name in names:
            score = row[name]
            need(isinstance(score, dict) and set(score) == {"value", "low", "high"},
                 f"rows[{i}].{name} must have value, low and high")
            need(isinstance(score["value"], float) and math.isfinite(score["value"]), f"rows[{i}].{name} not finite")
            need(all(score[k] is None or math.isfinite(score[k]) for k in ("low", "high")), f"rows[{i}].{name} bounds")


def read_metrics(path, evaluation=None):
    """The metrics of an earlier evaluation (with the same settings, if given), or None where there are none."""
    try:
        metrics = json.loads(Path(path).read_text())
        check_metrics(metrics)
        return metrics if evaluation in (None, metrics["run"]["eval"]) else None
    except (OSError, ValueError, KeyError, TypeError):  # damaged: measured again
        return None


def write_metrics(path, metrics):
    """Check against the schema and write."""
    check_metrics(metrics)
    write_json(path, metrics)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Pictures
# ---------------------------------------------------------------------------------------------------------------------


def high_frequency_power(images):
    """Mean power of the grey image above 1/4 cycle per pixel, under a Hann window: uint8 (N, 3, H, W) -> (N,)."""
    grey = images.float().mean(1)  # (N, H, W)
    size = grey.shape[-1]
    window = torch.hann_window(size, periodic=False, device=grey.device)
    spectrum = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window)
    frequency = torch.fft.fftfreq(size, device=grey.device)  # cycles per pixel
    high = torch.hypot(frequency[:, None], frequency) > 0.25
    return spectrum.abs().square()[:, high].mean(1)


def hf_energy(images, real):
    """Sharpness: high-frequency power of `images` over that of held-out `real` images; 1 is as sharp as real.
    A score dictionary with a 95% interval over the images."""
    power = high_frequency_power(images) / high_frequency_power(real).mean()
    half = 1.96 * float(power.std()) / math.sqrt(len(power))
    return {"value": float(power.mean()), "low": float(power.mean()) - half, "high": float(power.mean()) + half}


def save_grid(path, rows, labels=None, scale=None):
    """Save rows of uint8 images, each (N, 3, H, W), as one picture with the rows' labels on the left."""
    size = rows[0].shape[-1]
    scale = scale or max(1, 96 // size)
    margin = 8 * max(len(label) for label in labels) if labels else 0
    side = scale * size
    page = Image.new("RGB", (margin + max(map(len, rows)) * (side + 2), len(rows) * (side + 2)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            tile = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            page.paste(tile.resize((side, side), Image.Resampling.NEAREST), (margin + j * (side + 2), i * (side + 2)))
        if labels:
            ImageDraw.Draw(page).text((4, i * (side + 2) + side // 2 - 6), labels[i], fill="black")
    with atomic(path) as temporary:
        page.save(temporary, format="PNG")


def save_chart(path, panels):
    """Save line charts, three in a row (four: two by two). `panels`: dictionaries with title, x, y (axis names), lines
    {label: (xs, ys)}, optionally `log` (for the x axis), `log_y` and `level` {label: y} (horizontal lines)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = list(dict.fromkeys(label for panel in panels for label in panel["lines"]))
    colours = {label: f"C{i}" for i, label in enumerate(names)}  # one colour per label, whichever panels it is in
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False,
                                   layout="constrained")
    handles = {}
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        for label, (xs, ys) in panel["lines"].items():
            handles[label], = axis.plot(xs, ys, colours[label], marker="o" if len(xs) < 30 else None, label=label)
        for label, y in panel.get("level", {}).items():
            handles[label] = axis.axhline(y, linestyle="--", color="grey", label=label)
        axis.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"], xscale=panel.get("log", "linear"))
        if axis.get_xscale() == "log":
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        elif all(isinstance(x, int) for xs, _ in panel["lines"].values() for x in xs):
            axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if "log_y" in panel:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))  # from zero, so that small differences look small
        if len(names) < 6:
            axis.legend(fontsize=8)
    if len(names) > 5:  # would hide lines
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def show(score):
    """A score dictionary as text: value [low, high]."""
    interval = f" [{score['low']:.3g}, {score['high']:.3g}]" if score["low"] is not None else ""
    return f"{score['value']:.3g}{interval}"


def print_table(rows, columns):
    """Print dictionaries as an aligned table of the given columns."""
    cells = [columns] + [[show(r[c]) if isinstance(r[c], dict) else f"{r[c]:.3g}" if isinstance(r[c], float)
                          else str(r[c]) for c in columns] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# 9. Evaluation
# ---------------------------------------------------------------------------------------------------------------------

# A *model* here is a SimpleNamespace: `name`; `vae` (or None); `priors` {name: with .sample(count, gen), .log_prob(z)};
# `denoiser(x_hat, z)`, which returns `denoise(x, t)` with its conditions fixed (None: a VAE alone); `diffusion`, `size`
# and `device`; `temperature`, the standard deviation of x_T (1: as trained); `kl(z, mu, logvar)` where the VAE was
# trained against another prior than N(0, I).


def latent_kl(model, z, mu, logvar):
    """KL of q(z|x) to the prior that the model's VAE was trained against: (B,) nats."""
    return model.kl(z, mu, logvar) if hasattr(model, "kl") else gaussian_kl(mu, logvar)


@torch.no_grad()
def encode(vae, images, gen, device, batch=500):
    """uint8 images (N, 3, H, W) -> posterior samples z, mu, logvar, each (N, d) on the CPU."""
    parts = [vae.encoder(to_float(chunk.to(device))) for chunk in images.split(batch)]
    mu, logvar = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
    return mu + (0.5 * logvar).exp() * randn(mu.shape, gen), mu, logvar


def fit_mixture(vae, images, train, device):
    """The ex-post prior: a mixture fitted to z ~ q(z|x) of the training images; its state, for a checkpoint. Of few
    images up to ten z each are drawn, 60,000 in all: to one z of each, the mixture would fit the noise of the draw."""
    gen = generator(train["seed"] + 2)
    _, mu, logvar = encode(vae, images, gen, device)
    draws = max(1, min(10, 60_000 // len(mu)))
    z = torch.cat([mu + (0.5 * logvar).exp() * randn(mu.shape, gen) for _ in range(draws)])
    return vars(GaussianMixture.fit(z, train["components"], train["seed"]))


def refine(model, x_hat, z, gen, sampler, steps):
    """x_hat (B, 3, H, W), z (B, d) -> refined images in [-1, 1]. x_T and the steps' noise come from `gen`, a CPU
    generator (x_hat itself is returned if the model is a VAE alone)."""
    if model.denoiser is None:
        return x_hat
    x_T = model.temperature * randn(x_hat.shape, gen).to(model.device)
    noise = generator(gen.initial_seed() + 1, model.device)
    with autocast(model.device):
        return sample(model.diffusion, model.denoiser(x_hat, z), x_T, sampler, steps, noise)


@torch.no_grad()
def generate(model, count, prior, sampler, steps, seed, batch, corrupt=None, stretch=1.0):
    """Draw `count` images: uint8 x_hat and refined, each (count, 3, H, W) on the CPU, and seconds per image.

    Each batch has its own generator, so that image k has the same z and x_T for every sampler, step count and total.
    `corrupt(x_hat, gen)` damages the VAE's output before refinement; `stretch` multiplies z.
    """
    parts, starts = [], range(0, count, batch)[rank() :: ranks()]  # batches are shared out
    for start in tqdm(starts, desc=f"{model.name} {prior} {sampler} {steps}", leave=False):
        gen = generator(1_000_000 * (seed + 1) + start)
        clock = time.time()
        z, x_hat = None, torch.zeros(batch, 3, model.size, model.size, device=model.device)
        if model.vae is not None:
            z = (stretch * model.priors[prior].sample(batch, gen)).to(model.device)
            with autocast(model.device):
                x_hat = model.vae.decoder(z)
        x_hat = corrupt(x_hat, generator(gen.initial_seed() + 2)) if corrupt else x_hat
        images = to_uint8(refine(model, x_hat, z, gen, sampler, steps)).cpu()
        seconds = time.time() - clock
        parts.append((to_uint8(x_hat).cpu(), images, seconds))
    before, after, seconds = zip(*gather(parts), strict=True)
    return torch.cat(before)[:count], torch.cat(after)[:count], sum(seconds) / (batch * len(seconds))


def reconstruct(model, images, evaluation, seed):
    """Held-out uint8 images -> x_hat and refined as uint8, with mu, logvar (CPU)."""
    gen = generator(50_000 + seed)
    _, mu, logvar = encode(model.vae, images, gen, model.device)
    with torch.no_grad():
        x_hat = model.vae.decoder(mu.to(model.device))
        refined = refine(model, x_hat, mu.to(model.device), gen, "dpm", evaluation["sample_steps"])
    return to_uint8(x_hat).cpu(), to_uint8(refined).cpu(), mu, logvar


def add_noise(sd):
    """Corruption of x_hat: Gaussian noise of standard deviation `sd` (images span [-1, 1])."""
    return lambda x_hat, gen: x_hat + sd * randn(x_hat.shape, gen).to(x_hat.device)


def blur(x_hat, gen):
    """Corruption of x_hat: Gaussian blur with a standard deviation of 1 pixel."""
    tap = torch.exp(-torch.arange(-3.0, 4.0, device=x_hat.device) ** 2 / 2)
    kernel = (tap[:, None] * tap / tap.sum() ** 2).expand(3, 1, 7, 7)
    return F.conv2d(F.pad(x_hat, (3, 3, 3, 3), mode="reflect"), kernel, groups=3)


CORRUPTIONS = {
    "clean": {},
    "noise 0.1": {"corrupt": add_noise(0.1)},
    "noise 0.2": {"corrupt": add_noise(0.2)},
    "noise 0.4": {"corrupt": add_noise(0.4)},
    "blur 1 px": {"corrupt": blur},
    "z x 1.3": {"stretch": 1.3},
}


def bits_per_dim(model, images, evaluation, seed):
    """The valid bound in bits per dimension on held-out images, in parts: L_T + sum KL_t + L_0 of the
    diffusion model given x_hat = Dec(z), z ~ q(z|x), plus KL(q(z|x) || p(z)). None for the VAE alone."""
    if model.denoiser is None:
        return None
    images, gen = images[: evaluation["bits_images"]].to(model.device), generator(60_000 + seed, model.device)
    parts, x_hat, z = {}, None, None
    with torch.no_grad(), autocast(model.device):
        if model.vae is not None:
            mu, logvar = model.vae.encoder(to_float(images))
            z = mu + (0.5 * logvar).exp() * randn(mu.shape, gen)
            x_hat, parts["kl"] = model.vae.decoder(z), latent_kl(model, z, mu, logvar).cpu()
        parts |= diffusion_nats(model.diffusion, model.denoiser(x_hat, z), images, evaluation["bits_draws"], gen)
    unit = images[0].numel() * math.log(2)
    total = sum(parts.values()) / unit  # (N,) bits per dimension
    half = 1.96 * float(total.std()) / len(total) ** 0.5
    mean = float(total.mean())
    return {"bound": {"value": mean, "low": mean - half, "high": mean + half}, "images": len(images),
            **{name: float((value / unit).mean()) for name, value in parts.items()}}


def diagnose(mu, logvar, sharpness):
    """The assignment's debugging tip as numbers and one sentence: are outputs smooth because the latent is unused,
    underfitted, or just because a Gaussian decoder averages?"""
    active = int((mu.var(0) > 0.01).sum())
    variance = float(logvar.exp().mean())
    if active < 0.05 * mu.shape[1]:
        text = "almost no latent unit is active (posterior collapse): lower beta or train longer"
    elif variance > 0.9:
        text = "posterior variance is close to the prior's: most units carry little; train longer or lower beta"
    elif sharpness < 0.5:
        text = "the latent is in use; outputs are smooth because a Gaussian decoder averages what z cannot hold"
    else:
        text = "the latent is in use and outputs are not overly smooth"
    return {"active_units": active, "latent_dim": mu.shape[1], "posterior_variance": variance, "verdict": text}


def measure(model, evaluation, seed, test, extractor, reference, prior, sampler, steps, count, **damage):
    """Draw `count` images and score them: one row of metrics.json, and the images before and after refinement."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    x_hat, images, seconds = generate(model, count, prior, sampler, steps, seed, evaluation["batch"], **damage)
    peak = torch.cuda.max_memory_allocated(model.device) / 2**20 if model.device.type == "cuda" else None
    row = {"prior": prior, "sampler": sampler, "nfe": steps, "n_generated": count, "seconds_per_image": seconds,
           "peak_memory_mb": peak} | fid.scores(extractor, images, reference)
    return row | {"hf_energy": hf_energy(images, test.images)}, x_hat, images


def robustness(folder, measure, prior, sampler, evaluation, fd):
    """Refine damaged VAE outputs (same z, same x_T). The area is the mean of score / clean score over noise sd 0 to
    0.4: 1 means unharmed. Writes robustness.png: damaged x_hat above, refined below."""
    steps, scores, pictures = 0 if sampler == "none" else evaluation["probe_steps"], {}, []
    for name, damage in CORRUPTIONS.items():
        row, x_hat, images = measure(prior, sampler if sampler == "none" else "dpm", steps, evaluation["probe_count"],
                                     **damage)
        scores[name] = {fd: row[fd], "hf_energy": row["hf_energy"]}
        pictures += [(name, x_hat[:12])] + ([("  refined", images[:12])] if steps else [])
    save_grid(folder / "robustness.png", [p for _, p in pictures], [label for label, _ in pictures])
    sd = torch.tensor([0, 0.1, 0.2, 0.4])
    ratio = torch.tensor([scores[k][fd]["value"] for k in ("clean", "noise 0.1", "noise 0.2", "noise 0.4")])
    return {"nfe": steps, "scores": scores, "area": float(torch.trapezoid(ratio / ratio[0], sd) / 0.4)}


def temperatures(folder, model, draw):
    """The same z and the same noise x_T at several temperatures (DiffuseVAE's demonstrations use 0.8): lower ones trade
    fine detail and diversity for fewer artefacts. Writes temperature.png; returns the rows."""
    chosen, rows, pictures = model.temperature, [], {}
    for model.temperature in sorted({0.8, 0.85, 0.9, 0.95, 1.0, chosen}):
        row, x_hat, images = draw()
        rows.append(row | {"temperature": model.temperature})
        pictures |= {"VAE": x_hat[:12]} if model.vae else {}
        pictures[f"x_T sd {model.temperature}"] = images[:12]
    model.temperature = chosen
    save_grid(folder / "temperature.png", list(pictures.values()), list(pictures))
    return rows


def draw_ranked(folder, images, extractor, reference):
    """ranked.png: generated images by the distance of their features to the nearest real image's. Twelve each of the
    worst, the middle and the best: what a distance between distributions does not show."""
    nearest = torch.cdist(fid.extract(extractor, images)[0].float(), reference.features.float()).amin(1)  # (N,)
    order = nearest.argsort(descending=True)
    middle = max(0, len(order) // 2 - 6)
    rows = [images[order[part]] for part in (slice(12), slice(middle, middle + 12), slice(-12, None))]
    save_grid(folder / "ranked.png", rows, ["worst", "median", "best"])


def draw_speed(folder, rows, fd):
    """Chart quality against the number of steps and against time."""
    panels = []
    for key, axis in (("nfe", "U-Net evaluations"), ("seconds_per_image", "seconds per image")):
        lines = {}
        for name in sorted({row["sampler"] for row in rows}):
            mine = [row for row in rows if row["sampler"] == name]
            lines[name] = [row[key] for row in mine], [row[fd]["value"] for row in mine]
        panels.append({"title": f"{fd} against {axis}", "x": axis, "y": fd, "lines": lines, "log": "log"})
    save_chart(folder / "speed.png", panels)


def draw_training(folder):
    """Chart the log; returns each column's last value."""
    columns = read_log(folder / "log.csv")
    steps = columns.pop("step")
    save_chart(folder / "training.png", [{"title": f"{folder.name}: {name}", "x": "step", "y": name,
                                          "lines": {name: (steps, values)}} for name, values in columns.items()])
    return {name: values[-1] for name, values in columns.items()}


def evaluate(folder, model, state, evaluation, test, extractor, reference, facts, cost):
    """Everything that is measured of a model in every stage: writes figures into `folder`, returns the metrics.

    `state`: its checkpoint; `facts`: run_facts; `cost`: network_cost. Every image k has the same z and x_T throughout.
    """
    train, fd, prior = state["train"], "fd" + extractor.suffix if extractor.suffix else "fid", evaluation["prior"]
    draw = functools.partial(measure, model, evaluation, train["seed"], test, extractor, reference)
    priors = [prior, *(name for name in model.priors if name != prior)] if model.priors else ["none"]
    sampler, steps = ("none", 0) if model.denoiser is None else (evaluation["sampler"], evaluation["sample_steps"])
    rows, tables, model.temperature = [], {}, evaluation["temperature"]
    for name in priors:  # the headline row first
        headline = name == priors[0] or model.denoiser is None
        row, x_hat, images = draw(name, sampler, steps, evaluation["count" if headline else "grid_count"])
        rows.append(row)
        if name == priors[0]:
            both = model.vae is not None and model.denoiser is not None
            pairs = [("VAE", x_hat), ("refined", images)] if both else [(model.name, images)]
            shown = [(label, part[i : i + 12]) for i in (0, 12, 24) for label, part in pairs]
            save_grid(folder / "samples.png", [p for _, p in shown], [label for label, _ in shown])
            draw_ranked(folder, images, extractor, reference)
            if both:
                tables["before_refinement"] = fid.scores(extractor, x_hat, reference) | {
                    "hf_energy": hf_energy(x_hat, test.images)}
    if model.denoiser is not None:
        pictures = {}
        for name, n in evaluation["grid"]:
            row, _, images = draw(priors[0], name, n, evaluation["grid_count"])
            rows.append(row)
            pictures[f"{name} {n}"] = images[:12]
        save_grid(folder / "steps.png", list(pictures.values()), list(pictures))
        draw_speed(folder, rows[len(priors) :], fd)
        if model.temperature != 1:
            tables["temperature"] = temperatures(folder, model, functools.partial(
                draw, priors[0], sampler, steps, evaluation["grid_count"]))
    if model.vae is not None:
        tables["robustness"] = robustness(folder, draw, priors[0], sampler, evaluation, fd)
        real = test.images[:1000]
        x_hat, refined, mu, logvar = reconstruct(model, real[: evaluation["grid_count"]], evaluation, train["seed"])
        error = (x_hat.float() - real[: len(x_hat)].float()).div(255).square().mean((1, 2, 3))  # (N,)
        tables["reconstruction"] = {"psnr_db": float((-10 * error.log10()).mean()),
                                    "kl_nats": float(gaussian_kl(mu, logvar).mean()),
                                    "hf_energy_vae": hf_energy(x_hat, test.images),
                                    "hf_energy_refined": hf_energy(refined, test.images)}
        tables["latent"] = diagnose(mu, logvar, tables["reconstruction"]["hf_energy_vae"]["value"])
        z = encode(model.vae, test.images, generator(70_000 + train["seed"]), model.device)[0]
        tables["prior_log_density"] = {name: float(p.log_prob(z).mean()) for name, p in model.priors.items()}
        parts = [("real", real), ("VAE", x_hat)] + ([("refined", refined)] if model.denoiser is not None else [])
        save_grid(folder / "reconstructions.png", [p[:12] for _, p in parts], [name for name, _ in parts])
        print(f"{folder.name}: {tables['latent']['verdict']}")
    tables["bits_per_dim"] = bits_per_dim(model, test.images, evaluation, train["seed"])
    tables["training"] = draw_training(folder)
    parameters, gflops = (sum(c[key] for c in cost.values()) for key in ("parameters", "gflops"))
    return {"schema": 1, "run": facts | {"features": extractor.name, "parameters": parameters, "gflops": gflops,
                                         "train_images": train["steps"] * train["batch"],
                                         "train_seconds": state["seconds"]}, "rows": rows, "tables": tables}


def print_results(finished, data, extractor):
    """Print the rows of all metrics, {folder: metrics}, as one table, and the paths of pictures and files."""
    local = "_local" if extractor.suffix else ""
    scores = ["fd_local" if local else "fid", *(s + local for s in ("floor", "is", "precision", "recall"))]
    table = [{"variant": m["run"]["variant"], "steps": row["nfe"], "sec/image": row["seconds_per_image"]} | row
             for m in finished.values() for row in m["rows"]]
    print()
    print_table(table, ["variant", "prior", "sampler", "steps", "n_generated", "sec/image", *scores, "hf_energy"])
    print(f"\nfeatures: {extractor.name}; data: {data.name} ({data.note}); intervals: 95%, resampling only, one run")
    for folder in finished:
        print("\n".join(str(path) for path in sorted(folder.glob("*.png")) + [folder / "metrics.json"]))
