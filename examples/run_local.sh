#!/usr/bin/env bash
# PowerFlow end to end on this machine: install, fetch a real model, train it on two CPU processes with two pipeline
# stages, export, reload with transformers, show answers before and after. Run it again: what is there is reused.
#
#   bash examples/run_local.sh [section.key=value ...]      e.g. run.num_steps=20 run.output_dir=runs/longer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/environment.sh plot,example
model=models/SmolLM2-135M-Instruct
config=examples/configs/local.yaml

"$python" tools/fetch_example_model.py --out "$model"
# two CPU processes, also beside a GPU; CUDA_VISIBLE_DEVICES=0,1 gives each of them one
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-}
# the two processes share the cores of this machine
export OMP_NUM_THREADS=$(( $(nproc) / 2 > 0 ? $(nproc) / 2 : 1 ))
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_powerflow.cli train "$config" "$@"
"$python" tools/show_run.py "$config" "$@"
