"""Final evaluation: reads results, writes tables and charts, and tests the claims. It trains nothing.

`TABLES` says which numbers of which variants make a table, and `CLAIMS` which two numbers are compared. The name of a
number is its place in metrics.json, shortened by `SHORT`. Texts mark a table by <!-- table NAME --> and <!-- end -->.

Run     python final_evaluation.py                     results/ -> README.md, REPORT.md, results/TABLES.md, charts
        python final_evaluation.py --check             writes nothing; exit status 1 if a text would change
        python final_evaluation.py --runs runs         new runs -> runs/REPORT.md, beside the committed numbers
        python final_evaluation.py --collect RUN ...   copies metrics, figures and weights of run folders into results/
"""

import argparse
import json
import math
import re
import statistics
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image, ImageDraw
from scipy.stats import t as student

import common
import fid

ROOT = Path(__file__).resolve().parent
# The order of tables: data sets and variants are sorted by the first of these with which their name begins.
ORDER = ("shapes", "cifar10", "celeba64", "stage1-vae", "stage1-uncond", "stage1-", "stage2-", "stage3-", "")
# For `stage1_baseline.py --pretrained`. Run: the name of the file of weights, and the parts of the checkpoint in it.
WEIGHTS = {"stage1-form1-s0": ("form1", "vae", "unet", "gmm"), "stage1-guided-s0": ("guide", "unet")}
SHOW_REAL_IMAGES = ("reconstructions", "uncertainty", "interpolation")  # such figures are only copied for shapes
# The variants in DATASET-sheet.png, one picture with samples of each.
SHEET = ("stage1-uncond", "stage1-form1", "stage1-guided", "stage2-anneal", "stage3-flow-film", "bonus-latent")
NOTE = "a ± b: mean and sd over seeds; [a, b]: one run, 95% over the draw of images; times: first seed"
MAY_DIFFER = ("prior", "grid", "batch", "probe_count")  # evaluation settings that do not change what a score means

# The variants of the tables below:
#   stage1-vae          the VAE alone
#   stage1-uncond       a diffusion model without a VAE
#   stage1-form1        refines the VAE's images; form2 is the other formulation of DiffuseVAE
#   stage1-guided       form1 with guidance by a refiner that was trained for a shorter time
#   stage2-anneal       VAE and refiner trained together; with grad-none the refiner's loss does not reach the VAE
#   stage3-flow-fixed   codes from a flow, refined as in form1; fade, film and coupling also use s, see below
#   bonus-latent        diffuses the latent of an autoencoder, whose reconstructions are its `ceiling`
# The words in the columns:
#   headline            the first row of a run's scores; the other rows, and the probes, have fewer images (grid_count)
#   fd, floor           Frechet distance to the training images; that of equally many held-out real images
#   hf_energy           fine detail relative to real images; 1 is as sharp as real
#   noise area          mean of fd with noise on x_hat over fd without, for noise of sd 0 to 0.4
#   s                   the VAE's expected error in an image, by regression or by the encoder's variance
#   sure, unsure        the third of the images with the lowest s, and that with the highest
#   s true, s shuffled  fd of reconstructions that are refined with their own s, and with another image's
#   thirds              more steps for unsure images, fewer for sure ones; `shuffled` goes by another image's s
#   own prior           the row with the headline's settings, but with as few images as the rows of other priors
#   real codes          codes of held-out images, in place of codes from a prior
#   path / ends         length of a path between two images over the distance of its ends; 1 is straight

