"""Final evaluation: verdicts on planted results, comparability, marks in texts, and that the texts of this repository
agree with its results."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_stage1 import expect_error

import common
import final_evaluation as final


def metrics(variant="stage1-form1", seed=0, distance=10.0, **run):
    """A metrics file with one headline row and one row of the grid."""
    score = lambda value: {"value": float(value), "low": value - 1.0, "high": value + 1.0}  # noqa: E731
    names = [f"{name}_local" for name in ("floor", "is", "kid", "precision", "recall", "diversity")] + ["hf_energy"]
    row = {"prior": "gmm", "sampler": "dpm", "nfe": 25, "n_generated": 100, "seconds_per_image": 0.5,
           "peak_memory_mb": None, "fd_local": score(distance)} | {name: score(0.5) for name in names}
    facts = {"dataset": "shapes", "crop": "none", "data_note": "", "variant": variant, "stage": variant[:6],
             "budget": "cpu", "seed": seed, "features": "local-a", "n_real": 5, "parameters": 10**6, "gflops": 0.5,
             "train_images": 100, "train_seconds": 60.0, "device": "cpu", "commit": "c", "versions": {}, "eval": {}}
    table = {"bits_per_dim": {"bound": score(3)}, "robustness": {"area": 1.25}}
    grid = [row | {"nfe": n, "n_generated": 50, "fd_local": score(distance + 50 / n)} for n in (5, 10)]
    return {"schema": 1, "run": facts | run, "rows": [row, *grid], "tables": table}


def save(folder, *many):
    for m in many:
        path = folder / "shapes" / f"{m['run']['variant']}-s{m['run']['seed']}.json"
        common.write_json(path, m)
    return sorted(folder.glob("shapes/*.json"))


# --- Verdicts --------------------------------------------------------------------------------------------------------


def test_verdicts_on_planted_results():
    """Clear win, clear loss, tie, one and two seeds, none in common; the interval is Student's over the pairs."""
    base = {0: 10.0, 1: 11.0, 2: 12.0}
    assert final.verdict({s: 0.5 * v for s, v in base.items()}, base).startswith("better by 50%")
    assert final.verdict({s: 2 * v for s, v in base.items()}, base).startswith("worse by 100%")
    assert final.verdict({s: 2 * v for s, v in base.items()}, base, lower_is_better=False).startswith("better by 100%")
    assert final.verdict({0: 12.0, 1: 9.5, 2: 12.5}, base).startswith("no difference shown (3 paired seeds")
    assert final.verdict({0: 8.0}, base) == "20% lower (one run, not tested)"
    assert final.verdict({0: 11.0, 1: 12.1}, {0: 10.0, 1: 11.0}) == "10% higher (two runs, not tested)"
    assert final.verdict({7: 1.0}, base) == "no common seed, not compared"
    differences = [-1.0, -2.0, -1.5]  # mean -1.5, sd 0.5, t(0.975, 2) = 4.3027
    text = final.verdict({s: base[s] + d for s, d in enumerate(differences)}, base)
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert text.endswith(f"95%: {100 * (-1.5 - half) / 11:+.0f}% to {100 * (-1.5 + half) / 11:+.0f}%)")


def test_formats():
    assert final.interval_text({"value": 1.23456, "low": 1.0, "high": 1.5}) == "1.23 [1, 1.5]"
    assert final.interval_text({"value": 2.0, "low": None, "high": None}) == "2"
    assert final.over_seeds([1.0, 2.0, 3.0]) == "2 ± 1" and final.over_seeds([1.5]) == "1.5"


