"""The difference forward of any network, derived from the operators that it calls.

``F(x+dx, t+dt, s) − F(x, t, s)`` in one forward without cancellation: torch.export captures the network as a graph of
torch's operators, and each operator whose input changes gets its rule of :mod:`soflow_fast.difference_rules` beside it.
The graph is ordinary code: gradients flow through its value, and torch.compile compiles it.
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from soflow_fast import kernels
from soflow_fast.difference_rules import RULES, aten

# Only names of sizes and strides as they were when captured; of another attention or dtype strides may differ.
_RESHAPES = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}

# What depends on the form of an argument alone.
_OF_FORM = {aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like}
_OF_FORM |= {aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty}

# What autocast rounds the operands of: a region that keeps them in float32 cannot be told in the graph.
_PRODUCTS = (aten.linear, aten.matmul, aten.mm, aten.bmm, aten.einsum, aten.conv2d, aten.scaled_dot_product_attention)


class _Captured(NamedTuple):
    """A network's graph with differences, and the names of the parameters and buffers that it takes first."""

    run: fx.GraphModule
    names: tuple[str, ...]


class ForwardDifference:
    """``forward_difference`` of a network ``net(x, t, s, labels)`` that has none of its own.

    The network must be what torch.export can capture and its operators must have rules. The custom backward of an
    autograd.Function and activation checkpoints are lost in the captured graph, which computes the same numbers.

    Args:
        net: captured anew for every shape and dtype of its inputs.
    """

    def __init__(self, net: nn.Module):
        self._net = net
        self._captured: dict[tuple, _Captured] = {}

    def prepare(self, x: Tensor, labels: Tensor | None, mode: str = "difference") -> None:
        """Captures the network for inputs of this form, of which the values do not matter.

        Args:
            x: (b, C, H, W), of the rows that carry a difference. labels: int64, or None.

        Raises:
            ValueError: if the network cannot be captured, or calls an operator that has no rule.
        """
        key = self._key(x, labels, mode)
        if key not in self._captured:
            t, s = x.new_zeros(len(x)), x.new_zeros(len(x))  # of one tensor for both the graph would make one input
            labels = None if labels is None else labels.new_zeros(len(x))
            self._captured[key] = _capture(self._net, (x, t, s, labels), mode == "tangent")

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        dx: Tensor,
        dt: Tensor,
        *,
        rows: slice | None = None,
        mode: str = "difference",
    ) -> tuple[Tensor, Tensor]:
        """``(F, dF)``; arguments and results as :meth:`soflow_fast.DiT.forward_difference`.

        Raises:
            ValueError: as :meth:`prepare`, which this calls.
            RuntimeError: if it is being compiled and was not prepared.
        """
        rows = rows or slice(None)
        start, stop = rows.start or 0, len(x) if rows.stop is None else rows.stop
        before, here, after = (
            (x[part], t[part], s[part], None if labels is None else labels[part])
            for part in (slice(0, start), slice(start, stop), slice(stop, None))
        )
        key = self._key(here[0], labels, mode)
        if key not in self._captured:
            if torch.compiler.is_compiling():
                raise RuntimeError("the difference forward must be prepared before it is compiled; call prepare")
            self.prepare(here[0], labels, mode)
        captured = self._captured[key]
        held = [operator.attrgetter(name)(self._net) for name in captured.names]
        F, dF = captured.run(*held, *(z for z in (*here, dx, dt) if z is not None))
        parts = [self._net(*before)] if start else []
        parts += [F, self._net(*after)] if stop < len(x) else [F]
        return torch.cat(parts) if len(parts) > 1 else F, dF

    def _key(self, x: Tensor, labels: Tensor | None, mode: str) -> tuple:
        return tuple(x.shape), x.dtype, str(x.device), labels is None, mode, self._net.training


def _capture(net: nn.Module, inputs: tuple, tangent: bool) -> _Captured:
    name = type(net).__name__
    try:
        with torch.no_grad():
            program = torch.export.export(net, inputs, strict=False)
    except Exception as error:  # torch.export raises whatever the network does
        raise ValueError(f"{name} cannot be captured by torch.export ({_first_line(error)})") from error
    _require_no_autocast(program, name)
    program = program.run_decompositions({})
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        changed = next(iter(signature.buffers_to_mutate.values()))
        raise ValueError(f"{name} changes its buffer {changed!r} in a forward, which a difference forward cannot")
    return _Derivation(program, name, tangent).derive()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _require_no_autocast(program: ExportedProgram, name: str) -> None:
    for node in program.graph.nodes:
        if "autocast" not in str(node.target) or node.op != "call_function":
            continue
        region = getattr(program.graph_module, node.args[4].target)
        for inner in region.graph.nodes:
            if getattr(inner.target, "overloadpacket", None) in _PRODUCTS:
                raise ValueError(f"{name} has a region with an autocast of its own around {inner.target}")


