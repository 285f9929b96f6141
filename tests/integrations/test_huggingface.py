"""HuggingFaceCallback in a real transformers Trainer, its TensorBoard files read back."""

import math

import pytest
import torch

import normkern

from .events import read

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

from normkern.integrations import HuggingFaceCallback  # noqa: E402


def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


class Texts(torch.utils.data.Dataset):
    def __init__(self, count=32):
        self.ids = torch.randint(31, (count, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer_of(folder, net, optimizer=None, **options):
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=1, report_to=["tensorboard"],
        save_strategy="no", logging_steps=4, use_cpu=True, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    optimizer = optimizer or normkern.SGD(net.parameters(), lr=0.1, momentum=0.9, stats="tensor")
    return transformers.Trainer(model=net, args=args, train_dataset=Texts(), optimizers=(optimizer, None))


@pytest.fixture(autouse=True)
def logging_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))


def test_trainer_reports_steps_and_noise_of_every_parameter(tmp_path, capsys):
    net = model()
    trainer = trainer_of(tmp_path, net)
    trainer.add_callback(HuggingFaceCallback(trainer, every=2, noise_every=4))
    trainer.train()
    found = read(tmp_path / "runs")
    names = [name for name, _ in net.named_parameters()]
    for name in names:
        assert [step for step, _ in found[f"train/effective_lr/{name}"]] == [2, 4, 6, 8]
        assert [step for step, _ in found[f"train/noise/trace_sigma/{name}"]] == [1, 5]
    assert [value for _, value in found["train/noise/batch_size"]] == [4, 4]
    assert all(math.isfinite(value) for points in found.values() for _, value in points)
    assert "noise/" not in capsys.readouterr().out  # loggers only
    assert "compute_loss" not in vars(trainer)


def test_training_is_the_same_with_the_callback(tmp_path):
    nets = [model(), model()]
    for net, callbacks in zip(nets, (1, 0), strict=True):
        trainer = trainer_of(tmp_path, net)
        for _ in range(callbacks):
            trainer.add_callback(HuggingFaceCallback(trainer, every=1, noise_every=1))
        trainer.train()
    for (name, x), y in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_noise_is_of_all_micro_batches_of_a_step(tmp_path):
    net = model()
    trainer = trainer_of(tmp_path, net, gradient_accumulation_steps=2)
    trainer.add_callback(HuggingFaceCallback(trainer, every=None, noise_every=1))
    trainer.train()
    assert read(tmp_path / "runs")["train/noise/batch_size"] == [(step, 8.0) for step in (1, 2, 3, 4)]


def test_loss_and_options_of_the_noise(tmp_path):
    net = model()
    trainer = trainer_of(tmp_path, net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    seen = []

    def loss(net, inputs):
        seen.append(set(inputs))
        return net(**inputs).loss

    trainer.add_callback(HuggingFaceCallback(trainer, None, 4, loss=loss, noise_quantities=["nsr_batch"]))
    trainer.train()
    assert seen == [{"input_ids", "labels"}] * 2
    found = read(tmp_path / "runs")
    assert "train/noise/nsr_batch/all" in found
    assert "train/noise/trace_sigma/all" not in found


def test_refusals_are_sentences(tmp_path):
    with pytest.raises(TypeError, match=r"^HuggingFaceCallback: trainer expected a transformers.Trainer, got int"):
        HuggingFaceCallback(10)
    net = model()
    trainer = trainer_of(tmp_path, net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    trainer.add_callback(HuggingFaceCallback(trainer))
    with pytest.raises(ValueError, match=r"^HuggingFaceCallback: expected an optimizer such as normkern.SGD"):
        trainer.train()
