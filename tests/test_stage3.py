"""Stage 3: the flow's inverse, determinant and density, uncertainty, strategies, what is measured of them, training."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, denoiser_of, images_of, planted_setup, same, settings

import common
import fid
import stage1_baseline as stage1
import stage3_adaptive as stage3


def shaken(network, std=0.3, seed=0):
    """A network with random weights in place of its zeros."""
    torch.manual_seed(seed)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=std)
    return network


@pytest.mark.parametrize("d", [5, 9, 64, 512])
def test_flow_inverse_and_reach(d):
    """inverse(f(z)) = z and f(inverse(u)) = u. Every dimension is transformed, not only moved to another place."""
    flow, z = shaken(stage3.RealNVP(d), 0.1).double(), common.randn((40, d), common.generator(0)).double()
    u, order = flow(z)[0], torch.arange(d)
    assert torch.allclose(flow.inverse(u), z, atol=1e-4) and torch.allclose(flow(flow.inverse(z))[0], z, atol=1e-4)
    for permutation in flow.orders:
        order = order[permutation]
    assert ((u - z[:, order]).abs().amax(0) > 1e-3).all() and not torch.allclose(u, z, atol=0.1)


def test_flow_log_determinant_is_autograds():
    """log |det df/dz| of each sample agrees with slogdet of autograd's Jacobian, in 5 dimensions."""
    flow = shaken(stage3.RealNVP(5, hidden=16)).double()
    z = common.randn((6, 5), common.generator(0)).double()
    log_det = flow(z)[1].detach()
    assert log_det.shape == (6,)
    for row, value in zip(z, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], row)
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(value), rel=1e-6, abs=1e-8)


def test_flow_starts_as_the_identity():
    """A new flow only permutes z, so log p(z) is that of N(0, I). fit_flow begins with the weights that it is given."""
    flow, z = stage3.RealNVP(6), common.randn((40, 6), common.generator(0))
    normal = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    assert torch.allclose(flow.log_prob(z), normal, atol=1e-5) and torch.equal(flow(z)[1], torch.zeros(40))
    start = shaken(flow, 0.1).state_dict()
    again = stage3.fit_flow(start, torch.zeros(10, 6), torch.zeros(10, 6), 0, 0)
    assert same(dict(again.state_dict()), start) and not any(p.requires_grad for p in again.parameters())


def test_flow_learns_two_moons():
    """Its log-density of held-out points is half a nat above that of the best Gaussian, and it samples points like
    them."""
    def moons(count, seed):  # two interleaved half circles (count, 2), roughly standardised
        gen = common.generator(seed)
        angle, upper = math.pi * torch.rand(count, generator=gen), torch.rand(count, generator=gen) < 0.5
        x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
        return torch.stack([x, y], 1) / torch.tensor([0.87, 0.5]) + 0.1 * common.randn((count, 2), gen)

    torch.manual_seed(0)
    start, z = stage3.RealNVP(2).state_dict(), moons(2000, 1)
    flow = stage3.fit_flow(start, moons(5000, 0), torch.full((5000, 2), -99.0), 0, 300)
    gaussian = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov())
    assert float((flow.log_prob(z) - gaussian.log_prob(z)).mean()) > 0.5
    drawn = flow.sample(2000, common.generator(0))
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.15) and torch.allclose(drawn.std(0), z.std(0), atol=0.15)
    assert float(torch.cdist(drawn, z).amin(1).mean()) < 0.15  # close to the moons


def test_joint_kl_reaches_both_and_the_first_phase_only_the_flow():
    """In the first part the VAE gets the gradient of stage 1's loss, and the flow that of its log-density of the codes.
    In the second part both get that of SSE + beta (log q(z|x) - log p_flow(z)). The terms for the log are the SSE and
    both KLs."""
    torch.manual_seed(0)
    vae, x0 = stage3.build_vae(settings()), common.to_float(images_of(4).images)
    noise = torch.randn(4, vae.latent_dim)
    shaken(vae.flow, 0.1)
    mu, logvar = vae.encoder(x0)
    z = mu + (0.5 * logvar).exp() * noise
    kl = common.gaussian_log_prob(z, mu, logvar) - vae.flow.log_prob(z)
    loss_of_stage1, sse, kl_gaussian = stage1.vae_loss(vae, x0, noise, 0.25)
    by_hand = {False: loss_of_stage1 - vae.flow.log_prob(z.detach()),
               True: common.squared_error(vae.decoder(z), x0) + 0.25 * kl}
    gradients = []
    for flow_is_prior in (False, True):
        loss, terms = stage3.vae_loss(vae, x0, noise, 0.25, flow_is_prior)
        assert loss.shape == (4,) and torch.allclose(terms["kl_flow_nats"], kl)
        assert torch.allclose(terms["sse"], sse) and torch.allclose(terms["kl_nats"], kl_gaussian)
        for total in (loss, by_hand[flow_is_prior]):
            gradients.append(torch.autograd.grad(total.mean(), list(vae.parameters()), retain_graph=True))
    same_as = [[torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(gradients[0], g, strict=True)]
               for g in gradients[1:3]]
    assert all(same_as[0]) and sum(same_as[1]) < len(same_as[1]) / 2  # the two parts differ
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients[2:], strict=True))


