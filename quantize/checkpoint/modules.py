"""What sentence-transformers' own files of a folder state: modules, pooling, prompts, the longest input.

Source of every rule: sentence-transformers 6.2, base/model.py, base/modules/transformer.py and modules/pooling.py
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from f2gguf.quantize.checkpoint.json_files import FETCH_AGAIN, load_json, read_json, read_value
from f2gguf.runtime.errors import BrokenCheckpoint, ConfigKeyWarning, UnsupportedCheckpoint, parsing
from pydantic import TypeAdapter

DENSE_WEIGHTS = "model.safetensors"  # of a Dense module, in its folder
PROMPTS_FILE = "config_sentence_transformers.json"
_ORDERS = (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_DENSE, _MOST_DENSE = "Dense", 2  # matrices behind the pooling, of which llama.cpp applies two
_WITHOUT_EFFECT = ("Dropout",)  # of vectors, once the training is over
_POOLING_MODES = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
# the earlier way to say it: a key for each mode
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
TRANSFORMER_FILES = tuple(f"sentence_{kind}_config.json" for kind in _KINDS)  # the first that says something counts
_OF_TEXT = (None, "sentence_embedding")  # what Normalize must read and write: a text's vector, which is the default
# key of a Dense module's file -> its default, and the values under which the module is a plain matrix product
_PLAIN_DENSE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "bias": (True, (False,)),
    "activation_function": ("torch.nn.modules.activation.Tanh", ("torch.nn.modules.linear.Identity",)),
    "module_input_name": (None, _OF_TEXT),
    "module_output_name": (None, _OF_TEXT),
    "use_residual": (False, (False,)),
}
# key of these files -> the values under which a text's vector is that of the plain model
_PLAIN: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "do_lower_case": (False, None),
    "processing_kwargs": ({}, None),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "unpad_inputs": (True, False, None),
}
_ARGUMENTS = {"processor_kwargs": "tokenizer_args", "model_kwargs": "model_args", "config_kwargs": "config_args"}
_PLAIN_ARGUMENTS = (
    *("torch_dtype", "dtype", "attn_implementation", "padding_side", "use_fast", "trust_remote_code", "use_cache"),
    *("device_map", "low_cpu_mem_usage", "cache_dir"),
)


@dataclass(frozen=True)
class Dense:
    """A matrix that a text's vector goes through behind the pooling, and its folder."""

    path: str  # below the checkpoint's: '2_Dense'
    n_in: int
    n_out: int


@dataclass(frozen=True)
class Modules:
    """The modules of a folder. Without modules.json it is a Transformer alone, whose vectors everybody normalises."""

    transformer: str = ""  # folder of the model's own files, below the checkpoint's
    pooling: str | None = None  # None: not stated
    is_normalized: bool = True
    dense: tuple[Dense, ...] = ()  # in their order
    files: tuple[str, ...] = ()  # that were read, or would have been


@dataclass(frozen=True)
class Prompts:
    """Texts that go before inputs, by name, and the name of the one that `encode` puts there by itself."""

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None


def read_modules(root: Path) -> Modules:
    """Pooling, normalisation and the place of the model's files, from modules.json.

    Raises `UnsupportedCheckpoint` for other modules than llama.cpp computes, or in another order.
    """
    path = root / "modules.json"
    if not path.exists():
        return Modules()
    content = load_json(path)
    with parsing(path, BrokenCheckpoint, FETCH_AGAIN):
        rows = TypeAdapter(list[dict[str, Any]]).validate_python(content)
        stated = [(str(row["type"]), str(row["path"])) for row in rows]
        names = [str(row["name"]) for row in rows if "name" in row]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        flaw = f"two modules are called {twice[0]!r}, of which sentence-transformers runs only the last"
        raise BrokenCheckpoint(f"{path}: {flaw}. Give each a name of its own. {FETCH_AGAIN}")
    for kind, place in stated:
        _require_known(path, kind)
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            raise BrokenCheckpoint(f"{path}: its path {place!r} leads out of the folder. {FETCH_AGAIN}")
    modules = [(_name(kind), place) for kind, place in stated if _name(kind) not in _WITHOUT_EFFECT]
    order = [name for name, _ in modules]
    n_dense = order.count(_DENSE)
    if [name for name in order if name != _DENSE] not in _ORDERS or order[2 : 2 + n_dense] != [_DENSE] * n_dense:
        known = "Transformer, Pooling, Dense, Normalize, in this order"
        raise UnsupportedCheckpoint(f"{path}: has {', '.join(order) or 'no modules'}; f2gguf converts {known}.")
    if n_dense > _MOST_DENSE:
        raise UnsupportedCheckpoint(f"{path}: has {n_dense} Dense modules; llama.cpp computes {_MOST_DENSE}.")
    dense = tuple(_read_dense(root, place) for name, place in modules if name == _DENSE)
    places = {name: place for name, place in modules if name != _DENSE}
    files = {name: f"{place}/config.json".lstrip("/") for name, place in places.items() if name != "Transformer"}
    of_dense = [f"{one.path}/{file}" for one in dense for file in ("config.json", DENSE_WEIGHTS)]
    if "Normalize" in files:
        _require_plain_normalize(root / files["Normalize"])
    return Modules(
        transformer=places["Transformer"],
        pooling=_read_pooling(root / files["Pooling"]) if "Pooling" in files else None,
        is_normalized="Normalize" in files,
        dense=dense,
        files=("modules.json", *files.values(), *of_dense),
    )


