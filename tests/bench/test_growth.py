"""How memory grows: as the first power of all that can be made larger.

Bytes are counted, so that a busy machine changes nothing; time is measured by `looped bench --growth`, and not tested.
"""

import json
import math

import pytest
import torch

from looplab.bench.growth import FEW_POINTS, exponent, kept_bytes, training_forward
from looplab.cli import main
from modeling_looped import LoopedForCausalLM
from toys import make_config

SERIES = {
    "loops": [{"loops": count} for count in (4, 8, 16)],
    "batch": [{"batch": count} for count in (4, 8, 16)],
    "tokens": [{"tokens": count} for count in (32, 64, 128)],
}
CHUNKED = {
    f"{kv_sharing}, {heads} key-value heads": {"kv_sharing": kv_sharing, "num_key_value_heads": heads}
    for kv_sharing in ("last", "mean", "gated")
    for heads in (4, 2)
}


def grown(fields: dict, points: list[dict], **shape) -> float:
    """The exponent of the bytes of a training step from the last point but one to the last."""
    model = LoopedForCausalLM(make_config(num_attention_heads=4, **fields))
    sizes = []
    for point in points[-2:]:
        shaped = {"batch": 2, "tokens": 16, "loops": 4} | shape | point
        sizes.append(kept_bytes(training_forward(model, **shaped)))
    return math.log2(sizes[1] / sizes[0])


@pytest.mark.parametrize("of", SERIES)
@pytest.mark.parametrize("kv_sharing", ["per_loop", "first", "gated"])
@pytest.mark.parametrize("connection", ["plain", "inject_concat", "hyper"])
def test_a_training_step_keeps_twice_as_much_for_twice_as_much(of, kv_sharing, connection):
    fields = {"kv_sharing": kv_sharing, "loop_connection": connection, "hyper_gates": "shared"}
    fields |= {"num_prelude_layers": 1, "num_coda_layers": 1} if of != "loops" else {}
    assert 0.8 < grown(fields, SERIES[of]) < 1.05


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fields", CHUNKED.values(), ids=CHUNKED)
def test_training_in_chunks_keeps_twice_as_much_for_twice_as_many_tokens(fields, autocast):
    """The entries of earlier chunks are kept once, and not in every chunk, layer and loop: that grew as T^1.4 here."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert 0.9 < grown(fields | {"prefill_chunk": 8}, SERIES["tokens"], batch=1) < 1.05


def test_what_is_kept_is_counted():
    """A product keeps its two factors; what is thrown away does not count, and a view is not another memory."""
    a, b = (torch.randn(8, 8, requires_grad=True) for _ in range(2))

    def forward():
        x, y = a.exp(), b.exp()  # keeps both results
        (x + 1).sin().sum()  # thrown away
        return (x.T[:4] @ y).sum()  # keeps x and y, which are kept already

    assert kept_bytes(forward) == 2 * 8 * 8 * 4 + 4


def test_growth_writes_its_rows_and_a_picture(tmp_path, capsys):
    assert main(["bench", "--growth", "--quick", "--no-compile", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    for of, counts in FEW_POINTS.items():
        series = [row for row in rows if row["mode"] == of]
        assert [row["count"] for row in series] == list(counts)
        assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in series)
        assert f"{of}, 32 wide: seconds ~ n^{exponent(series, 'seconds'):.2f}" in said
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
