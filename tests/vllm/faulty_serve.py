"""`powerflow` with servers whose workers import `faults/faulty_on_server.py`."""

from __future__ import annotations

import os

from megatron_powerflow.cli import main
from megatron_powerflow.serving import command_line

command_line.WORKER = "faulty_on_server.Weights"
command_line.PATHS = (*command_line.PATHS, os.environ["POWERFLOW_TEST_FAULTS"])

if __name__ == "__main__":
    main()
