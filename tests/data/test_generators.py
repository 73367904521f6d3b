"""The generators: answers are found again by brute force, no prompt is in two splits, and rows are a function of the
seed alone."""

import doctest
import itertools
import re
from functools import partial, reduce

import pytest

from data_builders import load_task, task_builder
from data_builders.builders import GENERATORS
from data_builders.sequences import FEATURES
from toys import ROOT

# Each with presets that are quick to build: laws do not need thousands of rows.
FEW = {"train_per_grade": 40, "validation_per_grade": 6, "test_per_grade": 8}
GENERATORS = {name: builder for name, builder in GENERATORS.items() if builder.PART is None}
PRESETS = [(name, preset) for name, builder in GENERATORS.items() for preset in builder.builder_configs]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


def drawn(name, preset, cache, **overrides):
    """Rows of the easiest, of the hardest trained and of the hardest grade."""
    builder = task_builder(name, preset, cache_dir=cache, **overrides)
    grades = {builder.EASIEST, builder.config.train_grade, builder.config.hardest}
    return [
        row | {"grade": grade}
        for grade in grades
        for row in itertools.islice(builder.draw(grade), 3 if preset == "paper" else 12)
    ]


def added(prompt, config):
    first, second = (int(number.replace(" ", "")[::-1]) for number in prompt.removesuffix(" =").split(" + "))
    return " ".join(reversed(str(first + second))), len(prompt.split(" + ")[0].split())


def parity(prompt, config):
    bits = prompt.removesuffix(" =").split()
    return "01"[bits.count("1") % 2], len(bits)


def prefix_sums(prompt, config):
    bits = prompt.split()
    return " ".join("01"[bits[: i + 1].count("1") % 2] for i in range(len(bits))), len(bits)


def p_hop(prompt, config):
    """The papers' definition: of the places j <= i with letter[j - 1] == letter[i], the last, p times."""
    words = prompt.removesuffix(" =").split()
    marks, letters = words[: config.hardest], words[config.hardest :]
    assert set(marks) <= {"+", "-"}
    assert len(letters) == config.length
    assert len(set(letters)) <= config.num_letters
    assert all(first != second for first, second in itertools.pairwise(letters))
    place = len(letters) - 1
    for _ in range(marks.count("+")):
        place = max(j for j in range(1, place + 1) if letters[j - 1] == letters[place])
    return letters[place], marks.count("+")


def permutations(prompt, config):
    words = prompt.removesuffix(" =").split()
    ends = [reduce(lambda place, word: int(word[place - 1]), words, start) for start in range(1, config.degree + 1)]
    return "".join(map(str, ends)), len(words)


def mano(prompt, config):
    """A stack, read from the right."""
    stack, words = [], prompt.removesuffix(" =").split()
    for word in reversed(words):
        stack.append(int(word) if word.isdigit() else eval(f"{stack.pop()} {word} {stack.pop()}") % config.modulus)
    [value] = stack
    return str(value), sum(not word.isdigit() for word in words)


