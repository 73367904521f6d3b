"""One law of loop counts (`depth_looped.py`), whoever runs the model: the call's argument, its generation config, what
was set in memory, what was given at load, what was saved, in this order."""

import itertools
import json

import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    pipeline,
)

from data_builders.tokenizers import hop_tokenizer
from looplab.pretrained.harness import settle_depth
from modeling_looped import FrozenLoopedForCausalLM, LoopedConfig, LoopedForCausalLM, attach
from toys import make_config, make_ids, make_model

IN_FILE = 3
ARGUMENT, GIVEN, IN_MEMORY, CONFIG, AT_LOAD, SAVED = 10, 9, 8, 7, 6, 5
IDS = torch.tensor([[4, 7, 9, 5]])
GREEDY = {"max_new_tokens": 1, "do_sample": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(kind, saved) -> a folder whose configuration says IN_FILE, whose generation config SAVED or nothing."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_hidden_layers=4,
            pad_token_id=0,
        )
    ).save_pretrained(root / "base")
    made = {}
    for saved in (None, SAVED):
        settings = {} if saved is None else {"num_loops": saved}
        looped = make_model(vocab_size=len(tokenizer), num_loops=IN_FILE)
        frozen = attach(LlamaForCausalLM.from_pretrained(root / "base"), (1, 2), num_loops=IN_FILE)
        for kind, model in (("looped", looped), ("frozen", frozen)):
            model.generation_config = GenerationConfig(pad_token_id=0, **settings)
            folder = root / f"{kind}-{saved}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind, saved] = folder
    return made


def load(folder, at_load, auto):
    classes = {"looped": LoopedForCausalLM, "frozen": FrozenLoopedForCausalLM}
    model_class = AutoModelForCausalLM if auto else classes[folder.name.split("-")[0]]
    return model_class.from_pretrained(folder, **({} if at_load is None else {"num_loops": at_load}))


class Loops:
    """Loops of the first call of `model`: evaluations of the core, or of the looped window."""

    def __init__(self, model):
        self.calls, self.counts = 0, []
        first = model.model.layers[1] if hasattr(model, "loop") else model.model.core[0]
        first.register_forward_pre_hook(self.count)
        model.model.register_forward_hook(self.close)

    def count(self, module, args):
        self.calls += 1

    def close(self, module, args, output):
        self.counts.append(self.calls)
        self.calls = 0

    @property
    def first(self) -> int:
        return self.counts[0]


def call_forward(model, folder, argument, given):
    model(IDS, num_loops=argument)


def call_generate(model, folder, argument, given):
    settings = {} if given is None else {"generation_config": GenerationConfig(num_loops=given)}
    model.generate(IDS, num_loops=argument, **settings, **GREEDY)


def call_pipeline(model, folder, argument, given):
    generator = pipeline("text-generation", model=model, tokenizer=hop_tokenizer(20, 4))
    settings = {} if given is None else {"generation_config": GenerationConfig(num_loops=given, **GREEDY)}
    settings |= {} if argument is None else {"num_loops": argument}
    generator("e1 r2", **(settings | ({} if given else GREEDY)))


def call_trainer(model, folder, argument, given):
    settings = GREEDY if given is None else {"generation_config": GenerationConfig(num_loops=given, **GREEDY)}
    arguments = Seq2SeqTrainingArguments(
        folder / "trainer", predict_with_generate=True, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Seq2SeqTrainer(model, arguments)
    trainer.predict([{"input_ids": IDS[0]}], num_loops=argument, **settings)


def call_harness(model, folder, argument, given):
    harness = HFLM(pretrained=model, tokenizer=hop_tokenizer(20, 4))
    settings = {} if given is None else {"generation_config": GenerationConfig(num_loops=given)}
    harness._model_generate(IDS, max_length=5, stop=[], num_loops=argument, **settings)


GENERATING = {
    "generate": call_generate, "pipeline": call_pipeline, "trainer": call_trainer, "harness": call_harness,
}  # fmt: skip
LEVELS = ("argument", "given", "in_memory", "config", "at_load", "saved")
COUNTS = dict(zip(LEVELS, (ARGUMENT, GIVEN, IN_MEMORY, CONFIG, AT_LOAD, SAVED), strict=True))


def subsets():
    """Every set of levels that say a count, and the count that holds."""
    for said in itertools.product((False, True), repeat=len(LEVELS)):
        counts = {level: COUNTS[level] if says else None for level, says in zip(LEVELS, said, strict=True)}
        yield counts, next((count for count in counts.values() if count is not None), IN_FILE)


def run(folders, kind, counts, call, auto=False) -> int:
    folder = folders[kind, counts["saved"]]
    model = load(folder, counts["at_load"], auto)
    if counts["config"] is not None:
        (model.loop.config if kind == "frozen" else model.config).num_loops = counts["config"]
    if counts["in_memory"] is not None:
        model.generation_config.num_loops = counts["in_memory"]
    loops = Loops(model)
    call(model, folder, counts["argument"], counts["given"])
    return loops.first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["looped", "frozen"])
