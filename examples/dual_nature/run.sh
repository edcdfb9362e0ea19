#!/usr/bin/env bash
# The whole study on this machine: makes the bases, trains every arm three times, writes tables and reports. Two CPU
# cores and half an hour; stopped and started again, it continues.
#
#   bash examples/dual_nature/run.sh [--out FOLDER] [--groups GROUP ...] [--processes N]
#   bash examples/dual_nature/run.sh --groups remedies_g1 remedies_g2 remedies_g3       what helps against the loop
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

source tools/environment.sh plot
exec "$python" -m examples.dual_nature.study "$@"
