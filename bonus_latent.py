"""Bonus: diffusion in the latent space (Rombach et al. 2022), profiled against diffusion in pixel space.

The claim: most of an image's numbers carry detail that an autoencoder can restore. Diffuse the few numbers of its
latent instead, and each of the many U-Net passes costs a fraction; what is lost is what the autoencoder cannot restore.

    autoencoder   z = Enc(x), (B, 4, H/4, W/4);   loss = SSE(x, Dec(z)) + beta KL(q(z|x) || N(0, I)), beta small
    scaling       z' = (z - mean) / sd, per channel over the training set, so that N(0, I) is where diffusion starts;
                  undone before decoding. Without it the result is noise
    diffusion     the DDPM process on z', drawn anew from q(z|x) in every step; no clamping: z' has no [-1, 1]
    no gradient   of the diffusion loss reaches the autoencoder: its target depends on the encoder, which would make
                  the loss small by making the latent small

Run     python bonus_latent.py                        shapes, on a laptop
        python bonus_latent.py --dataset celeba64     all that a GPU user types
Expect  fewer minutes than stage 1, a table with the autoencoder's reconstructions as the ceiling, and `savings.png`:
        what latent diffusion saves against stage 1's refiner, in percent, measured on this machine: FLOPs are counted,
        seconds are medians, memory and the costliest operators (profile-*.txt) come from torch.profiler.
"""

import argparse
import json
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import common
import fid
from common import to_float, to_uint8

CHANNELS, FACTOR, BETA = 4, 4, 0.01  # of the latent; beta of its KL, in units of the SSE of images in [0, 1]
# latent U-Net and autoencoder width per budget; U-Net table: (size relative to the latent, width, blocks down, up)
SIZES = {"smoke": (16, [(1, 16, 1, 1)]), "cpu": (32, [(1, 96, 1, 1), (2, 128, 1, 1)]),
         "gpu": (96, [(1, 192, 2, 3), (2, 256, 2, 3)]), "paper": (128, [(1, 256, 2, 3), (2, 512, 2, 3)])}


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description="Bonus: diffusion in the latent space")
    common.add_flags(parser)
    return parser.parse_args(argv)


# --- The model -------------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Convolutional KL autoencoder: x (B, 3, H, W) <-> z (B, 4, H/4, W/4). Two halvings, no normalisation, no
    attention: everything stays local, so the latent is a small picture."""

    def __init__(self, width):
        super().__init__()
        w, block = width, common.BottleneckBlock
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), block(w, 32), nn.Conv2d(w, 2 * w, 2, stride=2),
            block(2 * w, 16), nn.Conv2d(2 * w, 2 * w, 2, stride=2),
            block(2 * w, 8), block(2 * w, 8), nn.Conv2d(2 * w, 2 * CHANNELS, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * w, 3, padding=1), block(2 * w, 8), block(2 * w, 8),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * w, 2 * w, 3, padding=1), block(2 * w, 16),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * w, w, 3, padding=1), block(w, 32), block(w, 32),
            nn.Conv2d(w, 3, 3, padding=1))

    def encode(self, x0):
        """x0 (B, 3, H, W) -> mu, logvar, each (B, 4, H/4, W/4)."""
        return (part.float() for part in self.encoder(x0).chunk(2, 1))

    def decode(self, z):
        """z -> x_hat in [-1, 1]."""
        return torch.tanh(self.decoder(z).float())

    def forward(self, x0, noise):
        mu, logvar = self.encode(x0)
        return self.decode(mu + (0.5 * logvar).exp() * noise), mu, logvar


def build_unet(train):
    latent = train["image_size"] // FACTOR
    table = [(latent // shrink, width, down, up) for shrink, width, down, up in train["latent_unet"]]
    return common.UNet(table, CHANNELS, CHANNELS, attention=[latent], heads=train["heads"], dropout=train["dropout"])


def network_cost(train):
    """Parameters and forward GFLOPs per image of the autoencoder and the latent U-Net."""
    size, one = train["image_size"], torch.empty(latent_shape(train, 1), device="meta")
    with torch.device("meta"):
        return {"vae": common.count_cost(Autoencoder(train["ae_width"]), torch.empty(1, 3, size, size), one),
                "unet": common.count_cost(build_unet(train), one, torch.ones(1))}


def latent_shape(train, batch):
    side = train["image_size"] // FACTOR
    return batch, CHANNELS, side, side


def scale(z, stats):
    """Latents to zero mean and unit variance per channel over the training set."""
    return (z - stats["mean"]) / stats["sd"]


def unscale(z, stats):
    """Undo `scale`, before decoding."""
    return z * stats["sd"] + stats["mean"]


# --- Training --------------------------------------------------------------------------------------------------------


def fit(folder, state, train, network, loss, count, lr, clip, ema_decay, device, carried):
    """Stage 1's loop with one difference: `loss(index, gen)` looks up its own data, images or latents."""
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
            index = torch.randint(count, (train["batch"],), generator=gen, device=device)
            with common.autocast(device):
                per_image, terms = loss(index, gen)
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


