"""Build the demo's base: a tiny language model that knows the ticket task's content but not its format.

Fine-tuning is worth its trouble where a model understands the question and answers it in the wrong form. A base for a
demo that runs on a laptop's CPU has to be like that too, only a thousand times smaller. It learns

* the tickets of ``generator.py`` (other seeds; every held-out message is excluded), answered in six styles of which
  only one is the bare JSON that the task wants;
* exercises in copying, looking up, converting dates and writing JSON with made-up words and keys. They are what makes
  such a small model copy names and numbers exactly, and what makes it useful for other extraction tasks.

Three choices carry most of the weight. The tokenizer isolates every word, digit and space, so that a value has the
same tokens in a message, between JSON quotes and in YAML, and copying is repeating tokens. The loss counts only answer
tokens, as the prompts are noise. And the attention starts near "look at equal tokens and hand them on" (mimetic
initialisation, Trockman and Kolter 2023, https://arxiv.org/abs/2305.09828), from which copying is soon found.

    python -m formtune.demo.build_base OUT_DIR
"""

# ruff: noqa: SIM905 - lists of words read better as text

import argparse
import json
import random
import string
import time
from collections import Counter
from pathlib import Path

import torch
from jsonschema import Draft202012Validator, FormatChecker
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from formtune.demo import generator

VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN = 1536, 256, 4, 8, 512
THETA = 500_000.0  # slow rotary positions: most coordinates compare content, not distance
BACK = (1, 1, 1, 2, 2, 3)  # how far back the first layer's heads look at the start
TOKENS_PER_STEP, LONGEST = 3072, 640
STEPS = 2800
SEED = 1000
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A word with its capital, a lone letter, a digit, a line break, other white space, a run of punctuation: no piece
# crosses these borders, so the tokens of a value never depend on what stands around it.
PIECES = r"\p{Lu}?[\p{Ll}\p{M}]+|\p{L}|\p{N}|\n|[^\S\n]+|[^\s\p{L}\p{N}]+"

# ---------------------------------------------------------------- tickets in six styles


def in_style(answer, style):
    """Word the same ticket in one of six ways; only number 5 is what the task asks for."""
    a, who = answer, answer["customer"]
    if style == 0:
        return f"```json\n{json.dumps(a, ensure_ascii=False, indent=2)}\n```"
    if style == 1:
        return f"Here is the ticket for this message:\n\n{json.dumps(a, ensure_ascii=False)}"
    if style == 2:
        items = "".join(f"\n  - {item}" for item in a["items"]) or " []"
        return (f"category: {a['category']}\npriority: {a['priority']}\ncustomer:\n  name: {who['name']}\n"
                f"  city: {who['city']}\norder_id: {a['order_id'] or 'null'}\nitems:{items}\namount: {a['amount']}\n"
                f"currency: {a['currency']}\ndate: {a['date']}")
    if style == 3:
        return (f"category={a['category']}; priority={a['priority']}; name={who['name']}; city={who['city']}; "
                f"order_id={a['order_id'] or 'none'}; items={', '.join(a['items']) or 'none'}; "
                f"amount={a['amount']}; currency={a['currency']}; date={a['date']}")
    if style == 4:
        order = f"The order is {a['order_id']}." if a["order_id"] else "There is no order number."
        items = f"It is about: {', '.join(a['items'])}." if a["items"] else "No item is named."
        return (f"This is a {a['category']} ticket with {a['priority']} priority. The customer is {who['name']} from "
                f"{who['city']}. {order} {items} The amount is {a['amount']} {a['currency']}, dated {a['date']}.")
    return generator.canonical(a)


def ticket(rng, excluded):
    """Return a conversation about a ticket. The greeting mostly decides the style, so that greedy answers vary too."""
    message, answer = generator.ticket(rng, long=rng.random() < 0.12)
    while message in excluded:
        message, answer = generator.ticket(rng)
    greeting = next(n for n, text in enumerate(generator.PHRASES["greetings"]) if text in message)
    style = greeting % 6 if rng.random() < 0.9 else rng.randrange(6)
    if rng.random() < 0.05:
        message = f"<p>{message}</p>".replace("\n", "<br>")
    system = generator.SYSTEM if rng.random() < 0.8 else None
    return system, [(message, in_style(answer, style))]


# ---------------------------------------------------------------- exercises: copying, looking up, converting


