"""Processes that stay: four of them import torch and Megatron-Core once, and run a test's function as real gloo ranks.

Starting a process costs ten seconds of imports; with these a distributed test costs what it computes. The processes
rendezvous anew for each call, through the environment, as under torchrun.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable

MAX_RANKS = 4
TIMEOUT_SECONDS = 600


def _serve(pipe) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from megatron_powerflow.parallel.initialize import prepare_imports

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
        try:
            pipe.send(answer)
        except Exception as error:  # an answer that cannot travel is the test's mistake
            pipe.send((False, (type(error).__name__, (str(error),), "the function's answer cannot be pickled")))


class RankFailed(AssertionError):
    """The first failure of any rank. kind: name of the exception; violations: what a UserError listed."""

    def __init__(self, rank: int, kind: str, violations: tuple[str, ...], text: str) -> None:
        super().__init__(f"rank {rank} raised {kind}:\n{text}")
        self.kind, self.violations = kind, violations


class GlooWorkers:
    """run(n, function, ...) -> the answers of ranks 0..n-1, n <= max_ranks. The function is module-level."""

    def __init__(self, max_ranks: int = MAX_RANKS) -> None:
        self._max_ranks = max_ranks
        self._workers: list = []

    def run(self, num_ranks: int, function: Callable, *args, **kwargs) -> list:
        assert num_ranks <= self._max_ranks
        self._start()
        payload = pickle.dumps((function, args, kwargs))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
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
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(answers) < num_ranks:
            for rank in range(num_ranks):
                process, pipe = self._workers[rank]
                if rank in answers or not pipe.poll(0.02):
                    continue
                try:
                    fine, answer = pipe.recv()
                except EOFError:
                    self.stop()
                    raise RankFailed(rank, "ProcessDied", (), f"exit code {process.exitcode}") from None
                if not fine:
                    self.stop()  # the other ranks may wait for this one for ever
                    raise RankFailed(rank, *answer)
                answers[rank] = answer
            if time.monotonic() > deadline:
                missing = sorted(set(range(num_ranks)) - set(answers))
                self.stop()
                raise RankFailed(missing[0], "Timeout", (), f"ranks {missing} gave no answer in {TIMEOUT_SECONDS} s")
        return [answers[rank] for rank in range(num_ranks)]

    def _start(self) -> None:
        if self._workers:
            return
        context = multiprocessing.get_context("spawn")
        for _ in range(self._max_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def stop(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []
