"""Any Python function as a reward."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hybrid.core import InputError, load_object
from hybrid.rewards.awaited import finished, gathered
from hybrid.rewards.base import Reward, RewardError, register_reward
from hybrid.rewards.samples import has_text
from hybrid.rewards.user_function import BadFunction, bound
from hybrid.rewards.worker import Worker

__all__ = ["PythonFunction"]

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 10.0


@register_reward("python")
@dataclass
class PythonFunction(Reward):
    """Any function, f(response, target, *, prompt, item) or f(responses, targets, prompts, items).

    It takes what it names of these, in any order; `**kwargs` gets the rest; the names say which form it is.
    Where none of them is named, the first parameter is the response. A target of several references comes as a list.

    A function that names `completions` is of TRL's form, f(prompts, completions, **columns): each column of the rows
    comes by its name, of dialogues prompts and completions are lists of messages, and None in the list it returns
    says that it does not apply to that sample, which is skipped.

    An `async def` of any form will do: of one sample, `max_concurrency` run at once; each may take `timeout` seconds.

    With `isolate` it runs in a process of its own, by its name: a call that takes over `timeout` seconds is killed,
    and a crash is an error of that sample. Items reach it as JSON makes them; what it prints goes to stderr. That
    guards the run against functions that hang or crash; it is no sandbox (see `worker`).
    """

    takes_references = True

    function: str | Callable[..., Any]  # "package.module:name", or the function itself
    batch: bool | None = None  # whether it takes lists; None = by its parameters' names
    isolate: bool = False
    # With isolate or an async function: seconds for a call, of one sample or a batch. With isolate 10 unless given.
    timeout: float | None = None
    interpreter: str | None = None  # with isolate: another Python to run it, such as "other-env/bin/python"
    max_concurrency: int = 16  # of an async function of one sample, not isolated: calls at once

    def __post_init__(self) -> None:
        if self.max_concurrency < 1:
            raise InputError(f"max_concurrency must be at least 1, got {self.max_concurrency}")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise InputError(f"timeout must be a positive number of seconds, got {self.timeout}")
        self._is_async = False
        self._named: tuple[str, ...] = ()
        form = self._isolated() if self.isolate else self._bound()
        self.needs_batch, self.takes_none = form != "one", form == "trl"

    def _bound(self) -> str:
        function = load_object(self.function, what="function") if isinstance(self.function, str) else self.function
        try:
            found = bound(function, self.batch)
        except BadFunction as error:
            raise InputError(str(error)) from error
        for name in ("interpreter",) if found.is_async else ("timeout", "interpreter"):
            if (value := getattr(self, name)) is not None:
                raise InputError(f"{name} can be had only with isolate true, got {value!r}")
        self._call: Callable[..., Any] = found.call if found.is_async else partial(_called, found.call)
        self.reads, self._columns, self._named, self._is_async = found.reads, found.columns, found.named, found.is_async
        return found.form

    def _isolated(self) -> str:
        if not isinstance(self.function, str):
            raise InputError(
                f"function must be given by name, as 'package.module:name', to be isolated; got {self.function!r}"
            )
        if self.timeout is None:
            self.timeout = DEFAULT_TIMEOUT
        self._call = Worker(self.function, batch=self.batch, timeout=self.timeout, interpreter=self.interpreter)
        form, self._columns = self._call.form()
        return form

    def check_data(self, targets: Sequence[Any], items: Sequence[Any], *, what: str, hint: str) -> None:
        known = dict.fromkeys(str(name) for item in items if isinstance(item, Mapping) for name in item)
        missing = [name for name in self._columns if name not in known and name not in ("target", "targets")]
        if items and missing:
            raise InputError(
                f"reward {self.component_name!r} needs the column {missing[0]!r}, which none of the {len(items)} "
                f"{what} has: they have {', '.join(known) or 'none'}"
            )
        if targets and {"target", "targets"} & {*self._named} - {*known} and not any(map(has_text, targets)):
            logger.warning(
                'reward %r names a target, and none of the %d %s has one: it gets "". If it needs one: %s',
                self.component_name, len(targets), what, hint,
            )  # fmt: skip

    def _score(self, responses: list[str], targets: list[Any], prompts: list[str], items: list[Any]) -> Any:
        if self._is_async:
            lists = (responses, targets, prompts, items)
            samples = [lists] if self.needs_batch else list(zip(*lists, strict=True))
            calls = gathered(self._call, samples, at_once=self.max_concurrency, timeout=self.timeout)
            results = finished(calls)
            if not self.needs_batch:
                return results
            if isinstance(results[0], Exception):
                raise results[0]
            return results[0]
        score = self._call if self.needs_batch else super()._score
        return score(responses, targets, prompts, items)

    def _score_one(self, response: str, target: Any, prompt: str, item: Any) -> Any:
        return self._call(response, target, prompt, item)


def _called(call: Callable[..., Any], *sample: Any) -> Any:
    try:
        return call(*sample)
    except SystemExit as error:  # else the run would end with the function's own status, be it 0
        raise RewardError(f"it raised {error!r}") from error
