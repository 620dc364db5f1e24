import io
import json
import os
import pickle
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from craft_jax.data import loading, splits
from craft_jax.data.images import conversion, datasets, pixels, sources
from craft_jax.data.images import tfds as tfds_images
from craft_jax.data.images.datasets import TrainingImages, ValidationImages
from craft_jax.data.images.pixels import ImageProcessor
from craft_jax.data.images.sources import ArrayImages
from craft_jax.errors import BAD_DATA, ConfigError, DataError

GRAY = ImageProcessor(channels=1)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encoded(array, form="PNG", **options):
    file = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(file, form, **options)
    return file.getvalue()


def png(width, height, depth, color, data):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def array_source(count=50, *shape, name="noise"):
    labels = np.arange(count) % 3
    found = noise(count, *(shape or (4, 4, 1)))
    return ArrayImages(name=name, images_NHWC=found, labels_N=labels, label_names=("a", "b", "c"))


def write(folder, **files):
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_png", ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


# A file to pixels.


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_files_of_every_format(form, shape):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    array = np.full(shape, 128, np.uint8)
    array[:, 3:] = 30
    found = pixels.decode(encoded(array, form, **options.get(form, {})), "x")
    assert found.dtype == np.uint8 and found.shape[:2] == (5, 7)
    assert np.abs(found.astype(int) - array.reshape(5, 7, -1)).max() <= (9 if form == "JPEG" else 0)


def test_a_palette():
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = pixels.decode(encoded(picture), "x")
    assert found.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]
    found = pixels.decode(encoded(picture, transparency=1), "x")
    assert found.shape == (2, 2, 4)
    assert found[..., 3].tolist() == [[255, 0], [255, 0]]


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_laid_on_white(channels):
    array = np.zeros((1, 3, channels), np.uint8)
    array[..., -1] = [0, 128, 255]
    found = pixels.decode(encoded(array), "x")
    assert np.array_equal(found, array)
    for wanted in (1, 3):
        laid = ImageProcessor(channels=wanted).pixels(found)
        assert laid.tolist() == [[[255] * wanted, [127] * wanted, [0] * wanted]]


def test_one_transparent_gray():
    found = pixels.decode(encoded(np.array([[7, 9]], np.uint8), transparency=9), "x")
    assert found.tolist() == [[[7, 255], [9, 0]]]


def test_sixteen_bits_become_eight():
    values = np.array([[0, 127, 128, 257, 32768, 65535]], np.uint16)
    found = pixels.decode(encoded(values), "x")
    assert found[..., 0].tolist() == [[0, 0, 0, 1, 128, 255]]
    rows = b"\0" + np.array([0, 257, 65535, 0x1234, 0, 0xFFFF], ">u2").tobytes()
    found = pixels.decode(png(2, 1, 16, 2, rows), "x")
    assert found.tolist() == [[[0, 1, 255], [0x12, 0, 255]]]


def test_one_bit():
    found = pixels.decode(encoded(Image.fromarray(np.array([[True, False]]))), "x")
    assert found.tolist() == [[[255], [0]]]


