"""Stage 1: the losses and the two formulations, what training draws and moves, sampling, the bound, the lesson."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, draw_all, images_of, same, settings
from torch import nn

import common
import stage1_baseline as stage1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of one short training of the VAE and the three refiners."""
    home, train, data = tmp_path_factory.mktemp("trained"), settings(), images_of(200)
    vae = stage1.train_vae(home / "vae", train, data, CPU, False)
    return {"vae": vae} | {variant: stage1.train_refiner(home / variant, variant, train, vae, data, CPU, False)
                           for variant in stage1.VARIANTS[1:]}


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
    diffusion, gen, seen = common.Diffusion(objective), common.generator(0), []
    x0, eps, t = common.randn((2, 3, 4, 4), gen), common.randn((2, 3, 4, 4), gen), torch.tensor([1, 600])
    a, s = diffusion.factors(t)
    target = eps if objective == "eps" else a * eps - s * x0
    loss = diffusion.simple_loss(lambda xt, t: seen.append((xt, t)) or target, x0, t, eps)
    assert loss.tolist() == [0, 0] and torch.allclose(seen[0][0], a * x0 + s * eps) and torch.equal(seen[0][1], t)
    loss = diffusion.simple_loss(lambda xt, t: 0 * xt, x0, t, eps)
    assert torch.allclose(loss, target.square().mean((1, 2, 3)))


def test_the_input_is_the_only_difference():
    """uncond sees y; form1 cat(y, x_hat); form2 cat(y + x_hat, x_hat): the same t, the output untouched."""
    y, x_hat, t, seen = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([3, 900]), []
    unet = lambda x, time: seen.append((x, time)) or x[:, :3] * 2  # noqa: E731
    for variant, shown in (("uncond", y), ("form1", torch.cat([y, x_hat], 1)),
                           ("form2", torch.cat([y + x_hat, x_hat], 1))):
        out = stage1.condition(unet, x_hat, variant, common.Diffusion())(y, t)
        x, time = seen.pop()
        assert torch.equal(x, shown) and torch.equal(time, t) and torch.equal(out, shown[:, :3] * 2)


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


@pytest.mark.parametrize("sampler,steps", [("ddpm", 1000), ("ddpm", 20), ("ddim", 15)])
def test_formulation_2_is_formulation_1_after_the_shift(sampler, steps):
    """The published Formulation 2, written out in x_t = y_t + x_hat: x_T = x_hat + noise,
    x0 = (x_t - x_hat - sqrt(1 - A_t) eps) / sqrt(A_t) clamped, and x_hat subtracted at the end, must give what
    `condition(..., "form2")` and the plain process in y give. DDPM: posterior mean c1 x0 + c2 x_t + (1 - c2) x_hat,
    variance beta on all steps, else beta_tilde; DDIM: sqrt(A_s) x0 + sqrt(1 - A_s) eps + x_hat."""
    torch.manual_seed(0)
    unet = nn.Conv2d(6, 3, 3, padding=1).double()
    predict = lambda x, t: unet(x) * torch.cos(t / 300.0)[:, None, None, None]  # noqa: E731 - a random eps-network
    diffusion, gen = common.Diffusion("eps"), common.generator(0)
    diffusion.signal, diffusion.noise = diffusion.alpha_bar.sqrt(), (1 - diffusion.alpha_bar).sqrt()  # in float64
    x_hat, x_T = (common.randn((2, 3, 5, 5), gen).double() for _ in range(2))
    denoise = stage1.condition(predict, x_hat, "form2", diffusion)
    y = common.sample(diffusion, denoise, x_T, sampler, steps, common.generator(1))

    bar, grid, noise = diffusion.alpha_bar, common.time_grid(1000, steps), common.generator(1)
    x = x_hat + x_T
    with torch.no_grad():
        for t, s in zip(grid[:0:-1], grid[-2::-1], strict=True):
            eps = predict(torch.cat([x, x_hat], 1), torch.full((2,), t))
            x0 = ((x - x_hat - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()).clamp(-1, 1)
            if sampler == "ddim":
                eps = (x - x_hat - bar[t].sqrt() * x0) / (1 - bar[t]).sqrt()  # agrees with the clamped x0
                x = bar[s].sqrt() * x0 + (1 - bar[s]).sqrt() * eps + x_hat
                continue
            beta = 1 - bar[t] / bar[s]
            c1, c2 = bar[s].sqrt() * beta / (1 - bar[t]), (bar[t] / bar[s]).sqrt() * (1 - bar[s]) / (1 - bar[t])
            x = c1 * x0 + c2 * x + (1 - c2) * x_hat
            if s > 0:
                sigma2 = beta if steps == 1000 else beta * (1 - bar[s]) / (1 - bar[t])
                x = x + sigma2.sqrt() * common.randn(x.shape, noise)
    assert torch.allclose(x - x_hat, y, atol=1e-8)


# --- Training --------------------------------------------------------------------------------------------------------


def descend(network, loss_of, steps, lr):
    """Adam on one batch; the history of its loss."""
    optimizer, history = torch.optim.Adam(network.parameters(), lr=lr), []
    for _ in range(steps):
        loss = loss_of().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 200.0)
        optimizer.step()
        history.append(loss.item())
    return history


