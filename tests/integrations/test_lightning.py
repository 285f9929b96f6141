"""LightningCallback in a real Trainer, its TensorBoard files read back."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import normkern

from .events import read
from .nets import images, residual_net

lightning = pytest.importorskip("lightning")
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's hints

from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402

from normkern.integrations import LightningCallback  # noqa: E402


class Classifier(lightning.LightningModule):
    def __init__(self, stats="tensor", optimizer=normkern.SGD):
        super().__init__()
        self.net, self.stats, self.optimizer = residual_net(), stats, optimizer
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        options = {} if self.optimizer is torch.optim.SGD else {"stats": self.stats}
        return self.optimizer(self.net.parameters(), lr=0.05, momentum=0.9, **options)


def fit(folder, callbacks, module=None, **options):
    torch.manual_seed(0)
    module = module or Classifier()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=TensorBoardLogger(folder), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(images(), 16, shuffle=True))
    return module, trainer


def test_trainer_logs_steps_and_noise_of_every_parameter(tmp_path):
    module, _ = fit(tmp_path, [LightningCallback(every=2, noise_every=4)])
    found = read(tmp_path)
    names = [f"net.{name}" for name, _ in module.net.named_parameters()]
    for name in names:
        assert [step for step, _ in found[f"effective_lr/{name}"]] == [2, 4, 6, 8]
        assert [step for step, _ in found[f"noise/trace_sigma/{name}"]] == [1, 5]
    assert [step for step, _ in found["noise/batchnorm_eval"]] == [1, 5]
    assert [value for _, value in found["noise/batch_size"]] == [16, 16]
    assert all(math.isfinite(value) for points in found.values() for _, value in points)
    assert {tag.split("/")[1] for tag in found if tag.startswith("noise/")} >= {"nsr_batch", "grad_sq_norm_unbiased"}


def test_training_is_the_same_with_the_callback(tmp_path):
    module, _ = fit(tmp_path / "with", [LightningCallback(every=1, noise_every=1)])
    alone, _ = fit(tmp_path / "without", [])
    for (name, x), y in zip(module.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert module.losses[1::2] == alone.losses  # the dropout of a measurement is that of the step


def test_noise_is_of_all_micro_batches_of_a_step(tmp_path):
    def loss(module, batch):
        return cross_entropy(module.net(batch[0]), batch[1])

    callback = LightningCallback(every=None, noise_every=1, loss=loss, noise_quantities=["gns"])
    module, trainer = fit(tmp_path, [callback], accumulate_grad_batches=2)
    found = read(tmp_path)
    assert trainer.global_step == 4
    assert found["noise/batch_size"] == [(step, 32.0) for step in (1, 2, 3, 4)]
    assert not [tag for tag in found if "effective_lr" in tag or "nsr" in tag]
    assert not any(p.grad is not None and p.grad.isnan().any() for p in module.parameters())


def test_joined_noise_is_that_of_the_whole_batch(tmp_path):
    class Recording(LightningCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            pl_module.batches.append(batch)
            if len(pl_module.batches) == 2:
                whole = tuple(torch.cat(parts) for parts in zip(*pl_module.batches, strict=True))
                pl_module.expected = normkern.GradientNoise.measure(pl_module, loss, whole)
                pl_module.joined = self._recorder._noise

    def loss(module, batch):
        return cross_entropy(module.net(batch[0]), batch[1])

    module = Classifier()
    module.net, module.batches = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3)), []
    fit(tmp_path, [Recording(every=None, noise_every=1)], module, accumulate_grad_batches=2)
    ours, expected = module.joined.scalars(), module.expected.scalars()
    assert ours["noise/batch_size"] == 32
    assert ours == pytest.approx(expected, rel=1e-4)


def test_optimizer_without_statistics_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^LightningCallback: expected an optimizer such as normkern.SGD.*got SGD;"):
        fit(tmp_path, [LightningCallback()], Classifier(optimizer=torch.optim.SGD))
    with pytest.raises(ValueError, match=r"got SGD without stats; or every=None"):
        fit(tmp_path, [LightningCallback()], Classifier(stats=None))
    fit(tmp_path, [LightningCallback(every=None, noise_every=4)], Classifier(optimizer=torch.optim.SGD))
    assert "noise/gns/all" in read(tmp_path) or "noise/nsr_batch/all" in read(tmp_path)


def test_manual_optimization_needs_a_loss(tmp_path):
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"^LightningCallback: Classifier optimizes manually.*expected loss="):
        fit(tmp_path, [LightningCallback(noise_every=1)], module)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "every expected a positive number of steps or None, got 0"),
        ({"noise_every": 1.5}, "noise_every expected a positive number"),
        ({"every": None}, "got neither: there is nothing to log"),
    ],
)
def test_wrong_arguments_are_sentences(options, match):
    with pytest.raises(ValueError, match=f"^LightningCallback: .*{match}"):
        LightningCallback(**options)


def test_loss_that_is_not_finite_is_left_out(tmp_path):
    module = Classifier()

    def loss(module, batch):
        return cross_entropy(module.net(batch[0]), batch[1]) * (float("nan") if len(module.losses) < 4 else 1)

    with pytest.warns(RuntimeWarning, match="LightningCallback: no gradient noise of this step: GradientNoise.measure"):
        fit(tmp_path, [LightningCallback(noise_every=1, loss=loss)], module)
    assert [step for step, _ in read(tmp_path)["noise/batch_size"]] == [5, 6, 7, 8]


def test_noise_is_of_the_samples_of_all_processes(tmp_path):
    script = Path(__file__).with_name("lightning_ddp.py")
    root = str(script.parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = read(tmp_path)
    assert found["noise/batch_size"] == [(1, 16.0), (3, 16.0)]
    assert len(found["effective_lr/net.0.weight"]) == 4
