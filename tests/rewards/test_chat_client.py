import asyncio
import json
import logging
import socket
import threading
from datetime import UTC, datetime
from email.utils import format_datetime

import chat_server
import pytest
from chat_server import KEY, Handler, in_turn

from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.rewards.base import RewardError, RewardTimeout
from hybrid.rewards.chat_client import MAX_REPLY, _seconds

server, judge = chat_server.server, chat_server.judge  # fixtures


@pytest.mark.parametrize(
    "body", ["garbage", "{}", "[]", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}', "[" * 100_000]
)
def test_a_body_that_is_no_chat_reply_is_an_error(judge, server, body):
    server.answer = lambda question: (200, {}, body)
    with pytest.raises(RewardError, match=r"answered without choices\[0\].message.content: "):
        judge()("a")


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_or_broken_server_is_asked_again(judge, server, status):
    server.answer = in_turn((status, {}, "busy"), (status, {}, "busy"), '{"score": 10}')
    reward = judge()
    assert reward("a") == 1
    assert reward.counters["requests"] == 3
    assert reward.counters["retries"] == 2


def test_after_its_retries_the_last_failure_is_the_error(judge, server):
    server.answer = lambda question: (500, {}, "out of order")
    with pytest.raises(RewardError, match=r"answered 500: 'out of order' \(tried 3 times\)"):
        judge(retries=2)("a")
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 422])
def test_a_refusal_is_not_asked_again(judge, server, status):
    server.answer = lambda question: (status, {}, "refused")
    with pytest.raises(RewardError, match=f"answered {status}: 'refused'"):
        judge()("a")
    assert len(server.requests) == 1


def test_retry_after_is_waited_for_in_place_of_the_backoff(judge, server):
    server.answer = in_turn((429, {"Retry-After": "0"}, "busy"), '{"score": 10}')
    assert judge(backoff=1000)("a") == 1


def test_a_wait_past_the_deadline_is_a_timeout_at_once(judge, server):
    server.answer = lambda question: (429, {"Retry-After": "3600"}, "busy")
    with pytest.raises(RewardTimeout, match=r"answered 429.*the next try in 3600 s would be past deadline \(180 s\)"):
        judge()("a")
    assert len(server.requests) == 1


def test_retry_after_may_be_seconds_or_a_date():
    assert _seconds("1.5") == 1.5
    assert _seconds("-3") == 0
    assert _seconds(format_datetime(datetime(2001, 1, 1, tzinfo=UTC), usegmt=True)) == 0
    assert _seconds("Fri, 31 Dec 2500 23:59:59 GMT") > 1e9
    assert _seconds("soon") is None
    assert _seconds(None) is None


def test_a_slow_server_is_given_up_and_asked_again(judge, server):
    release = threading.Event()

    def answer(question):
        if len(server.requests) == 1:
            release.wait()
        return '{"score": 10}'

    server.answer = answer
    reward = judge(timeout=0.3)
    assert reward("a") == 1
    assert reward.counters["request_timeouts"] == 1
    release.set()


def test_a_server_that_never_answers_is_a_timeout(judge, server):
    release = threading.Event()
    server.answer = lambda question: release.wait() and ""
    with pytest.raises(RewardTimeout, match=r"within timeout \(0.05 s\) \(tried 2 times\)"):
        judge(timeout=0.05, retries=1)("a")
    with pytest.raises(RewardTimeout, match=r"within deadline \(0.05 s\)"):
        judge(deadline=0.05)("a")
    output = judge(deadline=0.05, on_error="value", error_value=0).score(["a", "b"])
    assert output.parts["judge"].counts["timeouts"] == 2
    release.set()


def test_a_server_that_drips_is_a_timeout(judge, server, monkeypatch):
    release = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not release.wait(0.01):
            handler.wfile.write(b" ")

    monkeypatch.setattr(Handler, "do_POST", drip)
    with pytest.raises(RewardTimeout, match=r"within timeout \(0.2 s\)"):
        judge(timeout=0.2, retries=0)("a")
    release.set()


def test_no_server_at_all_is_an_error_that_says_so(judge, server):
    server.server_close()
    with pytest.raises(RewardError, match=r"no answer from http://127.0.0.1:\d+/v1: ConnectError.*\(tried 2 times\)"):
        judge(retries=1)("a")


def test_a_broken_connection_is_tried_again(judge, server):
    server.answer = in_turn((200, {"Content-Length": "1000"}, "{"), '{"score": 10}')
    assert judge(timeout=5)("a") == 1


