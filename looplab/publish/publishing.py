"""`looped publish RUN --repo-id USER/NAME [--dataset] [--space]`: put a run on the Hugging Face Hub.

`looped publish RUN --folder FOLDER` writes the files of the model to a folder instead.

    model      USER/NAME           model/, the records of the run below run/, figures/, and a card
    dataset    datasets/USER/NAME  with --dataset: the run's data as parquet, and a card; loading needs no code of ours
    Space      spaces/USER/NAME    with --space: the page with the loop slider (demo.py)
    collection                     joins them, if there is more than the model

Only named files are uploaded: checkpoints and other files in RUN stay on this machine. A repository changes in one
commit, or not at all. The commit also deletes files of an earlier publication that this one does not have, such as
weights in other shards; files that other people put there stay.

The commit of a model gets a tag that follows from weights, tokenizer and code (`revision_of`). The lines on the card
load this revision: transformers warns of every file of code that it downloads without one, and nobody who read the
code meets another.

To resume an upload that broke off, run the same command again: huggingface_hub sends only what the Hub lacks.
"""

import fnmatch
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from httpx2 import TransportError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from data_builders import export_parquet
from data_builders.builders import BUILDERS
from looplab.runs.digests import sha256_of
from looplab.runs.folder import TRAINED, Run
from looplab.runs.models import blaming, load_run_model
from looplab.runs.records import to_json
from looplab.runs.writing import whole_folder, write_whole
from looplab.tasks.card import Names
from looplab.tasks.registry import task_for, task_of

from .cards import dataset_card, model_card
from .demo import space_files

# Published files of a model folder beside weights and code, if it has them.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
INDEX = "model.safetensors.index.json"

TITLE = 59  # characters that the Hub allows in the title of a collection


@dataclass(frozen=True)
class Upload:
    """A repository and its files.

    Args:
        kind: "model", "dataset" or "space".
        files: path in the repository -> the file, or its bytes.
        own: patterns of paths that a publication writes; a file in the repository that matches one and is not in
            `files` is from an earlier publication.
        tag: of the commit, if it gets one.
    """

    kind: str
    repo_id: str
    files: dict[str, Path | bytes]
    own: tuple[str, ...]
    tag: str | None = None

    def sizes(self) -> dict[str, int]:
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }

    def url(self, api: HfApi) -> str:
        return f"{api.endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.repo_id}"

    def owns(self, path: str) -> bool:
        # Compared folder by folder: a star must not match a slash.
        parts = [(path.split("/"), pattern.split("/")) for pattern in self.own]
        return any(len(a) == len(b) and all(map(fnmatch.fnmatchcase, a, b)) for a, b in parts)

    def send(self, api: HfApi, private: bool) -> str:
        """Change the repository to `files` in one commit; returns the commit."""
        space = {"space_sdk": "gradio"} if self.kind == "space" else {}
        # private=False would make a repository public that an organisation makes private by default.
        api.create_repo(self.repo_id, repo_type=self.kind, private=private or None, exist_ok=True, **space)
        there = api.list_repo_files(self.repo_id, repo_type=self.kind)
        operations = [CommitOperationDelete(path) for path in there if path not in self.files and self.owns(path)]
        operations += [CommitOperationAdd(path, content) for path, content in self.files.items()]
        commit = api.create_commit(
            self.repo_id, operations, repo_type=self.kind, commit_message=f"Publish the {self.kind} with looped"
        )
        if self.tag:
            api.create_tag(self.repo_id, tag=self.tag, revision=commit.oid, repo_type=self.kind, exist_ok=True)
        return commit.oid


