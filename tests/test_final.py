"""Final evaluation, numbers first. Metrics are planted in which every number is another one, and what tables, claims
and charts must show of them is typed here by hand or computed by SciPy. Then: which results may be compared, what is
collected, and that the texts of this repository agree with its results: no table was edited, no picture is missing."""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import expect_error
from PIL import Image, ImageColor
from scipy.stats import ttest_1samp

import common
import final_evaluation as final

README, REPORT = ((final.ROOT / name).read_text("utf-8") for name in ("README.md", "REPORT.md"))
CHART_CLAIMS = final.PRIMARY_CLAIMS + sum(final.CLAIMS.values(), [])
ALL_CLAIMS = CHART_CLAIMS + sum(final.FURTHER_CLAIMS.values(), [])
ALL_TABLES = ["data", "variants", "overview", *final.TABLES, "questions",
              *(f"claims on {topic}" for topic in final.CLAIMS)]
PICTURE = re.compile(r"\]\((results/\S+?\.png)\)")
RESULTS = "*/*-s[0-9]*.json"
EVAL = {"sampler": "dpm", "sample_steps": 25, "count": 100, "batch": 50, "temperature": 1.0, "grid_count": 50,
        "grid": [["dpm", 5], ["dpm", 25]], "probe_steps": 10, "bits_images": 128, "bits_draws": 40,
        "features": "local-a", "prior": "gmm"}
TRAIN = common.TRAIN | {"vae_steps": 2220, "unet_steps": 221, "dataset": "shapes", "image_size": 32}
SCORES = ("fd_local", "floor_local", "is_local", "kid_local", "precision_local", "recall_local", "diversity_local",
          "hf_energy")


def score(value):
    return {"value": float(value), "low": value - 1.0, "high": value + 1.0}


def row(prior, sampler, steps, images, fd):
    """A row of scores. Beside fd they are fd + 1 (floor), fd + 2 (is), ... in the order of SCORES."""
    return {"prior": prior, "sampler": sampler, "steps": steps, "nfe": 2 * steps, "n_generated": images,
            "seconds_per_image": fd + 0.5, "peak_memory_mb": None} | {
                name: score(fd + k) for k, name in enumerate(SCORES)}


def metrics(variant="stage1-form1", seed=0, distance=10.0, train=(), **run):
    """Metrics with a headline of 100 images, and rows of 50: one of another prior and two of other steps. The fd of
    every row differs. `train`: changed train settings, or None if the metrics shall have none."""
    facts = {"dataset": "shapes", "crop": "none", "data_note": "drawn", "variant": variant, "budget": "cpu",
             "seed": seed, "features": "local-a", "n_real": 5, "parameters": 10**6,
             "train_seconds": 90.0, "device": "cpu", "commit": "c", "torch": "2", "eval": EVAL}
    if train is not None:
        facts["train"] = TRAIN | {"seed": seed} | dict(train)
    rows = [row("gmm", "dpm", 25, 100, distance), row("gaussian", "dpm", 25, 50, 3 * distance),
            row("gmm", "dpm", 5, 50, distance + 10), row("gmm", "dpm", 25, 50, distance + 2)]
    noise = {"clean": distance, "noise 0.1": 1.1 * distance, "noise 0.4": 4 * distance}
    robustness = {"steps": 10, "images": 50, "mean": 2 * distance, "rise": distance,
                  "scores": {name: {"fd_local": score(fd)} for name, fd in noise.items()}}
    return {"schema": 1, "run": facts | run, "rows": rows, "tables": {
        "bits_per_dim": {"bound": score(3), "images": 128}, "robustness": robustness}}


def save(folder, *many):
    """Write metrics where committed ones lie, under `folder`; returns their paths."""
    for m in many:
        path = folder / m["run"]["dataset"] / f"{m['run']['variant']}-s{m['run']['seed']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(m))
    return sorted(folder.glob(RESULTS))


def load(folder, *many):
    return final.load_all(save(folder, *many))


@pytest.fixture(scope="module")
def committed():
    """All committed results. Tests share them, so none may change them."""
    return final.load_all(final.ROOT.glob(f"results/{RESULTS}"))


# --- Numbers ---------------------------------------------------------------------------------------------------------

def refinement_table(first, images):
    """What stage3.adaptive_refinement returns, with the fds first, first + 1, ..."""
    names = ("even", "adaptive_steps", "shuffled_steps", "all", "unsure_third", "shuffled_third", "three")
    return {"images": images, **{name: {"fd_local": score(first + k), "hf_energy": score(1)}
                                 for k, name in enumerate(names)}}


def measured(seed=0):
    """Metrics of a run that measured everything that a stage can measure, and each number is another one."""
    found = metrics("stage2-anneal", seed, eval=EVAL | {"count": 1000, "grid_count": 200, "sample_steps": 10})
    found["run"] |= {"train_seconds": 6600.0, "parameters": 8}
    found["rows"] = [row("gmm", "dpm", 10, 1000, 100), row("gaussian", "dpm", 10, 200, 110),
                     row("flow", "dpm", 10, 200, 120), row("gmm", "ddim", 6, 200, 130),
                     row("gmm", "ddim", 25, 200, 140), row("gmm", "dpm", 6, 200, 150), row("gmm", "dpm", 10, 200, 160),
                     row("gmm", "dpm", 25, 200, 170), row("gmm", "dpm", 4, 200, 180), row("gmm", "dpm", 2, 200, 190)]
    noise = {"clean": 240, "noise 0.1": 241, "noise 0.2": 242, "noise 0.4": 243}
    found["tables"] = {
        "before_refinement": {name: score(200 + k) for k, name in enumerate(SCORES)},
        "bits_per_dim": {"bound": score(210), "images": 128, "latent_prior": "gmm", "kl": 211.0},
        "training": {"weight": 219.0},
        "reconstruction": {"psnr_db": 220.0, "kl_nats": 221.0, "hf_energy_vae": score(222)},
        "latent": {"active_units": 223, "posterior_variance": 224.0},
        "robustness": {"steps": 10, "images": 201, "mean": 230.0, "rise": 231.0, "scores": {
            name: {"fd_local": score(fd), "hf_energy": score(fd + 10)} for name, fd in noise.items()}},
        "latent_space": {
            "images": 202, "probe_class_accuracy": 265.0, "probe_r2": {"detail": 266.0, "band direction": 267.0},
            "posterior": {"vae": score(260), "refined": score(261)}, "slerp": {
            "vae": {"path_over_distance": 262.0}, "refined": {"path_over_distance": 263.0, "end_distance": 264.0}}},
        "prior_log_density": {"gaussian": score(-270), "gmm": score(-271), "flow": score(-272)},
        "density_of_samples": {"gmm": {"gmm": score(-280), "flow": score(-281)},
                               "flow": {"gmm": score(-282), "flow": score(-283)}},
        "components": {"images": 203, "30": {"fd_local": score(290), "log_density": score(-291)},
                       "300": {"fd_local": score(292), "log_density": score(-293)},
                       "3000": {"fd_local": score(294), "log_density": score(-295)},
                       "6000": {"fd_local": score(296), "log_density": score(-297)}},
        "uncertainty": {
            "variance": {"correlation": 300.0, "conclusion": "s ranks"}, "regressed": {"correlation": 301.0},
            "posterior": {"correlation": 302.0}},
        "adaptivity": {
            "terciles": {"images": 101, **{name: {"sse": 1.0, "spread": fd + 5,
                                                  "vae": {"fd_to_originals": fd, "hf_energy": 2.0},
                                                  "refined": {"fd_to_originals": fd + 1, "hf_energy": 3.0}}
                                           for name, fd in (("sure", 310.0), ("middle", 312.0), ("unsure", 314.0))}},
            "controls": {"images": 301, "true": {"fd_to_originals": 320.0}, "shuffled": {"fd_to_originals": 321.0}},
            "adaptive_refinement": {"flow": refinement_table(330, 999), "gmm": refinement_table(380, 998)},
            "cost": {"fixed": {"seconds_per_image": 340.0}, "this": {"seconds_per_image": 342.0}}},
        "copies": {"images": 204, "pixels": {"generated": 350.0, "held_out": 351.0, "closer": 352.0},
                   "features": {"generated": 353.0, "held_out": 354.0, "closer": 355.0}},
        "ceiling": {"images": 205, "fd_local": score(360), "hf_energy": score(361), "psnr_db": 362.0},
        "savings": {"device": "cpu", "sampler_steps": 10, "batch": 100,
                    "pixel": {"seconds_per_image": 1.0, "peak_memory_mb": 377.0},
                    "latent": {"seconds_per_image": 2.0, "peak_memory_mb": 376.0},
                    "saved_percent": {"seconds_per_image_batch_1": 370.0, "seconds_per_image": 371.0,
                                      "peak_memory_mb": 372.0, "train_seconds_per_image": 373.0,
                                      "gflops_per_pass": 374.0, "gflops_per_image": 375.0}}}
    return found


# Of each name: the number in `measured`, and the number of images that it rests on.
EXPECTED = {
    "fd": (100, 1000), "fd before": (200, None), "floor": (101, 1000), "is": (102, 1000), "kid": (103, 1000),
    "precision": (104, 1000),
    "recall": (105, 1000), "diversity": (106, 1000), "hf_energy": (107, 1000), "ms": (100500, 1000),
    "ms, 4 steps": (180500, 200),
    "fd, 2 steps": (190, 200), "fd, 4 steps": (180, 200), "fd, 6 steps": (150, 200),
    "fd, 10 steps": (160, 200), "fd, 25 steps": (170, 200), "fd, ddim 25": (140, 200),
    "hf_energy, 6 steps": (157, 200), "hf_energy, ddim 6": (137, 200),
    "weight": (219, None), "psnr, dB": (220, None),
    "fd, N(0, I)": (110, 200), "fd, mixture": (160, 200), "fd, flow": (120, 200),
    "train minutes": (110, None), "bits/dim": (210, 128), "kl_nats": (221, None), "posterior variance": (224, None),
    "spread, unsure": (319, 101), "noise fd": (230, 201), "noise rise": (231, 201), "fd, no noise": (240, 201),
    "fd, noise 0.1": (241, 201), "fd, noise 0.2": (242, 201), "fd, noise 0.4": (243, 201),
    "fd of real codes": (261, 202), "path length, VAE": (262, None), "path length": (263, None),
    "probe, class": (265, None), "probe, bands": (266, None), "probe, direction": (267, None),
    "log p, N(0, I)": (-270, None), "log p, mixture": (-271, None), "log p, flow": (-272, None),
    "flow's log p of mixture samples": (-282, None), "mixture's log p of flow samples": (-281, None),
    "fd, 30 components": (290, 203), "fd, 300 components": (292, 203), "fd, 3000 components": (294, 203),
    "fd, 6000 components": (296, 203),
    "rank, regressed": (301, None), "rank, variance": (300, None), "rank, posterior": (302, None),
    "sure, VAE": (310, 101), "middle, VAE": (312, 101), "unsure, VAE": (314, 101),
    "sure, refined": (311, 101), "middle, refined": (313, 101), "unsure, refined": (315, 101),
    "reconstruction fd": (320, 301), "reconstruction fd, other s": (321, 301),
    "steps evenly": (330, 999), "steps by s": (331, 999), "steps by other s": (332, 999),
    "three steps": (336, 999),
    "all refined": (333, 999), "unsure third": (334, 999), "other third": (335, 999),
    "steps evenly, mixture": (380, 998), "steps by s, mixture": (381, 998), "steps by other s, mixture": (382, 998),
    "three steps, mixture": (386, 998),
    "all refined, mixture": (383, 998), "unsure third, mixture": (384, 998), "other third, mixture": (385, 998),
    "seconds with s": (342, None), "seconds without s": (340, None),
    "nearest, samples": (353, 204), "nearest, held out": (354, 204), "closer": (355, 204),
    "closer, pixels": (352, 204), "ceiling": (360, 205),
    "GFLOPs saved, %": (375, None), "seconds saved, %": (371, None), "seconds saved, %, batch 1": (370, None),
    "memory saved, %": (372, None),
    "memory, MB": (376, None), "memory, MB, pixels": (377, None)}


def test_every_number_comes_from_its_place(tmp_path):
    """Every name finds the number that was planted for it, in the features of the local network and of Inception."""
    local = load(tmp_path / "local", measured())["shapes"]["stage2-anneal"]
    text = json.dumps(measured()).replace('"fd_local"', '"fid"').replace("_local", "")
    inception = load(tmp_path / "inception", json.loads(text))["shapes"]["stage2-anneal"]
    for seeds in (local, inception):
        assert {name: (*final.values_by_seed(seeds, name).values(), final.images_behind(seeds[0], name))
                for name in final.NUMBERS} == EXPECTED
    assert final.number(local[0], "no such") is None and final.number(local[0], "headline/no/such") is None
    assert final.number(local[0], "tables/components/300/log_density") == score(-293)  # a place that has no name
    nested = {"a": {"images": 7, "b": {"images": 5, "c": 1}, "d": 2}, "e": 3}  # the innermost number of images counts
    assert [final.images_behind(nested, place) for place in ("a/b/c", "a/d", "e", "a/x/y")] == [5, 7, None, 7]


def test_every_number_of_tables_and_claims_has_a_name():
    """Columns and claims use each name of NUMBERS, and no other one. Lower is better on both sides of a claim in the
    chart, and an arrow says so. Lists hold names of variants; those in a chart of lines have a colour and a marker."""
    used = {"floor"}  # which stands in the table of the data
    for _, columns in final.TABLES.values():
        for column in columns.split("; "):
            used |= {*column.split(" against ")[0].split(" / ")}
    for _, *both in ALL_CLAIMS:
        used |= {name for name, _ in both}
    assert used == set(final.NUMBERS) and {*final.SUMMARY} <= used
    for _, *both in CHART_CLAIMS:
        assert all(final.with_arrow(name) == f"{name} ↓" for name, _ in both)
    on_sheets = set()
    for strips in final.SHEETS.values():
        on_sheets |= {variant.removesuffix(final.TWICE) for variant, *_ in strips}
    listed = {*final.MAIN_VARIANTS, *final.COMPARED, *final.SAME_X_HAT, *final.LOOKS}
    assert on_sheets | listed <= {*final.VARIANTS}
    assert {*final.COSTS, *final.ROBUSTNESS, *final.CONDITIONINGS} <= {*final.LOOKS}
    assert len({question for question, *_ in ALL_CLAIMS}) == len(ALL_CLAIMS)
    assert all(first != second for _, first, second in ALL_CLAIMS)
    for question, (_, variant), _ in ALL_CLAIMS:  # what the question is about comes first
        for name in re.findall("`(film|fade|coupling)`", question):
            assert f"-flow-{name}" in variant


def test_arrows():
    """Down where lower is better, up where higher is, and none where neither is."""
    arrows = {name: final.direction(name) for name in final.NUMBERS}
    assert {name for name, arrow in arrows.items() if arrow == "↑"} == {
        "is", "precision", "recall", "diversity", "probe, class", "probe, bands", "probe, direction", "psnr, dB",
        "GFLOPs saved, %",
        "seconds saved, %", "seconds saved, %, batch 1", "memory saved, %"}
    assert {name for name, arrow in arrows.items() if not arrow} == {
        "hf_energy", "hf_energy, 6 steps", "hf_energy, ddim 6", "kl_nats", "weight", "posterior variance",
        "log p, N(0, I)", "log p, mixture", "log p, flow", "flow's log p of mixture samples",
        "mixture's log p of flow samples", "rank, regressed", "rank, variance", "rank, posterior", "spread, unsure",
        "nearest, samples", "nearest, held out", "closer", "closer, pixels"}


def test_times_are_those_of_the_first_seed(tmp_path):
    """Times that were taken in turn, `cost` and `savings`, count for all seeds."""
    seeds = load(tmp_path, measured(10), measured(2))["shapes"]["stage2-anneal"]  # files are read in this order
    counted = {name: [*final.values_by_seed(seeds, name)] for name in final.NUMBERS}
    assert {name for name, found in counted.items() if found == [2]} == {"ms", "ms, 4 steps", "train minutes"}
    assert final.cell(seeds, "ms, 4 steps") == "180,500" and "(200)" in final.cell(seeds, "fd, 4 steps")
    assert {tuple(found) for found in counted.values()} == {(2,), (10, 2)}


def test_rows_by_name(tmp_path):
    """A row that comes twice counts once: the first. The headline's prior is among the priors, with as few images as
    the others, or not at all. A VAE alone has as many images under every prior, so there it is the headline."""
    twice, without, vae = metrics(), metrics("stage1-guided"), metrics("stage1-vae")
    twice["rows"] += [twice["rows"][-1] | {"fd_local": score(99)}, twice["rows"][1] | {"fd_local": score(98)}]
    without["rows"] = without["rows"][:3]
    vae["rows"] = [row("gmm", "none", 0, 100, 10), row("gaussian", "none", 0, 100, 30)]
    found = {variant: seeds[0] for variant, seeds in load(tmp_path, twice, without, vae)["shapes"].items()}
    fds = {variant: {f"{kind} {name}": row["fd"]["value"] for kind in ("steps", "priors")
                     for name, row in m[kind].items()} for variant, m in found.items()}
    assert fds == {"stage1-vae": {"priors gmm": 10, "priors gaussian": 30},
                   "stage1-form1": {"steps dpm 5": 20, "steps dpm 25": 12, "priors gaussian": 30, "priors gmm": 12},
                   "stage1-guided": {"steps dpm 5": 20, "priors gaussian": 30}}
    assert all(m["headline"]["fd"] == score(10) and m["run"]["train_minutes"] == 1.5 for m in found.values())


def test_numbers_as_text():
    """Three digits and, from a thousand on, all before the point. The standard deviation is that of a sample, with two
    significant digits. It is left out where nothing differs by more than rounding. Whole numbers, which are counts,
    stay as they are; no zero of others is dropped."""
    texts = {(2.0,): "2.00", (10, 10): "10.0", (1000.0,): "1,000", (1234.5,): "1,234", (0.012345,): "0.0123",
             (999.4,): "999", (999.9,): "1,000", (-1234.5,): "-1,234", (1.0, 2.0, 3.0): "2.00 ± 1.0",
             (1.0, 1.0, 4.0): "2.00 ± 1.7", (1.0, 1.2, 1.4): "1.20 ± 0.20", (10.0, 20.0, 30.0): "20.0 ± 10",
             (10.0, 10.0, 40.0): "20.0 ± 17", (100.0, 300.0, 500.0): "300 ± 200", (1000.0, 3000.0): "2,000 ± 1,414",
             (-45.0, -46.0, -47.0): "-46.0 ± 1.0", (0.3, 0.3): "0.300", (0.3, 0.1 + 0.2): "0.300",
             (0.0, 0.0): "0.00", (1.0, 1.0 + 1e-6): "1.00 ± 7.1e-07"}
    assert {values: final.mean_and_sd(list(values)) for values in texts} == texts


