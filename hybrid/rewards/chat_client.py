"""Questions to a chat model over an OpenAI-compatible endpoint: many at once, each with its time and its retries."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NoReturn

from hybrid.rewards.address import check_resolved
from hybrid.rewards.awaited import finished
from hybrid.rewards.base import RewardError, RewardTimeout
from hybrid.rewards.samples import shortened

if TYPE_CHECKING:
    import httpx

__all__ = ["ChatClient"]

MAX_REPLY = 2**22  # bytes; a verdict has some hundred, with a model's thoughts some ten thousand
MAX_BACKOFF = 60.0  # seconds between two tries, unless the server asks for more
COUNTED = (
    "requests",
    "retries",
    "request_timeouts",
    "request_seconds",
    "parse_failures",
    "cache_hits",
    "prompt_tokens",
    "completion_tokens",
)


class _TryAgain(Exception):
    """A failure that may pass. after: the seconds that the server asked us to wait, if it did."""

    def __init__(self, failure: RewardError, after: float | None = None):
        self.failure, self.after = failure, after


@dataclass
class ChatClient:
    """Sends requests to {base_url}/chat/completions, `concurrency` at once, and gives back the replies' texts.

    A 429, a 5xx, a time-out and a broken connection are tried again, `retries` times, after `backoff` seconds,
    2 x backoff, 4 x backoff, ... or after what the server's Retry-After says; any other answer is an error at
    once. Redirects are not followed, a reply is read up to MAX_REPLY bytes, and a host that leads to a link-local
    address is refused. `deadline` ends a question with all its tries, counted from when its first try starts.
    """

    base_url: str
    key: str | None = field(repr=False)
    timeout: float  # seconds for one try, whatever the server sends meanwhile
    deadline: float
    retries: int
    backoff: float
    concurrency: int
    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))

    def replies(self, requests: Sequence[dict[str, Any]]) -> list[str | RewardError]:
        """The text that answers each request, or what went wrong with it."""
        return finished(self._replies(requests)) if requests else []

    def count(self, name: str, amount: float = 1) -> None:
        self.counters[name] += amount

    async def _replies(self, requests: Sequence[dict[str, Any]]) -> list[str | RewardError]:
        import httpx  # here, since `import hybrid` is to stay light

        url = httpx.URL(self.base_url)
        await check_resolved(url.host, url.port or 443)
        # A small reply may unpack to gigabytes.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        limits = httpx.Limits(max_connections=self.concurrency)
        slots = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as http:
            return await asyncio.gather(*(self._reply(http, slots, request) for request in requests))

    async def _reply(
        self, http: "httpx.AsyncClient", slots: asyncio.Semaphore, request: dict[str, Any]
    ) -> str | RewardError:
        # A question that waits to try again keeps its slot: an overloaded server is not to be asked more meanwhile.
        async with slots:
            try:
                async with asyncio.timeout(self.deadline):
                    return await self._persistently(http, request)
            except TimeoutError:
                return RewardTimeout(f"no answer from {self.base_url} within deadline ({self.deadline:g} s)")
            except RewardError as error:
                return error

    async def _persistently(self, http: "httpx.AsyncClient", request: dict[str, Any]) -> str:
        ends = time.monotonic() + self.deadline
        for tries in range(self.retries + 1):
            try:
                return await self._try(http, request)
            except _TryAgain as error:
                failure = error.failure
                pause = error.after if error.after is not None else min(MAX_BACKOFF, self.backoff * 2 ** min(tries, 20))
            if tries < self.retries:
                if time.monotonic() + pause > ends:
                    raise RewardTimeout(
                        f"{failure}; the next try in {pause:g} s would be past deadline ({self.deadline:g} s)"
                    )
                self.count("retries")
                await asyncio.sleep(pause)
        raise type(failure)(f"{failure} (tried {self.retries + 1} times)")

    async def _try(self, http: "httpx.AsyncClient", request: dict[str, Any]) -> str:
        import httpx

        self.count("requests")
        began = time.monotonic()
        try:
            # httpx's own time-outs begin anew with every byte that comes.
            async with asyncio.timeout(self.timeout):
                response, body = await self._posted(http, request)
        except TimeoutError:
            self.count("request_timeouts")
            self._again(RewardTimeout(f"no answer from {self.base_url} within timeout ({self.timeout:g} s)"))
        except httpx.TransportError as error:
            self._again(
                RewardError(f"no answer from {self.base_url}: {type(error).__name__}: {self._hidden(str(error))}")
            )
        except httpx.HTTPError as error:
            raise RewardError(f"no answer from {self.base_url}: {type(error).__name__}") from None
        finally:
            self.count("request_seconds", time.monotonic() - began)
        if response.status_code != 200:
            failure = RewardError(
                f"{self.base_url} answered {response.status_code}: {shortened(self._hidden(body), 200)}"
            )
            if response.status_code == 429 or response.status_code >= 500:
                self._again(failure, _seconds(response.headers.get("Retry-After")))
            raise failure
        return self._text_in(body)

    async def _posted(self, http: "httpx.AsyncClient", request: dict[str, Any]) -> "tuple[httpx.Response, str]":
        """The response and its text, read as it comes. Raises RewardError where it is too long or packed."""
        async with http.stream("POST", f"{self.base_url}/chat/completions", json=request) as response:
            packed = response.headers.get("Content-Encoding", "identity").strip().lower()
            if packed not in ("", "identity"):
                raise RewardError(
                    f"{self.base_url} answered in the encoding {shortened(packed)}, which was not asked for"
                )
            read = bytearray()
            async for part in response.aiter_raw():
                read += part
                if len(read) > MAX_REPLY:
                    raise RewardError(f"{self.base_url} answered with over {MAX_REPLY} bytes, which is no verdict")
        return response, read.decode("utf-8", errors="replace")

    def _text_in(self, reply: str) -> str:
        try:
            body = json.loads(reply)
            text = body["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            self.count("parse_failures")
            raise RewardError(
                f"{self.base_url} answered without choices[0].message.content: {shortened(self._hidden(reply), 200)}"
            )
        usage = body.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            amount = usage.get(name) if isinstance(usage, dict) else None
            if isinstance(amount, int):
                self.count(name, amount)
        return self._hidden(text)

    def _again(self, failure: RewardError, after: float | None = None) -> NoReturn:
        raise _TryAgain(failure, after) from None

    def _hidden(self, text: str) -> str:
        """A text from outside, without our key: servers quote it when they refuse it."""
        return text.replace(self.key, "***") if self.key else text


def _seconds(retry_after: str | None) -> float | None:
    """The wait that a Retry-After header asks for, given in seconds or as a date."""
    if retry_after is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(retry_after))
    with suppress(ValueError):
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return None
