"""Token ids are those of sentence-transformers, whatever the checkpoint's files state, and no text ends a process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MINILM, NANO, edit_json, fill, write_tiny_bert
from conftest import facts_of
from dialects import as_spm
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.json_files import read_json
from f2gguf.quantize.checkpoint.modules import Modules, Prompts
from f2gguf.quantize.checkpoint.tokenizer_files import build_tokenizer
from f2gguf.quantize.checkpoint.vocabulary import NO_EOS, read_vocabulary
from f2gguf.quantize.convert.readback import read_back
from f2gguf.quantize.convert.reserved import fill_in
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import (
    BrokenCheckpoint,
    CheckpointError,
    ConversionMismatch,
    Disagreement,
    GGUFError,
    NotGGUF,
    TextError,
    UnsupportedCheckpoint,
)
from f2gguf.runtime.gguf.header import KEY_TOKENIZER, read_header
from f2gguf.runtime.gguf.pretokenizers import FLAT, recursive
from f2gguf.runtime.llama.model import Model
from f2gguf.runtime.llama.tokenizer import open_tokenizer
from others import write_other
from unigram import write_tiny_xlmr

Edit = Callable[[Path], object]
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fuzz-tokenizers"
MAP = "special_tokens_map.json"  # it goes before tokenizer_config.json, where that lists no added tokens
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def settings(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def spec(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return edit


def write(name: str, content: object) -> Edit:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def without(name: str, then: Edit = lambda folder: None) -> Edit:
    return lambda folder: ((folder / name).unlink(), then(folder))


def token(content: str, **flags: Any) -> dict[str, Any]:
    defaults = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"content": content, **defaults, "normalized": True, **flags}


def saved(content: str, **flags: Any) -> dict[str, Any]:
    """A token as transformers saves an `AddedToken` in tokenizer_config.json."""
    return {"__type": "AddedToken", **token(content, **flags)}


def add(*tokens: dict[str, Any]) -> Edit:
    return spec(lambda content: content["added_tokens"].extend({"id": 90000 + i, **t} for i, t in enumerate(tokens)))


MASK = token("[MASK]", lstrip=True, normalized=False)
# What files may state -> how they are changed. Each is tried on the tokenizers of BERT, Qwen2 and XLM-R.
STATED: dict[str, Edit] = {
    "nothing else": lambda folder: None,
    "cased": settings(do_lower_case=False),
    "case left open": settings(do_lower_case=...),
    "accents stripped though cased": settings(do_lower_case=False, strip_accents=True),
    "accents kept": settings(strip_accents=False),
    "Chinese left alone": settings(tokenize_chinese_chars=False),
    "another normaliser in tokenizer.json": spec(lambda s: s.update(normalizer={"type": "NFKC"})),
    "no normaliser": spec(lambda s: s.update(normalizer=None)),
    "another split in tokenizer.json": spec(lambda s: s.update(pre_tokenizer={"type": "Whitespace"})),
    "other options of the model": spec(lambda s: s["model"].update(max_input_chars_per_word=5, ignore_merges=True)),
    "a plain class": settings(tokenizer_class="PreTrainedTokenizerFast"),
    "no class": settings(tokenizer_class=...),
    "a class in config.json": lambda folder: (
        edit_json(folder / "tokenizer_config.json", tokenizer_class=...),
        edit_json(folder / "config.json", tokenizer_class="TokenizersBackend"),
    ),
    "no settings": without("tokenizer_config.json"),
    "older files": without(
        "tokenizer_config.json",
        write("special_tokens_map.json", {"mask_token": MASK, "additional_special_tokens": ["<a>", "<b>"]}),
    ),
    "older files besides": write("special_tokens_map.json", {"mask_token": MASK, "extra_special_tokens": ["<a>"]}),
    "added_tokens.json": write("added_tokens.json", {"foo": 90000, "bar baz": 90001}),
    "added words": add(token("kubernetes"), token("GPT-4"), token("New York")),
    "added words with flags": add(
        token("kubernetes", lstrip=True), token("GPT-4", rstrip=True), token("New York", single_word=True)
    ),
    "added words of the vocabulary": add(token("paris"), token("the"), token("Ġthe")),
    "fewer tokens in the settings": settings(added_tokens_decoder={"0": token("[PAD]", special=True)}),
    "more tokens in the settings": settings(added_tokens_decoder={"90000": token("zzz"), "90001": token("<|q|>")}),
    "other flags in the settings": settings(added_tokens_decoder={"103": MASK, "101": token("[CLS]")}),
    "no tokens in the settings": settings(added_tokens_decoder={}),
    "other tokens around a text": settings(cls_token="the", sep_token="of"),
    "a new token before a text": settings(cls_token="<my>"),
    "another unknown token": settings(unk_token="the"),
    "another EOS": settings(eos_token="<new>"),
    "an EOS with flags": settings(eos_token=saved("<|im_end|>", rstrip=True)),
    "a mask with flags": settings(mask_token=saved("<mask>", lstrip=True)),
    "nulls": settings(pad_token=None, mask_token=None, eos_token=None, bos_token=None),
    "extra tokens": settings(extra_special_tokens=["<a>", "<b>"]),
    "additional tokens": settings(additional_special_tokens=[saved("<a>", lstrip=True), "<b>"]),
    "named extra tokens": settings(extra_special_tokens={"image_token": "<img>", "other": "<foo>"}),
    "tokens of a class": settings(image_token="<img>", audio_token=saved("<aud>", lstrip=True)),
    "special tokens split": settings(split_special_tokens=True),
    "ignored flags": settings(add_bos_token=True, add_eos_token=True, bos_token="<|im_start|>"),
    "a blank in front": settings(add_prefix_space=True),
    "no added tokens": spec(lambda s: s.update(added_tokens=[])),
    "padding with another token": lambda folder: (
        spec(lambda s: s.update(padding={**PADDING, "pad_token": "<padder>"}))(folder),
        edit_json(folder / "tokenizer_config.json", pad_token=...),
    ),
}
PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}


def files_of(source: Path, folder: Path) -> Path:
    """The tokenizer files of a checkpoint with a smaller vocabulary: whole ones take seconds over all cases."""
    if source.name == "unigram":
        return write_tiny_xlmr(folder)
    folder.mkdir()
    for name in FILES:
        if (source / name).exists():
            shutil.copy(source / name, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    model, kept = content["model"], {added["content"] for added in content["added_tokens"]}
    model["vocab"] = {text: i for text, i in model["vocab"].items() if i < 2500 or text in kept}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    model |= {"merges": [m for m in merges if {*m, "".join(m)} <= model["vocab"].keys()]} if merges else {}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit_json(folder / "config.json", layer_types=...)
    return folder


def checkpoint_of(folder: Path) -> Checkpoint:
    return Checkpoint(folder, folder, read_json(folder / "config.json"), {}, Modules(), Prompts(), None)


def parts_of(tokenizer: Any) -> dict[str, Any]:
    parts = json.loads(tokenizer.to_str())
    kept = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
    return {"split": tokenizer.encode_special_tokens, **{key: parts[key] for key in kept}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of tokenizer files for each class of transformers."""
    root = tmp_path_factory.mktemp("sources")
    for name, model_type in (("LlamaTokenizer", "llama"), ("GemmaTokenizer", "gemma3_text")):
        shutil.copytree(NANO, root / name, ignore=shutil.ignore_patterns("*.safetensors"))
        as_spm(n_merges=800)(root / name)
        settings(tokenizer_class=name)(root / name)
        edit_json(root / name / "config.json", model_type=model_type)
    others = {"llama": root / "LlamaTokenizer", "gemma": root / "GemmaTokenizer", "xlmr": Path("unigram")}
    return {"bert": MINILM, "qwen2": NANO, **others}


