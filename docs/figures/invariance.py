"""Draw what `invariance.find` measures: the largest |cos(w, g)| of every parameter, or of its set."""

import torch
from digits import batches, convnet
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import normkern

COLOURS = {"row": "tab:blue", "tensor": "tab:cyan", "joint": "tab:green", "none": "tab:red"}


def draw() -> Figure:
    torch.manual_seed(0)
    found = normkern.invariance.find(convnet(), cross_entropy, list(batches(2)))
    figure, ax = plt.subplots(figsize=(7.2, 2.4), layout="constrained")
    names = list(found.granularity)[::-1]
    for kind, colour in COLOURS.items():
        some = [i for i, name in enumerate(names) if found.granularity[name] == kind]
        if some:
            ax.barh(some, [found.cosine[names[i]] for i in some], left=1e-18, color=colour, label=kind)
    ax.set(xscale="log", xlim=(1e-18, 1), yticks=range(len(names)), yticklabels=names)
    ax.set(xlabel="largest |⟨w, g⟩| / (|w| |g|)")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(1, 0.4))
    return figure
