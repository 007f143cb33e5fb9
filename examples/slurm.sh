#!/usr/bin/env bash
# One run on two nodes of eight GPUs under Slurm: `sbatch examples/slurm.sh`. A process has one GPU and all
# weights; give --shard full for models that one GPU cannot train.
# The run folder, models and prompts must be where all nodes see them. --rollout-size and --minibatch-size count the
# responses of all processes together.
#SBATCH --job-name=textenv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
set -euo pipefail

RUN=${RUN:-runs/slurm-$SLURM_JOB_ID}
MEETING=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500

# After a failure torchrun starts all processes again, up to three times, and the run goes on from its checkpoint. A job
# that Slurm has ended goes on with the same RUN and --resume. `--` keeps torchrun from reading --run as its own.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MEETING" \
    -m -- agents train --run "$RUN" --rollout-size 1024 --minibatch-size 256 --checkpoint-every 5 "$@"
