"""Training: the same bits however often a run is stopped, the log and the guard by hand, several processes.

Run as a program, this file is a stage's command on few images: python test_training.py STAGE {scores,none} FLAGS.
"""

import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, expect_error, images_of, same, settings, small_shapes
from torch import distributed, nn

import bonus_latent as bonus
import common
import fid
import stage1_baseline as stage1
import stage2_joint as stage2
import stage3_adaptive as stage3

DRAWING = {"dropout": 0.2, "flip": "both", "every": 3}  # settings under which every kind of random draw is made
SMOKE = ["--budget", "smoke", "--device", "cpu"]
JOINT = {"loss": "kendall", "gradient": "full", "diffusion_weight": None, "balance_lr": 0.01, "balance_clip": 0.0,
         "balance_ema": 0.0}

# --- The four stages' trainings: function(home, train, data, resume) -> checkpoints -----------------------------------


def train_stage1(home, train, data, resume=False):
    vae = stage1.train_vae(home / "stage1-vae-s0", train, data, CPU, resume)
    return vae, stage1.train_refiner(home / "stage1-form1-s0", "form1", train, vae, data, CPU, resume)


def train_stage2(home, train, data, resume=False):
    return (stage2.train_joint(home / "stage2-kendall-s0", JOINT | train, data, CPU, resume),)


def train_stage3(home, train, data, resume=False):
    train, strategy = train | {"vae_prior": "flow"}, {"conditioning": "film", "uncertainty": "variance"}
    vae = stage3.train_vae(home / "stage3-vae-flow-s0", train, data, CPU, resume)
    return vae, stage3.train_refiner(home / "stage3-flow-film-s0", train | strategy, vae, data, CPU, resume)


def train_bonus(home, train, data, resume=False):
    train = train | {"ae_width": 16, "latent_unet": [[1, 16, 1, 1]]}
    ae = bonus.train_autoencoder(home / "bonus-ae-s0", train, data, CPU, resume)
    return ae, bonus.train_latent(home / "bonus-latent-s0", train, ae, data, CPU, resume)


STAGES = {"stage1": train_stage1, "stage2": train_stage2, "stage3": train_stage3, "bonus": train_bonus}
COMMANDS = {"stage1": stage1.main, "stage2": stage2.main, "stage3": stage3.main, "bonus": bonus.main}
RUNS = {"stage1": ("stage1-vae", "stage1-form1"), "stage2": ("stage2-anneal",),
        "stage3": ("stage3-vae-flow", "stage3-flow-film"), "bonus": ("bonus-ae", "bonus-latent")}


def logs(home):
    return {path.parent.name: path.read_text() for path in home.glob("*/log.csv")}


def signal_after(patch, step, number=signal.SIGTERM):
    """Send this process a signal after that many training steps, counted over all networks; returns their list."""
    steps, original = [], common.Training.step

    def counted(training, *args):
        original(training, *args)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)

    patch.setattr(common.Training, "step", counted)
    return steps


@pytest.fixture(scope="module", params=STAGES)
def whole(request, tmp_path_factory):
    """A stage's training, a run of it that was never stopped, 8 steps of each network: its folder and checkpoints."""
    home, run = tmp_path_factory.mktemp(request.param), STAGES[request.param]
    return run, home, run(home, settings(**DRAWING), images_of(100))


def test_same_seed_same_bits(whole, tmp_path):
    """Two trainings with one seed agree in every tensor and in the logs; another seed agrees in no network."""
    (run, home, states), train, data = whole, settings(**DRAWING), images_of(100)
    assert same(run(tmp_path / "again", train, data), states) and logs(tmp_path / "again") == logs(home)
    assert all(state["finished"] and [row["step"] for row in state["log"]] == [3, 6] for state in states)
    for a, b in zip(states, run(tmp_path / "other", train | {"seed": 1}, data), strict=True):
        assert not any(same(a[name], b[name]) for name in ("vae", "unet") if name in a)


