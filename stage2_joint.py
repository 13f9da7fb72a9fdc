"""Stage 2: train the VAE and the refiner together, from scratch.

The question: in stage 1 the VAE is trained alone, and learns nothing from the refiner that will use its images. Here
both networks learn in the same steps, and the gradient of the diffusion loss reaches the VAE through x_hat. Do the
samples become better, and the latent space smoother?

The loss has two terms.

    VAE term        E = SSE(x0, x_hat) + beta KL(q(z|x0) || N(0, I)), exactly as in stage 1
    diffusion term  D M, where M is the refiner's loss of stage 1, a mean over the D pixel values. The factor D puts it
                    on the scale of a sum, as SSE is one.

The loss is their weighted sum, w_E E + w_M D M. `--loss` says how the two are balanced. `anneal` is the default.

    --loss     w_E        w_M
    sum        1          lambda, one fixed weight (the setting diffusion_weight)
    anneal     1          rises log-linearly from lambda / 10 to lambda in the first 60% of the steps
    kendall    exp(-a)    exp(-b), where a and b are learned (Kendall et al. 2018, arXiv:1705.07115)
    bound      1          1, but E and M are such that E + D M is the variational bound on -log p(x) of VAE and refiner
                          together, with nothing to balance (section "The bound")

The U-Net appears in the second term alone, and its optimisers, Muon and Adam, divide the scale of a gradient out. So
w_M hardly changes how the U-Net learns: what it sets is how much the VAE listens to the refiner.

With `--gradient none` the refiner is shown x_hat.detach(): the VAE learns as if it were alone, and the refiner learns
beside it, from the x_hat of a VAE that is not finished yet. It is a control. If joint training helps, that can be due
to the gradient, or due to the bad x_hat that the refiner sees in training and learns to mend. With `none` only the
second is left.

What can go wrong: the refiner profits from any information about x0 in x_hat. So the encoder may be pushed to put x0's
details into z in a hidden form: the KL rises, and x_hat stops looking like an image (`kl_nats` and `sse` in the log).

Run     python stage2_joint.py                       shapes, on a laptop; stage1_baseline.py first, to compare with it
        python stage2_joint.py --loss kendall        with learned weights
        python stage2_joint.py --dataset celeba64    on faces; uses the GPU, if there is one
Expect  no more minutes than stage 1 takes for both networks. All runs of the folder are printed as one table. On shapes
        the refiner tolerates noise on x_hat far better than in stage 1 (final_evaluation.py measures it), and the KL is
        higher. interpolation.png shows paths through the latent space.
"""

import argparse
import math
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import common
import fid
from common import randn, to_uint8

# --- Losses ----------------------------------------------------------------------------------------------------------

class Balance(nn.Module):
    """The learned a and b of `kendall`. Both begin at log D. Trained to lower exp(-a) E + a + exp(-b) D M + b, exp(a)
    follows the mean of E, and exp(b) that of D M. The ratio of the weights, exp(a - b), plays the part of lambda."""

    def __init__(self, D):
        super().__init__()
        self.a_and_b = nn.Parameter(torch.full((2,), math.log(D)))

    def forward(self, E, DM):
        """E and D M, each (B,) -> the loss, (B,)."""
        a, b = self.a_and_b
        return (-a).exp() * E + a + (-b).exp() * DM + b


# Adam moves a by up to 0.05 a step, so it can fall from log D = 8 to log E = 2.5, as it does on shapes.
BALANCE = {"balance_lr": 0.05, "balance_muon_lr": 0.0}


def loss_weights(settings, loss, step, balance):
    """w_E and w_M at a step, numbers (see the table at the top). Of `kendall`, for the log and the clipping alone."""
    if loss == "anneal":
        progress = min(1.0, step / (0.6 * settings["unet_steps"]))
        return 1.0, settings["diffusion_weight"] * 0.1 ** (1 - progress)
    if loss == "kendall":
        a, b = balance.a_and_b.tolist()
        return math.exp(-a), math.exp(-b)
    if loss == "sum":
        return 1.0, settings["diffusion_weight"]
    return 1.0, 1.0  # bound


# --- The bound -------------------------------------------------------------------------------------------------------

# The variational bound of VAE and diffusion model together, in nats per image (DDPM eq. 5, with a code z):
#     -log p(x0) <= KL(q(z|x0) || N(0, I)) + KL(q(x_start|x0) || p(x_start|x_hat))     these two are E
#                   + sum over t = 2..start of KL_t + L_0                              and these D M

