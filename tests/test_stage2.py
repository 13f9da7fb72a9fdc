"""Stage 2: where the gradients go in one backward pass, the four losses, paths through the latent space, probes."""

import contextlib
import math

import pytest
import torch
from helpers import CPU, images_of, oracle, settings

import common
import stage1_baseline as stage1
import stage2_joint as stage2


def joint(**changes):
    rates = {"balance_lr": 0.01, "balance_muon_lr": 0.0, "balance_clip": 0.0, "balance_ema": 0.0}
    return settings() | rates | {"loss": "sum", "gradient": "full", "diffusion_weight": 1.0} | changes


def test_no_gradient_has_no_share():
    """0 over 0."""
    seen, share = stage2.scale_gradient(torch.ones(2, requires_grad=True), 0.0, 0.0)
    seen.sum().backward()
    assert float(share) == 0


@pytest.mark.parametrize("changes,elbo_weight,weight", [  # the factors of E and of D M in what the VAE feels
    ({"diffusion_weight": 7.0}, 1, 7),
    ({"diffusion_weight": 7.0, "gradient": "decoder"}, 1, 7),
    ({"diffusion_weight": 7.0, "gradient": "none"}, 1, 0),  # with either the VAE is trained by the ELBO alone
    ({"diffusion_weight": 0.0}, 1, 0),
    ({"diffusion_weight": 7.0, "objective": "eps", "start": 1000}, 1, 7),
    ({"loss": "anneal"}, 1, 0.01),
    ({"loss": "kendall"}, math.exp(-0.5), math.e),
    ({"loss": "kendall", "gradient": "decoder"}, math.exp(-0.5), math.e),
    ({"loss": "bound"}, 1, 1),
    ({"loss": "bound", "start": 1000}, 1, 1),
])
def test_one_backward_pass_is_two(changes, elbo_weight, weight, tmp_path, monkeypatch):
    """The U-Net gets the gradient of M with x_hat detached, whatever the weight. The VAE gets that of E and, as far as
    `--gradient` says, of lambda D M: the squared error per image, over pixels. `bound`: of the KL (no reconstruction
    term) and the process's nats, its start among them. Against separate passes through autograd."""
    train, data = joint(steps=1, vae_clip=0.0, unet_clip=0.0, **changes), images_of(60)
    gradients, given, size = {}, [], 3 * 32 * 32
    build, step = common.build_unet, common.Training.step

    def near(a, b, rel=2e-4):  # of lists of tensors, each within `rel` of its norm
        return all((x - y).norm() <= rel * y.norm() + 1e-9 for x, y in zip(a, b, strict=True))

    def build_unet(*args):  # the published start, zero, would send no gradient through the U-Net to x_hat
        unet = build(*args)
        torch.nn.init.normal_(unet.out.weight, std=0.1)
        return unet

    class Unequal(stage2.Balance):
        def __init__(self):
            super().__init__()
            self.logvar.data = torch.tensor([0.5, -1.0])

        def forward(self, *args):
            given.append(args)
            return super().forward(*args)

    monkeypatch.setattr(common, "autocast", contextlib.nullcontext)  # in float32
    monkeypatch.setattr(common, "build_unet", build_unet)
    monkeypatch.setattr(common.Training, "step", lambda training, *args: step(training, *args) or gradients.update(
        {name: [p.grad for p in net.parameters()] for name, net in training.networks.items()}))
    monkeypatch.setattr(stage2, "Balance", Unequal)
    row, = stage2.train_joint(tmp_path / "joint", train, data, CPU, None)["log"]

    torch.manual_seed(0)
    vae = common.build_vae(train)
    torch.manual_seed(0)
    unet, diffusion = build_unet(train, 6), common.Diffusion(train["objective"], start=train["start"])
    training = common.Training(tmp_path / "again", None, train, CPU, data.images, False, vae=vae, unet=unet)
    x0, z_noise = training.batch(), training.draw(torch.randn, vae.latent_dim)
    u, eps = training.draw(torch.rand), training.draw(torch.randn, 3, 32, 32)
    x_hat, mu, logvar = vae(x0, z_noise)
    sse, kl = ((x_hat - x0) / 2).square().flatten(1).sum(1), common.gaussian_kl(mu, logvar)
    elbo = kl if train["loss"] == "bound" else sse + train["beta"] * kl

    def terms(x_hat):  # M, from which the U-Net learns, and what the VAE feels: each (B,)
        denoise, t = stage2.condition(unet, x_hat), diffusion.draw_t(u)
        if train["loss"] == "bound":
            squares = stage2.bound_loss(diffusion, denoise, x_hat, x0, u, eps)
        else:
            error = denoise(diffusion.q_sample(x0, t, eps), t) - diffusion.target(x0, t, eps)
            squares = error.square().flatten(1).sum(1)
        return squares / size, squares

    assert near(gradients["unet"], torch.autograd.grad(terms(x_hat.detach())[0].mean(), list(unet.parameters())))
    squares, names = terms(x_hat)[1], [name.split(".")[0] for name, _ in vae.named_parameters()]
    pull, = torch.autograd.grad(weight * squares.mean(), x_hat, retain_graph=True)
    alone = torch.autograd.grad(elbo_weight * elbo.mean(), list(vae.parameters()), retain_graph=True,
                                materialize_grads=True)
    pulled = torch.autograd.grad(x_hat, list(vae.parameters()), pull, retain_graph=True)
    assert {"encoder", "decoder"} == set(names)
    for part in ("encoder", "decoder"):
        mine, a, b = ([g for g, name in zip(grads, names, strict=True) if name == part]
                      for grads in (gradients["vae"], alone, pulled))
        both = [x + y for x, y in zip(a, b, strict=True)]
        assert near(mine, both if train["gradient"] in ("full", part) else a), part
        assert near(both, a) == (weight == 0)  # the two can be told apart
    if train["loss"] == "kendall":  # exp(-a) E + a + exp(-b) D M + b, of terms with one number per image
        (given_elbo, given_squares), = given
        assert given_squares.shape == squares.shape and torch.allclose(given_squares, squares, rtol=1e-4)
        assert given_elbo.shape == elbo.shape and torch.allclose(given_elbo, elbo, rtol=1e-5)
        by_hand = torch.stack([1 - elbo_weight * elbo.mean(), 1 - weight * squares.mean()])
        assert torch.allclose(gradients["balance"][0], by_hand, rtol=1e-4)
    pulls, against = float(pull.norm()), 0.0
    if train["loss"] != "bound":
        against = float(torch.autograd.grad(elbo_weight * sse.mean(), x_hat)[0].norm())
    assert row["gradient_share"] == pytest.approx(pulls / (pulls + against), rel=1e-3)
    assert row["weight"] == pytest.approx(weight, rel=1e-5)
    assert row["sse"] == pytest.approx(float(sse.detach().mean()), rel=1e-5)


