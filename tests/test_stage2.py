"""Stage 2: where the gradients go, the four losses, the bound, the controls."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, close, data_of, draw_by_shape, oracle, record_gradients, same, settings
from torch.autograd import grad
from torch.distributions import Normal, kl_divergence

import common
import stage1_baseline as stage1
import stage2_joint as stage2


@pytest.mark.parametrize("loss,gradient,changes,w_E,w_M", [
    ("sum", "full", {"diffusion_weight": 7.0}, 1, 7),
    ("sum", "none", {"diffusion_weight": 7.0}, 1, 7),
    ("sum", "full", {"diffusion_weight": 7.0, "objective": "eps", "start": 1000, "even_levels": False}, 1, 7),
    ("anneal", "full", {"diffusion_weight": 7.0}, 1, 0.7),
    ("kendall", "full", {}, math.exp(-0.5), math.e),
    ("bound", "full", {"start": 1000}, 1, 1),
    ("bound", "none", {}, 1, 1),
    ("bound", "none", {"start": 1000}, 1, 1),  # no gradient reaches the decoder
])
def test_gradients_of_the_first_step(loss, gradient, changes, w_E, w_M, tmp_path, monkeypatch):
    """The U-Net gets that of w_M D M. The VAE gets that of w_E E + w_M D M, or with --gradient none that of w_E E
    alone."""
    monkeypatch.setattr(common, "zero_init", lambda module: module)  # so that a gradient of M reaches x_hat
    own, data, D = settings(1, unet_flip=False, **changes), data_of(60), 3 * 32 * 32

    class Unequal(stage2.Balance):
        def __init__(self, size):
            super().__init__(size)
            self.a_and_b.data = torch.tensor([0.5, -1.0])

    monkeypatch.setattr(stage2, "Balance", Unequal)
    steps = record_gradients(monkeypatch)
    row, = stage2.train_joint(tmp_path, own, loss, gradient, data, CPU)["log"]
    [[of_vae, of_unet, of_balance]] = steps

    torch.manual_seed(0)
    vae, unet = common.build_vae(own), common.build_unet(own, 6)
    diffusion, gen = common.Diffusion(own["objective"], own["start"]), common.generator(0, "training, process 0")
    x0 = common.draw_batch(data.train.images, own, gen, False)
    if loss == "bound":
        t, probability = stage2.draw_bound_t(diffusion, 32, gen)
    else:
        t = diffusion.draw_t(32, gen)
    eps = torch.randn(x0.shape, generator=gen)
    x_t = diffusion.q_sample(x0, t, eps)
    x_hat, mu, logvar = vae(x0, torch.randn(32, 8, generator=gen))
    sse, kl = ((x_hat - x0) / 2).square().sum((1, 2, 3)), common.gaussian_kl(mu, logvar)
    prediction = unet(torch.cat([x_t, x_hat], 1), t)
    if loss == "bound":
        E = kl + stage2.kl_prior(diffusion, x0, x_hat)
        M = stage2.bound_term(diffusion, prediction, x0, x_t, t) / probability / D
    else:
        E = sse + own["beta"] * kl
        M = (prediction - diffusion.target(x0, t, eps)).square().mean((1, 2, 3))
        M = M * (100 * diffusion.eps_scale[t] if own["even_levels"] else 1)
    of_E = grad(w_E * E.mean(), list(vae.parameters()), retain_graph=True, materialize_grads=True)
    of_M = grad(w_M * D * M.mean(), [*vae.parameters(), *unet.parameters()])
    of_both = [a + b for a, b in zip(of_E, of_M, strict=False)]
    assert close(of_unet, of_M[len(of_E):]) and close(of_vae, of_E if gradient == "none" else of_both)
    assert not close(of_E, of_both)
    if loss == "kendall":  # exp(-a) E + a + exp(-b) D M + b
        by_hand = torch.stack([1 - w_E * E.mean(), 1 - w_M * D * M.mean()])
        assert torch.allclose(of_balance[0], by_hand, rtol=1e-3)
    expected = {"weight": w_M / w_E, "sse": sse.mean().item(), "kl_nats": kl.mean().item(),
                "diffusion_loss": M.mean().item()}
    assert row == pytest.approx(expected | {"step": 1}, rel=1e-3)


def test_gradient_none_trains_the_vae_as_stage_1_does(tmp_path, monkeypatch):
    """The VAE and its mixture have the bits of a VAE that is trained alone. With the gradient they have others."""
    draw_by_shape(monkeypatch, stage1, stage2)
    own, data = settings(6), data_of(60)
    alone = stage1.train_vae(tmp_path / "vae", own, data, CPU)
    for gradient in ("none", "full"):
        joint = stage2.train_joint(tmp_path / gradient, own, "anneal", gradient, data, CPU)
        assert same([joint["vae"], joint["gmm"]], [alone["vae"], alone["gmm"]]) == (gradient == "none")


@pytest.mark.parametrize("weight,slack", [(1 / 3072, 0.0), (3.0, 0.02)])
def test_behind_a_still_vae_the_refiner_is_that_of_stage_1(weight, slack, tmp_path, monkeypatch):
    """If w_M D = 1, it has the bits of form1. Another weight changes little of what is learned: a gradient's scale is
    divided out. The two stages draw the same images."""
    draw_by_shape(monkeypatch, stage1, stage2)
    own, data = settings(5, vae_lr=0.0, vae_muon_lr=0.0, diffusion_weight=weight, start=300), data_of(60)
    ours = stage2.train_joint(tmp_path / "joint", own, "sum", "full", data, CPU)
    theirs = stage1.train_refiner(tmp_path / "form1", own, "form1", ours, data, CPU)

    def all_weights(state):
        return torch.cat([value.flatten() for value in state.values()])

    begin, joint, form1 = map(all_weights, (common.build_unet(own, 6).state_dict(), ours["unet"], theirs["unet"]))
    assert (joint - form1).norm() <= slack * (begin - form1).norm() and not torch.equal(begin, form1)
    monkeypatch.undo()
    changed, images = own | {"temperature": 1.1, "eval_batch": 2}, []
    for stage in (stage1, stage2):
        model = stage.load_model(ours | {"variant": "form1"}, CPU)
        images.append(stage.generate(model, changed, stage.draw_codes(model, own, 5), corrupt=torch.neg))
    assert same(*images) and not same(*images[0])


# --- Balance ---------------------------------------------------------------------------------------------------------

def test_anneal_raises_the_weight():
    """w_M rises log-linearly from a tenth of lambda to lambda over the first 60% of the steps."""
    own = {"diffusion_weight": 3.0, "unet_steps": 100}
    weights = [stage2.loss_weights(own, "anneal", step, None)[1] for step in range(101)]
    assert weights[0] == pytest.approx(0.3) and weights[30] == pytest.approx(3 * 0.1**0.5)
    assert weights[60:] == pytest.approx([3.0] * 41) and weights == sorted(weights)


def test_kendall_learns_the_balance():
    """a and b tend to the logarithms of the two terms."""
    balance, E, DM = stage2.Balance(3072), torch.tensor([20.0, 40.0]), torch.tensor([0.1, 0.3])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        balance(E, DM).mean().backward()
        optimizer.step()
    assert balance.a_and_b.tolist() == pytest.approx([math.log(30), math.log(0.2)], abs=0.02)


# --- The bound -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sd", [0.003, 0.1, 1.0])
def test_data_nats(sd):
    """The probabilities of all 256 values add up to 1."""
    values = common.to_float(torch.arange(256, dtype=torch.uint8))[:, None]  # 256 images of one pixel
    diffusion = SimpleNamespace(posterior=lambda t, t_next: (0, 0, torch.tensor(sd**2, dtype=torch.float64)))
    for mean in (-1.0, -0.993, 0.0, 0.0039, 1.0, 1.3):
        total = (-stage2.data_nats(diffusion, values, torch.full((256, 1), mean)).double()).exp().sum()
        assert float(total) == pytest.approx(1, abs=2e-5)  # float32 pixel values leave gaps of 1e-8 between the bins


@pytest.mark.parametrize("start", [1000, 350])
def test_terms_of_the_bound(start):
    """If the predicted x0 is off by 0.1 everywhere, each term is the KL of two Gaussians of variance beta_tilde. The
    prior's is that from q(x_start | x0) to N(0, I), or to q(x_start | x_hat) from an earlier start. In the data's the
    variance is beta_tilde of t = 2."""
    diffusion, offset, t = common.Diffusion("v", start), 0.1, torch.arange(2, start + 1)
    x0, x_hat = (0.4 * torch.randn(start - 1, 3, 2, 2, generator=common.generator(k, "")) for k in (0, 1))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:start]  # the schedule's definition
    bar, beta = (1 - beta).cumprod(0), beta[1:]
    sd = (beta * (1 - bar[:-1]) / (1 - bar[1:])).sqrt()  # t = 2..start
    mean = bar[:-1].sqrt() * beta / (1 - bar[1:]) * offset
    found = stage2.kl_step(diffusion, x0, x0 + offset, t)
    assert torch.allclose(found.double(), 12 * kl_divergence(Normal(0 * mean, sd), Normal(mean, sd)), rtol=1e-3)
    a, s, p = bar[-1].sqrt(), (1 - bar[-1]).sqrt(), Normal(0.0, 1.0)
    if start < 1000:
        p = Normal(a * x_hat, s)
    exact = kl_divergence(Normal(a * x0, s), p).flatten(1).sum(1)
    assert torch.allclose(stage2.kl_prior(diffusion, x0, x_hat).double(), exact.double(), rtol=1e-2)
    x0, offset = common.to_float(torch.full((1, 3, 2, 2), 90.0)), 0.005
    edge = torch.tensor([1 / 255 - offset, -1 / 255 - offset]).double()
    upper, lower = Normal(0, sd[0]).cdf(edge)
    assert float(stage2.data_nats(diffusion, x0, x0 + offset)) == pytest.approx(-12 * float((upper - lower).log()))


@pytest.mark.parametrize("start", [40, 25, 2])
def test_the_bound_is_estimated_without_bias(start):
    """The mean of bound_term / probability over drawn times is the sum of the nats of the pixels and the KLs of t =
    2..start. Each time comes as often as its probability says. A predicted x0 beyond -1..1 is not clamped."""
    diffusion = common.Diffusion("v", start, T=40)
    t, probability = stage2.draw_bound_t(diffusion, 100_000, common.generator(0, "times"))
    x0 = common.to_float(data_of(1).train.images[:, :, 12:20, 12:20]).expand(start, -1, -1, -1)
    every = torch.arange(1, start + 1)
    x_t = diffusion.q_sample(x0, every, torch.randn(x0.shape, generator=common.generator(0, "eps")))
    prediction = oracle(diffusion, x0 + 1.5)(x_t, every)
    nats = stage2.bound_term(diffusion, prediction, x0, x_t, every)
    exact = stage2.data_nats(diffusion, x0[:1], x0[:1] + 1.5) + sum(
        stage2.kl_step(diffusion, x0[:1], x0[:1] + 1.5, every[k : k + 1]) for k in range(1, start))
    assert torch.allclose((nats[t - 1] / probability).mean(), exact, rtol=0.02)
    of_time = torch.zeros(start).index_put((t - 1,), probability)
    assert of_time.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(t.bincount(minlength=start + 1)[1:] / len(t), of_time, atol=0.005)


def test_slerp():
    """Between two directions at a right angle it goes along the unit circle. Its ends are the two codes, of any length.
    """
    a, b = torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]])
    for angle in (0.0, 0.4, math.pi / 2):
        on_circle = torch.tensor([[math.cos(angle), math.sin(angle)]])
        assert torch.allclose(stage2.slerp(a, b, angle / (math.pi / 2)), on_circle, atol=1e-6)
    assert torch.allclose(stage2.slerp(3 * a, b, 0.0), 3 * a) and torch.allclose(stage2.slerp(a, a, 0.3), a, atol=1e-3)