# A number's name is its place in metrics.json, with these parts replaced. Where several of them fit, the longest is
# replaced. This goes from left to right and only once, so the order of these lines does not matter.
SHORT = {
    "_local": "", "fid": "fd", "seconds_per_image": "s/image", "/fd_to_these": "", "path_over_distance": "/ ends",
    "before_refinement/": "VAE ", "reconstruction/": "", "robustness/scores/": "", "robustness/area": "noise area",
    "bits_per_dim/bound": "bits/dim", "prior_log_density/": "log p(z) ", "savings/saved_percent/": "% saved, ",
    "training/gradient": "gradient", "latent_space/": "", "latent_space/posterior/": "real codes/", "even/": "evenly/",
    "latent_space/slerp/refined/": "path ", "latent_space/slerp/vae/": "VAE path ", "uncertainty/variance": "variance",
    "uncertainty/regressed": "regressed", "uncertainty/terciles/": "", "uncertainty/controls/": "s ",
    "uncertainty/adaptive_refinement/": "", "even_middle_start": "middle start", "adaptive_steps": "thirds",
    "shuffled_steps": "thirds shuffled", "adaptive_start": "start by thirds", "shuffled_start": "start shuffled"}

TABLES = {  # name: (patterns for the end of DATASET/VARIANT, columns and, if only one seed is shown, that seed)
    "results": ("*-vae *-form1 *-guided *-anneal *-flow-film bonus-latent", "fd; hf_energy; train minutes"),
    "stage 1": ("stage1-*", "fd; floor; is; precision; recall; hf_energy; bits/dim"),
    "steps": ("stage1-form1 stage1-guided bonus-latent",
              "dpm 6/fd; dpm 10/fd; dpm 25/fd; ddim 100/fd; dpm 6/hf_energy; dpm 6/s/image; ddim 100/s/image"),
    "joint": ("stage1-form1 stage2-anneal stage2-anneal-grad-none",
              "fd; precision; hf_energy; kl_nats; own prior/fd; gaussian/fd; real codes/refined"),
    "losses, seed 0": ("shapes/*-form1 shapes/stage2-*", "fd; precision; hf_energy; kl_nats; bits/dim; noise area", 0),
    "priors": ("stage3-vae-*", "gaussian/fd; gmm/fd; flow/fd; log p(z) gaussian; log p(z) gmm; log p(z) flow"),
    "uncertainty": ("stage3-flow-fixed",
                    "regressed/correlation; variance/correlation; sure/vae; unsure/vae; sure/refined; unsure/refined"),
    "conditioning": ("stage3-flow-fixed stage3-flow-fade stage3-flow-film stage3-flow-coupling",
                     "fd; is; s/image; noise area; evenly/fd; thirds/fd; thirds shuffled/fd"),
    "latent diffusion": ("bonus-latent", "fd; diversity; ceiling/fd; % saved, gflops_per_image; % saved, s/image; "
                         "% saved, s/image_batch_1; % saved, peak_memory_mb")}

CLAIMS = [  # (question, a number of a variant, what it is compared with); lower is better for every number here
    ("Does refinement improve the VAE's samples?", "fd of stage1-form1", "fd of stage1-vae"),
    ("Do `x_hat` and a `start` below T help?", "fd of stage1-form1", "fd of stage1-uncond"),
    ("Does guidance by a worse refiner help?", "fd of stage1-guided", "fd of stage1-form1"),
    ("Does a fitted prior help?", "own prior/fd of stage1-form1", "gaussian/fd of stage1-form1"),
    ("**Quality**: does joint training help?", "fd of stage2-anneal", "fd of stage1-form1"),
    ("Does it help without its gradient into the VAE?", "fd of stage2-anneal-grad-none", "fd of stage1-form1"),
    ("Is it the gradient that helps?", "fd of stage2-anneal", "fd of stage2-anneal-grad-none"),
    ("Does it help with real codes?", "real codes/refined of stage2-anneal", "real codes/refined of stage1-form1"),
    ("Does adaptive conditioning (`film`) help?", "fd of stage3-flow-film", "fd of stage3-flow-fixed"),
    ("**Efficiency**: does it take more time?", "s/image of stage3-flow-film", "s/image of stage3-flow-fixed"),
    ("Do thirds by each image's `s` help?", "thirds/fd of stage3-flow-film", "thirds shuffled/fd of stage3-flow-film"),
    ("**Robustness**: does refinement help against noise?", "noise area of stage1-form1", "noise area of stage1-vae"),
    ("Does joint training help against it?", "noise area of stage2-anneal", "noise area of stage1-form1"),
    ("Does it help without its gradient?", "noise area of stage2-anneal-grad-none", "noise area of stage1-form1"),
    ("Does `film` help against noise?", "noise area of stage3-flow-film", "noise area of stage3-flow-fixed"),
    ("**Latent space**: does joint training smooth it?", "path / ends of stage2-anneal", "path / ends of stage1-form1"),
    ("What does latent diffusion cost?", "fd of bonus-latent", "fd of stage1-form1")]