def test_vae_overfits_one_batch():
    """On eight images without noise the squared error must fall to a third within 100 steps."""
    torch.manual_seed(0)
    vae, x0 = common.build_vae(settings()), common.to_float(draw_all(8, 1)[0])
    history = descend(vae, lambda: stage1.vae_loss(vae, x0, torch.zeros(8, vae.latent_dim), 0.0)[0], 100, 5e-3)
    assert history[-1] < history[0] / 3, history[::30]


@pytest.mark.parametrize("variant", ["uncond", "form1", "form2"])
def test_refiner_overfits_one_batch(variant):
    """With one fixed x0, eps and t the error must fall to a tenth of its start (the target's mean square, as the
    output starts at zero)."""
    torch.manual_seed(0)
    unet, diffusion, gen = stage1.build_unet(settings(), variant), common.Diffusion("v"), common.generator(0)
    x0, eps, t = common.to_float(draw_all(1, 1)[0]), common.randn((1, 3, 32, 32), gen), torch.tensor([400])
    denoise = stage1.condition(unet, 0.5 * x0, variant, diffusion)
    history = descend(unet, lambda: diffusion.simple_loss(denoise, x0, t, eps), 100, 3e-3)
    assert history[0] == pytest.approx(float(diffusion.target(x0, t, eps).square().mean()), rel=1e-5)
    assert history[-1] < history[0] / 10, history[::30]


def test_vae_gets_no_gradient_from_the_refiner(tmp_path, monkeypatch):
    """In train_refiner the VAE keeps its bits, has no gradient and is in evaluation mode; the U-Net has gradients."""
    built, restore, build_unet = {}, common.frozen, stage1.build_unet
    train, data = settings(steps=3, every=1), images_of(64)
    vae_state = stage1.train_vae(tmp_path / "vae", train, data, CPU, False)
    monkeypatch.setattr(common, "frozen", lambda *a: built.setdefault("vae", restore(*a)))
    monkeypatch.setattr(stage1, "build_unet", lambda *a: built.setdefault("unet", build_unet(*a)))
    state = stage1.train_refiner(tmp_path / "form1", "form1", train, vae_state, data, CPU, False)
    vae, unet = built["vae"], built["unet"]
    assert all(p.grad is None and not p.requires_grad for p in vae.parameters()) and not vae.training
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
    assert same(dict(vae.state_dict()), vae_state["vae"]) and same(state["vae"], vae_state["vae"])
    assert same(state["gmm"], vae_state["gmm"])


