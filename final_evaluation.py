"""Final evaluation: reads results, draws tables and charts, answers the guiding questions. Trains nothing.

Every number of README.md (and REPORT.md, where there is one) comes from a file in results/ by way of this script. It
rewrites two kinds of marks, which a reader of the rendered page does not see:

    <!-- block NAME -->...<!-- end -->                 a table or the answers, replaced as a whole
    <!-- = PATH [/ PATH] FORMAT -->12.9<!-- . -->      one number; PATH is DATASET/VARIANT and keys, as in
                                                       shapes/stage1-form1 rows.0.fd_local.value (mean of its seeds)

Verdicts between two variants are differences over at least three paired seeds with Student's t-interval. The interval
beside a score is something else: what another draw of the images could change, not another training.

Run     python final_evaluation.py                     results/ -> README.md, REPORT.md, results/figures/
        python final_evaluation.py --check             the same, but only says whether a text would change (exit 1)
        python final_evaluation.py --runs runs         fresh runs -> runs/REPORT.md
        python final_evaluation.py --collect RUN ...   copies metrics and figures of run folders into results/
"""

import argparse
import functools
import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw
from scipy.stats import t as student

import common

ROOT = Path(__file__).resolve().parent
ORDER = ("stage1-vae", "stage1-uncond", "stage1-form1", "stage1-form2", "stage2-", "stage3-", "bonus-")
SHEET = ("stage1-form1", "stage1-uncond", "stage2-anneal", "stage3-flow-fixed", "stage3-flow-learned", "bonus-latent")
COMMANDS = {  # what every data set's table should hold
    "stage1-vae": "stage1_baseline.py --variant vae", "stage1-uncond": "stage1_baseline.py --variant uncond",
    "stage1-form1": "stage1_baseline.py --variant form1", "stage1-form2": "stage1_baseline.py --variant form2",
    "stage2-anneal": "stage2_joint.py", "stage3-flow-fixed": "stage3_adaptive.py --conditioning fixed",
    "stage3-flow-learned": "stage3_adaptive.py", "bonus-latent": "bonus_latent.py"}
TITLES = {"shapes": "shapes", "cifar10": "CIFAR-10", "celeba64": "CelebA-64"}
LARGE = ("robustness", "steps", "temperature")  # half a megabyte each, and alike: kept of stage 1's refiner alone
PRIVATE = ("reconstructions", "uncertainty", "interpolation")  # show real images, or what stands for them


def parse_flags(argv=None):
    parser = argparse.ArgumentParser(description="Tables, charts and answers from results; trains nothing")
    parser.formatter_class, parser.error = argparse.ArgumentDefaultsHelpFormatter, common.fail
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of committed results")
    parser.add_argument("--runs", help="read fresh runs from this folder, and write REPORT.md there")
    parser.add_argument("--collect", nargs="+", metavar="RUN", help="copy these run folders into --results, and stop")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a text would change")
    return parser.parse_args(argv)


# --- Reading ---------------------------------------------------------------------------------------------------------


def load(path):
    """One metrics file, checked against the schema; exits naming the file if it is damaged."""
    try:
        metrics = json.loads(Path(path).read_text())
        common.check_metrics(metrics)
        return metrics
    except (OSError, ValueError, KeyError, TypeError) as error:
        common.fail(f"{path}: damaged ({error}); restore it or remove it")


def rank(variant):
    """Position in tables: the order of the stages."""
    return next((i for i, start in enumerate(ORDER) if variant.startswith(start)), len(ORDER)), variant


def load_all(paths):
    """{dataset: {variant: {seed: metrics}}} in reading order; refuses what cannot be compared."""
    found, first = {}, {}
    for path in sorted(map(Path, paths)):
        metrics = load(path)
        run = metrics["run"]
        found.setdefault(run["dataset"], {}).setdefault(run["variant"], {})[run["seed"]] = metrics
        facts = {key: run[key] for key in ("features", "crop", "data_note", "n_real", "budget")}
        facts |= {"train_images": run["train_images"], "n_generated": metrics["rows"][0]["n_generated"],
                  "temperature": run["eval"].get("temperature", 1.0), "residual_sd": run.get("residual_sd", 0.0)}
        other, reference = first.setdefault(run["dataset"], (path, facts))
        difference = common.first_difference(reference, facts)
        if difference:
            common.fail(f"{path} cannot be compared with {other}: {difference}; remove one of them")
    names = sorted(found, key=lambda name: (name not in TITLES, list(TITLES).index(name) if name in TITLES else name))
    return {name: dict(sorted(found[name].items(), key=lambda item: rank(item[0]))) for name in names}


