"""Stage 1: DiffuseVAE, the two-stage baseline (Pandey et al. 2022, arXiv:2201.00308).

The claim: a VAE draws an image in one pass from a compact code, but the image is blurred. A diffusion model draws sharp
images, but it has no code. Put one behind the other, and the VAE decides *what* is in the image while the diffusion
model decides *how it looks*.

Words in `backticks` are names: of settings, scores, variants (chosen by --variant), budgets (sets of settings, chosen
by --budget), or of parts of the code.

    1. The VAE        It is trained to reconstruct an image x0 from its code z:
                          z ~ q(z|x0),   x_hat = Dec(z),   loss = SSE(x0, x_hat) + beta KL(q(z|x0) || N(0, I))
                      As published, beta is 1. The budgets `cpu` and `gpu` have 0.04 on shapes and 0.25 on real images
                      (common.budget). With a smaller beta the code holds more of the image, and it becomes harder to
                      model how codes are distributed (see 3).

    2. The refiner    It is a diffusion model that sees x_hat and learns to draw x0:
                          x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,   loss = MSE(target, U-Net(x_t, x_hat, t))
                      where abar_t (`alpha_bar` in common.Diffusion) falls from nearly 1 at t = 1 to nearly 0 at t = T.
                      The target is eps as published (--budget paper). With all other budgets it is
                          v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0,
                      and the loss of each noise level is divided by its running mean, so that all levels count alike
                      (train_refiner says why).
                      There are two ways to show x_hat to the U-Net. Its input is, with concatenation as [.., ..],
                          [x_t, x_hat] in Formulation 1 (`form1`),
                          [x_t + x_hat, x_hat] in Formulation 2 (`form2`; see denoiser).

    3. Sampling       Draw z from a prior, decode it to x_hat, and run the reverse process. The prior is N(0, I), or a
                      Gaussian mixture that is fitted to the codes of the training images after training ("ex post"),
                      because these codes never follow N(0, I) exactly.

    4. Where to begin As published, sampling begins with pure noise, at t = T, and t falls from there. But x_hat already
                      shows roughly what x0 looks like. So we leave the noisiest part out and begin at t = `start`:
                          x_start = sqrt(abar_start) x_hat + sqrt(1 - abar_start) eps
                      Only the times 1..start are trained. So no training is spent on times that sampling never visits,
                      and fewer sampling steps are enough. (build_diffusion says how small `start` may be.)

    5. Guidance       Train a second U-Net of the same size for a tenth of the steps: the guide. The idea is that it
                      makes the same errors as the refiner, but larger ones. Then the difference of their predictions
                      points away from these errors, and `guided` adds half of this difference to the refiner's:
                          prediction = refiner + 0.5 (refiner - guide)
                      Each sampling step evaluates both networks.

    6. Augmentation   `augmented` is form1, trained with noise on x_hat, so that the refiner learns to expect errors in
                      it (conditioning augmentation, Ho et al. 2022, arXiv:2106.15282, section 3; here the strength of
                      the noise is no input of the U-Net).

Run     python stage1_baseline.py                        VAE and Formulation 1 on the built-in shapes, on a laptop
                                                         (with CUDA the default is `--budget gpu`: larger networks)
        python stage1_baseline.py --dataset cifar10      the same on real images (see README for where they come from)
        python stage1_baseline.py --variant guided       VAE, Formulation 1 and its guide
        python stage1_baseline.py --variant all          vae, form1, form2, guided, augmented, and a control: `uncond`,
                                                         a diffusion model without a VAE
        python stage1_baseline.py --dataset cifar10 --pretrained     36 samples in half a minute; nothing is trained
Expect  of the first command: 4 to 8 minutes on two CPU cores; then pictures and a table.
        The pictures are in runs/shapes-cpu/stage1-form1-s0. In samples.png, in pairs of rows, the images of the VAE are
        above and the refined ones below. Two scores tell most (see fid.py). `hf_energy` is the amount of fine detail,
        relative to real images: about 0.5 for the VAE's samples, which are blurred, and 0.75 for the refined ones,
        which have clearer outlines and stripes. `fd_local` (README.md calls it fd) is the Frechet distance to the real
        images, in the features of a small network that was trained on the same data set. It is a quarter to two fifths
        lower after refinement.
"""

import argparse
import math
from pathlib import Path

import torch

import common
import fid