@pytest.mark.parametrize("source", ["bert", "qwen2", "llama", "gemma", "xlmr"])
@pytest.mark.parametrize("case", STATED)
def test_tokenizer_is_the_one_that_transformers_builds(
    case: str, source: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = files_of(sources[source], tmp_path / "files")
    STATED[case](folder)
    if (case, source) == ("nulls", "xlmr"):  # on which transformers fails too
        with pytest.raises(BrokenCheckpoint, match="its bos_token, eos_token is not in"):
            build_tokenizer(checkpoint_of(folder))
        return
    theirs = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    assert parts_of(build_tokenizer(checkpoint_of(folder))) == parts_of(theirs)


def sentence_bert(**changes: Any) -> Edit:
    return lambda folder: edit_json(folder / "sentence_bert_config.json", **changes)


REFUSED: dict[str, tuple[Edit, type[Exception], str]] = {
    "an unknown class": (
        settings(tokenizer_class="FooTokenizer"),
        UnsupportedCheckpoint,
        "'FooTokenizer', which f2gguf",
    ),
    "a class of another model": (
        settings(tokenizer_class="Qwen2Tokenizer"),
        Disagreement,
        "takes BPE, but .*'WordPiece'",
    ),
    "code of its own": (settings(auto_map={"AutoTokenizer": ["a.B", None]}), UnsupportedCheckpoint, "auto_map names"),
    "case that is no flag": (settings(do_lower_case="no"), BrokenCheckpoint, "do_lower_case is 'no', which is neither"),
    "a token that is none": (settings(eos_token=5), BrokenCheckpoint, "5 is no token that transformers reads"),
    "a token that nothing marks": (
        settings(eos_token={"content": "x"}),
        BrokenCheckpoint,
        "no token that transformers",
    ),
    "no first token": (without(MAP, settings(cls_token=None)), BrokenCheckpoint, "its cls_token is not in"),
    "unknown token that is unknown": (
        lambda folder: (
            without(MAP, settings(unk_token="<?>"))(folder),
            edit_json(folder / "config.json", vocab_size=30600),
            fill(folder),
        ),
        BrokenCheckpoint,
        "lacks the unknown token <\\?>",
    ),
    "tokens without weights": (add(token("kubernetes")), BrokenCheckpoint, "Were tokens added, and the embeddings not"),
    "dropout": (
        lambda folder: (
            settings(tokenizer_class="PreTrainedTokenizerFast")(folder),
            spec(lambda s: s["model"].update(dropout=0.1))(folder),
        ),
        UnsupportedCheckpoint,
        "dropout, which makes the ids of a text random",
    ),
    "two tokens behind a text": (
        lambda folder: (
            settings(tokenizer_class="PreTrainedTokenizerFast")(folder),
            spec(lambda s: s["post_processor"]["single"].append(s["post_processor"]["single"][-1]))(folder),
        ),
        UnsupportedCheckpoint,
        "puts 2 tokens behind a text",
    ),
    "token types": (
        lambda folder: (
            settings(tokenizer_class="PreTrainedTokenizerFast")(folder),
            spec(lambda s: s["post_processor"]["single"][1]["Sequence"].update(type_id=1))(folder),
        ),
        UnsupportedCheckpoint,
        "token types other than 0",
    ),
}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_tiny_bert(tmp_path / "bert")


@pytest.mark.parametrize("case", REFUSED)
def test_what_f2gguf_does_not_follow_is_refused(case: str, bert: Path) -> None:
    edit, kind, message = REFUSED[case]
    edit(bert)
    with pytest.raises(kind, match=message):
        facts_of(bert)


def converted(folder: Path, **stated: object) -> Path:
    """The file of a checkpoint folder, read back against transformers too."""
    path, facts = folder.with_suffix(".gguf"), facts_of(folder, **stated)
    convert(facts, path)
    read_back(path, facts, load_texts()[:20])
    return path


def ids_of(path: Path, text: str) -> list[int]:
    with open_tokenizer(read_header(path)) as tokenizer:
        return [int(i) for i in tokenizer(text)[0]]


def test_case_is_that_of_the_settings_not_of_tokenizer_json(bert: Path) -> None:
    edit_json(bert / "tokenizer_config.json", do_lower_case=False)
    assert ids_of(converted(bert), "Paris in FRANCE") == [101, 100, 1999, 100, 102]


def test_words_that_were_added_to_a_wordpiece_model_keep_their_ids(bert: Path) -> None:
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.add_tokens(
        ["kubernetes", "GPT-4", "New York", "ing", AddedToken("<mark>", lstrip=True, normalized=False)]
    )
    tokenizer.save_pretrained(bert)
    edit_json(bert / "config.json", vocab_size=len(tokenizer))
    path = converted(fill(bert))  # "ing" is llama.cpp's spelling of "##ing" too
    for text in ("I asked GPT-4 today", "gpt-4glued to kubernetesing", "new york  <mark> bring"):
        assert ids_of(path, text) == tokenizer(text)["input_ids"]
    assert 30523 in ids_of(path, "I asked GPT-4 today")


@pytest.mark.slow
def test_sentence_transformers_gives_the_same_ids(bert: Path) -> None:
    from sentence_transformers import SentenceTransformer

    edit_json(bert / "tokenizer_config.json", do_lower_case=False, strip_accents=True)
    path, text = converted(bert), "Ein schöner Tag in Paris, naïve\tCafé 中文 [MASK]"
    theirs = SentenceTransformer(str(bert), device="cpu").tokenize([text])["input_ids"][0].tolist()
    assert ids_of(path, text) == theirs


@pytest.mark.slow
def test_folder_with_vocab_txt_alone_names_the_command_that_makes_tokenizer_json(bert: Path) -> None:
    right = build_tokenizer(checkpoint_of(bert))
    (bert / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"no such file, but vocab\.txt is there") as raised:
        facts_of(bert)
    command = str(raised.value).split("python -c ")[1]
    subprocess.run([sys.executable, "-c", command.strip('"')], check=True, capture_output=True)
    assert build_tokenizer(checkpoint_of(bert)).encode("Paris").ids == right.encode("Paris").ids


def frame(folder: Path, *, before: list[str], behind: list[str]) -> None:
    """Let tokenizer.json put these tokens around a text."""
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"] | {added["content"]: added["id"] for added in content["added_tokens"]}
    pieces = [{"SpecialToken": {"id": text, "type_id": 0}} for text in (*before, *behind)]
    pieces.insert(len(before), {"Sequence": {"id": "A", "type_id": 0}})
    special = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (*before, *behind)}
    post = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    edit_json(folder / "tokenizer.json", post_processor=post)


