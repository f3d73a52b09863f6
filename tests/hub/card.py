"""What the Hub's `validate-yaml` says about a model card's front matter: errors refuse a push, warnings do not.

Sources: https://huggingface.co/docs/hub/model-cards, /repositories-licenses and hub-docs' modelcard.md; the wording is
the Hub's where a public error report quotes it.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


def _words(text: str) -> set[str]:
    return set(text.split())


LICENSES = _words(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
    zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other"""
)
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
PIPELINE_TAGS = _words(
    """feature-extraction sentence-similarity text-classification token-classification text-ranking fill-mask
    text-generation text2text-generation summarization translation question-answering zero-shot-classification
    image-feature-extraction image-classification image-to-text image-text-to-text visual-document-retrieval
    automatic-speech-recognition audio-classification text-to-image any-to-any other"""
)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


def check_card(content: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings for a README.md."""
    try:
        card = front_matter(content)
    except yaml.YAMLError as error:
        return [f"Invalid YAML in README.md: {' '.join(str(error).split())}"], []
    if not isinstance(card, dict) or not card:
        return [], ["empty or missing yaml metadata in repo card"]
    warnings = (
        []
        if card.get("pipeline_tag", "other") in PIPELINE_TAGS
        else ['"pipeline_tag" is not in the official list: https://huggingface.co/tasks']
    )
    return [*_one_of(card), *_languages(card), *_repositories(card), *_strings(card), *_model_index(card)], warnings


def front_matter(content: str) -> Any:
    """What stands between the first two lines of three dashes; None where there are none."""
    match = _FRONT_MATTER.match(content)
    return yaml.load(match[1], _Loader) if match else None


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, which the Hub's parser does and PyYAML does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(map(str, names))) < len(names):
            raise yaml.YAMLError("duplicated mapping key")
        return super().construct_mapping(node, deep)


def _one_of(card: dict[str, Any]) -> list[str]:
    return [
        f'"{key}" must be one of [{", ".join(sorted(allowed))}]'
        for key, allowed in (("license", LICENSES), ("base_model_relation", RELATIONS))
        for value in _listed(card.get(key))
        if value not in allowed
    ]


def _languages(card: dict[str, Any]) -> list[str]:
    """`no` (Norwegian) unquoted is False in YAML: a well-known way to get this error."""
    return [
        f'"language[{i}]" with value "{value}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code (two/three '
        'letters), or a special value like "code", "multilingual".'
        for i, value in enumerate(_listed(card.get("language")))
        if not (isinstance(value, str) and _LANGUAGE.fullmatch(value))
    ]


def _repositories(card: dict[str, Any]) -> list[str]:
    return [
        f'"{key}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
        for key, kind in (("base_model", "model"), ("datasets", "dataset"))
        for value in _listed(card.get(key))
        if not (isinstance(value, str) and _REPO_ID.fullmatch(value))
    ]


def _strings(card: dict[str, Any]) -> list[str]:
    single = [
        f'"{key}" must be a string' for key in ("library_name", "pipeline_tag") if not _is_string(card.get(key, ""))
    ]
    tags = card.get("tags", [])
    if not isinstance(tags, list):
        return [*single, '"tags" must be an array']
    return single + [f'"tags[{i}]" must be a string' for i, tag in enumerate(tags) if not _is_string(tag)]


def _model_index(card: dict[str, Any]) -> list[str]:
    """Every result names its task, dataset and metrics, or the Hub refuses the card.

    Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    errors = []
    for i, model in enumerate(_listed(card.get("model-index"))):
        model = model if isinstance(model, dict) else {}
        errors += [f'"model-index[{i}].{key}" is required' for key in ("name", "results") if not model.get(key)]
        for j, result in enumerate(model.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            for path in ("task.type", "dataset.name", "dataset.type", "metrics"):
                first, _, second = path.partition(".")
                value = result.get(first) or {}
                if not (value.get(second) if second else value):
                    errors.append(f'"{where}.{path}" is required')
            for k, metric in enumerate(result.get("metrics") or []):
                errors += [
                    f'"{where}.metrics[{k}].{key}" is required' for key in ("type", "value") if metric.get(key) is None
                ]
    return errors


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _is_string(value: Any) -> bool:
    return isinstance(value, str)