@pytest.mark.parametrize("number,share", [(signal.SIGTERM, 3 / 8), (signal.SIGTERM, 1 / 2), (signal.SIGINT, 13 / 16)])
def test_stopped_and_resumed_is_never_stopped(number, share, whole, tmp_path, monkeypatch, capsys):
    """A signal in the first network's training, after its last step, in the last network's: saved, status 128 + its
    number; without --resume status 2; with it the bits and the log of a run never stopped."""
    (run, home, states), train, data = whole, settings(**DRAWING), images_of(100)
    steps = signal_after(monkeypatch, round(share * 8 * len(states)), number)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, train, data)
    assert stop.value.code == 128 + number and "--resume" in capsys.readouterr().err
    expect_error(capsys, lambda: run(tmp_path, train, data), "--resume")
    torch.manual_seed(123)  # what the process did before must not matter
    assert same(run(tmp_path, train, data, True), states) and logs(tmp_path) == logs(home)
    assert len(steps) == 8 * len(states)  # none was made twice


def test_a_slower_process_in_the_same_folder(whole, tmp_path, monkeypatch, capsys):
    """It writes its older, unfinished checkpoint over the finished one: resumed, that ends in the same bits."""
    (run, home, states), train, data = whole, settings(**DRAWING), images_of(100)
    shutil.copytree(home, tmp_path / "both")
    signal_after(monkeypatch, 8 * len(states) - 3)
    with pytest.raises(SystemExit):
        run(tmp_path / "slow", train, data)
    last = max((tmp_path / "slow").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime_ns)
    shutil.copytree(last.parent, tmp_path / "both" / last.parent.name, dirs_exist_ok=True)
    expect_error(capsys, lambda: run(tmp_path / "both", train, data), "--resume")
    assert same(run(tmp_path / "both", train, data, True), states) and logs(tmp_path / "both") == logs(home)


@pytest.mark.parametrize("name", STAGES)
def test_a_loss_that_is_not_finite_at_the_very_end(name, tmp_path, monkeypatch, capsys):
    """nan in the last of 6 steps, with a row every 4: status 2 naming the term (or network), and not finished."""
    step = common.Training.step

    def broken(training, loss, terms, *more):
        factor = math.nan if training.steps == 5 and "unet" in training.networks else 1.0
        step(training, factor * loss, {key: factor * value for key, value in terms.items()}, *more)

    monkeypatch.setattr(common.Training, "step", broken)
    train, data = settings(steps=6, every=4), images_of(40)
    word = "unet" if name == "stage2" else "v_mse"
    expect_error(capsys, lambda: STAGES[name](tmp_path, train, data), word, f"{name}-", "step 6")
    expect_error(capsys, lambda: STAGES[name](tmp_path, train, data), "unfinished", "--resume")


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_memory_stays_flat(name, tmp_path, monkeypatch):
    """500 steps more hold no more memory, even where cycles are never collected: no step leaves anything behind."""
    held, step = [], common.Training.step

    def watch(training, *args):
        step(training, *args)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    monkeypatch.setattr(common.Training, "step", watch)
    small = {"batch": 1, "attention": [], "unet": [[32, 8, 0, 1], [16, 8, 0, 1]]}
    train, data = settings(steps=550, every=550, **small), images_of(40)
    gc.collect()
    gc.disable()
    try:
        if name == "stage1":
            stage1.train_vae(tmp_path / "vae", train, data, CPU, False)
        else:
            train_stage2(tmp_path, train, data)
    finally:
        gc.enable()
    assert len(held) == 550 and held[-1] - held[49] < 8  # MB; the activations of 500 steps are more than 100


def act_as(patch, rank, ranks=2):
    """From here on this process is one of several, whose sums are its own alone."""
    patch.setattr(distributed, "is_initialized", lambda: True)
    patch.setattr(distributed, "get_rank", lambda: rank)
    patch.setattr(distributed, "get_world_size", lambda: ranks)
    patch.setattr(distributed, "all_reduce", lambda tensor: tensor.mul_(ranks))
    patch.setattr(distributed, "barrier", lambda: None)


# --- The loop by hand -------------------------------------------------------------------------------------------------


