"""Stage 2: where the gradients go in one backward pass, the four losses, the log, what is measured of the latent space.
"""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, denoiser_of, evened, expect_error, images_of, oracle, planted_setup, same, settings
from torch import nn

import common
import fid
import stage1_baseline as stage1
import stage2_joint as stage2


def joint(**changes):
    """The settings of a joint training."""
    rates = {"balance_lr": 0.05, "balance_muon_lr": 0.0, "balance_clip": 0.0, "balance_ema": 0.0}
    own = {"loss": "sum", "gradient": "full", "diffusion_weight": 1.0, "from_vae": False}
    return settings(**rates | own | changes)


@pytest.mark.parametrize("changes,elbo_weight,weight", [  # the factors of E and of D M in the loss of the VAE
    ({"diffusion_weight": 7.0}, 1, 7),
    ({"diffusion_weight": 7.0, "gradient": "decoder"}, 1, 7),
    ({"diffusion_weight": 7.0, "gradient": "none"}, 1, 0),  # with this and the next the VAE is trained by E alone
    ({"diffusion_weight": 0.0}, 1, 0),
    ({"diffusion_weight": 7.0, "objective": "eps", "start": 1000}, 1, 7),
    ({"loss": "anneal"}, 1, 0.1),
    ({"loss": "kendall"}, math.exp(-0.5), math.e),
    ({"loss": "kendall", "gradient": "decoder"}, math.exp(-0.5), math.e),
    ({"loss": "bound"}, 1, 1),
    ({"loss": "bound", "gradient": "decoder"}, 1, 1),
    ({"loss": "bound", "gradient": "none"}, 1, 0),
    ({"loss": "bound", "start": 1000}, 1, 1),
])
def test_one_backward_pass_is_two(changes, elbo_weight, weight, tmp_path, monkeypatch):
    """The U-Net gets the gradient of M with x_hat detached, whatever the weight. The VAE gets the gradient of E and, as
    far as `--gradient` says, that of lambda D M. In M each image's error is divided by the mean of its noise level. The
    log holds the undivided one. Under `bound` nothing is divided, and E is the KL and the nats of the process's start.
    Separate passes of autograd must give the same."""
    train, data = joint(steps=1, vae_clip=0.0, unet_clip=0.0, **changes), images_of(60)
    gradients, given, size = {}, [], 3 * 32 * 32
    build, step = common.build_unet, common.Training.step

    def close(a, b, rel=2e-4):  # two lists of tensors, each pair within `rel` of its norm
        return all((x - y).norm() <= rel * y.norm() + 1e-9 for x, y in zip(a, b, strict=True))

    def build_unet(*args):  # the last layer of a new U-Net is zero; no gradient would reach x_hat
        unet = build(*args)
        nn.init.normal_(unet.out.weight, std=0.1)
        return unet

    class Unequal(stage2.Balance):
        def __init__(self, size):
            super().__init__(size)
            self.a_and_b.data = torch.tensor([0.5, -1.0])

        def forward(self, *args):
            given.append(args)
            return super().forward(*args)

    monkeypatch.setattr(common, "build_unet", build_unet)
    monkeypatch.setattr(common.Training, "step", lambda training, *a, **k: step(training, *a, **k) or gradients.update(
        {name: [p.grad for p in net.parameters()] for name, net in training.networks.items()}))
    monkeypatch.setattr(stage2, "Balance", Unequal)
    row, = stage2.train_joint(tmp_path / "joint", train, data, CPU)["log"]

    torch.manual_seed(0)
    vae = common.build_vae(train)
    torch.manual_seed(0)
    unet, diffusion = build_unet(train, 6), common.Diffusion(train["objective"], start=train["start"])
    training = common.Training(tmp_path / "again", train, CPU, data.images, 1, False, vae=vae, unet=unet)
    x0, z_noise = training.batch(), training.normal(vae.latent_dim)
    u, eps = training.uniform(), training.normal(3, 32, 32)
    x_hat, mu, logvar = vae(x0, z_noise)
    sse, kl = ((x_hat - x0) / 2).square().flatten(1).sum(1), common.gaussian_kl(mu, logvar)
    elbo = sse + train["beta"] * kl
    if train["loss"] == "bound":
        elbo = kl + common.kl_prior(diffusion, x0, x_hat)
        assert train["start"] == 1000 or torch.allclose(elbo, kl + 0.485 * sse, rtol=1e-3)

    def terms(x_hat):  # the U-Net's error in the log, and the diffusion term in the loss of the VAE: each (B,)
        denoise, t = stage2.denoiser(unet, x_hat), diffusion.draw_t(u)
        if train["loss"] == "bound":
            nats = stage2.bound_loss(diffusion, denoise, x0, u, eps)
            return nats / size, nats
        error = denoise(diffusion.q_sample(x0, t, eps), t) - diffusion.target(x0, t, eps)
        mse = error.square().flatten(1).mean(1)
        return mse, size * evened(mse, t, train["start"])

    of_unet = terms(x_hat.detach())[1].mean() / size
    assert close(gradients["unet"], torch.autograd.grad(of_unet, list(unet.parameters())))
    mse, squares = terms(x_hat)
    names = [name.split(".")[0] for name, _ in vae.named_parameters()]
    at_x_hat, = torch.autograd.grad(weight * squares.mean(), x_hat, retain_graph=True)
    of_elbo = torch.autograd.grad(elbo_weight * elbo.mean(), list(vae.parameters()), retain_graph=True,
                                materialize_grads=True)
    of_diffusion = torch.autograd.grad(x_hat, list(vae.parameters()), at_x_hat, retain_graph=True)
    assert {"encoder", "decoder"} == set(names)
    for part in ("encoder", "decoder"):
        ours, a, b = ([g for g, name in zip(grads, names, strict=True) if name == part]
                      for grads in (gradients["vae"], of_elbo, of_diffusion))
        both = [x + y for x, y in zip(a, b, strict=True)]
        assert close(ours, both if train["gradient"] in ("full", part) else a), part
        assert close(both, a) == (weight == 0)  # otherwise the line above could not fail
    if train["loss"] == "kendall":  # exp(-a) E + a + exp(-b) D M + b, from terms with one number per image
        (given_elbo, given_squares), = given
        assert given_squares.shape == squares.shape and torch.allclose(given_squares, squares, rtol=1e-4)
        assert given_elbo.shape == elbo.shape and torch.allclose(given_elbo, elbo, rtol=1e-5)
        by_hand = torch.stack([1 - elbo_weight * elbo.mean(), 1 - weight * squares.mean()])
        assert torch.allclose(gradients["balance"][0], by_hand, rtol=1e-4)
    unet_term = "bound_per_dim" if train["loss"] == "bound" else f"{train['objective']}_mse"
    expected = {"weight": weight / elbo_weight, "sse": float(sse.detach().mean()), "kl_nats": float(kl.detach().mean()),
                unet_term: float(mse.detach().mean())}
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert train["loss"] == "bound" or float(squares.detach().mean()) / size != pytest.approx(row[unet_term], rel=2e-3)