@torch.no_grad()
def encode_all(ae, images, device, batch=500):
    """Posterior means and standard deviations of images (N, 3, H, W), (N, 4, h, w) on the device."""
    parts = [tuple(ae.encode(to_float(chunk.to(device)))) for chunk in images.split(batch)]
    mu, logvar = (torch.cat(part) for part in zip(*parts, strict=True))
    return mu, (0.5 * logvar).exp()


def measure_scale(mu, sd):
    """Mean and standard deviation per channel, (1, 4, 1, 1), of z ~ q(z|x) over the whole training set."""
    mean = mu.mean((0, 2, 3), keepdim=True)
    variance = ((mu - mean) ** 2 + sd**2).mean((0, 2, 3), keepdim=True)
    return {"mean": mean, "sd": variance.sqrt()}


def train_autoencoder(folder, train, data, device, resume):
    """Train the autoencoder and measure its latent's scale; returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if not state or not state["finished"]:
        torch.manual_seed(train["seed"])
        ae, images = Autoencoder(train["ae_width"]), data.images.to(device)

        def loss(index, gen):
            x0 = to_float(images[index]).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
            if train["flip"] != "none":
                x0 = torch.where(torch.rand(len(x0), 1, 1, 1, generator=gen, device=device) < 0.5, x0.flip(3), x0)
            x0, noise = common.share(x0, common.randn(latent_shape(train, len(x0)), gen))
            x_hat, mu, logvar = ae(x0, noise)
            sse = ((x_hat - x0) ** 2).flatten(1).sum(1) / 4
            kl = common.gaussian_kl(mu.flatten(1), logvar.flatten(1))
            return sse + BETA * kl, {"sse": sse, "kl_nats": kl}

        state = fit(folder, state, train, ae, loss, len(images), train["vae_lr"], train["vae_clip"], train["vae_ema"],
                    device, {})
    if "scale" not in state:
        ae = common.restore(Autoencoder(train["ae_width"]), state["ema"], device)
        measured = measure_scale(*encode_all(ae, data.images, device))
        state["scale"] = {key: value.cpu() for key, value in measured.items()}
        common.save_checkpoint(folder / "checkpoint.pt", state)
    return state


def train_latent(folder, train, ae_state, data, device, resume):
    """Train the U-Net on scaled latents, the autoencoder frozen; returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if state and state["finished"]:
        return state
    ae = common.restore(Autoencoder(train["ae_width"]), ae_state["ema"], device)
    stats = {key: value.to(device) for key, value in ae_state["scale"].items()}
    images = data.images if train["flip"] == "none" else torch.cat([data.images, data.images.flip(3)])  # both ways
    mu, sd = encode_all(ae, images, device)  # encoded once, re-sampled in every step
    torch.manual_seed(train["seed"])
    unet, diffusion = build_unet(train), common.Diffusion(train["objective"], device=device)

    def loss(index, gen):
        z = scale(mu[index] + sd[index] * common.randn(latent_shape(train, len(index)), gen), stats)
        z = z.contiguous(memory_format=torch.channels_last)
        t = diffusion.draw_t(len(z), train["t_power"], gen)  # (B,), in 1..T
        z, t, eps = common.share(z, t, common.randn(z.shape, gen))
        mse = diffusion.simple_loss(unet, z, t, eps)
        return mse, {f"{train['objective']}_mse": mse}

    return fit(folder, state, train, unet, loss, len(mu), train["unet_lr"], train["unet_clip"], train["unet_ema"],
               device, {"ae": ae_state["ema"], "scale": ae_state["scale"]})


# --- Sampling --------------------------------------------------------------------------------------------------------