@pytest.mark.parametrize(("stated", "last"), [("<|im_end|>", 16383), ("<|im_start|>", 16382), (NO_EOS, None)])
def test_header_forces_the_closing_token_that_is_stated(tiny: Path, stated: str, last: int | None) -> None:
    edit_json(tiny / "tokenizer.json", post_processor=None)
    path = converted(tiny, eos_token=stated)
    ids = ids_of(path, "a")
    assert ids[-1] == last if last else len(ids) == 1
    assert read_header(path).values["tokenizer.ggml.add_eos_token"] is bool(last)


def test_token_before_a_text_is_kept_by_a_byte_level_bpe(tiny: Path) -> None:
    frame(tiny, before=["<|im_start|>"], behind=["<|im_end|>"])
    path = converted(tiny)
    assert ids_of(path, "a") == [16382, *ids_of(path, "a")[1:-1], 16383]
    assert read_header(path).values["tokenizer.ggml.add_bos_token"] is True
    with Model(path, device="cpu", vocab_only=True) as stock:
        assert stock.tokenize("a").tolist() == ids_of(path, "a")


SPM_REFUSED: dict[str, tuple[Edit, str]] = {
    "another normaliser": (spec(lambda s: s.update(normalizer={"type": "NFKC"})), "its normaliser is 'NFKC', and its"),
    "blanks as another letter": (
        spec(lambda s: s["normalizer"]["normalizers"][1].update(content="_")),
        "its normaliser is 'Prepend, Replace'",
    ),
    "a split": (spec(lambda s: s.update(pre_tokenizer={"type": "Whitespace"})), "and its split 'Whitespace'"),
    "no byte": (spec(lambda s: s["model"]["vocab"].pop("<0x0A>")), "its vocabulary lacks the byte <0x0A>"),
    "no unknown token": (
        lambda folder: (
            spec(lambda s: s["model"].update(unk_token=None))(folder),
            settings(unk_token="<?>")(folder),
            edit_json(folder / "config.json", vocab_size=2000),
            spec(lambda s: (s["added_tokens"].pop(0), s["model"]["vocab"].pop("<unk>")))(folder),
            settings(unk_token=None)(folder),
        ),
        "lacks the unknown token <unk>",
    ),
}


