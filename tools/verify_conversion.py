"""Do two model folders hold the same model? Every bit of every tensor, and the log-probs of a text.

python tools/verify_conversion.py models/SmolLM2-135M-Instruct smollm2-megatron --card conversion_card.json
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_powerflow.cli.leaving import exit_codes
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import read_launch


def main(
    a: Annotated[
        str, typer.Argument(help="Hugging Face folder, run folder, checkpoint, converted one, or OWNER/NAME on the hub")
    ],
    b: Annotated[str, typer.Argument(help="the other one")],
    text: Annotated[Path | None, typer.Option(help="lines to score; default: three short ones")] = None,
    card: Annotated[Path | None, typer.Option(help="JSON to write; default: ./conversion_card.json")] = None,
    no_log_probs: Annotated[bool, typer.Option("--no-log-probs", help="compare tensors only")] = False,
) -> None:
    """Compare two model folders and write the proof as a JSON card. Exit code 2 where they differ.

    B may be A rounded to another dtype; the card counts such tensors apart. Under torchrun the ranks share the tensors,
    and log-probs are left out.

    Example: python tools/verify_conversion.py models/SmolLM2-135M-Instruct smollm2-megatron
    """
    from megatron_powerflow.converter.commands import TEXT, locate_models, verify

    if text is not None and no_log_probs:
        raise UserError("--text has no effect with --no-log-probs; remove one of them")
    texts = TEXT
    if text is not None:
        try:
            texts = tuple(line for line in text.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {text}: cannot be read: {error}") from None
    launch, command = read_launch(), shlex.join(["python", *sys.argv])
    located = locate_models({"A": a, "B": b}, launch)
    folders = located.folder(a), located.folder(b)
    verify(*folders, None if no_log_probs else texts, card, launch, make_console(), command)


if __name__ == "__main__":
    exit_codes(lambda: typer.run(main))
