"""Pre-flight as arithmetic: who is asked to sum with whom, who is slow, late, silent or missing, and what is said."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.config import ParallelSection
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.layout import Layout, layout_of_sizes
from megatron_powerflow.parallel.slurm_job import expand_nodes
from megatron_powerflow.preflight.findings import link_factors, of_cards, of_reports, usual
from megatron_powerflow.preflight.judging import SILENT_SECONDS, Heard, judge, not_come, note
from megatron_powerflow.preflight.rank_groups import rounds
from megatron_powerflow.preflight.reports import Card, Measured, Report, Verdict, card_of_json, report_of_json
from megatron_powerflow.preflight.table import describe, group_rows


def groups_of(layout: Layout, nodes: list[str]) -> dict[str, set[tuple[int, ...]]]:
    found: dict[str, set[tuple[int, ...]]] = {}
    for kind, groups in rounds(layout, nodes):
        found.setdefault(kind, set()).update(groups)
    return found


def test_the_groups_are_those_of_the_layouts_own_example():
    """tp=2, pp=2, dp=2 in layout.py's picture; two nodes of four."""
    assert groups_of(Layout(2, 2, None, 1, 2, 2, True), ["a"] * 4 + ["b"] * 4) == {
        "tp": {(0, 1), (2, 3), (4, 5), (6, 7)},
        "ep": {(0, 2), (1, 3), (4, 6), (5, 7)},
        "dp": {(0, 2), (1, 3), (4, 6), (5, 7)},
        "pp": {(0, 4), (1, 5), (2, 6), (3, 7)},
        "nodes": {(0, 4), (1, 5), (2, 6), (3, 7)},
        "all": {tuple(range(8))},
    }


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(1, 7))
def test_no_rank_is_in_two_groups_of_a_round_and_every_pair_is_tried(tp, pp, cp, dp, per_node):
    layout = Layout(tp, pp, None, cp, 1, dp, False)
    nodes = [f"n{rank // per_node}" for rank in range(layout.world_size)]
    for _, groups in rounds(layout, nodes):
        ranks = [rank for group in groups for rank in group]
        assert len(ranks) == len(set(ranks))
    found = groups_of(layout, nodes)
    assert len(found.get("pp", ())) == (pp - 1) * tp * cp * dp
    linked = {frozenset((nodes[a], nodes[b])) for a, b in found.get("nodes", ())}
    count = len(set(nodes))
    assert len(linked) == {1: 0, 2: 1}.get(count, count)


def test_sizes_that_do_not_fit_are_refused_without_a_model():
    with pytest.raises(UserError, match="6 processes do not hold tp=4"):
        layout_of_sizes(ParallelSection(tp=4), 6)
    assert layout_of_sizes(ParallelSection(tp=2, pp=2), 8).dp == 2


def test_node_lists_are_read_as_slurm_writes_them():
    text = "n[1-2,07-10],login,gpu[001,003]-ib"
    expected = ["n1", "n2", "n07", "n08", "n09", "n10", "login", "gpu001-ib", "gpu003-ib"]
    assert expand_nodes(text) == expected
    assert expand_nodes("") == []