FURTHER_CLAIMS = [  # only in TABLES.md
    ("Is Formulation 2 better than 1?", "fd of stage1-form2", "fd of stage1-form1"),
    ("Does guidance help against noise on `x_hat`?", "noise area of stage1-guided", "noise area of stage1-form1"),
    ("Does a fitted prior help unrefined samples?", "fd of stage1-vae", "gaussian/fd of stage1-vae"),
    ("Given a mixture, does a flow-trained VAE help?", "gmm/fd of stage3-flow-fixed", "own prior/fd of stage1-form1"),
    ("With the codes of real images, is it the gradient that helps?", "real codes/refined of stage2-anneal",
     "real codes/refined of stage2-anneal-grad-none"),
    ("Does `fade` help?", "fd of stage3-flow-fade", "fd of stage3-flow-fixed"),
    ("Does `fade` help against noise on `x_hat`?", "noise area of stage3-flow-fade", "noise area of stage3-flow-fixed"),
    ("Does `coupling` help?", "fd of stage3-flow-coupling", "fd of stage3-flow-fixed"),
    ("Does `film` need the image's own `s`?", "s true of stage3-flow-film", "s shuffled of stage3-flow-film"),
    ("Does it reconstruct better than `fixed`?", "s true of stage3-flow-film", "s true of stage3-flow-fixed"),
    ("Does `film` help against strong noise?", "noise 0.4/fd of stage3-flow-film", "noise 0.4/fd of stage3-flow-fixed"),
    ("Are steps by thirds better than even ones?", "thirds/fd of stage3-flow-film", "evenly/fd of stage3-flow-film")]

PANELS = {  # x axis of a chart: (variants, {place: column})
    "steps": ("*-uncond *-form1 *-guided *-anneal *-flow-fixed *-flow-fade *-flow-film bonus-*",
              {n: f"dpm {n}/fd" for n in (5, 6, 10, 25, 50)}),
    "sd of noise on x_hat": ("*-vae *-form1 *-guided *-anneal *-flow-fixed *-flow-fade *-flow-film",
                             {0.0: "clean/fd"} | {sd: f"noise {sd}/fd" for sd in (0.1, 0.2, 0.4)})}


def named_numbers(part, place=""):
    """{name: number or score} of nested dictionaries and lists that stand at `place`. Texts are left out."""
    if isinstance(part, list):
        part = dict(enumerate(part))
    if isinstance(part, dict) and set(part) != {"value", "low", "high"}:  # these three are a score
        parts = [named_numbers(value, f"{place}/{key}") for key, value in part.items()]
        return {name: number for numbers in parts for name, number in numbers.items()}
    longest_first = "|".join(map(re.escape, sorted(SHORT, key=len, reverse=True)))
    name = re.sub(longest_first, lambda match: SHORT[match[0]], place).strip("/")
    return {name: part} if isinstance(part, (int, float, dict)) else {}


def load_metrics(path):
    """The metrics in a file. Exits, naming the file, if they cannot be read."""
    return fid.read_metrics(path) or common.fail(f"{path}: damaged or missing; restore it, or run again with --resume")


