"""`powerflow` with servers that do something wrong: by `faults/faulty_on_server.py`, or with raw log-probs."""

from __future__ import annotations

import os

from megatron_powerflow.cli import main
from megatron_powerflow.serving import command_line

if "POWERFLOW_TEST_FAULTS" in os.environ:
    command_line.WORKER = "faulty_on_server.Weights"
    command_line.PATHS = (*command_line.PATHS, os.environ["POWERFLOW_TEST_FAULTS"])
if "POWERFLOW_TEST_RAW" in os.environ:
    command_line.LOG_PROBS = "raw_logprobs"

if __name__ == "__main__":
    main()