def headline(metrics):
    """The name of the distance (fid or fd_local), and the headline row."""
    row = metrics["rows"][0]
    return next(name for name in ("fid", "fd_local") if name in row), row


# --- Comparing -------------------------------------------------------------------------------------------------------


def interval_text(score, digits=".3g"):
    """A score dictionary as value [low, high]."""
    span = f" [{score['low']:{digits}}, {score['high']:{digits}}]" if score["low"] is not None else ""
    return f"{score['value']:{digits}}{span}"


def over_seeds(values):
    """Mean of several seeds' values with their standard deviation, as text."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.2g}"


def verdict(ours, theirs, lower_is_better=True):
    """Compare {seed: value} with {seed: value} over their common seeds, as a phrase: better or worse by so many percent
    if Student's 95% interval of at least 3 paired differences excludes 0, else no difference shown."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return "no common seed, not compared"
    differences, base = [ours[s] - theirs[s] for s in seeds], sum(theirs[s] for s in seeds) / len(seeds)
    mean = sum(differences) / len(seeds)
    percent = 100 * mean / base
    if len(seeds) < 3:
        runs = "one run" if len(seeds) == 1 else "two runs"
        return f"{abs(percent):.0f}% {'lower' if percent < 0 else 'higher'} ({runs}, not tested)"
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(seeds) - 1))
    half = student.ppf(0.975, len(seeds) - 1) * sd / math.sqrt(len(seeds))
    span = f"{len(seeds)} paired seeds, 95%: {100 * (mean - half) / base:+.0f}% to {100 * (mean + half) / base:+.0f}%"
    if mean - half <= 0 <= mean + half:
        return f"no difference shown ({span})"
    return f"{'better' if (mean < 0) == lower_is_better else 'worse'} by {abs(percent):.0f}% ({span})"


def values(results, variant, pick):
    """{seed: pick(metrics)} of a variant; seeds where there is nothing to pick are left out."""
    picked = {}
    for seed, metrics in results.get(variant, {}).items():
        try:
            picked[seed] = pick(metrics)
        except (KeyError, TypeError, IndexError):
            continue
    return picked


# --- Tables and answers ----------------------------------------------------------------------------------------------


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def table_variants(results):
    """One line per variant: the headline row, means and spread over seeds; with one seed, the interval over images; and
    the change of the mean distance against stage 1's refiner. What is missing has its command in place of numbers."""
    name, _ = headline(next(iter(next(iter(results.values())).values())))
    local = name.removeprefix("fd") if name != "fid" else ""
    baseline, lines = values(results, "stage1-form1", lambda m: m["rows"][0][name]["value"]), []
    header = ["variant", "seeds", "prior", "sampler", "images", name, "vs form1", "floor", "IS", "KID", "precision",
              "recall", "diversity", "hf_energy", "bits/dim", "M params", "GFLOP", "train min", "s/image"]
    for variant in sorted({*results, *COMMANDS}, key=rank):
        if variant not in results:
            lines.append([variant, f"not run: `python {COMMANDS[variant]}`", *[""] * (len(header) - 2)])
            continue
        seeds = results[variant]
        first = next(iter(seeds.values()))
        run, row, rows = first["run"], first["rows"][0], [m["rows"][0] for m in seeds.values()]
        mean = lambda key, rows=rows: over_seeds([r[key]["value"] for r in rows])  # noqa: E731
        bounds = values(results, variant, lambda m: m["tables"]["bits_per_dim"]["bound"]["value"])
        change = ""
        if baseline and variant != "stage1-form1":
            ours, theirs = (sum(v) / len(v) for v in ([r[name]["value"] for r in rows], list(baseline.values())))
            change = f"{100 * (ours / theirs - 1):+.0f}%"
        lines.append([variant, len(seeds), row["prior"], f"{row['sampler']} {row['nfe'] or ''}".strip(),
                      f"{row['n_generated']:,}", interval_text(row[name]) if len(seeds) == 1 else mean(name), change,
                      *(mean(key + local) for key in ("floor", "is", "kid", "precision", "recall", "diversity")),
                      mean("hf_energy"), over_seeds(list(bounds.values())) if bounds else "",
                      f"{run['parameters'] / 1e6:.2f}", f"{run['gflops']:.2f}", f"{run['train_seconds'] / 60:.0f}",
                      f"{row['seconds_per_image']:.4f}"])
    return markdown(header, lines)