def test_exif_orientation_is_applied():
    array = np.zeros((8, 16, 3), np.uint8)
    array[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned clockwise.
    found = pixels.decode(encoded(array, "JPEG", exif=exif), "x")
    assert found.shape == (16, 8, 3)
    assert found[:4].min() > 200 and found[-4:].max() < 50


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_costs_no_image():
    data = encoded(noise(8, 16, 3), "JPEG", exif=b"Exif\0\0MM\0*garbage")
    assert pixels.decode(data, "x").shape == (8, 16, 3)


def test_bombs_are_refused():
    big = encoded(Image.new("1", (9000, 8000)))
    with pytest.raises(DataError, match=r"^a.png has more than 67108864 pixels \(9000 x 8000\)"):
        pixels.decode(big, "a.png")
    for side in (12_000, 60_000):
        with pytest.raises(DataError, match=r"^a.png has more than 67108864 pixels.*shrink"):
            pixels.decode(png(side, side, 8, 0, b""), "a.png")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"GIF87a", "is not a PNG"),
        (b"hello", "is not a PNG, JPEG, WebP, BMP or GIF image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a PNG"),
        (encoded(noise(20, 20, 3))[:300], "is damaged"),
        (encoded(noise(20, 20, 3), "JPEG")[:500], "is damaged"),
        (encoded(noise(20, 20, 3), "BMP")[:500], "is damaged"),
        (encoded(noise(20, 20, 3)).replace(b"IDAT", b"IDAX"), "is not a PNG"),
        (png(4, 4, 8, 0, b"short"), "is damaged"),
    ],
)
def test_invalid_images_are_named(data, said):
    with pytest.raises(DataError, match=f"^here {said}.*replace or remove it$") as caught:
        pixels.decode(data, "here")
    assert caught.value.exit_code == BAD_DATA
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_a_png_is_detected():
    data = bytearray(encoded(noise(20, 20, 3)))
    data[data.index(b"IDAT") + 200] ^= 1
    with pytest.raises(DataError, match="here is damaged"):
        pixels.decode(bytes(data), "here")


# Pixels to what a model reads.


def test_the_inverse_is_exact():
    values = np.arange(256, dtype=np.uint8)
    found = conversion.normalize(values)
    assert found.dtype == np.float32 and found[0] == -1 and found[-1] == 1
    assert np.array_equal(conversion.to_uint8(found), values)
    assert np.array_equal(conversion.to_uint8(found.astype(np.float64)), values)
    assert np.array_equal(conversion.to_uint8(found + np.float32(0.0039)), values)


def test_values_outside_are_clipped():
    found = conversion.to_uint8(np.array([-7, 7, np.inf, -np.inf, np.nan], np.float32))
    assert found.tolist() == [0, 255, 255, 0, 0]


def test_channels():
    color = noise(3, 4, 3)
    gray = ImageProcessor(channels=1).pixels(color)
    expected = color @ [0.299, 0.587, 0.114]
    assert np.abs(gray[..., 0] - expected).max() <= 1
    back = ImageProcessor(channels=3).pixels(gray)
    assert back.shape == (3, 4, 3) and (back == gray).all()


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 20, 3), (20, 8, 3), (3, 5, 1), (1, 90, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_sizes_are_resized(shape, channels):
    processor = ImageProcessor(size=8, channels=channels, crop="random", flip=True)
    for rng in (None, np.random.default_rng(0)):
        found = processor(noise(*shape), rng)
        assert found.shape == (8, 8, channels) and found.dtype == np.float32
        assert found.min() >= -1 and found.max() <= 1
    assert processor.shape(noise(*shape)) == (8, 8, channels)


def test_fitting_images_are_unchanged():
    image = noise(8, 8, 3)
    assert np.array_equal(ImageProcessor(size=8).pixels(image), image)
    assert np.array_equal(ImageProcessor().pixels(image), image)
    wide = noise(8, 20, 3)
    assert np.array_equal(ImageProcessor(size=8).pixels(wide), wide[:, 6:14])


def test_smaller_is_smooth():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))[..., None]
    found = ImageProcessor(size=8, channels=1).pixels(stripes)
    assert np.abs(found[1:-1, 1:-1].astype(int) - 128).max() < 12


def test_random_crops_reach_every_place():
    image = np.tile(np.arange(12, dtype=np.uint8), (4, 1))[..., None]
    processor = ImageProcessor(size=4, channels=1, crop="random")
    found = {int(processor.pixels(image, np.random.default_rng(n))[0, 0, 0]) for n in range(200)}
    assert found == set(range(9))
    assert processor.pixels(image)[0, 0, 0] == 4


def test_half_are_flipped():
    image, processor = noise(4, 4, 1), ImageProcessor(channels=1, flip=True)
    found = [processor.pixels(image, np.random.default_rng(n)) for n in range(400)]
    flipped = [np.array_equal(one, image[:, ::-1]) for one in found]
    assert 150 < sum(flipped) < 250
    kept = [one for one, is_flipped in zip(found, flipped, strict=True) if not is_flipped]
    assert all(np.array_equal(one, image) for one in kept)
    assert np.array_equal(processor.pixels(image), image)


