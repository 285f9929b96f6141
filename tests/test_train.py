"""The demo does what it says: its data, its results, its errors."""

import json
import sys

import pytest
import torch

from normkern import train
from normkern.__main__ import main


def run(folder, *options):
    assert main(["train", "--epochs", "1", "--out", str(folder), *options]) == 0
    return json.loads((folder / "train.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    return run(folder), folder


def test_split_is_stratified_shuffled_disjoint_and_reproducible():
    images, labels, test_images, test_labels = train.digits()
    assert images.shape == (1437, 1, 8, 8)
    assert test_images.shape == (360, 1, 8, 8)
    assert images.dtype == torch.float32
    assert 0 == images.min() < images.max() == 1
    share = torch.bincount(test_labels) / (torch.bincount(labels) + torch.bincount(test_labels))
    assert (share - 0.2).abs().max() < 0.01, "each digit has its 20 % in the test set"
    assert not torch.equal(labels.sort().values, labels), "shuffled"
    training = {tuple(x.flatten().tolist()) for x in images}
    assert not training & {tuple(x.flatten().tolist()) for x in test_images}
    assert all(
        torch.equal(a, b) for a, b in zip(train.digits(), (images, labels, test_images, test_labels), strict=True)
    )


def test_shifts_move_by_at_most_one_pixel():
    image = torch.zeros(200, 1, 8, 8)
    image[:, 0, 4, 4] = 1
    moved = train.shifted(image, torch.Generator().manual_seed(0))
    at = moved.flatten(1).argmax(1)
    rows, columns = at // 8, at % 8
    assert moved.sum() == 200
    assert set(rows.tolist()) == set(columns.tolist()) == {3, 4, 5}


def test_results(first):
    result, folder = first
    assert result["epochs"] == 1
    assert result["seed"] == 0
    assert 0.2 < result["test_accuracy"] <= 1
    assert result["test_accuracy"] == result["curves"][-1]["test_accuracy"]
    assert set(result["step_seconds"]) == {"normkern", "torch", "torch-foreach", "torch-fused"}
    assert all(0 < s < 10 for s in result["step_seconds"].values())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_run_and_another_seed_another(first, tmp_path):
    again, other = run(tmp_path / "a"), run(tmp_path / "b", "--seed", "1")
    assert again["curves"] == first[0]["curves"]
    assert other["curves"] != first[0]["curves"]


def test_printed_lines(first, capsys, tmp_path):
    run(tmp_path / "out")
    printed = capsys.readouterr().out
    assert "predicted: sqrt(2 * lr * weight_decay / (1 + momentum))" in printed
    row = first[0]["curves"][0]
    assert f"{row['loss']:7.4f}" in printed
    assert f"{row['angular_update']:.5f}" in printed
    assert "\x1b" not in printed, "control codes where there is no terminal"


@pytest.mark.parametrize("optimizer", ["torch", "torch-foreach", "torch-fused"])
def test_torchs_optimizers_train_too_and_agree(optimizer, first, tmp_path):
    result = run(tmp_path / "out", "--optimizer", optimizer)
    assert result["curves"][0]["angular_update"] is None
    assert result["curves"][0]["loss"] == pytest.approx(first[0]["curves"][0]["loss"], rel=0.05)


def test_prediction():
    assert train.predicted_angle(0.1) == pytest.approx((2 * 0.1 * train.WEIGHT_DECAY / 1.9) ** 0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "0"], "argument --epochs: expected a whole number from 1 to"),
        (["--epochs", "x"], "got 'x'"),
        (["--seed", "-1"], "argument --seed: expected a whole number from 0"),
        (["--optimizer", "adam"], "argument --optimizer: invalid choice: 'adam'"),
        (["--out", __file__], "argument --out: expected a folder that exists or can be made"),
    ],
)
def test_bad_arguments(options, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *options])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("module", list(train.PACKAGES))
def test_missing_package(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{train.PACKAGES[module]} is not installed: pip install 'normkern[demo]'" in error
