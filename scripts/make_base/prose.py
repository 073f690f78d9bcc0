"""Makes plain English: stories, portraits, sums and word lore, often with questions at the end.

A maker takes a random source and returns a document: a string of plain text, or a list of chat
messages. The same source state gives the same document.
"""

import random

from scripts.make_base import words as w

Messages = list[dict[str, str]]
Document = str | Messages


def chat(question: str, answer: str) -> Messages:
    """Return one exchange."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_questions(rng: random.Random, text: str, pairs: list[tuple[str, str]]) -> Document:
    """Return the text with some of its questions, as plain text or as a conversation."""
    rng.shuffle(pairs)
    pairs = pairs[: rng.randint(1, 4)]
    if rng.random() < 0.4:
        return text + "\n" + "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)
    first, *rest = pairs
    order = f"{text}\n\n{first[0]}" if rng.random() < 0.7 else f"{first[0]}\n\n{text}"
    messages = chat(order, first[1])
    for question, answer in rest:
        messages += chat(question, answer)
    return messages


def _scene(rng: random.Random) -> str:
    thing = rng.choice(w.THINGS + w.ANIMALS + w.FOODS)
    kind = f"{rng.choice(w.ADJECTIVES)} {thing}"
    verb = rng.choice(w.VERBS)
    he = rng.choice(("she", "he", "they", w.person(rng), "the " + rng.choice(w.JOBS)))
    who = he[0].upper() + he[1:]
    where, mood, other = rng.choice(w.SPOTS), rng.choice(w.ADJECTIVES), w.person(rng)
    return rng.choice(
        (
            f"{who} {verb[1]} the {kind} near the {where}.",
            f"There was {w.article(kind)} in the {where}, and {he} {verb[1]} it.",
            f"It was {w.article(mood)} {rng.choice(w.DAYS)} in {rng.choice(w.MONTHS)}.",
            f'"Do you {verb[0]} the {thing}?" asked {w.person(rng)}. "No, I don\'t," said {other}.',
            f"Nobody {verb[1]} the {w.plural(thing)} because they were {rng.choice(w.ADJECTIVES)}.",
            f"The {where} was {rng.choice(w.ADJECTIVES)} and {rng.choice(w.ADJECTIVES)} that day.",
            f"When {he} came to the {where}, the {thing} was {rng.choice(w.ADJECTIVES)}.",
            f"{who} wanted to {verb[0]} {w.article(kind)}, but it was too {mood}.",
        )
    )


def story(rng: random.Random) -> Document:
    """Tell who went where and who has what, then ask about it."""
    people = rng.sample(w.NAMES, rng.randint(2, 4))
    where: dict[str, str] = {}
    holds: dict[str, str] = {}
    lines = []
    for _ in range(rng.randint(4, 9)):
        who = rng.choice(people)
        draw = rng.random()
        if draw < 0.3:
            where[who] = rng.choice(w.SPOTS)
            verb = rng.choice(("went to", "walked to", "ran to", "came to", "moved to"))
            lines.append(f"{who} {verb} the {where[who]}.")
        elif draw < 0.5:
            thing = rng.choice(w.THINGS)
            holds[thing] = who
            verb = rng.choice(("took", "picked up", "bought", "found", "got"))
            lines.append(f"{who} {verb} the {thing}.")
        elif draw < 0.65 and holds:
            thing = rng.choice(sorted(holds))
            giver, holds[thing] = holds[thing], rng.choice([p for p in people if p != holds[thing]])
            lines.append(f"{giver} gave the {thing} to {holds[thing]}.")
        else:
            lines.append(_scene(rng))
    pairs = [(f"Where is {p}?", f"{p} is in the {s}.") for p, s in where.items()]
    pairs += [(f"Who has the {t}?", f"{p} has the {t}.") for t, p in holds.items()]
    text = " ".join(lines)
    return with_questions(rng, text, pairs) if pairs and rng.random() < 0.6 else text


def portrait(rng: random.Random) -> Document:
    """Describe a person by facts that come in any order, then ask for some of them."""
    name, home, job = w.person(rng), w.place(rng), rng.choice(w.JOBS)
    age, count, year = rng.randint(18, 80), rng.randint(2, 30), rng.randint(1950, 2024)
    pets, food = w.plural(rng.choice(w.ANIMALS)), w.plural(rng.choice(w.FOODS))
    colour, subject = rng.choice(w.COLOURS), rng.choice(w.SUBJECTS)
    he, his = rng.choice((("He", "His"), ("She", "Her")))
    facts = [
        (f"{he} lives in {home}.", f"Where does {name} live?", f"{name} lives in {home}."),
        (f"{he} is {age} years old.", f"How old is {name}?", f"{age}"),
        (f"{he} works as {w.article(job)}.", f"What is {name}'s job?", job),
        (f"{he} has {count} {pets}.", f"How many {pets} does {name} have?", f"{count}"),
        (f"{he} likes {food}.", f"What does {name} like?", food),
        (f"{he} studied {subject} in {year}.", f"When did {name} study {subject}?", f"In {year}."),
        (f"{his} favourite colour is {colour}.", f"Which colour is {name}'s favourite?", colour),
    ]  # fmt: skip
    rng.shuffle(facts)
    facts = facts[: rng.randint(3, 7)]
    opening = rng.choice((f"This is {name}.", f"Let me tell you about {name}.", f"Meet {name}."))
    text = " ".join([opening, *(fact[0] for fact in facts)])
    return with_questions(rng, text, [(question, answer) for _, question, answer in facts])


def sums(rng: random.Random) -> Document:
    """Do sums, as bare lines or as questions."""
    lines = []
    most = rng.choice((1, 2, 2, 3, 3, 4))
    for _ in range(rng.randint(3, 10)):
        a, b = rng.randrange(10**most), rng.randrange(10**most)
        kind = rng.choice("++--*/")
        if kind == "-":
            a, b = max(a, b), min(a, b)
        if kind in "*/":
            a, b = rng.randint(1, 20), rng.randint(1, 12)
        if kind == "/":
            a *= b
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[kind]
        lines.append((f"{a} {kind} {b}", f"{value}"))
    if rng.random() < 0.5:
        return "\n".join(f"{question} = {answer}" for question, answer in lines)
    ask = rng.choice(("What is {}?", "Work out {}.", "{} = ?", "Calculate {}."))
    messages: Messages = []
    for question, answer in lines[:3]:
        messages += chat(ask.format(question), answer)
    return messages


def purchase(rng: random.Random) -> Document:
    """Solve a small problem about prices and amounts in one or two spoken steps."""
    name, thing, other = rng.choice(w.NAMES), *rng.sample(w.FOODS + w.THINGS, 2)
    a, price, more = rng.randint(2, 30), rng.randint(2, 20), rng.randint(1, 30)
    kind = rng.randrange(4)
    if kind == 0:
        question = f"{name} buys {a} {w.plural(thing)} for ${price} each. How much does it cost?"
        steps, answer = (
            f"{a} {w.plural(thing)} at ${price} each is {a} x {price} = {a * price}.",
            a * price,
        )
    elif kind == 1:
        question = (
            f"{name} has {a} {w.plural(thing)} and gets {more} more. How many are there in all?"
        )
        steps, answer = f"{a} and {more} more make {a} + {more} = {a + more}.", a + more
    elif kind == 2:
        question = (
            f"There are {a + more} {w.plural(thing)} in the {rng.choice(w.SPOTS)}. "
            f"{name} takes {more} of them. How many are left?"
        )
        steps, answer = f"{a + more} less {more} leaves {a + more} - {more} = {a}.", a
    else:
        total = a * price + more
        question = (
            f"{w.article(thing).capitalize()} costs ${price} and {w.article(other)} costs ${more}. "
            f"What do {a} {w.plural(thing)} and one {other} cost together?"
        )
        steps = (
            f"The {w.plural(thing)} cost {a} x {price} = {a * price}. "
            f"With the {other} that is {a * price} + {more} = {total}."
        )
        answer = total
    return chat(question, f"{steps} The answer is {answer}.")


def lore(rng: random.Random) -> Document:
    """Say a few things about words: plurals, pasts, opposites, spelling, kinds, order."""
    pairs = []
    for _ in range(rng.randint(2, 6)):
        verb, noun = rng.choice(w.VERBS), rng.choice(w.ANIMALS + w.FOODS + w.THINGS)
        left, right = rng.choice(w.OPPOSITES).split("/")
        day, n = rng.randrange(7), rng.randrange(10 ** rng.randint(1, 5))
        kind, members = rng.choice(
            (("animal", w.ANIMALS), ("food", w.FOODS), ("job", w.JOBS), ("colour", w.COLOURS))
        )
        member = rng.choice(members)
        pairs.append(
            rng.choice(
                (
                    (f"What is the plural of {noun}?", w.plural(noun)),
                    (f"What is the past tense of {verb[0]}?", verb[1]),
                    (f"What is the opposite of {left}?", right),
                    (f"How do you spell {noun}?", "-".join(noun)),
                    (f"Which day comes after {w.DAYS[day]}?", w.DAYS[(day + 1) % 7]),
                    (f"Write {n} in words.", w.in_words(n)),
                    (f"Write {w.in_words(n)} in digits.", f"{n}"),
                    (f"What kind of thing is {w.article(member)}?", f"It is {w.article(kind)}."),
                    (f"Name three {w.plural(kind)}.", ", ".join(rng.sample(members, 3))),
                )
            )
        )  # fmt: skip
    return [message for question, answer in pairs for message in chat(question, answer)]


def scenes(rng: random.Random) -> Document:
    """Write a paragraph of unconnected plain sentences."""
    return " ".join(_scene(rng) for _ in range(rng.randint(3, 10)))
