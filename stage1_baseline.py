"""Stage 1: DiffuseVAE, the two-stage baseline (Pandey et al. 2022, arXiv:2201.00308).

The claim: a VAE draws an image in one pass from a compact code, but the image is blurred. A diffusion model draws sharp
images, but it has no code. Put one behind the other, and the VAE decides *what* is in the image while the diffusion
model decides *how it looks*.

    1. The VAE        It is trained to reconstruct an image x0 from its code z:
                          z ~ q(z|x0),   x_hat = Dec(z),   loss = SSE(x0, x_hat) + beta KL(q(z|x0) || N(0, I))
                      As published, beta is 1. We take a smaller one: the code then holds more of the image, and it
                      becomes harder to model how codes are distributed (see 3).

    2. The refiner    It is a diffusion model that sees x_hat and learns to draw x0:
                          x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   loss = w_t MSE(target, U-Net(x_t, x_hat, t))
                      where abar_t (`alpha_bar` in common.Diffusion) falls from nearly 1 at t = 1 to nearly 0 at t = T,
                      and w_t lets all noise levels count alike (common.level_weight; as published it is 1).
                      The target is eps as published (--budget paper), and otherwise
                          v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0.
                      There are two ways to show x_hat to the U-Net. Its input is, with concatenation as [.., ..],
                          [x_t, x_hat] in Formulation 1 (`form1`),
                          [x_t + x_hat, x_hat] in Formulation 2 (`form2`).

    3. Sampling       Draw z from a prior, decode it to x_hat, and run the reverse process. The prior is N(0, I), or a
                      Gaussian mixture that is fitted to the codes of the training images after training ("ex post"),
                      because these codes never follow N(0, I) exactly.

    4. Where to begin As published, sampling begins with pure noise, at t = T. But x_hat already shows roughly what x0
                      looks like. So we leave the noisiest part out and begin at t = `start`, 400 of 1000:
                          x_start = sqrt(abar_start) x_hat + sqrt(1 - abar_start) eps
                      Only the times 1..start are trained, and fewer sampling steps are enough.

    5. Guidance       Train a second U-Net of the same size for a tenth of the steps: the guide. It makes the same
                      errors as the refiner, but larger ones. So the difference of their predictions points away from
                      these errors, and `guided` adds a part of it, `guidance`, to the refiner's:
                          prediction = refiner + guidance (refiner - guide)
                      Each sampling step evaluates both networks.

    6. Augmentation   `augmented` is form1, trained with noise on x_hat, so that the refiner learns to expect errors in
                      it (conditioning augmentation, Ho et al. 2022, arXiv:2106.15282, section 3).

Two controls: `vae` is the VAE alone, `uncond` a diffusion model without a VAE, which begins at t = T.

Run     python stage1_baseline.py                        vae and form1 on the built-in shapes, on a laptop
        python stage1_baseline.py --dataset cifar10      the same on real images (see README for where they come from)
        python stage1_baseline.py --variant guided       VAE, Formulation 1 and its guide
        python stage1_baseline.py --variant all
        python stage1_baseline.py --dataset cifar10 --pretrained     36 samples in half a minute; nothing is trained
Expect  of the first command: 4 to 6 minutes on two CPU cores, a table of scores, and pictures. In
        runs/shapes-cpu/stage1-form1-s0/samples.png, the images of the VAE are above and the refined ones below, in
        pairs of rows: the VAE's shapes have flat tones where the refiner's have spots. `hf_energy` is the amount of
        fine detail, relative to real images: about 0.3 before and 0.9 after refinement. `fd_local` is the Frechet
        distance to the real images in the features of a small network: less than half after refinement.
"""

import argparse
import math
from pathlib import Path

import torch

import common
import fid

# The variants in the order in which they are trained, and what each builds on
BASE = {"vae": None, "uncond": None, "form1": "vae", "form2": "vae", "guided": "form1", "augmented": "vae"}
AUGMENTATION = max(fid.NOISE)  # largest sd of the noise that `augmented` adds to x_hat: the strongest of the evaluation
PRETRAINED = Path(__file__).resolve().parent / "results"  # holds DATASET/pretrained.pt

# --- The model and its losses ----------------------------------------------------------------------------------------

def vae_loss(vae, x0, noise, beta):
    """DiffuseVAE's loss for the VAE. x0 (B, 3, H, W), noise (B, d) -> loss, sse, kl_nats, each (B,).

    With beta = 1 this is the negative ELBO, up to a constant, of a Gaussian decoder with variance 1/2 on images in
    [0, 1]: -log N(x; x_hat, 1/2) = SSE / (2 * 1/2) + constant."""
    x_hat, mu, logvar = vae(x0, noise)
    sse = common.squared_error(x_hat, x0)
    kl = common.gaussian_kl(mu, logvar)
    return sse + beta * kl, sse, kl


