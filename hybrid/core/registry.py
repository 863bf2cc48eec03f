"""Name -> factory: how rewards, optimizers, schedulers and strategies are found and added."""

import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from hybrid.core.errors import InputError, unknown_name

__all__ = ["Registry", "load_object"]

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Factories by name. Owned by the module that defines the kind of thing, filled by decorators.

        rewards = Registry("reward")

        @rewards.register("length_window", "length")
        class LengthWindow: ...

        rewards["length_window"]

    Names are matched case-insensitively. Other packages add theirs by an entry point in the group `hybrid.<kind>`,
    of the name that they register, to the class or its module; those are loaded when a name is first not found here.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._factories: dict[str, T] = {}

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        """Decorator: add a factory under `name` and `aliases`. A name that is taken is refused."""

        def add(factory: T) -> T:
            for key in (name, *aliases):
                if key.lower() in self._factories:
                    raise ValueError(f"{self.kind} {key!r} is already registered")
                self._factories[key.lower()] = factory
            return factory

        return add

    def __getitem__(self, name: str) -> T:
        key = str(name).lower()
        if key not in self._factories:
            self._load_entry_points()
        if key not in self._factories:
            hint = (
                "One of your own: import the module that registers it first; the command line finds it by an entry "
                f"point in the group 'hybrid.{self.kind}'"
            )
            raise unknown_name(self.kind, str(name), self._factories, hint=hint)
        return self._factories[key]

    def __contains__(self, name: object) -> bool:
        return str(name).lower() in self._factories

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(sorted(self._factories))

    def _load_entry_points(self) -> None:
        for entry in entry_points(group=f"hybrid.{self.kind}"):
            key = entry.name.lower()
            if key not in self._factories:
                loaded = entry.load()
                # One that names a module has had the module register it.
                if key not in self._factories and not callable(loaded):
                    raise InputError(
                        f"the entry point {entry.name!r} of the group {entry.group!r} leads to {entry.value!r}, which "
                        "is no class or function, and has registered none of that name"
                    )
                self._factories.setdefault(key, loaded)


def load_object(path: str, *, what: str) -> Any:
    """The object that `package.module:name` names; `what` says in errors what it was wanted for."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name) or module_name.startswith("."):
        raise InputError(f"{what} must look like 'package.module:name', got {path!r}")
    # A console script's sys.path starts with the script's folder, not with the one it is run from.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{what} {path!r}: no module named {error.name!r} on the Python path") from error
    if not hasattr(module, name):
        raise InputError(f"{what} {path!r}: module {module_name!r} has no {name!r}")
    return getattr(module, name)
