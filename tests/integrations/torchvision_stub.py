"""A torchvision that can be imported and does nothing, because timm imports it.

On the package index torchvision is a build for CUDA, whose operators do not load beside a torch for the CPU.
"""

import importlib.abc
import importlib.machinery
import sys
import types


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


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def import_torchvision():
    """Import torchvision; put the stub into its place if that fails."""
    try:
        import torchvision
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())
        import torchvision  # noqa: F401
