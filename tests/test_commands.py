"""The commands of the four stages: what they write and print in a smoke run, what they reuse, what they refuse."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import expect_error, settings, small_shapes
from PIL import Image
from test_training import COMMANDS, SMOKE
from torchvision import datasets

import bonus_latent as bonus
import common
import fid
import final_evaluation as final
import stage1_baseline as stage1

FLAGS = {"stage1": ["--variant", "all"], "stage2": [], "stage3": [], "bonus": []}
BASE = {"samples", "training"}
VAE, DIFFUSION = BASE | {"robustness", "reconstructions", "priors"}, BASE | {"steps", "copies"}
REFINER = VAE | DIFFUSION | {"trajectory"}
FIGURES = {  # of each variant that a stage's smoke run evaluates
    "stage1": {"stage1-vae": VAE, "stage1-uncond": DIFFUSION, "stage1-form1": REFINER, "stage1-form2": REFINER,
               "stage1-guided": REFINER, "stage1-augmented": REFINER},
    "stage2": {"stage2-anneal": REFINER | {"interpolation", "paths"}},
    "stage3": {"stage3-vae-flow": VAE,
               "stage3-flow-film": REFINER | {"uncertainty", "generated-flow", "generated-gmm"}},
    "bonus": {"bonus-latent": (VAE | DIFFUSION) - {"priors"}}}  # it has no prior over codes
every_stage = pytest.mark.parametrize("name", COMMANDS)
SMALLEST = {"count": 16, "batch": 16, "grid_count": 16}
few_shapes, smoke_budget = functools.cache(small_shapes), common.budget


def enter(patch, home, training=None):
    """From here on, commands run in the folder `home`, on few images, draw few samples, and compare small mixtures.
    They train with `training`. Without it, training fails the test."""
    patch.chdir(home)
    patch.setattr(fid, "COMPONENTS", (2, 3))
    patch.setattr(common, "draw_shapes", few_shapes)
    patch.setattr(common, "budget", lambda *args: (smoke_budget(*args)[0], smoke_budget(*args)[1] | SMALLEST))
    patch.setattr(common, "Training", training or refuse)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """smoke(stage) runs its command once. Returns the folder, with `runs` in it, and what the command printed."""
    data = tmp_path_factory.mktemp("data")

    @functools.cache
    def run(name):
        home, printed = tmp_path_factory.mktemp(name), io.StringIO()
        (home / "data").symlink_to(data)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            enter(patch, home, common.Training)
            COMMANDS[name]([*SMOKE, *FLAGS[name]])
        return home, printed.getvalue()

    return run


def copy_of(home, tmp_path, *others):
    """Copy the runs of a smoke run, and of others, to a folder in which a test may change them. Returns the folder."""
    (tmp_path / "data").symlink_to((home / "data").resolve())
    for folder in (home, *others):
        shutil.copytree(folder / "runs", tmp_path / "runs", dirs_exist_ok=True)
    return tmp_path


def folder_of(variant, home=Path()):
    return home / "runs" / "shapes-smoke" / f"{variant}-s0"


def load(home, variant):
    """The metrics of a variant."""
    return json.loads((folder_of(variant, home) / "metrics.json").read_text())


def refuse(*args, **options):
    pytest.fail("this must not start")


def offline(*args, **options):
    raise OSError("no network")


# --- Smoke runs ------------------------------------------------------------------------------------------------------

@every_stage
def test_smoke_writes_and_prints_everything(name, smoke):
    """Each variant has its metrics and figures. One table and all paths are printed. No temporary file is left."""
    home, printed = smoke(name)
    folders = {path.name for path in (home / "runs" / "shapes-smoke").iterdir()}
    assert folders == {f"{variant}-s0" for variant in FIGURES[name]} | ({"bonus-ae-s0"} if name == "bonus" else set())
    for variant, figures in FIGURES[name].items():
        metrics, folder = load(home, variant), folder_of(variant, home)
        run, rows, tables = metrics["run"], metrics["rows"], metrics["tables"]
        assert run["variant"] == variant and run["n_real"] == 1000
        assert run["train"]["unet_steps"] == 8 and run["features"].startswith("local-shapes-")
        assert {row["n_generated"] for row in rows} == {16} and all(map(math.isfinite, tables["training"].values()))
        shown, networks = [(row["sampler"], row["steps"]) for row in rows], 2 if "guided" in variant else 1
        assert shown[0] == ("none", 0) if "vae" in variant else [shown[0], *shown[-2:]] == [
            ("dpm", 4), ("dpm", 2), ("dpm", 4)]
        assert all(row["nfe"] == networks * row["steps"] for row in rows)
        assert ("copies" in tables) == ("vae" not in variant) and ("vae" in variant or tables["copies"]["images"] == 16)
        sized = "stage3-vae" in variant or name == "stage2"
        assert ("components" in tables) == sized and (not sized or set(tables["components"]) == {"images", "2", "3"})
        assert {path.stem for path in folder.glob("*.png")} == figures
        for path in (*folder.glob("*.png"), folder / "metrics.json"):
            assert str(path.relative_to(home)) in printed
        for path in folder.glob("*.png"):
            assert min(Image.open(path).convert("L").size) > 50  # converting reads it whole
        assert variant in printed
        logged = 1 if variant == "stage1-guided" else 2  # a tenth of the steps
        assert (folder / "log.csv").read_text().count("\n") == 1 + logged and run["train_seconds"] > 0
    assert printed.count("hf_energy") == 1 == printed.count("features: local-shapes")
    assert not [path for path in home.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


@every_stage
def test_the_same_command_again(name, smoke, monkeypatch, capsys):
    """The same command measures nothing, changes no file and prints the same table. With another headline, the model is
    measured again. Other training settings are refused, with --resume, too. So is a batch that the processes cannot
    share."""
    def measured(folder, model, setup):
        raise KeyboardInterrupt(setup.evaluation)

    def refused(flags, *words):
        expect_error(capsys, lambda: COMMANDS[name]([*SMOKE, *FLAGS[name], *flags]), *words)

    home, printed = smoke(name)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    enter(monkeypatch, home)
    monkeypatch.setattr(fid, "scores", refuse)
    COMMANDS[name]([*SMOKE, *FLAGS[name]])
    again = capsys.readouterr().out
    assert again[again.index("\nvariant") :] == printed[printed.index("\nvariant") :]
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(fid, "measure_samples", measured)
    for flag, key, value in (("--sample-steps", "sample_steps", 3), ("--temperature", "temperature", 0.8),
                             ("--eval-samples", "count", 50), ("--sampler", "sampler", "ddim")):
        with pytest.raises(KeyboardInterrupt) as stop:
            COMMANDS[name]([*SMOKE, *FLAGS[name], flag, str(value)])
        assert stop.value.args[0][key] == value
    refused(["--steps", "9"], "(vae_steps was 8, is now 9)", "--out")
    refused(["--resume", "--batch-size", "2"], "batch was 32, is now 2", "--out")
    monkeypatch.setattr(common, "RANKS", 3)
    refused([], "--batch-size 32", "multiple of the 3")


def test_stopped_while_evaluating(small, monkeypatch):
    """During the evaluation, a signal ends the process as usual. The training is not lost: the same command evaluates
    again and trains nothing."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def interrupted(*args):
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fid, "measure_samples", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stage1.main([*SMOKE, "--steps", "1", "--variant", "vae"])
        monkeypatch.setattr(common, "Training", refuse)


