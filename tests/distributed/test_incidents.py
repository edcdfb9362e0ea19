"""Jobs of the real scripts on a real SLURM that an incident befalls: each ends as the documentation promises."""

from __future__ import annotations

import pytest

from benchmarks.incidents.bench import SLURM_SETTINGS, Bench
from benchmarks.incidents.cases import CASES
from tests.distributed.slurm_cluster import SlurmCluster, why_not
from tests.kill_storm.run import differences

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
QUICK = ("mistake",)  # the others take minutes, or wait for SLURM's own clocks
STEPS = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("incidents")
    with SlurmCluster(folder / "slurm", num_nodes=3, settings=SLURM_SETTINGS, kill_wait=30) as cluster:
        yield Bench(cluster, folder)


@pytest.mark.parametrize(
    "incident", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_an_incident_ends_as_promised(bench, incident):
    bench.cluster.wait_until_idle()
    verdict = CASES[incident](bench)
    assert verdict.promised, verdict.line()


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.long)])
def test_one_node_trains_with_either_launcher_what_two_nodes_train(bench, launcher):
    """Two ranks of one node, as if it had two GPUs."""
    two = "--export=ALL,SLURM_GPUS_ON_NODE=2,CUDA_VISIBLE_DEVICES="
    bench.cluster.wait_until_idle()
    steps = (f"run.num_steps={STEPS}",)
    job = bench.submit(f"7b_{launcher}", two, "--", "--launcher", launcher, settings=steps, script="run_7b.sh")
    assert job.finish() == "COMPLETED", job.said
    assert "pre-flight: 2 ranks on 1 node(s) over gloo" in job.said
    assert differences(bench.undisturbed(STEPS), job.run) == []
