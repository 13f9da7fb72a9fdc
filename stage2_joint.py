"""Stage 2: train the VAE and the refiner together, from scratch.

The claim: in stage 1 the VAE never hears from the refiner. Here it does: both learn in the same step, and the diffusion
loss reaches the VAE through x_hat. Does that make better samples, and a smoother latent space?

    ELBO term       E = SSE(x, x_hat) + beta KL(q(z|x) || N(0, I))                    as in stage 1, nats if beta is 1
    diffusion term  M = mean squared error of the U-Net's prediction at x_t; D M sums it over the D pixel values
    sum             E + lambda D M, one fixed weight. D M is not nats: the bound weighs the times unequally, in all
                    about like lambda = 4.2 for a v-prediction, 9.4 for eps from T
    anneal          the same, lambda raised log-linearly from 0.01 to its value over the first 60% of the steps
    kendall         exp(-a) E + a + exp(-b) D M + b, a and b learned (Kendall et al. 2018)
    bound           the exact bound on -log p(x) of the hybrid: KL, the process's sum_t KL_t + L_0, and what its start
                    about x_hat instead of x0 costs, which is what is left of a reconstruction term

One thing is kept apart on purpose: lambda scales what the VAE feels, never the refiner's own gradient. The U-Net sees a
copy of x_hat with the same values, whose backward pass multiplies the gradient by lambda D. So one backward pass of
E + M gives the U-Net stage 1's gradient and the VAE that of E + lambda D M. (Under `bound` the U-Net feels the bound /
D.) `--gradient` says how far it goes: `full` (decoder and encoder), `decoder`, or `none`, which is stage 1 with both
networks learning at once.

Why it is delicate: the refiner gains by information in x_hat, so the latent is pushed to leak x (the KL rises) and
x_hat stops looking like an image; or the refiner ignores x_hat. Watch `kl_nats`, `active_units`, `gradient_share` (the
diffusion term's part of the gradient at x_hat, all of it under `bound`) and `*_mse_shuffled` (the loss with another
image's x_hat).

Run     python stage2_joint.py                       shapes on a laptop; stage1_baseline.py first, to compare with it
        python stage2_joint.py --dataset celeba64    all that a GPU user types
Expect  the minutes of stage 1's networks together, its pictures and table, and `interpolation.png`. On shapes samples
        about as near to the real ones as stage 1's, more of them shapes, and a KL of 122 nats in place of 65.
"""

import argparse
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

import common
import fid
from common import to_float, to_uint8

WEIGHT = 1.0  # lambda where none is given

# --- Losses ----------------------------------------------------------------------------------------------------------

def condition(unet, x_hat):
    """Formulation 1: `denoise(x, t)` with x_hat (B, 3, H, W) concatenated to the U-Net's input. As in stage 1."""
    return lambda x, t: unet(torch.cat([x, x_hat], 1), t)


def scale_gradient(x_hat, scale, sse_norm):
    """A copy of x_hat that multiplies the gradient passing back through it by `scale`, a number or tensor (); and a
    tensor () that this pass fills: the norm of that gradient, g, over g + `sse_norm`, the norm of the SSE's gradient.
    The hook holds numbers only, nothing of the graph that it belongs to, so both are freed together."""
    gradient_share = torch.zeros((), device=x_hat.device)

    def hand_on(gradient):
        gradient = scale * gradient
        gradient_share.copy_(gradient.norm() / (gradient.norm() + sse_norm + 1e-12))
        return gradient

    copy = x_hat.view_as(x_hat)
    copy.register_hook(hand_on)
    return copy, gradient_share


def diffusion_weight(train, step):
    """lambda at a step: fixed for `sum`; for `anneal` log-linear from 0.01 (or less) over the first 60% of steps."""
    weight = train["diffusion_weight"]
    if train["loss"] != "anneal" or weight == 0:
        return weight
    low, progress = min(0.01, weight), min(1.0, step / (0.6 * train["steps"]))
    return math.exp((1 - progress) * math.log(low) + progress * math.log(weight))


