"""Stage 3: the flow's inverse, determinant and density, uncertainty, conditioning, training, strategies."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, close, data_of, draw_by_shape, record_gradients, same, settings
from scipy.stats import spearmanr
from torch.autograd import grad
from torch.distributions import Normal

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

@pytest.mark.parametrize("d", [5, 64])
def test_flow_inverse(d):
    """inverse(f(z)) = z. Every dimension is transformed, not only moved to another place."""
    flow, z = shaken(stage3.RealNVP(d), 0.1).double(), normal(40, d).double()
    u, order = flow(z)[0], torch.arange(d)
    assert torch.allclose(flow.inverse(u), z, atol=1e-4)
    for permutation in flow.orders:
        order = order[permutation]
    assert ((u - z[:, order]).abs().amax(0) > 1e-3).all()


def test_flow_density():
    """A new flow only permutes z, so log p(z) is that of N(0, I). The log-determinant is that of autograd's Jacobian.
    """
    flow, z = stage3.RealNVP(5, hidden=16), normal(6, 5)
    assert torch.allclose(flow.log_prob(z), common.GaussianMixture.standard_normal(5).log_prob(z), atol=1e-5)
    flow, z = shaken(flow).double(), z.double()
    for row, value in zip(z, flow(z)[1].detach(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], row)
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-8)


def test_flow_learns_a_banana():
    """The log-densities of held-out points (x, x^2 + noise) approach the true ones, and so do those of its samples."""
    def true(z):
        return Normal(0, 1).log_prob(z[:, 0]) + Normal(z[:, 0] ** 2 - 1, 0.3).log_prob(z[:, 1])

    x, noise = normal(7000, 2).unbind(1)
    z = torch.stack([x, x**2 - 1 + 0.3 * noise], 1)
    torch.manual_seed(0)
    flow = stage3.fit_flow(stage3.RealNVP(2), z[2000:], torch.full((5000, 2), -99.0), settings(flow_steps=300))
    drawn = flow.sample(2000, common.generator(0, "samples"))
    for points in (z[:2000], drawn):
        assert (true(points) - flow.log_prob(points)).mean().abs() < 0.1


def test_training_of_vae_and_flow(tmp_path, monkeypatch):
    """The flow's gradient is always that of its log-density of codes. The VAE's is that of SSE + beta KL, with the KL
    to N(0, I) in the first 60% of the steps, and then to the flow. Flow and mixture are fitted to the
    finished VAE."""
    monkeypatch.setattr(common, "zero_init", lambda module: module)  # so that a new flow is not the identity
    steps = record_gradients(monkeypatch)
    own, data = settings(5, vae_lr=0.0, vae_muon_lr=0.0, beta=3.0), data_of(60)  # the weights never change
    state = stage3.train_vae(tmp_path, own, data, CPU)
    torch.manual_seed(0)
    both, gen = stage3.build_vae_and_flow(own), common.generator(0, "training, process 0")
    vae, flow = both["vae"], both["flow"]
    for step in range(5):
        x0 = common.draw_batch(data.train.images, own, gen, own["vae_flip"])
        noise = torch.randn(32, 8, generator=gen)
        of_stage1, sse, _ = stage1.vae_loss(vae, x0, noise, 3.0)
        mu, logvar = vae.encoder(x0)
        q = Normal(mu, (logvar / 2).exp())
        z = q.mean + q.stddev * noise
        kl_flow = q.log_prob(z).sum(1) - flow.log_prob(z)
        of_vae = [grad(loss.mean(), list(vae.parameters()), retain_graph=True)
                  for loss in (of_stage1, sse + 3 * kl_flow)]
        of_flow = grad(-3 * flow.log_prob(z.detach()).mean(), list(flow.parameters()))
        assert close(steps[step][0], [*of_vae[step >= 3], *of_flow]) and not close(*of_vae)
    model = stage3.load_model(state, CPU)
    assert same(state["vae"], dict(vae.state_dict())) and set(model.priors) == {"gaussian", "gmm", "flow"}
    assert same(state["gmm"], common.fit_mixture(model.vae, data.train.images, own, CPU))
    fitted = stage3.fit_flow(flow, *common.encode(model.vae.encoder, data.train.images, CPU), own)
    assert same(state["flow"], dict(fitted.state_dict()))


# --- Uncertainty -----------------------------------------------------------------------------------------------------

# A VAE that keeps z in the first row of an 8x8 image and leaves the rest grey. Its log-variances depend on the image,
# but not on how large the error is.
PLANTED = SimpleNamespace(
    encoder=lambda x: (2 * x[:, 0, 0], 0.1 * torch.sin(80 * x[:, 0, 0]) - 9), latent_dim=8,
    decoder=lambda z: torch.nn.functional.pad(z[:, None, None] / 2, (0, 0, 0, 7, 0, 2)))


def of_z(z):
    return (0.4 * z[:, 0] - 0.3 * z[:, 1] + 0.4 * z[:, 2] * z[:, 3]).exp()


def of_the_variance(z):
    _, logvar = PLANTED.encoder(common.to_float(common.to_uint8(PLANTED.decoder(z))))
    return (4 * (logvar.mean(1) + 9)).exp()


@pytest.mark.parametrize("size, finds", [(of_z, "regressed"), (of_the_variance, "posterior")])
def test_fitted_uncertainty(size, finds):
    """s has mean 0 and sd 1. What PLANTED leaves grey is noise of the size size(z). Each kind ranks the errors that
    depend on what it sees, also of other images."""
    z = normal(3000, 8).clamp(-1.9, 1.9)
    noise = 0.2 * normal(3000, 3, 8, 8, purpose="noise")
    noise[:, 0, 0] = 0
    images = common.to_uint8(PLANTED.decoder(z) + size(z)[:, None, None, None] * noise)
    mu, _ = common.encode(PLANTED.encoder, images, CPU)
    for kind in stage3.KINDS:
        uncertainty = stage3.fit_uncertainty(kind, PLANTED, images[:2000], settings(flow_steps=400), CPU)
        x_hat, s = stage3.decode(PLANTED, mu, uncertainty, CPU)
        assert abs(s[:2000].mean()) < 0.03 and s[:2000].std() == pytest.approx(1, abs=0.02) and s.abs().max() <= 3
        error = (x_hat.float() - images).square().sum((1, 2, 3))
        rank = spearmanr(s[2000:], error[2000:]).statistic
        assert rank > 0.8 if kind == finds else abs(rank) < 0.5


@pytest.mark.parametrize("kind,conditioning", [("regressed", "film"), ("posterior", "fade")])
def test_same_s_in_training_and_sampling(kind, conditioning, tmp_path, monkeypatch):
    """s is made of z and x_hat in both. In the control, each image has the s of the image before it."""
    data, own, seen, forward = data_of(60), settings(2), [], stage3.Conditioner.forward
    base = stage3.train_vae(tmp_path / "vae", own, data, CPU)
    monkeypatch.setattr(stage3.Conditioner, "forward", lambda *args: seen.append(args[1:]) or forward(*args))
    state = stage3.train_refiner(tmp_path / "refiner", own, conditioning, kind, base, data, CPU)
    model, gen = stage3.load_model(state, CPU), common.generator(0, "training, process 0")
    assert same(state["vae"], base["vae"]) and same(dict(model.refiner.state_dict()), state["refiner"])
    for x_hat, s in list(seen):
        x0 = common.draw_batch(data.train.images, own, gen, own["unet_flip"])
        model.diffusion.draw_t(32, gen), common.randn(x0.shape, gen)
        z = common.reparameterise(*model.vae.encoder(x0), common.randn((32, 8), gen))
        assert torch.allclose(model.vae.decoder(z), x_hat, atol=1e-5)
        assert torch.allclose(model.uncertainty(model.vae, z, x_hat), s, atol=1e-4) and s.std() > 0.1
    z = normal(3, 8)
    expected = model.uncertainty(model.vae, z, model.vae.decoder(z) + 0.1)
    for control in (False, True):
        stage3.generate(model, own, z, corrupt=lambda x: x + 0.1, shuffle_s=control)
        assert torch.equal(seen[-1][1], expected[[2, 0, 1]] if control else expected)


# --- Conditioning ----------------------------------------------------------------------------------------------------

X_HAT, S = normal(3, 3, 8, 8), torch.tensor([-1.0, 0.0, 2.0])


@pytest.mark.parametrize("conditioning", ["fixed", "fade", "film", "coupling"])
def test_conditioners(conditioning):
    """New ones change nothing, except that fade multiplies x_hat by exp(-s/2) where s > 0. Every parameter learns, and
    with random weights what the U-Net is shown depends on s."""
    conditioner = stage3.Conditioner(conditioning, 32)
    shown, extra = conditioner(X_HAT, S)
    factor = torch.tensor([1, 1, math.exp(-1) if conditioning == "fade" else 1])[:, None, None, None]
    assert torch.equal(shown, X_HAT * factor) and (extra is None or not extra.any())
    shown, extra = shaken(conditioner)(X_HAT, S)
    other, other_extra = conditioner(X_HAT, -S)
    assert torch.allclose(shown[0], other[0], atol=1e-3) == (conditioning == "fixed")
    if conditioning == "film":
        shown = shown + extra.sum()
        assert not torch.allclose(extra[0], other_extra[0], atol=1e-3)
    if conditioning in ("film", "coupling"):
        shown.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in conditioner.parameters())


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


def test_fixed_is_stage_1(tmp_path, monkeypatch):
    """With the same VAE, seed and draws, `fixed` trains stage 1's refiner, to the same bits, and draws the same images.
    """
    draw_by_shape(monkeypatch, stage1, stage3)
    own, data = settings(4), data_of(60)
    base = stage3.train_vae(tmp_path / "vae", own, data, CPU)
    ours = stage3.train_refiner(tmp_path / "fixed", own, "fixed", "regressed", base, data, CPU)
    theirs = stage1.train_refiner(tmp_path / "form1", own, "form1", base, data, CPU)
    assert same({name.removeprefix("unet."): value for name, value in ours["refiner"].items()}, theirs["unet"])
    assert ours["minutes"] > base["minutes"] > 0
    monkeypatch.undo()
    z, changed = normal(5, 8), own | {"temperature": 1.1, "eval_batch": 2}
    assert same(*(stage.generate(stage.load_model(state, CPU), changed, z, corrupt=torch.neg)
                  for stage, state in ((stage3, ours), (stage1, theirs))))


# --- What it shows ---------------------------------------------------------------------------------------------------

@pytest.fixture
def by_first(monkeypatch):
    """A model of PLANTED with z[:, 0] for s. Refinement adds its number of steps to every pixel. What is measured of
    images: all of them."""
    def generate(model, settings, z, shuffle_s=False):
        x_hat = common.to_uint8(PLANTED.decoder(z))
        return x_hat, x_hat + settings["sample_steps"] + 10 * shuffle_s

    monkeypatch.setattr(stage3, "generate", generate)
    monkeypatch.setattr(fid, "hf_energy", lambda images, real: 2.0)
    monkeypatch.setattr(fid, "fd_between", lambda extractor, images, real: (images.float() - real).mean().item())
    return SimpleNamespace(device=CPU, vae=PLANTED, uncertainty=lambda vae, z, x_hat: z[:, 0],
                           priors={"gmm": common.GaussianMixture.standard_normal(8)})


def test_strategies(by_first, tmp_path):
    """Steps by thirds of s, or in the control by thirds of the s of the image before. Images keep their order."""
    scorer = SimpleNamespace(fd=lambda images: images, data=data_of(1))
    own = settings(eval_samples=31, sample_steps=5)
    rows = stage3.strategies(tmp_path, by_first, own, scorer)
    z = stage3.draw_codes(by_first, own, 30)
    third, other = z[:, 0].argsort().argsort() // 10, z[:, 0].roll(1).argsort().argsort() // 10  # 0 sure, 2 unsure
    expected = {"all": 5 + 0 * third, "two steps": 2 + 0 * third, "by s": 1 + third, "by s, shuffled": 1 + other,
                "unsure third": 5 * (third == 2), "unsure third, shuffled": 5 * (other == 2)}
    for row, (name, steps) in zip(rows, expected.items(), strict=True):
        assert row["label"] == f"refine {name}, gmm" and row["nfe"] == pytest.approx(steps.float().mean().item())
        added = row["fd"] - common.to_uint8(PLANTED.decoder(z))
        assert torch.equal(added, steps[:, None, None, None].expand_as(added)), name
    assert (tmp_path / "generated-gmm.png").is_file()


def test_thirds(by_first, tmp_path):
    """Held-out images from sure to unsure, each compared with its own original; the control has shuffled s."""
    z = normal(30, 8).clamp(-1.7, 1.7)
    real = common.to_uint8(PLANTED.decoder(z))
    real -= (z[:, 0].argsort().argsort() // 10)[:, None, None, None].to(torch.uint8)  # errors 0, 1, 2 of x_hat
    scorer = SimpleNamespace(extractor=None, data=common.Data(None, common.ImageData(real, ""), None))
    s, *rows = stage3.thirds(tmp_path, by_first, settings(eval_samples=30, sample_steps=5), scorer)
    assert 0.8 < s["rank_correlation"] <= 1 and (tmp_path / "uncertainty.png").is_file()
    found = {row["label"]: row["fd_to_originals"] for row in rows}
    for name, error in (("sure", 0), ("middle", 1), ("unsure", 2)):
        before = found[f"{name} third, VAE"]
        assert before == pytest.approx(error, abs=0.3) and found[f"{name} third"] == pytest.approx(before + 5)
    assert found["shuffled s"] == pytest.approx(found["own s"] + 10)
