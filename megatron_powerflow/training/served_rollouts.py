"""How does a run come to its vLLM servers? The engine over them, built from a plan: pool, ledger, weights, probe.

Left out: the engine itself (`serving/engine.py`), who starts servers (`serving/supervisor.py`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_powerflow.metrics.alarm_words import SAMPLER_GAP
from megatron_powerflow.parallel.together import broadcast_object
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.serving.announcements import ask_restart, read_announcements
from megatron_powerflow.serving.checks import weights_folder
from megatron_powerflow.serving.engine import VllmEngine, VllmSettings, asks
from megatron_powerflow.serving.ledger import Ledger
from megatron_powerflow.serving.manifest import Manifest, Probe
from megatron_powerflow.serving.pool import Pool, PoolSettings
from megatron_powerflow.serving.server import require_url
from megatron_powerflow.serving.weight_writer import WeightWriter
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.score_rollouts import policy_token_log_probs
from megatron_powerflow.training.session import Session

PROBE_PROMPTS, PROBE_TOKENS = 8, 96
SYNC_SECONDS = 1200.0  # that a server may take to load a version of the weights


def with_servers(plan: Plan, session: Session, say: Callable[[str], None]) -> Session:
    """Return the session with the engine of the run's servers, where it has any. Collective over the run.

    The engine's threads run until its `close`. say: for people, on ranks that speak to servers. Raises OSError where
    the ledger cannot be written.
    """
    if not plan.serves:
        return session
    groups, chunks, progress = session.groups, session.trainable.chunks, session.progress
    scorer = replace(session.scorer, temperature=1.0)  # of the probe: what a server says of given tokens has none
    config, servers = plan.config, plan.config.rollout.vllm
    writer = WeightWriter(
        weights_folder(config),
        chunks,
        plan.architecture,
        plan.family,
        groups,
        as_changes=servers.transport == "changes",
    )
    texts = probe_texts(plan.prompts)
    bound = config.alarm.sampler_gap or SAMPLER_GAP[config.precision.dtype]
    # of this start alone: what a start before it gave a server may have been another course of the run
    run_id = broadcast_object(f"{progress.wandb_run_id}-{uuid.uuid4().hex[:8]}", groups)

    def publish(step: int) -> Manifest:
        log_probs = policy_token_log_probs(texts, plan, groups, chunks, scorer)
        token_ids = tuple(text.prompt.token_ids + text.response_token_ids for text in texts)
        return writer.write(f"{run_id}/{step}", step, Probe(token_ids, log_probs, bound))

    settings = VllmSettings(
        run_id, config.rollout.steps_ahead, config.rollout.in_flight_updates, sync_seconds=SYNC_SECONDS
    )
    pool = ledger = None
    if asks(groups):
        ledger = Ledger(plan.run_folder, groups.sampler_rank, vocab_size=plan.architecture.vocab_size)
        ledger.begin(progress.step)
        pool = Pool(
            lambda: addresses_of(plan),
            PoolSettings(
                plan.architecture.vocab_size,
                servers.max_requests or 1,
                servers.answer_seconds or SYNC_SECONDS,
                servers.wait_seconds or SYNC_SECONDS,
            ),
            bring_up=lambda server: engine.bring_up(server),
            restart=lambda url: ask_restart(plan.run_folder, url) if groups.is_main else False,
            say=say,
        )
    engine = VllmEngine(
        groups, pool, ledger, settings, publish=publish, forget=writer.forget_older, first_step=progress.step
    )
    if pool is not None:
        pool.open()
    return replace(session, engine=engine)


def addresses_of(plan: Plan) -> list[str]:
    """Return the addresses of the run's servers: those of its config, or those that have announced themselves."""
    urls = plan.config.rollout.vllm.urls
    if urls is not None:
        return [require_url(url) for url in urls]
    return [announcement.url for announcement in read_announcements(plan.run_folder).values()]


def probe_texts(prompts: Sequence[Prompt]) -> list[Rollout]:
    """Return the texts that a server's weights are proved by: the first prompts, each from its second token on a
    response to its first."""
    long_enough = [prompt for prompt in prompts if len(prompt.token_ids) > 1][:PROBE_PROMPTS]
    return [
        Rollout(
            replace(prompt, token_ids=prompt.token_ids[:1]),
            slot,
            0,
            (rest := prompt.token_ids[1:PROBE_TOKENS]),
            (0.0,) * len(rest),
            "length",
        )
        for slot, prompt in enumerate(long_enough)
    ]
