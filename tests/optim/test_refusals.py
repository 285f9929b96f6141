"""Bad input to normkern.SGD: a sentence that says what was expected, and nothing is written."""

import pytest
import torch
from support.twins import give_gradients, parameters
from torch import nn
from torch.testing._internal.common_optimizers import optim_error_inputs_func_sgd

import normkern


@pytest.mark.parametrize("wrong", optim_error_inputs_func_sgd("cpu", torch.float32), ids=lambda e: e.error_regex)
def test_torchs_own_errors(wrong):
    given_by_torch = wrong.optimizer_error_input
    with pytest.raises(wrong.error_type, match=wrong.error_regex):
        normkern.SGD(given_by_torch.params, **given_by_torch.kwargs)


def bad_steps():
    def resized(p):
        p[1].data = torch.ones(2, 2)

    def integer(p):
        p[1].requires_grad_(False)
        p[1].data, p[1].grad = torch.ones(p[1].shape, dtype=torch.int64), None
        p[1].grad = torch.ones(p[1].shape, dtype=torch.int64)

    def expanded(p):
        p[1].data = torch.ones(1).expand(p[1].shape)

    def overlapping(p):
        base = torch.ones(1000)
        p[0].data, p[1].data = base[:48].view(16, 3), base[20:68].view(16, 3)

    yield (
        "shape",
        resized,
        ValueError,
        r"SGD.step: param_groups\[1\]: grads\[0\] has shape \(16, 3\) but params\[0\] has shape \(2, 2\)",
    )
    yield (
        "integer",
        integer,
        RuntimeError,
        r"SGD.step: param_groups\[1\]: params\[0\] is .*int64 on cpu; expected a floating point or complex",
    )
    yield "expanded", expanded, ValueError, r"SGD.step: param_groups\[1\]: params\[0\] of shape \(16, 3\) is expanded"
    yield (
        "overlap",
        overlapping,
        ValueError,
        r"params\[0\] of param_groups\[1\] partially overlaps params\[0\] of param_groups\[0\]",
    )


@pytest.mark.parametrize(("spoil", "error", "text"), [c[1:] for c in bad_steps()], ids=[c[0] for c in bad_steps()])
def test_error_in_the_last_group_leaves_the_first_unwritten(spoil, error, text):
    params = parameters([(16, 3), (16, 3)])
    opt = normkern.SGD([{"params": [params[0]]}, {"params": [params[1]]}], lr=0.1, momentum=0.9)
    give_gradients(params, seed=0)
    opt.step()
    spoil(params)
    before = [p.detach().clone() for p in params], opt.state[params[0]]["momentum_buffer"].clone()
    with pytest.raises(error, match=text):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before[0], strict=True))
    assert torch.equal(opt.state[params[0]]["momentum_buffer"], before[1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": torch.ones(2)}, r"SGD.step: param_groups\[0\]: lr expected one number, got a tensor of shape \(2,\)"),
        ({"lr": "fast"}, r"param_groups\[0\]: lr expected a number, got 'fast'"),
        ({"weight_decay": None}, r"param_groups\[0\]: weight_decay expected a number, got None"),
        ({"stats": "column"}, r"param_groups\[0\]: stats expected None, \"tensor\" or \"row\", got 'column'"),
        (
            {"decay": "linear"},
            r"param_groups\[0\]: decay expected \"coupled\", \"exponential\" or \"corrected\", got 'linear'",
        ),
    ],
)
def test_bad_group_options(options, text):
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1)
    opt.param_groups[0].update(options)
    with pytest.raises(ValueError, match=text):
        opt.step()
    assert w.detach().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stats": "all"}, "SGD: stats expected"),
        ({"decay": "linear"}, 'SGD: decay expected "coupled", "exponential" or "corrected", got \'linear\''),
    ],
)
def test_bad_constructor_options(options, text):
    with pytest.raises(ValueError, match=text):
        normkern.SGD([nn.Parameter(torch.ones(2))], **options)


def test_momentum_buffer_of_another_shape_in_the_state():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = normkern.SGD([w], lr=0.1, momentum=0.9)
    opt.state[w]["momentum_buffer"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"momentum_buffers\[0\] has shape \(4,\) but params\[0\] has shape \(3,\)"):
        opt.step()
    assert w.detach().tolist() == [1, 1, 1]


@pytest.mark.parametrize("construct", [normkern.SGD, normkern.SVAG])
@pytest.mark.parametrize("option", ["lr", "momentum", "dampening", "weight_decay"])
def test_text_in_place_of_a_number(construct, option):
    with pytest.raises(ValueError) as caught:
        construct([nn.Parameter(torch.ones(2))], **{option: "0.1"})
    assert str(caught.value) == f"{construct.__name__}: {option} expected a number, got '0.1'"


@pytest.mark.parametrize("model", [nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3))])
def test_model_in_place_of_its_parameters(model):
    with pytest.raises(TypeError) as caught:
        normkern.SGD(model, lr=0.1)
    assert str(caught.value) == (
        f"SGD: params expected parameters or param groups, got the model, {type(model).__name__}; pass "
        "model.parameters() or model.named_parameters()"
    )


def test_checkpoint_of_adamw_is_refused():
    p = nn.Parameter(torch.ones(2))
    other, opt = torch.optim.AdamW([p], lr=0.3), normkern.SGD([p], lr=0.1)
    p.grad = torch.ones(2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"param_groups\[0\] expected the options of SGD, got betas, which Adam"):
            opt.load_state_dict(other.state_dict())
        assert opt.param_groups[0]["lr"] == 0.1
        assert not opt.state
        other.step()


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop", "LBFGS", "Adafactor", "NAdam"])
def test_checkpoints_of_other_optimizers_are_refused(name):
    p = nn.Parameter(torch.ones(2, 2))
    other, opt = getattr(torch.optim, name)([p]), normkern.SGD([p], lr=0.1)
    with pytest.raises(ValueError, match="expected the options of SGD, got .* this checkpoint is of another optimizer"):
        opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["lr"] == 0.1
