"""Final evaluation: reads results, writes tables and charts, and tests the claims. It trains nothing.

Every run of a stage leaves a file metrics.json. `NUMBERS` gives names to the numbers in it, `TABLES` says which numbers
of which runs make a table, `PRIMARY_CLAIMS`, `CLAIMS` and `FURTHER_CLAIMS` say which two numbers answer a question, and
`CHARTS` lists the charts. README.md and REPORT.md mark the place of a table by two lines, <!-- table NAME --> and
<!-- end -->. This program replaces what stands between them. README.md has a glossary of the words used here.

Run     python final_evaluation.py                     results/ -> README.md, REPORT.md, results/TABLES.md, charts
        python final_evaluation.py --check             writes nothing; exit status 1 if a text would change
        python final_evaluation.py --runs runs         compares new runs with those in results/, in runs/REPORT.md
        python final_evaluation.py --collect RUN ...   copies metrics, figures and weights of run folders into results/
"""

import argparse
import math
import re
import statistics
from fnmatch import fnmatch
from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw
from scipy.stats import t as student

import common
import fid

ROOT = Path(__file__).resolve().parent
# The order of data sets and of variants in tables: names are sorted by which of these beginnings they have (the first
# that fits), then by the alphabet. The empty text at the end fits all other names.
DATASET_ORDER = (*common.DATASETS, "")
VARIANT_ORDER = ("stage1-vae", "stage1-uncond", "stage1-", "stage2-", "stage3-", "")
# The variants that are compared with each other most often: in README.md and in a picture of samples.
MAIN_VARIANTS = ("stage1-uncond", "stage1-form1", "stage1-guided", "stage2-anneal", "stage2-kendall",
                 "stage3-flow-fixed", "stage3-flow-film", "bonus-latent")
# The runs of `uncond` that were trained for about as long as VAE and refiner together, by data set.
LONG_UNCOND = {"shapes": "stage1-uncond-unet_steps=1600", "cifar10": "stage1-uncond-unet_steps=8000",
               "celeba64": "stage1-uncond-unet_steps=4000"}
# These refine the same images as the variant before them.
SAME_X_HAT = ("stage1-guided", "stage3-flow-film")
# Stage 3's ways to tell the refiner how unsure the VAE is. `fixed` does not tell it.
CONDITIONINGS = ("stage3-flow-fixed", "stage3-flow-fade", "stage3-flow-film", "stage3-flow-coupling")
# The runs whose weights `--collect` keeps, for `stage1_baseline.py --pretrained`: the name of the run, the name of its
# file of weights, and the parts of the checkpoint that this file holds. (In the run of `guided`, the key `unet` holds
# the guide, the only network that this run trains. Its VAE and refiner are those of form1.)
WEIGHTS = {"stage1-form1-s0": ("form1", ["vae", "unet", "gmm"]), "stage1-guided-s0": ("guide", ["unet"])}
# The names of runs on shapes that take twice the training steps of the budget `cpu` end in this.
TWICE = "-vae_steps=1800-unet_steps=1200"
# Figures of these names show real images. `--collect` only copies them for shapes, which the program draws itself.
FIGURES_OF_REAL_IMAGES = ("reconstructions", "uncertainty", "interpolation", "copies")
# Pictures results/figures/DATASET-NAME.png are put together from strips of the pictures of runs with seed 0. A strip
# is (variant, picture, top, bottom): the band between these fractions of the picture's height, which is measured
# without the titles of its columns, if it has some. A strip with a top of 0 shows these titles, too. TITLES says how
# many pixels high they are.
SHEETS = {
    # samples.png has six rows: VAE, refined, VAE, refined, VAE, refined (without an x_hat, three rows). 0 to 1/3 is the
    # first pair (or row), and 1/6 to 1/3 the refined row of the first pair.
    "sheet": [(variant, "samples", 1 / 6 if variant in SAME_X_HAT else 0, 1 / 3) for variant in MAIN_VARIANTS],
    # The rows of these pictures are: real images, the VAE's, refined ones. The first two are the same for all variants
    # of stage 3, so only the first strip shows them.
    "conditionings": [(CONDITIONINGS[0], "uncertainty", 0, 1)] + [
        (variant, "uncertainty", 2 / 3, 1) for variant in CONDITIONINGS[1:]],
    # The real images are the same for all variants.
    "reconstructions": [("stage1-form1", "reconstructions", 0, 1), ("stage2-anneal", "reconstructions", 1 / 3, 1)],
    # The last two of the eight rows are x_hat with the strongest noise, and its refined image. `form1` and `augmented`
    # have the same x_hat.
    "noise": [("stage1-form1", "robustness", 6 / 8, 1), ("stage1-augmented", "robustness", 7 / 8, 1),
              ("stage2-anneal", "robustness", 6 / 8, 1)],
    # Again, `augmented` refines the images of `form1`.
    "twice": [(f"stage1-form1{TWICE}", "samples", 0, 1 / 3), (f"stage1-augmented{TWICE}", "samples", 1 / 6, 1 / 3),
              (f"stage2-anneal{TWICE}", "samples", 0, 1 / 3)]}
TITLES = {"uncertainty": 16}

# What the variants are. (`s` says how large the VAE's error is expected to be.) The name of a run with --set KEY=VALUE
# ends in -KEY=VALUE: it is the same variant, except for this setting. A name with w0.003 is that of a run with
# --diffusion-weight 0.003.
VARIANTS = {
    "stage1-vae": "the VAE of `form1`: its coarse image `x_hat`, before refinement",
    "stage1-uncond": "a diffusion model of the same size, without a VAE, trained for as many steps as the refiner",
    "stage1-form1": "the baseline: `x_hat`, refined by a diffusion model; codes come from a fitted Gaussian mixture",
    "stage1-form2": "`form1`, but in the other formulation of DiffuseVAE",
    "stage1-guided": "`form1`; each prediction is moved away from that of a worse refiner, which was trained for a "
                     "tenth of the steps",
    "stage1-augmented": "`form1`, but its refiner was trained with noise on `x_hat`",
    "stage2-anneal": "VAE and refiner trained together; the weight of the refiner's loss grows meanwhile",
    "stage2-sum": "`stage2-anneal`, but the weight of the refiner's loss is constant",
    "stage2-kendall": "VAE and refiner trained together; the weights of both losses are learned",
    "stage2-bound": "VAE and refiner trained together by the exact variational bound",
    "stage2-bound-grad-none": "`stage2-bound`, but the refiner's part of the bound does not reach the VAE",
    "stage2-anneal-grad-none": "`stage2-anneal`, but the refiner's loss does not reach the VAE",
    "stage2-anneal-grad-decoder": "`stage2-anneal`, but of the VAE the refiner's loss reaches only the decoder",
    "stage2-anneal-from-vae": "`stage2-anneal`, but it begins with the finished VAE of stage 1",
    "stage3-vae-flow": "a VAE trained together with a flow, which is the prior over its codes",
    "stage3-flow-fixed": "`form1`, but its codes come from a flow that was trained together with the VAE",
    "stage3-flow-fade": "`fixed`, but the refiner sees an `x_hat` that is faded to grey if the VAE is unsure of it",
    "stage3-flow-fade-variance": "`fade`, but `s` is the variance that the encoder gives when it is shown `x_hat`",
    "stage3-flow-fade-posterior": "`fade`, but in training `s` is the variance of `q(z|x)`; in sampling it is the "
                                  "variance that the encoder gives when it is shown `x_hat`",
    "stage3-flow-film": "`fixed`, but the refiner also sees `s`: how unsure the VAE is of each image",
    "stage3-flow-film-variance": "`film`, but `s` is the variance that the encoder gives when it is shown `x_hat`",
    "stage3-flow-film-posterior": "`film`, but in training `s` is the variance of `q(z|x)`; in sampling it is the "
                                  "variance that the encoder gives when it is shown `x_hat`",
    "stage3-flow-coupling": "`fixed`, but the refiner sees what an invertible network makes of `x_hat` and `s`",
    "bonus-latent": "diffusion in the latent space of an autoencoder"}

