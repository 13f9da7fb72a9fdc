"""Final evaluation: claims about planted results, which results may be compared, tables, charts, collecting. And the
texts of this repository agree with its results: no number was typed, no picture is missing or left over."""

import json
import math
import re
import shutil

import pytest
from helpers import expect_error
from PIL import Image

import common
import final_evaluation as final

README, REPORT = ((final.ROOT / name).read_text() for name in ("README.md", "REPORT.md"))
PICTURE = re.compile(r"\]\((results/\S+?\.png)\)")
RESULTS = "*/*-s[0-9]*.json"
EVAL = {"sampler": "dpm", "sample_steps": 25, "count": 100, "batch": 50, "temperature": 1.0, "grid_count": 50,
        "grid": [["dpm", 5], ["dpm", 25]], "probe_steps": 10, "bits_images": 128, "bits_draws": 40}


def score(value):
    return {"value": float(value), "low": value - 1.0, "high": value + 1.0}


def metrics(variant="stage1-form1", seed=0, distance=10.0, **run):
    """Metrics with a headline row, one row of another prior and two of other steps. The fd of every row differs."""
    names = [f"{name}_local" for name in ("floor", "is", "kid", "precision", "recall", "diversity")] + ["hf_energy"]
    row = {"prior": "gmm", "sampler": "dpm", "nfe": 25, "n_generated": 100, "seconds_per_image": 0.5,
           "peak_memory_mb": None, "fd_local": score(distance)} | {name: score(0.5) for name in names}
    facts = {"dataset": "shapes", "crop": "none", "data_note": "drawn", "variant": variant, "stage": variant[:6],
             "budget": "cpu", "seed": seed, "features": "local-a", "n_real": 5, "parameters": 10**6, "gflops": 0.5,
             "train_images": 7100, "train_seconds": 90.0, "device": "cpu", "commit": "c", "torch": "2", "eval": EVAL}
    grid = [row | {"nfe": n, "n_generated": 50, "fd_local": score(distance + 50 / n)} for n in (5, 25)]
    rows = [row, row | {"prior": "gaussian", "fd_local": score(3 * distance)}, *grid]
    return {"schema": 1, "run": facts | run, "rows": rows, "tables": {
        "bits_per_dim": {"bound": score(3)},
        "robustness": {"area": 1.25, "scores": {"clean": {"fd_local": score(distance)},
                                                "noise 0.1": {"fd_local": score(1.1 * distance)},
                                                "noise 0.4": {"fd_local": score(4 * distance)}}}}}


def save(folder, *many):
    """Write metrics where committed ones lie, under `folder`; returns their paths."""
    for m in many:
        path = folder / m["run"]["dataset"] / f"{m['run']['variant']}-s{m['run']['seed']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(m))
    return sorted(folder.glob(RESULTS))


def load(folder, *many):
    return final.load_all(save(folder, *many))


def test_changes_between_planted_results():
    """A clear gain, a clear loss, a tie, one and two seeds. The interval is Student's over the pairs."""
    base = [10.0, 11.0, 12.0]
    assert final.describe_change([0.5 * v for v in base], base).startswith("lower by 50%")
    assert final.describe_change([2 * v for v in base], base).startswith("higher by 100%")
    assert final.describe_change([12.0, 9.5, 12.5], base).startswith("not significant (3 seeds: ")
    assert final.describe_change([8.0], [10.0]) == "-20% (one run)"
    assert final.describe_change([11.0, 12.1], [10.0, 11.0]) == "+10% (two runs)"
    text = final.describe_change([9.0, 9.9, 9.6], base)  # ratios 0.9, 0.9, 0.8; t(0.975, 2) = 4.3027
    a, b = math.log(0.9), math.log(0.8)
    mean, half = (2 * a + b) / 3, 4.302653 * (a - b) / 3  # their sd is (a - b) / sqrt(3)
    low, high = (100 * (math.exp(mean + side) - 1) for side in (-half, half))
    assert text == f"not significant (3 seeds: {low:+.0f}% to {high:+.0f}%)"
    # ratios 0.8, 0.8, 0.9 and 0.9: their geometric mean is the root of 0.72, their interval 0.761 to 0.945
    assert final.describe_change([8.0, 8.0, 9.0, 9.0], [10.0] * 4) == "lower by 15% (4 seeds: -24% to -5%)"


