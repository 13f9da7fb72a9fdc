"""Everything that measures: scores for generated images (FID, Inception Score, KID, precision and recall, diversity),
and the evaluation of a trained model by them.

The claim behind the scores: two sets of images are alike if a trained network's features of them are. Each image
becomes a vector: 2048 numbers from the Inception network of 2015, or 64 from a small network trained on the data set at
hand. Most scores compare the two clouds of vectors. The Frechet distance takes each cloud for a Gaussian with mean mu
and covariance S (Heusel et al. 2017). Only with Inception's features is it called FID:

    FD = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

Three habits keep the scores honest.
    One pipeline    Real and generated images enter alike: as uint8, through the network's own resizing and scaling,
                    into moments in float64.
    A floor         Even two sets of real images have an FD above 0, and the fewer they are, the larger it is. So beside
                    the FD of N generated images stands that of N held-out real ones. A model that does not copy
                    training images can hardly score lower. (If fewer than N are held out, all are taken, and the floor
                    is too high.)
    An interval     The jackknife leaves out one twentieth of the generated images at a time. How much the score changes
                    tells how much it depends on the draw of these images. (A bootstrap would repeat images. A set with
                    repeated images has a higher FD, so its interval would lie above the score.)

    python fid.py --train-local NAME      makes a local feature network for a folder or a data set: on two CPU cores
                                          5 to 25 minutes
    python fid.py REAL GENERATED          REAL is shapes, cifar10 or celeba64, or a folder for which the first command
                                          was run (with --features inception: any folder)
    python fid.py cifar10 samples --features inception --count 10000 --json

Contents: 1 Inception, 2 the local network, 3 features and their moments, 4 scores, 5 the reference and a row of scores,
6 evaluating a model, 7 training a local network, 8 the command. To learn the scores, read InceptionV3 in section 1,
sections 3 and 4, and `scores` in 5; the rest is to be looked up. "Stages" are the scripts that train models
(stage1_baseline.py and the others).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

import common
from common import DATASETS, fail, find_images, generator, load_hashed, randn, read_image, to_float, to_uint8

FEATURES_DIR = Path(__file__).resolve().parent / "results" / "features"  # networks of the three data sets
OWN_FEATURES_DIR = Path("data") / "features"  # networks of a user's own folders, which stay with the user


def require_uint8(images):
    """uint8 (B, 3, H, W) -> the same; grey (B, 1, H, W) -> its channel three times; anything else is a ValueError."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 3, H, W) or (B, 1, H, W), not {images.dtype} "
                         f"{tuple(images.shape)}; round floats in [-1, 1] by "
                         "((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)")
    return images.expand(-1, 3, -1, -1)


# ---- 1. Inception (the TensorFlow network of 2015-12-05) and its weights ---------------------------------------------

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # converted by pytorch-fid's author; 95,628,359 bytes
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def change_pool(block, pool):
    """Replace the pooling in a block of torchvision's Inception by the function `pool`. The block computes
    branch_pool(avg_pool2d(x)) in its own code, where only what branch_pool receives can be changed from outside. A hook
    that runs before a module may replace its input. So one hook puts the block's input x into the list `inputs`, and
    another takes it out and gives pool(x) to branch_pool in place of avg_pool2d(x). (A trick of programming. Nothing
    else needs it.)"""
    inputs = []

    def remember_input(module, arguments):
        inputs.append(arguments[0])  # it returns nothing, so the block's input stays as it is

    def pool_input(module, arguments):
        return pool(inputs.pop())  # this takes the place of branch_pool's input

    block.register_forward_pre_hook(remember_input)
    block.branch_pool.register_forward_pre_hook(pool_input)


def resize_matrix(size, target):
    """The matrix (target, size), float32, that resizes one axis of an image bilinearly, as TensorFlow 1 does: output i
    is read at i * size / target, without antialias. (Libraries of today read at (i + 0.5) * size / target - 0.5.)"""
    position = torch.arange(target, dtype=torch.float64) * size / target  # (target,)
    low = position.long()  # the pixel before the position; low + 1 is the one after it
    before, after = F.one_hot(low, size), F.one_hot((low + 1).clamp(max=size - 1), size)  # (target, size)
    f = (position - low)[:, None]  # (target, 1), which part of the way from low to low + 1 the position lies at
    return torch.lerp(before.double(), after.double(), f).float()  # (1 - f) before + f after


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W) -> the features after the last pooling (B, 2048), and logits (B, 1008) without the last
    layer's bias, as in the original Inception Score. The network differs from torchvision's in four points: average
    pools leave out the padding, the last block pools by maximum, there are 1008 classes, and there is no auxiliary
    head."""

    name, suffix = "inception", ""  # the names of scores end in `suffix`
    dim, classes, batch = 2048, 1008, 32

    def __init__(self):
        super().__init__()
        from torchvision.models import Inception3  # imported here, since it takes a second and few commands need it
        average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        for name, layer in Inception3(1008, aux_logits=False, init_weights=False).named_children():
            self.add_module(name, layer)  # in order of use, and with the names that the file of weights has
            if hasattr(layer, "branch_pool"):  # a block that halves the resolution has none, and stays as it is
                change_pool(layer, maximum if name == "Mixed_7c" else average)
        self.eval()

    def forward(self, images):
        x = require_uint8(images).float()
        rows = resize_matrix(x.shape[2], 299).to(x.device)  # (299, H)
        columns = resize_matrix(x.shape[3], 299).to(x.device)  # (299, W)
        x = (rows @ x @ columns.T - 128) / 128  # (B, 3, 299, 299), scaled as in the original graph
        x = x.contiguous(memory_format=common.memory_format(x.device))
        for layer in [*self.children()][:-2]:  # all but dropout and fc
            x = layer(x)
        return x.flatten(1), x.flatten(1) @ self.fc.weight.T


def load_inception(weights=None):
    """An InceptionV3 with the published weights: from the file `weights`, else $FID_INCEPTION_WEIGHTS, else torch.hub's
    cache, which a download fills. The program ends with an error if they are missing or are not the published bytes."""
    advice = f"fetch {INCEPTION_URL} and name it with --weights or FID_INCEPTION_WEIGHTS, or use --features local"
    cache = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(weights or os.environ.get("FID_INCEPTION_WEIGHTS") or cache)
    if path == cache and not cache.is_file():
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(cache), hash_prefix=INCEPTION_SHA256)
        except Exception as error:  # no network, cut off, another file, a full disk: the remedy is the same
            fail(f"--weights {cache}: no such file, and no download ({error}); {advice}")
    # load_hashed ends the program if the file is missing or has other contents. The error begins with `what` and ends
    # with `advice`.
    state = load_hashed([path], what="--weights", advice=advice, sha256=INCEPTION_SHA256)
    net = InceptionV3()
    net.load_state_dict(net.state_dict() | state)  # num_batches_tracked may be missing in the file; nothing uses it
    net.name = f"inception-{INCEPTION_SHA256[:8]}"
    return net


# ---- 2. The local network: features for one data set, trained on it (section 7) --------------------------------------

def conv_bn(inputs, outputs, stride=1):
    """A 3x3 convolution from `inputs` to `outputs` channels, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU()))


class Residual(nn.Sequential):
    """x -> x + the layers' output of x."""

    def forward(self, x):
        return x + super().forward(x)


class LocalNet(nn.Module):
    """Small residual network: uint8 images (B, 3, H, W) -> features (B, 64), logits (B, classes). It has 0.7M
    parameters and takes 0.1 GFLOP an image. Images that are not `size` x `size` (32 or 64) are cut to the centred
    square and resized with antialias, as stages do with a user's photos. The batch norm that makes the features gives
    each of them a mean of about 0 and a variance of about 1 over the training set, which sets the unit of the Frechet
    distance."""

    suffix, dim, batch = "_local", 64, 256  # the same attributes as InceptionV3 has

    def __init__(self, classes, size=32):
        super().__init__()
        self.classes, self.size, self.name = classes, size, "local"
        self.body = nn.Sequential(
            conv_bn(3, 32, stride=size // 32),  # (B, 32, 32, 32)
            conv_bn(32, 64, stride=2),
            Residual(conv_bn(64, 64), conv_bn(64, 64)),  # (B, 64, 16, 16)
            conv_bn(64, 128, stride=2),
            Residual(conv_bn(128, 128), conv_bn(128, 128)),  # (B, 128, 8, 8)
            conv_bn(128, 192, stride=2),  # (B, 192, 4, 4)
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, self.dim), nn.BatchNorm1d(self.dim, affine=False))
        self.head = nn.Linear(self.dim, classes)

    def forward(self, images):
        x = to_float(require_uint8(images))  # in [-1, 1]
        height, width = x.shape[2:]
        if (height, width) != (self.size, self.size):
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            x = x[:, :, top:top + side, left:left + side]
            if x.device.type == "mps":
                x = x.cpu()  # torch 2.6 has no antialias there
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True).to(images.device)
        features = self.body(x.contiguous(memory_format=common.memory_format(x.device)))
        return features, self.head(features)


