"""The kit itself, without GradientNoise: contributions add up to the gradient, and torch.func has the same."""

import pytest
import torch

from .models import ALL, NONE
from .reference import contributions, expected, gradient

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize("name", ALL)
def test_contributions_add_up_to_the_gradient(name):
    problem = ALL[name].problem()
    contributed, whole = contributions(problem), gradient(problem)
    assert set(whole) <= set(contributed)
    size = max(float(c.abs().max()) for c in contributed.values())
    for parameter, c in contributed.items():
        wanted = whole.get(parameter, torch.zeros_like(c[0]))
        torch.testing.assert_close(c.sum(0), wanted, rtol=0, atol=1e-12 * size, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("name", ALL)
def test_every_case_has_signal_and_noise(name):
    told = expected(contributions(ALL[name].problem()))
    assert 0.01 < told.scalars["nsr"] < 1e4
    assert told.batch_size > 1


@pytest.mark.parametrize("name", NONE)
def test_coupled_samples_do_not_add_up(name):
    problem = NONE[name].problem()
    try:
        contributed = contributions(problem)
    except (RuntimeError, ValueError, IndexError):
        return  # a sample alone cannot even be computed
    whole = gradient(problem)
    size = max(float(c.abs().max()) for c in contributed.values())
    assert any(float((c.sum(0) - whole[p]).abs().max()) > 1e-3 * size for p, c in contributed.items() if p in whole)


BY_TORCH = (
    "mlp", "linear_of_images", "raw_products_cube", "token_mean", "conv_circular", "conv_grouped", "transposed_2d",
    "group_norm", "layer_norm_over_two_dimensions", "embedding_of_words", "positions_flat_square", "class_token",
    "gpt_tied_by_function", "linear_three_times", "autoencoder", "folded", "siamese", "frozen", "time_major_square",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BY_TORCH)
def test_torch_func_has_the_same_contributions(name):
    problem = ALL[name].problem().to(torch.float64)
    named = {n: p.detach() for n, p in problem.model.named_parameters() if p.requires_grad}
    weights = torch.full((problem.samples,), 1 / problem.samples, dtype=torch.float64)
    weights = weights if problem.weights is None else problem.weights(problem.target)

    def term(parameters, weight, inputs, target):
        out = torch.func.functional_call(problem.model, parameters, tuple(x.unsqueeze(0) for x in inputs))
        return weight * problem.loss(out, target.unsqueeze(0))

    every = torch.func.vmap(torch.func.grad(term), in_dims=(None, 0, 0, 0), randomness="different")
    told = every(named, weights, problem.inputs, problem.target)
    contributed = contributions(problem)
    size = max(float(c.abs().max()) for c in contributed.values())
    for parameter, c in contributed.items():
        torch.testing.assert_close(told[parameter], c, rtol=0, atol=1e-12 * size)


def test_definitions_of_two_samples_by_hand():
    told = expected({"w": torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)})
    assert told.mean["w"].tolist() == [1.5, 1.0]  # g = 2 c: (2, 0) and (1, 2)
    assert told.variance["w"].tolist() == [0.5, 2.0]
    assert told.sq_norms.tolist() == [4.0, 5.0]
    assert told.projections.tolist() == [3.0, 3.5]
    assert told.scalars == {
        "trace_sigma": 2.5,
        "grad_sq_norm": 3.25,
        "grad_sq_norm_unbiased": 2.0,
        "nsr": 2.5 / 3.25,
        "nsr_batch": 1.25 / 3.25,
        "gns": 1.25,
    }
