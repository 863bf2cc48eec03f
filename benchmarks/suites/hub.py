"""Is everything there that a suite takes from the Hugging Face hub? Asked before anything is loaded."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, try_to_load_from_cache

from hybrid import HybridConfig, InputError

__all__ = ["check_hub"]

Repository = tuple[Literal["model", "dataset"], str]


def check_hub(config: HybridConfig) -> None:
    """Raise InputError where the hub cannot be reached and its cache lacks something, with all that is missing.

    Left to themselves the libraries try for half a minute, and then name the first thing only.
    """
    missing = [f"{kind} {name}" for kind, name in dict.fromkeys(_wanted(config)) if not _cached(kind, name)]
    if missing and (reason := _unreachable()):
        raise InputError(
            f"{constants.ENDPOINT} cannot be reached ({reason}), and these are not in its cache: {', '.join(missing)}. "
            "Give folders and files instead (--model, --data, reward=...), or see the suite run on local stand-ins "
            "with --smoke"
        )


def _wanted(config: HybridConfig) -> Iterator[Repository]:
    """What the config names that is neither a file nor a folder."""
    models = [config.model.name, *_models_of(config.reward)]
    yield from (("model", name) for name in models if name and not Path(name).exists())
    for sources in (config.data.train, config.data.eval):
        for source in [sources] if isinstance(sources, str) else sources or ():
            name = "/".join(source.partition(":")[0].split("/")[:2])
            if config.data.format in ("auto", "hf") and not Path(source).suffix and not Path(source).exists():
                yield "dataset", name


def _models_of(spec: Any) -> Iterator[str]:
    """The models that a reward's spec names, however deep in it. What a file or a default names is not looked for."""
    if isinstance(spec, Mapping):
        yield from (value for key, value in spec.items() if key in ("model", "path") and isinstance(value, str))
    for inner in spec.values() if isinstance(spec, Mapping) else spec if isinstance(spec, (list, tuple)) else ():
        yield from _models_of(inner)


def _cached(kind: Literal["model", "dataset"], name: str) -> bool:
    file = "config.json" if kind == "model" else "README.md"
    return isinstance(try_to_load_from_cache(name, file, repo_type=kind), str)


def _unreachable() -> str | None:
    """Why the hub cannot be reached; None where it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urllib.request.urlopen(os.fspath(constants.ENDPOINT), timeout=10).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (urllib.error.URLError, OSError) as error:
        return str(getattr(error, "reason", error))
    return None
