"""final_evaluation.py, on small files metrics.json that are written here."""

import json
import re

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
    changes, prior = changes or {}, "flow" if variant.startswith("stage3") else "gmm"
    rows = [score_row(fd, prior, count=count, key=key), score_row(3 * fd, prior, "none", 0, count, key),
            score_row(1.5 * fd, "gaussian", count=300, key=key),
            *(score_row(fd * (1 + 2 / steps), prior, sampler, steps, 300, key)
              for sampler, steps in (("ddim", 5), ("dpm", 2), ("dpm", 5), ("dpm", 10)))]
    tables = {"latent_space": {"images": 4000, "kl_nats": 30.0, "path_over_distance": 1.5 + 0.01 * seed,
                               "probe_accuracy": 0.9, "probe_r2": {"size": 0.9, "x": 0.5},
                               "log_density": {"gaussian": -90.0, "gmm": -60.0}}}
    if variant not in ("stage1-uncond", "stage3-vae-flow"):
        by_sd = {"0.0": 1.1 * fd, "0.1": 2 * fd, "0.2": 3 * fd, "0.4": 4 * fd}
        tables["robustness"] = {"images": 300, "fd": by_sd, "mean": 3 * fd}
    if variant.startswith("stage3"):
        strategies = {name: {key: fd * factor, "hf_energy": 0.7, "evaluations": evaluations,
                             "seconds_per_image": 0.01 + 0.002 * evaluations + 0.0001 * seed}
                      for name, (factor, evaluations) in STRATEGIES.items()}
        tables |= {"rank_correlation": 0.3 if variant.endswith("posterior") else 0.64,
                   "terciles": {"images": 300, "own_s": 1.1, "shuffled_s": 1.9, "sure": {"vae": 0.5, "refined": 0.8},
                                "unsure": {"vae": 43.0, "refined": 3.8}},
                   "strategies": {"gmm": strategies, "flow": strategies}}
    if variant == "bonus-latent":
        saved = {"seconds_per_image": 71.0, "peak_memory_mb": -59.0,
                 "gflops_per_image": 63.0}
        tables |= {"ceiling": {key: {"value": 5.5}}, "savings": {"saved_percent": saved}}
    settings = {"vae_steps": 900, "unet_steps": 600, "eval_samples": count, "probe_samples": 300, "probe_steps": 5,
                "diffusion_weight": 0.03} | changes | {"changes": changes}
    run = {"dataset": dataset, "variant": variant, "budget": budget, "seed": seed, "data_note": "drawn", "minutes": 4.0,
           "features": features, "parameters": 1_566_262, "commit": commit, "settings": settings}
    return {"schema": 1, "run": run, "rows": rows, "tables": tables}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a README, a REPORT and, in results/, a file that is no result."""
    monkeypatch.setattr(final, "RESULTS", tmp_path / "results")
    for name in ("README.md", "REPORT.md"):
        (tmp_path / name).write_text("text\n")
    common.write_json(tmp_path / "results" / "features" / "shapes.json", {"accuracy": 1.0})
    return tmp_path


def put(project, *everything):
    """Write metrics into the folder of results, under the names that --collect gives."""
    for metrics in everything:
        run = metrics["run"]
        common.write_json(project / "results" / run["dataset"] / f"{final.name_of(run)}-s{run['seed']}.json", metrics)


def results_of(project, *everything):
    put(project, *everything)
    return final.grouped(final.read_results())


def cells(text, name):
    """{column: cell} of the first line of a table that has `name` as a cell."""
    lines = [[part.strip() for part in line.strip("|").split(" | ")] for line in text.splitlines()]
    row = next(i for i, line in enumerate(lines) if name in line)
    header = next(lines[i - 1] for i in range(row, 0, -1) if set(lines[i]) == {"---"})
    return {column.rstrip(" ↓↑"): cell for column, cell in zip(header, lines[row], strict=True)}


def a_few():
    """Results of several variants, three seeds each. Joint training has 0.8 of form1's fd, up to a little noise."""
    factors = {"stage1-form1": 1.0, "stage1-uncond": 3.0, "stage2-anneal": 0.8, "stage3-flow-film": 1.1,
               "bonus-latent": 5.0}
    random = np.random.RandomState(0)
    return [metrics_of(variant, seed, fd=2 * factor * (1 + 0.2 * random.rand()))
            for variant, factor in factors.items() for seed in range(3)]