def publish(
    run: Run,
    repo_id: str,
    *,
    dataset: bool = False,
    space: bool = False,
    private: bool = False,
    dry_run: bool = False,
    licence: str | None = None,
    data_licence: str | None = None,
    base_model: str | None = None,
    api: HfApi | None = None,
) -> dict[str, str]:
    """Upload a run, and print the files of each repository; returns kind of repository -> commit.

    Args:
        run: a finished and evaluated one.
        repo_id: "USER/NAME" of all repositories; USER may be an organisation.
        dataset, space: also publish the run's data, and a page that shows the model.
        private: make new repositories private; an existing repository must be private already.
        dry_run: print only, without network or token, and the cards as they would be.
        licence: of the model, as the Hub spells it; apache-2.0 unless given.
        data_licence: of the data; for generated data, the licence of the model unless given.
        base_model: "USER/NAME" of the model whose weights the run started from; the card links to it.
        api: the Hub; the one in huggingface_hub's settings (HF_ENDPOINT, HF_TOKEN) unless given.

    Raises:
        ValueError: `repo_id` has no user; there is no token, or it has no access to USER; the run has not finished or
            was not evaluated, or its task cannot be published; a licence that only the user can know is missing; a
            repository is public although `private` is asked for; the Hub refuses the card or cannot be reached.
        OSError: the Hub refuses a request, or a disk error.
    """
    api = api or HfApi()
    user = user_of(repo_id)
    names = names_of(run, repo_id, dataset, space, licence, data_licence, base_model)
    kinds = ["model"]
    if dataset:
        kinds.append("dataset")
    if space:
        kinds.append("space")
    try:
        if not dry_run:
            check_access(api, user)
            for kind in kinds if private else []:
                check_private(api, repo_id, kind)
        with ExitStack() as stack:
            uploads = [model_upload(run, names)]
            if dataset:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                # The data go first, since the card of the model names them.
                uploads.insert(0, dataset_upload(run, names, place))
            if space:
                files = {name: text.encode() for name, text in space_files([run], [repo_id]).items()}
                uploads.append(Upload("space", repo_id, files, own=()))
            print(plan(run, uploads, api, private, dry_run))
            commits = {} if dry_run else {upload.kind: upload.send(api, private) for upload in uploads}
        if len(commits) > 1:
            print(f"collection  {collect(api, user, repo_id, list(commits), private)}")
    except TransportError as error:
        raise ValueError(f"{api.endpoint} cannot be reached ({error}): run the same command again later.") from error
    for upload in uploads if commits else []:
        print(f"{upload.kind:<11} {upload.url(api)} at commit {commits[upload.kind]}")
    return commits


def write_folder(run: Run, folder: Path, licence: str | None = None, base_model: str | None = None) -> None:
    """Write what `publish` would send of the model to a new folder, whose card loads it from there.

    Arguments and errors are those of `publish`, and ValueError where there is a `folder`. The models that come with
    this package are made so.
    """
    names = names_of(run, folder.as_posix(), False, False, licence, None, base_model)
    upload = model_upload(run, names, pinned=False)
    with whole_folder(folder) as place:
        for path, content in upload.files.items():
            write_whole(place / path, content if isinstance(content, bytes) else content.read_bytes())
    print(f"{folder}: {sum(upload.sizes().values()):,} bytes in {len(upload.files)} files")


def user_of(repo_id: str, option: str = "--repo-id") -> str:
    """USER of "USER/NAME". Raises ValueError, with the option, if there is none."""
    validate_repo_id(repo_id)
    user, slash, _ = repo_id.partition("/")
    if not slash:
        raise ValueError(f"{option} must be USER/NAME, got {repo_id!r}: put the user's name on the Hub before it.")
    return user


