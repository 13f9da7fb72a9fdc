"""Final evaluation: how finished runs take noise, what their latent space is like, what they cost; then tables, charts,
and the four questions of the assignment, answered by numbers. It trains nothing.

    Quality      Does joint training improve fd? By how much?
    Efficiency   How does adaptive conditioning affect sampling time?
    Robustness   How does each model handle noisy VAE outputs?
    Coherence    Is the latent space smoother or more interpretable with joint training?

A run's folder holds metrics.json, which its stage wrote, and evaluation.json, which this script writes. Both are lists
of rows. results/scores.csv has all of them as one flat table: a line for each measure of each run.

An answer compares two sides, such as joint training and stage 1, which have the same seeds. It says by how many percent
the two means differ, how many seeds there are, and how easily chance alone would do that: the p-value of a paired
t-test on log(ours / theirs), times the number of such tests on the data set (Bonferroni).

Run     python final_evaluation.py --measure runs/shapes-cpu/*     robustness and latent space of these runs
        python final_evaluation.py --times runs/shapes-cpu/*       seconds per image: medians of runs in turn
        python final_evaluation.py --collect runs/shapes-cpu/*     their rows -> results/scores.csv
        python final_evaluation.py                 results/scores.csv -> results/TABLES.md, charts in results/figures/
        python final_evaluation.py --runs runs/shapes-cpu       new runs of a folder -> REPORT.md in it, with their
                                                                ratios to results/scores.csv

Contents: 1 measuring runs, 2 the table of scores, 3 comparing, 4 tables, 5 charts, 6 the command.
"""

import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy.stats import ttest_1samp
from torchvision.transforms.functional import gaussian_blur

import bonus_latent
import common
import fid
import stage1_baseline
import stage2_joint
import stage3_adaptive
from common import randn

RESULTS = Path(__file__).resolve().parent / "results"
STAGES = {"stage1": stage1_baseline, "stage2": stage2_joint, "stage3": stage3_adaptive, "bonus": bonus_latent}

# ---- 1. Measuring runs -----------------------------------------------------------------------------------------------

NOISE = (0.1, 0.2, 0.4)  # sd of the noise on x_hat, which spans -1..1, or on a diffused latent, whose sd is about 1


def load_run(folder, device):
    """The stage (a module), the model and the settings of a finished run."""
    settings = json.loads((folder / "metrics.json").read_text())["run"]["settings"]
    stage = STAGES[folder.name.split("-")[0]]
    return stage, stage.load_model(common.load_state(folder / "checkpoint.pt"), device), settings


def robustness(folder, stage, model, settings, scorer):
    """Rows with the Frechet distance of samples whose x_hat was spoilt before refinement, or whose latent before
    decoding: by noise; by a blur; and, where there is a code, by noise on it. Codes and the noise of sampling are the
    same in all. (Of a VAE alone, these are the distances of the spoilt x_hat itself.) Draws robustness.png."""
    z = stage.draw_codes(model, settings, settings["probe_samples"])
    gen = common.generator(settings["seed"], "corruption")
    corruptions = {"nothing": (z, None)}
    for sd in NOISE:
        corruptions[f"noise {sd}"] = z, lambda x, sd=sd: x + sd * randn(x.shape, gen).to(x.device)
    for sd in (1, 2):  # in pixels
        corruptions[f"blur {sd}"] = z, lambda x, sd=sd: gaussian_blur(x, 6 * sd + 1, sd)
    if z.shape[1]:
        corruptions["noise 0.5 on z"] = z + 0.5 * randn(z.shape, gen), None
    rows, pictures = [], {}
    for label, (codes, corrupt) in corruptions.items():
        _, images = stage.generate(model, settings, codes, corrupt)
        rows.append({"label": label, "n_generated": len(images), "fd": scorer.fd(images)})
        pictures[label] = images[:12]
    common.save_grid(folder / "robustness.png", pictures)
    mean = statistics.mean(row["fd"] for row in rows if row["label"] in [f"noise {sd}" for sd in NOISE])
    return [*rows, {"label": "mean over noise", "n_generated": len(z), "fd": mean}]


def to_nearest(x, training):
    """The mean distance of the rows of x (N, d) from the nearest row of `training` (M, d)."""
    return float(torch.cat([torch.cdist(part, training).min(1)[0] for part in x.cpu().split(500)]).mean())


