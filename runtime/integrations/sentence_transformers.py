"""sentence-transformers: `sentence_transformer(file)`, for libraries that check the type of what they get.

`Embedder` takes the same arguments without torch. This is for BERTopic, KeyBERT, SetFit, mteb and others that ask for
a `SentenceTransformer`.
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime import Embedder
from f2gguf.runtime.calls import texts_of
from f2gguf.runtime.embedder import Embeddings
from f2gguf.runtime.errors import ExtraMissing, WrongUsage
from f2gguf.runtime.files import writing

try:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ExtraMissing(f"{error}. Run: pip install 'sentence-transformers>=6'") from error

NO_TRAINING = "a .gguf file cannot be trained. Train the checkpoint, then run `quantize all` on its folder."


def sentence_transformer(
    model: str | Path,
    *,
    truncate_dim: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    n_threads: int | None = None,
) -> SentenceTransformer:
    """A `SentenceTransformer` that computes with a .gguf file; options and errors are those of `Embedder`.

    >>> topics = BERTopic(embedding_model=sentence_transformer("dist/f2llm-nano/f2llm-nano-Q8_0.gguf"))

    Vectors, prompts and the longest input are those of the `Embedder`. `save` writes a folder with the file in it,
    which `SentenceTransformer(folder, trust_remote_code=True)` opens where f2gguf is installed. It cannot be trained,
    and has no vectors of tokens. `precision="int8"` takes ranges of the batch, as always there; `Embedder` has its own.
    """
    module = GGUF(model, truncate_dim=truncate_dim, max_tokens=max_tokens, device=device, n_threads=n_threads)
    prompts, default = module.model.prompts, module.model.default_prompt_name
    return SentenceTransformer(modules=[module], device="cpu", prompts=prompts, default_prompt_name=default)


class GGUF(InputModule):  # type: ignore[misc]
    """The one module of such a `SentenceTransformer`: texts become token ids, and those become vectors."""

    config_file_name = "f2gguf.json"

    def __init__(
        self,
        model: str | Path,
        *,
        truncate_dim: int | None = None,
        max_tokens: int | None = None,
        device: str = "auto",
        n_threads: int | None = None,
    ) -> None:
        super().__init__()
        options = {"truncate_dim": truncate_dim, "device": device, "n_threads": n_threads}
        self.model = Embedder(model, max_tokens=max_tokens, **options)  # type: ignore[arg-type]
        self.options = options
        self.eval()

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        """Token ids of texts behind a prompt, filled up with 0, and their mask: (n_texts, n_tokens)."""
        tokens = self.model.encoder.tokenize(texts_of(inputs), prompt or "", max_tokens=self.max_seq_length)
        self.model.warn_of_cuts(tokens.truncated)
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(ids) for ids in tokens.ids], batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.from_numpy(tokens.lengths)[:, None]
        return {"input_ids": padded.long(), "attention_mask": mask.long()}

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        """The vectors of token ids, (n_texts, n_dims), as "sentence_embedding". Raises `NoVector`."""
        if self.training and torch.is_grad_enabled():
            raise WrongUsage(f"{self.model.header.path}: {NO_TRAINING}")
        ids, mask = (features[key].cpu().numpy() for key in ("input_ids", "attention_mask"))
        texts = [row[kept == 1].astype(np.int32) for row, kept in zip(ids, mask, strict=True)]
        encoder = self.model.encoder
        vectors = encoder.finish(encoder.compute(texts), width=self.get_embedding_dimension())
        whole = Embeddings(vectors, mask.sum(axis=1), np.zeros(len(texts), dtype=np.bool_))
        vectors = self.model.require_vectors(whole).vectors
        features["sentence_embedding"] = torch.from_numpy(vectors).to(features["input_ids"].device)
        return features

    @property
    def max_seq_length(self) -> int:
        """Longest input in tokens. It can be set."""
        return self.model.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, max_tokens: int | None) -> None:
        self.model.max_seq_length = max_tokens  # type: ignore[assignment]

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer as one of transformers, special tokens included; see `Embedder.tokenizer`."""
        from tokenizers import Tokenizer, decoders, processors
        from transformers import PreTrainedTokenizerFast

        whole = Tokenizer.from_str(self.model.tokenizer.to_str())  # a copy, since transformers changes it
        opening, closing = ([(whole.id_to_token(i), int(i)) for i in ids] for ids in self.model.encoder.special_ids)
        around = [name for name, _ in opening], [name for name, _ in closing]
        whole.post_processor = processors.TemplateProcessing(
            single=[*around[0], "$A", *around[1]], special_tokens=[*opening, *closing]
        )
        kind = type(whole.model).__name__
        if kind == "BPE" and whole.model.byte_fallback:
            kind = "byte fallback"
        spaces, steps = decoders.Replace("\u2581", " "), (decoders.ByteFallback(), decoders.Fuse())
        whole.decoder = {
            "WordPiece": decoders.WordPiece(),
            "Unigram": decoders.Metaspace(),
            "BPE": decoders.ByteLevel(),
            "byte fallback": decoders.Sequence([spaces, *steps]),
        }[kind]
        pad = self.model.header.values.get("tokenizer.ggml.padding_token_id")
        return PreTrainedTokenizerFast(
            tokenizer_object=whole,
            pad_token=None if pad is None else whole.id_to_token(pad),
            model_max_length=self.max_seq_length,
        )

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.model.get_embedding_dimension()

    def get_config_dict(self) -> dict[str, Any]:
        """What `load` reads."""
        return {"file": self.model.header.path.name, "max_tokens": self.max_seq_length, **self.options}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write a copy of the file, and beside it how to open it."""
        source = self.model.header.path
        target = Path(output_path, source.name)
        if not (target.exists() and target.samefile(source)):
            with writing(target) as part:
                shutil.copyfile(source, part)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> GGUF:
        """Open what `save` wrote, here or on the Hub."""
        places = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {key: options[key] for key in places if key in options}
        config = cls.load_config(model_name_or_path, **where)
        file = cls.load_file_path(model_name_or_path, config.pop("file"), **where)
        return cls(Path(file or model_name_or_path), **config)
