"""Opens a model in any form: a run of craft_jax, or a file or folder of any target."""

from pathlib import Path

from craft_jax import outputs
from craft_jax.checkpoint.listing import Checkpoints
from craft_jax.data.tokenizers import Tokenizer
from craft_jax.errors import CraftError
from interop.craft import tokenizers
from interop.errors import (
    CorruptFileError,
    ShapeMismatchError,
    UncommittedCheckpointError,
)
from interop.files import hugging_face
from interop.sources.foreign import open_foreign
from interop.sources.run import looks_like_checkpoint, open_run, run_folder
from interop.sources.source import Options, Source


def open_source(path: str | Path, options: Options | None = None) -> Source:
    """Opens a run, one of its checkpoints, a folder, or a file.

    Raises:
      InteropError: it is none of these, or cannot be read; see docs/interop.md for the cases.
    """
    place, options = Path(path).expanduser(), options or Options()
    if not place.exists():
        run = Path("outputs/models") / path
        hint = f"; did you mean {run}?" if run.exists() else ""
        raise CorruptFileError(f"{path}: no such file or folder{hint}")
    found = run_folder(place)
    if found is not None:
        return open_run(*found, last=options.weights == "last", checkpoint=options.checkpoint)
    if looks_like_checkpoint(place):
        raise UncommittedCheckpointError(
            f"{place} is no finished checkpoint of a run; name the run's folder, or one of "
            "checkpoints/STEP in it"
        )
    return open_foreign(place, options)


def tokenizer_of(source: Source, given: str | Path | None) -> Tokenizer | None:
    """Returns the tokenizer to use: the one that is given, or the source's own; `none` for none.

    Raises:
      UsageError, CorruptFileError: the given one cannot be opened.
      ShapeMismatchError: it has more tokens than the model.
    """
    tokenizer = source.tokenizer
    if given is not None:
        try:
            folder = Path(given)
            tokenizer = None if str(given) == "none" else _open_tokenizer(folder)
        except CraftError as error:
            raise CorruptFileError(f"`tokenizer={given}`: {error}") from None
    if tokenizer and tokenizer.vocab_size > source.spec.vocab_size:
        raise ShapeMismatchError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the embedding of {source.path} "
            f"has {source.spec.vocab_size} rows; it is another model's; `tokenizer=none` leaves "
            "it out"
        )
    return tokenizer


def _open_tokenizer(place: Path) -> Tokenizer | None:
    run = run_folder(place)
    if run is not None:
        store = Checkpoints(outputs.open_run(run[0]).checkpoints)
        step = store.latest() if run[1] is None else run[1]
        file = store.tokenizer_file(step) if step is not None else None
        if file is None:
            raise CorruptFileError("the run has no tokenizer")
        return Tokenizer.load(file)
    if place.is_dir():
        found = hugging_face.read_tokenizer(place) or tokenizers.read_folder(place)
        if found is None:
            raise CorruptFileError("the folder has no tokenizer.json")
        return found
    if place.name == tokenizers.VOCAB or place.suffix == ".pkl":
        found = tokenizers.read_file(place)
        if found is None:
            raise CorruptFileError("there is no vocabulary in it")
        return found
    return Tokenizer.load(place)
