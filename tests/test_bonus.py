"""Bonus: training, scaling of the latent, no gradient into the autoencoder, sampling, what is measured."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, denoiser_of, evened, expect_error, images_of, same, settings

import bonus_latent as bonus
import common
import fid


def tiny(**changes):
    """The settings of the smoke budget for the autoencoder and the U-Net on latents."""
    return settings(**{"ae_width": 16, "latent_unet": [[1, 16, 1, 1]]} | changes)


def test_autoencoder_training_by_hand(tmp_path, monkeypatch):
    """The loss of the first step is SSE + 0.01 KL, and the log holds its two terms. There are `vae_steps` steps. Images
    are mirrored as `vae_flip` says."""
    losses, step, train, data = [], common.Training.step, tiny(vae_steps=1), images_of(60)
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
    undone before decoding. While the U-Net is trained, for `unet_steps` steps, the autoencoder keeps its bits and needs
    no gradient. The loss of each noise level is divided by its mean over all 1,000 times; the log holds the undivided
    one. The autoencoder's seconds are the U-Net's seconds before."""
    data, seen, built, losses_of_steps, step = images_of(150), [], [], [], common.Training.step
    simple_loss, frozen = common.Diffusion.simple_loss, common.frozen
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda *args: seen.append(
        (args[2], simple_loss(*args), args[3])) or seen[-1][1])
    monkeypatch.setattr(common, "frozen", lambda *args: built.append(frozen(*args)) or built[-1])
    monkeypatch.setattr(common.Training, "step", lambda training, loss, terms: losses_of_steps.append(loss) or step(
        training, loss, terms))
    ae_state = bonus.train_autoencoder(tmp_path / "ae", tiny(vae_steps=7), data, CPU)
    losses_of_steps.clear()
    state = bonus.train_latent(tmp_path / "latent", tiny(vae_steps=7, every=8), ae_state, data, CPU)
    assert [found["seconds_before"] for found in (ae_state, state)] == [0, ae_state["seconds"]]
    assert len(built) == 2 and all(not p.requires_grad and p.grad is None for net in built for p in net.parameters())
    assert same(dict(built[-1].state_dict()), ae_state["vae"])
    assert same(state["vae"], ae_state["vae"]) and same(state["scale"], ae_state["scale"])
    latents, losses, times = zip(*seen, strict=True)
    assert len(losses_of_steps) == 8 and torch.allclose(losses_of_steps[0], evened(losses[0], times[0], 1000))
    assert not torch.allclose(losses_of_steps[0], losses[0], rtol=1e-3)
    assert state["log"] == [pytest.approx({"step": 8, "v_mse": float(torch.stack(losses).detach().mean())})]

    model, stats = bonus.load_model(state, CPU), ae_state["scale"]
    autoencoder, unet = model.networks
    assert same(dict(autoencoder.state_dict()), state["vae"]) and same(dict(unet.state_dict()), state["unet"])
    assert model.denoiser_for(None, None, None) is unet and model.shape == (4, 8, 8)
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
    state = {"vae": autoencoder.state_dict(), "scale": {"mean": torch.zeros(1), "sd": torch.ones(1)},
             "seconds": 1.0}
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
                         denoiser_for=denoiser_of(lambda x, x_hat: torch.zeros_like(x)),
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


def test_peak_memory():
    """It is that of tensors that exist at once, not of all."""
    def run():
        a, b = torch.ones(2 * 2**20), torch.ones(2 * 2**20)
        del a, b
        torch.ones(2 * 2**20)

    assert bonus.peak_memory(run, CPU) == pytest.approx(16, rel=0.02)