def kl_prior(diffusion, x0, x_hat):
    """KL(q(x_start | x0) || p(x_start | x_hat)), (B,) nats. If the process begins at T, p is N(0, I). If it begins
    earlier, p and q have the same variance, and their means are sqrt(alpha_bar) x_hat and sqrt(alpha_bar) x0."""
    alpha_bar = float(diffusion.alpha_bar[diffusion.start])
    if diffusion.start == diffusion.T:
        return 0.5 * (alpha_bar * x0**2 - alpha_bar - math.log(1 - alpha_bar)).flatten(1).sum(1)
    return alpha_bar / (2 * (1 - alpha_bar)) * ((x0 - x_hat) ** 2).flatten(1).sum(1)


def kl_step(diffusion, x0, x0_predicted, t):
    """KL_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for times t (B,) from 2 on, (B,) nats. The model p has the
    predicted x0 in place of x0, and the same variance."""
    x0_factor, _, variance = diffusion.posterior(t.cpu(), t.cpu() - 1)  # (B,)
    factor = (x0_factor**2 / (2 * variance)).float().to(x0.device)
    return factor * ((x0 - x0_predicted) ** 2).flatten(1).sum(1)


def data_nats(diffusion, x0, x0_predicted):
    """L_0 = -log p(x0 | x_1), (B,) nats, where x0 = to_float(pixels) (DDPM eq. 13).

    A pixel's probability is the mass of N(x0_predicted, sd^2) between the edges of its bin, x0 - 1/255 and x0 + 1/255;
    the bins of the values 0 and 255 reach to infinity. As in DDPM's code, sd^2 is the variance at t = 2, and no
    probability is below 1e-12. In float64 on the CPU."""
    sd = float(diffusion.posterior(2, 1)[2].sqrt())
    x = x0.cpu().double()
    mean = x0_predicted.cpu().double()
    ndtr = torch.special.ndtr  # the distribution function of N(0, 1)

    # 1 for the value 255, whose bin has no upper edge; 0 for the value 0, whose bin has no lower one
    below_upper = torch.where(x < 0.999, ndtr((x + 1 / 255 - mean) / sd), 1.0)
    below_lower = torch.where(x > -0.999, ndtr((x - 1 / 255 - mean) / sd), 0.0)
    return -(below_upper - below_lower).clamp(min=1e-12).log().flatten(1).sum(1).float().to(x0.device)


def draw_bound_t(diffusion, count, gen):
    """Times (count,) at which the sum over t is estimated, and their probabilities. The terms are largest at small t.
    So small times are drawn more often, which lowers the variance (importance sampling): from a uniform u in [0, 1),
        t = floor(start u^4) + 1,   P(t = k) = (k / start)^(1/4) - ((k - 1) / start)^(1/4)"""
    u = torch.rand(count, generator=gen, device=gen.device).cpu().double()
    t = (diffusion.start * u**4).long() + 1  # in 1..start
    probability = (t / diffusion.start) ** 0.25 - ((t - 1) / diffusion.start) ** 0.25
    return t.to(gen.device), probability.float().to(gen.device)


def bound_term(diffusion, prediction, x0, x_t, t):
    """The bound's term of time t for each image, from the U-Net's prediction at x_t: KL_t, or L_0 if t = 1. (B,) nats.
    """
    x0_predicted = diffusion.to_x0(prediction, x_t, t, clamp=False)  # clamping would stop the gradient
    return torch.where(t > 1, kl_step(diffusion, x0, x0_predicted, t.clamp(min=2)),
                       data_nats(diffusion, x0, x0_predicted))


# --- Training --------------------------------------------------------------------------------------------------------