def table_steps(results):
    """Every row of the grid of steps: the same z and x_T throughout."""
    lines = []
    for variant, seeds in results.items():
        seed, metrics = next(iter(seeds.items()))
        name, first = headline(metrics)
        for row in metrics["rows"][1:]:
            lines.append([variant, row["prior"], f"{row['sampler']} {row['nfe'] or ''}".strip(),
                          f"{row['n_generated']:,}", interval_text(row[name]), f"{row['hf_energy']['value']:.3g}",
                          f"{row['seconds_per_image']:.4f}"])
    return markdown(["variant", "prior", "sampler", "images", name, "hf_energy", "s/image"], lines)


def found_at(seeds, path):
    """What stands at `path` (keys joined by dots) in each seed's metrics: a list of numbers or scores. Times are the
    first seed's alone: a mean over machines shared with more or less other work would tell nothing."""
    if re.search("second|saved", path):
        seeds = dict(list(seeds.items())[:1])

    def follow(metrics):
        return functools.reduce(lambda part, key: part[int(key) if isinstance(part, list) else key], path.split("."),
                                metrics)
    return [value for value in values({"": seeds}, "", follow).values() if isinstance(value, (int, float, dict))]


def mean_at(seeds, path):
    """The mean over seeds of the number or score at `path`, or None where no seed has one."""
    numbers = [float(v["value"] if isinstance(v, dict) else v) for v in found_at(seeds, path)]
    return sum(numbers) / len(numbers) if numbers else None


def table_of(results, start, columns, intervals=False):
    """One line per variant whose name starts with `start`: {column: path of a number in its metrics}, means over seeds;
    with `intervals`, of one seed, its interval over images."""
    def cell(seeds, path):
        found = found_at(seeds, path)
        if intervals and len(found) == 1 and isinstance(found[0], dict):
            return interval_text(found[0])
        return f"{mean_at(seeds, path):.3g}" if found else ""
    lines = [[variant, *(cell(seeds, path) for path in columns.values())]
             for variant, seeds in results.items() if variant.startswith(start)]
    return markdown(["variant", *columns], lines)


def table_temperatures(results):
    """Stage 1's refiner with the same z and noise at several temperatures of x_T, where they were drawn."""
    lines, name = [], ""
    for metrics in list(results.get("stage1-form1", {}).values())[:1]:
        name = headline(metrics)[0]
        local = name.removeprefix("fd") if name != "fid" else ""
        lines = [[f"{row['temperature']:g}", f"{row['n_generated']:,}", interval_text(row[name]),
                  *(f"{row[key]['value']:.3g}" for key in ("hf_energy", "precision" + local, "recall" + local))]
                 for row in metrics["tables"].get("temperature", [])]
    return markdown(["sd of x_T", "images", name, "hf_energy", "precision", "recall"], lines)


def table_pairs(path):
    """Verdicts on pairs of a VAE's image and its refinement, by temperature of x_T: a reader was shown them unnamed."""
    sheets, counts = json.loads(Path(path).read_text())["sheets"], {}
    for sheet in sheets:
        told = counts.setdefault(sheet["temperature"], Counter())
        for letter, side in zip(sheet["verdicts"], sheet["refined_side"], strict=True):
            winner = "refined" if letter.lower() == side else "VAE"
            told["equal" if letter == "=" else f"{winner} {'clearly' if letter.isupper() else 'slightly'}"] += 1
    kinds = ["refined clearly", "refined slightly", "equal", "VAE slightly", "VAE clearly"]
    return markdown(["sd of x_T", "pairs", *kinds], [[f"{sd:g}", str(told.total()), *(str(told[k]) for k in kinds)]
                                                     for sd, told in sorted(counts.items())])


def table_sample_size(folder):
    """What the number of images alone does to the distance of real images from real images."""
    facts = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    counts = sorted({count for f in facts for count in f.get("sample_size", {})}, key=int)
    lines = [[f"`{f['extractor']}`", *(f"{f['sample_size'][c]:.3g}" if c in f["sample_size"] else "" for c in counts)]
             for f in facts if "sample_size" in f]
    return markdown(["fd_local of real held-out images", *(f"{int(c):,}" for c in counts)], lines)


def with_stage1(results):
    """The results with stage 1's latent space, which stage 2 measured beside its own, among stage 1's tables."""
    twins = next((values(results, variant, lambda m: m["tables"]["latent_space_stage1"]) for variant in results
                  if variant.startswith("stage2-")), {})
    seeds = {seed: m | {"tables": m["tables"] | ({"latent_space": twins[seed]} if seed in twins else {})}
             for seed, m in results.get("stage1-form1", {}).items()}
    return results | ({"stage1-form1": seeds} if seeds else {})


