#!/usr/bin/env bash
# Do both pairs of interpreter and Megatron-Core that constraints.txt pins pass the distributed tests? Arguments go to
# pytest. Each pair has an environment of its own, .venv-py311 and .venv-py312 (5.6 GB: its torch brings CUDA along).
#
#   bash tests/run_pair.sh                                       tests/distributed, one pair after the other
#   bash tests/run_pair.sh -m "not slow and not long"            of those, the quick ones
#   bash tests/run_pair.sh tests/distributed/test_layouts.py     only what is named
#
# Left out: other pairs. pip picks by the interpreter, so a pair is an interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source tools/find_python.sh
declare -A interpreter
missing=()
for version in 3.11 3.12; do
    interpreter[$version]=$(find_python "$version") || missing+=("$version")
done
for version in "${missing[@]}"; do
    missing_python "$version"
done
[ "${#missing[@]}" -eq 0 ] || exit 2

tests=(tests/distributed)
for argument; do
    if [ -e "${argument%%::*}" ]; then tests=(); fi # the caller names what to run
done

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
status=0
for version in 3.11 3.12; do
    VENV=.venv-py${version/./} PYTHON=${interpreter[$version]} \
        bash tests/run.sh -m "not long" --junit-xml="$results/$version.xml" "${tests[@]}" "$@" || status=1
done

for version in 3.11 3.12; do
    if [ ! -f "$results/$version.xml" ]; then
        echo "python $version: stopped before the tests had ended; the reason is above"
        continue
    fi
    ".venv-py${version/./}/bin/python" - "$results/$version.xml" <<'END'
import platform
import sys
from importlib.metadata import version
from xml.etree import ElementTree

counts = ElementTree.parse(sys.argv[1]).getroot().find("testsuite").attrib
failed, skipped = int(counts["failures"]) + int(counts["errors"]), int(counts["skipped"])
passed = int(counts["tests"]) - failed - skipped
print(f"python {platform.python_version()}, torch {version('torch')}, megatron-core {version('megatron-core')}:", end=" ")
print(f"{passed} passed, {failed} failed, {skipped} skipped in {float(counts['time']):.0f} s")
END
done
exit "$status"