def test_gradient_none_with_a_still_vae_is_stage_1(tmp_path):
    """With equal weights and seeds, the refiner's losses of 5 steps agree with stage 1's within a relative 1e-6."""
    data, train = images_of(60), joint(gradient="none", vae_lr=0.0, vae_muon_lr=0.0, steps=5, every=1)
    ours = stage2.train_joint(tmp_path / "joint", train, data, CPU)
    torch.manual_seed(train["seed"])
    frozen = {"vae": common.build_vae(train).state_dict(), "gmm": {}, "seconds": 1.0}
    theirs = stage1.train_refiner(tmp_path / "form1", train, "form1", frozen, data, CPU)
    a, b = ([row["v_mse"] for row in state["log"]] for state in (ours, theirs))
    assert len(a) == 5 and a == pytest.approx(b, rel=1e-6)
    assert all(torch.allclose(value, theirs["unet"][name], atol=1e-6) for name, value in ours["unet"].items())


@pytest.mark.parametrize("start", [None, 25, 2])
def test_bound_is_the_sum_of_its_parts(start):
    """The mean of bound_loss over u in [0, 1), and kl_prior, is what evaluation adds up. Time t is drawn for u up to
    (t / start)^(1/4) and above ((t - 1) / start)^(1/4)."""
    diffusion = common.Diffusion("v", T=40, start=start)
    images = images_of(1).images[:, :, 12:20, 12:20].clamp(20, 235)  # so that x0 + 0.05 needs no clamping
    x0, last = common.to_float(images), diffusion.start
    x_hat = x0 - 0.1
    exact = common.diffusion_nats(diffusion, oracle(diffusion, x0 + 0.05), images, x_hat, last - 1,
                                  common.generator(0))
    ends = (torch.arange(last + 1).double() / last) ** 0.25
    u = torch.cat([(ends[1:] + ends[:-1]) / 2, torch.tensor([0.0, 1 - 2**-24])])  # and the ends of [0, 1)
    many = x0.expand(last + 2, -1, -1, -1)
    nats = stage2.bound_loss(diffusion, oracle(diffusion, many + 0.05), many, u,
                             common.randn(many.shape, common.generator(1)))
    found = float((ends.diff() * nats[:-2]).sum() + common.kl_prior(diffusion, x0, x_hat))
    assert found == pytest.approx(float(sum(exact.values())), rel=1e-4)
    assert torch.allclose(nats[-2:], nats[[0, last - 1]], rtol=1e-3)


