"""`benchmarks/gpu.sh`, tried on a CPU."""

import json

import pytest
import torch

from looplab.bench.gpu import TINY, Sizes, build, main, measure, table
from toys import ROOT


@pytest.mark.filterwarnings("ignore:.*compile.*")
def test_the_gpu_benchmark_prints_one_table(tmp_path, capsys):
    main(["--tiny", "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["measure"] for row in rows} == {"training", "decode", "compiled", "halting"}
    assert all(row["tokens_per_second"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert len(printed.strip().splitlines()) == 2 + len(rows)
    assert "212,000" in printed


def test_what_no_time_is_left_for_stays_empty():
    rows = measure(Sizes(**{**vars(TINY), "minutes": 0}), torch.device("cpu"))
    assert {row["tokens_per_second"] for row in rows} == {None}
    assert table(rows, "").splitlines()[-1].split()[-1] == "-"


def test_the_gpu_benchmark_measures_the_size_that_it_says():
    with torch.device("meta"):
        model = build(Sizes(), torch.device("meta"))
    assert 130e6 < model.num_parameters() < 140e6
    assert (ROOT / "benchmarks" / "gpu.sh").stat().st_mode & 0o111
