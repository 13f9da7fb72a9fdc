"""Training: the same bits however often a run is stopped, the log by hand, several processes.

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
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, draw_all, expect_error, images_of, same, settings, small_shapes
from torch import distributed, nn

import bonus_latent as bonus
import common
import fid
import stage1_baseline as stage1
import stage2_joint as stage2
import stage3_adaptive as stage3

SMOKE = ["--budget", "smoke", "--device", "cpu"]
COMMANDS = {"stage1": stage1.main, "stage2": stage2.main, "stage3": stage3.main, "bonus": bonus.main}
FLAGS = {"stage1": [], "stage2": ["--loss", "kendall"], "stage3": [], "bonus": []}
DRAWING = {"dropout": 0.2, "flip": "both", "every": 3, "batch": 4,  # all kinds of random draws are made,
           "vae_muon_lr": 0.01, "unet_muon_lr": 0.01}  # and both optimisers keep something
RUNS = {"stage1": ("stage1-vae", "stage1-form1"), "stage2": ("stage2-kendall",),
        "stage3": ("stage3-vae-flow", "stage3-flow-film"), "bonus": ("bonus-ae", "bonus-latent")}


# --- The four stages, stopped and gone on with ------------------------------------------------------------------------

def simplify(change, train=None, scores=False):
    """Few images, some smoke settings changed. Without scores: no evaluation, 100 images, every tenth step saved."""
    smoke, savings = common.budget, {"device": "", "sampler_steps": 0, "batch": 0, "saved_percent": {}}
    tables = {"savings": savings, "uncertainty": {}}
    change(common, "draw_shapes", small_shapes)
    if not scores:
        change(common, "budget", lambda *args: (smoke(*args)[0] | (train or {}), smoke(*args)[1]))
        change(common, "draw_shapes", lambda count, seed: draw_all(count // 200, seed))
        change(common, "time", SimpleNamespace(time=itertools.count(0, 6).__next__))
        change(fid, "load_extractor", lambda *a: SimpleNamespace(name="none", suffix="_local"))
        change(common, "evaluate", lambda folder, *a: {"run": {"train_images": 0}, "tables": tables})
        change(common, "print_results", lambda *a: None)


@pytest.fixture
def few(monkeypatch):
    simplify(monkeypatch.setattr, DRAWING)


def run(name, home, *flags):
    """A stage's command in this process; returns its checkpoints and logs."""
    COMMANDS[name]([*SMOKE, *FLAGS[name], "--out", str(home), *flags])
    return results(name, home)


def results(name, home):
    folders = [home / "shapes-smoke" / f"{one}-s0" for one in RUNS[name]]
    return [(common.load_checkpoint(folder / "checkpoint.pt"), (folder / "log.csv").read_text()) for folder in folders]


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


@pytest.fixture(scope="module", params=COMMANDS)
def whole(request, tmp_path_factory):
    """A stage and what a run of it leaves that was never stopped, 8 steps of each network."""
    with pytest.MonkeyPatch.context() as patch:
        simplify(patch.setattr, DRAWING)
        return request.param, run(request.param, tmp_path_factory.mktemp(request.param))


def test_another_seed_agrees_in_no_network(whole, few, tmp_path):
    name, expected = whole
    assert all(state["finished"] and [row["step"] for row in state["log"]] == [3, 6] for state, _ in expected)
    COMMANDS[name]([*SMOKE, *FLAGS[name], "--out", str(tmp_path), "--seed", "1"])
    for (state, _), folder in zip(expected, RUNS[name], strict=True):
        other = common.load_checkpoint(tmp_path / "shapes-smoke" / f"{folder}-s1" / "checkpoint.pt")
        assert not any(same(state[part], other[part]) for part in ("vae", "unet") if part in state)


