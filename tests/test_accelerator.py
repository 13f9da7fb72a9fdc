"""Every stage on a pretend accelerator (pretend.py), which finds tensors and generators on the wrong device."""

import io
import itertools
import json
from types import SimpleNamespace

import pretend
import pytest
import torch
from helpers import CPU, data_of, draw_all, settings

import bonus_latent as bonus
import common
import fid
import stage1_baseline as stage1
import stage2_joint as stage2
import stage3_adaptive as stage3

COMMANDS = [(stage1, "--variant guided --export 4"), (stage2, "--loss kendall --sampler ddim"), (stage3, ""),
            (bonus, "")]
FLAGS = [*f"--budget smoke --device {pretend.NAME} --resume --eval-samples 20 --sample-steps 2".split(),
         *"--set vae_steps=3 unet_steps=2 flow_steps=2 every=1 batch=8 dropout=0.1 probe_steps=1".split()]


def test_every_stage_runs(monkeypatch, tmp_path):
    """Stage 1 is killed in the training of its second network and goes on."""
    def step_and_stop(training, *args):
        step(training, *args)
        if training.folder.name == "stage1-form1-s0" and training.steps_taken == 2:
            raise KeyboardInterrupt

    step, clock = common.Training.step, itertools.count(0, 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "draw_shapes", lambda count, seed: draw_all(count // 100, seed))
    monkeypatch.setattr(fid, "NOISE", (0.0, 0.4))
    monkeypatch.setattr(fid, "jackknife", lambda score, x: {"value": score(x)})  # slow, and on the CPU anyway
    with pretend.device():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common, "time", SimpleNamespace(time=lambda: next(clock)))  # a minute has always passed
            patch.setattr(common.Training, "step", step_and_stop)
            stage1.main(FLAGS)
        assert len([*tmp_path.rglob("unfinished.pt")]) == 1
        for stage, flags in COMMANDS:
            stage.main([*FLAGS, *flags.split()])
            monkeypatch.setattr(fid, "latent_space", lambda *args: {})  # slow, and the same in all stages
    found = [json.loads(path.read_text())["run"] for path in tmp_path.rglob("metrics.json")]
    assert len(found) == 7 and {run["device"] for run in found} == {pretend.NAME}


def test_other_variants_train_and_sample(tmp_path):
    own, data = settings(2, batch=8, dropout=0.1, eval_samples=4, sampler="ddpm"), data_of(60)
    with pretend.device() as device:
        base = stage3.train_vae(tmp_path / "vae", own, data, device)
        augmented = stage1.train_refiner(tmp_path / "1", own, "augmented", base, data, device)
        bound = stage2.train_joint(tmp_path / "2", own, "bound", "full", data, device)
        coupling = stage3.train_refiner(tmp_path / "3", own, "coupling", "posterior", base, data, device)
        for stage, state in ((stage1, augmented), (stage2, bound), (stage3, coupling)):
            _, images, _ = common.generate(stage.load_model(state, device), own, damage=0.1)
            assert len(images) == 4 and images.device == CPU


def test_training_there_is_training_on_the_cpu(tmp_path):
    """The same weights: a pretend device computes on the CPU."""
    weights = []
    for device in (CPU, pretend.DEVICE):
        with pretend.device():
            state = stage1.train_vae(tmp_path / device.type, settings(steps=3, batch=4), data_of(60), device)
        weights.append(torch.cat([value.flatten() for value in state["vae"].values()]))
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-5)


def test_what_may_cross():
    """Copies, zero-dimensional tensors and indices of a tensor. A saved tensor comes back on the CPU. The device has no
    float64."""
    with pretend.device():
        x, cpu = torch.arange(4.0, device=pretend.NAME), torch.arange(4.0)
        on_device = [x, *x[:2], cpu.to(x.device), (x * torch.tensor(2.0))[torch.tensor([1])]]
        assert {y.device for y in on_device} == {pretend.DEVICE} and cpu.device == x.cpu().device == CPU
        assert torch.equal(cpu.copy_(2 * x), 2 * x.cpu()) and cpu.device == CPU
        file = io.BytesIO()
        torch.save({"x": x}, file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["x"].device == CPU
        gen = common.generator(0, "there", x.device)
        for wrong in (lambda: x + cpu, lambda: torch.cat([x, cpu]), lambda: cpu[x.long()], lambda: cpu.add_(x),
                      lambda: torch.nn.Linear(4, 1)(x), lambda: torch.rand(2, generator=gen), x.double, x.numpy):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