def test_a_flow_fitted_ex_post_does_not_learn_the_draw():
    """All z ~ N(mu, 1/2) together follow N(0, I). Fitted to new draws in each step, the flow's log-density of held-out
    codes is close to N(0, I)'s. Fitted to one draw of each code, it is not."""
    gen = common.generator(0)
    mu, held_out = common.randn((300, 8), gen) / 2**0.5, common.randn((2000, 8), gen)
    half = torch.full_like(mu, math.log(0.5))
    one_draw = mu + common.randn(mu.shape, gen) / 2**0.5
    true = float(common.StandardNormal(8).log_prob(held_out).mean())
    torch.manual_seed(0)
    start = stage3.RealNVP(8).state_dict()
    fresh, fixed = (float(stage3.fit_flow(start, m, v, 0, 170).log_prob(held_out).mean()) for m, v in
                    ((mu, half), (one_draw, torch.full_like(mu, -99.0))))
    assert fresh > true - 1.5 and fixed < fresh - 1, (true, fresh, fixed)


# A VAE that keeps z in the first row of an 8x8 image and leaves the rest grey. Its log-variances depend on the image,
# but not on how large the error is.
PLANTED = SimpleNamespace(encoder=lambda x: (2 * x[:, 0, 0], 0.1 * torch.sin(80 * x[:, 0, 0]) - 9), latent_dim=8,
                          decoder=lambda z: torch.nn.functional.pad(z[:, None, None] / 2, (0, 0, 0, 7, 0, 2)))


def test_ridge_regression():
    """It is least squares of standardised columns with sqrt(ridge N) I below them. The units of x do not matter."""
    gen, unit = common.generator(0), torch.tensor([1, 100, 0.01, 5])
    x, y = common.randn((50, 4), gen) + 3, common.randn((50, 2), gen) + 7
    white = (x - x.mean(0)) / x.std(0)
    weight = np.linalg.lstsq(torch.cat([white, 5**0.5 * torch.eye(4)]).numpy(),
                             torch.cat([y - y.mean(0), torch.zeros(4, 2)]).numpy(), rcond=None)[0]
    for columns in (x, x * unit):
        ours, bias = common.ridge_regression(columns, y, 0.1)
        assert torch.allclose(columns @ ours + bias, white @ torch.from_numpy(weight) + y.mean(0), atol=1e-4)


def test_uncertainty_by_hand():
    """s_vec is standardised per dimension, clamped, and 0 in dimensions that are not in use. s is w . [z, z^2, s_vec] +
    b; `posterior` has the w and b of `variance`."""
    stats = {"mean": torch.tensor([0.0, 1.0, 5.0]), "sd": torch.tensor([1.0, 2.0, 1.0]),
             "active": torch.tensor([1.0, 1.0, 0.0]), "variance_weight": torch.tensor([0.0] * 6 + [-0.5, -0.5, 0]),
             "variance_bias": torch.tensor(0.25), "regressed_weight": torch.arange(9.0), "regressed_bias": 1}
    z, logvar = torch.tensor([[1.0, 2, 3], [0, 0, -1]]), torch.tensor([[2.0, 3.0, 9.0], [-99.0, 1.0, 0.0]])
    for kind, expected in (("variance", [-1.25, 1.75]), ("posterior", [-1.25, 1.75]), ("regressed", [92, -14])):
        s_vec, s = stage3.s_vec_and_s(z, logvar, stats, kind)
        assert s_vec.tolist() == [[2, 1, 0], [-3, 0, 0]] and s.tolist() == expected, kind


@pytest.mark.parametrize("network", ["planted", "random"])
def test_fitted_uncertainty(network):
    """s has mean 0 and sd 1, rises with the error, and is the same in a batch as alone. Only `regressed` finds errors
    that depend on z."""
    def planted_images(count, seed):  # what PLANTED leaves grey is noise whose size depends on z
        gen = common.generator(seed)
        z, noise = common.randn((count, 8), gen).clamp(-1.9, 1.9), 0.2 * common.randn((count, 3, 8, 8), gen)
        noise[:, 0, 0] = 0
        size = (0.4 * z[:, 0] - 0.3 * z[:, 1] + 0.2 * z[:, 2] ** 2).exp()
        return common.to_uint8(PLANTED.decoder(z) + size[:, None, None, None] * noise)

    vae, images, others = PLANTED, planted_images(2000, 0), planted_images(1000, 1)
    if network == "random":
        torch.manual_seed(0)
        vae = shaken(common.build_vae(settings()), 0.15).eval().requires_grad_(False)
        images, others = images_of(400).images, images_of(300, seed=2).images
    trip, held_out = (stage3.round_trip(vae, *of, CPU) for of in ((images, 0), (others, 1)))
    stats, z, error = stage3.fit_uncertainty(trip), trip.z, trip.sse
    assert torch.allclose(error, ((vae.decoder(z) - common.to_float(images)) ** 2).flatten(1).sum(1) / 4, rtol=1e-4)
    facts = stage3.rank_errors(held_out, stats)
    for kind, fact in facts.items():
        s_vec, s = stage3.uncertainty_of(vae, z, vae.decoder(z), stats, kind)
        assert abs(float(s.mean())) < 1e-3 and float(s.std()) == pytest.approx(1, abs=1e-3) and s_vec.abs().max() <= 3
        assert torch.corrcoef(torch.stack([s, error.log()]))[0, 1] > 0
        alone = stage3.uncertainty_of(vae, z[5:6], vae.decoder(z[5:6]), stats, kind)
        assert torch.allclose(alone[0], s_vec[5:6], atol=1e-2) and torch.allclose(alone[1], s[5:6], atol=1e-2)
        logvar = held_out.logvar if kind == "posterior" else held_out.logvar_of_x_hat
        ranks = [v.argsort().argsort().double() for v in (stage3.s_vec_and_s(held_out.z, logvar, stats, kind)[1],
                                                          held_out.sse)]
        assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) == pytest.approx(fact["correlation"], abs=0.02)
        assert ("does not rank" in fact["conclusion"]) == (fact["correlation"] < 0.1)
    if network == "planted":
        assert facts["regressed"]["correlation"] > 0.8 and abs(facts["variance"]["correlation"]) < 0.1


