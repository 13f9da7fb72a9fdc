"""Bonus: scaling of the latent, no gradient into the autoencoder, sampling, what is measured and compared."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, images_of, same, settings

import bonus_latent as bonus
import common
import fid


def tiny():
    return settings(ae_width=16, latent_unet=[[1, 16, 1, 1]])


def test_latents_are_scaled_and_the_autoencoder_is_left_alone(tmp_path, monkeypatch):
    """Mean 0 and variance 1 per channel of z ~ q(z|x), of all images and of what the U-Net is trained on; undone before
    decoding. While the U-Net trains, the autoencoder keeps its bits and needs no gradient."""
    data, seen, built = images_of(150), [], []
    simple_loss, frozen = common.Diffusion.simple_loss, common.frozen
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda *args: seen.append(args[2]) or simple_loss(*args))
    monkeypatch.setattr(common, "frozen", lambda *args: built.append(frozen(*args)) or built[-1])
    ae_state = bonus.train_autoencoder(tmp_path / "ae", tiny(), data, CPU, None)
    state = bonus.train_latent(tmp_path / "latent", tiny(), ae_state, data, CPU, None)
    assert len(built) == 2 and all(not p.requires_grad and p.grad is None for net in built for p in net.parameters())
    assert same(dict(built[-1].state_dict()), ae_state["vae"]) and same(state["vae"], ae_state["vae"])

    (model, ae, _), stats = bonus.load_model(state, CPU), ae_state["scale"]
    mu, sd = bonus.encode_all(ae, data.images, CPU)
    assert mu.shape == (150, 4, 8, 8) and not torch.allclose(stats["sd"], torch.ones(1), atol=0.05)
    scale = lambda z: (z - stats["mean"]) / stats["sd"]  # noqa: E731
    drawn = scale(mu + sd * common.randn(mu.shape, common.generator(0)))
    for z, slack in ((drawn, 0.03), (torch.cat(seen), 0.06)):
        assert z.shape[1:] == (4, 8, 8) and torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=slack)
        assert torch.allclose(z.var((0, 2, 3)), torch.ones(4), atol=slack + 0.02)
    assert model.diffusion.start == 1000  # no x_hat to begin about
    with torch.no_grad():
        assert torch.allclose(model.decode(scale(mu[:5])), ae.decode(mu[:5]), atol=1e-5)


def test_what_is_decoded():
    """Sampled latents are not clamped, as images are; the robustness probe's noise goes in before decoding."""
    decoded = []
    model = common.Model("latent", CPU, (4, 8, 8), common.Diffusion("v"),  # v = 0: the predicted x0 is a x_t
                         condition=lambda x_hat, z: lambda x, t: torch.zeros_like(x),
                         decode=lambda z: decoded.append(z) or torch.zeros(len(z), 3, 32, 32))
    for temperature in (1.0, 100.0):
        common.generate(dataclasses.replace(model, temperature=temperature), 1, "none", "dpm", 5, 0, 1)
    assert torch.allclose(100 * decoded[0], decoded[1], rtol=1e-3) and decoded[1].abs().max() > 5
    x, pixels = torch.zeros(1, 3, 8, 8), dataclasses.replace(model, temperature=100.0, decode=None)
    assert common.refine(pixels, x, None, common.generator(0), "dpm", 5).abs().max() <= 1
    for damage in (0.0, 0.4):
        common.generate(model, 20, "none", "dpm", 2, 0, 20, damage)
    noise = decoded[3] - decoded[2]
    assert noise.shape == (20, 4, 8, 8) and float(noise.std()) == pytest.approx(0.4, abs=0.02)


def test_measurements(monkeypatch):
    """Peak memory of tensors alive at once, not of all; median seconds without two first runs and one slow one."""
    def run():
        a, b = torch.ones(2 * 2**20), torch.ones(2 * 2**20)
        del a, b
        torch.ones(2 * 2**20)

    assert bonus.peak_memory(run, CPU) == pytest.approx(16, rel=0.02)
    clock = iter([0, 9, 9, 18, 18, 19, 19, 20, 20, 70, 70, 71, 71, 72])
    monkeypatch.setattr(bonus.time, "perf_counter", lambda: next(clock))
    assert bonus.median_seconds(lambda: None, CPU, repeats=5) == 1


def test_equal_seconds_by_hand():
    """Of the pixel model's rows: as quick within a tenth, the same sampler and count, its headline prior."""
    def row(sampler, seconds, prior="gmm", count=200):
        return {"prior": prior, "sampler": sampler, "nfe": 5, "n_generated": count, "seconds_per_image": seconds,
                "fid": {"value": seconds}, "hf_energy": 1}

    ours = [row("dpm", 1.0, "none"), row("ddim", 0.1, "none")]
    pixel = [row("dpm", 0.5), row("dpm", 1.09), row("dpm", 1.11), row("ddim", 0.9), row("dpm", 0.4, "gaussian"),
             row("dpm", 0.6, count=100), row("ddim", 0.12)]
    first, second = bonus.equal_seconds(ours, pixel, "fid")
    assert [found["seconds_per_image"] for found in first["pixel"]] == [0.5, 1.09] and second["pixel"] == []
    assert first["latent"] == {key: value for key, value in ours[0].items() if key not in ("n_generated", "hf_energy")}


def test_pixel_rows_of_other_settings_are_refused(tmp_path):
    """Only a finished run of the same training settings is compared with, and only rows measured in the same way."""
    train, setup = tiny(), SimpleNamespace(evaluation={"features": "local", "temperature": 0.9, "count": 64})
    rows = [{"fd_local": {"value": 1.0, "low": None, "high": None}}]

    def found(finished=True, features="local", temperature=0.9, **changes):
        fid.save(tmp_path / "checkpoint.pt", {"train": settings(**changes), "finished": finished})
        run = {"eval": {"features": features, "temperature": temperature, "count": 99}}
        common.write_json(tmp_path / "metrics.json", {"schema": 1, "run": run, "rows": rows})
        return bonus.pixel_rows(tmp_path, train, setup)

    assert bonus.pixel_rows(tmp_path, train, setup) is None  # nothing there
    assert found() == rows
    assert found(steps=9) is found(seed=1) is found(finished=False) is None
    assert found(temperature=1.0) is found(features="local, another") is None