def names_of(
    run: Run,
    repo_id: str,
    dataset: bool,
    space: bool,
    licence: str | None,
    data_licence: str | None,
    base_model: str | None,
) -> Names:
    """Repositories and licences of a publication. Raises ValueError if a licence is missing that must be given, or if
    a base model is given and the run started from none."""
    task = task_for("publish", [run])
    start = run.recipe()["init_from"]
    if licence is None and start is not None:
        raise ValueError(f"{run} started from the weights of {start}, whose licence binds it: name it by --license.")
    if base_model is not None:
        user_of(base_model, "--base-model")
        if start is None:
            raise ValueError(f"{run} started from no other weights: leave --base-model out.")
    names = Names(repo_id, licence or "apache-2.0", base_model=base_model, space_id=repo_id if space else None)
    if not dataset:
        return names
    if task.name not in BUILDERS:
        raise ValueError(f"--dataset publishes what a builder made, and the task {task.name} has none: leave it out.")
    task.Data.of(run).check_published()
    if data_licence is None:
        preset, _ = task.Data.of(run).preset()
        data_licence = task.data_licence(preset, names.licence)
    if data_licence is None:
        raise ValueError(
            f"--dataset would publish the {task.name} that {run} was trained on, under a licence that is not "
            "known here: name it by --dataset-license, or leave --dataset out."
        )
    return replace(names, dataset_id=repo_id, data_licence=data_licence)


def check_access(api: HfApi, user: str) -> None:
    """Raise ValueError unless there is a token that may write for `user`."""
    if (api.token or get_token()) is None:
        raise ValueError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN; --dry-run needs none.")
    try:
        whoami = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise ValueError("the Hub does not know this token: run `hf auth login` with a new one.") from error
    if whoami.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            "this token may only read: make one that may write at https://huggingface.co/settings/tokens."
        )
    known = [whoami["name"], *(organisation["name"] for organisation in whoami.get("orgs", []))]
    if user not in known:
        raise ValueError(f"the token is for {', '.join(known)}, and --repo-id names {user}: change one of them.")


def check_private(api: HfApi, repo_id: str, kind: str) -> None:
    """Raise ValueError if the repository exists and is public."""
    try:
        info = api.repo_info(repo_id, repo_type=kind)
    except RepositoryNotFoundError:
        return
    if not info.private:
        raise ValueError(
            f"the {kind} {repo_id} exists and is public: make it private in its settings, or leave --private out."
        )


def model_upload(run: Run, names: Names, pinned: bool = True) -> Upload:
    """The model repository. Raises ValueError if the run has not finished, or was not evaluated.

    pinned: the card loads the revision that the commit gets as a tag.
    """
    with blaming(run.model_folder(), run.again, leave=(ValueError, OSError)):
        files = {path.name: path for path in model_files(run.model_folder())}
    names = replace(names, revision=revision_of(files.values()) if pinned else None)
    card = model_card(run, names)
    check_measured(run)
    task = task_of([run])
    names_of_records = [*TRAINED, "run.json", *(record.name for record in task.records)]
    files |= {f"run/{name}": own_file(run.folder, name) for name in names_of_records if (run.folder / name).is_file()}
    note = run.note()
    if note:  # without the folder of this machine where the training began
        files["run/run.json"] = to_json({name: note[name] for name in note if name != "folder"}).encode()
    if (run.folder / "records" / "index.json").is_file():
        files["run/records/index.json"] = own_file(run.folder / "records", "index.json")
    figures = {f"figures/{name}.png": own_file(run.folder / "figures", f"{name}.png") for name in task.figures}
    files |= {path: file for path, file in figures.items() if file.is_file()}
    own = ("*.safetensors", INDEX, "*_looped.py", "run/*", "run/records/index.json", "figures/*.png", *MODEL_FILES)
    return Upload("model", names.model_id, {"README.md": str(card).encode(), **files}, own, names.revision)


def revision_of(files: Iterable[Path]) -> str:
    """The tag of a model with these files: it follows from their names and bytes."""
    lines = sorted(f"{path.name} {sha256_of(path)}\n" for path in files)
    return f"model-{hashlib.sha256(''.join(lines).encode()).hexdigest()[:8]}"


def own_file(folder: Path, name: str) -> Path:
    """The path `folder`/`name`. Raises ValueError if it is a link out of the folder: such files are not published."""
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{path} is not in {folder} but leads to {path.resolve()}: take it out, it is not published.")
    return path


