"""Building the C++ kernels once, keeping them and loading them, with sources of a few lines."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from building import ANSWER, CHANGES, Place, needs_compiler, script
from chronotope.kernels.native import build, toolchain
from chronotope.kernels.native.build import Setup


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place.fresh(tmp_path, monkeypatch)


@needs_compiler
def test_builds_once_and_keeps_it(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.reasons(place.setup) == []
    assert build.library(place.setup).answer() == 42
    assert build.library(place.setup) is build.library(replace(place.setup))
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and "building its CPU kernels with g++" in told.err
    assert build.library(place.forget()).answer() == 42
    assert capsys.readouterr().err == ""
    assert (place.count("compiled"), place.count("linked")) == (1, 1)
    kept = build.folder(place.setup)
    assert kept.parent == place.cache and [path.parent for path in place.libraries] == [kept]
    assert sorted(path.name for path in kept.iterdir()) == ["about.json", place.libraries[0].name, "lock"]


@needs_compiler
def test_each_source_is_compiled_and_all_are_linked(place: Place) -> None:
    (place.source / "more.cpp").write_text('extern "C" int answer();\nextern "C" int more() { return answer() + 1; }\n')
    assert build.library(place.setup).more() == 43
    assert (place.count("compiled"), place.count("linked")) == (2, 1)
    assert [path.name for path in build.sources(place.source)] == ["answer.cpp", "answer.h", "more.cpp"]


def test_sources_are_the_files_beside_the_module() -> None:
    found = build.sources()
    assert found == sorted(found) and {path.suffix for path in found} <= {".cpp", ".h"}
    assert {path.parent for path in found} <= {Path(build.__file__).parent}


@needs_compiler
def test_threads_of_one_process_build_once(place: Place) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(build.library, [place.setup] * 4))
    assert place.count() == 1 and all(each is found[0] for each in found)


@needs_compiler
def test_processes_that_start_at_once_build_once(place: Place) -> None:
    place.hold()
    processes = [place.process(), place.process()]
    # Each says something when it knows its part: one builds, the other has waited for a second.
    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(lambda process: process.stderr.readline(), processes))  # type: ignore[union-attr]
    place.release()
    told = [process.communicate(timeout=60) for process in processes]
    assert told == [("42\n", ""), ("42\n", "")]
    building, waiting = sorted(first, key=lambda line: "waiting" in line)
    assert "building its CPU kernels with g++" in building and "another process is building" in waiting
    assert place.count() == 1 and len(place.libraries) == 1


@needs_compiler
def test_a_process_killed_in_the_middle_leaves_nothing_in_the_way(place: Place) -> None:
    place.hold()
    process = place.process()
    while not (place.base / "held").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    kept = build.folder(place.setup)
    assert list(kept.glob("build-*")) and not place.libraries
    # Its compiler is still there and must not hold the lock.
    assert place.process().communicate(timeout=60)[0] == "42\n"
    assert not list(kept.glob("build-*")) and len(place.libraries) == 1
    place.release()


@needs_compiler
def test_without_locks_each_process_builds_for_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    other = build.folder(place.setup) / "build-by-another"
    other.mkdir()
    assert build.library(place.setup).answer() == 42
    assert other.exists()  # not ours to delete: its process may be at work


def test_switched_off(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHRONOTOPE_NATIVE", "0")
    assert build.reasons(place.setup) == ["the native kernels are switched off: CHRONOTOPE_NATIVE=0"]
    assert not place.cache.exists()


def test_windows_is_refused(place: Place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        found = build.reasons(place.setup)
    assert found == ["the native kernels are not built on Windows"]


def test_without_sources(place: Place) -> None:
    (place.source / "answer.cpp").unlink()
    script(place.cxx, "#!/bin/sh\necho Free Software Foundation\n")
    assert build.reasons(place.setup) == [f"there are no C++ files in {place.source}: install chronotope again"]


@needs_compiler
@pytest.mark.parametrize("change", CHANGES)
def test_the_folder_is_another_for_another(place: Place, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.folder(place.setup)
    assert before == build.folder(place.setup)
    CHANGES[change](place, monkeypatch)
    assert build.folder(place.setup) != before


@needs_compiler
def test_a_library_for_another_torch_is_not_loaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library(place.setup)
    (other,) = place.libraries
    # What another torch has left must not be looked at: loading this would fail.
    damaged = other.with_name(f"kernels-{toolchain.digest(b'for another torch')}.so")
    damaged.write_bytes(b"for another torch")
    other.unlink()  # never written over: it is loaded, and its memory is the file
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert build.library(place.forget()).answer() == 42
    assert place.count() == 2 and damaged in place.libraries and len(place.libraries) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_library_is_built_again(place: Place, damage: str) -> None:
    build.library(place.setup)
    (path,) = place.libraries
    whole = path.read_bytes()
    path.unlink()  # what is loaded keeps its memory
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"truncated": whole[:middle], "flipped": flipped, "emptied": b""}[damage])
    assert build.library(place.forget()).answer() == 42
    assert place.count() == 2 and len(place.libraries) == 1
    assert place.libraries[0].stem.endswith(toolchain.digest(place.libraries[0].read_bytes()))


@given(content=st.binary(min_size=1, max_size=64), data=st.data())
def test_any_damage_is_seen(content: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"kernels-{toolchain.digest(content)}.so"
        path.write_bytes(content)
        assert build._whole(Path(name), "kernels") == path
        other = data.draw(st.one_of(st.binary(max_size=64), st.integers(0, len(content)).map(lambda n: content[:n])))
        path.write_bytes(other)
        assert build._whole(Path(name), "kernels") == (path if other == content else None)


@needs_compiler
def test_a_broken_build_is_told_once_and_remembered(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.source / "answer.cpp").write_text("int answer( { return 42; }\nthis is no C++\n")
    (reason,) = build.reasons(place.setup)
    assert "answer.cpp:1" in reason and "error: " in reason and "\n" not in reason
    log = Path(reason.rpartition(" ")[2])
    assert log == build.folder(place.setup) / "failed.log"
    text = log.read_text()
    assert "this is no C++" in text or text.count("error: ") > 1
    assert str(place.cxx) in text and text.startswith(reason)
    assert build.reasons(place.setup) == [reason]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[1] == f"chronotope: {reason}"
    # Another process does not try again, and tells it once too.
    process = place.process()
    out, errors = process.communicate(timeout=60)
    assert out == "" and process.returncode == 1 and place.count() == 1
    assert errors.count(f"chronotope: {reason}\n") == 1 and errors.endswith(f"BuildError: {reason}\n")
    assert not place.libraries and not list(log.parent.glob("build-*"))


@needs_compiler
@pytest.mark.parametrize("way", ["deleted", "old", "repaired"])
def test_a_broken_build_is_tried_again(place: Place, way: str) -> None:
    setup = place.setup
    (place.source / "answer.cpp").write_text("no C++\n")
    assert build.reasons(setup) and build.reasons(place.forget()) and place.count() == 1
    log = build.folder(setup) / "failed.log"
    if way == "deleted":
        log.unlink()
    elif way == "old":
        os.utime(log, (time.time() - 24 * 3600 - 1,) * 2)
    else:
        (place.source / "answer.cpp").write_text(ANSWER)
    found = build.reasons(place.forget())
    assert place.count() == 2 and bool(found) == (way != "repaired")


@needs_compiler
@pytest.mark.parametrize("said", ["fatal error: Killed signal terminated program", "No space left on device"])
def test_a_build_that_was_interrupted_is_not_remembered(place: Place, said: str) -> None:
    good = place.cxx.read_text()
    # Says its version as before, so that the key stays the same.
    script(place.cxx, good.replace("exec ", f'case " $* " in *" -c "*) echo "g++: {said}"; exit 1;; esac\nexec '))
    (reason,) = build.reasons(place.setup)
    assert said in reason and "interrupted.log" in reason
    script(place.cxx, good)
    assert build.reasons(place.forget()) == []


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_a_reason(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.source / "answer.cpp").write_text('int missing();\nextern "C" int answer() { return missing(); }\n')
    (reason,) = build.reasons(place.setup)
    assert "cannot be loaded" in reason and "undefined symbol" in reason and str(place.libraries[0]) in reason
    assert capsys.readouterr().err.count(reason) == 1


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@needs_compiler
@pytest.mark.parametrize("home", [True, False])
def test_a_cache_that_cannot_be_written(
    place: Place, temporary: Path, home: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    place.cache.write_text("a file, where a folder should be")
    setup = replace(place.setup, cache=place.cache if home else None)
    assert build.library(setup).answer() == 42
    kept = build.folder(setup)
    assert kept.parent.parent == temporary and kept.parent.stat().st_mode & 0o777 == 0o700
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and f"uses {kept}" in told[0]
    assert ("cannot write" if home else "there is no home folder") in told[0]
    place.forget()
    assert build.library(setup).answer() == 42 and place.count() == 1


@needs_compiler
def test_a_temporary_folder_that_others_can_write_is_not_used(place: Place, temporary: Path) -> None:
    place.cache.write_text("a file, where a folder should be")
    open_to_all = temporary / f"chronotope-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (reason,) = build.reasons(place.setup)
    assert f"others can write {open_to_all}: set CHRONOTOPE_CACHE" in reason and place.count() == 0


@needs_compiler
def test_a_cache_that_can_only_be_read_is_used(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library(place.setup)
    monkeypatch.setattr(build, "_writable", lambda *_: pytest.fail("looked for a place to write"))
    assert build.library(place.forget()).answer() == 42


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "CHRONOTOPE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert Setup().cache == tmp_path / ".cache" / "chronotope"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Setup().cache == tmp_path / "xdg" / "chronotope"
    monkeypatch.setenv("CHRONOTOPE_CACHE", str(tmp_path / "own"))
    assert Setup().cache == tmp_path / "own"
