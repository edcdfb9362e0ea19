"""The unit tests notice at least 95 % of the deliberate faults of `faults.py`: five minutes on an idle core.

bash tests/run.sh -m long tests/mutations          or, with a line for each fault: python -m tests.mutations.run
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mutations.run import REPOSITORY

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def python(*arguments: str) -> subprocess.CompletedProcess:
    """In a process that has not imported the package."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=REPOSITORY)


def test_the_unit_tests_notice_the_faults(tmp_path):
    ran = python("-m", "tests.mutations.run")
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


OTHER_WORDS = """
from tests.mutations.faults import Fault
from tests.mutations.run import REPOSITORY, run
words = Fault("metrics/repetition.py", "How much of a text has been there before?", "How much?", "nothing")
sums = Fault("metrics/repetition.py", "1.0 - len(set(grams))", "1.0 - 2 * len(set(grams))", "a share")
no_python = Fault("metrics/repetition.py", "return 1.0 - len", "return return 1.0 - len", "the file")
print([outcome.verdict for outcome in run([words, sums, no_python, words], REPOSITORY, say=lambda line: None)])
"""


def test_a_change_of_words_is_not_noticed_and_each_fault_is_taken_back():
    ran = python("-c", OTHER_WORDS)
    assert ran.stdout.splitlines()[-1:] == ["['survived', 'killed', 'broken', 'survived']"], ran.stderr[-2000:]
