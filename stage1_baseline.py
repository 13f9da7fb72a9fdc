"""Stage 1: DiffuseVAE, the two-stage baseline (Pandey et al. 2022, arXiv:2201.00308).

The claim: a VAE is quick and gives a compact latent but blurs; a diffusion model is sharp but knows no latent. Put
one behind the other, and the VAE decides *what* is in the image while the diffusion model decides *how it looks*.

    1. VAE            x_hat = Dec(z), z ~ q(z|x);   loss = SSE(x, x_hat) + beta KL(q(z|x) || N(0, I)); beta is 1
                      as published. With less the code holds more, and the prior has more to draw (3)
    2. Refiner        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps;   loss = MSE(target, U-Net(x_t, x_hat, t)); the
                      target is eps as published, v by default (common.Diffusion)
       Formulation 1  the plain DDPM process; x_hat is concatenated to the U-Net's input
       Formulation 2  x_t is moved by x_hat as well: N(sqrt(abar_t) x0 + x_hat, 1 - abar_t). With y_t = x_t - x_hat
                      that is the plain process again, so the two differ in one line: what the U-Net is shown.
                      It ends at y_0 = x0: nothing is added back.
    3. Sampling       z ~ prior, x_hat = Dec(z), then the reverse process. The prior is N(0, I) or a Gaussian mixture
                      fitted to the training latents afterwards (ex post), since q(z) is never quite N(0, I). A code
                      of many nats needs many components.
    4. Where to begin As published, at pure noise, x_T ~ N(0, I) (Formulation 2: y_T). But x_hat tells what x0 is about,
                      up to a residual of standard deviation r: at t0, where the noise over the signal is 10 to 20 r
                      (6 at least, common.check_start), x_t0 = sqrt(abar) x_hat + sqrt(1 - abar) eps is near the true
                      one (common.kl_prior: how near). Begin there (`start`), train on 1..t0 alone, and half the
                      sampling steps do. A better VAE needs less refinement: a smaller t0.
    5. Guidance       The same U-Net trained for a tenth of the steps, the guide, makes the refiner's errors too, only
                      larger ones. So the way from its prediction to the refiner's leads away from them; `guided` goes
                      on in that direction, half as far again. Each step evaluates both.

Run     python stage1_baseline.py                        VAE and Formulation 1 on the built-in shapes, on a laptop
        python stage1_baseline.py --dataset cifar10      the same on real images (see README for where they come from)
        python stage1_baseline.py --variant guided       Formulation 1, and guided
        python stage1_baseline.py --variant all          with Formulation 2 and a control (`uncond`): no VAE, from noise
        python stage1_baseline.py --dataset cifar10 --pretrained     in half a minute: nothing is trained
Expect  5 minutes on two slow CPU cores with bfloat16, then pictures (samples.png: VAE above, refined below)
        and a table. The VAE's samples are blurred (hf_energy about 0.2, where real images have 1), the refined ones
        show edges and bands (about 0.5), and their distance to the real images is about a third smaller.
"""

import argparse
import math
from pathlib import Path

import torch

import common
import fid

CHANNELS = {"vae": None, "uncond": 3, "form1": 6, "form2": 6, "guided": 6}  # that the U-Net sees: x_t's, x_hat's
GUIDANCE = 0.5  # how far beyond the refiner's prediction `guided` goes, in distances from the guide's
PRETRAINED = Path(__file__).resolve().parent / "results"  # DATASET/{form1,guide}-<hash8>.pt, kept by final_evaluation

# --- The model and its losses ----------------------------------------------------------------------------------------

def vae_loss(vae, x0, noise, beta):
    """DiffuseVAE's loss: with beta = 1 the negative ELBO, up to a constant, of a Gaussian decoder of variance 1/2 in
    [0, 1] units. x0 (B, 3, H, W), noise (B, d) -> loss, sse, kl_nats, each (B,)."""
    x_hat, mu, logvar = vae(x0, noise)
    sse, kl = common.squared_error(x_hat, x0), common.gaussian_kl(mu, logvar)
    return sse + beta * kl, sse, kl


def build_diffusion(train, variant, device):
    """The process, from where refinement begins; without an x_hat to refine it begins at T."""
    return common.Diffusion(train["objective"], device=device, start=None if variant == "uncond" else train["start"])


