"""The resident reference is a copy of the policy, number by number, and shares no memory with it."""

from __future__ import annotations

import json

import pytest

from tests.distributed.megatron_sessions import config_for, opened_session


def compare(model, prompts, out, *overrides: str) -> dict:
    """How many tensors of the reference equal the policy's, and how many of each kind there are."""
    with (
        opened_session(config_for(model, prompts, out, *overrides)) as (_, session),
        session.reference.weights() as chunks,
    ):
        found = {"named_parameters": 0, "named_buffers": 0, "unequal": [], "shared": [], "trained": []}
        for policy, base in zip(session.trainable.chunks, chunks, strict=True):
            for kind in ("named_parameters", "named_buffers"):
                ours, theirs = dict(getattr(policy, kind)()), dict(getattr(base, kind)())
                assert ours.keys() == theirs.keys()
                found[kind] += len(ours)
                found["unequal"] += [name for name in ours if not ours[name].equal(theirs[name])]
                found["shared"] += [name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()]
            found["trained"] += [name for name, parameter in base.named_parameters() if parameter.requires_grad]
        return found


@pytest.mark.parametrize(
    ("family", "num_processes", "settings"),
    [("llama", 2, ["parallel.pp=2"]), ("deepseek_v3", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"])],
)
def test_the_resident_reference_is_a_copy_of_the_policy(gloo, tiny_model, tmp_path, family, num_processes, settings):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [5 + i, 6, 7]}) + "\n" for i in range(4)))
    for found in gloo.run(num_processes, compare, tiny_model(family), prompts, tmp_path / "run", *settings):
        assert not found["unequal"] + found["shared"] + found["trained"]
        assert found["named_parameters"] > 10
        assert (found["named_buffers"] > 0) == (family == "deepseek_v3")  # the bias of the choice of experts