def test_the_bound_pulls_back_what_is_out_of_range():
    """A predicted x0 beyond -1..1 is not clamped in training, so its gradient points back."""
    diffusion, x0 = common.Diffusion("v", T=40), torch.zeros(2, 3, 8, 8)
    predicted = torch.full_like(x0, 1.5).requires_grad_()
    eps = common.randn(x0.shape, common.generator(0))
    nats = stage2.bound_loss(diffusion, oracle(diffusion, predicted), x0, torch.tensor([0.5, 0.9]), eps)
    gradient, = torch.autograd.grad(nats.sum(), predicted)
    assert (gradient > 0).all()


def test_anneal_raises_the_weight(tmp_path):
    """lambda rises log-linearly from a tenth over the first 60% of the steps. The log holds it."""
    def lambda_at(train, step):
        w_E, w_M = stage2.loss_weights(train, step, None)
        assert w_E == 1
        return w_M

    train = {"loss": "anneal", "diffusion_weight": 3.0, "vae_steps": 81, "unet_steps": 120, "gradient": "full"}
    weights = [lambda_at(train, step) for step in range(101)]
    assert weights[0] == pytest.approx(0.3) and weights[30] == pytest.approx(3 * 0.1**0.5)
    assert weights[60:] == pytest.approx([3.0] * 41) and weights == sorted(weights)
    assert lambda_at(train | {"loss": "sum"}, 0) == 3
    assert lambda_at(train | {"diffusion_weight": 0.0}, 30) == 0
    train = joint(loss="anneal", every=1)
    log = stage2.train_joint(tmp_path, train, images_of(60), CPU)["log"]
    assert [row["weight"] for row in log] == pytest.approx([lambda_at(train, step) for step in range(8)])


