"""Every command on a pretend accelerator (pretend.py), which finds tensors and generators on the wrong device."""

import inspect
import io
import json
import os
import signal
import textwrap

import pretend
import pytest
import torch
from helpers import CPU, draw_all, images_of, settings
from torch import nn

import bonus_latent as bonus
import common
import fid
import stage1_baseline as stage1
import stage2_joint as stage2
import stage3_adaptive as stage3

ALL_COMMANDS = [
    (stage1, ["--variant", "all", "--export", "2"]),
    (stage2, ["--loss", "anneal"]),
    (stage2, ["--loss", "kendall", "--gradient", "decoder", "--sampler", "ddpm"]),
    (stage2, ["--loss", "bound", "--from-vae"]),
    (stage3, ["--conditioning", "film"]),
    (stage3, ["--conditioning", "coupling", "--uncertainty", "posterior"]),
    (bonus, []),
]
SOME_COMMANDS = [(stage1, ["--export", "2"]), (stage3, ["--prior", "gmm"])]
SMOKE = ["--budget", "smoke", "--device", pretend.NAME, "--resume"]
smoke_budget, whole_step = common.budget, common.Training.step


def smaller_budget(*args):
    train, evaluation = smoke_budget(*args)
    return train | {"vae_steps": 3, "unet_steps": 2, "every": 1, "batch": 8, "flow_steps": 2, "dropout": 0.1}, (
        evaluation | {"count": 40, "batch": 20, "grid_count": 20, "grid": [["ddim", 2]], "sample_steps": 2,
                      "bits_draws": 2})


def step_and_stop(training, *args, **options):
    whole_step(training, *args, **options)
    if training.folder.name == "stage1-form1-s0" and training.steps_taken == 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("float64", [False, True])
