"""Models of peft, diffusers and x-transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .entry import SAMPLES, Problem, Zoo, with_tensors
from .transformers_models import TINY, TOKENS

ADAPTERS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2}, "LoraConfig (dora)": {"r": 2, "use_dora": True}, "LoHaConfig": {"r": 2}, "LoKrConfig": {"r": 2},
    "IA3Config": {"feedforward_modules": []}, "AdaLoraConfig": {"init_r": 2, "target_r": 2, "total_step": 10},
    "VeraConfig": {"r": 2}, "OFTConfig": {"r": 0, "oft_block_size": 4}, "BOFTConfig": {"boft_block_size": 4},
    "HRAConfig": {"r": 2}, "FourierFTConfig": {"n_frequency": 8}, "VBLoRAConfig": {"r": 2, "vector_length": 8, "num_vectors": 8, "topk": 2},
    "LNTuningConfig": {}, "PromptTuningConfig": {"num_virtual_tokens": 2},
    "PrefixTuningConfig": {"num_virtual_tokens": 2},
}  # fmt: skip
DIFFUSERS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
                    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                    "attention_head_dim": 4},
    "UNet2DConditionModel": {"sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
                             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 8,
                             "attention_head_dim": 4},
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 3,
                              "num_layers": 2, "sample_size": 16, "patch_size": 4, "norm_num_groups": 4,
                              "num_embeds_ada_norm": 10},
    "AutoencoderKL": {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
                      "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    "VQModel": {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_vq_embeddings": 16,
                "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    "PixArtTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6,
                                 "num_layers": 2, "sample_size": 16, "patch_size": 4, "cross_attention_dim": 16,
                                 "caption_channels": 8, "use_additional_conditions": False},
    "PriorTransformer": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 8,
                         "num_embeddings": 5, "additional_embeddings": 4},
}  # fmt: skip
OF_X: dict[str, dict[str, Any]] = {
    "plain": {}, "rotary": {"rotary_pos_emb": True}, "alibi": {"alibi_pos_bias": True}, "rel_pos_bias": {"rel_pos_bias": True},
    "rmsnorm_glu": {"use_rmsnorm": True, "ff_glu": True}, "qk_norm": {"attn_qk_norm": True},
    "memory": {"attn_num_mem_kv": 2}, "talking_heads": {"attn_pre_talking_heads": True}, "sandwich": {"sandwich_norm": True},
    "gate_values": {"attn_gate_values": True}, "shift": {"shift_tokens": 1},
    "residual_attn": {"residual_attn": True}, "gate_residual": {"gate_residual": True}, "macaron": {"macaron": True},
    "multi_query": {"attn_kv_heads": 1}, "scalenorm": {"use_scalenorm": True}, "topk": {"attn_sparse_topk": 2},
}  # fmt: skip


def adapted(name: str) -> Problem:
    """A Llama with an adapter."""
    import peft
    from transformers import AutoModelForCausalLM, LlamaConfig

    options = dict(ADAPTERS[name])
    kind = name.partition(" ")[0]
    targets = {} if "Tuning" in kind else {"target_modules": ["q_proj", "v_proj"]}
    if kind == "LNTuningConfig":
        targets = {"target_modules": ["input_layernorm"]}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **targets, **options)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "num_key_value_heads": 2}))
    ids = torch.randint(3, 40, (SAMPLES, TOKENS))
    return with_tensors(peft.get_peft_model(model, config), input_ids=ids)


def diffusion(name: str) -> Problem:
    """A model of diffusers."""
    import diffusers

    model = getattr(diffusers, name)(**DIFFUSERS[name])
    images, times = torch.randn(SAMPLES, 3, 16, 16), torch.tensor([1, 5, 9])
    words = torch.randn(SAMPLES, 5, 8)
    if name in ("AutoencoderKL", "VQModel"):
        return with_tensors(model, sample=images)
    if name == "UNet2DModel":
        return with_tensors(model, sample=images, timestep=times)
    if name == "DiTTransformer2DModel":
        return with_tensors(model, hidden_states=images, timestep=times, class_labels=torch.tensor([0, 3, 3]))
    if name == "PixArtTransformer2DModel":
        return with_tensors(model, hidden_states=images, timestep=times, encoder_hidden_states=words)
    if name == "PriorTransformer":
        x = torch.randn(SAMPLES, 8)
        return with_tensors(model, hidden_states=x, timestep=times, proj_embedding=x + 1, encoder_hidden_states=words)
    return with_tensors(model, sample=images, timestep=times, encoder_hidden_states=words)


def of_x_transformers(options: dict[str, Any]) -> Problem:
    """A decoder of x-transformers."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, **options)
    model = TransformerWrapper(num_tokens=40, max_seq_len=16, attn_layers=layers)
    return with_tensors(model, _x=torch.randint(3, 40, (SAMPLES, TOKENS)))


def add(zoo: Zoo) -> None:
    """Add all of them."""
    for name in ADAPTERS:
        zoo.add("peft", name, functools.partial(adapted, name), name == "LoraConfig")
    for name in DIFFUSERS:
        zoo.add("diffusers", name, functools.partial(diffusion, name), name == "UNet2DModel")
    for name, options in OF_X.items():
        zoo.add("x_transformers", name, functools.partial(of_x_transformers, options), name in ("plain", "memory"))