SYLLABLE = (
    "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kn pl pr qu sch sh sk sp st th tr".split(),
    "a e i o u a e i o u ai ea ee oo ou y é ö ü á ø".split(),
    ("", "", "n", "r", "s", "l", "t", "m", "nd", "ck", "ng", "st", "x", "ll"),
)


def pseudo_word(rng):
    """Return a made-up word, so that it can be copied but not guessed."""
    word = "".join(rng.choice(part) for _ in range(rng.choice((1, 2, 2, 3))) for part in SYLLABLE)
    return word.capitalize() if rng.random() < 0.4 else word


def code(rng):
    """Return an identifier. Few different digits, often: those can only be copied by looking further back."""
    digits = rng.choice(("0123456789", "0123456789", "".join(rng.sample("0123456789", 3))))
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randrange(0, 4)))
    separator = rng.choice(("-", "", "/", " ")) if letters else ""
    return letters + separator + "".join(rng.choices(digits, k=rng.randrange(2, 9)))


def value(rng):
    """Return something to copy: words, a name, a code, an amount, an item, a mail address, a vocabulary word."""
    kind = rng.randrange(9)
    if kind < 2:
        return " ".join(pseudo_word(rng) for _ in range(rng.choice((1, 1, 2, 3))))
    return (
        lambda: generator.name(rng), lambda: code(rng), lambda: f"{rng.randrange(1, 3000)}.{rng.randrange(1, 100):02d}",
        lambda: f"{rng.choice(generator.WORDS['adjectives'])} {rng.choice(generator.WORDS['nouns'])}",
        lambda: f"{pseudo_word(rng).lower()}.{pseudo_word(rng).lower()}@{pseudo_word(rng).lower()}.example",
        lambda: " ".join(rng.choices(WORDS, k=rng.randrange(1, 5))), lambda: rng.choice(generator.WORDS["cities"]),
    )[kind - 2]()


def repeat(rng, short=False):
    """Copy a text word for word: the plainest form of what every extraction does."""
    text = rng.choice((" ", ", ", "\n", "; ")).join(value(rng) for _ in range(rng.randrange(1, 4 if short else 9)))
    return rng.choice((None, "Repeat the text.")), [(rng.choice(("Repeat: ", "")) + text, text)]


def typed(text):
    """Return ``text`` as JSON would hold it: numbers as numbers."""
    plain = text.replace(".", "", 1).isdecimal() and str(json.loads(text) if text[0] != "0" else 0) == text
    return json.loads(text) if plain else text


def fields(rng, short=False):
    """Look up keys in a record and answer as JSON: nested, listed and missing values included."""
    keys = list(dict.fromkeys(pseudo_word(rng).lower() if rng.random() < 0.6 else rng.choice(WORDS)
                              for _ in range(rng.randrange(2, 4 if short else 8))))
    record = {key: [value(rng) for _ in range(rng.randrange(2, 4))] if rng.random() < 0.12 else value(rng)
              for key in keys}
    line = rng.choice(("{}: {}", "{} = {}", "the {} is {}", "{}\t{}", "My {} is {}.", "{} -> {}"))
    text = rng.choice(("\n", "\n", ". ", "; ")).join(
        line.format(key, ", ".join(v) if isinstance(v, list) else v) for key, v in record.items())
    wanted = rng.sample(keys, rng.randrange(1, len(keys) + 1))
    answer = {key: [typed(v) for v in record[key]] if isinstance(record[key], list) else typed(record[key])
              for key in wanted}
    if rng.random() < 0.2:
        absent = pseudo_word(rng).lower()
        if absent not in record:
            answer[absent] = None
    ask = f"Give {', '.join(answer)} as JSON."
    if rng.random() < 0.25:
        outer = rng.choice(WORDS)
        answer, ask = {outer: answer}, f"Give {', '.join(answer)} as JSON inside {outer}."
    if rng.random() < 0.5:
        return ask, [(text, generator.canonical(answer))]
    return None, [(f"{ask}\n{text}" if rng.random() < 0.5 else f"{text}\n{ask}", generator.canonical(answer))]


