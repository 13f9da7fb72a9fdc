"""Stage 3: a flow prior over z, and conditioning that depends on how sure the VAE is.

Two claims. The latents of a trained VAE do not follow N(0, I), so sampling from it shows the decoder z it never saw: a
normalizing flow (RealNVP, Dinh et al. 2017) can be the prior instead. And where the VAE is unsure its x_hat misleads:
the refiner should lean on it less there, and may spend more steps there.

    flow prior      u = f(z), log p(z) = log N(u; 0, I) + log |det df/dz|; the KL by one sample z ~ q(z|x):
                    KL = log q(z|x) - log p(z), shape (B,). Fitted to detached z first, then with the VAE, then ex post
    uncertainty     s_vec = logvar of Enc(x_hat), standardised per dimension, (B, d); s = its mean over active
                    dimensions, standardised, with the sign that makes high mean hard, (B,). A function of z alone, the
                    same in training and sampling. (q(z|x)'s own variance is a trap: there is no x at sampling, and as
                    side information about x it voids the likelihood bound; `--uncertainty posterior` shows that.)
    conditioning    fixed     x_hat as it is (stage 1)
                    fade      x_hat exp(-max(s, 0) / 2): fades where the VAE is unsure; nothing to learn
                    film      s_vec enters through the time embedding, and a gate on x_hat; starts as fixed
                    coupling  an invertible coupling stack on x_hat, driven by s; starts as the identity. Its
                              log-determinant enters no loss: a condition may be any function, a prior must be a density

Run     python stage3_adaptive.py                                     flow prior, film conditioning, shapes
        python stage3_adaptive.py --prior gmm --conditioning fixed    stage 1 with this stage's evaluation
        python stage3_adaptive.py --dataset celeba64                  all that a GPU user types
Expect  about the minutes of stage 1; the strategies share one VAE with the flow, and one for gaussian and gmm. First a
        verdict whether s carries information at all: if it does not, conditioning on it cannot help.
"""

import argparse
import dataclasses
import math
import time

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
    """A flow u = f(z) with N(0, I) over u: a prior with .log_prob and .sample. The halves are drawn anew, by a fixed
    permutation, before every other coupling and swapped before the rest, so that every dimension is transformed."""

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
        """Log density, once per sample: (N, d) -> (N,) nats."""
        u, log_det = self(z.to(self.orders.device))
        return -0.5 * (u**2).sum(1) - 0.5 * self.d * math.log(2 * math.pi) + log_det

    @torch.no_grad()
    def sample(self, count, gen):
        """`count` draws (count, d) on the CPU, from a CPU generator."""
        return self.inverse(torch.randn(count, self.d, generator=gen).to(self.orders.device)).cpu()


def flow_kl(z, mu, logvar, flow):
    """KL(q(z|x) || p_flow) by one Monte Carlo sample z ~ q: (B,) nats; a sample of it may be negative."""
    return gaussian_log_prob(z, mu, logvar) - flow.log_prob(z)


