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
                      and w_t lets all noise levels count alike (Diffusion.level_weight; as published it is 1).
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

Of common.py, read Diffusion, the VAE from BottleneckBlock to gaussian_kl, the U-Net from GroupNorm to UNet, section 4,
and the settings of shapes: DEFAULTS and SHAPES.

Run     python stage1_baseline.py                        vae and form1 on the built-in shapes, on a laptop
        python stage1_baseline.py --dataset cifar10      the same on real images (see README for where they come from)
        python stage1_baseline.py --variant guided       VAE, Formulation 1 and its guide
        python stage1_baseline.py --variant all
        python stage1_baseline.py --dataset cifar10 --pretrained     36 samples in half a minute; nothing is trained
Expect  of the first command: 4 to 6 minutes on two CPU cores, a table of scores, and pictures. In
        runs/shapes-cpu/stage1-form1-s0/samples.png, the images of the VAE are above and the refined ones below, in
        pairs of rows: the VAE's shapes have flat tones where the refiner's have spots. `hf_energy` is the amount of
        fine detail, relative to real images: about 0.3 before and 0.9 after refinement. `fd` is the Frechet
        distance to the real images in the features of a small network: less than half after refinement.
"""

import argparse
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import common
import fid
from common import randn, to_uint8

# The variants in the order in which they are trained, and what each builds on
BASE = {"vae": None, "uncond": None, "form1": "vae", "form2": "vae", "guided": "form1", "augmented": "vae"}
AUGMENTATION = 0.4  # largest sd of the noise that `augmented` adds to x_hat, whose pixels span -1 to 1
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
    """The diffusion process of a variant. Without an x_hat to begin with (`uncond`), it begins at T = 1000."""
    return common.Diffusion(settings["objective"], 1000 if variant == "uncond" else settings["start"], device)


def build_unet(settings, variant):
    """The U-Net of a variant. Its input has 3 channels for x_t and, except in `uncond`, 3 more for x_hat."""
    return common.build_unet(settings, 3 if variant == "uncond" else 6)


def unet_input(variant, x_t, x_hat):
    """What the U-Net is shown: x_t and x_hat (B, 3, H, W) -> (B, 6, H, W), or of `uncond` (B, 3, H, W).

    The paper describes Formulation 2 as a diffusion process of y_t = x_t + x_hat, which ends in noise around x_hat.
    That is the same, since y_t is x_t plus a known image: x0, eps and the target do not change."""
    if variant == "uncond":
        return x_t
    return torch.cat([x_t + x_hat if variant == "form2" else x_t, x_hat], 1)


# --- Training --------------------------------------------------------------------------------------------------------

def train_vae(folder, settings, data, device):
    """Train the VAE on the training images, then fit the Gaussian mixture to their codes. Returns the checkpoint, a
    dictionary of weights, settings and log."""
    torch.manual_seed(settings["seed"])
    vae = common.build_vae(settings).to(device, memory_format=torch.channels_last)
    optimizer = common.Optimizer(vae, settings, "vae")
    average = common.MovingAverage(vae, settings["vae_ema"])
    images = data.train.images.to(device)
    gen = common.generator(settings["seed"], f"training, process {common.RANK}", device)
    steps = settings["vae_steps"]
    progress = common.Progress(folder, settings, steps, gen, vae=vae, optimizer=optimizer, average=average)
    for step in progress:
        x0 = common.draw_batch(images, settings, gen, settings["vae_flip"])  # (B, 3, H, W) in [-1, 1]
        noise = randn((len(x0), vae.latent_dim), gen)  # (B, d)
        with common.autocast(device):
            loss, sse, kl = vae_loss(vae, x0, noise, settings["beta"])  # (B,)
        optimizer.zero_grad()
        loss.mean().backward()
        common.average_gradients(vae)
        nn.utils.clip_grad_norm_(vae.parameters(), settings["vae_clip"])
        optimizer.step(common.rate_factor(step, steps, settings))
        average.update(step)
        progress.log(sse=sse, kl_nats=kl)
    # What is kept is the moving average of the weights, so the mixture is fitted to its codes.
    vae = common.frozen(common.build_vae(settings), average.weights, device)
    return progress.finish(variant="vae", vae=average.weights,
                           gmm=common.fit_mixture(vae, data.train.images, settings, device))


def train_refiner(folder, settings, variant, base, data, device):
    """Train a refiner behind the frozen VAE of the checkpoint `base`. Returns its checkpoint, which contains the VAE as
    well. `uncond` has no base. Of `guided`, the base is that of form1, and what is trained is the guide."""
    torch.manual_seed(settings["seed"])
    unet = build_unet(settings, variant).to(device, memory_format=torch.channels_last)
    optimizer = common.Optimizer(unet, settings, "unet")
    average = common.MovingAverage(unet, settings["unet_ema"])
    diffusion = build_diffusion(settings, variant, device)
    if variant != "uncond":
        vae = common.frozen(common.build_vae(settings), base["vae"], device)
    images = data.train.images.to(device)
    gen = common.generator(settings["seed"], f"training, process {common.RANK}", device)
    steps = math.ceil(settings["unet_steps"] / 10) if variant == "guided" else settings["unet_steps"]
    progress = common.Progress(folder, settings, steps, gen, unet=unet, optimizer=optimizer, average=average)
    for step in progress:
        x0 = common.draw_batch(images, settings, gen, settings["unet_flip"])  # (B, 3, H, W) in [-1, 1]
        x_hat = None
        if variant != "uncond":  # as published, x_hat comes from a fresh sample of z in every step
            with torch.no_grad(), common.autocast(device):
                x_hat, _, _ = vae(x0, randn((len(x0), vae.latent_dim), gen))  # (B, 3, H, W)
        if variant == "augmented":  # each x_hat gets noise of a strength of its own
            sd = AUGMENTATION * torch.rand(len(x0), 1, 1, 1, generator=gen, device=device)
            x_hat = x_hat + sd * randn(x0.shape, gen)

        # One denoising problem for each image: its noise level t, the noisy image, the prediction, the error.
        t = diffusion.draw_t(len(x0), gen)  # (B,), in 1..start
        eps = randn(x0.shape, gen)
        x_t = diffusion.q_sample(x0, t, eps)  # (B, 3, H, W)
        with common.autocast(device):
            prediction = unet(unet_input(variant, x_t, x_hat), t)  # (B, 3, H, W)
        mse = (prediction - diffusion.target(x0, t, eps)).square().flatten(1).mean(1)  # (B,)
        loss = mse * diffusion.level_weight(t) if settings["even_levels"] else mse  # (DDPM eq. 14, if unweighted)
        optimizer.zero_grad()
        loss.mean().backward()
        common.average_gradients(unet)
        nn.utils.clip_grad_norm_(unet.parameters(), settings["unet_clip"])
        optimizer.step(common.rate_factor(step, steps, settings))
        average.update(step)
        progress.log(mse=mse)
    if variant == "uncond":
        return progress.finish(variant=variant, unet=average.weights)
    weights = {"unet": base["unet"], "guide": average.weights} if variant == "guided" else {"unet": average.weights}
    return progress.finish(base, variant=variant, vae=base["vae"], gmm=base["gmm"], **weights)


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(checkpoint, device):
    """The networks of a checkpoint, with its variant, its priors over z (`uncond` has none) and its diffusion."""
    settings = checkpoint["settings"]
    model = SimpleNamespace(variant=checkpoint["variant"], settings=settings, device=device, priors={}, networks=[])
    model.diffusion = build_diffusion(settings, model.variant, device)
    if model.variant != "uncond":
        model.vae, model.priors = common.load_vae(checkpoint, device)
        model.networks.append(model.vae)
    if model.variant != "vae":
        model.unet = common.frozen(build_unet(settings, model.variant), checkpoint["unet"], device)
        model.networks.append(model.unet)
    if model.variant == "guided":
        model.guide = common.frozen(build_unet(settings, model.variant), checkpoint["guide"], device)
        model.networks.append(model.guide)
    return model


def draw_codes(model, settings, count):
    """`count` codes from the prior of the settings, (count, d); of `uncond`, which has no codes, (count, 0)."""
    if model.variant == "uncond":
        return torch.zeros(count, 0)
    return model.priors[settings["prior"]].sample(count, common.generator(settings["seed"], "codes"))


@torch.no_grad()
def generate(model, settings, z, corrupt=None, trajectory=None):
    """Codes z (N, d) -> x_hat and the refined images, each uint8 (N, 3, H, W) on the CPU. (Of `vae` they are the same.
    The x_hat of `uncond` is grey.) `corrupt`, a function, spoils x_hat before it is refined. A list `trajectory` gets
    (t, x_t, x0) of each step. Noise is drawn on the CPU, so that it is the same on every device.

    `guided` is autoguidance (Karras et al. 2024, arXiv:2406.02507); `guidance` is the paper's w - 1. (The paper guides
    the predicted image. We guide v or eps, which is the same, since at a given x_t both are linear functions of it.)"""
    diffusion, size = model.diffusion, model.settings["image_size"]
    times = [] if model.variant == "vae" else diffusion.times(settings)  # falling from start to 0
    before, after = [], []
    for first in common.bar(range(0, len(z), settings["eval_batch"]), desc="sampling"):
        codes = z[first : first + settings["eval_batch"]].to(model.device)  # (B, d)
        gen = common.generator(settings["seed"], f"noise {first}")
        with common.autocast(model.device):
            grey = torch.zeros(len(codes), 3, size, size, device=model.device)
            x_hat = grey if model.variant == "uncond" else model.vae.decoder(codes)
            x = x_hat = corrupt(x_hat) if corrupt else x_hat
            if times:
                x = diffusion.x_start(x_hat, randn(x_hat.shape, gen).to(model.device), settings["temperature"])
            x0 = None
            for i in range(len(times) - 1):
                t = torch.full((len(x),), times[i], device=model.device)  # (B,)
                shown = unet_input(model.variant, x, x_hat)
                prediction = model.unet(shown, t)
                if model.variant == "guided":
                    prediction = prediction + model.settings["guidance"] * (prediction - model.guide(shown, t))
                x0_before, x0 = x0, diffusion.to_x0(prediction, x, t)
                if trajectory is not None:
                    trajectory.append((times[i], x, x0))
                x = diffusion.step(settings["sampler"], x, x0, times, i, x0_before, gen)
        before.append(to_uint8(x_hat).cpu())
        after.append(to_uint8(x).cpu())
    return torch.cat(before), torch.cat(after)


# --- What is measured ------------------------------------------------------------------------------------------------

def evaluate(folder, checkpoint, settings, scorer, device):
    """Write metrics.json and pictures of a finished model. Rows: the samples of the settings (the headline); of other
    priors; of other samplers and steps; and the headline's x_hat before refinement."""
    model = load_model(checkpoint, device)
    refines = model.variant != "vae"
    rows, pictures = [], {}
    for label, changed, count in common.what_to_sample(settings, model.priors, refines):
        z = draw_codes(model, changed, count)
        clock = time.time()
        x_hat, images = generate(model, changed, z)
        seconds = (time.time() - clock) / count
        steps = len(model.diffusion.times(changed)) - 1 if refines else 0
        rows.append(scorer(images, label=label, prior=changed["prior"] if model.priors else "none",
                           sampler=changed["sampler"] if refines else "none", steps=steps,
                           nfe=steps * (2 if model.variant == "guided" else 1),  # evaluations of a U-Net
                           seconds_per_image=seconds))
        pictures[label] = x_hat, images
    x_hat, images = pictures[""]
    if model.variant not in ("vae", "uncond"):
        rows.append(scorer(x_hat, label="before", prior=settings["prior"], sampler="none", steps=0, nfe=0))
        common.draw_samples(folder, {"VAE": x_hat, "refined": images})
        draw_trajectory(folder, model, settings)
    else:
        common.draw_samples(folder, {"": images})
    common.write_metrics(folder, checkpoint, settings, scorer, rows, model.networks)
    if settings["export"]:
        common.export(folder, images)


