#!/usr/bin/env bash
# Runs a program as several processes of this machine that find each other over loopback, as hosts of a cluster would.
set -euo pipefail

usage() {
  cat <<'END'
Usage: launch/local_hosts.sh N [option ...] [-- the program's argument ...]

Starts N processes of `python -m d2f_jax.train`, prefixes their output with [p0], [p1], ..., and ends when all have
ended. If one fails, the others are ended too, and the exit code is that of the first that failed. SIGINT and SIGTERM
are passed on to all, SIGUSR1 as SIGTERM; after that they save a checkpoint and end with exit code 75, and the same
command goes on.

  --devices=K    CPU devices of each process; needs JAX_PLATFORMS=cpu
  --port=PORT    of the coordinator; a free one if not given
  --grace=S      seconds between asking the processes to end and killing them; 60 if not given
  --module=NAME  the program, d2f_jax.train if not given
  --dry-run      print the commands, run none
  --help

PYTHON=... names the interpreter, .venv/bin/python if not given.

Example: JAX_PLATFORMS=cpu launch/local_hosts.sh 2 --devices=2 -- --config=configs/quickstart.py --workdir=/tmp/two
END
}

# shellcheck source=launch/common.bash disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

whole_number() {
  [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1=$2: give a whole number, 1 or more"
}

processes="" devices="" port="" grace=60 module=d2f_jax.train dry_run=""
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage && exit ;;
    --devices=*) devices=${1#*=} && whole_number --devices "$devices" ;;
    --port=*) port=${1#*=} && whole_number --port "$port" ;;
    --grace=*) grace=${1#*=} && whole_number --grace "$grace" ;;
    --module=*) module=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    -*) die "unknown option $1 (see --help); the program's arguments come after --" ;;
    *)
      [[ -z $processes ]] || die "unexpected argument $1 (see --help); the program's arguments come after --"
      processes=$1 && whole_number N "$processes"
      ;;
  esac
  shift
done
[[ $processes ]] || die "how many processes? Give N, as in: launch/local_hosts.sh 2 -- --config=FILE --workdir=DIR"
[[ -z $devices || ${JAX_PLATFORMS:-} == cpu ]] || die "--devices=$devices is for CPUs; set JAX_PLATFORMS=cpu with it"

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[[ $dry_run ]] || command -v "$python" >/dev/null || die "there is no $python; run ./launch/install.sh first"
if [[ -z $port ]]; then # one that nobody answers on
  port=$((20000 + RANDOM % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
fi

leash=() # Linux can have a process killed with its parent: nothing is left behind even if this script itself is killed
if command -v setpriv >/dev/null; then leash=(setpriv --pdeathsig=KILL --); fi
shared=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes")
if [[ $devices ]]; then
  shared+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
fi
if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    quoted "${leash[@]}" "${shared[@]}" "JAX_PROCESS_ID=$i" "$python" -m "$module" "$@"
  done
  exit
fi

pids=() codes=() readers=() asked="" deadline=""
scratch=$(mktemp -d)

# shellcheck disable=SC2329 # the trap calls it
finally() {
  local pid
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  rm -rf "$scratch"
}
trap finally EXIT

ask() { # all processes that still run, by a signal, to end within the grace
  local i
  for i in "${!pids[@]}"; do [[ ${codes[i]} ]] || kill "-$1" "${pids[i]}" 2>/dev/null || true; done
  asked=$1
  deadline=${deadline:-$((SECONDS + grace))}
}
trap 'ask INT' INT
trap 'ask TERM' TERM USR1

prefixed() {
  local line
  while IFS= read -r line || [[ $line ]]; do printf '[p%s] %s\n' "$1" "$line"; done
}

for ((i = 0; i < processes; i++)); do
  [[ -z $asked ]] || break
  mkfifo "$scratch/$i"
  set -m # each in a process group of its own: Ctrl-C comes by way of `ask`, and its own children can be killed with it
  prefixed "$i" <"$scratch/$i" &
  readers+=($!)
  "${leash[@]}" "${shared[@]}" "JAX_PROCESS_ID=$i" "$python" -m "$module" "$@" </dev/null >"$scratch/$i" 2>&1 &
  pids+=($!) codes+=("")
  set +m
done

first=0
while :; do
  running=0
  for i in "${!pids[@]}"; do
    [[ -z ${codes[i]} ]] || continue
    if kill -0 "${pids[i]}" 2>/dev/null; then
      running=$((running + 1))
      continue
    fi
    code=0
    wait "${pids[i]}" || code=$?
    codes[i]=$code
    kill -KILL -- "-${pids[i]}" 2>/dev/null || true # what it started and left
    if [[ $code -ne 0 && $first -eq 0 ]]; then
      first=$code
      echo "process $i ended with exit code $code" >&2
      # After 75 the others are about to end by themselves: they too have saved.
      if [[ $code -eq 75 ]]; then deadline=${deadline:-$((SECONDS + grace))}; else ask TERM; fi
    fi
  done
  [[ $running -gt 0 ]] || break
  if [[ $deadline && $SECONDS -ge $deadline ]]; then
    echo "$running of $processes processes did not end within $grace s: killed" >&2
    for i in "${!pids[@]}"; do [[ ${codes[i]} ]] || kill -KILL -- "-${pids[i]}" 2>/dev/null || true; done
    deadline=$((SECONDS + grace))
  fi
  sleep 0.1 || true # Ctrl-C interrupts it too
done
wait "${readers[@]}" || true
if [[ $first -eq 0 && ${#pids[@]} -lt $processes ]]; then first=1; fi # asked to end before all were started
exit "$first"
