"""Stage 1: formulations, gradients, training (same bits, resume), sampling, bad input, a smoke run of everything."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import common
import fid
import stage1_baseline as stage1

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
draw_all = common.draw_shapes


def small_shapes(count, seed):
    """A twentieth of the built-in data set: 1000 training and 200 test images."""
    return draw_all(count // 20, seed)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Commands run in an empty folder, on few images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "draw_shapes", small_shapes)


def settings(**changes):
    """The smoke budget's training settings, changed."""
    train, _ = common.budget("smoke", "shapes", 32)
    return {"dataset": "shapes", "image_size": 32, "budget": "smoke", "seed": 0} | train | changes


def images_of(count, seed=1):
    images, labels, factors = draw_all(count, seed)
    return common.ImageData(images, labels, factors, "shapes", "train", "none", "")


def train_both(home, train, data, variant="form1", resume=False):
    """Train the VAE and a refiner; returns both checkpoints."""
    vae = stage1.train_vae(home / "stage1-vae-s0", train, data, CPU, resume)
    return vae, stage1.train_refiner(home / f"stage1-{variant}-s0", variant, train, vae, data, CPU, resume)


def same(a, b):
    """Whether two nested structures hold the same bits; `seconds` (the clock) is left out."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def expect_error(capsys, argv, *words):
    """The command must exit with status 2 and print one line `error: ...` that contains every word."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        stage1.main(argv)
    assert stop.value.code == 2
    text = capsys.readouterr().err.replace("\x1b[A", "")  # tqdm's cursor movements
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip() and "%|" not in line]  # progress bars apart
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(word in lines[0] for word in words), lines[0]


def refuse(*args, **options):
    raise AssertionError("training must not start")


# --- Losses and the two formulations ---------------------------------------------------------------------------------


def test_vae_loss_is_in_unit_range_and_nats():
    """sse = sum of squared errors of images in [0, 1]; the KL is torch.distributions'; loss = sse + beta KL."""
    torch.manual_seed(0)
    vae = common.build_vae(settings())
    x0, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, vae.latent_dim)
    loss, sse, kl = stage1.vae_loss(vae, x0, noise, 0.7)
    mu, logvar = vae.encoder(x0)
    x_hat = vae.decoder(mu + (0.5 * logvar).exp() * noise)
    unit = lambda x: (x + 1) / 2  # noqa: E731
    assert torch.allclose(sse, (unit(x_hat) - unit(x0)).square().sum((1, 2, 3)), rtol=1e-4)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    exact = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1)
    assert torch.allclose(kl, exact, rtol=1e-4, atol=1e-5) and torch.allclose(loss, sse + 0.7 * kl)
    assert x_hat.min() >= -1 and x_hat.max() <= 1


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_simple_loss(objective):
    """An oracle loses nothing; a network that answers 0 loses the mean square of eps, or of v = a eps - s x0."""
    diffusion, gen = common.Diffusion(objective), common.generator(0)
    x0, eps, t = common.randn((2, 3, 4, 4), gen), common.randn((2, 3, 4, 4), gen), torch.tensor([1, 600])
    a, s = diffusion.factors(t)
    target = eps if objective == "eps" else a * eps - s * x0
    seen = []
    loss = diffusion.simple_loss(lambda xt, t: seen.append((xt, t)) or target, x0, t, eps)
    assert loss.tolist() == [0, 0] and torch.allclose(seen[0][0], a * x0 + s * eps) and torch.equal(seen[0][1], t)
    loss = diffusion.simple_loss(lambda xt, t: 0 * xt, x0, t, eps)
    assert torch.allclose(loss, target.square().mean((1, 2, 3)))


def test_the_input_is_the_only_difference():
    """uncond sees y; form1 cat(y, x_hat); form2 cat(y + x_hat, x_hat): the same t, the output untouched."""
    y, x_hat, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([3, 900])
    seen = []

    def unet(x, time):
        seen.append((x, time))
        return x[:, :3] * 2

    expected = {"uncond": y, "form1": torch.cat([y, x_hat], 1), "form2": torch.cat([y + x_hat, x_hat], 1)}
    for variant, shown in expected.items():
        seen.clear()
        out = stage1.condition(unet, x_hat, variant, common.Diffusion())(y, t)
        assert torch.equal(seen[0][0], shown) and torch.equal(seen[0][1], t) and torch.equal(out, shown[:, :3] * 2)


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_guess_is_the_regression_on_x_t(objective):
    """Of x0 ~ N(x_hat, sd^2) the target less the guess has mean 0, sd guess_sd and no correlation with x_t: nothing
    linear is left to predict. Monte Carlo of 100,000 draws at each of six times; 5 standard errors are 0.016."""
    diffusion, gen, sd = common.Diffusion(objective, residual_sd=0.2), common.generator(0), 0.2
    x_hat = torch.full((6, 1, 1, 100_000), 0.4)
    x0 = x_hat + sd * common.randn(x_hat.shape, gen)
    t, eps = torch.tensor([1, 20, 100, 300, 700, 1000]), common.randn(x0.shape, gen)
    xt = diffusion.q_sample(x0, t, eps)
    left = ((diffusion.target(x0, t, eps) - diffusion.guess(xt, x_hat, t)) / diffusion.guess_sd(t)).flatten(1)
    noise = (xt.flatten(1) - xt.flatten(1).mean(1, keepdim=True)) / xt.flatten(1).std(1, keepdim=True)
    assert left.mean(1).abs().max() < 0.016 and (left.std(1) - 1).abs().max() < 0.016
    assert (left * noise).mean(1).abs().max() < 0.016


