"""Stage 1: the losses, the formulations, training and its log, augmentation, guidance, checkpoints, sampling."""

from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, draw_all, evened, images_of, same, settings
from torch import nn

import common
import stage1_baseline as stage1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of one short training of every variant. Their seeds differ, and so their weights."""
    home, train, data = tmp_path_factory.mktemp("trained"), settings(), images_of(200)
    vae = stage1.train_vae(home / "vae", train, data, CPU)
    states = {variant: stage1.train_refiner(home / variant, train | {"seed": seed}, variant, vae, data, CPU)
              for seed, variant in enumerate(list(stage1.CHANNELS)[1:])}
    return {"vae": vae} | states | {"guided": stage1.with_guide(states["form1"], states["guided"])}


@pytest.fixture
def recorded(monkeypatch):
    """Trainings in float32, with record of their images, steps, flips, batches and random draws, and of what `step`
    gets."""
    record = SimpleNamespace(images=[], steps=[], flips=[], batches=[], draws=[], losses=[])

    class Recorded(common.Training):
        def __init__(self, folder, train, device, images, steps, flip, **networks):
            record.images.append(images)
            record.steps.append(steps)
            record.flips.append(flip)
            super().__init__(folder, train, device, images, steps, flip, **networks)

        def batch(self):
            record.batches.append(super().batch())
            return record.batches[-1]

        def normal(self, *shape):
            record.draws.append(super().normal(*shape))
            return record.draws[-1]

        def uniform(self, *shape):
            record.draws.append(super().uniform(*shape))
            return record.draws[-1]

        def step(self, loss, terms, watch=None):
            record.losses.append(loss.detach())
            super().step(loss, terms, watch)

    monkeypatch.setattr(common, "Training", Recorded)
    return record


def test_vae_loss():
    """The loss is SSE + beta KL of the image that mu and the noise decode to."""
    torch.manual_seed(0)
    vae = common.build_vae(settings())
    x0, noise = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, vae.latent_dim)
    loss, sse, kl = stage1.vae_loss(vae, x0, noise, 0.7)
    mu, logvar = vae.encoder(x0)
    assert torch.allclose(sse, common.squared_error(vae.decoder(mu + (0.5 * logvar).exp() * noise), x0))
    assert torch.allclose(kl, common.gaussian_kl(mu, logvar)) and torch.allclose(loss, sse + 0.7 * kl)


def test_vae_training_by_hand(recorded, tmp_path):
    """The first step minimises vae_loss with the settings' beta. The log holds its two terms. The mixture is fitted to
    codes of the training images under the averaged weights. There are `vae_steps` steps. Images are mirrored as
    `vae_flip` says."""
    train, data = settings(vae_steps=2, every=1, beta=0.3), images_of(60)
    state = stage1.train_vae(tmp_path, train, data, CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        loss, sse, kl = stage1.vae_loss(common.build_vae(train), recorded.batches[0], recorded.draws[0], 0.3)
    assert recorded.images[0] is data.images and torch.allclose(recorded.losses[0], loss, rtol=1e-5)
    assert state["log"][0] == pytest.approx({"step": 1, "sse": float(sse.mean()), "kl_nats": float(kl.mean())})
    averaged = common.frozen(common.build_vae(train), state["vae"], CPU)
    assert same(state["gmm"], common.fit_mixture(averaged, data.images, train, CPU))
    for flip in (False, True):
        stage1.train_vae(tmp_path / str(flip), train | {"vae_flip": flip, "vae_steps": 1}, data, CPU)
    assert recorded.flips == [False, False, True] and recorded.steps == [2, 1, 1] and train["unet_steps"] == 8


@pytest.mark.parametrize("variant,objective", [("uncond", "v"), ("form1", "v"), ("form2", "v"), ("form1", "eps"),
                                               ("augmented", "v")])
def test_refiner_training_by_hand(variant, objective, recorded, trained, tmp_path, monkeypatch):
    """The first step minimises the mean squared error of v (or eps) at x_t = a x0 + s eps, at times in 1..start. Each
    image's is divided by the mean of its noise level. x_hat is decoded from a sample of q(z|x), not from its mean.
    `augmented` adds noise to it, of another strength for each image. The log holds the undivided loss, the checkpoint
    the VAE and its seconds."""
    def build_unet(*args):  # the last layer of a new U-Net is zero; then no input would matter
        unet = build(*args)
        nn.init.normal_(unet.out.weight, std=0.1)
        return unet

    build, train, data = common.build_unet, settings(unet_steps=1, objective=objective, unet_flip=True), images_of(60)
    monkeypatch.setattr(common, "build_unet", build_unet)
    state = stage1.train_refiner(tmp_path, train, variant, trained["vae"], data, CPU)
    torch.manual_seed(0)
    unet, x0, conditioned = build_unet(train, 3 if variant == "uncond" else 6), recorded.batches[0], variant != "uncond"
    draws = recorded.draws[1:]  # the first one decides what is mirrored
    z_noise, u, eps, *augmentation = draws if conditioned else [None, *draws]
    t = ((400 if conditioned else 1000) * u.flatten()).long() + 1
    bar = common.Diffusion("v").alpha_bar.float()[t][:, None, None, None]
    a, s = bar.sqrt(), (1 - bar).sqrt()
    xt = a * x0 + s * eps
    with torch.no_grad():
        if conditioned:
            vae = common.frozen(common.build_vae(train), trained["vae"]["vae"], CPU)
            mu, logvar = vae.encoder(x0)
            x_hat = vae.decoder(mu + (0.5 * logvar).exp() * z_noise)
            if variant == "augmented":
                share, noise = augmentation
                assert share.shape == (32, 1, 1, 1) and len(share.unique()) == 32 and 0 <= share.min() < share.max() < 1
                x_hat = x_hat + 0.4 * share * noise
            predicted = unet(torch.cat([xt + x_hat if variant == "form2" else xt, x_hat], 1), t)
        else:
            predicted = unet(xt, t)
    loss = (predicted - (eps if objective == "eps" else a * eps - s * x0)).square().mean((1, 2, 3))
    assert torch.allclose(recorded.losses[0], evened(loss, t, 400 if conditioned else 1000), rtol=1e-4)
    assert len(augmentation) == (2 if variant == "augmented" else 0)
    assert state["log"] == [pytest.approx({"step": 1, f"{objective}_mse": float(loss.mean())}, rel=1e-4)]
    assert recorded.images[0] is data.images and recorded.flips == [True] and recorded.steps == [1]
    assert state["seconds_before"] == (trained["vae"]["seconds"] if conditioned else 0) and train["vae_steps"] == 8
    assert not conditioned or same([state["vae"], state["gmm"]], [trained["vae"]["vae"], trained["vae"]["gmm"]])
    assert conditioned or not state.keys() & {"vae", "gmm"}


@pytest.mark.parametrize("sampler,steps,start", [("ddpm", 1000, 1000), ("ddpm", 20, 1000), ("ddim", 15, 1000),
                                                 ("ddim", 15, 300)])
def test_formulation_2_is_formulation_1_after_the_shift(sampler, steps, start):
    """The published Formulation 2 is written out here in y_t = x_t + x_hat. It begins with y_T = x_hat + noise, or
    earlier with x_hat + sqrt(A) x_hat + sqrt(1 - A) noise. It predicts x0 = (y_t - x_hat - sqrt(1 - A_t) eps) /
    sqrt(A_t), clamped, and x_hat is subtracted at the end. A step of DDPM has the mean c1 x0 + c2 y_t + (1 - c2) x_hat,
    and the variance beta if all times are visited, else beta_tilde. A step of DDIM gives sqrt(A_s) x0 + sqrt(1 - A_s)
    eps + x_hat. The plain process in x with `denoiser(..., "form2")` must give the same images."""
    torch.manual_seed(0)
    unet = nn.Conv2d(6, 3, 3, padding=1).double()
    predict = lambda x, t: unet(x) * torch.cos(t / 300.0)[:, None, None, None]  # noqa: E731 - a random eps-network
    diffusion, gen = common.Diffusion("eps", start=start), common.generator(0)
    diffusion.x0_scale, diffusion.eps_scale = diffusion.alpha_bar.sqrt(), (1 - diffusion.alpha_bar).sqrt()  # float64
    x_hat, first = (common.randn((2, 3, 5, 5), gen).double() for _ in range(2))
    denoise = stage1.denoiser(predict, x_hat, "form2")
    x = common.sample(diffusion, denoise, diffusion.x_start(x_hat, first), sampler, steps, common.generator(1))

    bar, grid, noise = diffusion.alpha_bar, common.time_grid(start, steps), common.generator(1)
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
            y = c1 * x0 + c2 * y + (1 - c2) * x_hat
            if s > 0:
                sigma2 = beta if steps == 1000 else beta * (1 - bar[s]) / (1 - bar[t])
                y = y + sigma2.sqrt() * common.randn(y.shape, noise)
    assert torch.allclose(y - x_hat, x, atol=1e-8)


@pytest.mark.parametrize("variant", list(stage1.CHANNELS)[:4])
def test_overfits_one_batch(variant):
    """Within 100 steps, the VAE's squared error of eight images without noise falls to a third, and a refiner's loss of
    one image, eps and t falls to a tenth."""
    torch.manual_seed(0)
    x0, diffusion, history = common.to_float(draw_all(8 if variant == "vae" else 1, 1)[0]), common.Diffusion("v"), []
    network = common.build_vae(settings()) if variant == "vae" else common.build_unet(
        settings(), stage1.CHANNELS[variant])
    eps, t = torch.randn(1, 3, 32, 32), torch.tensor([400])
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3 if variant == "vae" else 3e-3)
    for _ in range(100):
        loss = (stage1.vae_loss(network, x0, torch.zeros(8, network.latent_dim), 0.0)[0] if variant == "vae" else
                diffusion.simple_loss(stage1.denoiser(network, 0.5 * x0, variant), x0, t, eps)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 200.0)
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] / (3 if variant == "vae" else 10), history[::30]


@pytest.mark.parametrize("variant", stage1.CHANNELS)
def test_a_checkpoint_alone_rebuilds_its_model(variant, trained, monkeypatch):
    """The weights of U-Net, guide and VAE, the mixture, the objective, the size and the guidance come from the
    checkpoint. `guided` evaluates two networks in each step, all others one."""
    networks, restore, state = [], common.frozen, trained[variant]
    monkeypatch.setattr(common, "frozen", lambda *given: networks.append(restore(*given)) or networks[-1])
    model = stage1.load_model(state, variant, CPU)
    expected = {"vae": ["VAE"], "uncond": ["UNet"], "guided": ["VAE", "UNet", "UNet"]}.get(variant, ["VAE", "UNet"])
    assert [type(network).__name__ for network in networks] == expected
    assert model.networks == tuple(networks) and model.shape == (3, 32, 32)
    assert model.vae is (networks[0] if variant != "uncond" else None)
    assert (model.denoiser_for is None) == (variant == "vae") and model.evaluations == (2 if variant == "guided" else 1)
    assert not any(n.training or p.requires_grad for n in networks for p in n.parameters())
    if model.vae is not None:
        assert same(dict(model.vae.state_dict()), trained["vae"]["vae"]) and set(model.priors) == {"gaussian", "gmm"}
        assert same(vars(model.priors["gmm"]), trained["vae"]["gmm"])
        assert isinstance(model.priors["gaussian"], common.StandardNormal) and model.priors["gaussian"].d == 8
    if model.denoiser_for is not None:
        unet, train = networks[-2 if variant == "guided" else -1], state["train"]
        assert same(dict(unet.state_dict()), state["unet"]) and model.diffusion.objective == train["objective"]
        assert model.diffusion.start == (1000 if variant == "uncond" else train["start"]) and train["start"] < 1000
        (x, x_hat), t = torch.randn(2, 1, 3, 32, 32), torch.tensor([500])
        expected = stage1.denoiser(unet, x_hat, variant)
        if variant == "guided":
            assert same(dict(networks[-1].state_dict()), state["guide"]) and not same(state["guide"], state["unet"])
            expected = stage1.guided_denoiser(expected, stage1.denoiser(networks[-1], x_hat, variant), 0.5)
        assert torch.equal(model.denoiser_for(x_hat, None, None)(x, t), expected(x, t))


def test_guided_prediction():
    """It extrapolates from the guide's prediction to the refiner's and beyond, by the share that it is given. Each
    network is evaluated once a step."""
    x, t, calls = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]), []

    def predicts(number):
        return lambda xt, t: calls.append((number, xt, t)) or torch.full_like(xt, number)

    assert torch.equal(stage1.guided_denoiser(predicts(5.0), predicts(1.0), 0.75)(x, t), x + 5 + 0.75 * 4)
    assert calls == [(5.0, x, t), (1.0, x, t)]


def test_a_guided_checkpoint_contains_its_guide(trained):
    """Weights, log and guidance of the guide, the seconds of both trainings, a run_id that changes with either. The
    rest is form1's, and so the seconds of the VAE count once. Its model counts both U-Nets."""
    form1, guide = trained["form1"] | {"seconds": 5.0}, trained["form2"] | {"seconds": 2.0}
    guide |= {"train": guide["train"] | {"guidance": 0.3}}
    state = stage1.with_guide(form1, guide)
    assert state["guide"] is guide["unet"] and state["log"] is guide["log"] and state["train"]["guidance"] == 0.3
    assert state["seconds"] == 7 and state["seconds_before"] == trained["vae"]["seconds"] > 0
    assert form1["run_id"] != guide["run_id"] and state["run_id"] == f"{form1['run_id']}+{guide['run_id']}"
    assert all(state[key] is form1[key] for key in form1.keys() - {"log", "seconds", "run_id", "train"})
    for name, networks in (("vae", 1), ("form1", 2), ("guided", 3)):
        assert len(stage1.load_model(trained[name], name, CPU).networks) == networks


