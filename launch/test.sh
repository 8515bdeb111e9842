#!/usr/bin/env bash
# Lint, format, types and all tests, on any machine.
#
#   bash launch/test.sh [pytest options]      for example -k plan
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" dev
cd "$root"

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