@pytest.mark.parametrize("case", SPM_REFUSED)
def test_spm_that_llama_cpp_cannot_follow_is_refused(case: str, tiny: Path) -> None:
    edit, message = SPM_REFUSED[case]
    as_spm(n_merges=300)(tiny)
    edit(tiny)
    with pytest.raises(CheckpointError, match=message):
        read_vocabulary(checkpoint_of(tiny))


@pytest.mark.parametrize("behind", ["</s>", None])
def test_spm_file_says_of_its_tokens_what_llama_cpp_needs(behind: str | None, tiny: Path) -> None:
    as_spm(behind=behind, n_merges=300)(tiny)
    path, vocabulary = converted(fill(tiny), eos_token="</s>"), facts_of(tiny, eos_token="</s>").vocabulary
    values = read_header(path).values
    keys = ("model", "add_space_prefix", "add_bos_token", "add_eos_token")
    assert [values[f"tokenizer.ggml.{key}"] for key in keys] == ["llama", True, True, True]
    at = vocabulary.tokens.index
    assert [vocabulary.token_types[at(text)] for text in ("<unk>", "<s>", "<0x41>", "▁", "er")] == [2, 3, 6, 1, 1]
    assert [vocabulary.family.scores[at(text)] for text in ("er", "en", "▁d")] == [0, -1, -2]
    with Model(path, device="cpu", vocab_only=True) as stock:
        for text in ("", "der Erde", "  two  blanks ", "🫨\n\ta", "Österreich</s>und"):
            assert stock.tokenize(text).tolist() == ids_of(path, text)
            assert ids_of(path, text)[:: len(ids_of(path, text)) - 1] == [1, 2]


