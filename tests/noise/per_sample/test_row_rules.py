"""Samples in any order: the sample of every entry is that on which it depends; options that say it; refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import normkern
from normkern.noise.per_sample import row_rules
from normkern.noise.per_sample.numbered import NO_SAMPLE, described, merged, table_of
from normkern.noise.per_sample.sample_layout import Mixed, SampleLayout

from .measuring import refuses

BATCH, TOKENS, WIDTH = 3, 4, 6
ORDER = torch.tensor([5, 0, 7, 3, 1, 11, 2, 9, 4, 10, 6, 8])  #: of the 12 rows of 3 samples
INDEX = torch.tensor([2, 2, 0, 11, 5])
ONES = torch.ones(WIDTH, WIDTH, dtype=torch.float64)
#: Operations on rows (12, 6) in another order; y is like x.
EXACT = {
    "index": lambda x, y: x[INDEX],
    "negative_index": lambda x, y: x[torch.tensor([-1, 0])],
    "mask": lambda x, y: x[torch.arange(12) % 3 == 1],
    "slice": lambda x, y: x[2:9:3, 1:],
    "none": lambda x, y: x[:, None],
    "two_indices": lambda x, y: x[INDEX, torch.tensor([0, 1, 2, 3, 4])],
    "index_select": lambda x, y: x.index_select(0, INDEX),
    "index_select_features": lambda x, y: x.index_select(1, torch.tensor([3, 0])),
    "gather": lambda x, y: x.gather(0, torch.arange(12).flip(0)[:, None].expand(12, 6)),
    "take_along_dim": lambda x, y: torch.take_along_dim(x, torch.arange(6).flip(0)[None], 1),
    "masked_select": lambda x, y: x.masked_select((torch.arange(12) % 2 == 0)[:, None]),
    "take": lambda x, y: x.take(torch.tensor([0, 70, 33])),
    "repeat_interleave": lambda x, y: x.repeat_interleave(2, 0),
    "repeat_interleave_tensor": lambda x, y: x.repeat_interleave(torch.arange(12), 0),
    "repeat": lambda x, y: x.repeat(2, 3),
    "expand": lambda x, y: x.unsqueeze(1).expand(12, 2, 6),
    "view": lambda x, y: x.view(3, 4, 2, 3),
    "flat": lambda x, y: x.reshape(-1),
    "transpose": lambda x, y: x.t(),
    "permute": lambda x, y: x.view(3, 4, 6).permute(2, 0, 1),
    "flip": lambda x, y: x.flip(0),
    "roll": lambda x, y: x.roll(5, 0),
    "cat": lambda x, y: torch.cat([x, y, torch.zeros(2, 6, dtype=x.dtype)]),
    "cat_features": lambda x, y: torch.cat([x, y], 1),
    "stack": lambda x, y: torch.stack([x, y], 1),
    "split": lambda x, y: x.split([5, 7])[1],
    "chunk": lambda x, y: x.chunk(3)[2],
    "unbind": lambda x, y: x.unbind()[4],
    "sort": lambda x, y: x.sort(0).values,
    "sort_features": lambda x, y: x.sort(1).values,
    "topk": lambda x, y: x.topk(3, 0).values,
    "cumsum_features": lambda x, y: x.cumsum(1),
    "softmax": lambda x, y: x.softmax(-1),
    "normalize": lambda x, y: F.normalize(x, dim=1),
    "pointwise": lambda x, y: torch.where(x > 0, x * y, y.exp()),
    "broadcast": lambda x, y: x[:, :1] * y,
    "sum_features": lambda x, y: x.sum(1),
    "sum_kept": lambda x, y: x.sum(-1, keepdim=True),
    "max_features": lambda x, y: x.max(1).values,
    "sum_of_one": lambda x, y: x[3].sum(),
    "norm": lambda x, y: torch.linalg.vector_norm(x, dim=1),
    "matmul": lambda x, y: x @ ONES,
    "matmul_left": lambda x, y: ONES @ x.t(),
    "matvec": lambda x, y: x @ ONES[0],
    "bmm": lambda x, y: torch.bmm(x[:, None], y[:, :, None]),
    "baddbmm": lambda x, y: torch.baddbmm(x[:, :1, None], x[:, None], y[:, :, None]),
    "addmm": lambda x, y: torch.addmm(x, y, ONES),
    "einsum": lambda x, y: torch.einsum("rd,rd->r", x, y),
    "einsum_outer": lambda x, y: torch.einsum("rd,re->der", x, y),
    "linear": lambda x, y: F.linear(x, ONES),
    "conv1d": lambda x, y: F.conv1d(x.view(12, 2, 3), ONES.view(3, 2, 6)[..., :3], padding=1),
    "max_pool": lambda x, y: F.max_pool1d(x.view(12, 2, 3), 2),
    "attention": lambda x, y: F.scaled_dot_product_attention(x.view(12, 2, 3), y.view(12, 2, 3), y.view(12, 2, 3)),
    "group_norm": lambda x, y: F.group_norm(x.view(12, 2, 3), 1),
    "layer_norm": lambda x, y: F.layer_norm(x, (6,)),
    "pad": lambda x, y: F.pad(x, (0, 0, 1, 2)),
    "pad_replicate": lambda x, y: F.pad(x.view(12, 2, 3), (1, 1), mode="replicate"),
    "index_add": lambda x, y: x.index_add(0, torch.arange(12), y),
    "index_add_to_zeros": lambda x, y: torch.zeros(14, 6, dtype=x.dtype).index_add(0, torch.arange(12) + 1, y),
    "index_copy": lambda x, y: x.index_copy(0, torch.tensor([1, 4]), y[[4, 1]]),
    "scatter_add": lambda x, y: torch.zeros(14, 6, dtype=x.dtype).scatter_add(0, torch.arange(12)[:, None].expand(12, 6), x),
    "scatter_reduce": lambda x, y: x.scatter_reduce(0, torch.arange(12)[:, None].expand(12, 6), y, "amax"),
    "scatter": lambda x, y: x.scatter(0, torch.arange(11, -1, -1)[:, None].expand(12, 6), y),
    "index_put": lambda x, y: x.index_put((INDEX[:1],), y[7:8]),
    "masked_scatter": lambda x, y: torch.zeros(12, 6, dtype=x.dtype).masked_scatter((torch.arange(12) % 2 == 0)[:, None], y),
    "masked_fill": lambda x, y: x.masked_fill((torch.arange(12) % 2 == 0)[:, None], 0.0),
    "pad_sequence": lambda x, y: pad_sequence([x[:2], x[5:9], y[9:10]]),
    "sum_by_sample": lambda x, y: torch.zeros(3, 6, dtype=x.dtype).index_add(0, ORDER // 4, x),

}  # fmt: skip
MIXES = {
    "sum": lambda x, y: x.sum(0),
    "mean_of_two": lambda x, y: x[:2].mean(0),
    "softmax": lambda x, y: x.softmax(0),
    "cumsum": lambda x, y: x.cumsum(0),
    "shifted": lambda x, y: x + y.roll(1, 0),
    "gram": lambda x, y: x @ y.t(),
    "covariance": lambda x, y: x.t() @ y,
    "einsum": lambda x, y: torch.einsum("rd,rd->d", x, y),
    "index_add": lambda x, y: x.index_add(0, torch.zeros(12, dtype=torch.int64), y),
    "scatter_add": lambda x, y: torch.zeros(2, 6, dtype=x.dtype).scatter_add(0, (torch.arange(12) % 2)[:, None].expand(12, 6), x),
    "index_put": lambda x, y: x.index_put((torch.zeros(2, dtype=torch.int64),), y[:2], accumulate=True),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None], y[None], y[None]),
    "cdist": lambda x, y: torch.cdist(x, y),
    "batch_norm": lambda x, y: F.instance_norm(x.t()[None])[0].t(),
    "pooled": lambda x, y: F.avg_pool1d(x.t()[None], 3)[0],
    "unknown": lambda x, y: torch.cov(x),
}  # fmt: skip


def _written(x, y, how):
    out = x.new_zeros(14, 6)
    how(out, x)
    return out


EXACT.update({
    "copied_into_a_part": lambda x, y: _written(x, y, lambda out, x: out[1:13].copy_(x)),
    "added_into_a_part": lambda x, y: _written(x, y, lambda out, x: out.t()[:, 2:].add_(x.t())),
    "added_into_parts": lambda x, y: _written(x, y, lambda out, x: [out[i].add_(row) for i, row in enumerate(x)]),
    "written_into_a_part": lambda x, y: _written(x, y, lambda out, x: out.view(-1).index_copy_(0, torch.arange(6), x[3])),
    "in_place": lambda x, y: x.clone().mul_(y),
})  # fmt: skip


class Identity(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x


def followed(run):
    """The result of an operation on rows in another order, its state, and the samples on which each entry depends."""
    torch.manual_seed(0)
    data = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    model = Identity()
    noise = normkern.GradientNoise(model)

    def apply(x):
        rows = x.flatten(0, 1)[ORDER]
        return run(rows, rows.sin())

    with noise:
        leaf = data.clone().requires_grad_()
        out = apply(model(leaf))
        state = noise._session.tracer.tensors.state(out)
    on = torch.autograd.functional.jacobian(apply, data)
    return out, state, on.flatten(out.dim() + 1).abs().sum(-1) > 0


@pytest.mark.parametrize("name", EXACT)
def test_every_entry_is_of_the_sample_on_which_it_depends(name):
    out, state, on = followed(EXACT[name])
    table = table_of(out.shape, state, BATCH)
    assert table is not None, state
    table = table.expand(out.shape)
    assert bool((on.sum(-1) <= 1).all())
    assert torch.equal(table[on.any(-1)], on.long().argmax(-1)[on.any(-1)])
    if name not in ("masked_fill", "max_pool", "group_norm"):  # whose constants keep the samples of their place
        assert bool((table[~on.any(-1)] == NO_SAMPLE).all())


@pytest.mark.parametrize("name", MIXES)
def test_operations_that_mix_samples_say_so(name):
    assert type(followed(MIXES[name])[1]) is Mixed


def test_every_rule_names_an_operation_once():
    assert {name for name in row_rules.RULES if not name.replace("_", "").replace("::", "").isalnum()} == set()


def test_indices_of_one_sample_that_pick_entries_of_another():
    def picks(x, y):
        return x[(x[:, 0] * 0).long()]

    assert type(followed(picks)[1]) is Mixed


def test_tables():
    table = torch.tensor([0, 1, NO_SAMPLE, 0])
    assert torch.equal(merged([table, torch.tensor([0, NO_SAMPLE, 2, 0])]), torch.tensor([0, 1, 2, 0]))
    assert merged([table, torch.tensor([1, 1, 1, 1])]) is None
    assert described(torch.arange(3)[:, None], (3, 5), 3) == SampleLayout(5)
    assert described(torch.full((1, 1), NO_SAMPLE), (3, 5), 3) is None


# --- what the user says ----------------------------------------------------------------------------------------------


class Graphs(nn.Module):
    """Two rounds of messages along edges, a mean over nodes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x, edges, batch):
        for layer in (self.a, self.b):
            h = layer(x)
            x = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        count = int(batch.max()) + 1
        sums = x.new_zeros(count, 5).index_add_(0, batch, x)
        return self.head(sums / batch.bincount(minlength=count)[:, None])