def test_the_refiners_settings_say_how_long_and_whether_images_are_mirrored(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(common, "Training", lambda *args, steps, flip, **networks: asked.append((steps, flip)) or 1 / 0)
    for flip in (False, True):
        with pytest.raises(ZeroDivisionError):  # before any step
            train = joint(unet_flip=flip, vae_flip=not flip, unet_steps=5, vae_steps=8)
            stage2.train_joint(tmp_path, train, images_of(2), CPU)
    assert asked == [(6, False), (6, True)]  # (8 + 5) / 2, rounded down


def test_the_vae_may_come_from_stage_1(tmp_path, monkeypatch):
    """Its weights are those of stage 1 when the first step begins, and the refiner's are the same as without. The
    seconds of stage 1 count as seconds before."""
    begun, step, data = [], common.Training.step, images_of(60)
    vae_state = stage1.train_vae(tmp_path / "vae", settings(), data, CPU)
    monkeypatch.setattr(common.Training, "step", lambda training, *args, **how: begun.append(
        {name: copy.deepcopy(net.state_dict()) for name, net in training.networks.items()}) or step(
            training, *args, **how))
    states = [stage2.train_joint(tmp_path / str(i), joint(steps=1), data, CPU, given)
              for i, given in enumerate((None, vae_state))]
    torch.manual_seed(0)
    new = common.build_vae(settings()).state_dict()
    assert same([dict(weights["vae"]) for weights in begun], [dict(new), vae_state["vae"]])
    assert not same(dict(new), vae_state["vae"]) and same(dict(begun[0]["unet"]), dict(begun[1]["unet"]))
    assert [state["seconds_before"] for state in states] == [0, vae_state["seconds"]] and vae_state["seconds"] > 0


def test_stage_1_is_compared_if_its_settings_are_the_same(tmp_path, monkeypatch):
    """Settings of the data are among them: they differ if a folder of images has changed."""
    setup = planted_setup(tmp_path, settings(data_note="as published"), evaluation={})
    for change, found in (({}, 2), ({"data_note": "JPEG copies"}, 0), ({"n_train": 7}, 0), ({"batch": 3}, 0)):
        metrics = {"run": {"train": setup.train | change}}
        monkeypatch.setattr(fid, "read_metrics", lambda path, evaluation, metrics=metrics: metrics)
        assert len(stage2.results_of_stage1(setup)) == found


def command_from_vae(tmp_path, monkeypatch, *changes):
    """The command with --from-vae and --set, on no data, and a list of what train_joint is given, which ends it."""
    given = []
    monkeypatch.setattr(fid, "Setup", lambda args, train, evaluation, device: planted_setup(
        tmp_path, train, changes=args.changes, evaluation=evaluation, device=device, data=None, test=None))
    monkeypatch.setattr(stage2, "train_joint", lambda *args: given.append(args) or 1 / 0)
    argv = ["--budget", "smoke", "--device", "cpu", "--from-vae", *changes]
    return lambda: stage2.main(argv), given


@pytest.mark.parametrize("change,vae_settings,name", [
    ([], {}, "stage1-vae-s0"), (["--set", "start=300"], {}, "stage1-vae-s0"),
    (["--set", "beta=0.5"], {"beta": 0.5}, "stage1-vae-beta=0.5-s0")])
def test_from_vae_finds_the_vae_of_stage_1(change, vae_settings, name, tmp_path, monkeypatch, capsys):
    """It is the one that stage 1 trains with the same --set. If it is not there, one line says so."""
    command, given = command_from_vae(tmp_path, monkeypatch, *change)
    path = tmp_path / name / "checkpoint.pt"
    expect_error(capsys, command, str(path.parent), "no finished VAE", "--variant vae")
    common.save_state(path, {"train": settings(**vae_settings), "finished": True, "vae": {}})
    with pytest.raises(ZeroDivisionError):
        command()
    (folder, train, _, _, vae_state), = given
    assert vae_state["vae"] == {} and folder.name.startswith("stage2-anneal-from-vae") and train["from_vae"] is True


def test_from_vae_needs_a_finished_vae(tmp_path, monkeypatch, capsys):
    """One line names the folder of an unfinished training."""
    command, given = command_from_vae(tmp_path, monkeypatch)
    path = tmp_path / "stage1-vae-s0" / "checkpoint.pt"
    common.save_state(path, {"train": settings(), "finished": False, "weights": {"vae": {}}})
    expect_error(capsys, command, str(path.parent), "no finished VAE", "--resume if it was stopped")
    assert not given


def test_kendall_learns_the_balance(tmp_path):
    """a and b tend to the logarithms of the two terms. E gets exp(-a) times its own gradient. In training both begin at
    log D. E is smaller than D M, so a falls faster than b, and lambda = exp(a - b) falls."""
    balance, elbo, squares = stage2.Balance(3072), torch.tensor([20.0, 40.0]), torch.tensor([0.1, 0.3])
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.1)
    for _ in range(600):
        optimizer.zero_grad()
        balance(elbo, squares).mean().backward()
        optimizer.step()
    assert balance.a_and_b.tolist() == pytest.approx([math.log(30), math.log(0.2)], abs=1e-3)
    elbo.requires_grad_()
    balance(elbo, squares).sum().backward()
    assert elbo.grad.tolist() == pytest.approx([1 / 30] * 2, rel=1e-3)
    train = joint(loss="kendall", steps=12, every=3)
    state = stage2.train_joint(tmp_path, train, images_of(60), CPU)
    weights = [row["weight"] for row in state["log"]]
    assert weights == sorted(weights, reverse=True) and weights[0] < 1
    a, b = (state["balance"]["a_and_b"] - math.log(3072)).tolist()
    assert a < -0.2 and a < b  # of 0.6 that 12 steps of 0.05 can reach


