#!/usr/bin/env bash
# Trains on a Cloud TPU VM, of one host or of many, from this checkout:
#
#   bash scripts/tpu_vm.sh create  --name=mine --zone=us-east5-a --type=v5litepod-16 [--spot]
#   bash scripts/tpu_vm.sh install --name=mine --zone=us-east5-a
#   bash scripts/tpu_vm.sh run     --name=mine --zone=us-east5-a [--bucket=gs://b/runs] -- \
#       --config=configs/gpt.py:124m --run=first --config.data.path=/data/text
#   bash scripts/tpu_vm.sh tail    --name=mine --zone=us-east5-a
#   bash scripts/tpu_vm.sh stop    --name=mine --zone=us-east5-a
#   bash scripts/tpu_vm.sh resume  --name=mine --zone=us-east5-a --bucket=gs://b/runs -- --run=first
#   bash scripts/tpu_vm.sh delete  --name=mine --zone=us-east5-a
#
# --dry-run prints the commands instead of running them. --version=, --project= and --python= have
# defaults. It needs `gcloud`, logged in. docs/tpu-vms.md explains the steps.
set -euo pipefail

usage() { sed -n '2,/^set -/p' "$0" | sed '$d; s/^# \{0,1\}//'; }

die() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

name='' zone='' type='' project='' bucket='' spot='' dry='' version='v2-alpha-tpuv5-lite' python='python3'
[ $# -gt 0 ] || { usage; exit 2; }
action=$1
shift
train=()
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --spot) spot=yes ;;
    --dry-run) dry=yes ;;
    --help | -h) usage; exit 0 ;;
    --) shift; train=("$@"); break ;;
    *) die "$1 is no flag of it; what is for the training stands behind --" ;;
  esac
  shift
done
case $action in
  create | install | run | resume | tail | stop | delete) ;;
  --help | -h) usage; exit 0 ;;
  *) die "$action is none of create, install, run, tail, stop, resume, delete" ;;
esac
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name=$name: a name of small letters, digits and -"
[ -n "$zone" ] || die "--zone is missing, such as --zone=us-east5-a"
[[ -z $bucket || $bucket == gs://?* ]] || die "--bucket=$bucket is not gs://BUCKET/FOLDER"

# The words of a command as they can be typed.
shown() {
  local out='' word flag
  for word in "$@"; do
    flag=''
    if [[ $word =~ ^(--[a-z-]+=)(.*)$ ]]; then
      flag=${BASH_REMATCH[1]} word=${BASH_REMATCH[2]}
    fi
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]*$ ]] || word=${word@Q}
    out+="$flag$word "
  done
  printf '%s\n' "${out% }"
}

execute() { if [ -n "$dry" ]; then shown "$@"; else "$@"; fi; }

tpu() {
  local verb=$1
  shift
  execute gcloud compute tpus tpu-vm "$verb" "$name" --zone="$zone" ${project:+--project="$project"} "$@"
}

# on WORKER COMMAND: what a shell of that host, or of `all`, does.
on() { tpu ssh --worker="$1" --command="$2"; }

launch() {
  local run=''
  for word in ${train[@]+"${train[@]}"}; do
    case $word in --run=*) run=${word#*=} ;; esac
  done
  [ -n "$run" ] || die "the training needs --run=NAME, by which it is resumed: $action ... -- --run=NAME"
  [[ $run =~ ^[A-Za-z0-9_][A-Za-z0-9_.+=-]*$ ]] || die "--run=$run is no name of a run"
  # A spot VM loses its disk with its life. Manifests make a half-copied checkpoint no checkpoint.
  if [ -n "$bucket" ] && [ "$action" = resume ]; then
    on 0 "mkdir -p craft_jax/outputs && gcloud storage rsync -r ${bucket%/}/outputs craft_jax/outputs"
  fi
  local start=".venv/bin/python -m craft_jax.launch -- .venv/bin/python -m craft_jax.main"
  start+=" --coordinator=auto $(shown "${train[@]}")"
  on all "cd craft_jax && { setsid nohup $start > train.log 2>&1 & echo \$! > train.pid; }"
  if [ -n "$bucket" ]; then
    local copy="gcloud storage rsync -r --delete-unmatched-destination-objects outputs ${bucket%/}/outputs"
    on 0 "cd craft_jax && { setsid nohup bash -c 'while kill -0 \$(cat train.pid); do sleep 300; $copy; done; $copy' > copy.log 2>&1 & }"
  fi
}

case $action in
  create)
    [ -n "$type" ] || die "--type is missing, such as --type=v5litepod-16"
    tpu create --accelerator-type="$type" --version="$version" ${spot:+--spot}
    ;;
  install)
    root=$(cd "$(dirname "$0")/.." && pwd)
    archive=$(mktemp -u --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    execute git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    execute gcloud compute tpus tpu-vm scp "$archive" "$name:craft_jax.tar.gz" --zone="$zone" \
      ${project:+--project="$project"} --worker=all
    on all "mkdir -p craft_jax && tar -xzf craft_jax.tar.gz -C craft_jax && cd craft_jax && $python -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
    on all "cd craft_jax && .venv/bin/python -c 'import jax; jax.distributed.initialize(); print(jax.device_count(), \"devices\")'"
    ;;
  run | resume) launch ;;
  tail) on 0 "tail -n 100 -F craft_jax/train.log" ;;
  stop)
    # The launcher passes it on: the run saves, and ends with 75.
    on all "kill -TERM \$(cat craft_jax/train.pid)"
    ;;
  delete) tpu delete --quiet ;;
esac
