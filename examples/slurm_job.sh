# What run_7b.sh and run_70b.sh do within their job: check, pre-flight, train, and back into the queue where there is more
# to do. Sourced by them, behind `recipe=NAME`.
#
#   --recipe NAME|FILE.yaml        another recipe (powerflow recipes lists them), or a config of your own
#   --image IMAGE --mounts A:B,..  for clusters with pyxis: each command runs in this image, the Dockerfile's, with the
#                                  repository mounted where it lies. Without: the programs of the nodes
#   --launcher torchrun|srun       one torchrun per node (default), or one task of srun per GPU
#   --preflight SECONDS|off        for which a node may be late when the nodes are tried before (default 120)
#   --servers NODES                the last so many nodes of the job run vLLM servers that sample, one for each
#                                  rollout.vllm.tp GPUs (one on a node without GPUs); the others train. colocated: on
#                                  the GPUs of every node, asleep while it trains
#
# How it ends: 0 the run is finished; 2 refused, and said why: not put back; put back into the queue when it was asked to
# stop and has saved, when a node is at fault at the pre-flight (without that node), and when it failed behind a new
# checkpoint, as it does when a rank hangs or is killed. Whoever fails twice at one checkpoint is not put back again.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
image='' mounts='' launcher=torchrun preflight=120 servers=${servers:-0}
while [[ "${1:-}" == --* ]]; do
    value=${2:-}
    case $1=$value in
        --recipe=?*) recipe=$value ;;
        --image=?*) image=$value ;;
        --mounts=?*) mounts=$value ;;
        --launcher=torchrun | --launcher=srun) launcher=$value ;;
        --preflight=off | --preflight=[1-9]*) preflight=$value ;;
        --servers=0 | --servers=colocated | --servers=[1-9] | --servers=[1-9][0-9]) servers=$value ;;
        *) echo "error: $1 $value is no option of this script: --recipe NAME|FILE.yaml, --image IMAGE, --mounts FROM:TO,...," \
            "--launcher torchrun|srun, --preflight SECONDS|off and --servers NODES|colocated are" >&2; exit 2 ;;
    esac
    shift 2
done
config=megatron_powerflow/recipes/$recipe.yaml
[[ "$recipe" != *.yaml ]] || config=$recipe
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
serving=0 trainers=$SLURM_JOB_NUM_NODES first_server_node=0  # how many nodes do what
if [ "$servers" = colocated ]; then
    serving=$SLURM_JOB_NUM_NODES
elif [ "$servers" -gt 0 ]; then
    serving=$servers trainers=$(( SLURM_JOB_NUM_NODES - servers )) first_server_node=$(( SLURM_JOB_NUM_NODES - servers ))
fi
[ "$trainers" -gt 0 ] || { echo "error: --servers $servers of $SLURM_JOB_NUM_NODES nodes leaves none to train" >&2; exit 2; }
world_size=$(( trainers * per_node ))
here=() per_node_here=()  # options of srun where only the first nodes train
if [ "$first_server_node" -gt 0 ]; then
    here=(--nodes="$trainers" --relative=0)
    per_node_here=("${here[@]}" --ntasks="$trainers" --ntasks-per-node=1)
