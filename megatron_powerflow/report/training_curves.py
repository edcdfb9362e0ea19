"""How did training go? One panel per metric, all arms over each other, from metrics.jsonl."""

from __future__ import annotations

from megatron_powerflow.metrics.axes import end_at_share, step_axis
from megatron_powerflow.metrics.names import METRICS, heading
from megatron_powerflow.report.pictures import (
    Cast,
    Panel,
    Picture,
    draw_band,
    finish,
    in_style,
    panels,
    scale_to,
    zero_line,
)
from megatron_powerflow.report.seeds import MAX_POINTS

PANELS = (
    Panel("accuracy", note="training rollouts"),
    Panel("kl_per_response"),
    Panel("truncated_fraction"),
    Panel("boxed_rate"),
    Panel("response_length_mean", note="thin: 95 %", thin="response_length_p95"),
    Panel("policy_entropy"),
    Panel("loss"),
    Panel("grad_norm"),
    Panel("residual_mean", around_0=True),
    Panel("residual_std"),
    Panel("log_z_mean", note="thin: the group's estimate", thin="group_log_z_mean", around_0=True),
    Panel("alpha_realised", note="thin: asked", thin="alpha"),
    Panel("alpha_realised_r2"),
    Panel("tokens_per_second"),
)


def draw_training_curves(cast: Cast) -> Picture | None:
    """Draw one panel per training metric, all arms over each other. Returns None when no arm has any of the metrics."""
    shown = [(arm, style) for arm, style in cast.pairs() if arm.trained and any(arm.metric(p.name) for p in PANELS)]
    available = [panel for panel in PANELS if any(arm.metric(panel.name) for arm, _ in shown)]
    if not available:
        return None
    notes = [
        f"no run has the panel {heading(panel.name)}, {panel.name} in metrics.jsonl"
        for panel in PANELS
        if panel not in available
    ]
    for panel in available:
        lacking = [arm.label for arm, _ in shown if not arm.metric(panel.name)]
        if lacking:
            notes.append(f"the panel {heading(panel.name)} shows nothing of {'; '.join(lacking)}")
    with in_style():
        figure, axes = panels(len(available))
        for axis, panel in zip(axes, available, strict=True):
            series = []
            for arm, style in shown:
                main = arm.metric(panel.name)
                series += main
                draw_band(axis, style, main)
                if panel.thin:
                    draw_band(axis, style, arm.metric(panel.thin), thin=True)
            scale = scale_to(axis, series, signed=panel.around_0)
            if panel.name == "residual_mean":
                zero_line(axis)
            if METRICS[panel.name].share:
                end_at_share(axis)
            axis.set_title(panel.title + scale)
            step_axis(axis)
        png = finish(figure, shown)
    return Picture(
        name="training_curves",
        title="Training curves",
        alt=f"Training metrics against step for {len(shown)} arms: "
        + ", ".join(METRICS[panel.name].name for panel in available),
        caption=(
            "Line: mean over the seeds that reached the step. Band: from the lowest to the highest seed. Runs of "
            f"more than {MAX_POINTS} steps are averaged in bins of steps, each seed alone, before the band is taken; "
            "markers only tell lines apart. The residual and log Z′ are per token where the objective is (la_tb); arms "
            "with other objectives may differ in unit. The group's estimate is minus the mean of the other terms of "
            "the residual: what log Z′ would have to be for the mean residual to vanish."
        ),
        png=png,
        notes=tuple(notes),
    )
