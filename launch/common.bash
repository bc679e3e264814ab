# What tpu_vm.sh, xpk.sh and local_hosts.sh share and source.
# shellcheck shell=bash

die() {
  echo "error: $*" >&2
  exit 2
}

quoted() { # arguments as one line that a shell reads back as they are
  local argument line=""
  for argument in "$@"; do
    if [[ $argument =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+=" $argument"; else line+=" ${argument@Q}"; fi
  done
  echo "${line# }"
}
