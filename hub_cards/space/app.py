"""A page with a loop slider: one question, and what a looped model answers after each of its loops.

    demo.json                                           beside this file: the models, and what they were trained on
    model(question repeated R times, num_loops=1 .. R)  one forward pass; batch row t is the model after t loops
    model(question, num_loops=R, halting={...})         the loops it runs until its answer has settled, R at most

The Space is this file, demo.json, requirements.txt and README.md; `looped demo RUN` writes and runs the same four.
Legend: R loops, K hops, T tokens, V vocabulary.
"""

import json
import random
from dataclasses import dataclass
from html import escape
from pathlib import Path

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

try:
    from rdkit import Chem, rdBase
    from rdkit.Chem.Draw import rdMolDraw2D
except ImportError:  # molecules are shown as text
    Chem = None

MOLECULES = 12  # that a click writes
MAX_TEXT = 1000  # characters of a question, or of a text's beginning
NEW_TOKENS = 200  # most tokens of a text
MANY, VERY_MANY = 9, 24  # columns: from here on their names stand upright, or are numbers
BEGINNING = "Once upon a time"
TEMPERATURE, TOP_K = 0.8, 40
ON_A_CLICK = {"show_progress": "hidden", "trigger_mode": "always_last"}

THEME = gr.themes.Default(primary_hue="indigo").set(block_info_text_color="*neutral_500")
CSS = """
.looped { --ink: var(--primary-600); color: var(--body-text-color); font-size: 14px; }
.looped p { margin: 4px 0; }
.looped .dim { opacity: 0.7; font-size: 13px; }
.looped .caption { min-height: 34px; line-height: 1.3; }
.looped .node { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 1px 8px; }
.looped .edge { opacity: 0.7; padding: 0 4px; }
.looped .path { line-height: 2.1; }
.looped .path span { white-space: nowrap; display: inline-block; line-height: 1.5; }
.looped .verdict { font-size: 19px; line-height: 1.4; }
.looped .right { color: #15803d; font-weight: 600; }
.dark .looped .right { color: #4ade80; }
.looped table { width: 100%; table-layout: fixed; border-collapse: separate; border-spacing: 1px; margin: 0; }
.looped th, .looped td { height: 22px; padding: 0; font-weight: 400; text-align: left; line-height: 1.1;
                         white-space: nowrap; overflow: hidden; border: 0; }
.looped thead th { height: 34px; vertical-align: bottom; }
.looped .many thead th + th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.looped .crowd thead th { font-size: 10px; overflow: visible; } .looped .crowd { border-spacing: 0; }
.looped .crowd td { border-radius: 0; }
.looped .text { font-size: 16px; line-height: 2.3; white-space: pre-wrap; overflow-wrap: anywhere; }
.looped .token { border-radius: 3px; position: relative; }
.looped .token sub { position: absolute; left: 0; right: 0; top: 1.6em; text-align: center; font-size: 9px;
                     opacity: 0.6; line-height: 1; white-space: nowrap; }
.looped .loop { width: 26px; text-align: right; padding-right: 6px; }
.looped tbody .loop { font-size: 12px; }
.looped .says { width: 44px; }
.looped .note { width: 92px; padding-left: 6px; }
.looped .bar { background: color-mix(in srgb, var(--ink) 10%, transparent); border-radius: 3px; }
.looped .bar div { height: 22px; line-height: 22px; border-radius: 3px; padding-left: 6px;
                   background: color-mix(in srgb, var(--ink) 45%, transparent); }
.looped .lens th { text-align: center; } .looped .lens .loop { text-align: right; }
.looped .lens td { border-radius: 2px; }
.looped .unused { opacity: 0.3; }
.looped .ended td { height: 18px; font-size: 12px; border-top: 2px dashed var(--ink); border-radius: 0; }
.looped .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 8px; }
.looped .card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 6px; }
.looped .card svg { width: 100%; height: auto; background: white; border-radius: 4px; }
.looped .card code { overflow-wrap: anywhere; white-space: normal; font-size: 12px; }
"""


