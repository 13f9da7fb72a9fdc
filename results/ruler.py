"""What the distance of an ImageNet network sees: python results/ruler.py writes results/RULER.md.

Held-out images are changed in known ways, and scored against the training images. Beside them stand samples of the
committed weights. Every number is a multiple of the floor, which is the distance of the unchanged held-out images.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import fid  # noqa: E402
import stage1_baseline  # noqa: E402


def warp(x, pixels, gen):
    """Images (N, 3, S, S) moved by a random field: noise, blurred with a sd of 3 pixels, whose displacements along each
    axis have the sd `pixels`."""
    n, _, size, _ = x.shape
    field = torch.from_numpy(gaussian_filter(torch.randn(n, 2, size, size, generator=gen).numpy(), (0, 0, 3, 3)))
    shift = (field * pixels / field.std()).permute(0, 2, 3, 1) * 2 / size  # grid_sample counts from -1 to 1
    grid = F.affine_grid(torch.eye(2, 3).expand(n, -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid + shift, padding_mode="border", align_corners=False)


def as_jpeg(x, quality):
    """Images (N, 3, S, S) after JPEG compression."""
    images = []
    for image in x.byte():
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        images.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(images)


def changed_images(x, gen):
    """{name: images} of the held-out images x, float (N, 3, S, S), 0 to 255."""
    half = x.shape[-1] // 2
    blurred = {f"blur of {sd} pixels": torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sd, sd)))
               for sd in (0.5, 0.7, 1)}
    noisy = {f"noise of {sd} (images span 0 to 1)": x + 255 * sd * torch.randn(x.shape, generator=gen)
             for sd in (0.02, 0.05, 0.1)}
    warped = {f"warped by {pixels} pixels": warp(x, pixels, gen) for pixels in (1, 2)}
    return blurred | noisy | warped | {
        "left half of one image, right half of another": torch.cat([x[..., :half], x.roll(1, 0)[..., half:]], 3),
        "JPEG of quality 50": as_jpeg(x, 50)}


def samples(dataset, count):
    """{name: images} of the committed weights."""
    model = stage1_baseline.load_pretrained(dataset, torch.device("cpu"))
    found = {}
    for variant, steps in (("form1", 2), ("form1", 5), ("form1", 10), ("form1", 25), ("guided", 5), ("guided", 10)):
        model.variant = variant
        settings = model.settings | {"last_time": 16} | common.sampling_settings("dpm", steps)
        x_hat, images = stage1_baseline.generate(model, settings,
                                                 stage1_baseline.draw_codes(model, settings, count))
        found["committed weights: VAE"] = x_hat
        found[f"{variant}, {steps} steps"] = images
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description="What the distance of an ImageNet network sees")
    parser.add_argument("--data-dir", default="data", help="as in training (default: data)")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="held-out images, and samples")
    args = parser.parse_args(argv)
    extractor = fid.load_extractor("imagenet")
    columns, notes = {}, []
    for dataset in ("celeba64", "cifar10"):
        data = common.load_data(dataset, args.data_dir)
        scorer = fid.Scorer(extractor, data)
        held_out = data.test.images[: args.count]
        floor = scorer.fd(held_out)
        sets = changed_images(held_out.float(), common.generator(0, "changes")) | samples(dataset, len(held_out))
        columns[dataset] = {name: scorer.fd(images.float().round().clamp(0, 255).byte()) / floor
                            for name, images in sets.items()}
        notes.append(f"{dataset} ({data.train.note}): floor {floor:.3g}, {len(held_out)} held-out images and as many "
                     f"samples against {len(data.reference.images):,}.")
    rows = [f"| {name} | {' | '.join(f'{column[name]:.3g}' for column in columns.values())} |" for name in sets]
    text = "\n".join(["# What the ruler sees", "", __doc__.split("\n\n")[1].strip(), "", *notes, "",
                      f"| images | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|", *rows, ""])
    (ROOT / "results" / "RULER.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