def test_conclusions_about_s():
    """s ranks the errors if its rank correlation with them is 0.1 or more, and significant. A constant s does not."""
    stats = {"mean": torch.zeros(1), "sd": torch.ones(1), "active": torch.ones(1),
             "variance_weight": torch.zeros(3), "variance_bias": 1.0, "regressed_bias": 0.0}

    def ranked(error, sign=1.0):  # s of `regressed` is z times `sign`
        z = torch.arange(float(len(error)))[:, None]
        facts = stage3.rank_errors(stage3.RoundTrip(z, z, 0 * z, 0 * z, error), stats | {
            "regressed_weight": torch.tensor([sign, 0, 0])})
        assert facts["variance"]["correlation"] == 0 and "does not rank" in facts["variance"]["conclusion"]
        return facts["regressed"]["correlation"], "does not rank" not in facts["regressed"]["conclusion"]

    rising, noise = torch.arange(400.0), 400 * torch.rand(400, generator=common.generator(0))
    assert ranked(rising.square()) == (pytest.approx(1), True) and ranked(rising, -1.0) == (pytest.approx(-1), False)
    correlation, ranks = ranked(rising + 2 * noise)
    assert ranks and 0.3 < correlation < 0.6
    assert ranked(torch.tensor([0.0, 3, 1, 4, 2])) == (pytest.approx(0.5), False)  # of five images: not significant
    many = torch.arange(20_000.0)
    weak, ranks = ranked(many + 1e5 * torch.randn(20_000, generator=common.generator(1)))
    assert not ranks and 0.03 < weak < 0.1  # significant, but too weak to be of use

    z, half = torch.zeros(400, 1), rising[:, None] / 800  # the log-variances of q(z | x) fall, Enc(x_hat)'s rise
    stats |= {"variance_weight": torch.tensor([0, 0, 1.0]), "regressed_weight": torch.zeros(3)}
    facts = stage3.rank_errors(stage3.RoundTrip(z, z, -half, half, rising), stats)
    assert {kind: fact["correlation"] for kind, fact in facts.items()} == {
        "variance": pytest.approx(1), "posterior": pytest.approx(-1), "regressed": 0}


def batch_of(n=3, d=8, seed=0):
    gen = common.generator(seed)
    return common.randn((n, 3, 8, 8), gen), common.randn((n, d), gen), torch.tensor([-1.0, 0.0, 2.0])


def test_strategies_start_where_they_should():
    """film and coupling start bit-equal to fixed, which is stage 1. fade multiplies x_hat by exp(-s/2) where s > 0."""
    x_hat, s_vec, s = batch_of()
    seen, extra = stage3.Conditioner("fade", 8, 32)(x_hat, s_vec, s)
    assert torch.equal(seen[:2], x_hat[:2]) and torch.allclose(seen[2], x_hat[2] * math.exp(-1)) and extra is None
    t, xt = torch.tensor([5, 100, 300]), x_hat.flip(0)
    for strategy in stage3.STRATEGIES:
        refiner = stage3.build_refiner(settings(conditioning=strategy), 8)
        shaken(refiner["unet"], 0.1)
        ours = stage3.denoiser(refiner, x_hat, s_vec, s)(xt, t)
        theirs = stage1.denoiser(refiner["unet"], x_hat, "form1")(xt, t)
        assert torch.equal(ours, theirs) == (strategy != "fade"), strategy


@pytest.mark.parametrize("strategy", ["film", "coupling"])
def test_strategies_learn_from_s(strategy):
    """Every parameter of the conditioner gets a gradient, and with random weights the output depends on s."""
    x_hat, s_vec, s = batch_of()
    conditioner = shaken(stage3.Conditioner(strategy, 8, 32))
    a, b = conditioner(x_hat, s_vec, s), conditioner(x_hat, -s_vec, -s)
    assert not torch.allclose(a[0], b[0], atol=1e-3)
    (a[0].square().sum() + (0 if a[1] is None else a[1].square().sum())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in conditioner.parameters())


