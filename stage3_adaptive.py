"""Stage 3: a flow prior over z, and conditioning that depends on how sure the VAE is.

Two claims. The latents of a trained VAE do not follow N(0, I), so sampling from it shows the decoder z it never saw: a
normalizing flow (RealNVP, Dinh et al. 2017) can be the prior instead. And where the VAE is unsure its x_hat misleads:
the refiner should lean on it less there, and may take more steps or begin at more noise there.

    flow prior      u = f(z), log p(z) = log N(u; 0, I) + log |det df/dz|; the KL by one sample z ~ q(z|x):
                    KL = log q(z|x) - log p(z), shape (B,). Fitted to detached z for 60% of the steps, then with the
                    VAE, then ex post
    uncertainty     how large an error to expect of x_hat = Dec(z), from z alone: the same in training and sampling.
                    s_vec = logvar of Enc(x_hat), standardised per dimension within 3 sd, 0 where inactive, (B, d);
                    s = w . phi + b, phi = [z, z^2, s_vec], (B,): mean 0 and sd 1 over training images, high is hard
                    regressed  w from ridge regression of log |x_hat - x0|^2 on phi: learns which z are hard, and how
                    variance   w averages s_vec over active dimensions, with the sign that makes high hard
                    posterior  a trap: as variance, but trained on the logvar of q(z|x), not Enc(x_hat)'s. There is no x
                               at sampling, and side information about x voids the likelihood bound
    conditioning    fixed     x_hat as it is (stage 1)
                    fade      x_hat exp(-max(s, 0) / 2): fades where the VAE is unsure; nothing to learn
                    film      s_vec and s enter through the time embedding, and a gate on x_hat; starts as fixed
                    coupling  an invertible coupling stack on x_hat, driven by s; starts as the identity. Its
                              log-determinant enters no loss: a condition may be any function, a prior must be a density

Run     python stage3_adaptive.py                                     flow prior, film conditioning, shapes
        python stage3_adaptive.py --prior gmm --conditioning fixed    stage 1 with this stage's evaluation
        python stage3_adaptive.py --uncertainty variance              s without a regression
        python stage3_adaptive.py --dataset celeba64                  all that a GPU user types
Expect  about the minutes of stage 1; strategies share a VAE: one of the flow, one of gaussian and gmm. First a
        verdict whether s ranks held-out errors at all: if it does not, conditioning on it cannot help. (On shapes it
        does, with a rank correlation of 0.7, 0.2 by the variance; it helps little even so, see REPORT.md.)
"""

