"""Which runs does the study consist of? A table: base, objective, steps; everything else is la_tb.yaml.

Left out: running them (`study.py`), what came out (`results.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from examples.dual_nature.corpus import MAX_RESPONSE_TOKENS

REMEDY_LR = "optimizer.lr=1e-3"  # the same curves about three times sooner


@dataclass(frozen=True)
class Arm:
    """name: of its folders, NAME_s0 ... group: which page of the report it stands on. every: steps between
    evaluations. overrides: of la_tb.yaml."""

    group: str
    name: str
    base: str
    num_steps: int
    every: int
    overrides: tuple[str, ...] = ()
    num_seeds: int = 3

    @property
    def alpha(self) -> float | None:
        """None: the objective knows none."""
        alpha = self._override("objective.alpha") or "4"
        return None if alpha == "null" else float(alpha)

    @property
    def tilt_cap(self) -> int | None:
        cap = self._override("objective.tilt_cap")
        return cap and int(cap)

    @property
    def limit(self) -> int:
        """Tokens of a response."""
        return int(self._override("rollout.max_response_tokens") or MAX_RESPONSE_TOKENS)

    @property
    def tilted(self) -> bool:
        """Its fixed point is p^alpha exp(-lambda n)."""
        return (self._override("objective.preset") or "la_tb") in ("la_tb", "tb_token_score", "rl_token")

    @property
    def untilted(self) -> bool:
        """Its fixed point is p^alpha."""
        return self._override("objective.preset") in ("tb_traj", "rl_traj")

    def _override(self, key: str) -> str | None:
        return dict(override.split("=", 1) for override in self.overrides).get(key)


@dataclass(frozen=True)
class Measured:
    """A base that is only sampled, at a temperature. groups: the pages it stands on."""

    groups: tuple[str, ...]
    name: str
    base: str
    temperature: float


def _preset(name: str, *more: str) -> tuple[str, ...]:
    return (f"objective.preset={name}", *more)


def _rival(name: str) -> tuple[str, ...]:
    """alpha and log Z' of la_tb.yaml mean nothing to it."""
    return _preset(name, "objective.alpha=null", "objective.log_z=null")


NO_LOG_Z = "objective.log_z=null"
ARMS: tuple[Arm, ...] = (
    # Fig. 3: objectives that aim at p^4, on the base whose target is a loop
    Arm("objectives", "la_tb", "g2", 340, 20),
    Arm("objectives", "rl_token", "g2", 140, 20, _preset("rl_token", NO_LOG_Z)),
    Arm("objectives", "tb_token_score", "g2", 100, 20, _preset("tb_token_score")),
    Arm("objectives", "tb_token_step", "g2", 100, 20, _preset("tb_token_step")),
    Arm("objectives", "tb_token_target", "g2", 30, 10, _preset("tb_token_target")),
    Arm("objectives", "tb_traj", "g2", 50, 10, _preset("tb_traj")),
    Arm("objectives", "rl_traj", "g2", 50, 10, _preset("rl_traj", NO_LOG_Z)),
    # alpha as a dial; la_tb again where the target is no loop
    Arm("alpha", "la_tb_safe", "g3", 300, 20),
    Arm("alpha", "la_tb_alpha2", "g2", 100, 20, ("objective.alpha=2.0",)),
    # the other side: from an over-sharpened model back
    Arm("flatten", "la_tb_alpha0.5", "aligned", 75, 15, ("objective.alpha=0.5", "optimizer.lr=1e-4")),
    # rivals, the same trainer
    Arm("rivals", "grpo", "g2", 80, 20, _rival("grpo")),
    Arm("rivals", "empo", "g2", 80, 20, _rival("empo")),
    Arm("rivals", "ttrl", "g2", 80, 20, _rival("ttrl")),
    Arm("rivals", "intuitor", "g2", 60, 20, _rival("intuitor")),
    Arm("rivals", "format_only", "g2", 40, 20, _rival("format_only")),
    Arm("rivals", "one_shot_em", "g2", 40, 20, _rival("one_shot_em")),
    # what helps against the loop: one seed of each, on the mild, the trapped and the safe base
    *(
        Arm(f"remedies_{base}", f"{name}_{base}", base, 150, 10, (REMEDY_LR, *overrides), num_seeds=1)
        for base in ("g1", "g2", "g3")
        for name, overrides in (
            ("nothing", ()),
            ("lower_limit", ("rollout.max_response_tokens=20",)),
            ("tilt_cap", ("objective.tilt_cap=20",)),
            ("alpha_schedule", ("objective.alpha_warmup_steps=75",)),
            ("stop_on_alarm", ("run.stop_on_alarm=[length]",)),
            ("alpha2", ("objective.alpha=2.0",)),
        )
    ),
)
MEASURED: tuple[Measured, ...] = (
    Measured(("objectives", "alpha", "rivals"), "base", "g2", 1.0),
    Measured(("objectives", "alpha", "rivals"), "base_T0.25", "g2", 0.25),
    *(Measured(("flatten",), f"aligned_T{t:g}", "aligned", t) for t in (1.0, 1.25, 1.5, 2.0)),
)
GROUPS = tuple(dict.fromkeys(arm.group for arm in ARMS))
STANDARD_GROUPS = tuple(group for group in GROUPS if not group.startswith("remedies"))


@dataclass(frozen=True)
class Plan:
    """Which arms, and with how many held-out questions they are watched in training and examined after it."""

    arms: tuple[Arm, ...] = ARMS
    measured: tuple[Measured, ...] = MEASURED
    num_watched: int = 100
    watched_responses: int = 8
    num_examined: int = 100
    examined_responses: int = 64

    def of_group(self, group: str) -> Plan:
        return replace(
            self,
            arms=tuple(arm for arm in self.arms if arm.group == group),
            measured=tuple(arm for arm in self.measured if group in arm.groups),
        )

    @property
    def bases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(arm.base for arm in (*self.measured, *self.arms)))
