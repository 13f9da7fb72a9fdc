"""The evaluation of a model (fid.py, section 6): each number of each table against a closed form, or against a model
and images for which it is known."""

import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CPU, expect_error, flags, images_of, oracle, planted_setup, settings
from PIL import Image

import common
import fid

T = 1000


def score(value):
    return {"value": value, "low": value - 1, "high": value + 1}


def brightness(images):
    """A stand-in for setup.score: the mean grey level."""
    return {"fd": score(float(images.float().mean()))}


# ---- Setup -----------------------------------------------------------------------------------------------------------

def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(path)


def test_setup(small, monkeypatch, capsys):
    """What of the data belongs to the settings. Folders of one name and number of images are other data."""
    asked = []
    monkeypatch.setattr(fid, "load_extractor", lambda *how: asked.append(how) or SimpleNamespace(
        name="stub", suffix="" if how[0] == "inception" else "_local"))
    train = settings()
    setup = fid.Setup(flags("--out", "new/runs", "--weights", "file"), train, {"features": "local", "count": 50}, CPU)
    assert setup.train == train | {"crop": "none", "n_train": 1000, "data_note": "drawn by the program"}
    assert setup.evaluation == {"features": "stub", "count": 50} and asked == [("local", "shapes", "file", CPU, "data")]
    assert not torch.equal(setup.data.images[:200], setup.test.images) and "crop" not in train
    assert (len(setup.data.images), len(setup.test.images)) == (1000, 200) and setup.device == CPU
    assert setup.home == Path("new/runs/shapes-smoke") and setup.cache == Path("data/cache")
    assert setup.fd_key == "fd_local" and fid.Setup(flags(), train, {"features": "inception"}, CPU).fd_key == "fid"
    for home in ("one", "two"):
        for i in range(60):
            save(Path(home) / "photos" / f"{i:02}.png", i)
    one, two = (fid.Setup(flags("--dataset", "folder", "--data-dir", f"{home}/photos"), train | {"image_size": 32},
                          {"features": "local"}, CPU) for home in ("one", "two"))
    assert one.home == two.home == Path("runs/photos-smoke") and one.cache == Path("data/cache")
    assert "data_dir" in common.first_difference(one.train, two.train)
    for i in (0, 9):  # as many images, but one is another: of the training images, then (every tenth) a held-out one
        save(Path(f"one/photos/{i:02}.png"), 60)
        changed = fid.Setup(flags("--dataset", "folder", "--data-dir", "one/photos"), train | {"image_size": 32},
                            {"features": "local"}, CPU)
        assert "data_hash" in common.first_difference(one.train, changed.train)
        save(Path(f"one/photos/{i:02}.png"), i)
    for suffix in (".png", ".jpg"):  # and so are JPEG copies of the same images
        for split, i in itertools.product(("train", "test"), range(6)):
            save(Path(suffix) / "cifar10" / split / "cat" / f"{i}{suffix}", i)
    one, two = (fid.Setup(flags("--dataset", "cifar10", "--data-dir", suffix), train | {"image_size": 32},
                          {"features": "local"}, CPU) for suffix in (".png", ".jpg"))
    assert one.home == two.home and "JPEG" in common.first_difference(one.train, two.train)
    assert two.cache == Path(".jpg/cache")
    Path(".png/cifar10/test/cat/0.png").unlink()
    expect_error(capsys, lambda: fid.Setup(flags("--dataset", "cifar10", "--data-dir", ".png"),
                                           train | {"image_size": 32}, {"features": "local"}, CPU),
                 ".png: 5 held-out images of cifar10", "6")


def test_name_and_settings_of_a_run(small, monkeypatch):
    """What --set changes is part of both, but for what does not matter to the run. The processes share the batch that
    it sets."""
    joined = []
    monkeypatch.setattr(fid, "load_extractor", lambda *how: SimpleNamespace(name="stub", suffix="_local"))
    monkeypatch.setattr(common, "join_processes", lambda device, batch: joined.append(batch))
    args = flags("--device", "cpu", "--budget", "smoke", "--seed", "7", "--set", "start=300", "beta=0.5", "batch=6",
                 "unet_ema=0", "guidance=1")
    train, evaluation, device = common.read_settings(args)
    setup, plain = fid.Setup(args, train, evaluation, device), settings()
    assert joined == [6]
    for name, without, part, changed in (
            ("stage1-guided", (), "-start=300-beta=0.5-batch=6-unet_ema=0-guidance=1",
             {"start": 300, "beta": 0.5, "batch": 6, "unet_ema": 0.0, "guidance": 1.0}),
            ("stage1-form1", ("guidance",), "-start=300-beta=0.5-batch=6-unet_ema=0",
             {"start": 300, "beta": 0.5, "batch": 6, "unet_ema": 0.0}),
            ("stage1-vae", common.OF_UNET, "-beta=0.5-batch=6", {"beta": 0.5, "batch": 6})):
        folder, found = setup.folder_and_settings(name, without)
        assert folder == setup.home / f"{name}{part}-s7" and setup.home == Path("runs/shapes-smoke")
        assert found == setup.train | changed and setup.train["start"] == plain["start"] != 300


def test_setup_of_several_processes(small, monkeypatch):
    """The first process decodes the data before all others. It computes scores alone and hands them on."""
    monkeypatch.setattr(fid, "load_extractor", lambda *how: SimpleNamespace(name="stub", suffix="_local"))
    monkeypatch.setattr(fid, "cached_reference", lambda *how: events.append(how) or "reference")
    monkeypatch.setattr(fid, "scores", lambda *how: events.append("scores") or how)
    load_images = common.load_images
    monkeypatch.setattr(common, "load_images", lambda *how: events.append("load") or load_images(*how))
    monkeypatch.setattr(common, "join_processes", lambda device, batch: events.append(f"join {batch}"))
    monkeypatch.setattr(common, "wait_for_all", lambda: events.append("wait"))
    monkeypatch.setattr(common, "from_first", lambda value: events.append(value) or "the first's scores")
    for rank, order in ((0, ["load", "load", "wait"]), (1, ["wait", "load", "load"])):
        events = []
        monkeypatch.setattr(common, "RANK", rank)
        setup = fid.Setup(flags(), settings(batch=6), {"features": "local"}, CPU)
        assert events == ["join 6", *order]
        assert setup.score("images") == "the first's scores"
        compared = setup.extractor, setup.data, setup.test, setup.cache
        scored = [compared, "scores", (setup.extractor, "images", "reference")]
        assert events[4:] == (scored if rank == 0 else [None])