# ---- hops: the question


@dataclass(frozen=True)
class Hops:
    """The section of demo.json about a hop model.

    Args:
        model: repo id or folder.
        text: one or two sentences about the model.
        facts: entity -> relation -> the entity that the relation leads to.
        trained_hops, trained_loops: smallest and largest count in training.
        max_hops, max_loops: ends of the sliders.
        chance: accuracy of guessing, a share in [0, 1].
        halting: rule and thresholds, as the model takes them.
    """

    model: str
    text: str
    facts: dict[str, dict[str, str]]
    trained_hops: tuple[int, int]
    trained_loops: tuple[int, int]
    max_hops: int
    max_loops: int
    chance: float
    halting: dict


def random_question(facts: dict, hops: int, draw: random.Random, words: list[str] | None = None) -> list[str]:
    """[entity, relation, ...] with `hops` relations. It begins with `words`, if these are a chain of the graph."""
    words = (words or [draw.choice(list(facts))])[: hops + 1]
    try:
        entity = follow(facts, words)[-1]
    except ValueError:
        words, entity = words[:1], words[0]
    words = list(words)
    while len(words) <= hops and facts.get(entity):
        words.append(draw.choice(list(facts[entity])))
        entity = facts[entity][words[-1]]
    return words


def follow(facts: dict, words: list[str]) -> list[str]:
    """The entities from the start to the answer. Raises ValueError if a relation leads nowhere, or there is none."""
    path = words[:1]
    for relation in words[1:]:
        known = facts.get(path[-1], {})
        if relation not in known:
            raise ValueError(f"From {path[-1]} there is no relation {relation}; there are {', '.join(known)}.")
        path.append(known[relation])
    if len(path) < 2:
        raise ValueError("Write at least one relation to follow, such as " + next(iter(facts[path[0]])) + ".")
    return path


def whole(what: str, number: float, most: int) -> int:
    """A slider's number, from 1 to `most`. Raises ValueError for any other value, which a program may have sent."""
    if not isinstance(number, int | float) or not 1 <= number <= most:
        raise ValueError(f"{what} go from 1 to {most}, got {str(number)[:20]}.")
    return int(number)


def read_question(hops: Hops, start: str, relations: str | None) -> list[str]:
    """[entity, relation, ...]. Raises ValueError for an unknown start, or a question longer than the page allows."""
    if len(relations or "") > MAX_TEXT:
        raise ValueError(f"Write at most {MAX_TEXT} characters, got {len(relations)}.")
    words = [start, *(relations or "").split()]
    if not isinstance(start, str) or start not in hops.facts:
        raise ValueError(f"There is no entity {str(start)[:20]} to start at.")
    if len(words) > hops.max_hops + 1:
        raise ValueError(f"Follow at most {hops.max_hops} relations, got {len(words) - 1}.")
    return words


# ---- hops: the model


