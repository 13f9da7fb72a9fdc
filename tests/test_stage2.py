"""Stage 2: where the gradients go, the four losses, the guard, resume, interpolation and probes, a smoke run."""

import json
import math
import os
import signal

import pytest
import torch
from test_stage1 import CPU, expect_error, images_of, same, settings, small_shapes

import common
import fid
import stage1_baseline as stage1
import stage2_joint as stage2


def joint(**changes):
    return settings() | {"loss": "sum", "gradient": "full", "diffusion_weight": 1.0} | changes


def parts(gradient, weight=1.0):
    """Gradients of a small VAE after one step's backward pass, and what the diffusion term alone gives."""
    torch.manual_seed(0)
    vae, unet = common.build_vae(settings()), common.build_unet(settings(), 6)
    torch.nn.init.normal_(unet.out.weight, std=0.1)  # the published start, zero, would send no gradient to x_hat
    diffusion, gen = common.Diffusion("v", residual_sd=0.2), common.generator(0)
    x0, eps = common.to_float(images_of(4).images), common.randn((4, 3, 32, 32), gen)
    x_hat, mu, logvar = vae(x0, common.randn((4, vae.latent_dim), gen))
    cut, t = x_hat.detach().requires_grad_(), torch.tensor([5, 100, 400, 900])
    diffusion.simple_loss(stage2.condition(unet, cut, diffusion), x0, t, eps).mean().backward()
    sse, kl = stage2.elbo_terms(x0, x_hat, mu, logvar)
    elbo, pull = (sse + kl).mean(), weight * cut.grad
    names = [name for name, _ in vae.named_parameters()]
    alone = torch.autograd.grad(elbo, list(vae.parameters()), retain_graph=True)
    pulled = torch.autograd.grad(x_hat, list(vae.parameters()), pull, retain_graph=True)
    stage2.spread_gradients(vae, elbo, x_hat, pull, gradient)
    return {name: (p.grad, a, b) for name, p, a, b in zip(names, vae.parameters(), alone, pulled, strict=True)}


# --- Where the gradients go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["full", "decoder", "none"])
def test_the_diffusion_term_reaches_as_far_as_it_should(gradient):
    """full: ELBO + diffusion everywhere; decoder: the encoder gets the ELBO's alone; none: everything does."""
    reached = {"encoder": False, "decoder": False}
    for name, (total, elbo, diffusion) in parts(gradient, weight=20.0).items():
        network = name.split(".")[0]
        expected = elbo + diffusion if gradient == "full" or gradient == network else elbo
        assert torch.allclose(total, expected, rtol=1e-4, atol=1e-5), name
        reached[network] |= not torch.allclose(total, elbo, rtol=1e-3)
    assert reached == {"encoder": gradient == "full", "decoder": gradient != "none"}


@pytest.fixture
def handed_on(monkeypatch):
    """What train_joint hands to spread_gradients, with a refiner whose loss is the mean square of x_hat itself (before
    the division by guess_sd)."""
    seen, spread = [], stage2.spread_gradients
    monkeypatch.setattr(stage2, "condition", lambda unet, x_hat, *_: lambda x, t: x_hat + 0 * unet(
        x.repeat(1, 2, 1, 1), t))
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda d, f, x0, t, eps: (
        f(x0, t) / d.guess_sd(t)).square().flatten(1).mean(1))
    monkeypatch.setattr(stage2, "spread_gradients", lambda *a: seen.append(a) or spread(*a))
    return seen


@pytest.mark.parametrize("loss,weight", [("sum", 7.0), ("anneal", 0.01), ("uncertainty", None)])
def test_pull_is_the_gradient_of_the_weighted_sum(loss, weight, handed_on, tmp_path):
    """For M = mean square of x_hat, lambda D M has the gradient 2 lambda x_hat / B at x_hat."""
    train = joint(loss=loss, diffusion_weight=weight, steps=1)
    stage2.train_joint(tmp_path, train, images_of(60), CPU, False)
    (_, elbo, x_hat, pull, _), = handed_on
    assert torch.allclose(pull, 2 * (weight or 1) * x_hat / len(x_hat), rtol=1e-3, atol=1e-6)
    log = common.read_log(tmp_path / "log.csv")
    assert float(elbo) == pytest.approx(log["sse"][0] + train["beta"] * log["kl_nats"][0], rel=1e-4)


def test_the_refiner_does_not_feel_lambda(tmp_path):
    """With the VAE held still, lambda 0.01 and 100 give the same U-Net bit for bit; with it moving, another VAE."""
    data, states = images_of(60), {}
    for rate in (0.0, 1e-3):
        for weight in (0.01, 100.0):
            train = joint(diffusion_weight=weight, vae_lr=rate, steps=4)
            states[rate, weight] = stage2.train_joint(tmp_path / f"{rate}-{weight}", train, data, CPU, False)
    assert same(states[0.0, 0.01]["weights"]["unet"], states[0.0, 100.0]["weights"]["unet"])
    assert not same(states[1e-3, 0.01]["weights"]["vae"], states[1e-3, 100.0]["weights"]["vae"])


def test_gradient_none_with_a_still_vae_is_stage_1(tmp_path):
    """From equal weights and seeds the refiner's losses of 5 steps agree with stage 1's within 1e-6, relative."""
    data, train = images_of(60), joint(gradient="none", vae_lr=0.0, steps=5, every=1)
    stage2.train_joint(tmp_path / "joint", train, data, CPU, False)
    torch.manual_seed(train["seed"])
    vae = common.build_vae(train)
    frozen = {"ema": vae.state_dict(), "gmm": {}}
    stage1.train_refiner(tmp_path / "form1", "form1", train, frozen, data, CPU, False)
    ours, theirs = (common.read_log(tmp_path / name / "log.csv")["v_mse"] for name in ("joint", "form1"))
    assert len(ours) == 5 and ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("change", [{"diffusion_weight": 0.0}, {"gradient": "none"}])
def test_no_diffusion_term_is_the_plain_vae(change, tmp_path):
    """sum with weight 0, and --gradient none, train the VAE that the ELBO alone trains on the same draws."""
    data, train = images_of(60), joint(steps=4, **change)
    state = stage2.train_joint(tmp_path / "joint", train, data, CPU, False)
    torch.manual_seed(0)
    vae = common.build_vae(train).to(memory_format=torch.channels_last)
    optimizer, gen = torch.optim.Adam(vae.parameters(), lr=train["vae_lr"], fused=True), common.generator(1)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = common.learning_rate(train["vae_lr"], step, 4, train["warmup"], True)
        x0 = common.to_float(data.images[torch.randint(60, (32,), generator=gen)])
        noise = common.randn((32, vae.latent_dim), gen)
        torch.rand(32, generator=gen), common.randn(x0.shape, gen)
        with common.autocast(CPU):
            loss = stage1.vae_loss(vae, x0.contiguous(memory_format=torch.channels_last), noise, train["beta"])[0]
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), train["vae_clip"])
        optimizer.step()
    for name, tensor in vae.state_dict().items():
        assert torch.allclose(tensor, state["weights"]["vae"][name], rtol=1e-4, atol=1e-6), name


# --- The losses ------------------------------------------------------------------------------------------------------


def offset_oracle(diffusion, x0, offset):
    """A denoiser whose prediction of x0 is off by `offset` at every t: its KL_t and L_0 are numbers."""
    def denoise(xt, t):
        a, s = diffusion.factors(t)
        return (a * xt - (x0 + offset)) / s  # v such that a xt - s v = x0 + offset
    return denoise


def test_bound_is_the_sum_of_its_parts():
    """Summed over t with the probabilities it was drawn by, the estimate is L_T + sum KL_t + L_0 of the evaluation."""
    diffusion = common.Diffusion("v", T=40)
    images = images_of(1).images[:, :, 12:20, 12:20].clamp(20, 235)  # no clamping of x0 + offset
    x0 = common.to_float(images)
    exact = common.diffusion_nats(diffusion, offset_oracle(diffusion, x0, 0.05), images, 39, common.generator(0))
    t = torch.arange(1, 41)
    many = x0.expand(40, -1, -1, -1)
    for power in (1.0, 4.0):
        p = stage2.time_probability(t, 40, power)
        assert float(p.sum()) == pytest.approx(1, abs=1e-9)
        nats = stage2.bound_loss(diffusion, offset_oracle(diffusion, many, 0.05), many, t,
                                 common.randn(many.shape, common.generator(1)), power)
        assert float((p * nats).sum()) == pytest.approx(float(sum(exact.values())), rel=1e-4)
        drawn = (40 * torch.rand(20_000, generator=common.generator(2)).double() ** power).long() + 1
        assert torch.allclose(drawn.bincount(minlength=41)[1:].double() / 20_000, p, atol=0.01)


