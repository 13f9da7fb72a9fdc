"""final_evaluation.py, on small files metrics.json that are written here."""

import json
import re
from math import log, sqrt

import numpy as np
import pytest
from scipy.stats import t as student

import common
import final_evaluation as final

STRATEGIES = {"all": (2.0, 10), "two_steps": (4.0, 2), "by_s": (3.0, 2), "by_s_shuffled": (4.4, 2),
              "unsure_third": (2.2, 10 / 3), "unsure_third_shuffled": (4.0, 10 / 3)}  # fd, evaluations


def score_row(fd, prior="gmm", sampler="dpm", steps=10, count=1000, key="fd_local"):
    row = {"prior": prior, "sampler": sampler, "steps": steps, "nfe": steps, "n_generated": count,
           "seconds_per_image": 0.01 + 0.002 * steps, key: {"value": fd, "low": 0.9 * fd, "high": 1.1 * fd}}
    others = {"is": 2.5, "floor": 0.2, "kid": 0.1, "precision": 0.7, "recall": 0.8, "diversity": 0.9, "hf_energy": 0.8}
    return row | {name: {"value": value} for name, value in others.items()}


def metrics_of(variant="stage1-form1", seed=0, fd=2.0, dataset="shapes", changes=None, commit="abc", budget="cpu",
               count=1000, features="local-shapes", key="fd_local"):
    """What a stage would write, as far as it is read."""
    changes = changes or {}
    prior = "flow" if variant.startswith("stage3") else "gmm"
    rows = [score_row(fd, prior, count=count, key=key), score_row(3 * fd, prior, "none", 0, count, key),
            score_row(1.5 * fd, "gaussian", count=300, key=key),
            *(score_row(fd * (1 + 2 / steps), prior, sampler, steps, 300, key)
              for sampler, steps in (("ddim", 10), ("dpm", 2), ("dpm", 5), ("dpm", 25)))]
    tables = {"robustness": {"images": 300, "fd": {"0.0": 1.1 * fd, "0.1": 2 * fd, "0.2": 3 * fd, "0.4": 4 * fd},
                             "mean": 3 * fd},
              "latent_space": {"images": 4000, "kl_nats": 30.0, "path_over_distance": 1.5 + 0.01 * seed,
                               "probe_accuracy": 0.9, "probe_r2": {"size": 0.9, "x": 0.5}},
              "likelihood": {"bits_per_dim": 3.5, "log_density": {"gaussian": -90.0, "gmm": -60.0}}}
    if variant in ("stage1-uncond", "stage3-vae-flow"):
        del tables["robustness"]
    if variant.startswith("stage3"):
        strategies = {name: {key: fd * factor, "hf_energy": 0.7, "evaluations": evaluations,
                             "seconds_per_image": 0.01 + 0.002 * evaluations + 0.0001 * seed}
                      for name, (factor, evaluations) in STRATEGIES.items()}
        tables |= {"rank_correlation": {"regressed": 0.64, "posterior": 0.3},
                   "terciles": {"images": 300, "own_s": 1.1, "shuffled_s": 1.9},
                   "strategies": {"gmm": {"images": 999} | strategies, "flow": {"images": 999} | strategies}}
    if variant == "bonus-latent":
        saved = {"seconds_per_image": 71.0, "seconds_per_image_one_by_one": 30.0, "peak_memory_mb": -59.0,
                 "gflops_per_image": 63.0}
        tables |= {"ceiling": {key: {"value": 5.5}, "psnr_db": 30.0}, "savings": {"saved_percent": saved}}
    settings = {"vae_steps": 900, "unet_steps": 600, "eval_samples": count, "probe_samples": 300, "probe_steps": 10,
                "diffusion_weight": 0.03} | changes | {"changes": changes}
    run = {"dataset": dataset, "variant": variant, "budget": budget, "seed": seed, "data_note": "drawn", "minutes": 4.0,
           "features": features, "parameters": 1_566_262, "commit": commit, "settings": settings}
    return {"schema": 1, "run": run, "rows": rows, "tables": tables}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder with a README and a REPORT; results/ is to be its folder of results."""
    monkeypatch.setattr(final, "RESULTS", tmp_path / "results")
    for name in ("README.md", "REPORT.md"):
        (tmp_path / name).write_text("text\n")
    return tmp_path


def put(project, *everything):
    """Write metrics into the folder of results, under the names that --collect gives."""
    for metrics in everything:
        run = metrics["run"]
        common.write_json(project / "results" / run["dataset"] / f"{final.name_of(run)}-s{run['seed']}.json", metrics)


def results_of(project, *everything):
    put(project, *everything)
    return final.grouped(final.read_results())


def cells(text, start):
    """{column: cell} of the first line of a table whose cells begin with `start`."""
    lines = [[part.strip() for part in line.strip("| ").split(" | ")] for line in text.splitlines()]
    row = next(i for i, line in enumerate(lines) if line[: len(start)] == start)
    header = next(lines[i - 1] for i in range(row, 0, -1) if set(lines[i]) == {"---"})
    assert len(header) == len(lines[row])
    return {column.split(" ↓")[0].split(" ↑")[0]: cell for column, cell in zip(header, lines[row], strict=True)}


def a_few(seeds=3):
    """Results of several variants: joint training has 0.8 of form1's fd, up to a little noise."""
    factors = {"stage1-form1": 1.0, "stage1-augmented": 0.95, "stage1-uncond": 3.0, "stage2-anneal": 0.8,
               "stage2-anneal-grad-none": 0.9, "stage3-fixed": 1.0, "stage3-film": 1.1, "bonus-latent": 5.0}
    random = np.random.RandomState(0)
    return [metrics_of(variant, seed, fd=2 * factor * (1 + 0.05 * random.rand()))
            for variant, factor in factors.items() for seed in range(seeds)]


