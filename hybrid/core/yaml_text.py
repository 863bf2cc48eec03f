"""YAML as people mean it."""

import re
from typing import Any

__all__ = ["parse_yaml"]

EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def parse_yaml(text: str) -> Any:
    """What a YAML (or JSON) text says. `1e-5` is a number, as in YAML 1.2; PyYAML alone takes it for text.

    Raises yaml.YAMLError, also for a key that a mapping has twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader with one more form of number, for which the last of two equal keys does not win."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: list[Any] = []
            for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice in one mapping", key_node.start_mark
                    )
                seen.append(key)
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))
    return yaml.load(text, Loader)