def train_joint(folder, settings, loss, gradient, data, device):
    """Train VAE and refiner together, from scratch, for as many steps as stage 1's refiner. Returns the checkpoint."""
    torch.manual_seed(settings["seed"])
    vae = common.build_vae(settings).to(device, memory_format=torch.channels_last)
    unet = common.build_unet(settings, 6).to(device, memory_format=torch.channels_last)
    D = data.train.images[0].numel()  # the number of pixel values
    balance = Balance(D).to(device)
    vae_optimizer = common.Optimizer(vae, settings, "vae")
    unet_optimizer = common.Optimizer(unet, settings, "unet")
    balance_optimizer = common.Optimizer(balance, BALANCE, "balance")
    vae_average = common.MovingAverage(vae, settings["vae_ema"])
    unet_average = common.MovingAverage(unet, settings["unet_ema"])
    diffusion = common.Diffusion(settings["objective"], settings["start"], device)
    images = data.train.images.to(device)
    gen = common.generator(settings["seed"], f"training, process {common.RANK}", device)
    steps = settings["unet_steps"]
    progress = common.Progress(
        folder, settings, steps, gen, vae=vae, unet=unet, balance=balance, vae_optimizer=vae_optimizer,
        unet_optimizer=unet_optimizer, balance_optimizer=balance_optimizer, vae_average=vae_average,
        unet_average=unet_average)
    for step in progress:
        x0 = common.draw_batch(images, settings, gen, settings["unet_flip"])  # (B, 3, H, W) in [-1, 1]
        if loss == "bound":
            t, probability = draw_bound_t(diffusion, len(x0), gen)  # (B,), in 1..start
        else:
            t = diffusion.draw_t(len(x0), gen)
        eps = randn(x0.shape, gen)
        x_t = diffusion.q_sample(x0, t, eps)  # (B, 3, H, W)
        with common.autocast(device):
            x_hat, mu, logvar = vae(x0, randn((len(x0), vae.latent_dim), gen))
            x_hat_seen = x_hat.detach() if gradient == "none" else x_hat
            prediction = unet(torch.cat([x_t, x_hat_seen], 1), t)  # Formulation 1 of stage 1

        sse, kl = common.squared_error(x_hat, x0), common.gaussian_kl(mu, logvar)  # (B,)
        if loss == "bound":
            E = kl_prior(diffusion, x0, x_hat) + kl
            M = bound_term(diffusion, prediction, x0, x_t, t) / probability / D  # nats per pixel value
        else:
            E = sse + settings["beta"] * kl
            M = (prediction - diffusion.target(x0, t, eps)).square().flatten(1).mean(1)  # (B,)
            if settings["even_levels"]:
                M = M * diffusion.level_weight(t)
        w_E, w_M = loss_weights(settings, loss, step, balance)
        total = balance(E, D * M) if loss == "kendall" else w_E * E + w_M * D * M  # (B,)

        for optimizer in (vae_optimizer, unet_optimizer, balance_optimizer):
            optimizer.zero_grad()
        total.mean().backward()
        common.average_gradients(vae, unet, balance)
        nn.utils.clip_grad_norm_(vae.parameters(), settings["vae_clip"])
        nn.utils.clip_grad_norm_(unet.parameters(), settings["unet_clip"] * w_M * D)  # its gradient is w_M D times M's
        rate = common.rate_factor(step, steps, settings)
        vae_optimizer.step(rate)
        unet_optimizer.step(rate)
        if loss == "kendall":
            balance_optimizer.step(rate)
        vae_average.update(step)
        unet_average.update(step)
        progress.log(sse=sse, kl_nats=kl, diffusion_loss=M, weight=w_M / w_E)
    vae = common.frozen(common.build_vae(settings), vae_average.weights, device)
    return progress.finish(vae=vae_average.weights, unet=unet_average.weights,
                           gmm=common.fit_mixture(vae, data.train.images, settings, device))


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(checkpoint, device):
    """The networks of a checkpoint, with the priors over z and the diffusion."""
    settings = checkpoint["settings"]
    vae, priors = common.load_vae(checkpoint, device)
    unet = common.frozen(common.build_unet(settings, 6), checkpoint["unet"], device)
    return SimpleNamespace(settings=settings, device=device, vae=vae, unet=unet, networks=[vae, unet], priors=priors,
                           diffusion=common.Diffusion(settings["objective"], settings["start"], device))


def draw_codes(model, settings, count):
    """`count` codes from the prior of the settings, (count, d)."""
    return model.priors[settings["prior"]].sample(count, common.generator(settings["seed"], "codes"))