def test_cells(tmp_path):
    """One score has its interval, several seeds have their standard deviation, plain numbers have neither if they are
    alone. What rests on another number of images than the headline says so."""
    slow = metrics(seed=1, distance=13.0, train_seconds=600.0)
    slow["tables"]["components"] = {"images": 1500, "30": {"fd_local": score(7)}}
    del slow["tables"]["bits_per_dim"]
    seeds = load(tmp_path, metrics(), slow)["shapes"]["stage1-form1"]
    names = ("fd", "is", "ms", "train minutes", "fd, N(0, I)", "fd, mixture", "bits/dim",
             "noise fd", "fd, noise 0.4", "fd, 30 components", "memory saved, %", "steps/dpm 5/fd")
    cells = {tuple(chosen): [final.cell(chosen, name) for name in names]
             for chosen in ({}, {0: seeds[0]}, {1: seeds[1]}, seeds)}
    assert cells == {
        (): [""] * len(names),
        (0,): ["10.0 [9.00, 11.0]", "12.0 [11.0, 13.0]", "10,500", "1.50", "30.0 [29.0, 31.0] (50)",
               "12.0 [11.0, 13.0] (50)", "3.00 [2.00, 4.00] (128)", "20.0 (50)",
               "40.0 [39.0, 41.0] (50)", "", "", "20.0 [19.0, 21.0] (50)"],
        (1,): ["13.0 [12.0, 14.0]", "15.0 [14.0, 16.0]", "13,500", "10.0", "39.0 [38.0, 40.0] (50)",
               "15.0 [14.0, 16.0] (50)", "", "26.0 (50)", "52.0 [51.0, 53.0] (50)",
               "7.00 [6.00, 8.00] (1,500)", "", "23.0 [22.0, 24.0] (50)"],
        (0, 1): ["11.5 ± 2.1", "13.5 ± 2.1", "10,500", "1.50", "34.5 ± 6.4 (50)", "13.5 ± 2.1 (50)",
                 "3.00 [2.00, 4.00] (128)", "23.0 ± 4.2 (50)", "46.0 ± 8.5 (50)",
                 "7.00 [6.00, 8.00] (1,500)", "", "21.5 ± 2.1 (50)"]}


# --- Comparisons -----------------------------------------------------------------------------------------------------

def test_compare_is_students_paired_test():
    """Of log ratios, two-sided, as SciPy computes it. Fewer than three seeds have a change alone."""
    for ours, theirs in (([9.0, 9.9, 9.6], [10.0, 11.0, 12.0]), ([8.0, 8.0, 9.0, 9.0], [10.0] * 4),
                         ([3.0, 2.0, 4.0, 5.0, 7.0], [1.0, 1.5, 3.5, 5.5, 2.0])):
        expected = ttest_1samp([math.log(a / b) for a, b in zip(ours, theirs, strict=True)], 0)
        low, high = expected.confidence_interval(0.95)
        found = final.compare(ours, theirs)
        assert found.pop("seeds") == len(ours)
        assert found == pytest.approx({"log_ratio": (low + high) / 2, "low": low, "high": high, "p": expected.pvalue})
    for ours, theirs, log_ratio in (([8.0], [10.0], math.log(0.8)), ([2.0, 3.0], [1.0, 1.0], math.log(6) / 2)):
        assert final.compare(ours, theirs) == {"seeds": len(ours), "log_ratio": pytest.approx(log_ratio),
                                               "low": None, "high": None, "p": None}
    with pytest.raises(ValueError):
        final.compare([1.0, 2.0, 3.0], [1.0, 2.0])


def test_a_score_of_zero_has_no_ratio():
    """Its seed is left out of a comparison."""
    def runs(*values):
        return {seed: {"headline": {"precision": score(value)}, "run": {"device": "cpu"}}
                for seed, value in enumerate(values)}

    sides = ("precision", "a"), ("precision", "b")
    found = final.compare_sides({"a": runs(2, 0, 4), "b": runs(1, 3, 0)}, *sides)
    assert (found["ours"], found["theirs"], found["seeds"]) == ([2], [1], 1)
    assert final.compare_sides({"a": runs(0), "b": runs(3)}, *sides) is None


def test_a_dagger_marks_different_processors():
    """The number of threads does not count. One seed of several is enough."""
    def runs(*devices):
        return {seed: {"headline": {"fd": score(1.0)}, "run": {"device": device}}
                for seed, device in enumerate(devices)}

    def change(ours, theirs):
        results = {"a": runs(*ours), "b": runs(*theirs)}
        return final.cell_of_comparison(results, "a", "fd against b")

    amd, one, two = "cpu (AMD, 1 threads)", "cpu (Intel, 1 threads)", "cpu (Intel, 2 threads)"
    assert change([one], [two]) == "+0.0%, 1 seed"
    assert change([one, amd], [two, two]) == "+0.0%†, 2 seeds"
    assert change([one, amd], [two]) == "+0.0%, 1 seed"  # only the seeds that both have


def test_times_of_other_processors_are_left_out(tmp_path):
    """Of others than that of the baseline, which may be missing. The other cells of such a line stay."""
    amd, intel = "cpu (AMD, 1 threads)", "cpu (Intel, 2 threads)"
    many = [metrics(device=intel), metrics("stage1-vae", device=amd), metrics("stage1-uncond", device=intel),
            metrics("stage1-vae", dataset="cifar10", device=amd)]
    table = final.table_of(load(tmp_path, *many), "*", "ms; fd")
    times = {}
    for line in table.splitlines()[2:-2]:
        name, times[name], fd = map(str.strip, line.split("|")[1:-1])
        assert fd
    assert times == {"shapes stage1-form1": "10,500", "shapes stage1-uncond": "10,500", "shapes stage1-vae": "",
                     "cifar10 stage1-vae": "10,500"}


