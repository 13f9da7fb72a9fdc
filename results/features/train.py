"""Makes results/features/shapes.pt, the feature network that scores the built-in shapes.

    python results/features/train.py

It learns to tell the six shapes, and the numbers that an image was drawn from, so its features hold place, colour and
texture. There is no augmentation: a shift or a flip would change these numbers. It takes 5 minutes on two CPU cores.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common  # noqa: E402
import fid  # noqa: E402


def train(data, images_seen=200_000, batch=256):
    """Train a fid.LocalNet on a common.ImageData with labels and factors. Returns it, in evaluation mode."""
    torch.manual_seed(0)  # the initial weights
    gen = common.generator(0, "features")
    net = fid.LocalNet().to(memory_format=torch.channels_last)
    factors = (data.factors - data.factors.mean(0)) / data.factors.std(0)  # so that all count alike
    regression = nn.Linear(net.dim, factors.shape[1])  # a second head, for training only
    steps = math.ceil(images_seen / batch)
    optimizer = torch.optim.SGD([*net.parameters(), *regression.parameters()], lr=0.1, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    for _ in common.bar(range(steps), unit="step"):
        index = torch.randint(len(data.images), (batch,), generator=gen)
        features, logits = net(data.images[index])
        loss = (F.cross_entropy(logits, data.labels[index], label_smoothing=0.1)
                + F.mse_loss(regression(features), factors[index]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


if __name__ == "__main__":
    common.save_state(fid.LOCAL, {"state": common.half(train(common.load_data("shapes").train).state_dict())})
    print(fid.LOCAL)
