"""transformers runs the checkpoint in float32: whole, or layer by layer if its weights do not fit the memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.errors import ExtraMissing, MemoryMissing
from numpy.typing import NDArray

TRANSFORMERS = "transformers float32"
LAYER_BY_LAYER = f"{TRANSFORMERS}, layer by layer"
Ids = NDArray[np.int32]
Progress = Callable[[int], None] | None
# Token ids of texts -> the checkpoint's vectors, (n_texts, n_embd) float32, L2-normalised:
# run(folder, token_ids, pooling=..., dense=(), on_progress=None)
Run = Callable[..., NDArray[np.float32]]
# model_type -> key of config.json as a repository's own code calls it -> key of transformers' class
OLD_KEYS = {
    "nomic_bert": {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "layer_norm_epsilon": "layer_norm_eps",
        "rotary_emb_base": "rope_theta",
        "max_trained_positions": "max_position_embeddings",  # n_positions goes beyond, by other frequencies
    }
}
_TOKEN_TABLE = "embed_tokens.weight"
_BATCH_TOKENS = 1024
_N_STREAMS = 2  # batches at a time: 1.1 to 1.2 times as fast as one on all cores, which wait for each other's steps
# Their classes in transformers call embeddings, layers and norm alike.
_IN_LAYERS = ("qwen2", "qwen3", "llama", "mistral")


def choose_run(folder: Path, n_parameters: int) -> tuple[Run, str]:
    """The way to run a checkpoint in this machine's memory, and its name.

    Raises `ExtraMissing` without transformers, `MemoryMissing` for a model that neither fits nor can be run in layers.
    """
    require_transformers()
    needed_bytes, free_bytes = whole_bytes(n_parameters), available_memory_bytes()
    if needed_bytes < free_bytes:
        return transformers_vectors, TRANSFORMERS
    kind = _read_config(folder).get("model_type")
    if kind in _IN_LAYERS and not _is_pickled(folder):
        return streamed_vectors, LAYER_BY_LAYER
    sizes = f"need {needed_bytes / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} GB are free"
    layers = f"a {kind} model is not run layer by layer: use a machine with more memory"
    raise MemoryMissing(f"the checkpoint's float32 weights {sizes}, and {layers}")


def whole_bytes(n_parameters: int) -> int:
    """Memory that a whole checkpoint takes: float32 weights, and room for activations."""
    return 5 * n_parameters


def require_transformers() -> None:
    """Raise `ExtraMissing` unless checkpoints can be run by transformers."""
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise ExtraMissing(f"{' and '.join(missing)} not installed. Run: pip install 'f2gguf[evals]'")


def transformers_vectors(
    folder: Path, token_ids: Sequence[Ids], *, pooling: str, dense: Sequence[Path] = (), on_progress: Progress = None
) -> NDArray[np.float32]:
    """A `Run` with all weights in memory; `dense` are files of matrices behind the pooling."""
    import torch

    model, behind = load_model(folder), _dense_matrices(dense)
    rows: list[Any] = [None] * len(token_ids)

    def run(batch: Sequence[int]) -> int:
        ids = torch.from_numpy(np.stack([token_ids[i] for i in batch]).astype(np.int64))
        with torch.inference_mode():
            for i, states in zip(batch, model(input_ids=ids).last_hidden_state, strict=True):
                rows[i] = _pooled(states, pooling, behind)
        return ids.numel()

    n_tokens, n_done = sum(map(len, token_ids)), 0
    n_threads = max(1, torch.get_num_threads() // _N_STREAMS)
    with ThreadPoolExecutor(_N_STREAMS, initializer=torch.set_num_threads, initargs=(n_threads,)) as pool:
        for n in pool.map(run, reversed(_batches(token_ids))):  # the longest first
            before, n_done = n_done, n_done + n
            if on_progress:  # texts, as if all were equally long
                on_progress(n_done * len(rows) // n_tokens - before * len(rows) // n_tokens)
    return np.stack(rows)


def load_model(folder: Path, **changes: Any) -> Any:
    """The checkpoint in transformers, with all weights in memory; `changes` are of its configuration."""
    import torch
    from transformers import AutoModel

    options = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": not _is_pickled(folder)}
    config = _model_config({**_read_config(folder), **changes})
    with quiet_transformers():
        return AutoModel.from_pretrained(folder, config=config, **options).eval()


def streamed_vectors(
    folder: Path, token_ids: Sequence[Ids], *, pooling: str, dense: Sequence[Path] = (), on_progress: Progress = None
) -> NDArray[np.float32]:
    """A `Run` with one layer in memory, for `_IN_LAYERS`. All texts go through it, then the next takes its place.

    A model of one layer makes masks and positions as the whole one does. Texts whose hidden states do not fit half of
    the free memory go in several rounds.
    """
    import torch
    from transformers import AutoModel

    stated, stored = _read_config(folder), _stored_tensors(folder)
    n_layers, row_bytes = stated["num_hidden_layers"], 4 * stated["hidden_size"]
    unused: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "layer_types"))
    one_layer = {**stated, **unused, "num_hidden_layers": 1, "vocab_size": 1, "use_cache": False}
    model = AutoModel.from_config(_model_config(one_layer)).float().eval()  # type: ignore[no-untyped-call]
    norm, model.norm = model.norm, torch.nn.Identity()
    rows: list[Any] = [None] * len(token_ids)
    n_steps, behind = 0, _dense_matrices(dense)
    with torch.inference_mode():
        _load_weights(norm, "norm.", stored)
        max_tokens = available_memory_bytes() // 2 // row_bytes
        for batches in _rounds(_batches(token_ids), token_ids, max_tokens=max_tokens):
            states = [_token_rows([token_ids[i] for i in batch], stored) for batch in batches]
            for layer in range(n_layers):
                _load_weights(model.layers[0], f"layers.{layer}.", stored)
                for k, batch in enumerate(batches):
                    states[k] = model(inputs_embeds=states[k]).last_hidden_state
                    n_done, n_steps = n_steps // n_layers, n_steps + len(batch)
                    if on_progress and n_steps // n_layers > n_done:
                        on_progress(n_steps // n_layers - n_done)
            for batch, several in zip(batches, states, strict=True):
                for i, state in zip(batch, several, strict=True):
                    rows[i] = _pooled(norm(state), pooling, behind)
    return np.stack(rows)


def _batches(token_ids: Sequence[Ids]) -> list[list[int]]:
    """Indices of texts that are run together: of one length, so that none is padded, and up to `_BATCH_TOKENS`."""
    batches: list[list[int]] = []
    for i in sorted(range(len(token_ids)), key=lambda i: len(token_ids[i])):
        n = len(token_ids[i])
        if batches and n == len(token_ids[batches[-1][0]]) and (len(batches[-1]) + 1) * n <= _BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def available_memory_bytes() -> int:
    """Memory that a new process could take: MemAvailable on Linux, the whole memory elsewhere."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _pooled(states: Any, pooling: str, dense: Sequence[Any]) -> Any:
    """One vector of length 1 from a text's hidden states, (n_tokens, n_embd) -> (n_embd,)."""
    import torch

    vector = {"last": states[-1], "cls": states[0], "mean": states.mean(dim=0)}[pooling]
    for matrix in dense:
        vector = matrix @ vector
    return torch.nn.functional.normalize(vector, dim=0).numpy()


