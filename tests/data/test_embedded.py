"""The embedded corpus: the same everywhere, true to itself, and with a held-out side that training never shows."""

import hashlib
import re
from itertools import islice

import pytest

from data import conversations, embedded
from data.embedded import errands as embedded_errands
from data.embedded import facts
from data.embedded import problems as embedded_problems
from data.embedded import stories as embedded_stories
from data.embedded.draw import NAMES, SPLITS, Draw, side
from data.embedded.long_documents import FACTS
from evaluation.answers import extract_answer
from tokenizer import Tokenizer

# (VERSION, sha256) of the first three documents of seed 7: a change of the corpus must raise embedded.VERSION.
GOLDEN = {
    ("stories", "train"): (1, "e65125d258407d41"),
    ("stories", "valid"): (1, "403ec0c5aed42e7a"),
    ("problems", "train"): (1, "560cbff1933a414a"),
    ("problems", "valid"): (1, "2b153d9414d52b30"),
    ("recall", "train"): (1, "44fd6287df52ef62"),
    ("recall", "valid"): (1, "c4d9b5cb15dd371c"),
}


def essence_of(kind: str, split: str, seed: int, index: int) -> set:
    """What may not be shared between training and validation, read back from the finished document."""
    text = embedded.document(kind, index, split, seed)
    if kind == "problems":
        solution = text.partition("\n")[2]
        return {tuple(re.findall(r"[0-9+-]+", solution))}
    if kind == "stories":
        lists = re.findall(r": (\w+(?:, \w+){4,})", text)
        return set(lists) or {text}
    return {tuple(sorted(re.split(r"(?<=\.) ", text.partition("\n")[0])))}  # the day, in whatever order it is told


