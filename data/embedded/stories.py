"""Short children's stories of the embedded corpus: a cast, a plot, and several wordings for each of its beats.

The cast and the plot are a story's essence and decide its split; the wording is drawn afterwards. Stories hold no
arithmetic and no questions, which belong to the other two kinds of document.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from data.embedded.draw import NAMES, Draw, Split, draw_on_side, pronouns

PLACES = (
    "park",
    "garden",
    "beach",
    "forest",
    "farm",
    "river",
    "lake",
    "meadow",
    "playground",
    "market",
    "hill",
    "village",
)
TOYS = (
    "ball",
    "kite",
    "doll",
    "drum",
    "puzzle",
    "wagon",
    "robot",
    "teddy bear",
    "toy boat",
    "toy train",
    "book",
    "hat",
    "scarf",
    "balloon",
    "lantern",
    "bell",
)
ANIMALS = (
    "kitten",
    "puppy",
    "rabbit",
    "duck",
    "squirrel",
    "turtle",
    "lamb",
    "pony",
    "mouse",
    "frog",
    "bird",
    "hedgehog",
)
FOODS = ("cake", "bread", "soup", "pie", "honey", "cheese", "jam", "popcorn")
COLOURS = ("red", "blue", "green", "yellow", "white", "brown", "purple", "golden")
SIZES = ("little", "small", "tiny")
GROWN_UPS = ("mother", "father", "grandmother", "grandfather", "aunt", "uncle", "teacher")

OPENINGS = (
    "Once upon a time, there was a child named {hero}.",
    "Once upon a time, {hero} lived near the {place}.",
    "One sunny morning, {hero} went to the {place}.",
    "One day, {hero} was at the {place}.",
    "There once was a kind child named {hero} who lived close to the {place}.",
    "It was a warm day, and {hero} wanted to play at the {place}.",
)
DETAILS = (
    "The sun was bright and the sky was blue.",
    "The wind was soft and the birds were singing.",
    "{hero} was wearing a {colour} coat that day.",
    "There were many flowers at the {place}.",
    "{hero} could hear the bees in the tall grass.",
    "{hero} was a good child and liked to sing.",
)
FRIENDSHIPS = (
    "{hero} had a best friend named {friend}.",
    "The best friend of {hero} was {friend}.",
    "{hero} loved to play with {friend}.",
)
PAUSES = (
    "{hero} did not know what would come next.",
    "It was very quiet for a moment.",
    "A {animal} was watching {hero}.",
    "{friend} looked at {hero}, and {hero} looked at {friend}.",
)
LATER = ("The next day came.", "A week went by.", "But that was not all.", "The day after, something else happened.")
ENDINGS = (
    "{hero} and {friend} went home and were very happy.",
    "That night, {hero} fell asleep with a smile.",
    "From that day on, {hero} and {friend} were the best of friends.",
    "{hero} told {his} {grown_up} all about the day at the {place}.",
    "It was the best day that {hero} could remember.",
    "And {hero} never forgot that day at the {place}.",
    "Then {hero} ate some {food} with {friend}, and they laughed together.",
)

# A beat is a tuple of alternatives; a plot is a sequence of beats between an opening and an ending.
PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lost toy": (
        (
            "{hero} had a {colour} {toy} and took it everywhere.",
            "The favourite thing of {hero} was a {colour} {toy}.",
            "{hero} had got a {colour} {toy} from {his} {grown_up}.",
        ),
        (
            "But one day the {toy} was gone.",
            "But when {he} looked around, the {toy} was not there.",
            "Then {he} saw that the {toy} was missing.",
        ),
        (
            "{hero} looked under the bed and behind the door, but {he} could not find the {toy}.",
            "{He} looked in the box and under the table, but there was no {toy}.",
            "{hero} searched the whole house, but the {toy} was not there.",
        ),
        (
            '"Where is my {toy}?" {he} cried.',
            "{hero} was so sad that {he} began to cry.",
            '"I miss my {toy}," said {hero} in a sad voice.',
        ),
        (
            '"Do not worry," said {friend}. "I will help you."',
            "{friend} heard {him} and came to help.",
            '"Let us look at the {place}," said {friend}.',
        ),
        (
            "They walked to the {place} together and looked behind every tree.",
            "Together they went back to the {place} and looked in the grass.",
            "At the {place}, {hero} looked left and {friend} looked right.",
        ),
        (
            "A {animal} was sitting there, and under the {animal} was the {colour} {toy}!",
            "At last {friend} saw something {colour}. It was the {toy}!",
            "There, next to a {size} {animal}, was the {colour} {toy}!",
        ),
        (
            '"Thank you, {friend}!" said {hero}, and {he} hugged the {toy}.',
            "{hero} held the {toy} tight and thanked {friend}.",
            '"You found it!" said {hero}. "Thank you!"',
        ),
    ),
    "sharing": (
        (
            "{hero} had some {food} in a {colour} basket.",
            "{hero} got some {food} from {his} {grown_up}.",
            "{hero} was carrying some {food} home.",
        ),
        (
            "On the way {he} saw {friend}, who was sitting alone.",
            "Then {he} met {friend}, who looked sad.",
            "{friend} was sitting under a tree and did not smile.",
        ),
        ('"What is wrong, {friend}?" asked {hero}.', '"Why are you sad, {friend}?" {hero} asked.'),
        (
            '"I am hungry," said {friend}. "I lost my lunch."',
            '"A {animal} ate my lunch," said {friend}.',
            '"I have nothing to eat," said {friend} in a small voice.',
        ),
        (
            "{hero} loved {food} very much, and at first {he} wanted to keep it.",
            "{hero} looked at the {food}. There was not much of it.",
            "{hero} thought about it for a moment.",
        ),
        (
            'But then {he} smiled and said, "You can have half of my {food}."',
            "Then {he} gave half of the {food} to {friend}.",
            '"Let us share the {food}," said {hero}.',
        ),
        (
            "{friend} took the {food} and smiled.",
            '"This {food} is so good!" said {friend}.',
            "They sat in the grass and ate the {food} together.",
        ),
        (
            "{hero} learned that {food} tastes better when you share it.",
            "{hero} felt warm inside, because sharing had made {friend} happy.",
            '"Tomorrow I will bring something for you," said {friend}.',
        ),
    ),
    "being brave": (
        (
            "{hero} was afraid of the dark.",
            "There was one thing that {hero} feared: the dark.",
            "{hero} was brave in the day, but not in the night.",
        ),
        (
            "One night there was a strange sound outside the house.",
            "One night {he} heard a noise at the window.",
            "That night something went tap, tap, tap at the door.",
        ),
        (
            "{hero} hid under the blanket and called {his} {grown_up}.",
            '"Help!" cried {hero}, and {his} {grown_up} came.',
            "{He} ran to {his} {grown_up} as fast as {he} could.",
        ),
        (
            '"Take this {toy}," said the {grown_up}. "It will make you brave."',
            '{His} {grown_up} gave {him} a lamp and said, "Let us look together."',
            '"You are braver than you think," said {his} {grown_up}.',
        ),
        (
            "{hero} took a deep breath and opened the door.",
            "Slowly, {hero} opened the door and looked out.",
            "{hero} walked to the door with small steps.",
        ),
        (
            "Outside there was only a {size} {animal}.",
            "It was not a monster. It was a {size} {colour} {animal}.",
            "There stood a {animal}, and it was cold and wet.",
        ),
        (
            '"You poor {animal}," said {hero}, and {he} gave it some {food}.',
            "{hero} laughed and let the {animal} come in.",
            "The {animal} was even more afraid than {hero}.",
        ),
        (
            "After that, {hero} was not afraid of the dark.",
            "Now {hero} knew that the dark was only the dark.",
            "In the morning {he} told {friend} about the {animal}.",
        ),
    ),
    "broken toy": (
        (
            "{hero} and {friend} were playing with a {colour} {toy}.",
            "{friend} had a new {colour} {toy} and let {hero} hold it.",
            "{hero} wanted to play with the {toy} that belonged to {friend}.",
        ),
        (
            "But {hero} pulled too hard, and the {toy} broke.",
            "Then {hero} fell down, and the {toy} broke.",
            "The {toy} slipped out of {his} hands and broke.",
        ),
        ("{friend} began to cry.", '"Oh no, my {toy}!" cried {friend}.', "{friend} was very upset."),
        (
            "{hero} wanted to run away, but {he} stayed.",
            "{hero} felt bad and did not know what to say.",
            "For a moment {hero} said nothing at all.",
        ),
        (
            '"I am sorry, {friend}," {he} said. "I broke your {toy}."',
            'Then {he} said, "I am so sorry. I will help you fix the {toy}."',
        ),
        (
            "They took the {toy} to the {grown_up}, who had glue and paint.",
            "{His} {grown_up} showed them how to fix the {toy} with some glue.",
            "They worked on the {toy} all day and painted it {colour}.",
        ),
        (
            "Soon the {toy} looked like new.",
            "In the end the {toy} was even better than before.",
            "When they were done, the {toy} was {colour} and strong.",
        ),
        (
            '"Thank you for telling the truth," said {friend}.',
            "{friend} was not angry. {friend} hugged {hero}.",
            "{hero} learned that it is good to say sorry.",
        ),
    ),
    "rainy day": (
        (
            "{hero} wanted to fly a kite at the {place}.",
            "{hero} and {friend} had a plan to swim at the {place}.",
            "{hero} had waited all week to go to the {place}.",
        ),
        (
            "But then dark clouds came, and it began to rain.",
            "But the rain came down, and the wind was cold.",
            "But there was thunder, and everything got wet.",
        ),
        (
            '"Now our day is ruined," said {hero}.',
            "{hero} looked out of the window and sighed.",
            "{hero} was angry at the rain.",
        ),
        (
            '"I have an idea," said {friend}. "We can play inside."',
            '{friend} smiled and said, "Let us make a castle!"',
            '"We can still have fun," said {friend}.',
        ),
        (
            "They took a blanket and a {toy} and built a {size} castle.",
            "They put chairs together and made a {size} ship.",
            "They put a {colour} blanket over the table and made a cave.",
        ),
        (
            "{hero} was the king of the castle, and {friend} was the dragon.",
            "{friend} was the captain, and {hero} was a {animal} from the sea.",
            "They played that the {toy} was a treasure and the floor was the sea.",
        ),
        (
            "{His} {grown_up} brought them {food}, and they ate it inside.",
            "Then they ate {food} and told stories until it was dark.",
        ),
        (
            "When the rain stopped, they did not even see it.",
            '"I hope it rains tomorrow too!" said {hero}.',
            "{hero} was not angry at the rain any more.",
        ),
    ),
    "lost animal": (
        (
            "At the {place} {hero} saw a {size} {animal}.",
            "{hero} heard a soft sound. It was a {size} {animal}.",
            "Behind a tree there was a {colour} {animal}.",
        ),
        (
            "The {animal} was cold and alone.",
            "The {animal} had lost its mother.",
            "The {animal} was shaking, and its leg was hurt.",
        ),
        (
            '"Hello, {animal}," said {hero}. "Are you lost?"',
            "{hero} sat down and held out {his} hand.",
            '"Do not be afraid," {hero} said to the {animal}.',
        ),
        (
            "{He} gave the {animal} some {food} and some water.",
            "{He} put {his} scarf around the {animal}.",
            "{He} carried the {animal} home and made a bed for it.",
        ),
        (
            "The next day {hero} and {friend} looked for its mother.",
            '"We must find its family," said {friend}.',
            "{friend} knew where the {animal} lived.",
        ),
        (
            "They walked past the mill and over the bridge to the {place}.",
            "They followed the tracks along the path.",
            "They asked the farmer, and the farmer showed them the way.",
        ),
        (
            "There they saw a big {animal}, and the {size} one ran to it.",
            "At last the mother came, and the {animal} jumped for joy.",
            "The mother of the {animal} was waiting there.",
        ),
        (
            "{hero} was a bit sad, but {he} was glad for the {animal}.",
            '"Goodbye, {animal}!" said {hero}.',
            "The {animal} looked back at {hero} one more time.",
        ),
    ),
    "race": (
        (
            "{hero} and {friend} wanted to have a race at the {place}.",
            "There was a race at the {place} that day.",
            '"I am faster than you," said {friend} to {hero}.',
        ),
        (
            "{friend} was very fast, and {hero} was slow.",
            "Everyone thought that {friend} would win.",
            "{hero} had never won a race before.",
        ),
        ('"Ready, set, go!" said the {grown_up}.', "The {grown_up} rang a bell, and they ran."),
        ("{friend} ran ahead and laughed.", "Soon {friend} was far ahead.", "{friend} ran like the wind."),
        (
            "But then {friend} stopped to look at a {animal}.",
            "But then {friend} fell over a root and hurt a knee.",
            "But {friend} was so sure to win that {fhe} sat down to rest.",
        ),
        ("{hero} kept going, step by step.", "{hero} did not stop.", "{hero} came closer and closer."),
        (
            "When {hero} saw {friend}, {he} stopped and held out {his} hand.",
            "{hero} did not run past, but waited for {friend}.",
            '"Come on, {friend}!" said {hero}. "Let us run together."',
        ),
        (
            "They came to the end of the race at the same time.",
            "Everyone clapped for {hero} and {friend}.",
            "They both got a {colour} {toy} as a prize.",
        ),
    ),
    "gift": (
        (
            "It was the birthday of {friend}.",
            "The next day was the birthday of {friend}.",
            "{friend} was going to have a birthday party.",
        ),
        (
            "{hero} wanted to give {friend} a {toy}, but {he} had no money.",
            "{hero} looked in the shop, but the {toy} cost too much.",
            '"What can I give to {friend}?" {hero} asked {his} {grown_up}.',
        ),
        (
            '"You can make something," said {his} {grown_up}.',
            '{His} {grown_up} said, "The best gifts come from the heart."',
            "Then {he} had an idea.",
        ),
        (
            "{hero} took paper and paint and made a {colour} {toy}.",
            "{He} made a {size} {toy} from old things.",
            "All day {he} worked on a {colour} {toy}.",
        ),
        (
            "It was not perfect, and {hero} was worried.",
            '"I hope {friend} will like it," {he} thought.',
            "{hero} put the {toy} in a box and walked to the party.",
        ),
        (
            "{friend} opened the box and was quiet for a moment.",
            "At the party {friend} opened the gift.",
            "{friend} got many gifts, but the {toy} from {hero} came last.",
        ),
        (
            '"A {toy}! You made it for me!" said {friend}.',
            '"This is the best {toy} in the world," said {friend}.',
            "Then {friend} jumped up and hugged {hero}.",
        ),
        (
            "They played with the {toy} and ate {food}.",
            "{friend} put the {toy} next to the bed and kept it for years.",
            "{hero} was proud and happy.",
        ),
    ),
    "new friend": (
        (
            "{friend} was new at school and did not know anyone.",
            "A new child named {friend} came to the school.",
            "{friend} had just moved to the village near the {place}.",
        ),
        (
            "{friend} sat alone and looked at the floor.",
            "{friend} was shy and did not speak.",
            "All the others were playing, but {friend} was not.",
        ),
        (
            "{hero} saw this and felt sorry.",
            "{hero} remembered how it feels to be alone.",
            "{hero} did not know what to do at first.",
        ),
        (
            "{He} took {his} {toy} and walked over.",
            "So {he} went to {friend} and sat down.",
            "Then {he} held out a {colour} {toy}.",
        ),
        (
            '"Hello, I am {hero}," {he} said. "Do you want to play?"',
            '"My name is {hero}," said {hero}. "What is your name?"',
            '"Do you like this {toy}?" asked {hero}.',
        ),
        (
            '"My name is {friend}," said {friend} in a soft voice.',
            "{friend} looked up and smiled a little.",
            '"Yes," said {friend}. "I had one in my old home."',
        ),
        (
            "Soon they were playing with the {toy} at the {place}.",
            "They talked about the {animal} that {friend} had at home.",
            "They ran to the {place} and played until the bell rang.",
        ),
        (
            "{friend} was not alone any more.",
            '"I am glad that I met you," said {friend}.',
            "The next day {friend} ran to meet {hero} at the door.",
        ),
    ),
    "seed": (
        (
            "{hero} got a seed from {his} {grown_up}.",
            "{hero} found a {size} seed at the {place}.",
            "{hero} got a seed from {friend}.",
        ),
        (
            "{He} put the seed in the ground and gave it some water.",
            "{He} planted it in the garden next to the house.",
            '"I will plant it," said {hero}, and {he} dug a hole.',
        ),
        (
            "Every day {hero} looked, but nothing grew.",
            "{hero} waited and waited.",
            "The days went by, and {hero} saw only brown earth.",
        ),
        (
            '"It will never grow," said {hero}.',
            "{hero} wanted to stop.",
            "{friend} laughed and said that the seed was bad.",
        ),
        (
            '"Be patient," said {his} {grown_up}. "Good things need time."',
            '"Give it water and sun," said {his} {grown_up}.',
            "But {he} gave it water every day.",
        ),
        (
            "Then one morning there was a green leaf!",
            "At last something green came out of the ground.",
            "After the rain, a {size} green plant stood there.",
        ),
        (
            "The plant grew and grew until it was taller than {hero}.",
            "Soon there was a {colour} flower on it.",
            "In the summer it had {colour} flowers, and a {animal} came to live under it.",
        ),
        (
            "{hero} called {friend} to see it.",
            '"You were right," {hero} told {his} {grown_up}.',
            "{hero} learned to be patient.",
        ),
    ),
    "stuck": (
        (
            "{hero} was playing with a {colour} {toy} at the {place}.",
            "{hero} threw {his} {toy} high into the air.",
            "{hero} and {friend} were playing with a {toy}.",
        ),
        (
            "The wind took the {toy}, and it got stuck in a tree.",
            "Then the {toy} flew up and stayed in a tall tree.",
            "Then {he} lost hold of it, and it ended up high in a tree.",
        ),
        (
            "{hero} jumped, but the tree was too tall.",
            "{He} tried to climb, but {he} slipped.",
            "{He} threw a stick at it, but the {toy} did not move.",
        ),
        (
            '"I will never get my {toy} back," said {hero}.',
            "{hero} sat down under the tree and cried.",
            "{hero} was angry and kicked the tree.",
        ),
        (
            "Then {friend} came with a rope.",
            '"We can do it together," said {friend}.',
            "{friend} thought for a moment and had an idea.",
        ),
        (
            "{hero} stood on a box, and {friend} held it.",
            "{friend} climbed up slowly while {hero} watched.",
            "They asked a {animal} to shake the branch, and the {animal} did.",
        ),
        (
            "The {toy} fell down into the grass.",
            "At last {hero} could reach the {toy}.",
            "Down came the {toy}, and it was not broken.",
        ),
        (
            '"Hooray!" they cried.',
            '"Thank you, {friend}," said {hero}. "You are so clever."',
            "{hero} learned that two can do more than one.",
        ),
    ),
    "asking around": (
        (
            "{hero} could not find {his} {colour} {toy}.",
            "The {colour} {toy} of {hero} was gone.",
            "{hero} had lost a {colour} {toy}.",
        ),
        (
            '{hero} asked the {animal}, "Have you seen my {colour} {toy}?"',
            '{hero} went to the {animal} and said, "Have you seen my {colour} {toy}?"',
        ),
        (
            '"No," said the {animal}, "I have not seen your {colour} {toy}."',
            'The {animal} said, "No, I have not seen your {colour} {toy}. Ask the {animal2}."',
        ),
        (
            '{hero} asked the {animal2}, "Have you seen my {colour} {toy}?"',
            '{hero} went to the {animal2} and said, "Have you seen my {colour} {toy}?"',
        ),
        (
            '"No," said the {animal2}, "I have not seen your {colour} {toy}."',
            'The {animal2} said, "No, I have not seen your {colour} {toy}. Ask the {animal3}."',
        ),
        (
            '{hero} asked the {animal3}, "Have you seen my {colour} {toy}?"',
            '{hero} went to the {animal3} and said, "Have you seen my {colour} {toy}?"',
        ),
        (
            '"Yes," said the {animal3}, "I have seen your {colour} {toy}. {friend} has it."',
            'The {animal3} said, "Yes, I have seen your {colour} {toy}. Go and ask {friend}."',
        ),
        (
            "{friend} had found the {colour} {toy} and gave it back to {hero}.",
            '"Here is your {colour} {toy}," said {friend} to {hero}.',
        ),
    ),
    "packing": (
        (
            "{hero} put {things} into a bag.",
            "{hero} wanted to travel and packed {things}.",
            "{hero} had a bag with {things}.",
        ),
        (
            "{friend} asked what was in the bag.",
            '"What is in your bag?" asked {friend}.',
            '"Your bag looks heavy," said {friend}.',
        ),
        (
            '"I have {things}," said {hero}.',
            '{hero} said, "I packed {things}."',
            "{hero} opened the bag and showed {things}.",
        ),
        ("Then they went to the {place} together.", "So {hero} and {friend} walked to the {place}."),
        ("At the {place} the bag fell into the water.", "On the way the bag fell open.", "But the bag had a hole."),
        (
            '"Now I must find {things}," said {hero}.',
            '"Help me to find {things}," said {hero} to {friend}.',
            "{hero} had to look for {things}.",
        ),
        (
            "They looked behind the trees and in the grass.",
            "{friend} looked left, and {hero} looked right.",
            "A {animal} helped them to look.",
        ),
        (
            "In the end they found {things}.",
            "At last they had {things} again.",
            "Soon {friend} came back with {things}.",
        ),
    ),
    "song": (
        ("{hero} made up a song.", "{hero} liked to sing.", "One song was in the head of {hero} all day."),
        ('It went like this: "{song}."', '"{song}," sang {hero}.', '{hero} sang, "{song}."'),
        ("{friend} came and wanted to hear the song.", '"Sing it again," said {friend}.', "{friend} liked the song."),
        ('"{song}," sang {hero} again.', 'So {hero} sang again: "{song}."'),
        (
            'Then {friend} could sing it too: "{song}."',
            '"{song}," sang {friend} with a loud voice.',
            '{hero} and {friend} sang together: "{song}."',
        ),
        (
            "A {animal} heard it and began to dance.",
            "The {grown_up} heard it and clapped.",
            "Soon everyone at the {place} knew the song.",
        ),
    ),
    "helping out": (
        (
            "The {grown_up} of {hero} was tired and had much work to do.",
            "The {grown_up} of {hero} was ill and had to stay in bed.",
            "There was a lot of work in the house of {hero}.",
        ),
        (
            "{hero} wanted to go to the {place}, but {he} stayed at home.",
            '"I will help you," said {hero}.',
            "{hero} asked {friend} to help.",
        ),
        (
            "First {he} washed the cups and the plates.",
            "First {he} cleaned the kitchen and the stairs.",
            "First {he} fed the {animal} and gave it water.",
        ),
        ("Then {he} made some {food}.", "Then {he} and {friend} cooked {food}.", "Then {he} went to buy {food}."),
        (
            "But the {food} fell on the floor!",
            "But {he} forgot the {food}, and it burned.",
            "But the {animal} jumped on the table and ate the {food}!",
        ),
        ("{hero} was close to tears.", '"Oh no," said {hero}.', "{friend} laughed, and then {hero} laughed too."),
        (
            "They cleaned everything and made new {food}.",
            '"We can try again," said {friend}, and so they did.',
            "So {hero} started again, and this time it went well.",
        ),
        (
            '"You are a great help," said {his} {grown_up}.',
            "{His} {grown_up} smiled and gave {him} a hug.",
            "{His} {grown_up} gave {him} a {colour} {toy} to say thank you.",
        ),
    ),
}

STRANGERS = "new friend"  # the one plot whose two children do not know each other at first
FOLLOWING = tuple(plot for plot in PLOTS if plot != STRANGERS)


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about, and what happens: its essence."""

    plot: str
    then: str  # a second plot, or nothing
    hero: str
    friend: str
    place: str
    toy: str
    animal: str
    food: str
    colour: str
    grown_up: str


