"""How much faster the defaults are: ratios between ways to take a training step, on the machine at hand.

    python tests/benchmark.py                                    a minute on two CPU cores
    python tests/benchmark.py | tee results/benchmark.txt        what TABLES.md shows

Each row is the median over several rounds. A round times every way once, so that a machine which slows down slows all
of them. The shapes are those of CIFAR-10 at the `cpu` budget. Nothing here is a test: no number can fail.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

CPU = torch.device("cpu")


def training_step(table, batch, reduced=False, channels_last=False, fused=False):
    """A function that takes a training step like the stages': forward, backward, clipping, Adam. `table` is the U-Net's
    (common.UNET_TABLES), `reduced` computes in bfloat16."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = common.UNet(table, 6, attention=()).to(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=fused, foreach=False)
    x = torch.randn(batch, 6, 32, 32).contiguous(memory_format=layout)
    t, target = torch.randint(1, 1001, (batch,)), torch.randn(batch, 3, 32, 32)

    def step():
        with common.autocast(CPU, reduced):
            loss = (network(x, t) - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def size_of(table):
    """The number of parameters of a U-Net with this table."""
    with torch.device("meta"):
        return common.count_parameters(common.UNet(table, 6, attention=()))


def main():
    torch.manual_seed(0)
    common.keep_freed_memory()
    train, _ = common.budget("cpu", "cifar10", 32)
    table, batch, native = train["unet"], train["batch"], common.native_bfloat16(CPU)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16 {'' if native else 'not '}native")

    # A U-Net whose width is the same at every resolution, with about as many parameters.
    flat_tables = {width: [(resolution, width, down, up) for resolution, _, down, up in table]
                   for width in range(16, 257, 8)}
    width = min(flat_tables, key=lambda width: abs(size_of(flat_tables[width]) - size_of(table)))

    plain, default = "float32, contiguous, plain Adam", {"reduced": native, "channels_last": True, "fused": True}
    steps = {plain: training_step(table, batch),
             "channels_last": training_step(table, batch, channels_last=True),
             "fused Adam": training_step(table, batch, fused=True)}
    if native:
        steps["bfloat16"] = training_step(table, batch, reduced=True)
    steps["all of them: the default"] = training_step(table, batch, **default)
    steps[f"all, but one width ({width}), as many parameters"] = training_step(flat_tables[width], batch, **default)
    seconds = common.time_in_turn(steps, CPU, repeats=15)
    print(f"\ntraining step, batch {batch}")
    for name, value in seconds.items():
        print(f"  {name:44} {1000 * value:9.2f} ms   {value / seconds[plain]:5.2f}")


if __name__ == "__main__":
    main()