def numbers_of(metrics):
    """{name: number or score} of a run. The numbers of its first row, the headline, have plain names. Those of another
    row begin with its sampler and steps, or with its prior if that is not the headline's. Tables and costs follow."""
    headline, *others = metrics["rows"]
    # The rows of a VAE alone differ in nothing but the prior. So its headline is also listed by its prior.
    rows = {headline["prior"]: headline} if headline["sampler"] == "none" else {}
    for row in others:
        name = f"{row['sampler']} {row['nfe']}" if row["prior"] == headline["prior"] else row["prior"]
        rows.setdefault(name, row)  # of two equal rows the first is kept
    # Rows of other priors have fewer images than the headline. So they are compared with this row, which has as few.
    rows["own prior"] = rows.get(f"{headline['sampler']} {headline['nfe']}")
    run = metrics["run"]
    cost = {"train minutes": run["train_seconds"] / 60, "parameters": run["parameters"], "gflops": run["gflops"]}
    return named_numbers(headline) | named_numbers(rows) | named_numbers(metrics["tables"]) | cost


def scoring_settings(metrics):
    """The settings that all results of a data set must share, so that their scores can be compared."""
    shared = ("features", "crop", "data_note", "n_real", "budget", "train_images")
    settings = {key: metrics["run"][key] for key in shared} | {"n_generated": metrics["rows"][0]["n_generated"]}
    return settings | {key: value for key, value in metrics["run"]["eval"].items() if key not in MAY_DIFFER}


def load_all(paths):
    """{dataset: {variant: {seed: metrics}}} in the order of tables, with `numbers` in each metrics. Exits if results of
    a data set cannot be compared, or if seeds of a variant were trained with different settings."""
    def place(name):  # by the first entry of ORDER with which it begins, then by the alphabet
        return [name.startswith(beginning) for beginning in ORDER].index(True), name
    found, first_of = {}, {}  # first_of: {group of results: path and settings of its first file}
    for path in sorted(map(Path, paths)):
        metrics = load_metrics(path)
        run = metrics["run"]
        dataset, variant = run["dataset"], run["variant"]
        groups = {dataset: scoring_settings(metrics), (dataset, variant): {"parameters": run["parameters"]}}
        if "train" in run:  # older metrics have no train settings
            groups[dataset, variant, "train"] = {
                key: value for key, value in run["train"].items() if key not in ("seed", "data_dir")}
        for group, settings in groups.items():
            first_path, first_settings = first_of.setdefault(group, (path, settings))
            if difference := common.first_difference(first_settings, settings):
                common.fail(f"{path} cannot be compared with {first_path}: {difference}; remove one of them")
        found.setdefault(dataset, {}).setdefault(variant, {})[run["seed"]] = metrics
    for results in found.values():
        form1 = results.get("stage1-form1", {})
        all_runs = [(seed, metrics) for seeds in results.values() for seed, metrics in seeds.items()]
        for seed, metrics in all_runs:  # stage 2 measures the latent space of stage 1 beside its own
            stage1_table = metrics["tables"].pop("latent_space_stage1", None)
            if stage1_table and seed in form1:
                form1[seed]["tables"].setdefault("latent_space", stage1_table)
        for _, metrics in all_runs:  # now that no table is missing
            metrics["numbers"] = numbers_of(metrics)
    return {name: {v: found[name][v] for v in sorted(found[name], key=place)} for name in sorted(found, key=place)}


def values_by_seed(seeds, name):
    """{seed: value} of the number called `name` in {seed: metrics}. Times, and what depends on them, are taken from the
    first seed alone, because the other seeds may have shared the machine with other work."""
    if re.search("s/image|seconds|minutes|saved", name):
        seeds = {seed: seeds[seed] for seed in sorted(seeds)[:1]}
    found = {seed: metrics["numbers"].get(name) for seed, metrics in seeds.items()}
    return {seed: x["value"] if isinstance(x, dict) else x for seed, x in found.items() if x is not None}


