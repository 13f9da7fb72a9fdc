"""Stage 2: train the VAE and the refiner together, from scratch.

The question: in stage 1 the VAE is trained alone, and learns nothing from the refiner that will use its images. Here
both networks learn in the same steps, and the gradient of the diffusion loss reaches the VAE through x_hat. Do the
samples become better, and the latent space smoother?

The loss has two terms.

    VAE term        E = SSE(x0, x_hat) + beta KL(q(z|x0) || N(0, I)), exactly as in stage 1
    diffusion term  D M, where D is the number of pixel values. M is the squared error of the U-Net's prediction (v, see
                    stage 1), averaged over the pixel values and divided, as in stage 1, by the running mean of this
                    error at similar t (common.Training.even_levels). So M stays near 1. (The mean is a constant to
                    autograd, so M still has a gradient.) The factor D puts M on the scale of a sum over pixel values,
                    as SSE is one. (The `paper` budget does not divide; there M is the plain error.)

`--loss` says how they are balanced. The default is `anneal`.

    sum             E + lambda D M, with one fixed weight lambda.
    anneal          The same, but lambda rises log-linearly from a tenth of its final value over the first 60% of steps.
                    (This and the final value, 0.03, were found by trying, on shapes.)
    kendall         exp(-a) E + a + exp(-b) D M + b, where a and b are learned (Kendall et al. 2018, arXiv:1705.07115).
                    The ratio of the weights, exp(-b) / exp(-a) = exp(a - b), plays the part of lambda. The loss is
                    lowest where exp(a) = E and exp(b) = D M. There lambda = E / (D M), which is about E / D, as M
                    stays near 1: the smaller the VAE's error, the smaller the weight.
    bound           The variational bound on -log p(x) of VAE and refiner together, with nothing to balance:
                        -log p(x0) <= KL(q(z|x0) || N(0, I)) + KL(q(x_start|x0) || p(x_start|x_hat)) + U
                    with z drawn from q(z|x0). (The second KL and U together bound -log p(x0|x_hat), in place of a
                    reconstruction term.) Sampling begins at x_start, which is x_hat with noise (stage 1). So the second
                    KL compares x_hat with x0; it is about SSE / 2 at start = 400, our setting (derived in train_joint).
                    (It is about 0 at start = T, where x_start is noise: there only the U-Net's gradient trains the
                    decoder.) U has the terms of the U-Net's steps from x_start to x0, in nats (bound_loss). In this
                    loss, E is the sum of the two KLs (beta is not used), and D M is U. On shapes the VAE collapses: the
                    code stays empty, and images are useless. With `--gradient none` (see below) it does not collapse,
                    and the bound is no worse. So it is the U-Net's gradient that makes the VAE collapse; we did not
                    find out how. (One run each.)

How one backward pass serves both networks. Let w_E be the weight of E and w_M that of D M (table below). The two
networks should follow different gradients: the VAE that of w_E E + w_M D M, the U-Net that of M alone, so that it
learns as in stage 1, whatever the weights are. M's gradient reaches the VAE only through x_hat. On its way back, it is
multiplied by w_M D at x_hat (scale_gradient). So

    we call backward on     w_E E + M   (`kendall` adds a term that trains a and b alone)
    the U-Net gets          the gradient of M
    the VAE gets            w_E times the gradient of E, plus w_M D times the gradient of M that arrives at x_hat

The losses differ in E, in M and in their weights (with `--gradient none`, see below, w_M is 0):

    loss            E                w_E          M                      w_M
    sum, anneal     the VAE term     1            the divided error      lambda: fixed, or rising
    kendall         the VAE term     exp(-a)      the divided error      exp(-b)
    bound           the two KLs      1            bound_loss / D         1

`--gradient` says how far the gradient of the diffusion term goes: `full` (into decoder and encoder), `decoder` (the
code is trained as if the VAE were alone, and only how it is decoded adapts to the refiner), or `none`. With `none` the
VAE learns as if it were alone, and the refiner learns beside it, from the x_hat of a VAE that is not finished yet. It
is a control: if joint training helps, that can be due to the gradient, or due to the bad x_hat that the refiner sees in
training and learns to mend. With `none` only the second is left. Stage 1 has another control, `augmented`: its VAE is
finished, and the refiner sees bad x_hat because noise is added to it.

What can go wrong: the refiner profits from any information about x0 in x_hat. So the encoder may be pushed to put x0's
details into z in a hidden form: the KL rises, and x_hat stops looking like an image. Or the refiner may ignore x_hat.
The log shows both, and lambda:

    kl_nats, active_units       the KL, an upper bound of the information in z; how many of its dimensions are used
    sse                         the squared error of x_hat, which rises if it looks less like the image
    weight                      w_M / w_E: lambda or, under `kendall`, exp(a - b)
    v_mse                       the U-Net's squared error, not divided (eps_mse, if it predicts eps). In its place
                                `bound` logs bound_per_dim: M, in nats per pixel value
    v_mse_own, v_mse_shuffled   the squared error (under `bound`, too) on a few training images that stay the same, if
                                the U-Net is shown their own x_hat, and if it is shown that of another image. If they
                                are equal, the refiner ignores x_hat.

Run     python stage2_joint.py                       shapes, on a laptop; stage1_baseline.py first, to compare with it
        python stage2_joint.py --loss kendall        with learned weights
        python stage2_joint.py --from-vae            begin with the VAE that stage 1 trained
        python stage2_joint.py --dataset celeba64    on faces; uses the GPU, if there is one
Expect  as many minutes of training as stage 1 takes for both networks; the same pictures and table; and
        pictures of paths through the latent space: between held-out images in `interpolation.png`, between samples in
        `paths.png`. (Stage 1's form1 gets them, too, if it is there.) Then some minutes for measurements on the side:
        of the latent space, and of how the samples depend on the number of components of the mixture that codes are
        drawn from. On shapes the refiner tolerates noise on x_hat far better than in stage 1 (nearly as well with
        `--gradient none`), the KL is more than twice as large, and precision is higher. The Frechet distance is not
        shown to be lower, and paths through the latent space are not shown to be straighter.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

import common
import fid
from common import to_float, to_uint8

WEIGHT = 0.03  # lambda if --diffusion-weight is not given; see above
POINTS = 9  # images along a path through the latent space

# --- Losses ----------------------------------------------------------------------------------------------------------

def denoiser(unet, x_hat):
    """`denoise(x, t)` with x_hat (B, 3, H, W) concatenated to the U-Net's input: Formulation 1 of stage 1."""
    return lambda x, t: unet(torch.cat([x, x_hat], 1), t)


