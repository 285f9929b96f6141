"""Trainings of a small detection net by Ultralytics, in a process of their own: importing it changes what torch prints.

Writes what they came to into runs.pt in the folder that is named on the command line, where it leaves its other files, too.
"""
# ruff: noqa: E402  torchvision first

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from integrations.torchvision_stub import import_torchvision

import_torchvision()
import shutil

import torch
import yaml
from PIL import Image
from torch.utils._pytree import tree_flatten, tree_unflatten
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

import normkern
from normkern.integrations import UltralyticsCallback
from normkern.integrations.ultralytics import _training_loss

FOLDER = Path(sys.argv[1])
NET = {
    "nc": 2, "end2end": True, "reg_max": 1, "scales": {"n": [1.0, 0.0625, 128]},
    "backbone": [[-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [128, 3, 2]], [-1, 1, "Conv", [256, 3, 2]]],
    "head": [[[2], 1, "Detect", ["nc"]]],
}  # fmt: skip
OPTIMIZERS = {"torch": torch.optim.SGD, "normkern": lambda groups: normkern.SGD(groups, stats="tensor")}


def write_data(count=16):
    generator = torch.Generator().manual_seed(0)
    for part in ("images", "labels"):
        (FOLDER / part).mkdir()
    for i in range(count):
        image = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(FOLDER / "images" / f"{i}.png")
        boxes = 0.3 + 0.3 * torch.rand(i % 3, 4, generator=generator)  # none, one or two in an image
        lines = [f"{i % 2} {' '.join(map(str, box))}\n" for box in boxes.tolist()]
        (FOLDER / "labels" / f"{i}.txt").write_text("".join(lines))
    data = {"path": str(FOLDER), "train": "images", "val": "images", "names": ["a", "b"]}
    (FOLDER / "data.yaml").write_text(yaml.safe_dump(data))
    (FOLDER / "yolo26n-small.yaml").write_text(yaml.safe_dump(NET))


class Trainer(DetectionTrainer):
    optimizer_name = "normkern"

    def build_optimizer(self, model, *args, **kwargs):
        return OPTIMIZERS[self.optimizer_name](super().build_optimizer(model, *args, **kwargs).param_groups)

    def optimizer_step(self):
        self.grad_norms = [*getattr(self, "grad_norms", []), self.grad_norm()]
        super().optimizer_step()

    def grad_norm(self):
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm() / self.scaler.get_scale())

    def final_eval(self):
        pass


def run(name, callback=None, scale=False, **options):
    """Train, and return what came of it; a copy of the checkpoint after the first epoch is left in the folder."""
    steps, moving = [], []
    trainer = type("Trainer", (Trainer,), {"optimizer_name": name})(
        overrides={
            "model": str(FOLDER / "yolo26n-small.yaml"), "data": str(FOLDER / "data.yaml"), "project": str(FOLDER),
            "name": "run", "exist_ok": True, "epochs": 3, "batch": 4, "nbs": 8, "imgsz": 32, "optimizer": "SGD",
            "lr0": 0.01, "warmup_epochs": 1.5, "device": "cpu", "plots": False, "val": False, **options,
        }
    )  # fmt: skip
    if scale:  # Ultralytics scales on GPUs only
        trainer.add_callback("on_train_start", lambda t: vars(t).update(scaler=torch.amp.GradScaler("cpu", 256.0)))
    trainer.add_callback("on_train_batch_end", lambda t: steps.append(t.ema.updates))
    trainer.add_callback(
        "on_train_batch_end", lambda t: moving.append([(g["lr"], g["momentum"]) for g in t.optimizer.param_groups])
    )
    trainer.add_callback(
        "on_model_save", lambda t: t.epoch or shutil.copy(t.last, FOLDER / f"{t.optimizer_name}-first.pt")
    )
    if callback is not None:
        callback.attach(trainer)
    trainer.train()
    return {
        "weights": {k: x.clone() for k, x in trainer.model.state_dict().items()},
        "average": {k: x.clone() for k, x in trainer.ema.ema.state_dict().items()},
        "groups": [[len(g["params"]), g["weight_decay"], g["param_group"]] for g in trainer.optimizer.param_groups],
        "steps": steps, "moving": moving, "grad_norms": trainer.grad_norms,
        "scale": trainer.scaler.get_scale(), "type": type(trainer.optimizer).__module__,
    }  # fmt: skip


def noise_of(images):
    """Return trace_sigma of a batch of 4 as measured and from a backward for each image; the boxes are of these images."""
    torch.manual_seed(0)
    net = DetectionModel(NET, ch=3, nc=2, verbose=False)
    net.args = get_cfg()
    batch = {
        "img": torch.rand(4, 3, 32, 32), "batch_idx": torch.tensor(images).float(),
        "cls": torch.randint(2, (len(images), 1)).float(), "bboxes": 0.3 + 0.3 * torch.rand(len(images), 4),
    }  # fmt: skip
    measured = normkern.GradientNoise.measure(net, _training_loss, batch).scalars(["trace_sigma"])
    for module in net.modules():
        module.train(not isinstance(module, torch.nn.BatchNorm2d))
    out = net(batch["img"])
    tensors, form = tree_flatten(out)
    ends = [x.detach().requires_grad_() for x in tensors]  # the loss as a function of what the net returns
    net.loss(batch, tree_unflatten(ends, form))[0].sum().backward()
    used = [(x, end.grad) for x, end in zip(tensors, ends, strict=True) if end.grad is not None]
    rows = []
    for i in range(4):
        of_image = sum((x[i] * g[i]).sum() for x, g in used)
        found = torch.autograd.grad(of_image, [*net.parameters()], retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([4 * g.flatten().double() for g in found]))
    return measured["noise/trace_sigma/all"], float(torch.stack(rows).var(0).sum())


def error(function):
    try:
        function()
    except (TypeError, ValueError) as found:
        return str(found)
    return None


if __name__ == "__main__":
    write_data()
    logged = []
    runs = {name: run(name) for name in ("torch", "normkern")}
    for name in ("torch", "normkern"):
        runs[f"{name} resumed"] = run(name, resume=str(FOLDER / f"{name}-first.pt"))
        runs[f"{name} scaled"] = run(name, scale=True)
    callback = UltralyticsCallback(lambda values, step: logged.append((step, values)), every=2, noise_every=3)
    runs["normkern logged"] = run("normkern", callback)
    runs["error"] = error(lambda: run("torch", UltralyticsCallback(print)))
    noise = [noise_of(images) for images in ([0, 1, 2, 3], [0, 1, 1, 3], [0, 0, 0, 0], [2, 2], [0, 0, 1, 2, 2, 3])]
    torch.save({"runs": runs, "logged": logged, "noise": noise}, FOLDER / "runs.pt")
