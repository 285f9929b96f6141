"""`python -m normkern advise`: a table, JSON and a picture."""

import json

import pytest
import torch

from normkern.__main__ import main
from normkern.demo import settings

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_short_run_prints_one_table_and_writes_json_and_picture(tmp_path, capsys):
    assert (
        main(["advise", "--epochs", "1", "--lr", "0.1", "--seed", "3", "--device", "cpu", "--out", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    assert printed.count("These numbers do not say:") == 1
    assert "has not been checked" in printed.replace("\n  ", " ")
    assert {path.name for path in tmp_path.iterdir()} == {"advise.json", "advise.png"}
    assert (tmp_path / "advise.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "advise.json").read_text())
    assert result["run"]["hyperparameters"]["lr"] == 0.1
    assert result["run"]["seed"] == 3
    assert result["batch_size"] == settings.BATCH_SIZE
    assert result["count"] == len(result["noise"]) == 23  # the last half of 45 steps
    assert result["optimizer"] == "SVAG"
    assert [x["name"] for x in result["lengths"]] == result["run"]["parameters"]
    assert result["answers"]["rule"]["answer"].startswith("linear")
    assert result["answers"]["noise_scale"]["question"] in printed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--lr", "-1"), "argument --lr: expected a positive number, got '-1'"),
        (("--epochs", "0"), "argument --epochs: expected a whole number from 1"),
        (("--device", "tpu"), "argument --device: expected cpu or a GPU"),
        (("--optimizer", "svag"), "unrecognized arguments"),
    ],
)
def test_refusals(options, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["advise", *options])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_file_as_folder_is_refused_before_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["advise", "--out", str(tmp_path / "file")])
    assert "argument --out: expected a folder that exists or can be made" in capsys.readouterr().err


def test_missing_package_is_named_before_the_run(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["advise"]) == 1
    assert "python -m normkern advise: matplotlib is not installed: pip install matplotlib" in capsys.readouterr().err


def test_divergence_is_an_error(tmp_path, capsys):
    assert main(["advise", "--epochs", "1", "--lr", "1e30", "--out", str(tmp_path)]) == 1
    assert "try an --lr below 1e+30" in capsys.readouterr().err