# --- What only one stage does ----------------------------------------------------------------------------------------

def test_stage1_variants(smoke):
    """`uncond` has no prior, no tables of a VAE and no KL in its bound. The others have both priors, the mixture first.
    A VAE alone has no bound. The parameters of all networks of a variant are counted."""
    for variant in stage1.CHANNELS:
        home = smoke("stage1")[0]
        metrics, state = load(home, f"stage1-{variant}"), common.load_checkpoint(
            folder_of(f"stage1-{variant}", home) / "checkpoint.pt")
        priors, tables = [row["prior"] for row in metrics["rows"]], metrics["tables"]
        assert priors[:2] == (["none", "none"] if variant == "uncond" else ["gmm", "gaussian"])
        assert ("latent" in tables) == ("reconstruction" in tables) == (variant != "uncond")
        assert ("before_refinement" in tables) == (variant in ("form1", "form2", "guided", "augmented"))
        assert ("density_of_samples" in tables) == (variant != "uncond")
        assert variant == "uncond" or {name: set(of) for name, of in tables["density_of_samples"].items()} == {
            name: {"gaussian", "gmm"} for name in ("gaussian", "gmm")}
        before = 0.0 if variant in ("vae", "uncond") else common.load_checkpoint(
            folder_of("stage1-vae", home) / "checkpoint.pt")["seconds"]
        assert state["seconds_before"] == before
        assert variant == "guided" or metrics["run"]["train_seconds"] == state["seconds"] + before
        unets = 2 if variant == "guided" else 1  # its guide's, too
        weights = [*state.get("vae", {}).values(), *unets * list(state.get("unet", {}).values())]
        assert metrics["run"]["parameters"] == sum(value.numel() for value in weights)
        assert ("bits_per_dim" in tables) == (variant != "vae")
        if variant != "vae":
            bits, parts = tables["bits_per_dim"], {"prior", "diffusion", "data"}
            parts |= set() if variant == "uncond" else {"kl"}
            assert set(bits) == parts | {"bound", "images", "latent_prior"} and bits["images"] == 8
            assert bits["bound"]["value"] == pytest.approx(sum(bits[name] for name in parts), rel=1e-5)
            assert bits["bound"]["low"] < bits["bound"]["value"] < bits["bound"]["high"]