# The variants, in the order in which they are run, and the number of input channels of their U-Nets: 3 for x_t, and 3
# more if the U-Net also sees x_hat. `vae` has no U-Net.
CHANNELS = {"vae": None, "uncond": 3, "form1": 6, "form2": 6, "guided": 6, "augmented": 6}
# `augmented` adds noise to x_hat, with an sd between 0 and this. It is the sd of the strongest noise with which
# evaluation tests a refiner (fid.NOISE), so `augmented` is trained for all noise that it is tested with.
AUGMENTATION = 0.4
PRETRAINED = Path(__file__).resolve().parent / "results"  # holds DATASET/form1-*.pt and guide-*.pt, for --pretrained

# --- The model and its losses ----------------------------------------------------------------------------------------

def vae_loss(vae, x0, noise, beta):
    """DiffuseVAE's loss for the VAE. x0 (B, 3, H, W), noise (B, d) -> loss, sse, kl_nats, each (B,).

    With beta = 1 this is the negative ELBO, up to a constant, of a Gaussian decoder with variance 1/2 on images in
    [0, 1]: -log N(x; x_hat, 1/2) = SSE / (2 * 1/2) + constant. (Our images lie in [-1, 1]. common.squared_error
    converts.)"""
    x_hat, mu, logvar = vae(x0, noise)
    sse, kl = common.squared_error(x_hat, x0), common.gaussian_kl(mu, logvar)
    return sse + beta * kl, sse, kl


def build_diffusion(train, variant, device):
    """The diffusion process of a variant. Without an x_hat to begin with (`uncond`), it begins at T.

    `train`, here and in all functions below, is the dictionary of a run's training settings: common.TRAIN, with the
    values of the chosen budget and of the flags.

    How small may `start` be? In training, at t = start, the U-Net sees sqrt(abar) x0 + sqrt(1 - abar) eps. In sampling
    it sees x_hat in place of x0. If x_hat is the reconstruction of an image x0, that makes a difference of sqrt(abar)
    (x_hat - x0), which the noise has to hide. The noise should have at least six times the standard deviation of this
    difference (our rule of thumb, which fid.check_start tests): sqrt(1 - abar) >= 6 sqrt(abar) sd(x_hat - x0). At
    start = 400, our setting, it has more than 11 times on our data sets. The better the VAE, the smaller `start` may
    be."""
    start = None if variant == "uncond" else train["start"]
    return common.Diffusion(train["objective"], device=device, start=start)


def denoiser(unet, x_hat, variant):
    """The function (x_t, t) -> prediction for one batch, given its x_hat (B, 3, H, W), or None for `uncond`.

    In Formulation 2 the U-Net is shown x_t + x_hat in place of x_t, and all else is as in Formulation 1. The paper
    describes it in another way, as a diffusion process of y_t = x_t + x_hat, which ends in noise around x_hat and not
    around 0. That is the same, since y_t is x_t plus a known image: y_t minus x_hat is x_t at every step, and x0 and
    eps are the same, so the target is the same, too, be it eps or v.
    (tests/test_stage1.py: test_formulation_2_is_formulation_1_after_the_shift)"""
    if variant == "uncond":
        return unet

    def denoise(x_t, t):
        shown = x_t + x_hat if variant == "form2" else x_t  # (B, 3, H, W)
        return unet(torch.cat([shown, x_hat], 1), t)

    return denoise


def guided_denoiser(refiner, guide, guidance):
    """Autoguidance (Karras et al. 2024, arXiv:2406.02507): the function (x_t, t) -> prediction that is made of the two
    functions `refiner` and `guide`, as prediction = refiner + guidance * (refiner - guide). (`guidance` is the paper's
    w - 1.)

    The paper guides the predicted image x0, we guide the predicted eps or v. That is the same, because at a given x_t
    both are affine in x0. With x_t = a x0 + sigma eps and a^2 + sigma^2 = 1,
        eps = x_t / sigma - (a / sigma) x0
        v = a eps - sigma x0 = (a / sigma) x_t - (a^2 / sigma + sigma) x0 = (a / sigma) x_t - (1 / sigma) x0.
    So a prediction is c + k p, where p is the predicted image, and c and k depend on x_t and t alone. If the refiner
    predicts the image p and the guide the image q, then with g for `guidance`
        (1 + g) (c + k p) - g (c + k q) = c + k ((1 + g) p - g q),
    which is the prediction that belongs to the guided image (1 + g) p - g q."""

    def denoise_guided(x_t, t):
        prediction = refiner(x_t, t)
        return prediction + guidance * (prediction - guide(x_t, t))

    return denoise_guided


