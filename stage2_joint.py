"""Stage 2: train the VAE and the refiner together, from scratch.

The claim: in stage 1 the VAE never hears from the refiner. Here it does: both learn in the same step, and the diffusion
loss reaches the VAE through x_hat. Does that make better samples, and a smoother latent space?

    ELBO term       E = SSE(x, x_hat) + beta KL(q(z|x) || N(0, I))                    as in stage 1, in nats up to beta
    diffusion term  M = mean squared error of the U-Net's prediction at x_t; D M sums it over the D pixel values
    sum             E + lambda D M, one fixed weight. D M is not nats: with the likelihood's weights in place of equal
                    ones it would be (lambda about 9.4 has that size for an eps-prediction)
    anneal          the same, lambda raised from 0.01 over the first 60% of the steps (log-linearly)
    uncertainty     exp(-a) E + a + exp(-b) D M + b, a and b learned (Kendall et al. 2018)
    bound           KL + L_T + sum_t KL_t + L_0, the exact bound on -log p(x) of the hybrid; no reconstruction term

One thing is kept apart on purpose: lambda scales what the VAE feels, never the refiner's own gradient. The U-Net sees a
copy of x_hat that is cut from the graph, so one backward pass gives its gradient as in stage 1 and, at the cut, the
gradient of M by x_hat; times lambda D that is handed on to the VAE. `--gradient` says how far: `full` (decoder and
encoder), `decoder`, or `none`, which is stage 1 with both networks learning at once.

Why it is delicate: the refiner pays for information in x_hat, so the latent is pushed to leak x (the KL rises) and
x_hat stops looking like an image; or the refiner ignores x_hat. Watch `kl_nats`, `active_units`, `share` (of the
gradient at x_hat that comes from the diffusion term) and `*_mse_shuffled` (the loss with another image's x_hat).

Run     python stage2_joint.py                       shapes on a laptop; stage1_baseline.py first, to compare with it
        python stage2_joint.py --dataset celeba64    all that a GPU user types
Expect  about the minutes of stage 1, the same pictures and table, and `interpolation.png`, `crops.png`.
"""

import argparse
import json
import math
import statistics
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import fid
from common import to_float, to_uint8

LOSSES = ("sum", "anneal", "uncertainty", "bound")
WEIGHT = 1.0  # lambda where none is given


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description="Stage 2: VAE and refiner trained jointly")
    common.add_flags(parser)
    parser.add_argument("--loss", choices=LOSSES, default="anneal", help="how the two terms are balanced")
    parser.add_argument("--gradient", choices=("full", "decoder", "none"), default="full",
                        help="how far the diffusion term reaches into the VAE")
    parser.add_argument("--diffusion-weight", type=float, help=f"lambda of sum, and that anneal ends with ({WEIGHT})")
    parser.add_argument("--prior", choices=("gaussian", "gmm"), default="gmm", help="prior over z of the headline row")
    args = parser.parse_args(argv)
    if args.loss in ("uncertainty", "bound") and args.diffusion_weight is not None:
        common.fail(f"--diffusion-weight: --loss {args.loss} has no weight to choose; leave it out")
    if args.diffusion_weight is not None and not 0 <= args.diffusion_weight <= 1000:
        common.fail(f"--diffusion-weight {args.diffusion_weight}: must lie between 0 and 1000")
    if args.loss == "bound" and args.gradient != "full":
        common.fail(f"--gradient {args.gradient}: --loss bound is a bound only with --gradient full")
    return args


def variant_name(train):
    """The run's name; a suffix appears only where the choice is not the default."""
    weight = "" if train["diffusion_weight"] in (None, WEIGHT) else f"-w{train['diffusion_weight']:g}"
    return f"stage2-{train['loss']}{weight}" + ("" if train["gradient"] == "full" else f"-grad-{train['gradient']}")


# --- Losses ----------------------------------------------------------------------------------------------------------


def condition(unet, x_hat, diffusion):
    """Formulation 1: `denoise(x, t)` with x_hat (B, 3, H, W) concatenated to the U-Net's input. As in stage 1."""
    return lambda x, t: diffusion.complete(unet(torch.cat([x, x_hat], 1), t), x, x_hat, t)


def elbo_terms(x0, x_hat, mu, logvar):
    """SSE in [0, 1] units and KL in nats, each (B,): stage 1's VAE loss in two parts."""
    return ((x_hat - x0) ** 2).flatten(1).sum(1) / 4, common.gaussian_kl(mu, logvar)


