"""Stage 1: the loss of the VAE, what the refiners are trained on, the formulations, sampling, guidance, checkpoints."""

import pytest
import torch
from helpers import CPU, close, data_of, oracle, record_gradients, same, settings, tiny_model
from torch import nn
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence

import common
import stage1_baseline as stage1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of one short training of every variant. Their seeds differ, and so their weights."""
    home, data, states = tmp_path_factory.mktemp("trained"), data_of(60), {}
    states["vae"] = stage1.train_vae(home / "vae", settings(2), data, CPU)
    for seed, variant in enumerate(["uncond", "form1", "form2", "guided", "augmented"], 1):
        own, base = settings(21 if variant == "guided" else 2, seed=seed, every=1), states.get(stage1.BASE[variant])
        states[variant] = stage1.train_refiner(home / variant, own, variant, base, data, CPU)
    return states


def test_vae_loss_is_the_negative_elbo():
    """With beta = 1, for images in [0, 1] and a Gaussian decoder of variance 1/2, up to log N(x; x, 1/2)."""
    torch.manual_seed(0)
    vae = common.build_vae(settings())
    x0, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, vae.latent_dim)
    loss, _, _ = stage1.vae_loss(vae, x0, noise, 1.0)
    mu, logvar = vae.encoder(x0)
    q = Normal(mu, (0.5 * logvar).exp())
    pixels, decoded = (x0 + 1) / 2, (vae.decoder(q.mean + q.stddev * noise) + 1) / 2
    log_p = Normal(decoded, 0.5**0.5).log_prob(pixels) - Normal(pixels, 0.5**0.5).log_prob(pixels)
    elbo = log_p.sum((1, 2, 3)) - kl_divergence(q, Normal(0, 1)).sum(1)
    assert torch.allclose(loss, -elbo, rtol=1e-4)


@pytest.mark.parametrize("variant,objective", [("uncond", "v"), ("form1", "v"), ("form2", "v"), ("form1", "eps"),
                                               ("augmented", "v")])
def test_refiner_training(variant, objective, tmp_path, monkeypatch):
    """The first step has the gradient of the squared error of v or eps at x_t = a x0 + s eps, weighted by 100 s. x_hat
    is decoded from a sample of q(z|x), not from its mean. `augmented` adds noise of a random sd up to 0.4. The VAE gets
    no gradient."""
    monkeypatch.setattr(common, "zero_init", lambda module: module)  # so that the input of a new U-Net matters
    frozen, networks, steps = common.frozen, [], record_gradients(monkeypatch)
    monkeypatch.setattr(common, "frozen", lambda *args: networks.append(frozen(*args)) or networks[-1])
    own, data, vae = settings(1, objective=objective, unet_flip=False), data_of(60), tiny_model().vae
    base = {"vae": vae.state_dict(), "gmm": {}, "minutes": 1.0}
    state = stage1.train_refiner(tmp_path, own, variant, base, data, CPU)

    gen, x_hat = common.generator(0, "training, process 0"), torch.zeros(32, 0, 32, 32)
    x0 = common.draw_batch(data.train.images, own, gen, False)
    if variant != "uncond":
        x_hat, _, _ = vae(x0, torch.randn(32, 8, generator=gen))
        assert same(state["vae"], base["vae"]) and state["minutes"] > 1
        assert all(p.grad is None for p in networks[0].parameters())
    if variant == "augmented":
        sd = 0.4 * torch.rand(32, 1, 1, 1, generator=gen)
        x_hat = x_hat + sd * torch.randn(x0.shape, generator=gen)
    t = ((1000 if variant == "uncond" else 400) * torch.rand(32, generator=gen)).long() + 1
    eps, bar = torch.randn(x0.shape, generator=gen), common.Diffusion("v").alpha_bar.float()[t][:, None, None, None]
    a, s = bar.sqrt(), (1 - bar).sqrt()
    x_t = a * x0 + s * eps
    torch.manual_seed(0)
    unet = common.build_unet(own, 3 if variant == "uncond" else 6)
    predicted = unet(torch.cat([x_t + x_hat if variant == "form2" else x_t, x_hat], 1), t)
    mse = (predicted - (eps if objective == "eps" else a * eps - s * x0)).square().mean((1, 2, 3))
    assert close(steps[0][0], grad((100 * s.flatten() * mse).mean(), list(unet.parameters())))
    assert state["log"] == [pytest.approx({"step": 1, "mse": mse.mean().item()}, rel=1e-3)]


def test_the_vae_overfits_eight_images(tmp_path):
    """In 100 steps, its squared error falls to a third of that of the first ten."""
    log = stage1.train_vae(tmp_path, settings(100, every=10, batch=8), data_of(8), CPU)["log"]
    assert log[-1]["sse"] < log[0]["sse"] / 3


@pytest.mark.parametrize("start", [1000, 300])
def test_formulation_2_is_formulation_1_after_the_shift(start):
    """The published Formulation 2 is written out here in y_t = x_t + x_hat. It begins with y_T = x_hat + noise, or
    earlier with x_hat + sqrt(A) x_hat + sqrt(1 - A) noise. It predicts x0 = (y_t - x_hat - sqrt(1 - A_t) eps) /
    sqrt(A_t), clamped. A step of DDPM has the mean c1 x0 + c2 y_t + (1 - c2) x_hat. The plain process in x of
    `generate` must go through the same images."""
    model, unet = tiny_model(start=start), nn.Conv2d(6, 3, 3, padding=1).double()
    model.variant, model.diffusion = "form2", common.Diffusion("eps", start)
    model.unet = lambda shown, t: unet(shown.double()) * torch.cos(t / 300.0)[:, None, None, None]  # random
    trajectory, own, z = [], model.settings | common.sampling_settings("ddpm", 15), torch.randn(2, 8)
    stage1.generate(model, own, z, trajectory=trajectory)

    times, bar, gen = model.diffusion.times(own), model.diffusion.alpha_bar, common.generator(0, "noise 0")
    x_hat = model.vae.decoder(z).double()
    first = torch.randn(x_hat.shape, generator=gen)
    y = x_hat + (first if start == 1000 else bar[start].sqrt() * x_hat + (1 - bar[start]).sqrt() * first)
    for (visited, x, x0_there), t, s in zip(trajectory, times[:-1], times[1:], strict=True):
        eps = model.unet(torch.cat([y, x_hat], 1), torch.tensor([t, t]))
        x0 = ((y - x_hat - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()).clamp(-1, 1)
        assert visited == t and torch.allclose(y - x_hat, x.double(), atol=1e-4)
        assert torch.allclose(x0, x0_there.double(), atol=2e-3)
        beta = 1 - bar[t] / bar[s]
        c1, c2 = bar[s].sqrt() * beta / (1 - bar[t]), (bar[t] / bar[s]).sqrt() * (1 - bar[s]) / (1 - bar[t])
        variance = beta * (1 - bar[s]) / (1 - bar[t])
        y = c1 * x0 + c2 * y + (1 - c2) * x_hat + variance.sqrt() * torch.randn(y.shape, generator=gen)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("start", [400, 1000])
def test_an_oracle_draws_x0(sampler, start):
    """It takes the mirrored x_hat for x0. Images keep their order over batches, and x_hat is spoiled before it is
    refined."""
    model, z = tiny_model(start=start), torch.randn(5, 8)
    model.unet = lambda shown, t: oracle(model.diffusion, shown[:, 3:].flip(3))(shown[:, :3], t)
    own = model.settings | common.sampling_settings(sampler, 6) | {"eval_batch": 2}
    x_hat, images = stage1.generate(model, own, z, corrupt=lambda x: x / 2)
    assert torch.equal(x_hat, common.to_uint8(model.vae.decoder(z) / 2)) and x_hat.float().std(0).mean() > 5
    assert (images.float() - x_hat.flip(3).float()).abs().max() <= 1


@pytest.mark.parametrize("variant", stage1.BASE)
def test_a_checkpoint_alone_rebuilds_its_model(variant, trained):
    """Networks have its weights, are frozen and are all counted. The process begins at `start`, or at T without x_hat.
    The temperature changes the samples only if the process begins with an x_hat."""
    state, model = trained[variant], stage1.load_model(trained[variant], CPU)
    names = {"vae": ["vae"], "uncond": ["unet"], "guided": ["vae", "unet", "guide"]}.get(variant, ["vae", "unet"])
    assert same([dict(network.state_dict()) for network in model.networks], [state[name] for name in names])
    assert not any(n.training or p.requires_grad for n in model.networks for p in n.parameters())
    assert model.diffusion.start == (1000 if variant == "uncond" else 400)
    own, codes = model.settings | {"prior": "gaussian"}, stage1.draw_codes(model, model.settings, 4)
    x_hat, images = stage1.generate(model, own, codes)
    _, hot = stage1.generate(model, own | {"temperature": 1.1}, codes)
    assert torch.equal(images, hot) == (variant in ("vae", "uncond"))
    if variant == "uncond":
        assert codes.shape == (4, 0) and len(images.unique(dim=0)) == 4
        return
    gmm = common.GaussianMixture(**state["gmm"])
    assert torch.equal(codes, gmm.sample(4, common.generator(own["seed"], "codes")))
    assert not torch.equal(codes, stage1.draw_codes(model, own, 4))
    assert torch.equal(x_hat, common.to_uint8(model.vae.decoder(codes)))
    assert torch.equal(x_hat, images) == (variant == "vae")


def test_guidance(trained):
    """The guide is trained for a tenth of the steps, rounded up, behind form1 as it was. Without guidance the samples
    are those of form1. With it, the difference of the two predictions is extrapolated."""
    states = trained["form1"], trained["guided"]
    form1, guided = (stage1.load_model(state, CPU) for state in states)
    assert same(*([state[name] for name in ("vae", "gmm", "unet")] for state in states))
    assert len(states[1]["log"]) == 3
    z, plain = torch.randn(3, 8), form1.settings
    images = [stage1.generate(model, plain, z)[1] for model in (form1, guided)]
    guided.settings["guidance"] = 0.0
    assert same(stage1.generate(guided, plain, z)[1], images[0]) and not same(*images)
    guided.settings["guidance"], trajectory = 0.5, []
    guided.unet, guided.guide = (lambda shown, t, v=v: torch.full_like(shown[:, :3], v) for v in (0.3, 0.1))
    stage1.generate(guided, plain, z, trajectory=trajectory)
    for t, x, x0 in trajectory:
        assert torch.allclose(x0, guided.diffusion.to_x0(torch.full_like(x, 0.4), x, torch.full((3,), t)), atol=1e-6)
