"""The commands of the four stages: what they write and print, how they resume, what they refuse, in two processes."""

import itertools
import json
import os
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, data_of, draw_all, expect_error, same, settings
from PIL import Image
from torchvision import datasets

import bonus_latent
import common
import fid
import stage1_baseline
import stage2_joint
import stage3_adaptive

ROOT = Path(common.__file__).parent
STAGES = {"stage1": stage1_baseline, "stage2": stage2_joint, "stage3": stage3_adaptive, "bonus": bonus_latent}
SMOKE = "--budget smoke --device cpu --eval-samples 40".split()
HOME = Path("runs") / "shapes-smoke"
every_stage = pytest.mark.parametrize("name", STAGES)


def refuse(*args, **options):
    pytest.fail("this must not start")


def stop(*args, **options):
    raise KeyboardInterrupt


def offline(*args, **options):
    raise OSError("no network")


def save_images(folder, images, suffix="png"):
    """Save uint8 images (N, 3, H, W) as folder/0000.png, ..."""
    folder.mkdir(parents=True)
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:04}.{suffix}")


def check_run(folder, pictures):
    """Exactly these pictures lie in a run's folder, and each can be read as a whole. Returns metrics.json."""
    assert {path.stem for path in folder.glob("*.png")} == set(pictures.split())
    assert all(min(Image.open(path).convert("L").size) > 50 for path in folder.glob("*.png"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"schema", "run", "rows", "training"} and metrics["schema"] == 1
    return metrics


# --- Smoke runs ------------------------------------------------------------------------------------------------------

PICTURES = {  # of all runs that a command scores
    "stage1": {"stage1-vae": "samples", "stage1-uncond": "samples", "stage1-form1": "samples trajectory",
               "stage1-guided": "samples trajectory"},
    "stage2": {"stage2-anneal": "samples interpolation"},
    "stage3": {"stage3-vae-flow": "samples", "stage3-flow-film": "samples uncertainty generated-gmm generated-flow"},
    "bonus": {"bonus-latent": "samples reconstructions"}}


@every_stage
def test_smoke(name, small, monkeypatch, capsys):
    """Every run has its metrics and pictures, and a line in the table. fid.py gives the exported images the scores of
    metrics.json. The same command again trains nothing."""
    command = [*SMOKE, "--export", *(["--variant", "guided", "uncond"] if name == "stage1" else [])]
    STAGES[name].main(command)
    printed = capsys.readouterr().out
    assert not [path for path in small.rglob("*") if path.name.startswith(".") or path.name == "unfinished.pt"]
    for variant, pictures in PICTURES[name].items():
        folder = HOME / f"{variant}-s0"
        metrics = check_run(folder, pictures)
        run, rows = metrics["run"], [row for row in metrics["rows"] if "precision" in row and row["label"] != "ceiling"]
        assert run["variant"] == variant and run["settings"]["unet_steps"] == 8 and run["minutes"] > 0
        assert metrics["training"][-1]["step"] == (1 if variant == "stage1-guided" else 8)
        assert folder.name in printed and {row["n_generated"] for row in rows} == {40}
        assert all(row["nfe"] == row["steps"] * (2 if "guided" in variant else 1) for row in rows)
        priors = {"none"} if variant in ("stage1-uncond", "bonus-latent") else {"gaussian", "gmm"}
        assert {row["prior"] for row in rows} == priors | ({"flow"} if name == "stage3" else set())
        assert len(list((folder / "samples").iterdir())) == 40
    fid.main(["shapes", str(folder / "samples")])  # of the last run
    scores = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])
    for score in ("fd", "floor", "kid", "precision", "recall", "diversity", "hf_energy"):
        assert float(scores[score]) == pytest.approx(rows[0][score]["value"], rel=0.01, abs=1e-6)
    monkeypatch.setattr(common, "Progress", refuse)
    monkeypatch.setattr(fid, "Scorer", stop)
    with pytest.raises(KeyboardInterrupt):
        STAGES[name].main(command)


def test_faces(small):
    """Stage 1 on JPEG copies of 89x109."""
    images = torch.nn.functional.interpolate(draw_all(64, 1)[0].float(), (109, 89)).byte()
    save_images(small / "data" / "celeba" / "img_align_celeba", images, "jpg")
    stage1_baseline.main([*SMOKE, "--dataset", "celeba64", "--variant", "form1"])
    run = check_run(Path("runs/celeba64-smoke/stage1-form1-s0"), "samples trajectory")["run"]
    assert run["data_note"] == "JPEG copies at 89x109" and run["features"] == "imagenet"