def scale_gradient(x_hat, scale):
    """The values of x_hat, but gradients pass back multiplied by `scale`, a number or a scalar tensor."""
    # A view is a node of its own in the graph of autograd, and the hook sits on this node only. SSE uses x_hat itself,
    # so its gradient is not scaled.
    view = x_hat.view_as(x_hat)
    view.register_hook(lambda gradient: scale * gradient)
    return view


def joint_steps(train):
    """The number of steps of joint training: half of what stage 1 takes for its two networks together. One joint step
    trains both, so joint training takes about as long as stage 1."""
    return (train["vae_steps"] + train["unet_steps"]) // 2


class Balance(nn.Module):
    """The learned a and b of `kendall`. Both begin at log D, so that at first E and D M are both divided by D. Later
    exp(a) follows the mean of E, and exp(b) that of D M, so that both quotients stay near 1. (So the VAE's gradient is
    far smaller than with the other losses. This hardly slows its training, since the steps of the optimisers, Adam and
    Muon, do not depend on a constant factor of the gradient. Its one effect is that `vae_clip`, a limit for gradients
    of a sum over pixel values, is never reached.)"""

    def __init__(self, D):
        super().__init__()
        self.a_and_b = nn.Parameter(torch.full((2,), math.log(D)))

    def forward(self, E, DM):
        """E and D M, each (B,) -> exp(-a) E + a + exp(-b) D M + b, (B,)."""
        a, b = self.a_and_b
        return (-a).exp() * E + a + (-b).exp() * DM + b


