"""Bonus: scaling of the latent, no gradient into the autoencoder, what is measured, resume, a smoke run."""

import json
import os
import signal

import pytest
import torch
from test_stage1 import CPU, images_of, same, settings, small_shapes

import bonus_latent as bonus
import common
import stage1_baseline as stage1


def tiny(**changes):
    return settings() | {"ae_width": 16, "latent_unet": [[1, 16, 1, 1]]} | changes


def both(home, train, data, resume=False):
    ae = bonus.train_autoencoder(home / "ae", train, data, CPU, resume)
    return ae, bonus.train_latent(home / "latent", train, ae, data, CPU, resume)


def test_scaled_latents_have_unit_variance_over_the_training_set(tmp_path):
    """Mean 0 and variance 1 per channel of z ~ q(z|x), measured over all images, stored, undone before decoding."""
    data, train = images_of(150), tiny()
    state = bonus.train_autoencoder(tmp_path, train, data, CPU, False)
    ae = common.restore(bonus.Autoencoder(16), state["ema"], CPU)
    mu, sd = bonus.encode_all(ae, data.images, CPU)
    assert mu.shape == (150, 4, 8, 8)
    z = bonus.scale(mu + sd * common.randn(mu.shape, common.generator(0)), state["scale"])
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=0.03)
    assert torch.allclose(z.var((0, 2, 3)), torch.ones(4), atol=0.05)
    assert torch.allclose(bonus.unscale(bonus.scale(mu, state["scale"]), state["scale"]), mu, atol=1e-5)


def test_scaling_is_undone_before_decoding(tmp_path):
    """Encoding, scaling, and the model's own decode give what the autoencoder alone gives."""
    data = images_of(60)
    model = bonus.load_model(both(tmp_path, tiny(), data)[1], CPU)
    with torch.no_grad():
        mu, _ = model.ae.encode(common.to_float(data.images[:5]))
        assert torch.allclose(bonus.decode(model, bonus.scale(mu, model.stats)), model.ae.decode(mu), atol=1e-5)
    assert not torch.allclose(model.stats["sd"], torch.ones(1), atol=0.01)  # it matters


def test_no_gradient_into_the_autoencoder(tmp_path, monkeypatch):
    """While the U-Net trains, the autoencoder keeps its bits and needs no gradient; the U-Net changes."""
    built, restore = [], common.restore
    monkeypatch.setattr(common, "restore", lambda *a: built.append(restore(*a)) or built[-1])
    ae_state, state = both(tmp_path, tiny(steps=3), images_of(60))
    assert all(not p.requires_grad and p.grad is None for net in built for p in net.parameters())
    assert same(dict(built[-1].state_dict()), ae_state["ema"])
    torch.manual_seed(0)
    assert not same(dict(bonus.build_unet(tiny()).state_dict()), state["weights"])


def test_latents_are_not_clamped(tmp_path):
    """A sampled latent may leave [-1, 1]: with a U-Net of zero output (v = 0: x0_hat = a x_t) the result is linear in
    x_T."""
    model = bonus.load_model(both(tmp_path, tiny(), images_of(60))[1], CPU)
    model.unet, seen = (lambda x, t: torch.zeros_like(x)), []
    model.ae.decode = lambda z: seen.append(z) or torch.zeros(len(z), 3, 32, 32)
    one = torch.full((1, 4, 8, 8), 1.0)
    for factor in (1, 100):
        bonus.generate(model, 1, "dpm", 5, 0, 1, z_T=factor * one)
    a, b = ((z - model.stats["mean"]) / model.stats["sd"] for z in seen)
    assert torch.allclose(100 * a, b, rtol=1e-3) and b.abs().max() > 1


def test_same_noise_for_every_step_count(tmp_path):
    model = bonus.load_model(both(tmp_path, tiny(), images_of(60))[1], CPU)
    seen = []
    model.unet = lambda x, t: seen.append(x.clone()) or torch.zeros_like(x)
    for count, steps in ((4, 2), (2, 3)):
        bonus.generate(model, count, "dpm", steps, 0, 2)
    assert torch.equal(seen[0], seen[4]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("where", [5, 12])
def test_stopped_and_resumed_is_never_stopped(where, tmp_path, monkeypatch):
    """SIGTERM while the autoencoder or the U-Net trains; --resume ends with the bits of a run never stopped."""
    train, data, updates, update = tiny(every=3), images_of(60), [], common.EMA.update
    whole = both(tmp_path / "whole", train, data)

    def stop_there(ema, network):
        update(ema, network)
        updates.append(1)
        if len(updates) == where:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(common.EMA, "update", stop_there)
        with pytest.raises(SystemExit) as stop:
            both(tmp_path / "cut", train, data)
    assert stop.value.code == 128 + signal.SIGTERM
    torch.manual_seed(123)
    assert same(both(tmp_path / "cut", train, data, resume=True), whole)


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


def test_smoke(tmp_path, monkeypatch, capsys):
    """One command: both networks, the figures, the savings in percent, metrics of the schema; again: nothing to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "draw_shapes", small_shapes)
    smoke = ["--budget", "smoke", "--device", "cpu"]
    bonus.main(smoke)
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "shapes-smoke" / "bonus-latent-s0"
    metrics = json.loads((folder / "metrics.json").read_text())
    common.check_metrics(metrics)
    saved = metrics["tables"]["savings"]
    assert "saved against pixel space" in out and not saved["pixel_network_trained"]
    pixel, latent = common.network_cost(settings())["unet"]["gflops"], bonus.network_cost(tiny())["unet"]["gflops"]
    assert saved["saved_percent"]["gflops_per_pass"] == pytest.approx(100 * (1 - latent / pixel))
    assert all(value > 0 for name in ("pixel", "latent") for value in saved[name].values())
    assert "equal_seconds" not in metrics["tables"] and metrics["tables"]["ceiling"]["psnr_db"] > 5
    assert {"samples", "steps", "speed", "savings", "interpolation", "reconstructions", "training"} <= {
        path.stem for path in folder.glob("*.png")}
    assert all("conv" in (folder / f"profile-{name}.txt").read_text() for name in ("pixel", "latent"))
    stage1.main([*smoke, "--variant", "form1"])
    (folder / "metrics.json").unlink()
    bonus.main(smoke)  # now with a trained pixel network beside it
    tables = json.loads((folder / "metrics.json").read_text())["tables"]
    assert tables["savings"]["pixel_network_trained"] and tables["equal_seconds"][0]["latent"]["nfe"] == 4
    assert {row["prior"] for pair in tables["equal_seconds"] for row in pair["pixel"]} <= {"gmm"}  # its headline prior
    capsys.readouterr()
    monkeypatch.setattr(bonus, "evaluate", lambda *a: pytest.fail("evaluated again"))
    monkeypatch.setattr(bonus, "fit", lambda *a: pytest.fail("trained again"))
    bonus.main(smoke)
    capsys.readouterr()
    bonus.main([*smoke, "--dry-run"])
    assert set(json.loads(capsys.readouterr().out)["networks"]) == {"vae", "unet"}
