"""What do Transformer Engine's kernels make? Tensors of the right shape, and refusals of what the real ones refuse.

Transformer Engine's Python is its own, as its wheel on PyPI has it. Its compiled half, the module
`transformer_engine_torch`, is this: functions with the same arguments that allocate what the real ones allocate and
compute nothing. What is checked here is what the C++ checks (`csrc/`, `common/gemm/cublaslt_gemm.cu` of 2.20), where
FP8 is concerned: the copies that a product needs are there, sizes agree, leading dimensions are multiples of 16, and
mxfp8 gets whole blocks of 32. What its Python names and nobody stands in for raises NotImplementedError when called.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections import Counter
from enum import IntEnum
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

NAME = "transformer_engine_torch"
calls: Counter = Counter()  # (function, shape): how often; `quantized` of the weights, ...


def install() -> None:
    """Make `transformer_engine` importable, once torch answers as on a GPU (`patches.install`)."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None, "its wheel is not installed: bash tests/fake_cuda/run.sh"
    root = Path(str(spec.origin)).parent
    sys.modules[NAME] = _stand_in(root)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own word for: do not load the compiled libraries
    common = importlib.util.spec_from_file_location(
        "transformer_engine.common", root / "common/__init__.py", submodule_search_locations=[str(root / "common")]
    )
    assert common is not None
    assert common.loader is not None
    module = importlib.util.module_from_spec(common)
    sys.modules["transformer_engine.common"] = module
    common.loader.exec_module(module)
    module.load_framework_extension = lambda framework: None  # it is there already
    import transformer_engine.pytorch

    transformer_engine.common = module
    from triton.runtime.jit import JITFunction

    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: None  # Triton's kernels are not launched either


def _stand_in(root: Path) -> ModuleType:
    """Make the module: the functions below, the enumerations, and refusals under all other names that are used."""
    module = ModuleType(NAME)
    source = "\n".join(path.read_text() for path in (root / "pytorch").rglob("*.py"))
    names = set(re.findall(r"\btex\.([A-Za-z]\w*)", source))
    for imported in re.findall(rf"from {NAME} import \(([^)]*)\)|from {NAME} import ([^(\n]*)", source):
        names |= set(re.findall(r"[A-Za-z]\w*", " ".join(imported)))
    for name in sorted(names):
        setattr(module, name, _enumeration(name, source) if re.match("NVTE|CommOverlap", name) else _missing(name))
    for name, function in FUNCTIONS.items():
        setattr(module, name, function)
    return module


def _enumeration(name: str, source: str) -> type[IntEnum]:
    aliases = "|".join([name, *re.findall(rf"^(\w+) = tex\.{name}$", source, re.MULTILINE)])
    members = dict.fromkeys(re.findall(rf"\b(?:{aliases})\.([A-Za-z]\w*)", source))
    return IntEnum(name, [member for member in members if member != "cast"], start=0)


def _missing(name: str):
    def refuse(*args, **kwargs):
        raise NotImplementedError(f"{NAME}.{name} has no stand-in in tests/fake_cuda/kernels.py")

    return refuse


