#!/bin/bash
# A training on several machines under Slurm, one process per GPU, sharded as recipes/accelerate/fsdp2.yaml says:
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 recipes/slurm/train.sh recipes/NAME.yaml [--FIELD VALUE ...]
# The folder of runs must lie on a disk that all machines see. docs/guides/many_machines.md explains each line.
#SBATCH --job-name=looped
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300

# What `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` tells its processes; without it: data-parallel.
export ACCELERATE_USE_FSDP=true
export FSDP_VERSION=2
export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
export FSDP_TRANSFORMER_CLS_TO_WRAP=LoopedLayer
export FSDP_RESHARD_AFTER_FORWARD=false
export FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT
export FSDP_CPU_RAM_EFFICIENT_LOADING=false

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# No launcher in between: signals reach the trainings themselves, and srun returns their exit status.
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE \
     exec python train.py "$@"' train "$@"
status=$?

# 75: asked to stop, saved, and not finished.
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
