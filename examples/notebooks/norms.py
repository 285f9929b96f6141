# %% [markdown]
# # Norms and effective learning rate of a ResNet in TensorBoard
#
# You see, for every convolution: its weight norm, its effective learning rate lr / |w|^2, and the angle by which it
# turns in one step. Theory predicts this angle at equilibrium: sqrt(2 * lr * weight_decay / (1 + momentum)).
# The optimizer sums the norms in its own pass; this costs no extra pass over memory.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, relu

import normkern

try:  # pip install tensorboard
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None

torch.manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16


# %%
class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu(x + self.norm2(self.conv2(relu(self.norm1(self.conv1(x))))))


first = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
model = nn.Sequential(*first, Block(16), nn.MaxPool2d(2), Block(16), nn.Flatten(), nn.Linear(256, 10))
convolutions = [name for name, p in model.named_parameters() if p.ndim == 4]

# %% [markdown]
# Weight decay only for the convolutions: BatchNorm follows each of them, so the loss depends only on their direction.

# %%
LR, DECAY, MOMENTUM = 0.1, 0.02, 0.9
groups = [
    {"params": [(n, p) for n, p in model.named_parameters() if n in convolutions], "weight_decay": DECAY},
    {"params": [(n, p) for n, p in model.named_parameters() if n not in convolutions]},
]
opt = normkern.SGD(groups, lr=LR, momentum=MOMENTUM, stats="tensor")
predicted = normkern.theory.equilibrium_angle(lr=LR, weight_decay=DECAY, momentum=MOMENTUM)
writer = SummaryWriter("runs/resnet") if SummaryWriter else None  # then: tensorboard --logdir runs

# %%
for step in range(601):
    batch = torch.randint(1437, (64,))
    noisy = torch.where(torch.rand(64) < 0.1, torch.randint(10, (64,)), labels[batch])  # or gradients vanish
    opt.zero_grad()
    cross_entropy(model(images[batch]), noisy).backward()
    opt.step()
    stats = opt.stats().to_dict()  # plain numbers; reading them waits for the device
    if writer:
        for name in convolutions:
            for quantity in ("weight_norm", "grad_norm", "effective_lr", "angular_update"):
                writer.add_scalar(f"{quantity}/{name}", stats[name][quantity], step)
        writer.add_scalar("angular_update/predicted at equilibrium", predicted, step)
    if step % 200 == 0:
        print(f"step {step}")
        for name in convolutions:
            row = "  ".join(f"{q} {stats[name][q]:.3g}" for q in ("weight_norm", "effective_lr", "angular_update"))
            print(f"  {name:15} {row}  predicted {predicted:.3g}")

# %% [markdown]
# The layers began with different angles. At the end all of them scatter around the prediction.
# `normkern.EquilibriumMonitor` averages over steps and also predicts the norms.
