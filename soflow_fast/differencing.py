"""The difference forward of any network, derived from the operators that it calls.

``F(x+dx, t+dt, s) − F(x, t, s)`` in one forward without cancellation: torch.export captures the network as a graph of
torch's operators, and each operator whose input changes gets its rule of :mod:`soflow_fast.difference_rules` beside it.
The graph is ordinary code: gradients flow through its value, and torch.compile compiles it.
"""

import io
import logging
import operator
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.traceback import get_current_meta

from soflow_fast.derivation import Derivation, Derived
from soflow_fast.difference_casts import inline_regions, regions, with_casts
from soflow_fast.difference_nonlinear import attention_with_dropout
from soflow_fast.difference_rules import NoRuleError, aten

_log = logging.getLogger(__name__)

_HERE = str(Path(__file__).parent)

# Among what is noted at a node: its call is replaced by what torch defines the operator by.
_REPLACED = "soflow_fast.replaced"

# A node for every step of them would be a graph without end.
_LOOPS = {aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu}


class ForwardDifference:
    """``forward_difference`` of a network ``net(x, t, s, labels)`` that has none of its own.

    The network must be what torch.export can capture, its operators must have rules, and what else it depends on than
    its inputs, parameters, buffers and modes must stay as it was at the capture. Activation checkpoints are lost.
    Forward hooks are called at the capture alone: what they make of the output stays, what else they do, such as record
    it, does not happen for the rows that carry a difference, and a warning says so.

    Under autocast the graph casts to float32 where the network does, and back; but if autocast changes which operators
    the network calls, such casts are dropped, and an ``eps`` or ``dtype=`` taken from a tensor's dtype is float32's.

    Args:
        net: captured anew for every form of its inputs, and when modules, their hooks, modes or dtypes change.
        method: that is captured and called; of one that returns several tensors, as ``forward_with_velocity`` does,
            the first alone has a difference, and F is all of them.
        impl: of what has a fused op, where the inputs are on a GPU; see :func:`soflow_fast.kernels.resolve_impl`.
    """

    def __init__(self, net: nn.Module, impl: str = "auto", method: str = "forward"):
        self.net, self.impl = net, impl
        self._called = net if method == "forward" else _Method(net, method)
        self._structure: tuple = ()
        self._derived: dict[tuple, Derived] = {}
        self._warned = False

    def prepare(self, x: Tensor, labels: Tensor | None, mode: str = "difference") -> None:
        """Captures the network for inputs of this form, of which the values do not matter.

        Args:
            x: (b, C, H, W), of the rows that carry a difference. labels: (n,) or (n, 1+k), or None.

        Raises:
            ValueError: if the network cannot be captured, or calls an operator that has no rule.
        """
        structure = _structure(self.net)
        if structure != self._structure:
            self._structure, self._derived = structure, {}
        key = _form(x, labels, mode)
        if len(x) and key not in self._derived:
            self._derived[key] = _derive(self._called, _inputs(x, labels), mode == "tangent", self.impl)
            self._warn_of_hooks()

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
        if start == stop:
            return self._called(x, t, s, labels), dx.detach()
        before, here, after = (
            (x[part], t[part], s[part], None if labels is None else labels[part])
            for part in (slice(0, start), slice(start, stop), slice(stop, None))
        )
        key = _form(here[0], labels, mode)
        if not torch.compiler.is_compiling():
            self.prepare(here[0], labels, mode)
        elif key not in self._derived:
            raise RuntimeError("the difference forward must be prepared before it is compiled; call prepare")
        derived = self._derived[key]
        held = [operator.attrgetter(name)(self._called) for name in derived.names]
        F, dF = derived.run(*held, *(z for z in (*here, dx, dt) if z is not None))
        parts = [self._called(*before)] if start else []
        parts += [F, self._called(*after)] if stop < len(x) else [F]
        return _joined(parts), dF

    def _warn_of_hooks(self) -> None:
        hooked = next((name for name, module in self.net.named_modules() if _hooks(module)), None)
        if hooked is not None and not self._warned:
            self._warned = True
            _log.warning(
                "the network %s has forward hooks (first on %r), which are not called for the rows that carry a "
                "difference: what they make of the output was captured, anything else they do is left out",
                type(self.net).__name__,
                hooked,
            )

    def __getstate__(self) -> dict:
        return {**vars(self), "_structure": (), "_derived": {}}  # graphs are made again


