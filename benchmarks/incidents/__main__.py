"""What becomes of a SLURM job that an incident befalls? The real script on a real SLURM of this machine, with verdicts.

    python -m benchmarks.incidents [--incident node_lost ...] [--json out.json] [--keep FOLDER]

Three nodes, of which a run takes two (`bench.py`); the incidents are those of `cases.py`. Needs root, slurm-wlm and
munge; half an hour on two cores. Exit code 1: an incident did not end as promised.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.incidents.bench import HEAD, SLURM_SETTINGS, Bench
from benchmarks.incidents.cases import CASES


def main() -> None:
    """Cause the incidents that were asked for."""
    from tests.distributed.slurm_cluster import SlurmCluster, why_not

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--incident", choices=CASES, action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="an empty folder for runs and logs, which then stay")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the daemons end with this process
    if reason := why_not():
        raise SystemExit(reason)
    verdicts = []
    with tempfile.TemporaryDirectory() as name:
        folder = asked.keep or Path(name)
        folder.mkdir(exist_ok=True)
        with SlurmCluster(folder / "slurm", num_nodes=3, settings=SLURM_SETTINGS, kill_wait=30) as cluster:
            bench = Bench(cluster, folder)
            print(HEAD, flush=True)
            for incident in asked.incident or CASES:
                cluster.wait_until_idle()
                verdicts.append(CASES[incident](bench))
                print(verdicts[-1].line(), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([verdict.to_json() for verdict in verdicts], indent=1))
    sys.exit(not all(verdict.promised for verdict in verdicts))


if __name__ == "__main__":
    main()
