#!/bin/bash
# Train on two machines of four GPUs each, however often the scheduler ends the job. In the folder of this file, with
# the environment that has PyTorch activated:
#
#     sbatch slurm.sh --tag baseline --data DATA
#
# The arguments are train.py's. Two minutes before the time limit SLURM signals this script. It has SIGTERM sent to every
# process, train.py finishes its step and saves, and the job goes back into the queue. A machine that fails brings the
# job back by itself; a process that dies is started again by torchrun, up to three times.

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
# scancel signals the job's steps; srun itself must not get SIGTERM, it would kill them
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# without this, processes that are started again look for the dead ones (PyTorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" train.py --resume "$@" &
step=$!
while :; do
    wait "$step" # which the signal breaks off
    status=$?
    kill -0 "$step" 2>/dev/null || break
done
if [ "$stopped" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
