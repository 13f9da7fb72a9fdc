"""Scores for generated images: Frechet distance (FID), Inception Score, KID, precision and recall, diversity.

The claim: two sets of images are alike if a trained network's features of them are. Each image becomes a vector (2048
numbers from the Inception network of 2015, or 64 from a small network trained on the data set at hand), and every
score compares the two clouds of vectors. The Frechet distance takes each for a Gaussian (Heusel et al. 2017):

    FD = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)            (FID only with Inception's features)

Three habits keep it honest. One pipeline for both sides: uint8 in, the network's own resize and scale, float64 moments.
The floor: FD is biased upward by about C (1/N1 + 1/N2), so what as many held-out real images score stands beside it.
An interval: the jackknife, from the scores without a twentieth of the images each. (A percentile bootstrap would add
the bias a second time and miss the score.)

    python fid.py REAL GENERATED          two folders, or a data set's name (shapes, cifar10, celeba64) and a folder
    python fid.py cifar10 samples --features inception --count 10000 --json
    python fid.py --train-local FOLDER    makes a local feature network: minutes on two CPU cores (cifar10: 17)

Contents: 1 small things every file uses, 2 Inception, 3 the local network, 4 features and their moments, 5 scores,
6 the reference and a row of scores, 7 training the local network, 8 the command. 7 and 8 import common.py for its data.
"""

import argparse
import contextlib
import glob
import hashlib
import io
import json
import math
import os
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

FEATURES_DIR = Path(__file__).resolve().parent / "results" / "features"
RANK = int(os.environ.get("RANK", 0))  # this process's number among those that torchrun started
DATASETS = ("shapes", "cifar10", "celeba64")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


# ---- 1. Small things every file uses ---------------------------------------------------------------------------------

def fail(message):
    """Print one line that says what is wrong and what to do, and exit with status 2."""
    print(f"\nerror: {message}", file=sys.stderr)  # below a progress bar, if one is about
    raise SystemExit(2)


def end_in_a_line(kind, error, trace):
    """For sys.excepthook: Ctrl-C ends in one line, anything else as ever."""
    if issubclass(kind, KeyboardInterrupt):
        tqdm.write("\nstopped; a stage goes on with --resume", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def write(path, data):
    """Write bytes under a temporary name, then rename: a half-written file is never seen. Of several processes only the
    first writes. Fails naming a path that cannot be written; an older file there is then still whole."""
    if RANK > 0:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; free some space there or choose another --out / --data-dir")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def find_images(folder):
    """Image files below a folder, recursively, sorted by their path; hidden ones are left out."""
    found = (path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def read_image(path):
    """An image file as a PIL image in RGB, upright; transparency is dropped. Of 16 bits of grey the upper 8 stay, which
    PIL's own conversion would clip at 255. Fails, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        fail(f"{path}: cannot be read as an image ({error}); replace or remove this file")


def find_hashed(folder, name):
    """The files FOLDER/<name>-<hash8>.pt; `save` wrote them as FOLDER/<name>-*.pt."""
    return sorted(Path(folder).glob(f"{glob.escape(name)}-{'[0-9a-f]' * 8}.pt"))


def save(path, state):
    """Write what torch.save makes of `state`, tensors and plain values; `*` in the name becomes the first eight digits
    of the bytes' sha256. Returns the path."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = path.with_name(path.name.replace("*", hashlib.sha256(buffer.getvalue()).hexdigest()[:8]))
    write(path, buffer.getvalue())
    return path


def load_hashed(found, flag, advice, sha256=None):
    """What the one file in `found` holds, on the CPU. Fails naming `flag` if that is not one, if it cannot be read, or
    if the sha256 of its bytes is not the given one (default: it must begin with the eight digits in its name)."""
    if len(found) != 1:
        fail(f"{flag}: {len(found)} files, one is needed; {advice}")
    try:
        data = found[0].read_bytes()
    except OSError as error:
        fail(f"{flag} {found[0]}: {error.strerror}; {advice}")
    if not hashlib.sha256(data).hexdigest().startswith(sha256 or found[0].stem[-8:]):
        fail(f"{flag} {found[0]}: {len(data):,} bytes, wrong sha256 (cut off, or another file); {advice}")
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def half(weights):
    """{name: tensor} with its matrices in half precision; load_state_dict and GaussianMixture make them float32."""
    return {key: value.half() if value.dim() > 1 else value for key, value in weights.items()}


def autocast(device):
    """bfloat16 autocast where the hardware has it natively (emulation is slower than float32), else a no-op."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bool(native))


def require_uint8(images):
    """uint8 (B, 3, H, W) as it is, (B, 1, H, W) repeated to three channels; anything else is a ValueError."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}; round floats "
                         "in [-1, 1] by ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)")
    return images.expand(-1, 3, -1, -1)


# ---- 2. Inception (the TensorFlow network of 2015-12-05) and its weights ---------------------------------------------

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # converted by pytorch-fid's author; 95,628,359 bytes
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def change_pool(block, pool):
    """Feed `pool` of a block's input to its pooling branch, in place of what torchvision pools."""
    inputs = []
    block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, arguments: pool(inputs.pop()))


