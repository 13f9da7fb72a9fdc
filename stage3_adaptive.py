"""Stage 3: a flow prior over z, and refinement that depends on how sure the VAE is.

Two hypotheses. First, the codes of a trained VAE do not follow N(0, I), so codes drawn from N(0, I) are unlike those
that the decoder was trained on. A normalising flow (RealNVP, Dinh et al. 2017) can learn their distribution and be the
prior instead. Second, where the VAE is unsure its x_hat is misleading. There the refiner should rely less on x_hat, and
needs more steps. Elsewhere refinement may not be needed at all.

The flow prior
    u = f(z) with an invertible network f, and log p(z) = log N(u; 0, I) + log |det df/dz|.
    VAE and flow are trained together. In the first 60% of the steps the VAE has the KL to N(0, I), as in stage 1, and
    the flow is fitted to its codes. (At first, the flow is no prior worth following.) In the last 40% the KL to the
    flow takes the place of the KL to N(0, I). Then the VAE is finished, and the flow is fitted further to its codes.
    The rival is the Gaussian mixture of stage 1, fitted to the same codes.

Uncertainty
    s says how large an error of x_hat is to be expected: (B,), with mean 0 and standard deviation 1 over training
    images. When images are generated there is no x to compare x_hat with, so s is computed from z and x_hat = Dec(z).
    `--uncertainty` says how.
        regressed   a small network of z, fitted to log |x_hat - x0|^2 of training images
        posterior   the mean log-variance of q(z|x), the obvious measure. It needs x, and Enc(x_hat) takes its place.

Conditioning (`--conditioning`): what the U-Net is shown. (x_start, with which sampling begins, keeps the whole x_hat.)
    fixed      x_hat as it is. This is stage 1.
    fade       x_hat exp(-max(s, 0) / 2), so that x_hat fades to grey if the VAE is unsure. Nothing is learned.
    film       A linear function of s is added to the time embedding, which shifts the features of every block (after
               FiLM, Perez et al. 2018), and 1 + tanh of another one scales the colours of x_hat. At first both change
               nothing.
    coupling   x_hat goes through an invertible network driven by s (coupling layers, as in a flow), which can change
               x_hat but cannot lose what it shows. It starts as the identity. Unlike the flow prior it needs no
               log-determinant: a prior is a density, a condition may be any function of x_hat.

Strategies: once an image has its s, refinement can be spent where it is needed. `strategies` compares refining all
images, steps by s, and refining only the third of the images that the VAE is unsure of. The control is the same with
the s of another image.

Run     python stage3_adaptive.py                                     flow prior, film conditioning, shapes
        python stage3_adaptive.py --prior gmm                         the same networks, codes from the mixture
        python stage3_adaptive.py --conditioning fixed
        python stage3_adaptive.py --dataset celeba64                  on faces; uses the GPU, if there is one
Expect  on shapes, one and a half times the minutes of stage 1. All conditionings share one VAE. The flow draws better
        codes than N(0, I), but worse ones than the mixture. The command prints how well s ranks the errors of held-out
        images (a rank correlation of about 0.9 on shapes), and a table of the strategies. In uncertainty.png and
        generated-gmm.png images are sorted by s: spotted shapes are on the right.
"""

import argparse
import math
import time
from types import SimpleNamespace

import torch
from scipy.stats import spearmanr
from torch import nn

import common
import fid
from common import randn, to_float, to_uint8

# --- The flow prior --------------------------------------------------------------------------------------------------