def test_generate_follows_the_law(folders, kind):
    for counts, expected in subsets():
        assert run(folders, kind, counts, call_generate) == expected, counts


@pytest.mark.parametrize("kind", ["looped", "frozen"])
@pytest.mark.parametrize("name", [name for name in GENERATING if name != "generate"])
def test_what_calls_generate_follows_the_law(folders, kind, name):
    """Each level alone, and each with the one below it: a pipeline copies the generation config."""
    cases = [case for case in subsets() if 1 <= sum(count is not None for count in case[0].values()) <= 2]
    cases = [
        (counts, expected)
        for counts, expected in cases
        for said in [[level for level in LEVELS if counts[level] is not None]]
        if len(said) == 1 or LEVELS.index(said[1]) - LEVELS.index(said[0]) == 1
    ]
    for counts, expected in cases:
        assert run(folders, kind, counts, GENERATING[name], auto=True) == expected, counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["looped", "frozen"])
def test_forward_follows_the_law_without_generation_configs(folders, kind):
    for counts, _ in subsets():
        own = [counts[level] for level in ("argument", "config", "at_load") if counts[level] is not None]
        assert run(folders, kind, counts, call_forward) == next(iter(own), IN_FILE), counts


@pytest.mark.parametrize("kind", ["looped", "frozen"])
def test_the_harness_command_scores_at_the_depth_of_generate(folders, kind):
    """Choices are scored by `forward`, which knows no generation config."""

    def call(model, folder, argument, given):
        settle_depth(model)
        call_forward(model, folder, None, None)

    for counts, expected in subsets():
        if counts["argument"] is None and counts["given"] is None:
            assert run(folders, kind, counts, call) == expected, counts


def test_a_configuration_handed_over_is_one_in_memory(folders):
    """AutoModel loads the configuration by itself, and hands it to the model."""
    folder = folders["looped", SAVED]
    for config, expected in [
        (AutoConfig.from_pretrained(folder), SAVED),
        (AutoConfig.from_pretrained(folder, num_loops=AT_LOAD), AT_LOAD),
        (LoopedConfig.from_pretrained(folder), SAVED),
        (LoopedConfig.from_pretrained(folder, num_hidden_layers=2 * AT_LOAD), AT_LOAD),
        (make_config(vocab_size=LoopedConfig.from_pretrained(folder).vocab_size, num_loops=CONFIG), CONFIG),
    ]:
        model = LoopedForCausalLM.from_pretrained(folder, config=config)
        loops = Loops(model)
        model.generate(IDS, **GREEDY)
        assert loops.first == expected


@pytest.mark.parametrize("kind", ["looped", "frozen"])
def test_a_count_at_load_goes_before_that_of_a_configuration_handed_over(folders, kind):
    """The configuration of the caller stays as it is."""
    folder = folders[kind, SAVED]
    for config in (AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(folder, num_loops=CONFIG)):
        before = config.to_dict()
        for load_it in (AutoModelForCausalLM, type(load(folder, None, False)))[: 1 if kind == "frozen" else 2]:
            model = load_it.from_pretrained(folder, config=config, num_loops=AT_LOAD)
            loops = Loops(model)
            model.generate(IDS, **GREEDY)
            assert loops.first == AT_LOAD
            assert config.to_dict() == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["looped", "frozen"])
def test_what_runs_before_saving_runs_after_loading(folders, kind, tmp_path):
    for number, (counts, _) in enumerate(subsets()):
        if counts["argument"] or counts["given"]:
            continue
        model = load(folders[kind, counts["saved"]], counts["at_load"], auto=False)
        if counts["config"] is not None:
            (model.loop.config if kind == "frozen" else model.config).num_loops = counts["config"]
        if counts["in_memory"] is not None:
            model.generation_config.num_loops = counts["in_memory"]
        model.save_pretrained(tmp_path / str(number))
        again = load(tmp_path / str(number), None, auto=True)
        found = []
        for each in (model, again):
            loops = Loops(each)
            each.generate(IDS, **GREEDY)
            each(IDS)
            found.append((loops.counts[0], loops.counts[-1]))
        assert found[0] == found[1], counts


