"""Trainer and server agree to the byte: checksums, and files of changed bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from megatron_powerflow.serving.on_server.powerflow_weight_files import (
    apply_changes,
    changes_of,
    checksum,
    columns,
    entries,
    read,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_sees_every_mistake_of_a_transport(dtype):
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    one_bit = weight.clone()
    one_bit.view(torch.int16)[0, 0] ^= 1
    rows = weight[[1, 0, 2, 3, 4, 5]]
    wrong = [weight.T.contiguous(), one_bit, rows, weight.reshape(4, 9), weight[:5], -weight, torch.zeros_like(weight)]
    assert len({checksum(value) for value in (weight, *wrong)}) == 1 + len(wrong)
    assert checksum(weight.clone()) == checksum(weight) == checksum(weight.T.contiguous().T)


def test_a_checksum_does_not_depend_on_how_much_is_summed_at_a_time(monkeypatch):
    from megatron_powerflow.serving.on_server import powerflow_weight_files as files

    weight = torch.randn(777)
    whole = checksum(weight)
    monkeypatch.setattr(files, "CHECKSUM_ELEMENTS", 100)
    assert checksum(weight) == whole


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(DTYPES), st.sampled_from([0.0, 1e-3, 0.1, 0.6, 1.0]), st.integers(0, 2**16), st.integers(1, 3000)
)
def test_changes_bring_one_version_to_the_next_bit_for_bit(tmp_path_factory, dtype, share, seed, size):
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(seed)
    before = {"a.weight": torch.randn(size, generator=generator).to(dtype), "b": torch.ones(3, 2, dtype=dtype)}
    moved = torch.rand(size, generator=generator) < share
    now = {"a.weight": torch.where(moved, before["a.weight"] * 1.0078125, before["a.weight"]), "b": before["b"]}
    (folder / "whole").mkdir()
    (folder / "changes").mkdir()
    save_file(before, folder / "whole" / "m.safetensors")
    found = {}
    for name in now:
        found |= changes_of(name, columns(before[name]), columns(now[name]))
    if found:
        save_arrays(found, folder / "changes" / "c.safetensors")
    assert not any(key.startswith("b|") for key in found), "a tensor that stays costs nothing"
    num_bytes = sum(values.nbytes for values in found.values())
    assert num_bytes <= now["a.weight"].numel() * now["a.weight"].element_size(), "never more than all of it"
    apply_changes(folder / "whole", folder / "changes")
    result = load_file(folder / "whole" / "m.safetensors")
    assert all(torch.equal(result[name], now[name]) for name in now)
    assert {name: checksum(read(entry)) for name, entry in entries(folder / "whole").items()} == {
        name: checksum(value) for name, value in now.items()
    }


def test_few_changed_numbers_cost_few_bytes():
    before = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).bfloat16()
    now = before.clone()
    now[::100] = now[::100] * 1.0078125  # the next number of bf16 or the one behind it
    size = sum(values.nbytes for values in changes_of("w", columns(before), columns(now)).values())
    assert size < 0.05 * now.numel() * 2


def test_changes_for_another_tensor_are_refused(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "changes").mkdir()
    save_file({"a": torch.zeros(4)}, tmp_path / "whole" / "m.safetensors")
    save_arrays(
        changes_of("b", np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)), tmp_path / "changes" / "c.safetensors"
    )
    with pytest.raises(KeyError):
        apply_changes(tmp_path / "whole", tmp_path / "changes")
