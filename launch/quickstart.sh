#!/usr/bin/env bash
# Trains a small Forgetting Transformer on this machine's CPU, over two context-parallel ranks, and says what pruning
# saved. Everything it needs is installed and prepared first; called again, it continues where it stands.
#
#   bash launch/quickstart.sh [section.key=value ...]      for example train.steps=300
set -euo pipefail
extra=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"

# Long, real text that every machine has: the sources of Python's own standard library.
library=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
python -m foxdist.data prepare "$library" --output data/quickstart --sequence-length 2048 \
  --exclude site-packages dist-packages __pycache__ test tests idlelib 'config-*'

export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu # the same run with and without a GPU
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# The command `deepspeed`, by its module: the script of that name cannot start from a path that holds a space.
python -m deepspeed.launcher.runner --quiet --num_accelerators 2 --master_port "$port" foxdist/train.py --config configs/quickstart.yaml "$@"

echo
python -m foxdist.report runs/quickstart