def test_paths_and_their_smoothness():
    """Ends, middles and quarters by hand. A straight path scores 1, a detour more. Over several paths the means are
    taken before the ratio."""
    a, b = common.randn((2, 5, 16), common.generator(0))
    for w, end in ((0.0, a), (1.0, b)):
        assert torch.allclose(stage2.slerp(a, b, w), end, atol=1e-5)
    assert torch.allclose(stage2.slerp(a, a, 0.3), a, atol=1e-3)  # no angle between the ends
    e, third = torch.eye(4)[:2], math.pi / 6  # a third of the quarter circle from one axis to the other
    assert torch.allclose(stage2.slerp(e[:1], e[1:], 1 / 3), math.cos(third) * e[:1] + math.sin(third) * e[1:])
    assert torch.allclose(stage2.slerp(e[:1], e[1:], 0.5), (e[:1] + e[1:]) / math.sqrt(2))  # stays on the sphere
    line = torch.linspace(0, 1, 5)[:, None] * torch.tensor([3.0, 4.0])
    assert stage2.smoothness(line[None]) == pytest.approx(
        {"path_over_distance": 1, "end_distance": 5})
    detour = torch.tensor([[[0.0, 0], [0, 1], [1, 1]]])
    assert stage2.smoothness(detour)["path_over_distance"] == pytest.approx(2 / math.sqrt(2))
    far = torch.cat([detour, 10 * torch.tensor([[[0.0, 0], [1, 0], [2, 0]]])])  # lengths 2 and 20; ends at sqrt(2), 20
    assert stage2.smoothness(far) == pytest.approx({
        "path_over_distance": 22 / (2**0.5 + 20), "end_distance": (2**0.5 + 20) / 2})
    assert all(math.isfinite(v) for v in stage2.smoothness(torch.ones(2, 4, 3)).values())  # a collapsed decoder


def test_probe_finds_a_planted_factor():
    """A linear factor is read off exactly, noise is not, and half a factor and half noise give an R^2 of a half."""
    gen = common.generator(0)
    x = common.randn((3000, 12), gen)
    planted = x @ common.randn((12, 1), gen)
    planted = planted / planted.std()
    noise = common.randn((3000, 1), gen)
    y = torch.cat([5 + 3 * planted, noise, 5 + planted + noise], 1)
    r2, predicted = stage2.linear_probe(x[:2000], y[:2000], x[2000:], y[2000:])
    assert r2[0] > 0.999 and abs(r2[1]) < 0.05 and r2[2] == pytest.approx(0.5, abs=0.06)
    assert torch.allclose(predicted[:, 0], y[2000:, 0], atol=0.1)


def test_model_of_a_checkpoint(tmp_path):
    """It is the model that stage 1 builds for form1, so stage 2 can measure stage 1's latent space, too."""
    state = stage2.train_joint(tmp_path, joint(steps=1, start=300), images_of(60), CPU)
    ours, theirs = stage2.load_model(state, CPU), stage1.load_model(state, "form1", CPU)
    nn.init.normal_(ours.networks[1].out.weight), theirs.networks[1].load_state_dict(ours.networks[1].state_dict())
    (x, x_hat), t, z = torch.randn(2, 3, 3, 32, 32), torch.tensor([1, 100, 300]), torch.randn(3, 8)
    assert torch.equal(ours.denoiser_for(x_hat, None, None)(x, t), theirs.denoiser_for(x_hat, None, None)(x, t))
    assert torch.equal(ours.vae.decoder(z), theirs.vae.decoder(z))
    assert ours.diffusion.start == 300 and ours.shape == theirs.shape and len(ours.networks) == len(theirs.networks)
    for name, prior in theirs.priors.items():
        assert torch.equal(ours.priors[name].log_prob(z), prior.log_prob(z))


