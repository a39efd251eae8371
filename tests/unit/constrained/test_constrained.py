"""With constrained decoding an untrained model keeps the format, and its answers are those of a naive masked loop."""

import itertools
import json
import random
import sys
from dataclasses import replace

import lightning.pytorch as L
import pytest
import torch

from conftest import SCHEMA, SHAPES, byte_tokenizer, random_rows, row, shared, tiny_model
from formtune.base.renderer import Renderer
from formtune.constrained.decoder import Grammar
from formtune.data.datamodule import FormatDataModule
from formtune.errors import UserError
from formtune.formats import Format, JsonSchema, Labels, Regex, Tagged, ToolCalls
from formtune.model import FormatModule
from formtune.model.micro_batches import MicroBatches, choose_micro_batches

pytest.importorskip("llguidance", reason="needs the extra `constrained`")

RENDERER = Renderer(byte_tokenizer())
[END] = RENDERER.stop_ids
SIZE = 259
ANY = row([0])  # of a fixed format, which is the same for all rows

CLOSED = {"type": "object", "additionalProperties": False}
SHORT = {"type": "string", "maxLength": 6}
ORDER = CLOSED | {
    "required": ["kind", "name", "lines"],
    "properties": {
        "kind": {"enum": ["new", "newer", None]},
        "name": SHORT,
        "due": {"type": "string", "format": "date"},
        "lines": {
            "type": "array",
            "maxItems": 2,
            "items": CLOSED
            | {"properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"]},
        },
    },
}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
NUMBERED = {"type": "object", "properties": {"n": DIGIT}}


def keys(names, required=None, **more):
    """An object with these keys in this order."""
    values = dict.fromkeys(names, DIGIT) | more
    return {"type": "object", "properties": values, "required": list(values if required is None else required)}


def closed(*args, **kwargs):
    return CLOSED | keys(*args, **kwargs)


# The first five as Pydantic writes them, but for titles.
UNIONS = {
    "discriminated": {
        "$defs": {
            "Hotel": keys("", parameters={"$ref": "#/$defs/HotelArgs"}, method={"const": "hotel", "type": "string"}),
            "Movie": keys("", method={"const": "movie", "type": "string"}, parameters={"$ref": "#/$defs/MovieArgs"}),
            "HotelArgs": keys("ba"),
            "MovieArgs": keys("ab", g={"enum": ["drama", "comedy"]}),
        },
        "discriminator": {"mapping": {"hotel": "#/$defs/Hotel", "movie": "#/$defs/Movie"}, "propertyName": "method"},
        "oneOf": [{"$ref": "#/$defs/Hotel"}, {"$ref": "#/$defs/Movie"}],
    },
    "nullable": {
        "$defs": {"Who": keys("ba", "b")},
        **keys("", who={"anyOf": [{"$ref": "#/$defs/Who"}, {"type": "null"}], "default": None}, n=DIGIT),
    },
    "overlapping": {"anyOf": [keys("ab", "a"), keys("bac", "ba"), keys("cb")]},
    "list of unions": {"type": "array", "maxItems": 3, "items": {"anyOf": [keys("bca", "b"), keys("ab"), DIGIT]}},
    "tuple": keys("", pair={"type": "array", "prefixItems": [keys("ba"), DIGIT], "minItems": 2, "maxItems": 2}),
    "open": {"anyOf": [keys("a", ""), keys("ca", ""), keys("acb", "")]},
    "open below": {"anyOf": [keys("", "", p=keys("x", "")), keys("", "", p=keys("yx", ""))]},
    "several below": {"anyOf": [closed("", p=keys("xy"), q=keys("xy")), closed("", q=keys("yx"), p=keys("yx"))]},
    "nested": {"anyOf": [{"anyOf": [keys("ab"), keys("ba", "b")]}, {"oneOf": [keys("cab"), {"type": "null"}]}]},
    "types": CLOSED | {"type": ["object", "null"], "properties": {"b": DIGIT, "a": DIGIT}},
    "same key": {
        "anyOf": [
            closed("", v={"const": 1}, w=keys("ab")),
            closed("", w=keys("ba"), v={"type": "string", "maxLength": 1}),
        ]
    },
    "object or scalar": keys(
        "", x={"anyOf": [SHORT, keys("zy"), {"type": "array", "maxItems": 2, "items": keys("yz")}]}
    ),
    "literals": {
        "enum": [{"b": 1, "a": {"d": [1, {"y": 1, "x": 2}], "c": None}}, {"a": 2, "b": 1}, [{"z": 1, "b": 2}], "x"]
    },
    "allOf": {"allOf": [closed("ba", ""), closed("abc", "")]},
    "reference with keys before": {"$defs": {"x": closed("kqz", "")}, **closed("zk", ""), "$ref": "#/$defs/x"},
    "reference with keys behind": {"$defs": {"x": closed("kqz", "")}, "$ref": "#/$defs/x", **closed("zk", "")},
    "keys and anyOf": closed("cba", "") | {"anyOf": [closed("ab"), closed("cba", "c")]},
    "anyOf and keys": {"anyOf": [closed("ab"), closed("cba", "c")], **closed("cba", "")},
    "two unions": {
        "anyOf": [closed("ab", ""), closed("cba", "c")],
        "allOf": [{"anyOf": [closed("ba", ""), closed("bac", "")]}],
    },
    "tuples": {
        "anyOf": [
            {"type": "array", "prefixItems": [keys("ab"), DIGIT], "items": False},
            {
                "type": "array",
                "prefixItems": [keys("ba"), DIGIT],
                "maxItems": 3,
                "items": {"anyOf": [keys("ab"), keys("ba")]},
            },
        ]
    },
}
FORMATS = {
    "json": JsonSchema(
        schema=SCHEMA | {"properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}, "s": SHORT}}
    ),
    "canonical": JsonSchema(schema=ORDER, canonical=True),
    "labels": Labels(labels=["yes", "yes please", "no", 'so "so"', "é😀"]),
    "regex": Regex(pattern=r"^(?P<id>[A-Z]{2}/\d+|[a-z]?)[\x20-\x7e]{1,12}$"),
    "tagged": Tagged(sections=["reason", "answer"]),
}


def grammar_of(format, renderer=RENDERER):
    return Grammar(format, renderer)


def naive(model, grammar, prompt, limit):
    """One row, one token at a time, everything computed again for each, the mask straight from the library."""
    matcher, ids = grammar.matcher(ANY), list(prompt)
    while len(ids) < len(prompt) + limit:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :SIZE]
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = torch.tensor([bool(bits >> token & 1) for token in range(SIZE)])
        ids.append(int(logits.masked_fill(~allowed, float("-inf")).argmax()))
        if ids[-1] == END:
            break
        assert matcher.consume_token(ids[-1])
    return ids[len(prompt) :]


