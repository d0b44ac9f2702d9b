"""Readers of JSON and YAML that refuse equal names in an object; the usual readers silently keep the last one."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import yaml

from .short_repr import short_repr


def load_json(text: str | bytes) -> Any:
    """As `json.loads`. Also raises `ValueError` for an object that holds a name twice."""
    return json.loads(text, object_pairs_hook=_object)


def load_yaml(text: str) -> Any:
    """As `yaml.safe_load`. Also raises `ValueError` for a mapping that holds a name twice."""
    return yaml.load(text, _UniqueLoader)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(_repeated_name(next(name for name in names if names.count(name) > 1)))
    return found


def _repeated_name(name: object) -> str:
    return f"The name {short_repr(name)} occurs twice; keep one of them."


class _UniqueLoader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    raise ValueError(_repeated_name(key))
                seen.add(key)
        return super().construct_mapping(node, deep)
