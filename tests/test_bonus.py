"""Bonus: scaling of the latent, no gradient into the autoencoder, sampling, what is measured and compared."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, images_of, same, settings

import bonus_latent as bonus
import common
import fid


def tiny(**changes):
    return settings() | {"ae_width": 16, "latent_unet": [[1, 16, 1, 1]]} | changes


def both(home, train, data):
    ae = bonus.train_autoencoder(home / "ae", train, data, CPU, False)
    return ae, bonus.train_latent(home / "latent", train, ae, data, CPU, False)


def test_scaled_latents_have_unit_variance_over_the_training_set(tmp_path, monkeypatch):
    """Mean 0 and variance 1 per channel of z ~ q(z|x), measured over all images and stored. It matters, and the U-Net
    is trained on such latents."""
    data, train, seen = images_of(150), tiny(), []
    simple_loss = common.Diffusion.simple_loss
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda *args: seen.append(args[2]) or simple_loss(*args))
    state = both(tmp_path, train, data)[0]
    ae, stats = common.frozen(bonus.Autoencoder(16), state["vae"], CPU), state["scale"]
    mu, sd = bonus.encode_all(ae, data.images, CPU)
    assert mu.shape == (150, 4, 8, 8) and not torch.allclose(stats["sd"], torch.ones(1), atol=0.05)
    drawn = bonus.scale(mu + sd * common.randn(mu.shape, common.generator(0)), stats)
    for z, slack in ((drawn, 0.03), (torch.cat(seen), 0.06)):
        assert z.shape[1:] == (4, 8, 8) and torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=slack)
        assert torch.allclose(z.var((0, 2, 3)), torch.ones(4), atol=slack + 0.02)


def test_scaling_is_undone_before_decoding(tmp_path):
    """Encoding, scaling, and the model's own decode give what the autoencoder alone gives."""
    data = images_of(60)
    state = both(tmp_path, tiny(), data)[1]
    model, ae, _ = bonus.load_model(state, CPU)
    assert model.diffusion.start == 1000  # no x_hat to begin about
    with torch.no_grad():
        mu, _ = ae.encode(common.to_float(data.images[:5]))
        scaled = bonus.scale(mu, state["scale"])
        assert torch.allclose(bonus.unscale(scaled, state["scale"]), mu, atol=1e-5)
        assert torch.allclose(model.decode(scaled), ae.decode(mu), atol=1e-5)
        assert not torch.allclose(ae.decode(scaled), ae.decode(mu), atol=1e-2)  # it matters


def test_no_gradient_into_the_autoencoder(tmp_path, monkeypatch):
    """While the U-Net trains, the autoencoder keeps its bits and needs no gradient; the U-Net changes."""
    built, restore = [], common.frozen
    monkeypatch.setattr(common, "frozen", lambda *a: built.append(restore(*a)) or built[-1])
    ae_state, state = both(tmp_path, tiny(steps=3), images_of(60))
    assert len(built) == 2 and all(not p.requires_grad and p.grad is None for net in built for p in net.parameters())
    assert same(dict(built[-1].state_dict()), ae_state["vae"]) and same(state["vae"], ae_state["vae"])
    torch.manual_seed(0)
    assert not same(dict(bonus.build_unet(tiny()).state_dict()), state["unet"])


@pytest.fixture
def silent(tmp_path):
    """A model whose U-Net says 0 (v = 0: the predicted x0 is a x_t) and whose decode keeps what it gets; the lists of
    what the one and the other were given."""
    shown, decoded = [], []
    model = common.Model("latent", CPU, (4, 8, 8), common.Diffusion("v"),
                         denoiser=lambda x_hat, z: lambda x, t: shown.append(x.clone()) or torch.zeros_like(x),
                         decode=lambda z: decoded.append(z) or torch.zeros(len(z), 3, 32, 32))
    return model, shown, decoded


def test_latents_are_not_clamped(silent):
    """A sampled latent may leave [-1, 1]: 100 times x_T gives 100 times the result. An image may not."""
    model, _, decoded = silent
    for temperature in (1.0, 100.0):
        common.generate(dataclasses.replace(model, temperature=temperature), 1, "none", "dpm", 5, 0, 1)
    assert torch.allclose(100 * decoded[0], decoded[1], rtol=1e-3) and decoded[1].abs().max() > 5
    x, pixels = torch.zeros(1, 3, 8, 8), dataclasses.replace(model, temperature=100.0, decode=None)
    assert common.refine(pixels, x, None, common.generator(0), "dpm", 5).abs().max() <= 1


def test_same_noise_for_every_step_count(silent):
    model, shown, _ = silent
    for count, steps in ((4, 2), (2, 3)):
        common.generate(model, count, "none", "dpm", steps, 0, 2)
    assert len(shown) == 7 and torch.equal(shown[0], shown[4]) and not torch.equal(shown[0], shown[2])


def test_noise_in_the_latent_goes_in_before_decoding(silent):
    """The robustness probe damages what the decoder gets, and by the standard deviation that it names."""
    model, _, decoded = silent
    for damage in (0.0, 0.4):
        common.generate(model, 20, "none", "dpm", 2, 0, 20, damage)
    noise = decoded[1] - decoded[0]
    assert noise.shape == (20, 4, 8, 8) and float(noise.std()) == pytest.approx(0.4, abs=0.02)


def test_peak_memory_of_a_known_allocation():
    """Two tensors of 8 MB alive at once, one after them: the peak is 16 MB, not the sum of all three."""
    def run():
        a, b = torch.ones(2 * 2**20), torch.ones(2 * 2**20)
        del a, b
        torch.ones(2 * 2**20)

    assert bonus.peak_memory(run, CPU) == pytest.approx(16, rel=0.02)


def test_median_is_warm_and_robust(monkeypatch):
    """The first two runs do not count, and one slow run changes nothing."""
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


def test_pixel_run_refuses_other_settings(tmp_path):
    """Only a finished run of the same training settings is compared with, and only rows measured in the same way."""
    train, setup = tiny(), SimpleNamespace(evaluation={"features": "local", "temperature": 0.9, "count": 64})
    rows = [{"fd_local": {"value": 1.0, "low": None, "high": None}}]

    def found(finished=True, features="local", temperature=0.9, **changes):
        fid.save(tmp_path / "checkpoint.pt", {"train": settings(**changes), "finished": finished})
        run = {"eval": {"features": features, "temperature": temperature, "count": 99}}
        common.write_json(tmp_path / "metrics.json", {"schema": 1, "run": run, "rows": rows})
        state, theirs = bonus.pixel_run(tmp_path, train, setup)
        return state is not None, theirs

    assert bonus.pixel_run(tmp_path, train, setup) == (None, None)  # nothing there
    assert found() == (True, rows)
    assert found(steps=9) == found(seed=1) == found(finished=False) == (False, None)
    assert found(temperature=1.0) == found(features="local, another") == (True, None)