def time_probability(t, T, power):
    """P(t) of t = ceil(T u^power), u uniform: (B,)."""
    t = t.cpu().double()  # the difference of two close powers
    return (t / T) ** (1 / power) - ((t - 1) / T) ** (1 / power)


def bound_loss(diffusion, denoise, x0, t, eps, power):
    """L_T + sum_t KL_t + L_0 given x_hat (DDPM eq. 5), from one t per image, drawn with time_probability: an unbiased
    estimate, (B,) nats. With KL(q(z|x) || p(z)) added it bounds -log p(x)."""
    xt = diffusion.q_sample(x0, t, eps)
    x0_hat, _ = diffusion.predict(denoise(xt, t), xt, t, clamp=False)
    nats = common.kl_step(diffusion, x0, x0_hat, t.clamp(min=2))
    first = t == 1
    if first.any():
        nats = nats.masked_scatter(first, common.data_nats(diffusion, x0[first], x0_hat[first]))
    return common.kl_prior(diffusion, x0) + nats / time_probability(t, diffusion.T, power).float().to(x0.device)


def diffusion_weight(train, step):
    """lambda at a step: fixed for `sum`; for `anneal` log-linear from 0.01 (or less) over the first 60% of steps."""
    weight = train["diffusion_weight"]
    if train["loss"] != "anneal" or weight == 0:
        return weight
    low, share = min(0.01, weight), min(1.0, step / (0.6 * train["steps"]))
    return math.exp((1 - share) * math.log(low) + share * math.log(weight))


# --- The guard -------------------------------------------------------------------------------------------------------


class Guard:
    """Looks at the gradient norms of each step. Above 10 times the running median over 100 steps (once 20 are known),
    or not finite: the step is to be skipped. `factor` (of lambda) then rises by 1.5, at most 10 times in all; 20 skips
    in a row end the run."""

    def __init__(self, state=None):
        self.norms, self.skipped, self.in_a_row, self.raised = {"vae": [], "unet": []}, 0, 0, 0
        vars(self).update(state or {})

    @property
    def factor(self):
        return 1.5**self.raised

    def culprit(self, norms, elbo, share, raise_weight):
        """The term that exploded, or None. norms {"vae", "unet"}; elbo: the VAE's own loss; share: of the gradient at
        x_hat, the diffusion term's."""
        bad = [name for name, norm in norms.items() if not math.isfinite(norm) or
               len(self.norms[name]) >= 20 and norm > 10 * statistics.median(self.norms[name])]
        if not bad:
            self.in_a_row = 0
            for name, norm in norms.items():
                self.norms[name] = [*self.norms[name][-99:], norm]
            return None
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if raise_weight and self.raised < 10:
            self.raised += 1
            self.norms["vae"] = [1.5 * norm for norm in self.norms["vae"]]  # what a larger lambda makes of them
        name = ("the ELBO" if not math.isfinite(elbo) else "the refiner's loss" if "unet" in bad else
                "the diffusion term" if share > 0.5 else "the ELBO")
        if self.in_a_row == 20:
            common.fail(f"20 steps in a row were skipped, the last for {name} (gradient norms {norms}); look at "
                        "log.csv, take --loss anneal, another --diffusion-weight or a larger --batch-size")
        return name


# --- Training --------------------------------------------------------------------------------------------------------


def spread_gradients(vae, elbo, x_hat, pull, reach):
    """Backward through the VAE: the gradient of the scalar `elbo`, and `pull`, the diffusion term's gradient at x_hat
    (B, 3, H, W), as far as `reach` says: `full` (decoder and encoder), `decoder` or `none`."""
    if reach == "full":
        torch.autograd.backward([elbo, x_hat], [None, pull])
        return
    elbo.backward(retain_graph=reach == "decoder")
    if reach == "decoder":
        for p, gradient in zip(vae.decoder.parameters(),
                               torch.autograd.grad(x_hat, list(vae.decoder.parameters()), pull), strict=True):
            p.grad += gradient


@torch.no_grad()
def look(vae, unet, diffusion, images, gen):
    """What to watch, on fixed training images, times and noise: active units, the refiner's loss, and its loss when
    x_hat belongs to another image (equal: the condition is ignored)."""
    x0 = to_float(images)
    mu, _ = vae.encoder(x0)
    few, x_hat = x0[:64], vae.decoder(mu[:64])
    t = torch.linspace(1, diffusion.T, len(few), device=x0.device).long()
    eps, name = common.randn(few.shape, gen), f"{diffusion.objective}_mse"

    def loss_given(x_hat):
        return float(diffusion.simple_loss(condition(unet, x_hat, diffusion), few, t, eps).mean())

    return {"active_units": float((mu.var(0) > 0.01).sum()),
            f"{name}_own": loss_given(x_hat), f"{name}_shuffled": loss_given(x_hat.roll(1, 0))}


