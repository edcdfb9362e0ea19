"""Do all layouts compute the same thing? Three optimizer steps from the same saved rollouts, one row per layout.

    python -m benchmarks.layouts [--only TP2 CP2 ...] [--json FILE]

One process samples three steps of a small random model (fp32, responses of uneven length) and saves them; every row
then replays them with `powerflow train`'s own loop in real gloo processes. Each row is compared with one process that
pads: the loss and the gradient norm of each step, and the change of all parameters, read from the exported folder. The
importance weight, two updates a step and a log Z' head whose gradient reaches the policy are on, so that old log-probs,
the counting of rollouts and the pooling of prompts are compared as well.

Left out: speed; larger models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

LOSS_LIMIT = 1e-5  # relative, of each of the three steps
GRAD_NORM_LIMIT = 1e-4
# ||change - change of one process|| / ||change of one process||: Adam divides small numbers by small numbers
CHANGE_LIMIT = 1e-3

PACKED = ("parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=96")
SP = "parallel.sequence_parallel=true"
MIXTURE = "qwen3_moe"


@dataclass(frozen=True)
class Row:
    name: str
    num_processes: int
    overrides: tuple[str, ...] = ()
    family: str = "qwen2"  # of tests/tiny_models.py; compared with one process of the same family


ROWS = (
    Row("1 process", 1),
    Row("TP2", 2, ("parallel.tp=2",)),
    Row("TP2 + SP", 2, ("parallel.tp=2", SP)),
    Row("TP4, 2 groups", 4, ("parallel.tp=4",)),
    Row("TP4 + SP, 2 groups, norms over heads", 4, ("parallel.tp=4", SP), "olmo2"),
    Row("PP2", 2, ("parallel.pp=2",)),
    Row("PP2 x VPP2", 2, ("parallel.pp=2", "parallel.vpp=2")),
    Row("PP3, uneven", 3, ("parallel.pp=3",)),
    Row("CP2", 2, ("parallel.cp=2",)),
    Row("CP4", 4, ("parallel.cp=4",)),
    Row("DP2", 2),
    Row("DP2, distributed optimizer", 2, ("optimizer.distributed=true",)),
    Row("TP2 x PP2", 4, ("parallel.tp=2", "parallel.pp=2")),
    Row("TP2 x CP2", 4, ("parallel.tp=2", "parallel.cp=2")),
    Row("TP2 + SP x CP2", 4, ("parallel.tp=2", SP, "parallel.cp=2")),
    Row("PP2 x CP2", 4, ("parallel.pp=2", "parallel.cp=2")),
    Row("CP2 x DP2, distributed optimizer", 4, ("parallel.cp=2", "optimizer.distributed=true")),
    Row("PP2 x DP2", 4, ("parallel.pp=2",)),
    Row("packed", 1, PACKED),
    Row("packed, TP2 + SP", 2, (*PACKED, "parallel.tp=2", SP)),
    Row("packed, PP2 x VPP2", 2, (*PACKED, "parallel.pp=2", "parallel.vpp=2")),
    Row("packed, CP2", 2, (*PACKED, "parallel.cp=2")),
    Row("packed, DP2", 2, PACKED),
    Row("packed, PP2 x DP2", 4, (*PACKED, "parallel.pp=2")),
    Row("packed, TP2 + SP x CP2", 4, (*PACKED, "parallel.tp=2", SP, "parallel.cp=2")),
    Row("packed, CP2 x DP2, recomputed", 4, (*PACKED, "parallel.cp=2", "model.recompute=full")),
    Row("experts: EP2", 2, ("parallel.ep=2",), MIXTURE),
    Row("experts: TP2 + SP x EP2", 4, ("parallel.tp=2", SP, "parallel.ep=2"), MIXTURE),
    Row("experts: packed, EP2", 2, (*PACKED, "parallel.ep=2"), MIXTURE),
)


@dataclass(frozen=True)
class Outcome:
    """losses, grad_norms: of each step. change: HF name -> parameter after the last step minus before the first."""

    losses: list[float]
    grad_norms: list[float]
    change: dict


@dataclass(frozen=True)
class Compared:
    """A row of the table; `*_error` relative to one process that pads, the worst of the steps."""

    name: str
    num_processes: int
    loss: float  # of the last step
    loss_error: float
    grad_norm: float
    grad_norm_error: float
    change_norm: float
    change_error: float

    @property
    def agrees(self) -> bool:
        return (
            self.loss_error <= LOSS_LIMIT
            and self.grad_norm_error <= GRAD_NORM_LIMIT
            and self.change_error <= CHANGE_LIMIT
        )


class Comparison:
    """Runs rows in `workers` (tests/gloo_workers.py), below `folder`; models and rollouts are made once per family."""

    def __init__(self, workers, folder: Path) -> None:
        self._workers, self._folder = workers, folder
        self._alone: dict[str, Outcome] = {}

    def row(self, row: Row) -> Compared:
        """Collective with the row's processes. Returns its numbers beside those of one process."""
        alone = self._reference(row.family)
        found = alone if row == ROWS[0] else self._run(row)
        worst = [
            max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in ((found.losses, alone.losses), (found.grad_norms, alone.grad_norms))
        ]
        difference = {name: found.change[name] - alone.change[name] for name in alone.change}
        return Compared(
            row.name,
            row.num_processes,
            found.losses[-1],
            worst[0],
            found.grad_norms[-1],
            worst[1],
            _norm(found.change),
            _norm(difference) / _norm(alone.change),
        )

    def _reference(self, family: str) -> Outcome:
        if family not in self._alone:
            from tests.tiny_models import make_tiny_model

            folder = self._folder / family
            # an eighth of the vocabulary ends a response: lengths are uneven
            make_tiny_model(folder / "model", family, eos_token_id=tuple(range(2, 40)), scale=0.1)
            write_config(folder)
            self._train(folder, 1, "rollout.save=true", "evaluation.samples=0", f"run.output_dir={folder / 'saved'}")
            self._alone[family] = self._run(Row("1 process", 1, family=family))
        return self._alone[family]

    def _run(self, row: Row) -> Outcome:
        from safetensors.torch import load_file

        folder = self._folder / row.family
        run = folder / row.name.replace(" ", "_").replace(",", "").replace(":", "")
        replay = (f"rollout.replay={folder / 'saved'}", f"run.output_dir={run}")
        self._train(folder, row.num_processes, *replay, *row.overrides)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        before, after = (
            {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}
            for path in (folder / "model", run / "hf_export")
        )
        assert after.keys() == before.keys()
        change = {name: after[name].double() - before[name].double() for name in before}
        return Outcome([line["loss"] for line in lines], [line["grad_norm"] for line in lines], change)

    def _train(self, folder: Path, num_processes: int, *overrides: str) -> None:
        from tests.distributed.megatron_sessions import run_training

        self._workers.run(num_processes, run_training, folder / "config.yaml", *overrides)


