"""How is a run's state put on disk so that a crash loses nothing that was finished, and training hardly waits?

    RUN/checkpoints/step_000050/     policy/   torch_dist shards of weights and optimizer (any layout can load them)
                                     hf/       the source's config.json, tokenizer, generation config, chat template
                                     log_z_head.safetensors, progress.json, config.yaml, inputs.json, SHA256SUMS
    RUN/checkpoints/latest           the name of the newest complete and sound checkpoint

A save begins with a copy of the state in host memory, which a thread of each rank writes, syncs and hashes while
training goes on. At the end of a later step, when all ranks have written, the folder gets its name: it is written under
another one and renamed when complete, and `latest` is replaced after that. A full disk or a kill in between leaves the
checkpoint before as it was.

Left out: loading (`storage.py`); who writes which shard (`shards.py`).
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from megatron_powerflow.checkpoint.choice import flaw_of, is_sound, latest_of, step_of
from megatron_powerflow.checkpoint.contents import Sums, is_finite, sums_of
from megatron_powerflow.checkpoint.digests import SUMS_NAME, digest_of, write_sums
from megatron_powerflow.checkpoint.folder import (
    CONFIG_NAME,
    HEAD_NAME,
    HF_NAME,
    INPUTS_NAME,
    LATEST_NAME,
    POLICY_NAME,
    PROGRESS_NAME,
    checkpoint_name,
    checkpoints_of,
)
from megatron_powerflow.checkpoint.keeping import Keeping, steps_to_remove
from megatron_powerflow.checkpoint.shards import AsyncRequest, HeldWriter, ShardWriter, finalize, host_copy
from megatron_powerflow.checkpoint.state import Proof, RunProgress, Trainable, progress_text
from megatron_powerflow.checkpoint.storage import (
    IO_ERRORS,
    METADATA,
    moments_of,
    optimizer_step,
    proof_of,
    sharded_state,
)
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.files import copy_companions
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import any_rank, attempt, gather_to_main, on_main, raise_together
from megatron_powerflow.whole_files import PARTIAL_SUFFIX, sync, write_file

ROOM_BYTES = 2**18  # for what a save writes before its shards


@dataclass
class Pending:
    """A save that this rank has begun. What the thread finds out is set when it has ended."""

    progress: RunProgress
    partial: Path
    writer: HeldWriter
    request: AsyncRequest
    optimizer_step: int
    head: dict[str, Tensor] | None
    thread: threading.Thread = field(init=False)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # from then until all files of this rank were on the disk
    failure: BaseException | None = None
    digests: dict[str, str] = field(default_factory=dict)
    sums: Sums = field(default_factory=Sums)


class Saver:
    """The checkpoints that a run writes. A context: nothing is being written any more when it ends.

    run: its folder. companions: the HF folder whose small files make a checkpoint self-contained. asynchronous: False
    where each save waits for the disk. say: prints a line, on the main rank. saved: is told the step
    of each checkpoint that has become `latest`, on the main rank; may raise OSError.
    """

    def __init__(
        self,
        run: Path,
        groups: Groups,
        *,
        companions: Path,
        keeping: Keeping,
        asynchronous: bool,
        say: Callable[[str], None],
        saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._run, self._groups, self._companions = run, groups, companions
        self._keeping, self._asynchronous, self._say = keeping, asynchronous, say
        self._saved = saved
        self._shards: ShardWriter | None = None
        self._pending: Pending | None = None
        self._removal: threading.Thread | None = None  # of old checkpoints, on the main rank
        self.seconds: float | None = None  # that the last checkpoint took to be on the disk, on this rank

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_) -> None:
        """Wait for this rank's thread; what it wrote stays unfinished where the run fails. Not collective: the other
        ranks may be gone."""
        if self._pending is not None:
            self._pending.thread.join()
        self._wait_for_removal()

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint is being written: the same on all ranks."""
        return self._pending is not None

    def remove_old(self, step: int) -> None:
        """Remove the checkpoints that a kill kept from being removed, after `latest` was written. Collective.

        step: that this start continues from; nothing goes unless `latest` names it. Where the killed start had just
        written its last checkpoint, no save of this one would remove them.
        """

        def remove() -> None:
            newest = self._run / "checkpoints" / checkpoint_name(step)
            if latest_of(self._run) == newest.name and newest.is_dir():
                self._prune(newest)

        on_main(remove, self._groups)

    def save(self, trainable: Trainable, progress: RunProgress, *, wait: bool) -> None:
        """Begin a checkpoint of this step. Collective; it finishes the one before first.

        wait: finish it, too. Raises UserError when the disk fills up or cannot be written, of this checkpoint or of the
        one before; the last finished one is still there then.
        """
        self.settle(wait=True)
        self._pending = self._begin(trainable, progress)
        self.settle(wait=wait or not self._asynchronous)

    def settle(self, *, wait: bool = False, skipping: bool = False) -> None:
        """Finish the checkpoint that is being written, once all ranks have written theirs. Collective.

        wait: for that. skipping: whether the step since then was skipped; then it does not become `latest`. Raises
        UserError where any rank could not write; the last finished checkpoint is there then.
        """
        pending = self._pending
        if pending is None:
            return
        if wait:
            pending.thread.join()
        elif any_rank(pending.thread.is_alive(), self._groups):
            return
        self._pending = None
        if pending.failure is not None and not isinstance(pending.failure, (UserError, *IO_ERRORS)):
            raise pending.failure  # a fault of the program: with its traceback
        self._stop_together(pending.failure, pending.partial)
        failure = attempt(lambda: finalize(pending.writer, pending.request), *IO_ERRORS)
        self._stop_together(failure, pending.partial)
        pending.writer.release()
        self.seconds = pending.seconds
        shares = gather_to_main((pending.digests, pending.sums), self._groups)
        failure, notice = None, None
        if shares is not None:

            def finish() -> None:
                nonlocal notice
                notice = self._finish(pending, shares, skipping)

            failure = attempt(finish, *IO_ERRORS)
        self._stop_together(failure, pending.partial)
        if notice is not None:
            self._say(notice)

    def _begin(self, trainable: Trainable, progress: RunProgress) -> Pending:
        """Copy this rank's part of the state, and start to write it. Collective."""
        groups = self._groups
        partial = self._run / "checkpoints" / (checkpoint_name(progress.step) + PARTIAL_SUFFIX)
        self._wait_for_removal()
        failure = attempt(lambda: _fresh_folder_with_room(partial), *IO_ERRORS) if groups.is_main else None
        self._stop_together(failure, partial)
        if self._shards is None:
            self._shards = ShardWriter(asynchronous=self._asynchronous)
        shards, held = self._shards, []

        def hold() -> None:
            state = sharded_state(trainable, is_loading=False)
            moments = moments_of(trainable, to_save=True)
            held.append(shards.begin(state, moments, partial / POLICY_NAME, METADATA))

        self._stop_together(attempt(hold, *IO_ERRORS), partial)
        ((writer, request),) = held
        head = None
        if trainable.head is not None and groups.tp_rank == groups.cp_rank == groups.dp_rank == 0:
            head = head_tensors(trainable.head)
        pending = Pending(progress, partial, writer, request, optimizer_step(trainable, groups), head)
        pending.thread = threading.Thread(target=self._write, args=(pending,), name="checkpoint", daemon=True)
        pending.thread.start()
        return pending

    def _write(self, pending: Pending) -> None:
        """What the thread does: this rank's files, their digests, and the sums of what they hold."""

        def work() -> None:
            partial = pending.partial
            pending.writer.write()
            names = sorted(path.name for path in (partial / POLICY_NAME).glob(f"__{self._groups.rank}_*"))
            written = [Path(POLICY_NAME, name) for name in names]
            if pending.head is not None:
                save_head(partial / HEAD_NAME, pending.head)
                written.append(Path(HEAD_NAME))
            if self._groups.is_main:
                copy_companions(self._companions, partial / HF_NAME, dtype=None)
                for name in (CONFIG_NAME, INPUTS_NAME):
                    shutil.copyfile(self._run / name, partial / name)
                written += [path.relative_to(partial) for path in (partial / HF_NAME).rglob("*") if path.is_file()]
                written += [Path(CONFIG_NAME), Path(INPUTS_NAME)]
            for path in written:
                sync(partial / path)
            pending.digests = {path.as_posix(): digest_of(partial / path) for path in written}
            pending.sums = sums_of(pending.writer.pieces()) + _of_head(pending.head)

        pending.failure = attempt(work, Exception)  # raised where the ranks meet
        pending.seconds = time.monotonic() - pending.began

    def _finish(self, pending: Pending, shares: Sequence[tuple[dict[str, str], Sums]], skipping: bool) -> str | None:
        """Write the last files and the digests, then the name, then `latest`; then the old ones go. For the main rank.

        Returns what a user should know of it.
        """
        partial, progress = pending.partial, pending.progress
        proof = proof_of(sum((sums for _, sums in shares), Sums()), pending.optimizer_step)
        (partial / PROGRESS_NAME).write_text(progress_text(progress, proof), encoding="utf-8")
        digests = {name: digest for share, _ in shares for name, digest in share.items()}
        files = [path for path in partial.rglob("*") if path.is_file()]
        for path in files:  # those of the finish: the index, the progress
            name = path.relative_to(partial).as_posix()
            if name not in digests:
                sync(path)
                digests[name] = digest_of(path)
        write_sums(partial, digests)
        for path in (partial / SUMS_NAME, *(path for path in partial.rglob("*") if path.is_dir()), partial):
            sync(path)
        final = partial.with_suffix("")
        _rename(partial, final)
        if why := _unsound(progress, proof, skipping):
            return (
                f"{final.name} is written and does not become `latest`, because {why}; no checkpoint is removed. "
                f"checkpoint.resume={final.name} would continue from it"
            )
        write_file(final.with_name(LATEST_NAME), final.name + "\n")
        self._saved(progress.step)
        self._prune(final)
        return None

    def _prune(self, saved: Path) -> None:
        """Take the names of old checkpoints away, and then, in a thread, what they hold: that can take as long as a
        step. A kill in between leaves what the next start takes for a checkpoint that was being written."""
        if self._keeping.keep is None:
            return
        known = {step_of(path): path for path in checkpoints_of(self._run)}
        sound = {step: flaw_of(path) is None and is_sound(path) for step, path in known.items()}
        step = step_of(saved)
        nameless = []
        for old in steps_to_remove(sound, saved=step, latest=step, keeping=self._keeping):
            nameless.append(known[old].with_name(known[old].name + PARTIAL_SUFFIX))
            known[old].rename(nameless[-1])
        if nameless:
            self._removal = threading.Thread(target=_remove, args=(nameless,), name="old checkpoints", daemon=True)
            self._removal.start()

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()

    def _stop_together(self, failure: BaseException | None, partial: Path) -> None:
        """Where any rank has failed, a UserError on all of them, and the unfinished folder away."""
        try:
            raise_together(
                failure,
                lambda text: (
                    f"{partial.with_suffix('')}: the checkpoint could not be written ({text}); earlier checkpoints "
                    "are untouched; free space on that disk and start the same command again"
                ),
                self._groups,
            )
        except UserError:
            if self._groups.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def head_tensors(head: LogZHead) -> dict[str, Tensor]:
    """Copies of what is saved of a log Z' head, in host memory."""
    return {f"head.{name}": host_copy(value) for name, value in head.state_dict().items()}