def loss_weights(train, step, balance):
    """w_E and w_M at a step (see the table at the top): two numbers or scalar tensors."""
    w_E, w_M = 1.0, train["diffusion_weight"]  # sum
    if train["loss"] == "anneal":
        progress = min(1.0, step / (0.6 * joint_steps(train)))
        w_M = train["diffusion_weight"] * 0.1 ** (1 - progress)
    elif train["loss"] == "bound":
        w_M = 1.0
    elif train["loss"] == "kendall":
        a, b = balance.a_and_b.detach()
        w_E, w_M = (-a).exp(), (-b).exp()
    if train["gradient"] == "none":
        w_M = 0.0
    return w_E, w_M


def bound_loss(diffusion, denoise, x0, u, eps):
    """An unbiased estimate, from one time per image, of the U-Net's part of the bound on -log p(x0 | x_hat) (DDPM
    eq. 5): (B,) nats. (`denoise` knows x_hat. The part without the U-Net is common.kl_prior.)

    The U-Net's part has a KL for each t from 2 on, constant_t + factor_t |x0 - x0_predicted|^2 (common.kl_step), and,
    for t = 1, the nats of the pixels given x_1 (common.data_nats). These terms are largest at small t, so these times
    are drawn more often, which lowers the variance (importance sampling). A uniform u in [0, 1) gives
        t = floor(start u^4) + 1    (the power 4 was found by trying)
        P(t <= k) = P(u^4 < k / start) = (k / start)^(1/4)
        P(t = k) = P(t <= k) - P(t <= k - 1) = (k / start)^(1/4) - ((k - 1) / start)^(1/4)
    Each term is divided by the probability of its time, which keeps the estimate unbiased."""
    u = u.cpu().double()  # float64 for the probability; on the CPU, since not every device has it
    t = (diffusion.start * u**4).long() + 1  # (B,), in 1..start

    def up_to(k):
        """P(t <= k)"""
        return (k.double() / diffusion.start) ** 0.25

    probability = up_to(t) - up_to(t - 1)  # (B,)
    t = t.to(x0.device)
    x_t = diffusion.q_sample(x0, t, eps)
    x0_predicted, _ = diffusion.to_x0_and_eps(denoise(x_t, t), x_t, t, clamp=False)  # clamping would stop the gradient
    # kl_step is defined from t = 2 on. What it gives for images with t = 1 is overwritten below.
    nats = common.kl_step(diffusion, x0, x0_predicted, t.clamp(min=2))  # (B,)
    is_last_step = t == 1
    if is_last_step.any():
        nats[is_last_step] = common.data_nats(diffusion, x0[is_last_step], x0_predicted[is_last_step])
    return nats / probability.float().to(x0.device)


# --- Training --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def watch_training(vae, unet, diffusion, images):
    """What the log shows of the networks on fixed training images, times and noise: the number of active units, the
    refiner's squared error (not divided), and the same when it is shown another image's x_hat."""
    unet.eval()  # without dropout
    x0, gen = to_float(images), common.generator(0, images.device)
    mu, _ = vae.encoder(x0)
    x0, x_hat = x0[:64], vae.decoder(mu[:64])  # 64 are enough for a mean loss; mean codes, so without noise of z
    t = torch.linspace(1, diffusion.start, len(x0), device=x0.device).long()
    eps = common.randn(x0.shape, gen)
    numbers = {"active_units": float(common.active_units(mu).sum())}
    for name, x_hat_seen in (("own", x_hat), ("shuffled", x_hat.roll(1, 0))):
        loss = diffusion.simple_loss(denoiser(unet, x_hat_seen), x0, t, eps)
        numbers[f"{diffusion.objective}_mse_{name}"] = float(loss.mean())
    unet.train()
    return numbers


