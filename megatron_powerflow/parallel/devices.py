"""Which GPU is this rank's own? And what is said where there is none.

Left out: what the launcher and the environment say (`launch.py`). No torch: versions, counts and names are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_powerflow.errors import RankError


def own_device(local_rank: int, num_visible: int) -> int:
    """Return the index of this rank's GPU among those that it sees.

    Where it sees one, that is its own: srun --gpus-per-task=1 shows each task another one (`shared_devices` sees to
    it). Raises RankError where it sees several, but too few for the ranks of its node.
    """
    if num_visible == 1:
        return 0
    if local_rank >= num_visible:
        raise RankError(
            f"local rank {local_rank} has no GPU of its own: {num_visible} on this node; start one process per GPU"
        )
    return local_rank


def shared_devices(names: Sequence[str]) -> list[str]:
    """Say of each GPU that several ranks have who they are. names: of each rank's GPU, unique in the world."""
    ranks: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        ranks.setdefault(name, []).append(rank)
    return [
        f"ranks {', '.join(map(str, sharing[:16]))} have one GPU, {name}; start one process per GPU, and let each see "
        "its own (srun --gpus-per-task=1) or all of its node's"
        for name, sharing in ranks.items()
        if len(sharing) > 1
    ]


def no_device(meant: str, torch_version: str, cuda: str | None) -> RankError:
    """Make the user's error of a process that is to have a GPU, of which torch sees none.

    meant: what says that one is meant. cuda: the version that torch is built for, None for a build without.
    """
    cause = (
        f"torch {torch_version} is built without CUDA: install a build with it"
        if cuda is None
        else f"torch {torch_version} for CUDA {cuda} finds none: see that nvidia-smi lists it on this node, that its "
        "driver knows that CUDA, and that a container was started with its GPUs (--gpus all)"
    )
    return RankError(
        f"no GPU is visible, and {meant} says that one is meant; {cause}. For a run on the CPU set "
        "CUDA_VISIBLE_DEVICES to nothing: CUDA_VISIBLE_DEVICES= powerflow ..."
    )
