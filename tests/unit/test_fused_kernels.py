"""Fused and grouped kernels are chosen where they compute the same: the choice; no GPU is here to run them."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_powerflow.config import PrecisionSection
from megatron_powerflow.model import fused_kernels as module
from megatron_powerflow.model.fused_kernels import FusedKernels, fused_kernels, on_transformer_engine
from megatron_powerflow.training.optimizer import overlaps_sums
from tests.unit.test_layout import ARCHITECTURE, MIXTURE

BF16, FP8 = PrecisionSection(dtype="bf16"), PrecisionSection(dtype="fp8", fp8_recipe="tensorwise")
SCALED = replace(ARCHITECTURE, rope=replace(ARCHITECTURE.rope, attention_factor=1.19))


@pytest.mark.parametrize(
    ("architecture", "precision", "has_extension", "expected"),
    [
        (ARCHITECTURE, BF16, False, FusedKernels(True, False, False)),
        (ARCHITECTURE, FP8, True, FusedKernels(True, False, True)),
        (MIXTURE, BF16, True, FusedKernels(True, True, True)),
        (MIXTURE, FP8, False, FusedKernels(True, False, False)),
        (SCALED, BF16, False, FusedKernels(False, False, False)),
    ],
)
def test_the_choices_on_transformer_engine(architecture, precision, has_extension, expected):
    assert on_transformer_engine(architecture, precision, has_extension=has_extension) == expected


def test_on_our_own_layers_nothing_is_fused(monkeypatch):
    nothing = FusedKernels(False, False, False)
    assert fused_kernels(MIXTURE, BF16, cp=1) == nothing  # no Transformer Engine here
    monkeypatch.setattr(module, "use_transformer_engine", lambda precision: True)
    assert fused_kernels(MIXTURE, BF16, cp=1) == FusedKernels(True, True, False)
    assert fused_kernels(replace(MIXTURE, attention_softcap=50.0), BF16, cp=1) == nothing
    assert fused_kernels(replace(MIXTURE, sliding_window=64), BF16, cp=1) == FusedKernels(True, True, False)
    assert fused_kernels(replace(MIXTURE, sliding_window=64), BF16, cp=2) == nothing


def test_apexs_extension_counts_where_it_can_be_imported(monkeypatch):
    name = "fused_weight_gradient_mlp_cuda"
    monkeypatch.setitem(sys.modules, name, None)  # there, and broken
    assert not module.has_weight_gradient_extension()
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert module.has_weight_gradient_extension()


@pytest.mark.parametrize(
    ("device", "dp", "cp", "overlaps"),
    [("cuda", 1, 1, False), ("cuda", 2, 1, True), ("cuda", 1, 2, True), ("cpu", 4, 1, False)],
)
def test_gradients_are_summed_during_the_backward_pass_on_gpus_with_replicas(device, dp, cp, overlaps):
    groups = SimpleNamespace(device=torch.device(device), dp_size=dp, cp_size=cp)
    assert overlaps_sums(groups) == overlaps
