"""generate: text from a run, streamed as it is made; of images, see `generate_images`."""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from craft_jax import outputs, runs
from craft_jax.data.tokenizers import TextStream
from craft_jax.errors import OK, DataError, UsageError
from craft_jax.generation import beam_search
from craft_jax.generation.prompts import PromptRows, encode_prompts
from craft_jax.generation.sampling import SamplingConfig
from craft_jax.runtime import compilation_cache

_TEMPERATURE = 0.8
_NEW_TOKENS = 200
_MAX_SAMPLES = 100_000
_ROWS = 256
"""Texts that are made at the same time; more would only take more memory."""

_UNSET = {
    "temperature": (None, 0.0),  # 0 also means the most likely text.
    "top_k": (None,),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "seed": (0,),
    "num_samples": (None, 1),
}
"""Flags of sampling, and the values that a search does not contradict."""

_OF_TEXT = {"prompt": None, "prompt_file": None, "max_new_tokens": None, "num_beams": 1,
            "length_penalty": 0.0}  # fmt: skip
_OF_IMAGES = ("label", "image", "num_steps", "solver", "guidance")


def run(args: argparse.Namespace) -> int:
    """Continues one or several prompts, or writes the targets of sources, `--num_samples` times.

    The text goes to standard output and to a file, everything else to standard error. Of a run of
    images, see `generate_images`.
    """
    workdir = Path(args.workdir).expanduser().absolute()
    _check_numbers(args)
    compilation_cache.enable_compilation_cache()
    opened = runs.open(
        args.run or "latest",
        workdir=workdir,
        overrides=args.overrides,
        tokenizer=args.tokenizer,
        last=args.weights == "last",
        checkpoint=args.checkpoint,
    )
    if opened.image_format is not None:
        _refuse(args, _OF_TEXT, "makes images")
        command = importlib.import_module("craft_jax.commands.generate_images")
        return command.run(args, opened, workdir)
    tokenizer = opened.need_tokenizer()
    _refuse(args, dict.fromkeys(_OF_IMAGES), "makes text")
    args.num_samples = args.num_samples or 1
    args.max_new_tokens = args.max_new_tokens or _NEW_TOKENS
    is_pair = opened.config.reads_pairs
    prompts = _prompts(args)
    if not prompts:
        if is_pair:
            raise UsageError("a model of pairs needs a source: give `prompt=TEXT`")
        prompts = [""]
    rows = encode_prompts(tokenizer, prompts, is_pair=is_pair)
    context = opened.model_def.config.max_seq_len
    sampling = _sampling(args, is_pair)
    sampling.check(tokenizer.vocab_size)
    rows, notes = _fit(rows, prompts, context, may_cut=args.num_beams == 1)
    _say(f"run {opened.paths.name}, step {opened.step}")
    for note in notes:
        _say(note)
    shown = [""] * len(prompts) if is_pair else prompts
    texts = [
        (prompt, tokenizer.stream(ids, prompt))
        for prompt, ids in zip(shown, rows.prompts, strict=True)
        for _ in range(args.num_samples)
    ]
    writer = _Writer(texts, has_headings=len(texts) > 1 and not is_pair)
    if args.num_beams > 1:
        made = _search(opened, rows, args, writer)
    else:
        made = _sample(opened, rows, args, sampling, writer)
    for new in made:
        writer.push(new)
    writer.finish()
    file = outputs.sample_file(workdir)
    outputs.write_text(file, writer.everything())
    _say(f"written to {file}")
    return OK


def _check_numbers(args: argparse.Namespace) -> None:
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UsageError(f"`max_new_tokens={args.max_new_tokens}` must be at least 1")
    if args.num_samples is not None and not 1 <= args.num_samples <= _MAX_SAMPLES:
        raise UsageError(
            f"`num_samples={args.num_samples}` must be at least 1 and at most {_MAX_SAMPLES}"
        )
    given = [name for name, unset in _UNSET.items() if getattr(args, name) not in unset]
    beam_search.check_beams(args.num_beams, args.length_penalty, given)


def _sampling(args: argparse.Namespace, is_pair: bool) -> SamplingConfig:
    options = {name: getattr(args, name) for name in ("top_p", "min_p", "repetition_penalty")}
    given = {name: value for name, value in options.items() if value is not None}
    return SamplingConfig(temperature=_temperature(args, is_pair), top_k=args.top_k, **given)


def _refuse(args: argparse.Namespace, unset: dict[str, Any], what: str) -> None:
    """Checks that no flag is given that means nothing to a run.

    Raises:
      UsageError: one is.
    """
    given = [f"`{name}`" for name, value in unset.items() if getattr(args, name) != value]
    if given:
        raise UsageError(f"the model of this run {what}; leave {', '.join(given)} out")


def _fit(
    rows: PromptRows, prompts: list[str], context: int, *, may_cut: bool
) -> tuple[PromptRows, list[str]]:
    """Cuts prompts to the last tokens that the context holds, and returns what to say of it.

    Raises:
      UsageError: a source is too long, of which every part counts, or a search has no room.
    """
    notes = []
    is_pair = rows.sources is not None
    word, tokens = ("source", "tokens and an end") if is_pair else ("prompt", "tokens")
    for prompt, ids in zip(prompts, rows.sources or rows.prompts, strict=True):
        if len(ids) <= context:
            continue
        found = f"the {word} {_short(prompt)!r} has {len(ids) - is_pair} {tokens}"
        if is_pair or not may_cut:
            raise UsageError(
                f"{found}, but the context of this model is {context} (model.max_seq_len); "
                "shorten it"
            )
        notes.append(f"{found}: going on from the last {context}, all that the context holds")
    return rows._replace(prompts=[ids[-context:] for ids in rows.prompts]), notes


def _sample(
    opened: runs.Run,
    rows: PromptRows,
    args: argparse.Namespace,
    sampling: SamplingConfig,
    writer: "_Writer",
) -> Iterator[list[list[int]]]:
    """Yields the new tokens of every sample, some at a time."""
    times = range(args.num_samples)
    context = opened.model_def.config.max_seq_len
    prompts = [row for row in rows.prompts for _ in times]
    sources = None if rows.sources is None else [row for row in rows.sources for _ in times]
    sample_index = [i for _ in rows.prompts for i in times]
    for first in range(0, len(prompts), _ROWS):
        part = slice(first, first + _ROWS)
        before, after = [[]] * first, [[]] * (len(prompts) - first - _ROWS)
        for new in opened.generator.stream(
            opened.compute_params,
            prompts[part],
            sources=None if sources is None else sources[part],
            max_new_tokens=args.max_new_tokens,
            config=sampling,
            seed=args.seed,
            sample_index=sample_index[part],
            on_refill=lambda kept: writer.note(
                f"[the context of {context} tokens is full: going on from the last {kept}]"
            ),
        ):
            yield [*before, *new, *after]


def _search(
    opened: runs.Run,
    rows: PromptRows,
    args: argparse.Namespace,
    writer: "_Writer",
) -> Iterator[list[list[int]]]:
    """Yields the best new tokens of every prompt, at once."""
    found = opened.generator.beam_search(
        opened.compute_params,
        rows.prompts,
        sources=rows.sources,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        length_penalty=args.length_penalty,
    )
    yield [new for new, _ in found]
    context = opened.model_def.config.max_seq_len
    if any(
        len(row) + len(new) > context for row, (new, _) in zip(rows.prompts, found, strict=True)
    ):
        writer.note(f"[the context of {context} tokens is full: a search ends there]")


def _temperature(args: argparse.Namespace, is_pair: bool) -> float:
    if args.temperature is not None:
        return args.temperature
    return 0.0 if is_pair else _TEMPERATURE


class _Writer:
    """Shows the first text while it grows, and the others, in order, when all are whole."""

    def __init__(self, rows: list[tuple[str, TextStream]], *, has_headings: bool):
        self._texts, self._streams = [prompt for prompt, _ in rows], [stream for _, stream in rows]
        self._has_headings = has_headings
        self._notes: set[str] = set()
        self._show(self._heading(0) + self._texts[0])

    def push(self, new: list[list[int]]) -> None:
        """Takes the new tokens of every row."""
        for i, tokens in enumerate(new):
            for token in tokens:
                self._add(i, self._streams[i].push(token))

    def note(self, text: str) -> None:
        """Says something once, on standard error."""
        if text not in self._notes:
            self._notes.add(text)
            _say(f"\n{text}")

    def finish(self) -> None:
        """Shows the rest."""
        for i, stream in enumerate(self._streams):
            self._add(i, stream.finish())
        self._show("\n")
        for i in range(1, len(self._texts)):
            self._show(f"{self._heading(i)}{self._texts[i]}\n")

    def everything(self) -> str:
        """Returns all texts, with headings if there are several."""
        return "".join(f"{self._heading(i)}{text}\n" for i, text in enumerate(self._texts))

    def _add(self, i: int, text: str) -> None:
        self._texts[i] += text
        if i == 0:
            self._show(text)

    def _heading(self, i: int) -> str:
        return f"--- {i + 1} of {len(self._texts)} ---\n" if self._has_headings else ""

    @staticmethod
    def _show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of `--prompt`, and each line of `--prompt_file`."""
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        lines = _read(args.prompt_file).splitlines()
        if not lines:
            raise UsageError(
                f"`prompt_file={args.prompt_file}` holds no line; give a prompt in each"
            )
        prompts += lines
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the prompt {_short(prompt)!a} is not valid UTF-8") from None
    return prompts


def _read(file: str) -> str:
    """Returns the text of a file, or of standard input.

    Raises:
      DataError: it cannot be read, or is not UTF-8.
    """
    try:
        if file == "-":
            return sys.stdin.read() if sys.stdin else ""
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"`prompt_file={file}` is not UTF-8 text: byte {error.object[error.start]:#04x} at "
            f"offset {error.start}; convert it to UTF-8 (iconv -f ... -t utf-8)"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"`prompt_file={file}` cannot be read: {why}") from None


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:37]}..."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
