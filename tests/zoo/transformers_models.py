"""Models of transformers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from .entry import SAMPLES, Problem, Zoo, with_tensors

TOKENS = 6
TINY: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_top_k": 2,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 1, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_k": 2,
}  # fmt: skip
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 1,
    "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
CAUSAL = [
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "opt",
    "bloom",
    "stablelm",
    "cohere",
    "olmo",
    "olmo2",
    "starcoder2",
    "granite",
    "smollm3",
    "mpt",
    "codegen",
    "persimmon",
    "biogpt",
    "nemotron",
    "glm",
    "glm4",
    "helium",
    "ministral",
    "exaone4",
    "mamba",
    "mamba2",
    "rwkv",
    "recurrent_gemma",
    "falcon_mamba",
    "ctrl",
    "gpt_bigcode",
]
MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "phimoe",
    "glm4_moe",
    "jamba",
    "granitemoe",
    "granitemoeshared",
    "minimax",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "flex_olmo",
]
MASKED = [
    "bert",
    "roberta",
    "electra",
    "albert",
    "distilbert",
    "deberta",
    "deberta-v2",
    "mpnet",
    "camembert",
    "xlm-roberta",
    "roformer",
    "convbert",
    "mobilebert",
    "fnet",
    "nystromformer",
    "squeezebert",
    "megatron-bert",
    "data2vec-text",
    "esm",
    "layoutlm",
    "modernbert",
    "longformer",
    "big_bird",
    "ernie",
    "rembert",
    "ibert",
    "yoso",
    "xlnet",
    "tapas",
]
SEQ2SEQ = [
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "m2m_100",
    "blenderbot",
    "switch_transformers",
    "umt5",
    "longt5",
    "led",
]
IMAGES = [
    "vit",
    "deit",
    "beit",
    "swin",
    "swinv2",
    "convnext",
    "convnextv2",
    "dinov2",
    "resnet",
    "mobilevit",
    "segformer",
    "poolformer",
    "pvt",
    "pvt_v2",
    "vit_msn",
    "vit_mae",
    "hiera",
    "focalnet",
    "mobilenet_v1",
    "mobilenet_v2",
    "efficientnet",
    "dinov2_with_registers",
    "swiftformer",
    "ijepa",
]
SPEECH = ["wav2vec2", "hubert", "wavlm", "unispeech", "sew", "data2vec-audio"]
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "gptj": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64, "rotary_dim": 4},
    "codegen": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64, "rotary_dim": 4, "n_ctx": 64},
    "gpt_bigcode": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "ctrl": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 64, "dff": 24},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "bloom": {"n_head": 2, "n_layer": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "xglm": {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 4, "expand": 2},
    "mamba": {"state_size": 4, "time_step_rank": 2},
    "falcon_mamba": {"state_size": 4, "time_step_rank": 2},
    "rwkv": {"context_length": 64, "attention_hidden_size": 16},
    "recurrent_gemma": {"lru_width": 16, "num_key_value_heads": 1, "attention_window_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2},
    "deepseek_v2": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                    "num_key_value_heads": 2, "head_dim": 4},
    "deepseek_v3": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
                    "num_key_value_heads": 2, "head_dim": 4},
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2},
    "funnel": {"d_model": 16, "d_inner": 24, "n_head": 2, "d_head": 8, "block_sizes": [1, 1]},
    "mobilebert": {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16},
    "convbert": {"embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 1},
    "squeezebert": {"embedding_size": 16, "q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1,
                    "intermediate_groups": 1, "output_groups": 1},
    "longformer": {"attention_window": 4},
    "big_bird": {"attention_type": "original_full"},
    "rembert": {"input_embedding_size": 8, "output_embedding_size": 8},
    "xlnet": {"d_model": 16, "n_head": 2, "n_layer": 2, "d_inner": 24},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "yoso": {"use_expectation": True},

    "roformer": {"embedding_size": 16, "rotary_value": False},
    "nystromformer": {"num_landmarks": 2, "segment_means_seq_len": 12},
    "switch_transformers": {"num_experts": 4, "expert_capacity": 8, "num_sparse_encoder_layers": 1,
                            "num_sparse_decoder_layers": 1, "num_decoder_layers": 2},
    "prophetnet": {"hidden_size": 16, "num_encoder_layers": 2, "num_decoder_layers": 2, "max_position_embeddings": 64, "num_encoder_attention_heads": 2,
                   "num_decoder_attention_heads": 2, "ngram": 2},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "swin": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    "swinv2": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "hidden_sizes": [8, 16]},
    "hiera": {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "image_size": [32, 32], "patch_size": [7, 7],
              "patch_stride": [4, 4], "patch_padding": [3, 3], "query_stride": [2, 2], "num_query_pool": 2,
              "masked_unit_size": [4, 4]},
    "convnext": {"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 16], "depths": [1, 1, 1, 1]},
    "mobilevit": {"hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 8, 12, 12, 16, 32]},
    "segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "poolformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "pvt": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "pvt_v2": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]},
    "cvt": {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 1, 1], "cls_token": [False, False, True]},
    "swiftformer": {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
}  # fmt: skip
#: What some configurations do not take.
WITHOUT = {
    "funnel": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
    "prophetnet": ("num_hidden_layers",),
}
#: Have lists of sizes in the place of `hidden_size`.
STAGES = frozenset(
    [
        "swin",
        "swinv2",
        "convnext",
        "convnextv2",
        "regnet",
        "resnet",
        "bit",
        "cvt",
        "levit",
        "pvt",
        "pvt_v2",
        "hiera",
        "focalnet",
        "swiftformer",
    ]
)
QUICK = frozenset(
    [
        "llama",
        "gpt2",
        "qwen3",
        "mixtral",
        "qwen2_moe",
        "gpt_oss",
        "olmoe",
        "jamba",
        "bert",
        "deberta-v2",
        "t5",
        "switch_transformers",
        "vit",
        "swin",
        "wav2vec2",
    ]
)


def _config(kind: str, **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**options, **MORE.get(kind, {})})


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 40, shape)


def causal(kind: str, **options: Any) -> Problem:
    """A language model; the model's own loss has float32 inside."""
    from transformers import AutoModelForCausalLM

    config = _config(kind, **TINY, **options)
    implementation = options.get("experts_implementation")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if "oss" in kind else None)
    problem = with_tensors(model, input_ids=_ids(SAMPLES, TOKENS))
    if implementation is not None:
        model.set_experts_implementation(implementation)
    elif kind in MIXTURES:  # the products of groups do not take float64
        return replace(problem, single=True, instead=lambda model: model.set_experts_implementation("eager"))
    return problem