def test_names_do_not_depend_on_the_order_of_replacements(monkeypatch):
    """Numbers whose names are alike are told apart, and a dictionary in reverse order gives the same names."""
    places = {"fid": "fd", "is_local": "is", "robustness/scores/noise 0.1/fd_local": "noise 0.1/fd",
              "before_refinement/hf_energy": "VAE hf_energy", "latent_space/probe_r2/x": "probe_r2/x",
              "latent_space/slerp/refined/path_over_distance": "path / ends",
              "latent_space/slerp/vae/path_over_distance": "VAE path / ends",
              "latent_space/posterior/refined": "real codes/refined", "prior_log_density/flow": "log p(z) flow",
              "uncertainty/terciles/sure/refined/fd_to_these": "sure/refined",
              "uncertainty/controls/shuffled/fd_to_these": "s shuffled",
              "uncertainty/controls/true/fd_to_these": "s true", "uncertainty/variance/correlation":
              "variance/correlation", "uncertainty/regressed/correlation": "regressed/correlation",
              "uncertainty/adaptive_refinement/even/fd_local": "evenly/fd",
              "uncertainty/adaptive_refinement/even_middle_start/fd_local": "middle start/fd",
              "uncertainty/adaptive_refinement/adaptive_steps/fd_local": "thirds/fd",
              "uncertainty/adaptive_refinement/shuffled_steps/fd_local": "thirds shuffled/fd",
              "uncertainty/adaptive_refinement/adaptive_start/fd_local": "start by thirds/fd",
              "uncertainty/adaptive_refinement/shuffled_start/fd_local": "start shuffled/fd",
              "savings/saved_percent/seconds_per_image": "% saved, s/image", "training/v_mse": "training/v_mse"}
    for shorter in (final.SHORT, dict(reversed(final.SHORT.items()))):
        monkeypatch.setattr(final, "SHORT", shorter)
        assert {place: [*final.named_numbers(1.0, f"/{place}")] for place in places} == {
            place: [name] for place, name in places.items()}


def test_cells(tmp_path):
    """A single score has its interval, several seeds have their standard deviation. Times are those of the first seed.
    `own prior` is the row with the headline's settings and as few images as other priors had."""
    slow = metrics(seed=1, distance=13.0, train_seconds=600.0)
    slow["rows"][0]["seconds_per_image"] *= 3
    slow["tables"]["savings"] = {"saved_percent": {"peak_memory_mb": 40}}
    seeds = load(tmp_path, metrics(), slow)["shapes"]["stage1-form1"]
    one = {0: seeds[0]}
    assert [final.cell(one, name) for name in ("fd", "gaussian/fd", "dpm 5/fd", "own prior/fd", "noise 0.4/fd")] == [
        "10 [9, 11]", "30 [29, 31]", "20 [19, 21]", "12 [11, 13]", "40 [39, 41]"]
    assert [final.cell(one, name) for name in ("noise area", "train minutes", "no such")] == ["1.25", "1.5", ""]
    assert final.cell(seeds, "fd") == "11.5 ± 2.1" and final.cell(seeds, "noise area") == "1.25"
    assert final.values_by_seed(seeds, "s/image") == {0: 0.5}
    assert final.values_by_seed(seeds, "fd") == {0: 10.0, 1: 13.0}
    assert final.cell(seeds, "% saved, peak_memory_mb") == "" and final.cell(seeds, "train minutes") == "1.5"
    assert final.cell({1: seeds[1]}, "train minutes") == "10"
    assert final.mean_and_sd([1234.5]) == "1,234" and final.mean_and_sd([1000.0, 3000.0]) == "2,000 ± 1,414"
    assert final.mean_and_sd([1.0, 2.0, 3.0]) == "2 ± 1" and final.mean_and_sd([1.0, 1.0, 4.0]) == "2 ± 1.7"


