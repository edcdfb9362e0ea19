"""How does a model answer when it is asked for several responses and their probabilities at once? Verbalized sampling,
one of the two training-free rivals: `powerflow generate --decoding verbalized`.

Left out: the words of the question and the reading of the answer (`data/verbalized.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from megatron_powerflow.commands.generate import load_generation_prompts, prompts_per_round, sampling_of_answers
from megatron_powerflow.commands.open_model import OpenModel, engine_of, load_chunks
from megatron_powerflow.commands.rounds import BY_GENERATE, output_refusals, write_rounds
from megatron_powerflow.data.verbalized import parse_verbalized, verbalized_row
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.together import gather_to_main
from megatron_powerflow.records import Prompt
from megatron_powerflow.targets import require


@dataclass(frozen=True)
class VerbalizedSampling:
    """The settings of verbalized sampling. num_responses: asked for in one answer; target_words: asked for in each
    response, None where lengths are not mentioned; temperature: of the policy, 0 is greedy."""

    num_responses: int
    target_words: int | None
    temperature: float


def verbalize_file(
    opened: OpenModel, prompts_name: str | Path, out: Path, recipe: VerbalizedSampling, launch: Launch, console: Console
) -> None:
    """Ask each prompt for several responses at once and write one JSON line per response.

    A line holds id, response_index, text and probability (as stated, not renormalised). Responses that cannot be
    read have no line; what is printed counts them by reason. Raises UserError as `generate_file` does.
    """
    require(output_refusals(out, *BY_GENERATE))
    rewrite = partial(verbalized_row, num_responses=recipe.num_responses, target_words=recipe.target_words)
    prompts = load_generation_prompts(opened, prompts_name, launch, console, rewrite)
    sampling = sampling_of_answers(opened, responses_per_prompt=1, temperature=recipe.temperature)
    failures: Counter[str] = Counter()
    with initialized(opened.layout, launch, seed=sampling.seed) as groups:
        engine = engine_of(opened, load_chunks(opened, groups), groups)
        reports = groups.pp_rank == 0 and groups.tp_rank == 0

        def one_round(round_prompts: Sequence[tuple[int, Prompt]]) -> list[tuple[int, dict]] | None:
            rollouts = engine.generate(round_prompts, sampling)
            if not reports:
                return None
            lines = []
            for rollout in rollouts:
                parsed = parse_verbalized(opened.tokenizer.decode(rollout.response_token_ids), recipe.num_responses)
                failures.update(parsed.failures)
                for index, response in enumerate(parsed.responses):
                    line = {"id": rollout.prompt.id, "response_index": index}
                    lines.append((rollout.slot, {**line, "text": response.text, "probability": response.probability}))
            return lines

        items = list(enumerate(prompts))
        write_rounds(
            items,
            one_round,
            prompts_per_round(opened, 1),
            out,
            groups,
            console,
            "powerflow generate --decoding verbalized",
        )
        _report_failures(failures, len(prompts) * recipe.num_responses, groups, console)


def _report_failures(failures: Counter[str], num_asked: int, groups: Groups, console: Console) -> None:
    everyone = gather_to_main(failures, groups)
    total: Counter[str] = sum(everyone, Counter()) if everyone is not None else Counter()
    for reason, count in total.most_common():
        console.print(f"of {num_asked} responses asked for, {count} not written: {reason}")
