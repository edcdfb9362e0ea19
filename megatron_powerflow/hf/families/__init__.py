"""Which model families are known? One file each, one line here."""

from megatron_powerflow.hf.families import (
    deepseek_v3,
    gemma2,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_powerflow.hf.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        mixtral.FAMILY,
        qwen3_moe.FAMILY,
        phi3.FAMILY,
        olmo2.FAMILY,
        gemma2.FAMILY,
        deepseek_v3.FAMILY,
    )
}
