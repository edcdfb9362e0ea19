"""A config.json with a changed field is refused by name, or the log-probs are those of transformers.

Different numbers, another exception, and a folder that transformers does not load are faults. The changes are those of
`tests/config_changes.py`: some of them with the other tests, each with every family and value with -m long.

Left out: files of the tokenizer; layouts of several processes (`test_hf_parity.py`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.checked import open_checked
from megatron_powerflow.hf.config import read_architecture
from megatron_powerflow.hf.families import FAMILIES as READERS
from tests.config_changes import ALL, SIZES, SOME, Changes, changed
from tests.distributed.test_hf_parity import TOLERANCE, hf_logits_and_log_probs, megatron_logits_and_log_probs
from tests.tiny_models import FAMILIES

TOKENS = [(7 * i + 3) % 290 for i in range(40)]
ROWS = [(TOKENS[:1], TOKENS[1:])]
# What decides which tensors there are: the refusal names the tensor that is missing, or of another shape.
OF_TENSORS = {*SIZES, "tie_word_embeddings", "first_k_dense_replace"}


class Judge:
    """Folders of one family that differ in config.json alone; `fault` of each."""

    def __init__(self, gloo, model: Path, folder: Path) -> None:
        self.gloo, self.folder = gloo, folder
        self.config = json.loads((model / "config.json").read_text())
        for path in model.iterdir():
            if path.name != "config.json":
                (folder / path.name).symlink_to(path)
        self._known: dict[tuple[str, str], str | None] = {}  # two readings of a file -> their fault

    def fault(self, changes: Changes) -> str | None:
        """What is wrong with how the changed folder is taken; None: nothing. Any exception but a UserError passes."""
        (self.folder / "config.json").write_text(json.dumps(changed(self.config, changes)))
        try:
            with warnings.catch_warnings(action="ignore"):
                architecture, family = read_architecture(self.folder, READERS)
            open_checked(self.folder, architecture, family)
        except UserError as error:
            return None if is_named(changes, str(error)) else f"refused without a name: {error}"
        key = repr(architecture), their_reading(self.folder)
        if key not in self._known:
            self._known[key] = self._difference()
        return self._known[key]

    def _difference(self) -> str | None:
        ((_, _, ours),) = self.gloo.run(1, megatron_logits_and_log_probs, str(self.folder), ROWS, 1, 1)[0]
        ((_, theirs),) = hf_logits_and_log_probs(str(self.folder), ROWS)
        worst = float((torch.from_numpy(ours) - theirs).abs().max())
        return None if worst < TOLERANCE else f"accepted, and a log-prob differs by {worst:.2e}"


def their_reading(folder: Path) -> str:
    """transformers' config object, as text. Raises what transformers raises of a file that it does not take."""
    from transformers import AutoConfig

    return json.dumps(AutoConfig.from_pretrained(folder).to_dict(), sort_keys=True, default=str)


def is_named(changes: Changes, message: str) -> bool:
    words = {"tensor"} if OF_TENSORS & changes.keys() else set()
    if any("experts" in field for field in changes):
        words.add("experts")
    return any(word in message for word in words | set(fields_of(changes)))


def fields_of(changes: Changes) -> Iterator[str]:
    for field, value in changes.items():
        yield field
        if isinstance(value, dict):
            yield from fields_of(value)


def name_of(item: tuple[str, Changes]) -> str:
    return f"{item[0]}-{json.dumps(item[1])}"[:100]


@pytest.fixture(scope="module")
def judges(gloo, tiny_model, tmp_path_factory) -> dict[str, Judge]:
    return {family: Judge(gloo, tiny_model(family), tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("item", SOME, ids=name_of)
def test_a_change_is_refused_by_name_or_computed_as_transformers_does(judges, item):
    family, changes = item
    assert judges[family].fault(changes) is None


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_change_is_refused_by_name_or_computed_as_transformers_does(judges, family):
    faults = {}
    for name, changes in ALL:
        if name != family:
            continue
        try:
            fault = judges[family].fault(changes)
        except Exception as error:  # an assertion would hide the cases behind it
            fault = f"{type(error).__name__}: {error}"
        if fault is not None:
            faults[json.dumps(changes)] = fault
    assert not faults


def test_the_files_as_they_are_pass(judges):
    """Otherwise nothing above would compare anything."""
    for judge in judges.values():
        assert judge.fault({}) is None
