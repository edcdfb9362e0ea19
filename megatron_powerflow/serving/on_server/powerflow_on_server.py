"""How does a vLLM server take weights, from a folder or a stream, and what does it know of them afterwards?

This file runs in the server's processes, in an environment of its own: it imports vLLM and torch, and nothing of
`megatron_powerflow`. `powerflow vllm-args` puts its folder on PYTHONPATH and names `Weights` as --worker-extension-cls;
importing the file registers the transport, which --weight-transfer-config then names.

    POST /start_weight_update, /update_weights {"update_info": {...}}, /finish_weight_update
    POST /collective_rpc {"method": "weights_received"}    name -> checksum of each tensor, as it was loaded
    POST /collective_rpc {"method": "weights_unlike"}      layers that compute something else than what was received

Every server takes both ways: an update says which it is. Upstream's newest documentation has a transport over a disk,
which vLLM 0.32 has not; why its own over NCCL is not used stands in `powerflow_weight_stream.py`.

Left out: who writes the folders (`serving/weight_writer.py`), who sends (`serving/weight_sender.py`), the sequence of
calls (`serving/weight_sync.py`).
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from powerflow_weight_files import Entry, apply_changes, checksum, entries, read
from powerflow_weight_stream import Place, join_as_worker, receive
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "powerflow"
TRIED_ROWS = 8  # of an embedding, that are looked up to see what it holds
# Of the largest output: how far a layer may be from the same product in fp32, by the layer's dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where an update's tensors are.

    names: what must come, Hugging Face names. folder: safetensors files with all of them; "" where the server has a
    copy of the last ones. changes: folders of changed bytes, to be applied in this order. base: version that the copy
    must have where `folder` is "". version: what it is then. keep: whether a copy is kept, for changes to come.
    stream: in place of all those: the fields of a `Place` where a process group meets, and "first_rank", that of this
    server's first worker in it.
    """

    names: list[str]
    version: str
    folder: str = ""
    changes: list[str] = field(default_factory=list)
    base: str = ""
    keep: bool = False
    stream: dict[str, Any] | None = None


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The server's side of both transports."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config, vllm_config, device: torch.device, model: nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._copy: Path | None = None  # on this machine's disk, of all tensors
        self._copy_version = ""
        self.received: dict[str, str] = {}
        self.products: dict[str, Tensor] = {}  # what each matrix makes of `probe_vector`; vectors as they are
        self.rows: dict[str, Tensor] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Do nothing: each update says where its tensors are."""

    def start_weight_update(self) -> None:
        """Forget the update before. The layers stay as they are until tensors are there."""
        self.received, self.products, self.rows = {}, {}, {}

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load an update's tensors, one at a time.

        Raises ValueError where one is missing: in a folder before any is loaded, in a stream at its end. Raises Stopped
        or RuntimeError where a stream does not begin, or breaks off.
        """
        if update_info.stream is not None:
            self._receive_stream(update_info.names, **update_info.stream)
            return
        folder = self._whole(update_info)
        found = entries(folder)
        if missing := sorted(set(update_info.names) - set(found)):
            raise ValueError(f"{folder}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
        self._load(_read_all(found))

    def _receive_stream(self, names: list[str], *, first_rank: int, **place: Any) -> None:
        group = join_as_worker(Place(**place), first_rank + get_world_group().rank, self.device)
        missing = set(names)

        def coming() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in receive(group, self.device):
                missing.discard(name)
                yield name, tensor

        try:
            self._load(coming())
        finally:
            group.close()
        if missing:
            raise ValueError(f"{len(missing)} tensors were not sent: {', '.join(sorted(missing)[:5])}")

    def _load(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        """Put the tensors into the layers, and note what is to be known of each."""
        initialize_layerwise_reload(self.model)
        self.model.load_weights(self._noted(pairs))

    def _whole(self, update_info: UpdateInfo) -> Path:
        """Return a folder with every tensor: the update's own, or this server's copy, brought up to date."""
        if update_info.folder and not update_info.keep:
            return Path(update_info.folder)
        if not update_info.folder and update_info.base != self._copy_version:
            raise ValueError(f"changes to {update_info.base!r} came to a server that has {self._copy_version!r}")
        group = get_world_group()
        if self._copy is None:
            # One copy for all workers of a machine, under a name that the server's next start finds and replaces.
            # The host is in it for containers that share /tmp.
            port = os.environ.get("POWERFLOW_PORT", f"of-{os.getppid()}")
            name = f"powerflow-weights-{os.getuid()}-{socket.gethostname()}-{port}"
            self._copy = Path(tempfile.gettempdir()) / name
        if group.local_rank == 0:
            if update_info.folder:
                shutil.rmtree(self._copy, ignore_errors=True)
                shutil.copytree(update_info.folder, self._copy)
            for changes in update_info.changes:
                apply_changes(self._copy, Path(changes))
        group.barrier()
        self._copy_version = update_info.version
        return self._copy

    def _noted(self, pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in pairs:
            self.received[name] = checksum(tensor)
            if tensor.ndim == 2:
                numbers = tensor.float()
                self.products[name] = (numbers @ probe_vector(tensor.shape[1]).to(tensor.device)).cpu()
                self.rows[name] = numbers[:TRIED_ROWS].cpu().clone()
            elif tensor.ndim == 1:
                self.products[name] = tensor.float().cpu().clone()
            yield name, tensor

    def finish_weight_update(self) -> None:
        """Let the layers take over what they were given, the output layer of tied embeddings too."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Remove the copy of this server's weights."""
        if self._copy is not None:
            shutil.rmtree(self._copy, ignore_errors=True)


def _read_all(found: dict[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors in the order of their places on the disk."""
    for name in sorted(found, key=lambda name: (str(found[name].file), found[name].first)):
        yield name, read(found[name])


def repack_tied_head(model: nn.Module) -> None:
    """Pack the output layer anew where it is tied to the embedding.

    vLLM 0.32 on CPU: a linear layer computes with a packed copy of its weight, made when a tensor for it was loaded.
    No tensor comes for a tied output layer, so the old copy would go on (log-probs off by .4, and no error). Without
    need once `weights_unlike` stays empty without this call.
    """
    head = getattr(model, "lm_head", None)
    if isinstance(head, ParallelLMHead) and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def probe_vector(size: int) -> Tensor:
    """Return the vector that every matrix with `size` columns is tried on: [size] fp32."""
    return torch.randn(size, generator=torch.Generator().manual_seed(size))


class Weights:
    """What a worker of the server can be asked of its weights, by /collective_rpc."""

    weight_transfer_engine: WeightReceiver  # the worker's

    def weights_received(self) -> dict[str, str]:
        """Return name -> checksum of each tensor of the last update, as it was loaded."""
        return self.weight_transfer_engine.received

    def weights_unlike(self) -> dict[str, list[str]]:
        """Return layers that compute something else than the received tensors, and those that were not tried.

        "unlike": HF names of their tensors; "untried": of the tensors that no layer was found for. With tensor
        parallelism in the server all are untried: a worker has but a part of each.
        """
        engine = self.weight_transfer_engine
        if get_world_group().world_size > 1:
            return {"unlike": [], "untried": sorted(engine.received)}
        return compare(engine.model, engine.products, engine.rows)


@torch.no_grad()
def compare(model: nn.Module, products: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, list[str]]:
    """Ask every layer for what it computes, and compare with what the received tensors give."""
    packed = getattr(model, "packed_modules_mapping", {})
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    unlike: list[str] = []
    tried: set[str] = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix, _, last = name.rpartition(".")
        parts = [f"{prefix}.{part}.weight" if prefix else f"{part}.weight" for part in packed.get(last, [last])]
        if isinstance(layer, ParallelLMHead):
            sources = parts if parts[0] in products else [key for key in products if "embed" in key] if tied else []
            _try_product(layer, sources, f"{name}.weight" + (" (tied)" if sources != parts else ""), products, unlike)
            tried.update(sources)
        elif isinstance(layer, VocabParallelEmbedding) and parts[0] in rows:
            wanted, places = rows[parts[0]], torch.arange(len(rows[parts[0]]), device=layer.weight.device)
            _note(unlike, parts, layer(places).float(), wanted, layer.weight.dtype)
            tried.update(parts)
        elif isinstance(layer, LinearBase) and all(part in products for part in parts):
            _try_product(layer, parts, "", products, unlike)
            tried.update(parts)
    for name, parameter in model.named_parameters():
        if name in products and parameter.shape == products[name].shape and parameter.ndim == 1:
            _note(unlike, [name], parameter.float(), products[name], parameter.dtype)
            tried.add(name)
    return {"unlike": sorted(set(unlike)), "untried": sorted(set(products) - tried)}


def _try_product(layer: Any, sources: list[str], named: str, products: dict[str, Tensor], unlike: list[str]) -> None:
    if not sources:
        return
    wanted = torch.cat([products[source] for source in sources])
    dtype = layer.params_dtype if hasattr(layer, "params_dtype") else layer.weight.dtype
    size = getattr(layer, "input_size", None) or layer.embedding_dim
    given = layer.quant_method.apply(layer, probe_vector(size).to(layer.weight.device, dtype)[None], None)[0].float()
    _note(unlike, [named] if named else sources, given[: len(wanted)], wanted, dtype)


def _note(unlike: list[str], names: list[str], given: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    given = given.cpu()
    bound = TOLERANCE.get(dtype, 0.1) * float(wanted.abs().max().clamp(min=1e-6))
    if given.shape != wanted.shape or not bool(((given - wanted).abs() <= bound).all()):
        unlike.extend(names)


WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
