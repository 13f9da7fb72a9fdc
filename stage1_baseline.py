"""Stage 1: DiffuseVAE, the two-stage baseline (Pandey et al. 2022, arXiv:2201.00308).

The claim: a VAE is quick and gives a compact latent but blurs; a diffusion model is sharp but knows no latent. Put
one behind the other, and the VAE decides *what* is in the image while the diffusion model decides *how it looks*.

    1. VAE            x_hat = Dec(z), z ~ q(z|x);   loss = SSE(x, x_hat) + beta KL(q(z|x) || N(0, I))
    2. Refiner        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps;   loss = MSE(target, U-Net(x_t, x_hat, t))
       Formulation 1  the plain DDPM process; x_hat is concatenated to the U-Net's input
       Formulation 2  x_t is moved by x_hat as well: N(sqrt(abar_t) x0 + x_hat, 1 - abar_t). With y_t = x_t - x_hat
                      that is the plain process again, so the two differ in one line: what the U-Net is shown.
       On real images at the cpu budget the U-Net predicts only what a guess from x_hat leaves open (Diffusion.guess).
    3. Sampling       z ~ prior, x_hat = Dec(z), x_T ~ N(0, I), refine. The prior is N(0, I) or a Gaussian mixture
                      fitted to the training latents afterwards (ex post), since q(z) is never quite N(0, I).

Run     python stage1_baseline.py                        VAE and Formulation 1 on the built-in shapes, on a laptop
        python stage1_baseline.py --dataset cifar10      the same on real images (see README for where they come from)
        python stage1_baseline.py --variant all          with Formulation 2 and the control without a VAE (`uncond`)
Expect  4 minutes on two CPU cores (three times that on slow ones), then pictures (samples.png: VAE above, refined
        below) and a table. The VAE's samples are blurred (hf_energy about 0.35), the refined ones show edges and bands
        (about 0.7, where real images have 1), and their distance to the real images is a third of the VAE's.
"""

import argparse
import json
import sys
import time
from types import SimpleNamespace

import torch
from tqdm import tqdm

import common
from common import to_float

VARIANTS = ("vae", "uncond", "form1", "form2")


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description="Stage 1: DiffuseVAE on images")
    common.add_flags(parser)
    parser.add_argument("--variant", nargs="+", choices=(*VARIANTS, "all"), default=["vae", "form1"],
                        help="what to train and evaluate; refiners train the VAE they need")
    parser.add_argument("--prior", choices=("gaussian", "gmm"), default="gmm", help="prior over z of the headline row")
    args = parser.parse_args(argv)
    args.variant = list(VARIANTS) if "all" in args.variant else args.variant
    return args


# --- The model and its losses ----------------------------------------------------------------------------------------


def build_unet(train, variant):
    return common.build_unet(train, 3 if variant == "uncond" else 6)


def build_diffusion(train, variant, device):
    return common.Diffusion(train["objective"], device=device,
                            residual_sd=0.0 if variant == "uncond" else train["residual_sd"])


def network_cost(train, variant):
    return common.network_cost(train, variant != "uncond", {"vae": None, "uncond": 3}.get(variant, 6))


def vae_loss(vae, x0, noise, beta):
    """Negative ELBO up to a constant, with a Gaussian decoder of variance 1/2 in [0, 1] units (DiffuseVAE's loss).
    x0 (B, 3, H, W), noise (B, d) -> loss, sse, kl_nats, each (B,)."""
    x_hat, mu, logvar = vae(x0, noise)
    sse = ((x_hat - x0) ** 2).flatten(1).sum(1) / 4  # (B,), in [0, 1] units: DiffuseVAE trains on images in [0, 1]
    kl = common.gaussian_kl(mu, logvar)
    return sse + beta * kl, sse, kl


def condition(unet, x_hat, variant, diffusion):
    """The denoiser of one batch, `denoise(y, t) -> output`, with x_hat (B, 3, H, W) fixed.

    In Formulation 2 the process runs in y = x_t - x_hat and the U-Net sees x_t = y + x_hat: the only difference.
    """
    if variant == "uncond":
        return unet

    def denoise(y, t):
        xt = y if variant == "form1" else y + x_hat
        return diffusion.complete(unet(torch.cat([xt, x_hat], 1), t), y, x_hat, t)

    return denoise


