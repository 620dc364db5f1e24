#!/usr/bin/env bash
# A job of SLURM that trains on several nodes and goes on after a preemption or a time limit:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh \
#       --config=configs/gpt.py:124m --run=first --config.data.path=/data/text
#
# One task for each GPU, as JAX expects it. The folder from which it is submitted is the checkout,
# on a disk that all nodes see; its .venv is used. --dry-run prints the command of each task.
# docs/clusters.md explains it.
#SBATCH --job-name=craft_jax
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=craft_jax_%j.log
# Two minutes before the end: time for a step and a checkpoint.
#SBATCH --signal=USR1@120
set -euo pipefail

dry=''
if [ "${1:-}" = --dry-run ]; then
  dry=echo
  shift
fi
run=''
for word in "$@"; do
  case $word in --run=*) run=${word#*=} ;; esac
done
if [ -z "$run" ] || [ "$run" = latest ]; then
  echo "slurm.sh: the training needs --run=NAME, by which a requeued job goes on" >&2
  exit 2
fi
python=${PYTHON:-.venv/bin/python}
code=0
$dry srun --kill-on-bad-exit=0 "$python" -m craft_jax.main --coordinator=auto "$@" || code=$?
# 75: it was asked to end, and has saved. 76, 134 and 137: a process or a node was lost.
case $code in
  75 | 76 | 134 | 137)
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
      echo "slurm.sh: requeued 100 times; this is the last" >&2
      exit "$code"
    fi
    $dry scontrol requeue "$SLURM_JOB_ID"
    ;;
  *) exit "$code" ;;
esac
