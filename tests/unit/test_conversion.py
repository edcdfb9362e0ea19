"""Conversion: one list, two directions; config.json read as transformers reads it; damaged folders named."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_powerflow.architecture import Experts, Mla, Rope
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.checked import open_checked
from megatron_powerflow.hf.config import read_architecture, read_stop_token_ids
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.files import (
    INDEX_NAME,
    SafetensorsFolder,
    check_tensor_names,
    copy_companions,
)
from megatron_powerflow.hf.operations import ShardShape
from megatron_powerflow.hf.shapes import expected_tensors, experts_of, layers_of
from megatron_powerflow.hf.shard_files import ShardWriter, TensorInfo, plan_files, write_index
from tests.architectures import make_architecture
from tests.tiny_models import FAMILIES as FAMILY_NAMES
from tests.tiny_models import LLAMA3_ROPE, LONGROPE, MIXTURES, OTHER_SHAPES, make_tiny_model


class InMemory:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read(self, name, *, rows=None, columns=None):
        tensor = self.tensors[name]
        for dim, part in enumerate((rows, columns)):
            if part is not None:
                assert 0 <= part[0] <= part[1] <= tensor.shape[dim], f"{name} has no {part} of {tensor.shape}"
                tensor = tensor.narrow(dim, part[0], part[1] - part[0])
        return tensor


shapes = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4]),
        "groups_per_rank": st.integers(1, 2),
        "heads_per_group": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 6]),
        "ffn_per_rank": st.integers(1, 5),
        "vocab_size": st.integers(3, 40),
        "q_lora_rank": st.sampled_from([None, 5]),
    }
)


@settings(deadline=None, max_examples=40)
@given(shapes, st.sampled_from(sorted(FAMILIES)))
def test_merging_the_shards_gives_back_every_tensor(shape, family_name):
    """to_hf(from_hf(w)) == w, bit for bit, for each operation of each family and each tp."""
    family, tp = FAMILIES[family_name], shape["tp"]
    groups, latent = tp * shape["groups_per_rank"], family_name == "deepseek_v3"
    architecture = make_architecture(
        family=family_name,
        num_layers=2,
        hidden_size=6,
        ffn_hidden_size=tp * shape["ffn_per_rank"],
        num_attention_heads=groups * shape["heads_per_group"],
        num_query_groups=groups,
        head_dim=shape["head_dim"],
        vocab_size=shape["vocab_size"],
        tied_embeddings=False,
        experts=Experts(
            3, 2, normalized=True, first_layer=latent, dense_ffn_hidden_size=3 * tp, shared_ffn_hidden_size=2 * tp
        )
        if family_name in MIXTURES
        else None,
        mla=Mla(shape["q_lora_rank"], 7, shape["head_dim"] - 2, 2, 3) if latent else None,
    )
    names = expected_tensors(architecture, family)
    tensors = {name: torch.randn(size) for name, size in names.items()}
    source, seen = InMemory(tensors), set()
    padded = -(-shape["vocab_size"] // tp) * tp
    ops = [(op, None, None) for op in family.model_ops]
    ops += [
        (op, layer, expert)
        for op in family.layer_ops
        for layer in layers_of(op, architecture)
        for expert in experts_of(op, architecture)
    ]
    for op, layer, expert in ops:
        hf_names = op.hf_names(layer, expert)
        shards = [op.shard(source, hf_names, ShardShape(architecture, rank, tp, padded)) for rank in range(tp)]
        merged = op.merge(shards, ShardShape(architecture, 0, tp, padded))
        for name, value in zip(hf_names, merged, strict=True):
            assert torch.equal(value, tensors[name]), name
            seen.add(name)
    assert seen == set(names)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_silent_config_means_what_transformers_takes_it_to_mean(tmp_path, family):
    """config.json with the sizes only: heads, head_dim, window, ties, rope, experts as transformers' defaults."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {
        "vocab_size": 64,
        "hidden_size": 4096,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
    }
    if family == "deepseek_v3":  # its transformers model only runs with as many, and is silent about another number
        sizes["num_key_value_heads"] = 32
    if family == "phi3":  # its padding would be outside so small a vocabulary
        sizes["pad_token_id"] = None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    ours, _ = read_architecture(tmp_path, FAMILIES)
    theirs = CONFIG_MAPPING[family](**sizes)
    assert ours.num_query_groups == theirs.num_key_value_heads
    head_dim = getattr(theirs, "qk_head_dim", None) or getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or 4096 // 32)
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    window = getattr(theirs, "sliding_window", None) if getattr(theirs, "use_sliding_window", True) else None
    assert ours.sliding_window == window
    if hasattr(theirs, "layer_types"):
        layers = ours.windowed_layers or (window is not None,) * ours.num_layers
        assert theirs.layer_types == ["sliding_attention" if here else "full_attention" for here in layers]
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    scale = getattr(theirs, "query_pre_attn_scalar", None)
    assert ours.softmax_scale == (scale and scale**-0.5)
    assert ours.rope.theta == (getattr(theirs, "rope_theta", None) or theirs.rope_parameters["rope_theta"])
    if family in MIXTURES:
        normalized = getattr(theirs, "norm_topk_prob", True)  # Mixtral knows no other way
        experts = Experts(theirs.num_local_experts, theirs.num_experts_per_tok, normalized)
        if family == "deepseek_v3":
            experts = replace(
                experts,
                score="sigmoid",
                choice_bias=True,
                num_groups=theirs.n_group,
                groups_per_token=theirs.topk_group,
                scaling=theirs.routed_scaling_factor,
                first_layer=theirs.first_k_dense_replace,
                dense_ffn_hidden_size=128,
                shared_ffn_hidden_size=theirs.n_shared_experts * theirs.moe_intermediate_size,
            )
            dims = (theirs.qk_nope_head_dim, theirs.qk_rope_head_dim, theirs.v_head_dim)
            assert ours.mla == Mla(theirs.q_lora_rank, theirs.kv_lora_rank, *dims)
        assert ours.experts == experts
        assert ours.ffn_hidden_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    else:
        assert ours.experts is None


