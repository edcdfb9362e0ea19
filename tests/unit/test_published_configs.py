"""Every refusal that guards config.json lets the published models through; their shapes add up to what they have."""

from __future__ import annotations

import json
import math

import pytest

from megatron_powerflow.hf.config import read_architecture
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.shapes import expected_tensors
from tests.published_configs import PUBLISHED

PARAMETERS = {
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "google/gemma-2-9b": 9_241_705_984,
    "deepseek-ai/DeepSeek-V3, its weights in bf16": 671_026_419_200,  # without the module for the next token but one
}


@pytest.mark.filterwarnings("ignore:.*sliding_window_size")
@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_read_and_its_shapes_add_up(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    architecture, family = read_architecture(str(tmp_path), FAMILIES)
    assert sum(map(math.prod, expected_tensors(architecture, family).values())) == PARAMETERS[name]