def test_times_and_posterior_samples_of_training(tmp_path, monkeypatch):
    """t = ceil(T u^p) lies in 1..T, with mean T / (p + 1) + 1/2; x_hat is a fresh posterior sample at every step."""
    times, x_hats, condition, loss = [], [], stage1.condition, common.Diffusion.simple_loss
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda d, f, x0, t, eps:
                        times.append(t) or loss(d, f, x0, t, eps))
    monkeypatch.setattr(stage1, "condition", lambda u, x_hat, *a: x_hats.append(x_hat) or condition(u, x_hat, *a))
    data = images_of(1)
    data.images = data.images.expand(40, 3, 32, 32)  # one image: x_hat differs by the posterior sample alone
    train = settings(batch=32, steps=25)
    vae_state = {"vae": common.build_vae(train).state_dict(), "gmm": {}}
    stage1.train_refiner(tmp_path, "form1", train, vae_state, data, CPU, False)
    t = torch.cat(times)
    assert len(t) == 25 * 32 and t.min() >= 1 and t.max() <= 1000
    deviation = 1000 * (1 / 4 - 1 / 2.5**2) ** 0.5 / len(t) ** 0.5  # Var[u^1.5] = 1/4 - 1/2.5^2
    assert float(t.double().mean()) == pytest.approx(400.5, abs=4 * deviation)
    assert len(x_hats) == 25 and not torch.equal(x_hats[0], x_hats[1]) and not torch.equal(x_hats[0][0], x_hats[0][1])


# --- Sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", stage1.VARIANTS)
def test_a_checkpoint_alone_rebuilds_its_model(variant, trained, monkeypatch):
    """Weights of U-Net and VAE, GMM, objective and size come from the checkpoint; sampling works and repeats itself."""
    networks, restore, state = {}, common.frozen, trained[variant]
    monkeypatch.setattr(common, "frozen", lambda n, *a: networks.setdefault(type(n).__name__, restore(n, *a)))
    model = stage1.load_model(state, variant, CPU)
    assert networks.keys() == {"vae": {"VAE"}, "uncond": {"UNet"}}.get(variant, {"VAE", "UNet"})
    assert model.vae is networks.get("VAE") and (model.denoiser is None) == (variant == "vae")
    assert not any(n.training or p.requires_grad for n in networks.values() for p in n.parameters())
    if model.vae is not None:
        assert same(dict(model.vae.state_dict()), trained["vae"]["vae"]) and set(model.priors) == {"gaussian", "gmm"}
        assert same(vars(model.priors["gmm"]), trained["vae"]["gmm"])
    if model.denoiser is not None:
        unet, train = networks["UNet"], state["train"]
        assert same(dict(unet.state_dict()), state["unet"]) and model.diffusion.objective == train["objective"]
        assert model.diffusion.residual_sd == (0 if variant == "uncond" else train["residual_sd"])
        (x, x_hat), t = torch.randn(2, 1, 3, 32, 32), torch.tensor([500])
        assert torch.equal(model.denoiser(x_hat, None)(x, t),
                           stage1.condition(unet, x_hat, variant, model.diffusion)(x, t))
    a, b, other = (common.generate(model, 5, "gmm", "dpm", 3, seed, 5)[1] for seed in (0, 0, 1))
    assert torch.equal(a, b) and a.shape == (5, 3, 32, 32) and a.dtype == torch.uint8 and not torch.equal(a, other)


def test_same_z_and_x_T_for_every_sampler_count_and_damage(trained):
    """Image k starts from the same x_hat and x_T whatever the sampler, the number of steps and of images; damage
    changes x_hat alone."""
    def start(sampler="dpm", steps=2, count=8, batch=4, corrupt=None):
        model, seen = stage1.load_model(trained["form1"], "form1", CPU), []
        unet = lambda x, t: seen.append(x.clone()) or torch.zeros_like(x[:, :3])  # noqa: E731
        model.denoiser = lambda x_hat, z: stage1.condition(unet, x_hat, "form1", model.diffusion)
        common.generate(model, count, "gaussian", sampler, steps, 0, batch, corrupt)
        first = torch.cat(seen[::steps])[:count]  # the first U-Net call of each batch
        return first[:, :3], first[:, 3:]

    x_T, x_hat = start()
    for options in ({"sampler": "ddpm", "steps": 5}, {"sampler": "ddim", "steps": 1}, {"steps": 7}):
        assert all(map(torch.equal, start(**options), (x_T, x_hat)))
    fewer = start(count=5)
    assert torch.equal(fewer[0], x_T[:5]) and torch.equal(fewer[1], x_hat[:5])
    assert not torch.equal(x_T[:4], x_T[4:])  # the second batch has its own draws
    damaged = start(corrupt=common.add_noise(0.1))
    assert torch.equal(damaged[0], x_T) and float((damaged[1] - x_hat).std()) == pytest.approx(0.1, rel=0.02)