def fit_flow(mu, logvar, seed, steps, start=None, batch=256):
    """Fit a RealNVP ex post to z ~ N(mu, exp(logvar)), both (N, d), by maximum likelihood, from the weights `start` or
    the identity; returns it in evaluation mode. z is drawn anew in each step: of one draw it would learn the noise."""
    torch.manual_seed(seed)
    flow, gen = RealNVP(mu.shape[1]), common.generator(seed + 3)
    flow.load_state_dict(start or flow.state_dict())
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for step in tqdm(range(steps), desc="flow ex post", leave=False):
        optimizer.param_groups[0]["lr"] = common.learning_rate(1e-3, step, steps, 0.05, True)
        i = torch.randint(len(mu), (batch,), generator=gen)
        loss = -flow.log_prob(mu[i] + (0.5 * logvar[i]).exp() * common.randn((batch, mu.shape[1]), gen)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    return flow.eval().requires_grad_(False)


# --- Uncertainty -----------------------------------------------------------------------------------------------------


def standardise(logvar, stats):
    """logvar (B, d) -> s_vec (B, d), s (B,), by the statistics of the training set."""
    s_vec = ((logvar - stats["mean"]) / stats["sd"]).clamp(-3, 3) * stats["active"]
    s = s_vec.sum(1) / stats["active"].sum().clamp(min=1)
    return s_vec, stats["sign"] * (s - stats["s_mean"]) / stats["s_sd"]


def uncertainty(vae, x_hat, stats):
    """s_vec (B, d) and s (B,) of what the VAE makes of its own output: a function of z alone, since x_hat = Dec(z).
    In float32, as its statistics are: log-variances differ little from image to image."""
    with torch.autocast(x_hat.device.type, enabled=False):
        return standardise(vae.encoder(x_hat)[1], stats)


@torch.no_grad()
def measure_uncertainty(vae, images, seed, device, batch=500):
    """The statistics of s over training images: a dictionary of tensors (mean, sd, active (d,); s_mean, s_sd, sign)
    and what they say: rank `correlation` of s with the true error, `logvar_sd_over_images`, a `verdict`."""
    gen, mus, logvars, errors = common.generator(seed), [], [], []
    for chunk in images.split(batch):
        x0 = to_float(chunk.to(device))
        mu, logvar = vae.encoder(x0)
        x_hat = vae.decoder(mu + (0.5 * logvar).exp() * common.randn(mu.shape, gen).to(device))
        mus.append(mu.cpu())
        logvars.append(vae.encoder(x_hat)[1].cpu())
        errors.append(common.squared_error(x_hat, x0).cpu())
    mu, logvar, error = torch.cat(mus), torch.cat(logvars), torch.cat(errors)
    stats = {"mean": logvar.mean(0), "sd": logvar.std(0).clamp(min=1e-6), "active": common.active_units(mu).float(),
             "s_mean": torch.zeros(()), "s_sd": torch.ones(()), "sign": torch.ones(())}
    raw = standardise(logvar, stats)[1]
    stats |= {"s_mean": raw.mean(), "s_sd": raw.std().clamp(min=1e-6)}
    correlation, p_value = spearmanr(raw.numpy(), error.numpy()) if float(raw.std()) > 0 else (0.0, 1.0)
    stats["sign"] = torch.tensor(1.0 if correlation >= 0 else -1.0)
    silent = abs(correlation) < 0.1 or p_value > 0.05
    verdict = "s carries no information: conditioning on it cannot help" if silent else "s ranks the error"
    facts = {"correlation": abs(float(correlation)), "sign": float(stats["sign"]),
             "active_units": int(stats["active"].sum()), "logvar_mean": float(logvar.mean()),
             "logvar_sd_over_images": float(stats["sd"][stats["active"] > 0].mean()) if stats["active"].any() else 0.0,
             "verdict": verdict}
    return {key: value.to(device) for key, value in stats.items()}, facts


# --- Conditioning ----------------------------------------------------------------------------------------------------


class ImageCoupling(nn.Module):
    """Affine coupling on an image (B, 3, H, W): the pixels of one colour of a checkerboard, with s, scale and shift the
    others. Starts as the identity."""

    def __init__(self, colour, width=16):
        super().__init__()
        self.colour = colour
        self.net = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.SiLU(),
                                 common.zero_init(nn.Conv2d(width, 6, 3, padding=1)))

    def parts(self, x, s):
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
        passes = ((rows[:, None] + columns) % 2 == self.colour).to(x.dtype)  # (H, W)
        level = s[:, None, None, None].expand(-1, 1, *x.shape[2:])  # (B, 1, H, W)
        raw, shift = self.net(torch.cat([x * passes, level], 1)).chunk(2, 1)
        return torch.tanh(raw).float() * (1 - passes), shift.float() * (1 - passes)

    def forward(self, x, s):
        scale, shift = self.parts(x, s)
        return x * scale.exp() + shift

    def inverse(self, y, s):  # the passing pixels are the same in x and y, so scale and shift are, too
        scale, shift = self.parts(y, s)
        return (y - shift) * (-scale).exp()


class Conditioner(nn.Module):
    """What a strategy makes of x_hat (B, 3, H, W), s_vec (B, d) and s (B,): the image the U-Net sees beside x_t and an
    addition to its time embedding (B, emb_dim), or None."""

    def __init__(self, strategy, d, emb_dim):
        super().__init__()
        self.strategy = strategy
        if strategy == "film":
            self.film, self.gate = common.zero_init(nn.Linear(d, emb_dim)), common.zero_init(nn.Linear(d, 3))
        if strategy == "coupling":
            self.couplings = nn.ModuleList(ImageCoupling(i % 2) for i in range(4))

    def forward(self, x_hat, s_vec, s):
        if self.strategy == "fade":
            return x_hat * torch.exp(-0.5 * s.clamp(min=0))[:, None, None, None], None
        if self.strategy == "film":
            return x_hat * (1 + torch.tanh(self.gate(s_vec)))[:, :, None, None], self.film(s_vec)
        if self.strategy == "coupling":
            for coupling in self.couplings:
                x_hat = coupling(x_hat, s)
        return x_hat, None


