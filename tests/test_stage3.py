"""Stage 3: the flow's inverse, determinant and density, uncertainty, conditioning, training, strategies."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, data_of, same, settings
from torch.autograd import grad

import common
import fid
import stage1_baseline as stage1
import stage3_adaptive as stage3


def shaken(network, std=0.3):
    """A network with random weights in place of its zeros."""
    torch.manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=std)
    return network


def normal(*shape, purpose="test"):
    return common.randn(shape, common.generator(0, purpose))


# --- The flow --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("d", [5, 9, 64])
def test_flow_inverse_and_reach(d):
    """inverse(f(z)) = z and f(inverse(u)) = u. Every dimension is transformed, not only moved to another place."""
    flow, z = shaken(stage3.RealNVP(d), 0.1).double(), normal(40, d).double()
    u, order = flow(z)[0], torch.arange(d)
    assert torch.allclose(flow.inverse(u), z, atol=1e-4) and torch.allclose(flow(flow.inverse(z))[0], z, atol=1e-4)
    for permutation in flow.orders:
        order = order[permutation]
    assert ((u - z[:, order]).abs().amax(0) > 1e-3).all() and not torch.allclose(u, z, atol=0.1)


def test_flow_log_determinant_is_autograds():
    flow, z = shaken(stage3.RealNVP(5, hidden=16)).double(), normal(6, 5).double()
    log_det = flow(z)[1].detach()
    for row, value in zip(z, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], row)
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-8)


def test_flow_starts_as_the_identity():
    """A new flow only permutes z, so log p(z) is that of N(0, I)."""
    flow, z = stage3.RealNVP(6), normal(40, 6)
    assert torch.allclose(flow.log_prob(z), common.GaussianMixture.standard_normal(6).log_prob(z), atol=1e-5)


def test_flow_learns_two_moons():
    """Its log-density of held-out points is half a nat above that of the best Gaussian, and it samples points like
    them."""
    def moons(count, seed):  # two interleaved half circles (count, 2), roughly standardised
        gen = common.generator(seed, "moons")
        angle, upper = math.pi * torch.rand(count, generator=gen), torch.rand(count, generator=gen) < 0.5
        x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
        return torch.stack([x, y], 1) / torch.tensor([0.87, 0.5]) + 0.1 * common.randn((count, 2), gen)

    torch.manual_seed(0)
    z = moons(2000, 1)
    flow = stage3.fit_flow(stage3.RealNVP(2), moons(5000, 0), torch.full((5000, 2), -99.0), settings(flow_steps=300))
    gaussian = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov())
    assert (flow.log_prob(z) - gaussian.log_prob(z)).mean() > 0.5
    drawn = flow.sample(2000, common.generator(0, "samples"))
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.15) and torch.allclose(drawn.std(0), z.std(0), atol=0.15)
    assert torch.cdist(drawn, z).amin(1).mean() < 0.15  # close to the moons


def test_a_flow_fitted_ex_post_does_not_learn_the_draw():
    """All z ~ N(mu, 1/2) together follow N(0, I). Fitted to new draws in each step, the flow's log-density of held-out
    codes is close to N(0, I)'s. Fitted to one draw of each code, it is not."""
    mu, held_out = normal(300, 8) / 2**0.5, normal(2000, 8, purpose="held out")
    one_draw = mu + normal(300, 8, purpose="draw") / 2**0.5
    true, found = common.GaussianMixture.standard_normal(8).log_prob(held_out).mean(), []
    for codes, logvar in ((mu, math.log(0.5)), (one_draw, -99.0)):
        torch.manual_seed(0)
        flow = stage3.fit_flow(stage3.RealNVP(8), codes, torch.full_like(mu, logvar), settings(flow_steps=170))
        found.append(flow.log_prob(held_out).mean())
    fresh, fixed = found
    assert fresh > true - 1.5 and fixed < fresh - 1, (true, fresh, fixed)


