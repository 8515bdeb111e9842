#!/usr/bin/env bash
# Finds mistakes on the login node, without GPUs and before anything waits in a queue: the configuration, whether it fits
# the number of GPUs, the prepared data, the run folder; and, where SLURM is, whether it would take the job: partition,
# account, time limit, nodes that have so many GPUs. Takes what sbatch would get, without the name of the script:
#
#   bash launch/check.sh --nodes=4 --gpus-per-node=8 [option of sbatch ...] configs/NAME.yaml [section.key=value ...]
#
# Options are written --name=value. GPUs of a node are those of --ntasks-per-node, --gpus-per-node, or FOXDIST_GPUS_PER_NODE
# (slurm/site.env), the first that is there. Exit status 0: nothing is wrong.
set -euo pipefail
extra=
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

nodes=1 tasks='' gpus='' options=()
while [[ $# -gt 0 && $1 == -* ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --ntasks-per-node=*) tasks=${1#*=} ;;
    --gpus-per-node=*) gpus=${1##*[=:]} ;; # also of a type: h100:8
    --*=* | --exclusive) ;;
    *) fail "$1: not understood; must be --name=value; write --nodes=4, not -N 4" ;;
  esac
  options+=("$1")
  shift
done
[ $# -gt 0 ] || fail "no configuration; must be a YAML file; bash $0 --nodes=N configs/NAME.yaml"
per_node=${tasks:-${gpus:-$(cd "$root" && source slurm/site.env && echo "$FOXDIST_GPUS_PER_NODE")}}
[[ $nodes =~ ^[1-9][0-9]*$ && $per_node =~ ^[1-9][0-9]*$ ]] ||
  fail "--nodes=$nodes, with $per_node GPUs each: must be whole numbers; correct them"

wrong=0
echo "$nodes nodes x $per_node = $((nodes * per_node)) ranks"
"$python" "$root/foxdist/train.py" --check --world "$((nodes * per_node))" --config "$@" || wrong=$?
if command -v sbatch >/dev/null; then
  # SLURM's own judgement; no job is made.
  sbatch --test-only "${options[@]}" "$root/slurm/pretrain.sbatch" "$@" || wrong=1
else
  echo "no sbatch here: SLURM was not asked"
fi
[ "$wrong" = 0 ] && echo "nothing is wrong"
exit "$wrong"