@torch.no_grad()
def generate(model, settings, z, corrupt=None):
    """Codes z (N, d) -> x_hat and the refined images, each uint8 (N, 3, H, W) on the CPU: as `form1` of stage 1.
    `corrupt`, a function, spoils x_hat before it is refined."""
    diffusion = model.diffusion
    times = diffusion.times(settings)  # falling from start to 0
    before, after = [], []
    for first in common.bar(range(0, len(z), settings["eval_batch"]), desc="sampling"):
        codes = z[first : first + settings["eval_batch"]].to(model.device)  # (B, d)
        gen = common.generator(settings["seed"], f"noise {first}")
        with common.autocast(model.device):
            x_hat = model.vae.decoder(codes)
            x_hat = corrupt(x_hat) if corrupt else x_hat
            x = diffusion.x_start(x_hat, randn(x_hat.shape, gen).to(model.device), settings["temperature"])
            x0 = None
            for i in range(len(times) - 1):
                t = torch.full((len(x),), times[i], device=model.device)  # (B,)
                prediction = model.unet(torch.cat([x, x_hat], 1), t)
                x0_before, x0 = x0, diffusion.to_x0(prediction, x, t)
                x = diffusion.step(settings["sampler"], x, x0, times, i, x0_before, gen)
        before.append(to_uint8(x_hat).cpu())
        after.append(to_uint8(x).cpu())
    return torch.cat(before), torch.cat(after)


# --- What is measured ------------------------------------------------------------------------------------------------

def slerp(a, b, w):
    """Spherical interpolation (Shoemake 1985): the point at w in [0, 1] on the arc from a to b, (N, d). In many
    dimensions the codes of images have nearly the same length, and the middle of a straight line between two of them
    would be much shorter."""
    angle = torch.acos((F.normalize(a) * F.normalize(b)).sum(1, keepdim=True).clamp(-1, 1))
    angle = angle.clamp(1e-4, math.pi - 1e-4)  # its sine must not be 0
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def draw_interpolation(folder, model, settings, images, paths=3, points=9):
    """interpolation.png: images along paths between the codes of held-out images. All points of a path are refined with
    the same noise."""
    mu, _ = common.encode(model.vae.encoder, images[: 2 * paths], model.device)
    along = [generate(model, settings, slerp(mu[:paths], mu[paths:], w)) for w in torch.linspace(0, 1, points).tolist()]
    rows = {}
    for k in range(paths):
        for label, place in (("VAE", 0), ("refined", 1)):
            rows[f"{label} {k + 1}"] = torch.stack([point[place][k] for point in along])
    common.save_grid(folder / "interpolation.png", rows)


def evaluate(folder, checkpoint, settings, scorer, device):
    """Write metrics.json and pictures of a finished model, with the rows of stage 1."""
    model = load_model(checkpoint, device)
    rows, pictures = [], {}
    for label, changed, count in common.what_to_sample(settings, model.priors):
        z = draw_codes(model, changed, count)
        clock = time.time()
        x_hat, images = generate(model, changed, z)
        seconds = (time.time() - clock) / count
        steps = len(model.diffusion.times(changed)) - 1
        rows.append(scorer(images, label=label, prior=changed["prior"], sampler=changed["sampler"], steps=steps,
                           nfe=steps, seconds_per_image=seconds))
        pictures[label] = x_hat, images
    x_hat, images = pictures[""]
    rows.append(scorer(x_hat, label="before", prior=settings["prior"], sampler="none", steps=0, nfe=0))
    common.draw_samples(folder, {"VAE": x_hat, "refined": images})
    draw_interpolation(folder, model, settings, scorer.data.test.images)
    common.write_metrics(folder, checkpoint, settings, scorer, rows, model.networks)
    if settings["export"]:
        common.export(folder, images)


# --- The command -----------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description="Stage 2: VAE and refiner trained jointly")
    common.add_flags(parser)
    parser.add_argument("--loss", choices=("sum", "anneal", "kendall", "bound"), default="anneal",
                        help="how the two terms are balanced (default: %(default)s)")
    parser.add_argument("--gradient", choices=("full", "none"), default="full",
                        help="whether the diffusion term's gradient reaches the VAE (default: %(default)s)")
    args = parser.parse_args(argv)
    settings, device = common.read_settings(args)
    if args.dry_run:
        return common.print_settings(settings, **common.vae_and_unet(
            settings | {"vae_steps": settings["unet_steps"]}, common.build_unet(settings, 6)))

    extractor = fid.load_extractor(settings["features"], args.weights, device)
    data = common.load_data(args.dataset, args.data_dir)
    settings["images"] = common.hash_images(data.train.images)
    folder = common.run_folder(settings, f"stage2-{args.loss}" + ("-grad-none" if args.gradient == "none" else ""))
    checkpoint = (common.finished(folder, settings, args.resume)
                  or train_joint(folder, settings, args.loss, args.gradient, data, device))
    if common.RANK > 0:
        return
    scorer = fid.Scorer(extractor, data)
    evaluate(folder, checkpoint, settings, scorer, device)
    common.print_results(settings, scorer)


if __name__ == "__main__":
    main()