@pytest.mark.parametrize("colour", [0, 1])
def test_image_coupling_inverse(colour):
    """x is computed from y alone: the pixels that stay are the same in both, and so are scale and shift."""
    x, _, s = batch_of()
    coupling = shaken(stage3.ImageCoupling(colour), 0.2)
    y = coupling(x, s)
    stays = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == colour
    shift = coupling(y * stays, s)  # what becomes of 0
    scale = coupling(y * stays + ~stays, s) - shift  # what becomes of 1, less that
    assert torch.allclose(torch.where(stays, y, (y - shift) / scale), x, atol=1e-5)
    assert not torch.allclose(x, y, atol=0.05)
    assert torch.equal(y[:, :, stays], x[:, :, stays])


def planted_model(**changes):
    """PLANTED with a refiner whose images depend on x_hat and on the noise."""
    model = common.Model("", CPU, (3, 8, 8), common.Diffusion("v", start=400), (), PLANTED,
                         {"gaussian": common.StandardNormal(8), "other": None},
                         denoiser_of(lambda x, x_hat: 0.3 * x - 0.1 * x_hat))
    return dataclasses.replace(model, **changes)


def first_of_z(z, x_hat):
    """A planted s: the first number of z."""
    return z[:, 0]


def score(images):
    """A planted score, which any change of the set of images would change."""
    return {"fd": {"value": float(images.double().square().mean())}}


def test_decode_and_refine_all(monkeypatch):
    """x_hat, s and the refined image of every code, in their order. Neither the noise that x_start of one chunk has,
    nor the noise that its steps add, occurs in another chunk."""
    z, noises, sample = common.StandardNormal(8).sample(250, common.generator(3)), [], common.sample

    def record(diffusion, denoise, x, sampler, steps, gen, **how):
        noises.append(x.clone())  # x_start at T is the noise alone
        noises.append(common.randn(x.shape, common.generator(gen.initial_seed())))  # of the first step, if it has any
        return sample(diffusion, denoise, x, sampler, steps, gen, **how)

    monkeypatch.setattr(common, "sample", record)
    model = planted_model(diffusion=common.Diffusion("v"))
    x_hat, s = stage3.decode_all(model, first_of_z, z)
    refined = stage3.refine_all(model, z, 3, 7)
    assert torch.equal(x_hat, common.to_uint8(PLANTED.decoder(z))) and torch.equal(s, z[:, 0])
    assert [len(noise) for noise in noises] == [100, 100, 100, 100, 50, 50] and refined.shape == (250, 3, 8, 8)
    for i, noise in enumerate(noises):
        assert not any(torch.equal(noise[:50], other[:50]) for other in noises[i + 1:])


