"""Scores for generated images: Frechet distance (FID), Inception Score, KID, precision and recall, diversity.

The claim: two sets of images are alike if a trained network's features of them are. Each image becomes a vector (2048
numbers from the Inception network of 2015, or 64 from a small network trained on the data set at hand), and every score
compares the two clouds of vectors. The Frechet distance takes each cloud for a Gaussian (Heusel et al. 2017):

    FD = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

It is called FID only with Inception features. Three habits keep it honest. One pipeline, never mixed: uint8 in, TensorFlow-1
bilinear resize, (x - 128)/128, float64 moments. The floor: FD is biased upward by about C (1/N1 + 1/N2), so what as many
held-out real images score stands beside every value. An interval: leave out a twentieth of the generated images at a
time (the percentile bootstrap would add the bias once more and miss the truth).

    python fid.py REAL GENERATED               two folders, or a data set's name (shapes, cifar10, celeba64) and a folder
    python fid.py cifar10 samples --features inception --count 10000 --json
    python fid.py --train-local FOLDER         make a local feature network: minutes on two CPU cores (cifar10: 17)

Contents: 1 Inception, 2 the local network, 3 features, 4 scores, 5 reference and row of scores, 6 training the local
network, 7 the command. Importing this file does nothing.
"""

import argparse
import copy
import hashlib
import http.client
import io
import json
import math
import os
import platform
import shutil
import sys
import time
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

FEATURES_DIR = Path(__file__).resolve().parent / "results" / "features"
DATASETS = ("shapes", "cifar10", "celeba64")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


class UserError(ValueError):
    """Something the user can put right: one line that names the flag or file and the remedy."""


def require_uint8(images):
    """uint8 (B, 3, H, W) as it is, (B, 1, H, W) repeated to three channels; anything else is refused."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}; first round floats "
                         "in [-1, 1]: ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)")
    return images.expand(-1, 3, -1, -1)


def write_atomically(path, data):
    """Write bytes under a temporary name, then rename: a half-written file is never seen."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); free some space, or make the folder writable") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- 1. Inception (the TensorFlow network of 2015-12-05) and its weights ---------------------------------------------

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # converted by pytorch-fid's author; 95,628,359 bytes
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_VARIABLE = "FID_INCEPTION_WEIGHTS"

