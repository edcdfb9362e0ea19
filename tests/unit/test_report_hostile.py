"""No run folder can break the report, act through it, or hide in it what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_powerflow.report.arms import group_runs
from megatron_powerflow.report.page import build_report
from megatron_powerflow.report.reading import number, visible
from megatron_powerflow.report.runs import read_runs
from tests.html_tables import Tables
from tests.report_folders import HOSTILE, make_evaluation, make_run, spoil


@pytest.mark.slow
def test_a_hostile_folder_is_shown_as_text_and_breaks_nothing(tmp_path):
    run = make_run(tmp_path / "run", seed=0)
    spoil(run)
    (make_evaluation(run / "ok", accuracy=0.5, model=HOSTILE, data=HOSTILE, tasks=(HOSTILE, "b"))).touch()
    for place, text in enumerate(("[]", "{", '{"all": {"avg": NaN}}', '{"all": 3, "tasks": [], "diversity": 1}')):
        (run / f"bad{place}").mkdir()
        (run / f"bad{place}" / "evaluation.json").write_text(text)
    page = build_report([run], tmp_path / "out", "powerflow report ...").read_text(encoding="utf-8")
    found = Tables(page)
    assert {"script", "iframe", "object", "embed", "form"}.isdisjoint(tag for tag, _ in found.tags)
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page  # not rendered a second time
    assert "\\u202e\\u2028\\u0085\\u0000" in page
    assert "\\ud800" in page
    assert "2,998,000 more characters" in page
    assert len(page) < 4_000_000
    for said in ("values that are no finite numbers", "without a usable step", "not a JSON object", "torn: it has no"):
        assert said in page


@pytest.mark.parametrize(
    "config",
    [
        "run: [",
        "- 1",
        "[" * 5000,
        "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: {d: *b}",
        "run: {seed: !!python/object/apply:os.system ['touch owned']}",
        "? {a: 1}\n: 2",
        "x: 2026-13-99",
        "\x00",
    ],
)
def test_a_config_that_is_none_is_noted_and_never_executed(tmp_path, config):
    run = make_run(tmp_path / "run", seed=0, evaluated=False)
    (run / "config.yaml").write_text(config)
    notes: list[str] = []
    (arm,) = group_runs(read_runs([run], notes))
    assert arm.trained
    assert any("config.yaml" in note for note in notes)
    assert not Path("owned").exists()


def test_an_evaluation_may_call_its_diversities_what_it_likes(tmp_path):
    (tmp_path / "evaluation.json").write_text(
        '{"all": {"avg": 0.5}, "diversity": {"fields": 1, "step": 2, "beside": 3, "distinct_1": 0.25}}'
    )
    (run,) = read_runs([tmp_path], [])
    (file,) = run.files
    assert (file.overall.values["accuracy"], file.overall.values["distinct_1"]) == (0.5, 0.25)


def test_numbers_and_text_by_hand():
    assert number(3) == 3.0
    assert [number(bad) for bad in (True, "1", None, [], float("nan"), float("inf"), 10**400, 1e200)] == [None] * 8
    assert number(1e-300) == 0.0
    assert visible("abc", 2) == "a" + "b … (1 more characters)"
    assert visible("a\u200b\n", 9) == "a\\u200b\n"