def test_the_headline_of_a_vae_stands_beside_other_priors(tmp_path):
    """A VAE alone has as many images under every prior, so its headline is that of its prior. A row that comes twice
    counts once: the first."""
    vae = metrics("stage1-vae")
    for row in vae["rows"]:
        row |= {"sampler": "none", "nfe": 0}
    vae["rows"] = vae["rows"][:2]
    twice = metrics()
    twice["rows"].append(twice["rows"][-1] | {"fd_local": score(99)})
    found = load(tmp_path, vae, twice)["shapes"]
    assert final.cell(found["stage1-vae"], "gmm/fd") == final.cell(found["stage1-vae"], "fd") == "10 [9, 11]"
    assert final.cell(found["stage1-vae"], "gaussian/fd") == "30 [29, 31]"
    assert [final.cell(found["stage1-form1"], name) for name in ("gmm/fd", "dpm 25/fd")] == ["", "12 [11, 13]"]


@pytest.mark.parametrize("change,key", [
    ({"features": "local-b"}, "features"), ({"crop": "celeba-148"}, "crop"), ({"data_note": "JPEG"}, "data_note"),
    ({"n_real": 6}, "n_real"), ({"train_images": 99}, "train_images"), ({"budget": "smoke"}, "budget"),
    ({}, "n_generated"), *(({"eval": EVAL | {key: 7}}, key) for key in (
        "temperature", "sampler", "sample_steps", "count", "grid_count", "probe_steps", "bits_images", "bits_draws"))])
def test_what_cannot_be_compared_is_refused(change, key, tmp_path, capsys):
    """The file and the key are named."""
    other = metrics("stage1-vae", **change)
    other["rows"][0]["n_generated"] += not change
    expect_error(capsys, lambda: load(tmp_path, metrics(), other), f" {key} was ", "stage1-vae-s0.json")


def test_seeds_of_a_variant_were_trained_alike(tmp_path, capsys):
    """Their networks and, where the metrics have them, their train settings agree. Variants may differ in them, and
    their evaluation in what does not matter."""
    train = {"seed": 0, "beta": 0.08, "data_dir": "/a"}  # of which seeds and folders may differ
    same = [metrics(train=train), metrics(seed=1, train=train | {"seed": 1, "data_dir": "/b"}), metrics(seed=2),
            metrics("stage2-sum", train=train | {"beta": 1.0}, parameters=7, eval=EVAL | {"prior": "none", "grid": []})]
    assert [*load(tmp_path, *same)["shapes"]["stage1-form1"]] == [0, 1, 2]
    for change, key in (({"train": train | {"beta": 1.0}}, "beta"), ({"parameters": 7}, "parameters")):
        expect_error(capsys, lambda change=change: load(tmp_path, metrics(seed=3, **change)),
                     f" {key} was ", "stage1-form1-s3.json")


def test_a_damaged_file_is_named(tmp_path, capsys):
    path, = save(tmp_path, metrics())
    for text in (path.read_text()[:100], "{}", json.dumps(metrics() | {"rows": []})):
        path.write_text(text)
        expect_error(capsys, lambda: final.load_all([path]), "stage1-form1-s0.json: damaged")


def test_claims(tmp_path):
    """Each claim compares the seeds that both sides have, on each data set that has both, else it is not run."""
    many = [metrics(seed=s, distance=10.0 + s) for s in range(4)]  # the joint variant has three of them
    for seed in range(3):
        joint = metrics("stage2-anneal", seed, 5.0 + seed / 2)
        joint["tables"]["latent_space"] = {"slerp": {"refined": {"path_over_distance": 1.2}}}
        joint["tables"]["latent_space_stage1"] = {"slerp": {"refined": {"path_over_distance": 1.5 + seed / 10}}}
        many.append(joint)
    everything = load(tmp_path, *many, metrics(dataset="cifar10"), metrics("stage1-vae", 0, 40.0))
    table = final.table_claims(everything, final.CLAIMS)
    quality, = [line.split(" | ") for line in table.splitlines() if "**Quality**" in line]
    assert quality[1:3] == ["fd of stage2-anneal", "fd of stage1-form1"]
    assert quality[3].startswith("5.5 ± 0.5 / 11 ± 1: lower by 50% (3 seeds: ") and quality[4] == "not run |"
    assert "| 1.2 / 1.6 ± 0.1: lower by 25% (3 seeds: " in table  # as stage 2 measured it
    assert table.count("/ 40: -75% (one run)") == 1  # VAE and refiner
    assert len(re.findall(r"`film`.* \| not run \| not run \|", table)) == 2
    assert "| 12 / 30: -60% (one run) |" in table  # own prior of the second data set
    assert "budget `cpu` (7,100 images per network), 100 samples (50 in probes" in table and "`local-a`" in table


