"""Ours in everything that a training loop puts around a batch norm, beside torch.nn's in the same."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfused
from support import checks

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (4, 6, 5, 3)

pytestmark = pytest.mark.usefixtures("extension")


def random():
    """In float64, where no input of a ReLU is so near 0 that two implementations disagree on its side of it; in float32
    one in millions is."""
    return torch.randn(SHAPE, dtype=torch.float64)


def close(name, actual, wanted, factor=4):
    """Two implementations, twice what each may be off, and as much again a few layers deep."""
    checks.assert_alike(name, actual, wanted, factor)


def same_module(ours, theirs):
    """Parameters, their gradients and buffers."""
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        close(name, p, q)
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            close(f"grad of {name}", p.grad, q.grad)
    for (name, b), (_, c) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        close(name, b, c)


class Block(nn.Module):
    """Two convolutions, each with its batch norm; fused where ``batch_norm`` is ours."""

    def __init__(self, batch_norm, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first, self.second = batch_norm(channels), batch_norm(channels)
        self.fused = isinstance(self.first, bnfused.BatchNorm2d)

    def forward(self, x):
        if self.fused:
            h = self.first(self.conv(x), activation="relu")
            return self.second(self.conv(h), residual=x, activation="relu")
        h = self.first(self.conv(x)).relu()
        return (self.second(self.conv(h)) + x).relu()


def twins(kind=Block, **options):
    """The same network with ours and with torch's batch norms, in float64."""
    networks = []
    for batch_norm in (bnfused.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(11)
        networks.append(kind(functools.partial(batch_norm, **options)).double())
        with torch.no_grad():
            for module in networks[-1].modules():
                if isinstance(module, nn.BatchNorm2d) and module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
    return networks


def both(networks, call, upstream=None):
    """One forward and backward of each; outputs and everything in the modules agree."""
    x = random()
    leaves = [x.clone().requires_grad_() for _ in networks]
    outputs = []
    for network, leaf in zip(networks, leaves, strict=True):
        y = call(network, leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype) if upstream is None else upstream(y))
        outputs.append(y.detach())
    close("y", *outputs)
    close("grad_x", *(leaf.grad for leaf in leaves))
    same_module(*networks)


