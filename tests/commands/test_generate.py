import io

import pytest

from craft_jax import main as cli
from craft_jax import runs
from craft_jax.errors import UsageError
from craft_jax.generation.prompts import prompt_ids
from tests.conftest import micro


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Outputs with one run of a byte model, on text with characters of several bytes."""
    folder = tmp_path_factory.mktemp("generate")
    text = folder / "text.txt"
    text.write_text("caf\u00e9 \U0001f642 \u6f22\u5b57 and so on\n" * 200, encoding="utf-8")
    changes = {"data__tokenizer": "byte", "training__num_steps": 80, "training__log_every": 40}
    changes |= {"training__sample_every": 0, "training__checkpoint_every": 0}
    config = micro(text, **changes, training__eval_every=0, optim__learning_rate=1e-2)
    assert cli.main([*config, f"--workdir={folder}"]) == 0
    return folder


def generate(workdir, capsys, *words, code=0):
    capsys.readouterr()
    assert cli.main(["generate", f"--workdir={workdir}", "--max_new_tokens=20", *words]) == code
    return capsys.readouterr()


def test_the_same_seed_gives_the_same_text(workdir, capsys):
    first = generate(workdir, capsys, "--prompt=caf", "--seed=3").out
    assert first.startswith("caf")
    assert first == generate(workdir, capsys, "--prompt=caf", "--seed=3").out
    assert first != generate(workdir, capsys, "--prompt=caf", "--seed=4", "--temperature=2").out


def test_text_alone_on_standard_output_and_in_the_file(workdir, capsys):
    before = set((workdir / "samples").iterdir())
    said = generate(workdir, capsys, "--prompt=and ")
    (file,) = set((workdir / "samples").iterdir()) - before
    assert file.read_text(encoding="utf-8") == said.out
    assert f"written to {file}" in said.err


def test_several_prompts_and_samples(workdir, capsys):
    said = generate(
        workdir, capsys, "--prompt=and", "--prompt=so on", "--num_samples=2", "--temperature=1.5"
    ).out
    parts = said.split("--- ")
    assert [part.split(" ---\n")[0] for part in parts[1:]] == [
        "1 of 4",
        "2 of 4",
        "3 of 4",
        "4 of 4",
    ]
    texts = [part.split(" ---\n")[1] for part in parts[1:]]
    assert [text[:3] for text in texts] == ["and", "and", "so ", "so "]
    assert texts[0] != texts[1]
    alone = generate(workdir, capsys, "--prompt=so on", "--temperature=1.5").out
    assert texts[2] == alone


def test_prompts_from_a_file_and_from_standard_input(workdir, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("and\nso\n", encoding="utf-8")
    from_file = generate(workdir, capsys, f"--prompt_file={tmp_path / 'prompts.txt'}").out
    monkeypatch.setattr("sys.stdin", io.StringIO("and\nso\n"))
    assert generate(workdir, capsys, "--prompt_file=-").out == from_file
    assert "--- 2 of 2 ---\nso" in from_file


def test_an_empty_prompt_begins_a_document(workdir, capsys):
    assert generate(workdir, capsys).out == generate(workdir, capsys, "--prompt=").out


def test_past_the_context_it_says_so_once(workdir, capsys):
    said = generate(workdir, capsys, "--max_new_tokens=60", "--temperature=0")
    assert said.err.count("the context of 16 tokens is full: going on from the last 8") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt=" + "long " * 10, "--num_beams=2"], "has 50 tokens, but the context of this"),
        (["--top_k=300"], "--top_k=300 must be from 1 to the vocabulary's 257"),
        (["--top_k=0"], "--top_k=0 must be from 1"),
        (["--top_p=2", "--min_p=2"], "--top_p=2.0 must be greater than 0 and at most 1; --min_p"),
        (["--top_p=0"], "--top_p=0.0 must be greater than 0"),
        (["--top_p=nan"], "--top_p=nan must be greater than 0"),
        (["--min_p=-1"], "--min_p=-1.0 must be from 0 to 1"),
        (["--temperature=-1"], "--temperature=-1.0 must be 0 (most likely token), or from"),
        (["--temperature=nan"], "--temperature=nan must be 0"),
        (["--temperature=1e-40"], "--temperature=1e-40 must be 0"),
        (["--repetition_penalty=0"], "--repetition_penalty=0.0 must be from 0.001 to 1000"),
        (["--max_new_tokens=0"], "--max_new_tokens=0 must be at least 1"),
        (["--max_new_tokens=-3"], "--max_new_tokens=-3 must be at least 1"),
        (["--num_samples=-1"], "--num_samples=-1 must be at least 1"),
        (["--num_samples=" + "9" * 30], "must be at least 1 and at most 100000"),
        (["--seed=-1"], "--seed=-1 must be from 0 to 4294967295"),
        (["--seed=" + "9" * 30], "must be from 0 to 4294967295"),
        (["--prompt=a\udcffb"], "is not valid UTF-8"),
        (["--num_beams=2", "--top_p=0.5"], "samples nothing; leave --top_p out"),
        (["--num_beams=-1"], "--num_beams=-1 must be 1"),
        (["--num_beams=1000000"], "--num_beams=1000000 must be from 1 (greedy) to 1000"),
        (["--num_beams=2", "--length_penalty=nan"], "--length_penalty=nan must be 0"),
    ],
)
def test_what_cannot_be_generated(workdir, capsys, words, expected):
    said = generate(workdir, capsys, *words, code=2)
    assert expected in said.err
    assert said.out == ""


def test_a_prompt_longer_than_the_context_is_cut_and_says_so(workdir, capsys):
    long = "and so on " * 5
    said = generate(workdir, capsys, f"--prompt={long}", "--prompt=and", "--temperature=0")
    assert said.err.count("has 50 tokens: going on from the last 16") == 1
    tail = generate(workdir, capsys, f"--prompt={long[-16:]}", "--temperature=0").out
    assert said.out.startswith(f"--- 1 of 2 ---\n{long}{tail.removeprefix(long[-16:])}")


def test_more_samples_than_stand_side_by_side(workdir, capsys, monkeypatch):
    words = ["--prompt=and", "--prompt=so", "--num_samples=3", "--temperature=1.5"]
    together = generate(workdir, capsys, *words).out
    monkeypatch.setattr("craft_jax.commands.generate._ROWS", 4)
    assert generate(workdir, capsys, *words).out == together
    assert "--- 6 of 6 ---" in together


@pytest.mark.parametrize("prompt", ["a\0b", "a\nb", "\r\n", "\u2028", "\U0001f642"])
def test_a_prompt_may_hold_any_character(workdir, capsys, prompt):
    assert generate(workdir, capsys, f"--prompt={prompt}").out.startswith(prompt)


@pytest.mark.parametrize(
    ("name", "content", "expected", "code"),
    [
        ("missing", None, "cannot be read: No such file or directory", 65),
        (".", None, "cannot be read: Is a directory", 65),
        ("", None, "cannot be read: Is a directory", 65),
        ("empty", b"", "holds no line; give a prompt in each", 2),
        ("latin1", b"caf\xe9\n", "is not UTF-8 text: byte 0xe9 at offset 3", 65),
    ],
)
def test_prompt_files_that_cannot_be_used(
    workdir, capsys, tmp_path, monkeypatch, name, content, expected, code
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    said = generate(workdir, capsys, f"--prompt_file={name}", code=code)
    assert said.err.startswith(f"--prompt_file={name} {expected}")
    assert len(said.err.splitlines()) == 1


def test_standard_input_that_is_not_utf8(workdir, capsys, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stream)
    said = generate(workdir, capsys, "--prompt_file=-", code=65)
    assert "--prompt_file=- is not UTF-8 text: byte 0xe9 at offset 3" in said.err


def test_no_half_characters(workdir, capsys, monkeypatch):
    """Every piece that reaches the terminal is whole text."""
    pieces = []
    monkeypatch.setattr("sys.stdout.write", pieces.append)
    cli.main(["generate", f"--workdir={workdir}", "--prompt=caf", "--max_new_tokens=12",
              "--temperature=0"])  # fmt: skip
    assert "".join(pieces).startswith("caf\u00e9")
    assert not any("\ufffd" in piece for piece in pieces[:-2])


def test_beams(workdir, capsys):
    run = runs.open("latest", workdir=workdir)
    ids = [[*prompt_ids(run.tokenizer, text)] for text in ("and ", "caf")]
    found = run.generator.beam_search(
        run.compute_params, ids, num_beams=3, max_new_tokens=8, length_penalty=0.5
    )
    texts = [
        text + run.tokenizer.decode(new)
        for text, (new, _) in zip(("and ", "caf"), found, strict=True)
    ]
    words = ["--num_beams=3", "--length_penalty=0.5", "--max_new_tokens=8", "--temperature=0"]
    said = generate(workdir, capsys, "--prompt=and ", "--prompt=caf", *words)
    assert said.out == "".join(f"--- {i} of 2 ---\n{t}\n" for i, t in enumerate(texts, start=1))
    options = {"num_beams": 3, "max_new_tokens": 8, "length_penalty": 0.5}
    assert run.generate(["and ", "caf"], **options) == texts
    said = generate(workdir, capsys, "--prompt=and ", "--num_beams=3", "--max_new_tokens=99")
    assert "the context of 16 tokens is full: a search ends there" in said.err


def test_from_a_notebook(workdir, capsys):
    run = runs.open("latest", workdir=workdir)
    text = run.generate("and ", max_new_tokens=20, seed=0, temperature=0.8)
    assert text == generate(workdir, capsys, "--prompt=and ").out.removesuffix("\n")
    assert run.generate(["and ", "so"], max_new_tokens=20, temperature=0.8)[0] == text
    for wrong in ({"seed": 10**30}, {"temperature": -1}, {"top_k": 0}, {"prompt": "long " * 10}):
        with pytest.raises(UsageError):
            run.generate(**{"max_new_tokens": 4} | wrong)