def test_adaptivity_by_hand(tmp_path, monkeypatch):
    """The tables are about held-out images in the order of a planted s. The VAE's error rises with it, from the sure to
    the unsure third. In the control, s is made from z and x_hat of the image before. The picture goes from the surest
    image to the least sure one. Features are the pixels here."""
    def images(count, seed):  # PLANTED keeps the first row; the error of the rest grows with s
        z = common.StandardNormal(8).sample(count, common.generator(seed)).clamp(-1.9, 1.9)
        rest = (z[:, 0] + 2)[:, None, None, None] * 0.2 * common.randn((count, 3, 8, 8), common.generator(seed + 1))
        rest[:, 0, 0] = 0
        return SimpleNamespace(images=common.to_uint8(PLANTED.decoder(z) + rest))

    def pixels(extractor, images):
        return images.flatten(1).float() / 255, None

    def denoiser_for(x_hat, z, clean):
        return lambda x, t: 0.3 * x - 0.1 * x_hat + 0.2 * clean + 0.1 * z[:, :1, None, None]

    def denoiser_with_other_s(x_hat, z, clean):
        return denoiser_for(x_hat, z[[65, *range(65)]], clean[[65, *range(65)]])

    test, saved = images(70, 0), {}
    model = planted_model(temperature=0.7, denoiser_for=denoiser_for)
    setup = SimpleNamespace(evaluation={"grid_count": 44, "probe_steps": 3}, train={"seed": 2}, extractor=None,
                            test=test, data=images(70, 9))
    state = {"uncertainty": {"mean": torch.ones(1)}, "train": {"uncertainty": "variance"}}
    monkeypatch.setattr(fid, "extract", pixels)
    monkeypatch.setattr(common, "save_grid", lambda *args, columns: saved.update({args[0]: (args[1], columns)}))
    monkeypatch.setattr(stage3, "uncertainty_of", lambda vae, z, image, stats, kind: (
        z, z[:, 0] * stats["mean"] if (vae, kind) == (PLANTED, "variance") else None))
    monkeypatch.setattr(stage3, "adaptive_refinement", lambda *args: args)
    monkeypatch.setattr(stage3, "cost", lambda *args: ("cost", *args))
    monkeypatch.setattr(stage3, "noise_seen", lambda *args: ("noise", *args))
    tables = stage3.adaptivity(tmp_path, state, model, setup)

    real = test.images[:66]  # 3 (44 // 2)
    z = PLANTED.encoder(common.to_float(real))[0]

    def refined_by(model, seed):
        return common.to_uint8(common.refine(model, PLANTED.decoder(z), z, common.generator(seed), "dpm", 3))

    def against_originals(images, index):
        a, b = pixels(None, images[index])[0], pixels(None, real[index])[0]
        return {"fd_to_originals": fid.frechet_distance(fid.moments(a), fid.moments(b))}

    x_hat, refined = common.to_uint8(PLANTED.decoder(z)), refined_by(model, 82_000)
    of_seeds = torch.stack([pixels(None, refined_by(model, seed))[0] for seed in (82_000, 83_000, 84_000)])
    spread = (of_seeds - of_seeds.mean(0)).norm(dim=2).mean(0)
    order = z[:, 0].argsort()
    for i, name in enumerate(("sure", "middle", "unsure")):
        index = order[22 * i : 22 * i + 22]
        assert tables["terciles"][name] == {
            "spread": pytest.approx(float(spread[index].mean())),
            "vae": pytest.approx(against_originals(x_hat, index)),
            "refined": pytest.approx(against_originals(refined, index))}
    error = common.squared_error(common.to_float(x_hat), common.to_float(real))[order]
    assert 0 < 2 * error[:22].mean() < error[22:44].mean() < error[44:].mean()  # so their order is that of their errors
    everything = torch.arange(66)
    assert tables["terciles"]["images"] == 22 and tables["controls"]["images"] == 66
    assert tables["cost"] == ("cost", model, setup) and tables["noise_seen"] == ("noise", model, setup)
    assert tables["controls"]["true"] == pytest.approx(against_originals(refined, everything))
    assert tables["controls"]["shuffled"] == pytest.approx(
        against_originals(refined_by(dataclasses.replace(model, denoiser_for=denoiser_with_other_s), 82_000),
                          everything))
    by_prior = tables["adaptive_refinement"]
    assert list(by_prior) == ["flow", "gmm"]
    for prior, args in by_prior.items():
        assert args[:2] == (tmp_path, model) and args[3:] == (prior, setup)

    rows, titles = saved[tmp_path / "uncertainty.png"]
    shown = order[[0, 5, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65]]
    assert titles == [f"s = {value:.1f}" for value in z[shown, 0].tolist()] and len(titles) == 12
    assert {name: images.tolist() for name, images in rows.items()} == {
        "real": real[shown].tolist(), "VAE": x_hat[shown].tolist(), "refined": refined[shown].tolist()}


def test_density_and_uncertainty_stay_in_float32():
    """Networks may run in bfloat16. These two do not: they are the same, bit for bit, beside such networks."""
    torch.manual_seed(0)
    vae, x0 = common.build_vae(settings()), common.to_float(images_of(4).images)
    d = vae.latent_dim
    flow, z = stage3.RealNVP(d), torch.randn(4, d)
    for parameter in flow.parameters():  # at first, a flow is the identity
        torch.nn.init.normal_(parameter, std=0.2)
    stats = {"mean": torch.zeros(d), "sd": torch.ones(d), "active": torch.ones(d),
             "regressed_weight": torch.randn(3 * d), "regressed_bias": 0.0}

    def found():
        return flow.log_prob(z), *stage3.uncertainty_of(vae, z, x0, stats, "regressed")

    exact, logvar = found(), vae.encoder(x0)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(vae.encoder(x0)[1].float(), logvar)
        assert all(torch.equal(ours, expected) for ours, expected in zip(found(), exact, strict=True))