def load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a repo id or folder, with the code that lies beside the weights."""
    loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    return loaded.eval(), AutoTokenizer.from_pretrained(model, trust_remote_code=True)


@torch.inference_mode()
def probabilities(model: PreTrainedModel, input_ids: torch.Tensor, num_loops: int) -> torch.Tensor:
    """Probabilities (R, T, V) of the next word at each word of `input_ids` (1, T), after 1 .. R loops."""
    depths = torch.arange(1, num_loops + 1, device=input_ids.device)
    return model(input_ids.repeat(num_loops, 1), num_loops=depths, use_cache=False).logits.float().softmax(-1)


@torch.inference_mode()
def loops_taken(model: PreTrainedModel, input_ids: torch.Tensor, num_loops: int, halting: dict) -> int:
    """The loops that the model runs until its answer has settled, `num_loops` at most."""
    output = model(input_ids, num_loops=num_loops, halting=halting, logits_to_keep=1, use_cache=False)
    return int(output.loops_used[0, -1])


@dataclass(frozen=True)
class Answer:
    """One question, answered after every loop.

    Args:
        path: K + 1 entities, from the start to the answer.
        says: the model's answer after each of R loops.
        sure: the probability that the model gives each of these answers.
        columns: for each word of the question but the first, the entity that the chain has reached there.
        lens: (R, columns), the probability that the model gives the entity of each column.
        used: the loop after which the answer is read.
    """

    path: list[str]
    says: list[str]
    sure: list[float]
    columns: list[str]
    lens: list[list[float]]
    used: int


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: dict,
    words: list[str],
    loops: int,
    halting: dict | None = None,
) -> Answer:
    """The model's answers to the question `words`. Raises ValueError if they are not a chain of the graph."""
    path = follow(facts, words)
    input_ids = tokenizer(" ".join(words), return_tensors="pt")["input_ids"].to(model.device)
    said = probabilities(model, input_ids, loops)
    sure, tokens = said[:, -1].max(-1)
    # If the tokenizer appends a readout token, the answer is expected there as well.
    columns = path[1:] + path[-1:] * (input_ids.shape[1] - len(path))
    targets = torch.tensor(tokenizer.convert_tokens_to_ids(columns), device=said.device)
    lens = said[:, torch.arange(1, len(columns) + 1), targets]
    used = loops_taken(model, input_ids, loops, halting) if halting else loops
    return Answer(path, tokenizer.convert_ids_to_tokens(tokens.tolist()), sure.tolist(), columns, lens.tolist(), used)


# ---- hops: what is shown


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def path_html(words: list[str], path: list[str]) -> str:
    steps = "".join(
        f'<span><span class="edge">{escape(relation)} &rarr;</span><span class="node">{escape(entity)}</span></span>'
        for relation, entity in zip(words[1:], path[1:], strict=True)
    )
    return (
        f'<div class="looped"><p class="dim">The true path, {len(path) - 1} hops</p>'
        f'<p class="path"><span class="node">{escape(path[0])}</span>{steps}</p></div>'
    )


def note(path: list[str], word: str) -> str:
    """Where the word that the model says lies on the path: at its end (right), at a hop, or nowhere."""
    if word == path[-1]:
        return '<span class="right">&#10003; right</span>'
    return f'<span class="dim">hop {path.index(word)} of {len(path) - 1}</span>' if word in path else ""


def verdict_html(result: Answer, halt: bool, hops: Hops) -> str:
    word, sure, total = result.says[result.used - 1], result.sure[result.used - 1], len(result.says)
    right = word == result.path[-1]
    verdict = '<span class="right">right</span>' if right else f"but it is {escape(result.path[-1])}"
    if not halt:
        spent = f"{total} loops used."
    elif result.used < total:
        spent = f"It halted: {result.used} of {total} loops used; pale lines show what more loops would have said."
    else:
        spent = f"It did not settle: all {total} loops used."
    return (
        f'<div class="looped"><p class="verdict">It says <b>{escape(word)}</b> ({percent(sure)}): {verdict}</p>'
        f'<p class="dim">{spent} Guessing is right in {percent(hops.chance)}. '
        f"Trained on {hops.trained_hops[0]} to {hops.trained_hops[1]} hops.</p></div>"
    )


def table_html(head: str, rows: list[str], result: Answer, trained: int, columns: int, kind: str) -> str:
    """A line per loop, pale for loops that halting spared, and a rule under the last trained loop.

    rows: the cells of each loop as HTML. columns: how many cells these are. kind: CSS class.
    """
    body = ""
    for loop, cells in enumerate(rows, start=1):
        if loop == trained + 1:
            body += (
                f'<tr class="ended"><td colspan="{columns + 1}">beyond the {trained} loops of the training</td></tr>'
            )
        unused = ' class="unused"' if loop > result.used else ""
        body += f'<tr{unused}><th class="loop" scope="row">{loop}</th>{cells}</tr>'
    head = f'<thead><tr><th class="loop" scope="col" title="loop">#</th>{head}</tr></thead>'
    return f'<table class="{kind}">{head}<tbody>{body}</tbody></table>'


