"""Options of verbs that text and molecules share."""

from looplab.mistakes import Real, Whole
from looplab.tasks.base import Argument

ASKING = {
    ("ask", "new_tokens"): Argument("tokens to write", "N", Whole(highest=4096)),
    ("ask", "temperature"): Argument("draw tokens at this temperature; 0 takes the likeliest", "T", Real(0, 100)),
    ("ask", "seed"): Argument("of the draws; every loop count has the same", "N", Whole(0)),
}
ASKING_DEFAULTS = {
    "ask --loops": "1 2 4 8, as far as the model may run them",
    "ask --new-tokens": "48",
    "ask --temperature": "0",
    "ask --seed": "0",
}
