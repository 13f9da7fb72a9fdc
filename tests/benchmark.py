"""How fast are the defaults? Ratios between things that are timed in turn, within one run, on the machine at hand.

    python tests/benchmark.py                    two minutes on two CPU cores; `pip install diffusers` adds a comparison
    python tests/benchmark.py | tee results/benchmark.txt        what TABLES.md shows

Each row is the median of several rounds; a round times every contender once, so that a machine which slows down slows
all of them. The shape is that of CIFAR-10 at the `cpu` budget. Nothing here is a test: no number can fail.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def in_turn(contenders, rounds=15):
    """Median seconds of each of {name: function}, timed in turn after two warm-up calls."""
    times = {name: [] for name in contenders}
    for i in range(rounds + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name] += [time.perf_counter() - start] if i > 1 else []
    return {name: statistics.median(values) for name, values in times.items()}


def report(title, seconds, base):
    """Print seconds and ratios to one contender as a table."""
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:44} {1000 * value:9.2f} ms   {value / seconds[base]:5.2f}")


def unet(table):
    """A U-Net and what calls it; the other contenders are made in the same way."""
    net = common.UNet(table, 6, attention=())
    return net, net.forward


def work(make, batch, train=True, bf16=False, channels_last=False, fused=False):
    """A training step as the stages take it: forward, backward, clipping, Adam; or one evaluation without gradients."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network, forward = make()
    network.to(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=fused, foreach=False)
    x = torch.randn(batch, 6, 32, 32).contiguous(memory_format=layout)
    t, target = torch.randint(1, 1001, (batch,)), torch.randn(batch, 3, 32, 32)

    def run():
        with torch.set_grad_enabled(train), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = (forward(x, t) - target).square().mean()
        if train:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    return run


def parameters(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make()[0].parameters())


def defaults(train, native):
    """What each default gains at the training step, alone and together."""
    table, fast = train["unet"], {"bf16": native, "channels_last": True, "fused": True}
    tables = {w: [(r, w, down, up) for r, _, down, up in table] for w in range(16, 257, 8)}  # of one width
    width = min(tables, key=lambda w: abs(parameters(partial(unet, tables[w])) - parameters(partial(unet, table))))
    ways = {"float32, contiguous, plain Adam": (table, {}), "channels_last": (table, {"channels_last": True}),
            "fused Adam": (table, {"fused": True}), "bfloat16": (table, {"bf16": True}),
            "all of them: the default": (table, fast),
            f"all, but one width ({width}), as many parameters": (tables[width], fast)}
    seconds = in_turn({name: work(partial(unet, shape), train["batch"], **options)
                       for name, (shape, options) in ways.items() if native or name != "bfloat16"})
    report(f"training step, batch {train['batch']}", seconds, "float32, contiguous, plain Adam")
    return seconds["all of them: the default"]


def against_diffusers(train, native):
    """Hugging Face's U-Net of equal widths and layers, in a training step and a sampling pass."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        print("\ndiffusers is not installed: not compared")
        return
    widths = [width for _, width, _, _ in train["unet"]]
    table = [(resolution, width, 1, 2) for resolution, width, _, _ in train["unet"]]  # diffusers has one more going up

    def theirs():
        net = UNet2DModel(32, 6, 3, layers_per_block=1, block_out_channels=widths, norm_num_groups=8,
                          down_block_types=["DownBlock2D"] * len(widths), up_block_types=["UpBlock2D"] * len(widths),
                          attention_head_dim=widths[-1])
        return net, lambda x, t: net(x, t).sample

    makers = {"diffusers": theirs, "ours": partial(unet, table)}
    print("\nparameters: " + ", ".join(f"{name} {parameters(make) / 1e6:.2f}M" for name, make in makers.items()))
    ways = {"float32": {}, "our defaults": {"bf16": native, "channels_last": True, "fused": True}}
    for title, trains, batch in (("training step", True, train["batch"]), ("sampling pass", False, 100)):
        report(f"{title}, batch {batch}", in_turn({
            f"{name}, {way}": work(make, batch, trains, **options)
            for name, make in makers.items() for way, options in ways.items()}), "diffusers, float32")


def utilisation(train, native, seconds):
    """FLOP/s of the training step (three forward passes' worth) against a large matrix product's."""
    a = torch.randn(4096, 4096, dtype=torch.bfloat16 if native else torch.float32)
    with torch.device("meta"):
        gflops = common.count_cost(common.UNet(train["unet"], 6, attention=()), torch.empty(1, 6, 32, 32),
                                   torch.ones(1))["gflops"]
    peak = 2 * 4096**3 / in_turn({"product": lambda: a @ a}, rounds=3)["product"] / 1e9
    reached = 3 * gflops * train["batch"] / seconds
    print(f"\n{reached:.0f} GFLOP/s in the training step, {peak:.0f} in a product of 4096 x 4096 matrices: "
          f"{reached / peak:.2f}")


def overheads(train, seconds):
    """What surrounds the step: feeding it, the moving average, the log and the checkpoint, as shares of the step."""
    net = unet(train["unet"])[0]
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        training = common.Training(folder, None, train | {"seed": 0}, CPU, images, True, unet=net)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for optimizer in training.optimizers.values():
            optimizer.step()  # makes its state, which a checkpoint holds
        training.started, rows = time.time(), train["steps"] // train["every"]
        training.bar = tqdm(disable=True)
        training.log = [{"step": i, "v_mse": 0.1} for i in range(rows // 2)]  # as long as it is on average
        parts = in_turn({"feed": training.batch, "log": lambda: training.write_row({}), "save": training.checkpoint,
                         "average": lambda: torch._foreach_lerp_(list(training.averages["unet"].values()),
                                                                 list(net.state_dict().values()), 0.001)})
    print(f"\nfeeding a batch: {parts['feed'] / seconds:.2%} of a step")
    kept = {"moving average": parts["average"] / seconds, "a row of the log": parts["log"] / train["every"] / seconds,
            "a checkpoint a minute": parts["save"] / 60}
    print(f"{', '.join(f'{name} {share:.2%}' for name, share in kept.items())}: together {sum(kept.values()):.2%}")


def commands():
    """Seconds until a command that does nothing has done it."""
    run = lambda *flags: subprocess.run([sys.executable, ROOT / "stage1_baseline.py", *flags],  # noqa: E731
                                        check=True, capture_output=True)
    seconds = in_turn({"--help": lambda: run("--help"), "--dry-run": lambda: run("--dry-run")}, rounds=3)
    print("\n" + ", ".join(f"{flag} {value:.1f} s" for flag, value in seconds.items()))


def main():
    torch.manual_seed(0)
    common.keep_freed_memory()
    train, _ = common.budget("cpu", "cifar10", 32)
    with common.autocast(CPU):
        native = torch.is_autocast_enabled("cpu")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bfloat16 {'' if native else 'not '}native")
    seconds = defaults(train, native)
    against_diffusers(train, native)
    utilisation(train, native, seconds)
    overheads(train, seconds)
    commands()


if __name__ == "__main__":
    main()