class _Method(nn.Module):
    """A method of a network, as a module that torch.export takes."""

    def __init__(self, net: nn.Module, method: str):
        super().__init__()
        self.net, self.method = net, method

    def forward(self, *inputs):
        return getattr(self.net, self.method)(*inputs)


def _joined(parts: list) -> Tensor | tuple[Tensor, ...]:
    """The outputs for some rows after another, each a tensor or a tuple of them."""
    if len(parts) == 1:
        return parts[0]
    return tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else torch.cat(parts)


def draws(net: nn.Module, x: Tensor, labels: Tensor | None) -> bool:
    """Whether a forward takes numbers from torch's generator, as dropout does; inputs as of :meth:`prepare`."""
    state = partial(torch.cuda.get_rng_state, x.device) if x.is_cuda else torch.get_rng_state
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), left_as_it_was(net, x.device):
        before = state()
        net(*_inputs(x, labels))
        return not torch.equal(before, state())


def _inputs(x: Tensor, labels: Tensor | None) -> tuple:
    t, s = x.new_zeros(len(x)), x.new_zeros(len(x))  # of one tensor for both a graph would make one input
    return x.detach(), t, s, None if labels is None else labels.new_zeros(len(x), *labels.shape[1:])


def _form(x: Tensor, labels: Tensor | None, mode: str) -> tuple:
    of_labels = None if labels is None else (labels.dtype, *labels.shape[1:])
    return tuple(x.shape), x.dtype, str(x.device), of_labels, mode


def _hooks(module: nn.Module) -> tuple:
    """What tells its forward hooks apart."""
    return (*vars(module).get("_forward_pre_hooks", ()), *vars(module).get("_forward_hooks", ()))


def _structure(net: nn.Module) -> tuple:
    """What a captured graph takes for granted of the modules."""
    found, first, waiting = [], {}, [("", net)]
    for name, m in waiting:  # in a loop of its own: named_modules and what it takes to miss an attribute are slow
        found.append((name, type(m), m.training, vars(m).get("p"), _hooks(m)))
        waiting += [child for child in m._modules.items() if child[1] is not None]
        held = [named for holder in (m._parameters, m._buffers) for named in holder.items() if named[1] is not None]
        found += [(key, x.dtype, first.setdefault(id(x), len(first))) for key, x in held]  # which of them are tied
    return tuple(found)