# ---- Comparing -------------------------------------------------------------------------------------------------------

def test_comparison_by_closed_form():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 2.5, 2: 4.5}
    percent, count, p = final.compare(ours, theirs)
    assert percent == pytest.approx(100 * (6 / 9 - 1)) and count == 3
    ratios = [log(1 / 2), log(2 / 2.5), log(3 / 4.5)]
    statistic = np.mean(ratios) / (np.std(ratios, ddof=1) / sqrt(3))
    assert p == pytest.approx(4 * 2 * student.sf(abs(statistic), df=2))


def test_comparison_pairs_seeds_and_ignores_the_others():
    ours, theirs = {3: 1.0, 5: 2.0, 9: 100.0}, {5: 4.0, 3: 3.0, 7: 1000.0}
    assert final.compare(ours, theirs) == final.compare({3: 1.0, 5: 2.0}, {3: 3.0, 5: 4.0})
    assert final.compare(ours, theirs)[0] == pytest.approx(100 * (3 / 7 - 1))


def test_comparison_is_symmetric_in_p():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 2.5, 2: 3.1}
    assert final.compare(ours, theirs)[2] == pytest.approx(final.compare(theirs, ours)[2])


def test_p_is_at_most_one():
    assert final.compare({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.01})[2] == 1.0


@pytest.mark.parametrize("ours, theirs", [
    ({0: 1.0}, {0: 2.0}),  # one seed
    ({0: 1.0, 1: 2.0}, {0: 2.0, 1: 4.0}),  # equal ratios
    ({0: -0.1, 1: 0.4}, {0: 0.2, 1: 0.3}),  # no logarithm
    ({0: 0.0, 1: 0.4}, {0: 0.2, 1: 0.3}),
])
def test_comparison_without_a_test(ours, theirs):
    percent, count, p = final.compare(ours, theirs)
    assert p is None and count == len(ours)
    assert percent == pytest.approx(100 * (sum(ours.values()) / sum(theirs.values()) - 1))


@pytest.mark.parametrize("ours, theirs", [({}, {}), ({0: 1.0}, {1: 1.0}), ({0: 1.0}, {0: 0.0})])
def test_nothing_to_compare(ours, theirs):
    assert final.compare(ours, theirs) is None
    assert final.show_comparison(ours, theirs) == ""