# ---- metrics.json ----------------------------------------------------------------------------------------------------

def test_metrics_come_back_or_are_measured_again(tmp_path):
    """They come back as they were written, unless they are of another evaluation or schema, or damaged. All numbers
    are finite."""
    path, metrics = tmp_path / "metrics.json", {"schema": 1, "run": {"eval": {"count": 50}}, "rows": [{}], "tables": {}}
    assert fid.read_metrics(path) is None
    common.write_json(path, metrics)
    assert fid.read_metrics(path) == fid.read_metrics(path, {"count": 50}) == metrics
    assert fid.read_metrics(path, {"count": 51}) is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_json(path, metrics | {"rows": [{"fd": math.nan}]})
    assert fid.read_metrics(path) == metrics
    broken = [metrics | {"schema": 2}, metrics | {"rows": []}, {key: metrics[key] for key in ("run", "rows")}]
    for text in (*map(json.dumps, broken), path.read_text()[:60], "", "{", "[]", "null", '{"schema": 1, "run": 3}'):
        path.write_text(text)
        assert fid.read_metrics(path) is None


def test_processor_name(tmp_path):
    """On x86, Linux tells the model of each core, and whether it has AMX. On others it may not, and other systems have
    no such file."""
    (tmp_path / "x86").write_text("processor\t: 0\nmodel name\t: ACME 3: fast\n\nmodel name\t: other\n", "utf-8")
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n", "utf-8")
    assert fid.processor_name(tmp_path / "x86") == "ACME 3: fast"
    (tmp_path / "amx").write_text("model name\t: ACME 4\nflags\t\t: fpu amx_bf16 amx_tile\n", "utf-8")
    assert fid.processor_name(tmp_path / "amx") == "ACME 4 with AMX"
    assert fid.processor_name(tmp_path / "arm") == fid.processor_name(tmp_path / "none") == platform.machine()


def test_what_evaluate_writes(tiny, tmp_path, monkeypatch, capsys):
    """The facts of a run, each from its own source. Metrics of another training (run_id) or of other settings are
    measured again. A conclusion is printed, but not after a few steps."""
    measured = []
    for name, result in (("measure_samples", ([{"prior": "first"}, {"prior": "second"}], {"samples": 1})),
                         ("measure_vae", {"latent": {"conclusion": "fine"}, "start": {"conclusion": "early"}}),
                         ("bits_per_dim", "bits")):
        monkeypatch.setattr(fid, name, lambda *how, name=name, result=result: measured.append((name, how)) or result)
    monkeypatch.setattr(common, "draw_training", lambda folder, log: {"last": log[-1]})
    folder, data = tmp_path / "form1-s3", images_of(30)
    tiny.networks = (torch.nn.Linear(3, 4), torch.nn.Linear(2, 3))  # 16 and 9 parameters
    tiny.reduced = True
    train = {"budget": "cpu", "seed": 3, "vae_steps": 7, "unet_steps": 20, "batch": 5}
    state = {"train": train, "run_id": "a", "seconds": 12.5, "seconds_before": 30.25,
             "log": [{"step": 1}, {"step": 20}]}
    setup = SimpleNamespace(data=dataclasses.replace(data, name="toy", crop="box", note="JPEG copies"),
                            evaluation={"count": 50}, extractor=SimpleNamespace(name="stub"), commit="0a1b2c3")
    metrics = fid.evaluate(folder, setup, state, tiny)
    run = metrics["run"]
    expected = {"dataset": "toy", "crop": "box", "data_note": "JPEG copies", "variant": "form1", "budget": "cpu",
                "seed": 3, "run_id": "a", "features": "stub", "n_real": 30, "parameters": 25, "bfloat16": True,
                "train_seconds": 42.75, "commit": "0a1b2c3", "torch": torch.__version__, "train": train,
                "eval": {"count": 50}}
    assert {key: run[key] for key in expected} == expected and set(run) - set(expected) == {"device"}
    assert run["device"] == f"cpu ({fid.processor_name()}, 1 threads)"
    assert metrics["rows"] == [{"prior": "first"}, {"prior": "second"}] and metrics["schema"] == 1
    assert metrics["tables"] == {"samples": 1, "latent": {"conclusion": "fine"}, "start": {"conclusion": "early"},
                                 "bits_per_dim": "bits", "training": {"last": {"step": 20}}}
    assert dict(measured)["bits_per_dim"] == (tiny, "first", setup)
    assert capsys.readouterr().out == "form1-s3: fine\nform1-s3: early\n"
    measured.clear()
    assert fid.evaluate(folder, setup, state, tiny) == metrics == json.loads((folder / "metrics.json").read_text())
    assert not measured
    for other_state, evaluation in ((state | {"run_id": "b"}, {"count": 50}), (state, {"count": 51})):
        setup.evaluation = evaluation
        fid.evaluate(folder, setup, other_state, tiny)
        assert measured
        measured.clear()
    state |= {"run_id": "b2"}
    assert fid.evaluate(folder, setup, state, dataclasses.replace(tiny, reduced=False))["run"]["bfloat16"] is False
    state["train"]["budget"] = "smoke"
    capsys.readouterr()
    for changes, names in (({"denoiser_for": None}, ["measure_samples", "measure_vae"]),  # a VAE alone
                           ({"vae": None}, ["measure_samples", "bits_per_dim"]),  # no VAE
                           ({"vae": None, "decode": len}, ["measure_samples"])):  # a diffused latent has no such bound
        measured.clear()
        state["run_id"] += "c"
        fid.evaluate(folder, setup, state, dataclasses.replace(tiny, **changes))
        assert [name for name, _ in measured] == names and capsys.readouterr().out == ""


# ---- Scores of images and of numbers ---------------------------------------------------------------------------------