def test_claims_pair_by_seed(tmp_path):
    """Seeds 1, 2 and 3 are common. Each ratio is 0.5 and no interval is left; another pairing would have one."""
    many = [metrics(seed=s, distance=10.0 * 2**s) for s in (3, 1, 2, 0)]
    many += [metrics("stage2-anneal", s, 5.0 * 2**s) for s in (1, 3, 2, 4)]
    table = final.table_claims(load(tmp_path, *many), [("?", "fd of stage2-anneal", "fd of stage1-form1")])
    assert "| 23.3 ± 15 / 46.7 ± 31: lower by 50% (3 seeds: -50% to -50%) |" in table


def test_tables(tmp_path):
    """A short table has a line for each variant that fits and has a number, then the settings. The long tables have
    every number of each stage."""
    many = metrics(), metrics(seed=1, distance=13.0), metrics("stage1-vae"), metrics("bonus-latent")
    everything = load(tmp_path, *many)
    table = final.table_of(everything, "stage1-*", "fd; bits/dim; no such").splitlines()
    assert table[2] == "| shapes stage1-vae | 10 [9, 11] | 3 [2, 4] |  |"
    assert table[3] == "| shapes stage1-form1 | 11.5 ± 2.1 | 3 |  |"
    assert "| shapes stage1-form1 | 13 [" in final.table_of(everything, "stage1-*", "fd", 1)  # of seed 1 alone
    assert len(table) == 6 and table[5].startswith("*shapes: drawn, budget `cpu`") and final.NOTE in table[5]
    assert len(final.table_of(everything, "*", "no such").splitlines()) == 4
    cold = load(tmp_path / "cold", metrics(eval=EVAL | {"temperature": 0.9}))["shapes"]
    assert final.describe_data("shapes", cold) == (
        "shapes: drawn, budget `cpu` (7,100 images per network), 100 samples from noise of sd 0.9 (50 in probes), "
        "features `local-a`.")
    text = final.long_tables(everything, tmp_path)
    assert "## shapes, stage1" in text and "## shapes, bonus" in text and "## shapes, stage2" not in text
    assert "|  | stage1-vae | stage1-form1 |" in text and "| dpm 5/fd | 20 [19, 21] | 21.5 ± 2.1 |" in text
    for name in final.named_numbers(metrics()["rows"][0] | metrics()["tables"]):
        assert f"\n| {name} | " in text


def test_reproduced(tmp_path):
    """Within 25% of one committed seed, or where Student's interval of three expects another run. What lies further
    off, has other settings, or has nothing to be compared with is said to."""
    fresh = load(tmp_path / "fresh", metrics(distance=12.4), metrics("stage1-vae", 0, 40.0), metrics("bonus-latent"))
    one = load(tmp_path / "one", metrics(distance=10.0), metrics("stage1-vae", distance=30.0))
    lines = final.table_reproduced(fresh["shapes"], one["shapes"]).splitlines()
    conclusions = {tuple(line.split(" | ")[:2]): line.split(" | ")[-1] for line in lines[2:]}
    assert conclusions["| stage1-form1", "fd"] == "reproduced (off by 24%) |"
    assert conclusions["| stage1-vae", "fd"] == "NOT reproduced (off by 33%) |"
    assert conclusions["| bonus-latent", "fd"] == "nothing committed |"
    two = load(tmp_path / "two", metrics(distance=10.0), metrics(seed=1, distance=13.0))["shapes"]
    assert "| NOT reproduced (off by 30%)" in final.table_reproduced(two, one["shapes"])  # of its seeds the farthest
    assert "| 12.4 [11.4, 13.4] | 11.5 ± 2.1 | reproduced (off by 8%)" in final.table_reproduced(fresh["shapes"], two)
    far = load(tmp_path / "far", metrics(distance=14.5))["shapes"]
    assert "| NOT reproduced (off by 26%)" in final.table_reproduced(far, two)
    few = load(tmp_path / "few", metrics(eval=EVAL | {"count": 40}))["shapes"]
    assert "| not comparable: count was 100, is now 40 |" in final.table_reproduced(few, one["shapes"])
    three = load(tmp_path / "three", *(metrics(seed=s, distance=10 + 0.1 * s) for s in (0, 1, 2)))
    assert "NOT reproduced (off by 23%)" in final.table_reproduced(fresh["shapes"], three["shapes"]).splitlines()[4]
    for k, distance in enumerate((11.24, 11.25)):  # t(0.995; 2) = 9.925, times 0.1 and the root of 4/3: 1.146 from 10.1
        near = load(tmp_path / f"near{k}", metrics(distance=distance))["shapes"]
        line = final.table_reproduced(near, three["shapes"]).splitlines()[2]  # of fd
        assert f"| {'NOT ' * k}reproduced (off by 11%)" in line