def answers_html(result: Answer, trained: int) -> str:
    rows = [
        f'<td class="says">{escape(word)}</td><td class="bar"><div style="width: {100 * sure:.1f}%">{percent(sure)}'
        f'</div></td><td class="note">{note(result.path, word)}</td>'
        for word, sure in zip(result.says, result.sure, strict=True)
    ]
    head = '<th class="says">says</th><th>probability</th><th class="note"></th>'
    return (
        '<div class="looped"><p><b>The answer after every loop</b></p>'
        '<p class="dim caption">A line per loop: every loop runs the same layers once more.</p>'
        f"{table_html(head, rows, result, trained, 3, 'answers')}</div>"
    )


def lens_html(result: Answer, trained: int) -> str:
    rows = []
    for probability in result.lens:
        rows.append(
            "".join(
                f'<td style="background: color-mix(in srgb, var(--ink) {5 + 95 * share:.0f}%, transparent)" '
                f'title="{escape(entity)}: {percent(share)}"></td>'
                for entity, share in zip(result.columns, probability, strict=True)
            )
        )
    number = len(result.columns)
    crowd = number > VERY_MANY  # 60 names side by side cannot be read: hops 10, 20 .. are counted, cells have names
    names = ["" if hop % 10 else str(hop) for hop in range(1, number + 1)] if crowd else result.columns
    head = "".join(
        f'<th scope="col" title="{escape(entity)}">{escape(name)}</th>'
        for entity, name in zip(result.columns, names, strict=True)
    )
    kind = "lens crowd" if crowd else "lens many" if number > MANY else "lens"
    counted = " The numbers count relations; a cell tells its entity under the mouse." if crowd else ""
    return (
        '<div class="looped"><p><b>Inside: how far along the path</b></p>'
        '<p class="dim caption">A column per relation: how sure the model is there of the entity reached.'
        f"{counted}</p>"
        f"{table_html(head, rows, result, trained, len(result.columns), kind)}</div>"
    )


def problem_html(problem: str) -> str:
    return f'<div class="looped"><p class="verdict">{escape(problem)}</p></div>'


def rule_text(halting: dict) -> str:
    return f"{halting['rule']}: " + ", ".join(
        f"{name} {value:.3g}" for name, value in halting.items() if name != "rule"
    )


def html() -> gr.HTML:
    return gr.HTML(apply_default_css=False)


def hops_tab(hops: Hops, page: gr.Blocks) -> None:
    model, tokenizer = load(hops.model)
    trained = hops.trained_loops[1]
    first = random_question(hops.facts, min(hops.trained_hops[1] + 1, hops.max_hops), random.Random(0))

    def show(start, relations, loops, halt):
        try:
            words, count = read_question(hops, start, relations), whole("Loops", loops, hops.max_loops)
            result = answer(model, tokenizer, hops.facts, words, count, hops.halting if halt else None)
        except ValueError as error:  # the page or the model refuses the question
            return problem_html(str(error)), "", "", ""
        return (
            path_html(words, result.path),
            verdict_html(result, halt, hops),
            answers_html(result, trained),
            lens_html(result, trained),
        )

    def redraw(num_hops):
        start, *relations = random_question(hops.facts, int(num_hops), random.Random())
        return start, " ".join(relations)

    def resize(start, relations, num_hops):
        words = random_question(hops.facts, int(num_hops), random.Random(), [start, *relations.split()])
        return " ".join(words[1:])

    gr.Markdown(hops.text)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                start = gr.Dropdown(list(hops.facts), value=first[0], label="Start at", min_width=110)
                new = gr.Button("Random question", variant="primary", min_width=150)
            relations = gr.Textbox(
                " ".join(first[1:]), label="and follow these relations", max_lines=3, max_length=MAX_TEXT
            )
            num_hops = gr.Slider(
                1, hops.max_hops, len(first) - 1, step=1, label="Hops: how many relations", buttons=[]
            )
            loops = gr.Slider(
                1,
                hops.max_loops,
                trained,
                step=1,
                label="Loops: how long it thinks",
                info=f"Training ended at {trained} loops; beyond, the same weights run on.",
                buttons=[],
            )
            halt = gr.Checkbox(False, label="Halting: stop when the answer has settled", info=rule_text(hops.halting))
        with gr.Column(scale=3, min_width=300):
            path, verdict = html(), html()
            with gr.Row():
                with gr.Column(min_width=260):
                    answers = html()
                with gr.Column(min_width=260):
                    lens = html()
    question, shown = [start, relations, loops, halt], [path, verdict, answers, lens]
    gr.on([page.load, start.input, loops.change, halt.change], show, question, shown, api_name="ask", **ON_A_CLICK)
    new.click(redraw, num_hops, [start, relations], **ON_A_CLICK).then(show, question, shown, show_progress="hidden")
    num_hops.input(resize, [start, relations, num_hops], relations, **ON_A_CLICK).then(
        show, question, shown, show_progress="hidden"
    )
    gr.on(
        [relations.submit, relations.blur],
        lambda text: min(max(len(text.split()), 1), hops.max_hops),
        relations,
        num_hops,
        **ON_A_CLICK,
    ).then(show, question, shown, show_progress="hidden")


