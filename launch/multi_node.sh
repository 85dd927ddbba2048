#!/usr/bin/env bash
# Train on the nodes of a hostfile, over ssh: bash launch/multi_node.sh HOSTFILE RECIPE [--stage NAME] [key=value ...]
# Start it on one node, in the folder that all nodes share, with the environment active. Needs pdsh here and ssh without a
# password to every node. MASTER_PORT (default 29500) is free on the first node; MASTER_ADDR, if set, is its address.
# LOGS (default logs/DATE-TIME): a file a rank; rank 0's output is shown here too.
set -euo pipefail
if (($# < 2)); then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
hostfile=$1
shift
[[ -f $hostfile ]] || { echo "multi_node.sh: hostfile $hostfile not found; copy launch/hostfile.example" >&2; exit 2; }
for needed in deepspeed pdsh; do
  command -v "$needed" >/dev/null || { echo "multi_node.sh: $needed is not on the path" >&2; exit 2; }
done
here=$(cd "$(dirname "$0")" && pwd)
logs=${LOGS:-logs/$(date +%Y%m%d-%H%M%S)}
mkdir -p "$logs"

# ssh carries no environment: DeepSpeed puts the content of this file on the remote command line, where every user of the
# node can read it. So names of secrets are excluded.
DS_ENV_FILE=$(mktemp "${TMPDIR:-/tmp}/l2v-environment.XXXXXX")
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(NCCL|GLOO|TORCH|OMP|MKL|MALLOC|DS|DEEPSPEED|L2V|HF|TRANSFORMERS|TOKENIZERS|XDG|CUDA_HOME)[A-Z0-9_]*=' |
  grep -Ev '^[^=]*(TOKEN|KEY|SECRET|PASSWORD)[^=]*=' | grep -v '^DS_ENV_FILE=' >"$DS_ENV_FILE" || true

address=()
[[ -n ${MASTER_ADDR:-} ]] && address=(--master_addr "$MASTER_ADDR")
deepspeed --hostfile "$hostfile" "${address[@]}" --master_port "${MASTER_PORT:-29500}" --log_level error \
  --enable_each_rank_log "$logs" "$here/train.py" "$@" &
launcher=$!
# shellcheck disable=SC2317  # called by the trap
stop() { kill -TERM "$launcher" 2>/dev/null || true; }
trap stop INT TERM
(
  until compgen -G "$logs/*_rank0.log" >/dev/null; do
    kill -0 "$launcher" 2>/dev/null || exit 0
    sleep 1
  done
  exec tail --pid="$launcher" -n +1 -F "$logs"/*_rank0.log 2>/dev/null
) &
shown=$!
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait`, not the launcher
  status=0
  wait "$launcher" || status=$?
done
wait "$shown" || true
if ((status)); then
  echo "multi_node.sh: training ended with exit code $status; the last line of each rank (whole in $logs):" >&2
  for file in "$logs"/*_rank*.log; do
    [[ -f $file ]] && printf '%s: %s\n' "$(basename "$file" .log)" "$(tail -n 1 "$file" | tr '\r' '\n' | tail -n 1)" >&2
  done
fi
exit "$status"
