"""Checkpoints of the original Craft, as its code wrote them, and what comes of them here.

Models are re-created in PyTorch, randomised, saved with `torch.save`, and imported.
"""

import argparse
import collections
import json

import numpy as np
import pytest

import interop
from craft_jax import main as craft
from craft_jax import runs
from craft_jax.data import pipeline
from interop import __main__ as cli
from interop.commands.verify import TOLERANCE
from interop.errors import NotRepresentableError, UnknownArchitectureError
from interop.mapping.tensors import same_bits
from interop.sources.live import Reference
from interop.sources.opening import open_source
from interop.sources.source import Options
from tests.interop.models import SPECS, spec

torch = pytest.importorskip("torch")
from tests.interop import torch_models  # noqa: E402

pytestmark = pytest.mark.torch

LINEAGES = {
    "craft-b": "craft b",
    "craft-c": "craft c",
    "craft-d": "craft d",
    "craft-d0": "craft d",
    "craft-e": "craft e",
    "craft-f": "craft f",
}
TEXT = "the quick brown fox jumps over the lazy dog\n"
VOCABULARY = {character: i for i, character in enumerate(sorted(set(TEXT)))}


def settings(known):
    """What Craft's configs say of a model."""
    return {
        "_target_": "craft.models.transformer.TransformerModel",
        "model_type": "language",
        "architecture": "transformer",
        "vocab_size": known.vocab_size,
        "d_model": known.d_model,
        "n_head": known.num_heads,
        "d_hid": known.d_ff,
        "n_layers": known.num_layers,
        "dropout": 0.1,
        "max_seq_length": known.max_seq_len,
        "layer_norm_eps": known.norm_eps,
        "activation": known.activation,
        "bias": known.bias,
        "norm_first": known.norm_first,
    }


def model_of(target, known, seed=0):
    """One of Craft's models, every parameter random."""
    model = torch_models.empty(target, known).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(center + 0.3 * noise)
    return model


def training_state(model, known, **more):
    """A checkpoint as the last trainer writes it."""
    return {
        "epoch": 3,
        "global_step": 1234,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "scheduler_state_dict": None,
        "scaler_state_dict": None,
        "best_val_metric": 1.5,
        "metrics": {"loss": 1.25},
        "config": {"experiment": {"model": {"config": settings(known)}}},
        "tensorboard_log_dir": None,
        "callbacks_state": None,
    } | more


def ids(known, seed=0):
    return np.random.default_rng(seed).integers(0, known.vocab_size, (2, known.max_seq_len))


def same_logits(path, model, known, options=None):
    """Whether what is at a path, read here in float64, computes what a model does."""
    opened = open_source(path, options)
    with torch.no_grad():
        theirs = model.double()(torch.tensor(ids(known))).numpy()
    ours = Reference(opened.spec, opened.leaves).logits({"tokens": ids(known)})
    return np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))) <= TOLERANCE


@pytest.mark.parametrize("target", LINEAGES)
def test_a_checkpoint_of_every_generation(tmp_path, target):
    known = spec(**SPECS[LINEAGES[target]])
    model = model_of(target, known)
    model(torch.tensor(ids(known)))  # Leaves the masks behind that then are in the file.
    torch.save(training_state(model, known), tmp_path / "c.pt")
    opened = open_source(tmp_path / "c.pt")
    assert opened.kind == target and opened.spec.differences(known) == []
    assert opened.step == 1234 and opened.metrics == {"val_loss": 1.5}
    assert opened.spec.dropout == 0.1
    assert same_logits(tmp_path / "c.pt", model, known)
    done = interop.import_checkpoint(tmp_path / "c.pt", tmp_path / "models" / "run")
    imported = open_source(done.out)
    for name, leaf in opened.leaves.items():
        assert same_bits(imported.leaves[name].read(), leaf.read())