@pytest.mark.parametrize("number,share", [(signal.SIGTERM, 3 / 8), (signal.SIGTERM, 1 / 2), (signal.SIGINT, 13 / 16)])
def test_stopped_and_resumed_is_never_stopped(number, share, whole, few, tmp_path, monkeypatch, capsys):
    """A signal in the first network's training, after its last step, in the last network's: saved, status 128 + its
    number; without --resume status 2; with it the bits and the log of a run never stopped. So it is, too, when a slower
    process in the same folder has written its older, unfinished checkpoints over what was finished."""
    name, expected = whole
    steps = signal_after(monkeypatch, round(share * 8 * len(expected)), number)
    with pytest.raises(SystemExit) as stop:
        run(name, tmp_path / "a")
    assert stop.value.code == 128 + number and "--resume" in capsys.readouterr().err
    shutil.copytree(tmp_path / "a", tmp_path / "slower")
    for slower in (False, True):
        expect_error(capsys, lambda: run(name, tmp_path / "a"), "--resume")
        torch.manual_seed(123)  # what the process did before must not matter
        assert same(run(name, tmp_path / "a", "--resume"), expected)
        assert slower or len(steps) == 8 * len(expected)  # none was made twice
        shutil.copytree(tmp_path / "slower", tmp_path / "a", dirs_exist_ok=True)


def test_memory_stays_flat(tmp_path, monkeypatch, request):
    """300 steps more hold no more memory, even where cycles are never collected: no step leaves anything behind."""
    held, step = [], common.Training.step

    def watch(training, *args):
        step(training, *args)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    monkeypatch.setattr(common.Training, "step", watch)
    train = settings(encoder=[[16, 8, 0], [1, 8, 0]], decoder=[[1, 8, 0], [16, 8, 0]], unet=[[16, 8, 0, 1]], batch=1,
                     attention=[], image_size=16, vae_lr=1e-5, vae_muon_lr=1e-5, steps=350, every=350, loss="sum",
                     gradient="full", diffusion_weight=1.0)
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    stage2.train_joint(tmp_path / "run", train, SimpleNamespace(images=draw_all(40, 0)[0][..., ::2, ::2]), CPU, None)
    assert len(held) == 350 and held[-1] - held[49] < 8  # MB; the activations of 300 steps are more than 40


# --- The loop by hand -------------------------------------------------------------------------------------------------

def tiny(folder, loss, state=None, watch=dict, names=("net",), **changes):
    """Train one weight per name, from 1, by `loss(i, *weights)`, i from 0; Adam moves it by just the rate."""
    networks = {name: nn.Linear(1, 1, bias=False) for name in names}
    for network in networks.values():
        nn.init.ones_(network.weight)
    rates = {"lr": 0.1, "muon_lr": 0.0, "clip": 0.0, "ema": 0.9}
    rates = {f"{name}_{key}": value for name in names for key, value in rates.items()}
    train = settings(batch=2, **rates) | changes
    training = common.Training(folder, state, train, CPU, torch.zeros(9, 1, 1, 1), False, **networks)
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


@pytest.mark.parametrize("steps,bad", [(8, 3), (6, 5), (6, 6), (1, 1)])
def test_what_is_not_finite(steps, bad, tmp_path, capsys):
    """A loss, or a gradient of a finite loss (the root at 0), which ruins the weights, in the last step unseen by any
    loss: it ends the run with one line that names the run, the term and the step of the next row of the log; not
    finished."""
    for kind, loss in {"nan": lambda w: w * math.nan, "inf": lambda w: w * math.inf,
                       "root": lambda w: (0 * w).sqrt()}.items():
        word = "net" if kind == "root" else "loss"
        expect_error(capsys, lambda kind=kind, loss=loss: tiny(
            tmp_path / kind, lambda i, w: loss(w) if i + 1 == bad else w, steps=steps, every=4),
            f"{kind}: ", word, f"step {4 if bad == 3 else steps}")
        assert not (tmp_path / kind / "checkpoint.pt").exists()


def test_rates_clips_and_averages_by_hand(tmp_path):
    """Each network has its own rate (warm-up, decay), clip (0: none) and average (decay 0 copies every bit)."""
    training = tiny(tmp_path, lambda i, a, b: 2 * a + 3 * b, names=("a", "b"), steps=10, every=1, warmup=0.2, b_lr=0.2,
                    a_clip=0.5, a_ema=0.4, b_ema=0.0)
    shares = [min(1, (i + 1) / 2, (10 - i) / 8) for i in range(10)]  # 0.5, 1, 1, 7/8, ... 1/8
    average, a = 1.0, 1.0
    for n, share in enumerate(shares, 1):
        assert training.log[n - 1]["a"] == pytest.approx(a, abs=1e-5)
        assert training.log[n - 1]["b"] == pytest.approx(2 * a - 1, abs=1e-5)  # twice as far from 1
        a -= 0.1 * share
        average += (1 - min(0.4, (1 + n) / (10 + n))) * (a - average)  # 2/11, 3/12, ... 6/15, 0.4, 0.4
    gradients = [float(network.weight.grad) for network in training.networks.values()]
    assert gradients == pytest.approx([0.5, 3.0], rel=1e-4)
    averages = training.finish()
    assert float(averages["a"]["weight"]) == pytest.approx(average, abs=1e-5)
    assert torch.equal(averages["b"]["weight"], training.networks["b"].weight.detach())