def test_the_commit_of_a_run(tmp_path, monkeypatch):
    """It is in the history of the code, and says whether files were changed since. Without git it is unknown."""
    def git(*command):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *command], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(fid, "__file__", str(tmp_path / "fid.py"))
    assert fid.this_commit() == "unknown"  # no repository
    git("init", "-q")
    (tmp_path / "fid.py").write_text("1")
    git("add", "fid.py")
    git("commit", "-qm", "first")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    assert len(fid.this_commit()) >= 7 and head.startswith(fid.this_commit())
    (tmp_path / "fid.py").write_text("2")
    assert fid.this_commit() == f"{git('rev-parse', '--short', 'HEAD')}-dirty"
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(fid, "__file__", str(tmp_path / "inside" / "fid.py"))  # in the repository of another project
    assert fid.this_commit() == "unknown"
    monkeypatch.setattr(fid, "__file__", str(tmp_path / "fid.py"))
    monkeypatch.setenv("PATH", "")
    assert fid.this_commit() == "unknown"


def test_sharpness_psnr_and_intervals():
    """High frequencies begin at 1/4 cycle per pixel, and brightness does not count. PSNR and interval by hand."""
    real = common.draw_shapes(300, seed=5)[0]
    sharpness = fid.hf_energy(real, real)
    assert sharpness["value"] == pytest.approx(1, abs=1e-4) and sharpness["low"] < 1 < sharpness["high"]
    blurred = torch.nn.functional.avg_pool2d(real.float(), 3, 1, 1).round().to(torch.uint8)
    noisy = (real.float() + 20 * common.randn(real.shape, common.generator(0))).clamp(0, 255).to(torch.uint8)
    assert fid.hf_energy(blurred, real)["value"] < 0.5 and fid.hf_energy(noisy, real)["value"] > 1.1
    low, high = (127 + 60 * torch.sin(2 * math.pi * f * torch.arange(64.0)) for f in (1 / 8, 3 / 8))
    images = torch.stack([low, high, high - 50]).round()[:, None, None, :].expand(3, 3, 64, 64).to(torch.uint8)
    ratio = [fid.hf_energy(image[None].expand(2, -1, -1, -1), images[1:2])["value"] for image in images]
    assert ratio[0] < 0.001 and ratio[1:] == pytest.approx([1, 1], rel=1e-2)
    upright = fid.hf_energy(images[1:2].mT.expand(2, -1, -1, -1), images[1:2])["value"]
    assert upright == pytest.approx(1, rel=1e-3)
    # errors of 10 and 20 levels: the mean of 20 log10(255 / error)
    level = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    other = level + torch.tensor([10, 20], dtype=torch.uint8)[:, None, None, None]
    assert fid.psnr_db(other, level) == pytest.approx(10 * math.log10(255**2 / 200), rel=1e-5)
    # mean 2 and sd 3 of 4 values: 2 -+ 1.96 * 3 / 2
    found = fid.mean_score(2 + 3 * 0.75**0.5 * torch.tensor([-1.0, -1, 1, 1]))
    assert found == {"value": pytest.approx(2), "low": pytest.approx(-0.94), "high": pytest.approx(4.94)}


def test_high_frequency_power_by_hand():
    """The power spectrum of grey images, without their mean and under a Hann window, beyond a circle of 1/4."""
    images = torch.randint(256, (5, 3, 32, 32), generator=common.generator(0)).to(torch.uint8)
    window, frequency = np.hanning(32), np.fft.fftfreq(32)
    for image, power in zip(images.numpy().astype(float), fid.high_frequency_power(images).tolist(), strict=True):
        grey = image.mean(0)
        spectrum = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(window, window))) ** 2
        beyond = frequency[:, None] ** 2 + frequency**2 > 1 / 16
        assert power == pytest.approx(spectrum[beyond].mean(), rel=1e-4)


def test_psnr_of_perfect_images_is_finite():
    """A perfect image counts as 100 dB, so that metrics.json can be written. A single wrong level is no perfect one."""
    real = images_of(4).images
    assert fid.psnr_db(real, real) == pytest.approx(100)
    one_wrong = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    one_wrong[0, 0, 5, 5] = 1
    assert fid.psnr_db(one_wrong, 0 * one_wrong) == pytest.approx(10 * math.log10(255**2 * 3 * 64**2), rel=1e-4)
    assert fid.psnr_db(torch.cat([real[:1], 255 - real[:1]]), torch.cat([real[:1], real[:1]])) == pytest.approx(
        (100 + fid.psnr_db(255 - real[:1], real[:1])) / 2)


def test_measure(tiny, monkeypatch):
    """Scores and sharpness are those of the refined images. Sharpness is compared with held-out images. A sampling step
    may evaluate two networks."""
    asked, (x_hat, images, test) = [], images_of(30).images.split(10)
    monkeypatch.setattr(common, "generate", lambda *how: asked.append(how) or (x_hat, images, 0.25))
    setup = SimpleNamespace(train={"seed": 5}, evaluation={"batch": 7}, score=brightness, data=None,
                            test=SimpleNamespace(images=test))
    tiny.diffusion = common.Diffusion("v", start=400)
    row, before, after = fid.measure(tiny, setup, "gaussian", "dpm", 500, 10, 0.1)
    assert asked == [(tiny, 10, "gaussian", "dpm", 500, 5, 7, 0.1)] and before is x_hat and after is images
    assert row == {"prior": "gaussian", "sampler": "dpm", "steps": 400, "nfe": 400, "n_generated": 10,
                   "seconds_per_image": 0.25, **brightness(images), "hf_energy": fid.hf_energy(images, test)}
    tiny.evaluations = 2
    for steps, taken, nfe in ((4, 4, 8), (500, 400, 800), (0, 0, 0)):
        row, _, _ = fid.measure(tiny, setup, "gaussian", "dpm", steps, 10, 0.0)
        assert (row["steps"], row["nfe"]) == (taken, nfe)


def dotted(count, level):
    images = torch.full((count, 3, 32, 32), level, dtype=torch.uint8)
    images[:, :, ::5, 1::5] = 0
    return images


