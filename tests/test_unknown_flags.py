"""Wrong command lines of newcomers: each is answered with the right one."""

import shlex

import pytest

from craft_jax.main import main

CONFIG = "--config=configs/gpt.py"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (f"{CONFIG} --lr=3e-4", "did you mean --config.optim.learning_rate=3e-4?"),
        (f"{CONFIG} --learning_rate=3e-4", "did you mean --config.optim.learning_rate=3e-4?"),
        (f"{CONFIG} --learning-rate 3e-4", "did you mean --config.optim.learning_rate=3e-4?"),
        (f"{CONFIG} --optim.lr=4", "did you mean --config.optim.learning_rate=4?"),
        (f"{CONFIG} --optim.learning_rate=4", "did you mean --config.optim.learning_rate=4?"),
        (f"{CONFIG} --n_layer=4", "did you mean --config.model.num_layers=4?"),
        (f"{CONFIG} --batch_size=4", "did you mean --config.data.batch_size=4?"),
        (f"{CONFIG} --max_iters=10", "did you mean --config.training.num_steps=10?"),
        (f"{CONFIG} --block_size 64", "did you mean --config.model.max_seq_len=64?"),
        (f"{CONFIG} --seed=3", "did you mean --config.training.seed=3?"),
        (f"{CONFIG} --dtype=bfloat16", "did you mean --config.training.precision=bfloat16?"),
        (f"{CONFIG} --num_layer=4", "did you mean --config.model.num_layers=4?"),
        (f"{CONFIG} --resume", "a run that exists is continued: --run=NAME, or --run=latest"),
        (f"{CONFIG} --device=cpu", "set JAX_PLATFORMS=cpu"),
        (f"{CONFIG} --gpu", "set JAX_PLATFORMS=cpu (cuda, tpu)"),
        ("--confg=configs/gpt.py", "did you mean --config=configs/gpt.py?"),
        ("configs/gpt.py", "did you mean --config=configs/gpt.py?"),
        ("train configs/gpt.py:small", "did you mean --config=configs/gpt.py:small?"),
        ("-run=latest", "did you mean --run=latest?"),
        ("--run = x", "did you mean --run=x?"),
        ("--run =", "write a flag and its value as one word, such as --run=NAME"),
        ("generate latest", "did you mean --run=latest?"),
        ("evalute --run=latest", "'evalute' is no command; did you mean 'evaluate'?"),
        ("generate --max-new-tokens=5", "did you mean --max_new_tokens=5?"),
        ("generate --promt='a b'", "did you mean --prompt='a b'?"),
        ("generate --temp=0", "did you mean --temperature=0?"),
        ("evaluate --run=latest --prompt=hi", "it is a flag of generate"),
        (
            "runs --xyzzy",
            "'--xyzzy' is no argument of runs\n(python -m craft_jax.main runs --help)",
        ),
    ],
)
def test_the_right_command_line_is_named(words, answer, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(words)) == 2
    assert answer in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_each_unknown_word_has_a_line(capsys):
    assert main([CONFIG, "--lr=1", "--run=x", "--n_head", "2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("did you mean --config.optim.learning_rate=1?")
    assert lines[1].endswith("did you mean --config.model.num_heads=2?")
    assert len(lines) == 3
