"""What `config.json` of published models says: their sizes, and keys of every sort that the files have, training's
leftovers included. And how many parameters each has, which the zoo's table says of those that stand there."""

from __future__ import annotations

from typing import Any

from llama_multimodal.zoo.registry import checkpoints

_KNOWN = {checkpoint.name: checkpoint.parameters for checkpoint in checkpoints()}

_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
_VICUNA = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
}  # fmt: skip
_LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
    "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": _VICUNA,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0",
    "vision_config": _CLIP, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}  # fmt: skip
_NEXT = {
    **_LLAVA, "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "use_image_newline_parameter": True,
}  # fmt: skip

_DEFAULTS = {  # of every configuration of transformers 4, where a file holds them all
    "_attn_implementation_autoset": False, "_name_or_path": "None", "add_cross_attention": False,
    "bad_words_ids": None, "begin_suppress_tokens": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False, "transformers_version": "4.46.0",
    "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
_LEFTOVERS = {
    "_flash_attn_2_enabled": True, "neftune_noise_alpha": 0.0, "pixel_shuffle_factor": 4, "pretraining_tp": 1,
    "perceiver_config": {**_DEFAULTS, "model_type": "vllama3", "resampler_depth": 6, "resampler_n_latents": 64},
    "qk_layer_norms": False, "use_resampler": False,
}  # fmt: skip
_BROWSER = {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}
_SMALL = {  # SmolLM2 135M
    **_LEFTOVERS, "architectures": ["VLlama3ForCausalLM"], "model_type": "llama", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 576, "initializer_range": 0.02, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers.js_config": _BROWSER, "use_cache": True, "vocab_size": 49280,
}  # fmt: skip
_BASE = {
    "model_type": "idefics3", "hidden_size": 768, "image_size": 512, "max_image_size": {"longest_edge": 512},
    "num_attention_heads": 12, "patch_size": 16, "size": {"longest_edge": 2048}, "tie_word_embeddings": False,
    "use_base_siglip": False,
}  # fmt: skip
_SHAPE_OPTIMISED = {
    "model_type": "idefics3", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
    "max_image_size": {"longest_edge": 384}, "num_hidden_layers": 27, "patch_size": 14,
    "size": {"longest_edge": 1920}, "tie_word_embeddings": False, "use_base_siglip": False,
}  # fmt: skip
_SMOLVLM = {
    "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3", "image_token_id": 49190,
    "scale_factor": 4, "text_config": _SMALL, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers.js_config": {**_BROWSER, "dtype": {"embed_tokens": "auto"}}, "transformers_version": "4.46.0",
    "use_cache": True, "vision_config": _BASE, "vocab_size": 49280,
}  # fmt: skip
_SMOLVLM_2 = {
    **_SMOLVLM, "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm", "pad_token_id": 128002,
    "transformers_version": "4.47.1", "use_cache": False, "use_reentrant_checkpointing": False,
}  # fmt: skip
_MEDIUM = {
    **_SMALL, "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_hidden_layers": 32,
    "num_key_value_heads": 5,
}  # fmt: skip
_LARGE = {  # without its number of heads
    **{key: value for key, value in _SMALL.items() if key not in ("num_attention_heads", "num_key_value_heads")},
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "pixel_shuffle_factor": 3,
}  # fmt: skip
_OUTSIDE = ("head_dim", "hidden_size", "mlp_bias", "num_hidden_layers", "rms_norm_eps", "rope_scaling", "hidden_act")

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "llava-hf/llava-1.5-7b-hf": (_LLAVA, _KNOWN["llava-hf/llava-1.5-7b-hf"]),
    "llava-hf/llava-1.5-13b-hf": (
        {
            **_LLAVA,
            "text_config": {
                **_VICUNA, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
                "num_hidden_layers": 40, "num_key_value_heads": 40, "pad_token_id": 0,
            },
        },
        13_351_494_656,
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (_NEXT, _KNOWN["llava-hf/llava-v1.6-vicuna-7b-hf"]),
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        {
            **_NEXT,
            "text_config": {
                "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "architectures": ["MistralForCausalLM"],
                "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
                "torch_dtype": "bfloat16", "vocab_size": 32064,
            },
        },
        _KNOWN["llava-hf/llava-v1.6-mistral-7b-hf"],
    ),
    "HuggingFaceM4/Idefics3-8B-Llama3": (
        {
            "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3", "image_token_id": 128257,
            "scale_factor": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
            "transformers_version": "4.45.0", "vision_config": {**_SHAPE_OPTIMISED, "image_size": 364},
            "text_config": {
                "architectures": ["VLlama3ForCausalLM"], "bos_token_id": 128000, "eos_token_id": 128001,
                "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
                "model_type": "llama", "neftune_noise_alpha": 0.0, "num_key_value_heads": 8, "pad_token_id": 128002,
                "qk_layer_norms": False, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "use_resampler": False,
                "rope_scaling": {
                    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                    "original_max_position_embeddings": 8192,
                },
                "torch_dtype": "bfloat16", "vocab_size": 128259,
            },
        },
        _KNOWN["HuggingFaceM4/Idefics3-8B-Llama3"],
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        {**_SMOLVLM, "text_config": {**_DEFAULTS, **_SMALL}, "vision_config": {**_BASE, "use_base_siglip": True}},
        _KNOWN["HuggingFaceTB/SmolVLM-256M-Instruct"],
    ),
    "HuggingFaceTB/SmolVLM-500M-Instruct": (
        {**_SMOLVLM, "text_config": _MEDIUM}, _KNOWN["HuggingFaceTB/SmolVLM-500M-Instruct"],
    ),
    "HuggingFaceTB/SmolVLM-Instruct": (
        {
            **_SMOLVLM, "image_token_id": 49153, "image_seq_len": 81, "scale_factor": 3, "vocab_size": 49155,
            "text_config": {**_LARGE, "max_position_embeddings": 16384, "rope_theta": 273768.0, "vocab_size": 49155},
            "vision_config": _SHAPE_OPTIMISED,
        },
        _KNOWN["HuggingFaceTB/SmolVLM-Instruct"],
    ),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (
        {**_SMOLVLM_2, "text_config": _MEDIUM, "vision_config": {**_BASE, "model_type": "smolvlm_vision"}},
        507_482_304,
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (
        {
            **_SMOLVLM_2, "scale_factor": 3, "text_config": _LARGE,
            "vision_config": {**_SHAPE_OPTIMISED, "model_type": "smolvlm_vision"},
        },
        2_246_784_880,
    ),
    "ds4sd/CodeFormulaV2": (  # whose file holds the decoder's keys twice
        {
            **_SMOLVLM, **_LEFTOVERS, **{key: _SMALL[key] for key in _OUTSIDE}, "rope_theta": 100000.0,
            "freeze_lm_head": False, "freeze_text_layers": False, "freeze_text_module_exceptions": [],
            "freeze_vision_layers": False, "freeze_vision_module_exceptions": [], "image_token_id": 100270,
            "text_config": {**_SMALL, "rope_theta": 10000.0, "vocab_size": 100480}, "tie_word_embeddings": True,
            "vision_config": {**_BASE, "model_type": "idefics3_vision"},
        },
        257_590_848,
    ),
}  # fmt: skip
