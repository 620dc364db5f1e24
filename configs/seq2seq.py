"""A small encoder-decoder on pairs of text that are made here.

    python -m craft_jax.main --config=configs/seq2seq.py             # dates
    python -m craft_jax.main --config=configs/seq2seq.py:reverse
    python -m craft_jax.main generate --run=latest --prompt="march 5, 1987"

Presets, with what to expect: how many of 1,000 sources that it never trained on get the whole right
target, in every place, from greedy decoding (`exact match`).

    preset   source -> target              parameters  where        time         exact match
    dates    march 5, 1987 -> 1987-03-05   0.24 M      2 CPU cores  1 to 2 min   100 %
    reverse  orange -> egnaro              0.24 M      2 CPU cores  1 to 2 min   100 %
    sort     orange -> aegnor              0.24 M      2 CPU cores  1 to 2 min   99.8 to 100 %

The figures are those of two seeds of `dates` and `reverse`, and of three of `sort`; the seed that
is set here gives 100 % in all of them.

Dates come in ten spellings: with the month's name or its first three letters, with slashes (month
first) and with dots (day first); two digits of a year stand for 1930 to 2029. Words have 2 to 10
letters. For pairs of your own: `--config.data.pairs=mine.tsv`, see docs/configuration.md.
"""

from ml_collections import ConfigDict

_PRESETS = ("dates", "reverse", "sort")


def get_config(preset: str = "dates") -> ConfigDict:
    if preset not in _PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(_PRESETS)}")
    # The longest date is "september 30, 1987", the longest word has 10 letters; and an end token.
    seq_len = 20 if preset == "dates" else 12
    config = ConfigDict()
    config.model = ConfigDict(
        {
            "name": "seq2seq",
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "d_model": 64,
            "max_seq_len": seq_len,
            "dropout": 0.0,
        }
    )
    config.data = ConfigDict(
        {
            "pairs": preset,
            "num_pairs": 20_000,
            "tokenizer": "char",
            "seq_len": seq_len,
            "batch_size": 64,
        }
    )
    config.optim = ConfigDict(
        {
            "name": "adamw",
            "schedule": "cosine",
            "learning_rate": 3e-3,
            "min_learning_rate": 1e-4,
        }
    )
    config.training = ConfigDict(
        {
            "num_steps": 1500,
            "eval_every": 250,
            "checkpoint_every": 500,
            "sample_every": 500,
            "log_every": 50,
            "precision": "float32",
            "seed": 0,
        }
    )
    return config
