"""Stage 2: where the gradients go in one backward pass, the four losses, the controls."""

import math

import pytest
import torch
from helpers import CPU, data_of, oracle, same, settings
from torch import nn
from torch.autograd import grad

import common
import stage1_baseline as stage1
import stage2_joint as stage2


@pytest.mark.parametrize("loss,gradient,changes,w_E,w_M", [  # the factors of E and of D M in the loss of the VAE
    ("sum", "full", {"diffusion_weight": 7.0}, 1, 7),
    ("sum", "none", {"diffusion_weight": 7.0}, 1, 0),
    ("sum", "full", {"diffusion_weight": 7.0, "objective": "eps", "start": 1000, "even_levels": False}, 1, 7),
    ("anneal", "full", {"diffusion_weight": 7.0}, 1, 0.7),
    ("kendall", "full", {}, math.exp(-0.5), math.e),
    ("bound", "full", {}, 1, 1),
    ("bound", "full", {"start": 1000}, 1, 1),
    ("bound", "none", {}, 1, 0),
])
def test_one_backward_pass_is_two(loss, gradient, changes, w_E, w_M, tmp_path, monkeypatch):
    """The U-Net gets the gradient of M with x_hat detached, whatever the weights. The VAE gets that of w_E E + w_M D M.
    Separate passes of autograd must give the same."""
    own, data = settings(1, vae_clip=1e9, unet_clip=1e9, unet_flip=False, **changes), data_of(60)
    given, found, D = [], {}, 3 * 32 * 32
    build, step = common.build_unet, common.Training.step

    def build_unet(*args):  # the last layer of a new U-Net is zero; no gradient would reach x_hat
        unet = build(*args)
        nn.init.normal_(unet.out.weight, std=0.1)
        return unet

    def recorded_step(training, loss, terms):
        step(training, loss, terms)
        found.update({name: [p.grad for p in network.parameters()] for name, network in training.networks.items()})

    class Unequal(stage2.Balance):
        def __init__(self, size):
            super().__init__(size)
            self.a_and_b.data = torch.tensor([0.5, -1.0])

        def forward(self, *terms):
            given.append(terms)
            return super().forward(*terms)

    monkeypatch.setattr(common, "build_unet", build_unet)
    monkeypatch.setattr(common.Training, "step", recorded_step)
    monkeypatch.setattr(stage2, "Balance", Unequal)
    row, = stage2.train_joint(tmp_path / "joint", own, loss, gradient, data, CPU)["log"]

    torch.manual_seed(0)
    vae, unet = common.build_vae(own), build_unet(own, 6)
    diffusion = common.Diffusion(own["objective"], start=own["start"])
    training = common.Training(tmp_path / "again", own, CPU, data.train.images, 1, False, vae=vae, unet=unet)
    x0, u, eps = training.batch(), training.uniform(), training.normal(3, 32, 32)
    x_hat, mu, logvar = vae(x0, training.normal(vae.latent_dim))
    sse, kl = ((x_hat - x0) / 2).square().sum((1, 2, 3)), common.gaussian_kl(mu, logvar)
    E = sse + own["beta"] * kl
    if loss == "bound":
        E = kl + common.kl_prior(diffusion, x0, x_hat)

    def refiner_loss(x_hat):
        if loss == "bound":
            return stage2.bound_loss(diffusion, stage2.denoiser(unet, x_hat), x0, u, eps) / D
        t = diffusion.draw_t(u)
        mse = diffusion.simple_loss(stage2.denoiser(unet, x_hat), x0, t, eps)
        return mse * (100 * diffusion.eps_scale[t] if own["even_levels"] else 1)

    def close(ours, theirs):  # two lists of tensors
        return all((x - y).norm() <= 2e-4 * y.norm() + 1e-9 for x, y in zip(ours, theirs, strict=True))

    M = refiner_loss(x_hat)
    assert close(found["unet"], grad(refiner_loss(x_hat.detach()).mean(), list(unet.parameters())))
    of_vae = list(vae.parameters())
    of_E = grad(w_E * E.mean(), of_vae, retain_graph=True, materialize_grads=True)
    of_M = grad(D * M.mean(), of_vae, retain_graph=True)
    assert close(found["vae"], [a + w_M * b for a, b in zip(of_E, of_M, strict=True)])
    assert w_M == 0 or not close(found["vae"], of_E)  # otherwise the line above could not fail
    if loss == "kendall":  # exp(-a) E + a + exp(-b) D M + b
        by_hand = torch.stack([1 - w_E * E.mean(), 1 - w_M * D * M.mean()])
        assert torch.allclose(found["balance"][0], by_hand, rtol=1e-3)
        assert [term.shape for term in given[0]] == [(32,), (32,)]
    expected = {"weight": w_M / w_E, "sse": sse.mean().item(), "kl_nats": kl.mean().item(),
                "diffusion_loss": M.mean().item()}
    assert row == pytest.approx(expected | {"step": 1}, rel=1e-3)