def test_rope_is_read_in_the_words_of_transformers_4_and_5(tmp_path):
    sizes = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    readings = []
    for words in (
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(sizes | words))
        readings.append(read_architecture(tmp_path, FAMILIES)[0].rope)
    assert readings[0] == readings[1] == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox"}, ["model_type='gpt_neox'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type=None"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "only 'silu'"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            ["original_max_position_embeddings=None"],
        ),
        ({"quantization_config": {"bits": 4}}, ["quantized"]),
        ({"num_hidden_layers": "many"}, ["num_hidden_layers"]),
        ({"layer_types": ["sliding_attention"]}, ["layer_types"]),
        ({"sliding_window": 4096}, ["sliding_window=4096", "only None"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"attention_dropout": 0.1}, ["attention_dropout=0.1"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping=30.0 is not supported for llama"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope scaling type 'dynamic'"]),
        ({"hidden_size": 0}, ["hidden_size is missing or not a whole number above 0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tiny_model, tmp_path, changes, words):
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as caught:
        read_architecture(tmp_path, FAMILIES)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step=2", "only 1"]),
        ("qwen3_moe", {"mlp_only_layers": [0]}, ["mlp_only_layers=[0]"]),
        ("qwen3_moe", {"use_sliding_window": True}, ["use_sliding_window=True"]),
        ("qwen3_moe", {"num_experts_per_tok": 7}, ["num_experts_per_tok=7 of 6 experts"]),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, ["num_experts_per_tok=1 with normalized"]),
        ("qwen3_moe", {"moe_intermediate_size": "wide"}, ["moe_intermediate_size is missing or not a whole number"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise=0.1"]),
        (
            "mixtral",
            {"num_local_experts": None},
            ["num_local_experts (or num_experts) is missing or not a whole number"],
        ),
        ("mistral", {"sliding_window": 0}, ["sliding_window=0; it must be a whole number of tokens, at least 1"]),
        ("mistral", {"layer_types": ["sliding_attention"] * 4}, ["layer_types=['sliding_attention', ", "only ['full_"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, ["layer_types", "sliding_window=None"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias=True"]),
        ("phi3", {"resid_pdrop": 0.1, "full_attn_mod": 2}, ["resid_pdrop=0.1", "full_attn_mod=2"]),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope scaling type 'yarn'"]),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["longrope needs short_factor"]),
        (
            "phi3",
            {"rope_parameters": LONGROPE | {"short_factor": [1.0]}},
            ["1 numbers in short_factor and 6 in long_factor"],
        ),
        ("phi3", {"rope_parameters": LONGROPE | {"factor": 8.0}}, ["factor=8.0 is not supported", "= 4.0 is"]),
        ("olmo2", {"clip_qkv": 8.0}, ["clip_qkv=8.0"]),
        ("olmo2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "olmo2"]),
        ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation='gelu'", "only 'gelu_pytorch_tanh'"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        ("gemma2", {"attn_logit_softcapping": -1.0}, ["attn_logit_softcapping=-1.0; it must be a number above 0"]),
        ("gemma2", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar is missing or not a whole number above 0"]),
        ("gemma2", {"layer_types": ["full_attention"]}, ["layer_types has 1 entries"]),
        ("qwen2", {"layer_types": 5}, ["layer_types=5; it must be a list or null"]),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, ["chunked_attention"]),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, ["rms_norm_eps=1e-05", "only 1e-06"]),
        ("deepseek_v3", {"rope_interleave": False}, ["rope_interleave=False"]),
        ("deepseek_v3", {"norm_topk_prob": False}, ["norm_topk_prob=False"]),
        ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func='softmax'"]),
        ("deepseek_v3", {"num_experts_per_tok": 6}, ["ranks groups by their best 3 experts, DeepSeek by their best 2"]),
        ("deepseek_v3", {"n_group": 3}, ["n_group=3 with topk_group=2 does not divide n_routed_experts=8"]),
        ("deepseek_v3", {"n_group": None}, ["n_group is missing or not a whole number"]),
        ("deepseek_v3", {"num_key_value_heads": 2}, ["num_key_value_heads=2"]),
        ("deepseek_v3", {"first_k_dense_replace": 4}, ["first_k_dense_replace=4 leaves no layer"]),
        ("deepseek_v3", {"n_shared_experts": 0}, ["n_shared_experts is missing or not a whole number above 0"]),
        ("deepseek_v3", {"routed_scaling_factor": 0.0}, ["routed_scaling_factor=0.0"]),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "llama3"}}, ["'llama3' is not supported", "default, yarn"]),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "yarn", "truncate": 0}},
            ["truncate=0; it must be true or false", "factor=None", "original_max_position_embeddings=None"],
        ),
    ],
)
def test_what_a_family_cannot_compute_is_refused_by_name(tiny_model, tmp_path, family, changes, words):
    config = json.loads((tiny_model(family) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as caught:
        read_architecture(tmp_path, FAMILIES)
    assert all(word in str(caught.value) for word in words), caught.value


def test_unknown_fields_are_named_and_harmless_ones_are_not(tiny_model, tmp_path):
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    notes = {"is_llama_config": True, "pretraining_tp": 2, "_name_or_path": "x", "torch_dtype": "float32", "odd": False}
    (tmp_path / "config.json").write_text(json.dumps(config | notes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_architecture(tmp_path, FAMILIES)
    (tmp_path / "config.json").write_text(json.dumps(config | notes | {"new_switch": 3}))
    with pytest.warns(UserWarning, match="unknown to this program change nothing here: new_switch=3"):
        read_architecture(tmp_path, FAMILIES)


@pytest.mark.parametrize("shape", ["usual", "other"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_transformers_own_files_have_no_unknown_field(tiny_model, family, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_architecture(tiny_model(family, **(OTHER_SHAPES[family] if shape == "other" else {})), FAMILIES)


def test_longrope_ends_where_its_other_factors_begin(tiny_model):
    """transformers' own attention factor: sqrt(1 + ln 4 / ln 64)."""
    architecture, _ = read_architecture(tiny_model("phi3"), FAMILIES)
    assert (architecture.max_positions, architecture.positions_field) == (64, "original_max_position_embeddings")
    assert architecture.rope.attention_factor == pytest.approx((1 + 1 / 3) ** 0.5)


def test_a_mixture_is_read_in_the_words_of_its_released_files(tiny_model, tmp_path):
    """Qwen's own files say num_experts, transformers 5 num_local_experts; null layers are no layers."""
    config = json.loads((tiny_model("qwen3_moe") / "config.json").read_text())
    config.pop("num_local_experts", None)
    config |= {"num_experts": 6, "mlp_only_layers": None, "norm_topk_prob": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path, FAMILIES)[0].experts == Experts(6, 3, normalized=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\x00"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_architecture(tmp_path, FAMILIES)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_architecture(tmp_path / "none", FAMILIES)
    with pytest.raises(UserError, match="no such file"):
        read_architecture(tmp_path, FAMILIES)


def test_a_response_stops_at_whatever_any_file_calls_its_end(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert read_stop_token_ids(tmp_path, 9, 10) == {2, 9}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_stop_token_ids(tmp_path, 9, 10) == {2, 5, 6, 9}
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    assert read_stop_token_ids(tmp_path, 9, 10) == {9}
    with pytest.raises(UserError, match="names an eos token"):
        read_stop_token_ids(tmp_path, None, 10)


@pytest.mark.parametrize("eos", ["128009", "-1", "[128009, 128001]", "[2, 10]", '"</s>"', "[2, null]", "2.0", "true"])
def test_an_end_that_the_vocabulary_does_not_have_is_refused(tmp_path, eos):
    (tmp_path / "config.json").write_text(f'{{"eos_token_id": {eos}}}')
    with pytest.raises(UserError, match=r"config\.json says eos_token_id=.*, which is none of the model's 10 tokens"):
        read_stop_token_ids(tmp_path, None, 10)


@pytest.fixture
def folder(tmp_path):
    return make_tiny_model(tmp_path / "model", "qwen3")


def checked(folder) -> SafetensorsFolder:
    architecture, family = read_architecture(folder, FAMILIES)
    source = SafetensorsFolder(folder)
    check_tensor_names(source, expected_tensors(architecture, family))
    return source


def rewrite(folder, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_slices_are_what_the_whole_tensor_holds(folder):
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.down_proj.weight"
    whole = load_file(folder / "model.safetensors")[name]
    source = checked(folder)
    assert torch.equal(source.read(name, rows=(3, 9)), whole[3:9])
    assert torch.equal(source.read(name, columns=(10, 40)), whole[:, 10:40])
    assert torch.equal(source.read(name), whole)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    for size in (path.stat().st_size - 10, 100, 4, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=r"model\.safetensors: truncated or damaged"):
            SafetensorsFolder(folder)


def test_missing_extra_and_misshapen_tensors_are_all_named(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(3, 3)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        checked(folder)
    text = str(caught.value)
    assert len(caught.value.violations) == 3
    assert "tensor model.norm.weight is missing" in text
    assert "tensor model.extra is not part" in text
    assert "tensor lm_head.weight has shape (3, 3)" in text


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_in_one_tensor_are_named_with_the_way_out(tiny_model, tmp_path, family):
    from transformers import AutoModelForCausalLM

    architecture, family = read_architecture(tiny_model(family), FAMILIES)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family.model_type))
    for original in (False, True):
        model.save_pretrained(tmp_path / str(original), save_original_format=original)
    check_tensor_names(SafetensorsFolder(tmp_path / "True"), expected_tensors(architecture, family))
    with pytest.raises(UserError, match=r"experts\.(down|gate_up)_proj: transformers 5 .* save_original_format=False"):
        check_tensor_names(SafetensorsFolder(tmp_path / "False"), expected_tensors(architecture, family))


def shards_of(folder, parts: dict[str, list[str]], factor: float) -> None:
    """Write the model's tensors, times factor, as an index and its files: file -> names."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for file_name, names in parts.items():
        save_file({name: tensors[name] * factor for name in names}, folder / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, names in parts.items() for name in names}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_of_other_weights_beside_model_safetensors_is_refused(folder):
    """transformers reads model.safetensors alone, whatever the index says: other weights, or only a part of them."""
    names = sorted(SafetensorsFolder(folder).names())
    for first in ("model-00001-of-00002.safetensors", "model.safetensors"):
        shards_of(folder, {first: names[::2], "model-00002-of-00002.safetensors": names[1::2]}, 0.5)
        with pytest.raises(UserError, match=r"two sets of weights, model\.safetensors and those of .*-of-00002"):
            checked(folder)


def test_an_index_of_model_safetensors_alone_is_read(folder):
    names = SafetensorsFolder(folder).names()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    checked(folder)


def test_an_output_weight_of_its_own_beside_tied_embeddings_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    embedding = SafetensorsFolder(folder).read("model.embed_tokens.weight")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    open_checked(folder, *read_architecture(folder, FAMILIES))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding * 2}))
    with pytest.raises(UserError, match=r"tie_word_embeddings=true, and lm_head\.weight is not model\.embed_tokens"):
        open_checked(folder, *read_architecture(folder, FAMILIES))


def test_a_field_that_the_file_names_twice_is_refused(tiny_model, tmp_path):
    text = (tiny_model("llama") / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"rms_norm_eps": 1e-05,', 1))
    with pytest.raises(UserError, match="rms_norm_eps is there twice, as 1e-05 and as 1e-06; take one away"):
        read_architecture(tmp_path, FAMILIES)


def test_only_safetensors_are_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors"):
        SafetensorsFolder(folder)


def test_an_index_cannot_point_outside_its_folder_or_at_nothing(folder):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(UserError, match="outside the folder"):
        SafetensorsFolder(folder)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    weights = (folder / "model.safetensors").rename(folder / "aside")  # beside an index it is a second set of weights
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        SafetensorsFolder(folder)
    weights.rename(folder / "model.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(UserError, match="lacks"):
        SafetensorsFolder(folder)
    (folder / "model.safetensors").unlink()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        SafetensorsFolder(folder)
    (folder / INDEX_NAME).write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        SafetensorsFolder(folder)


def test_what_is_written_is_read_back_in_several_shards(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(7)}
    files = plan_files([{name: TensorInfo("F32", (10, 10))} for name in tensors], 900, prefix="stage-0")
    writer = ShardWriter(tmp_path, files)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    file_of = {name: file.name for file in files for name in file.tensors}
    write_index(tmp_path, file_of, sum(file.num_bytes for file in files))
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    source = SafetensorsFolder(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_companions_are_copied_unchanged_but_for_dtype_and_never_code(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    config = {"model_type": "llama", "torch_dtype": "float16", "max_position_embeddings": 1048576, "odd": [1, None]}
    (source / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json", "merges.txt"):
        (source / name).write_text(name)
    (source / "tokenizer_custom.py").write_text("raise SystemExit")
    (source / "model.safetensors").write_text("weights")
    copy_companions(source, target, dtype="bfloat16")
    assert json.loads((target / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}
    copied = {path.name for path in target.iterdir()}
    assert copied == {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
    }
    shutil.rmtree(target)
    copy_companions(source, target, dtype=None)
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