def condition(refiner, x_hat, s_vec, s, diffusion):
    """`denoise(x, t)` with the conditions fixed: Formulation 1 on what the strategy makes of x_hat. The guess, where
    there is one, is from x_hat itself under every strategy: dimmed, it would be no mean of x0."""
    seen, extra = refiner["conditioner"](x_hat, s_vec, s)
    return lambda x, t: diffusion.complete(refiner["unet"](torch.cat([x, seen], 1), t, extra), x, x_hat, t)


# --- Training --------------------------------------------------------------------------------------------------------


def vae_loss(vae, x0, noise, beta, joint):
    """SSE + beta KL, stage 1's, or against the VAE's flow: (B,) and its terms. Before `joint` the VAE still feels
    N(0, I) while the flow is fitted to detached z; from then on the KL of both is that to the flow."""
    mu, logvar = vae.encoder(x0)
    z = mu + (0.5 * logvar).exp() * noise
    sse, kl = common.squared_error(vae.decoder(z), x0), common.gaussian_kl(mu, logvar)  # (B,)
    if vae.flow is None:
        return sse + beta * kl, {"sse": sse, "kl_nats": kl}
    if joint:
        kl_flow = flow_kl(z, mu, logvar, vae.flow)
        total = sse + beta * kl_flow
    else:
        kl_flow = flow_kl(z.detach(), mu.detach(), logvar.detach(), vae.flow)
        total = sse + beta * kl + kl_flow
    return total, {"sse": sse, "kl_nats": kl, "kl_flow_nats": kl_flow}


def build_vae(train):
    """The VAE, with its flow if that is the prior it is trained under."""
    vae = common.build_vae(train)
    vae.flow = RealNVP(vae.latent_dim) if train["vae_prior"] == "flow" else None
    return vae


def train_vae(folder, train, data, device, resume):
    """Train the VAE; then fit what is fitted ex post: the mixture, the flow (a joint one goes on: it, too, gains from
    large batches once the VAE holds still), and the statistics of s. Returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if state and state["finished"]:
        return state
    torch.manual_seed(train["seed"])
    vae = build_vae(train)
    training = common.Training(folder, state, train, device, data.images, train["flip"] == "both", vae=vae)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        noise = training.draw(torch.randn, vae.latent_dim)  # (B, d)
        with common.autocast(device):
            loss, terms = vae_loss(vae, x0, noise, train["beta"], training.steps >= 0.6 * train["steps"])
        training.step(loss, terms)
    vae = common.frozen(build_vae(train), training.averages["vae"], device)
    gmm = common.fit_mixture(vae, data.images, train, device)
    _, mu, logvar = common.encode(vae, data.images, common.generator(train["seed"] + 2), device)
    flow = fit_flow(mu, logvar, train["seed"], min(train["steps"], 5000), vae.flow and vae.flow.state_dict())
    some = torch.randperm(len(data.images), generator=common.generator(0))[:10_000]
    stats, facts = measure_uncertainty(vae, data.images[some], train["seed"], device)
    return training.finish(gmm=gmm, flow=flow.state_dict(), uncertainty={k: v.cpu() for k, v in stats.items()},
                           uncertainty_facts=facts)


def build_refiner(train, d):
    """The U-Net and the conditioner of a strategy, trained as one."""
    return nn.ModuleDict({"unet": common.build_unet(train, 6),
                          "conditioner": Conditioner(train["conditioning"], d, 4 * train["unet"][0][1])})


def train_refiner(folder, train, vae_state, data, device, resume):
    """Train a refiner under a strategy with the VAE frozen; returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if state and state["finished"]:
        return state
    vae = common.frozen(build_vae(train), vae_state["vae"], device)
    torch.manual_seed(train["seed"])
    refiner = build_refiner(train, vae.latent_dim)
    diffusion = common.Diffusion(train["objective"], device=device, residual_sd=train["residual_sd"])
    stats = {key: value.to(device) for key, value in vae_state["uncertainty"].items()}
    training = common.Training(folder, state, train, device, data.images, train["flip"] != "none", unet=refiner)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        z_noise = training.draw(torch.randn, vae.latent_dim)  # (B, d)
        t = diffusion.draw_t(training.draw(torch.rand), train["t_power"])  # (B,), in 1..T
        eps = training.draw(torch.randn, *x0.shape[1:])  # (B, 3, H, W)
        with common.autocast(device):
            with torch.no_grad():
                x_hat, _, logvar = vae(x0, z_noise)
                s_vec = s = None
                if train["conditioning"] != "fixed":
                    posterior = train["uncertainty"] == "posterior"
                    s_vec, s = standardise(logvar, stats) if posterior else uncertainty(vae, x_hat, stats)
            loss = diffusion.simple_loss(condition(refiner, x_hat, s_vec, s, diffusion), x0, t, eps)  # (B,)
        training.step(loss, {f"{train['objective']}_mse": loss})
    return training.finish(**{key: vae_state[key] for key in ("vae", "flow", "gmm", "uncertainty",
                                                              "uncertainty_facts")})