# ---- molecules


@dataclass(frozen=True)
class Molecules:
    """The section of demo.json about a molecule model; the fields are explained in `Hops`."""

    model: str
    text: str
    trained_loops: tuple[int, int]
    max_loops: int


@torch.inference_mode()
def write_molecules(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_loops: int, number: int = MOLECULES
) -> list[str]:
    """`number` SMILES, sampled with `num_loops` loops per token."""
    start = tokenizer([""] * number, return_tensors="pt").to(model.device)
    written = model.generate(
        **start,
        num_loops=num_loops,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        max_new_tokens=min(120, model.config.max_position_embeddings - start["input_ids"].shape[1]),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def drawing(smiles: str) -> str | None:
    """An SVG of the molecule; None if rdkit cannot read the SMILES."""
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles) if smiles else None
    if molecule is None:
        return None
    canvas = rdMolDraw2D.MolDraw2DSVG(200, 150)
    rdMolDraw2D.PrepareAndDrawMolecule(canvas, molecule)
    canvas.FinishDrawing()
    return canvas.GetDrawingText().partition("?>")[2]  # without the XML declaration


def molecules_html(written: list[str]) -> str:
    if Chem is None:
        drawings, verdict = [""] * len(written), "Neither checked nor drawn: rdkit is not installed."
    else:
        drawings = [drawing(smiles) for smiles in written]
        verdict = f"{sum(svg is not None for svg in drawings)} of {len(written)} are valid molecules."
    cards = "".join(
        f'<div class="card">{"<p>not a molecule</p>" if svg is None else svg}<code>{escape(smiles)}</code></div>'
        for smiles, svg in zip(written, drawings, strict=True)
    )
    return f'<div class="looped"><p class="verdict">{verdict}</p><div class="cards">{cards}</div></div>'


def molecules_tab(molecules: Molecules) -> None:
    model, tokenizer = load(molecules.model)
    trained = molecules.trained_loops[1]
    gr.Markdown(molecules.text)
    loops = gr.Slider(
        1,
        molecules.max_loops,
        trained,
        step=1,
        label="Number of loops per token",
        info=f"Training ended at {trained} loops.",
        buttons=[],
    )
    new = gr.Button(f"Write {MOLECULES} molecules", variant="primary")
    shown = html()

    def write(count):
        try:
            return molecules_html(write_molecules(model, tokenizer, whole("Loops", count, molecules.max_loops)))
        except ValueError as error:
            return problem_html(str(error))

    new.click(write, loops, shown, api_name="write")


# ---- text