import argparse
import copy
import dataclasses
import functools
import math
import time
from collections import namedtuple

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
    """Affine coupling (RealNVP eq. 7-8): the first half of z (B, d) passes and scales and shifts the second. The
    log-scale is bounded by 2; the last layer starts at zero, so the coupling starts as the identity."""

    def __init__(self, d, hidden):
        super().__init__()
        self.half = d // 2
        self.net = nn.Sequential(nn.Linear(self.half, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                 common.zero_init(nn.Linear(hidden, 2 * (d - self.half))))

    def scale_shift(self, first):
        raw, shift = self.net(first).chunk(2, 1)
        return 2 * torch.tanh(raw / 2), shift

    def forward(self, z):
        """z (B, d) -> output (B, d), log |det| (B,)."""
        first, second = z[:, : self.half], z[:, self.half :]
        scale, shift = self.scale_shift(first)
        return torch.cat([first, second * scale.exp() + shift], 1), scale.sum(1)

    def inverse(self, u):
        first, second = u[:, : self.half], u[:, self.half :]
        scale, shift = self.scale_shift(first)
        return torch.cat([first, (second - shift) * (-scale).exp()], 1)


class RealNVP(nn.Module):
    """A flow u = f(z) with N(0, I) over u: a prior with .log_prob and .sample. Before couplings 0, 2, 4 a fixed random
    permutation picks the halves, before 1, 3, 5 they are swapped, so that every dimension is transformed."""

    def __init__(self, d, hidden=128, couplings=6):
        super().__init__()
        self.d, self.couplings = d, nn.ModuleList(Coupling(d, hidden) for _ in range(couplings))
        gen = common.generator(0)
        orders = [torch.randperm(d, generator=gen) if i % 2 == 0 else torch.arange(d).roll(-(d // 2))
                  for i in range(couplings)]
        self.register_buffer("orders", torch.stack(orders), persistent=False)  # always the same: not saved

    def forward(self, z):
        """z (B, d) -> u (B, d), log |det du/dz| (B,). In float32: log-determinants are sums of many small terms."""
        total = 0
        with torch.autocast(z.device.type, enabled=False):
            for order, coupling in zip(self.orders, self.couplings, strict=True):
                z, log_det = coupling(z[:, order])
                total = total + log_det
        return z, total

    def inverse(self, u):
        for order, coupling in zip(self.orders.flip(0), reversed(self.couplings), strict=True):
            u = coupling.inverse(u)[:, order.argsort()]
        return u

    def log_prob(self, z):
        """Log density: (N, d) -> (N,) nats."""
        u, log_det = self(z.to(self.orders.device))
        return -0.5 * (u**2).sum(1) - 0.5 * self.d * math.log(2 * math.pi) + log_det

    @torch.no_grad()
    def sample(self, count, gen):
        """`count` draws (count, d) on the CPU, from a CPU generator."""
        return self.inverse(torch.randn(count, self.d, generator=gen).to(self.orders.device)).cpu()


def fit_flow(mu, logvar, seed, steps, initial=None, batch=256):
    """Fit a RealNVP ex post to z ~ N(mu, exp(logvar)), both (N, d), by maximum likelihood, from `initial` weights or
    the identity; returns it in evaluation mode. z is drawn anew in each step: of one draw it would learn the noise."""
    torch.manual_seed(seed)
    flow, gen = RealNVP(mu.shape[1]), common.generator(seed + 3)
    if initial:
        flow.load_state_dict(initial)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for step in tqdm(range(steps), desc="flow ex post", leave=False):
        optimizer.param_groups[0]["lr"] = common.learning_rate(1e-3, step, steps, 0.05, True)
        i = torch.randint(len(mu), (batch,), generator=gen)
        z = common.reparameterise(mu[i], logvar[i], common.randn((batch, mu.shape[1]), gen))
        loss = -flow.log_prob(z).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    return flow.eval().requires_grad_(False)


# --- Uncertainty -----------------------------------------------------------------------------------------------------

def standardise(logvar, stats):
    """s_vec (B, d) of log-variances (B, d)."""
    return ((logvar - stats["mean"]) / stats["sd"]).clamp(-3, 3) * stats["active"]


def predictors(z, s_vec):
    """phi (B, 3d) of z and s_vec, (B, d)."""
    return torch.cat([z, z**2, s_vec], 1)


def read_s(z, logvar, stats, kind):
    """s_vec (B, d) and s (B,) of z and log-variances (B, d): s = w . phi + b, with the w and b of `kind`."""
    kind = "variance" if kind == "posterior" else kind
    s_vec = standardise(logvar, stats)
    return s_vec, (predictors(z, s_vec) * stats[f"{kind}_weight"]).sum(1) + stats[f"{kind}_bias"]


def uncertainty(vae, z, x_hat, stats, kind):
    """s_vec (B, d) and s (B,) of z and of what the VAE makes of its own x_hat = Dec(z): a function of z alone. In
    float32, as its statistics are: log-variances differ little from image to image."""
    with torch.autocast(x_hat.device.type, enabled=False):
        return read_s(z, vae.encoder(x_hat)[1], stats, kind)


Trip = namedtuple("Trip", "z mu logvar_again sse")


@torch.no_grad()
def round_trip(vae, images, seed, device):
    """uint8 images there and back again: z ~ q(z|x), mu and the logvar of Enc(Dec(z)), each (N, d), and the squared
    error (N,); on the CPU."""
    mu, logvar = common.encode(vae, images, device)
    z = common.reparameterise(mu, logvar, common.randn(mu.shape, common.generator(seed)))
    again, errors = [], []
    for chunk, part in zip(images.split(500), z.split(500), strict=True):
        x_hat = vae.decoder(part.to(device))
        again.append(vae.encoder(x_hat)[1].cpu())
        errors.append(common.squared_error(x_hat, to_float(chunk.to(device))).cpu())
    return Trip(z, mu, torch.cat(again), torch.cat(errors))


def fit_uncertainty(trip):
    """What s needs to know of the round trip of training images: mean, sd and active (d,) of s_vec; for either kind
    weight (3d,) and bias."""
    logvar, hard, active = trip.logvar_again, trip.sse.log(), common.active_units(trip.mu).float()
    stats = {"mean": logvar.mean(0), "sd": logvar.std(0).clamp(min=1e-6), "active": active}
    phi = predictors(trip.z, standardise(logvar, stats))
    average = torch.cat([torch.zeros(2 * len(active)), active / active.sum().clamp(min=1)])
    sign = 1.0 if (phi @ average) @ (hard - hard.mean()) >= 0 else -1.0
    weights = {"variance": sign * average, "regressed": common.ridge_regression(phi, hard[:, None])[0][:, 0]}
    for kind, weight in weights.items():
        raw = phi @ weight
        sd = raw.std().clamp(min=1e-6)
        stats |= {f"{kind}_weight": weight / sd, f"{kind}_bias": -raw.mean() / sd}
    return stats


def rank_errors(trip, stats):
    """Does s rank the errors of held-out images? Of either kind the rank correlation and a verdict."""
    facts = {}
    for kind in ("variance", "regressed"):
        s = read_s(trip.z, trip.logvar_again, stats, kind)[1]
        correlation, p_value = spearmanr(s, trip.sse) if float(s.std()) > 0 else (0.0, 1.0)
        ranks = correlation >= 0.1 and p_value <= 0.05
        facts[kind] = {"correlation": float(correlation), "verdict": "s ranks the error" if ranks else
                       "s carries no information: conditioning on it cannot help"}
    return facts


# --- Conditioning ----------------------------------------------------------------------------------------------------

class ImageCoupling(nn.Module):
    """Affine coupling on an image (B, 3, H, W): one colour of a checkerboard passes unchanged; a network of it and of s
    scales and shifts the other. So it can be inverted; it starts as the identity."""

    def __init__(self, colour, width=16):
        super().__init__()
        self.colour = colour
        self.net = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.SiLU(),
                                 common.zero_init(nn.Conv2d(width, 6, 3, padding=1)))

    def forward(self, x, s):
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
        passes = ((rows[:, None] + columns) % 2 == self.colour).to(x.dtype)  # (H, W)
        level = s[:, None, None, None].expand(-1, 1, *x.shape[2:])  # (B, 1, H, W)
        raw, shift = self.net(torch.cat([x * passes, level], 1)).chunk(2, 1)
        return x * (torch.tanh(raw).float() * (1 - passes)).exp() + shift.float() * (1 - passes)


class Conditioner(nn.Module):
    """What a strategy makes of x_hat (B, 3, H, W), s_vec (B, d) and s (B,): the image the U-Net sees beside x_t and an
    addition to its time embedding (B, emb_dim), or None."""

    def __init__(self, strategy, d, emb_dim):
        super().__init__()
        self.strategy = strategy
        if strategy == "film":
            self.film, self.gate = (common.zero_init(nn.Linear(d + 1, width)) for width in (emb_dim, 3))
        if strategy == "coupling":
            self.couplings = nn.ModuleList(ImageCoupling(i % 2) for i in range(4))

    def forward(self, x_hat, s_vec, s):
        if self.strategy == "fade":
            return x_hat * torch.exp(-0.5 * s.clamp(min=0))[:, None, None, None], None
        if self.strategy == "film":
            told = torch.cat([s_vec, s[:, None]], 1)
            return x_hat * (1 + torch.tanh(self.gate(told)))[:, :, None, None], self.film(told)
        if self.strategy == "coupling":
            for coupling in self.couplings:
                x_hat = coupling(x_hat, s)
        return x_hat, None


def condition(refiner, x_hat, s_vec, s):
    """`denoise(x, t)` with the conditions fixed: Formulation 1 on what the strategy makes of x_hat."""
    seen, extra = refiner["conditioner"](x_hat, s_vec, s)
    return lambda x, t: refiner["unet"](torch.cat([x, seen], 1), t, extra)


# --- Training --------------------------------------------------------------------------------------------------------

def vae_loss(vae, x0, noise, beta, joint):
    """SSE + beta KL, (B,), and its terms. Without a flow it is stage 1's. With one, until `joint`, the VAE feels the KL
    to N(0, I) while the flow is fitted to detached z; from then on both feel the KL to the flow."""
    mu, logvar = vae.encoder(x0)
    z = common.reparameterise(mu, logvar, noise)
    sse, kl = common.squared_error(vae.decoder(z), x0), common.gaussian_kl(mu, logvar)  # (B,)
    if vae.flow is None:
        return sse + beta * kl, {"sse": sse, "kl_nats": kl}
    q = (z, mu, logvar) if joint else (z.detach(), mu.detach(), logvar.detach())
    kl_flow = gaussian_log_prob(*q) - vae.flow.log_prob(q[0])  # (B,), by one z ~ q: a sample of it may be negative
    total = sse + beta * kl_flow if joint else sse + beta * kl + kl_flow
    return total, {"sse": sse, "kl_nats": kl, "kl_flow_nats": kl_flow}


def build_vae(train):
    """The VAE, with its flow if that is the prior it is trained under."""
    vae = common.build_vae(train)
    vae.flow = RealNVP(vae.latent_dim) if train["vae_prior"] == "flow" else None
    return vae


def train_vae(folder, train, data, device, state):
    """Train the VAE; then fit what is fitted ex post: the mixture, the flow (a joint one goes on: it, too, gains from
    large batches once the VAE holds still), and the statistics of s. Returns the checkpoint."""
    torch.manual_seed(train["seed"])
    vae = build_vae(train)
    training = common.Training(folder, state, train, device, data.images, train["flip"] == "both", vae=vae)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        z_noise = training.draw(torch.randn, vae.latent_dim)  # (B, d)
        with common.autocast(device):
            loss, terms = vae_loss(vae, x0, z_noise, train["beta"], training.steps >= 0.6 * train["steps"])
        training.step(loss, terms)
    vae = common.frozen(build_vae(train), training.averages["vae"], device)
    gmm = common.fit_mixture(vae, data.images, train, device)
    mu, logvar = common.encode(vae, data.images, device)
    flow = fit_flow(mu, logvar, train["seed"], train["flow_steps"], vae.flow and vae.flow.state_dict())
    some = torch.randperm(len(data.images), generator=common.generator(0))[:10_000]
    stats = fit_uncertainty(round_trip(vae, data.images[some], train["seed"], device))
    return training.finish(gmm=gmm, flow=flow.state_dict(), uncertainty=stats)


def build_refiner(train, d):
    """The U-Net and the conditioner of a strategy, trained as one."""
    return nn.ModuleDict({"unet": common.build_unet(train, 6),
                          "conditioner": Conditioner(train["conditioning"], d, 4 * train["unet"][0][1])})


def train_refiner(folder, train, vae_state, data, device, state):
    """Train a refiner under a strategy with the VAE frozen; returns the checkpoint."""
    vae = common.frozen(build_vae(train), vae_state["vae"], device)
    torch.manual_seed(train["seed"])
    refiner = build_refiner(train, vae.latent_dim)
    diffusion = common.Diffusion(train["objective"], device=device, start=train["start"])
    stats, kind = {key: value.to(device) for key, value in vae_state["uncertainty"].items()}, train["uncertainty"]
    training = common.Training(folder, state, train, device, data.images, train["flip"] != "none",
                               unet=refiner)  # trained with the unet_* settings, kept as state["unet"]
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        z_noise = training.draw(torch.randn, vae.latent_dim)  # (B, d)
        t = diffusion.draw_t(training.draw(torch.rand))  # (B,), in 1..start
        eps = training.draw(torch.randn, *x0.shape[1:])  # (B, 3, H, W)
        with common.autocast(device):
            with torch.no_grad():
                mu, logvar = vae.encoder(x0)
                z = common.reparameterise(mu, logvar, z_noise)  # (B, d)
                x_hat, s_vec, s = vae.decoder(z), None, None
                if train["conditioning"] != "fixed":
                    s_vec, s = (read_s(z, logvar, stats, kind) if kind == "posterior" else
                                uncertainty(vae, z, x_hat, stats, kind))
            loss = diffusion.simple_loss(condition(refiner, x_hat, s_vec, s), x0, t, eps)  # (B,)
        training.step(loss, {f"{train['objective']}_mse": loss})
    return training.finish(**{key: vae_state[key] for key in ("vae", "flow", "gmm", "uncertainty")})


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(state, device, shuffled=False):
    """Rebuild a common.Model from its checkpoint alone: of a VAE, or of a refiner with its VAE. `shuffled`, a control:
    the refiner is told the s_vec and s of the image before."""
    train, size = state["train"], state["train"]["image_size"]
    vae = common.frozen(build_vae(train), state["vae"], device)
    diffusion = common.Diffusion(train["objective"], device=device, start=train["start"])
    priors = {"gaussian": common.StandardNormal(vae.latent_dim), "gmm": common.GaussianMixture(**state["gmm"]),
              "flow": common.frozen(RealNVP(vae.latent_dim), state["flow"], device)}  # ex post
    model = common.Model(train.get("conditioning", "vae"), device, (3, size, size), diffusion, vae, priors)
    if "conditioning" not in train:
        return model
    refiner = common.frozen(build_refiner(train, vae.latent_dim), state["unet"], device)
    stats = {key: value.to(device) for key, value in state["uncertainty"].items()}

    def condition_on(x_hat, z):
        s_vec = s = None
        if train["conditioning"] != "fixed":  # of z, whatever happened to x_hat
            s_vec, s = uncertainty(vae, z, vae.decoder(z), stats, train["uncertainty"])
            s_vec, s = (s_vec.roll(1, 0), s.roll(1, 0)) if shuffled else (s_vec, s)
        return condition(refiner, x_hat, s_vec, s)

    return dataclasses.replace(model, condition=condition_on)


# --- What it shows: what adaptivity buys -----------------------------------------------------------------------------

@torch.no_grad()
def refine_all(model, sense, z, steps, seed, start=None):
    """Refine Dec(z) for z (N, d), from the model's own start or another: x_hat and refined, uint8, and s (N,), on the
    CPU, and seconds per image, `sense` included. With one seed image k has the same noise in every call."""
    if start:  # no network knows where the process began
        diffusion = common.Diffusion(model.diffusion.objective, device=model.device, start=start)
        model = dataclasses.replace(model, diffusion=diffusion)
    parts, clock = [], time.time()
    for i, part in enumerate(z.to(model.device).split(100)):
        x_hat = model.vae.decoder(part)
        refined = common.refine(model, x_hat, part, common.generator(seed + i), "dpm", steps)
        parts.append((to_uint8(x_hat).cpu(), to_uint8(refined).cpu(), sense(part, x_hat)[1].cpu()))
    return *(torch.cat(part) for part in zip(*parts, strict=True)), (time.time() - clock) / len(z)


def against(images, real, setup):
    """Scores of images, the VAE's or refined, against the very images they reconstruct, of which `real` holds the
    features (N, f): a dictionary of numbers."""
    features = fid.extract(setup.extractor, images)[0]
    distance = fid.frechet_distance(fid.moments(features), fid.moments(real))
    return {"fd_to_these": distance, "feature_distance": float((features - real).norm(dim=1).mean()),
            "hf_energy": common.hf_energy(images, setup.test.images)["value"]}


def adaptivity(folder, state, model, setup):
    """Terciles of s, a control, consistency over refiner seeds, adaptive refinement; writes uncertainty.png."""
    steps, seed = setup.evaluation["probe_steps"], 80_000 + 1000 * setup.train["seed"]
    real = setup.test.images[: 3 * (setup.evaluation["grid_count"] // 2)]  # half of grid_count in each third
    stats = {key: value.to(model.device) for key, value in state["uncertainty"].items()}
    sense = functools.partial(uncertainty, model.vae, stats=stats, kind=state["train"]["uncertainty"])
    mu = common.encode(model.vae, real, model.device)[0]
    x_hat, refined, s, _ = refine_all(model, sense, mu, steps, seed)
    again = [refine_all(model, sense, mu, steps, seed + more)[1] for more in (1000, 2000)]
    known, *features = (fid.extract(setup.extractor, x)[0] for x in (real, refined, *again))  # each (N, f)
    features = torch.stack(features)  # (3, N, f)
    wander = (features - features.mean(0)).norm(dim=2).mean(0)  # (N,): how far refiner seeds lie apart, 0 if they agree
    error = common.squared_error(to_float(x_hat), to_float(real))  # (N,), of the VAE
    thirds = dict(zip(("sure", "middle", "unsure"), s.argsort().tensor_split(3), strict=True))
    terciles = {name: {"sse": float(error[i].mean()), "vae": against(x_hat[i], known[i], setup),
                       "refined": against(refined[i], known[i], setup), "consistency": float(wander[i].mean())}
                for name, i in thirds.items()}
    shown = torch.cat([i[:: max(1, len(i) // 4)][:4] for i in thirds.values()])  # twelve images, from the surest on
    common.save_grid(folder / "uncertainty.png", {"real": real[shown], "VAE": x_hat[shown], "refined": refined[shown]})
    control = dataclasses.replace(load_model(state, model.device, shuffled=True), temperature=model.temperature)
    controls = {"true": against(refined, known, setup),
                "shuffled": against(refine_all(control, sense, mu, steps, seed)[1], known, setup)}
    return {"terciles": terciles, "controls": controls,
            "adaptive_refinement": adaptive_refinement(model, sense, setup)}


MEAN_STEPS = 2  # in adaptive_refinement: so few that each tells, since six score as a hundred


def allocate(s, n, start):
    """Ways to refine N images (a multiple of 3) in n steps each on average, by thirds of s (N,) from the surest on: in
    more or fewer steps, or from more or less noise (only the least sure from `start`, the most that networks know).
    `shuffled`, a control, goes by another image's s. {name: three (indices, steps, start)}."""
    few, low, middle, other = n // 2, start // 2, 3 * start // 4, s.roll(1)
    steps = [(few, start), (n, start), (2 * n - few, start)]
    starts = [(n, low), (n, middle), (n, start)]
    ways = {"even": (s, [(n, start)] * 3), "even_middle_start": (s, [(n, middle)] * 3),
            "adaptive_steps": (s, steps), "shuffled_steps": (other, steps),
            "adaptive_start": (s, starts), "shuffled_start": (other, starts)}
    return {name: [(index, *third) for index, third in zip(by.argsort().tensor_split(3), thirds, strict=True)]
            for name, (by, thirds) in ways.items()}


def adaptive_refinement(model, sense, setup):
    """Scores and seconds per image of every way of `allocate`. All images are refined once with each (steps, start); a
    way then takes each image from the run of its third, so z and noise are the same in all."""
    count, n, seed = 3 * (setup.evaluation["count"] // 3), MEAN_STEPS, setup.train["seed"]
    z = model.priors[setup.evaluation["prior"]].sample(count, common.generator(85_000 + seed))
    refined = functools.cache(lambda steps, begin: refine_all(model, sense, z, steps, 86_000 + 1000 * seed, begin))
    result, start = {"mean_steps": n}, model.diffusion.start
    for name, thirds in allocate(refined(n, start)[2], n, start).items():
        images, seconds = torch.empty_like(refined(n, start)[1]), 0.0
        for index, *third in thirds:
            images[index] = refined(*third)[1][index]
            seconds += refined(*third)[3] / 3
        result[name] = {setup.fd: fid.scores(setup.extractor, images, setup.reference)[setup.fd],
                        "hf_energy": common.hf_energy(images, setup.test.images), "seconds_per_image": seconds}
    return result


# --- The command -----------------------------------------------------------------------------------------------------

def network_cost(train):
    """common.network_cost with the flow and, for a refiner, the conditioner of its strategy."""
    cost = common.network_cost(train, channels=6 if "conditioning" in train else None)
    d, size = train["encoder"][-1][1], train["image_size"]
    if train["vae_prior"] == "flow":
        cost["flow"] = common.count_cost(RealNVP(d), torch.zeros(1, d))
    if "conditioning" in train:
        conditioner = Conditioner(train["conditioning"], d, 4 * train["unet"][0][1])
        cost["conditioner"] = common.count_cost(conditioner, torch.zeros(1, 3, size, size), torch.zeros(1, d),
                                                torch.zeros(1))
    return cost


def main(argv=None):
    parser = argparse.ArgumentParser(description="Stage 3: flow prior and adaptive conditioning")
    common.add_flags(parser, "gaussian", "gmm", "flow")
    parser.add_argument("--conditioning", choices=STRATEGIES, default="film",
                        help="how the refiner sees x_hat (default: %(default)s)")
    parser.add_argument("--uncertainty", choices=("regressed", "variance", "posterior"), default="regressed",
                        help="where s comes from (default: %(default)s); posterior: the naive choice, to see why not")
    args = parser.parse_args(argv)
    if args.uncertainty != "regressed" and args.conditioning == "fixed":
        common.fail(f"--uncertainty {args.uncertainty}: --conditioning fixed uses no uncertainty; choose another")
    train, evaluation, device = common.read_settings(args)
    train |= {"vae_prior": "flow" if args.prior == "flow" else "gaussian", "conditioning": args.conditioning,
              "uncertainty": args.uncertainty}
    if args.dry_run:
        return common.print_settings(train, evaluation, network_cost(train))
    setup = common.Setup(args, train, evaluation, device)
    train, data, device = setup.train, setup.data, setup.device
    vae_train = {key: value for key, value in train.items() if key not in ("conditioning", "uncertainty")}
    name = f"stage3-{args.prior}-{args.conditioning}" + (
        "" if args.uncertainty == "regressed" else f"-{args.uncertainty}")
    vae_folder, folder = (setup.home / f"{part}-s{args.seed}" for part in (f"stage3-vae-{train['vae_prior']}", name))
    vae_state = common.trained(vae_folder, vae_train, args.resume,
                               lambda state: train_vae(vae_folder, vae_train, data, device, state))

    def of_vae(model):
        trip = round_trip(model.vae, setup.test.images, 75_000 + args.seed, device)
        return {"uncertainty": rank_errors(trip, vae_state["uncertainty"])}

    vae_setup = copy.copy(setup)
    vae_setup.evaluation = setup.evaluation | {"prior": train["vae_prior"]}
    vae_metrics = common.evaluate(vae_folder, vae_setup, vae_state, load_model(vae_state, device),
                                  network_cost(vae_train), of_vae)
    ranks = vae_metrics["tables"]["uncertainty"]
    for kind, facts in ranks.items():
        print(f"uncertainty, {kind}: rank correlation with held-out squared errors {facts['correlation']:.3f}: "
              f"{facts['verdict']}")
    state = common.trained(folder, train, args.resume,
                           lambda state: train_refiner(folder, train, vae_state, data, device, state))

    def of_refiner(model):
        tables = {"uncertainty": ranks | adaptivity(folder, state, model, setup)}
        if args.uncertainty == "posterior":
            tables["bits_per_dim"] = None  # trained with side information about x: no bound
        return tables

    model = load_model(state, device)
    metrics = common.evaluate(folder, setup, state, model, network_cost(train), of_refiner)
    common.export(args, folder, state, model, setup.evaluation)
    common.print_results({vae_folder: vae_metrics, folder: metrics}, setup)


if __name__ == "__main__":
    main()
