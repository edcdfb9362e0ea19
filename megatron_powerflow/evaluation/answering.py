"""What does the model answer? Questions become prompts, prompts are answered in rounds, answers become graded lines.

The data-parallel ranks share every round. Each rank that holds the first stage grades the responses of its replica, and
the main rank writes the lines.

Left out: which questions are asked (`questions.py`), what is done with the lines (`results.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from megatron_powerflow.commands.generate import prompts_per_round, sampling_of_answers
from megatron_powerflow.commands.open_model import OpenModel, sampling_engine
from megatron_powerflow.commands.rounds import blocks, progress_bar
from megatron_powerflow.data.answers import extract_answer, grade
from megatron_powerflow.data.prompts import first_violations, prompt_token_ids, readable_text
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.questions import Question
from megatron_powerflow.evaluation.responses import (
    RESPONSES_NAME,
    Key,
    Line,
    append_responses,
    check_settings,
    open_responses,
)
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.owner import Owner
from megatron_powerflow.parallel.together import gather_to_main, on_main
from megatron_powerflow.records import Prompt, Rollout

# (slot, question, prompt): the slot is the question's index among all, and its random numbers follow from it
TokenizedQuestion = tuple[int, Question, Prompt]


def tokenize(questions: Sequence[Question], opened: OpenModel) -> list[TokenizedQuestion]:
    """Returns the questions within rollout.max_prompt_tokens, tokenized, in their order.

    Raises UserError with the location of every question that cannot be asked.
    """
    limit = opened.config.rollout.max_prompt_tokens
    asked: list[TokenizedQuestion] = []
    violations = []
    for question in questions:
        try:
            token_ids = prompt_token_ids(question.prompt, opened.tokenizer, opened.architecture.vocab_size)
        except UserError as error:
            violations.append(f"{question.location}: {error}")
            continue
        if len(token_ids) <= limit:
            slot, text = len(asked), readable_text(question.prompt)
            asked.append(
                (slot, question, Prompt(question.id, slot, tuple(token_ids), question.answer, question.task, text))
            )
        elif opened.config.prompts.too_long == "error":
            violations.append(f"{question.location}: {len(token_ids)} tokens, over rollout.max_prompt_tokens={limit}")
    if not asked and not violations:
        violations.append(f"all {len(questions)} questions are over rollout.max_prompt_tokens={limit}; raise it")
    if violations:
        raise UserError(first_violations(violations))
    return asked


def answer_questions(
    opened: OpenModel,
    asked: Sequence[TokenizedQuestion],
    settings: Line,
    out: Path,
    owner: Owner,
    launch: Launch,
    console: Console,
) -> None:
    """Answers the questions that responses.jsonl does not hold yet, and appends their lines to it.

    Collective over all ranks. owner: the lock of the folder `out`; it is taken here.
    """
    num_responses = settings["num_responses"]
    sampling = sampling_of_answers(opened, responses_per_prompt=num_responses, temperature=settings["temperature"])
    with initialized(opened.layout, launch, seed=settings["seed"]) as groups:
        per_round = prompts_per_round(opened, num_responses) * groups.dp_size
        on_main(owner.take, groups)
        num_done = _resume(out, settings, [(question.task, question.id) for _, question, _ in asked], per_round, groups)
        if num_done == len(asked):
            return
        if num_done and groups.is_main:
            console.print(f"continuing after {num_done} of {len(asked)} questions")
        prompts_asked = [prompt for _, _, prompt in asked]
        with (
            sampling_engine(opened, groups, prompts_asked, out / RESPONSES_NAME, console) as engine,
            progress_bar(console, groups.is_main) as bar,
        ):
            task = bar.add_task("evaluating", total=len(asked), completed=num_done)
            for block in blocks(asked[num_done:], per_round):
                share, first = block[groups.dp_rank :: groups.dp_size], block[0][0]

                def progress(done: int, _: int, first=first) -> None:
                    bar.update(task, completed=first + done * groups.dp_size // num_responses)

                prompts = [(slot, prompt) for slot, _, prompt in share]
                rollouts = engine.generate(prompts, sampling, progress)
                reports = groups.pp_rank == 0 and groups.tp_rank == 0
                gathered = gather_to_main(_lines(rollouts, share, opened) if reports else [], groups)
                on_main(owner.confirm, groups)
                if gathered is not None:
                    lines = sorted((item for part in gathered for item in part), key=lambda item: item[0])
                    append_responses(out, [line for _, line in lines])
                bar.update(task, completed=first + len(block))


def _resume(out: Path, settings: Line, keys: Sequence[Key], per_round: int, groups: Groups) -> int:
    """Returns how many questions are answered already, the same number on every rank.

    Raises the main rank's UserError on every rank.
    """

    def resume() -> int:
        check_settings(out, settings)  # again, now that no other process can begin an evaluation in the folder
        return open_responses(out, settings, keys, settings["num_responses"], per_round)

    return on_main(resume, groups)


def _lines(
    rollouts: Sequence[Rollout], share: Sequence[TokenizedQuestion], opened: OpenModel
) -> list[tuple[tuple[int, int], Line]]:
    """Returns ((slot, response index), line) of one replica's share of a round."""
    questions = {slot: question for slot, question, _ in share}
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.slot, []).append(rollout)
    return [
        ((slot, line["response_index"]), line)
        for slot, group in groups.items()
        for line in response_lines(group, questions[slot], opened.tokenizer.decode)
    ]


def response_lines(group: Sequence[Rollout], question: Question, decode: Callable[[Sequence[int]], str]) -> list[Line]:
    """Returns the lines of responses.jsonl for one question: its responses, graded."""
    texts = [decode(rollout.response_token_ids) for rollout in group]
    answers = [extract_answer(text) for text in texts]
    grades = grade(answers, question.answer, question.tolerance)
    return [
        {
            "id": question.id,
            "task": question.task,
            "response_index": rollout.response_index,
            "text": text,
            "num_response_tokens": len(rollout.response_token_ids),
            "finish_reason": rollout.finish_reason,
            "answer": answer,
            "gold": question.answer,
            "correct": graded.correct,  # null without a gold answer
            "cluster": graded.cluster,  # equal answers of one question share a number; null without an answer
            "sequence_log_prob": sum(rollout.rollout_log_probs),  # at the sampling temperature
        }
        for rollout, text, answer, graded in zip(group, texts, answers, grades, strict=True)
    ]
