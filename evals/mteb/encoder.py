"""`F2ggufEncoder`: a .gguf file in any text task of mteb 2, with the prompts that the task and the model call for."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

from f2gguf.runtime import Embedder
from f2gguf.runtime.calls import Vectors
from f2gguf.runtime.errors import ExtraMissing
from f2gguf.runtime.files import sha256_file
from f2gguf.runtime.gguf.header import KEY_REVISION, KEY_VERSION, Header

if TYPE_CHECKING:
    from mteb import TaskMetadata
    from mteb.models import ModelMeta
    from mteb.types import Array, PromptType

log = logging.getLogger("f2gguf")
_FRAME = re.compile(r"(Instruct: )(.*)(\nQuery: ?)", re.DOTALL)
_HUB = "https://huggingface.co/"


class F2ggufEncoder:
    """A model as an encoder of mteb 2; `Embedder(path, truncate_dim=...)` chooses the Matryoshka width.

    >>> encoder = F2ggufEncoder(Embedder("dist/f2llm-nano/f2llm-nano-Q4_0.gguf"))
    >>> mteb.evaluate(encoder, mteb.get_tasks(["STS12", "NFCorpus"]))

    Documents get the file's document prompt. All other texts get an instruction in the frame of the file's query prompt
    ("Instruct: ...\\nQuery: "). It comes from the first of these that has one: `prompts`, by task name, task type or
    "query"; mteb's own table for the checkpoint, so that F2LLM-v2 runs as in mteb; the task; the file, for queries to a
    model that mteb does not know; mteb's default for the type of task. Files without such a frame (E5, MiniLM) get
    `prompts` as they are, else their query prompt on queries, and nothing on symmetrical texts.

    Raises `ExtraMissing` without mteb.
    """

    def __init__(self, model: Embedder, *, prompts: Mapping[str, str] | None = None) -> None:
        require_mteb()
        self.model = model
        self._prompts = dict(prompts or {})
        self._frame = _FRAME.fullmatch(model.prompts.get("query", ""))
        self._registered = _registered_meta(repo) if (repo := _repo(model.header)) else None
        self.mteb_model_meta = _meta(model, self._registered, self._prompts)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        precision: str = "float32",
        **_: Any,  # split, subset, progress bar, and a batch size, which f2gguf chooses itself
    ) -> Vectors:
        """Vectors of the texts of all batches, (n_texts, n_dims). Raises what `Embedder.embed` does."""
        prompt = self.prompt_for(task_metadata, prompt_type)
        log.info("%s, %s: prompt %r", task_metadata.name, prompt_type or "no prompt type", prompt)
        texts = [text for batch in inputs for text in batch["text"]]
        return self.model.encode(texts, prompt=prompt, precision=precision)

    def prompt_for(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """What `encode` puts before each text of a task."""
        kind = prompt_type.value if prompt_type else None
        if kind == "document":
            return self.model.prompts.get("document", "")
        instruction = _find(self._prompts, task, kind)
        if self._frame is None:
            return self.model.prompts.get(kind or "", "") if instruction is None else instruction
        before, of_file, after = self._frame.groups()
        if instruction is None:
            instruction = self._instruction(task, kind, of_file)
        return before + instruction + after if instruction else ""

    def similarity(self, embeddings1: Array, embeddings2: Array) -> Array:
        """Cosine of every row of one with every row of the other, (n1, n2)."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Array, embeddings2: Array) -> Array:
        """Cosine of each row of one with its row of the other, (n,)."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)

    def _instruction(self, task: TaskMetadata, kind: str | None, of_file: str) -> str:
        from mteb.abstasks.abstask import get_abstask_prompt

        table = self._registered.loader_kwargs.get("prompts_dict") if self._registered else None
        listed = _find(table or {}, task, kind)
        if listed is not None:
            return listed
        stated = task.prompt.get(kind or "query") if isinstance(task.prompt, dict) else task.prompt
        if not stated and kind == "query" and not self._registered:
            return of_file
        return str(stated or get_abstask_prompt(task.name))


def require_mteb() -> None:
    """Raise `ExtraMissing` unless mteb can be imported."""
    if not find_spec("mteb"):
        raise ExtraMissing("mteb is not installed. Run: pip install 'f2gguf[mteb]'")


def _find(table: Mapping[str, str], task: TaskMetadata, kind: str | None) -> str | None:
    """The entry of the task's name, else of its type, else of the kind of text, which is mteb's order."""
    return next((table[key] for key in (task.name, task.type, kind or "") if key in table), None)


def _repo(header: Header) -> str | None:
    """The checkpoint on the Hub, for files that f2gguf made; elsewhere a base model may be any ancestor."""
    url = str(header.values.get("general.base_model.0.repo_url", ""))
    return url.removeprefix(_HUB) if KEY_VERSION in header.values and url.startswith(_HUB) else None


def _registered_meta(repo: str) -> ModelMeta | None:
    """A checkpoint's entry in mteb's own registry. None if it has none."""
    import mteb

    with contextlib.suppress(KeyError):
        return mteb.get_model_meta(repo, fetch_from_hf=False)
    return None


def _meta(model: Embedder, registered: ModelMeta | None, prompts: Mapping[str, str]) -> ModelMeta:
    """The registry's facts on the checkpoint, replaced by the file's own where it states them.

    mteb keeps results by name, revision and experiment. The revision ends in the file's hash, so that a file that was
    made again is measured again.
    """
    from mteb.models import ModelMeta
    from mteb.types import Licenses

    header, repo, values = model.header, _repo(model.header), model.header.values
    counts = {tensor.name: math.prod(tensor.shape) for tensor in header.tensors}
    experiment = {"truncate_dim": model.truncate_dim, "prompts": dict(prompts)}
    revision = [values[KEY_REVISION]] if values.get(KEY_REVISION) else []
    facts = {
        "loader": None,
        "loader_kwargs": {},
        "name": f"{repo.split('/')[0] if repo else 'local'}/{header.path.stem}",
        "revision": "-".join([*revision, sha256_file(header.path)[:12]]),
        "n_parameters": sum(counts.values()),
        "n_embedding_parameters": counts.get("token_embd.weight"),
        "memory_usage_mb": sum(tensor.size_bytes for tensor in header.tensors) / 2**20,
        "max_tokens": model.max_seq_length,
        "embed_dim": model.get_sentence_embedding_dimension(),
        "license": values.get("general.license") if values.get("general.license") in get_args(Licenses) else None,
        "open_weights": True,
        "framework": ["GGUF"],
        "similarity_fn_name": "cosine",
        "use_instructions": any(header.prompts.values()),
        "adapted_from": repo,
        "output_dtypes": None,  # float32
        "experiment_kwargs": {key: value for key, value in experiment.items() if value} or None,
    }
    return ModelMeta(**{**(registered or ModelMeta.create_empty()).model_dump(), **facts})