def test_gradients_of_the_vae_and_its_flow():
    """The flow's gradient is that of its log-density of codes in both parts of the training. The VAE's is that of SSE +
    beta KL, with the KL to N(0, I) and then to the flow."""
    torch.manual_seed(0)
    network, x0 = stage3.build_vae_and_flow(settings()), common.to_float(data_of(4).train.images)
    vae, flow = network["vae"], shaken(network["flow"], 0.1)
    noise = torch.randn(4, vae.latent_dim)
    mu, logvar = vae.encoder(x0)
    z = mu + (0.5 * logvar).exp() * noise
    kl = stage3.gaussian_log_prob(z, mu, logvar) - flow.log_prob(z)
    loss_of_stage1, sse, kl_normal = stage1.vae_loss(vae, x0, noise, 0.25)
    of_vae, of_flow = list(vae.parameters()), list(flow.parameters())

    def close(ours, theirs):
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(ours, theirs, strict=True))

    flow_alone = grad(-flow.log_prob(z.detach()).mean(), of_flow)
    expected = [grad(total.mean(), of_vae, retain_graph=True) for total in (loss_of_stage1, sse + 0.25 * kl)]
    assert not close(*expected)
    for flow_is_prior in (False, True):
        loss, terms = stage3.vae_loss(vae, flow, x0, noise, 0.25, flow_is_prior)
        assert close(grad(loss.mean(), of_vae, retain_graph=True), expected[flow_is_prior])
        assert close(grad(loss.mean(), of_flow), flow_alone)
        for name, value in {"sse": sse, "kl_nats": kl_normal, "kl_flow_nats": kl}.items():
            assert torch.allclose(terms[name], value, rtol=1e-3)


# --- Uncertainty -----------------------------------------------------------------------------------------------------

# A VAE that keeps z in the first row of an 8x8 image and leaves the rest grey. Its log-variances depend on the image,
# but not on how large the error is.
PLANTED = SimpleNamespace(
    encoder=lambda x: (2 * x[:, 0, 0], 0.1 * torch.sin(80 * x[:, 0, 0]) - 9), latent_dim=8,
    decoder=lambda z: torch.nn.functional.pad(z[:, None, None] / 2, (0, 0, 0, 7, 0, 2)))


def planted_images(count, purpose, size):
    """What PLANTED leaves grey is noise of the size size(z)."""
    z, noise = normal(count, 8, purpose=purpose).clamp(-1.9, 1.9), 0.2 * normal(count, 3, 8, 8, purpose=f"{purpose} 2")
    noise[:, 0, 0] = 0
    return common.to_uint8(PLANTED.decoder(z) + size(z)[:, None, None, None] * noise)


def of_z(z):
    return (0.4 * z[:, 0] - 0.3 * z[:, 1] + 0.4 * z[:, 2] * z[:, 3]).exp()


def of_the_variance(z):
    _, logvar = PLANTED.encoder(common.to_float(common.to_uint8(PLANTED.decoder(z))))
    return (4 * (logvar.mean(1) + 9)).exp()


def test_s_by_hand():
    """The mean log-variance of x_hat, standardised and limited to -3..3."""
    vae = SimpleNamespace(encoder=lambda image: (None, image))
    uncertainty = stage3.Uncertainty("posterior", 2)
    uncertainty.mean, uncertainty.sd = torch.tensor(1.0), torch.tensor(0.5)
    logvar = torch.tensor([[2.0, 3], [0, 3], [0, 0], [0, 8]])
    assert uncertainty(vae, torch.zeros(4, 2), logvar).tolist() == [3, 1, -2, 3]


