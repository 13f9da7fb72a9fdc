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
                    variance  x_hat exp(-max(s, 0) / 2): fades where the VAE is unsure; nothing to learn
                    learned   FiLM: s_vec enters through the time embedding, and a gate on x_hat; starts as fixed
                    flow      an invertible coupling stack on x_hat, driven by s; starts as the identity. Its
                    log-determinant enters no loss: a condition may be any function, a prior must be a density

Run     python stage3_adaptive.py                                     flow prior, learned conditioning, shapes
        python stage3_adaptive.py --prior gmm --conditioning fixed    stage 1 with this stage's evaluation
        python stage3_adaptive.py --dataset celeba64                  all that a GPU user types
Expect  about the minutes of stage 1; the VAE is trained once per prior and shared by the strategies. First a verdict
        whether s carries information at all: if it does not, conditioning on it cannot help.
"""

import argparse
import json
import math
import sys
import time
from types import SimpleNamespace

import torch
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

import common
import fid
from common import to_float, to_uint8

STRATEGIES = ("fixed", "variance", "learned", "flow")


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description="Stage 3: flow prior and adaptive conditioning")
    common.add_flags(parser)
    parser.add_argument("--prior", choices=("gaussian", "gmm", "flow"), default="flow", help="over z; flow has its VAE")
    parser.add_argument("--conditioning", choices=STRATEGIES, default="learned", help="how the refiner sees x_hat")
    parser.add_argument("--uncertainty", choices=("reencoded", "posterior"), default="reencoded",
                        help="posterior: the naive choice in training, to see why not")
    args = parser.parse_args(argv)
    if args.uncertainty == "posterior" and args.conditioning == "fixed":
        common.fail("--uncertainty posterior: --conditioning fixed uses no uncertainty; choose another")
    return args


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


def gaussian_log_prob(z, mu, logvar):
    """log N(z; mu, exp(logvar)): three (B, d) -> (B,) nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(1)


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
    and what they say: `correlation` of s with the true error, `spread` of the log-variances, a verdict."""
    gen, mus, logvars, errors = common.generator(seed), [], [], []
    for chunk in images.split(batch):
        x0 = to_float(chunk.to(device))
        mu, logvar = vae.encoder(x0)
        x_hat = vae.decoder(mu + (0.5 * logvar).exp() * common.randn(mu.shape, gen).to(device))
        mus.append(mu.cpu())
        logvars.append(vae.encoder(x_hat)[1].cpu())
        errors.append(((x_hat - x0) ** 2).flatten(1).sum(1).cpu() / 4)
    mu, logvar, error = torch.cat(mus), torch.cat(logvars), torch.cat(errors)
    one = torch.ones(())
    stats = {"mean": logvar.mean(0), "sd": logvar.std(0).clamp(min=1e-6), "active": (mu.var(0) > 0.01).float(),
             "s_mean": 0 * one, "s_sd": one, "sign": one}
    raw = standardise(logvar, stats)[1]
    stats |= {"s_mean": raw.mean(), "s_sd": raw.std().clamp(min=1e-6)}
    test = spearmanr(raw.numpy(), error.numpy()) if float(raw.std()) > 0 else SimpleNamespace(statistic=0.0, pvalue=1.0)
    correlation = float(test.statistic)
    stats["sign"] = torch.tensor(1.0 if correlation >= 0 else -1.0)
    silent = abs(correlation) < 0.1 or test.pvalue > 0.05
    verdict = "s carries no information: conditioning on it cannot help" if silent else "s ranks the error"
    facts = {"correlation": abs(correlation), "sign": float(stats["sign"]), "active_units": int(stats["active"].sum()),
             "logvar_sd_over_images": float(stats["sd"][stats["active"] > 0].mean()) if stats["active"].any() else 0.0,
             "logvar_mean": float(logvar.mean()), "verdict": verdict}
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
        if strategy == "learned":
            self.film, self.gate = common.zero_init(nn.Linear(d, emb_dim)), common.zero_init(nn.Linear(d, 3))
        if strategy == "flow":
            self.couplings = nn.ModuleList(ImageCoupling(i % 2) for i in range(4))

    def forward(self, x_hat, s_vec, s):
        if self.strategy == "variance":
            return x_hat * torch.exp(-0.5 * s.clamp(min=0))[:, None, None, None], None
        if self.strategy == "learned":
            return x_hat * (1 + torch.tanh(self.gate(s_vec)))[:, :, None, None], self.film(s_vec)
        if self.strategy == "flow":
            for coupling in self.couplings:
                x_hat = coupling(x_hat, s)
        return x_hat, None


def condition(refiner, x_hat, s_vec, s, diffusion):
    """`denoise(x, t)` with the conditions fixed: Formulation 1 on what the strategy makes of x_hat. The guess, where
    there is one, is from x_hat itself under every strategy: dimmed, it would be no mean of x0."""
    seen, extra = refiner["conditioner"](x_hat, s_vec, s)
    return lambda x, t: diffusion.complete(refiner["unet"](torch.cat([x, seen], 1), t, extra), x, x_hat, t)


# --- Training --------------------------------------------------------------------------------------------------------


def fit(folder, state, train, network, loss, images, flip, lr, clip, ema_decay, device, carried):
    """Stage 1's loop, to the letter but for the step, which the loss may depend on: `loss(x0, gen, step)`."""
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
            index = torch.randint(len(images), (train["batch"],), generator=gen, device=device)
            x0 = to_float(images[index]).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
            if flip:
                mirrored = torch.rand(len(x0), generator=gen, device=device) < 0.5
                x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
            with common.autocast(device):
                per_image, terms = loss(x0, gen, step)
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


