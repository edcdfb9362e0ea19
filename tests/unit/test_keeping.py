"""Which checkpoints go."""

from __future__ import annotations

import pytest

from megatron_powerflow.checkpoint.keeping import Keeping, steps_to_remove

GOOD = dict.fromkeys((2, 4, 6, 8), True)


@pytest.mark.parametrize(
    ("sound", "saved", "latest", "keeping", "gone"),
    [
        (GOOD, 8, 8, Keeping(None), []),
        (GOOD, 8, 8, Keeping(2), [2, 4]),
        (GOOD, 8, 8, Keeping(9), []),
        (GOOD, 8, 8, Keeping(1, keep_every=4), [2, 6]),
        # what `latest` names, and what was just written
        (GOOD, 8, 2, Keeping(1), [4, 6]),
        # a run that went back from 8 to 4
        (GOOD, 6, 6, Keeping(1), [2, 4]),
        (GOOD, 6, 6, Keeping(2), [2]),
        # the one just written is of a run that diverges: nothing goes
        (GOOD | {8: False}, 8, 6, Keeping(1), []),
        # bad ones are not counted, and go with those that are older than what is kept
        (GOOD | {4: False, 6: False}, 8, 8, Keeping(2), []),
        (GOOD | {4: False, 6: False}, 8, 8, Keeping(1), [2, 4, 6]),
    ],
)
def test_what_goes(sound, saved, latest, keeping, gone):
    assert steps_to_remove(sound, saved=saved, latest=latest, keeping=keeping) == gone
