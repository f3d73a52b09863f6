"""The doctor's checks of files that somebody else made: is the header what models of its kind need?

A file that f2gguf made states all of it, and was measured with it.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator
from functools import partial

import numpy as np
from f2gguf.runtime.gguf.case import AGAIN, Case, Check, Finding
from f2gguf.runtime.gguf.describe import drift_of, is_reference
from f2gguf.runtime.gguf.header import (
    ENCODERS,
    KEY_ADD_EOS,
    KEY_LOWERCASE,
    KEY_MAX_TOKENS,
    KEY_STRIP_ACCENTS,
    KEY_TOKENIZER,
)
from f2gguf.runtime.gguf.pretokenizers import recursive

_warning, _note = partial(Finding, "warning"), partial(Finding, "note")
# Encoders whose checkpoints put [CLS] or <s> before a text and [SEP] or </s> after it
_CLOSED_ON_BOTH_SIDES = ("bert", "nomic-bert-moe", "modern-bert", "jina-bert-v3", "gemma-embedding")
_BOTH_WAYS_AND_LAST = ("qwen2", "eurobert")  # gte-Qwen2 and jina-v5-nano see both ways, and take the last token
# A model's name -> the token that its texts were closed with in training
_CLOSED_WITH = {
    r"qwen3[\W_]*embedding|gte[\W_]*qwen2": "<|endoftext|>",
    r"f2llm": "<|im_end|>",
    r"e5[\W_]*mistral|sfr[\W_]*embedding|linq[\W_]*embed": "</s>",
}
# An encoder's name -> its pooling
_POOLED = {
    r"minilm|\be5\b|nomic[\W_]*embed|embeddinggemma|paraphrase": "mean",
    r"\bbge\b|arctic[\W_]*embed|mxbai[\W_]*embed|granite[\W_]*embed": "cls",
}
# Architectures with last-token pooling, and names, of models that were trained with a prompt before queries
_PROMPTED = ("qwen2", "qwen3", "llama", "mistral3", "gemma3")
_PROMPTED_NAMES = re.compile(r"\be5\b|arctic[\W_]*embed|mxbai[\W_]*embed|nomic|gemma|instruct|\bbge\b", re.IGNORECASE)
_WITH_DENSE = re.compile(r"labse|distiluse|stella[\W_]*en|sentence[\W_]*t5|gtr[\W_]*t5", re.IGNORECASE)
_UNSCALED = ("qwen2", "qwen3", "modern-bert", "nomic-bert", "eurobert", "gemma-embedding")  # rotary, and as trained
# Architecture -> the pre-tokenizers that its models have
_QWEN = ("qwen2", "f2llmv2", "deepseek-r1-qwen", "kormo")
_PRE = {"qwen2": _QWEN, "qwen3": _QWEN, "modern-bert": ("modern-bert",)}
_PRE_DIALECTS = {"modern-bert": ("granite",)}
_N_CAPITALS = 100  # in tokens; the uncased vocabulary of BERT has none, the cased one 11,000
_N_ACCENTS = 20  # likewise: tokens with letters that stripping accents would change


def closing_token(case: Case) -> Iterator[Finding]:
    """Last-token pooling takes the vector of the closing token, which llama.cpp adds only if the header says so."""
    warning = partial(_warning, "closing token")
    if case.pooling == "last" and not case.closes:
        stated = "false" if KEY_ADD_EOS in case.values else "missing"
        what = f"last-token pooling, and texts are not closed ({KEY_ADD_EOS} is {stated})"
        why = "vectors are those of each text's last word (f2llm-nano: cosine 0.26 to 0.35 to the right ones)"
        if case.vocabulary.text(case.id_of("eos")) is None:
            mend = f"Name the token that closed texts in training: {case.mended('--eos-token TOKEN --add-eos')}."
        else:
            mend = f"Pass --add-eos, which closes with {case.named('eos')}, or write {case.mended('--add-eos')}."
        yield warning(what, why, mend)
    if not case.closes or not case.vocabulary.tokens:
        return
    role, usual = case.closing_role, _by_name(case, _CLOSED_WITH)
    if case.pooling == "last" and usual and case.vocabulary.text(case.id_of(role)) != usual:
        why = f"models of this name were trained with {usual!r}"
        mend = case.mended(f"--eos-token {shlex.quote(usual)}")
        yield warning(f"texts close with {case.named(role)}", why, f"Write {mend}.")


def pooling(case: Case) -> Iterator[Finding]:
    """Mean and CLS pooling can't be told apart but by the model's name."""
    usual = _by_name(case, _POOLED) if case.architecture in _CLOSED_ON_BOTH_SIDES else None
    if case.pooling and usual and case.pooling != usual:
        mend = f"Look into the checkpoint's 1_Pooling/config.json. Write {case.mended(f'--pooling {usual}')}."
        yield _warning("pooling", f"{case.pooling} pooling", f"models of this name have {usual} pooling", mend)


def opening_token(case: Case) -> Iterator[Finding]:
    warning = partial(_warning, "opening token")
    if not case.opens and (case.pooling == "cls" or case.architecture in _CLOSED_ON_BOTH_SIDES):
        why = "such models were trained with one, and CLS pooling takes its vector"
        mend = f"Write {case.mended('--add-bos')}."
        yield warning("texts have no opening token (tokenizer.ggml.add_bos_token)", why, mend)
    if case.architecture in _CLOSED_ON_BOTH_SIDES and not case.closes and case.pooling != "last":
        why = "such models were trained with one"
        mend = f"Pass --add-eos, or write {case.mended('--add-eos')}."
        yield _warning("closing token", f"texts have no closing token ({KEY_ADD_EOS})", why, mend)


def unopened(case: Case) -> Iterator[Finding]:
    if case.architecture in ("qwen2", "qwen3") and case.opens:
        mend = f"Write {case.mended('--no-add-bos')}."
        yield _warning("opening token", f"texts open with {case.named('bos')}", "models of its kind have none", mend)


def attention(case: Case) -> Iterator[Finding]:
    """Whether tokens see those behind them, and whether that goes with the pooling."""
    warning, key = partial(_warning, "attention"), f"{case.architecture}.attention.causal"
    both_ways = f"Write {case.mended('--no-causal')}."
    if case.header.is_causal and case.architecture == "llama-embed":
        what = f"{key} is {'true' if key in case.values else 'missing'}"
        yield warning(
            what, "such models see both ways, and llama.cpp hides from every token those behind it", both_ways
        )
    elif case.header.is_causal and case.pooling == "cls":
        what = "CLS pooling, and tokens see only those before them"
        yield warning(what, "the first token sees no text, so that texts which begin alike get one vector", both_ways)
    elif case.header.is_causal and case.pooling == "mean":
        what = f"mean pooling, and tokens see only those before them ({key})"
        why = "most models with mean pooling see both ways"
        yield warning(what, why, f"Look for is_causal in the checkpoint's config.json. {both_ways}")
    elif case.pooling == "last" and case.architecture in ENCODERS and case.architecture not in _BOTH_WAYS_AND_LAST:
        mend = f"Look into the checkpoint's 1_Pooling/config.json. Write {case.mended('--pooling mean')}."
        yield warning("last-token pooling in an encoder", "encoders are trained with mean or CLS pooling", mend)
    elif case.pooling == "last" and not case.header.is_causal and case.architecture not in _BOTH_WAYS_AND_LAST:
        mend = f"Look for is_causal in the checkpoint's config.json. Write {case.mended('--causal')}."
        yield warning(f"last-token pooling, and tokens see both ways ({key})", "few models are trained so", mend)


def pre_tokenizer(case: Case) -> Iterator[Finding]:
    if case.tokenizer != "gpt2":
        return
    warning, usual = partial(_warning, "pre-tokenizer"), _PRE.get(case.architecture)
    name = usual[0] if usual else "NAME"
    mend = f"Write {case.mended(f'--pre {name}')}."
    if case.pre in ("", "default"):
        what = f"tokenizer.ggml.pre is {case.pre or 'missing'}"
        yield warning(what, "llama.cpp then splits texts by a rule that hardly any model was trained with", mend)
    elif usual and case.pre not in usual and not case.pre.startswith(_PRE_DIALECTS.get(case.architecture, ("\0",))):
        what = f"tokenizer.ggml.pre is {case.pre!r}"
        yield warning(what, f"{case.architecture} models have {usual[0]!r}, and split texts by it", mend)
    if recursive(case.tokenizer, case.pre):
        what = f"llama.cpp splits by std::regex for {case.pre or 'default'!r}"
        why = "30,000 letters, digits or signs without a blank can end programs that use it, such as llama-server"
        yield _note("pre-tokenizer", what, why, "Break such runs before they get there.")


def prompt(case: Case) -> Iterator[Finding]:
    if case.header.prompts or case.is_own:
        return
    by_kind = case.architecture in _PROMPTED and case.pooling in ("last", None)
    is_prompted = by_kind or bool(_PROMPTED_NAMES.search(f"{case.architecture} {_name(case)}"))
    why = f"{'such models were' if is_prompted else 'many models are'} trained with a text before every query"
    mend = f"Look it up, and pass --prompt TEXT for queries, or write {case.mended('--prompt query=TEXT')}."
    yield Finding("warning" if is_prompted else "note", "prompt", "states no prompt", why, mend)


def dense(case: Case) -> Iterator[Finding]:
    names = {tensor.name for tensor in case.header.tensors}
    if case.architecture == "gemma-embedding" and not {"dense_2.weight", "dense_3.weight"} <= names:
        why = "EmbeddingGemma's vectors come from two more matrices behind the pooling"
        mend = "Convert it again with llama.cpp's `convert_hf_to_gguf.py --sentence-transformers-dense-modules`."
        yield _warning("dense", "the Dense modules were left out (dense_2.weight, dense_3.weight)", why, mend)
    elif "dense_2.weight" not in names and _WITH_DENSE.search(_name(case)):
        why = "models of this name have another matrix behind the pooling"
        yield _warning("dense", "the Dense module was left out", why, "Llama.cpp cannot hold it: take another model.")


def words(case: Case) -> Iterator[Finding]:
    if case.tokenizer != "bert" or not case.vocabulary.tokens:
        return
    tokens = case.vocabulary.tokens
    if not any(token.startswith("\u2581".encode()) for token in tokens):
        why = "llama.cpp looks for words that begin with U+2581, and finds none"
        yield _warning("vocabulary", "WordPiece tokens are spelled as in vocab.txt", why, AGAIN)
    lowers = bool(case.values.get(KEY_LOWERCASE, True))
    n_capital = sum(token != token.lower() and not token.startswith(b"[") for token in tokens)
    if lowers == (n_capital > _N_CAPITALS) and KEY_TOKENIZER not in case.values:
        what = f"{n_capital:,} tokens have capitals, and texts are {'' if lowers else 'not '}lower-cased"
        flag = "--no-lowercase" if lowers else "--lowercase"
        yield _warning(
            "normaliser", what, "words with capitals then become other tokens", f"Write {case.mended(flag)}."
        )
    strips = bool(case.values.get(KEY_STRIP_ACCENTS, True))
    n_accents = sum(map(_has_accent, tokens))
    if strips == (n_accents > _N_ACCENTS) and KEY_TOKENIZER not in case.values:
        what = f"{n_accents:,} tokens have accents, and those of texts are {'' if strips else 'not '}stripped"
        yield _warning("normaliser", what, "words with accents then become other tokens", AGAIN)
    if KEY_TOKENIZER not in case.values:
        why = "it differs from the checkpoint's own on some rare characters"
        yield _note("normaliser", "llama.cpp's own text normaliser is used", why, "Convert it with `quantize convert`.")


def positions(case: Case) -> Iterator[Finding]:
    """Scaled rotary embeddings: llama.cpp follows the keys in every text, not only in long ones."""
    if case.architecture not in _UNSCALED or case.of_architecture("rope.scaling.type", None) == "none":
        return
    for key in ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"):
        if (value := case.of_architecture(key, 1.0)) not in (0.0, 1.0):
            why = "no known embedding model of its kind was trained with scaled positions"
            mend = f"Look for rope_scaling in the checkpoint's config.json. {AGAIN}"
            yield _warning("positions", f"{case.architecture}.{key} is {float(str(np.float32(value)))}", why, mend)


def longest_input(case: Case) -> Iterator[Finding]:
    if KEY_MAX_TOKENS not in case.values:
        what = f"states no longest input, so that {case.header.n_ctx_train:,} tokens are taken"
        why = "many models were trained with shorter texts than they have positions for"
        mend = f"Pass --max-tokens N, or write {case.mended('--max-tokens N')}."
        yield _note("longest input", what, why, mend)


def measured(case: Case) -> Iterator[Finding]:
    header = case.header
    if drift_of(header) is None and not is_reference(header):
        why = "some 4-bit files of embedding models are far from the model (a published one: cosine 0.69)"
        mend = f"Measure it: `quantize verify {header.path} --against MODEL`."
        yield _note("drift", "nobody has measured this file", why, mend)


def source(case: Case) -> Iterator[Finding]:
    stated = ("general.base_model.0.repo_url", "general.source.url", "general.source.repo_url", "general.repo_url")
    if not any(key in case.values for key in stated):
        why = "the checkpoint to compare it with is not known"
        yield _note("source", "does not say which checkpoint it was made from", why, "Ask its maker.")


def _name(case: Case) -> str:
    return " ".join(str(case.values.get(f"general.{key}", "")) for key in ("name", "basename", "finetune"))


def _by_name(case: Case, table: dict[str, str]) -> str | None:
    name = _name(case).lower()
    return next((found for pattern, found in table.items() if re.search(pattern, name)), None)


CHECKS: tuple[Check, ...] = (
    pooling,
    closing_token,
    opening_token,
    unopened,
    attention,
    pre_tokenizer,
    prompt,
    dense,
    words,
    positions,
    longest_input,
    measured,
    source,
)


def _has_accent(token: bytes) -> bool:
    """Whether stripping accents, as BERT's normaliser does, would change the token."""
    text = token.decode("utf-8", errors="replace")
    return not text.isascii() and any(unicodedata.category(c) == "Mn" for c in unicodedata.normalize("NFD", text))