def mean_and_sd(values):
    """Numbers as text: their mean and, if they differ, their standard deviation."""
    mean = statistics.mean(values)
    sd = statistics.stdev(values) if len(values) > 1 else 0
    texts = (f"{mean:,.0f}", f"{sd:,.0f}") if abs(mean) >= 1000 else (f"{mean:.3g}", f"{sd:.2g}")
    return " ± ".join(texts) if sd > 1e-9 * abs(mean) else texts[0]


def cell(seeds, name):
    """The number called `name` as text: of one seed with its interval, of several with their standard deviation."""
    found = values_by_seed(seeds, name)
    scores = [seeds[seed]["numbers"][name] for seed in found]
    if len(scores) == 1 and isinstance(scores[0], dict):
        return fid.show(scores[0])
    return mean_and_sd(list(found.values())) if found else ""


def describe_change(ours, theirs):
    """Say by how many percent `ours` are lower or higher than `theirs`, positive numbers of the same seeds. This is the
    mean log ratio. It is significant if Student's 95% interval of it, from three seeds or more, excludes 0."""
    log_ratios = [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]
    count, mean = len(log_ratios), statistics.mean(log_ratios)
    change = 100 * math.expm1(mean)  # in percent
    if count < 3:
        return f"{change:+.0f}% ({'one run' if count == 1 else 'two runs'})"
    margin = student.ppf(0.975, count - 1) * statistics.stdev(log_ratios) / count**0.5
    low, high = (100 * math.expm1(bound) for bound in (mean - margin, mean + margin))
    text = "not significant" if low <= 0 <= high else f"{'lower' if mean < 0 else 'higher'} by {abs(change):.0f}%"
    return f"{text} ({count} seeds: {low:+.0f}% to {high:+.0f}%)"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_data(dataset, results):
    """The settings that all numbers of a data set share, in a sentence."""
    metrics = next(iter(next(iter(results.values())).values()))
    run, evaluation = metrics["run"], metrics["run"]["eval"]
    start_noise = "" if evaluation["temperature"] == 1 else f" from noise of sd {evaluation['temperature']:g}"
    return (f"{dataset}: {run['data_note']}, budget `{run['budget']}` ({run['train_images']:,} images per network), "
            f"{metrics['rows'][0]['n_generated']:,} samples{start_noise} ({evaluation['grid_count']} in probes), "
            f"features `{run['features']}`.")


def table_of(everything, variants, columns, only_seed=None):
    """A line for each variant that fits one of the patterns and has a number in one of the columns."""
    rows, notes, columns = [], {}, columns.split("; ")
    for dataset, results in everything.items():
        for variant, seeds in results.items():
            seeds = {seed: metrics for seed, metrics in seeds.items() if only_seed in (None, seed)}
            cells = [cell(seeds, column) for column in columns]
            if any(fnmatch(f"{dataset}/{variant}", f"*{pattern}") for pattern in variants.split()) and any(cells):
                rows.append([f"{dataset} {variant}", *cells])
                notes[dataset] = describe_data(dataset, results)
    return f"{markdown(['variant', *columns], rows)}\n\n*{' '.join(notes.values())} {NOTE}.*"


def table_claims(everything, claims):
    """A line for each claim and, for each data set, both means over the seeds that both sides have, and the change."""
    rows = []
    for question, *sides in claims:
        cells = []
        for results in everything.values():
            values = []  # {seed: value} of the first side and of the second
            for side in sides:
                name, variant = side.split(" of ")
                values.append(values_by_seed(results.get(variant, {}), name))
            shared_seeds = sorted(values[0].keys() & values[1].keys())
            ours, theirs = [values[0][seed] for seed in shared_seeds], [values[1][seed] for seed in shared_seeds]
            cells.append("not run" if not shared_seeds else
                         f"{mean_and_sd(ours)} / {mean_and_sd(theirs)}: {describe_change(ours, theirs)}")
        rows.append([question, *sides, *cells])
    table = markdown(["question", "first", "second", *everything], rows)
    note = "Mean of first / of second: change by paired ratios, in brackets its 95% interval over seeds."
    return f"{table}\n\n*{note} {' '.join(describe_data(*item) for item in everything.items())}*"


