"""Which records travel from one part of the program to the next?

    Prompt --rollout--> Rollout --pack--> MicroBatch --score--> ScoredBatch --update--> StepMetrics

Left out: anything that computes. Tensors appear in annotations only, so importing this module brings no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from megatron_powerflow.former_names import former_names_of

if TYPE_CHECKING:
    from torch import Tensor
else:  # names of 0.1.0, until 0.3
    __getattr__ = former_names_of(__name__)

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question. `index` is its line in the prompts file, from 0, and stands for the prompt in seeds."""

    id: str
    index: int
    token_ids: tuple[int, ...]
    answer: str | None = None
    task: str | None = None
    text: str = ""  # what a person reads: the prompt, or its last message; empty where the file has token ids


class Purpose(IntEnum):
    """What random numbers are drawn for. The values are part of what a seed means: never reuse one."""

    ROLLOUTS = 0  # of training steps
    PROMPT_ORDER = 1
    HELD_OUT = 2  # the same at each evaluation of a run
    SAMPLES = 3  # of samples.jsonl
    ANSWERS = 4  # of `powerflow generate` and `evaluate`


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn. There is no top_p and no top_k, under which log-probs would not be those of the
    distribution that was sampled."""

    responses_per_prompt: int
    max_response_tokens: int
    # logits are divided by it, in fp32, in the sampler and in the scorer alike; 0 means greedy
    temperature: float
    # any of these ends a response and counts as its last token
    stop_token_ids: frozenset[int]
    # uniforms are a function of (purpose, seed, step, slot of the prompt in the step, response): rollout/sampling.py
    seed: int
    step: int
    purpose: Purpose = Purpose.ROLLOUTS


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt with one sampled response.

    Example: prompt of 12 tokens, response (318, 257, 2), finish_reason "eos", slot 5, response_index 1,
    rollout_log_probs of 3 numbers, all <= 0, natural logarithm, at the sampling temperature. weight_versions
    ((6, 0, 2), (7, 2, 3)): the first two tokens are by the weights that step 6 started with, the third by step 7's.
    """

    prompt: Prompt
    # position of the prompt in this step's global list, 0 <= slot < prompts_per_step; it names the group
    slot: int
    response_index: int  # from 0, below responses_per_prompt
    response_token_ids: tuple[int, ...]
    rollout_log_probs: tuple[float, ...]
    finish_reason: FinishReason
    # (step, start, end): response tokens start, ..., end - 1 are by the weights that this step of this run started
    # with, spans in order and without holes; (): all by those of the step that trains on them
    weight_versions: tuple[tuple[int, int, int], ...] = ()


class Piece(NamedTuple):
    """A run of queries and the keys that they attend to.

    This rank's queries first, ..., end - 1 attend causally to the stream's keys first_key, ..., end_key - 1; the last
    query attends to all of these.
    """

    first: int
    end: int
    first_key: int
    end_key: int


@dataclass(frozen=True, slots=True)
class Stream:
    """How the tokens of a micro-batch go through the model on this rank, where they do not go row by row.

    Packed: one stream holds all sequences behind each other, without the padding of rows. Context parallel: each
    sequence is cut into 2 cp equal pieces, of which rank i holds the pieces i and 2 cp - 1 - i, so that all ranks have
    equally many keys to attend to. Both at once: each packed sequence is cut in this way.

    Example, rows (7 8 9 2) and (5 6 2 -), s = 4, packed, cp = 1:
    index 0 1 2 3 4 5 6 / positions 0 1 2 3 0 1 2 / pieces (0 4 0 4) (4 7 4 7) / cu_seqlens 0 4 7.
    The same on rank 0 of cp = 2, sequences padded to 4: index 0 3 4 -1 / positions 0 3 0 3 / pieces (0 1 0 1)
    (1 2 0 4) (2 3 4 5) (3 4 4 8) / key_order 0 4 5 1 2 6 7 3 / cu_seqlens 0 4 8.
    """

    index: Tensor  # [r, t / cp] int64, of each token in MicroBatch.tokens.flatten(); -1: padding. Packed: r = 1
    positions: Tensor  # [t / cp] int64, of each token in its sequence, by which it is rotated
    pieces: tuple[Piece, ...]
    # [t] int64, index of each key of the stream in the keys of rank 0, 1, ... behind each other; None: cp = 1
    key_order: Tensor | None
    cu_seqlens: Tensor | None  # [n + 1] int32, where each packed sequence starts, all ranks together; None: rows
    num_positions: int  # t
    longest: int  # positions of the longest sequence


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """k tokens of a micro-batch that this rank has, in the order of the rows: found when the batch is made, for a GPU
    would have to be waited for."""

    in_model: Tensor  # [k] int64, of each among the hidden states [t / cp, r, H], their first two axes taken as one
    in_rows: Tensor  # [k] int64, of each in MicroBatch.tokens.flatten()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rollouts of one forward pass: b rollouts, s token positions, all on the compute device.

    Position t predicts `targets[:, t]`, the token at t + 1: targets are shifted once, when the batch is made, before
    anything splits the sequence. Example: prompt (7, 8), response (9, 2), s = 4:
    tokens 7 8 9 2 / targets 8 9 2 0 / loss_mask F T T F / prompt_mask T T F F.

    The numbers of a token stand in its rollout's row, and rows are whole on every rank, whatever way the tokens take
    through the model (`stream`): sums over a response are sums over a row. b = 0 is a dummy, which weighs nothing.
    """

    tokens: Tensor  # [b, s] int64, right-padded with 0
    targets: Tensor  # [b, s] int64
    loss_mask: Tensor  # [b, s] bool, True where the target is a response token (EOS included)
    prompt_mask: Tensor  # [b, s] bool, True on prompt tokens; the pool of the log Z' head
    num_response_tokens: Tensor  # [b] int64, the n of the method: EOS counted when it was emitted
    rollout_log_probs: Tensor  # [b, s] fp32, 0 where loss_mask is False
    rollout_index: Tensor  # [b] int64, slot * responses_per_prompt + response_index, unique in the step
    group: Tensor  # [b] int64, slot of the prompt
    psi: Tensor  # [b] fp32, format penalty, <= 0
    reward: Tensor  # [b] fp32, of the text: times its scale in the energy, or what a rival's advantage is made of
    truncated: Tensor  # [b] bool, cut at max_response_tokens: no EOS
    kept: Tensor  # [b] bool, False: takes part in nothing (objective.truncated=drop)
    annotations: Tensor  # [b, len(ANNOTATION_COLUMNS)] fp32: only for the metrics; NaN: does not exist
    lag: Tensor  # [b, len(LAG_COLUMNS)] fp32: only for the metrics; NaN: not by weights of this run
    responses: ChosenTokens  # of this rank, where loss_mask is True
    prompts: ChosenTokens  # of this rank, where prompt_mask is True
    stream: Stream | None = None  # None: the rows as they are, padding and all
    whole_groups: bool = False  # no group goes on in another micro-batch: its log Z' needs no forward pass of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch(MicroBatch):
    """A micro-batch with the log-probs that a loss compares. It exists on the last pipeline stage, where losses are
    made."""

    ref_log_probs: Tensor  # [b, s] fp32, 0 where masked, by the frozen reference
    # [b, s] fp32, 0 where masked, by the trainer at the start of the step; None: that is the policy as it is
    old_log_probs: Tensor | None = None
    old_from_sampler: bool = False  # they are the saved sampler's in its place, another policy's (SampledBy.SAVED)


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimatedBatch(ScoredBatch):
    """A scored batch with log Z' as the responses of each whole group estimate it, detached."""

    log_z: Tensor  # [b] fp32
    weight_factor: Tensor  # [b] fp32, 1 but for `contrastive`


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardedBatch(ScoredBatch):
    """A scored batch with the advantage of each response within its group, detached; it is made of `reward`."""

    advantage: Tensor  # [b] fp32