def tiny(folder, loss, state=None, guard=False, watch=dict, names=("net",), **changes):
    """Train one weight per name, from 1; at step i, from 0, the loss is `loss(i, *weights)`. Returns the Training.
    Adam moves a weight whose gradient never changes by exactly the learning rate."""
    networks = {name: nn.Linear(1, 1, bias=False) for name in names}
    for network in networks.values():
        nn.init.ones_(network.weight)
    rates = {f"{name}_{key}": value for name in names for key, value in (("lr", 0.1), ("clip", 0.0), ("ema", 0.9))}
    train = settings(batch=2, **rates) | changes
    training = common.Training(folder, state, train, CPU, torch.zeros(9, 1, 1, 1), False, guard, **networks)
    for _ in training:
        weights = {name: network.weight.sum() for name, network in networks.items()}
        value = loss(training.steps, *weights.values())
        training.step(value.expand(2), {"loss": value} | weights, watch)
    return training


def test_log_by_hand(tmp_path):
    """Rows at multiples of `every` hold the means since the last one and what was watched then; log.csv is a copy."""
    calls = []
    training = tiny(tmp_path, lambda i, w: 0 * w + i, watch=lambda: calls.append(1) or {"seen": len(calls)}, steps=8,
                    every=3)
    rows = [{"step": 3, "loss": 1.0, "net": 1.0, "seen": 1}, {"step": 6, "loss": 4.0, "net": 1.0, "seen": 2}]
    assert training.log == rows and len(calls) == 2 and training.finish()["log"] == rows
    assert (tmp_path / "log.csv").read_text() == "step,loss,net,seen\n3,1.0,1.0,1\n6,4.0,1.0,2\n"
    for steps, at, mean in ((1, 1, 0.0), (2, 2, 0.5), (5, 3, 1.0)):  # fewer steps than an interval: still one row
        row, = tiny(tmp_path / str(steps), lambda i, w: 0 * w + i, steps=steps, every=3).log
        assert (row["step"], row["loss"]) == (at, mean)


@pytest.mark.parametrize("guard,steps,bad,words", [
    (False, 8, 3, ["loss", "step 4"]), (False, 6, 5, ["loss", "step 6"]), (False, 6, 6, ["loss", "step 6"]),
    (False, 1, 1, ["loss", "step 1"]), (True, 6, 6, ["net", "step 6"]), (True, 1, 1, ["net", "step 1"])])
def test_a_loss_that_is_not_finite(guard, steps, bad, words, tmp_path, capsys):
    """It ends the run with one line that names the run and the term (or, guarded, the network): not finished."""
    for value in (math.nan, math.inf):
        folder = tmp_path / f"run {value}"
        expect_error(capsys, lambda value=value, folder=folder: tiny(
            folder, lambda i, w: w * (value if i + 1 == bad else 1.0), guard=guard, steps=steps, every=4),
            folder.name, *words)
        assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("step", [3, 6])
def test_weights_that_are_not_finite(step, tmp_path, capsys):
    """A finite loss whose gradient is not (the root at 0) ruins the weights, in the last step unseen by any loss: no
    such run is finished."""
    expect_error(capsys, lambda: tiny(tmp_path, lambda i, w: (0 * w).sqrt() if i + 1 == step else w, steps=6, every=4),
                 tmp_path.name)


def test_clipping_is_per_network(tmp_path):
    """A clip of 0.5 holds one network's gradient there and leaves the other's 3; 0 clips nothing."""
    training = tiny(tmp_path, lambda i, a, b: 2 * a + 3 * b, names=("a", "b"), a_clip=0.5)
    gradients = [float(network.weight.grad) for network in training.networks.values()]
    assert gradients == pytest.approx([0.5, 3.0], rel=1e-4)


def test_rates_and_averages_by_hand(tmp_path):
    """Each network moves by its own rate: linear warm-up over 2 of 10 steps, linear decay; each has its own average."""
    training = tiny(tmp_path, lambda i, a, b: a + 3 * b, names=("a", "b"), steps=10, every=1, warmup=0.2, b_lr=0.2,
                    b_ema=0.0)
    shares = [min(1, (i + 1) / 2, (10 - i) / 8) for i in range(10)]  # 0.5, 1, 1, 7/8, ... 1/8
    average, a = 1.0, 1.0
    for n, share in enumerate(shares, 1):
        assert training.log[n - 1]["a"] == pytest.approx(a, abs=1e-5)
        assert training.log[n - 1]["b"] == pytest.approx(2 * a - 1, abs=1e-5)  # twice as far from 1
        a -= 0.1 * share
        average += (1 - min(0.9, (1 + n) / (10 + n))) * (a - average)
    averages = training.finish()
    assert float(averages["a"]["weight"]) == pytest.approx(average, abs=1e-5)
    assert torch.equal(averages["b"]["weight"], training.networks["b"].weight.detach())  # decay 0 copies