def test_augmentation_is_for_training_alone(trained, tmp_path, monkeypatch):
    """In sampling, the U-Net of `augmented` sees x_hat without noise: it is form1 with other weights. The strengths of
    the noise in training are uniform, from 0 to 0.4."""
    state, (x, x_hat), t = trained["augmented"], torch.randn(2, 3, 3, 32, 32), torch.tensor([1, 100, 400])
    ours, form1 = (stage1.load_model(state, variant, CPU) for variant in ("augmented", "form1"))
    for unet in (ours.networks[-1], form1.networks[-1]):  # a new U-Net is nearly zero
        nn.init.constant_(unet.out.bias, 0.5)
        nn.init.constant_(unet.out.weight, 0.1)
    predicted = ours.denoiser_for(x_hat, None, None)(x, t)
    assert torch.equal(predicted, form1.denoiser_for(x_hat, None, None)(x, t))
    assert torch.equal(predicted, ours.networks[-1](torch.cat([x, x_hat], 1), t))
    assert torch.equal(common.generate(ours, 4, "gmm", "dpm", 2, 0, 4)[1],
                       common.generate(form1, 4, "gmm", "dpm", 2, 0, 4)[1])

    shown = []
    monkeypatch.setattr(common.VAE, "forward", lambda vae, x0, noise: (torch.zeros_like(x0), None, None))
    monkeypatch.setattr(stage1, "denoiser", lambda unet, x_hat, variant: shown.append(x_hat) or 1 / 0)
    for variant in ("augmented", "form1"):
        with pytest.raises(ZeroDivisionError):  # before any step
            stage1.train_refiner(tmp_path, settings(batch=1000), variant, trained["vae"], images_of(60), CPU)
    sds = shown[0].flatten(1).std(1).sort().values / 0.4  # of one image each
    assert torch.allclose(sds, (torch.arange(1000) + 0.5) / 1000, atol=0.06)  # the distribution function of U(0, 1)
    assert shown[0].mean().abs() < 0.001 and torch.equal(shown[1], torch.zeros(1000, 3, 32, 32))


