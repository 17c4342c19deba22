#!/bin/bash
# Train on two machines of four GPUs each, over as many jobs as it takes. Submit from the project's root, with the
# environment that has PyTorch activated:
#
#     sbatch scripts/slurm.sh --tag baseline --data DATA
#
# The arguments are those of train.py. SLURM signals this script two minutes before the time limit; the script sends
# SIGTERM to every process, train.py finishes its step and saves, and the job is requeued. SLURM also requeues the job if
# a machine fails; torchrun restarts a process that dies, up to three times.

#SBATCH --job-name=landmarks
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log

stopped=
# scancel signals the steps of the job; srun itself must not get SIGTERM, it would kill them
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# otherwise restarted processes wait for the dead ones (PyTorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" train.py --resume "$@" &
step=$!
while :; do
    wait "$step" # the signal interrupts it
    status=$?
    kill -0 "$step" 2>/dev/null || break
done
if [ "$stopped" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
