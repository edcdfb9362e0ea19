"""What does the environment say of this process: who started it, with how many others, with which GPUs and secrets?

With `slurm_job.py` and `device_sums.py` the only module that reads the environment. What contradicts itself there is
refused: processes that each take themselves for the only one would write into one folder, and one that waits for others
which nobody started waits for minutes.

Left out: how the processes find each other (`rendezvous.py`). No torch.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.redaction import SECRET_NAME, redacted


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher says about this process. No torch needed."""

    launcher: str  # "torchrun", "srun" or "alone"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def spans_hosts(self) -> bool:
        """Whether some of the processes are on other hosts."""
        return self.local_world_size < self.world_size


ALONE = Launch("alone", 0, 1, 0, 1)
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI; srun --mpi=pmi2 sets them too
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH2
)
# lowest and highest of what may stand in a variable of torchrun's
RANGES = {
    "RANK": (0, 10**6),
    "WORLD_SIZE": (1, 10**6),
    "LOCAL_RANK": (0, 10**6),
    "LOCAL_WORLD_SIZE": (1, 10**6),
    "MASTER_PORT": (1, 65535),
}
_REMEDY = "start with torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE where they are left over"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
GPU_LISTS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
GPU_COUNTS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_NODE", "SLURM_GPUS")


def read_launch() -> Launch:
    """Read who started this process: torchrun's variables first, then srun's; without either it is alone.

    Raises UserError with everything in the environment that contradicts this.
    """
    return launch_of(os.environ)


def launch_of(env: Mapping[str, str]) -> Launch:
    """Return what `read_launch` returns, of a given environment. Raises UserError."""
    srun = _of_srun(env)
    if "TORCHELASTIC_RUN_ID" in env or all(name in env for name in TORCHRUN):
        launch, refused = _of_torchrun(env)
        if not refused and "TORCHELASTIC_RUN_ID" not in env:
            refused = _contradictions(launch, srun, env)
    else:
        launch = srun or ALONE
        refused = [*_left_over(launch, env), *_only_mpi(launch, env)]
    if refused:
        raise UserError(refused)
    return launch


def _of_torchrun(env: Mapping[str, str]) -> tuple[Launch, list[str]]:
    refused = [
        f"{name} is not set, and other variables of torchrun's are; {_REMEDY}" for name in TORCHRUN if name not in env
    ]
    numbers = {}
    for name, (lowest, highest) in RANGES.items():
        if name not in env:
            continue
        text = env[name].strip()
        if text.isdecimal() and lowest <= int(text) <= highest:
            numbers[name] = int(text)
        else:
            refused.append(f"{name}={env[name]}: a number of {lowest} to {highest} belongs there; {_REMEDY}")
    rank, world_size = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    local_rank = numbers.get("LOCAL_RANK", 0)
    local_world_size = numbers.get("LOCAL_WORLD_SIZE", local_rank + 1)
    if not refused and rank >= world_size:
        refused.append(f"RANK={rank} of WORLD_SIZE={world_size}: ranks go from 0 to {world_size - 1}; {_REMEDY}")
    if not refused and not local_rank < local_world_size <= world_size:
        refused.append(
            f"LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_world_size} and WORLD_SIZE={world_size}: a node's "
            f"ranks go from 0, and it has no more of them than all nodes together; {_REMEDY}"
        )
    return Launch("torchrun", rank, world_size, local_rank, local_world_size), refused


def _of_srun(env: Mapping[str, str]) -> Launch | None:
    """The step's task that this process is; None outside a step."""
    if not all(name in env for name in SRUN):
        return None
    rank, local_rank, world_size = (int(env[name]) for name in SRUN[:3])
    per_node = []
    for part in env["SLURM_STEP_TASKS_PER_NODE"].split(","):  # such as 4(x2),3
        count, _, times = part.partition("(x")
        per_node += [int(count)] * int(times.removesuffix(")") or 1)
    node = int(env.get("SLURM_NODEID", 0))
    return Launch("srun", rank, world_size, local_rank, per_node[min(node, len(per_node) - 1)])


