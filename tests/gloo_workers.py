"""Processes that stay: four of them import torch and Megatron-Core once, and run a test's function as real gloo ranks.

Starting a process costs ten seconds of imports; with these a distributed test costs what it computes. The processes
rendezvous anew for each call, through the environment, as under torchrun.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable

from tests.free_ports import free_port

MAX_RANKS = 4
TIMEOUT_SECONDS = 600
# Process groups that have ended keep their threads as long as anything refers to them, and each wakes a hundred times a
# second: a thousand of them take more time than the tests. A process with more than these is replaced.
MAX_THREADS = 150
GRACE_SECONDS = 5  # after a rank has failed, for the others to do so


def _serve(pipe) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from megatron_powerflow.parallel.initialize import prepare_imports, tear_down

    torch.set_num_threads(1)
    prepare_imports()
    while True:
        try:
            environment, payload = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            function, args, kwargs = pickle.loads(payload)
            answer = (True, function(*args, **kwargs))
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            answer = (False, (type(error).__name__, getattr(error, "violations", (str(error),)), text))
        tear_down()  # what a run that failed leaves to the end of its process
        gc.collect()
        is_tired = len(os.listdir("/proc/self/task")) > MAX_THREADS
        try:
            pipe.send((*answer, is_tired))
        except Exception as error:  # an answer that cannot travel is the test's mistake
            text = "the function's answer cannot be pickled"
            pipe.send((False, (type(error).__name__, (str(error),), text), is_tired))


def _end_with_parent() -> None:
    """A run takes SIGTERM for a request to save, so that tests that were ended would leave their runs behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


class RankFailed(AssertionError):
    """The first failure of any rank. kind: name of the exception; violations: what a UserError listed."""

    def __init__(self, rank: int, kind: str, violations: tuple[str, ...], text: str) -> None:
        super().__init__(f"rank {rank} raised {kind}:\n{text}")
        self.kind, self.violations = kind, violations


class GlooWorkers:
    """run(n, function, ...) -> the answers of ranks 0..n-1, n <= max_ranks. The function is module-level."""

    def __init__(self, max_ranks: int = MAX_RANKS) -> None:
        self._max_ranks = max_ranks
        self._workers: dict[int, tuple] = {}  # rank -> (process, our end of its pipe); started when first needed

    def run(self, num_ranks: int, function: Callable, *args, **kwargs) -> list:
        assert num_ranks <= self._max_ranks
        self._start(num_ranks)
        payload = pickle.dumps((function, args, kwargs))
        port = free_port()
        for rank in range(num_ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            self._workers[rank][1].send((environment, payload))
        return self._collect(num_ranks)

    def _collect(self, num_ranks: int) -> list:
        answers: dict[int, object] = {}
        failure: RankFailed | None = None  # the first one
        deadline = time.monotonic() + TIMEOUT_SECONDS
        missing = set(range(num_ranks))
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                process, pipe = self._workers[rank]
                if not pipe.poll(0.02):
                    continue
                missing.discard(rank)
                try:
                    fine, answer, is_tired = pipe.recv()
                except EOFError:
                    is_tired = True
                    process.join()
                    fine, answer = False, ("ProcessDied", (), f"exit code {process.exitcode}")
                if is_tired:
                    self._stop(rank)
                answers[rank] = answer
                if not fine and failure is None:
                    failure = RankFailed(rank, *answer)
                    # the others fail with it, or wait for it for ever
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank in missing:
            self._stop(rank)
        if failure is not None:
            raise failure
        if missing:
            text = f"ranks {sorted(missing)} gave no answer in {TIMEOUT_SECONDS} s"
            raise RankFailed(min(missing), "Timeout", (), text)
        return [answers[rank] for rank in range(num_ranks)]

    def _start(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(num_ranks):
            if rank in self._workers:
                continue
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self._workers[rank] = process, ours

    def _stop(self, rank: int) -> None:
        process, pipe = self._workers.pop(rank)
        pipe.close()
        process.join(timeout=0.5)
        if process.is_alive():
            process.kill()
            process.join()

    def stop(self) -> None:
        for rank in [*self._workers]:
            self._stop(rank)
