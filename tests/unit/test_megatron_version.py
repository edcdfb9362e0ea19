"""A checkpoint of Megatron-Core 0.19 has no common.pt, and 0.16 would fail in it with an AttributeError."""

from __future__ import annotations

import pytest

from megatron_powerflow.checkpoint.megatron_version import refuse_newer
from megatron_powerflow.errors import UserError


def test_a_checkpoint_of_a_newer_megatron_is_refused_by_an_older_one(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(UserError, match=r"0.19 or newer wrote it, which the installed 0.16.1 cannot read"):
        refuse_newer(tmp_path, "0.16.1")
    for newer in ("0.19.2", "0.20.0rc1", "1.0"):
        refuse_newer(tmp_path, newer)


@pytest.mark.parametrize("names", [(), ("metadata.json", "common.pt"), ("common.pt",)])
def test_other_folders_are_not_its_business(tmp_path, names):
    """One of torch's own has no metadata.json; one of 0.16 has both files, and is read by all."""
    for name in names:
        (tmp_path / name).write_text("{}")
    refuse_newer(tmp_path, "0.16.1")
