"""SyncBatchNorm: the statistics of a batch that is spread over the processes of a group.

One collective each way: the forward gathers mean, standard deviation and count, the backward adds up two sums.
They run on any backend of torch.distributed, Gloo with CPU tensors among them.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfused import activations, checks, parts, reference
from bnfused.autograd import differentiable, second_gradients, transform
from bnfused.modules import _BatchNormForward, with_state_of

# torch 2.13 renamed it, and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Process groups that make up a larger one, for one collective in ``inner`` and then one in ``outer``.

    Stands wherever a process group does here. ``inner`` is the processes of a node, ``outer`` those at this process's
    place in each node: so many messages and bytes less cross the network (docs/sync.md says when that pays).
    """

    inner: Any
    outer: Any


def hierarchy(size: int, timeout: timedelta | None = None) -> Hierarchy:
    """Groups of ``size`` consecutive ranks each, and the groups across them; every process has to call it.

    Args:
        size: the processes of a node, as a rule; torchrun's ``LOCAL_WORLD_SIZE``.
        timeout: as for ``torch.distributed.new_group``.

    Raises:
        ValueError: ``size`` does not divide the number of processes; on every one, before a group is made.
    """
    world = dist.get_world_size()
    if size < 1 or world % size:
        raise ValueError(f"hierarchy: expected a size that divides {world} processes, got {size}")
    ranks = list(range(world))
    nodes, places = [ranks[i : i + size] for i in range(0, world, size)], [ranks[i::size] for i in range(size)]
    inner, _ = dist.new_subgroups_by_enumeration(nodes, timeout=timeout)
    outer, _ = dist.new_subgroups_by_enumeration(places, timeout=timeout)
    return Hierarchy(inner, outer)


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    num_batches_tracked: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Batch norm in training, with the statistics of all processes in ``group``; every one of them has to call it.

    The batches may differ in every size but C, and may be empty. Statistics travel as ``bnfused.parts.pack_moments``
    says: the count is exact, and a mean that is large against the standard deviation keeps its digits. Running
    statistics end bitwise the same on every rank. The gradients of weight and bias are this process's share, as DDP
    wants them; the gradient of ``input`` is that of the sum of all processes' losses. Gradients of every order are
    right, provided that every process takes the same ones.

    Args:
        group: a ``ProcessGroup`` that this process is in, or a ``Hierarchy``; None means all processes.
        the others: as for ``bnfused.functional.batch_norm``.

    Returns:
        ``y``, with the shape, dtype and (where it is dense) strides of ``input``.

    Raises:
        ValueError: one value per channel in all processes together, on every rank (where ``input`` is not on the CPU,
            and under torch.compile, by ``torch._assert_async``, which waits for nothing); ``eps`` or an activation as
            for ``bnfused.functional.batch_norm``.
        RuntimeError: an argument that does not fit ``input``; or a collective that failed, with rank, op and shape.
        Running statistics are as before where anything is raised.
    """
    checks.check_input(input)
    activations.resolve(activation, activation_param)
    checks.check_eps(eps, training=True)
    _refuse_transforms()
    checks.check_arguments(input, weight, bias, running_mean, running_var, residual, num_batches_tracked, training=True)
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0  # nothing counts the batches, so torch leaves the statistics alone
    group = dist.group.WORLD if group is None else group

    moments = parts.batch_norm_stats(input.detach())
    *inner, outermost = _levels(group)
    for level in inner:
        moments = parts.merge_moments(_gather(moments, level))
    gathered = _gather(moments, outermost)
    _refuse_single_value(gathered, input)
    mean, var, total = parts.batch_norm_gather_stats(gathered, running_mean, running_var, num_batches_tracked, momentum)
    settings = (eps, activation, activation_param)
    return SyncBatchNormFunction.apply(input, weight, bias, residual, mean, var, total, group, settings)


def synchronized_forward(
    module: Any,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    *,
    process_group: Any = None,
    check_ranks: bool = True,
) -> Tensor:
    """What ``SyncBatchNorm.forward`` does, for any batch norm of torch's classes."""
    group = _group_to_sync(process_group) if module.training else None
    if group is None or isinstance(input, fx.Proxy):
        return _BatchNormForward.forward(module, input, residual, activation, activation_param)
    module._check_input_dim(input)
    if check_ranks and not torch.compiler.is_compiling():
        _compare_ranks_once(module, input, group)
    in_group = functools.partial(_in_training, group)
    return with_state_of(module, in_group, input, residual, activation, activation_param)