def test_guided_extrapolates_from_its_guide(smoke, tmp_path, monkeypatch):
    """Its prediction is that of form1, plus half of what form1 differs from the guide. Its training took as long as
    those of the VAE, of form1 and of the guide. Its run_id names both trainings: with another time of training its
    metrics are kept, with another training of either they are not."""
    enter(monkeypatch, copy_of(smoke("stage1")[0], tmp_path))
    form1, guide = states = [common.load_checkpoint(folder_of(name) / "checkpoint.pt") for name in
                             ("stage1-form1", "stage1-guided")]
    run = load(Path(), "stage1-guided")["run"]
    assert guide["train"] == form1["train"] | {"unet_steps": 1} and guide["train"]["guidance"] == 0.5
    vae = common.load_checkpoint(folder_of("stage1-vae") / "checkpoint.pt")
    assert run["train_seconds"] == pytest.approx(vae["seconds"] + form1["seconds"] + guide["seconds"])
    assert run["run_id"] == f"{form1['run_id']}+{guide['run_id']}" and form1["run_id"] != guide["run_id"]

    def measured(folder, model, setup):
        raise KeyboardInterrupt(folder, model)

    monkeypatch.setattr(fid, "measure_samples", measured)
    for name, state in zip(("form1", "guided"), states, strict=True):
        path = folder_of(f"stage1-{name}") / "checkpoint.pt"
        common.save_state(path, state | {"seconds": 1e6})
        COMMANDS["stage1"]([*SMOKE, "--variant", "guided"])
        common.save_state(path, state | {"run_id": "another"})
        with pytest.raises(KeyboardInterrupt) as stopped:
            COMMANDS["stage1"]([*SMOKE, "--variant", "guided"])
        folder, model = stopped.value.args
        assert folder.name == f"stage1-{name}-s0"
        common.save_state(path, state)
    models = [*(stage1.load_model(state, "form1", torch.device("cpu")) for state in states), model]
    (x, x_hat), t = torch.randn(2, 1, 3, 32, 32), torch.tensor([200])
    better, worse, guided = (model.denoiser_for(x_hat, None, None)(x, t) for model in models)
    assert torch.equal(guided, better + 0.5 * (better - worse)) and not torch.equal(better, worse)


def test_trajectory_has_six_columns(smoke):
    """x_hat, four steps and the image: six images of 96 pixels, two apart, beside labels of five letters."""
    with Image.open(folder_of("stage1-form1", smoke("stage1")[0]) / "trajectory.png") as picture:
        assert picture.width == 8 + 7 * len("1 x_t") + 6 * 98 and picture.height == 16 + 8 * 98


def test_stage2_with_and_without_stage1(smoke, tmp_path, monkeypatch, capsys):
    """Without results of stage 1 it says which command makes them. With them, both stages are in one table, and stage
    1's latent space is measured, too, once."""
    home, printed = smoke("stage2")
    assert "run stage1_baseline.py with the same flags" in printed
    latent = load(home, "stage2-anneal")["tables"]["latent_space"]
    assert set(latent) == {"images", "posterior", "slerp", "probe_class_accuracy", "probe_r2"}
    assert set(latent["probe_r2"]) == set(common.FACTORS) and latent["slerp"]["refined"]["path_over_distance"] >= 1
    enter(monkeypatch, copy_of(home, tmp_path, smoke("stage1")[0]))
    monkeypatch.setattr(fid, "measure_samples", refuse)
    checkpoint = folder_of("stage1-form1", tmp_path) / "checkpoint.pt"
    weights = checkpoint.read_bytes()
    checkpoint.unlink()  # its metrics alone make the table
    COMMANDS["stage2"](SMOKE)
    assert "stage1-form1" in capsys.readouterr().out
    checkpoint.write_bytes(weights)
    COMMANDS["stage2"](SMOKE)
    out, of_form1 = capsys.readouterr().out, load(tmp_path, "stage1-form1")["tables"]["latent_space"]
    assert "stage1-vae" in out and "stage1-form1" in out and "stage1_baseline.py" not in out
    assert out.count("path length over end distance") == 2
    assert set(of_form1) == set(latent) and of_form1["slerp"] != latent["slerp"]  # the networks differ
    assert load(tmp_path, "stage2-anneal")["tables"]["latent_space"] == latent  # it was not measured again
    assert {path.parent.name for path in tmp_path.rglob("interpolation.png")} == {"stage1-form1-s0", "stage2-anneal-s0"}
    monkeypatch.setattr(fid, "scores", refuse)
    COMMANDS["stage2"](SMOKE)


