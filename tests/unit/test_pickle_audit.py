"""A checkpoint's index is looked at before it is loaded: nothing it names ever runs."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from megatron_powerflow.checkpoint.pickle_audit import audit_checkpoint
from megatron_powerflow.errors import UserError


class Hostile:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        lambda marker: Hostile(os.system, f"touch {marker}"),
        lambda marker: {"state_dict_metadata": [Hostile(open, str(marker), "w")]},
        lambda marker: Hostile(eval, f"open({str(marker)!r}, 'w')"),
        lambda marker: Hostile(torch.save, 1, str(marker)),
        lambda marker: Hostile(__import__, "antigravity"),
    ],
)
def test_an_index_that_calls_something_is_refused_unrun(tmp_path, attack):
    marker = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(attack(marker)))
    with pytest.raises(UserError, match="refused"):
        audit_checkpoint(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04", pickle.dumps([1] * 100)[:-5]])
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="refused"):
        audit_checkpoint(tmp_path)


def test_a_missing_index_means_an_incomplete_checkpoint(tmp_path):
    with pytest.raises(UserError, match="not complete"):
        audit_checkpoint(tmp_path)


def test_a_checkpoint_of_megatron_without_its_common_file_is_incomplete(tmp_path):
    """Megatron-Core, which reads it first, would raise an AttributeError of its own. torch's own folders have none."""
    from torch.distributed import checkpoint

    checkpoint.save({"a": torch.randn(3)}, checkpoint_id=tmp_path)
    audit_checkpoint(tmp_path)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(UserError, match=r"common.pt: no such file; the checkpoint is not complete"):
        audit_checkpoint(tmp_path)
    (tmp_path / "common.pt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not complete"):
        audit_checkpoint(tmp_path)


def test_megatron_0_19_keeps_among_the_entries_what_0_16_keeps_in_the_common_file(tmp_path):
    from torch.distributed import checkpoint

    checkpoint.save({"a": torch.randn(3), "common_state/shard_0_1": [{"step": 3}]}, checkpoint_id=tmp_path)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    audit_checkpoint(tmp_path)


def test_an_entry_that_would_run_code_is_refused_unrun(tmp_path):
    """torch would read it with weights_only=False."""
    from torch.distributed import checkpoint

    marker = tmp_path / "ran"
    folder = tmp_path / "checkpoint"
    checkpoint.save({"a": torch.randn(3), "b": Hostile(os.system, f"touch {marker}")}, checkpoint_id=folder)
    with pytest.raises(UserError, match="b is damaged or not safe"):
        audit_checkpoint(folder)
    assert not marker.exists()


def test_an_index_that_points_outside_is_refused(tmp_path):
    from torch.distributed import checkpoint

    checkpoint.save({"a": torch.randn(3)}, checkpoint_id=tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        object.__setattr__(place, "relative_path", "../elsewhere")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="not stored as it is in this folder"):
        audit_checkpoint(tmp_path)


def test_a_real_index_passes(tmp_path):
    from torch.distributed import checkpoint

    state = {"a": torch.randn(3), "b": torch.zeros(2, dtype=torch.bfloat16), "c": {"plain": [1, "two", None]}}
    checkpoint.save(state, checkpoint_id=tmp_path)
    audit_checkpoint(tmp_path)


def packed(content: bytes) -> bytes:
    """The archive of torch.save, with its parts packed."""
    import io
    import zipfile

    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed.getvalue()


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused_unpacked(tmp_path):
    """16 MB of zeros in a few kB, in the place of common.pt and of an entry that is no tensor."""
    import io

    from torch.distributed import checkpoint

    file = io.BytesIO()
    torch.save({"zeros": torch.zeros(2**22)}, file)
    bomb = packed(file.getvalue())
    assert len(bomb) < 100_000
    checkpoint.save({"a": torch.randn(3)}, checkpoint_id=tmp_path)
    (tmp_path / "common.pt").write_bytes(file.getvalue())
    audit_checkpoint(tmp_path)
    (tmp_path / "common.pt").write_bytes(bomb)
    with pytest.raises(UserError, match=r"common.pt: refused"):
        audit_checkpoint(tmp_path)
    (tmp_path / "common.pt").unlink()
    (tmp_path / "entry").mkdir()
    checkpoint.save({"a": torch.randn(3), "b": {"plain": [1]}}, checkpoint_id=tmp_path / "entry")
    metadata = pickle.loads((tmp_path / "entry" / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
            (tmp_path / "entry" / "bomb").write_bytes(bomb)
            for name, value in {"relative_path": "bomb", "offset": 0, "length": len(bomb)}.items():
                object.__setattr__(place, name, value)
    (tmp_path / "entry" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="bytes that unpack to more"):
        audit_checkpoint(tmp_path / "entry")


def test_an_index_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(UserError, match="no ordinary file"):
        audit_checkpoint(tmp_path)
