"""Stage 3: a flow prior over z, and conditioning that depends on how sure the VAE is.

Two hypotheses. First, the codes of a trained VAE do not follow N(0, I), so codes drawn from N(0, I) are unlike those
that the decoder was trained on. A normalising flow (RealNVP, Dinh et al. 2017) can learn their distribution and be the
prior instead. Second, where the VAE is unsure its x_hat is misleading. There the refiner should rely less on x_hat, and
may need more steps. Elsewhere refinement may not be needed at all.

The flow prior
    u = f(z) with an invertible network f, and log p(z) = log N(u; 0, I) + log |det df/dz|.
    VAE and flow are trained in three parts (60% and 40% were found by trying):
        the first 60% of the steps   The VAE's loss has the KL to N(0, I), weighted by beta as in stage 1. The flow is
                                     fitted to its codes, but no gradient of the flow reaches the VAE, whose codes
                                     would otherwise chase a prior that is chasing them.
        the last 40%                 The flow now follows the codes closely, so this chase does little harm. The KL to
                                     the flow takes the place of the KL to N(0, I), weighted by beta, too, and trains
                                     both. It is estimated from one sample z ~ q(z|x), as log q(z|x) - log p(z), (B,).
        afterwards ("ex post")       The VAE is finished. The flow is fitted further to its codes.
    The rival is the Gaussian mixture of stage 1, fitted to the same codes. How many components it needs to do as well
    as the flow is measured, too (fid.by_components; results/TABLES.md, *components*).

Uncertainty
    How large an error of x_hat = Dec(z) is to be expected? When images are generated there is no x to compare x_hat
    with. So the answer must be computed from z alone. (x_hat may be used, since it is made from z.) It is computed in
    the same way in training (except with `posterior`, see below). Two things that z gives tell something about the
    error: z itself, since the decoder makes worse images from rare codes; and how sure the encoder is when it is shown
    x_hat, since a blurred x_hat may fit many codes.
        s_vec  the log-variances of Enc(x_hat), standardised per dimension, limited to 3 standard deviations (so that
               one odd dimension cannot outweigh all others), and 0 in dimensions that are not in use: the mean of
               q(z|x) hardly varies there over images x (common.active_units). (B, d)
        phi    [z, z^2, s_vec]: (B, 3d). With z^2, s can be high for rare codes, which lie far from the mean.
        s      w . phi + b: (B,). High means a large error. s is standardised: over training images it has mean 0 and
               standard deviation 1 (but see `posterior`).
    `--uncertainty` says where w comes from (it is then scaled, and b chosen, so that s is standardised), and of which
    image s_vec is made:
                   w                                    s_vec in training    in sampling
        regressed  that of a ridge regression of        of Enc(x_hat)        of Enc(x_hat)
                   log |x_hat - x0|^2 on phi, over
                   training images
        variance   averages s_vec over the dimensions   of Enc(x_hat)        of Enc(x_hat)
                   in use, with the sign for which a
                   high s means a large error (0 on z
                   and z^2)
        posterior  that of `variance`                   of Enc(x)            of Enc(x_hat)
    `posterior` is the obvious measure, the variance of q(z|x). But it needs x, so it exists in training only. In
    sampling the refiner meets an s of another kind. (In training this s does not have mean 0 and standard deviation 1,
    since it is standardised as that of `variance`.) One may expect that to hurt; REPORT.md (stage 3) has what was
    found.

Conditioning (`--conditioning`): what the U-Net is shown. (x_start, with which sampling begins, keeps the whole x_hat.)
    fixed      x_hat as it is. This is stage 1.
    fade       x_hat exp(-max(s, 0) / 2), so that x_hat fades to grey if the VAE is unsure: at s = 2, two standard
               deviations above the mean, 37% of it is left. (The 1/2 is a choice.) Nothing is learned.
    film       A linear function of s_vec and s is added to the time embedding, which shifts the features of every
               block (after FiLM, Perez et al. 2018, which also scales them). A second linear function of s_vec and s,
               the gate, gives three numbers. Each colour of x_hat is multiplied by 1 + tanh of its number. Both
               functions start at zero, so that `film` equals `fixed` at first.
    coupling   x_hat goes through an invertible network driven by s (coupling layers, as in a flow), which can change
               x_hat but cannot lose what it shows. It starts as the identity. Unlike the flow prior it needs no
               log-determinant: a prior is a density, a condition may be any function of x_hat.

Run     python stage3_adaptive.py                                     flow prior, film conditioning, shapes
        python stage3_adaptive.py --prior gmm                         the same networks, codes from the mixture
        python stage3_adaptive.py --uncertainty variance              s without a regression
        python stage3_adaptive.py --dataset celeba64                  on faces; uses the GPU, if there is one
Expect  one and a half to two times the minutes of stage 1 on shapes, and about as many as stage 1 on real images. All
        conditionings share one VAE. (With another `--prior` nothing is trained again; images are drawn and scored
        again, and metrics.json is replaced.) On shapes the flow draws far better codes than N(0, I), but worse ones
        than the mixture, so the scores are worse than stage 1's. The command says whether s ranks the errors of
        held-out images at all; if it does not, conditioning on it can hardly help. On shapes `regressed` does, with a
        rank correlation of 0.6 (`variance` and `posterior` have 0.1 to 0.2). Even so, `film` is not shown to lower the
        Frechet distance. But on shapes, with codes of the mixture and two steps on average, s can tell which images
        need more (REPORT.md).
"""