# A VAE whose code is the first row of an 8x8 image, times two; only the first 5 dimensions vary by more than 0.01.
ROW = SimpleNamespace(encoder=lambda x: (2 * x[:, 0, 0] * torch.tensor([1.0] * 5 + [0.05] * 3), -9 + 0 * x[:, 0, 0]),
                      decoder=lambda z: nn.functional.pad(z[:, None, None] / 2, (0, 0, 0, 7, 0, 2)), latent_dim=8)


def images_of_noise(count, seed):
    """uint8 images of uniform noise: (count, 3, 8, 8)."""
    return torch.randint(256, (count, 3, 8, 8), generator=common.generator(seed), dtype=torch.uint8)


def test_watched_numbers_by_hand(tmp_path):
    """Active units of all images; the refiner's loss of the first 64, with their own x_hat and with that of the image
    before, without dropout. The log holds these numbers for training images."""
    images, diffusion = images_of_noise(70, 0), common.Diffusion("v", start=300)
    torch.manual_seed(0)
    unet = common.build_unet(settings(unet=[[8, 8, 1, 1]], dropout=0.5), 6).train()
    for parameter in unet.parameters():  # new ones are zero behind the dropout
        nn.init.normal_(parameter, std=0.3)
    numbers = stage2.watch_training(ROW, unet, diffusion, images)
    assert unet.training
    x0, t = common.to_float(images[:64]), torch.linspace(1, 300, 64).long()
    x_hat, eps = ROW.decoder(ROW.encoder(x0)[0]), common.randn(x0.shape, common.generator(0))
    with torch.no_grad():
        own, shuffled = (float(diffusion.simple_loss(stage2.denoiser(unet.eval(), shown), x0, t, eps).mean())
                         for shown in (x_hat, torch.cat([x_hat[-1:], x_hat[:-1]])))
    assert numbers == pytest.approx({"active_units": 5, "v_mse_own": own, "v_mse_shuffled": shuffled})
    assert own != pytest.approx(shuffled, rel=1e-4)

    train, data = joint(steps=2, every=2, vae_ema=0.0, unet_ema=0.0, start=1000), images_of(300)
    state = stage2.train_joint(tmp_path, train, data, CPU)
    model, row = stage2.load_model(state, CPU), state["log"][0]
    watched = data.images[torch.randperm(300, generator=common.generator(0))[:256]]
    expected = stage2.watch_training(*model.networks, model.diffusion, watched)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_latent_space_by_hand(tmp_path, monkeypatch):
    """Scores and paths are those of held-out images, decoded and refined with the same noise all along a path. No two
    scored images have the same noise. The probe is fitted to training images and tested on held-out ones, here with a
    third of their labels changed. The planted features are the pixels, the planted score is a mean over them."""
    def data(count, seed, wrong):
        gen, images = common.generator(seed), images_of_noise(count, seed)
        code = ROW.encoder(common.to_float(images))[0]
        labels = (code[:, 0] > 0).long() ^ (torch.rand(count, generator=gen) < wrong).long()
        factors = code @ common.randn((8, 9), common.generator(0)) + common.randn((count, 9), gen)
        return code, common.ImageData(images, labels, factors, "noise", "none", "")

    def pixels(extractor, images):
        return (images.flatten(1).float(), None)

    def score(images):
        return {"fd": float(images.double().square().mean())}

    (train_code, train), (code, test) = data(400, 1, 0.0), data(260, 2, 0.33)
    model = common.Model("joint", CPU, (3, 8, 8), common.Diffusion("v", start=400), (), ROW,
                         denoiser_for=denoiser_of(lambda x, x_hat: 0.3 * x - 0.1 * x_hat))
    setup = SimpleNamespace(data=train, test=test, train={"seed": 5}, extractor=None, fd_key="fd", score=score,
                            evaluation={"grid_count": 20, "probe_steps": 3})
    saved = {}
    monkeypatch.setattr(fid, "extract", pixels)
    monkeypatch.setattr(common, "save_grid", lambda path, rows, columns: saved.update({path: rows, "columns": columns}))
    result = stage2.latent_space(tmp_path / "paths.png", model, setup, pairs=4, points=5)
    assert saved["columns"] == ["real", "w = 0", "w = 0.25", "w = 0.5", "w = 0.75", "w = 1", "real"]

    def decode(z, seed=91_005):
        refined = common.refine(model, ROW.decoder(z), z, common.generator(seed), "dpm", 3)
        return {"vae": common.to_uint8(ROW.decoder(z)), "refined": common.to_uint8(refined)}

    assert result["images"] == 20
    a, b, rows = code[:20], code[20:40], saved[tmp_path / "paths.png"]
    for name, label in (("vae", "VAE"), ("refined", "refined")):
        assert result["posterior"][name] == score(decode(a)[name])["fd"]
        paths = torch.stack([decode(stage2.slerp(a[:4], b[:4], w))[name] for w in (0, 0.25, 0.5, 0.75, 1)], 1)
        expected = stage2.smoothness(paths.flatten(2).float())
        assert result["slerp"][name] == pytest.approx(expected)
        for i in range(3):  # the two real images are at the ends of the path
            expected = torch.cat([test.images[i][None], paths[i], test.images[20 + i][None]])
            assert torch.equal(rows[f"{label} {i + 1}"], expected)
    assert len(rows) == 6 and not torch.equal(rows["VAE 1"], rows["refined 1"])
    r2, _ = stage2.linear_probe(train_code, train.factors, code, test.factors)
    assert [result["probe_r2"][name] for name in common.FACTORS] == pytest.approx(r2, abs=1e-3)
    _, predicted = stage2.linear_probe(train_code, torch.eye(2)[train.labels], code, torch.eye(2)[test.labels])
    right = (predicted.argmax(1) == test.labels).float().mean()
    assert result["probe_class_accuracy"] == pytest.approx(float(right)) and 0.5 < right < 0.8
    setup.evaluation["grid_count"] = 200  # there are 260 held-out images, and a path takes two
    result = stage2.latent_space(tmp_path / "more.png", model, setup)
    refined = torch.cat([decode(code[:100])["refined"], decode(code[100:130], 91_205)["refined"]])
    assert result["images"] == 130 and result["posterior"]["refined"] == score(refined)["fd"]
    test.labels[0] = 2  # a class without training images is an error of the probe
    assert stage2.latent_space(tmp_path / "more.png", model, setup)["probe_class_accuracy"] < 1