def _contradictions(launch: Launch, srun: Launch | None, env: Mapping[str, str]) -> list[str]:
    """What speaks against variables of torchrun's that torchrun has not set: each task would have the same ones."""
    counts = [("srun", srun.rank, srun.world_size)] if srun else []
    counts += [("mpirun", rank, size) for _, rank, size in _mpi_counts(env)]
    for who, rank, size in counts:
        same = launch.world_size > size or (launch.world_size, launch.rank) == (size, rank)
        if size > 1 and not same:
            return [
                f"RANK={launch.rank} and WORLD_SIZE={launch.world_size}, but this is task {rank} of the {size} that "
                f"{who} has started: they are left over, or the same for every task; unset RANK and WORLD_SIZE under "
                "srun, or set them for each task"
            ]
    return []


def _left_over(launch: Launch, env: Mapping[str, str]) -> list[str]:
    """Some of torchrun's variables, without the others, which say something else than what is so."""
    is_so = {"RANK": launch.rank, "WORLD_SIZE": launch.world_size}
    if launch.launcher == "alone":
        is_so |= {"LOCAL_RANK": launch.local_rank, "LOCAL_WORLD_SIZE": launch.local_world_size}
    wrong = [name for name, number in is_so.items() if name in env and env[name].strip() != str(number)]
    if not wrong:
        return []
    held = " ".join(f"{name}={env[name]}" for name in (*RANGES, "MASTER_ADDR") if name in env)
    missing = ", ".join(name for name in TORCHRUN if name not in env)
    so = "this process is alone" if launch == ALONE else f"this is task {launch.rank} of srun's {launch.world_size}"
    return [
        f"{held}, without {missing}: torchrun sets all of them, and {so}; to go on so, `unset {' '.join(wrong)}`, "
        "and for several processes start with torchrun"
    ]


def _only_mpi(launch: Launch, env: Mapping[str, str]) -> list[str]:
    for name, rank, size in _mpi_counts(env):
        if size > 1 and (launch.world_size, launch.rank) != (size, rank):
            return [
                f"{name}={size}: mpirun has started {size} processes, and each would be a run of its own, for ranks "
                "are not read from MPI; start them with torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, "
                "LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
            ]
    return []


def _mpi_counts(env: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """Of each MPI that has left its variables: the name of its count, this process's rank, the count."""
    found = [(name, env[rank], env[name]) for rank, name in MPI if rank in env and name in env]
    return [(name, int(rank), int(size)) for name, rank, size in found if rank.isdecimal() and size.isdecimal()]


def address() -> tuple[str | None, str | None]:
    """Where rank 0 is to be found, as MASTER_ADDR and MASTER_PORT say; None for what is not set."""
    return os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")


def hide_gpus() -> None:
    """Let torch see no GPU in this process. Before it first looks for one."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""}


def meet_here(port: int) -> None:
    """Let this process, and those that it forks from now on, meet at a port of this machine."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def cpu_environment() -> dict[str, str]:
    """Return this process's environment for processes that are to compute on this machine's CPUs, one thread each.

    Without GPUs, and without what a launcher or a cluster's login has left in it: who meets whom, over which network.
    """
    of_launchers = {*RANGES, *SRUN, *(name for pair in MPI for name in pair), "MASTER_ADDR", "GLOO_SOCKET_IFNAME"}
    kept = {k: v for k, v in os.environ.items() if k not in of_launchers and not k.startswith("TORCHELASTIC_")}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with other variables, for a program that it starts."""
    return {**os.environ, **variables}


def agent_holds_store() -> bool:
    """Whether an agent of torchrun's holds torch's store at that address, instead of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def step_nodes() -> tuple[str, int]:
    """Return the nodes of this srun step, as SLURM writes them, and a port that follows from its job and step ids."""
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    # below 32768, from where the kernel takes ports for outgoing connections
    return os.environ["SLURM_STEP_NODELIST"], 20000 + (job * 31 + step) % 12000


def restart_count() -> str:
    """How often torchrun has started its processes anew, under --max-restarts."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def grow_segments() -> None:
    """Let torch's CUDA allocator extend its segments, unless the user has set it up: before torch is imported.

    Without it each size that grows, such as a longer cache or another micro-batch, leaves the segment that it had
    outgrown behind. Both names that torch has for the variable are set: before 2.9 it knows the second one only, and
    from then on it warns of that one where the first is missing.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))


