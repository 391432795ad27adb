"""``convert`` a network to fused batch norm, ``revert`` it, and report what is fused.

Two things are changed in a network, and neither adds state. A batch norm of torch becomes bnfused's by its class alone.
And a module that can fuse a batch norm with what follows it gets a ``forward``, as an attribute that hides its class's.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfused import modules
from bnfused.blocks import BlockForward, Plan
from bnfused.fusion import (
    NOTHING,
    BatchNormForward,
    Execution,
    Forward,
    NormActForward,
    NormalizingForward,
    SequenceForward,
    Then,
    batch_norm_at_end,
    drop_probability,
    is_bare,
    is_batch_norm,
    is_sequence,
    is_synchronized,
    run,
)
from bnfused.sync import SyncBatchNorm

_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_BACK = {ours: theirs for theirs, ours in _SWAPS.items()}

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model, *, fuse: bool = True, inplace: bool = False, sync: bool = False, process_group: Any = None
) -> Model:
    """The network with bnfused's batch norm in place of torch's; its results stay what they are, up to rounding.

    Parameters, buffers, hooks, names, ``state_dict`` and the classes of all other modules are kept. A subclass of
    torch's batch norm keeps its class; one with a forward of its own is left alone, except timm's ``BatchNormAct2d``,
    which becomes one fused op. What was left alone, ``fusion_report`` tells.

    Args:
        model: any module; converting a converted one is harmless, and finds what was changed since.
        fuse: also run batch norm and the activation, the add, or both that follow it as one op, inside
            ``nn.Sequential`` and inside blocks whose forward is proven to do the same in every call.
        inplace: convert ``model`` itself instead of a deep copy. Process groups are not copied.
        sync: make every batch norm a ``bnfused.SyncBatchNorm``, or have it compute as one. Without it,
            ``torch.nn.SyncBatchNorm`` becomes one all the same, and the others keep to their process.
        process_group: whose statistics, with ``sync``; None means all processes, and for a batch norm that was
            synchronized before, the group that it has.

    Returns:
        The converted model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``process_group`` without ``sync``; or ``sync`` with a lazy batch norm that has seen no batch yet.
            The model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected a torch.nn.Module, got {type(model).__name__}")
    if process_group is not None and not sync:
        raise ValueError("convert: expected sync=True beside process_group, got sync=False")
    if sync:
        _refuse_lazy(model)
    if not inplace:
        model = _copied(model)
    # Children before the modules that call them: whether a block ends in a batch norm depends on its children.
    for module in reversed(list(model.modules())):
        _swap(module)
        if sync:
            _synchronize(module, process_group)
        if fuse:
            _fuse(module)
    return model


