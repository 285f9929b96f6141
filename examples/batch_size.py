"""Choose the batch size during training from the gradient noise scale: double it while the noise scale is larger."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import normkern

torch.manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
images = images.float() / 16
model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
opt = normkern.SGD(model.parameters(), lr=0.05)
noise = normkern.GradientNoise(model)
batch_size = 16

for epoch in range(8):
    trace, signal = 0.0, 0.0  # sum both, then divide: a mean of ratios is biased
    for batch in torch.randperm(1437).split(batch_size)[:-1]:
        opt.zero_grad()
        with noise:
            cross_entropy(model(images[batch]), labels[batch]).backward()
        opt.step()
        result = noise.result()
        trace += result.trace_sigma.item()
        signal += result.grad_sq_norm_unbiased.item()
    accuracy = (model(images[1437:]).argmax(1) == labels[1437:]).double().mean().item()
    gns = trace / signal  # in samples: at this batch size noise equals signal
    print(f"epoch {epoch}  batch {batch_size:3}  noise scale {gns:4.0f} samples  accuracy {accuracy:.2f}")
    if not 0 < gns < 2 * batch_size and batch_size < 128:  # below 0: noise hides the signal
        lr = opt.param_groups[0]["lr"]
        lr = normkern.theory.linear_scaling(lr=lr, batch_size=batch_size, new_batch_size=2 * batch_size)
        opt.param_groups[0]["lr"], batch_size = lr, 2 * batch_size
