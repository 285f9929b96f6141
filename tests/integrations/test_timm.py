"""register_with_timm, and the optimizers inside wrappers."""

import importlib.util

import pytest
import torch
from support import fresh
from torch import nn

import normkern
from normkern.integrations import unwrap_optimizer

from .torchvision_stub import import_torchvision


@pytest.fixture(scope="module")
def factory():
    """timm's create_optimizer_v2, in an environment whose torchvision may be missing or of another torch."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("no timm")
    import_torchvision()
    from timm.optim import create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    from normkern.integrations import register_with_timm

    before = default_registry.create_optimizer
    register_with_timm()
    yield create_optimizer_v2
    default_registry.create_optimizer = before


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


@pytest.mark.parametrize("name", ["normkern_sgd", "normkernsgd", "NormKern_SGD"])
def test_name_gives_normkerns_optimizer(factory, net, name):
    opt = factory(net, opt=name, lr=0.1, momentum=0.8, weight_decay=0.01)
    assert type(opt) is normkern.SGD
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 0.01]  # timm's groups
    assert all(g["nesterov"] and g["momentum"] == 0.8 and g["stats"] == "tensor" for g in opt.param_groups)
    net(torch.randn(5, 4)).square().mean().backward()
    opt.step()
    assert opt.stats().weight_norm.isfinite().all()


def test_adamw_is_normkerns(factory, net):
    opt = factory(net, opt="normkern_adamw", lr=0.1, weight_decay=0.05, betas=(0.8, 0.9), eps=1e-6)
    assert type(opt) is normkern.AdamW
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 0.05]
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 and g["stats"] == "tensor" for g in opt.param_groups)
    net(torch.randn(5, 4)).square().mean().backward()
    opt.step()
    assert opt.stats().weight_norm.isfinite().all()


def test_momentum_is_without_nesterov_and_other_names_are_timms(factory, net):
    assert not factory(net, opt="normkern_momentum", lr=0.1).param_groups[0]["nesterov"]
    assert type(factory(net, opt="sgd", lr=0.1)) is torch.optim.SGD
    assert type(factory(net, opt="adamw", lr=0.1)) is torch.optim.AdamW


def test_lookahead_has_it_inside(factory, net):
    opt = factory(net, opt="lookahead_normkern_sgd", lr=0.1)
    assert type(opt) is not normkern.SGD
    assert type(unwrap_optimizer(opt)) is normkern.SGD


def test_unknown_name_is_refused(factory, net):
    with pytest.raises(
        ValueError, match=r"^register_with_timm: expected normkern_sgd, normkern_momentum or normkern_adamw, got 'normk"
    ):
        factory(net, opt="normkern_svag", lr=0.1)


def test_registering_again_changes_defaults(factory, net):
    from normkern.integrations import register_with_timm

    register_with_timm(stats=None)
    assert factory(net, opt="normkern_sgd", lr=0.1).param_groups[0]["stats"] is None
    register_with_timm()
    assert factory(net, opt="normkern_sgd", lr=0.1).param_groups[0]["stats"] == "tensor"


def sgd(net):
    return normkern.SGD(net.parameters(), lr=0.1, stats="tensor")


def test_accelerated_optimizer_is_unwrapped(net):
    accelerate = pytest.importorskip("accelerate")
    opt = sgd(net)
    assert unwrap_optimizer(accelerate.Accelerator(cpu=True).prepare(opt)) is opt


def test_lightning_optimizer_is_unwrapped_though_it_imitates_the_class(net):
    core = pytest.importorskip("lightning.pytorch.core.optimizer")
    opt = sgd(net)
    wrapped = core.LightningOptimizer(opt)
    assert isinstance(wrapped, normkern.SGD)
    assert unwrap_optimizer(wrapped) is opt


@pytest.mark.filterwarnings("ignore")
def test_private_optimizer_is_unwrapped(net):
    optimizers = pytest.importorskip("opacus.optimizers")
    opt = sgd(net)
    wrapped = optimizers.DPOptimizer(opt, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)
    assert unwrap_optimizer(wrapped) is opt


def test_wrappers_in_a_cycle_end(net):
    class Wrapper:
        def __init__(self, inner):
            self.optimizer, self.param_groups = inner, []

    a = Wrapper(None)
    a.optimizer = Wrapper(a)
    assert unwrap_optimizer(a) in (a, a.optimizer)
    assert unwrap_optimizer(None) is None
    opt = torch.optim.Adam(net.parameters())
    assert unwrap_optimizer(opt) is opt


def test_the_package_loads_no_framework_until_it_is_used():
    code = (
        "import sys, normkern; assert 'normkern.integrations' not in sys.modules; import normkern.integrations as i; "
        "print(sorted({'lightning', 'transformers', 'timm', 'ultralytics', 'accelerate', 'tensorboard'} & set(sys.modules)), dir(i))"
    )
    done = fresh.python("-c", code)
    assert done.stdout.strip() == (
        "[] ['HuggingFaceCallback', 'LightningCallback', 'UltralyticsCallback', 'register_with_timm', 'unwrap_optimizer']"
    )
    import normkern.integrations

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        normkern.integrations.nothing  # noqa: B018
