"""Write a Hugging Face folder as a Megatron torch_dist checkpoint, which every tp, pp, cp and ep loads.

python tools/convert_hf_to_megatron.py --hf models/SmolLM2-135M-Instruct --out smollm2-megatron --verify
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
    hf: Annotated[str, typer.Option(help="Hugging Face folder (safetensors), or OWNER/NAME[@REVISION] on the hub")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    dtype: Annotated[Literal["bf16", "fp32", "fp16"] | None, typer.Option(help="default: as it is")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="read it back and compare every bit")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier conversion")] = False,
) -> None:
    """Write a Hugging Face folder as a Megatron torch_dist checkpoint, tensor by tensor.

    Any tp, pp, cp and ep loads it: as model.hf_path of a run, in powerflow score, generate and evaluate, and in
    Megatron-LM with --load OUT --ckpt-format torch_dist --finetune. Under torchrun the ranks share the work.

    Example: python tools/convert_hf_to_megatron.py --hf models/SmolLM2-135M-Instruct --out smollm2-megatron --verify
    """
    from megatron_powerflow.converter.commands import convert, locate_models
    from megatron_powerflow.converter.convert import ConversionRequest

    launch, command = read_launch(), command_line("python", *sys.argv)
    located = locate_models({"--hf": hf}, launch)
    request = ConversionRequest(
        located.folder(hf),
        out,
        dtype,
        overwrite=overwrite,
        verify=verify,
        command=command,
        revisions=located.revisions,
    )
    convert(request, launch, make_console(), to_hf=False)


if __name__ == "__main__":
    exit_codes(lambda: typer.run(main))
