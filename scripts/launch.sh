#!/usr/bin/env bash
# torchrun with what a run needs: launch.sh PROCESSES COMMAND...
#   scripts/launch.sh 8 sft @ configs/sft_qwen.toml
# On one machine `sft @ configs/sft_qwen.toml --gpus 8` does the same. For several, start it on each with
# NODES, HEAD (host:port of one of them) and RUN_ID set alike, or let scripts/slurm.sh do it.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
processes=$1
shift
if [ "${NODES:-1}" -gt 1 ]; then
    meeting=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-lacuna}")
else
    meeting=(--standalone)
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise torchrun gives restarted processes the old ones' addresses
exec torchrun "${meeting[@]}" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 86400 -m lacuna "$@"
