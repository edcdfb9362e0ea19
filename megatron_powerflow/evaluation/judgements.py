"""What does a judge say of an evaluation's responses? Strategy diversity per problem, quality per creative text.

Questions with a gold answer are problems: the judge gets all responses to one in a single question about their
strategies. Questions without a gold answer are creative: the judge grades each response, as a joke where the task is
called joke(s), else as writing.

Every judgement, with the judge's own words, is written to OUT/judgements.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_powerflow.commands.rounds import progress_bar
from megatron_powerflow.data.prompts import readable_text
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation import rubrics
from megatron_powerflow.evaluation.judge import JudgeServer, ask_all
from megatron_powerflow.evaluation.questions import Question
from megatron_powerflow.evaluation.responses import JUDGEMENTS_NAME, Key, Line
from megatron_powerflow.metrics.counts import mean, standard_error

JOKES = ("joke", "jokes")


@dataclass(frozen=True, slots=True)
class JudgeQuestion:
    """Asks the judge about all responses to a question of the evaluation, or about one of them.

    response_index: None for all of them. ask: the text of the question. read: turns the reply into a score; None where
    the reply cannot be read.
    """

    kind: str  # "strategy" or "quality"
    key: Key
    response_index: int | None
    ask: str
    read: Callable[[str], float | None]


def check_judgeable(questions: Sequence[Question], num_responses: int) -> None:
    """Raises UserError where a strategy judge would have too few responses to compare, or a prompt has no text."""
    if any(question.answer is not None for question in questions) and num_responses < rubrics.MIN_ATTEMPTS:
        raise UserError(
            f"--judge-url with --num-responses {num_responses}: strategies are told apart among at least "
            f"{rubrics.MIN_ATTEMPTS} responses"
        )
    textless = next((question for question in questions if not readable_text(question.prompt)), None)
    if textless is not None:
        raise UserError(
            f"{textless.location}: a prompt of token ids has no text for --judge-url; give prompt or messages"
        )


def judge_responses(
    judge: JudgeServer,
    questions: Sequence[Question],
    responses: Mapping[Key, Sequence[Line]],
    out: Path,
    console: Console,
) -> dict[str, dict[str, float | None]]:
    """Asks the judge and returns {kind: {"mean", "se", "num_judged", "num_unparsed", "num_unanswered"}}.

    Only the kinds that occur are in it. mean: over questions, of a question's mean over its judged responses; se as in
    `metrics/counts.py`. Replies that cannot be read (unparsed) and replies that never came (unanswered) are in no mean.
    Writes judgements.jsonl.
    """
    judge_questions = [
        item for question in questions for item in _judge_questions(question, responses[question.task, question.id])
    ]
    with progress_bar(console, True) as bar:
        task = bar.add_task("judging", total=len(judge_questions))
        replies = ask_all(judge, [item.ask for item in judge_questions], lambda: bar.advance(task))
    scores = [None if reply is None else item.read(reply) for item, reply in zip(judge_questions, replies, strict=True)]
    _write(out / JUDGEMENTS_NAME, judge_questions, replies, scores)
    results = {}
    for kind in dict.fromkeys(item.kind for item in judge_questions):
        of_kind = [row for row in zip(judge_questions, replies, scores, strict=True) if row[0].kind == kind]
        per_question: dict[Key, list[float]] = {}
        for item, _, score in of_kind:
            per_question.setdefault(item.key, []).extend([] if score is None else [score])
        means = [question_mean for values in per_question.values() if (question_mean := mean(values)) is not None]
        results[kind] = {
            "mean": mean(means),
            "se": standard_error(means),
            "num_judged": sum(score is not None for _, _, score in of_kind),
            "num_unparsed": sum(reply is not None and score is None for _, reply, score in of_kind),
            "num_unanswered": sum(reply is None for _, reply, _ in of_kind),
        }
    return results


def _judge_questions(question: Question, lines: Sequence[Line]) -> list[JudgeQuestion]:
    key, request = (question.task, question.id), readable_text(question.prompt)
    if question.answer is not None:
        attempts = rubrics.strategy_question(request, [line["text"] for line in lines])
        return [JudgeQuestion("strategy", key, None, attempts, rubrics.read_strategy)]
    write, read = (
        (rubrics.joke_question, rubrics.read_joke)
        if question.task in JOKES
        else (rubrics.writing_question, rubrics.read_writing)
    )
    return [JudgeQuestion("quality", key, line["response_index"], write(request, line["text"]), read) for line in lines]


def _write(
    path: Path, judge_questions: Sequence[JudgeQuestion], replies: Sequence[str | None], scores: Sequence[float | None]
) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for item, reply, score in zip(judge_questions, replies, scores, strict=True):
            line = {"kind": item.kind, "task": item.key[0], "id": item.key[1], "response_index": item.response_index}
            file.write(json.dumps({**line, "score": score, "reply": reply}, ensure_ascii=False) + "\n")
