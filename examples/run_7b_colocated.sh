#!/usr/bin/env bash
# Qwen2.5-Math-7B on one node x 8 GPUs, with vLLM servers on the same GPUs: they sleep while it trains, and it gives its
# memory back while they sample. From the repository's root:
#
#   sbatch examples/run_7b_colocated.sh model.hf_path=/models/Qwen2.5-Math-7B run.output_dir=/runs/7b \
#       rollout.vllm.python=/envs/vllm/bin/python [section.key=value ...]
#
# Eight servers, one on each GPU, take rollout.vllm.memory of it (.4). rollout.vllm.weights=/dev/shm/weights keeps the
# weights on their way to them in the node's memory, and off a disk. The other options stand in slurm_job.sh, and what is
# proved of the servers' weights in docs/pages/serving.md.
#SBATCH --job-name=powerflow-7b-colocated
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@900
recipe=qwen25_math_7b
servers=colocated
defaults=(model.reference=swap)
source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/examples/slurm_job.sh"
