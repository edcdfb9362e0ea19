"""How are tp, cp, pp and dp laid over the processes, and which layouts are impossible?

Ranks count through tp first, then cp, dp, pp (Megatron's order "tp-cp-ep-dp-pp"). tp=2, pp=2, dp=2:

                 stage 0            stage 1
        dp 0     0  1  (tp)         4  5
        dp 1     2  3               6  7

    tp    every matrix is cut: rank 0 has heads 0-7, rank 1 heads 8-15, of all tokens; two sums a layer.
          With sequence_parallel the norms between are cut along the sequence: rank 0 tokens 0-3, rank 1 tokens 4-7.
    pp    layers are cut into stages: stage 0 has layers 0-15, stage 1 layers 16-31; micro-batches follow each other.
          vpp=2: stage 0 has layers 0-7 and 16-23, stage 1 the others; shorter waits, twice the messages. Where stages
          cannot have equally many: see `balanced_layers`.
    cp    every sequence is cut into 2 cp pieces; ranks hold the weights alike and see all keys. cp=2, tokens 0-7:

              rank 0   0 1 . . . . 6 7        4 pieces, the first with the last: an early query has few keys to attend
              rank 1   . . 2 3 4 5 . .        to and a late one many, so all ranks have equally much to do

    dp    what is left: replicas with rollouts of their own. A group of responses is never split over replicas.
    ep    experts are spread over ep neighbours among the cp x dp ranks of a stage; all else is as without ep, so those
          ranks still have prompts of their own. With ep=2 above, each stage's ranks 0 2 (and 1 3) hold one half of the
          experts each, their tp shards of it.

Arithmetic only: no torch, no process groups. Every impossible layout is refused with the reason and the
nearest possible choices, before any process group exists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import Config, ParallelSection, PrecisionSection
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.fp8_sizes import token_multiple

VOCAB_MULTIPLE = 128  # rows per rank, for the matrix products; the padding takes no part in any softmax


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is split over processes: the size of each way of splitting. world_size = tp * cp * pp * dp.

    vpp: the number of chunks of a stage with interleaving; None without it. layers: of each chunk in the order in which
    the model goes through them, vpp times over the stages; None: all have equally many.
    """

    tp: int
    pp: int
    vpp: int | None
    cp: int
    ep: int
    dp: int
    sequence_parallel: bool
    layers: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        """The number of processes: tp * cp * pp * dp."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def expert_ranks(self) -> list[range]:
        """The ranks that divide a set of experts, first part first; one entry per (set, tp rank, stage)."""
        span = self.tp * self.ep
        return [
            range(first + tp_rank, first + span, self.tp)
            for first in range(0, self.world_size, span)
            for tp_rank in range(self.tp)
        ]

    @property
    def num_chunks(self) -> int:
        """The number of model chunks on each rank: 1, or vpp with interleaving."""
        return self.vpp or 1

    @property
    def sequence_multiple(self) -> int:
        """The multiple to which each sequence is padded, in positions: 2 cp with context parallelism, else 1.

        Context parallelism cuts each sequence into 2 cp pieces.
        """
        return 2 * self.cp if self.cp > 1 else 1

    def token_multiple(self, precision: PrecisionSection) -> int:
        """Return the multiple to which the tokens of a rank's forward pass are padded: see `fp8_sizes.py`.

        They are those of all tp ranks together, and of one cp rank.
        """
        return token_multiple(precision, tp=self.tp, sequence_parallel=self.sequence_parallel)

    def position_multiple(self, precision: PrecisionSection) -> int:
        """Return the multiple to which each micro-batch is padded, in positions of all cp ranks together."""
        return self.cp * math.lcm(2 if self.cp > 1 else 1, self.token_multiple(precision))

    def describe(self) -> str:
        """Return the layout in one line, such as `8 processes = tp 2 x cp 1 x pp 2 x dp 2`."""
        parts = [f"{name} {getattr(self, name)}" for name in ("tp", "cp", "pp", "dp")]
        extras = [f"vpp {self.vpp}"] if self.vpp else []
        extras += [f"layers {' '.join(map(str, self.layers))}"] if self.layers else []
        extras += ["sequence parallel"] if self.sequence_parallel else []
        extras += [f"ep {self.ep} over {'cp x ' if self.cp > 1 else ''}dp"] if self.ep > 1 else []
        return f"{self.world_size} processes = {' x '.join(parts)}" + (f" ({', '.join(extras)})" if extras else "")

    def picture(self, max_rows: int = 8) -> str:
        """Return a picture of the ranks of each stage, with one row per data-parallel replica.

        max_rows: the most rows; how many more there are is written below. With ep > 1 some sets of `expert_ranks`
        follow.
        """
        width = max(len(str(self.world_size)) + 1, 3)
        cell = self.tp * self.cp
        header = "".join(f"stage {stage}".ljust(max(cell * width, 9) + 2) for stage in range(self.pp))
        lines = ["         " + header]
        for replica in range(min(self.dp, max_rows)):
            row = ""
            for stage in range(self.pp):
                first = (stage * self.dp + replica) * cell
                ranks = "".join(str(first + i).ljust(width) for i in range(cell))
                row += ranks.ljust(max(cell * width, 9) + 2)
            lines.append(f"  dp {replica:<3} {row}".rstrip())
        if self.dp > max_rows:
            lines.append(f"  ... {self.dp - max_rows} more")
        if self.ep > 1:
            sets = self.expert_ranks
            shown = [" ".join(map(str, ranks)) for ranks in sets[:3]] + ["..."] * (len(sets) > 3)
            lines.append(f"  experts  {' | '.join(shown)}")
        return "\n".join(lines)


def padded_vocab_size(architecture: Architecture, tp: int) -> int:
    """Return the number of vocabulary rows on all ranks together, with padding; each rank holds an equal share."""
    multiple = VOCAB_MULTIPLE * tp if architecture.vocab_size >= VOCAB_MULTIPLE * tp else tp
    return -(-architecture.vocab_size // multiple) * multiple


def plan_layout(config: Config, architecture: Architecture, world_size: int) -> Layout:
    """Return the layout of a run on `world_size` processes.

    Raises UserError with every violation of sizes and model; without one, with that of the batch.
    """
    parallel = config.parallel
    violations = _size_violations(parallel, world_size) + model_violations(parallel, architecture)
    if not violations:
        layout = _layout(parallel, world_size, _layers(parallel, architecture))
        violations = _batch_violations(config, layout)
        if not violations:
            return layout
    raise UserError(violations)


def inference_layout(parallel: ParallelSection, architecture: Architecture, world_size: int) -> Layout:
    """Return the layout for scoring or generating, where there is no batch to divide.

    Raises UserError with every violation.
    """
    violations = _size_violations(parallel, world_size) + model_violations(parallel, architecture)
    if violations:
        raise UserError(violations)
    return _layout(parallel, world_size, _layers(parallel, architecture))


def balanced_layers(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Divide layers over the chunks of a pipeline, as evenly as can be; returns each chunk's number, first chunk first.

    Where they cannot be equal, the embedding and the output layer count as a layer each, so that the first chunk and
    the last have one less. Then chunks from the last but one backwards have one more. Example: 61 layers in 4 chunks
    are 14 16 16 15, 94 layers 23 24 24 23. num_layers >= num_chunks.
    """
    if num_layers % num_chunks == 0:
        return (num_layers // num_chunks,) * num_chunks
    each, more = divmod(num_layers + 2, num_chunks)
    if each < 2:  # too few layers to leave one out
        each, more = divmod(num_layers, num_chunks)
        return tuple(each + (chunk >= num_chunks - more) for chunk in range(num_chunks))
    layers = [each] * num_chunks
    layers[0] -= 1
    layers[-1] -= 1
    order = [*range(num_chunks - 2, 0, -1), num_chunks - 1, 0]
    for chunk in order[:more]:
        layers[chunk] += 1
    return tuple(layers)


def _layers(parallel: ParallelSection, architecture: Architecture) -> tuple[int, ...] | None:
    """Return `Layout.layers`: those that the config names, or balanced ones; None where all are equal."""
    chunks = parallel.pp * (parallel.vpp or 1)
    layers = tuple(parallel.layers_per_chunk or balanced_layers(architecture.num_layers, chunks))
    return None if len(set(layers)) == 1 else layers


def layout_of_sizes(parallel: ParallelSection, world_size: int) -> Layout:
    """Return the layout of `world_size` processes, where no model is looked at.

    Raises UserError where the sizes do not fit each other.
    """
    if violations := _size_violations(parallel, world_size):
        raise UserError(violations)
    return _layout(parallel, world_size, layers=None)


def _layout(parallel: ParallelSection, world_size: int, layers: tuple[int, ...] | None) -> Layout:
    return Layout(
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        ep=parallel.ep,
        dp=world_size // (parallel.tp * parallel.cp * parallel.pp),
        sequence_parallel=parallel.sequence_parallel,
        layers=layers,
    )


def _size_violations(parallel: ParallelSection, world_size: int) -> list[str]:
    violations = []
    model_size = parallel.tp * parallel.cp * parallel.pp
    if world_size % model_size:
        violations.append(
            f"{world_size} processes do not hold tp={parallel.tp} x cp={parallel.cp} x pp={parallel.pp} = {model_size}"
            f"; start a multiple of {model_size} processes (torchrun --nproc-per-node), or change parallel.*"
        )
    elif (holders := world_size // (parallel.tp * parallel.pp)) % parallel.ep:
        violations.append(
            f"parallel.ep={parallel.ep} does not divide cp x dp = {holders}, the ranks that experts are spread over; "
            f"choose {_choices(_divisors(holders))}, or start more processes"
        )
    return violations


def model_violations(parallel: ParallelSection, architecture: Architecture) -> list[str]:
    """Return why this model cannot be split this way, a sentence each; [] when it can."""
    tp = parallel.tp
    violations = []
    counts = {
        "num_attention_heads": architecture.num_attention_heads,
        "ffn_hidden_size": architecture.ffn_hidden_size,
    }
    if architecture.experts:
        others = ("dense_ffn_hidden_size", "shared_ffn_hidden_size")
        counts |= {name: size for name in others if (size := getattr(architecture.experts, name)) is not None}
    if latent := architecture.mla:  # Megatron cuts its own down projections, before ours take their place
        counts["kv_lora_rank + qk_rope_head_dim"] = latent.kv_lora_rank + latent.rope_head_dim
        counts |= {"q_lora_rank": latent.q_lora_rank} if latent.q_lora_rank is not None else {}
    possible = _possible_tp(counts, architecture)
    for name, count in counts.items():
        if count % tp:
            violations.append(f"parallel.tp={tp} does not divide {name}={count}; choose {_choices(possible)}")
    if not violations and tp not in possible:
        violations.append(
            f"parallel.tp={tp} is no divisor of num_query_groups={architecture.num_query_groups} and no multiple of it "
            f"that cuts a group's rows evenly (head_dim={architecture.head_dim}); choose {_choices(possible)}"
        )
    violations += _stage_violations(parallel, architecture.num_layers)
    violations += _expert_violations(parallel, architecture)
    return violations


def _stage_violations(parallel: ParallelSection, num_layers: int) -> list[str]:
    pp, vpp, named = parallel.pp, parallel.vpp or 1, parallel.layers_per_chunk
    chunks = pp * vpp
    what = f"parallel.pp={pp}" + (f" x vpp={vpp}" if vpp > 1 else "")
    violations = []
    if chunks > num_layers:
        violations.append(f"{what} needs {chunks} layers or more, and num_layers={num_layers}; choose fewer stages")
    elif named is not None and (len(named) != chunks or sum(named) != num_layers):
        balanced = ", ".join(map(str, balanced_layers(num_layers, chunks)))
        violations.append(
            f"parallel.layers_per_chunk={named} has {len(named)} numbers with the sum {sum(named)}; {what} needs "
            f"{chunks} with the sum num_layers={num_layers}, such as [{balanced}], which is taken without the key"
        )
    if parallel.vpp == 1:
        violations.append("parallel.vpp=1 is no interleaving; remove it, or use 2 or more")
    return violations


def _expert_violations(parallel: ParallelSection, architecture: Architecture) -> list[str]:
    if architecture.experts is None:
        if parallel.ep > 1:
            return [f"parallel.ep={parallel.ep}: {architecture.family} has no experts to spread; use parallel.ep=1"]
        return []
    violations = []
    if architecture.experts.num % parallel.ep:
        violations.append(
            f"parallel.ep={parallel.ep} does not divide the {architecture.experts.num} experts; choose "
            f"{_choices(_divisors(architecture.experts.num))}"
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        violations.append(
            f"parallel.tp={parallel.tp} with experts needs sequence parallelism (each rank routes its own tokens); "
            "set parallel.sequence_parallel=true, or use parallel.tp=1"
        )
    return violations


def _batch_violations(config: Config, layout: Layout) -> list[str]:
    rollout, micro = config.rollout, config.parallel.micro_batch_size
    prompts_per_update = rollout.prompts_per_step // config.optimizer.updates_per_rollout
    if prompts_per_update % layout.dp:
        return [
            f"dp={layout.dp} does not divide the {prompts_per_update} prompts of an update "
            f"(rollout.prompts_per_step={rollout.prompts_per_step}); a group is never split, so choose a multiple of "
            f"{layout.dp * config.optimizer.updates_per_rollout}"
        ]
    if micro is None:
        budget = config.parallel.max_tokens_per_micro_batch
        return [] if budget is None else _budget_violations(config, layout, budget)
    local = prompts_per_update // layout.dp * rollout.responses_per_prompt
    if local % micro:
        return [
            f"parallel.micro_batch_size={micro} does not divide the {local} rollouts of a data-parallel rank's update; "
            f"choose {_choices(_divisors(local))}"
        ]
    if layout.vpp and (local // micro) % layout.pp:
        return [
            f"{local // micro} micro-batches are no multiple of pp={layout.pp}, which interleaving (parallel.vpp) needs"
            "; change parallel.micro_batch_size or rollout.prompts_per_step"
        ]
    return []


def _budget_violations(config: Config, layout: Layout, budget: int) -> list[str]:
    """Return why the budget of packed micro-batches is too small: each rollout needs room in one of them."""
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    multiple = layout.position_multiple(config.precision)
    needed = -(-longest // multiple) * multiple
    if budget >= needed:
        return []
    return [
        f"parallel.max_tokens_per_micro_batch={budget} has no room for the longest rollout, rollout.max_prompt_tokens "
        f"+ rollout.max_response_tokens = {longest} tokens, in multiples of {multiple}; choose {needed} or more, or "
        "lower a length"
    ]


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _possible_tp(counts: dict[str, int], architecture: Architecture) -> list[int]:
    """List the tp that divide all counts and fit the query groups.

    With more ranks than groups, Megatron cuts the rows of each group's q, k and v over tp / groups ranks, in equal
    parts, and each rank keeps one group's keys and values. tp divides the heads, so q is cut evenly; k and v must be.
    """
    groups, head_dim = architecture.num_query_groups, architecture.head_dim
    common = [i for i in _divisors(min(counts.values())) if all(count % i == 0 for count in counts.values())]
    return [i for i in common if groups % i == 0 or (i % groups == 0 and 2 * head_dim % (i // groups) == 0)]


def _choices(numbers: list[int], limit: int = 12) -> str:
    shown = numbers if len(numbers) <= limit else [*numbers[: limit - 1], "...", numbers[-1]]
    return ", ".join(map(str, shown[:-1])) + (" or " if len(shown) > 1 else "") + str(shown[-1])