def train_joint(folder, train, data, device, vae_state=None):
    """Train VAE and refiner together, the VAE from scratch or from the checkpoint `vae_state` of stage 1. Returns the
    finished checkpoint, with the same entries as that of stage 1's form1 (and `balance`, under `kendall`).
    (tests/test_stage2.py: test_one_backward_pass_is_two)"""
    torch.manual_seed(train["seed"])
    vae = common.build_vae(train)
    if vae_state:
        vae.load_state_dict(vae_state["vae"])
    torch.manual_seed(train["seed"])  # again, so that the U-Net begins with the weights with which stage 1's begins
    unet = common.build_unet(train, 6)
    D = data.images[0].numel()  # the number of pixel values
    balance = Balance(D)  # which only `kendall` uses
    networks = {"vae": vae, "unet": unet} | ({"balance": balance} if train["loss"] == "kendall" else {})
    diffusion = common.Diffusion(train["objective"], device=device, start=train["start"])
    # In `paper`, images are mirrored for the refiner but not for the VAE. Here both see the same images: the refiner's.
    training = common.Training(folder, train, device, data.images, steps=joint_steps(train), flip=train["unet_flip"],
                               **networks)
    chosen = torch.randperm(len(data.images), generator=common.generator(0))[:256]
    watched_images = data.images[chosen].to(device)
    unet_log_name = "bound_per_dim" if train["loss"] == "bound" else f"{diffusion.objective}_mse"
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        z_noise = training.normal(vae.latent_dim)  # (B, d)
        u = training.uniform()  # (B,), for the training times
        eps = training.normal(*x0.shape[1:])  # (B, 3, H, W)
        with training.autocast():
            # E: the part of the loss that does not depend on the U-Net.
            mu, logvar = vae.encoder(x0)
            z = common.reparameterise(mu, logvar, z_noise)  # (B, d)
            x_hat = vae.decoder(z)  # (B, 3, H, W)
            sse, kl = common.squared_error(x_hat, x0), common.gaussian_kl(mu, logvar)  # (B,)
            if train["loss"] == "bound":
                # If the process begins before T, kl_prior is |sqrt(abar) (x0 - x_hat)|^2 / (2 (1 - abar)). Images lie
                # in [-1, 1], but SSE is taken in [0, 1], so |x0 - x_hat|^2 is 4 SSE. So kl_prior is SSE times
                # 2 abar / (1 - abar), or 0.485 SSE at start = 400.
                E = common.kl_prior(diffusion, x0, x_hat) + kl  # (B,)
            else:
                E = sse + train["beta"] * kl  # (B,)

            # The x_hat that the U-Net sees. Decoded again from a detached z, it passes no gradient to the encoder.
            x_hat_for_unet = vae.decoder(z.detach()) if train["gradient"] == "decoder" else x_hat
            w_E, w_M = loss_weights(train, training.steps_taken, balance)
            # The same values, but gradients that pass back through x_hat_seen are multiplied by w_M D.
            x_hat_seen = scale_gradient(x_hat_for_unet, w_M * D)

            # M: what the U-Net learns from and, through `x_hat_seen`, the VAE.
            denoise = denoiser(unet, x_hat_seen)
            if train["loss"] == "bound":
                plain_loss = bound_loss(diffusion, denoise, x0, u, eps) / D  # (B,), nats per pixel value
                M = plain_loss
            else:
                t = diffusion.draw_t(u)  # (B,), in 1..start
                plain_loss = diffusion.simple_loss(denoise, x0, t, eps)  # (B,), the squared error
                M = training.even_levels(plain_loss, t, diffusion)  # (B,)
            # w_M is not in this sum. It acts at x_hat_seen, on the way back, so it reaches the VAE but not the U-Net.
            loss = w_E * E + M  # (B,)
            if train["loss"] == "kendall":  # this trains a and b alone
                loss = loss + balance(E.detach(), D * M.detach())
        training.step(loss, {"sse": sse, "kl_nats": kl, unet_log_name: plain_loss, "weight": w_M / w_E},
                      watch=lambda: watch_training(vae, unet, diffusion, watched_images))
    vae = common.frozen(common.build_vae(train), training.averages["vae"], device)
    return training.finish(seconds_before=vae_state["seconds"] if vae_state else 0.0,
                           gmm=common.fit_mixture(vae, data.images, train, device))


