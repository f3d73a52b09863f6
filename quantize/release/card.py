"""The model card: what each file is, how far it drifts, how it was made, how to run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from f2gguf.quantize.report.picture import can_draw
from f2gguf.quantize.report.tables import (
    STOCK_NOTE,
    Table,
    conversion_sentence,
    dims_table,
    files_table,
    groups_table,
    markdown_table,
    over_lines,
    recipe_lines,
)
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.files import format_bound
from f2gguf.runtime.hub.models import recommended

_DEVICES_GB = (0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 128)
_SHARE = 0.8  # of a device's memory, for the model
_PICTURE = "![Drift of every text, size against drift, and mean drift by dimension and language](drift.png)"


def model_card(facts: Facts, report: dict[str, Any]) -> str:
    """README.md with the YAML front matter of the Hugging Face Hub."""
    file = report["files"][recommended(report)]["file"]
    sections = [
        f"---\n{_front_matter(facts, report)}\n---",
        f"# {facts.name}, GGUF",
        _introduction(facts),
        "## Files",
        markdown_table(*_files(facts, report)),
        _files_note(facts, report),
        _measurement(report),
        "\n".join(f"**{line}.**" for line in over_lines(report)),
        _PICTURE if can_draw(report) else "",
        *(_where_it_drifts(report) if report["variants"] else ()),
        *_recipes(report),
        "## SHA-256",
        markdown_table(("file", "sha256"), [[f["file"], f"`{f['sha256']}`"] for f in report["files"].values()]),
        "## How to run it",
        _usage(facts, file),
        "## The model",
        markdown_table(("", ""), _properties(facts)),
        "## Where it comes from",
        markdown_table(("", ""), _provenance(facts, report)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: Facts, report: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    entry = facts.entry
    data = ModelCardData(
        model_name=facts.name,
        language=list(entry.languages) or None,
        license=entry.license,
        base_model=entry.repo,
        base_model_relation="quantized" if entry.repo else None,
        library_name="gguf",
        pipeline_tag="sentence-similarity",
        tags=["gguf", "llama.cpp", "f2gguf", "sentence-transformers", "feature-extraction"],
        eval_results=list(_eval_results(report)),
    )
    return str(data.to_yaml())


def _eval_results(report: dict[str, Any]) -> Iterator[Any]:
    """The model-index: each variant's figures. Source: https://github.com/huggingface/hub-docs, modelcard.md"""
    from huggingface_hub import EvalResult

    for name, verdict in report["variants"].items():
        metrics = {
            "mean_drift": ("mean of 1 - cosine to the F16 file's vector", verdict["mean"]),
            "mean_drift_upper": ("upper end of its 95% interval", verdict["upper"]),
            "ndcg_at_10": (f"nDCG@10; F16 has {verdict['ndcg10_reference']:.3f}", verdict["ndcg10"]),
        }
        for kind, (words, value) in metrics.items():
            yield EvalResult(
                task_type="sentence-similarity",
                dataset_type="f2gguf-texts",
                dataset_name=f"f2gguf evaluation texts ({verdict['n']})",
                dataset_config=name,
                metric_type=kind,
                metric_name=f"{name}: {words}",
                metric_value=value,
            )


def _files(facts: Facts, report: dict[str, Any]) -> Table:
    """The table of sizes and drifts, with what memory a file fits in, and the beginning of its hash."""
    header, rows = files_table(report)
    for row in rows:
        file = report["files"].get(row[0])  # llama.cpp's own recipes were measured, not kept
        row += [_fits_in(facts, file["size_bytes"]), f"`{file['sha256'][:12]}`"] if file else ["", ""]
    return (*header, "fits in", "SHA-256"), rows


def _fits_in(facts: Facts, size_bytes: int) -> str:
    needed = size_bytes + facts.max_tokens * _cache_bytes(facts)
    return next((f"{size:g} GB" for size in _DEVICES_GB if needed <= _SHARE * size * 1e9), f"{needed / 1e9:.0f} GB")


def _cache_bytes(facts: Facts) -> int:
    """Keys and values of one token in F16; none for models that see a text at once."""
    values = facts.architecture.facts(facts.checkpoint)
    if "attention.head_count_kv" not in values:
        return 0
    width = values["attention.key_length"] + values["attention.value_length"]
    return int(2 * values["block_count"] * values["attention.head_count_kv"] * width)


def _files_note(facts: Facts, report: dict[str, Any]) -> str:
    cache = _cache_bytes(facts)
    of_tokens = f" and {cache / 1000:.1f} MB for every 1,000 tokens of a text (keys and values)" if cache else ""
    note = (
        f'"Fits in" is by arithmetic: the file\'s size{of_tokens}, for a text of {facts.max_tokens:,} tokens, is at '
        f"most {_SHARE:.0%} of that memory."
    )
    return f"{STOCK_NOTE} {note}" if report.get("stock") else note