@pytest.fixture
def same_draws(monkeypatch):
    """Random numbers of a training that depend on the step and their shape alone, not on their order; and U-Nets that
    begin with the same weights, whatever was built before."""
    def normal(training, *shape):
        gen = common.generator(training.steps_taken, f"normal {shape}")
        return common.randn((training.settings["batch"], *shape), gen)

    def uniform(training, *shape):
        gen = common.generator(training.steps_taken, f"uniform {shape}")
        return torch.rand(training.settings["batch"], *shape, generator=gen)

    def build_unet(*args):
        torch.manual_seed(5)
        return build(*args)

    build = common.build_unet
    monkeypatch.setattr(common.Training, "normal", normal)
    monkeypatch.setattr(common.Training, "uniform", uniform)
    monkeypatch.setattr(common, "build_unet", build_unet)


def test_gradient_none_trains_the_vae_alone(tmp_path, same_draws):
    """The VAE and its mixture have the bits of stage 1."""
    own, data = settings(6), data_of(60)
    joint = stage2.train_joint(tmp_path / "none", own, "anneal", "none", data, CPU)
    alone = stage1.train_vae(tmp_path / "vae", own | {"vae_flip": own["unet_flip"]}, data, CPU)
    full = stage2.train_joint(tmp_path / "full", own, "anneal", "full", data, CPU)
    assert same([joint["vae"], joint["gmm"]], [alone["vae"], alone["gmm"]]) and not same(joint["vae"], full["vae"])


def test_gradient_none_with_a_still_vae_is_stage_1(tmp_path, same_draws):
    """The refiner has the weights of form1 behind that VAE."""
    own, data = settings(5, vae_lr=0.0, vae_muon_lr=0.0, every=1), data_of(60)
    ours = stage2.train_joint(tmp_path / "joint", own, "anneal", "none", data, CPU)
    theirs = stage1.train_refiner(tmp_path / "form1", own, "form1", ours, data, CPU)
    assert all(torch.allclose(value, theirs["unet"][name], atol=1e-6) for name, value in ours["unet"].items())
    assert not same(theirs["unet"], dict(common.build_unet(own, 6).state_dict()))


@pytest.mark.parametrize("start", [None, 25, 2])
def test_bound_loss_is_the_sum_over_all_times(start):
    """Its mean over u in [0, 1) is the sum of the KLs of t = 2..start and the nats of the pixels. Time t is drawn for u
    up to (t / start)^(1/4) and above ((t - 1) / start)^(1/4)."""
    diffusion = common.Diffusion("v", T=40, start=start)
    x0, last = common.to_float(data_of(1).train.images[:, :, 12:20, 12:20]), diffusion.start
    exact = common.data_nats(diffusion, x0, x0 + 0.05)
    for t in range(2, last + 1):
        exact = exact + common.kl_step(diffusion, x0, x0 + 0.05, torch.tensor([t]))
    ends = (torch.arange(last + 1).double() / last) ** 0.25
    u = torch.cat([(ends[1:] + ends[:-1]) / 2, torch.tensor([0.0, 1 - 2**-24])])  # and the ends of [0, 1)
    many = x0.expand(last + 2, -1, -1, -1)
    eps = common.randn(many.shape, common.generator(0, "eps"))
    nats = stage2.bound_loss(diffusion, oracle(diffusion, many + 0.05), many, u, eps)
    assert (ends.diff() * nats[:-2]).sum().item() == pytest.approx(exact.item(), rel=1e-4)
    assert torch.allclose(nats[-2:], nats[[0, last - 1]], rtol=1e-3)


