"""Two processes of Lightning's "ddp" strategy, which starts this script again for the second one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import normkern
from integrations.nets import images, residual_net
from normkern.integrations import LightningCallback


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = residual_net()

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return normkern.SGD(self.net.parameters(), lr=0.05, momentum=0.9, stats="tensor")


if __name__ == "__main__":
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=TensorBoardLogger(sys.argv[1]),
        enable_checkpointing=False, enable_progress_bar=False, callbacks=[LightningCallback(every=1, noise_every=2)],
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(images(), 8, shuffle=True))