def test_learning_rate_end_points():
    """Warm-up over a share or a number of the steps, from above 0; the decay would reach 0 after the last step."""
    rate = partial(common.learning_rate, 2.0, decay=True)
    assert rate(0, 100, 0.1) == pytest.approx(0.2) and rate(9, 100, 0.1) == 2 and rate(100, 100, 0.1) == 0
    assert rate(99, 100, 0.1) == pytest.approx(2 / 90) and rate(99, 100, 0.1, decay=False) == 2
    assert rate(0, 100, 20) == pytest.approx(0.1) and rate(19, 100, 20) == 2
    assert rate(0, 1, 0.1) == 2 and all(0 < rate(s, n, 0.1) <= 2 for n in range(1, 9) for s in range(n))


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
    """Singular values come to 0.67..1.21 whatever the scale; U V^T is near; zero stays zero."""
    u, v = (torch.linalg.qr(common.randn((n, min(shape)), common.generator(n)))[0] for n in shape)
    matrix = u * torch.logspace(0, -math.log10(spread), min(shape)) @ v.T
    for scale in (1e-3, 1.0, 1e3):
        found = common.orthogonalise(scale * matrix)
        assert torch.allclose(found.double(), exact_orthogonalise(matrix), atol=2e-3)
    values = torch.linalg.svdvals(found)
    assert 0.67 < values.min() and values.max() < 1.21 and torch.linalg.matrix_norm(found - u @ v.T, 2) < 0.33
    assert torch.equal(common.orthogonalise(torch.zeros(shape)), torch.zeros(shape))


def test_muon_by_hand(tmp_path):
    """Two steps with known gradients: the convolution, as a matrix (out, in k k), and the linear layer move along the
    orthogonalised look-ahead momentum, by sqrt(out / in) more where that is above 1; biases are Adam's, at its rate."""
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "linear": nn.Linear(5, 20)})
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients = [{name: common.randn(p.shape, common.generator(i)) for name, p in expected.items()} for i in range(2)]
    train = settings(steps=2, batch=2, warmup=0.0, decay=False, net_lr=0.01, net_muon_lr=0.1, net_clip=0.0, net_ema=0.0)
    training = common.Training(tmp_path, None, train, CPU, torch.zeros(9, 1, 1, 1), False, net=net)
    for _ in training:
        loss = sum((gradients[training.steps][name] * p).sum() for name, p in net.named_parameters())
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


# --- Dropout and compiling --------------------------------------------------------------------------------------------

def test_dropout_depends_on_seed_and_step_alone(tmp_path, monkeypatch):
    """Masks differ by step, seed and process, by nothing else; each step seeds every GPU's generator, too."""
    def masks(folder, state=None, disturb=False, **changes):  # that the steps of a training draw
        found = []

        def loss(i, w):
            found.append(nn.functional.dropout(torch.ones(50), 0.5))
            torch.rand(7 * disturb)
            return w

        tiny(folder, loss, state, steps=6, dropout=0.5, **changes)
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
    assert torch.equal(masks(tmp_path / "c", common.load_checkpoint(tmp_path / "c" / "checkpoint.pt")), whole[3:])
    both = []
    for rank in (0, 1):
        act_as(monkeypatch, rank)
        both.append(masks(tmp_path / "e"))
    assert len(torch.cat(both).unique(dim=0)) == 12


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
@pytest.mark.parametrize("name", COMMANDS)
def test_compiled_training_is_the_same_within_float_error(name, tmp_path, monkeypatch):
    """Needs a C++ compiler on a CPU: compiled and not, the losses of each of three steps are the same."""
    simplify(monkeypatch.setattr, {"every": 1})
    plain, fast = (run(name, tmp_path / str(len(flag)), "--steps", "3", *flag) for flag in ([], ["--compile"]))
    for (a, _), (b, _) in zip(plain, fast, strict=True):
        for row, other in zip(a["log"], b["log"], strict=True):
            assert other == pytest.approx(row, rel=1e-2, abs=1e-2)  # fused, bfloat16 rounds less often


