"""What a user of transformers sees: loading without a word, the same tokens, the same text."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import interop
from craft_jax import main as cli
from craft_jax import runs
from craft_jax.data import tokenizers
from interop import __main__ as interop_cli
from interop.commands.verify import TOLERANCE
from interop.errors import NotRepresentableError, UnknownArchitectureError
from interop.mapping.tensors import same_bits
from interop.sources.live import Reference
from interop.sources.opening import open_source
from tests.conftest import micro
from tests.interop.models import SPECS, in_memory, make_run, spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )


FAMILIES = [
    ("gpt2", {}),
    ("gpt2", {"tie_embeddings": False}),
    ("gpt2", {"bias": False}),
    ("biogpt", SPECS["craft e"]),
    ("biogpt", SPECS["craft e, no bias"]),
    ("biogpt", {"tie_embeddings": False}),
    ("opt", {}),
    ("opt", {"tie_embeddings": False, "bias": False}),
    ("opt", SPECS["post-norm, nothing after it"]),
]


@pytest.mark.parametrize(
    ("target", "changes", "dtype"),
    [
        (target, changes, dtype)
        for target, changes in FAMILIES
        for dtype in ("float32", "bfloat16", "float16")
        if target == "gpt2" or dtype == "float32"
    ],
)
def test_it_loads_without_a_word(tmp_path, target, changes, dtype, caplog, capfd):
    tokenizer = tokenizers.characters("the quick\n", end_token=True)
    model = in_memory(spec(**changes), dtype, tokenizer=tokenizer)
    out = interop.export_checkpoint(model, tmp_path / "out", target, probe="none").out
    transformers.logging.enable_propagation()
    with caplog.at_level("INFO"):
        model, info = load(out)
    assert not any(info.values()), info
    assert [r.message for r in caplog.records if r.levelname not in ("DEBUG", "INFO")] == []
    assert "UNEXPECTED" not in capfd.readouterr().err
    assert model.config.tie_word_embeddings == (changes.get("tie_embeddings") is not False)


def randomised(folder, **changes):
    """Makes a folder as transformers itself saves one, every parameter random."""
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=33, n_embd=48, n_layer=3, n_head=6, **changes
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"n_inner": 112, "activation_function": "relu"}],
)
def test_a_folder_of_transformers_there_and_back(tmp_path, changes):
    model = randomised(tmp_path / "theirs", **changes)
    interop.import_checkpoint(tmp_path / "theirs", tmp_path / "models" / "run")
    again = interop.export_checkpoint(
        tmp_path / "models" / "run", tmp_path / "ours", "hf", probe="none"
    ).out
    before, after = open_source(tmp_path / "theirs"), open_source(again)
    assert before.spec == after.spec
    for name, tensor in after.tensors.items():
        assert same_bits(tensor.read(), before.tensors[name].read())
    ids = np.random.default_rng(0).integers(0, 97, (2, 33))
    ours = runs.open(tmp_path / "models" / "run").model(ids)[0]
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(ids)).logits.numpy()
    assert np.max(np.abs(np.asarray(ours) - theirs)) < 1e-3 * np.max(np.abs(theirs))


def saved(folder, model):
    """Saves a model of transformers, every parameter random, and returns it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 33,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("biogpt", {}),
        ("biogpt", {"tie_word_embeddings": False, "scale_embedding": False, "hidden_act": "relu"}),
        ("opt", {}),
        ("opt", {"tie_word_embeddings": False, "enable_bias": False}),
        ("opt", {"do_layer_norm_before": False, "activation_function": "gelu"}),
        ("opt", {"_remove_final_layer_norm": True, "attention_dropout": 0.1}),
    ],
)
def test_decoders_with_an_offset_there_and_back(tmp_path, family, changes):
    if family == "biogpt":
        config = transformers.BioGptConfig(**SIZES, intermediate_size=112, **changes)
        model = saved(tmp_path / "theirs", transformers.BioGptForCausalLM(config))
    else:
        rates = {"dropout": 0.1, "attention_dropout": 0.1} | changes
        config = transformers.OPTConfig(**SIZES, ffn_dim=112, **rates)
        model = saved(tmp_path / "theirs", transformers.OPTForCausalLM(config))
    interop.import_checkpoint(tmp_path / "theirs", tmp_path / "models" / "run")
    again = interop.export_checkpoint(
        tmp_path / "models" / "run", tmp_path / "ours", family, probe="none"
    ).out
    before, after = open_source(tmp_path / "theirs"), open_source(again)
    assert before.spec == after.spec and set(before.tensors) == set(after.tensors)
    for name, tensor in after.tensors.items():
        # The first two rows of positions are read by nothing, and left out.
        first = 2 if "embed_positions" in name else 0
        assert same_bits(tensor.read()[first:], before.tensors[name].read()[first:]), name
    ids = np.random.default_rng(0).integers(0, 97, (2, 33))
    ours = Reference(before.spec, before.leaves).logits({"tokens": ids})
    with torch.no_grad():
        theirs = model.double()(torch.tensor(ids)).logits.numpy()
    assert np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))) <= TOLERANCE


