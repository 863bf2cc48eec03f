"""Coroutines run to their end from plain code, also where an event loop is already running, as in a notebook."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from hybrid.core import InputError
from hybrid.rewards.base import RewardError, RewardTimeout

__all__ = ["finished", "gathered"]

T = TypeVar("T")


def finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result. All run on one loop, so that a client kept between calls stays usable."""
    loop = _loop(os.getpid())
    if loop is _running():
        # A coroutine of this loop waits for us: on it nothing would ever finish.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, coroutine).result()
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def gathered(
    call: Callable[..., Awaitable[Any]], samples: Sequence[tuple[Any, ...]], *, at_once: int, timeout: float | None
) -> list[Any]:
    """`call(*sample)` of each sample, `at_once` at a time; an exception where it raised or took over `timeout` seconds.

    An InputError is no sample's fault and is raised.
    """
    slots = asyncio.Semaphore(at_once)

    async def one(sample: tuple[Any, ...]) -> Any:
        async with slots:
            try:
                async with asyncio.timeout(timeout) as timer:
                    return await call(*sample)
            except InputError:
                raise
            except (SystemExit, KeyboardInterrupt) as error:  # it would end the loop, and leave us waiting
                return RewardError(f"it raised {error!r}")
            except Exception as error:  # noqa: BLE001 - it stands in the sample's place
                return RewardTimeout(f"it took longer than timeout ({timeout:g} s)") if timer.expired() else error

    return await asyncio.gather(*map(one, samples))


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of this process, in a thread that ends with it; a fork needs its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
