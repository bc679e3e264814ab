#!/usr/bin/env bash
# Runs programs on TPU slices of a GKE cluster: submits to XPK, or with --kubectl applies launch/gke_jobset.yaml.
set -euo pipefail

usage() {
  cat <<'END'
Usage: launch/xpk.sh NAME --topology=TPU:SHAPE (--cluster=CLUSTER | --kubectl) [option ...] -- the program's argument ...

Submits a run that is started again after preemption (exit code 75) and goes on from its newest checkpoint.

  --topology=T         slice: v4:2x2x4, v5e:4x8, v5p:2x2x2, v6e:4x4
  --slices=N           of that shape; 1 if not given
  --image=IMAGE        built from launch/Dockerfile. XPK without it adds this checkout to --base-image and installs it
                       when the run starts
  --module=NAME        the program, d2f_jax.train if not given: d2f_jax.prepare, d2f_jax.reflow, d2f_jax.evaluate
  --env=NAME[=VALUE]   of the run's environment, such as WANDB_API_KEY or HF_TOKEN; without =VALUE from this shell's. Once
                       for each; never printed. With kubectl it becomes the Secret NAME-env of the cluster
  --max-restarts=N     after other failures: 3 if not given. XPK counts preemptions too, and does not restart after exit
                       code 1: there 100 if not given

With XPK
  --cluster=CLUSTER    made by `xpk cluster create`
  --zone=ZONE, --project=PROJECT   gcloud's own if not given
  --storage=STORAGE    made by `xpk storage attach`, where the workdir is
  --base-image=IMAGE   with Python 3.11 or newer; python:3.12-slim if not given
  --extras=NAMES       of setup.py beside tpu, such as depth,wandb. They are in an IMAGE that was built with
                       --build-arg EXTRA=tpu,depth,wandb

With kubectl, in its current context
  --kubectl            needs JobSet 0.10 in the cluster, --image and --bucket
  --bucket=BUCKET      mounted at /mnt/gcs; put the workdir there. A bucket with hierarchical namespace: in others
                       gcsfuse cannot rename the folders of finished checkpoints
  --service-account=A  of Kubernetes, that may write to the bucket; default if not given
  --namespace=N        the context's if not given
  --chips-per-host=N   4 if not given, and 1 for 1x1
  --manifest           print the filled JobSet, apply nothing

  --dry-run            print the commands, run none
  --help

Example: launch/xpk.sh run1 --topology=v6e:4x4 --kubectl --image=IMAGE --bucket=my-bucket -- \
           --config=configs/quickstart.py --workdir=/mnt/gcs/run1
END
}

# shellcheck source=launch/common.bash disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/common.bash"

run() { # a command, or its line in a dry run; says which one failed
  local code=0
  if [[ $dry_run ]]; then
    quoted "$@"
  else
    "$@" || code=$?
    [[ $code -eq 0 ]] || echo "error: exit code $code of: $(quoted "$@")" >&2
  fi
  return "$code"
}

name="" topology="" slices=1 image="" max_restarts="" cluster="" zone="" project="" storage="" kubectl="" bucket=""
base_image=python:3.12-slim service_account=default namespace="" chips_per_host="" manifest="" dry_run=""
module=d2f_jax.train extra="" env_names=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help) usage && exit ;;
    --topology=*) topology=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --module=*) module=${1#*=} ;;
    --extras=*) extra=${1#*=} ;;
    --env=*) given_environment "${1#*=}" ;;
    --storage=*) storage=${1#*=} ;;
    --base-image=*) base_image=${1#*=} ;;
    --kubectl) kubectl=1 ;;
    --bucket=*) bucket=${1#*=} && bucket=${bucket#gs://} ;;
    --service-account=*) service_account=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --chips-per-host=*) chips_per_host=${1#*=} ;;
    --manifest) manifest=1 ;;
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

# Kubernetes allows 63 letters, of which the names of the pods that JobSet makes need some.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "NAME='$name': give up to 40 lower-case letters, digits and -"
[[ $topology =~ ^(v4|v5e|v5p|v6e):([1-9][0-9]*(x[1-9][0-9]*){1,2})$ ]] ||
  die "--topology=$topology: give the TPU and the shape of a slice, such as v6e:4x4 or v5p:2x2x2"