def test_own_photos(small, monkeypatch, capsys):
    """Stage 1 writes to data/ and runs/, and nowhere else. A later evaluation keeps the commit of training. Other
    photos in a folder of the same name are refused."""
    save_images(small / "photos", draw_all(70, 1)[0])
    (small / "photos" / "1970").mkdir()
    (small / "photos" / "0000.png").rename(small / "photos" / "1970" / "first.png")
    before = {path: path.stat().st_mtime_ns for path in (small / "photos").rglob("*")}
    results = {*(ROOT / "results").rglob("*")}
    command = [*SMOKE, *"--dataset folder --variant vae --data-dir".split()]
    for commit in ("first", "second"):
        monkeypatch.setattr(common, "this_commit", lambda commit=commit: commit)
        stage1_baseline.main([*command, "photos"])
        run = check_run(Path("runs/photos-folder-smoke/stage1-vae-s0"), "samples")["run"]
        assert run["commit"] == "first" and run["evaluated_at"] == commit
    assert run["features"] == "imagenet" and run["settings"]["image_size"] == 64
    assert {path.name for path in small.iterdir()} == {"photos", "data", "runs"}
    assert {path: path.stat().st_mtime_ns for path in (small / "photos").rglob("*")} == before
    assert {*(ROOT / "results").rglob("*")} == results
    save_images(small / "other" / "photos", draw_all(70, 2)[0])
    expect_error(capsys, lambda: stage1_baseline.main([*command, "other/photos"]), "stage1-vae-s0", "other training")


# --- What is trained -------------------------------------------------------------------------------------------------

@pytest.fixture
def unscored(small, monkeypatch):
    """Commands train on 60 images, and score nothing."""
    for module, name, result in ((fid, "load_extractor", None), (fid, "Scorer", None), (common, "print_results", None),
                                 (common, "load_data", data_of(60)),
                                 *((stage, "evaluate", defaultdict(float)) for stage in STAGES.values())):
        monkeypatch.setattr(module, name, lambda *args, result=result: result)


@pytest.mark.parametrize("name,flags", [("stage1", "--variant guided"), ("stage2", "--loss kendall"),
                                        ("stage3", "--conditioning coupling"), ("bonus", "")])
def test_a_kill_and_a_resume(name, flags, unscored, monkeypatch, capsys):
    """Every network's training is killed in its fifth step, and goes on from the fourth. In the end all checkpoints
    have the bits of a run that was never stopped. An unfinished run needs --resume."""
    def killed(progress, **terms):
        log(progress, **terms)
        if progress.done == 4 and progress.folder not in stopped:
            stopped.append(progress.folder)
            raise KeyboardInterrupt

    main, command = STAGES[name].main, [*SMOKE, *flags.split(), *"--set every=2 dropout=0.1 --out".split()]
    main([*command, "whole"])
    stopped, log, clock = [], common.Progress.log, itertools.count(0, 100)
    monkeypatch.setattr(common, "time", SimpleNamespace(time=lambda: next(clock)))  # a minute has always passed
    monkeypatch.setattr(common.Progress, "log", killed)
    number = 1 if name == "stage2" else 2
    for _ in range(number):
        with pytest.raises(KeyboardInterrupt):
            main([*command, "parts", "--resume"])
        assert common.load_state(stopped[-1] / "unfinished.pt")["done"] == 4
    expect_error(capsys, lambda: main([*command, "parts"]), "unfinished", "--resume")
    main([*command, "parts", "--resume"])
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
    def train_refiner(folder, settings, variant, base, *args):
        assert base == stage1_baseline.BASE[variant]
        trained.append(variant)
        return variant

    trained = []
    monkeypatch.setattr(stage1_baseline, "train_vae", lambda *args: trained.append("vae") or "vae")
    monkeypatch.setattr(stage1_baseline, "train_refiner", train_refiner)
    stage1_baseline.main([*SMOKE, *flags.split()])
    assert trained == variants.split()