@pytest.mark.parametrize("full", [4, 2])
def test_adaptive_refinement(full, monkeypatch, tmp_path):
    """Each image is the one that common.refine makes with the steps of its third: 1, 2 and 3 as s rises (in the
    control: the s of the image before it), or 2 for all. Then `full` for all, or for the highest third alone, where
    the others are x_hat. z comes from the prior that is named. The picture has twelve of all images, evenly by s,
    before and after `full` steps."""
    real, model, scored, of_real = images_of(20).images, planted_model(), [], []
    setup = SimpleNamespace(evaluation={"count": 250, "prior": "gmm", "probe_steps": full}, train={"seed": 3},
                            fd_key="fd", score=lambda images: scored.append(images) or score(images),
                            test=SimpleNamespace(images=real))
    monkeypatch.setattr(fid, "hf_energy", lambda images, real: of_real.append(real) or {"value": images.float().var()})
    pictures = []
    monkeypatch.setattr(common, "save_grid", lambda path, rows, columns: pictures.append((path, rows, columns)))
    table = stage3.adaptive_refinement(tmp_path, model, first_of_z, "gaussian", setup)
    z = common.StandardNormal(8).sample(249, common.generator(85_003))
    rank = z[:, 0].argsort().argsort()  # of each image's s among all
    assert table["images"] == 249 and all(images is real for images in of_real)
    refined = {0: common.to_uint8(torch.cat([PLANTED.decoder(part) for part in z.split(100)]))}  # by number of steps
    for steps in (1, 2, 3, full):
        parts = [common.refine(model, PLANTED.decoder(part), part, common.generator(89_000 + 2 * i), "dpm", steps)
                 for i, part in enumerate(z.split(100))]
        refined[steps] = common.to_uint8(torch.cat(parts))
    own, other = rank // 83 + 1, rank.roll(1) // 83 + 1  # thirds have 83 images
    ways = {"even": torch.full((249,), 2), "adaptive_steps": own, "shuffled_steps": other,
            "three": torch.full((249,), 3), "all": torch.full((249,), full), "unsure_third": full * (own == 3),
            "shuffled_third": full * (other == 3)}
    assert list(table) == ["images", *ways]
    for images, (name, steps) in zip(scored, ways.items(), strict=True):
        assert torch.equal(images, torch.stack([refined[n][k] for k, n in enumerate(steps.tolist())]))
        assert table[name] == {"fd": score(images)["fd"], "hf_energy": {"value": images.float().var()}}
    assert full == 2 or not any(torch.equal(one, other) for one, other in itertools.combinations(scored, 2))
    [(path, rows, titles)] = pictures
    shown = [int((rank == round(k)).nonzero()) for k in torch.linspace(0, 248, 12).floor().tolist()]
    assert path == tmp_path / "generated-gaussian.png"
    assert titles == [f"s = {z[k, 0]:.1f}" for k in shown] and list(rows) == ["VAE", "refined"]
    assert torch.equal(rows["VAE"], refined[0][shown]) and torch.equal(rows["refined"], refined[full][shown])


def test_noise_seen(monkeypatch):
    """A refiner whose s sees the noise is measured at each strength of fid.robustness: there, the x_hat from which s is
    computed is the noisy one. The result is the mean of the three distances."""
    asked = []

    def planted_measure(model, setup, prior, sampler, steps, count, sd):
        asked.append((model.denoiser_for("noisy", "z", clean="clean"), prior, sampler, steps, count, sd))
        return {"fd": {"value": 30 * sd}}, None, None

    monkeypatch.setattr(fid, "measure", planted_measure)
    model = planted_model(denoiser_for=lambda x_hat, z, clean: (x_hat, z, clean))
    evaluation = {"prior": "flow", "sampler": "ddim", "sample_steps": 9, "probe_steps": 5, "grid_count": 44}
    table = stage3.noise_seen(model, SimpleNamespace(evaluation=evaluation, fd_key="fd"))
    assert table == {"images": 44, "mean": pytest.approx(7)}
    assert asked == [(("noisy", "z", "noisy"), "flow", "dpm", 5, 44, sd) for sd in (0.1, 0.2, 0.4)]


def test_cost_by_hand(monkeypatch):
    """With planted seconds and operations: those of a batch over its images, of at most 50, in as many steps as the
    headline has. `fixed` has the same U-Net, which sees x_hat as it is."""
    class UNet(torch.nn.Conv2d):
        def forward(self, x, t, extra=None):
            seen.append(x)
            return super().forward(x)

    def refined(run):  # the number of images, the steps, and whether the U-Net saw x_hat as it is
        seen.clear()
        run()
        return len(seen[0]), len(seen), torch.equal(seen[0][:, 3:], PLANTED.decoder(first)[: len(seen[0])])

    def planted_seconds(runs, device):
        timed.append({name: refined(run) for name, run in runs.items()})
        return {"fixed": 20.0, "this": 30.0}

    seen, timed, unet = [], [], UNet(6, 3, 3, padding=1)
    first = common.randn((50, 8), common.generator(0))
    model = planted_model(networks=(None, {"unet": unet}), denoiser_for=lambda x_hat, z, clean: (
        lambda x, t: unet(torch.cat([x, 0.5 * x_hat], 1), t)))
    monkeypatch.setattr(common, "time_in_turn", planted_seconds)
    monkeypatch.setattr(common, "count_gflops", lambda run: 7.0 if refined(run)[2] else 8.0)
    for batch, count in ((80, 50), (20, 20)):
        first = first[:count]
        table = stage3.cost(model, SimpleNamespace(evaluation={"batch": batch, "sample_steps": 4}))
        assert timed.pop() == {"fixed": (count, 4, True), "this": (count, 4, False)}
        assert table == {"fixed": {"seconds_per_image": 20 / count, "gflops_per_image": 7 / count},
                         "this": {"seconds_per_image": 30 / count, "gflops_per_image": 8 / count}}


def joint(**changes):
    """The settings of a VAE and of a refiner."""
    vae = settings(**{"steps": 2} | changes)
    own = {"conditioning": "film", "uncertainty": "regressed"}
    own |= {key: value for key, value in changes.items() if key in own}
    return vae, vae | own


