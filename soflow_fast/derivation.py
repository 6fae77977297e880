"""From a network's graph of torch's operators to the graph of its value and its difference."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from soflow_fast import difference_nonlinear, kernels  # noqa: F401, the rules that it registers
from soflow_fast.difference_rules import RULES, NoRuleError, aten, value_of

# Only names of sizes and strides as they were when captured; of another attention or dtype strides may differ.
_RESHAPES = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}

# What depends on the form of an argument alone.
_OF_FORM = {aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like}
_OF_FORM |= {aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.sym_size, aten.sym_numel}


#: Among what is noted at a node that a network computes with autocast turned off: for which type of device.
OWN_AUTOCAST = "soflow_fast.own_autocast"


class Derived(NamedTuple):
    """A network's graph with differences, and the names of the parameters and buffers that it takes first."""

    run: fx.GraphModule
    names: tuple[str, ...]


def _without_autocast(function: Callable, kind: str) -> Callable:
    def run(*arguments, **keywords):
        with torch.autocast(kind, enabled=False):
            return function(*arguments, **keywords)

    return run


class _Trial(fx.Interpreter):
    """Runs a graph with differences; calls that a rule refuses are kept, and run on as if their output stayed."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.refused: dict[fx.Node, NoRuleError] = {}
        self.extra_traceback = False  # it would be part of an error's message

    def run_node(self, n: fx.Node):
        try:
            return super().run_node(n)
        except NoRuleError as error:
            self.refused[n] = error
            (out, *_), _ = self.fetch_args_kwargs_from_env(n)
            return tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, out)


class Derivation:
    """A program's graph with, beside every node that changes with x and t, the node of its difference.

    Args:
        program: of the network called ``name``, functional. tangent: of the rules. impl: of what has a fused op.
    """

    def __init__(self, program: ExportedProgram, name: str, tangent: bool, impl: str):
        self.program, self.name, self.tangent, self.impl = program, name, tangent, impl
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.differences: dict[fx.Node, fx.Node] = {}

    def derive(self) -> Derived:
        """The graph that takes (parameters and buffers, inputs, dx, dt) and returns ``(F, dF)``.

        Of several outputs F is all of them, and dF the difference of the first.

        Raises:
            NoRuleError: for an operator without a rule, or for one whose rule refuses some of its calls, with these.
            ValueError: for what else cannot be derived.
        """
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
        outputs = self.program.graph.output_node().args[0]
        if outputs[0] not in self.differences:
            raise ValueError(f"{self.name} must return one tensor that depends on x")
        values = tuple(self.values[output] for output in outputs)
        self.graph.output((values[0] if len(values) == 1 else values, self.differences[outputs[0]]))
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(constants, self.graph)
        examples = [node.meta["val"] for node in (*given, x, t)]
        trial = _Trial(module)
        with examples[0].fake_mode:
            trial.run(*examples)  # a rule that does not apply is found here
        if trial.refused:
            error, calls = next(iter(trial.refused.values())), {d: node for node, d in self.differences.items()}
            error.calls = [calls[d] for d, other in trial.refused.items() if other.operator is error.operator]
            raise error
        return Derived(module, tuple(held[node.name] for node in given if node.name in held))

    def _add(self, node: fx.Node) -> None:
        """An operator and, if what it computes changes, its rule."""
        target = _RESHAPES.get(node.target, node.target)
        arguments, keywords = fx.node.map_arg((node.args, node.kwargs), self.values.get)
        packet = getattr(target, "overloadpacket", None)
        kind = node.meta.get("custom", {}).get(OWN_AUTOCAST)
        run = value_of(target) if packet else target
        value = self.graph.call_function(run if kind is None else _without_autocast(run, kind), arguments, keywords)
        value.meta["operator"], self.values[node] = target, value
        moving = tuple(self._moving(argument) for argument in node.args)
        if packet in _OF_FORM or not any(d is not None for d in moving):
            return
        out = node.meta["val"]
        if target is operator.getitem:
            if out.is_floating_point() or out.is_complex():
                self.differences[node] = self.graph.call_function(target, (moving[0], arguments[1]))
            elif node.users:
                self._refuse_choice(out, node.args[0].target)
            return
        if isinstance(out, Tensor) and not (out.is_floating_point() or out.is_complex()):
            self._refuse_choice(out, target)
        if packet not in RULES or self._moving(tuple(node.kwargs.values())) is not None:
            where = "add one to soflow_fast.difference_rules.RULES"
            raise NoRuleError(f"{self.name} calls {target}, which has no rule; {where}", target)
        if isinstance(out, Tensor) and out.dtype == torch.float16:
            raise ValueError(f"{self.name} makes {out.dtype} of what changes, by {target}")
        rule = self._rule(target)
        rule = rule if kind is None else _without_autocast(rule, kind)
        self.differences[node] = self.graph.call_function(rule, (self.values[node], arguments, moving), keywords)

    def _refuse_choice(self, out: Tensor, by) -> None:
        raise ValueError(
            f"{self.name} makes {out.dtype} of what changes, by {by}; choices that depend on x or t have no difference"
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
            chosen = {"ops": kernels.ops(kernels.resolve_impl(self.impl))}

        def difference(out, arguments, differences, **keywords):
            with torch.no_grad():
                return rule(target, out, arguments, differences, tangent, **chosen, **keywords)

        return difference
