#!/usr/bin/env bash
# Lint, format, types and all tests, on any machine.
#
#   bash launch/test.sh [pytest options]      for example -k plan, tests/test_plan.py, or -n 0 -s
#
# Two files of tests run side by side, as much of a test is waiting; -n 0 runs all in one process, -n 4 four.
set -euo pipefail
extra=dev
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"

ruff check .
ruff format --check .
mypy
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
