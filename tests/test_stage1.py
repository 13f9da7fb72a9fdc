"""Stage 1: the losses, the formulations, what is trained on what, guidance, augmentation, checkpoints."""

import pytest
import torch
from helpers import CPU, data_of, draw_all, same, settings
from torch import nn
from torch.distributions import Normal, kl_divergence

import common
import stage1_baseline as stage1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of one short training of every variant. Their seeds differ, and so their weights."""
    home, data, states = tmp_path_factory.mktemp("trained"), data_of(200), {}
    states["vae"] = stage1.train_vae(home / "vae", settings(), data, CPU)
    for seed, variant in enumerate(["uncond", "form1", "form2", "guided", "augmented"], 1):
        base = states.get(stage1.BASE[variant])
        states[variant] = stage1.train_refiner(home / variant, settings(seed=seed), variant, base, data, CPU)
    return states


@pytest.fixture
def restless(monkeypatch):
    """New U-Nets whose last layer is not zero, so that their input matters."""
    build = common.build_unet

    def build_unet(*args):
        unet = build(*args)
        nn.init.normal_(unet.out.weight, std=0.1)
        return unet

    monkeypatch.setattr(common, "build_unet", build_unet)


def record(monkeypatch, name, owner=common.Training):
    """The list of what a method returns from here on."""
    returned, method = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: returned.append(method(*args)) or returned[-1])
    return returned


def test_vae_loss_is_the_negative_elbo():
    """With beta = 1, for images in [0, 1] and a Gaussian decoder of variance 1/2, up to log N(x; x, 1/2)."""
    torch.manual_seed(0)
    vae = common.build_vae(settings())
    x0, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, vae.latent_dim)
    loss, sse, kl = stage1.vae_loss(vae, x0, noise, 1.0)
    mu, logvar = vae.encoder(x0)
    q = Normal(mu, (0.5 * logvar).exp())
    pixels, decoded = (x0 + 1) / 2, (vae.decoder(q.mean + q.stddev * noise) + 1) / 2
    log_p = Normal(decoded, 0.5**0.5).log_prob(pixels) - Normal(pixels, 0.5**0.5).log_prob(pixels)
    elbo = log_p.sum((1, 2, 3)) - kl_divergence(q, Normal(0, 1)).sum(1)
    assert torch.allclose(loss, -elbo, rtol=1e-4) and torch.allclose(loss, sse + kl)
    assert torch.allclose(stage1.vae_loss(vae, x0, noise, 0.25)[0], sse + 0.25 * kl)


@pytest.mark.parametrize("variant,objective", [("uncond", "v"), ("form1", "v"), ("form2", "v"), ("form1", "eps"),
                                               ("augmented", "v")])
def test_refiner_training(variant, objective, trained, tmp_path, monkeypatch, restless):
    """The first step minimises the mean squared error of v or eps at x_t = a x0 + s eps, at times in 1..start, weighted
    by 100 s. x_hat is decoded from a sample of q(z|x), not from its mean. The log holds the unweighted loss."""
    own, losses, step = settings(unet_steps=1, objective=objective, unet_flip=False), [], common.Training.step
    batches, normals, uniforms = (record(monkeypatch, name) for name in ("batch", "normal", "uniform"))
    monkeypatch.setattr(common.Training, "step",
                        lambda training, loss, terms: losses.append(loss.detach()) or step(training, loss, terms))
    state = stage1.train_refiner(tmp_path, own, variant, trained["vae"], data_of(60), CPU)
    torch.manual_seed(0)
    unet, x0, eps = common.build_unet(own, 3 if variant == "uncond" else 6), batches[0], normals[-1]
    t = ((1000 if variant == "uncond" else 400) * uniforms[-1]).long() + 1
    bar = common.Diffusion("v").alpha_bar.float()[t][:, None, None, None]
    a, s = bar.sqrt(), (1 - bar).sqrt()
    x_t = a * x0 + s * eps
    with torch.no_grad():
        if variant == "uncond":
            predicted = unet(x_t, t)
        else:
            vae = common.frozen(common.build_vae(own), trained["vae"]["vae"], CPU)
            x_hat, _, _ = vae(x0, normals[0])
            if variant == "augmented":
                x_hat = x_hat + 0.4 * uniforms[0] * normals[1]
            predicted = unet(torch.cat([x_t + x_hat if variant == "form2" else x_t, x_hat], 1), t)
    mse = (predicted - (eps if objective == "eps" else a * eps - s * x0)).square().mean((1, 2, 3))
    assert torch.allclose(losses[0], 100 * s.flatten() * mse, rtol=1e-3)
    assert state["log"] == [pytest.approx({"step": 1, f"{objective}_mse": float(mse.mean())}, rel=1e-3)]
    if variant == "uncond":
        assert not state.keys() & {"vae", "gmm"}
    else:
        assert same([state["vae"], state["gmm"]], [trained["vae"]["vae"], trained["vae"]["gmm"]])
        assert state["minutes"] > trained["vae"]["minutes"] > 0


@pytest.mark.parametrize("sampler,steps,start", [("ddpm", 1000, 1000), ("ddpm", 20, 1000), ("ddim", 15, 1000),
                                                 ("ddim", 15, 300)])
def test_formulation_2_is_formulation_1_after_the_shift(sampler, steps, start):
    """The published Formulation 2 is written out here in y_t = x_t + x_hat. It begins with y_T = x_hat + noise, or
    earlier with x_hat + sqrt(A) x_hat + sqrt(1 - A) noise. It predicts x0 = (y_t - x_hat - sqrt(1 - A_t) eps) /
    sqrt(A_t), clamped, and x_hat is subtracted at the end. A step of DDPM has the mean c1 x0 + c2 y_t + (1 - c2) x_hat.
    A step of DDIM gives sqrt(A_s) x0 + sqrt(1 - A_s) eps + x_hat. The plain process in x with `denoiser(..., "form2")`
    must give the same images."""
    torch.manual_seed(0)
    unet = nn.Conv2d(6, 3, 3, padding=1).double()

    def predict(x, t):  # a random eps-network
        return unet(x) * torch.cos(t / 300.0)[:, None, None, None]

    diffusion = common.Diffusion("eps", start=start)
    diffusion.x0_scale, diffusion.eps_scale = diffusion.alpha_bar.sqrt(), (1 - diffusion.alpha_bar).sqrt()  # float64
    x_hat, first = torch.randn(2, 2, 3, 5, 5).double()
    denoise = stage1.denoiser(predict, x_hat, "form2")
    x = common.sample(diffusion, denoise, diffusion.x_start(x_hat, first), sampler, steps, common.generator(0, "noise"))

    bar, grid, noise = diffusion.alpha_bar, common.time_grid(start, steps), common.generator(0, "noise")
    y = x_hat + (first if start == 1000 else bar[start].sqrt() * x_hat + (1 - bar[start]).sqrt() * first)
    with torch.no_grad():
        for t, s in zip(grid[:0:-1], grid[-2::-1], strict=True):
            eps = predict(torch.cat([y, x_hat], 1), torch.full((2,), t))
            x0 = ((y - x_hat - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()).clamp(-1, 1)
            if sampler == "ddim":
                eps = (y - x_hat - bar[t].sqrt() * x0) / (1 - bar[t]).sqrt()  # agrees with the clamped x0
                y = bar[s].sqrt() * x0 + (1 - bar[s]).sqrt() * eps + x_hat
                continue
            beta = 1 - bar[t] / bar[s]
            c1, c2 = bar[s].sqrt() * beta / (1 - bar[t]), (bar[t] / bar[s]).sqrt() * (1 - bar[s]) / (1 - bar[t])
            variance = beta * (1 - bar[s]) / (1 - bar[t])
            y = c1 * x0 + c2 * y + (1 - c2) * x_hat + variance.sqrt() * common.randn(y.shape, noise)
    assert torch.allclose(y - x_hat, x, atol=1e-8)


@pytest.mark.parametrize("variant", ["vae", "uncond", "form1", "form2"])
def test_overfits_one_batch(variant):
    """Within 100 steps, the VAE's squared error of eight images without noise falls to a third, and a refiner's loss of
    one image, eps and t falls to a tenth."""
    torch.manual_seed(0)
    of_vae, diffusion, history = variant == "vae", common.Diffusion("v"), []
    x0 = common.to_float(draw_all(8 if of_vae else 1, 1)[0])
    network = common.build_vae(settings()) if of_vae else stage1.build_unet(settings(), variant)
    eps, t = torch.randn(1, 3, 32, 32), torch.tensor([400])
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3 if of_vae else 3e-3)
    for _ in range(100):
        if of_vae:
            loss, _, _ = stage1.vae_loss(network, x0, torch.zeros(8, network.latent_dim), 0.0)
        else:
            loss = diffusion.simple_loss(stage1.denoiser(network, 0.5 * x0, variant), x0, t, eps)
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 200.0)
        optimizer.step()
        history.append(loss.mean().item())
    assert history[-1] < history[0] / (3 if of_vae else 10), history[::30]


@pytest.mark.parametrize("variant", stage1.BASE)
def test_a_checkpoint_alone_rebuilds_its_model(variant, trained):
    """Networks have its weights, are frozen and are all counted. The process begins at `start`, or at T without x_hat.
    `guided` extrapolates from its guide."""
    state, model = trained[variant], stage1.load_model(trained[variant], CPU)
    names = {"vae": ["vae"], "uncond": ["unet"], "guided": ["vae", "unet", "guide"]}.get(variant, ["vae", "unet"])
    assert same([dict(network.state_dict()) for network in model.networks], [state[name] for name in names])
    assert not any(n.training or p.requires_grad for n in model.networks for p in n.parameters())
    assert model.evaluations == (2 if variant == "guided" else 1) and model.shape == (3, 32, 32)
    if variant == "uncond":
        assert model.vae is None and not model.priors
    else:
        assert model.vae is model.networks[0] and same(vars(model.priors["gmm"]), state["gmm"])
    if variant == "vae":
        assert model.denoiser is None
        return
    assert model.diffusion.start == (1000 if variant == "uncond" else 400) and model.diffusion.objective == "v"
    (x, x_hat), t = torch.randn(2, 1, 3, 32, 32), torch.tensor([300])
    expected = [stage1.denoiser(unet, x_hat, variant)(x, t) for unet in model.networks[names.index("unet"):]]
    if variant == "guided":
        refiner, guide = expected
        expected = [refiner + state["settings"]["guidance"] * (refiner - guide)]
        assert not torch.equal(refiner, guide)
    assert torch.equal(model.denoiser(x_hat, None)(x, t), expected[0])


def test_guided_is_form1_with_a_guide(trained, tmp_path):
    """The guide has a tenth of the steps, rounded up. What it guides is form1, as it was."""
    form1, guided = trained["form1"], trained["guided"]
    assert all(same(guided[name], form1[name]) for name in ("vae", "gmm", "unet"))
    assert [row["step"] for row in guided["log"]] == [1] and guided["minutes"] > form1["minutes"]
    again = stage1.train_refiner(tmp_path, settings(unet_steps=21, every=1), "guided", form1, data_of(60), CPU)
    assert len(again["log"]) == 3


def test_augmentation_is_for_training_alone(trained, tmp_path, monkeypatch):
    """The strengths of the noise in training are uniform, from 0 to 0.4. In sampling there is none."""
    shown = []
    monkeypatch.setattr(common.VAE, "forward", lambda vae, x0, noise: (torch.zeros_like(x0), None, None))
    monkeypatch.setattr(stage1, "denoiser", lambda unet, x_hat, variant: shown.append(x_hat) or unet)
    stage1.load_model(trained["augmented"], CPU).denoiser(torch.ones(1, 3, 32, 32), None)
    for variant in ("augmented", "form1"):
        with pytest.raises(RuntimeError, match="channels"):  # such a U-Net is not made for x_t alone
            stage1.train_refiner(tmp_path, settings(batch=1000), variant, trained["vae"], data_of(60), CPU)
    in_sampling, augmented, plain = shown
    assert torch.equal(in_sampling, torch.ones(1, 3, 32, 32)) and not plain.any()
    sds = augmented.flatten(1).std(1).sort().values / 0.4  # of one image each
    assert torch.allclose(sds, (torch.arange(1000) + 0.5) / 1000, atol=0.06)  # the distribution function of U(0, 1)
    assert augmented.mean().abs() < 0.001
