#!/usr/bin/env bash
# Installs into .venv and finetunes the embedded tiny-sd as a flow: a few minutes on two CPU cores, no download of weights.
# Usage: ./launch/quickstart.sh [WORKDIR] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --help ]]; then
  sed -n '2,3s/^# //p' launch/quickstart.sh
  exit 0
fi
workdir=quickstart
if [[ $# -gt 0 && $1 != --* ]]; then
  workdir=$1
  shift
fi
./launch/install.sh
exec .venv/bin/python -m d2f_jax.train --config=configs/quickstart.py --workdir="$workdir" "$@"