def test_the_bound_pulls_back_what_is_out_of_range():
    """A predicted x0 beyond -1..1 is not clamped in training, so its gradient points back."""
    diffusion, x0 = common.Diffusion("v", T=40), torch.zeros(2, 3, 8, 8)
    predicted = torch.full_like(x0, 1.5).requires_grad_()
    eps = common.randn(x0.shape, common.generator(0, "eps"))
    nats = stage2.bound_loss(diffusion, oracle(diffusion, predicted), x0, torch.tensor([0.5, 0.9]), eps)
    assert (grad(nats.sum(), predicted)[0] > 0).all()


def test_anneal_raises_the_weight(tmp_path):
    """w_M rises log-linearly from a tenth of lambda over the first 60% of the steps. The log holds
    it."""
    def weight(own, step):
        w_E, w_M = stage2.loss_weights(own, "anneal", "full", step, None)
        assert w_E == 1
        return w_M

    own = {"diffusion_weight": 3.0, "unet_steps": 100}
    weights = [weight(own, step) for step in range(101)]
    assert weights[0] == pytest.approx(0.3) and weights[30] == pytest.approx(3 * 0.1**0.5)
    assert weights[60:] == pytest.approx([3.0] * 41) and weights == sorted(weights)
    own = settings(every=1, unet_steps=8)
    log = stage2.train_joint(tmp_path, own, "anneal", "full", data_of(60), CPU)["log"]
    assert [row["weight"] for row in log] == pytest.approx([weight(own, step) for step in range(8)])


def test_kendall_learns_the_balance(tmp_path):
    """a and b tend to the logarithms of the two terms. In training both begin at log D. E is smaller than D M, so a
    falls faster than b, and the ratio of the weights exp(a - b) falls."""
    balance, E, DM = stage2.Balance(3072), torch.tensor([20.0, 40.0]), torch.tensor([0.1, 0.3])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        balance(E, DM).mean().backward()
        optimizer.step()
    assert balance.a_and_b.tolist() == pytest.approx([math.log(30), math.log(0.2)], abs=0.02)
    state = stage2.train_joint(tmp_path, settings(12, every=3), "kendall", "full", data_of(60), CPU)
    weights = [row["weight"] for row in state["log"]]
    assert weights == sorted(weights, reverse=True) and weights[0] < 1
    a, b = (state["balance"]["a_and_b"] - math.log(3072)).tolist()
    assert a < -0.2 and a < b  # of 0.6 that 12 steps of 0.05 can reach


def test_model_of_a_checkpoint(tmp_path):
    """It is the model that stage 1 builds for form1."""
    state = stage2.train_joint(tmp_path, settings(2, start=300), "sum", "full", data_of(60), CPU)
    ours, theirs = stage2.load_model(state, CPU), stage1.load_model(state | {"variant": "form1"}, CPU)
    (x, x_hat), t, z = torch.randn(2, 3, 3, 32, 32), torch.tensor([1, 100, 300]), torch.randn(3, 8)
    assert torch.equal(ours.denoiser(x_hat, None)(x, t), theirs.denoiser(x_hat, None)(x, t))
    assert torch.equal(ours.vae.decoder(z), theirs.vae.decoder(z))
    assert ours.diffusion.start == 300 and ours.shape == theirs.shape and len(ours.networks) == len(theirs.networks)
    for name, prior in theirs.priors.items():
        assert torch.equal(ours.priors[name].log_prob(z), prior.log_prob(z))
