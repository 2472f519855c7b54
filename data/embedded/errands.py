"""Errands: the stories of the embedded corpus that a child must follow word by word.

Somebody is given a list of things and reads it aloud again and again. Nothing but the beginning of the story tells
what comes next in the list, so these stories teach copying from the context, in natural words, before the other phases
build on it: a small model that learns only from plots takes ten times as long to find out that it can look back.
"""

from data.embedded.draw import NAMES, Draw, Split, draw_on_side, pronouns

THINGS = (
    "bread", "milk", "rope", "oil", "soap", "salt", "honey", "jam", "tea", "cups", "plates", "spoons", "forks",
    "bowls", "paper", "glue", "paint", "nails", "wood", "wire", "string", "thread", "needles", "buttons", "cloth",
    "silk", "wool", "sugar", "flour", "butter", "cheese", "rice", "corn", "pears", "plums", "figs", "grapes",
    "lemons", "nuts", "carrots", "peas", "beans", "onions", "mint", "roses", "tulips", "ferns", "moss", "shells",
    "stones", "sand", "clay", "bricks", "tiles", "candles", "matches", "brushes", "combs", "towels", "socks",
    "gloves", "boots", "belts", "stamps", "pens", "maps", "keys", "coins", "rings", "beads", "marbles", "cards",
    "kites", "bells", "drums", "seeds",
)  # fmt: skip
ERRANDS = ("shop", "market", "beach", "hill", "farm", "fair", "harbour", "mill")
SENDERS = ("mother", "father", "grandmother", "grandfather", "aunt", "uncle", "teacher")
OPENINGS = (
    "{hero} and {friend} were going to the {place}. {His} {sender} gave {hero} a list: {list}.",
    "One morning, the {sender} of {hero} wrote a list: {list}. So {hero} and {friend} went to the {place}.",
    "\"Bring me these from the {place},\" said the {sender} to {hero} and {friend}: {list}.",
)
READINGS = (
    "On the way {hero} read the list to {friend}: {list}.",
    "\"Say it again,\" said {friend}, and {hero} read: {list}.",
    "{friend} had a parrot, and the parrot said: {list}.",
    "They sang it as a song: {list}.",
    "\"What was it?\" asked a man. {friend} told him: {list}.",
)
ENDINGS = (
    "At the {place} they found it all: {list}. \"Well done!\" said the {sender}.",
    "{friend} put it all in the bag. The {sender} looked in the bag and saw {list}.",
    "They came home and put it on the table: {list}. The {sender} was very happy.",
)


def tell(draw: Draw, split: Split) -> str:
    """One errand of the asked split: the things on the list, in order, are its essence."""
    things = draw_on_side(draw, split, lambda d: d.some(THINGS, d.between(5, 9)), lambda items: ("errand", *items))
    hero, friend = draw.some(NAMES, 2)
    words = pronouns(hero) | {"hero": hero, "friend": friend, "list": ", ".join(things)}
    words |= {"place": draw.one(ERRANDS), "sender": draw.one(SENDERS)}
    readings = draw.some(READINGS, draw.between(1, 3))
    return " ".join([draw.one(OPENINGS), *readings, draw.one(ENDINGS)]).format_map(words)