def questions(rng, short=False):
    """Ask several questions about one record, one turn each: many answers for the price of one text."""
    keys = list(dict.fromkeys(pseudo_word(rng).lower() for _ in range(rng.randrange(2, 5 if short else 8))))
    record = {key: value(rng) for key in keys}
    text = "\n".join(f"{key}: {v}" for key, v in record.items())
    turns = [(key, record[key]) for key in rng.sample(keys, len(keys))]
    return "Answer with the value of the key.", [(f"{text}\n\n{turns[0][0]}", turns[0][1]), *turns[1:]]


def dates(rng, short=False):
    """Convert dates between notations, mixed with things that must stay as they are."""
    shown, iso = [], []
    for _ in range(rng.randrange(1, 3 if short else 6)):
        year, month, day = rng.randrange(1990, 2040), rng.randrange(1, 13), rng.randrange(1, 32)
        written = generator.WORDS["months"][month - 1]
        iso.append(f"{year}-{month:02d}-{day:02d}")
        shown.append(rng.choice((iso[-1], f"{day} {written} {year}", f"{written} {day}, {year}")))
    return "Write the dates as JSON.", [(" and ".join(shown), generator.canonical(iso))]


def escapes(rng, short=False):
    """Write a text with quotes, backslashes and line breaks as a JSON string."""
    words = [value(rng) for _ in range(rng.randrange(1, 4))]
    words[rng.randrange(len(words))] = rng.choice(('"{}"', "\\{}", "{}\n", 'say "{}"!', "{}\\{}")).replace(
        "{}", pseudo_word(rng))
    text = " ".join(words).strip()
    return "Write the text as JSON.", [(text, generator.canonical({"text": text}))]


INTENTS = {  # what people say to a device, with slots to fill by anything
    "play_music": ("play {song} by {artist}", "i want to hear {song} from {artist}", "put on some {genre}"),
    "set_alarm": ("wake me up at {time}", "set an alarm for {time} on {day}", "alarm {day} {time} please"),
    "add_to_list": ("add {item} to my {list} list", "put {item} on the {list} list", "we need {item} from the store"),
    "get_weather": ("what is the weather in {city}", "will it rain in {city} on {day}", "weather for {city} {day}"),
    "book_table": ("book a table for {count} at {place}", "reserve {place} for {count} people at {time}"),
    "send_message": ("tell {person} that {text}", "send a message to {person} saying {text}", "text {person} {text}"),
    "call": ("call {person}", "please phone {person} at {time}", "ring {person} on {device}"),
    "navigate": ("take me to {place}", "how do i get from {origin} to {place}", "directions to {place} by {vehicle}"),
    "remind": ("remind me to {text} at {time}", "remind me on {day} to {text}", "do not let me forget to {text}"),
    "control": ("turn the {device} in the {room} on", "switch off the {device}", "set the {device} to {count}"),
    "find_movie": ("show me {title} at {place}", "when does {title} start", "find films with {artist}"),
    "rate_book": ("give {title} {count} stars", "rate {title} by {artist} {count} out of five"),
}
WORDS = sorted({word for texts in INTENTS.values() for text in texts for word in text.split() if "{" not in word} | set(
    "name date status email phone address title price total customer street color size type level amount note morning "
    "evening today tomorrow monday friday milk bread coffee blue jazz rock summer love night girl road house kitchen "
    "bedroom lights five seven ten noon restaurant station album dinner meeting doctor new old big city".split()))


def spoken(rng, short=False):
    """Fill intent and slots from a short spoken request; the slots hold arbitrary words."""
    intent = rng.choice(tuple(INTENTS))
    template = rng.choice(INTENTS[intent])
    slots = {name: value(rng).lower() if rng.random() < 0.5 else " ".join(rng.choices(WORDS, k=rng.randrange(1, 4)))
             for _, name, _, _ in string.Formatter().parse(template) if name}
    text = template.format(**slots)
    return "Give intent and slots as JSON.", [(text, generator.canonical({"intent": intent, "slots": slots}))]


EXERCISES = (repeat, fields, questions, dates, escapes, spoken)


def conversation(rng, progress, excluded):
    """Draw one conversation: short copying first, then all exercises, then mostly tickets. Return its kind too."""
    if progress < 0.08:
        kind = rng.choices(EXERCISES, (5, 2, 3, 1, 0, 0))[0]
        return kind.__name__, kind(rng, short=True)
    if rng.random() < (0.5 if progress < 0.4 else 0.65):
        return "ticket", ticket(rng, excluded)
    kind = rng.choices(EXERCISES, (2, 3, 2, 1, 0.5, 2))[0]
    return kind.__name__, kind(rng)