def vae_loss(vae, flow, x0, noise, beta, joint):
    """SSE + beta KL, stage 1's, or against the flow: (B,) and its terms. Before `joint` the VAE still feels N(0, I)
    while the flow is fitted to detached z; from then on the KL of both is that to the flow."""
    mu, logvar = vae.encoder(x0)
    z = mu + (0.5 * logvar).exp() * noise
    sse = ((vae.decoder(z) - x0) ** 2).flatten(1).sum(1) / 4  # (B,)
    kl = common.gaussian_kl(mu, logvar)
    if flow is None:
        return sse + beta * kl, {"sse": sse, "kl_nats": kl}
    kl_flow = flow_kl(z if joint else z.detach(), *((mu, logvar) if joint else (mu.detach(), logvar.detach())), flow)
    total = sse + beta * kl_flow if joint else sse + beta * kl + kl_flow
    return total, {"sse": sse, "kl_nats": kl, "kl_flow_nats": kl_flow}


def train_vae(folder, train, data, device, resume):
    """Train the VAE (with its flow, if that is the prior); then fit what is fitted ex post: the mixture, the flow (the
    joint one goes on), and the statistics of s. Returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if not state or not state["finished"]:
        torch.manual_seed(train["seed"])
        networks = nn.ModuleDict({"vae": common.build_vae(train)})
        if train["vae_prior"] == "flow":
            networks["flow"] = RealNVP(networks["vae"].latent_dim)

        def loss(x0, gen, step):
            x0, noise = common.share(x0, common.randn((len(x0), networks["vae"].latent_dim), gen))
            flow = networks["flow"] if "flow" in networks else None
            return vae_loss(networks["vae"], flow, x0, noise, train["beta"], step >= 0.6 * train["steps"])

        state = fit(folder, state, train, networks, loss, data.images.to(device), train["flip"] == "both",
                    train["vae_lr"], train["vae_clip"], train["vae_ema"], device, {})
    if "uncertainty" not in state:
        part = lambda name: {key.removeprefix(f"{name}."): value for key, value in state["ema"].items()  # noqa: E731
                             if key.startswith(f"{name}.")}
        state["vae"], state["flow"] = part("vae"), part("flow")
        vae = common.restore(common.build_vae(train), state["vae"], device)
        state["gmm"] = common.fit_mixture(vae, data.images, train, device)
        _, mu, logvar = common.encode(vae, data.images, common.generator(train["seed"] + 2), device)
        flow = fit_flow(mu, logvar, train["seed"], min(train["steps"], 5000), state["flow"])
        state["flow"] = flow.state_dict()  # a joint flow, too, gains from large batches once the VAE holds still
        some = torch.randperm(len(data.images), generator=common.generator(0))[:10_000]
        stats, facts = measure_uncertainty(vae, data.images[some], train["seed"], device)
        state["uncertainty"], state["uncertainty_facts"] = {k: v.cpu() for k, v in stats.items()}, facts
        common.save_checkpoint(folder / "checkpoint.pt", state)
    return state


def build_refiner(train, d):
    """The U-Net and the conditioner of a strategy, trained as one."""
    return nn.ModuleDict({"unet": common.build_unet(train, 6),
                          "conditioner": Conditioner(train["conditioning"], d, 4 * train["unet"][0][1])})


def train_refiner(folder, train, vae_state, data, device, resume):
    """Train a refiner under a strategy with the VAE frozen; returns the checkpoint."""
    state = common.open_run(folder, train, resume)
    if state and state["finished"]:
        return state
    vae = common.restore(common.build_vae(train), vae_state["vae"], device)
    torch.manual_seed(train["seed"])
    refiner = build_refiner(train, vae.latent_dim)
    diffusion = common.Diffusion(train["objective"], device=device, residual_sd=train["residual_sd"])
    stats = {key: value.to(device) for key, value in vae_state["uncertainty"].items()}
    carried = {key: vae_state[key] for key in ("vae", "flow", "gmm", "uncertainty", "uncertainty_facts")}

    def loss(x0, gen, step):
        z_noise = common.randn((len(x0), vae.latent_dim), gen)
        t = diffusion.draw_t(len(x0), train["t_power"], gen)  # (B,), in 1..T
        x0, z_noise, t, eps = common.share(x0, z_noise, t, common.randn(x0.shape, gen))
        with torch.no_grad():
            x_hat, _, logvar = vae(x0, z_noise)
            s_vec = s = None
            if train["conditioning"] != "fixed":
                s_vec, s = (standardise(logvar, stats) if train["uncertainty"] == "posterior" else
                            uncertainty(vae, x_hat, stats))
        mse = diffusion.simple_loss(condition(refiner, x_hat, s_vec, s, diffusion), x0, t, eps)
        return mse, {f"{train['objective']}_mse": mse}

    return fit(folder, state, train, refiner, loss, data.images.to(device), train["flip"] != "none", train["unet_lr"],
               train["unet_clip"], train["unet_ema"], device, carried)


def load_model(state, device):
    """Rebuild a model (see common.py, section 9) from its checkpoint alone: of a VAE, or of a refiner with its VAE.
    `control(s_vec, s)` may change what the refiner is told."""
    train = state["train"]
    model = SimpleNamespace(name=train.get("conditioning", "vae"), device=device, size=train["image_size"],
                            diffusion=common.Diffusion(train["objective"], device=device,
                                                       residual_sd=train["residual_sd"]), denoiser=None,
                            stats={key: value.to(device) for key, value in state["uncertainty"].items()},
                            vae=common.restore(common.build_vae(train), state["vae"], device), control=None,
                            temperature=1.0)
    d = model.vae.latent_dim
    flow = common.restore(RealNVP(d), state["flow"], device)
    if train["vae_prior"] == "flow":
        model.kl = lambda z, mu, logvar: flow_kl(z, mu, logvar, flow)
    model.priors = {"gaussian": common.StandardNormal(d), "gmm": common.GaussianMixture(**state["gmm"]), "flow": flow}
    if "conditioning" in train:
        model.refiner = common.restore(build_refiner(train, d), state["ema"], device)

        def denoiser(x_hat, z):
            s_vec = s = None
            if train["conditioning"] != "fixed":  # of z, whatever happened to x_hat
                s_vec, s = uncertainty(model.vae, model.vae.decoder(z), model.stats)
                s_vec, s = model.control(s_vec, s) if model.control else (s_vec, s)
            return condition(model.refiner, x_hat, s_vec, s, model.diffusion)
        model.denoiser = denoiser
    return model


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


# --- What adaptivity buys --------------------------------------------------------------------------------------------


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
def held_out(model, images, steps, seed, batch=100):
    """Refine the reconstructions of held-out images: uint8 x_hat and refined (CPU), and s (N,)."""
    parts = []
    for i, chunk in enumerate(images.split(batch)):
        z = model.vae.encoder(to_float(chunk.to(model.device)))[0]
        x_hat = model.vae.decoder(z)
        refined = common.refine(model, x_hat, z, common.generator(80_000 + 1000 * seed + i), "dpm", steps)
        s = uncertainty(model.vae, x_hat, model.stats)[1]
        parts.append((to_uint8(x_hat).cpu(), to_uint8(refined).cpu(), s.cpu()))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def against(extractor, images, real, test):
    """Scores of refined images against the very images they reconstruct: a dictionary of numbers."""
    a, b = (fid.extract(extractor, x)[0] for x in (images, real))
    distance = fid.frechet_distance(*(fid.FeatureStats().update(x) for x in (a, b)))
    return {"fd_to_these": distance, "feature_distance": float((a - b).norm(dim=1).mean()),
            "hf_energy": common.hf_energy(images, test.images)["value"]}


def adaptivity(folder, model, test, extractor, reference, evaluation, prior, seed):
    """Terciles of s, controls, consistency over refiner seeds, adaptive steps; writes uncertainty.png."""
    steps = evaluation["probe_steps"]
    real, table = test.images[: 3 * (evaluation["grid_count"] // 2)], {}
    x_hat, refined, s = held_out(model, real, steps, seed)
    again = [held_out(model, real, steps, other)[1] for other in (seed + 1, seed + 2)]
    features = torch.stack([fid.extract(extractor, x)[0] for x in (refined, *again)])  # (3, N, f)
    wander = (features - features.mean(0)).norm(dim=2).mean(0)  # (N,): how far refiner seeds lie apart
    error = (x_hat.float() - real.float()).div(255).square().flatten(1).sum(1)  # (N,), of the VAE, as in its loss
    table["error_by_uncertainty"] = [{"s": float(s[i].mean()), "sse": float(error[i].mean())}
                                     for i in s.argsort().tensor_split(min(10, len(s)))]
    thirds = s.argsort().tensor_split(3)
    table["terciles"] = {name: {"vae": against(extractor, x_hat[i], real[i], test),
                                "refined": against(extractor, refined[i], real[i], test),
                                "consistency": float(wander[i].mean())}
                         for name, i in zip(("sure", "middle", "unsure"), thirds, strict=True)}
    shown = torch.cat([i[:: max(1, len(i) // 4)][:4] for i in thirds])  # twelve images, from the surest on
    rows = [x[shown] for x in (real, x_hat, refined)]
    common.save_grid(folder / "uncertainty.png", rows, ["real", "VAE", "refined"])
    table["controls"] = {}
    for name, model.control in CONTROLS.items():
        images = held_out(model, real, steps, seed)[1] if model.control else refined
        table["controls"][name] = against(extractor, images, real, test)
    model.control = None
    table["adaptive_steps"] = adaptive_steps(model, extractor, reference, evaluation, prior, seed)
    return table


@torch.no_grad()
def adaptive_steps(model, extractor, reference, evaluation, prior, seed):
    """The same z and x_T refined with n steps for all, and with n/2, n, 3n/2 by thirds of s: scores and seconds."""
    count, n = 3 * (evaluation["grid_count"] // 3), evaluation["probe_steps"]
    gen, fd = common.generator(85_000 + seed), "fd" + extractor.suffix if extractor.suffix else "fid"
    z = model.priors[prior].sample(count, gen).to(model.device)
    x_T = model.temperature * common.randn((count, 3, model.size, model.size), gen).to(model.device)
    result = {"mean_steps": n}
    for name in ("even", "adaptive"):
        images, clock = torch.empty(x_T.shape, dtype=torch.uint8), time.time()
        order = [(torch.arange(count), n)]
        if name == "adaptive":
            s = [uncertainty(model.vae, model.vae.decoder(part), model.stats)[1].cpu() for part in z.split(100)]
            order = allocate(torch.cat(s), n)
        for index, steps in order:
            for part in index.split(100):
                with common.autocast(model.device):
                    denoise = model.denoiser(model.vae.decoder(z[part]), z[part])
                    x = common.sample(model.diffusion, denoise, x_T[part], "dpm", steps)
                images[part] = to_uint8(x).cpu()
        seconds = (time.time() - clock) / count
        result[name] = {fd: fid.scores(extractor, images, reference)[fd], "seconds_per_image": seconds}
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
def held_out_elbo(model, images, seed, flow):
    """Negative ELBO (up to the constant of a Gaussian decoder of variance 1/2, beta = 1) on held-out images, with the
    KL to the VAE's own prior; and each prior's log density of z ~ q(z|x): scores with a 95% interval over images."""
    gen, parts = common.generator(75_000 + seed), []
    for chunk in images.split(500):
        x0 = to_float(chunk.to(model.device))
        mu, logvar = model.vae.encoder(x0)
        z = mu + (0.5 * logvar).exp() * common.randn(mu.shape, gen).to(model.device)
        sse = ((model.vae.decoder(z) - x0) ** 2).flatten(1).sum(1) / 4
        kl = flow_kl(z, mu, logvar, model.priors["flow"]) if flow else common.gaussian_kl(mu, logvar)
        densities = {f"log_density_{name}": p.log_prob(z.cpu()).cpu().float() for name, p in model.priors.items()}
        parts.append({"negative_elbo": (sse + kl).cpu(), "sse": sse.cpu(), "kl": kl.cpu()} | densities)
    result = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts])
        half, mean = 1.96 * float(values.std()) / len(values) ** 0.5, float(values.mean())
        result[name] = {"value": mean, "low": mean - half, "high": mean + half}
    return result


# --- The command -----------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_flags(argv)
    train, evaluation, device = common.read_settings(args)
    evaluation["prior"] = args.prior
    vae_train = train | {"vae_prior": "flow" if args.prior == "flow" else "gaussian"}
    train = vae_train | {"conditioning": args.conditioning, "uncertainty": args.uncertainty}
    if args.dry_run:
        print(json.dumps({"settings": {"train": train, "eval": evaluation}, "networks": network_cost(train)}, indent=1))
        return
    home, extractor, data, test = common.prepare(args, train, evaluation, device)
    if len(test.images) < 6:
        common.fail(f"--data-dir {args.data_dir}: {len(test.images)} held-out images; thirds of them need at least 6")
    vae_train |= {key: train[key] for key in ("crop", "n_train")}
    vae_name = f"stage3-vae-{vae_train['vae_prior']}"
    name = f"stage3-{args.prior}-{args.conditioning}" + ("-posterior" if args.uncertainty == "posterior" else "")
    vae_folder, folder = home / f"{vae_name}-s{args.seed}", home / f"{name}-s{args.seed}"
    vae_state = train_vae(vae_folder, vae_train, data, device, args.resume)
    facts, fd = vae_state["uncertainty_facts"], "fd" + extractor.suffix if extractor.suffix else "fid"
    print("uncertainty: log-variances vary by {logvar_sd_over_images:.3g} over images (mean {logvar_mean:.3g}), rank "
          "correlation with the squared error {correlation:.3f} (sign {sign:+.0f}): {verdict}".format(**facts))
    state = train_refiner(folder, train, vae_state, data, device, args.resume)
    finished, reference = {}, None
    for where, variant, its_state in ((vae_folder, vae_name, vae_state), (folder, name, state)):
        settings = evaluation | ({"prior": vae_train["vae_prior"]} if where == vae_folder else {})
        finished[where] = common.read_metrics(where / "metrics.json", settings)
        if finished[where] is not None:
            continue
        reference = reference or common.reference(args, extractor, data, test)
        model = load_model(its_state, device)
        run = common.run_facts(its_state["train"], settings, data, device, variant)
        metrics = common.evaluate(where, model, its_state, settings, test, extractor, reference, run,
                                  network_cost(its_state["train"]))
        tables = metrics["tables"] | {"uncertainty": dict(facts)}
        if where == vae_folder:
            tables["elbo"] = held_out_elbo(model, test.images, args.seed, vae_train["vae_prior"] == "flow")
        else:
            tables["uncertainty"] |= adaptivity(where, model, test, extractor, reference, settings, args.prior,
                                                args.seed)
            tables["steps_to_quality"] = steps_to_quality(metrics["rows"][len(model.priors):], fd)
            if args.uncertainty == "posterior":
                tables["bits_per_dim"] = None  # trained with side information about x: no bound
        finished[where] = metrics | {"tables": tables}
        common.write_metrics(where / "metrics.json", finished[where])
    common.print_results(finished, data, extractor)


if __name__ == "__main__":
    main()
