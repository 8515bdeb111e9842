# Sourced by batch scripts: how many ranks the allocation has room for, where they meet, and the srun that starts them.
# All numbers are SLURM's. Leaves $world, $python, MASTER_ADDR, MASTER_PORT, and the functions `fail` and `start_ranks`.

fail() {
  echo "error: $*" >&2
  exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "SLURM_JOB_ID: not set; must be a job of SLURM; call this with sbatch"
# shellcheck source=site.env
source slurm/site.env
read -ra python <<<"$FOXDIST_WRAP $FOXDIST_PYTHON"
"${python[@]}" -c '' || fail "FOXDIST_PYTHON=$FOXDIST_PYTHON, FOXDIST_WRAP=$FOXDIST_WRAP: does not run; must be a Python" \
  "that has foxdist; correct slurm/site.env, or run launch/quickstart.sh once, which makes .venv"
# Programs of its packages, such as ninja, which compiles extensions.
if [[ $FOXDIST_PYTHON == */* ]]; then PATH=$(dirname "$FOXDIST_PYTHON"):$PATH; fi

gpus=${SLURM_GPUS_ON_NODE:-0} # of this node; the others are taken to have as many
per_node=${SLURM_NTASKS_PER_NODE:-$gpus}
[ "$per_node" -gt 0 ] || fail "SLURM_GPUS_ON_NODE: no GPUs in this job; must be one for each rank; add" \
  "--gpus-per-node=N to sbatch, or --ntasks-per-node=N for ranks on CPUs"
world=$((SLURM_JOB_NUM_NODES * per_node))
cpus=$((SLURM_CPUS_ON_NODE / per_node))

# Rank 0 runs on this node, the first. Its name may not resolve on the others; SLURM itself reaches it by NodeAddr.
if [ -n "$FOXDIST_INTERFACE" ]; then
  MASTER_ADDR=$(ip -4 -o address show dev "$FOXDIST_INTERFACE" | sed -n '1s/.* inet \([0-9.]*\).*/\1/p')
  [ -n "$MASTER_ADDR" ] || fail "FOXDIST_INTERFACE=$FOXDIST_INTERFACE: has no IPv4 address on $SLURMD_NODENAME; must" \
    "have one on every node; correct slurm/site.env (ip -4 -o address shows them)"
else
  MASTER_ADDR=$(scontrol show node "$SLURMD_NODENAME" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
fi
# Jobs that share a node meet at different ports, and a job that found one taken at another the next time; all of them
# below those that the system gives to anyone who asks.
MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 10000))
export MASTER_ADDR MASTER_PORT

# start_ranks LOGS ARGUMENT...: `python ARGUMENT...` on every rank, with a log each. Every rank sees all GPUs of its node
# and takes its own, as ranks that read each other's memory must. Consecutive ranks share a node: they share sequences.
# When one ends, the others have a minute: long enough to say what they know of it.
start_ranks() {
  local logs=$1 options=()
  shift
  if [ "$gpus" -gt 0 ]; then options+=(--gpus-per-node="$gpus" --gpu-bind=none); fi
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$world" --ntasks-per-node="$per_node" --distribution=block \
    --cpus-per-task="$((cpus > 0 ? cpus : 1))" --kill-on-bad-exit=0 --wait=60 --open-mode=append "${options[@]}" \
    --output="$logs/rank_%5t.log" "${python[@]}" "$@"
}
