"""Lets every test file import the scripts from the repository root. All compute on one thread: same bits everywhere."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Commands run in an empty folder, on a twentieth of the built-in data set."""
    from helpers import small_shapes

    import common
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "draw_shapes", small_shapes)
    return tmp_path


@pytest.fixture
def tiny():
    """A Model with a random VAE whose images differ from each other, and a refiner that returns x_hat."""
    from helpers import CPU, oracle, settings
    from torch import nn

    import common
    torch.manual_seed(0)
    vae, diffusion = common.build_vae(settings()), common.Diffusion("v")
    nn.init.normal_(vae.decoder.body[-1].weight, std=2)
    vae = common.frozen(vae, vae.state_dict(), CPU)
    priors = {"gaussian": common.GaussianMixture.standard_normal(8)}
    return common.Model(CPU, (3, 32, 32), (vae,), vae, priors, diffusion, lambda x_hat, z: oracle(diffusion, x_hat))
