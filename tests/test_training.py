"""Training: a run that was killed and resumed has every bit of one that never was; the primitives by hand; two
processes.

Run as a program, by torchrun, this file is what each of the two processes does: test_training.py FOLDER.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import data_of, expect_error, same, settings
from torch import nn

import common


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def set_clock(patch, now):
    """From here on, now() is the time in seconds."""
    patch.setattr(common, "time", SimpleNamespace(time=now))


def train(folder, seen, killed_at=None):
    """Train a network for eight steps, with all kinds of random draws. The run is killed when it has taken `killed_at`
    steps. `seen` gets (step, images, own gradients, mean gradients, weights) of each."""
    torch.manual_seed(0)
    device, images = common.choose_device("cpu"), data_of(40).train.images
    chosen = settings(batch=8, every=3, net_lr=0.01, net_muon_lr=0.1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Dropout(0.3), nn.Linear(4, 1, bias=False))
    optimizer, average = common.Optimizer(network, chosen, "net"), common.MovingAverage(network, 0.9)
    gen = common.generator(0, f"training, process {common.RANK}", device)
    progress = common.Progress(folder, chosen, 8, gen, network=network, optimizer=optimizer, average=average)
    for step in progress:
        x = common.draw_batch(images, chosen, gen, True)
        loss = (network(x) - common.randn((len(x), 1), gen)).square()
        optimizer.zero_grad()
        loss.mean().backward()
        own = [p.grad.clone() for p in network.parameters()]
        common.average_gradients(network[:2], network[2:])
        optimizer.step(common.rate_factor(step, 8, chosen))
        average.update(step)
        progress.log(loss=loss)
        mean = [p.grad.clone() for p in network.parameters()]
        seen.append((step, x, own, mean, [p.detach().clone() for p in network.parameters()]))
        if step + 1 == killed_at:
            raise KeyboardInterrupt
    return progress.finish(weights=average.weights)


# --- Killed and resumed -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("killed_at,goes_on_from", [(2, 0), (5, 3), (8, 6)])
def test_killed_and_resumed_is_never_stopped(killed_at, goes_on_from, tmp_path, monkeypatch):
    """With a clock by which each row of the log is saved. No step but those after the last row is made again. Weights,
    moving averages, draws and the log have the bits of a run that was never stopped."""
    every_step, seen = [], []
    whole = train(tmp_path / "whole", every_step)
    set_clock(monkeypatch, itertools.count(0, 61).__next__)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", seen, killed_at)
    resumed = train(tmp_path / "run", seen)
    assert [step for step, *_ in every_step] == [*range(8)] and [row["step"] for row in whole["log"]] == [3, 6, 8]
    assert same(seen, every_step[:killed_at] + every_step[goes_on_from:]) and same(resumed, whole)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


def test_minutes(tmp_path, monkeypatch):
    """They are those of the steps before the run was killed and after, and of the checkpoint that it builds on. The
    time in between does not count. A state is saved at most once a minute, at a row of the log."""
    now, chosen, saved, save = [1000.0], settings(every=2), [], common.Progress.save
    set_clock(monkeypatch, lambda: now[0])
    monkeypatch.setattr(common.Progress, "save", lambda progress: saved.append(progress.done) or save(progress))
    for stop_at in (7, None):
        progress = common.Progress(tmp_path, chosen, 9, torch.Generator())
        for step in progress:
            now[0] += 25
            if step == stop_at:
                break
        now[0] += 10_000
    now[0] -= 10_000
    assert saved == [4, 8] and progress.finish({"minutes": 40.0})["minutes"] == pytest.approx(40 + 9 * 25 / 60)


# --- By hand ----------------------------------------------------------------------------------------------------------

def test_log_by_hand(tmp_path):
    """Every row of the log holds the means since the last row, and the last step has a row. What is not logged yet
    holds no graph, whose memory would grow."""
    progress = common.Progress(tmp_path, settings(every=3), 8, torch.Generator())
    weight = torch.ones((), requires_grad=True)
    for step in progress:
        progress.log(loss=weight * torch.tensor([step, step + 2.0]), rate=2.0 * step)
        assert not progress.sums["loss"].requires_grad
    assert progress.finish()["log"] == [{"step": 3, "loss": 2.0, "rate": 2.0}, {"step": 6, "loss": 5.0, "rate": 8.0},
                                        {"step": 8, "loss": 7.5, "rate": 13.0}]


@pytest.mark.parametrize("value,at,row", [(math.nan, 2, 4), (math.inf, 7, 8)])
def test_what_is_not_finite(value, at, row, tmp_path, capsys):
    """One line names the run, what is not finite, and the step of the row. Nothing is saved."""
    def run():
        progress = common.Progress(tmp_path / "run", settings(every=4), 8, torch.Generator())
        for step in progress:
            progress.log(loss=value if step == at else 1.0)

    expect_error(capsys, run, f"run: loss is {value}", f"step {row}")
    assert not (tmp_path / "run").exists()


def test_rate_factor():
    """It rises from above 0, and with `decay` would fall to 0 after the last step."""
    falls, stays = ({"warmup": 10, "decay": decay} for decay in (True, False))
    rates = [common.rate_factor(step, 100, falls) for step in (0, 9, 55, 99, 100)]
    assert rates == pytest.approx([0.1, 1, 0.5, 1 / 90, 0]) and common.rate_factor(99, 100, stays) == 1
    assert common.rate_factor(0, 8, {"warmup": 0, "decay": True}) == 1
    assert 0 < common.rate_factor(4, 5, falls) < 1  # a run that ends while the rate rises


@pytest.mark.parametrize("decay", [0.4, 0.0])
def test_moving_average_by_hand(decay):
    """Its decay is 2/11, 3/12, ..., until that reaches its own. With 0 it is a copy of the weights."""
    network, expected = nn.Linear(1, 1, bias=False), 1.0
    nn.init.ones_(network.weight)
    average = common.MovingAverage(network, decay)
    for step in range(9):
        nn.init.constant_(network.weight, step**2)
        average.update(step)
        share = min(decay, (2 + step) / (11 + step))
        expected = share * expected + (1 - share) * step**2
        assert float(average.weights["weight"]) == pytest.approx(expected)
    assert decay or expected == 64


def test_batches():
    """They are training images, every one of them sooner or later. About half of a batch is mirrored, from left to
    right, if that is asked for."""
    images = data_of(20).train.images
    both = [common.to_float(images), common.to_float(images).flip(3)]
    for flip, least, most in ((True, 90, 166), (False, 0, 0)):
        x = common.draw_batch(images, {"batch": 256}, torch.Generator().manual_seed(0), flip)
        as_it_is, mirrored = ((x[:, None] == kind).flatten(2).all(2) for kind in both)
        assert (as_it_is | mirrored).any(1).all() and (as_it_is | mirrored).any(0).all()
        assert least <= mirrored.any(1).sum() <= most


# --- Muon -------------------------------------------------------------------------------------------------------------

def exact_orthogonalise(matrix):
    """The quintic of Jordan et al. applied five times to the singular values of an SVD in float64."""
    u, x, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return u * x @ v


@pytest.mark.parametrize("shape", [(40, 40), (24, 96), (96, 24), (1, 9)])
def test_orthogonalise_keeps_directions(shape):
    """All singular values become 0.67 to 1.21, whatever the scale of each matrix and the spread of its singular values.
    The result is close to U V^T. Zero stays zero."""
    u, v = (torch.linalg.qr(normal(n, min(shape), seed=n))[0] for n in shape)
    spreads = [u * torch.logspace(0, -math.log10(spread), min(shape)) @ v.T for spread in (1, 30, 100)]
    *found, zero = common.orthogonalise(torch.stack([1e-3 * spreads[0], spreads[1], 1e3 * spreads[2], 0 * spreads[0]]))
    assert torch.equal(zero, torch.zeros(shape))
    for one, exact in zip(found, spreads, strict=True):
        assert torch.allclose(one.double(), exact_orthogonalise(exact), atol=2e-3)
        values = torch.linalg.svdvals(one)
        assert 0.67 < values.min() and values.max() < 1.21 and torch.linalg.matrix_norm(one - u @ v.T, 2) < 0.33


@pytest.mark.parametrize("muon_lr", [0.1, 0.0])
def test_optimizer_by_hand(muon_lr):
    """Two steps with known gradients, at half the rates. The weights of the convolution, as a matrix (out, in k k), and
    of the linear layers, two of which have one shape, follow the orthogonalised Nesterov momentum, multiplied by
    sqrt(out / in) where that is above 1. Adam moves the biases, and without Muon all parameters."""
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "a": nn.Linear(5, 20), "b": nn.Linear(5, 20)})
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients = [{name: normal(*p.shape, seed=10 * i + k) for k, (name, p) in enumerate(expected.items())}
                 for i in range(2)]
    optimizer = common.Optimizer(net, {"net_lr": 0.01, "net_muon_lr": muon_lr}, "net")
    scales = {"conv.weight": 1, "a.weight": 2, "b.weight": 2} if muon_lr else {}  # 2 = (20 / 5)^(1/2)
    by_adam = [name for name in expected if name not in scales]
    adam = torch.optim.Adam([expected[name] for name in by_adam], lr=0.005)
    for gradient in gradients:
        for name, p in net.named_parameters():
            p.grad = gradient[name].clone()
        optimizer.step(0.5)
        for name in by_adam:
            expected[name].grad = gradient[name]
        adam.step()
    for name, scale in scales.items():
        first, second = (gradient[name] for gradient in gradients)
        average = 0.05 * first, 0.95 * 0.05 * first + 0.05 * second
        for update in (0.05 * first + 0.95 * average[0], 0.05 * second + 0.95 * average[1]):
            expected[name] -= 0.05 * scale * exact_orthogonalise(update.flatten(1)).view(update.shape)
    for name, p in net.named_parameters():
        assert torch.allclose(p.detach(), expected[name], atol=2e-4, rtol=0), name


# --- Two processes ----------------------------------------------------------------------------------------------------

def test_two_processes(tmp_path):
    """Each has half of a batch, with images of its own. The gradients are the means of both, so the networks stay
    equal. Nothing but the checkpoint stays."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(common.__file__).parent)}
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


def be_one_of_two(folder):
    seen = []
    train(folder, seen)
    for _, x, own, mean, weights in seen:
        others = [[None, None] for _ in range(3)]
        for both, part in zip(others, (x, own, weights), strict=True):
            torch.distributed.all_gather_object(both, part)
        images, gradients, networks = others
        assert len(x) == 4 and not torch.equal(*images) and same(*networks)
        assert all(torch.allclose((a + b) / 2, c, atol=1e-7) for a, b, c in zip(*gradients, mean, strict=True))
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]


if __name__ == "__main__":
    be_one_of_two(Path(sys.argv[1]))
