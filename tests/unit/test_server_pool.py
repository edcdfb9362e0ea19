"""Who answers which prompt when servers are lost, hang, answer garbage or come back: each prompt is answered once.

The servers here are threads that speak HTTP and answer as vLLM does, or as it does when it fails; real ones are in
tests/vllm.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_powerflow.records import Prompt, SamplingParams
from megatron_powerflow.serving.pool import Ask, NoServer, Pool, PoolSettings, UnwantedVersion

SAMPLING = SamplingParams(2, 2, 1.0, frozenset({99}), seed=0, step=0)


class Standin:
    """A server with a mood. moods: good, garbage, refuses, hangs, slow. version: of its weights."""

    def __init__(self) -> None:
        self.mood, self.version, self.num_asked = "good", "default", 0
        self.is_frozen = threading.Event()
        standin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if standin.mood == "hangs":
                    standin.is_frozen.wait(30)
                    return
                self.reply(200, {"weight_version": standin.version} if self.path == "/weight_info" else {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                standin.num_asked += 1
                if standin.mood == "hangs":
                    standin.is_frozen.wait(30)
                    return
                if standin.mood == "slow":
                    time.sleep(0.3)
                if standin.mood == "refuses":
                    self.reply(500, {"error": "EngineCore encountered an issue"})
                    return
                tokens = [body["token_ids"][0], 99]
                if standin.mood == "garbage":
                    tokens = [7_000_000, 99]
                content = [{"token_id": token, "logprob": -1.0} for token in tokens]
                span = {"version": standin.version, "start": 0, "end": 2}
                choice = {"token_ids": tokens, "finish_reason": "stop", "logprobs": {"content": content}}
                choices = [choice | {"index": index, "weight_versions": [span]} for index in range(2)]
                self.reply(200, {"choices": choices})

            def reply(self, status, value):
                content = json.dumps(value).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever asked was told to go on
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.is_frozen.set()
        if self.thread.is_alive():
            self.http.shutdown()
            self.http.server_close()


@pytest.fixture
def servers():
    servers = [Standin(), Standin()]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def job(servers, monkeypatch):
    """A pool over the two, with what it answered, said, and asked to be started anew."""
    monkeypatch.setattr("megatron_powerflow.serving.pool.HEALTH_SECONDS", 0.05)
    monkeypatch.setattr("megatron_powerflow.serving.pool.HEALTH_TRIES", 1)
    job = Job(servers)
    yield job
    job.pool.close()


class Job:
    def __init__(self, servers) -> None:
        self.servers, self.said, self.restarted, self.answered = servers, [], [], Counter()
        self.by = Counter()
        self.lock = threading.Lock()
        settings = PoolSettings(vocab_size=1000, max_requests=2, answer_seconds=5.0, wait_seconds=5.0)
        self.pool = Pool(
            lambda: [server.url for server in servers],
            settings,
            bring_up=self.bring_up,
            restart=self.restarted.append,
            say=self.said.append,
        )
        self.pool.open()

    def bring_up(self, server) -> None:
        for standin in self.servers:
            if standin.url == server.url:
                server.weight_version()
                standin.version = "run/0"

    def start(self) -> None:
        for standin in self.servers:
            standin.version = "run/0"
        self.pool.set_up([server.url for server in self.servers])
        self.pool.release()

    def ask(self, count: int) -> None:
        self.pool.ask([Ask(slot, Prompt(f"q{slot}", slot, (slot,)), SAMPLING, self.took) for slot in range(count)])

    def took(self, answer, url) -> None:
        if any(span.version != "run/0" for spans in answer.spans for span in spans):
            raise UnwantedVersion(f"{url}: by other weights")
        with self.lock:
            self.answered[answer.slot] += 1
            self.by[url] += 1

    def is_left_out(self, server: Standin) -> bool:
        return bool(self.pool.troubles().get(server.url))

    def wait(self, count: int, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while len(self.answered) < count:
            assert time.monotonic() < deadline, (self.answered, self.said)
            self.pool.require_sound()
            self.pool.require_some()
            time.sleep(0.01)
        assert set(self.answered.values()) == {1}, "a prompt was answered twice"


def until(what, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_both_servers_answer_and_nobody_is_asked_while_weights_change(job, servers):
    for server in servers:
        server.mood = "slow"  # else one could answer all of them
    job.ask(20)
    time.sleep(0.3)
    assert not job.answered, "held until the first weights are there"
    job.start()
    job.wait(20)
    assert len(job.by) == 2


@pytest.mark.parametrize("mood", ["garbage", "refuses"])
def test_a_server_that_answers_otherwise_is_left_out_until_it_is_started_anew(job, servers, mood):
    servers[0].mood = mood
    job.start()
    job.ask(12)
    job.wait(12)
    assert job.by == {servers[1].url: 12}
    assert job.restarted == [servers[0].url]
    assert any(servers[0].url in text for text in job.said)
    servers[0].mood = "good"
    time.sleep(0.4)
    assert job.is_left_out(servers[0]), "it is the same start of it"
    servers[0].version = "default"  # a new start
    servers[1].mood = "slow"
    until(lambda: not job.is_left_out(servers[0]))
    job.pool.ask([Ask(slot, Prompt(f"q{slot}", slot, (slot,)), SAMPLING, job.took) for slot in range(12, 30)])
    job.wait(30)
    assert job.by[servers[0].url] > 0


def test_the_prompts_of_a_server_that_is_killed_go_to_the_other(job, servers):
    for server in servers:
        server.mood = "slow"
    job.start()
    job.ask(8)
    time.sleep(0.1)
    servers[0].stop()
    job.wait(8)
    until(lambda: job.is_left_out(servers[0]))
    assert not job.restarted, "who is gone is not asked to go"


def test_the_prompts_of_a_server_that_hangs_go_to_the_other(job, servers, monkeypatch):
    monkeypatch.setattr("megatron_powerflow.serving.server.Server.is_healthy", quick_health)
    job.start()
    servers[0].mood = "hangs"
    job.ask(8)
    job.wait(8)
    assert "does not answer /health" in job.pool.troubles()[servers[0].url]
    servers[0].mood = "good"
    until(lambda: not job.is_left_out(servers[0]))


def quick_health(server, *, seconds: float = 0.2) -> bool:
    from megatron_powerflow.serving.server import ServerError

    try:
        server.get("/health", seconds=0.2)
    except ServerError:
        return False
    return True


def test_without_any_server_it_waits_and_then_says_what_is_wrong_with_each(job, servers):
    job.start()
    for server in servers:
        server.mood = "refuses"
    job.ask(2)
    with pytest.raises(NoServer) as error:
        job.wait(2)
    assert all(server.url in str(error.value) for server in servers)
    assert "EngineCore encountered an issue" in str(error.value)
    servers[1].mood, servers[1].version = "good", "default"  # started anew: the same prompts go on
    until(lambda: not job.is_left_out(servers[1]))
    job.wait(2)


@pytest.mark.parametrize(
    ("moods", "limit", "why"),
    [
        ((), "30 min", "none was ever there; `powerflow serve` starts them"),
        (("refuses", "refuses"), "5 s", "EngineCore encountered an issue"),
    ],
    ids=["none was ever there", "both refuse"],
)
def test_it_says_that_it_waits_and_why(servers, monkeypatch, moods, limit, why):
    monkeypatch.setattr("megatron_powerflow.serving.pool.HEALTH_SECONDS", 0.02)
    monkeypatch.setattr("megatron_powerflow.serving.pool.TELL_SECONDS", 0.2)
    job = Job(servers[: len(moods)])
    time.sleep(0.4)
    assert not job.said, "nothing is to be asked yet"
    job.start()
    for server, mood in zip(servers, moods, strict=False):
        server.mood = mood
    job.ask(2)

    def words() -> list[str]:
        return [text for text in job.said if text.startswith("no vLLM server could be asked for")]

    until(lambda: len(words()) >= 2)
    assert all(f"the run waits for one, {limit} at most: " in text and why in text for text in words())
    job.pool.close()


def test_an_answer_by_other_weights_is_dropped_and_the_server_given_the_right_ones(job, servers):
    job.start()
    for server in servers:
        server.version = "somebody/7"
    job.ask(6)
    job.wait(6)
    assert not job.restarted


def test_what_a_callback_meets_ends_the_wait(job):
    def full(answer, url):
        raise OSError(28, "No space left on device")

    job.start()
    job.pool.ask([Ask(0, Prompt("q", 0, (1,)), SAMPLING, full)])
    with pytest.raises(OSError, match="No space left"):
        job.wait(1)
