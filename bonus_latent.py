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
        seconds are medians, the costliest operators (profile-*.txt) and on a CPU the memory come from torch.profiler,
        which also prints lines of its own. On shapes half the seconds, at three to four times the distance.
"""

import argparse
import itertools
import statistics
import time

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile

import common
import fid
from common import to_float, to_uint8

CHANNELS, FACTOR, BETA = 4, 4, 0.01  # of the latent; beta of its KL, in units of the SSE of images in [0, 1]
# autoencoder width and latent U-Net per budget; U-Net table: (latent size over level size, width, blocks down, up)
SIZES = {"smoke": (16, [(1, 16, 1, 1)]), "cpu": (32, [(1, 96, 1, 1), (2, 128, 1, 1)]),
         "gpu": (96, [(1, 192, 2, 3), (2, 256, 2, 3)]), "paper": (128, [(1, 256, 2, 3), (2, 512, 2, 3)])}


# --- The model -------------------------------------------------------------------------------------------------------

class Autoencoder(nn.Module):
    """Convolutional KL autoencoder: x (B, 3, H, W) <-> z (B, 4, H/4, W/4). Two halvings, no normalisation, no
    attention: everything stays local, so the latent is a small picture."""

    def __init__(self, width):
        super().__init__()
        w, block = width, common.BottleneckBlock
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), block(w), nn.Conv2d(w, 2 * w, 2, stride=2),
            block(2 * w), nn.Conv2d(2 * w, 2 * w, 2, stride=2),
            block(2 * w), block(2 * w), nn.Conv2d(2 * w, 2 * CHANNELS, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * w, 3, padding=1), block(2 * w), block(2 * w),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * w, 2 * w, 3, padding=1), block(2 * w),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * w, w, 3, padding=1), block(w), block(w),
            nn.Conv2d(w, 3, 3, padding=1))

    def encode(self, x0):
        """x0 (B, 3, H, W) -> mu, logvar, each (B, 4, H/4, W/4)."""
        return tuple(part.float() for part in self.encoder(x0).chunk(2, 1))

    def decode(self, z):
        """z -> x_hat in [-1, 1]."""
        return torch.tanh(self.decoder(z).float())

    def forward(self, x0, noise):
        mu, logvar = self.encode(x0)
        return self.decode(common.reparameterise(mu, logvar, noise)), mu, logvar


def build_unet(train):
    """The U-Net on latents, with attention at their full resolution."""
    latent = train["image_size"] // FACTOR
    table = [(latent // shrink, width, down, up) for shrink, width, down, up in train["latent_unet"]]
    return common.UNet(table, CHANNELS, CHANNELS, attention=[latent], heads=train["heads"], dropout=train["dropout"])


def latent_shape(train):
    """(4, h, w): what is diffused."""
    return CHANNELS, train["image_size"] // FACTOR, train["image_size"] // FACTOR


# --- Training --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_all(ae, images, device, batch=500):
    """Posterior means and standard deviations of images (N, 3, H, W), (N, 4, h, w) on the device."""
    parts = [ae.encode(to_float(chunk.to(device))) for chunk in images.split(batch)]
    mu, logvar = (torch.cat(part) for part in zip(*parts, strict=True))
    return mu, (0.5 * logvar).exp()


def train_autoencoder(folder, train, data, device, state):
    """Train the autoencoder and measure its latent's scale; returns the checkpoint."""
    torch.manual_seed(train["seed"])
    ae = Autoencoder(train["ae_width"])
    training = common.Training(folder, state, train, device, data.images, train["flip"] == "both",
                               vae=ae)  # trained with the vae_* settings, kept as state["vae"]
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        noise = training.draw(torch.randn, *latent_shape(train))  # (B, 4, h, w)
        with common.autocast(device):
            x_hat, mu, logvar = ae(x0, noise)
            sse = common.squared_error(x_hat, x0)
            kl = common.gaussian_kl(mu.flatten(1), logvar.flatten(1))
        training.step(sse + BETA * kl, {"sse": sse, "kl_nats": kl})
    ae = common.frozen(Autoencoder(train["ae_width"]), training.averages["vae"], device)
    mu, sd = encode_all(ae, data.images, device)
    mean = mu.mean((0, 2, 3), keepdim=True)  # (1, 4, 1, 1), of z ~ q(z|x) over the whole training set
    variance = ((mu - mean) ** 2 + sd**2).mean((0, 2, 3), keepdim=True)
    return training.finish(scale={"mean": mean.cpu(), "sd": variance.sqrt().cpu()})