def sharp_model(shape, **config):
    model = tiny_model(shape, **config).eval()
    # Random weights that repeat themselves less, with no two logits near one another.
    model.get_output_embeddings().weight.data *= 30
    return model


def answered(micro_batches, rows, grammar, limits, tokens=300):
    split = micro_batches.split(rows, tokens, max(limits))
    return [answer.ids for answer in micro_batches.decode(rows, split, RENDERER.stop_ids, limits, grammar)]


def rows_of_every_kind(prompts, answers):
    """Targets that the constrained model generates, that leave it at the first, a middle or the last token, and none."""
    rng, rows = random.Random(7), []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        at = (None, 0, len(answer) // 2, len(answer) - 1, len(answer))[i % 5]
        target = [] if at == len(answer) else list(answer)
        if target and at is not None:
            target[at] = rng.choice([t for t in range(3, SIZE) if t != target[at]])
        rows.append(row(prompt, target))
    return rows


@pytest.mark.parametrize(
    "shape, name",
    [pytest.param(s, "canonical", marks=pytest.mark.slow) for s in SHAPES]
    + [("llama", n) for n in FORMATS if n != "canonical"],
)
def test_answers_equal_those_of_a_naive_masked_loop(shape, name):
    model, grammar = sharp_model(shape), grammar_of(FORMATS[name])
    prompts = [r.prompt_ids for r in random_rows(5, 10)]
    prompts.append(list(prompts[0]))  # twice the same: it is shared up to its last token
    limits = [3 if i % 4 == 3 else 16 for i in range(len(prompts))]
    expected = [naive(model, grammar, p, most) for p, most in zip(prompts, limits, strict=True)]
    rows = rows_of_every_kind(prompts, expected)
    micro_batches = choose_micro_batches(model)
    assert answered(micro_batches, rows, grammar, limits) == expected
    assert answered(micro_batches, rows, grammar, limits, tokens=1) == expected
    model.set_attn_implementation("sdpa")
    assert answered(MicroBatches(model), rows, grammar, limits) == expected


def test_tokens_that_the_model_predicts_anyway_are_not_decoded_again(monkeypatch):
    cached = pytest.importorskip("formtune.packing.attention").CachedAttention
    model, grammar = sharp_model("llama"), grammar_of(Regex(pattern=r"(?s).{1,8}"))
    prompts = [r.prompt_ids for r in random_rows(3, 8)]
    written = [naive(model, grammar, p, 20) for p in prompts]
    fed, append, micro_batches = [], cached._append, choose_micro_batches(model)
    monkeypatch.setattr(cached, "_append", lambda *a: fed.append((a[1] == 0) * len(a[0].at)) or append(*a))
    free = answered(micro_batches, [row(p) for p in prompts], None, [20] * len(prompts))
    pairs = [list(zip(a, b, strict=False)) for a, b in zip(free, written, strict=True)]
    same = [next(i for i, (a, b) in enumerate(both) if a != b) for both in pairs]
    assert any(same), "the model generates nothing that the grammar allows, so that nothing is tested"
    fed.clear()
    rows = [row(p, s) for p, s in zip(prompts, written, strict=True)]
    assert answered(micro_batches, rows, grammar, [20] * len(prompts)) == written
    assert sum(fed) == sum(map(len, written)) - sum(same)


@pytest.mark.parametrize("name", ["canonical", "labels"])
def test_log_probabilities_are_the_models_own_over_all_tokens_however_they_are_decoded(name):
    # As some models do, it has more logits than the tokenizer has tokens, and here these are high.
    model, grammar = sharp_model("llama", vocab_size=SIZE + 61), grammar_of(FORMATS[name])
    model.get_output_embeddings().weight.data[SIZE:] *= 3
    prompts = [r.prompt_ids for r in random_rows(5, 10)]
    limits = [16] * len(prompts)
    expected = [naive(model, grammar, prompt, 16) for prompt in prompts]
    logprobs = []
    for prompt, answer in zip(prompts, expected, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1].double()
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist())
    shared, rows = choose_micro_batches(model), rows_of_every_kind(prompts, expected)
    chosen = model.config._attn_implementation
    free = [row(prompt) for prompt in prompts]
    for way in (shared, MicroBatches(model)):
        model.set_attn_implementation(chosen if way is shared else "sdpa")
        for given in (rows, free):
            decoded = way.decode(given, way.split(given, 300, 16), RENDERER.stop_ids, limits, grammar)
            assert [answer.ids for answer in decoded] == expected
            for answer, right in zip(decoded, logprobs, strict=True):
                assert answer.logprobs == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("name", ["json", "canonical", "labels", "regex"])
