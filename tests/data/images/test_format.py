"""Images as tokens: nothing is lost where the palette has every colour, and little where not."""

import json

import numpy as np
import pytest

from craft_jax.data.images.datasets import open_images
from craft_jax.data.images.format import ImageFormat
from craft_jax.data.images.pixels import ImageProcessor, fit_palette
from craft_jax.data.images.sources import ArrayImages, digits
from craft_jax.errors import UsageError

GRAY = tuple((round(255 * n / 16),) for n in range(17))
FORMAT = ImageFormat(height=8, width=8, channels=1, label_names=("a", "b", "7"), palette=GRAY)


def opened(source=None, num_colors=17, channels=1, **options):
    options = {"val_fraction": 0.1, "test_fraction": 0.0, "batch_size": 32, "seed": 3} | options
    processor = ImageProcessor(channels=channels)
    return open_images(source or digits(), **options, processor=processor, num_colors=num_colors)


def test_digits_are_tokens_and_back_without_loss():
    data = opened()["train"]
    made = data.image_format
    assert (made.num_colors, made.vocab_size, data.vocab_size) == (17, 27, 27)
    batch, images = data.batch(5), data.images.batch(5)
    assert batch["tokens"].shape == batch["targets"].shape == batch["weights"].shape == (32, 64)
    np.testing.assert_array_equal(batch["tokens"][:, 0], 17 + images["labels"])
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    pixels = made.pixels(batch["targets"])
    np.testing.assert_array_equal(pixels, np.rint((images["images"] + 1) * 127.5))


def test_rows_that_fill_a_batch_up_do_not_count():
    data = opened()["val"]
    last = data.batch(len(data) - 1)
    count = len(data.images.indices) % 32
    assert last["weights"].sum() == count * 64
    assert set(np.unique(last["weights"])) <= {0.0, 1.0}


def test_a_palette_of_few_colours_is_near(rng):
    """Photographs lose at most a little: colours of a smooth picture, 16 of some thousands."""
    ramp = np.linspace(0, 255, 32)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 128.0), axis=-1)
    images = np.stack([image, image[::-1]]).astype(np.uint8)
    for num_colors, most in ((16, 24), (256, 8)):
        palette = fit_palette(lambda i: images[i], 2, num_colors)
        assert 2 <= len(palette) <= num_colors
        assert list(palette) == sorted(set(palette))
        made = ImageFormat(height=32, width=32, channels=3, palette=palette)
        back = made.pixels(made.tokens(images))
        assert np.abs(back.astype(int) - images).mean() < most
    gray = images[..., :1]
    made = fit_palette(lambda i: gray[i], 2, 8)
    assert len(made) <= 8 and all(len(color) == 1 for color in made)


def test_unseen_colours_become_the_nearest():
    image = np.array([[[0], [9], [250], [128]]], np.uint8)[None]
    assert FORMAT.tokens(np.zeros((1, 8, 8, 1), np.uint8)).sum() == 0
    small = ImageFormat(height=1, width=4, channels=1, palette=((0,), (16,), (255,)))
    assert small.tokens(image).tolist() == [[0, 1, 2, 1]]


def test_images_without_classes_share_a_first_token():
    source = ArrayImages(name="x", images_NHWC=digits().images_NHWC[:200])
    data = opened(source)["train"]
    assert data.vocab_size == 18
    assert set(data.batch(0)["tokens"][:, 0].tolist()) == {17}


def test_seeds_depend_on_image_and_epoch():
    data = opened(num_colors=None)
    first, again = data["train"].batch(0)["seeds"], data["train"].batch(0)["seeds"]
    np.testing.assert_array_equal(first, again)
    assert len({*first.tolist(), *data["train"].batch(1)["seeds"].tolist()}) == 64
    other = opened(num_colors=None, seed=4)
    assert set(first.tolist()).isdisjoint(other["train"].batch(0)["seeds"].tolist())
    np.testing.assert_array_equal(other["val"].batch(0)["seeds"], data["val"].batch(0)["seeds"])


def test_as_json():
    assert ImageFormat.from_json(json.loads(json.dumps(FORMAT.to_json()))) == FORMAT
    for wrong in ({"height": 0}, {"palette": [[300]]}, {"palette": [["x"]]}):
        with pytest.raises((ValueError, TypeError)):
            ImageFormat.from_json(FORMAT.to_json() | wrong)


def test_labels():
    assert [FORMAT.label(name) for name in ("a", "b", "7", "0")] == [0, 1, 2, 0]
    with pytest.raises(UsageError, match="`label=x` is no class of this run; there are a, b, 7"):
        FORMAT.label("x")
    with pytest.raises(UsageError, match="no labels"):
        ImageFormat(height=1, width=1, channels=1).label("3")