# --- Sampling --------------------------------------------------------------------------------------------------------


def load_model(state, device, control=None):
    """Rebuild a common.Model from its checkpoint alone: of a VAE, or of a refiner with its VAE. `control(s_vec, s)`
    may change what the refiner is told."""
    train, size = state["train"], state["train"]["image_size"]
    vae = common.frozen(build_vae(train), state["vae"], device)
    diffusion = common.Diffusion(train["objective"], device=device, residual_sd=train["residual_sd"])
    priors = {"gaussian": common.StandardNormal(vae.latent_dim), "gmm": common.GaussianMixture(**state["gmm"]),
              "flow": common.frozen(RealNVP(vae.latent_dim), state["flow"], device)}
    model = common.Model(train.get("conditioning", "vae"), device, (3, size, size), diffusion, vae, priors)
    if "conditioning" not in train:
        return model
    refiner = common.frozen(build_refiner(train, vae.latent_dim), state["unet"], device)
    stats = {key: value.to(device) for key, value in state["uncertainty"].items()}

    def denoiser(x_hat, z):
        s_vec = s = None
        if train["conditioning"] != "fixed":  # of z, whatever happened to x_hat
            s_vec, s = uncertainty(vae, vae.decoder(z), stats)
            s_vec, s = control(s_vec, s) if control else (s_vec, s)
        return condition(refiner, x_hat, s_vec, s, diffusion)

    return dataclasses.replace(model, denoiser=denoiser)


# --- What it shows: what adaptivity buys -----------------------------------------------------------------------------


