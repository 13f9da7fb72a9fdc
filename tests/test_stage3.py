"""Stage 3: the flow's inverse, determinant and density, uncertainty, strategies, adaptive refinement, the bound."""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, images_of, same, settings

import common
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
    """The inverse holds both ways; every dimension is transformed, not only permuted."""
    flow, z = shaken(stage3.RealNVP(d), 0.1).double(), common.randn((40, d), common.generator(0)).double()
    u, order = flow(z)[0], torch.arange(d)
    assert torch.allclose(flow.inverse(u), z, atol=1e-4) and torch.allclose(flow(flow.inverse(z))[0], z, atol=1e-4)
    for permutation in flow.orders:
        order = order[permutation]
    assert ((u - z[:, order]).abs().amax(0) > 1e-3).all() and not torch.allclose(u, z, atol=0.1)


def test_flow_log_determinant_is_autograds():
    """log |det df/dz| once per sample, against slogdet of the Jacobian, in 5 dimensions."""
    flow = shaken(stage3.RealNVP(5, hidden=16)).double()
    z = common.randn((6, 5), common.generator(0)).double()
    log_det = flow(z)[1].detach()
    assert log_det.shape == (6,)
    for row, value in zip(z, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], row)
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(value), rel=1e-6, abs=1e-8)


def test_flow_starts_as_the_identity():
    """At the start u is a permutation of z, and log p is N(0, I)'s; fitted ex post it starts from what it is given."""
    flow, z = stage3.RealNVP(6), common.randn((40, 6), common.generator(0))
    normal = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    assert torch.allclose(flow.log_prob(z), normal, atol=1e-5) and torch.equal(flow(z)[1], torch.zeros(40))
    start = shaken(flow, 0.1).state_dict()
    again = stage3.fit_flow(torch.zeros(10, 6), torch.zeros(10, 6), 0, 0, start)
    assert same(dict(again.state_dict()), start) and not any(p.requires_grad for p in again.parameters())


def test_flow_learns_two_moons():
    """It beats the best Gaussian by half a nat on held-out points, and samples what it learnt."""
    def moons(count, seed):  # two interleaved half circles (count, 2), roughly standardised
        gen = common.generator(seed)
        angle, upper = math.pi * torch.rand(count, generator=gen), torch.rand(count, generator=gen) < 0.5
        x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
        return torch.stack([x, y], 1) / torch.tensor([0.87, 0.5]) + 0.1 * common.randn((count, 2), gen)

    flow, z = stage3.fit_flow(moons(5000, 0), torch.full((5000, 2), -99.0), 0, 300), moons(2000, 1)
    gaussian = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov())
    assert float((flow.log_prob(z) - gaussian.log_prob(z)).mean()) > 0.5
    drawn = flow.sample(2000, common.generator(0))
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.15) and torch.allclose(drawn.std(0), z.std(0), atol=0.15)
    assert float(torch.cdist(drawn, z).amin(1).mean()) < 0.15  # near the moons


def test_joint_kl_reaches_both_and_the_first_phase_only_the_flow():
    """Before the joint phase the VAE has the gradient of stage 1's loss and the flow that of its likelihood alone; then
    both have that of SSE + beta (log q(z|x) - log p_flow(z)). Without a flow the loss is stage 1's."""
    torch.manual_seed(0)
    vae, x0 = stage3.build_vae(settings(vae_prior="flow")), common.to_float(images_of(4).images)
    noise = torch.randn(4, vae.latent_dim)
    shaken(vae.flow, 0.1)
    mu, logvar = vae.encoder(x0)
    z = mu + (0.5 * logvar).exp() * noise
    kl = common.gaussian_log_prob(z, mu, logvar) - vae.flow.log_prob(z)
    stage_1 = stage1.vae_loss(vae, x0, noise, 0.25)[0]
    by_hand = {False: stage_1 - vae.flow.log_prob(z.detach()),
               True: common.squared_error(vae.decoder(z), x0) + 0.25 * kl}
    gradients = []
    for joint in (False, True):
        loss, terms = stage3.vae_loss(vae, x0, noise, 0.25, joint)
        assert loss.shape == (4,) and torch.allclose(terms["kl_flow_nats"], kl)
        for total in (loss, by_hand[joint]):
            gradients.append(torch.autograd.grad(total.mean(), list(vae.parameters()), retain_graph=True))
    same_as = [[torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(gradients[0], g, strict=True)]
               for g in gradients[1:3]]
    assert all(same_as[0]) and sum(same_as[1]) < len(same_as[1]) / 2  # in the two phases they differ
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients[2:], strict=True))
    assert stage3.build_vae(settings(vae_prior="gaussian")).flow is None
    vae.flow = None
    assert torch.equal(stage3.vae_loss(vae, x0, noise, 0.25, True)[0], stage_1)