def table_numbers(columns):
    """A line for each number in {column: {seed: {"numbers": {name: number or score}}}}."""
    all_metrics = [metrics for seeds in columns.values() for metrics in seeds.values()]
    names = {name: None for metrics in all_metrics for name in metrics["numbers"]}  # each once, in order
    return markdown(["", *columns], [[name, *(cell(seeds, name) for seeds in columns.values())] for name in names])


def table_reproduced(new, committed):
    """New numbers of each variant beside the committed ones. They are reproduced if they lie in the 99% prediction
    interval of one more run of the committed seeds, or within 25% where fewer than three seeds are committed."""
    rows = []
    for variant, seeds in new.items():
        committed_seeds = committed.get(variant, {})
        for name in ("fd", "hf_energy"):
            conclusion = "nothing committed"
            if theirs := list(values_by_seed(committed_seeds, name).values()):
                mean, count = statistics.mean(theirs), len(theirs)
                allowed = 0.25 * mean
                if count >= 3:  # the new run varies by sd, and the mean of the committed ones by sd / sqrt(count)
                    allowed = student.ppf(0.995, count - 1) * statistics.stdev(theirs) * math.sqrt(1 + 1 / count)
                error = max(abs(value - mean) for value in values_by_seed(seeds, name).values())
                conclusion = f"{'reproduced' if error <= allowed else 'NOT reproduced'} (off by {error / mean:.0%})"
                first_old, first_new = next(iter(committed_seeds.values())), next(iter(seeds.values()))
                if difference := common.first_difference(scoring_settings(first_old), scoring_settings(first_new)):
                    conclusion = f"not comparable: {difference}"
            rows.append([variant, name, cell(seeds, name), cell(committed_seeds, name), conclusion])
    return markdown(["variant", "score", "new", "committed", "conclusion"], rows)


def other_tables(folder):
    """Tables of what no run measured: damage that feature networks notice, recipes (short trials), pairs of images."""
    found = {"features": {}}  # {table: {column: {seed: {name: number}}}}; what has no seeds stands under 0
    for dataset in sorted(common.DATASETS):
        for path in sorted(Path(folder).glob(f"features/{dataset}-{'[0-9a-f]' * 8}.json")):
            found["features"][f"`{path.stem}`"] = {0: named_numbers(json.loads(path.read_text()))}
        for path in Path(folder).glob(f"{dataset}/pairs.json"):
            counts = json.loads(path.read_text())["counts by sd of x_T"]
            found[f"pairs {dataset}"] = {f"sd {sd}": {0: numbers} for sd, numbers in counts.items()}
        for path in sorted(Path(folder).glob(f"{dataset}/recipe*.json")):
            found[f"{path.stem} {dataset}"] = json.loads(path.read_text())
    as_metrics = lambda seeds: {seed: {"numbers": numbers} for seed, numbers in seeds.items()}  # noqa: E731
    return {table: table_numbers({column: as_metrics(seeds) for column, seeds in columns.items()})
            for table, columns in found.items()}


