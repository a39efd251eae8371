"""Write the demo's data set: support messages and the JSON tickets that they should become.

Real tickets cannot be shipped, so a random generator draws a ticket and then words it as a mail. The target follows
from the message alone:

* ``category`` is what went wrong, ``priority`` how urgent the writer says it is;
* name, city, order number, items and amount are copied; there are millions of combinations, so that a model cannot
  memorise them;
* ``date`` and ``currency`` are converted ("12 March 2026" -> "2026-03-12", "euros" -> "EUR").

``train.jsonl`` is messy, as collected data is: duplicates, contradictions, targets in other formats, HTML remains,
rows that are also in the test set. Cleaning has to find them; they are about one row in six. ``validation.jsonl`` and
``test.jsonl`` are clean. ``production.jsonl`` has prompts only, and longer ones, so that the audit finds length drift.

    python -m formtune.demo.generator OUT_DIR
"""

# ruff: noqa: SIM905 - lists of words read better as text

import json
import random
import sys
from pathlib import Path

SYSTEM = "Turn the support message into a ticket and answer with one JSON object only."

SEEDS = {"train": 11, "validation": 12, "test": 13, "production": 14}  # the demo's base was built with others
CATEGORIES = ("billing", "delivery", "damage", "return", "account", "technical")
PRIORITIES = ("low", "normal", "high", "urgent")
CURRENCIES = {"EUR": ("euros", "EUR", "euro in total"), "USD": ("dollars", "USD", "US dollars"),
              "GBP": ("pounds", "GBP", "pounds sterling"), "CHF": ("francs", "CHF", "Swiss francs")}
MONTHS = "January February March April May June July August September October November December".split()

GREETINGS = (
    "Hello,", "Hi,", "Good morning,", "Hey there,", "Dear support team,", "To whom it may concern,",
    "Hello everyone,", "Hi team,", "Good afternoon,", "Greetings,", "Dear Sir or Madam,", "Dear all,")
FIRST = (
    "Anna Ben Carla David Elena Felix Greta Hugo Ines Jonas Klara Luca Maja Noah Olga Pavel Rosa Simon Tara "
    "Viktor Aisha Bruno Chiara Dario Esther Farid Hana Ivan Judit Kofi Lena Marek Nadia Oskar Priya Rafael Selma "
    "Tomás Yusuf Zoë André Benoît Léa Søren Jürgen Mónica Agnès Björn Emil Fatima").split()
SURNAME = (
    "Bar Lind Kov Mar Pet Sand Hol Ber Cas Dom Fer Gal Har Jan Kal Lor Mor Nor Ol Pal Ros Sal Tor Val Wal Zim "
    "Ström Mül Peñ Gar".split(),
    "a e i o u an en in on ar er or al el ul".split(),
    "son berg qvist sen ski dez mann ton ti ni lli rez nova dal feld stad man ga ra to vic ková ño rös".split(),
)
CITIES = (
    "Porto Lyon Graz Leeds Ghent Turin Basel Malmö Gdańsk Cork Bergen Zadar Seville Nantes Utrecht Vilnius "
    "Tampere Brno Split Bologna Aarhus Geneva Krakow Dublin Münster Toledo Parma Riga Tartu Bath Lugano Boston "
    "Denver Austin Tucson Oakland Salem Fresno").split()
ADJECTIVES = (
    "red blue black white green small large folding wireless wooden steel ceramic leather cotton electric "
    "portable digital compact heavy vintage").split()
NOUNS = (
    "lamp kettle chair desk backpack headphones keyboard blanket toaster mixer monitor bicycle jacket camera "
    "speaker printer mattress suitcase tent drill heater router tablet watch mirror clock").split()

PROBLEMS = {
    "billing": (
        "I was charged twice for the {x}.", "The invoice for the {x} shows the wrong sum.",
        "You took the money for the {x} two times from my card.", "The discount is missing on the bill for the {x}.",
        "My receipt for the {x} does not match what I paid.",
        "Why is there an extra fee on the invoice for the {x}?"),
    "delivery": (
        "The {x} never arrived.", "I am still waiting for the {x}.", "The courier has not brought the {x} yet.",
        "Tracking says the parcel with the {x} is lost.", "The shipment with the {x} is far too late.",
        "Where is my parcel with the {x}?"),
    "damage": (
        "The {x} came broken.", "There is a deep crack in the {x}.", "When I opened the box, the {x} was scratched.",
        "The {x} was smashed in the package.", "I unpacked the {x} and found dents all over.",
        "The {x} got torn on the way to me."),
    "return": (
        "I want to send back the {x}.", "Please tell me how to return the {x}.", "I changed my mind about the {x}.",
        "The {x} is not what I expected and I would like my money back.",
        "Can I exchange the {x} for something else?", "The {x} does not fit, so I need a return label."),
    "account": (
        "I cannot log in any more.", "My password reset mail never comes.",
        "Please change the address in my profile.", "My account has been locked.",
        "I would like to delete my user account.", "Your site no longer knows my login."),
    "technical": (
        "The {x} does not switch on.", "The {x} stops working after a minute.", "I cannot get the {x} to connect.",
        "The {x} keeps crashing since the update.", "There is an error code on the {x}.",
        "The setup of the {x} fails every time."),
}
URGENCY = {
    "low": (
        "There is no hurry.", "Take your time.", "It is not important, just let me know some day.", "This can wait.",
        "No rush at all."),
    "normal": (
        "Please look into it.", "Thanks for your help.", "I look forward to your answer.", "Could you check this?",
        "Please let me know what to do."),
    "high": (
        "Please answer soon, it matters to me.", "I need a reply by tomorrow.", "This is quite important for me.",
        "I expect a quick solution.", "Please treat this with priority."),
    "urgent": (
        "This is an emergency!", "I need help right now!", "It is extremely urgent.", "Please act immediately!",
        "I need this solved within the hour!"),
}
ORDER = (
    "My order number is {o}.", "It is about order {o}.", "Order: {o}.", "The order was {o}.",
    "You find it under {o}.", "Reference {o}.", "(order {o})", "See order no. {o}.")
