"""Casts of a captured network: those that it makes, and the regions in which it turns autocast off."""

import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_structure, tree_unflatten

from soflow_fast.derivation import OWN_AUTOCAST
from soflow_fast.difference_rules import CAST, aten

# What autocast rounds the operands of.
_PRODUCTS = {aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.einsum}
_PRODUCTS |= {getattr(aten, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)}
_PRODUCTS |= {aten.scaled_dot_product_attention}


def with_casts(
    program: ExportedProgram, capture: Callable[[], ExportedProgram], kind: str
) -> tuple[ExportedProgram, bool]:
    """The program, with its casts to float32 as they are under autocast too, where most are none without; and whether
    it has them all.

    What a network casts by ``h.float()`` stays float32, and what it casts by ``to(h.dtype)`` follows autocast: a second
    capture, in bfloat16, tells them apart. Where that is of other operators, or none, the casts are dropped.

    Args:
        capture: captures the network again. kind: of device.
    """
    if not any(_casts_to_float32(node) for node in _nodes(program)):
        return program, True
    try:
        with torch.autocast(kind, torch.bfloat16):
            low = capture()
    except Exception:  # whatever a network does that is not made for autocast
        return program, False
    nodes, there = _nodes(program), _nodes(low)
    if len(nodes) != len(there) or not all(map(_alike, nodes, there)):
        return program, False
    for node, own in zip(there, nodes, strict=True):
        if "_assert_tensor_metadata" in str(node.target):  # of dtypes
            node.graph.erase_node(node)
        elif _casts_to_float32(own):
            follows = node.meta["val"].dtype != torch.float32
            node.target, node.args, node.kwargs = CAST.default, (node.args[0], torch.float32, follows), {}
        else:  # numbers, such as an eps, and dtypes are those of float32
            (given, form), (wanted, _) = map(tree_flatten, ((node.args, node.kwargs), (own.args, own.kwargs)))
            kept = [a if isinstance(a, Node) else b for a, b in zip(given, wanted, strict=True)]
            node.args, node.kwargs = tree_unflatten(kept, form)
    for module in (m for m in low.graph_module.modules() if isinstance(m, GraphModule)):
        module.recompile()
    return low, True


def _nodes(program: ExportedProgram) -> list[Node]:
    """The inputs and calls, in regions too; not what goes in and out of regions, which differs between two captures."""
    modules = (m for m in program.graph_module.modules() if isinstance(m, GraphModule))
    calls = [node for m in modules for node in m.graph.nodes if node.op == "call_function" and not _of_region(node)]
    return program.graph.find_nodes(op="placeholder") + calls


def _of_region(node: Node) -> bool:
    call = node.args[0] if node.target is operator.getitem else node
    return isinstance(call.target, torch._ops.HigherOrderOperator)


def _alike(a: Node, b: Node) -> bool:
    """Whether nodes of two captures are of the same call; inputs and constants, of the same dtype too."""
    if a.op == "placeholder" and isinstance(a.meta.get("val"), Tensor) and a.meta["val"].dtype != b.meta["val"].dtype:
        return False
    forms = (tree_structure((node.args, node.kwargs)) for node in (a, b))
    return (a.op, str(a.target)) == (b.op, str(b.target)) and next(forms) == next(forms)


def _casts_to_float32(node: Node) -> bool:
    if getattr(node.target, "overloadpacket", None) is not aten.to:
        return False
    source, out = (n.meta["val"] for n in (node.args[0], node))
    return out.dtype == torch.float32 and source.device == out.device


def regions(program: ExportedProgram, kind: str) -> Iterator[tuple]:
    """The graphs that have regions of a kind, their nodes, and the region's own graphs."""
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            yield from _regions_of(module, kind)


def _regions_of(module: GraphModule, kind: str) -> Iterator[tuple]:
    for node in module.graph.nodes:
        if node.op == "call_function" and kind in str(node.target):
            inside = next(a for a in node.args if getattr(a, "op", None) == "get_attr")
            yield module, node, getattr(module, inside.target)


def inline_regions(program: ExportedProgram, name: str, kind: str, casts: bool) -> None:
    """Puts the nodes of regions in the place of their calls, and marks those that a network computes without autocast,
    which would else follow the autocast around them.

    A region that turns autocast on stays: torch writes its casts into the graph.

    Args:
        kind: of device. casts: whether those of the program are known.

    Raises:
        ValueError: if products are computed without autocast where that cannot be told.
    """
    modules = [m for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    cast = [
        region for _, call, region in regions(program, "wrap_with_autocast") if call.args[0] == kind and call.args[2]
    ]
    for module in reversed(modules):  # inner ones first
        for _, call, region in list(_regions_of(module, "wrap_with_")):
            if any(region is other for other in cast):
                continue
            if "autocast" in str(call.target) and call.args[0] == kind:
                why = None if casts else "and calls other operators under autocast, so that its casts are not known"
                why = "inside of a region that turns it on" if any(module is other for other in cast) else why
                _mark_without_autocast(region, name, kind, why)
            _inline(module, call, region)
        module.graph.lint()
        module.recompile()


def _mark_without_autocast(region: GraphModule, name: str, kind: str, refused: str | None) -> None:
    for node in region.graph.nodes:
        if refused and getattr(node.target, "overloadpacket", None) in _PRODUCTS:
            raise ValueError(f"{name} turns autocast off around {node.target}, {refused}")
        node.meta["custom"] = {OWN_AUTOCAST: kind, **node.meta.get("custom", {})}


def _inline(module: GraphModule, call: Node, region: GraphModule) -> None:
    given = call.args[1 + next(i for i, a in enumerate(call.args) if getattr(a, "op", None) == "get_attr") :]
    copies = dict(zip(region.graph.find_nodes(op="placeholder"), given, strict=True))
    with module.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op not in ("placeholder", "output"):
                copies[node] = module.graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":  # a region inside of it
                copies[node].target = f"{call.name}_{node.target}"
                setattr(module, copies[node].target, getattr(region, node.target))
    results = region.graph.output_node().args[0]
    for item in list(call.users):
        item.replace_all_uses_with(copies[results[item.args[1]]])
        module.graph.erase_node(item)
    module.graph.erase_node(call)
