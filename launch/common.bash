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

a_module() {
  [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$ ]] ||
    die "--module=$1: give a program's name, such as d2f_jax.evaluate"
}

extras() { # depth,wandb as the words that install.sh takes
  [[ $1 =~ ^([a-z]+(,[a-z]+)*)?$ ]] || die "--extras=$1: give names of setup.py, such as depth,wandb"
  echo "${1//,/ }"
}

given_environment() { # NAME or NAME=VALUE: the variable is in this script's environment then; only its name is told
  local variable=${1%%=*}
  [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--env=$variable: give the name of a variable, or NAME=VALUE"
  if [[ $1 == *=* ]]; then export "$variable=${1#*=}"; fi
  [[ -v $variable ]] || die "--env=$variable: it has no value here; export it, or write --env=$variable=VALUE"
  export "${variable?}"
  env_names+=("$variable")
}
