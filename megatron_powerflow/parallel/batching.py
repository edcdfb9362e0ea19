"""How much of a step goes through the model at a time? As many rollouts as a budget of tokens holds, packed, or so many
rollouts, padded.

Packed is the default, for every model and layout. The budget follows from the longest rollout that the config allows:

    longest rollout   256 tokens -> 2,048    1,024 -> 4,096    4,096 -> 16,384    32,768 -> 32,768

It holds LONGEST_HELD of the longest ones, which is what four padded rollouts would take; not less than FEWEST_TOKENS,
with which a pass over short responses still has enough to do; and not more than MOST_TOKENS, beyond which a pass is not
faster, only larger, unless a single rollout is longer. It is the same on every device, so that a run that moves from
one kind to another goes on with the batches that it began with.

Left out: which rollout goes where (`data/bins.py`), and whether it all fits a device: lower the budget where not. No
torch.
"""

from __future__ import annotations

from megatron_powerflow.config import Config
from megatron_powerflow.parallel.layout import Layout

FEWEST_TOKENS, MOST_TOKENS = 2048, 16384
LONGEST_HELD = 4
PER_STAGE = 4  # micro-batches of the default for each pipeline stage: stages idle (pp - 1) / (4 pp + pp - 1) of a pass


def token_budget(config: Config, layout: Layout) -> int | None:
    """Return the most tokens of a packed micro-batch, over cp together; None where parallel.micro_batch_size pads."""
    parallel = config.parallel
    if parallel.micro_batch_size is not None:
        return None
    if parallel.max_tokens_per_micro_batch is not None:
        return parallel.max_tokens_per_micro_batch
    longest = longest_rollout(config, layout)
    return max(longest, min(max(LONGEST_HELD * longest, FEWEST_TOKENS), MOST_TOKENS))


def longest_rollout(config: Config, layout: Layout) -> int:
    """Return the positions of the longest rollout that the config allows, with the padding that the layout needs."""
    multiple = layout.position_multiple(config.precision)
    return -(-(config.rollout.max_prompt_tokens + config.rollout.max_response_tokens) // multiple) * multiple


def fewest_micro_batches(config: Config, layout: Layout) -> int:
    """Return the number of packed micro-batches that an update has at least, where it has as many rollouts.

    With a budget of the user's it is 1. With the default a pipeline must not run dry for want of micro-batches.
    """
    is_chosen = config.parallel.max_tokens_per_micro_batch is not None
    return 1 if is_chosen or layout.pp == 1 else PER_STAGE * layout.pp


def padded_rows(config: Config, layout: Layout) -> int:
    """Return the rollouts of a micro-batch where nothing packs: micro_batch_size, or as many as the budget holds."""
    budget = token_budget(config, layout)
    if budget is None:
        assert config.parallel.micro_batch_size is not None
        return config.parallel.micro_batch_size
    return max(budget // longest_rollout(config, layout), 1)


def batching_line(config: Config, layout: Layout) -> str:
    """Return the line of `powerflow check` on micro-batches."""
    budget = token_budget(config, layout)
    if budget is None:
        return f"batches   {config.parallel.micro_batch_size} rollouts a micro-batch, padded to the longest of them"
    chosen = config.parallel.max_tokens_per_micro_batch is not None
    why = "" if chosen else ", from the longest rollout; parallel.max_tokens_per_micro_batch sets another number"
    least = fewest_micro_batches(config, layout)
    stages = f", and {least} or more of them for {layout.pp} pipeline stages" if least > 1 else ""
    return f"batches   packed without padding, up to {budget:,} tokens a micro-batch{stages}{why}"
