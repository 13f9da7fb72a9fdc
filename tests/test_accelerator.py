"""Every stage on a pretend accelerator (pretend.py), which finds tensors and generators on the wrong device."""

import itertools
from types import SimpleNamespace

import pretend
import pytest
import torch
from helpers import data_of

import bonus_latent
import common
import fid
import final_evaluation
import stage1_baseline
import stage2_joint
import stage3_adaptive

COMMANDS = [(stage1_baseline, "--variant guided augmented"), (stage2_joint, "--loss bound --sampler ddpm"),
            (stage3_adaptive, "--conditioning coupling --uncertainty posterior"), (bonus_latent, "")]
FLAGS = [*f"--budget smoke --device {pretend.NAME} --resume --eval-samples 40 --sample-steps 2".split(),
         *"--set vae_steps=3 unet_steps=2 flow_steps=2 every=1 batch=8 dropout=0.1".split()]


def test_every_stage_runs(monkeypatch, tmp_path):
    """Stage 1 is killed in the training of its second network and goes on. The last run is measured."""
    def log_and_stop(progress, **terms):
        log(progress, **terms)
        if progress.folder.name == "stage1-form1-s0" and progress.done == 1:
            raise KeyboardInterrupt

    log, clock, data = common.Progress.log, itertools.count(0, 100), data_of(60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_data", lambda *args: data)
    monkeypatch.setattr(common, "what_to_sample", lambda settings, *args: [("", settings, 40)])
    monkeypatch.setattr(fid, "jackknife", lambda score, x: {"value": score(x)})  # slow, and on the CPU anyway
    with pretend.device():
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common, "time", SimpleNamespace(time=lambda: next(clock)))  # a minute has always passed
            patch.setattr(common.Progress, "log", log_and_stop)
            stage1_baseline.main(FLAGS)
        assert len([*tmp_path.rglob("unfinished.pt")]) == 1
        for stage, flags in COMMANDS:
            stage.main([*FLAGS, *flags.split()])
        final_evaluation.main(["--device", pretend.NAME, "--measure", *map(str, tmp_path.glob("runs/*/stage3-flow*"))])
    assert len([*tmp_path.rglob("metrics.json")]) == 8 and len([*tmp_path.rglob("evaluation.json")]) == 1


def test_what_fails():
    """What would fail on a real accelerator fails on the pretend one."""
    with pretend.device():
        x, cpu = torch.arange(4.0, device=pretend.NAME), torch.arange(4.0)
        assert x.device == (x[:2] * torch.tensor(2.0)).device == pretend.DEVICE != x.cpu().device
        gen = common.generator(0, "there", x.device)
        for wrong in (lambda: x + cpu, lambda: torch.cat([x, cpu]), lambda: cpu[x.long()], lambda: cpu.add_(x),
                      lambda: torch.nn.Linear(4, 1)(x), lambda: torch.rand(2, generator=gen), x.double, x.numpy):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
