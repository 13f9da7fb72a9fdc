"""Final evaluation: reads results, draws tables and charts, judges claims. Trains nothing.

`TABLES` says which numbers of which variants make a table, `CLAIMS` which two are compared; a column's name is the
number's place in metrics.json, shortened by `SHORT`. A text has a table between <!-- table NAME --> and <!-- end -->.

Run     python final_evaluation.py                     results/ -> README.md, REPORT.md, results/TABLES.md, charts
        python final_evaluation.py --check             only says whether a text would change (exit 1)
        python final_evaluation.py --runs runs         fresh runs -> runs/REPORT.md, beside the committed numbers
        python final_evaluation.py --collect RUN ...   copies metrics of run folders, the figures that a text shows, and
                                                       weights for `stage1_baseline.py --pretrained`
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
ORDER = ("shapes", "cifar10", "celeba64", "stage1-vae", "stage1-uncond", "stage1-", "stage2-", "stage3-", "")
PACKS = {"stage1-form1-s0": ("form1", "vae", "unet", "gmm"),  # the file's name, and what of the checkpoint it keeps
         "stage1-guided-s0": ("guide", "unet")}
PRIVATE = ("reconstructions", "uncertainty", "interpolation")  # these figures show real images
SHEET = ("stage1-uncond", "stage1-form1", "stage1-guided", "stage2-anneal", "stage3-flow-film", "bonus-latent")
NOTE = "a ± b: sd over seeds; [a, b]: one run, 95% over the draw of images"
SHORT = (("_local", ""), ("fid", "fd"), ("before_refinement/", "VAE "), ("latent_space/slerp/refined/", "path "),
         ("latent_space/slerp/vae/", "VAE path "),
         ("latent_space/posterior/", "real codes/"),
         ("latent_space/", ""), ("reconstruction/", ""), ("robustness/scores/", ""), ("robustness/area", "noise area"),
         ("uncertainty/adaptive_refinement/", ""),
         ("even_middle_start", "middle start"), ("even/", "evenly/"), ("adaptive_steps", "thirds"),
         ("shuffled_steps", "thirds shuffled"), ("shuffled_start", "start shuffled"),
         ("adaptive_start", "start by thirds"), ("uncertainty/variance", "variance"),
         ("uncertainty/regressed", "regressed"),
         ("uncertainty/terciles/", ""), ("uncertainty/controls/", "s "), ("/fd_to_these", ""),
         ("path_over_distance", "/ ends"), ("savings/saved_percent/", "% saved, "), ("bits_per_dim/bound", "bits/dim"),
         ("seconds_per_image", "s/image"), ("prior_log_density/", "log p(z) "), ("training/gradient", "gradient"))

TABLES = {  # name: (ends of DATASET/VARIANT, columns, and the seed if it is one alone)
    "results": ("stage1-vae stage1-form1 stage1-guided stage2-anneal stage3-flow-film bonus-latent",
                "fd; hf_energy; train minutes"),
    "stage 1": ("stage1-*", "fd; floor; is; precision; recall; hf_energy; bits/dim"),
    "steps": ("stage1-form1 stage1-guided bonus-latent",
              "dpm 6/fd; dpm 10/fd; dpm 25/fd; ddim 100/fd; dpm 6/hf_energy; dpm 6/s/image; ddim 100/s/image"),
    "joint": ("stage1-form1 stage2-anneal stage2-anneal-grad-none",
              "fd; precision; hf_energy; kl_nats; own prior/fd; gaussian/fd; real codes/refined"),
    "losses, seed 0": ("shapes/stage1-form1 shapes/stage2-*",
                       "fd; precision; hf_energy; kl_nats; bits/dim; noise area", 0),
    "priors": ("stage3-vae-*", "gaussian/fd; gmm/fd; flow/fd; log p(z) gaussian; log p(z) gmm; log p(z) flow"),
    "uncertainty": ("stage3-flow-fixed",
                    "regressed/correlation; variance/correlation; sure/vae; unsure/vae; sure/refined; unsure/refined"),
    "conditioning": ("stage3-flow-fixed stage3-flow-fade stage3-flow-film stage3-flow-coupling",
                     "fd; is; s/image; noise area; evenly/fd; thirds/fd; thirds shuffled/fd"),
    "latent diffusion": ("bonus-latent", "fd; diversity; ceiling/fd; % saved, gflops_per_image; % saved, s/image; "
                         "% saved, s/image_batch_1; % saved, peak_memory_mb")}

CLAIMS = [  # (question, a column of a variant, the same of another); of every column here less is better
    ("Does refinement improve the VAE's samples?", "fd of stage1-form1", "fd of stage1-vae"),
    ("Does `x_hat`, with a start at `t0`, help?", "fd of stage1-form1", "fd of stage1-uncond"),
    ("Does guidance by a worse refiner help?", "fd of stage1-guided", "fd of stage1-form1"),
    ("Does a fitted prior help?", "own prior/fd of stage1-form1", "gaussian/fd of stage1-form1"),
    ("**Quality**: does joint training help?", "fd of stage2-anneal", "fd of stage1-form1"),
    ("And without its gradient into the VAE?", "fd of stage2-anneal-grad-none", "fd of stage1-form1"),
    ("So is it the gradient that helps?", "fd of stage2-anneal", "fd of stage2-anneal-grad-none"),
    ("And with the codes of real images?", "real codes/refined of stage2-anneal", "real codes/refined of stage1-form1"),
    ("Does adaptive conditioning (`film`) help?", "fd of stage3-flow-film", "fd of stage3-flow-fixed"),
    ("**Efficiency**: does it take more time?", "s/image of stage3-flow-film", "s/image of stage3-flow-fixed"),
    ("Do steps by thirds of `s` beat another's `s`?", "thirds/fd of stage3-flow-film",
     "thirds shuffled/fd of stage3-flow-film"),
    ("**Robustness**: does refinement soften noise?", "noise area of stage1-form1", "noise area of stage1-vae"),
    ("Does joint training?", "noise area of stage2-anneal", "noise area of stage1-form1"),
    ("And without its gradient?", "noise area of stage2-anneal-grad-none", "noise area of stage1-form1"),
    ("Does adaptive conditioning (`film`)?", "noise area of stage3-flow-film", "noise area of stage3-flow-fixed"),
    ("**Latent space**: does joint training smooth it?", "path / ends of stage2-anneal", "path / ends of stage1-form1"),
    ("What does latent diffusion cost?", "fd of bonus-latent", "fd of stage1-form1")]

FURTHER_CLAIMS = [  # in TABLES.md alone
    ("Is Formulation 2 better than 1?", "fd of stage1-form2", "fd of stage1-form1"),
    ("Does guidance soften noise on `x_hat`?", "noise area of stage1-guided", "noise area of stage1-form1"),
    ("Does a fitted prior help unrefined samples?", "fd of stage1-vae", "gaussian/fd of stage1-vae"),
    ("Does a VAE trained with a flow help, given a mixture?", "gmm/fd of stage3-flow-fixed",
     "own prior/fd of stage1-form1"),
    ("With the codes of real images, is it the gradient that helps?", "real codes/refined of stage2-anneal",
     "real codes/refined of stage2-anneal-grad-none"),
    ("Does `fade` help?", "fd of stage3-flow-fade", "fd of stage3-flow-fixed"),
    ("And with noise on `x_hat`?", "noise area of stage3-flow-fade", "noise area of stage3-flow-fixed"),
    ("Does `coupling` help?", "fd of stage3-flow-coupling", "fd of stage3-flow-fixed"),
    ("Does it matter whose `s` `film` is told?", "s true of stage3-flow-film", "s shuffled of stage3-flow-film"),
    ("So is it nearer than one told nothing?", "s true of stage3-flow-film", "s true of stage3-flow-fixed"),
    ("And under the strongest noise?", "noise 0.4/fd of stage3-flow-film", "noise 0.4/fd of stage3-flow-fixed"),
    ("Are steps by thirds of `s` better than even ones?", "thirds/fd of stage3-flow-film",
     "evenly/fd of stage3-flow-film")]

PANELS = {  # x axis of a chart: (variants, {place: column})
    "steps": ("*-uncond *-form1 *-guided *-anneal *-flow-fixed *-flow-fade *-flow-film bonus-*",
              {n: f"dpm {n}/fd" for n in (5, 6, 10, 25, 50)}),
    "sd of noise on x_hat": ("*-vae *-form1 *-guided *-anneal *-flow-fixed *-flow-fade *-flow-film",
                             {0.0: "clean/fd"} | {sd: f"noise {sd}/fd" for sd in (0.1, 0.2, 0.4)})}


def leaves(part, path=""):
    """{name: number or score} of nested dictionaries and lists, without texts."""
    if isinstance(part, list):
        part = dict(enumerate(part))
    if isinstance(part, dict) and set(part) != {"value", "low", "high"}:
        return {name: leaf for key, value in part.items() for name, leaf in leaves(value, f"{path}/{key}").items()}
    for old, new in SHORT:
        path = path.replace(old, new)
    return {path.strip("/"): part} if isinstance(part, (int, float, dict)) else {}


def load(path):
    """One metrics file; exits naming it if it is damaged."""
    return common.read_metrics(path) or fid.fail(
        f"{path}: damaged, or of another schema; restore it or remove it" if Path(path).is_file() else
        f"{path}: no such file; finish that run first, with --resume")


def numbers_of(metrics):
    """{name: number or score} of a run: the headline row's by their own names, the other rows' under sampler and steps,
    or under the prior where it is not the headline's, then what its tables hold, and what it cost."""
    first, *others = metrics["rows"]
    run, rows = metrics["run"], {first["prior"]: first} if first["sampler"] == "none" else {}
    for row in others:
        rows.setdefault(f"{row['sampler']} {row['nfe']}" if row["prior"] == first["prior"] else row["prior"], row)
    rows["own prior"] = rows.get(f"{first['sampler']} {first['nfe']}")  # as many images as other priors had
    cost = {"train minutes": run["train_seconds"] / 60, "parameters": run["parameters"], "gflops": run["gflops"]}
    return leaves(first) | leaves(rows) | leaves(metrics["tables"]) | cost


