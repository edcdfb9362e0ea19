"""How do the trainer's weights come onto a disk that the servers read? Tensor by tensor, under Hugging Face names.

    RUN/weights/START/step_000012/            all tensors: each pipeline stage, and each holder of experts, writes some
    RUN/weights/START/step_000012.changes/    or only the bytes that differ from the version before

The names are those of the converters (`hf/live_weights.py`), and no rank holds more than one gathered tensor at a
time. For changes a rank that writes keeps what it wrote last in host memory: the weights of its stage once.

Left out: weights that are on no disk (`weight_sender.py`), who loads the files (`weight_sync.py`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from torch import Tensor

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.live_weights import Chunk, hf_tensors, planned_files_of
from megatron_powerflow.hf.shapes import expected_tensors
from megatron_powerflow.hf.shard_files import ShardWriter
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, broadcast_object, on_main, raise_together
from megatron_powerflow.serving.manifest import Changes, Manifest, Probe
from megatron_powerflow.serving.on_server.powerflow_weight_files import changes_of, checksum, columns
from megatron_powerflow.serving.weight_totals import gathered

FOLDER_NAME = re.compile(r"step_\d{6,}(\.changes)?")
BUCKET_BYTES = 2**30  # of a file, and so of what a rank holds of changes at a time
WORTH_A_WHOLE = 0.5  # of the whole, that changes may add up to before everything is written anew


class WeightWriter:
    """Writes the versions of a run's weights into a folder. Every method but `close` is collective over the run.

    folder: of this start of the run alone, made here; what is in it is removed again.
    """

    def __init__(
        self,
        folder: Path,
        chunks: Sequence[Chunk],
        architecture: Architecture,
        family: Family,
        groups: Groups,
        *,
        as_changes: bool,
    ) -> None:
        self._folder, self._chunks, self._architecture, self._family = folder, chunks, architecture, family
        self._groups, self._as_changes = groups, as_changes
        self._before: dict[str, np.ndarray] = {}  # of the tensors that this rank writes, where only changes are written
        self._last: Manifest | None = None

    def write(self, version: str, step: int, probe: Probe) -> Manifest:
        """Write the weights as they are now. Raises UserError on every rank where the disk refuses."""
        last = self._last
        # of the main rank's numbers: every rank writes the same kind of files
        whole = broadcast_object(last is None or not self._as_changes or self._grown(last), self._groups)
        name = f"step_{step:06d}" + ("" if whole else ".changes")
        folder = self._folder / name
        on_main(lambda: self._fresh(folder), self._groups)
        written = self._write_whole(folder) if whole else self._write_changes(folder)
        totals = gathered(*written, expected_tensors(self._architecture, self._family), self._groups)
        changes: tuple[Changes, ...] = ()
        if whole or last is None:
            base, base_version = str(folder.resolve()), version
        else:
            own = Changes(last.version, version, str(folder.resolve()))
            base, base_version, changes = last.folder, last.folder_version, (*last.changes, own)
        self._last = Manifest(
            version,
            step,
            base,
            base_version,
            changes,
            totals.checksums,
            probe,
            totals.num_bytes,
            totals.whole_bytes,
            self._as_changes,
        )
        return self._last

    @staticmethod
    def _grown(last: Manifest) -> bool:
        """Whether the changes since everything was written are as much to read as a good part of everything."""
        size = sum(path.stat().st_size for one in last.changes for path in Path(one.folder).glob("*.safetensors"))
        return size > WORTH_A_WHOLE * last.whole_bytes

    def _fresh(self, folder: Path) -> None:
        """Make the folder, empty. What is in its place is of an earlier try of this run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        folder.mkdir()

    def forget_older(self) -> None:
        """Remove the folders that no server needs any more: those that the last version does not name."""
        last = self._last
        if last is None:
            return
        needed = {Path(last.folder).name, *(Path(one.folder).name for one in last.changes)}

        def remove() -> None:
            for path in self._folder.iterdir():
                ours = FOLDER_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
                if ours and path.name not in needed:
                    shutil.rmtree(path, ignore_errors=True)

        on_main(remove, self._groups)

    def close(self) -> None:
        """Remove the folder: no server needs it any more. On the main rank; nothing elsewhere."""
        if self._groups.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _writes(self) -> bool:
        return self._groups.edp_rank == 0

    def _write_whole(self, folder: Path) -> tuple[dict[str, str], int]:
        """Write every tensor of this rank's part; return its checksums and bytes."""
        checksums: dict[str, str] = {}
        num_bytes, failure = 0, None
        if self._writes:
            files = planned_files_of(self._chunks, self._architecture, self._family, self._groups, BUCKET_BYTES)
            writer = ShardWriter(folder, files)
            for name, tensor in self._tensors():
                if failure is None:  # after a failure only the gathers go on, for the ranks that wait in them
                    held = tensor.detach().cpu()
                    checksums[name] = checksum(held)
                    num_bytes += held.numel() * held.element_size()
                    if self._as_changes:
                        self._before[name] = columns(held).copy()
                    failure = attempt(partial(writer.add, name, held), OSError)
            writer.close() if failure is None else writer.abandon()
        raise_together(failure, self._failed(folder), self._groups)
        return checksums, num_bytes

    def _write_changes(self, folder: Path) -> tuple[dict[str, str], int]:
        """Write the bytes of this rank's part that changed; return the checksums of the whole tensors, and bytes."""
        checksums: dict[str, str] = {}
        bucket: dict[str, np.ndarray] = {}
        num_bytes = size = number = 0
        failure = None
        stem = f"stage-{self._groups.pp_rank:05d}-{self._groups.ep_rank:05d}"
        if self._writes:
            for name, tensor in self._tensors():
                if failure is not None:
                    continue
                held = tensor.detach().cpu()
                checksums[name], now = checksum(held), columns(held)
                found = changes_of(name, self._before[name], now)
                if found:
                    self._before[name][:] = now
                bucket |= found
                size += sum(values.nbytes for values in found.values())
                if size > BUCKET_BYTES:
                    failure = attempt(partial(_save, bucket, folder / f"{stem}-{number:05d}.safetensors"), OSError)
                    bucket, num_bytes, size, number = {}, num_bytes + size, 0, number + 1
            if failure is None and bucket:
                failure = attempt(partial(_save, bucket, folder / f"{stem}-{number:05d}.safetensors"), OSError)
                num_bytes += size
        raise_together(failure, self._failed(folder), self._groups)
        return checksums, num_bytes

    def _tensors(self):
        pairs: list[tuple[str, Tensor]]
        pairs = hf_tensors(self._chunks, self._architecture, self._family, self._groups)  # type: ignore[assignment]
        return pairs

    def _failed(self, folder: Path):
        return lambda text: f"{folder}: the weights for the servers could not be written ({text}); free that disk"


def _save(bucket: dict[str, np.ndarray], path: Path) -> None:
    path.write_bytes(save(bucket))  # not save_file, whose files only their owner can read
