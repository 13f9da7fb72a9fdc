"""How fast are the defaults? Ratios between things that are timed in turn, within one run, on the machine at hand.

    python tests/benchmark.py                                    a minute on two CPU cores
    python tests/benchmark.py | tee results/benchmark.txt        what TABLES.md shows

Each row is the median of several rounds; a round times every contender once, so that a machine which slows down slows
all of them. The shape is that of CIFAR-10 at the `cpu` budget. Nothing here is a test: no number can fail.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def in_turn(contenders, rounds=15):
    """Median seconds of each of {name: function}, timed in turn after two warm-up calls."""
    times = {name: [] for name in contenders}
    for i in range(rounds + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name] += [time.perf_counter() - start] if i > 1 else []
    return {name: statistics.median(values) for name, values in times.items()}


def step(table, batch, bf16=False, channels_last=False, fused=False):
    """A training step as the stages take it: forward, backward, clipping, Adam."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = common.UNet(table, 6, attention=()).to(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=fused, foreach=False)
    x = torch.randn(batch, 6, 32, 32).contiguous(memory_format=layout)
    t, target = torch.randint(1, 1001, (batch,)), torch.randn(batch, 3, 32, 32)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = (network(x, t) - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return run


def parameters(table):
    with torch.device("meta"):
        return sum(p.numel() for p in common.UNet(table, 6, attention=()).parameters())


def main():
    torch.manual_seed(0)
    common.keep_freed_memory()
    train, _ = common.budget("cpu", "cifar10", 32)
    with common.autocast(torch.device("cpu")):
        native = torch.is_autocast_enabled("cpu")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16 {'' if native else 'not '}native")
    table, fast = train["unet"], {"bf16": native, "channels_last": True, "fused": True}
    tables = {w: [(r, w, down, up) for r, _, down, up in table] for w in range(16, 257, 8)}  # of one width
    width = min(tables, key=lambda w: abs(parameters(tables[w]) - parameters(table)))
    ways = {"float32, contiguous, plain Adam": (table, {}), "channels_last": (table, {"channels_last": True}),
            "fused Adam": (table, {"fused": True}), "bfloat16": (table, {"bf16": True}),
            "all of them: the default": (table, fast),
            f"all, but one width ({width}), as many parameters": (tables[width], fast)}
    seconds = in_turn({name: step(shape, train["batch"], **options)
                       for name, (shape, options) in ways.items() if native or name != "bfloat16"})
    print(f"\ntraining step, batch {train['batch']}")
    for name, value in seconds.items():
        print(f"  {name:44} {1000 * value:9.2f} ms   {value / seconds['float32, contiguous, plain Adam']:5.2f}")


if __name__ == "__main__":
    main()