def load_model(state, device):
    """The common.Model of a checkpoint of this stage, or of stage 1's form1."""
    train = state["train"]
    vae = common.frozen(common.build_vae(train), state["vae"], device)
    unet = common.frozen(common.build_unet(train, 6), state["unet"], device)
    diffusion = common.Diffusion(train["objective"], device=device, start=train["start"])
    priors = {"gaussian": common.StandardNormal(vae.latent_dim), "gmm": common.GaussianMixture(**state["gmm"])}
    model = common.Model("joint", device, shape=(3, train["image_size"], train["image_size"]), diffusion=diffusion,
                         networks=(vae, unet), vae=vae, priors=priors,
                         denoiser_for=lambda x_hat, z, clean: denoiser(unet, x_hat))
    common.choose_precision(model)
    return model


# --- What it shows: the latent space ---------------------------------------------------------------------------------

def slerp(a, b, w):
    """Spherical interpolation (Shoemake 1985): the point at w in [0, 1] on the arc from a to b, (N, d). In many
    dimensions the codes of images have nearly the same length, and the middle of a straight line between two of them
    would be much shorter."""
    angle = torch.acos((F.normalize(a) * F.normalize(b)).sum(1, keepdim=True).clamp(-1, 1))
    angle = angle.clamp(1e-4, math.pi - 1e-4)  # its sine must not be 0
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def smoothness(features):
    """How directly one image turns into another, from features (P, K, f) of the K images along each of P paths.
    `end_distance` is the mean distance between the two ends of a path. `path_over_distance` is the mean length of the
    paths, divided by end_distance; 1 is a straight line. (If end_distance is about 0, as with a collapsed VAE,
    path_over_distance says nothing.)"""
    segments = (features[:, 1:] - features[:, :-1]).norm(dim=2)  # (P, K - 1)
    ends = (features[:, -1] - features[:, 0]).norm(dim=1)  # (P,)
    return {"path_over_distance": float(segments.sum(1).mean() / ends.mean().clamp(min=1e-9)),
            "end_distance": float(ends.mean())}


def linear_probe(train_x, train_y, test_x, test_y):
    """Ridge regression from x (N, d) to y (N, k): R^2 of each column on the test set, and the test predictions (M,
    k)."""
    weight, bias = common.ridge_regression(train_x, train_y)
    predicted = test_x @ weight + bias
    r2 = 1 - (test_y - predicted).square().sum(0) / (test_y - test_y.mean(0)).square().sum(0)
    return r2.tolist(), predicted


@torch.no_grad()
def decode_and_refine(z, model, setup, first=0):
    """Codes (N, d) -> the VAE's images and the refined ones, {"vae": (N, 3, H, W), "refined": ...}, uint8. `first` is
    the index of the first code, so that the parts of a long list get different noise. The points of a path leave it at
    0, and so share their noise."""
    z = z.to(model.device)
    x_hat = model.vae.decoder(z)
    # The parts of a long list begin at the codes 0, 100, 200 and so on, and `refine` uses up two seeds. So no two parts
    # share a seed. (Nor would they without the factor 2, which stays because the committed results have it.)
    gen = common.generator(common.SEEDS["interpolation"] + setup.train["seed"] + 2 * first)
    images = common.refine(model, x_hat, z, gen, sampler="dpm", steps=setup.evaluation["probe_steps"])
    return {"vae": to_uint8(x_hat).cpu(), "refined": to_uint8(images).cpu()}


