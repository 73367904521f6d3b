"""What is written appears whole or not at all, and never behind a link."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from looplab.runs.writing import below, remove_partials, whole_folder, write_whole

OLD, NEW = "old\n", "new\n" * 50_000


def tree(folder) -> dict[str, str]:
    """Every file below `folder` and what is in it; nothing temporary is overlooked."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("content", [NEW, NEW.encode(), "é", b""])
def test_a_file_and_its_folders_are_made(tmp_path, content):
    path = write_whole(tmp_path / "a" / "b.txt", content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tree(tmp_path)) == ["a/b.txt"]


@pytest.mark.parametrize("target", ["victim.txt", "nowhere.txt"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_left(tmp_path, target):
    (tmp_path / "victim.txt").write_text(OLD)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "grid.jsonl").symlink_to(tmp_path / target)
    write_whole(tmp_path / "run" / "grid.jsonl", NEW)
    assert not (tmp_path / "run" / "grid.jsonl").is_symlink()
    assert tree(tmp_path) == {"victim.txt": OLD, "run/grid.jsonl": NEW}


def test_what_is_not_a_file_is_not_replaced_by_one(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    for name in ("null", "folder"):
        with pytest.raises(ValueError, match=f"{name} is not a file"):
            write_whole(tmp_path / name, NEW)
    assert (tmp_path / "null").is_symlink()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_whole(tmp_path / "file", OLD)
    with pytest.raises(TypeError):
        write_whole(path, None)
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")
    assert tree(tmp_path) == {"file": OLD}


def test_writers_of_one_file_do_not_mix(tmp_path):
    contents = [str(digit) * 200_000 for digit in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_whole(tmp_path / "file", content), contents * 4))
    assert list(tree(tmp_path)) == ["file"]
    assert (tmp_path / "file").read_text() in contents


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_that_was_cut_short_leaves_nothing(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "model") as new:  # noqa: PT012
        write_whole(new / "weights", NEW)
        raise error
    assert tree(tmp_path) == {}


def test_a_folder_replaces_none(tmp_path):
    write_whole(tmp_path / "model" / "mine", OLD)
    with pytest.raises(ValueError, match="model exists"), whole_folder(tmp_path / "model"):
        raise AssertionError
    assert tree(tmp_path) == {"model/mine": OLD}


def test_of_two_that_make_a_new_folder_the_second_is_refused(tmp_path):
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "model") as second:  # noqa: PT012
        with whole_folder(tmp_path / "model") as first:
            write_whole(first / "weights", OLD)
        write_whole(second / "weights", NEW)
    assert tree(tmp_path) == {"model/weights": OLD}


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_is_not_a_folder_of_its_own_is_refused_before_any_work(tmp_path, kind):
    write_whole(tmp_path / "victim" / "file", OLD)
    run = tmp_path / "run"
    run.mkdir()
    if kind == "file":
        write_whole(run / "figures", OLD)
    else:
        (run / "figures").symlink_to(tmp_path / ("victim" if kind == "link" else "nowhere"))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"figures is (a link|not a folder)"):
        below(run, "figures", "deeper")
    with pytest.raises(ValueError, match=r"figures is (a link|not a folder)"), whole_folder(run / "figures", True):
        raise AssertionError
    assert tree(tmp_path) == before


def test_the_folder_that_the_user_named_may_be_a_link(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "runs")
    assert below(tmp_path / "latest", "figures") == tmp_path / "latest" / "figures"


def test_what_killed_writers_left_can_be_removed(tmp_path):
    write_whole(tmp_path / "kept", OLD)
    write_whole(tmp_path / "theirs.partial", OLD)
    for left in (".model.0123abcd.partial/weights", ".grid.jsonl.0123abcd.partial"):
        write_whole(tmp_path / left, OLD)
    remove_partials(tmp_path)
    assert tree(tmp_path) == {"kept": OLD, "theirs.partial": OLD}