def load_model(state, device):
    """Rebuild autoencoder, scale, U-Net and process from the checkpoint alone."""
    train = state["train"]
    return SimpleNamespace(ae=common.restore(Autoencoder(train["ae_width"]), state["ae"], device), train=train,
                           unet=common.restore(build_unet(train), state["ema"], device), device=device,
                           stats={key: value.to(device) for key, value in state["scale"].items()},
                           diffusion=common.Diffusion(train["objective"], device=device), temperature=1.0)


@torch.no_grad()
def decode(model, z):
    """Scaled latents (B, 4, h, w) -> images in [-1, 1]."""
    return model.ae.decode(unscale(z, model.stats))


@torch.no_grad()
def generate(model, count, sampler, steps, seed, batch, noise=0.0, z_T=None):
    """Draw `count` images, uint8 (count, 3, H, W) on the CPU, and seconds per image. Batches have their own generators,
    as in the other stages. `noise`: sd of Gaussian noise added to the sampled latent (which has sd 1)."""
    parts, starts = [], range(0, count, batch)[common.rank() :: common.ranks()]  # batches are shared out
    for start in tqdm(starts, desc=f"latent {sampler} {steps}", leave=False):
        gen = common.generator(1_000_000 * (seed + 1) + start)
        clock = time.time()
        x_T = common.randn(latent_shape(model.train, batch), gen) if z_T is None else z_T[start : start + batch]
        x_T = model.temperature * x_T
        with common.autocast(model.device):
            z = common.sample(model.diffusion, model.unet, x_T.to(model.device), sampler, steps,
                              common.generator(gen.initial_seed() + 1, model.device), clamp=False)
            z = z + noise * common.randn(z.shape, common.generator(gen.initial_seed() + 2)).to(z.device)
            images = to_uint8(decode(model, z)).cpu()
        parts.append((images, time.time() - clock))
    images, seconds = zip(*common.gather(parts), strict=True)
    return torch.cat(images)[:count], sum(seconds) / (batch * len(seconds))


# --- What it saves ---------------------------------------------------------------------------------------------------


def peak_memory(run, device):
    """Peak memory of run() in MB beyond what is held before: of the GPU, or the profiler's running sum on a CPU."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def median_seconds(run, device, repeats=7):
    """Median time of run(), warm."""
    times = []
    for _ in range(repeats + 2):
        clock = time.perf_counter()
        run()
        if device.type != "cpu":
            (torch.cuda if device.type == "cuda" else torch.mps).synchronize()
        times.append(time.perf_counter() - clock)
    return statistics.median(times[2:])


def cost(name, unet, shape, decoder, steps, batch, train_batch, device, folder):
    """What sampling with one network costs: seconds per image (batch 1, `batch`), peak memory of a pass, and training
    seconds per image (at `train_batch`). Saves the profiler's table of the costliest operators."""
    x, t = torch.randn(batch, *shape, device=device), torch.full((batch,), 500, device=device)

    def passes(n):
        with torch.no_grad(), common.autocast(device):
            unet(x[:n], t[:n])

    def train_step():
        with common.autocast(device):
            loss = unet(x[:train_batch], t[:train_batch]).square().mean()
        loss.backward()
        unet.zero_grad(set_to_none=True)

    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")) as profiler:
        passes(batch)
    where = "cuda" if device.type == "cuda" else "cpu"
    table = profiler.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=12)
    with common.atomic(folder / f"profile-{name}.txt") as temporary:
        temporary.write_text(table)
    after = {n: median_seconds(lambda n=n: decoder(n), device) / n if decoder else 0.0 for n in (1, batch)}
    seconds = {n: steps * median_seconds(lambda n=n: passes(n), device) / n + after[n] for n in (1, batch)}
    unet.requires_grad_(True)
    return {"seconds_per_image_batch_1": seconds[1], "seconds_per_image": seconds[batch],
            "peak_memory_mb": peak_memory(lambda: passes(batch), device),
            "train_seconds_per_image": median_seconds(train_step, device, 5) / min(batch, train_batch)}