def cast(draw: Draw, names: Sequence[str]) -> Cast:
    hero, friend = draw.some(names, 2)
    plot = draw.one(tuple(PLOTS))
    then = draw.one(FOLLOWING) if draw.chance(0.15) else ""
    return Cast(
        plot,
        "" if then == plot else then,
        hero,
        friend,
        draw.one(PLACES),
        draw.one(TOYS),
        draw.one(ANIMALS),
        draw.one(FOODS),
        draw.one(COLOURS),
        draw.one(GROWN_UPS),
    )


def essence(story_cast: Cast) -> tuple[object, ...]:
    return ("story", *astuple(story_cast))


def tell(draw: Draw, split: Split, names: Sequence[str] = NAMES) -> str:
    """One story of the asked split about people among `names`."""
    actors = draw_on_side(draw, split, lambda source: cast(source, names), essence)
    words = vars(actors) | pronouns(actors.hero) | {"size": draw.one(SIZES)}
    words |= {"f" + key: word for key, word in pronouns(actors.friend).items()}
    words["animal2"], words["animal3"] = draw.some([animal for animal in ANIMALS if animal != actors.animal], 2)
    words["things"] = _listing([f"a {draw.one(COLOURS)} {toy}" for toy in draw.some(TOYS, draw.between(2, 4))])
    lines = zip(draw.some(ANIMALS, 3), draw.some(TOYS, 3), strict=True)
    words["song"] = ", ".join(f"the {animal} likes the {toy}" for animal, toy in lines).capitalize()
    sentences = [draw.one(OPENINGS), *draw.some(DETAILS, draw.between(0, 2))]
    if actors.plot != STRANGERS and draw.chance(0.5):
        sentences.append(draw.one(FRIENDSHIPS))
    sentences += _chapter(draw, actors.plot)
    if actors.then:
        sentences += [draw.one(LATER), *_chapter(draw, actors.then)]
    sentences.append(draw.one(ENDINGS))
    return " ".join(sentences).format_map(words)


def _listing(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1]


def _chapter(draw: Draw, plot: str) -> list[str]:
    """A wording of each beat, now and then with a pause between two."""
    sentences = []
    for beat in PLOTS[plot]:
        sentences.append(draw.one(beat))
        if draw.chance(0.08):
            sentences.append(draw.one(PAUSES))
    return sentences
