"""Rollouts between ranks: each gets its own, whole, and no other's; micro-batches are made as of one list."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import SimpleNamespace

import pytest
import torch

from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import read_launch
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.records import Prompt, Rollout
from tests.unit.test_micro_batches import plan as plan_of

LAYOUTS = {
    "dp4": {"dp": 4},
    "tp2_dp2": {"tp": 2, "dp": 2},
    "pp2_dp2": {"pp": 2, "dp": 2},
    "cp2_dp2": {"cp": 2, "dp": 2},
    "cp4": {"cp": 4},
    "tp2_pp2": {"tp": 2, "pp": 2},
}
ALONE = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "dp": 1, "sequence_parallel": False}
NUM_SLOTS, GROUP = 8, 2
PACKED = ("parallel.max_tokens_per_micro_batch=60",)
CASES = {
    "rewards": (*PACKED, "objective.task_reward=majority", "objective.reward_advantage=true", "objective.psi=-0.5"),
    "two_updates": (*PACKED, "objective.log_z=mlp", "optimizer.updates_per_rollout=2", "objective.truncated=drop"),
}


def every() -> list[Rollout]:
    """Groups of unequal lengths, with gold answers and numbers that the tests' tokenizer takes for answers."""
    rollouts = []
    for slot in range(NUM_SLOTS):
        prompt = Prompt(f"p{slot}", 100 + slot, (1,) * (slot * 5 % 7 + 1), answer="5", task="sums", text="ö\n")
        for i in range(GROUP):
            size = (slot * 13 + i * 7) % 19 + 1
            log_probs = tuple(-float(torch.tensor(slot + t + 0.1)) for t in range(size))
            response = (5 + (slot + i) % 2,) * size
            rollouts.append(Rollout(prompt, slot, i, response, log_probs, "length" if size > 15 else "eos"))
    return rollouts


def exchanges(sizes: dict):
    """(bytes that others sent in `to_replicas` of parts that stay; what each of the three gives) on this rank."""
    from megatron_powerflow.parallel import exchange
    from megatron_powerflow.training import rollout_exchange

    with initialized(Layout(**ALONE | sizes), read_launch(), seed=0) as groups:
        dp, cp = groups.dp_size, groups.cp_size
        mine = [rollout for rollout in every() if rollout.slot % dp == groups.dp_rank]
        drawn = [rollout for rollout in mine if rollout.slot // dp % cp == groups.cp_rank]
        rotated = [[r for r in mine if (r.slot // dp + r.slot) % dp == rank] for rank in range(dp)]
        received = []
        original = exchange.exchange

        def noted(parts, groups):
            answer = original(parts, groups)
            received.append(sum(map(len, answer)))
            return answer

        rollout_exchange.exchange = noted
        try:
            rollout_exchange.to_replicas([mine if rank == groups.dp_rank else [] for rank in range(dp)], groups)
        finally:
            rollout_exchange.exchange = original
        return (
            (groups.dp_rank, dp, groups.is_main),
            sum(received),
            rollout_exchange.to_replicas(rotated, groups),
            rollout_exchange.over_samplers(drawn, groups),
            rollout_exchange.to_main(mine, groups),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_gets_its_own_and_no_other(gloo, layout):
    answers = gloo.run(4, exchanges, LAYOUTS[layout])
    assert sum(is_main for (_, _, is_main), *_ in answers) == 1
    for (dp_rank, dp, is_main), bytes_for_nothing, of_replica, of_samplers, of_main in answers:
        assert bytes_for_nothing == 0
        assert of_replica == [r for r in every() if (r.slot // dp + r.slot) % dp == dp_rank]
        assert of_samplers == [r for r in every() if r.slot % dp == dp_rank]
        assert of_main == (every() if is_main else [])


class Words:
    """A tokenizer of one word: an answer in a box where the text begins with an even token."""

    def decode(self, token_ids) -> str:
        return f"\\boxed{{{token_ids[0]}}}" if token_ids[0] % 2 else "no box"


def planned(case: str, dp: int):
    settings = plan_of(*CASES[case], f"rollout.prompts_per_step={NUM_SLOTS}", dp=dp)
    return SimpleNamespace(**vars(settings) | {"tokenizer": Words()})


def micro_batches_of_rank(case: str):
    from megatron_powerflow.training.micro_batches import pack_updates

    with initialized(Layout(**ALONE | {"dp": 4}), read_launch(), seed=0) as groups:
        each = NUM_SLOTS // (2 if case == "two_updates" else 1)
        mine = [rollout for rollout in every() if rollout.slot % each // (each // 4) == groups.dp_rank]
        return [
            [plain(batch) for batch in batches]
            for batches in pack_updates(mine, planned(case, 4), SimpleNamespace(groups=groups), 0)
        ]


def plain(record) -> dict:
    """A micro-batch in which tensors are bytes, so that NaN equals NaN and every bit counts."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = (tuple(value.shape), str(value.dtype), value.numpy().tobytes())
        elif is_dataclass(value):
            values[name] = plain(value)
    return values


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_are_those_of_one_list_of_all_rollouts(gloo, case):
    """To the last bit: the oracle annotates all rollouts in one place and gives each rank its micro-batches of them."""
    from megatron_powerflow.data.bins import flop_count, groups_fit, plan_update
    from megatron_powerflow.data.packing import pack_streams
    from megatron_powerflow.training.micro_batches import bin_rule
    from megatron_powerflow.training.rewards import annotate

    settings, num_updates = planned(case, 4), 2 if case == "two_updates" else 1
    config, size = settings.config, NUM_SLOTS // num_updates
    annotated = annotate(every(), config.objective, settings.tokenizer)
    assert len({(item.psi, item.reward, *item.annotations[:3]) for item in annotated}) > 4, "texts that differ"
    flops = flop_count(settings.architecture)
    rule, expected = bin_rule(settings.layout, config), [[] for _ in range(4)]
    for first in range(0, NUM_SLOTS, size):
        members = [annotated[slot * GROUP : (slot + 1) * GROUP] for slot in range(first, first + size)]
        lengths = [[item.num_tokens for item in group] for group in members]
        together = case == "rewards" and groups_fit(lengths, rule)
        for rank, bins in enumerate(plan_update(lengths, 4, rule, flops, together=together)):
            batches = pack_streams(
                [[members[q][i] for q, i in bin] for bin in bins],
                rule,
                responses_per_prompt=GROUP,
                drop_truncated=config.objective.truncated == "drop",
                uniform=False,
                device=torch.device("cpu"),
                whole_groups=together,
            )
            expected[rank].append([plain(batch) for batch in batches])
    assert gloo.run(4, micro_batches_of_rank, case) == expected
