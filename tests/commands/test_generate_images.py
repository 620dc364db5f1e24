"""`generate`, `evaluate`, `data` and the samples of a training run, for images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from craft_jax import main as cli
from craft_jax import runs
from craft_jax.data.images.sources import digits
from craft_jax.errors import UsageError
from craft_jax.training.loggers import read_json_lines
from tests.conftest import overrides
from tests.kinds import KINDS, command_words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of each kind, and one of text."""
    workdir = tmp_path_factory.mktemp("outputs")
    text = workdir / "words.txt"
    text.write_text("the cat sees the dog and the fox. " * 100, encoding="utf-8")
    for kind in KINDS:
        # What is asked of the one of text is only what it refuses.
        changes = NO_SAMPLES if kind == "gpt" else {}
        words = command_words(kind, text, **changes)
        assert cli.main([*words, f"--workdir={workdir}", f"--run={kind}"]) == 0
    return workdir


IMAGES = ("image_gpt", "flow")
NO_SAMPLES = {"training__sample_every": 0, "training__eval_every": 0}
ONE_STEP = NO_SAMPLES | {"training__num_steps": 1}
every_kind = pytest.mark.parametrize("kind", IMAGES)


def generate(place, kind, capsys, *words, code=0):
    capsys.readouterr()
    assert cli.main(["generate", f"--run={kind}", f"--workdir={place}", *words]) == code
    said = capsys.readouterr()
    if code:
        return said.err
    return size_of(said.out.strip()), said.err


def size_of(file):
    with Image.open(file) as picture:
        return picture.size


@every_kind
def test_training_leaves_grids(place, kind):
    run = runs.open(kind, workdir=place)
    pictures = sorted(place.glob(f"samples/{run.paths.samples.stem}_step*.png"))
    assert [p.name[-10:-4] for p in pictures] == ["000003", "000006"]
    text = run.paths.samples.read_text(encoding="utf-8")
    assert f"=== step 3 ===\n{pictures[0].name}: 40 images, in columns 0, 1, 2" in text
    # 10 columns of 8 pixels and 9 gaps, four times as large.
    sizes = [size_of(p) for p in pictures]
    assert sizes == [(4 * 89, 4 * 35), (4 * 89, 4 * 71)]


@every_kind
def test_a_label_gives_a_square(place, kind, capsys):
    size, said = generate(place, kind, capsys, "--label=3", "--num_samples=16")
    assert size == (4 * 35, 4 * 35)
    assert f"run {kind}, step 6: 16 images, of 3" in said


@every_kind
def test_labels_give_rows(place, kind, capsys):
    size, said = generate(place, kind, capsys, "--label=3", "--label=7", "--num_samples=5")
    assert size == (4 * 44, 4 * 17) and "10 images, of 3, 7" in said
    size, _ = generate(place, kind, capsys)
    assert size == (4 * 71, 4 * 89)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("image_gpt", ["--temperature=0.5", "--top_k=3", "--top_p=0.9", "--min_p=0.01"]),
        ("flow", ["--num_steps=2", "--solver=euler", "--guidance=1"]),
    ],
)
def test_options_of_each_kind(place, kind, words, capsys):
    generate(place, kind, capsys, "--label=1", "--num_samples=1", *words)


def test_upper_halves_of_a_split_are_completed(place, capsys):
    size, said = generate(place, "image_gpt", capsys, "--image=val", "--num_samples=3")
    assert size == (4 * 44, 4 * 71)
    assert "8 images, their upper halves, and 3 completions of each" in said


def test_upper_halves_of_files_and_folders(place, tmp_path, capsys):
    source = digits()
    for n in range(4):
        folder = tmp_path / "mine" / source.label_names[source.label(n)]
        folder.mkdir(parents=True)
        Image.fromarray(source.image(n)[..., 0]).save(folder / f"{n}.png")
    words = [f"--image={tmp_path / 'mine'}", f"--image={tmp_path / 'mine/0/0.png'}"]
    size, said = generate(place, "image_gpt", capsys, *words, "--num_samples=2")
    assert size == (4 * 35, 4 * 44) and "5 images" in said
    # A photograph of any size and colour is cropped, resized and made gray.
    Image.new("RGB", (31, 17), "red").save(tmp_path / "red.jpg")
    generate(place, "image_gpt", capsys, f"--image={tmp_path / 'red.jpg'}", "--label=4")