NO_ORDER = (
    "I do not have the order number at hand.", "I lost the order number.", "There is no order number on it.", "")
PAID = (
    "I paid {a} {c} on {d}.", "On {d} I paid {a} {c}.", "It was {a} {c}, bought on {d}.", "Date {d}, sum {a} {c}.",
    "The purchase was on {d} and cost {a} {c}.", "You got {a} {c} from me on {d}.", "Bought on {d} for {a} {c}.",
    "My bank shows {a} {c}, dated {d}.")
SIGNED = (
    "Kind regards,\n{n}, {t}", "Best,\n{n}\n{t}", "Thanks,\n{n} from {t}", "Yours sincerely,\n{n} ({t})",
    "Regards, {n}, {t}")
INTRODUCED = ("My name is {n} and I live in {t}.", "This is {n} from {t}.", "I am {n}, writing from {t}.")
SMALL_TALK = (
    "I hope you are having a good week.", "The weather here has been awful, so I had time to write this.",
    "I have been a customer of yours for many years and was always happy until now.",
    "My neighbour told me that you usually solve such things without trouble.",
    "Sorry for the long mail, I just want to tell you everything that happened.",
    "I already tried the telephone, but after twenty minutes of music I gave up.",
    "By the way, the new catalogue looks very nice.", "My sister had the same trouble and recommended to write.")
FORWARDED = "---------- Forwarded message ----------\nFrom: {f}\nTo: the support desk\nSubject: {s}\n\n"
FOOTER = (
    "\n\n--\nSent from my phone", "\n\n--\nPlease think of the trees before you print this mail.",
    "\n\nThis mail may hold confidential words. If it is not meant for you, please tell the sender and delete it.")


def name(rng):
    """Return an invented full name, one of about half a million."""
    return f"{rng.choice(FIRST)} {''.join(rng.choice(part) for part in SURNAME)}"