def tables_of_stages(results):
    """What stages 2 and 3 and the bonus measure beyond the common table."""
    name = headline(next(iter(next(iter(results.values())).values())))[0]
    joint = {f"{name} VAE": f"tables.before_refinement.{name}", f"{name} refined": f"rows.0.{name}",
             "hf VAE": "tables.before_refinement.hf_energy", "hf refined": "rows.0.hf_energy",
             "PSNR dB": "tables.reconstruction.psnr_db", "KL nats": "tables.reconstruction.kl_nats",
             "active units": "tables.latent.active_units", "gradient share": "tables.training.share",
             "refiner loss": "tables.training.v_mse_own", "with x_hat shuffled": "tables.training.v_mse_shuffled",
             "skipped": "tables.training.skipped"}
    path = "tables.latent_space.slerp"
    latent = {"path / ends, VAE": f"{path}.vae.path_over_distance",
              "path / ends, refined": f"{path}.refined.path_over_distance",
              "worst / mean step": f"{path}.refined.worst_over_mean_step",
              "distance of ends": f"{path}.refined.end_distance",
              f"{name} of midpoints": f"{path}.refined.midpoint_{name}",
              f"{name} of reconstructions": "tables.latent_space.posterior.refined",
              "class, linear probe": "tables.latent_space.probe_class_accuracy"}
    latent |= {f"{factor}, R2": f"tables.latent_space.probe_r2.{factor}" for factor in common.FACTORS}
    both = with_stage1(results)
    adaptive = {name: f"rows.0.{name}", "hf": "rows.0.hf_energy", "bits/dim": "tables.bits_per_dim.bound",
                "noise area": "tables.robustness.area", "dpm steps enough": "tables.steps_to_quality.dpm.steps",
                "time saved": "tables.steps_to_quality.dpm.time_saved"}
    for way in ("even", "adaptive"):
        adaptive[f"{way} steps: {name}"] = f"tables.uncertainty.adaptive_steps.{way}.{name}"
        adaptive[f"{way} steps: s/image"] = f"tables.uncertainty.adaptive_steps.{way}.seconds_per_image"
    unsure = {"rank correlation": "tables.uncertainty.correlation"}
    for third in ("sure", "unsure"):
        unsure |= {f"{third}: VAE": f"tables.uncertainty.terciles.{third}.vae.fd_to_these",
                   f"{third}: refined": f"tables.uncertainty.terciles.{third}.refined.fd_to_these",
                   f"{third}: seeds apart": f"tables.uncertainty.terciles.{third}.consistency"}
    unsure |= {f"s {control}": f"tables.uncertainty.controls.{control}.fd_to_these"
               for control in ("true", "shuffled", "constant", "zero")}
    prior = {f"{name}, {which}": f"by prior.{which}.{name}" for which in ("gaussian", "gmm", "flow")}
    prior |= {"negative ELBO": "tables.elbo.negative_elbo", "SSE": "tables.elbo.sse", "KL": "tables.elbo.kl"}
    prior |= {f"log p(z), {which}": f"tables.elbo.log_density_{which}" for which in ("gaussian", "gmm", "flow")}
    vaes = {variant: {seed: m | {"by prior": {row["prior"]: row for row in m["rows"]}} for seed, m in seeds.items()}
            for variant, seeds in results.items() if variant.startswith("stage3-vae")}
    saved = {key.replace("_", " "): f"tables.savings.saved_percent.{key}" for key in
             ("gflops_per_image", "seconds_per_image", "seconds_per_image_batch_1", "peak_memory_mb",
              "train_seconds_per_image")}
    refiners = {variant: seeds for variant, seeds in results.items() if not variant.startswith("stage3-vae")}
    return {"joint": table_of(both, ("stage1-form1", "stage2-"), joint),
            "latent space": table_of(both, ("stage1-form1", "stage2-"), latent),
            "adaptive": table_of(refiners, "stage3-", adaptive),
            "uncertainty": table_of(refiners, "stage3-", unsure), "prior": table_of(vaes, "stage3-vae", prior, True),
            "savings": table_of(results, "bonus-latent", saved)}


def table_features(folder):
    """The pinned local networks and what their examinations found."""
    lines = []
    for path in sorted(Path(folder).glob("*.json")):
        facts = json.loads(path.read_text())
        right = f"{facts['accuracy']:.3f}" if "accuracy" in facts else f"{facts['retrieval']:.3f} (retrieval)"
        ladder = lambda key, facts=facts: ", ".join(f"{sd}: {fd:.3g}" for sd, fd in facts[key].items())  # noqa: E731
        lines.append([f"`{facts['extractor']}`", right, f"{facts['n_test']:,}", f"{facts['floor']:.3f}",
                      ladder("noise"), ladder("blur"), f"{facts['half_the_classes']:.3g}",
                      f"{facts['fifty_images_repeated_recall']:.2f}"])
    return markdown(["network", "held-out accuracy", "images", "floor", "noise of sd", "blur of pixels",
                     "half the classes", "recall of 50 repeated"], lines)


