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
        out = stage1.condition(unet, x_hat, variant)(y, t)
        x, time = seen.pop()
        assert torch.equal(x, shown) and torch.equal(time, t) and torch.equal(out, shown[:, :3] * 2)


@pytest.mark.parametrize("sampler,steps,start", [("ddpm", 1000, 1000), ("ddpm", 20, 1000), ("ddim", 15, 1000),
                                                 ("ddim", 15, 300)])
def test_formulation_2_is_formulation_1_after_the_shift(sampler, steps, start):
    """The published Formulation 2, written out in x_t = y_t + x_hat: x_T = x_hat + noise (earlier: x_hat + sqrt(A)
    x_hat + sqrt(1 - A) noise), x0 = (x_t - x_hat - sqrt(1 - A_t) eps) / sqrt(A_t) clamped, and x_hat subtracted at the
    end, must give what `condition(..., "form2")` and the plain process in y give. DDPM: posterior mean c1 x0 + c2 x_t +
    (1 - c2) x_hat, variance beta on all steps, else beta_tilde; DDIM: sqrt(A_s) x0 + sqrt(1 - A_s) eps + x_hat."""
    torch.manual_seed(0)
    unet = nn.Conv2d(6, 3, 3, padding=1).double()
    predict = lambda x, t: unet(x) * torch.cos(t / 300.0)[:, None, None, None]  # noqa: E731 - a random eps-network
    diffusion, gen = common.Diffusion("eps", start=start), common.generator(0)
    diffusion.signal, diffusion.noise = diffusion.alpha_bar.sqrt(), (1 - diffusion.alpha_bar).sqrt()  # in float64
    x_hat, first = (common.randn((2, 3, 5, 5), gen).double() for _ in range(2))
    denoise = stage1.condition(predict, x_hat, "form2")
    y = common.sample(diffusion, denoise, diffusion.begin(x_hat, first), sampler, steps, common.generator(1))

    bar, grid, noise = diffusion.alpha_bar, common.time_grid(start, steps), common.generator(1)
    x = x_hat + (first if start == 1000 else bar[start].sqrt() * x_hat + (1 - bar[start]).sqrt() * first)
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


@pytest.mark.parametrize("variant", stage1.VARIANTS)
def test_overfits_one_batch(variant):
    """On eight images without noise the VAE's squared error must fall to a third within 100 steps, with one fixed x0,
    eps and t a refiner's to a tenth of its start (the target's mean square, as the output starts at zero)."""
    torch.manual_seed(0)
    x0, diffusion = common.to_float(draw_all(8 if variant == "vae" else 1, 1)[0]), common.Diffusion("v")
    if variant == "vae":
        vae = common.build_vae(settings())
        history = descend(vae, lambda: stage1.vae_loss(vae, x0, torch.zeros(8, vae.latent_dim), 0.0)[0], 100, 5e-3)
    else:
        unet, eps, t = stage1.build_unet(settings(), variant), torch.randn(1, 3, 32, 32), torch.tensor([400])
        denoise = stage1.condition(unet, 0.5 * x0, variant)
        history = descend(unet, lambda: diffusion.simple_loss(denoise, x0, t, eps), 100, 3e-3)
        assert history[0] == pytest.approx(float(diffusion.target(x0, t, eps).square().mean()), rel=1e-5)
    assert history[-1] < history[0] / (3 if variant == "vae" else 10), history[::30]


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


