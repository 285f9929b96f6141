"""The optimizers inside the wrappers of frameworks: the run of the bare optimizer, with every method."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import normkern
from normkern.optim.unwrap import unwrap_optimizer


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))


def data():
    make = torch.Generator().manual_seed(0)
    return torch.randn(64, 3, 2, 2, generator=make), torch.randint(3, (64,), generator=make)


def pairs_through(opt, model, backward, steps=6):
    x, y = data()
    for t in range(steps):
        i = 16 * (t % 4)
        opt.zero_grad()
        backward(cross_entropy(model(x[i : i + 8]), y[i : i + 8]))
        opt.hold()
        backward(cross_entropy(model(x[i + 8 : i + 16]), y[i + 8 : i + 16]))
        opt.step()


def bare_pairs(l, steps=6):
    model = net()
    opt = normkern.SVAG(model.named_parameters(), lr=0.1, l=l, momentum=0.9, stats="tensor")
    pairs_through(opt, model, torch.Tensor.backward, steps)
    return model, opt


def check_same(model, twin):
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("l", [1.0, 4.0])
@pytest.mark.parametrize("wrapped", [True, False])
def test_lightning_pairs(l, wrapped):
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = net()

        def configure_optimizers(self):
            return normkern.SVAG(self.net.named_parameters(), lr=0.1, l=l, momentum=0.9, stats="tensor")

        def training_step(self, batch, i):
            opt = self.optimizers(use_pl_optimizer=wrapped)
            x, y = batch
            opt.zero_grad()
            self.manual_backward(cross_entropy(self.net(x[:8]), y[:8]))
            opt.hold()
            self.manual_backward(cross_entropy(self.net(x[8:]), y[8:]))
            opt.step()
            self.seen = opt.stats().names, opt.noise().count, opt.true_scale(), opt.last_grad_norm

    module = Module()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 16))
    twin, opt = bare_pairs(l, steps=4)
    check_same(module.net, twin)
    assert module.seen == (opt.stats().names, 4, [1.0], None)


@pytest.mark.parametrize("l", [1.0, 4.0])
def test_fabric_pairs(l):
    fabric_module = pytest.importorskip("lightning.fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model = net()
    inner = normkern.SVAG(model.named_parameters(), lr=0.1, l=l, momentum=0.9, stats="tensor")
    wrapped_model, opt = fabric.setup(model, inner)
    pairs_through(opt, wrapped_model, fabric.backward)
    twin, bare = bare_pairs(l)
    check_same(model, twin)
    assert opt.stats() is inner.stats()
    assert opt.noise().count == bare.noise().count == 6
    assert torch.equal(opt.noise().trace_sigma, bare.noise().trace_sigma)
    state = opt.state_dict()
    opt.load_state_dict(state)
    pairs_through(opt, wrapped_model, fabric.backward, steps=1)
    opt.release()
    opt.add_param_group({"params": [("more", nn.Parameter(torch.ones(2)))]})
    assert len(inner.param_groups) == 2
    names = normkern.SGD(wrapped_model.named_parameters(), lr=0.1)._names_of([(0, list(wrapped_model.parameters()))])
    assert names == [name for name, _ in model.named_parameters()]


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, twin = net(), net()
    accelerator = accelerate.Accelerator(cpu=True)
    inner = normkern.SGD(model.parameters(), lr=0.1, momentum=0.9, stats="tensor", max_norm=0.05)
    model, opt = accelerator.prepare(model, inner)
    bare = normkern.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    monitor = normkern.EquilibriumMonitor(opt)
    unwrap_optimizer(opt).name_parameters(model)
    x, y = data()
    for _ in range(3):
        opt.zero_grad()
        bare.zero_grad()
        accelerator.backward(cross_entropy(model(x), y))
        cross_entropy(twin(x), y).backward()
        opt.step()
        norm = bare.step(max_norm=0.05)
        assert monitor.update()
    check_same(model, twin)
    assert torch.equal(inner.last_grad_norm, norm)
    assert inner.stats().names == ["1.weight", "1.bias", "3.weight", "3.bias"]


def test_lookahead_of_pytorch_optimizer():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    model, twin = net(), net()
    runs = []
    for m, cls in ((model, normkern.SGD), (twin, torch.optim.SGD)):
        opt = pytorch_optimizer.Lookahead(cls(m.parameters(), lr=0.1, momentum=0.9), k=3)
        runs.append((m, opt))
    x, y = data()
    for _ in range(7):
        for m, opt in runs:
            opt.zero_grad()
            cross_entropy(m(x), y).backward()
            opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert isinstance(unwrap_optimizer(runs[0][1]), normkern.SGD)


def lookahead_of_timm():
    """The class from its file: the whole of timm needs torchvision, whose ops may not load beside a torch for CPUs."""
    folder = importlib.util.find_spec("timm")
    if folder is None:
        pytest.skip("timm is not installed")
    path = Path(folder.submodule_search_locations[0]) / "optim" / "lookahead.py"
    spec = importlib.util.spec_from_file_location("lookahead_of_timm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lookahead


def test_lookahead_of_timm():
    """The slow weights lie in our state, and go through our checkpoints."""
    lookahead = lookahead_of_timm()
    model = net()
    opt = lookahead(normkern.SGD(model.named_parameters(), lr=0.1, momentum=0.9, stats="tensor"), alpha=0.5, k=2)
    monitor = normkern.EquilibriumMonitor(opt)
    x, y = data()
    for _ in range(4):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()
        assert monitor.update()
    opt.load_state_dict(opt.state_dict())
    inner = unwrap_optimizer(opt)
    assert opt.param_groups is inner.param_groups
    assert "lookahead_slow_buff" in inner.state[model[1].weight]
    opt.step()


def test_opacus():
    opacus = pytest.importorskip("opacus")
    from opacus.optimizers import DPOptimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = opacus.GradSampleModule(net())
        inner = normkern.SGD(model.named_parameters(), lr=0.1, momentum=0.9, stats="tensor")
        opt = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=64)
        monitor = normkern.EquilibriumMonitor(opt)
        x, y = data()
        for _ in range(3):
            opt.zero_grad()
            cross_entropy(model(x), y).backward()
            opt.step()
            assert monitor.update()
    inner.name_parameters(model)
    inner.step()
    assert inner.stats().names[0].endswith("1.weight")


def test_torch_ema_follows():
    torch_ema = pytest.importorskip("torch_ema")
    torch.manual_seed(0)
    runs = []
    for decay in ("exponential", "coupled"):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(5, eps=1e-14)
        model = nn.Sequential(nn.Linear(12, 5, bias=False), norm, nn.Tanh(), nn.Linear(5, 3)).double()
        weights = [model[0].weight]
        average = torch_ema.ExponentialMovingAverage(weights, decay=0.9, use_num_updates=False)
        group = {"params": weights, "decay": decay, "weight_decay": 1.0, "norm_buffers": [norm]}
        group["followers"] = [average.shadow_params]
        rest = [p for p in model.parameters() if p is not model[0].weight]
        runs.append((model, normkern.SGD([group, {"params": rest}], lr=0.05, momentum=0.5), average))
    x, y = data()
    for _ in range(40):
        for model, opt, average in runs:
            opt.zero_grad()
            cross_entropy(model(x.flatten(1).double()), y).backward()
            opt.step()
            average.update()
    (_, ours, first), (_, _, second) = runs
    assert ours.param_groups[0]["gauge"][2] >= 2
    torch.testing.assert_close(ours.true_scale()[0] * first.shadow_params[0], second.shadow_params[0])


def test_trainer_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    x, y = data()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    seen = []

    class Read(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen.append(unwrap_optimizer(optimizer).stats().scalars("grad_norm")["grad_norm/all"])

    weights = []
    for cls in ("ours", "torch's"):
        model = Model()
        if cls == "ours":
            opt, limit = normkern.SGD(model.parameters(), lr=0.1, max_norm=0.05, stats="tensor"), 0.0
        else:
            opt, limit = torch.optim.SGD(model.parameters(), lr=0.1), 0.05
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=16, max_grad_norm=limit, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", seed=1, logging_strategy="no",
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = transformers.Trainer(
                model, args, train_dataset=rows, optimizers=(opt, None), callbacks=[Read] if cls == "ours" else None
            )
            trainer.train()
        weights.append(model)
    for p, q in zip(*(m.parameters() for m in weights), strict=True):
        torch.testing.assert_close(p, q)
    assert len(seen) == 4
