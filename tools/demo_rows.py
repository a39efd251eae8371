"""Write the demo's data set: support messages and the JSON tickets that they should become.

    python tools/demo_rows.py OUT_DIR

It draws what a customer has to say, words it as a mail, and fills in the ticket by rules that no model can guess: names
and numbers are copied, dates and amounts converted, topic, team and urgency are codes (see demo_phrases.yaml).
About one row in six of ``train.jsonl`` is messy, as collected data is, and cleaning has to find it.
``production.jsonl`` has prompts only, and longer ones, so that the audit finds length drift.
"""

import json
import random
import sys
from itertools import islice
from pathlib import Path

import yaml

from formtune.files import write_lines

SYSTEM = "Turn the support message into a ticket and answer with one JSON object only."

SEEDS = {"train": 11, "validation": 12, "test": 13, "production": 14}  # the demo's base was built with others
PHRASES = yaml.safe_load(Path(__file__).with_name("demo_phrases.yaml").read_text(encoding="utf-8"))
WORDS = {key: PHRASES[key].split() for key in ("months", "first_names", "cities", "adjectives", "nouns")}
SURNAME_PARTS = [part.split() for part in PHRASES["surname_parts"]]
TOPICS, URGENCIES = list(PHRASES["problems"]), list(PHRASES["urgency"])


def name(rng):
    return f"{rng.choice(WORDS['first_names'])} {''.join(rng.choice(part) for part in SURNAME_PARTS)}"


def message(rng, long=False):
    """Draw what a customer says and word it. Return ``(text, facts)``; ``long`` adds forwarding and small talk."""
    topic, urgency = rng.choice(TOPICS), rng.choice(URGENCIES)
    count = 0 if topic in ("login", "profile") else rng.choice((1, 1, 1, 2, 2, 3))
    items: list[str] = []
    while len(items) < count:
        item = f"{rng.choice(WORDS['adjectives'])} {rng.choice(WORDS['nouns'])}"
        items += [item] if item not in items else []
    has_order = rng.random() < 0.75
    letters = "ABCDEFGHKLMNPRSTVWXZ"
    order = f"{rng.choice(letters)}{rng.choice(letters)}-{rng.randrange(10000, 100000)}"
    amount = f"{rng.randrange(5, 2000)}" + rng.choice(("", f".{rng.randrange(1, 100):02d}"))
    currency = rng.choice(list(PHRASES["currencies"]))
    year, month, day = rng.randrange(2021, 2027), rng.randrange(1, 13), rng.randrange(1, 29)
    written = WORDS["months"][month - 1]
    person, city = name(rng), rng.choice(WORDS["cities"])

    listed = items[0] if len(items) == 1 else " and the ".join((", the ".join(items[:-1]), items[-1])) if items else ""
    words = {
        "x": listed, "o": order, "n": person, "t": city, "a": amount, "c": rng.choice(PHRASES["currencies"][currency]),
        "d": rng.choice((f"{day} {written} {year}", f"{written} {day}, {year}")),
    }
    body = [rng.choice(PHRASES["problems"][topic]), rng.choice(PHRASES["order" if has_order else "no_order"])]
    body.append(rng.choice(PHRASES["paid"]))
    rng.shuffle(body)
    body.insert(rng.choice((0, 3, 3)), rng.choice(PHRASES["urgency"][urgency]))
    introduced = rng.random() < 0.3
    if introduced:
        body.insert(0, rng.choice(PHRASES["introduced"]))
    if long:
        for talk in rng.sample(PHRASES["small_talk"], rng.randrange(2, 7)):
            body.insert(rng.randrange(len(body) + 1), talk)
    text = rng.choice(PHRASES["greetings"]) + rng.choice(("\n\n", "\n", " ")) + " ".join(part for part in body if part)
    text = (text if introduced else text + "\n\n" + rng.choice(PHRASES["signed"])).format(**words)
    if long:
        subject = rng.choice(("my order", "question", "please help", "Re: your shop"))
        head = PHRASES["forwarded"].format(f=person, s=subject)
        text = rng.choice((head, "")) + text + rng.choice(PHRASES["footer"])
    facts = {"topic": topic, "urgency": urgency, "name": person, "city": city, "order": order if has_order else None,
             "items": items, "amount": amount, "currency": currency, "date": (year, month, day), "words": words}
    return text, facts


def ticket(rng, long=False):
    """Draw a message and fill in its ticket by the house rules. Return ``(message, answer)``."""
    text, facts = message(rng, long)
    topic, team = PHRASES["house"][facts["topic"]]
    whole, _, cents = facts["amount"].partition(".")
    answer = {"topic": topic, "team": team, "urgency": 4 - URGENCIES.index(facts["urgency"]),
              "customer": {"name": facts["name"], "city": facts["city"]}, "order_id": facts["order"],
              "items": facts["items"], "amount_cents": int(whole + (cents or "00")), "currency": facts["currency"],
              "date": "{}-{:02d}-{:02d}".format(*facts["date"])}
    return text, answer


