#!/usr/bin/env bash
# Runs programs on Cloud TPU VMs, one host or many: creates them, installs this checkout, starts, follows and resumes the run.
set -euo pipefail

usage() {
  cat <<'END'
Usage: launch/tpu_vm.sh COMMAND NAME --zone=ZONE [option ...] [-- the program's argument ...]

Commands
  up       create, install, run and tail: from nothing to a run, in one command
  watch    create where that is still to do, install and run where nothing runs, and again whenever the TPU is preempted
           or the run is to go on (exit code 75); ends with its exit code at 0 and 2, with 1 after --retries others
  create   the TPU VM, or with --queued the request for one, and waits until it is granted
  install  copy this checkout (setup.py pyproject.toml d2f_jax configs launch) to all workers and install it there
  run      start the program on all workers, detached; it writes d2f_jax.log in the home folder
  tail     follow the log until the run ends; ends with its exit code
  status   state of the TPU, and of the run on each worker
  delete   the TPU VM, or with --queued the request and the TPU VM

Options
  --zone=ZONE        where, such as us-east5-b
  --project=PROJECT  gcloud's own project if not given
  --type=TYPE        v4-32, v5litepod-16 (v5e), v5p-64, v6e-16, ...; for create, up and watch
  --version=VERSION  TPU software version; the one for JAX on TYPE if not given
  --spot             cheaper, and may be preempted: use watch
  --queued           by a queued resource
  --module=NAME      the program, d2f_jax.train if not given: d2f_jax.prepare, d2f_jax.reflow, d2f_jax.evaluate
  --extras=NAMES     of setup.py beside tpu, such as depth,wandb; for install, up and watch
  --env=NAME[=VALUE] of the run's environment, such as WANDB_API_KEY or HF_TOKEN; without =VALUE from this shell's. Once
                     for each; it is copied to a file that only the user can read, and never printed
  --bucket=BUCKET    mounted at /mnt/gcs on all workers, for install, up and watch; put the workdir there. A bucket with
                     hierarchical namespace: in others gcsfuse cannot rename the folders of finished checkpoints
  --worker=N|all     whose log to tail; 0 if not given
  --interval=S       seconds between two looks at a TPU or run that is waited for; 60 if not given
  --retries=N        how often watch starts again after a failure; 3 if not given
  --dry-run          print the commands, run none; of watch, those for a run that is never preempted
  --help

Example: launch/tpu_vm.sh up pod --zone=us-east5-b --type=v6e-16 --bucket=my-bucket -- \
           --config=configs/quickstart.py --workdir=/mnt/gcs/run1
END
}

# shellcheck source=launch/common.bash disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

note() {
  echo "$(date +%H:%M:%S) $name: $*" >&2
}

# On a TPU VM, called over ssh by the commands below: `host install BUCKET EXTRA ...`, `host run MODULE ARGUMENT ...`,
# `host tail`, `host status`. A run's environment comes in d2f_jax.env. The run leaves d2f_jax.log, d2f_jax.pid and, when
# it has ended, d2f_jax.exit in the home folder.
host() {
  local root code=0
  root=$(cd "$(dirname "$0")/.." && pwd)
  case $1 in
    install)
      # The images have Python 3.10; uv brings a newer one without apt, which is often locked on a new VM.
      if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python3 -m pip install --quiet --user uv
        ~/.local/bin/uv python install --quiet 3.12
        PYTHON=$(~/.local/bin/uv python find 3.12)
        export PYTHON
      fi
      "$root/launch/install.sh" tpu "${@:3}"
      [[ -z $2 ]] || mounted "$2"
      ;;
    run)
      if [[ $(host status) == "run: running" ]]; then
        echo "error: the run of before still runs here" >&2
        return 1
      fi
      rm -f ~/d2f_jax.exit
      nohup setsid "$0" host attend "${@:2}" >>~/d2f_jax.log 2>&1 </dev/null &
      echo $! >~/d2f_jax.pid
      ;;
    attend)
      # shellcheck disable=SC1090
      if [[ -e ~/d2f_jax.env ]]; then source ~/d2f_jax.env; fi
      cd "$root"
      .venv/bin/python -m "$2" "${@:3}" || code=$?
      echo "$code" >~/d2f_jax.exit
      ;;
    tail)
      [[ -s ~/d2f_jax.pid ]] || die "nothing was started here yet"
      tail -n 100 --pid="$(<~/d2f_jax.pid)" -F ~/d2f_jax.log
      return "$(cat ~/d2f_jax.exit || echo 1)"
      ;;
    status)
      if [[ -s ~/d2f_jax.exit ]]; then
        echo "run: exited $(<~/d2f_jax.exit)"
      elif [[ -s ~/d2f_jax.pid ]] && kill -0 "$(<~/d2f_jax.pid)" 2>/dev/null; then
        echo "run: running"
      else
        echo "run: none" # never started, or gone with a reboot
      fi
      ;;
  esac
}

