"""Training: a run that was stopped and resumed has every bit of one that never was; wrong kernels do no harm; the loop
and Muon by hand; several processes.

Run as a program, this file is a stage's command on few images: python test_training.py STAGE {scores,none} FLAGS.
"""

import argparse
import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, draw_all, expect_error, images_of, plant_wrong_bfloat16, same, settings, small_shapes
from torch import distributed, nn

import bonus_latent as bonus
import common
import fid
import stage1_baseline as stage1
import stage2_joint as stage2
import stage3_adaptive as stage3

SMOKE = ["--budget", "smoke", "--device", "cpu"]
COMMANDS = {"stage1": stage1.main, "stage2": stage2.main, "stage3": stage3.main, "bonus": bonus.main}
NETWORKS = {"vae", "unet"}  # names of weights in checkpoints
FLAGS = {"stage1": [], "stage2": ["--loss", "kendall"], "stage3": [], "bonus": []}
DRAWING = {"dropout": 0.2, "vae_flip": True, "unet_flip": True, "every": 3, "batch": 4,  # all kinds of random draws
           "vae_muon_lr": 0.01, "unet_muon_lr": 0.01}  # and both optimisers are used
RUNS = {"stage1": ("stage1-vae", "stage1-form1"), "stage2": ("stage2-kendall",),
        "stage3": ("stage3-vae-flow", "stage3-flow-film"), "bonus": ("bonus-ae", "bonus-latent")}


# --- The four stages, stopped and resumed -----------------------------------------------------------------------------

def clock(now):
    """In place of the module `time`: now() is the time in seconds."""
    return SimpleNamespace(time=now, perf_counter=time.perf_counter)


def simplify(change, train=None, scores=False):
    """Make commands quick by `change(module, name, value)`: few images, and the smoke settings with those in `train`.
    Without `scores`, nothing is evaluated, there are 100 images, and a checkpoint is saved every tenth step."""
    smoke, savings = common.budget, {"device": "", "sampler_steps": 0, "batch": 0, "saved_percent": {}}
    path = {"path_over_distance": 1.0, "end_distance": 1.0}
    tables = {"savings": savings, "uncertainty": {}, "adaptivity": {}, "components": {},
              "latent_space": {"slerp": {"refined": path}}}
    change(common, "draw_shapes", small_shapes)
    if not scores:
        change(common, "budget", lambda *args: (smoke(*args)[0] | (train or {}), smoke(*args)[1]))
        change(common, "draw_shapes", lambda count, seed: draw_all(count // 200, seed))
        change(common, "time", clock(itertools.count(0, 6).__next__))
        change(fid, "load_extractor", lambda *a: SimpleNamespace(name="none", suffix="_local"))
        change(fid, "evaluate", lambda folder, *a: {"run": {}, "tables": tables})
        change(fid, "print_results", lambda *a: None)


@pytest.fixture
def few(monkeypatch):
    simplify(monkeypatch.setattr, DRAWING)


def run(name, home, *flags):
    """Run a stage's command in this process. Returns its checkpoints and logs."""
    COMMANDS[name]([*SMOKE, *FLAGS[name], "--out", str(home), *flags])
    return results(name, home)


def results(name, home):
    """The checkpoint and the log of every network that a stage's command has trained."""
    folders = [home / "shapes-smoke" / f"{one}-s0" for one in RUNS[name]]
    return [(common.load_checkpoint(folder / "checkpoint.pt"), (folder / "log.csv").read_text()) for folder in folders]


def after_each_step(patch, action):
    """From here on, call `action(training)` after every training step (not after those that only try bfloat16)."""
    step = common.Training.step

    def step_and_act(training, *args, **options):
        step(training, *args, **options)
        if training.trial is None:
            action(training)

    patch.setattr(common.Training, "step", step_and_act)


def signal_after(patch, step, number=signal.SIGTERM):
    """Send this process a signal after that many training steps, counted over all networks. Returns a list that grows
    by one with each step."""
    steps = []

    def count(training):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)

    after_each_step(patch, count)
    return steps


@pytest.fixture(scope="module", params=COMMANDS)
def whole(request, tmp_path_factory):
    """A stage, and the results of a run that was never stopped, with 8 steps of each network."""
    with pytest.MonkeyPatch.context() as patch:
        simplify(patch.setattr, DRAWING)
        return request.param, run(request.param, tmp_path_factory.mktemp(request.param))


def test_seconds_of_what_a_run_builds_on(whole):
    """Seconds before are those of the VAE for a refiner, and of the autoencoder for its U-Net. Others have none."""
    _, ((first, _), *others) = whole
    assert first["seconds"] > 0 == first["seconds_before"]
    assert [state["seconds_before"] for state, _ in others] == [first["seconds"]] * len(others)


def test_another_seed_agrees_in_no_network(whole, few, tmp_path):
    name, expected = whole
    assert all(state["finished"] and [row["step"] for row in state["log"]] == [3, 6] for state, _ in expected)
    COMMANDS[name]([*SMOKE, *FLAGS[name], "--out", str(tmp_path), "--seed", "1"])
    for (state, _), folder in zip(expected, RUNS[name], strict=True):
        other = common.load_checkpoint(tmp_path / "shapes-smoke" / f"{folder}-s1" / "checkpoint.pt")
        assert not any(same(state[part], other[part]) for part in NETWORKS & state.keys())


@pytest.mark.parametrize("number,share", [(signal.SIGTERM, 3 / 8), (signal.SIGTERM, 1 / 2), (signal.SIGINT, 13 / 16)])
def test_stopped_and_resumed_is_never_stopped(number, share, whole, few, tmp_path, monkeypatch, capsys):
    """A signal arrives while the first network trains, after its last step, or while the last network trains. The run
    is saved, and the status is 128 + the signal's number. Without --resume the next command fails. With it, weights and
    log have the bits of a run that was never stopped, and the run keeps its id. The same holds if the first network's
    older, unfinished checkpoint is copied over its finished one."""
    name, expected = whole
    steps = signal_after(monkeypatch, round(share * 8 * len(expected)), number)
    with pytest.raises(SystemExit) as stop:
        run(name, tmp_path / "a")
    assert stop.value.code == 128 + number and "--resume" in capsys.readouterr().err
    shutil.copytree(tmp_path / "a", tmp_path / "unfinished")
    for again in (False, True) if share == 3 / 8 else (False,):
        expect_error(capsys, lambda: run(name, tmp_path / "a"), "--resume")
        torch.manual_seed(123)  # what the process did before must not matter
        assert same(run(name, tmp_path / "a", "--resume"), expected)
        assert again or len(steps) == 8 * len(expected)  # no step was made twice
        assert all(common.load_checkpoint(path)["run_id"] ==
                   common.load_checkpoint(tmp_path / "a" / path.relative_to(tmp_path / "unfinished"))["run_id"]
                   for path in (tmp_path / "unfinished").rglob("checkpoint.pt"))
        shutil.copytree(tmp_path / "unfinished", tmp_path / "a", dirs_exist_ok=True)


def test_a_signal_while_the_last_checkpoint_is_written_stops_the_run(tmp_path, monkeypatch, capsys):
    """It must not be lost: nothing is fitted or measured after it. A message says how to go on."""
    def checkpoint(training):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(common.Training, "checkpoint", checkpoint)
    with pytest.raises(SystemExit) as stop:
        stage1.train_vae(tmp_path / "run", settings(steps=2), SimpleNamespace(images=draw_all(40, 0)[0]), CPU)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped at step 2; continue with --resume" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says there how much memory is held")