def allocate(s, steps):
    """Steps per image by thirds of s (N,), N a multiple of 3: n/2 for the surest, n, 3n/2 for the least sure, so that
    their mean is n. Returns three (indices, steps)."""
    return list(zip(s.argsort().tensor_split(3), (steps // 2, steps, 2 * steps - steps // 2), strict=True))


def constant(s_vec, s):
    """Control: every image is told the uncertainty of the batch's median image."""
    middle = s.argsort()[len(s) // 2]
    return s_vec[middle].expand_as(s_vec), s[middle].expand_as(s)


CONTROLS = {
    "true": None,
    "shuffled": lambda s_vec, s: (s_vec.roll(1, 0), s.roll(1, 0)),
    "constant": constant,
    "zero": lambda s_vec, s: (torch.zeros_like(s_vec), torch.zeros_like(s)),
}


@torch.no_grad()
def held_out(model, stats, images, steps, seed, batch=100):
    """Refine the reconstructions of held-out images: uint8 x_hat and refined (CPU), and s (N,)."""
    parts = []
    for i, chunk in enumerate(images.split(batch)):
        z = model.vae.encoder(to_float(chunk.to(model.device)))[0]
        x_hat = model.vae.decoder(z)
        refined = common.refine(model, x_hat, z, common.generator(80_000 + 1000 * seed + i), "dpm", steps)
        s = uncertainty(model.vae, x_hat, stats)[1]
        parts.append((to_uint8(x_hat).cpu(), to_uint8(refined).cpu(), s.cpu()))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def against(images, real, setup):
    """Scores of images, the VAE's or refined, against the very images they reconstruct, of which `real` holds the
    features (N, f): a dictionary of numbers."""
    features = fid.extract(setup.extractor, images)[0]
    distance = fid.frechet_distance(*(fid.FeatureStats().update(x) for x in (features, real)))
    return {"fd_to_these": distance, "feature_distance": float((features - real).norm(dim=1).mean()),
            "hf_energy": common.hf_energy(images, setup.test.images)["value"]}


def adaptivity(folder, state, model, setup):
    """Terciles of s, controls, consistency over refiner seeds, adaptive steps; writes uncertainty.png."""
    steps, seed = setup.evaluation["probe_steps"], setup.train["seed"]
    real, table = setup.test.images[: 3 * (setup.evaluation["grid_count"] // 2)], {}
    stats = {key: value.to(model.device) for key, value in state["uncertainty"].items()}
    x_hat, refined, s = held_out(model, stats, real, steps, seed)
    again = [held_out(model, stats, real, steps, other)[1] for other in (seed + 1, seed + 2)]
    features = torch.stack([fid.extract(setup.extractor, x)[0] for x in (refined, *again)])  # (3, N, f)
    known = fid.extract(setup.extractor, real)[0]  # (N, f)
    wander = (features - features.mean(0)).norm(dim=2).mean(0)  # (N,): how far refiner seeds lie apart
    error = common.squared_error(to_float(x_hat), to_float(real))  # (N,), of the VAE
    table["error_by_uncertainty"] = [{"s": float(s[i].mean()), "sse": float(error[i].mean())}
                                     for i in s.argsort().tensor_split(min(10, len(s)))]
    thirds = s.argsort().tensor_split(3)
    table["terciles"] = {name: {"vae": against(x_hat[i], known[i], setup),
                                "refined": against(refined[i], known[i], setup),
                                "consistency": float(wander[i].mean())}
                         for name, i in zip(("sure", "middle", "unsure"), thirds, strict=True)}
    shown = torch.cat([i[:: max(1, len(i) // 4)][:4] for i in thirds])  # twelve images, from the surest on
    common.save_grid(folder / "uncertainty.png", {"real": real[shown], "VAE": x_hat[shown], "refined": refined[shown]})
    table["controls"] = {}
    for name, control in CONTROLS.items():
        told = dataclasses.replace(load_model(state, model.device, control), temperature=model.temperature)
        images = held_out(told, stats, real, steps, seed)[1] if control else refined
        table["controls"][name] = against(images, known, setup)
    return table | {"adaptive_steps": adaptive_steps(model, stats, setup)}


@torch.no_grad()
def adaptive_steps(model, stats, setup):
    """The same z and x_T refined with n steps for all, and with n/2, n, 3n/2 by thirds of s: scores and seconds."""
    count, n = 3 * (setup.evaluation["grid_count"] // 3), setup.evaluation["probe_steps"]
    gen = common.generator(85_000 + setup.train["seed"])
    z = model.priors[setup.evaluation["prior"]].sample(count, gen).to(model.device)
    x_T = model.temperature * common.randn((count, *model.shape), gen).to(model.device)
    result = {"mean_steps": n}
    for name in ("even", "adaptive"):
        images, clock = torch.empty(x_T.shape, dtype=torch.uint8), time.time()
        order = [(torch.arange(count), n)]
        if name == "adaptive":
            s = [uncertainty(model.vae, model.vae.decoder(part), stats)[1].cpu() for part in z.split(100)]
            order = allocate(torch.cat(s), n)
        for index, steps in order:
            for part in index.split(100):
                with common.autocast(model.device):
                    denoise = model.denoiser(model.vae.decoder(z[part]), z[part])
                    x = common.sample(model.diffusion, denoise, x_T[part], "dpm", steps)
                images[part] = to_uint8(x).cpu()
        seconds = (time.time() - clock) / count
        score = fid.scores(setup.extractor, images, setup.reference)[setup.fd]
        result[name] = {setup.fd: score, "seconds_per_image": seconds}
    return result


def steps_to_quality(rows, fd):
    """Per sampler, the fewest steps of the grid whose score is within 10% of the most steps', and the time saved."""
    result = {}
    for sampler in sorted({row["sampler"] for row in rows}):
        mine = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["nfe"])
        enough = next(row for row in mine if row[fd]["value"] <= 1.1 * mine[-1][fd]["value"])
        result[sampler] = {"steps": enough["nfe"], "of": mine[-1]["nfe"],
                           "time_saved": 1 - enough["seconds_per_image"] / mine[-1]["seconds_per_image"]}
    return result


@torch.no_grad()
def held_out_elbo(model, images, seed):
    """Negative ELBO (up to the constant of a Gaussian decoder of variance 1/2, beta = 1) on held-out images, with the
    KL to N(0, I), or to the flow as refitted ex post where the VAE was trained with one; and each prior's log density
    of z ~ q(z|x): scores with a 95% interval over images."""
    gen, parts = common.generator(75_000 + seed), []
    for chunk in images.split(500):
        x0 = to_float(chunk.to(model.device))
        mu, logvar = model.vae.encoder(x0)
        z = mu + (0.5 * logvar).exp() * common.randn(mu.shape, gen).to(model.device)
        sse = common.squared_error(model.vae.decoder(z), x0)
        kl = flow_kl(z, mu, logvar, model.priors["flow"]) if model.vae.flow else common.gaussian_kl(mu, logvar)
        densities = {f"log_density_{name}": p.log_prob(z.cpu()).cpu().float() for name, p in model.priors.items()}
        parts.append({"negative_elbo": (sse + kl).cpu(), "sse": sse.cpu(), "kl": kl.cpu()} | densities)
    return {name: common.mean_score(torch.cat([part[name] for part in parts])) for name in parts[0]}


# --- The command -----------------------------------------------------------------------------------------------------


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description="Stage 3: flow prior and adaptive conditioning")
    common.add_flags(parser, "gaussian", "gmm", "flow")
    parser.add_argument("--conditioning", choices=STRATEGIES, default="film", help="how the refiner sees x_hat")
    parser.add_argument("--uncertainty", choices=("variance", "posterior"), default="variance",
                        help="posterior: the naive choice in training, to see why not")
    args = parser.parse_args(argv)
    if args.uncertainty == "posterior" and args.conditioning == "fixed":
        common.fail("--uncertainty posterior: --conditioning fixed uses no uncertainty; choose another")
    return args


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
    args = parse_flags(argv)
    train, evaluation, device = common.read_settings(args)
    train |= {"vae_prior": "flow" if args.prior == "flow" else "gaussian", "conditioning": args.conditioning,
              "uncertainty": args.uncertainty}
    if args.dry_run:
        return common.print_settings(train, evaluation, network_cost(train))
    setup = common.prepare(args, train, evaluation, device)
    train, data, device = setup.train, setup.data, setup.device
    if len(setup.test.images) < 6:
        common.fail(f"--data-dir {args.data_dir}: {len(setup.test.images)} held-out images; thirds need at least 6")
    vae_train = {key: value for key, value in train.items() if key not in ("conditioning", "uncertainty")}
    name = f"stage3-{args.prior}-{args.conditioning}" + ("-posterior" if args.uncertainty == "posterior" else "")
    vae_folder, folder = (setup.home / f"{part}-s{args.seed}" for part in (f"stage3-vae-{train['vae_prior']}", name))
    vae_state = train_vae(vae_folder, vae_train, data, device, args.resume)
    print("uncertainty: log-variances vary by {logvar_sd_over_images:.3g} over images (mean {logvar_mean:.3g}), rank "
          "correlation with the squared error {correlation:.3f} (sign {sign:+.0f}): {verdict}".format(
              **vae_state["uncertainty_facts"]))
    state = train_refiner(folder, train, vae_state, data, device, args.resume)

    def of_vae(model, rows):
        return {"uncertainty": vae_state["uncertainty_facts"],
                "elbo": held_out_elbo(model, setup.test.images, args.seed)}

    def of_refiner(model, rows):
        tables = {"uncertainty": state["uncertainty_facts"] | adaptivity(folder, state, model, setup),
                  "steps_to_quality": steps_to_quality(rows[len(model.priors) :], setup.fd)}
        if args.uncertainty == "posterior":
            tables["bits_per_dim"] = None  # trained with side information about x: no bound
        return tables

    vae_setup = dataclasses.replace(setup, evaluation=setup.evaluation | {"prior": train["vae_prior"]})
    finished = {vae_folder: common.evaluate(vae_folder, vae_setup, vae_state, load_model(vae_state, device),
                                            network_cost(vae_train), of_vae),
                folder: common.evaluate(folder, setup, state, load_model(state, device), network_cost(train),
                                        of_refiner)}
    common.print_results(finished, setup)


if __name__ == "__main__":
    main()
