"""Stage 2: train the VAE and the refiner together, from scratch.

The question: in stage 1 the VAE is trained alone, and learns nothing from the refiner that will use its images. Here
both networks learn in the same steps, and the gradient of the diffusion loss reaches the VAE through x_hat. Do the
samples become better, and the latent space smoother?

The loss has two terms.

    VAE term        E = SSE(x0, x_hat) + beta KL(q(z|x0) || N(0, I)), exactly as in stage 1
    diffusion term  D M, where M is the refiner's loss of stage 1, a mean over the D pixel values. The factor D puts it
                    on the scale of a sum, as SSE is one.

The VAE should follow the gradient of w_E E + w_M D M. The U-Net should follow that of M alone, so that it learns as in
stage 1, whatever the weights are. One backward pass serves both, because M reaches the VAE only through x_hat:

    x_hat_seen = x_hat, but gradients that pass back through it are multiplied by w_M D    (common.scale_gradient)
    M          = the refiner's loss, when it is shown x_hat_seen
    loss       = w_E E + M

`--loss` says how the two are balanced. `anneal` is the default.

    --loss     w_E        w_M
    sum        1          lambda, one fixed weight (the setting diffusion_weight)
    anneal     1          rises log-linearly from lambda / 10 to lambda in the first 60% of the steps
    kendall    exp(-a)    exp(-b), where a and b are learned (Kendall et al. 2018, arXiv:1705.07115)
    bound      1          1, but E and M are such that E + D M is the variational bound on -log p(x) of VAE and refiner
                          together, with nothing to balance:
                              E   = KL(q(z|x0) || N(0, I)) + KL(q(x_start|x0) || p(x_start|x_hat))
                              D M = the terms of the U-Net's steps from x_start to x0 (bound_loss)

`--gradient none` sets w_M = 0: the VAE learns as if it were alone, and the refiner learns beside it, from the x_hat of
a VAE that is not finished yet. It is a control. If joint training helps, that can be due to the gradient, or due to the
bad x_hat that the refiner sees in training and learns to mend. With `none` only the second is left.

What can go wrong: the refiner profits from any information about x0 in x_hat. So the encoder may be pushed to put x0's
details into z in a hidden form: the KL rises, and x_hat stops looking like an image (`kl_nats` and `sse` in the log).

Run     python stage2_joint.py                       shapes, on a laptop; stage1_baseline.py first, to compare with it
        python stage2_joint.py --loss kendall        with learned weights
        python stage2_joint.py --dataset celeba64    on faces; uses the GPU, if there is one
Expect  no more minutes than stage 1 takes for both networks. All runs of the folder are printed as one table. On shapes
        the refiner tolerates noise on x_hat far better than in stage 1 (`robustness` in metrics.json), and the KL is
        higher. interpolation.png shows paths through the latent space.
"""

import argparse
import math

import torch
from torch import nn

import common
import fid

# --- Losses ----------------------------------------------------------------------------------------------------------

def denoiser(unet, x_hat):
    """`denoise(x, t)` with x_hat (B, 3, H, W) concatenated to the U-Net's input: Formulation 1 of stage 1."""
    return lambda x, t: unet(torch.cat([x, x_hat], 1), t)


class Balance(nn.Module):
    """The learned a and b of `kendall`. Both begin at log D. Trained to lower exp(-a) E + a + exp(-b) D M + b, exp(a)
    follows the mean of E, and exp(b) that of D M. The ratio of the weights, exp(a - b), plays the part of lambda."""

    def __init__(self, D):
        super().__init__()
        self.a_and_b = nn.Parameter(torch.full((2,), math.log(D)))

    def forward(self, E, DM):
        """E and D M, each (B,) -> the loss of a and b, (B,)."""
        a, b = self.a_and_b
        return (-a).exp() * E + a + (-b).exp() * DM + b


# Adam moves a by up to 0.05 a step, so it can fall from log D = 8 to log E = 2.5, as it does on shapes.
BALANCE = {"balance_lr": 0.05, "balance_muon_lr": 0.0, "balance_clip": 1e9, "balance_ema": 0.0}


def loss_weights(settings, loss, gradient, step, balance):
    """w_E and w_M at a step (see the table at the top): two numbers or scalar tensors."""
    w_E, w_M = 1.0, settings["diffusion_weight"]  # sum
    if loss == "anneal":
        progress = min(1.0, step / (0.6 * settings["unet_steps"]))
        w_M = settings["diffusion_weight"] * 0.1 ** (1 - progress)
    elif loss == "kendall":
        a, b = balance.a_and_b.detach()
        w_E, w_M = (-a).exp(), (-b).exp()
    elif loss == "bound":
        w_M = 1.0
    return w_E, (0.0 if gradient == "none" else w_M)