def path_over_distance(features):
    """How directly one image turns into another, from features (P, K, f) of the K images along each of P paths: the
    mean length of the paths over the mean distance of their ends. 1 is a straight line."""
    lengths = (features[:, 1:] - features[:, :-1]).norm(dim=2).sum(1)  # (P,)
    ends = (features[:, -1] - features[:, 0]).norm(dim=1)  # (P,)
    return float(lengths.mean() / ends.mean())


def ridge_regression(x, y, ridge=1e-3):
    """Linear regression, y ~ x @ weight + bias: x (N, d), y (N, k) -> weight (d, k), bias (k,). x is standardised, so
    that the penalty ridge * N * |weight|^2 does not depend on its units."""
    mean, sd = x.mean(0), x.std(0).clamp(min=1e-6)
    a = (x - mean) / sd
    penalty = ridge * len(a) * torch.eye(a.shape[1])
    weight = torch.linalg.solve(a.T @ a + penalty, a.T @ (y - y.mean(0)))  # (d, k), for standardised x
    weight = weight / sd[:, None]
    return weight, y.mean(0) - mean @ weight


def latent_space(folder, stage, model, settings, scorer, pairs=16, points=9):
    """A row on the latent space of a VAE and its refiner, measured on held-out images. Their codes are the means of
    q(z|x).

        kl_nats                     how much a code tells of its image, in nats
        log_density PRIOR           mean log density of codes under each prior, in nats
        novelty PRIOR               distance of the prior's codes from the nearest training code, over that of codes of
                                    held-out images: far below 1, the prior has learned training codes by heart
        path_over_distance          of refined images along paths between codes, in features
        probe_accuracy, probe_r2    how well a linear function of the code tells an image's class and, of shapes, the
                                    numbers that it was drawn from (mean over these)

    Draws reconstructions.png."""
    train, test = scorer.data.train, scorer.data.test
    mu, logvar = common.encode(model.vae.encoder, test.images, model.device)  # (N, d)
    x_hat, images = stage.generate(model, settings, mu[:12])
    common.save_grid(folder / "reconstructions.png", {"real": test.images[:12], "VAE": x_hat, "refined": images})
    row = {"label": "", "n_generated": len(mu), "kl_nats": float(common.gaussian_kl(mu, logvar).mean())}
    draws = common.reparameterise(mu, logvar, randn(mu.shape, common.generator(settings["seed"], "held-out codes")))
    train_mu, _ = common.encode(model.vae.encoder, train.images, model.device)
    for name, prior in model.priors.items():
        row[f"log_density {name}"] = float(prior.log_prob(draws).mean())
        codes = prior.sample(len(draws), common.generator(settings["seed"], "codes"))
        row[f"novelty {name}"] = to_nearest(codes, train_mu) / to_nearest(draws, train_mu)

    pairs = min(pairs, len(mu) // 2)
    features = []
    for w in torch.linspace(0, 1, points).tolist():
        _, images = stage.generate(model, settings, stage2_joint.slerp(mu[:pairs], mu[pairs : 2 * pairs], w))
        features.append(fid.extract(scorer.extractor, images)[0])  # (pairs, f)
    row["path_over_distance"] = path_over_distance(torch.stack(features, 1))

    chosen = torch.randperm(len(train.images), generator=common.generator(0, "probe"))[:5000]  # enough to fit d weights
    train_mu = train_mu[chosen]
    if train.labels is not None:
        weight, bias = ridge_regression(train_mu, F.one_hot(train.labels[chosen]).float())
        row["probe_accuracy"] = float(((mu @ weight + bias).argmax(1) == test.labels).float().mean())
    if train.factors is not None:
        weight, bias = ridge_regression(train_mu, train.factors[chosen])
        errors = (mu @ weight + bias - test.factors).square().mean(0)
        row["probe_r2"] = float((1 - errors / test.factors.var(0)).mean())
    return [row]


def write_rows(folder, rows):
    """Write rows into the folder's evaluation.json, in place of older ones with the same labels."""
    path = folder / "evaluation.json"
    labels = {row["label"] for row in rows}
    kept = [row for row in json.loads(path.read_text()) if row["label"] not in labels] if path.is_file() else []
    path.write_text(json.dumps(kept + rows, indent=1, allow_nan=False) + "\n")


def measure(folders, device, data_dir):
    """Measure finished runs."""
    scorers = {}
    for folder in common.bar(folders, desc="measuring", unit="run"):
        stage, model, settings = load_run(folder, device)
        features, dataset = settings["features"], settings["dataset"]
        if (features, dataset) not in scorers:
            extractor = fid.load_extractor(features, device=device)
            scorers[features, dataset] = fid.Scorer(extractor, common.load_data(dataset, data_dir))
        scorer = scorers[features, dataset]
        rows = robustness(folder, stage, model, settings, scorer)
        if model.priors and "stage1-vae-" not in folder.name and "stage3-vae-" not in folder.name:
            rows += latent_space(folder, stage, model, settings, scorer)
        write_rows(folder, rows)


def measure_times(folders, device, repeats=5):
    """Measure the seconds per image of finished runs: the median of `repeats` batches each. The runs take turns, so
    that a machine that slows down slows all of them. The first round warms up."""
    runs = {folder: load_run(folder, device) for folder in folders}
    seconds = {folder: [] for folder in folders}
    for _ in common.bar(range(repeats + 1), desc="rounds"):
        for folder, (stage, model, settings) in runs.items():
            z = stage.draw_codes(model, settings, settings["eval_batch"])
            clock = time.time()
            stage.generate(model, settings, z)
            seconds[folder].append((time.time() - clock) / len(z))
    for folder, values in seconds.items():
        write_rows(folder, [{"label": "timed", "seconds_per_image": statistics.median(values[1:])}])
        print(f"{folder.name:34}{1000 * statistics.median(values[1:]):8.2f} ms per image")


# ---- 2. The table of scores ------------------------------------------------------------------------------------------

COLUMNS = ["dataset", "variant", "changes", "seed", "measure", "value", "low", "high", "images", "features", "commit",
           "budget", "data"]
FACTS = ("prior", "sampler", "label", "n_generated")  # keys of a row that are not measures


def read_run(folder):
    """The lines of the table that a run's folder makes, dictionaries of COLUMNS. A measure is called as in the row,
    with the row's label, such as "fd, dpm 5"."""
    metrics = json.loads((folder / "metrics.json").read_text())
    run, rows = metrics["run"], metrics["rows"]
    rows = [*rows, {"label": "", "minutes": run["minutes"], "parameters": run["parameters"]}]
    if (folder / "evaluation.json").is_file():
        rows += json.loads((folder / "evaluation.json").read_text())
    changes = " ".join(f"{key}={value}" for key, value in run["changes"].items())
    lines = []
    for row in rows:
        for key in row.keys() - FACTS:
            score = row[key] if isinstance(row[key], dict) else {"value": row[key]}
            lines.append({"dataset": run["dataset"], "variant": run["variant"], "changes": changes,
                          "seed": str(run["seed"]), "measure": f"{key}, {row['label']}".removesuffix(", "),
                          **{name: f"{number:.6g}" for name, number in score.items()},
                          "images": str(row.get("n_generated", "")), "features": run["features"],
                          "commit": run["commit"], "budget": run["budget"], "data": run["data_note"]})
    return lines


def read_scores():
    with (RESULTS / "scores.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def collect(folders):
    """Put the lines of finished runs into results/scores.csv, in place of older ones of the same runs."""
    def run_of(line):
        return line["dataset"], line["variant"], line["changes"], line["seed"]

    new = [line for folder in folders for line in read_run(folder)]
    renewed = {run_of(line) for line in new}
    lines = [line for line in read_scores() if run_of(line) not in renewed] + new
    with (RESULTS / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(lines, key=lambda line: (*run_of(line), line["measure"])))


def grouped(lines):
    """Lines of the table -> {data set: {name: {measure: {seed: value}}}}, where a name is a variant with its changes,
    in the order of the lessons."""
    def order(line):
        datasets, variants = [*common.DATASETS, line["dataset"]], [*VARIANTS, line["variant"]]  # unlisted ones last
        return datasets.index(line["dataset"]), variants.index(line["variant"]), line["changes"], int(line["seed"])

    results = {}
    for line in sorted(lines, key=order):
        name = f"{line['variant']} {line['changes']}".strip()
        measures = results.setdefault(line["dataset"], {}).setdefault(name, {})
        measures.setdefault(line["measure"], {})[int(line["seed"])] = float(line["value"])
    return results


# ---- 3. Comparing ----------------------------------------------------------------------------------------------------

FORM1 = "stage1-form1"  # the baseline
ANNEAL, NO_GRADIENT = "stage2-anneal", "stage2-anneal-grad-none"  # joint training, and its control
LOW_WEIGHT = f"{ANNEAL} diffusion_weight=0.003"  # a tenth of the weight
FILM = "stage3-flow-film"
VARIANTS = ("stage1-vae", "stage1-uncond", FORM1, "stage1-form2", "stage1-guided", "stage1-augmented", "stage2-sum",
            ANNEAL, NO_GRADIENT, "stage2-kendall", "stage2-bound", "stage3-vae-flow", "stage3-flow-fixed",
            "stage3-flow-fade", "stage3-flow-fade-posterior", FILM, "stage3-flow-coupling", "bonus-latent")
NOISY = "fd, mean over noise"

# Question: comparisons, each in words, with a name and a measure on each of its two sides
QUESTIONS = {
    "Quality: does joint training improve fd?": [
        ("fd: joint training / stage 1", (ANNEAL, "fd"), (FORM1, "fd")),
        ("fd: joint training, a tenth of the weight / stage 1", (LOW_WEIGHT, "fd"), (FORM1, "fd")),
        ("fd: without the refiner's gradient / stage 1", (NO_GRADIENT, "fd"), (FORM1, "fd")),
        ("fd: a tenth of the weight / without the refiner's gradient", (LOW_WEIGHT, "fd"), (NO_GRADIENT, "fd")),
    ],
    "Efficiency: how does adaptive conditioning affect sampling time?": [
        (f"{words}: refining the unsure third / {other}", (FILM, f"{measure}, refine unsure third, gmm"),
         (FILM, f"{measure}, refine {theirs}, gmm"))
        for words, measure, other, theirs in (
            ("seconds", "seconds_per_image", "all", "all"),
            ("fd", "fd", "all", "all"),
            ("fd", "fd", "another third", "unsure third, shuffled"),
        )
    ],
    "Robustness: how does each model handle noisy VAE outputs?": [
        (f"fd under noise: {words} / stage 1", (name, NOISY), (FORM1, NOISY))
        for words, name in (
            ("joint training", ANNEAL),
            ("without the refiner's gradient", NO_GRADIENT),
            ("stage 1 with noise in training", "stage1-augmented"),
            ("guided", "stage1-guided"),
            ("film", FILM),
        )
    ],
    "Coherence: is the latent space smoother or more interpretable with joint training?": [
        (f"{words}: joint training / stage 1", (ANNEAL, measure), (FORM1, measure))
        for words, measure in (
            ("length of paths", "path_over_distance"),
            ("R² of a linear probe", "probe_r2"),
            ("accuracy of a linear probe", "probe_accuracy"),
        )
    ],
}


def ratios(runs, ours, theirs):
    """Two sides (name, measure) -> ours / theirs, of the seeds that both have, and by how many percent our mean is
    higher."""
    ours, theirs = (runs.get(name, {}).get(measure, {}) for name, measure in (ours, theirs))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return np.array([]), None
    percent = 100 * (sum(ours[seed] for seed in seeds) / sum(theirs[seed] for seed in seeds) - 1)
    return np.array([ours[seed] / theirs[seed] for seed in seeds]), percent


def p_value(found):
    """Of the paired t-test on the logarithms of ratios; None if there is nothing to test: fewer than four seeds, or
    ratios that are all the same."""
    if len(found) < 4 or np.ptp(np.log(found)) < 1e-9:
        return None
    return float(ttest_1samp(np.log(found), 0).pvalue)


# ---- 4. Tables -------------------------------------------------------------------------------------------------------

# Heading: beginnings of names, measures
TABLES = {
    "scores": ("", ("fd", "fd, before", "is", "kid", "precision", "recall", "diversity", "hf_energy")),
    "losses": ((FORM1, "stage2-"),
               ("fd", "hf_energy", "kl_nats", NOISY, "path_over_distance", "probe_r2", "probe_accuracy")),
    "conditioning: fd of reconstructions": (
        "stage3-flow", ["rank_correlation, s", *(f"fd_to_originals, {label}" for label in (
            "own s", "shuffled s", "sure third, VAE", "sure third", "unsure third, VAE", "unsure third"))]),
    "conditioning: strategies, codes of the mixture": ("stage3-flow", [f"fd, refine {strategy}, gmm" for strategy in (
        "all", "unsure third", "unsure third, shuffled", "two steps", "by s", "by s, shuffled")]),
    "conditioning: strategies, codes of the flow": ("stage3-flow", [f"fd, refine {strategy}, flow" for strategy in (
        "all", "unsure third", "unsure third, shuffled", "two steps", "by s", "by s, shuffled")]),
    "robustness": ("", ["fd, nothing", *(f"fd, noise {sd}" for sd in NOISE), NOISY, "fd, blur 1", "fd, blur 2",
                        "fd, noise 0.5 on z"]),
    "steps": ("", ("fd, ddim 5", "fd, dpm 2", "fd, dpm 5", "fd, dpm 10", "fd, dpm 25")),
    "cost": ("", ("seconds_per_image", "seconds_per_image, timed", "nfe", "minutes", "parameters")),
    "cost: what latent diffusion saves": (
        "bonus-", ("seconds_per_image, saved %", "peak_memory_mb, saved %", "gflops_per_image, saved %", "fd",
                   "fd, ceiling")),
    "priors": ((FORM1, "stage3-"), [f"{measure}{prior}" for measure in ("fd, ", "log_density ", "novelty ")
                                    for prior in ("gaussian", "gmm", "flow")]),
}


def show(value, digits=3):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def spread(numbers):
    """The standard deviation of a list of numbers; 0 of a single one."""
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0


def show_mean(numbers):
    """A list of numbers as text: mean ± standard deviation."""
    mean, sd = np.mean(numbers), spread(numbers)
    return show(mean) + (f"±{show(sd, 2)}" if sd > 1e-9 * abs(mean) else "")


def markdown(header, rows):
    """A table as text, without columns that are empty. No text if there are no rows."""
    if not rows:
        return ""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    header, *rows = zip(*columns, strict=True)
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def table_of(results, beginnings, measures):
    """One of TABLES as text: a row for each name, a column for each measure."""
    rows = []
    for dataset, runs in results.items():
        for name, values in runs.items():
            cells = [show_mean([*values[measure].values()]) if measure in values else "" for measure in measures]
            if name.startswith(beginnings) and any(cells):
                seeds = max(map(len, values.values()))
                rows.append([dataset, f"`{name}`", str(seeds), *cells])
    return markdown(["data", "run", "seeds", *measures], rows)


def table_questions(results):
    """The answers to QUESTIONS: a row for each comparison, a column for each data set. p-values are multiplied by the
    number of tests of their data set."""
    rows = [[f"{question.split(':')[0]}. {words}"] for question, comparisons in QUESTIONS.items()
            for words, _, _ in comparisons]
    for runs in results.values():
        found = [ratios(runs, ours, theirs) for comparisons in QUESTIONS.values() for _, ours, theirs in comparisons]
        p_values = [p_value(values) for values, _ in found]
        tests = sum(p is not None for p in p_values)
        for row, (values, percent), p in zip(rows, found, p_values, strict=True):
            cell = "" if percent is None else f"{percent:+.0f}%, n {len(values)}"
            row.append(cell if p is None else f"{cell}, p {min(1.0, tests * p):.2g}")
    return markdown(["comparison", *results], [row for row in rows if any(row[1:])])


def table_data(lines):
    """What was measured, and on what: a row for each data set and commit of training."""
    counts = {}
    for line in lines:
        if line["measure"] == "fd":
            key = tuple(line[column] for column in ("dataset", "data", "budget", "images", "features", "commit"))
            counts[key] = counts.get(key, 0) + 1
    return markdown(["data", "note", "budget", "images of fd", "features", "commit of training", "runs"],
                    [[*key, str(count)] for key, count in counts.items()])


def table_reproduced(results, committed):
    """The headline scores of each new run; if a run of the same name and seed is committed, its score, too, and the
    ratio."""
    measures = ("fd", "is", "kid", "precision", "recall", "hf_energy", "minutes")
    rows = []
    for dataset, runs in results.items():
        for name, values in runs.items():
            for seed in values["fd"]:
                cells = []
                for measure in measures:
                    ours = values.get(measure, {}).get(seed)
                    theirs = committed.get(dataset, {}).get(name, {}).get(measure, {}).get(seed)
                    text = "" if ours is None else show(ours)
                    cells.append(f"{text} / {show(theirs)} = {ours / theirs:.2f}" if ours and theirs else text)
                rows.append([dataset, f"`{name}` seed {seed}", *cells])
    return markdown(["data", "run", *measures], rows)


def write_tables(lines, path, figures, committed=None):
    """Write all tables into the file `path`, and all charts into the folder `figures`."""
    results = grouped(lines)
    tables = {}
    if committed is not None:
        tables["here / committed = ratio"] = table_reproduced(results, committed)
    tables["questions"] = table_questions(results)
    for heading, (beginnings, measures) in TABLES.items():
        tables[heading] = table_of(results, beginnings, measures)
    tables["data: runs of one data set can be compared if they have one commit"] = table_data(lines)
    text = ("# Tables\n\nWritten by `python final_evaluation.py`. Mean±sd over seeds. fd: Frechet distance in the "
            "features of table *data*. n: seeds. p: paired t-test, times the number of tests of the "
            "data set.\n")
    text += "".join(f"\n## {heading}\n\n{table}" for heading, table in tables.items() if table)
    for chart in draw_charts(results, figures):
        text += f"\n![{chart.stem}]({chart.relative_to(path.parent)})\n"
    path.write_text(text)
    print(path)


# ---- 5. Charts -------------------------------------------------------------------------------------------------------

def points_of(runs, name, *places):
    """The points of a line: for each place (measure or number of x, measure of y) the values of all seeds."""
    values = runs.get(name, {})
    points = []
    for x, y in places:
        xs = [x] if not isinstance(x, str) else [*values.get(x, {}).values()]
        if xs and y in values:
            points.append((xs, [*values[y].values()]))
    return points


def lines_of_cost(runs):
    """fd against seconds per image: a point for each number of steps."""
    places = [(f"seconds_per_image, dpm {steps}", f"fd, dpm {steps}") for steps in (2, 5, 10, 25)]
    return {name: points_of(runs, name, *places)
            for name in ("stage1-uncond", FORM1, "stage1-guided", ANNEAL, "bonus-latent")}


def lines_of_noise(runs):
    """fd against the sd of noise on x_hat."""
    places = [(0.0, "fd, nothing"), *((sd, f"fd, noise {sd}") for sd in NOISE)]
    return {name: points_of(runs, name, *places) for name in (FORM1, "stage1-augmented", ANNEAL, NO_GRADIENT, FILM)}


def lines_of_weights(runs):
    """fd against the weight of the diffusion loss; stage 1 and the control without its gradient as level lines."""
    default = common.DEFAULTS["diffusion_weight"]
    weights = {ANNEAL: default}
    for name in runs:
        if name.startswith(f"{ANNEAL} diffusion_weight=") and " " not in name.split("=")[1]:
            weights[name] = float(name.split("=")[1])
    weights = dict(sorted(weights.items(), key=lambda item: item[1]))
    lines = {ANNEAL: [point for name, weight in weights.items() for point in points_of(runs, name, (weight, "fd"))]}
    for name in (FORM1, NO_GRADIENT):
        lines[name] = points_of(runs, name, *((weight, "fd") for weight in weights.values()))
    return lines if len(weights) > 1 else {}


def lines_of_thirds(runs):
    """fd against evaluations of the U-Net per image: a point for each strategy, with codes of the mixture."""
    return {strategy: points_of(runs, FILM, (f"nfe, refine {strategy}, gmm", f"fd, refine {strategy}, gmm"))
            for strategy in ("all", "unsure third", "unsure third, shuffled", "two steps", "by s", "by s, shuffled")}


CHARTS = {  # name: function, label and scale of the x axis
    "cost": (lines_of_cost, "seconds per image", "log"),
    "noise": (lines_of_noise, "sd of noise on x_hat", "linear"),
    "weights": (lines_of_weights, "diffusion_weight", "log"),
    "thirds": (lines_of_thirds, "evaluations of the U-Net per image", "linear"),
}


def plain_ticks(axis):
    """Write 0.2, 0.3, 0.5, 1, ..., not powers of ten, at the ticks of a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def draw_lines(path, panels, x_label, x_scale):
    """Draw {data set: {label: [(values of x, values of y)]}}, a panel for each data set: means, with bars of one
    standard deviation. Shuffled controls have empty dots."""
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles = {}
    for axis, (dataset, lines) in zip(axes, panels.items(), strict=True):
        for i, (label, points) in enumerate(lines.items()):
            if points:
                handles[label] = axis.errorbar(
                    [np.mean(x) for x, _ in points], [np.mean(y) for _, y in points], [spread(y) for _, y in points],
                    marker="o", color=f"C{i}", markerfacecolor="white" if "shuffled" in label else f"C{i}")
        axis.set(title=dataset, xlabel=x_label, xscale=x_scale, yscale="log")
        plain_ticks(axis.yaxis)
        if x_scale == "log":
            plain_ticks(axis.xaxis)
    axes[0].set_ylabel("fd")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def draw_ratios(path, results):
    """Draw the ratios of QUESTIONS, a panel for each data set: a dot for each seed, and with four seeds a bar over the
    95% interval of their mean."""
    rows = [(f"{question.split(':')[0]}. {words}", ours, theirs) for question, comparisons in QUESTIONS.items()
            for words, ours, theirs in comparisons]
    figure = Figure(figsize=(4 + 4 * len(results), 1.5 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (dataset, runs) in zip(axes, results.items(), strict=True):
        axis.axvline(1, color="grey")
        for y, (_, ours, theirs) in enumerate(rows):
            found, _ = ratios(runs, ours, theirs)
            if p_value(found) is not None:
                axis.plot(np.exp(ttest_1samp(np.log(found), 0).confidence_interval()), [y, y], color="black")
            axis.plot(found, [y] * len(found), "o", color="C0", alpha=0.6)
        axis.set(title=dataset, xlabel="ratio", xscale="log", yticks=range(len(rows)),
                 yticklabels=[words for words, _, _ in rows])
        plain_ticks(axis.xaxis)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def draw_charts(results, folder):
    """Draw all charts for which there are numbers. Returns their paths."""
    folder.mkdir(exist_ok=True)
    with_baseline = {dataset: runs for dataset, runs in results.items() if FORM1 in runs}
    paths = []
    if with_baseline:
        paths.append(folder / "questions.png")
        draw_ratios(paths[-1], with_baseline)
    for name, (lines_of, x_label, x_scale) in CHARTS.items():
        panels = {dataset: lines_of(runs) for dataset, runs in results.items()}
        panels = {dataset: lines for dataset, lines in panels.items() if any(lines.values())}
        if panels:
            paths.append(folder / f"{name}.png")
            draw_lines(paths[-1], panels, x_label, x_scale)
    return paths


# ---- 6. The command --------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description="Final evaluation: measures finished runs; tables and charts")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--measure", nargs="+", metavar="RUN", help="measure robustness and latent space of runs")
    choice.add_argument("--times", nargs="+", metavar="RUN", help="measure the seconds per image of runs, in turn")
    choice.add_argument("--collect", nargs="+", metavar="RUN", help="put the rows of runs into results/scores.csv")
    choice.add_argument("--runs", metavar="FOLDER", help="measure the runs in FOLDER, and write FOLDER/REPORT.md")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--data-dir", default="data", help="as in training (default: data)")
    args = parser.parse_args(argv)
    chosen = args.measure or args.times or args.collect or ([] if args.runs is None else Path(args.runs).glob("*"))
    folders = [folder for folder in sorted(map(Path, chosen)) if (folder / "metrics.json").is_file()]
    if not folders and (chosen or args.runs):
        common.fail("no finished runs there: folders with a metrics.json")
    if args.measure:
        measure(folders, common.choose_device(args.device), args.data_dir)
    elif args.times:
        measure_times(folders, common.choose_device(args.device))
    elif args.collect:
        collect(folders)
    elif args.runs:
        unmeasured = [folder for folder in folders if not (folder / "evaluation.json").is_file()]
        measure(unmeasured, common.choose_device(args.device), args.data_dir)
        lines = [line for folder in folders for line in read_run(folder)]
        write_tables(lines, Path(args.runs) / "REPORT.md", Path(args.runs), grouped(read_scores()))
    else:
        write_tables(read_scores(), RESULTS / "TABLES.md", RESULTS / "figures")


if __name__ == "__main__":
    main()