def _dense_matrices(paths: Sequence[Path]) -> list[Any]:
    """The matrix of each Dense module, (n_out, n_in) float32."""
    from safetensors.torch import load_file

    return [load_file(path)["linear.weight"].float() for path in paths]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings to itself while the block runs: they are of what no vector depends on."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_bytes()))


def todays_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the keys of transformers beside those of `OLD_KEYS`."""
    renamed = OLD_KEYS.get(config["model_type"], {}).items()
    return {**config, **{new: config[old] for old, new in renamed if config.get(old) is not None}}


def _model_config(stated: dict[str, Any]) -> Any:
    """transformers' configuration. F2LLM-v2-80M lists 28 layer_types for its 8 layers, which transformers refuses."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    stated = todays_config(stated)
    if len(stated.get("layer_types") or ()) != stated["num_hidden_layers"]:
        stated.pop("layer_types", None)
    return AutoConfig.for_model(**stated)


def _rounds(batches: Sequence[list[int]], token_ids: Sequence[Ids], *, max_tokens: int) -> Iterator[list[list[int]]]:
    """The batches in order, in lists of at most `max_tokens` tokens; a larger batch is a list of its own."""
    chosen: list[list[int]] = []
    n_tokens = 0
    for batch in batches:
        n = sum(len(token_ids[i]) for i in batch)
        if chosen and n_tokens + n > max_tokens:
            yield chosen
            chosen, n_tokens = [], 0
        chosen.append(batch)
        n_tokens += n
    yield chosen


def _is_pickled(folder: Path) -> bool:
    """Whether the weights are a pytorch_model.bin, which torch reads as plain tensors only (weights_only)."""
    return not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin"))


def _stored_tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """Name of each tensor, without the "model." that some exports begin it with -> its file, and its name there."""
    from safetensors import safe_open

    single = _read_config(folder).get("transformers_weights") or "model.safetensors"
    if single.endswith(".json") or not (folder / single).exists():
        index = folder / (single if single.endswith(".json") else "model.safetensors.index.json")
        files = json.loads(index.read_bytes())["weight_map"]
    else:
        with safe_open(folder / single, framework="pt") as file:
            files = dict.fromkeys(file.keys(), single)
    return {name.removeprefix("model."): (folder / file, name) for name, file in files.items()}


def _load_weights(module: Any, prefix: str, stored: dict[str, tuple[Path, str]]) -> None:
    """Overwrite the parameters of `module` with the stored tensors of its place in the model."""
    from safetensors import safe_open

    for name, parameter in module.named_parameters():
        path, stored_name = stored[prefix + name]
        with safe_open(path, framework="pt") as file:
            parameter.copy_(file.get_tensor(stored_name))


def _token_rows(texts: Sequence[Ids], stored: dict[str, tuple[Path, str]]) -> Any:
    """The token table's rows of texts of one length, (n_texts, n_tokens, n_embd) float32; no other row is read."""
    import torch
    from safetensors import safe_open

    path, name = stored[_TOKEN_TABLE]
    with safe_open(path, framework="pt") as file:
        table = file.get_slice(name)
        return (
            torch.stack([table[int(token)] for ids in texts for token in ids])
            .float()
            .reshape(len(texts), len(texts[0]), -1)
        )