def test_sinusoidal_positions_keep_their_bits(tmp_path):
    known = spec(**SPECS["craft b, sinusoidal"])
    model = model_of("craft-b", known)
    torch.save(training_state(model, known), tmp_path / "c.pt")
    assert same_logits(tmp_path / "c.pt", model, known)
    table = open_source(tmp_path / "c.pt").leaves["position_embedding.constant"].read()
    assert same_bits(table, model.float().state_dict()["positional_encoding.pe"][0].numpy())


@pytest.mark.parametrize(
    "prefixes", ["_orig_mod.module.", "module._orig_mod.", "model._orig_mod.", "module."]
)
def test_wrapped_and_run_with_objects_of_omegaconf(tmp_path, prefixes):
    """After a forward pass, compiled, in parallel, with a config that pickles as itself."""
    omegaconf = pytest.importorskip("omegaconf")
    known = spec(**SPECS["craft d"])
    model = model_of("craft-d", known)
    model(torch.tensor(ids(known)))
    state = collections.OrderedDict((prefixes + n, t) for n, t in model.state_dict().items())
    assert any(name.endswith("causal_mask") for name in state)
    config = omegaconf.OmegaConf.create(
        {"experiment": {"model": settings(known) | {"model_type": "${..experiment.kind}"}}}
    )
    value = training_state(model, known, model_state_dict=state, config=config)
    torch.save(value, tmp_path / "c.pt")
    opened = open_source(tmp_path / "c.pt")
    assert opened.kind == "craft-d" and opened.spec.differences(known) == []
    masks = [note for note in opened.notes if note.startswith("buffers:")]
    assert masks == [
        "buffers: layers.{0..2}.self_attn.causal_mask, with the values that they must have"
    ]
    assert same_logits(tmp_path / "c.pt", model, known)
    name = next(n for n in state if n.endswith("1.self_attn.causal_mask"))
    state[name] = state[name].clone()
    state[name][3, 9] = 0
    torch.save(training_state(model, known, model_state_dict=state), tmp_path / "d.pt")
    with pytest.raises(interop.InteropError, match="not a causal mask") as caught:
        open_source(tmp_path / "d.pt")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    "place",
    [
        lambda s: {"config": {"experiment": {"model": s}}},
        lambda s: {"config": {"experiment": {"model": {"config": s, "model_type": "language"}}}},
        lambda s: {"config": {"model": s}},
        lambda s: {"config": s},
        lambda s: {"config": {"architecture": s}},
        lambda s: {"model_config": s, "config": None},
        lambda s: {"args": s, "config": None},
        lambda s: {"args": argparse.Namespace(**s), "config": None},
        lambda s: {"experiment": {"model": s}, "config": {}},
    ],
)
def test_settings_in_every_place_of_a_checkpoint(tmp_path, place):
    known = spec(**SPECS["craft e, post-norm, relu"])
    model = model_of("craft-e", known)
    torch.save(training_state(model, known) | place(settings(known)), tmp_path / "c.pt")
    opened = open_source(tmp_path / "c.pt")
    assert opened.spec.differences(known) == []


def test_a_bare_state_dict_asks_for_the_heads(tmp_path, capsys):
    known = spec(**SPECS["craft e"])
    model = model_of("craft-e", known)
    torch.save(model.state_dict(), tmp_path / "c.pt")
    out = tmp_path / "models" / "run"
    assert cli.main(["import", str(tmp_path / "c.pt"), str(out)]) == 2
    assert "--n-head (one of 1, 2, 3, 4, 6" in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "c.pt"), str(out), "--n-head", "6"]) == 0
    said = capsys.readouterr().err
    assert "no config" in said and '"norm_first": true' in said
    assert open_source(out).spec.differences(known) == []
    assert same_logits(tmp_path / "c.pt", model, known, Options(num_heads=6))