def test_wrong_settings_are_all_named():
    with pytest.raises(ConfigError) as caught:
        ImageProcessor(size=0, channels=2, crop="left")
    words = str(caught.value)
    for said in ("data.image_size=0", "data.image_channels=2", "data.image_crop=left"):
        assert said in words
    assert pickle.loads(pickle.dumps(GRAY)) == GRAY


# Digits.


def test_digits():
    found = sources.digits()
    assert len(found) == 1797 and found.label_names == tuple("0123456789")
    assert found.images_NHWC.min() == 0 and found.images_NHWC.max() == 255
    assert found.image(0).shape == (8, 8, 1) and found.image(0).dtype == np.uint8
    # scikit-learn's first digit is a 0, with these values in its first row.
    assert found.image(0)[0, :, 0].tolist() == [
        round(v * 255 / 16) for v in (0, 0, 5, 13, 9, 1, 0, 0)
    ]
    assert [found.label(i) for i in range(12)] == [*range(10), 0, 1]


# Folders.


def test_a_folder_of_classes(tmp_path):
    array = noise(4, 4, 3)
    write(tmp_path, b__x_png=encoded(array), a__z_png=encoded(array), a__deep__y_png=encoded(array))
    (tmp_path / "a" / "big.JPEG").write_bytes(encoded(array, "JPEG"))
    write(tmp_path, a__notes=b"text", b___=b"", empty__notes=b"text")
    (tmp_path / "b" / ".hidden.png").write_bytes(b"")
    (tmp_path / ".trash").mkdir()
    (tmp_path / ".trash" / "x.png").write_bytes(b"")
    found = sources.folder(tmp_path)
    assert found.files == ("a/big.JPEG", "a/deep/y.png", "a/z.png", "b/x.png")
    assert found.label_names == ("a", "b")
    assert [found.label(i) for i in range(4)] == [0, 0, 0, 1]
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(again.image(3), array)


def test_class_names_sort_as_names(tmp_path):
    for name in ("a", "a-b", "a.b", "B"):
        write(tmp_path / name, x_png=encoded(noise(2, 2)))
    found = sources.folder(tmp_path)
    assert found.label_names == ("B", "a", "a-b", "a.b")
    names = [found.label_names[found.label(i)] for i in range(4)]
    assert names == [file.split("/")[0] for file in found.files]


def test_a_flat_folder(tmp_path):
    write(tmp_path, b_png=encoded(noise(2, 2)), a_png=encoded(noise(2, 2)))
    found = sources.folder(tmp_path)
    assert found.files == ("a.png", "b.png") and found.label_names == ()
    assert found.label(0) is None
    data = TrainingImages(found, np.arange(2), processor=GRAY, batch_size=2, seed=0)
    assert set(data.batch(0)) == {"images", "weights", "seeds"}