def savings(folder, model, pixel_state, train, evaluation, device):
    """Latent against pixel space on this machine, same sampler and steps: both costs, and what is saved in percent.
    The pixel network is stage 1's refiner, trained if its run is there (cost does not depend on it)."""
    steps, batch = evaluation["sample_steps"], evaluation["batch"]
    pixel = common.build_unet(train, 6)
    if pixel_state:
        pixel.load_state_dict(pixel_state["ema"])
    pixel = pixel.to(device, memory_format=torch.channels_last).eval()
    vae = common.build_vae(train).to(device, memory_format=torch.channels_last).eval()
    z = torch.randn(batch, vae.latent_dim, device=device)
    small = torch.randn(latent_shape(train, batch), device=device)

    def pixel_decoder(n):
        with torch.no_grad(), common.autocast(device):
            vae.decoder(z[:n])

    def latent_decoder(n):
        with common.autocast(device):
            decode(model, small[:n])

    common_terms = steps, batch, train["batch"], device, folder
    result = {"device": str(device), "sampler_steps": steps, "batch": batch, "pixel_network_trained": bool(pixel_state),
              "pixel": cost("pixel", pixel, (6, *2 * [train["image_size"]]), pixel_decoder, *common_terms),
              "latent": cost("latent", model.unet, latent_shape(train, batch)[1:], latent_decoder, *common_terms)}
    for name, parts in (("pixel", common.network_cost(train)), ("latent", network_cost(train))):
        result[name]["gflops_per_pass"] = parts["unet"]["gflops"]
        result[name]["gflops_per_image"] = steps * parts["unet"]["gflops"] + parts["vae"]["gflops"]
    result["saved_percent"] = {key: 100 * (1 - result["latent"][key] / result["pixel"][key]) for key in result["pixel"]}
    draw_savings(folder, result["saved_percent"])
    return result