def images_along_paths(first_codes, last_codes, points, model, setup):
    """Paths of `points` images, from row i of first_codes (P, d) to row i of last_codes (P, d). Returns the weights
    w of slerp along a path, and the images, {"vae": (P, points, 3, H, W), "refined": ...}, uint8."""
    weights = torch.linspace(0, 1, points).tolist()
    along = [decode_and_refine(slerp(first_codes, last_codes, w), model, setup) for w in weights]
    strips = {name: torch.stack([images[name] for images in along], dim=1) for name in ("vae", "refined")}
    return weights, strips


@torch.no_grad()
def draw_paths(picture, model, setup):
    """Draw three paths between codes that the mixture draws, in the file `picture`. (The paths that latent_space draws
    show real images, and some data sets do not allow those to be published.)"""
    gen = common.generator(common.SEEDS["paths"] + setup.train["seed"])
    first_codes, last_codes = model.priors["gmm"].sample(6, gen).chunk(2)  # (3, d) each
    weights, strips = images_along_paths(first_codes, last_codes, POINTS, model, setup)
    rows = {}
    for i in range(3):
        rows[f"VAE {i + 1}"] = strips["vae"][i]
        rows[f"refined {i + 1}"] = strips["refined"][i]
    common.save_grid(picture, rows, columns=[f"w = {w:.3g}" for w in weights])