NODES = (4, 1, 3, 5)


def graphs(only=range(4)):
    """Nodes, edges and graph of each node; the nodes of the last graphs come first."""
    torch.manual_seed(1)
    every = [torch.randn(n, 3, dtype=torch.float64) for n in NODES]
    xs, edges, batch, offset = [], [], [], 0
    for place in reversed(range(len(only))):
        n = NODES[only[place]]
        xs.append(every[only[place]])
        edges.append(torch.stack([torch.arange(n), (torch.arange(n) + 1) % n]) + offset)
        batch.append(torch.full((n,), place))
        offset += n
    return torch.cat(xs), torch.cat(edges, 1), torch.cat(batch)


def norms(model, losses):
    """The squared norms of the gradients of losses, one per sample."""
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    return torch.stack([sum(g.square().sum() for g in gs) for gs in grads])


def test_graphs_by_the_vector_that_has_the_graph_of_each_node():
    model = Graphs().double()
    noise = normkern.GradientNoise(model, ("norms", "variance"), samples="batch")
    with noise:
        model(*graphs()).square().sum(1).mean().backward()
    told = norms(model, [model(*graphs([i])).square().sum() for i in range(4)])
    torch.testing.assert_close(noise.result().sq_norms, told)


def test_measure_takes_the_vector_of_graphs():
    model = Graphs().double()
    told = norms(model, [model(*graphs([i])).square().sum() for i in range(4)])

    def loss(model, batch):
        return model(*batch).square().sum(1).mean()

    result = normkern.GradientNoise.measure(model, loss, graphs(), stats="norms", samples="batch")
    torch.testing.assert_close(result.sq_norms, told)
    assert result.batch_size == 4
    with refuses("samples='nodes' expected"):
        normkern.GradientNoise.measure(model, loss, graphs(), samples="nodes")


