#!/usr/bin/env bash
# Makes .venv beside setup.py and installs the project into it, with the extras given.
# Usage: ./launch/install.sh [EXTRA ...]      PYTHON=python3.12 ./launch/install.sh tpu
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --help ]]; then
  sed -n '2,3s/^# //p' launch/install.sh
  exit 0
fi
for extra in "$@"; do
  if [[ ! $extra =~ ^[a-z]+$ ]]; then
    echo "error: $extra is no extra; give some of cuda, tpu, depth, torch, study, wandb, test, or none" >&2
    exit 2
  fi
done
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $python is older than Python 3.11; name a newer one: PYTHON=python3.12 $0" >&2
  exit 2
fi
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
extras=$(IFS=,; echo "$*")
wanted="$(.venv/bin/python --version) [$extras] $(cksum setup.py)"
if [[ $(cat .venv/installed 2>/dev/null) == *"$wanted"* ]]; then
  exit 0 # nothing to install since last time
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
echo "$wanted" >>.venv/installed