def test_a_flow_fitted_ex_post_does_not_learn_the_draw():
    """All z ~ N(mu, 1/2) are N(0, I): drawn anew in each step a flow comes near, fitted to one draw not."""
    gen = common.generator(0)
    mu, held_out = common.randn((300, 8), gen) / 2**0.5, common.randn((2000, 8), gen)
    half = torch.full_like(mu, math.log(0.5))
    one_draw = mu + common.randn(mu.shape, gen) / 2**0.5
    true = float(common.StandardNormal(8).log_prob(held_out).mean())
    fresh, fixed = (float(stage3.fit_flow(m, v, 0, 250).log_prob(held_out).mean()) for m, v in
                    ((mu, half), (one_draw, torch.full_like(mu, -99.0))))
    assert fresh > true - 1.5 and fixed < fresh - 1, (true, fresh, fixed)


# A VAE that keeps z in the first row of an 8x8 image and leaves the rest grey; its log-variances say nothing of errors
PLANTED = SimpleNamespace(encoder=lambda x: (2 * x[:, 0, 0], 0.1 * torch.sin(80 * x[:, 0, 0]) - 9), latent_dim=8,
                          decoder=lambda z: torch.nn.functional.pad(z[:, None, None] / 2, (0, 0, 0, 7, 0, 2)))


def test_ridge_regression():
    """Least squares of standardised columns with sqrt(ridge N) I below them; the units of x do not matter."""
    gen, unit = common.generator(0), torch.tensor([1, 100, 0.01, 5])
    x, y = common.randn((50, 4), gen) + 3, common.randn((50, 2), gen) + 7
    white = (x - x.mean(0)) / x.std(0)
    weight = np.linalg.lstsq(torch.cat([white, 5**0.5 * torch.eye(4)]).numpy(),
                             torch.cat([y - y.mean(0), torch.zeros(4, 2)]).numpy(), rcond=None)[0]
    for columns in (x, x * unit):
        ours, bias = common.ridge_regression(columns, y, 0.1)
        assert torch.allclose(columns @ ours + bias, white @ torch.from_numpy(weight) + y.mean(0), atol=1e-4)


def test_uncertainty_by_hand():
    """Per dimension, clamped, inactive ones zero; s is w . [z, z^2, s_vec] + b, with `variance`'s for `posterior`."""
    stats = {"mean": torch.tensor([0.0, 1.0, 5.0]), "sd": torch.tensor([1.0, 2.0, 1.0]),
             "active": torch.tensor([1.0, 1.0, 0.0]), "variance_weight": torch.tensor([0.0] * 6 + [-0.5, -0.5, 0]),
             "variance_bias": torch.tensor(0.25), "regressed_weight": torch.arange(9.0), "regressed_bias": 1}
    z, logvar = torch.tensor([[1.0, 2, 3], [0, 0, -1]]), torch.tensor([[2.0, 3.0, 9.0], [-99.0, 1.0, 0.0]])
    for kind, expected in (("variance", [-1.25, 1.75]), ("posterior", [-1.25, 1.75]), ("regressed", [92, -14])):
        s_vec, s = stage3.read_s(z, logvar, stats, kind)
        assert s_vec.tolist() == [[2, 1, 0], [-3, 0, 0]] and s.tolist() == expected, kind