import argparse
import dataclasses
import math
from functools import partial
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

import common
import fid
from common import gaussian_log_prob, to_float, to_uint8

STRATEGIES = ("fixed", "fade", "film", "coupling")

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
        self.d, self.couplings = d, nn.ModuleList(Coupling(d, hidden) for _ in range(couplings))
        gen = common.generator(0)
        swapped = torch.arange(d).roll(-(d // 2))  # the second half of the dimensions first
        orders = []
        for i in range(couplings):
            orders.append(torch.randperm(d, generator=gen) if i % 2 == 0 else swapped)
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


def fit_flow(weights, mu, logvar, seed, steps, batch=256):
    """Fit a RealNVP, beginning with these weights, to codes z ~ N(mu, exp(logvar)), with mu and logvar (N, d), by
    maximum likelihood. The codes are drawn anew in each step, so that the flow cannot learn the noise of one draw. All
    this happens on the CPU, where the codes are. Returns the flow in evaluation mode."""
    flow, gen = RealNVP(mu.shape[1]), common.generator(seed + common.SEEDS["flow"])
    flow.load_state_dict(weights)
    optimizer = torch.optim.Adam(flow.parameters())
    for step in tqdm(range(steps), desc="flow ex post", leave=False):
        optimizer.param_groups[0]["lr"] = common.learning_rate(1e-3, step, steps, warmup=0.05, decay=True)
        index = torch.randint(len(mu), (batch,), generator=gen)
        z = common.reparameterise(mu[index], logvar[index], common.randn((batch, mu.shape[1]), gen))
        loss = -flow.log_prob(z).mean()
        optimizer.zero_grad()
        loss.backward()
        # Most gradients are a little longer (14 on shapes) and are shortened to 10. To Adam this makes no difference,
        # but an odd batch then counts no more than the others.
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    return flow.eval().requires_grad_(False)


# --- Uncertainty -----------------------------------------------------------------------------------------------------

class RoundTrip(NamedTuple):
    """Images that went through the VAE and back into its encoder: x -> z -> x_hat -> Enc(x_hat)."""

    z: torch.Tensor  # (N, d), a sample of q(z | x)
    mu: torch.Tensor  # (N, d), the mean of q(z | x)
    logvar: torch.Tensor  # (N, d), the log-variances of q(z | x)
    logvar_of_x_hat: torch.Tensor  # (N, d), the log-variances of Enc(x_hat)
    sse: torch.Tensor  # (N,), the squared error of x_hat


@torch.no_grad()
def round_trip(vae, images, seed, device):
    """The RoundTrip of uint8 images (N, 3, H, W), on the CPU."""
    mu, logvar = common.encode(vae, images, device)
    z = common.reparameterise(mu, logvar, common.randn(mu.shape, common.generator(seed)))
    logvars, errors = [], []
    for image_part, z_part in zip(images.split(500), z.split(500), strict=True):
        x_hat = vae.decoder(z_part.to(device))
        logvars.append(vae.encoder(x_hat)[1].cpu())
        errors.append(common.squared_error(x_hat, to_float(image_part.to(device))).cpu())
    return RoundTrip(z, mu, logvar, torch.cat(logvars), torch.cat(errors))


def standardise(logvar, stats):
    """Log-variances (B, d) -> s_vec (B, d), with the `stats` that fit_uncertainty returns."""
    return ((logvar - stats["mean"]) / stats["sd"]).clamp(-3, 3) * stats["active"]


def predictors(z, s_vec):
    """phi (B, 3d), from z and s_vec, each (B, d)."""
    return torch.cat([z, z**2, s_vec], 1)


def s_vec_and_s(z, logvar, stats, kind):
    """s_vec (B, d) and s (B,), from z and log-variances, each (B, d), with the w and b of this kind of uncertainty."""
    kind = "variance" if kind == "posterior" else kind  # `posterior` has other log-variances, but the same w and b
    s_vec = standardise(logvar, stats)
    weight, bias = stats[f"{kind}_weight"], stats[f"{kind}_bias"]
    s = (predictors(z, s_vec) * weight).sum(1) + bias  # (B,)
    return s_vec, s


def uncertainty_of(vae, z, image, stats, kind):
    """s_vec (B, d) and s (B,), from z (B, d) and the image that the encoder is shown: x_hat = Dec(z) or, in training
    with `posterior`, x0. In float32, since the log-variances of different images differ so little that the rounding of
    bfloat16 would hide the differences. (tests/test_stage3.py: test_same_s_in_training_and_sampling)"""
    with torch.autocast(image.device.type, enabled=False):
        return s_vec_and_s(z, vae.encoder(image)[1], stats, kind)


def fit_uncertainty(trip):
    """From the RoundTrip of training images: the statistics that standardise s_vec (mean, sd, active, each (d,)); and
    for `variance` and for `regressed` the weights w (3d,) and the bias b. (`posterior` uses those of `variance`.)"""
    logvar, log_error = trip.logvar_of_x_hat, trip.sse.log()
    active = common.active_units(trip.mu).float()
    stats = {"mean": logvar.mean(0), "sd": logvar.std(0).clamp(min=1e-6), "active": active}
    phi = predictors(trip.z, standardise(logvar, stats))
    # phi @ averaging is the mean of s_vec over the dimensions that are in use.
    averaging = torch.cat([torch.zeros(2 * len(active)), active / active.sum().clamp(min=1)])
    covariance = ((phi @ averaging) * (log_error - log_error.mean())).mean()
    sign = 1.0 if covariance >= 0 else -1.0
    regression_weight, _ = common.ridge_regression(phi, log_error[:, None])  # (3d, 1); s gets a bias of its own below
    weights = {"variance": sign * averaging, "regressed": regression_weight[:, 0]}
    for kind, weight in weights.items():  # scaled so that s has mean 0 and standard deviation 1
        raw = phi @ weight
        sd = raw.std().clamp(min=1e-6)
        stats |= {f"{kind}_weight": weight / sd, f"{kind}_bias": -raw.mean() / sd}
    return stats


def rank_errors(trip, stats):
    """Does s rank the errors of held-out images? For each kind of uncertainty, Spearman's rank correlation of s with
    the squared error of x_hat, and a conclusion: yes, if it is significant (5%) and at least 0.1, the usual bound for a
    weak correlation (Cohen 1988). `posterior` has the s that it has in training, made from Enc(x)."""
    facts = {}
    log_variances = {"variance": trip.logvar_of_x_hat, "regressed": trip.logvar_of_x_hat, "posterior": trip.logvar}
    for kind, logvar in log_variances.items():
        _, s = s_vec_and_s(trip.z, logvar, stats, kind)
        # The s of `variance` and `posterior`, a mean of s_vec, is constant if no dimension is in use.
        correlation, p_value = spearmanr(s, trip.sse) if float(s.std()) > 0 else (0.0, 1.0)
        if correlation >= 0.1 and p_value <= 0.05:
            conclusion = "s ranks the error"
        else:
            conclusion = "s does not rank the error: conditioning on it can hardly help"
        facts[kind] = {"correlation": float(correlation), "conclusion": conclusion}
    return facts


# --- Conditioning ----------------------------------------------------------------------------------------------------

class ImageCoupling(nn.Module):
    """Affine coupling layer on images (B, 3, H, W). Of the pixels of a checkerboard, those of one `parity` (0 or 1)
    stay. A small network sees them and s, and scales and shifts the others. It can be inverted, and starts as the
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
        log_scale = torch.tanh(raw).float() * (1 - stays)  # within -1..1, and 0 where pixels stay; in float32
        return x * log_scale.exp() + shift.float() * (1 - stays)


class Conditioner(nn.Module):
    """A conditioning strategy: from x_hat (B, 3, H, W), s_vec (B, d) and s (B,) it makes the image that the U-Net sees
    beside x_t, and an addition to the U-Net's time embedding (B, emb_dim), or None. For `fixed`, s_vec and s are None,
    and x_hat is returned as it is."""

    def __init__(self, strategy, d, emb_dim):
        super().__init__()
        self.strategy = strategy
        if strategy == "film":
            self.film = common.zero_init(nn.Linear(d + 1, emb_dim))
            self.gate = common.zero_init(nn.Linear(d + 1, 3))
        if strategy == "coupling":
            self.couplings = nn.ModuleList(ImageCoupling(i % 2) for i in range(4))

    def forward(self, x_hat, s_vec, s):
        if self.strategy == "fade":
            return x_hat * torch.exp(-0.5 * s.clamp(min=0))[:, None, None, None], None
        if self.strategy == "film":
            s_all = torch.cat([s_vec, s[:, None]], 1)  # (B, d + 1)
            factor = 1 + torch.tanh(self.gate(s_all))  # (B, 3)
            return x_hat * factor[:, :, None, None], self.film(s_all)
        if self.strategy == "coupling":
            for coupling in self.couplings:
                x_hat = coupling(x_hat, s)
        return x_hat, None


def denoiser(refiner, x_hat, s_vec, s):
    """`denoise(x, t)` for one batch, given its x_hat, s_vec and s: Formulation 1 of stage 1, on what the conditioner
    makes of x_hat. `refiner` holds a U-Net and a Conditioner; see build_refiner."""
    shown, extra = refiner["conditioner"](x_hat, s_vec, s)
    return lambda x, t: refiner["unet"](torch.cat([x, shown], 1), t, extra)


# --- Training --------------------------------------------------------------------------------------------------------

def build_vae(train):
    """The VAE and the flow under which it is trained. The flow, vae.flow, is a part of the same network, so that both
    are trained with the settings vae_*. Codes are not drawn from vae.flow, but from a copy that is fitted further (see
    train_vae)."""
    vae = common.build_vae(train)
    vae.flow = RealNVP(vae.latent_dim)
    return vae


def vae_loss(vae, x0, noise, beta, flow_is_prior):
    """The loss of the VAE and its flow, (B,), and its terms for the log. `flow_is_prior` is False in the first part of
    the training and True in the second (see the top of this file).

    The flow learns from -log p(z). This term has the weight 1 in the first part, where it trains the flow alone, and
    the weight beta in the second, where it is a part of the KL. So at the jump from the first part to the second, the
    flow's gradients become smaller by the factor beta. Muon, which trains its matrices (not with the budget `paper`),
    soon forgets this. Adam, which trains its biases, remembers the larger gradients for more than a thousand steps, so
    these steps are smaller for a while (with the budget `cpu`, until the training ends)."""
    mu, logvar = vae.encoder(x0)
    z = common.reparameterise(mu, logvar, noise)
    sse, kl = common.squared_error(vae.decoder(z), x0), common.gaussian_kl(mu, logvar)  # (B,)
    log_p = vae.flow.log_prob(z if flow_is_prior else z.detach())  # (B,); the gradient of z.detach() ends there
    kl_flow = gaussian_log_prob(z, mu, logvar) - log_p  # (B,), of one sample z: may be negative
    if flow_is_prior:  # the KL to the flow trains both networks
        loss = sse + beta * kl_flow
    else:  # the KL to N(0, I) trains the VAE, and -log p(z) the flow
        loss = sse + beta * kl - log_p
    return loss, {"sse": sse, "kl_nats": kl, "kl_flow_nats": kl_flow}


def train_vae(folder, train, data, device):
    """Train the VAE and its flow as one network. Then fit three things to the finished VAE: the mixture, to its codes;
    a flow to its codes, beginning with the one that was trained with it; and the statistics of the uncertainty, from at
    most 10,000 training images. Returns the finished checkpoint."""
    torch.manual_seed(train["seed"])
    vae = build_vae(train)
    training = common.Training(folder, train, device, data.images, steps=train["vae_steps"], flip=train["vae_flip"],
                               vae=vae)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        noise = training.normal(vae.latent_dim)  # (B, d)
        with training.autocast():
            loss, terms = vae_loss(vae, x0, noise, train["beta"],
                                   flow_is_prior=training.steps_taken >= 0.6 * train["vae_steps"])
        training.step(loss, terms)
    vae = common.frozen(build_vae(train), training.averages["vae"], device)
    gmm = common.fit_mixture(vae, data.images, train, device)
    mu, logvar = common.encode(vae, data.images, device)
    flow = fit_flow(vae.flow.state_dict(), mu, logvar, train["seed"], train["flow_steps"])
    chosen = torch.randperm(len(data.images), generator=common.generator(0))[:10_000]
    trip = round_trip(vae, data.images[chosen], train["seed"], device)
    return training.finish(gmm=gmm, flow=flow.state_dict(), uncertainty=fit_uncertainty(trip))


def build_refiner(train, d):
    """The U-Net and the conditioner, trained as one network."""
    emb_dim = 4 * train["unet"][0][1]  # of the U-Net's time embedding: four times its first width
    return nn.ModuleDict({"unet": common.build_unet(train, 6),
                          "conditioner": Conditioner(train["conditioning"], d, emb_dim)})


def train_refiner(folder, train, vae_state, data, device):
    """Train a refiner, with the VAE frozen. Returns the finished checkpoint."""
    vae = common.frozen(build_vae(train), vae_state["vae"], device)
    torch.manual_seed(train["seed"])
    refiner = build_refiner(train, vae.latent_dim)
    diffusion = common.Diffusion(train["objective"], device=device, start=train["start"])
    stats = {key: value.to(device) for key, value in vae_state["uncertainty"].items()}
    kind = train["uncertainty"]
    training = common.Training(folder, train, device, data.images, steps=train["unet_steps"], flip=train["unet_flip"],
                               unet=refiner)  # all of it is state["unet"], with the settings unet_lr and so on
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        z_noise = training.normal(vae.latent_dim)  # (B, d)
        t = diffusion.draw_t(training.uniform())  # (B,), in 1..start
        eps = training.normal(*x0.shape[1:])  # (B, 3, H, W)
        with training.autocast():
            with torch.no_grad():
                mu, logvar = vae.encoder(x0)
                z = common.reparameterise(mu, logvar, z_noise)  # (B, d)
                x_hat = vae.decoder(z)  # (B, 3, H, W)
                s_vec = s = None  # `fixed` needs none
                if train["conditioning"] != "fixed":
                    s_vec, s = uncertainty_of(vae, z, x0 if kind == "posterior" else x_hat, stats, kind)
            loss = diffusion.simple_loss(denoiser(refiner, x_hat, s_vec, s), x0, t, eps)  # (B,)
        training.step(training.even_levels(loss, t, diffusion), {f"{train['objective']}_mse": loss})
    return training.finish(seconds_before=vae_state["seconds"],
                           **{key: vae_state[key] for key in ("vae", "flow", "gmm", "uncertainty")})


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(state, device):
    """The common.Model of a checkpoint: of a VAE, or of a refiner with its VAE."""
    train, size = state["train"], state["train"]["image_size"]
    vae = common.frozen(build_vae(train), state["vae"], device)
    flow = common.frozen(RealNVP(vae.latent_dim), state["flow"], device)  # fitted ex post
    priors = {"gaussian": common.StandardNormal(vae.latent_dim), "gmm": common.GaussianMixture(**state["gmm"]),
              "flow": flow}
    diffusion = common.Diffusion(train["objective"], device=device, start=train["start"])
    model = common.Model(train.get("conditioning", "vae"), device, shape=(3, size, size), diffusion=diffusion,
                         # those whose parameters are counted; of the two flows only the one that was fitted ex post
                         networks=(vae.encoder, vae.decoder, flow), vae=vae, priors=priors)
    if "conditioning" in train:  # otherwise it is the checkpoint of a VAE
        refiner = common.frozen(build_refiner(train, vae.latent_dim), state["unet"], device)
        stats = {key: value.to(device) for key, value in state["uncertainty"].items()}

        # `clean` is x_hat before evaluation adds noise to it. s describes the VAE, not that noise.
        def denoiser_for(x_hat, z, clean):
            s_vec = s = None
            if train["conditioning"] != "fixed":
                s_vec, s = uncertainty_of(vae, z, clean, stats, train["uncertainty"])
            return denoiser(refiner, x_hat, s_vec, s)

        model.networks += (refiner,)
        model.denoiser_for = denoiser_for
    common.choose_precision(model)
    return model


# --- What it shows: what adaptive conditioning gains -----------------------------------------------------------------

@torch.no_grad()
def decode_all(model, s_of, z):
    """x_hat = Dec(z) as images (uint8), and s (N,), both on the CPU, for codes z (N, d). (A refiner computes the s that
    it uses by itself. `s_of(z, x_hat)` gives it once more, since the images will be sorted by s.)"""
    images, s = [], []
    for z_part in z.to(model.device).split(100):
        x_hat = model.vae.decoder(z_part)
        images.append(to_uint8(x_hat).cpu())
        s.append(s_of(z_part, x_hat).cpu())
    return torch.cat(images), torch.cat(s)


@torch.no_grad()
def refine_all(model, z, steps, seed):
    """Dec(z), refined, as images (uint8) on the CPU, for codes z (N, d). With the same seed, image k has the same noise
    in every call."""
    images = []
    for i, z_part in enumerate(z.to(model.device).split(100)):
        gen = common.generator(seed + 2 * i)  # common.refine takes this seed and the next one (with `ddpm`)
        refined = common.refine(model, model.vae.decoder(z_part), z_part, gen, sampler="dpm", steps=steps)
        images.append(to_uint8(refined).cpu())
    return torch.cat(images)


def draw_by_s(path, s, rows):
    """A picture of twelve images, from the surest on, with their s (N,) above. `rows` holds one or more versions of the
    same N images: {label: uint8 (N, 3, H, W)}."""
    shown = s.argsort()[torch.linspace(0, len(s) - 1, 12).long()]
    common.save_grid(path, {label: images[shown] for label, images in rows.items()},
                     columns=[f"s = {value:.1f}" for value in s[shown].tolist()])


def adaptivity(folder, state, model, setup):
    """Does the refiner profit from s? Five tables, and uncertainty.png, with held-out images from sure to unsure.

        terciles             reconstructions of held-out images, by thirds of s
        controls             the same images with their own s, and with that of another image
        adaptive_refinement  generated images, whose number of steps depends on s (0 for some); for codes of the flow
                             and for codes of the mixture
        noise_seen           noise on x_hat, with an s that is computed from the noisy x_hat
        cost                 what the conditioning costs"""
    steps, seed = setup.evaluation["probe_steps"], common.SEEDS["terciles"] + 1000 * setup.train["seed"]
    # Images per third: half as many as other measurements use, to save time. (Or a third of the held-out images, if
    # that is fewer.)
    per_third = min(setup.evaluation["grid_count"] // 2, len(setup.test.images) // 3)
    real = setup.test.images[: 3 * per_third]
    stats = {key: value.to(model.device) for key, value in state["uncertainty"].items()}

    def s_of(z, x_hat):
        return uncertainty_of(model.vae, z, x_hat, stats, state["train"]["uncertainty"])[1]

    # The codes are means of q(z|x), so that only refinement is random. The regression of s and the refiner were fitted
    # to samples of q(z|x). Their z^2 is mu^2 plus the variance, on average. So here the regressed s is shifted against
    # training, a little more for some images than for others: its mean is not 0.
    mu, _ = common.encode(model.vae, real, model.device)
    x_hat, s = decode_all(model, s_of, mu)
    # The same codes with three noises
    three_times = [refine_all(model, mu, steps, seed + more) for more in (0, 1000, 2000)]
    refined = three_times[0]
    real_features, _ = fid.extract(setup.extractor, real)  # (N, f)
    features = torch.stack([fid.extract(setup.extractor, images)[0] for images in three_times])  # (3, N, f)
    # How far the three refined images of a code lie from their mean: 0 if all are the same.
    spread = (features - features.mean(0)).norm(dim=2).mean(0)  # (N,)

    terciles = {"images": per_third}
    by_s = s.argsort()  # from the surest image on
    for name, index in zip(("sure", "middle", "unsure"), by_s.tensor_split(3), strict=True):
        terciles[name] = {"vae": fid.fd_to_originals(x_hat[index], real_features[index], setup),
                          "refined": fid.fd_to_originals(refined[index], real_features[index], setup),
                          "spread": float(spread[index].mean())}
    draw_by_s(folder / "uncertainty.png", s, {"real": real, "VAE": x_hat, "refined": refined})

    def with_other_s(x_hat, z, clean):  # a control: s_vec and s are made from z and `clean` of the image before
        return model.denoiser_for(x_hat, z.roll(1, 0), clean.roll(1, 0))

    control = dataclasses.replace(model, denoiser_for=with_other_s)
    refined_control = refine_all(control, mu, steps, seed)
    controls = {"images": len(real), "true": fid.fd_to_originals(refined, real_features, setup),
                "shuffled": fid.fd_to_originals(refined_control, real_features, setup)}
    by_prior = {prior: adaptive_refinement(folder, model, s_of, prior, setup) for prior in ("flow", "gmm")}
    return {"terciles": terciles, "controls": controls, "adaptive_refinement": by_prior,
            "noise_seen": noise_seen(model, setup), "cost": cost(model, setup)}


def noise_seen(model, setup):
    """The mean Frechet distance under noise on x_hat, as in fid.robustness, but with an s whose s_vec is computed from
    the noisy x_hat. (In fid.robustness it is computed before the noise is added: it describes the VAE alone.)"""
    def denoiser_for(x_hat, z, clean):
        return model.denoiser_for(x_hat, z, clean=x_hat)

    evaluation, seeing_model = setup.evaluation, dataclasses.replace(model, denoiser_for=denoiser_for)
    prior, _, _ = common.headline(model, evaluation)
    distances = []
    for sd in fid.NOISE.values():
        if sd > 0:
            row, _, _ = fid.measure(seeing_model, setup, prior, "dpm", evaluation["probe_steps"],
                                    evaluation["grid_count"], sd)
            distances.append(row[setup.fd_key]["value"])
    return {"images": evaluation["grid_count"], "mean": sum(distances) / len(distances)}


def cost(model, setup):
    """What the conditioning costs in sampling: seconds and operations of refining an image with it and without it
    (`fixed`), with the same U-Net. The two are timed in turn, on this machine."""
    unet = model.networks[-1]["unet"]  # the last network is the refiner; see load_model
    steps = setup.evaluation["sample_steps"]

    def fixed_denoiser(x_hat, z, clean):
        return lambda x, t: unet(torch.cat([x, x_hat], 1), t)

    models = {"fixed": dataclasses.replace(model, denoiser_for=fixed_denoiser), "this": model}
    count = min(50, setup.evaluation["batch"])
    z = common.randn((count, model.vae.latent_dim), common.generator(0)).to(model.device)
    x_hat = model.vae.decoder(z)

    def refine(name):
        common.refine(models[name], x_hat, z, common.generator(0), "dpm", steps)

    runs = {name: partial(refine, name) for name in models}
    seconds = common.time_in_turn(runs, model.device)
    return {name: {"seconds_per_image": seconds[name] / count, "gflops_per_image": common.count_gflops(run) / count}
            for name, run in runs.items()}


def adaptive_refinement(folder, model, s_of, prior, setup):
    """Does it pay to let s decide how much an image is refined? Scores of seven sets of generated images, whose codes
    the prior of this name draws, and generated-PRIOR.png, with such images from sure to unsure, before and after
    refinement. In the first four sets an image gets two or three steps on average, so few that one more or less can be
    seen in the scores:

        even              two steps for every image
        adaptive_steps    one step for the third of the images with the lowest s, three for the third with the highest
        shuffled_steps    the same, by the s of another image: a control
        three             three steps for every image: a rival that spends more on steps, and nothing on s

    In the last three, an image that is refined gets `probe_steps` steps, as in other measurements. In the last two,
    only a third of the images is refined at all, which saves two thirds of the time of refinement:

        all               every image is refined
        unsure_third      only the third with the highest s; the others stay x_hat
        shuffled_third    the same, by the s of another image: a control

    All images are refined once with each number of steps, and the sets are put together from these, so that an image
    has the same z and noise in all."""
    count, seed = 3 * (setup.evaluation["count"] // 3), setup.train["seed"]
    gen = common.generator(common.SEEDS["adaptive_codes"] + seed)
    z = model.priors[prior].sample(count, gen)
    noise_seed = common.SEEDS["adaptive_noise"] + 1000 * seed  # refine_all uses two seeds for every 100 images
    full = setup.evaluation["probe_steps"]
    x_hat, s = decode_all(model, s_of, z)
    refined = {0: x_hat}  # by the number of steps: images (count, 3, H, W), uint8
    for steps in {1, 2, 3, full}:
        refined[steps] = refine_all(model, z, steps, noise_seed)

    draw_by_s(folder / f"generated-{prior}.png", s, {"VAE": x_hat, "refined": refined[full]})

    def by_thirds(some_s, steps_of_thirds):
        images = torch.empty_like(x_hat)
        for third, steps in zip(some_s.argsort().tensor_split(3), steps_of_thirds, strict=True):
            images[third] = refined[steps][third]
        return images

    other_s = s.roll(1)
    sets = {"even": refined[2], "adaptive_steps": by_thirds(s, (1, 2, 3)),
            "shuffled_steps": by_thirds(other_s, (1, 2, 3)), "three": refined[3], "all": refined[full],
            "unsure_third": by_thirds(s, (0, 0, full)), "shuffled_third": by_thirds(other_s, (0, 0, full))}
    result = {"images": count}
    for name, images in sets.items():
        scores = setup.score(images)
        result[name] = {setup.fd_key: scores[setup.fd_key],
                        "hf_energy": fid.hf_energy(images, setup.test.images)}
    return result


# --- The command -----------------------------------------------------------------------------------------------------

def read_flags(argv):
    parser = argparse.ArgumentParser(description="Stage 3: flow prior and adaptive conditioning")
    common.add_flags(parser, priors=("gaussian", "gmm", "flow"), default_prior="flow")
    parser.add_argument("--conditioning", choices=STRATEGIES, default="film",
                        help="how the refiner uses x_hat (default: %(default)s)")
    parser.add_argument("--uncertainty", choices=("regressed", "variance", "posterior"), default="regressed",
                        help="where s comes from (default: %(default)s); see the top of the file")
    args = parser.parse_args(argv)
    if args.uncertainty != "regressed" and args.conditioning == "fixed":
        common.fail(f"--uncertainty {args.uncertainty}: the refiner of --conditioning fixed is shown no s; leave "
                    "--uncertainty out")
    return args


def main(argv=None):
    args = read_flags(argv)
    # A setting of stage 1's `guided`: to change it by --set is an error here.
    train, evaluation, device = common.read_settings(args, unused=("guidance",))
    own = {"conditioning": args.conditioning, "uncertainty": args.uncertainty}
    if args.dry_run:
        return common.print_settings(train | own | args.changes, evaluation)
    setup = fid.Setup(args, train, evaluation, device)

    # The VAE with its priors and its uncertainty.
    folder, settings = setup.folder_and_settings("stage3-vae-flow", ignored=common.OF_UNET)
    vae_state = (common.finished_state(folder, settings, args.resume)
                 or train_vae(folder, settings, setup.data, device))
    vae_model = load_model(vae_state, device)
    vae_metrics = fid.evaluate(folder, setup, vae_state, vae_model)
    # The table is there if this VAE was measured before, with the same settings of evaluation.
    if "uncertainty" not in vae_metrics["tables"]:
        trip = round_trip(vae_model.vae, setup.test.images, common.SEEDS["round_trip"] + args.seed, device)
        vae_metrics["tables"]["uncertainty"] = rank_errors(trip, vae_state["uncertainty"])
        vae_metrics["tables"]["components"] = fid.by_components(vae_model, setup)
        common.write_json(folder / "metrics.json", vae_metrics)
    rank_facts = vae_metrics["tables"]["uncertainty"]
    for kind, facts in rank_facts.items():
        print(f"uncertainty, {kind}: rank correlation with held-out squared errors {facts['correlation']:.3f}: "
              f"{facts['conclusion']}")
    all_metrics = {folder: vae_metrics}

    # The refiner. (`flow` in the name says that its VAE was trained with a flow, whatever --prior draws the codes.)
    name = f"stage3-flow-{args.conditioning}"
    if args.uncertainty != "regressed":
        name += f"-{args.uncertainty}"
    folder, settings = setup.folder_and_settings(name)
    state = (common.finished_state(folder, settings | own, args.resume)
             or train_refiner(folder, settings | own, vae_state, setup.data, device))
    model = load_model(state, device)
    model.temperature = setup.evaluation["temperature"]  # factor of eps in x_start
    all_metrics[folder] = fid.evaluate(folder, setup, state, model)
    tables = all_metrics[folder]["tables"]
    if "adaptivity" not in tables:
        tables["uncertainty"] = rank_facts
        tables["adaptivity"] = adaptivity(folder, state, model, setup)
        common.write_json(folder / "metrics.json", all_metrics[folder])
    if args.export:
        common.export(args, folder, model, setup.evaluation)
    fid.print_results(all_metrics, setup)


if __name__ == "__main__":
    main()