def resize_matrix(size, target):
    """Bilinear interpolation along one axis as in TensorFlow 1: float32 (target, size). Output i is read at
    i * size / target, without antialias; the half-pixel rule of today's libraries would read elsewhere."""
    at = torch.arange(target, dtype=torch.float64) * size / target  # (target,)
    low = at.long()
    near, far = F.one_hot(low, size), F.one_hot((low + 1).clamp(max=size - 1), size)  # (target, size)
    return torch.lerp(near.double(), far.double(), (at - low)[:, None]).float()


class InceptionV3(nn.Module):
    """uint8 (B, 3, H, W) -> pool3 (B, 2048), logits (B, 1008) without bias (the Inception Score's). In eval mode.
    torchvision's layers with four differences: average pools do not count the padding, the last block pools by maximum,
    there are 1008 classes, and no auxiliary head."""

    suffix, dim, classes, batch, name = "", 2048, 1008, 32, "inception"

    def __init__(self):
        super().__init__()
        from torchvision.models import Inception3  # here, as it takes a second and few need it
        average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        for name, layer in Inception3(1008, aux_logits=False, init_weights=False).named_children():
            self.add_module(name, layer)  # in the order of use, by the names in the file of weights
            if hasattr(layer, "branch_pool"):
                change_pool(layer, maximum if name == "Mixed_7c" else average)
        self.to(memory_format=torch.channels_last).eval()

    def forward(self, images):
        x = require_uint8(images).float()
        rows, columns = (resize_matrix(side, 299).to(x.device) for side in x.shape[2:])
        x = (rows @ x @ columns.T - 128) / 128  # (B, 3, 299, 299)
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in [*self.children()][:-2]:  # all but dropout and fc
            x = layer(x)
        return x.flatten(1), x.flatten(1) @ self.fc.weight.T


def load_inception(weights=None):
    """The network with the published weights: from `weights`, else $FID_INCEPTION_WEIGHTS, else pytorch-fid's cache,
    which a download fills. Fails if they cannot be had or are not the published bytes: a bad download is not kept."""
    advice = f"fetch {INCEPTION_URL} and name it with --weights or FID_INCEPTION_WEIGHTS, or use --features local"
    cache = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    path = Path(weights or os.environ.get("FID_INCEPTION_WEIGHTS") or cache)
    if path == cache and not cache.is_file():
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(cache), hash_prefix=INCEPTION_SHA256)
        except Exception as error:  # no network, cut off, another file, a full disk: the remedy is the same
            fail(f"--weights {cache}: no such file, and no download ({error}); {advice}")
    state, net = load_hashed([path], "--weights", advice, INCEPTION_SHA256), InceptionV3()
    net.load_state_dict(net.state_dict() | state)  # it may lack batch counts
    net.name = f"inception-{INCEPTION_SHA256[:8]}"
    return net


# ---- 3. The local network: features for one data set, trained on it (section 7) --------------------------------------

def conv_bn(inputs, outputs, stride=1):
    """3x3 convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU()))


class Residual(nn.Sequential):
    """x + what its layers make of x."""

    def forward(self, x):
        return x + super().forward(x)


class LocalNet(nn.Module):
    """Small residual network: uint8 (B, 3, H, W) -> features (B, 64), logits (B, K). 0.7M parameters, 0.1 GFLOP.

    Pixels enter as x / 127.5 - 1 at `size` (32, or 64 with a stride-2 stem); of other sizes the centred square, resized
    with antialias, as a stage reads a folder.
    Every feature has mean 0 and variance about 1 over the training set: that is the unit of its Frechet distances.
    """

    suffix, dim, batch = "_local", 64, 256

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
        x = require_uint8(images).float() / 127.5 - 1
        if x.shape[2:] != (self.size, self.size):
            side = min(x.shape[2:])
            top, left = ((full - side) // 2 for full in x.shape[2:])
            x = x[:, :, top:top + side, left:left + side]
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.body(x.contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


def save_local(net, name, folder=None):
    """Write FEATURES_DIR/<name>-<hash8>.pt, matrices in half precision (1.4 MB). Returns its path. `folder`: the whole
    path of the images it was trained on, if they are no data set's."""
    state = {"classes": net.classes, "size": net.size, "folder": folder, "state": half(net.state_dict())}
    return save(FEATURES_DIR / f"{name}-*.pt", state)