def read_prompts(root: Path) -> Prompts:
    """The prompts of config_sentence_transformers.json, and the name of the default one.

    Raises `UnsupportedCheckpoint` for a file of another kind of model, `BrokenCheckpoint` for a default that is not
    among the prompts.
    """
    path = root / PROMPTS_FILE
    stated = read_value(path, "prompts", dict[str, str | None] | None) or {}
    texts = {name: text for name, text in stated.items() if text is not None}
    default = read_value(path, "default_prompt_name", str | None)
    if default is not None and default not in {*stated, "query", "document"}:
        raise BrokenCheckpoint(f"{path}: its default_prompt_name {default!r} is not among its prompts. {FETCH_AGAIN}")
    kind = read_value(path, "model_type", str | None) or "SentenceTransformer"
    if kind != "SentenceTransformer":
        raise UnsupportedCheckpoint(f"{path}: is of a {kind}; f2gguf converts SentenceTransformer models.")
    if (width := read_value(path, "truncate_dim", int | None)) is not None:
        raise UnsupportedCheckpoint(
            f"{path}: truncate_dim is {width}, by which every vector is cut. Remove the key: a file has all widths, "
            "and the caller chooses one with --dims or truncate_dim."
        )
    return Prompts(texts, default if texts.get(str(default)) else None)


def warn_of_similarity(root: Path, *, is_normalized: bool) -> None:
    """Say so where the model's vectors are meant to be compared otherwise than f2gguf does."""
    path = root / PROMPTS_FILE
    stated = read_json(path, optional=True).get("similarity_fn_name")
    if stated in ("euclidean", "manhattan") or (stated == "dot" and not is_normalized):
        words = (
            f"similarity_fn_name is {stated!r}. The vectors are the checkpoint's, but `similarity` and `f2gguf search`"
        )
        warnings.warn(f"{path}: {words} compare them by their cosine.", ConfigKeyWarning, 2)


def read_limit(folder: Path, config: Mapping[str, Any]) -> int | None:
    """The most tokens of a text: what sentence-transformers' own file states, else the smaller one of the tokenizer's
    and the model's; None for no limit.

    Raises `UnsupportedCheckpoint` for settings by which texts become other tokens than those of the tokenizer.
    """
    path, stated = _transformer_settings(folder)
    tokenizer_path = folder / "tokenizer_config.json"
    tokenizer = read_json(tokenizer_path, optional=True)
    _require_right_cut(folder, tokenizer)
    limits = {
        "max_seq_length": (path, stated.get("max_seq_length")),
        "model_max_length": (path, _arguments(stated, "processor_kwargs").get("model_max_length")),
    }
    for key, (where, limit) in reversed(limits.items()):
        if limit is not None:
            return _checked_limit(where, key, limit)
    of_tokenizer = tokenizer.get("model_max_length", tokenizer.get("max_len"))
    both = [
        _checked_limit(where, key, limit)
        for where, key, limit in (
            (tokenizer_path, "model_max_length", of_tokenizer),
            (folder / "config.json", "max_position_embeddings", config.get("max_position_embeddings")),
        )
        if limit is not None and limit != -1
    ]
    return min(both, default=None)


def _name(kind: str) -> str:
    return kind.rsplit(".", 1)[-1]


def _require_known(path: Path, kind: str) -> None:
    if not kind.startswith("sentence_transformers."):
        raise UnsupportedCheckpoint(
            f"{path}: the module {kind} is code of the repository's own, which f2gguf cannot follow; it converts "
            "sentence-transformers' own Transformer, Pooling, Dense and Normalize."
        )
    if _name(kind) not in (*_ORDERS[-1], _DENSE, *_WITHOUT_EFFECT):
        what = "f2gguf converts Transformer, Pooling, Dense and Normalize"
        raise UnsupportedCheckpoint(f"{path}: has the module {_name(kind)}; {what}.")


