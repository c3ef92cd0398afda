#!/bin/bash
# One run over several nodes, by hand: sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh sft @ config.toml
# Options of sbatch go before the script's name; the environment with lacuna is active when you submit.
# Before the time limit the run is saved, requeued and resumed. `lacuna slurm` writes scripts like this one.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

stop='' child=''
pass_on() { stop=$1; [ -z "$child" ] || kill -s "$1" "$child" 2> /dev/null || true; }
trap 'pass_on USR1' USR1
trap 'stop=TERM' TERM # SLURM tells the step itself; srun would end it at once

MASTER_ADDR=${HEAD_NODE:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export MASTER_ADDR MASTER_PORT

# On each node one torchrun, with a process for each of its GPUs.
srun --mpi=none --cpu-bind=none --kill-on-bad-exit=0 --wait=300 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    python -m lacuna.launch.nodes "$@" &
child=$!
[ -z "$stop" ] || pass_on "$stop"
while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done # a signal ends a wait, not the run
code=0
wait "$child" || code=$?

if [ "$stop" = USR1 ] && [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    echo "stopped, and requeued as $SLURM_JOB_ID" >&2
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