@pytest.mark.parametrize("network", ["planted", "random"])
def test_fitted_uncertainty(network):
    """s has mean 0 and sd 1, high is hard, alone as in a batch; only `regressed` finds errors that depend on z."""
    def planted_images(count, seed):  # what PLANTED leaves grey is noise whose size depends on z
        gen = common.generator(seed)
        z, noise = common.randn((count, 8), gen).clamp(-1.9, 1.9), 0.2 * common.randn((count, 3, 8, 8), gen)
        noise[:, 0, 0] = 0
        size = (0.4 * z[:, 0] - 0.3 * z[:, 1] + 0.2 * z[:, 2] ** 2).exp()
        return common.to_uint8(PLANTED.decoder(z) + size[:, None, None, None] * noise)

    vae, images, others = PLANTED, planted_images(2000, 0), planted_images(1000, 1)
    if network == "random":
        torch.manual_seed(0)
        vae = shaken(stage3.build_vae(settings(vae_prior="gaussian")), 0.15).eval().requires_grad_(False)
        images, others = images_of(400).images, images_of(300, seed=2).images
    trip, held_out = (stage3.round_trip(vae, *of, CPU) for of in ((images, 0), (others, 1)))
    stats, z, error = stage3.fit_uncertainty(trip), trip.z, trip.sse
    assert torch.allclose(error, ((vae.decoder(z) - common.to_float(images)) ** 2).flatten(1).sum(1) / 4, rtol=1e-4)
    facts = stage3.rank_errors(held_out, stats)
    for kind, fact in facts.items():
        s_vec, s = stage3.uncertainty(vae, z, vae.decoder(z), stats, kind)
        assert abs(float(s.mean())) < 1e-3 and float(s.std()) == pytest.approx(1, abs=1e-3) and s_vec.abs().max() <= 3
        assert torch.corrcoef(torch.stack([s, error.log()]))[0, 1] > 0
        alone = stage3.uncertainty(vae, z[5:6], vae.decoder(z[5:6]), stats, kind)
        assert torch.allclose(alone[0], s_vec[5:6], atol=1e-2) and torch.allclose(alone[1], s[5:6], atol=1e-2)
        ranks = [v.argsort().argsort().double() for v in
                 (stage3.read_s(held_out.z, held_out.logvar_again, stats, kind)[1], held_out.sse)]
        assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) == pytest.approx(fact["correlation"], abs=0.02)
        assert ("no information" in fact["verdict"]) == (fact["correlation"] < 0.1)
    if network == "planted":
        assert facts["regressed"]["correlation"] > 0.8 and abs(facts["variance"]["correlation"]) < 0.1


def batch_of(n=3, d=8, seed=0):
    gen = common.generator(seed)
    return common.randn((n, 3, 8, 8), gen), common.randn((n, d), gen), torch.tensor([-1.0, 0.0, 2.0])


def test_strategies_start_where_they_should():
    """film and coupling start bit-equal to fixed, as stage 1 conditions; fade fades by exp(-s/2) where s > 0."""
    x_hat, s_vec, s = batch_of()
    seen, extra = stage3.Conditioner("fade", 8, 32)(x_hat, s_vec, s)
    assert torch.equal(seen[:2], x_hat[:2]) and torch.allclose(seen[2], x_hat[2] * math.exp(-1)) and extra is None
    t, xt = torch.tensor([5, 100, 300]), x_hat.flip(0)
    for strategy in stage3.STRATEGIES:
        refiner = stage3.build_refiner(settings(conditioning=strategy), 8)
        shaken(refiner["unet"], 0.1)
        ours = stage3.condition(refiner, x_hat, s_vec, s)(xt, t)
        theirs = stage1.condition(refiner["unet"], x_hat, "form1")(xt, t)
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
    """From y alone: what passes is the same in x and y, so scale and shift are, too."""
    x, _, s = batch_of()
    coupling = shaken(stage3.ImageCoupling(colour), 0.2)
    y = coupling(x, s)
    passes = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == colour
    shift = coupling(y * passes, s)  # where nothing passes, of zeros
    scale = coupling(y * passes + ~passes, s) - shift
    assert torch.allclose(torch.where(passes, y, (y - shift) / scale), x, atol=1e-5)
    assert not torch.allclose(x, y, atol=0.05)
    assert torch.equal(y[:, :, passes], x[:, :, passes])