mounted() { # the bucket, at /mnt/gcs
  local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  if ! command -v gcsfuse >/dev/null; then
    curl -fsS "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=600 -qq install gcsfuse
  fi
  if ! mountpoint -q /mnt/gcs; then
    sudo mkdir -p /mnt/gcs
    sudo chown "$USER" /mnt/gcs
    gcsfuse "$1" /mnt/gcs
  fi
}

exec 3>&1 # the user's screen, where stdout is an answer that is read

run() { # a command, or its line in a dry run; says which one failed
  local code=0
  if [[ $dry_run ]]; then
    quoted "$@" >&3
  else
    "$@" || code=$?
    [[ $code -eq 0 ]] || echo "error: exit code $code of: $(quoted "$@")" >&2
  fi
  return "$code"
}

command=${1:-}
case $command in
  --help) usage && exit ;;
  host)
    host "${@:2}"
    exit
    ;;
  up | watch | create | install | run | tail | status | delete) shift ;;
  *) die "unknown command '$command'; use up, watch, create, install, run, tail, status or delete (see --help)" ;;
esac
name="" zone="" project="" type="" version="" spot="" queued="" bucket="" worker=0 interval=60 retries=3 dry_run=""
module=d2f_jax.train extra="" env_names=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage && exit ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --bucket=*) bucket=${1#*=} && bucket=${bucket#gs://} ;;
    --module=*) module=${1#*=} ;;
    --extras=*) extra=${1#*=} ;;
    --env=*) given_environment "${1#*=}" ;;
    --worker=*) worker=${1#*=} ;;
    --interval=*) interval=${1#*=} ;;
    --retries=*) retries=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    -*) die "unknown option $1 (see --help); the program's arguments come after --" ;;
    *)
      [[ -z $name ]] || die "unexpected argument $1 (see --help); the program's arguments come after --"
      name=$1
      ;;
  esac
  shift
done

[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] || die "NAME='$name': give a name of lower-case letters, digits and -"
[[ $zone ]] || die "--zone=ZONE is needed, such as --zone=us-east5-b"
[[ $worker =~ ^([0-9]+|all)$ ]] || die "--worker=$worker: give the number of a worker, or all"
[[ $interval =~ ^[0-9]+$ ]] || die "--interval=$interval: give whole seconds"
[[ $retries =~ ^[0-9]+$ ]] || die "--retries=$retries: give a whole number"
a_module "$module"
extra=$(extras "$extra")
[[ $bucket =~ ^([a-z0-9][-_.a-z0-9]*)?$ ]] || die "--bucket=$bucket: give the bucket's name only, such as my-bucket"
case $command in
  up | watch | create)
    [[ $type ]] || die "--type=TYPE is needed to $command, such as --type=v6e-16"
    if [[ -z $version ]]; then
      case $type in
        v6e-*) version=v2-alpha-tpuv6e ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
        *) die "--type=$type: no TPU software version is known for it; give --version=VERSION" ;;
      esac
    fi
    ;;
esac
case $command in
  up | watch | run)
    [[ $# -gt 0 ]] || die "the program's arguments are missing; add: -- --config=FILE --workdir=DIR"
    if [[ $bucket && ! " $*" =~ \ --(workdir|out)=/mnt/gcs/ ]]; then
      die "with --bucket what is written belongs on it; write --workdir=/mnt/gcs/NAME, or --out="
    fi
    ;;
  *) [[ $# -eq 0 ]] || die "$command takes no arguments of a program; leave out: $(quoted "$@")" ;;
esac

target=("$name" --zone="$zone" --quiet)
[[ -z $project ]] || target+=(--project="$project")
capacity=()
[[ -z $spot ]] || capacity+=(--spot)
# What may be done with the bucket is then up to the service account's roles.
[[ -z $bucket ]] || capacity+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
vm=(gcloud compute tpus tpu-vm)
request=(gcloud compute tpus queued-resources)
on_host="d2f_jax/launch/tpu_vm.sh host"
package=${XDG_CACHE_HOME:-$HOME/.cache}/d2f_jax/$name.tar.gz environment=${package%.tar.gz}.env

create() {
  if [[ $queued ]]; then
    run "${request[@]}" create "${target[@]}" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$version" "${capacity[@]}" || return
    granted
  else
    run "${vm[@]}" create "${target[@]}" --accelerator-type="$type" --version="$version" "${capacity[@]}" || return
  fi
  assumed=READY
}

granted() { # waits for the queued resource
  local now
  while :; do
    now=$(state READY) || return
    case $now in
      READY) return ;;
      LOST | MISSING)
        note "the request was not granted; see: $(quoted "${request[@]}" describe "${target[@]}")"
        return 1
        ;;
    esac
    note "waiting for capacity"
    sleep "$interval"
  done
}

delete() {
  if [[ $queued ]]; then
    run "${request[@]}" delete "${target[@]}" --force
  else
    run "${vm[@]}" delete "${target[@]}"
  fi
}

# READY, LOST (to be deleted and created again), MISSING, or WAITING for all in between. $1: what a dry run assumes.
state() {
  local granted=READY now
  if [[ $queued ]]; then
    granted=$(described "$1" "${request[@]}" describe "${target[@]}" --format="value(state.state)") || return
  fi
  if [[ $granted == READY ]]; then
    now=$(described "$1" "${vm[@]}" describe "${target[@]}" --format="value(state)") || return
    [[ $queued && $now == MISSING ]] && now=LOST # the request stands in the way of a new one
    granted=$now
  fi
  echo "$granted"
}

described() {
  local answer errors
  if [[ $dry_run ]]; then
    run "${@:2}"
    echo "$1"
    return
  fi
  errors=$(mktemp)
  if answer=$("${@:2}" 2>"$errors"); then
    case $answer in
      READY | ACTIVE) echo READY ;;
      PREEMPTED | TERMINATED | STOPPED | UNKNOWN | SUSPENDED | FAILED) echo LOST ;;
      *) echo WAITING ;;
    esac
  elif grep -qi "not_found\|not found" "$errors"; then
    echo MISSING
  else
    echo "error: $(<"$errors")" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

