"""What does a model's folder hold? Step, layout, config and every tensor; of a Hugging Face folder too. And
what a store of reference scores holds.

python tools/inspect_checkpoint.py runs/local
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_powerflow.cli.leaving import exit_codes
from megatron_powerflow.parallel.launch import read_launch


def main(
    folder: Annotated[
        Path, typer.Argument(help="Hugging Face folder, run folder, checkpoint, converted one or model.reference_store")
    ],
    step: Annotated[int | None, typer.Option(help="of a run folder; default: its latest")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Print the step, the layout it was saved under, the config and every tensor of a model's folder.

    Example: python tools/inspect_checkpoint.py runs/local
    """
    from megatron_powerflow.converter.inspect import describe, inspect

    found = inspect(folder, step)
    if read_launch().is_main:
        print(json.dumps(found, indent=2) if as_json else describe(found))


if __name__ == "__main__":
    exit_codes(lambda: typer.run(main))
