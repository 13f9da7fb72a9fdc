"""Training: a run that was killed and resumed has every bit of one that never was; the loop and Muon by hand; two
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
from helpers import CPU, data_of, expect_error, same, settings
from torch import distributed, nn

import common
import stage1_baseline as stage1
import stage2_joint as stage2


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def set_clock(patch, now):
    """From here on, now() is the time in seconds."""
    patch.setattr(common, "time", SimpleNamespace(time=now))


def train_weights(folder, loss, names=("net",), **changes):
    """Train networks of one weight each, which start at 1. `loss(i, *weights)` is the loss of step i, from 0 on. Adam
    moves a weight by about the learning rate, whatever the gradient."""
    networks = {name: nn.Linear(1, 1, bias=False) for name in names}
    for network in networks.values():
        nn.init.ones_(network.weight)
    rates = {"lr": 0.1, "muon_lr": 0.0, "clip": 1e9, "ema": 0.9}
    rates = {f"{name}_{key}": value for name in names for key, value in rates.items()}
    chosen = settings(**{"batch": 2} | rates | changes)
    training = common.Training(folder, chosen, CPU, torch.zeros(9, 1, 1, 1), chosen["unet_steps"], False, **networks)
    for _ in training:
        weights = {name: network.weight.sum() for name, network in networks.items()}
        value = loss(training.steps_taken, *weights.values())
        training.step(value.expand(2), {"loss": value} | weights)
    return training


# --- Killed and resumed -----------------------------------------------------------------------------------------------

DRAWING = {"dropout": 0.2, "vae_flip": True, "unet_flip": True, "every": 3, "batch": 4}  # all kinds of random draws


def train(kind, folder, vae):
    """A real training of 8 steps: of a VAE, of a refiner behind the checkpoint `vae`, or of both together."""
    data, chosen = data_of(60), settings(**DRAWING)
    if kind == "vae":
        return stage1.train_vae(folder, chosen, data, CPU)
    if kind == "augmented":
        return stage1.train_refiner(folder, chosen, kind, vae, data, CPU)
    return stage2.train_joint(folder, chosen, "kendall", "full", data, CPU)


@pytest.fixture(scope="module", params=["vae", "augmented", "kendall"])
def whole(request, tmp_path_factory):
    """A training, the VAE that it builds on, and its checkpoint if it is never stopped."""
    folder = tmp_path_factory.mktemp(request.param)
    vae = train("vae", folder / "vae", None)
    return request.param, vae, train(request.param, folder / "run", vae)


@pytest.mark.parametrize("killed_at,goes_on_from", [(2, 0), (5, 3), (8, 6)])
def test_killed_and_resumed_is_never_stopped(killed_at, goes_on_from, whole, tmp_path, monkeypatch):
    """With a clock by which each row of the log is saved. No step but those after the last row is made again. All
    weights, moving averages, what is fitted to them, and the log have the bits of a run that was never stopped."""
    kind, vae, expected = whole
    taken, step = [], common.Training.step

    def step_and_die(training, loss, terms):
        step(training, loss, terms)
        taken.append(training.steps_taken)
        if len(taken) == killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(common.Training, "step", step_and_die)
    set_clock(monkeypatch, itertools.count(0, 61).__next__)
    with pytest.raises(KeyboardInterrupt):
        train(kind, tmp_path, vae)
    assert not (tmp_path / "checkpoint.pt").exists() and (tmp_path / "unfinished.pt").exists() == (goes_on_from > 0)
    assert same(train(kind, tmp_path, vae), expected)
    assert taken[killed_at:] == [*range(goes_on_from + 1, 9)] and [row["step"] for row in expected["log"]] == [3, 6, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert same(common.load_state(tmp_path / "checkpoint.pt"), expected)


def test_another_seed_agrees_in_no_network(whole, tmp_path, monkeypatch):
    kind, vae, expected = whole
    monkeypatch.setitem(DRAWING, "seed", 1)
    other = train(kind, tmp_path, vae)
    trained = {"vae": ["vae"], "augmented": ["unet"], "kendall": ["vae", "unet", "balance"]}[kind]
    assert not any(same(expected[name], other[name]) for name in trained)


def test_minutes(tmp_path, monkeypatch):
    """They are those of the steps before the run was killed and after, and of the checkpoint that it builds on. The
    time in between does not count. A state is saved at most once a minute, at a row of the log."""
    now, alive, saved, save = [1000.0], [True], [], common.Training.save
    set_clock(monkeypatch, lambda: now[0])
    monkeypatch.setattr(common.Training, "save", lambda training: saved.append(training.steps_taken) or save(training))

    def loss(i, w):
        now[0] += 25
        if i == 7 and alive and alive.pop():
            raise KeyboardInterrupt
        return w

    with pytest.raises(KeyboardInterrupt):
        train_weights(tmp_path, loss, steps=9, every=2)
    now[0] += 10_000
    training = train_weights(tmp_path, loss, steps=9, every=2)
    assert saved == [4, 8]
    assert training.finish({"minutes": 40.0}, extra=3)["minutes"] == pytest.approx(40 + 9 * 25 / 60)


# --- The loop by hand -------------------------------------------------------------------------------------------------

def test_log_by_hand(tmp_path):
    """Every row of the log holds the means since the last row, and the last step has a row. What is not logged yet
    holds no graph, whose memory would grow."""
    step, graphs = common.Training.step, []

    def loss(i, w):
        return 0 * w + i

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Training, "step", lambda training, *how: (step(training, *how), graphs.extend(
            total.requires_grad for total in training.sums.values())))
        training = train_weights(tmp_path, loss, steps=8, every=3)
    rows = [{"step": 3, "loss": 1.0, "net": 1.0}, {"step": 6, "loss": 4.0, "net": 1.0},
            {"step": 8, "loss": 6.5, "net": 1.0}]
    assert training.log == rows and training.finish()["log"] == rows and len(graphs) == 16 and not any(graphs)
    assert train_weights(tmp_path / "short", loss, steps=2, every=3).log == [{"step": 2, "loss": 0.5, "net": 1.0}]


@pytest.mark.parametrize("spoil,at,row", [(lambda w: w * math.nan, 2, 4), (lambda w: w * math.inf, 7, 8),
                                          (lambda w: (0 * w).sqrt(), 2, 4)])
def test_what_is_not_finite(spoil, at, row, tmp_path, capsys):
    """One line names the run, what is not finite, and the step of the row. (The last loss is finite, but its gradient
    is not, and ruins the weights.)"""
    expect_error(capsys, lambda: train_weights(tmp_path / "run", lambda i, w: spoil(w) if i == at else w, every=4),
                 "run: loss is", f"step {row}", "learning rate")
    assert not (tmp_path / "run").exists()


def test_rates_clips_and_averages_by_hand(tmp_path):
    """Each network has its own learning rate (with warm-up and decay), largest norm of its gradient, and moving average
    (with decay 0, a copy of the weights)."""
    training = train_weights(tmp_path, lambda i, a, b: 2 * a + 3 * b, names=("a", "b"), steps=10, every=1, warmup=2,
                             b_lr=0.2, a_clip=0.5, a_ema=0.4, b_ema=0.0)
    shares = [min(1, (i + 1) / 2, (10 - i) / 8) for i in range(10)]  # 0.5, 1, 1, 7/8, ... 1/8
    average, a = 1.0, 1.0
    for n, share in enumerate(shares, 1):
        assert training.log[n - 1]["a"] == pytest.approx(a, abs=1e-5)
        assert training.log[n - 1]["b"] == pytest.approx(2 * a - 1, abs=1e-5)  # b has twice the rate
        a -= 0.1 * share
        average += (1 - min(0.4, (1 + n) / (10 + n))) * (a - average)  # 2/11, 3/12, ... 6/15, 0.4, 0.4
    gradients = [float(network.weight.grad) for network in training.networks.values()]
    assert gradients == pytest.approx([0.5, 3.0], rel=1e-4)
    checkpoint = training.finish(extra="kept")
    assert float(checkpoint["a"]["weight"]) == pytest.approx(average, abs=1e-5) and checkpoint["extra"] == "kept"
    assert torch.equal(checkpoint["b"]["weight"], training.networks["b"].weight.detach())


def test_learning_rate_end_points():
    """The rate rises from above 0. It would fall to 0 after the last step."""
    falls, stays = ({"warmup": 10, "decay": decay} for decay in (True, False))
    rates = [common.learning_rate(2.0, step, 100, falls) for step in (0, 9, 99, 100)]
    assert rates == pytest.approx([0.2, 2, 2 / 90, 0]) and common.learning_rate(2.0, 99, 100, stays) == 2
    assert common.learning_rate(2.0, 0, 8, {"warmup": 0, "decay": True}) == 2
    assert 0 < common.learning_rate(2.0, 4, 5, falls) < 2  # a run that ends while the rate rises


def test_batches(tmp_path):
    """They are training images, every one of them sooner or later. About half of a batch is mirrored, from left to
    right."""
    images = data_of(20).train.images
    x = common.Training(tmp_path, settings(batch=256), CPU, images, 8, True).batch()
    as_it_is, mirrored = ((x[:, None] == kind).flatten(2).all(2)
                          for kind in (common.to_float(images), common.to_float(images).flip(3)))
    assert (as_it_is | mirrored).any(1).all() and (as_it_is | mirrored).any(0).all()
    assert 90 < as_it_is.any(1).sum() < 166


def test_dropout_depends_on_seed_and_step_alone(tmp_path):
    """Whatever else a step draws."""
    def masks(folder, disturb=False, **changes):
        """The masks that the steps of a training draw, (steps, 50). `disturb`: other random numbers are drawn, too."""
        found = []

        def loss(i, w):
            found.append(nn.functional.dropout(torch.ones(50), 0.5))
            torch.rand(7 * disturb)
            return w

        train_weights(folder, loss, steps=6, dropout=0.5, **changes)
        return torch.stack(found)

    first = masks(tmp_path / "a")
    assert torch.equal(masks(tmp_path / "b", disturb=True), first)
    assert len(torch.cat([first, masks(tmp_path / "c", seed=1)]).unique(dim=0)) == 12


@pytest.mark.parametrize("scale", [0.3, torch.tensor(-2.0), 0])
def test_scale_gradient(scale):
    x = normal(4).requires_grad_()
    y = common.scale_gradient(x, scale)
    (y**3).sum().backward()
    assert torch.equal(y, x) and torch.allclose(x.grad, scale * 3 * x.detach() ** 2)


# --- Muon -------------------------------------------------------------------------------------------------------------

def exact_orthogonalise(matrix):
    """The quintic of Jordan et al. applied five times to the singular values of an SVD in float64."""
    u, x, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return u * x @ v


@pytest.mark.parametrize("shape", [(40, 40), (24, 96), (96, 24), (1, 9), (5, 1)])
def test_orthogonalise_keeps_directions(shape):
    """All singular values become 0.67 to 1.21, whatever the scale of each matrix and the spread of its singular values.
    The result is close to U V^T. Zero stays zero."""
    u, v = (torch.linalg.qr(normal(n, min(shape), seed=n))[0] for n in shape)
    spreads = [u * torch.logspace(0, -math.log10(spread), min(shape)) @ v.T for spread in (1, 30, 100)]
    matrices = torch.stack([1e-3 * spreads[0], spreads[1], 1e3 * spreads[2], 0 * spreads[0]])
    *found, zero = common.orthogonalise(matrices)
    assert torch.equal(zero, torch.zeros(shape))
    for one, exact in zip(found, spreads, strict=True):
        assert torch.allclose(one.double(), exact_orthogonalise(exact), atol=2e-3)
        values = torch.linalg.svdvals(one)
        assert 0.67 < values.min() and values.max() < 1.21 and torch.linalg.matrix_norm(one - u @ v.T, 2) < 0.33


def test_muon_by_hand(tmp_path):
    """Two steps with known gradients. The weights of the convolution, as a matrix (out, in k k), and of the linear
    layers, two of which have one shape, follow the orthogonalised Nesterov momentum, multiplied by sqrt(out / in) where
    that is above 1. Adam moves the biases, at its own rate."""
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "a": nn.Linear(5, 20), "b": nn.Linear(5, 20)})
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients = [{name: normal(*p.shape, seed=10 * i + k) for k, (name, p) in enumerate(expected.items())}
                 for i in range(2)]
    chosen = settings(batch=2, warmup=0, decay=False, net_lr=0.01, net_muon_lr=0.1, net_clip=1e9, net_ema=0.0)
    training = common.Training(tmp_path, chosen, CPU, torch.zeros(9, 1, 1, 1), 2, False, net=net)
    for _ in training:
        loss = sum((gradients[training.steps_taken][name] * p).sum() for name, p in net.named_parameters())
        training.step(loss.expand(2), {})

    biases = [name for name in expected if "bias" in name]
    adam = torch.optim.Adam([expected[name] for name in biases], lr=0.01)
    for gradient in gradients:
        for name in biases:
            expected[name].grad = gradient[name]
        adam.step()
    for name, scale in (("conv.weight", 1), ("a.weight", 2), ("b.weight", 2)):  # (20 / 5)^(1/2)
        first, second = (gradient[name] for gradient in gradients)
        average = 0.05 * first, 0.95 * 0.05 * first + 0.05 * second
        for update in (0.05 * first + 0.95 * average[0], 0.05 * second + 0.95 * average[1]):
            expected[name] -= 0.1 * scale * exact_orthogonalise(update.flatten(1)).view(update.shape)
    for name, p in net.named_parameters():
        assert torch.allclose(p.detach(), expected[name], atol=2e-4, rtol=0), name


# --- Several processes ------------------------------------------------------------------------------------------------

def test_only_the_first_process_writes(tmp_path, monkeypatch):
    """The second one trains, writes nothing, and returns the checkpoint of the first."""
    first = train_weights(tmp_path, lambda i, w: w).finish()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for place, name, value in ((common, "RANK", 1), (common, "RANKS", 2), (distributed, "barrier", lambda: None),
                               (distributed, "all_reduce", lambda tensor: tensor.mul_(2))):
        monkeypatch.setattr(place, name, value)
    training = train_weights(tmp_path, lambda i, w: -w)
    training.save()
    assert same(training.finish(), first) and {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def draw_images():
    """Ten images of a VAE that is the same in every process, three at a time."""
    torch.manual_seed(0)
    vae = common.build_vae(settings())
    priors = {"gaussian": common.GaussianMixture.standard_normal(8)}
    model = common.Model(CPU, (3, 32, 32), (vae,), vae, priors)
    return common.generate(model, settings(prior="gaussian", eval_samples=10, eval_batch=3))[1]


def train_as_one_of_two(folder):
    """Train a VAE for four steps, and keep what this process saw."""
    torch.manual_seed(0)
    device, chosen = common.choose_device("cpu"), settings(batch=8, vae_clip=1e9)
    vae, seen = common.build_vae(chosen), []
    training = common.Training(folder / "run", chosen, device, data_of(60).train.images, 4, False, vae=vae)
    for x0 in training:
        loss, sse, _ = stage1.vae_loss(vae, x0, training.normal(vae.latent_dim), 1.0)
        own = torch.autograd.grad(loss.mean(), list(vae.parameters()), retain_graph=True)
        training.step(loss, {"sse": sse})
        seen.append((x0.clone(), own, [p.grad.clone() for p in vae.parameters()]))
    checkpoint = training.finish()
    torch.save({"seen": seen, "weights": vae.state_dict(), "checkpoint": checkpoint, "images": draw_images()},
               folder / f"{common.RANK}.pt")


def test_two_processes(tmp_path):
    """Each has half of a batch, with images of its own. The gradients are the means of both, so the networks stay
    equal. Images that they draw together are those that one process draws."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(common.__file__).parent)}
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (x, own, mean), (other_x, other_own, other_mean) in zip(first["seen"], second["seen"], strict=True):
        assert x.shape == other_x.shape == (4, 3, 32, 32) and not torch.equal(x, other_x)
        for g, other_g, found, other_found in zip(own, other_own, mean, other_mean, strict=True):
            assert torch.equal(found, other_found) and not torch.equal(g, other_g)
            assert torch.allclose(found, (g + other_g) / 2, rtol=1e-4, atol=1e-4)
    for name in ("weights", "checkpoint", "images"):
        assert same(first[name], second[name])
    assert torch.equal(first["images"], draw_images())


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_as_one_of_two(Path(sys.argv[1]))