@dataclass(frozen=True)
class Text:
    """The section of demo.json about a model of text; the fields are explained in `Hops`.

    halting: a rule and its thresholds; `halting_info` says where they come from.
    """

    model: str
    text: str
    trained_loops: tuple[int, int]
    max_loops: int
    halting: dict
    halting_info: str


@dataclass(frozen=True)
class Written:
    """A text: its T pieces, for each the probability and the loops of its token, and what is said of drafts."""

    pieces: list[str]
    sure: list[float]
    used: list[int]
    num_loops: int
    drafts: str


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text that each token adds; a token that begins a character of several adds nothing."""
    pieces, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if text.endswith("\ufffd") and end < len(tokens):
            pieces.append("")
            continue
        pieces.append(text[len(shown) :])
        shown = text
    return pieces


@torch.inference_mode()
def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginning: str,
    num_loops: int,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    halting: dict | None = None,
    drafts: bool = False,
) -> Written:
    """What the model writes after `beginning`. Raises ValueError for no or too long a beginning, or for halting and
    drafts together."""
    if len(beginning or "") > MAX_TEXT:
        raise ValueError(f"Write at most {MAX_TEXT} characters, got {len(beginning)}.")
    start = tokenizer(beginning or "", return_tensors="pt").to(model.device)
    length, positions = start["input_ids"].shape[1], model.config.max_position_embeddings
    if not 0 < length < positions:
        raise ValueError(f"Write a beginning of 1 to {positions - 1} tokens, got {length}.")
    if halting and drafts:
        raise ValueError("Halting ends loops early, and drafts are verified by all of them: choose one of the two.")
    if drafts and num_loops == 1:
        raise ValueError("A draft takes fewer loops than the text: choose two loops or more.")
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    extra = {"draft_loops": max(1, num_loops // 4)} if drafts else {"halting": halting} if halting else {}
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=start["input_ids"],
        attention_mask=start["attention_mask"],
        num_loops=num_loops,
        max_new_tokens=min(new_tokens, positions - length),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=not drafts,
        **drawn,
        **extra,
    )
    tokens = output.sequences[0, length:]
    if drafts:  # the tokens are those of all loops, and so are their probabilities
        logits = model(output.sequences, num_loops=num_loops, use_cache=False).logits[0, length - 1 : -1]
        said = f"{int(output.accepted.sum())} of {int(output.drafted.sum())} drafted tokens were right"
        said += f": {extra['draft_loops']} of {num_loops} loops guess, all of them verify several tokens at once."
    else:
        logits, said = torch.stack(output.logits)[:, 0], ""
    sure = logits.float().softmax(-1).gather(1, tokens[:, None])[:, 0]
    pieces = pieces_of(tokenizer, tokens.tolist())
    return Written(pieces, sure.tolist(), output.loops_used[0].tolist(), num_loops, said)


def text_html(beginning: str, written: Written) -> str:
    tokens = "".join(
        f'<span class="token" style="background: color-mix(in srgb, var(--ink) {70 * share:.0f}%, transparent)" '
        f'title="{percent(share)} sure, {used} of {written.num_loops} loops">{escape(piece)}<sub>{used}</sub></span>'
        for piece, share, used in zip(written.pieces, written.sure, written.used, strict=True)
        if piece
    )
    mean = sum(written.used) / max(len(written.used), 1)
    spent = f"{len(written.used)} tokens, {mean:.1f} of {written.num_loops} loops each on average."
    return (
        f'<div class="looped"><p class="text"><span class="dim">{escape(beginning)}</span>{tokens}</p>'
        f'<p class="dim">{spent} {escape(written.drafts)} The darker a token, the surer the model was of it; below it '
        "stand the loops that it took.</p></div>"
    )


def text_tab(text: Text) -> None:
    model, tokenizer = load(text.model)
    trained = text.trained_loops[1]

    def write(beginning, loops, tokens, temperature, seed, halt, drafts):
        try:
            count, number = whole("Loops", loops, text.max_loops), whole("Tokens", tokens, NEW_TOKENS)
            if not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
                raise ValueError(f"The temperature goes from 0 to 2, got {str(temperature)[:20]}.")
            if not isinstance(seed, int | float) or not 0 <= seed < 2**31:
                raise ValueError(f"The seed goes from 0 to 2,147,483,647, got {str(seed)[:20]}.")
            halting = text.halting if halt else None
            written = write_text(
                model, tokenizer, beginning, count, number, float(temperature), int(seed), halting, bool(drafts)
            )
        except ValueError as error:  # the page or the model refuses
            return problem_html(str(error))
        return text_html(beginning, written)

    gr.Markdown(text.text)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            beginning = gr.Textbox(BEGINNING, label="Go on from this beginning", max_lines=6, max_length=MAX_TEXT)
            new = gr.Button("Write", variant="primary")
            loops = gr.Slider(
                1,
                text.max_loops,
                trained,
                step=1,
                label="Loops per token: how long it thinks",
                info=f"The model's own are {trained}; beyond, the same weights run on.",
                buttons=[],
            )
            tokens = gr.Slider(1, NEW_TOKENS, 60, step=1, label="Tokens to write", buttons=[])
            temperature = gr.Slider(
                0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest token.", buttons=[]
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            halt = gr.Checkbox(False, label="Halt a token when it has settled", info=text.halting_info)
            drafts = gr.Checkbox(
                False,
                label="Drafts",
                info="A quarter of the loops guess, all loops verify: the same text.",
            )
        with gr.Column(scale=3, min_width=300):
            shown = html()
    given = [beginning, loops, tokens, temperature, seed, halt, drafts]
    events = [
        new.click,
        beginning.submit,
        loops.release,
        tokens.release,
        temperature.release,
        halt.input,
        drafts.input,
    ]
    gr.on(events, write, given, shown, api_name="go_on", trigger_mode="always_last")


# ---- questions


@dataclass(frozen=True)
class Questions:
    """The section of demo.json about a model that answers questions; the other fields are explained in `Text`.

    Args:
        examples: prompt, answer, grade and trained (whether the grade was) of test questions.
        in_place: the answer stands at the tokens of the question.
        chat: "messages" or "prompts" where the chat template writes the question, None elsewhere.
    """

    model: str
    text: str
    trained_loops: tuple[int, int]
    max_loops: int
    examples: list[dict]
    in_place: bool
    chat: str | None
    halting: dict
    halting_info: str


@dataclass(frozen=True)
class Reply:
    """An answer at one loop count, the probability of all of it, and the mean loops of its tokens."""

    text: str
    sure: float
    used: float


def messages_of(questions: Questions, prompt: str) -> list[dict]:
    """The messages that a prompt stands for: those of a conversation, or one of a user."""
    try:
        found = json.loads(prompt) if questions.chat == "messages" else None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list) and all(isinstance(each, dict) and "content" in each for each in found):
        return found
    return [{"role": "user", "content": prompt}]


def asked_tokens(questions: Questions, tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Tokens (1, T) of a question. Raises ValueError for an empty or too long one, or an unknown character."""
    if not prompt.strip() or len(prompt) > MAX_TEXT:
        raise ValueError(f"Write a question of 1 to {MAX_TEXT} characters, got {len(prompt)}.")
    try:
        if questions.chat:
            prompt = tokenizer.apply_chat_template(
                messages_of(questions, prompt), tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(prompt, add_special_tokens=not questions.chat, split_special_tokens=not questions.chat)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError("The model knows no token for a part of the question.") from error
    return torch.tensor([ids["input_ids"]])


@torch.inference_mode()
def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    prompt: str,
    num_loops: int,
    halting: dict | None = None,
) -> Reply:
    """The model's answer. Raises ValueError as `asked_tokens`."""
    ids = asked_tokens(questions, tokenizer, prompt).to(model.device)
    if questions.in_place:
        output = model(ids, num_loops=num_loops, halting=halting, use_cache=False)
        logits, tokens, used = output.logits[0], output.logits[0].argmax(-1), output.loops_used[0]
    else:
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_loops=num_loops,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **({"halting": halting} if halting else {}),
        )
        tokens, logits = output.sequences[0, ids.shape[1] :], torch.stack(output.logits)[:, 0]
        used = output.loops_used[0]
    sure = logits.float().log_softmax(-1).gather(1, tokens[:, None]).sum().exp()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Reply(text.strip() if questions.chat else text, float(sure), float(used.float().mean()))


