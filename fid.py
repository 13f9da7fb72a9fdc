"""Scores for generated images: Frechet distance (FID), Inception Score, KID, precision and recall, diversity.

The claim: two sets of images are alike if a trained network's features of them are. Each image becomes a vector (2048
numbers from the Inception network of 2015, or 64 from a small network trained on the data set at hand), and every
score compares the two clouds of vectors. The Frechet distance takes each for a Gaussian (Heusel et al. 2017):

    FD = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)            (FID only with Inception's features)

Three habits keep it honest. One pipeline for both sides: uint8 in, TF1 bilinear resize, (x - 128)/128, float64 moments.
The floor: FD is biased upward by about C (1/N1 + 1/N2), so what as many held-out real images score stands beside it.
An interval: leave out a twentieth of the images at a time (a percentile bootstrap adds the bias again: it misses).

    python fid.py REAL GENERATED          two folders, or a data set's name (shapes, cifar10, celeba64) and a folder
    python fid.py cifar10 samples --features inception --count 10000 --json
    python fid.py --train-local FOLDER    makes a local feature network: minutes on two CPU cores (cifar10: 17)

Contents: 1 Inception, 2 the local network, 3 features and their moments, 4 scores, 5 the reference and a row of
scores, 6 training the local network, 7 the command. Importing this file does nothing.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import platform
import sys
import time
import urllib.request
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

FEATURES_DIR = Path(__file__).resolve().parent / "results" / "features"
DATASETS = ("shapes", "cifar10", "celeba64")


class UserError(ValueError):
    """Something the user can put right: one line that names the flag or file and the remedy."""


def require_uint8(images):
    """uint8 (B, 3, H, W) as it is, (B, 1, H, W) repeated to three channels; anything else is refused."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}; round floats "
                         "in [-1, 1] by ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)")
    return images.expand(-1, 3, -1, -1)


