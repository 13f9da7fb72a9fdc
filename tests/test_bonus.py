"""Bonus: scaling of the latent, no gradient into the autoencoder, sampling, what latent diffusion saves."""

import json
import math

import pytest
import torch
from helpers import CPU, data_of, same, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bonus_latent as bonus
import common


def recorded(monkeypatch, owner, name):
    """The list of what a function returns from here on."""
    returned, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: returned.append(function(*args)) or returned[-1])
    return returned


def test_autoencoder_learns(tmp_path):
    """The squared error of a few images falls to a third."""
    own = settings(60, every=10, batch=8, vae_muon_lr=0.0)
    log = bonus.train_autoencoder(tmp_path, own, data_of(8), CPU)["log"]
    assert log[-1]["sse"] < log[0]["sse"] / 3 and log[-1]["kl_nats"] > 10


def test_latents_are_scaled_and_the_autoencoder_is_left_alone(tmp_path, monkeypatch):
    """What the U-Net is trained on has mean 0 and variance 1 in each channel; this is undone before decoding. The
    autoencoder keeps its bits. Noise levels are weighted over all 1,000 times."""
    data, own = data_of(150), settings(7, unet_steps=16)
    base = bonus.train_autoencoder(tmp_path / "ae", own, data, CPU)
    targets, frozen = recorded(monkeypatch, common.Diffusion, "q_sample"), recorded(monkeypatch, common, "frozen")
    latents, q_sample = [], common.Diffusion.q_sample
    monkeypatch.setattr(common.Diffusion, "q_sample", lambda *args: latents.append(args[1]) or q_sample(*args))
    state = bonus.train_latent(tmp_path / "latent", own, base, data, CPU)
    assert all(not p.requires_grad and p.grad is None for p in frozen[0].parameters())
    assert same(dict(frozen[0].state_dict()), base["vae"]) and state["minutes"] > base["minutes"] > 0
    assert all(same(state[name], base[name]) for name in ("vae", "mean", "sd"))

    model = bonus.load_model(state, CPU)
    autoencoder, unet = model.networks
    assert same(dict(unet.state_dict()), state["unet"]) and model.denoiser(None, None) is unet
    assert model.shape == (4, 8, 8) and model.diffusion.start == 1000 and targets[0].shape == (32, 4, 8, 8)
    mu, logvar = common.encode(autoencoder["encoder"], data.train.images, CPU)
    drawn = mu + (0.5 * logvar).exp() * common.randn(mu.shape, common.generator(0, "z"))
    assert not torch.allclose(base["sd"], torch.ones(1), atol=0.05)
    for z, slack in (((drawn - base["mean"]) / base["sd"], 0.03), (torch.cat(latents), 0.06)):
        assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=slack)
        assert torch.allclose(z.var((0, 2, 3)), torch.ones(4), atol=slack + 0.02)
    decoded = model.decode((mu[:5] - base["mean"]) / base["sd"])
    assert torch.allclose(decoded, autoencoder["decoder"](mu[:5]), atol=1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_latents_of_mirrored_images(mirrored, tmp_path, monkeypatch):
    """The U-Net is trained on the latents of the images and, if they are mirrored at all, of their mirror images."""
    data, given, training = data_of(10), [], common.Training
    autoencoder = bonus.build_autoencoder(settings())
    base = {"vae": autoencoder.state_dict(), "mean": torch.zeros(1), "sd": torch.full([1], 2.0), "minutes": 1.0}
    monkeypatch.setattr(common, "Training", lambda folder, own, device, images, **how: (
        given.append(images) or training(folder, own, device, images, **how)))
    bonus.train_latent(tmp_path, settings(1, unet_flip=mirrored), base, data, CPU)
    both = torch.cat([data.train.images, data.train.images.flip(3)])
    with torch.no_grad():
        mu, logvar = autoencoder["encoder"](common.to_float(both if mirrored else data.train.images))
    assert torch.allclose(given[0], torch.cat([mu / 2, logvar - math.log(4)], 1), atol=1e-5)


def latent_model(decode):
    """A model of latents whose v is always 0, so that the predicted latent is a x_t."""
    return common.Model(CPU, (4, 8, 8), (), diffusion=common.Diffusion("v"), decode=decode,
                        denoiser=lambda x_hat, z: lambda x, t: torch.zeros_like(x))


def test_what_is_decoded():
    """Latents are not clamped. The noise of the robustness table is added before they are decoded."""
    decoded = []
    model = latent_model(lambda z: decoded.append(z) or torch.zeros(len(z), 3, 32, 32))
    own = settings(eval_samples=20, sample_steps=5)
    for changes, damage in (({}, 0.0), ({"temperature": 100.0}, 0.0), ({}, 0.4)):
        common.generate(model, own | changes, damage=damage)
    plain, hot, damaged = decoded
    assert torch.allclose(100 * plain, hot, rtol=1e-3) and hot.abs().max() > 5
    assert (damaged - plain).std() == pytest.approx(0.4, abs=0.02)


def test_peak_memory(tmp_path):
    """It is that of tensors that exist at once, not of all. The profile is written."""
    def decode(z):
        a, b = torch.ones(4 * 2**20), torch.ones(4 * 2**20)  # 16 MB each
        del a, b
        return torch.ones(4 * 2**20)[:3072].view(1, 3, 32, 32)

    own = settings(eval_samples=1, sample_steps=1)
    assert bonus.peak_memory_mb(latent_model(decode), own, tmp_path / "profile.txt") == pytest.approx(32, rel=0.03)
    assert "aten::" in (tmp_path / "profile.txt").read_text()


def test_savings(tmp_path, monkeypatch):
    """Operations are those of all steps and of decoding. What is saved is 100 (1 - latent / pixel) percent."""
    own, timed = settings(eval_batch=6, sample_steps=3), []

    def planted_seconds(models, own):
        timed.append((list(models), own["eval_samples"], own["prior"]))
        return {"pixel": 8.0, "latent": 2.0}

    monkeypatch.setattr(bonus, "seconds_per_image", planted_seconds)
    monkeypatch.setattr(bonus, "peak_memory_mb", lambda model, own, path: {3: 10.0, 4: 20.0}[model.shape[0]])
    torch.manual_seed(0)
    state = {"settings": own, "mean": torch.zeros(1), "sd": torch.ones(1),
             "vae": bonus.build_autoencoder(own).state_dict(), "unet": bonus.build_latent_unet(own).state_dict()}
    model = bonus.load_model(state, CPU)
    table = json.loads(json.dumps(bonus.savings(tmp_path, model, own)))
    assert timed == [(["pixel", "latent"], 6, "gaussian")]  # in turn, in batches

    def gflops(network, *inputs):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(*inputs)
        return counter.get_total_flops() / 1e9

    t, (autoencoder, unet) = torch.ones(1).long(), model.networks
    latent = 3 * gflops(unet, torch.zeros(1, 4, 8, 8), t) + gflops(autoencoder["decoder"], torch.zeros(1, 4, 8, 8))
    pixel = 3 * gflops(common.build_unet(own, 6), torch.zeros(1, 6, 32, 32), t) + gflops(
        common.build_vae(own).decoder, torch.zeros(1, 8))
    assert table["saved_percent"] == pytest.approx({
        "seconds_per_image": 75, "peak_memory_mb": -100, "gflops_per_image": 100 * (1 - latent / pixel)})


def test_ceiling_is_of_held_out_images(tmp_path):
    """They are decoded from the means of their latents."""
    torch.manual_seed(0)
    data, autoencoder = data_of(30), bonus.build_autoencoder(settings()).requires_grad_(False)
    model, scored = common.Model(CPU, (4, 8, 8), (autoencoder,)), []

    def scorer(images):
        scored.append(images)
        return {}

    scorer.data = data
    result = bonus.ceiling(tmp_path, model, settings(eval_samples=20), scorer)
    real = data.test.images[:20]
    x_hat = common.to_uint8(autoencoder["decoder"](autoencoder["encoder"](common.to_float(real))[0]))
    assert torch.equal(scored[0], x_hat) and result == {"images": 20}
    assert (tmp_path / "reconstructions.png").is_file()