def test_answers(tmp_path):
    """Each question is answered from the numbers, or names the command that is missing."""
    alone = final.answers(final.load_all(save(tmp_path / "a", metrics()))["shapes"])
    assert alone.count("not run yet") == 3 and "python stage2_joint.py" in alone and "`stage1-form1` 1.25" in alone
    many = []
    for seed in range(3):
        joint = metrics("stage2-anneal", seed, 5.0 + seed)
        space = {"slerp": {"refined": {"path_over_distance": 1.2}}}
        joint["tables"] |= {"latent_space": space,
                            "latent_space_stage1": {"slerp": {"refined": {"path_over_distance": 1.5 + seed / 10}}}}
        adaptive = metrics("stage3-flow-learned", seed)
        adaptive["tables"]["uncertainty"] = {"adaptive_steps": {
            "even": {"fd_local": {"value": 10}, "seconds_per_image": 1.0},
            "adaptive": {"fd_local": {"value": 9}, "seconds_per_image": 1.1}}}
        adaptive["tables"]["robustness"] = {"area": 1.5 + seed / 10}
        fixed = metrics("stage3-flow-fixed", seed, 9.0 + seed)
        fixed["tables"]["robustness"] = {"area": 3.0 + seed / 10}
        fixed["rows"][0]["seconds_per_image"] /= 2
        fixed["tables"]["steps_to_quality"] = {"dpm": {"steps": 5, "of": 25, "time_saved": 0.8}}
        many += [metrics(seed=seed, distance=10.0 + seed), joint, adaptive, fixed]
    text = final.answers(final.load_all(save(tmp_path / "b", *many))["shapes"])
    assert "`stage2-anneal` against `stage1-form1`: better by 45%" in text and "not run yet" not in text
    assert "1.10 times the time" in text and "in distance, better by 10% (3 paired seeds" in text
    assert "2.00 times the time of `fixed`" in text and "under the flow prior 5 steps come within 10% of 25" in text
    assert "end distance in feature space: better by 25%" in text
    assert "(`stage3-flow-fixed`): better by 9%" in text
    assert "`stage3-flow-learned` against `stage3-flow-fixed`: better by 48%" in text


def test_times_are_the_first_seeds(tmp_path):
    """Another seed may have shared the machine: its seconds are not averaged in, its scores are."""
    both = [metrics(seed=seed, distance=10.0 + seed) for seed in range(2)]
    both[1]["rows"][0]["seconds_per_image"] *= 3
    seeds = final.load_all(save(tmp_path, *both))["shapes"]["stage1-form1"]
    assert final.mean_at(seeds, "rows.0.seconds_per_image") == both[0]["rows"][0]["seconds_per_image"]
    assert final.mean_at(seeds, "rows.0.fd_local.value") == 10.5
    look_up = lambda name: final.look_up(f"shapes/{name} rows.0.fd_local.value", {"shapes": {"a": seeds}})  # noqa: E731
    assert (look_up("a"), look_up("a@0"), look_up("a@1")) == (10.5, 10.0, 11.0)


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key,value", [("features", "local-b"), ("crop", "celeba-148"), ("n_real", 6),
                                       ("train_images", 99), ("budget", "smoke")])
def test_what_cannot_be_compared_is_refused(key, value, tmp_path, capsys):
    """The file and the key are named."""
    paths = save(tmp_path, metrics(), metrics("stage1-vae", **{key: value}))
    with pytest.raises(SystemExit) as stop:
        final.load_all(paths)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and key in err and "stage1-vae-s0.json" in err and str(value) in err


def test_other_counts_are_refused(tmp_path, capsys):
    other = metrics("stage1-vae")
    other["rows"][0]["n_generated"] = 99
    with pytest.raises(SystemExit):
        final.load_all(save(tmp_path, metrics(), other))
    assert "n_generated was 100, is now 99" in capsys.readouterr().err


def test_a_damaged_file_is_named(tmp_path, capsys):
    path, = save(tmp_path, metrics())
    for text in (path.read_text()[:100], "{}", json.dumps(metrics() | {"rows": []})):
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            final.load_all([path])
        assert stop.value.code == 2 and "stage1-form1-s0.json: damaged" in capsys.readouterr().err


def test_order(tmp_path):
    names = ["bonus-latent", "stage3-flow-fixed", "stage2-anneal", "stage1-form1", "stage1-vae", "stage1-uncond"]
    found = final.load_all(save(tmp_path, *map(metrics, names)))["shapes"]
    assert list(found) == ["stage1-vae", "stage1-uncond", "stage1-form1", *names[2::-1]]


