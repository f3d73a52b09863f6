"""What `quantize push` refuses before it asks the Hub anything: a release that is not what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Release
from f2gguf.quantize.convert.reserved import fill_in
from f2gguf.quantize.release.check import find_release, read_release
from f2gguf.runtime.errors import GGUFError, HashMismatch, OverBound, UnfitRelease, UnknownName
from hub import flip_bit
from pushing import FILES, Q8, put_over_bound, seal, sha256


@pytest.fixture
def folder(tiny_release: Release, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_release.folder, tmp_path / "dist" / "tiny"))


def test_release_as_it_was_made_is_read(folder: Path) -> None:
    release = read_release(folder)
    assert sorted(release.hashes) == sorted([*FILES, "SHA256SUMS"])
    assert release.unlisted == ()
    assert release.tag == f"f2gguf-0.1.0-{sha256(folder / 'SHA256SUMS')[:8]}"


def test_release_with_importance_matrix_and_repaired_variants_is_read(nano_release: Release) -> None:
    assert set(read_release(nano_release.folder).hashes) == {path.name for path in nano_release.folder.iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_one_bit_in_any_file_is_found(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(flip_bit(path.read_bytes()))
    with pytest.raises(HashMismatch, match=f"{name}: has the SHA-256 .* changed since it was measured"):
        read_release(folder)


def test_a_bit_of_any_byte_of_the_sums_is_found(folder: Path) -> None:
    path = folder / "SHA256SUMS"
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        with pytest.raises((HashMismatch, UnfitRelease)):
            read_release(folder)


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UnfitRelease, match=name):
        read_release(folder)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        (Q8, "Run `quantize all` for the model again with its variant among --variants, or without it to take it off"),
        ("drift.png", r"Run `quantize card` for the model again\."),
    ],
)
def test_what_brings_a_missing_file_back_or_off_the_lists_is_said(folder: Path, name: str, step: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UnfitRelease, match=f"{name}: is listed in SHA256SUMS and not there. {step}"):
        read_release(folder)


@pytest.mark.parametrize("edit", [lambda report: report.update(files=[]), lambda report: report["files"].update(x=5)])
def test_report_of_another_shape_names_the_place(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    seal(folder)
    report = json.loads((folder / "drift.json").read_text())
    edit(report)
    (folder / "drift.json").write_text(json.dumps(report))
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    changed = f"{sha256(folder / 'drift.json')}  drift.json"
    (folder / "SHA256SUMS").write_text("\n".join(changed if "drift.json" in line else line for line in sums) + "\n")
    with pytest.raises(UnfitRelease, match=r"drift\.json: is damaged, .*ValidationError: files"):
        read_release(folder)


@pytest.mark.parametrize("name", ["drift.json", "README.md", Q8])
def test_file_that_the_sums_lack_is_named(folder: Path, name: str) -> None:
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if name not in line))
    with pytest.raises(UnfitRelease, match=name):
        read_release(folder)


def test_other_file_that_the_sums_lack_is_left_out(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / ".work").mkdir()
    assert read_release(folder).unlisted == (".work/", "notes.txt")


@pytest.mark.parametrize("line", ["{}  ../secret", "{}  /etc/passwd", "{} secret", "secret", ""])
def test_sums_that_reach_out_of_the_folder_or_do_not_parse_are_refused(folder: Path, line: str) -> None:
    (folder.parent / "secret").write_text("x")
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(line.format(sha256(folder.parent / "secret")) + "\n")
    with pytest.raises(UnfitRelease, match="SHA256SUMS"):
        read_release(folder)


@pytest.mark.parametrize("name", ["tiny-Q4_0.gguf", "other.GGUF"])
def test_gguf_that_no_report_knows_is_unmeasured(folder: Path, name: str) -> None:
    shutil.copy(folder / Q8, folder / name)
    with pytest.raises(UnfitRelease, match=f"{name}: is unmeasured"):
        read_release(folder)
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{sha256(folder / name)}  {name}\n")
    with pytest.raises(UnfitRelease, match=f"{name}: is unmeasured"):
        read_release(folder)


def test_header_without_verdict_is_unmeasured(folder: Path) -> None:
    shutil.copy(folder / "tiny-F16.gguf", folder / Q8)
    seal(folder)
    with pytest.raises(UnfitRelease, match=r"is unmeasured: its header lacks f2gguf\.drift\.holds"):
        read_release(folder)


def test_damaged_header_is_refused(folder: Path) -> None:
    (folder / Q8).write_bytes((folder / Q8).read_bytes()[:1000])
    seal(folder)
    with pytest.raises(GGUFError, match=Q8):
        read_release(folder)


def test_variant_in_place_of_the_reference_is_refused(folder: Path) -> None:
    shutil.copy(folder / Q8, folder / "tiny-F16.gguf")
    seal(folder)
    with pytest.raises(UnfitRelease, match="is no 16- or 32-bit file"):
        read_release(folder)


def change(*keys: str, to: Any = ...) -> Callable[[dict[str, Any]], None]:
    """An edit of drift.json; ... removes the key."""

    def edit(report: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            report = report[key]
        report[last] = to
        if to is ...:
            del report[last]

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            change("variants", "Q8_0", "holds", to=False),
            r"drift.json: is damaged, .*variants\.Q8_0\.holds is not what follows from the rest of it",
        ),
        (change("variants", "Q8_0", "mean", to=0.001), "f2gguf.drift.mean"),
        (change("variants", "Q8_0", "upper", to=0.001), "f2gguf.drift.upper"),
        (change("variants", "Q8_0", "n", to=593), "f2gguf.drift.n_texts"),
        (change("variants", "Q8_0", "max_drift", to=0.03), "f2gguf.drift.bound"),
        (change("variants", "Q8_0"), "has no verdict on Q8_0"),
        (change("variants"), "drift.json: is damaged"),
        (change("source", "sha256", to="0" * 64), "is of another checkpoint"),
        (change("conversion", to={}), r"drift.json: is damaged, .*conversion\.reference"),
        (change("conversion", to=None), "has no conversion check"),
        (change("conversion", "holds", to=False), r"drift.json: is damaged, .*conversion\.holds"),
        (change("surplus", to=1), r"drift.json: is damaged, .*surplus"),
        (change("files", "Q8_0"), "tiny-Q8_0.gguf: is unmeasured"),
        (change("files", "Q8_0", "sha256", to="0" * 64), "state different hashes"),
    ],
)
def test_report_and_header_that_contradict_each_other_are_refused(
    folder: Path, edit: Callable[[dict[str, Any]], None], reason: str
) -> None:
    seal(folder, edit)
    with pytest.raises(UnfitRelease, match=reason):
        read_release(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("f2gguf.drift.holds", False), ("f2gguf.drift.mean", 0.0001), ("f2gguf.variant", "Q4_0")],
)
def test_header_that_was_changed_is_refused_even_with_new_hashes(folder: Path, key: str, value: Any) -> None:
    fill_in(folder / Q8, {key: value})
    seal(folder)
    with pytest.raises(UnfitRelease, match=Q8):
        read_release(folder)


def test_variant_over_the_bound_is_refused_unless_that_is_allowed(folder: Path) -> None:
    put_over_bound(folder)
    with pytest.raises(OverBound, match=r"over the bound of 2%: upper end .* 4\.00%\. Pass --allow-over-bound"):
        read_release(folder)
    assert read_release(folder, allow_over_bound=True).hashes


def test_release_is_found_by_name_or_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for model in ("tiny", "org/tiny", "org/tiny@main", "../checkpoints/tiny", str(folder)):
        assert find_release(model, folder.parent) == folder
    assert find_release(".", Path("elsewhere")) == Path()


def test_unknown_release_is_answered_with_the_nearest(folder: Path) -> None:
    for model in ("tinny", ".", "/"):
        with pytest.raises(UnknownName, match="Known: tiny"):
            find_release(model, folder.parent)


def test_folder_that_was_never_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dist" / "bare").mkdir(parents=True)
    with pytest.raises(UnfitRelease, match=r"has no drift\.json"):
        read_release(find_release("bare", tmp_path / "dist"))