def revert(model: Model, *, inplace: bool = False) -> Model:
    """The network as it was before ``convert``: torch's batch norms, and every class's own forward.

    Every batch norm of bnfused becomes torch's, also one that was not made by ``convert``: a forward that asks it for
    an activation has to be changed by hand. ``torch.nn.SyncBatchNorm`` keeps a process group that ``convert`` gave it.

    Args:
        model: any module.
        inplace: change ``model`` itself instead of a deep copy.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: expected a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = _copied(model)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Forward):
            del module.__dict__["forward"]
        if isinstance(module, SyncBatchNorm):
            _desynchronize(module)
        if type(module) in _BACK:
            module.__class__ = _BACK[type(module)]
    return model


def _copied(model: Model) -> Model:
    """A deep copy that shares the process groups, which cannot be copied."""
    groups = []
    for module in model.modules():
        holder: Any = module.__dict__.get("forward")
        if isinstance(module, (nn.SyncBatchNorm, SyncBatchNorm)):
            holder = module
        if holder is module or isinstance(holder, NormalizingForward):
            groups.append(holder.process_group)
    return copy.deepcopy(model, {id(group): group for group in groups if group is not None})


def _refuse_lazy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)):
            raise ValueError(
                f"convert: with sync, expected batch norms that know their channels, got {type(module).__name__} at "
                f"{name or 'the top'}; run the model once first"
            )


def _swap(module: nn.Module) -> None:
    if type(module) in _SWAPS:
        module.__class__ = _SWAPS[type(module)]
    elif isinstance(module, _BatchNorm) and "forward" not in module.__dict__:
        if _is_timm_norm_act(module):
            _give_forward(module, NormActForward(module))
        elif _inherits_forward(type(module)):
            _give_forward(module, BatchNormForward(module))


def _synchronize(module: nn.Module, process_group: Any) -> None:
    forward = module.__dict__.get("forward")
    if isinstance(forward, NormalizingForward):
        forward.synchronized = True
        if process_group is not None:
            forward.process_group = process_group
    elif type(module) is SyncBatchNorm:
        if process_group is not None:
            module.process_group = process_group
    elif type(module) in _BACK:
        module.__dict__.update(converted_from=_BACK[type(module)], process_group=process_group)
        module.__class__ = SyncBatchNorm


def _desynchronize(module: SyncBatchNorm) -> None:
    """Its class is what it was, or torch's; what it had as a ``SyncBatchNorm`` is gone."""
    module.__dict__.pop("check_ranks", None)
    cls = module.__dict__.pop("converted_from", None)
    if cls is not None:
        del module.__dict__["process_group"]
        module.__class__ = cls


def _inherits_forward(cls: type[nn.Module]) -> bool:
    """Whether a subclass of torch's batch norm computes as that does: it changes nothing that forward looks at."""
    looked_at = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "__getattribute__")
    return (
        cls.forward is _BatchNorm.forward
        and cls.__getattr__ is nn.Module.__getattr__
        and not any(name in base.__dict__ for base in cls.__mro__ if base is not object for name in looked_at)
    )


def _is_timm_norm_act(module: nn.Module) -> bool:
    """timm's batch norm, drop and activation in one module; by name, so that timm need not be there."""
    cls = type(module)
    return (cls.__module__, cls.__qualname__) == ("timm.layers.norm_act", "BatchNormAct2d")


def _fuse(module: nn.Module) -> None:
    present = module.__dict__.get("forward")
    if isinstance(present, (SequenceForward, BlockForward)):
        del module.__dict__["forward"]
    forward = _fusing_forward(module)
    if forward is not None and forward.has_something_to_fuse():
        _give_forward(module, forward)


def _give_forward(module: nn.Module, forward: Forward) -> None:
    module.__dict__["forward"] = forward


def _fusing_forward(module: nn.Module) -> SequenceForward | BlockForward | None:
    """The forward that could fuse what the module's own does with its children."""
    if "forward" in module.__dict__ or isinstance(module, _BatchNorm):
        return None
    if is_sequence(module):
        return SequenceForward(module)
    if type(module).__module__.startswith("torch.") or not any(map(batch_norm_at_end, _called_from(module))):
        return None
    return BlockForward(module)


def _called_from(module: nn.Module) -> Iterator[nn.Module]:
    """The children that a forward can call, also from a list of them."""
    for child in module.children():
        yield from child.children() if type(child) in (nn.ModuleList, nn.ModuleDict) else (child,)


# ------------------------------------------------------------------------------------------------- the report


class FusionEntry(NamedTuple):
    """One batch norm of a model.

    ``op`` is what runs it: ``"batch_norm"`` or ``"sync_batch_norm"``, with ``"+add"`` and ``"+relu"`` (or another
    activation) where that is in the same op, or ``"torch"``. ``reason`` says why it is not more, and is empty where the
    op ends in an activation.
    """

    name: str
    op: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What ``fusion_report`` found; prints as a table."""

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
    """For each batch norm of a model, which op runs it, and why that does not do more.

    The answer is for the model as it is now, in training or in eval, and takes it that a residual has the shape, the
    dtype and the memory format of what it is added to.

    Args:
        model: any module, converted or not.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusion_report: expected a torch.nn.Module, got {type(model).__name__}")
    preview = _Preview()
    # From the outside in: what a module does with its child's output comes before what the child knows itself.
    for module in model.modules():
        preview.module(module)
    entries = []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if _is_ours(module):
            op, reason = preview.found.get(id(module), (_own_op(module), "no forward that could be recorded calls it"))
        else:
            op, reason = "torch", _why_left_alone(module)
        entries.append(FusionEntry(name or "(the model)", op, reason))
    return FusionReport(tuple(entries))


