"""Recipes as YAML, and `key.sub=value` on the command line."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from pocketvlm.edge.errors import UsageError


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; this reads it as the number its author meant."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Put the value of one `key.sub=value` into the plain mapping of a recipe.

    Raises:
        UsageError: another form, or a key that leads nowhere.
    """
    key, found, text = override.partition("=")
    if not found or not key.strip():
        raise UsageError(f"override {override!r} is not of the form key.sub=value, for example train.steps=100")
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"the value of override {override!r} is not valid YAML; quote it") from error
    node: Any = raw
    parts = key.strip().split(".")
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            node = node[_list_index(node, part, override)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UsageError(f"override {override!r} enters {'.'.join(parts[: depth + 1])!r}, which has no keys")
    if isinstance(node, list):
        node[_list_index(node, parts[-1], override)] = value
    else:
        node[parts[-1]] = value


def as_typed(overrides: Sequence[str]) -> Sequence[str]:
    """The overrides of a command line. A key that comes again replaces what came before, and that is said on stderr: an
    unquoted brace range is several arguments to the shell, of which the last alone would count unseen."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    last = dict(zip(keys, overrides))
    for key, count in Counter(keys).items():
        if count > 1:
            print(
                f"{key} is given {count} times and the last counts ({last[key]!r}); put it in quotes if the shell was "
                "not to expand it",
                file=sys.stderr,
            )
    return overrides


def _list_index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    named = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("name") == part]
    if len(named) == 1:
        return named[0]
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(items)]
    raise UsageError(
        f"override {override!r} addresses item {part!r} {'more than once' if named else 'which is not there'}; "
        f"use a number from 0 to {len(items) - 1} or a name that occurs once among: {', '.join(names)}"
    )