def test_vae_and_refiner_have_their_own_steps_and_mirroring(tmp_path, monkeypatch):
    asked, vae = [], stage3.build_vae(joint()[0]).state_dict()
    monkeypatch.setattr(common, "Training", lambda *args, steps, flip, **networks: asked.append((steps, flip)) or 1 / 0)
    for flip in (False, True):
        vae_train, train = joint(vae_flip=flip, unet_flip=not flip, vae_steps=5, unet_steps=7)
        with pytest.raises(ZeroDivisionError):  # before any step
            stage3.train_vae(tmp_path, vae_train, images_of(2), CPU)
        with pytest.raises(ZeroDivisionError):
            stage3.train_refiner(tmp_path, train, {"vae": vae, "uncertainty": {}}, images_of(2), CPU)
    assert asked == [(5, False), (7, True), (5, True), (7, False)]


def test_the_flow_joins_after_three_fifths_of_the_steps(tmp_path, monkeypatch):
    """The first step's loss is vae_loss with the settings' beta. The log holds the terms of the loss."""
    (train, _), calls, loss = joint(vae_steps=10, unet_steps=3, every=1, beta=0.3), [], stage3.vae_loss
    monkeypatch.setattr(stage3, "vae_loss", lambda *args, flow_is_prior: (
        calls.append((args[3], flow_is_prior)) or loss(*args, flow_is_prior)))
    log = stage3.train_vae(tmp_path, train, images_of(60), CPU)["log"]
    assert calls == [(0.3, False)] * 6 + [(0.3, True)] * 4
    training = common.Training(tmp_path / "again", train, CPU, images_of(60).images, 10, False)
    torch.manual_seed(0)
    x0, vae = training.batch(), stage3.build_vae(train)
    _, terms = loss(vae, x0, training.normal(8), 0.3, False)
    assert log[0] == pytest.approx({"step": 1} | {name: float(term.detach().mean()) for name, term in terms.items()})


def test_what_is_fitted_ex_post(tmp_path):
    """The mixture and the flow are fitted to the codes of the training images; the flow goes on from the one that was
    trained with the VAE. The uncertainty is fitted to their errors, in the order of a seeded permutation."""
    train, data = joint(seed=4, flow_steps=3)[0], images_of(60)
    state = stage3.train_vae(tmp_path, train, data, CPU)
    vae = common.frozen(stage3.build_vae(train), state["vae"], CPU)
    flow = stage3.fit_flow(vae.flow.state_dict(), *common.encode(vae, data.images, CPU), 4, 3)
    order = torch.randperm(60, generator=common.generator(0))
    trip = stage3.round_trip(vae, data.images[order], 4, CPU)
    assert same(state["flow"], dict(flow.state_dict())) and not same(state["flow"], dict(vae.flow.state_dict()))
    assert same(state["uncertainty"], stage3.fit_uncertainty(trip))
    assert same(state["gmm"], common.fit_mixture(vae, data.images, train, CPU))


def test_the_command_ranks_held_out_errors(tmp_path, monkeypatch, capsys):
    """The uncertainty is fitted to training images and examined on others. Both runs are evaluated under the prior that
    the flag names, the refiner at the flag's temperature, and each image with its own s."""
    data, test, evaluated, loaded, load_model = images_of(100), images_of(80, seed=2), [], [], stage3.load_model
    monkeypatch.setattr(stage3, "load_model", lambda *args, **how: loaded.append(how) or load_model(*args, **how))
    monkeypatch.setattr(fid, "Setup", lambda args, train, evaluation, device: planted_setup(
        tmp_path, train, evaluation=evaluation, device=device, data=data, test=test))
    monkeypatch.setattr(fid, "by_components", lambda model, setup: [model.name, setup.train["budget"]])
    monkeypatch.setattr(fid, "evaluate", lambda folder, setup, state, model: evaluated.append(
        (folder.name, setup.evaluation["prior"], model.temperature)) or {"tables": {"bits_per_dim": 1}})
    monkeypatch.setattr(fid, "print_results", lambda *args: None)
    monkeypatch.setattr(stage3, "adaptivity", lambda folder, state, model, setup: {"of": folder.name, "by": model.name})
    stage3.main("--budget smoke --device cpu --seed 2 --uncertainty posterior --temperature 0.8 --steps 2".split())
    names = ["stage3-vae-flow-s2", "stage3-flow-film-posterior-s2"]
    of_vae, of_refiner = (json.loads((tmp_path / name / "metrics.json").read_text())["tables"] for name in names)
    assert evaluated == [(names[0], "flow", 1.0), (names[1], "flow", 0.8)] and loaded == [{}, {}]
    state = common.load_checkpoint(tmp_path / names[0] / "checkpoint.pt")
    vae = common.frozen(stage3.build_vae(state["train"]), state["vae"], CPU)
    ranks, of_training = (stage3.rank_errors(stage3.round_trip(vae, images, 75_002, CPU), state["uncertainty"])
                          for images in (test.images, data.images))
    assert of_vae == {"bits_per_dim": 1, "uncertainty": ranks, "components": ["vae", "smoke"]} and ranks != of_training
    assert of_refiner == {"bits_per_dim": 1, "uncertainty": ranks, "adaptivity": {"of": names[1], "by": "film"}}
    assert f"regressed: rank correlation with held-out squared errors {ranks['regressed']['correlation']:.3f}" in (
        capsys.readouterr().out)