def load_extractor(kind, dataset, weights=None, device="cpu", data_dir="data"):
    """The feature network `inception` or `local`, in eval mode, with name, suffix, dim, classes: uint8 (B, 3, H, W) ->
    features (B, dim), logits (B, classes). A local one belongs to a data set, or to a folder, found by its name.
    Fails, naming the flag and the place, if its weights cannot be had, or are of another folder of that name."""
    if kind == "inception":
        return load_inception(weights).to(device)
    if dataset == "folder" and not find_images(data_dir):
        fail(f"{data_dir}: found 0 images there; name the folder of your images, in a stage with --data-dir")
    name = Path(data_dir).resolve().name if dataset == "folder" else dataset
    found = [Path(weights)] if weights else find_hashed(FEATURES_DIR, name)
    others = ", ".join(path.name for path in sorted(FEATURES_DIR.glob("*.pt"))) or "none"
    advice = (f"name one with --weights (there are {others} in {FEATURES_DIR}), or make it: python fid.py "
              f"--train-local {data_dir if dataset == 'folder' else dataset}")
    flag = "--weights" if weights else f"--features local, {FEATURES_DIR / name}-<hash8>.pt"
    stored = load_hashed(found, flag, advice)
    if "classes" not in stored:
        fail(f"--weights {found[0]}: not a local feature network; {advice}")
    if dataset == "folder" and not weights and stored.get("folder") != str(Path(data_dir).resolve()):
        owner = stored.get("folder") or "a data set"
        fail(f"--features local: {found[0].name} was trained on {owner}, not on {data_dir}; rename your folder to "
             "train one on it, or name that file with --weights")
    net = LocalNet(stored["classes"], stored["size"])
    net.load_state_dict(stored["state"])
    net.name = f"local-{found[0].stem}"
    return net.to(device, memory_format=torch.channels_last).eval()


# ---- 4. Features of many images, and their moments -------------------------------------------------------------------

@torch.no_grad()
def extract(extractor, images, batch_size=None, progress=False):
    """uint8 (N, 3, H, W), or a list of (3, H, W) of several sizes (then one by one) -> features (N, d), logits (N, K),
    float32 on the CPU. The batch size changes nothing but speed."""
    parts, device = [], next(extractor.eval().parameters()).device
    batches = [x[None] for x in images] if isinstance(images, list) else images.split(batch_size or extractor.batch)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # with TF32 the batch size would matter
        for batch in tqdm(batches, desc=f"features ({extractor.name})", unit="batch", disable=not progress):
            parts.append([y.cpu() for y in extractor(batch.to(device))])
    features, logits = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(logits)


@dataclass
class Moments:
    """Of features (N, d): their number, mean (d,) and covariance (d, d) with ddof 1; float64."""

    count: int
    mean: torch.Tensor
    cov: torch.Tensor

    @cached_property
    def root(self):
        """(d, k) with root @ root.T = cov, without the eigenvalues that are only rounding error."""
        values, vectors = torch.linalg.eigh(self.cov)
        real = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
        return vectors[:, real] * values[real].sqrt()


def moments(features):
    """The Moments of features (N, d), about their own mean, so that an offset costs no digits."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
    x = features.double()
    mean = x.mean(0)
    x = x - mean
    return Moments(len(x), mean, x.T @ x / (len(x) - 1))


# ---- 5. Scores -------------------------------------------------------------------------------------------------------

CHUNK = 512  # rows of a matrix of pairs that are in memory at a time


def frechet_distance(a, b):
    """Frechet distance of two Moments, squared feature units, at least 0. tr (S_1 S_2)^(1/2) is the sum of
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