def bound_loss(diffusion, denoise, x0, u, eps):
    """An unbiased estimate, from one time per image, of the U-Net's part of the bound on -log p(x0 | x_hat) (DDPM
    eq. 5): (B,) nats. It has a KL for each t from 2 on (common.kl_step) and, for t = 1, the nats of the pixels given
    x_1 (common.data_nats).

    These terms are largest at small t, so small times are drawn more often, which lowers the variance (importance
    sampling): from a uniform u in [0, 1),
        t = floor(start u^4) + 1,   P(t = k) = (k / start)^(1/4) - ((k - 1) / start)^(1/4)
    Each term is divided by the probability of its time, which keeps the estimate unbiased."""
    u = u.cpu().double()
    t = (diffusion.start * u**4).long() + 1  # (B,), in 1..start
    probability = (t.double() / diffusion.start) ** 0.25 - ((t - 1).double() / diffusion.start) ** 0.25  # (B,)
    t = t.to(x0.device)
    x_t = diffusion.q_sample(x0, t, eps)
    x0_predicted, _ = diffusion.to_x0_and_eps(denoise(x_t, t), x_t, t, clamp=False)  # clamping would stop the gradient
    nats = torch.where(t > 1, common.kl_step(diffusion, x0, x0_predicted, t.clamp(min=2)),
                       common.data_nats(diffusion, x0, x0_predicted))  # (B,)
    return nats / probability.float().to(x0.device)


# --- Training --------------------------------------------------------------------------------------------------------

def train_joint(folder, settings, loss, gradient, data, device):
    """Train VAE and refiner together, from scratch, for as many steps as stage 1's refiner. Returns the checkpoint."""
    torch.manual_seed(settings["seed"])
    vae = common.build_vae(settings)
    unet = common.build_unet(settings, 6)
    diffusion = common.Diffusion(settings["objective"], device=device, start=settings["start"])
    D = data.train.images[0].numel()  # the number of pixel values
    balance = Balance(D)
    networks = {"vae": vae, "unet": unet} | ({"balance": balance} if loss == "kendall" else {})
    training = common.Training(folder, settings | BALANCE, device, data.train.images, steps=settings["unet_steps"],
                               flip=settings["unet_flip"], **networks)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        u, eps = training.uniform(), training.normal(*x0.shape[1:])  # (B,), (B, 3, H, W)
        with common.autocast(device):
            # E: the part of the loss that does not depend on the U-Net.
            x_hat, mu, logvar = vae(x0, training.normal(vae.latent_dim))
            sse, kl = common.squared_error(x_hat, x0), common.gaussian_kl(mu, logvar)  # (B,)
            E = sse + settings["beta"] * kl
            if loss == "bound":
                E = common.kl_prior(diffusion, x0, x_hat) + kl

            # M: what the U-Net learns from and, through `x_hat_seen`, the VAE.
            w_E, w_M = loss_weights(settings, loss, gradient, training.steps_taken, balance)
            denoise = denoiser(unet, common.scale_gradient(x_hat, w_M * D))
            if loss == "bound":
                M = bound_loss(diffusion, denoise, x0, u, eps) / D  # (B,), nats per pixel value
            else:
                t = diffusion.draw_t(u)  # (B,), in 1..start
                mse = diffusion.simple_loss(denoise, x0, t, eps)  # (B,)
                M = common.level_weight(settings, diffusion, t) * mse
            total = w_E * E + M  # (B,)
            if loss == "kendall":  # this trains a and b alone
                total = total + balance(E.detach(), D * M.detach())
        training.step(total, {"sse": sse, "kl_nats": kl, "diffusion_loss": M, "weight": w_M / w_E})
    vae = common.frozen(common.build_vae(settings), training.averages["vae"], device)
    return training.finish(gmm=common.fit_mixture(vae, data.train.images, settings, device))


def load_model(checkpoint, device):
    """The common.Model of a checkpoint."""
    settings = checkpoint["settings"]
    size = settings["image_size"]
    vae, priors = common.load_vae(checkpoint, device)
    unet = common.frozen(common.build_unet(settings, 6), checkpoint["unet"], device)
    return common.Model(device, shape=(3, size, size), networks=(vae, unet), vae=vae, priors=priors,
                        diffusion=common.Diffusion(settings["objective"], device=device, start=settings["start"]),
                        denoiser=lambda x_hat, z: denoiser(unet, x_hat))


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
        return common.print_settings(settings, vae=common.build_vae(settings), unet=common.build_unet(settings, 6))

    scorer = fid.load_scorer(args, settings, device)
    folder = common.run_folder(settings, f"stage2-{args.loss}" + ("-grad-none" if args.gradient == "none" else ""))
    checkpoint = (common.finished(folder, settings, args.resume)
                  or train_joint(folder, settings, args.loss, args.gradient, scorer.data, device))
    model = load_model(checkpoint, device)
    rows = fid.score(folder, model, settings, scorer)
    tables = {"robustness": fid.robustness(folder, model, settings, scorer),
              "latent_space": fid.latent_space(folder, model, settings, scorer)}
    fid.write_metrics(folder, checkpoint, model, settings, scorer, rows, tables)
    fid.print_results(settings, scorer)


if __name__ == "__main__":
    main()