def test_bound_has_no_reconstruction_term(tmp_path, monkeypatch):
    """The VAE's own loss is the KL alone; the rest of its gradient is the bound's, in nats, at x_hat."""
    seen, spread = [], stage2.spread_gradients
    monkeypatch.setattr(stage2, "spread_gradients", lambda *a: seen.append(a) or spread(*a))
    monkeypatch.setattr(stage2, "condition", lambda unet, x_hat, *_: lambda x, t: x_hat + 0 * unet(
        x.repeat(1, 2, 1, 1), t))
    monkeypatch.setattr(stage2, "bound_loss", lambda d, f, x0, t, eps, p: f(x0, t).flatten(1).sum(1))
    train = joint(loss="bound", diffusion_weight=None, t_power=4.0, steps=1)
    stage2.train_joint(tmp_path, train, images_of(60), CPU, False)
    (_, elbo, x_hat, pull, _), = seen
    log = common.read_log(tmp_path / "log.csv")
    assert float(elbo) == pytest.approx(log["kl_nats"][0], rel=1e-4) and "bound_per_dim" in log
    assert torch.allclose(pull, torch.full_like(pull, 1 / 32), rtol=1e-3)  # nats per image, mean over the batch
    monkeypatch.undo()
    stage2.train_joint(tmp_path / "real", train | {"steps": 4}, images_of(60), CPU, False)
    assert all(v.isfinite().all() for v in common.load_checkpoint(tmp_path / "real" / "checkpoint.pt")["vae"].values())


def test_anneal_raises_the_weight():
    train = {"loss": "anneal", "diffusion_weight": 1.0, "steps": 100}
    weights = [stage2.diffusion_weight(train, step) for step in range(101)]
    assert weights[0] == pytest.approx(0.01) and weights[30] == pytest.approx(0.1)
    assert weights[60:] == pytest.approx([1.0] * 41) and weights == sorted(weights)
    assert stage2.diffusion_weight(train | {"loss": "sum"}, 0) == 1.0
    assert stage2.diffusion_weight(train | {"diffusion_weight": 0.001}, 0) == pytest.approx(0.001)


def test_uncertainty_learns_the_balance(tmp_path):
    """a and b move towards the logarithms of their losses (which make exp(-a) E + a least) and are logged, clamped."""
    train = joint(loss="uncertainty", diffusion_weight=None, steps=12, every=3)
    state = stage2.train_joint(tmp_path, train, images_of(60), CPU, False)
    log = common.read_log(tmp_path / "log.csv")
    assert log["a"] == sorted(log["a"]) and log["a"][-1] > 0.09 and log["b"][-1] > 0.09  # 12 steps of 0.01
    assert log["weight"][-1] < 1
    state["balance"][:], state["finished"], state["step"] = 7.99, False, 11
    state["optimizers"]["balance"]["state"].clear()
    common.save_checkpoint(tmp_path / "checkpoint.pt", state)
    data = images_of(60)
    data.images[:] = 255 * (data.images % 2)  # a loss far above e^8 would push b further
    state = stage2.train_joint(tmp_path, train, data, CPU, True)
    assert float(state["balance"].max()) <= 8


# --- The guard -------------------------------------------------------------------------------------------------------


def test_guard_by_hand():
    """Silent until 20 steps are known; 10 times the median or not finite: named, counted, lambda raised 10 times."""
    guard, calm = stage2.Guard(), {"vae": 1.0, "unet": 1.0}
    look = lambda elbo=1.0, share=0.1, up=True, **norms: guard.culprit(calm | norms, elbo, share, up)  # noqa: E731
    assert look(vae=1e9) is None  # nothing to compare with yet
    for _ in range(120):
        assert look() is None
    assert look(vae=9.9, unet=9.9) is None and guard.factor == 1
    assert look(vae=10.1) == "the ELBO" and guard.factor == 1.5
    assert look(vae=14.9) is None  # a larger lambda makes larger gradients: the median has grown with it
    assert look(vae=15.1, share=0.9) == "the diffusion term" and look(unet=math.inf, up=False) == "the refiner's loss"
    assert look(vae=math.nan, unet=math.nan, elbo=math.nan, up=False) == "the ELBO"  # x_hat is nan for both
    assert (guard.skipped, guard.in_a_row, guard.factor) == (4, 3, 1.5**2) and len(guard.norms["vae"]) == 100
    assert vars(stage2.Guard(json.loads(json.dumps(vars(guard))))) == vars(guard)
    for _ in range(16):
        look(vae=1e9)
    with pytest.raises(SystemExit):  # the twentieth in a row
        look(vae=1e9)
    assert guard.raised == 10 and guard.factor == 1.5**10