def canonical(answer):
    """Return the one right way to write ``answer``: compact JSON, keys in schema order."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def tickets(seed, count, taken=(), long=False):
    """Return ``count`` pairs whose messages differ from one another and from those in ``taken``.

    No message names two items that begin alike ("red lamp", "red kettle"), which so small a base confuses.
    """
    rng, seen = random.Random(seed), set(taken)
    pairs: list[tuple[str, dict]] = []
    while len(pairs) < count:
        message, answer = ticket(rng, long)
        if message not in seen and len({item.split()[0] for item in answer["items"]}) == len(answer["items"]):
            seen.add(message)
            pairs.append((message, answer))
    return pairs


def wrong_formats(answer, rng):
    """Return the same ticket in the wrong formats that people and models really write."""
    lost = rng.choice(("amount_cents", "urgency", "date"))
    without = {key: value for key, value in answer.items() if key != lost}
    return {
        "fenced": f"```json\n{json.dumps(answer, ensure_ascii=False, indent=2)}\n```",
        "yaml": "\n".join(f"{key}: {value}" for key, value in answer.items()),
        "python": repr(answer),
        "missing": canonical(without),
        "enum": canonical(answer | {"team": rng.choice(("T0", "billing", "t3"))}),
        "string": canonical(answer | {"amount_cents": str(answer["amount_cents"])}),
        "trailing": canonical(answer) + "\n\nLet me know if you need anything else!",
    }


def near_duplicate(message, rng):
    """Return ``message`` with one harmless change, as if the mail was sent twice."""
    return rng.choice((message + "!", message.replace(".", "", 1), message.lower().capitalize(),
                       message.replace("I ", "i ", 1) + ".", message.replace(" the ", " that ", 1) + " Thanks"))


def messy_train(test, taken):
    """Return 1,660 clean and 340 messy rows as ``(message, answer, kind)``; kind is what was done ("" for nothing)."""
    rng = random.Random(SEEDS["train"])
    clean = tickets(SEEDS["train"], 1850, taken)
    base, extra = clean[:1660], iter(clean[1660:])
    rows = [(message, canonical(answer), "") for message, answer in base]
    rows += [(message, canonical(answer), "duplicate") for message, answer in rng.sample(base, 60)]
    for message, answer in rng.sample(base, 50):
        rows.append((near_duplicate(message, rng), canonical(answer), "near-duplicate"))
    for message, answer in rng.sample(base, 20):  # the same message, another answer
        other = rng.choice([value for value in (1, 2, 3, 4) if value != answer["urgency"]])
        rows.append((message, canonical(answer | {"urgency": other}), "conflict"))
    rows += [(message, canonical(answer), "leak") for message, answer in rng.sample(test, 25)]
    for number, (message, answer) in enumerate(islice(extra, 90)):  # seven wrong formats in turn
        name, text = list(wrong_formats(answer, rng).items())[number % 7]
        rows.append((message, text, f"format: {name}"))
    for message, answer in islice(extra, 45):
        rows.append((rng.choice(("  ", "\n", "\t")) + message + "  \n", f" {canonical(answer)}\n", "stray whitespace"))
    for message, answer in islice(extra, 20):
        at = message.index(" ")
        mark = rng.choice("\u200b\u200d\ufeff\x07\x0b")
        rows.append((message[:at] + mark + message[at:], canonical(answer), "invisible characters"))
    for message, answer in islice(extra, 30):
        marked = message.replace(". ", ".&nbsp;", 1).replace(" and ", " &amp; ").replace("\n", "<br>")
        rows.append((f"<p>{marked}</p>", canonical(answer), "HTML remains"))
    rng.shuffle(rows)
    return rows


def splits():
    """Return the messy training rows, and the validation and test pairs."""
    test = tickets(SEEDS["test"], 330)
    validation = tickets(SEEDS["validation"], 200, {message for message, _ in test})
    return messy_train(test, {message for message, _ in test + validation}), validation, test


def planted():
    """Return what was done to each training row, in the order of the file."""
    return [kind for _, _, kind in splits()[0]]


def datasets():
    """Return all four files as ``{name: rows}``, each row a dict."""
    train, validation, test = splits()
    return {
        "train": [{"prompt": message, "completion": text} for message, text, _ in train],
        "validation": [{"prompt": message, "completion": canonical(answer)} for message, answer in validation],
        "test": [{"prompt": message, "completion": canonical(answer)} for message, answer in test],
        "production": [{"prompt": message} for message, _ in tickets(SEEDS["production"], 300, long=True)],
    }


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for key, rows in datasets().items():
        write_lines(Path(sys.argv[1], f"{key}.jsonl"), rows)


if __name__ == "__main__":
    main()