def condition(unet, x_hat, variant):
    """`denoise(y, t) -> prediction` of one batch, with x_hat (B, 3, H, W) fixed.

    In Formulation 2 the process runs in y = x_t - x_hat and the U-Net sees x_t = y + x_hat: the only difference.
    """
    if variant == "uncond":
        return unet

    def denoise(y, t):
        xt = y + x_hat if variant == "form2" else y
        return unet(torch.cat([xt, x_hat], 1), t)

    return denoise


def guided(denoise, worse):
    """Autoguidance (Karras et al. 2024, arXiv:2406.02507): p + GUIDANCE (p - g) for the predictions p of `denoise` and
    g of `worse`, a guide of the same kind. The paper writes w p + (1 - w) g, w = 1 + GUIDANCE, of denoised images; at a
    given x_t these, eps and v are affine functions of one another."""

    def led(xt, t):
        prediction = denoise(xt, t)
        return prediction + GUIDANCE * (prediction - worse(xt, t))

    return led


# --- Training --------------------------------------------------------------------------------------------------------

def train_vae(folder, train, data, device, state):
    """Train the VAE and fit the Gaussian mixture to its training latents; returns the checkpoint."""
    torch.manual_seed(train["seed"])
    vae = common.build_vae(train)
    training = common.Training(folder, state, train, device, data.images, train["flip"] == "both", vae=vae)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        z_noise = training.draw(torch.randn, vae.latent_dim)  # (B, d)
        with common.autocast(device):
            loss, sse, kl = vae_loss(vae, x0, z_noise, train["beta"])
        training.step(loss, {"sse": sse, "kl_nats": kl})
    vae = common.frozen(common.build_vae(train), training.averages["vae"], device)  # averaged weights: what is kept
    return training.finish(gmm=common.fit_mixture(vae, data.images, train, device))


def train_refiner(folder, train, variant, vae_state, data, device, state):
    """Train a refiner (or the unconditional control) with the VAE frozen; returns the checkpoint."""
    torch.manual_seed(train["seed"])
    unet = common.build_unet(train, CHANNELS[variant])
    diffusion = build_diffusion(train, variant, device)
    vae = common.frozen(common.build_vae(train), vae_state["vae"], device) if variant != "uncond" else None
    training = common.Training(folder, state, train, device, data.images, train["flip"] != "none", unet=unet)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        z_noise = training.draw(torch.randn, vae.latent_dim) if vae else None  # (B, d)
        t = diffusion.draw_t(training.draw(torch.rand))  # (B,), in 1..start
        eps = training.draw(torch.randn, *x0.shape[1:])  # (B, 3, H, W)
        with common.autocast(device):
            with torch.no_grad():  # the VAE is frozen; a fresh posterior sample each step, as published
                x_hat = vae(x0, z_noise)[0] if vae else None
            loss = diffusion.simple_loss(condition(unet, x_hat, variant), x0, t, eps)  # (B,)
        training.step(loss, {f"{train['objective']}_mse": loss})
    parts = {} if variant == "uncond" else {"vae": vae_state["vae"], "gmm": vae_state["gmm"]}
    return training.finish(**parts)


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(state, variant, device):
    """Rebuild the common.Model of a variant from its checkpoint; that of guided is form1's with the guide's weights."""
    train, size = state["train"], state["train"]["image_size"]
    model = common.Model(variant, device, (3, size, size), build_diffusion(train, variant, device))
    if variant != "uncond":
        model.vae = common.frozen(common.build_vae(train), state["vae"], device)
        model.priors = {"gaussian": common.StandardNormal(model.vae.latent_dim),
                        "gmm": common.GaussianMixture(**state["gmm"])}
    if variant != "vae":
        unet = common.frozen(common.build_unet(train, CHANNELS[variant]), state["unet"], device)
        model.condition = lambda x_hat, z: condition(unet, x_hat, variant)
    if variant == "guided":
        guide = common.frozen(common.build_unet(train, CHANNELS[variant]), state["guide"], device)
        model.condition = lambda x_hat, z: guided(condition(unet, x_hat, variant), condition(guide, x_hat, variant))
    return model


def with_guide(form1, guide):
    """The checkpoint of `guided` from those of form1 and of what was trained as its guide."""
    return form1 | {"guide": guide["unet"], "seconds": form1["seconds"] + guide["seconds"]}


