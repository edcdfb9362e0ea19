#!/usr/bin/env bash
# Alpha as a dial: one run per alpha from one model, each evaluated on held-out prompts like the model itself (alpha 1),
# and a report of quality, diversity, entropy, length and pass@k over them all. From the repository's root:
#
#   bash examples/sweep_alpha.sh [section.key=value ...]                      SmolLM2-135M on this machine
#   MODEL=/models/Qwen2.5-1.5B-Instruct PROCESSES=8 bash examples/sweep_alpha.sh run.num_steps=100 parallel.tp=2
#
#   ALPHAS      powers to train towards            0.25 0.5 2 4
#   MODEL       Hugging Face folder or hub name    the example model, fetched when it is not there
#   HELD_OUT    prompts to evaluate on             examples/prompts/held_out.jsonl
#   RESPONSES   responses per held-out prompt      64
#   PROCESSES   processes (GPUs) of this node      1
#   CONFIG      the run that all share             examples/configs/sweep.yaml
#   OUT         folder of runs and report          runs/sweep_alpha
#
# Stopped and started again, it continues: finished steps and evaluations are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/environment.sh plot,eval,example
config=${CONFIG:-examples/configs/sweep.yaml}
out=${OUT:-runs/sweep_alpha}
held_out=${HELD_OUT:-examples/prompts/held_out.jsonl}
responses=${RESPONSES:-64}
model=${MODEL:-models/SmolLM2-135M-Instruct}
[ -n "${MODEL:-}" ] || "$python" tools/fetch_example_model.py --out "$model"

powerflow() {
    "$python" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-1}" -m megatron_powerflow.cli "$@"
}
# evaluate RUN FOLDER [--reference]: the run's policy, or the model that it started from, into FOLDER
evaluate() {
    [ -f "$2/evaluation.json" ] || powerflow evaluate --model "$1" --data "$held_out" --out "$2" \
        --num-responses "$responses" --diversity "${@:3}"
}

runs=()
for alpha in ${ALPHAS:-0.25 0.5 2 4}; do
    run=$out/alpha_$alpha
    powerflow train "$config" "model.hf_path=$model" "$@" "objective.alpha=$alpha" "run.output_dir=$run"
    [ ${#runs[@]} -gt 0 ] || evaluate "$run" "$out/base" --reference
    evaluate "$run" "$run/evaluation"
    runs+=("$run")
done
"$python" -m megatron_powerflow.cli report "${runs[@]}" "$out/base" --out "$out/report"