def draw_trajectory(folder, model, settings):
    """trajectory.png: how refinement goes from x_hat and noise to the image, for four codes. Two rows for each code:
    the noisy image x_t, and the clean image that the network predicts from it."""
    trajectory = []
    settings = settings | common.sampling_settings("dpm", 5)
    x_hat, images = generate(model, settings, draw_codes(model, settings, 4), trajectory=trajectory)
    columns = ["x_hat", *(f"t = {t}" for t, _, _ in trajectory), "image"]
    rows = {}
    for k in range(4):
        for label, place in (("x_t", 1), ("x0", 2)):
            between = [to_uint8(step[place][k]).cpu() for step in trajectory]
            rows[f"{k + 1} {label}"] = torch.stack([x_hat[k], *between, images[k]])
    common.save_grid(folder / "trajectory.png", rows, columns)


def load_pretrained(dataset, device):
    """The model of `guided` whose weights come with the project."""
    path = PRETRAINED / dataset / "pretrained.pt"
    if not path.is_file():
        common.fail(f"--pretrained: no {path}; take another --dataset, or train")
    checkpoint = common.load_state(path)
    # To be small, the file has no encoder, which sampling does not use: an untrained one takes its place.
    checkpoint["vae"] = common.build_vae(checkpoint["settings"]).state_dict() | checkpoint["vae"]
    return load_model(checkpoint, device)