class Balance(nn.Module):
    """a and b of `kendall`: they tend to the logs of the two terms, so that each weighs about one over its size."""

    def __init__(self):
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(2))

    def forward(self, elbo, diffusion):
        """Both terms (B,) -> exp(-a) E + a + exp(-b) D M + b: (B,). D M is detached, it teaches b alone: the VAE gets
        exp(-b) times its gradient by scale_gradient, the refiner its own."""
        a, b = self.logvar
        return (-a).exp() * elbo + a + (-b).exp() * diffusion.detach() + b


def loss_weights(train, step, balance):
    """What multiplies the SSE and the diffusion term D M in the VAE's loss: two numbers, or tensors ()."""
    if train["loss"] == "kendall":
        sse_weight, weight = (-balance.logvar.detach()).exp()
    elif train["loss"] == "bound":
        sse_weight, weight = 0.0, 1.0  # no reconstruction term
    else:
        sse_weight, weight = 1.0, diffusion_weight(train, step)
    return sse_weight, 0.0 if train["gradient"] == "none" else weight


def bound_loss(diffusion, denoise, x_hat, x0, u, eps):
    """The bound's terms of the process given x_hat (DDPM eq. 5), from one t per image for uniform u (B,): an unbiased
    estimate, (B,) nats. With KL(q(z|x) || p(z)) added it bounds -log p(x). The terms are largest at small t: with t =
    ceil(start u^4) these are drawn more often, which lowers the variance."""
    t = diffusion.draw_t(u.cpu().double() ** 4)
    probability = (t.double() / diffusion.start) ** 0.25 - ((t.double() - 1) / diffusion.start) ** 0.25  # (B,)
    t = t.to(x0.device)
    xt = diffusion.q_sample(x0, t, eps)
    x0_hat, _ = diffusion.predict(denoise(xt, t), xt, t, clamp=False)  # a clamp would cut the gradient
    nats = common.kl_step(diffusion, x0, x0_hat, t.clamp(min=2))  # where t is 1: replaced below
    first = t == 1
    if first.any():
        nats = nats.masked_scatter(first, common.data_nats(diffusion, x0[first], x0_hat[first]))
    return common.kl_prior(diffusion, x0, x_hat) + nats / probability.float().to(x0.device)


# --- Training --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def look(vae, unet, diffusion, images):
    """What to watch, on fixed training images, times and noise: active units, the refiner's loss, and its loss when
    x_hat belongs to another image (equal: the condition is ignored)."""
    unet.eval()  # without dropout
    x0, gen = to_float(images), common.generator(0, images.device)
    mu, _ = vae.encoder(x0)
    few, x_hat = x0[:64], vae.decoder(mu[:64])
    t = torch.linspace(1, diffusion.start, len(few), device=x0.device).long()
    eps, name = common.randn(few.shape, gen), f"{diffusion.objective}_mse"
    losses = {f"{name}_{which}": float(diffusion.simple_loss(condition(unet, seen), few, t, eps).mean())
              for which, seen in (("own", x_hat), ("shuffled", x_hat.roll(1, 0)))}
    unet.train()
    return {"active_units": float(common.active_units(mu).sum()), **losses}