def train_latent(folder, train, ae_state, data, device, state):
    """Train the U-Net on scaled latents, the autoencoder frozen; returns the checkpoint."""
    ae = common.frozen(Autoencoder(train["ae_width"]), ae_state["vae"], device)
    stats = {key: value.to(device) for key, value in ae_state["scale"].items()}
    images = data.images if train["flip"] == "none" else torch.cat([data.images, data.images.flip(3)])  # both ways
    latents = torch.cat(encode_all(ae, images, device), 1)  # (N, 8, h, w): encoded once, re-sampled in every step
    torch.manual_seed(train["seed"])
    unet, diffusion = build_unet(train), common.Diffusion(train["objective"], device=device)
    training = common.Training(folder, state, train, device, latents, False, unet=unet)
    for mu_sd in training:  # (B, 8, h, w)
        mu, sd = mu_sd.chunk(2, 1)
        z = mu + sd * training.draw(torch.randn, *latent_shape(train))  # (B, 4, h, w)
        z = ((z - stats["mean"]) / stats["sd"]).contiguous(memory_format=torch.channels_last)
        t = diffusion.draw_t(training.draw(torch.rand))  # (B,), in 1..T
        eps = training.draw(torch.randn, *latent_shape(train))  # (B, 4, h, w)
        with common.autocast(device):
            loss = diffusion.simple_loss(unet, z, t, eps)  # (B,)
        training.step(loss, {f"{train['objective']}_mse": loss})
    return training.finish(vae=ae_state["vae"], scale=ae_state["scale"])


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(state, device):
    """Rebuild a common.Model, and the autoencoder and U-Net in it, from the checkpoint alone."""
    train, stats = state["train"], {key: value.to(device) for key, value in state["scale"].items()}
    ae = common.frozen(Autoencoder(train["ae_width"]), state["vae"], device)
    unet = common.frozen(build_unet(train), state["unet"], device)
    model = common.Model("latent", device, latent_shape(train), common.Diffusion(train["objective"], device=device),
                         condition=lambda x_hat, z: unet, decode=lambda z: ae.decode(z * stats["sd"] + stats["mean"]))
    return model, ae, unet


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
    held = itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0)
    return max(held) / 2**20


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


def cost(name, unet, shape, decoder, code, steps, train_batch, folder):
    """What sampling with one network, then decoding `code` (B, ...), costs: seconds per image (batch 1, B), peak memory
    of a pass, and seconds per image of a forward and backward pass of the network (at `train_batch`). Saves the
    profiler's table of costliest operators."""
    batch, device = len(code), code.device
    x, t = torch.randn(batch, *shape, device=device), torch.full((batch,), 500, device=device)

    def run(network, n, *inputs):
        with torch.no_grad(), common.autocast(device):
            network(*(part[:n] for part in inputs))

    def train_step():
        with common.autocast(device):
            loss = unet(x[:train_batch], t[:train_batch]).square().mean()
        loss.backward()
        unet.zero_grad(set_to_none=True)

    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")) as profiler:
        run(unet, batch, x, t)
    where = "cuda" if device.type == "cuda" else "cpu"
    table = profiler.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=12)
    common.write(folder / f"profile-{name}.txt", table.encode())
    decoding = {n: median_seconds(lambda n=n: run(decoder, n, code), device) / n for n in (1, batch)}
    seconds = {n: steps * median_seconds(lambda n=n: run(unet, n, x, t), device) / n + decoding[n] for n in (1, batch)}
    unet.requires_grad_(True)
    return {"seconds_per_image_batch_1": seconds[1], "seconds_per_image": seconds[batch],
            "peak_memory_mb": peak_memory(lambda: run(unet, batch, x, t), device),
            "train_seconds_per_image": median_seconds(train_step, device, 5) / min(batch, train_batch)}


def savings(folder, model, unet, train, setup):
    """Latent against pixel space on this machine, same sampler and steps: both costs, and what is saved in percent,
    drawn in savings.png. The pixel network is stage 1's refiner, with any weights, on which no cost depends. Seconds
    count what sampling runs; `gflops_per_image` counts the encoders as well."""
    device, size = model.device, train["image_size"]
    steps, batch = setup.evaluation["sample_steps"], setup.evaluation["batch"]
    pixel, vae = common.build_unet(train, 6), common.build_vae(train)
    pixel, vae = (common.frozen(network, network.state_dict(), device) for network in (pixel, vae))
    z = torch.randn(batch, vae.latent_dim, device=device)
    small = torch.randn(batch, *model.shape, device=device)
    result = {"device": str(device), "sampler_steps": steps, "batch": batch}
    for name, net, shape, decoder, code, parts in (
            ("pixel", pixel, (6, size, size), vae.decoder, z, common.network_cost(train)),
            ("latent", unet, model.shape, model.decode, small, network_cost(train))):
        result[name] = cost(name, net, shape, decoder, code, steps, train["batch"], folder) | {
            "gflops_per_pass": parts["unet"]["gflops"],
            "gflops_per_image": steps * parts["unet"]["gflops"] + parts["vae"]["gflops"]}
    result["saved_percent"] = {key: 100 * (1 - result["latent"][key] / result["pixel"][key]) for key in result["pixel"]}
    saved, figure = result["saved_percent"], Figure(figsize=(8, 3), layout="constrained")
    axis = figure.add_subplot()
    bars = axis.barh([key.replace("_", " ") for key in saved], list(saved.values()), color="tab:blue")
    axis.bar_label(bars, fmt="%.0f%%", padding=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="saved by latent diffusion, % of pixel space", xlim=(min(0, *saved.values()) * 1.15, 115))
    common.save_as(folder / "savings.png", figure.savefig, format="png", dpi=110)
    return result


