#!/usr/bin/env bash
# Kills, damages and starves training runs, and prints what was tried, survived and lost:
#   bash scripts/faults.sh            everything, about 40 minutes on two cores
#   bash scripts/faults.sh --quick    what CI runs, in about a minute
#   bash scripts/faults.sh --only=A1,C1
# docs/reliability.md explains the rows.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck disable=SC1091
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
exec python -m tests.faults "$@"