def test_comparison_by_closed_form():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0, 4: 100.0}, {2: 4.5, 1: 2.5, 0: 2.0, 3: 1000.0}  # seeds 3 and 4: one side
    percent, count, p = final.compare(ours, theirs)
    assert percent == pytest.approx(100 * (6 / 9 - 1)) and count == 3
    ratios = np.log([1 / 2, 2 / 2.5, 3 / 4.5])
    statistic = ratios.mean() / (ratios.std(ddof=1) / np.sqrt(3))
    assert p == pytest.approx(4 * 2 * student.sf(abs(statistic), df=2))
    assert final.compare({}, theirs) is None and final.compare({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("ours, theirs, expected", [
    ({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.01}, 1.0),  # four times p is more than 1
    ({0: 1.0}, {0: 2.0}, None),  # one seed
    ({0: 1.0, 1: 2.0}, {0: 2.0, 1: 4.0}, None),  # equal ratios
    ({0: -0.1, 1: 0.4}, {0: 0.2, 1: 0.3}, None),  # no logarithm
])
def test_p_of_special_cases(ours, theirs, expected):
    percent, count, p = final.compare(ours, theirs)
    assert p == expected and count == len(ours)
    assert percent == pytest.approx(100 * (sum(ours.values()) / sum(theirs.values()) - 1))


def test_mean_and_spread():
    assert final.spread([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1)) and final.spread([3.0]) == 0
    shown = [final.show_mean(numbers) for numbers in ([1.0, 2.0], [0.7, 0.7, 0.7], [1_566_262] * 2, [150.0, 350.0])]
    assert shown == ["1.5±0.71", "0.7", "1,566,262", "250±141"]


@pytest.mark.parametrize("key", ["fd_local", "fid"])
def test_places_of_numbers(project, key):
    names = ("stage3-flow-fade-posterior", "stage3-flow-film", "bonus-latent")
    runs = results_of(project, *(metrics_of(name, key=key) for name in names))["shapes"]
    expected = {"fd": 2.0, "fd before": 6.0, "fd, 2 steps": 4.0, "fd, 5 DDIM steps": 2.8, "is": 2.5, "sd 0.4": 8.0,
                "fd under noise": 6.0, "probe_r2": 0.7, "own s": 1.1, "seconds per image": 0.03, "nfe": 10,
                "log density, gmm": -60.0, "by_s, flow, fd": 6.0, "unsure_third, gmm, evaluations": 10 / 3}
    assert {number: final.values(runs, "stage3-flow-film", number)[0] for number in expected} == pytest.approx(expected)
    assert [final.values(runs, name, "ceiling") for name in names] == [{}, {}, {0: 5.5}]
    assert [final.values(runs, name, "rank correlation") for name in names] == [{0: 0.3}, {0: 0.64}, {}]


def test_every_number_is_found_somewhere(project):
    flow = metrics_of("stage3-flow-fixed")
    flow["tables"]["latent_space"]["log_density"]["flow"] = -50.0
    flow["rows"].append(score_row(3.0, "gmm", count=300))
    runs = results_of(project, flow, metrics_of("stage1-form1"), metrics_of("bonus-latent"))["shapes"]
    for number in final.NUMBERS:
        if ", gaussian, " not in number:  # there are no strategies with these codes
            assert any(final.values(runs, name, number) for name in runs), number


def test_priors_are_compared_with_equally_many_images(project):
    """The headline, with fd 2 and the mixture, has more images than the row of the other prior."""
    runs = results_of(project, metrics_of(fd=2.0))["shapes"]
    assert runs["stage1-form1"][0]["priors"] == pytest.approx({"gaussian": 3.0, "gmm": 2.4})


def test_order_of_data_sets_variants_and_seeds(project):
    variants = ("bonus-latent", "stage9-new", "stage2-anneal", "stage1-form1", "stage1-vae")
    everything = [metrics_of(variant, seed, dataset=dataset) for variant in variants
                  for dataset in ("photos", "celeba64", "shapes") for seed in (1, 0)]
    results = results_of(project, *everything, metrics_of("stage1-form1", changes={"beta": 1.0}))
    assert list(results) == ["shapes", "celeba64", "photos"]
    assert list(results["shapes"]) == ["stage1-vae", "stage1-form1", "stage1-form1-beta=1.0", "stage2-anneal",
                                       "bonus-latent", "stage9-new"]
    assert list(results["shapes"]["stage1-vae"]) == [0, 1]


def test_what_a_run_is_compared_with(project):
    longer, beta = {"vae_steps": 1800}, {"beta": 1.0}
    results = results_of(
        project, metrics_of(), metrics_of(seed=1, fd=3.0), metrics_of("stage2-anneal", fd=1.6),
        metrics_of(changes=longer), metrics_of("stage2-anneal", changes=longer), metrics_of(changes=beta),
        metrics_of("stage2-anneal", fd=0.8, changes=beta), metrics_of("stage1-vae", changes={"vae_steps": 1650}))
    assert {name: final.base_of(results["shapes"], name) for name in results["shapes"]} == {
        "stage1-vae-vae_steps=1650": "stage1-form1", "stage1-form1": "stage1-form1", "stage2-anneal": "stage1-form1",
        "stage1-form1-beta=1.0": "stage1-form1", "stage2-anneal-beta=1.0": "stage2-anneal",
        "stage1-form1-vae_steps=1800": "stage1-form1-vae_steps=1800",
        "stage2-anneal-vae_steps=1800": "stage1-form1-vae_steps=1800"}
    departures = final.table_of(results, *final.TABLES["departures"], departures=True)
    assert cells(departures, "`stage2-anneal-beta=1.0` ¹")["Δ fd"] == "-50%"
    scores = final.table_of(results, *final.TABLES["scores"])
    assert departures.count("\n") == 4 and "beta=" not in scores
    assert cells(scores, "`stage1-form1`")["fd"] == "2.5±0.71"
    assert cells(scores, "`stage2-anneal` ¹")["Δ fd"] == "-20%"  # against seed 0 alone


def test_answers(project):
    results = results_of(project, *a_few())
    quality, efficiency, *_ = [final.table_question(results, comparisons) for comparisons in final.QUESTIONS.values()]
    percent, _, p = final.compare(*(final.values(results["shapes"], run, "fd") for run in (final.ANNEAL, final.FORM1)))
    assert cells(quality, "fd: joint training / stage 1")["shapes"] == f"{percent:+.0f}%, n 3, p {p:.2g}"
    row = "{0}: refining the unsure third / all"
    assert cells(efficiency, row.format("fd"))["shapes"] == "+10%, n 3"  # the same ratio for every seed
    assert cells(efficiency, row.format("seconds"))["shapes"] == "-44%, n 3, p < 0.001"


def test_what_is_asked_exists():
    for side in [side for comparisons in final.QUESTIONS.values() for _, *sides in comparisons for side in sides]:
        name, number = side.split(": ")
        assert name in (*final.VARIANTS, final.LOW_WEIGHT) and number in final.NUMBERS
    for _, columns in final.TABLES.values():
        assert {column.removeprefix("Δ ") for column in columns} <= set(final.NUMBERS)


def test_missing_runs_leave_out_rows_columns_tables_and_charts(project):
    put(project, metrics_of("stage1-uncond"))
    final.main([])
    text = (project / "results" / "TABLES.md").read_text()
    assert re.findall("^## (.*)", text, re.M) == ["scores", "cost", "data"] and "Δ fd" not in text
    assert [path.name for path in (project / "results" / "figures").iterdir()] == ["cost.png"]


def test_all_tables_and_charts(project):
    weights = [metrics_of("stage2-anneal", fd=1.7, changes={"diffusion_weight": weight}) for weight in (0.003, 0.3)]
    put(project, *a_few(), *weights, metrics_of(fd=3.0, changes={"objective": "eps"}),
        *(metrics_of(variant, dataset="cifar10", fd=9.0) for variant in ("stage1-form1", "stage3-flow-film")))
    final.main([])
    text = (project / "results" / "TABLES.md").read_text()
    headings = re.findall(r"^## (\w+)", text, re.M)
    assert set(headings) == {"questions", "scores", "losses", "conditioning", "noise", "cost", "departures", "data",
                             "priors"} and headings.count("questions") == 4
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == [f"figures/{name}.png" for name in ("questions", "cost", "noise", "weights", "thirds")]
    assert all((project / "results" / link).read_bytes()[:4] == b"\x89PNG" for link in links)
    assert "nan" not in text and cells(text, "drawn")["samples"] == "1,000"


def test_tables_of_all_runs_are_small(project, monkeypatch):
    monkeypatch.setattr(final, "draw_charts", lambda results, folder: [])
    random = np.random.RandomState(0)
    few_seeds = ("stage1-form2", "stage2-sum", "stage2-kendall", "stage3-flow-fade-posterior", "stage3-flow-coupling")
    runs = [(variant, {}) for variant in final.VARIANTS if "bound" not in variant]
    runs += [(variant, {"vae_steps": 1650}) for variant in ("stage1-vae", "stage1-form1", "stage2-anneal")]
    runs += [("stage2-anneal", {"diffusion_weight": 1}), ("stage1-form1", {"beta": 1})]
    for dataset, seeds in {"shapes": 5, "celeba64": 3, "cifar10": 2}.items():
        for variant, changes in runs:
            for seed in range(1 if changes else 2 if variant in few_seeds else seeds):
                text = json.dumps(metrics_of(variant, seed, dataset=dataset, changes=changes))
                put(project, json.loads(text, parse_float=lambda digits: float(digits) * (0.5 + random.rand())))
    final.main([])
    size = (project / "results" / "TABLES.md").stat().st_size
    assert len(final.read_results()) > 140 and 20_000 < size < 35_000


def test_points_of_charts(project):
    joint = [metrics_of("stage2-anneal", seed, fd) for seed, fd in ((0, 1.0), (1, 1.4))]
    weak = metrics_of("stage2-anneal", fd=1.5, changes={"diffusion_weight": 0.003})
    runs = results_of(project, metrics_of(fd=2.0), *joint, weak, metrics_of("stage3-flow-film", fd=1.0))["shapes"]
    weights = final.lines_of_weights(runs)
    assert weights["stage2-anneal"] == [([0.003], [1.5]), ([0.03], [1.0, 1.4])]
    assert weights["stage1-form1"] == [([0.003], [2.0]), ([0.03], [2.0])]
    assert final.lines_of_noise(runs)["stage1-form1"][3] == ([0.4], [8.0])
    ratio = final.ratios_of_questions(runs)["Quality. fd: joint training / stage 1"]
    assert ratio == pytest.approx([0.5])  # of seed 0, which both have
    seconds, fd = final.lines_of_cost(runs)["stage1-form1"][0]
    assert seconds == pytest.approx([0.014]) and fd == [4.0]
    assert final.lines_of_thirds(runs)["unsure_third"] == [[[10 / 3], [2.2]]]


def test_collect_copies(project):
    changed = metrics_of("stage2-anneal", changes={"unet_steps": 9, "beta": 1.0, "decay": False})
    common.write_json(project / "a" / "metrics.json", metrics_of(seed=2))
    common.write_json(project / "b" / "metrics.json", changed)
    final.main(["--collect", *(str(project / name) for name in ("a", "unfinished", "b"))])
    copies = {path.name: json.loads(path.read_text()) for path in (project / "results" / "shapes").iterdir()}
    assert copies == {"stage1-form1-s2.json": metrics_of(seed=2),
                      "stage2-anneal-unet_steps=9-beta=1.0-decay=False-s0.json": changed}


def test_runs_beside_committed_ones(project):
    put(project, metrics_of(fd=2.0), metrics_of(seed=1, fd=7.0))
    common.write_json(project / "runs" / "a" / "b" / "metrics.json", metrics_of(fd=3.0, commit="new"))
    common.write_json(project / "runs" / "c" / "metrics.json", metrics_of("stage2-anneal", fd=2.5))
    final.main(["--runs", str(project / "runs")])
    text = (project / "runs" / "REPORT.md").read_text()
    assert cells(text, "`stage1-form1-s0`")["fd"] == "3 / 2 = 1.50" and cells(text, "`stage2-anneal-s0`")["fd"] == "2.5"
    assert "(noise.png)" in text and (project / "runs" / "noise.png").is_file()


def stops(*arguments):
    """The command ends with one line and status 2."""
    with pytest.raises(SystemExit) as stopped:
        final.main(list(arguments))
    return stopped.value.code == 2


@pytest.mark.parametrize("change", [{"budget": "gpu"}, {"features": "inception"}, {"count": 2000}, {"commit": "other"}])
def test_check_finds_what_cannot_be_compared(project, capsys, change):
    put(project, metrics_of(), metrics_of(dataset="cifar10", count=500, features="local-cifar10"))
    final.main(["--check"])
    put(project, metrics_of("stage2-anneal", **change))
    assert stops("--check") and str(*change.values()) in capsys.readouterr().err


def test_check_finds_a_missing_picture(project):
    put(project, metrics_of())
    (project / "results" / "there.png").write_bytes(b"")
    for link in ("![a](results/{}.png)", '<img width="9" src="results/{}.png">'):
        (project / "REPORT.md").write_text("![far](https://example.org/a.png) " + link.format("there"))
        final.main(["--check"])
        (project / "REPORT.md").write_text(link.format("gone"))
        assert stops("--check")


def test_without_results(project):
    assert stops() and stops("--runs", "nowhere") and stops("--check")