# --- Training --------------------------------------------------------------------------------------------------------

def train_vae(folder, train, data, device):
    """Train the VAE on data.images (uint8), then fit the Gaussian mixture to their codes. Returns the finished
    checkpoint: a dictionary of weights, settings and log.

    A common.Training moves the given networks to the device, sets up their optimizers and moving averages, and hands
    out batches of images and random numbers. Its `step` takes the losses of a batch, (B,), does the backward pass of
    their mean, and updates the networks. The second argument of `step` names numbers whose means are logged."""
    torch.manual_seed(train["seed"])
    vae = common.build_vae(train)
    training = common.Training(folder, train, device, data.images, steps=train["vae_steps"], flip=train["vae_flip"],
                               vae=vae)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        noise = training.normal(vae.latent_dim)  # (B, d)
        with training.autocast():
            loss, sse, kl = vae_loss(vae, x0, noise, train["beta"])
        training.step(loss, {"sse": sse, "kl_nats": kl})
    # The checkpoint keeps the moving average of the weights (train["vae_ema"]), so the mixture is fitted to its codes.
    averaged_vae = common.frozen(common.build_vae(train), training.averages["vae"], device)
    return training.finish(gmm=common.fit_mixture(averaged_vae, data.images, train, device))


def train_refiner(folder, train, variant, vae_state, data, device):
    """Train a refiner behind the frozen VAE of the checkpoint `vae_state`. Returns the finished checkpoint, which
    contains the VAE as well. The control `uncond` has no VAE, and does not use `vae_state`."""
    torch.manual_seed(train["seed"])
    unet = common.build_unet(train, CHANNELS[variant])
    diffusion = build_diffusion(train, variant, device)
    vae = common.frozen(common.build_vae(train), vae_state["vae"], device) if variant != "uncond" else None
    training = common.Training(folder, train, device, data.images, steps=train["unet_steps"], flip=train["unet_flip"],
                               unet=unet)
    for x0 in training:  # (B, 3, H, W) in [-1, 1]
        x_hat = None
        if variant != "uncond":  # as published, x_hat comes from a fresh sample of z in every step
            z_noise = training.normal(vae.latent_dim)  # (B, d)
            with torch.no_grad(), training.autocast():
                x_hat, _, _ = vae(x0, z_noise)  # (B, 3, H, W)
        t = diffusion.draw_t(training.uniform())  # (B,), in 1..start
        eps = training.normal(*x0.shape[1:])  # (B, 3, H, W)
        if variant == "augmented":  # each x_hat gets noise of a strength of its own
            sd = AUGMENTATION * training.uniform(1, 1, 1)  # (B, 1, 1, 1)
            x_hat = x_hat + sd * training.normal(*x0.shape[1:])
        with training.autocast():
            loss = diffusion.simple_loss(denoiser(unet, x_hat, variant), x0, t, eps)  # (B,)
        # The loss is largest at the lowest noise levels, since weak noise looks much like fine texture, and since an
        # error of x0 makes one of v that is 1 / sigma times as large (see guided_denoiser). But all that is decided at
        # these levels is the grain of the image. So an image's loss is divided by the running mean of the losses at
        # its noise level (not with the budget `paper`). On shapes this lowers fd by 27%; on real images no gain is seen
        # (REPORT.md, appendix).
        loss_to_minimise = training.even_levels(loss, t, diffusion)  # (B,)
        training.step(loss_to_minimise, {f"{train['objective']}_mse": loss})
    if variant == "uncond":
        return training.finish()
    # The checkpoint also contains the VAE and its mixture. Its `seconds` are those of this training alone;
    # `seconds_before` are the VAE's.
    return training.finish(seconds_before=vae_state["seconds"], vae=vae_state["vae"], gmm=vae_state["gmm"])


# --- Sampling --------------------------------------------------------------------------------------------------------

