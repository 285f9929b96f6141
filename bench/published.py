"""Networks that people train, small but with their real number of layers: what `bench.noise_models` measures.

They come from transformers, timm and peft, with random weights; those of a library that is not installed are left out.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: A model and its loss, a mean over samples.
Task = tuple[nn.Module, Callable[[], Tensor]]


@dataclass(frozen=True)
class Published:
    """A network; `library` is what it needs besides torch."""

    name: str
    make: Callable[[], Task]
    library: str = ""

    def missing(self) -> str:
        """Return what must be installed for this network, or ""."""
        return self.library if self.library and importlib.util.find_spec(self.library) is None else ""


# ---- Language -------------------------------------------------------------------------------------------------------

WORDS = 500


def language(kind: str, batch: int, length: int, **options: Any) -> Task:
    """A causal language model of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=WORDS, use_cache=False, **options))
    return of_tokens(model, batch, length)


def of_tokens(model: nn.Module, batch: int, length: int) -> Task:
    ids = torch.randint(3, WORDS, (batch, length))
    target = ids.roll(-1, 1).flatten()
    return model, lambda: F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), target)


LLAMA = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def gpt2() -> Task:
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return language("gpt2", 8, 64, n_embd=192, n_layer=12, n_head=6, n_positions=64, **none)


def lora() -> Task:
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    base = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=WORDS, use_cache=False, **LLAMA))
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    return of_tokens(peft.get_peft_model(base, adapter), 8, 64)


def bert() -> Task:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 512}
    none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return of_tokens(BertForMaskedLM(BertConfig(vocab_size=WORDS, **sizes, **none)), 8, 64)


def t5() -> Task:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 6, "num_heads": 4}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, decoder_start_token_id=0, dropout_rate=0.0, use_cache=False, **sizes)
    )
    ids, labels = torch.randint(3, WORDS, (8, 48)), torch.randint(3, WORDS, (8, 24))
    given = torch.cat([torch.zeros(8, 1, dtype=torch.int64), labels[:, :-1]], 1)
    target = labels.flatten()
    return model, lambda: F.cross_entropy(model(input_ids=ids, decoder_input_ids=given).logits.flatten(0, 1), target)


# ---- Images ---------------------------------------------------------------------------------------------------------


def images(name: str, batch: int, side: int, **options: Any) -> Task:
    """A classifier of timm; its BatchNorm layers, if it has some, are in eval mode."""
    timm = _timm()
    model = timm.create_model(name, num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    x, target = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
    return model, lambda: F.cross_entropy(model(x), target)


_Modes = enum.Enum("_Modes", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")


@functools.cache
def _timm() -> Any:
    """Return timm, which imports names of torchvision that its models do not need: here from empty modules."""
    if importlib.util.find_spec("torchvision") is not None:
        import timm

        return timm

    names = ["", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".models", ".utils"]
    modules = {f"torchvision{name}": _Anything(f"torchvision{name}") for name in (*names, ".models.feature_extraction")}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    sys.modules.update(modules)
    import timm

    for name in modules:
        del sys.modules[name]  # other libraries ask whether it is installed
    return timm


class _Anything(types.ModuleType):
    """A module that has a class of every name."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":
            return []
        if name.startswith("__"):
            raise AttributeError(name)
        return _Modes if name == "InterpolationMode" else type(name, (nn.Module,), {})


def conv(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU())


class UNet(nn.Module):
    """Two convolutions on each of four levels, down and up, with connections between."""

    WIDTHS = (16, 32, 64, 128)

    def __init__(self) -> None:
        super().__init__()
        widths = self.WIDTHS
        down = zip((3, *widths), widths, strict=False)
        self.down = nn.ModuleList(nn.Sequential(conv(a, b), conv(b, b)) for a, b in down)
        up = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in up)
        self.up = nn.ModuleList(nn.Sequential(conv(2 * b, b), conv(b, b)) for _, b in up)
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        kept.pop()
        for widen, block in zip(self.widen, self.up, strict=True):
            x = block(torch.cat([widen(x), kept.pop()], 1))
        return self.head(x)


def unet() -> Task:
    model, x, target = UNet(), torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)
    return model, lambda: F.mse_loss(model(x), target)


# ---- Sequences ------------------------------------------------------------------------------------------------------


class CellLoop(nn.Module):
    """An LSTMCell that is called step by step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.cell, self.head = (
            nn.Embedding(WORDS, width),
            nn.LSTMCell(width, width),
            nn.Linear(width, WORDS),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x, state, out = self.words(ids), None, []
        for step in range(ids.shape[1]):
            state = self.cell(x[:, step], state)
            out.append(state[0])
        return self.head(torch.stack(out, 1))


def cells() -> Task:
    model, ids = CellLoop(128), torch.randint(WORDS, (16, 32))
    target = ids.roll(-1, 1).flatten()
    return model, lambda: F.cross_entropy(model(ids).flatten(0, 1), target)


PUBLISHED = (
    Published("GPT-2, 12 layers, B=8, T=64", gpt2, "transformers"),
    Published("Llama, 16 layers, B=8, T=64", lambda: language("llama", 8, 64, **LLAMA), "transformers"),
    Published("the same, LoRA", lora, "peft"),
    Published("BERT, 12 layers, B=8, T=64", bert, "transformers"),
    Published("T5, 6 + 6 layers, B=8, T=48 and 24", t5, "transformers"),
    Published("ViT-Tiny, B=16, 64x64", lambda: images("vit_tiny_patch16_224", 16, 64, img_size=64), "timm"),
    Published(
        "Swin-T, half as wide, B=8, 128x128",
        lambda: images("swin_tiny_patch4_window7_224", 8, 128, img_size=128, window_size=4, embed_dim=48,
                       num_heads=(2, 4, 8, 16)),
        "timm",
    ),
    Published("ResNet-18 with BatchNorm in eval, B=16, 64x64", lambda: images("resnet18", 16, 64), "timm"),
    Published("ConvNeXt-Atto, B=16, 64x64", lambda: images("convnext_atto", 16, 64), "timm"),
    Published("MobileNetV3-Small, B=16, 64x64", lambda: images("mobilenetv3_small_100", 16, 64), "timm"),
    Published("U-Net, 4 levels, B=8, 32x32", unet),
    Published("LSTMCell in a loop, B=16, T=32", cells),
    Published(
        "Mamba, 24 layers, B=4, T=32",
        lambda: language("mamba", 4, 32, hidden_size=128, num_hidden_layers=24, state_size=16),
        "transformers",
    ),
)  # fmt: skip


def made(net: Published) -> Task:
    """Return the task of a network, always with the same numbers, and none that begins as 0, as in training."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loss = net.make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return model, loss