# ----------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype, training):
    """autocast leaves batch norm in the dtype that comes in, beside float32 parameters, for ours as for torch's.

    A convolution hands it 16 bits, a float32 operation 32; gradients of parameters are float32.
    """
    dtypes = []
    for batch_norm in (bnfused.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(3)
        conv, bn = nn.Conv2d(6, 6, 1), batch_norm(6).train(training)
        x = torch.randn(SHAPE, requires_grad=True)
        with torch.autocast("cpu", dtype):
            half, full = bn(conv(x)), bn(x.exp())
            loss = (half.float() * full).sum()
        loss.backward()
        dtypes.append([t.dtype for t in (half, full, x.grad, bn.weight.grad, conv.weight.grad, bn.running_mean)])
    assert dtypes[0] == dtypes[1]
    assert dtypes[0][:2] == [dtype, torch.float32]


def test_autocast_of_a_residual_that_was_not_cast():
    """A float32 skip beside a 16-bit x: torch's add promotes, ours has one dtype and says which."""
    bn = bnfused.BatchNorm2d(6)
    x = torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="residual of bfloat16, got float32"):
        bn(nn.Conv2d(6, 6, 1)(x), residual=x)
    assert int(bn.num_batches_tracked) == 0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_grad_scaler_skips_a_step_with_inf(value):
    """An infinite gradient comes out of the backward as one, so that GradScaler finds it, skips, and goes on."""
    networks = twins()
    for network in networks:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        torch.manual_seed(5)
        scales = []
        for step in range(3):
            before = [p.detach().clone() for p in network.parameters()]
            optimizer.zero_grad()
            y = network(random())
            spoiled = torch.ones_like(y)
            if step == 1:
                spoiled[:, 2] = value
            scaler.scale((y * spoiled).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved = [not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True)]
            assert any(moved) == (step != 1), step
        assert scales == [4.0, 2.0, 2.0]
    for (name, p), (_, q) in zip(*(n.named_parameters() for n in networks), strict=True):
        close(name, p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_module_in_another_dtype(dtype):
    """.half(), .bfloat16(), .double(): parameters and statistics follow, the counter stays int64."""
    ours, theirs = (network.second.to(dtype) for network in twins())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(SHAPE).to(dtype)
    found = []
    for bn in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = bn(leaf)
        y.sum().backward()
        found.append([t.dtype for t in (y, leaf.grad, bn.weight.grad, *bn.state_dict().values())])
        if bn is ours:
            close("y", y, exact(x.double()).to(dtype), factor=2)  # both rounded
    assert found[0] == found[1]
    for name in ("running_mean", "running_var"):
        close(name, ours.get_buffer(name), exact.get_buffer(name).to(dtype), factor=2)


# ------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("preserve", [True, False], ids=["preserve_rng_state", "no rng state"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_updates_statistics_as_torchs(reentrant, preserve):
    """Both kinds of activation checkpointing: gradients, and the statistics that the second forward moves again."""
    from torch.utils.checkpoint import checkpoint

    networks = twins()

    def call(network, x):
        return checkpoint(network, x, use_reentrant=reentrant, preserve_rng_state=preserve)

    both(networks, call)
    both(networks, call)
    assert int(networks[0].first.num_batches_tracked) == 4


def test_selective_checkpointing():
    """Recompute everything but the batch norm ops: their outputs are kept, and the statistics move once."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    keep = {torch.ops.bnfused.batch_norm_train.default}

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    network, plain = twins()[0], twins()[0]
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    x = random()
    results = []
    for run in (lambda v: checkpoint(network, v, use_reentrant=False, context_fn=contexts), plain):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        results.append(leaf.grad)
    assert checks.same_bits(*results)
    assert int(network.first.num_batches_tracked) == 1


def test_saved_tensors_on_cpu():
    """torch.autograd.graph.save_on_cpu and disable_saved_tensors_hooks know what is saved."""
    networks = twins()

    def call(network, x):
        with torch.autograd.graph.save_on_cpu():
            return network(x)

    both(networks, call)


# ----------------------------------------------------------------------------------- averaging, fusing


def test_update_bn():
    """torch.optim.swa_utils: statistics of an averaged model by the cumulative average of one pass."""
    networks = twins()
    averaged = [torch.optim.swa_utils.AveragedModel(network, use_buffers=False) for network in networks]
    torch.manual_seed(8)
    loader = [random() * 2 + 1 for _ in range(4)]
    for model in averaged:
        torch.optim.swa_utils.update_bn(loader, model)
        assert model.module.first.momentum == 0.1  # put back
    same_module(*averaged)
    assert int(averaged[0].module.first.num_batches_tracked) == 4


def test_ema():
    """An exponential moving average of parameters and buffers."""
    networks = twins()
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averaged = [torch.optim.swa_utils.AveragedModel(n, multi_avg_fn=ema, use_buffers=True) for n in networks]
    for _ in range(3):
        both(networks, lambda network, x: network(x))
        for model, network in zip(averaged, networks, strict=True):
            model.update_parameters(network)
    same_module(*averaged)


def test_fuse_conv_bn_eval():
    """torch.nn.utils.fuse_conv_bn_eval folds ours into the convolution before it."""
    networks = twins()
    for network in networks:
        network(random() + 2)
        network.eval()
    fused = [nn.utils.fuse_conv_bn_eval(n.conv, n.first) for n in networks]
    x = random()
    close("y", fused[0](x), networks[0].first(networks[0].conv(x)))


@pytest.mark.parametrize("kind", ["parametrize", "spectral_norm", "weight_norm"])
def test_parametrized(kind):
    """A weight that is computed: by a registered parametrization, a spectral norm, a weight norm."""
    networks = twins()

    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    for network in networks:
        if kind == "parametrize":
            nn.utils.parametrize.register_parametrization(network.first, "weight", Doubled())
        elif kind == "spectral_norm":
            torch.manual_seed(1)
            nn.utils.parametrizations.spectral_norm(network.first)
        else:
            nn.utils.parametrizations.weight_norm(network.first)
    both(networks, lambda network, x: network(x))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked", "weight", "bias"])
def test_attribute_deleted_or_missing(name):
    """A module without one of its tensors fails as torch's does, by name."""
    x = torch.randn(SHAPE)
    for bn in (bnfused.BatchNorm2d(6), nn.BatchNorm2d(6)):
        delattr(bn, name)
        with pytest.raises(AttributeError, match=name):
            bn(x)


def test_prune():
    """torch.nn.utils.prune replaces weight by an attribute that a hook writes."""
    from torch.nn.utils.prune import l1_unstructured

    networks = twins()
    for network in networks:
        l1_unstructured(network.first, "weight", amount=0.5)
    assert int((networks[0].first.weight == 0).sum()) == 3
    both(networks, lambda network, x: network(x))


# -------------------------------------------------------------------------------------------- hooks


HOOKS = {
    "expanded": lambda grad: grad[:1].expand_as(grad),
    "expanded scalar": lambda grad: grad.new_ones(()).expand_as(grad),
    "strided": lambda grad: torch.stack([grad, grad], -1)[..., 0],
    "channels_last": lambda grad: (2 * grad).to(memory_format=torch.channels_last),
    "transposed": lambda grad: grad.transpose(2, 3).contiguous().transpose(2, 3),
    "zero": lambda grad: torch.zeros((), dtype=grad.dtype).expand_as(grad),
    "conjugate view": lambda grad: torch.complex(torch.zeros_like(grad), grad).conj().imag,
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual-relu"])
def test_hooks_that_replace_the_gradient(fused, hook):
    """What comes into the backward may have any strides, or be a negative view."""
    results = []
    x, residual = random(), random()
    for batch_norm in (bnfused.BatchNorm2d, nn.BatchNorm2d):
        bn = batch_norm(6).double()
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        if not fused:
            y = bn(leaves[0]) + 0 * leaves[1]
        elif batch_norm is bnfused.BatchNorm2d:
            y = bn(*leaves, "relu")
        else:
            y = (bn(leaves[0]) + leaves[1]).relu()
        y.register_hook(HOOKS[hook])
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append([*(leaf.grad for leaf in leaves), bn.weight.grad, bn.bias.grad])
    for actual, wanted in zip(*results, strict=True):
        close(hook, actual, wanted)


def test_module_hooks():
    """Forward, backward and state_dict hooks, and the global ones, fire as on torch's modules, with the same shapes."""
    seen = []
    for batch_norm in (bnfused.BatchNorm2d, nn.BatchNorm2d):
        bn, log = batch_norm(6), []
        bn.register_forward_pre_hook(lambda m, args, log=log: log.append(("pre", args[0].shape)))
        bn.register_forward_hook(lambda m, args, y, log=log: log.append(("forward", y.shape)))
        bn.register_full_backward_pre_hook(lambda m, g, log=log: log.append(("backward pre", g[0].shape)))
        bn.register_full_backward_hook(
            lambda m, gx, gy, log=log: log.append(("backward", [None if g is None else g.shape for g in gx]))
        )
        bn.register_state_dict_post_hook(lambda m, state, *_, log=log: log.append(("state", list(state))))
        bn.weight.register_post_accumulate_grad_hook(lambda p, log=log: log.append(("accumulated", p.grad.shape)))
        bn(torch.randn(SHAPE, requires_grad=True)).sum().backward()
        bn.state_dict()
        seen.append(log)
    assert sorted(map(str, seen[0])) == sorted(map(str, seen[1]))
    assert len(seen[0]) == 6


# ------------------------------------------------------------------------------- devices and formats


def test_meta_device_and_to_empty():
    """Built on meta, run there, given memory, initialised: as torch's."""
    with torch.device("meta"):
        ours, theirs = bnfused.BatchNorm2d(6), nn.BatchNorm2d(6)
    for bn in (ours, theirs):
        x = torch.randn(SHAPE, device="meta", requires_grad=True)
        y = bn(x)
        y.sum().backward()
        assert y.is_meta and x.grad.is_meta and bn.weight.grad.is_meta
        assert y.shape == SHAPE
        bn.zero_grad()
        bn.to_empty(device="cpu")
        bn.reset_parameters()
    x = torch.randn(SHAPE)
    close("y", ours(x), theirs(x))
    same_module(ours, theirs)


def test_assign_loading():
    """load_state_dict(assign=True) from a meta module on: the tensors of the dict become the module's."""
    state = nn.BatchNorm2d(6).state_dict()
    with torch.device("meta"):
        bn = bnfused.BatchNorm2d(6)
    bn.load_state_dict(state, assign=True)
    assert bn.running_mean.data_ptr() == state["running_mean"].data_ptr()
    bn(torch.randn(SHAPE))
    assert int(state["num_batches_tracked"]) == 1


def test_memory_format():
    """module.to(memory_format=...) leaves one-dimensional state alone; the input's format comes out and goes back."""
    networks = [network.to(memory_format=torch.channels_last) for network in twins()]
    x = random().to(memory_format=torch.channels_last)
    strides = []
    for network in networks:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = network.first(leaf)
        y.square().sum().backward()
        strides.append((y.stride(), leaf.grad.stride()))
    assert strides[0] == strides[1] == (x.stride(), x.stride())


def test_inference_mode():
    """Inference tensors in and out, in eval and in training, and modules built inside of it."""
    networks = twins()
    x = random()
    with torch.inference_mode():
        built = bnfused.BatchNorm2d(6).double()
        assert built(x).is_inference()
        assert int(built.num_batches_tracked) == 1
        for mode in (True, False):
            outputs = [network.train(mode)(x) for network in networks]
            assert all(y.is_inference() for y in outputs)
            close("y", *outputs)
    same_module(*networks)
    both([network.train() for network in networks], lambda network, x: network(x))


@pytest.mark.parametrize("which", ["input", "residual"])
def test_inference_tensor_in_a_graph(which):
    """It cannot be saved for backward, in torch neither; running statistics are as before."""
    with torch.inference_mode():
        inference_tensor = torch.randn(SHAPE)
    with pytest.raises(RuntimeError, match="^Inference tensors cannot be saved for backward"):
        nn.BatchNorm2d(6)(inference_tensor)
    module = bnfused.BatchNorm2d(6)
    before = copy.deepcopy(module.state_dict())
    tensors = {"input": torch.randn(SHAPE), "residual": torch.randn(SHAPE), which: inference_tensor}
    with pytest.raises(RuntimeError, match="^batch_norm: expected tensors that can be saved for backward, got an inf"):
        module(**tensors, activation="relu")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module(**{name: value.clone() for name, value in tensors.items()}, activation="relu").sum().backward()


def test_deterministic_algorithms():
    """torch.use_deterministic_algorithms: nothing to complain of, the same bits, memory filled or not."""
    network = twins()[0]
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            twin = copy.deepcopy(network)
            torch.manual_seed(4)
            leaf = random().requires_grad_()
            y = twin(leaf)
            y.sum().backward()
            results.append([y.detach(), leaf.grad, twin.first.weight.grad, twin.first.running_var])
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert checks.same_bits(first, second)


# ----------------------------------------------------------------------------------- several processes


def run_python(script, *arguments, timeout=120):
    """A process of its own, with this checkout's package."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist
from torch import nn
import torch.multiprocessing as mp
import bnfused

def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 4, 3), kind(4))

def train(model, rank, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        torch.manual_seed(100 * step + rank)
        optimizer.zero_grad()
        x = torch.randn(4, 3, 8, 8) * (1 + rank) + rank
        model(x).square().mean().backward()
        optimizer.step()

def full(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value

def same(a, b, where):
    a, b = ({k: full(v) for k, v in m.state_dict().items()} for m in (a, b))
    assert list(a) == list(b)
    # float32, of which the steps make ten times as much each: 1e-7 becomes 1e-4. Statistics of the other rank, or none
    # of the last batch, are off by a tenth and more.
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{where} {name}: {m}")
    return a

def main(rank, path, how):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    models = [network(kind) for kind in (bnfused.BatchNorm2d, nn.BatchNorm2d)]
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (2,))
        for model in models:
            for layer in model:
                if list(layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        trained = models
    else:
        trained = [nn.parallel.DistributedDataParallel(m, broadcast_buffers=how == "broadcast") for m in models]
    for model in trained:
        train(model, rank)
    state = same(*models, f"rank {rank}")
    if how != "fsdp":
        both = [torch.empty_like(models[0][1].running_mean) for _ in range(2)]
        dist.all_gather(both, models[0][1].running_mean)
        differ = not torch.equal(*both)
        # A forward follows each broadcast, so that the ranks differ at the end of a step in either case.
        assert differ
        for model in trained:
            model.eval()
            model.train()
        with torch.no_grad():
            for model in trained:
                torch.manual_seed(7)
                model(torch.randn(4, 3, 8, 8))
        same(*models, f"rank {rank} after a common batch")
        dist.all_gather(both, models[0][1].running_mean)
        assert torch.equal(*both) == (how == "broadcast"), how
    dist.barrier()
    dist.destroy_process_group()
    # Threads of Gloo and of DDP may still hold Python objects. One that asks for the interpreter while it shuts down is
    # ended in the middle of C++, which calls std::terminate ("terminate called without an active exception").
    os._exit(0)

if __name__ == "__main__":
    mp.spawn(main, (sys.argv[1], sys.argv[2]), nprocs=2)
    print("done")
"""


@pytest.mark.parametrize("how", ["broadcast", "no broadcast", "fsdp"])
def test_two_processes(tmp_path, how):
    """DDP with broadcast_buffers either way, and FSDP2: state on both ranks as with torch's modules.

    After a batch that both ranks share, the running statistics agree where DDP broadcasts them before the forward, and
    differ where it does not.
    """
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store"), how],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout


def test_spawned_process(tmp_path):
    """A module goes to another process in a pickle, and works there."""
    bn = bnfused.BatchNorm2d(6)
    x = torch.randn(SHAPE)
    (tmp_path / "module.pickle").write_bytes(pickle.dumps((bn, x)))
    script = """
import pickle, sys, torch
bn, x = pickle.load(open(sys.argv[1], "rb"))
x.requires_grad_()
y = bn(x)
y.square().sum().backward()
torch.save((y.detach(), x.grad, bn.running_var), sys.argv[2])
"""
    done = run_python(script, tmp_path / "module.pickle", tmp_path / "results.pt")
    assert done.returncode == 0, done.stderr
    leaf = x.clone().requires_grad_()
    y = bn(leaf)
    y.square().sum().backward()
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for actual, wanted in zip(results, (y.detach(), leaf.grad, bn.running_var), strict=True):
        assert checks.same_bits(actual, wanted)


def test_weights_only_module():
    """torch.load(weights_only=True) of a whole module, with the class allow-listed as torch's would be."""
    bn = bnfused.BatchNorm2d(6)
    bn(torch.randn(SHAPE))
    file = io.BytesIO()
    torch.save(bn, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="bnfused.modules.BatchNorm2d"):
        torch.load(file, weights_only=True)
    file.seek(0)
    with torch.serialization.safe_globals([bnfused.BatchNorm2d]):
        loaded = torch.load(file, weights_only=True)
    assert type(loaded) is bnfused.BatchNorm2d
    same_module(loaded, bn)


def test_data_parallel_replicas():
    """torch.nn.parallel.replicate's shallow copies run the same forward."""
    bn = bnfused.BatchNorm2d(6)
    replica = bn._replicate_for_data_parallel()
    replica._parameters = dict(bn._parameters)
    replica._buffers = dict(bn._buffers)
    x = torch.randn(SHAPE)
    twin = copy.deepcopy(bn)
    assert checks.same_bits(replica(x).detach(), twin(x).detach())


@pytest.mark.parametrize("shared", ["module", "weight"])
def test_shared(shared):
    """One module in two places, or one weight in two modules, before one backward."""
    networks = twins()
    for network in networks:
        if shared == "module":
            network.second = network.first
        else:
            network.second.weight = network.first.weight
    both(networks, lambda network, x: network(network(x)))


def test_optimizers_step_through():
    """foreach and fused optimizers, and clip_grad_norm_, take the gradients as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"foreach": True}, {"fused": True}, {}):
            networks = twins()
            for network in networks:
                optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, eps=1e-3, **options)
                torch.manual_seed(1)
                for _ in range(3):
                    optimizer.zero_grad()
                    network(random()).square().sum().backward()
                    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                    optimizer.step()
            for (name, p), (_, q) in zip(*(n.named_parameters() for n in networks), strict=True):
                # Adam divides by the root of a gradient's square: 1e-3 in its place bounds what an error becomes.
                torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)