def load_model(state, variant, device):
    """The common.Model of a variant, built from its checkpoint alone. (The checkpoint of `guided` is made by
    with_guide.)"""
    train, size = state["train"], state["train"]["image_size"]
    diffusion = build_diffusion(train, variant, device)  # (a VAE alone does not sample with it)
    model = common.Model(variant, device, shape=(3, size, size), diffusion=diffusion)
    if variant != "uncond":
        model.vae = common.frozen(common.build_vae(train), state["vae"], device)
        model.priors = {"gaussian": common.StandardNormal(model.vae.latent_dim),
                        "gmm": common.GaussianMixture(**state["gmm"])}
        model.networks += (model.vae,)  # all that the model consists of, to count its parameters
    # common.refine calls denoiser_for once for each batch, and samples with the function (x_t, t) -> prediction that it
    # returns. Here it uses x_hat alone; z and `clean` are for stage 3 (see common.Model).
    if variant != "vae":
        unet = common.frozen(common.build_unet(train, CHANNELS[variant]), state["unet"], device)
        model.networks += (unet,)
        model.denoiser_for = lambda x_hat, z, clean: denoiser(unet, x_hat, variant)
    if variant == "guided":
        guide = common.frozen(common.build_unet(train, CHANNELS[variant]), state["guide"], device)
        model.networks += (guide,)
        model.evaluations = 2  # the refiner and the guide, in every step of sampling
        model.denoiser_for = lambda x_hat, z, clean: guided_denoiser(
            denoiser(unet, x_hat, variant), denoiser(guide, x_hat, variant), train["guidance"])
    common.choose_precision(model)  # bfloat16 where it is fast and the outputs agree with those of float32
    return model


def with_guide(form1, guide):
    """The checkpoint of `guided`, made from the checkpoints of form1 and of the guide."""
    state = dict(form1)
    state["guide"] = guide["unet"]
    # Of the two, only the guide's settings have the value of a --set guidance=... (see main).
    state["train"] = form1["train"] | {"guidance": guide["train"]["guidance"]}
    state["log"] = guide["log"]  # so the run's training.png shows the guide; that of form1 is in the folder of form1
    state["seconds"] = form1["seconds"] + guide["seconds"]
    # Scores are kept with the run_id of the weights. So they are measured again if either network was trained again.
    state["run_id"] = f"{form1['run_id']}+{guide['run_id']}"
    return state


def draw_pretrained(args, evaluation, device):
    """--pretrained: draw samples.png with 36 samples of `guided`, from weights that come with the project. To keep
    their files small, the encoder is left out, and matrices are stored in half precision. `evaluation` has the settings
    of sampling and scoring (common.EVAL, changed by flags)."""
    checkpoints = []
    for name in ("form1", "guide"):
        files = common.find_hashed(PRETRAINED / args.dataset, name)  # NAME-<hash>.pt, with the hash of its contents
        # `what` and `advice` are the two parts of the message if the file is missing or damaged.
        checkpoints.append(common.load_hashed(files, what=f"--pretrained, {PRETRAINED / args.dataset}/{name}-*.pt",
                                              advice="take another --dataset, or train: leave --pretrained out"))
    state = with_guide(*checkpoints)
    # load_model wants a whole VAE. In place of the missing encoder it gets a random one. Sampling does not use it (but
    # choose_precision runs it).
    state["vae"] = common.build_vae(state["train"]).state_dict() | state["vae"]
    model = load_model(state, "guided", device)
    model.temperature = evaluation["temperature"]  # factor of eps in x_start
    evaluation["batch"] = 36  # `generate` draws whole batches, and samples.png shows 36 images
    folder = Path(args.out) / f"{args.dataset}-pretrained"
    prior, sampler, steps = common.headline(model, evaluation)  # what the flags choose
    x_hat, images, _ = common.generate(model, 36, prior, sampler, steps, args.seed, evaluation["batch"])
    common.draw_samples(folder, {"VAE": x_hat, "refined": images})
    print(folder / "samples.png")
    if args.export:  # write images as PNG files
        common.export(args, folder, model, evaluation)


# --- The command -----------------------------------------------------------------------------------------------------

def read_flags(argv):
    """The parsed flags. `variant` is the list of variants to evaluate, in the order of CHANNELS."""
    parser = argparse.ArgumentParser(description="Stage 1: DiffuseVAE on images")
    common.add_flags(parser, priors=("gaussian", "gmm"), default_prior="gmm")
    parser.add_argument("--variant", nargs="+", choices=(*CHANNELS, "all"),
                        help="what to train and evaluate (default: vae form1); the VAE is trained if need be, and "
                             "guided includes form1")
    parser.add_argument("--pretrained", action="store_true",
                        help="train and score nothing: samples of `guided`, from weights that come with the project")
    args = parser.parse_args(argv)
    if args.pretrained:
        if common.RANKS > 1:
            common.fail("--pretrained: one process is enough; run it without torchrun")
        # Flags of training and scoring would have no effect.
        for flag in ("variant", "budget", "data_dir", "image_size", "steps", "batch_size", "set", "eval_samples",
                     "features", "weights", "resume"):
            if getattr(args, flag) != parser.get_default(flag):
                common.fail(f"--{flag.replace('_', '-')}: has no effect with --pretrained, which trains and scores "
                            "nothing (it draws samples of `guided`, budget cpu); leave it out")
        args.variant, args.budget = ["guided"], "cpu"  # the only weights that there are, and their settings
    chosen = set(args.variant or ["vae", "form1"])
    if "guided" in chosen:
        chosen.add("form1")  # whose predictions are moved away from those of the guide
    args.variant = [variant for variant in CHANNELS if variant in chosen or "all" in chosen]
    return args


