#!/usr/bin/env bash
# Trains on all GPUs of this machine, through DeepSpeed's launcher. Prints the command that it runs.
#
#   bash launch/local.sh [--ranks N] [--dry-run] configs/NAME.yaml [section.key=value ...]
#
#   --ranks N    on so many GPUs; without GPUs, so many processes on CPUs
#   --dry-run    only prints the command
#
# SIGUSR1, SIGTERM, SIGINT (Ctrl-C) and, as SIGTERM, SIGHUP (a dropped ssh) go to the ranks: but for SIGINT they end
# after the step in flight, saved. The exit status is the ranks' (see foxdist/train.py).
set -euo pipefail
extra=
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

ranks='' dry=''
while [[ $# -gt 0 && $1 == -* ]]; do
  case $1 in
    --ranks) ranks=${2:?--ranks needs a number} && shift ;;
    --dry-run) dry=1 ;;
    *) fail "$1: unknown option; must be --ranks N or --dry-run; see the head of $0" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "no configuration; must be a YAML file; bash $0 configs/NAME.yaml"

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then
  [ -n "$ranks" ] || fail "no GPU found; must be told how many processes train on CPUs; add --ranks N"
  export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu # what DeepSpeed finds else is not what torch finds
fi
# The command `deepspeed`, by its module: the script of that name cannot start from a path that holds a space.
command=("$python" -m deepspeed.launcher.runner --quiet ${ranks:+--num_accelerators "$ranks"}
  --master_port "$(free_port)" "$root/foxdist/train.py" --config "$@")
show "${command[@]}"
[ -n "$dry" ] || run_ranks "${command[@]}"
