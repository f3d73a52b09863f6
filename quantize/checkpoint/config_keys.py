"""What every key of config.json means for a vector: carried into the file, without effect, or a refusal that names it.

A key that no table knows is refused where its name may touch the arithmetic, and named in a warning otherwise: real
configurations carry harmless extras.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import ConfigKeyWarning, UnsupportedCheckpoint, WrongUsage

# Words in the names of keys that may decide what is computed
_ARITHMETIC = """
    rope rotary norm scal attention attn window bias activation causal cap residual multiplier bidirectional position
    alibi expert moe adapter lora per_layer head auto_map pool logit softmax sparse
""".split()  # noqa: SIM905 (a list would take a line for each)
# Keys that change no vector of the plain model: names, heads for other tasks, what only training uses, how and in
# which type a machine computes; and settings for writing texts
_NAMES = """
    _name_or_path name_or_path model_type transformers_version _commit_hash tokenizer_class language directionality
    unsloth_version unsloth_fixed transformers_weights finetuning_task task_specific_params id2label label2id num_labels
    problem_type classifier_dropout tie_word_embeddings tie_encoder_decoder tie_last_hidden_states pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type cross_attention_hidden_size
    initializer_range initializer_factor dropout attention_dropout hidden_dropout hidden_dropout_prob
    attention_probs_dropout_prob attn_pdrop embd_pdrop resid_pdrop gradient_checkpointing
    torch_dtype dtype use_bfloat16 torchscript use_cache attn_implementation _attn_implementation
    _attn_implementation_internal _attn_implementation_autoset use_flash_attn experts_implementation
    _experts_implementation_internal chunk_size_feed_forward pretraining_tp output_attentions output_hidden_states
    return_dict bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    output_past decoder_start_token_id forced_bos_token_id forced_eos_token_id prefix tf_legacy_loss
"""
_WRITING = """
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p top_h typical_p min_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    token_healing guidance_scale remove_invalid_values renormalize_logits output_logits output_scores
    return_dict_in_generate assistant_early_exit penalty_alpha
"""
# Key -> values under which an architecture of transformers computes what llama.cpp does, the default first
_SHARED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "per_layer_config": (None, {}),
}


@dataclass(frozen=True)
class ConfigKeys:
    """The keys of one architecture, beside those that all share."""

    carried: frozenset[str]  # their values are in the file: in its header, or in the shapes of its tensors
    required: Mapping[str, tuple[Any, ...]]  # the values that llama.cpp computes, the default first
    classes: frozenset[str]  # classes of transformers in `architectures` that compute this
    # files of repositories' own code that compute this too -> keys that must be stated for it
    own_code: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()  # of keys that only this architecture has


def require_known_keys(path: Path, config: Mapping[str, Any], keys: ConfigKeys, allowed: Collection[str] = ()) -> None:
    """Refuse what llama.cpp does not compute; warn of keys that nobody has classified.

    `allowed` are the keys that the user says are without effect (--allow-config-key). Raises `UnsupportedCheckpoint`
    with file and key, and `WrongUsage` for an allowed key that the file does not have.
    """
    if missing := [name for name in allowed if name not in config]:
        raise WrongUsage(f"--allow-config-key {missing[0]}: {path} has no such key.")
    for key, values in {**_SHARED, **keys.required}.items():
        if (value := config.get(key, values[0])) not in values:
            supported = f"f2gguf converts {config['model_type']} with {values[0]!r}"
            raise UnsupportedCheckpoint(f"{path}: {key} is {value!r}; {supported}.")
    unknown = {key: config[key] for key in config.keys() - known_keys(keys) - set(allowed)}
    if is_known_code(config.get("auto_map"), config, keys):
        unknown.pop("auto_map", None)
    doubtful = {key: value for key, value in unknown.items() if value not in (None, {}, []) and _may_compute(key)}
    if "architectures" not in allowed and (others := set(config.get("architectures") or []) - keys.classes):
        doubtful["architectures"] = sorted(others)
    for key, value in sorted(doubtful.items()):
        words = f"f2gguf does not know {key} = {value!r:.80}, by which the model may compute something else"
        raise UnsupportedCheckpoint(f"{path}: {words}. If it changes no vector, pass --allow-config-key {key}.")
    if unknown:
        names = ", ".join(sorted(unknown))
        warnings.warn(f"{path}: f2gguf does not know {names}; taken to be without effect.", ConfigKeyWarning, 2)


def is_known_code(named: Any, config: Mapping[str, Any], keys: ConfigKeys) -> bool:
    """Whether auto_map's value `named` is only of code that is known to do what transformers' own class does."""
    places = [*named.values()] if isinstance(named, dict) else [named]
    places = [place for some in places for place in (some if isinstance(some, list) else [some]) if place is not None]
    if not all(isinstance(place, str) for place in places):
        return False
    files = {place.rsplit("--", 1)[-1].split(".")[0] for place in places}  # org/name--file.Class
    return all(file in keys.own_code and config.keys() >= set(keys.own_code[file]) for file in files)


def _may_compute(key: str) -> bool:
    return any(word in key.lower() for word in _ARITHMETIC)


def known_keys(keys: ConfigKeys) -> set[str]:
    """Every key that is carried, required or without effect."""
    return {
        *_NAMES.split(),
        *_WRITING.split(),
        *_SHARED,
        *keys.carried,
        *keys.required,
        *keys.without_effect,
        "architectures",
    }
