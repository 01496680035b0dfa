"""Captured graphs: their constants, what to drop from them, and which of a tower's blocks an operator belongs to.

A block is a module of the tower, named by its path in it ("trunk.blocks.3", "blocks.0"). `torch.export` records the
path with every operator, and it survives what `export.prepare` does to a graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

_aten = torch.ops.aten
# where `mark_float` leaves its mark; copies of a graph keep it
_FLOAT = "pocketvlm_in_float"
# the attribute of `students.deploy.DeployTower` that holds the tower: no part of a block's name
_WRAPPER = "tower."


def constant(owner: nn.Module, argument: Any) -> Tensor | None:
    """The parameter or buffer that an argument of an operator stands for; None where it is none."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    value: Any = owner
    for part in str(argument.target).split("."):
        value = getattr(value, part)
    return value.detach()


def set_parameter(graph_module: fx.GraphModule, node: fx.Node, position: int, value: Tensor, stem: str) -> None:
    """Make argument `position` of `node` a new parameter, so that a weight shared with another node stays as it is."""
    name = f"{stem}_{node.name}"
    graph_module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with graph_module.graph.inserting_before(node):
        attribute = graph_module.graph.get_attr(name)
    attribute.meta["val"] = value
    arguments = list(node.args)
    while len(arguments) <= position:
        arguments.append(None)
    arguments[position] = attribute
    node.args = tuple(arguments)


def pool_by_mean(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph, changed in place: global pooling becomes the mean that it is. Converters make of `adaptive_avg_pool2d`
    a mean and up to eight operators that copy its one place into a layout of strides."""
    for node in graph_module.graph.nodes:
        if node.target is _aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target, node.args = _aten.mean.dim, (node.args[0], [-1, -2], True)
    graph_module.recompile()
    return graph_module


def prune(graph_module: fx.GraphModule) -> None:
    """Drop operators, parameters and buffers that the output does not depend on, in place.

    ExecuTorch writes every parameter of the module it is given, so a projector left over from training would ship.
    """
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]:
        if name not in used:
            owner: Any = graph_module
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            delattr(owner, last)
    graph_module.recompile()


def path_of(node: fx.Node) -> str:
    """The path, in the tower, of the module that an operator was recorded in; empty for the tower itself."""
    stack = node.meta.get("nn_module_stack")
    return block_name(str(list(stack.values())[-1][0])) if stack else ""


def block_name(path: str) -> str:
    """A module's path as blocks are named: without the wrapper of a student's deployable tower."""
    return path.removeprefix(_WRAPPER)


def inside(path: str, blocks: Iterable[str]) -> bool:
    """Whether a module's path is one of these blocks or lies in one."""
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def block_of(path: str) -> str:
    """The block that a layer counts to unless somebody names another: its path through the last number in it.

    "trunk.blocks.3.1.conv_pw" is of "trunk.blocks.3.1"; a layer that is not numbered is a block of its own.
    """
    parts = path.split(".")
    numbered = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else path


def blocks_of(paths: Iterable[str]) -> list[str]:
    """For each layer its block (`block_of`); a block that lies in another counts to that."""
    found = [block_of(path) for path in paths]
    return [min((one for one in set(found) if inside(block, [one])), key=len) for block in found]


def mark_float(graph_module: fx.GraphModule, blocks: Collection[str]) -> None:
    """Let every operator of these blocks stay in float, for all that quantizes the graph or a copy of it, in place."""
    for node in graph_module.graph.nodes:
        path = path_of(node)
        if path and inside(path, blocks):
            node.meta[_FLOAT] = True


def keep_all_but(graph_module: fx.GraphModule, block: str) -> None:
    """`mark_float` for everything outside one block."""
    for node in graph_module.graph.nodes:
        if not inside(path_of(node), [block]):
            node.meta[_FLOAT] = True


def in_float(node: fx.Node) -> bool:
    """Whether `mark_float` has exempted an operator."""
    return bool(node.meta.get(_FLOAT))