def ticket(rng, long=False):
    """Draw a ticket and word it as a message. Return ``(message, answer)``; ``long`` adds forwarding and small talk."""
    category, priority = rng.choice(CATEGORIES), rng.choice(PRIORITIES)
    count = 0 if category == "account" else rng.choice((1, 1, 1, 2, 2, 3))
    items: list[str] = []
    while len(items) < count:
        item = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        items += [item] if item not in items else []
    has_order = rng.random() < 0.75
    order = f"{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}-{rng.randrange(10000, 100000)}"
    # Amounts end in a digit other than 0, since 12.50 and 12.5 are the same number and JSON knows only the second.
    cents = rng.choice((None, rng.randrange(1, 10) + 10 * rng.randrange(10)))
    whole = rng.randrange(5, 2000)
    amount = whole if cents is None else float(f"{whole}.{cents:02d}")
    currency = rng.choice(tuple(CURRENCIES))
    year, month, day = rng.randrange(2021, 2027), rng.randrange(1, 13), rng.randrange(1, 29)
    iso = f"{year}-{month:02d}-{day:02d}"
    person, city = name(rng), rng.choice(CITIES)

    listed = items[0] if len(items) == 1 else " and the ".join((", the ".join(items[:-1]), items[-1])) if items else ""
    words = {
        "x": listed, "o": order, "n": person, "t": city, "a": amount, "c": rng.choice(CURRENCIES[currency]),
        "d": rng.choice((iso, f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}")),
    }
    body = [rng.choice(PROBLEMS[category]), rng.choice(ORDER if has_order else NO_ORDER), rng.choice(PAID)]
    rng.shuffle(body)
    body.insert(rng.choice((0, 3, 3)), rng.choice(URGENCY[priority]))
    introduced = rng.random() < 0.3
    if introduced:
        body.insert(0, rng.choice(INTRODUCED))
    if long:
        for talk in rng.sample(SMALL_TALK, rng.randrange(2, 7)):
            body.insert(rng.randrange(len(body) + 1), talk)
    text = rng.choice(GREETINGS) + rng.choice(("\n\n", "\n", " ")) + " ".join(part for part in body if part)
    text = (text if introduced else text + "\n\n" + rng.choice(SIGNED)).format(**words)
    if long:
        head = FORWARDED.format(f=person, s=rng.choice(("my order", "question", "please help", "Re: your shop")))
        text = rng.choice((head, "")) + text + rng.choice(FOOTER)
    answer = {"category": category, "priority": priority, "customer": {"name": person, "city": city},
              "order_id": order if has_order else None, "items": items, "amount": amount, "currency": currency,
              "date": iso}
    return text, answer


def canonical(answer):
    """Return the one right way to write ``answer``: compact JSON, keys in schema order."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def tickets(seed, count, taken=(), long=False):
    """Return ``count`` pairs whose messages differ from one another and from those in ``taken``.

    No message names two items that begin alike ("red lamp", "red kettle"): telling those apart is beyond what a base
    of this size copies reliably, and would make the demo one of the base's limits and not of format.
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
    lost = rng.choice(("amount", "priority", "date"))
    without = {key: value for key, value in answer.items() if key != lost}
    return {
        "fenced": f"```json\n{json.dumps(answer, ensure_ascii=False, indent=2)}\n```",
        "yaml": "\n".join(f"{key}: {value}" for key, value in answer.items()),
        "python": repr(answer),
        "missing": canonical(without),
        "enum": canonical(answer | {"priority": rng.choice(("asap", "medium", "High"))}),
        "string": canonical(answer | {"amount": str(answer["amount"])}),
        "trailing": canonical(answer) + "\n\nLet me know if you need anything else!",
    }


def near_duplicate(message, rng):
    """Return ``message`` with one harmless change, as if the mail was sent twice."""
    return rng.choice((message + "!", message.replace(".", "", 1), message.lower().capitalize(),
                       message.replace("I ", "i ", 1) + ".", message.replace(" the ", " that ", 1) + " Thanks"))


def messy_train(test, taken):
    """Return the raw training rows as ``(message, answer, kind)``, shuffled.

    1,660 are clean and about 340 need cleaning; ``kind`` is what was done to a row ("" for nothing).
    """
    rng = random.Random(SEEDS["train"])
    clean = tickets(SEEDS["train"], 1850, taken)
    base, extra = clean[:1660], iter(clean[1660:])
    rows = [(message, canonical(answer), "") for message, answer in base]
    rows += [(message, canonical(answer), "duplicate") for message, answer in rng.sample(base, 60)]
    for message, answer in rng.sample(base, 50):
        rows.append((near_duplicate(message, rng), canonical(answer), "near-duplicate"))
    for message, answer in rng.sample(base, 20):  # the same message, another answer
        other = rng.choice([value for value in PRIORITIES if value != answer["priority"]])
        rows.append((message, canonical(answer | {"priority": other}), "contradiction"))
    rows += [(message, canonical(answer), "leak") for message, answer in rng.sample(test, 25)]
    for number in range(90):  # seven wrong formats in turn
        message, answer = next(extra)
        name, text = list(wrong_formats(answer, rng).items())[number % 7]
        rows.append((message, text, f"format: {name}"))
    for _ in range(45):
        message, answer = next(extra)
        rows.append((rng.choice(("  ", "\n", "\t")) + message + "  \n", f" {canonical(answer)}\n", "stray white space"))
    for _ in range(20):
        message, answer = next(extra)
        at = message.index(" ")
        mark = rng.choice("\u200b\u200d\ufeff\x07\x0b")
        rows.append((message[:at] + mark + message[at:], canonical(answer), "invisible characters"))
    for _ in range(30):
        message, answer = next(extra)
        marked = message.replace(". ", ".&nbsp;", 1).replace(" and ", " &amp; ").replace("\n", "<br>")
        rows.append((f"<p>{marked}</p>", canonical(answer), "HTML remains"))
    rng.shuffle(rows)
    return rows


def held_out():
    """Return the test and the validation pairs."""
    test = tickets(SEEDS["test"], 330)
    return test, tickets(SEEDS["validation"], 200, {message for message, _ in test})


def planted():
    """Return what was done to each training row, in the order of the file."""
    test, validation = held_out()
    return [kind for _, _, kind in messy_train(test, {message for message, _ in test + validation})]


def datasets():
    """Return all four files as ``{name: rows}``, each row a dict."""
    test, validation = held_out()
    train = messy_train(test, {message for message, _ in test + validation})
    files = {"train": [(message, answer) for message, answer, _ in train]}
    files |= {key: [(m, canonical(a)) for m, a in pairs] for key, pairs in (("validation", validation), ("test", test))}
    rows = {key: [{"prompt": p, "completion": c} for p, c in pairs] for key, pairs in files.items()}
    production = tickets(SEEDS["production"], 300, long=True)
    return rows | {"production": [{"prompt": message} for message, _ in production]}


def main():
    """Write the four files into the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for key, rows in datasets().items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{key}.jsonl").write_bytes(lines.encode())


if __name__ == "__main__":
    main()