@pytest.mark.parametrize("variant", ["form1", "form2"])
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_a_silent_network_samples_the_guess(variant, objective):
    """Where the U-Net says 0, the guess is the exact denoiser of N(x_hat, sd^2), and DDIM on all steps draws from it;
    the loss on such data is 1."""
    diffusion, gen = common.Diffusion(objective, residual_sd=0.2), common.generator(0)
    x_hat = torch.tensor([-0.5, 0.1, 0.3])[:, None, None, None].expand(3, 3, 60, 60)
    denoise = stage1.condition(lambda x, t: torch.zeros_like(x[:, :3]), x_hat, variant, diffusion)
    x = common.sample(diffusion, denoise, common.randn(x_hat.shape, gen), "ddim", 1000, clamp=False)
    rest = (x - x_hat).flatten(1)
    assert rest.mean(1).abs().max() < 0.01 and (rest.std(1) / 0.2 - 1).abs().max() < 0.02
    x0 = x_hat + 0.2 * common.randn(x_hat.shape, gen)
    loss = diffusion.simple_loss(denoise, x0, torch.tensor([5, 100, 900]), common.randn(x0.shape, gen))
    assert loss == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("variance,steps", [("fixedlarge", 1000), ("fixedsmall", 20)])
def test_formulation_2_is_formulation_1_after_the_shift(variance, steps):
    """The published Formulation 2, written out in x_t = y_t + x_hat: x_T = x_hat + noise,
    x0 = (x_t - x_hat - sqrt(1 - A_t) eps) / sqrt(A_t) clamped, posterior mean c1 x0 + c2 x_t + (1 - c2) x_hat, and
    x_hat subtracted at the end, must give what `condition(..., "form2")` and the plain process in y give."""
    torch.manual_seed(0)
    unet = nn.Conv2d(6, 3, 3, padding=1).double()
    predict = lambda x, t: unet(x) * torch.cos(t / 300.0)[:, None, None, None]  # noqa: E731 - a random eps-network
    diffusion, gen = common.Diffusion("eps"), common.generator(0)
    diffusion.signal, diffusion.noise = diffusion.alpha_bar.sqrt(), (1 - diffusion.alpha_bar).sqrt()  # in float64
    x_hat, x_T = (common.randn((2, 3, 5, 5), gen).double() for _ in range(2))
    denoise = stage1.condition(predict, x_hat, "form2", diffusion)
    y = common.sample(diffusion, denoise, x_T, "ddpm", steps, common.generator(1))

    bar, grid, noise = diffusion.alpha_bar, common.time_grid(1000, steps), common.generator(1)
    x = x_hat + x_T
    with torch.no_grad():
        for t, s in zip(grid[:0:-1], grid[-2::-1], strict=True):
            eps = predict(torch.cat([x, x_hat], 1), torch.full((2,), t))
            x0 = ((x - x_hat - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()).clamp(-1, 1)
            beta = 1 - bar[t] / bar[s]
            c1, c2 = bar[s].sqrt() * beta / (1 - bar[t]), (bar[t] / bar[s]).sqrt() * (1 - bar[s]) / (1 - bar[t])
            x = c1 * x0 + c2 * x + (1 - c2) * x_hat
            if s > 0:
                sigma2 = beta if variance == "fixedlarge" else beta * (1 - bar[s]) / (1 - bar[t])
                x = x + sigma2.sqrt() * common.randn(x.shape, noise)
    assert torch.allclose(x - x_hat, y, atol=1e-8)


def test_formulation_2_ddim_after_the_shift():
    """DDIM (eta 0) in x_t: sqrt(A_s) x0 + sqrt(1 - A_s) eps + x_hat, minus x_hat at the end."""
    torch.manual_seed(0)
    unet, diffusion, gen = nn.Conv2d(6, 3, 3, padding=1), common.Diffusion("eps"), common.generator(0)
    x_hat, x_T = common.randn((2, 3, 5, 5), gen), common.randn((2, 3, 5, 5), gen)
    denoise = stage1.condition(lambda x, t: unet(x), x_hat, "form2", diffusion)
    y = common.sample(diffusion, denoise, x_T, "ddim", 15, clamp=False, spacing="quadratic")
    x, bar, grid = x_hat + x_T, diffusion.alpha_bar, common.time_grid(1000, 15)
    with torch.no_grad():
        for t, s in zip(grid[:0:-1], grid[-2::-1], strict=True):
            eps = unet(torch.cat([x, x_hat], 1))
            x0 = (x - x_hat - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()
            x = (bar[s].sqrt() * x0 + (1 - bar[s]).sqrt() * eps + x_hat).float()
    assert torch.allclose(x - x_hat, y, rtol=1e-3, atol=1e-3)


# --- Training --------------------------------------------------------------------------------------------------------


def test_vae_overfits_one_batch():
    """On eight images without noise the squared error must fall to a third within 150 steps."""
    torch.manual_seed(0)
    vae, x0 = common.build_vae(settings()), common.to_float(draw_all(8, 1)[0])
    noise = torch.zeros(8, vae.latent_dim)
    optimizer = torch.optim.Adam(vae.parameters(), lr=5e-3)
    history = []
    for _ in range(150):
        loss, sse, _ = stage1.vae_loss(vae, x0, noise, 0.0)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 200.0)
        optimizer.step()
        history.append(sse.mean().item())
    assert history[-1] < history[0] / 3, history[::30]


@pytest.mark.parametrize("variant", ["uncond", "form1", "form2"])
def test_refiner_overfits_one_batch(variant):
    """With one fixed x0, eps and t the error must fall to a tenth of its start (the target's mean square, as the
    output starts at zero)."""
    torch.manual_seed(0)
    unet, diffusion, gen = stage1.build_unet(settings(), variant), common.Diffusion("v"), common.generator(0)
    x0, eps, t = common.to_float(draw_all(1, 1)[0]), common.randn((1, 3, 32, 32), gen), torch.tensor([400])
    denoise = stage1.condition(unet, 0.5 * x0, variant, diffusion)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    history = []
    for _ in range(100):
        loss = diffusion.simple_loss(denoise, x0, t, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] == pytest.approx(float(diffusion.target(x0, t, eps).square().mean()), rel=1e-5)
    assert history[-1] < history[0] / 10, history[::30]


def test_vae_gets_no_gradient_from_the_refiner(tmp_path, monkeypatch):
    """In train_refiner the VAE keeps its bits, has no gradient and is in evaluation mode; the U-Net has gradients."""
    built, restore, build_unet = {}, common.restore, stage1.build_unet
    monkeypatch.setattr(common, "restore", lambda *a: built.setdefault("vae", restore(*a)))
    monkeypatch.setattr(stage1, "build_unet", lambda *a: built.setdefault("unet", build_unet(*a)))
    train, data = settings(steps=3, every=1), images_of(64)
    vae_state = stage1.train_vae(tmp_path / "vae", train, data, CPU, False)
    built.clear()
    state = stage1.train_refiner(tmp_path / "form1", "form1", train, vae_state, data, CPU, False)
    vae, unet = built["vae"], built["unet"]
    assert all(p.grad is None and not p.requires_grad for p in vae.parameters()) and not vae.training
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
    assert same(dict(vae.state_dict()), vae_state["ema"]) and same(state["vae"], vae_state["ema"])
    assert same(state["gmm"], vae_state["gmm"])


def test_times_and_posterior_samples_of_training(tmp_path, monkeypatch):
    """t = ceil(T u^p) lies in 1..T, with mean T / (p + 1) + 1/2; x_hat is a fresh posterior sample at every step."""
    times, x_hats, condition = [], [], stage1.condition
    loss = common.Diffusion.simple_loss
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda d, f, x0, t, eps:
                        times.append(t) or loss(d, f, x0, t, eps))
    monkeypatch.setattr(stage1, "condition", lambda u, x_hat, *a: x_hats.append(x_hat) or condition(u, x_hat, *a))
    data = images_of(1)
    data.images = data.images.expand(40, 3, 32, 32)  # one image: x_hat differs by the posterior sample alone
    train_both(tmp_path, settings(batch=32, steps=25), data)
    t = torch.cat(times)
    assert t.min() >= 1 and t.max() <= 1000
    deviation = 1000 * (1 / 4 - 1 / 2.5**2) ** 0.5 / len(t) ** 0.5  # Var[u^1.5] = 1/4 - 1/2.5^2
    assert float(t.double().mean()) == pytest.approx(400.5, abs=4 * deviation)
    assert len(x_hats) == 25 and not torch.equal(x_hats[0], x_hats[1]) and not torch.equal(x_hats[0][0], x_hats[0][1])