def test_unknown_settings_are_refused(tmp_path, capsys):
    known = spec(**SPECS["craft e"])
    model = model_of("craft-e", known)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    torch.save(training_state(model, known), tmp_path / "c.pt")
    for file, words, said in (
        ("c.pt", ["--n-head=8"], "--n-head=8, but its config says 6"),
        ("bare.pt", ["--config", '{"n_head": 6, "norm_frist": false}'], "present: norm_first"),
        ("bare.pt", ["--config", '{"num_heads": 6}'], "'num_heads' is no setting of craft-e"),
    ):
        out = str(tmp_path / "run")
        assert cli.main(["import", str(tmp_path / file), out, *words]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "c.pt"), out, "--n-head=6"]) == 0


def test_numbers_that_yaml_took_for_text(tmp_path):
    known = spec(**SPECS["craft e"])
    texts = {"n_head": "6", "layer_norm_eps": "1e-5", "dropout": "0.1"}
    config = {"model": settings(known) | texts}
    torch.save(training_state(model_of("craft-e", known), known, config=config), tmp_path / "c.pt")
    assert open_source(tmp_path / "c.pt").spec.differences(known) == []


def test_a_config_that_contradicts_the_tensors(tmp_path):
    known = spec(**SPECS["craft e"])
    model = model_of("craft-e", known)
    for change, words in (
        ({"n_layers": 4}, "num_layers is 4 by the config and 3 by the tensors"),
        ({"bias": False}, "bias is False by the config"),
        ({"n_head": 5}, "num_heads=5` does not divide the width 48"),
    ):
        config = {"model": settings(known) | change}
        torch.save(training_state(model, known, config=config), tmp_path / "c.pt")
        with pytest.raises(Exception, match=words) as caught:
            open_source(tmp_path / "c.pt")
        assert caught.value.exit_code in (2, 65)
    config = {"model": settings(known) | {"activation": "swiglu"}}
    torch.save(training_state(model, known, config=config), tmp_path / "c.pt")
    with pytest.raises(UnknownArchitectureError, match="activation='swiglu'"):
        open_source(tmp_path / "c.pt")


