"""normkern.names: the names that the user's model gives its parameters, whatever wraps the model."""

import pytest
import torch
from torch import nn

from normkern.names import parameter_names, strip_all, strip_prefixes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.weight", "0.weight"),
        ("module.0.weight", "0.weight"),
        ("module._orig_mod.0.weight", "0.weight"),
        ("_forward_module.module.net.0.bias", "net.0.bias"),
        ("layers.0._fsdp_wrapped_module.weight", "layers.0.weight"),
        ("a._checkpoint_wrapped_module._orig_mod.b.c", "a.b.c"),
        ("module", "module"),  # a parameter of this name
        ("module.module", "module"),
        ("my_module.weight", "my_module.weight"),
        ("submodule.module_list.0.weight", "submodule.module_list.0.weight"),
    ],
)
def test_prefixes_of_wrappers_are_removed_everywhere_and_nothing_else(name, expected):
    assert strip_prefixes(name) == expected


def test_names_that_would_become_equal_are_kept():
    assert strip_all(["module.a", "a", "module.b"]) == ["module.a", "a", "b"]
    assert strip_all(["a", "a"]) == ["a", "a"]  # equal before: not the wrappers' doing


def test_wrapped_models_have_the_names_of_the_model():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    plain = [name for name, _ in net.named_parameters()]
    for wrapped in (net, torch.compile(net, backend="eager"), torch.optim.swa_utils.AveragedModel(net)):
        names = parameter_names(wrapped)
        assert list(names.values()) == plain
        assert [names[p] for p in wrapped.parameters()] == plain


def test_shared_parameter_has_its_first_name():
    net = nn.ModuleDict({"module": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["module"].weight
    assert list(parameter_names(net).values()) == ["weight", "bias", "b.bias"]
