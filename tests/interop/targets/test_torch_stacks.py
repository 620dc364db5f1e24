"""State dicts of plain torch.nn parts that somebody else saved: what they tell, what is asked."""

import json

import numpy as np
import pytest

import interop
from craft_jax.errors import UsageError
from interop import __main__ as cli
from interop.commands.verify import TOLERANCE
from interop.errors import CorruptFileError
from interop.sources.live import Reference
from interop.sources.opening import open_source
from interop.sources.source import Options
from tests.interop.models import SPECS, make_run, spec

torch = pytest.importorskip("torch")
from tests.interop import torch_models  # noqa: E402

pytestmark = pytest.mark.torch

SAID = {"num_heads": 6, "norm_first": True, "activation": "gelu", "embedding_scale": False}
CASES = {
    "torch-encoder": ("plain", SAID),
    "torch-decoder": ("craft c", SAID | {"cross_attention": "zeros"}),
    "torch-transformer": ("seq2seq", SAID | {"embedding_scale": True}),
}


def saved(path, target, name, prefix=""):
    known = spec(**SPECS[name])
    model = torch_models.empty(target, known).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    torch.save({prefix + n: t for n, t in model.state_dict().items()}, path)
    return known, model


@pytest.mark.parametrize("prefix", ["", "module._orig_mod.", "net."])
@pytest.mark.parametrize("target", CASES)
def test_settings_that_shapes_do_not_determine_are_required(tmp_path, target, prefix):
    name, said = CASES[target]
    known, model = saved(tmp_path / "m.pt", target, name, prefix)
    with pytest.raises(
        UsageError, match="a bare state dict does not determine num_heads, norm_first"
    ):
        open_source(tmp_path / "m.pt")
    opened = open_source(tmp_path / "m.pt", Options(config=json.dumps(said)))
    assert opened.kind == target and opened.spec.differences(known) == []
    ids = np.random.default_rng(0).integers(0, 97, (2, 33))
    inputs = {"tokens": ids}
    if known.num_decoder_layers:
        inputs |= {"source": ids[::-1].copy(), "source_mask": np.ones((2, 33), bool)}
    ours = Reference(opened.spec, opened.leaves).logits(inputs)
    with torch.no_grad():
        theirs = torch_models.logits(model.double(), inputs).numpy()
    assert np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))) <= TOLERANCE


def test_a_file_of_settings_and_the_flag_for_heads(tmp_path, capsys):
    saved(tmp_path / "m.pt", "torch-encoder", "plain")
    (tmp_path / "said.json").write_text(json.dumps({k: v for k, v in SAID.items() if k[0] != "n"}))
    words = ["import", str(tmp_path / "m.pt"), str(tmp_path / "run"), "--n-head=6"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "does not determine norm_first, activation, embedding_scale" in said
    assert cli.main([*words, f"--config={tmp_path / 'said.json'}"]) == 2
    assert "norm_first" in capsys.readouterr().err
    both = json.dumps(SAID)
    assert cli.main([*words, "--config", both]) == 0
    for config, code, what in (
        ("{", 2, "no JSON"),
        (str(tmp_path / "none.json"), 2, "no such file"),
        (json.dumps(SAID | {"num_heads": 5}), 2, "does not divide the width 48"),
        (json.dumps(SAID | {"d_ff": 5}), 65, "d_ff is 5 by the config and 112 by the tensors"),
        (json.dumps(SAID | {"activation": "swish"}), 78, "activation='swish'"),
        (json.dumps(SAID | {"norm_first": "yes"}), 78, "norm_first='yes' is not true or false"),
        (json.dumps(SAID | {"tie_embeddings": False}), 0, ""),
    ):
        words = ["import", str(tmp_path / "m.pt"), str(tmp_path / "other"), "--config", config]
        capsys.readouterr()
        assert cli.main([*words, "--overwrite"]) == code, config
        err = capsys.readouterr().err
        assert what in err and "Traceback" not in err


def test_a_tied_head_is_detected_by_its_bits(tmp_path):
    _, model = saved(tmp_path / "m.pt", "torch-encoder", "untied")
    options = Options(config=json.dumps(SAID))
    assert not open_source(tmp_path / "m.pt", options).spec.tie_embeddings
    state = model.state_dict()
    state["head.weight"] = state["token_embedding.weight"].clone()
    torch.save(state, tmp_path / "n.pt")
    assert open_source(tmp_path / "n.pt", options).spec.tie_embeddings


def test_files_of_ours_say_it_all_themselves(tmp_path):
    """And a record that is damaged, or of another target, is not believed."""
    known = spec(**SPECS["craft b, sinusoidal"])
    run = make_run(tmp_path / "models" / "run", known)
    out = interop.export_checkpoint(run, tmp_path / "m.pt", "torch-decoder").out
    opened = open_source(out)
    assert opened.spec == known and opened.manifest["target"] == "torch-decoder"
    assert opened.leaves.keys() == open_source(run).leaves.keys()
    with pytest.raises(CorruptFileError, match=r"target_embedding\.weight' is missing"):
        open_source(out, Options(kind="torch-transformer", config=json.dumps(SAID)))
    data = out.read_bytes()
    at = data.index(b'"format": "craft_jax interop"')
    out.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    with pytest.raises(CorruptFileError):
        open_source(out)