def test_the_samples_of_a_batch_are_asked_about_at_once_and_no_more_than_concurrency(judge, server):
    # Nobody gets through the barrier alone: with fewer than 3 requests at once it breaks.
    lock, barrier, running, most = threading.Lock(), threading.Barrier(3), 0, 0

    def answer(question):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait(timeout=30)
        with lock:
            running -= 1
        return '{"score": 10}'

    server.answer = answer
    assert judge(concurrency=3).score([f"response {i}" for i in range(9)]) == [1] * 9
    assert most == 3


def test_it_works_where_an_event_loop_is_running(judge):
    async def in_a_notebook():
        return judge().score(["a", "b"])

    assert asyncio.run(in_a_notebook()) == pytest.approx([2 / 3, 2 / 3])


def test_tokens_and_cost_are_counted_and_drained_once(judge):
    reward = judge(prompt_price=2.0, completion_price=10.0)
    counts = reward.score(["a", "b"]).parts["judge"].counts
    assert counts["prompt_tokens"] == 200
    assert counts["completion_tokens"] == 20
    assert counts["cost"] == pytest.approx(200 * 2e-6 + 20 * 10e-6)
    assert set(reward.drain_counters().values()) == {0}
    assert reward.counters["requests"] == 2


def test_the_key_is_shown_nowhere(judge, server, caplog):
    caplog.set_level(logging.DEBUG)
    server.answer = lambda question: (401, {}, f"Incorrect API key provided: {KEY}")
    reward = judge(api_key_env="JUDGE_KEY")
    with pytest.raises(RewardError, match=r"answered 401: 'Incorrect API key provided: \*\*\*'") as caught:
        reward("a")
    shown, error = [repr(reward), repr(vars(reward)), caplog.text, json.dumps(reward.state_dict())], caught.value
    while error:
        shown += [repr(error), str(error), str(getattr(error, "__notes__", ""))]
        error = error.__cause__ or error.__context__
    assert caplog.records
    assert not [text for text in shown if KEY in text]


@pytest.mark.parametrize("key", [None, "", "  "])
def test_a_key_that_is_not_set_is_refused_by_the_variables_name(monkeypatch, key):
    if key is None:
        monkeypatch.delenv("JUDGE_KEY", raising=False)
    else:
        monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(InputError, match=r"^REWARD.api_key_env names .* 'JUDGE_KEY', which is not set"):
        make_reward({"type": "judge", "base_url": "http://h/v1", "model": "m", "api_key_env": "JUDGE_KEY"})


@pytest.mark.parametrize("key", ["two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(InputError, match=r"^REWARD.api_key_env names .* 'JUDGE_KEY', whose content"):
        make_reward({"type": "judge", "base_url": "http://h/v1", "model": "m", "api_key_env": "JUDGE_KEY"})


LINK_LOCAL = [
    "http://169.254.169.254/v1", "http://169.254.1.1:8000/v1", "http://[fe80::1]/v1", "http://[::ffff:169.254.169.254]/v1",
    "http://2852039166/v1", "http://0xa9.254.43518/v1", "https://metadata.google.internal/v1", "http://[fd00:ec2::254]/v1",
    "http://[fe80::1%25eth0]/v1", "http://METADATA.google.internal./v1", "http://100.100.100.200/v1",
]  # fmt: skip


@pytest.mark.parametrize("url", LINK_LOCAL)
def test_a_judge_at_a_link_local_or_metadata_address_is_refused(url):
    with pytest.raises(
        InputError, match=r"^REWARD.base_url must not lead to '.*' .*: link-local addresses and clouds'"
    ):
        make_reward({"type": "judge", "base_url": url, "model": "m"})


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1"])
def test_a_name_that_leads_to_such_an_address_is_refused_before_anything_is_sent(monkeypatch, address):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (address, 80))])
    with pytest.raises(InputError, match=rf"must not lead to '{address}' \(host 'judge.example'\)"):
        make_reward({"type": "judge", "base_url": "http://judge.example/v1", "model": "m", "on_error": "skip"})("a")


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_is_read_only_so_far(judge, server, status):
    server.answer = lambda question: (status, {}, "x" * (MAX_REPLY + 2**16))
    with pytest.raises(RewardError, match=f"answered with over {MAX_REPLY} bytes, which is no verdict"):
        judge(retries=0)("a")


def test_a_packed_reply_is_not_unpacked(judge, server):
    server.answer = lambda question: (200, {"Content-Encoding": "gzip"}, "bomb")
    with pytest.raises(RewardError, match="answered in the encoding 'gzip', which was not asked for"):
        judge()("a")
