"""The commands of the four stages: what they write and print in a smoke run, how they resume, what they refuse."""

import importlib.util
import itertools
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, data_of, draw_all, expect_error, same, settings
from PIL import Image
from torchvision import datasets

import bonus_latent as bonus
import common
import fid
import stage1_baseline as stage1
import stage2_joint as stage2
import stage3_adaptive as stage3

ROOT = Path(common.__file__).parent
COMMANDS = {"stage1": stage1.main, "stage2": stage2.main, "stage3": stage3.main, "bonus": bonus.main}
SMOKE = "--budget smoke --device cpu --eval-samples 40".split()
HOME = Path("runs") / "shapes-smoke"
every_stage = pytest.mark.parametrize("name", COMMANDS)


def refuse(*args, **options):
    pytest.fail("this must not start")


def offline(*args, **options):
    raise OSError("no network")


def save_images(folder, images, suffix="png"):
    """Save uint8 images (N, 3, H, W) as folder/0000.png, ..."""
    folder.mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:04}.{suffix}")


def check_pictures(folder, *names):
    """Exactly these pictures lie in a folder, and each can be read as a whole."""
    assert {path.stem for path in folder.glob("*.png")} == set(names)
    assert all(min(Image.open(path).convert("L").size) > 50 for path in folder.glob("*.png"))


# --- Smoke runs ------------------------------------------------------------------------------------------------------

BASE = {"samples"}
REFINER = BASE | {"robustness", "trajectory", "reconstructions", "interpolation"}
PICTURES = {  # of all runs that a command makes and scores
    "stage1": {"stage1-vae": BASE | {"robustness"}, "stage1-uncond": BASE, "stage1-form1": REFINER,
               "stage1-guided": REFINER},
    "stage2": {"stage2-anneal": REFINER},
    "stage3": {"stage3-vae-flow": BASE,
               "stage3-flow-film": REFINER | {"uncertainty", "generated-gmm", "generated-flow"}},
    "bonus": {"bonus-latent": BASE | {"robustness", "reconstructions"}}}