def test_compare_equal_ratios():
    """Nothing is divided by zero: the same on both sides is no change, and half of it is one beyond doubt."""
    same, half = final.compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), final.compare([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert same["log_ratio"] == 0 and same["p"] == pytest.approx(1)
    assert half["p"] < 1e-20 and half["low"] == pytest.approx(half["high"]) == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("p,adjusted", [
    ([], []), ([0.03], [0.03]), ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 3, 1, 2 and 4 times
    ([0.02, 0.02], [0.04, 0.04]), ([0.6, 0.9], [1.0, 1.0]), ([0.5, 0.001, 0.3], [0.6, 0.003, 0.6]),
    ([0.024, 0.001, 0.013], [0.026, 0.003, 0.026])])
def test_holm(p, adjusted):
    assert final.holm(p) == pytest.approx(adjusted)


def test_changes_as_text():
    """A clear gain, a clear loss, a tie, one and two seeds. The adjusted p-value decides, where there is one."""
    base = [10.0, 11.0, 12.0]

    def describe(ours, theirs):
        return final.describe_change(final.compare(ours, theirs) | {"across_processors": False})

    # ratios 0.5, 0.5 and 0.55; then 2, 2 and 2.2; then 1.2, 0.864 and 1.042
    assert describe([5.0, 5.5, 6.6], base).startswith("**-48%** (-55% to -41%), p = 0.00")
    assert describe([20.0, 22.0, 26.4], base).startswith("**+106%** (+80% to +137%), p = 0.00")
    assert describe([12.0, 9.5, 12.5], base).startswith("+2.6% (")
    assert describe([5.0, 5.5, 6.0], base) == "**-50%** (-50% to -50%), p < 0.001"
    assert describe([8.0], [10.0]) == "-20% (one run)"
    assert describe([11.0, 12.1], [10.0, 11.0]) == "+10% (two runs)"
    # ratios 0.8, 0.8, 0.9 and 0.9: their geometric mean is the root of 0.72, their interval 0.761 to 0.945
    change = final.compare([8.0, 8.0, 9.0, 9.0], [10.0] * 4) | {"across_processors": False}
    assert final.describe_change(change) == "**-15%** (-24% to -5.5%), p = 0.017"
    assert final.describe_change(change | {"adjusted": 0.0499}) == (
        "**-15%** (-24% to -5.5%), p = 0.05")
    assert final.describe_change(change | {"adjusted": 0.1234}) == (
        "-15% (-24% to -5.5%), p = 0.12")
    percents = {0.8: "-20%", 1.0: "+0.0%", 3.5: "+250%", 0.004: "-100%", 1.094: "+9.4%", 1.0994: "+9.9%",
                1.0996: "+10%", 0.901: "-9.9%", 0.9: "-10%"}
    assert {x: final.percent(math.log(x)) for x in percents} == percents


def cells_of(table, question):
    """The cells of the one line that begins with a question."""
    line, = [line for line in table.splitlines() if line.startswith(f"| {question} | ")]
    return line.strip("| ").split(" | ")[1:]


def test_claims(tmp_path):
    """Each claim compares the seeds that both sides have, on each data set that has both, else it is not run. The
    guiding questions have no means, which other tables show."""
    many = [metrics(seed=s, distance=10.0 + s) for s in range(4)]  # the joint variant has three of them
    for seed in range(3):
        joint = metrics("stage2-anneal", seed, 5.0 + seed / 2)
        joint["tables"]["latent_space"] = {"slerp": {"refined": {"path_over_distance": 1.2}}}
        many[seed]["tables"]["latent_space"] = {"slerp": {"refined": {"path_over_distance": 1.5 + seed / 10}}}
        many.append(joint)
    everything = load(tmp_path, *many, metrics(dataset="cifar10"), metrics("stage1-vae", 0, 40.0))
    primary = final.table_claims(everything, final.PRIMARY_CLAIMS, adjust=True)
    assert primary.splitlines()[:2] == ["| question | compared | shapes | cifar10 |",
                                        "| --- | --- | --- | --- |"]
    quality = cells_of(primary, "**Quality**: does joint training help?")
    assert quality[0] == "fd: stage2-anneal / stage1-form1"
    assert quality[1].startswith("**-50%** (") and quality[2] == "not measured"
    noise = cells_of(primary, "**Robustness**: does joint training help against noise?")
    assert noise[1].startswith("**-50%** (")
    path = cells_of(primary, "**Latent space**: does joint training smooth it?")
    assert path[1].startswith("**-25%** (")
    shown = final.table_claims(everything, final.PRIMARY_CLAIMS)  # the same, with the means
    quality = cells_of(shown, "**Quality**: does joint training help?")
    assert quality[1].startswith("5.50 ± 0.50 / 11.0 ± 1.0: **-50%** (")
    claims = final.table_claims(everything, CHART_CLAIMS)
    assert cells_of(claims, "Does refinement improve the VAE's samples?")[1] == "10.0 / 40.0: -75% (one run)"
    assert cells_of(claims, "Does adaptive conditioning (`film`) help?")[1:] == ["not measured", "not measured"]
    question = ("Fitted?", ("fd, mixture", "stage1-form1"), ("fd, N(0, I)", "stage1-form1"))
    fitted = final.table_claims(everything, [question])
    assert cells_of(fitted, "Fitted?")[2] == "12.0 / 30.0: -60% (one run)"
    for table, note in ((primary, "questions are adjusted together (Holm), so several can be equal. "),
                        (claims, "without adjustment")):
        assert note in table and table.endswith(f"{final.SETTINGS}*")


def test_claims_pair_by_seed(tmp_path):
    """Seeds 1, 2 and 3 are common. Each ratio is 0.5 and no interval is left; another pairing would have one."""
    many = [metrics(seed=s, distance=10.0 * 2**s) for s in (3, 1, 2, 0)]
    many += [metrics("stage2-anneal", s, 5.0 * 2**s) for s in (1, 3, 2, 4)]
    table = final.table_claims(load(tmp_path, *many), [("?", ("fd", "stage2-anneal"), ("fd", "stage1-form1"))])
    assert "| 23.3 ± 15 / 46.7 ± 31: **-50%** (-50% to -50%), p < 0.001" in table


def test_questions_of_a_data_set_are_tested_together(tmp_path):
    """Of shapes, two claims have three seeds or more, so their p-values count twice and once. The one with two seeds
    and the one that was not run count for nothing, and neither does the other data set, which tests one claim."""
    factors = {"stage2-anneal": (0.8, 0.86, 0.9), "stage1-guided": (0.7, 0.8, 0.9), "stage1-vae": (2.0, 3.0)}
    many = [metrics(seed=seed, dataset=dataset) for seed in range(3) for dataset in ("shapes", "cifar10")]
    many += [metrics(variant, seed, 10 * factor) for variant, all_factors in factors.items()
             for seed, factor in enumerate(all_factors)]
    many += [metrics("stage2-anneal", seed, 10 * factor, dataset="cifar10")
             for seed, factor in enumerate(factors["stage2-anneal"])]
    p = {variant: ttest_1samp([math.log(factor) for factor in all_factors], 0).pvalue
         for variant, all_factors in factors.items()}
    assert p["stage2-anneal"] < 0.05 < 2 * p["stage2-anneal"] < p["stage1-guided"]
    claims = [(variant, ("fd", variant), ("fd", "stage1-form1")) for variant in (*factors, "bonus-latent")]
    everything = load(tmp_path, *many)
    together = final.table_claims(everything, claims, adjust=True)
    alone = final.table_claims(everything, claims)
    low, high = ttest_1samp([math.log(factor) for factor in factors["stage2-anneal"]], 0).confidence_interval()
    interval, p_anneal = f"({final.percent(low)} to {final.percent(high)})", p["stage2-anneal"]
    significant = f"**-15%** {interval}, p = {p_anneal:.2g}"
    assert cells_of(alone, "stage2-anneal")[1:] == [f"8.53 ± 0.50 / 10.0: {significant}"] * 2
    assert cells_of(together, "stage2-anneal")[1:] == [
        f"-15% {interval}, p = {2 * p_anneal:.2g}", significant]
    assert cells_of(together, "stage1-guided")[1].endswith(f", p = {p['stage1-guided']:.2g}")
    for table, means in ((alone, "25.0 ± 7.1 / 10.0: "), (together, "")):
        assert cells_of(table, "stage1-vae")[1:] == [f"{means}+145% (two runs)", "not measured"]
        assert cells_of(table, "bonus-latent")[1:] == ["not measured", "not measured"]


# --- Which results may be compared -----------------------------------------------------------------------------------

def other(key, value):
    """A train setting of the same type, but with another value."""
    return {bool: lambda: not value, str: lambda: "eps", list: lambda: [16]}.get(type(value), lambda: value + 3)()


@pytest.mark.parametrize("change,key", [
    ({"crop": "celeba-148"}, "crop"), ({"data_note": "JPEG"}, "data_note"),
    ({"n_real": 6}, "n_real"), ({"budget": "smoke"}, "budget"),
    *(({"eval": EVAL | {key: 7}}, key) for key in ("features", "temperature", "sampler", "sample_steps", "count",
                                                   "grid_count", "probe_steps", "bits_images", "bits_draws")),
    *(({"train": {key: other(key, value)}}, key) for key, value in common.TRAIN.items())])
def test_what_cannot_be_compared_is_refused(change, key, tmp_path, capsys):
    """Another variant with one setting changed. The files, the key and both values are named."""
    one, two = metrics(), metrics("stage1-vae", **change)
    expect_error(capsys, lambda: load(tmp_path, one, two), f": {key} was ", "stage1-vae-s0.json cannot be compared",
                 "with ", "stage1-form1-s0.json")


def test_what_a_run_changes_on_purpose_is_not_compared(tmp_path, capsys):
    """The name of a run tells what --set changed. All else is compared, with the first result that has the setting,
    even if a run that changes it comes first."""
    train = {"beta": 0.25, "start": 300, "even_levels": False, "unet_lr": 1e-5}
    name = "bonus-latent-beta=0.25-start=300-even_levels=False-unet_lr=1e-05"
    fine = [metrics(name, train=train), metrics(), metrics("stage2-anneal-unet_lr=1e-05", train={
        "unet_lr": 1e-5}), metrics("stage2-sum-start=300", dataset="cifar10", train={"start": 300})]
    assert len(load(tmp_path / "fine", *fine)["shapes"]) == 3
    for key, value in (("dropout", 0.5), ("beta", 0.5), ("start", 301), ("unet_lr", 1.0)):
        expect_error(capsys, lambda key=key, value=value: load(tmp_path / key, *fine, metrics("stage3-x", train={
            key: value})), f": {key} was {common.TRAIN[key]}, is now {value}; remove", "stage3-x-s0.json",
                     "stage1-form1-s0.json" if key not in ("dropout",) else f"{name}-s0.json")
    expect_error(capsys, lambda: load(tmp_path / "two", *fine, metrics("stage3-dropout=0.5", train={
        "dropout": 0.5, "beta": 7})), ": beta was 1.0, is now 7", "stage3-dropout=0.5-s0.json")


def test_seeds_of_a_variant_were_trained_alike(tmp_path, capsys):
    """Their prior, networks and all their train settings agree, even those that their name says. Variants may differ in
    networks and in settings of their stage, and their evaluation in what does not matter."""
    train = {"loss": "sum", "data_dir": "/a"}  # folders may differ, and so may seeds
    name = "stage2-sum-beta=0.5"
    same = [metrics(name, seed, train=train | {"beta": 0.5, "data_dir": f"/{seed}"}) for seed in (0, 1, 2)]
    same += [metrics(train={"loss": "anneal"}, parameters=7, eval=EVAL | {"prior": "none", "grid": [], "batch": 1})]
    same[1]["run"]["bfloat16"] = True  # says how it was sampled; older files lack it
    seeds = load(tmp_path, *same)["shapes"][name]
    assert [*seeds] == [0, 1, 2] and final.conclude({1: seeds[1]}, {0: seeds[0]}, "fd").startswith("reproduced")
    for change, key in (({"train": train | {"beta": 0.6}}, "beta"), ({"train": {"loss": "bound", "beta": 0.5}}, "loss"),
                        ({"parameters": 7, "train": train | {"beta": 0.5}}, "parameters"),
                        ({"eval": EVAL | {"prior": "gaussian"}, "train": train | {"beta": 0.5}}, "prior")):
        expect_error(capsys, lambda change=change: load(tmp_path, *same, metrics(name, seed=3, **change)),
                     f": {key} was ", f"{name}-s3.json cannot be compared", f"{name}-s0.json")


def test_two_files_of_one_run_are_refused(tmp_path, capsys):
    """Such as a copy of a folder of runs beside it: one of them would be ignored."""
    paths = save(tmp_path, metrics(), metrics(seed=1))
    copy = shutil.copy(paths[0], paths[0].with_name("old-s0.json"))
    expect_error(capsys, lambda: final.load_all([*paths, copy]), f"{copy} and {paths[0]} both hold seed 0 of "
                 "stage1-form1 on shapes", "remove one of them")


def test_the_order_of_tables(tmp_path):
    """Data sets and variants in their orders, then by the alphabet."""
    variants = ["stage1-vae", "stage1-vae-beta=1", "stage1-uncond", "stage1-form1", "stage1-guided", "stage2-anneal",
                "stage2-sum", "stage3-flow-film", "bonus-latent"]
    many = [metrics(variant, dataset=dataset) for variant in reversed(variants)
            for dataset in ("a-folder", "celeba64", "cifar10", "shapes")]
    found = load(tmp_path, *many)
    assert [*found] == ["shapes", "cifar10", "celeba64", "a-folder"]
    assert all([*results] == variants for results in found.values())


def test_a_damaged_file_is_named(tmp_path, capsys):
    path, = save(tmp_path, metrics())
    for text in (path.read_text("utf-8")[:100], "{}", json.dumps(metrics() | {"rows": []})):
        path.write_text(text)
        expect_error(capsys, lambda: final.load_all([path]), "stage1-form1-s0.json: damaged")


# --- Tables and charts -----------------------------------------------------------------------------------------------

def test_tables(tmp_path):
    """A table has a line for each variant that fits and has a number, then the settings. Runs with a changed setting
    are only where a pattern has an equals sign."""
    changed = metrics("stage1-vae-beta=0.25", train={"beta": 0.25}, distance=20.0)
    many = [metrics(), metrics(seed=1, distance=13.0), metrics("stage1-vae"), changed, metrics("bonus-latent"),
            metrics(dataset="cifar10", distance=7.0)]
    everything = load(tmp_path, *many)
    assert final.table_of(everything, "stage1-*", "fd; bits/dim; memory saved, %").splitlines()[:5] == [
        "| variant | fd ↓ | bits/dim ↓ | memory saved, % ↑ |", "| --- | --- | --- | --- |",
        "| shapes stage1-vae | 10.0 [9.00, 11.0] | 3.00 [2.00, 4.00] (128) |  |",
        "| shapes stage1-form1 | 11.5 ± 2.1 | 3.00 (128) |  |",
        "| cifar10 stage1-form1 | 7.00 [6.00, 8.00] | 3.00 [2.00, 4.00] (128) |  |"]
    rows = lambda variants, columns="fd": [  # noqa: E731
        line.split(" | ")[0].removeprefix("| ")
        for line in final.table_of(everything, variants, columns).splitlines()[2:-2]]
    assert rows("*=*") == rows("*-beta=*") == ["shapes stage1-vae-beta=0.25"] and rows("*-beta*") == []
    assert rows("stage1-f* *-latent") == ["shapes stage1-form1", "shapes bonus-latent", "cifar10 stage1-form1"]
    assert rows("stage1-v") == rows("tage2-*") == rows("*", "memory saved, %") == []
    assert rows("stage1-form1 *-form1") == ["shapes stage1-form1", "cifar10 stage1-form1"]
    shown = {name for name, arguments in final.TABLES.items() if "beta=0.25" in final.table_of(everything, *arguments)}
    assert shown == {"recipe"}


def test_a_column_compares_with_another_variant(tmp_path):
    """By how many percent a number differs, over the seeds that both have, within a data set; in bold if significant.
    Here the ratios are 0.5 and 0.8, and their geometric mean is the root of 0.4, which is 0.632."""
    many = [metrics(seed=seed, distance=10.0) for seed in range(3)]
    many += [metrics("stage2-anneal", 1, 5.0), metrics("stage2-anneal", 2, 8.0), metrics("stage2-sum", 2, 11.0)]
    many += [metrics("stage2-bound", seed, 5.0 + seed / 100) for seed in range(3)]
    many += [metrics("stage2-anneal", 7, 99.0), metrics("stage2-kendall", 7), metrics("stage2-sum", dataset="cifar10")]
    header, _, *lines, _, note = final.table_of(load(tmp_path, *many), "*", "fd; fd against stage1-form1").splitlines()
    assert header == "| variant | fd ↓ | against stage1-form1: fd ↓ |" and "against: the change in percent" in note
    assert {line.split(" | ")[0]: line.split(" | ")[2].strip(" |") for line in lines} == {
        "| shapes stage1-form1": "", "| shapes stage2-anneal": "-37%, 2 seeds", "| shapes stage2-kendall": "",
        "| shapes stage2-bound": "**-50%**, 3 seeds", "| shapes stage2-sum": "+10%, 1 seed", "| cifar10 stage2-sum": ""}


def test_a_question_is_significant_only_after_adjustment(tmp_path):
    """In such a column, too: `anneal` and `kendall` have the same fd, but that of `anneal` answers one of the four
    questions, which are tested together. p is 4%, and adjusted it is above 5%."""
    many = []
    for seed, distance in enumerate((8.0, 8.5, 9.0)):
        many += [metrics(seed=seed, distance=10.0), metrics("stage2-anneal", seed, distance),
                 metrics("stage2-kendall", seed, distance)]
    table = final.table_of(load(tmp_path, *many), "stage2-*", "fd against stage1-form1")
    assert "| shapes stage2-anneal | -15%, 3 seeds |" in table
    assert "| shapes stage2-kendall | **-15%**, 3 seeds |" in table


def test_a_column_compares_two_numbers_of_a_run(tmp_path):
    """By how many percent the first differs from the second. Here the ratios are 0.5 and 0.8, as above. A run without
    the second number has an empty cell."""
    many = [metrics(seed=1, distance=5.0), metrics(seed=2, distance=8.0), metrics("stage1-vae")]
    for run in many[:2]:
        run["tables"] |= {"before_refinement": {"fd_local": score(10.0)}}
    header, _, *lines, _, note = final.table_of(load(tmp_path, *many), "*", "fd; fd / fd before").splitlines()
    assert header == "| variant | fd ↓ | fd / fd before ↓ |"
    assert "; a / b: by how many percent a differs from b." in note
    assert {line.split(" | ")[0]: line.split(" | ")[2].strip(" |") for line in lines} == {
        "| shapes stage1-form1": "-37%, 2 seeds", "| shapes stage1-vae": ""}
    timed = final.with_note("| 1.5 |", ["seconds with s / seconds without s"])
    assert "rough" not in timed  # both were taken in turn


def test_the_note_explains_the_cells(tmp_path):
    """Each of its parts stands there only if the table has such cells."""
    everything = load(tmp_path, metrics(), metrics(seed=1, distance=13.0), metrics(dataset="cifar10", distance=7.0))
    spread, interval = "a ± b: mean ± sd over seeds", "[a, b]: 95% interval of one run, over the draw of images"
    images = "(n): measured on n images"
    times = "times: rough, of the first seed; none if it had another processor than stage1-form1 (ms: for one image)"
    shapes, cifar10 = {"shapes": everything["shapes"]}, {"cifar10": everything["cifar10"]}
    for results, columns, note in (
            (cifar10, "fd", interval),
            (shapes, "fd", spread),
            (cifar10, "fd, N(0, I)", f"{interval}; {images}"),
            (cifar10, "ms", times),
            (everything, "fd; ms; noise fd", f"{spread}; {interval}; {images}; {times}")):
        assert final.table_of(results, "*", columns).splitlines()[-1] == f"*{final.SETTINGS} {note}.*"
    plain = "| shapes stage3-flow-film | 1.5 |"
    assert final.with_note(plain, ["seconds with s"]) == f"{plain}\n\n*{final.SETTINGS}*"  # taken in turn
    assert final.with_note(plain, ["fd"], "shapes: drawn.") == f"{plain}\n\n*shapes: drawn.*"
    data = [final.describe_data(dataset, results) for dataset, results in everything.items()]
    everything["cifar10"][final.LONG_UNCOND["cifar10"]] = everything["cifar10"]["stage1-form1"]
    overview = final.table_overview(everything)
    assert cells_of(overview, "`stage1-uncond`, longer")[1:] == ["", "7.00 [6.00, 8.00]"]
    assert overview.endswith(f"\n\n*{' '.join(data)} {spread}; {interval}.*")
    floors = [final.cell({0: results["stage1-form1"][0]}, "floor") for results in everything.values()]
    assert cells_of(overview, "real images")[1:] == floors and all(floors)


def test_a_bar_in_a_cell_is_escaped():
    assert final.markdown(["a", "q(z|x)"], [["b|c", "d"]]) == "| a | q(z\\|x) |\n| --- | --- |\n| b\\|c | d |"


def test_the_sentence_about_the_data(tmp_path):
    """It describes a run without changed settings, if there is one, and all numbers come from the metrics."""
    few = metrics("stage1-vae-batch=8", train={"batch": 8})
    results = load(tmp_path / "a", few, metrics("stage2-sum"))["shapes"]
    assert final.describe_data("shapes", results) == (
        "shapes: drawn, budget `cpu`, 100 samples, features `local-a`.")
    hashed = load(tmp_path / "c", metrics(features="local-a-0123abcd"))["shapes"]
    assert final.describe_data("shapes", hashed) == final.describe_data("shapes", results)
    header, _, *rows = final.table_data({"shapes": results, "cifar10": hashed}).splitlines()
    assert header == ("| data set | training images | budget: training of VAE and refiner | samples | "
                      "samples, side measurements | feature network | floor ↓ |")
    assert rows == ["| shapes | 5, drawn | `cpu`: 2,220 and 221 steps of 32 images | 100 | 50 | `local-a` | "
                    "11.0 [10.0, 12.0] |",
                    "| cifar10 | 5, drawn | `cpu`: 2,220 and 221 steps of 32 images | 100 | 50 | `local-a-0123abcd` | "
                    "11.0 [10.0, 12.0] |"]
    assert "221 steps of 8 images" in final.table_data({"shapes": load(tmp_path / "b", few)["shapes"]})


def test_long_tables(tmp_path):
    """All tables, in order. The questions are tested together; tables of claims also have the further ones."""
    many = metrics(), metrics(seed=1, distance=13.0), metrics("stage1-vae"), measured(), metrics("bonus-latent")
    many[3]["run"]["dataset"] = "cifar10"
    everything = load(tmp_path, *many)
    tables = final.all_tables(everything)
    text = final.long_tables(everything, tables)
    assert re.findall("## (.*)", text) == ALL_TABLES
    assert text.split("## variants\n\n")[1].split("\n\n")[0].splitlines() == [
        "| variant | what it is | seeds, shapes | seeds, cifar10 |", "| --- | --- | --- | --- |", *(
            f"| `{variant}` | {final.VARIANTS[variant]} | {seeds} |" for variant, seeds in
            (("stage1-vae", "1 | "), ("stage1-form1", "2 | "), ("stage2-anneal", " | 1"), ("bonus-latent", "1 | ")))]
    assert "adjusted together (Holm)" in text.split("## questions\n\n")[1].split("\n\n## ")[0]
    assert {*final.CLAIMS} == {*final.FURTHER_CLAIMS}
    for line in ("| Does refinement improve the VAE's samples? | fd: stage1-form1 / stage1-vae | ",
                 "| Is Formulation 2 better than 1? | fd: stage1-form2 / stage1-form1 | not measured | not measured |"):
        assert line in text.split("## claims on refinement\n\n")[1].split("\n\n## ")[0]


def test_reproduced(tmp_path):
    """Within 40% of the committed run of the same seed or, if there is none, of the mean over the committed seeds. What
    lies further off, has other settings, or has nothing to be compared with is said to."""
    fresh = load(tmp_path / "fresh", metrics(distance=12.4), metrics("stage1-vae", 0, 40.0), metrics("bonus-latent"))
    one = load(tmp_path / "one", metrics(distance=10.0), metrics("stage1-vae", distance=30.0))
    lines = final.table_reproduced(fresh["shapes"], one["shapes"]).splitlines()
    assert lines[0] == "| variant | score | new | committed | conclusion |"
    conclusions = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in lines[2:]}
    assert conclusions == {
        ("| stage1-form1", "fd"): ["12.4 [11.4, 13.4]", "10.0 [9.00, 11.0]", "reproduced (off by 24%) |"],
        ("| stage1-form1", "hf_energy"): ["19.4 [18.4, 20.4]", "17.0 [16.0, 18.0]", "reproduced (off by 14%) |"],
        ("| stage1-vae", "fd"): ["40.0 [39.0, 41.0]", "30.0 [29.0, 31.0]", "reproduced (off by 33%) |"],
        ("| stage1-vae", "hf_energy"): ["47.0 [46.0, 48.0]", "37.0 [36.0, 38.0]", "reproduced (off by 27%) |"],
        ("| bonus-latent", "fd"): ["10.0 [9.00, 11.0]", "", "nothing committed |"],
        ("| bonus-latent", "hf_energy"): ["17.0 [16.0, 18.0]", "", "nothing committed |"]}
    committed = load(tmp_path / "three", *(metrics(seed=seed, distance=distance) for seed, distance in
                                           ((0, 10.0), (1, 13.0), (2, 100.0))))["shapes"]  # their mean is 41
    for k, (new, conclusion) in enumerate((
            ({0: 12.4}, "reproduced (off by 24%)"), ({0: 7.6}, "reproduced (off by 24%)"),
            ({0: 14.1}, "NOT reproduced (off by 41%)"), ({0: 5.9}, "NOT reproduced (off by 41%)"),
            ({0: 12.4, 1: 13.0}, "reproduced (off by 24%)"), ({0: 14.2}, "NOT reproduced (off by 42%)"),
            ({0: 12.4, 1: 18.5}, "NOT reproduced (off by 42%)"),  # the farthest of them counts
            ({1: 10.0}, "reproduced (off by 23%)"), ({7: 40.0}, "reproduced (off by 2%)"),
            ({7: 10.0}, "NOT reproduced (off by 76%)"))):
        found = load(tmp_path / f"new{k}", *(metrics(seed=seed, distance=distance) for seed, distance in new.items()))
        assert final.table_reproduced(found["shapes"], committed).splitlines()[2].endswith(f"| {conclusion} |")
    for change, text in (({"eval": EVAL | {"count": 40}}, "count was 100, is now 40"),
                         ({"eval": EVAL | {"prior": "gaussian"}}, "prior was gmm, is now gaussian"),
                         ({"train": {"beta": 9.0}}, "beta was 1.0, is now 9.0")):
        few = load(tmp_path / text, metrics(**change))["shapes"]
        assert f"| not comparable: {text} |" in final.table_reproduced(few, one["shapes"])


def lines_of(axis):
    """{label: (xs, means, sds)} of the lines on an axis. The sd is None where there is no bar."""
    found = {}
    for line in axis.containers:
        (xs, means), (bars,) = line.lines[0].get_data(), line.lines[2]
        sds = []
        for segment in bars.get_segments():
            sds.append((segment[1][1] - segment[0][1]) / 2 if len(segment) else None)
        found[line.get_label()] = list(xs), list(means), sds
    return found


def test_chart_of_noise(tmp_path):
    """Means and sds over seeds, for variants with two points. The latent model's noise is in the latent, so it is not
    compared. Runs with a changed setting have no line."""
    form1 = [metrics(), metrics(seed=1, distance=10.0), metrics(seed=2, distance=14.5)]
    one_point = metrics("stage1-guided")
    del one_point["tables"]["robustness"]["scores"]["clean"], one_point["tables"]["robustness"]["scores"]["noise 0.1"]
    everything = load(tmp_path, *form1, one_point, metrics("bonus-latent"), metrics("stage2-sum"),
                      metrics("stage1-form1-beta=0.5", train={"beta": 0.5}), metrics("stage1-vae", dataset="cifar10"))
    shapes, cifar10 = final.chart_noise(everything).axes
    sd = (13.5 / 2) ** 0.5  # of 10, 10 and 14.5: the squares of what they are off their mean sum to 13.5
    assert lines_of(shapes) == {"stage1-form1": ([0, 0.1, 0.4], pytest.approx([11.5, 12.65, 46]),
                                                 pytest.approx([sd, 1.1 * sd, 4 * sd]))}
    assert lines_of(cifar10) == {"stage1-vae": ([0, 0.1, 0.4], pytest.approx([10, 11, 40]), [None] * 3)}
    assert (shapes.get_title(), cifar10.get_title(), shapes.get_yscale()) == ("shapes", "cifar10", "log")


def test_chart_of_all_criteria(tmp_path):
    """Cells hold means over seeds. Colours are log ratios to form1 over equal seeds, in doublings, positive where a
    number is better. fd is lower is better, the Inception Score higher is better, and detail is neither. Numbers that
    a run lacks leave their cells empty, and so does noise on the latent model's latent. A data set without form1 has no
    panel."""
    anneal = [metrics("stage2-anneal", 0, 20.0), metrics("stage2-anneal", 7, 30.0)]
    latent = metrics("bonus-latent")
    del anneal[0]["tables"]["robustness"], latent["rows"][0]["hf_energy"]
    everything = load(tmp_path, metrics(), metrics(seed=1, distance=50.0), *anneal, metrics("stage2-sum"),
                      latent, metrics("stage2-anneal", dataset="cifar10"),
                      metrics(dataset="celeba64"))
    shapes, celeba64 = final.chart_summary(everything).axes
    assert [shapes.get_title(loc="left"), celeba64.get_title(loc="left")] == ["shapes", "celeba64"]
    assert [label.get_text() for label in shapes.get_yticklabels()] == ["stage1-form1", "stage2-anneal", "bonus-latent"]
    assert [label.get_text() for label in shapes.get_xticklabels()] == [*map(final.with_arrow, final.SUMMARY)]
    x = final.SUMMARY.index
    texts = {tuple(text.get_position()): text.get_text() for text in shapes.texts}
    assert texts[x("fd"), 0] == "30.0" and texts[x("fd"), 1] == "25.0"
    assert texts[x("noise fd"), 1] == "60.0" and (x("hf_energy"), 2) not in texts
    assert texts[x("fd"), 2] == "10.0" and (x("noise fd"), 2) not in texts
    baseline, joint, _ = shapes.images[0].get_array()
    assert not baseline.any() and joint[x("fd")] == pytest.approx(-1)  # 20 with seed 0, where form1 has 10
    shift = SCORES.index("is_local")
    assert joint[x("is")] == pytest.approx(math.log2((20 + shift) / (10 + shift)))
    assert joint[x("hf_energy")] == joint[x("noise fd")] == 0  # neither is better; no seed has both


def test_a_long_table_has_its_chart(tmp_path):
    """The chart and its caption stand below the table of its numbers, if there is something to show."""
    changed = metrics("stage1-form1-beta=0.5", train={"beta": 0.5})
    for name, runs, shown in (("bare", [metrics("stage1-vae")], []), ("changed", [metrics(), changed], ["recipe"])):
        everything = load(tmp_path / name, *runs)
        text = final.long_tables(everything, final.all_tables(everything))
        assert re.findall(r"!\[.*\]\(figures/(.*)\.png\)", text) == shown
    below = text.split("## recipe\n\n")[1].split("\n\n## ")[0]
    assert below.endswith(f"\n\n![recipe](figures/recipe.png)\n\n*{final.CAPTIONS['recipe']}*")


def test_chart_of_costs(tmp_path):
    """fd of the rows with few images, above by evaluations, below by the seconds of the first seed. A single run has no
    bars."""
    runs = [metrics(), metrics(seed=1, distance=13.0), measured()]
    for found in runs[:2]:
        found["rows"][2] |= {"steps": 6, "nfe": 12}
    runs[2]["run"]["dataset"] = "cifar10"
    everything = load(tmp_path, *runs)
    by_evaluations, other_evaluations, by_seconds, other_seconds = final.chart_cost(everything).axes
    sd = 1.5 * 2**0.5
    assert lines_of(by_evaluations) == {"stage1-form1": ([12, 50], [21.5, 13.5], pytest.approx([sd, sd]))}
    assert lines_of(by_seconds) == {"stage1-form1": ([20.5, 12.5], [21.5, 13.5], pytest.approx([sd, sd]))}
    assert lines_of(other_evaluations) == {"stage2-anneal": (
        [4, 8, 12, 20, 50], [190, 180, 150, 160, 170], [None] * 5)}
    assert lines_of(other_seconds) == {"stage2-anneal": (
        [190.5, 180.5, 150.5, 160.5, 170.5], [190, 180, 150, 160, 170], [None] * 5)}
    assert by_evaluations.get_xscale() == by_evaluations.get_yscale() == "log"
    runs[1]["rows"].append(row("gmm", "dpm", 10, 50, 99))  # seed 0 lacks this row: it would move the line
    by_evaluations, _ = final.chart_cost(load(tmp_path / "again", *runs[:2])).axes
    assert lines_of(by_evaluations) == {"stage1-form1": ([12, 50], [21.5, 13.5], pytest.approx([sd, sd]))}


def test_chart_of_claims(tmp_path):
    """A marker at the ratio of means, filled where the claim is significant, with Student's interval; a cross where
    there are fewer than three seeds. The guiding questions come first, and are adjusted."""
    runs = []
    for seed, ratio in enumerate((0.5, 0.51, 0.49)):  # of anneal to form1, and of guided to form1 the same
        runs += [metrics(seed=seed), metrics("stage2-anneal", seed, 10 * ratio), metrics("stage1-guided", seed, 5.0)]
    runs += [metrics("stage1-vae", 0, 40.0), metrics("stage1-form1", dataset="celeba64"),
             metrics("stage1-vae", 0, 5.0, dataset="celeba64")]
    everything = load(tmp_path, *runs)
    axis, = final.chart_claims(everything).axes
    texts = [label.get_text().split("\n") for label in axis.get_yticklabels()]
    names = [question for question, _ in texts]
    assert [sides for _, sides in texts][:2] == ["fd: stage2-anneal / stage1-form1",
                                                 "stage3-flow-film: seconds with s / seconds without s"]
    assert "stage1-form1 (fd, mixture) / stage1-vae (fd)" == final.describe_sides(
        ("?", ("fd, mixture", "stage1-form1"), ("fd", "stage1-vae")))
    assert names[0] == "Quality: does joint training help?" and len(names) == len(CHART_CLAIMS)
    marks = {}  # {(row, shift): (ratio, filled or not, or "x")}
    intervals = {}
    for line in axis.lines:
        (xs, ys), dataset_shift = line.get_data(), -0.25
        if len(xs) == 2 and len({*ys}) == 1:
            intervals[names[round(ys[0] - dataset_shift)]] = tuple(xs)
        elif len(xs) == 1:
            look = "x" if line.get_marker() == "x" else line.get_markerfacecolor() == line.get_color()
            shift = -0.25 if ys[0] % 1 == 0.75 else 0.25  # of shapes, and of celeba64
            marks[names[round(ys[0] - shift)], shift] = pytest.approx(xs[0]), look
    quality, refinement = names[0], "Does refinement improve the VAE's samples?"
    assert marks[quality, -0.25] == ((0.5 * 0.51 * 0.49) ** (1 / 3), True)
    assert marks[refinement, -0.25] == (0.25, "x") and marks[refinement, 0.25] == (2, "x")  # one run each
    assert marks["Does guidance by a worse refiner help?", -0.25] == (0.5, True)
    log_ratios = [math.log(x) for x in (0.5, 0.51, 0.49)]
    low, high = ttest_1samp(log_ratios, 0).confidence_interval()
    assert intervals[quality] == pytest.approx((math.exp(low), math.exp(high)))
    assert refinement not in intervals
    p = ttest_1samp(log_ratios, 0).pvalue
    weak = [metrics("stage2-anneal", seed, 10 * ratio) for seed, ratio in enumerate((0.5, 0.6, 0.7))]
    axis, = final.chart_claims(load(tmp_path / "weak", *(metrics(seed=seed) for seed in range(3)), *weak)).axes
    filled = [line.get_markerfacecolor() == line.get_color() for line in axis.lines
              if list(line.get_ydata()) == [-0.25]]
    changes = final.compare_together(final.load_all((tmp_path / "weak").glob(RESULTS))["shapes"], final.PRIMARY_CLAIMS)
    assert p < 0.001 and changes[0]["p"] < 0.05 < changes[0]["adjusted"] and filled == [False]


def test_chart_of_weights(tmp_path):
    """Ratios to form1 with the same seed, their means and sds: of anneal by its weights, of kendall at the mean of
    those that it has learned. Other runs of joint training, such as those of another reach of the gradient, have no
    point, nor has a weight of 0, for which a logarithmic axis has no place. All data sets have the same ranges."""
    runs = [metrics("stage1-form1", seed, fd) for seed, fd in ((0, 10.0), (1, 20.0))]
    runs.append(metrics("stage1-form1", dataset="cifar10"))  # without joint training
    for variant, seed, fd, weight in (
            ("stage2-anneal", 0, 4.0, 0.03), ("stage2-anneal", 1, 12.0, 0.03), ("stage2-anneal-w0.1", 0, 7.0, 0.1),
            ("stage2-anneal-w1e-05", 0, 3.0, 1e-5), ("stage2-anneal-w0", 0, 1.0, 0.0),
            ("stage2-kendall", 0, 8.0, 0.01), ("stage2-kendall", 1, 20.0, 0.02), ("stage2-sum", 0, 1.0, 0.03),
            ("stage2-anneal-w0.1-grad-none", 0, 1.0, 0.1), ("stage2-anneal-vae_clip=0", 0, 1.0, 0.03)):
        changed = {"train": {"vae_clip": 0}} if "=" in variant else {}
        runs.append(metrics(variant, seed, fd, **changed))
        runs[-1]["tables"]["training"] = {"weight": weight}
    for found in runs:  # before refinement, the ratio to form1 is the square of that after it
        fd = found["rows"][0]["fd_local"]["value"]
        found["tables"]["before_refinement"] = {"fd_local": score(fd**2)}
    axis, other = final.chart_weights(load(tmp_path, *runs)).axes
    lines = lines_of(axis)
    sd = pytest.approx
    assert lines == {
        "anneal, refined": ([1e-5, 0.03, 0.1], sd([0.3, 0.5, 0.7]), [None, sd(0.1 * 2**0.5), None]),
        "kendall, refined": ([0.015], sd([0.9]), [sd(0.1 * 2**0.5)]),
        "anneal, before refinement": ([1e-5, 0.03, 0.1], sd([0.09, 0.26, 0.49]), [None, sd(0.1 * 2**0.5), None]),
        "kendall, before refinement": ([0.015], sd([0.82]), [sd(0.18 * 2**0.5)])}
    assert not other.containers and axis.get_xlim() == other.get_xlim() and axis.get_xlim()[0] < 1e-5
    assert axis.get_ylim() == other.get_ylim()


def test_chart_of_thirds(tmp_path):
    """x_hat is that of `fixed`, which `film` shares. Means and sds over seeds; a single run has no bar of an sd. A data
    set without stage 3 shows nothing."""
    runs = [metrics(dataset="cifar10")]
    for variant, seed, fd in (("stage3-flow-fixed", 0, 10), ("stage3-flow-fixed", 1, 14), ("stage3-flow-film", 0, 20)):
        found = metrics(variant, seed)
        found["tables"]["adaptivity"] = {"terciles": {"images": 50, **{
            name: {"vae": {"fd_to_originals": fd + k}, "refined": {"fd_to_originals": fd + k + 5}}
            for k, name in enumerate(("sure", "middle", "unsure"))}}}
        runs.append(found)
    axis, other = final.chart_thirds(load(tmp_path, *runs)).axes
    found = {}  # by label: middle, height and sd of the bars, from sure to unsure
    for bar in (box for box in axis.containers if hasattr(box, "patches")):
        patch, = bar.patches
        segment = bar.errorbar.lines[2][0].get_segments()[0]
        sd = (segment[1][1] - segment[0][1]) / 2 if len(segment) else None
        found.setdefault(bar.get_label(), []).append((patch.get_x() + patch.get_width() / 2, patch.get_height(), sd))
    near, of_two = pytest.approx, pytest.approx(8**0.5)  # the sd of 10 and 14
    assert found == {
        "x_hat": [(near(k - 0.34), 12 + k, of_two) for k in range(3)],
        "refined by fixed": [(near(k - 0.17), 17 + k, of_two) for k in range(3)],
        "refined by film": [(near(k + 0.17), 25 + k, None) for k in range(3)]}
    assert not other.containers


def test_chart_of_steps(tmp_path):
    """The change in percent of steps by s against even steps, paired by seed: mean and sd over seeds. A single run has
    no bar of an sd. What is not measured has no bar. All data sets have the same scale."""
    runs = []
    for dataset, seed, prior, fds in (("shapes", 0, "flow", (10, 9, 11)), ("shapes", 1, "flow", (20, 19, 21)),
                                      ("cifar10", 0, "gmm", (10, 8, 9))):
        found = metrics("stage3-flow-fixed", seed, dataset=dataset)
        found["tables"]["adaptivity"] = {"adaptive_refinement": {prior: {
            name: {"fd_local": score(fd)} for name, fd in
            zip(("even", "adaptive_steps", "shuffled_steps"), fds, strict=True)}}}
        runs.append(found)
    axes = final.chart_steps(load(tmp_path, *runs, metrics("stage3-flow-film"))).axes
    bars, single_bars = ([box for box in axis.containers if hasattr(box, "patches")] for axis in axes)
    assert [bar.get_label() for bar in bars] == ["steps by s", "steps by other s"]
    assert [bar.patches[0].get_x() for bar in bars] == pytest.approx([-0.4, 0.0])  # of the flow
    assert [bar.patches[0].get_height() for bar in bars] == pytest.approx([-7.5, 7.5])
    spread = [bar.errorbar.lines[2][0].get_segments()[0] for bar in bars]
    assert [(top - low) / 2 for (_, low), (_, top) in spread] == pytest.approx([2.5 * 2**0.5] * 2)
    assert [bar.patches[0].get_x() for bar in single_bars] == pytest.approx([0.6, 1.0])  # of the mixture
    assert [bar.patches[0].get_height() for bar in single_bars] == pytest.approx([-20, -10])
    assert [len(bar.errorbar.lines[2][0].get_segments()[0]) for bar in single_bars] == [0] * 2
    assert axes[0].get_ylim() == axes[1].get_ylim() and axes[0].get_ylim()[0] < -20 and axes[0].get_ylim()[1] > 7.5


def test_chart_of_priors(tmp_path):
    """A marker for each run of stage 3's VAE that has both numbers."""
    runs = []
    for variant, seed, fd in (("stage3-vae-flow", 0, 10), ("stage3-vae-flow", 1, 11), ("stage1-vae", 0, 9)):
        found = metrics(variant, seed)
        found["rows"] = [row(prior, "none", 0, 100, fd + k) for k, prior in enumerate(("flow", "gmm", "gaussian"))]
        found["tables"]["prior_log_density"] = {prior: score(-fd - 20 * k) for k, prior in
                                                enumerate(("flow", "gmm", "gaussian"))}
        runs.append(found)
    del runs[1]["tables"]["prior_log_density"]["gmm"]
    axis, = final.chart_priors(load(tmp_path, *runs)).axes
    points = {line.get_label(): sorted(zip(*line.get_data(), strict=True)) for line in axis.lines
              if not line.get_label().startswith("_")}
    assert points == {"flow": [(-11, 11), (-10, 10)], "mixture": [(-30, 11)], "N(0, I)": [(-51, 13), (-50, 12)]}
    joined = [sorted(zip(*line.get_data(), strict=True)) for line in axis.lines if line.get_label() not in points]
    assert joined == [[(-30, 11), (-10, 10)]]  # mixture and flow of seed 0


def test_chart_of_the_recipe(tmp_path):
    """Bars of seed 0, of form1 with changed settings below the unchanged one. Dots on its bar are its runs of all
    seeds. Other variants, guided ones too, are not shown, nor is a run with two changes, whose name would be too long.
    The unchanged form1 may lack seed 0."""
    changed = [metrics("stage1-form1-beta=0.5-start=300", train={"beta": 0.5, "start": 300})]
    for variant, beta, seed in (("stage1-form1", 0.5, 0), ("stage1-form1", 0.5, 1), ("stage1-form1", 0.125, 1),
                                ("stage1-guided", 0.25, 0), ("stage2-anneal", 0.25, 0)):
        changed.append(metrics(f"{variant}-beta={beta}", seed, beta * 10, train={"beta": beta}))
    others = [metrics("stage1-vae"), metrics("stage1-form1", dataset="cifar10")]
    two = metrics(), metrics(seed=1, distance=13.0)
    for home, unchanged, distances in (("both", two, [10, 13]), ("second", two[1:], [13])):
        fd, hf_energy = final.chart_recipe(load(tmp_path / home, *unchanged, *changed, *others)).axes
        for axis, shift in ((fd, 0), (hf_energy, SCORES.index("hf_energy"))):
            assert [label.get_text() for label in axis.get_yticklabels()] == ["form1", "form1-beta=0.5"]
            bars = {patch.get_y() + patch.get_height() / 2: patch.get_width() for patch in axis.patches}
            assert bars == {y: x + shift for y, x in ((0, 10), (1, 5)) if y or home == "both"}
            dots, = axis.lines
            assert list(dots.get_xdata()) == [x + shift for x in distances] and set(dots.get_ydata()) == {0}
    assert final.chart_recipe(load(tmp_path / "none", *two, *others)) is None
    assert final.chart_recipe(load(tmp_path / "no form1", *changed)) is None


def test_no_empty_chart_is_drawn(tmp_path):
    """There is none of a run that has nothing to show in it, and main writes no file for it."""
    bare = metrics("stage1-vae")
    bare["tables"] = {}
    everything = load(tmp_path / "results", bare)
    for name, chart in final.CHARTS.items():
        assert chart(everything) is None, name
    final.main(["--results", str(tmp_path / "results")])
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"stage1-vae-s0.json", "TABLES.md"}


