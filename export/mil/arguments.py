"""How an operation gets its inputs, and the table that it is found in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]


class Arguments:
    """The inputs of one operation by their MIL names; what the program leaves out has MIL's default."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def tensor(self, name: str = "x") -> Tensor:
        """An input that must be there."""
        return self._values[name]

    def maybe(self, name: str) -> Tensor | None:
        return self._values.get(name)

    def tensors(self, name: str = "values") -> list[Tensor]:
        return list(self._values[name])

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise KeyError(name)
            return list(default)
        return [int(v) for v in torch.as_tensor(value).reshape(-1)]

    def integer(self, name: str, default: int | None = None) -> int:
        return self.ints(name, None if default is None else [default])[0]

    def flag(self, name: str) -> bool:
        value = self._values.get(name)
        return False if value is None else bool(value)

    def flags(self, name: str, count: int) -> list[bool]:
        return [bool(v) for v in self.ints(name, [0] * count)]

    def number(self, name: str, default: float) -> float:
        value = self._values.get(name)
        return default if value is None else float(value)

    def text(self, name: str, default: str) -> str:
        value = self._values.get(name)
        return default if value is None else str(value)


Operation = Callable[[Arguments], Result]
OPERATIONS: dict[str, Operation] = {}


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Puts a function into the table under these MIL names."""

    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register