def test_stage3_strategies(smoke, tmp_path, monkeypatch, capsys):
    """They share a VAE. Another prior trains nothing. All priors have rows. `fixed` is not influenced by s."""
    home, printed = smoke("stage3")
    assert "uncertainty, regressed: rank correlation" in printed
    trained, training = [], common.Training
    enter(monkeypatch, copy_of(home, tmp_path), lambda folder, *a, **k: trained.append(folder.name) or
          training(folder, *a, **k))
    monkeypatch.setattr(fid, "robustness", lambda *a: {})  # as in every stage, and slow
    smoke_flags = [*SMOKE, "--temperature", "1"]
    COMMANDS["stage3"]([*smoke_flags, "--conditioning", "coupling", "--uncertainty", "posterior"])
    assert trained == ["stage3-flow-coupling-posterior-s0"]
    COMMANDS["stage3"]([*smoke_flags, "--conditioning", "fixed"])
    assert trained[1:] == ["stage3-flow-fixed-s0"]
    COMMANDS["stage3"]([*smoke_flags, "--conditioning", "fixed", "--prior", "gmm"])
    assert len(trained) == 2
    capsys.readouterr()
    flow, gmm = ["flow", "gaussian", "gmm"], ["gmm", "gaussian", "flow"]
    priors = {"stage3-vae-flow": gmm, "stage3-flow-film": flow, "stage3-flow-coupling-posterior": flow,
              "stage3-flow-fixed": gmm}
    for variant, expected in priors.items():
        metrics = load(tmp_path, variant)
        tables, rows = metrics["tables"], metrics["rows"]
        assert [row["prior"] for row in rows[:3]] == expected
        assert tables["uncertainty"]["regressed"]["conclusion"]
        assert set(tables["prior_log_density"]) == {"gaussian", "gmm", "flow"}
        if "vae" in variant:
            continue
        controls, costs = tables["adaptivity"]["controls"], tables["adaptivity"]["cost"]
        assert set(controls) == {"images", "true", "shuffled"}
        assert set(tables["adaptivity"]["terciles"]) == {"images", "sure", "middle", "unsure"}
        by_prior = tables["adaptivity"]["adaptive_refinement"]
        assert list(by_prior) == ["flow", "gmm"] and by_prior["flow"] != by_prior["gmm"]
        assert all(set(table) == {"images", "even", "adaptive_steps", "shuffled_steps", "three", "all",
                                  "unsure_third", "shuffled_third"} for table in by_prior.values())
        assert tables["bits_per_dim"]["bound"]["value"] > 0
        assert set(costs) == {"fixed", "this"} and costs["fixed"]["seconds_per_image"] > 0
        # Only `fixed` does without s, and so without another pass through the encoder.
        costs_more = costs["this"]["gflops_per_image"] > costs["fixed"]["gflops_per_image"]
        assert costs_more == ("fixed" not in variant)
        if variant == "stage3-flow-fixed":
            assert controls["shuffled"] == controls["true"]


def test_final_evaluation_finds_what_the_stages_write(smoke):
    """Every number that final_evaluation.py looks for in a table stands in the metrics of some stage."""
    paths = [path for stage in COMMANDS for path in (smoke(stage)[0] / "runs").glob("*/*/metrics.json")]
    found = [final.plain_names(json.loads(path.read_text())) for path in paths]
    places = {place for place in final.NUMBERS.values()
              if place.startswith("tables/") and "/components/" not in place}  # smoke runs compare smaller mixtures
    assert len(places) > 40
    assert {place for place in places if all(final.at_place(metrics, place) is None for metrics in found)} == set()


def test_bonus_savings(smoke):
    """Savings follow from the counted FLOPs of stage 1's refiner, of the latent U-Net and of the decoder."""
    home, printed = smoke("bonus")
    tables, folder = load(home, "bonus-latent")["tables"], folder_of("bonus-latent")
    saved, train = tables["savings"], settings(ae_width=16, latent_unet=[[1, 16, 1, 1]])

    def gflops(network, *shape):
        return common.count_gflops(lambda: network(torch.zeros(1, *shape), torch.ones(1).long()))

    pixel, latent = gflops(common.build_unet(train, 6), 6, 32, 32), gflops(bonus.build_latent_unet(train), 4, 8, 8)
    decoding = common.count_gflops(lambda: bonus.Autoencoder(16).decode(torch.zeros(1, 4, 8, 8)))
    expected = 100 * (1 - latent / pixel)
    assert saved["saved_percent"]["gflops_per_pass"] == pytest.approx(expected)
    assert f"gflops per pass {expected:.0f}%" in printed
    assert saved["latent"]["gflops_per_image"] == pytest.approx(4 * latent + decoding)
    assert all(value > 0 for name in ("pixel", "latent") for value in saved[name].values())
    assert tables["ceiling"]["psnr_db"] > 5
    assert all("conv" in (home / folder / f"profile-{name}.txt").read_text() for name in ("pixel", "latent"))


