"""Models of images in PyTorch: float64 velocities, gradients, whole samplings, and bits."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from craft_jax.data import tokenizers
from craft_jax.data.images.format import ImageFormat
from craft_jax.errors import UsageError
from craft_jax.models import base
from craft_jax.models.flow import Flow, FlowConfig
from interop.commands import diff, export, plan, verify
from interop.commands import import_ as imports
from interop.errors import InteropError, NotRepresentableError
from interop.mapping.shapes import leaves
from interop.mapping.spec import FlowSpec, read_spec
from interop.mapping.tensors import lazy
from interop.sources import opening, source
from interop.sources.live import Reference
from interop.sources.source import Source
from interop.targets.registry import TARGETS
from tests.interop.models import random_leaves
from tests.interop.models import spec as spec_of_tokens
from tests.interop.proofs import prove, prove_alone

torch = pytest.importorskip("torch")
from interop.pytorch import modeling_craft  # noqa: E402

pytestmark = pytest.mark.torch

SPEC = FlowSpec(
    height=6,
    width=9,
    channels=3,
    num_classes=5,
    patch_size=3,
    num_layers=3,
    num_heads=4,
    d_model=20,
    d_ff=52,
    dropout=0.0,
    label_dropout=0.1,
    times="uniform",
)
SPECS = {
    "flow": SPEC,
    "no classes": dataclasses.replace(SPEC, num_classes=0),
    "no guidance": dataclasses.replace(SPEC, label_dropout=0.0, times="logit_normal"),
    "one head, patches of a pixel": dataclasses.replace(SPEC, num_heads=1, patch_size=1),
}
IMAGES = ImageFormat(height=6, width=9, channels=3, label_names=tuple("abcde"))
every_spec = pytest.mark.parametrize("name", SPECS)


def model_of(name, **options):
    images = dataclasses.replace(IMAGES, label_names=IMAGES.label_names[: SPECS[name].num_classes])
    return Source(
        path=export.Path("<model>"),
        kind=source.CRAFT,
        spec=SPECS[name],
        leaves=random_leaves(SPECS[name], **options),
        tokenizer=None,
        images=images,
        step=7,
        run="one",
    )


@functools.cache
def exported(name, tmp):
    out = export.Path(tmp) / name.replace(" ", "_").replace(",", "")
    export.export_checkpoint(model_of(name), out, "craft-torch")
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = str(tmp_path_factory.mktemp("exported"))
    return lambda name: exported(name, place)


def points(known):
    rng = np.random.default_rng(8)
    x_BHWC = rng.normal(size=(4, known.height, known.width, known.channels))
    labels = np.array([0, max(0, known.num_classes - 1), known.num_classes, 0])
    return x_BHWC, np.array([0.0, 0.31, 0.77, 1.0]), labels


@every_spec
def test_leaves_are_those_of_the_model(name):
    known = SPECS[name]
    shapes = base.define(Flow, FlowConfig(**known.model_config())).shapes
    assert {n: (leaf.shape, leaf.dtype) for n, leaf in leaves(known).items()} == {
        n: (leaf.shape, leaf.dtype) for n, leaf in shapes.items()
    }


@every_spec
def test_velocities(name, folder):
    known, (x, t, labels) = SPECS[name], points(SPECS[name])
    ours = Reference(known, random_leaves(known)).logits({"x": x, "t": t, "labels": labels})
    model = modeling_craft.CraftFlow.from_pretrained(folder(name)).double()
    with torch.no_grad():
        theirs = model(torch.tensor(x), torch.tensor(t), torch.tensor(labels))
        nothing = model(torch.tensor(x), torch.tensor(t))
        same = model(torch.tensor(x), torch.tensor(t), torch.full((4,), known.num_classes))
    assert theirs.dtype == torch.float64
    assert np.abs(ours).max() > 0.1
    assert np.abs(ours - theirs.numpy()).max() <= 1e-10
    assert torch.equal(nothing, same)


@every_spec
def test_gradients(name, folder):
    """Of a weighted sum of velocities, with respect to every parameter and to the images."""
    known, (x, t, labels) = SPECS[name], points(SPECS[name])
    weights = np.random.default_rng(9).normal(size=x.shape)
    with jax.enable_x64(True):
        definition = base.define(Flow, FlowConfig(**known.model_config()))
        params = {
            n: jnp.asarray(leaf.read().astype(np.float64))
            for n, leaf in random_leaves(known).items()
        }

        def total(params, x):
            return jnp.sum(weights * definition.merge(params)(x, jnp.asarray(t), labels))

        ours, ours_x = jax.grad(total, argnums=(0, 1))(params, jnp.asarray(x))
        ours, ours_x = jax.tree.map(np.asarray, (ours, ours_x))
    model = modeling_craft.CraftFlow.from_pretrained(folder(name)).double()
    given = torch.tensor(x, requires_grad=True)
    v = model(given, torch.tensor(t), torch.tensor(labels))
    (torch.tensor(weights) * v).sum().backward()
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters()}
    assert set(theirs) == set(ours)
    for path, gradient in ours.items():
        scale = max(1.0, float(np.abs(gradient).max()))
        assert np.abs(gradient - theirs[path]).max() <= 1e-9 * scale, path
    assert np.abs(ours_x - given.grad.numpy()).max() <= 1e-9


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        (name, guidance)
        for name, known in SPECS.items()
        for guidance in (None, 1.0, 3.0)
        if guidance != 3.0 or (known.num_classes and known.label_dropout)
    ],
)
def test_a_whole_sampling_from_the_same_noise(name, solver, guidance, folder):
    known = SPECS[name]
    x, _, labels = points(known)
    options = {"num_steps": 20, "solver": solver, "guidance": guidance}
    with jax.enable_x64(True):
        definition = base.define(Flow, FlowConfig(**known.model_config()))
        params = {
            n: jnp.asarray(leaf.read().astype(np.float64))
            for n, leaf in random_leaves(known).items()
        }
        ours = definition.merge(params).generate(jnp.asarray(labels), noise_BHWC=x, **options)
    model = modeling_craft.CraftFlow.from_pretrained(folder(name)).double()
    theirs = model.generate(labels.tolist(), noise_BHWC=torch.tensor(x), **options)
    assert theirs.dtype == torch.float64
    assert np.abs(np.asarray(ours) - x).max() > 0.1
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() <= 1e-8


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_out_and_back_bit_for_bit(dtype, tmp_path):
    model = model_of("flow", dtype=dtype)
    export.export_checkpoint(model, tmp_path / "out", "craft-torch", verify="logits")
    done = imports.import_checkpoint(tmp_path / "out", tmp_path / "models" / "back")
    assert done.probe == 2 * min(512, 2 * 6 * 9 * 3)
    back = opening.open_source(tmp_path / "models" / "back")
    assert not diff.differences(model, back)
    assert back.images == model.images
    assert back.spec == model.spec
    assert (back.run, back.step) == ("one", 7)


@pytest.mark.parametrize("level", verify.LEVELS)
def test_every_level_of_verify(level, folder):
    model, out = model_of("flow"), folder("flow")
    report = verify.verify(model, out, level)
    assert report.passed, report
    changed = dict(model.leaves)
    kernel = changed["blocks.1.attn.key.kernel"].read().copy()
    kernel[3, 5] += 1e-3
    changed["blocks.1.attn.key.kernel"] = lazy(kernel)
    report = verify.verify(dataclasses.replace(model, leaves=changed), out, level)
    assert report.passed == (level == "structure")
    if level == "logits":
        assert "blocks.1.attn" in report.problems[1]
        assert "velocities differ" in report.problems[0]
    other = dataclasses.replace(model, spec=dataclasses.replace(SPEC, num_heads=5))
    assert not verify.verify(other, out, level).passed


def test_the_folder_proves_itself_and_notices_a_change(folder, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(folder("flow"), place)

    done = prove_alone(place)
    assert done.returncode == 0, done.stderr
    assert "velocities agree in float64" in done.stdout
    text = (place / "modeling_craft.py").read_text(encoding="utf-8")
    for old, new in (("1e-6, 1.5", "1e-5, 1.5"), ("start, end = number", "end, start = number")):
        assert old in text
        (place / "modeling_craft.py").write_text(text.replace(old, new), encoding="utf-8")
        done = prove(place)
        assert done.returncode == 1 and "FAILED" in done.stderr, old


def test_other_targets_refuse_it():
    for name, target in TARGETS.items():
        answer = target.answer(SPEC)
        assert answer.exact == (name == "craft-torch")
        assert name == "craft-torch" or "name=flow" in answer.reasons[0]
    with pytest.raises(NotRepresentableError, match="exact targets: craft-torch"):
        plan.plan(model_of("flow"), "hf")
    assert spec_of_tokens().differences(SPEC) == ["one is a gpt and the other a flow"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide d_model=20"),
        ({"patch_size": 4}, "patch_size=4 does not divide height=6"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"height": 0}, "height=0"),
        ({"times": "cosine"}, "times='cosine'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(InteropError, match=message):
        read_spec(SPEC.model_config() | changes, {})


def test_sizes_may_come_from_the_data():
    config = dict.fromkeys(SPEC.model_config()) | {
        k: v for k, v in SPEC.model_config().items() if k not in IMAGES.sizes
    }
    assert read_spec(config, IMAGES.sizes) == SPEC
    with pytest.raises(InteropError, match="a setting that this version of interop does not know"):
        read_spec(config | {"new": 1}, IMAGES.sizes)


@pytest.mark.parametrize("images", [{"height": "tall"}, {"height": 0}, 5, {"palette": 3}])
def test_a_damaged_description_of_images(images, folder, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(folder("flow"), place)
    config = json.loads((place / "config.json").read_text())
    config["images"] = images if images == 5 else config["images"] | images
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(InteropError, match="its `images` cannot be understood"):
        opening.open_source(place)


def test_refusals_of_pytorch(folder):
    model = modeling_craft.CraftFlow.from_pretrained(folder("flow"))
    for options, message in (
        ({"solver": "rk4"}, "solver='rk4'"),
        ({"num_steps": 0}, "num_steps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate([0], **options)
    with pytest.raises(ValueError, match="labels are not all in"):
        model.generate([6])
    unguided = modeling_craft.CraftFlow.from_pretrained(folder("no guidance"))
    with pytest.raises(ValueError, match="not trained without labels"):
        unguided.generate([0], guidance=2.0)
    with pytest.raises(ValueError, match="a flow is a CraftFlow"):
        modeling_craft.CraftForCausalLM.from_pretrained(folder("flow"))
    made = model.generate([0, 4], seed=3, num_steps=2)
    assert torch.equal(made, model.generate([0, 4], seed=3, num_steps=2))
    assert modeling_craft.to_uint8(made).dtype == torch.uint8


PIXELS = ImageFormat(
    height=5, width=4, channels=1, label_names=("x", "y"), palette=((0,), (90,), (255,))
)


def of_pixels(**changes):
    sizes = {"vocab_size": PIXELS.vocab_size, "max_seq_len": PIXELS.num_pixels}
    known = spec_of_tokens(**sizes, **changes)
    return Source(
        path=export.Path("<model>"),
        kind=source.CRAFT,
        spec=known,
        leaves=random_leaves(known),
        tokenizer=None,
        images=PIXELS,
    )


@pytest.mark.parametrize("target", ["craft-torch", "gpt2", "nanogpt"])
def test_a_palette_goes_with_a_model_of_pixels(target, tmp_path):
    if target != "craft-torch":
        pytest.importorskip("transformers")
    model = of_pixels(d_ff=192)
    done = export.export_checkpoint(model, tmp_path / "out", target)
    assert any("palette" in note for note in done.notes) == (target != "craft-torch")
    imports.import_checkpoint(tmp_path / "out", tmp_path / "models" / "back")
    back = opening.open_source(tmp_path / "models" / "back")
    assert back.images == PIXELS
    assert not diff.differences(model, back)


def test_pytorch_makes_the_images_of_a_model_of_pixels(tmp_path):
    """Greedy pixels are those of craft_jax, whatever the seed."""
    model = of_pixels()
    export.export_checkpoint(model, tmp_path / "out", "craft-torch")
    theirs = modeling_craft.CraftForCausalLM.from_pretrained(tmp_path / "out").double()
    made = theirs.generate_images([0, 1], temperature=0)
    assert made.shape == (2, 5, 4, 1) and made.dtype == torch.uint8
    # The same, each pixel from a full forward pass of craft_jax.
    reference = Reference(model.spec, model.leaves)
    tokens_BT = PIXELS.first_tokens(np.arange(2))[:, None]
    for _ in range(PIXELS.num_pixels):
        logits_BTV = reference.logits({"tokens": tokens_BT})
        new_B = logits_BTV[:, -1, : PIXELS.num_colors].argmax(axis=-1)
        tokens_BT = np.concatenate([tokens_BT, new_B[:, None]], axis=1).astype(np.int32)
    np.testing.assert_array_equal(made.numpy(), PIXELS.pixels(tokens_BT[:, 1:]))
    with pytest.raises(ValueError, match="labels are not all in"):
        theirs.generate_images([2])


def test_a_tokenizer_is_not_for_a_flow(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizers.characters("abc", end_token=False).json, encoding="utf-8")
    with pytest.raises((UsageError, InteropError), match="tokens"):
        plan.plan(model_of("flow"), "craft-torch", tokenizer=file)