# --- Training --------------------------------------------------------------------------------------------------------


def fit(folder, state, train, network, loss, images, flip, lr, clip, ema_decay, device, carried):
    """Train one network and return its finished checkpoint. `loss(x0, gen) -> (loss (B,), {name: (B,)})`.

    `state` is None or a checkpoint to continue from; `carried` goes into every checkpoint as it is.
    """
    gen = common.generator(train["seed"] + 1, device)
    network.to(device, memory_format=torch.channels_last).train()
    common.compile_networks(network, train)
    ema = common.EMA(network, ema_decay)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=device.type in ("cpu", "cuda"))
    step, seconds, sums, every = 0, 0.0, {}, min(train["every"], train["steps"])
    if state:
        step, seconds, sums = common.resume_training(state, network, ema, optimizer, gen, device)
    common.start_log(folder / "log.csv", step)
    started, saved = time.time() - seconds, time.time()

    def checkpoint(step):
        if not all(map(torch.isfinite, sums.values())):
            return  # keep the last good one; the next row of the log stops the run
        state = common.training_state(train, step, network, ema, optimizer, gen, time.time() - started, sums)
        common.save_checkpoint(folder / "checkpoint.pt", state | carried)

    with common.StopRequest() as stop, tqdm(total=train["steps"], initial=step, desc=folder.name, unit="step") as bar:
        while step < train["steps"]:
            for group in optimizer.param_groups:
                group["lr"] = common.learning_rate(lr, step, train["steps"], train["warmup"], train["decay"])
            index = torch.randint(len(images), (train["batch"],), generator=gen, device=device)
            x0 = to_float(images[index]).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
            if flip:
                mirrored = torch.rand(len(x0), generator=gen, device=device) < 0.5
                x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
            with common.autocast(device):
                per_image, terms = loss(x0, gen)
            optimizer.zero_grad(set_to_none=True)
            per_image.mean().backward()
            common.average_gradients(network)
            if clip:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            ema.update(network)
            step += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach().mean()
            if step % every == 0:
                common.log_means(folder, step, sums, every, bar)
                sums = {}
            bar.update()
            if stop.signal or time.time() - saved > 60:
                checkpoint(step)
                saved = time.time()
            if stop.signal:
                print(f"\nstopped at step {step}; continue with --resume", file=sys.stderr)
                raise SystemExit(128 + stop.signal)
    checkpoint(step)
    common.wait_for_ranks()
    return common.load_checkpoint(folder / "checkpoint.pt")


def train_vae(folder, train, data, device, resume):
    """Train the VAE and fit the Gaussian mixture to its training latents; returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if not state or not state["finished"]:
        torch.manual_seed(train["seed"])
        vae = common.build_vae(train)

        def loss(x0, gen):
            x0, noise = common.share(x0, common.randn((len(x0), vae.latent_dim), gen))
            total, sse, kl = vae_loss(vae, x0, noise, train["beta"])
            return total, {"sse": sse, "kl_nats": kl}

        state = fit(folder, state, train, vae, loss, data.images.to(device), train["flip"] == "both",
                    train["vae_lr"], train["vae_clip"], train["vae_ema"], device, {})
    if "gmm" not in state:
        vae = common.restore(common.build_vae(train), state["ema"], device)
        state["gmm"] = common.fit_mixture(vae, data.images, train, device)
        common.save_checkpoint(folder / "checkpoint.pt", state)
    return state


def train_refiner(folder, variant, train, vae_state, data, device, resume):
    """Train a refiner (or the unconditional control) with the VAE frozen; returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if state and state["finished"]:
        return state
    torch.manual_seed(train["seed"])
    unet = build_unet(train, variant)
    diffusion = build_diffusion(train, variant, device)
    carried, vae = {}, None
    if variant != "uncond":
        vae = common.restore(common.build_vae(train), vae_state["ema"], device)
        carried = {"vae": vae_state["ema"], "gmm": vae_state["gmm"]}

    def loss(x0, gen):
        z_noise = common.randn((len(x0), vae.latent_dim), gen) if vae else x0
        t = diffusion.draw_t(len(x0), train["t_power"], gen)  # (B,), in 1..T
        x0, z_noise, t, eps = common.share(x0, z_noise, t, common.randn(x0.shape, gen))
        with torch.no_grad():  # the VAE is frozen; a fresh posterior sample each step, as published
            x_hat = vae(x0, z_noise)[0] if vae else None
        mse = diffusion.simple_loss(condition(unet, x_hat, variant, diffusion), x0, t, eps)
        return mse, {f"{train['objective']}_mse": mse}

    return fit(folder, state, train, unet, loss, data.images.to(device), train["flip"] != "none", train["unet_lr"],
               train["unet_clip"], train["unet_ema"], device, carried)


