"""What several test files use: settings, a few images, the comparison of checkpoints, one-line errors."""

import re

import pytest
import torch

import common

CPU = torch.device("cpu")
draw_all = common.draw_shapes


def small_shapes(count, seed):
    """A twentieth of the built-in data set: 1000 training and 200 test images."""
    return draw_all(count // 20, seed)


def settings(steps=8, **changes):
    """The settings of the smoke budget on shapes, with some of them changed. `steps`: of every network."""
    own = {"vae_steps": steps, "unet_steps": steps, "seed": 0, "changes": {}, "home": "runs/shapes-smoke"}
    return common.budget_settings("smoke", "shapes") | own | changes


def data_of(count, held_out=60):
    """A common.Data with the first shapes of two seeds."""
    splits = []
    for number, seed in ((count, 1), (held_out, 2)):
        images, labels, factors = draw_all(number, seed)
        splits.append(common.ImageData(images, "drawn by the program", labels, factors))
    return common.Data(*splits)


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
    """A denoise(x, t) that knows x0 and predicts it exactly."""
    def denoise(xt, t):
        a, s = diffusion.scales(t)
        return diffusion.target(x0, t, (xt - a * x0) / s)
    return denoise