def test_charts(tmp_path, monkeypatch):
    """Means over seeds against steps and against noise, for variants with two points. The latent model's noise is in
    the latent, so it is not compared."""
    drawn = []
    monkeypatch.setattr(common, "save_chart", lambda path, panels: drawn.append(panels))
    form1 = [metrics(), metrics(seed=1, distance=10.0), metrics(seed=2, distance=14.5)]
    one_point = metrics("stage1-guided")
    del one_point["rows"][3:], one_point["tables"]["robustness"]
    results = load(tmp_path, *form1, one_point, metrics("bonus-latent"), metrics("stage2-sum"))
    final.draw_charts(tmp_path / "x.png", "shapes", results["shapes"])
    (steps, noise), = drawn
    assert steps["lines"]["stage1-form1"] == ((5, 25), (21.5, 13.5)) and noise["lines"].keys() == {"stage1-form1"}
    assert noise["lines"]["stage1-form1"] == ((0.0, 0.1, 0.4), (11.5, pytest.approx(12.65), 46.0))
    assert (steps["x"], noise["x"], steps["y"]) == ("steps", "sd of noise on x_hat", "fd") and steps["log_y"]
    assert steps["lines"].keys() == {"stage1-form1", "bonus-latent"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, whose texts show samples and reconstructions of two data sets."""
    monkeypatch.setattr(final, "ROOT", tmp_path)
    shown = [f"{dataset}/stage1-form1-s0-{part}" for dataset in ("shapes", "cifar10") for part in
             ("reconstructions", "samples")]  # the reconstructions of cifar10 must not be copied all the same
    for text, names in (("README.md", shown[:1]), ("REPORT.md", shown[1:])):
        (tmp_path / text).write_text("".join(f"![](results/{name}.png)" for name in names))
    return tmp_path


def save_run(project, variant="stage1-form1", colour="red", **facts):
    """A run's folder with metrics and three pictures whose upper half has a colour. Returns it as text."""
    found = metrics(variant, **facts)
    run = project / "runs" / f"{found['run']['dataset']}-{found['run']['budget']}" / f"{variant}-s0"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps(found))
    for name in ("samples", "reconstructions", "training"):
        image = Image.new("RGB", (30, 60), "black")
        image.paste(colour, (0, 0, 30, 30))
        image.save(run / f"{name}.png")
    return str(run)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_collect_and_runs(project, capsys):
    """--collect copies metrics and the figures that a text shows, except real images of other data sets than shapes. It
    stacks the samples of all stages, and says what it wrote and replaced. --runs writes a report."""
    final.main(["--collect", *(save_run(project, dataset=dataset) for dataset in ("shapes", "cifar10"))])
    found = {(path.parent.name, path.name.removeprefix("stage1-form1-s0")) for path in project.glob("results/*/*")}
    assert found == {("shapes", ".json"), ("shapes", "-samples.png"), ("shapes", "-reconstructions.png"),
                     ("cifar10", ".json"), ("cifar10", "-samples.png"), ("figures", "shapes-sheet.png"),
                     ("figures", "cifar10-sheet.png")}
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"written: {path}" for path in content(
        project / "results"))
    assert Image.open(project / "results" / "figures" / "shapes-sheet.png").size == (30, 40)  # a name, a third
    uncond = save_run(project, "stage1-uncond", "blue")
    final.main(["--collect", uncond, uncond.replace("uncond", "form1")])
    lines = capsys.readouterr().out.splitlines()
    home = project / "results"
    assert [line for line in lines if "written" in line] == [f"written: {home / 'shapes' / 'stage1-uncond-s0.json'}"]
    assert f"replaced: {home / 'shapes' / 'stage1-form1-s0.json'}" in lines and len(lines) == 5
    sheet = Image.open(home / "figures" / "shapes-sheet.png")  # 20 pixels of name above each third
    assert sheet.size == (30, 80)
    assert [sheet.getpixel((15, y)) for y in (25, 58, 65)] == [(0, 0, 255), (255, 255, 255), (255, 0, 0)]
    save_run(project, budget="smoke")  # passed over: it cannot be compared
    final.main(["--runs", str(project / "runs"), "--results", str(home)])
    report = (project / "runs" / "REPORT.md").read_text()
    assert "reproduced: cifar10" in report and "reproduced (off by 0%)" in report and "## claims" in report
    assert (project / "runs" / "cifar10-comparison.png").is_file()
    expect_error(capsys, lambda: final.main(["--results", str(project / "nothing")]), "no results there")
    expect_error(capsys, lambda: final.main(["--check", "--collect", "runs"]), "--collect", "not allowed with")