def test_same_seed_same_bits(tmp_path):
    """Two trainings with one seed agree in every tensor of both checkpoints and in the logs; another seed does not."""
    data, train = images_of(200), settings()
    a, b = (train_both(tmp_path / name, train, data) for name in "ab")
    c = train_both(tmp_path / "c", train | {"seed": 1}, data)
    assert same(a, b) and not same(a[0]["ema"], c[0]["ema"]) and not same(a[1]["ema"], c[1]["ema"])
    for folder in ("stage1-vae-s0", "stage1-form1-s0"):
        assert (tmp_path / "a" / folder / "log.csv").read_text() == (tmp_path / "b" / folder / "log.csv").read_text()
    assert all(state["finished"] and state["step"] == train["steps"] for state in a)
    assert common.read_log(tmp_path / "a" / "stage1-form1-s0" / "log.csv")["step"] == [4, 8]


DRAWING = {"dropout": 0.2, "flip": "both", "every": 3}  # settings under which every kind of random draw is made


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """A run's folder and its two checkpoints."""
    home = tmp_path_factory.mktemp("whole")
    return home, train_both(home, settings(**DRAWING), images_of(100))


@pytest.mark.parametrize("stop,where", [(signal.SIGTERM, 1), (signal.SIGTERM, 6), (signal.SIGTERM, 8),
                                        (signal.SIGTERM, 13), (signal.SIGINT, 10)])