def test_an_untrained_model_keeps_the_format(name):
    format, ended = FORMATS[name], 0
    grammar = grammar_of(format)
    for seed in range(4):
        model = tiny_model(seed=seed).eval()
        model.get_output_embeddings().weight.data *= 30
        model.get_output_embeddings().weight.data[END] += 2 * torch.randn(32)
        rows = [row(r.prompt_ids) for r in random_rows(seed, 12)]
        for ids in answered(choose_micro_batches(model), rows, grammar, [120] * len(rows), 10**5):
            text, finished = RENDERER.answer(ids)
            verdict = format.check(text, finished=finished)
            assert verdict.exact or not finished, (text, verdict.detail)
            ended += finished
    assert ended


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_that_would_write_something_else_is_led_to_a_document(name):
    format, grammar = FORMATS[name], grammar_of(FORMATS[name])
    wish = 'Sure! Here {"you": 1} are </reason>, and <answer>b</answer>} or b</answer> so yes please 2024-02-30}]}'
    for seed in range(8):
        torch.manual_seed(seed)
        matcher, written = grammar.matcher(ANY), []
        for token in RENDERER.tokenizer(wish, add_special_tokens=False)["input_ids"] + [END] * 200:
            logits = torch.randn(1, SIZE)
            logits[0, token] = 9.0
            written += grammar.choose([matcher], logits)[0]
            if written[-1] == END:
                break
        text, finished = RENDERER.answer(written)
        assert finished and format.check(text).exact, text


def accepts(format, text):
    return takes(grammar_of(format), text)


def takes(grammar, text):
    ids = [*RENDERER.tokenizer(text, add_special_tokens=False)["input_ids"], END]
    return grammar.accepted(grammar.matcher(ANY), ids) == len(ids)