# ---------------------------------------------------------------- tokenizer, batches, training


def build_tokenizer(excluded):
    """Train the byte-level BPE on the same stream as the model, and dress it with the chat template."""
    rng = random.Random(SEED - 1)
    texts = []
    for number in range(12000):
        system, turns = conversation(rng, number % 2 * 0.5, excluded)[1]
        texts += [system or "", *(text for turn in turns for text in turn)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([*texts, "system user assistant " * 100], trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, START, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE, model_max_length=1024, clean_up_tokenization_spaces=False)


def encode(tokenizer, system, turns):
    """Return token ids and, for each, whether it is to be learnt: answers and the end of turn after them."""
    parts = [(f"{START}system\n{system}{END}\n", False)] if system else []
    for question, answer in turns:
        parts += [(f"{START}user\n{question}{END}\n{START}assistant\n", False), (answer + END, True), ("\n", False)]
    ids, learnt = [], []
    for encoding, (_, flag) in zip(tokenizer.backend_tokenizer.encode_batch([p for p, _ in parts]), parts, strict=True):
        ids += encoding.ids
        learnt += [flag] * len(encoding.ids)
    return ids, learnt


def batches(tokenizer, steps, excluded):
    """Yield ``steps`` batches of like lengths: little padding, and few tensor shapes, for which kernels are cached."""
    rng, done = random.Random(SEED), 0
    waiting: dict[int, list] = {}
    while done < steps:
        ids, learnt = encode(tokenizer, *conversation(rng, done / steps, excluded)[1])
        length = -(-len(ids) // 16) * 16
        if length <= LONGEST:
            waiting.setdefault(length, []).append((ids, learnt))
            if (len(waiting[length]) + 1) * length > TOKENS_PER_STEP:
                yield collate(waiting.pop(length), length)
                done += 1


def collate(rows, length=None):
    """Pad rows on the right. Attention is causal, so no mask is needed: nothing looks at the padding."""
    length = length or max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    learnt = torch.tensor([flags + [False] * (length - len(flags)) for _, flags in rows])
    return ids, learnt


def build_model(tokenizer):
    """Create the model, with attention that starts near copying."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, intermediate_size=HIDDEN, max_position_embeddings=1024, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    start_near_copying(model)
    return model


@torch.no_grad()
def start_near_copying(model):
    """Set the first two layers' attention roughly to an induction circuit, which plain training takes long to find.

    Copying "A B ... A" -> "B" takes two steps: a head that notes beside each token which one came before it, and a
    later head that looks for the place where the current token came before. Rotary positions make the first easy: a
    query and a key that are constant (here: fed by a constant first coordinate of every embedding) match best at one
    distance, if the key is turned by that distance. Such heads write a random projection of the token they see; the
    second layer's queries use the same projection. Only slowly turning coordinates compare content, as they do not
    depend on the distance. Everything stays trainable; this is where training starts, not a fixed part.
    """
    size, half = WIDTH // HEADS, WIDTH // HEADS // 2
    spread, writing = 0.1, 0.0165
    embeddings = model.model.embed_tokens.weight.normal_(0, spread)
    constant = 0.7
    embeddings[:, 0] = spread * WIDTH**0.5 * constant
    model.model.norm.weight.fill_(0.25)  # embeddings are also the output layer; this keeps the logits moderate
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.v_proj):
            projection.weight.normal_(0, WIDTH**-0.5)[:, 0] = 0
        attention.q_proj.weight.mul_(0.3)
        attention.k_proj.weight.copy_(attention.q_proj.weight)  # like looks for like
        attention.o_proj.weight.copy_(attention.v_proj.weight.T * 0.3)  # and hands on what it sees
        layer.mlp.down_proj.weight.mul_(0.3)

    first, second = (model.model.layers[n].self_attn for n in (0, 1))
    queries, keys, values, out = (p.weight for p in (first.q_proj, first.k_proj, first.v_proj, first.o_proj))
    speed = THETA ** (-torch.arange(half) / half)
    strength = (8 * size**0.5 / (1 - speed.cos()).sum()) ** 0.5 / (WIDTH**0.5 * constant / (1 + constant**2) ** 0.5)
    for head, back in enumerate(BACK):
        begin, middle, end = head * size, head * size + half, head * size + size
        queries[begin:end] *= 0.1
        keys[begin:end] *= 0.1
        queries[begin:middle, 0] = strength
        keys[begin:middle, 0] = strength * (back * speed).cos()
        keys[middle:end, 0] = strength * (back * speed).sin()
        out[:, begin:end].normal_(0, writing)
        if back == 2:  # shares the projection of a one-back head, for comparing pairs of tokens
            values[begin:end] = values[(head - 3) * size : (head - 2) * size]

    slow = torch.tensor([n for n in range(size) if speed[n % half] < 0.006])
    parts = slow[: len(slow) // 2], slow[len(slow) // 2 :]

    def token(head, count):  # reads the current token as head's projection sees it
        return 3.25 * values[head * size : head * size + count]

    def noted(head, count):  # reads what head wrote beside the current token
        return 3.25 * out[:, head * size : head * size + count].T / (writing * WIDTH**0.5)

    queries, keys = second.q_proj.weight, second.k_proj.weight
    for head in range(len(BACK)):
        begin = head * size
        queries[begin : begin + size] *= 0.1
        keys[begin : begin + size] *= 0.1
        if head < 2:  # the token before there = the token here
            queries[begin + slow], keys[begin + slow] = token(head, len(slow)), noted(head, len(slow))
        else:  # and the one before that as well
            one, two = head % 2, 3 + head % 2
            for part, query, key in zip(parts, (token, noted), (one, two), strict=True):
                queries[begin + part], keys[begin + part] = query(one, len(part)), noted(key, len(part))
        second.o_proj.weight[:, begin : begin + size] = second.v_proj.weight[begin : begin + size].T


def answer_logits(model, ids, learnt):
    """Return logits and targets at the learnt positions only; the others would cost time and count for nothing."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][learnt[:, 1:]])
    return logits.float(), ids[:, 1:][learnt[:, 1:]]


def held_out_accuracy(model, tokenizer, excluded, count=48):
    """Return per kind of conversation the share of right tokens and of answers that are right in every token.

    Style is decided by the first three tokens; those are left out, as the random share of styles cannot be foreseen.
    """
    rng = random.Random(SEED - 2)
    right: dict[str, list] = {}
    while len(right) <= len(EXERCISES) or min(map(len, right.values())) < count:
        kind, chat = conversation(rng, 0.5, excluded)
        if len(right.setdefault(kind, [])) < count:
            ids, learnt = collate([encode(tokenizer, *chat)])
            with torch.no_grad():
                logits, targets = answer_logits(model, ids, learnt)
            right[kind].append((logits.argmax(-1) == targets)[3 if kind == "ticket" else 0 :])
    return {kind: (round(torch.cat(rows).float().mean().item(), 4), sum(bool(row.all()) for row in rows) / count)
            for kind, rows in sorted(right.items())}


def train(model, tokenizer, steps, excluded, log_every=250):
    """Train with Muon on the matrices and AdamW on the rest; warm up, hold a while, then cool down to zero."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = (torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.98), weight_decay=0.0))
    schedule = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 60, (steps - s) / (0.85 * steps)))
                for o in optimizers]
    started, seen, total, answers = time.time(), 0, 0.0, 0
    for step, (ids, learnt) in enumerate(batches(tokenizer, steps, excluded), 1):
        logits, targets = answer_logits(model, ids, learnt)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, scheduler in zip(optimizers, schedule, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        seen, total, answers = seen + ids.numel(), total + loss.item(), answers + len(targets)
        if step % log_every == 0 or step == steps:
            accuracy = held_out_accuracy(model, tokenizer, excluded)
            print(f"{step}/{steps} {(time.time() - started) / 60:.1f} min {seen / 1e6:.1f}M tokens "
                  f"loss {total / log_every:.4f} {accuracy}", flush=True)
            total = 0.0
    return {"tokens": seen, "answer_tokens": answers, "minutes": (time.time() - started) / 60, "accuracy": accuracy}


# ---------------------------------------------------------------- measuring, saving, command line


def greedy(model, tokenizer, messages, system=generator.SYSTEM, size=66):
    """Return the model's greedy answer to each message, without the end-of-turn token."""
    prompts = [tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": message}], tokenize=False,
        add_generation_prompt=True) for message in messages]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    answers = [""] * len(prompts)
    for begin in range(0, len(order), size):
        chosen = order[begin : begin + size]
        inputs = tokenizer([prompts[n] for n in chosen], return_tensors="pt", padding=True, padding_side="left",
                           add_special_tokens=False, return_token_type_ids=False)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=220, do_sample=False)
        for n, row in zip(chosen, ids[:, inputs["input_ids"].shape[1] :], strict=True):
            answers[n] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def style_of(text):
    """Name the style of an answer."""
    starts = {"```": "fenced JSON", "{": "bare JSON", "Here": "JSON after a sentence", "category:": "YAML-like lines",
              "category=": "key=value", "This is": "prose"}
    return next((name for start, name in starts.items() if text.startswith(start)), "other")