def test_learning_rate_end_points():
    def rate(step, steps=100, warmup=0.1, decay=True):
        return common.learning_rate(2.0, step, steps, warmup, decay)

    assert rate(0) == pytest.approx(0.2) and rate(9) == 2.0 and rate(10) == 2.0  # a tenth of the steps to warm up
    assert rate(55) == pytest.approx(1.0) and rate(99) == pytest.approx(2 / 90) and rate(100) == 0
    assert rate(99, decay=False) == 2.0 and rate(0, warmup=20) == pytest.approx(0.1) and rate(19, warmup=20) == 2.0
    assert rate(0, steps=1) == 2.0 and all(0 < rate(s, steps=n) <= 2 for n in range(1, 9) for s in range(n))


def test_average_warms_up():
    """decay_n = min(decay, (1 + n) / (10 + n)): 2/11, 3/12, 4/13, ... then the plain decay; 0 copies every bit."""
    model, value = nn.Linear(1, 1, bias=False), 0.0
    average, copy = {"weight": torch.zeros(1, 1)}, {"weight": torch.zeros(1, 1)}
    for n in range(1, 8):
        nn.init.constant_(model.weight, n / 3)
        common.update_average(average, model, 0.3, n)
        common.update_average(copy, model, 0.0, n)
        decay = [None, 2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3, 0.3][n]  # 4/13 is above 0.3
        value = decay * value + (1 - decay) * n / 3
        assert float(average["weight"]) == pytest.approx(value, rel=1e-5)
        assert torch.equal(copy["weight"], model.weight)


def test_stop_request_remembers_and_restores():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with common.StopRequest() as stop:
            assert stop.signal == 0
            signal.raise_signal(number)
            assert stop.signal == number
        assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


# --- The guard --------------------------------------------------------------------------------------------------------


def guarded(folder, norms, state=None, stop=None, **changes):
    """Train under the guard with these gradient norms; returns the Training and the weight before each step."""
    weights = []

    def loss(i, w):
        weights.append(w.item())
        if i == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return norms[i] * w

    return tiny(folder, loss, state, True, steps=len(norms), every=50, **changes), weights


def test_guard_by_hand(tmp_path, capsys):
    """Silent until 20 norms are known; then a single spike above 10 times their median is skipped, counted, changes no
    weight, and the next step is as ever; norms that stay high are skipped 10 times, then accepted."""
    norms = [1.0] * 5 + [1e9] + [1.0] * 19 + [10.5, 9.5] + [1.0] * 13 + [1000.0] * 20
    training, weights = guarded(tmp_path, norms)
    still = [i for i in range(len(norms) - 1) if weights[i + 1] == weights[i]]
    assert still == [25, *range(40, 50)] and training.skipped == 11 and training.log[0]["skipped"] == 11
    assert capsys.readouterr().out.count("gradient of net exploded") == 11


def test_guard_gives_up_on_what_is_not_finite(tmp_path, capsys):
    """The 20th such step in a row ends the run naming the network; after 19 it goes on as if they had not been. Of two
    networks neither moves when one explodes."""
    def infinite(first, last):
        return lambda i, good, bad: good + bad * (math.inf if first <= i < last else 1.0)

    names = ("good", "bad")
    expect_error(capsys, lambda: tiny(tmp_path / "20", infinite(4, 24), guard=True, names=names, steps=40),
                 "gradient of bad exploded", "step 24", "20 in a row")
    training = tiny(tmp_path / "19", infinite(4, 23), guard=True, names=names, steps=24, every=1, decay=False)
    assert training.skipped == 19 and [row["skipped"] for row in training.log[21:]] == [18, 19, 19]
    for network in training.networks.values():
        assert float(network.weight.detach()) == pytest.approx(1 - (0.1 * 5 - 0.01), abs=0.02)  # five steps were made