# --- Sampling and evaluation -----------------------------------------------------------------------------------------


def load_model(state, variant, device):
    """Rebuild a model (see common.py, section 9) from its checkpoint alone."""
    train = state["train"]
    model = SimpleNamespace(name=variant, vae=None, unet=None, denoiser=None, priors={}, device=device, temperature=1.0,
                            size=train["image_size"],
                            diffusion=build_diffusion(train, variant, device))
    if variant != "uncond":
        weights = state["ema"] if variant == "vae" else state["vae"]
        model.vae = common.restore(common.build_vae(train), weights, device)
        model.priors = {"gaussian": common.StandardNormal(model.vae.latent_dim),
                        "gmm": common.GaussianMixture(**state["gmm"])}
    if variant != "vae":
        model.unet = common.restore(build_unet(train, variant), state["ema"], device)
        model.denoiser = lambda x_hat, z: condition(model.unet, x_hat, variant, model.diffusion)
    return model


def draw_spacing(path, sd=0.05):
    """With the exact denoiser of fine detail, x0 ~ N(0, sd^2), each sampler is a number: how much of the detail's
    energy survives n steps? The uniform grid spends its steps where only coarse structure is decided."""
    diffusion, counts, lines = common.Diffusion("eps"), [5, 10, 25, 50, 100, 250, 1000], {}

    def denoise(x, t):  # E[eps | x_t] for Gaussian data
        a, s = diffusion.factors(t)
        return s / (a**2 * sd**2 + s**2) * x

    for sampler in ("ddim", "dpm"):
        for spacing in ("uniform", "quadratic"):
            ends = [common.sample(diffusion, denoise, torch.ones(1, 1, 1, 1), sampler, n, clamp=False, spacing=spacing)
                    for n in counts]  # x_T = 1 is one standard deviation; the map is linear
            lines[f"{sampler}, {spacing}"] = counts, [float(x) ** 2 / sd**2 for x in ends]
    common.save_chart(path, [{"title": "energy of fine detail kept, exact denoiser", "x": "steps", "y": "kept / true",
                              "lines": lines, "log": "log", "level": {"exact": 1.0}}])
    return lines


def main(argv=None):
    args = parse_flags(argv)
    train, evaluation, device = common.read_settings(args)
    evaluation["prior"] = args.prior
    if args.dry_run:
        networks = network_cost(train, next((v for v in args.variant if v in ("form1", "form2")), "form1"))
        print(json.dumps({"settings": {"train": train, "eval": evaluation}, "networks": networks}, indent=1))
        return
    home, extractor, data, test = common.prepare(args, train, evaluation, device)
    reference, finished, vae_state = None, {}, None
    if args.variant != ["uncond"]:
        vae_state = train_vae(home / f"stage1-vae-s{args.seed}", train, data, device, args.resume)
    for variant in args.variant:
        folder = home / f"stage1-{variant}-s{args.seed}"
        state = (vae_state if variant == "vae" else
                 train_refiner(folder, variant, train, vae_state, data, device, args.resume))
        finished[folder] = common.read_metrics(folder / "metrics.json", evaluation)
        if finished[folder] is None:
            reference = reference or common.reference(args, extractor, data, test)
            facts = common.run_facts(train, evaluation, data, device, f"stage1-{variant}")
            finished[folder] = common.evaluate(folder, load_model(state, variant, device), state, evaluation, test,
                                               extractor, reference, facts, network_cost(train, variant))
            if variant != "vae":
                finished[folder]["tables"]["spacing"] = draw_spacing(folder / "spacing.png")
            common.write_metrics(folder / "metrics.json", finished[folder])
    common.print_results(finished, data, extractor)


if __name__ == "__main__":
    main()