def test_an_injected_fault_is_skipped_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """A loss that is infinite at two steps changes nothing else: no weight becomes NaN, lambda is raised, stored and
    logged; one that stays so stops the run and names the term."""
    calls, loss = [], common.Diffusion.simple_loss

    def broken(diffusion, denoise, x0, t, eps):
        if torch.is_grad_enabled():
            calls.append(1)
        value = loss(diffusion, denoise, x0, t, eps)
        return value * math.inf if len(calls) in (3, 4) and torch.is_grad_enabled() else value

    monkeypatch.setattr(common.Diffusion, "simple_loss", broken)
    state = stage2.train_joint(tmp_path / "two", joint(steps=8, every=4), images_of(60), CPU, False)
    assert state["guard"]["skipped"] == 2 and state["guard"]["raised"] == 2 and state["updates"] == 6
    assert all(v.isfinite().all() for part in ("vae", "ema") for v in state[part].values())
    log = common.read_log(tmp_path / "two" / "log.csv")
    assert log["skipped"] == [2, 2] and log["weight"][-1] == pytest.approx(1.5**2)
    assert "step 3 skipped: the refiner's loss" in capsys.readouterr().out
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda *a: math.nan * loss(*a))
    with pytest.raises(SystemExit) as stop:
        stage2.train_joint(tmp_path / "all", joint(steps=30), images_of(60), CPU, False)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "20 steps in a row" in err and "the refiner's loss" in err