def answers(results):
    """The four guiding questions of the assignment, each answered from the numbers or with what is missing."""
    name = headline(next(iter(next(iter(results.values())).values())))[0]
    score = lambda metrics: metrics["rows"][0][name]["value"]  # noqa: E731
    stage2 = next((v for v in results if v.startswith("stage2-anneal")), None)
    fixed = "stage3-flow-fixed"
    adaptive = next((f"stage3-flow-{way}" for way in ("learned", "flow", "variance")
                     if f"stage3-flow-{way}" in results), "")
    missing = lambda command: f"not run yet: `{command}`"  # noqa: E731
    seconds = lambda metrics: metrics["rows"][0]["seconds_per_image"]  # noqa: E731
    lines = ["**Does joint training improve the distance?** " + (
        f"`{stage2}` against `stage1-form1`: {verdict(*(values(results, v, score) for v in (stage2, 'stage1-form1')))}."
        if stage2 and "stage1-form1" in results else missing("python stage2_joint.py"))]
    if fixed in results and "stage1-form1" in results:
        against = verdict(*(values(results, v, score) for v in (fixed, "stage1-form1")))
        lines[0] += f" A VAE trained under a flow prior instead (`{fixed}`): {against}."
    parts = []
    spent = {(way, what): values(results, adaptive, lambda m, way=way, key=key: m["tables"]["uncertainty"][
        "adaptive_steps"][way][key]) for way in ("even", "adaptive")
        for what, key in (("distance", name), ("seconds", "seconds_per_image"))}
    if spent["even", "seconds"]:
        ratio = next(iter(spent["adaptive", "seconds"].values())) / next(iter(spent["even", "seconds"].values()))
        even, adapted = ({seed: score["value"] for seed, score in spent[way, "distance"].items()} for way in
                         ("even", "adaptive"))
        parts.append(f"`{adaptive}` with steps by thirds of s takes {ratio:.2f} times the time of the same mean spent "
                     f"evenly; in distance, {verdict(adapted, even)}")
        plain, mine = values(results, fixed, seconds), values(results, adaptive, seconds)
        both = sorted(plain.keys() & mine.keys())
        if both:
            ratio = mine[both[0]] / plain[both[0]]  # times: of one seed, see found_at
            parts.append(f"at equal steps it takes {ratio:.2f} times the time of `fixed`; in distance, "
                         f"{verdict(*(values(results, v, score) for v in (adaptive, fixed)))}")
    for prior in ("gaussian", "gmm", "flow"):
        for enough in list(values(results, f"stage3-{prior}-fixed",
                                  lambda m: m["tables"]["steps_to_quality"]["dpm"]).values())[:1]:
            parts.append(f"under the {prior} prior {enough['steps']} steps come within 10% of {enough['of']} and save "
                         f"{enough['time_saved']:.0%} of the time (one run)")
    lines.append("**How does adaptive conditioning change sampling time?** " + (
        "; ".join(parts) + "." if parts else missing("python stage3_adaptive.py")))
    areas = {v: values(results, v, lambda m: m["tables"]["robustness"]["area"]) for v in results
             if "-w" not in v and "-grad" not in v}
    told = [f"`{v}` {over_seeds(list(a.values()))}" + " (noise in its latent, not comparable)" * v.startswith("bonus")
            for v, a in areas.items() if a]
    lines.append("**How does each model take noisy VAE outputs?** Distance over the clean one, mean over noise of sd 0 "
                 "to 0.4 (the *noise area*; 1: unharmed): " + ", ".join(told) + ".")
    noisy = lambda m: m["tables"]["robustness"]["scores"]["noise 0.4"][name]["value"]  # noqa: E731
    for ours, theirs in ((stage2, "stage1-form1"), (adaptive, fixed)):
        if areas.get(ours) and areas.get(theirs):
            lines[-1] += (f" `{ours}` against `{theirs}`: {verdict(areas[ours], areas[theirs])}; the distance itself "
                          f"at sd 0.4: {verdict(*(values(results, v, noisy) for v in (ours, theirs)))}.")
    path = lambda key: lambda m: m["tables"][key]["slerp"]["refined"]["path_over_distance"]  # noqa: E731
    ours, theirs = (values(results, stage2, path(key)) for key in ("latent_space", "latent_space_stage1"))
    lines.append("**Is the latent space smoother with joint training?** " + (
        f"Path length over end distance in feature space: {verdict(ours, theirs)}." if ours and theirs else
        missing("python stage1_baseline.py; python stage2_joint.py")))
    return "\n".join(f"- {line}" for line in lines)


