#!/usr/bin/env bash
# Llama-3.1-70B on 8 nodes x 8 GPUs (tp 8 x pp 4 x dp 2). From the repository's root:
#
#   sbatch examples/run_70b.sh model.hf_path=/models/Llama-3.1-70B run.output_dir=/runs/70b [section.key=value ...]
#   sbatch examples/run_70b.sh --recipe llama31_70b_instruct model.hf_path=/models/Llama-3.1-70B-Instruct ...
#   sbatch examples/run_70b.sh --image /images/megatron_powerflow.sqsh --mounts /models:/models,/runs:/runs ...
#   sbatch examples/run_70b.sh ... precision.dtype=fp8 precision.fp8_recipe=blockwise
#
# The other options stand in slurm_job.sh. No setting is passed through the environment: each is an argument and survives
# a requeue. SLURM's options stand on the command line as usual, e.g. `sbatch --nodes 4 --partition gpu
# examples/run_70b.sh ...`. Model, prompts and output folder must be on a file system that all nodes see. Before the time
# limit, or when the job is preempted, the run saves at the end of its step and the job is put into the queue again; it
# continues where it was.
#SBATCH --job-name=powerflow-70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@900
servers=0 defaults=()
recipe=llama31_70b
source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/examples/slurm_job.sh"
