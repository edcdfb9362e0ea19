"""Can these nodes carry the run? Every rank comes, has a device of its own, sees the files; every group sums, in time.

Before a model is loaded, in the time that a few collectives take: a node that is missing, silent, slow or without its
file systems is named, with exit code 75, so that the job can be started again without it. What is wrong everywhere is
the user's mistake, exit code 2.

Left out: whether the run itself is possible (`powerflow check`), and memory for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

from megatron_powerflow.config import Config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import EXIT_USER_ERROR, RankError, UserError
from megatron_powerflow.parallel.devices import own_device
from megatron_powerflow.parallel.initialize import refuse_without_device
from megatron_powerflow.parallel.launch import Launch, restart_count
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.parallel.rendezvous import main_address, rendezvous, take_interface
from megatron_powerflow.parallel.slurm_job import node_name, step_node_names
from megatron_powerflow.preflight.findings import of_cards, of_reports
from megatron_powerflow.preflight.rank_groups import rounds
from megatron_powerflow.preflight.reports import Card, Report, Verdict
from megatron_powerflow.preflight.roll_call import RollCall, lost_main_rank, open_store
from megatron_powerflow.preflight.table import describe, group_rows, node_rows
from megatron_powerflow.whole_files import write_file

CONNECT_SECONDS = 10.0  # to a store that is there
OTHERS_FIRST_SECONDS = 5.0  # for the main rank to write its verdict, which counts more


class Preflight:
    """The pre-flight of one rank. out: the file of the verdict; None for none. See `run`."""

    def __init__(
        self, config: Config, layout: Layout, launch: Launch, *, seconds: float, slow: float, out: Path | None
    ) -> None:
        self._config, self._layout, self._launch = config, layout, launch
        self._seconds, self._slow, self._out = seconds, slow, out
        self._began = time.monotonic()
        self._saying = threading.Lock()

    def run(self) -> int:
        """Make it; return the exit code, alike on every rank. Collective.

        A rank that others wait for in vain never returns: a thread ends its process.
        """
        launch = self._launch
        card, device = self._card()
        if launch.world_size == 1:
            verdict = of_cards([card]) or self._of_groups([card], device, None)
        else:
            try:
                rendezvous(launch, timedelta(seconds=self._seconds))
            except RankError as error:
                self._end(self._without_store(error), says=launch.is_main or launch.local_rank == 0)
            verdict = self._with_others(card, device)
        if launch.is_main:
            self._say(verdict)
        return verdict.exit_code

    def _without_store(self, error: RankError) -> Verdict:
        if self._launch.is_main:  # its port is taken, or its own address is none
            return Verdict(EXIT_USER_ERROR, error.violations)
        return lost_main_rank(self._launch, dict(enumerate(self._known_nodes())), " ".join(error.violations))

    def _with_others(self, card: Card, device) -> Verdict:
        launch = self._launch
        host, port = main_address(launch)
        opened = partial(open_store, host, int(port), f"preflight_{restart_count()}", CONNECT_SECONDS)
        nodes = dict(enumerate(self._known_nodes()))
        with RollCall(launch, opened, nodes, self._seconds, self._end) as call:
            try:
                cards = call.meet(card)
                verdict = of_cards(cards) or self._of_groups(cards, device, call)
                if not launch.is_main:
                    return call.await_verdict()
                call.conclude(verdict)
                return verdict
            except RuntimeError as error:  # of torch's store, gloo and NCCL: no classes of their own
                call.break_off(" ".join(str(error).split())[:300])
                raise

    def _card(self):
        """What this rank says when it comes, and its device. What it lacks is said there."""
        import torch

        device = torch.device("cpu")
        try:
            refuse_without_device()
            if torch.cuda.is_available():
                device = torch.device("cuda", own_device(self._launch.local_rank, torch.cuda.device_count()))
                torch.cuda.set_device(device)
                uuid = str(torch.cuda.get_device_properties(device).uuid)
                return Card(node_name(), "nccl", device=uuid), device
        except UserError as error:
            return Card(node_name(), "", fault=" ".join(error.violations)), device
        return Card(node_name(), "gloo"), device

    def _of_groups(self, cards: list[Card], device, call: RollCall | None) -> Verdict:
        """Measure, and judge what was measured; on ranks that are not the main one an empty verdict."""
        from megatron_powerflow.preflight.measure import measure_groups, measure_product, taken_bytes

        launch, enter = self._launch, call.enter if call else lambda what: None
        enter("looking at the files of the config")
        paths = self._paths()
        seen = tuple(path for path in paths if os.path.exists(path))  # False of what it may not see
        enter("matrix products of its own")
        report = Report(launch.rank, node_name(), 0.0, taken_bytes(device), seen)
        product_seconds = measure_product(device)
        groups = []
        if call:
            enter("connecting the ranks")
            timeout = timedelta(seconds=3 * self._seconds + 60)  # the roll call comes first
            self._connect(cards[0].backend, timeout)
            plan = rounds(self._layout, [card.node for card in cards])
            groups = measure_groups(plan, launch.rank, device, timeout, enter)
        report = Report(launch.rank, report.node, product_seconds, report.taken_bytes, seen, tuple(groups))
        reports = call.gather(report) if call else [report]
        if reports is None:
            return Verdict()
        print(describe(reports, cards[0].backend, time.monotonic() - self._began), flush=True)
        verdict = of_reports(reports, slow=self._slow, paths=paths)
        table = {"groups": group_rows(reports), "nodes": node_rows(reports)}
        return Verdict(verdict.exit_code, verdict.lines, verdict.nodes, table)

    def _connect(self, backend: str, timeout: timedelta) -> None:
        import torch.distributed as dist

        take_interface(self._launch)
        store = rendezvous(self._launch, timeout)
        dist.init_process_group(
            backend, store=store, rank=self._launch.rank, world_size=self._launch.world_size, timeout=timeout
        )

    def _paths(self) -> list[str]:
        """What every node is to see of the config's files: those that the main rank's disk could hold."""
        config = self._config
        folder = Path(config.run.output_dir).absolute()
        evaluation = [config.evaluation.prompts] if config.evaluation.prompts else []
        names = [config.model.hf_path, *config.prompts.paths, *evaluation]
        return [*names, next((str(path) for path in (folder, *folder.parents) if os.path.isdir(path)), "/")]

    def _known_nodes(self) -> list[str]:
        """The nodes of the ranks, in order, as far as SLURM says before they have come."""
        nodes, per_node = step_node_names(), self._launch.local_world_size
        even = len(nodes) * per_node == self._launch.world_size
        return [node for node in nodes for _ in range(per_node)] if even else []

    def _say(self, verdict: Verdict) -> None:
        """Print what is wrong, and write the verdict for programs. By the main rank, or by one that has lost it."""
        with self._saying:
            kind = "error: " if verdict.exit_code == EXIT_USER_ERROR else "pre-flight: "
            for line in verdict.lines:
                print(f"{kind}{line}", file=sys.stderr, flush=True)
            if self._launch.is_main and not verdict.lines:
                make_console().print("pre-flight: all nodes are fit")
            if self._out is not None and (self._launch.is_main or not self._out.exists()):
                with contextlib.suppress(OSError):  # what is printed is said anyway
                    write_file(self._out, verdict.to_json() + "\n")

    def _end(self, verdict: Verdict, *, says: bool) -> NoReturn:
        """End this process, in a thread or before it has met the others. says: whether it prints the verdict."""
        if says:
            if not self._launch.is_main:
                time.sleep(OTHERS_FIRST_SECONDS)
            self._say(verdict)
        os._exit(verdict.exit_code)
