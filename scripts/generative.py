"""How good the models of images are: trains the configs as they are, and measures what they made.

    python scripts/generative.py [--workdir=FOLDER] [--seed=0] [--steps=N]

It trains `configs/image_gpt.py` and `configs/flow.py` on the digits, or takes the runs `image_gpt`
and `flow` of the folder if they are there, and prints

- bits per dimension of held-out digits, beside those of a histogram of each pixel, which is fitted
  to the images that train;
- how often a classifier, fitted to real digits, sees in samples the label that was asked for;
- how far samples are from the nearest image that trains, beside real digits that were held out.

The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sklearn.svm import SVC

from craft_jax import runs
from craft_jax.data import pipeline
from craft_jax.data.base import Dataset

SAMPLES_PER_CLASS = 50
_PSEUDO_COUNTS = (0.01, 0.1, 0.5, 1.0)
_LEVELS = 255 / 16


class Split(NamedTuple):
    """Images of one split: pixels (N, 64) from 0 to 16, and labels (N,)."""

    pixels: np.ndarray
    labels: np.ndarray


def read_split(data: Dataset) -> Split:
    """Returns all images of a split of digits."""
    data = data.one_pass()
    images = getattr(data, "images", data)
    numbers = images.indices.tolist()
    pixels = np.stack([images.source.image(i).reshape(-1) for i in numbers]) / _LEVELS
    return Split(pixels, np.array([images.source.label(i) for i in numbers]))


def histogram_bits(train: Split, held_out: Split) -> float:
    """Returns bits for each pixel of a histogram of its values, fitted to what trains.

    Every value counts a little more than it was seen; of several such amounts, the one that is best
    for what is held out, which the models are not granted.
    """
    seen_TV = np.stack([np.bincount(c, minlength=17) for c in np.rint(train.pixels.T).astype(int)])
    values_NT = np.rint(held_out.pixels).astype(int)
    places_T = np.arange(seen_TV.shape[0])[None, :]
    found = []
    for pseudo_count in _PSEUDO_COUNTS:
        p_TV = (seen_TV + pseudo_count) / (seen_TV + pseudo_count).sum(axis=1, keepdims=True)
        found.append(-np.log2(p_TV[places_T, values_NT]).mean())
    return float(min(found))


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns how far each row of `a` is from the nearest of `b`."""
    return np.stack([np.sqrt(((b - row) ** 2).sum(axis=1)).min() for row in a])


def measure(image_gpt: runs.Run, flow: runs.Run, bits: float, seed: int = 0) -> dict[str, Any]:
    """Returns the figures of both runs.

    Args:
      image_gpt, flow: trained on the same digits.
      bits: per dimension, of the former on what is held out.
      seed: of the samples.
    """
    config = flow.config
    opened = pipeline.open_datasets(
        config.data, workdir=flow.paths.workdir, seed=config.training.seed
    )
    train, held_out = read_split(opened.train), read_split(opened.val)
    classifier = SVC(gamma=0.001, C=10).fit(train.pixels, train.labels)
    baseline = histogram_bits(train, held_out)
    figures: dict[str, Any] = {
        "bits_per_dim": bits,
        "histogram_bits_per_dim": baseline,
        "bits_ratio": bits / baseline,
        "classifier_on_held_out": float(classifier.score(held_out.pixels, held_out.labels)),
        "held_out_distance": _quantiles(nearest(held_out.pixels, train.pixels)),
    }
    labels = [label for label in range(10) for _ in range(SAMPLES_PER_CLASS)]
    for name, run in (("flow", flow), ("image_gpt", image_gpt)):
        made = run.generate_images(labels, seed=seed).reshape(len(labels), -1) / _LEVELS
        figures |= {
            f"{name}_accuracy": float((classifier.predict(made) == labels).mean()),
            f"{name}_distance": _quantiles(nearest(made, train.pixels)),
        }
    return figures


def _quantiles(values: np.ndarray) -> list[float]:
    """Returns minimum, 10 %, median and 90 %."""
    return [float(q) for q in np.quantile(values, [0, 0.1, 0.5, 0.9])]


def table(figures: dict[str, Any]) -> list[str]:
    """Returns the figures as a table of Markdown."""

    def distances(name: str) -> str:
        least, low, median, high = figures[f"{name}_distance"]
        return f"{median:.1f} ({low:.1f} to {high:.1f}; nearest {least:.1f})"

    return [
        "| | held-out digits | flow | GPT of pixels |",
        "|---|---|---|---|",
        f"| the classifier sees the label asked for | {figures['classifier_on_held_out']:.1%} | "
        f"{figures['flow_accuracy']:.1%} | {figures['image_gpt_accuracy']:.1%} |",
        "| distance to the nearest that trains, median (10 to 90 %) | "
        f"{distances('held_out')} | {distances('flow')} | {distances('image_gpt')} |",
        "| bits per dimension; of a histogram of each pixel "
        f"{figures['histogram_bits_per_dim']:.3f} | | | {figures['bits_per_dim']:.3f} "
        f"({figures['bits_ratio']:.1%}) |",
    ]


def train_and_evaluate(name: str, workdir: Path, *words: str) -> dict[str, Any]:
    """Trains a config, unless that is done; returns what `evaluate` says, and `seconds`."""
    start = time.monotonic()
    where = [f"--run={name}", f"--workdir={workdir}"]
    main = [sys.executable, "-m", "craft_jax.main"]
    config = f"--config={ROOT / 'configs' / name}.py"
    subprocess.run([*main, config, *where, *words], cwd=ROOT, check=True)
    seconds = time.monotonic() - start
    done = subprocess.run(
        [*main, "evaluate", *where], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": seconds}


def main() -> None:
    """Trains, measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", help="where to train; a temporary folder if left out")
    parser.add_argument("--seed", type=int, default=0, help="of training and samples")
    parser.add_argument("--steps", type=int, help="of both; those of the configs if left out")
    args = parser.parse_args()
    words = [f"--config.training.seed={args.seed}"]
    words += [f"--config.training.num_steps={args.steps}"] if args.steps else []
    with tempfile.TemporaryDirectory() as scratch:
        workdir = Path(args.workdir or scratch).absolute()
        said = {n: train_and_evaluate(n, workdir, *words) for n in ("image_gpt", "flow")}
        figures = measure(
            runs.open("image_gpt", workdir=workdir),
            runs.open("flow", workdir=workdir),
            said["image_gpt"]["bits_per_dim"],
            args.seed,
        )
    for name, result in said.items():
        figures |= {f"{name}_loss": result["loss"], f"{name}_seconds": result["seconds"]}
    print("\n".join(table(figures)))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