def inception_score(logits, splits=10, seed=2020):
    """exp(mean KL(p(y|x) || p(y))) over `splits` parts of logits (N, K): mean, standard deviation (ddof 0) (Salimans et
    al. 2016). Shuffled first, as torch-fidelity does (seed=None: not): sorted samples would have one class per part."""
    logits = logits if seed is None else shuffle(logits, seed)
    count, splits, values = len(logits), min(splits, len(logits)), []
    for i in range(splits):
        log_p = logits[i * count // splits:(i + 1) * count // splits].double().log_softmax(1)  # (n, K)
        marginal = log_p.exp().mean(0)  # (K,)
        values.append(((log_p.exp() * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()).exp())
    values = torch.stack(values)  # (splits,)
    return values.mean().item(), values.std(correction=0).item()


def pair_means(kernel, x, y=None):
    """For each row i of x (M, d), the mean of kernel(x_i, y_j) over all rows j of y (N, d), or of kernel(x_i, x_j) over
    j != i: (M,), float64."""
    a, b, sums = x.double(), (x if y is None else y).double(), []
    for i in range(0, len(a), CHUNK):
        values = kernel(a[i:i + CHUNK], b)  # (CHUNK, N)
        if y is None:
            values[:, i:i + CHUNK].fill_diagonal_(0)
        sums.append(values.sum(1))
    return torch.cat(sums) / (len(b) - int(y is None))


def cubic(x, y):
    """KID's kernel (x.y / d + 1)^3: (M, d), (N, d) -> (M, N)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def distances(x, y):
    """(M, d), (N, d) float64 -> (M, N); what is only rounding error becomes 0, so that duplicates are recognised."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = torch.addmm(scale, x, y.T, alpha=-2)
    return squares.masked_fill_(squares < 1e-12 * scale, 0).sqrt_()


def kid(real, generated, subsets=100, size=1000, seed=2020):
    """Kernel Inception Distance (Binkowski et al. 2018) of features (N, d): unbiased MMD^2 with the cubic kernel, so it
    may be negative. Mean over random subsets of `size`, drawn as torch-fidelity does; size=None: all pairs."""
    if size is not None and size > min(len(real), len(generated)):
        raise ValueError(f"KID subsets of {size} need as many images on each side, not {len(real)}, {len(generated)}")
    random, values = np.random.RandomState(seed), []
    for _ in range(subsets if size else 1):
        x, y = (z[random.choice(len(z), size, replace=False)] if size else z for z in (real, generated))
        values.append(pair_means(cubic, x).mean() + pair_means(cubic, y).mean() - 2 * pair_means(cubic, x, y).mean())
    return torch.stack(values).mean().item()


def precision_recall(real, generated, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, d): the share of generated images inside
    some real image's ball, which reaches to its k-th nearest other; and the reverse. Both depend on N: take equal N."""
    if k >= min(len(real), len(generated)):
        raise ValueError(f"precision and recall with k={k} need more than {k} images on each side")

    def covered(x, centres):  # the (k+1)-th smallest distance counts the image itself; the margin counts ties as inside
        reach = torch.cat([distances(part, centres).kthvalue(k + 1)[0] for part in centres.split(CHUNK)])
        inside = [(distances(part, centres) <= reach * (1 + 1e-9)).any(1) for part in x.split(CHUNK)]
        return torch.cat(inside).double().mean().item()

    real, generated = real.double(), generated.double()
    return covered(generated, real), covered(real, generated)


def diversity(real, generated):
    """Mean feature distance between two generated images over that between two real ones: 1 is right, 0 is collapse."""
    return (pair_means(distances, generated).mean() / pair_means(distances, real).mean()).item()


GROUPS, T_95 = 20, 2.093024  # jackknife groups, and Student's t for 95% at 19 degrees of freedom


def jackknife(score, x):
    """score(x), a number, with a 95% interval: {"value", "low", "high"}. From the scores without rows g, g + 20, ... of
    x (N, ...), for each of 20 groups g. It tells what another draw of the images could change (not another
    training). With fewer than two rows per group nothing is left out: low and high are None."""
    value, group = score(x), torch.arange(len(x)) % GROUPS
    if len(group) < 2 * GROUPS:
        return {"value": value, "low": None, "high": None}
    left = np.array([score(x[group != g]) for g in range(GROUPS)])
    half = T_95 * math.sqrt((GROUPS - 1) / GROUPS * np.square(left - left.mean()).sum())
    return {"value": value, "low": value - half, "high": value + half}


def jackknife_pairs(value, own):
    """The jackknife of a mean over pairs of images, to first order and without computing a pair again: rows left out
    move it by twice what they move the mean of `own` (N,), each image's mean over its partners (it is quadratic in the
    set of images: each is both sides of its pairs)."""
    return jackknife(lambda x: value + 2 * (x.mean() - own.mean()).item(), own)


# ---- 6. The reference, and a row of scores with intervals ------------------------------------------------------------

def shuffle(x, seed=0):
    """The rows of a tensor, or the items of a list, in a seeded random order."""
    order = np.random.RandomState(seed).permutation(len(x))
    return [x[i] for i in order] if isinstance(x, list) else x[torch.from_numpy(order)]


@dataclass
class Reference:
    """What real images look like to an extractor: features (N, d) of the train split and, of held-out images, features
    (M, d) and logits (M, K), or None. Rows are in a random order. `stats`: the train split's Moments."""

    features: torch.Tensor
    test_features: torch.Tensor | None = None
    test_logits: torch.Tensor | None = None

    def __post_init__(self):
        self.stats = moments(self.features)


def make_reference(extractor, train, test=None):
    """The Reference of real uint8 images, each a tensor (N, 3, H, W) or a list."""
    held_out = () if test is None else extract(extractor, shuffle(test), progress=True)
    return Reference(extract(extractor, shuffle(train), progress=True)[0], *held_out)


def reference(extractor, data_train, data_test, cache_dir):
    """make_reference of a data set (common.ImageData, two splits), kept in CACHE_DIR under a name that changes with the
    data set, its crop and every pixel, and with the feature network."""
    train, test, pixels = data_train.images, data_test.images, hashlib.sha256()
    for images in (train, test):
        pixels.update(images.contiguous().numpy().data)
    name = f"{data_train.name}-{data_train.crop}-{len(train)}-{pixels.hexdigest()[:8]}-{extractor.name}.pt"
    path = Path(cache_dir) / name
    with contextlib.suppress(Exception):  # there is none, or it is damaged: made again
        return Reference(*torch.load(path, weights_only=True))
    ref = make_reference(extractor, train, test)
    save(path, [ref.features, ref.test_features, ref.test_logits])
    return ref


def scores(extractor, generated, ref, progress=False):
    """Every score of uint8 images (N, 3, H, W), or a list, against a Reference: {key: {"value", "low", "high"}}.

    Keys: fid (local features: fd), is, kid, precision, recall, diversity, floor, each with the extractor's suffix. KID:
    all pairs below 2,000 images, else 100 subsets of 1,000. Precision, recall: of equal numbers of both; below 4 images
    k = N - 1. Diversity: of at most 2,000. Floor: the Frechet distance of as many held-out real images (or of
    all of them; without any, by formula). Precision, recall and floor have no interval.
    """
    count = len(generated)
    features, logits = (shuffle(x, seed=1) for x in extract(extractor, generated, progress=progress))
    real, few = ref.features[:count], min(count, 2000, len(ref.features))
    real_kid, size = (ref.features[:2000], None) if few < 2000 else (ref.features, 1000)
    precision, recall = precision_recall(real, features[: len(real)], k=min(3, count - 1, len(real) - 1))
    floor = expected_floor(ref.stats, count) if ref.test_features is None else frechet_distance(
        moments(ref.test_features[:count]), ref.stats)
    row = {"fd" if extractor.suffix else "fid": jackknife(
        lambda x: frechet_distance(moments(x), ref.stats), features)}
    row["is"] = jackknife(  # shuffled here, so that its parts stay the same where rows are left out
        lambda x: inception_score(x, seed=None)[0], shuffle(logits, seed=2020))
    # each image's part of the MMD, against its block of some 2,000 and 5,000 real ones: enough for an interval
    own = torch.cat([pair_means(cubic, y) - pair_means(cubic, y, real_kid[:5000])
                     for y in features.tensor_split(max(1, count // 2000))])
    row["kid"] = jackknife_pairs(kid(real_kid, features, size=size), own)
    own = pair_means(distances, features[:few]) / pair_means(distances, real[:few]).mean()
    row["diversity"] = jackknife_pairs(diversity(real[:few], features[:few]), own)
    for key, value in (("precision", precision), ("recall", recall), ("floor", floor)):
        row[key] = {"value": value, "low": None, "high": None}
    return {key + extractor.suffix: score for key, score in row.items()}


# ---- 7. Training and examining a local network -----------------------------------------------------------------------

PSEUDO_CLASSES = 20  # K of `is_local` where there are no labels
IMAGES_SEEN = {"cifar10": 800_000}  # in training; elsewhere 200,000, but each at most 100 times


def augment(x, gen, crop=False):
    """Random views of float images (B, 3, S, S): a shift of up to an eighth and a flip; or (`crop`) 25 to 100% of the
    area, a flip, and jitter of brightness, contrast and colour. No blur or noise as such: features must notice them."""
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
    known, so that features see more than the class), else contrastive."""
    torch.manual_seed(seed)  # the initial weights
    gen = torch.Generator().manual_seed(seed)
    images, labels, factors = data.images, data.labels, data.factors
    classes = PSEUDO_CLASSES if labels is None else int(labels.max()) + 1
    net = LocalNet(classes, 32 if images.shape[-1] <= 32 else 64).to(memory_format=torch.channels_last)
    # thrown away after training: reads the factors off the features, or is SimCLR's projection
    extra = nn.Linear(net.dim, factors.shape[1]) if factors is not None else nn.Sequential(
        nn.Linear(net.dim, 128), nn.ReLU(), nn.Linear(128, net.dim))
    batch = min(batch, len(images))
    steps = math.ceil(min(IMAGES_SEEN.get(data.name, 200_000), 100 * len(images)) / batch)
    epochs = [torch.randperm(len(images), generator=gen) for _ in range(math.ceil(steps * batch / len(images)))]
    optimiser = torch.optim.SGD([*net.parameters(), *extra.parameters()], 0.1, 0.9, nesterov=True, weight_decay=5e-4)
    peak = 0.2 if labels is None else 0.4 if factors is None else 0.1  # regressing factors diverges at higher rates
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps)
    batches = torch.cat(epochs)[:steps * batch].view(steps, batch)
    for index in tqdm(batches, desc=f"local features of {data.name}", unit="step"):
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
    if labels is None:  # k-means; with centres c, x.c - |c|^2/2 are the logits of equal round Gaussians around them
        from scipy.cluster.vq import kmeans2
        features = extract(net, images)[0].double().numpy()
        centres = torch.from_numpy(kmeans2(features, classes, minit="++", seed=seed)[0]).float()  # (K, d)
        net.head.weight.data, net.head.bias.data = centres, -centres.square().sum(1) / 2
    return net.eval()


def examine(extractor, train, test):
    """What an extractor's numbers mean, measured on held-out images: a dict for the JSON beside its weights. Noise is
    in units of the pixel range, blur in pixels."""
    from scipy.ndimage import gaussian_filter
    gen, images = torch.Generator().manual_seed(0), test.images.float()
    ref = make_reference(extractor, train.images)
    features, logits = extract(extractor, test.images)
    classes = logits.argmax(1) if test.labels is None else test.labels

    def fd(x):  # of features (N, d), or of float images (N, 3, H, W) in 0..255
        x = x if x.dim() == 2 else extract(extractor, x.round().clamp(0, 255).byte())[0]
        return frechet_distance(moments(x), ref.stats)

    report = {"extractor": extractor.name, "classes": extractor.classes, "note": train.note, "n_test": len(images)}
    if test.labels is None:  # the share of held-out images that an augmented view finds among all of them
        views = ((augment(images / 127.5 - 1, gen, crop=True) + 1) * 127.5).round().clamp(0, 255).byte()
        found = (F.normalize(extract(extractor, views)[0]) @ F.normalize(features).T).argmax(1)
        report["retrieval"] = (found == torch.arange(len(images))).double().mean().item()
    else:
        report["accuracy"] = (logits.argmax(1) == classes).double().mean().item()
    report["floor"] = fd(features)
    report["noise"] = {sd: fd(images + 255 * sd * torch.randn(images.shape, generator=gen))
                       for sd in (0.02, 0.05, 0.1, 0.2, 0.4)}
    report["blur"] = {s: fd(torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, s, s)))) for s in (0.5, 1, 2, 4)}
    report["sample_size"] = {n: fd(features[:n]) for n in (100, 250, 500, 1000, 2000, 4000) if n <= len(images)}
    half_of_them = features[classes < extractor.classes / 2]
    report["half_the_classes"] = fd(half_of_them) if len(half_of_them) > 1 else None
    repeated = shuffle(features)[:50].repeat(20, 1)
    report["fifty_images_repeated_recall"] = precision_recall(ref.features[:1000], repeated)[1]
    report["real_recall"] = precision_recall(ref.features[:len(images)], features)[1]
    report["real_is"] = inception_score(logits)[0]
    return report


def train_local(name, data_dir="data"):
    """Make the local network of `shapes`, `cifar10`, `celeba64` or a folder; examine it, print the report and store it
    beside it. One that is there is only examined: results are pinned to it."""
    import common
    if name not in DATASETS and not Path(name).is_dir():
        fail(f"--train-local {name}: no such folder; give one, or {', '.join(DATASETS)}")
    dataset, data_dir = (name, data_dir) if name in DATASETS else ("folder", name)
    train, test = (common.load_images(dataset, split, data_dir) for split in ("train", "test"))
    if not find_hashed(FEATURES_DIR, train.name):
        save_local(train_network(train), train.name, str(Path(data_dir).resolve()) if dataset == "folder" else None)
    extractor = load_extractor("local", dataset, data_dir=data_dir)
    path = FEATURES_DIR / extractor.name.removeprefix("local-")
    report = json.dumps(examine(extractor, train, test), indent=1)
    write(Path(f"{path}.json"), (report + "\n").encode())
    flags = f"folder --data-dir {data_dir}" if dataset == "folder" else dataset
    print(f"{report}\n{path}.pt has the weights, {path.name}.json the report above\n"
          f"next: python stage1_baseline.py --features local --dataset {flags}")


# ---- 8. The command --------------------------------------------------------------------------------------------------

def read_folder(folder, flag, count=None):
    """All images below a folder, or a seeded choice of `count`: a list of uint8 (3, H, W), or a tensor if their sizes
    agree; and whether most are JPEG. Fails naming `flag` if there are fewer than two, or than `count`."""
    files = find_images(folder)
    if count is not None and not 2 <= count <= len(files) or len(files) < 2:
        fail(f"{flag}: found {len(files)} images in {folder} and below, and {max(2, count or 0)} are needed")
    files = tqdm(shuffle(files)[:count], desc=f"reading {folder}", unit="image")
    images = [torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1) for path in files]
    jpeg = sum(path.suffix.lower() in (".jpg", ".jpeg") for path in files.iterable) > len(images) / 2
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images, jpeg


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
    parser.add_argument("--train-local", metavar="NAME", help="make the local network of a data set or folder")
    parser.error = fail
    args = parser.parse_args(arguments)
    sys.excepthook = end_in_a_line
    if args.train_local:
        for name, value in vars(args).items():
            if name not in ("train_local", "data_dir") and value != parser.get_default(name):
                fail(f"--train-local {args.train_local} scores nothing and runs on the CPU; leave {name} {value} out")
        return train_local(args.train_local, args.data_dir)
    if not args.generated:
        fail("REAL and GENERATED: give two folders, or a data set's name and a folder (see --help)")
    import common
    named, flag = args.real in DATASETS, "GENERATED" if args.count is None else f"--count {args.count}"
    extractor = load_extractor(args.features, args.real if named else "folder", args.weights,
                               common.choose_device(args.device), args.real)
    images, jpeg = read_folder(args.generated, flag, args.count)
    if named:
        train, test = (common.load_images(args.real, split, args.data_dir) for split in ("train", "test"))
        ref, real_jpeg = reference(extractor, train, test, Path(args.data_dir) / "cache"), "JPEG" in train.note
    else:
        real, real_jpeg = read_folder(args.real, "REAL")
        ref = make_reference(extractor, real)
    row, count = scores(extractor, images, ref, progress=True), len(images)
    if isinstance(images, list):
        print(f"warning: images of {args.generated} differ in size; is something else among them?", file=sys.stderr)
    if real_jpeg != jpeg:
        print(f"warning: only {args.generated if jpeg else args.real} is JPEG, which moves the distance",
              file=sys.stderr)
    if count < 10 * extractor.dim:
        print(f"warning: {count} images are few for {extractor.dim} features, {10 * extractor.dim} would do: read the "
              "distance beside its floor", file=sys.stderr)
    held_out = ref.test_logits
    facts = {"real": args.real, "n_real": ref.stats.count, "generated": args.generated, "n_generated": count,
             "features": extractor.name, "classes": extractor.classes,
             "n_floor": 0 if held_out is None else min(count, len(held_out)),
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
