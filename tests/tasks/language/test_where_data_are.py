"""Where the data of a run on text or molecules are looked for, see `looplab/tasks/data.py`."""

import json

import pytest

from data_builders.files import MissingData
from looplab.runs.folder import Run
from looplab.tasks.text.data import TextData


@pytest.mark.parametrize(
    ("dataset", "here"),
    [
        (None, True),
        ({"path": "{tmp}"}, True),
        ({"path": "json", "data_files": "rows.jsonl"}, True),
        ({"path": "json", "data_dir": "rows"}, True),
        ({"path": "squad"}, False),
        ({"path": "user/rows"}, False),
        ({"path": "user/rows", "data_files": "rows.jsonl"}, False),
        ({"path": "user/rows", "data_dir": "rows"}, False),
    ],
    ids=str,
)
def test_a_data_set_of_the_hub_comes_after_the_copy(dataset, here, tmp_path):
    """Files of a kind such as json are of this machine; files in a data set of the Hub are not."""
    given = {} if dataset is None else {"dataset": {n: v.format(tmp=tmp_path) for n, v in dataset.items()}}
    assert TextData(task="text", sequence_length=8, overrides=given).here() == here


def test_data_that_are_nowhere_are_looked_for_once_in_each_place(tmp_path):
    asked = []

    class Gone(TextData):
        def load(self, **changed):
            asked.append(self.files)
            raise MissingData("gone.")

    here = Gone(task="text", sequence_length=8, files=["a.txt"])
    for note, places in (({}, [["a.txt"]]), ({"folder": "/began"}, [["/began/a.txt"], ["a.txt"]])):
        (tmp_path / "run.json").write_text(json.dumps(note), encoding="utf-8")
        asked.clear()
        with pytest.raises(MissingData, match=r"Say where they are by --data\.files"):
            here.find(Run(tmp_path))
        assert asked == places
