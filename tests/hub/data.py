"""A stand-in for the Hugging Face Hub, as data: repositories with commits, what it was asked, what goes wrong next."""

from __future__ import annotations

import codecs
import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

WRITER, READER = "hf_writer", "hf_reader"  # tokens: one may write, the other may only read
ALWAYS = 10**9
LFS_SUFFIXES = (".gguf", ".safetensors", ".png")
LFS_BYTES = 10 * 2**20  # the Hub takes no larger file into git
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class Blob:
    """A file of a commit. Where LFS keeps the content, git has a pointer to it, and `blob_id` names the pointer."""

    size: int
    blob_id: str
    content: bytes = b""
    sha256: str = ""  # of an LFS file
    pointer_bytes: int = 0


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: Mapping[str, Blob]
    parent: str = ""


@dataclass
class Upload:
    """An LFS object on its way: the Hub keeps what has come, and makes an object of it when it is whole."""

    size: int
    part_bytes: int
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass
class Repo:
    """A model repository. A test changes the attributes, and commits what others are to have done."""

    name: str
    is_private: bool = False
    is_gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content; other repositories have their own
    uploads: dict[str, Upload] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or a full sha names."""
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def commit(
        self, files: Mapping[str, bytes | Blob | None], *, title: str = "by hand", branch: str = "main", sha: str = ""
    ) -> Commit:
        """Add, replace and (None) delete files on a branch, with a sha made of all that unless one is given."""
        parent = self.find(branch)
        changes = {path: self._blob(path, file) if isinstance(file, bytes) else file for path, file in files.items()}
        kept = {path: blob for path, blob in {**(parent.files if parent else {}), **changes}.items() if blob}
        before = parent.sha if parent else ""
        names = sorted((path, blob.blob_id) for path, blob in kept.items())
        sha = sha or hashlib.sha1(repr((before, title, names, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, kept, before)
        self.branches[branch] = sha
        return self.commits[sha]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and those before it, newest first."""
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit

    def content(self, blob: Blob) -> bytes:
        return self.objects[blob.sha256] if blob.sha256 else blob.content

    def read(self, path: str, revision: str = "main") -> bytes:
        commit = self.find(revision)
        assert commit, revision
        return self.content(commit.files[path])

    def _blob(self, path: str, content: bytes) -> Blob:
        if not needs_lfs(path, content[:512], len(content)):
            return regular_blob(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return lfs_blob(sha256, len(content))


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method ("" is any) whose path holds a text.

    The connection breaks after `receive_bytes` of a request or `send_bytes` of an answer's body; `received`, `stored`
    and `sent` change a body on its way; `headers` replace what an answer states, such as a size; `status` answers in
    the Hub's place, or with `is_late` after it did what was asked. `before` runs when the request comes: it waits,
    kills the client, lets somebody else commit.
    """

    method: str
    path: str
    times: int = 1
    after: int = 0  # as many requests go well first
    before: Callable[[Hub], object] = lambda _: None
    receive_bytes: int | None = None
    received: Callable[[bytes], bytes] = lambda body: body
    stored: Callable[[bytes], bytes] = lambda body: body
    status: int = 0
    is_late: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    sent: Callable[[bytes], bytes] = lambda body: body
    send_bytes: int | None = None


NO_FAULT = Fault("", "")


@dataclass(frozen=True)
class Request:
    """A request that came, and what it was answered; status 0 where the connection broke before it was all there."""

    method: str
    path: str
    status: int
    received_bytes: int
    sent_bytes: int
    range: str = ""


class Hub:
    """Repositories, tokens, and a record of requests."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}  # old name -> new name
        self.tokens = {WRITER: "writer", READER: "reader"}  # token -> user
        self.orgs = ["org"]  # where the writer may create repositories
        self.part_bytes = 16_000_000  # larger LFS objects are uploaded in parts of this size
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.signed: set[str] = set()
        self.lock = threading.RLock()
        self.url = self.storage_url = ""
        self.stop: Callable[[], None] = lambda: None  # from then on it refuses connections

    def add(self, name: str, files: Mapping[str, bytes] = MappingProxyType({}), *, sha: str = "") -> Repo:
        """A new repository, with the first commit that the Hub itself makes."""
        repo = self.repos[name] = Repo(name)
        repo.commit({".gitattributes": GITATTRIBUTES, **files}, title="initial commit", sha=sha)
        return repo

    def sign(self, path: str) -> str:
        """A URL that gives access to a path without any token, as those of S3 do."""
        target = f"{path}?X-Amz-Signature={secrets.token_hex(8)}"
        self.signed.add(target)
        return target

    def next_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            hits = [fault for fault in self.faults if fault.method in ("", method) and fault.path in path]
            for fault in hits:
                if fault.after:
                    fault.after -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
            return NO_FAULT

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests of a method whose path holds a text."""
        return [request for request in self.requests if request.method == method and path in request.path]

    def asked_for(self, *methods: str) -> set[str]:
        """The files in requests of these methods: HEAD asks for the size, GET for the content."""
        where = ("resolve", "stored")  # /org/name/resolve/{revision}/{path}, /org/name/stored/{sha256}/{path}
        asked = [request.path.split("/", 5) for request in self.requests if request.method in methods]
        return {parts[5] for parts in asked if len(parts) == 6 and parts[3] in where}


def regular_blob(content: bytes) -> Blob:
    return Blob(len(content), _git_sha(content), content)


def lfs_blob(sha256: str, size: int) -> Blob:
    """Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md"""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Blob(size, _git_sha(pointer), sha256=sha256, pointer_bytes=len(pointer))


def needs_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub refuses to take a file into git; `sample` is its first 512 bytes."""
    if size == 0:
        return False  # S3 stores no empty object
    return path.endswith(LFS_SUFFIXES) or size >= LFS_BYTES or not _is_text(sample)


def flip_bit(content: bytes) -> bytes:
    """The same bytes but for one bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _is_text(sample: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # which lets the last character be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in sample


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()  # as git names a file
