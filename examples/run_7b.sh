#!/usr/bin/env bash
# Qwen2.5-Math-7B on one node of 8 GPUs (tp 2 x dp 4, sequence parallelism). From the repository's root:
#
#   sbatch examples/run_7b.sh model.hf_path=/models/Qwen2.5-Math-7B run.output_dir=/runs/7b [section.key=value ...]
#   sbatch --gres=gpu:4 examples/run_7b.sh model.hf_path=/models/Qwen2.5-Math-7B run.output_dir=/runs/7b
#   sbatch --gres=gpu:1 examples/run_7b.sh --recipe qwen25_math_1.5b parallel.micro_batch_size=1 ...
#   sbatch examples/run_7b.sh --image /images/megatron_powerflow.sqsh --mounts /models:/models,/runs:/runs ...
#   sbatch examples/run_7b.sh ... precision.dtype=fp8 precision.fp8_recipe=blockwise
#
# Why tp 2, in GB a GPU: 7.6 billion parameters have 2 bytes each as policy, 2 as reference, 4 as gradients, and 12 as
# fp32 weights and Adam's moments, which are spread over the replicas. Cache and activations come on top.
#
#   8 GPUs   tp 1, dp 8   72     4 GPUs   tp 2, dp 2   53
#            tp 2, dp 4   42              tp 4, dp 1   38    2 GPUs   tp 2, dp 1   76
#
# On 2 GPUs of 80 GB take the 1.5B, as on 1 GPU. The other options stand in slurm_job.sh; a requeue works as in
# run_70b.sh.
#SBATCH --job-name=powerflow-7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
servers=0 defaults=()
recipe=qwen25_math_7b
source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/examples/slurm_job.sh"
