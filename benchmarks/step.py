"""How long is one whole PowerFlow step? Ours in one process against `plain_step.py`, at the same tokens.

    python -m benchmarks.step

Rollout, reference scores, update; fp32, the same cores, learned log Z', responses of equal lengths. First both take
their first step on our rollouts: their losses and gradient norms must agree, or nothing is timed. Then whole steps
alternate, each side on its own samples.

Left out: layouts (one process); responses of unequal lengths.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.rollout import TEXTS, encode, take_cores

ALPHA, LR, LOG_Z_LR = 4.0, 1e-6, 0.5
# Relative, of the first step. The norm has a wide one: torch.norm in fp32, which both sides use, is off by 1e-3 where a
# tensor on a CPU has tens of millions of elements, on each side by its own amount.
TOLERANCES = {"loss": 1e-4, "gradient norm": 5e-3}
PHASES = ("rollout", "reference", "update")


class OurStep:
    """The product's own step, its phases timed; stop tokens ignored."""

    def __init__(self, plan, session) -> None:
        self.plan, self.session, self.step = plan, session, 0

    def run(self) -> tuple[dict[str, float], list, float, float]:
        """(seconds of each phase, rollouts, loss, gradient norm) of one step."""
        from dataclasses import replace

        from megatron_powerflow.records import ROLLOUT_COLUMNS
        from megatron_powerflow.training.micro_batches import pack_updates
        from megatron_powerflow.training.step import learn, sampling_of_step

        plan, session = self.plan, self.session
        clock = Clock()
        sampling = replace(sampling_of_step(plan, self.step), stop_token_ids=frozenset())
        rollouts = session.engine.generate(list(enumerate(plan.prompts)), sampling)
        updates = pack_updates(rollouts, plan, session, 0)
        clock.note("rollout")
        result = learn(plan, session, updates, self.step, phase=clock.phase)
        self.step += 1
        loss = float(result.rows[:, ROLLOUT_COLUMNS.index("loss_term")].mean())
        return clock.seconds, rollouts, loss, result.optimizer_steps[0].grad_norm


class Clock:
    """seconds: between notes; under "CPU", the CPU seconds from the start to the last note."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last, self._cpu_start = time.perf_counter(), time.process_time()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield
        self.note(name)

    def note(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now
        self.seconds["CPU"] = time.process_time() - self._cpu_start


@contextlib.contextmanager
def our_step(
    model: Path, prompts: Sequence[Sequence[int]], num_responses: int, num_tokens: int, micro_batch_size: int
) -> Iterator[OurStep]:
    from megatron_powerflow.config_file import parse_config
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt_token_ids": list(tokens)}) + "\n" for tokens in prompts))
        values = {
            "model": {"hf_path": str(model)},
            "precision": {"dtype": "fp32"},
            "prompts": {"path": str(path)},
            "rollout": {
                "prompts_per_step": len(prompts),
                "responses_per_prompt": num_responses,
                "max_prompt_tokens": max(map(len, prompts)),
                "max_response_tokens": num_tokens,
            },
            "objective": {"alpha": ALPHA, "log_z": "mlp"},
            "parallel": {"micro_batch_size": micro_batch_size},
            "optimizer": {"lr": LR, "log_z_lr": LOG_Z_LR},
            "metrics": {"wandb": "off"},
            "run": {"output_dir": str(Path(folder) / "run"), "num_steps": 1},
        }
        plan = make_plan(parse_config(values), world_size=1)
        with initialized(plan.layout, read_launch(), seed=0) as groups:
            yield OurStep(plan, build_session(plan, groups))


def plain_step(plain, rows: Callable) -> tuple[dict[str, float], float, float]:
    """(seconds of each phase, loss, gradient norm) of one plain step on what `rows` gives."""
    clock = Clock()
    given = rows()
    clock.note("rollout")
    scores = plain.score_reference(given)
    clock.note("reference")
    loss, grad_norm = plain.update(given, scores)
    clock.note("update")
    return clock.seconds, loss, grad_norm


def compare(
    model: Path,
    *,
    texts: Sequence[str] = TEXTS,
    num_responses: int = 8,
    num_tokens: int = 64,
    micro_batch_size: int = 8,
    repetitions: int = 3,
) -> tuple[str, float]:
    """The benchmark: (its table, ours over plain in steps per second). AssertionError when the first steps differ."""
    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    from benchmarks.plain_step import PlainStep

    prompts = encode(model, texts)
    plain = PlainStep(model, alpha=ALPHA, lr=LR, micro_batch_size=micro_batch_size)
    seconds: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    with our_step(model, prompts, num_responses, num_tokens, micro_batch_size) as ours:
        _, rollouts, *our_values = ours.run()
        rows = [(rollout.prompt.token_ids, rollout.response_token_ids) for rollout in rollouts]
        assert sum(len(response) for _, response in rows) == len(prompts) * num_responses * num_tokens
        _, *plain_values = plain_step(plain, lambda: rows)
        for (name, tolerance), our, their in zip(TOLERANCES.items(), our_values, plain_values, strict=True):
            assert abs(our - their) <= tolerance * abs(their), f"first step's {name}: ours {our}, plain {their}"
        for _ in range(repetitions):
            seconds["ours"].append(ours.run()[0])
            seconds["plain"].append(plain_step(plain, lambda: plain.write(prompts, num_responses, num_tokens))[0])
    title = (
        f"{model.name}, fp32, {len(prompts)} prompts x {num_responses} responses x {num_tokens} tokens\n"
        f"first step on the same rollouts: loss {our_values[0]:.6f} and {plain_values[0]:.6f} (plain), "
        f"gradient norm {our_values[1]:.5f} and {plain_values[1]:.5f}\n"
    )
    rest, ratio = table(seconds)
    return title + rest, ratio


def table(seconds: dict[str, list[dict[str, float]]]) -> tuple[str, float]:
    """Median seconds of each phase, of the whole step by the clock, and in CPU seconds, which other programs on the
    machine disturb less; the ratio of whole steps by the clock."""
    rows = {phase: (phase,) for phase in PHASES} | {"whole step": PHASES, "whole step, CPU": ("CPU",)}
    lines, ratios = [f"{'median seconds':16}{'ours':>10}{'plain':>10}{'plain / ours':>14}"], {}
    for name, parts in rows.items():
        ours, plain = (
            statistics.median(sum(step[part] for part in parts) for step in seconds[side]) for side in ("ours", "plain")
        )
        ratios[name] = plain / ours
        lines.append(f"{name:16}{ours:10.2f}{plain:10.2f}{ratios[name]:14.2f}")
    return "\n".join(lines), ratios["whole step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    cores = take_cores(arguments.threads)
    print(compare(arguments.model, repetitions=arguments.repetitions)[0])
    print(f"{arguments.threads} thread(s) on core(s) {', '.join(map(str, cores))}, {arguments.repetitions} repetitions")


if __name__ == "__main__":
    main()