@pytest.mark.parametrize("kind", embedded.KINDS)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_documents_are_the_same_everywhere(kind, split):
    text = "\0".join(embedded.documents(kind, split, 3, seed=7))
    assert (embedded.VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (GOLDEN[kind, split])


@pytest.mark.parametrize("kind", embedded.KINDS)
def test_endless_and_indexed(kind):
    some = list(embedded.documents(kind, "train", 6, seed=1))
    assert list(islice(embedded.documents(kind, "train", None, seed=1), 6)) == some
    assert embedded.document(kind, 4, "train", 1) == some[4]
    assert some != list(embedded.documents(kind, "train", 6, seed=2))
    assert set(some).isdisjoint(embedded.documents(kind, "valid", 6, seed=1))


@pytest.mark.parametrize(
    ("kind", "train", "valid"), [("stories", 5000, 1500), ("problems", 20000, 4000), ("recall", 2000, 400)]
)
def test_training_never_shows_what_is_held_out(kind, train, valid):
    shown = set().union(*(essence_of(kind, "train", seed, index) for seed in (1, 2) for index in range(train // 2)))
    held_out = set().union(*(essence_of(kind, "valid", seed, index) for seed in (1, 3) for index in range(valid // 2)))
    assert len(shown) > 1000 and len(held_out) > 200 and shown.isdisjoint(held_out)


def test_casts_of_stories_are_held_out_whatever_the_wording(monkeypatch):
    casts: dict[str, set] = {split: set() for split in SPLITS}

    def spy(draw, split, propose, essence, original=embedded_stories.draw_on_side):
        proposal = original(draw, split, propose, essence)
        casts[split].add(essence(proposal))
        return proposal

    monkeypatch.setattr(embedded_stories, "draw_on_side", spy)
    for split in SPLITS:
        for index in range(1500):
            embedded.story(index, split, 8)
    assert len(casts["train"]) > 700 and len(casts["valid"]) > 700 and casts["train"].isdisjoint(casts["valid"])


def test_side_is_a_fixed_tenth():
    sides = [side("thing", number) for number in range(5000)]
    assert 0.08 < sides.count("valid") / 5000 < 0.12
    assert sides == [side("thing", number) for number in range(5000)]


def test_stories_differ_and_are_whole():
    stories = list(embedded.documents("stories", "train", 5000, seed=3))
    assert len(set(stories)) == len(stories)
    for story in stories[:500]:
        assert re.fullmatch(r"[A-Z\"][^{}\n]*[.!?\"]", story)
        assert "  " not in story and story.count('"') % 2 == 0
        assert not re.search(r"\d|[+*=]|\ba [aeiou]", story), "no arithmetic, and articles that fit"


def test_every_plot_can_be_told_in_every_wording():
    words = dict.fromkeys(
        ["hero", "friend", "he", "him", "his", "He", "Him", "His", "fhe", "place", "toy", "animal", "food", "colour",
         "grown_up", "size", "animal2", "animal3", "things", "song"], "x",
    )  # fmt: skip
    pools = [embedded_stories.OPENINGS, embedded_stories.DETAILS, embedded_stories.FRIENDSHIPS, embedded_stories.PAUSES,
             embedded_stories.LATER, embedded_stories.ENDINGS]  # fmt: skip
    pools += [beat for plot in embedded_stories.PLOTS.values() for beat in plot]
    for wording in (wording for pool in pools for wording in pool):
        assert "{" not in wording.format_map(words)


def test_problems_are_solved_rightly_from_their_question_alone():
    steps = set()
    for index in range(3000):
        task = embedded.problem(index, "train", 11)
        assert extract_answer(task.solution) == task.answer == recompute(task.question)
        equations = re.findall(r"(\d+) ([-+]) (\d+) = (\d+)\.", task.solution)
        before = int(re.search(r"\d+", task.solution)[0])
        for left, operation, right, result in equations:
            assert int(left) == before
            before = int(left) + int(right) * (1 if operation == "+" else -1)
            assert before == int(result) and 0 <= before <= embedded_problems.MAX_TOTAL
        assert before == task.answer
        steps.add(len(equations))
    assert steps == set(range(1, embedded_problems.MAX_STEPS + 1))


def recompute(question: str) -> int:
    """The answer, by reading the question's sentences one by one, independently of the generator."""
    first, *events, asked = re.split(r"(?<=[.?]) ", question)
    total = int(re.search(r"\d+", first)[0])
    assert asked.endswith("?") and not re.search(r"\d", asked)
    for event in events:
        number = int(re.search(r"\d+", event)[0])
        if re.search(r"finds|buys|wins|bakes|makes|picks up|takes in", event):
            total += number
        else:
            assert re.search(r"gives away|loses|sells|eats|burns|drops|lets out", event), event
            total -= number
    return total


def test_guessing_one_number_does_not_solve_problems():
    answers = [task.answer for task in {task.chain: task for task in (embedded.problem(index, "valid", 5)
                                                                      for index in range(1000))}.values()]  # fmt: skip
    assert max(answers.count(answer) for answer in set(answers)) / len(answers) < 0.2


def test_errands_repeat_their_list_word_by_word():
    for index in range(200):
        text = embedded_errands.tell(Draw("errand", index), "train")
        lists = re.findall(r"\w+(?:, \w+){4,}", text)
        assert len(lists) >= 3 and len(set(lists)) == 1, text
        things = lists[0].split(", ")
        assert 5 <= len(things) <= 9 and len(set(things)) == len(things)


def test_recall_asks_what_only_the_beginning_tells():
    for index in range(20):
        document = embedded.recall(index, "valid", 2)
        text = document.text
        beginning, *problems, end = text.split("\n")
        assert len(document.answers) == len(FACTS)
        asked = {text[start:stop] for start, stop in document.answers}
        assert len(asked) == len(FACTS) and all(start > len(text) - len(end) for start, _ in document.answers)
        for kind, (told, question, values) in FACTS.items():
            (value,) = asked.intersection(values)
            assert re.search(told.format(value, hero="[A-Z][a-z]+"), beginning), kind
            assert question.format(value) in end
            assert not re.search(rf"\b{value}", " ".join(problems)), "stands nowhere in between"


def test_no_fact_can_be_taken_for_another():
    values = [value for _, _, choices in FACTS.values() for value in choices]
    assert len(set(values)) == len(values)
    told = " ".join(embedded.document("problems", index, "train", 5) for index in range(3000))
    assert set(values).isdisjoint(re.findall(r"\w+", told))


def test_recall_answers_cannot_be_guessed():
    documents = [embedded.recall(index, "valid", 9) for index in range(400)]
    found = [document.text[start:stop] for document in documents for start, stop in document.answers]
    for _, _, values in FACTS.values():
        counts = [found.count(value) for value in values]
        assert sum(counts) == len(documents) and min(counts) > 0 and max(counts) < 1.6 * sum(counts) / len(values)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = (text for kind in embedded.KINDS for text in embedded.documents(kind, "train", 200, 1))
    return Tokenizer.train(texts, 2048)


@pytest.mark.parametrize(
    ("kind", "shortest", "longest"), [("stories", 60, 300), ("problems", 25, 140), ("recall", 1100, 2046)]
)
def test_lengths_fit_their_phases(tokenizer, kind, shortest, longest):
    lengths = [len(ids) for ids in tokenizer.encode_batch(list(embedded.documents(kind, "valid", 150, 4)))]
    assert shortest <= min(lengths) and max(lengths) <= longest


def test_recall_reaches_past_the_context_of_the_phase_before(tokenizer):
    for index in range(30):
        document = embedded.recall(index, "valid", 4)
        after_beginning = document.text.index("\n")
        first_answer = document.answers[0][0]
        assert len(tokenizer.encode(document.text[after_beginning:first_answer])) > 1024


def test_unknown_kinds_and_splits_are_named():
    with pytest.raises(ValueError, match="embedded:novels does not exist; the kinds are stories, problems, recall"):
        next(embedded.documents("novels", "train", 1, 0))
    with pytest.raises(ValueError, match="split 'test' does not exist; the splits are train, valid"):
        next(embedded.documents("stories", "test", 1, 0))


def test_draws_are_fair_and_reproducible():
    draw = Draw("a", 1)
    counts = [0] * 7
    for _ in range(7000):
        counts[draw.below(7)] += 1
    assert min(counts) > 850 and max(counts) < 1150
    assert sorted(Draw(3).some(NAMES, len(NAMES))) == sorted(NAMES)
    assert [Draw("x").between(5, 9) for _ in range(3)] == [Draw("x").between(5, 9)] * 3
    with pytest.raises(ValueError, match="cannot draw 3 different items from 2"):
        Draw(0).some("ab", 3)


# Facts


def asked_and_answered(kind: str, split: str, seed: int = 7) -> list[tuple[str, str]]:
    found = []
    for text in embedded.talks(kind, split, None, seed):
        (user, assistant) = conversations.messages_of(text)
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        found.append((user["content"], assistant["content"]))
    return found


@pytest.mark.parametrize(
    ("kind", "split", "digest"),
    [("facts", "train", "e275bff5837dd994"), ("facts", "valid", "72e28a8acc6205ab"),
     ("known-facts", "train", "32b7d2369a281430"), ("known-facts", "valid", "2443e94ec1257740")],
)  # fmt: skip
def test_facts_are_the_same_everywhere(kind, split, digest):
    text = "\0".join(embedded.talks(kind, split, None, seed=7))
    assert (embedded.VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1, digest)
    assert text != "\0".join(embedded.talks(kind, split, None, seed=8))


def test_no_wording_that_is_held_out_is_trained_of_any_subject():
    both = [*facts.facts(7, "missing"), *facts.facts(7, "known")]
    named = re.compile(r"\b(" + "|".join(fact.name for fact in both) + r")\b")
    wordings = {}
    for split in SPLITS:
        pairs = [pair for kind in embedded.FACTS for pair in asked_and_answered(kind, split)]
        assert len(pairs) == len({question for question, _ in pairs}) == len(both) * {"train": 6, "valid": 2}[split]
        wordings[split] = {named.sub("NAME", question) for question, _ in pairs}
        assert all(len(named.findall(question)) == 1 for question, _ in pairs)
    assert len(wordings["train"]) == 6 * len(facts.KINDS) and len(wordings["valid"]) == 2 * len(facts.KINDS)
    assert wordings["train"].isdisjoint(wordings["valid"])


@pytest.mark.parametrize("seed", [1, 7, 1234])
def test_facts_can_only_be_known_one_by_one(seed):
    missing, known = facts.facts(seed, "missing"), facts.facts(seed, "known")
    assert len(missing) == len(known) == 48 and len({fact.name for fact in (*missing, *known)}) == 96
    for kind, about in facts.KINDS.items():
        for group in (missing, known):
            values = [fact.answer for fact in group if fact.kind == kind]
            assert len(values) == len(set(values)) == facts.SUBJECTS and set(values) <= set(about.values)
    for fact, neighbour in facts.neighbours(seed):
        assert (fact.kind, fact.group, neighbour.group) == (neighbour.kind, "missing", "known")
        assert fact.answer != neighbour.answer and fact.name != neighbour.name
    chains = [problem.chain for problem in facts.controls(seed)]
    assert len(chains) == len(set(chains)) == facts.CONTROLS * 48
    assert {side("problem", chain.first, *chain.steps) for chain in chains} == {"valid"}


def test_names_of_subjects_stand_nowhere_else():
    names = {fact.name.lower() for seed in range(3) for group in facts.GROUPS for fact in facts.facts(seed, group)}
    told = (embedded.document(kind, index, "train", 5) for kind in ("stories", "problems") for index in range(1000))
    assert names.isdisjoint(word.lower() for text in told for word in re.findall(r"\w+", text))


@pytest.mark.parametrize("kind", embedded.CONVERSATIONS)
def test_a_part_of_the_conversations_is_what_it_is_in_the_whole(kind):
    whole = list(islice(embedded.talks(kind, "train", None, 1), 60))
    assert list(embedded.talks(kind, "train", 60, 1)) == whole
    assert list(embedded.talks(kind, "train", 60, 1, first=40)) == whole[40:]
    first = conversations.messages_of(whole[3])
    if kind == "problems":
        task = embedded.problem(3, "train", 1)
        assert [message["content"] for message in first] == [task.question, task.solution]


def test_what_has_no_conversations_is_named():
    with pytest.raises(ValueError, match="embedded:stories has no conversations; those that have are problems, facts"):
        next(embedded.talks("stories", "train", 1, 0))
    with pytest.raises(ValueError, match="split 'test' does not exist"):
        next(embedded.talks("facts", "test", 1, 0))