def test_guard_survives_resume(tmp_path):
    """Stopped after 24 of its norms: the spike in step 26 is skipped as ever, with the same weights and log."""
    norms = [1.0] * 25 + [50.0] + [1.0] * 30
    whole = guarded(tmp_path / "whole", norms)[0]
    with pytest.raises(SystemExit):
        guarded(tmp_path / "cut", norms, stop=23)
    state = common.load_checkpoint(tmp_path / "cut" / "checkpoint.pt")
    resumed = guarded(tmp_path / "cut", norms, state)[0]
    assert resumed.skipped == whole.skipped == 1 and same(resumed.finish(), whole.finish())


def test_an_interval_of_skipped_steps_can_be_charted(tmp_path):
    """Where each of its steps is skipped, an interval has no means to log; the log can still be drawn."""
    training = tiny(tmp_path, lambda i, w: w * (math.nan if 4 <= i < 8 else 1.0), guard=True, steps=12, every=4)
    assert [row["skipped"] for row in training.log] == [0, 4, 4]
    assert common.draw_training(tmp_path, training.log)["skipped"] == 4


# --- Dropout and compiling --------------------------------------------------------------------------------------------


def masks(folder, state=None, stop=None, disturb=False, **changes):
    """Train a weight; returns the dropout mask that each step would draw."""
    found = []

    def loss(i, w):
        found.append(nn.functional.dropout(torch.ones(50), 0.5))
        torch.rand(7 * disturb)
        if i == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return w

    tiny(folder, loss, state, steps=6, **changes)
    return torch.stack(found)


def test_dropout_depends_on_seed_and_step_alone(tmp_path, monkeypatch):
    """The masks of a step are the same whatever else draws, after a resume too; other steps, seeds and processes have
    others."""
    whole = masks(tmp_path / "a")
    assert torch.equal(masks(tmp_path / "b", disturb=True), whole)
    with pytest.raises(SystemExit):
        masks(tmp_path / "c", stop=2)
    assert torch.equal(masks(tmp_path / "c", common.load_checkpoint(tmp_path / "c" / "checkpoint.pt")), whole[3:])
    assert len(torch.cat([whole, masks(tmp_path / "d", seed=1)]).unique(dim=0)) == 12
    both = []
    for rank in (0, 1):
        act_as(monkeypatch, rank)
        both.append(masks(tmp_path / "e"))
    assert len(torch.cat(both).unique(dim=0)) == 12


def test_every_device_is_seeded_in_every_step(tmp_path, monkeypatch):
    """Dropout on a GPU draws from that GPU's generator: each step seeds all of them, to another number."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeds.append(int(seed)))
    tiny(tmp_path, lambda i, w: w, steps=5)
    assert len(seeds) == 5 == len(set(seeds))


def test_compile_reaches_the_networks_that_were_asked_for(tmp_path, monkeypatch):
    """--compile: encoder, decoder and U-Net, wherever they are; without it none."""
    compiled, refiner = [], stage3.build_refiner(settings(conditioning="film"), 8)
    monkeypatch.setattr(nn.Module, "compile", lambda part: compiled.append(type(part).__name__))
    for flag in (False, True):
        assert compiled == []
        common.Training(tmp_path, None, settings(compile=flag), CPU, images_of(20).images, False,
                        vae=common.build_vae(settings()), unet=refiner)
    assert compiled == ["Encoder", "Decoder", "UNet"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_compiled_training_is_the_same_within_float_error(name, tmp_path):
    """Needs a C++ compiler on a CPU: compiled and not, the losses of each of three steps are the same."""
    plain, fast = (STAGES[name](tmp_path / str(flag), settings(steps=3, every=1, compile=flag), images_of(40))
                   for flag in (False, True))
    for a, b in zip(plain, fast, strict=True):
        for row, other in zip(a["log"], b["log"], strict=True):
            assert other == pytest.approx(row, rel=1e-2, abs=1e-2)  # fused, bfloat16 rounds less often


# --- Commands in processes of their own -------------------------------------------------------------------------------


def simplify(scores, change=setattr):
    """Commands on few images, in float32 (in bfloat16 sums of other lengths differ by 0.4%). Without scores nothing is
    evaluated, and every tenth step is saved."""
    change(common, "draw_shapes", small_shapes)
    change(common, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    if not scores:
        savings = {"device": "", "sampler_steps": 0, "batch": 0, "saved_percent": {}}
        change(common, "time", SimpleNamespace(time=itertools.count(0, 6).__next__))
        change(fid, "load_extractor", lambda *a: SimpleNamespace(name="none", suffix="_local"))
        change(common, "evaluate", lambda folder, *a: {"run": {"train_images": 0}, "tables": {"savings": savings}})
        change(common, "print_results", lambda *a: None)


def command(name, folder, *flags, ranks=1, scores=False):
    """The start of a stage's command, in a folder, under torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    argv = [sys.executable, *launcher, __file__, name, "scores" if scores else "none", *SMOKE, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(common.__file__).parent)}
    with open(folder / "errors.txt", "a") as errors:  # progress bars would fill a pipe that nobody reads
        return subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)


