"""Long documents of the embedded corpus whose end asks for facts from their beginning.

The journal of a voyage opens with facts, one of a kind: where the ship sailed from, what it carried, who was captain.
Then the sailors tell each other stories, which hold no such facts. At the end somebody asks for every fact, in another
order. In validation documents the stories fill more than 1,024 tokens; in training documents they are of any length up
to that, so that looking back is learned at short distances and at long ones together.
"""

import re
from dataclasses import dataclass

from data import embedded_stories
from data.embedded_draw import Draw, Split, draw_on_side

# Counted as words and punctuation marks: no byte-level BPE that splits words from punctuation makes fewer tokens.
LONGEST_FILLER = 1250
SHORTEST_FILLER = {"train": 0, "valid": 1050}

# (what the journal says, what is asked, the values it may have); no value occurs in any story
FACTS = (
    ("The ship sailed from {}.", "Where did the ship sail from?",
     "Lisbon Cairo Lima Oslo Athens Dublin Havana Venice Bombay Boston Naples Tunis"),
    ("It carried {}.", "What did it carry?",
     "silver timber coffee cotton pepper marble leather ivory copper tobacco linen wax"),
    ("Its captain was Mr {}.", "Who was its captain? Mr",
     "Barlow Crane Dalton Foster Grant Hobbs Keller Lowell Mercer Norris Porter Quinn"),
    ("It was the month of {}.", "What month was it?",
     "January February March April May June July August September October November December"),
    ("The cook came from {}.", "Which country was the cook from?",
     "Spain France Norway China Brazil Egypt Greece Japan Kenya Turkey India Peru"),
    ("The sailors kept a {}.", "Which pet did the sailors keep? A",
     "parrot monkey goat ferret raven lizard tortoise falcon otter badger weasel donkey"),
    ("They played the {}.", "Which instrument did they play? The",
     "flute violin guitar trumpet banjo harp fiddle cello whistle piano organ tuba"),
    ("The chest held a {}.", "Which stone was in the chest? A",
     "ruby pearl diamond emerald opal jade garnet topaz crystal sapphire moonstone agate"),
    ("The mast was made of {}.", "Which wood was the mast made of?",
     "oak palm cedar birch maple walnut willow poplar beech cypress spruce chestnut"),
    ("The carpenter lost his {}.", "Which tool did the carpenter lose? His",
     "hammer chisel rasp axe drill plane wrench anvil clamp file crowbar mallet"),
    ("On the way there was {}.", "What weather was there?",
     "cyclones fog hail frost sleet drizzle mist lightning gales ice squalls haze"),
    ("A {} followed the ship.", "Which sea animal followed the ship? A",
     "whale dolphin shark seal squid walrus octopus ray tuna marlin swordfish porpoise"),
    ("The stowaway was a {}.", "What work did the stowaway do? A",
     "baker tailor painter poet monk clerk barber banker doctor lawyer jeweller potter"),
    ("On the island people spoke {}.", "Which language did people speak?",
     "Latin Greek Dutch Danish Polish Arabic Hindi Welsh Swahili Russian Finnish Irish"),
    ("The flag was {}.", "What colour was the flag?",
     "crimson violet scarlet turquoise orange grey pink navy beige maroon teal lilac"),
)  # fmt: skip


@dataclass(frozen=True)
class Recall:
    """A long document; `answers` are the character spans [start, end) in `text` of the asked-for facts' values."""

    text: str
    answers: list[tuple[int, int]]


def tell(draw: Draw, split: Split) -> Recall:
    """One document of the asked split: the facts, all together, are its essence."""
    values = draw_on_side(draw, split, _propose, lambda found: ("recall", *found))
    facts = list(zip(FACTS, values, strict=True))
    text = "The journal of a voyage. " + " ".join(fact[0].format(value) for fact, value in draw.some(facts, len(facts)))
    pieces, wanted = 0, draw.between(SHORTEST_FILLER[split], LONGEST_FILLER)
    while pieces < wanted:
        filler = "\nOne sailor told a story. " + embedded_stories.tell(draw, split)
        pieces += len(re.findall(r"\w+|[^\w\s]", filler))
        text += filler
    text += "\nAt home they were asked about the voyage."
    answers = []
    for (_, question, _), value in draw.some(facts, len(facts)):
        text += f"\n{question} {value}."
        answers.append((len(text) - len(value) - 1, len(text) - 1))
    return Recall(text, answers)


def _propose(draw: Draw) -> tuple[str, ...]:
    return tuple(draw.one(values.split()) for _, _, values in FACTS)
