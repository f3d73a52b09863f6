"""What the Hub and its storage answer to those who read: facts on a repository, its files, its history."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from hub.call import Answer, Call, Refused, find_commit, json_answer
from hub.card import front_matter
from hub.data import Blob, Commit, Repo

DATE = "2026-01-01T00:00:00.000Z"  # of everything


def info(call: Call, repo: Repo, revision: str) -> Answer:
    commit = find_commit(repo, revision)
    card = _card(commit)
    siblings = [_sibling(path, blob, has_details="blobs" in call.query) for path, blob in sorted(commit.files.items())]
    facts: dict[str, Any] = {"id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0]}
    facts |= {"sha": commit.sha, "createdAt": DATE, "lastModified": DATE, "siblings": siblings}
    facts |= {"private": repo.is_private, "gated": "manual" if repo.is_gated else False, "disabled": False}
    return json_answer(facts | {"cardData": card, "tags": _tags(card)})


def tree(_: Call, repo: Repo, revision: str) -> Answer:
    """Every file, as the client asks for them: recursively. The Hub names folders too, and sends pages."""
    commit = find_commit(repo, revision)
    return json_answer([_entry(path, blob) for path, blob in sorted(commit.files.items())])


def refs(_: Call, repo: Repo) -> Answer:
    kinds = (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
    listed = {
        key: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]
        for key, kind, names in kinds
    }
    return json_answer({"converts": [], "pullRequests": [], **listed})


def auth_check(_: Call, repo: Repo) -> Answer:
    return json_answer({"repo": repo.name})


def resolve(call: Call, repo: Repo, revision: str, path: str) -> Answer:
    """A file of git itself, or a redirect to the storage that says what the client will find there."""
    commit = find_commit(repo, revision)
    stated = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    blob = commit.files.get(path)
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound", **stated)
    if not blob.sha256:
        return _ranged(call, blob.content, {**stated, "ETag": f'"{blob.blob_id}"'})
    location = call.hub.storage_url + call.hub.sign(f"/{repo.name}/stored/{blob.sha256}/{quote(path)}")
    linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "Location": location}
    return Answer(f"Found. Redirecting to {location}".encode(), 302, {**stated, **linked})


def stored(call: Call, repo: Repo, oid: str, path: str) -> Answer:
    return _ranged(call, repo.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _ranged(call: Call, content: bytes, headers: Mapping[str, str]) -> Answer:
    """Source: https://www.rfc-editor.org/rfc/rfc9110#name-range"""
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if not wanted or not any(wanted.groups()):
        return Answer(content, headers=headers)
    first, last = wanted.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= end:
        raise Refused(416, "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
    return Answer(content[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})


def _card(commit: Commit) -> dict[str, Any]:
    readme = commit.files.get("README.md")
    with contextlib.suppress(Exception):  # a card that somebody broke is none
        card = front_matter(readme.content.decode()) if readme else None
        return card if isinstance(card, dict) else {}
    return {}


def _tags(card: dict[str, Any]) -> list[str]:
    """Those of the card, and those that the Hub makes of its other lines."""
    sources = card.get("base_model") or []
    sources = sources if isinstance(sources, list) else [sources]
    relation = card.get("base_model_relation")
    made = [f"license:{card['license']}"] if "license" in card else []
    made += [f"base_model:{source}" for source in sources]
    made += [f"base_model:{relation}:{source}" for source in sources if relation]
    return [*(card.get("tags") or []), *made]


def _sibling(path: str, blob: Blob, *, has_details: bool) -> dict[str, Any]:
    if not has_details:
        return {"rfilename": path}
    lfs = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_bytes}
    details = {"rfilename": path, "size": blob.size, "blobId": blob.blob_id}
    return {**details, "lfs": lfs} if blob.sha256 else details


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    file = {"type": "file", "oid": blob.blob_id, "size": blob.size, "path": path}
    lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_bytes}
    return {**file, "lfs": lfs} if blob.sha256 else file
