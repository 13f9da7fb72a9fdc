"""Lets every test file import the scripts from the repository root. All compute on one thread, in float32, so that
their numbers are the same everywhere."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
torch.cpu._is_amx_tile_supported = lambda: False


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Commands run in an empty folder, on a twentieth of the built-in data set."""
    from helpers import small_shapes

    import common
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "draw_shapes", small_shapes)
    return tmp_path
