"""The `data` section of a config: sources, tokenizer, splits and batches."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from craft_jax import plugins
from craft_jax.data.images.format import MAX_COLORS
from craft_jax.data.sampling import WeightSchedule
from craft_jax.data.sources.formats import CHATML, Format
from craft_jax.data.splits import Fractions
from craft_jax.schema import MAX_POSITIONS, MAX_VOCAB, Contradiction, setting

KINDS = ("auto", "stdlib", "files", "tfds", "huggingface", "digits", "images")
_NAMED_SPLITS = ("tfds", "huggingface")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, tokenizer, splits and batches."""

    source: str = setting(
        "auto",
        "auto, stdlib, files, tfds, huggingface, digits, images, or a class of your own, "
        "path/file.py:Class; auto is files when data.path is set, else stdlib",
    )
    path: str | None = setting(
        None, "a file, a folder or a glob pattern of text; a folder of a dataset or of images"
    )
    name: str | None = setting(None, "a TFDS dataset: name, name/config or name:1.0.0")
    data_dir: str | None = setting(
        None, "the folder of TFDS datasets; none for $TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    mixture: tuple[str, ...] = setting(
        (),
        "several weighted sources in place of one: SOURCE=WEIGHT, where SOURCE is stdlib, "
        "tfds:NAME, huggingface:FOLDER or a path, and WEIGHT 0.7, or 0.7:0.2@1000 for 0.2 from "
        "batch 1000 on",
    )
    split: str = setting("train", "the training split of a TFDS or Hugging Face dataset")
    val_split: str | None = setting(
        None,
        "validation data in place of data.val_fraction: a split of the dataset, or a path of text",
    )
    test_split: str | None = setting(None, "test data in place of data.test_fraction, likewise")
    val_fraction: float = setting(
        0.1,
        "the fraction of the documents, or of a file's pairs, held out for validation",
        minimum=0,
        below=1,
    )
    test_fraction: float = setting(
        0.0, "the fraction of the documents held out for testing", minimum=0, below=1
    )
    hold_out: Literal["auto", "documents", "tail"] = setting(
        "auto",
        "documents: holds out documents, by a hash of their text; tail: the end of the text; auto: "
        "tail for fewer than 10 documents",
    )
    max_val_tokens: int | None = setting(
        None, "the most tokens of a split that an evaluation reads; none for all", minimum=1
    )
    text_field: str = setting("text", "the field of records with the text")
    prompt_field: str | None = setting(
        None, "the field of records with text before it, which is masked out of the loss"
    )
    messages_field: str | None = setting(
        None, "the field of records with the messages of a chat, each with role and content"
    )
    template: str = setting(
        CHATML.replace("\n", "\\n"),
        "the text of each message, with {role} and {content} in it",
    )
    learned_roles: tuple[str, ...] = setting(
        ("assistant",), "the roles whose messages count in the loss; others are masked out"
    )
    separator: str | None = setting(
        None, r"the separator of the documents of a text file, such as <|endoftext|> or \n\n"
    )
    tokenizer: str | None = setting(
        "bpe",
        "char, byte, bpe, or the path of a tokenizer.json, a SentencePiece .model or a Hugging "
        "Face folder; none for a model without one",
        keeps_vocabulary=True,
    )
    vocab_size: int = setting(
        1024,
        "tokens in the vocabulary of bpe; others ignore it",
        minimum=257,
        maximum=MAX_VOCAB,
        keeps_vocabulary=True,
    )
    special_tokens: tuple[str, ...] = setting((), "extra special tokens of char, byte and bpe")
    tokenizer_chars: int = setting(
        32 << 20, "the most characters that bpe is trained on, spread over the text", minimum=1
    )
    layout: Literal["concatenated", "packed", "rows"] = setting(
        "concatenated",
        "concatenated: windows of running text; packed: several whole documents to a row, without "
        "attention between them; rows: one document to a row",
    )
    order: Literal["epochs", "random"] = setting(
        "epochs", "epochs: each row once before any twice; random: windows with random starts"
    )
    pairs: str | None = setting(
        None,
        "pairs of text instead of running text: dates, reverse or sort (generated), or the path of "
        "a .tsv or .jsonl file (fields source, target)",
    )
    num_pairs: int = setting(20000, "generated training pairs", minimum=1, maximum=10**7)
    image_size: int | None = setting(
        None, "height and width to which images are cropped and resized; none to keep theirs",
        minimum=1, maximum=4096,
    )  # fmt: skip
    image_channels: int = setting(3, "1 for gray, 3 for red, green and blue", minimum=1, maximum=3)
    image_crop: Literal["center", "random"] = setting(
        "center", "the square cut from a training image: center, or random"
    )
    image_flip: bool = setting(False, "whether training images are mirrored at random")
    image_colors: int | None = setting(
        None,
        "the most colours of a palette, for images as tokens of a gpt; none for images as floats",
        minimum=2,
        maximum=MAX_COLORS,
    )
    seq_len: int = setting(
        128,
        "tokens in a training row; for pairs, the most in a source and in a target with the end "
        "token; images ignore it",
        minimum=1,
        maximum=MAX_POSITIONS,
    )
    batch_size: int = setting(
        16, "rows, pairs or images per optimizer step, over all devices", minimum=1, maximum=2**24
    )
    dataset: str | None = setting(
        None,
        "a dataset class of your own, path/file.py:Class; replaces all of the above",
        keeps_vocabulary=True,
    )
    workers: int = setting(
        0, "processes that load batches; 0 for a thread", minimum=0, maximum=64, resumable=True
    )
    prefetch: int = setting(
        2,
        "batches loaded ahead, here and in each worker; 0 loads each when it is needed",
        minimum=0,
        maximum=1000,
        resumable=True,
    )
    allow_change: bool = setting(
        False,
        "continue a run on data that has changed; batches are numbered from 0 again",
        resumable=True,
    )

    def contradictions(self) -> Iterator[Contradiction]:
        yield from self._wrong_source()
        yield from self._wrong_mixture()
        yield from self._wrong_text()
        other = "path" if self.path else "dataset" if self.dataset else None
        if self.pairs and other:
            yield Contradiction(
                ("data.pairs", f"data.{other}"),
                f"data.pairs={self.pairs} contradicts data.{other}={getattr(self, other)}; leave "
                "one of them out",
            )
        if self.image_channels == 2:
            yield Contradiction(
                ("data.image_channels",), "data.image_channels=2 is not supported; use 1 or 3"
            )
        if self.val_fraction + self.test_fraction >= 1:
            yield Contradiction(
                ("data.val_fraction", "data.test_fraction"),
                f"data.val_fraction={self.val_fraction} and data.test_fraction="
                f"{self.test_fraction} leave nothing to train on; lower one of them",
            )

    def _wrong_source(self) -> Iterator[Contradiction]:
        source = self.source
        if source not in KINDS and not plugins.is_reference(source):
            close = difflib.get_close_matches(source, KINDS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield Contradiction(
                ("data.source",),
                f"data.source={source} is not one of {', '.join(KINDS)}, nor a class as "
                f"path/file.py:Class{hint}",
            )
        for kind, field in _NEEDED.items():
            if source == kind and not getattr(self, field):
                yield Contradiction(
                    ("data.source", f"data.{field}"),
                    f"data.source={kind} needs data.{field}; name {_WHAT[kind]}",
                )
        if self.split != "train" and source not in ("tfds", "huggingface") and not self.mixture:
            yield Contradiction(
                ("data.source", "data.split"),
                f"data.split={self.split} names a split of a dataset, and data.source={source} has "
                "none; leave it out, or name the training data with data.path",
            )
        for field in ("val_split", "test_split"):
            if getattr(self, field) and source == "digits":
                yield Contradiction(
                    ("data.source", f"data.{field}"),
                    f"data.{field}={getattr(self, field)}: data.source=digits has no named "
                    "splits; use data.val_fraction and data.test_fraction",
                )
        if self.name and source in ("auto", "files") and not self.path:
            yield Contradiction(
                ("data.source", "data.name"),
                f"data.name={self.name} names a TFDS dataset; add data.source=tfds",
            )
            return
        takes_path = source in ("auto", "files", "huggingface", "images")
        for field, takes in (("path", takes_path), ("name", source == "tfds")):
            if getattr(self, field) and not takes:
                yield Contradiction(
                    ("data.source", f"data.{field}"),
                    f"data.source={source} contradicts data.{field}={getattr(self, field)}; leave "
                    "one of them out",
                )

    def _wrong_mixture(self) -> Iterator[Contradiction]:
        if not self.mixture:
            return
        for field in ("path", "name", "pairs", "dataset"):
            if getattr(self, field):
                yield Contradiction(
                    ("data.mixture", f"data.{field}"),
                    f"data.mixture contradicts data.{field}={getattr(self, field)}; leave one of "
                    "them out",
                )
        try:
            sources = mixture_of(self)
        except ValueError as error:
            yield Contradiction(("data.mixture",), f"data.mixture: {error}")
            return
        if not any(source.weight.weights[0] for source in sources):
            yield Contradiction(
                ("data.mixture",),
                "data.mixture: the weights of batch 0 are all 0; increase one of them",
            )

    def _wrong_text(self) -> Iterator[Contradiction]:
        if self.messages_field and self.template.count("{content}") != 1:
            yield Contradiction(
                ("data.template",),
                f"data.template={self.template!r} must contain {{content}} once",
            )
        if self.messages_field and self.prompt_field:
            yield Contradiction(
                ("data.messages_field", "data.prompt_field"),
                "data.messages_field contradicts data.prompt_field; leave one of them out",
            )
        if self.layout != "concatenated" and self.order == "random":
            yield Contradiction(
                ("data.layout", "data.order"),
                f"data.order=random cuts windows of running text, and data.layout={self.layout} "
                "keeps documents whole; leave one of them out",
            )

    @property
    def fractions(self) -> Fractions:
        """The fractions held out; 0 where a split is named instead."""
        return Fractions(
            0.0 if self.val_split else self.val_fraction,
            0.0 if self.test_split else self.test_fraction,
        )

    @property
    def format(self) -> Format:
        """How records become text."""
        return Format(
            text_field=self.text_field,
            prompt_field=self.prompt_field,
            messages_field=self.messages_field,
            template=self.template.replace("\\n", "\n"),
            learned_roles=self.learned_roles,
        )

    @property
    def text_separator(self) -> str | None:
        """`separator`, with escaped newlines and tabs resolved."""
        if not self.separator:
            return None
        return self.separator.replace("\\n", "\n").replace("\\t", "\t")


_NEEDED = {"files": "path", "huggingface": "path", "images": "path", "tfds": "name"}
_WHAT = {
    "files": "your text",
    "huggingface": "the folder of the dataset",
    "images": "the folder of the images",
    "tfds": "the dataset",
}


class MixtureComponent(NamedTuple):
    """One source of a mixture.

    Attributes:
      kind: as `DataConfig.source`.
      place: its path or name; None for the standard library.
      weight: in the mixture.
    """

    kind: str
    place: str | None
    weight: WeightSchedule


def mixture_of(config: DataConfig) -> list[MixtureComponent]:
    """Returns the sources of a config, one or several.

    Raises:
      ValueError: `data.mixture` cannot be parsed.
    """
    if not config.mixture:
        is_files = config.source == "files" or (config.source == "auto" and config.path)
        kind = "files" if is_files else "stdlib" if config.source == "auto" else config.source
        place = config.name if kind == "tfds" else config.path
        return [MixtureComponent(kind, place, WeightSchedule.parse("1"))]
    components = []
    for text in config.mixture:
        place, equals, word = text.rpartition("=")
        if not (equals and place):
            raise ValueError(f"{text!r} is not SOURCE=WEIGHT")
        try:
            weight = WeightSchedule.parse(word)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"{text!r} does not end in a weight such as 0.7, or 0.7:0.2@1000: {error}"
            ) from None
        kind, colon, name = place.partition(":")
        if place == "stdlib":
            components.append(MixtureComponent("stdlib", None, weight))
        elif colon and kind in _NAMED_SPLITS:
            components.append(MixtureComponent(kind, name, weight))
        else:
            components.append(MixtureComponent("files", place, weight))
    return components
