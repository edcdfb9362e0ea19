"""The list of deliberate faults cannot rot: each is a text that its file has once, in a file that some test guards."""

from __future__ import annotations

from pathlib import Path

from tests.mutations.faults import FAULTS, GUARDS
from tests.mutations.run import PACKAGE, REPOSITORY, misfits


def test_every_fault_is_of_a_text_that_its_file_has_once():
    assert misfits(FAULTS, REPOSITORY / PACKAGE) == []


def test_every_fault_changes_something_and_says_what_it_breaks():
    assert len({(fault.file, fault.original, fault.mutated) for fault in FAULTS}) == len(FAULTS) >= 90
    assert all(fault.original != fault.mutated and fault.breaks for fault in FAULTS)


def test_every_guard_is_a_file():
    guards = {guard for names in GUARDS.values() for guard in names}
    assert all((Path(__file__).parent / f"test_{guard}.py").is_file() for guard in guards)