@pytest.mark.parametrize("variant,last", [("form1", 300), ("uncond", 1000)])
def test_times_and_posterior_samples_of_training(variant, last, tmp_path, monkeypatch):
    """t is uniform on 1..start, without an x_hat on 1..T; x_hat is a fresh posterior sample at every step."""
    times, x_hats, condition, loss = [], [], stage1.condition, common.Diffusion.simple_loss
    monkeypatch.setattr(common.Diffusion, "simple_loss", lambda d, f, x0, t, eps:
                        times.append(t) or loss(d, f, x0, t, eps))
    monkeypatch.setattr(stage1, "condition", lambda u, x_hat, *a: x_hats.append(x_hat) or condition(u, x_hat, *a))
    data = images_of(1)
    data.images = data.images.expand(40, 3, 32, 32)  # one image: x_hat differs by the posterior sample alone
    train = settings(batch=32, steps=25, start=300)
    vae_state = {"vae": common.build_vae(train).state_dict(), "gmm": {}}
    stage1.train_refiner(tmp_path, variant, train, vae_state, data, CPU, False)
    t = torch.cat(times)
    assert len(t) == 25 * 32 and 1 <= t.min() < 0.02 * last and 0.98 * last < t.max() <= last
    assert float(t.double().mean()) == pytest.approx((last + 1) / 2, abs=4 * last / (12 * len(t)) ** 0.5)
    assert len(x_hats) == 25
    if variant == "form1":
        assert not torch.equal(x_hats[0], x_hats[1]) and not torch.equal(x_hats[0][0], x_hats[0][1])


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
        assert model.diffusion.start == (1000 if variant == "uncond" else train["start"]) and train["start"] < 1000
        (x, x_hat), t = torch.randn(2, 1, 3, 32, 32), torch.tensor([500])
        assert torch.equal(model.denoiser(x_hat, None)(x, t), stage1.condition(unet, x_hat, variant)(x, t))
    a, b, other = (common.generate(model, 5, "gmm", "dpm", 3, seed, 5)[1] for seed in (0, 0, 1))
    assert torch.equal(a, b) and a.shape == (5, 3, 32, 32) and a.dtype == torch.uint8 and not torch.equal(a, other)


@pytest.mark.parametrize("first", [1000, 300])
def test_same_z_and_noise_for_every_sampler_count_and_damage(first, trained):
    """Image k starts from the same x_hat and noise whatever the sampler, the number of steps and of images; damage
    changes x_hat alone, and temperature is a factor of the noise. From T x_start is that noise, earlier on x_hat is
    below it: x_start = a x_hat + s noise."""
    def start(sampler="dpm", steps=2, count=8, batch=4, damage=0.0, temperature=1.0):
        model, seen = stage1.load_model(trained["form1"], "form1", CPU), []
        model.diffusion, model.temperature = common.Diffusion("v", start=first), temperature
        unet = lambda x, t: seen.append(x.clone()) or torch.zeros_like(x[:, :3])  # noqa: E731
        model.denoiser = lambda x_hat, z: stage1.condition(unet, x_hat, "form1")
        common.generate(model, count, "gaussian", sampler, steps, 0, batch, damage)
        x_start, x_hat = torch.cat(seen[::steps])[:count].chunk(2, 1)  # the first U-Net call of each batch
        a, s = (float(factor[first]) for factor in (model.diffusion.signal, model.diffusion.noise))
        return x_start if first == 1000 else (x_start - a * x_hat) / s, x_hat

    noise, x_hat = start()
    assert float(noise.std()) == pytest.approx(1, abs=0.02) and abs(float((noise * x_hat).mean())) < 0.02
    for options in ({"sampler": "ddpm", "steps": 5}, {"sampler": "ddim", "steps": 1}, {"steps": 7}):
        assert all(map(torch.equal, start(**options), (noise, x_hat)))
    fewer = start(count=5)
    assert torch.equal(fewer[0], noise[:5]) and torch.equal(fewer[1], x_hat[:5])
    assert not torch.equal(noise[:4], noise[4:])  # the second batch has its own draws
    damaged, cool = start(damage=0.1), start(temperature=0.7)
    assert torch.allclose(damaged[0], noise, atol=1e-5) and torch.allclose(cool[0], 0.7 * noise, atol=1e-5)
    assert float((damaged[1] - x_hat).std()) == pytest.approx(0.1, rel=0.02) and torch.equal(cool[1], x_hat)


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