def stub_samples(monkeypatch, evaluation, stub_copies=True, **changes):
    """A model, a setup and a list of the rows that measure_samples asks for. `measure` returns, for the n-th of them, a
    score of n, and images with dots: x_hat of grey level n and refined images of grey level 100 + n. `copies` returns
    the number of its images and their grey level. `draw_trajectory` is left out."""
    drawn = []

    def measure(model, setup, prior, sampler, steps, count, damage=0.0):
        drawn.append((prior, sampler, steps, count, damage))
        return {"steps": steps, "fd": score(float(len(drawn))), "hf_energy": score(0.5)}, *(
            dotted(count, level) for level in (len(drawn), 100 + len(drawn)))

    monkeypatch.setattr(fid, "measure", measure)
    monkeypatch.setattr(fid, "draw_trajectory", lambda *how: None)
    if stub_copies:
        monkeypatch.setattr(fid, "copies", lambda folder, images, setup: (len(images), images[0, 0, 0, 0].item()))
    model = common.Model("form1", CPU, (3, 32, 32), common.Diffusion("v"), vae=object(), denoiser_for=object(),
                         priors={"gaussian": None, "gmm": None})
    setup = SimpleNamespace(evaluation=common.EVAL | {"prior": "gmm", "count": 40, "grid_count": 40} | evaluation,
                            extractor=None, fd_key="fd", score=brightness, test=images_of(10))
    return dataclasses.replace(model, **changes), setup, drawn


def test_rows_tables_and_pictures_of_samples(monkeypatch, tmp_path):
    """The headline comes first. Before refinement, the headline's x_hat are scored. Other priors get the headline's
    count if they are cheap, which they are for a VAE alone. Copies are looked for among the first of the headline's
    images, but not of a VAE alone, whose images are blurred."""
    pictures = {}
    monkeypatch.setattr(common, "save_grid", lambda path, rows, *_: pictures.update({path.name: {
        label: images[0, 0, 0, 0].item() for label, images in rows.items()}}))
    changes = {"count": 50, "grid_count": 20, "sampler": "ddim", "sample_steps": 8, "grid": [["dpm", 2]]}
    model, setup, drawn = stub_samples(monkeypatch, changes)
    rows, tables = fid.measure_samples(tmp_path, model, setup)
    assert drawn[:3] == [("gmm", "ddim", 8, 50, 0.0), ("gaussian", "ddim", 8, 20, 0.0), ("gmm", "dpm", 2, 20, 0.0)]
    assert [row["fd"]["value"] for row in rows] == [1, 2, 3] and tables["copies"] == (20, 101)
    assert tables.keys() == {"before_refinement", "robustness", "copies"}
    x_hat = dotted(50, 1)
    assert tables["before_refinement"] == brightness(x_hat) | {"hf_energy": fid.hf_energy(x_hat, setup.test.images)}
    assert pictures["samples.png"] == {f"{name} {i}": level for i in range(3) for name, level in (
        ("VAE", 1), ("refined", 101))}
    assert pictures["steps.png"] == {"dpm 2": 103} and pictures.pop("priors.png") == {"gmm": 101, "gaussian": 102}
    model, setup, drawn = stub_samples(monkeypatch, changes, denoiser_for=None)  # a VAE alone
    rows, tables = fid.measure_samples(tmp_path, model, setup)
    assert drawn[:3] == [("gmm", "none", 0, 50, 0.0), ("gaussian", "none", 0, 50, 0.0), ("gmm", "none", 0, 20, 0.0)]
    assert len(rows) == 2 and tables.keys() == {"robustness"} and pictures["samples.png"]["form1 0"] == 101
    assert pictures.pop("priors.png") == {"gmm": 101, "gaussian": 102}
    model, setup, drawn = stub_samples(monkeypatch, changes, vae=None, priors={})  # diffusion alone
    rows, tables = fid.measure_samples(tmp_path, model, setup)
    assert drawn == [("none", "ddim", 8, 50, 0.0), ("none", "dpm", 2, 20, 0.0)]
    assert tables == {"copies": (20, 101)} and "priors.png" not in pictures
    model, setup, drawn = stub_samples(monkeypatch, changes, vae=None, priors={}, decode=len)  # of a latent
    assert fid.measure_samples(tmp_path, model, setup)[1].keys() == {"robustness", "copies"}


@pytest.mark.parametrize("refined", [True, False])
def test_robustness_by_hand(refined, tmp_path, monkeypatch):
    """Scores 10, 12, 20, 50 at noise sd 0, 0.1, 0.2, 0.4: with noise they are 82 / 3 on average, and without it 10.
    The steps are those that were taken: here 5, because refinement begins at t = 5."""
    values, sds, asked = [10.0, 12.0, 20.0, 50.0], [], set()

    def measure(model, setup, prior, sampler, steps, count, damage):
        sds.append(damage)
        asked.add((prior, sampler, steps, count))
        image = torch.full((2, 3, 32, 32), len(sds), dtype=torch.uint8)
        scores = {"fid": {"value": values[len(sds) - 1]}, "hf_energy": {"value": 1.0 - damage}}
        return {"steps": min(steps, 5)} | scores, image, 10 * image

    monkeypatch.setattr(fid, "measure", measure)
    setup = SimpleNamespace(evaluation={"probe_steps": 7, "grid_count": 2}, fd_key="fid")
    model = SimpleNamespace(denoiser_for=object() if refined else None)
    table = fid.robustness(tmp_path, model, "gmm", setup)
    assert table["mean"] == pytest.approx(82 / 3) and table["rise"] == pytest.approx(52 / 3)
    assert sds == pytest.approx([0, 0.1, 0.2, 0.4], rel=0.03) and (table["steps"], table["images"]) == (5 * refined, 2)
    assert asked == {("gmm", "dpm", 7, 2) if refined else ("gmm", "none", 0, 2)}
    assert [row["fid"]["value"] for row in table["scores"].values()] == values
    assert [row["hf_energy"]["value"] for row in table["scores"].values()] == [1 - sd for sd in sds]
    picture = np.asarray(Image.open(tmp_path / "robustness.png"))
    levels = [1, 10, 2, 20, 3, 30, 4, 40] if refined else [1, 2, 3, 4]
    assert picture[49::98, -49, 0].tolist() == levels


def grey_levels(images):
    return images.flatten(1).double().numpy()


def brute_force(images, train, mirrored, features):
    """The distance of each image to the nearest training image, and the index of that, one by one."""
    sides = [images, images.flip(3)] if mirrored else [images]
    distances = np.array([[min(np.linalg.norm(features(side)[i] - row) for side in sides) for row in features(train)]
                          for i in range(len(images))])
    return distances.min(1), distances.argmin(1)


