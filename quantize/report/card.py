"""README.md of a release, the model card: the report in Markdown, and how to run the files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from f2gguf.quantize.report.picture import can_draw
from f2gguf.quantize.report.report import Report
from f2gguf.quantize.report.sections import PICTURE, Block, Bullets, Details, Heading, Paragraph, Picture, sections
from f2gguf.quantize.report.tables import Table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def model_card(report: Report) -> str:
    """The card with the YAML front matter of the Hugging Face Hub."""
    parts = [
        f"---\n{_front_matter(report)}\n---",
        f"# {report.model}, GGUF",
        _introduction(report),
        *_markdown(block for block in sections(report) if can_draw(report) or not isinstance(block, Picture)),
        "Everything measured is in `report.html` too, and for programs in `drift.json`.",
        "## How to run it",
        _usage(report),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(report: Report) -> str:
    from huggingface_hub import ModelCardData

    source = report.source
    data = ModelCardData(
        model_name=report.model,
        language=list(source.languages) or None,
        license=source.license,
        base_model=source.repo,
        base_model_relation="quantized" if source.repo else None,
        library_name="gguf",
        pipeline_tag="sentence-similarity",
        tags=["gguf", "llama.cpp", "f2gguf", "sentence-transformers", "feature-extraction"],
        eval_results=list(_eval_results(report)),
    )
    return str(data.to_yaml())


def _eval_results(report: Report) -> Iterator[EvalResult]:
    """The model-index: each variant's figures. Source: https://github.com/huggingface/hub-docs, modelcard.md"""
    from huggingface_hub import EvalResult

    for name, verdict in report.variants.items():
        metrics = {
            "mean_drift": (f"mean of 1 - cosine to the {report.base} file's vector", verdict.mean),
            "mean_drift_upper": ("upper end of its 95% interval", verdict.upper),
        }
        if verdict.ndcg10 is not None:
            metrics["ndcg_at_10"] = (f"nDCG@10; {report.base} has {verdict.ndcg10_reference:.3f}", verdict.ndcg10)
        for kind, (words, value) in metrics.items():
            yield EvalResult(
                task_type="sentence-similarity",
                dataset_type="f2gguf-texts",
                dataset_name=f"f2gguf evaluation texts ({verdict.n})",
                dataset_config=name,
                metric_type=kind,
                metric_name=f"{name}: {words}",
                metric_value=value,
            )


def _introduction(report: Report) -> str:
    source = report.source
    where = (
        f"[{source.repo}](https://huggingface.co/{source.repo})" if source.repo else f"the checkpoint {report.model}"
    )
    at = f" at revision `{source.revision}`" if source.revision else ""
    return (
        f"GGUF files of {where}{at} for llama.cpp, each measured: how far its vectors are from the full-precision "
        "model's. The figures stand in the files' own headers too (`f2gguf inspect FILE`)."
    )


def _markdown(blocks: Iterable[Block]) -> Iterator[str]:
    for block in blocks:
        match block:
            case Heading(text):
                yield f"## {text}"
            case Paragraph(text, is_warning):
                yield f"**{text}**" if is_warning else text
            case Picture():
                yield f"![{PICTURE}](drift.png)"
            case Table(caption, header, rows):
                yield f"{caption}:"
                lines = [header, ["---"] * len(header), *rows]
                yield "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
            case Bullets(title, lines):
                yield "\n".join([f"{title}:\n"] * bool(title) + [f"- {line}" for line in lines])
            case Details(summary, inner):
                yield "\n\n".join([f"<details><summary>{summary}</summary>", *_markdown(inner), "</details>"])


def _cell(text: str) -> str:
    """Text of a user's own, such as a row's id, in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _usage(report: Report) -> str:
    file = report.files[report.recommended].file
    query, document = (report.source.prompts.get(kind, "") for kind in ("query", "document"))
    prompt_note = "The model needs no prompt."
    if query or document:
        notes = [
            f"this before every {kind}:\n\n```text\n{prompt}\n```" if prompt else f"nothing before a {kind}."
            for kind, prompt in (("query", query), ("document", document))
        ]
        prompt_note = (
            "f2gguf puts the model's prompts before texts by itself. llama-server and Ollama embed what they are sent: "
            "there the caller must put " + "\n\nAnd ".join(notes)
        )
    body = shlex.quote(json.dumps({"input": f"{query}what is a GGUF file?"}))
    return f"""```bash
pip install f2gguf
f2gguf embed -m {file} --query "what is a GGUF file?"
```

```python
from f2gguf import Embedder

model = Embedder("{file}")
print(model.similarity(model.encode_query("what is a GGUF file?"), model.encode_document(["a file of tensors"])))
```

LangChain:

```python
from f2gguf import Embedder
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
  -d {body}
```

Ollama:

```bash
ollama create {report.model.lower()} -f Modelfile
```

{prompt_note}"""