def test_memory_stays_flat(tmp_path, monkeypatch, request):
    """150 more steps hold no more memory, even if cycles of references are never collected."""
    held = []  # MB, after each step

    def measure(training):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    after_each_step(monkeypatch, measure)
    train = settings(encoder=[[16, 8, 0], [1, 8, 0]], decoder=[[1, 8, 0], [16, 8, 0]], unet=[[16, 8, 0, 1]], batch=1,
                     attention=[], image_size=16, vae_lr=1e-5, vae_muon_lr=1e-5, steps=200, every=200, loss="sum",
                     gradient="full", diffusion_weight=1.0)
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    stage2.train_joint(tmp_path / "run", train, SimpleNamespace(images=draw_all(40, 0)[0][..., ::2, ::2]), CPU)
    assert len(held) == 200 and held[-1] - held[49] < 8  # the activations of 150 steps are more than 20


# --- Reduced precision ------------------------------------------------------------------------------------------------

def reported(capsys):
    """The names in the lines which say that float32 is used instead of bfloat16."""
    return re.findall(r"(\S+): bfloat16 .* differ from float32's by \d+%, .* float32 is used", capsys.readouterr().err)


REPORTED = {"stage1": ["stage1-vae-s0", "vae", "stage1-form1-s0", "form1"], "stage2": ["stage2-kendall-s0", "joint"],
            "stage3": ["stage3-vae-flow-s0", "vae", "stage3-flow-film-s0", "film"],
            "bonus": ["bonus-ae-s0", "bonus-latent-s0", "latent"]}  # the networks that are trained, the models


