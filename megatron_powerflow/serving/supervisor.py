"""Who keeps a server running? `powerflow serve`: it starts vLLM, announces it, starts it anew, and ends with the job.

A server that ends by itself, or that the trainer asks to be started anew, is started again, up to a number of times in
a row without having answered. What it prints goes into RUN/servers/HOST-PORT.log.

Left out: the command (`command_line.py`), the files (`announcements.py`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron_powerflow.checkpoint.folder import SERVERS_NAME
from megatron_powerflow.children import die_with_parent
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import environment_with
from megatron_powerflow.serving.announcements import (
    Announcement,
    remove_announcement,
    restart_is_asked,
    write_announcement,
)
from megatron_powerflow.serving.command_line import ServerCommand
from megatron_powerflow.serving.server import Server

LOOK_SECONDS = 0.5
START_SECONDS = 1800.0  # that a server may take until it answers: a large model is read from a shared disk
END_SECONDS = 30.0
MAX_FAILED_STARTS = 3
LAST_LINES = 15
# A line that names an exception, as Python writes it, with or without what vLLM's loggers put before it.
EXCEPTION = re.compile(r"(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
SHOWN_EXCEPTIONS = 3  # of a server that does not start; the first is the cause, the others follow from it


class Supervisor:
    """Runs one server until it is told to end.

    host: the name that the trainer finds this machine by. say: for people.
    """

    def __init__(self, run: Path, command: ServerCommand, *, host: str, port: int, say: Callable[[str], None]) -> None:
        self._run, self._command, self._say, self._port = run, command, say, port
        self._name, self._server = f"{host}-{port}", Server(f"http://{host}:{port}")
        self._log = run / SERVERS_NAME / f"{self._name}.log"
        self._began_at = 0  # where the log of the present start begins
        self._ending = False

    def run(self) -> None:
        """Start the server, and again whenever it ends. Returns after SIGTERM or SIGINT. Raises UserError where it
        does not come to answer."""
        self._require_port()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        failed = 0
        try:
            while not self._ending and failed < MAX_FAILED_STARTS:
                answered = self._one_start()
                failed = 0 if answered else failed + 1
        finally:
            remove_announcement(self._run, self._name)
        if not self._ending:
            raise UserError(
                f"the vLLM server at {self._server.url} ended {failed} times before it answered; its last words, of "
                f"{self._log}:\n{self._last_words()}\nits command: {self._command.text}"
            )

    def _require_port(self) -> None:
        """Raise UserError where somebody listens at the port: their answers would be taken for the server's."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", self._port))
            except OSError as error:
                raise UserError(
                    f"port {self._port} of this machine cannot be listened at ({error.strerror}); end what listens "
                    "there, or choose another rollout.vllm.port"
                ) from None

    def _end(self, *_) -> None:
        self._ending = True

    def _one_start(self) -> bool:
        """Run the server once, to its end. Returns whether it ever answered."""
        started, answered = uuid.uuid4().hex, False
        with self._log.open("ab") as log:
            self._began_at = log.tell()
            process = subprocess.Popen(
                self._command.arguments,
                env=environment_with(self._command.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        self._say(f"vLLM server {self._server.url}: starting (pid {process.pid}, {self._log})")
        began = time.monotonic()
        try:
            while not self._ending and process.poll() is None:
                if not answered and self._server.is_healthy(seconds=2.0):
                    answered = True
                    write_announcement(self._run, self._name, Announcement(self._server.url, started, process.pid))
                    self._say(f"vLLM server {self._server.url}: answers after {time.monotonic() - began:.0f} s")
                if answered and restart_is_asked(self._run, self._name, started):
                    self._say(f"vLLM server {self._server.url}: started anew, as the trainer asks")
                    break
                if not answered and time.monotonic() - began > START_SECONDS:
                    self._say(f"vLLM server {self._server.url}: no answer within {START_SECONDS:.0f} s")
                    break
                time.sleep(LOOK_SECONDS)
        finally:
            remove_announcement(self._run, self._name)
            _end_group(process)
        if not self._ending:
            self._say(f"vLLM server {self._server.url}: ended with {process.returncode}")
        return answered

    def _last_words(self) -> str:
        """Return what the last start's log says of its end: the first exceptions in it, else its last lines."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._began_at)
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        exceptions = [match[1] for line in lines if (match := EXCEPTION.match(line))]
        return "\n".join(list(dict.fromkeys(exceptions))[:SHOWN_EXCEPTIONS] or lines[-LAST_LINES:])


def _end_group(process: subprocess.Popen) -> None:
    """End the server and the processes that it started: first in peace."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            if number == signal.SIGTERM:
                continue  # the others of its group may still be there
