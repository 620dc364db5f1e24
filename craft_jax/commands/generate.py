"""generate: text from a run, streamed as it is made."""

import argparse
import sys
from pathlib import Path

from craft_jax import outputs, runs
from craft_jax.data.text import read_text
from craft_jax.data.tokenizers import TextStream
from craft_jax.errors import OK, UsageError
from craft_jax.generation import SamplingConfig


def run(args: argparse.Namespace) -> int:
    """Continues one or several prompts, each `--num_samples` times.

    The text goes to standard output and to a file, everything else to standard error.
    """
    workdir = Path(args.workdir).expanduser().absolute()
    sampling = SamplingConfig(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    if args.max_new_tokens < 1 or args.num_samples < 1:
        raise UsageError("--max_new_tokens and --num_samples must be at least 1")
    opened = runs.open(
        args.run or "latest",
        workdir=workdir,
        overrides=args.overrides,
        tokenizer=args.tokenizer,
    )
    tokenizer = opened.need_tokenizer()
    prompts = _prompts(args)
    context = opened.model_def.config.max_seq_len
    ids = [runs.prompt_ids(tokenizer, prompt) for prompt in prompts]
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > context:
            raise UsageError(
                f"the prompt {_short(prompt)!r} has {len(row)} tokens, but the context of this "
                f"model is {context} (model.max_seq_len); shorten it"
            )
    sampling.check(tokenizer.vocab_size)
    _say(f"run {opened.paths.name}, step {opened.step}")
    writer = _Writer(
        [prompt for prompt in prompts for _ in range(args.num_samples)],
        [tokenizer.stream() for _ in prompts for _ in range(args.num_samples)],
    )
    stream = opened.generator.stream(
        opened.compute_params,
        [row for row in ids for _ in range(args.num_samples)],
        max_new_tokens=args.max_new_tokens,
        config=sampling,
        seed=args.seed,
        sample_index=[i for _ in prompts for i in range(args.num_samples)],
        on_refill=lambda kept: writer.note(
            f"[the context of {context} tokens is full: going on from the last {kept}]"
        ),
    )
    for new in stream:
        writer.push(new)
    writer.finish()
    file = outputs.sample_file(workdir)
    outputs.write_text(file, writer.everything())
    _say(f"written to {file}")
    return OK


class _Writer:
    """Shows the first text while it grows, and the others, in order, when all are whole."""

    def __init__(self, prompts: list[str], streams: list[TextStream]):
        self._texts, self._streams = list(prompts), streams
        self._is_alone = len(prompts) == 1
        self._notes: set[str] = set()
        self._show(self._heading(0) + prompts[0])

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
        return "" if self._is_alone else f"--- {i + 1} of {len(self._texts)} ---\n"

    @staticmethod
    def _show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of `--prompt`, and each line of `--prompt_file`; one empty prompt without any."""
    prompts = list(args.prompt or [])
    if args.prompt_file == "-":
        prompts += sys.stdin.read().splitlines() if sys.stdin else []
    elif args.prompt_file:
        prompts += read_text(Path(args.prompt_file)).splitlines()
    if args.prompt_file and not prompts:
        raise UsageError(f"--prompt_file={args.prompt_file} holds no line; give a prompt in each")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the prompt {_short(prompt)!a} is not valid UTF-8") from None
    return prompts or [""]


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:37]}..."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