def draw_pretrained(args, settings, device):
    """--pretrained: draw samples.png with 36 samples."""
    model = load_pretrained(args.dataset, device)
    folder = Path(args.out) / f"{args.dataset}-pretrained"
    count = settings["eval_samples"] if settings["export"] else 36
    x_hat, images = generate(model, settings, draw_codes(model, settings, count))
    common.draw_samples(folder, {"VAE": x_hat, "refined": images})
    print(folder / "samples.png")
    if settings["export"]:
        common.export(folder, images)


# --- The command -----------------------------------------------------------------------------------------------------

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
        return common.print_settings(settings, **common.vae_and_unet(settings, build_unet(settings, "form1")))
    if args.pretrained:
        return draw_pretrained(args, settings, device)
    wanted = set(BASE if "all" in args.variant else args.variant)
    for variant in reversed(BASE):  # so that the base of a base is added, too
        if variant in wanted:
            wanted.add(BASE[variant])

    extractor = fid.load_extractor(settings["features"], args.weights, device)
    data = common.load_data(args.dataset, args.data_dir)
    settings["images"] = common.hash_images(data.train.images)
    checkpoints = {}
    for variant, base in BASE.items():
        if variant not in wanted:
            continue
        folder = common.run_folder(settings, f"stage1-{variant}")
        checkpoint = common.finished(folder, settings, args.resume)
        if checkpoint is None and variant == "vae":
            checkpoint = train_vae(folder, settings, data, device)
        elif checkpoint is None:
            checkpoint = train_refiner(folder, settings, variant, checkpoints.get(base), data, device)
        checkpoints[variant] = checkpoint
    if common.RANK > 0:
        return
    scorer = fid.Scorer(extractor, data)
    for variant, checkpoint in checkpoints.items():
        evaluate(common.run_folder(settings, f"stage1-{variant}"), checkpoint, settings, scorer, device)
    common.print_results(settings, scorer)


if __name__ == "__main__":
    main()
