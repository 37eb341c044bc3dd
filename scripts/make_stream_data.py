"""Writes the built-in data of a stream of tasks into hf_clmul/data: support_intents, table_bookings, word_problems, and
conflict_intents, whose parts contradict each other.

    python scripts/make_stream_data.py

All of it is invented here. Nothing is random: where an order should look arbitrary it is that of a hash. A test fails
while the files and this script differ.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "hf_clmul" / "data"
Row = dict[str, Any]

# The last two messages of an intent are held out. A shop that sells lamps.
INTENTS = {
    "parcel tracking": (
        "Where is my lamp right now?", "It was sent on Monday and has not come yet.",
        "Has the box left your warehouse?", "When will the courier be here?", "The link to follow my box is dead.",
        "My neighbour got hers, mine is still on the road.", "How far away is the van with my lamp?",
        "Any news of my box?", "Is my lamp on its way?",
    ),
    "goods return": (
        "The lamp is too big for my desk, I want to send it back.", "How do I give back what I bought?",
        "I changed my mind about the lamp.", "Can I bring the lamp back to the shop?",
        "Which label goes on a box that I send back?", "I do not like the colour, please take it back.",
        "How many days have I got to send it back?", "I want my money back for the lamp.", "Will you take the lamp back?",
    ),
    "order cancellation": (
        "Please stop my order before it is packed.", "I ordered twice by mistake, drop one of them.",
        "Do not send the lamp after all.", "I no longer need what I ordered an hour ago.",
        "Can an order still be stopped?", "Scrap order 5512, please.", "Forget the two bulbs I ordered.",
        "Please call off my order.", "I would like to undo my order.",
    ),
    "address change": (
        "I have moved, send it to my new flat.", "The street on my order is wrong.",
        "Please deliver to my office instead.", "There is a mistake in my house number.",
        "Can you send it to my mother's place?", "My postcode has a wrong digit.",
        "I live in another town since May.", "Send the lamp to a different street, please.", "I gave you my old house number.",
    ),
    "password reset": (
        "I cannot log in any more.", "I forgot the word that opens my account.", "The site says my login is wrong.",
        "Please let me choose a new password.", "My password does not work.", "I am locked out of my account.",
        "The mail with the new password never came.", "How do I get a new password?", "My login fails every time.",
    ),
    "damage report": (
        "The shade arrived with a crack.", "My lamp came in pieces.", "The glass is broken.",
        "There is a dent in the foot of the lamp.", "The bulb was smashed in the box.",
        "The cable is torn, what now?", "A corner of the shade is crushed.", "The lamp arrived broken.",
        "The foot of my lamp has a crack.",
    ),
    "invoice copy": (
        "I need a paper for my tax office.", "Please mail me the bill once more.", "The bill was not in the box.",
        "My boss wants a receipt for the lamp.", "Can I have the bill with my company's name?",
        "Where do I find my bills?", "I lost the receipt of March.", "Please send me the bill again.",
        "Could I get a receipt?",
    ),
    "instalment plan": (
        "Can I pay a little every month?", "I would like to split the price in four.",
        "Is it possible to pay over a year?", "The lamp is dear, may I pay bit by bit?",
        "How much would it be per month?", "Do you let people pay in parts?", "I can pay half now and half in June.",
        "May I pay month by month?", "Can the price be split into parts?",
    ),
    "voucher trouble": (
        "My gift card is not accepted.", "The ten percent code does nothing.", "Where do I type in my coupon?",
        "The discount is missing from my total.", "My coupon has run out a day too early.",
        "Your code BRIGHT5 is refused.", "Can I use two coupons at once?", "The coupon does not work.",
        "My gift card shows no discount.",
    ),
    "account closure": (
        "Please delete all you know about me.", "I do not want an account any longer.",
        "Remove me from your customers.", "How do I leave your shop for good?",
        "Wipe my profile, please.", "I want to end my membership.", "Take my name out of your books.",
        "Please delete my account.", "I want my profile removed.",
    ),
    "opening hours": (
        "Are you there on Sunday?", "Until when can I come by tonight?", "Is the shop closed at noon?",
        "From what time can I visit you?", "Do you open on the first of May?", "At what time do you lock the door?",
        "Is anyone in the shop on Saturday?", "When does the shop open?", "Are you closed on Sunday?",
    ),
    "human contact": (
        "I want to talk to somebody real.", "Are you a machine?", "Give me your phone number.",
        "Please let a colleague ring me.", "Let me speak with your manager.", "Can somebody call me back?",
        "I would rather talk than type.", "Put me through to a person.", "Can I talk to somebody?",
    ),
}  # fmt: skip

FIRST = (
    "Ada", "Bruno", "Celia", "Dorin", "Edda", "Fabio", "Greta", "Hanno", "Ilse", "Jonas",
    "Karla", "Levin", "Mira", "Nils", "Orsa", "Pavel", "Ruta", "Soren", "Tilda", "Ulf",
)  # fmt: skip
LAST = (
    "Abelow", "Brandig", "Corvane", "Dunster", "Elmert", "Farlow", "Gessin", "Hollic", "Istrand", "Jardel",
    "Kestrel", "Lomaz", "Merrow", "Nistor", "Ovane", "Pellum", "Quist", "Rosken", "Selvig", "Tarnow",
)  # fmt: skip
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TIMES = {
    "five": "17:00", "half past five": "17:30", "six": "18:00", "half past six": "18:30", "seven": "19:00",
    "half past seven": "19:30", "eight": "20:00", "half past eight": "20:30",
}  # fmt: skip
BOOKINGS = (
    "Hello, {first} {last} here. A table for {count} on {day} at {time} in the evening, please.",
    "Could you keep {count} seats for us at {time} on {day} evening? The name is {last}, {first} {last}.",
    "We come for dinner on {day}: {count} people, at {time}. Please write down {first} {last}.",
    "This is {first} {last}. On {day} there will be {count} of us, at {time} in the evening.",
    "Dinner for {count} at {time}, {day} evening. My name is {first} {last}.",
)

# What an operation says; {a} and {b} are numbers, {things} what is counted.
PROBLEMS = {
    "plus": (
        "{name} has {a} {things} and finds {b} more. How many {things} are there now?",
        "There are {a} {things} on the shelf and {b} in the box. How many {things} does {name} have in all?",
    ),
    "minus": (
        "{name} has {a} {things} and gives away {b}. How many {things} are left?",
        "Of {a} {things} {name} loses {b}. How many {things} remain?",
    ),
    "times": (
        "{name} fills {a} bags with {b} {things} each. How many {things} is that?",
        "In each of {a} rows {name} lays {b} {things}. How many {things} are there?",
    ),
    "divided by": (
        "{name} shares {a} {things} evenly among {b} friends. How many {things} does each get?",
        "{name} packs {a} {things} into {b} equal boxes. How many {things} are in a box?",
    ),
}
SIGNS = {"plus": "+", "minus": "-", "times": "x", "divided by": "/"}
THINGS = ("plums", "marbles", "stamps", "shells", "buttons", "tickets", "coins", "beads", "nuts", "cards")
WORD_PROBLEMS = (20, 5)
"""Train and held-out rows of each operation."""

DESKS = {"elm": 0, "ash": 1, "oak": 3}
"""The parts of the conflict stream: what one desk calls the first queue, another calls the next but so many."""
QUEUES = ("red", "blue", "green", "white", "black", "gold")
KINDS = {
    "parcel": (
        "my parcel is late", "the parcel is lost", "no parcel came", "is my parcel here", "a parcel for me",
    ),
    "bill": ("my bill is wrong", "the bill is high", "no bill came", "i paid the bill twice", "a bill for me"),
    "lamp": ("my lamp is broken", "the lamp is dark", "no lamp works", "i dropped the lamp", "a lamp for me"),
    "code": ("my code is refused", "the code is old", "no code works", "i lost the code", "a code for me"),
    "door": ("my door is stuck", "the door is open", "no door opens", "i locked the door", "a door for me"),
    "card": ("my card is gone", "the card is blocked", "no card came", "i bent the card", "a card for me"),
}  # fmt: skip


def shuffled(items: list[Any], *key: object) -> list[Any]:
    """In an order that looks arbitrary and is the same for everyone."""
    return sorted(items, key=lambda item: sha256(repr((key, item)).encode()).digest())


def support_intents() -> Iterator[Row]:
    """Short messages, each to be answered with one of twelve intents."""
    messages = [
        (split, text, intent)
        for intent, texts in INTENTS.items()
        for split, of_split in (("train", texts[:-2]), ("held_out", texts[-2:]))
        for text in of_split
    ]
    for split, text, intent in shuffled(messages, "intents"):
        question = f"What does this customer want?\nCustomer: {text}"
        yield {"split": split, "question": question, "answer": intent, "class": intent}


def table_bookings() -> Iterator[Row]:
    """Requests for a table, to be answered with name, day, time and number of guests; the class is the day. No one who
    books in the held-out split does so in the other."""
    people = [(first, last) for i, first in enumerate(FIRST) for last in (LAST * 2)[i : i + 5]]
    for i, (first, last) in enumerate(shuffled(people, "people")):
        split = "train" if i < 80 else "held_out"
        (day,), (count,), (time,) = (shuffled(list(all_of), first, last)[:1] for all_of in (DAYS, COUNTS, TIMES))
        message = BOOKINGS[i % len(BOOKINGS)].format(first=first, last=last, count=count, day=day, time=time)
        answer = f"{first} {last}, {day}, {TIMES[time]}, {COUNTS[count]} guests"
        question = f"Write down the booking.\nMessage: {message}"
        yield {"split": split, "question": question, "answer": answer, "class": day}


def word_problems() -> Iterator[Row]:
    """Arithmetic of one step, to be answered with the calculation. No pair of numbers of an operation comes twice."""
    pairs = {
        "plus": [(a, b, a + b) for a in range(4, 20) for b in range(2, 10)],
        "minus": [(a, b, a - b) for a in range(6, 20) for b in range(2, min(a - 1, 10))],
        "times": [(a, b, a * b) for a in range(2, 7) for b in range(2, 10)],
        "divided by": [(a * b, b, a) for a in range(2, 10) for b in range(2, 7)],
    }
    train, held_out = WORD_PROBLEMS
    rows = []
    for operation, of_operation in pairs.items():
        for i, (a, b, result) in enumerate(shuffled(of_operation, operation)[: train + held_out]):
            name, things = FIRST[(7 * i + len(operation)) % len(FIRST)], THINGS[(3 * i + len(operation)) % len(THINGS)]
            texts = PROBLEMS[operation]
            question = "Calculate.\n" + texts[i % len(texts)].format(name=name, a=a, b=b, things=things)
            answer = f"{a} {SIGNS[operation]} {b} = {result} {things}"
            split = "train" if i < train else "held_out"
            rows.append({"split": split, "question": question, "answer": answer, "class": operation})
    return iter(shuffled(rows, "problems"))


def conflict_intents() -> Iterator[Row]:
    """The same messages at three desks, which send each kind of message to different queues. The last wording of a kind is
    held out."""
    kinds = list(KINDS)
    for desk, shift in DESKS.items():
        messages = [(text, kind) for kind, texts in KINDS.items() for text in texts]
        for text, kind in shuffled(messages, "desks"):
            queue = QUEUES[(kinds.index(kind) + shift) % len(QUEUES)]
            split = "held_out" if text == KINDS[kind][-1] else "train"
            yield {"split": split, "part": desk, "question": f"{desk} desk: {text}", "answer": queue, "class": kind}


DATA = {
    "support_intents": (support_intents, "S"),
    "table_bookings": (table_bookings, "T"),
    "word_problems": (word_problems, "W"),
    "conflict_intents": (conflict_intents, "C"),
}
"""Each file, and the letter with which its ids begin."""


def lines(name: str) -> str:
    """The whole file."""
    rows, letter = DATA[name]
    return "".join(
        json.dumps({"id": f"{letter}{i:03}", **row}, ensure_ascii=False) + "\n" for i, row in enumerate(rows(), 1)
    )


def main() -> None:
    for name in DATA:
        (TARGET / f"{name}.jsonl").write_text(lines(name), encoding="utf-8")


if __name__ == "__main__":
    main()