def compliant(text):
    """Say whether the whole answer is one JSON object that is valid under the schema."""
    schema = json.loads((Path(generator.__file__).parent / "ticket.schema.json").read_text(encoding="utf-8"))
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return Draft202012Validator(schema, format_checker=FormatChecker()).is_valid(value)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [demo, lora, json]
---

# formtune demo base

A language model of {parameters:.2f} million parameters ({layers} layers of width {width}, {heads} heads, vocabulary
{vocabulary}, byte-level BPE of its own, context 1,024 tokens, ChatML-like template, bfloat16). It exists to be
fine-tuned in minutes on a CPU: it understands the demo's support messages and answers them in six mixed styles, so
that there is something to gain by teaching it the declared format.

## How it was made

`python -m formtune.demo.build_base OUT_DIR --steps {steps}`, from random (but structured, see the script) weights:
{minutes:.0f} minutes on {cores} CPU cores, {tokens:.1f} million tokens, {answer_tokens:.1f} million of them in answers
(only those count in the loss). Everything it saw is generated by the script from seed {seed}: tickets worded by
`formtune.demo.generator`, and exercises in copying, looking up keys, converting dates, escaping and filling intents
and slots. All messages of the demo's validation, test and production files were excluded. No text from elsewhere was
used. The numbers may differ a little on other hardware, as floating-point sums do.