# --- Texts -----------------------------------------------------------------------------------------------------------


def test_marks(tmp_path, capsys):
    """Numbers, ratios and blocks are rewritten in place and again; what is not there is an error."""
    everything = final.load_all(save(tmp_path, metrics(), metrics("stage1-vae", distance=40.0)))
    text = ("a <!-- = shapes/stage1-form1 rows.0.fd_local.value .1f -->?<!-- . --> b "
            "<!-- = shapes/stage1-vae rows.0.fd_local.value / shapes/stage1-form1 rows.0.fd_local.value .2f -->"
            "<!-- . -->\n<!-- block t -->\nold\n<!-- end --> c")
    once = final.fill(text, {"t": "| new |"}, everything)
    assert "-->10.0<!-- . -->" in once and "-->4.00<!-- . -->" in once
    assert "<!-- block t -->\n| new |\n<!-- end --> c" in once and "old" not in once
    assert final.fill(once, {"t": "| new |"}, everything) == once
    for wrong in ("<!-- block u -->x<!-- end -->", "<!-- = shapes/stage1-form1 rows.9.nfe d -->1<!-- . -->",
                  "<!-- = shapes/stage9 rows.0.nfe d -->1<!-- . -->"):
        with pytest.raises(SystemExit):
            final.fill(wrong, {"t": ""}, everything)
    capsys.readouterr()


def test_marks_are_means_over_seeds(tmp_path):
    """10 and 13 make 11.5 in a text and in a stage's table; a seed without the number is left out."""
    everything = final.load_all(save(tmp_path, metrics(), metrics(seed=1, distance=13.0)))
    mark = "<!-- = shapes/stage1-form1 {} .2f -->{}<!-- . -->"
    assert final.fill(mark.format("rows.0.fd_local.value", "?"), {}, everything) == mark.format(
        "rows.0.fd_local.value", "11.50")
    del everything["shapes"]["stage1-form1"][1]["tables"]["robustness"]
    assert "-->1.25<!--" in final.fill(mark.format("tables.robustness.area", "?"), {}, everything)
    assert final.table_of(everything["shapes"], "stage1", {"fd": "rows.0.fd_local"}).endswith("| stage1-form1 | 11.5 |")


def test_tables_have_every_variant_and_row(tmp_path):
    results = final.load_all(save(tmp_path, metrics(), metrics(seed=1, distance=12.0), metrics("stage1-vae")))["shapes"]
    table = final.table_variants(results).splitlines()
    assert len(table) == 2 + 8 and table[2].startswith("| stage1-vae | 1 | gmm | dpm 25 | 100 | 10 [9, 11] | -9% |")
    assert table[3].startswith("| stage1-uncond | not run: `python stage1_baseline.py --variant uncond` |  |")
    assert "| stage1-form1 | 2 | gmm | dpm 25 | 100 | 11 ± 1.4 |  |" in table[4]
    assert len({line.count("|") for line in table}) == 1 and len(final.table_steps(results).splitlines()) == 2 + 4