def test_stopped_and_resumed_is_never_stopped(stop, where, never_stopped, tmp_path, monkeypatch, capsys):
    """A signal after update `where` (1..8: of the VAE, 9..16: of the refiner) saves, exits with 128 + its number, and
    --resume ends with the bits and the log of a run that was never stopped. Dropout and flips are on: they draw too."""
    (home, whole), data, train = never_stopped, images_of(100), settings(**DRAWING)
    updates, update = [], common.EMA.update

    def stop_there(ema, network):
        update(ema, network)
        updates.append(1)
        if len(updates) == where:
            os.kill(os.getpid(), stop)

    monkeypatch.setattr(common.EMA, "update", stop_there)
    with pytest.raises(SystemExit) as exit_:
        train_both(tmp_path / "cut", train, data)
    assert exit_.value.code == 128 + stop and "--resume" in capsys.readouterr().err
    folder = tmp_path / "cut" / ("stage1-vae-s0" if where <= 8 else "stage1-form1-s0")
    assert common.load_checkpoint(folder / "checkpoint.pt")["step"] == (where - 1) % 8 + 1
    if where != 8:
        with pytest.raises(SystemExit) as exit_:  # unfinished, without --resume
            train_both(tmp_path / "cut", train, data)
        assert exit_.value.code == 2
    torch.manual_seed(123)  # the resumed run must not depend on what the process did before
    resumed = train_both(tmp_path / "cut", train, data, resume=True)
    assert same(whole, resumed) and len(updates) == 16
    for name in ("stage1-vae-s0", "stage1-form1-s0"):
        assert (tmp_path / "cut" / name / "log.csv").read_text() == (home / name / "log.csv").read_text()


def without_scores():
    """Take the scores out of the command and most of the images, and write a checkpoint every 0.2 seconds."""
    common.draw_shapes = lambda count, seed: draw_all(count // 100, seed)
    fid.load_extractor = lambda *a: SimpleNamespace(name="none", suffix="_local")
    fid.reference = lambda *a: None
    common.evaluate = lambda folder, *a: {"run": {"variant": folder.name}, "rows": [], "tables": {}}
    common.write_metrics = lambda *a: None
    stage1.time = SimpleNamespace(time=lambda: 300 * time.time())


LONGER = ["--budget", "smoke", "--variant", "form1", "--batch-size", "8", "--resume", "--device", "cpu"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed(kills, tmp_path, monkeypatch):
    """The command in processes of its own: SIGTERM while the VAE trains (status 143), SIGKILL at random moments while
    the refiner does; the last --resume ends with every bit and log row of a run that was never stopped."""
    steps, rng = 60 * kills, random.Random(0)
    longer = [*LONGER, "--steps", str(steps)]
    program = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import conftest, test_stage1 as t; "
    program += f"t.without_scores(); t.stage1.main([*{longer}, '--out', 'cut'])"
    folders = [tmp_path / "cut" / "shapes-smoke" / f"stage1-{name}-s0" for name in ("vae", "form1")]
    for folder, number in [(folders[0], signal.SIGTERM)] + kills * [(folders[1], signal.SIGKILL)]:
        path, before = folder / "checkpoint.pt", None
        if path.is_file():
            before = path.stat().st_mtime_ns
        process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not path.is_file() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(number)
        assert process.wait() == (143 if number == signal.SIGTERM else -9)
        state = common.load_checkpoint(path)
        assert 0 < state["step"] < steps and not state["finished"]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)

    for module, name in ((common, "draw_shapes"), (fid, "load_extractor"), (fid, "reference"), (common, "evaluate"),
                         (common, "write_metrics"), (stage1, "time")):
        monkeypatch.setattr(module, name, None)  # so that what `without_scores` sets is undone afterwards
    without_scores()
    stage1.main([*longer, "--out", str(tmp_path / "whole")])
    for folder in folders:
        other = tmp_path / "whole" / "shapes-smoke" / folder.name
        cut, whole = (common.load_checkpoint(f / "checkpoint.pt") for f in (folder, other))
        assert same(cut, whole) and cut["finished"] and cut["step"] == steps
        assert (folder / "log.csv").read_text() == (other / "log.csv").read_text()


def test_memory_stays_flat(tmp_path):
    """500 steps more need no more memory: nothing is kept from step to step. (What the process holds, in pages.)"""
    held = []

    def watch(ema, network, update=common.EMA.update):
        update(ema, network)
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.EMA, "update", watch)
        stage1.train_vae(tmp_path / "stage1-vae-s0", settings(steps=600, batch=8), images_of(40), CPU, False)
    assert len(held) == 600 and held[-1] - held[99] < 8  # MB; one batch's activations alone are more than 1