def train_joint(folder, train, data, device, state):
    """Train VAE and refiner together; returns the finished checkpoint, which has the form of stage 1's refiner."""
    torch.manual_seed(train["seed"])
    vae = common.build_vae(train)
    torch.manual_seed(train["seed"])  # each network starts as its twin in stage 1
    unet, balance = common.build_unet(train, 6), Balance()
    learned = {"balance": balance} if train["loss"] == "kendall" else {}
    diffusion = common.Diffusion(train["objective"], device=device, start=train["start"])
    training = common.Training(folder, state, train, device, data.images, train["flip"] != "none", vae=vae, unet=unet,
                               **learned)
    probe = training.data[torch.randperm(len(data.images), generator=common.generator(0))[:256].to(device)]
    size = data.images[0].numel()  # D
    name = "bound_per_dim" if train["loss"] == "bound" else f"{diffusion.objective}_mse"
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        z_noise = training.draw(torch.randn, vae.latent_dim)  # (B, d)
        u = training.draw(torch.rand)  # (B,), for the training times
        eps = training.draw(torch.randn, *x0.shape[1:])  # (B, 3, H, W)
        with common.autocast(device):
            mu, logvar = vae.encoder(x0)
            z = common.reparameterise(mu, logvar, z_noise)  # (B, d)
            x_hat = vae.decoder(z)  # (B, 3, H, W)
            sse, kl = common.squared_error(x_hat, x0), common.gaussian_kl(mu, logvar)  # (B,)
            vae_part = kl if train["loss"] == "bound" else sse + train["beta"] * kl  # (B,)

            # decoded again from detached z: the same values, but the gradient ends in the decoder
            decoded = vae.decoder(z.detach()) if train["gradient"] == "decoder" else x_hat
            sse_weight, weight = loss_weights(train, training.steps, balance)
            sse_norm = sse_weight * (x_hat.detach() - x0).norm() / (2 * len(x0))  # |d mean SSE / d x_hat|, for the log
            seen, gradient_share = scale_gradient(decoded, weight * size, sse_norm)
            denoise = condition(unet, seen)
            if train["loss"] == "bound":
                unet_part = bound_loss(diffusion, denoise, seen, x0, u, eps) / size  # (B,), nats per dimension
            else:
                unet_part = diffusion.simple_loss(denoise, x0, diffusion.draw_t(u), eps)  # (B,)
            if train["loss"] == "kendall":
                vae_part = balance(vae_part, size * unet_part)  # (B,)
        training.step(vae_part + unet_part,
                      {"sse": sse, "kl_nats": kl, name: unet_part, "weight": weight, "gradient_share": gradient_share},
                      lambda: look(vae, unet, diffusion, probe))
    vae = common.frozen(common.build_vae(train), training.averages["vae"], device)
    return training.finish(gmm=common.fit_mixture(vae, data.images, train, device))


def load_model(state, device):
    """Rebuild a common.Model from its checkpoint alone; a `form1` checkpoint of stage 1 will do."""
    train = state["train"]
    vae = common.frozen(common.build_vae(train), state["vae"], device)
    unet = common.frozen(common.build_unet(train, 6), state["unet"], device)
    diffusion = common.Diffusion(train["objective"], device=device, start=train["start"])
    priors = {"gaussian": common.StandardNormal(vae.latent_dim), "gmm": common.GaussianMixture(**state["gmm"])}
    return common.Model("joint", device, (3, train["image_size"], train["image_size"]), diffusion, vae, priors,
                        lambda x_hat, z: condition(unet, x_hat))


# --- What it shows: the latent space ---------------------------------------------------------------------------------

def slerp(a, b, w):
    """The arc from a (w = 0) to b (w = 1), (N, d) (Shoemake 1985): N(0, I) lives near a sphere, which a line leaves."""
    angle = torch.acos((F.normalize(a) * F.normalize(b)).sum(1, keepdim=True).clamp(-1, 1))
    angle = angle.clamp(1e-4, math.pi - 1e-4)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def smoothness(features):
    """Features along paths (P, K, f) -> how smoothly an image turns into another: path length over the distance of its
    ends (1: straight), the longest over the mean step (1: even), and that distance (0: nothing changes at all)."""
    steps = (features[:, 1:] - features[:, :-1]).norm(dim=2)  # (P, K - 1)
    ends = (features[:, -1] - features[:, 0]).norm(dim=1)  # (P,)
    return {"path_over_distance": float(steps.sum(1).mean() / ends.mean().clamp(min=1e-9)),
            "worst_over_mean_step": float(steps.amax(1).mean() / steps.mean().clamp(min=1e-9)),
            "end_distance": float(ends.mean())}