# The numbers of a run. Before the colon is the name that tables use. Behind it is the number's place in the metrics:
# "tables/ceiling/fd" is metrics["tables"]["ceiling"]["fd"]. `load_all` removes the name of the feature network from
# the names that it reads (`fd_local` and `fid` become `fd`), and adds three entries and the minutes of training:
#   headline   the scores of the run's samples, from its own prior, sampler and number of steps
#   steps      scores of samples with other samplers and steps, by their names: "dpm 6" is DPM-Solver++ with 6 steps
#   priors     scores of samples whose codes come from other priors, by the prior's name
# They are made from the entries of metrics["rows"]. The first one is the headline, for instance (some scores left out):
#   {"prior": "gmm", "sampler": "dpm", "steps": 10, "nfe": 10, "n_generated": 1000,
#    "seconds_per_image": 0.0141,
#    "fd_local": {"value": 1.21, "low": 1.02, "high": 1.40},
#    "precision_local": {"value": 0.875, "low": null, "high": null}}
# Only the headline (and, of a VAE alone, every row) rests on all images. Other rows, and probes (measurements on the
# side, such as the one with noise), rest on fewer.
NUMBERS = {
    "fd": "headline/fd",  # Frechet distance to the training images; lower is better
    # The fd of held-out real images: the best to be hoped for. There are as many as were generated or, if there are not
    # so many (800 of our faces), all of them.
    "floor": "headline/floor",
    "fd before": "tables/before_refinement/fd",  # of the VAE's images of the same codes, before they are refined
    "is": "headline/is",  # Inception Score, of the classes that the feature network knows; higher is better
    "kid": "headline/kid",  # Kernel Inception Distance, in the same features; lower is better
    "precision": "headline/precision",  # share of samples that look like real images
    "recall": "headline/recall",  # share of real images that samples look like
    "diversity": "headline/diversity",  # mean feature distance of two samples, over that of two real images
    "hf_energy": "headline/hf_energy",  # fine detail relative to real images; 1 is as sharp as real
    "ms": "headline/ms_per_image",  # the time of sampling one image, in milliseconds
    "ms, 4 steps": "steps/dpm 4/ms_per_image",
    "fd, 2 steps": "steps/dpm 2/fd",
    "fd, 4 steps": "steps/dpm 4/fd",
    "fd, 6 steps": "steps/dpm 6/fd",
    "fd, 10 steps": "steps/dpm 10/fd",
    "fd, 25 steps": "steps/dpm 25/fd",
    "fd, ddim 25": "steps/ddim 25/fd",  # 25 steps of DDIM; all others are of DPM-Solver++
    "hf_energy, 6 steps": "steps/dpm 6/hf_energy",
    "hf_energy, ddim 6": "steps/ddim 6/hf_energy",
    "fd, N(0, I)": "priors/gaussian/fd",  # with codes from N(0, I)
    "fd, mixture": "priors/gmm/fd",  # with codes from the Gaussian mixture that is fitted after training
    "fd, flow": "priors/flow/fd",  # with codes from the flow
    "train minutes": "run/train_minutes",  # training of all networks that the run needs, and fitting priors
    # An upper bound on -log2 p(image), per pixel value. Compare equal seeds: they share most of the error.
    "bits/dim": "tables/bits_per_dim/bound",
    "kl_nats": "tables/reconstruction/kl_nats",  # the VAE's KL: an upper bound of the information in z
    "psnr, dB": "tables/reconstruction/psnr_db",  # of x_hat, against the image that it reconstructs; higher is better
    "weight": "tables/training/weight",  # lambda at the end of joint training; of `kendall`: exp(a - b)
    "posterior variance": "tables/latent/posterior_variance",  # mean variance of q(z|x); that of the prior is 1
    # The mean of the three fds with noise of sd 0.1, 0.2 and 0.4 on x_hat (of latent diffusion: on its latent).
    "noise fd": "tables/robustness/mean",
    "noise rise": "tables/robustness/rise",  # by how much that mean is above the fd without noise
    "fd, no noise": "tables/robustness/scores/clean/fd",  # of as many images as those with noise
    "fd, noise 0.1": "tables/robustness/scores/noise 0.1/fd",
    "fd, noise 0.2": "tables/robustness/scores/noise 0.2/fd",
    "fd, noise 0.4": "tables/robustness/scores/noise 0.4/fd",
    # The next five are measured by stage2_joint.py, which also adds them to the runs of stage 1.
    "fd of real codes": "tables/latent_space/posterior/refined",  # with codes of held-out images in place of a prior's
    # The length of a path of images from one held-out image to another, in features, over the distance of its two ends;
    # 1 is a straight line.
    "path length": "tables/latent_space/slerp/refined/path_over_distance",
    "path length, VAE": "tables/latent_space/slerp/vae/path_over_distance",  # of the VAE's images
    # What a linear regression reads from the code of a held-out image. The first is the share of images whose class it
    # finds. The others are the R^2 for the bands of a shape (none, broad or fine) and for their direction: 1 is
    # perfect, and 0 is as good as the mean of all images.
    "probe, class": "tables/latent_space/probe_class_accuracy",
    "probe, bands": "tables/latent_space/probe_r2/detail",
    "probe, direction": "tables/latent_space/probe_r2/band direction",
    "log p, N(0, I)": "tables/prior_log_density/gaussian",  # of codes of held-out images, in nats
    "log p, mixture": "tables/prior_log_density/gmm",
    "log p, flow": "tables/prior_log_density/flow",
    # Does one prior give a high density to the codes that the other one draws? density_of_samples/JUDGE/SOURCE is the
    # mean log-density that the prior JUDGE gives to codes drawn by the prior SOURCE.
    "flow's log p of mixture samples": "tables/density_of_samples/flow/gmm",
    "mixture's log p of flow samples": "tables/density_of_samples/gmm/flow",
    "fd, 30 components": "tables/components/30/fd",  # with codes from a mixture of 30 Gaussians
    "fd, 300 components": "tables/components/300/fd",
    "fd, 3000 components": "tables/components/3000/fd",
    "fd, 6000 components": "tables/components/6000/fd",
    # The rank correlation, over held-out images, of the VAE's error with three kinds of s: the error that a regression
    # predicts; the mean log-variance that the encoder gives when it is shown x_hat; and when it is shown the image.
    "rank, regressed": "tables/uncertainty/regressed/correlation",
    "rank, variance": "tables/uncertainty/variance/correlation",
    "rank, posterior": "tables/uncertainty/posterior/correlation",
    # The fd of reconstructed images to their originals, for the third of the images with the lowest s (sure), for the
    # middle third, and for the third with the highest (unsure): of the VAE's images, and of the refined ones.
    "sure, VAE": "tables/adaptivity/terciles/sure/vae/fd_to_originals",
    "middle, VAE": "tables/adaptivity/terciles/middle/vae/fd_to_originals",
    "unsure, VAE": "tables/adaptivity/terciles/unsure/vae/fd_to_originals",
    "sure, refined": "tables/adaptivity/terciles/sure/refined/fd_to_originals",
    "middle, refined": "tables/adaptivity/terciles/middle/refined/fd_to_originals",
    "unsure, refined": "tables/adaptivity/terciles/unsure/refined/fd_to_originals",
    # The same for all images, refined with their own s; and with the s of another image.
    "reconstruction fd": "tables/adaptivity/controls/true/fd_to_originals",
    "reconstruction fd, other s": "tables/adaptivity/controls/shuffled/fd_to_originals",
    # The fd of samples with two sampling steps for every image (few, so that one step more or less shows in fd); with
    # one step where s is in its lowest third, two in the middle and three in the highest; the same, by the s of another
    # image; and with three steps for every image.
    "steps evenly": "tables/adaptivity/adaptive_refinement/flow/even/fd",
    "steps by s": "tables/adaptivity/adaptive_refinement/flow/adaptive_steps/fd",
    "steps by other s": "tables/adaptivity/adaptive_refinement/flow/shuffled_steps/fd",
    "three steps": "tables/adaptivity/adaptive_refinement/flow/three/fd",
    # The fd of samples if all of them are refined; if only the third with the highest s is; and if a third is, chosen
    # by the s of other images. Images that are not refined stay x_hat.
    "all refined": "tables/adaptivity/adaptive_refinement/flow/all/fd",
    "unsure third": "tables/adaptivity/adaptive_refinement/flow/unsure_third/fd",
    "other third": "tables/adaptivity/adaptive_refinement/flow/shuffled_third/fd",
    # The last seven again. There the codes come from the flow, here from the mixture.
    "steps evenly, mixture": "tables/adaptivity/adaptive_refinement/gmm/even/fd",
    "steps by s, mixture": "tables/adaptivity/adaptive_refinement/gmm/adaptive_steps/fd",
    "steps by other s, mixture": "tables/adaptivity/adaptive_refinement/gmm/shuffled_steps/fd",
    "three steps, mixture": "tables/adaptivity/adaptive_refinement/gmm/three/fd",
    "all refined, mixture": "tables/adaptivity/adaptive_refinement/gmm/all/fd",
    "unsure third, mixture": "tables/adaptivity/adaptive_refinement/gmm/unsure_third/fd",
    "other third, mixture": "tables/adaptivity/adaptive_refinement/gmm/shuffled_third/fd",
    # The seconds of refining one image with a run's U-Net, with its conditioning on s and without it. The two were
    # timed in turn, so that other work on the machine slowed both.
    "seconds with s": "tables/adaptivity/cost/this/seconds_per_image",
    "seconds without s": "tables/adaptivity/cost/fixed/seconds_per_image",
    # Each code is refined three times, from different noise. The spread is the mean distance, in features, of these
    # refinements to their mean, for the third of the codes with the highest s.
    "spread, unsure": "tables/adaptivity/terciles/unsure/spread",
    # The mean distance, in features, of generated images and of held-out ones to the nearest training image. Let r be
    # the 1% quantile of the held-out images' distances. `closer` is the share of the generated images whose distance is
    # at most r. A share far above 0.01 would speak for copies.
    "nearest, samples": "tables/copies/features/generated",
    "nearest, held out": "tables/copies/features/held_out",
    "closer": "tables/copies/features/closer",
    "closer, pixels": "tables/copies/pixels/closer",
    "ceiling": "tables/ceiling/fd",  # of the autoencoder's reconstructions: the best that latent diffusion could reach
    # How much less latent diffusion costs than diffusion of pixels, in percent of the latter. Images are sampled in
    # batches or, where it says "batch 1", one by one. The two were timed in turn.
    "GFLOPs saved, %": "tables/savings/saved_percent/gflops_per_image",
    "seconds saved, %": "tables/savings/saved_percent/seconds_per_image",
    "seconds saved, %, batch 1": "tables/savings/saved_percent/seconds_per_image_batch_1",
    "memory saved, %": "tables/savings/saved_percent/peak_memory_mb",
    "memory, MB": "tables/savings/latent/peak_memory_mb",
    "memory, MB, pixels": "tables/savings/pixel/peak_memory_mb",
}

# The tables: after the name of a table come patterns for its lines, and the names of its columns. A variant has a line
# if its name matches one of the patterns, in which * stands for anything. A run with a changed setting, whose name has
# a =, fits only a pattern with a =. Two examples: "stage2-*" are all variants of stage 2 without a changed setting;
# "stage2-*=*" are those with one. A column may also be "NAME against VARIANT": by how many percent the number differs
# from that of VARIANT with the same seeds. Or it is "NAME / OTHER NAME": by how many percent one number of a run
# differs from another one. REPORT.md shows some of the tables, TABLES.md all of them.
TABLES = {
    "baseline": ("stage1-vae stage1-vae-vae_steps=1650 stage1-vae-vae_steps=12000 stage1-uncond-unet_steps=* "
                 "stage1-form1 stage1-guided",
                 "fd; fd against stage1-form1; fd, 4 steps against stage1-form1; is; hf_energy; ms"),
    "losses": ("stage1-form1 stage2-sum stage2-anneal stage2-anneal-w0.003 stage2-kendall",
               "fd before; fd; fd against stage1-form1; is; kl_nats"),
    "twice the steps": (f"*{TWICE} *-vae_steps=4600-unet_steps=4600 stage1-vae-vae_steps=3300",
                        "fd before; fd; is; hf_energy; precision; noise fd"),
    "conditioning": (" ".join((*CONDITIONINGS, "stage3-flow-fade-posterior")),
                     "fd; fd against stage3-flow-fixed; is; spread, unsure; noise fd; "
                     "seconds with s / seconds without s"),
    "robustness": ("stage1-form1 stage1-augmented stage2-anneal stage2-anneal-w0.003 "
                   "stage2-anneal-grad-none stage2-anneal-from-vae",
                   "noise fd; noise fd against stage1-form1; fd, noise 0.4 against stage1-form1; "
                   "fd against stage1-form1"),
    "savings": ("bonus-latent",
                "seconds saved, %; seconds saved, %, batch 1; GFLOPs saved, %; memory saved, %; "
                "fd against stage1-form1; diversity"),
    "all variants": ("*", "fd; kid; is; precision; recall; diversity; hf_energy; ms; train minutes"),
    "steps": ("stage1-uncond stage1-uncond-*=* stage1-form1 stage1-guided stage2-anneal stage3-flow-fixed bonus-latent",
              "fd, 2 steps; fd, 4 steps; fd, 6 steps; fd, 10 steps; fd, 25 steps; fd, ddim 25; hf_energy, 6 steps; "
              "hf_energy, ddim 6; ms, 4 steps; ms"),
    "recipe": ("stage1-vae stage1-form1 stage1-*=* stage1-guided",
               "fd before; fd; hf_energy; precision; recall; kl_nats; psnr, dB; train minutes"),
    "codes": ("stage1-form1 stage2-anneal stage3-vae-flow",
              "posterior variance; path length, VAE; path length; probe, class; probe, bands; probe, direction"),
    "joint training": ("stage1-form1 stage1-augmented stage2-* stage2-*=*",
                       "fd before; fd; precision; hf_energy; kl_nats; psnr, dB; weight; bits/dim; noise fd; "
                       "noise rise; fd of real codes"),
    "priors": ("stage1-vae stage1-form1 stage1-guided stage1-augmented stage2-anneal stage2-kendall "
               "stage2-anneal-grad-none stage3-vae-flow stage3-flow-fixed",
               "fd, N(0, I); fd, mixture; fd, flow; fd of real codes"),
    "priors, more": ("stage3-vae-*", "log p, N(0, I); log p, mixture; log p, flow; "
                     "flow's log p of mixture samples; mixture's log p of flow samples"),
    "components": ("stage1-form1 stage2-anneal stage3-vae-*",
                   "fd, 30 components; fd, 300 components; fd, 3000 components; fd, 6000 components"),
    # Ranks depend on the VAE alone, which all conditionings with the same seed share if they were trained on one
    # processor. So one of them stands for all.
    "uncertainty": ("stage3-flow-fixed", "rank, regressed; rank, variance; rank, posterior"),
    "thirds by s": (" ".join(CONDITIONINGS), "sure, VAE; middle, VAE; unsure, VAE; "
                    "sure, refined; middle, refined; unsure, refined"),
    "conditioning, more": ("stage3-flow-*",
                           "fd against stage3-flow-fixed; fd, mixture against stage3-flow-fixed; reconstruction fd; "
                           "reconstruction fd, other s; seconds with s / seconds without s"),
    "steps by s": ("stage3-flow-*",
                   "steps evenly; steps by s; steps by other s; three steps; "
                   "steps evenly, mixture; steps by s, mixture; steps by other s, mixture; three steps, mixture"),
    "refining a third": ("stage3-flow-fixed stage3-flow-film",
                         "all refined; unsure third; other third; all refined, mixture; unsure third, mixture; "
                         "other third, mixture"),
    "noise": ("stage1-vae stage1-form1 stage1-guided stage1-augmented stage2-* stage3-flow-* bonus-latent",
              "fd, no noise; fd, noise 0.1; fd, noise 0.2; fd, noise 0.4; noise fd; noise rise"),
    "copies": ("stage1-form1 stage1-guided", "nearest, samples; nearest, held out; closer; closer, pixels"),
    "latent diffusion": ("stage1-form1 stage1-uncond bonus-latent",
                         "fd; is; precision; diversity; ceiling; memory, MB; memory, MB, pixels")}
