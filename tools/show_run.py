"""What did a run do to the model? Answers before and after, and proof that the export answers in transformers.

python tools/show_run.py examples/configs/local.yaml [section.key=value ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_powerflow.checkpoint.folder import EXPORT_NAME, latest_checkpoint
from megatron_powerflow.cli.leaving import exit_codes
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import UserError


def main(
    config: Annotated[Path, typer.Argument(help="the run's config file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Print before/after samples of a finished run, let the exported model answer, say where everything lies.

    Example: python tools/show_run.py examples/configs/local.yaml
    """
    run = Path(load_config(config, overrides or ()).run.output_dir)
    if not (run / EXPORT_NAME).is_dir():
        raise UserError(f"{run}: no {EXPORT_NAME} in it; has the run finished?")
    console = make_console()
    show_samples(run, console)
    show_export(run / EXPORT_NAME, console)
    console.rule("where everything lies")
    for name, path in {
        "metrics": run / "metrics.jsonl",
        "curves": run / "curves.png",
        "samples": run / "samples.jsonl",
        "checkpoint": latest_checkpoint(run),
        "model for transformers, vLLM, ...": run / EXPORT_NAME,
        "wandb (offline: wandb sync it)": run / "wandb",
    }.items():
        if path is not None and path.exists():
            console.print(f"{name:34} {path}")


def show_samples(run: Path, console: Console) -> None:
    from megatron_powerflow.metrics.step_log import SAMPLES_NAME, read_step_log

    by_prompt: dict[str, list[dict]] = {}
    for line in read_step_log(run / SAMPLES_NAME):
        by_prompt.setdefault(line["id"], []).append(line)
    for identity, lines in by_prompt.items():
        first, last = lines[0], lines[-1]
        console.rule(identity)
        console.print(first["question"].strip(), style="bold")
        console.print(f"before  {first['response'].strip()}")
        console.print(f"after   {last['response'].strip()}  (step {last['step']})")


def show_export(folder: Path, console: Console) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is gravity?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    console.rule("the export in transformers, greedy")
    console.print(f"{question[0]['content']}  {tokenizer.decode(answer, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    exit_codes(lambda: typer.run(main))
