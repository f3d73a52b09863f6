"""What the doctor's checks look at, and what they find."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from f2gguf.runtime.gguf.header import KEY_ADD_EOS, KEY_VERSION, Header
from f2gguf.runtime.gguf.vocabulary import Vocabulary

AGAIN = "Download or make it again."
# What llama.cpp does where a header does not say (src/llama-vocab.cpp, `llama_vocab::impl::load`): whether it adds BOS
# and EOS, and the ids it takes. WordPiece has [CLS] and [SEP] around every text, whatever the header says.
_DEFAULTS: dict[str, tuple[bool, bool, dict[str, int]]] = {
    "llama": (True, False, {"bos": 1, "eos": 2, "unknown": 0}),
    "bert": (True, True, {"bos": 101, "seperator": 102, "unknown": 100}),
    "gpt2": (False, False, {"bos": 11, "eos": 11}),
    "t5": (False, True, {"eos": 1, "unknown": 2}),
}
_PRE_WITH_BOS: tuple[str, ...] = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0")
_PRE_WITH_BOS += ("lfm2", "tekken", "jina-v5-nano", "chameleon")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a file or may be: what, why it matters, and what mends it."""

    severity: str  # 'error': it cannot be used; 'warning': its vectors may be wrong; 'note'
    check: str
    what: str
    why: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}. {self.why[0].upper()}{self.why[1:]}. {self.mend}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """A file as it will be used: its header, the pooling, and the vocabulary that llama.cpp will make of it."""

    header: Header
    pooling: str | None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.header)

    @property
    def values(self) -> dict[str, Any]:
        return self.header.values

    @property
    def architecture(self) -> str:
        return self.header.architecture

    @property
    def tokenizer(self) -> str:
        return str(self.values.get("tokenizer.ggml.model", ""))

    @property
    def pre(self) -> str:
        return str(self.values.get("tokenizer.ggml.pre", ""))

    @property
    def is_own(self) -> bool:
        """Whether f2gguf made the file."""
        return KEY_VERSION in self.values

    @property
    def opens(self) -> bool:
        """Whether every text begins with a special token."""
        default = _DEFAULTS.get(self.tokenizer, (False,))[0] or self.pre in _PRE_WITH_BOS
        return self.tokenizer == "bert" or bool(self.values.get("tokenizer.ggml.add_bos_token", default))

    @property
    def closes(self) -> bool:
        """Whether every text ends with a special token."""
        default = _DEFAULTS.get(self.tokenizer, (False, False))[1]
        return self.tokenizer == "bert" or bool(self.values.get(KEY_ADD_EOS, default))

    @property
    def closing_role(self) -> str:
        return "seperator" if self.tokenizer == "bert" else "eos"  # so it is spelled in GGUF

    def id_of(self, role: str) -> object:
        """The id of a special token, such as 'eos'; None where neither the header nor llama.cpp has one."""
        default = _DEFAULTS.get(self.tokenizer, (False, False, {}))[2].get(role)
        return self.values.get(f"tokenizer.ggml.{role}_token_id", default)

    def named(self, role: str) -> str:
        """A special token for people: "'</s>' (eos_token_id 2)"."""
        token_id = self.id_of(role)
        return f"{self.vocabulary.text(token_id)!r} ({role}_token_id {token_id})"

    def of_architecture(self, key: str, default: Any) -> Any:
        return self.values.get(f"{self.architecture}.{key}", default)

    def count(self, key: str) -> int | None:
        """A whole number that the header states of its architecture, if it does."""
        return value if type(value := self.of_architecture(key, None)) is int else None

    def mended(self, flags: str) -> str:
        """The command that writes a mended copy."""
        return f"`f2gguf repair-header {shlex.quote(str(self.header.path))} -o NEW.gguf {flags}`"


Check = Callable[[Case], Iterator[Finding]]
