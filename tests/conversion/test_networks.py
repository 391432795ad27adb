"""Real networks, converted: the same losses, gradients, running statistics and outputs; and as much fused as should be.

One network of each family of torchvision and timm, in float64, small images.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import bnfused
from support import same_training


def images(batch=4, size=64):
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def check(model, x, wanted):
    """``wanted`` counts the batch norms by the op that they run as in training."""
    model = model.double().train()
    converted = bnfused.convert(model)
    report = bnfused.fusion_report(converted)
    with same_training.ops_that_run() as ran:
        same_training.loss_and_gradients(bnfused.convert(model), x, 0)
    assert ran == report.counts, f"the report says {report.counts}"
    assert report.counts == Counter(wanted), str(report)
    same_training.assert_same_training(converted, model, x)
    reverted = bnfused.revert(converted)
    assert [type(module) for module in reverted.modules()] == [type(module) for module in model.modules()]
    assert not any("forward" in vars(module) for module in reverted.modules())
    assert list(converted.state_dict()) == list(model.state_dict())


RELU, ADD, ADD_RELU, PLAIN = "batch_norm+relu", "batch_norm+add", "batch_norm+add+relu", "batch_norm"
TORCHVISION = {
    "resnet18": {RELU: 9, ADD_RELU: 8, PLAIN: 3},
    "resnet50": {RELU: 33, ADD_RELU: 16, PLAIN: 4},
    "densenet121": {RELU: 121},
    "mobilenet_v2": {"batch_norm+relu6": 35, ADD: 10, PLAIN: 7},
    "mobilenet_v3_small": {"batch_norm+hardswish": 18, RELU: 5, ADD: 6, PLAIN: 5},
    "efficientnet_b0": {"batch_norm+silu": 33, PLAIN: 16},
    "regnet_x_400mf": {RELU: 45, ADD_RELU: 22, PLAIN: 4},
    "regnet_y_400mf": {RELU: 33, ADD_RELU: 16, PLAIN: 4},
    "vgg11_bn": {RELU: 8},
    "googlenet": {RELU: 59},
    "inception_v3": {RELU: 94},
    "shufflenet_v2_x0_5": {RELU: 37, PLAIN: 19},
    "mnasnet0_5": {RELU: 35, ADD: 10, PLAIN: 7},
    "video.mc3_18": {RELU: 9, ADD_RELU: 8, PLAIN: 3},
    "segmentation.lraspp_mobilenet_v3_large": {"batch_norm+hardswish": 20, RELU: 12, ADD: 10, PLAIN: 5},
    "quantization.resnet18": {RELU: 9, PLAIN: 11},
}
OPTIONS = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "segmentation.lraspp_mobilenet_v3_large": {"weights_backbone": None},
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, torchvision):
    *folder, constructor = name.split(".")
    module = getattr(torchvision.models, folder[0]) if folder else torchvision.models
    model = getattr(module, constructor)(**OPTIONS.get(name, {}))
    if name == "vgg11_bn":
        model.classifier = nn.Linear(512 * 7 * 7, 10)  # its own has 100 million parameters, and no batch norm
    if name == "inception_v3":
        model.aux_logits, model.AuxLogits = False, None  # the image is too small for it
    x = images(4, 75 if name == "inception_v3" else 64)
    if name.startswith("video"):
        x = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    check(model, x, TORCHVISION[name])


TIMM = {
    "resnet18d": {RELU: 11, ADD_RELU: 8, PLAIN: 3},
    "skresnet18": {RELU: 25, ADD_RELU: 8, PLAIN: 3},
    "resnest14d": {RELU: 15, ADD_RELU: 4, PLAIN: 4},
    "densenet121": {RELU: 121},
    "efficientnet_b0": {"batch_norm+silu": 33, ADD: 9, PLAIN: 7},
    "mobilenetv3_small_050": {"batch_norm+hardswish": 18, RELU: 5, ADD: 7, PLAIN: 4},
    "mobilenetv4_conv_small": {RELU: 30, ADD: 10, PLAIN: 6},
    "regnety_002": {RELU: 27, ADD_RELU: 13, PLAIN: 4},
    "ghostnet_050": {RELU: 34, PLAIN: 46},
    "hrnet_w18_small": {RELU: 43, ADD_RELU: 23, ADD: 4, PLAIN: 21},
    "repvgg_a0": {ADD_RELU: 5, ADD: 17, PLAIN: 39},
    "rexnet_100": {"batch_norm+silu": 17, "batch_norm+relu6": 3, RELU: 13, PLAIN: 29},
    "mixnet_s": {RELU: 7, "batch_norm+silu": 26, ADD: 11, PLAIN: 5},
    "dpn48b": {"batch_norm+silu": 2, RELU: 52},
    "ese_vovnet19b_slim": {RELU: 19},
    "cspresnet50": {"batch_norm+leaky_relu": 38, "batch_norm+add+leaky_relu": 13, PLAIN: 4},
    "gernet_s": {RELU: 26, ADD_RELU: 14, PLAIN: 5},
    "efficientvit_b0": {"batch_norm+hardswish": 11, ADD: 11, PLAIN: 4},
    "repghostnet_050": {RELU: 18, ADD_RELU: 16, ADD: 21, PLAIN: 57},
    "lcnet_035": {"batch_norm+hardswish": 27},
    "hgnetv2_b0": {RELU: 30, PLAIN: 12},
    "starnet_s1": {"batch_norm+relu6": 1, PLAIN: 35},
    "repvit_m0_9": {"batch_norm+gelu": 27, ADD: 26, PLAIN: 55},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, timm):
    check(timm.create_model(name, num_classes=10), images(3), TIMM[name])


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Mish, nn.Identity])
def test_traced_norm_act(timm, activation):
    """torch.fx records timm's BatchNormAct2d as one node, which applies its activation once, fused or not."""
    layer = timm.layers.BatchNormAct2d
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer(4, act_layer=activation), layer(4, act_layer=activation)).double()
    converted = bnfused.convert(model)
    traced = torch.fx.symbolic_trace(converted)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    same_training.assert_same_training(traced, model, images(size=8))
    alone = torch.fx.symbolic_trace(converted[1])  # as timm's forward, whose calls then have names
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    same_training.assert_same_outputs(alone.eval(), model[1].eval(), x)


def test_drop_path_is_fused_over_in_eval(timm):
    """With stochastic depth the add is fused in eval only; the layer is known by the name that timm gave it."""
    model = timm.create_model("resnet18d", num_classes=10, drop_path_rate=0.2, drop_rate=0.1)
    training = {RELU: 11, ADD_RELU: 1, PLAIN: 10}
    check(model, images(3), training)
    assert bnfused.fusion_report(bnfused.convert(model.eval())).counts == {RELU: 11, ADD_RELU: 8, PLAIN: 3}
