"""What becomes of a run whose servers are killed, hang, answer garbage or are another model's: every prompt is answered
once, and the run ends as it would have."""

from __future__ import annotations

import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from megatron_powerflow.serving.announcements import Announcement, read_announcements, write_announcement
from tests.free_ports import free_port

STEPS = 6


def whole_server(pid: int) -> list[psutil.Process]:
    """A server's process and those that it started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def wait_for_step(job, step: int, seconds: float = 300) -> None:
    """Wait until the run is in the middle of a step: some prompts of it are answered."""
    began = time.monotonic()
    pattern = f"step_{step:06d}.sampler_*.jsonl"
    while not any(path.stat().st_size for path in (job.run / "in_hand").glob(pattern)):
        assert time.monotonic() - began < seconds, job.trained()
        time.sleep(0.05)


# Long responses, so that there is a middle of a step.
LONG = {"rollout.max_response_tokens": 120, "rollout.prompts_per_step": 6, "run.num_steps": STEPS}
LONG |= {"rollout.vllm.start": 2, "rollout.vllm.max_requests": 1, "checkpoint.interval": 2}


@pytest.fixture
def two(job):
    job.settings |= LONG
    job.serve(0, wait=False)
    job.serve(1, wait=False)
    job.pids = [job.wait_for(0), job.wait_for(1)]
    return job


def ended_well(job, process) -> str:
    """Wait for the end of a run that is to end well; return what its ledger says."""
    assert process.wait(900) == 0, job.trained()
    assert len(job.metrics()) == STEPS
    assert all(line["sync_gap_mean"] < 1e-3 for line in job.metrics()), "a proof, also where servers came in mid-step"
    ledger = job.ledger()
    assert f"{6 * STEPS} prompts of {STEPS} steps, each answered once" in ledger
    return ledger


@pytest.mark.parametrize("transport", ["folder", "stream"])
def test_one_of_two_is_killed_in_mid_step_and_comes_back(two, transport):
    process = two.begin_training(**{"rollout.vllm.transport": transport})
    wait_for_step(two, 1)
    for part in whole_server(two.pids[0]):
        part.kill()
    ledger = ended_well(two, process)
    assert two.url(0) in two.trained()
    assert two.url(1) in ledger


@pytest.mark.parametrize("transport", ["folder", "stream"])
def test_both_are_killed_and_the_run_waits_until_they_are_back(two, transport):
    process = two.begin_training(**{"rollout.vllm.transport": transport})
    wait_for_step(two, 2)
    for pid in two.pids:
        for part in whole_server(pid):
            part.kill()
    ended_well(two, process)
    text = two.trained()
    assert text.count("is left out") >= 2
    assert "answers" in text.split("is left out")[-1]


def test_one_that_hangs_is_passed_over_and_used_again(two):
    process = two.begin_training()
    wait_for_step(two, 1)
    parts = whole_server(two.pids[0])
    for part in parts:
        part.send_signal(signal.SIGSTOP)
    try:
        wait_for_step(two, 3)
        assert "does not answer /health" in two.trained()
    finally:
        for part in parts:
            part.send_signal(signal.SIGCONT)
    ended_well(two, process)


def test_without_a_server_a_run_is_saved_and_the_same_command_goes_on(two):
    changes = {"rollout.vllm.wait_seconds": 5.0}
    process = two.begin_training(**changes)
    wait_for_step(two, 3)
    for number in (0, 1):
        two.end(number)
    assert process.wait(300) == 75, two.trained()
    text = " ".join(two.trained().split())
    assert "no vLLM server could be asked for 5 s" in text
    assert "the run is saved after step" in text
    two.serve(0)
    assert two.train(**changes).returncode == 0
    assert len(two.metrics()) == STEPS
    assert "each answered once" in two.ledger()


def test_a_run_that_is_killed_in_mid_step_asks_only_for_what_it_has_not(two):
    process = two.begin_training()
    wait_for_step(two, 3)
    process.kill()
    process.wait()
    found = two.train()
    assert found.returncode == 0, found.stdout + found.stderr
    assert "each answered once" in two.ledger()
    lines = (two.run / "ledger" / "sampler_00000.jsonl").read_text()
    assert '"in_hand": true' in lines


def test_one_of_another_model_is_left_out_and_the_other_answers_all(job, tiny_model):
    from tests.vllm.conftest import SIZES

    other = tiny_model(
        "llama", scale=0.06, seed=9, **{**SIZES, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}
    )
    job.settings |= LONG
    job.serve(0, wait=False)
    job.serve(1, model=other)
    job.wait_for(0)
    process = job.begin_training()
    ledger = ended_well(job, process)
    assert f"{6 * STEPS} by {job.url(0)}" in ledger
    assert f"vLLM server {job.url(1)} is left out" in " ".join(job.trained().split())


class Babbler(BaseHTTPRequestHandler):
    """Something else at a server's address: healthy, of the right version, and it babbles."""

    version = "default"

    def do_GET(self):
        self.answer(b'{"weight_version": "%s"}' % self.version.encode() if self.path == "/weight_info" else b"{}")

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(b'{"results": "yes", "success": true, "choices": [{"text": "hello"}]}')

    def answer(self, content: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_one_that_answers_garbage_is_left_out_and_the_other_answers_all(job):
    job.settings |= LONG
    job.serve(0)
    babbler = ThreadingHTTPServer(("127.0.0.1", free_port()), Babbler)
    threading.Thread(target=babbler.serve_forever, daemon=True).start()
    name = f"127.0.0.1-{babbler.server_port}"
    write_announcement(job.run, name, Announcement(f"http://127.0.0.1:{babbler.server_port}", "x", os.getpid()))
    assert len(read_announcements(job.run)) == 2
    try:
        ledger = ended_well(job, job.begin_training())
    finally:
        babbler.shutdown()
    assert f"{6 * STEPS} by {job.url(0)}" in ledger
    assert f"vLLM server http://127.0.0.1:{babbler.server_port} is left out" in " ".join(job.trained().split())


def test_one_that_comes_while_the_run_waits_has_its_proof_in_the_first_step(job):
    job.settings |= {"run.num_steps": 2, "rollout.vllm.start": 1}
    process = job.begin_training()
    time.sleep(15)  # the run has begun to wait: no server had the first weights
    job.serve(0)
    assert process.wait(300) == 0, job.trained()
    assert all(line["sync_gap_mean"] < 1e-3 for line in job.metrics()), job.metrics()