def long_tables(everything, folder):
    """The whole text of TABLES.md: every number of every variant, further claims, other_tables, the benchmark."""
    parts = ["# Long tables", f"Written by `python final_evaluation.py`. {NOTE}. A number's name is its place in "
             "metrics.json. `nfe` counts the sampler's steps, in each of which guided evaluates two U-Nets. `train "
             "minutes` contain neither the fits of priors nor networks that were trained before, except that guided "
             "contains form1. training/skipped, elbo, s constant and s zero are from earlier code. Recipes of shapes "
             "that name no other had a beta of 0.25, a mixture of 20 and 1,000 steps. README.md explains other words."]
    for dataset, results in everything.items():
        for stage in ("stage1", "stage2", "stage3", "bonus"):
            columns = {variant: seeds for variant, seeds in results.items() if variant.startswith(stage)}
            if columns:
                parts += [f"## {dataset}, {stage}", describe_data(dataset, results), table_numbers(columns)]
    parts += ["## further claims", table_claims(everything, FURTHER_CLAIMS)]
    parts += [f"## {name}\n\n{table}" for name, table in other_tables(folder).items()]
    parts += [f"## benchmark\n\n```\n{path.read_text().strip()}\n```" for path in Path(folder).glob("benchmark.txt")]
    return "\n\n".join(parts) + "\n"


def draw_charts(path, dataset, results):
    """Save a chart for each of PANELS. Each variant with two of its points or more gets a line of means over seeds."""
    panels = []
    for x_axis, (patterns, points) in PANELS.items():
        lines = {}
        for variant, seeds in results.items():
            values = {x: values_by_seed(seeds, name).values() for x, name in points.items()}
            means = {x: statistics.mean(fds) for x, fds in values.items() if fds}
            if any(fnmatch(variant, pattern) for pattern in patterns.split()) and len(means) > 1:
                lines[variant] = tuple(means), tuple(means.values())
        panels += [{"title": dataset, "x": x_axis, "y": "fd", "lines": lines, "log_y": True}] if lines else []
    if panels:
        common.save_chart(path, panels)


def fill(text, tables):
    """The text with its marked tables written anew. Exits, naming the table, if one is not known."""
    if unknown := [name for name in re.findall("<!-- table (.+?) -->", text) if name not in tables]:
        common.fail(f"table '{unknown[0]}' is not known; known are {', '.join(tables)}")
    return re.sub("(<!-- table (.+?) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}", text, flags=re.DOTALL)