def test_gradient_none_with_a_still_vae_is_stage_1(tmp_path):
    """From equal weights and seeds the refiner's losses of 5 steps agree with stage 1's within 1e-6, relative."""
    data, train = images_of(60), joint(gradient="none", vae_lr=0.0, vae_muon_lr=0.0, steps=5, every=1)
    ours = stage2.train_joint(tmp_path / "joint", train, data, CPU, None)
    torch.manual_seed(train["seed"])
    frozen = {"vae": common.build_vae(train).state_dict(), "gmm": {}}
    theirs = stage1.train_refiner(tmp_path / "form1", train, "form1", frozen, data, CPU, None)
    a, b = ([row["v_mse"] for row in state["log"]] for state in (ours, theirs))
    assert len(a) == 5 and a == pytest.approx(b, rel=1e-6)
    assert all(torch.allclose(value, theirs["unet"][name], atol=1e-6) for name, value in ours["unet"].items())


@pytest.mark.parametrize("start", [None, 25, 2])
def test_bound_is_the_sum_of_its_parts(start):
    """Over u in [0, 1), of which t = 1, 2, ... end at (t / start)^(1/4), the mean is what evaluation adds up."""
    diffusion = common.Diffusion("v", T=40, start=start)
    images = images_of(1).images[:, :, 12:20, 12:20].clamp(20, 235)  # no clamping of x0 + offset
    x0, last = common.to_float(images), diffusion.start
    x_hat = x0 - 0.1
    exact = common.diffusion_nats(diffusion, oracle(diffusion, x0 + 0.05), images, x_hat, last - 1,
                                  common.generator(0))
    ends = (torch.arange(last + 1).double() / last) ** 0.25
    u = torch.cat([(ends[1:] + ends[:-1]) / 2, torch.tensor([0.0, 1 - 2**-24])])  # and the range of torch.rand
    many = x0.expand(last + 2, -1, -1, -1)
    nats = stage2.bound_loss(diffusion, oracle(diffusion, many + 0.05), x_hat.expand_as(many), many, u,
                             common.randn(many.shape, common.generator(1)))
    assert float((ends.diff() * nats[:-2]).sum()) == pytest.approx(float(sum(exact.values())), rel=1e-4)
    assert torch.allclose(nats[-2:], nats[[0, last - 1]], rtol=1e-3)