def write_config(folder: Path) -> None:
    prompts = [[5, 6, 7], [9, 10], [11, 12, 13, 14, 15, 16, 17], [20]]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt_token_ids": [50 + token for token in prompt]}) + "\n" for prompt in prompts)
    )
    (folder / "config.yaml").write_text(
        f"""
model: {{hf_path: {folder / "model"}}}
precision: {{dtype: fp32}}
prompts: {{path: {folder / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 4, max_prompt_tokens: 8, max_response_tokens: 40}}
parallel: {{micro_batch_size: 2}}
objective: {{alpha: 2, log_z: mlp, log_z_detach: false, ratio: seq_mean}}
optimizer: {{lr: 1e-4, updates_per_rollout: 2}}
checkpoint: {{interval: 0}}
metrics: {{wandb: "off", curves: false}}
run: {{num_steps: 3, output_dir: {folder / "run"}}}
"""
    )


def _norm(tensors: dict) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors.values()) ** 0.5


def print_table(rows: list[Compared]) -> None:
    from rich.table import Table

    from megatron_powerflow.console import make_console

    table = Table("layout", "processes", "loss", "error", "gradient norm", "error", "change", "error", "")
    for row in rows:
        table.add_row(
            row.name,
            str(row.num_processes),
            f"{row.loss:.7f}",
            f"{row.loss_error:.1e}",
            f"{row.grad_norm:.6f}",
            f"{row.grad_norm_error:.1e}",
            f"{row.change_norm:.6f}",
            f"{row.change_error:.1e}",
            "agrees" if row.agrees else "DIFFERS",
        )
    console = make_console(width=130)
    console.print(table)
    console.print(
        f"errors: relative to one process, worst of 3 steps; limits: loss {LOSS_LIMIT:g}, gradient norm "
        f"{GRAD_NORM_LIMIT:g}, change of the parameters {CHANGE_LIMIT:g} (norm of the difference)",
    )


def main() -> int:
    from tests.gloo_workers import GlooWorkers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [row.name for row in ROWS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="LAYOUT", default=names)
    parser.add_argument("--json", type=Path, help="write the table there as well")
    arguments = parser.parse_args()
    workers = GlooWorkers()
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(workers, Path(folder))
        rows = [comparison.row(row) for row in ROWS if row.name in arguments.only]
    workers.stop()
    print_table(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