@torch.no_grad()
def ceiling(folder, ae, setup):
    """Scores of the autoencoder's reconstructions of held-out images, beyond which latent diffusion can hardly get."""
    real = setup.test.images[: setup.evaluation["count"]]
    x_hat = torch.cat([to_uint8(ae.decode(encode_all(ae, chunk, setup.device)[0])).cpu() for chunk in real.split(500)])
    common.save_grid(folder / "reconstructions.png", {"real": real[:12], "autoencoder": x_hat[:12]})
    return fid.scores(setup.extractor, x_hat, setup.reference) | {
        "hf_energy": common.hf_energy(x_hat, setup.test.images), "psnr_db": common.psnr_db(x_hat, real)}


def equal_seconds(rows, pixel, fd):
    """Quality at equal seconds, of equal counts: each row, and the pixel model's (same sampler, prior of its headline)
    that take at most a tenth longer."""
    def brief(row):
        return {key: row[key] for key in ("prior", "sampler", "nfe", "seconds_per_image", fd)}

    return [{"latent": brief(ours), "pixel": [
        brief(row) for row in pixel if row["seconds_per_image"] <= 1.1 * ours["seconds_per_image"] and
        row["prior"] == pixel[0]["prior"] and all(row[key] == ours[key] for key in ("n_generated", "sampler"))]}
        for ours in rows]


# --- The command -----------------------------------------------------------------------------------------------------

def network_cost(train):
    """Parameters and forward GFLOPs per image of the autoencoder and the latent U-Net."""
    size = train["image_size"]
    with torch.device("meta"):
        one = torch.empty(1, *latent_shape(train))
        return {"vae": common.count_cost(Autoencoder(train["ae_width"]), torch.empty(1, 3, size, size), one),
                "unet": common.count_cost(build_unet(train), one, torch.ones(1))}


def pixel_rows(folder, train, setup):
    """The rows of stage 1's refiner of the same settings, or None where there are none to compare with."""
    path = folder / "checkpoint.pt"
    state = common.load_checkpoint(path) if path.is_file() else None
    if not state or not state["finished"] or common.first_difference(
            state["train"], {key: train[key] for key in train if key not in ("ae_width", "latent_unet")}):
        return None
    metrics = common.read_metrics(folder / "metrics.json")
    same = metrics and all(metrics["run"]["eval"].get(key) == setup.evaluation[key] for key in
                           ("features", "temperature"))
    return metrics["rows"] if same else None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Bonus: diffusion in the latent space")
    common.add_flags(parser)
    args = parser.parse_args(argv)
    train, evaluation, device = common.read_settings(args)
    width, table = SIZES[train["budget"]]
    train |= {"ae_width": width, "latent_unet": [list(row) for row in table]}
    if args.dry_run:
        return common.print_settings(train, evaluation, network_cost(train))
    setup = common.Setup(args, train, evaluation, device)
    train, device = setup.train, setup.device
    ae_folder, folder = (setup.home / f"bonus-{name}-s{args.seed}" for name in ("ae", "latent"))
    ae_state = common.trained(ae_folder, train, args.resume,
                              lambda state: train_autoencoder(ae_folder, train, setup.data, device, state))
    state = common.trained(folder, train, args.resume,
                           lambda state: train_latent(folder, train, ae_state, setup.data, device, state))
    model, ae, unet = load_model(state, device)

    def more(model):
        return {"ceiling": ceiling(folder, ae, setup), "savings": savings(folder, model, unet, train, setup)}

    metrics = common.evaluate(folder, setup, state, model, network_cost(train), more)
    common.export(args, folder, state, model, setup.evaluation)
    theirs = pixel_rows(setup.home / f"stage1-form1-s{args.seed}", train, setup)
    if theirs:  # as soon as stage 1 has been measured, too
        metrics["tables"]["equal_seconds"] = equal_seconds(metrics["rows"], theirs, setup.fd)
        common.write_json(folder / "metrics.json", metrics)
    common.print_results({folder: metrics}, setup)
    saved = metrics["tables"]["savings"]
    print(f"\nsaved against pixel space ({saved['device']}, {saved['sampler_steps']} steps, batch {saved['batch']}): "
          + ", ".join(f"{key.replace('_', ' ')} {value:.0f}%" for key, value in saved["saved_percent"].items()))


if __name__ == "__main__":
    main()