def test_tables_of_stages(tmp_path):
    """Each stage's own table has its variants, the numbers at their places and nothing where a number is missing; stage
    1's latent space is the one that stage 2 measured beside its own."""
    path = lambda value: {"slerp": {part: {"path_over_distance": value, "end_distance": 2.0}  # noqa: E731
                                    for part in ("vae", "refined")}}
    many = [metrics()]
    for variant, weight in (("stage2-sum-w0.1", 0.1), ("stage2-sum", 1.0), ("stage2-sum-w10", 10.0)):
        m = metrics(variant, distance=5 + weight)
        m["tables"] |= {"before_refinement": {"fd_local": {"value": 40 + weight, "low": None, "high": None}},
                        "reconstruction": {"psnr_db": 20.5, "kl_nats": 30 * weight}, "latent": {"active_units": 12},
                        "training": {"share": weight / 20}, "latent_space": path(1.5),
                        "latent_space_stage1": path(1.75)}
        many.append(m)
    prior = metrics("stage3-vae-flow")
    prior["tables"]["elbo"] = {"negative_elbo": {"value": 90.0, "low": 89.0, "high": 91.0}}
    saved = metrics("bonus-latent")
    saved["tables"]["savings"] = {"saved_percent": {"gflops_per_image": 80.0}}
    results = final.load_all(save(tmp_path, *many, prior, metrics("stage3-flow-learned"), saved))["shapes"]
    tables = {name: table.splitlines() for name, table in final.tables_of_stages(results).items()}
    assert [line.split(" | ")[0] for line in tables["joint"][2:]] == [
        "| stage1-form1", "| stage2-sum", "| stage2-sum-w0.1", "| stage2-sum-w10"]
    assert tables["joint"][5].startswith("| stage2-sum-w10 | 50 | 15 |  | 0.5 | 20.5 | 300 | 12 | 0.5 |")
    assert [line.split(" | ")[1] for line in tables["latent space"][2:]] == ["1.75", "1.5", "1.5", "1.5"]
    assert len(tables["prior"]) == 3 and "| 90 [89, 91] |" in tables["prior"][2]
    assert len(tables["adaptive"]) == 3 and tables["adaptive"][2].startswith("| stage3-flow-learned | 10 | 0.5 | 3 |")
    assert tables["savings"][2].startswith("| bonus-latent | 80 |  |")
    charts = {path.name for path in final.draw(results, tmp_path, "shapes")}
    assert charts == {"shapes-comparison.png", "shapes-sweep.png", "shapes-smoothness.png"}


def test_chart_of_uncertainty(tmp_path, monkeypatch):
    """One error curve per VAE; thirds of s before (once per VAE) and after refinement (once per refiner: two that
    differ in the prior alone have one line)."""
    part = lambda fd, refined: {"vae": {"fd_to_these": 9 * fd}, "refined": {"fd_to_these": refined * fd}}  # noqa: E731
    table = lambda refined: {  # noqa: E731
        "error_by_uncertainty": [{"s": -1.0, "sse": 2.0}, {"s": 1.0, "sse": 3.0}],
        "terciles": {"sure": part(1.0, refined), "middle": part(2.0, refined), "unsure": part(4.0, refined)}}
    charts = []
    monkeypatch.setattr(common, "save_chart", lambda path, panels: charts.append(panels))
    final.draw_uncertainty(tmp_path / "x.png", "shapes", {
        "stage3-flow-fixed": table(2.0), "stage3-flow-learned": table(1.0), "stage3-gaussian-fixed": table(3.0),
        "stage3-gmm-fixed": table(3.0)})
    (error, thirds), = charts
    assert error["lines"] == {f"VAE with {k} prior": [[-1.0, 1.0], [2.0, 3.0]] for k in ("flow", "Gaussian")}
    assert thirds["lines"]["stage3-flow-learned"] == ([1, 2, 3], [1.0, 2.0, 4.0])
    assert thirds["lines"]["Gaussian VAE, unrefined"] == ([1, 2, 3], [9.0, 18.0, 36.0]) and len(thirds["lines"]) == 5
    assert "stage3-gaussian-fixed" in thirds["lines"] and "stage3-gmm-fixed" not in thirds["lines"]


def test_sheet_of_samples(tmp_path):
    """Real images once, then of each variant the first row, or two where the VAE's stand above the refined ones."""
    form1, latent = metrics(), metrics("bonus-latent")
    form1["tables"]["before_refinement"] = {}
    results = final.load_all(save(tmp_path, form1, latent))["shapes"]
    pages = {"stage1-form1-s0-samples": (10, 20, 30, 40, 50, 60), "bonus-latent-s0-samples": (70, 80, 90),
             "stage1-form1-s0-reconstructions": (100, 110, 120)}
    for name, shades in pages.items():
        tiles = torch.tensor(shades, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 12, 3, 32, 32)
        common.save_grid(tmp_path / "shapes" / f"{name}.png", list(tiles))
    path, = final.draw_sheet(tmp_path / "sheet.png", tmp_path, "shapes", results)
    column = np.asarray(Image.open(path).convert("L"))[:, -50]
    assert [int(v) for v in dict.fromkeys(column.tolist()) if v < 255] == [100, 10, 20, 70]