def bind_interface(interface: str) -> None:
    """Let gloo and NCCL take this network interface, each unless the user or an administrator named another for it."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if not _nccl_file_names_interface():
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without "=": all that begin so


def bound_interface() -> str:
    """The interface that gloo takes; empty where none is named."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "")


def _nccl_file_names_interface() -> bool:
    """NCCL's own files give way to the environment: what they name must not be named there."""
    own = os.environ.get("NCCL_CONF_FILE") or Path("~/.nccl.conf").expanduser()
    for path in (Path(own), Path("/etc/nccl.conf")):
        try:
            if re.search(r"^\s*NCCL_SOCKET_IFNAME\s*=", path.read_text(errors="replace"), re.MULTILINE):
                return True
        except (OSError, RuntimeError):
            continue
    return False


def gpus_meant(devices: Path = Path("/dev")) -> str | None:
    """Return what says that this process is to have a GPU, for people; None where nothing says so.

    CUDA_VISIBLE_DEVICES decides where it is set: empty, -1 or SLURM's NoDevFiles say that none is meant. devices: the
    folder of the machine's device files.
    """
    env = os.environ
    if "CUDA_VISIBLE_DEVICES" in env:
        visible = env["CUDA_VISIBLE_DEVICES"]
        return f"CUDA_VISIBLE_DEVICES={visible}" if re.match(r"\s*(\d|GPU-|MIG-)", visible) else None
    for name in GPU_LISTS:
        if env.get(name):
            return f"{name}={env[name]}"
    for name in GPU_COUNTS:
        if re.search(r"(^|:)0*[1-9]\d*$", env.get(name, "")):  # 8, or a100:8
            return f"{name}={env[name]}"
    files = sorted(devices.glob("nvidia[0-9]*"))
    return f"this machine's {files[0]}" if files else None


def gpus_of(number: int, each: int, devices: Path = Path("/dev")) -> str | None:
    """Return the GPUs of the server with this number on its machine, as CUDA_VISIBLE_DEVICES has them: `each` of those
    that are visible, the first server the first ones. None on a machine without GPUs.

    Raises UserError where there are not so many.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found = [path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*")]
        names = sorted(found, key=int)
    else:
        names = [name for name in visible.replace(" ", "").split(",") if re.match(r"\d|GPU-|MIG-", name)]
    if not names:
        return None
    mine = names[number * each : (number + 1) * each]
    if len(mine) < each:
        raise UserError(
            f"rollout.vllm.tp={each}: server {number} of this machine needs GPU {number * each} to "
            f"{(number + 1) * each - 1}, and {len(names)} are visible; start fewer servers here"
        )
    return ",".join(mine)


def environment_secrets() -> list[str]:
    """The values of the environment's keys, tokens and passwords, by the variables' names (WANDB_API_KEY, HF_TOKEN).

    A path is none: it says where a key lies.
    """
    return [v for name, v in os.environ.items() if SECRET_NAME.search(name) and not v.startswith(("/", ".", "~"))]


def command_line(*words: str) -> str:
    """What was typed, for files and logs: words that can be typed again, but for the secrets among them."""
    return redacted(shlex.join(words), environment_secrets())


def settings_that_count() -> dict[str, str]:
    """Environment variables of other libraries that change where a run takes place, those that are set."""
    names = (
        "CUDA_VISIBLE_DEVICES",
        *ALLOCATOR,
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
        "NVIDIA_TF32_OVERRIDE",
        "HF_HOME",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
    )
    return {name: os.environ[name] for name in names if name in os.environ}