# {table: caption}: below this table, TABLES.md shows the chart of the same name. (REPORT.md shows the other charts.)
CAPTIONS = {
    "recipe": "What one changed setting does to fd (left) and to fine detail (right), on shapes with seed 0, one run "
              "each. Orange is the unchanged run; black dots are unchanged runs of all seeds. With `start=1000`, "
              "refinement begins with pure noise; with `unet_steps=450`, the refiner has 450 training steps, not 600."}
# The variants whose fd is shown against noise on x_hat.
ROBUSTNESS = ("stage1-vae", "stage1-form1", "stage1-guided", "stage1-augmented", "stage2-anneal", "stage2-kendall",
              "stage2-anneal-grad-none", "stage2-anneal-from-vae", "stage3-flow-fixed", "stage3-flow-film")
# The variants in the chart of fd against the cost of sampling: the main ones without `kendall` and `film`, whose lines
# would hide those of `anneal` and `fixed`. The last one is drawn above the others.
COSTS = ("stage1-uncond", "stage1-guided", "stage2-anneal", "stage3-flow-fixed", "bonus-latent", "stage1-form1")
# The variants that a chart compares by all numbers of SUMMARY, with form1 as the baseline.
COMPARED = ("stage1-vae", "stage1-uncond", "stage1-form1", "stage1-guided", "stage1-augmented", "stage2-anneal",
            "stage2-kendall", "stage2-anneal-grad-none", "stage3-flow-fixed", "stage3-flow-film", "bonus-latent")
SUMMARY = ("fd", "is", "precision", "diversity", "hf_energy", "noise fd")

# A claim: a question, a number of a variant, and the number with which it is compared. Lower is better for every number
# in PRIMARY_CLAIMS and CLAIMS, which a chart shows. PRIMARY_CLAIMS has the four guiding questions. They are tested
# together on each data set, so that chance alone seldom makes any of them significant (see `holm`).
PRIMARY_CLAIMS = [
    ("**Quality**: does joint training help?", ("fd", "stage2-anneal"), ("fd", "stage1-form1")),
    ("**Efficiency**: is sampling slower with adaptive conditioning than without `s`?",
     ("seconds with s", "stage3-flow-film"), ("seconds without s", "stage3-flow-film")),
    ("**Robustness**: does joint training help against noise?",
     ("noise fd", "stage2-anneal"), ("noise fd", "stage1-form1")),
    ("**Latent space**: does joint training smooth it?",
     ("path length", "stage2-anneal"), ("path length", "stage1-form1"))]

# The most important ones of all other claims, by topic. The chart shows them.
CLAIMS = {
    "refinement": [
        ("Does refinement improve the VAE's samples?", ("fd", "stage1-form1"), ("fd", "stage1-vae")),
        ("Does `x_hat` help, against a diffusion model without a VAE?",
         ("fd", "stage1-form1"), ("fd", "stage1-uncond")),
        ("Does guidance by a worse refiner help?", ("fd", "stage1-guided"), ("fd", "stage1-form1"))],
    "joint training": [
        ("Does joint training with learned weights help?", ("fd", "stage2-kendall"), ("fd", "stage1-form1")),
        ("Does joint training without the gradient help?",
         ("fd", "stage2-anneal-grad-none"), ("fd", "stage1-form1")),
        ("Does the gradient help?", ("fd", "stage2-anneal"), ("fd", "stage2-anneal-grad-none"))],
    "priors": [
        ("Is a flow better than N(0, I), each with its own VAE?",
         ("fd, flow", "stage3-flow-fixed"), ("fd, N(0, I)", "stage1-form1")),
        ("Is a flow better than a mixture?", ("fd, flow", "stage3-flow-fixed"), ("fd, mixture", "stage3-flow-fixed"))],
    "conditioning": [
        ("Does adaptive conditioning (`film`) help?", ("fd", "stage3-flow-film"), ("fd", "stage3-flow-fixed")),
        ("Are steps by `s` better than by the `s` of other images?",
         ("steps by s", "stage3-flow-fixed"), ("steps by other s", "stage3-flow-fixed"))],
    "noise": [
        ("Does training with noise help against it?", ("noise fd", "stage1-augmented"), ("noise fd", "stage1-form1")),
        ("Does training with noise raise fd without noise?", ("fd", "stage1-augmented"), ("fd", "stage1-form1")),
        ("Does joint training without the gradient help against noise?",
         ("noise fd", "stage2-anneal-grad-none"), ("noise fd", "stage1-form1")),
        ("Does `film` help against noise?", ("noise fd", "stage3-flow-film"), ("noise fd", "stage3-flow-fixed"))],
    "latent diffusion": [
        ("Does latent diffusion raise fd?", ("fd", "bonus-latent"), ("fd", "stage1-form1"))]}
# All others, by the same topics.
FURTHER_CLAIMS = {
    "refinement": [
        ("Does `x_hat` help, against a model without a VAE that is trained for as many minutes in all?",
         ("fd", "stage1-form1"), ("fd", "stage1-uncond-unet_steps=1600")),
        ("Is a VAE alone that is trained for as many minutes better than VAE and refiner?",
         ("fd", "stage1-vae-vae_steps=1650"), ("fd", "stage1-form1")),
        ("Does a longer training of the VAE help?",
         ("fd", "stage1-form1-vae_steps=1650"), ("fd", "stage1-form1")),
        ("Does refinement improve the samples of this VAE?",
         ("fd", "stage1-form1-vae_steps=1650"), ("fd before", "stage1-form1-vae_steps=1650")),
        ("With twice the steps, does refinement improve the VAE's samples?",
         ("fd", f"stage1-form1{TWICE}"), ("fd before", f"stage1-form1{TWICE}")),
        ("With twice the steps, does refinement help, if its refiner is trained with noise?",
         ("fd", f"stage1-augmented{TWICE}"), ("fd before", f"stage1-augmented{TWICE}")),
        ("What does refinement do to the Inception Score?", ("is", "stage1-form1"), ("is", "stage1-vae")),
        ("What does refinement do to precision?", ("precision", "stage1-form1"), ("precision", "stage1-vae")),
        ("What does refinement do to recall?", ("recall", "stage1-form1"), ("recall", "stage1-vae")),
        ("Does it help to begin from `x_hat` and noise, not from pure noise?",
         ("fd", "stage1-form1"), ("fd", "stage1-form1-start=1000")),
        ("Does it help to divide the loss by its mean at each noise level?",
         ("fd", "stage1-form1"), ("fd", "stage1-form1-even_levels=False")),
        ("Is Formulation 2 better than 1?", ("fd", "stage1-form2"), ("fd", "stage1-form1"))],
    "joint training": [
        ("Does a small weight help?", ("fd", "stage2-anneal-w0.003"), ("fd", "stage1-form1")),
        ("Is joint training better than training stage 1 with noise?",
         ("fd", "stage2-anneal"), ("fd", "stage1-augmented")),
        ("Does a fixed weight (`sum`) help?", ("fd", "stage2-sum"), ("fd", "stage1-form1")),
        ("With twice the steps, does joint training help?",
         ("fd", f"stage2-anneal{TWICE}"), ("fd", f"stage1-form1{TWICE}")),
        ("With twice the steps, does joint training help, against training with noise?",
         ("fd", f"stage2-anneal{TWICE}"), ("fd", f"stage1-augmented{TWICE}")),
        ("Does it help to begin with a trained VAE (`from-vae`)?",
         ("fd", "stage2-anneal-from-vae"), ("fd", "stage1-form1")),
        ("Does `from-vae` help, against stage 1 with a VAE that is trained as long?",
         ("fd", "stage2-anneal-from-vae"), ("fd", "stage1-form1-vae_steps=1650")),
        ("What does joint training do to fd before refinement?",
         ("fd before", "stage2-anneal"), ("fd before", "stage1-form1")),
        ("What does joint training do to the Inception Score?", ("is", "stage2-anneal"), ("is", "stage1-form1")),
        ("What does joint training do to detail?", ("hf_energy", "stage2-anneal"), ("hf_energy", "stage1-form1")),
        ("Does joint training help with codes from N(0, I)?",
         ("fd, N(0, I)", "stage2-anneal"), ("fd, N(0, I)", "stage1-form1")),
        ("Does joint training help with the codes of real images?",
         ("fd of real codes", "stage2-anneal"), ("fd of real codes", "stage1-form1")),
        ("With the codes of real images, does the gradient help?",
         ("fd of real codes", "stage2-anneal"), ("fd of real codes", "stage2-anneal-grad-none")),
        ("What does joint training do to precision?", ("precision", "stage2-anneal"), ("precision", "stage1-form1")),
        ("Does joint training lower the bound on the code length?",
         ("bits/dim", "stage2-anneal"), ("bits/dim", "stage1-form1")),
        ("Does joint training without the gradient lower this bound?",
         ("bits/dim", "stage2-anneal-grad-none"), ("bits/dim", "stage1-form1")),
        ("What does joint training do to diversity?", ("diversity", "stage2-anneal"), ("diversity", "stage1-form1")),
        ("Do learned weights help, against joint training without the gradient?",
         ("fd", "stage2-kendall"), ("fd", "stage2-anneal-grad-none")),
        ("Does a small weight help, against a larger one?", ("fd", "stage2-anneal-w0.003"), ("fd", "stage2-anneal")),
        ("Does it help not to clip the VAE's gradients?", ("fd", "stage2-anneal-vae_clip=0"), ("fd", "stage2-anneal"))],
    "priors": [
        ("Is a flow, refined in four steps, better than N(0, I), refined in ten?",
         ("fd, 4 steps", "stage3-flow-fixed"), ("fd, N(0, I)", "stage1-form1")),
        ("Is a flow better than N(0, I) before refinement?",
         ("fd, flow", "stage3-vae-flow"), ("fd, N(0, I)", "stage1-vae")),
        ("Is a flow better than a mixture before refinement?",
         ("fd, flow", "stage3-vae-flow"), ("fd, mixture", "stage3-vae-flow")),
        ("Is a flow better than 30 components that share a covariance, before refinement?",
         ("fd, flow", "stage3-vae-flow"), ("fd, 30 components", "stage3-vae-flow"))],
    "conditioning": [
        ("Are steps by `s` better than two for all?",
         ("steps by s", "stage3-flow-fixed"), ("steps evenly", "stage3-flow-fixed")),
        ("Are steps by the `s` of other images better than two for all?",
         ("steps by other s", "stage3-flow-fixed"), ("steps evenly", "stage3-flow-fixed")),
        ("Are steps by `s` better than by the `s` of other images, with codes of the mixture?",
         ("steps by s, mixture", "stage3-flow-fixed"), ("steps by other s, mixture", "stage3-flow-fixed")),
        ("Are steps by `s`, two on average, worse than ten for all, with codes of the mixture?",
         ("steps by s, mixture", "stage3-flow-fixed"), ("all refined, mixture", "stage3-flow-fixed")),
        ("Are they better than two for all, with codes of the mixture?",
         ("steps by s, mixture", "stage3-flow-fixed"), ("steps evenly, mixture", "stage3-flow-fixed")),
        ("Is it worse to refine only the unsure third than all images?",
         ("unsure third", "stage3-flow-fixed"), ("all refined", "stage3-flow-fixed")),
        ("Is it worse to refine only the unsure third than all images, with codes of the mixture?",
         ("unsure third, mixture", "stage3-flow-fixed"), ("all refined, mixture", "stage3-flow-fixed")),
        ("Is it better to refine the unsure third than another third, with codes of the mixture?",
         ("unsure third, mixture", "stage3-flow-fixed"), ("other third, mixture", "stage3-flow-fixed")),
        ("Is it better to refine only the unsure third than to take two steps for all, with codes of the mixture?",
         ("unsure third, mixture", "stage3-flow-fixed"), ("steps evenly, mixture", "stage3-flow-fixed")),
        ("Does `film` reconstruct better with the image's own `s`?",
         ("reconstruction fd", "stage3-flow-film"), ("reconstruction fd, other s", "stage3-flow-film")),
        ("Does `coupling` reconstruct better with the image's own `s`?",
         ("reconstruction fd", "stage3-flow-coupling"), ("reconstruction fd, other s", "stage3-flow-coupling")),
        ("Does `film` reconstruct better than `fixed`?",
         ("reconstruction fd", "stage3-flow-film"), ("reconstruction fd", "stage3-flow-fixed")),
        ("Do the refined images of a code differ more with `film`?",
         ("spread, unsure", "stage3-flow-film"), ("spread, unsure", "stage3-flow-fixed"))],
    "noise": [
        ("Does the gradient help against noise?",
         ("noise fd", "stage2-anneal"), ("noise fd", "stage2-anneal-grad-none")),
        ("Does the gradient help against the strongest noise?",
         ("fd, noise 0.4", "stage2-anneal"), ("fd, noise 0.4", "stage2-anneal-grad-none")),
        ("Is joint training better against noise than training stage 1 with noise?",
         ("noise fd", "stage2-anneal"), ("noise fd", "stage1-augmented")),
        ("Does joint training with a small weight help against noise?",
         ("noise fd", "stage2-anneal-w0.003"), ("noise fd", "stage1-form1")),
        ("With twice the steps, does training with noise raise fd without noise?",
         ("fd", f"stage1-augmented{TWICE}"), ("fd", f"stage1-form1{TWICE}")),
        ("Does joint training from a trained VAE help against noise?",
         ("noise fd", "stage2-anneal-from-vae"), ("noise fd", "stage1-form1"))],
    "latent diffusion": [
        ("Does latent diffusion raise fd, against pixel diffusion without a VAE?",
         ("fd", "bonus-latent"), ("fd", "stage1-uncond")),
        ("What does latent diffusion do to the Inception Score?", ("is", "bonus-latent"), ("is", "stage1-form1")),
        ("What does latent diffusion do to diversity?", ("diversity", "bonus-latent"), ("diversity", "stage1-form1"))]}

