# Sourced by launchers of training: shows a command, runs it, and hands signals on to the ranks that it starts.
#
# deepspeed and torchrun do not do so themselves: they drop SIGUSR1, and at SIGTERM or SIGINT give ranks 30 seconds until
# they kill them, which may be too few to save. So the launcher gets a session of its own, out of reach of Ctrl-C, and
# only the ranks are told. They agree among themselves: it is enough that one of them hears.

fail() {
  echo "error: $*" >&2
  exit 2
}

# Leaves $root, and $python: FOXDIST_PYTHON, a Python that has foxdist; default: that of .venv, which env.sh makes.
if [ -n "${FOXDIST_PYTHON:-}" ]; then
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
else
  source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
fi
python=${FOXDIST_PYTHON:-python} # after env.sh, to which it is the one that makes .venv

free_port() {
  "$python" -c 'from foxdist.ports import free_port; print(free_port())'
}

# show COMMAND...: as one could type it.
show() {
  printf '%q ' "$@"
  echo
}

# ranks_below PID: the ranks that a launcher started, directly or not. Only they have RANK in the environment that they
# began with, and so have their children, which are left out.
ranks_below() {
  local child
  for child in $(ps --no-headers --ppid "$1" -o pid); do
    if grep --quiet --null-data '^RANK=' "/proc/$child/environ" 2>/dev/null; then
      echo "$child"
    else
      ranks_below "$child"
    fi
  done
}

# tell_ranks NAME: the signal NAME to the ranks of $launcher. A script that starts ranks elsewhere defines its own.
tell_ranks() {
  local pids
  mapfile -t pids < <(ranks_below "$launcher")
  if [ ${#pids[@]} -gt 0 ]; then
    kill -s "$1" "${pids[@]}" || true # one may have ended
  else
    kill -s TERM "$launcher" || true
    echo "SIG$1 before there were ranks: ending" >&2 || true # the terminal may have gone
  fi
}

# run_ranks COMMAND...: the command until it ends, with its exit status.
run_ranks() {
  local status name
  unset RANK # of whoever called this, for ranks_below
  setsid "$@" &
  launcher=$!
  for name in USR1 TERM INT HUP; do
    # A terminal that has gone (SIGHUP) is no reason to lose steps: to the ranks it is a SIGTERM.
    # shellcheck disable=SC2064 # the name is known now
    trap "heard=1; tell_ranks ${name/HUP/TERM}" "$name"
  done
  while :; do # a signal ends `wait`, and not the launcher
    heard='' status=0
    wait "$launcher" || status=$?
    [ -n "$heard" ] || break
  done
  trap - USR1 TERM INT HUP
  return "$status"
}
