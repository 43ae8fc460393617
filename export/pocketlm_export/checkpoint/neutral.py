"""What a checkpoint may hold without changing the logits of any supported class."""

import re

__all__ = ["NEUTRAL_KEYS", "NEUTRAL_TENSORS"]

# Bookkeeping, training, and the defaults that PretrainedConfig writes. An architecture reads a key first where it
# matters to it: what stands here was looked at by nobody.
NEUTRAL_KEYS = frozenset(
    """
    _attn_implementation_autoset _model_name_or_path _name_or_path _sliding_window_pattern add_cross_attention
    architectures attention_bias attention_dropout attention_probs_dropout_prob auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id full_attn_mod hidden_dropout hidden_dropout_prob id2label initializer_range interpolate_factor
    is_decoder is_encoder_decoder is_llama_config label2id length_penalty max_length max_window_layers min_length
    mlp_bias model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    original_max_position_embeddings output_attentions output_hidden_states output_router_logits output_scores
    pad_token_id partial_rotary_factor prefix pretraining_tp problem_type pruned_heads remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate rope_theta router_aux_loss_coef
    router_jitter_noise sep_token_id sliding_window suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_tiled_mlp unsloth_version use_bfloat16 use_cache
    use_sliding_window
    """.split()
)

# Buffers that older versions of transformers saved; they are computed from the configuration.
NEUTRAL_TENSORS = re.compile(r"(model\.layers\.\d+\.self_attn\.|model\.)?rotary_emb\.inv_freq")
