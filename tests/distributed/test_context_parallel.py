"""A sequence split over ranks: attention, sums and their gradients are those of one process (laws 17 and 18)."""

from __future__ import annotations

import pytest
import torch

from megatron_powerflow.data.packing import packed_stream, row_stream
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import read_launch
from megatron_powerflow.parallel.layout import Layout

LENGTHS = (13, 5, 8)  # one sequence fits no number of pieces, one rank has little of another
ROW = max(LENGTHS)


def layout_of(cp: int) -> Layout:
    return Layout(tp=1, pp=1, vpp=None, cp=cp, ep=1, dp=1, sequence_parallel=False)


RULES = {"plain": (None, None, None), "windowed": (0.3, 4, None), "capped": (1.5, 3, 0.7)}  # scale, window, softcap


def attention_of_a_share(cp: int, packed: bool, rule: str):
    """(places of this rank's tokens; their outputs, gradients of query, key, value; a sum over all ranks' outputs)."""
    from megatron_powerflow.model.attention import Rule, pieced_attention
    from megatron_powerflow.model.stream import pieces_of
    from megatron_powerflow.parallel.collectives import sum_over

    with initialized(layout_of(cp), read_launch(), seed=0) as groups:
        rank, device = groups.cp_rank, torch.device("cpu")
        if packed:
            multiple = 2 * cp if cp > 1 else 1
            total = sum(-(-length // multiple) * multiple for length in LENGTHS) + multiple
            stream = packed_stream(LENGTHS, ROW, total, multiple, rank, cp, device)
        else:
            stream = row_stream(3, 16, rank, cp, device)
        rows = 1 if packed else 3
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(3 * (ROW if packed else 16), 3, 4, 2, generator=generator, dtype=torch.float64)
        own = whole[stream.index.clamp(min=0)].permute(2, 1, 0, 3, 4)  # [3, t / cp, r, 4, 2]
        query, key, value = (part.clone().requires_grad_() for part in (own[0], own[1][:, :, ::2], own[2][:, :, ::2]))
        out = pieced_attention(query, key, value, pieces_of(stream, groups.cp), Rule(*RULES[rule]))
        real = stream.index.t() >= 0
        places = stream.index.t()[real]
        slope = torch.cos(torch.arange(8, dtype=torch.float64) + places[:, None])
        total = sum_over((out[real] * slope).sum(), groups.cp)
        (total.square() / 2).backward()
        assert out.shape == (stream.num_positions // cp, rows, 8)
        gradients = [tensor.grad[real] for tensor in (query, key, value)]
        return places.tolist(), [tensor.tolist() for tensor in (out.detach()[real], *gradients)], total.item()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cp", [2, 4])
def test_attention_and_its_gradients_do_not_depend_on_the_split(gloo, cp, packed, rule):
    """In float64, every output and every gradient. The loss is a square of a sum over all tokens: it would be wrong
    by orders if the ranks squared their own sums, or if the sum's gradient were summed again."""
    ((places, expected, total),) = gloo.run(1, attention_of_a_share, 1, packed, rule)
    expected = [dict(zip(places, tensor, strict=True)) for tensor in expected]
    seen = []
    for own_places, found, own_total in gloo.run(cp, attention_of_a_share, cp, packed, rule):
        assert own_total == pytest.approx(total, rel=1e-12)
        for tensor, theirs in zip(found, expected, strict=True):
            for place, values in zip(own_places, tensor, strict=True):
                torch.testing.assert_close(torch.tensor(values), torch.tensor(theirs[place]), rtol=1e-10, atol=1e-10)
        seen += own_places
    assert sorted(seen) == sorted(places)


def numbers_beside(neighbour: list[int], model, overrides: tuple[str, ...]):
    """(log-probs of a response, its prompt's pool) packed in front of a neighbour and behind another."""
    from megatron_powerflow.config_file import parse_config
    from megatron_powerflow.data.bins import BinRule
    from megatron_powerflow.data.packing import AnnotatedRollout, pack_streams
    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES
    from megatron_powerflow.records import Prompt, Rollout
    from megatron_powerflow.training.forward_step import Scorer, run_forward
    from megatron_powerflow.training.policy import build_policy

    values = {"model": {"hf_path": str(model)}, "precision": {"dtype": "fp32"}, "prompts": {"path": "-"}}
    config = parse_config(values | {"run": {"output_dir": "-"}}, overrides)
    launch, cp = read_launch(), config.parallel.cp
    architecture, family = read_architecture(str(model), FAMILIES)
    with initialized(layout_of(cp), launch, seed=0) as groups:
        chunks = build_policy(architecture, family, layout_of(cp), config.model, config.precision, groups)
        scorer = Scorer(groups, architecture.vocab_size, 1.0, False)
        items = [
            Rollout(Prompt(str(slot), slot, (5, 6, 7)), slot, 0, tuple(response), (0.0,) * len(response), "eos")
            for slot, response in enumerate([neighbour, [9, 10, 11, 2], neighbour[::-1]])
        ]
        multiple = 2 * cp if cp > 1 else 1
        (batch,) = pack_streams(
            [[AnnotatedRollout(item) for item in items]],
            BinRule(64, multiple, multiple, 1),
            responses_per_prompt=1,
            drop_truncated=False,
            uniform=False,
            device=groups.device,
            cp_rank=groups.cp_rank,
            cp_size=cp,
        )

        def readout(hidden, chunk, batch):
            return scorer.log_probs(hidden, chunk, batch), scorer.prompt_pool(hidden, batch)

        ((log_probs, pool),) = run_forward(chunks, [batch], scorer, readout)
        row = batch.group.tolist().index(1)
        return log_probs[row][batch.loss_mask[row]].tolist(), pool[row].tolist()


@pytest.mark.parametrize("cp", [1, 2])
def test_a_packed_neighbour_changes_nothing(gloo, tiny_model, cp):
    """Law 18, to the last bit: other tokens beside it, the same shapes, the same log-probs and prompt pool."""
    arguments = (tiny_model("qwen2"), (f"parallel.cp={cp}",))
    beside_one = gloo.run(cp, numbers_beside, [20, 21, 22, 23, 24, 25], *arguments)
    beside_other = gloo.run(cp, numbers_beside, [120, 30, 62, 43, 9, 2], *arguments)
    assert beside_one == beside_other
    assert all(rank == beside_one[0] for rank in beside_one)
    assert beside_one[0][0][0] < 0