def test_the_spread_is_that_of_a_sample():
    assert final.spread([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert final.spread([3.0]) == 0


# ---- Reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["fd_local", "fid"])
def test_places_of_numbers(project, key):
    runs = results_of(project, metrics_of("stage3-film", fd=2.0, key=key), metrics_of("bonus-latent", key=key))["shapes"]

    def value(number, name="stage3-film"):
        return final.values(runs, name, number)[0]

    expected = {"fd": 2.0, "fd before": 6.0, "fd, 2 steps": 4.0, "fd, 25 steps": 2.16, "fd, 10 DDIM steps": 2.4,
                "is": 2.5, "sd 0.4": 8.0, "fd under noise": 6.0, "probe_r2": 0.7, "own s": 1.1, "seconds per image": 0.03,
                "log density, gmm": -60.0, "by_s, flow, fd": 6.0, "unsure_third, gmm, evaluations": 10 / 3}
    assert {number: value(number) for number in expected} == pytest.approx(expected)
    assert value("ceiling", "bonus-latent") == 5.5 and value("memory saved, %", "bonus-latent") == -59


def test_every_number_is_found_somewhere(project):
    metrics = [metrics_of(variant) for variant in ("stage1-form1", "stage3-film", "bonus-latent")]
    flow = metrics_of("stage3-fixed")
    flow["tables"]["likelihood"]["log_density"]["flow"] = -50.0
    flow["rows"].append(score_row(3.0, "gmm", count=300))
    runs = results_of(project, *metrics, flow)["shapes"]
    for number in final.NUMBERS:
        if ", gaussian, " not in number:  # no strategies with these codes
            assert any(final.values(runs, name, number) for name in runs), number


def test_priors_are_compared_with_equally_many_images(project):
    metrics = metrics_of("stage1-form1", fd=2.0)
    runs = results_of(project, metrics)["shapes"]
    assert runs["stage1-form1"][0]["priors"] == pytest.approx({"gaussian": 3.0, "gmm": 2.2})  # 2.2: without noise
    metrics["run"]["settings"]["probe_steps"] = 5
    runs = results_of(project, metrics)["shapes"]
    assert runs["stage1-form1"][0]["priors"] == pytest.approx({"gaussian": 3.0})


def test_rank_correlation_is_of_the_signal_that_is_used(project):
    runs = results_of(project, metrics_of("stage3-fade"), metrics_of("stage3-fade-posterior"))["shapes"]
    assert [final.values(runs, name, "rank correlation")[0] for name in runs] == [0.64, 0.3]


def test_order_of_data_sets_variants_and_seeds(project):
    everything = [metrics_of(variant, seed, dataset=dataset)
                  for dataset in ("photos", "celeba64", "shapes") for seed in (1, 0)
                  for variant in ("bonus-latent", "stage9-new", "stage2-anneal", "stage1-form1", "stage1-vae")]
    results = results_of(project, *everything, metrics_of("stage1-form1", changes={"beta": 1.0}))
    assert list(results) == ["shapes", "celeba64", "photos"]
    assert list(results["shapes"]) == ["stage1-vae", "stage1-form1", "stage1-form1-beta=1.0", "stage2-anneal",
                                       "bonus-latent", "stage9-new"]
    assert list(results["shapes"]["stage1-vae"]) == [0, 1]


def test_files_that_are_no_results_are_not_read(project):
    put(project, metrics_of())
    for folder in ("features", "figures"):
        common.write_json(project / "results" / folder / "shapes.json", {"accuracy": 1.0})
    assert len(final.read_results()) == 1


# ---- Tables ----------------------------------------------------------------------------------------------------------

def test_means_and_marks(project):
    results = results_of(project, metrics_of(seed=0, fd=1.0), metrics_of(seed=1, fd=2.0), metrics_of("stage2-sum", fd=3))
    text = final.table_of(results, *final.TABLES["scores"])
    assert cells(text, ["shapes", "`stage1-form1`"])["fd"] == "1.5 ± 0.71"
    single = cells(text, ["shapes", "`stage2-sum` ¹"])
    assert single["fd"] == "3" and single["Δ fd"] == "+200%"  # against seed 0 of form1 alone


def test_base_of_a_change(project):
    longer, beta = {"vae_steps": 1800, "unet_steps": 1200}, {"beta": 1.0}
    results = results_of(
        project, metrics_of(fd=2.0), metrics_of(fd=1.0, changes=longer), metrics_of("stage2-anneal", fd=1.6),
        metrics_of("stage2-anneal", fd=0.9, changes=longer), metrics_of("stage2-anneal", fd=0.8, changes=beta),
        metrics_of(fd=3.0, changes=beta), metrics_of("stage1-vae", fd=5.0, changes={"vae_steps": 1650}))
    bases = {name: final.base_of(results["shapes"], name) for name in results["shapes"]}
    assert bases == {
        "stage1-vae-vae_steps=1650": "stage1-form1", "stage1-form1": "stage1-form1", "stage2-anneal": "stage1-form1",
        "stage1-form1-beta=1.0": "stage1-form1", "stage2-anneal-beta=1.0": "stage2-anneal",
        "stage1-form1-vae_steps=1800-unet_steps=1200": "stage1-form1-vae_steps=1800-unet_steps=1200",
        "stage2-anneal-vae_steps=1800-unet_steps=1200": "stage1-form1-vae_steps=1800-unet_steps=1200"}
    departures = final.table_of(results, *final.TABLES["departures"], departures=True)
    assert cells(departures, ["shapes", "`stage2-anneal-beta=1.0` ¹"])["Δ fd"] == "-50%"
    assert departures.count("\n") == 4 and "beta=" not in final.table_of(results, *final.TABLES["scores"])


def test_answers(project):
    results = results_of(project, *a_few())
    quality = final.table_question(results, final.QUESTIONS["Quality: does joint training improve fd?"])
    answer = cells(quality, ["stage2-anneal: fd against stage1-form1: fd"])["shapes"]
    runs = results["shapes"]
    percent, _, p = final.compare(*(final.values(runs, name, "fd") for name in ("stage2-anneal", "stage1-form1")))
    assert answer == f"{percent:+.0f}%, 3 seeds, p {p:.2g}" and -24 < percent < -16 and p < 0.05
    efficiency = next(pairs for question, pairs in final.QUESTIONS.items() if question.startswith("Efficiency"))
    text = final.table_question(results, efficiency)
    row = "stage3-film: unsure_third, gmm, {0} against stage3-film: all, gmm, {0}"
    assert cells(text, [row.format("fd")])["shapes"] == "+10%, 3 seeds"  # the same ratio in every seed
    assert cells(text, [row.format("evaluations")])["shapes"] == "-67%, 3 seeds"
    assert cells(text, [row.format("seconds_per_image")])["shapes"].startswith("-44%, 3 seeds, p < 0.001")


def test_every_run_of_a_question_is_known():
    for pairs in final.QUESTIONS.values():
        for side in [side for pair in pairs for side in pair]:
            name, number = side.split(": ")
            assert name in final.VARIANTS and number in final.NUMBERS
    for _, columns in final.TABLES.values():
        assert all(column.removeprefix("Δ ") in final.NUMBERS for column in columns)


def test_missing_runs_leave_out_rows_columns_tables_and_charts(project):
    put(project, metrics_of("stage1-uncond"))
    final.main([])
    text = (project / "results" / "TABLES.md").read_text()
    assert re.findall("^## (.*)", text, re.M) == ["scores", "noise", "cost", "data"]
    assert "Δ" not in cells(text, ["shapes", "`stage1-uncond` ¹"])
    assert [path.name for path in (project / "results" / "figures").iterdir()] == ["cost.png"]


def test_all_tables_and_charts(project):
    weights = [metrics_of("stage2-anneal", fd=1.7, changes={"diffusion_weight": weight}) for weight in (0.003, 0.3)]
    put(project, *a_few(), *weights, metrics_of(fd=3.0, changes={"objective": "eps"}),
        *(metrics_of(variant, dataset="cifar10", fd=9.0) for variant in ("stage1-form1", "stage3-film")))
    final.main([])
    text = (project / "results" / "TABLES.md").read_text()
    headings = {heading.split(". ")[0].split(": ")[0] for heading in re.findall("^## (.*)", text, re.M)}
    assert headings == {"questions", "scores", "losses", "conditioning", "noise", "cost", "departures", "data", "priors"}
    assert text.count("## questions") == 4
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == [f"figures/{name}.png" for name in ("summary", "cost", "noise", "weights", "thirds")]
    for link in links:
        assert (project / "results" / link).read_bytes()[:4] == b"\x89PNG"
    assert "nan" not in text and "inf%" not in text
    assert cells(text, ["cifar10", "drawn"])["samples"] == "1,000"


def test_tables_of_all_runs_are_small(project):
    random = np.random.RandomState(0)
    longer, weight = {"vae_steps": 1650}, {"diffusion_weight": 0.003}
    for dataset, many, few in (("shapes", 5, 3), ("celeba64", 3, 1), ("cifar10", 2, 1)):
        frequent = {"stage1-vae", "stage1-form1", "stage1-guided", "stage1-augmented", "stage1-uncond", "stage2-anneal",
                    "stage2-anneal-grad-none", "stage3-fixed", "stage3-film", "stage3-vae-flow"}
        runs = [(variant, {}) for variant in final.VARIANTS if "bound" not in variant]
        runs += [("stage1-vae", longer), ("stage1-form1", longer), ("stage2-anneal", longer), ("stage2-anneal", weight)]
        if dataset == "shapes":
            runs += [("stage1-form1", {key: value}) for key, value in
                     {"objective": "eps", "start": 1000, "even_levels": False, "beta": 1.0}.items()]
        for variant, changes in runs:
            for seed in range(1 if changes else many if variant in frequent else few):
                metrics = metrics_of(variant, seed, dataset=dataset, changes=changes)
                text = json.dumps(metrics)  # all numbers with a point vary from run to run
                vary = lambda match: str(float(match[0]) * (0.5 + random.rand()))
                put(project, json.loads(re.sub(r"\d+\.\d+(?![\d\"])", vary, text)))
    assert len(final.read_results()) > 130
    final.main([])
    assert (project / "results" / "TABLES.md").stat().st_size < 35_000


# ---- Charts ----------------------------------------------------------------------------------------------------------

def test_points_of_charts(project):
    weight = {"diffusion_weight": 0.003}
    runs = results_of(project, metrics_of(fd=2.0), metrics_of("stage2-anneal", 0, 1.0), metrics_of("stage2-anneal", 1, 1.4),
                      metrics_of("stage2-anneal", fd=1.5, changes=weight), metrics_of("stage3-film", fd=1.0))["shapes"]
    weights = final.lines_of_weights(runs)
    assert weights["stage2-anneal"] == [([0.003], [1.5]), ([0.03], [1.0, 1.4])]
    assert weights["stage1-form1"] == [([0.003], [2.0]), ([0.03], [2.0])]
    assert final.lines_of_noise(runs)["stage1-form1"][3] == ([0.4], [8.0])
    seconds, fd = final.lines_of_cost(runs)["stage1-form1"][0]
    assert seconds == pytest.approx([0.014]) and fd == [4.0]
    assert final.lines_of_thirds(runs)["unsure_third"] == [[[10 / 3], [2.2]]]


# ---- The command -----------------------------------------------------------------------------------------------------

def run_folder(project, metrics):
    """A run's folder with its metrics.json."""
    run = metrics["run"]
    folder = project / "runs" / f"{run['dataset']}-{run['budget']}" / f"{run['variant']}-s{run['seed']}"
    common.write_json(folder / "metrics.json", metrics)
    return folder


def test_collect_copies(project):
    plain, changed = metrics_of(seed=2), metrics_of("stage2-anneal", changes={"unet_steps": 9, "beta": 1.0, "decay": False})
    unfinished = project / "runs" / "shapes-cpu" / "bonus-autoencoder-s0"
    unfinished.mkdir(parents=True)
    final.main(["--collect", str(run_folder(project, plain)), str(unfinished), str(run_folder(project, changed))])
    folder = project / "results" / "shapes"
    assert sorted(path.name for path in folder.iterdir()) == [
        "stage1-form1-s2.json", "stage2-anneal-unet_steps=9-beta=1.0-decay=False-s0.json"]
    assert json.loads((folder / "stage1-form1-s2.json").read_text()) == plain


def test_runs_beside_committed_ones(project):
    put(project, metrics_of(fd=2.0), metrics_of(seed=1, fd=7.0))
    for metrics in (metrics_of(fd=3.0, commit="new"), metrics_of("stage2-anneal", fd=2.5, commit="new")):
        run_folder(project, metrics)
    final.main(["--runs", str(project / "runs")])
    text = (project / "runs" / "REPORT.md").read_text()
    assert cells(text, ["shapes", "`stage1-form1-s0`"])["fd"] == "3 / 2 = 1.50"
    assert cells(text, ["shapes", "`stage2-anneal-s0`"])["fd"] == "2.5"
    assert "![noise](noise.png)" in text and (project / "runs" / "noise.png").is_file()
    assert not (project / "results" / "TABLES.md").exists()


def test_check(project, capsys):
    put(project, *a_few(), metrics_of(dataset="cifar10", count=2000, features="local-cifar10"))
    final.main(["--check"])
    assert "25 results" in capsys.readouterr().out and not (project / "results" / "TABLES.md").exists()


@pytest.mark.parametrize("change", [{"budget": "gpu"}, {"features": "inception"}, {"count": 2000}, {"commit": "other"}])
def test_check_finds_what_cannot_be_compared(project, capsys, change):
    put(project, metrics_of(), metrics_of("stage2-anneal", **change))
    with pytest.raises(SystemExit) as stopped:
        final.main(["--check"])
    assert stopped.value.code == 2 and str(*change.values()) in capsys.readouterr().err


@pytest.mark.parametrize("link", ["![a](results/{}.png)", '<img width="9" src="results/{}.png">'])
def test_check_finds_a_missing_picture(project, link):
    put(project, metrics_of())
    (project / "results" / "there.png").write_bytes(b"")
    (project / "REPORT.md").write_text("![far](https://example.org/a.png) " + link.format("there"))
    final.main(["--check"])
    (project / "REPORT.md").write_text(link.format("gone"))
    with pytest.raises(SystemExit) as stopped:
        final.main(["--check"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("arguments", [[], ["--runs", "nowhere"]])
def test_without_results(project, arguments):
    with pytest.raises(SystemExit) as stopped:
        final.main(arguments)
    assert stopped.value.code == 2
