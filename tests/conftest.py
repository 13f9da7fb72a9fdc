"""Every test file imports the scripts from the repository root, and computes on one thread (same bits everywhere)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