def draw_sheet(path, home):
    """One picture of all stages: the top third of samples.png of each run of SHEET in `home`, under the run's name."""
    images = {name: Image.open(file) for name in SHEET if (file := home / f"{name}-s0" / "samples.png").is_file()}
    heights = [20 + image.height // 3 for image in images.values()]  # with 20 pixels for the name
    page = Image.new("RGB", (max(image.width for image in images.values()), sum(heights)), "white")
    for k, (name, image) in enumerate(images.items()):
        y = sum(heights[:k])
        ImageDraw.Draw(page).text((4, y + 4), name, fill="black")
        page.paste(image.crop((0, 0, image.width, image.height // 3)), (0, y + 20))
    common.write_with(path, page.save, format="png")


def collect(runs, folder):
    """Copy metrics, and the figures that a text shows, from run folders into FOLDER/DATASET. For the runs in WEIGHTS,
    at the cpu budget, also write weights: 6 MB each at most, without the encoder, matrices in half precision."""
    chosen = {}  # {the file that metrics will be copied to: (run folder, facts about the run)}
    for run in map(Path, runs):  # all runs are checked before anything is written
        facts = load_metrics(run / "metrics.json")["run"]
        target = Path(folder) / facts["dataset"] / f"{facts['variant']}-s{facts['seed']}.json"
        if facts["dataset"] not in common.DATASETS or facts["crop"] == "centre":  # a user's folder may be named cifar10
            print(f"{run}: of a user's own images, not collected")
            continue
        if target in chosen:
            common.fail(f"{chosen[target][0]} and {run} would both become {target}; leave one out; nothing was written")
        budget = load_metrics(target)["run"]["budget"] if target.is_file() else "none yet"
        if facts["budget"] == "smoke" or budget not in ("none yet", facts["budget"]):  # smoke runs measure nothing
            common.fail(f"{run}/metrics.json (budget {facts['budget']}) must not become {target} (budget {budget}); "
                        "leave it out; nothing was written")
        chosen[target] = run, facts
    texts = "".join((ROOT / name).read_text() for name in ("README.md", "REPORT.md"))
    written, before = list(chosen), set(Path(folder).rglob("*"))
    for target, (run, facts) in chosen.items():
        home, name = target.parent, target.stem  # FOLDER/DATASET, VARIANT-sSEED
        common.write(target, (run / "metrics.json").read_bytes())
        if name in WEIGHTS and facts["budget"] == "cpu" and (run / "checkpoint.pt").is_file():
            file_name, *parts = WEIGHTS[name]  # parts: those that the file keeps
            state = common.load_checkpoint(run / "checkpoint.pt")
            state["vae"] = {key: value for key, value in state["vae"].items() if key.startswith("decoder.")}
            kept = {"train": state["train"], "seconds": state["seconds"]}
            kept |= {part: common.half(state[part]) for part in parts}
            written.append(common.save_state(home / f"{file_name}-*.pt", kept))
            for older in {*common.find_hashed(home, file_name)} - {written[-1]}:
                older.unlink()
                print(f"removed: {older}")
        for figure in run.glob("*.png"):
            public = facts["dataset"] == "shapes" or figure.stem not in SHOW_REAL_IMAGES
            if public and f"(results/{facts['dataset']}/{name}-{figure.name})" in texts:
                written.append(home / f"{name}-{figure.name}")
                common.write(written[-1], figure.read_bytes())
        if run.name in (f"{variant}-s0" for variant in SHEET):
            written.append(Path(folder) / "figures" / f"{facts['dataset']}-sheet.png")
            draw_sheet(written[-1], run.parent)
    for path in sorted(set(written)):
        print(f"{'replaced' if path in before else 'written'}: {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables, charts and tests of claims from results; trains nothing")
    parser.error = common.fail
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of committed results")
    parser.add_argument("--runs", help="read new runs from this folder, and write REPORT.md there")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--collect", nargs="+", metavar="RUN", help="copy these run folders into --results, and stop")
    modes.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a text would change")
    args = parser.parse_args(argv)
    if args.collect:
        return collect(args.collect, args.results)
    source = Path(args.runs or args.results)
    committed = load_all(path for dataset in common.DATASETS  # results of a user's own images stay among the runs
                         for path in Path(args.results).glob(f"{dataset}/*-s[0-9]*.json"))
    new_paths = (path for path in source.glob("*/*/metrics.json") if not path.parts[-3].endswith("-smoke"))
    everything = load_all(new_paths) if args.runs else committed
    if not everything:
        common.fail(f"{source}: no results there; run a stage first, for instance python stage1_baseline.py")
    tables = {"claims": table_claims(everything, CLAIMS)}
    tables |= {name: table_of(everything, *arguments) for name, arguments in TABLES.items()}
    if args.runs:
        tables = {f"reproduced: {dataset}": table_reproduced(results, committed.get(dataset, {}))
                  for dataset, results in everything.items()} | tables
        texts = {source / "REPORT.md": "\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()) + "\n"}
    else:
        tables |= other_tables(source)
        texts = {ROOT / name: fill((ROOT / name).read_text(), tables) for name in ("README.md", "REPORT.md")}
        texts[source / "TABLES.md"] = long_tables(everything, source)
    changed = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    if args.check:
        print(f"would change: {', '.join(map(str, changed))}" if changed else "texts agree with the results")
        raise SystemExit(bool(changed))
    for path in changed:
        common.write(path, texts[path].encode())
    for dataset, results in everything.items():
        draw_charts(source / ("" if args.runs else "figures") / f"{dataset}-comparison.png", dataset, results)
        print(tables.get(f"reproduced: {dataset}", f"{dataset}: {len(results)} variants"))
    print("written:", *(changed or ["nothing, texts agree with the results"]))


if __name__ == "__main__":
    main()
