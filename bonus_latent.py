"""Bonus: diffusion in the latent space (Rombach et al. 2022), profiled against diffusion in pixel space.

The claim: most of an image's numbers carry detail that an autoencoder can restore. If the few numbers of its latent are
diffused instead, each of the many passes of the U-Net costs less. What the autoencoder cannot restore is lost.

    autoencoder   z = Enc(x0), (B, 4, H/4, W/4);   loss = SSE(x0, Dec(z)) + beta KL(q(z|x0) || N(0, I))
                  with a small beta. (Rombach et al. add perceptual and adversarial losses.)
    scaling       z' = (z - mean) / sd per channel, over the training set. The noise schedule is made for data of about
                  unit variance: it would add too much noise to a latent of small values, and too little to one of large
                  values. The scaling is undone before decoding.
    diffusion     The DDPM process on z', with z drawn anew from q(z|x0) in every step. The predicted z' is not clamped,
                  since it has no range like [-1, 1].
    frozen        The autoencoder is trained first; then it and the scale stay fixed. Were the encoder trained by the
                  diffusion loss, too, it could lower this loss by shrinking the latent, since the scale is fixed: the
                  noisy latent would be almost pure noise, and the U-Net could read the noise off it.

Run     python bonus_latent.py                        shapes, on a laptop
        python bonus_latent.py --dataset celeba64     faces; if there is a GPU, it is found by itself
Expect  fewer minutes of training than stage 1 (about a tenth fewer on shapes, a third on faces, half on CIFAR-10), and
        a table of scores. The scores of the autoencoder's own reconstructions, which latent diffusion can hardly
        surpass, are in metrics.json, at ["tables"]["ceiling"].
        The last line says what latent diffusion saves against stage 1's refiner, in percent, measured on the machine of
        the run (a negative number: it costs more). FLOPs are counted. Seconds are medians. Peak memory is what the GPU
        reports; on a CPU it is summed up from torch.profiler's list of allocations. torch.profiler also writes the
        costliest operators (profile-*.txt).
        On shapes, in batches, latent diffusion takes less than half of the seconds of stage 1's refiner; one image at a
        time, it takes more. Its Frechet distance is over seven times that of stage 1's images. Those begin with an
        x_hat; here everything is drawn from noise.
"""

import argparse
import itertools
import os
from functools import partial

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import common
import fid
from common import to_float, to_uint8

CHANNELS = 4  # of the latent
FACTOR = 4  # by how much the latent is smaller than the image, in each direction (Autoencoder halves it twice)
BETA = 0.01  # the autoencoder's weight of the KL: small, so that it only keeps the latent from spreading out
# The width of the autoencoder, and the table of the latent U-Net. A row of the table describes a level of the U-Net:
# how many times smaller the level is than the latent, its width, its blocks on the way down, its blocks on the way up.
# (All are our choice, even in "paper", since DiffuseVAE has no latent diffusion. Only "smoke" and "cpu" were run.)
SIZES = {
    "smoke": (16, [[1, 16, 1, 1]]),
    "cpu": (32, [[1, 96, 1, 1], [2, 128, 1, 1]]),
    "gpu": (96, [[1, 192, 2, 3], [2, 256, 2, 3]]),
    "paper": (128, [[1, 256, 2, 3], [2, 512, 2, 3]])}


# --- The model -------------------------------------------------------------------------------------------------------

class Autoencoder(nn.Module):
    """Convolutional autoencoder with a KL term: x (B, 3, H, W) <-> z (B, 4, H/4, W/4). It halves the resolution twice.
    It has no attention and no normalisation, which would mix in statistics of the whole image: so every part of the
    latent describes its own part of the image.

    (PatchConv2d is an nn.Conv2d whose window equals its stride; see section 11 of common.py.)"""

    def __init__(self, width):
        super().__init__()
        c, block = width, common.BottleneckBlock
        self.encoder = nn.Sequential(
            nn.Conv2d(3, c, 3, padding=1), block(c),  # (B, c, H, W)
            common.PatchConv2d(c, 2 * c, 2, stride=2), block(2 * c),  # (B, 2 c, H/2, W/2)
            common.PatchConv2d(2 * c, 2 * c, 2, stride=2), block(2 * c), block(2 * c),  # (B, 2 c, H/4, W/4)
            nn.Conv2d(2 * c, 2 * CHANNELS, 1))  # (B, 8, H/4, W/4): mean and log-variance
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * c, 3, padding=1), block(2 * c), block(2 * c),  # (B, 2 c, H/4, W/4)
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * c, 2 * c, 3, padding=1), block(2 * c),  # (B, 2 c, H/2, W/2)
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * c, c, 3, padding=1), block(c), block(c),  # (B, c, H, W)
            nn.Conv2d(c, 3, 3, padding=1))

    def encode(self, x0):
        """x0 (B, 3, H, W) -> mu, logvar, each (B, 4, H/4, W/4)."""
        mu, logvar = self.encoder(x0).chunk(2, 1)
        return mu.float(), logvar.float()

    def decode(self, z):
        """z (B, 4, H/4, W/4) -> x_hat (B, 3, H, W) in [-1, 1]."""
        return torch.tanh(self.decoder(z).float())

    def forward(self, x0, noise):
        """x0 (B, 3, H, W), noise (B, 4, H/4, W/4) standard normal -> x_hat, mu, logvar."""
        mu, logvar = self.encode(x0)
        return self.decode(common.reparameterise(mu, logvar, noise)), mu, logvar


