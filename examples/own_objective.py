"""An objective of your own in one file: RL-traj with GRPO's advantage, divided by its standard deviation in the group.

python examples/own_objective.py check examples/configs/local.yaml objective.preset=rl_traj_std objective.log_z=null \\
    run.output_dir=runs/own

Every command of `powerflow` can be given so, and must be for this objective: a run's config.yaml names it. Left out: a
formula of your own; this is a row of settings of those there are (`megatron_powerflow/objective/presets.py`).
"""

from __future__ import annotations

from megatron_powerflow.objective.presets import PRESETS, PolicyGradient

NAME = "rl_traj_std"
# A = (r - mean) / (std + 1e-6) with r = alpha S_ref - S + alpha psi, loss = -A S
ROW = PolicyGradient("power", divide_by_std=True, score_norm="none")


def main() -> None:
    """Add the row before anything reads the table, which the config does when it is imported."""
    PRESETS[NAME] = ROW
    from megatron_powerflow.cli import main as powerflow

    powerflow()


if __name__ == "__main__":
    main()