def test_anneal_raises_the_weight(tmp_path):
    """Log-linear from 0.01 over the first 60%. It is what the log holds."""
    train = {"loss": "anneal", "diffusion_weight": 1.0, "steps": 100}
    weights = [stage2.diffusion_weight(train, step) for step in range(101)]
    assert weights[0] == pytest.approx(0.01) and weights[30] == pytest.approx(0.1)
    assert weights[60:] == pytest.approx([1.0] * 41) and weights == sorted(weights)
    assert stage2.diffusion_weight(train | {"loss": "sum"}, 0) == 1.0
    assert stage2.diffusion_weight(train | {"diffusion_weight": 0.001}, 0) == pytest.approx(0.001)
    train = joint(loss="anneal", every=1)
    log = stage2.train_joint(tmp_path, train, images_of(60), CPU, None)["log"]
    assert [row["weight"] for row in log] == pytest.approx([stage2.diffusion_weight(train, step) for step in range(8)])


def test_kendall_learns_the_balance(tmp_path):
    """a and b come to their losses' logarithms; M gets no gradient, E exp(-a) of its own; in training b grows."""
    balance, elbo, squares = stage2.Balance(), torch.tensor([20.0, 40.0]), torch.tensor([0.1, 0.3])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        balance(elbo, squares).mean().backward()
        optimizer.step()
    assert balance.logvar.tolist() == pytest.approx([math.log(30), math.log(0.2)], abs=1e-3)
    elbo.requires_grad_()
    squares.requires_grad_()
    balance(elbo, squares).sum().backward()
    assert elbo.grad.tolist() == pytest.approx([1 / 30] * 2, rel=1e-3) and squares.grad is None
    train = joint(loss="kendall", steps=12, every=3)
    state = stage2.train_joint(tmp_path, train, images_of(60), CPU, None)
    weights = [row["weight"] for row in state["log"]]
    assert weights == sorted(weights, reverse=True) and weights[0] < 1
    assert (state["balance"]["logvar"] > 0.05).all()  # 12 steps of at most 0.01, towards far larger logarithms


def test_paths_and_their_smoothness():
    """Ends and middles by hand. A straight even path scores 1 and 1; a detour is longer; a jump is the worst step."""
    a, b = common.randn((2, 5, 16), common.generator(0))
    for w, end in ((0.0, a), (1.0, b)):
        assert torch.allclose(stage2.slerp(a, b, w), end, atol=1e-5)
    assert torch.allclose(stage2.slerp(a, a, 0.3), a, atol=1e-3)  # no angle between the ends
    e = torch.eye(4)[:2]
    assert torch.allclose(stage2.slerp(e[:1], e[1:], 0.5), (e[:1] + e[1:]) / math.sqrt(2))  # stays on the sphere
    line = torch.linspace(0, 1, 5)[:, None] * torch.tensor([3.0, 4.0])
    assert stage2.smoothness(line[None]) == pytest.approx(
        {"path_over_distance": 1, "worst_over_mean_step": 1, "end_distance": 5})
    detour, jump = torch.tensor([[[0.0, 0], [0, 1], [1, 1]]]), torch.tensor([[[0.0], [0], [0], [1]]])
    assert stage2.smoothness(detour)["path_over_distance"] == pytest.approx(2 / math.sqrt(2))
    assert stage2.smoothness(jump)["worst_over_mean_step"] == pytest.approx(3)
    assert all(math.isfinite(v) for v in stage2.smoothness(torch.ones(2, 4, 3)).values())  # a collapsed decoder


def test_probe_finds_a_planted_factor():
    """A linear factor is read off exactly; noise is not; a noisy factor has the R^2 of its noise."""
    gen = common.generator(0)
    x = common.randn((3000, 12), gen)
    planted = x @ common.randn((12, 1), gen)
    planted = planted / planted.std()
    noise = common.randn((3000, 1), gen)
    y = torch.cat([5 + 3 * planted, noise, planted + noise], 1)
    r2, predicted = stage2.linear_probe(x[:2000], y[:2000], x[2000:], y[2000:])
    assert r2[0] > 0.999 and abs(r2[1]) < 0.05 and r2[2] == pytest.approx(0.5, abs=0.06)
    assert torch.allclose(predicted[:, 0], y[2000:, 0], atol=0.1)


@pytest.mark.parametrize("flags,name,weight", [
    ("", "stage2-anneal", 1.0),
    ("--loss sum --diffusion-weight 0.1", "stage2-sum-w0.1", 0.1),
    ("--gradient none", "stage2-anneal-grad-none", 1.0),
    ("--loss sum --diffusion-weight 2 --gradient decoder", "stage2-sum-w2-grad-decoder", 2.0),
    ("--loss kendall", "stage2-kendall", None),
    ("--loss bound", "stage2-bound", None),
])
def test_names(flags, name, weight):
    """The defaults do not show; a loss without lambda has none."""
    _, own, variant = stage2.parse_flags(flags.split())
    assert (variant, own["diffusion_weight"]) == (name, weight)
    rates = {"balance_lr", "balance_muon_lr", "balance_clip", "balance_ema"}
    assert own.keys() == {"loss", "gradient", "diffusion_weight"} | (rates if "kendall" in name else set())
