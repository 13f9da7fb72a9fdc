"""Bonus: scaling of the latent, no gradient into the autoencoder, sampling, what latent diffusion saves."""

from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, data_of, same, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bonus_latent as bonus
import common


def test_autoencoder_learns(tmp_path):
    """The squared error of a few images falls to a third."""
    own = settings(60, every=10, batch=8, vae_muon_lr=0.0)
    log = bonus.train_autoencoder(tmp_path, own, data_of(8), CPU)["log"]
    assert log[-1]["sse"] < log[0]["sse"] / 3 and log[-1]["kl_nats"] > 10


@pytest.mark.parametrize("mirrored", [False, True])
def test_latents_are_scaled_and_the_autoencoder_is_left_alone(mirrored, tmp_path, monkeypatch):
    """What the U-Net is trained on has mean 0 and variance 1 in each channel. It comes from images and, if they are
    mirrored at all, from mirrored images. The autoencoder keeps its bits and gets no gradient."""
    data, own = data_of(150), settings(7, unet_steps=16, unet_flip=mirrored)
    base = bonus.train_autoencoder(tmp_path / "ae", own, data, CPU)
    latents, networks, q_sample, frozen = [], [], common.Diffusion.q_sample, common.frozen
    monkeypatch.setattr(common.Diffusion, "q_sample", lambda *args: latents.append(args[1]) or q_sample(*args))
    monkeypatch.setattr(common, "frozen", lambda *args: networks.append(frozen(*args)) or networks[-1])
    state = bonus.train_latent(tmp_path / "latent", own, base, data, CPU)
    assert all(p.grad is None for p in networks[0].parameters())
    assert all(same(state[name], base[name]) for name in ("vae", "mean", "sd")) and state["minutes"] > base["minutes"]
    images = data.train.images
    images = torch.cat([images, images.flip(3)]) if mirrored else images
    mu, logvar = common.encode(networks[0]["encoder"], images, CPU)
    gen = common.generator(0, "training, process 0")
    chosen = torch.randint(len(mu), (32,), generator=gen)
    drawn = common.reparameterise(mu[chosen], logvar[chosen], common.randn((32, 4, 8, 8), gen))
    assert torch.allclose(latents[0], (drawn - base["mean"]) / base["sd"], atol=1e-5)
    z = torch.cat(latents)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=0.08)
    assert torch.allclose(z.var((0, 2, 3)), torch.ones(4), atol=0.1)


def latent_model(decoder):
    """A model of latents whose v is always 0, so that the predicted latent is a x_t."""
    return SimpleNamespace(device=CPU, diffusion=common.Diffusion("v"), unet=lambda x, t: torch.zeros_like(x),
                           autoencoder={"decoder": decoder}, settings=settings(), mean=3.0, sd=2.0)


def test_what_is_decoded():
    """A latent is not clamped. Noise is added to it before its scaling is undone, and then it is decoded. Temperature
    changes nothing, since sampling begins with pure noise."""
    decoded = []
    model = latent_model(lambda z: decoded.append(z) or torch.zeros(len(z), 3, 32, 32))
    own = model.settings | common.sampling_settings("ddim", 5) | {"eval_batch": 20}
    z = bonus.draw_codes(model, own, 20)
    bonus.generate(model, own, z)
    bonus.generate(model, own | {"temperature": 1.1}, z)
    bonus.generate(model, own, z, corrupt=lambda x: x + 1)
    plain, hot, corrupted = decoded
    assert torch.equal(plain, hot) and torch.allclose(corrupted, plain + 2, atol=1e-5)
    angle = (model.diffusion.alpha_bar[model.diffusion.times(own)].sqrt().acos()).diff()  # v = 0: each step turns x by
    x = common.randn((20, 4, 8, 8), common.generator(0, "noise 0")) * float(angle.cos().prod())  # its angle
    assert torch.allclose(plain, 2 * x + 3, atol=1e-4)


def test_peak_memory(tmp_path):
    """It is that of tensors that exist at once, not of all. The profile is written."""
    def sample():
        a, b = torch.ones(4 * 2**20), torch.ones(4 * 2**20)  # 16 MB each
        del a, b
        torch.ones(4 * 2**20)

    assert bonus.peak_memory_mb(sample, CPU, tmp_path / "profile.txt") == pytest.approx(32, rel=0.03)
    assert "aten::" in (tmp_path / "profile.txt").read_text()


def test_savings(tmp_path, monkeypatch):
    """Operations of an image are those of all steps and of decoding. What is saved is 100 (1 - latent / pixel) percent.
    """
    own = settings(eval_batch=6, sample_steps=3)
    monkeypatch.setattr(bonus, "peak_memory_mb", lambda sample, device, path: 20.0 if "latent" in path.name else 10.0)
    torch.manual_seed(0)
    model = bonus.load_model({"settings": own, "mean": torch.zeros(1), "sd": torch.ones(1),
                              "vae": bonus.build_autoencoder(own).state_dict(),
                              "unet": bonus.build_latent_unet(own).state_dict()}, CPU)
    pixel, latent, saved = bonus.savings(tmp_path, model, own, repeats=1)

    def gflops(network, *inputs):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(*inputs)
        return counter.get_total_flops() / 1e9

    t = torch.ones(1).long()
    expected = (3 * gflops(common.build_unet(own, 6), torch.zeros(1, 6, 32, 32), t)
                + gflops(common.build_vae(own).decoder, torch.zeros(1, 8)),
                3 * gflops(model.unet, torch.zeros(1, 4, 8, 8), t)
                + gflops(model.autoencoder["decoder"], torch.zeros(1, 4, 8, 8)))
    assert [row["label"] for row in (pixel, latent, saved)] == ["pixel space", "latent space", "saved %"]
    assert (pixel["gflops_per_image"], latent["gflops_per_image"]) == pytest.approx(expected)
    assert saved["gflops_per_image"] == pytest.approx(100 * (1 - expected[1] / expected[0]))
    assert saved["peak_memory_mb"] == -100 and pixel["steps"] == latent["steps"] == 3