def test_own_photos_stay_with_the_user(tmp_path, monkeypatch, capsys):
    """Training features on a folder, and stage 1 on it, write to data/ and runs/, and nowhere else."""
    enter(monkeypatch, tmp_path, common.Training)
    monkeypatch.setattr(fid, "IMAGES_SEEN", {"photos": 54})  # the first training takes one step
    monkeypatch.setattr(fid, "robustness", lambda *a: {})
    (tmp_path / "photos").mkdir()
    for k, image in enumerate(few_shapes(1200, seed=1)[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{k}.png")
    photos, root = content(tmp_path / "photos"), Path(fid.__file__).parent
    before = {*root.iterdir(), *(root / "results").rglob("*")}
    fid.main(["--train-local", "photos"])
    assert "--dataset folder --data-dir photos --image-size 64" in capsys.readouterr().out
    stage1.main([*SMOKE, *"--dataset folder --data-dir photos --image-size 64 --variant vae".split()])
    metrics = json.loads(Path("runs/photos-smoke/stage1-vae-s0/metrics.json").read_text())
    (features,) = Path("data/features").glob("photos-*.pt")
    assert metrics["run"]["features"] == f"local-{features.stem}" and metrics["run"]["n_real"] == 54
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "data", "runs"}
    assert content(tmp_path / "photos") == photos
    assert {*root.iterdir(), *(root / "results").rglob("*")} == before


# --- Exported samples ------------------------------------------------------------------------------------------------

def read(folder, count):
    """The first `count` exported images: uint8 (count, 3, H, W)."""
    return torch.stack([torch.tensor(common.decode_file(folder / f"{k:05}.png", 32, "none")).permute(2, 0, 1)
                        for k in range(count)])


def content(folder):
    """{path: bytes} of the files below."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@every_stage
def test_exported_images_score_what_the_headline_says(name, smoke, tmp_path, monkeypatch, capsys):
    """`python fid.py` gives an exported folder the scores in metrics.json: the headline's, or before refinement."""
    enter(monkeypatch, copy_of(smoke(name)[0], tmp_path))
    monkeypatch.setattr(fid, "measure_samples", refuse)
    COMMANDS[name]([*SMOKE, *FLAGS[name], "--export", "16"])
    printed, places = capsys.readouterr().out, set()
    for variant in FIGURES[name].keys() - {"stage3-vae-flow"}:
        metrics, folder = load(tmp_path, variant), folder_of(variant)
        expected = {"samples": metrics["rows"][0], "samples-vae": metrics["tables"].get("before_refinement")}
        for place, row in expected.items():
            if row:
                files = [path.name for path in common.find_images(folder / place)]
                assert files == [f"{k:05}.png" for k in range(16)] and f"{folder / place}\n" in printed
                fid.main(["shapes", str(folder / place), "--json"])
                scores = json.loads(capsys.readouterr().out)["scores"]
                for score in ("fd_local", "kid_local", "precision_local", "recall_local", "diversity_local"):
                    assert scores[score]["value"] == pytest.approx(row[score]["value"], rel=1e-4, abs=1e-6)
                assert fid.hf_energy(read(folder / place, 16), common.load_images("shapes", "test").images)[
                    "value"] == pytest.approx(row["hf_energy"]["value"])
                places.add(folder / place)
    assert set(Path("runs").rglob("samples*/")) - set(Path("runs").rglob("*.png")) == places


def test_exported_images_are_the_first_generated(smoke, tmp_path):
    """To the bit. Fewer of them, or those of other settings, take the place of all that were there."""
    run = folder_of("stage1-form1", smoke("stage1")[0])
    model = stage1.load_model(common.load_checkpoint(run / "checkpoint.pt"), "form1", torch.device("cpu"))
    evaluation = json.loads((run / "metrics.json").read_text())["run"]["eval"]
    for count, changes, generated in ((30, {}, ("gmm", "dpm", 4, 0, 16)), (8, {}, ("gmm", "dpm", 4, 0, 16)),
                                      (8, {"sampler": "ddim", "batch": 8}, ("gmm", "ddim", 4, 0, 8))):
        common.export(SimpleNamespace(export=count, seed=0), tmp_path, model, evaluation | changes)
        x_hat, images, _ = common.generate(model, 30, *generated)
        for place, expected in (("samples", images), ("samples-vae", x_hat)):
            names = [f"{k:05}.png" for k in range(count)]
            assert sorted(path.name for path in (tmp_path / place).iterdir()) == names
            assert torch.equal(read(tmp_path / place, count), expected[:count])


# --- Weights that come with the project -------------------------------------------------------------------------------

@pytest.fixture
def pretrained(smoke, tmp_path, monkeypatch):
    """The two files of weights that --collect keeps of smoke runs, whose budget is renamed to cpu. From here on nothing
    may be trained, and neither images nor features loaded."""
    runs = [folder_of(variant, tmp_path) for variant in ("stage1-form1", "stage1-guided")]
    for run in runs:
        shutil.copytree(smoke("stage1")[0] / run.relative_to(tmp_path), run)
        text = (run / "metrics.json").read_text()
        (run / "metrics.json").write_text(text.replace('"budget": "smoke"', '"budget": "cpu"'))
    final.main(["--collect", *map(str, runs), "--results", str(tmp_path / "results")])
    monkeypatch.setattr(stage1, "PRETRAINED", tmp_path / "results")
    for module, name in ((common, "Training"), (common, "load_images"), (fid, "load_extractor")):
        monkeypatch.setattr(module, name, refuse)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return [common.find_hashed(tmp_path / "results" / "shapes", name)[0] for name in ("form1", "guide")]


def test_pretrained_draws_what_the_run_draws(pretrained, tmp_path, monkeypatch, capsys):
    """The images are those of the run, but for a few grey levels, since weights are stored in half precision.
    samples.png shows them, and --export writes them."""
    stage1.main(["--pretrained", "--device", "cpu"])
    home = Path("runs") / "shapes-pretrained"
    assert capsys.readouterr().out.split() == [str(home / "samples.png")]
    assert {*Path().rglob("*")} == {Path("runs"), home, home / "samples.png"}
    states = [common.load_checkpoint(folder_of(variant, tmp_path) / "checkpoint.pt")
              for variant in ("stage1-form1", "stage1-guided")]
    model = stage1.load_model(stage1.with_guide(*states), "guided", torch.device("cpu"))
    x_hat, images, _ = common.generate(model, 64, "gmm", "dpm", 10, 0, 36)
    with Image.open(home / "samples.png") as picture:
        left = picture.width - 12 * 98  # the width of the labels
        for row, expected in enumerate((x_hat, images)):  # the first of six rows shows x_hat, the second the refined
            tile = picture.crop((left + 98, row * 98, left + 98 + 96, row * 98 + 96)).resize((32, 32), 0)
            assert (torch.tensor(np.asarray(tile)).permute(2, 0, 1).int() - expected[1].int()).abs().max() <= 3
        assert picture.height == 6 * 98

    places = [home / "samples", home / "samples-vae"]
    stage1.main(["--pretrained", "--device", "cpu", "--export", "64"])
    assert capsys.readouterr().out.split() == [str(path) for path in (home / "samples.png", *places)]
    for place, expected in zip(places, (images, x_hat), strict=True):
        assert 0 < (read(place, 64).int() - expected.int()).abs().max() <= 3 and len(list(place.iterdir())) == 64
    flags = "--sampler ddim --sample-steps 3 --prior gaussian --temperature 0.5 --seed 3 --export 5"
    stage1.main(["--pretrained", "--device", "cpu", *flags.split()])
    cool = dataclasses.replace(model, temperature=0.5)
    expected = common.generate(cool, 5, "gaussian", "ddim", 3, 3, 36)[1]
    assert (read(places[0], 5).int() - expected.int()).abs().max() <= 3
    assert [len(common.find_images(place)) for place in places] == [5, 5]


def test_pretrained_in_a_process_of_its_own(tmp_path):
    """The committed weights, and nothing that the tests replace everywhere, such as the timing of bfloat16."""
    flags = ["--pretrained", "--device", "cpu", "--sample-steps", "2", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "stage1_baseline.py", *flags], cwd=final.ROOT, check=True)
    assert (tmp_path / "shapes-pretrained" / "samples.png").is_file()