@torch.no_grad()
def latent_space(picture, model, setup, pairs=32, points=POINTS):
    """Measure the latent space on held-out images. Their codes are the means of q(z|x). Three things are measured:
        posterior   the Frechet distance of the images that are decoded from these codes, in place of a prior's
        slerp       how straight paths of images are: `pairs` paths of `points` images, each from one code to another
        probe       how well a linear function of the code tells the image's class and, of shapes, its factors
    The first two are measured of the VAE's images and of the refined ones. All points of a path are refined with the
    same noise. The first three paths are drawn in the file `picture`, between the two real images."""
    data, test, result = setup.data, setup.test, {}
    mu, _ = common.encode(model.vae, test.images, model.device)  # (N, d)
    # The first `count` images are those of `posterior`. Path i goes from image i to image count + i.
    count = min(setup.evaluation["grid_count"], len(mu) // 2)
    pairs = min(pairs, count)
    first_codes, last_codes = mu[:pairs], mu[count : count + pairs]  # of the paths: two different images each

    result["images"] = count
    parts = []
    for first in range(0, count, 100):
        parts.append(decode_and_refine(mu[first : min(first + 100, count)], model, setup, first))
    weights, strips = images_along_paths(first_codes, last_codes, points, model, setup)
    result["posterior"], result["slerp"] = {}, {}
    for name in ("vae", "refined"):
        scores = setup.score(torch.cat([part[name] for part in parts]))
        result["posterior"][name] = scores[setup.fd_key]  # "fd_local" or "fid", which depends on the feature network
        features, _ = fid.extract(setup.extractor, strips[name].flatten(0, 1))  # (pairs * points, f), and logits
        result["slerp"][name] = smoothness(features.view(-1, points, features.shape[1]))
    rows = {}
    for i in range(min(3, pairs)):
        real_a, real_b = test.images[i : i + 1], test.images[count + i : count + i + 1]
        rows[f"VAE {i + 1}"] = torch.cat([real_a, strips["vae"][i], real_b])
        rows[f"refined {i + 1}"] = torch.cat([real_a, strips["refined"][i], real_b])
    common.save_grid(picture, rows, columns=["real", *(f"w = {w:.3g}" for w in weights), "real"])

    chosen = torch.randperm(len(data.images), generator=common.generator(0))[:5000]  # enough to fit d weights
    train_mu, _ = common.encode(model.vae, data.images[chosen], model.device)
    if data.labels is not None:
        one_hot = torch.eye(1 + int(torch.cat([data.labels, test.labels]).max()))  # (classes, classes)
        _, predicted = linear_probe(train_mu, one_hot[data.labels[chosen]], mu, one_hot[test.labels])
        result["probe_class_accuracy"] = float((predicted.argmax(1) == test.labels).float().mean())
    if data.factors is not None:  # of shapes: the numbers that an image was drawn from, such as its size and place
        r2, _ = linear_probe(train_mu, data.factors[chosen], mu, test.factors)
        result["probe_r2"] = dict(zip(common.FACTORS, r2, strict=True))
    return result


# --- The command -----------------------------------------------------------------------------------------------------

def read_flags(argv):
    """The parsed flags, this stage's own train settings, and the run's name: the loss, and what is not the default."""
    parser = argparse.ArgumentParser(description="Stage 2: VAE and refiner trained jointly")
    common.add_flags(parser, priors=("gaussian", "gmm"), default_prior="gmm")
    parser.add_argument("--loss", choices=("sum", "anneal", "kendall", "bound"), default="anneal",
                        help="how the two terms are balanced (default: %(default)s)")
    parser.add_argument("--gradient", choices=("full", "decoder", "none"), default="full",
                        help="how far the diffusion term's gradient goes into the VAE (default: %(default)s)")
    parser.add_argument("--diffusion-weight", type=float,
                        help=f"lambda of sum, and the final one of anneal (default: {WEIGHT:g})")
    parser.add_argument("--from-vae", action="store_true",
                        help="begin with stage 1's finished VAE, which has to be there, in place of a random one")
    args = parser.parse_args(argv)
    if args.loss in ("kendall", "bound") and args.diffusion_weight is not None:
        common.fail(f"--diffusion-weight: --loss {args.loss} has no weight to choose; leave it out")
    if args.diffusion_weight is not None and not 0 < args.diffusion_weight <= 1000:
        common.fail(f"--diffusion-weight {args.diffusion_weight}: must be above 0 (for 0, give --gradient none) and at "
                    "most 1000")
    if args.gradient == "none" and (args.loss in ("sum", "kendall") or args.diffusion_weight is not None):
        # The diffusion term does not train the VAE then. So `anneal` and `sum`, with any lambda, would make the same
        # run (and `kendall` one that differs little, in clipping and in the size of gradients). So that it has one
        # name, only `anneal` with its default weight is allowed. (`bound` is another run: its E and M are others.)
        common.fail("--gradient none: no weight reaches the VAE; leave --diffusion-weight out, and --loss (or give "
                    "--loss bound)")
    weight = WEIGHT if args.diffusion_weight is None else args.diffusion_weight
    own = {"loss": args.loss, "gradient": args.gradient, "from_vae": args.from_vae,
           "diffusion_weight": weight if args.loss in ("sum", "anneal") else None}
    if args.loss == "kendall":
        # a and b are trained by Adam alone (Muon, the other optimizer of common.Training, is for matrices), without
        # clipping and averaging. Adam moves a by up to 0.05 a step, so it can fall from log D = 8 to log E = 2.5, as it
        # does on shapes.
        own |= {"balance_lr": 0.05, "balance_muon_lr": 0.0, "balance_clip": 0.0, "balance_ema": 0.0}
    name = f"stage2-{args.loss}"
    if weight != WEIGHT:
        name += f"-w{weight:g}"
    if args.gradient != "full":
        name += f"-grad-{args.gradient}"
    if args.from_vae:
        name += "-from-vae"
    return args, own, name


def add_tables(folder, model, metrics, setup):
    """Measure the latent space of a run, and its Frechet distance by the number of components of the mixture, and draw
    interpolation.png and paths.png, if this was not done yet. `metrics` (made by fid.evaluate) has three parts:
    metrics["run"] are facts such as the settings, metrics["rows"] the scores of samples, metrics["tables"] the rest."""
    if "latent_space" not in metrics["tables"]:
        draw_paths(folder / "paths.png", model, setup)
        metrics["tables"]["latent_space"] = latent_space(folder / "interpolation.png", model, setup)
        metrics["tables"]["components"] = fid.by_components(model, setup)
        common.write_json(folder / "metrics.json", metrics)


def results_of_stage1(setup):
    """{folder: metrics} of stage 1's runs `stage1-vae` and `stage1-form1`, as far as they are there. A run with other
    data, settings or another evaluation than this one is left out."""
    results = {}
    for name, ignored in (("stage1-vae", common.OF_UNET), ("stage1-form1", ())):
        folder, settings = setup.folder_and_settings(name, ignored=ignored)
        metrics = fid.read_metrics(folder / "metrics.json", setup.evaluation)
        if metrics and common.first_difference(metrics["run"]["train"], settings) is None:
            results[folder] = metrics
    return results


def main(argv=None):
    args, own, name = read_flags(argv)
    # To change these by --set is an error here.
    unused = ["flow_steps", "guidance"]  # settings of stage 3, and of stage 1's `guided`
    if args.loss == "bound":
        unused.append("even_levels")
    if not args.from_vae:  # with --from-vae, the VAE of stage 1 depends on vae_flip and beta
        unused.append("vae_flip")  # joint training mirrors images as `unet_flip` says
        if args.loss == "bound":
            unused.append("beta")
    train, evaluation, device = common.read_settings(args, unused)
    if args.dry_run:
        return common.print_settings(train | own | args.changes, evaluation)
    setup = fid.Setup(args, train, evaluation, device)
    folder, settings = setup.folder_and_settings(name)
    settings |= own
    vae_state = None
    if args.from_vae:
        vae_folder, vae_settings = setup.folder_and_settings("stage1-vae", ignored=common.OF_UNET)
        # OF_UNET: the settings of refiners, on which stage 1's VAE does not depend. It was trained without them.
        # With resume=True, an unfinished VAE gives None. Without a checkpoint, finished_state would prepare the folder
        # for a training (write config.json), so it is not called. In both cases the message below appears.
        if (vae_folder / "checkpoint.pt").is_file():
            vae_state = common.finished_state(vae_folder, vae_settings, resume=True)
        if vae_state is None:
            common.fail(f"--from-vae: {vae_folder} holds no finished VAE; first run stage1_baseline.py --variant vae, "
                        "with --resume if it was stopped")
    state = (common.finished_state(folder, settings, args.resume)
             or train_joint(folder, settings, setup.data, device, vae_state))
    model = load_model(state, device)
    model.temperature = setup.evaluation["temperature"]  # factor of eps in x_start
    metrics = fid.evaluate(folder, setup, state, model)
    if args.export:
        common.export(args, folder, model, setup.evaluation)
    add_tables(folder, model, metrics, setup)

    # If stage 1 was run, measure its form1 in the same way.
    stage1 = results_of_stage1(setup)
    form1_folder, _ = setup.folder_and_settings("stage1-form1")
    if form1_folder in stage1 and (form1_folder / "checkpoint.pt").is_file():
        form1 = load_model(common.load_checkpoint(form1_folder / "checkpoint.pt"), device)
        form1.temperature = setup.evaluation["temperature"]
        add_tables(form1_folder, form1, stage1[form1_folder], setup)
    all_metrics = stage1 | {folder: metrics}
    fid.print_results(all_metrics, setup)
    for run_folder, run_metrics in all_metrics.items():
        if "latent_space" in run_metrics["tables"]:
            numbers = run_metrics["tables"]["latent_space"]["slerp"]["refined"]
            print(f"{run_folder.name}: path length over end distance {numbers['path_over_distance']:.3f}, end distance "
                  f"{numbers['end_distance']:.3f} (refined, slerp)")
    if len(stage1) < 2:
        print(f"no complete results of stage 1 in {setup.home}; to compare, run stage1_baseline.py with the same flags "
              "(without those of this stage)")


if __name__ == "__main__":
    main()
