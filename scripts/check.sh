#!/usr/bin/env bash
# All that CI checks: bash scripts/check.sh
#
# In a new virtual environment: the README's test command, then the README's main command on a
# shortened config, from an empty folder, and the commands that follow it; the fault tests. Where
# python3.12 exists, the tests once more with the newest JAX and without torch.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

section() { printf '\n=== %s ===\n' "$*"; }

# The README's commands, without the two words that make and enter the virtual environment.
readme_command() {
  sed -n 's/^    python3 -m venv .venv && . .venv\/bin\/activate && //p' "$root/README.md" | sed -n "$1p"
}

section "virtual environment"
python3 -m venv "$scratch/venv"
# shellcheck disable=SC1091
. "$scratch/venv/bin/activate"
python --version

section "style"
cd "$root"
pip install --quiet --disable-pip-version-check -c constraints.txt ruff
ruff format --check .
ruff check --output-format=concise .

section "the README's test command"
test_command=$(readme_command 2)
printf '%s\n' "$test_command"
bash -euo pipefail -c "${test_command/pip install/pip install --quiet}"

section "the README's main command, shortened, from an empty folder"
mkdir "$scratch/empty"
cd "$scratch/empty"
craft="python -m craft_jax.main"
$craft --config="$root/configs/gpt.py" --config.training.num_steps=60 \
  --config.training.eval_every=30 --config.training.sample_every=30
$craft evaluate --run=latest
$craft generate --run=latest --prompt="def " --max_new_tokens=40
$craft --run=latest --config.training.num_steps=62
$craft visualize --run=latest
$craft runs
run=$(echo outputs/models/*)
interop="python -m interop"
$interop export "$run" gpt2 --to hf
python gpt2/verify.py
$interop verify "$run" gpt2 --level logits
$interop export "$run" torch --to craft-torch
python torch/verify.py
$interop export "$run" ckpt.pt --to nanogpt
$interop verify "$run" ckpt.pt
$interop import gpt2 outputs/models/imported
$craft generate --run=imported --prompt="def " --max_new_tokens=20
$craft --config="$root/configs/flow.py" --run=flow --config.training.num_steps=20
$craft generate --run=flow --label=3 --num_samples=4 --num_steps=5
$craft --config="$root/configs/image_gpt.py" --run=pixels --config.training.num_steps=20
$craft generate --run=pixels --image=val --num_samples=2
$craft evaluate --run=pixels
$interop export outputs/models/flow flow --to craft-torch --verify logits
python flow/verify.py
$interop import flow outputs/models/flow_back
$interop verify outputs/models/flow outputs/models/flow_back
find outputs -maxdepth 2 | sort

section "runs that are killed, damaged and starved"
bash "$root/scripts/faults.sh" --quick

# The other Python is looked for by name; a version manager may offer a name that does not run.
if python312=$(command -v python3.12) && "$python312" --version >/dev/null 2>&1; then
  section "Python 3.12 with the newest JAX, without torch"
  deactivate
  "$python312" -m venv "$scratch/venv312"
  # shellcheck disable=SC1091
  . "$scratch/venv312/bin/activate"
  cd "$root"
  pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
  pytest
fi
