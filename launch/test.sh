#!/usr/bin/env bash
# Installs into .venv what the tests need, then passes lint, types and tests.
# Usage: ./launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --help ]]; then
  sed -n '2,3s/^# //p' launch/test.sh
  exit 0
fi
./launch/install.sh
# By its exact version; a PyTorch that is already in .venv stays (CONTRIBUTING.md tells how to get the small CPU build).
.venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet 'torch==2.13.0'
./launch/install.sh depth study test torch
# Without torchvision, which it asks for: a build of that fits one build of PyTorch (tests/fidelity.py does without).
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'torch-fidelity==0.4.0'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
