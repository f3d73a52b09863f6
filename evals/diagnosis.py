"""Why a converted file gives other vectors than its checkpoint: from which stage of the model on the two differ."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.full_precision import Ids, load_model
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import FileWarning
from f2gguf.runtime.llama.context import read_rows, tensor_name
from numpy.typing import NDArray

States = NDArray[np.float32]  # (n_tokens, n_embd)
_SAME = 0.999  # cosine of a token's states: F16 weights give 0.99999, a fault of one stage far less
_STAGES = re.compile(r"(inp_norm|ffn_inp|sa_out|l_out)-\d+|result_(norm|embd)|final_norm_out")  # llama.cpp's names
_OFFSETS = (1, 2)  # positions that some families count from


@dataclass(frozen=True)
class Stage:
    """A place in the model: llama.cpp's name of its tensor, what it is, and what is likely wrong where it differs."""

    name: str
    what: str
    cause: str


def likely_cause(path: Path, folder: Path, ids: Ids) -> str:
    """In words, where the states of one text leave those of the checkpoint, and what that points to.

    Settings that are easily mistaken are tried on the checkpoint: it must then give what the file gives.
    """
    theirs = _checkpoint_states(folder, ids)
    ours = _file_states(path, ids)
    stages = [stage for stage in _stages(path, len(theirs)) if stage.name in ours and stage.name in theirs]
    differing = next((s for s in stages if not _is_same(ours[s.name], theirs[s.name]).all()), None)
    if differing is None:
        return "every layer gives the same, so it is the pooling, or a Dense module behind it"
    is_same = _is_same(ours[differing.name], theirs[differing.name])
    for words, change in _suspects(len(ids)):
        changed = _checkpoint_states(folder, ids, **change)
        if _is_same(ours[differing.name], changed[differing.name]).all():
            return f"{differing.what} differs first: {words}"
    if is_same[0] and "attention" in differing.what:
        cause = "its first token is right, which points to queries and keys: RoPE, the order of their rows, or a window"
    else:
        cause = differing.cause
    return f"{differing.what} differs first: {cause}"


def _suspects(n_tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for is_causal, words in ((False, "both ways"), (True, "causal")):
        yield (
            f"it is as with {words} attention (the mask)",
            {"is_causal": is_causal, "use_bidirectional_attention": not is_causal},
        )
    for offset in _OFFSETS:
        yield f"its positions are those of a model that counts from {offset}", {"first_position": offset}


def _stages(path: Path, n_layers: int) -> Iterator[Stage]:
    yield Stage("inp_norm-0", "the embedding layer", "the token table, the positions, or the norm behind them")
    for i in range(n_layers):
        norm = "a norm before it, its values, or its output matrix"
        yield Stage(f"ffn_inp-{i}", f"the attention of layer {i + 1}", norm)
        feed = "a norm, the activation, or a matrix of it"
        yield Stage(f"l_out-{i}", f"the feed-forward part of layer {i + 1}", feed)
    for name in ("result_norm", "result_embd", "final_norm_out"):
        yield Stage(name, "the last layer", "the final norm, or the last feed-forward part")


def _is_same(ours: States, theirs: States) -> NDArray[np.bool_]:
    """For each token, whether the two point the same way."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return np.asarray(np.einsum("ij,ij->i", ours, theirs) >= _SAME * lengths)


class _Recorder:
    """Keeps the states of every stage (see `context.Watch`)."""

    def __init__(self) -> None:
        self.states: dict[str, States] = {}

    def wants(self, tensor: int) -> bool:
        return _STAGES.fullmatch(tensor_name(tensor)) is not None

    def take(self, tensor: int) -> None:
        self.states[tensor_name(tensor)] = read_rows(tensor)


def _file_states(path: Path, ids: Ids) -> dict[str, States]:
    recorder = _Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FileWarning)
        model = Embedder(path, device="cpu", pooling="mean", watch=recorder)  # so that every token has an output
    with model:
        model.encoder.compute([ids])
    found = {name.replace("sa_out", "ffn_inp"): states for name, states in recorder.states.items()}
    return {name: states.reshape(len(ids), -1) for name, states in found.items()}


def _checkpoint_states(folder: Path, ids: Ids, *, first_position: int = 0, **changes: Any) -> dict[str, States]:
    import torch

    model = load_model(folder, **changes)
    states: dict[str, States] = {}
    with torch.inference_mode():
        for name, module, of_input in _modules(model):
            _record(module, states, name, of_input=of_input)
        positions = torch.arange(first_position, first_position + len(ids))[None]
        model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], position_ids=positions)
    return states


def _modules(model: Any) -> Iterator[tuple[str, Any, bool]]:
    """llama.cpp's name of a stage, the module of transformers there, and whether its input is meant."""
    layers = model.encoder.layer if hasattr(model, "encoder") else model.layers
    if hasattr(model, "embeddings"):  # an encoder
        yield "inp_norm-0", model.embeddings, False
    for i, layer in enumerate(layers):
        yield f"ffn_inp-{i}", *_after_attention(layer)
        yield f"l_out-{i}", layer, False
    for name, module in (("result_norm", "norm"), ("final_norm_out", "final_norm")):
        if hasattr(model, module):
            yield name, getattr(model, module), False
    yield "result_embd", layers[-1], False


def _after_attention(layer: Any) -> tuple[Any, bool]:
    """The module whose output, or input where true, is what llama.cpp calls ffn_inp."""
    if hasattr(layer, "attention"):  # BERT and RoBERTa
        return layer.attention.output, False
    for name in ("mlp_norm", "pre_feedforward_layernorm"):  # ModernBERT, Gemma
        if hasattr(layer, name):
            return getattr(layer, name), True
    is_before = not hasattr(layer, "post_mlp_layernorm")  # NomicBERT has its norms after each part
    return layer.post_attention_layernorm, is_before


def _record(module: Any, states: dict[str, States], name: str, *, of_input: bool) -> None:
    def keep(value: Any) -> None:
        states[name] = (value[0] if isinstance(value, tuple) else value)[0].float().numpy()

    def before(_module: Any, arguments: Any) -> None:
        keep(arguments)

    def after(_module: Any, _arguments: Any, output: Any) -> None:
        keep(output)

    register: Callable[[Any], Any] = module.register_forward_pre_hook if of_input else module.register_forward_hook
    register(before if of_input else after)