def test_paths_between_samples(tmp_path, monkeypatch):
    """They go from one code of the mixture to another, with the same noise all along a path."""
    mixture = common.GaussianMixture(torch.ones(1), torch.zeros(1, 8), torch.eye(8)[None])
    model = common.Model("joint", CPU, (3, 8, 8), common.Diffusion("v", start=400), (), ROW, {"gmm": mixture},
                         denoiser_for=denoiser_of(lambda x, x_hat: 0.3 * x - 0.1 * x_hat))
    setup = SimpleNamespace(train={"seed": 5}, evaluation={"probe_steps": 3})
    saved = {}
    monkeypatch.setattr(common, "save_grid", lambda path, rows, columns: saved.update({path: rows, "columns": columns}))
    stage2.draw_paths(tmp_path / "paths.png", model, setup)
    z, rows = mixture.sample(6, common.generator(56_005)), saved[tmp_path / "paths.png"]
    assert [len(row) for row in rows.values()] == [9] * 6
    assert list(rows) == ["VAE 1", "refined 1", "VAE 2", "refined 2", "VAE 3", "refined 3"]
    assert saved["columns"][:2] == ["w = 0", "w = 0.125"] and len(saved["columns"]) == 9
    for k, w in enumerate([0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]):
        code = stage2.slerp(z[:3], z[3:], w)
        images = common.refine(model, ROW.decoder(code), code, common.generator(91_005), "dpm", 3)
        for i in range(3):
            assert torch.equal(rows[f"VAE {i + 1}"][k], common.to_uint8(ROW.decoder(code))[i])
            assert torch.equal(rows[f"refined {i + 1}"][k], common.to_uint8(images)[i])


