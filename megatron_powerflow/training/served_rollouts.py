"""How does a policy come to vLLM servers? The engine over them, built from chunks: pool, weights, probe, ledger.

    with_servers    of a run: with the ledger of its folder
    served_engine   of any policy, for `powerflow generate` and `evaluate`

Left out: the engine itself (`serving/engine.py`), who starts servers (`serving/supervisor.py`).
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.checkpoint.folder import latest_checkpoint
from megatron_powerflow.config import Config
from megatron_powerflow.hf.family import Family
from megatron_powerflow.metrics.alarm_words import SAMPLER_GAP
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.parallel.together import broadcast_object, on_main
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.serving.announcements import ask_restart, read_announcements
from megatron_powerflow.serving.by_folder import FolderTransport
from megatron_powerflow.serving.by_stream import StreamTransport
from megatron_powerflow.serving.checks import weights_folder
from megatron_powerflow.serving.engine import VllmEngine, VllmSettings, asks
from megatron_powerflow.serving.ledger import Ledger
from megatron_powerflow.serving.manifest import Probe, version_of
from megatron_powerflow.serving.pool import Pool, PoolSettings
from megatron_powerflow.serving.server import Server, require_url
from megatron_powerflow.serving.transport import Transport
from megatron_powerflow.serving.weight_giving import WeightGiver
from megatron_powerflow.serving.weight_sender import WeightSender
from megatron_powerflow.serving.weight_sync import require_room, wake
from megatron_powerflow.serving.weight_writer import WeightWriter
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.resume import Resume
from megatron_powerflow.training.score_rollouts import policy_token_log_probs
from megatron_powerflow.training.session import Session

PROBE_PROMPTS, PROBE_TOKENS = 8, 96
FOLDER_PREFIX = "powerflow-"  # of the weights of one start of a run, within rollout.vllm.weights
# Keys that may change at a start, and no weight with them.
NOT_OF_WEIGHTS = ("alarm.", "checkpoint.", "evaluation.", "metrics.", "rollout.vllm.", "run.")
SYNC_SECONDS = 1200.0  # that a server may take to load a version of the weights


@dataclass(frozen=True)
class ServedModel:
    """A policy on this rank, as far as servers need it. weights: the folder that its versions are written to, if any
    are."""

    config: Config
    layout: Layout
    architecture: Architecture
    family: Family
    chunks: Sequence[PolicyModel]
    weights: Path


def with_servers(plan: Plan, session: Session, say: Callable[[str], None]) -> Session:
    """Return the session with the engine of the run's servers, where it has any. Collective over the run.

    The engine's threads run until its `close`. say: for people, on ranks that speak to servers. Raises OSError where
    the ledger cannot be written.
    """
    if not plan.serves:
        return session
    groups, step, ledger = session.groups, session.progress.step, None
    if asks(groups):
        ledger = Ledger(
            plan.run_folder,
            groups.sampler_rank,
            vocab_size=plan.architecture.vocab_size,
            lag=plan.config.rollout.steps_ahead,
            mixed=plan.config.rollout.in_flight_updates,
        )
        ledger.begin(step, num_samplers=groups.num_samplers, is_new_course=is_new_course(plan.resume))

    def forget() -> None:
        """Remove answers that a checkpoint has learnt from; a start may go back behind one that is being written."""
        if ledger is not None and groups.is_main and (newest := latest_checkpoint(plan.run_folder)) is not None:
            ledger.forget(int(newest.name.removeprefix("step_")))

    chunks, folder = session.trainable.chunks, weights_folder(plan.config)
    model = ServedModel(plan.config, plan.layout, plan.architecture, plan.family, chunks, folder)
    engine = served_engine(
        model,
        groups,
        plan.prompts,
        session.scorer,
        run_id=session.progress.wandb_run_id,
        first_step=step,
        ledger=ledger,
        forget=forget,
        say=say,
    )
    return replace(session, engine=engine)


def is_new_course(resume: Resume) -> bool:
    """Whether a start makes other weights than the one before it would have made behind the same checkpoint."""
    return resume.goes_back or any(not change.key.startswith(NOT_OF_WEIGHTS) for change in resume.changed)


def served_engine(
    model: ServedModel,
    groups: Groups,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    *,
    run_id: str,
    first_step: int = 0,
    ledger: Ledger | None = None,
    forget: Callable[[], None] = lambda: None,
    say: Callable[[str], None],
) -> VllmEngine:
    """Build the engine of a policy's servers, and begin to look for them. Collective over all ranks.

    prompts: the first ones prove the weights. scorer: of training. run_id: names the weights. first_step: how many
    steps have made them. ledger: on the ranks that ask, of a run. forget: called after each update of the servers.
    """
    config, servers = model.config, model.config.rollout.vllm
    # of this start alone: what a start before it gave a server may have been another course of the run
    start = broadcast_object(f"{run_id}-{uuid.uuid4().hex[:8]}", groups)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens

    def prepare(server: Server) -> None:
        require_room(server, longest)
        if servers.sleeps:
            wake(server)

    transport = _transport(model, groups, prompts, scorer, run_id, start, prepare)
    run = Path(config.run.output_dir)
    pool = None
    if asks(groups):
        pool = Pool(
            lambda: addresses_of(config),
            _pool_settings(config, model.architecture.vocab_size),
            bring_up=lambda server: giver.bring_up(server),
            restart=lambda url: ask_restart(run, url),
            say=say,
        )
    giver = WeightGiver(groups, pool, transport, prepare=prepare, seconds=SYNC_SECONDS, sleeps=bool(servers.sleeps))
    settings = VllmSettings(start, config.rollout.steps_ahead, config.rollout.in_flight_updates)
    engine = VllmEngine(groups, pool, ledger, giver, settings, forget=forget, first_step=first_step)
    if pool is not None:
        pool.open()
    return engine


def _transport(
    model: ServedModel,
    groups: Groups,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    run_id: str,
    start: str,
    prepare: Callable[[Server], None],
) -> Transport:
    """Return the way that rollout.vllm.transport names. Collective over all ranks.

    run_id, start: of the run, and of this start of it, which names the versions. prepare: makes a server ready.
    """
    config, servers = model.config, model.config.rollout.vllm
    texts, bound = probe_texts(prompts), config.alarm.sampler_gap or SAMPLER_GAP[config.precision.dtype]
    of_texts = replace(scorer, temperature=1.0)  # what a server says of given tokens knows no temperature

    def probe() -> Probe:
        log_probs = policy_token_log_probs(texts, config, model.layout, groups, model.chunks, of_texts)
        return Probe(tuple(text.prompt.token_ids + text.response_token_ids for text in texts), log_probs, bound)

    on_main(lambda: _remove_older_starts(model.weights, run_id), groups)
    policy = (model.chunks, model.architecture, model.family, groups)
    if servers.transport == "stream":
        return StreamTransport(
            groups,
            WeightSender(*policy),
            lambda step: version_of(start, step),
            probe,
            prepare=prepare,
            seconds=SYNC_SECONDS,
        )
    writer = WeightWriter(model.weights / f"{FOLDER_PREFIX}{start}", *policy, as_changes=servers.transport == "changes")
    return FolderTransport(
        groups,
        writer,
        lambda step: writer.write(version_of(start, step), step, probe()),
        prepare=prepare,
        seconds=SYNC_SECONDS,
        shares_gpus=bool(servers.sleeps),
    )


def _remove_older_starts(weights: Path, run_id: str) -> None:
    """Remove the weights that killed starts of this very run have left. The holder's of the run's folder."""
    pattern = re.compile(re.escape(f"{FOLDER_PREFIX}{run_id}-") + "[0-9a-f]{8}")
    for path in weights.iterdir() if weights.is_dir() else ():
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _pool_settings(config: Config, vocab_size: int) -> PoolSettings:
    servers = config.rollout.vllm
    assert servers.max_requests and servers.answer_seconds and servers.wait_seconds, "config_rules.py fills them in"
    return PoolSettings(vocab_size, servers.max_requests, servers.answer_seconds, servers.wait_seconds)


def addresses_of(config: Config) -> list[str]:
    """Return the addresses of the servers: those of the config, or those that have announced themselves."""
    urls = config.rollout.vllm.urls
    if urls is not None:
        return [require_url(url) for url in urls]
    return [announcement.url for announcement in read_announcements(Path(config.run.output_dir)).values()]


def probe_texts(prompts: Sequence[Prompt]) -> list[Rollout]:
    """Return the texts that a server's weights are proved by: the first prompts, each from its second token on a
    response to its first. Of a prompt with one token alone that token is taken twice."""
    texts = []
    for slot, prompt in enumerate(prompts[:PROBE_PROMPTS]):
        tokens = prompt.token_ids if len(prompt.token_ids) > 1 else prompt.token_ids * 2
        rest = tokens[1:PROBE_TOKENS]
        texts.append(Rollout(replace(prompt, token_ids=tokens[:1]), slot, 0, rest, (0.0,) * len(rest), "length"))
    return texts