def test_a_saved_count_is_a_plain_number_in_files(folders, tmp_path):
    model = load(folders["looped", SAVED], None, auto=True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["num_loops"] == IN_FILE
    assert json.loads((tmp_path / "generation_config.json").read_text("utf-8"))["num_loops"] == SAVED
    assert model.config.num_loops == LoopedConfig.from_pretrained(tmp_path).num_loops == IN_FILE
    for config in (model.config, load(folders["frozen", SAVED], None, auto=True).loop.config):
        assert yaml.safe_load(yaml.safe_dump({"num_loops": config.to_dict()["num_loops"]})) == {"num_loops": IN_FILE}


@pytest.mark.parametrize("num_loops", [1, 2, 4, 8])
def test_a_depth_that_is_said_twice_must_be_one(num_loops, tmp_path):
    """`LoopedConfig(num_loops=8, num_hidden_layers=6)` was a model of 3 loops, in config.json too."""
    fields = {"num_core_layers": 2, "num_prelude_layers": 1}
    for kv_sharing in ("per_loop", "last"):
        layers = 1 + 2 * (num_loops if kv_sharing == "per_loop" else 1)
        said = {"num_loops": num_loops, "kv_sharing": kv_sharing, **fields}
        assert make_config(**said, num_hidden_layers=layers).num_loops == num_loops
        for other in (layers + 2, layers - 1):
            with pytest.raises(ValueError, match=f"num_hidden_layers={other} contradicts num_loops={num_loops}"):
                LoopedConfig(**said, num_hidden_layers=other)
    make_config(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_hidden_layers=11 contradicts num_loops=\d"):
        LoopedConfig.from_pretrained(tmp_path, num_loops=num_loops, num_hidden_layers=11)


@pytest.mark.parametrize(("old", "name"), [
    ({"rope_theta": 1e6}, "rope_theta"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta"),
])  # fmt: skip
def test_wavelengths_that_are_said_twice_must_be_one(old, name):
    new = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ValueError, match=rf"{name}=.* contradicts rope_parameters"):
        make_config(rope_parameters=new, **old)
    assert make_config(**old).rope_parameters.items() >= (old.get("rope_scaling") or old).items()
    assert make_config(rope_parameters=new, rope_theta=1e4).rope_parameters == new


@pytest.mark.parametrize("kv_sharing", ["per_loop", "last"])
@pytest.mark.parametrize("call", [
    {"num_loops": 1}, {"num_loops": 2}, {"num_loops": 5}, {"num_loops": torch.tensor([1, 5, 2])},
    {"num_loops": 5, "halting": {"rule": "latent", "threshold": 0.5}}, {"num_loops": 4, "chunks": True},
], ids=str)  # fmt: skip
def test_chosen_hidden_states_are_those_of_all(kv_sharing, call):
    """Negative indices count back from the last layer call that was made, not from the configuration's."""
    call = dict(call)
    chunks = {"prefill_chunk": 3} if call.pop("chunks", False) and kv_sharing == "last" else {}
    model, ids = make_model(kv_sharing=kv_sharing, num_coda_layers=1, **chunks), make_ids()
    every = model(ids, output_hidden_states=True, **call).hidden_states
    for chosen in (-1, [0], [-1], [-2, 1], [-len(every)], [-len(every) - 1], [0, len(every) - 1], [5, -3]):
        states = model(ids, output_hidden_states=chosen, **call).hidden_states
        indices = [chosen] if isinstance(chosen, int) else chosen
        kept = {range(len(every))[index] for index in indices if -len(every) <= index < len(every)}
        assert [state is not None for state in states] == [index in kept for index in range(len(every))]
        assert all(states[index].equal(every[index]) for index in kept)
        as_tuple = model.model(ids, output_hidden_states=chosen, return_dict=False, **call)
        assert isinstance(as_tuple, tuple)


@pytest.mark.parametrize("junk", ["x", 2.5, [2.5], ["a"], [True], [None], torch.tensor([1, 0]), {"a": 1}], ids=str)
def test_what_chooses_no_hidden_states_is_refused(junk):
    for model in (make_model(), make_model().model):
        with pytest.raises(ValueError, match=r"output_hidden_states must be a bool, an index or a list of indices"):
            model(make_ids(), output_hidden_states=junk)