tpu=${BASH_REMATCH[1]} shape=${BASH_REMATCH[2]}
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: give a whole number, 1 or more"
max_restarts=${max_restarts:-$([[ $kubectl ]] && echo 3 || echo 100)}
[[ $max_restarts =~ ^[0-9]+$ ]] || die "--max-restarts=$max_restarts: give a whole number"
[[ $cluster || $kubectl ]] || die "--cluster=CLUSTER (XPK) or --kubectl is needed"
[[ -z $cluster || -z $kubectl ]] || die "--cluster is for XPK, --kubectl uses its current context; give one of them"
[[ $image =~ ^([a-z0-9][-A-Za-z0-9._/:@]*)?$ ]] || die "--image=$image: give it as gcr.io/PROJECT/d2f:1"
[[ $service_account =~ ^[a-z0-9][-.a-z0-9]*$ ]] || die "--service-account=$service_account: give a name in Kubernetes"
a_module "$module"
extra=$(extras "$extra")
[[ -z $extra || -z $image ]] || die "--extras=$extra: they belong into the image; build it with --build-arg EXTRA=tpu,..."
[[ $# -gt 0 ]] || die "the program's arguments are missing; add: -- --config=FILE --workdir=DIR"
chips=$((${shape//x/*}))
chips_per_host=${chips_per_host:-$((chips == 1 ? 1 : 4))}
[[ $chips_per_host =~ ^[1-9]$ ]] || die "--chips-per-host=$chips_per_host: give a whole number, 1 to 9"
((chips % chips_per_host == 0)) ||
  die "$chips chips of $topology do not divide over hosts of $chips_per_host; give another --chips-per-host"
case $tpu in
  v4) accelerator=tpu-v4-podslice xpk_name=v4 ;;
  v5e) accelerator=tpu-v5-lite-podslice xpk_name=v5litepod ;;
  v5p) accelerator=tpu-v5p-slice xpk_name=v5p ;;
  v6e) accelerator=tpu-v6e-slice xpk_name=v6e ;;
esac
if [[ $kubectl ]]; then
  [[ -z $manifest || ${#env_names[@]} -eq 0 ]] ||
    die "--env is a Secret, which --manifest does not print; leave out one of them"
  [[ $image ]] || die "--kubectl needs --image=IMAGE, built from launch/Dockerfile"
  [[ $bucket =~ ^[a-z0-9][-_.a-z0-9]*$ ]] || die "--kubectl needs --bucket=BUCKET, a bucket's name only; not '$bucket'"
  [[ " $*" =~ \ --(workdir|out)=/mnt/gcs/ ]] ||
    die "what is written belongs on the bucket; write --workdir=/mnt/gcs/NAME, or --out="
fi

filled() { # the template, every ${VARIABLE} of it replaced
  NAME=$name SLICES=$slices MAX_RESTARTS=$max_restarts IMAGE=$image BUCKET=$bucket SERVICE_ACCOUNT=$service_account \
    MODULE=$module ACCELERATOR=$accelerator TOPOLOGY=$shape HOSTS=$((chips / chips_per_host)) CHIPS_PER_HOST=$chips_per_host \
    python3 - "$(dirname "$0")/gke_jobset.yaml" "$@" <<'END'
import json, os, string, sys

template, *arguments = sys.argv[1:]
# JSON is YAML; Kubernetes would put variables in place of $(NAME), and takes $$ for $.
values = os.environ | {"ARGS": json.dumps([argument.replace("$", "$$") for argument in arguments])}
lines = [line for line in open(template) if not line.startswith("#")]
print(string.Template("".join(lines)).substitute(values), end="")
END
}

secret() { # of the variables given, as JSON, which is YAML
  python3 - "$name-env" "${env_names[@]}" <<'END'
import json, os, sys

name, *variables = sys.argv[1:]
data = {variable: os.environ[variable] for variable in variables}
print(json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}))
END
}

with_kubectl() {
  local jobset command=(kubectl apply --filename=-)
  [[ -z $namespace ]] || command+=(--namespace="$namespace")
  jobset=$(filled "$@")
  if [[ $manifest ]]; then
    echo "$jobset"
    return
  fi
  [[ ${#env_names[@]} -eq 0 ]] || run "${command[@]}" <<<"$(secret)"
  run "${command[@]}" <<<"$jobset"
  local first=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
  echo "its log, from the first host: kubectl logs --follow --container=train --selector=$first" >&2
}

with_xpk() {
  local stage=${XDG_CACHE_HOME:-$HOME/.cache}/d2f_jax/$name part
  local arguments command=(xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$xpk_name-$shape"
    --num-slices="$slices" --max-restarts="$max_restarts" --restart-on-exit-codes=75
    --termination-grace-period-seconds=300)
  [[ -z $zone ]] || command+=(--zone="$zone")
  [[ -z $project ]] || command+=(--project="$project")
  [[ -z $storage ]] || command+=(--storage="$storage")
  if [[ ${#env_names[@]} -gt 0 ]]; then # a file of names, whose values XPK takes from its own environment
    run mkdir -p "$(dirname "$stage")"
    run bash -c 'printf "%s\n" "${@:2}" >"$1"' bash "$stage.env" "${env_names[@]}"
    command+=(--env-file="$stage.env")
  fi
  # XPK runs the command in a shell that does not pass SIGTERM on: exec puts the program in its place. On the way there
  # Kubernetes would put variables in place of $(NAME), and takes $$ for $.
  arguments=$(quoted "$@")
  arguments=${arguments//\$/\$\$}
  if [[ $image ]]; then
    run "${command[@]}" --docker-image="$image" --command="exec python -m $module $arguments"
  else
    run rm -rf "$stage"
    run mkdir -p "$stage"
    for part in setup.py pyproject.toml d2f_jax configs launch; do run cp -R "$(dirname "$0")/../$part" "$stage"; done
    run "${command[@]}" --base-docker-image="$base_image" --script-dir="$stage" \
      --command="./launch/install.sh tpu${extra:+ $extra} && exec .venv/bin/python -m $module $arguments"
  fi
}

if [[ $kubectl ]]; then with_kubectl "$@"; else with_xpk "$@"; fi
