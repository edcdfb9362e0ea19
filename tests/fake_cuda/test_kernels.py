"""The stand-ins for Transformer Engine's kernels refuse what the real ones refuse."""

from __future__ import annotations

import pytest
import torch

from tests.fake_cuda.conftest import GPU
from tests.fake_cuda.device import FakeGpu


@pytest.fixture
def gpu():
    with FakeGpu() as gpu:
        yield gpu


def quantized(quantizer, *shape):
    return quantizer(torch.empty(*shape, dtype=torch.bfloat16, device="cuda"))


def per_tensor(**usage):
    import transformer_engine.pytorch as te

    return te.Float8CurrentScalingQuantizer(te.DType.kFloat8E4M3, torch.device("cuda"), **usage)


def product(A, B, layout: str):
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    return general_gemm(A, B, out_dtype=torch.bfloat16, layout=layout)[0]


def test_products_have_the_shapes_of_the_real_ones(gpu):
    x, weight, gradient = (
        torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((6, 2, 16), (32, 16), (6, 2, 32))
    )
    assert product(weight, x, "TN").shape == (6, 2, 32)
    assert product(weight, gradient, "NN").shape == (6, 2, 16)
    assert product(x.view(12, 16), gradient.view(12, 32), "NT").shape == (32, 16)
    with pytest.raises(RuntimeError, match="Invalid matrix dimensions"):
        product(weight, gradient, "TN")


def test_an_fp8_product_needs_leading_dimensions_of_16(gpu):
    weight = quantized(per_tensor(), 32, 48)
    assert product(weight, quantized(per_tensor(), 8, 48), "TN").shape == (8, 32)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        product(quantized(per_tensor(), 32, 40), quantized(per_tensor(), 8, 40), "TN")


@pytest.mark.skipif(GPU != "h100", reason="Blackwell multiplies FP8 in any layout")
def test_on_hopper_the_product_over_tokens_needs_tokens_in_16s_and_a_transposed_copy(gpu):
    x, gradient = quantized(per_tensor(), 8, 48), quantized(per_tensor(), 8, 32)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        product(x, gradient, "NT")
    x, gradient = quantized(per_tensor(columnwise=False), 16, 48), quantized(per_tensor(), 16, 32)
    with pytest.raises(RuntimeError, match="missing column-wise usage"):
        product(x, gradient, "NT")


def test_mxfp8_takes_whole_blocks(gpu):
    import transformer_engine.pytorch as te

    quantizer = te.MXFP8Quantizer(te.DType.kFloat8E4M3)
    assert quantized(quantizer, 64, 32).shape == (64, 32)
    with pytest.raises(RuntimeError, match="divisible by 32"):
        quantized(quantizer, 16, 32)


def test_what_nobody_stands_in_for_is_refused_by_name(gpu):
    import transformer_engine_torch as tex

    with pytest.raises(NotImplementedError, match="layernorm_fwd has no stand-in"):
        tex.layernorm_fwd()