def _read_dense(root: Path, place: str) -> Dense:
    """Refuses what is more than a matrix product of a text's vector: llama.cpp has neither biases nor activations."""
    path = root / place / "config.json"
    config = read_json(path)
    for key, (default, plain) in _PLAIN_DENSE.items():
        if (value := config.get(key, default)) not in plain:
            raise UnsupportedCheckpoint(f"{path}: {key} is {value!r}; llama.cpp computes a Dense with {plain[-1]!r}.")
    if unknown := sorted(config.keys() - {"in_features", "out_features", *_PLAIN_DENSE}):
        words = f"f2gguf does not know its key {unknown[0]!r}"
        raise UnsupportedCheckpoint(f"{path}: {words}. Remove it if it has no effect.")
    for key in ("in_features", "out_features"):
        if type(width := config.get(key)) is not int or not 0 < width < 1 << 31:
            raise BrokenCheckpoint(f"{path}: {key} is {width!r}, which is no width. {FETCH_AGAIN}")
    return Dense(PurePosixPath(place).as_posix(), config["in_features"], config["out_features"])


def _read_pooling(path: Path) -> str | None:
    """'last', 'mean' or 'cls'; None where the file is missing, so that the user must state it."""
    if not path.exists():
        return None
    config = read_json(path)
    if not {"embedding_dimension", "word_embedding_dimension"} & config.keys():
        raise BrokenCheckpoint(f"{path}: has no embedding_dimension, so it is no Pooling module's file. {FETCH_AGAIN}")
    if config.get("include_prompt") is False:
        raise UnsupportedCheckpoint(f"{path}: include_prompt is false; llama.cpp pools over the prompt too.")
    stated = config.get("pooling_mode")
    if stated is None:
        stated = [mode for key, mode in _POOLING_KEYS.items() if config.get(key)] or ["mean"]
    modes = [stated] if isinstance(stated, str) else stated
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in _POOLING_MODES:
        shown = " and ".join(map(str, modes)) if isinstance(modes, list) else repr(modes)
        raise UnsupportedCheckpoint(f"{path}: pools by {shown}; last token, mean or CLS is supported.")
    return _POOLING_MODES[modes[0]]


def _require_plain_normalize(path: Path) -> None:
    """Refuse a Normalize that leaves a text's vector as it is, and normalises something else."""
    for key, value in read_json(path, optional=True).items():
        if key in ("module_input_name", "module_output_name") and value not in _OF_TEXT:
            words = f"{key} is {value!r}; f2gguf converts a Normalize of 'sentence_embedding'"
            raise UnsupportedCheckpoint(f"{path}: {words}.")


def _transformer_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that sets the Transformer module up, and what it holds."""
    paths = [folder / name for name in TRANSFORMER_FILES]
    contents = [(path, read_json(path, optional=True)) for path in paths]
    path, stated = next((pair for pair in contents if pair[1]), contents[0])
    for key, value in stated.items():
        if key in _PLAIN and value not in _PLAIN[key] and not (key == "modality_config" and _has_plain_texts(value)):
            raise UnsupportedCheckpoint(f"{path}: {key} is {value!r}, by which texts get other vectors; unset it.")
        if key not in (*_PLAIN, *_ARGUMENTS, *_ARGUMENTS.values(), "max_seq_length", "backend"):
            raise UnsupportedCheckpoint(f"{path}: f2gguf does not know its key {key!r}. Remove it if it has no effect.")
    for name in _ARGUMENTS:
        allowed = (*_PLAIN_ARGUMENTS, *(["model_max_length"] if name == "processor_kwargs" else []))
        for key, value in _arguments(stated, name).items():
            if key not in allowed:
                words = f"{name} sets {key} to {value!r}, which f2gguf does not follow"
                raise UnsupportedCheckpoint(f"{path}: {words}. Set it in the model's or the tokenizer's own file.")
    return path, stated


def _has_plain_texts(modalities: Any) -> bool:
    """Whether texts go to the model as they are; where there are messages, a chat template stands around every text."""
    (plain,) = _PLAIN["modality_config"]
    return isinstance(modalities, dict) and modalities.get("text") == plain["text"] and "message" not in modalities


def _arguments(stated: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = stated.get(_ARGUMENTS[name], stated.get(name))
    return value if isinstance(value, dict) else {}


def _require_right_cut(folder: Path, tokenizer: Mapping[str, Any]) -> None:
    """A long text loses its end, everywhere in f2gguf. A tokenizer can be set to cut its beginning."""
    spec = read_json(folder / "tokenizer.json", optional=True).get("truncation")
    direction = spec.get("direction") if isinstance(spec, dict) else None
    side = tokenizer.get("truncation_side") or direction or "right"
    if str(side).lower() != "right":
        where = folder / ("tokenizer_config.json" if tokenizer.get("truncation_side") else "tokenizer.json")
        raise UnsupportedCheckpoint(f"{where}: long texts are cut at their beginning ({side}); f2gguf cuts their end.")


def _checked_limit(path: Path, key: str, limit: Any) -> int:
    if type(limit) not in (int, float) or not limit >= 2:
        raise BrokenCheckpoint(f"{path}: {key} is {limit!r}, which is not a number of tokens. {FETCH_AGAIN}")
    return int(min(limit, 1 << 31))
