"""Which operator a converter stumbled over, and in which module: converters name one of the two, or neither."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from pocketvlm.edge.errors import UsageError
from pocketvlm.export.delegation import module_of
from pocketvlm.export.targets.base import Towers
from pocketvlm.export.targets.onnx import example_rows, present_towers

# "aten.foo.default", "aten::foo", "torch.ops.mine.foo", "op 'foo'", "`foo` op"
_NAMED = re.compile(
    r"(?:torch\.ops|torch\._ops)\.\w+\.(\w+)|\b(?:aten|prims)(?:::|\.)(\w+)|\b\w+::(\w+)"
    r"|\bop '(?:\w+[.:]+)?(\w+)|`(\w+)` op"
)
_SHORTEST = 4


def lowering_error(error: BaseException, target: str, towers: Towers) -> UsageError:
    """What a user is told when a converter gave up: its reason, the operator and the module it is in, what to do.

    target: which target and precision, for people.
    """
    chain = list(_chain(error))
    where = find_operator("\n".join(str(e) for e in reversed(chain)), towers)
    last = chain[-1] if where else error
    lines = [line for line in str(last).strip().splitlines() if line.strip()]
    reason = f"{type(last).__name__}: {(lines or [''])[0][:300]}"
    name = towers.contract.name
    if where is None:
        return UsageError(
            f"{target} cannot express {name!r} ({reason}); no bundle was written, so leave the target "
            f"{target.split()[0]!r} out or choose another backbone"
        )
    return UsageError(
        f"{target} cannot express {name!r}: it has no {where} ({reason}); no bundle was written, so write that module "
        f"with other operators, leave the target {target.split()[0]!r} out or choose another backbone"
    )


def find_operator(text: str, towers: Towers) -> str | None:
    """The first operator named in an error's text that a tower has: "aten.foo, which is in x.y of the image tower".

    Converters rewrite operators before they look for them, so that the name in the text may be a part of the tower's,
    or the other way round; an exact match goes first.
    """
    named = [next(filter(None, found)) for found in _NAMED.findall(text)]
    try:
        nodes = list(_nodes(towers)) if named else []
    except Exception:  # the towers themselves cannot be captured: nothing to look in
        return None
    for same in (_equal, _within):
        for name in dict.fromkeys(named):
            modules = list(dict.fromkeys((operator, where) for operator, base, where in nodes if same(name, base)))
            if modules:
                several = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
                return f"{modules[0][0]}, which is in {modules[0][1]}{several}"
    return None


def _equal(name: str, base: str) -> bool:
    return name == base


def _within(name: str, base: str) -> bool:
    return min(len(name), len(base)) >= _SHORTEST and (name in base or base in name)


def _nodes(towers: Towers) -> Iterator[tuple[str, str, str]]:
    """(operator, its bare name, where) of both towers, as captured and as decomposed."""
    captured = []
    for tower, module in present_towers(towers):
        program = torch.export.export(module, (torch.from_numpy(example_rows(towers, tower)),))
        captured.append((tower, program))
    for decompose in (False, True):
        for tower, program in captured:
            graph = (program.run_decompositions() if decompose else program).graph
            for node in graph.nodes:
                if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                    operator = str(node.target).removesuffix(".default")
                    yield operator, operator.split(".")[1], f"{module_of(node)} of the {tower} tower"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