# Where this network differs from torchvision's inception_v3: average pools do not count the padding, the last block pools
# by maximum, batch norm's epsilon is TensorFlow's, there are 1008 classes and no auxiliary head.
average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
shrink_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, ReLU; at stride 1 the size stays, unless `padding` says otherwise."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding=None):
        super().__init__()
        if padding is None:
            padding = 0 if stride > 1 else "same"
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches, concatenated. `branches`: name (as in the public state dict) -> steps (outputs, kernel[, stride]);
    a list in place of a step is a fork, whose two ends are concatenated. `branch_pool` starts with `pool`."""

    def __init__(self, inputs, pool, **branches):
        super().__init__()
        self.pool, self.branches = pool, {}
        for branch, steps in branches.items():
            width, self.branches[branch] = inputs, []
            for i, step in enumerate(steps, 1):
                name = f"{branch}_{i}" if len(steps) > 1 else branch
                ends = {name + "a": step[0], name + "b": step[1]} if isinstance(step, list) else {name: step}
                for end, (outputs, *shape) in ends.items():
                    self.add_module(end, ConvBN(width, outputs, *shape))
                self.branches[branch].append(list(ends))
                width = outputs

    def forward(self, x):
        results = []
        for branch, steps in self.branches.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for ends in steps:
                y = torch.cat([getattr(self, end)(y) for end in ends], dim=1)
            results.append(y)
        return torch.cat(results, dim=1)


def mixed_a(inputs, pooled):
    return Mixed(inputs, average_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)])


def mixed_c(w):
    return Mixed(768, average_pool, branch1x1=[(192, 1)], branch7x7=[(w, 1), (w, (1, 7)), (192, (7, 1))],
                 branch7x7dbl=[(w, 1), (w, (7, 1)), (w, (1, 7)), (w, (7, 1)), (192, (1, 7))], branch_pool=[(192, 1)])


def mixed_e(inputs, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(inputs, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                 branch3x3dbl=[(448, 1), (384, 3), fork], branch_pool=[(192, 1)])


def resize_matrix(size, target, half_pixel=False):
    """Bilinear interpolation along one axis, no antialias: float32 (target, size). TensorFlow 1 reads output i at
    i*size/target, the half-pixel rule (torch, pytorch-fid) at (i+.5)*size/target - .5."""
    i = torch.arange(target, dtype=torch.float64)
    at = ((i + 0.5) * size / target - 0.5).clamp(min=0) if half_pixel else i * size / target  # (target,)
    low = at.long().clamp(max=size - 1)
    near, far = F.one_hot(low, size), F.one_hot((low + 1).clamp(max=size - 1), size)  # (target, size)
    return torch.lerp(near.double(), far.double(), (at - low)[:, None]).float()


class InceptionV3(nn.Module):
    """uint8 (B, 3, H, W) -> pool3 (B, 2048), logits (B, 1008) without bias (the Inception Score's). Always in eval mode.

    `compat`: pytorch-fid's half-pixel resize and x/127.5 - 1. `bf16`: up to twice as fast on a CPU, moves FID by about 1%.
    """

    suffix, dim, classes, batch = "", 2048, 1008, 32

    def __init__(self, compat=False, bf16=False):
        super().__init__()
        self.compat, self.bf16, self.name = compat, bf16, "inception"
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = ConvBN(3, 32, 3, stride=2), ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = ConvBN(32, 64, 3), ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, shrink_pool, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)],
                              branch_pool=[])
        self.Mixed_6b, self.Mixed_6c = mixed_c(128), mixed_c(160)
        self.Mixed_6d, self.Mixed_6e = mixed_c(160), mixed_c(192)
        self.Mixed_7a = Mixed(768, shrink_pool, branch3x3=[(192, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[])
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, average_pool), mixed_e(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.to(memory_format=torch.channels_last).eval()

    def train(self, mode=True):
        return super().train(False)

    def preprocess(self, images):
        """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299), normalised."""
        x = require_uint8(images).float()
        rows, columns = (resize_matrix(side, 299, self.compat).to(x.device) for side in x.shape[2:])
        x = rows @ x @ columns.T  # (B, 3, 299, 299)
        return x / 127.5 - 1 if self.compat else (x - 128) / 128

    def pool3(self, x):
        """Normalised (B, 3, 299, 299) -> (B, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(shrink_pool(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(shrink_pool(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # (B, 2048)

    def forward(self, images):
        x = self.preprocess(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.pool3(x)
        return features.float(), features.float() @ self.fc.weight.T


def load_inception(weights=None, compat=False, bf16=False):
    """The network with the published weights, from `weights`, the environment variable, or the cache (pytorch-fid's own
    place), which a download fills. UserError if they cannot be had, or are not the published bytes; nothing is kept then."""
    advice = f"download {INCEPTION_URL} by hand and name it with --weights or {WEIGHTS_VARIABLE}; or use --features local"
    given = weights or os.environ.get(WEIGHTS_VARIABLE)
    cache = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    try:
        if given or cache.is_file():
            source, data = given or cache, Path(given or cache).read_bytes()
        else:
            source, buffer = INCEPTION_URL, io.BytesIO()
            with urllib.request.urlopen(INCEPTION_URL, timeout=30) as response:
                size = int(response.headers.get("Content-Length", 0))
                with tqdm.wrapattr(buffer, "write", total=size, desc="Inception weights") as target:
                    shutil.copyfileobj(response, target)
            data = buffer.getvalue()
    except (OSError, http.client.HTTPException) as error:
        what = f"--weights {given}" if given else f"--features inception: nothing in {cache} and no download"
        raise UserError(f"{what} ({error}); {advice}") from error
    if hashlib.sha256(data).hexdigest() != INCEPTION_SHA256:
        raise UserError(f"--features inception: {source} gave {len(data):,} bytes with a wrong sha256, not {INCEPTION_FILE}; "
                        f"delete it if it is a file; {advice}")
    if not (given or cache.is_file()):
        write_atomically(cache, data)
    net = InceptionV3(compat, bf16)
    missing, unexpected = net.load_state_dict(torch.load(io.BytesIO(data), weights_only=True), strict=False)
    if unexpected or not all(key.endswith("num_batches_tracked") for key in missing):
        raise UserError(f"{source}: its tensors do not fit ({[*missing, *unexpected][:3]}); {advice}")
    net.name = f"inception-{INCEPTION_SHA256[:8]}" + "-pytorchfid" * compat + "-bf16" * bf16
    return net


# ---- 2. The local network: features for one data set, trained on it (section 6) --------------------------------------


class Residual(nn.Module):
    """x + two convolutions of constant width."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = ConvBN(width, width, 3), ConvBN(width, width, 3)

    def forward(self, x):
        return x + self.second(self.first(x))


class LocalNet(nn.Module):
    """Small residual network: uint8 (B, 3, H, W) -> features (B, 64), logits (B, K). 0.7M parameters, 0.1 GFLOP.

    Pixels enter as x/127.5 - 1 at `size` (32, or 64 with a stride-2 stem); other sizes are resized with antialias.
    Every feature has mean 0 and variance about 1 over the training set: that is the unit of its Frechet distances.
    """

    suffix, dim, batch = "_local", 64, 256

    def __init__(self, classes, size=32):
        super().__init__()
        self.classes, self.size, self.name = classes, size, "local"
        self.body = nn.Sequential(
            ConvBN(3, 32, 3, stride=size // 32, padding=1),  # (B, 32, 32, 32)
            ConvBN(32, 64, 3, stride=2, padding=1), Residual(64),  # (B, 64, 16, 16)
            ConvBN(64, 128, 3, stride=2, padding=1), Residual(128),  # (B, 128, 8, 8)
            ConvBN(128, 192, 3, stride=2, padding=1),  # (B, 192, 4, 4)
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, self.dim), nn.BatchNorm1d(self.dim, affine=False))
        self.head = nn.Linear(self.dim, classes)

    def forward(self, images):
        x = require_uint8(images).float() / 127.5 - 1
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.body(x.contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


def save_local(net, name, folder=FEATURES_DIR):
    """Write FOLDER/<name>-<hash8>.pt, hash8 of its own sha256, matrices in half precision (1.4 MB). Returns the path."""
    state = {key: value.half() if value.dim() > 1 else value for key, value in net.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"classes": net.classes, "size": net.size, "state": state}, buffer)
    path = Path(folder) / f"{name}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pt"
    write_atomically(path, buffer.getvalue())
    return path


def find_local(name):
    return sorted(FEATURES_DIR.glob(f"{name}-{'[0-9a-f]' * 8}.pt"))


def load_extractor(kind, dataset, weights=None, device="cpu", data_dir="data", compat=False, bf16=False):
    """The feature network `inception` or `local`, a module in eval mode with name, suffix, dim, classes and batch; on uint8
    (B, 3, H, W) it gives features (B, dim) and logits (B, classes). A local network belongs to one data set (for `folder`,
    to the folder's name). UserError, naming the flag and the place, if its weights cannot be had."""
    if kind == "inception":
        return load_inception(weights, compat, bf16).to(device)
    name, source = (Path(data_dir).resolve().name, data_dir) if dataset == "folder" else (dataset, dataset)
    found = [Path(weights)] if weights else find_local(name)
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"--features local: needs one file {weights or FEATURES_DIR / name}{'' if weights else '-<hash8>.pt'}, "
                        f"found {len(found) if not weights else 0}; make it with python fid.py --train-local {source}, or "
                        "name another with --weights")
    data = found[0].read_bytes()
    if hashlib.sha256(data).hexdigest()[:8] != found[0].stem[-8:]:
        raise UserError(f"--features local: {found[0]} does not have the sha256 in its name; restore it, or delete it and "
                        f"make it again: python fid.py --train-local {source}")
    stored = torch.load(io.BytesIO(data), weights_only=True)
    net = LocalNet(stored["classes"], stored["size"])
    net.load_state_dict(stored["state"])
    net.name = f"local-{found[0].stem}"
    return net.to(device, memory_format=torch.channels_last).eval()


# ---- 3. Features of many images, and their moments -------------------------------------------------------------------


@torch.no_grad()
def extract(extractor, images, batch_size=None, progress=False):
    """uint8 (N, 3, H, W), or a list of (3, H, W) whose sizes may differ -> features (N, d), logits (N, K), float32 on the
    CPU. The batch size changes nothing but speed."""
    device = next(extractor.parameters()).device
    extractor.eval()
    features, logits = torch.empty(len(images), extractor.dim), torch.empty(len(images), extractor.classes)
    with tqdm(total=len(images), desc=extractor.name, unit="image", disable=not progress) as bar, \
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # with TF32 the batch size would matter
        while bar.n < len(images) if progress else start_of(bar) < len(images):
            pass
    return features, logits