class _Derivation:
    """A program's graph with, beside every node that changes with x and t, the node of its difference.

    Args:
        program: of the network called ``name``, functional. tangent: of the rules.
    """

    def __init__(self, program: ExportedProgram, name: str, tangent: bool):
        self.program, self.name, self.tangent = program, name, tangent
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.differences: dict[fx.Node, fx.Node] = {}

    def derive(self) -> _Captured:
        """The graph that takes (parameters and buffers, inputs, dx, dt) and returns ``(F, dF)``."""
        signature, constants = self.program.graph_signature, nn.Module()
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        fixed = signature.inputs_to_lifted_tensor_constants
        given = [
            node
            for node in self.program.graph.find_nodes(op="placeholder")
            if node.name not in fixed and isinstance(node.meta["val"], Tensor)  # and not labels=None
        ]
        x, t = [node for node in given if node.name not in held][:2]
        for node in given:
            self.values[node] = self.graph.placeholder(node.name)
        for node, name in ((x, "dx"), (t, "dt")):
            self.differences[node] = self.graph.placeholder(name)
        self.on_gpu = x.meta["val"].is_cuda
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in fixed:
                constants.register_buffer(node.name, self.program.constants[fixed[node.name]])
                self.values[node] = self.graph.get_attr(node.name)
            elif node.op == "get_attr":
                raise ValueError(f"{self.name} has a region, {node.target!r}, that cannot be looked into")
            elif node.op == "call_function" and "_assert" not in str(node.target):  # of dtypes, which autocast changes
                self._add(node)
        output = self.program.graph.output_node().args[0]
        if len(output) != 1 or output[0] not in self.differences:
            raise ValueError(f"{self.name} must return one tensor that depends on x")
        self.graph.output((self.values[output[0]], self.differences[output[0]]))
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(constants, self.graph)
        examples = [node.meta["val"] for node in (*given, x, t)]
        with examples[0].fake_mode:
            module(*examples)  # a rule that does not apply is found here
        return _Captured(module, tuple(held[node.name] for node in given if node.name in held))

    def _add(self, node: fx.Node) -> None:
        """An operator and, if what it computes changes, its rule."""
        target = _RESHAPES.get(node.target, node.target)
        arguments, keywords = fx.node.map_arg((node.args, node.kwargs), self.values.get)
        self.values[node] = self.graph.call_function(target, arguments, keywords)
        packet = getattr(target, "overloadpacket", None)
        moving = tuple(self._moving(argument) for argument in node.args)
        if packet in _OF_FORM or not any(d is not None for d in moving):
            return
        out = node.meta["val"]
        if target is operator.getitem:
            if out.is_floating_point():
                self.differences[node] = self.graph.call_function(target, (moving[0], arguments[1]))
            return
        if packet not in RULES or self._moving(tuple(node.kwargs.values())) is not None:
            raise ValueError(
                f"{self.name} calls {target}, which has no rule; add one to soflow_fast.difference_rules.RULES"
            )
        if isinstance(out, Tensor) and not out.is_floating_point():
            raise ValueError(f"{self.name} makes {out.dtype} of what changes, by {target}")
        self.differences[node] = self.graph.call_function(
            self._rule(target), (self.values[node], arguments, moving), keywords
        )

    def _moving(self, argument):
        """The differences inside an argument, in its structure; None where nothing in it changes."""
        if isinstance(argument, fx.Node):
            return self.differences.get(argument)
        if isinstance(argument, (list, tuple)):
            inside = [self._moving(a) for a in argument]
            return inside if any(d is not None for d in inside) else None
        return None

    def _rule(self, target):
        """An operator's rule as a function of its output, its arguments and their differences."""
        rule, tangent, chosen = RULES[target.overloadpacket], self.tangent, {}
        if target.overloadpacket is aten.scaled_dot_product_attention and self.on_gpu:
            chosen = {"ops": kernels.ops(kernels.resolve_impl("auto"))}

        def difference(out, arguments, differences, **keywords):
            with torch.no_grad():
                return rule(target, out, arguments, differences, tangent, **chosen, **keywords)

        return difference