def finish(process, folder, status=0):
    """Wait for a command that must end with this status; returns what it printed."""
    out, _ = process.communicate(timeout=500)
    assert process.returncode == status, out + (folder / "errors.txt").read_text()[-3000:]
    return out


def checkpoints(home, name):
    return [common.load_checkpoint(home / "shapes-smoke" / f"{run}-s0" / "checkpoint.pt") for run in RUNS[name]]


@pytest.mark.parametrize("name,kills", [("stage1", 3), *(
    pytest.param(name, 20, marks=pytest.mark.slow) for name in STAGES)])
def test_killed_at_any_moment_and_resumed(name, kills, tmp_path, monkeypatch):
    """SIGTERM (status 143), then SIGKILL at random moments of every network's training; the last --resume ends with
    every bit and log row of a run that was never stopped."""
    rng, flags = random.Random(0), ["--batch-size", "2", "--steps", str(40 * kills), "--resume"]
    home = tmp_path / "cut" / "shapes-smoke"
    runs = [home / f"{run}-s0" for run in RUNS[name]]
    plan = [(runs[0], signal.SIGTERM)] + [(runs[i * len(runs) // kills], signal.SIGKILL) for i in range(kills)]
    for folder, number in plan:
        path = folder / "checkpoint.pt"
        before = path.stat().st_mtime_ns if path.is_file() else None
        process = command(name, tmp_path, *flags, "--out", "cut")
        while process.poll() is None and (not path.is_file() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(number)
        finish(process, tmp_path, 143 if number == signal.SIGTERM else -9)
        state = common.load_checkpoint(path)
        assert not state["finished"] and 0 < state["steps"] < 40 * kills
    finish(command(name, tmp_path, *flags, "--out", "cut"), tmp_path)
    simplify(False, monkeypatch.setattr)
    COMMANDS[name]([*SMOKE, *flags, "--out", str(tmp_path / "whole")])
    assert same(checkpoints(tmp_path / "cut", name), checkpoints(tmp_path / "whole", name))
    assert all(state["finished"] for state in checkpoints(tmp_path / "cut", name))
    assert logs(home) == logs(tmp_path / "whole" / "shapes-smoke")


def assert_close(home, other, name):
    """Averaged weights of two runs agree within float error."""
    for ours, theirs in zip(checkpoints(home, name), checkpoints(other, name), strict=True):
        assert ours["finished"] and theirs["finished"]
        for part in {"vae", "unet"} & ours.keys():
            for key, tensor in theirs[part].items():
                torch.testing.assert_close(ours[part][key], tensor, rtol=1e-4, atol=1e-5, msg=f"{part} {key}")


def test_two_processes_go_on_with_what_one_began(tmp_path, monkeypatch):
    """Stage 1, begun and stopped by one process and gone on with by two, has the weights that one gives alone."""
    simplify(False, monkeypatch.setattr)
    stage1.main([*SMOKE, "--steps", "4", "--out", str(tmp_path / "one")])
    signal_after(monkeypatch, 2)
    with pytest.raises(SystemExit):
        stage1.main([*SMOKE, "--steps", "4", "--out", str(tmp_path / "two")])
    finish(command("stage1", tmp_path, "--steps", "4", "--out", "two", "--resume", ranks=2), tmp_path)
    assert_close(tmp_path / "two", tmp_path / "one", "stage1")


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_two_processes_do_what_one_does(name, tmp_path):
    """Weights, and the scores of what is sampled, are those of one process, within float error; one speaks for all."""
    printed = [finish(command(name, tmp_path, "--steps", "4", "--out", str(ranks), ranks=ranks, scores=True), tmp_path)
               for ranks in (1, 2)]
    assert [text.count("features: local-shapes") for text in printed] == [1, 1]
    assert_close(tmp_path / "2", tmp_path / "1", name)
    one, two = (json.loads((tmp_path / ranks / "shapes-smoke" / f"{RUNS[name][-1]}-s0" / "metrics.json").read_text())
                for ranks in "12")
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["fd_local"]["value"] == pytest.approx(b["fd_local"]["value"], rel=0.01)


# --- Several processes, one at a time ---------------------------------------------------------------------------------


def test_slices_make_the_whole(monkeypatch):
    """The processes' slices put together are the batch, in order; what they made in turn comes back in order."""
    x, parts = torch.arange(16).view(8, 2), []
    assert torch.equal(common.local_slice(x), x) and common.gather(["a"]) == ["a"]
    for rank in (0, 1):
        act_as(monkeypatch, rank)
        parts.append(common.local_slice(x))
    assert [len(part) for part in parts] == [4, 4] and torch.equal(torch.cat(parts), x)

    def everyone(lists, mine):
        lists[:] = "ace", "bd"

    monkeypatch.setattr(distributed, "all_gather_object", everyone)
    assert common.gather("bd") == list("abcde")


def test_draws_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    """Batches, flips and noise of two processes put together are those of one; their generators end alike."""
    def drawn(rank, ranks):
        with monkeypatch.context() as patch:
            act_as(patch, rank, ranks)
            training = common.Training(tmp_path, None, settings(batch=6), CPU, images_of(20).images, True)
            return [torch.cat([training.batch().flatten(1), training.draw(torch.randn, 5)], 1) for _ in range(3)]

    whole, first, second = drawn(0, 1), drawn(0, 2), drawn(1, 2)
    for a, b, c in zip(whole, first, second, strict=True):
        assert a.shape == (6, 3 * 32 * 32 + 5) and torch.equal(torch.cat([b, c]), a)


def test_only_the_first_process_serialises_and_writes(tmp_path, monkeypatch):
    """The second one trains and finishes without a call of torch.save, and leaves every file as the first wrote it."""
    tiny(tmp_path, lambda i, w: w).finish()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    act_as(monkeypatch, 1)
    monkeypatch.setattr(torch, "save", lambda *a: pytest.fail("serialised"))
    training = tiny(tmp_path, lambda i, w: w)
    assert training.finish()["finished"] and len(training.log) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_every_process_gets_the_metrics(tmp_path, monkeypatch):
    """Evaluation returns what was measured in a process that comes to the end before the first one has written."""
    scores = {f"{name}_local": {"value": 1.0, "low": None, "high": None} for name in common.SCORES}
    row = dict.fromkeys(common.ROW_KEYS, 0) | scores | {"hf_energy": scores["fd_local"]}
    monkeypatch.setattr(common, "measure_samples", lambda *a: ([row], {}))
    monkeypatch.setattr(common, "draw_training", lambda *a: {})
    state = {"train": settings(), "log": [], "seconds": 1.0}
    model = common.Model("none", CPU, (3, 32, 32), common.Diffusion())
    setup = common.Setup(settings(), {"temperature": 1.0}, CPU, tmp_path, SimpleNamespace(name="local-none"),
                         images_of(20), images_of(20), tmp_path)
    for rank in (1, 0):
        act_as(monkeypatch, rank)
        metrics = common.evaluate(tmp_path / "none-s0", setup, state, model, {})
        assert metrics is not None and metrics["rows"][0]["fd_local"]["value"] == 1.0, f"process {rank}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    simplify(sys.argv[2] == "scores")
    COMMANDS[sys.argv[1]](sys.argv[3:])