def train_in(name, folder, native, monkeypatch, capsys, wrong=False):
    """Run a stage's command with or without fast bfloat16, whose kernels may be wrong. Returns its results, and the
    names that were reported."""
    with monkeypatch.context() as patch:
        patch.setattr(common, "fast_bfloat16", lambda device: native)
        if wrong:
            plant_wrong_bfloat16(patch)
        return run(name, folder, "--steps", "3"), reported(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_kernels_cost_no_more_than_speed(name, few, tmp_path, monkeypatch, capsys):
    """With wrong kernels for bfloat16, a line says so for each network that is trained and for each model that samples.
    The results have the bits of float32, for which there is no line."""
    float32, names = train_in(name, tmp_path / "float32", False, monkeypatch, capsys)
    assert names == []
    found, names = train_in(name, tmp_path / "wrong", True, monkeypatch, capsys, wrong=True)
    assert same(found, float32) and names == REPORTED[name]


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_trying_bfloat16_changes_no_bit(name, few, tmp_path, monkeypatch, capsys):
    """With right kernels, training uses bfloat16, and its results are those of a run that did not try it first."""
    found, names = train_in(name, tmp_path / "tried", True, monkeypatch, capsys)
    monkeypatch.setattr(common.Training, "try_reduced_precision", lambda training: ())
    untried, _ = train_in(name, tmp_path / "untried", True, monkeypatch, capsys)
    float32, _ = train_in(name, tmp_path / "float32", False, monkeypatch, capsys)
    assert names == [] and same(found, untried) and not any(map(same, found, float32))


def test_a_wrong_kernel_behind_zero_weights_is_found(tmp_path, monkeypatch, capsys):
    """The first convolution of a residual block is wrong. At the start of training nothing shows that, since the second
    one has zero weights. The trial uses other weights, and then restores these."""
    def train(folder, native):
        monkeypatch.setattr(common, "fast_bfloat16", lambda device: native)
        return stage1.train_refiner(tmp_path / folder, settings(steps=2), "uncond", {}, images_of(40), CPU)

    plant_wrong_bfloat16(monkeypatch, lambda conv: conv.weight.shape == (16, 8, 3, 3))
    float32 = train("float32", native=False)
    assert same(train("tried", native=True), float32) and reported(capsys) == ["tried"]


def test_a_run_goes_on_as_it_began(tmp_path, monkeypatch, capsys):
    """One that began in float32 stays in float32, though bfloat16 is fast now. One that began in bfloat16 stays in it,
    unless the processor lacks it. One that began on another kind of device is refused, since the state of its random
    numbers belongs to that device."""
    def begin(fast, has=True):
        monkeypatch.setattr(common, "fast_bfloat16", lambda device: fast)
        monkeypatch.setattr(common, "has_bfloat16", lambda device: has)
        vae = common.build_vae(settings())
        return common.Training(tmp_path, settings(), CPU, images_of(20).images, 8, False, vae=vae)

    for fast in (False, True):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            signal_after(patch, 2)
            training = begin(fast)
            for x0 in training:
                training.step(stage1.vae_loss(training.networks["vae"], x0, training.normal(8), 1.0)[0], {})
    assert training.steps_taken == 4 and not training.reduced
    assert begin(True).reduced is False
    path = tmp_path / "checkpoint.pt"
    common.save_state(path, common.load_checkpoint(path) | {"reduced": True})
    assert begin(False).reduced is True and begin(False, has=False).reduced is False
    common.save_state(path, common.load_checkpoint(path) | {"device": "cuda"})
    expect_error(capsys, lambda: begin(True), str(tmp_path), "--device cuda")


# --- One folder, several commands -------------------------------------------------------------------------------------

def test_one_process_trains_in_a_folder(few, tmp_path, monkeypatch, capsys):
    """While one process trains, before its first checkpoint and after, another one in its folder is refused, with its
    settings and with others. The line names the folder and does not advise removing it. A finished VAE is shared. The
    first process ends as if it had been alone, and then the second one is let in."""
    home, argv = tmp_path / "a" / "shapes-smoke", [*SMOKE, "--variant", "vae", "uncond", "--out"]
    refused = []

    def second_process(training):
        if training.folder != home / "stage1-uncond-s0" or training.steps_taken not in (2, 5):
            return
        if training.steps_taken == 5:
            training.checkpoint()
        for flags in ([], ["--resume"], ["--variant", "uncond", "--steps", "9"]):
            expect_error(capsys, lambda flags=flags: stage1.main([*argv, str(tmp_path / "a"), *flags]),
                         f"error: {training.folder}: another process is training there; wait for it")
            refused.append(flags)

    after_each_step(monkeypatch, second_process)
    for name in "ba":
        stage1.main([*argv, str(tmp_path / name)])
    alone, first = ([common.load_checkpoint(path) for path in sorted(tmp_path.glob(f"{name}/*/*/checkpoint.pt"))]
                    for name in "ba")
    assert len(refused) == 6 and len(first) == 2 and same(first, alone)
    assert all(json.loads(path.read_text())["train"] == first[0]["train"] for path in home.glob("*/config.json"))
    stage1.main([*argv, str(tmp_path / "a")])


def test_a_folder_is_locked_until_its_run_is_finished(few, tmp_path, monkeypatch, capsys):
    """Also while a prior is fitted after the last step. (A second process would put its unfinished checkpoint in the
    place of the finished one.) If that fails, the run can be resumed."""
    fit, argv, during = common.fit_mixture, [*SMOKE, "--variant", "vae", "--out", str(tmp_path)], []

    def fail_once(*arguments):
        during.append(1)
        if len(during) == 1:
            raise MemoryError
        expect_error(capsys, lambda: stage1.main([*argv, "--resume"]), "another process is training there; wait for it")
        return fit(*arguments)

    monkeypatch.setattr(common, "fit_mixture", fail_once)
    with pytest.raises(MemoryError):
        stage1.main(argv)
    gc.collect()  # a process that has failed holds no lock
    stage1.main([*argv, "--resume"])
    assert len(during) == 2 and common.load_checkpoint(tmp_path / "shapes-smoke" / "stage1-vae-s0" /
                                                       "checkpoint.pt")["finished"]


def test_changed_settings_and_the_runs_that_they_make(few, tmp_path, monkeypatch):
    """What matters to the U-Net alone leaves the VAE as it is, which is then not trained again; so with the autoencoder
    and with stage 3's VAE. Other changes make another VAE. `guidance` makes another `guided`, and nothing else. The
    same command with the same --set trains nothing, and other values are other runs."""
    trained = []
    after_each_step(monkeypatch, lambda training: trained.append((training.folder.name, training.all_steps)))

    def runs(name, *flags):
        trained.clear()
        COMMANDS[name]([*SMOKE, "--steps", "2", "--out", str(tmp_path), *flags])
        return {folder: steps for folder, steps in trained}

    def train_of(name):
        return common.load_checkpoint(tmp_path / "shapes-smoke" / name / "checkpoint.pt")["train"]

    assert runs("stage1") == {"stage1-vae-s0": 2, "stage1-form1-s0": 2}
    assert runs("stage1", "--set", "start=300") == {"stage1-form1-start=300-s0": 2}
    assert train_of("stage1-form1-start=300-s0") == train_of("stage1-form1-s0") | {"start": 300}
    assert runs("stage1", "--set", "start=300") == {}
    assert runs("stage1", "--set", "beta=0.5", "unet_steps=3", "vae_steps=1") == {
        "stage1-vae-beta=0.5-vae_steps=1-s0": 1, "stage1-form1-beta=0.5-unet_steps=3-vae_steps=1-s0": 3}
    assert train_of("stage1-vae-beta=0.5-vae_steps=1-s0") == train_of("stage1-vae-s0") | {"beta": 0.5, "vae_steps": 1}
    assert runs("stage1", "--variant", "vae", "uncond", "--set", "beta=0.5", "unet_steps=3", "vae_lr=0.1") == {
        "stage1-vae-beta=0.5-vae_lr=0.1-s0": 2, "stage1-uncond-unet_steps=3-s0": 3}
    assert train_of("stage1-uncond-unet_steps=3-s0") == train_of("stage1-vae-s0") | {"unet_steps": 3}
    assert runs("stage1", "--variant", "guided", "--set", "guidance=0.9", "unet_steps=15") == {
        "stage1-form1-unet_steps=15-s0": 15, "stage1-guided-guidance=0.9-unet_steps=15-s0": 2}
    assert runs("stage1", "--variant", "guided", "--set", "unet_steps=15") == {"stage1-guided-unet_steps=15-s0": 2}
    assert train_of("stage1-guided-guidance=0.9-unet_steps=15-s0") == train_of("stage1-form1-s0") | {
        "unet_steps": 2, "guidance": 0.9}
    assert runs("stage2", "--from-vae", "--set", "start=300") == {"stage2-anneal-from-vae-start=300-s0": 2}
    assert runs("stage3", "--set", "unet_lr=0.001") == {
        "stage3-vae-flow-s0": 2, "stage3-flow-film-unet_lr=0.001-s0": 2}
    refiner, vae = train_of("stage3-flow-film-unet_lr=0.001-s0"), train_of("stage3-vae-flow-s0")
    assert refiner["unet_lr"] == 0.001 and vae["unet_lr"] == 2e-3
    assert runs("stage3", "--set", "start=300") == {"stage3-flow-film-start=300-s0": 2}
    assert runs("stage3", "--set", "flow_steps=3") == {
        "stage3-vae-flow-flow_steps=3-s0": 2, "stage3-flow-film-flow_steps=3-s0": 2}
    assert runs("bonus", "--set", "vae_lr=0.001", "even_levels=false") == {
        "bonus-ae-vae_lr=0.001-s0": 2, "bonus-latent-vae_lr=0.001-even_levels=False-s0": 2}
    assert train_of("bonus-ae-vae_lr=0.001-s0")["vae_lr"] == 0.001
    assert runs("bonus", "--set", "vae_lr=0.001", "objective=eps") == {
        "bonus-latent-vae_lr=0.001-objective=eps-s0": 2}


@pytest.mark.parametrize("train_vae", [stage1.train_vae, stage3.train_vae, bonus.train_autoencoder])
def test_what_matters_to_the_unet_alone_changes_no_bit_of_the_vae(train_vae, tmp_path):
    """All settings that count as such are changed."""
    others = {"unet_muon_lr": 0.0, "unet_lr": 1.0, "unet_clip": 9.0, "unet_steps": 2, "unet_ema": 0.0,
              "unet_flip": True, "unet": [[32, 8, 0, 1]], "objective": "eps", "even_levels": False, "start": 9,
              "dropout": 0.3, "heads": 2, "attention": [8], "guidance": 3.0}
    plain = settings(vae_steps=3, dropout=0.0, ae_width=16)
    assert others.keys() == {key for key in plain if key.startswith(common.OF_UNET)}
    assert all(plain[key] != value for key, value in others.items())
    a, b = (train_vae(tmp_path / str(len(train)), train, images_of(60), CPU)
            for train in (plain, plain | others | {"another": 0}))
    assert same(a | {"train": None}, b | {"train": None}) and a["train"] == plain


def test_what_matters_to_the_vae_alone_changes_no_bit_of_uncond(tmp_path):
    """All settings that count as such are changed, and `start`."""
    others = {"vae_muon_lr": 0.0, "vae_lr": 1.0, "vae_clip": 9.0, "vae_steps": 2, "vae_ema": 0.0, "vae_flip": True,
              "encoder": [], "decoder": [], "pool": True, "beta": 3.0, "components": 5, "tied": True}
    plain = settings(unet_steps=3)
    assert others.keys() == {key for key in plain if key.startswith(common.OF_VAE)}
    assert all(plain[key] != value for key, value in others.items())
    a, b = (stage1.train_refiner(tmp_path / str(len(train)), train, "uncond", None, images_of(60), CPU)
            for train in (plain, plain | others | {"start": 9, "another": 0}))
    assert same(a | {"train": None}, b | {"train": None})


# --- The loop by hand -------------------------------------------------------------------------------------------------

def train_weights(folder, loss, watch=dict, names=("net",), **changes):
    """Train networks of one weight each, which start at 1, in float32. `loss(i, *weights)` is the loss of step i, from
    0 on. Adam moves a weight by the learning rate, whatever the gradient."""
    networks = {name: nn.Linear(1, 1, bias=False) for name in names}
    for network in networks.values():
        nn.init.ones_(network.weight)
    rates = {"lr": 0.1, "muon_lr": 0.0, "clip": 0.0, "ema": 0.9}
    rates = {f"{name}_{key}": value for name in names for key, value in rates.items()}
    train = settings(**{"batch": 2} | rates | changes)
    training = common.Training(folder, train, CPU, torch.zeros(9, 1, 1, 1), train["unet_steps"], False, **networks)
    training.reduced = False
    for _ in training:
        weights = {name: network.weight.sum() for name, network in networks.items()}
        value = loss(training.steps_taken, *weights.values())
        training.step(value.expand(2), {"loss": value} | weights, watch)
    return training


def test_log_by_hand(tmp_path):
    """Every row of the log holds the means since the last row and what was watched. log.csv is a copy. A run of fewer
    steps than `every` has one row."""
    calls = []
    training = train_weights(tmp_path, lambda i, w: 0 * w + i, steps=8, every=3,
                             watch=lambda: calls.append(1) or {"seen": len(calls)})
    rows = [{"step": 3, "loss": 1.0, "net": 1.0, "seen": 1}, {"step": 6, "loss": 4.0, "net": 1.0, "seen": 2}]
    assert training.log == rows and len(calls) == 2 and training.finish()["log"] == rows
    assert (tmp_path / "log.csv").read_text() == "step,loss,net,seen\n3,1.0,1.0,1\n6,4.0,1.0,2\n"
    # If the copy cannot be written (another program has it open, say), training goes on.
    (tmp_path / "open" / "log.csv").mkdir(parents=True)
    assert len(train_weights(tmp_path / "open", lambda i, w: 0 * w + i, steps=3, every=3).log) == 1
    for steps, at, mean in ((1, 1, 0.0), (2, 2, 0.5), (5, 3, 1.0)):
        row, = train_weights(tmp_path / str(steps), lambda i, w: 0 * w + i, steps=steps, every=3).log
        assert (row["step"], row["loss"]) == (at, mean)


@pytest.mark.parametrize("steps,bad", [(8, 3), (6, 5), (6, 6), (1, 1)])
def test_what_is_not_finite(steps, bad, tmp_path, capsys):
    """One line names the run, what is not finite, and the step at which the next row of the log is due. There is no
    checkpoint, and the line says so. `root` has a finite loss with an infinite gradient, which ruins the weights; in
    the last step no later loss shows it."""
    for kind, loss in {"nan": lambda w: w * math.nan, "inf": lambda w: w * math.inf,
                       "root": lambda w: (0 * w).sqrt()}.items():
        word = "net" if kind == "root" else "loss"
        expect_error(capsys, lambda kind=kind, loss=loss: train_weights(
            tmp_path / kind, lambda i, w: loss(w) if i + 1 == bad else w, steps=steps, every=4),
            f"{kind}: ", word, f"step {4 if bad == 3 else steps}", "nothing was saved")
        assert not (tmp_path / kind / "checkpoint.pt").exists()


def test_what_is_not_finite_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    """The line says that there is one. It is that of the step before. All flags that the line names exist."""
    monkeypatch.setattr(common, "time", clock(itertools.count(0, 61).__next__))  # each step is saved
    with pytest.raises(SystemExit):
        train_weights(tmp_path, lambda i, w: w * (math.nan if i == 5 else 1), steps=8, every=8)
    message, parser = capsys.readouterr().err, argparse.ArgumentParser()
    common.add_flags(parser)
    named = re.findall(r"--[a-z-]+", message)
    assert "step 6; its last checkpoint is older than that" in message
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["steps"] == 5
    assert named and all(flag in parser.format_help() for flag in named)


def test_rates_clips_and_averages_by_hand(tmp_path):
    """Each network has its own learning rate (with warm-up and decay), largest gradient (0: no limit) and moving
    average (with decay 0, a copy of the weights)."""
    training = train_weights(tmp_path, lambda i, a, b: 2 * a + 3 * b, names=("a", "b"), steps=10, every=1, warmup=0.2,
                             b_lr=0.2, a_clip=0.5, a_ema=0.4, b_ema=0.0)
    shares = [min(1, (i + 1) / 2, (10 - i) / 8) for i in range(10)]  # 0.5, 1, 1, 7/8, ... 1/8
    average, a = 1.0, 1.0
    for n, share in enumerate(shares, 1):
        assert training.log[n - 1]["a"] == pytest.approx(a, abs=1e-5)
        assert training.log[n - 1]["b"] == pytest.approx(2 * a - 1, abs=1e-5)  # b has twice the rate
        a -= 0.1 * share
        average += (1 - min(0.4, (1 + n) / (10 + n))) * (a - average)  # 2/11, 3/12, ... 6/15, 0.4, 0.4
    gradients = [float(network.weight.grad) for network in training.networks.values()]
    assert gradients == pytest.approx([0.5, 3.0], rel=1e-4)
    averages = training.finish()
    assert float(averages["a"]["weight"]) == pytest.approx(average, abs=1e-5)
    assert torch.equal(averages["b"]["weight"], training.networks["b"].weight.detach())


def test_learning_rate_end_points():
    """The rate rises over a share or a number of the steps, from above 0. It would fall to 0 after the last step."""
    rate = partial(common.learning_rate, 2.0, decay=True)
    assert rate(0, 100, 0.1) == pytest.approx(0.2) and rate(9, 100, 0.1) == 2 and rate(100, 100, 0.1) == 0
    assert rate(99, 100, 0.1) == pytest.approx(2 / 90) and rate(99, 100, 0.1, decay=False) == 2
    assert rate(0, 100, 20) == pytest.approx(0.1) and rate(19, 100, 20) == 2
    assert rate(0, 1, 0.1) == 2 and all(0 < rate(s, n, 0.1) <= 2 for n in range(1, 9) for s in range(n))


def test_seconds_by_hand(tmp_path, monkeypatch):
    """A run has the seconds of its training, before it was stopped and after, and of what comes after the last step.
    The time in between does not count."""
    now = [1000.0]
    monkeypatch.setattr(common, "time", clock(lambda: now[0]))

    def loss(i, w):
        now[0] += 7
        return w

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_after(patch, 3)
        train_weights(tmp_path, loss, steps=5)
    assert common.load_checkpoint(tmp_path / "checkpoint.pt")["seconds"] == 21
    now[0] += 10_000
    training = train_weights(tmp_path, loss, steps=5)
    now[0] += 100
    state = training.finish(4000.0, mixture="fitted")
    assert (state["seconds"], state["seconds_before"], state["mixture"]) == (35 + 100, 4000, "fitted")


# --- Losses of noise levels -------------------------------------------------------------------------------------------

def levels_of(folder, **changes):
    """A Training of two images in a step, in float32, and a Diffusion for it."""
    train = settings(**{"batch": 2} | changes)
    training = common.Training(folder, train, CPU, torch.zeros(9, 1, 1, 1), 8, False)
    training.reduced = False
    return training, common.Diffusion("v", start=train["start"])


def test_even_levels_by_hand(tmp_path):
    """Each level's mean begins at 1 and moves by a twentieth towards the mean loss of the step's images at that level.
    A level without images keeps its mean. An image's loss is divided by the mean of its own level, and so is its
    gradient: the mean counts as a constant."""
    training, diffusion = levels_of(tmp_path, start=400)
    expected = torch.ones(20)
    for losses, times, moved in (([4.0, 8.0, 3.0], [1, 20, 21], {0: 6.0, 1: 3.0}),  # a level has 20 of the 400 times
                                 ([2.0, 5.0, 7.0], [19, 381, 400], {0: 2.0, 19: 6.0}),
                                 ([9.0, 0.0, 1.0], [380, 200, 201], {18: 9.0, 9: 0.0, 10: 1.0})):
        loss, t = torch.tensor(losses, requires_grad=True), torch.tensor(times)
        found = training.even_levels(loss, t, diffusion)
        for level, mean in moved.items():
            expected[level] = 0.95 * expected[level] + 0.05 * mean
        assert torch.allclose(training.level_means, expected) and not training.level_means.requires_grad
        own = expected[torch.tensor([(time - 1) // 20 for time in times])]
        assert torch.allclose(found, torch.tensor(losses) / own)
        found.sum().backward()
        assert torch.allclose(loss.grad, 1 / own)
    assert float(expected[0]) == pytest.approx(0.95 * 1.25 + 0.1) and expected[2:9].tolist() == [1.0] * 7


@pytest.mark.parametrize("start,bounds", [
    (400, {0: (1, 20), 1: (21, 40), 19: (381, 400)}), (1000, {0: (1, 50), 9: (451, 500), 19: (951, 1000)}),
    (290, {0: (1, 15), 1: (16, 29), 2: (30, 44), 19: (277, 290)}), (20, {0: (1, 1), 7: (8, 8), 19: (20, 20)}),
    (7, {0: (1, 1), 2: (2, 2), 5: (3, 3), 17: (7, 7)}), (1, {0: (1, 1)})])
def test_bounds_of_noise_levels(start, bounds, tmp_path):
    """First and last time of a level, from t = 1 to t = start. Each of the 20 has a twentieth of the times, as nearly
    as whole times allow. (With fewer times than levels, some have none.)"""
    training, diffusion = levels_of(tmp_path, start=start)
    levels = {}
    for t in range(1, start + 1):
        training.level_means = torch.ones(20)
        training.even_levels(torch.tensor([21.0]), torch.tensor([t]), diffusion)
        assert sorted(training.level_means.tolist()) == [1.0] * 19 + [2.0]
        levels.setdefault(int(training.level_means.argmax()), []).append(t)
    assert {level: (levels[level][0], levels[level][-1]) for level in bounds} == bounds
    assert len(levels) == min(start, 20)
    assert {len(times) for times in levels.values()} <= {start // 20, math.ceil(start / 20)}


def test_what_leaves_the_levels_alone(tmp_path, monkeypatch):
    """With the setting off the loss comes back as it is. After a trial in float32 and in bfloat16 the means are
    those before it. A checkpoint keeps them, a finished one does not need them."""
    loss, t = torch.tensor([4.0, 8.0]), torch.tensor([1, 390])
    training, diffusion = levels_of(tmp_path / "off", even_levels=False)
    assert training.even_levels(loss, t, diffusion) is loss and torch.equal(training.level_means, torch.ones(20))

    monkeypatch.setattr(common, "fast_bfloat16", lambda device: True)
    net, seen = nn.Linear(1, 1, bias=False), []
    train = settings(batch=2, net_lr=0.0, net_muon_lr=0.0, net_clip=0.0, net_ema=0.0)
    training = common.Training(tmp_path / "on", train, CPU, torch.zeros(9, 1, 1, 1), 3, False, net=net)
    means = training.level_means = torch.arange(1.0, 21.0)
    for _ in training:
        before = training.level_means
        value = training.even_levels(loss + 0 * net.weight.sum(), t, diffusion)
        seen.append((training.trial is not None, value.tolist(), before))
        training.step(value, {})
    assert [trial for trial, *_ in seen] == [True, True, False, False, False]
    assert all(value == pytest.approx([4 / 1.15, 8 / 19.4]) and before is means for _, value, before in seen[:3])
    assert float(means[0]) == 1
    stored = common.load_checkpoint(tmp_path / "on" / "checkpoint.pt")["level_means"]
    assert torch.equal(stored, training.level_means) and float(stored[0]) == pytest.approx(4 - 3 * 0.95**3)
    assert "level_means" not in training.finish()


@pytest.mark.parametrize("name,flags,evened", [
    ("stage1", ["--variant", "all"], {"stage1-uncond", "stage1-form1", "stage1-form2", "stage1-guided",
                                      "stage1-augmented"}),
    ("stage2", ["--loss", "sum"], {"stage2-sum"}), ("stage2", ["--loss", "kendall"], {"stage2-kendall"}),
    ("stage2", ["--loss", "bound"], set()), ("stage3", [], {"stage3-flow-film"}), ("bonus", [], {"bonus-latent"})])
def test_whose_losses_are_divided(name, flags, evened, few, tmp_path, monkeypatch):
    """Those of every U-Net but under `bound`, in each step, at the times that were drawn, and of no VAE. What is
    minimised is the divided loss, here a planted third, to which stage 2 adds the VAE's. The log has the undivided
    one."""
    given, step, drawn, divided = [], common.Training.step, [], set()
    simple_loss = common.Diffusion.simple_loss

    def even_levels(training, loss, t, diffusion):
        given.append((loss, t, diffusion))
        return loss / 3

    def check(training, loss, terms, watch=None):
        run = training.folder.name.removesuffix("-s0")
        if given:
            (undivided, t, diffusion), (own_loss, own_diffusion, own_t) = given.pop(), drawn.pop()
            assert undivided is own_loss and t is own_t and diffusion is own_diffusion and terms["v_mse"] is undivided
            rest = loss - undivided / 3
            if name == "stage2" and "sum" in flags:
                assert torch.allclose(rest, terms["sse"] + terms["kl_nats"], rtol=1e-3)
            elif name != "stage2":
                assert torch.equal(loss, undivided / 3)
            divided.add(run)
        assert not given and not drawn and (run in divided) == (run in evened)
        step(training, loss, terms)  # without `watch`, which computes losses, too

    def record(*how):
        loss = simple_loss(*how)
        drawn.append((loss, how[0], how[3]))
        return loss

    monkeypatch.setattr(common.Training, "even_levels", even_levels)
    monkeypatch.setattr(common.Training, "step", check)
    monkeypatch.setattr(common.Diffusion, "simple_loss", record)
    COMMANDS[name]([*SMOKE, *flags, "--steps", "2", "--out", str(tmp_path)])
    assert divided == evened


# --- Muon -------------------------------------------------------------------------------------------------------------

def exact_orthogonalise(matrix):
    """The quintic of Jordan et al. applied five times to the singular values of an SVD in float64."""
    u, x, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return u * x @ v


@pytest.mark.parametrize("spread", [1, 30, 100])  # of the singular values
@pytest.mark.parametrize("shape", [(40, 40), (24, 96), (96, 24), (1, 9), (5, 1)])
def test_orthogonalise_keeps_directions(shape, spread):
    """All singular values become 0.67 to 1.21, whatever the scale. The result is close to U V^T. Zero stays zero."""
    u, v = (torch.linalg.qr(common.randn((n, min(shape)), common.generator(n)))[0] for n in shape)
    matrix = u * torch.logspace(0, -math.log10(spread), min(shape)) @ v.T
    for scale in (1e-3, 1.0, 1e3):
        found = common.orthogonalise(scale * matrix)
        assert torch.allclose(found.double(), exact_orthogonalise(matrix), atol=2e-3)
    values = torch.linalg.svdvals(found)
    assert 0.67 < values.min() and values.max() < 1.21 and torch.linalg.matrix_norm(found - u @ v.T, 2) < 0.33
    assert torch.equal(common.orthogonalise(torch.zeros(shape)), torch.zeros(shape))


def test_muon_by_hand(tmp_path):
    """Two steps with known gradients. The weights of the convolution, as a matrix (out, in k k), and of the linear
    layer follow the orthogonalised Nesterov momentum, multiplied by sqrt(out / in) where that is above 1. Adam moves
    the biases, at its own rate."""
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "linear": nn.Linear(5, 20)})
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients = [{name: common.randn(p.shape, common.generator(i)) for name, p in expected.items()} for i in range(2)]
    train = settings(steps=2, batch=2, warmup=0.0, decay=False, net_lr=0.01, net_muon_lr=0.1, net_clip=0.0, net_ema=0.0)
    training = common.Training(tmp_path, train, CPU, torch.zeros(9, 1, 1, 1), 2, False, net=net)
    training.reduced = False
    for _ in training:
        loss = sum((gradients[training.steps_taken][name] * p).sum() for name, p in net.named_parameters())
        training.step(loss.expand(2), {})

    adam = torch.optim.Adam([expected["conv.bias"], expected["linear.bias"]], lr=0.01)
    for gradient in gradients:
        expected["conv.bias"].grad, expected["linear.bias"].grad = gradient["conv.bias"], gradient["linear.bias"]
        adam.step()
    for name, size in (("conv.weight", 1), ("linear.weight", 2)):  # (20 / 5)^(1/2)
        first, second = (gradient[name] for gradient in gradients)
        average = 0.05 * first, 0.95 * 0.05 * first + 0.05 * second
        for update in (0.05 * first + 0.95 * average[0], 0.05 * second + 0.95 * average[1]):
            expected[name] -= 0.1 * size * exact_orthogonalise(update.flatten(1)).view(update.shape)
    for name, p in net.named_parameters():
        assert torch.allclose(p.detach(), expected[name], atol=2e-4, rtol=0), name


# --- Dropout ----------------------------------------------------------------------------------------------------------

def test_dropout_depends_on_seed_and_step_alone(tmp_path, monkeypatch):
    """Dropout masks depend on step, seed and process, and on nothing else. Each step seeds the GPUs' generators."""
    def masks(folder, disturb=False, **changes):
        """The masks that the steps of a training draw, (steps, 50). `disturb`: other random numbers are drawn, too."""
        found = []

        def loss(i, w):
            found.append(nn.functional.dropout(torch.ones(50), 0.5))
            torch.rand(7 * disturb)
            return w

        train_weights(folder, loss, steps=6, dropout=0.5, **changes)
        return torch.stack(found)

    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeds.append(int(seed)))
    whole = masks(tmp_path / "a")
    assert len(seeds) == 6 == len(set(seeds))
    assert torch.equal(masks(tmp_path / "b", disturb=True), whole)
    assert len(torch.cat([whole, masks(tmp_path / "d", seed=1)]).unique(dim=0)) == 12
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_after(patch, 3)
        masks(tmp_path / "c")
    assert torch.equal(masks(tmp_path / "c"), whole[3:])  # it goes on from the checkpoint
    both = []
    for rank in (0, 1):
        act_as(monkeypatch, rank)
        both.append(masks(tmp_path / f"process {rank}"))
    assert len(torch.cat(both).unique(dim=0)) == 12


# --- Commands in processes of their own -------------------------------------------------------------------------------

def float32(device, reduced):
    """In place of common.autocast: always float32. In bfloat16, sums over batches of other sizes differ by 0.4%."""
    return torch.autocast(device.type, enabled=False)


def command(name, folder, *flags, ranks=1, scores=False):
    """Start a stage's command in a folder, in float32, with torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    argv = [sys.executable, *launcher, __file__, name, "scores" if scores else "none", *SMOKE, *FLAGS[name], *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(common.__file__).parent)}
    with open(folder / "errors.txt", "a") as errors:  # progress bars would fill a pipe
        return subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)


def finish(process, folder, status=0):
    """Wait for a command, which must end with this status. Returns what it printed."""
    out, _ = process.communicate(timeout=500)
    assert process.returncode == status, out + (folder / "errors.txt").read_text()[-3000:]
    return out


@pytest.mark.parametrize("name,kills", [("stage1", 1), *(
    pytest.param(name, 20, marks=pytest.mark.slow) for name in COMMANDS)])
def test_killed_at_any_moment_and_resumed(name, kills, tmp_path, monkeypatch):
    """The command is killed again and again while networks train. After the last --resume, every bit is that of a run
    that was never killed."""
    rng, steps = random.Random(0), 40 * (kills + 1)
    flags = ["--batch-size", "2", "--steps", str(steps), "--resume"]
    paths = [tmp_path / "cut" / "shapes-smoke" / f"{one}-s0" / "checkpoint.pt" for one in RUNS[name]]
    for i in range(kills):
        path = paths[i * len(paths) // kills]
        before = path.stat().st_mtime_ns if path.is_file() else None
        process = command(name, tmp_path, *flags, "--out", "cut")
        while process.poll() is None and (not path.is_file() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        finish(process, tmp_path, -signal.SIGKILL)
        state = common.load_checkpoint(path)
        assert not state["finished"] and 0 < state["steps"] < steps
    finish(command(name, tmp_path, *flags, "--out", "cut"), tmp_path)
    simplify(monkeypatch.setattr)
    monkeypatch.setattr(common, "autocast", float32)
    assert same(results(name, tmp_path / "cut"), run(name, tmp_path / "whole", *flags))
    assert all(state["finished"] for state, _ in results(name, tmp_path / "cut"))


def assert_close(name, home, other):
    """Check that the averaged weights of two runs agree within float error."""
    for (ours, _), (theirs, _) in zip(results(name, home), results(name, other), strict=True):
        assert ours["finished"] and theirs["finished"]
        for part in NETWORKS & ours.keys():
            # Adam divides by the size of the gradients. Where those are tiny, it enlarges rounding errors to 2e-5.
            torch.testing.assert_close(ours[part], theirs[part], rtol=1e-4, atol=5e-5)


def test_two_processes_go_on_with_what_one_began(tmp_path, monkeypatch):
    """Their weights are those of one process alone, and so are the 70 exported images, of which each makes a batch."""
    flags = ["--steps", "4", "--batch-size", "8", "--export", "70", "--sample-steps", "2"]
    simplify(monkeypatch.setattr)
    monkeypatch.setattr(common, "autocast", float32)
    run("stage1", tmp_path / "one", *flags)
    signal_after(monkeypatch, 2)
    with pytest.raises(SystemExit):
        run("stage1", tmp_path / "two", *flags)
    finish(command("stage1", tmp_path, *flags, "--out", "two", "--resume", ranks=2), tmp_path)
    assert_close("stage1", tmp_path / "two", tmp_path / "one")
    one, two = ({path.relative_to(home): torch.tensor(common.decode_file(path, 32, "none")).int()
                 for path in home.rglob("samples*/*.png")} for home in (tmp_path / "one", tmp_path / "two"))
    assert one.keys() == two.keys() and len(one) == 3 * 70
    assert all((one[path] - two[path]).abs().max() <= 1 for path in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_do_what_one_does(name, tmp_path):
    """Weights, and scores of samples, are those of one process within float error. Only the first process prints."""
    printed = [finish(command(name, tmp_path, "--steps", "4", "--out", str(ranks), ranks=ranks, scores=True), tmp_path)
               for ranks in (1, 2)]
    assert [text.count("features: local-shapes") for text in printed] == [1, 1]
    assert_close(name, tmp_path / "2", tmp_path / "1")
    one, two = (json.loads((tmp_path / ranks / "shapes-smoke" / f"{RUNS[name][-1]}-s0" / "metrics.json").read_text())
                for ranks in "12")
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["fd_local"]["value"] == pytest.approx(b["fd_local"]["value"], rel=0.01)


# --- Several processes, one at a time ---------------------------------------------------------------------------------

def act_as(patch, rank, ranks=2):
    """From here on this process is number `rank` of several. Sums over all processes, and what the first one
    says, are what they would be if all had the same numbers as this one."""
    for place, name, value in ((common, "RANK", rank), (common, "RANKS", ranks),
                               (distributed, "all_reduce", lambda tensor: tensor.mul_(ranks)),
                               (distributed, "broadcast_object_list", lambda values: None),
                               (distributed, "barrier", lambda: None)):
        patch.setattr(place, name, value)


def test_a_checkpoint_holds_what_all_processes_saw(tmp_path, monkeypatch):
    """The log's sums in a checkpoint are those of all processes, else a resumed run's next row would be wrong."""
    act_as(monkeypatch, 0)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.mul_(0).add_(10))  # so much in all processes
    train_weights(tmp_path, lambda i, w: 0 * w + i, steps=5, every=3)
    sums = common.load_checkpoint(tmp_path / "checkpoint.pt")["sums"]
    assert {name: float(value) for name, value in sums.items()} == {"loss": 10.0, "net": 10.0}


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_several_processes_cannot_use_one_device(device, tmp_path, monkeypatch, capsys):
    """torchrun with --device mps or cuda:1 is refused before the processes meet."""
    act_as(monkeypatch, 0)
    monkeypatch.setattr(distributed, "init_process_group", lambda *a, **k: pytest.fail("they must not meet"))
    expect_error(capsys, lambda: run("stage1", tmp_path, "--device", device), f"--device {device}", "several processes")


def test_noise_levels_of_all_processes(tmp_path, monkeypatch):
    """The means of two processes are those of one that has the images of both. Here the first process has two images of
    level 0 and one of level 2, and the second one of level 0 and two of level 1."""
    losses = [torch.tensor([2.0, 4.0, 5.0]), torch.tensor([12.0, 1.0, 2.0])]
    times = [torch.tensor([1, 20, 41]), torch.tensor([3, 21, 40])]
    training, diffusion = levels_of(tmp_path, start=400)
    whole = training.even_levels(torch.cat(losses), torch.cat(times), diffusion)
    means = torch.ones(20)
    means[:3] = torch.tensor([0.95 + 0.05 * 6.0, 0.95 + 0.05 * 1.5, 0.95 + 0.05 * 5.0])
    assert torch.allclose(training.level_means, means)
    for rank in (0, 1):
        # Counts and sums of both processes; this one's must be what it sends.
        counts = [torch.tensor([2.0, 0, 1]), torch.tensor([1.0, 2, 0])]
        sums = [torch.tensor([6.0, 0, 5]), torch.tensor([12.0, 3, 0])]

        def all_reduce(flat, rank=rank, counts=counts, sums=sums):
            count, total = flat.view(2, 20)
            assert torch.equal(count[:3], counts[rank]) and torch.equal(total[:3], sums[rank])
            count[:3], total[:3] = sum(counts), sum(sums)

        with monkeypatch.context() as patch:
            act_as(patch, rank)
            patch.setattr(distributed, "all_reduce", all_reduce)
            training, _ = levels_of(tmp_path, start=400)
            found = training.even_levels(losses[rank], times[rank], diffusion)
        assert torch.allclose(training.level_means, means) and torch.allclose(found, whole.chunk(2)[rank])


def test_mirroring_is_from_left_to_right(tmp_path):
    """Of about half of the images. The others are shown as they are."""
    images = common.to_float(images_of(20).images)
    x = common.Training(tmp_path, settings(batch=64), CPU, images_of(20).images, 8, True).batch()
    as_it_is, mirrored = ((x[:, None] == kind).flatten(2).all(2).any(1) for kind in (images, images.flip(3)))
    assert (as_it_is | mirrored).all() and 20 < as_it_is.sum() < 44


def test_draws_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    """Batches, mirroring and noise of two processes, put together, are those of one process, in every step."""
    def drawn(rank, ranks):
        with monkeypatch.context() as patch:
            act_as(patch, rank, ranks)
            training = common.Training(tmp_path, settings(batch=6), CPU, images_of(20).images, 8, True)
            return [torch.cat([training.batch().flatten(1), training.normal(3), training.uniform(2)], 1)
                    for _ in range(3)]

    whole, first, second = drawn(0, 1), drawn(0, 2), drawn(1, 2)
    for a, b, c in zip(whole, first, second, strict=True):
        assert a.shape == (6, 3 * 32 * 32 + 5) and torch.equal(torch.cat([b, c]), a)


def test_only_the_first_process_serialises_and_writes(tmp_path, monkeypatch):
    """The second process trains and finishes, never calls torch.save, and changes no file."""
    train_weights(tmp_path, lambda i, w: w).finish()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    act_as(monkeypatch, 1)
    monkeypatch.setattr(torch, "save", lambda *a: pytest.fail("serialised"))
    training = train_weights(tmp_path, lambda i, w: w)
    assert training.finish()["finished"] and len(training.log) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_every_process_gets_the_metrics(tmp_path, monkeypatch):
    """The second process returns the metrics, too, even if it ends before the first one has written them."""
    monkeypatch.setattr(fid, "measure_samples", lambda *a: ([{"fd_local": {"value": 1.0}}], {}))
    monkeypatch.setattr(common, "draw_training", lambda *a: {})
    setup = SimpleNamespace(evaluation={"temperature": 1.0}, data=images_of(20),
                            extractor=SimpleNamespace(name="local-none"), commit="0a1b2c3")
    for rank in (1, 0):
        act_as(monkeypatch, rank)
        state = {"train": settings(), "log": [], "seconds": 1.0, "seconds_before": 0.0, "run_id": "a"}
        metrics = fid.evaluate(tmp_path / "none-s0", setup, state,
                               common.Model("none", CPU, (3, 32, 32), common.Diffusion("v")))
        assert metrics["rows"][0]["fd_local"]["value"] == 1.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    common.autocast = float32
    simplify(setattr, scores=sys.argv[2] == "scores")
    COMMANDS[sys.argv[1]](sys.argv[3:])