def test_opt_settings_that_craft_jax_lacks(tmp_path):
    config = transformers.OPTConfig(**SIZES, ffn_dim=112, word_embed_proj_dim=24)
    saved(tmp_path / "theirs", transformers.OPTForCausalLM(config))
    with pytest.raises(UnknownArchitectureError, match="word_embed_proj_dim=24"):
        open_source(tmp_path / "theirs")
    config = transformers.OPTConfig(**SIZES, ffn_dim=112, dropout=0.1)
    saved(tmp_path / "other", transformers.OPTForCausalLM(config))
    assert any("attention_dropout are 0.1, 0.0" in n for n in open_source(tmp_path / "other").notes)


def test_settings_that_would_be_lost_are_refused(tmp_path):
    for changes, error, words in [
        ({"scale_attn_by_inverse_layer_idx": True}, UnknownArchitectureError, "inverse_layer_idx"),
        ({"activation_function": "mish"}, UnknownArchitectureError, "mish"),
        ({"activation_function": "gelu_fast"}, NotRepresentableError, "allow_approx=gelu"),
        ({"attn_pdrop": 0.3}, NotRepresentableError, "allow_approx=dropout"),
        ({"window": 128}, NotRepresentableError, "window=128"),
    ]:
        folder = tmp_path / words.strip("-=")
        randomised(folder, **changes)
        with pytest.raises(error, match=re.escape(words)) as caught:
            interop.import_checkpoint(folder, tmp_path / "models" / "run")
        assert caught.value.exit_code == 78
    done = interop.import_checkpoint(
        folder, tmp_path / "models" / "run", options=interop.Options(allow_approx=True)
    )
    assert any("window=128" in note for note in done.notes)


@pytest.mark.parametrize("kind", ["bert", "t5", "llama", "xglm"])
def test_other_architectures_are_named(tmp_path, kind):
    (tmp_path / "x").mkdir()
    described = {"model_type": kind, "architectures": [f"{kind}ForSomething"]}
    (tmp_path / "x" / "config.json").write_text(json.dumps(described))
    with pytest.raises(UnknownArchitectureError, match=f"'{kind}' model .{kind}ForSomething"):
        interop.import_checkpoint(tmp_path / "x", tmp_path / "models" / "run")


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_tokenizer_reads_as_ours(tmp_path, kind):
    text = "def f(x):\n\treturn x  # ünï\n" * 40
    ours = {
        "char": lambda: tokenizers.characters(text, end_token=True),
        "byte": tokenizers.bytes_,
        "bpe": lambda: tokenizers.train_bpe([text], 300),
    }[kind]()
    known = spec(vocab_size=ours.vocab_size + 7)
    run = make_run(tmp_path / "models" / "run", known, tokenizer=ours)
    out = interop.export_checkpoint(run, tmp_path / "out", "hf", probe="none").out
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    samples = [text, "  x  \n\n", "f(x)"]
    samples += [] if kind == "char" else ["東京 \U0001f642\r\n", "<|endoftext|> as text"]
    for sample in samples:
        ids = ours.encode(sample).tolist()
        assert theirs.encode(sample) == ids
        assert theirs.decode(ids) == ours.decode(ids) == sample
    assert theirs.eos_token_id == ours.end_id
    again = tmp_path / "models" / "again"
    interop.import_checkpoint(out, again)
    assert runs.open(again).tokenizer.digest == ours.digest


def test_a_trained_run_makes_the_same_100_tokens(tmp_path, text_file, capsys):
    workdir = tmp_path / "outputs"

    def craft(*words):
        capsys.readouterr()
        assert cli.main([*words, f"--workdir={workdir}"]) == 0
        return capsys.readouterr().out

    craft(
        "--run=r",
        *micro(text_file, model__max_seq_len=128, training__num_steps=3),
    )
    prompt = "the red "
    text = craft(
        "generate", "--run=r", f"--prompt={prompt}", "--temperature=0", "--max_new_tokens=100"
    )
    run, out = str(workdir / "models" / "r"), str(tmp_path / "out")
    assert interop_cli.main(["export", run, out]) == 0
    said = capsys.readouterr().out
    model, _ = load(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, do_sample=False, max_new_tokens=100)
    assert made.shape[1] == ids.input_ids.shape[1] + 100
    assert tokenizer.decode(made[0]) + "\n" == text
    assert Path(said.split(":")[0]).name == "out"