@every_stage
def test_dry_run(name, small, monkeypatch, capsys):
    """It prints all settings with what the flags change, and names the folder by it. Nothing is loaded or written."""
    monkeypatch.setattr(fid, "load_extractor", refuse)
    path = STAGES[name].__file__
    flags = "--dataset celeba64 --budget cpu --set vae_steps=5 objective=eps sampler=ddim --dry-run"
    monkeypatch.setattr(sys, "argv", [path, *flags.split()])
    runpy.run_path(path, run_name="__main__")
    printed = json.loads(capsys.readouterr().out)
    expected = common.budget_settings("cpu", "celeba64") | {"vae_steps": 5, "objective": "eps", "sampler": "ddim"}
    different = {key for key, value in printed.items() if expected.get(key) != value}
    assert different - {"prior"} == {"networks", "changes", "seed", "home"}
    assert printed["home"] == "runs/celeba64-cpu-vae_steps=5-objective=eps"
    assert all(facts["parameters"] > 10_000 for facts in printed["networks"].values()) and not list(small.iterdir())


# --- Weights that come with the project ------------------------------------------------------------------------------

def test_pretrained_draws_what_the_run_draws(small, monkeypatch, capsys):
    """The file has half precision and no encoder. Nothing is trained or scored."""
    own, data = settings(), data_of(60)
    state = stage1_baseline.train_vae(small / "vae", own, data, CPU)
    for variant in ("form1", "guided"):
        state = stage1_baseline.train_refiner(small / variant, own, variant, state, data, CPU)
    state |= {name: common.half(state[name]) for name in ("vae", "unet", "guide")}
    model = stage1_baseline.load_model(state, CPU)
    x_hat, images = stage1_baseline.generate(model, own, stage1_baseline.draw_codes(model, own, 36))
    common.draw_samples(small / "expected", {"VAE": x_hat, "refined": images})
    state["vae"] = {key: value for key, value in state["vae"].items() if "encoder" not in key}
    common.save_state(small / "results" / "shapes" / "pretrained.pt", state)
    monkeypatch.setattr(stage1_baseline, "PRETRAINED", small / "results")
    monkeypatch.setattr(fid, "load_extractor", refuse)
    stage1_baseline.main([*SMOKE, "--pretrained"])
    picture = Path("runs/shapes-pretrained/samples.png")
    assert capsys.readouterr().out.split() == [str(picture)]
    assert picture.read_bytes() == (small / "expected" / "samples.png").read_bytes()
    expect_error(capsys, lambda: stage1_baseline.main(["--pretrained", "--dataset", "folder"]), "--pretrained")


@pytest.mark.parametrize("dataset", ["shapes", "cifar10", "celeba64"])
def test_committed_weights(dataset, small):
    """They draw images that have shapes and colours."""
    command = f"--dataset {dataset} --budget cpu --pretrained --device cpu --sample-steps 2"
    stage1_baseline.main(command.split())
    with Image.open(f"runs/{dataset}-pretrained/samples.png") as picture:
        assert np.asarray(picture.crop((100, 0, *picture.size))).std((0, 1)).min() > 30


# --- Wrong input -----------------------------------------------------------------------------------------------------

FIRST = {"stage1": "stage1-vae", "stage2": "stage2-anneal", "stage3": "stage3-vae-flow", "bonus": "bonus-autoencoder"}