def train_joint(folder, train, data, device, resume):
    """Train VAE and refiner together; returns the finished checkpoint, which has the form of stage 1's refiner."""
    state = common.open_run(folder, train, resume)
    if state and state["finished"]:
        return state
    torch.manual_seed(train["seed"])
    vae = common.build_vae(train).to(device, memory_format=torch.channels_last).train()
    torch.manual_seed(train["seed"])  # each network starts as its twin in stage 1
    unet = common.build_unet(train, 6).to(device, memory_format=torch.channels_last).train()
    common.compile_networks(torch.nn.ModuleList([vae, unet]), train)
    diffusion = common.Diffusion(train["objective"], device=device, residual_sd=train["residual_sd"])
    gen = common.generator(train["seed"] + 1, device)
    fused = device.type in ("cpu", "cuda")
    balance = torch.zeros(2, device=device, requires_grad=True)  # a and b of `uncertainty`
    optimizers = {"vae": torch.optim.Adam(vae.parameters(), lr=train["vae_lr"], fused=fused),
                  "unet": torch.optim.Adam(unet.parameters(), lr=train["unet_lr"], fused=fused),
                  "balance": torch.optim.Adam([balance], lr=0.01)}
    emas = {"vae": common.EMA(vae, train["vae_ema"]), "unet": common.EMA(unet, train["unet_ema"])}
    networks, guard, step, seconds, sums = {"vae": vae, "unet": unet}, Guard(), 0, 0.0, {}
    if state:
        for name, network in networks.items():
            network.load_state_dict(state["weights"][name])
            average = state["vae" if name == "vae" else "ema"]
            emas[name].weights = {key: value.to(device) for key, value in average.items()}
            emas[name].updates = state["updates"]
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        balance.data.copy_(state["balance"])
        gen.set_state(state["generator"])
        torch.set_rng_state(state["global_rng"])
        guard, step, seconds = Guard(state["guard"]), state["step"], state["seconds"]
        sums = {name: value.to(device) for name, value in state["sums"].items()}
    images, every = data.images.to(device), min(train["every"], train["steps"])
    probe = images[torch.randperm(len(images), generator=common.generator(0))[:256].to(device)]
    common.start_log(folder / "log.csv", step)
    started, saved = time.time() - seconds, time.time()

    def checkpoint(step):
        state = {"train": train, "step": step, "finished": step == train["steps"], "vae": emas["vae"].weights,
                 "ema": emas["unet"].weights, "updates": emas["vae"].updates,
                 "weights": {name: n.state_dict() for name, n in networks.items()},
                 "optimizers": {name: o.state_dict() for name, o in optimizers.items()}, "balance": balance.data,
                 "guard": vars(guard), "generator": gen.get_state(), "global_rng": torch.get_rng_state(),
                 "seconds": time.time() - started, "sums": sums}
        if step == train["steps"]:
            average = common.restore(common.build_vae(train), emas["vae"].weights, device)
            state["gmm"] = common.fit_mixture(average, data.images, train, device)
        common.save_checkpoint(folder / "checkpoint.pt", state)

    with common.StopRequest() as stop, tqdm(total=train["steps"], initial=step, desc=folder.name, unit="step") as bar:
        while step < train["steps"]:
            for name in networks:
                for group in optimizers[name].param_groups:
                    group["lr"] = common.learning_rate(train[f"{name}_lr"], step, train["steps"], train["warmup"],
                                                       train["decay"])
            index = torch.randint(len(images), (train["batch"],), generator=gen, device=device)
            x0 = to_float(images[index]).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
            if train["flip"] != "none":
                mirrored = torch.rand(len(x0), generator=gen, device=device) < 0.5
                x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
            z_noise = common.randn((len(x0), vae.latent_dim), gen)
            t = diffusion.draw_t(len(x0), train["t_power"], gen)  # (B,), in 1..T
            x0, z_noise, t, eps = common.share(x0, z_noise, t, common.randn(x0.shape, gen))

            optimizers["vae"].zero_grad()
            optimizers["unet"].zero_grad()
            size = x0[0].numel()  # D
            with common.autocast(device):
                x_hat, mu, logvar = vae(x0, z_noise)
                cut = x_hat.detach().requires_grad_()  # what the refiner sees
                denoise = condition(unet, cut, diffusion)
                if train["loss"] == "bound":
                    refiner = bound_loss(diffusion, denoise, x0, t, eps, train["t_power"]) / size
                else:
                    refiner = diffusion.simple_loss(denoise, x0, t, eps)
            refiner.mean().backward()  # the refiner's own gradient, as in stage 1; cut.grad: (B, 3, H, W)
            sse, kl = elbo_terms(x0, x_hat, mu, logvar)
            elbo, weight, scale = sse + train["beta"] * kl, 1.0, 1.0  # scale: of the ELBO term
            unit = 1.0 if train["loss"] == "bound" else diffusion.guess_sd(t) ** 2  # M in the target's own units
            if train["loss"] == "bound":
                elbo, scale = kl, 0.0  # no reconstruction term
            elif train["loss"] == "uncertainty":
                terms = torch.stack([elbo.mean().detach(), size * (refiner.detach() * unit).mean()])
                common.average_over_ranks([terms])
                optimizers["balance"].zero_grad()
                ((-balance).exp() * terms + balance).sum().backward()
                scale, weight = (-balance.detach()).exp()
                elbo = scale * elbo
            else:
                weight = diffusion_weight(train, step) * guard.factor
            pull = weight * size * unit * cut.grad  # (B, 3, H, W): the diffusion term's gradient at x_hat
            push = scale * (x_hat.detach() - x0) / (2 * len(x0))  # the SSE's
            spread_gradients(vae, elbo.mean(), x_hat, pull, train["gradient"])
            for network in networks.values():
                common.average_gradients(network)
            share = float(pull.norm() / (pull.norm() + push.norm() + 1e-12)) if train["gradient"] != "none" else 0.0
            norms = {name: float(torch.nn.utils.clip_grad_norm_(n.parameters(), train[f"{name}_clip"] or math.inf))
                     for name, n in networks.items()}
            culprit = guard.culprit(norms, float(elbo.detach().mean()), share, train["loss"] in ("sum", "anneal"))
            if culprit:
                tqdm.write(f"step {step + 1} skipped: {culprit} exploded (norms {norms}); lambda x {guard.factor:.3g}")
            else:
                for optimizer in optimizers.values():
                    optimizer.step()
                balance.data.clamp_(-8, 8)
                for name, network in networks.items():
                    emas[name].update(network)
            step += 1
            values = {"sse": sse, "kl_nats": kl, "bound_per_dim" if train["loss"] == "bound" else
                      f"{train['objective']}_mse": refiner, "weight": torch.as_tensor(float(weight)),
                      "share": torch.as_tensor(share)}
            if not culprit:
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.detach().mean()
                sums["counted"] = sums.get("counted", 0) + torch.ones(())
            if step % every == 0:
                counted = float(sums.pop("counted", 1))
                row = {name: float(sums.get(name, torch.tensor(math.nan))) / counted for name in values}
                row |= look(vae.eval(), unet.eval(), diffusion, probe, common.generator(0, device))
                row |= {"skipped": guard.skipped, "raised": guard.raised}
                row |= dict(zip("ab", balance.tolist(), strict=True)) if train["loss"] == "uncertainty" else {}
                vae.train(), unet.train()
                common.append_log(folder / "log.csv", {"step": step, **row})
                bar.set_postfix({name: f"{row[name]:.4g}" for name in [*values, "active_units"]})
                sums = {}
            bar.update()
            if stop.signal or time.time() - saved > 60 and step < train["steps"]:
                checkpoint(step)
                saved = time.time()
            if stop.signal:
                print(f"\nstopped at step {step}; continue with --resume", file=sys.stderr)
                raise SystemExit(128 + stop.signal)
    checkpoint(step)
    common.wait_for_ranks()
    return common.load_checkpoint(folder / "checkpoint.pt")