def draw_savings(folder, saved):
    """savings.png: one bar per quantity, in percent of the pixel network's."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(8, 3))
    bars = axis.barh([key.replace("_", " ") for key in saved], list(saved.values()), color="tab:blue")
    axis.bar_label(bars, fmt="%.0f%%", padding=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="saved by latent diffusion, % of pixel space", xlim=(min(0, *saved.values()) * 1.15, 115))
    figure.tight_layout()
    with common.atomic(folder / "savings.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


# --- Evaluation ------------------------------------------------------------------------------------------------------


def evaluate(folder, state, evaluation, test, extractor, reference, facts, pixel_state, pixel_metrics, device):
    """Rows (headline, grid of steps), the autoencoder's reconstructions as the ceiling, noise in the latent, an
    interpolation, the savings; writes figures, returns the metrics."""
    model, train = load_model(state, device), state["train"]
    model.temperature = evaluation["temperature"]
    seed, batch = train["seed"], evaluation["batch"]
    fd = "fd" + extractor.suffix if extractor.suffix else "fid"

    def draw(sampler, steps, count, noise=0.0):
        images, seconds = generate(model, count, sampler, steps, seed, batch, noise)
        row = {"prior": "none", "sampler": sampler, "nfe": steps, "n_generated": count, "seconds_per_image": seconds,
               "peak_memory_mb": None} | fid.scores(extractor, images, reference)
        return row | {"hf_energy": common.hf_energy(images, test.images)}, images

    row, images = draw(evaluation["sampler"], evaluation["sample_steps"], evaluation["count"])
    rows, tables, pictures = [row], {}, {}
    common.save_grid(folder / "samples.png", [images[i : i + 12] for i in (0, 12, 24)], ["latent"] * 3)
    common.draw_ranked(folder, images, extractor, reference)
    for sampler, steps in evaluation["grid"]:
        row, images = draw(sampler, steps, evaluation["grid_count"])
        rows.append(row)
        pictures[f"{sampler} {steps}"] = images[:12]
    common.save_grid(folder / "steps.png", list(pictures.values()), list(pictures))
    common.draw_speed(folder, rows[1:], fd)
    real = test.images[: evaluation["count"]]
    with torch.no_grad():
        x_hat = torch.cat([to_uint8(model.ae.decode(next(model.ae.encode(to_float(chunk.to(device)))))).cpu()
                           for chunk in real.split(500)])
    error = (x_hat.float() - real.float()).div(255).square().mean((1, 2, 3))
    tables["ceiling"] = fid.scores(extractor, x_hat, reference) | {
        "hf_energy": common.hf_energy(x_hat, test.images), "psnr_db": float((-10 * error.log10()).mean())}
    common.save_grid(folder / "reconstructions.png", [real[:12], x_hat[:12]], ["real", "autoencoder"])
    scores = {f"noise {sd}": draw("dpm", evaluation["probe_steps"], evaluation["probe_count"], sd)[0][fd]
              for sd in (0.0, 0.1, 0.2, 0.4)}
    ratio = torch.tensor([score["value"] for score in scores.values()])
    area = float(torch.trapezoid(ratio / ratio[0], torch.tensor([0, 0.1, 0.2, 0.4])) / 0.4)
    tables["robustness"] = {"nfe": evaluation["probe_steps"], "scores": scores, "area": area}
    ends, w = common.randn((2, *latent_shape(train, 3)), common.generator(95_000 + seed)), torch.linspace(0, 1, 9)
    angle = w * torch.pi / 2  # along a great circle: the ends are nearly orthogonal, and every point is N(0, I) again
    path = (angle.cos()[:, None, None, None, None] * ends[0] + angle.sin()[:, None, None, None, None] * ends[1])
    strip, _ = generate(model, 27, "dpm", evaluation["probe_steps"], seed, 27, z_T=path.flatten(0, 1))
    common.save_grid(folder / "interpolation.png", list(strip.unflatten(0, (9, 3)).transpose(0, 1)))
    tables["savings"] = savings(folder, model, pixel_state, train, evaluation, device)
    if pixel_metrics:  # quality at equal seconds, of equal counts: every row of the grid and the pixel rows as quick
        brief = lambda r: {k: r[k] for k in ("prior", "sampler", "nfe", "seconds_per_image", fd)}  # noqa: E731
        tables["equal_seconds"] = [
            {"latent": brief(ours), "pixel": [brief(r) for r in pixel_metrics["rows"] if r["n_generated"] ==
                                              ours["n_generated"] and r["sampler"] == ours["sampler"] and
                                              r["prior"] == pixel_metrics["rows"][0]["prior"] and
                                              r["seconds_per_image"] <= 1.1 * ours["seconds_per_image"]]}
            for ours in rows]
    tables["training"] = common.draw_training(folder)
    parameters, gflops = (sum(c[key] for c in network_cost(train).values()) for key in ("parameters", "gflops"))
    return {"schema": 1, "run": facts | {"features": extractor.name, "parameters": parameters, "gflops": gflops,
                                         "train_images": train["steps"] * train["batch"],
                                         "train_seconds": state["seconds"]}, "rows": rows, "tables": tables}


def main(argv=None):
    args = parse_flags(argv)
    train, evaluation, device = common.read_settings(args)
    pixel_train = dict(train)
    width, table = SIZES[train["budget"]]
    train |= {"ae_width": width, "latent_unet": [list(row) for row in table]}
    if args.dry_run:
        print(json.dumps({"settings": {"train": train, "eval": evaluation}, "networks": network_cost(train)}, indent=1))
        return
    home, extractor, data, test = common.prepare(args, train, evaluation, device)
    folders = {name: home / f"bonus-{name}-s{args.seed}" for name in ("ae", "latent")}
    ae_state = train_autoencoder(folders["ae"], train, data, device, args.resume)
    state = train_latent(folders["latent"], train, ae_state, data, device, args.resume)
    metrics = common.read_metrics(folders["latent"] / "metrics.json", evaluation)
    if metrics is None:
        stage1 = home / f"stage1-form1-s{args.seed}"
        pixel_state = common.load_checkpoint(stage1 / "checkpoint.pt") if (stage1 / "checkpoint.pt").is_file() else None
        if pixel_state and (not pixel_state["finished"] or common.first_difference(
                {key: pixel_state["train"].get(key) for key in pixel_train}, pixel_train)):
            pixel_state = None  # of another budget, or not yet trained
        pixel_metrics = common.read_metrics(stage1 / "metrics.json") if pixel_state else None
        if pixel_metrics and (pixel_metrics["run"]["features"] != extractor.name or
                              pixel_metrics["run"]["eval"].get("temperature", 1.0) != evaluation["temperature"]):
            pixel_metrics = None  # not comparable
        metrics = evaluate(folders["latent"], state, evaluation, test, extractor,
                           common.reference(args, extractor, data, test),
                           common.run_facts(train, evaluation, data, device, "bonus-latent"), pixel_state,
                           pixel_metrics, device)
        common.write_metrics(folders["latent"] / "metrics.json", metrics)
    common.print_results({folders["latent"]: metrics}, data, extractor)
    saved = metrics["tables"]["savings"]
    print(f"\nsaved against pixel space ({saved['device']}, {saved['sampler_steps']} steps, batch {saved['batch']}): "
          + ", ".join(f"{key.replace('_', ' ')} {value:.0f}%" for key, value in saved["saved_percent"].items()))


if __name__ == "__main__":
    main()
