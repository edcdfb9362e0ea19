"""How does the host's work of a step grow with rollouts and replicas? Before and after each rank got only its own.

    python -m benchmarks.host_scale [--rollouts 512] [--replicas 16] [--tokens 512] [--ways after]

Light gloo processes, forked from one that has imported torch; each is a replica without a model, which has sampled its
share of random rollouts (lengths even in 1 to --tokens). It plans, annotates and packs its micro-batches:

    before   all rollouts, annotated where they were sampled, are gathered by every rank as pickled objects
    after    `pack_updates`: lengths are gathered, rollouts travel as bytes to the replica that trains on them
    share    the same work on as many rollouts without other replicas: what remains if exchange and plan were free

The micro-batches of before and after must be equal to the last bit, or nothing is printed. CPU seconds are of the
process, gloo's threads among them; received are the bytes of the tensors that torch's collectives fill for it, padding
and its own part included, a sum's twice.

Left out: the tokenizer's decoding, which grows with the share in every way; seconds by the clock, since the processes
share the machine's cores.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from megatron_powerflow.config_file import parse_config
from megatron_powerflow.data.bins import flop_count, plan_update
from megatron_powerflow.data.packing import pack_streams
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.records import MicroBatch, Prompt, Rollout
from megatron_powerflow.training.micro_batches import bin_rule, pack_updates
from megatron_powerflow.training.rewards import annotate
from megatron_powerflow.training.staleness import SampledBy
from tests.architectures import make_architecture

GROUP = 16
PROMPT_TOKENS = 128
WAYS = ("before", "after", "share")
ARCHITECTURE = make_architecture(  # of 7B; the plan asks for its FLOPs
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=128000,
    tied_embeddings=False,
)


def plan_of(num_rollouts: int, replicas: int, tokens: int) -> SimpleNamespace:
    """What `pack_updates` reads of a run's plan."""
    layout = Layout(tp=1, pp=1, vpp=None, cp=1, ep=1, dp=replicas, sequence_parallel=False)
    config = parse_config(
        {
            "model": {"hf_path": "none"},
            "prompts": {"path": "none"},
            "rollout": {
                "prompts_per_step": num_rollouts // GROUP,
                "responses_per_prompt": GROUP,
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": tokens,
            },
            "parallel": {"max_tokens_per_micro_batch": 4 * (tokens + PROMPT_TOKENS)},
            "objective": {"log_z": "mlp"},
            "run": {"output_dir": "none"},
        }
    )
    tokenizer = SimpleNamespace(decode=lambda token_ids: "")
    return SimpleNamespace(
        config=config, layout=layout, architecture=ARCHITECTURE, tokenizer=tokenizer, sampled_by=SampledBy.OWN
    )


def groups_of(rank: int, replicas: int, world) -> SimpleNamespace:
    """What is read of the process groups where every process is a replica of its own."""
    return SimpleNamespace(
        **{"rank": rank, "world_size": dist.get_world_size(), "device": torch.device("cpu")},
        **{"dp": world, "control": world, "dp_rank": rank, "dp_size": replicas, "cp_rank": 0, "cp_size": 1},
        **{"tp_rank": 0, "is_last_stage": True, "speaks_for_replica": True},
    )


def share_of(rank: int, replicas: int, num_rollouts: int, tokens: int) -> list[Rollout]:
    """The rollouts that this replica has sampled."""
    generator, per_replica = np.random.default_rng(rank), num_rollouts // GROUP // replicas
    rollouts = []
    for slot in range(rank * per_replica, (rank + 1) * per_replica):
        prompt = Prompt(f"prompt-{slot}", slot, tuple(generator.integers(0, 128000, PROMPT_TOKENS).tolist()))
        for index, size in enumerate(generator.integers(1, tokens + 1, GROUP).tolist()):
            response = tuple(generator.integers(0, 128000, size).tolist())
            log_probs = tuple((-generator.random(size, np.float32)).tolist())
            rollouts.append(Rollout(prompt, slot, index, response, log_probs, "length" if size == tokens else "eos"))
    return rollouts