# --- Collecting -------------------------------------------------------------------------------------------------------

REAL = ("reconstructions", "uncertainty", "interpolation", "copies")  # figures that show real images


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, whose texts show samples and real images of two data sets."""
    monkeypatch.setattr(final, "ROOT", tmp_path)
    shown = [f"{dataset}/stage1-form1-s0-{part}" for dataset in ("shapes", "cifar10") for part in
             ("samples", *REAL)]  # real images of cifar10 must not be copied all the same
    shown += ["figures/shapes-sheet", "figures/cifar10-sheet", "figures/cifar10-reconstructions"]
    for text, names in (("README.md", shown[:1]), ("REPORT.md", shown[1:])):
        (tmp_path / text).write_text("".join(f"![](results/{name}.png)" for name in names))
    return tmp_path


def save_run(project, variant="stage1-form1", colour="red", **facts):
    """A run's folder with metrics and pictures whose upper half has a colour. Returns it as text."""
    found = metrics(variant, **facts)
    run = project / "runs" / f"{found['run']['dataset']}-{found['run']['budget']}" / f"{variant}-s0"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps(found))
    for name in ("samples", "training", *REAL):
        image = Image.new("RGB", (30, 60), "black")
        image.paste(colour, (0, 0, 30, 30))
        image.save(run / f"{name}.png")
    return str(run)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_collect_and_runs(project, capsys):
    """--collect copies metrics and the figures that a text shows, except real images of other data sets than shapes. It
    stacks the samples of several variants (their reconstructions only for shapes, since those show real images), and
    says what it wrote and replaced. --runs writes a report."""
    final.main(["--collect", *(save_run(project, dataset=dataset) for dataset in ("shapes", "cifar10"))])
    found = {(path.parent.name, path.name.removeprefix("stage1-form1-s0")) for path in project.glob("results/*/*")}
    assert found == {("shapes", ".json"), ("shapes", "-samples.png"), *(("shapes", f"-{name}.png") for name in REAL),
                     ("cifar10", ".json"), ("cifar10", "-samples.png"), ("figures", "shapes-sheet.png"),
                     ("figures", "cifar10-sheet.png")}
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"written: {path}" for path in content(
        project / "results"))
    assert Image.open(project / "results" / "figures" / "shapes-sheet.png").size == (30, 40)  # a name, a third
    without_pictures = save_run(project, dataset="celeba64")
    for picture in project.glob("runs/celeba64-cpu/*/*.png"):
        picture.unlink()
    readme = project / "README.md"
    readme.write_text(readme.read_text("utf-8") + "![](results/figures/celeba64-sheet.png)", "utf-8")
    final.main(["--collect", without_pictures])
    assert capsys.readouterr().out == f"written: {project / 'results' / 'celeba64' / 'stage1-form1-s0.json'}\n"
    shutil.rmtree(project / "results" / "celeba64")
    shutil.rmtree(without_pictures)
    uncond = save_run(project, "stage1-uncond", "blue")
    final.main(["--collect", uncond, uncond.replace("uncond", "form1")])
    lines = capsys.readouterr().out.splitlines()
    home = project / "results"
    assert [line for line in lines if "written" in line] == [f"written: {home / 'shapes' / 'stage1-uncond-s0.json'}"]
    assert f"replaced: {home / 'shapes' / 'stage1-form1-s0.json'}" in lines and len(lines) == 8
    sheet = Image.open(home / "figures" / "shapes-sheet.png")  # 20 pixels of name above each third
    assert sheet.size == (30, 80)
    assert [sheet.getpixel((15, y)) for y in (25, 58, 65)] == [(0, 0, 255), (255, 255, 255), (255, 0, 0)]
    # From a folder that has fewer of its pictures, the sheet is not drawn again: it would lose some.
    alone = str(shutil.copytree(uncond, project / "alone" / "shapes-cpu" / "stage1-uncond-s0"))
    final.main(["--collect", alone])
    assert f"kept: {home / 'figures' / 'shapes-sheet.png'}" in capsys.readouterr().out
    assert Image.open(home / "figures" / "shapes-sheet.png").size == (30, 80)
    save_run(project, budget="smoke")  # passed over: it cannot be compared
    final.main(["--runs", str(project / "runs"), "--results", str(home)])
    report = (project / "runs" / "REPORT.md").read_text("utf-8")
    assert re.findall("## (.*)", report) == ["reproduced: shapes", "reproduced: cifar10", *ALL_TABLES]
    parts = dict(part.split("\n\n", 1) for part in report.split("## ")[1:])
    fd = "10.0 [9.00, 11.0]"
    assert f"| stage1-form1 | fd | {fd} | {fd} | reproduced (off by 0%) |" in parts["reproduced: cifar10"]
    assert capsys.readouterr().out.endswith(f"written: {project / 'runs' / 'REPORT.md'}\n")
    assert not [*(project / "runs").glob("*.png")]  # only the report is promised
    final.main(["--runs", str(project / "runs")])
    assert capsys.readouterr().out.endswith("written: nothing, the report agrees with the results\n")
    expect_error(capsys, lambda: final.main(["--results", str(project / "nothing")]), "no results there")
    expect_error(capsys, lambda: final.main(["--check", "--collect", "runs"]), "--collect", "not allowed with")
    expect_error(capsys, lambda: final.main(["--collect", "runs/a", "--runs", "runs"]), "--collect", "leave --runs out")
    expect_error(capsys, lambda: final.main(["--collect", str(project / "nowhere")]), "nowhere", "no such file",
                 "the folder of a finished run")