def test_collect_refuses_smoke_and_other_budgets(project, capsys):
    """One line names both files and budgets, and nothing is written, not even the runs that come before."""
    good = save_run(project)
    final.main(["--collect", good])
    before = content(project / "results")
    vae = save_run(project, "stage1-vae")
    smoke, gpu = (save_run(project, budget=budget) for budget in ("smoke", "gpu"))
    new_smoke = save_run(project, "stage2-sum", budget="smoke")
    for run, budgets in ((smoke, ("smoke", "cpu")), (gpu, ("gpu", "cpu")), (new_smoke, ("smoke", "none yet"))):
        target = project / "results" / "shapes" / f"{run.split('/')[-1]}.json"
        expect_error(capsys, lambda run=run: final.main(["--collect", vae, run]),
                     f"{run}/metrics.json (budget {budgets[0]})", f"{target} (budget {budgets[1]})")
        assert content(project / "results") == before
    final.main(["--collect", save_run(project, "stage2-sum", budget="gpu")])  # replaces nothing


def test_collect_refuses_two_runs_with_one_name(project, capsys):
    """The same data set, variant and seed, from two folders: one line names both, and nothing is written."""
    first = save_run(project)
    second = shutil.copytree(first, project / "copies" / "shapes-cpu" / "stage1-form1-s0")
    expect_error(capsys, lambda: final.main(["--collect", first, str(second)]), first, f"{second} would both become")
    assert not (project / "results").exists()


def test_results_of_own_images_stay_with_the_user(project, capsys):
    """They are not collected, even if their folder is called like a data set, and no text of the project shows them.
    The report on new runs does."""
    runs = [save_run(project, dataset="photos"), save_run(project, dataset="cifar10", crop="centre")]
    final.main(["--collect", *runs])
    assert capsys.readouterr().out.splitlines() == [f"{run}: of a user's own images, not collected" for run in runs]
    assert not (project / "results").exists()
    save(project / "results", metrics(), metrics(dataset="photos", crop="centre"))
    for name in ("features/shapes-0123abcd", "features/photos-0123abcd", "photos/recipe", "photos/pairs"):
        path = project / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"counts by sd of x_T": {"a": {"b": 1}}}))
    (project / "README.md").write_text("<!-- table stage 1 -->\n<!-- end -->\n<!-- table features -->\n<!-- end -->\n"
                                       "<!-- table claims -->\n<!-- end -->")
    final.main([])
    text = "".join(path.read_text() for path in (project / "README.md", project / "results" / "TABLES.md"))
    assert "shapes-0123abcd" in text and "shapes stage1-form1" in text and "photos" not in text
    assert not [*project.glob("results/figures/photos*")]
    final.main(["--runs", str(project / "runs")])
    assert "photos stage1-form1" in (project / "runs" / "REPORT.md").read_text()


def test_fill(capsys):
    """A marked table is replaced, as often as one likes, and the rest stays. An unknown table is an error."""
    once = final.fill("a\n<!-- table t -->\nold\n<!-- end -->\nb", {"t": "| new |"})
    assert once == "a\n<!-- table t -->\n| new |\n<!-- end -->\nb" == final.fill(once, {"t": "| new |"})
    expect_error(capsys, lambda: final.fill("<!-- table u -->\n<!-- end -->", {"t": ""}),
                 "table 'u' is not known; known are t")