def load_all(paths):
    """{dataset: {variant: {seed: metrics}}} in reading order, `numbers` in each; refuses what cannot be compared."""
    found, compared = {}, {}
    for path in sorted(map(Path, paths)):
        metrics = load(path)
        run = metrics["run"]
        facts = {key: run[key] for key in ("features", "crop", "data_note", "n_real", "budget", "train_images")}
        facts |= {"n_generated": metrics["rows"][0]["n_generated"],
                  "temperature": run["eval"]["temperature"]}
        other, reference = compared.setdefault(run["dataset"], (path, facts))
        difference = common.first_difference(reference, facts)
        if difference:
            fid.fail(f"{path} cannot be compared with {other}: {difference}; remove one of them")
        found.setdefault(run["dataset"], {}).setdefault(run["variant"], {})[run["seed"]] = metrics
    for results in found.values():
        form1 = results.get("stage1-form1", {})
        for seed, metrics in [item for seeds in results.values() for item in seeds.items()]:
            space = metrics["tables"].pop("latent_space_stage1", None)  # stage 2 measures it beside its own
            if space and seed in form1:
                form1[seed]["tables"].setdefault("latent_space", space)
        for metrics in (metrics for seeds in results.values() for metrics in seeds.values()):
            metrics["numbers"] = numbers_of(metrics)
    rank = lambda name: ([name.startswith(start) for start in ORDER].index(True), name)  # noqa: E731
    return {name: {v: found[name][v] for v in sorted(found[name], key=rank)} for name in sorted(found, key=rank)}