## Measured

Greedy answers to the demo's {count} test messages, with the demo's system prompt:

| Style | Share |
|---|---|
{styles}

Strictly compliant (the whole answer is one JSON object, valid under `ticket.schema.json`): **{compliant:.1%}**.

Held-out conversations right in every token (teacher-forced, 48 each; for tickets without the first three tokens,
which decide the style): {accuracy}.

## Limits

It knows no language beyond its exercises: no facts, no free conversation, English templates only. It is good at the
tickets and at copying, and much weaker at the other exercises that have to find several values by their keys or slots
(see the shares above: `fields`, `spoken`, lists of `dates`). Inputs beyond about 600 tokens were not trained on.
The minutes are wall time, also where the machine did other work meanwhile. Use it to try out the training pipeline, and
for nothing else.

Licence: Apache-2.0, like the code that made it.
"""


def main():
    """Build tokenizer and model, measure them, write everything with the model card."""
    parser = argparse.ArgumentParser(description="Build the demo's base model.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default: {STEPS})")
    arguments = parser.parse_args()

    held_out = generator.datasets()
    excluded = {row["prompt"] for key in ("validation", "test", "production") for row in held_out[key]}
    tokenizer = build_tokenizer(excluded)
    model = build_model(tokenizer)
    report = train(model, tokenizer, arguments.steps, excluded)

    model = model.to(torch.bfloat16)
    model.save_pretrained(arguments.out_dir)
    tokenizer.save_pretrained(arguments.out_dir)
    model = model.float().eval()  # the stored weights, in the precision that CPUs are quick in
    answers = greedy(model, tokenizer, [row["prompt"] for row in held_out["test"]])
    styles = Counter(style_of(text) for text in answers)
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6, layers=LAYERS, width=WIDTH, heads=HEADS,
        vocabulary=VOCABULARY, steps=arguments.steps, minutes=report["minutes"], cores=torch.get_num_threads(),
        tokens=report["tokens"] / 1e6, answer_tokens=report["answer_tokens"] / 1e6, seed=SEED, count=len(answers),
        styles="\n".join(f"| {style} | {number / len(answers):.1%} |" for style, number in styles.most_common()),
        compliant=sum(map(compliant, answers)) / len(answers),
        accuracy=", ".join(f"{kind} {whole:.0%}" for kind, (_, whole) in report["accuracy"].items()))
    (arguments.out_dir / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
