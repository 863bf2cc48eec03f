#!/bin/bash
# One run on several machines, by Slurm: a task for each GPU. Every machine sees the same files and has the same packages.
#
#   sbatch examples/scale/several_nodes.sh examples/scale/fsdp2.yaml run.output=/shared/runs/fsdp2
#   sbatch examples/scale/several_nodes.sh --resume /shared/runs/fsdp2       # goes on, also on another number of them
#
# Without Slurm the same command on each machine, the first one's address in all:
#
#   torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 --rdzv-id RUN \
#       -m hybrid train examples/scale/fsdp2.yaml run.output=/shared/runs/fsdp2
#
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=TERM@120
# The signal is the run's: it saves and stops, two minutes before the time is up.

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
exec srun --kill-on-bad-exit=1 python -m hybrid train "$@"