def _introduction(facts: Facts) -> str:
    entry = facts.entry
    where = f"[{entry.repo}](https://huggingface.co/{entry.repo})" if entry.repo else f"the checkpoint {entry.name}"
    at = f" at revision `{entry.revision}`" if entry.revision else ""
    return (
        f"GGUF files of {where}{at} for llama.cpp, each measured: how far its vectors are from the full-precision "
        "model's. The figures stand in the files' own headers too (`f2gguf inspect FILE`)."
    )


def _measurement(report: dict[str, Any]) -> str:
    check = report["conversion"]
    sentence = conversion_sentence(report)
    n_stock = check.get("n_stock_tokenizer_differs", 0)
    stock = (
        f" Stock llama.cpp leaves out the checkpoint's own text normaliser and splits {n_stock} of the test strings "
        "(such as decomposed Unicode) differently; f2gguf runs it."
        if n_stock
        else ""
    )
    texts = report["texts"]
    return (
        f"Drift is 1 - cosine to the F16 file's vector, over {texts['n']} texts in the model's languages "
        f"({', '.join(texts['languages'])}): queries with the prompt, documents, code, long texts, edge cases. The "
        "bound holds when the upper end of the 95% interval, and the mean of every language and kind, are under "
        f"{format_bound(report['max_drift'])}. Conversion: {sentence}.{stock} Everything measured is in `report.html`, "
        "and for programs in `drift.json`."
    )


def _where_it_drifts(report: dict[str, Any]) -> list[str]:
    dims = dims_table(report)
    return [
        f"Mean drift by Matryoshka dimension:\n\n{markdown_table(*dims)}" if len(dims[1]) > 1 else "",
        "<details><summary>Mean drift by language, the worst first</summary>",
        markdown_table(*groups_table(report, "language")),
        "</details>",
    ]


def _recipes(report: dict[str, Any]) -> Iterator[str]:
    """How each variant was made, where the report says."""
    recipes = recipe_lines(report)
    if recipes:
        yield "## How they were made"
    for name, lines in recipes.items():
        yield "\n".join([f"{name}:\n", *(f"- {line}" for line in lines)])


def _usage(facts: Facts, file: str) -> str:
    query = facts.prompts.get("query", "")
    prompt_note = (
        "f2gguf puts the model's prompt before every query by itself. llama-server and Ollama embed what they are "
        "sent: there it is the caller's duty to put it before every query, and nothing before documents:\n\n"
        f"```text\n{query}\n```"
        if query
        else "The model needs no prompt."
    )
    server_text = (query + "what is a GGUF file?").replace("\n", "\\n")
    return f"""```bash
pip install f2gguf
f2gguf embed -m {file} --query "what is a GGUF file?"
```

```python
from f2gguf.runtime import Embedder

model = Embedder("{file}")
print(model.similarity(model.encode_query("what is a GGUF file?"), model.encode_document(["a file of tensors"])))
```

LangChain:

```python
from f2gguf.runtime import Embedder
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

class F2ggufEmbeddings(Embeddings):
    def __init__(self, file: str) -> None:
        self.model = Embedder(file)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.model.encode_document(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.model.encode_query(text).tolist()

store = InMemoryVectorStore.from_texts(["a file of tensors", "a bird"], F2ggufEmbeddings("{file}"))
print(store.similarity_search("what is a GGUF file?", k=1))
```

llama-server:

```bash
llama-server -m {file} --embedding
curl http://localhost:8080/v1/embeddings -H "Content-Type: application/json" \\
  -d '{{"input": "{server_text}"}}'
```

Ollama:

```bash
ollama create {facts.name.lower()} -f Modelfile
```

{prompt_note}"""


def _properties(facts: Facts) -> list[list[str]]:
    return [
        ["Architecture", facts.architecture.name],
        ["Parameters", f"{facts.checkpoint.n_parameters:,}"],
        ["Dimensions", ", ".join(map(str, facts.dims))],
        ["Pooling", facts.pooling],
        ["Longest input", f"{facts.max_tokens:,} tokens"],
        ["Closing token", f"`{facts.vocabulary.eos_token}`"],
        ["Licence", facts.entry.license or "see the base model"],
    ]


def _provenance(facts: Facts, report: dict[str, Any]) -> list[list[str]]:
    """What the files' bytes and figures follow from."""
    source, texts, calibration = report["source"], report["texts"], report.get("calibration")
    rows = [
        ["Source", f"`{source['repo']}`" if source["repo"] else "a checkpoint folder"],
        ["Commit", f"`{source['revision']}`" if source["revision"] else "not stated"],
        ["SHA-256 of the checkpoint's files", f"`{source['sha256']}`"],
        ["SHA-256 of the evaluation texts", f"`{texts['sha256']}`"],
        ["SHA-256 of the calibration texts", f"`{calibration['sha256']}`" if calibration else "none were used"],
    ]
    return rows + [[f"Made with {name}", number] for name, number in report["made_with"].items()]