def build_diffusion(settings, variant, device):
    """The diffusion process of a variant. Without an x_hat to begin with (`uncond`), it begins at T."""
    start = None if variant == "uncond" else settings["start"]
    return common.Diffusion(settings["objective"], device=device, start=start)


def build_unet(settings, variant):
    """The U-Net of a variant. Its input has 3 channels for x_t and, except in `uncond`, 3 more for x_hat."""
    return common.build_unet(settings, 3 if variant == "uncond" else 6)


def denoiser(unet, x_hat, variant):
    """The function (x_t, t) -> prediction for one batch, given its x_hat (B, 3, H, W), or None for `uncond`.

    The paper describes Formulation 2 as a diffusion process of y_t = x_t + x_hat, which ends in noise around x_hat.
    That is the same, since y_t is x_t plus a known image: x0, eps and the target do not change."""
    if variant == "uncond":
        return unet

    def denoise(x_t, t):
        shown = x_t + x_hat if variant == "form2" else x_t  # (B, 3, H, W)
        return unet(torch.cat([shown, x_hat], 1), t)

    return denoise


def guided_denoiser(refiner, guide, guidance):
    """Autoguidance (Karras et al. 2024, arXiv:2406.02507) of two functions (x_t, t) -> prediction. `guidance` is the
    paper's w - 1. (The paper guides the predicted image. We guide v or eps, which is the same, since at a given x_t
    both are linear functions of the image.)"""

    def denoise(x_t, t):
        prediction = refiner(x_t, t)
        return prediction + guidance * (prediction - guide(x_t, t))

    return denoise


# --- Training --------------------------------------------------------------------------------------------------------

def train_vae(folder, settings, data, device):
    """Train the VAE on the training images, then fit the Gaussian mixture to their codes. Returns the checkpoint, a
    dictionary of weights, settings and log."""
    torch.manual_seed(settings["seed"])
    vae = common.build_vae(settings)
    training = common.Training(folder, settings, device, data.train.images, steps=settings["vae_steps"],
                               flip=settings["vae_flip"], vae=vae)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        noise = training.normal(vae.latent_dim)  # (B, d)
        with common.autocast(device):
            loss, sse, kl = vae_loss(vae, x0, noise, settings["beta"])
        training.step(loss, {"sse": sse, "kl_nats": kl})
    # The checkpoint keeps the moving average of the weights, so the mixture is fitted to its codes.
    vae = common.frozen(common.build_vae(settings), training.averages["vae"], device)
    return training.finish(variant="vae", gmm=common.fit_mixture(vae, data.train.images, settings, device))


def train_refiner(folder, settings, variant, base, data, device):
    """Train a refiner behind the frozen VAE of the checkpoint `base`. Returns its checkpoint, which contains the VAE as
    well. `uncond` has no base. Of `guided`, the base is that of form1, and what is trained is the guide."""
    torch.manual_seed(settings["seed"])
    unet = build_unet(settings, variant)
    diffusion = build_diffusion(settings, variant, device)
    vae = None if variant == "uncond" else common.frozen(common.build_vae(settings), base["vae"], device)
    steps = math.ceil(settings["unet_steps"] / 10) if variant == "guided" else settings["unet_steps"]
    training = common.Training(folder, settings, device, data.train.images, steps=steps, flip=settings["unet_flip"],
                               unet=unet)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        x_hat = None
        if variant != "uncond":  # as published, x_hat comes from a fresh sample of z in every step
            with torch.no_grad(), common.autocast(device):
                x_hat, _, _ = vae(x0, training.normal(vae.latent_dim))  # (B, 3, H, W)
        if variant == "augmented":  # each x_hat gets noise of a strength of its own
            sd = AUGMENTATION * training.uniform(1, 1, 1)  # (B, 1, 1, 1)
            x_hat = x_hat + sd * training.normal(*x0.shape[1:])
        t = diffusion.draw_t(training.uniform())  # (B,), in 1..start
        eps = training.normal(*x0.shape[1:])  # (B, 3, H, W)
        with common.autocast(device):
            mse = diffusion.simple_loss(denoiser(unet, x_hat, variant), x0, t, eps)  # (B,)
        training.step(common.level_weight(settings, diffusion, t) * mse, {f"{settings['objective']}_mse": mse})
    if variant == "uncond":
        return training.finish(variant=variant)
    parts = {"vae": base["vae"], "gmm": base["gmm"]}
    if variant == "guided":
        parts |= {"unet": base["unet"], "guide": training.averages["unet"]}
    return training.finish(base, variant=variant, **parts)


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(checkpoint, device):
    """The common.Model of a checkpoint."""
    settings = checkpoint["settings"]
    variant = checkpoint["variant"]
    size = settings["image_size"]
    model = common.Model(device, shape=(3, size, size))
    if variant != "uncond":
        model.vae, model.priors = common.load_vae(checkpoint, device)
        model.networks += (model.vae,)
    if variant != "vae":
        unet = common.frozen(build_unet(settings, variant), checkpoint["unet"], device)
        model.networks += (unet,)
        model.diffusion = build_diffusion(settings, variant, device)
        model.denoiser = lambda x_hat, z: denoiser(unet, x_hat, variant)
    if variant == "guided":
        guide = common.frozen(build_unet(settings, variant), checkpoint["guide"], device)
        model.networks += (guide,)
        model.evaluations = 2  # the refiner and the guide, in every step of sampling
        model.denoiser = lambda x_hat, z: guided_denoiser(
            denoiser(unet, x_hat, variant), denoiser(guide, x_hat, variant), settings["guidance"])
    return model