@pytest.mark.parametrize(
    "name, good, bad",
    [
        (
            "json",
            ['{"n":1,"s":"a"}', '{ "n": 1,\n "s": "é\\n" }', '{"s":"a","n":1}'],
            ['{"n":1,"s":"a"}\n', '{"n":1}', " {}", '{"n":1,"s":"a","n":1}', '{"n":1,}'],
        ),
        (
            "canonical",
            ['{"kind":null,"name":"","due":"2024-02-29","lines":[{"n":7}]}'],
            [
                '{"kind":null,"name":"","due":"2026-02-29","lines":[]}',
                '{"kind":null,"name":"","lines":[]}\n',
                '{"kind": null,"name":"","lines":[]}',
                '{"name":"","kind":null,"lines":[]}',
            ],
        ),
        ("labels", ["yes", "yes please", 'so "so"', "é😀"], ["", "ye", "yes ", "YES"]),
        ("regex", ["AB/12 x", "ax"], ["", "x\ny", "AB/" + "1" * 3 + "x" * 13]),
        (
            "tagged",
            ["<reason>a</reason><answer>b</answer>", "<reason></b>\n</reason>\n <answer><</answer>"],
            ["<answer>b</answer>", "<reason>a</reason>", " <reason>a</reason><answer>b</answer>"],
        ),
    ],
)
def test_a_grammar_accepts_what_the_format_accepts(name, good, bad):
    for text in good:
        assert FORMATS[name].check(text).exact and accepts(FORMATS[name], text), text
    for text in bad:
        assert not accepts(FORMATS[name], text), text


@pytest.mark.parametrize("pattern", ["[[a]b]", "[a&&b]", "[^a&&[^b]]", "[a~~[:alpha:]-]", r"[+--\]]", r"[+\--9]"])
def test_a_set_has_no_operators(pattern):
    for format in (Regex(pattern), JsonSchema({"type": "string", "pattern": f"^{pattern}$"})):
        for text in map("".join, itertools.product(["", *"[]ab&~+,-.59"], ["", "]"])):
            written = format.write(text) or text
            assert accepts(format, written) == format.check(written).exact, (pattern, text)


def test_dates_and_times_are_those_of_the_format():
    def schema(kind):
        return JsonSchema(schema={"type": ["string", "null"], "format": kind})

    days = [
        f"{y}-{m:02}-{d:02}" for y in (1900, 2000, 2023, 2024) for m in range(14) for d in (0, 1, 28, 29, 30, 31, 32)
    ]
    times = ["23:59:59Z", "24:00:00Z", "23:59:60Z", "00:00:00.5+23:59", "00:00:00+24:00", "00:00:00"]
    both = [f"{day}T{clock}" for day in ("2023-02-29", "2024-02-29") for clock in times]
    for kind, texts in (
        ("date", days),
        ("time", times),
        ("date-time", both),
        ("uri", ["a:", "a:b", "1 b:c d", "a:b c", "a:<b>", "http://x.y/z?a=1#b"]),
    ):
        grammar = grammar_of(schema(kind))
        for text in map(json.dumps, texts):
            assert takes(grammar, text) == schema(kind).check(text).exact, (kind, text)


def document(dice, schema, root):
    """A document that one alternative of the schema may have asked for, its keys in any order."""
    if "$ref" in schema and "properties" not in schema:
        return document(dice, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    for key in ("anyOf", "oneOf", "allOf", "enum"):
        if key in schema:
            choice = dice.choice(schema[key])
            return choice if key == "enum" else document(dice, choice, root)
    kinds = schema.get("type", "string")
    kind = dice.choice(kinds) if isinstance(kinds, list) else kinds
    if "const" in schema:
        return schema["const"]
    if kind == "object":
        chosen = [k for k in schema["properties"] if k in schema.get("required", ()) or dice.random() < 0.6]
        return {k: document(dice, schema["properties"][k], root) for k in dice.sample(chosen, len(chosen))}
    if kind == "array":
        values = [document(dice, item, root) for item in schema.get("prefixItems", ())]
        more = dice.randint(0, 1) if schema.get("items") else 0
        return values + [document(dice, schema["items"], root) for _ in range(more)]
    return {"null": None, "string": "s"}.get(kind, dice.randint(0, 9))


def walk(dice, grammar, most=120):
    """A text that the grammar writes, its tokens drawn at random; None if it has no end by then."""
    matcher, written = grammar.matcher(ANY), []
    while len(written) < most:
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(SIZE) if bits >> token & 1]
        if END in allowed and (len(allowed) == 1 or dice.random() < 0.3):
            return RENDERER.answer([*written, END])[0]
        written.append(dice.choice([token for token in allowed if token != END]))
        assert matcher.consume_token(written[-1])
    return None