def _derive(net: nn.Module, inputs: tuple, tangent: bool, impl: str) -> Derived:
    name, x = type(net.net if isinstance(net, _Method) else net).__name__, inputs[0]
    kind = "cpu" if x.device.type == "meta" else x.device.type  # meta has no autocast to turn off
    with torch.autocast(kind, enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's copy of its own graphs
        _run_once(net, inputs)
        try:
            program, casts = with_casts(_captured(net, inputs), partial(_captured, net, inputs), kind)
        except Exception as error:  # torch.export raises whatever the network does
            why = f"{_in_a_line(error)}{_where(error)}"
            raise ValueError(f"{name} cannot be captured by torch.export ({why})") from error
        _detach_what_has_no_gradient(program)
        inline_regions(program, name, kind, casts)
        program = program.run_decompositions({aten.scaled_dot_product_attention.default: attention_with_dropout})
        signature = program.graph_signature
        for changed in (signature.buffers_to_mutate, signature.parameters_to_mutate, signature.user_inputs_to_mutate):
            if changed:
                what = next(iter(changed.values()))
                raise ValueError(f"{name} changes {what!r} in its forward, which a difference forward cannot")
        try:
            return _derived(program, name, tangent, impl)
        except ValueError:
            raise
        except Exception as error:  # of a rule, tried on arguments it was not made for
            raise ValueError(f"{name} calls an operator in a way that has no rule ({_in_a_line(error)})") from error


def _captured(net: nn.Module, inputs: tuple) -> ExportedProgram:
    with _quiet_in_failure(), torch.enable_grad():  # else regions without gradient would not show
        return torch.export.export(net, inputs, strict=False)


@contextmanager
def _quiet_in_failure() -> Iterator[None]:
    """Of a network that cannot be captured torch prints the whole graph; the error that it raises is told elsewhere."""
    loggers = [logging.getLogger(name) for name in ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")]
    before, printed = [logger.disabled for logger in loggers], io.StringIO()
    for logger in loggers:
        logger.disabled = True
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())  # which is then the network's own
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _derived(program: ExportedProgram, name: str, tangent: bool, impl: str) -> Derived:
    """Operators that have no rule, and those calls that a rule refuses, are replaced by what torch defines them by."""
    definitions, refusal = None, None
    while True:
        try:
            return Derivation(program, name, tangent, impl).derive()
        except Exception as error:
            found = isinstance(error, NoRuleError) and error.operator.overloadpacket not in _LOOPS
            if found and definitions is None:  # slow to make, and mostly not needed
                definitions = dict(torch.export.default_decompositions().items())
            definition = definitions.pop(error.operator, None) if found else None
            refusal = refusal or (error if found and error.refused else None)
            if definition is None:  # what an operator was refused for says more than what is amiss inside of it
                raise error if refusal in (None, error) else refusal from error
            program = program.run_decompositions({error.operator: _of_calls(definition, error.calls)})


def _of_calls(definition: Callable, calls: Sequence[Node]) -> Callable:
    """An operator's definition for these of its calls; NotImplemented for others, by which torch keeps them.

    Where there are none, it is for every call.
    """
    for node in calls:
        node.meta[_REPLACED] = True

    def of_call(*args, **kwargs):
        return definition(*args, **kwargs) if _REPLACED in get_current_meta() else NotImplemented

    return of_call if calls else definition


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _where(error: BaseException) -> str:
    """The place outside of torch that an error comes from."""
    frames, torch_folder = traceback.extract_tb(error.__traceback__), str(Path(torch.__file__).parent)
    own = [f for f in frames if not f.filename.startswith((torch_folder, _HERE, "<"))]
    return f", at {own[-1].filename}:{own[-1].lineno}" if own else ""


def _run_once(net: nn.Module, inputs: tuple) -> None:
    """A forward as it is: what the network keeps of its first one are tensors then, and not stand-ins for them.

    Of all rows, on whose number that may depend; but nothing is saved for a backward that never comes.

    Raises:
        ValueError: if the result is not one tensor (of a method, tensors), or has gradients of its own making.
    """
    several = isinstance(net, _Method)
    name = f"{type(net.net).__name__}.{net.method}" if several else type(net).__name__
    nothing = torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda saved: saved)
    with torch.enable_grad(), left_as_it_was(net, inputs[0].device):
        try:
            with nothing:
                out = net(*inputs)
        except TypeError:  # it differentiates in its forward, and needs what was not saved
            out = net(*inputs)
    outputs = out if several and isinstance(out, tuple) else (out,)
    if several != isinstance(out, tuple) or not all(isinstance(one, Tensor) for one in outputs):
        wanted = "a tuple of tensors" if several else "one tensor that depends on x"
        raise ValueError(f"{name} must return {wanted}; it returns a {type(out).__name__}")
    for node in (node for one in outputs for node in _graph_of(one)):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise ValueError(f"{name} calls an autograd.Function, {node.name()}, whose gradient would be lost")


@contextmanager
def left_as_it_was(net: nn.Module, device: torch.device) -> Iterator[None]:
    """After it the buffers of a network, and the generators of the CPU and of a device, are as they were before."""
    modules = [(m, name, b) for m in net.modules() for name, b in m.named_buffers(recurse=False)]
    before = [(*where, b, b._version, b.detach().clone()) for *where, b in modules]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, name, buffer, version, value in before:
            setattr(module, name, buffer)  # a forward may also assign another one
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


def _graph_of(out: Tensor) -> Iterator:
    """The nodes of its backward."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def _detach_what_has_no_gradient(program: ExportedProgram) -> None:
    """Detaches the results of regions under torch.no_grad, of which nothing else would be left."""
    for module, node, _ in list(regions(program, "wrap_with_set_grad_enabled")):
        if node.args[0] is not False:
            continue
        for result in list(node.users):
            with module.graph.inserting_after(result):
                detached = module.graph.call_function(aten.detach.default, (result,))
            detached.meta.update(result.meta)
            result.replace_all_uses_with(detached, delete_user_cb=lambda user, own=detached: user is not own)
        module.recompile()