@pytest.mark.parametrize("size, finds", [(of_z, "regressed"), (of_the_variance, "posterior")])
def test_fitted_uncertainty(size, finds):
    """s has mean 0 and sd 1. Each kind finds the errors that depend on what it sees, also on other images."""
    images, others = planted_images(2000, "train", size), planted_images(1000, "held out", size)
    z, _ = common.encode(PLANTED.encoder, images, CPU)
    for kind in stage3.KINDS:
        own = settings(flow_steps=400)
        uncertainty = stage3.fit_uncertainty(kind, PLANTED, images, own, CPU)
        x_hat, s = stage3.decode(PLANTED, z, uncertainty, CPU)
        assert torch.equal(x_hat, common.to_uint8(PLANTED.decoder(z)))
        assert abs(s.mean()) < 0.03 and s.std() == pytest.approx(1, abs=0.02)
        rank = stage3.rank_errors(PLANTED, uncertainty, others, CPU)
        assert rank > 0.8 if kind == finds else abs(rank) < 0.5


@pytest.mark.parametrize("kind,conditioning", [("regressed", "film"), ("posterior", "fade")])
def test_same_s_in_training_and_sampling(kind, conditioning, tmp_path, monkeypatch):
    """s is made of z and x_hat in both. In the control, each image has the s of the image before it."""
    data, own, seen, x0s, draws = data_of(60), settings(2), [], [], []
    denoiser, batch, draw = stage3.denoiser, common.Training.batch, common.Training.normal
    base = stage3.train_vae(tmp_path / "vae", own, data, CPU)
    monkeypatch.setattr(stage3, "denoiser", lambda *args: seen.append(args[1:]) or denoiser(*args))
    monkeypatch.setattr(common.Training, "batch", lambda training: x0s.append(batch(training)) or x0s[-1])
    monkeypatch.setattr(common.Training, "normal", lambda *args: draws.append(draw(*args)) or draws[-1])
    state = stage3.train_refiner(tmp_path / "refiner", own, conditioning, kind, base, data, CPU)
    model = stage3.load_model(state, CPU)
    uncertainty = stage3.load_uncertainty(kind, model.vae, state, CPU)
    assert same(state["vae"], base["vae"]) and same(dict(model.networks[2].state_dict()), state["unet"])
    for (x_hat, s), x0, z_noise in zip(seen, x0s, draws[1::2], strict=True):  # the first draw of a step is eps
        z = common.reparameterise(*model.vae.encoder(x0), z_noise)
        assert torch.allclose(model.vae.decoder(z), x_hat, atol=1e-5)
        assert torch.allclose(uncertainty(model.vae, z, x_hat), s, atol=1e-4) and s.std() > 0.1
    z = normal(3, model.vae.latent_dim)
    x_hat = model.vae.decoder(z) + 0.1
    expected = uncertainty(model.vae, z, x_hat)
    for control in (False, True):
        stage3.load_model(state, CPU, shuffled=control).denoiser(x_hat, z)
        assert torch.equal(seen[-1][1], expected[[2, 0, 1]] if control else expected)


def test_density_and_uncertainty_stay_in_float32():
    """Networks may run in bfloat16. These do not: they are the same, bit for bit, beside such networks."""
    torch.manual_seed(0)
    vae, x0 = common.build_vae(settings()), common.to_float(data_of(4).train.images)
    flow, z = shaken(stage3.RealNVP(8), 0.2), torch.randn(4, 8)
    kinds = [shaken(stage3.Uncertainty(kind, 8), 0.2) for kind in stage3.KINDS]

    def numbers():
        return [flow.log_prob(z), *(uncertainty.raw(vae, z, x0) for uncertainty in kinds)]

    exact, logvar = numbers(), vae.encoder(x0)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(vae.encoder(x0)[1], logvar) and same(numbers(), exact)


# --- Conditioning ----------------------------------------------------------------------------------------------------

X_HAT, S = normal(3, 3, 8, 8), torch.tensor([-1.0, 0.0, 2.0])


def test_conditionings_start_where_they_should():
    """film and coupling start bit-equal to fixed, which is stage 1. fade multiplies x_hat by exp(-s/2) where s > 0."""
    shown, extra = stage3.Conditioner("fade", 32)(X_HAT, S)
    assert torch.equal(shown[:2], X_HAT[:2]) and torch.allclose(shown[2], X_HAT[2] * math.exp(-1)) and extra is None
    t, x = torch.tensor([5, 100, 300]), X_HAT.flip(0)
    for conditioning in ("fixed", "fade", "film", "coupling"):
        refiner = stage3.build_refiner(settings(), conditioning)
        shaken(refiner["unet"], 0.1)
        ours = stage3.denoiser(refiner, X_HAT, S)(x, t)
        theirs = stage1.denoiser(refiner["unet"], X_HAT, "form1")(x, t)
        assert torch.equal(ours, theirs) == (conditioning != "fade"), conditioning