@pytest.mark.parametrize("name", UNIONS)
def test_a_canonical_union_is_written_and_checked_in_the_same_order_of_keys(name):
    schema, dice = UNIONS[name], random.Random(name)
    format = JsonSchema(schema=schema, canonical=True)
    grammar, right, wrong, walks = grammar_of(format), 0, 0, 0
    for _ in range(60):
        value = document(dice, schema, schema)
        if not JsonSchema(schema=schema).check(json.dumps(value)).exact:
            continue  # asked for by one part of several
        text, other = format.write(value), json.dumps(value, separators=(",", ":"))
        assert format.check(text).exact and takes(grammar, text), text
        text = format.write(json.loads(json.dumps(value, sort_keys=True)))
        assert format.check(text).exact and takes(grammar, text), text
        assert format.check(other).exact == takes(grammar, other), other
        right, wrong = right + 1, wrong + (not format.check(other).exact)
    for _ in range(25):
        text = walk(dice, grammar)
        assert text is None or format.check(text).exact, text
        walks += text is not None
    assert right and walks and (wrong or name == "literals"), "nothing is tested where every order is right"


def test_a_document_is_written_in_the_order_of_the_alternative_that_it_keeps():
    format = JsonSchema(schema=UNIONS["discriminated"], canonical=True)
    assert format.write({"method": "hotel", "parameters": {"a": 1, "b": 2}}) == (
        '{"parameters":{"b":2,"a":1},"method":"hotel"}'
    )
    assert format.write({"parameters": {"g": "drama", "b": 2, "a": 1}, "method": "movie"}) == (
        '{"method":"movie","parameters":{"a":1,"b":2,"g":"drama"}}'
    )


def test_a_tuple_has_a_grammar():
    format = JsonSchema(schema={"type": "array", "prefixItems": [DIGIT, SHORT], "minItems": 1})
    assert all(accepts(format, text) for text in ("[1]", '[1,"a"]'))
    assert not any(accepts(format, text) for text in ("[]", '["a",1]', '[1,"a",2]'))
    # A part is not closed where another part has more items, unless it says how many there are.
    pair = {"type": "array", "prefixItems": [DIGIT, SHORT]}
    assert accepts(JsonSchema(schema={"allOf": [pair | {"maxItems": 2}]}), '[1,"a"]')
    with pytest.raises(UserError, match=r"\$\.allOf\[0\]\.items: a grammar needs the type"):
        grammar_of(JsonSchema(schema={"allOf": [pair, pair | {"items": DIGIT}]}))


class Custom(Format):
    def parse(self, text):
        return text


class Spoken(Custom):
    def grammar(self):
        return 'answer: "a" "b"+'


def test_a_format_of_ones_own_may_have_a_grammar():
    assert accepts(Spoken(), "abb") and not accepts(Spoken(), "a")


@pytest.mark.parametrize(
    "format, message",
    [
        (Custom(), "Custom has no grammar"),
        (Regex(pattern="(?=a).*"), "look-ahead and look-behind, is not supported"),
        (Regex(pattern="(?<!a)b"), "look-ahead and look-behind, is not supported"),
        (Regex(pattern=r"(a)\1"), "backreferences are not supported"),
        (Regex(pattern=r"\bword"), "cannot be written as a grammar"),
        (JsonSchema(schema={"type": "object", "properties": {"a": {}}}), "needs the type of every value"),
        (JsonSchema(schema={"type": "object", "properties": {"a": True}}), "$.properties.a: a grammar needs the type"),
        (JsonSchema(schema={"type": "array"}), "$.items: a grammar needs the type"),
        (
            JsonSchema(schema={"type": "object", "additionalProperties": {"type": "integer"}}),
            "needs closed objects",
        ),
        (JsonSchema(schema={"type": "string", "pattern": "a(?!b)"}), "look-behind, is not supported"),
        (JsonSchema(schema={"type": "array", "items": {"type": "null"}, "uniqueItems": True}), "uniqueItems"),
        (JsonSchema(schema={"anyOf": [{"type": "null"}, True]}), "$.anyOf[1]: a grammar needs the type"),
        (JsonSchema(schema={"type": "array", "prefixItems": [True]}), "$.prefixItems[0]: a grammar needs the type"),
        (
            JsonSchema(schema={"anyOf": [NUMBERED], "oneOf": [NUMBERED]}),
            "$.anyOf[0]: constrained decoding needs closed objects",
        ),
        (JsonSchema(schema=NUMBERED | {"if": True, "then": True}, canonical=True), "Unimplemented keys"),
        (JsonSchema(schema=NUMBERED | {"dependentRequired": {"n": []}}, canonical=True), "Unimplemented keys"),
    ],
)
def test_a_format_that_no_grammar_expresses_is_refused_in_one_line(format, message):
    with pytest.raises(UserError) as error:
        grammar_of(format)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_objects_get_no_keys_that_the_schema_does_not_name():
    format = JsonSchema(schema={"type": "object", "properties": {"a": {"type": "null"}}})
    assert accepts(format, '{"a":null}') and not accepts(format, '{"a":null,"b":null}')