class Coupling(nn.Module):
    """Affine coupling layer (RealNVP eq. 7-8): the first half of z (B, d) stays, and decides by how much the second
    half is scaled and shifted. The log-scale lies within -2..2, so that no coupling can blow up. The last linear
    layer starts at zero, so the coupling starts as the identity."""

    def __init__(self, d, hidden):
        super().__init__()
        self.half = d // 2
        self.net = nn.Sequential(nn.Linear(self.half, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                 common.zero_init(nn.Linear(hidden, 2 * (d - self.half))))

    def log_scale_and_shift(self, first):
        """The half that stays (B, half) -> log-scale and shift of the other half, each (B, d - half)."""
        raw, shift = self.net(first).chunk(2, 1)
        return 2 * torch.tanh(raw / 2), shift  # a log-scale with the slope 1 at 0 and the limits -2 and 2

    def forward(self, z):
        """z (B, d) -> output (B, d), log |det| (B,)."""
        first, second = z[:, : self.half], z[:, self.half :]
        log_scale, shift = self.log_scale_and_shift(first)
        return torch.cat([first, second * log_scale.exp() + shift], 1), log_scale.sum(1)

    def inverse(self, u):
        first, second = u[:, : self.half], u[:, self.half :]
        log_scale, shift = self.log_scale_and_shift(first)
        return torch.cat([first, (second - shift) * (-log_scale).exp()], 1)


class RealNVP(nn.Module):
    """A normalising flow u = f(z) with N(0, I) over u. As a prior it has log_prob and sample.

    A coupling transforms only one half of the dimensions. Before couplings 0, 2, ... a fixed random permutation chooses
    the halves; before couplings 1, 3, ... the two halves are swapped. So every dimension is transformed."""

    def __init__(self, d, hidden=128, couplings=6):
        super().__init__()
        self.d = d
        self.couplings = nn.ModuleList(Coupling(d, hidden) for _ in range(couplings))
        gen = common.generator(0, "flow permutations")
        swapped = torch.arange(d).roll(-(d // 2))  # the second half of the dimensions first
        orders = [torch.randperm(d, generator=gen) if i % 2 == 0 else swapped for i in range(couplings)]
        self.register_buffer("orders", torch.stack(orders), persistent=False)  # always the same, so not saved

    def forward(self, z):
        """z (B, d) -> u (B, d), log |det du/dz| (B,). In float32: a log-determinant is a sum of many small terms."""
        log_det_sum = 0
        with torch.autocast(z.device.type, enabled=False):
            for order, coupling in zip(self.orders, self.couplings, strict=True):
                z, log_det = coupling(z[:, order])
                log_det_sum = log_det_sum + log_det
        return z, log_det_sum

    def inverse(self, u):
        for order, coupling in zip(self.orders.flip(0), reversed(self.couplings), strict=True):
            u = coupling.inverse(u)[:, order.argsort()]  # argsort gives the inverse of a permutation
        return u

    def log_prob(self, z):
        """Log density: (N, d) -> (N,) nats."""
        u, log_det = self(z.to(self.orders.device))  # the device of the flow
        return -0.5 * (u**2).sum(1) - 0.5 * self.d * math.log(2 * math.pi) + log_det

    @torch.no_grad()
    def sample(self, count, gen):
        """`count` draws (count, d) on the CPU, from a CPU generator."""
        return self.inverse(torch.randn(count, self.d, generator=gen).to(self.orders.device)).cpu()


def fit_flow(flow, mu, logvar, settings, batch=256):
    """Fit a flow further to codes z ~ N(mu, exp(logvar)), with mu and logvar (N, d), by maximum likelihood. The codes
    are drawn anew in each step, so that the flow cannot learn the noise of one draw. All this happens on the CPU."""
    flow = flow.cpu().train()
    gen = common.generator(settings["seed"], "flow")
    steps = settings["flow_steps"]
    optimizer = torch.optim.Adam(flow.parameters())
    for step in common.bar(range(steps), desc="fitting the flow"):
        optimizer.param_groups[0]["lr"] = 1e-3 * common.rate_factor(step, steps, settings)
        index = torch.randint(len(mu), (batch,), generator=gen)
        z = common.reparameterise(mu[index], logvar[index], randn((batch, mu.shape[1]), gen))
        loss = -flow.log_prob(z).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    return flow.eval().requires_grad_(False)


# --- Uncertainty -----------------------------------------------------------------------------------------------------

KINDS = "regressed", "posterior"

class Uncertainty(nn.Module):
    """s (B,), from codes z (B, d) and x_hat (B, 3, H, W): `raw`, standardised and limited to -3..3."""

    def __init__(self, kind, d, hidden=128):
        super().__init__()
        self.kind = kind
        if kind == "regressed":
            self.regressor = nn.Sequential(nn.Linear(d, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                           nn.Linear(hidden, 1))
        self.register_buffer("mean", torch.zeros(()))  # of `raw`, over training images
        self.register_buffer("sd", torch.ones(()))

    def raw(self, vae, z, x_hat):
        """In float32: the log-variances of different images differ by little."""
        with torch.autocast(z.device.type, enabled=False):
            if self.kind == "regressed":
                return self.regressor(z)[:, 0]
            _, logvar = vae.encoder(x_hat)
            return logvar.mean(1)

    def forward(self, vae, z, x_hat):
        return ((self.raw(vae, z, x_hat) - self.mean) / self.sd).clamp(-3, 3)


@torch.no_grad()
def decode(vae, z, measure, device):
    """Codes z (N, d) -> x_hat = Dec(z), uint8 (N, 3, H, W), and measure(vae, z, x_hat), (N,), both on the CPU."""
    images, numbers = [], []
    for part in z.to(device).split(100):
        x_hat = vae.decoder(part)
        images.append(to_uint8(x_hat).cpu())
        numbers.append(measure(vae, part, x_hat).cpu())
    return torch.cat(images), torch.cat(numbers)


def fit_uncertainty(kind, vae, images, settings, device, batch=256):
    """The Uncertainty of a kind, fitted to uint8 images (N, 3, H, W). A regression sees codes that are drawn anew
    in each step; its target is the error of the mean code's x_hat."""
    mu, logvar = (x.to(device) for x in common.encode(vae.encoder, images, device))  # (N, d)
    uncertainty = Uncertainty(kind, mu.shape[1]).to(device)
    x_hat, raw = decode(vae, mu, uncertainty.raw, device)
    if kind == "regressed":
        log_error = common.squared_error(to_float(x_hat), to_float(images)).log().to(device)  # (N,)
        gen = common.generator(settings["seed"], "uncertainty", device)
        optimizer = torch.optim.Adam(uncertainty.parameters())
        steps = settings["flow_steps"]
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * common.rate_factor(step, steps, settings)
            index = torch.randint(len(mu), (batch,), generator=gen, device=device)
            z = common.reparameterise(mu[index], logvar[index], randn((batch, mu.shape[1]), gen))
            loss = (uncertainty.raw(vae, z, None) - log_error[index]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        raw = uncertainty.raw(vae, mu, None).detach()
    uncertainty.mean = raw.mean()
    uncertainty.sd = raw.std()
    return uncertainty.cpu()


# --- Conditioning ----------------------------------------------------------------------------------------------------

class ImageCoupling(nn.Module):
    """Affine coupling layer on images (B, 3, H, W). Of the pixels of a checkerboard, those of one `parity` (0 or 1)
    stay. A small network sees them and s (B,), and scales and shifts the others. It can be inverted, and starts as the
    identity."""

    def __init__(self, parity, width=16):
        super().__init__()
        self.parity = parity
        self.net = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.SiLU(),
                                 common.zero_init(nn.Conv2d(width, 6, 3, padding=1)))

    def forward(self, x, s):
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
        stays = ((rows[:, None] + columns) % 2 == self.parity).to(x.dtype)  # (H, W)
        s_map = s[:, None, None, None].expand(-1, 1, *x.shape[2:])  # (B, 1, H, W)
        raw, shift = self.net(torch.cat([x * stays, s_map], 1)).chunk(2, 1)  # each (B, 3, H, W)
        log_scale = torch.tanh(raw).float() * (1 - stays)  # within -1..1, and 0 where pixels stay
        return x * log_scale.exp() + shift.float() * (1 - stays)


class Conditioner(nn.Module):
    """A conditioning strategy: from x_hat (B, 3, H, W) and s (B,) it makes the image that the U-Net sees beside x_t,
    and an addition to the U-Net's time embedding (B, emb_dim), or None."""

    def __init__(self, conditioning, emb_dim):
        super().__init__()
        self.conditioning = conditioning
        if conditioning == "film":
            self.film = common.zero_init(nn.Linear(1, emb_dim))
            self.gate = common.zero_init(nn.Linear(1, 3))
        if conditioning == "coupling":
            self.couplings = nn.ModuleList(ImageCoupling(i % 2) for i in range(4))

    def forward(self, x_hat, s):
        if self.conditioning == "fade":
            return x_hat * torch.exp(-0.5 * s.clamp(min=0))[:, None, None, None], None
        if self.conditioning == "film":
            factor = 1 + torch.tanh(self.gate(s[:, None]))  # (B, 3)
            return x_hat * factor[:, :, None, None], self.film(s[:, None])
        if self.conditioning == "coupling":
            for coupling in self.couplings:
                x_hat = coupling(x_hat, s)
        return x_hat, None


def build_refiner(settings, conditioning):
    """The U-Net and the conditioner, trained as one network."""
    emb_dim = 4 * settings["unet_table"][0][1]  # of the U-Net's time embedding: four times its first width
    return nn.ModuleDict({"unet": common.build_unet(settings, 6), "conditioner": Conditioner(conditioning, emb_dim)})


# --- Training --------------------------------------------------------------------------------------------------------

def gaussian_log_prob(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over the dimensions of (B, d): (B,) nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(1)


def build_vae_and_flow(settings):
    """The VAE and its flow, trained as one network with the settings vae_*."""
    vae = common.build_vae(settings)
    return nn.ModuleDict({"vae": vae, "flow": RealNVP(vae.latent_dim)})


def train_vae(folder, settings, data, device):
    """Train the VAE and its flow. Then fit to the finished VAE: the flow, the mixture and both kinds of uncertainty.
    Returns the checkpoint."""
    torch.manual_seed(settings["seed"])
    both = build_vae_and_flow(settings).to(device, memory_format=torch.channels_last)
    vae, flow, beta = both["vae"], both["flow"], settings["beta"]
    optimizer = common.Optimizer(both, settings, "vae")
    average = common.MovingAverage(both, settings["vae_ema"])
    images = data.train.images.to(device)
    gen = common.generator(settings["seed"], f"training, process {common.RANK}", device)
    steps = settings["vae_steps"]
    progress = common.Progress(folder, settings, steps, gen, both=both, optimizer=optimizer, average=average)
    for step in progress:
        x0 = common.draw_batch(images, settings, gen, settings["vae_flip"])  # (B, 3, H, W) in [-1, 1]
        noise = randn((len(x0), vae.latent_dim), gen)
        with common.autocast(device):
            mu, logvar = vae.encoder(x0)
            z = common.reparameterise(mu, logvar, noise)  # (B, d)
            x_hat = vae.decoder(z)
        sse, kl = common.squared_error(x_hat, x0), common.gaussian_kl(mu, logvar)  # (B,)
        log_q = gaussian_log_prob(z, mu, logvar)  # (B,)
        if step < 0.6 * steps:  # 1) the VAE has the KL to N(0, I); the flow is fitted to its codes
            log_p = flow.log_prob(z.detach())
            loss = sse + beta * (kl - log_p)
        else:  # 2) the KL to the flow, estimated from one z, takes its place
            log_p = flow.log_prob(z)
            loss = sse + beta * (log_q - log_p)
        optimizer.zero_grad()
        loss.mean().backward()
        common.average_gradients(both)
        nn.utils.clip_grad_norm_(both.parameters(), settings["vae_clip"])
        optimizer.step(common.rate_factor(step, steps, settings))
        average.update(step)
        progress.log(sse=sse, kl_nats=kl, kl_flow_nats=log_q - log_p)
    both.load_state_dict(average.weights)
    vae = vae.eval().requires_grad_(False)
    mu, logvar = common.encode(vae.encoder, data.train.images, device)
    flow = fit_flow(flow, mu, logvar, settings)
    uncertainties = {kind: fit_uncertainty(kind, vae, data.train.images, settings, device).state_dict()
                     for kind in KINDS}
    return progress.finish(vae=vae.state_dict(), flow=flow.state_dict(), uncertainty=uncertainties,
                           gmm=common.fit_mixture(vae, data.train.images, settings, device))


def train_refiner(folder, settings, conditioning, kind, base, data, device):
    """Train a refiner behind the frozen VAE of the checkpoint `base`. `kind` is that of the uncertainty. Returns its
    checkpoint, which contains the VAE as well."""
    torch.manual_seed(settings["seed"])
    refiner = build_refiner(settings, conditioning).to(device, memory_format=torch.channels_last)
    optimizer = common.Optimizer(refiner, settings, "unet")
    average = common.MovingAverage(refiner, settings["unet_ema"])
    vae = common.frozen(common.build_vae(settings), base["vae"], device)
    uncertainty = load_uncertainty(kind, vae, base, device)
    diffusion = common.Diffusion(settings["objective"], settings["start"], device)
    images = data.train.images.to(device)
    gen = common.generator(settings["seed"], f"training, process {common.RANK}", device)
    steps = settings["unet_steps"]
    progress = common.Progress(folder, settings, steps, gen, refiner=refiner, optimizer=optimizer, average=average)
    for step in progress:
        x0 = common.draw_batch(images, settings, gen, settings["unet_flip"])  # (B, 3, H, W) in [-1, 1]
        t = diffusion.draw_t(len(x0), gen)  # (B,), in 1..start
        eps = randn(x0.shape, gen)
        x_t = diffusion.q_sample(x0, t, eps)  # (B, 3, H, W)
        with common.autocast(device):
            with torch.no_grad():
                mu, logvar = vae.encoder(x0)
                z = common.reparameterise(mu, logvar, randn(mu.shape, gen))  # (B, d)
                x_hat = vae.decoder(z)  # (B, 3, H, W)
                s = uncertainty(vae, z, x_hat)  # (B,)
            shown, extra = refiner["conditioner"](x_hat, s)
            prediction = refiner["unet"](torch.cat([x_t, shown], 1), t, extra)
        mse = (prediction - diffusion.target(x0, t, eps)).square().flatten(1).mean(1)  # (B,)
        loss = mse * diffusion.level_weight(t) if settings["even_levels"] else mse
        optimizer.zero_grad()
        loss.mean().backward()
        common.average_gradients(refiner)
        nn.utils.clip_grad_norm_(refiner.parameters(), settings["unet_clip"])
        optimizer.step(common.rate_factor(step, steps, settings))
        average.update(step)
        progress.log(mse=mse)
    return progress.finish(base, conditioning=conditioning, kind=kind, refiner=average.weights,
                           **{key: base[key] for key in ("vae", "flow", "gmm", "uncertainty")})


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_uncertainty(kind, vae, base, device):
    """The Uncertainty of a kind that was fitted to the VAE of the checkpoint `base`."""
    return common.frozen(Uncertainty(kind, vae.latent_dim), base["uncertainty"][kind], device)


def load_model(checkpoint, device):
    """The networks of a checkpoint, with the priors over z and, of a refiner, the diffusion."""
    settings = checkpoint["settings"]
    vae, priors = common.load_vae(checkpoint, device)
    flow = common.frozen(RealNVP(vae.latent_dim), checkpoint["flow"], device)
    model = SimpleNamespace(settings=settings, device=device, vae=vae, networks=[vae, flow],
                            priors=priors | {"flow": flow}, refines="conditioning" in checkpoint)
    if model.refines:
        refiner = build_refiner(settings, checkpoint["conditioning"])
        model.refiner = common.frozen(refiner, checkpoint["refiner"], device)
        model.uncertainty = load_uncertainty(checkpoint["kind"], vae, checkpoint, device)
        model.diffusion = common.Diffusion(settings["objective"], settings["start"], device)
        model.networks.append(model.refiner)
    return model


def draw_codes(model, settings, count):
    """`count` codes from the prior of the settings, (count, d)."""
    return model.priors[settings["prior"]].sample(count, common.generator(settings["seed"], "codes"))


@torch.no_grad()
def generate(model, settings, z, corrupt=None, shuffle_s=False):
    """Codes z (N, d) -> x_hat and the refined images, each uint8 (N, 3, H, W) on the CPU. (Of the VAE alone they are
    the same.) `corrupt`, a function, spoils x_hat before it is refined. With `shuffle_s`, a control, each image is
    refined with the s of another one."""
    times = model.diffusion.times(settings) if model.refines else []  # falling from start to 0
    before, after = [], []
    for first in common.bar(range(0, len(z), settings["eval_batch"]), desc="sampling"):
        codes = z[first : first + settings["eval_batch"]].to(model.device)  # (B, d)
        gen = common.generator(settings["seed"], f"noise {first}")
        with common.autocast(model.device):
            x_hat = model.vae.decoder(codes)
            x = x_hat = corrupt(x_hat) if corrupt else x_hat
            if times:
                s = model.uncertainty(model.vae, codes, x_hat).roll(1 if shuffle_s else 0)  # (B,)
                shown, extra = model.refiner["conditioner"](x_hat, s)
                noise = randn(x_hat.shape, gen).to(model.device)
                x = model.diffusion.x_start(x_hat, noise, settings["temperature"])
            x0 = None
            for i in range(len(times) - 1):
                t = torch.full((len(x),), times[i], device=model.device)  # (B,)
                prediction = model.refiner["unet"](torch.cat([x, shown], 1), t, extra)
                x0_before, x0 = x0, model.diffusion.to_x0(prediction, x, t)
                x = model.diffusion.step(settings["sampler"], x, x0, times, i, x0_before, gen)
        before.append(to_uint8(x_hat).cpu())
        after.append(to_uint8(x).cpu())
    return torch.cat(before), torch.cat(after)


# --- What is measured ------------------------------------------------------------------------------------------------

def evaluate(folder, checkpoint, settings, scorer, device):
    """Write metrics.json and pictures of a finished model, with the rows of stage 1 and, of a refiner, those of the
    functions below. Returns the rows."""
    model = load_model(checkpoint, device)
    rows, pictures = [], {}
    for label, changed, count in common.what_to_sample(settings, model.priors, model.refines):
        z = draw_codes(model, changed, count)
        clock = time.time()
        x_hat, images = generate(model, changed, z)
        seconds = (time.time() - clock) / count
        steps = len(model.diffusion.times(changed)) - 1 if model.refines else 0
        rows.append(scorer(images, label=label, prior=changed["prior"], steps=steps, nfe=steps,
                           sampler=changed["sampler"] if model.refines else "none", seconds_per_image=seconds))
        pictures[label] = x_hat, images
    x_hat, images = pictures[""]
    if model.refines:
        rows.append(scorer(x_hat, label="before", prior=settings["prior"], sampler="none", steps=0, nfe=0))
        rows += thirds(folder, model, settings, scorer)
        for prior in ("gmm", "flow"):
            rows += strategies(folder, model, settings | {"prior": prior}, scorer)
        common.draw_samples(folder, {"VAE": x_hat, "refined": images})
    else:
        common.draw_samples(folder, {"": images})
    common.write_metrics(folder, checkpoint, settings, scorer, rows, model.networks)
    if settings["export"]:
        common.export(folder, images)
    return rows


def draw_by_s(path, s, rows):
    """A picture of twelve images, from the surest on, with their s (N,) above. `rows` holds one or more versions of the
    same N images: {label: uint8 (N, 3, H, W)}."""
    shown = s.argsort()[torch.linspace(0, len(s) - 1, 12).long()]
    common.save_grid(path, {label: images[shown] for label, images in rows.items()},
                     columns=[f"s = {value:.1f}" for value in s[shown].tolist()])


def thirds(folder, model, settings, scorer):
    """Does s tell where the VAE fails, and does refinement help there? Rows of held-out images: Spearman's rank
    correlation of s with the squared error of x_hat, and Frechet distances of reconstructions to the originals:
        sure, middle, unsure     by thirds of s, of the VAE's images and of the refined ones
        own s, shuffled s        of all refined images, and with the s of another image
    Draws uncertainty.png."""
    real = scorer.data.test.images[: settings["eval_samples"]]
    mu, _ = common.encode(model.vae.encoder, real, model.device)
    x_hat, s = decode(model.vae, mu, model.uncertainty, model.device)
    _, refined = generate(model, settings, mu)
    _, other = generate(model, settings, mu, shuffle_s=True)
    draw_by_s(folder / "uncertainty.png", s, {"real": real, "VAE": x_hat, "refined": refined})
    error = common.squared_error(to_float(x_hat), to_float(real))
    rows = [{"label": "s", "n_generated": len(real), "rank_correlation": float(spearmanr(s, error).statistic)}]
    sets = [("own s", refined, real), ("shuffled s", other, real)]
    for name, third in zip(("sure", "middle", "unsure"), s.argsort().tensor_split(3), strict=True):
        sets += [(f"{name} third, VAE", x_hat[third], real[third]), (f"{name} third", refined[third], real[third])]
    for label, images, originals in sets:
        fd = fid.fd_between(scorer.extractor, images, originals)
        rows.append({"label": label, "n_generated": len(images), "fd_to_originals": fd})
    return rows


def strategies(folder, model, settings, scorer):
    """Generated images whose number of steps depends on s: a row for each strategy. The controls, "shuffled", have the
    s of another image. Draws generated-PRIOR.png."""
    count = 3 * (settings["eval_samples"] // 3)
    prior, full = settings["prior"], settings["sample_steps"]
    z = draw_codes(model, settings, count)
    clock = time.time()
    x_hat, s = decode(model.vae, z, model.uncertainty, model.device)
    decoding = (time.time() - clock) / count
    plans = {  # steps of the third with the lowest s, of the middle, and of the third with the highest
        "all": (full, full, full), "two steps": (2, 2, 2), "by s": (1, 2, 3), "by s, shuffled": (1, 2, 3),
        "unsure third": (0, 0, full), "unsure third, shuffled": (0, 0, full)}
    rows = []
    for name, steps in plans.items():
        images, seconds = x_hat.clone(), decoding
        sorted_by = s.roll(1) if "shuffled" in name else s
        for third, n in zip(sorted_by.argsort().tensor_split(3), steps, strict=True):
            if n > 0:
                clock = time.time()
                _, images[third] = generate(model, settings | common.sampling_settings("dpm", n), z[third])
                seconds += (time.time() - clock) / count
        if name == "all":
            draw_by_s(folder / f"generated-{prior}.png", s, {"VAE": x_hat, "refined": images})
        rows.append({"label": f"refine {name}, {prior}", "n_generated": count, "fd": scorer.fd(images),
                     "hf_energy": fid.hf_energy(images, scorer.data.test.images), "nfe": sum(steps) / 3,
                     "seconds_per_image": seconds})
    return rows


# --- The command -----------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description="Stage 3: flow prior and adaptive conditioning")
    common.add_flags(parser, priors=("gaussian", "gmm", "flow"), prior="flow")
    parser.add_argument("--conditioning", choices=("fixed", "fade", "film", "coupling"), default="film",
                        help="how the refiner uses x_hat (default: %(default)s)")
    parser.add_argument("--uncertainty", choices=KINDS, default="regressed",
                        help="where s comes from (default: %(default)s); see the top of the file")
    args = parser.parse_args(argv)
    settings, device = common.read_settings(args)
    if args.dry_run:
        refiner = build_refiner(settings, args.conditioning)
        return common.print_settings(settings, **common.vae_and_unet(settings, refiner["unet"]))

    extractor = fid.load_extractor(settings["features"], args.weights, device)
    data = common.load_data(args.dataset, args.data_dir)
    settings["images"] = common.hash_images(data.train.images)
    vae_folder = common.run_folder(settings, "stage3-vae-flow")
    base = common.finished(vae_folder, settings, args.resume) or train_vae(vae_folder, settings, data, device)
    name = f"stage3-flow-{args.conditioning}" + ("-posterior" if args.uncertainty == "posterior" else "")
    folder = common.run_folder(settings, name)
    checkpoint = (common.finished(folder, settings, args.resume)
                  or train_refiner(folder, settings, args.conditioning, args.uncertainty, base, data, device))
    if common.RANK > 0:
        return
    scorer = fid.Scorer(extractor, data)
    evaluate(vae_folder, base, settings, scorer, device)
    rows = evaluate(folder, checkpoint, settings, scorer, device)
    common.print_results(settings, scorer)
    for row in rows:
        if row["label"] == "s":
            print(f"rank correlation of s with the error of held-out images: {row['rank_correlation']:.2f}")
        if row["label"].startswith("refine "):
            numbers = (f"{key} {row[key]:.3g}" for key in ("fd", "hf_energy", "nfe", "seconds_per_image"))
            print(f"{row['label']:36}" + "  ".join(numbers))


if __name__ == "__main__":
    main()
