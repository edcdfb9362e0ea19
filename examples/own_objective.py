"""An objective of your own in one file: RL-traj with GRPO's advantage, divided by its standard deviation in the group.

python examples/own_objective.py check examples/configs/local.yaml objective.preset=rl_traj_std objective.log_z=null \\
    run.output_dir=runs/own

Every command of `powerflow` can be given so, and must be for this objective: a run's config.yaml names it. Left out: a
formula of your own; this is a row of settings of those there are (`megatron_powerflow/objective/presets.py`).
"""

from __future__ import annotations

from typing import Literal

from megatron_powerflow.objective import presets

NAME = "rl_traj_std"
# A = (r - mean) / (std + 1e-6) with r = alpha S_ref - S + alpha psi, loss = -A S
ROW = presets.PolicyGradient("power", divide_by_std=True, score_norm="none")


def main() -> None:
    """Add the row, and its name to those that a config accepts. The config reads both when it is imported."""
    presets.PRESETS[NAME] = ROW
    presets.PresetName = Literal[*presets.PRESETS]
    from megatron_powerflow.cli import main as powerflow

    powerflow()


if __name__ == "__main__":
    main()
