"""python -m tests.faults [--quick] [--only=A1,B2] [--list]: runs the cases and prints a table."""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.cases import CASES, QUICK
from tests.faults.harness import Lab


def main() -> int:
    """Returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(prog="bash scripts/faults.sh", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the most important, with few trials")
    parser.add_argument("--only", help="names of cases, separated by commas")
    parser.add_argument("--keep", action="store_true", help="leave the runs where they are")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else sorted(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"{unknown[0]} is not one of {', '.join(sorted(CASES))}")
    if args.quick and not args.only:
        names = QUICK
    lost: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="craft_jax_faults_"))
    print(
        "| test | what was tried | tried | survived | lost | seconds |\n|---|---|---|---|---|---|"
    )
    begin, lab = time.monotonic(), Lab(folder, args.quick)
    for name in names:
        title, function = CASES[name]
        survived, failed, start = 0, 0, time.monotonic()
        try:
            for _ in function(lab):
                survived += 1
        except Exception as error:
            failed = 1
            lost.append(name)
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        took = time.monotonic() - start
        print(f"| {name} | {title} | {survived + failed} | {survived} | {failed} | {took:.0f} |",
              flush=True)  # fmt: skip
    print(f"\nlost: {', '.join(lost) or 'nothing'} ({time.monotonic() - begin:.0f} s in all)")
    if not (lost or args.keep):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"\nthe runs are below {folder}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