@pytest.mark.parametrize(
    ("kind", "words", "code", "message"),
    [
        ("flow", ["--label=x"], 2, "--label=x is no class of this run; there are 0, 1"),
        ("flow", ["--image=val"], 2, "model.name=flow makes whole images; a gpt completes them"),
        ("flow", ["--temperature=1"], 2, "it has --num_steps, --solver, --guidance"),
        ("flow", ["--solver=rk4"], 2, "solver='rk4' is not one of euler, heun"),
        ("flow", ["--num_steps=0"], 2, "num_steps=0 is not from 1"),
        ("flow", ["--prompt=the"], 2, "the model of this run makes images; leave --prompt out"),
        ("flow", ["--num_beams=2"], 2, "leave --num_beams out"),
        ("image_gpt", ["--guidance=2"], 2, "--guidance is nothing that model.name=gpt knows"),
        ("image_gpt", ["--num_samples=0"], 2, "--num_samples=0 must be at least 1"),
        ("image_gpt", ["--num_samples=5000"], 2, "--num_samples=5000 must be at least 1, and with"),
        ("image_gpt", ["--image=nowhere.png"], 65, "it is no file, folder, or split"),
        ("image_gpt", ["--image=test"], 65, "data.test_fraction=0"),
        ("image_gpt", ["--image=val", "--label=1", "--label=2"], 2, "takes one --label"),
        ("image_gpt", ["--temperature=-1"], 2, "--temperature=-1.0 must be 0"),
        ("image_gpt", ["--seed=-1"], 2, "--seed=-1"),
        ("gpt", ["--label=3"], 2, "the model of this run makes text; leave --label out"),
        ("gpt", ["--num_steps=3"], 2, "leave --num_steps out"),
    ],
)
def test_what_cannot_be(place, kind, words, code, message, capsys):
    before = set(place.rglob("*"))
    said = generate(place, kind, capsys, *words, code=code)
    assert message in said and "Traceback" not in said
    assert set(place.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n cut off"])
def test_images_that_cannot_be_read(place, tmp_path, content, capsys):
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    assert f"--image={file}" in generate(place, "image_gpt", capsys, f"--image={file}", code=65)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("image_gpt", {"loss", "bits_per_dim", "accuracy", "pixels"}), ("flow", {"loss", "examples"})],
)
def test_evaluate(place, kind, names, capsys):
    """What it gives is what training said at that step."""
    where = [f"--run={kind}", f"--workdir={place}"]
    capsys.readouterr()
    assert cli.main(["evaluate", *where]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"split", "step", "run", *names}
    run = runs.open(kind, workdir=place)
    last = read_json_lines(run.paths.metrics)[-1]
    assert result["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    count = 180
    assert 0.8 * count < result.get("examples", result.get("pixels", 0) / 64) < 1.2 * count
    assert cli.main(["evaluate", *where, "--text=x.txt"]) == 2
    assert f"run {kind} is one of images" in capsys.readouterr().err


@every_kind
def test_from_a_notebook(place, kind):
    run = runs.open(kind, workdir=place)
    made = run.generate_images(["3", 3, 5], seed=1)
    assert made.shape == (3, 8, 8, 1) and made.dtype == np.uint8
    with pytest.raises(UsageError, match="use `generate_images`"):
        run.generate("the")
    with pytest.raises(UsageError, match="is not one of images"):
        runs.open("gpt", workdir=place).generate_images([0])


@pytest.mark.parametrize("kind", IMAGES)
def test_data_shows_what_the_model_sees(kind, tmp_path, workdir, capsys):
    assert cli.main(["data", *command_words(kind, tmp_path), f"--workdir={workdir}"]) == 0
    said = capsys.readouterr().out
    (picture,) = (workdir / "visualizations").glob("*.png")
    assert f"picture    {picture}" in said and "labels     " in said
    assert size_of(picture)[0] > 100


@pytest.mark.parametrize(
    # test_benchmark.py measures another gpt.
    "kind",
    [pytest.param("image_gpt", marks=pytest.mark.soak), "flow"],
)
def test_benchmark(kind, tmp_path, workdir):
    words = [*command_words(kind, tmp_path), "--steps=1", "--decode_batches", "1"]
    assert cli.main(["benchmark", *words, f"--workdir={workdir}"]) == 0


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("image_gpt", {"data.image_colors": "none"}, "make its images tokens with"),
        ("image_gpt", {"model.max_seq_len": 32},
         "model.max_seq_len=32 is less than the 64 pixels of an image of the data"),
        ("image_gpt", {"model.vocab_size": 20}, "model.vocab_size=20 is less than the 27 tokens"),
        ("image_gpt", {"data.image_colors": 1}, "data.image_colors=1 must be at least 2"),
        ("flow", {"model.patch_size": 3}, "model.patch_size=3 does not divide model.height=8"),
        ("flow", {"model.height": 16}, "model.height=16 is not 8, which the data has"),
        ("flow", {"data.image_colors": 17}, "reads images, and the data holds none"),
        ("flow", {"model.times": "cosine"}, "model.times"),
        ("flow", {"loss.z_loss": 0.1}, "takes no argument config"),
    ],
)  # fmt: skip
def test_data_and_models_that_do_not_fit(file, values, message, workdir, capsys):
    words = [f"--config=configs/{file}.py", *overrides(values), f"--workdir={workdir}"]
    assert cli.main([*words, "--run=mine"]) == 78
    assert message in capsys.readouterr().err
    assert not (workdir / "models/mine/checkpoints").exists()