def values(seeds, name):
    """{seed: number} called `name` in {seed: metrics}; of a score its value. Times are the first seed's alone: others
    may have shared their machine with more work."""
    if re.search("s/image|seconds|minutes|saved", name):
        seeds = dict(list(seeds.items())[:1])
    found = {seed: metrics["numbers"].get(name) for seed, metrics in seeds.items()}
    return {seed: leaf["value"] if isinstance(leaf, dict) else leaf for seed, leaf in found.items() if leaf is not None}


def mean_and_sd(numbers):
    """Several numbers as text: mean ± standard deviation, the latter if there is one."""
    mean, spread = statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0
    text, more = (f"{mean:,.0f}", f"{spread:,.0f}") if abs(mean) >= 1000 else (f"{mean:.3g}", f"{spread:.2g}")
    return f"{text} ± {more}" if spread > 1e-9 * abs(mean) else text


def cell(seeds, name):
    """The numbers called `name` as text: a single score with its interval, several with their spread."""
    found = values(seeds, name)
    if len(found) == 1 and isinstance(score := seeds[next(iter(found))]["numbers"][name], dict):
        return common.show(score)
    return mean_and_sd(list(found.values())) if found else ""


def verdict(ours, theirs):
    """Compare the positive numbers of paired seeds by their mean log ratio, as a phrase: better (lower) or worse by so
    many percent if Student's 95% interval of at least 3 log ratios excludes 0, else no difference shown."""
    logs = [math.log(one / other) for one, other in zip(ours, theirs, strict=True)]
    percent, count, mean = lambda x: 100 * math.expm1(x), len(logs), statistics.mean(logs)
    if count < 3:
        return f"{percent(mean):+.0f}% ({'one run' if count == 1 else 'two runs'})"
    half = student.ppf(0.975, count - 1) * statistics.stdev(logs) / count**0.5
    said = f"{'better' if mean < 0 else 'worse'} by {abs(percent(mean)):.0f}%" if abs(mean) > half else (
        "no difference shown")
    return f"{said} ({count} seeds: {percent(mean - half):+.0f}% to {percent(mean + half):+.0f}%)"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def about(dataset, results):
    """What all numbers of a data set rest on, in a sentence."""
    metrics = next(iter(next(iter(results.values())).values()))
    run, settings = metrics["run"], metrics["run"]["eval"]
    calmed = "" if settings["temperature"] == 1 else f" from `x_T` of sd {settings['temperature']:g}"
    return (f"{dataset}: {run['data_note']}, budget `{run['budget']}` ({run['train_images']:,} images per network), "
            f"{metrics['rows'][0]['n_generated']:,} samples{calmed} ({settings['grid_count']} in probes), features "
            f"`{run['features']}`.")