def test_collect_leaves_out_what_has_no_scores(project, capsys):
    """RUNS/* also holds folders of networks that are not scored, such as the bonus's autoencoder."""
    run, network = save_run(project), project / "runs" / "shapes-cpu" / "bonus-ae-s0"
    network.mkdir()
    final.main(["--collect", str(network), run])
    assert capsys.readouterr().out.startswith(f"{network}: has no metrics.json, not collected\nwritten: ")
    assert (project / "results" / "shapes" / "stage1-form1-s0.json").is_file()


def test_titles_are_as_high_as_a_grid_makes_them(tmp_path):
    """Otherwise a strip would begin in the wrong row of pixels."""
    rows = {"real": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}
    common.save_grid(tmp_path / "plain.png", rows)
    common.save_grid(tmp_path / "titled.png", rows, columns=["s = 0", "s = 1"])
    plain, titled = (Image.open(tmp_path / f"{name}.png").height for name in ("plain", "titled"))
    assert titled - plain == final.TITLES["uncertainty"]


def test_strips_of_pictures(tmp_path):
    """The first picture is shown whole, with the titles of its columns; of the next one only the last row, which is
    refined images. A run that is not there is left out."""
    for variant, colour in (("fixed", "red"), ("film", "blue")):
        picture = Image.new("RGB", (40, 16 + 3 * 30), "white")
        for row, row_colour in enumerate(("black", "grey", colour)):
            picture.paste(row_colour, (0, 16 + 30 * row, 40, 16 + 30 * (row + 1)))
        (tmp_path / f"stage3-flow-{variant}-s0").mkdir()
        picture.save(tmp_path / f"stage3-flow-{variant}-s0" / "uncertainty.png")
    final.draw_sheet(tmp_path / "sheet.png", tmp_path, final.SHEETS["conditionings"])
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (40, 20 + 16 + 90 + 20 + 30)
    edges = {25: "white", 37: "black", 65: "black", 67: "grey", 97: "red", 125: "red", 147: "blue", 175: "blue"}
    assert {y: sheet.getpixel((20, y)) for y in edges} == {
        y: ImageColor.getrgb(colour) for y, colour in edges.items()}


def test_the_same_x_hat_is_shown_once(tmp_path):
    """Of 36 samples, in three pairs of rows, form1 shows the first pair and guided only the refined row of it. A model
    without x_hat has three rows, and shows the first."""
    for variant, colours in (("stage1-uncond", ("red", "white", "white")),
                             ("stage1-form1", ("grey", "green", *["white"] * 4)),
                             ("stage1-guided", ("grey", "blue", *["white"] * 4))):
        picture = Image.new("RGB", (40, 30 * len(colours)))
        for row, colour in enumerate(colours):
            picture.paste(colour, (0, 30 * row, 40, 30 * (row + 1)))
        (tmp_path / f"{variant}-s0").mkdir()
        picture.save(tmp_path / f"{variant}-s0" / "samples.png")
    final.draw_sheet(tmp_path / "sheet.png", tmp_path, final.SHEETS["sheet"])
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (40, 3 * 20 + 4 * 30)
    for colour, top in (("red", 20), ("grey", 70), ("green", 100), ("blue", 150)):
        for y in (top, top + 29):
            assert sheet.getpixel((20, y)) == ImageColor.getrgb(colour)


def test_collect_refuses_what_cannot_be_compared(project, capsys):
    """A run of the budget smoke, and one with other settings than the results that stay: of another budget, or with
    other --steps, which do not rename a run. One line names the run and why, and nothing is written, not even the runs
    that come before."""
    final.main(["--collect", save_run(project), save_run(project, "stage1-vae")])
    before = content(project / "results")
    good = save_run(project, "stage1-form2")
    smoke, gpu = (save_run(project, budget=budget) for budget in ("smoke", "gpu"))
    new_smoke, new_gpu = (save_run(project, "stage2-sum", budget=budget) for budget in ("smoke", "gpu"))
    short = save_run(project, "stage1-uncond")
    found = metrics("stage1-uncond")
    found["run"]["train"]["unet_steps"] += 1
    (project / "runs" / "shapes-cpu" / "stage1-uncond-s0" / "metrics.json").write_text(json.dumps(found))
    for run, words in ((smoke, ["has the budget smoke"]),
                       (new_smoke, ["has the budget smoke"]), (gpu, ["budget was cpu, is now gpu"]),
                       (new_gpu, ["budget was cpu, is now gpu"]), (short, ["unet_steps was"])):
        expect_error(capsys, lambda run=run: final.main(["--collect", good, run]), f"{run}/metrics.json", *words,
                     "leave it out; nothing was written")
        assert content(project / "results") == before
    final.main(["--collect", good])
    assert len(content(project / "results")) > len(before)


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
    (project / "README.md").write_text("<!-- table steps -->\n<!-- end -->\n<!-- table questions -->\n<!-- end -->")
    final.main([])
    text = "".join(path.read_text("utf-8") for path in (project / "README.md", project / "results" / "TABLES.md"))
    assert "shapes stage1-form1" in text and "photos" not in text
    assert not [*project.glob("results/figures/photos*")]
    final.main(["--runs", str(project / "runs")])
    assert "photos stage1-form1" in (project / "runs" / "REPORT.md").read_text("utf-8")


def test_the_texts_are_those_beside_the_results(tmp_path, monkeypatch, capsys):
    """With --results, the README.md and REPORT.md of this repository stay as they are. Every file that is written is
    named."""
    marked = "<!-- table questions -->\n<!-- end -->\n"
    for home in ("repository", "other"):
        (tmp_path / home).mkdir()
        (tmp_path / home / "README.md").write_text(marked)
    (tmp_path / "repository" / "REPORT.md").write_text(marked)  # the other one has none
    monkeypatch.setattr(final, "ROOT", tmp_path / "repository")
    runs = [metrics(seed=seed) for seed in (0, 1)]
    for found in runs:
        found["rows"][2] |= {"steps": 6}
    save(tmp_path / "other" / "results", *runs, metrics("stage1-vae"))
    results = tmp_path / "other" / "results"
    final.main(["--results", str(results)])
    assert {path.name: path.read_text("utf-8") for path in (tmp_path / "repository").iterdir()} == {
        "README.md": marked, "REPORT.md": marked}
    questions = final.table_claims(final.load_all(results.glob("*/*.json")), final.PRIMARY_CLAIMS, adjust=True)
    text = (tmp_path / "other" / "README.md").read_text("utf-8")
    assert text == f"<!-- table questions -->\n{questions}\n<!-- end -->\n"
    charts = [results / "figures" / f"{name}.png" for name in ("claims", "summary", "cost", "noise")]
    assert capsys.readouterr().out.splitlines()[-1] == " ".join(
        map(str, ["written:", tmp_path / "other" / "README.md", results / "TABLES.md", *charts]))
    assert all(Image.open(path).width == 1500 for path in charts)
    assert {*tmp_path.glob("other/**/*.png")} == {*charts} and not (tmp_path / "other" / "REPORT.md").exists()
    final.main(["--results", str(results)])
    assert capsys.readouterr().out.splitlines()[-1] == " ".join(map(str, ["written:", *charts]))
    monkeypatch.chdir(results)
    assert final.texts_beside(".") == [tmp_path / "other" / "README.md"]


# --- The texts -------------------------------------------------------------------------------------------------------

def test_fill(capsys):
    """A marked table is replaced, as often as one likes, and the rest stays. An unknown table is an error."""
    two = final.fill("<!-- table a -->\n1\n<!-- end -->\n2\n<!-- table b c -->\n<!-- end -->\n", {"a": "A", "b c": "B"})
    assert two == "<!-- table a -->\nA\n<!-- end -->\n2\n<!-- table b c -->\nB\n<!-- end -->\n"
    once = final.fill("a\n<!-- table t -->\nold\n<!-- end -->\nb", {"t": "| new |"})
    assert once == "a\n<!-- table t -->\n| new |\n<!-- end -->\nb" == final.fill(once, {"t": "| new |"})
    cited = "<!-- cited -->\nx\n<!-- end -->\n"
    assert final.fill(cited + once, {"t": "| new |"}) == cited + once
    for damaged in ("<!-- table t -->\nold\nprose\n" + once, "<!-- table t-->\n<!-- end -->", "<!-- table t -->\n",
                    "<!-- table t -->\nold\n" + cited, "<!-- table t --><!-- end -->"):
        expect_error(capsys, lambda damaged=damaged: final.fill(damaged, {"t": ""}), "damaged or lacks its end")
    expect_error(capsys, lambda: final.fill("<!-- table u -->\n<!-- end -->", {"t": ""}),
                 "table 'u' is not known; known are t")


def typed_decimals(text):
    """Numbers with a decimal point outside marked tables, code, link targets and versions."""
    for hidden in (r"<!-- (table|cited).*?<!-- end -->", r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)",
                   r"(Python|PyTorch) \d+\.\d+"):
        text = re.sub(hidden, "", text, flags=re.DOTALL)
    return re.findall(r"\d+\.\d+", text)


def test_the_texts_agree_with_the_results():
    """They are read as they are written: in UTF-8, on every system. Python warns where a file is read in whatever
    encoding the system prefers."""
    run = subprocess.run([sys.executable, "-X", "warn_default_encoding", "final_evaluation.py", "--check"],
                         cwd=final.ROOT, capture_output=True, text=True)
    own = [line for line in run.stderr.splitlines() if re.search(r"/(final_evaluation|fid|common)\.py:", line)]
    assert run.returncode == 0, run.stdout
    assert not own


