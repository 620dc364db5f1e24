#!/usr/bin/env bash
# All that CI checks: bash scripts/check.sh; with --soak also what takes minutes, an hour in all.
#
# Two lanes, each in a virtual environment of its own:
#   main    the newest Python that is found (3.13 or 3.12) and the newest JAX, without torch: every
#           test that needs no torch, and the tests of models again with the coming defaults of NNX
#   frozen  python3 and the README's test command: the tests that need torch, and those marked
#           `frozen`; then the README's main commands from an empty folder, and the fault tests
# Where no newer Python is found, the frozen lane runs every test. Each test run writes its profile
# to build/, the slowest test first.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
soak=""
[ "${1:-}" = "--soak" ] && soak=yes
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$root/build"

section() { printf '\n=== %s (%s s so far) ===\n' "$*" "$SECONDS"; }

# The README's commands, without the two words that make and enter the virtual environment.
readme_command() {
  sed -n 's/^    python3 -m venv .venv && . .venv\/bin\/activate && //p' "$root/README.md" | sed -n "$1p"
}

# The newest Python that JAX's newest release runs on, by name or from a version manager.
newest_python() {
  local versions candidate
  versions=$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")/versions
  for candidate in python3.13 "$versions"/3.13.*/bin/python python3.12 "$versions"/3.12.*/bin/python; do
    if candidate=$(command -v "$candidate") && "$candidate" -c 'import ensurepip' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
}

# Runs pytest with a profile in a file: profiled NAME ARGUMENTS.
profiled() {
  local profile="$root/build/test-durations-$1.txt"
  shift
  pytest --durations=0 --durations-min=0.05 "$@" | tee "$profile" | sed -u -E '/^[0-9.]+s (call|setup|teardown)/d'
  grep -E '^[0-9.]+s' "$profile" | head -5 || true
  printf 'the time of each test: %s\n' "$profile"
}

newest=$(newest_python)
if [ -n "$newest" ]; then
  section "main lane: $("$newest" --version), installed in the background"
  "$newest" -m venv "$scratch/main"
  "$scratch/main/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" \
    -e "$root[test]" >"$scratch/main.log" 2>&1 &
  main_install=$!
fi

section "frozen lane: $(python3 --version)"
python3 -m venv "$scratch/frozen"
# shellcheck disable=SC1091
. "$scratch/frozen/bin/activate"
cd "$root"
test_command=$(readme_command 2)
install=${test_command% && pytest}
[ "$install && pytest" = "$test_command" ] || { echo "README.md has no test command"; exit 1; }
printf '%s\n' "$install"
bash -euo pipefail -c "${install/pip install/pip install --quiet --disable-pip-version-check}"

section "style"
ruff format --check .
ruff check --output-format=concise .

if [ -n "$newest" ]; then
  wait "$main_install" || { cat "$scratch/main.log"; exit 1; }
  section "main lane: every test that needs no torch"
  (
    # shellcheck disable=SC1091
    . "$scratch/main/bin/activate"
    profiled main -m "not soak and not torch"
    section "main lane: the tests of models without NNX's graph mode"
    NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false pytest -m "not soak and not torch" tests/models
  )
  section "frozen lane: the tests that need torch"
  profiled frozen -m "not soak and (torch or frozen)"
else
  section "every test, since there is no newer Python"
  profiled frozen
fi

section "the README's main command, shortened, from an empty folder"
mkdir "$scratch/empty"
cd "$scratch/empty"
craft="python -m craft_jax.main"
interop="python -m interop"
$craft --config="$root/configs/gpt.py" --config.training.num_steps=60 \
  --config.training.eval_every=30 --config.training.sample_every=30
run=$(echo outputs/models/*)
$craft evaluate --run=latest
$craft generate --run=latest --prompt="def " --max_new_tokens=40
$craft --run=latest --config.training.num_steps=62
$interop export "$run" gpt2 --to hf
python gpt2/verify.py
$interop import gpt2 outputs/models/imported
$interop verify "$run" outputs/models/imported
find outputs -maxdepth 2 | sort

section "runs that are killed, damaged and starved"
if [ -z "$soak" ]; then
  bash "$root/scripts/faults.sh" --quick
else
  bash "$root/scripts/faults.sh"
  cd "$root"
  section "the tests that take minutes"
  profiled soak -m soak
fi
section "passed"
