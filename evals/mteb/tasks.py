"""The evaluation texts as tasks of mteb, which compare files by mteb's own measures without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from f2gguf.evals.mteb.encoder import require_mteb
from f2gguf.evals.texts import ANSWER_KINDS, EvalText, texts_sha256

if TYPE_CHECKING:
    from mteb import AbsTask, TaskMetadata


def local_tasks(texts: Sequence[EvalText]) -> list[AbsTask]:
    """Two tasks of mteb over the queries and the documents that answer them, with their data.

    F2ggufRetrieval asks which document answers a query: nDCG@10. F2ggufPairs asks whether a document answers a query,
    with as many wrong pairs as right ones: average precision. mteb encodes both sides of a pair in the same way.
    Raises `ExtraMissing` without mteb.
    """
    require_mteb()
    from datasets import Dataset
    from mteb.abstasks import AbsTaskPairClassification, AbsTaskRetrieval

    queries = [text for text in texts if text.relevant]
    documents = {text.id: text.text for text in texts if text.kind in ANSWER_KINDS}
    right = [documents[text.relevant[0]] for text in queries]
    retrieval = {
        "queries": Dataset.from_list([{"id": text.id, "text": text.text} for text in queries]),
        "corpus": Dataset.from_list([{"id": name, "text": text} for name, text in documents.items()]),
        "relevant_docs": {text.id: dict.fromkeys(text.relevant, 1) for text in queries},
        "top_ranked": None,
    }
    pairs = {
        "sentence1": 2 * [text.text for text in queries],
        "sentence2": right + right[1:] + right[:1],  # wrong: the answer to the next query, mostly of the same language
        "labels": [1] * len(queries) + [0] * len(queries),
    }
    revision = texts_sha256([*queries, *(text for text in texts if text.kind in ANSWER_KINDS)])

    class F2ggufRetrieval(AbsTaskRetrieval):
        metadata = _metadata("F2ggufRetrieval", "Retrieval", "ndcg_at_10", revision)

    class F2ggufPairs(AbsTaskPairClassification):
        metadata = _metadata("F2ggufPairs", "PairClassification", "similarity_ap", revision)

    tasks: list[AbsTask] = [F2ggufRetrieval(), F2ggufPairs()]
    for task, split in zip(tasks, (retrieval, Dataset.from_dict(pairs)), strict=True):
        task.dataset, task.data_loaded = {"default": {"test": split}}, True
    return tasks


def _metadata(name: str, kind: Any, main_score: str, revision: str) -> TaskMetadata:
    from mteb import TaskMetadata

    return TaskMetadata(
        name=name,
        description="Queries and the documents that answer them, from the evaluation texts of f2gguf",
        type=kind,
        category="t2t",
        dataset={"path": "f2gguf/evals", "revision": revision},
        eval_langs=["mul-Zyyy"],  # "multiple languages", in no one script
        main_score=main_score,
    )
