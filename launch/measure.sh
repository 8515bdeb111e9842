#!/usr/bin/env bash
# Measures attention and training on the GPUs of this host: README's tables of several GPUs, made anew. Prints each
# command before it runs it; the table, JSON and picture that a command leaves lie in a folder of their own, and are
# written row by row, so that what ends early leaves what it had.
#
#   bash launch/measure.sh PART ... [--gpus N] [--output DIR] [--dry-run]
#
#   attention     on 1, 2, 4, ... N GPUs: strong and weak scaling, pages through memory, zigzag
#   ways          on 1 and N GPUs: both layouts, all ways pages can move
#   graphs        on 1, 2, 4, ... N GPUs: the same as CUDA graphs, for which no host decides; the two shorter lengths
#   dense         on 1, 2, 4, ... N GPUs: strong scaling with nothing pruned
#   training      FoX (Pro) 760M on every dp x cp of N GPUs (of eight with cp 2 or more), with ZeRO-1 and ZeRO-3, all on
#                 the same tokens; on one or two GPUs also 125M, and both with nothing pruned
#   longest       the longest sequence that trains on N GPUs: FoX (Pro) 125M, 360M, 760M
#   faults        training on ranks of which one is killed, sleeps or plans otherwise, and that goes on with fewer
#
#   --gpus N      a power of two; default: as many as there are
#   --output DIR  default: bench/N-gpus
#   --dry-run     only prints the commands
#
# The exit status is not 0 if any command fails; those after it run all the same.
set -euo pipefail
extra=dev # for pytest
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"
cd "$root"

parts=() gpus='' output='' dry='' status=0
while [ $# -gt 0 ]; do
  case $1 in
    attention | ways | graphs | dense | training | longest | faults) parts+=("$1") ;;
    --gpus) gpus=${2:?--gpus needs a number} && shift ;;
    --output) output=${2:?--output needs a folder} && shift ;;
    --dry-run) dry=1 ;;
    *) fail "$1: unknown; must be attention, ways, graphs, dense, training, longest, faults or an option; see the head of $0" ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || fail "nothing to measure; must be attention, ways, graphs, dense, training, longest or faults; name some"
gpus=${gpus:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
[ "$gpus" != 0 ] || fail "no GPU found; must be there; see README for what can be measured on CPUs"
sizes=()
for ((size = 1; size <= gpus; size *= 2)); do sizes+=("$size"); done
[ "${sizes[-1]:-}" = "$gpus" ] || fail "--gpus $gpus: no power of two; must be one; use ${sizes[-1]:-1}"
output=${output:-bench/$gpus-gpus}

run() {
  show "$@"
  if [ -z "$dry" ]; then "$@" || status=$?; fi
}

bench() { # bench FOLDER COMMAND OPTION...
  local folder=$output/$1
  shift
  run "$python" -m foxdist.bench "$@" --output "$folder"
}

# Lengths at which so many GPUs are worth having.
case $gpus in
  1 | 2) lengths=(65536 131072) weak=(32768) trained=(65536) ;;
  4) lengths=(65536 131072 262144) weak=(32768) trained=(131072 262144) ;;
  *) lengths=(131072 262144 1048576) weak=(32768 131072) trained=(262144 1048576) ;;
esac
models=(760m) acp=(on) checkpointing=on
if [ "$gpus" -lt 4 ]; then
  models=(125m 760m) acp=(on off) checkpointing=off
fi

# One or two sets of inputs and a tenth of a second for each: a quarter of the default's time, or less.
repeats=$((gpus > 4 ? 1 : 2))
spread=(context-parallel --shapes "16x64,8x128" --repeats "$repeats" --seconds 0.1 --patience 300)

attention() {
  bench attention "${spread[@]}" --ranks "${sizes[@]}" --lengths "${lengths[@]}" --weak "${weak[@]}" --layouts zigzag \
    --transports peer
}

ways() { # of the longest sequences they say little
  bench ways "${spread[@]}" --ranks 1 "$gpus" --lengths "${lengths[@]:0:2}" --transports nccl peer
}

graphs() {
  bench graphs "${spread[@]}" --ranks "${sizes[@]}" --lengths "${lengths[@]:0:2}" --layouts zigzag --schedules auto \
    --transports peer --graphs
}

dense() {
  bench dense "${spread[@]}" --ranks "${sizes[@]}" --lengths "${lengths[@]:0:2}" --layouts zigzag --schedules auto \
    --transports peer --no-acp
}

training() { # ZeRO-3 prepares in its first two steps what the others go by
  local length model steps least cp
  for length in "${trained[@]}"; do
    steps=$((length > 200000 ? 1 : 3)) # of tens of seconds each
    # Eight GPUs share a sequence by twos at least, and of the longest, which else does not fit, by fours. A step makes as
    # few tokens as all these meshes can.
    least=1
    if [ "$gpus" -gt 4 ]; then least=$((length > 1000000 ? 4 : 2)); fi
    cp=()
    for size in "${sizes[@]}"; do
      if [ "$size" -ge "$least" ]; then cp+=("$size"); fi
    done
    for model in "${models[@]}"; do
      bench "training-$model-$length" train --models "fox_pro_$model" --lengths "$length" --cp "${cp[@]}" \
        --ranks "$gpus" --zero 1 3 --acp "${acp[@]}" --checkpointing "$checkpointing" --compile on --warmup 2 \
        --steps "$steps" --patience 300 "train.tokens_per_step=$((length * gpus / least))"
    done
  done
}

longest() {
  bench longest train --longest --models fox_pro_125m fox_pro_360m fox_pro_760m --cp "$gpus" --acp on \
    --checkpointing off on offload --compile on --up-to 2097152 --patience 900 # a step may take minutes
}

faults() {
  run "$python" -m pytest -p no:cacheprovider -n 0 tests/test_gpu.py -k "lost_rank or two_ranks_go_on"
}

for part in "${parts[@]}"; do
  case $part in
    attention) attention ;;
    ways) ways ;;
    graphs) graphs ;;
    dense) dense ;;
    training) training ;;
    longest) longest ;;
    faults) faults ;;
  esac
done
exit "$status"