def masked(kind: str) -> Problem:
    """An encoder of text."""
    from transformers import AutoModel

    tiny = {k: v for k, v in TINY.items() if k not in WITHOUT.get(kind, ())}
    mask = torch.ones(SAMPLES, 2 * TOKENS, dtype=torch.int64)
    return with_tensors(
        AutoModel.from_config(_config(kind, **tiny)), input_ids=_ids(SAMPLES, 2 * TOKENS), attention_mask=mask
    )


def seq2seq(kind: str) -> Problem:
    """A translator."""
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_config(_config(kind, **ENCODER_DECODER))
    return with_tensors(model, input_ids=_ids(SAMPLES, TOKENS), decoder_input_ids=_ids(SAMPLES, TOKENS))


def images(kind: str) -> Problem:
    """An encoder of images."""
    from transformers import AutoModel

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tiny = {} if kind in STAGES else {k: TINY[k] for k in names}
    config = _config(
        kind,
        **{
            "image_size": 64 if "convnext" in kind else 32,
            "patch_size": 4 if "swin" in kind or "focal" in kind else 8,
            **tiny,
        },
    )
    side = config.image_size if isinstance(config.image_size, int) else 32
    pixels = torch.randn(SAMPLES, 3, side, side)
    if kind == "vit_mae":  # hides patches at random
        return with_tensors(AutoModel.from_config(config), pixel_values=pixels, noise=torch.rand(SAMPLES, 16))
    return with_tensors(AutoModel.from_config(config), pixel_values=pixels)


def speech(kind: str) -> Problem:
    """An encoder of sound."""
    from transformers import AutoModel

    config = _config(
        kind, **TINY, conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2], num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, conv_pos_kernel_size=3, num_conv_pos_embeddings_=2,
        do_stable_layer_norm=False, apply_spec_augment=False, mask_time_prob=0.0, squeeze_factor=1,
    )  # fmt: skip
    return with_tensors(AutoModel.from_config(config), input_values=torch.randn(SAMPLES, 200))


def add(zoo: Zoo) -> None:
    """Add all of them."""

    def some(kinds: list[str], make: Any, suffix: str = "", **options: Any) -> None:
        for kind in kinds:
            zoo.add(
                "transformers",
                kind + suffix,
                functools.partial(make, kind, **options),
                kind in QUICK and "eager" not in suffix,
            )

    some(MIXTURES, causal, **EXPERTS)
    some(MIXTURES, causal, " (eager)", **EXPERTS, experts_implementation="eager")
    some(["mixtral", "qwen3_moe", "gpt_oss"], causal, " (batched_mm)", **EXPERTS, experts_implementation="batched_mm")
    some(CAUSAL, causal)
    some(MASKED, masked)
    some(SEQ2SEQ, seq2seq)
    some(IMAGES, images)
    some(SPEECH, speech)
