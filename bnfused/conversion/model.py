"""``convert`` and ``revert`` change a network."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfused import modules
from bnfused.conversion.forwards import (
    BatchNormForward,
    BlockForward,
    NormActForward,
    NormalizingForward,
    SequenceForward,
    fusing_forward,
)
from bnfused.conversion.pending import FusedForward
from bnfused.sync import SyncBatchNorm

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
_BACK = {ours: theirs for theirs, ours in SWAPS.items()}

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model, *, fuse: bool = True, inplace: bool = False, sync: bool = False, process_group: Any = None
) -> Model:
    """The network with bnfused's batch norm in place of torch's; its results stay what they are, up to rounding.

    Parameters, buffers, hooks, names, ``state_dict`` and the classes of all other modules are kept. A subclass of
    torch's batch norm keeps its class; one with a forward of its own is left alone, except timm's ``BatchNormAct2d``,
    which becomes one fused op. ``fusion_report`` lists what was left alone.

    Args:
        model: any module; converting a converted one is harmless, and finds what was changed since.
        fuse: also run batch norm and the activation, the add, or both that follow it as one op, inside
            ``nn.Sequential`` and inside blocks with a forward in Python, which is rewritten for it.
        inplace: convert ``model`` itself instead of a deep copy. Process groups are not copied.
        sync: make every batch norm a ``bnfused.SyncBatchNorm``, or have it compute as one. Without it,
            ``torch.nn.SyncBatchNorm`` becomes one all the same, and the others keep to their process.
        process_group: with ``sync``, the processes that share statistics. None means all of them, or, for a batch
            norm that was synchronized before, the group that it has.

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
        raise ValueError("convert: expected sync=True with process_group, got sync=False")
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
        if isinstance(module.__dict__.get("forward"), FusedForward):
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
    if type(module) in SWAPS:
        module.__class__ = SWAPS[type(module)]
    elif isinstance(module, _BatchNorm) and "forward" not in module.__dict__:
        if _is_timm_norm_act(module):
            module.__dict__["forward"] = NormActForward(module)
        elif inherits_forward(type(module)):
            module.__dict__["forward"] = BatchNormForward(module)


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
    """Give the module its former class, or torch's, and remove the attributes of a ``SyncBatchNorm``."""
    module.__dict__.pop("check_ranks", None)
    cls = module.__dict__.pop("converted_from", None)
    if cls is not None:
        del module.__dict__["process_group"]
        module.__class__ = cls


def inherits_forward(cls: type[nn.Module]) -> bool:
    """Whether a subclass of torch's batch norm computes the same: it changes nothing that forward reads."""
    looked_at = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "__getattribute__")
    return (
        cls.forward is _BatchNorm.forward
        and cls.__getattr__ is nn.Module.__getattr__
        and not any(name in base.__dict__ for base in cls.__mro__ if base is not object for name in looked_at)
    )


def _is_timm_norm_act(module: nn.Module) -> bool:
    """Whether it is timm's module of batch norm, drop and activation. Its name tells, so timm is not imported."""
    cls = type(module)
    return (cls.__module__, cls.__qualname__) == ("timm.layers.norm_act", "BatchNormAct2d")


def _fuse(module: nn.Module) -> None:
    present = module.__dict__.get("forward")
    if isinstance(present, (SequenceForward, BlockForward)):
        del module.__dict__["forward"]
    forward = fusing_forward(module)
    if forward is not None and forward.has_something_to_fuse():
        module.__dict__["forward"] = forward
