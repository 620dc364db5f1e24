"""targets: lists the targets for a model, and the limits of each."""

import argparse
from typing import Any

from interop.commands import Result, add_models
from interop.commands.reading import add_reading, reading_options
from interop.mapping.spec import Spec
from interop.sources import opening
from interop.targets import registry
from interop.targets.base import Answer
from interop.targets.registry import TARGETS


def spec_of(model: Any) -> Spec:
    """Returns the spec of a path, or the spec itself."""
    return model if isinstance(model, Spec) else opening.open_source(model).spec


def targets_for(model: Any) -> list[Answer]:
    """Returns an answer for each target, the exact ones first.

    Args:
      model: a `ModelSpec`, or the path of a run or of any other source.
    """
    return registry.targets_for(spec_of(model))


def explain(model: Any, target: str) -> list[str]:
    """Returns the reasons against an exact export to a target; empty if it is exact.

    Args:
      model: a `ModelSpec`, or the path of a run or of any other source.
      target: its name.

    Raises:
      KeyError: there is no such target.
    """
    return list(TARGETS[target].answer(spec_of(model)).reasons)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_models(parser, "path")
    add_reading(parser)


def run(args: argparse.Namespace) -> Result:
    """Runs the command."""
    answers = targets_for(opening.open_source(args.path, reading_options(args)).spec)
    rows = [
        {
            "target": answer.target,
            "exact": answer.exact,
            "reasons": list(answer.reasons),
            "allow_approx": list(answer.approximations) if answer.is_possible else None,
        }
        for answer in answers
    ]
    lines = []
    for answer in answers:
        exact = "exact" if answer.exact else "not exact"
        lines.append(f"{answer.target:<18} {exact:<10} {TARGETS[answer.target].summary}")
        lines += [f"  {reason}" for reason in answer.reasons]
        if answer.approximations and answer.is_possible:
            lines.append(f"  --allow-approx={','.join(answer.approximations)} accepts that")
    return Result(rows, lines)
