# %% [markdown]
# # Is my SGD close to its SDE, and what batch size pays?
#
# Two questions, one measurement: the noise-to-signal ratio N/G of the batch gradient.
#
# 1. SGD can be close to its stochastic differential equation (SDE) only if N/G is large enough. SVAG with l > 1 is
#    closer to the SDE. If SVAG gives another run than SGD (l = 1), then SGD is not close to the SDE.
# 2. The gradient noise scale, N/G times the batch size, says how much a larger batch helps.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import normkern

images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images = images[:1437].float() / 16


def train(l: int, batch_size: int, lr: float, steps: int = 250) -> tuple[float, normkern.Noise]:
    """Return |w|^2 of the normalised layer, averaged over the second half, and the noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    opt = normkern.SVAG(
        [
            {"params": [("w", model[0].weight)], "weight_decay": 0.02, "lr": lr},  # scale-invariant
            {"params": [(n, p) for n, p in model.named_parameters() if n != "0.weight"], "lr": 0.1},
        ],
        lr=lr,
        l=l,
        noise_decay=0.99,
        stats="tensor",
    )
    total = normkern.theory.svag_steps(steps=steps, l=l)
    squares = []
    for _ in range(total):
        batch = torch.randint(len(images), (2 * batch_size,))
        noisy = torch.where(torch.rand(len(batch)) < 0.1, torch.randint(10, (len(batch),)), labels[batch])
        opt.zero_grad()
        for half in (slice(0, batch_size), slice(batch_size, None)):
            cross_entropy(model(images[batch[half]]), noisy[half]).backward()
            if half.start == 0:
                opt.hold()  # keeps the gradients of the first batch
        opt.step()
        squares.append(opt.stats().weight_sq[0].item())
    return sum(squares[total // 2 :]) / len(squares[total // 2 :]), opt.noise()


# %% [markdown]
# A small batch with a small learning rate, and both 32 times larger (the linear scaling rule). The last column
# compares |w|^2 of l = 8 with SGD. "Close" means a ratio within sqrt(2).

# %%
needed = normkern.theory.nsr_condition()  # 1: at least as much noise as signal
for batch_size, lr in ((16, 0.2), (512, 6.4)):
    sgd, noise = train(1, batch_size, lr)
    svag, _ = train(8, batch_size, lr)
    ratio, nsr = svag / sgd, noise.nsr_batch.item()
    close = 2**-0.5 < ratio < 2**0.5
    verdict = "close to the SDE" if close else "not close to the SDE"
    print(f"batch {batch_size:3}: N/G {nsr:.2g}, needed {needed:.2g}; |w|^2 of SVAG over SGD {ratio:.2f}: {verdict}")
    if batch_size == 16:
        small, largest = noise, normkern.theory.max_linear_scaling(nsr_batch=nsr) if nsr > 0 else float("nan")
print(f"from batch 16, scale batch and lr by at most {largest:.0f}")

# %% [markdown]
# Which batch size pays? With the noise scale B_noise, training needs about 1 + B_noise/B times the fewest possible
# steps and 1 + B/B_noise times the fewest possible samples (McCandlish et al. 2018). A negative estimate means:
# average longer.

# %%
scale = 16 * small.nsr_batch.item()
if scale > 0:
    print(f"noise scale: {scale:.0f} samples")
    for batch_size in (16, 64, 256, 1024):
        print(f"batch {batch_size:4}: steps x {1 + scale / batch_size:.1f}, samples x {1 + batch_size / scale:.1f}")
else:
    print("noise scale unknown: average over more steps")