def draw_pretrained(args, settings, device):
    """--pretrained: draw samples.png with 36 samples of `guided`, from weights that come with the project."""
    path = PRETRAINED / args.dataset / "pretrained.pt"
    if not path.is_file():
        common.fail(f"--pretrained: no {path}; take another --dataset, or train")
    checkpoint = common.load_state(path)
    # To be small, the file has no encoder, which sampling does not use: an untrained one takes its place.
    checkpoint["vae"] = common.build_vae(checkpoint["settings"]).state_dict() | checkpoint["vae"]
    model = load_model(checkpoint, device)
    folder = Path(args.out) / f"{args.dataset}-pretrained"
    x_hat, images, _ = common.generate(model, settings | {"eval_samples": 36, "eval_batch": 36})
    common.draw_samples(folder, {"VAE": x_hat, "refined": images})
    print(folder / "samples.png")
    if settings["export"]:
        common.export(folder, model, settings)


# --- The command -----------------------------------------------------------------------------------------------------

def evaluate(folder, checkpoint, settings, scorer, device):
    """Measure the model of a checkpoint, and write pictures and metrics.json."""
    model = load_model(checkpoint, device)
    variant = checkpoint["variant"]
    tables = {}
    rows = fid.score(folder, model, settings, scorer)
    if model.vae is not None:
        tables["robustness"] = fid.robustness(folder, model, settings, scorer)
    if variant not in ("vae", "uncond"):
        tables["latent_space"] = fid.latent_space(folder, model, settings, scorer)
    fid.write_metrics(folder, checkpoint, model, settings, scorer, rows, tables)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Stage 1: DiffuseVAE on images")
    common.add_flags(parser)
    parser.add_argument("--variant", nargs="+", choices=(*BASE, "all"), default=["vae", "form1"],
                        help="what to train and score, with all that it builds on (default: vae form1)")
    parser.add_argument("--pretrained", action="store_true",
                        help="train nothing: draw samples of `guided`, from weights that come with the project")
    args = parser.parse_args(argv)
    settings, device = common.read_settings(args)
    if args.dry_run:
        return common.print_settings(settings, vae=common.build_vae(settings), unet=common.build_unet(settings, 6))
    if args.pretrained:
        return draw_pretrained(args, settings, device)
    wanted = set(BASE if "all" in args.variant else args.variant)
    for variant in reversed(BASE):  # so that the base of a base is added, too
        if variant in wanted:
            wanted.add(BASE[variant])

    scorer = fid.load_scorer(args, settings, device)
    checkpoints = {None: None}
    for variant in BASE:
        if variant not in wanted:
            continue
        folder = common.run_folder(settings, f"stage1-{variant}")
        base = checkpoints[BASE[variant]]
        checkpoint = common.finished(folder, settings, args.resume)
        if checkpoint is None and variant == "vae":
            checkpoint = train_vae(folder, settings, scorer.data, device)
        elif checkpoint is None:
            checkpoint = train_refiner(folder, settings, variant, base, scorer.data, device)
        checkpoints[variant] = checkpoint
        evaluate(folder, checkpoint, settings, scorer, device)
    fid.print_results(settings, scorer)


if __name__ == "__main__":
    main()