def test_folders_that_do_not_serve(tmp_path):
    with pytest.raises(DataError, match=r"data.path=.*gone does not exist"):
        sources.folder(tmp_path / "gone")
    with pytest.raises(DataError, match=r"--images=.* contains no images \(.png"):
        sources.folder(tmp_path, "--images")
    write(tmp_path, x_png=b"", a__y_png=b"")
    with pytest.raises(DataError, match=r"has x.png beside folders of classes such as a;"):
        sources.folder(tmp_path)
    with pytest.raises(DataError, match=r"x.png is not a folder"):
        sources.folder(tmp_path / "x.png")


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path, a_png=b"", b_png=encoded(noise(40, 40, 3))[:700])
    (tmp_path / "c.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "d.png")
    found = sources.folder(tmp_path)
    said = (
        "a.png is empty",
        "b.png is damaged",
        "cannot read .*c.png: No such",
        "d.png is not a file",
    )
    for i, words in enumerate(said):
        with pytest.raises(DataError, match=f"data.path: .*{words}") as caught:
            found.image(i)
        assert str(tmp_path) in str(caught.value) and caught.value.exit_code == BAD_DATA
    with pytest.raises(DataError, match=r"data.path: .*a.png is empty"):
        datasets.split(found, 0.1, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_folders_that_cannot_be_listed(tmp_path):
    write(tmp_path, a__x_png=b"")
    (tmp_path / "a").chmod(0)
    with pytest.raises(DataError, match=r"cannot list .*a: Permission denied"):
        sources.folder(tmp_path)
    (tmp_path / "a").chmod(0o700)


def test_a_circle_of_links(tmp_path):
    write(tmp_path, a__x_png=encoded(noise(2, 2)))
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"cannot list .*levels of symbolic links"):
        sources.folder(tmp_path)


# TFDS.


@pytest.fixture(scope="module")
def tfds():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("array_record.python.array_record_module")
        return pytest.importorskip("tensorflow_datasets")


def prepare(tfds, data_dir, features=None, make=None):
    def example(i):
        return {"image": io.BytesIO(encoded(noise(6, 6, 3, seed=i))), "label": i % 2}

    class TinyImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            found = features or {
                "image": tfds.features.Image(shape=(6, 6, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(found))

        def _split_generators(self, _):
            return {"train": self._generate_examples(12), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, (make or example)(i)

    builder = TinyImages(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return data_dir


def test_a_tfds_dataset(tfds, tmp_path):
    prepare(tfds, tmp_path)
    found = tfds_images.from_tfds("tiny_images", tmp_path, "train")
    assert len(found) == 12 and found.label_names == ("cat", "dog") and found.name == "tiny_images"
    expected = {noise(6, 6, 3, seed=i).tobytes(): i % 2 for i in range(12)}
    got = {found.image(i).tobytes(): found.label(i) for i in range(12)}
    assert got == expected
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).image(5), found.image(5))
    part = tfds_images.from_tfds("tiny_images:1.0.0", tmp_path, "train[5:9]+test", label_key="")
    assert len(part) == 8 and part.label_names == () and part.label(0) is None
    assert np.array_equal(part.image(3), found.image(8))
    assert "record 8 of" in part.place(3) and "record 0 of" in part.place(4)


def test_features_are_found_or_named(tfds, tmp_path):
    features = {
        "photo": tfds.features.Image(),
        "mask": tfds.features.Image(shape=(None, None, 1)),
        "depth": tfds.features.Image(shape=(None, None, 1), dtype=np.float32),
        "kind": tfds.features.ClassLabel(num_classes=3),
        "text": tfds.features.Text(),
    }

    def example(i):
        files = {name: io.BytesIO(encoded(noise(3, 4, seed=i))) for name in ("photo", "mask")}
        # What the feature accepts without TensorFlow is bytes; nothing reads them.
        return files | {"depth": io.BytesIO(b""), "kind": -1, "text": "x"}

    def open_it(**options):
        return tfds_images.from_tfds("tiny_images", tmp_path, "train", **options)

    features["depth"]._image_encoder = features["mask"]._image_encoder
    prepare(tfds, tmp_path, features, example)
    with pytest.raises(
        DataError, match=r"3 features of the kind Image: depth, mask, photo; .*image_key"
    ):
        open_it()
    with pytest.raises(DataError, match=r"no Image feature 'text'; it has: depth, mask, photo"):
        open_it(image_key="text")
    with pytest.raises(DataError, match=r"no ClassLabel feature 'text'; it has: kind"):
        open_it(image_key="mask", label_key="text")
    with pytest.raises(DataError, match=r"'depth' are .*float32"):
        open_it(image_key="depth")
    found = open_it(image_key="mask")
    assert found.image(0).shape == (3, 4, 1)
    with pytest.raises(DataError, match=r"has the label -1 in the feature 'kind'.*no labels"):
        found.label(0)


def test_a_tfds_dataset_that_is_not_there(tfds, tmp_path):
    with pytest.raises(DataError, match=r"data.name=nothing_here: no dataset of that name") as e:
        tfds_images.from_tfds("nothing_here", tmp_path, "train")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    with pytest.raises(DataError, match=r"mnist: not prepared in .*prepare --config"):
        tfds_images.from_tfds("mnist", tmp_path, "train")
    prepare(tfds, tmp_path)
    for split in ("vali", "train["):
        with pytest.raises(DataError, match=r"no split .*it has: train, test") as caught:
            tfds_images.from_tfds("tiny_images", tmp_path, split)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"'train\[5:5\]' has no record"):
        tfds_images.from_tfds("tiny_images", tmp_path, "train[5:5]")


def test_another_format_is_named(tfds, tmp_path):
    prepare(tfds, tmp_path)
    file = tmp_path / "tiny_images" / "1.0.0" / "dataset_info.json"
    info = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(info | {"fileFormat": "tfrecord"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"prepared as tfrecord.*file_format=.array_record"):
        tfds_images.from_tfds("tiny_images", tmp_path, "train")


@pytest.mark.parametrize("fault", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_shard_is_named(tfds, tmp_path, fault):
    prepare(tfds, tmp_path)
    [shard] = tmp_path.rglob("*train.array_record*")
    data = shard.read_bytes()
    place = data.index(b"IDAT") + 10
    flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    shard.write_bytes({"cut": data[:5000], "empty": b"", "flipped": flipped}.get(fault, data))
    if fault == "gone":
        shard.unlink()
    found = tfds_images.from_tfds("tiny_images", tmp_path, "train")
    with pytest.raises(
        DataError, match=r"cannot read the shard .*tiny_images-train.*anew"
    ) as caught:
        [found.image(i) for i in range(12)]
    assert str(shard) in str(caught.value) and "\n" not in str(caught.value)


def test_tensorflow_datasets_is_required(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="pip install tensorflow-datasets"):
        tfds_images.from_tfds("mnist", tmp_path, "train")


# Batches.


def training(source=None, count=50, batch_size=8, seed=3, processor=GRAY):
    source = source or array_source(count)
    return TrainingImages(
        source, np.arange(len(source)), processor=processor, batch_size=batch_size, seed=seed
    )


def test_an_epoch_visits_each_image_once():
    data = training(count=20, batch_size=6)
    rows = np.concatenate([data.batch(step)["images"] for step in range(10)])
    want = sorted(GRAY(image).tobytes() for image in data.source.images_NHWC)
    epochs = [[row.tobytes() for row in rows[first : first + 20]] for first in (0, 20, 40)]
    assert all(sorted(epoch) == want for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(data) == 3


def test_a_batch():
    data = training()
    batch = data.batch(7)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "images": ("float32", (8, 4, 4, 1)),
        "labels": ("int32", (8,)),
        "weights": ("float32", (8,)),
        "seeds": ("uint32", (8,)),
    }
    of = {GRAY(data.source.image(i)).tobytes(): data.source.label(i) for i in range(50)}
    assert [of[image.tobytes()] for image in batch["images"]] == batch["labels"].tolist()
    assert (batch["weights"] == 1).all()
    assert data.image_shape == (4, 4, 1) and data.label_names == ("a", "b", "c")
    assert data.tokenizer is None and data.vocab_size is None


def test_fewer_images_than_a_batch():
    data = training(count=3, batch_size=8)
    assert len(data) == 1
    assert sorted(np.bincount(data.batch(0)["labels"])) == [2, 3, 3]


def test_seeds_differ():
    one, other = training(), training(seed=4)
    assert not np.array_equal(one.batch(0)["images"], other.batch(0)["images"])
    assert np.array_equal(one.batch(5)["images"], training().batch(5)["images"])


def test_validation_fills_up_the_last_batch():
    data = training(count=10, batch_size=4).one_pass()
    assert isinstance(data, ValidationImages) and len(data) == 3
    batches = [data.batch(step) for step in range(3)]
    weights = np.concatenate([batch["weights"] for batch in batches])
    assert weights.tolist() == [1.0] * 10 + [0.0] * 2
    rows = np.concatenate([batch["images"] for batch in batches])
    assert np.array_equal(rows[:10], conversion.normalize(data.source.images_NHWC))
    assert (rows[10:] == 0).all()
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert labels.tolist() == [i % 3 for i in range(10)] + [0, 0]


def test_validation_images_are_deterministic():
    processor = ImageProcessor(size=4, channels=1, crop="random", flip=True)
    data = training(array_source(9, 4, 9, 1), processor=processor).one_pass()
    for image, row in zip(data.source.images_NHWC, data.batch(0)["images"], strict=False):
        assert np.array_equal(row, conversion.normalize(image[:, 2:6]))


def test_an_example_is_changed_anew_in_each_epoch():
    processor = ImageProcessor(size=4, channels=1, crop="random", flip=True)
    data = training(array_source(1, 4, 30, 1), batch_size=1, processor=processor)
    assert len({data.batch(step)["images"].tobytes() for step in range(20)}) > 10


def in_a_folder(tmp_path):
    for i in range(11):
        write(tmp_path / f"class{i % 2}", **{f"{i}_png": encoded(noise(9, 12 + i, 3, seed=i))})
    return sources.folder(tmp_path)


@pytest.mark.parametrize("kind", ["digits", "folder", "tfds"])
def test_the_same_batches_from_any_number_of_workers(kind, tmp_path, request):
    if kind == "digits":
        source = sources.digits()
    elif kind == "folder":
        source = in_a_folder(tmp_path)
    else:
        prepare(request.getfixturevalue("tfds"), tmp_path)
        source = tfds_images.from_tfds("tiny_images", tmp_path, "train")
    processor = ImageProcessor(size=5, crop="random", flip=True)
    data = training(source, batch_size=3, processor=processor)
    expected = [data.batch(step) for step in range(2, 9)]
    for workers in (0, 2):
        found = list(
            loading.load_batches(data, 2, 9, workers=workers, ahead=1, then=lambda batch: batch)
        )
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_damaged_file_in_a_worker(tmp_path):
    source = in_a_folder(tmp_path)
    data = training(source, batch_size=3, processor=ImageProcessor(size=5))
    (tmp_path / source.files[4]).write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"data.path: .*{source.files[4]} is not a PNG"):
        list(loading.load_batches(data, 0, 4, workers=1, ahead=1, then=lambda batch: batch))


# Splits.


def taken(source, parts):
    return {name: {source.image(i).tobytes() for i in part} for name, part in parts.items()}


def test_splits_are_disjoint_and_have_their_fractions():
    source = array_source(3000, 2, 2, 1)
    parts = datasets.split(source, 0.2, 0.1)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(3000))
    assert 500 < len(parts["val"]) < 700 and 230 < len(parts["test"]) < 370
    assert all((np.diff(part) > 0).all() for part in parts.values())


def test_an_image_stays_in_its_split():
    many = noise(400, 3, 3, 1)
    small = ArrayImages(name="x", images_NHWC=many[100:200])
    large = ArrayImages(name="x", images_NHWC=many[::-1])
    before = taken(small, datasets.split(small, 0.2, 0.2))
    after = taken(large, datasets.split(large, 0.2, 0.2))
    assert all(before[name] <= after[name] for name in splits.SPLITS)
    # A larger part takes images of the training split, and gives none back.
    more = taken(large, datasets.split(large, 0.3, 0.1))
    assert after["val"] <= more["val"] and after["train"] == more["train"]


def test_equal_images_are_in_one_split():
    many = noise(60, 2, 2, 1)
    source = ArrayImages(name="x", images_NHWC=np.concatenate([many, many[::-1], many]))
    found = taken(source, datasets.split(source, 0.3, 0.3))
    assert not found["train"] & found["val"] | found["train"] & found["test"]
    assert not found["val"] & found["test"]


@pytest.mark.parametrize("seed", range(5))
def test_no_split_is_empty(seed):
    for count in (3, 4, 5):
        source = ArrayImages(name="x", images_NHWC=noise(count, 2, 2, 1, seed=seed))
        for fractions in ((0.001, 0.001), (0.001, 0.998), (0.998, 0.001), (0.3, 0.3)):
            parts = datasets.split(source, *fractions)
            assert all(len(part) for part in parts.values())
            assert sorted(np.concatenate(list(parts.values()))) == list(range(count))
    assert len(datasets.split(source, 0.5, 0)["test"]) == 0
    assert len(datasets.split(source, 0, 0)["train"]) == 5


def test_too_few_images_that_differ():
    same = np.repeat(noise(1, 2, 2, 1), 9, axis=0)
    with pytest.raises(
        DataError, match=r"x has 9 images, 1 of them different: too few for 2 splits"
    ):
        datasets.split(ArrayImages(name="x", images_NHWC=same), 0.1, 0)


def test_fractions_without_training_images():
    for fractions in ((1, 0), (0.5, 0.5), (-0.1, 0)):
        with pytest.raises(ConfigError, match=r"data.val_fraction=.*data.test_fraction="):
            datasets.split(array_source(), *fractions)


def opened(source, processor=GRAY, val_fraction=0.2, test_fraction=0.0):
    return datasets.open_images(
        source,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        batch_size=4,
        seed=1,
        processor=processor,
    )


def test_open_images():
    source = array_source(100)
    found = opened(source)
    assert list(found) == ["train", "val"]
    assert isinstance(found["train"], TrainingImages)
    assert isinstance(found["val"], ValidationImages)
    assert len(found["train"].indices) + len(found["val"].indices) == 100
    assert found["train"].name == "noise"
    assert list(opened(source, test_fraction=0.2)) == ["train", "val", "test"]
    assert list(opened(source, val_fraction=0)) == ["train"]
    assert found["train"].one_pass().fingerprint == found["val"].fingerprint


def test_fingerprints_depend_on_content_and_processing():
    source = array_source(100)
    others = [
        opened(source),
        opened(array_source(99)),
        opened(source, val_fraction=0.3),
        opened(source, ImageProcessor(size=8, channels=1)),
        opened(ArrayImages(name="noise", images_NHWC=source.images_NHWC)),
    ]
    assert len({found["train"].fingerprint for found in others}) == 5
    assert opened(source)["train"].fingerprint == others[0]["train"].fingerprint


def test_images_of_several_sizes_need_one(tmp_path):
    source = in_a_folder(tmp_path)
    with pytest.raises(DataError, match=r"class0/10.png has 9 x 22.*9 x 12.*data.image_size=9"):
        opened(source, ImageProcessor())
    assert opened(source, ImageProcessor(size=6))["train"].batch(0)["images"].shape == (4, 6, 6, 3)


# Samples to a file.


def test_a_grid(tmp_path):
    many = noise(5, 3, 4, 3)
    found = conversion.grid(many, 2)
    assert found.shape == (3 * 4 - 1, 2 * 5 - 1, 3)
    assert np.array_equal(found[4:7, 5:9], many[3])
    assert (found[8:, 5:] == 255).all() and (found[3] == 255).all()
    assert np.array_equal(conversion.grid(conversion.normalize(many), 2), found)
    assert conversion.grid(many[:1], 8, gap=0).shape == (3, 4, 3)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 4, 3), (3, 4, 4)])
def test_a_png(tmp_path, shape):
    file = tmp_path / "x.png"
    file.write_bytes(b"old")
    pixels.save_png(file, noise(*shape))
    found = pixels.decode(file.read_bytes(), "x")
    assert np.array_equal(found, noise(*shape).reshape(found.shape))
    assert os.listdir(tmp_path) == ["x.png"]


def test_a_png_that_cannot_be_written_leaves_the_old(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    file.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", lambda self, path, form: path.write_bytes(b"ha") / 0)
    with pytest.raises(ZeroDivisionError):
        pixels.save_png(file, noise(3, 4))
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.png"]
    monkeypatch.undo()
    with pytest.raises(OSError, match="No such file"):
        pixels.save_png(tmp_path / "gone" / "x.png", noise(3, 4))