def old_pack_updates(rollouts: list[Rollout], plan: SimpleNamespace, groups: SimpleNamespace) -> list[list[MicroBatch]]:
    """What `pack_updates` was: everything to everyone, pickled."""
    gathered: list[list] = [[] for _ in range(groups.world_size)]
    dist.all_gather_object(gathered, annotate(rollouts, plan.config.objective, plan.tokenizer), group=groups.control)
    everyone = sorted((item for part in gathered for item in part), key=lambda item: (item.slot, item.response_index))
    members = [list(group) for _, group in groupby(everyone, key=lambda item: item.slot)]
    lengths = [[item.num_tokens for item in group] for group in members]
    rule = bin_rule(plan.layout, plan.config)
    shares = plan_update(lengths, groups.dp_size, rule, flop_count(plan.architecture), together=False)
    bins = [[members[q][i] for q, i in bin] for bin in shares[groups.dp_rank]]
    batches = pack_streams(
        bins, rule, responses_per_prompt=GROUP, drop_truncated=False, uniform=False, device=groups.device
    )
    return [batches]


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each tensor that a collective fills, as it comes."""
    sizes: list[int] = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_to_all_single", "all_reduce")}

    def wrapped(name: str) -> Callable:
        def call(filled, *args, **kwargs):
            for tensor in filled if isinstance(filled, list) else [filled]:
                sizes.append(tensor.nbytes * (2 if name == "all_reduce" else 1))
            return originals[name](filled, *args, **kwargs)

        return call

    for module in (dist, dist.distributed_c10d):  # the second is where all_gather_object finds them
        for name in originals:
            setattr(module, name, wrapped(name))
    try:
        yield sizes
    finally:
        for module in (dist, dist.distributed_c10d):
            for name, original in originals.items():
                setattr(module, name, original)


def measure(way: str, rollouts: list[Rollout], plan: SimpleNamespace, groups: SimpleNamespace) -> tuple[tuple, list]:
    """((CPU seconds, bytes received), micro-batches) of one step."""
    gc.collect()
    dist.barrier(group=groups.control)
    start = time.process_time()
    with counted() as sizes:
        if way == "before":
            updates = old_pack_updates(rollouts, plan, groups)
        else:
            updates = pack_updates(rollouts, plan, SimpleNamespace(groups=groups), 0)
    return (time.process_time() - start, sum(sizes)), updates


def same(one: list[list[MicroBatch]], other: list[list[MicroBatch]]) -> bool:
    """Whether all tensors of the micro-batches have the same bits."""

    def content(record) -> list:
        values = [getattr(record, field.name) for field in fields(record)]
        values = [content(value) if is_dataclass(value) else value for value in values]
        return [value.numpy().tobytes() if torch.is_tensor(value) else value for value in values]

    pairs = [[content(b) for batches in updates for b in batches] for updates in (one, other)]
    return pairs[0] == pairs[1]


def work(rank: int, asked: argparse.Namespace, folder: Path) -> None:
    """One replica: its figures of each way, into a file of the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=asked.replicas)
    rollouts = share_of(rank, asked.replicas, asked.rollouts, asked.tokens)
    found, made = {}, {}
    for way in asked.ways:
        replicas = 1 if way == "share" else asked.replicas
        plan = plan_of(asked.rollouts, replicas, asked.tokens)
        groups = groups_of(0 if way == "share" else rank, replicas, dist.group.WORLD)
        if way == "share":
            sampled = [replace(rollout, slot=rollout.slot - rollouts[0].slot) for rollout in rollouts]
        else:
            sampled = rollouts
        found[way], made[way] = measure(way, sampled, plan, groups)
    equal = same(made["before"], made["after"]) if {"before", "after"} <= made.keys() else None
    (folder / str(rank)).write_bytes(pickle.dumps((found, equal)))
    dist.barrier()
    dist.destroy_process_group()


def scale(asked: argparse.Namespace) -> list[str]:
    """The lines of the table. AssertionError where before and after make different micro-batches."""
    assert asked.rollouts % (GROUP * asked.replicas) == 0, "whole groups, equally many of them on each replica"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=work, args=(rank, asked, Path(folder))) for rank in range(asked.replicas)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes), "a process failed; its error is above"
        everyone = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(asked.replicas)]
    assert all(equal in (True, None) for _, equal in everyone), "before and after make different micro-batches"
    lines = []
    for way in asked.ways:
        seconds, received = zip(*(found[way] for found, _ in everyone), strict=True)
        lines.append(
            f"{asked.rollouts:8}{asked.replicas:9}{asked.tokens:8}  {way:8}{statistics.median(seconds):8.2f}"
            f"{max(seconds):8.2f}{max(received) / 1e6:13.2f}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=512)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    asked = parser.parse_args()
    print("rollouts replicas  tokens  way      CPU s     max  received MB")
    print("\n".join(scale(asked)))


if __name__ == "__main__":
    main()