def table_reproduced(fresh, committed):
    """Fresh numbers of each variant beside the committed ones. Reproduced: within 3 standard deviations of the
    committed seeds, or within 25% where there are fewer than three."""
    name, lines = headline(next(iter(next(iter(fresh.values())).values())))[0], []
    for variant in fresh:
        for key in (name, "hf_energy"):
            score = lambda m, key=key: m["rows"][0][key]["value"]  # noqa: E731
            ours, theirs = values(fresh, variant, score), list(values(committed, variant, score).values())
            verdict = "nothing committed"
            if theirs:
                mean = sum(theirs) / len(theirs)
                sd = math.sqrt(sum((v - mean) ** 2 for v in theirs) / max(1, len(theirs) - 1))
                room = 3 * sd if len(theirs) > 2 else 0.25 * mean
                away = max(abs(value - mean) for value in ours.values())
                verdict = f"{'reproduced' if away <= room else 'NOT reproduced'} (off by {away / mean:.0%})"
            lines.append([variant, key, over_seeds(list(ours.values())), over_seeds(theirs) if theirs else "", verdict])
    return markdown(["variant", "score", "fresh", "committed", "verdict"], lines)


# --- Charts ----------------------------------------------------------------------------------------------------------


def draw(results, folder, dataset):
    """figures/DATASET-comparison.png (distance, mean over seeds, against steps, seconds and noise) and the charts of
    stages 2 and 3 that there are results for (of seed 0); returns their paths."""
    steps, seconds, noise = {}, {}, {}
    device = next(iter((results.get("stage1-form1") or next(iter(results.values()))).values()))["run"]["device"]
    for variant in (v for v in results if v in COMMANDS):  # the others would bury the lines; the tables have them all
        seeds = results[variant]
        metrics = next(iter(seeds.values()))
        name, first = headline(metrics)
        for sampler in ("dpm",) if len(results) > 3 else ("ddim", "dpm"):  # of many variants one line each
            grid = [i for i, r in enumerate(metrics["rows"]) if i and r["sampler"] == sampler
                    and r["prior"] == first["prior"]]
            if len(grid) > 1:
                label = variant if len(results) > 3 else f"{variant} {sampler}"
                distances = [mean_at(seeds, f"rows.{i}.{name}") for i in grid]
                steps[label] = [metrics["rows"][i]["nfe"] for i in grid], distances
                if metrics["run"]["device"] == device:  # other threads or another processor: not comparable
                    seconds[label] = [metrics["rows"][i]["seconds_per_image"] for i in grid], distances
        scores = lambda m, name=name: [m["tables"]["robustness"]["scores"][k][name]["value"] for k in  # noqa: E731
                                       ("clean", "noise 0.1", "noise 0.2", "noise 0.4")]
        damaged = list(values(results, variant, scores).values())
        if damaged:
            noise[variant] = [0, 0.1, 0.2, 0.4], [sum(column) / len(damaged) for column in zip(*damaged, strict=True)]
    title, made = TITLES.get(dataset, dataset), []
    panels = [{"title": f"{title}: {name} against {what}", "x": what, "y": name, "lines": lines} | scales
              for what, lines, scales in (("U-Net evaluations", steps, {"log": "log", "log_y": True}),
                                          ("seconds per image", seconds, {"log": "log", "log_y": True}),
                                          ("sd of noise on x_hat", noise, {"log_y": True})) if lines]
    if panels:
        made.append(folder / f"{dataset}-comparison.png")
        common.save_chart(made[0], panels)
    sweep = {float(variant.partition("-w")[2] or 1): seeds[0] for variant, seeds in results.items()
             if variant.startswith("stage2-sum") and "grad" not in variant and 0 in seeds}
    if len(sweep) > 1:
        made.append(folder / f"{dataset}-sweep.png")
        draw_sweep(made[-1], title, dict(sorted(sweep.items())))
    told = {variant: seeds[0]["tables"]["uncertainty"] for variant, seeds in results.items() if 0 in seeds and
            "error_by_uncertainty" in seeds[0]["tables"].get("uncertainty", {})}
    if told:
        made.append(folder / f"{dataset}-uncertainty.png")
        draw_uncertainty(made[-1], title, told)
    paths = {variant: seeds[0]["tables"]["latent_space"]["slerp"] for variant, seeds in with_stage1(results).items()
             if 0 in seeds and "latent_space" in seeds[0]["tables"] and variant != "stage2-bound"}  # empty: no path
    if paths:
        made.append(folder / f"{dataset}-smoothness.png")
        common.save_chart(made[-1], [
            {"title": f"{title}: interpolations, {part}", "x": "distance of the ends (features)",
             "y": "path length / that distance", "level": {"straight": 1.0}, "lines": {
                 variant: ([path[part]["end_distance"]], [path[part]["path_over_distance"]])
                 for variant, path in paths.items()}} for part in ("vae", "refined")])
    return made