def test_the_bound_has_the_kl_to_the_prior_that_its_row_names(tmp_path):
    """It is the KL of one sample z, log q(z|x) - log p(z)."""
    data, unit, (vae_train, train) = images_of(60), 3072 * math.log(2), joint()
    vae_state = stage3.train_vae(tmp_path / "vae", vae_train, data, CPU)
    model = stage3.load_model(stage3.train_refiner(tmp_path / "refiner", train, vae_state, data, CPU), CPU)
    shaken(model.priors["flow"], 0.3)
    setup = SimpleNamespace(evaluation={"bits_images": 60, "bits_draws": 1}, train=train, test=data)
    mu, logvar = common.encode(model.vae, data.images, CPU)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    z, kls = q.mean + q.stddev * common.randn(mu.shape, common.generator(60_000)), {}
    for name, prior in model.priors.items():
        kls[name] = float((q.log_prob(z).sum(1) - prior.log_prob(z)).mean())
        bits = fid.bits_per_dim(model, name, setup)
        assert unit * bits["kl"] == pytest.approx(kls[name], rel=1e-3) and bits["latent_prior"] == name
        parts = sum(bits[part] for part in ("kl", "prior", "diffusion", "data"))
        assert bits["bound"]["value"] == pytest.approx(parts, rel=1e-5)
    assert min(abs(kls[a] - kls[b]) / abs(kls[b]) for a in kls for b in kls if a != b) > 0.05  # they differ


def test_fixed_is_stage_1(tmp_path):
    """With the same VAE and seed, `fixed` trains stage 1's refiner, to the same bits. The seconds of the VAE are a
    refiner's seconds before."""
    vae_train, train = joint(steps=8)
    train, data = train | {"conditioning": "fixed"}, images_of(60)
    vae_state = stage3.train_vae(tmp_path / "vae", vae_train, data, CPU)
    # Stage 1 does not know the flow that is a part of stage 3's VAE.
    weights = {name: value for name, value in vae_state["vae"].items() if not name.startswith("flow.")}
    stage1_state = vae_state | {"vae": weights}
    ours = stage3.train_refiner(tmp_path / "fixed", train, vae_state, data, CPU)
    theirs = stage1.train_refiner(tmp_path / "form1", train, "form1", stage1_state, data, CPU)
    assert same({name.removeprefix("unet."): value for name, value in ours["unet"].items()}, theirs["unet"])
    assert ours["log"] == theirs["log"] and ours["seconds_before"] == vae_state["seconds"]


@pytest.mark.parametrize("source", ["regressed", "variance", "posterior"])
def test_same_s_in_training_and_sampling(source, tmp_path, monkeypatch):
    """s is the same function of z in both, whatever noise x_hat has. `posterior` is trained with q(z|x)'s variance."""
    vae_train, train = joint()
    train |= {"uncertainty": source}
    data, seen, x0s, denoiser, batch = images_of(60), [], [], stage3.denoiser, common.Training.batch
    draws, normal = [], common.Training.normal  # two in each step: for z and for x_t
    vae_state = stage3.train_vae(tmp_path / "vae", vae_train, data, CPU)
    monkeypatch.setattr(stage3, "denoiser", lambda *args: seen.append(args) or denoiser(*args))
    monkeypatch.setattr(common.Training, "batch", lambda training: x0s.append(batch(training)) or x0s[-1])
    monkeypatch.setattr(common.Training, "normal", lambda *args: draws.append(normal(*args)) or draws[-1])
    state = stage3.train_refiner(tmp_path / "refiner", train, vae_state, data, CPU)
    assert len(seen) == len(x0s) == 2 and same(state["vae"], vae_state["vae"])
    model, stats = stage3.load_model(state, CPU), state["uncertainty"]
    assert not any(p.requires_grad for p in model.vae.parameters())
    assert model.networks[:3] == (model.vae.encoder, model.vae.decoder, model.priors["flow"])
    assert len(model.networks) == 4 and same(dict(model.networks[3].state_dict()), state["unet"])
    for (_, x_hat, s_vec, s), x0, z_noise in zip(seen, x0s, draws[::2], strict=True):
        mu, logvar = model.vae.encoder(x0)
        z = mu + (0.5 * logvar).exp() * z_noise
        own = stage3.uncertainty_of(model.vae, z, x_hat, stats, source)
        other = stage3.s_vec_and_s(z, logvar, stats, source)
        own, other = (other, own) if source == "posterior" else (own, other)
        assert torch.allclose(own[0], s_vec, atol=1e-4) and torch.allclose(own[1], s, atol=1e-4)
        assert not torch.allclose(other[1], s, atol=0.1)
    z = common.randn((3, model.vae.latent_dim), common.generator(0))
    damaged = torch.zeros(3, 3, 32, 32)  # s does not depend on the x_hat that the refiner is shown
    with torch.no_grad():
        clean = model.vae.decoder(z) + 0.01  # nor is z decoded again
        s_vec, s = stage3.uncertainty_of(model.vae, z, clean, stats, source)
        model.denoiser_for(damaged, z, clean)
        assert torch.equal(seen[-1][1], damaged) and torch.equal(seen[-1][2], s_vec) and torch.equal(seen[-1][3], s)
