#!/usr/bin/env bash
# Trains on the GPUs of several hosts without a scheduler. foxdist and its Python lie at the same place on all of them.
# Prints the command that it runs.
#
#   bash launch/multinode.sh --hostfile FILE [option ...] configs/NAME.yaml [section.key=value ...]
#       called once, on any host. A line of FILE is `HOST slots=GPUS`. Needs pdsh here, and ssh to the hosts without a
#       password. DeepSpeed's launcher.
#   bash launch/multinode.sh --torchrun --nodes N --head HOST [option ...] configs/NAME.yaml [section.key=value ...]
#       called on each of N hosts, in any order; they meet at HOST, one of them. torchrun's launcher; needs no ssh.
#
#   --head HOST  with --hostfile: an address of its first host; default: the first that `hostname -I` says there
#   --port N     where ranks meet; default: 29500. Two jobs that share a host need two
#   --ranks N    processes on this host; default: one for each GPU (only with --torchrun; the hostfile says it else)
#   --dry-run    only prints the command
#
# SIGUSR1, SIGTERM, SIGINT (Ctrl-C) and, as SIGTERM, SIGHUP (a dropped ssh) to this script go to the ranks: but for SIGINT
# all of them end after the step in flight, saved; with --torchrun it is enough to tell one host. The exit status is the
# ranks' (see foxdist/train.py).
set -euo pipefail
extra=
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"

hostfile='' torchrun='' nodes='' head='' port=29500 ranks=gpu dry=''
while [[ $# -gt 0 && $1 == -* ]]; do
  case $1 in
    --hostfile) hostfile=${2:?--hostfile needs a file} && shift ;;
    --torchrun) torchrun=1 ;;
    --nodes) nodes=${2:?--nodes needs a number} && shift ;;
    --head) head=${2:?--head needs a host} && shift ;;
    --port) port=${2:?--port needs a number} && shift ;;
    --ranks) ranks=${2:?--ranks needs a number} && shift ;;
    --dry-run) dry=1 ;;
    *) fail "$1: unknown option; see the head of $0" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "no configuration; must be a YAML file; bash $0 ... configs/NAME.yaml"

if [ -n "$torchrun" ]; then
  if [ -z "$nodes" ] || [ -z "$head" ]; then fail "--torchrun: which hosts? must come with --nodes N and --head HOST"; fi
  [ -z "$hostfile" ] || fail "--hostfile, --torchrun: exclude each other; give one of them"
  command=("$python" "$root/launch/torchrun.py" --nnodes "$nodes" --nproc_per_node "$ranks" --rdzv_backend c10d
    --rdzv_endpoint "$head:$port" --rdzv_id "foxdist-$port" "$root/foxdist/train.py" --config "$@")
else
  [ -n "$hostfile" ] || fail "no hosts; must be --hostfile FILE, or --torchrun on each of them"
  [ -f "$hostfile" ] || fail "--hostfile $hostfile: no such file; must have a line \`HOST slots=GPUS\` for each host"
  [ "$ranks" = gpu ] || fail "--ranks $ranks: the hostfile says how many; must be left out; change its slots"
  mapfile -t hosts < <(sed -n 's/^[[:space:]]*\([^#[:space:]]\+\).*/\1/p' "$hostfile")
  command=("$python" -m deepspeed.launcher.runner --quiet --hostfile "$hostfile" --force_multi --master_port "$port"
    ${head:+--master_addr "$head"}
    "$root/foxdist/train.py" --config "$@")

  # To the ranks of this job on all hosts, which their port tells from others.
  tell_ranks() {
    local host
    for host in "${hosts[@]}"; do
      # shellcheck disable=SC2016,SC2029 # some values are put in there, others here
      ssh "$host" 'for rank in $(pgrep --full foxdist/train.py); do' \
        "if grep --quiet --null-data '^MASTER_PORT=$port\$' /proc/\$rank/environ; then kill -s $1 \$rank; fi; done" || true
    done
  }
fi
show "${command[@]}"
[ -n "$dry" ] || run_ranks "${command[@]}"
