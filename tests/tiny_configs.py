"""Tiny configurations for the model types that transformers knows, by the usual names of their fields."""

from dataclasses import fields, is_dataclass

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 97
# What fields of these names are set to, in text decoders and in the parts that read images and sound.
TINY = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "attention_hidden_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "text_hidden_size", "embedding_size", "decoder_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "mlp_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "projection_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "kv_channels", "global_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 512),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 28,
    "patch_size": 14,
    "rotary_dim": 16,
    "num_mel_bins": 8,
}


def _sections(*channels: int) -> dict:
    """Rotary channels for time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(channels)}


# Of types whose fields depend on one another in their own way.
OVERRIDES: dict[str, dict] = {
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGBSZ": 6}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "dense"]},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 20, "audio_start_token_id": 21},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 20, "audio_start_token_id": 21},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    **{
        f"{name}_text": {"rope_parameters": _sections(2, 3, 3), "head_dim": 16}
        for name in (
            *("hunyuan_vl", "paddleocr_vl", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl"),
            *("glm46v", "glm4v", "glm_ocr", "glmga"),
        )
    },
    "glm4v_moe_text": {"rope_parameters": _sections(1, 1, 2)},
    "cosmos3_edge_text": {"rope_parameters": _sections(2, 3, 3)},
    "ernie4_5_vl_moe_text": {"rope_parameters": _sections(3, 3, 2)},
}


def tiny_config(model_type: str, **changes: object) -> PreTrainedConfig:
    """A configuration of a type with two layers of four heads, or nearly so.

    Raises whatever transformers raises where it cannot be made.
    """
    return _tiny(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **changes})


def _tiny(config_class: type[PreTrainedConfig], changes: dict) -> PreTrainedConfig:
    default = config_class()
    values = {}
    for name in _names(config_class):
        value = getattr(default, name, None)
        if name in config_class.sub_configs:
            part = config_class.sub_configs[name]
            part = type(value) if part is AutoConfig or isinstance(value, PreTrainedConfig) else part
            if issubclass(part, PreTrainedConfig) and part is not PreTrainedConfig:
                own = OVERRIDES.get(part.model_type, {})
                values[name] = _tiny(part, {**own, **_of(changes, name)})
        elif name in TINY and value is not None and not isinstance(value, (list, tuple, dict)):
            values[name] = TINY[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            values[name] = 3 + len([n for n in values if n.endswith(("_token_id", "_token_index"))])
    parts = [name for name in changes if isinstance(changes[name], dict) and name in config_class.sub_configs]
    values.update({name: value for name, value in changes.items() if name not in parts})
    return config_class(**values)


def _of(changes: dict, part: str) -> dict:
    found = changes.get(part, {})
    return found if isinstance(found, dict) else {}


def _names(config_class: type[PreTrainedConfig]) -> list[str]:
    reverse = {known: name for name, known in config_class.attribute_map.items()}
    found = [field.name for field in fields(config_class)] if is_dataclass(config_class) else []
    return [name for name in found if name not in ("attribute_map", *reverse.values())]
