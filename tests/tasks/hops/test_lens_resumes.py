"""A lens that is killed goes on from the parts it had measured, and ends with the bytes of one that was not killed."""

import shutil

import pytest

from looplab.cli import main
from looplab.runs.folder import Run, open_run
from looplab.tasks.molecules.probes import probe_run
from toy_runs import rows_of

pytestmark = pytest.mark.slow
OPTIONS = ["--limit", "6", "--hops", "2", "--loops", "2"]
LENSES = {
    "lens.jsonl": OPTIONS,
    "lens_step-000000001.jsonl": [*OPTIONS, "--snapshot", "step-000000001", "--no-probes"],
    "lens_stages.jsonl": [*OPTIONS, "--snapshot", "all"],
}


class Killed(BaseException):
    """Ends a command as SIGKILL would, after a file was written."""


@pytest.fixture
def dying(monkeypatch):
    """dying(n): the n-th file of measurements that is written from now on ends the command; None: it lives."""
    write, left = Run.write, [None]

    def write_and_die(self, *arguments):
        path = write(self, *arguments)
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        return path

    monkeypatch.setattr(Run, "write", write_and_die)
    return lambda count: left.__setitem__(0, count)


@pytest.fixture
def counted(monkeypatch):
    """The number of recordings that lenses made so far, in a list."""
    from looplab.tasks.hops import lens

    record, calls = lens.record, [0]

    def count(*arguments, **keywords):
        calls[0] += 1
        return record(*arguments, **keywords)

    monkeypatch.setattr(lens, "record", count)
    return calls


@pytest.mark.parametrize("name", LENSES)
def test_a_killed_lens_goes_on_where_it_was(toy_runs, tmp_path, dying, counted, name):
    whole = shutil.copytree(toy_runs / "hops", tmp_path / "whole")
    assert main(["lens", str(whole), *LENSES[name]]) == 0
    expected, effort = (whole / name).read_bytes().replace(b"whole", b"hops"), counted[0]
    assert len({(row["measure"], row["split_kind"], row.get("changed")) for row in rows_of(whole / name)}) > 4

    folder = shutil.copytree(toy_runs / "hops", tmp_path / "hops")
    counted[0] = 0
    for parts in (1, 2, 3):  # it is killed again and again
        dying(parts)
        with pytest.raises(Killed):
            main(["lens", str(folder), *LENSES[name]])
        assert expected.startswith((folder / name).read_bytes())
        assert not (folder / "figures").exists()
    dying(None)
    assert main(["lens", str(folder), *LENSES[name]]) == 0
    assert (folder / name).read_bytes() == expected
    assert counted[0] == effort  # nothing was measured twice


def test_a_killed_lens_keeps_what_it_has_not_reached_again(toy_runs, tmp_path, dying, counted):
    """The first part was lost; measuring it anew wrote the file without the later parts, and a kill then cost them."""
    folder, name = shutil.copytree(toy_runs / "hops", tmp_path / "hops"), "lens.jsonl"
    command = ["lens", str(folder), *LENSES[name], "--no-probes"]
    assert main(command) == 0
    whole, effort = (folder / name).read_bytes(), counted[0]
    lines = whole.splitlines(keepends=True)
    first = rows_of(folder / name)[0]
    part = [row["measure"] == first["measure"] for row in rows_of(folder / name)]
    (folder / name).write_bytes(b"".join(line for line, lost in zip(lines, part, strict=True) if not lost))
    dying(1)
    with pytest.raises(Killed):
        main(command)
    dying(None)
    assert main(command) == 0
    assert (folder / name).read_bytes() == whole
    assert counted[0] - effort < effort / 2  # most of it was on file


def test_a_lens_of_other_weights_or_options_begins_anew(toy_runs, tmp_path, counted):
    folder = shutil.copytree(toy_runs / "hops", tmp_path / "hops")
    command = ["lens", str(folder), "--hops", "2", "--no-probes", "--limit"]
    efforts = []
    for limit in ("6", "6", "5"):
        before = counted[0]
        assert main([*command, limit]) == 0
        efforts.append(counted[0] - before)
        assert {row["limit"] for row in rows_of(folder / "lens.jsonl")} == {int(limit)}
    assert efforts[1] == 0 < efforts[2] == efforts[0]
    shutil.copytree(folder / "snapshots" / "step-000000001", folder / "model", dirs_exist_ok=True)
    before = counted[0]
    assert main([*command, "5"]) == 0
    assert counted[0] - before == efforts[0]


def test_killed_probes_of_molecules_go_on(toy_runs, tmp_path, dying):
    texts = []
    for name, deaths in (("whole", []), ("parts", [1, 2])):
        folder = shutil.copytree(toy_runs / "molecules", tmp_path / name)
        for parts in deaths:
            dying(parts)
            with pytest.raises(Killed):
                probe_run(open_run(folder), 2, 12)
            assert texts[0].startswith((folder / "probes.jsonl").read_text())
        dying(None)
        texts.append(probe_run(open_run(folder), 2, 12).read_text())
    assert texts[0] == texts[1]