# The colour and the marker of a variant, the same in all charts whose colours stand for variants. Colour-blind readers
# can tell the colours apart: they are those of Okabe and Ito (2008), "Color Universal Design", with grey, a dark brown,
# and the wine red, the sand, the indigo and the teal of Tol (2021), "Colour Schemes".
LOOKS = {
    "stage1-vae": ("#999999", "s"), "stage1-uncond": ("#000000", "x"), "stage1-form1": ("#0072B2", "o"),
    "stage1-guided": ("#56B4E9", "D"), "stage1-augmented": ("#CC79A7", "v"), "stage2-anneal": ("#D55E00", "o"),
    "stage2-kendall": ("#332288", "X"), "stage2-anneal-from-vae": ("#661100", "P"),
    "stage2-anneal-grad-none": ("#E69F00", "^"),
    "stage3-flow-fixed": ("#009E73", "s"), "stage3-flow-film": ("#882255", "D"),
    "stage3-flow-fade": ("#F0E442", "v"), "stage3-flow-coupling": ("#44AA99", "^"), "bonus-latent": ("#DDCC77", "*")}
# Colour and marker of a data set, and of a prior, in charts that show several of them on the same axes.
DATASET_LOOKS = {"shapes": ("#0072B2", "o"), "cifar10": ("#D55E00", "s"), "celeba64": ("#009E73", "D")}
PRIOR_LOOKS = {"N(0, I)": ("#999999", "s"), "mixture": ("#0072B2", "o"), "flow": ("#D55E00", "D")}
# This stands below most tables. It says which table has the settings that all numbers of a data set share.
SETTINGS = "Settings: table **data** (appendix of REPORT.md)."


# --- Reading results -------------------------------------------------------------------------------------------------

def load_metrics(path):
    """The metrics in a file. Exits, naming the file, if they cannot be read."""
    if not path.is_file():
        common.fail(f"{path}: no such file; give the folder of a finished run")
    metrics = fid.read_metrics(path)
    if metrics is None:
        common.fail(f"{path}: damaged; restore it, or run again with --resume")
    return metrics


