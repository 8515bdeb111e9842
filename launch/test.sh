#!/usr/bin/env bash
# Lint, format, types and all tests, on any machine.
#
#   bash launch/test.sh [pytest options]      for example -k plan
set -euo pipefail
extra=dev
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
