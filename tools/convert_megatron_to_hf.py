"""Write a checkpoint, of a run under any layout or a converted one, as a plain Hugging Face folder.

python tools/convert_megatron_to_hf.py --checkpoint runs/local --out exported --verify
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_powerflow.cli.leaving import exit_codes
from megatron_powerflow.console import make_console
from megatron_powerflow.parallel.launch import command_line, read_launch


def main(
    checkpoint: Annotated[Path, typer.Option(help="run folder, checkpoint or converted checkpoint")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    step: Annotated[int | None, typer.Option(help="of a run folder; default: its latest")] = None,
    dtype: Annotated[Literal["bf16", "fp32", "fp16"] | None, typer.Option(help="default: as it is")] = None,
    max_shard_size: Annotated[str, typer.Option(help="largest file, like 5GB or 500MB")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify", help="read it back and compare every bit")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier conversion")] = False,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder, tensor by tensor, without building the model.

    Config, tokenizer, generation config and chat template are those of the model that the run started from; the log Z'
    head and the optimizer stay behind. Under torchrun the ranks share the files.

    Example: python tools/convert_megatron_to_hf.py --checkpoint runs/local --out exported --verify
    """
    from megatron_powerflow.converter.commands import convert, parse_size
    from megatron_powerflow.converter.convert import ConversionRequest

    request = ConversionRequest(
        checkpoint,
        out,
        dtype,
        max_shard_bytes=parse_size(max_shard_size),
        step=step,
        overwrite=overwrite,
        verify=verify,
        command=command_line("python", *sys.argv),
    )
    convert(request, read_launch(), make_console(), to_hf=True)


if __name__ == "__main__":
    exit_codes(lambda: typer.run(main))
