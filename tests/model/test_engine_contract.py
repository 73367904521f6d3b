"""What serving engines ask of a model that they load: one attention for every slot, found before anything runs.

vLLM walks the modules of a model once, gives every number in `range(config.num_hidden_layers)` a cache of its own, and
has each attention read and write the cache of its `layer_idx`. `StandInEngine` does so in a few lines.
"""

import ast
import copy
import inspect
import textwrap

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_looped import LoopedConfig, LoopedForCausalLM, LoopedModel
from modeling_looped.checks_looped import SERVING_ENGINES
from served import GREEDY, SERVED
from toys import make_config, make_ids


class StandInEngine:
    """An attention that keeps keys and values itself: for every `layer_idx` and request, by position.

    The tokens of several requests lie one after the other in one row; `step` says whose they are and where.
    """

    def __init__(self, model):
        self.model, self.kept = model, {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
        assert attention_mask is None
        assert kwargs["dropout"] == 0.0
        outputs = []
        for token, (request, position) in enumerate(self.tokens):
            kept = self.kept.setdefault((module.layer_idx, request), {})
            kept[position] = key[0, :, token], value[0, :, token]  # (K, d) each
        for token, (request, position) in enumerate(self.tokens):
            kept = self.kept[module.layer_idx, request]
            seen = range(0 if sliding_window is None else max(0, position + 1 - sliding_window), position + 1)
            keys, values = (torch.stack([kept[p][i] for p in seen], dim=1) for i in (0, 1))
            keys, values = (x.repeat_interleave(module.num_key_value_groups, dim=0) for x in (keys, values))
            scores = (query[0, :, token, None] @ keys.transpose(1, 2)) * scaling  # (H, 1, S)
            outputs.append((scores.softmax(-1) @ values).squeeze(1))  # (H, d)
        return torch.stack(outputs)[None], None

    @torch.no_grad()
    def step(self, pieces: dict[int, tuple[int, list[int]]]) -> dict[int, int]:
        """Run new tokens of some requests, request -> (first position, ids); the greedy next token of each."""
        self.tokens = [(r, first + i) for r, (first, ids) in pieces.items() for i in range(len(ids))]
        ids = torch.tensor([[token for _, ids in pieces.values() for token in ids]])
        positions = torch.tensor([[position for _, position in self.tokens]])
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        return {request: int(logits[i].argmax()) for i, (request, _) in enumerate(self.tokens)}

    def generate(self, prompts: list[list[int]], new_tokens: int, cut: int) -> list[list[int]]:
        """Prompts go in `cut` tokens at a time, and requests that are through decode beside those that are not."""
        done = [list(prompt) for prompt in prompts]
        seen = [0] * len(prompts)
        while waiting := [r for r, prompt in enumerate(prompts) if len(done[r]) < len(prompt) + new_tokens]:
            pieces = {r: (seen[r], done[r][seen[r] : seen[r] + cut]) for r in waiting}
            for request, token in self.step(pieces).items():
                seen[request] += len(pieces[request][1])
                if seen[request] == len(done[request]):
                    done[request].append(token)
        return done


@pytest.fixture(params=sorted(SERVING_ENGINES))
def engine(request):
    """The name of an engine, whose attention is registered as the engine does it; stand-ins are put into `running`."""
    running = []
    ALL_ATTENTION_FUNCTIONS[request.param] = lambda *args, **kwargs: running[-1](*args, **kwargs)
    yield request.param, running
    del ALL_ATTENTION_FUNCTIONS[request.param]


def make_served(engine: str, loaded_loops: int | None, **fields) -> LoopedForCausalLM:
    """A model as an engine makes it: the depth is in the configuration before there is a model."""
    config = make_config(**fields)
    if loaded_loops is not None:
        config = LoopedConfig.from_dict(config.to_dict(), num_loops=loaded_loops)
    torch.manual_seed(0)
    return LoopedForCausalLM._from_config(config, attn_implementation=engine).eval()


def check_attention(module) -> None:
    """The source of `forward` gets the attention function under a local name and calls it once, with `scaling`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    names = [
        target.id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
        and node.value is not None
        and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
    ]
    assert len(names) == 1
    [call] = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == names[0]]
    [scaling] = [keyword.value for keyword in call.keywords if keyword.arg == "scaling"]
    assert isinstance(scaling, ast.Attribute)
    assert ast.unparse(scaling.value) == "self"
    assert isinstance(vars(module)[scaling.attr], float)


@pytest.mark.parametrize("loaded_loops", [None, 1, 5])
@pytest.mark.parametrize("shape", SERVED)
def test_every_slot_is_declared_by_one_attention(shape, loaded_loops, engine):
    model = make_served(engine[0], loaded_loops, **SERVED[shape])
    attentions = [module for module in model.modules() if isinstance(vars(module).get("layer_idx"), int)]
    assert sorted(module.layer_idx for module in attentions) == list(range(model.config.num_hidden_layers))
    for name, module in model.named_modules():
        if module in attentions:  # vLLM sorts its caches by the one number in a name
            assert sum(part.isdecimal() for part in name.split(".")) == 1
    for module in attentions:
        check_attention(module)
        assert module.config._attn_implementation == engine[0]
        assert not list(module.parameters())
    assert all(vars(module).get("is_causal", True) for module in model.modules())
    assert model._supports_attention_backend
    assert {"AutoConfig", "AutoModel"} <= set(model.config.auto_map)
    assert {"input_ids", "inputs_embeds", "position_ids"} <= set(inspect.signature(LoopedModel.forward).parameters)
    assert model.config.loop_num == 1
    assert "loop_num" not in model.config.to_dict()


@pytest.mark.parametrize("shape", SERVED)
def test_an_engine_that_keeps_keys_by_slot_generates_what_generate_does(shape, engine):
    name, running = engine
    loaded_loops = 5 if name == "vllm" else None
    model = make_served(name, loaded_loops, **SERVED[shape])
    twin = LoopedForCausalLM._from_config(copy.deepcopy(model.config), attn_implementation="sdpa").eval()
    twin.load_state_dict(model.state_dict())
    prompts = [make_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (3, 9, 6)]
    expected = [twin.generate(torch.tensor([p]), max_new_tokens=6, **GREEDY)[0].tolist() for p in prompts]
    for cut in (2, 20):
        running.append(StandInEngine(model))
        assert running[-1].generate(prompts, 6, cut) == expected
    assert len({slot for slot, _ in running[-1].kept}) == model.config.num_hidden_layers


@pytest.mark.parametrize("kv_sharing", ["last", "mean", "gated", "natural"])
def test_a_policy_that_an_engine_cannot_keep_is_refused_at_load(kv_sharing, engine):
    with pytest.raises(ValueError, match=rf"kv_sharing='{kv_sharing}' .* and {engine[0]} (cuts|expects)"):
        make_served(engine[0], None, kv_sharing=kv_sharing)
    model = LoopedForCausalLM(make_config(kv_sharing=kv_sharing))
    model.set_attn_implementation(engine[0])
    with pytest.raises(ValueError, match=f"and {engine[0]} (cuts|expects)"):
        model(make_ids(), use_cache=False)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_loops": torch.tensor([1, 2, 3])}, "num_loops=tensor.* cannot be asked of"),
        (
            {"num_loops": 4},
            "num_loops=4 cannot be asked of .* config.num_loops=3: set the depth when the model is loaded",
        ),
        ({"halting": "kl"}, "a halting rule would leave out"),
    ],
)
def test_a_depth_per_row_or_call_is_refused(asked, said, engine):
    model = make_served(engine[0], None)
    with pytest.raises(ValueError, match=said):
        model(make_ids(), use_cache=False, **asked)