@pytest.mark.skipif(not shutil.which("scontrol"), reason="SLURM is not installed")
def test_node_lists_are_read_as_scontrol_reads_them(tmp_path):
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=localhost\n")
    text = "n[1-2,07-10],login,a[001,003]"
    done = subprocess.run(
        ["scontrol", "show", "hostnames", text],
        env={"SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expand_nodes(text)


# --- what ranks say when they come


def test_a_device_that_some_lack_is_their_nodes_fault_and_one_that_all_lack_the_users_mistake():
    good, bad = Card("n1", "nccl", device="x"), Card("n2", "", fault="no GPU is visible")
    verdict = of_cards([good, bad])
    assert (verdict.exit_code, verdict.nodes) == (75, ("n2",))
    assert verdict.lines == ("rank 1 on n2: no GPU is visible",)
    assert of_cards([bad, bad]).exit_code == 2
    assert of_cards([bad, bad]).nodes == ()
    assert of_cards([good, replace(good, device="y")]) is None
    assert of_cards([Card("n1", "gloo"), Card("n2", "gloo")]) is None


def test_a_gpu_that_two_ranks_have_is_the_users_mistake():
    verdict = of_cards([Card("n1", "nccl", device="x"), Card("n1", "nccl", device="x")])
    assert verdict.exit_code == 2
    assert "ranks 0, 1 have one GPU, x" in verdict.lines[0]


def test_one_node_on_the_cpu_beside_gpus_is_named():
    verdict = of_cards([Card("n1", "nccl", device="x"), Card("n2", "gloo")])
    assert (verdict.exit_code, verdict.nodes) == (75, ("n2",))


# --- what they measured


def ring(seconds: dict[tuple[int, int], float], products: list[float], **more) -> list[Report]:
    """A rank on each node, with these links."""
    reports = []
    for rank, product in enumerate(products):
        own = [Measured("nodes", pair, 1e-4, time, True) for pair, time in seconds.items() if rank in pair]
        reports.append(Report(rank, f"n{rank}", product, groups=tuple(own), **more))
    return reports


def test_a_node_with_two_slow_links_is_slow_and_its_neighbours_are_not():
    reports = ring({(0, 1): 1.0, (1, 2): 9.0, (2, 3): 9.5, (0, 3): 1.0}, [1.0] * 4)
    verdict = of_reports(reports, slow=3, paths=[])
    assert (verdict.exit_code, verdict.nodes) == (75, ("n2",))
    assert verdict.lines == ("n2 is slow: 9.0 times the usual time for its links",)
    assert of_reports(reports, slow=0, paths=[]).exit_code == 0
    assert of_reports(reports, slow=10, paths=[]).exit_code == 0


def test_a_slow_node_of_three_is_told_from_the_others():
    reports = ring({(0, 1): 9.0, (1, 2): 9.5, (0, 2): 1.0}, [1.0] * 3)
    assert of_reports(reports, slow=3, paths=[]).nodes == ("n1",)


def test_one_slow_link_is_no_nodes_fault_and_two_nodes_have_nothing_to_compare():
    assert (
        of_reports(ring({(0, 1): 9.0, (1, 2): 1.0, (2, 3): 1.0, (0, 3): 1.0}, [1.0] * 4), slow=3, paths=[]).nodes == ()
    )
    assert link_factors(ring({(0, 1): 9.0}, [1.0, 1.0])) == {}


def test_a_node_whose_products_are_slow_is_named_also_one_of_two():
    verdict = of_reports(ring({(0, 1): 1.0}, [1.0, 5.0]), slow=3, paths=[])
    assert (verdict.exit_code, verdict.nodes) == (75, ("n1",))
    assert verdict.lines == ("n1 is slow: 5.0 times the usual time for matrix products",)


def test_the_usual_is_the_lower_quartile():
    assert usual([5.0, 1.0]) == 1.0
    assert usual([9.0, 8.0, 1.0]) == 1.0
    assert usual(range(100)) == 24


def test_a_path_that_one_node_does_not_see_is_named_and_one_that_nobody_sees_is_not():
    reports = ring({}, [1.0] * 3)
    reports = [replace(report, seen=("/models",) if report.rank != 2 else ()) for report in reports]
    verdict = of_reports(reports, slow=3, paths=["/models", "owner/name"])
    assert (verdict.exit_code, verdict.nodes) == (75, ("n2",))
    assert verdict.lines == ("rank 2 on n2: /models is not there, and other nodes see it; mount it on every node",)


def test_wrong_sums_and_memory_that_others_hold_are_named():
    wrong = Measured("tp", (0, 1), 1.0, 1.0, False)
    reports = [Report(0, "n0", 1.0, 2**30), Report(1, "n1", 1.0, 40 * 2**30, groups=(wrong,))]
    verdict = of_reports(reports, slow=3, paths=[])
    assert (verdict.exit_code, verdict.nodes) == (75, ("n1",))
    assert "others hold 40.0 GiB of its GPU" in verdict.lines[0]
    assert "a wrong sum over its group of tp" in verdict.lines[1]


# --- who holds the others up


def heard_of(stages: list[int], *, beats: list[float], since: list[float], broken: dict[int, str] | None = None):
    return {
        rank: Heard(1, stage, f"stage {stage}", (broken or {}).get(rank, ""), beats[rank], since[rank])
        for rank, stage in enumerate(stages)
    }


NODES = ["n0", "n1", "n2"]


def test_nobody_is_judged_while_all_get_on():
    assert judge(heard_of([3, 3, 2], beats=[99] * 3, since=[90, 90, 95]), NODES, 100, 20) is None


def test_who_is_behind_for_too_long_is_named_and_who_waits_is_not():
    verdict = judge(heard_of([3, 3, 2], beats=[99] * 3, since=[70, 70, 60]), NODES, 100, 20)
    assert (verdict.exit_code, verdict.nodes) == (75, ("n2",))
    assert verdict.lines == ("rank 2 on n2: in stage 2 for 40 s: its node or its device fails",)


def test_who_has_just_begun_the_earliest_stage_is_waited_for():
    assert judge(heard_of([3, 3, 2], beats=[99] * 3, since=[70, 70, 85]), NODES, 100, 20) is None


def test_where_all_are_in_one_stage_no_node_is_kept_out():
    verdict = judge(heard_of([3, 3, 3], beats=[99] * 3, since=[60, 61, 62]), NODES, 100, 20)
    assert (verdict.exit_code, verdict.nodes) == (75, ())
    assert "ranks 0, 1, 2 on n0, n1, n2" in verdict.lines[0]


def test_who_is_silent_is_named_before_whom_that_broke():
    silent_at = 100 - SILENT_SECONDS - 1
    heard = heard_of([3, 3, 3], beats=[99, silent_at, 99], since=[1, 1, 1], broken={0: "connection closed by peer"})
    verdict = judge(heard, NODES, 100, 200)
    assert (verdict.exit_code, verdict.nodes) == (75, ("n1",))
    verdict = judge(heard_of([3] * 3, beats=[99] * 3, since=[1] * 3, broken={0: "no route"}), NODES, 100, 200)
    assert (verdict.exit_code, verdict.nodes) == (1, ())
    assert verdict.lines == ("rank 0 on n0, in stage 3: no route",)


def test_a_beat_that_does_not_change_is_none():
    heard: dict[int, Heard] = {}
    beat = {"count": 4, "stage": 1, "what": "x", "broken": ""}
    note(heard, 0, beat, 10.0)
    note(heard, 0, beat, 20.0)
    assert (heard[0].beat_at, heard[0].stage_at) == (10.0, 10.0)
    note(heard, 0, beat | {"count": 5}, 30.0)
    assert (heard[0].beat_at, heard[0].stage_at) == (30.0, 10.0)
    note(heard, 0, beat | {"count": 6, "stage": 2}, 40.0)
    assert (heard[0].beat_at, heard[0].stage_at) == (40.0, 40.0)
    note(heard, 0, beat | {"count": 7, "stage": 2, "broken": "no"}, 50.0)
    assert heard[0].stage_at == 50.0


def test_who_does_not_come_is_named_by_its_node_where_the_launcher_knows_it():
    verdict = not_come([2, 3], {0: "n1", 1: "n1", 2: "n2", 3: "n2"}, 4, 61)
    assert (verdict.exit_code, verdict.nodes) == (75, ("n2",))
    assert verdict.lines[0].startswith("ranks 2, 3 on n2 of 4 did not come within 61 s: look at the file systems")
    assert not_come([3], {}, 4, 61).nodes == ()


# --- what travels, and what is read


def test_what_travels_comes_back_as_it_was():
    card = Card("n1", "gloo", "why", "")
    assert card_of_json(json.dumps(asdict(card))) == card
    report = ring({(0, 1): 1.0}, [1.0, 2.0], seen=("/models",))[1]
    assert report_of_json(json.dumps(asdict(report))) == report
    verdict = Verdict(75, ("a", "b"), ("n1",), {"groups": []})
    assert Verdict.of_json(verdict.to_json()) == verdict


def test_the_table_has_a_line_for_each_kind_and_each_node():
    reports = ring({(0, 1): 0.016, (1, 2): 0.032, (0, 2): 0.016}, [1.0, 1.0, 4.0])
    (row,) = group_rows(reports)
    assert (row["kind"], row["num_groups"], row["size"]) == ("nodes", 3, 2)
    assert row["slowest_ranks"] == [1, 2]
    assert row["gb_per_second"] == pytest.approx(2**24 / 0.032 / 1e9)
    text = describe(reports, "gloo", 3.14)
    assert "pre-flight: 3 ranks on 3 node(s) over gloo, 3.1 s" in text
    assert "ranks 1, 2 on n1, n2" in text
    assert text.splitlines()[-3].split()[:4] == ["n2", "1", "4000.00", "4.0"]