@pytest.mark.parametrize("name", ["README.md", "REPORT.md", "results/TABLES.md"])
def test_an_edited_cell_is_noticed(name, tmp_path, monkeypatch):
    """A cell of one table in each of the texts is edited. --check says so and leaves it as it is."""
    for text in ("README.md", "REPORT.md"):
        shutil.copy(final.ROOT / text, tmp_path / text)
    shutil.copytree(final.ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.pt"))
    edited, count = re.subn(r"\| \d\.\d+ ± ", "| 5.679 ± ", (tmp_path / name).read_text("utf-8"), count=1)
    (tmp_path / name).write_text(edited, "utf-8")
    monkeypatch.setattr(final, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        final.main(["--check"])
    assert count == 1 and stop.value.code == 1 and (tmp_path / name).read_text("utf-8") == edited


def test_no_decimal_is_typed():
    """A decimal in prose would be a number that no command wrote. One that is planted there is found."""
    assert typed_decimals(README) == [] == typed_decimals(REPORT)
    assert typed_decimals(README.replace("\n## Map", "\nA third, 0.34, of them.\n\n## Map")) == ["0.34"]
    assert typed_decimals("`torch>=2.6` [a](b-0.1.png) <!-- table t -->\n| 1.5 |\n<!-- end -->") == []


def test_the_settings_stand_where_tables_say():
    """In the table of the data, which REPORT.md and TABLES.md show."""
    assert "table **data**" in final.SETTINGS and "<!-- table data -->" in REPORT
    assert "\n## data\n" in (final.ROOT / "results" / "TABLES.md").read_text("utf-8")


def test_comparisons_with_the_repeated_baseline(committed):
    """What REPORT.md says of guidance and of training with noise on CIFAR-10 and faces, against the repetitions of
    form1 that they build on (seed 0: the committed run). No table shows these numbers."""
    def compared(name, variant):
        return final.compare_sides(results, (name, variant), (name, "repeated"))

    all_results = dict(committed)
    all_repeated = final.load_all(final.ROOT.glob("results/repeated/*/*.json"))
    text = " ".join(REPORT.split())
    for dataset, guidance, words, p, noise_fd, fd_without in (
            ("celeba64", "by {:.0%} on average", "On faces, fd is lower by", "3%", "+0.3%", "-17%"),
            ("cifar10", "It lowers fd by {:.0%} on CIFAR-10.", "on CIFAR-10 by", "`0.1%`", "-19%", "-14%")):
        repeated = {0: committed[dataset]["stage1-form1"][0], **all_repeated[dataset]["stage1-form1"]}
        results = all_results[dataset] = committed[dataset] | {"repeated": repeated}
        guided = compared("fd", "stage1-guided")
        lower = [f"{1 - ours / theirs:.0%}" for ours, theirs in zip(guided["ours"], guided["theirs"], strict=True)]
        significant = "barely significant" if p == "3%" else "significant"
        assert words + " {}, {} and {} ({}, p is {})".format(*lower, significant, p) in text
        assert guidance.format(-math.expm1(guided["log_ratio"])) in text
        assert round(guided["p"], 3 if "." in p else 2) == float(p.strip("`%")) / 100
        assert final.percent(compared("noise fd", "stage1-guided")["log_ratio"]) == noise_fd
        assert final.percent(compared("fd, no noise", "stage1-guided")["log_ratio"]) == fd_without
    results = all_results["cifar10"]
    noise_fd, free = compared("noise fd", "stage1-augmented"), compared("noise fd", "stage2-anneal-grad-none")
    assert (f"**Noise fd on CIFAR-10** is {-math.expm1(noise_fd['log_ratio']):.0%} lower for `augmented` "
            f"(significant), and {-math.expm1(free['log_ratio']):.0%} lower for `grad-none` (not significant)") in text
    assert noise_fd["p"] < 0.05 < free["p"]

    results = all_results["celeba64"]
    flow = final.compare_sides(results, ("fd, flow", "stage3-flow-fixed"), ("fd, N(0, I)", "repeated"))
    assert (f"**The flow on faces** has, after refinement, a {-math.expm1(flow['log_ratio']):.0%} lower fd than N(0, "
            "I) (not significant)" in text) and flow["p"] > 0.05
    compared_with_noise = ("stage1-augmented", "stage2-anneal-grad-none", "stage2-anneal-w0.003")
    noise_fd = [compared("noise fd", variant) for variant in compared_with_noise]
    fd = [compared("fd", variant) for variant in compared_with_noise]
    lower = [f"{-math.expm1(change['log_ratio']):.0%}" for change in noise_fd]
    assert ("**Noise fd on faces** is {} lower for `augmented`, {} lower for `grad-none` and {} lower for `w0.003` "
            "(all significant)".format(*lower)) in text and max(change["p"] for change in noise_fd) < 0.05
    higher = [f"{math.expm1(change['log_ratio']):.0%}" for change in fd]
    assert ("**fd without noise on faces** is {} higher for `augmented`, {} higher for `grad-none` and {} higher for "
            "`w0.003` (all not significant)".format(*higher)) in text and min(change["p"] for change in fd) > 0.05
    lower = []
    for name in ("cifar10", "celeba64"):
        change = final.compare_sides(all_results[name], ("fd, 10 steps", "stage1-guided"), ("fd, 25 steps", "repeated"))
        assert change["p"] < 0.05
        lower.append(f"{-math.expm1(change['log_ratio']):.0%}")
    assert ("Ten guided steps take less time than 25 steps of that `form1`. Yet their fd is {} lower on CIFAR-10 and "
            "{} lower on faces".format(*lower)) in text


def test_twice_the_steps(committed):
    """What the texts say of joint training with twice the steps on shapes, against stage 1 with twice as many, and
    against its training with noise."""
    shapes = committed["shapes"]
    joint, stage1, noisy = (f"{name}{final.TWICE}" for name in ("stage2-anneal", "stage1-form1", "stage1-augmented"))
    change, rivals, gain = (final.compare_sides(shapes, ("fd", ours), ("fd", theirs))
                            for ours, theirs in ((joint, stage1), (joint, noisy), (noisy, stage1)))
    assert change["seeds"] == rivals["seeds"] == gain["seeds"] == 5
    assert max(change["p"], rivals["p"], gain["p"]) < 0.05
    ours, theirs, of_noisy = (f"{statistics.mean(values):.2f}" for values in (
        change["ours"], change["theirs"], rivals["theirs"]))
    lower, below, less = (f"{-math.expm1(pair['log_ratio']):.0%}" for pair in (change, rivals, gain))
    before = f"{statistics.mean(final.values_by_seed(shapes[stage1], 'fd before').values()):.2f}"
    report, readme = " ".join(REPORT.split()), " ".join(README.split())
    assert (f"stage 1 is `{theirs}`, that of `augmented` `{of_noisy}` ({less} lower) and that of joint training "
            f"`{ours}`. This is {lower} below stage 1, and {below} below `augmented`") in report
    assert f"(`{before}` before refinement)" in report
    assert f"the fd of joint training is {lower} lower on shapes (five runs)" in report
    assert f"the fd of joint training is {lower} lower on shapes (five runs)" in readme


def test_the_gradient_with_twice_the_steps(committed):
    """The three numbers of the control, and that neither of its differences is significant."""
    shapes = committed["shapes"]
    control = ("fd", f"stage2-anneal-grad-none{final.TWICE}")
    joint, stage1 = (final.compare_sides(shapes, control, ("fd", f"{name}{final.TWICE}"))
                     for name in ("stage2-anneal", "stage1-form1"))
    text = " ".join(REPORT.split())
    assert "`{:.2f}`, `{:.2f}` and `{:.2f}`†, where joint training has".format(*joint["ours"]) in text
    assert "joint training has `{:.2f}`, `{:.2f}` and `{:.2f}`, and stage 1".format(*joint["theirs"]) in text
    assert "stage 1 `{:.2f}`, `{:.2f}` and `{:.2f}`.".format(*stage1["theirs"]) in text
    assert (f"is {math.expm1(joint['log_ratio']):.0%} above joint training and {-math.expm1(stage1['log_ratio']):.0%} "
            "below stage 1 (both not significant)") in text
    assert f"`grad-none` has a {math.expm1(joint['log_ratio']):.0%} higher fd (three runs, not significant†)" in text
    assert min(joint["p"], stage1["p"]) > 0.05 and joint["seeds"] == stage1["seeds"] == 3


def test_a_vae_alone_of_equal_minutes(committed):
    """On shapes it is better than VAE and refiner. Both texts say so. On photographs it is worse."""
    shapes = committed["shapes"]
    change = final.compare_sides(shapes, ("fd", "stage1-vae-vae_steps=1650"), ("fd", "stage1-form1"))
    lower = f"{-math.expm1(change['log_ratio']):.0%} lower"
    assert change["p"] < 0.05 and change["seeds"] == 5
    # Other runs of such a VAE say the same, and its images get worse if they are refined.
    again = ("fd before", "stage1-form1-vae_steps=1650")
    below = final.compare_sides(shapes, again, ("fd", "stage1-form1"))
    refined = final.compare_sides(shapes, ("fd", "stage1-form1-vae_steps=1650"), again)
    assert max(below["p"], refined["p"]) < 0.05 and min(below["seeds"], refined["seeds"]) == 5
    assert (f"is `{statistics.mean(below['ours']):.2f}` before refinement (also {-math.expm1(below['log_ratio']):.0%} "
            f"below that of the pair†), and refinement raises it to `{statistics.mean(refined['ours']):.2f}` "
            "(significant)") in " ".join(REPORT.split())
    assert f"has a {lower} fd than the pair" in " ".join(REPORT.split())
    words = f"But on shapes, the VAE alone, if trained for as long as both, has a {lower} fd than the pair."
    assert words in " ".join(README.split())
    cifar10 = final.compare_sides(committed["cifar10"], ("fd", "stage1-vae-vae_steps=12000"), ("fd", "stage1-form1"))
    above = f"its fd is {math.expm1(cifar10['log_ratio']):.0%} above that of the pair (one run)"
    assert above in " ".join(REPORT.split())
    faces = final.compare_sides(committed["celeba64"], ("fd before", "stage1-form1-vae_steps=4600-unet_steps=4600"),
                                ("fd", "stage1-form1"))
    assert cifar10["seeds"] == 1 and faces["seeds"] == 2 and 3 < math.exp(faces["log_ratio"]) < 3.5
    # With twice the time
    alone, joint = "stage1-vae-vae_steps=3300", ("fd", f"stage2-anneal{final.TWICE}")
    pair = final.compare_sides(shapes, ("fd", alone), ("fd", f"stage1-form1{final.TWICE}"))
    former, latter = (final.compare_sides(shapes, joint, ("fd", name)) for name in (alone, "stage1-vae-vae_steps=1650"))
    assert max(pair["p"], former["p"], latter["p"]) < 0.05 and (former["seeds"], latter["seeds"]) == (3, 5)
    below = [f"{-math.expm1(change['log_ratio']):.0%}" for change in (former, latter)]
    again = final.compare_sides(shapes, ("fd", alone), ("fd", "stage1-vae-vae_steps=1650"))
    means = [f"{statistics.mean(again[side]):.2f}" for side in ("theirs", "ours")]
    report = " ".join(REPORT.split())
    words = "its fd is `{}` after 1,650 steps, and `{}` after 3,300, which take as long as these pairs (not"
    assert words.format(*means) in report and again["p"] > 0.05
    words = "by {} with equal training†, and by {} if the VAE stops at 1,650 steps†"
    assert words.format(*below) in report
    less = f"{1 - math.exp(-pair['log_ratio']):.0%}"
    assert f"with twice the steps is {less} lower† than that of the VAE with 3,300 steps, and equal to" in report
    equal = final.compare_sides(shapes, ("fd", f"stage1-form1{final.TWICE}"), ("fd", "stage1-vae-vae_steps=1650"))
    assert abs(equal["log_ratio"]) < 0.02


def test_a_diffusion_model_alone_of_equal_minutes(committed):
    """What the texts say of it in ten steps and in four, against form1; and of latent diffusion, against it."""
    def change(dataset, name, ours, theirs):
        found = final.compare_sides(committed[dataset], (name, ours), (name, theirs))
        assert found["seeds"] == seeds[dataset]
        return found

    report, readme = " ".join(REPORT.split()), " ".join(README.split())
    alone = {"shapes": "stage1-uncond-unet_steps=1600", "cifar10": "stage1-uncond-unet_steps=8000",
             "celeba64": "stage1-uncond-unet_steps=4000"}
    seeds = {"shapes": 3, "cifar10": 3, "celeba64": 1}
    ten = {dataset: change(dataset, "fd", alone[dataset], "stage1-form1") for dataset in alone}
    seeds["shapes"] = 1
    four = {dataset: change(dataset, "fd, 4 steps", alone[dataset], "stage1-form1") for dataset in alone}
    # With a mixture of 300 Gaussians, the pair is not shown to be better on shapes; with one of 6,000 it is.
    shapes, uncond = committed["shapes"], ("fd, 10 steps", alone["shapes"])
    few = final.compare_sides(shapes, ("fd, 300 components", "stage1-form1"), uncond)
    many = final.compare_sides(shapes, ("fd, 6000 components", "stage1-form1"), uncond)
    assert few["p"] > 0.05 > many["p"] and few["seeds"] == many["seeds"] == 3
    in_ten, in_four = {}, {}
    for dataset in alone:
        in_ten[dataset] = math.exp(ten[dataset]["log_ratio"])
        in_four[dataset] = math.exp(four[dataset]["log_ratio"])
    assert max(ten["shapes"]["p"], ten["cifar10"]["p"], four["cifar10"]["p"]) < 0.05 and 4.5 < in_ten["shapes"] < 5.5
    on_cifar10, then = f"only {in_ten['cifar10'] - 1:.0%} higher", f"{in_four['cifar10'] - 1:.0%}"
    ours, theirs = (statistics.mean(final.values_by_seed(committed["celeba64"][variant], "fd").values())
                    for variant in ("stage1-uncond-unet_steps=4000", "stage1-form1"))
    on_faces = f"{in_ten['celeba64'] - 1:.0%} higher on faces"
    above_the_mean = f"{ours / theirs - 1:.0%} above the mean of the pair's runs"
    assert f"{on_cifar10} than that of the pair on CIFAR-10 (barely significant), {on_faces} (one run)" in report
    assert (f"with 4,000 steps has an fd on faces† that is {above_the_mean} (and {in_ten['celeba64'] - 1:.0%} above "
            "that of seed 0, the best of them)." in report)
    assert f"the fd of `uncond` is {then} higher on CIFAR-10, and nearly five times" in report
    assert 4.5 < in_four["celeba64"] < 5
    above = (f"{in_ten['cifar10'] - 1:.0%} higher fd than the pair (p is 4%), and a {then} higher one if both sample "
             "in four steps.")
    assert f"the diffusion model alone has a {above}" in readme
    seeds["cifar10"] = 1
    latent = {dataset: math.exp(change(dataset, "fd", "bonus-latent", alone[dataset])["log_ratio"]) - 1
              for dataset in ("cifar10", "celeba64")}
    assert f"{latent['cifar10']:.0%} higher on CIFAR-10† and equal on faces†" in report
    assert abs(latent["celeba64"]) < 0.01


def test_kid(committed):
    """What REPORT.md says of KID beside fd, and what of it is significant."""
    report = " ".join(REPORT.split())

    def compared(dataset, *sides):
        return final.compare_sides(committed[dataset], *(("kid", side) for side in sides))

    refined = [compared(dataset, "stage1-form1", "stage1-vae") for dataset in ("shapes", "cifar10", "celeba64")]
    flow = compared("shapes", "stage3-flow-fixed", "stage1-form1")
    assert all(change["p"] < 0.05 for change in (*refined, flow))
    lower = [f"{-math.expm1(change['log_ratio']):.0%}" for change in refined]
    assert "lowers it by {} on shapes, {} on CIFAR-10 and {} on faces".format(*lower) in report
    assert f"that of the flow is {math.exp(flow['log_ratio']):.0f} times as high as stage 1's on shapes" in report
    joint, twice = "stage2-anneal", final.TWICE
    for words, ours, theirs in (
            ("{} lower for `kendall` than for stage 1", "stage2-kendall", "stage1-form1"),
            ("{} lower for `anneal` than for `augmented`", joint, "stage1-augmented"),
            ("{} lower for joint training than for stage 1 (p is 6%)", f"{joint}{twice}", f"stage1-form1{twice}"),
            ("{} lower than for `augmented`. For", f"{joint}{twice}", f"stage1-augmented{twice}"),
            ("{} lower for the VAE alone with 1,650 steps than for the pair† (p is `5.0%`)",
             "stage1-vae-vae_steps=1650", "stage1-form1"),
            ("For `from-vae` it is {} higher than for stage 1", f"{joint}-from-vae", "stage1-form1")):
        change = compared("shapes", ours, theirs)
        assert words.format(f"{abs(math.expm1(change['log_ratio'])):.0%}") in report and change["p"] > 0.05, words
    assert "than for stage 1†, where fd is lower. (None of these is significant.)" in report


def test_the_best_beta_of_each(committed):
    """Joint training against stage 1, each with the best beta of its sweep."""
    shapes = final.compare_sides(committed["shapes"], ("fd", "stage2-anneal-beta=0.08"),
                                 ("fd", "stage1-form1-beta=0.02"))
    best = {}  # the lowest fd on CIFAR-10 over three values of beta
    for variant in ("stage1-form1", "stage2-anneal"):
        runs = f"{variant}-beta=0.125", variant, f"{variant}-beta=0.5"
        best[variant] = min(final.values_by_seed(committed["cifar10"][run], "fd")[0] for run in runs)
    lower = 1 - best["stage2-anneal"] / best["stage1-form1"]
    assert shapes["seeds"] == 3 and shapes["p"] > 0.05
    assert ("**The best beta of each.** With it, the fd of joint training is "
            f"{math.expm1(shapes['log_ratio']):.0%} higher on shapes (three runs, not significant) and {lower:.0%} "
            "lower on CIFAR-10† (one run).") in " ".join(REPORT.split())


def test_twice_the_steps_on_faces(committed):
    """What the texts say of the runs with twice the steps there, against those with the usual steps and equal seeds."""
    faces = committed["celeba64"]
    ending = "-vae_steps=4600-unet_steps=4600"
    change = final.compare_sides(faces, ("fd", f"stage2-anneal{ending}"), ("fd", f"stage1-form1{ending}"))
    seeds = range(change["seeds"])

    def mean(variant, name):
        values = final.values_by_seed(faces[variant], name)
        return statistics.mean(values[seed] for seed in seeds)

    report, readme = " ".join(REPORT.split()), " ".join(README.split())
    higher, runs = f"{math.expm1(change['log_ratio']):.0%} higher", {1: "one run", 2: "two runs"}[len(seeds)]
    stage1, joint = ([mean(variant + end, name) for name in ("fd", "fd before") for end in ("", ending)]
                     for variant in ("stage1-form1", "stage2-anneal"))
    assert f"its fd is `{stage1[1]:.2f}`, and that of joint training is `{joint[1]:.2f}`, {higher}." in report
    assert f"the same two seeds have an fd of `{stage1[0]:.2f}` (stage 1) and `{joint[0]:.2f}` (joint" in report
    assert (f"lower stage 1's fd from {stage1[2]:.0f} to `{stage1[3]:.1f}`†, though the images hardly look better. "
            f"The fd of joint training before refinement stays at {joint[3]:.0f}") in report
    assert f"{joint[2]:.0f}" == f"{joint[3]:.0f}"
    assert f"(five runs), and {higher} on faces ({runs})" in report
    assert f"(five runs), and {higher} on faces ({runs})" in readme


def test_sizes():
    """The README is read in three minutes, and the tables of REPORT.md have at most six numbers in a line."""
    assert README.count("\n") <= 200
    lines = [line for line in REPORT.splitlines() if line.startswith("|")]
    assert max(line.replace(r"\|", "").count("|") - 1 for line in lines) <= 7


def test_runs_have_the_settings_of_the_code():
    """The committed runs were trained and scored with what the budget `cpu` says today, apart from the settings that
    their names give. (Some runs of shapes have fewer rows in the grid.)"""
    repeated = final.ROOT.glob(f"results/repeated/{RESULTS}")
    for path in sorted([*final.ROOT.glob(f"results/{RESULTS}"), *repeated]):
        run = final.load_metrics(path)["run"]
        train, evaluation = common.budget("cpu", run["dataset"], run["train"]["image_size"])
        changed = {name for name in train if f"-{name}=" in path.name}
        assert {name: run["train"][name] for name in train if name not in changed} == {
            name: value for name, value in train.items() if name not in changed}, path.name
        if run["dataset"] == "shapes":
            assert all(row in evaluation["grid"] for row in run["eval"]["grid"])
            evaluation["grid"] = run["eval"]["grid"]
        assert evaluation.items() <= run["eval"].items(), path.name


def test_every_claim_pattern_and_column_has_numbers(committed):
    """A misspelt variant, pattern or column would show as "not measured", as no line or as an empty column."""
    for claim in ALL_CLAIMS:
        assert final.compare_sides(committed["shapes"], *claim[1:]), claim  # of shapes, all are tested
    for name, (patterns, columns) in final.TABLES.items():
        for pattern in patterns.split():
            assert len(final.table_of(committed, pattern, columns).splitlines()) > 4, pattern
        rows = [line.split("|")[2:-1] for line in final.table_of(committed, patterns, columns).splitlines()[2:-2]]
        empty = [column for k, column in enumerate(columns.split("; ")) if not any(cells[k].strip() for cells in rows)]
        assert not empty, name


def test_charts_of_the_results(committed):
    """Each of them shows something of every data set, and no two of its lines look the same."""
    for name, chart in final.CHARTS.items():
        for axis in chart(committed).axes:
            drawn = {"claims": axis.lines, "priors": axis.lines, "summary": axis.texts}
            assert drawn.get(name, axis.containers), name  # the other charts draw bars
            if name == "claims":  # one axis for all data sets, whose lines have their colours
                colours = {line.get_color() for line in axis.lines if len(line.get_xdata())}
                assert {colour for colour, _ in final.DATASET_LOOKS.values()} <= colours
            lines = [line.lines[0] for line in axis.containers if hasattr(line, "lines") and line.lines[0]]
            assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines), name
    colours = [colour for colour, _ in final.LOOKS.values()]
    assert len({*colours}) == len(colours)


def test_codes_of_a_gaussian_in_stage_1(committed):
    """The fd of what the VAE of stage 1 draws from codes of N(0, I), and the number of faces behind a picture."""
    report, fd = " ".join(REPORT.split()), []
    for dataset in ("shapes", "cifar10", "celeba64"):
        fd.append(statistics.mean(final.values_by_seed(committed[dataset]["stage1-vae"], "fd, N(0, I)").values()))
    assert "their fd is {:.0f} on shapes, {:.0f} on CIFAR-10 and {:.0f} on faces.".format(*fd) in report
    faces = final.load_all(final.ROOT.glob("results/repeated/celeba64/*.json"))["celeba64"]["stage3-flow-film"][0]
    images = faces["tables"]["adaptivity"]["adaptive_refinement"]["flow"]["images"]
    assert f"in the order of `s` among {images:,} faces" in report


def test_signs_of_an_overfitted_mixture(committed):
    """In how many runs of form1 on shapes 3,000 Gaussians give held-out codes a higher density than 6,000 do, and in
    how many the 6,000 have the lower fd."""
    higher_density, lower_fd = 0, 0
    for run in committed["shapes"]["stage1-form1"].values():
        few, many = (run["tables"]["components"][count] for count in ("3000", "6000"))
        higher_density += few["log_density"]["value"] > many["log_density"]["value"]
        lower_fd += many["fd"]["value"] < few["fd"]["value"]
    assert (higher_density, lower_fd, len(committed["shapes"]["stage1-form1"])) == (5, 4, 5)
    assert ("3,000 Gaussians give held-out codes a higher density than 6,000 do in all five runs. Yet 6,000 have the "
            "lower fd in four of them." in " ".join(REPORT.split()))


def test_what_s_knows_and_what_it_costs(committed):
    """The rank correlations of s and of the mean variance alone with the VAE's error, and the time that s takes."""
    report = " ".join(REPORT.split())

    def ranks(name):
        means = [statistics.mean(final.values_by_seed(committed[dataset]["stage3-flow-fixed"], name).values())
                 for dataset in ("shapes", "cifar10", "celeba64")]
        return "`{:.2f}`, `{:.2f}` and `{:.2f}`".format(*means)

    assert f"The rank correlation of `s` with the error is {ranks('rank, regressed')}." in report
    assert f"(The mean of the variances alone has {ranks('rank, variance')}." in report
    longer = []
    for variant in ("film", "fade-posterior", "fade", "coupling"):
        sides = [(f"seconds {name} s", f"stage3-flow-{variant}") for name in ("with", "without")]
        change = final.compare_sides(committed["shapes"], *sides)
        assert change["p"] < 0.05
        longer.append(math.expm1(change["log_ratio"]))
    assert ("On shapes, refinement takes {:.0%} longer with `film`, {:.0%} with `fade-posterior`, {:.0%} with `fade` "
            "and {:.0%} with `coupling`.".format(*longer)) in report


def test_the_variational_bound(committed):
    """Of runs with seed 0, which share the error of the estimate. `bound` has the best one on faces, and on shapes only
    its variant without the gradient is better. Both have the worst refined images."""
    report = " ".join(REPORT.split())
    bits, fd = {}, {}
    for dataset in ("shapes", "celeba64"):
        runs = {variant: seeds[0] for variant, seeds in committed[dataset].items() if 0 in seeds}
        bits[dataset] = {variant: run["tables"]["bits_per_dim"]["bound"]["value"] for variant, run in runs.items()
                         if "bits_per_dim" in run["tables"]}
        fd[dataset] = {variant: final.number(run, "headline/fd")["value"] for variant, run in runs.items()}
        plain = [variant for variant in bits[dataset] if "=" not in variant and variant != "stage1-uncond"]
        assert max(plain, key=fd[dataset].get) == "stage2-bound"
    without, with_it, *others = sorted(bits["shapes"], key=bits["shapes"].get)
    assert (without, with_it) == ("stage2-bound-grad-none", "stage2-bound")
    assert (f"It has `{bits['shapes'][with_it]:.2f}` bits per pixel value (lower is better), where all other runs but "
            f"`bound-grad-none` have `{bits['shapes'][others[0]]:.2f}` or more.") in report
    assert (f"Its fd is {fd['shapes'][without]:.0f}, and the bound is no worse (`{bits['shapes'][without]:.2f}`)"
            in report)
    faces = bits["celeba64"]
    assert min(faces, key=faces.get) == "stage2-bound"
    kl = [committed["celeba64"][variant][0]["tables"]["reconstruction"]["kl_nats"]
          for variant in ("stage2-bound", "stage1-form1")]
    assert "it holds {:.0f} nats, with stage 1† {:.0f}.".format(*kl) in report
    assert f"`{faces['stage2-bound']:.2f}` bits (stage 1†: `{faces['stage1-form1']:.2f}`)." in report
    assert (f"its fd is {fd['celeba64']['stage2-bound']:.0f} (stage 1†: `{fd['celeba64']['stage1-form1']:.1f}`)."
            in report)


def test_pictures():
    """Every picture that a text shows is there, and every picture that is there is shown. Together they have at most
    8 MB, and none shows real images, except of shapes."""
    tables = (final.ROOT / "results" / "TABLES.md").read_text("utf-8").replace("](figures/", "](results/figures/")
    shown = {*PICTURE.findall(README), *PICTURE.findall(REPORT), *PICTURE.findall(tables)}
    committed = {path.relative_to(final.ROOT).as_posix() for path in final.ROOT.glob("results/**/*.png")}
    assert shown == committed
    assert all(f"-{name}.png" in README + REPORT for name in final.SHEETS)
    assert sum((final.ROOT / path).stat().st_size for path in committed) < 8e6
    real = re.compile(rf"results/(?!shapes|figures/shapes).*"
                      rf"({'|'.join((*final.FIGURES_OF_REAL_IMAGES, 'conditionings'))})\.png")
    assert not any(map(real.fullmatch, committed))


def test_numbers_that_no_table_compares(committed):
    """Ratios in REPORT.md's main text: what it says, the data set, the two sides, and whether it is significant."""
    report = " ".join(REPORT.split())
    form1, joint, flow, film = "stage1-form1", "stage2-anneal", "stage3-flow-fixed", "stage3-flow-film"
    for words, dataset, ours, theirs, significant in (
            ("on CIFAR-10 diversity ({:.0%} higher)", "cifar10", ("diversity", form1), ("diversity", "stage1-vae"),
             True),
            ("**Diversity,** compared with stage 1, is {:.0%} higher on shapes", "shapes", ("diversity", joint),
             ("diversity", form1), True),
            ("and {:.0%} lower on faces (barely", "celeba64", ("diversity", joint), ("diversity", form1), True),
            ("The Inception Score rises by {:.0%} on CIFAR-10", "cifar10", ("is", form1), ("is", "stage1-vae"), True),
            ("and {:.0%} on faces, and falls by", "celeba64", ("is", form1), ("is", "stage1-vae"), True),
            ("and falls by {:.0%} on shapes.", "shapes", ("is", form1), ("is", "stage1-vae"), True),
            ("of `anneal` is {:.0%} lower than that of `augmented` (p is 2%)", "shapes", ("fd", joint),
             ("fd", "stage1-augmented"), True),
            ("the flow's fd is lower by {:.0%}, ", "shapes", ("fd", "stage3-vae-flow"),
             ("fd, N(0, I)", "stage1-vae"), True),
            ("the flow's fd is lower by 89%, {:.0%} and ", "cifar10", ("fd", "stage3-vae-flow"),
             ("fd, N(0, I)", "stage1-vae"), True),
            ("the flow's fd is lower by 89%, 6% and {:.0%}.", "celeba64", ("fd", "stage3-vae-flow"),
             ("fd, N(0, I)", "stage1-vae"), True),
            ("of `anneal` is {:.0%} higher than that of stage 1", "shapes", ("is", joint), ("is", form1), True),
            ("on shapes, and {:.0%} higher on CIFAR-10.", "cifar10", ("is", joint), ("is", form1), True),
            ("It smooths them more: fine detail is {:.0%} lower. (On CIFAR-10", "shapes", ("hf_energy", joint),
             ("hf_energy", form1), True),
            ("(On CIFAR-10 it is {:.0%} higher, and", "cifar10", ("hf_energy", joint), ("hf_energy", form1), True),
            ("higher, and on faces {:.0%}, barely significant.)", "celeba64", ("hf_energy", joint),
             ("hf_energy", form1), True),
            ("before refinement they are {:.0%} longer on shapes", "shapes", ("path length, VAE", joint),
             ("path length, VAE", form1), True),
            ("fd on CIFAR-10 rises by {:.0%} with joint training", "cifar10", ("fd, 4 steps", joint),
             ("fd, 10 steps", joint), False),
            ("and by {:.0%} with stage 1. On", "cifar10", ("fd, 4 steps", form1), ("fd, 10 steps", form1), False),
            ("it falls by {:.0%} with joint", "celeba64", ("fd, 4 steps", joint), ("fd, 10 steps", joint), False),
            ("and rises by {:.0%} with stage 1 (three runs", "celeba64", ("fd, 4 steps", form1),
             ("fd, 10 steps", form1), False),
            ("In four steps, the fd of joint training is {:.0%} higher than stage 1's", "cifar10",
             ("fd, 4 steps", joint), ("fd, 4 steps", form1), False),
            ("on CIFAR-10 and {:.0%} higher on faces (both not significant)", "celeba64", ("fd, 4 steps", joint),
             ("fd, 4 steps", form1), False),
            ("On faces it lowers fd under the strongest noise by {:.0%} (barely", "celeba64", ("fd, noise 0.4", joint),
             ("fd, noise 0.4", form1), True),
            ("Its fd is {:.0%} lower than that of `form1` on shapes", "shapes", ("fd", "stage1-form2"), ("fd", form1),
             False),
            ("with codes of the mixture:** fd falls by {:.0%}. As a control", "shapes",
             ("steps by s, mixture", flow), ("steps evenly, mixture", flow), True),
            ("lower fd: by {:.0%} on shapes", "shapes", ("fd, flow", flow), ("fd, N(0, I)", flow), True),
            ("N(0, I) on shapes (80% fewer evaluations), four", "shapes", ("fd, 2 steps", flow),
             ("fd, N(0, I)", flow), True),
            ("evaluations), four on faces (60% fewer), and", "celeba64",
             ("fd, 4 steps", flow), ("fd, N(0, I)", flow), True),
            ("and six on CIFAR-10 (40% fewer; there barely significant).", "cifar10",
             ("fd, 6 steps", flow), ("fd, N(0, I)", flow), True),
            ("{:.0%} on CIFAR-10 (barely significant) and 68%", "cifar10", ("fd, flow", flow), ("fd, N(0, I)", flow),
             True),
            ("(barely significant) and {:.0%} on faces (200", "celeba64", ("fd, flow", flow), ("fd, N(0, I)", flow),
             True),
            ("is {:.0%} lower on shapes† and", "shapes", ("is", flow), ("is", form1), True),
            ("and {:.0%} lower on CIFAR-10†.", "cifar10", ("is", flow), ("is", form1), True),
            ("reconstructions is {:.0%} higher on shapes than that of `fixed`", "shapes", ("reconstruction fd", film),
             ("reconstruction fd", flow), True)):
        change = final.compare_sides(committed[dataset], ours, theirs)
        assert words.format(abs(math.expm1(change["log_ratio"]))) in report, words
        assert significant == (change["p"] < 0.05), words
    of_seed_0, of_the_mean = [], []  # Formulation 2 against Formulation 1: its seed 0, and the mean of its runs
    for dataset in ("cifar10", "celeba64"):
        second, first = (final.values_by_seed(committed[dataset][variant], "fd") for variant in ("stage1-form2", form1))
        of_seed_0.append(f"{abs(second[0] / first[0] - 1):.0%}")
        of_the_mean.append(f"{1 - second[0] / statistics.mean(first.values()):.0%}")
    words = ("{} lower on CIFAR-10† and {} higher on faces† (one run each, against seed 0; against the mean of the "
             "runs of `form1`, it is {} and {} lower)")
    assert words.format(*of_seed_0, *of_the_mean) in report
    # Three times the training of CIFAR-10's VAE, and half its beta, with seed 0
    vae, longer = (final.number(committed["cifar10"][variant][0], "fd")["value"]
                   for variant in ("stage1-vae", "stage1-vae-vae_steps=12000"))
    assert f"three times the training steps hardly change it, and lower fd by {1 - longer / vae:.0%} only†" in report
    beta, half = (final.number(committed["cifar10"][variant][0], "fd before")["value"]
                  for variant in (form1, "stage1-form1-beta=0.125"))
    assert f"fd before refinement falls from {beta:.0f} to {half:.0f}†" in report
    learned = (statistics.mean(final.values_by_seed(results["stage2-kendall"], "weight").values())
               for results in committed.values())
    assert "a lambda of `{:.3f}` on shapes, `{:.3f}` on CIFAR-10 and `{:.3f}` on faces".format(*learned) in report
    for other in (form1, "stage2-anneal-w0.003"):
        small = final.compare_sides(committed["celeba64"], ("fd", "stage2-anneal-w0.001"), ("fd", other))
        assert small["seeds"] == 1
        assert f"its fd is {math.expm1(small['log_ratio']):.0%} above those of stage 1 and `w0.003`†" in report
        large = final.compare_sides(committed["celeba64"], ("fd", "stage2-anneal-w0.1"), ("fd", other))["log_ratio"]
        assert f"but fd is {math.expm1(large):.0%} above those of stage 1 and `w0.003`†" in report
    large = [abs(math.expm1(final.compare_sides(committed["cifar10"], (name, "stage2-anneal-w0.1"), (name, other))
                            ["log_ratio"])) for name, other in (("fd", form1), ("fd", joint), ("kl_nats", joint))]
    assert ("with `0.1` fd is {:.0%} below that of stage 1 and {:.0%} above that of `anneal`, though the KL is {:.0%} "
            "above that of `anneal`.".format(*large)) in report
    large = [math.expm1(final.compare_sides(committed["celeba64"], (name, "stage2-anneal-w0.1"), (name, joint))
                        ["log_ratio"]) for name in ("fd", "fd before")]
    assert ("and {:.0%} above that of `anneal`†. Before refinement it is {:.0%} above that of `anneal`†."
            .format(*large)) in report
    probe = final.compare_sides(committed["cifar10"], ("probe, class", joint), ("probe, class", form1))
    ours, theirs = (f"{statistics.mean(probe[side]):.0%}" for side in ("ours", "theirs"))
    assert f"finds the class of {ours} of the images (stage 1: {theirs}, p is {probe['p']:.0%})" in report
    kl = [math.exp(final.compare_sides(results, ("kl_nats", joint), ("kl_nats", form1))["log_ratio"])
          for results in committed.values()]
    assert f"With joint training the KL is `{min(kl):.1f}` to `{max(kl):.1f}` times that of stage 1." in report
    decoder = "stage2-anneal-grad-decoder"
    for words, dataset, name, other in (
            ("On shapes, its KL is {:.0%} above that of `grad-none`†,", "shapes", "kl_nats", "stage2-anneal-grad-none"),
            ("and {:.0%} below that of `anneal`†.", "shapes", "kl_nats", joint),
            ("On CIFAR-10 it is {:.0%} above† and", "cifar10", "kl_nats", "stage2-anneal-grad-none"),
            ("above† and {:.0%} below†, on faces", "cifar10", "kl_nats", joint),
            ("on faces {:.0%} above†", "celeba64", "kl_nats", "stage2-anneal-grad-none"),
            ("above† and {:.0%} below†.", "celeba64", "kl_nats", joint),
            ("differs from that of `anneal` by +{:.0%} on shapes†", "shapes", "fd", joint),
            ("on shapes†, {:.0%} on CIFAR-10†", "cifar10", "fd", joint),
            ("on CIFAR-10† and -{:.0%} on faces†.", "celeba64", "fd", joint)):
        ratio = final.compare_sides(committed[dataset], (name, decoder), (name, other))["log_ratio"]
        assert words.format(abs(math.expm1(ratio))) in report, words
    for dataset, variant, seeds in (("shapes", "film-variance", 2), ("shapes", "film-posterior", 2),
                                    ("cifar10", "film-variance", 1), ("celeba64", "film-variance", 1)):
        change = final.compare_sides(committed[dataset], ("fd", f"stage3-flow-{variant}"), ("fd", flow))
        assert abs(math.expm1(change["log_ratio"])) < 0.04 and change["seeds"] == seeds
    noisy = [math.expm1(final.compare_sides(committed["celeba64"], ("noise fd", "stage3-flow-film-variance"),
                                            ("noise fd", other))["log_ratio"]) for other in (flow, film)]
    assert (f"the noise fd of `film-variance` is {-noisy[0]:.0%} lower than that of `fixed`, and {noisy[1]:.0%} higher "
            "than that of `film` (seed 0).") in report
    changes = []
    for dataset in ("cifar10", "celeba64"):
        for name in ("fd", "fd, mixture"):
            change = final.compare_sides(committed[dataset], (name, "stage3-flow-fade"), (name, flow))
            changes.append(100 * math.expm1(change["log_ratio"]))
    assert (f"has on CIFAR-10 a {changes[0]:.0f}% higher fd with codes of the flow†, and a {-changes[1]:.0f}% lower "
            f"one with codes of the mixture†. On faces, these are {-changes[2]:.0f}% lower† and {changes[3]:.0f}% "
            "higher†.") in report
    fade = final.compare_sides(committed["shapes"], ("unsure, refined", "stage3-flow-fade"), ("unsure, refined", flow))
    assert 1.9 < math.exp(fade["log_ratio"]) < 2.1 and fade["p"] < 0.05
    assert "On shapes, `fade` has twice the fd of `fixed` for them: it" in report
    joint_0, basic = (final.number(committed["celeba64"][variant][0], "fd")["value"]
                      for variant in (joint, "stage2-sum"))
    assert (f"its one run (`{basic:.2f}`) is {basic / joint_0 - 1:.0%} above the run of `anneal` with the same seed "
            f"(`{joint_0:.2f}`)") in report
    from_noise, alone = (final.number(committed["shapes"][variant][0], "fd, 4 steps")["value"]
                         for variant in ("stage1-form1-start=1000", "stage1-uncond-unet_steps=1600"))
    assert f"has an fd of `{from_noise:.1f}`, and `uncond` with 1,600 steps one of {alone:.0f} (seed 0" in report
    priors = [final.compare_sides(results, ("fd, flow", flow), ("fd, mixture", flow)) for results in committed.values()]
    assert f"fd on shapes is `{math.exp(priors[0]['log_ratio']):.1f}` times as high with codes of the flow" in report
    assert priors[0]["p"] < 0.05 < min(priors[1]["p"], priors[2]["p"])
    for words, variant in (("compared with it†, the fd of `anneal` is {:.0%} higher", joint),
                           ("that of `kendall` {:.0%}, that of", "stage2-kendall"),
                           ("that of `w0.003` {:.0%} and that", "stage2-anneal-w0.003"),
                           ("and that of `sum` {:.0%} (all not significant)", "stage2-sum")):
        change = final.compare_sides(committed["shapes"], ("fd", variant), ("fd", "stage1-vae-vae_steps=1650"))
        assert words.format(math.expm1(change["log_ratio"])) in report and change["p"] > 0.05 and change["seeds"] >= 3
    # Codes of N(0, I) for a VAE with a beta of 1, and codes of the flow, with seed 0
    beta_1, of_flow = (final.number(committed["shapes"][variant][0], name)["value"] for variant, name in (
        ("stage1-form1-beta=1", "fd, N(0, I)"), (flow, "fd, flow")))
    assert f"With a beta of 1 in stage 1, it has `{beta_1:.1f}`, and our flow `{of_flow:.1f}`†" in report
    change = final.compare_sides(committed["shapes"], ("fd", "stage3-flow-fade"), ("fd", flow))
    assert max(a / b for a, b in zip(change["ours"], change["theirs"], strict=True)) < 1
    assert (f"lowers fd in all three runs on shapes (codes of the flow), by {-math.expm1(change['log_ratio']):.0%} on "
            f"average, but p is {change['p']:.0%}." in report) and change["seeds"] == 3
    change = final.compare_sides(committed["cifar10"], ("steps by s", flow), ("steps by other s", flow))
    assert max(a / b for a, b in zip(change["ours"], change["theirs"], strict=True)) < 1 and change["seeds"] == 3
    lower = {}  # by steps by the image's own s, and by the s of another image, against even steps
    for dataset in ("cifar10", "celeba64"):
        changes = (final.compare_sides(committed[dataset], (steps, flow), ("steps evenly", flow))
                   for steps in ("steps by s", "steps by other s"))
        lower[dataset] = [f"{-math.expm1(found['log_ratio']):.0%}" for found in changes]
    assert ("On faces, steps by the image's own `s` lower fd by {}, and steps by the `s` of *other* images by {}."
            .format(*lower["celeba64"])) in report
    own, other = lower["cifar10"]
    assert (f"On CIFAR-10, an image's own `s` lowers fd by {own}, and that of others by {other} (not significant; nor "
            "is the difference of the two)" in report)
    assert f"is better in each of three runs, but not significantly (p is {change['p']:.0%})." in report
    above = [final.compare_sides(committed[dataset], ("fd", "bonus-latent"), ("fd", form1))["log_ratio"]
             for dataset in ("cifar10", "celeba64")]
    assert "it is {:.0%} and {:.0%} above stage 1's (seed 0)".format(*map(math.expm1, above)) in report
    of_the_mean = []
    for dataset in ("cifar10", "celeba64"):
        ours, theirs = (statistics.mean(final.values_by_seed(committed[dataset][variant], "fd").values())
                        for variant in ("bonus-latent", form1))
        of_the_mean.append(ours / theirs - 1)
    words = "stage 1's runs,** fd is {:.0%} higher on CIFAR-10 and {:.0%} higher on faces (one"
    assert words.format(*of_the_mean) in report
    changes = [final.compare_sides(results, (name, "bonus-latent"), (name, form1))["log_ratio"]
               for name in ("is", "diversity") for results in committed.values()]
    minutes = [final.compare_sides(results, ("train minutes", "bonus-latent"), ("train minutes", form1))["log_ratio"]
               for results in committed.values()]
    words = "It was also trained for less time: by {:.0%}, {:.0%} and {:.0%}."
    assert words.format(*(-math.expm1(log_ratio) for log_ratio in minutes)) in report
    words = ("The Inception Score is lower by {:.0%}, {:.0%} and {:.0%}. Diversity is lower by {:.0%} and {:.0%}, on "
             "faces higher by {:.0%}.")
    assert words.format(*(abs(math.expm1(log_ratio)) for log_ratio in changes)) in report
    for words, dataset, unsure, other in (
            ("fd is {:.0%} lower than if a third is chosen by the `s` of other images (significant)", "shapes",
             "unsure third, mixture", "other third, mixture"),
            ("gives a {:.0%} lower fd than another third on CIFAR-10,", "cifar10", "unsure third", "other third"),
            ("on CIFAR-10, and an {:.0%} higher one on faces", "celeba64", "unsure third", "other third")):
        change = final.compare_sides(committed[dataset], (unsure, flow), (other, flow))
        assert words.format(abs(math.expm1(change["log_ratio"]))) in report
        assert change["seeds"] == 2 if dataset != "shapes" else change["p"] < 0.05
    p_values = []  # of how much more the fd of stage 1 rises than that of joint training, from ten steps to four
    for results in (committed["cifar10"], committed["celeba64"]):
        rises = []
        for variant in (joint, form1):
            four, ten = (final.values_by_seed(results[variant], f"fd, {steps} steps").values() for steps in (4, 10))
            rises.append([a / b for a, b in zip(four, ten, strict=True)])
        p_values.append(f"{final.compare(*rises)['p']:.0%}")
    assert "joint training and stage 1 differ (p is {} and {}; 300 images)".format(*p_values) in report


def test_training_times_of_the_rivals(committed):
    """What the appendix says of Table 2, in minutes. The runs of the rivals had other processors, so their times are
    those of the usual runs with seed 0, times the ratio of the steps."""
    def minutes(dataset, variant, times=1.0):
        return f"{times * committed[dataset][variant][0]['run']['train_minutes']:.0f}"

    report = " ".join(REPORT.split())
    pair = [minutes(dataset, "stage1-form1") for dataset in ("shapes", "cifar10", "celeba64")]
    assert "the pair {}, {} and {};".format(*pair) in report
    vae = [minutes("shapes", "stage1-vae", 1650 / 900), minutes("cifar10", "stage1-vae", 12000 / 4000)]
    uncond = [minutes("shapes", "stage1-uncond", 1600 / 600), minutes("cifar10", "stage1-uncond", 8000 / 4000),
              minutes("celeba64", "stage1-uncond", 4000 / 2300)]
    assert "the VAE alone {} and {}; `uncond` {}, {} and {}.".format(*vae, *uncond) in report


def test_latent_diffusion_at_equal_time(committed):
    """On photographs, with seed 0: ten steps of latent diffusion, between two and four steps of stage 1."""
    report = " ".join(REPORT.split())
    found = {}
    for dataset in ("cifar10", "celeba64"):
        latent, stage1 = (committed[dataset][variant][0]["steps"] for variant in ("bonus-latent", "stage1-form1"))
        rows = latent["dpm 10"], stage1["dpm 2"], stage1["dpm 4"]
        found[dataset] = [(row["ms_per_image"], row["fd"]["value"]) for row in rows]
    (time, fd), (time_of_two, fd_of_two), _ = found["cifar10"]
    assert time == pytest.approx(time_of_two, rel=0.1)
    assert f"ten latent steps (fd {fd:.0f}) take as long as two steps of stage 1 ({fd_of_two:.0f})." in report
    (time, fd), (time_of_two, fd_of_two), (time_of_four, fd_of_four) = found["celeba64"]
    assert time_of_two < time < time_of_four
    assert (f"ten latent steps (`{fd:.1f}`) take longer than two steps of stage 1 (`{fd_of_two:.1f}`) and less than "
            f"four (`{fd_of_four:.1f}`)") in report


def test_what_s_costs(committed):
    """One pass of the encoder, in operations, beside a step of the refiner; and how far the timing errs, which is seen
    from `fixed`. (The layers for s themselves have less than a thousandth of a step.)"""
    shares, of_ten = [], []
    for dataset, size in (("shapes", 32), ("cifar10", 32), ("celeba64", 64)):
        train, _ = common.budget("cpu", dataset, size)
        vae, unet = common.build_vae(train).eval(), common.build_unet(train, 6).eval()
        images = torch.zeros(2, 6, size, size)
        step = common.count_gflops(partial(unet, images, torch.full((2,), 100)))
        shares.append(common.count_gflops(partial(vae.encoder, images[:, :3])) / step)
        of_ten.append(f"{shares[-1] / 10:.0%}")
    report = " ".join(REPORT.split())
    assert "as {:.0%} of a step on shapes, {:.0%} on CIFAR-10 and {:.0%} on faces".format(*shares) in report
    assert of_ten == ["2%", "1%", "1%"] and "adds 2% to those of ten steps on shapes, and 1% on CIFAR-10 and" in report
    errors = {dataset: [] for dataset in committed}
    for dataset, results in committed.items():
        for found in results["stage3-flow-fixed"].values():
            cost = found["tables"]["adaptivity"]["cost"]
            errors[dataset].append(cost["this"]["seconds_per_image"] / cost["fixed"]["seconds_per_image"] - 1)
    real = errors["cifar10"] + errors["celeba64"]
    assert (f"by {min(errors['shapes']):.0%} to {max(errors['shapes']):+.0%} on shapes, and by {min(real):.0%} to "
            f"{max(real):+.0%} on CIFAR-10 and faces") in report


def test_memory_with_weights(committed):
    """What latent diffusion saves if the weights of all networks, in float32, are added to the peak of the profiler."""
    saved = []
    for results in committed.values():
        latent, pixel = results["bonus-latent"][0], results["stage1-form1"][0]
        savings = latent["tables"]["savings"]
        of_latent, of_pixel = (savings[kind]["peak_memory_mb"] + 4 * found["run"]["parameters"] / 2**20
                               for kind, found in (("latent", latent), ("pixel", pixel)))
        saved.append(1 - of_latent / of_pixel)
    text = f"{min(saved):.0%} to {max(saved):.0%}"
    assert f"{text} of the memory (by the PyTorch profiler, weights included)" in " ".join(REPORT.split())
    assert f"{text} less memory (weights included)" in " ".join(README.split())


def test_four_steps(committed):
    """What four steps in place of ten do to stage 1's fd, over the three seeds and the two repetitions, and to its
    time."""
    raised, saved = {}, {}
    for dataset in ("cifar10", "celeba64"):
        runs = list(committed[dataset]["stage1-form1"].values())
        for path in sorted(final.ROOT.glob(f"results/repeated/{dataset}/stage1-form1-s*.json")):
            runs += final.load_all([path])[dataset]["stage1-form1"].values()
        four = [final.number(run, "fd, 4 steps")["value"] for run in runs]
        ten = [final.number(run, "fd, 10 steps")["value"] for run in runs]
        change = final.compare(four, ten)
        assert change["seeds"] == 5 and change["p"] < 0.05
        raised[dataset] = f"{math.expm1(change['log_ratio']):.0%}"
        first = committed[dataset]["stage1-form1"][0]
        saved[dataset] = f"{1 - final.number(first, 'ms, 4 steps') / final.number(first, 'ms'):.0%}"
    text = " ".join(REPORT.split())
    assert f"save {saved['cifar10']} of the time on CIFAR-10 and {saved['celeba64']} on faces (seed 0)" in text
    assert f"raise fd by {raised['cifar10']} on CIFAR-10 and by {raised['celeba64']} on faces" in text


def test_stage_3_trained_again(committed):
    """What REPORT.md says of the runs in results/repeated: a third step for all beside steps by s, and an s that is
    computed from the noisy image."""
    repeated = final.load_all(final.ROOT.glob("results/repeated/shapes/*.json"))["shapes"]
    fixed, film = repeated["stage3-flow-fixed"].values(), repeated["stage3-flow-film"].values()
    assert len(fixed) == len(film) == 3

    def fds(steps):
        return [final.number(run, f"tables/adaptivity/adaptive_refinement/gmm/{steps}/fd")["value"] for run in fixed]

    by_s, three = final.compare(fds("adaptive_steps"), fds("even")), final.compare(fds("three"), fds("even"))
    assert max(by_s["p"], three["p"], final.compare(fds("three"), fds("adaptive_steps"))["p"]) < 0.05
    report = " ".join(REPORT.split())
    lower = [f"{-math.expm1(change['log_ratio']):.0%}" for change in (by_s, three)]
    means = [f"`{statistics.mean(fds(steps)):.2f}`" for steps in ("even", "adaptive_steps", "three", "all")]
    assert ("The fd is {0} with two steps for all, {1} with steps by `s` ({4} lower), {2} with three steps for all "
            "({5} lower) and {3} with ten for all.".format(*means, *lower)) in report
    lower = []  # of the runs on photographs, in percent: the smallest and the largest, or both if they are equal
    for dataset in ("cifar10", "celeba64"):
        runs = [run for variant, seeds in committed[dataset].items() if variant.startswith("stage3")
                for run in seeds.values()]
        for name in ("three steps", "steps by s", "steps by other s"):
            found = [1 - final.number(run, name)["value"] / final.number(run, "steps evenly")["value"]
                     for run in runs if final.number(run, "three steps")]
            least, most = f"{min(found):.0%}", f"{max(found):.0%}"
            lower.append(most if least == most else f"{least} to {most}")
    assert ("On CIFAR-10 a third step lowers fd by {}, steps by `s` by {}, and steps by the `s` of other images by {}. "
            "On faces these numbers are {}, {} and {}.".format(*lower)) in report
    faces = final.load_all(final.ROOT.glob("results/repeated/celeba64/*.json"))["celeba64"]["stage3-flow-film"][0]
    of_film = [f"{1 - final.number(faces, name)['value'] / final.number(faces, 'steps evenly')['value']:.0%}"
               for name in ("three steps", "steps by s", "steps by other s")]
    assert "(In one run of `film` on faces, trained again, they are {}, {} and {}; `results/".format(*of_film) in report
    assert (f"noise fd is `{final.number(faces, 'noise fd'):.2f}` with the usual `s`, and "
            f"`{faces['tables']['adaptivity']['noise_seen']['mean']:.2f}` with the other one." in report)
    of_variance = []
    for dataset in ("cifar10", "celeba64"):
        run = committed[dataset]["stage3-flow-film-variance"][0]
        of_variance += [final.number(run, "noise fd"), run["tables"]["adaptivity"]["noise_seen"]["mean"]]
    assert ("With `film-variance` (seed 0) it is `{:.1f}` and `{:.1f}` on CIFAR-10, and `{:.1f}` and `{:.1f}` on faces."
            .format(*of_variance)) in report
    noise = final.compare([final.number(run, "tables/adaptivity/noise_seen/mean") for run in film],
                          [final.number(run, "noise fd") for run in film])
    changed = f"{abs(math.expm1(noise['log_ratio'])):.0%}"
    assert f"changes the noise fd of `film` by {changed} only (three more runs, not significant)" in report
    assert noise["p"] > 0.05
    for run in film:  # the operations of s, which test_what_s_costs computes, as the runs counted them
        cost = run["tables"]["adaptivity"]["cost"]
        assert cost["this"]["gflops_per_image"] / cost["fixed"]["gflops_per_image"] == pytest.approx(1.021, abs=0.001)


def test_reconstructions_by_error():
    """What REPORT.md says of the thirds of held-out images by the VAE's error, from runs in results/repeated."""
    repeated = final.load_all(final.ROOT.glob("results/repeated/shapes/*.json"))["shapes"]
    report, form1, noisy, joint = " ".join(REPORT.split()), "stage1-form1", "stage1-augmented", "stage2-anneal"

    def fds(variant, third, kind="refined"):
        path = f"tables/error_thirds/{third}/{kind}/fd_to_originals"
        return [final.number(repeated[variant][seed], path) for seed in (0, 1, 2)]

    def mean(*place):
        return statistics.mean(fds(*place))

    assert fds(form1, "high", "vae") == fds(noisy, "high", "vae")  # they have the same VAE
    assert (f"an fd of `{mean(form1, 'high', 'vae'):.1f}`. The refiner of stage 1 lowers it to "
            f"`{mean(form1, 'high'):.1f}`, that of `augmented` to `{mean(noisy, 'high'):.1f}`. Joint training "
            f"lowers the fd of its own worst third from `{mean(joint, 'high', 'vae'):.1f}` to "
            f"`{mean(joint, 'high'):.1f}`.") in report
    assert (f"from `{mean(joint, 'low', 'vae'):.2f}` to `{mean(joint, 'low'):.2f}`, while that of stage 1 raises it "
            f"from `{mean(form1, 'low', 'vae'):.2f}` to `{mean(form1, 'low'):.2f}`.") in report
    assert (f"from `{mean(joint, 'middle', 'vae'):.1f}` to `{mean(joint, 'middle'):.2f}`, and in stage 1 no change is "
            f"shown (from `{mean(form1, 'middle', 'vae'):.2f}` to `{mean(form1, 'middle'):.2f}`)") in report
    for words, ours, theirs in (
            ("a {:.0%} higher fd than refined by `form1`", fds(noisy, "high"), fds(form1, "high")),
            ("with joint training a {:.0%} higher one", fds(joint, "high"), fds(form1, "high")),
            ("joint training is {:.0%} below that of stage 1", fds(joint, "low"), fds(form1, "low")),
            ("raises fd in stage 1 by {:.0%}. (All significant.)", fds(form1, "low"), fds(form1, "low", "vae")),
            ("refinement lowers fd", fds(form1, "high"), fds(form1, "high", "vae")),
            ("refinement lowers fd", fds(joint, "middle"), fds(joint, "middle", "vae"))):
        change = final.compare(ours, theirs)
        assert words.format(abs(math.expm1(change["log_ratio"]))) in report and change["p"] < 0.05, words
    assert final.compare(fds(form1, "middle"), fds(form1, "middle", "vae"))["p"] > 0.05
    for dataset, changed, seed, worst, best in (
            ("celeba64", "vae_steps=4600-unet_steps=4600", 1, "In the worst third, refinement lowers fd from {:.0f} to "
             "`{:.1f}` in stage 1, and from {:.0f} to `{:.1f}` in joint training.", "from `{:.1f}` to `{:.1f}`, and "
             "from {:.0f} to `{:.1f}`."),
            ("cifar10", "beta=0.5", 0, "in the worst third, too: refinement lowers fd from {:.0f} to {:.0f} in stage "
             "1, and from {:.0f} to {:.0f} in joint training.", "from {:.0f} to {:.0f}, and from {:.0f} to {:.0f}. ("
             "100 images")):
        runs = final.load_all(final.ROOT.glob(f"results/repeated/{dataset}/*{changed}-s{seed}.json"))[dataset]
        for third, words in (("high", worst), ("low", best)):
            thirds = [runs[f"{variant}-{changed}"][seed]["tables"]["error_thirds"][third] for variant in (form1, joint)]
            numbers = [row[kind]["fd_to_originals"] for row in thirds for kind in ("vae", "refined")]
            assert words.format(*numbers) in report, numbers


def test_the_published_settings(committed):
    """On shapes, with seed 0: all at once, with ten times the steps, and each alone."""
    def fds(changes, name="fd"):
        return final.number(committed["shapes"][f"stage1-form1{changes}"][0], name)["value"]

    published = "-start=1000-objective=eps-even_levels=False-beta=1-vae_muon_lr=0-unet_muon_lr=0"
    longer = f"{published}-vae_steps=9000-unet_steps=6000"
    minutes = committed["shapes"][f"stage1-form1{longer}"][0]["run"]["train_minutes"]
    report = " ".join(REPORT.split())
    before, after = fds(published, "fd before"), fds(published)
    assert (f"The fd is {before:.0f} before refinement and {after:.0f} after it; with ten times the training steps "
            f"({minutes:.0f} minutes), it is `{fds(longer, 'fd before'):.1f}` before and `{fds(longer):.1f}` after†."
            ) in report
    alone = [fds(changes) for changes in ("", "-beta=1", "-vae_muon_lr=0-unet_muon_lr=0", "-even_levels=False",
                                          "-start=1000", "-objective=eps")]
    assert ("raises our fd of `{:.1f}` to `{:.1f}`†, the optimiser to `{:.1f}`†, the undivided loss to `{:.1f}` and "
            "the start to `{:.1f}`. Predicting eps in place of v gives `{:.1f}`†".format(*alone)) in report