# --- Resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss,where", [("anneal", 3), ("uncertainty", 6)])
def test_stopped_and_resumed_is_never_stopped(loss, where, tmp_path, monkeypatch):
    """SIGTERM after step `where` saves; --resume ends with the bits and the log of a run that was never stopped."""
    weight = {"diffusion_weight": 1.0 if loss == "anneal" else None}
    train, data = joint(loss=loss, dropout=0.2, every=4, **weight), images_of(80)
    updates, update = [], common.EMA.update
    whole = stage2.train_joint(tmp_path / "whole", train, data, CPU, False)

    def stop_there(ema, network):
        update(ema, network)
        updates.append(1)
        if len(updates) == 2 * where:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(common.EMA, "update", stop_there)
        with pytest.raises(SystemExit) as stop:
            stage2.train_joint(tmp_path / "cut", train, data, CPU, False)
    assert stop.value.code == 128 + signal.SIGTERM
    assert common.load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == where
    torch.manual_seed(123)
    assert same(stage2.train_joint(tmp_path / "cut", train, data, CPU, True), whole)
    assert (tmp_path / "cut" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


# --- The latent space ------------------------------------------------------------------------------------------------


def test_paths_end_where_they_should():
    a, b = torch.randn(5, 16), torch.randn(5, 16)
    for path in (stage2.lerp, stage2.slerp):
        assert torch.allclose(path(a, b, 0.0), a, atol=1e-5) and torch.allclose(path(a, b, 1.0), b, atol=1e-5)
        assert torch.allclose(path(a, a, 0.3), a, atol=1e-3)  # no angle between the ends
    e = torch.eye(4)[:2]
    assert torch.allclose(stage2.slerp(e[:1], e[1:], 0.5), (e[:1] + e[1:]) / math.sqrt(2))  # stays on the sphere
    assert torch.allclose(stage2.lerp(e[:1], e[1:], 0.5), (e[:1] + e[1:]) / 2)


def test_smoothness_of_known_paths():
    """A straight even path scores 1 and 1; a detour is longer; a jump is the worst step."""
    line = torch.linspace(0, 1, 5)[:, None] * torch.tensor([3.0, 4.0])
    assert stage2.smoothness(line[None]) == pytest.approx(
        {"path_over_distance": 1, "worst_over_mean_step": 1, "end_distance": 5})
    detour = torch.tensor([[[0.0, 0], [0, 1], [1, 1]]])
    assert stage2.smoothness(detour)["path_over_distance"] == pytest.approx(2 / math.sqrt(2))
    jump = torch.tensor([[[0.0], [0], [0], [1]]])
    assert stage2.smoothness(jump)["worst_over_mean_step"] == pytest.approx(3)
    assert all(math.isfinite(v) for v in stage2.smoothness(torch.ones(2, 4, 3)).values())  # a collapsed decoder


def test_probe_finds_a_planted_factor():
    """A linear factor is read off exactly; noise is not; a noisy factor has the R^2 of its noise."""
    gen = common.generator(0)
    x = common.randn((3000, 12), gen)
    planted = x @ common.randn((12, 1), gen)
    planted = planted / planted.std()
    noise = common.randn((3000, 1), gen)
    y = torch.cat([5 + 3 * planted, noise, planted + noise], 1)
    r2, predicted = stage2.linear_probe(x[:2000], y[:2000], x[2000:], y[2000:])
    assert r2[0] > 0.999 and abs(r2[1]) < 0.05 and r2[2] == pytest.approx(0.5, abs=0.06)
    assert torch.allclose(predicted[:, 0], y[2000:, 0], atol=0.1)


# --- The command -----------------------------------------------------------------------------------------------------

SMOKE = ["--budget", "smoke", "--device", "cpu"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "draw_shapes", small_shapes)


@pytest.mark.parametrize("argv,words", [
    (["--loss", "mean"], ["--loss", "mean"]),
    (["--gradient", "half"], ["--gradient", "half"]),
    (["--diffusion-weight", "-1"], ["--diffusion-weight -1"]),
    (["--loss", "bound", "--gradient", "decoder"], ["--gradient decoder", "bound"]),
    (["--loss", "uncertainty", "--diffusion-weight", "2"], ["--diffusion-weight", "uncertainty"]),
    (["--steps", "0"], ["--steps 0"]),
])
def test_bad_input(argv, words, small, monkeypatch, capsys):
    monkeypatch.setattr(fid, "load_extractor", lambda *a: pytest.fail("nothing may start"))
    monkeypatch.setattr("test_stage1.stage1.main", stage2.main)  # the command under test
    expect_error(capsys, [*SMOKE, *argv], *words)


def test_names():
    name = lambda **changes: stage2.variant_name(joint(**changes))  # noqa: E731
    assert name() == "stage2-sum" and name(diffusion_weight=0.1) == "stage2-sum-w0.1"
    assert name(loss="bound", diffusion_weight=None) == "stage2-bound"
    assert name(loss="anneal", gradient="none") == "stage2-anneal-grad-none"


def test_smoke(small, tmp_path, monkeypatch, capsys):
    """Without stage 1: says which command makes it. With it: both in one table, both latent spaces measured."""
    stage2.main(SMOKE)
    out = capsys.readouterr().out
    assert "python stage1_baseline.py --dataset shapes --budget smoke" in out
    stage1.main([*SMOKE, "--variant", "vae", "form1"])
    stage2.main([*SMOKE, "--loss", "bound"])
    out = capsys.readouterr().out
    assert "stage1-form1" in out and "stage2-bound" in out and "path length over end distance" in out
    for variant in ("stage2-anneal", "stage2-bound"):
        folder = tmp_path / "runs" / "shapes-smoke" / f"{variant}-s0"
        metrics = json.loads((folder / "metrics.json").read_text())
        common.check_metrics(metrics)
        latent = metrics["tables"]["latent_space"]
        assert set(latent) == {"posterior", "slerp", "lerp", "probe_class_accuracy", "probe_r2"}
        assert set(latent["probe_r2"]) == set(common.FACTORS)
        assert latent["slerp"]["refined"]["path_over_distance"] >= 1
        assert metrics["run"]["variant"] == variant and metrics["tables"]["before_refinement"]["hf_energy"]
        assert {"samples", "interpolation", "crops", "training"} <= {path.stem for path in folder.glob("*.png")}
    assert ("latent_space_stage1" in metrics["tables"]) and metrics["run"]["train_images"] == 256
    monkeypatch.setattr(stage2, "look", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(common, "evaluate", lambda *a: pytest.fail("evaluated again"))
    stage2.main([*SMOKE, "--loss", "bound"])


def test_dry_run(small, tmp_path, capsys):
    stage2.main(["--dataset", "celeba64", "--budget", "paper", "--dry-run"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"]["train"]["loss"] == "anneal" and set(printed["networks"]) == {"vae", "unet"}
    assert not list(tmp_path.iterdir())