def replies_html(prompt: str, expected: str | None, replies: dict[int, Reply], trained: int) -> str:
    """A line per loop count: the answer, the probability of all of it, and whether it is right."""
    lines = []
    for loops, each in replies.items():
        mark = "" if expected is None else "&#10003;" if each.text.split() == expected.split() else "&#10007;"
        beyond = " *" if loops > trained else ""
        lines.append(
            f'<tr><td class="loop">{loops}{beyond}</td><td>{mark}</td><td class="text">{escape(each.text)}</td>'
            f"<td>{percent(each.sure)}</td><td>{each.used:.1f}</td></tr>"
        )
    known = "" if expected is None else f" The right answer is <b>{escape(expected)}</b>."
    return (
        f'<div class="looped"><p class="dim">{escape(prompt)}{known}</p><table><thead><tr><th class="loop">loops</th>'
        "<th></th><th>it says</th><th>sure</th><th>loops per token</th></tr></thead><tbody>"
        f"{''.join(lines)}</tbody></table>"
        f'<p class="dim">* more loops than in training, which ended at {trained}.</p></div>'
    )


def loops_to_show(most: int) -> list[int]:
    """1, 2, 4 .. and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def questions_tab(questions: Questions) -> None:
    model, tokenizer = load(questions.model)
    trained = questions.trained_loops[1]
    answers = {each["prompt"]: each["answer"] for each in questions.examples}

    def ask(prompt, loops, halt):
        try:
            most = whole("Loops", loops, questions.max_loops)
            rule = questions.halting if halt else None
            said = {
                count: reply(model, tokenizer, questions, prompt or "", count, rule) for count in loops_to_show(most)
            }
        except ValueError as error:  # the page or the model refuses
            return problem_html(str(error))
        return replies_html(prompt, answers.get(prompt), said, trained)

    gr.Markdown(questions.text)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(questions.examples[0]["prompt"], label="Question", max_lines=6, max_length=MAX_TEXT)
            gr.Examples([each["prompt"] for each in questions.examples], prompt, label="Test questions, easy to hard")
            new = gr.Button("Ask", variant="primary")
            loops = gr.Slider(
                1,
                questions.max_loops,
                trained,
                step=1,
                label="Loops per token, at most",
                info=f"Training ended at {trained} loops.",
                buttons=[],
            )
            halt = gr.Checkbox(False, label="Halt a token when it has settled", info=questions.halting_info)
        with gr.Column(scale=3, min_width=300):
            shown = html()
    gr.on([new.click, prompt.submit], ask, [prompt, loops, halt], shown, api_name="answer", trigger_mode="always_last")


# ---- the page


def make_page(folder: Path) -> gr.Blocks:
    """Load the models that demo.json in `folder` names, and make the page."""
    settings = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    with gr.Blocks(title=settings["title"], analytics_enabled=False) as page:
        gr.Markdown(f"# {settings['title']}")
        if "hops" in settings:
            with gr.Tab("Hops"):
                hops_tab(Hops(**settings["hops"]), page)
        if "molecules" in settings:
            with gr.Tab("Molecules"):
                molecules_tab(Molecules(**settings["molecules"]))
        if "text" in settings:
            with gr.Tab("Text"):
                text_tab(Text(**settings["text"]))
        if "sequence" in settings:
            with gr.Tab("Questions"):
                questions_tab(Questions(**settings["sequence"]))
        gr.Markdown(settings["project"])
    return page


if __name__ == "__main__":
    make_page(Path(__file__).parent).launch(css=CSS, theme=THEME)