def test_edges_between_graphs_are_refused():
    model = Graphs().double()
    x, edges, batch = graphs()
    edges = torch.cat([edges, torch.tensor([[0], [len(x) - 1]])], 1)
    with normkern.GradientNoise(model, samples="batch"), refuses("index_add of different samples into one place"):
        model(x, edges, batch)


class Data:
    """As torch_geometric's."""

    def __init__(self, **tensors):
        self.__dict__.update(tensors)

    def to_dict(self):
        return dict(self.__dict__)


def test_graphs_in_an_object():
    class Wrapped(Graphs):
        def forward(self, data):
            return super().forward(data.x, data.edge_index, data.batch)

    model = Wrapped().double()
    noise = normkern.GradientNoise(model, ("norms",), samples="batch")
    with noise:
        x, edges, batch = graphs()
        model(Data(x=x, edge_index=edges, batch=batch)).square().sum(1).mean().backward()
    told = norms(model, [Graphs.forward(model, *graphs([i])).square().sum() for i in range(4)])
    torch.testing.assert_close(noise.result().sq_norms, told)


@pytest.mark.parametrize(
    ("samples", "match"),
    [("nodes", "samples='nodes' expected .*Graphs.forward.*got none"), ("x", r"got a tensor of shape \(13, 3\)")],
)
def test_samples_must_name_a_vector(samples, match):
    model = Graphs().double()
    with normkern.GradientNoise(model, samples=samples), refuses(match):
        model(*graphs())


