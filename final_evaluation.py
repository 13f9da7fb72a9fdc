"""Final evaluation: tables, charts, and the four questions of the assignment, answered by numbers. It trains nothing.

    Quality      Does joint training improve fd? By how much?
    Efficiency   How does adaptive conditioning affect sampling time?
    Robustness   How does each model handle noisy VAE outputs?
    Coherence    Is the latent space smoother or more interpretable with joint training?

Each run of a stage leaves a metrics.json. In results/ it is the file DATASET/VARIANT[-KEY=VALUE...]-sSEED.json, where
KEY=VALUE are its changes by --set. Runs that differ only in the seed make one row of a table.

An answer compares two sides, such as joint training and stage 1, which have the same seeds. It says by how many percent
the two means differ, how many seeds there are, and how easily chance alone would do that: the p-value of a paired
t-test on log(ours / theirs). There are four questions, so p-values are multiplied by four (Bonferroni).

Run     python final_evaluation.py --collect runs/shapes-cpu/*     copies finished runs' metrics.json into results/
        python final_evaluation.py                 results/ -> results/TABLES.md and the charts in results/figures/
        python final_evaluation.py --runs runs     new runs -> runs/REPORT.md, with their ratios to results/
        python final_evaluation.py --check         are the results comparable, do the pictures of the texts exist?

Contents: 1 what is measured and compared, 2 reading results, 3 comparing, 4 tables, 5 charts, 6 the command.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy.stats import ttest_1samp

import common

RESULTS = Path(__file__).resolve().parent / "results"

# ---- 1. What is measured and compared --------------------------------------------------------------------------------

FORM1 = "stage1-form1"  # the baseline
ANNEAL, NO_GRADIENT = "stage2-anneal", "stage2-anneal-grad-none"  # joint training, and its control
LOW_WEIGHT = f"{ANNEAL}-diffusion_weight=0.003"  # a tenth of the weight
FILM = "stage3-flow-film"

VARIANTS = (  # in the order of the lessons
    "stage1-vae", "stage1-uncond", FORM1, "stage1-form2", "stage1-guided", "stage1-augmented",
    "stage2-sum", ANNEAL, NO_GRADIENT, "stage2-kendall", "stage2-bound",
    "stage3-vae-flow", "stage3-flow-fixed", "stage3-flow-fade", "stage3-flow-fade-posterior", FILM,
    "stage3-flow-coupling", "bonus-latent",
)

# Settings in which the budgets depart from the paper. A run that changes only these tells what such a departure does.
DEPARTURES = {"objective", "unet_muon_lr", "vae_muon_lr", "start", "even_levels", "beta"}

# Number: its place in the metrics, and whether lower or higher is better. The parts `headline`, `before`, `steps`
# and `priors` are added by `read_metrics`.
NUMBERS = {
    "fd": ("headline/fd", "↓"),
    "fd before": ("before/fd", "↓"),  # of the VAE's images of the same codes, before refinement
    "floor": ("headline/floor", ""),
    "is": ("headline/is", "↑"),
    "kid": ("headline/kid", "↓"),
    "precision": ("headline/precision", "↑"),
    "recall": ("headline/recall", "↑"),
    "diversity": ("headline/diversity", ""),
    "hf_energy": ("headline/hf_energy", ""),  # 1 is as sharp as real images
    "seconds per image": ("headline/seconds_per_image", "↓"),
    "nfe": ("headline/nfe", "↓"),
    "fd, 2 steps": ("steps/dpm 2/fd", "↓"),
    "fd, 5 DDIM steps": ("steps/ddim 5/fd", "↓"),
    "minutes": ("run/minutes", "↓"),
    "parameters": ("run/parameters", ""),
    "fd under noise": ("tables/robustness/mean", "↓"),  # mean over the three strengths above 0
    "kl_nats": ("tables/latent_space/kl_nats", ""),
    "path_over_distance": ("tables/latent_space/path_over_distance", "↓"),
    "probe_r2": ("tables/latent_space/probe_r2", "↑"),
    "probe_accuracy": ("tables/latent_space/probe_accuracy", "↑"),
    "rank correlation": ("tables/rank_correlation", "↑"),  # of s with the error of held-out images
    "own s": ("tables/terciles/own_s", "↓"),  # fd of reconstructions
    "shuffled s": ("tables/terciles/shuffled_s", "↓"),
    "sure third, VAE": ("tables/terciles/sure/vae", "↓"),
    "sure third, refined": ("tables/terciles/sure/refined", "↓"),
    "unsure third, VAE": ("tables/terciles/unsure/vae", "↓"),
    "unsure third, refined": ("tables/terciles/unsure/refined", "↓"),
    "seconds saved, %": ("tables/savings/saved_percent/seconds_per_image", "↑"),
    "memory saved, %": ("tables/savings/saved_percent/peak_memory_mb", "↑"),
    "operations saved, %": ("tables/savings/saved_percent/gflops_per_image", "↑"),
    "ceiling": ("tables/ceiling/fd", "↓"),  # fd of the autoencoder's reconstructions
}
NOISE = (0.0, 0.1, 0.2, 0.4)  # sd of the noise on x_hat
for sd in NOISE:
    NUMBERS[f"sd {sd}"] = (f"tables/robustness/fd/{sd}", "↓")
STRATEGIES = ("all", "unsure_third", "unsure_third_shuffled", "two_steps", "by_s", "by_s_shuffled")
for prior in ("gaussian", "gmm", "flow"):
    NUMBERS[f"fd, {prior}"] = (f"priors/{prior}", "↓")
    NUMBERS[f"log density, {prior}"] = (f"tables/latent_space/log_density/{prior}", "↑")
    for strategy in STRATEGIES:
        for key in ("fd", "evaluations", "seconds_per_image"):
            NUMBERS[f"{strategy}, {prior}, {key}"] = (f"tables/strategies/{prior}/{strategy}/{key}", "↓")

# Question: comparisons, each with its name and its two sides "RUN: NUMBER"
QUESTIONS = {
    "Quality: does joint training improve fd?": [
        ("fd: joint training / stage 1", f"{ANNEAL}: fd", f"{FORM1}: fd"),
        ("fd: joint training, a tenth of the weight / stage 1", f"{LOW_WEIGHT}: fd", f"{FORM1}: fd"),
        ("fd: without the refiner's gradient / stage 1", f"{NO_GRADIENT}: fd", f"{FORM1}: fd"),
        ("fd: a tenth of the weight / without the refiner's gradient", f"{LOW_WEIGHT}: fd", f"{NO_GRADIENT}: fd"),
    ],
    "Efficiency: how does adaptive conditioning affect sampling time?": [
        (words, f"{FILM}: {ours}, gmm, {key}", f"{FILM}: {theirs}, gmm, {key}")
        for words, ours, theirs, key in (
            ("seconds: refining the unsure third / all", "unsure_third", "all", "seconds_per_image"),
            ("fd: refining the unsure third / all", "unsure_third", "all", "fd"),
            ("fd: refining the unsure third / another third", "unsure_third", "unsure_third_shuffled", "fd"),
        )
    ],
    "Robustness: how does each model handle noisy VAE outputs?": [
        (f"fd under noise: {words} / stage 1", f"{name}: fd under noise", f"{FORM1}: fd under noise")
        for words, name in (
            ("joint training", ANNEAL),
            ("without the refiner's gradient", NO_GRADIENT),
            ("stage 1 with noise in training", "stage1-augmented"),
            ("guided", "stage1-guided"),
            ("film", FILM),
        )
    ],
    "Coherence: is the latent space smoother or more interpretable with joint training?": [
        (f"{words}: joint training / stage 1", f"{ANNEAL}: {number}", f"{FORM1}: {number}")
        for words, number in (
            ("length of paths", "path_over_distance"),
            ("R² of a linear probe", "probe_r2"),
            ("accuracy of a linear probe", "probe_accuracy"),
        )
    ],
}

# Heading: variants (beginnings of their names), and numbers. "Δ fd" is the change of fd from that of `base_of`.
TABLES = {
    "scores": (
        "", ("fd", "Δ fd", "fd before", "is", "kid", "precision", "recall", "diversity", "hf_energy"),
    ),
    "losses": (
        (FORM1, "stage2-"),
        ("fd", "hf_energy", "kl_nats", "fd under noise", "path_over_distance", "probe_r2", "probe_accuracy"),
    ),
    "conditioning": (
        "stage3-flow",
        ("fd", "rank correlation", "own s", "shuffled s", "sure third, VAE", "sure third, refined",
         "unsure third, VAE", "unsure third, refined"),
    ),
    "conditioning: strategies, codes of the mixture": (
        "stage3-flow", [f"{strategy}, gmm, fd" for strategy in STRATEGIES],
    ),
    "conditioning: strategies, codes of the flow": (
        "stage3-flow", [f"{strategy}, flow, fd" for strategy in STRATEGIES],
    ),
    "noise": ("stage", ("sd 0.0", "sd 0.4", "fd under noise")),
    "cost": ("", ("seconds per image", "nfe", "minutes", "parameters", "fd, 2 steps", "fd, 5 DDIM steps")),
    "cost: what latent diffusion saves": (
        "bonus-",
        ("seconds saved, %", "memory saved, %", "operations saved, %", "fd", "ceiling"),
    ),
    "departures": ("", ("fd", "Δ fd", "hf_energy", "fd under noise")),
    "priors": (
        (FORM1, "stage3-vae-flow", "stage3-flow-fixed", FILM),
        [f"{number}, {prior}" for number in ("fd", "log density") for prior in ("gaussian", "gmm", "flow")],
    ),
}
HEADLINE = ("fd", "is", "kid", "precision", "recall", "hf_energy", "seconds per image", "minutes")  # of --runs

LEGEND = """Mean±sd over seeds; ¹ a single run. ↓ lower is better, ↑ higher is better. fd: Frechet distance in the
features of table *data*. Δ: change of the mean from `stage1-form1` (with the same changes, if it has been run; of
*departures* from the variant without changes). n: seeds. p: paired t-test, times four."""


# ---- 2. Reading results ----------------------------------------------------------------------------------------------

def simplify(part):
    """Called for every object of a JSON file: a score {"value": 1.2, "low": 1.1, "high": 1.3} becomes its value, and
    the Frechet distance is called fd, whatever the features are."""
    if "value" in part:
        return part["value"]
    return {"fd" if key in ("fid", "fd_local") else key: value for key, value in part.items()}


def read_metrics(path):
    """A metrics.json, with some of its parts under names of their own."""
    metrics = json.loads(path.read_text(), object_hook=simplify)
    first, *others = metrics["rows"]
    metrics["headline"] = first
    for row in others:
        if row["nfe"] == 0 and first["nfe"] > 0:
            metrics["before"] = row
    metrics["steps"] = {f"{row['sampler']} {row['steps']}": row for row in others
                        if row["prior"] == first["prior"] and row["nfe"] > 0}
    # Rows of other priors have fewer images than the headline. So has the last row of the headline's own prior.
    metrics["priors"] = {row["prior"]: row["fd"] for row in metrics["rows"]
                         if (row["sampler"], row["steps"]) == (first["sampler"], first["steps"])}
    latent_space = metrics["tables"].get("latent_space", {})
    if "probe_r2" in latent_space:  # the mean over the factors
        latent_space["probe_r2"] = float(np.mean([*latent_space["probe_r2"].values()]))
    return metrics


def read_results():
    """The metrics of all files in results/."""
    return [read_metrics(path) for path in sorted(RESULTS.glob("*/*.json")) if path.parent.name != "features"]


def name_of(run):
    """The variant of a run with its changes, such as stage1-form1-beta=1."""
    return "-".join([run["variant"], *(f"{key}={value}" for key, value in run["settings"]["changes"].items())])


def check_comparable(everything):
    """Exit with one line if runs of a data set differ in budget, features or number of generated images."""
    expected = {}
    for metrics in everything:
        run = metrics["run"]
        facts = run["budget"], run["features"], metrics["headline"]["n_generated"]
        if facts != expected.setdefault(run["dataset"], facts):
            common.fail(f"{run['dataset']}: {name_of(run)}-s{run['seed']} has budget, features and number of images "
                        f"{facts}, others {expected[run['dataset']]}; they cannot be compared")


def grouped(everything):
    """A list of metrics -> {data set: {name: {seed: metrics}}}, in the order of tables."""
    def rank(metrics):
        run = metrics["run"]
        datasets, variants = [*common.DATASETS, run["dataset"]], [*VARIANTS, run["variant"]]  # unlisted ones come last
        return datasets.index(run["dataset"]), variants.index(run["variant"]), name_of(run), run["seed"]

    results = {}
    for metrics in sorted(everything, key=rank):
        run = metrics["run"]
        runs = results.setdefault(run["dataset"], {})
        runs.setdefault(name_of(run), {})[run["seed"]] = metrics
    return results


def first_run(seeds):
    """What is said of the first of {seed: metrics}: the entry "run"."""
    return seeds[min(seeds)]["run"]


def is_departure(run):
    changes = run["settings"]["changes"]
    return bool(changes) and set(changes) <= DEPARTURES


def values(runs, name, number):
    """{seed: value} of one of NUMBERS, or of a place, for all seeds of a run that have it."""
    place, _ = NUMBERS.get(number, (number, ""))
    found = {}
    for seed, part in runs.get(name, {}).items():
        for key in place.split("/"):
            part = part.get(key, {})
        if part != {}:
            found[seed] = part
    return found


# ---- 3. Comparing ----------------------------------------------------------------------------------------------------

def ratios(ours, theirs):
    """Two sides {seed: value} -> ours / theirs as an array, of the seeds that both have."""
    return np.array([ours[seed] / theirs[seed] for seed in ours if seed in theirs])


def compare(ours, theirs):
    """Two sides {seed: value} -> by how many percent the mean of ours is above that of theirs, the number of seeds that
    both have, and the p-value; None if they have none. p is None if there is nothing to test: a single seed, ratios
    that are all the same, or numbers without a logarithm."""
    found = ratios(ours, theirs)
    if not len(found):
        return None
    p = None
    if len(found) > 1 and (found > 0).all() and np.ptp(np.log(found)) > 1e-9:
        p = min(1.0, 4 * float(ttest_1samp(np.log(found), 0).pvalue))
    means = [np.mean([side[seed] for seed in ours.keys() & theirs.keys()]) for side in (ours, theirs)]
    return float(100 * (means[0] / means[1] - 1)), len(found), p


def base_of(runs, name):
    """The name of the run with which a table compares a run."""
    run = first_run(runs[name])
    if is_departure(run):
        return run["variant"]
    same_changes = name.replace(run["variant"], FORM1)
    return same_changes if same_changes in runs else FORM1


# ---- 4. Tables -------------------------------------------------------------------------------------------------------

def show(value, digits=3):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def spread(numbers):
    """The standard deviation of a list of numbers; 0 of a single one."""
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0


def show_mean(numbers):
    """A list of numbers as text: mean ± standard deviation."""
    mean, sd = np.mean(numbers), spread(numbers)
    return show(mean) + (f"±{show(sd, 2)}" if sd > 1e-9 * abs(mean) else "")


def show_comparison(ours, theirs):
    """What `compare` returns, as text."""
    comparison = compare(ours, theirs)
    if comparison is None:
        return ""
    percent, count, p = comparison
    if count == 1:
        return f"{percent:+.0f}% ¹"
    return f"{percent:+.0f}%, n {count}" + ("" if p is None else ", p < 0.001" if p < 0.001 else f", p {p:.2g}")


def markdown(header, rows):
    """A table as text, without columns that are empty. No text if there are no rows."""
    if not rows:
        return ""
    columns = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
    header, *rows = zip(*columns, strict=True)
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def cell(runs, name, column):
    """The text of one cell. A column is one of NUMBERS, or "Δ " and one of them."""
    number = column.removeprefix("Δ ")
    found = values(runs, name, number)
    if column == number:
        return show_mean([*found.values()]) if found else ""
    base = base_of(runs, name)
    change = compare(found, values(runs, base, number))
    return f"{change[0]:+.0f}%" if change and base != name else ""


def table_of(results, beginnings, columns, departures=False):
    """One of TABLES as text. Departures are in a table of their own."""
    rows = []
    for dataset, runs in results.items():
        for name, seeds in runs.items():
            run = first_run(seeds)
            cells = [cell(runs, name, column) for column in columns]
            if run["variant"].startswith(beginnings) and is_departure(run) == departures and any(cells):
                rows.append([dataset, f"`{name}`" + (" ¹" if len(seeds) == 1 else ""), *cells])
                dataset = ""  # its name stands in its first row alone
    header = [f"{column} {NUMBERS[column.removeprefix('Δ ')][1]}".strip() for column in columns]
    return markdown(["data", "run", *header], rows)


def sides_of(runs, ours, theirs):
    """The two sides {seed: value} of a comparison of QUESTIONS."""
    return [values(runs, *side.split(": ")) for side in (ours, theirs)]


def table_question(results, comparisons):
    """The answers to one of QUESTIONS: a row for each comparison, a column for each data set."""
    rows = []
    for words, *sides in comparisons:
        cells = [show_comparison(*sides_of(runs, *sides)) for runs in results.values()]
        if any(cells):
            rows.append([words, *cells])
    return markdown(["comparison", *results], rows)


def table_data(results):
    """What was measured, and on what: a row for each data set."""
    rows = []
    for dataset, runs in results.items():
        name = FORM1 if FORM1 in runs else next(iter(runs))
        run = first_run(runs[name])
        counts = [run["settings"][key] for key in ("vae_steps", "unet_steps", "eval_samples", "probe_samples")]
        rows.append([dataset, run["data_note"], run["budget"], *map(show, counts), run["features"],
                     cell(runs, name, "floor")])
    return markdown(["data", "note", "budget", "VAE steps", "U-Net steps", "samples", "samples of other rows",
                     "features", "floor: fd of held-out images"], rows)


def table_reproduced(results, committed):
    """The headline scores of each new run. If a run of the same name and seed is committed: its score, too, and the
    ratio."""
    rows = []
    for dataset, runs in results.items():
        for name, seeds in runs.items():
            for seed in seeds:
                cells = []
                for number in HEADLINE:
                    ours = values(runs, name, number).get(seed)
                    theirs = values(committed.get(dataset, {}), name, number).get(seed)
                    text = "" if ours is None else show(ours)
                    cells.append(f"{text} / {show(theirs)} = {ours / theirs:.2f}" if ours and theirs else text)
                rows.append([dataset, f"`{name}-s{seed}`", *cells])
    return markdown(["data", "run", *HEADLINE], rows)


def write_tables(results, path, figures, committed=None):
    """Write all tables into the file `path`, and all charts into the folder `figures`."""
    tables = {}
    if committed is not None:
        tables["here / committed = ratio"] = table_reproduced(results, committed)
    for question, comparisons in QUESTIONS.items():
        tables[f"questions. {question}"] = table_question(results, comparisons)
    for heading, (beginnings, columns) in TABLES.items():
        tables[heading] = table_of(results, beginnings, columns, heading == "departures")
    tables["data"] = table_data(results)
    text = f"# Tables\n\nWritten by `python final_evaluation.py`.\n{LEGEND}\n"
    text += "".join(f"\n## {heading}\n\n{table}" for heading, table in tables.items() if table)
    for chart in draw_charts(results, figures):
        text += f"\n![{chart.stem}]({chart.relative_to(path.parent)})\n"
    common.write(path, text.encode())
    print(path)


# ---- 5. Charts -------------------------------------------------------------------------------------------------------

def lists(runs, name, *places):
    """For each place, the values of all seeds as a list."""
    return [[*values(runs, name, place).values()] for place in places]


def lines_of_cost(runs):
    """fd against seconds per image: a point for each number of steps."""
    lines = {}
    for name in ("stage1-uncond", FORM1, "stage1-guided", ANNEAL, "bonus-latent"):
        lines[name] = [lists(runs, name, f"steps/dpm {steps}/seconds_per_image", f"steps/dpm {steps}/fd")
                       for steps in (2, 5, 10)]
    return lines


def lines_of_noise(runs):
    """fd against the sd of noise on x_hat."""
    lines = {}
    for name in (FORM1, "stage1-augmented", ANNEAL, NO_GRADIENT, FILM):
        lines[name] = [([sd], *lists(runs, name, f"sd {sd}")) for sd in NOISE]
    return lines


def lines_of_weights(runs):
    """fd against the weight of the diffusion loss; stage 1 and the control without its gradient as level lines."""
    points = []
    for name, seeds in runs.items():
        run = first_run(seeds)
        if run["variant"] == ANNEAL and set(run["settings"]["changes"]) <= {"diffusion_weight"}:
            points.append(([run["settings"]["diffusion_weight"]], *lists(runs, name, "fd")))
    if len(points) < 2:
        return {}
    lines = {ANNEAL: sorted(points)}
    for name in (FORM1, NO_GRADIENT):
        lines[name] = [(weight, *lists(runs, name, "fd")) for weight, _ in lines[ANNEAL]]
    return lines


def lines_of_thirds(runs):
    """fd against evaluations of the U-Net per image: a point for each strategy, with codes of the mixture."""
    return {strategy: [lists(runs, FILM, f"{strategy}, gmm, evaluations", f"{strategy}, gmm, fd")]
            for strategy in STRATEGIES}


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
    standard deviation. Shuffled controls have the colours of what they control, and empty dots."""
    labels = list(dict.fromkeys(label.removesuffix("_shuffled") for lines in panels.values() for label in lines))
    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles = {}
    for axis, (dataset, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            color = f"C{labels.index(label.removesuffix('_shuffled'))}"
            handles[label] = axis.errorbar(
                [np.mean(x) for x, _ in points],
                [np.mean(y) for _, y in points],
                [spread(y) for _, y in points],
                marker="o", color=color, markerfacecolor="white" if label.endswith("_shuffled") else color)
        axis.set(title=dataset, xlabel=x_label, xscale=x_scale, yscale="log")
        plain_ticks(axis.yaxis)
        if x_scale == "log":
            plain_ticks(axis.xaxis)
    axes[0].set_ylabel("fd")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    common.write_with(path, figure.savefig, format="png", dpi=110)


def ratios_of_questions(runs):
    """The ratios of QUESTIONS: a row for each comparison."""
    rows = {}
    for question, comparisons in QUESTIONS.items():
        for words, *sides in comparisons:
            rows[f"{question.split(':')[0]}. {words}"] = ratios(*sides_of(runs, *sides))
    return rows


def draw_ratios(path, panels):
    """Draw {data set: {row: ratios}}, a panel for each data set: a dot for each seed, and with three seeds a bar
    over the 95% interval of their mean."""
    rows = list(dict.fromkeys(row for part in panels.values() for row in part))
    figure = Figure(figsize=(4 + 4 * len(panels), 1.5 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (dataset, part) in zip(axes, panels.items(), strict=True):
        axis.axvline(1, color="grey")
        for row, found in part.items():
            y = [rows.index(row)] * len(found)
            if len(found) > 2 and np.ptp(found) > 0:
                low, high = ttest_1samp(np.log(found), 0).confidence_interval()
                axis.plot(np.exp([low, high]), y[:2], color="black")
            axis.plot(found, y, "o", color="C0", alpha=0.6)
        axis.set(title=dataset, xlabel="ratio", xscale="log", yticks=range(len(rows)), yticklabels=rows)
        plain_ticks(axis.xaxis)
    axes[0].invert_yaxis()
    common.write_with(path, figure.savefig, format="png", dpi=110)


def draw_charts(results, folder):
    """Draw all charts for which there are numbers. Returns their paths."""
    paths = []
    panels = {dataset: ratios_of_questions(runs) for dataset, runs in results.items() if FORM1 in runs}
    if panels:
        paths.append(folder / "questions.png")
        draw_ratios(paths[-1], panels)
    for name, (lines_of, x_label, x_scale) in CHARTS.items():
        panels = {}
        for dataset, runs in results.items():
            for label, points in lines_of(runs).items():
                points = [(x, y) for x, y in points if x and y]
                if points:
                    panels.setdefault(dataset, {})[label] = points
        if panels:
            paths.append(folder / f"{name}.png")
            draw_lines(paths[-1], panels, x_label, x_scale)
    return paths


# ---- 6. The command --------------------------------------------------------------------------------------------------

def collect(folders):
    """Copy metrics.json of finished runs into results/."""
    for path in [Path(folder) / "metrics.json" for folder in folders]:
        if path.is_file():
            metrics = json.loads(path.read_text())
            run = metrics["run"]
            target = RESULTS / run["dataset"] / f"{name_of(run)}-s{run['seed']}.json"
            common.write_json(target, metrics)
            print(target)


def check(everything):
    """Exit with one line if results come from several commits, or if a picture in the texts is missing."""
    commits = {metrics["run"]["commit"] for metrics in everything}
    if len(commits) > 1:
        common.fail(f"results come from several commits: {', '.join(sorted(commits))}")
    for text in (RESULTS.parent / "README.md", RESULTS.parent / "REPORT.md"):
        for link in re.findall(r'(?:!\[[^]]*\]\(|<img[^>]* src=")([^)"]+)', text.read_text()):
            if not link.startswith("http") and not (text.parent / link).is_file():
                common.fail(f"{text.name} shows {link}, which does not exist")
    print(f"all is well: {len(everything)} results")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Final evaluation: tables and charts of results")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--collect", nargs="+", metavar="RUN", help="copy metrics.json of run folders into results/")
    choice.add_argument("--runs", metavar="FOLDER", help="write FOLDER/REPORT.md on the runs in FOLDER")
    choice.add_argument("--check", action="store_true", help="check results/ and the pictures of the texts")
    args = parser.parse_args(argv)
    if args.collect:
        return collect(args.collect)
    everything, committed = read_results(), None
    path, figures = RESULTS / "TABLES.md", RESULTS / "figures"
    if args.runs:
        committed, figures = grouped(everything), Path(args.runs)
        path = figures / "REPORT.md"
        everything = [read_metrics(file) for file in sorted(figures.rglob("metrics.json"))]
    if not everything:
        common.fail(f"no results in {path.parent}")
    check_comparable(everything)
    if args.check:
        return check(everything)
    write_tables(grouped(everything), path, figures, committed)


if __name__ == "__main__":
    main()