# --- Commands in processes of their own -------------------------------------------------------------------------------

def float32(device):
    """No bfloat16, in which sums of other lengths differ by 0.4%."""
    return torch.autocast(device.type, enabled=False)


def command(name, folder, *flags, ranks=1, scores=False):
    """The start of a stage's command, in a folder, in float32, under torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    argv = [sys.executable, *launcher, __file__, name, "scores" if scores else "none", *SMOKE, *FLAGS[name], *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(common.__file__).parent)}
    with open(folder / "errors.txt", "a") as errors:  # progress bars would fill a pipe that nobody reads
        return subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)


def finish(process, folder, status=0):
    """Wait for a command that must end with this status; returns what it printed."""
    out, _ = process.communicate(timeout=500)
    assert process.returncode == status, out + (folder / "errors.txt").read_text()[-3000:]
    return out


@pytest.mark.parametrize("name,kills", [("stage1", 1), *(
    pytest.param(name, 20, marks=pytest.mark.slow) for name in COMMANDS)])
def test_killed_at_any_moment_and_resumed(name, kills, tmp_path, monkeypatch):
    """SIGKILL, again and again, in every network's training: the last --resume has every bit of a whole run."""
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
    """Averaged weights of two runs agree within float error."""
    for (ours, _), (theirs, _) in zip(results(name, home), results(name, other), strict=True):
        assert ours["finished"] and theirs["finished"]
        for part in {"vae", "unet"} & ours.keys():
            torch.testing.assert_close(ours[part], theirs[part], rtol=1e-4, atol=1e-5)


def test_two_processes_go_on_with_what_one_began(tmp_path, monkeypatch):
    """The weights that one gives alone, and the same images exported: 70, a batch of each process."""
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
    """Weights, and the scores of what is sampled, are those of one process, within float error; one speaks for all."""
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
    """From here on this process is one of several, whose sums are its own alone."""
    for place, name, value in ((common, "RANK", rank), (fid, "RANK", rank), (common, "RANKS", ranks),
                               (distributed, "all_reduce", lambda tensor: tensor.mul_(ranks)),
                               (distributed, "barrier", lambda: None)):
        patch.setattr(place, name, value)


def test_a_checkpoint_holds_what_all_processes_saw(tmp_path, monkeypatch):
    """The log's sums, too, at any step: else a resumed run's next row would be the first process's alone."""
    act_as(monkeypatch, 0)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.mul_(0).add_(10))  # all others had so much
    tiny(tmp_path, lambda i, w: 0 * w + i, steps=5, every=3)
    sums = common.load_checkpoint(tmp_path / "checkpoint.pt")["sums"]
    assert {name: float(value) for name, value in sums.items()} == {"loss": 10.0, "net": 10.0}


def test_what_was_made_in_turn_comes_back_in_order(monkeypatch):
    def everyone(lists, mine):
        lists[:] = "ace", mine

    assert common.gather(["a"]) == ["a"]
    act_as(monkeypatch, 1)
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
    monkeypatch.setattr(common, "measure_samples", lambda *a: ([{"fd_local": {"value": 1.0}}], {}))
    monkeypatch.setattr(common, "draw_training", lambda *a: {})
    setup = SimpleNamespace(evaluation={"temperature": 1.0}, data=images_of(20),
                            extractor=SimpleNamespace(name="local-none"))
    monkeypatch.setenv("PATH", "")  # without git the commit is unknown, and that is all
    for rank in (1, 0):
        act_as(monkeypatch, rank)
        metrics = common.evaluate(tmp_path / "none-s0", setup, {"train": settings(), "log": [], "seconds": 1.0},
                                  common.Model("none", CPU, (3, 32, 32), common.Diffusion()), {})
        assert metrics["rows"][0]["fd_local"]["value"] == 1.0 and metrics["run"]["commit"] == "unknown"


if __name__ == "__main__":
    torch.set_num_threads(1)
    common.autocast = float32
    simplify(setattr, scores=sys.argv[2] == "scores")
    COMMANDS[sys.argv[1]](sys.argv[3:])
