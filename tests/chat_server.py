"""A chat endpoint for tests: on this machine, and as slow, broken or hostile as a test says."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hybrid.rewards import make_reward

KEY = "sk-very-secret-123"


class Server(ThreadingHTTPServer):
    """A chat endpoint that answers each request by `answer(question)`: a reply's text, or (status, headers, body)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.keys, self.paths = [], [], []
        self.answer = lambda question: '{"score": 7}'

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that hung up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(request)
        server.keys.append(self.headers.get("Authorization"))
        server.paths.append(self.path)
        answer = server.answer(request["messages"][-1]["content"])
        if isinstance(answer, str):
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            answer = 200, {}, json.dumps({"choices": [{"message": {"content": answer}}], "usage": usage})
        status, headers, body = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


def in_turn(*answers):
    """An answer function that gives these, one a request, and the last one for ever."""
    rest = list(answers)
    return lambda question: rest.pop(0) if len(rest) > 1 else rest[0]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def judge(server):
    """judge(...): a reward that asks `server` and hardly waits between tries."""

    def make(**settings):
        return make_reward({"type": "judge", "base_url": server.url, "model": "m", "backoff": 0.001, **settings})

    return make