# --- Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["uncond", "form1", "form2"])
def test_bits_per_dim_charges_the_prior_that_is_named(variant, trained):
    """bound = L_T + sum KL_t + L_0 (+ log q(z|x) - log p(z) at one z ~ q where there is a VAE), in bits per dimension.
    So the bounds under two priors differ by the mean difference of their log densities at those z, and under N(0, I)
    the charge is the closed-form KL but for the draw of z: (z - mu)^2 / var against 1, z^2 against mu^2 + var."""
    setup = SimpleNamespace(test=images_of(300, 5), train={"seed": 3}, evaluation={"bits_images": 200, "bits_draws": 2})
    model, unit = stage1.load_model(trained[variant], variant, CPU), 3072 * math.log(2)
    bits = {prior: common.bits_per_dim(model, prior, setup) for prior in ("gaussian", "gmm")}
    parts = {"prior", "diffusion", "data"} | ({"kl"} if variant != "uncond" else set())
    for prior, found in bits.items():
        assert set(found) == parts | {"bound", "images", "latent_prior"}
        assert found["images"] == 200 and found["latent_prior"] == prior
        assert found["bound"]["value"] == pytest.approx(sum(found[name] for name in parts), rel=1e-5)
        assert found["bound"]["low"] < found["bound"]["value"] < found["bound"]["high"]
    if variant == "uncond":
        assert bits["gaussian"]["bound"] == bits["gmm"]["bound"]
        return
    with torch.no_grad(), common.autocast(CPU):
        mu, logvar = model.vae.encoder(common.to_float(setup.test.images[:200]))
    z = mu + (0.5 * logvar).exp() * common.randn(mu.shape, common.generator(60_003))  # the function's own draws
    log_p = {name: float(prior.log_prob(z).mean()) for name, prior in model.priors.items()}
    log_q = float(torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1).mean())
    for name, found in bits.items():
        assert found["kl"] * unit == pytest.approx(log_q - log_p[name], abs=1e-3)
    gap = (log_p["gaussian"] - log_p["gmm"]) / unit
    assert abs(gap * unit) > 0.1  # a bound that charges N(0, I) for both has no gap at all
    assert bits["gmm"]["bound"]["value"] - bits["gaussian"]["bound"]["value"] == pytest.approx(gap, abs=0.01 / unit)
    exact, draw = common.gaussian_kl(mu, logvar), 0.5 * (z**2 - (z - mu) ** 2 / logvar.exp() - mu**2 - logvar.exp() + 1)
    error = 4 * float(draw.sum(1).std()) / 200**0.5
    assert bits["gaussian"]["kl"] * unit == pytest.approx(float(exact.mean()), abs=error)


def test_network_cost_counts_what_a_variant_uses():
    """Parameters agree with the built networks; uncond has no VAE, vae no U-Net."""
    train = settings()
    for variant, names in (("vae", {"vae"}), ("uncond", {"unet"}), ("form1", {"vae", "unet"})):
        cost = stage1.network_cost(train, variant)
        networks = {"vae": common.build_vae(train), "unet": stage1.build_unet(train, variant)}
        assert set(cost) == names and all(c["gflops"] > 0 for c in cost.values())
        assert all(c["parameters"] == sum(p.numel() for p in networks[name].parameters()) for name, c in cost.items())


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
