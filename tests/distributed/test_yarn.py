"""YaRN in the families without latent attention: transformers' frequencies, factor and log-probs, beyond the original
length; sampling through the cache; the setting comes back from export and conversion; what makes no sense is refused.

Left out: DeepSeek's use of it (`test_hf_parity.py`), each field with other values (`test_perturbed_configs.py`).
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megatron_powerflow.converter.convert import ConversionRequest, hf_to_megatron, megatron_to_hf
from megatron_powerflow.converter.ranks import Ranks
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_architecture
from megatron_powerflow.hf.families import FAMILIES as READERS
from tests.distributed.test_engine import generate
from tests.distributed.test_export import export_untrained
from tests.distributed.test_hf_parity import TOLERANCE, hf_logits_and_log_probs, megatron_logits_and_log_probs
from tests.tiny_models import MIXTURES

ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "olmo2", "gemma2")
# name -> what stands beside YARN
SETTINGS = {
    "plain": {},
    "betas": {"beta_fast": 4.0, "beta_slow": 0.5, "rope_theta": 1e6},
    "attention_factor": {"attention_factor": 1.4},
    "mscales": {"mscale": 0.7, "mscale_all_dim": 1.3},  # a factor below 1
    "one_mscale": {"mscale": 0.7},  # counts only together with the other
    "not_truncated": {"truncate": False, "beta_fast": 4.0},
    "no_stretch": {"factor": 1.0},
    "equal_betas": {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
    "reversed_betas": {"beta_fast": 1.0, "beta_slow": 8.0},
    "range_of_one_pair": {ORIGINAL: 7},
    "no_pair_turns": {ORIGINAL: 3},
}


def with_yarn(model: Path, folder: Path, *, rope: dict, field: str = "rope_parameters") -> Path:
    """The model in another folder, with another rotation. field: rope_scaling as transformers 4 writes it."""
    config = json.loads((model / "config.json").read_text())
    theta = rope.get("rope_theta", 1e4)
    config.pop("rope_parameters", None)
    if field == "rope_parameters":
        config[field] = {"rope_theta": theta, **rope}
    else:
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
        config |= {"rope_theta": theta, field: {"type": rope["rope_type"], **rest}}
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def frequencies_of(folder: str) -> tuple[list[float], float]:
    from megatron_powerflow.model.rotary import inverse_frequencies

    architecture, _ = read_architecture(folder, READERS)
    return inverse_frequencies(architecture.rope, architecture.head_dim).tolist(), architecture.rope.attention_factor


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # head_dim 12 and 20
def test_frequencies_and_factor_are_those_of_transformers(gloo, tiny_model, tmp_path, family, name, field):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = with_yarn(tiny_model(family), tmp_path / "yarn", rope=YARN | SETTINGS[name], field=field)
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.from_pretrained(folder), "cpu")
    ((found, factor),) = gloo.run(1, frequencies_of, str(folder))
    assert torch.equal(torch.tensor(found), wanted)
    assert factor == wanted_factor


def rows_beyond_the_original_length() -> list:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 300, (230,), generator=generator).tolist()
    return [(tokens[:90], tokens[90:]), (tokens[:3], tokens[3:20])]


@pytest.mark.parametrize(
    ("family", "name", "tp", "pp"),
    [
        *((family, "plain", 1, 1) for family in FAMILIES),
        ("llama", "mscales", 2, 2),
        ("qwen2", "not_truncated", 1, 2),
        ("qwen3", "attention_factor", 2, 1),
        ("qwen3_moe", "betas", 2, 1),
        ("llama", "reversed_betas", 1, 1),
        ("llama", "no_pair_turns", 1, 1),
    ],
)
def test_log_probs_beyond_the_original_length_equal_hugging_face(
    gloo, tiny_model, tmp_path, record_property, family, name, tp, pp
):
    """Responses of up to position 230, of an original length of 64; the default rotation gives other numbers."""
    model, rows = tiny_model(family), rows_beyond_the_original_length()
    folder = with_yarn(model, tmp_path / "yarn", rope=YARN | SETTINGS[name])
    sequence_parallel = tp > 1 and family in MIXTURES
    ours = gloo.run(
        tp * pp, megatron_logits_and_log_probs, str(folder), rows, tp, pp, sequence_parallel=sequence_parallel
    )[(pp - 1) * tp]
    plain = with_yarn(model, tmp_path / "plain", rope={"rope_type": "default"})
    worst, effect = 0.0, 0.0
    for (_, logits, log_probs), (hf_logits, hf_log_probs), (_, without) in zip(
        ours, hf_logits_and_log_probs(str(folder), rows), hf_logits_and_log_probs(str(plain), rows), strict=True
    ):
        worst = max(worst, float((torch.from_numpy(logits) - hf_logits).abs().max()))
        worst = max(worst, float((torch.from_numpy(log_probs) - hf_log_probs).abs().max()))
        effect = max(effect, float((without - hf_log_probs).abs().max()))
    record_property("max_abs_difference", worst)
    assert worst < TOLERANCE
    assert effect > 100 * TOLERANCE


@pytest.mark.parametrize(("family", "name"), [("llama", "mscales"), ("qwen2", "plain"), ("qwen3", "attention_factor")])
def test_sampled_tokens_and_their_log_probs_through_the_cache_are_hugging_faces(
    gloo, tiny_model, tmp_path, family, name
):
    """Prompts below and beyond the original length, and a response that crosses it."""
    folder = with_yarn(tiny_model(family), tmp_path / "yarn", rope=YARN | SETTINGS[name])
    tokens = rows_beyond_the_original_length()[0][1]
    prompts = [tokens[:100], tokens[:60], tokens[:2]]
    rollouts = gloo.run(2, generate, str(folder), 2, 1, prompts=prompts, responses=2, stop=(), max_tokens=12)[0]
    rows = [(prompts[slot], response) for slot, _, response, _, _ in rollouts]
    for (*_, found, _), (_, wanted) in zip(rollouts, hf_logits_and_log_probs(str(folder), rows), strict=True):
        torch.testing.assert_close(torch.from_numpy(found).float(), wanted, rtol=0, atol=TOLERANCE)


def test_export_and_conversion_keep_the_setting(gloo, tiny_model, tmp_path):
    rope = YARN | SETTINGS["mscales"] | {"truncate": False}
    folder = with_yarn(tiny_model("qwen2"), tmp_path / "yarn", rope=rope)
    gloo.run(2, export_untrained, str(folder), str(tmp_path / "exported"), tp=2)
    hf_to_megatron(ConversionRequest(folder, tmp_path / "megatron"), Ranks())
    megatron_to_hf(ConversionRequest(tmp_path / "megatron", tmp_path / "back"), Ranks())
    for out in (tmp_path / "exported", tmp_path / "back"):
        assert json.loads((out / "config.json").read_text())["rope_parameters"] == {"rope_theta": 1e4, **rope}
        assert read_architecture(out, READERS)[0].rope == read_architecture(folder, READERS)[0].rope


def test_the_longest_sequence_is_the_stretched_one(tiny_model, tmp_path):
    """As for Qwen2.5 with YaRN by its own instructions, where max_position_embeddings stays at the original length."""
    folder = with_yarn(tiny_model("qwen2"), tmp_path / "yarn", rope=YARN | {"factor": 8.0, ORIGINAL: 256})
    architecture, _ = read_architecture(folder, READERS)
    assert architecture.max_positions == 2048
    assert architecture.positions_field == "original_max_position_embeddings x factor"
    shorter, _ = read_architecture(with_yarn(folder, tmp_path / "shorter", rope=YARN | {"factor": 2.0}), READERS)
    assert (shorter.max_positions, shorter.positions_field) == (256, "max_position_embeddings")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": 0.5}, "factor=0.5; rope scaling type 'yarn' stretches, so it must be at least 1.0"),
        ({"factor": None}, "factor=None; rope scaling type 'yarn' needs a number above 0"),
        ({"factor": math.nan}, "factor=nan; rope scaling type 'yarn' needs a number above 0"),
        ({"factor": math.inf}, "factor=inf; rope scaling type 'yarn' needs a number above 0"),
        ({ORIGINAL: None}, "original_max_position_embeddings=None; it must be a whole number above 1"),
        ({ORIGINAL: 64.5}, "original_max_position_embeddings=64.5; it must be a whole number above 1"),
        ({"beta_fast": -1.0}, "beta_fast=-1.0; rope scaling type 'yarn' needs a number above 0"),
        ({"beta_slow": math.nan}, "beta_slow=nan; rope scaling type 'yarn' needs a number above 0"),
        ({"attention_factor": 0.0}, "attention_factor=0.0; rope scaling type 'yarn' needs a number above 0"),
        ({"mscale": math.nan}, "mscale=nan; it must be a number of at least 0, or null"),
        ({"truncate": None}, "truncate=None; it must be true or false"),
        ({"truncate": "no"}, "truncate='no'; it must be true or false"),
    ],
)
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_what_makes_no_sense_is_refused_in_words(tiny_model, tmp_path, field, changes, words):
    folder = with_yarn(tiny_model("qwen2"), tmp_path / "yarn", rope=YARN | changes, field=field)
    with pytest.raises(UserError) as caught:
        read_architecture(folder, READERS)
    assert f"{field}.{words}" in str(caught.value)


@pytest.mark.parametrize("family", ["mixtral", "phi3"])
def test_families_in_which_it_is_not_computed_refuse_it(tiny_model, tmp_path, family):
    folder = with_yarn(tiny_model(family), tmp_path / "yarn", rope=YARN)
    with pytest.raises(UserError, match=f"rope scaling type 'yarn' is not supported for {family}"):
        read_architecture(folder, READERS)


def test_a_missing_original_length_is_refused(tiny_model, tmp_path):
    """transformers takes max_position_embeddings for it, which is the length after stretching in most files."""
    folder = with_yarn(tiny_model("llama"), tmp_path / "yarn", rope={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(UserError, match="original_max_position_embeddings=None; it must be a whole number above 1"):
        read_architecture(folder, READERS)