def test_the_command_measures_both_latent_spaces(tmp_path, monkeypatch, capsys):
    """Its own and that of stage 1's checkpoint, each with its own networks and at the flag's temperature. It compares
    mixtures fitted to its own codes."""
    data, measured, mixtures, given = images_of(60), [], [], []
    monkeypatch.setattr(fid, "Setup", lambda args, train, evaluation, device: given.append(train) or planted_setup(
        tmp_path, train, evaluation=evaluation, device=device, data=data, test=data))
    monkeypatch.setattr(fid, "by_components", lambda model, setup: mixtures.append(model) or "by size")
    monkeypatch.setattr(fid, "evaluate", lambda folder, setup, state, model: {
        "run": {"train": state["train"]}, "tables": {}})
    monkeypatch.setattr(fid, "read_metrics", lambda path, evaluation: {"run": {"train": given[0]}, "tables": {}})
    monkeypatch.setattr(fid, "print_results", lambda *args: None)
    drawn = []
    monkeypatch.setattr(stage2, "draw_paths", lambda picture, model, setup: drawn.append((picture, model)))
    monkeypatch.setattr(stage2, "latent_space", lambda picture, model, setup: measured.append((picture, model)) or {
        "slerp": {"refined": {"path_over_distance": len(measured), "end_distance": 0.5}}})
    vae_state = stage1.train_vae(tmp_path / "vae", settings(steps=1), data, CPU)
    form1 = stage1.train_refiner(tmp_path / "stage1-form1-s0", settings(steps=2), "form1", vae_state, data, CPU)
    stage2.main("--budget smoke --device cpu --temperature 0.8 --steps 1".split())
    own = common.load_checkpoint(tmp_path / "stage2-anneal-s0" / "checkpoint.pt")
    folders = [tmp_path / "stage2-anneal-s0", tmp_path / "stage1-form1-s0"]
    assert mixtures == [model for _, model in measured]
    assert [picture for picture, _ in measured] == [folder / "interpolation.png" for folder in folders]
    assert drawn == [(folder / "paths.png", model) for folder, (_, model) in zip(folders, measured, strict=True)]
    assert own["seconds_before"] == 0
    for (_, model), state in zip(measured, (own, form1), strict=True):
        assert same(dict(model.networks[0].state_dict()), state["vae"]) and model.temperature == 0.8
        assert same(dict(model.networks[1].state_dict()), state["unet"])
    for length, folder in enumerate(folders, 1):
        tables = json.loads((folder / "metrics.json").read_text())["tables"]
        assert set(tables) == {"latent_space", "components"} and tables["components"] == "by size"
        assert tables["latent_space"]["slerp"]["refined"]["path_over_distance"] == length
    printed = capsys.readouterr().out
    assert "stage1-form1-s0: path length over end distance 2.000" in printed
    assert "stage2-anneal-s0: path length over end distance 1.000" in printed


@pytest.mark.parametrize("flags,name,weight", [
    ("", "stage2-anneal", stage2.WEIGHT),
    ("--loss sum --diffusion-weight 0.1", "stage2-sum-w0.1", 0.1),
    ("--gradient none", "stage2-anneal-grad-none", stage2.WEIGHT),
    ("--loss bound --gradient none", "stage2-bound-grad-none", None),
    ("--loss sum --diffusion-weight 2 --gradient decoder", "stage2-sum-w2-grad-decoder", 2.0),
    ("--loss kendall", "stage2-kendall", None),
    ("--loss bound", "stage2-bound", None),
    ("--loss sum --gradient decoder --from-vae", "stage2-sum-grad-decoder-from-vae", stage2.WEIGHT),
])
def test_names(flags, name, weight):
    """The name leaves out what is the default. A loss without lambda has none in its settings."""
    _, own, variant = stage2.read_flags(flags.split())
    assert (variant, own["diffusion_weight"]) == (name, weight)
    rates = {"balance_lr", "balance_muon_lr", "balance_clip", "balance_ema"}
    assert own.keys() == {"loss", "gradient", "diffusion_weight", "from_vae"} | (rates if "kendall" in name else set())
    assert own["from_vae"] == ("from-vae" in name)