def latent_shape(train):
    """(4, h, w): the shape of what is diffused."""
    return CHANNELS, train["image_size"] // FACTOR, train["image_size"] // FACTOR


def build_latent_unet(train):
    """The U-Net on latents, with attention at their full resolution (image size / 4), which is small enough for it.
    (The setting `attention` is for pixels, and not used.)"""
    size = train["image_size"] // FACTOR
    table = [(size // shrink, width, down, up) for shrink, width, down, up in train["latent_unet"]]
    return common.UNet(table, in_channels=CHANNELS, out_channels=CHANNELS, attention=[size], heads=train["heads"],
                       dropout=train["dropout"])


# --- Training --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_all(autoencoder, images, device):
    """Mean and standard deviation of q(z|x) for uint8 images (N, 3, H, W): each (N, 4, h, w), on the device. (Like
    common.encode, but with the standard deviation, and on the device.)"""
    parts = [autoencoder.encode(to_float(chunk.to(device))) for chunk in images.split(500)]
    mu, logvar = torch.cat([mu for mu, _ in parts]), torch.cat([logvar for _, logvar in parts])
    return mu, (0.5 * logvar).exp()


def train_autoencoder(folder, train, data, device):
    """Train the autoencoder with the settings of a VAE, and measure the scale of its latent. Returns the finished
    checkpoint."""
    torch.manual_seed(train["seed"])
    autoencoder = Autoencoder(train["ae_width"])
    training = common.Training(folder, train, device, data.images, steps=train["vae_steps"], flip=train["vae_flip"],
                               vae=autoencoder)  # with the settings vae_lr and so on
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        noise = training.normal(*latent_shape(train))  # (B, 4, h, w)
        with training.autocast():
            x_hat, mu, logvar = autoencoder(x0, noise)
            sse = common.squared_error(x_hat, x0)
            kl = common.gaussian_kl(mu.flatten(1), logvar.flatten(1))
        training.step(sse + BETA * kl, {"sse": sse, "kl_nats": kl})
    autoencoder = common.frozen(Autoencoder(train["ae_width"]), training.averages["vae"], device)
    # Mean and variance of z ~ q(z|x) over all training images: Var z = Var mu + mean of sd^2.
    mu, sd = encode_all(autoencoder, data.images, device)
    mean = mu.mean((0, 2, 3), keepdim=True)  # (1, 4, 1, 1)
    variance = ((mu - mean) ** 2 + sd**2).mean((0, 2, 3), keepdim=True)  # (1, 4, 1, 1)
    return training.finish(scale={"mean": mean.cpu(), "sd": variance.sqrt().cpu()})


def train_latent(folder, train, ae_state, data, device):
    """Train the U-Net on scaled latents, with the autoencoder frozen. Returns the finished checkpoint."""
    autoencoder = common.frozen(Autoencoder(train["ae_width"]), ae_state["vae"], device)
    scale = {key: value.to(device) for key, value in ae_state["scale"].items()}
    # Mirrored images are encoded, too, since a mirrored latent is not the latent of the mirrored image.
    images = torch.cat([data.images, data.images.flip(3)]) if train["unet_flip"] else data.images
    # Encoded once: mu and sd, side by side, since Training draws batches from a single tensor.
    latents = torch.cat(encode_all(autoencoder, images, device), 1)  # (N, 8, h, w)
    torch.manual_seed(train["seed"])
    unet, diffusion = build_latent_unet(train), common.Diffusion(train["objective"], device=device)
    # (Training converts only uint8 images. These latents are floats, and come back as they are.)
    training = common.Training(folder, train, device, latents, steps=train["unet_steps"], flip=False, unet=unet)
    for mu_and_sd in training:  # (B, 8, h, w)
        mu, sd = mu_and_sd.chunk(2, 1)
        z = mu + sd * training.normal(*latent_shape(train))  # (B, 4, h, w), drawn anew in every step
        scaled = ((z - scale["mean"]) / scale["sd"]).contiguous(memory_format=common.memory_format(device))
        t = diffusion.draw_t(training.uniform())  # (B,), in 1..T
        eps = training.normal(*latent_shape(train))  # (B, 4, h, w)
        with training.autocast():
            loss = diffusion.simple_loss(unet, scaled, t, eps)  # (B,)
        training.step(training.even_levels(loss, t, diffusion), {f"{train['objective']}_mse": loss})
    return training.finish(seconds_before=ae_state["seconds"],
                           vae=ae_state["vae"], scale=ae_state["scale"])


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(state, device):
    """The common.Model of a checkpoint. Its networks are the autoencoder and the U-Net."""
    train, scale = state["train"], {key: value.to(device) for key, value in state["scale"].items()}
    autoencoder = common.frozen(Autoencoder(train["ae_width"]), state["vae"], device)
    unet = common.frozen(build_latent_unet(train), state["unet"], device)
    model = common.Model("latent", device, shape=latent_shape(train),
                         diffusion=common.Diffusion(train["objective"], device=device), networks=(autoencoder, unet),
                         denoiser_for=lambda x_hat, z, clean: unet,  # nothing conditions it
                         decode=lambda scaled: autoencoder.decode(scaled * scale["sd"] + scale["mean"]))
    common.choose_precision(model)
    return model


# --- What it saves: measuring machinery, to be looked up -------------------------------------------------------------

def peak_memory(run, device):
    """Peak memory of run() in MB (of 2^20 bytes), beyond what is in use before: as the GPU counts it or, on a CPU, from
    the profiler's list of allocations."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # The profiler's raw events include one for each allocation (bytes > 0) and each release (bytes < 0). torch has no
    # public list of them. (This was tried with torch 2.6 and 2.15.)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    in_use = itertools.accumulate((event.nbytes() for event in events), initial=0)
    return max(in_use) / 2**20


class CostProbe:
    """Runs one part of sampling at a time, so that it can be measured: a pass of a U-Net whose input has the shape
    `unet_shape`, or a pass of the decoder `decode` on `code` (B, ...). In pixel space the decoder is the VAE's, which
    makes x_hat from z. In the latent space it is the autoencoder's, which makes the image from a latent."""

    def __init__(self, unet, unet_shape, decode, code, reduced):
        self.unet, self.decode, self.code = unet, decode, code
        self.device, self.reduced = code.device, reduced  # reduced: whether it runs in bfloat16
        self.x = torch.randn(len(code), *unet_shape, device=self.device)
        self.t = torch.full((len(code),), 500, device=self.device)  # no cost depends on the time

    @torch.no_grad()
    def evaluate_unet(self, n):
        with common.autocast(self.device, self.reduced):
            self.unet(self.x[:n], self.t[:n])

    @torch.no_grad()
    def decode_codes(self, n):
        with common.autocast(self.device, self.reduced):
            self.decode(self.code[:n])


def write_profile(path, probe, batch):
    """The table of torch.profiler: the costliest operators of one pass of the U-Net."""
    activities = [ProfilerActivity.CPU]
    if probe.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        probe.evaluate_unet(batch)
    where = "cuda" if probe.device.type == "cuda" else "cpu"
    table = profiler.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=12)
    common.write(path, table.encode())


def all_costs(probes, steps, batch):
    """What each of {name: CostProbe} costs: {name: costs}. The seconds and GFLOPs of an image are those of one pass of
    the U-Net, times steps[name], plus those of decoding. Seconds are measured twice: image by image (n = 1), and in
    batches (n = batch). All probes are timed in turn. The peak memory is that of one pass or that of decoding,
    whichever is larger."""
    device = probes["pixel"].device
    costs = {name: {} for name in probes}
    for key, n in (("seconds_per_image_batch_1", 1), ("seconds_per_image", batch)):
        passes = {name: partial(probe.evaluate_unet, n) for name, probe in probes.items()}
        decodings = {name: partial(probe.decode_codes, n) for name, probe in probes.items()}
        one_pass, decoding = common.time_in_turn(passes, device), common.time_in_turn(decodings, device)
        for name in probes:
            costs[name][key] = (steps[name] * one_pass[name] + decoding[name]) / n
    for name, probe in probes.items():
        pass_gflops = common.count_gflops(partial(probe.evaluate_unet, 1))
        decoding_gflops = common.count_gflops(partial(probe.decode_codes, 1))
        pass_memory = peak_memory(partial(probe.evaluate_unet, batch), device)
        decoding_memory = peak_memory(partial(probe.decode_codes, batch), device)
        costs[name] |= {"peak_memory_mb": max(pass_memory, decoding_memory),
                        "gflops_per_pass": pass_gflops,
                        "gflops_per_image": steps[name] * pass_gflops + decoding_gflops}
    return costs


def savings(folder, model, train, setup):
    """Latent against pixel space on this machine, with equally many steps (if `start` allows them): the costs of both,
    and what is saved in percent. The pixel network is stage 1's refiner; no cost depends on its weights. The two U-Nets
    differ in size: each is the one that this budget uses. Writes profile-pixel.txt and profile-latent.txt."""
    device, size = model.device, train["image_size"]
    steps, batch = setup.evaluation["sample_steps"], setup.evaluation["batch"]
    pixel_unet, vae = common.build_unet(train, 6), common.build_vae(train)  # 6 channels: x_t and x_hat
    # To put them on the device, they are frozen with the random weights that they have.
    pixel_unet = common.frozen(pixel_unet, pixel_unet.state_dict(), device)
    vae = common.frozen(vae, vae.state_dict(), device)
    z = torch.randn(batch, vae.latent_dim, device=device)
    latent = torch.randn(batch, *model.shape, device=device)
    _, latent_unet = model.networks
    probes = {"pixel": CostProbe(pixel_unet, (6, size, size), vae.decoder, z, model.reduced),
              "latent": CostProbe(latent_unet, model.shape, model.decode, latent, model.reduced)}
    for name, probe in probes.items():
        write_profile(folder / f"profile-{name}.txt", probe, batch)
    # The pixel model begins at x_hat, at time `start`, and cannot have more steps than that. The latent model begins at
    # T.
    costs = all_costs(probes, {"pixel": min(steps, train["start"]), "latent": steps}, batch)
    saved = {key: 100 * (1 - costs["latent"][key] / costs["pixel"][key]) for key in costs["pixel"]
             if costs["pixel"][key] > 0}  # the profiler sees no memory of some devices (mps)
    return {"device": str(device), "sampler_steps": steps, "batch": batch, **costs, "saved_percent": saved}


@torch.no_grad()
def ceiling(folder, model, setup):
    """Scores of the autoencoder's reconstructions of held-out images. Latent diffusion can hardly be better. Writes
    reconstructions.png."""
    autoencoder, real = model.networks[0], setup.test.images[: setup.evaluation["count"]]
    mu, _ = encode_all(autoencoder, real, setup.device)
    decoded = torch.cat([to_uint8(autoencoder.decode(part)).cpu() for part in mu.split(500)])
    common.save_grid(folder / "reconstructions.png", {"real": real[:12], "autoencoder": decoded[:12]})
    return setup.score(decoded) | {"images": len(real), "hf_energy": fid.hf_energy(decoded, setup.test.images),
                                   "psnr_db": fid.psnr_db(decoded, real)}


# --- The command -----------------------------------------------------------------------------------------------------

def main(argv=None):
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch.profiler prints lines about itself
    parser = argparse.ArgumentParser(description="Bonus: diffusion in the latent space")
    common.add_flags(parser)
    args = parser.parse_args(argv)
    # --set refuses these settings, since they change nothing that is trained here: the autoencoder's weight of the KL
    # is BETA, above; its networks never pool; diffusion begins at T; and there is no mixture, no flow and no guide.
    train, evaluation, device = common.read_settings(
        args, unused=("beta", "start", "pool", "guidance", "components", "tied", "flow_steps"))
    # Settings come from three places: `train` from the budget, args.changes from --set, and `own` from this stage: the
    # sizes of its networks. folder_and_settings, below, adds args.changes to the settings of the run.
    width, table = SIZES[train["budget"]]
    own = {"ae_width": width, "latent_unet": table}
    if args.dry_run:
        return common.print_settings(train | own | args.changes, evaluation)
    setup = fid.Setup(args, train, evaluation, device)
    ae_folder, ae_settings = setup.folder_and_settings("bonus-ae", ignored=common.OF_UNET)
    ae_settings |= own
    ae_state = (common.finished_state(ae_folder, ae_settings, args.resume)
                or train_autoencoder(ae_folder, ae_settings, setup.data, device))
    folder, settings = setup.folder_and_settings("bonus-latent")
    settings |= own
    state = (common.finished_state(folder, settings, args.resume)
             or train_latent(folder, settings, ae_state, setup.data, device))
    model = load_model(state, device)
    model.temperature = setup.evaluation["temperature"]  # factor of eps in x_start
    metrics = fid.evaluate(folder, setup, state, model)
    tables = metrics["tables"]
    if "savings" not in tables:  # both tables are there if this run was measured before
        tables["ceiling"] = ceiling(folder, model, setup)
        tables["savings"] = savings(folder, model, settings, setup)
        common.write_json(folder / "metrics.json", metrics)
    if args.export:
        common.export(args, folder, model, setup.evaluation)
    fid.print_results({folder: metrics}, setup)
    found = tables["savings"]
    print(f"\nsaved against pixel space ({found['device']}, {found['sampler_steps']} steps, batch {found['batch']}): "
          + ", ".join(f"{key.replace('_', ' ')} {value:.0f}%" for key, value in found["saved_percent"].items()))


if __name__ == "__main__":
    main()