def test_pretrained_refuses(pretrained, monkeypatch, capsys):
    """One line for each of: a damaged file, two files or none for the data set, another variant, budget or image size,
    flags of training and of scores, no images, several processes."""
    for flags, words in (("--dataset cifar10", ["0 files", "cifar10", "form1-*.pt"]),
                         ("--export 0", ["--export 0"]),
                         ("--dataset folder", ["0 files", "folder", "--dataset"]),
                         ("--data-dir x", ["--data-dir", "leave"]),
                         ("--variant form1", ["--variant", "guided", "leave"]),
                         ("--variant vae form1", ["--variant", "guided", "leave"]),
                         ("--image-size 64", ["--image-size", "leave"]), ("--budget gpu", ["--budget", "cpu"]),
                         ("--steps 9", ["--steps", "trains", "leave"]),
                         ("--resume", ["--resume", "trains", "leave"]),
                         ("--weights x.pt", ["--weights", "scores nothing", "leave"]),
                         ("--set guidance=1", ["--set", "trains", "leave"])):
        expect_error(capsys, lambda flags=flags: stage1.main(["--pretrained", *flags.split()]), *words)
    for path, name in zip(reversed(pretrained), ("guide", "form1"), strict=True):
        data = path.read_bytes()
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
        expect_error(capsys, lambda: stage1.main(["--pretrained"]), "--pretrained", path.name, "sha256")
        shutil.copy(path, path.with_name(f"{name}-00000000.pt"))
        expect_error(capsys, lambda: stage1.main(["--pretrained"]), name, "2 files")
        for found in common.find_hashed(path.parent, name):
            found.unlink()
        expect_error(capsys, lambda: stage1.main(["--pretrained"]), name, "0 files")
    monkeypatch.setattr(common, "RANKS", 2)
    expect_error(capsys, lambda: stage1.main(["--pretrained"]), "--pretrained", "one process", "torchrun")
    assert not any(Path().iterdir())