def check_measured(run: Run) -> None:
    """Raise ValueError unless the weights are whole and every published record and figure was made with them."""
    load_run_model(run)
    run.check_summary()
    task = task_of([run])
    verbs = {record.name: record.verb for record in task.records}
    verbs |= {f"figures/{name}.png": figure.verb for name, figure in task.figures.items()}
    for name, verb in verbs.items():
        if (run.folder / name).is_file():
            run.check_record(name, f"run `looped {verb} {run}` again, or delete it.", strict=True)


def model_files(folder: Path) -> Iterator[Path]:
    """The files that a saved model is loaded from; other files in the folder are not published."""
    yield from (own_file(folder, name) for name in MODEL_FILES if (folder / name).is_file())
    if (folder / INDEX).is_file():
        yield own_file(folder, INDEX)
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        yield from (own_file(folder, name) for name in sorted(set(shards)))
    else:
        yield own_file(folder, "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    modules = {f"{reference.rpartition('.')[0]}.py" for reference in config["auto_map"].values()}
    for module in sorted(modules):
        yield own_file(folder, module)
    code = {Path(file).name for module in modules for file in get_relative_import_files(folder / module)}
    yield from (own_file(folder, name) for name in sorted(code - modules))


def dataset_upload(run: Run, names: Names, place: Path) -> Upload:
    """The dataset repository; its parquet files are written to `place`."""
    data = task_of([run]).Data.of(run)
    preset, fields = data.preset()
    splits = data.splits_of(run)
    run.check_data(splits)
    export_parquet(data.builder, preset, place, splits=splits, **fields)
    exported = DatasetCard.load(place / "README.md")
    card = dataset_card(run, names, exported, splits)
    files = {path.relative_to(place).as_posix(): path for path in sorted(place.glob("*/*.parquet"))}
    return Upload("dataset", names.dataset_id, {"README.md": str(card).encode(), **files}, ("*/*.parquet",))


def collect(api: HfApi, user: str, repo_id: str, kinds: list[str], private: bool) -> str:
    """Put the repositories into a collection with the name of the model; returns its address."""
    title = repo_id.partition("/")[2][:TITLE]
    collection = api.create_collection(title, namespace=user, private=private, exists_ok=True)
    for kind in kinds:
        api.add_collection_item(collection.slug, item_id=repo_id, item_type=kind, exists_ok=True)
    return collection.url


def plan(run: Run, uploads: list[Upload], api: HfApi, private: bool, dry_run: bool) -> str:
    """The upload as text: repositories, files and sizes in bytes; in a dry run, the text of every card, too."""
    lines = [f"{run}{': nothing is sent, this is what would be' if dry_run else ''}"]
    for upload in uploads:
        sizes = upload.sizes()
        seen = "private" if private else "public, unless it exists and is private"
        lines += ["", f"{upload.kind:<11} {upload.url(api)}  ({seen})"]
        lines += [f"{size:>13,} {path}" for path, size in sizes.items()]
        lines += [f"{sum(sizes.values()):>13,} bytes in {len(sizes)} files, in one commit; files of an earlier "
                  f"publication that are not among them are deleted"]  # fmt: skip
        lines += [f"{'':>13} The commit gets the tag {upload.tag}, which its card loads."] if upload.tag else []
        if dry_run:
            card = upload.files["README.md"].decode().strip("\n")
            lines += ["", f"----- README.md of the {upload.kind}, its card -----", card, "----- the end of it -----"]
    if private and any(upload.kind == "space" for upload in uploads):
        lines += ["", "The Space can read the private model once its settings have a secret HF_TOKEN that may."]
    if len(uploads) > 1:
        lines += ["", f"collection  {uploads[0].repo_id.partition('/')[2][:TITLE]}  of these {len(uploads)}"]
    return "\n".join(lines) + "\n"
