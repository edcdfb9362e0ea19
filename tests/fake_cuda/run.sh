#!/usr/bin/env bash
# Does the CUDA path run, as far as shapes, bytes and Transformer Engine's own checks go? On any machine, without a GPU.
# Once for each pair of interpreter and Megatron-Core of constraints.txt and each kind of GPU; arguments go to pytest.
#
#   bash tests/fake_cuda/run.sh                            everything: minutes
#   bash tests/fake_cuda/run.sh -k "bytes"                 of that, what is named
#   PAIRS=3.11 GPUS=h100 bash tests/fake_cuda/run.sh       one interpreter, one kind of GPU
#
# Each pair has an environment of its own, .venv-fake-cuda-py311 and .venv-fake-cuda-py312 (the latter's torch brings
# CUDA's libraries along, 5.6 GB; they are not used). Nothing is compiled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/find_python.sh

for version in ${PAIRS:-3.11 3.12}; do
    PYTHON=$(find_python "$version") || { missing_python "$version" && exit 2; }
    VENV=.venv-fake-cuda-py${version/./}
    source tools/environment.sh dev
    requirements=tests/fake_cuda/requirements.txt
    if ! cmp --silent "$requirements" "$VENV/fake_cuda.txt"; then
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$requirements"
        cp "$requirements" "$VENV/fake_cuda.txt"
    fi
    for gpu in ${GPUS:-h100 b200}; do
        echo "python $version, $gpu"
        FAKE_CUDA=$gpu TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 "$python" -m pytest tests/fake_cuda "$@"
    done
done
