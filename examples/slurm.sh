#!/usr/bin/env bash
# examples/two_processes.py on two nodes with eight GPUs each, one process for each GPU: sbatch examples/slurm.sh FOLDER
# JAX reads the processes and the address of the first one from Slurm's variables. All nodes see FOLDER.
#SBATCH --job-name=two-processes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120
# SIGTERM arrives 120 seconds before the end of the time. The program then saves its last step and exits with 143.
set -uo pipefail

srun python examples/two_processes.py --cluster --steps "${STEPS:-20}" "$1"
code=$?
[ "$code" != 143 ] || scontrol requeue "$SLURM_JOB_ID" # the next run resumes
exit "$code"
