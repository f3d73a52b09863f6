"""What goes beside the .gguf files: the model card, Ollama's Modelfile, the checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from f2gguf.evals.report import COLUMNS, conversion_sentence, drift_rows, markdown_table, over_lines
from f2gguf.quantize.facts import Facts
from f2gguf.runtime.files import format_bound, sha256_file, write_text

_PREFERRED = ("Q4_K_M", "Q8_0", "Q4_0", "F16")


def write_release(facts: Facts, folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write README.md, Modelfile and SHA256SUMS beside the files of `report`; gives their paths."""
    card, modelfile, sums = (folder / name for name in ("README.md", "Modelfile", "SHA256SUMS"))
    write_text(card, model_card(facts, report))
    write_text(modelfile, ollama_modelfile(facts, report))
    files = [*report["files"].values(), *([report["imatrix"]] if "imatrix" in report else [])]
    hashes = {file["file"]: file["sha256"] for file in files}
    hashes |= {path.name: sha256_file(path) for path in (folder / "drift.json", card, modelfile)}
    write_text(sums, "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items())))
    return [card, modelfile, sums]


def recommended(report: dict[str, Any]) -> str:
    """The smallest usual file that holds the bound; F16 where none does."""
    holding = {name for name, verdict in report["variants"].items() if verdict["holds"]} | {"F16"}
    return next(name for name in _PREFERRED if name in holding and name in report["files"])


def ollama_modelfile(facts: Facts, report: dict[str, Any]) -> str:
    file = report["files"][recommended(report)]["file"]
    return f"FROM ./{file}\nPARAMETER num_ctx {facts.max_tokens}\n"


def model_card(facts: Facts, report: dict[str, Any]) -> str:
    """README.md with the YAML front matter of the Hugging Face Hub."""
    file = report["files"][recommended(report)]["file"]
    sections = [
        f"---\n{_front_matter(facts)}\n---",
        f"# {facts.name}, GGUF",
        _introduction(facts),
        "## Files",
        markdown_table(COLUMNS, drift_rows(report)),
        _measurement(report),
        "\n".join(f"**{line}.**" for line in over_lines(report)),
        "## SHA-256",
        markdown_table(("file", "sha256"), [[f["file"], f"`{f['sha256']}`"] for f in report["files"].values()]),
        "## How to run it",
        _usage(facts, file),
        "## The model",
        markdown_table(("", ""), _properties(facts)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    entry = facts.entry
    data = ModelCardData(
        language=list(entry.languages) or None,
        license=entry.license,
        base_model=entry.repo,
        base_model_relation="quantized" if entry.repo else None,
        library_name="gguf",
        pipeline_tag="sentence-similarity",
        tags=["gguf", "llama.cpp", "f2gguf", "sentence-transformers", "feature-extraction"],
    )
    return str(data.to_yaml())


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
        f"{format_bound(report['max_drift'])}. Conversion: {sentence}.{stock} Everything measured is in `drift.json`."
    )


def _usage(facts: Facts, file: str) -> str:
    query = facts.prompts.get("query", "")
    prompt_note = (
        f"Put the prompt before every query (f2gguf does it by itself), none before documents:\n\n```text\n{query}\n```"
        if query
        else "The model needs no prompt."
    )
    server_text = (query + "what is a GGUF file?").replace("\n", "\\n")
    return f"""```bash
pip install f2gguf
f2gguf embed -m {file} --query "what is a GGUF file?"
```

```bash
llama-server -m {file} --embedding
curl http://localhost:8080/v1/embeddings -H "Content-Type: application/json" \\
  -d '{{"input": "{server_text}"}}'
```

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
