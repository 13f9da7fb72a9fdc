"""Stage 1: the losses and the two formulations, learning, the model of a checkpoint, sampling."""

import json

import pytest
import torch
from helpers import CPU, draw_all, images_of, same, settings
from torch import nn

import common
import stage1_baseline as stage1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of one short training of every variant."""
    home, train, data = tmp_path_factory.mktemp("trained"), settings(), images_of(200)
    vae = stage1.train_vae(home / "vae", train, data, CPU, None)
    states = {variant: stage1.train_refiner(home / variant, train | {"seed": seed}, variant, vae, data, CPU, None)
              for seed, variant in enumerate(list(stage1.CHANNELS)[1:])}
    return {"vae": vae} | states | {"guided": stage1.with_guide(states["form1"], states["guided"])}


def test_vae_loss():
    """sse + beta KL of the image that mu and the noise decode to."""
    torch.manual_seed(0)
    vae = common.build_vae(settings())
    x0, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, vae.latent_dim)
    loss, sse, kl = stage1.vae_loss(vae, x0, noise, 0.7)
    mu, logvar = vae.encoder(x0)
    assert torch.allclose(sse, common.squared_error(vae.decoder(mu + (0.5 * logvar).exp() * noise), x0))
    assert torch.allclose(kl, common.gaussian_kl(mu, logvar)) and torch.allclose(loss, sse + 0.7 * kl)


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


@pytest.mark.parametrize("variant", list(stage1.CHANNELS)[:4])
def test_overfits_one_batch(variant):
    """Of eight images without noise the VAE's squared error falls to a third within 100 steps; of one image, eps and t
    a refiner's falls to a tenth."""
    torch.manual_seed(0)
    x0, diffusion, history = common.to_float(draw_all(8 if variant == "vae" else 1, 1)[0]), common.Diffusion("v"), []
    network = common.build_vae(settings()) if variant == "vae" else common.build_unet(
        settings(), stage1.CHANNELS[variant])
    eps, t = torch.randn(1, 3, 32, 32), torch.tensor([400])
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3 if variant == "vae" else 3e-3)
    for _ in range(100):
        loss = (stage1.vae_loss(network, x0, torch.zeros(8, network.latent_dim), 0.0)[0] if variant == "vae" else
                diffusion.simple_loss(stage1.condition(network, 0.5 * x0, variant), x0, t, eps)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 200.0)
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / (3 if variant == "vae" else 10), history[::30]


@pytest.mark.parametrize("variant", stage1.CHANNELS)
def test_a_checkpoint_alone_rebuilds_its_model(variant, trained, monkeypatch):
    """Weights of U-Net, guide and VAE, GMM, objective and size come from the checkpoint."""
    networks, restore, state = [], common.frozen, trained[variant]
    monkeypatch.setattr(common, "frozen", lambda *given: networks.append(restore(*given)) or networks[-1])
    model = stage1.load_model(state, variant, CPU)
    expected = {"vae": ["VAE"], "uncond": ["UNet"], "guided": ["VAE", "UNet", "UNet"]}.get(variant, ["VAE", "UNet"])
    assert [type(network).__name__ for network in networks] == expected
    assert model.vae is (networks[0] if variant != "uncond" else None)
    assert (model.condition is None) == (variant == "vae")
    assert not any(n.training or p.requires_grad for n in networks for p in n.parameters())
    if model.vae is not None:
        assert same(dict(model.vae.state_dict()), trained["vae"]["vae"]) and set(model.priors) == {"gaussian", "gmm"}
        assert same(vars(model.priors["gmm"]), trained["vae"]["gmm"])
    if model.condition is not None:
        unet, train = networks[-2 if variant == "guided" else -1], state["train"]
        assert same(dict(unet.state_dict()), state["unet"]) and model.diffusion.objective == train["objective"]
        assert model.diffusion.start == (1000 if variant == "uncond" else train["start"]) and train["start"] < 1000
        (x, x_hat), t = torch.randn(2, 1, 3, 32, 32), torch.tensor([500])
        expected = stage1.condition(unet, x_hat, variant)
        if variant == "guided":
            assert same(dict(networks[-1].state_dict()), state["guide"]) and not same(state["guide"], state["unet"])
            expected = stage1.guided(expected, stage1.condition(networks[-1], x_hat, variant))
        assert torch.equal(model.condition(x_hat, None)(x, t), expected(x, t))


def test_guided_prediction():
    """Beyond the model's prediction, away from its guide's; each is asked once a step."""
    x, t, asked = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]), []

    def says(number):
        return lambda xt, t: asked.append((number, xt, t)) or torch.full_like(xt, number)

    assert torch.equal(stage1.guided(says(2.0), says(1.0))(x, t), x + 2 + stage1.GUIDANCE)
    assert asked == [(2.0, x, t), (1.0, x, t)]


@pytest.mark.parametrize("first", [1000, 300])
def test_same_z_and_noise_for_every_sampler_count_and_damage(first, trained):
    """Image k starts from the same x_hat and noise whatever the sampler, the number of steps and of images; damage
    changes x_hat alone, and temperature is a factor of the noise. From T x_start is that noise, earlier on x_hat is
    below it: x_start = a x_hat + s noise."""
    def start(sampler="dpm", steps=2, count=8, batch=4, damage=0.0, temperature=1.0):
        model, seen = stage1.load_model(trained["form1"], "form1", CPU), []
        model.diffusion, model.temperature = common.Diffusion("v", start=first), temperature
        unet = lambda x, t: seen.append(x.clone()) or torch.zeros_like(x[:, :3])  # noqa: E731
        model.condition = lambda x_hat, z: stage1.condition(unet, x_hat, "form1")
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


def test_dry_run_lists_the_networks_of_all_variants(capsys):
    for variants, names in (("uncond", "unet"), ("vae uncond", "vae unet"), ("guided", "vae unet guide")):
        stage1.main(["--dry-run", "--budget", "smoke", "--variant", *variants.split()])
        assert set(json.loads(capsys.readouterr().out)["networks"]) == set(names.split())
