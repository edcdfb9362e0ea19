"""Data sets by hub name, from a real HTTP server that speaks as much of the hub's language as a download needs."""

from __future__ import annotations

import http.server
import threading

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.hub import HUB_FILES, fetch, is_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BODY = b'{"problem": "p", "answer": "1", "subject": "s", "level": 1, "unique_id": "u"}\n'


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        if self.path != f"/datasets/HuggingFaceH4/MATH-500/resolve/{self.revision()}/test.jsonl":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(BODY)

    def revision(self) -> str:
        return COMMIT if COMMIT in self.path else "main"

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_benchmark_is_fetched_by_name_and_any_file_by_path(hub, tmp_path):
    (by_name,) = fetch("HuggingFaceH4/MATH-500", endpoint=hub, cache=tmp_path)
    (by_path,) = fetch("hf://HuggingFaceH4/MATH-500/test.jsonl", endpoint=hub, cache=tmp_path)
    assert by_name == by_path
    assert by_name.name == "test.jsonl"
    assert by_name.read_bytes() == BODY


def test_what_the_hub_does_not_have_is_refused_with_what_to_do(hub, tmp_path):
    with pytest.raises(UserError, match=r"cannot be fetched from the hub.*download test.parquet of huggingface.co"):
        fetch("hf://some/thing/test.parquet", endpoint=hub, cache=tmp_path)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_an_error_with_what_to_do(tmp_path):
    """Slow: huggingface_hub tries for twenty seconds."""
    with pytest.raises(UserError, match=r"math-ai/aime25: cannot be fetched.*download test.jsonl"):
        fetch("math-ai/aime25", endpoint="http://127.0.0.1:9", cache=tmp_path)


@pytest.mark.parametrize("name", ["hf://", "hf://a/b", "hf://a/b/../../etc/passwd", "hf://a//b"])
def test_malformed_names_are_refused_before_anything_is_asked(name, tmp_path):
    assert is_hub_name(name)
    with pytest.raises(UserError):
        fetch(name, endpoint="http://127.0.0.1:9", cache=tmp_path)


def test_names_without_a_known_file_list_are_files():
    assert not is_hub_name("some/folder")
    assert all(is_hub_name(name) for name in HUB_FILES)