@pytest.mark.parametrize("conditioning", ["film", "coupling"])
def test_conditionings_learn_from_s(conditioning):
    """Every parameter of the conditioner gets a gradient, and with random weights the prediction depends on s."""
    refiner, t = shaken(stage3.build_refiner(settings(), conditioning)), torch.tensor([5, 100, 300])
    a, b = (stage3.denoiser(refiner, X_HAT, s)(X_HAT, t) for s in (S, -S))
    assert not torch.allclose(a[0], b[0], atol=1e-3)
    a.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in refiner["conditioner"].parameters())


@pytest.mark.parametrize("parity", [0, 1])
def test_image_coupling_inverse(parity):
    """x is computed from y alone: the pixels that stay are the same in both, and so are scale and shift."""
    coupling = shaken(stage3.ImageCoupling(parity), 0.2)
    y = coupling(X_HAT, S)
    stays = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == parity
    shift = coupling(y * stays, S)  # what becomes of 0
    scale = coupling(y * stays + ~stays, S) - shift  # what becomes of 1, less that
    assert torch.allclose(torch.where(stays, y, (y - shift) / scale), X_HAT, atol=1e-5)
    assert torch.equal(y[:, :, stays], X_HAT[:, :, stays]) and not torch.allclose(X_HAT, y, atol=0.05)


# --- Training --------------------------------------------------------------------------------------------------------

def test_fixed_is_stage_1(tmp_path, monkeypatch):
    """With the same VAE, seed and draws, `fixed` trains stage 1's refiner, to the same bits."""
    def draws_by_shape(training, *shape):
        return normal(training.settings["batch"], *shape, purpose=f"{training.steps_taken} {shape}")

    own, data = settings(), data_of(60)
    base = stage3.train_vae(tmp_path / "vae", own, data, CPU)
    monkeypatch.setattr(common.Training, "normal", draws_by_shape)
    monkeypatch.setattr(common.Training, "uniform", lambda *args: draws_by_shape(*args).abs() % 1)
    ours = stage3.train_refiner(tmp_path / "fixed", own, "fixed", "regressed", base, data, CPU)
    theirs = stage1.train_refiner(tmp_path / "form1", own, "form1", base, data, CPU)
    assert same({name.removeprefix("unet."): value for name, value in ours["unet"].items()}, theirs["unet"])
    assert ours["log"] == theirs["log"] and ours["minutes"] > base["minutes"] > 0


def test_training_of_the_vae(tmp_path, monkeypatch):
    """The flow becomes the prior after 60% of the steps. Ex post, flow and mixture are fitted to the averaged VAE's
    codes of training images."""
    calls, loss, fit, fitted = [], stage3.vae_loss, stage3.fit_flow, []
    monkeypatch.setattr(stage3, "vae_loss", lambda *args, flow_is_prior: (
        calls.append((args[-1], flow_is_prior)) or loss(*args, flow_is_prior)))
    monkeypatch.setattr(stage3, "fit_flow", lambda *args: fitted.append(args[1:3]) or fit(*args))
    own, data = settings(10, beta=0.3), data_of(60)
    state = stage3.train_vae(tmp_path, own, data, CPU)
    assert calls == [(0.3, False)] * 6 + [(0.3, True)] * 4
    model = stage3.load_model(state, CPU)
    assert same(fitted, [common.encode(model.vae.encoder, data.train.images, CPU)])
    assert same(state["gmm"], common.fit_mixture(model.vae, data.train.images, own, CPU))
    assert set(model.priors) == {"gaussian", "gmm", "flow"} and model.denoiser is None
    assert same(dict(model.priors["flow"].state_dict()), state["flow"])