def own_name(folder):
    """The name of the network of a user's own folder: the last part of the folder's path, and a hash of the whole path.
    So two folders of one name have two networks. When files of a folder change, its network stays, since it is only the
    measuring rod: scores before and after can be compared. (After a folder was moved, --weights names its network.)"""
    path = Path(folder).resolve()
    last_part = path.name.replace("*", "_")  # save_state would put a hash in the place of a *
    # A path need not be valid UTF-8, but fsencode gives back its bytes.
    return f"{last_part}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def save_local(net, home, name):
    """Write a LocalNet to HOME/<name>-<hash8>.pt, with matrices in half precision (1.4 MB), and return the path."""
    state = {"classes": net.classes, "size": net.size, "state": common.half(net.state_dict())}
    return common.save_state(home / f"{name}-*.pt", state)  # fills in the *


def place_of_local(dataset, data_dir):
    """The folder in which the local network of a data set lies, and the network's name, without its hash. `dataset` may
    be "folder": then it is that of the user's own folder `data_dir`."""
    return (OWN_FEATURES_DIR, own_name(data_dir)) if dataset == "folder" else (FEATURES_DIR, dataset)


def load_extractor(kind, dataset, weights=None, device="cpu", data_dir="data"):
    """The feature network of `kind` "inception" or "local", in eval mode: uint8 images (B, 3, H, W) -> features (B,
    dim), logits (B, classes). It has the attributes name, suffix, batch, dim and classes. A local network is found by
    the name of its data set or, if `dataset` is "folder", by the path of the user's own folder `data_dir`; `weights`
    names another file. The program ends with an error if there is none."""
    if kind == "inception":
        return load_inception(weights).to(device, memory_format=common.memory_format(torch.device(device)))
    if dataset == "folder":
        if not find_images(data_dir):
            problem = "found 0 images there" if Path(data_dir).is_dir() else "no such folder"
            fail(f"{data_dir}: {problem}; name the folder of your images (of a stage: --data-dir)")
    home, name = place_of_local(dataset, data_dir)
    found = [Path(weights)] if weights else common.find_hashed(home, name)
    what = "--weights" if weights else f"--features local, {home / name}-<hash8>.pt"  # how errors begin
    all_networks = [str(path) for place in (FEATURES_DIR, OWN_FEATURES_DIR) for path in sorted(place.glob("*.pt"))]
    advice = (f"name one with --weights (there are {', '.join(all_networks) or 'none'}), or make it: "
              f"python fid.py --train-local {shlex.quote(str(data_dir)) if dataset == 'folder' else dataset}")
    # This ends the program unless exactly one file is found and its bytes have the hash that is in its name.
    stored = load_hashed(found, what, advice)
    if "classes" not in stored:
        fail(f"{what}: {found[0]} is not a local feature network; {advice}")
    net = LocalNet(stored["classes"], stored["size"])
    net.load_state_dict(stored["state"])
    net.name = f"local-{found[0].stem}"
    return net.to(device, memory_format=common.memory_format(torch.device(device))).eval()


# ---- 3. Features of many images, and their moments -------------------------------------------------------------------

def scoring_device(extractor):
    """Where scores against a data set are computed: the device of the feature network, or the CPU if that has no
    float64."""
    device = next(extractor.parameters()).device
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:  # mps
        return torch.device("cpu")
    return device


@torch.no_grad()
def extract(extractor, images, progress=False):
    """The features (N, d) and logits (N, K) of uint8 images (N, 3, H, W), float32 on the CPU. The images may also be a
    list of (3, H, W) of several sizes, which are passed one by one."""
    device = next(extractor.eval().parameters()).device
    batches = [x[None] for x in images] if isinstance(images, list) else images.split(extractor.batch)
    outputs = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 would round features coarsely
        for batch in tqdm(batches, desc=f"features ({extractor.name})", unit="batch", disable=not progress):
            outputs.append([output.cpu() for output in extractor(batch.to(device))])  # [features, logits]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


@dataclass
class Moments:
    """The moments of features (N, d), in float64."""

    count: int  # N
    mean: torch.Tensor  # (d,)
    cov: torch.Tensor  # (d, d), with N - 1 in the denominator

    @cached_property
    def root(self):
        """A matrix (d, k) with root @ root.T = cov. k counts the eigenvalues that are more than rounding error."""
        values, vectors = torch.linalg.eigh(self.cov)  # ascending
        kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]  # as in numpy's matrix_rank
        return vectors[:, kept] * values[kept].sqrt()


def moments(features):
    """The Moments of features (N, d). They are centred before they are squared: a large mean costs no digits."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
    x = features.double()
    mean = x.mean(0)
    x = x - mean
    return Moments(len(x), mean, x.T @ x / (len(x) - 1))


# ---- 4. Scores -------------------------------------------------------------------------------------------------------

CHUNK = 512  # rows of a matrix of pairs that are in memory at a time


def frechet_distance(a, b):
    """The Frechet distance (top of this file) of two Moments, in squared units of the features.

    Let S_i = R_i R_i^T. For any two matrices, A B and B A have the same nonzero eigenvalues. Take

        A = R_1,  B = R_1^T R_2 R_2^T:    A B = S_1 S_2    and    B A = C C^T    with C = R_1^T R_2

    The eigenvalues of C C^T are the squared singular values of C. The trace of a matrix root is the sum of the roots of
    the eigenvalues. So tr (S_1 S_2)^(1/2) is the sum of the singular values of C. That is exact for N < d too, and
    needs no matrix square root."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared")
    delta = a.mean - b.mean
    cross = torch.linalg.svdvals(a.root.T @ b.root).sum()
    return max(0.0, (delta @ delta + a.cov.trace() + b.cov.trace() - 2 * cross).item())


