#!/usr/bin/env bash
# Installs into .venv and measures the paper's claims on the embedded world, where they are not known yet: results/study.md.
# Usage: ./launch/study.sh [--only=adapt-] [--skip=cost] [--report] [--workdir=study] [--results=results]      hours on two CPU cores; goes on after a kill
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --help ]]; then
  sed -n '2,3s/^# //p' launch/study.sh
  exit 0
fi
./launch/install.sh study torch
exec .venv/bin/python -m launch.study "$@"