@pytest.mark.parametrize("n_more", [0, 64])
def test_token_for_images_without_a_row_is_plain_text(n_more: int, tmp_path: Path) -> None:
    """As EmbeddingGemma has it: the token's id is the number of rows. Where there are more rows, it is a token."""
    from transformers import AutoTokenizer

    folder, text = files_of(NANO, tmp_path / "files"), "<image_soft_token>"
    as_spm(before="<bos>", behind="<eos>", n_merges=300)(folder)
    n_rows = read_json(folder / "config.json")["vocab_size"]
    add(token(text, special=True, normalized=False, id=n_rows))(folder)
    settings(tokenizer_class="GemmaTokenizer", bos_token="<bos>", eos_token="<eos>", image_token=text)(folder)
    edit_json(folder / "config.json", model_type="gemma3_text", vocab_size=n_rows + n_more)
    theirs, ours = AutoTokenizer.from_pretrained(folder), build_tokenizer(checkpoint_of(folder))
    assert theirs(f"a{text}b")["input_ids"].count(n_rows) == 1
    assert ours.encode(f"a{text}b").ids.count(n_rows) == bool(n_more)
    assert ours.encode("a <b>").ids == theirs("a <b>")["input_ids"]
    assert len(read_vocabulary(checkpoint_of(folder)).tokens) == n_rows + n_more