def test_the_nearest_of_many_rows():
    """It is found wherever it lies among thousands of rows; of equal ones it is the first."""
    rows, queries = common.randn((4500, 3), common.generator(0)), common.randn((20, 3), common.generator(1))
    rows[4100] = rows[4200] = queries[7]
    distance, index = fid.nearest_rows([queries], rows)
    expected = np.linalg.norm(queries.double().numpy()[:, None] - rows.double().numpy(), axis=2)
    assert index.tolist() == expected.argmin(1).tolist() and index[7] == 4100 and len({*(index // 2000).tolist()}) == 3
    assert distance.numpy() == pytest.approx(expected.min(1), abs=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("count", [30, 60])
def test_copies_by_hand(mirrored, count, tmp_path, monkeypatch):
    """Three of the random images are planted: a training image, a mirrored one with a pixel that is off by a level, and
    one with all pixels off by 3 levels. The nearest training images are found one by one, in grey levels and in planted
    features, random sums over pixels. The mirrored one is close only if training mirrors images. There are as many
    held-out images as generated ones, or all if those are more."""
    def noise(count, seed):
        return torch.randint(0, 250, (count, 3, 8, 8), generator=common.generator(seed)).to(torch.uint8)

    def sums(images):
        return grey_levels(images) @ common.randn((192, 5), common.generator(9)).double().numpy() / 100

    train, test, images, pictures = noise(300, 1), noise(50, 2), noise(count, 3), {}
    images[:3] = torch.stack([train[17], train[5].flip(2), train[100] + 3])
    images[1, 0, 0, 0] += 1
    monkeypatch.setattr(fid, "extract", lambda extractor, images: (torch.tensor(sums(images)).float(), None))
    monkeypatch.setattr(common, "save_grid", lambda path, rows: pictures.update({path: rows}))
    setup = SimpleNamespace(data=SimpleNamespace(images=train), test=SimpleNamespace(images=test), extractor=None,
                            train={"unet_flip": mirrored}, changes={},
                            reference=SimpleNamespace(features=fid.extract(None, fid.shuffle(train))[0]))
    table, used = fid.copies(tmp_path, images, setup), min(count, 50)
    assert table.keys() == {"images", "pixels", "features"} and table["images"] == used
    for kind, features, unit in (("pixels", grey_levels, 192**0.5), ("features", sums, 1.0)):
        (generated, index), (held_out, _) = (brute_force(some[:used], train, mirrored, features)
                                             for some in (images, test))
        closer = generated <= np.quantile(held_out, 0.01)
        assert closer[:3].tolist() == [True, mirrored, True] and closer.mean() < 0.3
        assert table[kind] == {"generated": pytest.approx(generated.mean() / unit, rel=1e-3),
                               "held_out": pytest.approx(held_out.mean() / unit, rel=1e-4),
                               "closer": pytest.approx(closer.mean())}
    closest = generated.argsort()[:5]  # in the features
    rows, = pictures.values()
    assert list(pictures) == [tmp_path / "copies.png"] and list(rows) == ["generated", "nearest in training"]
    assert torch.equal(rows["generated"], images[closest])
    assert torch.equal(rows["nearest in training"], train[index[closest]]) and index[0] == 17


def test_copies_of_a_run_that_mirrors_its_images(tmp_path, monkeypatch):
    """Whether mirror images count is a setting of the run, which --set may have changed."""
    model, setup, _ = stub_samples(monkeypatch, {}, vae=None, priors={}, decode=len, stub_copies=False)
    seen, data, train = [], images_of(20), settings(unet_flip=False)
    monkeypatch.setattr(fid, "extract", lambda extractor, images: seen.append(len(images)) or (
        torch.zeros(len(images), 2), None))
    monkeypatch.setattr(common, "draw_training", lambda *how: {})
    reference = SimpleNamespace(features=torch.zeros(20, 2))
    setup = planted_setup(tmp_path, train, changes={"unet_flip": True}, **vars(setup) | {
        "data": data, "test": data, "reference": reference, "extractor": SimpleNamespace(name=""), "commit": ""})
    folder, settings_of_run = setup.folder_and_settings("bonus-latent")
    state = {"train": settings_of_run, "run_id": "", "seconds": 1.0, "seconds_before": 0.0, "log": []}
    metrics = fid.evaluate(folder, setup, state, model)
    assert seen == [40, 40]  # 20 images and their mirror images: of generated and of held-out ones
    # All features are equal. So every held-out image is a copy, and so is every generated one, at distance 0.
    assert metrics["tables"]["copies"]["features"]["closer"] == 1


# ---- Tables of a VAE -------------------------------------------------------------------------------------------------

def test_conclusions_about_the_latent():
    gen = common.generator(0)
    spread, flat = common.randn((500, 20), gen), 0.01 * common.randn((500, 20), gen)
    small, large = torch.full((500, 20), -4.0), torch.zeros(500, 20)
    for mu, logvar, sharpness, words in ((flat, large, 0.1, "collapse"), (spread, large, 0.1, "prior"),
                                         (spread, small, 0.1, "Gaussian decoder"),
                                         (spread, small, 0.9, "not overly smooth")):
        report = fid.diagnose(mu, logvar, sharpness)
        assert words in report["conclusion"]
    assert report["active_units"] == report["latent_dim"] == 20
    assert report["posterior_variance"] == pytest.approx(math.exp(-4))
    # the rules of thumb, on both sides: 1 of 20 units or of 21, a variance of 0.9, half the sharpness
    one_unit = torch.cat([spread[:, :1], flat[:, 1:], flat[:, :1]], 1)
    for mu, variance, sharpness, words in ((one_unit[:, :20], 0.89, 0.49, "Gaussian decoder"),
                                           (one_unit, 0.89, 0.49, "collapse"), (spread, 0.91, 0.49, "prior"),
                                           (spread, 0.89, 0.51, "not overly smooth")):
        report = fid.diagnose(mu, torch.full_like(mu, math.log(variance)), sharpness)
        assert words in report["conclusion"] and report["posterior_variance"] == pytest.approx(variance)
    report = fid.diagnose(one_unit, torch.cat([small, 0 * small[:, :1]], 1), 1.0)
    assert report["active_units"] == 1 and report["latent_dim"] == 21
    assert report["posterior_variance"] == pytest.approx((20 * math.exp(-4) + 1) / 21)


def mean_colours(images):
    """uint8 images (N, 3, H, W) -> planted features (N, 3)."""
    return images.float().mean((2, 3))


def test_measure_vae(tiny, tmp_path, monkeypatch):
    """x_hat = Dec(mu) of the first held-out images; refined by one that knows the real images, as sharp as they are.
    Images of 30 are compared with the sharpness of all 50."""
    real, count = images_of(50).images, 30
    batches, refine, pictures, sharpnesses, diagnose = [], common.refine, {}, [], fid.diagnose
    monkeypatch.setattr(common, "refine", lambda *how, **named: batches.append(
        (len(how[1]), how[3].initial_seed(), *how[4:6])) or refine(*how, **named))
    monkeypatch.setattr(fid, "diagnose", lambda *how: sharpnesses.append(how[2]) or diagnose(*how))
    monkeypatch.setattr(common, "save_grid", lambda path, rows, *titles: pictures.update({path.name: rows}))
    start = {30: 0, 20: 0, 10: 20}
    tiny.denoiser_for = lambda x_hat, z, clean: oracle(tiny.diffusion, common.to_float(
        real[:4] if len(z) == 4 else real[start[len(z)]:start[len(z)] + len(z)]))
    setup = SimpleNamespace(test=images_of(50), train={"seed": 2}, extractor=None,
                            evaluation={"grid_count": count, "sample_steps": 3, "batch": 20})
    monkeypatch.setattr(fid, "extract", lambda extractor, images: (mean_colours(images), None))
    tables = fid.measure_vae(tmp_path, tiny, setup)
    seed = common.SEEDS["reconstruction"] + 2
    assert batches == [(size, seed, "dpm", 3) for size in (20, 10)]
    all_mu, all_logvar = tiny.vae.encoder(common.to_float(real))
    mu, logvar = all_mu[:count], all_logvar[:count]
    found, x_hat = tables["reconstruction"], common.to_uint8(tiny.vae.decoder(mu))
    assert found["psnr_db"] == pytest.approx(fid.psnr_db(x_hat, real[:count]), rel=1e-3)
    assert found["kl_nats"] == pytest.approx(float(common.gaussian_kl(mu, logvar).mean()), rel=1e-3)
    assert found["hf_energy_vae"]["value"] == pytest.approx(fid.hf_energy(x_hat, real)["value"], rel=1e-2)
    sharpness = fid.hf_energy(real[:count], real)["value"]
    assert found["hf_energy_refined"]["value"] == pytest.approx(sharpness, rel=1e-4) and abs(sharpness - 1) > 0.001
    assert sharpnesses[-1] == found["hf_energy_vae"]["value"]
    for table, expected in ((tables["latent"], diagnose(mu, logvar, sharpnesses[-1])),
                            (tables["start"], fid.check_start(tiny.diffusion, x_hat, real[:count]))):
        assert table.pop("conclusion") == expected.pop("conclusion") and table == pytest.approx(expected, rel=1e-3)
    exact = -0.5 * (8 * math.log(2 * math.pi) + float((all_mu**2 + all_logvar.exp()).sum(1).mean()))
    assert tables["prior_log_density"]["gaussian"]["value"] == pytest.approx(exact, abs=4 * 2 / 50**0.5)
    shown = pictures["reconstructions.png"]
    assert list(shown) == ["real", "VAE", "refined"] and torch.equal(shown["real"], real[:12])
    assert (shown["VAE"].int() - x_hat[:12].int()).abs().max() <= 1
    assert (shown["refined"].int() - real[:12].int()).abs().max() <= 1
    # Three groups of ten, by the squared error of x_hat
    errors = (x_hat.double() - real[:count].double()).square().sum((1, 2, 3))
    assert tables["error_thirds"]["images"] == 10
    for name, third in zip(("low", "middle", "high"), errors.argsort().split(10), strict=True):
        ours, theirs = (fid.moments(mean_colours(images[third])) for images in (x_hat, real[:count]))
        of_third = {kind: score["fd_to_originals"] for kind, score in tables["error_thirds"][name].items()}
        assert of_third["vae"] == pytest.approx(fid.frechet_distance(ours, theirs), rel=0.02) and of_third["vae"] > 10
        assert of_third["refined"] == pytest.approx(0, abs=0.1)
    alone = fid.measure_vae(tmp_path, dataclasses.replace(tiny, denoiser_for=None), setup)
    assert alone["error_thirds"] == {name: {"vae": third["vae"]} if name != "images" else third
                                     for name, third in tables["error_thirds"].items()}
    assert "start" not in alone and alone["reconstruction"] == {
        key: value for key, value in found.items() if not key.endswith("_refined")}


def test_codes_whose_density_is_measured(tiny, tmp_path, monkeypatch):
    """z ~ q(z | x) of all held-out images, not mu, under each prior. Reconstructions are made of 1,000 at most."""
    codes, reconstructed, refine = {}, [], common.refine
    monkeypatch.setattr(common, "refine", lambda *how: reconstructed.append(len(how[1])) or refine(*how))

    def prior(name, density):
        return SimpleNamespace(log_prob=lambda z: codes.setdefault(name, z) is None or torch.full((len(z),), density),
                               sample=lambda count, gen: torch.zeros(count, 8))

    tiny.priors, tiny.denoiser_for = {"gaussian": prior("gaussian", -3.0), "gmm": prior("gmm", -2.0)}, None
    setup = SimpleNamespace(test=images_of(1001), train={"seed": 4}, extractor=SimpleNamespace(name="other"),
                            evaluation={"grid_count": 2000, "sample_steps": 3, "batch": 500})
    monkeypatch.setattr(fid, "error_thirds", lambda *how: None)
    table = fid.measure_vae(tmp_path, tiny, setup)["prior_log_density"]
    assert {name: density["value"] for name, density in table.items()} == {"gaussian": -3, "gmm": -2}
    mu, logvar = common.encode(tiny.vae, setup.test.images, CPU)
    noise = common.randn((1001, 8), common.generator(common.SEEDS["held_out_codes"] + 4))
    assert torch.allclose(codes["gmm"], mu + (0.5 * logvar).exp() * noise, atol=1e-4)
    assert torch.equal(codes["gmm"], codes["gaussian"]) and reconstructed == [500, 500]


def test_density_of_samples(tiny, tmp_path, monkeypatch):
    """By every prior, of samples of every prior. With N(0, I) and N(m, s^2 I) all four have closed forms. 1,000 samples
    are drawn of each, by a generator of its own."""
    m, s, asked = torch.arange(8.0) / 4, 0.5, []

    class Far(common.GaussianMixture):
        def sample(self, count, gen):
            asked.append((count, gen.initial_seed()))
            return super().sample(count, gen)

    tiny.priors["far"], tiny.denoiser_for = Far(torch.ones(1), m[None], s * torch.eye(8)[None]), None
    setup = SimpleNamespace(test=images_of(50), train={"seed": 4}, extractor=SimpleNamespace(name="other"),
                            evaluation={"grid_count": 20, "sample_steps": 3, "batch": 20})
    monkeypatch.setattr(fid, "error_thirds", lambda *how: None)
    table = fid.measure_vae(tmp_path, tiny, setup)["density_of_samples"]
    assert asked == [(1000, common.SEEDS["held_out_codes"] + 4)]
    unit, length = 8 * math.log(2 * math.pi), float(m @ m)
    expected = {("gaussian", "gaussian"): unit + 8, ("gaussian", "far"): unit + 8 * s**2 + length,
                ("far", "far"): unit + 16 * math.log(s) + 8,
                ("far", "gaussian"): unit + 16 * math.log(s) + (8 + length) / s**2}
    assert {(by, of) for by in table for of in table[by]} == expected.keys()
    for (by, of), value in expected.items():
        found = table[by][of]
        assert found["low"] < found["value"] < found["high"]
        assert abs(found["value"] + value / 2) < 2 * (found["high"] - found["value"]), (by, of)  # four standard errors
    assert table["far"]["gaussian"]["value"] < table["gaussian"]["far"]["value"] - 10  # they differ


@pytest.mark.parametrize("refined", [True, False])
def test_mixtures_by_size_by_hand(refined, tiny, tmp_path, monkeypatch):
    """For every size a mixture with one covariance is fitted to codes of training images. Samples from it alone are
    scored, as many as for other rows beside the headline. It gives a mean log-density to codes of held-out images."""
    measured, data = [], images_of(60)

    def measure(model, setup, prior, *how):
        measured.append((model, prior, how))
        return {"fd": score(float(len(measured))), "kid": score(7.0)}, None, None

    monkeypatch.setattr(fid, "measure", measure)
    monkeypatch.setattr(fid, "COMPONENTS", (2, 5, 601))  # each of 60 images has ten codes, too few for the last
    tiny.temperature, tiny.denoiser_for = 0.7, tiny.denoiser_for if refined else None
    test = images_of(50, seed=4)
    setup = SimpleNamespace(data=data, test=test, fd_key="fd", train={"seed": 3}, evaluation=common.EVAL | {
        "prior": "gaussian", "count": 40, "grid_count": 30, "sampler": "ddim", "sample_steps": 9})
    table = fid.by_components(tiny, setup)
    count, how = (30, ("ddim", 9, 30)) if refined else (40, ("none", 0, 40))
    assert table.keys() == {"images", "2", "5"} and table["images"] == count
    codes = common.draw_codes(tiny.vae, data.images, 3, CPU)
    mu, logvar = common.encode(tiny.vae, test.images, CPU)
    noise = common.randn(mu.shape, common.generator(common.SEEDS["held_out_codes"] + 3))
    held_out = mu + (0.5 * logvar).exp() * noise
    for i, components in enumerate((2, 5)):
        model, prior, asked = measured[i]
        mixture, = model.priors.values()
        expected = common.GaussianMixture.fit(codes, components, 3, tied=True)
        assert prior in model.priors and asked == how
        assert model.vae is tiny.vae and model.denoiser_for is tiny.denoiser_for and model.temperature == 0.7
        assert torch.equal(mixture.means, expected.means) and torch.equal(mixture.factors, expected.factors)
        assert mixture.means.shape == (components, 8) and mixture.factors.shape == (1, 8, 8)
        assert table[str(components)]["fd"] == score(i + 1.0)
        density = table[str(components)]["log_density"]
        assert density["value"] == pytest.approx(float(expected.log_prob(held_out).mean()), rel=1e-6)
        assert density["low"] < density["value"] < density["high"]
    assert tiny.priors.keys() == {"gaussian"}  # it was copied, not changed


def test_where_refinement_should_begin():
    """The noise over the signal, counted in standard deviations of the VAE's error. Six of them suffice."""
    real, x_hat = images_of(5).images, images_of(5, seed=2).images
    residual, all_times = float((x_hat.float() - real.float()).std()) / 127.5, []
    for start in range(1, T + 1):
        diffusion = common.Diffusion("eps", start=start)
        found, bar = fid.check_start(diffusion, x_hat, real), float(diffusion.alpha_bar[start])
        times = ((1 - bar) / bar) ** 0.5 / residual
        all_times.append(times)
        assert found["start"] == start and found["residual_sd"] == pytest.approx(residual, rel=1e-4)
        assert found["times"] == pytest.approx(times, rel=1e-4)
        assert ("early enough" if times >= 6 else "raise `start`") in found["conclusion"]
        assert f"t = {start}, with noise {times:.1f} times" in found["conclusion"]
    assert any(5.9 < times < 6 for times in all_times) and any(6 < times < 6.1 for times in all_times)


def test_trajectory(tiny, tmp_path, monkeypatch):
    """Two rows for each of four codes of a prior: from x_hat over four x_t, or over what is predicted from them, to the
    image. The first and the last step are among them."""
    pictures, real = [], images_of(4).images
    monkeypatch.setattr(common, "save_grid", lambda *how: pictures.append(how))
    tiny.diffusion = common.Diffusion("v", start=400)
    tiny.denoiser_for = lambda x_hat, z, clean: oracle(tiny.diffusion, common.to_float(real))
    z = torch.randn(4, 8, generator=common.generator(common.SEEDS["trajectory"] + 3))
    x_hat = common.to_uint8(tiny.vae.decoder(z))
    for steps, indices in ((7, [7, 5, 3, 1]), (4, [4, 3, 2, 1]), (1, [1, 1, 1, 1])):
        setup = SimpleNamespace(evaluation={"sample_steps": steps}, train={"seed": 3})
        fid.draw_trajectory(tmp_path, tiny, "gaussian", setup)
        path, rows, titles = pictures.pop()
        times = [common.time_grid(400, steps)[i] for i in indices]
        assert path == tmp_path / "trajectory.png" and titles == ["x_hat", *(f"t = {t}" for t in times), "image"]
        assert list(rows) == [f"{k} {label}" for k in (1, 2, 3, 4) for label in ("x_t", "x0")]
        for k in range(4):
            for row in (rows[f"{k + 1} x_t"], rows[f"{k + 1} x0"]):
                assert len(row) == 6 and torch.equal(row[0], x_hat[k])
                assert (row[5].int() - real[k].int()).abs().max() <= 1
            assert (rows[f"{k + 1} x0"][1:5].int() - real[k].int()).abs().max() <= 1
            mean = tiny.diffusion.x0_scale[400] * common.to_float(x_hat[k])
            assert float((common.to_float(rows[f"{k + 1} x_t"][1]) - mean).std()) > 0.5  # noise, cut off at white
            errors = [float((image.float() - real[k].float()).std()) for image in rows[f"{k + 1} x_t"][1:5]]
            assert steps == 1 or errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[0]


@pytest.mark.parametrize("with_vae", [True, False])
def test_bits_per_dim_by_hand(with_vae, tiny, monkeypatch):
    """Parts in nats, by how many pixel values times log 2 they are divided; the bound is their sum. `kl` is that of q
    and the prior that is named, and x_hat is decoded from the same z."""
    seen, nats = {}, {"prior": torch.tensor([1.0, 3.0]), "diffusion": torch.tensor([10.0, 20]), "data": torch.ones(2)}

    def diffusion_nats(diffusion, denoise, images, x_hat, draws, gen):
        seen.update(images=images, x_hat=x_hat, draws=draws, denoise=denoise, seed=gen.initial_seed(),
                    reduced=torch.is_autocast_enabled("cpu"))
        return dict(nats)

    monkeypatch.setattr(common, "diffusion_nats", diffusion_nats)
    tiny.denoiser_for = lambda x_hat, z, clean: (x_hat, z)
    tiny.priors["far"] = SimpleNamespace(log_prob=lambda z: torch.tensor([-100.0, -300.0]))
    if not with_vae:
        tiny.vae = None
    setup = SimpleNamespace(test=images_of(9), train={"seed": 3}, evaluation={"bits_images": 2, "bits_draws": 5})
    for tiny.reduced in (True, False):
        fid.bits_per_dim(tiny, "far", setup)
        assert seen["reduced"] == tiny.reduced and seen["seed"] == common.SEEDS["bits_per_dim"] + 3
    table = fid.bits_per_dim(tiny, "far", setup)
    assert torch.equal(seen["images"], setup.test.images[:2]) and seen["draws"] == 5
    x_hat, z = seen["denoise"]
    assert seen["x_hat"] is x_hat and (z is None) == (not with_vae)
    parts = dict(nats)
    if with_vae:
        mu, logvar = tiny.vae.encoder(common.to_float(setup.test.images[:2]))
        assert torch.equal(tiny.vae.decoder(z), x_hat) and not torch.allclose(z, mu, atol=0.05)
        log_q = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1)
        parts["kl"] = log_q + torch.tensor([100.0, 300.0])
    unit = 3 * 32 * 32 * math.log(2)
    assert table.keys() == {"bound", "images", "latent_prior", *parts}
    assert (table["images"], table["latent_prior"]) == (2, "far")
    assert {name: table[name] for name in parts} == {
        name: pytest.approx(float(value.mean()) / unit, rel=1e-5) for name, value in parts.items()}
    total = sum(parts.values()) / unit
    assert table["bound"] == pytest.approx(fid.mean_score(total), rel=1e-5)


# ---- What is printed -------------------------------------------------------------------------------------------------

def test_what_is_printed(tmp_path, capsys):
    """Every row, and every column has its own number; paths and notes follow."""
    def row(steps, fd):
        return {"prior": "gmm", "sampler": "dpm", "steps": steps, "nfe": 2 * steps, "n_generated": 60 + steps,
                "seconds_per_image": 0.125, "fd_local": score(fd),
                "floor_local": {"value": 0.5, "low": None, "high": None},
                "is_local": score(6.0), "precision_local": score(0.7), "recall_local": score(0.3),
                "hf_energy": score(0.9), "kid_local": score(9.0)}

    setup = SimpleNamespace(fd_key="fd_local", extractor=SimpleNamespace(name="local-toy-1", suffix="_local", dim=64),
                            data=SimpleNamespace(name="toy", note="JPEG copies"))
    folders = [tmp_path / "form1-s0", tmp_path / "form2-s0"]
    for folder in folders:
        common.write(folder / "b.png", b"")
        common.write(folder / "a.png", b"")
    fid.print_results({folder: {"run": {"variant": folder.name[:5]}, "rows": [row(10, 3.0), row(6, 4.0)]}
                       for folder in folders}, setup)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "" and lines[1].split() == [
        "variant", "prior", "sampler", "images", "sec/image", "fd_local", "floor_local", "is_local", "precision_local",
        "recall_local", "hf_energy"]
    first = ("form1 gmm dpm 10 70 0.125 3.00 [2.00, 4.00] 0.500 6.00 [5.00, 7.00] 0.700 [-0.300, 1.70] "
             "0.300 [-0.700, 1.30] 0.900 [-0.100, 1.90]")
    second = first.replace("dpm 10 70", "dpm 6 66").replace("3.00 [2.00, 4.00]", "4.00 [3.00, 5.00]")
    first, second = first.split(), second.split()
    assert [line.split() for line in lines[2:6]] == [
        first, second, ["form2", *first[1:]], ["form2", *second[1:]]] and lines[6] == ""
    assert all(fact in lines[7] for fact in ("local-toy-1", "toy (JPEG copies)", "fewer than 640"))
    assert lines[8:] == [f"{folder}{os.sep}{name}" for folder in folders for name in ("a.png", "b.png", "metrics.json")]