def test_a_flow_reads_no_text(text_file, workdir, capsys):
    values = {"data.source": "auto", "data.path": text_file, "data.tokenizer": "char"}
    words = [*command_words("flow", text_file), *overrides(values)]
    assert cli.main([*words, f"--workdir={workdir}", "--run=mine"]) == 78
    assert "model.name=flow reads images, and the data holds none" in capsys.readouterr().err


@every_kind
def test_a_folder_of_colour_images(kind, tmp_path, workdir):
    """Two classes of larger photographs, resized: the whole way but for the digits."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for n in range(12):
            pixels = rng.integers(0, 256, (20, 14, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mine" / name / f"{n}.png")
    values = {
        "data.source": "images",
        "data.path": tmp_path / "mine",
        "data.image_size": 8,
        "data.image_channels": 3,
        "data.val_fraction": 0.2,
    }
    words = [*command_words(kind, tmp_path, **ONE_STEP), *overrides(values)]
    assert cli.main([*words, f"--workdir={workdir}", "--run=mine"]) == 0
    run = runs.open("mine", workdir=workdir)
    assert run.image_format.label_names == ("cats", "dogs")
    made = run.generate_images(["cats", "dogs"])
    assert made.shape == (2, 8, 8, 3)
    shutil.rmtree(tmp_path / "mine")
    words = ["generate", "--run=mine", f"--workdir={workdir}", "--label=cats", "--num_samples=2"]
    assert cli.main(words) == 0


def test_a_new_run_may_begin_with_the_weights_of_another(place, tmp_path, workdir):
    words = command_words("flow", tmp_path, **NO_SAMPLES)
    words = [w for w in words if "--config.model" not in w]
    source = Path(place) / "models/flow"
    words += [f"--config.init_from={source}", f"--workdir={workdir}", "--run=more"]
    assert cli.main(words) == 0


def test_weights_of_another_palette_are_named(place, tmp_path, workdir, capsys):
    words = command_words("image_gpt", tmp_path, **NO_SAMPLES)
    words = [w for w in words if "--config.model" not in w]
    words += [f"--config.init_from={Path(place) / 'models/image_gpt'}", f"--workdir={workdir}"]
    assert cli.main([*words, "--config.data.image_colors=8"]) == 0
    assert "was trained on images of 17 other colours" in capsys.readouterr().out
