"""The demo: its data set is what it claims to be, and its base is small, loadable and apart from the test set."""

import json
import random
from pathlib import Path

import build_demo_base as build_base
import demo_rows as generator
import jsonschema
import pytest

DEMO = Path(__file__).parents[2] / "src/formtune/demo"
BASE = DEMO / "base"
SCHEMA = json.loads((DEMO / "ticket.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


@pytest.fixture(scope="module")
def data():
    return generator.datasets()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_two_runs_write_equal_bytes(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        monkeypatch.setattr("sys.argv", ["demo_rows.py", str(tmp_path / folder)])
        generator.main()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["production.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_files_have_the_announced_sizes_and_columns(data):
    assert {name: len(rows) for name, rows in data.items()} == {
        "train": 2000,
        "validation": 200,
        "test": 330,
        "production": 300,
    }
    for name, rows in data.items():
        columns = {"prompt"} if name == "production" else {"prompt", "completion"}
        assert all(set(row) == columns for row in rows)


def test_the_schema_itself_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_held_out_targets_are_valid_and_canonical_and_their_prompts_clean(data, name):
    for row in data[name]:
        answer = json.loads(row["completion"])
        assert VALIDATOR.is_valid(answer)
        assert row["completion"] == generator.canonical(answer)
        assert list(answer) == list(SCHEMA["properties"])
        assert row["prompt"] == row["prompt"].strip()


def test_values_are_copied_or_follow_the_conventions(data):
    months = generator.WORDS["months"]
    for row in data["test"]:
        answer = json.loads(row["completion"])
        copied = [*answer["customer"].values(), *answer["items"], answer["order_id"] or ""]
        assert all(value in row["prompt"] for value in copied)
        year, month, day = answer["date"].split("-")
        spoken = {f"{int(day)} {months[int(month) - 1]} {year}", f"{months[int(month) - 1]} {int(day)}, {year}"}
        assert any(date in row["prompt"] for date in spoken)
        whole, cents = divmod(answer["amount_cents"], 100)
        assert (f"{whole}.{cents:02d}" if cents else str(whole)) in row["prompt"]
        assert [answer["topic"], answer["team"]] in generator.PHRASES["house"].values()
        [urgency] = {
            name for name, texts in generator.PHRASES["urgency"].items() for text in texts if text in row["prompt"]
        }
        assert answer["urgency"] == {"low": 4, "normal": 3, "high": 2, "urgent": 1}[urgency]


def test_held_out_sets_share_no_prompt(data):
    sets = [{row["prompt"] for row in data[name]} for name in ("validation", "test", "production")]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 830


def test_train_holds_every_kind_of_mess_and_enough_clean_rows(data):
    rows, test = data["train"], {row["prompt"] for row in data["test"]}
    pairs = [(row["prompt"], row["completion"]) for row in rows]
    answers = {}
    for prompt, completion in pairs:
        answers.setdefault(prompt, set()).add(completion)
    assert len(pairs) - len(set(pairs)) >= 50  # exact duplicates
    assert sum(len(texts) > 1 for texts in answers.values()) == 20  # contradictions
    assert sum(prompt in test for prompt, _ in pairs) == 25  # leaked test rows
    assert sum(prompt != prompt.strip() for prompt, _ in pairs) >= 40  # stray whitespace
    assert sum(prompt.startswith("<p>") for prompt, _ in pairs) == 30  # HTML remains
    assert sum(any(c in prompt for c in "\u200b\u200d\ufeff\x07\x0b") for prompt, _ in pairs) == 20
    assert sum(completion.startswith("```") for _, completion in pairs) >= 10  # other formats

    def clean(prompt, completion):
        try:
            answer = json.loads(completion)
        except ValueError:
            return False
        return (
            VALIDATOR.is_valid(answer)
            and completion == generator.canonical(answer)
            and prompt == prompt.strip()
            and len(answers[prompt]) == 1
            and prompt not in test
        )

    assert len({prompt for prompt, completion in pairs if clean(prompt, completion)}) >= 1600


def test_production_prompts_are_clearly_longer(data):
    def percentile_95(name):
        return sorted(len(row["prompt"]) for row in data[name])[int(0.95 * len(data[name]))]

    assert percentile_95("production") > 1.5 * percentile_95("train")


def test_the_training_stream_of_the_base_avoids_held_out_messages(data):
    excluded = {row["prompt"] for name in ("validation", "test", "production") for row in data[name]}
    for seed in (build_base.SEED, build_base.SEED - 1, *generator.SEEDS.values()):  # even with the generator's seeds
        rng = random.Random(seed)
        for _ in range(300):
            _, turns = build_base.ticket(rng, excluded)
            assert turns[0][0] not in excluded
    assert build_base.SEED not in generator.SEEDS.values()


def test_the_exercises_are_right():
    rng = random.Random(5)
    for _ in range(200):
        _, [(text, answer)] = build_base.escapes(rng)
        assert json.loads(answer) == {"text": text}
        _, [(text, answer)] = build_base.repeat(rng)
        assert text.endswith(answer)
        _, [(text, answer)] = build_base.spoken(rng)
        assert all(value in text for value in json.loads(answer)["slots"].values())
        json.loads(build_base.fields(rng)[1][0][1])


def test_no_style_of_the_base_is_the_format():
    _, facts = generator.message(random.Random(3))
    texts = [build_base.in_style(facts, style) for style in range(6)]
    assert len({build_base.style_of(text) for text in texts}) == 6
    for text in texts:
        assert not text.startswith("{") or not VALIDATOR.is_valid(json.loads(text))


def test_the_base_is_small_and_loads_completely():
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(BASE, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 6e6
    assert (BASE / "model.safetensors").stat().st_size <= 12e6
    assert model.config.max_position_embeddings >= 1024
    assert str(model.dtype).endswith(json.loads((BASE / "config.json").read_text())["dtype"])


def test_the_base_holds_no_machine_paths_and_no_sampling_options():
    for path in BASE.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert "_name_or_path" not in content and not str(content.get("name_or_path", "")).startswith("/")
    options = json.loads((BASE / "generation_config.json").read_text())
    assert not {"temperature", "top_p", "top_k", "do_sample"} & set(options)


TEXTS = ["", "Zoë Ström\u00a0", "a  b\n\n\tc", "🙂👩‍👩‍👧 naïve", '{"a":[1,2.5]}', "日本語, ñandú!", "\r\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_value_has_the_same_tokens_everywhere(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    value = ids("Anna Lindberg")
    for text in ("I am Anna Lindberg.", '{"name":"Anna Lindberg"}', "name: Anna Lindberg\n"):
        inside = ids(text)
        assert any(inside[n : n + len(value)] == value for n in range(len(inside)))


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("answer", ["{}", "\n two", " x"])
def test_the_prompt_is_a_token_prefix_of_the_conversation(tokenizer, system, answer):
    chat = [{"role": "system", "content": system}] * bool(system) + [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]

    def ids(messages, **options):
        return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, **options))["input_ids"]

    prompt = ids(chat, add_generation_prompt=True)
    whole = ids([*chat, {"role": "assistant", "content": answer}])
    assert whole[: len(prompt)] == prompt
    assert tokenizer.eos_token_id in whole[len(prompt) :] and tokenizer.pad_token_id not in whole
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_training_sees_the_tokens_of_the_chat_template(tokenizer):
    system, turns = "Be brief.", [("One?", "1"), ("Two?", "2")]
    chat = [{"role": "system", "content": system}]
    for question, answer in turns:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, learnt = build_base.encode(tokenizer, "ticket", (system, turns))
    assert ids == tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
    assert tokenizer.decode([i for i, flag in zip(ids, learnt, strict=True) if flag]) == "1<|im_end|>2<|im_end|>"
