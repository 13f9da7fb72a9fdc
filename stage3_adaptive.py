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
               FiLM, Perez et al. 2018), and another one scales the colours of x_hat. At first both change nothing.
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

import torch
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

import common
import fid
from common import to_float, to_uint8

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
    for step in tqdm(range(steps), desc="fitting the flow", leave=False):
        optimizer.param_groups[0]["lr"] = common.learning_rate(1e-3, step, steps, settings)
        index = torch.randint(len(mu), (batch,), generator=gen)
        z = common.reparameterise(mu[index], logvar[index], common.randn((batch, mu.shape[1]), gen))
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
    """The Uncertainty of a kind, fitted to uint8 images (N, 3, H, W). Codes are drawn anew in each step."""
    mu, logvar = (x.to(device) for x in common.encode(vae.encoder, images, device))  # (N, d)
    uncertainty = Uncertainty(kind, mu.shape[1]).to(device)
    x_hat, raw = decode(vae, mu, uncertainty.raw, device)
    if kind == "regressed":
        log_error = common.squared_error(to_float(x_hat), to_float(images)).log().to(device)  # (N,)
        gen = common.generator(settings["seed"], "uncertainty", device)
        optimizer = torch.optim.Adam(uncertainty.parameters())
        steps = settings["flow_steps"]
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = common.learning_rate(1e-3, step, steps, settings)
            index = torch.randint(len(mu), (batch,), generator=gen, device=device)
            z = common.reparameterise(mu[index], logvar[index], common.randn((batch, mu.shape[1]), gen))
            loss = (uncertainty.raw(vae, z, None) - log_error[index]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        raw = uncertainty.raw(vae, mu, None).detach()
    uncertainty.mean = raw.mean()
    uncertainty.sd = raw.std()
    return uncertainty.cpu()


def rank_errors(vae, uncertainty, images, device):
    """Does s rank the errors of held-out images? Spearman's rank correlation with the squared error of x_hat."""
    mu, _ = common.encode(vae.encoder, images, device)
    x_hat, s = decode(vae, mu, uncertainty, device)
    return float(spearmanr(s, common.squared_error(to_float(x_hat), to_float(images))).statistic)


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


def denoiser(refiner, x_hat, s):
    """`denoise(x, t)` for one batch, given its x_hat and s: Formulation 1 of stage 1, on what the conditioner makes of
    x_hat."""
    shown, extra = refiner["conditioner"](x_hat, s)
    return lambda x, t: refiner["unet"](torch.cat([x, shown], 1), t, extra)


# --- Training --------------------------------------------------------------------------------------------------------

def gaussian_log_prob(z, mu, logvar):
    """log N(z; mu, exp(logvar)), summed over the dimensions of (B, d): (B,) nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 / logvar.exp()).sum(1)


def build_vae_and_flow(settings):
    """The VAE and its flow, trained as one network with the settings vae_*."""
    vae = common.build_vae(settings)
    return nn.ModuleDict({"vae": vae, "flow": RealNVP(vae.latent_dim)})


def vae_loss(vae, flow, x0, noise, beta, flow_is_prior):
    """The loss of the VAE and its flow, (B,), and its terms for the log. One backward pass serves both:
        the flow follows the gradient of   -log p(z), always
        the VAE follows that of            SSE + beta KL, with the KL to N(0, I) or, if `flow_is_prior`, to the flow:
                                           log q(z|x) - log p(z), of one sample z
    So the gradient that -log p(z) passes back to z is multiplied by 0 or beta."""
    mu, logvar = vae.encoder(x0)
    z = common.reparameterise(mu, logvar, noise)
    sse, kl = common.squared_error(vae.decoder(z), x0), common.gaussian_kl(mu, logvar)  # (B,)
    log_q = gaussian_log_prob(z, mu, logvar)  # (B,)
    z_for_flow = common.scale_gradient(z, beta if flow_is_prior else 0.0)
    log_p = flow.log_prob(z_for_flow)  # (B,)
    loss = sse + beta * (log_q if flow_is_prior else kl) - log_p
    return loss, {"sse": sse, "kl_nats": kl, "kl_flow_nats": log_q - log_p}


def train_vae(folder, settings, data, device):
    """Train the VAE and its flow. Then fit to the finished VAE: the flow, the mixture and both kinds of uncertainty.
    Returns the checkpoint."""
    torch.manual_seed(settings["seed"])
    vae_and_flow = build_vae_and_flow(settings)
    images = data.train.images
    training = common.Training(folder, settings, device, images, steps=settings["vae_steps"],
                               flip=settings["vae_flip"], vae=vae_and_flow)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        noise = training.normal(vae_and_flow["vae"].latent_dim)  # (B, d)
        with common.autocast(device):
            loss, terms = vae_loss(vae_and_flow["vae"], vae_and_flow["flow"], x0, noise, settings["beta"],
                                   flow_is_prior=training.steps_taken >= 0.6 * settings["vae_steps"])
        training.step(loss, terms)
    vae_and_flow.load_state_dict(training.averages["vae"])
    vae = vae_and_flow["vae"].eval().requires_grad_(False)
    mu, logvar = common.encode(vae.encoder, images, device)
    flow = fit_flow(vae_and_flow["flow"], mu, logvar, settings)
    uncertainties = {kind: fit_uncertainty(kind, vae, images, settings, device).state_dict() for kind in KINDS}
    return training.finish(vae=vae.state_dict(), flow=flow.state_dict(), uncertainty=uncertainties,
                           gmm=common.fit_mixture(vae, images, settings, device))


def train_refiner(folder, settings, conditioning, kind, base, data, device):
    """Train a refiner behind the frozen VAE of the checkpoint `base`. `kind` is that of the uncertainty. Returns its
    checkpoint, which contains the VAE as well."""
    torch.manual_seed(settings["seed"])
    refiner = build_refiner(settings, conditioning)
    vae = common.frozen(common.build_vae(settings), base["vae"], device)
    uncertainty = load_uncertainty(kind, vae, base, device)
    diffusion = common.Diffusion(settings["objective"], device=device, start=settings["start"])
    training = common.Training(folder, settings, device, data.train.images, steps=settings["unet_steps"],
                               flip=settings["unet_flip"], unet=refiner)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        t = diffusion.draw_t(training.uniform())  # (B,), in 1..start
        eps = training.normal(*x0.shape[1:])  # (B, 3, H, W)
        with common.autocast(device):
            with torch.no_grad():
                mu, logvar = vae.encoder(x0)
                z = common.reparameterise(mu, logvar, training.normal(vae.latent_dim))  # (B, d)
                x_hat = vae.decoder(z)  # (B, 3, H, W)
                s = uncertainty(vae, z, x_hat)  # (B,)
            mse = diffusion.simple_loss(denoiser(refiner, x_hat, s), x0, t, eps)  # (B,)
        training.step(common.level_weight(settings, diffusion, t) * mse, {f"{settings['objective']}_mse": mse})
    return training.finish(base, conditioning=conditioning, kind=kind,
                           **{key: base[key] for key in ("vae", "flow", "gmm", "uncertainty")})


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_uncertainty(kind, vae, base, device):
    """The Uncertainty of a kind that was fitted to the VAE of the checkpoint `base`."""
    return common.frozen(Uncertainty(kind, vae.latent_dim), base["uncertainty"][kind], device)


def load_model(checkpoint, device, shuffled=False):
    """The common.Model of a checkpoint: of a VAE, or of a refiner with its VAE. If `shuffled`, a control, each image is
    refined with the s of another one."""
    settings = checkpoint["settings"]
    size = settings["image_size"]
    vae, priors = common.load_vae(checkpoint, device)
    flow = common.frozen(RealNVP(vae.latent_dim), checkpoint["flow"], device)
    model = common.Model(device, shape=(3, size, size), networks=(vae, flow), vae=vae, priors=priors | {"flow": flow})
    if "conditioning" in checkpoint:
        refiner = common.frozen(build_refiner(settings, checkpoint["conditioning"]), checkpoint["unet"], device)
        uncertainty = load_uncertainty(checkpoint["kind"], vae, checkpoint, device)

        def make_denoiser(x_hat, z):
            s = uncertainty(vae, z, x_hat).roll(1 if shuffled else 0)
            return denoiser(refiner, x_hat, s)

        model.networks += (refiner,)
        model.diffusion = common.Diffusion(settings["objective"], device=device, start=settings["start"])
        model.denoiser = make_denoiser
    return model


# --- What it shows: does it pay to know s? ---------------------------------------------------------------------------

def draw_by_s(path, s, rows):
    """A picture of twelve images, from the surest on, with their s (N,) above. `rows` holds one or more versions of the
    same N images: {label: uint8 (N, 3, H, W)}."""
    shown = s.argsort()[torch.linspace(0, len(s) - 1, 12).long()]
    common.save_grid(path, {label: images[shown] for label, images in rows.items()},
                     columns=[f"s = {value:.1f}" for value in s[shown].tolist()])


def terciles(folder, model, control, uncertainty, settings, scorer):
    """The Frechet distance of reconstructions of held-out images to the originals:
        sure, middle, unsure     by thirds of s, of the VAE's images and of the refined ones
        own_s, shuffled_s        of all refined images, by the model and by `control`, which has the s of another image
    Draws uncertainty.png."""
    quick = fid.quick(settings)
    real = scorer.data.test.images[: settings["eval_samples"]]
    mu, _ = common.encode(model.vae.encoder, real, model.device)
    x_hat, s = decode(model.vae, mu, uncertainty, model.device)
    _, refined, _ = common.generate(model, quick, z=mu)
    draw_by_s(folder / "uncertainty.png", s, {"real": real, "VAE": x_hat, "refined": refined})
    table = {"images": len(real)}
    for name, third in zip(("sure", "middle", "unsure"), s.argsort().tensor_split(3), strict=True):
        table[name] = {"vae": fid.fd_to_originals(scorer, x_hat[third], real[third]),
                       "refined": fid.fd_to_originals(scorer, refined[third], real[third])}
    _, other, _ = common.generate(control, quick, z=mu)
    table["own_s"] = fid.fd_to_originals(scorer, refined, real)
    table["shuffled_s"] = fid.fd_to_originals(scorer, other, real)
    return table


def strategies(folder, model, uncertainty, settings, scorer, prior):
    """Generated images whose number of steps depends on s, with codes of one prior: for each strategy the Frechet
    distance, hf_energy, evaluations of the U-Net and seconds per image. Draws generated-PRIOR.png."""
    count = 3 * (settings["eval_samples"] // 3)
    full = settings["sample_steps"]
    z = model.priors[prior].sample(count, common.generator(settings["seed"], "strategies"))
    clock = time.time()
    x_hat, s = decode(model.vae, z, uncertainty, model.device)
    decoding = (time.time() - clock) / count
    other = s.roll(1)  # the s of another image
    table = {}
    for name, sorted_by, steps in (  # steps of the third with the lowest s, the middle, and the highest
            ("all", s, (full, full, full)), ("two_steps", s, (2, 2, 2)), ("by_s", s, (1, 2, 3)),  # two on average
            ("by_s_shuffled", other, (1, 2, 3)), ("unsure_third", s, (0, 0, full)),
            ("unsure_third_shuffled", other, (0, 0, full))):
        images, seconds = x_hat.clone(), decoding
        for third, n in zip(sorted_by.argsort().tensor_split(3), steps, strict=True):
            if n > 0:
                quick = fid.quick(settings) | {"sample_steps": n}
                _, images[third], per_image = common.generate(model, quick, z=z[third])
                seconds += per_image / 3
        if name == "all":
            draw_by_s(folder / f"generated-{prior}.png", s, {"VAE": x_hat, "refined": images})
        scores = scorer(images)
        table[name] = {scorer.distance: scores[scorer.distance]["value"], "hf_energy": scores["hf_energy"]["value"],
                       "evaluations": sum(steps) / 3, "seconds_per_image": seconds}
    return table


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
        return common.print_settings(settings, vae=build_vae_and_flow(settings),
                                     unet=build_refiner(settings, args.conditioning))

    scorer = fid.load_scorer(args, settings, device)
    folder = common.run_folder(settings, "stage3-vae-flow")
    base = common.finished(folder, settings, args.resume) or train_vae(folder, settings, scorer.data, device)
    model = load_model(base, device)
    rows = fid.score(folder, model, settings, scorer)
    fid.write_metrics(folder, base, model, settings, scorer, rows, {})

    name = f"stage3-flow-{args.conditioning}" + ("-posterior" if args.uncertainty == "posterior" else "")
    folder = common.run_folder(settings, name)
    checkpoint = (common.finished(folder, settings, args.resume)
                  or train_refiner(folder, settings, args.conditioning, args.uncertainty, base, scorer.data, device))
    model = load_model(checkpoint, device)
    control = load_model(checkpoint, device, shuffled=True)
    uncertainty = load_uncertainty(args.uncertainty, model.vae, base, device)
    rows = fid.score(folder, model, settings, scorer)
    tables = {"rank_correlation": rank_errors(model.vae, uncertainty, scorer.data.test.images, device),
              "robustness": fid.robustness(folder, model, settings, scorer),
              "latent_space": fid.latent_space(folder, model, settings, scorer),
              "terciles": terciles(folder, model, control, uncertainty, settings, scorer),
              "strategies": {prior: strategies(folder, model, uncertainty, settings, scorer, prior)
                             for prior in ("gmm", "flow")}}
    fid.write_metrics(folder, checkpoint, model, settings, scorer, rows, tables)
    fid.print_results(settings, scorer)
    print(f"rank correlation of s with the error of held-out images: {tables['rank_correlation']:.2f}")
    for prior, table in tables["strategies"].items():
        for strategy, numbers in table.items():
            print(f"{prior:5}{strategy:24}" + "  ".join(f"{key} {value:.3g}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
