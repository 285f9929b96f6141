"""Log effective learning rates, angular updates and gradient noise from an Ultralytics trainer to TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from ultralytics.models.yolo.detect import DetectionTrainer

import normkern
from normkern.integrations import UltralyticsCallback


class Trainer(DetectionTrainer):
    def build_optimizer(self, model, *args, **kwargs):
        groups = super().build_optimizer(model, *args, **kwargs).param_groups  # weights, norms, biases
        return normkern.SGD(groups, stats="tensor")


def write_images(folder, count=32):
    """Write images of one bright square each, its box and its color, as Ultralytics reads them."""
    random = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (left, top), color = random.integers(40, size=2), random.integers(2)
        image = random.integers(80, size=(64, 64, 3), dtype=np.uint8)
        image[top : top + 24, left : left + 24, color] = 255
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        box = f"{(left + 12) / 64} {(top + 12) / 64} {24 / 64} {24 / 64}"
        (folder / "labels" / f"{i}.txt").write_text(f"{color} {box}\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [red, green]\n")


folder = Path("runs/ultralytics").absolute()
write_images(folder / "data")
options = {
    "model": "yolo26n.yaml",  # or weights, "yolo26n.pt"
    "data": str(folder / "data" / "data.yaml"),
    "project": str(folder),
    "epochs": 2,
    "batch": 8,
    "nbs": 8,  # gradients are accumulated to batches of this size: 64 if not given
    "imgsz": 64,
    "optimizer": "SGD",  # "auto" would make groups for another optimizer
    "device": "cpu",
    "plots": False,
}
with SummaryWriter("runs/ultralytics") as writer:

    def log(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)  # with wandb: wandb.log(values, step=step), no loop

    trainer = Trainer(overrides=options)
    UltralyticsCallback(log, every=2, noise_every=4).attach(trainer)
    trainer.train()
print("steps:", trainer.ema.updates)