fi
per_gpu=(srun "${here[@]}" --ntasks="$world_size" --ntasks-per-node="$per_node" --cpu-bind=none "${container[@]}")
set -- ${defaults[@]+"${defaults[@]}"} "$@"  # what is given stands behind them, and counts
if [ "$serving" -gt 0 ]; then
    tp=$("${inside[@]}" "$python" -c 'import sys, yaml
section = yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
for name in ("rollout", "vllm", "tp"):
    section = section.get(name) or {}
print(section or 1)' "$config" 2>/dev/null) || tp=1  # a file that cannot be read is refused by the check below
    for word in "$@"; do [[ "$word" != rollout.vllm.tp=* ]] || tp=${word#*=}; done
    [[ "$tp" =~ ^[1-9][0-9]?$ ]] || tp=1  # as is this
    per_server_node=1
    [ "${SLURM_GPUS_ON_NODE:-0}" -lt 1 ] 2>/dev/null || per_server_node=$(( per_node / tp ))
    if [ "$per_server_node" -lt 1 ]; then
        echo "error: rollout.vllm.tp=$tp: a server is on one node, and a node has $per_node GPUs; take a smaller one" >&2
        exit 2
    fi
    set -- rollout.engine=vllm "rollout.vllm.start=$(( serving * per_server_node ))" "$@"
    [ "$servers" != colocated ] || set -- "$@" rollout.vllm.sleeps=true
fi

# Back into the queue: requeue WHY [NODES to keep out]
requeue() {
    local out
    echo "$1; back into the queue"
    trap '' TERM  # what SLURM sends as soon as it has put the job back
    scontrol requeue "$SLURM_JOB_ID" || exit 75  # SLURM has done it by itself, of a lost node; or lets nobody do it
    if [ -n "${2:-}" ]; then
        out=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'ExcNodeList=[^ ]*' | cut -d= -f2)
        [ "$out" != '(null)' ] || out=
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${out:+$out,}$2"
    fi
    trap - TERM
    exec sleep 60  # SLURM ends this; until it does, no exit code of ours may be taken for the job's
}

# SLURM's word before the time limit, or a preemption: heard from here on, and heeded when the command of now has ended.
asked=no
trap 'asked=yes' USR1 TERM

# Everything that can be wrong is said here, once, before any process starts.
powerflow check "$config" "$@" --world-size "$world_size"

# The address of the first node as SLURM knows it: node names need not resolve.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | head -n 1 | cut -d= -f2)
export MASTER_ADDR=${address:-$first} MASTER_PORT=$(( 20000 + SLURM_JOB_ID % 12000 ))  # below those of outgoing connections
while (exec 3<> "/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null || (exec 3<> "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
    echo "port $MASTER_PORT is taken; the next one is tried"
    MASTER_PORT=$(( MASTER_PORT + 1 ))
done

if [ "$preflight" != off ]; then
    verdict=$PWD/${SLURM_JOB_NAME:-powerflow}-$SLURM_JOB_ID.preflight.json
    rm -f "$verdict"
    code=0
    # --wait: a task that is stopped never ends; --time: nor does one whose file system is away
    "${per_gpu[@]}" --wait=10 --time=30 "$python" -m megatron_powerflow.cli preflight "$config" "$@" \
        --seconds "$preflight" --out "$verdict" || code=$?
    if [ -f "$verdict" ]; then
        read -r code bad < <("$python" -c '
import json, sys
verdict = json.load(open(sys.argv[1]))
print(verdict["exit_code"], ",".join(verdict["nodes"]))' "$verdict")
    fi
    if [ "$code" -eq 75 ] && [ -n "${bad:-}" ]; then
        requeue "without $bad" "$bad"
    fi
    [ "$code" -eq 0 ] || exit "$code"
    rm -f "$verdict"
fi

# What the newest checkpoint is, before and behind a start.
before=$(powerflow outcome "$config" "$@" --forget)
[ "$asked" = no ] || requeue "asked to stop before the run began"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800  # seconds between SIGTERM to torchrun and its kill: a step and a save

if [ "$serving" -gt 0 ]; then  # in the background, and started anew by themselves; they end with the job
    srun --overlap --nodes="$serving" --relative="$first_server_node" --ntasks=$(( serving * per_server_node )) \
        --ntasks-per-node="$per_server_node" --cpu-bind=none --wait=0 --kill-on-bad-exit=0 "${container[@]}" \
        bash -c 'host=$(scontrol show node "$SLURMD_NODENAME" | grep -o "NodeAddr=[^ ]*" | head -n 1 | cut -d= -f2)
            exec "$0" -m megatron_powerflow.cli serve "$@" --number "$SLURM_LOCALID" --host "${host:-$SLURMD_NODENAME}"' \
        "$python" "$config" "$@" &
    server_step=$!
    trap 'kill "$server_step" 2>/dev/null || true' EXIT
fi
if [ "$launcher" = srun ]; then
    "${per_gpu[@]}" --kill-on-bad-exit=1 "$python" -m megatron_powerflow.cli train "$config" "$@" &
else
    srun "${per_node_here[@]}" --kill-on-bad-exit=1 --cpu-bind=none "${container[@]}" bash -c '
        exec "$0" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$1" \
            --master-addr "$2" --master-port "$3" -m megatron_powerflow.cli train "${@:4}"
    ' "$python" "$per_node" "$MASTER_ADDR" "$MASTER_PORT" "$config" "$@" &
fi
step=$!
while jobs -pr | grep -qx "$step"; do
    if [ "$asked" = yes ]; then  # until the run has its folder there is nothing to stop
        powerflow stop "$config" "$@" && asked=done || sleep 5
    else
        wait "$step" || true  # a signal interrupts it; the step goes on until it has saved
    fi
done
code=0
wait "$step" || code=$?

[ "$code" -ne 0 ] || exit 0
outcome=0
said=$(powerflow outcome "$config" "$@") || outcome=$?  # srun and torchrun make 1 of every exit code
echo "$said"
if [ "$outcome" -eq 75 ] && [ "$serving" -gt 0 ] && [ "$asked" = no ] && [ "${said##*$'\n'}" = "${before##*$'\n'}" ]; then
    echo "no step was made, and nobody asked to stop: not put back; RUN/servers/*.log says what became of the servers"
    exit 75
fi
[ "$outcome" -ne 75 ] || requeue "stopped with its state saved"
if [ "$outcome" -eq 1 ] && [ "${said##*$'\n'}" != "${before##*$'\n'}" ]; then
    requeue "failed, behind a new checkpoint"
fi
[ "$outcome" -eq 0 ] || code=$outcome
exit "$code"