def table_of(everything, variants, columns, only=None):
    """A line for each variant that fits one of the patterns and has a number in one of the columns, of all its seeds or
    of `only` one."""
    rows, used, columns = [], {}, columns.split("; ")
    for dataset, results in everything.items():
        for variant, seeds in results.items():
            seeds = {seed: metrics for seed, metrics in seeds.items() if only in (None, seed)}
            cells = [cell(seeds, column) for column in columns]
            if any(fnmatch(f"{dataset}/{variant}", f"*{pattern}") for pattern in variants.split()) and any(cells):
                rows.append([f"{dataset} {variant}", *cells])
                used[dataset] = about(dataset, results)
    return f"{markdown(['variant', *columns], rows)}\n\n*{' '.join(used.values())} {NOTE}.*"


def table_claims(everything, claims):
    """A line for each claim: what is compared, and for each data set both means over common seeds and the verdict."""
    rows = []
    for question, *sides in claims:
        told = []
        for results in everything.values():
            found = [values(results.get(side.split(" of ")[1], {}), side.split(" of ")[0]) for side in sides]
            ours, theirs = ([side[seed] for seed in sorted(found[0].keys() & found[1].keys())] for side in found)
            told.append(f"{mean_and_sd(ours)} / {mean_and_sd(theirs)}: {verdict(ours, theirs)}" if ours else "not run")
        rows.append([question, *sides, *told])
    table = markdown(["question", "first", "second", *everything], rows)
    note = "Mean of first / of second: change by paired ratios, in brackets its 95% interval over seeds."
    return f"{table}\n\n*{note} {' '.join(about(*item) for item in everything.items())}*"


def table_numbers(columns):
    """A line for each number in {column: {seed: {"numbers": {name: number or score}}}}."""
    names = dict.fromkeys(name for seeds in columns.values() for part in seeds.values() for name in part["numbers"])
    return markdown(["", *columns], [[name, *(cell(seeds, name) for seeds in columns.values())] for name in names])


