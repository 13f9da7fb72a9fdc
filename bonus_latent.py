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
        stage 1's refiner in percent, measured on this machine: some 40% of the seconds, 70% of the memory. `ceiling`
        in metrics.json has the scores of the autoencoder's own reconstructions, which latent diffusion can hardly
        surpass. torch.profiler's tables of the costliest operators are in profile-pixel.txt and profile-latent.txt.
"""

import argparse
import itertools
import statistics
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import common
import fid
from common import to_uint8

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
    autoencoder = build_autoencoder(settings)
    training = common.Training(folder, settings, device, data.train.images, steps=settings["vae_steps"],
                               flip=settings["vae_flip"], vae=autoencoder)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        noise = training.normal(*latent_shape(settings))  # (B, 4, h, w)
        with common.autocast(device):
            mu, logvar = autoencoder["encoder"](x0)
            x_hat = autoencoder["decoder"](common.reparameterise(mu, logvar, noise))
            sse = common.squared_error(x_hat, x0)
            kl = common.gaussian_kl(mu, logvar)
        training.step(sse + BETA * kl, {"sse": sse, "kl_nats": kl})
    autoencoder = common.frozen(build_autoencoder(settings), training.averages["vae"], device)

    # Mean and variance of z ~ q(z|x) over all training images: Var z = Var mu + mean of exp(logvar).
    mu, logvar = common.encode(autoencoder["encoder"], data.train.images, device)
    mean = mu.mean((0, 2, 3), keepdim=True)  # (1, 4, 1, 1)
    variance = ((mu - mean) ** 2 + logvar.exp()).mean((0, 2, 3), keepdim=True)  # (1, 4, 1, 1)
    return training.finish(mean=mean, sd=variance.sqrt())


def train_latent(folder, settings, base, data, device):
    """Train the U-Net on scaled latents, with the autoencoder of the checkpoint `base` frozen. Returns its checkpoint.
    """
    autoencoder = common.frozen(build_autoencoder(settings), base["vae"], device)

    # Mirrored images are encoded, too, since a mirrored latent is not the latent of the mirrored image.
    images = data.train.images
    images = torch.cat([images, images.flip(3)]) if settings["unet_flip"] else images
    mu, logvar = common.encode(autoencoder["encoder"], images, device)

    # Scaled once. A Training draws batches from a single tensor, so mean and log-variance lie side by side.
    latents = torch.cat([(mu - base["mean"]) / base["sd"], logvar - 2 * base["sd"].log()], 1)  # (N, 8, h, w)
    torch.manual_seed(settings["seed"])
    unet = build_latent_unet(settings)
    diffusion = common.Diffusion(settings["objective"], device=device)
    training = common.Training(folder, settings, device, latents, steps=settings["unet_steps"], flip=False, unet=unet)
    for latent in training:  # (B, 8, h, w)
        mu, logvar = latent.chunk(2, 1)
        z = common.reparameterise(mu, logvar, training.normal(*latent_shape(settings)))  # (B, 4, h, w), a new draw
        t = diffusion.draw_t(training.uniform())  # (B,), in 1..T
        eps = training.normal(*latent_shape(settings))  # (B, 4, h, w)
        with common.autocast(device):
            mse = diffusion.simple_loss(unet, z.contiguous(memory_format=torch.channels_last), t, eps)  # (B,)
        training.step(common.level_weight(settings, diffusion, t) * mse, {f"{settings['objective']}_mse": mse})
    return training.finish(base, **{key: base[key] for key in ("vae", "mean", "sd")})


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(checkpoint, device):
    """The common.Model of a checkpoint. Its networks are the autoencoder and the U-Net."""
    settings = checkpoint["settings"]
    mean = checkpoint["mean"].to(device)
    sd = checkpoint["sd"].to(device)
    autoencoder = common.frozen(build_autoencoder(settings), checkpoint["vae"], device)
    unet = common.frozen(build_latent_unet(settings), checkpoint["unet"], device)
    return common.Model(device, shape=latent_shape(settings), networks=(autoencoder, unet),
                        diffusion=common.Diffusion(settings["objective"], device=device),
                        denoiser=lambda x_hat, z: unet,  # nothing conditions it
                        decode=lambda scaled: autoencoder["decoder"](scaled * sd + mean))


def pixel_model(settings, device):
    """A VAE and a refiner as in stage 1, with random weights: no cost depends on them."""
    vae, unet = common.build_vae(settings), common.build_unet(settings, 6)  # 6 channels: x_t and x_hat
    vae, unet = (common.frozen(network, network.state_dict(), device) for network in (vae, unet))
    size = settings["image_size"]
    return common.Model(device, shape=(3, size, size), networks=(vae, unet), vae=vae,
                        priors={"gaussian": common.GaussianMixture.standard_normal(vae.latent_dim)},
                        diffusion=common.Diffusion(settings["objective"], device=device, start=settings["start"]),
                        denoiser=lambda x_hat, z: lambda x, t: unet(torch.cat([x, x_hat], 1), t))


# --- What it saves ---------------------------------------------------------------------------------------------------

def seconds_per_image(models, settings, repeats=5):
    """The median seconds per image of each of {name: model}, in batches of settings["eval_batch"]. The models sample in
    turn, so that a machine that slows down slows all of them. The first round warms up."""
    seconds = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            clock = time.time()
            common.generate(model, settings)
            seconds[name].append((time.time() - clock) / settings["eval_samples"])
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak_memory_mb(model, settings, path):
    """Peak memory of sampling one batch in MB (of 2^20 bytes), beyond what is in use before. Writes torch.profiler's
    table of the costliest operators."""
    cuda = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with profile(activities=activities, profile_memory=True) as profiler:
        common.generate(model, settings)
    table = profiler.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=12)
    common.write(path, table.encode())
    if cuda:
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    # The profiler's raw events include one for each allocation (bytes > 0) and each release (bytes < 0).
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2**20


def savings(folder, model, settings):
    """Latent against pixel space on this machine, with equally many steps: seconds, memory and operations of sampling
    with both, and what is saved in percent. The two U-Nets are those that the budget uses."""
    models = {"pixel": pixel_model(settings, model.device), "latent": model}
    batch = settings | {"prior": "gaussian", "eval_samples": settings["eval_batch"]}
    seconds = seconds_per_image(models, batch)
    table = {"device": str(model.device), "steps": settings["sample_steps"], "batch": settings["eval_batch"]}
    for name in models:
        # A multiply-add counts as two. Of attention only the plain form is counted on a CPU, not torch's fused one.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            common.generate(models[name], batch | {"eval_samples": 1})
        table[name] = {"seconds_per_image": seconds[name],
                       "peak_memory_mb": peak_memory_mb(models[name], batch, folder / f"profile-{name}.txt"),
                       "gflops_per_image": counter.get_total_flops() / 1e9}
    table["saved_percent"] = {key: 100 * (1 - table["latent"][key] / value) for key, value in table["pixel"].items()}
    return table


@torch.no_grad()
def ceiling(folder, model, settings, scorer):
    """Scores of the autoencoder's reconstructions of held-out images. Draws reconstructions.png."""
    autoencoder = model.networks[0]
    real = scorer.data.test.images[: settings["eval_samples"]]
    mu, _ = common.encode(autoencoder["encoder"], real, model.device)
    decoded = torch.cat([to_uint8(autoencoder["decoder"](part.to(model.device))).cpu() for part in mu.split(500)])
    common.save_grid(folder / "reconstructions.png", {"real": real[:12], "autoencoder": decoded[:12]})
    return scorer(decoded) | {"images": len(real)}


