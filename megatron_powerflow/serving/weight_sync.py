"""How does one server get a version of the weights, and when does it count as having it? When it has proved it.

    pause, start_weight_update, update_weights, finish_weight_update, reset_prefix_cache, resume; then the proof

    bring     all of it, of weights on a disk: any process that has the manifest can do it, in mid-step too
    pause, take_stream, confirm      the same in three parts, of weights that the run's ranks send meanwhile

Only HTTP. A response that was under way goes on with the new weights: its cache is thrown away and computed again, so
that every later token is drawn from the new policy's own distribution.

A server whose update failed has layers in an unknown state: it stays paused, and is to be started anew.

Left out: writing the files (`weight_writer.py`), sending (`weight_sender.py`), what is proved (`proof.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.serving.answers import MODEL
from megatron_powerflow.serving.manifest import Manifest
from megatron_powerflow.serving.proof import Proof, prove
from megatron_powerflow.serving.server import Garbage, Refused, Server, ServerError

UNPROVED = "?"  # behind a version that a server has and has not proved: no other process takes it for one
QUICK_SECONDS = 120.0  # for calls that only set something


class UpdateFailed(ServerError):
    """A server did not take the weights; it must be started anew before it can."""


@dataclass(frozen=True, slots=True)
class Sync:
    """What an update of one server came to. seconds: of the update, without the proof; as_changes: only changed bytes
    were read."""

    proof: Proof
    seconds: float
    as_changes: bool


def bring(server: Server, manifest: Manifest, *, seconds: float) -> Sync:
    """Give a server this version of the weights, unless it has it, and prove it.

    seconds: that loading may take. Raises ServerError where the server could not be spoken to, UpdateFailed where it
    did not take the weights, NotProved where it has them and computes something else.
    """
    began = time.monotonic()
    has = server.weight_version().removesuffix(UNPROVED)
    only_changes = bool(manifest.changes) and has == manifest.changes[-1].base
    if has != manifest.version:
        assert manifest.folder, f"{server.url} has {has!r}: {manifest.version!r} is nowhere to be read"
        _update(server, manifest, only_changes=only_changes, seconds=seconds)
    took = time.monotonic() - began
    return Sync(confirm(server, manifest, seconds=seconds), took, only_changes)


def confirm(server: Server, manifest: Manifest, *, seconds: float) -> Proof:
    """Let a server that has this version go on, and prove it. Raises as `bring`."""
    _go_on(server)  # also where the last try broke off in between
    proof = prove(server, manifest, seconds=seconds)
    server.post("/update_weight_version", {"new_version": manifest.version}, seconds=QUICK_SECONDS)
    return proof


def _update(server: Server, manifest: Manifest, *, only_changes: bool, seconds: float) -> None:
    update = {
        "names": sorted(manifest.checksums),
        "version": manifest.version,
        "folder": "" if only_changes else manifest.folder,
        "changes": [one.folder for one in (manifest.changes[-1:] if only_changes else manifest.changes)],
        "base": manifest.changes[-1].base if only_changes else "",
        "keep": manifest.keeps_copy,
    }
    pause(server)
    server.post("/init_weight_transfer_engine", {"init_info": {}}, seconds=QUICK_SECONDS)
    _take(server, update, manifest.version, seconds)


def pause(server: Server) -> None:
    """Let a server's responses wait where they are. Raises ServerError."""
    server.post("/pause?mode=keep", seconds=QUICK_SECONDS)


def take_stream(server: Server, version: str, names: Sequence[str], stream: dict[str, Any], *, seconds: float) -> None:
    """Have a paused server take the weights that come over a process group; returns once it has all of them.

    names: of the tensors. stream: where the group meets, and the rank of the server's first worker. Raises ServerError.
    """
    update = {"names": list(names), "version": version, "stream": stream}
    _take(server, update, version, seconds)


def _take(server: Server, update: dict[str, Any], version: str, seconds: float) -> None:
    try:
        server.post("/start_weight_update", seconds=QUICK_SECONDS)
        server.post("/update_weights", {"update_info": update}, seconds=seconds)
        server.post("/finish_weight_update", {"weight_version": version + UNPROVED}, seconds=seconds)
    except Refused as error:
        raise UpdateFailed(f"{error}: it is to be started anew, with the command of `powerflow vllm-args`") from None


def num_workers(server: Server) -> int:
    """Return how many processes a server's model is in. Raises ServerError."""
    reply = server.get("/get_world_size", seconds=QUICK_SECONDS)
    size = reply.get("world_size") if isinstance(reply, dict) else None
    if type(size) is not int or size < 1:
        raise Garbage(f"{server.url}/get_world_size: does not say how many workers it has")
    return size


def _go_on(server: Server) -> None:
    """Empty the caches of older weights, and let the server answer again."""
    reply = server.post("/reset_prefix_cache?reset_running_requests=true", seconds=QUICK_SECONDS)
    if not (isinstance(reply, dict) and reply.get("success") is True):
        raise Refused(f"{server.url}: its prefix cache, which is the old weights', could not be emptied: {reply}")
    server.post("/resume", seconds=QUICK_SECONDS)


def require_room(server: Server, longest: int) -> None:
    """Raise UserError where a server is not one of this program's, or takes shorter texts than a run needs: each of
    its prompts would be refused. longest: tokens of prompt and response. Raises ServerError where it does not say."""
    reply = server.get("/v1/models", seconds=QUICK_SECONDS)
    models = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise Garbage(f"{server.url}/v1/models: does not say which models it has")
    mine = [model for model in models if model.get("id") == MODEL]
    length = mine[0].get("max_model_len") if mine else None
    if type(length) is int and length >= longest:
        return
    has = f"takes texts of up to {length} tokens" if mine else f"has no model called {MODEL!r}"
    raise UserError(
        f"vLLM server {server.url} {has}; this run's prompts and responses have up to {longest} "
        "(rollout.max_prompt_tokens + rollout.max_response_tokens): start it with the command of `powerflow vllm-args`"
    )


def sleep(server: Server) -> None:
    """Have a server give back its GPUs' memory: its cache, and its weights, which it keeps in host memory.

    Raises ServerError. vLLM on CPUs answers, and gives nothing back.
    """
    server.post("/sleep?level=1", seconds=QUICK_SECONDS)


def wake(server: Server) -> None:
    """Have a server take back what it needs, if it sleeps. Raises ServerError."""
    reply = server.get("/is_sleeping", seconds=QUICK_SECONDS)
    if isinstance(reply, dict) and reply.get("is_sleeping"):
        server.post("/wake_up", seconds=QUICK_SECONDS)
