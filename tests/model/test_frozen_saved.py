"""The saved form of a looped frozen model: settings and the base model's name, no weights."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from data_builders.tokenizers import hop_tokenizer
from families import make_frozen, make_tokens
from hub_server import TOKEN, LocalHub
from modeling_looped.frozen_looped import FrozenLoopedForCausalLM, attach, detach, looped
from toys import shipped_with

STRANGER = """
import sys, warnings
warnings.simplefilter("error")
sys.path = [p for p in sys.path if "site-packages" in p or "lib/python" in p]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import torch
from transformers import AutoModelForCausalLM
try:
    import modeling_looped
    raise SystemExit("the repository is importable: the test shows nothing")
except ModuleNotFoundError:
    pass
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
deeper = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, num_loops=6, dtype=torch.bfloat16)
assert deeper.loop.config.num_loops == 6 and deeper.dtype == torch.bfloat16
ids = torch.tensor([[5, 6, 7, 8]])
print([model.generate(ids, max_new_tokens=5, do_sample=False, **k).tolist() for k in ({}, {"num_loops": 1})])
model.save_pretrained(sys.argv[1] + "/again")
"""


@pytest.fixture
def base(tmp_path):
    """A base model loaded by name."""
    make_frozen("llama", dtype=torch.float32).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_a_saved_loop_holds_no_weights_and_loads_as_the_same_model(base, tmp_path):
    ids, folder = make_tokens(), tmp_path / "saved"
    settings = {"window": (2, 4), "num_loops": 4, "method": "heun", "beta": 0.25, "decode": 2, "prefill": "iterated"}
    attach(base, **settings).save_pretrained(folder)
    files = {path.name for path in folder.iterdir()}
    assert files == {"config.json", "generation_config.json"} | shipped_with("frozen_looped")
    saved = json.loads((folder / "config.json").read_text())
    assert saved["base_model"] == str(tmp_path / "base")
    assert saved["window"] == [2, 4]
    assert saved["architectures"] == ["FrozenLoopedForCausalLM"]
    expected = base(ids).logits
    for loaded in (AutoModelForCausalLM.from_pretrained(folder), FrozenLoopedForCausalLM.from_pretrained(folder)):
        assert torch.equal(loaded(ids).logits, expected)
        assert {name: getattr(loaded.loop.config, name) for name in settings} == settings | {"window": [2, 4]}
        assert type(detach(loaded)).__name__ == "LlamaForCausalLM"
    attach(loaded, **settings).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()


def test_the_generation_configuration_is_kept_with_its_loop_count(base, tmp_path):
    """A field of ours in a configuration derived from a model is lost on reload."""
    attach(base, (2, 4), 2)
    base.generation_config.num_loops = 5
    base.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.generation_config.to_dict()["num_loops"] == 5
    (tmp_path / "saved" / "generation_config.json").unlink()
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", num_loops=3)
    assert "num_loops" not in bare.generation_config.to_dict()
    assert bare.loop.config.num_loops == 3


def test_the_base_model_may_be_renamed_and_pinned(base, tmp_path):
    attach(base, (2, 4)).save_pretrained(tmp_path / "saved", base_model="someone/model", base_revision="abc123")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert (config.base_model, config.base_revision) == ("someone/model", "abc123")


def test_a_base_model_without_a_name_is_refused_and_nothing_is_written(tmp_path):
    with looped(make_frozen("llama")) as model, pytest.raises(ValueError, match="base_model is empty"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_changed_weights_are_not_lost(base, tmp_path):
    """A wrapper holds no weights: saving one after training would silently throw the training away."""
    attach(base, (2, 4))
    optimizer = torch.optim.SGD(base.parameters(), lr=0.1)
    base(make_tokens(), labels=make_tokens()).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="weights were changed"):
        base.save_pretrained(tmp_path / "saved")
    detach(base).save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, FrozenLoopedForCausalLM])
def test_the_base_model_gets_its_own_keywords(base, tmp_path, kind):
    """The wrapper's configuration kept attn_implementation (and, loaded directly, dtype) to itself."""
    attach(base, (2, 4)).save_pretrained(tmp_path / "saved")
    loaded, info = kind.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", dtype=torch.bfloat16, output_loading_info=True
    )
    assert loaded.config._attn_implementation == "eager"
    assert loaded.dtype == torch.bfloat16
    assert loaded.loop.config.window == [2, 4]
    assert not info["missing_keys"]
    assert kind.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