def test_collect_keeps_one_file_of_weights_each(pretrained, smoke, tmp_path):
    """The same run gives the same file. A file of another run takes its place. Other budgets and variants have none."""
    run = folder_of("stage1-form1", tmp_path)
    argv = ["--collect", str(run), "--results", str(tmp_path / "results")]
    final.main(argv)
    form1, guide = pretrained
    assert {*form1.parent.glob("*.pt")} == {form1, guide}
    state = common.load_checkpoint(run / "checkpoint.pt")
    state["unet"]["out.bias"] += 1
    common.save_state(run / "checkpoint.pt", state)
    final.main(argv)
    assert len([*form1.parent.glob("*.pt")]) == 2 and guide.exists() and not form1.exists()
    runs = shutil.copytree(smoke("stage1")[0] / "runs" / "shapes-smoke", tmp_path / "gpu")
    for path in runs.glob("*/metrics.json"):
        path.write_text(path.read_text().replace('"budget": "smoke"', '"budget": "gpu"'))
    final.main(["--collect", *map(str, runs.iterdir()), "--results", str(tmp_path / "none")])
    assert not [*tmp_path.glob("none/*/*.pt")] and len([*tmp_path.glob("none/*/*.json")]) == 6


@pytest.mark.parametrize("dataset,size", [("shapes", 32), ("cifar10", 32), ("celeba64", 64)])
def test_committed_weights(dataset, size):
    """Two files of at most 6 MB hold the networks that the cpu budget trains today. The guide was trained for a tenth
    of the refiner's steps, with its other settings."""
    (path,), (guide_path,) = (common.find_hashed(stage1.PRETRAINED / dataset, name) for name in ("form1", "guide"))
    state, guide = (common.load_hashed([found], "", "") for found in (path, guide_path))
    train = common.budget("cpu", dataset, size)[0]
    assert max(path.stat().st_size, guide_path.stat().st_size) <= 6e6 and set(guide) == {
        "train", "run_id", "seconds", "log", "unet"}
    assert set(state) == {"train", "run_id", "seconds", "log", "vae", "unet", "gmm"}
    keys = ("encoder", "decoder", "unet", "vae_steps", "unet_steps", "even_levels")
    assert {key: state["train"][key] for key in keys} == {key: train[key] for key in keys}
    expected = state["train"] | {"unet_steps": train["unet_steps"] // 10, "guidance": train["guidance"]}
    shared = expected.keys() & guide["train"].keys() & {*train, "seed"}
    assert all(guide["train"][key] == expected[key] for key in shared)
    state["vae"] |= {f"encoder.{name}": value for name, value in common.build_vae(train).encoder.state_dict().items()}
    stage1.load_model(stage1.with_guide(state, guide), "guided", torch.device("cpu"))


# --- Bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,flags,words", [
    *(("stage1", flags, [flags, "between"]) for flags in (
        "--steps 0", "--batch-size -1", "--batch-size 0", "--seed -1", "--sample-steps 0", "--sample-steps 1001",
        "--eval-samples 39", "--temperature -0.5", "--temperature nan", "--export 0", "--export 100001")),
    ("stage1", "--device cuda:99", ["--device cuda:99"]),
    ("stage2", "--diffusion-weight -1", ["--diffusion-weight -1"]),
    ("stage2", "--diffusion-weight 0", ["--diffusion-weight 0", "--gradient none"]),
    *((name, flags, flags.split()) for name, flags in (
        ("stage1", "--dataset imagenet"), ("stage1", "--budget huge"), ("stage1", "--image-size 48"),
        ("stage1", "--steps many"), ("stage1", "--out file/runs"), ("stage1", "--sampler euler"),
        ("stage1", "--features clip"), ("stage1", "--no-such-flag"), ("stage1", "--variant form3"),
        ("stage1", "--prior flow"), ("stage2", "--loss mean"), ("stage2", "--gradient half"),
        ("stage3", "--prior uniform"), ("stage3", "--conditioning none"), ("stage3", "--uncertainty reencoded"),
        ("bonus", "--prior gmm"))),
    ("stage1", "--dataset folder --data-dir nowhere", ["--data-dir", "nowhere", "found 0 images", "60"]),
    ("stage1", "--dataset folder --data-dir few", ["--data-dir", "few", "found 59 images", "60"]),
    ("stage1", "--dataset folder --data-dir text", ["text", "00.png"]),
    *(("stage1", f"--dataset {dataset} --data-dir nowhere", [
        f"no images of {dataset}", "nowhere", "no network", "--data-dir", "use shapes", layout])
      for dataset, layout in (
        ("cifar10", "cifar10/{train,test}/<class>/*.{png,jpg}"), ("celeba64", "celeba/img_align_celeba/*.jpg"))),
    *((name, f"--set {text}", [f"--set {text}: ", word]) for name in COMMANDS for text, word in (
        ("guidance=much", "number"), ("start=1001", "from 2 to 1,000"), ("steps=5", "no such setting"))),
    *((name, f"--set {key}=1", [f"--set {key}: nothing in this run depends on it"]) for name, key in (
        ("stage1", "flow_steps"), ("stage2", "flow_steps"), ("stage2", "guidance"), ("stage3", "guidance"))),
    *(("stage1", f"{variants}--set {text}", [f"--set {text.partition('=')[0]}: nothing in this run depends on it"])
      for variants, text in (("", "guidance=2"), ("--variant vae ", "unet_steps=7"), ("--variant vae ", "start=300"),
                             ("--variant uncond ", "beta=2"), ("--variant uncond ", "start=300"),
                             ("--variant vae uncond ", "start=300"))),
    ("stage1", "--dataset celeba64 --data-dir faces", ["img_align_celeba", "found 9 images", "60"]),
    ("stage2", "--set vae_flip=false", ["--set vae_flip: nothing in this run depends on it"]),
    ("stage2", "--loss bound --set beta=1", ["--set beta: nothing in this run depends on it"]),
    ("stage2", "--loss bound --set even_levels=false", ["--set even_levels: nothing in this run depends on it"]),
    ("stage2", "--from-vae", ["stage1-vae-s0", "holds no finished VAE"]),
    ("stage2", "--gradient none --loss kendall", ["--gradient none", "--loss"]),
    ("stage2", "--gradient none --loss sum", ["--gradient none", "--loss"]),
    ("stage2", "--gradient none --diffusion-weight 2", ["--gradient none", "--diffusion-weight"]),
    ("stage2", "--loss kendall --diffusion-weight 2", ["--diffusion-weight", "kendall"]),
    ("stage3", "--conditioning fixed --uncertainty posterior", ["--uncertainty posterior", "fixed"]),
    *((name, f"--features {kind}", ["--features local", word]) for name in COMMANDS for kind, word in (
        ("inception", "--weights"), ("inception --weights absent.pth", "absent.pth"), ("local", "--train-local"))),
])
def test_bad_input_stops_before_any_training(name, flags, words, small, monkeypatch, capsys):
    """One line names the flag (with the range of a number) or the file, and the way out. No folder is made for a run.
    Where features are missing, there is no file, no cache and no network."""
    (small / "file").write_text("")
    for folder, count in (("few", 59), ("text", 60), ("faces/celeba/img_align_celeba", 9)):
        (small / folder).mkdir(parents=True)
        for i in range(count):
            (small / folder / f"{i:02}.png").write_text("this is not an image")
    if "--features" not in flags:
        monkeypatch.setattr(fid, "load_extractor", lambda *a: SimpleNamespace(name="stub", suffix="_local"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(small / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(fid, "FEATURES_DIR", small / "features")
    monkeypatch.setattr(common, "Training", refuse)
    monkeypatch.setattr(datasets, "CIFAR10", offline)
    monkeypatch.setattr(datasets, "CelebA", offline)
    expect_error(capsys, lambda: COMMANDS[name](["--budget", "smoke", *flags.split()]), *words)
    assert not list(small.rglob("config.json"))


# --- Settings, printed -----------------------------------------------------------------------------------------------

@every_stage
def test_dry_run(name, small, monkeypatch, capsys):
    """The script, from another folder, prints one JSON object with all settings. It loads and writes nothing."""
    argv = [COMMANDS[name].__globals__["__file__"], *"--dataset celeba64 --budget cpu --dry-run --steps 5".split()]
    monkeypatch.setattr(fid, "load_extractor", refuse)
    monkeypatch.setattr(common, "load_images", refuse)
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(argv[0], run_name="__main__")
    text = capsys.readouterr().out
    printed = json.loads(text)
    assert set(printed) == {"train", "eval"}
    train, own = printed["train"], {"stage2": ("loss", "anneal"), "stage3": ("conditioning", "film")}
    assert train["vae_steps"] == train["unet_steps"] == 5 and train["image_size"] == 64
    assert own.get(name, ("seed", 0)) in train.items()
    assert name != "stage1" or subprocess.check_output([sys.executable, *argv], text=True) == text
    assert not list(small.iterdir())


@every_stage
def test_dry_run_of_changed_settings(name, small, capsys):
    """It shows them. All else is as without --set."""
    printed = []
    for changes in ([], ["--set", "unet_lr=0.5", "vae_lr=0.25", "unet_steps=300", "batch=7"]):
        COMMANDS[name]([*SMOKE, "--dry-run", *changes])
        printed.append(json.loads(capsys.readouterr().out))
    plain, changed = (found["train"] for found in printed)
    expected = {"unet_lr": 0.5, "vae_lr": 0.25, "unet_steps": 300, "batch": 7}
    assert changed == plain | expected and all(plain[key] != value for key, value in expected.items())
    assert printed[0]["eval"] == printed[1]["eval"] and not list(small.iterdir())
