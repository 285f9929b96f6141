"""Models of timm."""

from __future__ import annotations

import enum
import functools
import importlib.util
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .entry import SAMPLES, Problem, Zoo, with_tensors

NAMES = [
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "test_resnet",
    "test_resnet",
    "test_convnext",
    "test_convnext2",
    "test_convnext3",
    "test_efficientnet",
    "test_efficientnet_evos",
    "test_efficientnet_gn",
    "test_efficientnet_ln",
    "test_byobnet",
    "test_mambaout",
    "test_nfnet",
    "resnet10t",
    "resnet18",
    "resnext26ts",
    "seresnext26d_32x4d",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "lcnet_035",
    "tinynet_e",
    "mnasnet_small",
    "ghostnet_050",
    "hardcorenas_a",
    "convnext_atto",
    "convnextv2_atto",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_ns_224",
    "coat_lite_tiny",
    "pit_ti_224",
    "mixer_s32_224",
    "gmlp_ti16_224",
    "resmlp_12_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "fastvit_t8",
    "repvgg_a0",
    "rexnetr_200",
    "dla46_c",
    "densenet121",
    "regnetx_002",
    "regnety_002",
    "dpn48b",
    "efficientvit_b0",
    "efficientvit_m0",
    "tiny_vit_5m_224",
    "maxvit_rmlp_pico_rw_256",
    "coatnet_pico_rw_224",
    "nest_tiny",
    "halonet26t",
    "botnet26t_256",
    "lambda_resnet26t",
    "sehalonet33ts",
    "visformer_tiny",
    "twins_pcpvt_small",
    "volo_d1_224",
    "focalnet_tiny_srf",
    "starnet_s1",
    "shvit_s1",
    "mambaout_femto",
    "inception_next_atto",
    "nf_resnet26",
    "vovnet39a",
    "cspresnet50",
    "darknet17",
    "hrnet_w18_small",
    "selecsls42",
    "res2net50_14w_8s",
    "skresnet18",
    "gernet_s",
    "ese_vovnet19b_dw",
    "repvit_m0_9",
    "davit_tiny",
    "eva02_tiny_patch14_224",
    "hiera_tiny_224",
    "sequencer2d_s",
    "convmixer_768_32",
    "tf_efficientnet_b0",
    "rdnet_tiny",
    "semnasnet_050",
    "fbnetc_100",
    "spnasnet_100",
    "tresnet_m",
    "xception41",
    "swiftformer_xs",
]
#: Divide an image of 64 pixels into blocks that do not fit.
LARGE = frozenset(["halonet26t", "sehalonet33ts"])
QUICK = frozenset(["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet"])
_NAMES = {
    "": "",
    "ops": "",
    "ops.misc": "FrozenBatchNorm2d",
    "transforms": "InterpolationMode Compose Resize Normalize ToTensor",
    "transforms.functional": "InterpolationMode",
    "datasets": "CIFAR100 CIFAR10 MNIST KMNIST FashionMNIST ImageFolder Places365 INaturalist QMNIST ImageNet",
    "models": "",
    "models.feature_extraction": "create_feature_extractor get_graph_node_names",
    "utils": "save_image",
}
_Modes = enum.Enum("_Modes", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")


def stand_in() -> None:
    """Put modules in the place of torchvision, of which timm imports names that its models do not need."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name, members in _NAMES.items():
        full = f"torchvision.{name}" if name else "torchvision"
        module: Any = types.ModuleType(full)
        module.__path__, module.__version__ = [], "0"
        module.__spec__ = importlib.util.spec_from_loader(full, None)
        for member in members.split():
            setattr(module, member, _Modes if member == "InterpolationMode" else type(member, (torch.nn.Module,), {}))
        sys.modules[full] = module
        if name:
            setattr(sys.modules[full.rpartition(".")[0]], full.rpartition(".")[2], module)


def classifier(name: str) -> Problem:
    """A classifier of small images."""
    fresh = "torchvision" not in sys.modules
    stand_in()
    import timm

    if fresh and getattr(sys.modules.get("torchvision"), "__file__", None) is None:
        for key in [k for k in sys.modules if k.partition(".")[0] == "torchvision"]:
            del sys.modules[key]  # other libraries ask whether it is installed
    options: dict[str, Any] = {"num_classes": 5}
    model = None
    for more in ({"img_size": 64}, {}):
        try:
            model = timm.create_model(name, **options, **more)
            break
        except (TypeError, AssertionError, ValueError, RuntimeError):
            continue
    if model is None:
        raise ValueError(f"timm makes no {name} here")
    side = 64 if more or not hasattr(model, "patch_embed") else model.default_cfg["input_size"][-1]
    if (model.default_cfg.get("fixed_input_size") and not more) or name in LARGE:
        side = model.default_cfg["input_size"][-1]
    problem = with_tensors(model, _x=torch.randn(SAMPLES, 3, side, side))
    return replace(problem, loss=functools.partial(_without_caches, problem.loss))


def _without_caches(loss: Any, model: nn.Module, samples: Sequence[int]) -> Tensor:
    """Return a loss of what is computed anew: in eval mode some models keep a table, which has one backward."""
    for module in model.modules():
        if isinstance(getattr(module, "attention_bias_cache", None), dict):
            module.attention_bias_cache.clear()  # type: ignore[union-attr, operator]
    return loss(model, samples)


def add(zoo: Zoo) -> None:
    """Add all of them."""
    for name in dict.fromkeys(NAMES):
        zoo.add("timm", name, functools.partial(classifier, name), name in QUICK)