class DType(IntEnum):
    """The dtypes by the numbers that the C++ has for them."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


# where a module keeps the quantizers of its products
FP8FwdTensors = IntEnum(
    "FP8FwdTensors", [f"GEMM{i}_{part}" for i in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = IntEnum(
    "FP8BwdTensors", [f"GRAD_{part}{i}" for i in (1, 2, 3) for part in ("OUTPUT", "INPUT")], start=0
)
DTYPES = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def _dtype(value, default: torch.dtype) -> torch.dtype:
    if value is None or isinstance(value, torch.dtype):
        return value or default
    return DTYPES[int(value)]


def _shape(tensor) -> tuple[int, ...]:
    return tuple(tensor.size())


# ----- quantized tensors -----


def create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory=False):
    from transformer_engine.pytorch.dynamo.tensor_spec import TensorSpec
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    if isinstance(quantizer, MXFP8Quantizer) and (shape[-1] % 32 or math.prod(shape[:-1]) % 32):
        raise RuntimeError(f"MXFP8 requires tensor dims that are divisible by 32 (got shape={tuple(shape)})")
    return TensorSpec(tuple(shape), dtype, quantizer=quantizer, device=device).create_tensor()


def quantize(tensor, quantizer, output=None, noop=None):
    calls["quantize", _shape(tensor)] += 1
    if getattr(quantizer, "with_amax_reduction", False):
        amax = torch.empty(1, dtype=torch.float32, device=tensor.device)
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    if output is not None:
        assert _shape(output) == _shape(tensor), (_shape(output), _shape(tensor))
        return output
    return create_empty_quantized_tensor(quantizer, _shape(tensor), tensor.dtype, tensor.device)


def dequantize(tensor, dtype):
    return torch.empty(_shape(tensor), dtype=_dtype(dtype, torch.bfloat16), device=tensor.device)


def bgrad_quantize(grad_output, quantizer):
    return grad_output.new_empty(grad_output.shape[-1]), quantize(grad_output, quantizer)


def fp8_transpose(data, dtype, out=None):
    return data.new_empty(data.shape[-1], *data.shape[:-1]) if out is None else out


def swap_first_dims(tensor, out=None):
    return tensor.new_empty(tensor.shape[1], tensor.shape[0], *tensor.shape[2:]) if out is None else out


def split_quantize(tensor, splits, quantizers):
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(list(splits)), quantizers, strict=True)]


# ----- matrix products -----


def generic_gemm(
    A,
    transa,
    B,
    transb,
    D,
    quantizer,
    output_dtype,
    bias,
    bias_dtype,
    gelu,
    gelu_in,
    grad,
    workspace,
    workspace_size,
    accumulate,
    use_split_accumulator,
    comm_overlap=None,
    comm_type=None,
    extra_output=None,
    bulk_overlap=False,
    alpha=1.0,
    beta=None,
):
    """D = B A^T, as rows: [.., k] x [n, k] -> [.., n] for transa, and so on."""
    assert comm_overlap is None, "communication under products is not stood in for"
    shape = _product_shape(_shape(A), transa, _shape(B), transb)
    _check_fp8_product(A, transa, B, transb)
    calls["gemm", _shape(A), _shape(B)] += 1
    device = A.device
    if D is None:
        out = torch.empty(shape, dtype=_dtype(output_dtype, torch.bfloat16), device=device)
        if quantizer is not None:
            out = quantize(out, quantizer)
    else:
        assert math.prod(D.shape) == math.prod(shape), (tuple(D.shape), shape)
        out = D
    bias_grad = None
    if bias is not None and grad:
        bias_grad = torch.empty(_shape(B)[-1], dtype=_dtype(bias_dtype, torch.bfloat16), device=device)
    return out, bias_grad, gelu_in if gelu else None, extra_output


def _product_shape(a: tuple[int, ...], transa: bool, b: tuple[int, ...], transb: bool) -> tuple[int, ...]:
    a0, a1, b0, b1 = math.prod(a[:-1]), a[-1], math.prod(b[:-1]), b[-1]
    if (a1 if transa else a0) != (b0 if transb else b1):
        raise RuntimeError(f"Invalid matrix dimensions for GEMM (A={a}, transa={transa}, B={b}, transb={transb})")
    return ((b1,) if transb else tuple(b[:-1])) + (a0 if transa else a1,)


def _check_fp8_product(A, transa: bool, B, transb: bool) -> None:
    """Refuse what cuBLAS's FP8 products do not take. On Hopper both operands lie along the summed dimension."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    quantized = [isinstance(operand, QuantizedTensorStorage) for operand in (A, B)]
    if not any(quantized):
        return
    assert all(quantized), "an FP8 product of one FP8 matrix and one that is not"
    for operand, name, rowwise in ((A, "A", transa), (B, "B", not transb)):
        usages = operand.get_usages()
        per_tensor = hasattr(operand, "_data") and is_non_tn_fp8_gemm_supported()
        if not usages["rowwise" if rowwise else "columnwise"] and not per_tensor:
            raise RuntimeError(f"Input {name} is missing {'row' if rowwise else 'column'}-wise usage")
        rows, columns = math.prod(_shape(operand)[:-1]), _shape(operand)[-1]
        leading = columns if rowwise or is_non_tn_fp8_gemm_supported() else rows
        if leading % 16:
            raise RuntimeError(
                f"Leading dimension requirement on {name} for FP8 GEMM: {leading} is no multiple of 16 "
                f"(shape={_shape(operand)})"
            )


