#!/usr/bin/env bash
# Installs what the tests need into .venv (or VENV) and runs all of them; arguments go to pytest.
#
#   bash tests/run.sh                    everything: about 32 minutes on 2 cores
#   bash tests/run.sh -m "not slow"      what a change deserves before each commit: about 20 minutes
#   bash tests/run.sh -m long            what CI leaves out: runs to the optimum, one after the other
#   bash tests/run.sh tests/unit         half a minute
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/environment.sh dev
"$python" -m ruff check .
"$python" -m ruff format --check --quiet .
"$python" tools/fetch_example_model.py --out models/SmolLM2-135M-Instruct
exec "$python" -m pytest "$@"