# --- What it shows ---------------------------------------------------------------------------------------------------

@pytest.fixture
def by_first(monkeypatch):
    """A model of PLANTED. Refinement adds its number of steps to every pixel."""
    def generate(model, settings, z):
        x_hat = common.to_uint8(PLANTED.decoder(z))
        return x_hat, x_hat + settings["sample_steps"], 0.5

    monkeypatch.setattr(common, "generate", generate)
    return common.Model(CPU, (3, 8, 8), (), PLANTED, {"gmm": common.GaussianMixture.standard_normal(8)})


def first(vae, z, x_hat):
    """In place of the uncertainty: the first number of z."""
    return z[:, 0]


def test_strategies(by_first, tmp_path, monkeypatch):
    """Steps by thirds of s, or in the control by thirds of the s of the image before. Images keep their order."""
    scored, pictures = [], []

    def scorer(images):
        scored.append(images)
        return {"fd": {"value": 1.0}, "hf_energy": {"value": 2.0}}

    scorer.distance = "fd"
    monkeypatch.setattr(common, "save_grid", lambda path, rows, columns: pictures.append((rows, columns)))
    own = settings(eval_samples=31, sample_steps=5)
    table = stage3.strategies(tmp_path, by_first, first, own, scorer, "gmm")
    z = common.GaussianMixture.standard_normal(8).sample(30, common.generator(0, "strategies"))
    third, other = z[:, 0].argsort().argsort() // 10, z[:, 0].roll(1).argsort().argsort() // 10  # 0 sure, 2 unsure
    expected = {"all": 5 + 0 * third, "two_steps": 2 + 0 * third, "by_s": 1 + third,
                "by_s_shuffled": 1 + other, "unsure_third": 5 * (third == 2),
                "unsure_third_shuffled": 5 * (other == 2)}
    assert list(table) == [*expected]
    for images, (name, steps) in zip(scored, expected.items(), strict=True):
        assert torch.equal(images - common.to_uint8(PLANTED.decoder(z)), steps[:, None, None, None].expand_as(images))
        assert table[name]["evaluations"] == pytest.approx(steps.float().mean().item()) and table[name]["fd"] == 1
    assert table["all"]["seconds_per_image"] == pytest.approx(0.5, abs=0.05)
    assert table["unsure_third"]["seconds_per_image"] == pytest.approx(0.5 / 3, abs=0.05)
    [(rows, titles)] = pictures
    assert torch.equal(rows["refined"], rows["VAE"] + 5) and len(titles) == 12
    assert titles[0] == f"s = {z[:, 0].min():.1f}" and titles[-1] == f"s = {z[:, 0].max():.1f}"


def test_terciles(by_first, tmp_path, monkeypatch):
    """Held-out images from sure to unsure, each compared with its own original; the control has shuffled s."""
    def mean_difference(scorer, images, originals):
        return (images.float() - originals.float()).mean().item(), len(images)

    monkeypatch.setattr(fid, "fd_to_originals", mean_difference)
    z = normal(33, 8).clamp(-1.9, 1.9)
    real = common.to_uint8(PLANTED.decoder(z))
    third = z[:, 0].argsort().argsort() // 10
    real[:30] -= third[:30, None, None, None].to(torch.uint8)  # errors 0, 1, 2 of the VAE's images
    splits = common.Data(None, common.ImageData(real, ""))
    data = SimpleNamespace(data=splits)
    table = stage3.terciles(tmp_path, by_first, by_first, first, settings(eval_samples=30), data)
    assert table["images"] == 30 and (tmp_path / "uncertainty.png").is_file()
    means = [table[name] for name in ("sure", "middle", "unsure")]
    assert [mean["vae"][1] for mean in means] == [10] * 3 and table["own_s"] == table["shuffled_s"]
    errors = [mean["vae"][0] for mean in means]
    assert errors[0] < errors[1] < errors[2] and all(mean["refined"][0] > mean["vae"][0] for mean in means)
