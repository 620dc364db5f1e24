"""Records the losses that tests/test_golden.py compares with: python scripts/update_golden.py."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.test_golden import CASES, FILE, first_losses


def main() -> None:
    """Writes tests/golden/first_steps.json."""
    losses = {case: first_losses(**options) for case, options in CASES.items()}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")
    print(FILE.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
