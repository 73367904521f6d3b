"""Graphs with the loop unrolled: torch.export, ONNX, one compiled graph. The loop count is baked in."""

import onnxruntime
import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from toys import FP32, KV_SHARINGS, make_ids, make_model, open_gates

SHAPES = {"input_ids": {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("tokens", min=2, max=64)}}


class Logits(torch.nn.Module):
    """Logits at a fixed loop count, without a cache: ids (B, T) -> (B, T, V)."""

    def __init__(self, model, num_loops):
        super().__init__()
        self.model, self.num_loops = model, num_loops
        self.eval()

    def forward(self, input_ids):
        return self.model(input_ids, num_loops=self.num_loops, use_cache=False).logits


def onnx_session(program):
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_graph_holds_one_loop_count():
    """Rows and tokens stay free, loops do not: each count is a graph of its own length."""
    model, longer = make_model(), make_ids(2, 11, seed=5)
    sizes = []
    for num_loops in (1, 3):
        program = torch.export.export(Logits(model, num_loops), (make_ids(),), dynamic_shapes=SHAPES)
        got = program.module()(longer)
        torch.testing.assert_close(got, model(longer, num_loops=num_loops).logits, **FP32)
        sizes.append(sum(node.target is torch.ops.aten.linear.default for node in program.graph.nodes))
    layer = 7 * model.config.num_core_layers
    assert sizes == [layer + 1, 3 * layer + 1]


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"kv_sharing": "first"}, {"loop_connection": "hyper"}], ids=["first", "hyper"])
def test_variants_export(fields):
    model, longer = make_model(**fields), make_ids(2, 11, seed=5)
    program = torch.export.export(Logits(model, 2), (make_ids(),), dynamic_shapes=SHAPES)
    torch.testing.assert_close(program.module()(longer), model(longer, num_loops=2).logits, **FP32)


@pytest.mark.slow
@torch.no_grad()
# Layers of shared rows take the place of stock ones in the cache, and the tracer says that it saw that.
@pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects:UserWarning")
@pytest.mark.parametrize("kv_sharing", KV_SHARINGS)
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_a_decoding_step_exports_with_its_static_cache(kv_sharing, sliding_window):
    """The exported step, run token by token, is decoding: every loop has found its slots in the graph. A graph cannot
    look into a cache, which had to be empty for rows that loops share."""
    model = open_gates(make_model(num_loops=2, kv_sharing=kv_sharing, sliding_window=sliding_window))
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": 16},
    )
    ids = make_ids(1, 9)
    cache = DynamicCache(config=model.config)
    expected = torch.cat([model(ids[:, [t]], past_key_values=cache).logits for t in range(9)], dim=1)
    wrapped = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16)
    step = wrapped.export(input_ids=ids[:, :1], cache_position=torch.zeros(1, dtype=torch.long)).module()
    logits = [step(input_ids=ids[:, t : t + 1], cache_position=torch.tensor([t])) for t in range(9)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **FP32)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside onnxscript
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx_runtime_agrees():
    model, longer = make_model(), make_ids(2, 11, seed=5)
    shapes = {"input_ids": {0: "rows", 1: "tokens"}}
    program = torch.onnx.export(Logits(model, 2), (make_ids(),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnx_session(program)
    assert [given.name for given in session.get_inputs()] == ["input_ids"]  # and none for the loops
    (got,) = session.run(None, {"input_ids": longer.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(longer, num_loops=2).logits, **FP32)
    assert not torch.allclose(torch.from_numpy(got), model(longer, num_loops=3).logits, atol=1e-3)


def test_a_random_start_does_not_export():
    """state_init="normal" draws its start from positions that the tracer does not know."""
    model = make_model(state_init="normal")
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Logits(model, 2), (make_ids(),), dynamic_shapes=SHAPES)
