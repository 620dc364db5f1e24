"""The command line of each command: a function that declares its arguments.

They are apart from the commands, since `--help` and a wrong flag are answered before JAX is
imported.
"""

from argparse import ArgumentParser


def every_command(parser: ArgumentParser) -> None:
    """Declares what all commands take."""
    add = parser.add_argument
    add("--workdir", default="outputs", help="where everything is written (default: outputs)")
    add("--debug", action="store_true", help="show tracebacks")


def one_checkpoint(parser: ArgumentParser) -> None:
    """Declares what `verify` takes: a run, and one of its checkpoints."""
    one_run(parser)
    parser.add_argument("--checkpoint", help="best, last, or a step (default: all)")


def one_run(parser: ArgumentParser) -> None:
    """Declares `--run`."""
    parser.add_argument("--run", help="name or path of a run, or latest")


def several_runs(parser: ArgumentParser) -> None:
    """Declares `--run` of `visualize`."""
    parser.add_argument(
        "--run", action="append", help="name, path or latest; repeat it to compare runs"
    )


def config_or_run(parser: ArgumentParser) -> None:
    """Declares what `prepare` takes, and all commands that read a config."""
    one_run(parser)
    parser.add_argument("--config", help="a config file, and its preset behind a colon")


def train(parser: ArgumentParser) -> None:
    """Declares what `train` takes."""
    config_or_run(parser)
    add = parser.add_argument
    add("--tokenizer", help="the same as --config.data.tokenizer")
    add("--replay_step", type=int, help="make this step of --run again, and show its batch")
    add(
        "--coordinator",
        help="HOST:PORT of process 0, where several processes train; auto on a TPU pod or in "
        "a job of SLURM or Open MPI",
    )
    add("--num_processes", type=int, help="how many of them there are")
    add("--process_id", type=int, help="which one this is, from 0")


def benchmark(parser: ArgumentParser) -> None:
    """Declares what `benchmark` takes."""
    config_or_run(parser)
    add = parser.add_argument
    add("--steps", type=int, default=20, help="timed steps (default: 20)")
    add(
        "--decode_batches",
        type=int,
        nargs="+",
        default=[1, 8],
        help="rows that are sampled at once (default: 1 8)",
    )


def tokenizer(parser: ArgumentParser) -> None:
    """Declares what `tokenizer` takes."""
    config_or_run(parser)
    parser.add_argument("--out", help="where to write the tokenizer.json")


def data(parser: ArgumentParser) -> None:
    """Declares what `data` takes."""
    config_or_run(parser)
    add = parser.add_argument
    add("--split", choices=("train", "val", "test"), default="train", help="which batches")
    add("--step", type=int, default=0, help="which batch, from 0 (default: 0)")
    add("--rows", type=int, default=4, help="how many of its rows (default: 4)")


def evaluate(parser: ArgumentParser) -> None:
    """Declares what `evaluate` takes."""
    _trained_model(parser)
    add = parser.add_argument
    add("--split", choices=("val", "train", "test"), default="val", help="what to evaluate on")
    add("--text", help="a text file to evaluate on instead; .tsv or .jsonl for pairs")


def generate(parser: ArgumentParser) -> None:
    """Declares what `generate` takes."""
    _trained_model(parser)
    add = parser.add_argument
    add("--prompt", action="append", help="text to continue, or a source; repeat it for several")
    add("--prompt_file", help="a file with a prompt in each line; - for standard input")
    add("--max_new_tokens", type=int, help="tokens per sample (default: 200)")
    add(
        "--num_samples",
        type=int,
        help="samples of each prompt, label or image (default: 1; of images, 4 to 16)",
    )
    add(
        "--temperature",
        type=float,
        help="0 takes the most likely (default: 0.8; 0 for pairs, 1 for images)",
    )
    add("--top_k", type=int, help="only the k most likely tokens")
    add("--top_p", type=float, help="only the most likely with this probability (default: 1)")
    add(
        "--min_p",
        type=float,
        help="none below this fraction of the highest probability (default: 0)",
    )
    add("--repetition_penalty", type=float, help="above 1 avoids repetition (default: 1)")
    add("--seed", type=int, default=0, help="of the randomness (default: 0)")
    add("--num_beams", type=int, default=1, help="above 1: search instead of sampling (default: 1)")
    add("--length_penalty", type=float, default=0.0, help="above 0 prefers longer texts of beams")
    add("--label", action="append", help="of images: a class, by name; repeat it for several")
    add(
        "--image",
        action="append",
        help="of images: complete the upper half of this file, of those of this folder, or of the "
        "first of a split (val); repeat it for several",
    )
    add("--num_steps", type=int, help="of a flow: steps from noise to image (default: 50)")
    add("--solver", help="of a flow: euler or heun (default: heun)")
    add("--guidance", type=float, help="of a flow: above 1 keeps closer to the label (default: 1)")


def _trained_model(parser: ArgumentParser) -> None:
    one_run(parser)
    add = parser.add_argument
    add("--checkpoint", default="last", help="best, last or a step (default: last)")
    add("--tokenizer", help="a tokenizer.json, for an imported model that came without one")
    add(
        "--weights",
        choices=("average", "last"),
        default="average",
        help="which, where the optimizer kept an average of them (default: average)",
    )