def test_mistral_takes_tokenizer_json_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = files_of(NANO, tmp_path / "files")
    as_spm(n_merges=300)(folder)
    settings(tokenizer_class="LlamaTokenizer", add_eos_token=True)(folder)
    edit_json(folder / "config.json", model_type="mistral")
    theirs = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    assert parts_of(build_tokenizer(checkpoint_of(folder))) == parts_of(theirs)
    assert theirs.pre_tokenizer is None


def test_no_closing_token_is_refused_where_the_checkpoint_has_one(tiny: Path) -> None:
    with pytest.raises(Disagreement, match=r"texts have no closing token, but .* ends them with <\|im_end\|>"):
        facts_of(tiny, eos_token=NO_EOS)


def test_file_whose_tokenizer_is_another_is_not_passed(bert: Path) -> None:
    path = converted(bert)
    carried = str(read_header(path).tokenizer)
    fill_in(path, {KEY_TOKENIZER: carried.replace('"lowercase": true', '"lowercase":false')})
    with pytest.raises(ConversionMismatch, match="its normalizer differ from the checkpoint's"):
        read_back(path, facts_of(bert), [])


def test_tokenizer_that_does_not_hold_together_is_named(nano_f16: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    shutil.copy(nano_f16, path)
    carried = str(read_header(path).tokenizer)
    fill_in(path, {KEY_TOKENIZER: carried.replace('"NFC"', '"XYZ"')})
    with pytest.raises(GGUFError, match=r"damaged\.gguf: its tokenizer does not work: "):
        ids_of(path, "a")
    with pytest.raises(NotGGUF, match=r"its header has f2gguf\.tokenizer = "):
        fill_in(path, {KEY_TOKENIZER: carried.replace('"ids"', '"idz"')})


def test_file_of_an_earlier_f2gguf_is_refused(nano_f16: Path, tmp_path: Path) -> None:
    path = write_other(tmp_path / "old.gguf", nano_f16, **{"f2gguf.tokenizer.normalizer": '{"type": "NFC"}'})
    with pytest.raises(GGUFError, match=r"old\.gguf: an earlier f2gguf made it"):
        ids_of(path, "a")


def test_text_on_which_the_library_panics_is_an_error(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overlapping = token("York", rstrip=True, normalized=False), token("\n", lstrip=True, normalized=False)
    add(*overlapping)(tiny)
    edit_json(tiny / "config.json", vocab_size=16400)
    path = tiny.with_suffix(".gguf")
    convert(facts_of(fill(tiny)), path)
    with open_tokenizer(read_header(path)) as tokenizer:
        with pytest.raises(TextError, match="the library tokenizers gives up on it"):
            tokenizer("York  \n  \n")
        several = tokenizer.each(["York", "York  \n  \n"])
        assert next(several)[0].tolist() == tokenizer("York")[0].tolist() == [16384, 16383]
        with pytest.raises(TextError, match="the library tokenizers gives up on it"):
            next(several)
    capfd.readouterr()  # the panic's own words


def test_texts_that_are_split_together_have_the_ids_that_each_has_alone(nano_f16: Path) -> None:
    inputs: list[str | list[int]] = [text.text for text in load_texts()[:300]]
    inputs[2:2] = ["a long text " * 2000, [5, 6, 7], ""]
    with open_tokenizer(read_header(nano_f16)) as tokenizer:
        alone = [tokenizer(it, max_tokens=64) if isinstance(it, str) else tokenizer.complete(it) for it in inputs]
        together = list(tokenizer.each(inputs, max_tokens=64))
    assert [(ids.tolist(), was_cut) for ids, was_cut in together] == [(ids.tolist(), cut) for ids, cut in alone]


@pytest.fixture
def gpt_4o(nano_f16: Path, tmp_path: Path) -> Path:
    return write_other(tmp_path / "gpt-4o.gguf", nano_f16, tokenizer__ggml__pre="gpt-4o")


LONG = "from f2gguf.runtime import Embedder; import sys, threading; model = Embedder(sys.argv[1], max_tokens=64)\n"


@pytest.mark.parametrize(
    "code",
    [
        "model.encode('x' * 30_000)",
        "t = threading.Thread(target=model.tokenize, args=['\\n/' * 30_000]); t.start(); t.join()",
        "model.encode(['a ' * 30_000, '!' * 100_000, '\\u00a0 ' * 50_000])",
    ],
)
def test_long_run_does_not_end_the_process(code: str, gpt_4o: Path) -> None:
    program = [sys.executable, "-W", "ignore", "-c", LONG + code + "\nprint('alive')", str(gpt_4o)]
    process = subprocess.run(program, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "alive\n", "")


@pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.FileWarning")
def test_run_that_no_stack_holds_is_an_error(gpt_4o: Path) -> None:
    with Embedder(gpt_4o) as model, pytest.raises(TextError, match="300,000 of its characters have no blank"):
        model.encode("x" * 300_000)


def test_names_of_pre_tokenizers_that_recurse() -> None:
    assert recursive("gpt2", "qwen2") is recursive("llama", "gpt-4o") is recursive("bert", "default") is None
    assert (recursive("gpt2", ""), recursive("gpt2", "a name of tomorrow")) == ("default", "a name of tomorrow")


@pytest.mark.slow
def test_flat_pre_tokenizers_need_no_stack(nano_f16: Path, tmp_path: Path) -> None:
    """One of each list of patterns, in a thread of 512 KiB: a recursion of 30,000 steps needs 8 MB."""
    paths = [
        write_other(tmp_path / f"{name}.gguf", nano_f16, is_whole=False, tokenizer__ggml__pre=name)
        for name in ("chatglm-bpe", "gemma4", "gpt-2", "kimi-k2", "laguna", "llama-bpe", "qwen2", "qwen35", "starcoder")
    ]
    code = """
import sys, threading
from pathlib import Path
from f2gguf.runtime.llama.model import Model
def run():
    for path in sys.argv[1:]:
        with Model(Path(path), device="cpu", vocab_only=True) as model:
            for unit in ("a", "A1", " ", "!", "é", "\\n/", " \\n"):
                model.tokenize(unit * 30_000)
threading.stack_size(1 << 19)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    assert {path.stem for path in paths} <= FLAT
    process = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "its texts need the token tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.model": "llama"}, "its vocabulary has no token for the byte 0"),
        ({"tokenizer.ggml.pre": "whitespace"}, "needs the tokenizer model 'whitespace'"),
    ],
)
def test_file_on_which_every_text_would_abort_is_refused(
    values: dict[str, str], message: str, nano_f16: Path, tmp_path: Path
) -> None:
    source = nano_f16
    if "t5" in values.values():
        source = tmp_path / "source.gguf"
        shutil.copy(nano_f16, source)
        fill_in(source, {"tokenizer.ggml.add_bos_token": True})
    path = write_other(tmp_path / "x.gguf", source, **values)
    with pytest.raises(GGUFError, match=message):
        Model(path, vocab_only=True).close()


@pytest.mark.slow
def test_generated_texts_of_every_kind_have_the_checkpoints_ids_and_end_no_process() -> None:
    listed = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True, check=True)
    own = [kind for kind in listed.stdout.split() if not kind.startswith("file-")]
    kinds = ",".join([*own, "file-gpt-4o", "file-default", "file-llama"])
    command = [sys.executable, SCRIPT, "--texts", "40", "--kinds", kinds]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("40 texts: 0 differ, 0 crash") == len(own) == 45