def write_atomically(path, data):
    """Write bytes under a temporary name, then rename: a half-written file is never seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# ---- 1. Inception (the TensorFlow network of 2015-12-05) and its weights ---------------------------------------------

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # converted by pytorch-fid's author; 95,628,359 bytes
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# Where it differs from torchvision's inception_v3: average pools do not count the padding, the last block pools by
# maximum, batch norm's epsilon is TensorFlow's, there are 1008 classes and no auxiliary head.
average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
shrink_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


def conv_bn(inputs, outputs, kernel, stride=1, padding=None):
    """Convolution without bias, batch norm, ReLU; at stride 1 the size stays, unless `padding` says otherwise."""
    padding = padding if padding is not None else 0 if stride > 1 else "same"
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU()))


class Mixed(nn.Module):
    """Parallel branches, concatenated. `branches`: name (the public state dict's) -> steps (outputs, kernel[, stride]);
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
                    self.add_module(end, conv_bn(width, outputs, *shape))
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
    """uint8 (B, 3, H, W) -> pool3 (B, 2048), logits (B, 1008) without bias (the Inception Score's). Call in eval mode.

    `compat`: pytorch-fid's half-pixel resize and x/127.5 - 1. `bf16`: up to twice as fast on a CPU, FID moves by 1%.
    """

    suffix, dim, classes, batch = "", 2048, 1008, 32

    def __init__(self, compat=False, bf16=False):
        super().__init__()
        self.compat, self.bf16, self.name = compat, bf16, "inception"
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = conv_bn(3, 32, 3, stride=2), conv_bn(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = conv_bn(32, 64, 3), conv_bn(64, 80, 1)
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3, padding=0)
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

    def pool3(self, x):
        """Normalised (B, 3, 299, 299) -> (B, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(shrink_pool(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(shrink_pool(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # (B, 2048)

    def forward(self, images):
        x = require_uint8(images).float()
        rows, columns = (resize_matrix(side, 299, self.compat).to(x.device) for side in x.shape[2:])
        x = rows @ x @ columns.T  # (B, 3, 299, 299)
        x = x / 127.5 - 1 if self.compat else (x - 128) / 128
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.pool3(x.contiguous(memory_format=torch.channels_last)).float()
        return features, features @ self.fc.weight.T


def load_inception(weights=None, compat=False, bf16=False):
    """The network with the published weights: from `weights`, else $FID_INCEPTION_WEIGHTS, else pytorch-fid's cache,
    which a download fills. UserError if they cannot be had or are not the published bytes: then nothing is kept."""
    advice = f"fetch {INCEPTION_URL} and name it with --weights or FID_INCEPTION_WEIGHTS, or use --features local"
    cache = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(weights or os.environ.get("FID_INCEPTION_WEIGHTS") or cache)
    download = path == cache and not cache.is_file()
    try:
        if download:
            with urllib.request.urlopen(INCEPTION_URL, timeout=30) as response, \
                    tqdm.wrapattr(response, "read", total=response.length, desc="Inception weights") as stream:
                data = b"".join(iter(lambda: stream.read(1 << 20), b""))
        else:
            data = path.read_bytes()
    except OSError as error:
        what = "no such file, and no download" if download else "unreadable"
        raise UserError(f"--weights {path}: {what} ({error}); {advice}") from error
    if hashlib.sha256(data).hexdigest() != INCEPTION_SHA256:
        source = INCEPTION_URL if download else path
        raise UserError(f"--weights {source}: {len(data):,} bytes, wrong sha256 (cut off, or another file); {advice}")
    if download:
        write_atomically(cache, data)
    net = InceptionV3(compat, bf16)
    missing, unexpected = net.load_state_dict(torch.load(io.BytesIO(data), weights_only=True), strict=False)
    if unexpected or not all(key.endswith("num_batches_tracked") for key in missing):
        raise UserError(f"--weights {path}: tensors do not fit ({[*missing, *unexpected][:3]}); {advice}")
    net.name = f"inception-{INCEPTION_SHA256[:8]}" + "-pytorchfid" * compat + "-bf16" * bf16
    return net


# ---- 2. The local network: features for one data set, trained on it (section 6) --------------------------------------

class Residual(nn.Sequential):
    """x + what its layers make of x."""

    def forward(self, x):
        return x + super().forward(x)


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
            conv_bn(3, 32, 3, stride=size // 32, padding=1),  # (B, 32, 32, 32)
            conv_bn(32, 64, 3, stride=2, padding=1),
            Residual(conv_bn(64, 64, 3), conv_bn(64, 64, 3)),  # (B, 64, 16, 16)
            conv_bn(64, 128, 3, stride=2, padding=1),
            Residual(conv_bn(128, 128, 3), conv_bn(128, 128, 3)),  # (B, 128, 8, 8)
            conv_bn(128, 192, 3, stride=2, padding=1),  # (B, 192, 4, 4)
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, self.dim), nn.BatchNorm1d(self.dim, affine=False))
        self.head = nn.Linear(self.dim, classes)

    def forward(self, images):
        x = require_uint8(images).float() / 127.5 - 1
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.body(x.contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


def save_local(net, name, folder):
    """Write FOLDER/<name>-<hash8>.pt, of its sha256, matrices in half precision (1.4 MB). Returns its path."""
    state = {key: value.half() if value.dim() > 1 else value for key, value in net.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"classes": net.classes, "size": net.size, "state": state}, buffer)
    path = Path(folder) / f"{name}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pt"
    write_atomically(path, buffer.getvalue())
    return path


def load_extractor(kind, dataset, weights=None, device="cpu", data_dir="data", compat=False, bf16=False):
    """The feature network `inception` or `local`, in eval mode, with name, suffix, dim, classes: uint8 (B, 3, H, W) ->
    features (B, dim), logits (B, classes). A local one belongs to one data set (`folder`: to a folder's name).
    UserError, naming the flag and the place, if its weights cannot be had."""
    if kind == "inception":
        return load_inception(weights, compat, bf16).to(device)
    name = Path(data_dir).resolve().name if dataset == "folder" else dataset
    found = [Path(weights)] if weights else sorted(FEATURES_DIR.glob(f"{name}-{'[0-9a-f]' * 8}.pt"))
    advice = f"make it: python fid.py --train-local {data_dir if dataset == 'folder' else dataset}"
    if len(found) != 1 or not found[0].is_file():
        place = f"{len(found)} files {FEATURES_DIR / name}-<hash8>.pt, one is needed"
        place = f"--weights {weights}: no such file" if weights else f"--features local: {place}"
        raise UserError(f"{place}; name one with --weights, or {advice}")
    data = found[0].read_bytes()
    if hashlib.sha256(data).hexdigest()[:8] != found[0].stem[-8:]:
        raise UserError(f"--features local: {found[0]} has not its name's sha256; restore it, or delete it; {advice}")
    stored = torch.load(io.BytesIO(data), weights_only=True)
    net = LocalNet(stored["classes"], stored["size"])
    net.load_state_dict(stored["state"])
    net.name = f"local-{found[0].stem}"
    return net.to(device, memory_format=torch.channels_last).eval()


# ---- 3. Features of many images, and their moments -------------------------------------------------------------------

@torch.no_grad()
def extract(extractor, images, batch_size=None, progress=False):
    """uint8 (N, 3, H, W), or a list of (3, H, W) of several sizes (then one by one) -> features (N, d), logits (N, K),
    float32 on the CPU. The batch size changes nothing but speed."""
    parts, device = [], next(extractor.eval().parameters()).device
    batches = [x[None] for x in images] if isinstance(images, list) else images.split(batch_size or extractor.batch)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # with TF32 the batch size would matter
        for batch in tqdm(batches, desc=f"features ({extractor.name})", unit="batch", disable=not progress):
            parts.append([y.cpu() for y in extractor(batch.to(device))])
    features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, logits


class FeatureStats:
    """Mean and covariance (ddof 1) of features (N, d) seen in batches, float64. Batches are merged about their own
    means (Chan et al. 1979), so an offset costs no digits; `scatter`: sum of outer products about the mean."""

    def __init__(self, count=0, mean=0.0, scatter=0.0):
        self.count, self.mean, self.scatter, self._root = count, mean, scatter, None

    def update(self, features):
        """Add a batch (N, d). Returns self."""
        x = torch.as_tensor(features).double()
        mean = x.mean(0)
        x = x - mean
        return self.merge(FeatureStats(len(x), mean, x.T @ x))

    def merge(self, other):
        """Add what another has seen. Returns self."""
        if other.count:
            total, delta = self.count + other.count, other.mean - self.mean
            self.scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.count * other.count / total)
            self.mean, self.count, self._root = self.mean + delta * (other.count / total), total, None
        return self

    @property
    def cov(self):
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def root(self):
        """(d, k) with root @ root.T = cov, without the eigenvalues that are only rounding error; kept once computed."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.cov)
            real = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
            self._root = vectors[:, real] * values[real].sqrt()
        return self._root


# ---- 4. Scores -------------------------------------------------------------------------------------------------------

GROUPS, T_95 = 20, 2.093024  # jackknife groups, and Student's t for 95% at 19 degrees of freedom


def leave_out(count):
    """Weights (N, 1 + GROUPS), 0 or 1: column 0 keeps every row, column 1 + g all but rows g, g + GROUPS, ... Scores
    that get them as `keep` give a list, one value per column. Fewer than two rows per group: column 0 only."""
    left = torch.arange(-1, GROUPS if count >= 2 * GROUPS else 0)
    return (torch.arange(count)[:, None] % GROUPS != left).double()


def frechet_distance(a, b):
    """Frechet distance of two FeatureStats, squared feature units, at least 0. tr (S_1 S_2)^(1/2) is the sum of
    singular values of root_1^T root_2: no matrix square root, complex number or epsilon, and exact where N < d too."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared")
    delta, cross = a.mean - b.mean, torch.linalg.svdvals(a.root.T @ b.root).sum()
    return max(0.0, (delta @ delta + a.cov.trace() + b.cov.trace() - 2 * cross).item())


def expected_floor(stats, count):
    """The Frechet distance to expect of `count` Gaussian draws like those behind `stats`, to second order in the errors
    of both moments: (1/N1 + 1/N2) (1.25 tr S + 0.5 sum_ij l_i l_j / (l_i + l_j)), l the eigenvalues of S."""
    eigen = stats.root.square().sum(0)  # (k,)
    pairs = (eigen[:, None] * eigen / (eigen[:, None] + eigen)).sum()
    return ((1 / count + 1 / stats.count) * (1.25 * eigen.sum() + 0.5 * pairs)).item()


def inception_score(logits, splits=10, seed=2020, keep=None):
    """exp(mean KL(p(y|x) || p(y))) over `splits` parts of logits (N, K): mean, standard deviation (ddof 0) (Salimans et
    al. 2016). Shuffled first, as torch-fidelity does (seed=None: not): sorted samples would have one class per part."""
    count, values, keep = len(logits), [], torch.ones(len(logits), 1).double() if keep is None else keep
    order = torch.arange(count) if seed is None else torch.from_numpy(np.random.RandomState(seed).permutation(count))
    for i in range(splits := min(splits, count)):
        rows = order[i * count // splits:(i + 1) * count // splits]
        log_p = logits[rows].double().log_softmax(1)  # (n, K)
        share = (keep[rows] / keep[rows].sum(0)).T  # (G, n)
        marginal = share @ log_p.exp()  # (G, K)
        values.append((share @ (log_p.exp() * log_p).sum(1) - torch.xlogy(marginal, marginal).sum(1)).exp())  # (G,)
    values = torch.stack(values)  # (splits, G)
    return values.mean(0).squeeze().tolist(), values.std(0, correction=0).squeeze().tolist()


def pair_mean(kernel, x, y, keep_x=None, keep_y=None, chunk=512):
    """Mean of kernel(x_i, y_j) over the kept rows of x (M, d) and y (N, d), for each column of `keep`: (G,). If y is x,
    over i != j. Holds `chunk` by N numbers at a time."""
    total, a, b = 0, x.double(), y.double()
    keep_x, keep_y = (torch.ones(len(z), 1).double() if k is None else k for z, k in ((x, keep_x), (y, keep_y)))
    for i in range(0, len(x), chunk):
        values = kernel(a[i:i + chunk], b)  # (C, N)
        if y is x:
            values[:, i:i + chunk].fill_diagonal_(0)
        total = total + (keep_x[i:i + chunk] * (values @ keep_y)).sum(0)
    return total / (keep_x.sum(0) * (keep_y.sum(0) - int(y is x)))


def kid(real, generated, subsets=100, size=1000, seed=2020, keep=None, chunk=512):
    """Kernel Inception Distance (Binkowski et al. 2018) of features (N, d): unbiased MMD^2 with (x.y/d + 1)^3, may be
    negative. Mean over `subsets` random subsets of `size`, drawn as torch-fidelity does; size=None: all pairs."""
    if size is not None and size > min(len(real), len(generated)):
        raise ValueError(f"KID subsets of {size} need as many images on each side: there are {len(real)} real and "
                         f"{len(generated)} generated; choose a smaller size, or None for all pairs")
    mean = partial(pair_mean, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3, chunk=chunk)
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets if size else 1):
        i, j = (random.choice(len(x), size, replace=False) if size else slice(None) for x in (real, generated))
        x, y, kept = real[i], generated[j], None if keep is None else keep[j]
        values.append(mean(x, x) + mean(y, y, kept, kept) - 2 * mean(x, y, None, kept))
    return torch.stack(values).mean(0).squeeze().tolist()


def squared_distances(x, y):
    """(M, d), (N, d) float64 -> (M, N); what is only rounding error becomes 0, so that duplicates are recognised."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = torch.addmm(scale, x, y.T, alpha=-2)
    return squares.masked_fill_(squares < 1e-12 * scale, 0)


def precision_recall(real, generated, k=3, chunk=512):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, d): the share of generated images inside
    some real image's ball, which reaches to its k-th nearest other; and the reverse. Both depend on N: take equal N."""
    if k >= min(len(real), len(generated)):
        raise ValueError(f"precision and recall with k={k} need more than {k} images on each side")

    def covered(x, centres):  # the (k+1)-th smallest distance counts the image itself; the margin counts ties as inside
        reach = torch.cat([squared_distances(part, centres).kthvalue(k + 1)[0] for part in centres.split(chunk)])
        inside = [(squared_distances(part, centres) <= reach * (1 + 1e-9)).any(1) for part in x.split(chunk)]
        return torch.cat(inside).double().mean().item()

    real, generated = real.double(), generated.double()
    return covered(generated, real), covered(real, generated)


def diversity(real, generated, keep=None):
    """Mean feature distance between two generated images over that between two real ones: 1 is right, 0 is collapse."""
    mean = partial(pair_mean, lambda a, b: squared_distances(a, b).sqrt())
    return (mean(generated, generated, keep, keep) / mean(real, real)).squeeze().tolist()


# ---- 5. The reference, and a row of scores with intervals ------------------------------------------------------------

def shuffle(x, seed=0):
    """The rows of a tensor, or the items of a list, in a seeded random order."""
    order = np.random.RandomState(seed).permutation(len(x))
    return [x[i] for i in order] if isinstance(x, list) else x[torch.from_numpy(order)]


def make_reference(extractor, train, test=None):
    """What real uint8 images (a tensor or a list) look like to an extractor: .stats, .features (N, d) and .count of the
    train split; .test_features and .test_logits of held-out images, or None. Rows are in a seeded random order."""
    features = extract(extractor, shuffle(train), progress=True)[0]
    test_features, test_logits = (None, None) if test is None else extract(extractor, shuffle(test), progress=True)
    return SimpleNamespace(stats=FeatureStats().update(features), features=features, count=len(features),
                           test_features=test_features, test_logits=test_logits)


def reference(extractor, data_train, data_test, cache_dir):
    """make_reference of a data set (common.ImageData, two splits), kept in CACHE_DIR under a name that changes with
    data set, split, crop, counts, size, pixels, and the feature network (its hash, convention, precision)."""
    train, test, pixels = data_train.images, data_test.images, hashlib.sha256()
    for images in (train, test):
        pixels.update(images.contiguous().numpy().data)
    path = Path(cache_dir) / (f"{data_train.name}-{data_train.split}-{data_train.crop}-{len(train)}-{len(test)}-"
                              f"{train.shape[-1]}px-{pixels.hexdigest()[:8]}-{extractor.name}.pt")
    if path.is_file():
        try:
            saved = torch.load(path, weights_only=True)
            saved["stats"], saved["stats"]._root = FeatureStats(*saved.pop("moments")), saved.pop("root")
            return SimpleNamespace(**saved)
        except Exception as error:  # whatever a damaged file raises, the answer is to make it again
            print(f"warning: {path} is damaged ({type(error).__name__}); computed again", file=sys.stderr)
    ref, buffer = make_reference(extractor, train, test), io.BytesIO()
    saved = vars(ref) | {"moments": (ref.count, ref.stats.mean, ref.stats.scatter), "root": ref.stats.root}
    del saved["stats"]
    torch.save(saved, buffer)
    write_atomically(path, buffer.getvalue())
    return ref


def interval(values):
    """A value, or [value, GROUPS values with a group left out], -> {"value", "low", "high"}: 95% grouped jackknife, for
    what the draw of the images can change (not training). low and high are None where nothing was left out."""
    value, *left = values if isinstance(values, list) else [values]
    if not left:
        return {"value": value, "low": None, "high": None}
    half = T_95 * math.sqrt((GROUPS - 1) / GROUPS * np.square(np.array(left) - np.mean(left)).sum())
    return {"value": value, "low": value - half, "high": value + half}


def scores(extractor, generated, ref, progress=False):
    """Every score of uint8 images (N, 3, H, W), or a list, against a reference: {key: {"value", "low", "high"}}.

    Keys: fid (local features: fd), is, kid, precision, recall, diversity, floor, each with the extractor's suffix. KID:
    all pairs below 2,000 images, else 100 subsets of 1,000. Precision, recall: as many real images as generated; below
    4 images k = N - 1. Diversity: of at most 2,000. Floor: the Frechet distance of as many held-out real images (or of
    all of them; without any, by formula).
    """
    count = len(generated)
    if count < 2:
        raise UserError(f"scores need at least 2 generated images (a covariance does), not {count}")
    features, logits = (shuffle(x, seed=1) for x in extract(extractor, generated, progress=progress))
    keep, real, few = leave_out(count), ref.features[:count], min(count, 2000, ref.count)
    size, real_kid = (None, ref.features[:2000]) if few < 2000 else (1000, ref.features)
    precision, recall = precision_recall(real, features, k=min(3, count - 1, len(real) - 1))
    floor = expected_floor(ref.stats, count) if ref.test_features is None else frechet_distance(
        FeatureStats().update(ref.test_features[:count]), ref.stats)
    row = {"fd" if extractor.suffix else "fid": [
               frechet_distance(FeatureStats().update(features[kept]), ref.stats) for kept in keep.T.bool()],
           "is": inception_score(logits, keep=keep)[0], "kid": kid(real_kid, features, size=size, keep=keep),
           "precision": precision, "recall": recall, "floor": floor,
           "diversity": diversity(real[:few], features[:few], leave_out(few))}
    return {key + extractor.suffix: interval(values) for key, values in row.items()}


# ---- 6. Training and examining a local network -----------------------------------------------------------------------

PSEUDO_CLASSES = 20  # K of `is_local` where there are no labels
IMAGES_SEEN = {"cifar10": 800_000}  # in training; elsewhere 200,000


def augment(x, gen, crop=False):
    """Random views of float images (B, 3, S, S): a shift of up to an eighth and a flip; or (`crop`) 25 to 100% of the
    area, a flip, and jitter of brightness, contrast and colour. Never blur or noise, which features must notice."""
    draw = lambda low, high: low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=gen)  # noqa: E731
    scale = draw(0.25, 1).sqrt() if crop else torch.ones(len(x), 1, 1, 1)
    pixel = 2 / x.shape[-1]  # in grid_sample's coordinates; a move by whole pixels blurs nothing
    reach = 1 - scale if crop else torch.full_like(scale, 0.25)
    dx, dy = ((draw(-1, 1) * reach / pixel).round() * pixel for _ in range(2))
    mirror, zero = torch.where(draw(0, 1) < 0.5, -1.0, 1.0), torch.zeros_like(scale)
    theta = torch.stack([scale * mirror, zero, dx, zero, scale, dy]).view(2, 3, -1).permute(2, 0, 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # (B, S, S, 2)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if crop:
        grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
        x = grey + (x - grey) * draw(0.4, 1.6)
        x = mean + (x - mean) * draw(0.6, 1.4) + draw(-0.3, 0.3)
    return x


def contrastive_loss(u, v, temperature=0.2):
    """NT-Xent (SimCLR, Chen et al. 2020, eq. 1), nats per view: two views (B, D) find each other among all 2B."""
    z = F.normalize(torch.cat([u, v]).float())  # (2B, D)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(u)))


def train_network(data, seed=0, batch=256):
    """A LocalNet trained on one ImageData: cross-entropy where there are labels (and regression of the true factors, if
    known, so that features see more than the class), else contrastive. Returns the net of averaged weights."""
    from common import autocast
    torch.manual_seed(seed)  # the initial weights
    gen = torch.Generator().manual_seed(seed)
    images, labels, factors = data.images, data.labels, data.factors
    classes = PSEUDO_CLASSES if labels is None else int(labels.max()) + 1
    net = LocalNet(classes, 32 if images.shape[-1] <= 32 else 64).to(memory_format=torch.channels_last)
    average = copy.deepcopy(net)
    # thrown away after training: reads the factors off the features, or is SimCLR's projection
    extra = nn.Linear(net.dim, factors.shape[1]) if factors is not None else nn.Sequential(
        nn.Linear(net.dim, 128), nn.ReLU(), nn.Linear(128, net.dim))
    batch = min(batch, len(images))
    steps = math.ceil(IMAGES_SEEN.get(data.name, 200_000) / batch)
    epochs = [torch.randperm(len(images), generator=gen) for _ in range(math.ceil(steps * batch / len(images)))]
    optimiser = torch.optim.SGD([*net.parameters(), *extra.parameters()], 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    peak = 0.2 if labels is None else 0.4 if factors is None else 0.1  # a regression diverges where classes do not
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps)
    bar = tqdm(torch.cat(epochs)[:steps * batch].view(steps, batch), desc=f"local features of {data.name}", unit="step")
    for step, index in enumerate(bar):
        x = images[index].float() / 127.5 - 1  # (B, 3, S, S)
        if labels is None:
            x = torch.cat([augment(x, gen, crop=True), augment(x, gen, crop=True)])  # (2B, 3, S, S)
        elif factors is None:  # where factors are known, a shift or a flip would change them
            x = augment(x, gen)
        with autocast(torch.device("cpu")):
            features = net.body(x.contiguous(memory_format=torch.channels_last))
            logits, extras = net.head(features).float(), extra(features).float()
        if labels is None:
            loss = contrastive_loss(*extras.chunk(2))
        else:
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
        if factors is not None:
            loss = loss + F.mse_loss(extras, factors[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        for mean, new in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
            mean.copy_(mean.lerp(new, max(0.002, 9 / (10 + step))) if mean.is_floating_point() else new)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if labels is None:  # k-means; with centres c, x.c - |c|^2/2 are the logits of equal round Gaussians around them
        from scipy.cluster.vq import kmeans2
        features = extract(average, images)[0].double().numpy()
        centres = torch.from_numpy(kmeans2(features, classes, minit="++", seed=seed)[0]).float()  # (K, d)
        average.head.weight.data, average.head.bias.data = centres, -centres.square().sum(1) / 2
    return average.eval()


def sample_size_bias(features, ref):
    """The Frechet distance of so many real held-out images, features (N, d), to the reference: {count: the mean over up
    to five disjoint draws}. Nothing but the count differs, yet it falls like 1/count: compare equal counts only."""
    means = {}
    for count in (n for n in (100, 250, 500, 1000, 2000, 4000) if n <= len(features)):
        draws = shuffle(features).split(count)[:min(5, len(features) // count)]
        means[count] = sum(frechet_distance(FeatureStats().update(x), ref.stats) for x in draws) / len(draws)
    return means


def examine(extractor, train, test):
    """What an extractor's numbers mean, measured on held-out images: a dict for the JSON beside its weights. Noise is
    in units of the pixel range, blur in pixels; the floor comes first."""
    from scipy.ndimage import gaussian_filter
    gen, images = torch.Generator().manual_seed(0), test.images
    ref = make_reference(extractor, train.images, images)
    features, logits = extract(extractor, images)
    classes = logits.argmax(1) if test.labels is None else test.labels

    def fd(x):  # of features (N, d), or of float images (N, 3, H, W) in 0..255
        x = x if x.dim() == 2 else extract(extractor, x.round().clamp(0, 255).to(torch.uint8))[0]
        return frechet_distance(FeatureStats().update(x), ref.stats)

    noise = {sd: fd(images + 255 * sd * torch.randn(images.shape, generator=gen)) for sd in (0.02, 0.05, 0.1, 0.2, 0.4)}
    blur = {s: fd(torch.from_numpy(gaussian_filter(images.numpy().astype("f4"), (0, 0, s, s)))) for s in (0.5, 1, 2, 4)}
    repeated = shuffle(features)[:50].repeat(20, 1)
    precision, recall = precision_recall(ref.features[:len(images)], features)
    if test.labels is None:  # the share of held-out images that an augmented view finds among all of them
        views = ((augment(images.float() / 127.5 - 1, gen, crop=True) + 1) * 127.5).round().clamp(0, 255).byte()
        similarity = F.normalize(extract(extractor, views)[0]) @ F.normalize(features).T  # (N, N)
        right = {"retrieval": (similarity.argmax(1) == torch.arange(len(images))).double().mean().item()}
    else:
        right = {"accuracy": (logits.argmax(1) == classes).double().mean().item()}
    return {"extractor": extractor.name, "classes": extractor.classes, "pixels": "x/127.5 - 1", "size": extractor.size,
            "crop": train.crop, "note": train.note, "n_train": len(train.images), "n_test": len(images), **right,
            "floor": fd(features), "floor_by_formula": expected_floor(ref.stats, len(images)), "noise": noise,
            "blur": blur, "sample_size": sample_size_bias(features, ref),
            "half_the_classes": fd(features[classes < extractor.classes / 2]),
            "fifty_images_repeated": fd(repeated),
            "fifty_images_repeated_recall": precision_recall(ref.features[:1000], repeated)[1],
            "real_precision": precision, "real_recall": recall, "real_is": inception_score(logits)[0]}


def train_local(name, data_dir="data"):
    """Make the local network of `shapes`, `cifar10`, `celeba64` or a folder; examine it, print the report and store it
    beside it. One that is there is only examined: results are pinned to it."""
    from common import load_images
    if name not in DATASETS and not Path(name).is_dir():
        raise UserError(f"--train-local {name}: no such folder; give one, or {', '.join(DATASETS)}")
    dataset, data_dir = (name, data_dir) if name in DATASETS else ("folder", name)
    train, test = (load_images(dataset, split, data_dir) for split in ("train", "test"))
    facts, start = {"torch": torch.__version__, "python": platform.python_version()}, time.time()
    if not any(FEATURES_DIR.glob(f"{train.name}-{'[0-9a-f]' * 8}.pt")):
        save_local(train_network(train), train.name, FEATURES_DIR)
        facts["train_seconds"] = round(time.time() - start)
    extractor = load_extractor("local", dataset, data_dir=data_dir)
    path = FEATURES_DIR / f"{extractor.name.removeprefix('local-')}.json"
    if path.is_file():
        facts |= {key: value for key, value in json.loads(path.read_text()).items() if key in (*facts, "train_seconds")}
    report = json.dumps({**examine(extractor, train, test), **facts}, indent=1)
    write_atomically(path, (report + "\n").encode())
    print(f"{path}\n{report}")


# ---- 7. The command --------------------------------------------------------------------------------------------------

def read_folder(folder, flag, count=None):
    """All images below a folder, or a seeded choice of `count`: a list of uint8 (3, H, W), or a tensor if their sizes
    agree (grey is repeated, transparency dropped); and whether most are JPEG."""
    from common import to_rgb
    suffixes = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes)
    if count is not None and not 2 <= count <= len(files) or len(files) < 2:
        raise UserError(f"{flag}: found {len(files)} images in {folder} and below, and at least 2 are needed")
    files, images = shuffle(files)[:count], []
    for path in tqdm(files, desc=f"reading {folder}", unit="image"):
        try:
            with Image.open(path) as image:
                images.append(torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error
    agree = len({image.shape for image in images}) == 1
    jpeg = sum(path.suffix.lower() in (".jpg", ".jpeg") for path in files) > len(files) / 2
    return torch.stack(images) if agree else images, jpeg


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Scores of generated images against real ones.")
    parser.add_argument("real", nargs="?", metavar="REAL", help=f"{', '.join(DATASETS)} (train split), or a folder")
    parser.add_argument("generated", nargs="?", metavar="GENERATED", help="a folder of generated images")
    parser.add_argument("--features", choices=("inception", "local"), default="local", help="default: local")
    parser.add_argument("--weights", metavar="FILE", help=f"of the features: {INCEPTION_FILE} or NAME-<hash8>.pt")
    parser.add_argument("--count", type=int, metavar="N", help="use N of the generated images, a seeded choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--data-dir", default="data", help="where a data set named as REAL lies (default: data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--compat", action="store_true", help="pytorch-fid's resize and scaling for inception")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 for inception: faster, moves FID by about 1%%")
    parser.add_argument("--train-local", metavar="NAME", help="make the local network of a data set or folder")
    args = parser.parse_args(arguments)
    try:
        if args.train_local:
            return train_local(args.train_local, args.data_dir)
        if not args.generated:
            raise UserError("REAL and GENERATED: give two folders, or a data set's name and a folder (see --help)")
        from common import choose_device, load_images
        named, flag = args.real in DATASETS, "GENERATED" if args.count is None else f"--count {args.count}"
        extractor = load_extractor(args.features, args.real if named else "folder", args.weights,
                                   choose_device(args.device), args.real, args.compat, args.bf16)
        images, jpeg = read_folder(args.generated, flag, args.count)
        if named:
            train, test = (load_images(args.real, split, args.data_dir) for split in ("train", "test"))
            ref, real_jpeg = reference(extractor, train, test, Path(args.data_dir) / "cache"), "JPEG" in train.note
        else:
            real, real_jpeg = read_folder(args.real, "REAL")
            ref = make_reference(extractor, real)
        row = scores(extractor, images, ref, progress=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if real_jpeg != jpeg:
        print("warning: only one side is JPEG, which moves the distance; save samples as PNG", file=sys.stderr)
    if len(images) < 10 * extractor.dim:
        print(f"warning: {len(images)} images are few for {extractor.dim} features: read the distance beside its floor",
              file=sys.stderr)
    held_out = ref.test_logits
    facts = {"real": args.real, "n_real": ref.count, "generated": args.generated, "n_generated": len(images),
             "features": extractor.name, "classes": extractor.classes,
             "n_floor": 0 if held_out is None else min(len(images), len(held_out)),
             "real_is": None if held_out is None else inception_score(held_out)[0], "scores": row}
    if args.json:
        return print(json.dumps(facts, indent=1))
    print("{n_generated:,} images of {generated} against {n_real:,} of {real}, features {features}".format(**facts))
    for key, score in row.items():
        span = "" if score["low"] is None else f"   95% interval {score['low']:.4f} to {score['high']:.4f}"
        print(f"  {key:18}{score['value']:10.4f}{span}")
    print("  floor by formula (no held-out images)" if held_out is None else
          "  floor of {n_floor:,} held-out images; IS of real ones (K = {classes}): {real_is:.3f}".format(**facts))


if __name__ == "__main__":
    main()
