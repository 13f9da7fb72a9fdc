"""Makes a local feature network, for the scores of fid.py, and examines it.

    python results/features/train.py shapes              or cifar10, celeba64: results/features/NAME.pt and NAME.json
    python results/features/train.py PHOTOS              a folder of your own: data/features/PHOTOS.pt and .json,
                                                         and the --weights to use with the stages

With labels the network learns to tell classes, and of shapes also the numbers that an image was drawn from: so its
features hold place, colour and texture. Without labels it learns by contrast: two random views of an image shall have
similar features, and those of other images shall not. It takes 5 to 25 minutes on two CPU cores.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.ndimage import gaussian_filter
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
import fid  # noqa: E402

CLUSTERS = 20  # clusters of features that stand for classes where there are no labels (our choice)
IMAGES_SEEN = {"cifar10": 800_000}  # in training; of other data 200,000


def augment(x, gen):
    """A random view of each float image of x (B, 3, S, S): mirrored or not, a square of 25 to 100% of its area,
    enlarged, with jitter of colour, contrast and brightness. No view is noisy or blurred (except by enlarging), since
    the features must not ignore noise and blur."""
    def draw(low, high):  # uniform, a number for each image: (B, 1, 1, 1)
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=gen)

    # grid_sample counts from -1 to 1 along each side. A view reads at (mirror * scale * x + dx, scale * y + dy).
    # `scale` is the side of the view, as a share of the image's: the root of its share of the area.
    scale, pixel = draw(0.25, 1).sqrt(), 2 / x.shape[-1]
    dx, dy = ((draw(-1, 1) * (1 - scale) / pixel).round() * pixel for _ in range(2))  # shifts by whole pixels
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(scale)

    # For each image the matrix with the rows (mirror * scale, 0, dx) and (0, scale, dy).
    theta = torch.cat([scale * mirror, zero, dx, zero, scale, dy], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # (B, S, S, 2)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    grey = x.mean(1, keepdim=True)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = grey + (x - grey) * draw(0.4, 1.6)  # colour
    return mean + (x - mean) * draw(0.6, 1.4) + draw(-0.3, 0.3)  # contrast and brightness


def contrastive_loss(u, v, temperature=0.2):
    """NT-Xent (SimCLR, Chen et al. 2020, eq. 1) of u and v (B, D), two views of the same B images, in nats per view. It
    is the cross-entropy of finding a view's other view among all other views, by cosine similarity."""
    z = F.normalize(torch.cat([u, v]).float())  # (2B, D)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(u)))  # view i must find view i + B or i - B


def train(data, name):
    """Train a fid.LocalNet on the training images of a common.ImageData and return it, in evaluation mode."""
    torch.manual_seed(0)  # the initial weights
    gen = common.generator(0, "features")
    images = data.images
    labels = data.labels
    factors = data.factors
    classes = CLUSTERS if labels is None else int(labels.max()) + 1
    net = fid.LocalNet(classes, images.shape[-1]).to(memory_format=torch.channels_last)

    # A second head, for training only, regresses the factors or, without labels, is SimCLR's projection.
    extra_head, peak_rate = nn.Identity(), 0.4  # learning rates were found by trying
    if labels is None:
        extra_head = nn.Sequential(nn.Linear(net.dim, 128), nn.ReLU(), nn.Linear(128, net.dim))
        peak_rate = 0.2
    if factors is not None:
        extra_head = nn.Linear(net.dim, factors.shape[1])
        peak_rate = 0.1
        factors = (factors - factors.mean(0)) / factors.std(0)  # so that all count alike, such as the size of spots
    batch = min(256, len(images))
    steps = math.ceil(min(IMAGES_SEEN.get(name, 200_000), 100 * len(images)) / batch)
    parameters = [*net.parameters(), *extra_head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, steps)
    for _ in tqdm(range(steps), desc=f"features of {name}", unit="step"):
        index = torch.randint(len(images), (batch,), generator=gen)
        x = common.to_float(images[index])  # (B, 3, S, S)
        if labels is None:
            x = torch.cat([augment(x, gen), augment(x, gen)])  # (2B, 3, S, S)
        elif factors is None:  # where factors are known, a shift or a flip would change them
            x = augment(x, gen)
        features = net.body(x.contiguous(memory_format=torch.channels_last))
        if labels is None:
            loss = contrastive_loss(*extra_head(features).chunk(2))
        else:
            loss = F.cross_entropy(net.head(features), labels[index], label_smoothing=0.1)
        if factors is not None:
            loss = loss + F.mse_loss(extra_head(features), factors[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    if labels is None:
        # k-means. Each cluster stands for a Gaussian with its centre c as mean and the covariance I. In the logarithm
        # of its density at x, only x.c - |c|^2 / 2 differs between clusters. So these are the logits.
        centres, _ = kmeans2(fid.extract(net, images)[0].double().numpy(), classes, minit="++", seed=0)
        net.head.weight.data = torch.from_numpy(centres).float()  # (K, d)
        net.head.bias.data = -net.head.weight.data.square().sum(1) / 2
    return net


def examine(net, data):
    """What a network's distance sees, from up to 2,000 held-out images: a dictionary. `noise` is by its standard
    deviation (images span 0 to 1), `blur` by that of the Gaussian, in pixels."""
    images = data.test.images[:2000]
    real = fid.moments(fid.extract(net, data.train.images)[0])

    def fd(changed):  # float (N, 3, H, W), 0 to 255
        features, _ = fid.extract(net, changed.round().clamp(0, 255).byte())
        return fid.frechet_distance(fid.moments(features), real)

    x, gen = images.float(), common.generator(0, "noise")
    report = {"images": len(images), "floor": fd(x),
              "noise": {sd: fd(x + 255 * sd * torch.randn(x.shape, generator=gen)) for sd in (0.02, 0.05, 0.1)},
              "blur": {sd: fd(torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sd, sd)))) for sd in (0.5, 0.7, 1)}}
    if data.test.factors is not None:
        flat, _, _ = common.draw_shapes(4_000, seed=2, flat_spots=True)
        report["spots_replaced_by_their_mean_tone"] = fd(flat[:2000].float())
    return report


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make a local feature network for the scores of fid.py")
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(common.DATASETS)}, or a folder of images")
    parser.add_argument("--data-dir", default="data", help="where cifar10/ or celeba/ lie (default: data)")
    args = parser.parse_args(argv)
    if args.name in common.DATASETS:
        data = common.load_data(args.name, args.data_dir)
        path = fid.FEATURES / f"{args.name}.pt"
    else:
        data = common.load_data("folder", args.name)
        path = Path("data") / "features" / f"{Path(args.name).resolve().name}.pt"
    net = train(data.train, args.name)
    state = {"classes": net.classes, "size": net.size, "state": common.half(net.state_dict())}
    common.save_state(path, state)
    net.load_state_dict(state["state"])  # as it will be loaded
    report = examine(net, data)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(report, f"use it with --weights {path}", sep="\n")


if __name__ == "__main__":
    main()