@every_stage
def test_smoke(name, small, monkeypatch, capsys):
    """Every run has its metrics and pictures, and a line in the table. The exported images score what metrics.json
    says. The same command again trains nothing."""
    command = [*SMOKE, "--export", "40", *(["--variant", "guided", "uncond"] if name == "stage1" else [])]
    COMMANDS[name](command)
    printed = capsys.readouterr().out
    assert not [path for path in small.rglob("*") if path.name.startswith(".")]  # no temporary file is left
    for variant, pictures in PICTURES[name].items():
        folder = HOME / f"{variant}-s0"
        check_pictures(folder, *pictures)
        metrics = json.loads((folder / "metrics.json").read_text())
        run, rows, tables = metrics["run"], metrics["rows"], metrics["tables"]
        assert run["variant"] == variant and run["settings"]["unet_steps"] == 8 and run["minutes"] > 0
        assert folder.name in printed and {row["n_generated"] for row in rows} == {40}
        assert all(row["nfe"] == row["steps"] * (2 if "guided" in variant else 1) for row in rows)
        priors = {"none"} if variant in ("stage1-uncond", "bonus-latent") else {"gaussian", "gmm"}
        assert {row["prior"] for row in rows} == priors | ({"flow"} if name == "stage3" else set())
        assert ("robustness" in tables) == ("robustness" in pictures)
    capsys.readouterr()
    fid.main(["shapes", str(folder / "samples")])  # of the last run
    scores = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])
    for score in ("fd_local", "floor", "precision", "recall", "diversity", "hf_energy"):
        assert float(scores[score]) == pytest.approx(rows[0][score]["value"], rel=0.01, abs=1e-6)

    def stop(folder, model, settings, scorer):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "Training", refuse)
    monkeypatch.setattr(fid, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        COMMANDS[name](command)


def test_faces(small):
    """Stage 1 on JPEG copies of 89x109."""
    images = torch.nn.functional.interpolate(draw_all(64, 1)[0].float(), (109, 89)).byte()
    save_images(small / "data" / "celeba" / "img_align_celeba", images, "jpg")
    stage1.main([*SMOKE, "--dataset", "celeba64", "--variant", "form1"])
    folder = Path("runs/celeba64-smoke/stage1-form1-s0")
    check_pictures(folder, *REFINER)
    run = json.loads((folder / "metrics.json").read_text())["run"]
    assert run["data_note"] == "JPEG copies at 89x109" and run["features"] == "local-celeba64"


def test_own_photos_stay_with_the_user(small, monkeypatch, capsys):
    """Features for a folder of photos, and a stage on it, write to data/ and runs/, and nowhere else."""
    spec = importlib.util.spec_from_file_location("train_features", ROOT / "results" / "features" / "train.py")
    features = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(features)
    monkeypatch.setattr(features, "IMAGES_SEEN", {"photos": 100})  # a few steps
    save_images(small / "photos", draw_all(70, 1)[0])
    (small / "photos" / "1970").mkdir()
    (small / "photos" / "0000.png").rename(small / "photos" / "1970" / "first.png")
    before = {path: path.stat().st_mtime_ns for path in (small / "photos").rglob("*")}
    project = {*ROOT.iterdir(), *(ROOT / "results").rglob("*")}
    features.main(["photos"])
    weights = capsys.readouterr().out.split()[-1]
    stage1.main([*SMOKE, *f"--dataset folder --data-dir photos --variant vae --weights {weights}".split()])
    run = json.loads(Path("runs/photos-folder-smoke/stage1-vae-s0/metrics.json").read_text())["run"]
    assert run["features"] == "local-photos" and run["settings"]["image_size"] == 64
    assert {path.name for path in small.iterdir()} == {"photos", "data", "runs"}
    assert {path: path.stat().st_mtime_ns for path in (small / "photos").rglob("*")} == before
    assert {*ROOT.iterdir(), *(ROOT / "results").rglob("*")} == project


# --- What is trained -------------------------------------------------------------------------------------------------

@pytest.fixture
def unscored(small, monkeypatch):
    """Commands train on 60 images, and measure nothing."""
    monkeypatch.setattr(fid, "load_scorer", lambda *args: SimpleNamespace(data=data_of(60)))
    for module, name, result in ((fid, "score", []), (fid, "robustness", {}), (fid, "latent_space", {}),
                                 (fid, "write_metrics", None), (fid, "print_results", None), (stage3, "terciles", {}),
                                 (stage3, "strategies", {}), (bonus, "ceiling", {}),
                                 (bonus, "savings", {"saved_percent": {}})):
        monkeypatch.setattr(module, name, lambda *args, result=result: result)
    return small


@pytest.mark.parametrize("name,flags", [("stage1", "--variant guided"), ("stage2", "--loss kendall"),
                                        ("stage3", "--conditioning coupling"), ("bonus", "")])
def test_a_kill_and_a_resume(name, flags, unscored, monkeypatch, capsys):
    """Every network's training is killed after its fifth step, and goes on from the fourth. In the end all checkpoints
    have the bits of a run that was never stopped. An unfinished run needs --resume."""
    def killed(training, *args):
        step(training, *args)
        if training.steps_taken == 5 and training.folder not in stopped:
            stopped.append(training.folder)
            raise KeyboardInterrupt

    command = [*SMOKE, *flags.split(), *"--set every=2 dropout=0.1 --out".split()]
    COMMANDS[name]([*command, "whole"])
    stopped, step, clock = [], common.Training.step, itertools.count(0, 100)
    monkeypatch.setattr(common, "time", SimpleNamespace(time=lambda: next(clock)))  # a minute has always passed
    monkeypatch.setattr(common.Training, "step", killed)
    number = {"stage1": 2, "stage2": 1, "stage3": 2, "bonus": 2}[name]
    for _ in range(number):
        with pytest.raises(KeyboardInterrupt):
            COMMANDS[name]([*command, "parts", "--resume"])
        assert common.load_state(stopped[-1] / "unfinished.pt")["steps"] == 4
    expect_error(capsys, lambda: COMMANDS[name]([*command, "parts"]), "unfinished", "--resume")
    COMMANDS[name]([*command, "parts", "--resume"])
    paths = sorted(Path("whole").rglob("checkpoint.pt"))
    assert len(stopped) == number <= len(paths) and not [*Path("parts").rglob("unfinished.pt")]
    for path in paths:
        whole, parts = common.load_state(path), common.load_state("parts" / path.relative_to("whole"))
        parts["settings"]["home"] = whole["settings"]["home"]
        assert same(whole, parts), path


@pytest.mark.parametrize("flags,variants", [
    ("", "vae form1"), ("--variant guided", "vae form1 guided"), ("--variant augmented form2", "vae form2 augmented"),
    ("--variant uncond", "uncond"), ("--variant all", "vae uncond form1 form2 guided augmented")])
def test_variants_and_what_they_build_on(flags, variants, unscored, monkeypatch):
    """Each refiner is trained on the checkpoint that it builds on."""
    trained = []
    monkeypatch.setattr(stage1, "evaluate", lambda *args: None)
    monkeypatch.setattr(stage1, "train_vae", lambda *args: trained.append("vae") or "vae")
    monkeypatch.setattr(stage1, "train_refiner", lambda folder, settings, variant, base, *args: (
        trained.append(variant) or (base == stage1.BASE[variant] and variant)))
    stage1.main([*SMOKE, *flags.split()])
    assert trained == variants.split()


@every_stage
def test_dry_run(name, small, monkeypatch, capsys):
    """It prints all settings with what the flags change, and names the folder by it. Nothing is loaded or written."""
    monkeypatch.setattr(fid, "load_scorer", refuse)
    path = COMMANDS[name].__globals__["__file__"]
    flags = "--dataset celeba64 --budget cpu --set vae_steps=5 beta=1 objective=eps --dry-run"
    monkeypatch.setattr(sys, "argv", [path, *flags.split()])
    runpy.run_path(path, run_name="__main__")
    printed = json.loads(capsys.readouterr().out)
    expected = common.budget_settings("cpu", "celeba64") | {
        "vae_steps": 5, "beta": 1, "objective": "eps"}
    assert {key: value for key, value in printed.items() if expected.get(key) != value}.keys() <= {
        "networks", "changes", "seed", "home", "prior"}
    assert printed["home"] == "runs/celeba64-cpu-vae_steps=5-beta=1-objective=eps"
    assert all(count > 10_000 for count in printed["networks"].values()) and not list(small.iterdir())


# --- Weights that come with the project ------------------------------------------------------------------------------

def draws(folder, x_hat, images):
    """Whether samples.png shows these images in its first two rows, but for rounding of weights to half precision."""
    with Image.open(folder / "samples.png") as picture:
        side = 3 * x_hat.shape[-1] if x_hat.shape[-1] == 32 else x_hat.shape[-1]
        left = picture.width - 12 * (side + 2)
        for row, expected in enumerate((x_hat, images)):
            tile = picture.crop((left, row * (side + 2), left + side, row * (side + 2) + side)).resize(
                (x_hat.shape[-1],) * 2, Image.Resampling.NEAREST)
            difference = torch.tensor(np.asarray(tile)).permute(2, 0, 1).int() - expected[0].int()
            if difference.abs().max() > 3:
                return False
    return True


def test_pretrained_draws_what_the_run_draws(small, monkeypatch, capsys):
    """The file holds half precision and no encoder. Nothing is trained or scored."""
    own, data = settings(), data_of(60)
    state = None
    for variant in ("vae", "form1", "guided"):
        if variant == "vae":
            state = stage1.train_vae(small / variant, own, data, CPU)
        else:
            state = stage1.train_refiner(small / variant, own, variant, state, data, CPU)
    x_hat, images, _ = common.generate(stage1.load_model(state, CPU), own | {"eval_samples": 36, "eval_batch": 36})
    for name in ("vae", "unet", "guide"):
        state[name] = common.half({key: value for key, value in state[name].items() if "encoder" not in key})
    common.save_state(small / "results" / "shapes" / "pretrained.pt", state)
    monkeypatch.setattr(stage1, "PRETRAINED", small / "results")
    monkeypatch.setattr(fid, "load_scorer", refuse)
    stage1.main([*SMOKE, "--pretrained"])
    folder = Path("runs/shapes-pretrained")
    assert capsys.readouterr().out.split() == [str(folder / "samples.png")] and draws(folder, x_hat, images)
    assert not draws(folder, images, x_hat)


@pytest.mark.parametrize("dataset", ["shapes", "cifar10", "celeba64"])
def test_committed_weights(dataset, small):
    """They fit the networks of the cpu budget, and draw images that have shapes and colours."""
    stage1.main(["--dataset", dataset, "--budget", "cpu", "--pretrained", "--device", "cpu", "--sample-steps", "2"])
    with Image.open(f"runs/{dataset}-pretrained/samples.png") as picture:
        assert np.asarray(picture.crop((100, 0, *picture.size))).std((0, 1)).min() > 30
    state = common.load_state(stage1.PRETRAINED / dataset / "pretrained.pt")["settings"]
    now = common.budget_settings("cpu", dataset)
    assert all(state[key] == now[key] for key in ("vae_table", "unet_table", "start", "objective"))


# --- Bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags,words", [
    ("--device cuda:99", ["--device cuda:99", "auto"]),
    ("--device tpu", ["--device tpu", "auto"]),
    ("--dataset folder --data-dir nowhere", ["--data-dir", "nowhere", "0 images"]),
    ("--dataset folder --data-dir few", ["--data-dir", "few", "2 images", "test"]),
    ("--dataset folder --data-dir broken", ["broken", "0002.png", "cannot be read"]),
    ("--dataset celeba64 --data-dir nowhere", ["celeba64", "nowhere", "no network", "img_align_celeba"]),
    ("--dataset cifar10 --data-dir nowhere", ["cifar10", "nowhere", "no network", "<class>"]),
    ("--dataset celeba64 --data-dir faces", ["celeba64", "0 images"]),
    ("--set steps=5", ["--set steps=5", "no such setting", "vae_steps"]),
    ("--set beta=much", ["--set beta=much", "0.04"]),
    ("--set batch=1.5", ["--set batch=1.5", "32"]),
    ("--features inception", ["--weights", "no network", "--features local"]),
    ("--weights absent.pt", ["absent.pt", "train.py"]),
    ("--weights text.pt", ["text.pt", "cannot be loaded"]),
    ("--out other", ["stage1-vae-s0", "batch was 2, is now 32", "--out"]),
    ("--out damaged", ["checkpoint.pt", "cannot be loaded"]),
    ("--out stopped --variant form1", ["stage1-vae-s0", "unfinished", "--resume"]),
    ("--dataset folder --pretrained", ["--pretrained", "pretrained.pt"]),
])
def test_bad_input_is_one_line(flags, words, small, monkeypatch, capsys):
    """It names the flag or the file, and the way out. Nothing is trained."""
    save_images(small / "few", draw_all(20, 1)[0])
    save_images(small / "broken", draw_all(70, 1)[0])
    save_images(small / "faces" / "celeba" / "img_align_celeba", [])
    for file in ("broken/0002.png", "text.pt"):
        (small / file).write_text("this is something else")
    run = Path("shapes-smoke") / "stage1-vae-s0"
    common.save_state("other" / run / "checkpoint.pt", {"settings": settings(batch=2)})
    common.write("damaged" / run / "checkpoint.pt", b"not a checkpoint")
    common.save_state("stopped" / run / "unfinished.pt", {"settings": settings()})
    if "--features" not in flags and "--weights" not in flags:
        monkeypatch.setattr(fid, "load_extractor", lambda *args: None)
        monkeypatch.setattr(fid, "Scorer", lambda extractor, data: SimpleNamespace(data=data))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(small / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(common, "Training", refuse)
    monkeypatch.setattr(datasets, "CIFAR10", offline)
    monkeypatch.setattr(datasets, "CelebA", offline)
    expect_error(capsys, lambda: stage1.main(["--budget", "smoke", "--device", "cpu", *flags.split()]), *words)


@pytest.mark.parametrize("name,flags", [
    ("stage1", "--dataset imagenet"), ("stage1", "--variant form3"), ("stage1", "--prior flow"),
    ("stage2", "--loss mean"), ("stage3", "--conditioning none"), ("stage1", "--no-such-flag")])
def test_unknown_flags_and_choices(name, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        COMMANDS[name]([*SMOKE, *flags.split()])
    assert stop.value.code == 2 and flags.split()[-1] in capsys.readouterr().err