def artifact(folder, model, known, tokenizer):
    """A folder as Craft saves a model for inference."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings(known)))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "vocab.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_type": "char", "vocab_size": len(tokenizer), "special_tokens": {}})
    )


def test_an_inference_artifact_generates_text_at_once(tmp_path, capsys):
    known = spec(**SPECS["craft e"] | {"vocab_size": len(VOCABULARY)})
    model = model_of("craft-e", known)
    artifact(tmp_path / "artifact", model, known, VOCABULARY)
    workdir = tmp_path / "outputs"
    run = workdir / "models" / "mine"
    assert cli.main(["import", str(tmp_path / "artifact"), str(run)]) == 0
    capsys.readouterr()
    words = ["generate", "--run=mine", f"--workdir={workdir}", "--prompt=the qu"]
    assert craft.main([*words, "--max_new_tokens=12", "--temperature=0"]) == 0
    text = capsys.readouterr().out
    made = [VOCABULARY[c] for c in "the qu"]
    with torch.no_grad():
        for _ in range(12):
            made.append(int(model(torch.tensor([made]))[0, -1].argmax()))
    characters = {i: c for c, i in VOCABULARY.items()}
    assert text == "".join(characters[i] for i in made) + "\n"


def test_vocabularies_inside_and_beside_a_checkpoint(tmp_path):
    known = spec(**SPECS["craft d"] | {"vocab_size": len(VOCABULARY)})
    model = model_of("craft-d", known)
    maps = {"char_to_idx": VOCABULARY, "idx_to_char": {i: c for c, i in VOCABULARY.items()}}
    torch.save(training_state(model, known, **maps), tmp_path / "inside.pt")
    found = open_source(tmp_path / "inside.pt").tokenizer
    assert found.encode("fox").tolist() == [VOCABULARY[c] for c in "fox"]
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    torch.save(training_state(model, known), tmp_path / "run" / "beside.pt")
    (tmp_path / "run" / "tokenizer" / "vocab.json").write_text(json.dumps(VOCABULARY))
    (tmp_path / "run" / "tokenizer" / "tokenizer_config.json").write_text('{"model_type": "char"}')
    beside = open_source(tmp_path / "run" / "beside.pt").tokenizer
    assert beside.digest == found.digest
    torch.save(training_state(model, known), tmp_path / "alone.pt")
    place = tmp_path / "run" / "tokenizer"
    for given in (place, place / "vocab.json"):
        done = interop.import_checkpoint(
            tmp_path / "alone.pt", tmp_path / "models" / "run", tokenizer=given, overwrite=True
        )
        assert done.source.tokenizer.digest == found.digest


def test_a_trained_run_goes_back_to_craft(tmp_path):
    """One file: Craft's trainer reads its checkpoint, and its inference code the model_config."""
    for target, name in (("craft-e", "craft e"), ("craft-d", "craft d"), ("craft-f", "craft f")):
        known = spec(**SPECS[name] | {"vocab_size": len(VOCABULARY)})
        model = model_of(target, known)
        torch.save(training_state(model, known, char_to_idx=VOCABULARY), tmp_path / f"{target}.pt")
        run = tmp_path / "models" / target
        interop.import_checkpoint(tmp_path / f"{target}.pt", run)
        out = tmp_path / f"{target}-again.pt"
        done = interop.export_checkpoint(run, out, "craft")
        assert done.plan.target.name == target and done.plan.is_exact
        value = torch.load(out, weights_only=True)
        assert {"epoch", "global_step", "model_state_dict", "config"} <= set(value)
        assert value["global_step"] == 1234
        again = torch_models.empty(target, known)
        again.load_state_dict(value["model_state_dict"], strict=True)
        for (one, a), (other, b) in zip(
            model.named_parameters(), again.named_parameters(), strict=True
        ):
            assert one == other and torch.equal(a, b)
        said = value["model_config"]
        assert {k: said[k] for k in settings(known) if k not in ("_target_", "architecture")} == {
            k: v for k, v in settings(known).items() if k not in ("_target_", "architecture")
        }
        assert value["char_to_idx"] == VOCABULARY
        assert open_source(out).tokenizer.digest == open_source(run).tokenizer.digest


def test_training_goes_on_where_pytorch_was(tmp_path, text_file):
    """The loss of the first step is PyTorch's on the same batch."""
    text = text_file.read_text()
    vocabulary = {c: i for i, c in enumerate(sorted(set(text)))}
    changes = {"vocab_size": len(vocabulary), "max_seq_len": 16}
    known = spec(**SPECS["craft e"] | changes)
    model = model_of("craft-e", known)
    torch.save(training_state(model, known, char_to_idx=vocabulary), tmp_path / "c.pt")
    workdir = tmp_path / "outputs"
    interop.import_checkpoint(tmp_path / "c.pt", workdir / "models" / "mine")
    words = [
        "--run=mine",
        f"--workdir={workdir}",
        f"--config.data.path={text_file}",
        "--config.data.batch_size=8",
        "--config.data.val_fraction=0.1",
        "--config.training.num_steps=2",
        "--config.training.log_every=1",
        "--config.model.dropout=0.0",
    ]
    assert craft.main(words) == 0
    run = runs.open("mine", workdir=workdir)
    assert run.step == 2
    lines = [json.loads(line) for line in run.paths.metrics.read_text().splitlines()]
    loss = next(line["loss"] for line in lines if line["step"] == 1)
    data = pipeline.open_datasets(
        run.config.data, workdir=workdir, seed=run.config.training.seed, tokenizer=run.tokenizer
    ).train.batch(0)
    with torch.no_grad():
        logits = model(torch.tensor(data["tokens"]).long())
        theirs = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(data["targets"]).long().flatten()
        )
    assert abs(loss - theirs.item()) <= 1e-6 * max(1.0, theirs.item())


# Folds.