def test_every_command_runs(float64, monkeypatch, tmp_path, capsys):
    """Stage 1 is stopped in the training of its second network and goes on. The device without float64 is like mps:
    scores are computed on the CPU, and the weights of convolutions must be contiguous. The one with float64 computes
    scores itself, and bfloat16 is tried there too."""
    def convolve(self, x, weight, bias):
        assert float64 or weight.is_contiguous() or not pretend.on_device(weight)
        return right(self, x, weight, bias)

    right, layout = nn.Conv2d._conv_forward, common.memory_format
    like_mps = {pretend.DEVICE: torch.device("mps")}
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", convolve)
    if not float64:
        monkeypatch.setattr(common, "memory_format", lambda device: layout(like_mps.get(device, device)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "draw_shapes", lambda count, seed: draw_all(count // 100, seed))
    monkeypatch.setattr(common, "budget", smaller_budget)
    monkeypatch.setattr(fid, "COMPONENTS", (2, 4))
    monkeypatch.setattr(common, "fast_bfloat16", lambda device: float64)
    with pretend.device(float64):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(common.Training, "step", step_and_stop)
            stage1.main(SMOKE)
        assert stop.value.code == 128 + signal.SIGTERM
        for stage, flags in SOME_COMMANDS if float64 else ALL_COMMANDS:
            stage.main([*SMOKE, *flags])
        capsys.readouterr()
        fid.main(["shapes", "runs/shapes-smoke/stage1-form1-s0/samples", "--device", pretend.NAME, "--json"])
    assert json.loads(capsys.readouterr().out)["n_generated"] == 2
    metrics = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("metrics.json")}
    assert len(metrics) == (4 if float64 else 13)
    assert all(found["run"]["device"].startswith(pretend.NAME) for found in metrics.values())
    if not float64:
        assert metrics["stage1-form1-s0"]["tables"]["latent_space"]["posterior"]
        assert metrics["bonus-latent-s0"]["tables"]["savings"]["device"] == pretend.NAME


def test_training_there_is_training_on_the_cpu(monkeypatch, tmp_path):
    """The same weights, but for rounding: the CPU has another implementation of Adam. Both compute in float32."""
    weights = []
    for device in (CPU, pretend.DEVICE):
        with pretend.device():
            state = stage1.train_vae(tmp_path / device.type, settings(steps=3, batch=4), images_of(60), device)
        weights.append(torch.cat([value.flatten() for value in state["vae"].values()]))
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-5)


def test_what_may_cross():
    """Copies, zero-dimensional tensors and indices of a tensor; a saved tensor comes back on the CPU."""
    with pretend.device():
        x, cpu = torch.arange(4.0, device=pretend.NAME), torch.arange(4.0)
        on_device = [x, *x[:2], cpu.to(x.device), (x * torch.tensor(2.0))[torch.tensor([1])]]
        assert {y.device for y in on_device} == {pretend.DEVICE} and cpu.device == x.cpu().device == CPU
        assert torch.equal(cpu.copy_(2 * x), 2 * x.cpu()) and cpu.device == CPU
        file = io.BytesIO()
        torch.save({"x": x}, file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["x"].device == CPU
        for wrong in (lambda: x + cpu, lambda: torch.cat([x, cpu]), lambda: cpu[x.long()], lambda: cpu.add_(x),
                      lambda: torch.nn.Linear(4, 1)(x), lambda: torch.rand(2, generator=common.generator(0, x.device))):
            with pytest.raises(RuntimeError):
                wrong()


def use_everything():
    """Train a VAE and a refiner for one step, and sample and measure with them, all on the pretend device."""
    train, data = settings(steps=1, batch=4, dropout=0.0), images_of(60)
    vae_state = stage1.train_vae(common.Path("vae"), train, data, pretend.DEVICE)
    state = stage1.train_refiner(common.Path("form1"), train, "form1", vae_state, data, pretend.DEVICE)
    model = stage1.load_model(state, "form1", pretend.DEVICE)
    common.generate(model, 2, "gmm", "ddpm", 2, seed=0, batch=2, damage=0.1)


FAULTS = {  # what is planted: a function, what is replaced in its source, by what, and what the error says
    "noise of x_start": (common, "refine", ".to(model.device)", "", "same device"),
    "noise of a step": (common, "refine", "seed() + 1, model.device)", "seed() + 1)", "same device"),
    "damage": (common, "generate", "damage * randn(clean.shape, damage_gen).to(model.device)",
               "damage * randn(clean.shape, damage_gen)", "same device"),
    "code": (common, "generate", "sample(batch, gen).to(model.device)", "sample(batch, gen)", "same device"),
    "network": (common, "frozen", "network.to(device, memory_format=memory_format(device))", "network", "same device"),
    "images": (common, "encode", "chunk.to(device)", "chunk", "same device"),
    "draws": (common.Training, "normal", "device=self.device", "device='cpu'", "generator"),
    "generator": (common.Training, "uniform", "generator=self.gen", "generator=generator(0)", "generator"),
    "noise levels": (common.Training, "__init__", "torch.ones(NOISE_LEVELS, device=device)",
                     "torch.ones(NOISE_LEVELS)", "same device"),
    "float64": (common.Diffusion, "q_sample", "a * x0", "a.double() * x0", "float64"),
    "numpy": (common, "encode", "torch.cat(mu).cpu()", "torch.from_numpy(torch.cat(mu).numpy())", "numpy"),
}


@pytest.mark.parametrize("owner, name, old, new, message", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(owner, name, old, new, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    source, found = textwrap.dedent(inspect.getsource(getattr(owner, name))), {}
    assert old in source  # else there is nothing to plant
    exec(source.replace(old, new), vars(common), found)
    monkeypatch.setattr(owner, name, found[name])
    with pretend.device(float64=False), pytest.raises((RuntimeError, TypeError), match=message):
        use_everything()


def test_without_a_fault_all_is_well(monkeypatch, tmp_path):
    """So it is the planted fault that fails; and where the device has float64, that one is none."""
    monkeypatch.chdir(tmp_path)
    with pretend.device(float64=False):
        use_everything()
    q_sample = common.Diffusion.q_sample
    monkeypatch.setattr(common.Diffusion, "q_sample", lambda *args: q_sample(*args).double().float())
    with pretend.device(float64=True):
        use_everything()
