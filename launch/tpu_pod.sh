#!/usr/bin/env bash
# Distils on a TPU pod of Google Cloud: asks for spot TPUs, installs this checkout on every host, runs the command on all of them, and
# begins again with new TPUs when these are taken away (exit 75, or gone): the run goes on from its newest checkpoint. Start it on a
# machine that stays up; the TPUs are deleted when it ends, however it ends.
#
#   ZONE=us-west4-a TYPE=v5litepod-16 SHARE=10.0.0.2:/runs launch/tpu_pod.sh run.yaml output=/runs/small training.steps=2000
#
# SHARE is a folder of an NFS server (Filestore) that the TPUs' network reaches, mounted at /runs on every host: all hosts write one
# checkpoint, so output lies there, and so do text and models that are not on the Hub. The config is copied from here.
# Also: NAME (of the TPUs; a name that is taken is refused), RUNTIME (the TPUs' image), PROJECT.
set -euo pipefail

if [ "${ON_TPU_HOST:-}" != yes ]; then # on the machine that starts it
  : "${1:?give a config, then key=value}" "${ZONE:?as in us-west4-a}" "${TYPE:?as in v5litepod-16}" "${SHARE:?as in 10.0.0.2:/runs}"
  [ -f "$1" ] || { echo "error: $1: no such config" >&2; exit 2; }
  name=${NAME:-jaxdistill}
  wheel=$(mktemp -d)
  trap 'rm -rf "$wheel"' EXIT
  python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheel" "$(dirname "$0")/.."
  tpus() { gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --quiet; }
  state() { tpus queued-resources describe "$name" --format='value(state.state)'; }
  # printf %q: the hosts' shell reads every argument as it was given here.
  line=$(printf '%q ' env ON_TPU_HOST=yes "SHARE=$SHARE" bash "$(basename "$0")" "$(basename "$1")" "${@:2}")
  code=75
  while [ "$code" = 75 ]; do
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$TYPE" --spot \
      --runtime-version="${RUNTIME:-tpu-ubuntu2204-base}"
    trap 'rm -rf "$wheel"; tpus queued-resources delete "$name" --force' EXIT
    unanswered=0 # in a row
    until now=$(state); [[ $now =~ ^(ACTIVE|SUSPEND.*|FAILED)$ ]]; do
      unanswered=$((${#now} ? 0 : unanswered + 1))
      [ "$unanswered" -lt 20 ] || { echo "error: no TPUs: gcloud failed 20 times to say what became of $name" >&2; exit 1; }
      sleep "${POLL_SECONDS:-30}"
    done
    [ "$now" != FAILED ] || { echo "error: no TPUs: gcloud compute tpus queued-resources describe $name says why" >&2; exit 1; }
    code=0
    { tpus tpu-vm scp "$0" "$wheel"/*.whl "$1" "$name:" --worker=all && tpus tpu-vm ssh "$name" --worker=all --command="$line"; } || code=$?
    if [ "$code" != 0 ] && [ "$(state)" != ACTIVE ]; then code=75; fi # taken away before it could say so
    tpus queued-resources delete "$name" --force
    trap 'rm -rf "$wheel"' EXIT
  done
  exit "$code"
fi

# On every host of the pod, whose own Python may be older than 3.11
mountpoint --quiet /runs || { sudo apt-get install --quiet --yes nfs-common && sudo mkdir -p /runs && sudo mount -t nfs "$SHARE" /runs; }
python3 -m pip install --quiet --user uv
python3 -m uv tool install --quiet --python 3.12 --with 'jax[tpu]' ./jaxdistill-*.whl
PATH=$HOME/.local/bin:$PATH
jaxdistill distill "$@"
