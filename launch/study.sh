#!/usr/bin/env bash
# Installs into .venv and measures the paper's claims on the embedded world, where they are not known yet:
# results/study.md. Hours on two CPU cores; goes on after a kill.
# Usage: ./launch/study.sh [--only=adapt-] [--skip=cost] [--report] [--workdir=study] [--results=results]
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --help ]]; then
  sed -n '2,4s/^# //p' launch/study.sh
  exit 0
fi
./launch/install.sh study torch
exec .venv/bin/python -m launch.study "$@"
