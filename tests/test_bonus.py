"""Bonus: training, scaling of the latent, no gradient into the autoencoder, sampling, what is measured."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, images_of, same, settings

import bonus_latent as bonus
import common
import fid


def tiny(**changes):
    """The settings of the smoke budget for the autoencoder and the U-Net on latents."""
    own = {"ae_width": 16, "latent_unet": [[1, 16, 1, 1]]} | common.settings_for(settings(), "autoencoder", like="vae")
    return settings(**own | changes)


def test_autoencoder_training_by_hand(tmp_path, monkeypatch):
    """The loss of the first step is SSE + 0.01 KL, and the log holds its two terms. Images are mirrored as
    `vae_flip` says."""
    losses, step, train, data = [], common.Training.step, tiny(steps=1), images_of(60)
    monkeypatch.setattr(common, "native_bfloat16", lambda device: False)
    monkeypatch.setattr(common.Training, "step", lambda training, loss, terms: losses.append((loss, training.flip))
                        or step(training, loss, terms))
    row, = bonus.train_autoencoder(tmp_path / "ae", train, data, CPU)["log"]
    training = common.Training(tmp_path / "again", train, CPU, data.images, 1, False)
    torch.manual_seed(0)
    x0, autoencoder = training.batch(), bonus.Autoencoder(16)
    with torch.no_grad():
        mu, logvar = autoencoder.encode(x0)
        x_hat = autoencoder.decode(mu + (0.5 * logvar).exp() * training.normal(4, 8, 8))
    sse = ((x_hat - x0) / 2).square().sum((1, 2, 3))
    kl = common.gaussian_kl(mu.flatten(1), logvar.flatten(1))
    assert torch.allclose(losses[0][0], sse + 0.01 * kl)
    assert row == pytest.approx({"step": 1, "sse": float(sse.mean()), "kl_nats": float(kl.mean())})
    for flip in (False, True):
        bonus.train_autoencoder(tmp_path / str(flip), train | {"vae_flip": flip}, data, CPU)
    assert [flip for _, flip in losses] == [False, False, True]


def test_latents_are_scaled_and_the_autoencoder_is_left_alone(tmp_path, monkeypatch):
    """z ~ q(z|x) of all images, and what the U-Net is trained on, have mean 0 and variance 1 in each channel. This is
    undone before decoding. While the U-Net is trained, the autoencoder keeps its bits and needs no gradient. The log
    holds the loss."""
    data, seen, built = images_of(150), [], []
    monkeypatch.setattr(common, "native_bfloat16", lambda device: False)
    simple_loss, frozen = common.Diffusion.simple_loss, common.frozen
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda *args: seen.append(
        (args[2], simple_loss(*args))) or seen[-1][1])
    monkeypatch.setattr(common, "frozen", lambda *args: built.append(frozen(*args)) or built[-1])
    ae_state = bonus.train_autoencoder(tmp_path / "ae", tiny(), data, CPU)
    state = bonus.train_latent(tmp_path / "latent", tiny(every=8), ae_state, data, CPU)
    assert len(built) == 2 and all(not p.requires_grad and p.grad is None for net in built for p in net.parameters())
    assert same(dict(built[-1].state_dict()), ae_state["autoencoder"])
    assert same(state["autoencoder"], ae_state["autoencoder"]) and same(state["scale"], ae_state["scale"])
    latents, losses = zip(*seen, strict=True)
    assert state["log"] == [pytest.approx({"step": 8, "v_mse": float(torch.stack(losses).detach().mean())})]

    model, stats = bonus.load_model(state, CPU), ae_state["scale"]
    autoencoder, unet = model.networks
    assert same(dict(autoencoder.state_dict()), state["autoencoder"]) and same(dict(unet.state_dict()), state["unet"])
    assert model.denoiser(None, None) is unet and model.shape == (4, 8, 8)
    mu, sd = bonus.encode_all(autoencoder, data.images, CPU)
    assert mu.shape == (150, 4, 8, 8) and not torch.allclose(stats["sd"], torch.ones(1), atol=0.05)
    scale = lambda z: (z - stats["mean"]) / stats["sd"]  # noqa: E731
    drawn = scale(mu + sd * common.randn(mu.shape, common.generator(0)))
    for z, slack in ((drawn, 0.03), (torch.cat(latents), 0.06)):
        assert z.shape[1:] == (4, 8, 8) and torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=slack)
        assert torch.allclose(z.var((0, 2, 3)), torch.ones(4), atol=slack + 0.02)
    assert model.diffusion.start == 1000  # there is no x_hat to begin with
    with torch.no_grad():
        assert torch.allclose(model.decode(scale(mu[:5])), autoencoder.decode(mu[:5]), atol=1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_latents_of_mirrored_images(mirrored, tmp_path, monkeypatch):
    """The U-Net is trained on the latents of the images and, if they are mirrored at all, of their mirror images."""
    data, given, training = images_of(10), [], common.Training
    autoencoder = bonus.Autoencoder(16)
    state = {"autoencoder": autoencoder.state_dict(), "scale": {"mean": torch.zeros(1), "sd": torch.ones(1)}}
    monkeypatch.setattr(common, "Training", lambda folder, train, device, images, **how: given.append(images)
                        or training(folder, train, device, images, **how))
    bonus.train_latent(tmp_path, tiny(unet_flip=mirrored, steps=1), state, data, CPU)
    both = torch.cat([data.images, data.images.flip(3)])
    mu, sd = bonus.encode_all(autoencoder, both if mirrored else data.images, CPU)
    assert torch.allclose(given[0], torch.cat([mu, sd], 1), atol=1e-5)


def test_what_is_decoded():
    """Latents are not clamped, unlike images. The noise of the robustness table is added before they are decoded."""
    decoded = []
    model = common.Model("latent", CPU, (4, 8, 8), common.Diffusion("v"),  # where v is 0, the predicted x0 is a x_t
                         denoiser=lambda x_hat, z: lambda x, t: torch.zeros_like(x),
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
    """The peak memory is that of tensors that exist at once, not of all. The median of the seconds leaves out the first
    two runs and ignores a slow one."""
    def run():
        a, b = torch.ones(2 * 2**20), torch.ones(2 * 2**20)
        del a, b
        torch.ones(2 * 2**20)

    assert bonus.peak_memory(run, CPU) == pytest.approx(16, rel=0.02)
    clock = iter([0, 9, 9, 18, 18, 19, 19, 20, 20, 80, 80, 82, 82, 85])  # the runs take 9, 9, 1, 1, 60, 2 and 3
    monkeypatch.setattr(bonus.time, "perf_counter", lambda: next(clock))
    assert bonus.median_seconds(lambda: None, CPU, repeats=5) == 2


def test_sampling_cost_by_hand(tmp_path, monkeypatch):
    """With planted times for a pass of the U-Net, for decoding and for a training step: seconds per image are those of
    all steps and of decoding, over the size of the batch. A 3x3 convolution of 2 to 4 channels at 5x5 has 2 x 4 x 2 x 9
    x 25 FLOPs; decoding is another one, of 3 to 1 channels."""
    seen, counts = [], []

    class Network(torch.nn.Conv2d):
        def forward(self, x, t=None):
            kind = "decode" if t is None else "train" if torch.is_grad_enabled() else "unet"
            seen.append((kind, len(x)))
            counts.append(seen[-1])
            return super().forward(x)

    def planted_seconds(run, device, repeats=7):
        seen.clear()
        run()
        (kind, count), = seen
        return {"unet": 1 + 2 * count, "decode": 30 + count, "train": 7 * count}[kind]

    def planted_memory(run, device):
        seen.clear()
        run()
        return 100.0 * seen[0][1] if seen[0][0] == "unet" else None

    monkeypatch.setattr(bonus, "median_seconds", planted_seconds)
    monkeypatch.setattr(bonus, "peak_memory", planted_memory)
    model, code = SimpleNamespace(reduced=False), torch.zeros(6, 3, 5, 5)
    for train_batch, used in ((4, 4), (10, 6)):  # a training step cannot use more images than there are
        unet, decode = Network(2, 4, 3, padding=1).requires_grad_(False), Network(3, 1, 3, padding=1)
        cost = bonus.sampling_cost("toy", model, unet, (2, 5, 5), decode, code, 20, train_batch, tmp_path)
        assert cost == pytest.approx({
            "seconds_per_image_batch_1": 20 * 3 + 31, "seconds_per_image": (20 * 13 + 36) / 6, "peak_memory_mb": 600,
            "train_seconds_per_image": 7, "gflops_per_pass": 3600e-9, "gflops_per_image": (20 * 3600 + 1350) * 1e-9})
        assert [count for kind, count in counts if kind == "train"] == [used]
        counts.clear()
    assert "conv2d" in (tmp_path / "profile-toy.txt").read_text()


def test_savings_by_hand(tmp_path, monkeypatch):
    """Both costs are of the same steps, batches and settings: of stage 1's U-Net, which has 6 channels, with its VAE's
    decoder, and of this stage's U-Net and decoder. The saving is 100 (1 - latent / pixel) percent. A cost that
    the device does not show, 0, has none."""
    train, calls = tiny(batch=7), {}
    keys = ("seconds_per_image_batch_1", "seconds_per_image", "peak_memory_mb", "train_seconds_per_image",
            "gflops_per_pass", "gflops_per_image")

    def planted(name, **given):
        calls[name] = given
        return dict(zip(keys, (8, 4, 0, 10, 5, 1) if name == "pixel" else (4, 3, 0, 1, 10, 0.25), strict=True))

    unet = bonus.build_unet(train)
    model = common.Model("latent", CPU, (4, 8, 8), None, (bonus.Autoencoder(16), unet), decode=lambda z: z)
    setup = SimpleNamespace(evaluation={"sample_steps": 9, "batch": 5})
    monkeypatch.setattr(bonus, "sampling_cost", planted)
    result = bonus.savings(tmp_path, model, train, setup)
    saved = dict(zip(keys[:2] + keys[3:], (50, 25, 90, -100, 75), strict=True))
    assert result["saved_percent"] == pytest.approx(saved) and (tmp_path / "savings.png").is_file()
    assert list(result["pixel"].values()) == [8, 4, 0, 10, 5, 1] and result["latent"]["gflops_per_pass"] == 10
    assert (result["device"], result["sampler_steps"], result["batch"]) == ("cpu", 9, 5)
    for name, shape, code in (("pixel", (6, 32, 32), (5, 8)), ("latent", (4, 8, 8), (5, 4, 8, 8))):
        given = calls[name]
        assert given["model"] is model and given["unet_shape"] == shape and given["code"].shape == code
        assert (given["steps"], given["train_batch"], given["folder"]) == (9, 7, tmp_path)
        assert given["unet"].stem.in_channels == shape[0] and given["decode"](given["code"]).shape[0] == 5
    assert calls["latent"]["unet"] is unet and calls["latent"]["decode"] is model.decode
    assert isinstance(calls["pixel"]["decode"], common.Decoder)


def test_ceiling_by_hand(tmp_path, monkeypatch):
    """Held-out images, decoded from the means of their latents, are scored and compared with themselves."""
    torch.manual_seed(0)
    data, test, saved = images_of(30), images_of(30, seed=2), []
    model = common.Model("latent", CPU, (4, 8, 8), None, (bonus.Autoencoder(16), None))
    setup = SimpleNamespace(data=data, test=test, evaluation={"count": 20}, device=CPU,
                            score=lambda images: {"fd": images.double().square().mean()})
    monkeypatch.setattr(common, "save_grid", lambda path, rows: saved.append((path, rows)))
    result = bonus.ceiling(tmp_path, model, setup)
    real = test.images[:20]
    with torch.no_grad():
        x_hat = common.to_uint8(model.networks[0].decode(model.networks[0].encode(common.to_float(real))[0]))
    mse = ((x_hat.double() - real) / 255).square().mean((1, 2, 3))
    assert result == {"fd": x_hat.double().square().mean(), "psnr_db": pytest.approx(float(-10 * mse.log10().mean())),
                      "hf_energy": pytest.approx(fid.hf_energy(x_hat, test.images))}
    (path, rows), = saved
    assert path == tmp_path / "reconstructions.png"
    assert torch.equal(rows["real"], real[:12]) and torch.equal(rows["autoencoder"], x_hat[:12])