def draw_pretrained(args, evaluation, device):
    """--pretrained: guided samples of weights that come with the project. They draw and no more: the encoder is left
    out, matrices are in half precision. Exports args.export images, and draws samples.png."""
    home, advice = PRETRAINED / args.dataset, "take another --dataset, or train: leave --pretrained out"

    def kept(name):
        return fid.load_hashed(fid.find_hashed(home, name), f"--pretrained, {home}/{name}-<hash8>.pt", advice)

    state = with_guide(kept("form1"), kept("guide"))
    state["vae"] = common.build_vae(state["train"]).state_dict() | state["vae"]  # an encoder that nothing uses
    folder, size = Path(args.out) / f"{args.dataset}-pretrained", state["train"]["image_size"]
    common.export(args, folder, state, load_model(state, "guided", device), evaluation)

    def read(place):  # (N, 3, H, W)
        files = [folder / place / f"{k:05}.png" for k in range(min(36, args.export))]
        return torch.stack([torch.tensor(common.decode_file(file, size, "none")).permute(2, 0, 1) for file in files])

    common.draw_samples(folder, {"VAE": read("samples-vae"), "refined": read("samples")})
    print(folder / "samples.png")


# --- The command -----------------------------------------------------------------------------------------------------

def network_cost(train, variant):
    """common.network_cost of the networks that a variant uses."""
    cost = common.network_cost(train, variant != "uncond", CHANNELS[variant])
    return cost | {"guide": cost["unet"]} if variant == "guided" else cost


def main(argv=None):
    parser = argparse.ArgumentParser(description="Stage 1: DiffuseVAE on images")
    common.add_flags(parser, "gaussian", "gmm")
    parser.add_argument("--variant", nargs="+", choices=(*CHANNELS, "all"), default=["vae", "form1"],
                        help="to train and evaluate, with what they build on, VAE or form1 (default: vae form1)")
    parser.add_argument("--pretrained", action="store_true",
                        help="train and score nothing: guided samples of weights that come with the project")
    args = parser.parse_args(argv)
    if args.pretrained:
        for flag in ("variant", "budget", "steps", "batch_size", "eval_samples", "features", "weights", "compile"):
            if vars(args)[flag] != parser.get_default(flag):
                common.fail(f"--{flag.replace('_', '-')}: --pretrained draws samples of guided, cpu budget, and trains "
                            "and scores nothing; leave it out")
        args.variant, args.budget, args.export = ["guided"], "cpu", 64 if args.export is None else args.export
    if "guided" in args.variant:
        args.variant.append("form1")  # what it guides
    args.variant = [name for name in CHANNELS if name in args.variant or "all" in args.variant]  # in order
    train, evaluation, device = common.read_settings(args)
    if args.dry_run:
        networks = {name: cost for variant in args.variant for name, cost in network_cost(train, variant).items()}
        return common.print_settings(train, evaluation, networks)
    if args.pretrained:
        common.keep_freed_memory()
        return draw_pretrained(args, evaluation, common.join_ranks(device, train["batch"]))
    setup = common.Setup(args, train, evaluation, device)
    train, data, device = setup.train, setup.data, setup.device
    vae_state, measured = None, {}
    if args.variant != ["uncond"]:
        folder = setup.home / f"stage1-vae-s{args.seed}"
        vae_state = common.trained(folder, train, args.resume,
                                   lambda state: train_vae(folder, train, data, device, state))
    for variant in args.variant:
        folder = setup.home / f"stage1-{variant}-s{args.seed}"
        state, settings = vae_state, train
        if variant == "guided":  # what is trained in this folder is its guide
            settings = train | {"steps": math.ceil(train["steps"] / 10), "guidance": GUIDANCE}
        if variant != "vae":
            state = common.trained(folder, settings, args.resume, lambda state: train_refiner(
                folder, settings, variant, vae_state, data, device, state))  # noqa: B023 - called at once
        if variant == "form1":
            form1 = state
        elif variant == "guided":
            state = with_guide(form1, state) | {"log": state["log"]}
        model = load_model(state, variant, device)
        measured[folder] = common.evaluate(folder, setup, state, model, network_cost(train, variant))
        common.export(args, folder, state, model, setup.evaluation)
    common.print_results(measured, setup)


if __name__ == "__main__":
    main()