def list_ops(prompt, config):
    """Innermost lists are rewritten until one digit is left."""
    text, deep = prompt.removesuffix(" ="), 0
    worth = {"MAX": max, "MIN": min, "SM": lambda digits: sum(digits) % 10}
    worth["MED"] = lambda digits: sum(sorted(digits)[i] for i in ((len(digits) - 1) // 2, len(digits) // 2)) // 2

    def solved(found):
        digits = [int(digit) for digit in found[2].split()]
        assert 2 <= len(digits) <= 5
        return str(worth[found[1]](digits))

    while not text.isdigit():
        text, deep = re.sub(r"\[(\w+) ([\d ]+) \]", solved, text), deep + 1
    return text, deep


def sudoku(prompt, config):
    """Every solution, by filling the first empty cell that has the fewest digits left."""
    side, (height, width) = config.side, {4: (2, 2), 6: (2, 3), 9: (3, 3)}[config.side]
    units = [{(r, c) for c in range(side)} for r in range(side)] + [{(r, c) for r in range(side)} for c in range(side)]
    corners = itertools.product(range(0, side, height), range(0, side, width))
    units += [{(r + i, c + j) for i in range(height) for j in range(width)} for r, c in corners]
    peers = {cell: set.union(*(unit for unit in units if cell in unit)) for unit in units for cell in unit}
    words = prompt.split()
    grid = {divmod(i, side): word for i, word in enumerate(words) if word != "."}

    def solutions(grid):
        empty = [cell for cell in peers if cell not in grid]
        if not empty:
            yield " ".join(grid[cell] for cell in sorted(grid))
            return
        left = {c: {str(d + 1) for d in range(side)} - {grid.get(peer) for peer in peers[c]} for c in empty}
        cell = min(left, key=lambda c: len(left[c]))
        for digit in left[cell]:
            yield from solutions(grid | {cell: digit})

    [solution] = solutions(grid)
    return solution, words.count(".")


def mazes(prompt, config):
    """Breadth first from the start; the maze is a tree, so that there is one way."""
    words = prompt.split()
    side = round(len(words) ** 0.5)
    [start], [goal] = ([i for i, word in enumerate(words) if end(word)] for end in (starts, ends))
    ways = {i: {} for i in range(len(words))}
    for i, word in enumerate(words):
        for name, back, there in (("r", "l", i + 1), ("d", "u", i + side)):
            if name in word:
                assert name == "d" or there % side
                assert there < len(words)
                ways[i][name], ways[there][back] = there, i
    assert sum(map(len, ways.values())) == 2 * (len(words) - 1)
    before, queue = {start: None}, [start]
    for here in queue:
        for name, there in ways[here].items():
            if there not in before:
                before[there] = here, name
                queue.append(there)
    assert len(queue) == len(words)
    steps, here = {goal: "*"}, goal
    while here != start:
        here, name = before[here]
        steps[here] = name
    return " ".join(steps.get(i, ".") for i in range(len(words))), side


def starts(word):
    return word.startswith("*")


def ends(word):
    return word.endswith("*")


SOLVE = {
    "addition": added,
    "parity": parity,
    "prefix_sums": prefix_sums,
    "p_hop": p_hop,
    "permutations": permutations,
    "mano": mano,
    "list_ops": list_ops,
    "sudoku": sudoku,
    "mazes": mazes,
}


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_answer_is_found_by_brute_force(name, preset, cache):
    """The solver reads the prompt alone, and finds the grade, too."""
    config = task_builder(name, preset, cache_dir=cache).config
    for row in drawn(name, preset, cache):
        assert SOLVE[name](row["prompt"], config) == (row["answer"], row["grade"])


@pytest.mark.parametrize("name", GENERATORS)
def test_splits_are_disjoint_and_the_test_is_harder(name, cache):
    splits = load_task(name, "cpu", cache_dir=cache, **FEW)
    assert set(splits) == {"train", "validation", "test"}
    assert all(rows.features == FEATURES for rows in splits.values())
    prompts = [prompt for rows in splits.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts)
    builder = task_builder(name, "cpu", cache_dir=cache)
    # `datasets` names a cache folder after the module: two builders in one would share their rows.
    config, easiest = builder.config, builder.EASIEST
    assert builder.name == name
    assert set(splits["train"]["grade"]) == set(range(easiest, config.train_grade + 1))
    for split, most in (("validation", 6), ("test", 8)):
        grades = splits[split]["grade"][:]
        assert set(config.far_grades) <= set(grades)
        # A grade of few rows gives at most an eighth of them.
        assert all(grades.count(grade) == most for grade in grades if grade > 5)
        assert all(grades.count(grade) <= most for grade in grades)
    if GENERATORS[name].ANSWERS == "in_place":
        for rows in splits.values():
            assert all(len(row["prompt"].split()) == len(row["answer"].split()) for row in rows)
    else:
        assert all(prompt.endswith(" =") for prompt in prompts)


@pytest.mark.parametrize("name", GENERATORS)
def test_training_on_more_rows_keeps_the_test(name, cache):
    far = max(GENERATORS[name].builder_configs["cpu"].far_grades)
    few, more = (
        task_builder(name, "cpu", cache_dir=cache, **FEW | {"train_per_grade": rows}).deal(far) for rows in (1, 30)
    )
    assert few["test"] == more["test"]
    assert few["validation"] == more["validation"]


@pytest.mark.parametrize("name", GENERATORS)
def test_another_seed_gives_other_rows(name, cache):
    one, other = (
        [row["prompt"] for row in drawn(name, "cpu", cache, seed=seed) if row["grade"] > 3] for seed in (0, 1)
    )
    assert not set(one) & set(other)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_docstring_draws_a_real_example(name, cache):
    """So a row is the same in every process and on every machine."""
    parsed = doctest.DocTestParser().get_doctest(
        GENERATORS[name].__doc__,
        {"load_task": partial(load_task, cache_dir=cache)},
        name,
        None,
        None,
    )
    assert len(parsed.examples) == 1
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(parsed).failed == 0


@pytest.mark.parametrize("name", GENERATORS)
def test_the_guide_shows_a_row_of_each(name, cache):
    """The first test row of the third grade, broken into lines."""
    page = (ROOT / "docs" / "guides" / "generators.md").read_text(encoding="utf-8")
    builder = task_builder(name, "cpu", cache_dir=cache, train_per_grade=1)
    row = builder.deal(builder.EASIEST + 2)["test"][0]
    shown = re.search(rf"^### {name}\n.*?```text\n(.*?)```$", page, flags=re.S | re.M)[1]
    assert " ".join(shown.split()) == f"{row['prompt']} -> {row['answer']}"


def test_a_small_grade_leaves_three_quarters_to_train(cache):
    """There are 32 prompts of 5 bits: 4 for the test, 4 for validation."""
    dealt = task_builder("parity", "cpu", cache_dir=cache).deal(5)
    assert {split: len(rows) for split, rows in dealt.items()} == {"test": 4, "validation": 4, "train": 24}


def test_hops_are_drawn_as_texts_are(cache):
    """Of all texts without a letter twice in a row that three hops do not leave, each is equally likely."""
    builder = task_builder("p_hop", "cpu", cache_dir=cache, length=6, num_letters=3, train_grade=3, far_grades=[])
    texts = set()
    for letters in itertools.product("abc", repeat=6):
        text = " ".join(["+ + +", *letters, "="])
        try:
            p_hop(text, builder.config)
        except (AssertionError, ValueError):
            continue
        texts.add(text)
    counts = dict.fromkeys(texts, 0)
    for row in itertools.islice(builder.draw(3), 40 * len(texts)):
        counts[row["prompt"]] += 1
    # 40 of each are expected, give or take five standard deviations.
    assert all(abs(count - 40) < 5 * 40**0.5 for count in counts.values())
    # And so for how many go one place in the first hop: after their marks, letters 4 and 6 are equal.
    near = [text for text in texts if text.split()[6] == text.split()[8]]
    share, drawn_rows = len(near) / len(texts), 40 * len(texts)
    spread = (share * (1 - share) / drawn_rows) ** 0.5
    assert abs(sum(counts[text] for text in near) / drawn_rows - share) < 4 * spread


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("addition", {"train_grade": 0}, "train_grade must be at least 1, the easiest, got 0"),
        ("mazes", {"train_grade": 1}, "train_grade must be at least 2, the easiest, got 1"),
        ("parity", {"far_grades": [8]}, "far_grades must be above train_grade 16, got 8: leave it out"),
        ("parity", {"far_grades": [20, 20]}, "far_grades has 20 twice"),
        ("p_hop", {"far_grades": [63]}, "must be at most 62, the hops that 64 letters have"),
        ("p_hop", {"num_letters": 2}, "num_letters must be a whole number >= 3"),
        ("sudoku", {"far_grades": [12]}, "must be at most 11, empty cells of 4 x 4"),
        ("sudoku", {"side": 5}, "side must be"),
        ("permutations", {"degree": 7}, "degree must be a whole number >= 2 and <= 6, got 7"),
        ("mano", {"modulus": 1}, "modulus must be a whole number >= 2, got 1"),
        ("list_ops", {"test_per_grade": 0}, "test_per_grade must be a whole number >= 1, got 0"),
        ("addition", {"train_digits": 3}, "unknown field of addition: 'train_digits'. Did you mean 'train_grade'"),
    ],
)
def test_a_bad_field_raises_and_builds_nothing(tmp_path, name, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task(name, "cpu", cache_dir=tmp_path, **overrides)
    assert not list(tmp_path.rglob("*.arrow"))