class Network(torch.nn.Conv2d):
    """A 3x3 convolution, as a U-Net or as a decoder, and a list of what its calls are for, and of how many images."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1)
        self.calls = []

    def forward(self, x, t=None):
        assert t is None or t.tolist() == [500] * len(x)
        self.calls.append(("decode" if t is None else "unet", len(x), torch.is_autocast_enabled("cpu")))
        return super().forward(x)


def planted_sampler(inputs, outputs, channels, reduced=False):
    """A CostProbe of 6 images of 5x5, with a frozen U-Net of so many input and output channels, whose decoding makes
    `channels` from 3, and a list of the calls of both."""
    unet, decode = Network(inputs, outputs).requires_grad_(False), Network(3, channels)
    decode.calls = unet.calls
    return bonus.CostProbe(unet, (inputs, 5, 5), decode, torch.zeros(6, 3, 5, 5), reduced), unet.calls


@pytest.mark.parametrize("reduced", [False, True])
def test_parts_of_sampling(reduced, tmp_path):
    """A pass of the U-Net, and decoding, of so many images, in the precision of the model. The profile shows a pass."""
    sampler, calls = planted_sampler(2, 4, 1, reduced)
    sampler.evaluate_unet(4)
    sampler.decode_codes(5)
    assert calls == [("unet", 4, reduced), ("decode", 5, reduced)] and len(sampler.x.unique()) == 300
    bonus.write_profile(tmp_path / "profile.txt", sampler, 6)
    assert calls[2:] == [("unet", 6, reduced)] and "conv2d" in (tmp_path / "profile.txt").read_text()


def test_all_costs_by_hand(monkeypatch):
    """With planted times for a pass of each U-Net and for decoding, in which both samplers are timed together. Seconds
    per image are those of all steps and of decoding, over the size of the batch; the memory is that of a pass or of
    decoding, whichever needs more, which here is the pass of the first and the decoding of the second. A 3x3
    convolution of 2 to 4 channels at 5x5 has 2 x 4 x 2 x 9 x 25 FLOPs; decoding is another one, of 3 to 1 channels. The
    second sampler has other channels, and takes ten times as long."""
    planted = {name: planted_sampler(*channels) for name, channels in (("pixel", (2, 4, 1)), ("latent", (1, 2, 5)))}
    samplers = {name: sampler for name, (sampler, _) in planted.items()}

    def what(run, calls):  # what a function calls, with how many images
        calls.clear()
        run()
        (kind, count, _), = calls
        return kind, count

    def planted_seconds(runs, device, repeats=7):
        seconds = {}
        for name, run in runs.items():
            kind, count = what(run, planted[name][1])
            seconds[name] = {"unet": 1 + 2 * count, "decode": 30 + count}[kind]
        assert list(runs) == ["pixel", "latent"]
        return {"pixel": seconds["pixel"], "latent": 10 * seconds["latent"]}

    def planted_memory(run, device):
        (name, (kind, count)), = ((name, what(run, calls)) for name, (sampler, calls) in planted.items()
                                  if run.func in (sampler.evaluate_unet, sampler.decode_codes))
        return {"pixel": {"unet": 100.0, "decode": 60.0}, "latent": {"unet": 7.0, "decode": 9.0}}[name][kind] * count

    monkeypatch.setattr(common, "time_in_turn", planted_seconds)
    monkeypatch.setattr(bonus, "peak_memory", planted_memory)
    costs = bonus.all_costs(samplers, {"pixel": 20, "latent": 15}, 6)
    assert costs["pixel"] == pytest.approx({
        "seconds_per_image_batch_1": 20 * 3 + 31, "seconds_per_image": (20 * 13 + 36) / 6, "peak_memory_mb": 600,
        "gflops_per_pass": 3600e-9, "gflops_per_image": (20 * 3600 + 1350) * 1e-9})
    assert costs["latent"] == pytest.approx({
        "seconds_per_image_batch_1": 10 * (15 * 3 + 31), "seconds_per_image": 10 * (15 * 13 + 36) / 6,
        "peak_memory_mb": 54, "gflops_per_pass": 900e-9, "gflops_per_image": (15 * 900 + 6750) * 1e-9})


def test_savings_by_hand(tmp_path, monkeypatch):
    """Both costs are of the same steps, batches, settings and precision: of stage 1's U-Net, which has 6 channels, with
    its VAE's decoder, and of this stage's U-Net and decoder. From x_hat there are no more steps than times. The saving
    is 100 (1 - latent / pixel) percent. A cost that the device does not show, 0, has none. Each U-Net has a profile, of
    a whole batch."""
    train, calls, profiles = tiny() | {"start": 7}, [], []
    keys = ("seconds_per_image_batch_1", "seconds_per_image", "peak_memory_mb", "gflops_per_pass", "gflops_per_image")

    def planted(samplers, steps, batch):
        calls.append((samplers, steps, batch))
        return {name: dict(zip(keys, values, strict=True)) for name, values in (
            ("pixel", (8, 4, 0, 5, 1)), ("latent", (4, 3, 0, 10, 0.25)))}

    unet = bonus.build_latent_unet(train)
    model = common.Model("latent", CPU, (4, 8, 8), None, (bonus.Autoencoder(16), unet), decode=lambda z: z,
                         reduced=True)
    setup = SimpleNamespace(evaluation={"sample_steps": 9, "batch": 5})
    monkeypatch.setattr(bonus, "all_costs", planted)
    monkeypatch.setattr(bonus, "write_profile", lambda *args: profiles.append(args))
    result = bonus.savings(tmp_path, model, train, setup)
    saved = dict(zip(keys[:2] + keys[3:], (50, 25, -100, 75), strict=True))
    assert result["saved_percent"] == pytest.approx(saved)
    assert list(result["pixel"].values()) == [8, 4, 0, 5, 1] and result["latent"]["gflops_per_pass"] == 10
    assert (result["device"], result["sampler_steps"], result["batch"]) == ("cpu", 9, 5)
    (samplers, *numbers), = calls
    assert list(samplers) == ["pixel", "latent"] and numbers == [{"pixel": 7, "latent": 9}, 5]
    assert profiles == [(tmp_path / f"profile-{name}.txt", samplers[name], 5) for name in samplers]
    for name, shape, code in (("pixel", (6, 32, 32), (5, 8)), ("latent", (4, 8, 8), (5, 4, 8, 8))):
        sampler = samplers[name]
        assert sampler.x.shape == (5, *shape) and sampler.code.shape == code and sampler.reduced
        assert sampler.unet.stem.in_channels == shape[0] and sampler.decode(sampler.code).shape[0] == 5
    assert samplers["latent"].unet is unet and samplers["latent"].decode is model.decode
    assert isinstance(samplers["pixel"].decode, common.Decoder)


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
                      "images": 20, "hf_energy": pytest.approx(fid.hf_energy(x_hat, test.images))}
    (path, rows), = saved
    assert path == tmp_path / "reconstructions.png"
    assert torch.equal(rows["real"], real[:12]) and torch.equal(rows["autoencoder"], x_hat[:12])


def test_settings_that_change_nothing_are_refused(capsys):
    """They would name a run without changing it."""
    for change in ("beta=0.5", "start=300", "pool=true", "guidance=1", "components=3", "tied=true", "flow_steps=5"):
        flags = ["--budget", "smoke", "--device", "cpu", "--set", change]
        key = change.split("=")[0]
        expect_error(capsys, lambda flags=flags: bonus.main(flags), f"--set {key}:", "nothing in this run")
