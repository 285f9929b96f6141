"""A torchvision that can be imported and does nothing but `nms`, because timm and Ultralytics import it.

On the package index torchvision is a build for CUDA, whose operators do not load beside a torch for the CPU.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types

import torch


class _Named(type):
    """The type of classes that have every attribute: members of enumerations, too."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _Distribution(importlib.metadata.Distribution):
    """The metadata of the stub, whose version Ultralytics reads."""

    def read_text(self, filename):
        return "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0\n" if filename == "METADATA" else None

    def locate_file(self, path):
        raise FileNotFoundError(path)


def nms(boxes, scores, iou_threshold):
    """Return the indices of the boxes (x1, y1, x2, y2) that overlap none of a higher score, as torchvision.ops.nms."""
    order, kept = scores.argsort(descending=True), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = torch.maximum(boxes[best, :2], boxes[order, :2]), torch.minimum(boxes[best, 2:], boxes[order, 2:])
        common = (high - low).clamp(min=0).prod(1)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        order = order[common / (area[best] + area[order] - common) <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64, device=boxes.device)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        if module.__name__ == "torchvision":
            module.ops = _Module("torchvision.ops")
            module.ops.nms = nms

    def find_distributions(self, context=None):
        return [_Distribution()] if getattr(context, "name", None) == "torchvision" else []


def import_torchvision():
    """Import torchvision; put the stub into its place if that fails."""
    try:
        import torchvision
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())
        import torchvision  # noqa: F401
