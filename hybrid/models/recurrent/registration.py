"""The recurrent models under transformers' `Auto` classes, as soon as there are any: hybrid itself loads transformers
only where it is needed."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

__all__ = ["after_import"]

CONFIG, MODELS = (f"hybrid.models.recurrent.{name}" for name in ("configuration_recurrent", "modeling_recurrent"))
AUTO_CONFIG, AUTO_MODELS = (f"transformers.models.auto.{name}" for name in ("configuration_auto", "modeling_auto"))
LAYERS = "transformers.modeling_layers"


class _Watch(MetaPathFinder):
    """Finds no module itself; has `call` called when the module of that name has been executed."""

    def __init__(self, name: str, call: Callable[[], object]):
        self.name, self.call = name, call

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute, call = spec.loader, spec.loader.exec_module, self.call

        def execute_and_call(module: Any) -> None:
            # Once: a loader may be one for many modules.
            delattr(loader, "exec_module")
            execute(module)
            call()

        setattr(loader, "exec_module", execute_and_call)  # noqa: B010
        return spec


def after_import(name: str, call: Callable[[], object]) -> None:
    """Call it now, where the module of that name is loaded already; else when it has been."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(name, call))


def _register_config() -> None:
    from transformers import AutoConfig

    from hybrid.models.recurrent.configuration_recurrent import RecurrentConfig

    AutoConfig.register(RecurrentConfig.model_type, RecurrentConfig, exist_ok=True)
    # A saved folder carries the code, for those who have no hybrid: they load it with trust_remote_code=True.
    RecurrentConfig.register_for_auto_class()


def _register_model() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from hybrid.models.recurrent.configuration_recurrent import RecurrentConfig
    from hybrid.models.recurrent.modeling_recurrent import RecurrentForCausalLM, RecurrentModel

    AutoModel.register(RecurrentConfig, RecurrentModel, exist_ok=True)
    AutoModelForCausalLM.register(RecurrentConfig, RecurrentForCausalLM, exist_ok=True)
    RecurrentForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def _bring_models() -> None:
    """Load our models, unless transformers is in the middle of what they need: its end comes here again."""
    auto, layers = (sys.modules.get(name) for name in (AUTO_MODELS, LAYERS))
    if hasattr(auto, "AutoModelForCausalLM") and (layers is None or hasattr(layers, "GradientCheckpointingLayer")):
        import_module(MODELS)


# Transformers' modules bring ours, unless it is ours that bring them; when ours are whole, they are registered.
after_import(CONFIG, _register_config)
after_import(MODELS, _register_model)
after_import(AUTO_CONFIG, partial(import_module, CONFIG))
after_import(AUTO_MODELS, _bring_models)
after_import(LAYERS, _bring_models)