def _is_ours(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return isinstance(forward, Forward) or is_batch_norm(module)


def _own_op(module: nn.Module) -> str:
    return "sync_batch_norm" if is_synchronized(module) else "batch_norm"


def _why_left_alone(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "somebody gave the module a forward"
    if type(module) in _SWAPS or _inherits_forward(type(module)):
        return "not converted"
    return f"{type(module).__name__} has a forward of its own, or changes what torch's looks at"


class _Preview(Execution):
    """Computes nothing and notes what would be one op; the first that is known of a batch norm counts."""

    ANYTHING = torch.empty(0)

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, str]] = {}

    def fused(self, module: nn.Module, function: Callable[..., Any], x: Any, then: Then) -> Any:
        op = _own_op(module) + ("+add" if then.residual is not None else "")
        if then.activation is not None:
            self.note(module, f"{op}+{then.activation}", "")
        else:
            self.note(module, op, _in_words(then.end))
        return x

    def plain(self, function: Callable[..., Any], x: Any, in_the_way: nn.Module | None = None) -> Any:
        if in_the_way is not None and isinstance(function, nn.Module):
            if function is not in_the_way:
                self.note_end(function, in_the_way)
            elif _is_ours(function):
                self.note(function, _own_op(function), _in_words(function))
        return x

    def finish(self, then: Then, y: Any) -> Any:
        return y

    def note(self, batch_norm: nn.Module, op: str, reason: str) -> None:
        self.found.setdefault(id(batch_norm), (op, reason))

    def note_end(self, module: nn.Module, end: nn.Module | str) -> None:
        """Note the batch norm that ``module`` ends in, if any: ``end`` keeps it from doing more."""
        if batch_norm_at_end(module) is not None:
            run(module, self.ANYTHING, NOTHING._replace(end=end), self)

    def block(self, plan: Plan, module: nn.Module, args: tuple[Any, ...], then: Then) -> Any:
        x = self.ANYTHING
        for site in plan.sites:
            norm, *others = [module.get_submodule(name) for name in site.modules()]
            site(x, x if site.has_residual else None, then if site.is_open else None, norm, *others, on=self)
        for name, end in plan.unfused:
            self.note_end(module.get_submodule(name), end)
        return x

    def module(self, module: nn.Module) -> None:
        """Note what is decided by the forward of ``module`` itself."""
        forward = module.__dict__.get("forward")
        is_converted = isinstance(forward, Forward)
        if not is_converted:
            forward = _fusing_forward(module)
        if forward is None:
            return
        name = type(module).__name__
        if not is_converted and forward.has_something_to_fuse():
            self.note_children(module, f"{name} was converted with fuse=False, or not at all")
        elif not isinstance(forward, BlockForward):
            forward.run((self.ANYTHING,), NOTHING, self)
        else:
            holding = [plan for plan in forward.plans if plan.holds_for(module)]
            for plan in holding:
                self.block(plan, module, (), NOTHING)
            if not holding:
                self.note_children(module, f"the forward of {name} {forward.why_not or 'changed after conversion'}")

    def note_children(self, module: nn.Module, reason: str) -> None:
        for child in _called_from(module):
            self.note_end(child, reason)


def _in_words(end: nn.Module | str) -> str:
    if isinstance(end, str):
        return end
    name = type(end).__name__
    if not is_bare(end):
        return f"{name} has hooks, or a __call__ of its own"
    if drop_probability(end) is not None:
        return f"{name} drops values in training"
    return f"followed by {name}"