def load_model(state, device):
    """Rebuild a model (see common.py, section 9) from its checkpoint alone; a `form1` checkpoint of stage 1 will do."""
    train = state["train"]
    model = SimpleNamespace(name="joint", vae=common.restore(common.build_vae(train), state["vae"], device),
                            unet=common.restore(common.build_unet(train, 6), state["ema"], device), device=device,
                            size=train["image_size"], temperature=1.0,
                            diffusion=common.Diffusion(train["objective"], device=device,
                                                       residual_sd=train["residual_sd"]))
    model.priors = {"gaussian": common.StandardNormal(model.vae.latent_dim),
                    "gmm": common.GaussianMixture(**state["gmm"])}
    model.denoiser = lambda x_hat, z: condition(model.unet, x_hat, model.diffusion)
    return model


# --- The latent space ------------------------------------------------------------------------------------------------


def lerp(a, b, w):
    """The straight line from a (w = 0) to b (w = 1): (N, d)."""
    return (1 - w) * a + w * b


def slerp(a, b, w):
    """The arc from a to b (N, d) (Shoemake 1985): in d dimensions N(0, I) lives near a sphere, which a line leaves."""
    angle = torch.acos((F.normalize(a) * F.normalize(b)).sum(1, keepdim=True).clamp(-1, 1))
    angle = angle.clamp(1e-4, math.pi - 1e-4)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def smoothness(features):
    """Features along paths (P, K, f) -> how smoothly an image turns into another: path length over the distance of its
    ends (1: straight), the longest over the mean step (1: even), and that distance (0: nothing changes at all)."""
    steps = (features[:, 1:] - features[:, :-1]).norm(dim=2)  # (P, K - 1)
    ends = (features[:, -1] - features[:, 0]).norm(dim=1)  # (P,)
    return {"path_over_distance": float(steps.sum(1).mean() / ends.mean().clamp(min=1e-9)),
            "worst_over_mean_step": float(steps.amax(1).mean() / steps.mean().clamp(min=1e-9)),
            "end_distance": float(ends.mean())}


