"""A folder is replaced so that whatever fails, and wherever a process dies, one complete copy is found afterwards."""

import contextlib
import os

import pytest

from deris_llm.common.folders import (
    FolderError,
    check_writable,
    complete_copy,
    finish_replacements,
    remove_folder,
    written_aside,
)

CALLS = ("rename", "mkdir", "unlink", "rmdir", "fsync")
NUM_FILES = 3


class Killed(BaseException):
    """Stands for the death of the process: no cleaning up."""


@contextlib.contextmanager
def failing(monkeypatch, number, *, dies):
    """The number-th call that changes a folder fails, and where the process dies, all later ones too."""
    counted = [0]

    def wrapped(call):
        def fail_or_call(*args, **kwargs):
            counted[0] += 1
            if counted[0] == number or (dies and counted[0] > number):
                raise Killed if dies else OSError(5, "Input/output error")
            return call(*args, **kwargs)

        return fail_or_call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrapped(getattr(os, name)))
        yield counted


def fill(folder, text):
    for number in range(NUM_FILES):
        (folder / f"{number}.txt").write_text(text)


def content(folder):
    """The text that all files of a complete copy have."""
    files = sorted(path.name for path in folder.iterdir())
    assert files == [f"{number}.txt" for number in range(NUM_FILES)], f"{folder} is not complete: {files}"
    texts = {path.read_text() for path in folder.iterdir()}
    assert len(texts) == 1
    return texts.pop()


def replace(folder, text):
    with written_aside(folder) as partial:
        fill(partial, text)


@pytest.mark.parametrize("dies", [False, True], ids=["a call fails", "the process dies"])
def test_a_complete_copy_survives_every_failure(tmp_path, monkeypatch, dies):
    kept = set()
    for number in range(1, 100):
        folder = tmp_path / str(number) / "best"
        replace(folder, "old")
        with failing(monkeypatch, number, dies=dies) as counted, contextlib.suppress(FolderError, OSError, Killed):
            replace(folder, "new")
        assert content(complete_copy(folder)) in ("old", "new")  # for who only reads
        finish_replacements(folder.parent)  # of the next start
        kept.add(content(folder))
        assert [path.name for path in folder.parent.iterdir()] == ["best"]
        if counted[0] < number:
            break
    assert number > 10
    assert kept == {"old", "new"}


def test_the_next_start_may_die_too(tmp_path, monkeypatch):
    for number in range(1, 100):
        for second in range(1, 100):
            folder = tmp_path / f"{number}-{second}" / "best"
            replace(folder, "old")
            with failing(monkeypatch, number, dies=True) as counted, contextlib.suppress(Killed):
                replace(folder, "new")
            with failing(monkeypatch, second, dies=True) as again, contextlib.suppress(Killed):
                finish_replacements(folder.parent)
            assert content(complete_copy(folder)) in ("old", "new")
            finish_replacements(folder.parent)
            assert content(folder) in ("old", "new")
            if again[0] < second:
                break
        if counted[0] < number:
            return
    pytest.fail("the replacement did not end")


def test_a_new_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    for number in range(1, 100):
        folder = tmp_path / str(number) / "checkpoint-4"
        with failing(monkeypatch, number, dies=True) as counted, contextlib.suppress(Killed):
            replace(folder, "new")
        finish_replacements(folder.parent)
        assert not folder.exists() or content(folder) == "new"
        if counted[0] < number:
            break
    assert content(folder) == "new"


def test_a_removed_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    for number in range(1, 100):
        folder = tmp_path / str(number) / "checkpoint-4"
        replace(folder, "old")
        with failing(monkeypatch, number, dies=True) as counted, contextlib.suppress(Killed):
            remove_folder(folder)
        assert not folder.exists() or content(folder) == "old"
        if counted[0] < number:
            break
    assert not folder.exists()


def test_both_renames_failing_leaves_the_old_folder(tmp_path, monkeypatch):
    """Where the new folder cannot get its name, and the old one cannot get it back, the next start decides."""
    folder = tmp_path / "best"
    replace(folder, "old")
    rename = os.rename

    def fails(source, target, **kwargs):
        if os.path.basename(target) == "best":
            raise OSError(5, "Input/output error")
        rename(source, target, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(FolderError, match=r"it is complete in .*\.complete-best"):
            replace(folder, "new")
    assert not folder.exists()
    assert content(complete_copy(folder)) == "new"
    finish_replacements(tmp_path)
    assert content(folder) == "new"


def test_a_file_of_the_name_is_refused_and_kept(tmp_path):
    (tmp_path / "best").write_text("notes")
    with pytest.raises(FolderError, match="a file of that name"):
        replace(tmp_path / "best", "new")
    assert (tmp_path / "best").read_text() == "notes"


def test_a_linked_folder_is_replaced_and_what_it_links_to_is_kept(tmp_path):
    replace(tmp_path / "elsewhere", "old")
    (tmp_path / "best").symlink_to(tmp_path / "elsewhere")
    replace(tmp_path / "best", "new")
    assert content(tmp_path / "best") == "new"
    assert content(tmp_path / "elsewhere") == "old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"--output .*file/run: expected a folder that can be written to, got .*"):
        check_writable(tmp_path / "file" / "run", "--output")
    check_writable(tmp_path / "new" / "run", "--output")
    assert list((tmp_path / "new" / "run").iterdir()) == []
