"""What the Hub and its storage do for those who write: repositories, uploads, commits and tags.

An upload is three things: `preupload` says which files LFS takes, the LFS batch names a URL for each object that is
missing, and the commit names the files. Nothing is believed: what came must have the size and the hash announced.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from hub.call import Answer, Call, Refused, find_commit, json_answer
from hub.card import check_card
from hub.data import Blob, Repo, Upload, lfs_blob, needs_lfs, regular_blob


def validate_yaml(call: Call) -> Answer:
    errors, warnings = check_card(call.json()["content"])
    if "text/plain" in call.headers.get("Accept", ""):  # RepoCard.validate
        return Answer("\n".join(f"- Error: {error}" for error in errors).encode(), 400 if errors else 200)
    found = {"errors": [{"message": error} for error in errors], "warnings": [{"message": text} for text in warnings]}
    return json_answer(found, 400 if errors else 200)


def create_repo(call: Call) -> Answer:
    asked = call.json()
    owner = asked.get("organization") or call.user
    name = f"{owner}/{asked['name']}"
    if asked.get("type", "model") != "model":
        raise Refused(400, "This stand-in has models only")
    if owner not in (call.user, *call.hub.orgs):
        raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    url = f"{call.hub.url}/{name}"
    if name in call.hub.repos:  # the client reads the URL of the error too
        return json_answer({"error": "You already created this model repo", "url": url}, 409)
    call.hub.add(name).is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
    return json_answer({"url": url, "name": name, "id": name})


def preupload(call: Call, repo: Repo, revision: str) -> Answer:
    commit = find_commit(repo, revision)
    files = []
    for file in call.json()["files"]:
        path, old = file["path"], commit.files.get(file["path"])
        mode = "lfs" if needs_lfs(path, base64.b64decode(file["sample"]), file["size"]) else "regular"
        known = {"oid": old.sha256 or old.blob_id} if old else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return json_answer({"files": files, "commitOid": commit.sha})


def lfs_batch(call: Call, repo: Repo) -> Answer:
    """How to upload the objects that the repository does not hold yet."""
    asked = call.json()
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise Refused(422, "Only uploads, and only sha256")
    is_split = any(o["size"] > call.hub.part_bytes for o in asked["objects"]) and "multipart" in asked["transfers"]
    objects = [_lfs_actions(call, repo, o["oid"], o["size"], is_split=is_split) for o in asked["objects"]]
    return json_answer({"transfer": "multipart" if is_split else "basic", "objects": objects})


def _lfs_actions(call: Call, repo: Repo, oid: str, size: int, *, is_split: bool) -> dict[str, Any]:
    if not re.fullmatch(r"[0-9a-f]{64}", oid) or not size:
        return {"oid": oid, "size": size, "error": {"code": 422, "message": "Invalid object"}}
    if oid in repo.objects:
        return {"oid": oid, "size": size}
    hub = call.hub
    is_split = is_split and size > hub.part_bytes
    upload = repo.uploads[oid] = Upload(size, hub.part_bytes if is_split else size)
    count = -(-size // upload.part_bytes)
    parts = [hub.storage_url + hub.sign(f"/{repo.name}/upload/{oid}/{number}") for number in range(1, count + 1)]
    action: dict[str, Any] = {"href": parts[0]}
    if is_split:
        header = {"chunk_size": str(upload.part_bytes), **{f"{i:05}": url for i, url in enumerate(parts, start=1)}}
        action = {"href": hub.url + hub.sign(f"/api/complete_multipart/{repo.name}/{oid}"), "header": header}
    verify = {"href": f"{hub.url}/{repo.name}.git/info/lfs/objects/verify"}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": action, "verify": verify}}


def put_part(call: Call, repo: Repo, oid: str, number: str) -> Answer:
    upload = repo.uploads[oid]
    start = (int(number) - 1) * upload.part_bytes
    if len(call.body) != min(upload.part_bytes, upload.size - start):
        raise Refused(400, f"IncompleteBody: part {number} of {oid} has {len(call.body)} bytes")
    upload.parts[int(number)] = call.body
    if upload.part_bytes == upload.size:
        _keep(call, repo, oid)
    return Answer(headers={"ETag": _part_etag(call.body)})


def complete_multipart(call: Call, repo: Repo, oid: str) -> Answer:
    """The request carries no token, but a signed URL and the ETag of every part."""
    stated = [(part["partNumber"], part["etag"]) for part in call.json()["parts"]]
    if stated != [(number, _part_etag(part)) for number, part in sorted(repo.uploads[oid].parts.items())]:
        raise Refused(400, "InvalidPart: the parts are not those that were uploaded")
    _keep(call, repo, oid)
    return json_answer({"success": True})


def _keep(call: Call, repo: Repo, oid: str) -> None:
    """Make an object of an upload, if it is the one that was announced."""
    content = b"".join(part for _, part in sorted(repo.uploads[oid].parts.items()))
    if len(content) != repo.uploads[oid].size or hashlib.sha256(content).hexdigest() != oid:
        raise Refused(400, f"BadDigest: what was uploaded is not the object {oid} of {repo.uploads[oid].size} bytes")
    repo.objects[oid] = call.fault.stored(content)


def lfs_verify(call: Call, repo: Repo) -> Answer:
    asked = call.json()
    if asked["oid"] not in repo.objects:
        raise Refused(404, f"Object {asked['oid']} does not exist")
    if len(repo.objects[asked["oid"]]) != asked["size"]:
        raise Refused(422, f"Object {asked['oid']} has another size")
    return json_answer({})


def commit(call: Call, repo: Repo, revision: str) -> Answer:
    """One JSON line with the message, then one for each file; all of it is done or nothing."""
    head = find_commit(repo, revision)
    if revision not in repo.branches or "create_pr" in call.query:
        raise Refused(400, "This stand-in commits to branches only")
    header, *operations = [json.loads(line) for line in call.body.splitlines()] or [{}]
    if header.get("key") != "header" or not header["value"].get("summary"):
        raise Refused(400, "The commit has no summary")
    if header["value"].get("parentCommit", head.sha) != head.sha:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files: dict[str, Blob] = {}
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        if kind not in OPERATIONS:
            raise Refused(400, f"Unknown operation {kind}")
        files |= OPERATIONS[kind](repo, value)
    made = repo.commit(files, title=header["value"]["summary"], branch=revision)
    url = f"{call.hub.url}/{repo.name}/commit/{made.sha}"
    return json_answer({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})


def _add_file(_: Repo, value: dict[str, Any]) -> dict[str, Blob]:
    content = base64.b64decode(value["content"], validate=True)
    if value.get("encoding") != "base64" or needs_lfs(value["path"], content[:512], len(content)):
        raise Refused(400, f"Your push was rejected because it contains binary files. Offending files: {value['path']}")
    errors, _warnings = check_card(content.decode()) if value["path"] == "README.md" else ([], [])
    if errors:
        raise Refused(400, f"Your push was rejected during YAML metadata verification: {'; '.join(errors)}")
    return {value["path"]: regular_blob(content)}


def _add_lfs_file(repo: Repo, value: dict[str, Any]) -> dict[str, Blob]:
    held = repo.objects.get(value["oid"])
    if held is None or value.get("size", len(held)) != len(held) or value["algo"] != "sha256":
        raise Refused(
            400,
            "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
            f"Offending file: - {value['path']}",
        )
    return {value["path"]: lfs_blob(value["oid"], len(held))}


OPERATIONS = {"file": _add_file, "lfsFile": _add_lfs_file}


def add_tag(call: Call, repo: Repo, revision: str) -> Answer:
    name, commit = call.json()["tag"], find_commit(repo, revision)
    if name in repo.tags:
        raise Refused(409, "Reference already exists")
    repo.tags[name] = commit.sha
    return json_answer({})


def _part_etag(part: bytes) -> str:
    return f'"{hashlib.md5(part).hexdigest()}"'  # as S3 makes them
