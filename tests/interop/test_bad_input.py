"""Every kind of bad input, at the command line: the exit code, one clear message, nothing left."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest

from craft_jax import runs
from craft_jax.data import tokenizers
from craft_jax.errors import UsageError
from interop import __main__ as cli
from interop.files.safetensors import SafetensorsWriter
from interop.files.torch_writer import Placeholder, TorchFileWriter
from interop.mapping.tensors import Abstract, same_bits
from interop.sources.opening import open_source
from interop.targets.registry import TARGETS
from tests.interop.models import make_run, random_leaves, spec

SPEC = spec(num_layers=2, d_ff=192)


def tensors(target="gpt2", known=SPEC):
    made = TARGETS[target].mapping(known).forward(random_leaves(known))
    return {name: np.ascontiguousarray(tensor.read()) for name, tensor in made.items()}


def write_safetensors(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    abstract = {name: Abstract(a.shape, a.dtype) for name, a in arrays.items()}
    with SafetensorsWriter(path, abstract, {"format": "pt"}) as writer:
        for name, values in arrays.items():
            writer.write(name, values)
    return path


def write_folder(folder, arrays, **config):
    write_safetensors(folder / "model.safetensors", arrays)
    described = TARGETS["gpt2"].write_config(SPEC) | config
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def write_pt(path, value):
    """Writes a checkpoint; arrays in `value` become tensors."""
    found = {}

    def placed(node, at=""):
        if isinstance(node, np.ndarray):
            found[at] = node
            return Placeholder(at, Abstract(node.shape, node.dtype))
        if isinstance(node, dict):
            return type(node)((k, placed(v, f"{at}.{k}")) for k, v in node.items())
        return node

    with TorchFileWriter(path, placed(value)) as writer:
        for key in writer.keys:
            writer.write(key, found[key])
    return path


def again(tmp_path):
    """Returns another folder, since TensorStore remembers what was at a path."""
    folder = tmp_path / "again"
    folder.mkdir(exist_ok=True)
    return folder


def bring(capsys, tmp_path, source, *words):
    """Imports; returns the exit code and what was said, and checks that failures leave nothing."""
    out = tmp_path / "models" / "new"
    before = sorted(p.name for p in tmp_path.iterdir())
    code = cli.main(["import", str(source), str(out), *words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if code:
        assert not out.exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    return code, said.err


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        (lambda t: t.pop("transformer.h.1.ln_1.bias"), "lacks 1 of 28 tensors", 65),
        (lambda t: t.update({"score.weight": np.ones(3, np.float32)}), "score.weight", 65),
        (
            lambda t: t.update({"transformer.wpe.weight": np.ones((48, 33), np.float32)}),
            "(looks transposed)",
            65,
        ),
        (
            lambda t: t.update({"transformer.wte.weight": np.ones((128, 48), np.float32)}),
            "padded to 128 rows",
            65,
        ),
        (
            lambda t: t.update({"transformer.wpe.weight": np.ones((33, 48), np.int8)}),
            "is int8",
            65,
        ),
        (lambda t: t.update({"transformer.wpe.weight": np.ones((33, 48))}), "--dtype=fp32", 65),
        (
            lambda t: t.update({"transformer.h.0.attn.bias": np.ones((1, 1, 33, 33), np.uint8)}),
            "not a causal mask",
            65,
        ),
        (
            lambda t: t.update({"_orig_mod.transformer.wpe.weight": t["transformer.wpe.weight"]}),
            "both become transformer.wpe.weight",
            65,
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, capsys, change, words, code):
    arrays = tensors()
    change(arrays)
    got, said = bring(capsys, tmp_path, write_folder(tmp_path / "hf", arrays))
    assert got == code and words in said


def test_float64_is_kept_or_rounded_when_asked(tmp_path, capsys):
    arrays = {name: values.astype(np.float64) for name, values in tensors().items()}
    folder = write_folder(tmp_path / "hf", arrays)
    assert bring(capsys, tmp_path, folder)[0] == 65
    assert bring(capsys, tmp_path, folder, "--dtype", "fp32")[0] == 0
    opened = open_source(tmp_path / "models" / "new")
    assert {leaf.dtype.name for leaf in opened.leaves.values()} == {"float32"}


WRAPS = ["model", "state_dict", "model_state_dict", None]
PREFIXES = ["model.", "", "_orig_mod.", "module._orig_mod."]


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [
        # By default each of them once; `model` is both at the same time.
        pytest.param(prefix, wrap, marks=[] if i == j else pytest.mark.soak)
        for i, prefix in enumerate(PREFIXES)
        for j, wrap in enumerate(WRAPS)
    ],
)
def test_wrappers_and_prefixes_are_removed(tmp_path, capsys, wrap, prefix):
    weights = {f"{prefix}{name}": values for name, values in tensors("nanogpt").items()}
    value = {wrap: weights, "epoch": 3} if wrap else weights
    source = write_pt(tmp_path / "x.pt", value)
    code, said = bring(capsys, tmp_path, source)
    assert code == 2 and "--n-head (one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48)" in said
    code, said = bring(capsys, tmp_path, source, "--n-head", "6")
    assert code == 0, said
    opened = open_source(tmp_path / "models" / "new")
    assert opened.spec == SPEC
    for name, leaf in random_leaves(SPEC).items():
        assert same_bits(leaf.read(), opened.leaves[name].read())


def test_heads_that_do_not_divide(tmp_path, capsys):
    source = write_pt(tmp_path / "x.pt", tensors("nanogpt"))
    code, said = bring(capsys, tmp_path, source, "--n-head", "5")
    assert code == 2 and "--n-head=5 does not divide the width 48" in said


def test_bare_tensors_with_a_config(tmp_path, capsys):
    source = write_safetensors(tmp_path / "bare.safetensors", tensors())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TARGETS["gpt2"].write_config(SPEC)))
    assert bring(capsys, tmp_path, source)[0] == 2
    assert bring(capsys, tmp_path, source, "--config", str(config))[0] == 0
    assert open_source(tmp_path / "models" / "new").spec == SPEC


def test_official_gpt2_names(tmp_path, capsys):
    """Without `transformer.`, with masks, as the first files of GPT-2 have them."""
    arrays = {name.removeprefix("transformer."): v for name, v in tensors().items()}
    mask = np.tril(np.ones((33, 33), np.float32))[None, None]
    arrays |= {f"h.{i}.attn.bias": mask for i in range(2)}
    arrays |= {f"h.{i}.attn.masked_bias": np.float32(-1e4).reshape(()) for i in range(2)}
    assert bring(capsys, tmp_path, write_folder(tmp_path / "hf", arrays))[0] == 0


def test_averaged_weights_beside_the_model(tmp_path, capsys):
    arrays = tensors()
    both = {f"{p}.{name}": values for p in ("model", "ema") for name, values in arrays.items()}
    folder = write_folder(tmp_path / "hf", both)
    code, said = bring(capsys, tmp_path, folder)
    assert code == 65 and "'ema.', 'model.'" in said and "--strip-prefix" in said
    assert bring(capsys, tmp_path, folder, "--strip-prefix", "model.")[0] == 0


def test_ignored_keys(tmp_path, capsys):
    arrays = tensors() | {"value_head.weight": np.ones(3, np.float32)}
    folder = write_folder(tmp_path / "hf", arrays)
    assert bring(capsys, tmp_path, folder)[0] == 65
    assert bring(capsys, tmp_path, folder, "--ignore-keys", "value_head.*")[0] == 0


def test_biases_that_are_all_zero(tmp_path, capsys):
    zero = {n: np.zeros_like(a) if n.endswith("bias") else a for n, a in tensors().items()}
    folder = write_folder(tmp_path / "hf", zero)
    assert bring(capsys, tmp_path, folder)[0] == 0
    assert open_source(tmp_path / "models" / "new").spec.bias
    assert bring(capsys, tmp_path, folder, "--drop-zero-bias", "--overwrite")[0] == 0
    assert not open_source(tmp_path / "models" / "new").spec.bias
    some = zero | {"transformer.ln_f.bias": np.ones(48, np.float32)}
    folder = write_folder(tmp_path / "some", some)
    (tmp_path / "models" / "new").rename(tmp_path / "models" / "old")
    code, said = bring(capsys, tmp_path, folder, "--drop-zero-bias")
    assert code == 65 and "transformer.ln_f.bias" in said


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["raw", "zip", "beside"])
def test_a_pickle_that_would_run_code(tmp_path, capsys, kind):
    marker = tmp_path / "ran"
    evil = pickle.dumps({"model": Evil(marker)})
    source = tmp_path / "x.pt"
    if kind == "raw":
        source.write_bytes(evil)
    elif kind == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
    else:
        write_pt(source, tensors("nanogpt"))
        with zipfile.ZipFile(source, "a") as archive:
            archive.writestr("archive/more.pkl", evil)
    for command in (
        ["import", str(source), str(tmp_path / "models" / "x")],
        ["inspect", str(source)],
    ):
        assert cli.main(command) == 77
        said = capsys.readouterr().err
        assert "posix.system" in said or "os.system" in said
    assert not marker.exists() and not (tmp_path / "models").exists()


@pytest.mark.torch
def test_objects_around_the_weights_are_left_aside(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    value = {
        "model": {n: torch.from_numpy(a) for n, a in tensors("nanogpt").items()},
        "model_args": TARGETS["nanogpt"].write_config(SPEC),
        "args": argparse.Namespace(lr=1e-3),
        "best": np.float64(1.5),
        "path": pathlib.Path("/x"),
        "mine": Mine(),
    }
    torch.save(value, tmp_path / "x.pt")
    code, said = bring(capsys, tmp_path, tmp_path / "x.pt")
    assert code == 0 and "Mine" in said


class Mine:
    def __init__(self):
        self.value = 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git-lfs"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"\x00" * 5000, "zeros"),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "hf/model.safetensors"])
def test_files_without_a_model(tmp_path, capsys, content, words, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    if name.startswith("hf"):
        (file.parent / "config.json").write_text(json.dumps(TARGETS["gpt2"].write_config(SPEC)))
    code, said = bring(capsys, tmp_path, file.parent if name.startswith("hf") else file)
    assert code == 65 and words in said and file.name in said


def test_a_truncated_file(tmp_path, capsys):
    for source in (
        write_safetensors(tmp_path / "x.safetensors", tensors()),
        write_pt(tmp_path / "x.pt", tensors("nanogpt")),
    ):
        size = source.stat().st_size
        os.truncate(source, size - 1000)
        code, said = bring(capsys, tmp_path, source, "--n-head", "6")
        assert code == 65 and str(size - 1000) in said.replace(",", "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(n_inner=-1), "d_ff=-1"),
        (lambda c: c.update(n_head=5), "num_heads=5 does not divide"),
        (lambda c: c.update(n_layer="two"), "num_layers='two'"),
        (lambda c: c.update(layer_norm_epsilon=-1), "norm_eps=-1"),
        (lambda c: c.pop("model_type"), "None"),
    ],
)
def test_configs_that_cannot_be(tmp_path, capsys, change, words):
    folder = write_folder(tmp_path / "hf", tensors())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    code, said = bring(capsys, tmp_path, folder)
    assert code == 78 and words in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("n_head"), "hf: config.json lacks n_head; add what is missing"),
        (lambda c: c.update(resid_pdrop=[]), "its config cannot be understood"),
        (lambda c: c.update(n_layer=1 << 40), "has 1099511627776 layers, and there are 28"),
    ],
)
def test_configs_at_odds_with_the_tensors(tmp_path, capsys, change, words):
    folder = write_folder(tmp_path / "hf", tensors())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    code, said = bring(capsys, tmp_path, folder)
    assert code == 65 and words in said


def test_a_config_that_is_no_json(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", tensors())
    (folder / "config.json").write_text("{")
    code, said = bring(capsys, tmp_path, folder)
    assert code == 65 and "not readable JSON" in said


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"source": {"step": "x"}}'])
def test_an_invalid_manifest(tmp_path, capsys, content):
    folder = write_folder(tmp_path / "hf", tensors())
    (folder / "interop_manifest.json").write_text(content)
    code, said = bring(capsys, tmp_path, folder)
    assert code == 65 and "interop_manifest.json" in said


@pytest.mark.parametrize("change", [{"rows": []}, {"tokens": [97]}, {"tokens": None}])
def test_an_invalid_probe(tmp_path, capsys, change):
    folder = write_folder(tmp_path / "hf", tensors())
    row = {"position": 0, "ids": [0], "logits": [0.0]}
    probe = {"tokens": [0], "tolerance": 1.0, "rows": [row]} | change
    (folder / "probe.json").write_text(json.dumps(probe))
    code, said = bring(capsys, tmp_path, folder)
    assert code == 65 and "probe.json is no probe" in said


def test_folders_without_a_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, said = bring(capsys, tmp_path, tmp_path / "empty")
    assert code == 65 and "it holds nothing" in said
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    code, said = bring(capsys, tmp_path, tmp_path / "lora")
    assert code == 78 and "adapter" in said


def test_a_file_of_another_architecture(tmp_path, capsys):
    arrays = {"encoder.layer.0.attention.self.query.weight": np.ones((4, 4), np.float32)}
    source = write_safetensors(tmp_path / "bert.safetensors", arrays)
    code, said = bring(capsys, tmp_path, source)
    assert code == 78 and "encoder.layer.0.attention.self.query.weight" in said
    assert cli.main(["inspect", str(source)]) == 0
    assert "no model that interop knows" in capsys.readouterr().out


def test_quantised_weights(tmp_path, capsys):
    arrays = tensors()
    arrays["transformer.h.0.mlp.c_fc.weight"] = np.ones((48, 192), ml_dtypes.float8_e4m3fn)
    code, said = bring(capsys, tmp_path, write_folder(tmp_path / "hf", arrays))
    assert code == 65 and "float8" in said


def test_odd_values_are_counted_or_refused(tmp_path, capsys):
    arrays = tensors()
    arrays["transformer.wpe.weight"][3, 3] = np.nan
    folder = write_folder(tmp_path / "hf", arrays)
    code, said = bring(capsys, tmp_path, folder, "--strict-finite")
    assert code == 65 and "1 values are NaN or infinite, in position_embedding.embedding" in said
    code, said = bring(capsys, tmp_path, folder)
    assert code == 0 and "warning: 1 values" in said


def test_a_tokenizer_of_another_model(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", tensors())
    (folder / "tokenizer.json").write_text(tokenizers.bytes_().json)
    code, said = bring(capsys, tmp_path, folder)
    assert code == 65 and "257 tokens" in said and "97 rows" in said
    assert bring(capsys, tmp_path, folder, "--tokenizer", "none")[0] == 0
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "models" / "new").rename(tmp_path / "models" / "old")
    code, said = bring(capsys, tmp_path, folder)
    assert code == 65 and "tokenizer.json" in said


def test_an_imported_run_has_no_text_until_it_is_named(tmp_path):
    run = make_run(tmp_path / "outputs" / "models" / "new", SPEC)
    opened = runs.open(run)
    assert opened.tokenizer is None and opened.config.data.path is None
    assert opened.config.model.num_layers == 2
    with pytest.raises(UsageError, match="`tokenizer=PATH`"):
        opened.generate("x")


def test_a_checkpoint_of_nanogpt_brings_its_step(tmp_path, capsys):
    value = {
        "model": collections.OrderedDict(tensors("nanogpt")),
        "model_args": TARGETS["nanogpt"].write_config(SPEC),
        "iter_num": 250,
        "best_val_loss": 1.25,
        "config": {"dataset": "x"},
    }
    source = write_pt(tmp_path / "ckpt.pt", value)
    assert bring(capsys, tmp_path, source)[0] == 0
    opened = open_source(tmp_path / "models" / "new")
    assert opened.step == 250 and opened.metrics["val_loss"] == 1.25
    assert runs.open(tmp_path / "models" / "new").step == 0


def test_a_state_dict_with_another_entry(tmp_path, capsys):
    config = json.dumps(TARGETS["gpt2"].write_config(SPEC))
    file = write_pt(tmp_path / "flat.pt", {**tensors(), "step": 5, "note": "x"})
    code, said = bring(capsys, tmp_path, file, "--config", config)
    assert code == 65
    assert "step, note of its state dict is no tensor; leave it out with --ignore-keys=step" in said
    words = ("--config", config, "--ignore-keys", "step", "--ignore-keys", "n*te")
    assert bring(capsys, tmp_path, file, *words)[0] == 0


@pytest.mark.parametrize("name", ["checkpoints", "optimizer", "params"])
def test_a_folder_of_another_library_with_folders_like_ours(tmp_path, capsys, name):
    folder = write_folder(tmp_path / "hf", tensors())
    (folder / name).mkdir()
    assert bring(capsys, tmp_path, folder)[0] == 0


@pytest.mark.parametrize(
    "setting",
    [
        {"_num_labels": 1, "activation_function": "gelu_python", "summary_activation": None},
        {"mask_token_id": 50257, "cls_token_id": 50258, "pad_token_id": 50259},
        {"n_ctx": 24, "task_specific_params": {"text-generation": {"do_sample": True}}},
    ],
)
def test_harmless_settings_of_published_configs(tmp_path, capsys, setting):
    assert bring(capsys, tmp_path, write_folder(tmp_path / "hf", tensors(), **setting))[0] == 0


@pytest.mark.parametrize("names", [["stoi"], ["itos"], ["stoi", "itos"]])
def test_the_vocabulary_of_nanogpt(tmp_path, capsys, names):
    alphabet = [chr(0x30 + n) for n in range(SPEC.vocab_size)]
    maps = {"stoi": {c: n for n, c in enumerate(alphabet)}, "itos": dict(enumerate(alphabet))}
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(pickle.dumps({"vocab_size": 97} | {name: maps[name] for name in names}))
    folder = write_folder(tmp_path / "hf", tensors())
    assert bring(capsys, tmp_path, folder, "--tokenizer", str(meta))[0] == 0
    tokenizer = runs.open(tmp_path / "models" / "new").need_tokenizer()
    assert tokenizer.encode("0A~").tolist() == [0, 17, 78]


def test_the_activation_of_a_nanogpt_file(tmp_path, capsys):
    file = write_pt(
        tmp_path / "ckpt.pt",
        {"model": tensors("nanogpt"), "model_args": TARGETS["nanogpt"].write_config(SPEC)},
    )
    code, said = bring(capsys, tmp_path, file)
    assert code == 0
    (remedy,) = re.findall(
        r"activation: the file does not say; .* tanh form: --config='(.*)'$", said, re.M
    )
    assert open_source(tmp_path / "models" / "new").spec.activation == "gelu"
    code, said = bring(capsys, again(tmp_path), file, "--config", remedy)
    assert code == 0 and "the file does not say" not in said
    assert open_source(tmp_path / "again" / "models" / "new").spec.activation == "gelu_tanh"
    bare = write_pt(tmp_path / "bare.pt", {"model": tensors("nanogpt")})
    place = again(again(tmp_path))
    assert bring(capsys, place, bare, "--config", remedy, "--n-head", "6")[0] == 0
    assert open_source(place / "models" / "new").spec.activation == "gelu_tanh"


@pytest.mark.parametrize("name", ["foo", "activation_function", "n_layers"])
def test_an_unknown_setting_of_nanogpt(tmp_path, capsys, name):
    config = TARGETS["nanogpt"].write_config(SPEC)
    file = write_pt(tmp_path / "a.pt", {"model": tensors("nanogpt"), "model_args": config})
    code, said = bring(capsys, tmp_path, file, "--config", json.dumps({name: 3}))
    assert code == 2 and f"--config: {name!r} is no setting of nanogpt" in said
    config |= {name: 3}
    file = write_pt(tmp_path / "b.pt", {"model": tensors("nanogpt"), "model_args": config})
    code, said = bring(capsys, tmp_path, file)
    assert code == 78 and f"{name}=3 means nothing to craft_jax" in said


@pytest.mark.parametrize("target", ["gpt2", "biogpt", "opt"])
def test_two_heads_under_a_tied_config_are_both_kept(tmp_path, capsys, target):
    head, embedding = TARGETS[target].tied
    known = spec(num_layers=2, embedding_scale=target == "biogpt", name="transformer")
    known = known if target != "gpt2" else SPEC
    arrays = tensors(target, known)
    arrays[head] = arrays[embedding] + 1
    folder = tmp_path / "hf"
    write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(TARGETS[target].write_config(known)))
    code, said = bring(capsys, tmp_path, folder)
    assert code == 0
    assert f"config: {head} and {embedding} differ, so both are kept, not tied" in said
    opened = open_source(tmp_path / "models" / "new")
    assert not opened.spec.tie_embeddings
    assert same_bits(opened.leaves["head.embedding"].read(), arrays[head])
    assert same_bits(opened.leaves["token_embedding.embedding"].read(), arrays[embedding])
    arrays[head] = arrays[embedding]
    write_safetensors(folder / "model.safetensors", arrays)
    assert bring(capsys, again(tmp_path), folder)[0] == 0
    assert open_source(tmp_path / "again" / "models" / "new").spec.tie_embeddings


def test_a_checkpoint_of_mingpt(tmp_path, capsys):
    arrays = tensors("nanogpt")
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + 1
    file = write_pt(tmp_path / "model.pt", arrays)
    code, said = bring(capsys, tmp_path, file, "--n-head", "6")
    assert code == 0 and "its head is not its embedding, as in minGPT" in said
    opened = open_source(tmp_path / "models" / "new")
    assert (opened.spec.tie_embeddings, opened.spec.activation) == (False, "gelu_tanh")
    assert same_bits(opened.leaves["head.embedding"].read(), arrays["lm_head.weight"])
    (remedy,) = re.findall(r"--config='(.*)' for the exact one", said)
    assert bring(capsys, again(tmp_path), file, "--n-head", "6", "--config", remedy)[0] == 0
    assert open_source(tmp_path / "again" / "models" / "new").spec.activation == "gelu"