def plain_names(part):
    """The same metrics without the name of the feature network in the names of scores: fd_local and fid become fd."""
    if isinstance(part, list):
        return [plain_names(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {"fd" if key == "fid" else key.removesuffix("_local"): plain_names(value) for key, value in part.items()}


def with_named_rows(metrics):
    """The same metrics with the rows of scores by name, as `headline`, `steps` and `priors`, with their milliseconds,
    and with the minutes of training (see NUMBERS)."""
    rows = [row | {"ms_per_image": 1000 * row["seconds_per_image"]} for row in metrics["rows"]]
    headline, *others = rows
    steps, priors = {}, {}
    for row in others:  # if two rows have the same name, the first one counts
        if row["prior"] == headline["prior"]:
            steps.setdefault(f"{row['sampler']} {row['steps']}", row)
        else:
            priors.setdefault(row["prior"], row)
    # Priors must be compared on equally many images, and the rows of other priors have fewer than the headline. So the
    # headline's prior is represented by the row of the grid with its sampler and steps. Without one it is left out,
    # except for a VAE alone, whose rows all have equally many images.
    same_steps = f"{headline['sampler']} {headline['steps']}"
    if same_steps in steps:
        priors[headline["prior"]] = steps[same_steps]
    elif headline["sampler"] == "none":
        priors[headline["prior"]] = headline
    run = metrics["run"] | {"train_minutes": metrics["run"]["train_seconds"] / 60}
    return metrics | {"run": run, "rows": rows, "headline": headline, "steps": steps, "priors": priors}


def at_place(part, place):
    """What stands at a place in nested dictionaries, or None if they do not have this place."""
    for key in place.split("/"):
        part = part.get(key) if isinstance(part, dict) else None
    return part


def place_of(name):
    """The place of a number in metrics. A name that is not in NUMBERS is itself a place."""
    return NUMBERS.get(name, name)


def number(metrics, name):
    """The number in metrics that has this name, or that stands at this place. It is a plain one, or a score {"value",
    "low", "high"}, or None if the run does not have it."""
    return at_place(metrics, place_of(name))


def images_behind(metrics, name):
    """How many images a number rests on, or None if it is not said. The dictionaries around the number say so, under
    `n_generated` or `images`. The innermost one counts."""
    part, images = metrics, None
    for key in place_of(name).split("/"):
        if isinstance(part, dict):
            images = part.get("images", images)
            images = part.get("n_generated", images)
            part = part.get(key)
    is_plain_number = not isinstance(part, dict)
    if is_plain_number and "/latent_space/" in place_of(name):
        return None  # path lengths and probes rest on other images; `images` says on how many the scores there rest
    return images


def shared_settings(metrics):
    """The settings that all results of a data set must share, or they could not be compared."""
    run = metrics["run"]
    settings = {
        "crop": run["crop"],  # how images were cut to squares
        "data_note": run["data_note"],  # where the images are from, such as JPEG copies
        "n_real": run["n_real"],  # the number of real images with which generated ones are compared
        "budget": run["budget"],
    }
    # Settings of the evaluation: the feature network, the number of images behind the headline, and others. Variants
    # may have different priors. The list of further rows (`grid`) changes no score of the headline. The "batch" of
    # the evaluation is left out, since a setting of the training, below, has the same name.
    for key, value in run["eval"].items():
        if key not in ("prior", "grid", "batch"):
            settings[key] = value
    # Settings of the training that all stages have, except those that this run changes on purpose by --set KEY=VALUE,
    # which its name tells.
    changed = re.findall(r"-(\w+)=", run["variant"])
    for key in common.TRAIN:
        if key not in changed:
            settings[key] = run["train"][key]
    return settings


def settings_of_variant(metrics):
    """What all seeds of a variant must share: the prior of the headline's samples, the sizes of the networks, and all
    train settings except the seed and the folder of the data."""
    run = metrics["run"]
    train = {key: value for key, value in run["train"].items() if key not in ("seed", "data_dir")}
    return {"prior": run["eval"]["prior"], "parameters": run["parameters"]} | train


def check_comparable(path, metrics, first, advice="remove one of them, or move it away"):
    """Exit if a result cannot be compared with those that were read before it: with all of its data set, or with other
    seeds of its variant. `first`, {(data set or variant, setting): (path, value)}, holds the value that was read first,
    and its file. Settings that are new are added. `advice` ends the message."""
    dataset, variant = metrics["run"]["dataset"], metrics["run"]["variant"]
    groups = {dataset: shared_settings(metrics), f"{dataset} {variant}": settings_of_variant(metrics)}
    for group, settings in groups.items():
        for key, value in settings.items():
            first_path, first_value = first.setdefault((group, key), (path, value))
            if value != first_value:
                common.fail(f"{path} cannot be compared with {first_path}: {key} was {first_value}, is now {value}; "
                            f"{advice}")


def in_order(names, order):
    """The names, sorted by the first text in `order` with which each begins, then by the alphabet."""
    ranked = []
    for name in names:
        rank = next(k for k, start in enumerate(order) if name.startswith(start))
        ranked.append((rank, name))
    return [name for _, name in sorted(ranked)]


def result_files(folder):
    """The JSON files of all runs that were collected into this folder."""
    return [path for dataset in common.DATASETS for path in Path(folder).glob(f"{dataset}/*-s[0-9]*.json")]


def read_result(path):
    """The metrics in a result file, with the names that NUMBERS uses."""
    return with_named_rows(plain_names(load_metrics(path)))


def load_all(paths):
    """{dataset: {variant: {seed: metrics}}} of result files, in the order of tables. Exits if results of a data set
    cannot be compared, if seeds of a variant differ in a setting, or if two files hold the same seed of a variant."""
    found, first, path_of = {}, {}, {}
    for path in sorted(map(Path, paths)):
        metrics = read_result(path)
        check_comparable(path, metrics, first)
        run = metrics["run"]
        key = run["dataset"], run["variant"], run["seed"]
        if key in path_of:
            common.fail(f"{path_of[key]} and {path} both hold seed {run['seed']} of {run['variant']} on "
                        f"{run['dataset']}; remove one of them")
        path_of[key] = path
        found.setdefault(run["dataset"], {}).setdefault(run["variant"], {})[run["seed"]] = metrics
    ordered = {}
    for dataset in in_order(found, DATASET_ORDER):
        results = found[dataset]
        ordered[dataset] = {variant: results[variant] for variant in in_order(results, VARIANT_ORDER)}
    return ordered


# --- Numbers as text -------------------------------------------------------------------------------------------------

def is_of_first_seed(name):
    """Whether a number is a time of which only the first seed counts, because the other seeds may have shared the
    machine with other work. Where two times were taken in turn, all seeds count: other work slowed both."""
    place = place_of(name)
    is_time = "ms_per_image" in place or "seconds" in place or "minutes" in place
    taken_in_turn = "/cost/" in place or "/savings/" in place
    return is_time and not taken_in_turn


def values_by_seed(seeds, name):
    """{seed: value} of a number in {seed: metrics}: of the seeds that have it or, of some times, of the first alone."""
    if is_of_first_seed(name):
        seeds = {seed: seeds[seed] for seed in sorted(seeds)[:1]}
    values = {}
    for seed, metrics in seeds.items():
        value = number(metrics, name)
        if isinstance(value, dict):  # a score with its interval
            value = value["value"]
        if value is not None:
            values[seed] = value
    return values


def mean_and_sd(values):
    """Numbers as text: their mean and, if they differ, their standard deviation."""
    mean = statistics.mean(values)
    sd = statistics.stdev(values) if len(values) > 1 else 0
    if sd <= 1e-9 * abs(mean):  # they differ by rounding alone, or there is only one
        return fid.rounded(mean, 3)
    return f"{fid.rounded(mean, 3)} ± {fid.rounded(sd, 2)}"


def cell(seeds, name):
    """A number in {seed: metrics} as text: of one seed with its interval, of several with their standard deviation. If
    it does not rest on as many images as the headline, their number follows in brackets (but not that of a time, which
    hardly depends on it)."""
    found = values_by_seed(seeds, name)
    if not found:
        return ""
    first = seeds[min(found)]
    first_number = number(first, name)
    if len(found) == 1 and isinstance(first_number, dict):
        text = fid.show(first_number)
    else:
        text = mean_and_sd(list(found.values()))
    images = images_behind(first, name)
    if is_of_first_seed(name) or images in (None, first["headline"]["n_generated"]):
        return text
    return f"{text} ({images:,})"


def cell_of_time(results, variant, name):
    """A time, of the first seed; or "" if it was taken on another processor than that of the baseline, since the two
    cannot be compared."""
    seeds = results[variant]
    baseline = results.get("stage1-form1", seeds)
    if processor(seeds[min(seeds)]) != processor(baseline[min(baseline)]):
        return ""
    return cell(seeds, name)


def cell_of_comparison(results, variant, column):
    """A cell of the column "NAME against VARIANT" or "NAME / OTHER NAME": by how many percent the number NAME of
    `variant` differs from that of VARIANT, or from the number OTHER NAME of `variant` itself. It is taken over the
    seeds that have both (in bold if it is significant), and how many these are follows."""
    if " against " in column:
        name, other_variant = column.split(" against ")
        sides = (name, variant), (name, other_variant)
    else:
        name, other_name = column.split(" / ")
        sides = (name, variant), (other_name, variant)
    if sides[0] == sides[1]:
        return ""
    questions = [(our_side, their_side) for _, our_side, their_side in PRIMARY_CLAIMS]  # pairs of sides
    if sides in questions:  # then this question is tested together with the others
        change = compare_together(results, PRIMARY_CLAIMS)[questions.index(sides)]
    else:
        change = compare_sides(results, *sides)
    if change is None:  # no seed has both
        return ""
    seeds = "1 seed" if change["seeds"] == 1 else f"{change['seeds']} seeds"
    return f"{change_in_percent(change)}, {seeds}"


# --- Comparisons -----------------------------------------------------------------------------------------------------

def compare(ours, theirs):
    """Compare positive numbers of the same seeds. Returns the mean log ratio of `ours` to `theirs`. From three seeds
    on, also Student's 95% interval of it, and the p-value of the hypothesis that it is 0."""
    log_ratios = [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]
    count, mean = len(log_ratios), statistics.mean(log_ratios)
    if count < 3:
        return {"seeds": count, "log_ratio": mean, "low": None, "high": None, "p": None}
    standard_error = max(statistics.stdev(log_ratios), 1e-12) / math.sqrt(count)  # never 0, since it is a divisor
    margin = student.ppf(0.975, count - 1) * standard_error
    p = 2 * student.sf(abs(mean) / standard_error, count - 1)  # two-sided
    return {"seeds": count, "log_ratio": mean, "low": mean - margin, "high": mean + margin, "p": p}


def holm(p_values):
    """Adjust p-values for being tested together (Holm 1979). Of m p-values, the smallest is multiplied by m, the next
    one by m - 1, and so on; but none becomes smaller than the one before, or larger than 1. If those below 5% count as
    significant, the probability that chance alone makes any of the m significant is at most 5%."""
    adjusted = [0.0] * len(p_values)
    highest, left = 0.0, len(p_values)
    for p, i in sorted((p, i) for i, p in enumerate(p_values)):  # from the smallest p-value on
        highest = max(highest, min(1.0, left * p))
        adjusted[i] = highest
        left -= 1
    return adjusted


def percent(log_ratio):
    """A log ratio as a change in percent: log(0.8) becomes -20%. Changes below 10% have one decimal."""
    change = 100 * math.expm1(log_ratio)
    if abs(change) < 9.95:
        return f"{change:+.1f}%"
    return f"{change:+.0f}%"


def is_significant(change):
    """Whether the p-value of a comparison is below 5%: the adjusted one, if there is one."""
    p = change.get("adjusted", change["p"])
    return p is not None and p < 0.05


def change_in_percent(change):
    """A comparison of two sides as text: -20%. It is in bold if it is significant, and a dagger follows if processors
    differ."""
    text = percent(change["log_ratio"])
    if is_significant(change):
        text = f"**{text}**"
    return text + ("†" if change["across_processors"] else "")


def describe_change(change):
    """The same with its interval and its p-value or, of one or two runs, with their number. Of questions that are
    tested together, the p-value is the adjusted one; the interval is never adjusted."""
    text = change_in_percent(change)
    if change["seeds"] == 1:
        return f"{text} (one run)"
    if change["seeds"] == 2:
        return f"{text} (two runs)"
    p = change.get("adjusted", change["p"])
    p = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    return f"{text} ({percent(change['low'])} to {percent(change['high'])}), {p}"


def processor(metrics):
    """The kind of processor on which a run was trained: of "cpu (AMD EPYC, 1 threads)", what stands before the
    threads."""
    return metrics["run"]["device"].rpartition(",")[0]


def compare_sides(results, our_side, their_side):
    """The two sides of a claim, each (name of a number, variant), on a data set, over the seeds that both have: their
    numbers, `ours` and `theirs`, what `compare` says of them, and whether the two runs of any of these seeds were
    trained on different processors. A seed is left out if one of its numbers is 0, as precision may be after a few
    steps: it has no ratio. None if no seed remains."""
    (name, variant), (other_name, other_variant) = our_side, their_side
    our_values = values_by_seed(results.get(variant, {}), name)
    their_values = values_by_seed(results.get(other_variant, {}), other_name)
    shared_seeds = []
    for seed in sorted(our_values.keys() & their_values.keys()):
        if our_values[seed] > 0 and their_values[seed] > 0:
            shared_seeds.append(seed)
    if not shared_seeds:
        return None
    ours = [our_values[seed] for seed in shared_seeds]
    theirs = [their_values[seed] for seed in shared_seeds]
    across_processors = any(processor(results[variant][seed]) != processor(results[other_variant][seed])
                            for seed in shared_seeds)
    return {"ours": ours, "theirs": theirs, "across_processors": across_processors} | compare(ours, theirs)


def describe_sides(claim):
    """What a claim compares, as text. What both sides share, the number or the variant, is named once."""
    _, (name, variant), (other_name, other_variant) = claim
    if name == other_name:
        return f"{name}: {variant} / {other_variant}"
    if variant == other_variant:
        return f"{variant}: {name} / {other_name}"
    return f"{variant} ({name}) / {other_variant} ({other_name})"


def compare_together(results, claims):
    """Compare the sides of each claim on a data set, as `compare_sides` does, and adjust their p-values for being
    tested together."""
    changes = [compare_sides(results, *sides) for _, *sides in claims]
    tested = [change for change in changes if change and change["p"] is not None]
    for change, p in zip(tested, holm([change["p"] for change in tested]), strict=True):
        change["adjusted"] = p
    return changes


def table_claims(everything, claims, adjust=False):
    """A line for each claim. It has a cell for each data set, with the means of both sides and the change. `adjust`:
    whether the claims of a data set are tested together. (Then the means are left out, since the cells are long
    enough.)"""
    rows = [[claim[0], describe_sides(claim)] for claim in claims]
    for results in everything.values():
        if adjust:
            changes = compare_together(results, claims)
        else:
            changes = [compare_sides(results, *sides) for _, *sides in claims]
        for row, change in zip(rows, changes, strict=True):
            if change is None:
                row.append("not measured")
                continue
            means = "" if adjust else f"{mean_and_sd(change['ours'])} / {mean_and_sd(change['theirs'])}: "
            row.append(means + describe_change(change))
    note = "" if adjust else "The means of both sides ± their sd over seeds; then the change. "
    note += ("A change is the geometric mean of the ratios of runs with the same seed, in percent. In brackets stands "
             "its 95% interval over seeds. **Bold**: significant. †: trained on different processors. ")
    if adjust:
        note += ("The p-values of a data set's questions are adjusted together (Holm), so several can be equal. The "
                 "intervals are not adjusted, so one can exclude 0 although p is above 5%.")
    else:
        note += "Exploratory: each question is tested alone, without adjustment for their number."
    return f"{markdown(['question', 'compared', *everything], rows)}\n\n*{note} {SETTINGS}*"


# --- Tables ----------------------------------------------------------------------------------------------------------

def markdown(header, rows):
    """A table of texts. A | in a text, as in q(z|x), is escaped, or it would end its cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines)


def a_run_of(results):
    """The metrics of some run of a data set, if possible of one without a changed setting."""
    unchanged = [variant for variant in results if "=" not in variant]
    variant = (unchanged or list(results))[0]
    return next(iter(results[variant].values()))


def floor_of(results):
    """The fd of held-out real images, as text, from some run of a data set."""
    metrics = a_run_of(results)
    return cell({metrics["run"]["seed"]: metrics}, "floor")


def describe_data(dataset, results):
    """What all numbers of a data set share, in a sentence. `table_data` says more."""
    metrics = a_run_of(results)
    run = metrics["run"]
    network = re.sub("-[0-9a-f]{8}$", "", run["features"])  # without the hash
    return (f"{dataset}: {run['data_note']}, budget `{run['budget']}`, {metrics['headline']['n_generated']:,} samples, "
            f"features `{network}`.")


def table_data(everything):
    """A line for each data set, with the settings that all of its numbers share."""
    rows = []
    for dataset, results in everything.items():
        metrics = a_run_of(results)
        run = metrics["run"]
        train = run["train"]
        steps = (f"`{run['budget']}`: {train['vae_steps']:,} and {train['unet_steps']:,} steps of "
                 f"{train['batch']} images")
        rows.append([dataset, f"{run['n_real']:,}, {run['data_note']}", steps,
                     f"{metrics['headline']['n_generated']:,}", str(run["eval"]["grid_count"]),
                     f"`{run['features']}`", floor_of(results)])
    return markdown(["data set", "training images", "budget: training of VAE and refiner", "samples",
                     "samples, side measurements", "feature network", with_arrow("floor")], rows)


def table_variants(everything):
    """A line for each of VARIANTS that was run: what it is, and how many seeds it has on each data set."""
    rows = []
    for variant, what_it_is in VARIANTS.items():
        seeds = [len(results.get(variant, {})) for results in everything.values()]
        if any(seeds):
            rows.append([f"`{variant}`", what_it_is, *(str(count or "") for count in seeds)])
    return markdown(["variant", "what it is", *(f"seeds, {dataset}" for dataset in everything)], rows)


def fits(variant, patterns):
    """Whether the name of a variant matches one of the patterns of a table (see TABLES)."""
    changed = "=" in variant  # a run with a changed setting, such as stage1-form1-start=300
    for pattern in patterns.split():
        for_changed = "=" in pattern  # such a run fits only a pattern with a =, and all others only one without
        if changed == for_changed and fnmatch(variant, pattern):
            return True
    return False


def with_note(table, names, settings=SETTINGS):
    """A table and, below it, a note: first `settings`, a text about the settings of its numbers, then what the
    notations in its cells mean, as far as they occur. `names`: its columns."""
    kinds = []
    if " ± " in table:
        kinds.append("a ± b: mean ± sd over seeds")
    if "[" in table:
        kinds.append("[a, b]: 95% interval of one run, over the draw of images")
    if re.search(r" \(\d", table):
        kinds.append("(n): measured on n images")
    if any(" against " in name for name in names):
        kinds.append("against: the change in percent, over the seeds that both have (**bold** if significant; "
                     "for the comparisons of Table 1 in REPORT.md, after the correction there)")
    if any(" / " in name for name in names):
        kinds.append("a / b: by how many percent a differs from b")
    if "†" in table:
        kinds.append("†: trained on different processors")
    if "bits/dim" in names:
        kinds.append("bits/dim: compare equal seeds, whose estimates share most of their error")
    if any(name.endswith(" components") for name in names):
        kinds.append("these components share one covariance, those of *mixture* in other tables do so on shapes only")
    if "sure, VAE" in names:
        kinds.append("VAE: the same for all variants of stage 3 that were trained on one processor")
    if any(" / " not in name and is_of_first_seed(name) for name in names):
        kinds.append("times: rough, of the first seed; none if it had another processor than stage1-form1 (ms: for "
                     "one image)")
    note = f"{settings} {'; '.join(kinds)}." if kinds else settings
    return f"{table}\n\n*{note}*"


def table_of(everything, patterns, columns):
    """One of TABLES. It has a line for each variant that fits one of the patterns and has a number in one of the
    columns."""
    columns = columns.split("; ")
    rows = []
    for dataset, results in everything.items():
        for variant, seeds in results.items():
            if not fits(variant, patterns):
                continue
            cells = []
            for column in columns:
                if " against " in column or " / " in column:
                    cells.append(cell_of_comparison(results, variant, column))
                elif is_of_first_seed(column):
                    cells.append(cell_of_time(results, variant, column))
                else:
                    cells.append(cell(seeds, column))
            if any(cells):
                rows.append([f"{dataset} {variant}", *cells])
    titles = ["variant"]
    for column in columns:  # "fd against stage1-form1" is shown as "against stage1-form1: fd"
        title = re.sub("(.*) against (.*)", r"against \2: \1", column)
        titles.append(f"{title} {direction(column)}".rstrip())
    return with_note(markdown(titles, rows), columns)


def direction(name):
    """Whether higher (↑) or lower (↓) is better for a number of this name; or "" if neither is."""
    # What is "saved" is asked first, since "seconds saved" and "memory saved" begin like seconds and memory, of which
    # less is better.
    if "saved" in name or name.startswith(("is", "precision", "recall", "diversity", "probe", "psnr")):
        return "↑"
    # Some of these names do not say that they are an fd: "sure, VAE", "middle, refined" and the like; "unsure third",
    # "other third" and "all refined"; and "steps evenly", "steps by s", "steps by other s" and "three steps".
    if name.startswith(("fd", "kid", "floor", "ceiling", "sure", "middle", "unsure", "all refined", "other third",
                        "reconstruction fd", "steps", "three steps", "noise", "path length", "bits/dim", "ms",
                        "seconds", "train minutes", "memory")):
        return "↓"
    return ""


def with_arrow(name):
    """The name of a number, with the arrow of its direction."""
    return f"{name} {direction(name)}".rstrip()


def table_overview(everything):
    """The table of README.md: a line for the VAE and for each of MAIN_VARIANTS, with what it is, and its fd on each
    data set (`uncond` has a second line, LONG_UNCOND); then one for real images. README.md does not show the table of
    the data, so the settings stand below."""
    rows = []
    for variant in ("stage1-vae", *MAIN_VARIANTS):
        cells = [cell(results.get(variant, {}), "fd") for results in everything.values()]
        rows.append([f"`{variant}`", VARIANTS[variant], *cells])
        if variant == "stage1-uncond":
            longer = [cell(results.get(LONG_UNCOND.get(dataset), {}), "fd") for dataset, results in everything.items()]
            rows.append([f"`{variant}`, longer", "the same, trained for about as long as VAE and refiner together",
                         *longer])
    rows.append(["real images", "held-out ones: about the best that a model can reach",
                 *map(floor_of, everything.values())])
    table = markdown(["variant", "what it is", *(f"{dataset}: {with_arrow('fd')}" for dataset in everything)], rows)
    settings = [describe_data(dataset, results) for dataset, results in everything.items()]
    return with_note(table, ["fd"], " ".join(settings))


def table_reproduced(new, committed):
    """New numbers of each variant beside the committed ones, and whether the two agree."""
    rows = []
    for variant, seeds in new.items():
        committed_seeds = committed.get(variant, {})
        for name in ("fd", "hf_energy"):
            rows.append([variant, name, cell(seeds, name), cell(committed_seeds, name),
                         conclude(seeds, committed_seeds, name)])
    return markdown(["variant", "score", "new", "committed", "conclusion"], rows)


def conclude(new_seeds, committed_seeds, name):
    """Whether new runs reproduce a committed number, as text. Each new run is compared with the committed run of the
    same seed or, if there is none, with the mean over the committed seeds. It should differ by at most 40%, which is
    what two seeds of form1 have differed by on shapes."""
    new, committed = values_by_seed(new_seeds, name), values_by_seed(committed_seeds, name)
    if not committed:
        return "nothing committed"
    old_run, new_run = next(iter(committed_seeds.values())), next(iter(new_seeds.values()))
    old_settings = shared_settings(old_run) | {"prior": old_run["run"]["eval"]["prior"]}
    new_settings = shared_settings(new_run) | {"prior": new_run["run"]["eval"]["prior"]}
    difference = common.first_difference(old_settings, new_settings)
    if difference:
        return f"not comparable: {difference}"
    if not new:
        return "not measured"
    mean = statistics.mean(committed.values())
    largest_error = 0
    for seed, value in new.items():
        expected = committed.get(seed, mean)
        largest_error = max(largest_error, abs(value / expected - 1))
    return f"{'reproduced' if largest_error <= 0.4 else 'NOT reproduced'} (off by {largest_error:.0%})"


def all_tables(everything):
    """{name: table} of all tables that a text can mark, and that TABLES.md shows."""
    tables = {"data": table_data(everything), "variants": table_variants(everything),
              "overview": table_overview(everything)}
    for name, (patterns, columns) in TABLES.items():
        tables[name] = table_of(everything, patterns, columns)
    tables["questions"] = table_claims(everything, PRIMARY_CLAIMS, adjust=True)
    for topic in CLAIMS:
        tables[f"claims on {topic}"] = table_claims(everything, CLAIMS[topic] + FURTHER_CLAIMS[topic])
    return tables


def long_tables(everything, tables):
    """The whole text of TABLES.md: all tables, and the charts that belong to them."""
    parts = ["# Long tables", "Written by `python final_evaluation.py`. README.md and `NUMBERS` in final_evaluation.py "
             "explain the words. The name of a run with `--set KEY=VALUE` ends in `-KEY=VALUE`: it is the same "
             "variant, except for this setting. The JSON file of each run holds more numbers."]
    for name, table in tables.items():
        parts += [f"## {name}", table]
        if name in CAPTIONS and CHARTS[name](everything):  # the chart may have nothing to show
            parts += [f"![{name}](figures/{name}.png)", f"*{CAPTIONS[name]}*"]
    return "\n\n".join(parts) + "\n"


# --- Charts, texts and collecting ------------------------------------------------------------------------------------

def new_chart(rows, columns, height, **shared):
    """A figure that is 10 inches wide, and an array of its axes, (rows, columns), each `height` inches high. `shared`:
    sharex=True or sharey=True gives all axes the same range of x or y. It is saved with 1,500 pixels in its width,
    which REPORT.md and TABLES.md show at about half of that."""
    figure = Figure(figsize=(10, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for axis in axes.flat:
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def log_scale(axis, names):
    """Make the axes in `names` ("x", "y" or "xy") logarithmic, with plain numbers in place of powers of ten."""
    for name in names:
        axis.set(**{f"{name}scale": "log"})
        scale = axis.xaxis if name == "x" else axis.yaxis
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())


def sd_for_bar(values):
    """The standard deviation for an error bar. For a single run it is NaN, of which matplotlib draws no bar."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def draw_line(axis, variant, points):
    """Draw a variant's line through points {x: {seed: value}}: the means, with bars of one standard deviation. Points
    that some seeds lack are left out: there the line would move because its mean is over other seeds. Draws nothing if
    fewer than two points remain."""
    xs, means, sds = [], [], []
    all_seeds = set().union(*points.values())
    for x, by_seed in points.items():
        if by_seed and by_seed.keys() == all_seeds:
            xs.append(x)
            means.append(statistics.mean(by_seed.values()))
            sds.append(sd_for_bar(by_seed.values()))
    if len(xs) > 1:
        colour, marker = LOOKS[variant]
        axis.errorbar(xs, means, sds, color=colour, marker=marker, markersize=5, linewidth=1.4, capsize=3,
                      label=variant)


def with_legend(figure, columns=4):
    """The figure with one legend below all axes, in which what occurs on several axes is listed once. None if nothing
    was drawn that has a label."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return None
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=9,
                  frameon=False)
    return figure


# Each of the following functions makes a chart of {dataset: {variant: {seed: metrics}}}. It returns a figure, or None
# if there is nothing to show.

def chart_claims(everything):
    """A forest plot: for each of PRIMARY_CLAIMS and CLAIMS and each data set, the ratio of the first number to the
    second, with its 95% interval over seeds. A filled marker means significant, a cross fewer than three runs."""
    other_claims = sum(CLAIMS.values(), [])
    claims = PRIMARY_CLAIMS + other_claims
    changes = {}  # {dataset: the comparison of each claim}
    for dataset, results in everything.items():
        found = compare_together(results, PRIMARY_CLAIMS)
        found += [compare_sides(results, *sides) for _, *sides in other_claims]
        if any(found):
            changes[dataset] = found
    if not changes:
        return None
    figure, axes = new_chart(1, 1, 0.45 * len(claims) + 1.6)
    axis = axes[0, 0]
    shifts = {"shapes": -0.25, "cifar10": 0, "celeba64": 0.25}  # a claim has a row, and each data set a line in it
    for dataset, found in changes.items():
        colour, marker = DATASET_LOOKS[dataset]
        shift = shifts[dataset]
        for row, change in enumerate(found):
            if change is None:
                continue
            ratio = math.exp(change["log_ratio"])
            if change["p"] is None:
                axis.plot(ratio, row + shift, "x", color=colour, markersize=5)
                continue
            axis.plot([math.exp(change["low"]), math.exp(change["high"])], [row + shift] * 2, colour, linewidth=1.5)
            axis.plot(ratio, row + shift, marker, color=colour, markersize=5,
                      markerfacecolor=colour if is_significant(change) else "white")
        axis.plot([], [], marker=marker, color=colour, label=dataset, linewidth=1.5)  # only an entry of the legend
    axis.axvline(1, color="black", linewidth=1)
    axis.axhspan(-0.6, len(PRIMARY_CLAIMS) - 0.5, color="#f3ecd8", zorder=0)  # the four guiding questions
    labels = []
    for claim in claims:
        question = claim[0].replace("*", "").replace("`", "")
        labels.append(f"{question}\n{describe_sides(claim)}")
    axis.set_yticks(range(len(claims)), labels, fontsize=8)
    axis.set_ylim(len(claims) - 0.4, -0.6)  # the first claim is at the top
    log_scale(axis, "x")
    axis.set_xlabel("first number / second number; lower is better")
    # These three, too, are only entries of the legend.
    axis.plot([], [], "ko", label="significant")
    axis.plot([], [], "ko", markerfacecolor="white", label="not significant")
    axis.plot([], [], "kx", label="fewer than three runs")
    return with_legend(figure, 6)


def chart_summary(everything):
    """All models by all criteria. Each data set has a panel, in which variants are lines and numbers are columns. A
    cell has the mean over seeds. Its colour is the change against form1 with the same seeds: blue is better, orange is
    worse, and from a factor of two on the colour is full. Where neither lower nor higher is better there is none."""
    colours = LinearSegmentedColormap.from_list("worse to better", ["#E69F00", "#FFFFFF", "#56B4E9"])
    everything = {dataset: results for dataset, results in everything.items() if "stage1-form1" in results}
    if not everything:
        return None
    figure, axes = new_chart(len(everything), 1, 0.28 * (len(COMPARED) + 2))
    for axis, (dataset, results) in zip(axes.flat, everything.items(), strict=True):
        variants = [variant for variant in COMPARED if variant in results]
        better = [[0.0] * len(SUMMARY) for _ in variants]  # 1: better by a factor of two or more; -1: worse by as much
        for y, variant in enumerate(variants):
            for x, name in enumerate(SUMMARY):
                values = values_by_seed(results[variant], name)
                if not values or (name == "noise fd" and variant == "bonus-latent"):  # which has no x_hat
                    continue
                change = compare_sides(results, (name, variant), (name, "stage1-form1"))
                if change and direction(name):
                    doublings = change["log_ratio"] / math.log(2)
                    better[y][x] = doublings if direction(name) == "↑" else -doublings
                mean = fid.rounded(statistics.mean(values.values()), 3)
                axis.text(x, y, mean, ha="center", va="center", fontsize=9)
        axis.imshow(better, colours, vmin=-1, vmax=1, aspect="auto")
        axis.grid(False)
        axis.set_xticks(range(len(SUMMARY)), map(with_arrow, SUMMARY))
        axis.set_yticks(range(len(variants)), variants)
        axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
        axis.set_title(dataset, loc="left", weight="bold")
    return figure


def chart_cost(everything):
    """fd against what sampling costs, with DPM-Solver++ of up to 25 steps: above, by evaluations of the network,
    below, by seconds per image (of the first seed)."""
    figure, axes = new_chart(2, len(everything), 3)
    labels = {"nfe": "evaluations", "seconds_per_image": "seconds per image"}
    for row, cost in zip(axes, labels, strict=True):
        for axis, (dataset, results) in zip(row, everything.items(), strict=True):
            for variant in COSTS:
                seeds, points = results.get(variant, {}), {}
                for steps in (2, 4, 6, 10, 25):
                    costs = list(values_by_seed(seeds, f"steps/dpm {steps}/{cost}").values())
                    if costs:
                        # The first cost is that of all seeds: evaluations are equal, and of seconds there is only one.
                        points[costs[0]] = values_by_seed(seeds, f"steps/dpm {steps}/fd")
                draw_line(axis, variant, points)
            log_scale(axis, "xy")
            axis.set(title=dataset, xlabel=labels[cost], ylabel="fd")
    return with_legend(figure, 3)


def chart_noise(everything):
    """fd against the standard deviation of noise on x_hat."""
    figure, (axes,) = new_chart(1, len(everything), 3.6)
    for axis, (dataset, results) in zip(axes, everything.items(), strict=True):
        for variant in ROBUSTNESS:
            seeds, points = results.get(variant, {}), {}
            for name, sd in fid.NOISE.items():
                points[sd] = values_by_seed(seeds, f"tables/robustness/scores/{name}/fd")
            draw_line(axis, variant, points)
        log_scale(axis, "y")
        axis.set(title=dataset, xlabel="sd of the noise on x_hat", ylabel="fd")
    return with_legend(figure)


def chart_weights(everything):
    """fd of joint training by the final weight of the refiner's loss, divided by that of stage 1 with the same seed:
    before refinement and after it. Lines join the weights of `anneal`; a cross is `kendall`, at the weight that it has
    learned. Points: means over seeds; bars: one sd."""
    figure, (axes,) = new_chart(1, len(everything), 3.4, sharex=True, sharey=True)
    for axis, (dataset, results) in zip(axes, everything.items(), strict=True):
        for name, label, colour in (("fd before", "before refinement", "#999999"), ("fd", "refined", "#D55E00")):
            points = {"anneal": {}, "kendall": {}}  # {weight: ratios}
            for variant, seeds in results.items():
                # Not those with another --gradient or --from-vae, whose names go on: stage2-anneal-w0.1-grad-none.
                match = re.fullmatch(r"stage2-(anneal|kendall)(-w[\d.e+-]+)?", variant)
                if not match:
                    continue
                weights = values_by_seed(seeds, "weight").values()
                change = compare_sides(results, (name, variant), (name, "stage1-form1"))
                if change and weights and min(weights) > 0:  # the axis is logarithmic
                    ratios = [ours / theirs for ours, theirs in zip(change["ours"], change["theirs"], strict=True)]
                    points[match[1]][statistics.mean(weights)] = ratios
            for loss, marker in (("anneal", "o"), ("kendall", "X")):
                if points[loss]:
                    xs = sorted(points[loss])
                    means = [statistics.mean(points[loss][x]) for x in xs]
                    sds = [sd_for_bar(points[loss][x]) for x in xs]
                    axis.errorbar(xs, means, sds, color=colour, marker=marker, markersize=6, capsize=3,
                                  label=f"{loss}, {label}")
        axis.axhline(1, color="black", linewidth=1)
        log_scale(axis, "xy")
        axis.xaxis.set_major_locator(LogLocator())  # the labels of more ticks would overlap
        axis.set(title=dataset, xlabel="final weight of the refiner's loss", ylabel="fd / fd of stage 1")
    return with_legend(figure)


def chart_thirds(everything):
    """The fd between reconstructions of held-out images and these images, by thirds of s: of the VAE's images, and of
    those refined with each conditioning. Bars: means over seeds; lines: one sd."""
    figure, (axes,) = new_chart(1, len(everything), 3)
    # x_hat is the same for all conditionings, if their VAE was trained on one processor; that of `fixed` is taken.
    shown = [("VAE", "stage3-flow-fixed", "x_hat", LOOKS["stage1-vae"][0])]
    for variant in CONDITIONINGS:
        shown.append(("refined", variant, f"refined by {variant.rsplit('-', 1)[1]}", LOOKS[variant][0]))
    thirds, width = ("sure", "middle", "unsure"), 0.17  # width: of a bar; five of them are centred on a third's place
    for axis, (dataset, results) in zip(axes, everything.items(), strict=True):
        for k, (kind, variant, label, colour) in enumerate(shown):
            for x, third in enumerate(thirds):
                values = list(values_by_seed(results.get(variant, {}), f"{third}, {kind}").values())
                if values:
                    axis.bar(x + width * (k - 2), statistics.mean(values), width, color=colour, label=label, capsize=2,
                             yerr=sd_for_bar(values))
        axis.set_xticks(range(len(thirds)), thirds)
        axis.set(title=dataset, ylabel="fd to the real images")
    return with_legend(figure, 5)


def chart_steps(everything):
    """How much fd changes, in percent, if the thirds of the images by s get one, two and three steps of refinement by
    `fixed`, against two for all: with codes of the flow and of the mixture. Blue: by the image's own s; orange: by that
    of another image. Bars: means over seeds; lines: one sd."""
    priors = {"flow": "", "mixture": ", mixture"}  # how the names of their numbers end
    figure, (axes,) = new_chart(1, len(everything), 3, sharey=True)  # so that small changes look small
    for axis, (dataset, results) in zip(axes, everything.items(), strict=True):
        seeds = results.get("stage3-flow-fixed", {})
        for x, ending in enumerate(priors.values()):
            even = values_by_seed(seeds, "steps evenly" + ending)
            for name, shift, colour in (("steps by s", -0.2, "#0072B2"), ("steps by other s", 0.2, "#E69F00")):
                by_s = values_by_seed(seeds, name + ending)
                changes = [100 * (by_s[seed] / even[seed] - 1) for seed in by_s if seed in even]
                if changes:
                    axis.bar(x + shift, statistics.mean(changes), 0.4, color=colour, label=name, capsize=3,
                             yerr=sd_for_bar(changes))
        axis.axhline(0, color="black", linewidth=1)
        axis.set_xticks(range(len(priors)), list(priors))
        axis.set_xlim(-0.5, len(priors) - 0.5)
        axis.set(title=dataset, xlabel="codes of the", ylabel="change of fd in percent")
    return with_legend(figure)


def chart_priors(everything):
    """What a prior's density says about its samples: fd of unrefined samples against the log-density of held-out codes.
    One marker for each prior and run of the VAE of stage 3. A line joins the mixture and the flow of the same VAE."""
    figure, (axes,) = new_chart(1, len(everything), 3.4)
    for axis, (dataset, results) in zip(axes, everything.items(), strict=True):
        seeds = results.get("stage3-vae-flow", {})
        points = {}  # {prior: {seed: (density, fd)}} of the runs that have both
        for prior in PRIOR_LOOKS:
            densities, fds = values_by_seed(seeds, f"log p, {prior}"), values_by_seed(seeds, f"fd, {prior}")
            points[prior] = {seed: (densities[seed], fds[seed]) for seed in densities if seed in fds}
        for seed in seeds:
            if seed in points["mixture"] and seed in points["flow"]:
                (density, fd), (flow_density, flow_fd) = points["mixture"][seed], points["flow"][seed]
                axis.plot([density, flow_density], [fd, flow_fd], "#bbbbbb", linewidth=1)
        for prior, (colour, marker) in PRIOR_LOOKS.items():
            xs = [density for density, _ in points[prior].values()]
            ys = [fd for _, fd in points[prior].values()]
            if xs:
                axis.plot(xs, ys, marker, color=colour, label=prior)
        log_scale(axis, "y")
        axis.locator_params("x", nbins=5, integer=True)  # the labels of more ticks would overlap
        axis.set(title=dataset, xlabel="log-density of held-out codes, nats", ylabel="fd of the VAE's samples")
    return with_legend(figure, 3)


def chart_recipe(everything):
    """What changed settings do to form1, on shapes: fd and hf_energy. The top bar is form1 with seed 0, with a dot for
    each of its seeds. Below it is a bar for each run that changes one setting by --set, of seed 0."""
    results = everything.get("shapes", {})
    unchanged = results.get("stage1-form1", {})
    variants = ["stage1-form1"]
    for variant, seeds in results.items():
        if variant.startswith("stage1-form1-") and variant.count("=") == 1 and 0 in seeds:
            variants.append(variant)
    if not unchanged or len(variants) == 1:
        return None
    figure, (axes,) = new_chart(1, 2, 0.24 * len(variants) + 1)
    for axis, name in zip(axes, ("fd", "hf_energy"), strict=True):
        for y, variant in enumerate(variants):
            values = values_by_seed(results[variant], name)
            if 0 in values:
                axis.barh(y, values[0], color="#D55E00" if variant == "stage1-form1" else "#0072B2")
        of_all_seeds = values_by_seed(unchanged, name).values()
        axis.plot(list(of_all_seeds), [0] * len(of_all_seeds), "ko", markersize=4)
        axis.set_yticks(range(len(variants)), [variant.removeprefix("stage1-") for variant in variants])
        axis.invert_yaxis()
        axis.set_xlabel(f"{name} ({'lower is better' if name == 'fd' else '1 is as sharp as real'})")
    return figure


# Their files are results/figures/NAME.png.
CHARTS = {"claims": chart_claims, "summary": chart_summary, "cost": chart_cost, "noise": chart_noise,
          "weights": chart_weights, "priors": chart_priors, "thirds": chart_thirds, "steps": chart_steps,
          "recipe": chart_recipe}


def texts_beside(folder):
    """README.md and REPORT.md in the folder that contains the folder of results: those of them that are there."""
    paths = [Path(folder).resolve().parent / name for name in ("README.md", "REPORT.md")]
    return [path for path in paths if path.is_file()]


def fill(text, tables):
    """The text, with its marked tables replaced by those of {name: table}. (It may have blocks of another kind, which
    stay as they are: what stands between <!-- cited --> and <!-- end --> comes from other publications.) Exits if a
    table is not known, or if its marker is damaged or lacks its end."""

    def replace(match):
        marker, name, end = match.groups()
        if name not in tables:
            common.fail(f"table '{name}' is not known; known are {', '.join(tables)}")
        return f"{marker}{tables[name]}\n{end}"

    # (?:(?!<!--).)* is text without a marker: the next marker after that of a table must be its end.
    marked_table = "(<!-- table ([^\n]+) -->\n)(?:(?!<!--).)*(<!-- end -->)"
    filled, found = re.subn(marked_table, replace, text, flags=re.DOTALL)
    if found != text.count("<!-- table"):
        common.fail("the marker of a table is damaged or lacks its end; each table stands between the lines "
                    "<!-- table NAME --> and <!-- end -->; nothing was written")
    return filled


def draw_sheet(path, runs, strips):
    """One picture of several variants: a strip (see SHEETS) of a picture of each run with seed 0 that is in the folder
    `runs`, below the variant's name. A picture that is there already is not replaced by a smaller one, which would show
    fewer variants. Returns whether a picture was written."""
    found = {}
    for variant, picture, top, bottom in strips:
        file = runs / f"{variant}-s0" / f"{picture}.png"
        if file.is_file():
            image, titles = Image.open(file), TITLES.get(picture, 0)
            height = image.height - titles
            first_pixel = 0 if top == 0 else titles + round(top * height)  # 0: with the titles
            found[variant] = image.crop((0, first_pixel, image.width, titles + round(bottom * height)))
    if not found:
        return False
    name_height = 20  # pixels
    page_width = max(strip.width for strip in found.values())
    page_height = sum(name_height + strip.height for strip in found.values())
    if path.is_file() and Image.open(path).height > page_height:
        print(f"kept: {path}; from the pictures in {runs} it would become smaller")
        return False
    page = Image.new("RGB", (page_width, page_height), "white")
    y = 0
    for variant, strip in found.items():
        ImageDraw.Draw(page).text((4, y + 4), variant.replace(TWICE, ", twice the steps"), fill="black")
        # On the left of a picture are labels of its rows, wider ones where there are two kinds of rows. The pictures
        # end at the right edge of the page, so that the images of all variants stand in the same columns.
        page.paste(strip, (page_width - strip.width, y + name_height))
        y += name_height + strip.height
    common.write_with(path, page.save, format="png")
    return True


def choose_runs(runs, folder):
    """Check run folders that are to be collected, before anything is written. Returns {the file that metrics will be
    copied to: (run folder, facts about the run)}. Folders without scores are left out, and so are runs on a user's own
    images. Exits if one of the rest must not be collected."""
    chosen = {}
    for run in map(Path, runs):
        if run.is_dir() and not (run / "metrics.json").is_file():  # such as that of the bonus's autoencoder
            print(f"{run}: has no metrics.json, not collected")
            continue
        facts = load_metrics(run / "metrics.json")["run"]
        target = Path(folder) / facts["dataset"] / f"{facts['variant']}-s{facts['seed']}.json"
        # Only a user's own images have the crop "centre", so it gives them away even if their folder is named cifar10.
        if facts["dataset"] not in common.DATASETS or facts["crop"] == "centre":
            print(f"{run}: of a user's own images, not collected")
            continue
        if target in chosen:
            common.fail(f"{chosen[target][0]} and {run} would both become {target}; leave one out; nothing was written")
        if facts["budget"] == "smoke":
            common.fail(f"{run}/metrics.json has the budget smoke, which measures nothing; leave it out; nothing was "
                        "written")
        chosen[target] = run, facts
    # Afterwards all results must be comparable: those that stay, and the new ones. (So another budget can only replace
    # a data set as a whole.)
    first = {}
    for path in sorted(result_files(folder)):
        if path not in chosen:
            check_comparable(path, read_result(path), first)
    for run, _ in chosen.values():
        path = run / "metrics.json"
        check_comparable(path, read_result(path), first, advice="leave it out; nothing was written")
    return chosen


def may_be_kept(dataset, pictures):
    """Whether pictures with these names may be kept in results/. Those of real images may not, except of shapes."""
    return dataset == "shapes" or not any(picture in FIGURES_OF_REAL_IMAGES for picture in pictures)


def collect(runs, folder):
    """Copy metrics, and the figures that README.md or REPORT.md shows, from run folders into FOLDER/DATASET. Of the
    runs in WEIGHTS, at the cpu budget, also keep the weights."""
    chosen = choose_runs(runs, folder)
    texts = "".join(path.read_text(encoding="utf-8") for path in texts_beside(folder))
    before = set(Path(folder).rglob("*"))
    written, sheets = [], {}  # the paths of sheets, with what they are drawn from
    for target, (run, facts) in chosen.items():
        home, name = target.parent, target.stem  # FOLDER/DATASET, VARIANT-sSEED
        common.write(target, (run / "metrics.json").read_bytes())
        written.append(target)
        if name in WEIGHTS and facts["budget"] == "cpu" and (run / "checkpoint.pt").is_file():
            written.append(collect_weights(run / "checkpoint.pt", home, *WEIGHTS[name]))
        for figure in run.glob("*.png"):
            path = home / f"{name}-{figure.name}"
            is_in_text = f"(results/{facts['dataset']}/{path.name})" in texts
            if is_in_text and may_be_kept(facts["dataset"], [figure.stem]):
                common.write(path, figure.read_bytes())
                written.append(path)
        for sheet, strips in SHEETS.items():
            path = Path(folder) / "figures" / f"{facts['dataset']}-{sheet}.png"
            pictures = [picture for _, picture, *_ in strips]
            has_this_run = run.name in [f"{variant}-s0" for variant, *_ in strips]
            is_in_text = f"(results/figures/{path.name})" in texts
            if has_this_run and is_in_text and may_be_kept(facts["dataset"], pictures):
                sheets[path] = run.parent, strips
    for path, (parent, strips) in sheets.items():
        if draw_sheet(path, parent, strips):
            written.append(path)
    for path in sorted(set(written)):
        print(f"{'replaced' if path in before else 'written'}: {path}")


def collect_weights(checkpoint, home, name, parts):
    """Write these parts of a checkpoint to HOME/NAME-HASH.pt, and remove older files of that name. To keep the file
    small, the encoder is left out, which sampling does not need, and matrices have half precision. Returns its path."""
    state = common.load_checkpoint(checkpoint)
    state["vae"] = {key: value for key, value in state["vae"].items() if key.startswith("decoder.")}
    kept = {key: state[key] for key in ("train", "run_id", "seconds", "log")}
    kept |= {part: common.half(state[part]) for part in parts}
    path = common.save_state(home / f"{name}-*.pt", kept)  # which puts a hash of the file in place of the star
    for older in {*common.find_hashed(home, name)} - {path}:
        older.unlink()
        print(f"removed: {older}")
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables, charts and tests of claims from results; trains nothing")
    parser.error = common.fail  # a wrong flag gets one line, like every other error
    parser.add_argument("--results", default=str(ROOT / "results"),
                        help="folder of committed results; README.md and REPORT.md beside it get its tables")
    parser.add_argument("--runs", help="read new runs from this folder, and write REPORT.md there")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--collect", nargs="+", metavar="RUN", help="copy these run folders into --results, and stop")
    modes.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a text would change")
    args = parser.parse_args(argv)
    if args.collect:
        if args.runs:
            common.fail("--collect: names the folders that it copies itself; leave --runs out")
        return collect(args.collect, args.results)
    source = Path(args.runs or args.results)
    committed = load_all(result_files(args.results))
    everything = committed
    if args.runs:  # RUNS/DATASET-BUDGET/RUN/metrics.json
        new_paths = source.glob("*/*/metrics.json")
        everything = load_all(path for path in new_paths if not path.parent.parent.name.endswith("-smoke"))
    if not everything:
        common.fail(f"{source}: no results there; run a stage first, for instance python stage1_baseline.py")
    tables = all_tables(everything)
    if args.runs:
        reproduced = {f"reproduced: {dataset}": table_reproduced(results, committed.get(dataset, {}))
                      for dataset, results in everything.items()}
        parts = [f"## {name}\n\n{table}" for name, table in (reproduced | tables).items()]
        texts = {source / "REPORT.md": "\n\n".join(parts) + "\n"}
    else:
        texts = {path: fill(path.read_text(encoding="utf-8"), tables) for path in texts_beside(source)}
        texts[source / "TABLES.md"] = long_tables(everything, tables)
    changed = []
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            changed.append(path)
    if args.check:
        print(f"would change: {', '.join(map(str, changed))}" if changed else "texts agree with the results")
        raise SystemExit(bool(changed))  # True is status 1
    for path in changed:
        common.write(path, texts[path].encode())
    written = list(changed)
    if args.runs:
        print(*reproduced.values(), sep="\n")
    else:
        for name, chart in CHARTS.items():
            figure = chart(everything)
            if figure is not None:
                path = source / "figures" / f"{name}.png"
                common.write_with(path, figure.savefig, format="png", dpi=150)
                written.append(path)
    print("written:", *(written or ["nothing, the report agrees with the results"]))


if __name__ == "__main__":
    main()