def table_reproduced(fresh, committed):
    """Fresh numbers of each variant beside the committed ones. Reproduced: where Student's 99% interval of the
    committed seeds expects another run, or within 25% where there are fewer than three."""
    rows = []
    for variant, name in ((variant, name) for variant in fresh for name in ("fd", "hf_energy")):
        theirs, said = list(values(committed.get(variant, {}), name).values()), "nothing committed"
        if theirs:
            mean = statistics.mean(theirs)
            away = max(abs(value - mean) for value in values(fresh[variant], name).values())
            near = 0.25 * mean
            if (n := len(theirs)) > 2:
                near = student.ppf(0.995, n - 1) * statistics.stdev(theirs) * (1 + 1 / n)**0.5
            said = f"{'reproduced' if away <= near else 'NOT reproduced'} (off by {away / mean:.0%})"
        rows.append([variant, name, cell(fresh[variant], name), cell(committed.get(variant, {}), name), said])
    return markdown(["variant", "score", "fresh", "committed", "verdict"], rows)


def other_tables(folder):
    """Tables of what no run measured: the feature networks' examination, recipes, verdicts on pairs."""
    features = {f"`{path.stem}`": {0: {"numbers": leaves(json.loads(path.read_text()))}}
                for path in sorted(Path(folder).glob("features/*.json"))}
    tables = {"features": table_numbers(features)}
    for path in Path(folder).glob("*/pairs.json"):
        counts = json.loads(path.read_text())["counts by sd of x_T"]
        tables[f"pairs {path.parent.name}"] = table_numbers(
            {f"sd {sd}": {0: {"numbers": told}} for sd, told in counts.items()})
    for path in sorted(Path(folder).glob("*/recipe*.json")):  # {recipe: {seed: {name: number}}}
        tables[f"{path.stem} {path.parent.name}"] = table_numbers(
            {recipe: {seed: {"numbers": told} for seed, told in seeds.items()}
             for recipe, seeds in json.loads(path.read_text()).items()})
    return tables


def long_tables(everything, folder):
    """The whole text of TABLES.md: every number of every variant, what no run measured, the benchmark."""
    parts = ["# Long tables", f"Written by `python final_evaluation.py`. {NOTE}. A name is a place in metrics.json; "
             "nfe: the sampler's steps, each an evaluation of the U-Net (guided: two); training/skipped, elbo, s "
             "constant and s zero are from earlier code; recipes of shapes that name no other had a "
             "beta of 0.25, a mixture of 20 and 1,000 steps; for other words see README.md."]
    for dataset, results in everything.items():
        for stage in ("stage1", "stage2", "stage3", "bonus"):
            columns = {variant: seeds for variant, seeds in results.items() if variant.startswith(stage)}
            parts += [f"## {dataset}, {stage}", about(dataset, results), table_numbers(columns)] if columns else []
    parts += ["## further claims", table_claims(everything, FURTHER_CLAIMS)]
    parts += [text for name, table in other_tables(folder).items() for text in (f"## {name}", table)]
    parts += [f"## benchmark\n\n```\n{path.read_text().strip()}\n```" for path in Path(folder).glob("benchmark.txt")]
    return "\n\n".join(parts) + "\n"


def draw(path, dataset, results):
    """Save a chart for each of PANELS, with a line (means over seeds) for each variant that has two of its points."""
    panels = []
    for x, (variants, points) in PANELS.items():
        lines = {}
        for variant, seeds in results.items():
            line = [(at, statistics.mean(ys)) for at, name in points.items() if (ys := values(seeds, name).values())]
            if any(fnmatch(variant, pattern) for pattern in variants.split()) and len(line) > 1:
                lines[variant] = tuple(zip(*line, strict=True))
        panels += [{"title": dataset, "x": x, "y": "fd", "lines": lines, "log_y": True}] if lines else []
    if panels:
        common.save_chart(path, panels)


def fill(text, tables):
    """The text with its marked tables written anew; exits naming a table that is not known."""
    for name in re.findall("<!-- table (.+?) -->", text):
        if name not in tables:
            fid.fail(f"table '{name}' is not known; known are {', '.join(tables)}")
    return re.sub("(<!-- table (.+?) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{tables[m[2]]}\n{m[3]}", text,
                  flags=re.DOTALL)


