#!/usr/bin/env bash
# What a GPU is measured by, in under eight minutes, from a checkout that was never installed:
#
#     bash scripts/gpu_bench.sh [PATH/TO/nanoGPT] [out-folder]
#
# The tests of what runs only there, then the step of 124M parameters with a context of 1024 in
# bfloat16; beside nanoGPT with torch.compile where its checkout is given, else alone. It needs jax
# with CUDA, flax, optax and pytest, and for nanoGPT torch. Figures are JSON, below the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
nanogpt=${1:-}
out=${2:-outputs}
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false
mkdir -p "$out"

python -c 'import jax, sys; d = jax.devices()[0]; print(jax.__version__, d.device_kind); sys.exit(d.platform != "gpu")' || {
  echo "gpu_bench.sh: JAX sees no GPU here" >&2
  exit 2
}
python -m pytest -q -o addopts= tests/test_gpu.py

# The best batch of each is what counts: some sizes, and the largest tokens per second of each.
options=(--shape 124m --device=gpu --dtype=bfloat16 --rounds=4 --steps=5 "--workdir=$out")
for batch in 8 16 32; do
  if [ -n "$nanogpt" ]; then
    timeout 150 python scripts/compare_peers.py "--nanogpt=$nanogpt" --compile "${options[@]}" \
      --batches "$batch" || echo "batch $batch: failed"
  else
    timeout 100 python scripts/compare_peers.py --alone "${options[@]}" --batches "$batch" ||
      echo "batch $batch: failed"
  fi
done
