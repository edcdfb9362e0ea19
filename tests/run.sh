#!/usr/bin/env bash
# Installs what the tests need into .venv (or VENV) and runs all of them; arguments go to pytest.
#
#   bash tests/run.sh                    everything
#   bash tests/run.sh -m "not long"      what CI runs: 40 minutes on 2 slow cores
#   bash tests/run.sh -m "not slow"      what a change deserves before each commit
#   bash tests/run.sh -m long            what CI leaves out: more runs to the optimum, every entry of the CPU layer
#   bash tests/run.sh tests/unit         two minutes
#   bash tests/run.sh -n 0 --pdb ...     in this process; otherwise two files of tests run at a time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/environment.sh dev
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
"$python" tools/fetch_example_model.py --out models/SmolLM2-135M-Instruct
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