# --- The command -----------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description="Bonus: diffusion in the latent space")
    common.add_flags(parser)
    args = parser.parse_args(argv)
    settings, device = common.read_settings(args)
    if args.dry_run:
        return common.print_settings(settings, autoencoder=build_autoencoder(settings),
                                     unet=build_latent_unet(settings))

    scorer = fid.load_scorer(args, settings, device)
    folder = common.run_folder(settings, "bonus-autoencoder")
    base = (common.finished(folder, settings, args.resume)
            or train_autoencoder(folder, settings, scorer.data, device))
    folder = common.run_folder(settings, "bonus-latent")
    checkpoint = (common.finished(folder, settings, args.resume)
                  or train_latent(folder, settings, base, scorer.data, device))
    model = load_model(checkpoint, device)
    rows = fid.score(folder, model, settings, scorer)
    tables = {"robustness": fid.robustness(folder, model, settings, scorer),
              "ceiling": ceiling(folder, model, settings, scorer),
              "savings": savings(folder, model, settings)}
    fid.write_metrics(folder, checkpoint, model, settings, scorer, rows, tables)
    fid.print_results(settings, scorer)
    for key, percent in tables["savings"]["saved_percent"].items():
        print(f"saved against pixel space: {key} {percent:.0f}%")


if __name__ == "__main__":
    main()
