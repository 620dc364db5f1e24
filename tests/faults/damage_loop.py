"""Damages the newest checkpoint of copies of a run in turn, and continues each, in one process.

python -m tests.faults.damage_loop FOLDER RUN KINDS [TRIALS]
"""

import contextlib
import io
import random
import sys
from pathlib import Path

from craft_jax.main import main
from tests.faults.harness import Lab, damage, files, need


def run(folder: str, base: str, kinds: str, trials: str | None = None) -> None:
    """Prints `survived` for each trial.

    Args:
      folder: of the lab.
      base: a run of 20 steps.
      kinds: see `damage`, separated by commas.
      trials: how many; None for each file once with each kind.
    """
    lab, rng = Lab(Path(folder), True), random.Random(1)
    newest = lab.run(base) / "checkpoints" / "20"
    names = [path.relative_to(newest) for path in files(newest)]
    plan = [(name, kind) for kind in kinds.split(",") for name in names]
    rng.shuffle(plan)
    if trials is not None:
        plan = (plan * (int(trials) // len(plan) + 1))[: int(trials)]
    for number, (path, kind) in enumerate(plan):
        name = lab.copy(base, f"{kinds.replace(',', '_')}_{number}")
        damage(lab.run(name) / "checkpoints" / "20" / path, kind, rng)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(lab.words(name, training__num_steps=20)[3:])
        what = f"{kind} {path}: {said.getvalue()}"
        need(code == 0, f"exit code {code}: {what}")
        need("checkpoint step 20 is damaged" in said.getvalue(), what)
        need("falling back to step 15" in said.getvalue(), what)
        lab.same(name, base)
        need((lab.store(name).folder / "20.corrupt").is_dir(), f"not set aside: {what}")
        lab.remove(name)
        print("survived", flush=True)


if __name__ == "__main__":
    run(*sys.argv[1:])