@pytest.mark.parametrize("n,start", [(10, 400), (25, 290), (2, 1000)])
def test_allocation_keeps_the_mean_and_the_order(n, start):
    s = torch.randperm(30, generator=common.generator(0)).float()
    ways, low, middle = stage3.allocate(s, n, start), start // 2, 3 * start // 4
    assert [third[1:] for third in ways["adaptive_steps"]] == [(n // 2, start), (n, start), (2 * n - n // 2, start)]
    assert [third[1:] for third in ways["adaptive_start"]] == [(n, low), (n, middle), (n, start)]
    for name, thirds in ways.items():
        assert sorted(torch.cat([index for index, *_ in thirds]).tolist()) == list(range(30))
        given = torch.empty(30, 2)
        for index, *third in thirds:
            given[index] = torch.tensor(third).float()
        steps, starts = given[(s.roll(1) if "shuffled" in name else s).argsort()].T
        assert (steps.diff() >= 0).all() and (starts.diff() >= 0).all() and float(steps.mean()) == n
        assert float(starts.mean()) == pytest.approx(middle if "start" in name else start, abs=1)


def test_adaptive_refinement(monkeypatch):
    """Each image as common.refine makes it in its third's steps and start; if these are equal, `even` bit for bit."""
    model = common.Model("", CPU, (3, 8, 8), common.Diffusion("v", start=400), PLANTED,
                         {"gaussian": common.StandardNormal(8)}, lambda x_hat, z: lambda x, t: 0.3 * x - 0.1 * x_hat)
    scored, measure = [], lambda z, x_hat: (z, z[:, 0])
    setup = SimpleNamespace(evaluation={"count": 250, "prior": "gaussian"}, train={"seed": 0},
                            extractor=None, reference=None, fd="fd", test=SimpleNamespace(images=None))
    monkeypatch.setattr(stage3, "MEAN_STEPS", 4)
    monkeypatch.setattr(stage3.fid, "scores", lambda extractor, images, reference: {"fd": scored.append(images)})
    monkeypatch.setattr(common, "hf_energy", lambda images, real: 0)
    table = stage3.adaptive_refinement(model, measure, setup)
    z = common.StandardNormal(8).sample(249, common.generator(85_000))
    ways = stage3.allocate(z[:, 0], 4, 400)
    assert list(table) == ["mean_steps", *ways] and not any(map(torch.equal, scored, scored[1:]))
    for images, thirds in zip(scored, ways.values(), strict=True):
        for index, steps, start in thirds:
            model.diffusion = common.Diffusion("v", start=start)
            parts = [common.refine(model, PLANTED.decoder(part), part, common.generator(86_000 + i), "dpm", steps)
                     for i, part in enumerate(z.split(100))]
            assert torch.equal(images[index], common.to_uint8(torch.cat(parts))[index])
    monkeypatch.setattr(stage3, "allocate", lambda s, n, start: {
        name: [(index, n, start) for index in by.argsort().tensor_split(3)] for name, by in (("a", s), ("b", -s))})
    stage3.adaptive_refinement(model, measure, setup)
    assert torch.equal(*scored[-2:])


def joint(**changes):
    vae = settings() | {"vae_prior": "flow", "steps": 2} | changes
    return vae, vae | {"conditioning": "film", "uncertainty": "regressed"} | changes


def test_the_bound_charges_the_prior_that_the_row_names(tmp_path, monkeypatch):
    """The bound has one draw's KL to each prior."""
    monkeypatch.setattr(common, "autocast", contextlib.nullcontext)  # in float32
    data, unit = images_of(60), 3072 * math.log(2)
    for trained_under in ("gaussian", "flow"):
        vae_train, train = joint(vae_prior=trained_under)
        home = tmp_path / trained_under
        vae_state = stage3.train_vae(home / "vae", vae_train, data, CPU, None)
        model = stage3.load_model(stage3.train_refiner(home / "refiner", train, vae_state, data, CPU, None), CPU)
        shaken(model.priors["flow"], 0.3)
        setup = SimpleNamespace(evaluation={"bits_images": 60, "bits_draws": 1}, train=train, test=data)
        mu, logvar = common.encode(model.vae, data.images, CPU)
        q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
        z, kls = q.mean + q.stddev * common.randn(mu.shape, common.generator(60_000)), {}
        for name, prior in model.priors.items():
            kls[name] = float((q.log_prob(z).sum(1) - prior.log_prob(z)).mean())
            bits = common.bits_per_dim(model, name, setup)
            assert unit * bits["kl"] == pytest.approx(kls[name], rel=1e-3) and bits["latent_prior"] == name
            parts = sum(bits[part] for part in ("kl", "prior", "diffusion", "data"))
            assert bits["bound"]["value"] == pytest.approx(parts, rel=1e-5)
        assert min(abs(kls[a] - kls[b]) / abs(kls[b]) for a in kls for b in kls if a != b) > 0.05  # told apart


def test_fixed_is_stage_1(tmp_path):
    """From the same VAE, seeds and draws, `fixed` trains stage 1's refiner bit for bit."""
    vae_train, train = joint(vae_prior="gaussian", steps=8)
    train, data = train | {"conditioning": "fixed"}, images_of(60)
    vae_state = stage3.train_vae(tmp_path / "vae", vae_train, data, CPU, None)
    ours = stage3.train_refiner(tmp_path / "fixed", train, vae_state, data, CPU, None)
    theirs = stage1.train_refiner(tmp_path / "form1", train, "form1", vae_state, data, CPU, None)
    assert same({name.removeprefix("unet."): value for name, value in ours["unet"].items()}, theirs["unet"])


@pytest.mark.parametrize("source", ["regressed", "variance", "posterior"])
def test_same_s_in_training_and_sampling(source, tmp_path, monkeypatch):
    """s is the same function of z in both, whatever became of x_hat; `posterior` is trained on q(z|x)'s variance."""
    vae_train, train = joint()
    train |= {"uncertainty": source}
    data, seen, x0s, condition, batch = images_of(60), [], [], stage3.condition, common.Training.batch
    draws, draw = [], common.Training.draw  # four in each step: of images, z, t, eps
    vae_state = stage3.train_vae(tmp_path / "vae", vae_train, data, CPU, None)
    monkeypatch.setattr(stage3, "condition", lambda *args: seen.append(args) or condition(*args))
    monkeypatch.setattr(common.Training, "batch", lambda training: x0s.append(batch(training)) or x0s[-1])
    monkeypatch.setattr(common.Training, "draw", lambda *args: draws.append(draw(*args)) or draws[-1])
    state = stage3.train_refiner(tmp_path / "refiner", train, vae_state, data, CPU, None)
    assert len(seen) == len(x0s) == 2 and same(state["vae"], vae_state["vae"])
    model, stats = stage3.load_model(state, CPU), state["uncertainty"]
    assert not any(p.requires_grad for p in model.vae.parameters())
    for (_, x_hat, s_vec, s), x0, z_noise in zip(seen, x0s, draws[1::4], strict=True):
        with common.autocast(CPU):
            mu, logvar = model.vae.encoder(x0)
            z = mu + (0.5 * logvar).exp() * z_noise
            own = stage3.uncertainty(model.vae, z, x_hat, stats, source)
            other = stage3.read_s(z, logvar, stats, source)
        own, other = (other, own) if source == "posterior" else (own, other)
        assert torch.allclose(own[0], s_vec, atol=1e-4) and torch.allclose(own[1], s, atol=1e-4)
        assert not torch.allclose(other[1], s, atol=0.1)
    z = common.randn((3, model.vae.latent_dim), common.generator(0))
    damaged = torch.zeros(3, 3, 32, 32)  # a damaged x_hat does not change s
    with torch.no_grad():
        s_vec, s = stage3.uncertainty(model.vae, z, model.vae.decoder(z), stats, source)
        model.condition(damaged, z)
        assert torch.equal(seen[-1][1], damaged) and torch.equal(seen[-1][2], s_vec) and torch.equal(seen[-1][3], s)
        stage3.load_model(state, CPU, shuffled=True).condition(damaged, z)
        assert torch.equal(seen[-1][2], s_vec.roll(1, 0)) and torch.equal(seen[-1][3], s.roll(1, 0))