def draw_sheet(path, home):
    """One picture of all stages: the top of the samples.png of each run of SHEET in `home`, under its name."""
    tops = {name: Image.open(home / f"{name}-s0" / "samples.png") for name in SHEET if
            (home / f"{name}-s0" / "samples.png").is_file()}
    tops = {name: image.crop((0, 0, image.width, image.height // 3)) for name, image in tops.items()}
    page = Image.new("RGB", (max(top.width for top in tops.values()), sum(20 + top.height for top in tops.values())),
                     "white")
    y = 0
    for name, top in tops.items():
        ImageDraw.Draw(page).text((4, y + 4), name, fill="black")
        page.paste(top, (0, y + 20))
        y += 20 + top.height
    common.save_as(path, page.save, format="png")


def collect(runs, folder):
    """Copy the metrics of run folders into FOLDER/DATASET, those figures that a text shows, and, for --pretrained, the
    weights of form1 and of its guide, of seed 0 at the cpu budget: at most 6 MB each, so without the encoder, matrices
    in half precision."""
    texts = "".join((ROOT / name).read_text() for name in ("README.md", "REPORT.md"))
    for run in map(Path, runs):
        facts = load(run / "metrics.json")["run"]
        home, name = Path(folder) / facts["dataset"], f"{facts['variant']}-s{facts['seed']}"
        fid.write(home / f"{name}.json", (run / "metrics.json").read_bytes())
        checkpoint, shared = run / "checkpoint.pt", facts["dataset"] in fid.DATASETS and facts["budget"] == "cpu"
        if name in PACKS and shared and checkpoint.is_file():
            state = common.load_checkpoint(checkpoint)
            state["vae"] = {key: value for key, value in state["vae"].items() if key.startswith("decoder.")}
            pack, *parts = PACKS[name]
            half = {part: fid.half(state[part]) for part in parts}
            kept = fid.save(home / f"{pack}-*.pt", {"train": state["train"], "seconds": state["seconds"]} | half)
            for older in set(fid.find_hashed(home, pack)) - {kept}:
                older.unlink()
        for figure in sorted(run.glob("*.png")):
            public = facts["dataset"] == "shapes" or figure.stem not in PRIVATE
            if public and f"(results/{facts['dataset']}/{name}-{figure.name})" in texts:
                fid.write(home / f"{name}-{figure.name}", figure.read_bytes())
        if run.name in (f"{variant}-s0" for variant in SHEET):
            draw_sheet(Path(folder) / "figures" / f"{facts['dataset']}-sheet.png", run.parent)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables, charts and verdicts from results; trains nothing")
    parser.error = fid.fail
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of committed results")
    parser.add_argument("--runs", help="read fresh runs from this folder, and write REPORT.md there")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--collect", nargs="+", metavar="RUN", help="copy these run folders into --results, and stop")
    only.add_argument("--check", action="store_true", help="write nothing; exit 1 if a text would change")
    args = parser.parse_args(argv)
    if args.collect:
        return collect(args.collect, args.results)
    source = Path(args.runs or args.results)
    paths = source.glob("*/*/metrics.json" if args.runs else "*/*-s[0-9]*.json")
    everything = load_all(path for path in paths if not path.parent.parent.name.endswith("-smoke"))  # they tell nothing
    if not everything:
        fid.fail(f"{source}: no results there; run a stage first, for instance python stage1_baseline.py")
    tables = {"claims": table_claims(everything, CLAIMS)}
    tables |= {name: table_of(everything, *of) for name, of in TABLES.items()}
    if args.runs:
        committed = load_all(Path(args.results).glob("*/*-s[0-9]*.json"))
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
        fid.write(path, texts[path].encode())
    for dataset, results in everything.items():
        draw(source / ("" if args.runs else "figures") / f"{dataset}-comparison.png", dataset, results)
        print(tables.get(f"reproduced: {dataset}", f"{dataset}: {len(results)} variants"))
    print("written:", *(changed or ["nothing, texts agree with the results"]))


if __name__ == "__main__":
    main()
