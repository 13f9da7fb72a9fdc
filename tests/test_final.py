"""Final evaluation: verdicts on planted results, comparability, tables, and that this repository's texts agree with its
results: no number was typed, no picture is missing or left over."""

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


def score(value):
    return {"value": float(value), "low": value - 1.0, "high": value + 1.0}


def metrics(variant="stage1-form1", seed=0, distance=10.0, **run):
    """A metrics file with one headline row, one of another prior and two of other steps."""
    names = [f"{name}_local" for name in ("floor", "is", "kid", "precision", "recall", "diversity")] + ["hf_energy"]
    row = {"prior": "gmm", "sampler": "dpm", "nfe": 25, "n_generated": 100, "seconds_per_image": 0.5,
           "peak_memory_mb": None, "fd_local": score(distance)} | {name: score(0.5) for name in names}
    facts = {"dataset": "shapes", "crop": "none", "data_note": "drawn", "variant": variant, "stage": variant[:6],
             "budget": "cpu", "seed": seed, "features": "local-a", "n_real": 5, "parameters": 10**6, "gflops": 0.5,
             "train_images": 7100, "train_seconds": 90.0, "device": "cpu", "commit": "c", "torch": "2",
             "eval": {"grid_count": 50, "temperature": 1.0}}
    grid = [row | {"nfe": n, "n_generated": 50, "fd_local": score(distance + 50 / n)} for n in (5, 25)]
    rows = [row, row | {"prior": "gaussian", "fd_local": score(3 * distance)}, *grid]
    return {"schema": 1, "run": facts | run, "rows": rows, "tables": {
        "bits_per_dim": {"bound": score(3)},
        "robustness": {"area": 1.25, "scores": {"clean": {"fd_local": score(distance)},
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


def test_verdicts_on_planted_results():
    """Clear win, clear loss, tie, one and two seeds; the interval is Student's over the pairs."""
    base = [10.0, 11.0, 12.0]
    assert final.verdict([0.5 * v for v in base], base).startswith("better by 50%")
    assert final.verdict([2 * v for v in base], base).startswith("worse by 100%")
    assert final.verdict([12.0, 9.5, 12.5], base).startswith("no difference shown (3 seeds: ")
    assert final.verdict([8.0], [10.0]) == "-20% (one run)"
    assert final.verdict([11.0, 12.1], [10.0, 11.0]) == "+10% (two runs)"
    text = final.verdict([9.0, 9.9, 9.6], base)  # ratios 0.9, 0.9, 0.8; t(0.975, 2) = 4.3027
    a, b = math.log(0.9), math.log(0.8)
    mean, half = (2 * a + b) / 3, 4.302653 * (a - b) / 3  # their sd is (a - b) / sqrt(3)
    low, high = (100 * (math.exp(mean + side) - 1) for side in (-half, half))
    assert text == f"no difference shown (3 seeds: {low:+.0f}% to {high:+.0f}%)"


def test_a_columns_name_is_its_place(tmp_path):
    """A single score has its interval, several seeds their spread; of times the first seed's stands alone."""
    slow = metrics(seed=1, distance=13.0)
    slow["rows"][0]["seconds_per_image"] *= 3
    seeds = load(tmp_path, metrics(), slow)["shapes"]["stage1-form1"]
    one = {0: seeds[0]}
    assert [final.cell(one, name) for name in ("fd", "gaussian/fd", "dpm 5/fd", "own prior/fd", "noise 0.4/fd")] == [
        "10 [9, 11]", "30 [29, 31]", "20 [19, 21]", "12 [11, 13]", "40 [39, 41]"]
    assert [final.cell(one, name) for name in ("noise area", "train minutes", "no such")] == ["1.25", "1.5", ""]
    assert final.cell(seeds, "fd") == "11.5 ± 2.1" and final.cell(seeds, "noise area") == "1.25"
    assert final.values(seeds, "s/image") == {0: 0.5} and final.values(seeds, "fd") == {0: 10.0, 1: 13.0}
    assert final.mean_and_sd([1234.5]) == "1,234" and final.mean_and_sd([1.0, 2.0, 3.0]) == "2 ± 1"


@pytest.mark.parametrize("change,key", [
    ({"features": "local-b"}, "features"), ({"crop": "celeba-148"}, "crop"), ({"data_note": "JPEG"}, "data_note"),
    ({"n_real": 6}, "n_real"), ({"train_images": 99}, "train_images"), ({"budget": "smoke"}, "budget"),
    ({"eval": {"temperature": 0.7}}, "temperature"), ({}, "n_generated")])
def test_what_cannot_be_compared_is_refused(change, key, tmp_path, capsys):
    """The file and the key are named."""
    other = metrics("stage1-vae", **change)
    other["rows"][0]["n_generated"] += not change
    expect_error(capsys, lambda: load(tmp_path, metrics(), other), f" {key} was ", "stage1-vae-s0.json")


def test_a_damaged_file_is_named(tmp_path, capsys):
    path, = save(tmp_path, metrics())
    for text in (path.read_text()[:100], "{}", json.dumps(metrics() | {"rows": []})):
        path.write_text(text)
        expect_error(capsys, lambda: final.load_all([path]), "stage1-form1-s0.json: damaged")


def test_claims(tmp_path):
    """Each claim is judged over the seeds that both sides have, on each data set that has both, or is not run."""
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
    assert quality[3].startswith("5.5 ± 0.5 / 11 ± 1: better by 50% (3 seeds: ") and quality[4] == "not run |"
    assert "| 1.2 / 1.6 ± 0.1: better by 25% (3 seeds: " in table  # as stage 2 measured it
    assert table.count("/ 40: -75% (one run)") == 1  # VAE and refiner
    assert len(re.findall(r"\(`film`\).* \| not run \| not run \|", table)) == 2
    assert "| 12 / 30: -60% (one run) |" in table  # own prior of the second data set
    assert "budget `cpu` (7,100 images per network), 100 samples (50 in probes" in table and "`local-a`" in table


def test_tables(tmp_path):
    """A line for each fitting variant with a number, then what they rest on; long ones by stage, with every number."""
    many = metrics(), metrics(seed=1, distance=13.0), metrics("stage1-vae"), metrics("bonus-latent")
    everything = load(tmp_path, *many)
    table = final.table_of(everything, "stage1-*", "fd; bits/dim; no such").splitlines()
    assert table[2] == "| shapes stage1-vae | 10 [9, 11] | 3 [2, 4] |  |"
    assert table[3] == "| shapes stage1-form1 | 11.5 ± 2.1 | 3 |  |"
    assert "| shapes stage1-form1 | 13 [" in final.table_of(everything, "stage1-*", "fd", 1)  # of seed 1 alone
    assert len(table) == 6 and table[5].startswith("*shapes: drawn, budget `cpu`") and final.NOTE in table[5]
    assert len(final.table_of(everything, "*", "no such").splitlines()) == 4
    text = final.long_tables(everything, tmp_path)
    assert "## shapes, stage1" in text and "## shapes, bonus" in text and "## shapes, stage2" not in text
    assert "|  | stage1-vae | stage1-form1 |" in text and "| dpm 5/fd | 20 [19, 21] | 21.5 ± 2.1 |" in text
    for name in final.leaves(metrics()["rows"][0] | metrics()["tables"]):
        assert f"\n| {name} | " in text


def test_reproduced(tmp_path):
    """Within 25% of one committed seed, or of three where Student expects another run; more is said so, and so is
    nothing."""
    fresh = load(tmp_path / "fresh", metrics(distance=12.4), metrics("stage1-vae", 0, 40.0), metrics("bonus-latent"))
    one = load(tmp_path / "one", metrics(distance=10.0), metrics("stage1-vae", distance=30.0))
    lines = final.table_reproduced(fresh["shapes"], one["shapes"]).splitlines()
    said = {tuple(line.split(" | ")[:2]): line.split(" | ")[-1] for line in lines[2:]}
    assert said["| stage1-form1", "fd"] == "reproduced (off by 24%) |"
    assert said["| stage1-vae", "fd"] == "NOT reproduced (off by 33%) |"
    assert said["| bonus-latent", "fd"] == "nothing committed |"
    three = load(tmp_path / "three", *(metrics(seed=s, distance=10 + 0.1 * s) for s in (0, 1, 2)))
    assert "NOT reproduced (off by 23%)" in final.table_reproduced(fresh["shapes"], three["shapes"]).splitlines()[4]
    for k, distance in enumerate((11.24, 11.25)):  # t(0.995; 2) = 9.925, times 0.1 and the root of 4/3: 1.146 from 10.1
        near = load(tmp_path / f"near{k}", metrics(distance=distance))["shapes"]
        assert f"| {'NOT ' * k}reproduced" in final.table_reproduced(near, three["shapes"])


def test_charts(tmp_path, monkeypatch):
    """Means over seeds against steps and against noise; the latent model's noise, in its latent, is not compared."""
    drawn = []
    monkeypatch.setattr(common, "save_chart", lambda path, panels: drawn.append(panels))
    results = load(tmp_path, metrics(), metrics(seed=1, distance=13.0), metrics("bonus-latent"), metrics("stage2-sum"))
    final.draw(tmp_path / "x.png", "shapes", results["shapes"])
    (steps, noise), = drawn
    assert steps["lines"]["stage1-form1"] == ((5, 25), (21.5, 13.5)) and noise["lines"].keys() == {"stage1-form1"}
    assert noise["lines"]["stage1-form1"] == ((0.0, 0.4), (11.5, 46.0))
    assert steps["lines"].keys() == {"stage1-form1", "bonus-latent"}


def test_collect_and_runs(tmp_path, monkeypatch, capsys):
    """--collect copies metrics and the figures that a text shows, but none of real images, and stacks samples of all
    stages; --runs writes a report."""
    monkeypatch.setattr(final, "ROOT", tmp_path)
    shown = [f"{dataset}/stage1-form1-s0-{part}" for dataset in ("shapes", "cifar10") for part in
             ("reconstructions", "samples")]  # the reconstructions of cifar10 must not be copied all the same
    for text, names in (("README.md", shown[:1]), ("REPORT.md", shown[1:])):
        (tmp_path / text).write_text("".join(f"![](results/{name}.png)" for name in names))
    for dataset in ("shapes", "cifar10"):
        run = tmp_path / "runs" / f"{dataset}-cpu" / "stage1-form1-s0"
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps(metrics(dataset=dataset)))
        for name in ("samples", "reconstructions", "training"):
            Image.new("RGB", (30, 60), "red").save(run / f"{name}.png")
    final.main(["--collect", *map(str, tmp_path.glob("runs/*/*"))])
    found = {(path.parent.name, path.name.removeprefix("stage1-form1-s0")) for path in tmp_path.glob("results/*/*")}
    assert found == {("shapes", ".json"), ("shapes", "-samples.png"), ("shapes", "-reconstructions.png"),
                     ("cifar10", ".json"), ("cifar10", "-samples.png"), ("figures", "shapes-sheet.png"),
                     ("figures", "cifar10-sheet.png")}
    assert Image.open(tmp_path / "results" / "figures" / "shapes-sheet.png").size == (30, 40)  # a name, a third
    smoke = tmp_path / "runs" / "shapes-smoke" / "stage1-form1-s0" / "metrics.json"
    smoke.parent.mkdir(parents=True)
    smoke.write_text(json.dumps(metrics(budget="smoke")))  # passed over: it cannot be compared
    final.main(["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")])
    report = (tmp_path / "runs" / "REPORT.md").read_text()
    assert "reproduced: cifar10" in report and "reproduced (off by 0%)" in report and "## claims" in report
    assert (tmp_path / "runs" / "cifar10-comparison.png").is_file()
    expect_error(capsys, lambda: final.main(["--results", str(tmp_path / "nothing")]), "no results there")
    expect_error(capsys, lambda: final.main(["--check", "--collect", "runs"]), "--collect", "not allowed with")


def test_fill(capsys):
    """A marked table is replaced, again and again; the rest stays; a table that is not known is an error."""
    once = final.fill("a\n<!-- table t -->\nold\n<!-- end -->\nb", {"t": "| new |"})
    assert once == "a\n<!-- table t -->\n| new |\n<!-- end -->\nb" == final.fill(once, {"t": "| new |"})
    expect_error(capsys, lambda: final.fill("<!-- table u -->\n<!-- end -->", {"t": ""}),
                 "table 'u' is not known; known are t")


def typed_decimals(text):
    """Numbers with a decimal point outside marked tables, code and link targets."""
    for hidden in (r"<!-- (table|cited).*?<!-- end -->", r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)"):
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
    """One table's cell, in each of the texts; and it stays as it was edited."""
    for text in ("README.md", "REPORT.md"):
        shutil.copy(final.ROOT / text, tmp_path / text)
    shutil.copytree(final.ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.pt"))
    edited, count = re.subn(r"\| \d\.\d+ ± ", "| 5.679 ± ", (tmp_path / name).read_text(), count=1)
    (tmp_path / name).write_text(edited)
    monkeypatch.setattr(final, "ROOT", tmp_path)
    assert count == 1 and check() == 1 and (tmp_path / name).read_text() == edited


def test_no_decimal_is_typed():
    """...and one that is planted in prose is found."""
    assert typed_decimals(README) == [] == typed_decimals(REPORT)
    assert typed_decimals(README.replace("\n## Map", "\nA third, 0.34, of them.\n\n## Map")) == ["0.34"]
    assert typed_decimals("`torch>=2.6` [a](b-0.1.png) <!-- table t -->\n| 1.5 |\n<!-- end -->") == []


def test_sizes():
    assert README.count("\n") <= 200 and len(README.encode()) <= 12_000
    header = [line for line in REPORT.splitlines() if line.startswith("|")]
    assert max(line.replace(r"\|", "").count("|") - 1 for line in header) <= 8


def test_every_line_of_a_chart_has_a_colour_of_its_own(monkeypatch, tmp_path):
    """Matplotlib has ten, then begins again."""
    drawn = []
    monkeypatch.setattr(common, "save_chart", lambda path, panels: drawn.append(panels))
    for dataset, results in final.load_all(final.ROOT.glob(f"results/{RESULTS}")).items():
        final.draw(tmp_path / "x.png", dataset, results)
    assert len(drawn) == 3 and all(len({line for panel in panels for line in panel["lines"]}) <= 10 for panels in drawn)


def test_pictures():
    """What a text shows is there, and what is there is shown; 6 MB at most."""
    shown = {*PICTURE.findall(README), *PICTURE.findall(REPORT)}
    committed = {path.relative_to(final.ROOT).as_posix() for path in final.ROOT.glob("results/**/*.png")}
    assert shown == committed
    assert sum((final.ROOT / path).stat().st_size for path in committed) < 6e6
    real = re.compile(rf"results/(?!shapes).*({'|'.join(final.PRIVATE)})\.png")
    assert not any(map(real.fullmatch, committed))
