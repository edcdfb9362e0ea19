"""Where does each number of a checkpoint stand in Megatron's weights? By hand: a round trip cannot see a swap that is
made in both directions, and the forward pass of a real model (`tests/distributed/test_hf_parity.py`) takes minutes.

Two query groups of two heads of two dimensions, hidden size 1; every row's number says whose it is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_powerflow.architecture import Experts, Mla
from megatron_powerflow.hf.operations import (
    Columns,
    Fused,
    GateUp,
    Op,
    Qkv,
    Replicated,
    Rows,
    ShardShape,
    VocabRows,
    width,
)
from tests.architectures import make_architecture
from tests.unit.test_conversion import InMemory

ARCHITECTURE = make_architecture(
    num_layers=1,
    hidden_size=1,
    ffn_hidden_size=4,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=2,
    vocab_size=5,
    tied_embeddings=False,
)
# head h of q: rows h0, h1; group g of k: 100 + g0, g1; of v: 200 + g0, g1
Q = [0, 1, 10, 11, 20, 21, 30, 31]
K = [100, 101, 110, 111]
V = [200, 201, 210, 211]
GATE, UP = [1, 2, 3, 4], [11, 12, 13, 14]


def column(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def shards(op: Op, tensors: dict[str, torch.Tensor], tp: int, padded: int = 6) -> list[torch.Tensor]:
    names = op.hf_names(0)
    source, shapes = InMemory(tensors), [ShardShape(ARCHITECTURE, rank, tp, padded) for rank in range(tp)]
    found = [op.shard(source, names, shape) for shape in shapes]
    for name, merged in zip(names, op.merge(found, shapes[0]), strict=True):
        assert torch.equal(merged, tensors[name]), name
    assert [tuple(tensors[name].shape) for name in names] == list(op.hf_shapes(ARCHITECTURE))
    return found


FIRST_GROUP = [0, 1, 10, 11, 100, 101, 200, 201]
SECOND_GROUP = [20, 21, 30, 31, 110, 111, 210, 211]


@pytest.mark.parametrize("fused", [False, True])
def test_queries_keys_and_values_stand_by_group(fused):
    """[q of group 0, k of group 0, v of group 0, q of group 1, ...], a whole group on each rank."""
    op, tensors = Qkv("w", "q", "k", "v"), {"q": column(Q), "k": column(K), "v": column(V)}
    if fused:
        op, tensors = Fused(op, "qkv"), {"qkv": column(Q + K + V)}
    assert [shard.flatten().tolist() for shard in shards(op, tensors, 1)] == [FIRST_GROUP + SECOND_GROUP]
    assert [shard.flatten().tolist() for shard in shards(op, tensors, 2)] == [FIRST_GROUP, SECOND_GROUP]


@pytest.mark.parametrize("fused", [False, True])
def test_two_ranks_have_half_of_a_groups_rows_each(fused):
    """Four ranks for two groups: a rank's rows begin among the queries and end there, or go on to keys and values."""
    op, tensors = Qkv("w", "q", "k", "v"), {"q": column(Q), "k": column(K), "v": column(V)}
    if fused:
        op, tensors = Fused(op, "qkv"), {"qkv": column(Q + K + V)}
    halves = [group[half : half + 4] for group in (FIRST_GROUP, SECOND_GROUP) for half in (0, 4)]
    assert [shard.flatten().tolist() for shard in shards(op, tensors, 4)] == halves
    eighths = [group[part : part + 2] for group in (FIRST_GROUP, SECOND_GROUP) for part in (0, 2, 4, 6)]
    assert [shard.flatten().tolist() for shard in shards(op, tensors, 8)] == eighths


def test_the_bias_stands_as_its_weight():
    tensors = {name: column(rows).flatten() for name, rows in (("q", Q), ("k", K), ("v", V))}
    assert [s.tolist() for s in shards(Qkv("w.bias", "q", "k", "v"), tensors, 2)] == [FIRST_GROUP, SECOND_GROUP]


@pytest.mark.parametrize("fused", [False, True])
def test_each_rank_has_its_gates_above_its_ups(fused):
    op, tensors = GateUp("w", "gate", "up"), {"gate": column(GATE), "up": column(UP)}
    if fused:
        op, tensors = Fused(op, "gate_up"), {"gate_up": column(GATE + UP)}
    assert [shard.flatten().tolist() for shard in shards(op, tensors, 1)] == [GATE + UP]
    assert [shard.flatten().tolist() for shard in shards(op, tensors, 2)] == [[1, 2, 11, 12], [3, 4, 13, 14]]


def test_ranks_hold_rows_or_columns_in_their_order():
    weight = torch.arange(4.0)
    assert [s.tolist() for s in shards(Columns("w", "x", outputs="ffn"), {"x": weight[:, None]}, 2)] == [
        [[0], [1]],
        [[2], [3]],
    ]
    assert [s.tolist() for s in shards(Rows("w", "x", inputs="ffn"), {"x": weight[None]}, 2)] == [[[0, 1]], [[2, 3]]]
    assert [s.tolist() for s in shards(Replicated("w", "x"), {"x": weight[:1]}, 2)] == [[0], [0]]


def test_padding_of_the_vocabulary_is_0_and_behind_it():
    """Five rows padded to six, and to eight: the last rank of four then has nothing real."""
    tensors = {"x": column([1, 2, 3, 4, 5])}
    assert [s.flatten().tolist() for s in shards(VocabRows("w", "x"), tensors, 2)] == [[1, 2, 3], [4, 5, 0]]
    found = shards(VocabRows("w", "x"), tensors, 4, padded=8)
    assert [s.flatten().tolist() for s in found] == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_widths_by_hand():
    """DeepSeek-V3: 128 heads of 128 + 64, values 128, latent 512 + 64."""
    latent = replace(
        ARCHITECTURE,
        num_attention_heads=128,
        head_dim=192,
        mla=Mla(1536, 512, 128, 64, 120),
        experts=Experts(8, 2, normalized=True, dense_ffn_hidden_size=18, shared_ffn_hidden_size=2),
    )
    expected = {
        "attention": 128 * 120,
        "ffn": 4,
        "queries": 128 * 192,
        "q_latent": 1536,
        "kv_latent": 512,
        "kv_latent_and_rope": 576,
        "keys_and_values": 128 * (128 + 120),
        "experts": 8,
        "dense_ffn": 18,
        "shared_ffn": 2,
        "hidden_size": 1,
    }
    assert {word: width(latent, word) for word in expected} == expected
    assert width(ARCHITECTURE, "attention") == 8