def test_killed_while_evaluating(tmp_path):
    """SIGTERM during evaluation loses no training: the same command then only evaluates."""
    program = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import conftest, test_stage1 as t; "
    program += "t.without_scores(); t.common.evaluate = {}; t.stage1.main([*t.LONGER, '--steps', '4'])"
    wait = "lambda *a: (print('evaluating', flush=True), t.time.sleep(60))"
    process = subprocess.Popen([sys.executable, "-c", program.format(wait)], cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "evaluating\n"
    process.terminate()
    assert process.wait() == -signal.SIGTERM
    refuse = "t.common.evaluate; t.stage1.fit = t.refuse; t.common.print_results = lambda *a: print('done')"
    done = subprocess.run([sys.executable, "-c", program.format(refuse)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_compile_reaches_the_networks_that_were_asked_for(monkeypatch):
    """--compile: encoder, decoder and U-Net, wherever they are; without it none. Parameters keep their names."""
    compiled, parts = [], nn.ModuleDict({"vae": common.build_vae(settings()), "unet": common.build_unet(settings(), 6)})
    monkeypatch.setattr(nn.Module, "compile", lambda part: compiled.append(type(part).__name__))
    common.compile_networks(parts, settings())
    assert compiled == []
    common.compile_networks(parts, settings(compile=True))
    assert compiled == ["Encoder", "Decoder", "UNet"]


@pytest.mark.slow
def test_compiled_training_is_the_same_within_float_error(tmp_path):
    """Needs a C++ compiler on a CPU: VAE and refiner, compiled and not, have the same losses in each of a few steps."""
    for flag in (False, True):
        train_both(tmp_path / str(flag), settings(steps=3, every=1, compile=flag), images_of(40))
    for name in ("stage1-vae-s0", "stage1-form1-s0"):
        plain, fast = (common.read_log(tmp_path / str(flag) / name / "log.csv") for flag in (False, True))
        for column, losses in plain.items():
            assert fast[column] == pytest.approx(losses, rel=1e-2), column  # fused, bfloat16 rounds less often


def test_fewer_steps_than_a_log_interval(tmp_path):
    """--steps 1..5 with a log row every 4 steps: there is a row to draw and report."""
    for steps, rows in ((1, [1]), (3, [3]), (5, [4])):
        folder, train = tmp_path / str(steps), settings(steps=steps)
        stage1.train_vae(folder, train, images_of(40), CPU, False)
        last, log = common.draw_training(folder), common.read_log(folder / "log.csv")
        assert log["step"] == rows and set(last) == {"sse", "kl_nats"} and all(map(math.isfinite, last.values()))
        assert 50 < last["sse"] < 1000  # a mean over the steps since the last row, whatever their number


def test_a_loss_that_is_not_finite_names_itself(tmp_path, capsys):
    """A rate far too high ends in one line that names the run, the term and the step."""
    train = settings(vae_lr=1e30, vae_clip=0.0, steps=12, every=2)
    with pytest.raises(SystemExit) as stop:
        stage1.train_vae(tmp_path / "stage1-vae-s0", train, images_of(40), CPU, False)
    line = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "error" in line][-1]
    assert stop.value.code == 2 and all(word in line for word in ("error: ", "stage1-vae-s0", "sse", "step"))


# --- Sampling --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One short training of the VAE and the three refiners, their U-Nets' last layer made to matter."""
    home, train, data = tmp_path_factory.mktemp("trained"), settings(), images_of(200)
    vae = stage1.train_vae(home / "stage1-vae-s0", train, data, CPU, False)
    states = {"vae": vae}
    for variant in ("uncond", "form1", "form2"):
        states[variant] = stage1.train_refiner(home / f"stage1-{variant}-s0", variant, train, vae, data, CPU, False)
    return states


def test_a_checkpoint_alone_rebuilds_its_model(trained):
    """Weights of U-Net and VAE, GMM, objective and size come from the checkpoint; sampling works and repeats itself."""
    for variant, state in trained.items():
        model = stage1.load_model(state, variant, CPU)
        assert (model.unet is None) == (variant == "vae") and (model.vae is None) == (variant == "uncond")
        if model.unet is not None:
            assert same(dict(model.unet.state_dict()), state["ema"])
            assert model.diffusion.objective == state["train"]["objective"]
        if model.vae is not None:
            assert same(dict(model.vae.state_dict()), trained["vae"]["ema"])
        networks = [n for n in (model.vae, model.unet) if n is not None]
        assert not any(n.training or p.requires_grad for n in networks for p in n.parameters())
        a, b = (common.generate(model, 5, "gaussian", "dpm", 3, 0, 5) for _ in range(2))
        assert torch.equal(a[1], b[1]) and a[1].shape == (5, 3, 32, 32) and a[1].dtype == torch.uint8
        other = common.generate(model, 5, "gaussian", "dpm", 3, 1, 5)
        assert not torch.equal(a[1], other[1])


def spy(model):
    """Replace a form1 model's U-Net by one that remembers its inputs; returns the list."""
    seen = []

    def unet(x, t):
        seen.append(x.clone())
        return torch.zeros_like(x[:, :3])

    model.unet = unet
    return seen


def test_same_z_and_x_T_for_every_sampler_count_and_damage(trained):
    """Image k starts from the same x_hat and x_T whatever the sampler, the number of steps and of images; damage
    changes x_hat alone, a stretched z too."""
    def start(sampler="dpm", steps=2, count=8, batch=4, **damage):
        model = stage1.load_model(trained["form1"], "form1", CPU)
        seen = spy(model)
        common.generate(model, count, "gaussian", sampler, steps, 0, batch, **damage)
        first = torch.cat(seen[::steps])[:count]  # the first U-Net call of each batch
        return first[:, :3], first[:, 3:]

    x_T, x_hat = start()
    for options in ({"sampler": "ddpm", "steps": 5}, {"sampler": "ddim", "steps": 1}, {"steps": 7}):
        assert all(map(torch.equal, start(**options), (x_T, x_hat)))
    fewer = start(count=5)
    assert torch.equal(fewer[0], x_T[:5]) and torch.equal(fewer[1], x_hat[:5])
    assert not torch.equal(x_T[:4], x_T[4:])  # the second batch has its own draws
    for damage in ({"corrupt": common.add_noise(0.1)}, {"corrupt": common.blur}, {"stretch": 1.3}):
        damaged = start(**damage)
        assert not torch.equal(damaged[1], x_hat)
        assert torch.equal(damaged[0], x_T), damage


def test_temperature_is_the_sd_of_x_T(trained, tmp_path):
    """It scales x_T and nothing else; `temperatures` draws the same images at each and leaves the model as it was."""
    model, starts = stage1.load_model(trained["form1"], "form1", CPU), []
    seen = spy(model)

    def draw():
        seen.clear()
        x_hat, images, _ = common.generate(model, 4, "gaussian", "dpm", 2, 0, 4)
        starts.append(seen[0])
        return {"nfe": 2}, x_hat, images

    model.temperature = 0.7
    rows = common.temperatures(tmp_path, model, draw)
    used = [row["temperature"] for row in rows]
    assert used == [0.7, 0.8, 0.85, 0.9, 0.95, 1.0] and model.temperature == 0.7
    for value, start in zip(used, starts, strict=True):
        assert torch.allclose(start[:, :3], value * starts[-1][:, :3]) and torch.equal(start[:, 3:], starts[-1][:, 3:])
    with Image.open(tmp_path / "temperature.png") as image:
        assert image.height == 7 * (32 * 3 + 2)  # the VAE's images and six temperatures


def test_corruptions():
    """Noise has the stated sd; the blur keeps constants and brightness and spreads a point to a variance of 1 pixel."""
    x_hat, gen = torch.zeros(20, 3, 32, 32), common.generator(0)
    assert float(common.add_noise(0.2)(x_hat, gen).std()) == pytest.approx(0.2, rel=0.02)
    assert torch.allclose(common.blur(x_hat + 0.3, gen), x_hat + 0.3, atol=1e-6)
    point = torch.zeros(1, 3, 33, 33)
    point[:, :, 16, 16] = 1
    blurred = common.blur(point, gen)[0, 0]
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    assert float((blurred.sum(0) * (torch.arange(33) - 16.0) ** 2).sum()) == pytest.approx(1, rel=0.05)


def test_encode_samples_the_posterior(trained):
    """z - mu has the posterior's sd: (z - mu) / sd is standard normal, whatever the batch size."""
    vae = stage1.load_model(trained["vae"], "vae", CPU).vae
    images = draw_all(300, 5)[0]
    z, mu, logvar = common.encode(vae, images, common.generator(0), CPU)
    white = (z - mu) / (0.5 * logvar).exp()
    assert abs(float(white.mean())) < 0.1 and float(white.std()) == pytest.approx(1, abs=0.06)
    again = common.encode(vae, images, common.generator(0), CPU, batch=7)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip((z, mu, logvar), again, strict=True))


def test_the_mixture_is_fitted_to_several_draws_of_few_images(trained):
    """Ten z of each of 200 images: the mixture is that of these 2,000 numbers, and gives other images' z a density no
    lower than one fitted to a single z of each."""
    train, (images, *_), (others, *_) = settings(), draw_all(200, 5), draw_all(500, 6)
    vae = stage1.load_model(trained["vae"], "vae", CPU).vae
    z = common.encode(vae, others, common.generator(9), CPU)[0]
    many = common.GaussianMixture(**common.fit_mixture(vae, images, train, CPU))
    one = common.GaussianMixture.fit(common.encode(vae, images, common.generator(2), CPU)[0], 2, 0)
    assert float(many.log_prob(z).mean()) > float(one.log_prob(z).mean())


def test_spacing_figure_has_the_numbers_of_the_lesson(tmp_path):
    """Exact denoiser of fine detail: 25 uniform steps keep a small part of its energy, 25 quadratic ones most of it
    (DPM-Solver++ over nine tenths); with all 1000 steps both grids are one and nearly exact."""
    lines = stage1.draw_spacing(tmp_path / "spacing.png")
    kept = {label: dict(zip(*points, strict=True)) for label, points in lines.items()}
    assert kept["ddim, uniform"][25] < 0.2 and kept["ddim, quadratic"][25] > 0.65
    assert kept["dpm, uniform"][25] < 0.2 and kept["dpm, quadratic"][25] > 0.9
    for sampler in ("ddim", "dpm"):
        uniform, quadratic = kept[f"{sampler}, uniform"], kept[f"{sampler}, quadratic"]
        assert uniform[1000] == quadratic[1000] == pytest.approx(1, abs=0.1)
        assert all(abs(1 - quadratic[n]) < abs(1 - uniform[n]) for n in (10, 25, 50))
    assert (tmp_path / "spacing.png").is_file()


# --- Evaluation ------------------------------------------------------------------------------------------------------


def test_bits_per_dim_is_the_sum_of_its_parts(trained):
    """bound = L_T + sum KL_t + L_0 (+ the VAE's KL where there is one), in bits per dimension; none for a VAE alone."""
    evaluation = {"bits_images": 6, "bits_draws": 3}
    images = draw_all(10, 5)[0]
    for variant, state in trained.items():
        bits = common.bits_per_dim(stage1.load_model(state, variant, CPU), images, evaluation, 0)
        if variant == "vae":
            assert bits is None
            continue
        parts = {"prior", "diffusion", "data"} | ({"kl"} if variant != "uncond" else set())
        assert set(bits) == parts | {"bound", "images"} and bits["images"] == 6
        assert bits["bound"]["value"] == pytest.approx(sum(bits[name] for name in parts), rel=1e-4)
        assert bits["bound"]["low"] < bits["bound"]["value"] < bits["bound"]["high"]
    again = common.bits_per_dim(stage1.load_model(trained["form1"], "form1", CPU), images, evaluation, 0)
    vae = stage1.load_model(trained["vae"], "vae", CPU).vae
    _, mu, logvar = common.encode(vae, images[:6], common.generator(0), CPU)
    exact = common.gaussian_kl(mu, logvar).mean() / (3072 * math.log(2))
    assert again["kl"] == pytest.approx(float(exact), rel=0.05)  # reduced precision there, float32 here


def test_verdicts():
    """Collapse, underfitting, a smooth decoder and neither are told apart."""
    gen = common.generator(0)
    spread, flat = common.randn((500, 20), gen), 0.01 * common.randn((500, 20), gen)
    small, large = torch.full((500, 20), -4.0), torch.zeros(500, 20)
    assert "collapse" in common.diagnose(flat, large, 0.1)["verdict"]
    assert "prior" in common.diagnose(spread, large, 0.1)["verdict"]
    assert "Gaussian decoder" in common.diagnose(spread, small, 0.1)["verdict"]
    report = common.diagnose(spread, small, 0.9)
    assert "not overly smooth" in report["verdict"]
    assert report["active_units"] == report["latent_dim"] == 20
    assert report["posterior_variance"] == pytest.approx(math.exp(-4))


def test_network_cost_counts_what_a_variant_uses():
    """Parameters agree with the built networks; uncond has no VAE, vae no U-Net."""
    train = settings()
    for variant, names in (("vae", {"vae"}), ("uncond", {"unet"}), ("form1", {"vae", "unet"})):
        cost = stage1.network_cost(train, variant)
        assert set(cost) == names and all(c["gflops"] > 0 for c in cost.values())
        if "unet" in names:
            unet = stage1.build_unet(train, variant)
            assert cost["unet"]["parameters"] == sum(p.numel() for p in unet.parameters())


# --- The command: bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv,words", [
    (["--variant", "form3"], ["--variant", "form3"]),
    (["--prior", "flow"], ["--prior", "flow"]),
    (["--dataset", "imagenet"], ["--dataset", "imagenet"]),
    (["--steps", "0"], ["--steps 0"]),
    (["--batch-size", "-1"], ["--batch-size -1"]),
    (["--sample-steps", "1001"], ["--sample-steps 1001", "1000"]),
    (["--eval-samples", "3"], ["--eval-samples 3"]),
    (["--temperature", "-0.5"], ["--temperature -0.5"]),
    (["--device", "cuda:99"], ["--device cuda:99"]),
    (["--device", "toaster"], ["--device toaster"]),
    (["--out", "file/runs"], ["--out", "file/runs"]),
    (["--dataset", "folder", "--data-dir", "nowhere"], ["--data-dir", "nowhere"]),
    (["--dataset", "folder", "--data-dir", "empty"], ["--data-dir", "empty"]),
    (["--dataset", "cifar10", "--data-dir", "empty"], ["--dataset cifar10", "empty", "--data-dir"]),
    (["--dataset", "celeba64", "--data-dir", "empty"], ["--dataset celeba64", "empty", "--data-dir"]),
    (["--dataset", "folder", "--data-dir", "text"], ["text", "00.png"]),
])
def test_bad_input_stops_before_any_training(argv, words, small, tmp_path, monkeypatch, capsys):
    """One line that names the flag or file, status 2, no training, no run folder. (The feature network is a stub.)"""
    def offline(*args):
        raise OSError("no network")

    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i:02}.png").write_text("this is not an image")
    monkeypatch.setattr(common, "download", offline)
    monkeypatch.setattr(stage1, "fit", refuse)
    monkeypatch.setattr(fid, "load_extractor", lambda *a: SimpleNamespace(name="stub", suffix="_local"))
    expect_error(capsys, ["--budget", "smoke", *argv], *words)
    assert not list(tmp_path.rglob("config.json"))


