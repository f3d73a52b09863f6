"""The shipped texts as tasks of mteb, so that files can be compared by mteb's own measures without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from f2gguf.evals.mteb.encoder import require_mteb
from f2gguf.evals.texts import EvalText, texts_sha256

if TYPE_CHECKING:
    from mteb import AbsTask, TaskMetadata


def local_tasks(texts: Sequence[EvalText]) -> list[AbsTask]:
    """Two tasks of mteb over the queries and the documents that answer them, their data loaded.

    F2ggufRetrieval: which document answers the query, nDCG@10. F2ggufPairs: does this document answer this query, with
    as many wrong pairs as right ones, average precision; both sides are encoded as mteb encodes symmetrical tasks.
    Raises `ExtraMissing` without mteb.
    """
    require_mteb()
    queries = [text for text in texts if text.relevant]
    documents = [text for text in texts if text.kind in ("document", "code", "long")]
    return [_retrieval(queries, documents), _pairs(queries, documents)]


def _retrieval(queries: Sequence[EvalText], documents: Sequence[EvalText]) -> AbsTask:
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval

    class F2ggufRetrieval(AbsTaskRetrieval):
        metadata = _metadata("F2ggufRetrieval", "Retrieval", "ndcg_at_10", [*queries, *documents])

    task = F2ggufRetrieval()
    split = {
        "queries": Dataset.from_list([{"id": text.id, "text": text.text} for text in queries]),
        "corpus": Dataset.from_list([{"id": text.id, "text": text.text} for text in documents]),
        "relevant_docs": {text.id: dict.fromkeys(text.relevant, 1) for text in queries},
        "top_ranked": None,
    }
    return _loaded(task, split)


def _pairs(queries: Sequence[EvalText], documents: Sequence[EvalText]) -> AbsTask:
    from datasets import Dataset
    from mteb.abstasks import AbsTaskPairClassification

    class F2ggufPairs(AbsTaskPairClassification):
        metadata = _metadata("F2ggufPairs", "PairClassification", "similarity_ap", [*queries, *documents])

    known = {text.id: text.text for text in documents}
    right = [known[text.relevant[0]] for text in queries]
    wrong = right[1:] + right[:1]  # the answer to the next query, mostly of the same language
    columns = {
        "sentence1": 2 * [text.text for text in queries],
        "sentence2": right + wrong,
        "labels": [1] * len(queries) + [0] * len(queries),
    }
    return _loaded(F2ggufPairs(), Dataset.from_dict(columns))


def _metadata(name: str, kind: Any, main_score: str, texts: Sequence[EvalText]) -> TaskMetadata:
    from mteb import TaskMetadata

    return TaskMetadata(
        name=name,
        description="Queries and the documents that answer them, from the evaluation texts of f2gguf",
        type=kind,
        category="t2t",
        dataset={"path": "f2gguf/evals", "revision": texts_sha256(texts)},
        eval_langs=["mul-Zyyy"],  # "multiple languages", in no one script
        main_score=main_score,
    )


def _loaded(task: AbsTask, split: Any) -> AbsTask:
    task.dataset = {"default": {"test": split}}
    task.data_loaded = True
    return task