def _in_training(
    group: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    **others: Any,
) -> Tensor:
    """``sync_batch_norm`` with the signature of ``functional.batch_norm``; only a training module synchronizes."""
    assert training
    return sync_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, **others, group=group)


class SyncBatchNorm(_BatchNormForward, _BatchNorm):
    """``torch.nn.SyncBatchNorm`` on fused kernels, on the CPU too: (N, C, *).

    The batches of the processes may differ in size and may be empty. Outside training, without a process group, or in a
    group of one it is batch norm on this process alone.

    It has the constructor, the methods, the state and the name of ``torch.nn.SyncBatchNorm``, and is a ``_BatchNorm``
    to ``isinstance``, but no subclass of ``torch.nn.SyncBatchNorm``: DistributedDataParallel looks for that class and
    refuses to train it on the CPU, and a class that were one on GPUs only would be another one in the checkpoint.
    Nothing else in torch asks for it but DDP's log.

    Args:
        process_group: as for ``torch.nn.SyncBatchNorm``, or a ``bnfused.sync.Hierarchy``.
        check_ranks: at its first synchronized call, and again where the group is another one, the module compares the
            number of channels and what else has to agree between the ranks, and raises on all of them where it does
            not. That costs a collective, and reading its result on the host.
        the others: as for ``torch.nn.SyncBatchNorm``.
    """

    # Of a module that became one by its class alone.
    process_group: Any = None
    check_ranks: bool = True
    # What bnfused.convert made it from, and bnfused.revert makes of it again; None means torch.nn.SyncBatchNorm.
    converted_from: type[nn.Module] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *args: Any,
        check_ranks: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, *args, **kwargs)
        self.process_group = process_group
        self.check_ranks = check_ranks

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> Tensor:
        """``act(bn(input) + residual)``; in training ``bnfused.sync.sync_batch_norm``, else as ``bnfused.BatchNorm*d``.

        Args:
            input: (N, C, *); N may be 0.
            residual: added before the activation; shape and dtype of ``input``.
            activation: one of ``bnfused.activations.ACTIVATIONS``, or None.
            activation_param: ``negative_slope`` of leaky_relu, ``alpha`` of elu.
        """
        return synchronized_forward(
            self,
            input,
            residual,
            activation,
            activation_param,
            process_group=self.process_group,
            check_ranks=self.check_ranks,
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, to this class.

        ``bnfused.convert(module, sync=True)`` also fuses, keeps hooks, and can be undone.
        """
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for converted in module.modules():
            kind: type[nn.Module] = type(converted)
            if kind is nn.SyncBatchNorm:
                converted.__class__ = cls
        return module

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")


def _group_to_sync(group: Any) -> Any:
    """The process group, where None means all processes; None where there is nobody to talk to."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if any(dist.get_world_size(level) > 1 for level in _levels(group)) else None


class SyncBatchNormFunction(torch.autograd.Function):
    """The apply half of the forward, and all of the backward, differentiable to any order.

    ``apply(x, weight, bias, residual, mean, var, count, group, (eps, activation, activation_param))``: the statistics
    come as values, and the gradient that flows through them is part of that of ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        group: Any,
        settings: tuple[float, str | None, float | None],
    ) -> Tensor:
        eps, activation, activation_param = settings
        y, invstd, mask = parts.batch_norm_apply(
            *(x, mean, var, weight, bias, eps),
            residual=residual,
            activation=activation,
            activation_param=activation_param,
        )
        kept_mask = mask if activation == "relu" and residual is not None else None
        if activation is None or kept_mask is not None:
            residual = None  # its gradient is grad_y, or where the mask says so
        ctx.save_for_backward(x, weight, bias, residual, mean, invstd, count, kept_mask)
        ctx.group, ctx.settings = group, settings
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        fused = ctx.settings[1] is not None
        needed = (need_x, need_weight, need_bias, need_residual and fused)
        args = (grad_y, *ctx.saved_tensors, ctx.group, ctx.settings, needed)
        # torch.compile has one derivative to trace, and refuses the next one itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad_x, grad_weight, grad_bias, grad_residual = _SyncBackwardFunction.apply(*args)
        else:
            grad_x, grad_weight, grad_bias, grad_residual = _backward(*args)
        if not fused:
            grad_residual = grad_y
        return (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            grad_residual if need_residual else None,
            *[None] * 5,
        )


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    mask: Tensor | None,
    group: Any,
    settings: tuple[float, str | None, float | None],
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The four gradients, of which those that are not needed are None; one collective if that of ``x`` is.

    It is under way while the gradients of weight and bias, this process's share, are made. That of the residual could
    be made meanwhile too, but in a pass of its own over the tensor: now it is one more write in the pass of x's.
    """
    _, activation, activation_param = settings
    need_x, need_weight, need_bias, need_residual = needed
    forward: Any = {
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "mask": mask,
        "activation": activation,
        "activation_param": activation_param,
    }
    own_sums = parts.batch_norm_backward_reduce(grad_y, x, mean, invstd, **forward)
    finish = _start_all_reduce(own_sums.clone(), group) if need_x else None
    # Copies: gradients must not share memory.
    grad_bias = own_sums[0].to(bias.dtype, copy=True) if need_bias and bias is not None else None
    grad_weight = own_sums[1].to(weight.dtype, copy=True) if need_weight and weight is not None else None
    sums = own_sums if finish is None else finish()
    grad_x = grad_residual = None
    if need_x or need_residual:
        grad_x, grad_residual = parts.batch_norm_backward_apply(
            *(grad_y, x, mean, invstd, sums, count),
            output_mask=(need_x, need_residual),
            **forward,
        )
    return grad_x if need_x else None, grad_weight, grad_bias, grad_residual if need_residual else None


class _SyncBackwardFunction(torch.autograd.Function):
    """``_backward`` as a differentiable function of ``grad_y``, ``x``, ``weight``, ``bias`` and ``residual``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *saved, group, settings, needed = args
        ctx.save_for_backward(*saved)
        ctx.group, ctx.settings, ctx.needed = group, settings, needed
        ctx.set_materialize_grads(False)
        return _backward(*args)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        saved: Any = ctx.saved_tensors
        grad_y, x, weight, bias, residual, mean, invstd, count, mask = saved
        eps, activation, activation_param = ctx.settings
        code, param = activations.resolve(activation, activation_param)
        passes = _passes(x, mean, invstd, count, mask)
        if passes is not None:
            residual = torch.zeros_like(x)  # to differentiate by; its values do not matter
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs: Any = [
                None if t is None else differentiable(t, create_graph) for t in (grad_y, x, weight, bias, residual)
            ]
            grad_y, x, weight, bias, residual = inputs
            values = x.to(reference.arithmetic_dtype(x))
            mean, var = _statistics(values, count, ctx.group)
            args = (values, mean, (var + eps).rsqrt(), weight, bias, residual, passes, code, param, x.dtype)
            y = transform(*args)
        return (*second_gradients(y, inputs, grad_grads, ctx.needs_input_grad[:5], create_graph), *[None] * 7)


def _passes(x: Tensor, mean: Tensor, invstd: Tensor, count: Tensor, mask: Tensor | None) -> Tensor | None:
    """Where ReLU lets a gradient through, like ``x``; None without a mask, whose order each backend knows."""
    if mask is None:
        return None
    none = mean.new_zeros(2, mean.numel())
    _, gradients = parts.batch_norm_backward_apply(
        *(torch.ones_like(x), x, mean, invstd, none, count),
        mask=mask,
        activation="relu",
        output_mask=(False, True),
    )
    return gradients != 0


class _Sum(torch.autograd.Function):
    """The sum over all ranks, on each of them. What the ranks' losses add up to has the same gradient: their sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_reduce(values.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Sum.apply(grad, ctx.group), None


def _statistics(values: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks, differentiable to any order."""
    dims = [0, *range(2, values.dim())]
    count = count.clamp(min=1)
    mean = _Sum.apply(values.sum(dims), group) / count
    return mean, _Sum.apply((values - reference.per_channel(mean, values)).square().sum(dims), group) / count


def _levels(group: Any) -> tuple[Any, ...]:
    return (group.inner, group.outer) if isinstance(group, Hierarchy) else (group,)


def _gather(values: Tensor, group: Any) -> Tensor:
    """``values`` of every rank, ``(world, *)``."""
    gathered = values.new_empty(dist.get_world_size(group) * values.numel())
    with _named("all_gather", values, group):
        _all_gather(gathered, values, group=group)
    return gathered.view(-1, values.numel())


def _all_reduce(values: Tensor, group: Any) -> Tensor:
    """The sum of ``values``, which it may overwrite, over all ranks."""
    return _start_all_reduce(values, group)()


def _start_all_reduce(values: Tensor, group: Any) -> Callable[[], Tensor]:
    """Begin ``_all_reduce``; what is returned waits for it, and returns its result."""
    first, *others = _levels(group)
    if torch.compiler.is_compiling():  # two nodes of the graph, where dist.all_reduce would become one
        started = torch.ops._c10d_functional.all_reduce(values, "sum", first.group_name)
    else:
        with _named("all_reduce", values, first):
            work = dist.all_reduce(values, group=first, async_op=True)

    def finish() -> Tensor:
        if torch.compiler.is_compiling():
            total = torch.ops._c10d_functional.wait_tensor(started)
        else:
            with _named("all_reduce", values, first):
                work.wait()
            total = values
        for level in others:
            with _named("all_reduce", total, level):
                dist.all_reduce(total, group=level)
        return total

    return finish


@contextlib.contextmanager
def _named(name: str, values: Tensor, group: Any) -> Iterator[None]:
    """Has a collective of ``values`` that fails say which it was, and where."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"SyncBatchNorm: {name} of {list(values.shape)} {values.dtype} failed on rank {dist.get_rank()}, in a "
            f"group of {dist.get_world_size(group)}: {error}"
        ) from error


def _refuse_single_value(moments: Tensor, input: Tensor) -> None:
    """Raise, on every rank, where all ranks together have one value per channel.

    Whoever has two or more knows better without a look at the counts; so only the others look, and off the CPU they
    leave it to the device, which the host does not wait for.
    """
    if checks.values_per_channel(input) > 1:
        return
    _, _, counts = parts.unpack_moments(moments)
    message = "Expected more than 1 value per channel in all ranks together when training"
    if counts.is_cpu and not torch.compiler.is_compiling():
        if counts.sum() == 1:
            raise ValueError(f"{message}, got input {input.shape}")
    else:  # without the shape: a graph for any batch size has none to print
        torch._assert_async(counts.sum() != 1, message)


def _refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("SyncBatchNorm: expected no torch.func transform in training, got one")


# The group in which a module was compared, by itself: one that is destroyed and made anew has the same name.
_compared: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def _compare_ranks_once(module: nn.Module, input: Tensor, group: Any) -> None:
    """Compare what has to agree between ranks, the first time that ``module`` meets ``group``.

    Copies of the module are compared anew: a mark of its own would travel with it to ranks where others have none.

    Raises:
        RuntimeError: on every rank, with the ranks and what each of them has.
    """
    known = _compared.get(module)
    if known is not None and known() is group:
        return
    checks.check_input(input)
    ours = [input.shape[1], checks.DTYPES.index(input.dtype), torch.is_grad_enabled() and input.requires_grad]
    values = torch.tensor([*ours, dist.get_rank()], dtype=torch.int64, device=input.device)
    for level in _levels(group):
        values = _gather(values, level).flatten()
    found = values.view(-1, len(ours) + 1).tolist()
    # The value of each, by what was sent for it.
    names: dict[str, Callable[[int], Any]] = {
        "number of channels": int,
        "dtype": checks.DTYPES.__getitem__,
        "requires_grad": bool,
    }
    for i, (what, name) in enumerate(names.items()):
        if any(of_rank[i] != found[0][i] for of_rank in found):
            listed = ", ".join(f"{name(of_rank[i])} on rank {of_rank[-1]}" for of_rank in found)
            raise RuntimeError(f"SyncBatchNorm: expected the same {what} of input on every rank, got {listed}")
    _compared[module] = weakref.ref(group)