def draw_uncertainty(path, title, told):
    """Does s rank the VAE's error, and what becomes of its least certain third? `told`: {variant: its table}."""
    errors, thirds = {}, {}
    for variant, table in told.items():
        vae = "flow" if variant.startswith("stage3-flow") else "Gaussian"
        errors[f"VAE with {vae} prior"] = [[tenth[key] for tenth in table["error_by_uncertainty"]]
                                           for key in ("s", "sse")]
        before, after = ([table["terciles"][third][who]["fd_to_these"] for third in ("sure", "middle", "unsure")]
                         for who in ("vae", "refined"))
        thirds[f"{vae} VAE, unrefined"] = [1, 2, 3], before
        if ([1, 2, 3], after) not in thirds.values():  # refiners that differ in the prior alone reconstruct alike
            thirds[variant] = [1, 2, 3], after
    common.save_chart(path, [
        {"title": f"{title}: error of x_hat by tenths of s", "x": "uncertainty s", "y": "squared error",
         "lines": errors},
        {"title": f"{title}: before and after", "x": "third by s: 1 sure, 3 unsure", "log_y": True,
         "y": "distance to the same real images", "lines": thirds}])


def draw_sheet(path, figures, dataset, results):
    """One sheet of samples: the first row of each variant's committed figure; where there is a VAE, its images above
    the refined ones. Image k has the same z wherever the VAE and its prior are the same."""
    rows = []
    for variant in (v for v in SHEET if 0 in results.get(v, {})):
        both = "before_refinement" in results[variant][0]["tables"]
        for name, count, many in (("reconstructions", 1, 3), ("samples", 2, 6) if both else ("samples", 1, 3)):
            figure = figures / dataset / f"{variant}-s0-{name}.png"
            if figure.is_file() and (name == "samples" or not rows):  # real images once, where they may be shown
                page = Image.open(figure).convert("RGB")
                label = "real" if name == "reconstructions" else variant
                rows.append((label, page.crop((0, 0, page.width, page.height // many * count))))
    if not rows:
        return []
    margin = 150
    sheet = Image.new("RGB", (margin + max(r.width for _, r in rows), sum(r.height + 6 for _, r in rows)), "white")
    top = 0
    for label, row in rows:
        sheet.paste(row, (sheet.width - row.width, top))  # the images end at the right edge: columns line up
        ImageDraw.Draw(sheet).text((4, top + row.height // 2 - 6), label, fill="black")
        top += row.height + 6
    with common.atomic(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    return [path]


def draw_sweep(path, title, sweep):
    """Joint training with the plain sum against its weight: scores, KL and active units, gradient share."""
    weights, (name, _) = list(sweep), headline(next(iter(sweep.values())))
    line = lambda path: (weights, [mean_at({0: m}, path) for m in sweep.values()])  # noqa: E731
    panels = [(name, name, {"VAE samples": f"tables.before_refinement.{name}", "refined": f"rows.0.{name}"}),
              ("KL and active units", "nats, units", {"KL": "tables.reconstruction.kl_nats",
                                                      "active units": "tables.latent.active_units"}),
              ("gradient at x_hat", "share of the diffusion term", {"last steps": "tables.training.share"}),
              ("reconstruction", "PSNR, dB", {"VAE": "tables.reconstruction.psnr_db"})]
    common.save_chart(path, [{"title": f"{title}: {what}", "x": "weight of the diffusion term", "y": y, "log": "log",
                              "lines": {label: line(key) for label, key in lines.items()}}
                             for what, y, lines in panels])


# --- Writing ---------------------------------------------------------------------------------------------------------


def look_up(expression, everything):
    """`DATASET/VARIANT key.key` -> the number there, the mean over seeds, or with VARIANT@SEED one seed's; exits naming
    what is not there."""
    where, _, path = expression.strip().partition(" ")
    dataset, _, variant = where.partition("/")
    variant, _, seed = variant.partition("@")
    seeds = everything.get(dataset, {}).get(variant, {})
    value = mean_at({s: m for s, m in seeds.items() if seed in ("", str(s))}, path.strip())
    if value is None:
        common.fail(f"'{expression.strip()}' in a text names no number of the results; correct it, or run what it "
                    "needs")
    return value


def number(expression, everything):
    """`PATH [/ PATH] FORMAT` -> text."""
    *paths, last = expression.strip().split(" / ")
    last, _, form = last.rpartition(" ")
    first, *others = (look_up(path, everything) for path in (*paths, last))
    for value in others:
        first /= value
    return f"{first:{form}}"


def fill(text, blocks, everything):
    """Rewrite the marked blocks and numbers of a text; a block that is not known is an error."""
    def block(match):
        if match[1] not in blocks:
            common.fail(f"block '{match[1]}' is not known; known are {', '.join(blocks)}")
        return f"<!-- block {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->"

    text = re.sub(r"<!-- block (.+?) -->.*?<!-- end -->", block, text, flags=re.DOTALL)
    return re.sub(r"<!-- = (.+?) -->.*?<!-- \. -->",
                  lambda match: f"<!-- = {match[1]} -->{number(match[1], everything)}<!-- . -->", text, flags=re.DOTALL)


def make_blocks(everything, folder):
    benchmark = Path(folder) / "benchmark.txt"
    blocks = {"features": table_features(Path(folder) / "features"),
              "benchmark": f"```\n{benchmark.read_text().strip() if benchmark.is_file() else 'not run yet'}\n```",
              "sample size": table_sample_size(Path(folder) / "features")}
    pairs = Path(folder) / "celeba64-pairs.json"
    blocks |= {"pairs celeba64": table_pairs(pairs)} if pairs.is_file() else {}
    for dataset, results in everything.items():
        blocks |= {f"variants {dataset}": table_variants(results), f"steps {dataset}": table_steps(results),
                   f"answers {dataset}": answers(results), f"temperature {dataset}": table_temperatures(results)}
        blocks |= {f"{name} {dataset}": table for name, table in tables_of_stages(results).items()}
    return blocks


def collect(runs, folder):
    """Copy metrics and figures of run folders (RUNS/DATASET-BUDGET/VARIANT-sSEED) into results/DATASET."""
    for run in map(Path, runs):
        metrics = load(run / "metrics.json")
        dataset, name = metrics["run"]["dataset"], f"{metrics['run']['variant']}-s{metrics['run']['seed']}"
        home = Path(folder) / dataset
        home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / "metrics.json", home / f"{name}.json")
        for figure in [*sorted(run.glob("*.png")), *sorted(run.glob("profile-*.txt"))]:
            private = dataset != "shapes" and figure.stem in PRIVATE  # no real image of another data set is published
            if not private and (figure.stem not in LARGE or metrics["run"]["variant"] == "stage1-form1"):
                shutil.copyfile(figure, home / f"{name}-{figure.name}")
        print(f"{home / name}.json")


def main(argv=None):
    args = parse_flags(argv)
    if args.collect:
        collect(args.collect, args.results)
        return
    source = Path(args.runs or args.results)
    paths = list(source.glob("*/*/metrics.json") if args.runs else source.glob("*/*-s[0-9]*.json"))
    if not paths:
        common.fail(f"{source}: no results there; run a stage first, for instance python stage1_baseline.py")
    everything = load_all(paths)
    blocks = make_blocks(everything, args.results)
    if args.runs:
        committed = load_all(Path(args.results).glob("*/*-s[0-9]*.json"))
        for dataset in everything.keys() & committed.keys():
            blocks[f"reproduced {dataset}"] = table_reproduced(everything[dataset], committed[dataset])
            print(blocks[f"reproduced {dataset}"])
        text = "\n\n".join(f"## {name}\n\n{block}" for name, block in blocks.items()
                           if name not in ("features", "sample size", "benchmark", "pairs celeba64"))
        with common.atomic(source / "REPORT.md") as temporary:
            temporary.write_text(f"# Fresh runs in {source}\n\n{text}\n")
        for dataset, results in everything.items():
            draw(results, source, dataset)
        print(source / "REPORT.md")
        return
    changed = []
    for path in (ROOT / "README.md", ROOT / "REPORT.md"):
        if path.is_file() and (text := fill(path.read_text(), blocks, everything)) != path.read_text():
            changed.append(path.name)
            if not args.check:
                with common.atomic(path) as temporary:
                    temporary.write_text(text)
    if args.check:
        print(f"would change: {', '.join(changed)}" if changed else "texts agree with the results")
        sys.exit(bool(changed))
    for dataset, results in everything.items():
        figures = Path(args.results) / "figures"
        made = draw(results, figures, dataset)
        made += draw_sheet(figures / f"{dataset}-samples.png", Path(args.results), dataset, results)
        print("\n".join(map(str, made)))
    print(f"rewritten: {', '.join(changed) or 'nothing, texts agree with the results'}")


if __name__ == "__main__":
    main()