def linear_probe(train_x, train_y, test_x, test_y):
    """Ridge regression from x (N, d) to y (N, k), fitted in closed form: R^2 of each column on the test set, and the
    test predictions (M, k)."""
    weight, bias = common.ridge_regression(train_x, train_y)
    predicted = test_x @ weight + bias
    r2 = 1 - (test_y - predicted).square().sum(0) / (test_y - test_y.mean(0)).square().sum(0)
    return r2.tolist(), predicted


@torch.no_grad()
def latent_space(folder, model, setup, pairs=32, points=9):
    """Interpolations between held-out images (VAE decodes and refined, with the noise fixed along a path), the score of
    the midpoints, that of held-out images' own codes, and what a linear probe reads off mu. A picture goes into
    `folder`, if given."""
    data, test, seed = setup.data, setup.test, setup.train["seed"]
    steps, result = setup.evaluation["probe_steps"], {}
    mu = common.encode(model.vae, test.images, model.device)[0]  # (N, d)
    count = min(setup.evaluation["grid_count"], len(mu) // 2)
    a, b = mu[:count], mu[count : 2 * count]

    def decode(z):  # the same noise for every z of a batch position
        x_hat = model.vae.decoder(z.to(model.device))
        images = common.refine(model, x_hat, z, common.generator(91_000 + seed), "dpm", steps)
        return to_uint8(x_hat).cpu(), to_uint8(images).cpu()

    def score(z):  # of VAE decodes and refined images
        x_hat, refined = zip(*(decode(part) for part in z.split(100)), strict=True)
        return {name: fid.scores(setup.extractor, torch.cat(images), setup.reference)[setup.fd] for name, images in
                (("vae", x_hat), ("refined", refined))}

    result["posterior"] = score(a)  # of real images' codes, their means: no prior is in between
    shots = [decode(slerp(a[:pairs], b[:pairs], w)) for w in torch.linspace(0, 1, points).tolist()]
    strips = [torch.stack(part, 1) for part in zip(*shots, strict=True)]  # VAE, refined: (P, K, 3, H, W)
    features = [fid.extract(setup.extractor, part.flatten(0, 1))[0].view(*part.shape[:2], -1) for part in strips]
    result["slerp"] = {part: smoothness(f) | {f"midpoint_{setup.fd}": middle} for f, (part, middle) in
                       zip(features, score(slerp(a, b, 0.5)).items(), strict=True)}
    if folder:
        rows = {f"{label} {i + 1}": strip[i] for i in range(3) for label, strip in
                zip(("VAE", "refined"), strips, strict=True)}
        common.save_grid(folder / "interpolation.png", rows)
    some = torch.randperm(len(data.images), generator=common.generator(0))[:5000]
    train_mu = common.encode(model.vae, data.images[some], model.device)[0]
    if data.labels is not None:
        one_hot = torch.eye(int(data.labels.max()) + 1)  # (classes, classes)
        _, guess = linear_probe(train_mu, one_hot[data.labels[some]], mu, one_hot[test.labels])
        result["probe_class_accuracy"] = float((guess.argmax(1) == test.labels).float().mean())
    if data.factors is not None:
        r2, _ = linear_probe(train_mu, data.factors[some], mu, test.factors)
        result["probe_r2"] = dict(zip(common.FACTORS, r2, strict=True))
    return result


# --- The command -----------------------------------------------------------------------------------------------------

def parse_flags(argv=None):
    """The flags, the train settings of this stage's own, and the run's name (the loss, and what is no default)."""
    parser = argparse.ArgumentParser(description="Stage 2: VAE and refiner trained jointly")
    common.add_flags(parser, "gaussian", "gmm")
    parser.add_argument("--loss", choices=("sum", "anneal", "kendall", "bound"), default="anneal",
                        help="how the two terms are balanced (default: %(default)s)")
    parser.add_argument("--gradient", choices=("full", "decoder", "none"), default="full",
                        help="how far the diffusion term reaches into the VAE (default: %(default)s)")
    parser.add_argument("--diffusion-weight", type=float, help=f"lambda of sum, and that anneal ends with ({WEIGHT})")
    args = parser.parse_args(argv)
    if args.loss in ("kendall", "bound") and args.diffusion_weight is not None:
        common.fail(f"--diffusion-weight: --loss {args.loss} has no weight to choose; leave it out")
    if args.diffusion_weight is not None and not 0 <= args.diffusion_weight <= 1000:
        common.fail(f"--diffusion-weight {args.diffusion_weight}: must lie between 0 and 1000")
    if args.loss == "bound" and args.gradient != "full":
        common.fail(f"--gradient {args.gradient}: --loss bound is a bound only with --gradient full")
    if args.gradient == "none" and (args.loss != "anneal" or args.diffusion_weight is not None):
        common.fail("--gradient none: no weight reaches the VAE; leave --loss and --diffusion-weight out")
    weight = WEIGHT if args.diffusion_weight is None else args.diffusion_weight
    own = {"loss": args.loss, "gradient": args.gradient,
           "diffusion_weight": weight if args.loss in ("sum", "anneal") else None}
    if args.loss == "kendall":
        own |= {"balance_lr": 0.01, "balance_muon_lr": 0.0, "balance_clip": 0.0, "balance_ema": 0.0}
    suffix = ("" if weight == WEIGHT else f"-w{weight:g}") + (
        "" if args.gradient == "full" else f"-grad-{args.gradient}")
    return args, own, f"stage2-{args.loss}{suffix}"


def main(argv=None):
    args, own, variant = parse_flags(argv)
    train, evaluation, device = common.read_settings(args)
    train |= own
    if args.dry_run:
        return common.print_settings(train, evaluation, common.network_cost(train))
    setup = common.Setup(args, train, evaluation, device)
    folder = setup.home / f"{variant}-s{args.seed}"
    state = common.trained(folder, setup.train, args.resume,
                           lambda state: train_joint(folder, setup.train, setup.data, setup.device, state))

    def more(model):
        return {"latent_space": latent_space(folder, model, setup)}

    model = load_model(state, setup.device)
    metrics = common.evaluate(folder, setup, state, model, common.network_cost(train), more)
    common.export(args, folder, state, model, setup.evaluation)
    earlier = {}  # stage 1 at equal budget: the same images for each network
    for path in (setup.home / f"stage1-{name}-s{args.seed}" for name in ("vae", "form1")):
        found = common.read_metrics(path / "metrics.json", setup.evaluation)
        if found and found["run"]["train_images"] == metrics["run"]["train_images"]:
            earlier[path] = found
    tables = metrics["tables"]
    checkpoint = setup.home / f"stage1-form1-s{args.seed}" / "checkpoint.pt"
    if len(earlier) == 2 and checkpoint.is_file() and "latent_space_stage1" not in tables:
        form1 = load_model(common.load_checkpoint(checkpoint), setup.device)
        form1 = dataclasses.replace(form1, temperature=evaluation["temperature"])
        tables["latent_space_stage1"] = latent_space(None, form1, setup)
        common.write_json(folder / "metrics.json", metrics)
    common.print_results(earlier | {folder: metrics}, setup)
    for name, where in (("stage 1", "latent_space_stage1"), (variant, "latent_space")):
        if where in tables:
            path = tables[where]["slerp"]["refined"]
            print(f"{name}: path length over end distance {path['path_over_distance']:.3f}, end distance "
                  f"{path['end_distance']:.3f} (refined, slerp)")
    if not earlier:
        print(f"no stage 1 results in {setup.home}; to compare: python stage1_baseline.py --dataset {args.dataset} "
              f"--budget {train['budget']} --seed {args.seed} --data-dir {args.data_dir} --out {args.out}")


if __name__ == "__main__":
    main()