@pytest.mark.parametrize("flags,words", [
    ("--set objective=epsilon", "objective=epsilon v eps"),
    ("--set objective=../../x", "objective=../../x v eps"),
    ("--set sampler=heun", "sampler=heun ddpm ddim dpm"),
    ("--set prior=nonsense", "prior=nonsense gaussian gmm"),
    ("--set batch=0", "batch=0 1"),
    ("--set batch=-3", "batch=-3 1"),
    ("--set batch=1.5", "batch=1.5 number"),
    ("--set beta=nan", "beta=nan number"),
    ("--set start=1001", "start=1001 1000"),
    ("--set pool=maybe", "pool=maybe true false"),
    ("--set steps=5", "--set steps=5 vae_steps"),
    ("--set unet_table=[]", "unet_table common.py"),
    ("--sample-steps 0", "sample_steps=0 1"),
    ("--eval-samples 0", "eval_samples=0 40"),
    ("--device cuda:99", "--device cuda:99 auto"),
    ("--device tpu", "--device tpu auto"),
    ("--dataset folder --data-dir nowhere", "--data-dir nowhere 0"),
    ("--dataset folder --data-dir few", "--data-dir few 18 2 held"),
    ("--dataset folder --data-dir broken", "broken 0002.png"),
    ("--dataset celeba64 --data-dir nowhere", "celeba64 nowhere network img_align_celeba"),
    ("--dataset cifar10 --data-dir nowhere", "cifar10 nowhere network <class>"),
    ("--features inception", "--weights network --features imagenet"),
    ("--weights absent.pt", "absent.pt loaded"),
    ("--weights text.pt", "text.pt loaded"),
    ("--out other", "s0 batch 2 32 --out"),
    ("--out damaged", "checkpoint.pt loaded"),
])
def test_wrong_input(flags, words, small, monkeypatch, capsys):
    """Every stage prints one line, which names the flag or the file and the way out. Nothing is trained or written."""
    save_images(small / "data" / "few", draw_all(20, 1)[0])
    save_images(small / "data" / "broken", draw_all(70, 1)[0])
    for file in ("data/broken/0002.png", "text.pt"):
        (small / file).write_text("this is something else")
    for first in FIRST.values():
        run = Path("shapes-smoke") / f"{first}-s0" / "checkpoint.pt"
        common.save_state("other" / run, {"settings": settings(batch=2)})
        ("damaged" / run).parent.mkdir(parents=True)
        ("damaged" / run).write_text("not a checkpoint")
    if "--features" not in flags and "--weights" not in flags:
        monkeypatch.setattr(fid, "load_extractor", lambda *args: None)
    if "few" in flags:
        monkeypatch.setattr(common, "decode_files", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(small / "data"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(common, "Progress", refuse)
    monkeypatch.setattr(fid, "Scorer", refuse)
    monkeypatch.setattr(datasets, "CIFAR10", offline)
    monkeypatch.setattr(datasets, "CelebA", offline)
    files = {path for path in small.rglob("*") if "data" not in path.parts}
    flags = flags.replace("--data-dir ", "--data-dir data/")
    for stage in STAGES.values():
        expect_error(capsys, lambda stage=stage: stage.main([*SMOKE, *flags.split()]), *words.split())
    assert {path for path in small.rglob("*") if "data" not in path.parts} == files


# --- Two processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from torch import distributed
sys.path[:0] = {paths}
import bonus_latent, common, fid, helpers, stage1_baseline, stage2_joint, stage3_adaptive

def finish_and_compare(progress, *args, **parts):
    mine = {{name: part.state_dict() for name, part in progress.parts.items()}}, progress.gen.get_state()
    both = [None, None]
    distributed.all_gather_object(both, mine)
    assert helpers.same(both[0][0], both[1][0]), "the networks differ"
    assert not torch.equal(both[0][1], both[1][1]), "both draw the same images"
    return finish(progress, *args, **parts)

def fail(*args, **terms):
    raise ValueError("in the second process alone")

finish, common.Progress.finish = common.Progress.finish, finish_and_compare
common.draw_shapes = helpers.small_shapes
common.what_to_sample = lambda settings, *args: [("", settings, 40)]
bonus_latent.savings = lambda *args: [dict.fromkeys(["seconds_per_image", "peak_memory_mb", "gflops_per_image"], 0)]
stage3_adaptive.strategies = lambda *args: []
if common.RANK == 1:
    fid.Scorer = fail
for stage in (stage1_baseline, stage2_joint, stage3_adaptive, bonus_latent):
    stage.main({command})
distributed.barrier()
if common.RANK == 1:
    common.Progress.log = fail
stage2_joint.main({command} + ["--seed", "1"])
"""


def test_two_processes(tmp_path):
    """All stages run in two processes. Their networks stay equal, though each draws images of its own. The first one
    alone scores and prints. An error of the second one is seen, and ends both."""
    command = [*SMOKE, *"--set dropout=0.1 vae_steps=3 unet_steps=3 flow_steps=3".split()]
    (tmp_path / "script.py").write_text(SCRIPT.format(paths=[str(ROOT), str(ROOT / "tests")], command=command))
    ran = subprocess.run([*f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2".split(),
                          "script.py"], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                         text=True, timeout=150)
    found = sorted(path.parent.name for path in tmp_path.rglob("metrics.json"))
    assert found == ["bonus-latent-s0", "stage1-form1-s0", "stage1-vae-s0", "stage2-anneal-s0", "stage3-flow-film-s0",
                     "stage3-vae-flow-s0"], ran.stderr
    assert ran.stdout.count("pictures and metrics.json") == 4
    assert "ValueError: in the second process alone" in ran.stderr and ran.returncode != 0