@pytest.mark.parametrize(
    ("target", "name"),
    [("craft-c", "craft c"), ("craft-f", "craft f"), ("craft-f", "craft f, no bias")],
)
def test_the_constant_cross_attention_folds_where_asked(tmp_path, target, name):
    known = spec(**SPECS[name])
    model = model_of(target, known)
    torch.save(training_state(model, known), tmp_path / "c.pt")
    assert open_source(tmp_path / "c.pt", Options(allow_approx=True)).spec.cross_attention != "none"
    options = Options(allow_approx="cross-fold")
    folded = open_source(tmp_path / "c.pt", options)
    assert folded.spec.cross_attention == "none" and not any(".cross." in n for n in folded.leaves)
    with torch.no_grad():
        theirs = model.double()(torch.tensor(ids(known))).numpy()
    ours = Reference(folded.spec, folded.leaves).logits({"tokens": ids(known)})
    gap = np.max(np.abs(ours - theirs))
    # The new bias is rounded to float32; without biases nothing was added.
    assert gap <= (1e-5 if known.bias else 1e-11)
    done = interop.import_checkpoint(
        tmp_path / "c.pt", tmp_path / "models" / "run", options=options
    )
    assert open_source(done.out).spec == folded.spec
    assert any(note.startswith("cross-fold:") for note in done.notes)


def test_a_fold_that_a_norm_forbids(tmp_path):
    known = spec(**SPECS["craft f, post-norm"])
    torch.save(training_state(model_of("craft-f", known), known), tmp_path / "c.pt")
    with pytest.raises(NotRepresentableError, match="layer norms follow"):
        open_source(tmp_path / "c.pt", Options(allow_approx="cross-fold"))


@pytest.mark.parametrize("d_model", [48, 64, 768])
def test_the_last_model_is_no_gpt2_and_a_biogpt(tmp_path, d_model):
    changes = {"d_model": d_model, "num_heads": 4, "d_ff": 64, "num_layers": 1}
    known = spec(**SPECS["craft e"] | changes)
    torch.save(training_state(model_of("craft-e", known), known), tmp_path / "c.pt")
    run = interop.import_checkpoint(tmp_path / "c.pt", tmp_path / "models" / "run").out
    with pytest.raises(NotRepresentableError) as caught:
        interop.export_checkpoint(run, tmp_path / "x", "gpt2", probe="none")
    text = str(caught.value)
    assert "embedding_scale=True" in text and "sqrt(d_model)" in text and "biogpt" in text
    assert caught.value.exit_code == 78
    done = interop.export_checkpoint(run, tmp_path / "bio", "hf", probe="none")
    assert done.plan.target.name == "biogpt" and done.plan.is_exact
    folded = interop.export_checkpoint(
        run, tmp_path / "gpt2", "gpt2", probe="none", allow_approx="scale-fold"
    )
    assert set(folded.manifest["approximations"]) == {"scale-fold"}
    assert interop.verify(run, tmp_path / "gpt2").passed
    again = open_source(tmp_path / "gpt2")
    table = open_source(run).leaves["token_embedding.embedding"].read()
    back = again.leaves["token_embedding.embedding"].read() / np.float32(np.sqrt(d_model))
    # Exactly where the root is a power of two, and only there.
    assert np.array_equal(back, table) == (d_model == 64)


def test_a_biased_head_has_no_home_but_ours_and_crafts(tmp_path):
    known = spec(**SPECS["craft d"])
    torch.save(training_state(model_of("craft-d", known), known), tmp_path / "c.pt")
    run = interop.import_checkpoint(tmp_path / "c.pt", tmp_path / "models" / "run").out
    for target in ("hf", "gpt2", "biogpt", "opt", "nanogpt"):
        with pytest.raises(NotRepresentableError, match="head_bias=True: its head has no bias"):
            interop.export_checkpoint(run, tmp_path / "x", target, allow_approx=True)
    assert interop.plan(run, "auto").target.name == "craft-torch"
    assert interop.plan(run, "craft").target.name == "craft-d"
