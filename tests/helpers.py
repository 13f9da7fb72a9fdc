"""What several test files use: settings, a few images, the comparison of checkpoints, one-line errors."""

import argparse
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import common
import fid

CPU = torch.device("cpu")
draw_all, folder_and_settings = common.draw_shapes, fid.Setup.folder_and_settings


def small_shapes(count, seed):
    """A twentieth of the built-in data set: 1000 training and 200 test images."""
    return draw_all(count // 20, seed)


def settings(steps=8, **changes):
    """The training settings of the smoke budget on shapes, with some of them changed. `steps`: of every network."""
    train, _ = common.budget("smoke", "shapes", 32)
    train |= {"vae_steps": steps, "unet_steps": steps}
    return {"dataset": "shapes", "image_size": 32, "budget": "smoke", "seed": 0} | train | changes


def images_of(count, seed=1):
    """The first `count` shapes of a seed, as an ImageData."""
    images, labels, factors = draw_all(count, seed)
    return common.ImageData(images, labels, factors, "shapes", "none", "")


def planted_setup(home, train, **parts):
    """What a stage needs of a fid.Setup. `changes`: by --set, none if they are not given."""
    setup = SimpleNamespace(**{"home": home, "train": train, "changes": {}} | parts)
    setup.folder_and_settings = partial(folder_and_settings, setup)
    return setup


def evened(losses, times, start):
    """What Training.even_levels makes of the losses of a first step, number by number: each is divided by 1, moved by
    a twentieth towards the mean of those losses whose times are in the same twentieth of 1..start."""
    levels = [(time - 1) * 20 // start for time in times.tolist()]
    of_level = {level: [loss for loss, other in zip(losses.tolist(), levels, strict=True) if other == level]
                for level in levels}
    means = [0.95 + 0.05 * sum(of_level[level]) / len(of_level[level]) for level in levels]
    return losses / torch.tensor(means)


def same(a, b):
    """Whether two nested structures hold the same bits. Left out: `seconds`, `seconds_before` and `run_id`, which are
    other ones each time."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("seconds", "seconds_before", "run_id"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


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


def plant_wrong_bfloat16(patch, is_wrong=lambda conv: True):
    """Plant a fault such as some processors have: in bfloat16, convolutions for which `is_wrong(conv)` return their
    channels in reverse order. (Weights that are zero hide this.) The project then believes that bfloat16 is fast."""
    right = torch.nn.Conv2d._conv_forward

    def wrong(conv, *arguments):
        y = right(conv, *arguments)
        return y.flip(1) if y.dtype == torch.bfloat16 and is_wrong(conv) else y

    patch.setattr(torch.nn.Conv2d, "_conv_forward", wrong)
    patch.setattr(common, "fast_bfloat16", lambda device: True)


def flags(*argv):
    """The shared flags of all stages, parsed. `changes` are none until read_settings has read them."""
    parser = argparse.ArgumentParser()
    common.add_flags(parser, ("gaussian", "gmm"), "gmm")
    return parser.parse_args(argv, argparse.Namespace(changes={}))


def denoiser_of(predict):
    """The denoiser_for of a planted model. Its prediction is predict(x, x_hat), whatever the rest is."""
    def denoiser_for(x_hat, z, clean):
        def denoise(x, t):
            return predict(x, x_hat)
        return denoise
    return denoiser_for