def te_general_grouped_gemm(
    A, transa, B, transb, D, D_type, m_splits, bias, bias_type, single_output, pre_gelu_out, grad, workspace, *args
):
    """Products that go into the given outputs; with single_output all rows of one."""
    for a, b in zip(A, B, strict=True):
        if math.prod(_shape(b)):
            _product_shape(_shape(a), transa, _shape(b), transb)
            _check_fp8_product(a, transa, b, transb)
    return bias


# ----- norms, attention, rotation -----


def rmsnorm_fwd(x, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    assert x.shape[1:] == weight.shape, (x.shape, weight.shape)
    out = torch.empty(x.shape, dtype=_dtype(otype, x.dtype), device=x.device) if ln_out is None else ln_out
    if quantizer is not None:
        out = quantize(out, quantizer) if ln_out is None or isinstance(ln_out, torch.Tensor) else ln_out
    return out, None, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    assert dz.shape == x.shape, (dz.shape, x.shape)
    return torch.empty_like(x), torch.empty_like(gamma)


def get_fused_attn_backend(parameters):
    """cuDNN's attention takes all that the models of this package ask of it in 16 bits."""
    backend = sys.modules[NAME].NVTE_Fused_Attn_Backend
    return backend.NVTE_F16_arbitrary_seqlen, ""


def fused_attn_fwd(max_seqlen_q, max_seqlen_kv, is_training, *arguments):
    q, _, v = (argument for argument in arguments if isinstance(argument, torch.Tensor) and argument.dim() >= 3)
    calls["attention", _shape(q), max_seqlen_q, max_seqlen_kv] += 1
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    heads = q.shape[-2]
    statistics = (
        (q.shape[0], heads, 1) if q.dim() == 3 else (q.shape[0] * q.shape[1] // max_seqlen_q, heads, max_seqlen_q, 1)
    )
    state = torch.empty(2, dtype=torch.int64, device=q.device)
    return [out, torch.empty(statistics, dtype=torch.float32, device=q.device), state]


def fused_attn_bwd(*arguments):
    q, k, v = [argument for argument in arguments if isinstance(argument, torch.Tensor) and argument.dim() >= 3][:3]
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v)]


def fused_rope_forward(tensor, freqs, start_positions, qkv_format, *arguments):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


fused_rope_backward = fused_rope_forward


# ----- optimizers -----


def multi_tensor_l2norm(chunk_size, noop, tensor_lists, per_tensor=False):
    (tensors,) = tensor_lists
    device = tensors[0].device
    norms = torch.empty(len(tensors) if per_tensor else 0, dtype=torch.float32, device=device)
    return torch.empty(1, dtype=torch.float32, device=device), norms


def _in_place(chunk_size, noop, tensor_lists, *arguments):
    """Kernels that write into lists of tensors of equal sizes."""
    for together in zip(*tensor_lists, strict=True):
        assert len({tensor.numel() for tensor in together}) == 1, [tuple(t.shape) for t in together]


FUNCTIONS = {
    function.__name__: function
    for function in (
        create_empty_quantized_tensor,
        quantize,
        dequantize,
        bgrad_quantize,
        fp8_transpose,
        swap_first_dims,
        split_quantize,
        generic_gemm,
        te_general_grouped_gemm,
        rmsnorm_fwd,
        rmsnorm_bwd,
        get_fused_attn_backend,
        fused_attn_fwd,
        fused_attn_bwd,
        fused_rope_forward,
        multi_tensor_l2norm,
    )
}
FUNCTIONS |= dict.fromkeys(
    ("multi_tensor_adam", "multi_tensor_scale", "multi_tensor_scale_tensor", "multi_tensor_adam_param_remainder"),
    _in_place,
)
FUNCTIONS |= {
    "DType": DType,
    "FP8FwdTensors": FP8FwdTensors,
    "FP8BwdTensors": FP8BwdTensors,
    "fused_rope_backward": fused_rope_backward,
    "get_cublasLt_version": lambda: 130000,
    "get_cudnn_version": lambda: 91300,
    "get_num_cublas_streams": lambda: 4,
    "get_stream_priority_range": lambda device=None: (0, -5),
    "device_supports_multicast": lambda device=None: False,
    "ubuf_built_with_mpi": lambda: False,
}
