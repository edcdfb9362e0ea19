"""Which names in a run's config are the hub's, and which commit of each does the run take?

A run that begins takes the newest. One that goes on takes that of its checkpoint's inputs.json, wherever the branch is
by then. A revision that the config names counts before both. Everything else is judged before weights are fetched.

Left out: the hub (`hub/fetch.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_powerflow.config import Config
from megatron_powerflow.hub.fetch import locate
from megatron_powerflow.hub.located import LocalPaths, RequestedName
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.training.inputs import read_inputs
from megatron_powerflow.training.plan import make_plan
from megatron_powerflow.training.resume import find_resume


def fetch_inputs(
    config: Config, launch: Launch, *, world_size: int, weights: bool = True, overridden: Sequence[str] = ()
) -> LocalPaths:
    """What `make_plan` is to be told. Collective where a name is the hub's. Raises UserError on all processes alike.

    weights: False for a check, which leaves them on the hub. world_size: of the run. overridden: see `make_plan`.
    """
    wanted = [RequestedName("model", config.model.hf_path, "model.hf_path")]
    wanted += [RequestedName("dataset", path, "prompts.path") for path in config.prompts.paths]
    if config.evaluation.prompts is not None:
        wanted.append(RequestedName("dataset", config.evaluation.prompts, "evaluation.prompts"))

    def recorded() -> Mapping[str, str]:
        checkpoint = find_resume(config, overridden).checkpoint
        before = read_inputs(checkpoint) if checkpoint else None
        return before.revisions if before else {}

    def judge(located: LocalPaths) -> None:
        make_plan(config, world_size, weights=False, located=located, overridden=overridden)

    return locate(wanted, launch, weights=weights, recorded=recorded, check=judge)
