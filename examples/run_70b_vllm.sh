#!/usr/bin/env bash
# Llama-3.1-70B with vLLM servers that sample: 8 nodes x 8 GPUs train (tp 8 x pp 4 x dp 2), 2 nodes x 8 GPUs sample (four
# servers of tp 4), in one job. Rollouts of the next step are drawn while this one trains. From the repository's root:
#
#   sbatch examples/run_70b_vllm.sh model.hf_path=/models/Llama-3.1-70B run.output_dir=/runs/70b \
#       rollout.vllm.python=/envs/vllm/bin/python [section.key=value ...]
#   sbatch --nodes 12 examples/run_70b_vllm.sh --servers 4 ...          eight nodes train, four sample
#
# rollout.vllm.python is the interpreter of an environment with vLLM 0.32 or newer, on a file system that all nodes see;
# with --image the image has both. Everything else is as in run_70b.sh: requeued, it continues, and answers that were in
# hand are not asked for again. docs/pages/serving.md says what is proved after every update of the servers' weights.
#SBATCH --job-name=powerflow-70b-vllm
#SBATCH --nodes=10
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@900
recipe=llama31_70b
servers=2
defaults=(rollout.vllm.tp=4 rollout.steps_ahead=1)
source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/examples/slurm_job.sh"