def linear_probe(train_x, train_y, test_x, test_y, ridge=1e-3):
    """Ridge regression from x (N, d) to y (N, k), fitted in closed form: R^2 of each column on the test set, and the
    test predictions (M, k)."""
    mean, sd = train_x.mean(0), train_x.std(0) + 1e-6
    a, b = ((x - mean) / sd for x in (train_x, test_x))
    weights = torch.linalg.solve(a.T @ a + ridge * len(a) * torch.eye(a.shape[1]), a.T @ (train_y - train_y.mean(0)))
    predicted = b @ weights + train_y.mean(0)
    r2 = 1 - (test_y - predicted).square().sum(0) / (test_y - test_y.mean(0)).square().sum(0)
    return r2.tolist(), predicted


@torch.no_grad()
def latent_space(folder, model, data, test, extractor, reference, evaluation, seed, pairs=32, points=9):
    """Interpolations between held-out images (VAE decodes and refined, with x_T fixed along a path), the score of the
    midpoints, and what a linear probe reads off mu. Figures go into `folder`, if given."""
    gen, result, strips = common.generator(90_000 + seed), {}, []
    mu = common.encode(model.vae, test.images, gen, model.device)[1]  # (N, d)
    steps = evaluation["probe_steps"]

    def decode(z):  # the same x_T for every z of a batch position
        x_hat = model.vae.decoder(z.to(model.device))
        images = common.refine(model, x_hat, z, common.generator(91_000 + seed), "dpm", steps)
        return to_uint8(x_hat).cpu(), to_uint8(images).cpu()

    count, key = min(evaluation["grid_count"], len(mu) // 2), "fd" + extractor.suffix if extractor.suffix else "fid"

    def score(z):  # of VAE decodes and refined images
        parts = zip(*(decode(part) for part in z.split(100)), strict=True)
        return [fid.scores(extractor, torch.cat(part), reference)[key] for part in parts]

    a, b = mu[:count], mu[count : 2 * count]
    result["posterior"] = dict(zip(("vae", "refined"), score(a), strict=True))  # no prior: what better ones could reach
    for name, path in (("slerp", slerp), ("lerp", lerp)):
        shots = [decode(path(a[:pairs], b[:pairs], w)) for w in torch.linspace(0, 1, points).tolist()]
        result[name], middle = {}, score(path(a, b, 0.5))
        for k, part in enumerate(("vae", "refined")):
            images = torch.stack([shot[k] for shot in shots], 1)  # (P, K, 3, H, W)
            features = fid.extract(extractor, images.flatten(0, 1))[0].view(len(images), points, -1)
            result[name][part] = smoothness(features) | {"midpoint_" + key: middle[k]}
            strips += [images[:3]] if name == "slerp" else []
    if folder:
        rows = [strips[k][i] for i in range(len(strips[0])) for k in (0, 1)]  # each pair: VAE above, refined below
        common.save_grid(folder / "interpolation.png", rows, ["VAE", "refined"] * len(strips[0]))
    some = torch.randperm(len(data.images), generator=common.generator(0))[:5000]
    train_mu = common.encode(model.vae, data.images[some], gen, model.device)[1]
    if data.labels is not None:
        classes = int(data.labels.max()) + 1
        one_hot = F.one_hot(data.labels[some], classes).float()
        _, guess = linear_probe(train_mu, one_hot, mu, F.one_hot(test.labels, classes).float())
        result["probe_class_accuracy"] = float((guess.argmax(1) == test.labels).float().mean())
    if data.factors is not None:
        r2, _ = linear_probe(train_mu, data.factors[some], mu, test.factors)
        result["probe_r2"] = dict(zip(common.FACTORS, r2, strict=True))
    return result


def draw_crops(folder, model, evaluation, seed):
    """crops.png: the middle of eight samples, enlarged: what the refiner smooths away and what it puts in."""
    x_hat, images, _ = common.generate(model, 8, evaluation["prior"], "dpm", evaluation["probe_steps"], seed, 8)
    edge = model.size // 4
    crop = [x[:, :, edge:-edge, edge:-edge] for x in (x_hat, images)]
    common.save_grid(folder / "crops.png", crop, ["VAE", "refined"], scale=256 // model.size)


# --- The command -----------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_flags(argv)
    train, evaluation, device = common.read_settings(args)
    evaluation["prior"] = args.prior
    weight = WEIGHT if args.diffusion_weight is None else args.diffusion_weight
    train |= {"loss": args.loss, "gradient": args.gradient,
              "diffusion_weight": weight if args.loss in ("sum", "anneal") else None}
    if args.loss == "bound":
        train["t_power"] = 4.0  # the bound's terms are largest at small t: drawn more often, they vary less
    if args.dry_run:
        print(json.dumps({"settings": {"train": train, "eval": evaluation}, "networks": common.network_cost(train)},
                         indent=1))
        return
    home, extractor, data, test = common.prepare(args, train, evaluation, device)
    variant = variant_name(train)
    folder = home / f"{variant}-s{args.seed}"
    state = train_joint(folder, train, data, device, args.resume)
    budget, reference = train["steps"] * train["batch"], None
    earlier = {home / f"stage1-{name}-s{args.seed}": None for name in ("vae", "form1")}
    earlier = {path: found for path in earlier if (found := common.read_metrics(path / "metrics.json", evaluation))
               and found["run"]["train_images"] == budget}  # equal budget: the same images for each network
    metrics = common.read_metrics(folder / "metrics.json", evaluation)
    if metrics is None or len(earlier) == 2 and "latent_space_stage1" not in metrics["tables"]:
        reference = common.reference(args, extractor, data, test)
    if metrics is None:
        facts, model = common.run_facts(train, evaluation, data, device, variant), load_model(state, device)
        metrics = common.evaluate(folder, model, state, evaluation, test, extractor, reference, facts,
                                  common.network_cost(train))
        metrics["tables"]["latent_space"] = latent_space(folder, model, data, test, extractor, reference, evaluation,
                                                         args.seed)
        draw_crops(folder, model, evaluation, args.seed)
        common.write_metrics(folder / "metrics.json", metrics)
    if len(earlier) == 2 and "latent_space_stage1" not in metrics["tables"]:
        baseline = load_model(common.load_checkpoint(list(earlier)[1] / "checkpoint.pt"), device)
        baseline.temperature = evaluation["temperature"]
        metrics["tables"]["latent_space_stage1"] = latent_space(None, baseline, data, test, extractor, reference,
                                                                evaluation, args.seed)
        common.write_metrics(folder / "metrics.json", metrics)
    common.print_results(earlier | {folder: metrics}, data, extractor)
    for name, where in (("stage 1", "latent_space_stage1"), (variant, "latent_space")):
        if where in metrics["tables"]:
            path = metrics["tables"][where]["slerp"]["refined"]
            print(f"{name}: path length over end distance {path['path_over_distance']:.3f}, end distance "
                  f"{path['end_distance']:.3f} (refined, slerp)")
    if not earlier:
        print(f"no stage 1 results in {home}; to compare: python stage1_baseline.py --dataset {args.dataset} "
              f"--budget {train['budget']} --seed {args.seed}")


if __name__ == "__main__":
    main()
