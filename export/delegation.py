"""How much of an ExecuTorch program its backend took over, and what was left to the slow reference kernels, by name.

A partitioner that cannot take an operator leaves it out without a word; the file runs, gives the right answers, and is
several times slower than it should be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# what a delegate is for; the reference kernels of these are an order of magnitude slower
_HEAVY = ("convolution", "conv2d", "linear", "addmm", "mm")
# a converted layer that lost its delegate: its input is made float again in front of it, on its own
_ROUNDING = ("quantize_per", "dequantize_per", "choose_qparams", "quantize_affine", "dequantize_affine")


def delegation(manager: Any, methods: Iterable[str]) -> dict[str, Any]:
    """What a lowered program's graphs hold, by method.

    manager: what `executorch.exir.to_edge_transform_and_lower` returned.

    Returns:
        method -> delegates (how many), delegated and outside (operators in and outside them), left (rows of operator,
        module and count, heavy ones first), warnings (sentences). Plain JSON types.
    """
    return {method: _of_graph(manager.exported_program(method).graph_module) for method in methods}


def _of_graph(graph: Any) -> dict[str, Any]:
    delegates = delegated = 0
    left: Counter[tuple[str, str]] = Counter()
    for node in graph.graph.nodes:
        if node.op != "call_function" or _name(node.target) == "getitem":
            continue
        if _name(node.target) == "executorch_call_delegate":
            delegates += 1
            inside = getattr(graph, str(node.args[0].target)).original_module.graph_module
            delegated += sum(n.op == "call_function" and _name(n.target) != "getitem" for n in inside.graph.nodes)
            continue
        left[_name(node.target), module_of(node)] += 1
    rows = sorted(left.items(), key=lambda row: (_kind(row[0][0]), -row[1], row[0]))
    return {
        "delegates": delegates,
        "delegated": delegated,
        "outside": sum(left.values()),
        "left": [{"operator": operator, "module": module, "count": count} for (operator, module), count in rows],
        "warnings": _warnings(delegates, left),
    }


def module_of(node: Any) -> str:
    """Where in the tower a node of an exported graph comes from: a module's path, or "the tower itself"."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    # a graph that was exported twice has its own root's name in front
    return path.removeprefix("L['self'].").strip(".") or "the tower itself"


def _name(target: Any) -> str:
    """aten.sum.dim_IntList of EdgeOpOverload and OpOverload alike; a plain function's own name."""
    return str(getattr(target, "__name__", target))


def _kind(operator: str) -> int:
    parts = operator.split(".")
    if parts[0] == "aten" and len(parts) > 1 and parts[1] in _HEAVY:
        return 0
    return 1 if any(word in operator for word in _ROUNDING) else 2


def _warnings(delegates: int, left: Mapping[tuple[str, str], int]) -> list[str]:
    if not delegates:
        return ["the backend took nothing over; every operator runs on reference kernels"]
    return [
        f"{operator} in {module} was left outside the backend{f' {count} times' if count > 1 else ''}; it runs on a "
        "reference kernel, many times slower"
        for (operator, module), count in sorted(left.items())
        if _kind(operator) == 0
    ] + [
        f"{operator} in {module} was left outside the backend; a quantized layer there computes in float"
        for (operator, module) in sorted(left)
        if _kind(operator) == 1 and "choose_qparams" not in operator
    ]


def delegation_lines(name: str, found: Mapping[str, Any], most: int = 4) -> list[str]:
    """For people: one line a method, and its warnings."""
    lines = []
    for method, row in found.items():
        outside = Counter[str]()
        for entry in row["left"]:
            outside[entry["operator"]] += entry["count"]
        shown = [f"{operator} {count}" for operator, count in outside.most_common(most)]
        rest = f", {len(outside) - most} others" if len(outside) > most else ""
        lines.append(
            f"{name} {method}: {row['delegated']} operators in {row['delegates']} delegates, {row['outside']} outside"
            + (f" ({', '.join(shown)}{rest})" if shown else "")
        )
        lines += [f"WARNING: {name} {method}: {warning}" for warning in row["warnings"]]
    return lines


def all_warnings(found: Mapping[str, Any] | None) -> Sequence[str]:
    """Every warning of `delegation`, with its method in front."""
    return [f"{method}: {warning}" for method, row in (found or {}).items() for warning in row["warnings"]]
