"""Who may write in a folder? One process at a time: a lock file names it, and tells others when it is gone.

    run.lock    {"token", "host", "boot", "pid_space", "pid", "process_start", "job", "restarts", "since", "what"}

A lock is made under another name and linked into place: it appears whole, and link(2) fails where one is there, on
network file systems too. While its owner lives, a thread touches it every BEAT_SECONDS. An owner is gone

- when its process is: asked of the kernel, where the lock was made on this host, since its last start, among the
  processes that this one sees. The process's own start time tells it from a later one with its number;
- when the same SLURM job has been started again since;
- elsewhere when it has not touched its lock for STALE_SECONDS.

A lock of an owner that is gone is succeeded, not removed: its successor links LOCK.after-TOKEN, which only one of many
can, looks whether that ends the chain that begins at LOCK, and renames it to LOCK. LOCK is never missing in between,
and a successor that was killed half-way can be succeeded in its turn.

A file of that name that is none of ours (`--out uv` beside uv.lock) is never succeeded, however old: it is refused.

Left out: what is written in the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.slurm_job import read_job

BEAT_SECONDS = 20.0
STALE_SECONDS = 300.0
ATTEMPTS = 50
START = '{"token": "'  # of a lock of ours, as `json.dumps` writes a Holder
FOREIGN = "foreign"  # token of a holder that stands for a file of somebody else's
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, slots=True)
class Holder:
    """What a lock says of its owner.

    since: seconds since 1970. process_start: the kernel's ticks; None: not known. boot, pid_space: which start of the
    host, and which numbering of processes (a container has one of its own). what: the command, for people.
    """

    token: str
    host: str
    boot: str
    pid_space: str
    pid: int
    process_start: int | None
    job: str | None
    restarts: int
    since: float
    what: str

    def describe(self) -> str:
        """Return the command, the process, its host and job, and since when it holds the lock, for people."""
        job = f", job {self.job}" if self.job else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.what} (process {self.pid} on {self.host}{job}) since {when}"


def this_process(what: str) -> Holder:
    """Return this process as the holder of a new lock. what: the command, for people."""
    job = read_job()
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        boot=_boot(),
        pid_space=_pid_space(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()),
        job=job.id if job else None,
        restarts=job.restarts if job else 0,
        since=time.time(),
        what=what,
    )


class Owner:
    """The lock of one folder, for this process; a context that releases what was taken, however it ends.

    guarded: the folder; lock: the file that says whose it is, in it or beside it. what: the command, for people. `take`
    makes the folder of the lock; on release those folders that it made are removed if nothing was put in them.
    """

    def __init__(self, guarded: Path, lock: Path, what: str) -> None:
        self.guarded, self.lock = guarded, lock
        self._what = what
        self._mine: Holder | None = None
        self._made: list[Path] = []  # folders, innermost first
        self._ended = threading.Event()

    @property
    def taken(self) -> bool:
        """Whether the folder was taken and has not been released."""
        return self._mine is not None

    def take(self) -> None:
        """Take the folder for this process, or do nothing where this owner holds it already.

        Raises UserError, and leaves nothing, where another process holds the folder or it cannot be written.
        """
        if self.taken:
            return
        mine = this_process(self._what)
        try:
            try:
                self._make_folder()
                _take(self.guarded, self.lock, mine)
            except FileNotFoundError:  # another start, which was refused, took the folder that it had made away
                self._make_folder()
                _take(self.guarded, self.lock, mine)
        except OSError as error:
            self._remove_folders()
            raise UserError(f"{self.guarded}: cannot be written ({error}); mend that or write elsewhere") from None
        except UserError:
            self._remove_folders()
            raise
        self._mine = mine
        self._ended.clear()
        threading.Thread(target=self._beat, name=f"lock of {self.guarded.name}", daemon=True).start()

    def holds(self) -> bool:
        """Whether the folder was taken and is still this owner's."""
        return self._mine is not None and _holder_at_end(self.lock) == self._mine

    def confirm(self) -> None:
        """Raise UserError where another process has taken the folder over: this one looked dead for too long.

        Does nothing where the folder is not taken.
        """
        if self._mine is not None and not self.holds():
            holder = _holder_at_end(self.lock)
            now = holder.describe() if holder else "nobody: its lock is gone"
            raise UserError(
                f"{self.guarded}: was taken over while this process could not be seen to live for "
                f"{STALE_SECONDS:.0f} s, and is held by {now}; this process ends and writes nothing more"
            )

    def release(self) -> None:
        """Release the folder if it is held, and remove the folders that `take` made if they are empty."""
        self._ended.set()
        mine, self._mine = self._mine, None
        if mine is not None:
            with contextlib.suppress(OSError):
                if _read(self.lock) == mine:
                    self.lock.unlink()
        self._remove_folders()

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _beat(self) -> None:
        mine, ended = self._mine, self._ended
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a server that is away for a while
                if _read(self.lock) == mine:
                    os.utime(self.lock)

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.lock.parent, *self.lock.parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another start's
                folder.mkdir()
                self._made.insert(0, folder)

    def _remove_folders(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty, or not there any more
                folder.rmdir()
        self._made = []


def has_ended(holder: Holder) -> bool:
    """Whether this process is known to have ended: False where it cannot be seen from here."""
    return is_seen_from_here(holder) and not _lives(holder)


def held_by_another(guarded: Path, lock: Path) -> str | None:
    """Return the reason for which `Owner.take` would fail here and now; None where it would not. Reads only."""
    for path, holder in [*_chain(lock)][-1:]:
        if not _is_gone(holder, path, time.time()):
            return _refusal(guarded, path, holder)
    return None


def _refusal(guarded: Path, path: Path, holder: Holder) -> str:
    if holder.token == FOREIGN:
        return f"{guarded}: {path.name} is in the way and no lock of ours; move it away, or write elsewhere"
    text = f"{guarded}: is held by {holder.describe()}; wait for it to end, stop it, or write elsewhere"
    if is_seen_from_here(holder):
        return text
    return (
        f"{text}. If it was killed, start again when its lock {path.name} has not been touched for "
        f"{STALE_SECONDS:.0f} s: a living one touches it every {BEAT_SECONDS:.0f} s"
    )


def _take(guarded: Path, lock: Path, mine: Holder) -> None:
    """Make `mine` the holder of `lock`. Raises UserError where another one is and lives."""
    new = lock.with_name(f"{lock.name}.new-{mine.token}")
    try:
        new.write_text(json.dumps(asdict(mine)), encoding="utf-8")
        for _ in range(ATTEMPTS):
            os.utime(new)
            now = new.stat().st_mtime  # by the clock of the file server, as the time of the lock is
            chain: list[tuple[Path, Holder | None]] = [(lock, None), *_chain(lock)]
            path, holder = chain[-1]
            if holder is not None and not _is_gone(holder, path, now):
                raise UserError(_refusal(guarded, path, holder))
            end = lock if holder is None else _after(lock, holder)
            if _link(new, end):
                if _holder_at_end(lock) == mine:
                    if holder is not None:
                        end.rename(lock)
                        _sweep(lock, now)
                    return
                end.unlink(missing_ok=True)
            time.sleep(random.uniform(0.01, 0.1))
    finally:
        new.unlink(missing_ok=True)
    raise UserError(f"{guarded}: many processes start there at once; let one of them start")


def _chain(lock: Path) -> Iterator[tuple[Path, Holder]]:
    """Yield the lock and those that succeeded it, each with its path."""
    path, seen = lock, set()
    while (found := _read(path)) is not None and found.token not in seen:
        seen.add(found.token)
        yield path, found
        path = _after(lock, found)


def _holder_at_end(lock: Path) -> Holder | None:
    return next((holder for _, holder in reversed([*_chain(lock)])), None)


def _after(lock: Path, holder: Holder) -> Path:
    return lock.with_name(f"{lock.name}.after-{holder.token}")


def _link(new: Path, path: Path) -> bool:
    """Link `path` to the file `new`, and tell whether it is that file now; False where something was there."""
    try:
        os.link(new, path)
    except FileExistsError:
        # also where the server made the link and its answer was lost on the way
        with contextlib.suppress(OSError):
            return os.path.samefile(new, path)
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with contextlib.suppress(FileExistsError), path.open("xb") as file:  # a file system without links
            file.write(new.read_bytes())
            return True
        return False
    return True


def _sweep(lock: Path, now: float) -> None:
    """Remove what killed processes left while they took the lock. Only the holder of the lock may call it.

    Files of processes that live stay: they are just making them.
    """
    for path in (*lock.parent.glob(f"{lock.name}.after-*"), *lock.parent.glob(f"{lock.name}.new-*")):
        found = _read(path)
        if found is not None and _is_gone(found, path, now):
            path.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    """Read the holder of a lock; None where there is no file.

    The holder of a lock that is damaged, or being written, is not known; that of a file that begins like no lock is
    FOREIGN.
    """
    try:
        since = path.stat().st_mtime
        if not path.is_file():  # a folder, a pipe, a device
            return _unknown(FOREIGN, since)
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _holder(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return _unknown("unknown" if text.startswith(START) or START.startswith(text) else FOREIGN, since)


def _unknown(token: str, since: float) -> Holder:
    """Make a holder of whom nothing is known. since: seconds since 1970."""
    return Holder(token, "a host that its lock does not name", "", "", 0, None, None, 0, since, "a process")


def _holder(values: dict[str, Any]) -> Holder:
    """Make a holder of the values of a lock.

    Raises TypeError or ValueError for anything but what `this_process` makes.
    """
    holder = Holder(**values)
    texts = (holder.token, holder.host, holder.boot, holder.pid_space, holder.what)
    numbers = (holder.pid, holder.restarts)
    fine = all(type(value) is str for value in texts) and all(type(value) is int for value in numbers)
    if not fine or not holder.token.isalnum() or not isinstance(holder.since, int | float):
        raise ValueError("not a lock of ours")
    if type(holder.process_start) not in (int, type(None)) or type(holder.job) not in (str, type(None)):
        raise ValueError("not a lock of ours")
    time.localtime(holder.since)
    return holder


def is_seen_from_here(holder: Holder) -> bool:
    """Whether the holder's process number means something to this process."""
    return (holder.host, holder.boot, holder.pid_space) == (socket.gethostname(), _boot(), _pid_space())


def _is_gone(holder: Holder, path: Path, now: float) -> bool:
    if holder.token == FOREIGN:
        return False
    if is_seen_from_here(holder):
        return not _lives(holder)
    job = read_job()
    if job is not None and job.id == holder.job and holder.restarts < job.restarts:
        return True
    try:
        return now - path.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return True  # just given free, or renamed by its successor: what is done next finds out


def _lives(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's process
    if holder.process_start is None:
        return True
    now = _process_start(holder.pid)
    return now is None or now == holder.process_start


def _process_start(pid: int) -> int | None:
    """Return the kernel's clock ticks at which a process began.

    -1 for one that has ended and was not waited for; None where the kernel does not say.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name before it may hold spaces
    except OSError:
        return None
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def _boot() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    return ""


def _pid_space() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
