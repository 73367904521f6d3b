"""The fields that a request to `looped serve` may have: those of the OpenAI API, num_loops and halting.

Every field has a rule: a function of (name, value, bounds) that returns the value, or raises Refusal with one sentence
for the client. No field is ignored: a field that is not served is refused, unless its value asks for nothing.
"""

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from reprlib import Repr

from transformers import LogitsProcessor

from modeling_looped.halting_looped import calibrated_rule, halting_rule

from .limits import option

ROLES = ("system", "developer", "user", "assistant", "tool")
STOPS, STOP_LENGTH = 4, 256  # most stop strings; most characters of one
# Fields of a generation config that do not change the text.
NO_TEXT = (
    "transformers_version", "_from_model_config", "use_cache", "output_attentions", "output_hidden_states",
    "calibrated_halting",
)  # fmt: skip

short = Repr()
short.maxstring = short.maxother = short.maxlong = 60


class Refusal(Exception):
    """A request is not answered: one sentence for the client, the field at fault, and the HTTP status."""

    def __init__(self, message: str, field: str | None = None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": None}}


class LeavesOne(LogitsProcessor):
    """Refuses scores that leave no token to go on with."""

    def __call__(self, input_ids, scores):
        if (scores == -float("inf")).all():
            raise Refusal(
                "the generation config leaves no token to go on with (no_repeat_ngram_size, or min_new_tokens where "
                "every token is an end token): ask for fewer tokens."
            )
        return scores


@dataclass(frozen=True)
class Bounds:
    """The most that the model and the limits of the server allow.

    Args:
        max_loops: the limit of the server, or the `max_num_loops` of the model if that is smaller.
        halts: whether the model takes halting rules.
        calibrated: the halting rule of the model that `true` stands for, or None.
    """

    max_loops: int
    max_new_tokens: int
    vocab_size: int
    halts: bool
    calibrated: dict | None


Rule = Callable[[str, object, Bounds], object]


def refused(name: str, what: str, value: object) -> Refusal:
    """A Refusal for the field `name`, which must be `what` and is `value`."""
    return Refusal(f"{name} must be {what}, got {short.repr(value)}.", name)


def is_number(value: object, kind: type | tuple = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def integer(low: int, high: int | str) -> Rule:
    """The rule for an integer from `low` to `high`, which is a number or the name of a bound."""

    def rule(name, value, bounds):
        most = getattr(bounds, high) if isinstance(high, str) else high
        if not is_number(value, int) or not low <= value <= most:
            limit = f" (the server's limit, {option(high)})" if isinstance(high, str) else ""
            raise refused(name, f"an integer from {low} to {most}{limit}", value)
        return value

    return rule


def number(low: float, high: float) -> Rule:
    """The rule for a number from `low` to `high`."""

    def rule(name, value, bounds):
        if not is_number(value) or not low <= value <= high:
            raise refused(name, f"a number from {low} to {high}", value)
        return float(value)

    return rule


def temperature(name, value, bounds):
    # Logits divided by a smaller number overflow.
    if not is_number(value) or not (value == 0 or 1e-4 <= value <= 2):
        raise refused(name, "0 or a number from 0.0001 to 2", value)
    return float(value)


def flag(name, value, bounds):
    if not isinstance(value, bool):
        raise refused(name, "true or false", value)
    return value


def text(name, value, bounds):
    if not isinstance(value, str):
        raise refused(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise refused(name, "text, without half of a surrogate pair", value) from error
    return value


def nothing_but(*values: object) -> Rule:
    """The rule for a field that is not served: only `values`, which ask for nothing, are allowed."""

    def rule(name, value, bounds):
        if not any(type(value) is type(each) and value == each for each in values):
            raise Refusal(f"{name} is not supported here, got {short.repr(value)}: leave it out.", name)
        return value

    return rule


def stop(name, value, bounds):
    stops = [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= STOPS
    if not fits or not all(isinstance(each, str) and 0 < len(each) <= STOP_LENGTH for each in stops):
        raise refused(name, f"a string or at most {STOPS} of them, of 1 to {STOP_LENGTH} characters each", value)
    return stops


def stream_options(name, value, bounds):
    if not isinstance(value, dict) or value.keys() - {"include_usage"}:
        raise refused(name, 'an object with no other field than "include_usage"', value)
    return {key: flag(f"{name}.{key}", wanted, bounds) for key, wanted in value.items()}


def token(name, value, bounds):
    if not is_number(value, int) or not 0 <= value < bounds.vocab_size:
        raise refused(name, f"a token id from 0 to {bounds.vocab_size - 1}", value)
    return value


def tokens(name, value, bounds):
    if not isinstance(value, list) or not value:
        return token(name, value, bounds)
    return [token(name, each, bounds) for each in value]


def prompt(name, value, bounds):
    if isinstance(value, list) and value and all(is_number(each, int) for each in value):
        return tokens(name, value, bounds)
    if not isinstance(value, str):
        raise refused(name, "one string or one list of token ids (a request for each prompt)", value)
    return text(name, value, bounds)


def messages(name, value, bounds):
    if not isinstance(value, list) or not value:
        raise refused(name, 'a list of at least one message, such as {"role": "user", "content": "..."}', value)
    return [message(f"{name}[{index}]", each, bounds) for index, each in enumerate(value)]


def message(name, value, bounds):
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        raise refused(name, 'an object with the fields "role" and "content" and no other', value)
    if value["role"] not in ROLES:
        raise refused(f"{name}.role", f"one of {', '.join(ROLES)}", value["role"])
    parts = value["content"]
    if isinstance(parts, list):
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or part.keys() != {"type", "text"}:
                raise refused(f"{name}.content", 'a string or a list of {"type": "text", "text": "..."}', part)
        parts = " ".join(text(f"{name}.content.text", part["text"], bounds) for part in parts)
    return {"role": value["role"], "content": text(f"{name}.content", parts, bounds)}


def halting(name, value, bounds):
    if not bounds.halts:
        raise Refusal(f"{name}: this model is a looped frozen one, which has no halting rules.", name)
    flat = isinstance(value, dict) and all(isinstance(each, str) or is_number(each) for each in value.values())
    if not flat and not isinstance(value, str) and value is not True:
        raise refused(name, "the name of a rule, an object with it as `rule` and with its thresholds, or true", value)
    try:
        rule = calibrated_rule(value, bounds.calibrated)
        halting_rule(rule)
    except ValueError as error:
        raise Refusal(str(error), name) from error
    return rule


def generation_config(name, value, bounds):
    """The rule for a generation config as a string of JSON, as `GenerationConfig.to_json_string` writes it."""
    return check_generation_config(name, read_object(text(name, value, bounds), name), bounds)


def check_generation_config(name: str, fields: dict, bounds: Bounds) -> dict:
    """The fields of a generation config that change the text.

    Raises:
        Refusal: a field is not served, or breaks its rule.
    """
    return check_fields(name, {key: each for key, each in fields.items() if key not in NO_TEXT}, GENERATION, bounds)


GENERATION = {
    "num_loops": integer(1, "max_loops"),
    "halting": halting,
    "max_new_tokens": integer(1, "max_new_tokens"),
    "min_new_tokens": integer(0, "max_new_tokens"),
    "do_sample": flag,
    "temperature": temperature,
    "top_k": integer(0, 2**31 - 1),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "typical_p": number(1e-4, 1),
    "repetition_penalty": number(1e-4, 1e4),
    "no_repeat_ngram_size": integer(0, 1000),
    "bos_token_id": token,
    "eos_token_id": tokens,
    "pad_token_id": token,
}
SHARED = {
    "model": text,
    "max_tokens": integer(1, "max_new_tokens"),
    "temperature": temperature,
    "top_p": number(0, 1),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": stop,
    "stream": flag,
    "stream_options": stream_options,
    "num_loops": integer(1, "max_loops"),
    "halting": halting,
    "generation_config": generation_config,
    "user": text,  # not used
    "n": nothing_but(1),
    "frequency_penalty": nothing_but(0, 0.0),
    "presence_penalty": nothing_but(0, 0.0),
    "logit_bias": nothing_but({}),
}
COMPLETION = SHARED | {
    "prompt": prompt,
    "best_of": nothing_but(1),
    "echo": nothing_but(False),
    "logprobs": nothing_but(),
    "suffix": nothing_but(""),
}
CHAT = SHARED | {
    "messages": messages,
    "max_completion_tokens": integer(1, "max_new_tokens"),
    "logprobs": nothing_but(False),
    "top_logprobs": nothing_but(0),
    "response_format": nothing_but({"type": "text"}),
    "tools": nothing_but([]),
    "tool_choice": nothing_but("none", "auto"),
}


def read_fields(body: bytes, rules: dict[str, Rule], bounds: Bounds) -> dict:
    """The fields of a request's body; a field that is null is left out.

    Raises:
        Refusal: the body is not a JSON object, or a field is unknown, missing or breaks its rule.
    """
    fields = check_fields("the request", read_object(body, "the body"), rules, bounds)
    limits = [name for name in ("max_tokens", "max_completion_tokens") if name in fields]
    if len(limits) > 1:
        raise Refusal(f"give {limits[0]} or {limits[1]}, not both.", limits[0])
    if "stream_options" in fields and not fields.get("stream"):
        raise Refusal("stream_options is for a request with stream: true.", "stream_options")
    for name in ("prompt", "messages"):
        if name in rules and name not in fields:
            raise Refusal(f"the request has no {name}.", name)
    return fields


def check_fields(what: str, given: dict, rules: dict[str, Rule], bounds: Bounds) -> dict:
    """The given fields, each through its rule; `what` has them, for the message. Raises Refusal."""
    for name in given:
        if name not in rules:
            close = difflib.get_close_matches(name[:60], rules, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(rules)}."
            raise Refusal(f"{what} has an unknown field {short.repr(name)}; {hint}", name[:60])
    return {name: rules[name](name, value, bounds) for name, value in given.items() if value is not None}


def read_object(source: bytes | str, what: str) -> dict:
    """The JSON object in `source`; `what` is its name in a message.

    Raises:
        Refusal: it is no JSON object, or has an infinite or huge number or a name that comes twice.
    """

    def whole(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"an integer beyond 64 bits, {digits[:60]}")
        return int(digits)

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"a number that is not finite, {digits[:60]}")
        return value

    def once(pairs: list[tuple[str, object]]) -> dict:
        if len(fields := dict(pairs)) < len(pairs):
            raise ValueError("a field that is named twice")
        return fields

    try:
        value = json.loads(source, parse_int=whole, parse_float=finite, parse_constant=finite, object_pairs_hook=once)
    except RecursionError as error:
        raise Refusal(f"{what} is nested too deeply.") from error
    except ValueError as error:
        raise Refusal(f"{what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise Refusal(f"{what} must be a JSON object, got {short.repr(value)}.")
    return value