def test_samples_is_a_name():
    with pytest.raises(TypeError, match="samples expected the name of an argument or None, got Tensor"):
        normkern.GradientNoise(Graphs(), samples=torch.zeros(3))


class Detector(nn.Module):
    """Takes a list of images."""

    def __init__(self):
        super().__init__()
        self.c, self.o = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, images):
        return self.o(self.c(torch.stack(images)).mean((2, 3)))


class Bag(nn.Module):
    """Takes a list of sets."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, bags):
        padded = torch.tanh(self.a(pad_sequence(bags, batch_first=True)))
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(bag) for bag in bags])[:, None]
        return self.b((padded * mask[..., None]).sum(1))


def test_a_list_of_images_with_batch_size():
    model, images = Detector().double(), [torch.randn(3, 8, 8, dtype=torch.float64) for _ in range(6)]
    noise = normkern.GradientNoise(model, ("norms",), batch_size=6)
    with noise:
        model(images).square().sum(1).mean().backward()
    told = norms(model, [model([x]).square().sum() for x in images])
    torch.testing.assert_close(noise.result().sq_norms, told)


def test_a_list_of_sets_of_different_sizes():
    model, bags = Bag().double(), [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 1, 3)]
    noise = normkern.GradientNoise(model, ("norms",))
    with noise:
        model(bags).square().sum(1).mean().backward()
    told = norms(model, [model([x]).square().sum() for x in bags])
    assert noise.result().batch_size == 4
    torch.testing.assert_close(noise.result().sq_norms, told)


class OfDict(nn.Module):
    """Takes a dict whose entry is a list of images."""

    def __init__(self):
        super().__init__()
        self.detector = Detector()

    def forward(self, batch):
        return self.detector(list(batch["images"]))


@pytest.mark.parametrize("kind", ["tuple", "dict of a list", "dict of a tuple"])
def test_a_tuple_of_images_and_a_dict_that_has_one(kind):
    images = tuple(torch.randn(3, 8, 8, dtype=torch.float64) for _ in range(6))
    model = (Detector() if kind == "tuple" else OfDict()).double()
    give = {"tuple": lambda x: x, "dict of a list": lambda x: {"images": list(x)}}.get(kind, lambda x: {"images": x})
    noise = normkern.GradientNoise(model, ("norms",), batch_size=6)
    with noise:
        model(give(images)).square().sum(1).mean().backward()
    told = norms(model, [model(give((x,))).square().sum() for x in images])
    torch.testing.assert_close(noise.result().sq_norms, told)


def test_a_dict_of_a_list_that_may_be_samples_or_batches():
    model = OfDict()
    with normkern.GradientNoise(model), refuses("list of 6 tensors.*batch_size=6 if each is a sample"):
        model({"images": [torch.randn(3, 8, 8) for _ in range(6)]})


class TwoInputs(nn.Module):
    """Takes a tuple of two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, pair):
        return self.a(pair[0]) + self.b(pair[1])


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_tuple_of_inputs_is_no_list_of_samples(batch_size):
    model, x, y = TwoInputs().double(), torch.randn(2, 3).double(), torch.randn(2, 5).double()
    noise = normkern.GradientNoise(model, ("norms",), batch_size=batch_size)
    with noise:
        model((x, y)).square().sum(1).mean().backward()
    told = norms(model, [model((x[b], y[b])).square().sum() for b in range(2)])
    torch.testing.assert_close(noise.result().sq_norms, told)


