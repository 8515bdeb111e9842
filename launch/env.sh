# Sourced by the other scripts: makes .venv and installs foxdist into it, once.
#
# extra=...                  set by the script that sources this: an optional dependency group of pyproject.toml
# PYTHON=...                 which Python to use (3.11 or newer); default: the newest found
# PIP_EXTRA_INDEX_URL=...    on a machine without a GPU, https://download.pytorch.org/whl/cpu saves gigabytes

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=${extra:-} # not an argument: sourced without any, this file would see those of the script

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3 bash $0" >&2
  return 1
}

# Whatever changes what is installed changes the stamp's name.
stamp=$root/.venv/installed-${extra:-base}-$(sha256sum "$root/pyproject.toml" | cut -c1-16)
if [ ! -e "$stamp" ]; then
  python=$(find_python)
  [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
  echo "installing foxdist into $root/.venv (a few minutes, once)"
  "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extra:+[$extra]}"
  touch "$stamp"
fi
export PATH=$root/.venv/bin:$PATH
