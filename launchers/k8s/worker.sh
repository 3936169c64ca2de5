#!/usr/bin/env bash
# One pod is one machine of the run: starts its ranks, hands them the preemption's warning, ends with their status.
# Environment: NUM_NODES, GPUS_PER_NODE, MASTER_ADDR, OUT, JOB_COMPLETION_INDEX. Arguments: those of launchers/pretrain.py.
set -euo pipefail

hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
for ((node = 0; node < NUM_NODES; node++)); do
    echo "node-$node slots=$GPUS_PER_NODE" # only counted: without ssh nobody looks the names up
done >"$hostfile"

deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$JOB_COMPLETION_INDEX" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
    launchers/pretrain.py --out "$OUT" "$@" &
launcher=$!

# The kubelet's SIGTERM is for this script alone. The ranks get it (children of the launcher's child), not the launcher:
# that would kill them after 30 s, whatever they are saving. Waiting goes on until they have ended by themselves.
# shellcheck disable=SC2329 # the trap invokes it
warn() {
    local child ranks=()
    # `read` is false where no newline follows, and none does.
    read -r child <"/proc/$launcher/task/$launcher/children" || true
    [ -z "$child" ] || read -ra ranks <"/proc/$child/task/$child/children" || true
    kill -TERM "${ranks[@]:-$launcher}"
}
trap warn TERM
status=0
while kill -0 "$launcher" 2>/dev/null; do
    status=0
    wait "$launcher" || status=$?
done

# The launcher can end with 0 where one of its processes died of a signal; exit.json is the truth.
if [ "$status" = 0 ] && ! grep -q '"outcome": "finished"' "$OUT/exit.json"; then
    status=1
fi
exit "$status"