@pytest.mark.parametrize(
    ("count", "match"),
    [(6, "batch_size=6 if each is a sample, batch_size=3 if each begins"), (3, "torch.stack of them")],
)
def test_a_list_that_may_be_samples_or_batches(count, match):
    model = Detector()
    with normkern.GradientNoise(model), refuses(f"list of {count} tensors.*{match}"):
        model([torch.randn(3, 8, 8) for _ in range(count)])


def test_a_jagged_tensor():
    rows = torch.nested.nested_tensor([torch.randn(n, 3) for n in (1, 2, 3)], layout=torch.jagged)
    model = nn.Linear(3, 2)
    with normkern.GradientNoise(model), refuses("nested tensor, whose samples are not followed.*samples="):
        model(rows)


class Padded(nn.Module):
    """A layer on rows of which some are zeros; `kept`: whether they reach the loss."""

    def __init__(self, kept, layer):
        super().__init__()
        self.kept, self.a, self.b = kept, nn.Linear(3, 4), layer

    def forward(self, x):
        rows = x.new_zeros(len(x) + 2, 4).index_add(0, torch.arange(len(x)) + 1, self.a(x))
        out = self.b(rows)
        return out if self.kept else out[1:-1]


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x + self.b


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x):
        return torch.einsum("ri,kio->rko", x, self.w)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 2), Bias, Table], ids=["linear", "bias", "einsum"])
def test_rows_that_no_sample_made(layer):
    """Dropped before the loss they do no harm; else it is unknown whose gradient theirs is."""
    x = torch.randn(5, 3, dtype=torch.float64)
    model = Padded(False, layer()).double()
    noise = normkern.GradientNoise(model, ("norms",))
    with noise:
        (model(x) + 1).square().sum().div(5).backward()
    told = norms(model, [(model(row[None]) + 1).square().sum() for row in x])
    torch.testing.assert_close(noise.result().sq_norms, told)
    model.kept = True
    with normkern.GradientNoise(model), refuses("on entries that no sample made"):
        (model(x) + 1).square().sum().div(5).backward()
    model.zero_grad()
    noise = normkern.GradientNoise(model, ("norms",), uncovered="exclude")
    with noise:
        (model(x) + 1).square().sum().div(5).backward()
    assert noise.result().coverage.exact == ("a.weight", "a.bias")
    wanted = torch.autograd.grad((model(x) + 1).square().sum().div(5), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(wanted))
    told = norms(model.a, [(model(row[None]) + 1).square().sum() for row in x])
    torch.testing.assert_close(noise.result().sq_norms, told)
