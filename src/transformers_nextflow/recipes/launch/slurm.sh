#!/bin/bash
# OUTPUT=runs/256 sbatch --nodes 8 recipes/launch/slurm.sh pretrain_256 --model runs/alignment/final --data DATA
# Submitted again with the same line it continues from the newest checkpoint, if there is one.
#SBATCH --job-name=nextflow
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail

if compgen -G "$OUTPUT/checkpoint-*" > /dev/null; then set -- "$@" --resume; fi
export CARDS=8 OMP_NUM_THREADS=8
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Each node reads its own rank, so the line is expanded on the node. Folders must be on storage that all nodes share.
srun bash -c 'accelerate launch --config_file recipes/accelerate/fsdp2.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * CARDS))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER" --main_process_port 29500 \
    -m transformers_nextflow.cli train "$@" --output "$OUTPUT"' train "$@"
