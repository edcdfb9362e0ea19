"""Folders of large models as Hugging Face writes them, whose weights are holes: names, shapes and sizes are real, and
nothing of them takes room on the disk. Their tokenizer is byte-level, without a chat template."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# as on their model pages
SHAPES = {
    "Llama-3.1-70B": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_ROPE,
        "tie_word_embeddings": False,
        "eos_token_id": 128001,
    },
    "Llama-3.2-3B": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
        "eos_token_id": 128001,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 151643,
    },
    "Qwen2.5-Math-7B": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 151643,
    },
}
SHAPES["Qwen2.5-Math-1.5B"] = SHAPES["Qwen2.5-1.5B"] | {"max_position_embeddings": 4096, "rope_theta": 10000.0}
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "bos_token_id": None}


def make_sparse_model(folder: Path, name: str) -> Path:
    """The folder of one of SHAPES."""
    folder.mkdir(parents=True)
    config = COMMON | SHAPES[name]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_byte_tokenizer(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for number, (tensor, shape) in enumerate(tensors_of(config)):
        shards.setdefault(f"model-{number // 24 + 1:05d}.safetensors", {})[tensor] = shape
    for file, tensors in shards.items():
        write_holes(folder / file, tensors)
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(2 * prod(shape) for tensors in shards.values() for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_of(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a Llama or a Qwen2, as transformers calls them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        for part, size in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{start}.self_attn.{part}_proj.weight", (size, hidden)
            if config["model_type"] == "qwen2":
                yield f"{start}.self_attn.{part}_proj.bias", (size,)
        yield f"{start}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{start}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{start}.mlp.up_proj.weight", (inner, hidden)
        yield f"{start}.mlp.down_proj.weight", (hidden, inner)
        yield f"{start}.input_layernorm.weight", (hidden,)
        yield f"{start}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_holes(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16 zeros that are not on the disk."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def write_byte_tokenizer(folder: Path) -> None:
    """256 bytes and <|endoftext|>, which transformers' own tokenizers of both families know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
