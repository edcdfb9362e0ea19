"""What does `powerflow serve` say of a server that does not come to answer? Here a script that fails as vLLM does."""

from __future__ import annotations

import signal
import sys

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.serving.command_line import ServerCommand
from megatron_powerflow.serving.supervisor import SHOWN_EXCEPTIONS, Supervisor
from tests.free_ports import free_port

# as vLLM 0.32 writes it, with fewer frames
WITHOUT_MEMORY = """
(APIServer pid=5795) WARNING 11-28 09:07:25 [system_utils.py:255] Errors like `OSError: [Errno 24] Too many`
(VllmWorker-0 pid=5986) ERROR 11-28 09:07:38 [multiproc_executor.py:953]     raise ValueError(
(VllmWorker-0 pid=5986) ERROR 11-28 09:07:38 [multiproc_executor.py:953] ValueError: Available memory on node 0 is less
(EngineCore pid=5901) torch.OutOfMemoryError: planted
Traceback (most recent call last):
""" + "\n".join(f'  File "core.py", line {number}, in start' for number in range(40))
ROOT_CAUSE = "RuntimeError: Engine core initialization failed. See root cause above."
WITH_A_WRONG_ARGUMENT = "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --planted"


@pytest.fixture
def words(tmp_path):
    """What is said of a server that prints a text and ends with 1: while it runs, and in the end."""
    port = free_port()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def words_of(*texts: str) -> tuple[list[str], str]:
        said: list[str] = []
        for text in texts:
            script = f"import sys; print({text!r}); sys.exit(1)"
            command = ServerCommand((sys.executable, "-c", script), {})
            supervisor = Supervisor(tmp_path, command, host="127.0.0.1", port=port, say=said.append)
            with pytest.raises(UserError) as error:
                supervisor.run()
        return said, str(error.value)

    yield words_of
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_cause_is_told_and_not_the_last_lines_that_follow_from_it(words):
    said, end = words(WITHOUT_MEMORY + "\n" + ROOT_CAUSE)
    assert "ended 3 times before it answered" in end
    shown = end.splitlines()[1:-1]
    assert shown == ["ValueError: Available memory on node 0 is less", "torch.OutOfMemoryError: planted", ROOT_CAUSE]
    assert len(shown) == SHOWN_EXCEPTIONS
    assert [text for text in said if "ended with 1" in text]


def test_where_no_exception_is_named_the_last_lines_are_told(words):
    _, end = words(WITH_A_WRONG_ARGUMENT)
    assert "error: unrecognized arguments: --planted" in end


def test_what_an_earlier_start_wrote_is_no_cause(words):
    """The log of a server is one file for all of its starts."""
    _, end = words(ROOT_CAUSE, WITH_A_WRONG_ARGUMENT)
    assert "unrecognized arguments" in end
    assert ROOT_CAUSE not in end
