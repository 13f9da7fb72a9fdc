"""Bonus: diffusion in the latent space (Rombach et al. 2022), profiled against diffusion in pixel space.

The claim: most of an image's numbers carry detail that an autoencoder can restore. If the few numbers of its latent are
diffused instead, each of the many passes of the U-Net costs less. What the autoencoder cannot restore is lost.

    autoencoder   A VAE whose code is a small image: z = Enc(x0), (B, 4, H/4, W/4);
                      loss = SSE(x0, Dec(z)) + beta KL(q(z|x0) || N(0, I)) with a small beta.
                  (Rombach et al. add perceptual and adversarial losses.)
    scaling       z' = (z - mean) / sd per channel, over the training set. The noise schedule is made for data of about
                  unit variance. The scaling is undone before decoding.
    diffusion     The DDPM process on z', with z drawn anew from q(z|x0) in every step. The predicted z' is not clamped,
                  since it has no range like [-1, 1].
    frozen        The autoencoder is trained first; then it stays fixed. The diffusion loss would shrink its latent.

Run     python bonus_latent.py                        shapes, on a laptop
        python bonus_latent.py --dataset celeba64     faces; if there is a GPU, it is found by itself
Expect  about the minutes of stage 1, and a table of scores. The last lines say what latent diffusion saves against
        stage 1's refiner in percent, measured on this machine: some 40% of the seconds, 70% of the memory. The row
        `ceiling` in metrics.json has the scores of the autoencoder's own reconstructions. torch.profiler's tables of
        the costliest operators are in profile-pixel.txt and profile-latent.txt.
"""

import argparse
import itertools
import statistics
import time
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import common
import fid
from common import randn, to_uint8

CHANNELS = 4  # of the latent
FACTOR = 4  # by how much the latent is smaller than the image, in each direction
BETA = 0.01  # the autoencoder's weight of the KL: small, so that it only keeps the latent from spreading out


# --- The model -------------------------------------------------------------------------------------------------------

class LatentEncoder(nn.Sequential):
    """x0 (B, 3, H, W) -> mean and log-variance of q(z | x0), each (B, 4, H/4, W/4)."""

    def __init__(self, c):
        block = common.BottleneckBlock
        super().__init__(
            nn.Conv2d(3, c, 3, padding=1), block(c),  # (B, c, H, W)
            nn.Conv2d(c, 2 * c, 2, stride=2), block(2 * c),  # (B, 2 c, H/2, W/2)
            nn.Conv2d(2 * c, 2 * c, 2, stride=2), block(2 * c), block(2 * c),  # (B, 2 c, H/4, W/4)
            nn.Conv2d(2 * c, 2 * CHANNELS, 1))  # (B, 8, H/4, W/4)

    def forward(self, x0):
        mu, logvar = super().forward(x0).chunk(2, 1)
        return mu.float(), logvar.float()


class LatentDecoder(nn.Sequential):
    """z (B, 4, H/4, W/4) -> x_hat (B, 3, H, W) in [-1, 1]."""

    def __init__(self, c):
        block = common.BottleneckBlock
        super().__init__(
            nn.Conv2d(CHANNELS, 2 * c, 3, padding=1), block(2 * c), block(2 * c),  # (B, 2 c, H/4, W/4)
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * c, 2 * c, 3, padding=1), block(2 * c),  # (B, 2 c, H/2, W/2)
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * c, c, 3, padding=1), block(c), block(c),  # (B, c, H, W)
            nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, z):
        return torch.tanh(super().forward(z).float())


def build_autoencoder(settings):
    """A VAE with a spatial latent. It has no attention and no normalisation, which would mix in statistics of the whole
    image: every part of the latent describes its own part of the image."""
    width = settings["ae_width"]
    return nn.ModuleDict({"encoder": LatentEncoder(width), "decoder": LatentDecoder(width)})


def latent_shape(settings):
    """(4, h, w): the shape of what is diffused."""
    return CHANNELS, settings["image_size"] // FACTOR, settings["image_size"] // FACTOR


def build_latent_unet(settings):
    """The U-Net on latents, with attention at their full resolution, which is small enough for it. A row of
    latent_table says how many times smaller a level is than the latent, its width, its blocks down and up."""
    _, size, _ = latent_shape(settings)
    table = [(size // shrink, width, down, up) for shrink, width, down, up in settings["latent_table"]]
    return common.UNet(table, in_channels=CHANNELS, out_channels=CHANNELS, attention=[size], heads=settings["heads"],
                       dropout=settings["dropout"], pool=settings["pool"])


# --- Training --------------------------------------------------------------------------------------------------------

def train_autoencoder(folder, settings, data, device):
    """Train the autoencoder with the settings of a VAE, and measure the scale of its latent. Returns the checkpoint."""
    torch.manual_seed(settings["seed"])
    autoencoder = build_autoencoder(settings).to(device, memory_format=torch.channels_last)
    optimizer = common.Optimizer(autoencoder, settings, "vae")
    average = common.MovingAverage(autoencoder, settings["vae_ema"])
    images = data.train.images.to(device)
    gen = common.generator(settings["seed"], f"training, process {common.RANK}", device)
    steps = settings["vae_steps"]
    progress = common.Progress(folder, settings, steps, gen, autoencoder=autoencoder, optimizer=optimizer,
                               average=average)
    for step in progress:
        x0 = common.draw_batch(images, settings, gen, settings["vae_flip"])  # (B, 3, H, W) in [-1, 1]
        noise = randn((len(x0), *latent_shape(settings)), gen)  # (B, 4, h, w)
        with common.autocast(device):
            mu, logvar = autoencoder["encoder"](x0)
            x_hat = autoencoder["decoder"](common.reparameterise(mu, logvar, noise))
        sse, kl = common.squared_error(x_hat, x0), common.gaussian_kl(mu, logvar)  # (B,)
        optimizer.zero_grad()
        (sse + BETA * kl).mean().backward()
        common.average_gradients(autoencoder)
        nn.utils.clip_grad_norm_(autoencoder.parameters(), settings["vae_clip"])
        optimizer.step(common.rate_factor(step, steps, settings))
        average.update(step)
        progress.log(sse=sse, kl_nats=kl)
    autoencoder = common.frozen(build_autoencoder(settings), average.weights, device)

    # Mean and variance of z ~ q(z|x) over all training images: Var z = Var mu + mean of exp(logvar).
    mu, logvar = common.encode(autoencoder["encoder"], data.train.images, device)
    mean = mu.mean((0, 2, 3), keepdim=True)  # (1, 4, 1, 1)
    variance = ((mu - mean) ** 2 + logvar.exp()).mean((0, 2, 3), keepdim=True)  # (1, 4, 1, 1)
    return progress.finish(vae=average.weights, mean=mean, sd=variance.sqrt())


def train_latent(folder, settings, base, data, device):
    """Train the U-Net on scaled latents, with the autoencoder of the checkpoint `base` frozen. Returns its checkpoint.
    """
    autoencoder = common.frozen(build_autoencoder(settings), base["vae"], device)

    # Mirrored images are encoded, too, since a mirrored latent is not the latent of the mirrored image.
    images = data.train.images
    images = torch.cat([images, images.flip(3)]) if settings["unet_flip"] else images
    mu, logvar = common.encode(autoencoder["encoder"], images, device)  # (N, 4, h, w)
    mu = ((mu - base["mean"]) / base["sd"]).to(device)
    sd = ((0.5 * logvar).exp() / base["sd"]).to(device)

    torch.manual_seed(settings["seed"])
    unet = build_latent_unet(settings).to(device, memory_format=torch.channels_last)
    optimizer = common.Optimizer(unet, settings, "unet")
    average = common.MovingAverage(unet, settings["unet_ema"])
    diffusion = common.Diffusion(settings["objective"], device=device)
    gen = common.generator(settings["seed"], f"training, process {common.RANK}", device)
    steps = settings["unet_steps"]
    progress = common.Progress(folder, settings, steps, gen, unet=unet, optimizer=optimizer, average=average)
    for step in progress:
        index = torch.randint(len(mu), (settings["batch"] // common.RANKS,), generator=gen, device=device)
        z = mu[index] + sd[index] * randn(mu[index].shape, gen)  # (B, 4, h, w), a new draw from q(z|x0)
        t = diffusion.draw_t(len(z), gen)  # (B,), in 1..T
        eps = randn(z.shape, gen)
        z_t = diffusion.q_sample(z, t, eps).contiguous(memory_format=torch.channels_last)
        with common.autocast(device):
            prediction = unet(z_t, t)  # (B, 4, h, w)
        mse = (prediction - diffusion.target(z, t, eps)).square().flatten(1).mean(1)  # (B,)
        loss = mse * diffusion.level_weight(t) if settings["even_levels"] else mse
        optimizer.zero_grad()
        loss.mean().backward()
        common.average_gradients(unet)
        nn.utils.clip_grad_norm_(unet.parameters(), settings["unet_clip"])
        optimizer.step(common.rate_factor(step, steps, settings))
        average.update(step)
        progress.log(mse=mse)
    return progress.finish(base, unet=average.weights, **{key: base[key] for key in ("vae", "mean", "sd")})


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(checkpoint, device):
    """The autoencoder, the U-Net and the scale of the latent of a checkpoint. There is no prior: nothing but the noise
    decides what is drawn."""
    settings = checkpoint["settings"]
    autoencoder = common.frozen(build_autoencoder(settings), checkpoint["vae"], device)
    unet = common.frozen(build_latent_unet(settings), checkpoint["unet"], device)
    return SimpleNamespace(settings=settings, device=device, autoencoder=autoencoder, unet=unet, priors={},
                           networks=[autoencoder, unet], mean=checkpoint["mean"].to(device),
                           sd=checkpoint["sd"].to(device),
                           diffusion=common.Diffusion(settings["objective"], device=device))


def draw_codes(model, settings, count):
    """What `generate` wants of a model that has no codes: (count, 0)."""
    return torch.zeros(count, 0)


@torch.no_grad()
def generate(model, settings, z, corrupt=None):
    """As many images as z (N, 0) has rows, uint8 (N, 3, H, W) on the CPU; twice, since there is no x_hat. `corrupt`, a
    function, spoils the latent before it is decoded."""
    diffusion = model.diffusion
    times = diffusion.times(settings)  # falling from T to 0
    images = []
    for first in common.bar(range(0, len(z), settings["eval_batch"]), desc="sampling"):
        n = min(settings["eval_batch"], len(z) - first)
        gen = common.generator(settings["seed"], f"noise {first}")
        x = randn((n, *latent_shape(model.settings)), gen).to(model.device)
        x0 = None
        with common.autocast(model.device):
            for i in range(len(times) - 1):
                t = torch.full((n,), times[i], device=model.device)  # (B,)
                prediction = model.unet(x, t)
                x0_before, x0 = x0, diffusion.to_x0(prediction, x, t, clamp=False)  # a latent has no range
                x = diffusion.step(settings["sampler"], x, x0, times, i, x0_before, gen)
            x = corrupt(x) if corrupt else x
            images.append(to_uint8(model.autoencoder["decoder"](x * model.sd + model.mean)).cpu())
    return torch.cat(images), torch.cat(images)


# --- What it saves ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate_in_pixel_space(vae, unet, diffusion, settings, count, device):
    """One batch of stage 1's samples, to be measured; the networks may have random weights, since no cost depends on
    them."""
    gen = common.generator(0, "pixel space")
    with common.autocast(device):
        x_hat = vae.decoder(randn((count, vae.latent_dim), gen).to(device))
        x, x0 = diffusion.x_start(x_hat, randn(x_hat.shape, gen).to(device)), None
        times = diffusion.times(settings)
        for i in range(len(times) - 1):
            t = torch.full((count,), times[i], device=device)
            x0_before, x0 = x0, diffusion.to_x0(unet(torch.cat([x, x_hat], 1), t), x, t)
            x = diffusion.step(settings["sampler"], x, x0, times, i, x0_before, gen)
    return to_uint8(x).cpu()


def peak_memory_mb(sample, device, path):
    """Peak memory of calling `sample` in MB (of 2^20 bytes), beyond what is in use before. Writes torch.profiler's
    table of the costliest operators."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with profile(activities=activities, profile_memory=True) as profiler:
        sample()
    table = profiler.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=12)
    path.write_text(table)
    if cuda:
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    # The profiler's raw events include one for each allocation (bytes > 0) and each release (bytes < 0).
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2**20


def savings(folder, model, settings, repeats=5):
    """Latent against pixel space on this machine, with equally many steps: rows with the seconds, memory and operations
    of sampling a batch, and what is saved in percent. The two U-Nets are those that the budget uses."""
    count, device = settings["eval_batch"], model.device
    settings = settings | common.sampling_settings(settings["sampler"], settings["sample_steps"])
    vae, unet = common.build_vae(settings), common.build_unet(settings, 6)  # 6 channels: x_t and x_hat
    vae, unet = (common.frozen(network, network.state_dict(), device) for network in (vae, unet))
    diffusion = common.Diffusion(settings["objective"], settings["start"], device)

    spaces = {"pixel": lambda n: generate_in_pixel_space(vae, unet, diffusion, settings, n, device),
              "latent": lambda n: generate(model, settings, torch.zeros(n, 0))}
    seconds = {"pixel": [], "latent": []}
    for _ in range(repeats + 1):  # in turn, so that a machine that slows down slows both; the first round warms up
        for name, sample in spaces.items():
            clock = time.time()
            sample(count)
            seconds[name].append((time.time() - clock) / count)
    rows = []
    for name, sample in spaces.items():
        # A multiply-add counts as two. Of attention only the plain form is counted on a CPU, not torch's fused one.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sample(1)
        memory = peak_memory_mb(lambda sample=sample: sample(count), device, folder / f"profile-{name}.txt")
        rows.append({"label": f"{name} space", "n_generated": count, "steps": settings["sample_steps"],
                     "seconds_per_image": statistics.median(seconds[name][1:]),
                     "peak_memory_mb": memory, "gflops_per_image": counter.get_total_flops() / 1e9})
    saved = {key: 100 * (1 - rows[1][key] / rows[0][key])
             for key in ("seconds_per_image", "peak_memory_mb", "gflops_per_image")}
    return [*rows, {"label": "saved %", "n_generated": count} | saved]


@torch.no_grad()
def ceiling(folder, model, settings, scorer):
    """A row of scores of the autoencoder's reconstructions of held-out images, which latent diffusion can hardly
    surpass. Draws reconstructions.png."""
    real = scorer.data.test.images[: settings["eval_samples"]]
    mu, _ = common.encode(model.autoencoder["encoder"], real, model.device)
    decoded = torch.cat([to_uint8(model.autoencoder["decoder"](part.to(model.device))).cpu() for part in mu.split(500)])
    common.save_grid(folder / "reconstructions.png", {"real": real[:12], "autoencoder": decoded[:12]})
    return scorer(decoded, label="ceiling")


# --- The command -----------------------------------------------------------------------------------------------------

def evaluate(folder, checkpoint, settings, scorer, device):
    """Write metrics.json and pictures of a finished model. Returns what is saved against pixel space."""
    model = load_model(checkpoint, device)
    rows, pictures = [], {}
    for label, changed, count in common.what_to_sample(settings, model.priors):
        clock = time.time()
        pictures[label], _ = generate(model, changed, draw_codes(model, changed, count))
        seconds = (time.time() - clock) / count
        steps = len(model.diffusion.times(changed)) - 1
        rows.append(scorer(pictures[label], label=label, prior="none", sampler=changed["sampler"], steps=steps,
                           nfe=steps, seconds_per_image=seconds))
    common.draw_samples(folder, {"": pictures[""]})
    rows += [ceiling(folder, model, settings, scorer), *savings(folder, model, settings)]
    common.write_metrics(folder, checkpoint, settings, scorer, rows, model.networks)
    if settings["export"]:
        common.export(folder, pictures[""])
    return rows[-1]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Bonus: diffusion in the latent space")
    common.add_flags(parser)
    args = parser.parse_args(argv)
    settings, device = common.read_settings(args)
    if args.dry_run:
        autoencoder, unet, size = build_autoencoder(settings), build_latent_unet(settings), settings["image_size"]
        image, latent = torch.zeros(1, 3, size, size), torch.zeros(1, *latent_shape(settings))
        return common.print_settings(
            settings, encoder=(autoencoder["encoder"], (image,), settings["vae_steps"], 0),
            decoder=(autoencoder["decoder"], (latent,), settings["vae_steps"], 1),
            unet=(unet, (latent, torch.ones(1)), settings["unet_steps"], settings["sample_steps_from_T"]))

    extractor = fid.load_extractor(settings["features"], args.weights, device)
    data = common.load_data(args.dataset, args.data_dir)
    settings["images"] = common.hash_images(data.train.images)
    folder = common.run_folder(settings, "bonus-autoencoder")
    base = common.finished(folder, settings, args.resume) or train_autoencoder(folder, settings, data, device)
    folder = common.run_folder(settings, "bonus-latent")
    checkpoint = (common.finished(folder, settings, args.resume)
                  or train_latent(folder, settings, base, data, device))
    if common.RANK > 0:
        return
    scorer = fid.Scorer(extractor, data)
    saved = evaluate(folder, checkpoint, settings, scorer, device)
    common.print_results(settings, scorer)
    for key in ("seconds_per_image", "peak_memory_mb", "gflops_per_image"):
        print(f"saved against pixel space: {key} {saved[key]:.0f}%")


if __name__ == "__main__":
    main()