def main(argv=None):
    args = read_flags(argv)
    # Settings, or beginnings of their names, on which none of the chosen variants depends. (flow_steps is a setting of
    # stage 3.) To change one of them by --set is an error.
    unused = ["flow_steps"]
    if "guided" not in args.variant:
        unused.append("guidance")
    if {*args.variant} <= {"vae", "uncond"}:
        unused.append("start")  # only refiners begin there
    if args.variant == ["vae"]:
        unused += common.OF_UNET
    if args.variant == ["uncond"]:
        unused += common.OF_VAE
    train, evaluation, device = common.read_settings(args, unused)
    # `train` has the settings of the budget and the flags, args.changes those that --set changes.
    if args.dry_run:
        return common.print_settings(train | args.changes, evaluation)
    if args.pretrained:
        return draw_pretrained(args, evaluation, device)
    # The setup loads the data and the feature network of the scores. setup.train and setup.evaluation are copies of the
    # settings, with facts about these two added, such as the number of training images.
    setup = fid.Setup(args, train, evaluation, device)
    vae_state, states, all_metrics = None, {}, {}  # states by variant, all_metrics by folder

    if args.variant != ["uncond"]:  # all other variants build on the VAE
        # `settings` are those of one run: `train`, and the changes that concern this run. With `--set beta=1`, the
        # folder is runs/shapes-cpu/stage1-vae-beta=1-s0, and `settings` has the changed beta. Changes whose name begins
        # with one of `ignored` are left out. Here these are the refiner's (unet_steps, start, guidance and so on), so
        # that runs with another refiner find the same VAE.
        vae_folder, settings = setup.folder_and_settings("stage1-vae", ignored=common.OF_UNET)
        # finished_state returns None if the run has to be trained: from the beginning or, with --resume, from where it
        # was left (the Training finds the unfinished checkpoint). Without --resume an unfinished run is an error.
        vae_state = (common.finished_state(vae_folder, settings, args.resume)
                     or train_vae(vae_folder, settings, setup.data, device))
    for variant in args.variant:  # in the order of CHANNELS, so form1 comes before guided
        if variant == "vae":
            folder, states[variant] = vae_folder, vae_state
        elif variant == "guided":
            # In this folder the guide is trained: form1, for a tenth of the steps (found by trying). It is not an early
            # state of form1, since its learning rate falls to 0 within these steps. The scores of
            # `guided` are kept here, too. They depend on `guidance`, so with another value the folder is another one
            # (where the same guide is trained again, which takes little time).
            folder, settings = setup.folder_and_settings("stage1-guided")
            settings["unet_steps"] = math.ceil(settings["unet_steps"] / 10)
            guide_state = (common.finished_state(folder, settings, args.resume)
                           or train_refiner(folder, settings, "form1", vae_state, setup.data, device))
            states[variant] = with_guide(states["form1"], guide_state)
        else:
            ignored = ("guidance",)
            if variant == "uncond":  # it has no VAE, and begins at T whatever `start` is
                ignored = ("guidance", "start", *common.OF_VAE)
            folder, settings = setup.folder_and_settings(f"stage1-{variant}", ignored=ignored)
            states[variant] = (common.finished_state(folder, settings, args.resume)
                               or train_refiner(folder, settings, variant, vae_state, setup.data, device))
        model = load_model(states[variant], variant, device)
        model.temperature = setup.evaluation["temperature"]  # factor of eps in x_start
        all_metrics[folder] = fid.evaluate(folder, setup, states[variant], model)
        if args.export:
            common.export(args, folder, model, setup.evaluation)
    fid.print_results(all_metrics, setup)


if __name__ == "__main__":
    main()