def save_head(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write them. Raises OSError or SafetensorError."""
    path.write_bytes(save(tensors))  # not save_file, whose files only their owner can read


def _remove(folders: Sequence[Path]) -> None:
    """What cannot be removed now is removed by the next start."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _fresh_folder_with_room(partial: Path) -> None:
    """An empty folder, where there is room for the first files: Megatron's main rank writes them while the others wait
    for it, and would leave them waiting."""
    shutil.rmtree(partial, ignore_errors=True)
    (partial / POLICY_NAME).mkdir(parents=True)
    room = partial / "room"
    room.write_bytes(bytes(ROOM_BYTES))
    sync(room)
    room.unlink()


def _of_head(head: dict[str, Tensor] | None) -> Sums:
    """Only whether it is finite: its one file has a digest, and no layout splits it."""
    return Sums(is_finite=all(is_finite(value) for value in (head or {}).values()))


def _rename(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name; one of that name, of another course of the run, goes."""
    old = final.with_name(final.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def _unsound(progress: RunProgress, proof: Proof, skipping: bool) -> str | None:
    if not proof.is_finite:
        return "weights are not finite"
    if progress.skipped_in_a_row:
        return f"steps are being skipped ({progress.skipped_in_a_row} in a row)"
    if skipping:
        return "the step after it had to be skipped"
    return None