@pytest.mark.parametrize("first", [1000, 300])
def test_same_z_and_noise_for_every_sampler_count_and_damage(first, trained):
    """Image k begins with the same x_hat and noise, whatever the sampler and the numbers of steps and images. Damage
    changes x_hat alone; temperature is a factor of the noise. From T on, x_start is that noise; from an earlier time it
    is x_start = a x_hat + s noise."""
    def start(sampler="dpm", steps=2, count=8, batch=4, damage=0.0, temperature=1.0):
        model, seen = stage1.load_model(trained["form1"], "form1", CPU), []
        model.diffusion, model.temperature = common.Diffusion("v", start=first), temperature
        unet = lambda x, t: seen.append(x.clone()) or torch.zeros_like(x[:, :3])  # noqa: E731
        model.denoiser_for = lambda x_hat, z, clean: stage1.denoiser(unet, x_hat, "form1")
        common.generate(model, count, "gaussian", sampler, steps, 0, batch, damage)
        x_start, x_hat = torch.cat(seen[::steps])[:count].chunk(2, 1)  # the first U-Net call of each batch
        a, s = (float(factor[first]) for factor in (model.diffusion.x0_scale, model.diffusion.eps_scale))
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


@pytest.mark.parametrize("flags,variants", [
    ("", "vae form1"), ("--variant guided", "form1 guided"), ("--variant form2 vae", "vae form2"),
    ("--variant uncond", "uncond"), ("--variant augmented", "augmented"),
    ("--variant all", "vae uncond form1 form2 guided augmented")])
def test_variants_and_what_they_build_on(flags, variants):
    assert stage1.read_flags(flags.split()).variant == variants.split()
