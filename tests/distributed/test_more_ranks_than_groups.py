"""tp above the number of key-value groups: Hugging Face's log-probs and tokens, the same weights back from an export.

Four heads in two groups, or in one, over four ranks: two or four ranks share a group. That training is that of one
process is test_layouts.py's.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.test_engine import generate
from tests.distributed.test_export import assert_same_folder, export_untrained
from tests.distributed.test_hf_parity import TOLERANCE, compare, hf_logits_and_log_probs

# olmo2 has a norm over all heads, qwen2 a bias, qwen3 a norm of each head, phi3 one tensor for all three
CASES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"num_key_value_heads": 1}),
    ("phi3", {}),
    ("gemma2", {}),
    ("olmo2", {}),
    ("olmo2", {"num_key_value_heads": 1}),
]
PROMPTS = [[5, 6, 7], [11] * 20]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_log_probs_and_logits_equal_hugging_face(gloo, tiny_model, record_property, family, changes):
    worst = compare(gloo, tiny_model(family, **changes), 4, 1, sequence_parallel="num_key_value_heads" in changes)
    record_property("max_abs_difference", worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("olmo2", {"num_key_value_heads": 1})])
def test_samples_and_their_log_probs_are_those_of_one_process(gloo, tiny_model, family, changes):
    folder = str(tiny_model(family, **changes))
    everyone = gloo.run(4, generate, folder, 4, 1, prompts=PROMPTS)
    (alone,) = gloo.run(1, generate, folder, 1, 1, prompts=PROMPTS)
    rows = [(PROMPTS[slot], response) for slot, _, response, _, _ in alone]
    wanted = hf_logits_and_log_probs(folder, rows)
    for answer in everyone:
        assert [item[:3] for item in answer] == [item[:3] for item in alone]
        for (*_, found, _), (_, log_probs) in zip(answer, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(found).float(), log_probs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_an_export_is_bit_equal(gloo, tiny_model, tmp_path, family, changes):
    model, out = tiny_model(family, **changes), tmp_path / "out"
    gloo.run(4, export_untrained, str(model), str(out), tp=4)
    assert_same_folder(model, out)