Batch = TypeVar("Batch", bound=MicroBatch)


def extended(batch: MicroBatch, kind: type[Batch], **late: object) -> Batch:
    """Return the batch as one of a class with more fields. late: the values of those fields, and of any that change."""
    return kind(**{field.name: getattr(batch, field.name) for field in fields(batch)} | late)


# What the text of a rollout says, for the metrics: a \boxed{} (0 or 1), the prompt's answer (0 or 1; NaN without one),
# the share of its 4-grams that it has had before, and, of its group as a whole, distinct 2- and 3-grams / all of them.
ANNOTATION_COLUMNS = ("boxed", "correct", "repeated_share", "distinct_2", "distinct_3")

# Steps from the weights that wrote a token to the step that trains on it, as sum over the response's tokens and as the
# largest; and how many weights have written the response.
LAG_COLUMNS = ("lag_sum", "lag_max", "num_versions")

# One row per rollout: the columns that every metric of a step is computed from. NaN: does not exist.
ROLLOUT_COLUMNS = (
    "rollout_index",
    "num_prompt_tokens",
    "num_response_tokens",
    "sequence_log_prob",  # by the policy as this update finds it
    "old_sequence_log_prob",  # by the trainer at the start of the step; of SampledBy.SAVED the saved ones
    "ref_sequence_log_prob",
    "rollout_sequence_log_prob",
    "loss_term",  # what the loss is the mean of
    "log_z",
    "psi",
    "reward",
    "residual",  # of the balance; NaN for the rivals
    "advantage",  # of the rivals; NaN for the balance
    "weight",  # of the loss: w v m, of rivals v
    "ratio",  # w before clipping
    "clipped",  # 0 or 1, or the share of clipped tokens
    "kept",
    "truncated",
    "sampler_weight",  # v, of tokens the mean; NaN without objective.sampler_ratio
    "sampler_truncated",  # 0 or 1, or the share of truncated tokens
    "importance",  # w v; NaN where the config has neither
    # trainer at the start of the step against sampler, of the same weights; NaN where they are others
    "sampler_gap_sum",  # |scorer - sampler| over the tokens
    "sampler_gap_max",
    "sampler_gap_kl_sum",  # exp(d) - d - 1 over the tokens, d = scorer - sampler
    "token_ratio_sum",  # exp(scorer - sampler) over the tokens
    # the same where the sampler had other weights; NaN where it had the same, or only its own log-probs are there
    "staleness_sum",
    "staleness_max",
    "staleness_kl_sum",
    *LAG_COLUMNS,
    "max_log_prob",
    "loop_tokens",  # of the longest repetition, a loop where it is long enough (metrics/loops.py); NaN without one
    "loop_nats",  # a token, once in it
    "entry_nats",  # of going into it
    *ANNOTATION_COLUMNS,
)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics of one step: one line of metrics.jsonl.

    values: name -> number; names and denominators are those of `metrics/reduce.py`. NaN never appears:
    a quantity that does not exist in this step is absent.
    """

    step: int
    values: dict[str, float]