def test_a_model_that_is_no_causal_lm_is_not_saved_as_one(base, tmp_path):
    """A classifier came back as a language model with a random head."""
    AutoModelForSequenceClassification.from_config(base.config).save_pretrained(tmp_path / "classifier")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    with looped(model, (2, 4)), pytest.raises(ValueError, match="is not: detach"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_saved_form_cannot_be_made_without_a_base_model():
    with pytest.raises(TypeError, match="use from_pretrained"):
        FrozenLoopedForCausalLM(None)


ELSEWHERE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
question = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("e1 r0 r1", return_tensors="pt")
print(model.generate(**question, max_new_tokens=5, do_sample=False).tolist())
"""


def with_tokenizer(folder):
    """A base model of relative name with a tokenizer, and what it says."""
    make_frozen("llama", dtype=torch.float32).save_pretrained(folder)
    hop_tokenizer(4, 2).save_pretrained(folder)


@pytest.mark.parametrize("how", ["wrapper moved", "both moved", "base inside"])
def test_a_wrapper_that_was_moved_finds_its_base_model_and_has_its_tokenizer(how, tmp_path, monkeypatch):
    """From any working folder, also where the base model was loaded by a relative name."""
    place = tmp_path / "here"
    with_tokenizer(place / "base")
    monkeypatch.chdir(place)
    model = attach(AutoModelForCausalLM.from_pretrained("base"), (2, 4), 4)
    model.save_pretrained("saved", save_base=how == "base inside")
    ids = AutoTokenizer.from_pretrained("base")("e1 r0 r1", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=5, do_sample=False)
    monkeypatch.chdir(tmp_path)
    if how == "both moved":
        place.rename(tmp_path / "there")
    else:
        (tmp_path / "there").mkdir()
        (place / "saved").rename(tmp_path / "there" / "saved")
    if how == "base inside":
        shutil.rmtree(place)
    folder = tmp_path / "there" / "saved"
    assert AutoTokenizer.from_pretrained(folder)("e1 r0 r1")["input_ids"] == ids["input_ids"][0].tolist()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.generate(**ids, max_new_tokens=5, do_sample=False).equal(expected)
    loaded.save_pretrained(tmp_path / "again", save_base=how == "base inside")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.generate(**ids, max_new_tokens=5, do_sample=False).equal(expected)
    if how == "base inside":
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
        run = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, str(folder)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.strip().splitlines()[-1] == str(expected.tolist())


def test_a_base_model_that_is_gone_is_named_with_both_its_places(base, tmp_path):
    attach(base, (2, 4)).save_pretrained(tmp_path / "saved")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"neither .*saved/\.\./base nor .*base: give its folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for kind in (AutoModelForCausalLM, FrozenLoopedForCausalLM):
        found = kind.from_pretrained(tmp_path / "saved", base_model=str(tmp_path / "elsewhere"))
        assert found.loop.config.window == [2, 4]


def test_another_base_model_is_taken_also_where_the_saved_one_is_there(base, tmp_path):
    attach(base, (2, 4)).save_pretrained(tmp_path / "saved")
    other = make_frozen("llama", dtype=torch.float32)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for given in ({}, {"config": AutoConfig.from_pretrained(tmp_path / "saved")}):
        found = FrozenLoopedForCausalLM.from_pretrained(
            tmp_path / "saved", base_model=str(tmp_path / "other"), **given
        )
        assert found.lm_head.weight.equal(other.lm_head.weight)


def test_the_configuration_of_a_caller_stays_as_it_is(base, tmp_path):
    attach(base, (2, 4)).save_pretrained(tmp_path / "saved", save_base=True)
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    before = config.to_dict()
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved", config=config)
    assert config.to_dict() == before


PUSHING = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from modeling_looped.frozen_looped import attach
model = attach(AutoModelForCausalLM.from_pretrained("base"), (2, 4), 4)
model.save_pretrained(Path("saved"), push_to_hub=True, save_base=True, private=True)
(Path("saved") / "notes.txt").write_text("of the user")
model.save_pretrained(Path("saved"), push_to_hub=True, save_base=True, repo_id="tester/again", commit_message="Go on")
ids = torch.tensor([[3, 4, 5]])
loaded = AutoModelForCausalLM.from_pretrained("tester/saved", trust_remote_code=True)
assert loaded(ids).logits.equal(model(ids).logits)
"""


@pytest.mark.slow
def test_all_that_is_written_is_pushed(tmp_path):
    """Only what was written after the configuration began was: the base model inside stayed behind."""
    with_tokenizer(tmp_path / "base")
    hub = LocalHub(tmp_path / "hub")
    places = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", **places}
    command = [sys.executable, "-c", PUSHING]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL
        )
        assert run.returncode == 0, run.stderr[-3000:]
        folder = tmp_path / "saved"
        written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "base_model/model.safetensors"} <= written
        for name in ("tester/saved", "tester/again"):
            assert set(hub.files("model", name)) - {".gitattributes"} == written - {"notes.txt"}
        assert hub.repositories["model", "tester/saved"].private
    finally:
        hub.close()


def test_a_folder_of_this_machine_is_not_pushed_as_a_base_model(base, tmp_path):
    with pytest.raises(ValueError, match="is a folder of this machine, which the Hub does not have"):
        attach(base, (2, 4)).save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


def test_a_model_without_a_name_can_be_saved_inside_of_its_wrapper(tmp_path):
    model = attach(make_frozen("llama", dtype=torch.float32), (2, 4), 3)
    model.save_pretrained(tmp_path / "saved", save_base=True)
    ids = make_tokens()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits.equal(model(ids).logits)


@pytest.mark.slow
def test_a_stranger_loads_a_saved_loop(base, tmp_path):
    ids = torch.tensor([[5, 6, 7, 8]])
    attach(base, (2, 4), 3, "naive").save_pretrained(tmp_path / "saved")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    here = [
        base.generate(ids, max_new_tokens=5, do_sample=False, **settings).tolist()
        for settings in ({}, {"num_loops": 1})
    ]
    assert json.loads(run.stdout.strip().splitlines()[-1]) == here
    assert {path.name for path in (tmp_path / "saved" / "again").iterdir()} == {
        "config.json",
        "generation_config.json",
        *shipped_with("frozen_looped"),
    }
