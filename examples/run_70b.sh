#!/usr/bin/env bash
# Llama-3.1-70B on 8 nodes x 8 GPUs (tp 8 x pp 4 x dp 2), one torchrun per node. From the repository's root:
#
#   sbatch examples/run_70b.sh model.hf_path=/models/Llama-3.1-70B run.output_dir=/runs/70b [section.key=value ...]
#   sbatch examples/run_70b.sh --recipe llama31_70b_instruct model.hf_path=/models/Llama-3.1-70B-Instruct ...
#   sbatch examples/run_70b.sh --image /images/megatron_powerflow.sqsh --mounts /models:/models,/runs:/runs ...
#
# --image names the Dockerfile's image, for clusters with pyxis: each command then runs in it, with the repository
# mounted where it lies. Without it the programs of the nodes are used.
#
# No setting is passed through the environment: each is an argument and survives a requeue. SLURM's options stand
# on the command line as usual, e.g. `sbatch --nodes 4 --partition gpu examples/run_70b.sh ...`. Model, prompts and
# output folder must be on a file system that all nodes see. Before the time limit, or when the job is preempted, the
# run saves at the end of its step and the job is put into the queue again; it continues where it was. Whether it is,
# RUN/outcome.json says: srun and torchrun make 1 of every exit code.
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
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
recipe=llama31_70b image= mounts=
while [[ "${1:-}" == --* ]]; do
    case $1 in
        --recipe) recipe=${2:?--recipe needs a name: powerflow recipes lists them} ;;
        --image) image=${2:?--image needs a container image, as srun --container-image takes it} ;;
        --mounts) mounts=${2:?--mounts needs FROM:TO,..., as srun --container-mounts takes it} ;;
        *) echo "error: $1 is no option of this script; --recipe, --image and --mounts are" >&2; exit 2 ;;
    esac
    shift 2
done
config=megatron_powerflow/recipes/$recipe.yaml
[ -f "$config" ] || { echo "error: submit from the repository's root; $PWD has no $config" >&2; exit 2; }
python=${VENV:-.venv}/bin/python  # VENV as in tools/environment.sh
[ -x "$python" ] || python=python3
container=()  # options of srun
inside=()     # what stands before a command of this node
if [ -n "$image" ]; then
    python=python3
    container=(--container-image="$image" --container-mounts="$PWD:$PWD${mounts:+,$mounts}" --container-workdir="$PWD")
    inside=(srun --overlap --nodes=1 --ntasks=1 "${container[@]}")
elif [ -n "$mounts" ]; then
    echo "error: --mounts has no effect without --image" >&2
    exit 2
fi
powerflow() { "${inside[@]}" "$python" -m megatron_powerflow.cli "$@"; }

# One process per GPU; on nodes without GPUs one per node.
per_node=${SLURM_GPUS_ON_NODE:-1}
[ "$per_node" -gt 0 ] 2>/dev/null || per_node=1

# Everything that can be wrong is said here, once, before any process starts.
powerflow check "$config" "$@" --world-size $(( SLURM_JOB_NUM_NODES * per_node ))

# The address of the first node as SLURM knows it: node names need not resolve.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | head -n 1 | cut -d= -f2)
port=$(( 20000 + SLURM_JOB_ID % 12000 ))  # below the ports of outgoing connections

powerflow outcome "$config" "$@" --forget
trap 'powerflow stop "$config" "$@"' USR1 TERM
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800  # seconds between SIGTERM to torchrun and its kill: a step and a save

srun --kill-on-bad-exit=1 "${container[@]}" bash -c '
    exec "$0" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$1" \
        --master-addr "$2" --master-port "$3" -m megatron_powerflow.cli train "${@:4}"
' "$python" "$per_node" "${address:-$first}" "$port" "$config" "$@" &
step=$!
code=0
while kill -0 "$step" 2>/dev/null; do  # a signal interrupts wait; the step goes on until it has saved
    wait "$step" && code=0 || code=$?
done

[ "$code" -ne 0 ] || exit 0
outcome=0
powerflow outcome "$config" "$@" || outcome=$?
if [ "$outcome" -eq 75 ]; then
    echo "stopped with its state saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exec sleep 60  # SLURM ends this; until it does, no exit code of ours may be taken for the job's
fi
[ "$outcome" -eq 0 ] || code=$outcome
exit "$code"