on_workers() { # $1: which, $2: a command for their shell
  run "${vm[@]}" ssh "${target[@]}" --worker="$1" --command="$2"
}

install() {
  run mkdir -p "$(dirname "$package")" &&
    run tar -czf "$package" -C "$(dirname "$0")/.." --exclude=__pycache__ \
      setup.py pyproject.toml d2f_jax configs launch &&
    run "${vm[@]}" scp "$package" "$name:d2f_jax.tar.gz" "${target[@]:1}" --worker=all &&
    on_workers all "mkdir -p d2f_jax && tar -xzf d2f_jax.tar.gz -C d2f_jax && $on_host install '$bucket'${extra:+ $extra}"
}

start() {
  local code=0
  if [[ ${#env_names[@]} -gt 0 ]]; then # by a file, for arguments are to be seen in lists of processes
    run mkdir -p "$(dirname "$environment")" &&
      run bash -c 'umask 077 && declare -p "${@:2}" >"$1"' bash "$environment" "${env_names[@]}" &&
      run "${vm[@]}" scp "$environment" "$name:d2f_jax.env" "${target[@]:1}" --worker=all || code=$?
    run rm -f "$environment"
    [[ $code -eq 0 ]] || return "$code"
  fi
  on_workers all "$on_host run $module $(quoted "$@")"
}

tail_log() {
  on_workers "$worker" "$on_host tail"
}

progress() { # one line of `host status` for each worker
  on_workers all "$on_host status || echo 'run: none'"
}

outcome() { # of all workers: running, none, or the exit code that counts
  local answer codes
  answer=$(progress) || return
  [[ -z $dry_run ]] || answer="run: exited 0"
  codes=$(sed -n 's/^run: exited \([0-9]*\).*/\1/p' <<<"$answer" | sort -nu)
  if grep -q '^run: running' <<<"$answer"; then
    echo running
  elif grep -q '^2$' <<<"$codes"; then
    echo 2
  elif grep -q '^run: none' <<<"$answer"; then
    echo none
  else # other failures count more than 75, and that more than 0
    { grep -v '^0$\|^75$' <<<"$codes" || tail -n 1 <<<"$codes"; } | tail -n 1
  fi
}

begin() { # installed each time, for a host that was restarted has lost its mount
  install && start "$@" && begun=1
}

watch() {
  local now result begun="" failures=0
  while :; do
    # What fails here (no capacity, a host that is just going away, no network) is tried again after the interval.
    now=$(state "$assumed") || now=WAITING
    case $now in
      READY)
        result=$(outcome) || result=unknown
        # What ended before this watch was another's: the run starts, or goes on, whatever became of that.
        [[ $begun || $result == running || $result == unknown ]] || result=none
        case $result in
          unknown) ;;
          running) begun=1 ;;
          0 | 2)
            note "the run ended with exit code $result"
            return "$result"
            ;;
          75 | none)
            note "starting the run, from its newest checkpoint"
            begin "$@" || true
            ;;
          *)
            failures=$((failures + 1))
            if [[ $failures -gt $retries ]]; then
              note "failed with exit code $result, $failures times; see: launch/tpu_vm.sh tail $name --zone=$zone"
              return 1
            fi
            note "failed with exit code $result: starting again ($failures of $retries)"
            begin "$@" || true
            ;;
        esac
        ;;
      LOST)
        note "preempted: creating it again"
        delete && create && begin "$@" || true
        ;;
      WAITING) ;;
      MISSING) create && begin "$@" || true ;;
    esac
    [[ $dry_run ]] || sleep "$interval"
  done
}

assumed=MISSING # by a dry run of watch
case $command in
  up)
    create
    install
    start "$@"
    tail_log
    ;;
  watch) watch "$@" ;;
  create) create ;;
  install) install ;;
  run) start "$@" ;;
  tail) tail_log ;;
  status)
    run "${vm[@]}" describe "${target[@]}" --format="value(state)"
    progress
    ;;
  delete) delete ;;
esac