def test_reproduced(tmp_path):
    """Within 25% of one committed seed, or 3 standard deviations of three; more is said so, and so is nothing."""
    load = lambda where, *many: final.load_all(save(tmp_path / where, *many))["shapes"]  # noqa: E731
    fresh = load("fresh", metrics(distance=12.4), metrics("stage1-vae", distance=40.0), metrics("bonus-latent"))
    one = load("one", metrics(distance=10.0), metrics("stage1-vae", distance=30.0))
    lines = final.table_reproduced(fresh, one).splitlines()
    said = {tuple(line.split(" | ")[:2]): line.split(" | ")[-1] for line in lines[2:]}
    assert said["| stage1-form1", "fd_local"] == "reproduced (off by 24%) |"
    assert said["| stage1-vae", "fd_local"] == "NOT reproduced (off by 33%) |"
    assert said["| bonus-latent", "fd_local"] == "nothing committed |"
    three = load("three", *(metrics(seed=s, distance=10 + 0.1 * s) for s in (0, 1, 2)))
    assert "NOT reproduced (off by 23%)" in final.table_reproduced(fresh, three).splitlines()[2 + 2]


def test_collect_and_runs(tmp_path, monkeypatch, capsys):
    """--collect copies metrics and figures, but no figure of real images; --runs writes a report beside the runs."""
    run = tmp_path / "runs" / "cifar10-cpu" / "stage1-form1-s0"
    other = copy.deepcopy(metrics(dataset="cifar10"))
    common.write_json(run / "metrics.json", other)
    vae = tmp_path / "vae"
    common.write_json(vae / "metrics.json", metrics("stage1-vae", dataset="cifar10"))
    for name in ("samples", "reconstructions", "steps"):
        (run / f"{name}.png").write_bytes(b"png")
        (vae / f"{name}.png").write_bytes(b"png")
    final.main(["--collect", str(run), str(vae), "--results", str(tmp_path / "results")])
    found = {path.name for path in (tmp_path / "results" / "cifar10").iterdir()}  # large figures: of the refiner alone
    assert found == {"stage1-form1-s0.json", "stage1-form1-s0-samples.png", "stage1-form1-s0-steps.png",
                     "stage1-vae-s0.json", "stage1-vae-s0-samples.png"}
    final.main(["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")])
    report = (tmp_path / "runs" / "REPORT.md").read_text()
    assert "stage1-form1" in report and "variants cifar10" in report
    assert (tmp_path / "runs" / "cifar10-comparison.png").is_file()
    monkeypatch.setattr("test_stage1.stage1.main", final.main)
    expect_error(capsys, ["--results", str(tmp_path / "nothing")], "no results there", "stage1_baseline.py")


def test_the_texts_agree_with_the_results(capsys):
    """README.md and REPORT.md are what the committed results make of them: not a number was typed."""
    with pytest.raises(SystemExit) as stop:
        final.main(["--check"])
    assert stop.value.code == 0, capsys.readouterr().out


def test_verdicts_on_pairs_are_counted_by_side(tmp_path):
    """A letter names a side; which image stood there is in refined_side. Sheets of one temperature are added up."""
    sheets = [{"temperature": 1.0, "refined_side": "lrlr", "verdicts": "LRrl"},
              {"temperature": 0.7, "refined_side": "lr", "verdicts": "=R"},
              {"temperature": 1.0, "refined_side": "rl", "verdicts": "Ll"}]
    (tmp_path / "pairs.json").write_text(json.dumps({"sheets": sheets}))
    lines = final.table_pairs(tmp_path / "pairs.json").splitlines()
    assert lines[2:] == ["| 0.7 | 2 | 1 | 0 | 1 | 0 | 0 |", "| 1 | 6 | 2 | 1 | 0 | 2 | 1 |"]
