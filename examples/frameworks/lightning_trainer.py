"""Log effective learning rates, angular updates and gradient noise from a Lightning Trainer to TensorBoard."""

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import normkern
from normkern.integrations import LightningCallback


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        features = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        self.net = nn.Sequential(*features, nn.Linear(512, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return normkern.SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, stats="tensor")


torch.manual_seed(0)
labels = torch.randint(10, (512,))
images = torch.randn(10, 1, 8, 8)[labels] + torch.randn(512, 1, 8, 8)

trainer = lightning.Trainer(
    max_epochs=4,
    accelerator="cpu",
    logger=TensorBoardLogger("runs", name="lightning"),
    callbacks=[LightningCallback(every=4, noise_every=8)],  # this line is all that normkern needs
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True))
print("steps:", trainer.global_step)
