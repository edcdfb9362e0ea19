"""Where is what 0.1.0 had under another name? Scripts that import a module that has moved go on, with a warning.

A moved module is made when it is imported: each of its names is looked up in the modules that have them now. In a
module that stayed, `__getattr__ = former_names_of(__name__)` does the same for the names that left it.

To be removed in 0.3. Left out: modules that only a run itself imports, and names that have another meaning now.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "megatron_powerflow."
# former module: the modules that have its names now, in the order in which they are asked
MOVED_MODULES: dict[str, tuple[str, ...]] = {
    "checkpoint.compare": ("converter.compare",),
    "checkpoint.convert": ("converter.convert",),
    "checkpoint.inspect": ("converter.inspect",),
    "checkpoint.model_folders": ("converter.model_folders",),
    "checkpoint.torch_dist": ("converter.torch_dist",),
    "conversion": ("hf",),
    "conversion.checked": ("hf.checked",),
    "conversion.families": ("hf.families",),
    "conversion.hf_config": ("hf.config", "hf.family"),
    "conversion.hf_files": ("hf.files", "hf.shard_files"),
    "conversion.hf_rope": ("hf.rope",),
    "conversion.ops": ("hf.operations",),
    "conversion.shapes": ("hf.shapes",),
    "conversion.shard_files": ("hf.shard_files",),
    "conversion.shards": ("hf.live_weights",),
    "conversion.stored": ("hf.torch_dist_names",),
    "conversion_tools": ("converter.commands",),
    "data.grading": ("data.answers",),
    "data.response_format": ("data.boxes", "training.rewards"),
    "decoding": ("commands.power_sampling", "commands.verbalized"),
    "inference": (
        "commands.open_model",
        "commands.score",
        "commands.generate",
        "commands.export",
        "commands.rounds",
        "training.score_rollouts",
    ),
    "metrics.curves": ("report.curves",),
    "metrics.plot_style": ("report.plot_style",),
    "model_parity": ("commands.log_prob_parity",),
    "objective.log_prob_kernel": ("log_probs.kernel_choice",),
    "objective.tiles": ("log_probs.tiles",),
    "objective.token_log_probs": ("log_probs.token_log_probs",),
    "objective.token_log_probs_plain": ("log_probs.plain",),
    "objective.token_log_probs_triton": ("log_probs.triton",),
    "presets": ("objective.presets",),
    "rollout.lane": ("rollout.decode_batch",),
    "rollout.saved": ("rollout.rollout_files",),
    "training.held_out": ("training.in_training_evaluation",),
    "training.setup": ("training.session", "training.policy", "training.micro_batches"),
}
# former name: what it is called now
MOVED_NAMES: dict[str, str] = {
    "config.dump_config": "config_file.dump_config",
    "config.load_config": "config_file.load_config",
    "config.parse_config": "config_file.parse_config",
    "data.packing.Annotated": "data.packing.AnnotatedRollout",
    "inference.Opened": "commands.open_model.OpenModel",
    **{
        f"parallel.initialize.{name}": f"parallel.launch.{name}"
        for name in ("ALONE", "Launch", "command_line", "environment_secrets", "read_launch", "settings_that_count")
    },
    "records.Architecture": "architecture.Architecture",
    "records.Experts": "architecture.Experts",
    "records.Mla": "architecture.Mla",
    "records.Rope": "architecture.Rope",
    "rollout.lane.Lane": "rollout.decode_batch.DecodeBatch",
}


def former_names_of(module: str) -> Callable[[str], Any]:
    """Make the `__getattr__` of a module: it returns what had a name there in 0.1.0, with a DeprecationWarning.

    module: its `__name__`. The function raises AttributeError for a name that has not moved.
    """
    former = module.removeprefix(PACKAGE)

    def look_up(name: str) -> Any:
        renamed = MOVED_NAMES.get(f"{former}.{name}")
        homes = MOVED_MODULES.get(former, ()) if renamed is None else (renamed.rpartition(".")[0],)
        now = name if renamed is None else renamed.rpartition(".")[2]
        for home in homes if not name.startswith("__") else ():
            value = getattr(importlib.import_module(PACKAGE + home), now, None)
            if value is not None:
                warnings.warn(
                    f"{module}.{name} is {PACKAGE}{home}.{now} since 0.2.0; the former name goes in 0.3",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return value
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return look_up


class FormerModules:
    """Import hook, asked last: makes the modules of MOVED_MODULES, and nothing else."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return a spec where `name` is a former module of this package; else None."""
        if not name.startswith(PACKAGE) or name.removeprefix(PACKAGE) not in MOVED_MODULES:
            return None
        return ModuleSpec(name, FormerModules, is_package=name == PACKAGE + "conversion")  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Leave the making to the import system."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Give the module its look-up."""
        module.__dict__["__getattr__"] = former_names_of(module.__name__)


def install() -> None:
    """Let imports find the former modules, behind everything that is there."""
    if FormerModules not in sys.meta_path:
        sys.meta_path.append(FormerModules)