def inception_score(logits, splits=10, seed=2020):
    """The Inception Score (Salimans et al. 2016), exp(mean KL(p(y|x) || p(y))), of logits (N, K): mean and standard
    deviation (of the population) over `splits` parts. The images are shuffled first, with torch-fidelity's seed, since
    sorted ones would give parts of one class each; seed=None keeps their order."""
    logits = logits if seed is None else shuffle(logits, seed)
    count, splits, values = len(logits), min(splits, len(logits)), []
    for i in range(splits):
        log_p = logits[i * count // splits:(i + 1) * count // splits].double().log_softmax(1)  # (n, K), log p(y|x)
        marginal = log_p.exp().mean(0)  # (K,), p(y)
        # mean over x of sum_y p(y|x) log p(y|x), minus sum_y p(y) log p(y), where 0 log 0 = 0
        kl = (log_p.exp() * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        values.append(kl.exp())
    values = torch.stack(values)  # (splits,)
    return values.mean().item(), values.std(correction=0).item()


def pair_means(kernel, x, y=None):
    """For each row x_i of x (M, d), the mean of kernel(x_i, y_j) over all rows of y (N, d): float64 (M,). Without y,
    the mean of kernel(x_i, x_j) over all j except i."""
    leave_out_self = y is None
    x = x.double()
    y = x if leave_out_self else y.double()
    sums = []
    for i in range(0, len(x), CHUNK):
        values = kernel(x[i:i + CHUNK], y)  # (CHUNK, N)
        if leave_out_self:
            values[:, i:i + CHUNK].fill_diagonal_(0)  # kernel(x_i, x_i) lies on the diagonal of this block
        sums.append(values.sum(1))
    return torch.cat(sums) / (len(y) - int(leave_out_self))


def cubic(x, y):
    """KID's kernel (x.y / d + 1)^3 of all rows of x (M, d) with all rows of y (N, d): (M, N)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def distances(x, y):
    """The distances of rows of x (M, d) from rows of y (N, d), float64: (M, N). Mere rounding error becomes 0."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)  # |x|^2 + |y|^2
    squares = torch.addmm(norms, x, y.T, alpha=-2)  # |x|^2 + |y|^2 - 2 x.y
    return squares.masked_fill_(squares < 1e-12 * norms, 0).sqrt_()  # so that duplicates have distance 0


def kid(real, generated, subsets=100, size=1000, seed=2020):
    """Kernel Inception Distance (Binkowski et al. 2018) of features (M, d) and (N, d): with the cubic kernel k, the
    mean of k(x, x') over pairs of real images, plus that of k(y, y') over pairs of generated ones, minus twice that of
    k(x, y). The estimate is unbiased, so that it may be negative. It is a mean over `subsets` random subsets with
    `size` images on each side, drawn as torch-fidelity draws them; with size=None all images are used, once."""
    if size is not None and size > min(len(real), len(generated)):
        raise ValueError(f"KID subsets of {size} need as many images on each side, not {len(real)}, {len(generated)}")
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets if size else 1):
        x = real[random.choice(len(real), size, replace=False)] if size else real
        y = generated[random.choice(len(generated), size, replace=False)] if size else generated
        values.append(pair_means(cubic, x).mean() + pair_means(cubic, y).mean() - 2 * pair_means(cubic, x, y).mean())
    return torch.stack(values).mean().item()


def precision_recall(real, generated, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (M, d) and (N, d). Each image has a ball
    that reaches to its k-th nearest neighbour of its own kind. Precision is the share of generated images in the ball
    of any real image, recall the share of real images in the ball of any generated one. Both depend on M and N."""
    if k >= min(len(real), len(generated)):
        raise ValueError(f"precision and recall with k={k} need more than {k} images on each side")

    def share_inside(x, centres):  # the share of the rows of x that lie in the ball of some row of `centres`
        # k + 1, since each image is its own nearest neighbour
        radius = torch.cat([distances(part, centres).kthvalue(k + 1)[0] for part in centres.split(CHUNK)])
        # The factor 1 + 1e-9: a point on the surface of a ball counts as inside, whatever the rounding.
        inside = [(distances(part, centres) <= radius * (1 + 1e-9)).any(1) for part in x.split(CHUNK)]
        return torch.cat(inside).double().mean().item()

    real, generated = real.double(), generated.double()
    return share_inside(generated, real), share_inside(real, generated)


def diversity(real, generated):
    """Mean feature distance of two generated images over that of two real ones: 1 if as diverse, 0 if all are alike."""
    return (pair_means(distances, generated).mean() / pair_means(distances, real).mean()).item()


GROUPS = 20  # of the jackknife
T_95 = 2.093024  # the 97.5% quantile of Student's t with GROUPS - 1 degrees of freedom


def jackknife(score, x):
    """The number score(x) for x (N, ...), with a 95% interval: {"value", "low", "high"}. Row i belongs to group i
    modulo 20, and the interval comes from 20 scores that leave out one group each. It tells how far another draw of
    images could change the score (not another training). For N < 40, low and high are None."""
    value, group = score(x), torch.arange(len(x)) % GROUPS
    if len(x) < 2 * GROUPS:
        return {"value": value, "low": None, "high": None}
    scores_without = np.array([score(x[group != g]) for g in range(GROUPS)])
    # The jackknife's variance of a score (Efron 1982). Any two of these scores share most of their images, so they vary
    # much less than scores of separate draws would. That is why their squared deviations are added up (times 19/20),
    # not averaged. (Of a mean of N numbers, this gives what it should: their variance / N.)
    half_width = T_95 * math.sqrt((GROUPS - 1) / GROUPS * np.square(scores_without - scores_without.mean()).sum())
    return {"value": value, "low": value - half_width, "high": value + half_width}


def jackknife_pairs(value, image_means):
    """The jackknife of a score that is the mean of a symmetric matrix of pairs of images (such as the mean distance of
    two images), without computing the pairs again. `value` is the score, image_means (N,) has the means of the matrix's
    rows. To first order,
        score without a group = value + 2 (mean of the image_means that remain - mean of all)
    The factor is 2 because an image has a row and a column. Without its row alone, the score would be the mean of the
    other rows' means; without its column, it changes by as much again, since the matrix is symmetric."""
    return jackknife(lambda kept: value + 2 * (kept.mean() - image_means.mean()).item(), image_means)


# ---- 5. The reference, and a row of scores with intervals ------------------------------------------------------------

def shuffle(x, seed=0):
    """The rows of a tensor, or the items of a list, in a seeded random order."""
    order = np.random.RandomState(seed).permutation(len(x))
    return [x[i] for i in order] if isinstance(x, list) else x[torch.from_numpy(order)]


@dataclass
class Reference:
    """Features of real images, in a random order, to compare with. `stats` has the Moments of the training images."""

    features: torch.Tensor  # (N, d), of the training images
    test_features: torch.Tensor | None = None  # (M, d), of held-out images
    test_logits: torch.Tensor | None = None  # (M, K)

    def __post_init__(self):
        self.stats = moments(self.features)


def make_reference(extractor, train, test=None):
    """The Reference of real images `train` and held-out ones `test`: uint8 (N, 3, H, W), or lists as in `extract`."""
    features, _ = extract(extractor, shuffle(train), progress=True)
    if test is None:
        return Reference(features)
    return Reference(features, *extract(extractor, shuffle(test), progress=True))


def hash_of_images(*images):
    """8 hexadecimal digits that change with any pixel of uint8 images, one tensor (N, 3, H, W) or several."""
    pixels = hashlib.sha256()
    for tensor in images:
        pixels.update(tensor.contiguous().numpy().data)
    return pixels.hexdigest()[:8]


def cached_reference(extractor, data_train, data_test, cache_dir):
    """The Reference of a data set (common.ImageData of two splits). It is kept in cache_dir, in a file whose name
    changes with the data set, its crop, any of its pixels and the feature network."""
    train, test = data_train.images, data_test.images
    name = f"{data_train.name}-{data_train.crop}-{len(train)}-{hash_of_images(train, test)}-{extractor.name}.pt"
    path = Path(cache_dir) / name
    device = scoring_device(extractor)
    try:
        tensors = common.load_state(path)
    except Exception:  # there is no such file, or it is damaged
        ref = make_reference(extractor, train, test)
        tensors = [ref.features, ref.test_features, ref.test_logits]
        common.save_state(path, tensors, optional=True)  # if it cannot be written, it is computed again next time
    return Reference(*(x.to(device) for x in tensors))


def kid_with_interval(real, generated):
    """KID of features (M, d) and (N, d): over 100 random subsets of 1,000 if there are 2,000 on both sides; else one
    estimate from all generated images and at most 2,000 real ones.

    Let b_i be the mean kernel of generated image i with the other generated ones, and c_i with the real ones. Then
        KID = mean kernel of real images + mean_i b_i - 2 mean_i c_i
    The first mean over i is one over pairs of generated images. So if a group is left out, to first order
        change of KID = 2 (change of mean_i b_i) - 2 (change of mean_i c_i)
    which is what jackknife_pairs computes from the image_means b_i - c_i. For the interval these need to be known only
    roughly: b_i from a block of 2,000 to 4,000 images (or all, if there are fewer), c_i from at most 5,000."""
    if min(len(real), len(generated)) >= 2000:
        subset_size = 1000
    else:
        real, subset_size = real[:2000], None
    blocks = generated.tensor_split(max(1, len(generated) // 2000))
    b_minus_c = torch.cat([pair_means(cubic, block) - pair_means(cubic, block, real[:5000]) for block in blocks])
    return jackknife_pairs(kid(real, generated, size=subset_size), b_minus_c)


def scores(extractor, generated, ref, progress=False):
    """Every score of generated images, uint8 (N, 3, H, W) or a list, against a Reference: {key: {"value", "low",
    "high"}}. Each key ends in the extractor's suffix. The last three scores have no interval.

        fid, is             Frechet distance (the key is "fd" for local features) and Inception Score
        kid                 Kernel Inception Distance
        diversity           of at most 2,000 images
        precision, recall   of equal numbers of real and generated images, since they depend on both; k = 3 if N > 3
        floor               fid of N held-out images (of all, if they are fewer); only if there are held-out ones"""
    count, device = len(generated), ref.features.device
    # Shuffled, since the groups of the jackknife and the ten parts of the Inception Score should not depend on an order
    # such as by class.
    features, logits = (shuffle(x, seed=1).to(device) for x in extract(extractor, generated, progress=progress))
    row = {"fd" if extractor.suffix else "fid": jackknife(lambda x: frechet_distance(moments(x), ref.stats), features)}
    # inception_score splits the images into ten parts after shuffling them (seed 2020). Here they are shuffled with the
    # same seed before the jackknife, not inside it: else the parts would have other images whenever a group is left
    # out. So the value is that of inception_score(logits).
    row["is"] = jackknife(lambda x: inception_score(x, seed=None)[0], shuffle(logits, seed=2020))
    row["kid"] = kid_with_interval(ref.features, features)
    at_most_2000 = min(count, 2000, len(ref.features))
    some_real, some = ref.features[:at_most_2000], features[:at_most_2000]
    image_means = pair_means(distances, some) / pair_means(distances, some_real).mean()  # their mean is the diversity
    row["diversity"] = jackknife_pairs(diversity(some_real, some), image_means)
    real = ref.features[:count]
    precision, recall = precision_recall(real, features[:len(real)], k=min(3, count - 1, len(real) - 1))
    values = {"precision": precision, "recall": recall}
    if ref.test_features is not None:
        values["floor"] = frechet_distance(moments(ref.test_features[:count]), ref.stats)
    for key, value in values.items():
        row[key] = {"value": value, "low": None, "high": None}
    return {key + extractor.suffix: score for key, score in row.items()}


# ---- 6. Evaluating a model -------------------------------------------------------------------------------------------
#
# A VAE draws z from a prior, and decodes it to x_hat. A refiner turns noise and x_hat into an image. Three attributes
# of a common.Model (section 4 there) tell its kind:
#
#                         vae    denoiser_for   decode
#     VAE alone           set    None           None     its image is x_hat
#     diffusion alone     None   set            None     turns noise into an image
#     VAE and refiner     set    set            None     turns noise and x_hat into an image
#     latent diffusion    None   set            set      turns noise into a latent, and decodes it; it has no x_hat
#
# The settings in `evaluation` are those of common.EVAL. The first row of scores, by which a model is judged, is called
# the headline. Without a VAE the prior is called "none", and without diffusion the sampler is called so.

# The standard deviations of the noise in `robustness`. Images span [-1, 1]; diffused latents have an sd of about 1.
NOISE = {"clean": 0.0, "noise 0.1": 0.1, "noise 0.2": 0.2, "noise 0.4": 0.4}


def this_commit():
    """The commit of this code, ending in "-dirty" if files were changed since, or "unknown" without git. (A repository
    that this code only lies in, such as one of a whole home folder, is not asked.)"""
    commit, home = "", Path(__file__).resolve().parent
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True,
                                text=True, cwd=home, env=os.environ | {"GIT_CEILING_DIRECTORIES": str(home.parent)},
                                ).stdout.strip()
    return commit or "unknown"


class Setup:
    """What a stage's command works with. Its constructor does first what can fail: it joins the processes that torchrun
    has started, and loads the feature network and the data. `train` and `evaluation` are the settings of common.TRAIN
    and common.EVAL (section 8 there) for the chosen budget."""

    def __init__(self, args, train, evaluation, device):
        common.keep_freed_memory()  # which is faster on a CPU
        self.changes = args.changes  # by --set; folder_and_settings gives each run those on which it depends
        # If torchrun has started several processes, each takes a share of the batch.
        common.join_processes(device, (train | self.changes)["batch"])
        if common.RANK > 0:
            common.wait_for_all()  # until the first process has downloaded and decoded all images
        self.device = device
        self.commit = this_commit()  # now, since files may be changed while this run goes on
        self.extractor = load_extractor(evaluation["features"], args.dataset, args.weights, device, args.data_dir)
        self.fd_key = "fd_local" if self.extractor.suffix else "fid"  # of the Frechet distance in scores
        self.data, self.test = (common.load_images(args.dataset, split, args.data_dir, train["image_size"])
                                for split in ("train", "test"))
        if common.RANK == 0:
            common.wait_for_all()  # now the others go on
        if len(self.test.images) < 6:
            fail(f"{args.data_dir}: {len(self.test.images)} held-out images of {args.dataset}; at least 6 are needed")
        # What is kept of a user's own folder does not go into that folder. (Shapes have no folder.)
        self.cache = Path("data" if args.dataset in ("shapes", "folder") else args.data_dir) / "cache"
        # The settings also say what the data are: how they were cropped, how many they are, and a note such as "JPEG
        # copies". A checkpoint holds its settings, and common.finished_state refuses one that has others.
        self.train = train | {"crop": self.data.crop, "n_train": len(self.data.images), "data_note": self.data.note}
        if args.dataset == "folder":  # another folder of the same name is other data, and so is one that has changed
            self.train["data_dir"] = str(Path(args.data_dir).resolve())
            self.train["data_hash"] = hash_of_images(self.data.images, self.test.images)
        self.evaluation = evaluation | {"features": self.extractor.name}
        self.home = Path(args.out) / f"{self.data.name}-{train['budget']}"  # the folder of the runs

    def folder_and_settings(self, name, ignored=()):
        """The folder and the train settings of the run of this name. Both contain the changes by --set, except those
        whose key begins with one of `ignored`: --set unet_lr=0.001 must neither rename a VAE nor train it again."""
        changes = {key: value for key, value in self.changes.items() if not key.startswith(ignored)}
        return self.home / f"{name}{common.name_changes(changes)}-s{self.train['seed']}", self.train | changes

    @cached_property
    def reference(self):
        """What the scores compare with: the features of training and held-out images, kept in self.cache."""
        return cached_reference(self.extractor, self.data, self.test, self.cache)

    def score(self, images):
        """All scores of uint8 images (see `scores`). The first process computes them for all."""
        return common.from_first(
            scores(self.extractor, images, self.reference) if common.RANK == 0 else None)


def mean_score(values):
    """The mean of values (N,) as a score: {"value", "low", "high"}, with a 95% interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return {"value": mean, "low": mean - half, "high": mean + half}


def high_frequency_power(images):
    """Mean power of the grey image above 1/4 cycle per pixel, which is half the highest frequency along an axis: uint8
    (N, 3, S, S) -> (N,). The Fourier transform takes the image as periodic, so its left and right borders meet in a
    jump, which would count as detail. A Hann window fades the borders out."""
    grey = images.float().mean(1)  # (N, S, S)
    size = grey.shape[-1]
    window = torch.hann_window(size, periodic=False, device=grey.device)
    spectrum = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window)
    frequency = torch.fft.fftfreq(size, device=grey.device)  # along one axis, in cycles per pixel
    is_high = torch.hypot(frequency[:, None], frequency) > 0.25  # (S, S)
    return spectrum.abs().square()[:, is_high].mean(1)


def hf_energy(images, real):
    """Sharpness, a score: the high-frequency power of `images` over that of `real`, uint8 (N, 3, S, S). 1 is as sharp
    as real images."""
    return mean_score(high_frequency_power(images) / high_frequency_power(real).mean())


def psnr_db(images, real):
    """Mean peak signal-to-noise ratio of uint8 images (N, 3, H, W), in decibels. An image without any error counts as
    100 dB; one wrong grey level in a whole 64x64 image is 89 dB."""
    mse = (images.float() - real.float()).div(255).square().mean((1, 2, 3))  # (N,)
    return float(-10 * mse.clamp(min=1e-10).log10().mean())


def read_metrics(path, evaluation=None):
    """The metrics in a file, or None if there are none, if they are damaged, if they have another schema, or if they
    were measured with other evaluation settings than `evaluation`, if that is given. (It must hold no tuples, which are
    lists when they come back from JSON.)"""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        metrics = json.loads(Path(path).read_text(encoding="utf-8"))
        complete = metrics["schema"] == 1 and len(metrics["rows"]) > 0
        if complete and (evaluation is None or evaluation == metrics["run"]["eval"]):
            return metrics
    return None


def processor_name(path="/proc/cpuinfo"):
    """The model of the processor, from the file in which Linux describes it, or else the name of its architecture.
    (Processors round differently, so the same training can give another result on another model. The matrix unit AMX is
    named, too, since it may be switched off.)"""
    if Path(path).exists():
        text = Path(path).read_text(encoding="utf-8")
        for line in text.splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip() + (" with AMX" if " amx_tile" in text else "")
    return platform.machine()


def evaluate(folder, setup, state, model):
    """The metrics of a finished run, with rows of scores and tables. They are read from the run's folder if they belong
    to this training (its run_id) and these settings. Else they are measured and written there, with pictures. `model`
    is the one of the checkpoint `state`. A stage adds tables of its own afterwards."""
    metrics = read_metrics(folder / "metrics.json", setup.evaluation)
    if metrics is not None and metrics["run"].get("run_id") == state["run_id"]:
        return metrics
    train, data = state["train"], setup.data
    rows, tables = measure_samples(folder, model, setup)
    if model.vae is not None:
        tables |= measure_vae(folder, model, setup)
    if model.denoiser_for is not None and model.decode is None:  # a bound on pixels, which latent diffusion lacks
        tables["bits_per_dim"] = bits_per_dim(model, rows[0]["prior"], setup)
    tables["training"] = common.draw_training(folder, state["log"])
    hardware = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor_name()
    run = {"dataset": data.name, "crop": data.crop, "data_note": data.note,
           "variant": folder.name.removesuffix(f"-s{train['seed']}"), "budget": train["budget"], "seed": train["seed"],
           "run_id": state["run_id"], "features": setup.extractor.name, "n_real": len(data.images),
           "parameters": sum(map(common.count_parameters, model.networks)),
           "bfloat16": model.reduced,  # whether it sampled in bfloat16, which rounds coarsely
           "train_seconds": state["seconds"] + state["seconds_before"],  # before: that of the VAE that it builds on
           "device": f"{model.device.type} ({hardware}, {torch.get_num_threads()} threads)",
           "commit": setup.commit, "torch": torch.__version__, "train": train, "eval": setup.evaluation}
    metrics = {"schema": 1, "run": run, "rows": rows, "tables": tables}
    common.write_json(folder / "metrics.json", metrics)
    for name in ("latent", "start"):  # a VAE alone has no "start", latent diffusion none of both
        if name in tables and train["budget"] != "smoke":  # after a few steps there is nothing to conclude
            print(f"{folder.name}: {tables[name]['conclusion']}")
    return metrics


def measure(model, setup, prior, sampler, steps, count, damage=0.0):
    """Generate `count` images and score them. `damage` is the standard deviation of the noise that `robustness` adds to
    x_hat or to a latent. Returns one row of the metrics, and the images before and after refinement."""
    x_hat, images, seconds = common.generate(model, count, prior, sampler, steps, setup.train["seed"],
                                             setup.evaluation["batch"], damage)
    steps = min(steps, model.diffusion.start)  # sampling visits each of the times start, ..., 1 at most once
    nfe = steps * model.evaluations  # number of evaluations of a network; a guided step has two
    row = {"prior": prior, "sampler": sampler, "steps": steps, "nfe": nfe, "n_generated": count,
           "seconds_per_image": seconds} | setup.score(images)
    return row | {"hf_energy": hf_energy(images, setup.test.images)}, x_hat, images


def measure_samples(folder, model, setup):
    """Rows of scores of samples (the headline first, then other priors, samplers and numbers of steps), and tables:
    scores before refinement, copies of training images, and scores under noise. Writes pictures."""
    evaluation, tables = setup.evaluation, {}
    prior, sampler, steps = common.headline(model, evaluation)
    row, x_hat, images_of_headline = measure(model, setup, prior, sampler, steps, evaluation["count"])
    both = model.vae is not None and model.denoiser_for is not None
    common.draw_samples(folder, {"VAE": x_hat, "refined": images_of_headline} if both else
                        {model.name: images_of_headline})
    if both:
        tables["before_refinement"] = setup.score(x_hat) | {"hf_energy": hf_energy(x_hat, setup.test.images)}
        draw_trajectory(folder, model, prior, setup)
    rows, by_prior = [row], {prior: images_of_headline[:12]}
    for other in model.priors:
        if other != prior:
            key = "count" if model.denoiser_for is None else "grid_count"  # a VAE alone is fast
            row, _, images = measure(model, setup, other, sampler, steps, evaluation[key])
            rows.append(row)
            by_prior[other] = images[:12]
    if len(by_prior) > 1:
        common.save_grid(folder / "priors.png", by_prior)
    if model.denoiser_for is not None:
        pictures = {}
        for name, n in evaluation["grid"]:
            row, _, images = measure(model, setup, prior, name, n, evaluation["grid_count"])
            rows.append(row)
            pictures[f"{name} {n}"] = images[:12]
        common.save_grid(folder / "steps.png", pictures)
        tables["copies"] = copies(folder, images_of_headline[: evaluation["grid_count"]], setup)
    if model.vae is not None or model.decode is not None:
        tables["robustness"] = robustness(folder, model, prior, setup)
    return rows, tables


def robustness(folder, model, prior, setup):
    """Scores with noise on x_hat, before a refiner sees it, or on a latent, before it is decoded. The codes z, and the
    noise from which sampling begins, are the same at every strength. `mean` is the mean Frechet distance over the three
    strengths above 0, `rise` is by how much that is higher than without noise. (Of a VAE alone, these are the scores of
    the noisy x_hat itself, to compare with.) Writes robustness.png."""
    evaluation, fd_key = setup.evaluation, setup.fd_key
    has_diffusion = model.denoiser_for is not None
    sampler, steps = ("dpm", evaluation["probe_steps"]) if has_diffusion else ("none", 0)
    scores_by_noise, pictures = {}, {}
    for name, sd in NOISE.items():
        row, x_hat, images = measure(model, setup, prior, sampler, steps, evaluation["grid_count"], sd)
        scores_by_noise[name] = {fd_key: row[fd_key], "hf_energy": row["hf_energy"]}
        if prior != "none":  # latent diffusion has no prior over z, and no x_hat
            pictures[name] = x_hat[:12]
        if has_diffusion:
            pictures[f"{name}, refined"] = images[:12]
    common.save_grid(folder / "robustness.png", pictures)
    clean, *noisy = [row[fd_key]["value"] for row in scores_by_noise.values()]
    mean = sum(noisy) / len(noisy)
    return {"steps": row["steps"], "images": evaluation["grid_count"], "scores": scores_by_noise, "mean": mean,
            "rise": mean - clean}


def nearest_rows(views, rows):
    """For each of N images: the distance to the nearest of `rows` (M, d), and its index. `views` is a list: the images
    (N, d) or, where mirror images count, too, the images and their mirror images. Of two distances the smaller one is
    taken. It takes some rows at a time, since all N M distances may not fit into memory."""
    distance, index = torch.full((len(views[0]),), math.inf, dtype=torch.float64), torch.zeros(len(views[0])).long()
    for view in views:
        for first in range(0, len(rows), 2000):
            part_distance, part_index = distances(view.double(), rows[first : first + 2000].double()).min(1)
            closer = part_distance < distance
            distance = torch.where(closer, part_distance, distance)
            index = torch.where(closer, first + part_index, index)
    return distance, index


def copies(folder, images, setup):
    """Does a model copy training images? The distance of generated images, uint8 (N, 3, H, W), to the nearest training
    image, and the same for as many held-out images: by pixels (the root of the mean squared difference, in grey
    levels) and in the features of the scores. Let r be the 1% quantile of the held-out images' distances. `closer` is
    the share of generated images whose distance is at most r. A share far above 0.01 would speak for copies.

    If training mirrors images, an image's mirror image is searched for, too, and the smaller distance counts. Writes
    copies.png, the five generated images that are closest in the features, with their nearest training images."""
    train = shuffle(setup.data.images)  # as make_reference does: so row i of its features belongs to image i
    count = min(len(images), len(setup.test.images))
    mirrored = (setup.train | setup.changes)["unet_flip"]
    sides, table = {"generated": images[:count], "held_out": setup.test.images[:count]}, {"images": count}
    nearest = {}  # (kind of distance, side): distances and indices, each (N,)
    for side, chosen in sides.items():
        both = torch.cat([chosen, chosen.flip(3)] if mirrored else [chosen])  # (N, 3, H, W) or (2 N, 3, H, W)
        features, _ = extract(setup.extractor, both)
        distance, index = nearest_rows(both.flatten(1).split(count), train.flatten(1))
        nearest["pixels", side] = distance / both[0].numel() ** 0.5, index  # the root of the mean, not of the sum
        nearest["features", side] = nearest_rows(features.split(count), setup.reference.features.cpu())
    for kind in ("pixels", "features"):
        (generated, _), (held_out, _) = nearest[kind, "generated"], nearest[kind, "held_out"]
        table[kind] = {"generated": float(generated.mean()), "held_out": float(held_out.mean()),
                       "closer": float((generated <= held_out.quantile(0.01)).float().mean())}
    distance, index = nearest["features", "generated"]
    closest = distance.argsort()[:5]
    common.save_grid(folder / "copies.png", {"generated": sides["generated"][closest],
                                             "nearest in training": train[index[closest]]})
    return table


COMPONENTS = (30, 300, 3000, 6000)  # of the mixtures that by_components compares


def held_out_codes(model, setup):
    """Mean and log-variance of q(z | x) of all held-out images, and a code z that is drawn from it: each (N, d)."""
    mu, logvar = common.encode(model.vae, setup.test.images, model.device)
    noise = randn(mu.shape, generator(common.SEEDS["held_out_codes"] + setup.train["seed"]))
    return mu, logvar, common.reparameterise(mu, logvar, noise)


def by_components(model, setup):
    """How many components a mixture needs. Mixtures of several sizes are fitted to codes of the training images. (Their
    components share a covariance, as thousands cannot each have one of their own. So the mixture of 30 is not the
    prior of photographs, whose 30 components do not share one.) For each: the Frechet distance of samples, and the
    mean log-density of held-out codes. Sizes above the number of training codes are left out."""
    seed = setup.train["seed"]
    z = common.draw_codes(model.vae, setup.data.images, seed, model.device)
    _, _, held_out = held_out_codes(model, setup)
    _, sampler, steps = common.headline(model, setup.evaluation)
    count = setup.evaluation["count" if model.denoiser_for is None else "grid_count"]
    table = {"images": count}
    for components in COMPONENTS:
        if components > len(z):
            break
        mixture = common.GaussianMixture.fit(z, components, seed, tied=True)
        trial = dataclasses.replace(model, priors={f"mixture of {components}": mixture})
        row, _, _ = measure(trial, setup, f"mixture of {components}", sampler, steps, count)
        density = mean_score(mixture.log_prob(held_out))
        table[str(components)] = {setup.fd_key: row[setup.fd_key], "log_density": density}
    return table


@torch.no_grad()
def measure_vae(folder, model, setup):
    """Tables of a VAE and of the refiner behind it, from held-out images: reconstructions (also by thirds of the VAE's
    error), the latent, whether refinement begins early enough, and the log-density of codes, and of each prior's
    samples, under each prior. Refines with DPM-Solver++ in as many steps as the headline has. Writes
    reconstructions.png."""
    test, seed = setup.test, setup.train["seed"]
    all_mu, all_logvar, z = held_out_codes(model, setup)
    count = min(1000, setup.evaluation["grid_count"])
    real, mu, logvar = test.images[:count], all_mu[:count], all_logvar[:count]
    gen, parts = generator(common.SEEDS["reconstruction"] + seed), []
    for code in mu.to(model.device).split(setup.evaluation["batch"]):  # reconstructions are made from the mean code
        x_hat = model.vae.decoder(code)
        # (Of a VAE alone, common.refine returns x_hat as it is.)
        images = common.refine(model, x_hat, code, gen, "dpm", setup.evaluation["sample_steps"])
        parts.append((to_uint8(x_hat).cpu(), to_uint8(images).cpu()))
    x_hat, refined = map(torch.cat, zip(*parts, strict=True))
    pictures = {"real": real[:12], "VAE": x_hat[:12]}
    table = {"images": len(real), "psnr_db": psnr_db(x_hat, real),
             "kl_nats": float(common.gaussian_kl(mu, logvar).mean())}
    kinds = {"vae": x_hat}
    if model.denoiser_for is not None:
        kinds["refined"] = refined
    for name, images in kinds.items():
        table[f"hf_energy_{name}"] = hf_energy(images, test.images)
    tables = {"reconstruction": table, "error_thirds": error_thirds(kinds, real, setup),
              "latent": diagnose(mu, logvar, table["hf_energy_vae"]["value"])}
    if model.denoiser_for is not None:
        pictures["refined"] = refined[:12]
        tables["start"] = check_start(model.diffusion, x_hat, real)
    common.save_grid(folder / "reconstructions.png", pictures)
    tables["prior_log_density"] = {name: mean_score(prior.log_prob(z)) for name, prior in model.priors.items()}
    # {judge: {source: the mean log-density that the prior `judge` gives to samples of the prior `source`}}
    tables["density_of_samples"] = {name: {} for name in model.priors}
    for source, prior in model.priors.items():
        # (z has this seed, too. That does no harm, since z and these samples are never compared.)
        samples = prior.sample(1000, generator(common.SEEDS["held_out_codes"] + seed))
        for judge, judging_prior in model.priors.items():
            tables["density_of_samples"][judge][source] = mean_score(judging_prior.log_prob(samples))
    return tables


def fd_to_originals(images, real_features, setup):
    """The Frechet distance between reconstructions (the VAE's images or refined ones) and the very images that they
    reconstruct, whose features (N, f) are given."""
    features, _ = extract(setup.extractor, images)  # (N, f), and logits
    return {"fd_to_originals": frechet_distance(moments(features), moments(real_features))}


def error_thirds(kinds, real, setup):
    """How a model handles images that its VAE reconstructs well or badly. `kinds` has the reconstructions of held-out
    images `real`, uint8 (N, 3, H, W): those of the VAE and, if there is a refiner, the refined ones. Their distances to
    the originals are given for the third of the images with the lowest squared error of the VAE, for the middle third,
    and for the third with the highest."""
    error = (kinds["vae"].float() - real.float()).square().mean((1, 2, 3))  # (N,)
    real_features, _ = extract(setup.extractor, real)
    thirds = {"images": len(real) // 3}
    for name, index in zip(("low", "middle", "high"), error.argsort().tensor_split(3), strict=True):
        thirds[name] = {}
        for kind, images in kinds.items():
            thirds[name][kind] = fd_to_originals(images[index], real_features[index], setup)
    return thirds


@torch.no_grad()
def draw_trajectory(folder, model, prior, setup):
    """trajectory.png: how refinement goes from x_hat and noise to the image, for four codes that the prior of this name
    draws. Two rows for each code: the noisy image x_t, and the clean image that the network predicts from it."""
    steps, trajectory = setup.evaluation["sample_steps"], []
    gen = generator(common.SEEDS["trajectory"] + setup.train["seed"])
    z = model.priors[prior].sample(4, gen).to(model.device)
    x_hat = model.vae.decoder(z)
    # refine fills the list with (t, x_t, predicted x0) of each step.
    image = common.refine(model, x_hat, z, gen, "dpm", steps, trajectory=trajectory)
    shown = [trajectory[round(i * (len(trajectory) - 1) / 3)] for i in range(4)]  # four steps, the first and last too
    noisy = [x_hat, *(x for _, x, _ in shown), image]
    predicted = [x_hat, *(x0 for _, _, x0 in shown), image]
    rows = {}
    for k in range(len(z)):
        for label, columns in (("x_t", noisy), ("x0", predicted)):
            rows[f"{k + 1} {label}"] = torch.stack([to_uint8(column[k]).cpu() for column in columns])
    common.save_grid(folder / "trajectory.png", rows, ["x_hat", *(f"t = {t}" for t, _, _ in shown), "image"])


def diagnose(mu, logvar, sharpness):
    """Why the VAE's images are smooth, if they are: its latent is unused (few active units); or most units carry little
    (a posterior variance near 1); or z does not hold the detail, and a Gaussian decoder gives the mean of all images
    that fit z. mu, logvar (N, d) of held-out images; `sharpness`: hf_energy of their x_hat. The thresholds are rules of
    thumb: 5% of the units, a posterior variance of 0.9 (that of N(0, I) is 1), half the sharpness of real images."""
    active = int(common.active_units(mu).sum())
    variance = float(logvar.exp().mean())
    if active < 0.05 * mu.shape[1]:
        text = "almost no latent unit is active (posterior collapse): lower beta or train longer"
    elif variance > 0.9:
        text = "posterior variance is close to the prior's: most units carry little; train longer or lower beta"
    elif sharpness < 0.5:
        text = "the latent is in use; the VAE's images are smooth: a Gaussian decoder averages what z lacks (yet)"
    else:
        text = "the latent is in use and the VAE's images are not overly smooth"
    return {"images": len(mu), "active_units": active, "latent_dim": mu.shape[1], "posterior_variance": variance,
            "conclusion": text}


def check_start(diffusion, x_hat, real):
    """Whether refinement begins early enough to correct what is wrong with x_hat, uint8 (N, 3, H, W). At its start, the
    noise should hide the VAE's error, `real` - x_hat. With x_t = a x0 + sigma eps, where a and sigma are x0_scale and
    eps_scale, the noise has the standard deviation sigma / a relative to the image. It should be at least six times the
    error's (a rule of thumb)."""
    residual_sd = float((to_float(real) - to_float(x_hat)).std())
    times = float(diffusion.eps_scale[diffusion.start] / diffusion.x0_scale[diffusion.start]) / residual_sd
    text = "early enough" if times >= 6 else (
        "too late, since it should be 6 times or more: train the VAE longer, or raise `start` (--set)")
    return {"start": diffusion.start, "residual_sd": residual_sd, "times": times, "conclusion":
            f"refinement begins at t = {diffusion.start}, with noise {times:.1f} times the VAE's error: {text}"}


@torch.no_grad()
def bits_per_dim(model, latent_prior, setup):
    """A bound on -log p(x) of held-out images, in bits per pixel value, and its parts. With z ~ q(z | x) and x_hat =
    Dec(z) they are
        kl          log q(z | x) - log p(z), under the model's prior over z of the name `latent_prior`
        prior       KL(q(x_start given the image) || p(x_start given x_hat)), where x_start is the noisy image with
                    which sampling begins; p is pure noise if sampling begins with that
        diffusion   the sum of the KLs of all steps, estimated from a few of them
        data        -log of the probability of the pixels after the last step
    The last three are those of common.diffusion_nats. --temperature has no influence: here the noise of x_start is not
    scaled."""
    evaluation = setup.evaluation
    gen = generator(common.SEEDS["bits_per_dim"] + setup.train["seed"], model.device)
    images = setup.test.images[: evaluation["bits_images"]].to(model.device)
    parts, x_hat, z = {}, None, None
    with common.autocast(model.device, model.reduced):
        if model.vae is not None:
            mu, logvar = model.vae.encoder(to_float(images))
            z = common.reparameterise(mu, logvar, randn(mu.shape, gen))
            x_hat = model.vae.decoder(z)
            log_q = common.gaussian_log_prob(z, mu, logvar).cpu()
            parts["kl"] = log_q - model.priors[latent_prior].log_prob(z.cpu()).cpu()
        denoise = model.denoiser_for(x_hat, z, clean=x_hat)
        parts |= common.diffusion_nats(model.diffusion, denoise, images, x_hat, evaluation["bits_draws"], gen)
    # One bit per pixel value ("bits per dimension") is this many nats per image.
    nats_per_bpd = images[0].numel() * math.log(2)
    means = {name: float((value / nats_per_bpd).mean()) for name, value in parts.items()}
    return {"bound": mean_score(sum(parts.values()) / nats_per_bpd), "images": len(images),
            "latent_prior": latent_prior, **means}


def rounded(x, digits):
    """A number as text with so many significant digits: with 3, 2.5 becomes 2.50. No digit before the point is lost:
    1234.6 becomes 1,235."""
    if abs(x) >= 10**digits - 0.5:
        return f"{x:,.0f}"
    return f"{x:#.{digits}g}".rstrip(".")  # the # keeps zeros at the end, and the point of "250."


def show(score):
    """A score as text: value [low, high]."""
    interval = f" [{rounded(score['low'], 3)}, {rounded(score['high'], 3)}]" if score["low"] is not None else ""
    return f"{rounded(score['value'], 3)}{interval}"


def print_results(finished, setup):
    """Print the rows of all metrics, {folder: metrics}, as one table, and the paths of pictures and files."""
    suffix = setup.extractor.suffix
    names = [setup.fd_key, *(name + suffix for name in ("floor", "is", "precision", "recall")), "hf_energy"]
    table = [["variant", "prior", "sampler", "images", "sec/image", *names]]
    for metrics in finished.values():
        for row in metrics["rows"]:
            table.append([metrics["run"]["variant"], row["prior"], f"{row['sampler']} {row['steps']}",
                          str(row["n_generated"]), f"{row['seconds_per_image']:.3g}",
                          *(show(row[name]) for name in names)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"\nfeatures: {setup.extractor.name}; data: {setup.data.name} ({setup.data.note}); intervals: 95%, "
          "over the draw of images, not over trainings; compare scores of equally many images (with fewer than "
          f"{10 * setup.extractor.dim:,} the distance is far too high)")
    for folder in finished:
        print("\n".join(str(path) for path in sorted(folder.glob("*.png")) + [folder / "metrics.json"]))


# ---- 7. Training and examining a local network -----------------------------------------------------------------------

PSEUDO_CLASSES = 20  # clusters of features that stand for classes where there are no labels (our choice)
# How many images are seen in training, which then takes 5 to 25 minutes on two CPU cores. (Each image is seen about 100
# times at most.)
IMAGES_SEEN = {"cifar10": 800_000}
IMAGES_SEEN_OF_OTHERS = 200_000


def augment(x, gen, crop=False):
    """A random view of each float image of x (B, 3, S, S): mirrored or not, and shifted by up to an eighth of its side.
    With `crop`, in place of the shift, a square of 25 to 100% of the area, enlarged, with jitter of colour, contrast
    and brightness (its strengths were found by trying). No view is noisy or blurred (except by enlarging), since the
    features must not ignore noise and blur."""
    def draw(low, high):  # uniform, a number for each image: (B, 1, 1, 1)
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=gen)
    # grid_sample counts from -1 to 1 along each side. A view reads at (mirror * scale * x + dx, scale * y + dy).
    # `scale` is the side of the view, as a share of the image's: the root of its share of the area.
    scale = draw(0.25, 1).sqrt() if crop else torch.ones(len(x), 1, 1, 1)
    reach = 1 - scale if crop else torch.full_like(scale, 0.25)  # the largest shift; 0.25 is an eighth of 2
    pixel = 2 / x.shape[-1]
    dx = (draw(-1, 1) * reach / pixel).round() * pixel  # by whole pixels, so that a shift does not blur
    dy = (draw(-1, 1) * reach / pixel).round() * pixel
    mirror, zero = torch.where(draw(0, 1) < 0.5, -1.0, 1.0), torch.zeros_like(scale)
    # For each image the matrix with the rows (mirror * scale, 0, dx) and (0, scale, dy).
    entries = [entry.flatten() for entry in (scale * mirror, zero, dx, zero, scale, dy)]  # each (B,)
    theta = torch.stack(entries, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # (B, S, S, 2)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if crop:
        grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)
        x = grey + (x - grey) * draw(0.4, 1.6)  # colour
        x = mean + (x - mean) * draw(0.6, 1.4) + draw(-0.3, 0.3)  # contrast and brightness
    return x


def contrastive_loss(u, v, temperature=0.2):
    """NT-Xent (SimCLR, Chen et al. 2020, eq. 1) of u and v (B, D), two views of the same B images, in nats per view. It
    is the cross-entropy of finding a view's other view among all other views, by cosine similarity."""
    z = F.normalize(torch.cat([u, v]).float())  # (2B, D)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(u)))  # view i must find view i + B or i - B


def train_network(data):
    """Train a LocalNet on a common.ImageData and return it, in eval mode. With labels the loss is cross-entropy, plus
    the squared error of a regression of the true factors where these are known (shapes), so that features hold more
    than the class. Without labels the loss is contrastive, and clusters of features become the classes."""
    torch.manual_seed(0)  # the initial weights
    gen, cpu = generator(0), torch.device("cpu")
    images, labels, factors = data.images, data.labels, data.factors
    classes = PSEUDO_CLASSES if labels is None else int(labels.max()) + 1
    net = LocalNet(classes, 32 if images.shape[-1] <= 32 else 64).to(memory_format=common.memory_format(cpu))
    # A second head on the features, for training only: it regresses the factors or, without labels, is SimCLR's
    # projection. (With labels alone it is made all the same, and its output is not used.)
    if factors is not None:
        extra_head = nn.Linear(net.dim, factors.shape[1])
    else:
        extra_head = nn.Sequential(nn.Linear(net.dim, 128), nn.ReLU(), nn.Linear(128, net.dim))
    batch = min(256, len(images))
    images_seen = min(IMAGES_SEEN.get(data.name, IMAGES_SEEN_OF_OTHERS), 100 * len(images))
    steps = math.ceil(images_seen / batch)
    # Random orders of all images, one after another, are cut into batches.
    epochs = [torch.randperm(len(images), generator=gen) for _ in range(math.ceil(steps * batch / len(images)))]
    batches = torch.cat(epochs)[:steps * batch].view(steps, batch)  # indices of images
    # Found by trying, near known recipes (SimCLR: 0.3 for a batch of 256).
    if labels is None:
        peak_rate = 0.2
    elif factors is None:
        peak_rate = 0.4
    else:
        peak_rate = 0.1  # regressions diverge above it
    # The schedule overwrites rate and momentum in every step.
    parameters = [*net.parameters(), *extra_head.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_rate, steps)

    for index in tqdm(batches, desc=f"local features of {data.name}", unit="step"):
        x = to_float(images[index])  # (B, 3, S, S)
        if labels is None:
            x = torch.cat([augment(x, gen, crop=True), augment(x, gen, crop=True)])  # (2B, 3, S, S)
        elif factors is None:  # where factors are known, a shift or a flip would change them
            x = augment(x, gen)
        features = net.body(x.contiguous(memory_format=common.memory_format(cpu)))  # (B, d), or (2B, d) of two views
        outputs = extra_head(features)
        if labels is None:
            loss = contrastive_loss(*outputs.chunk(2))
        else:
            loss = F.cross_entropy(net.head(features), labels[index], label_smoothing=0.1)
            if factors is not None:
                loss = loss + F.mse_loss(outputs, factors[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    if labels is None:
        # k-means. Each cluster stands for a Gaussian with its centre c as mean and the covariance I. In the logarithm
        # of its density at x, only x.c - |c|^2 / 2 differs between clusters. So these are the logits.
        from scipy.cluster.vq import kmeans2
        features = extract(net, images)[0].double().numpy()
        centres = torch.from_numpy(kmeans2(features, classes, minit="++", seed=0)[0]).float()  # (K, d)
        net.head.weight.data, net.head.bias.data = centres, -centres.square().sum(1) / 2
    return net.eval()


def examine(extractor, train, test):
    """What an extractor's numbers mean: a dict, for the JSON beside its weights, measured on held-out images. `train`
    and `test` are common.ImageData. The keys of "noise" are in units of the pixel range, those of "blur" in pixels.

    With a good network, fd grows with noise and with blur, and that of half the classes is far above the floor."""
    from scipy.ndimage import gaussian_filter
    gen, images = generator(0), test.images.float()
    ref = make_reference(extractor, train.images)
    features, logits = extract(extractor, test.images)
    classes = logits.argmax(1) if test.labels is None else test.labels

    def fd(x):  # of features (N, d)
        return frechet_distance(moments(x), ref.stats)
    def fd_of_images(x):  # float (N, 3, H, W), 0 to 255
        return fd(extract(extractor, x.round().clamp(0, 255).byte())[0])

    report = {"extractor": extractor.name, "classes": extractor.classes, "note": train.note,
              "n_train": len(train.images), "n_test": len(images)}
    if test.labels is None:  # the share of augmented views whose nearest image is the one that they were made from
        views = extract(extractor, to_uint8(augment(to_float(test.images), gen, crop=True)))[0]
        nearest = (F.normalize(views) @ F.normalize(features).T).argmax(1)
        report["retrieval"] = (nearest == torch.arange(len(images))).double().mean().item()
    else:
        report["accuracy"] = (logits.argmax(1) == classes).double().mean().item()
    report["floor"] = fd(features)
    report["noise"] = {sd: fd_of_images(images + 255 * sd * torch.randn(images.shape, generator=gen))
                       for sd in (0.02, 0.05, 0.1, 0.2, 0.4)}
    report["blur"] = {sd: fd_of_images(torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sd, sd))))
                      for sd in (0.5, 1, 2, 4)}
    report["sample_size"] = {n: fd(features[:n]) for n in (100, 250, 500, 1000, 2000, 4000) if n <= len(images)}
    half_of_them = features[classes < extractor.classes / 2]  # as if a generator had dropped the other classes
    report["half_the_classes"] = fd(half_of_them) if len(half_of_them) > 1 else None
    # The recall that real images reach: held-out ones take the place of generated ones.
    report["real_recall"] = precision_recall(ref.features[:len(images)], features)[1]
    report["real_is"] = inception_score(logits)[0]
    return report


def train_local(name, data_dir="data"):
    """Make the local network of a data set or a user's own folder, examine it, print the report and store it beside the
    weights. A network that exists is kept, because results depend on it. Then the report is only printed: the stored
    one stays as it was made (another machine's numbers differ a little)."""
    own = name not in DATASETS  # name is the path of a user's own folder
    if own and not Path(name).is_dir():
        fail(f"--train-local {name}: no such folder; give one, or {', '.join(DATASETS)}")
    dataset, data_dir = ("folder", name) if own else (name, data_dir)
    train, test = (common.load_images(dataset, split, data_dir) for split in ("train", "test"))
    home, network_name = place_of_local(dataset, data_dir)
    found = common.find_hashed(home, network_name)
    if found:
        print(f"{name} has a network, {', '.join(map(str, found))}, which is kept and examined; remove it to have "
              "another one trained")
    else:
        save_local(train_network(train), home, network_name)
    extractor = load_extractor("local", dataset, data_dir=data_dir)
    report = json.dumps(examine(extractor, train, test), indent=1)
    print(report)
    if not found:
        path = home / extractor.name.removeprefix("local-")  # without .pt or .json
        common.write(Path(f"{path}.json"), (report + "\n").encode())
        print(f"{path}.pt has the weights, {path.name}.json the report above")
    flags = f"folder --data-dir {shlex.quote(str(data_dir))} --image-size {extractor.size}" if own else dataset
    print(f"next: python stage1_baseline.py --features local --dataset {flags}")


# ---- 8. The command --------------------------------------------------------------------------------------------------

def read_folder(folder, flag, count=None, largest=None):
    """The images below a folder, or a seeded choice of `count`. Returns
        images  uint8 (N, 3, H, W), or a list if they differ in size
        sizes   the set of sizes (height, width) that they have in their files
        jpeg    whether most of the files are JPEG
    Photographs would fill the memory. So an image of which both sides are longer than `largest`, if that is given,
    becomes a square of that size, just as common.decode_file makes it. The program ends with an error that names `flag`
    if there are too few images."""
    files, needed = find_images(folder), count or 2
    if len(files) < needed:
        fail(f"{flag}: found {len(files)} images in {folder} and below, and {needed} are needed")
    files = shuffle(files)[:count]  # all of them, if count is None
    images, sizes = [], set()
    for path in tqdm(files, desc=f"reading {folder}", unit="image"):
        image = read_image(path)
        sizes.add((image.height, image.width))
        if largest and min(image.size) > largest:
            image = ImageOps.fit(image, (largest, largest), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    if len({image.shape for image in images}) == 1:
        images = torch.stack(images)
    jpeg = sum(path.suffix.lower() in (".jpg", ".jpeg") for path in files) > len(files) / 2
    return images, sizes, jpeg


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Scores of generated images against real ones.")
    parser.add_argument("real", nargs="?", metavar="REAL", help=f"{', '.join(DATASETS)} (train split), or a folder")
    parser.add_argument("generated", nargs="?", metavar="GENERATED", help="a folder of generated images")
    parser.add_argument("--features", choices=("inception", "local"), default="local", help="default: local")
    parser.add_argument("--weights", metavar="FILE", help=f"of the features: {INCEPTION_FILE} or NAME-<hash8>.pt")
    parser.add_argument("--count", type=int, metavar="N", help="use N of the generated images, a seeded choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--data-dir", help="where a data set named as REAL lies (default: data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--train-local", metavar="NAME", help="make the local network of a data set or folder")
    parser.error = fail
    args = parser.parse_args(arguments)
    sys.excepthook = common.end_in_a_line  # Ctrl-C ends in one line, without a traceback
    if args.train_local:
        for name, value in vars(args).items():
            if name not in ("train_local", "data_dir") and value != parser.get_default(name):
                flag = str(value) if name in ("real", "generated") else f"--{name}"
                fail(f"--train-local {args.train_local} scores nothing and runs on the CPU; leave {flag} out")
        if args.data_dir and args.train_local not in DATASETS:
            fail(f"--data-dir {args.data_dir}: only for a data set; --train-local {args.train_local} is a folder")
        return train_local(args.train_local, args.data_dir or "data")
    if not args.generated:
        fail("REAL and GENERATED: give two folders, or a data set's name and a folder (see --help)")
    real_is_folder = args.real not in DATASETS
    if not Path(args.generated).is_dir():
        fail(f"GENERATED: no such folder: {args.generated}")
    if real_is_folder and not Path(args.real).is_dir():
        fail(f"REAL: no such folder, nor one of {', '.join(DATASETS)}: {args.real}")
    if real_is_folder and args.data_dir:
        fail(f"--data-dir {args.data_dir}: only for a data set; REAL is a folder")
    real_path, generated_path = Path(args.real).resolve(), Path(args.generated).resolve()
    if real_is_folder and (real_path in generated_path.parents or generated_path in real_path.parents):
        fail(f"REAL {args.real}, GENERATED {args.generated}: one lies in the other, so its images would count twice; "
             "move one of them")
    if args.count is not None and args.count < 2:
        fail(f"--count {args.count}: give 2 or more")
    extractor = load_extractor(args.features, "folder" if real_is_folder else args.real, args.weights,
                               device=common.choose_device(args.device),
                               data_dir=args.real)  # the user's folder; it is not used if REAL is a data set
    # A local network resizes all images to its own size. Inception's features need them as they are.
    largest = extractor.size if args.features == "local" else None
    images, sizes, jpeg = read_folder(
        args.generated, f"--count {args.count}" if args.count else "GENERATED", args.count, largest)
    if real_is_folder:
        real, real_sizes, real_jpeg = read_folder(args.real, "REAL", largest=largest)
        ref = make_reference(extractor, real)
    else:
        data_dir = args.data_dir or "data"
        train, test = (common.load_images(args.real, split, data_dir) for split in ("train", "test"))
        real_sizes, real_jpeg = {tuple(train.images.shape[2:])}, "JPEG" in train.note
        ref = cached_reference(extractor, train, test, Path(data_dir) / "cache")
    if not ref.stats.cov.any():
        fail(f"REAL: all images of {args.real} are alike; give others")
    row, count = scores(extractor, images, ref, progress=True), len(images)
    for folder, found in ((args.generated, sizes), (args.real, real_sizes)):
        if len(found) > 1:
            print(f"warning: images of {folder} differ in size; is something else among them?", file=sys.stderr)
    if len(sizes) == len(real_sizes) == 1 and sizes != real_sizes:
        [(real_height, real_width)] = real_sizes
        [(height, width)] = sizes
        print(f"warning: images of {args.real} have {real_height}x{real_width} pixels, those of {args.generated} "
              f"{height}x{width}; resizing them moves the distance", file=sys.stderr)
    if real_jpeg != jpeg:
        print(f"warning: only {args.generated if jpeg else args.real} is JPEG, which moves the distance",
              file=sys.stderr)
    enough = 10 * extractor.dim  # a rule of thumb
    for folder, number in ((args.generated, count), (args.real, ref.stats.count)):
        if number < enough:
            print(f"warning: {number} images of {folder} are few for {extractor.dim} features, so the distance is too "
                  f"high; {enough} would do", file=sys.stderr)
    held_out = ref.test_logits
    facts = {"real": args.real, "n_real": ref.stats.count, "generated": args.generated, "n_generated": count,
             "features": extractor.name, "classes": extractor.classes,
             "n_floor": 0 if held_out is None else min(count, len(held_out)),
             # of as many images as the floor, since the Inception Score grows with their number
             "real_is": None if held_out is None else inception_score(held_out[:count])[0], "scores": row}
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print("{n_generated:,} images of {generated} against {n_real:,} of {real}, features {features}".format(**facts))
    for key, score in row.items():
        interval = "" if score["low"] is None else f"   95% interval {score['low']:.4f} to {score['high']:.4f}"
        print(f"  {key:18}{score['value']:10.4f}{interval}")
    if held_out is not None:
        print("  floor of {n_floor:,} held-out images; IS of real ones (K = {classes}): {real_is:.3f}".format(**facts))


if __name__ == "__main__":
    main()
