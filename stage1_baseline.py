"""Stage 1: DiffuseVAE, the two-stage baseline (Pandey et al. 2022, arXiv:2201.00308).

The claim: a VAE is quick and gives a compact latent but blurs; a diffusion model is sharp but knows no latent. Put
one behind the other, and the VAE decides *what* is in the image while the diffusion model decides *how it looks*.

    1. VAE            x_hat = Dec(z), z ~ q(z|x);   loss = SSE(x, x_hat) + beta KL(q(z|x) || N(0, I))
    2. Refiner        x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps;   loss = MSE(target, U-Net(x_t, x_hat, t))
       Formulation 1  the plain DDPM process; x_hat is concatenated to the U-Net's input
       Formulation 2  x_t is moved by x_hat as well: N(sqrt(abar_t) x0 + x_hat, 1 - abar_t). With y_t = x_t - x_hat
                      that is the plain process again, so the two differ in one line: what the U-Net is shown.
    3. Sampling       z ~ prior, x_hat = Dec(z), x_T ~ N(0, I), refine. The prior is N(0, I) or a Gaussian mixture
                      fitted to the training latents afterwards (ex post), since q(z) is never quite N(0, I).

Run     python stage1_baseline.py                        VAE and Formulation 1 on the built-in shapes, on a laptop
        python stage1_baseline.py --dataset cifar10      the same on real images (see README for where they come from)
        python stage1_baseline.py --variant all          with Formulation 2 and the control without a VAE (`uncond`)
Expect  10 to 15 minutes on two CPU cores, then pictures (samples.png: VAE above, refined below) and a table. The
        VAE's samples are blurred (hf_energy about 0.3), the refined ones show edges and bands (0.7 and more, where
        real images have 1), and their distance to the real images is less than a third of the VAE's.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import common
import fid
from common import to_float, to_uint8

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


def build_vae(train):
    return common.VAE(train["encoder"], train["decoder"], train["pool"])


def build_unet(train, variant):
    channels = 3 if variant == "uncond" else 6
    return common.UNet(train["unet"], channels, attention=train["attention"], heads=train["heads"],
                       dropout=train["dropout"])


def vae_loss(vae, x0, noise, beta):
    """Negative ELBO up to a constant, with a Gaussian decoder of variance 1/2 in [0, 1] units (DiffuseVAE's loss).
    x0 (B, 3, H, W), noise (B, d) -> loss, sse, kl_nats, each (B,)."""
    x_hat, mu, logvar = vae(x0, noise)
    sse = ((x_hat - x0) ** 2).flatten(1).sum(1) / 4  # (B,), in [0, 1] units: DiffuseVAE trains on images in [0, 1]
    kl = common.gaussian_kl(mu, logvar)
    return sse + beta * kl, sse, kl


def condition(unet, x_hat, variant):
    """The denoiser of one batch, `denoise(y, t) -> output`, with x_hat (B, 3, H, W) fixed.

    In Formulation 2 the process runs in y = x_t - x_hat and the U-Net sees x_t = y + x_hat: the only difference.
    """
    if variant == "uncond":
        return unet
    if variant == "form1":
        return lambda y, t: unet(torch.cat([y, x_hat], 1), t)
    return lambda y, t: unet(torch.cat([y + x_hat, x_hat], 1), t)


def refiner_loss(diffusion, denoise, x0, t, eps):
    """The simple loss (DDPM eq. 14): mean squared error of the prediction at x_t, shape (B,), mean over dimensions."""
    xt = diffusion.q_sample(x0, t, eps)
    return ((denoise(xt, t) - diffusion.target(x0, t, eps)) ** 2).flatten(1).mean(1)


# --- Training --------------------------------------------------------------------------------------------------------


def fit(folder, state, train, network, loss, images, flip, lr, clip, ema_decay, device, carried):
    """Train one network and return its finished checkpoint. `loss(x0, gen) -> (loss (B,), {name: (B,)})`.

    `state` is None or a checkpoint to continue from; `carried` goes into every checkpoint as it is.
    """
    gen = common.generator(train["seed"] + 1, device)
    network.to(device, memory_format=torch.channels_last).train()
    ema = common.EMA(network, ema_decay)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=device.type in ("cpu", "cuda"))
    step, seconds, sums, every = 0, 0.0, {}, min(train["every"], train["steps"])
    if state:
        network.load_state_dict(state["weights"])
        ema.weights = {name: tensor.to(device) for name, tensor in state["ema"].items()}
        ema.updates = step = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        gen.set_state(state["generator"])
        torch.set_rng_state(state["global_rng"])
        seconds, sums = state["seconds"], {name: value.to(device) for name, value in state["sums"].items()}
    common.start_log(folder / "log.csv", step)
    started, saved = time.time() - seconds, time.time()

    def checkpoint(step):
        if not all(map(torch.isfinite, sums.values())):
            return  # keep the last good one; the next row of the log stops the run
        state = {"train": train, "step": step, "finished": step == train["steps"], "weights": network.state_dict(),
                 "ema": ema.weights, "optimizer": optimizer.state_dict(), "generator": gen.get_state(),
                 "global_rng": torch.get_rng_state(), "seconds": time.time() - started, "sums": sums, **carried}
        common.save_checkpoint(folder / "checkpoint.pt", state)

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
            if clip:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            ema.update(network)
            step += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach().mean()
            if step % every == 0:
                means = {name: float(value) / every for name, value in sums.items()}
                if not all(map(torch.isfinite, sums.values())):
                    common.fail(f"{folder.name}: {means} at step {step} is not finite; restart with a lower rate or "
                                f"look at the data (the last good checkpoint is in {folder})")
                common.append_log(folder / "log.csv", {"step": step, **means})
                bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()})
                sums = {}
            bar.update()
            if stop.signal or time.time() - saved > 60:
                checkpoint(step)
                saved = time.time()
            if stop.signal:
                print(f"\nstopped at step {step}; continue with --resume", file=sys.stderr)
                raise SystemExit(128 + stop.signal)
    checkpoint(step)
    return common.load_checkpoint(folder / "checkpoint.pt")


def train_vae(folder, train, data, device, resume):
    """Train the VAE and fit the Gaussian mixture to its training latents; returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if not state or not state["finished"]:
        torch.manual_seed(train["seed"])
        vae = build_vae(train)

        def loss(x0, gen):
            noise = common.randn((len(x0), vae.latent_dim), gen)
            total, sse, kl = vae_loss(vae, x0, noise, train["beta"])
            return total, {"sse": sse, "kl_nats": kl}

        state = fit(folder, state, train, vae, loss, data.images.to(device), train["flip"] == "both",
                    train["vae_lr"], train["vae_clip"], train["vae_ema"], device, {})
    if "gmm" not in state:
        vae = restore(build_vae(train), state["ema"], device)
        z = encode(vae, data.images, common.generator(train["seed"] + 2), device)[0]
        gmm = common.GaussianMixture.fit(z, train["components"], train["seed"])
        state["gmm"] = {"weights": gmm.weights, "means": gmm.means, "factors": gmm.factors}
        common.save_checkpoint(folder / "checkpoint.pt", state)
    return state


def train_refiner(folder, variant, train, vae_state, data, device, resume):
    """Train a refiner (or the unconditional control) with the VAE frozen; returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if state and state["finished"]:
        return state
    torch.manual_seed(train["seed"])
    unet = build_unet(train, variant)
    diffusion = common.Diffusion(train["objective"], device=device)
    carried, vae = {}, None
    if variant != "uncond":
        vae = restore(build_vae(train), vae_state["ema"], device)
        carried = {"vae": vae_state["ema"], "gmm": vae_state["gmm"]}

    def loss(x0, gen):
        x_hat = None
        if vae is not None:
            with torch.no_grad():  # the VAE is frozen; a fresh posterior sample each step, as published
                x_hat = vae(x0, common.randn((len(x0), vae.latent_dim), gen))[0]
        u = torch.rand(len(x0), generator=gen, device=gen.device)
        t = (diffusion.T * u ** train["t_power"]).long() + 1  # (B,), in 1..T
        mse = refiner_loss(diffusion, condition(unet, x_hat, variant), x0, t, common.randn(x0.shape, gen))
        return mse, {f"{train['objective']}_mse": mse}

    return fit(folder, state, train, unet, loss, data.images.to(device), train["flip"] != "none", train["unet_lr"],
               train["unet_clip"], train["unet_ema"], device, carried)


# --- Sampling --------------------------------------------------------------------------------------------------------


def restore(network, weights, device):
    """Load weights into a network, in evaluation mode on the device."""
    network.load_state_dict(weights)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_model(state, variant, device):
    """Rebuild a model from its checkpoint alone: vae and gmm (None for `uncond`), unet (None for `vae`), diffusion."""
    train, model = state["train"], SimpleNamespace(variant=variant, vae=None, unet=None, gmm=None, device=device)
    model.size, model.diffusion = train["image_size"], common.Diffusion(train["objective"], device=device)
    if variant != "uncond":
        model.vae = restore(build_vae(train), state["ema"] if variant == "vae" else state["vae"], device)
        model.gmm = common.GaussianMixture(**state["gmm"])
    if variant != "vae":
        model.unet = restore(build_unet(train, variant), state["ema"], device)
    return model


@torch.no_grad()
def encode(vae, images, gen, device, batch=500):
    """uint8 images (N, 3, H, W) -> posterior samples z, mu, logvar, each (N, d) on the CPU."""
    parts = [vae.encoder(to_float(chunk.to(device))) for chunk in images.split(batch)]
    mu, logvar = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
    return mu + (0.5 * logvar).exp() * common.randn(mu.shape, gen), mu, logvar


def refine(model, x_hat, gen, sampler, steps, spacing):
    """x_hat (B, 3, H, W) -> refined images in [-1, 1]. x_T and the steps' noise come from `gen`, a CPU generator
    (x_hat itself is returned if the model is a VAE alone)."""
    if model.unet is None:
        return x_hat
    x_T = common.randn(x_hat.shape, gen).to(model.device)
    noise = common.generator(gen.initial_seed() + 1, model.device)
    with common.autocast(model.device):
        denoise = condition(model.unet, x_hat, model.variant)
        return common.sample(model.diffusion, denoise, x_T, sampler, steps, noise, spacing=spacing)


@torch.no_grad()
def generate(model, count, prior, sampler, steps, spacing, seed, batch, corrupt=None, temperature=1.0):
    """Draw `count` images: uint8 x_hat and refined, each (count, 3, H, W) on the CPU, and seconds per image.

    Each batch has its own generator, so that image k has the same z and x_T for every sampler, step count and total.
    `corrupt(x_hat, gen)` damages the VAE's output before refinement; `temperature` scales z around the prior's mean.
    """
    before, after, seconds = [], [], 0.0
    for start in tqdm(range(0, count, batch), desc=f"{model.variant} {prior} {sampler} {steps}", leave=False):
        gen = common.generator(1_000_000 * (seed + 1) + start)
        clock = time.time()
        x_hat = torch.zeros(batch, 3, model.size, model.size, device=model.device)
        if model.vae is not None:
            d = model.vae.latent_dim
            z = model.gmm.sample(batch, gen) if prior == "gmm" else torch.randn(batch, d, generator=gen)
            with common.autocast(model.device):
                x_hat = model.vae.decoder((temperature * z).to(model.device))
        x_hat = corrupt(x_hat, common.generator(gen.initial_seed() + 2)) if corrupt else x_hat
        images = to_uint8(refine(model, x_hat, gen, sampler, steps, spacing)).cpu()
        seconds += time.time() - clock
        before.append(to_uint8(x_hat).cpu())
        after.append(images)
    done = batch * len(after)
    return torch.cat(before)[:count], torch.cat(after)[:count], seconds / done


def add_noise(sd):
    """Corruption of x_hat: Gaussian noise of standard deviation `sd` (images span [-1, 1])."""
    return lambda x_hat, gen: x_hat + sd * common.randn(x_hat.shape, gen).to(x_hat.device)


def blur(x_hat, gen):
    """Corruption of x_hat: Gaussian blur with a standard deviation of 1 pixel."""
    tap = torch.exp(-torch.arange(-3.0, 4.0, device=x_hat.device) ** 2 / 2)
    kernel = (tap[:, None] * tap / tap.sum() ** 2).expand(3, 1, 7, 7)
    padded = torch.nn.functional.pad(x_hat, (3, 3, 3, 3), mode="reflect")
    return torch.nn.functional.conv2d(padded, kernel, groups=3)


CORRUPTIONS = {
    "clean": {},
    "noise 0.1": {"corrupt": add_noise(0.1)},
    "noise 0.2": {"corrupt": add_noise(0.2)},
    "noise 0.4": {"corrupt": add_noise(0.4)},
    "blur 1 px": {"corrupt": blur},
    "z x 1.3": {"temperature": 1.3},
}


# --- Evaluation ------------------------------------------------------------------------------------------------------


def reconstruct(model, images, evaluation, seed):
    """Held-out uint8 images -> x_hat and refined as uint8, with mu, logvar (CPU)."""
    gen = common.generator(50_000 + seed)
    _, mu, logvar = encode(model.vae, images, gen, model.device)
    with torch.no_grad():
        x_hat = model.vae.decoder(mu.to(model.device))
        refined = refine(model, x_hat, gen, "dpm", evaluation["sample_steps"], evaluation["spacing"])
    return to_uint8(x_hat).cpu(), to_uint8(refined).cpu(), mu, logvar


def bits_per_dim(model, images, evaluation, seed):
    """The valid bound in bits per dimension on held-out images, in parts: L_T + sum KL_t + L_0 of the
    diffusion model given x_hat = Dec(z), z ~ q(z|x), plus KL(q(z|x) || N(0, I)). None for the VAE alone."""
    if model.unet is None:
        return None
    images, gen = images[: evaluation["bits_images"]].to(model.device), common.generator(60_000 + seed, model.device)
    parts, x_hat = {}, None
    with torch.no_grad(), common.autocast(model.device):
        if model.vae is not None:
            x_hat, mu, logvar = model.vae(to_float(images), common.randn((len(images), model.vae.latent_dim), gen))
            parts["kl"] = common.gaussian_kl(mu, logvar).cpu()
        denoise = condition(model.unet, x_hat, model.variant)
        parts |= common.diffusion_nats(model.diffusion, denoise, images, evaluation["bits_draws"], gen)
    unit = images[0].numel() * torch.log(torch.tensor(2.0))
    total = sum(parts.values()) / unit  # (N,) bits per dimension
    half = 1.96 * float(total.std()) / len(total) ** 0.5
    mean = float(total.mean())
    return {"bound": {"value": mean, "low": mean - half, "high": mean + half}, "images": len(images),
            **{name: float((value / unit).mean()) for name, value in parts.items()}}


def diagnose(mu, logvar, sharpness):
    """The assignment's debugging tip as numbers and one sentence: are outputs smooth because the latent is unused,
    underfitted, or just because a Gaussian decoder averages?"""
    active = int((mu.var(0) > 0.01).sum())
    variance = float(logvar.exp().mean())
    if active < 0.05 * mu.shape[1]:
        text = "almost no latent unit is active (posterior collapse): lower beta or train longer"
    elif variance > 0.9:
        text = "posterior variance is close to the prior's: most units carry little; train longer or lower beta"
    elif sharpness < 0.5:
        text = "the latent is in use; outputs are smooth because a Gaussian decoder averages what z cannot hold"
    else:
        text = "the latent is in use and outputs are not overly smooth"
    return {"active_units": active, "latent_dim": mu.shape[1], "posterior_variance": variance, "verdict": text}


def evaluate(folder, state, variant, evaluation, test, extractor, reference, facts, device):
    """Everything measured for one variant: writes figures and metrics.json into its folder, returns the metrics."""
    model, train = load_model(state, variant, device), state["train"]
    seed, spacing, batch, prior = train["seed"], evaluation["spacing"], evaluation["batch"], evaluation["prior"]
    priors = ["none"] if model.vae is None else [prior, "gmm" if prior == "gaussian" else "gaussian"]
    sampler, steps = ("none", 0) if model.unet is None else (evaluation["sampler"], evaluation["sample_steps"])

    def measure(prior, sampler, steps, count, **damage):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        x_hat, images, seconds = generate(model, count, prior, sampler, steps, spacing, seed, batch, **damage)
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        row = {"prior": prior, "sampler": sampler, "nfe": steps, "n_generated": count, "seconds_per_image": seconds,
               "peak_memory_mb": peak} | fid.scores(extractor, images, reference)
        return row | {"hf_energy": common.hf_energy(images, test.images)}, x_hat, images

    fd = "fd" + extractor.suffix if extractor.suffix else "fid"
    rows, tables = [], {}
    for name in priors:  # the headline row first
        headline = name == priors[0] or model.unet is None
        row, x_hat, images = measure(name, sampler, steps, evaluation["count" if headline else "grid_count"])
        rows.append(row)
        if name == priors[0]:
            pairs = [("VAE", x_hat), ("refined", images)] if variant in ("form1", "form2") else [(variant, images)]
            shown = [(label, part[i : i + 12]) for i in (0, 12, 24) for label, part in pairs]
            common.save_grid(folder / "samples.png", [p for _, p in shown], [label for label, _ in shown])
    if model.unet is not None:
        pictures = {}
        for name, n in evaluation["grid"]:  # the same z and x_T throughout
            row, _, images = measure(priors[0], name, n, evaluation["grid_count"])
            rows.append(row)
            pictures[f"{name} {n}"] = images[:12]
        common.save_grid(folder / "steps.png", list(pictures.values()), list(pictures))
        draw_speed(folder, rows[len(priors) :], fd)
    if model.vae is not None:
        tables["robustness"] = robustness(folder, measure, priors[0], sampler, evaluation, fd)
        real = test.images[:1000]
        x_hat, refined, mu, logvar = reconstruct(model, real[: evaluation["grid_count"]], evaluation, seed)
        error = (x_hat.float() - real[: len(x_hat)].float()).div(255).square().mean((1, 2, 3))  # (N,)
        psnr = -10 * error.log10()
        tables["reconstruction"] = {"psnr_db": float(psnr.mean()),
                                    "kl_nats": float(common.gaussian_kl(mu, logvar).mean()),
                                    "hf_energy_vae": common.hf_energy(x_hat, test.images),
                                    "hf_energy_refined": common.hf_energy(refined, test.images)}
        tables["latent"] = diagnose(mu, logvar, tables["reconstruction"]["hf_energy_vae"]["value"])
        z = encode(model.vae, test.images, common.generator(70_000 + seed), device)[0]
        normal = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
        tables["prior_log_density"] = {"gaussian": float(normal.mean()), "gmm": float(model.gmm.log_prob(z).mean())}
        parts = [("real", real), ("VAE", x_hat)] + ([("refined", refined)] if model.unet is not None else [])
        common.save_grid(folder / "reconstructions.png", [p[:12] for _, p in parts], [name for name, _ in parts])
        print(f"{folder.name}: {tables['latent']['verdict']}")
    tables["bits_per_dim"] = bits_per_dim(model, test.images, evaluation, seed)
    tables["training"] = draw_training(folder)
    cost = network_cost(train, variant)
    parameters, gflops = (sum(c[key] for c in cost.values()) for key in ("parameters", "gflops"))
    metrics = {"schema": 1, "run": facts | {"features": extractor.name, "parameters": parameters, "gflops": gflops,
                                            "train_images": train["steps"] * train["batch"],
                                            "train_seconds": state["seconds"]}, "rows": rows, "tables": tables}
    common.write_metrics(folder / "metrics.json", metrics)
    return metrics


def robustness(folder, measure, prior, sampler, evaluation, fd):
    """Refine damaged VAE outputs (same z, same x_T). The area is the mean of score / clean score over noise sd 0 to
    0.4: 1 means unharmed. Writes robustness.png: damaged x_hat above, refined below."""
    steps, scores, pictures = 0 if sampler == "none" else evaluation["probe_steps"], {}, []
    for name, damage in CORRUPTIONS.items():
        row, x_hat, images = measure(prior, sampler if sampler == "none" else "dpm", steps, evaluation["probe_count"],
                                     **damage)
        scores[name] = {fd: row[fd], "hf_energy": row["hf_energy"]}
        pictures += [(name, x_hat[:12])] + ([("  refined", images[:12])] if steps else [])
    common.save_grid(folder / "robustness.png", [p for _, p in pictures], [label for label, _ in pictures])
    sd = torch.tensor([0, 0.1, 0.2, 0.4])
    ratio = torch.tensor([scores[k][fd]["value"] for k in ("clean", "noise 0.1", "noise 0.2", "noise 0.4")])
    return {"nfe": steps, "scores": scores, "area": float(torch.trapezoid(ratio / ratio[0], sd) / 0.4)}


def draw_speed(folder, rows, fd):
    """Chart quality against the number of steps and against time, and why few uniform steps blur."""
    panels = []
    for key, axis in (("nfe", "U-Net evaluations"), ("seconds_per_image", "seconds per image")):
        lines = {}
        for name in sorted({row["sampler"] for row in rows}):
            mine = [row for row in rows if row["sampler"] == name]
            lines[name] = [row[key] for row in mine], [row[fd]["value"] for row in mine]
        panels.append({"title": f"{fd} against {axis}", "x": axis, "y": fd, "lines": lines, "log": "log"})
    common.save_chart(folder / "speed.png", panels)
    draw_spacing(folder / "spacing.png")


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


def draw_training(folder):
    """Chart the log; returns each column's last value."""
    columns = common.read_log(folder / "log.csv")
    steps = columns.pop("step")
    common.save_chart(folder / "training.png", [{"title": f"{folder.name}: {name}", "x": "step", "y": name,
                                                 "lines": {name: (steps, values)}} for name, values in columns.items()])
    return {name: values[-1] for name, values in columns.items()}


def network_cost(train, variant):
    """Parameters and forward GFLOPs per image of the networks in use: vae (encoder and decoder), unet."""
    size, cost = train["image_size"], {}
    with torch.device("meta"):
        if variant != "uncond":
            vae = build_vae(train)
            cost["vae"] = common.count_cost(vae, torch.empty(1, 3, size, size), torch.empty(1, vae.latent_dim))
        if variant != "vae":
            unet = build_unet(train, variant)
            channels = 3 if variant == "uncond" else 6
            cost["unet"] = common.count_cost(unet, torch.empty(1, channels, size, size), torch.ones(1))
    return cost


def main(argv=None):
    args = parse_flags(argv)
    train, evaluation, device = common.read_settings(args)
    evaluation["prior"] = args.prior
    if args.dry_run:
        networks = network_cost(train, next((v for v in args.variant if v in ("form1", "form2")), "form1"))
        print(json.dumps({"settings": {"train": train, "eval": evaluation}, "networks": networks}, indent=1))
        return
    name = Path(args.data_dir).resolve().name if args.dataset == "folder" else args.dataset
    try:  # before any training: what cannot be scored is an error now, not in ten minutes
        extractor = fid.load_extractor(evaluation["features"], name, args.weights, device, args.data_dir)
    except ValueError as error:
        common.fail(error)
    data, test = (common.load_images(args.dataset, split, args.data_dir, train["image_size"])
                  for split in ("train", "test"))
    train |= {"crop": data.crop, "n_train": len(data.images)}
    evaluation["features"] = extractor.name
    home = Path(args.out) / f"{name}-{train['budget']}"
    reference, finished = None, {}
    vae_folder = home / f"stage1-vae-s{args.seed}"
    vae_state = None
    if args.variant != ["uncond"]:
        vae_state = train_vae(vae_folder, train, data, device, args.resume)
    for variant in args.variant:
        folder = home / f"stage1-{variant}-s{args.seed}"
        state = (vae_state if variant == "vae" else
                 train_refiner(folder, variant, train, vae_state, data, device, args.resume))
        metrics = common.read_metrics(folder / "metrics.json")
        if metrics is None or metrics["run"]["eval"] != json.loads(json.dumps(evaluation)):
            reference = reference or fid.reference(extractor, data, test, Path("data" if args.dataset in
                                                   ("shapes", "folder") else args.data_dir) / "cache")
            facts = common.run_facts(train, evaluation, data, device, f"stage1-{variant}")
            metrics = evaluate(folder, state, variant, evaluation, test, extractor, reference, facts, device)
        finished[folder] = metrics
    local = "_local" if extractor.suffix else ""
    scores = ["fd_local" if local else "fid", *(s + local for s in ("floor", "is", "precision", "recall"))]
    table = [{"variant": m["run"]["variant"], "steps": row["nfe"], "sec/image": row["seconds_per_image"]} | row
             for m in finished.values() for row in m["rows"]]
    print()
    columns = ["variant", "prior", "sampler", "steps", "n_generated", "sec/image", *scores, "hf_energy"]
    common.print_table(table, columns)
    print(f"\nfeatures: {extractor.name}; data: {data.name} ({data.note}); intervals: 95%, resampling only, one run")
    for folder in finished:
        print("\n".join(str(path) for path in sorted(folder.glob("*.png")) + [folder / "metrics.json"]))


if __name__ == "__main__":
    main()