def test_inception_without_weights(small, tmp_path, monkeypatch, capsys):
    """No file, no cache, no network: an error before any training that names the flag and what to do."""
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(stage1, "fit", refuse)
    argv = ["--budget", "smoke", "--features", "inception"]
    expect_error(capsys, argv, "--weights", "--features local")
    expect_error(capsys, [*argv, "--weights", "absent.pth"], "absent.pth")
    (tmp_path / "wrong.pth").write_bytes(b"wrong")
    expect_error(capsys, [*argv, "--weights", "wrong.pth"], "wrong.pth")


def test_local_features_that_are_not_there(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "FEATURES_DIR", tmp_path / "features")
    monkeypatch.setattr(stage1, "fit", refuse)
    expect_error(capsys, ["--budget", "smoke"], "--features local", "shapes")


# --- The command: smoke runs -----------------------------------------------------------------------------------------

SMOKE = ["--budget", "smoke", "--variant", "all", "--device", "cpu"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One smoke run of all four variants, with the pinned feature network, on few images; its folder."""
    home = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(common, "draw_shapes", small_shapes)
        stage1.main(SMOKE)
    return home


def test_smoke_writes_everything(smoke):
    """Each variant: a metrics file that meets the schema, the rows that were asked for, its figures."""
    figures = {"vae": {"samples", "ranked", "robustness", "reconstructions", "training"},
               "uncond": {"samples", "ranked", "speed", "spacing", "steps", "temperature", "training"},
               "form1": {"samples", "ranked", "speed", "spacing", "steps", "robustness", "reconstructions",
                         "temperature", "training"}}
    figures["form2"] = figures["form1"]
    for variant in stage1.VARIANTS:
        folder = smoke / "runs" / "shapes-smoke" / f"stage1-{variant}-s0"
        metrics = json.loads((folder / "metrics.json").read_text())
        common.check_metrics(metrics)
        run, rows, tables = metrics["run"], metrics["rows"], metrics["tables"]
        assert run["variant"] == f"stage1-{variant}" and run["stage"] == "stage1" and run["n_real"] == 1000
        assert run["train_images"] == 8 * 32 and run["features"].startswith("local-shapes-")
        assert (rows[0]["sampler"], rows[0]["nfe"]) == (("none", 0) if variant == "vae" else ("dpm", 4))
        assert rows[0]["prior"] == ("none" if variant == "uncond" else "gmm") and rows[0]["n_generated"] == 64
        if variant != "vae":
            assert [(row["sampler"], row["nfe"]) for row in rows[-2:]] == [("dpm", 2), ("dpm", 4)]
        assert {path.stem for path in folder.glob("*.png")} == figures[variant]
        for path in folder.glob("*.png"):
            with Image.open(path) as image:
                image.load()
                assert min(image.size) > 50
        assert (tables["bits_per_dim"] is None) == (variant == "vae")
        assert ("robustness" in tables) == ("latent" in tables) == (variant != "uncond")
        assert {path.name for path in folder.glob(".*")} <= {".lock"}
    assert not list((smoke / "runs" / "shapes-smoke").glob("*/*.tmp"))


def test_smoke_again_reuses(smoke, monkeypatch, capsys):
    """The same command trains and evaluates nothing, and prints the table and the pictures' paths again."""
    monkeypatch.chdir(smoke)
    monkeypatch.setattr(common, "draw_shapes", small_shapes)
    monkeypatch.setattr(stage1, "fit", refuse)
    monkeypatch.setattr(common, "evaluate", refuse)
    clock = time.time()
    stage1.main(SMOKE)
    assert time.time() - clock < 10
    out = capsys.readouterr().out
    assert all(f"stage1-{variant}" in out for variant in stage1.VARIANTS)
    assert "hf_energy" in out and "samples.png" in out and "metrics.json" in out


def test_other_evaluation_settings_evaluate_again_without_training(smoke, monkeypatch):
    """--sample-steps 3 and --temperature 0.9 ask for another headline: evaluated, not trained."""
    monkeypatch.chdir(smoke)
    monkeypatch.setattr(common, "draw_shapes", small_shapes)
    monkeypatch.setattr(stage1, "fit", refuse)
    seen = []
    monkeypatch.setattr(fid, "reference", lambda *a: None)
    monkeypatch.setattr(common, "evaluate", lambda folder, model, state, evaluation, *a: seen.append(
        (model.name, evaluation["sample_steps"], evaluation["temperature"])) or {
            "run": {"variant": model.name}, "rows": [], "tables": {}})
    monkeypatch.setattr(common, "write_metrics", lambda *a: None)
    stage1.main(["--budget", "smoke", "--variant", "form1", "--sample-steps", "3", "--temperature", "0.9",
                 "--device", "cpu"])
    assert seen == [("form1", 3, 0.9)]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_other_training_settings_are_refused(resume, smoke, monkeypatch, capsys):
    """The key that differs is named with both values, before any training."""
    monkeypatch.chdir(smoke)
    monkeypatch.setattr(common, "draw_shapes", small_shapes)
    monkeypatch.setattr(stage1, "fit", refuse)
    expect_error(capsys, [*SMOKE, *resume, "--steps", "9"], "steps was 8, is now 9", "--out")


def test_damaged_checkpoint_is_named(small, tmp_path, monkeypatch, capsys):
    """Cut in half: one line that names the file and the remedy."""
    monkeypatch.setattr(fid, "load_extractor", lambda *a: SimpleNamespace(name="stub", suffix="_local"))
    monkeypatch.setattr(fid, "reference", lambda *a: None)
    monkeypatch.setattr(common, "evaluate", lambda *a: {"run": {"variant": "vae"}, "rows": [], "tables": {}})
    monkeypatch.setattr(common, "write_metrics", lambda *a: None)
    argv = ["--budget", "smoke", "--variant", "vae", "--device", "cpu"]
    stage1.main(argv)
    path = tmp_path / "runs" / "shapes-smoke" / "stage1-vae-s0" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    for flag in ([], ["--resume"]):
        expect_error(capsys, argv + flag, "checkpoint.pt", "remove")


@pytest.mark.parametrize("dataset,size,unet,vae", [("cifar10", 32, 35.75, 9.24), ("celeba64", 64, 78.70, 14.01)])
def test_dry_run_prints_the_published_networks(dataset, size, unet, vae, small, tmp_path, capsys):
    """One JSON object with the settings and the paper's networks, within 1%; no data needed, nothing written."""
    stage1.main(["--dataset", dataset, "--budget", "paper", "--dry-run"])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"settings", "networks"} and set(printed["settings"]) == {"train", "eval"}
    for name, millions in (("unet", unet), ("vae", vae)):
        assert printed["networks"][name]["parameters"] / 1e6 == pytest.approx(millions, rel=0.01)
        assert printed["networks"][name]["gflops"] > 1
    train = printed["settings"]["train"]
    assert train["image_size"] == size and train["attention"] == [16] and train["objective"] == "eps"
    assert not list(tmp_path.iterdir())


def test_the_script_starts_as_a_command(tmp_path):
    """--dry-run in a process of its own, from another folder: status 0 and one JSON object."""
    done = subprocess.run([sys.executable, str(ROOT / "stage1_baseline.py"), "--dry-run"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["settings"]["train"]["dataset"] == "shapes"
    assert not list(tmp_path.iterdir())