@pytest.mark.parametrize("constrained, exact", [(False, 0.0), (True, 1.0)])
def test_the_switch_constrains_evaluation_and_nothing_else(base, task, constrained, exact):
    folder, write = task
    format = Labels(labels=["yes", "no"])
    train = write(
        "train.jsonl", [{"prompt": "q" * (n % 9) + str(n), "completion": ["yes", "no"][n % 2]} for n in range(60)]
    )
    data = FormatDataModule(format=format, train=train, tokenizer=base)
    module = FormatModule(base=base, format=format, max_new_tokens=8, constrained=constrained)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder, precision="32-true",
    )  # fmt: skip
    trainer.validate(module, data, verbose=False)
    assert module.evaluation["format/exact"] == exact
    assert module.evaluation["val/loss"] > 5 and module.evaluation["val/parity"] == 1.0


def test_without_the_library_one_line_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"needs llguidance; pip install -e '.\[constrained\]'$"):
        grammar_of(Labels(labels=["a"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "phi-3-mini-instruct", "mistral-v3-instruct"])
def test_targets_of_other_tokenizers_keep_the_grammar(name):
    renderer = Renderer.load(str(shared(f"tokenizers/{name}")))
    grammar = grammar_of(FORMATS["json"], renderer)
    for answer in ('{"n":1,"s":"é😀"}', '{"n": 1, "s": ""}'):
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        [encoded] = renderer.encode([(turn, "")])
        assert grammar.accepted(grammar.matcher(ANY), encoded.target_ids) == len(encoded.target_ids)
        logits = torch.zeros(1, len(renderer.tokenizer) + 64)
        logits[0, encoded.target_ids] = 1.0 + torch.arange(len(encoded.target_ids), 0, -1)
        matcher, written = grammar.matcher(ANY), []
        while not written or written[-1] != encoded.target_ids[-1]:
            written += grammar.choose([matcher], logits)[0]
            logits[0, written[-1]] -= 1e3
        text, finished = renderer.answer(written)
        assert FORMATS["json"].check(text, finished=finished).exact


@pytest.mark.slow
def test_the_grammar_of_tool_calls_allows_the_tools_of_the_row_and_tags_that_are_one_token():
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = json.dumps([{"name": "weather", "parameters": city}, {"name": "now"}])
    renderer = Renderer.load(str(shared("tokenizers/qwen3")))

    def taken(format, renderer, *calls):
        grammar = grammar_of(format.of_row(tools), renderer)
        ids = [*renderer.tokenizer("\n".join(calls), add_special_tokens=False)["input_ids"], renderer.stop_ids[0]]
        return grammar.accepted(grammar.matcher(replace(ANY, schema=tools)), ids) == len(ids)

    def tag(call):
        return f"<tool_call>\n{call}\n</tool_call>"

    paris, now = '{"name": "weather", "arguments": {"city": "Paris"}}', '{"name": "now", "arguments": {}}'
    for encoder in (renderer, RENDERER):  # in one the tags are tokens, in the other text
        assert taken(ToolCalls(), encoder, tag(paris)) and taken(ToolCalls(), encoder, tag(now), tag(paris))
        for text in (paris, tag(paris.replace("weather", "time")), tag('{"name": "weather", "arguments": {}}'), "Hi."):
            assert not taken(ToolCalls(), encoder, text), text
    assert taken(ToolCalls("llama"), RENDERER, paris.replace("arguments", "parameters"))