def typed_decimals(text):
    """Numbers with a decimal point outside marked tables, code, link targets and versions."""
    for hidden in (r"<!-- (table|cited).*?<!-- end -->", r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)",
                   r"(Python|PyTorch) \d+\.\d+"):
        text = re.sub(hidden, "", text, flags=re.DOTALL)
    return re.findall(r"\d+\.\d+", text)


def check():
    """The exit status of --check, which writes nothing."""
    with pytest.raises(SystemExit) as stop:
        final.main(["--check"])
    return stop.value.code


def test_the_texts_agree_with_the_results(capsys):
    assert check() == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "REPORT.md", "results/TABLES.md"])
def test_an_edited_cell_is_noticed(name, tmp_path, monkeypatch):
    """A cell of one table in each of the texts is edited. --check says so and leaves it as it is."""
    for text in ("README.md", "REPORT.md"):
        shutil.copy(final.ROOT / text, tmp_path / text)
    shutil.copytree(final.ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.pt"))
    edited, count = re.subn(r"\| \d\.\d+ ± ", "| 5.679 ± ", (tmp_path / name).read_text(), count=1)
    (tmp_path / name).write_text(edited)
    monkeypatch.setattr(final, "ROOT", tmp_path)
    assert count == 1 and check() == 1 and (tmp_path / name).read_text() == edited


def test_no_decimal_is_typed():
    """A decimal in prose would be a number that no command wrote. One that is planted there is found."""
    assert typed_decimals(README) == [] == typed_decimals(REPORT)
    assert typed_decimals(README.replace("\n## Map", "\nA third, 0.34, of them.\n\n## Map")) == ["0.34"]
    assert typed_decimals("`torch>=2.6` [a](b-0.1.png) <!-- table t -->\n| 1.5 |\n<!-- end -->") == []


def test_sizes():
    """The README is read in three minutes, and tables are no wider than a page."""
    assert README.count("\n") <= 200 and len(README.encode()) <= 14_000
    header = [line for line in REPORT.splitlines() if line.startswith("|")]
    assert max(line.replace(r"\|", "").count("|") - 1 for line in header) <= 8


def test_every_claim_and_column_has_numbers():
    """A misspelt variant or column would show as "not run" or as an empty column."""
    everything = final.load_all(final.ROOT.glob(f"results/{RESULTS}"))
    for line in final.table_claims(everything, final.CLAIMS + final.FURTHER_CLAIMS).splitlines()[2:-2]:
        assert "not run" not in line.split(" | ")[3], line  # of shapes, every claim is tested
    for name, arguments in final.TABLES.items():
        rows = [line.split("|")[2:-1] for line in final.table_of(everything, *arguments).splitlines()[2:-2]]
        assert all(any(cell.strip() for cell in column) for column in zip(*rows, strict=True)), name


def test_every_line_of_a_chart_has_a_colour_of_its_own(monkeypatch, tmp_path):
    """Matplotlib has ten colours, then it begins again."""
    drawn = []
    monkeypatch.setattr(common, "save_chart", lambda path, panels: drawn.append(panels))
    for dataset, results in final.load_all(final.ROOT.glob(f"results/{RESULTS}")).items():
        final.draw_charts(tmp_path / "x.png", dataset, results)
    assert len(drawn) == 3 and all(len({line for panel in panels for line in panel["lines"]}) <= 10 for panels in drawn)


def test_pictures():
    """Every picture that a text shows is there, and every picture that is there is shown. Together they have at most
    6 MB, and none shows real images, except of shapes."""
    shown = {*PICTURE.findall(README), *PICTURE.findall(REPORT)}
    committed = {path.relative_to(final.ROOT).as_posix() for path in final.ROOT.glob("results/**/*.png")}
    assert shown == committed
    assert sum((final.ROOT / path).stat().st_size for path in committed) < 6e6
    real = re.compile(rf"results/(?!shapes).*({'|'.join(final.SHOW_REAL_IMAGES)})\.png")
    assert not any(map(real.fullmatch, committed))
