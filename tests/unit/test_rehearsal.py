"""What a rehearsal decides without rehearsing: which ranks, which micro-batches, what fits, what is tried, how it is
shown. The rehearsal itself: tests/distributed/test_rehearsal.py."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest

from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_architecture
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.parallel.layout import plan_layout
from megatron_powerflow.rehearsal.batches import (
    num_micro_batches,
    rehearsed_micro_batches,
    rollouts_per_micro_batch,
    scored_micro_batches,
)
from megatron_powerflow.rehearsal.devices import DEVICES, GIB, device_of
from megatron_powerflow.rehearsal.job import Job, holds_config_alone, job_of_config, rank_kinds
from megatron_powerflow.rehearsal.live_bytes import PhaseBytes, Traffic
from megatron_powerflow.rehearsal.memory import OVERHEAD_BYTES, RankMemory
from megatron_powerflow.rehearsal.rehearsal import Host, Rehearsal
from megatron_powerflow.rehearsal.save_interval import save_interval
from megatron_powerflow.rehearsal.search import neighbours, peak_at_depth, search, search_more_gpus, shallow
from megatron_powerflow.rehearsal.step_time import step_time
from megatron_powerflow.rehearsal.tables import print_rehearsal, rehearsal_json
from tests.published_configs import PUBLISHED

NAME = "meta-llama/Llama-3.1-70B"


def config_folder(tmp_path, name: str = NAME):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    return tmp_path


def job_of(tmp_path, world_size: int, *overrides: str, name: str = NAME) -> Job:
    folder = config_folder(tmp_path, name)
    config = load_config("megatron_powerflow/recipes/llama31_70b.yaml", [f"model.hf_path={folder}", *overrides])
    architecture, _ = read_architecture(folder, FAMILIES)
    return Job(config, architecture, plan_layout(config, architecture, world_size))


def rank_memory(peak: int, *, per_layer: int = 0, layers: int = 0) -> RankMemory:
    traffic = {"tp": Traffic(10, GIB)}
    names = ("weights", "reference", "gradients, optimizer", "KV cache", "prefill", "decoding", "micro-batches")
    held = peak // 2
    phases = [PhaseBytes(name, held, held, held, traffic) for name in names]
    phases += [PhaseBytes("reference scores", held, held, held, traffic)]
    phases += [PhaseBytes("update", held, held, peak + per_layer * layers, traffic)]
    phases += [PhaseBytes("optimizer step", held, held, held, {})]
    return RankMemory("stage 0 (first)", 16, tuple(phases), gradients=0, log_prob_kernel=0)


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (64, (), [("stage 0 (first)", 0, 16), ("stage 1 (between)", 16, 32), ("stage 3 (last)", 48, 16)]),
        (16, ("parallel.pp=2",), [("stage 0 (first)", 0, 8), ("stage 1 (last)", 8, 8)]),
        (8, ("parallel.pp=1",), [("every rank", 0, 8)]),
    ],
)
def test_each_kind_of_rank_is_rehearsed_once_and_all_ranks_are_counted(tmp_path, world_size, overrides, expected):
    kinds = rank_kinds(job_of(tmp_path, world_size, *overrides))
    assert [(kind.name, kind.rank, kind.count) for kind in kinds] == expected
    assert sum(kind.count for kind in kinds) == world_size


def test_stages_with_other_layers_are_kinds_of_their_own(tmp_path):
    """DeepSeek-V3 has three dense layers before those with experts: here the second stage has them all dense."""
    overrides = ("parallel.tp=1", "parallel.pp=61", "parallel.sequence_parallel=false", "precision.dtype=bf16")
    job = job_of(
        tmp_path, 61, *overrides, "rollout.prompts_per_step=61", name="deepseek-ai/DeepSeek-V3, its weights in bf16"
    )
    assert [kind.name for kind in rank_kinds(job)] == [
        "stage 0 (first)",
        "stage 1 (between)",
        "stage 3 (between)",
        "stage 60 (last)",
    ]
    assert sum(kind.count for kind in rank_kinds(job)) == 61


def test_micro_batches_of_the_longest_rollouts(tmp_path):
    no_budget = "parallel.max_tokens_per_micro_batch=null"
    padded = job_of(tmp_path, 64, "parallel.micro_batch_size=2", no_budget)
    assert (rollouts_per_micro_batch(padded), num_micro_batches(padded), rehearsed_micro_batches(padded)) == (2, 128, 5)
    packed = job_of(tmp_path, 64, "parallel.max_tokens_per_micro_batch=16384")
    assert (rollouts_per_micro_batch(packed), num_micro_batches(packed)) == (4, 64)
    few = job_of(tmp_path, 64, no_budget, "rollout.prompts_per_step=2", "rollout.responses_per_prompt=32")
    assert (rollouts_per_micro_batch(few), num_micro_batches(few)) == (2, 16)  # 4 would leave 4 stages idle
    interleaved = job_of(tmp_path, 64, "parallel.vpp=2")
    assert (rehearsed_micro_batches(interleaved), scored_micro_batches(interleaved)) == (8, 4)
    assert scored_micro_batches(padded) == 2


def test_a_device_by_name_or_by_its_memory():
    assert device_of("h200-141") is DEVICES["h200-141"]
    assert device_of("40").memory == 40 * GIB
    for text in ("a100", "0", "-3", "nan", "inf", "1e9", ""):
        with pytest.raises(UserError, match="name one of h100-80, h200-141, b200-180, or the memory"):
            device_of(text)


def test_a_folder_with_config_json_alone_is_enough_for_sizes(tmp_path):
    folder = config_folder(tmp_path)
    assert holds_config_alone(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert not holds_config_alone(folder)
    assert not holds_config_alone(folder / "nowhere")


def test_all_that_is_wrong_with_the_sizes_is_said_at_once(tmp_path):
    folder = config_folder(tmp_path)
    config = load_config(
        "megatron_powerflow/recipes/llama31_70b.yaml",
        [f"model.hf_path={folder}", "parallel.tp=3", "parallel.pp=97", "rollout.max_response_tokens=200000"],
    )
    with pytest.raises(UserError) as caught:
        job_of_config(config, folder, 291)
    text = str(caught.value)
    assert "parallel.tp=3 does not divide" in text
    assert "parallel.pp=97 needs 97 layers or more" in text
    assert "max_position_embeddings=131072" in text


def test_neighbours_begin_with_the_fewest_changes_and_are_all_possible(tmp_path):
    job = job_of(tmp_path, 64)
    found = list(neighbours(job))
    counts = [len(changes) for changes, _ in found]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert all(other.layout.world_size == 64 for _, other in found)
    assert (("model.recompute", "full"),) in [changes for changes, _ in found]
    for changes, other in found:
        for key, value in changes:
            section, name = key.split(".")
            assert getattr(getattr(other.config, section), name) == value


def test_the_full_depth_follows_from_two_shallow_models(tmp_path):
    job = job_of(tmp_path, 64)
    tried = []

    def rehearse(shallow_job: Job) -> RankMemory:
        layers = shallow_job.architecture.num_layers // shallow_job.layout.pp
        tried.append(layers)
        return rank_memory(10 * GIB, per_layer=GIB, layers=layers)

    assert peak_at_depth(job, rehearse) == 30 * GIB
    assert tried == [2, 4]
    assert shallow(job, 2).architecture.num_layers == 8


def test_the_search_returns_only_what_fits(tmp_path):
    job = job_of(tmp_path, 64)

    def rehearse(other: Job) -> RankMemory:
        return rank_memory((70 if other.config.model.recompute == "full" else 80) * GIB)

    found = search(job, DEVICES["h100-80"], rehearse, seconds=60.0).found
    assert found
    assert all(dict(one.changes)["model.recompute"] == "full" for one in found)
    assert all(one.needed <= DEVICES["h100-80"].memory for one in found)
    nothing = search(job, DEVICES["h100-80"], lambda other: rank_memory(90 * GIB), seconds=60.0)
    assert (nothing.found, nothing.is_whole) == ((), True)
    assert nothing.tried > 10
    assert search(job, DEVICES["h100-80"], rehearse, seconds=-1.0).is_whole is False


def test_more_gpus_are_tried_where_as_many_do_not_fit(tmp_path):
    """What it returns is the smallest multiple of them that does, unchanged before changed."""
    job, device = job_of(tmp_path, 32), DEVICES["h100-80"]

    def needs(num_bytes):
        return lambda other: rank_memory(num_bytes(other))

    by_count = needs(lambda other: 90 * GIB * 64 // other.layout.world_size)
    (found,) = search_more_gpus(job, device, by_count, seconds=60.0)
    assert found.changes == (("--world-size", 128),)
    assert found.job.layout.world_size == 128
    recomputed = needs(lambda other: (70 if other.config.model.recompute == "full" else 90) * GIB)
    (found,) = search_more_gpus(job, device, recomputed, seconds=60.0)
    assert found.changes == (("--world-size", 64), ("model.recompute", "full"))
    assert search_more_gpus(job, device, needs(lambda other: 90 * GIB), seconds=60.0) == ()
    assert search_more_gpus(job, device, recomputed, seconds=-1.0) == ()


def test_the_save_interval_is_youngs_and_dalys(tmp_path):
    job = job_of(tmp_path, 64)
    saves = save_interval(job, 10**12, 100.0, delay=50.0)
    assert saves.seconds == pytest.approx(math.sqrt(2 * 50 * 54 * 24 * 2048 / 419 * 3600 / 8))
    assert saves.steps == round(saves.seconds / 100)
    assert save_interval(job, 10**12, 1e9, delay=50.0).steps == 1
    assert save_interval(job, 10**12, 100.0, delay=50.0, node_hours=100.0).seconds == pytest.approx(
        math.sqrt(2 * 50 * 100 * 3600 / 8)
    )


def test_a_save_delays_training_by_its_copy_alone_where_it_is_asynchronous(tmp_path):
    """14 bytes of each of 70.6 billion parameters: 64 GPUs copy them at 5 GB/s each, 8 nodes write 1 GB/s each."""
    size = 14 * 70_600_000_000
    saves = save_interval(job_of(tmp_path, 64), size, 100.0)
    assert (saves.delay, saves.written) == (pytest.approx(size / 64 / 5e9), pytest.approx(size / 8 / 1e9))
    waiting = save_interval(job_of(tmp_path, 64, "checkpoint.asynchronous=false"), size, 100.0)
    assert waiting.delay == waiting.written == saves.written
    assert waiting.seconds > saves.seconds
    often = save_interval(job_of(tmp_path, 64), size, 100.0, node_hours=1.0)
    assert often.seconds == saves.written  # one ends before the next begins


def test_the_modelled_step_follows_the_layout(tmp_path):
    """Not its seconds, which nothing here can judge: more GPUs and a faster link are quicker, recomputing is slower."""
    h100, b200 = DEVICES["h100-80"], DEVICES["b200-180"]
    ranks = [rank_memory(40 * GIB)]
    here = step_time(job_of(tmp_path, 64), ranks, h100)
    assert here.total == pytest.approx(here.rollout + here.reference + here.update + here.optimizer)
    assert step_time(job_of(tmp_path, 32), ranks, h100).update > here.update
    assert step_time(job_of(tmp_path, 64, "model.recompute=full"), ranks, h100).update > here.update
    assert step_time(job_of(tmp_path, 64), ranks, b200).update < here.update
    assert here.idle_share == pytest.approx(3 / 259)


def test_tables_and_json_say_whether_it_fits_and_by_how_much(tmp_path):
    job = job_of(tmp_path, 64)
    for peak, word in ((40, "fits      h100-80"), (90, "DOES NOT FIT h100-80")):
        ranks = (rank_memory(peak * GIB),)
        time = step_time(job, ranks, DEVICES["h100-80"])
        host = Host(processes=8, loading=1, saved_copy=1, swapped=0, checkpoint=1)
        saves = save_interval(job, 10**12, time.total)
        rehearsal = Rehearsal(job, DEVICES["h100-80"], ranks, time, host, saves, None, ())
        out = io.StringIO()
        print_rehearsal(make_console(out, width=120), rehearsal)
        assert word in out.getvalue()
        assert f"{peak + OVERHEAD_BYTES / GIB:.2f}" in out.getvalue()
        answer = json.loads(json.dumps(rehearsal_json(rehearsal)))
        assert answer["fits"] == (peak == 40)
        assert answer["ranks"][0]["needed"] == peak * GIB + OVERHEAD_BYTES
        assert answer["ranks"][0]["phases"]["update"]["collectives"]["tp"] == {"count": 10, "num_bytes": GIB}


@pytest.mark.parametrize(
    ("share", "word"), [(0.5, "fits      h100-80"), (0.8, "takes rollout.vllm.memory=0.8 of the GPU")]
)
def test_servers_decode_instead_and_those_on_the_same_gpus_need_room_beside_the_trainer(tmp_path, share, word):
    on_gpus = ("rollout.vllm.sleeps=true", f"rollout.vllm.memory={share}")
    job = job_of(tmp_path, 64, "rollout.engine=vllm", "rollout.vllm.start=8", *on_gpus)
    decoding = ("KV cache", "prefill", "decoding")
    whole = rank_memory(40 * GIB)
    rank = replace(whole, phases=tuple(phase for phase in whole.phases if phase.name not in decoding))
    assert set(whole.parts) - set(rank.parts) == set(decoding)
    device = DEVICES["h100-80"]
    time = step_time(job, [rank], device)
    assert (time.rollout, step_time(job_of(tmp_path, 64), [whole], device).rollout > 0) == (0.0, True)
    saves = save_interval(job, 10**12, time.total)
    host = Host(processes=8, loading=1, saved_copy=1, swapped=0, checkpoint=1)
    rehearsal = Rehearsal(job, device, (rank,), time, host, saves, None, ())
    assert rehearsal.with_servers == 20 * GIB + OVERHEAD_BYTES + share * device.memory
    out = io.StringIO()
    print_rehearsal(make_console(out, width=200), rehearsal)
    assert word in out.getvalue()
    assert "without sampling and updates of servers" in out.getvalue()
    assert rehearsal.fits == (share == 0.5)
