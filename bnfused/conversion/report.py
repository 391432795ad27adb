"""``fusion_report`` says which op runs each batch norm of a model, and why not a larger one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfused.conversion.facts import NORMALIZE, SYNCHRONIZE, class_forward, drop_probability, is_bare, name_of
from bnfused.conversion.forwards import (
    BlockForward,
    NormalizingForward,
    called_from,
    fusing_forward,
)
from bnfused.conversion.model import SWAPS, inherits_forward
from bnfused.conversion.pending import FusedForward, Pending
from bnfused.conversion.preview import UNKNOWN, Preview


class FusionEntry(NamedTuple):
    """One batch norm of a model.

    ``op`` runs it: ``"batch_norm"`` or ``"sync_batch_norm"``, with ``"+add"`` and ``"+relu"`` (or another activation)
    if the same op does that too, or ``"torch"``. ``reason`` says why the op does no more. It is empty if the op ends
    in an activation.
    """

    name: str
    op: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """The result of ``fusion_report``; prints as a table."""

    entries: tuple[FusionEntry, ...]

    @property
    def counts(self) -> Counter[str]:
        """How many batch norms run as each op."""
        return Counter(entry.op for entry in self.entries)

    def __str__(self) -> str:
        names = max((len(entry.name) for entry in self.entries), default=0)
        ops = max((len(entry.op) for entry in self.entries), default=0)
        lines = [f"{entry.name:{names}}  {entry.op:{ops}}  {entry.reason}".rstrip() for entry in self.entries]
        total = ", ".join(f"{number} {op}" for op, number in self.counts.most_common())
        return "\n".join([*lines, f"{len(self.entries)} batch norms: {total or 'none'}"])


def fusion_report(model: nn.Module) -> FusionReport:
    """For each batch norm of a model, which op runs it, and why that op does no more.

    The answer is for the model as it is now, in training or in eval. It supposes that a residual has the shape, the
    dtype and the memory format of the tensor that it is added to.

    Args:
        model: any module, converted or not.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusion_report: expected a torch.nn.Module, got {type(model).__name__}")
    notes = _Notes()
    # Outer modules first: they know what follows the output of a child, and the child does not.
    for module in model.modules():
        notes.add(module)
    entries = []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if _is_ours(module):
            op, reason = notes.found.get(id(module), (_own_op(module), "no forward that could be rewritten calls it"))
        else:
            op, reason = "torch", _why_left_alone(module)
        entries.append(FusionEntry(name or "(the model)", op, reason))
    return FusionReport(tuple(entries))


def _is_ours(module: nn.Module) -> bool:
    """Whether the module is a batch norm that bnfused computes."""
    forward = module.__dict__.get("forward")
    return class_forward(module) in (NORMALIZE, SYNCHRONIZE) if forward is None else isinstance(forward, FusedForward)


def _own_op(module: nn.Module) -> str:
    forward = module.__dict__.get("forward")
    synchronized = forward.synchronized if isinstance(forward, NormalizingForward) else False
    is_synchronized = synchronized or class_forward(module) is SYNCHRONIZE
    return "sync_batch_norm" if is_synchronized else "batch_norm"


def _why_left_alone(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "somebody gave the module a forward"
    if type(module) in SWAPS or inherits_forward(type(module)):
        return "not converted"
    return f"{type(module).__name__} has a forward of its own, or changes an attribute that torch's reads"


class _Notes:
    """Collects the notes of a preview. The first note on a batch norm counts."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, str]] = {}
        self.preview = Preview(self.note, lambda module: isinstance(module, _BatchNorm) and _is_ours(module))

    def note(self, batch_norm: nn.Module, fused: str, why: Any) -> None:
        self.found.setdefault(id(batch_norm), (_own_op(batch_norm) + fused, _in_words(why)))

    def end(self, value: Any, why: str) -> None:
        """If a value is the output of a batch norm, note that one: nothing follows it."""
        if isinstance(value, Pending):
            self.preview.force(value, why)

    def add(self, module: nn.Module) -> None:
        """Note the batch norms that the forward of ``module`` itself calls."""
        forward = module.__dict__.get("forward")
        is_converted = isinstance(forward, FusedForward)
        if not is_converted:
            forward = fusing_forward(module)
        if forward is None:
            return
        name = type(module).__name__
        if not is_converted and forward.has_something_to_fuse():
            self.add_children(module, f"{name} was converted with fuse=False, or not at all")
        elif not isinstance(forward, BlockForward):
            self.end(forward.run((UNKNOWN,), {}, self.preview), _NOTHING_FOLLOWS)
        elif (twin := forward.twins.get(type(module).forward)) is not None:  # type: ignore[call-overload]
            required = twin.rewritten.tree.args
            count = len(required.posonlyargs) + len(required.args) - len(required.defaults) - 1
            self.end(self.preview.run_twin(twin, module, (UNKNOWN,) * count, {}), _NOTHING_FOLLOWS)
        else:
            self.add_children(module, f"the forward of {name} {forward.why_not or 'changed after conversion'}")

    def add_children(self, module: nn.Module, reason: str) -> None:
        for child in called_from(module):
            self.end(self.preview.call_module(child, UNKNOWN), reason)


_NOTHING_FOLLOWS = "nothing follows it in its module"


def _in_words(why: Any) -> str:
    if isinstance(why, str):
        return why
    if isinstance(why, nn.Module):
        if not is_bare(why):
            return f"{name_of(why)} has hooks, or a __call__ of its own"
        if drop_probability(why) is not None:
            return f"{name_of(why)} drops values in training"
    return f"followed by {name_of(why)}"
