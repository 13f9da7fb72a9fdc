"""What several test files use: settings, a few images, a model, the comparison of checkpoints, one-line errors."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import common

CPU = torch.device("cpu")
draw_all = common.draw_shapes


def small_shapes(count, seed):
    """A twentieth of the built-in data set: 1000 training, 200 test and 500 reference images."""
    return draw_all(count // 20, seed)


def settings(steps=8, **changes):
    """The settings of the smoke budget on shapes, with some of them changed. `steps`: of every network."""
    own = {"vae_steps": steps, "unet_steps": steps, "seed": 0, "changes": {}, "home": "runs/shapes-smoke"}
    return common.budget_settings("smoke", "shapes") | own | changes


def data_of(count, held_out=60):
    """A common.Data with the first shapes of two seeds; the reference is the training images."""
    splits = []
    for number, seed in ((count, 1), (held_out, 2)):
        images, labels, factors = draw_all(number, seed)
        splits.append(common.ImageData(images, "drawn by the program", labels, factors))
    return common.Data(*splits, splits[0])


def same(a, b):
    """Whether two nested structures hold the same bits. Left out: `minutes`, which are other ones each time."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "minutes")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def expect_error(capsys, call, *words):
    """Check that `call` exits with status 2 and prints one line, `error: ...`, which contains every word."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    text = capsys.readouterr().err.replace("\x1b[A", "")  # tqdm's cursor movements
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip() and "%|" not in line]  # no progress bars
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]


def oracle(diffusion, x0):
    """A network (x_t, t) -> prediction that knows x0 and predicts it exactly."""
    def network(x_t, t):
        a, sigma = diffusion.scales(t)
        return diffusion.target(x0, t, (x_t - a * x0) / sigma)
    return network


def tiny_model(**changes):
    """A model of stage 1 (`form1`) with a random VAE whose images differ from each other, and a refiner that takes
    x_hat for x0."""
    torch.manual_seed(0)
    chosen = settings(**changes)
    vae, diffusion = common.build_vae(chosen), common.Diffusion("v", chosen["start"])
    nn.init.normal_(vae.decoder.body[-1].weight, std=2)
    vae = common.frozen(vae, vae.state_dict(), CPU)
    return SimpleNamespace(variant="form1", settings=chosen, device=CPU, vae=vae, networks=[vae], diffusion=diffusion,
                           priors={"gaussian": common.GaussianMixture.standard_normal(8)},
                           unet=lambda shown, t: oracle(diffusion, shown[:, 3:])(shown[:, :3], t))


def record_gradients(monkeypatch):
    """A list that gets, from each step of a training, the networks' gradients before they are clipped, and zeros where
    there is none."""
    steps = []
    monkeypatch.setattr(common, "average_gradients", lambda *networks: steps.append(
        [[torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]
         for network in networks]))
    return steps


def close(ours, theirs):
    """Whether two lists of tensors are equal up to rounding errors."""
    return all((x - y).norm() <= 2e-4 * y.norm() + 1e-9 for x, y in zip(ours, theirs, strict=True))


def draw_by_shape(monkeypatch, *stages):
    """Make the noise and times of these stages' trainings depend on their shape and the step, not on the order in which
    a step draws them. New U-Nets have the same weights, whatever was built before."""
    counts, build = {}, common.build_unet

    def randn(shape, gen):
        counts[gen, shape] = counts.get((gen, shape), 0) + 1
        return torch.randn(shape, generator=common.generator(counts[gen, shape], f"{tuple(shape)}"))

    def build_unet(*args):
        torch.manual_seed(5)
        return build(*args)

    for stage in stages:
        monkeypatch.setattr(stage, "randn", randn)
    monkeypatch.setattr(common, "build_unet", build_unet)
    monkeypatch.setattr(common.Diffusion, "draw_t", lambda diffusion, count, gen: (
        1 + (randn((count,), gen).abs() * diffusion.start / 5).long().clamp(max=diffusion.start - 1)))
