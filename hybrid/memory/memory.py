"""What a memory is: it says which prompts come next, and is told what came of them."""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from hybrid.core import Batch, Encoded, InputError, Registry, Rollout, build, check_settings
from hybrid.memory.visits import Kept, Visit, example_key, visits_of

__all__ = [
    "Memory",
    "check_memory",
    "make_memory",
    "memory_names",
    "prompts_of",
    "register_memory",
    "tokenizer_name",
]


class Memory(ABC):
    """Which prompts come again. A run has one at most, and any strategy may stand above it.

        @register_memory("last")
        @dataclass
        class Last(Memory):
            def pick(self, drawn, step): ...
            def visited(self, visits, step): ...

    Its constructor's parameters are its settings, `memory: {type: last, ...}`. Of each step with a rollout the run asks
    `pick`, then tells `after_rollout`; the state is saved with every checkpoint, and with the run's end.
    What it draws by chance it draws by `chance(step)`: there is no random state to save.
    """

    keeps_responses: ClassVar[bool] = False  # whether `best` and `stale` have what `replay` and PPO learn from

    path: str | None = None  # of another run's memory, to begin with
    pool: Mapping[str, Sequence[Encoded]] = MappingProxyType({})  # the run's examples by the key of their prompt
    seed: int = 0
    step: int = 0  # when it was last told of a rollout
    began: int = 0  # its clock at the run's first step, where it began with another run's memory
    tokenizer: str | None = None  # `tokenizer_name` of the one whose ids it holds; None: not known
    revisits: float = 0.0  # of the last rollout's prompts, the share that it had seen before

    def attach(self, examples: Sequence[Encoded], tokenizer: Any = None, *, seed: int = 0) -> None:
        """The run's training examples, whose prompts it picks from."""
        self.pool, self.seed = prompts_of(examples), seed
        self.tokenizer = None if tokenizer is None else tokenizer_name(tokenizer)

    def chance(self, step: int) -> random.Random:
        """Random numbers that depend on the seed and the step alone."""
        return random.Random(f"{self.seed}/{step}")

    @abstractmethod
    def pick(self, drawn: Sequence[Encoded], step: int) -> Sequence[Encoded]:
        """The examples whose prompts are rolled out in this step, as many as the data's loader has `drawn` for it."""

    @abstractmethod
    def visited(self, visits: Sequence[Visit], step: int) -> None:
        """What came of a rollout's prompts, in order."""

    def shown(self, examples: Sequence[Encoded]) -> list[Encoded]:
        """Examples that are answered outside of a rollout, in evaluation and by `generate`, as the policy sees them."""
        return list(examples)

    @property
    def most_added(self) -> int:
        """The most tokens by which `pick` and `shown` make a prompt longer."""
        return 0

    def knows(self, key: str) -> bool:
        """Whether it holds something of this prompt."""
        return False

    def after_rollout(self, rollout: Rollout, step: int) -> None:
        """The rollout has its scores, and will be learnt from."""
        visits = visits_of(rollout, step)
        self.revisits = sum(self.knows(visit.key) for visit in visits) / max(len(visits), 1)
        self.step = step
        self.visited(visits, step)

    def after_supervised(self, batch: Batch, loss: Tensor) -> None:
        """Rows of a supervised step and the loss of each, (B,) nats per token."""
        return None

    def best(self, number: int) -> list[tuple[Kept, float]]:
        """Responses to be imitated, best first, and with each the mean score of its prompt."""
        return []

    def stale(self, number: int) -> list[Visit]:
        """Earlier visits with at most `number` responses together, that PPO may learn from beside the fresh ones."""
        return []

    def metrics(self) -> dict[str, float]:
        """What there is to log of the last step."""
        return {"memory/revisits": self.revisits}

    # State: JSON, the bulk of it a list of `rows`

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """What it holds, a JSON object each."""

    @abstractmethod
    def load_rows(self, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
        """Hold exactly what `rows` gave, and what `header` did."""

    def begin(self) -> None:
        """A new run goes on with this memory of another: the clock goes on too."""
        self.began = self.step

    def header(self) -> dict[str, Any]:
        """The rest of the state."""
        return {
            "memory": next((name for name in memory_names() if _memories[name] is type(self)), type(self).__name__),
            "tokenizer": self.tokenizer,
            "step": self.step,
            "began": self.began,
            "revisits": self.revisits,
        }

    def state_dict(self) -> dict[str, Any]:
        return {**self.header(), "rows": self.rows()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises InputError for one of another kind, or of another tokenizer."""
        own = self.header()
        for key, what in (("memory", "kind"), ("tokenizer", "tokenizer")):
            if None not in (own[key], state[key]) and own[key] != state[key]:
                raise InputError(
                    f"this memory is of another {what}: {state[key]!r}, and the run's is {own[key]!r}; begin without "
                    f"it (memory.path=null), or with the run's own {what}"
                )
        self.step, self.began, self.revisits = state["step"], state["began"], state["revisits"]
        self.load_rows(state["rows"], state)


_memories: Registry[type[Memory]] = Registry("memory")
register_memory = _memories.register


def memory_names() -> list[str]:
    """The types that `make_memory` knows."""
    return list(_memories)


def check_memory(spec: Mapping[str, Any]) -> None:
    """Refuse (InputError) what `make_memory` could not make."""
    make_memory(spec)


def make_memory(spec: Mapping[str, Any]) -> Memory | None:
    """A memory from its section of the config: its name under `type`, its settings beside it; none of an empty one."""
    if not spec:
        return None
    if not isinstance(spec.get("type"), str):
        raise InputError(f"memory.type is missing; known: {', '.join(memory_names())}")
    factory, settings = _memories[spec["type"]], {key: value for key, value in spec.items() if key != "type"}
    what = f"memory {spec['type']!r}"
    check_settings(factory, settings, what=what, path="memory", also=["type"])
    made: Memory = build(factory, settings, what=what, path="memory")
    return made


def prompts_of(examples: Sequence[Encoded]) -> dict[str, list[Encoded]]:
    """The examples by the key of their prompt, in order."""
    found: dict[str, list[Encoded]] = {}
    for example in examples:
        found.setdefault(example_key(example), []).append(example)
    return found


def tokenizer_name(tokenizer: Any) -> str:
    """A hash of the vocabulary: equal where the same ids mean the same tokens."""
    text = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
