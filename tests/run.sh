#!/usr/bin/env bash
# Installs what the tests need into .venv (or VENV) and runs them, two files at a time; arguments go to pytest.
# Times on 2 cores:
#
#   bash tests/run.sh tests/unit         2 minutes: arithmetic, rules, files, messages
#   bash tests/run.sh                    8 minutes: the above, and real gloo ranks; before each commit
#   bash tests/run.sh -m "not long"      25 to 40 minutes: with the proofs that take minutes each; CI runs this
#   bash tests/run.sh -m ""              everything, hours: more runs to the optimum, 10,000 hostile files, ...
#   bash tests/run.sh -n 0 --pdb ...     in this process
#
# tests/run_pair.sh does so with both pairs of interpreter and Megatron-Core in constraints.txt; CI runs the older one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/environment.sh dev
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would compile the package anew
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
"$python" -m mypy
"$python" tools/fetch_example_model.py --out models/SmolLM2-135M-Instruct
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not long" "$@"
