"""Several processes (torchrun) train and sample what one process does, and go on with what another number began."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_stage1 import expect_error, small  # noqa: F401 - a fixture

import common
import stage1_baseline as stage1

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import common
draw_all = common.draw_shapes
common.draw_shapes = lambda count, seed: draw_all(count // 20, seed)  # as the fixture `small`
common.autocast = lambda device: torch.autocast(device.type, enabled=False)  # in bfloat16 sums would differ by 0.4%
import {stage} as stage
stage.main()
"""


def torchrun(folder, stage, *flags, ranks=2):
    """Run a stage on few images with so many processes; returns what it printed."""
    script = folder / f"{stage}_small.py"
    script.write_text(SCRIPT.format(root=str(ROOT), stage=stage))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               str(script), "--budget", "smoke", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(folder, variant):
    return torch.load(folder / "shapes-smoke" / f"stage1-{variant}-s0" / "checkpoint.pt", weights_only=True)


def test_shares_make_the_whole(monkeypatch):
    """Slices of all processes put together are the batch, in order; what they sampled comes back in order."""
    x, y = torch.arange(8), torch.arange(16).view(8, 2)
    assert torch.equal(*common.share(x), x)
    monkeypatch.setattr(common, "ranks", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        parts.append(common.share(x, y))
    assert torch.equal(torch.cat([p[0] for p in parts]), x) and torch.equal(torch.cat([p[1] for p in parts]), y)
    batches = list("abcde")

    def everyone(lists, mine):
        lists[:] = batches[0::2], batches[1::2]
    monkeypatch.setattr(common.distributed, "all_gather_object", everyone)
    assert common.gather(batches[1::2]) == batches


def test_two_processes_do_what_one_does(small, tmp_path, monkeypatch, capsys):  # noqa: F811
    """One process begins and is stopped, two go on: weights, and the scores of what is sampled, are those of one
    process alone, within float error."""
    monkeypatch.setattr(common, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    flags, update, updates = ["--variant", "vae", "form1", "--steps", "4"], common.EMA.update, []
    stage1.main(["--budget", "smoke", *flags, "--out", "one"])

    def stop_there(ema, network):
        update(ema, network)
        updates.append(1)
        if len(updates) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common.EMA, "update", stop_there)
        stage1.main(["--budget", "smoke", *flags, "--out", "two"])
    assert load(Path("two"), "vae")["step"] == 2
    common.HELD.clear()  # as if the first process had ended
    printed = torchrun(tmp_path, "stage1_baseline", *flags, "--out", "two", "--resume")
    assert printed.count("features: local-shapes") == 1  # one process speaks for all
    for variant in ("vae", "form1"):
        ours, theirs = load(Path("two"), variant), load(Path("one"), variant)
        for name, tensor in theirs["weights"].items():
            torch.testing.assert_close(ours["weights"][name], tensor, rtol=1e-4, atol=1e-5)
    one, two = (common.read_metrics(Path(out) / "shapes-smoke" / "stage1-form1-s0" / "metrics.json") for out in
                ("one", "two"))
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["fd_local"]["value"] == pytest.approx(b["fd_local"]["value"], rel=0.01)
    capsys.readouterr()


def test_batch_must_be_a_multiple(small, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("test_stage1.stage1.main", stage1.main)
    expect_error(capsys, ["--budget", "smoke", "--batch-size", "32"], "--batch-size 32", "multiple of the 3")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage2_joint", "stage3_adaptive", "bonus_latent"])
def test_every_stage_runs_on_two_processes(stage, tmp_path):
    out = torchrun(tmp_path, stage, "--steps", "4", "--out", "runs")
    assert "features: local-shapes" in out
