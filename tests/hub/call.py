"""A request to the Hub, its answer, and who may ask for what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub.data import Commit, Fault, Hub, Repo

# What a request needs: nothing, a URL that the Hub signed, or a right on the repository: to see it, its files, to write
OPEN, SIGNED, READ, FILES, WRITE = "open", "signed", "read", "files", "write"


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A request as its route sees it."""

    hub: Hub
    target: str  # path and query
    headers: Message  # whose names have no case
    body: bytes
    fault: Fault
    user: str = ""

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query).items()}

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refused(400, "Invalid JSON in the request") from None


class Refused(Exception):
    """The answer is an error; `code` is what the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        line = " ".join(message.split()).encode("ascii", "replace").decode()
        stated = {"X-Error-Message": line} | ({"X-Error-Code": code} if code else {})
        self.answer = json_answer({"error": message}, status, **stated, **headers)


def json_answer(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


def find_user(call: Call) -> str:
    """A wrong token is refused even where none is needed."""
    header = call.headers.get("Authorization", "")
    if header and header.removeprefix("Bearer ") not in call.hub.tokens:
        raise Refused(401, "Invalid credentials in Authorization header")
    return call.hub.tokens[header.removeprefix("Bearer ")] if header else ""


def require_signature(call: Call) -> None:
    if "Authorization" in call.headers:  # S3 refuses it, and it would give the token away
        raise Refused(400, "Only one auth mechanism allowed")
    if call.target not in call.hub.signed:
        raise Refused(403, "AccessDenied")


def require_writer(call: Call) -> None:
    if not call.user:
        raise Refused(401, "Invalid username or password.")
    if call.user != "writer":
        raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")


def find_repo(call: Call, name: str, right: str) -> Repo:
    """The repository, where the user has the right; one that is hidden from somebody is to them as if it were not."""
    if name in call.hub.renamed:
        raise Refused(307, "Moved", Location=call.target.replace(name, call.hub.renamed[name], 1))
    repo = call.hub.repos.get(name)
    if not call.user and (repo is None or repo.is_private):
        raise Refused(401, "Invalid username or password.", "RepoNotFound")
    if repo is None:
        raise Refused(404, "Repository not found", "RepoNotFound")
    if right == WRITE:
        require_writer(call)
    if right == FILES and repo.is_gated and call.user != "writer":
        why = "you are not in the authorized list" if call.user else "you must be authenticated to access it"
        raise Refused(403 if call.user else 401, f"Access to model {name} is restricted and {why}.", "GatedRepo")
    return repo


def find_commit(repo: Repo, revision: str) -> Commit:
    commit = repo.find(revision)
    if commit is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit
