"""Questions about scenes with the one right answer, built from what is known of the pictures and where they lie.

Every yes/no question has its answer drawn first, so that "yes" is right about half of the time; a wrong name is mostly
one of the same kind. A question whose answer would depend on a fact that a picture lacks is not asked: kinds
are counted only where every picture of the scene has one, colours and names likewise.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable

from pocketvlm.data.scene_words import ENGLISH, KIND_WORDS, OTHER_LANGUAGES, PLACES, SIDES
from pocketvlm.data.scenes import PictureSet, Scene, draw_scene, scene_rng

# a scene caption names every picture, and more than these would be a list
_CAPTIONED = 4
# of the wrong names, how many are of the picture's own kind
_HARD = 0.8


@dataclasses.dataclass(frozen=True)
class Question:
    """type: one of `TYPES`. negative: for a "no" about a name, "same-kind" or "any", by what the wrong name is."""

    type: str
    text: str
    answer: str
    language: str = "en"
    negative: str = ""


class Facts:
    """A scene with what follows from it; questions are drawn from `rng`."""

    def __init__(self, pictures: PictureSet, scene: Scene, rng: random.Random) -> None:
        self.set, self.scene, self.rng = pictures, scene, rng
        self.placed = scene.placed
        self.shown = [pictures.pictures[number] for _, number in self.placed]
        self.times = Counter(number for _, number in self.placed)
        self.once = [(place, number) for place, number in self.placed if self.times[number] == 1]
        kinds = [picture.kind for picture in self.shown]
        self.kinds = None if None in kinds else Counter(kind for kind in kinds if kind is not None)
        # where one has no name, nobody knows that it is not the thing asked for
        self.named = all(picture.name for picture in self.shown)
        colours = [picture.colour for picture in self.shown]
        self.colours = None if None in colours else Counter(colour for colour in colours if colour is not None)

    def place(self, place: int) -> str:
        return PLACES[self.scene.grid][place]

    def name(self, number: int) -> str:
        return self.set.pictures[number].name

    def yes(self) -> bool:
        return self.rng.random() < 0.5

    def absent_name(self, like: int) -> tuple[int, str] | None:
        """A picture of a concept that the scene does not show, mostly of the kind of picture `like`, and which."""
        groups = {picture.group for picture in self.shown}
        kind = self.set.pictures[like].kind
        hard = kind is not None and self.rng.random() < _HARD
        pool: list[int] | range = self.set.by_kind[kind] if hard and kind is not None else range(len(self.set))
        for _ in range(4):
            number = self.rng.choice(pool)
            if self.name(number) and self.set.pictures[number].group not in groups:
                return number, "same-kind" if hard else "any"
        return None

    def absent_kind(self) -> str:
        """By how often pictures have it, so that a kind that is seldom asked for is no sign of "no"."""
        assert self.kinds is not None
        for _ in range(8):
            kind = self.set.pictures[self.rng.choice(self.set.kinded)].kind
            if kind is not None and kind not in self.kinds:
                return kind
        return self.rng.choice([kind for kind in KIND_WORDS if kind not in self.kinds])

    def ask(self, kind_of_question: str, answer: str, negative: str = "", **words: str) -> Question:
        text = self.rng.choice(ENGLISH[kind_of_question]).format(**words)
        return Question(kind_of_question, text, answer, negative=negative)


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _name(facts: Facts) -> Question | None:
    return facts.ask("name", facts.shown[0].name) if facts.named else None


def _kind(facts: Facts) -> Question | None:
    kind = facts.shown[0].kind
    return None if kind is None else facts.ask("kind", kind)


def _colour(facts: Facts) -> Question | None:
    colour = facts.shown[0].colour
    return None if colour is None else facts.ask("colour", colour)


def _yesno_name(facts: Facts) -> Question | None:
    if not facts.named:
        return None
    number = facts.placed[0][1]
    if facts.yes():
        return facts.ask("yesno-name", "yes", name=facts.name(number))
    wrong = facts.absent_name(number)
    return None if wrong is None else facts.ask("yesno-name", "no", wrong[1], name=facts.name(wrong[0]))


def _yesno_kind(facts: Facts) -> Question | None:
    kind = facts.shown[0].kind
    if kind is None:
        return None
    yes = facts.yes()
    return facts.ask("yesno-kind", _yes_no(yes), kind=KIND_WORDS[kind if yes else facts.absent_kind()][0])


def _yesno_colour(facts: Facts) -> Question | None:
    colour = facts.shown[0].colour
    if colour is None:
        return None
    yes = facts.yes()
    if not yes:
        # as in `absent_kind`
        others = [facts.set.pictures[facts.rng.choice(facts.set.coloured)].colour for _ in range(8)]
        colour = next((other for other in others if other not in (None, colour)), None)
        if colour is None:
            return None
    return facts.ask("yesno-colour", _yes_no(yes), colour=colour)


def _caption(facts: Facts) -> Question | None:
    picture = facts.shown[0]
    if picture.kind is None or not facts.named:
        return None
    said = f"{picture.name}, {KIND_WORDS[picture.kind][0]}"
    return facts.ask("caption", said if picture.colour is None else f"{said}, mainly {picture.colour}")


def _other_name(facts: Facts) -> Question | None:
    language = facts.rng.choice(list(OTHER_LANGUAGES))
    name = facts.shown[0].names[language]
    return Question("name-other", OTHER_LANGUAGES[language][0], name, language) if name else None


def _other_yesno(facts: Facts) -> Question | None:
    language = facts.rng.choice(list(OTHER_LANGUAGES))
    number, negative = facts.placed[0][1], ""
    if not facts.named or not facts.shown[0].names[language]:
        return None
    yes = facts.yes()
    if not yes:
        wrong = facts.absent_name(number)
        if wrong is None:
            return None
        if facts.set.pictures[wrong[0]].names[language] == facts.shown[0].names[language]:
            return None  # other languages have one name for some pairs
        number, negative = wrong
    _, text, word_yes, word_no = OTHER_LANGUAGES[language]
    name = facts.set.pictures[number].names[language]
    if not name:
        return None
    return Question("yesno-other", text.format(name=name), word_yes if yes else word_no, language, negative)


def _count(facts: Facts) -> Question:
    return facts.ask("count", str(len(facts.placed)))


def _count_kind(facts: Facts) -> Question | None:
    if facts.kinds is None:
        return None
    kind = facts.rng.choice(list(facts.kinds)) if facts.rng.random() < 0.8 else facts.absent_kind()
    return facts.ask("count-kind", str(facts.kinds[kind]), kinds=KIND_WORDS[kind][1])


def _count_name(facts: Facts) -> Question | None:
    if not facts.named:
        return None
    draw = facts.rng.random()
    repeated = [number for number, times in facts.times.items() if times > 1]
    if draw < 0.25:
        wrong = facts.absent_name(facts.placed[0][1])
        return None if wrong is None else facts.ask("count-name", "0", wrong[1], name=facts.name(wrong[0]))
    number = facts.rng.choice(repeated or list(facts.times))
    return facts.ask("count-name", str(facts.times[number]), name=facts.name(number))


def _count_colour(facts: Facts) -> Question | None:
    if facts.colours is None:
        return None
    if facts.rng.random() < 0.8:
        colour = facts.rng.choice(list(facts.colours))
    else:
        colour = str(facts.set.pictures[facts.rng.choice(facts.set.coloured)].colour)
    return facts.ask("count-colour", str(facts.colours[colour]), colour=colour)


def _where_name(facts: Facts) -> Question | None:
    if not facts.once or not facts.named:
        return None
    place, number = facts.rng.choice(facts.once)
    return facts.ask("where-name", facts.place(place), name=facts.name(number))


def _where_kind(facts: Facts) -> Question | None:
    if facts.kinds is None:
        return None
    found = [(place, facts.set.pictures[number].kind) for place, number in facts.placed]
    single = [(place, kind) for place, kind in found if kind is not None and facts.kinds[kind] == 1]
    if not single:
        return None
    place, kind = facts.rng.choice(single)
    return facts.ask("where-kind", facts.place(place), kind=KIND_WORDS[kind][0])


def _where_colour(facts: Facts) -> Question | None:
    if facts.colours is None:
        return None
    found = [(place, facts.set.pictures[number].colour) for place, number in facts.placed]
    single = [(place, colour) for place, colour in found if colour is not None and facts.colours[colour] == 1]
    if not single:
        return None
    place, colour = facts.rng.choice(single)
    return facts.ask("where-colour", facts.place(place), colour=colour)


def _at_name(facts: Facts) -> Question | None:
    place, number = facts.rng.choice(facts.placed)
    name = facts.name(number)
    return facts.ask("at-name", name, place=facts.place(place)) if name else None


def _at_kind(facts: Facts) -> Question | None:
    place, number = facts.rng.choice(facts.placed)
    kind = facts.set.pictures[number].kind
    return None if kind is None else facts.ask("at-kind", kind, place=facts.place(place))


def _at_colour(facts: Facts) -> Question | None:
    place, number = facts.rng.choice(facts.placed)
    colour = facts.set.pictures[number].colour
    return None if colour is None else facts.ask("at-colour", colour, place=facts.place(place))


def _occupied(facts: Facts) -> Question | None:
    yes = facts.yes()
    full = {place for place, _ in facts.placed}
    places = [place for place in range(len(facts.scene.cells)) if (place in full) == yes]
    if not places:
        return None
    return facts.ask("occupied", _yes_no(yes), place=facts.place(facts.rng.choice(places)))


def _exists_name(facts: Facts) -> Question | None:
    if not facts.named:
        return None
    number = facts.rng.choice(facts.placed)[1]
    if facts.yes():
        return facts.ask("exists-name", "yes", name=facts.name(number))
    wrong = facts.absent_name(number)
    return None if wrong is None else facts.ask("exists-name", "no", wrong[1], name=facts.name(wrong[0]))


def _exists_kind(facts: Facts) -> Question | None:
    if facts.kinds is None:
        return None
    yes = facts.yes()
    kind = facts.rng.choice(list(facts.kinds)) if yes else facts.absent_kind()
    return facts.ask("exists-kind", _yes_no(yes), kind=KIND_WORDS[kind][0])


def _relation(facts: Facts) -> Question | None:
    """Two pictures that differ in the asked direction, so that the opposite side is the wrong one."""
    if len(facts.once) < 2 or not facts.named:
        return None
    (place, number), (other_place, other) = facts.rng.sample(facts.once, 2)
    row, column = divmod(place, facts.scene.grid)
    other_row, other_column = divmod(other_place, facts.scene.grid)
    true = []
    if column != other_column:
        true.append(SIDES[0] if column < other_column else SIDES[1])
    if row != other_row:
        true.append(SIDES[2] if row < other_row else SIDES[3])
    side = facts.rng.choice(true)
    yes = facts.yes()
    if not yes:
        side = SIDES[SIDES.index(side) ^ 1]
    return facts.ask("relation", _yes_no(yes), name=facts.name(number), side=side, other=facts.name(other))


def _compare(facts: Facts) -> Question | None:
    """Of two kinds one is in the majority; the question asks either way round."""
    if facts.kinds is None:
        return None
    first = facts.rng.choice(list(facts.kinds))
    rest = [kind for kind in facts.kinds if kind != first]
    second = facts.rng.choice(rest) if rest and facts.rng.random() < 0.7 else facts.absent_kind()
    if facts.kinds[first] == facts.kinds[second]:
        return None
    more, less = (first, second) if facts.kinds[first] > facts.kinds[second] else (second, first)
    yes = facts.yes()
    asked, other = (more, less) if yes else (less, more)
    return facts.ask("compare", _yes_no(yes), kinds=KIND_WORDS[asked][1], others=KIND_WORDS[other][1])


def _scene_caption(facts: Facts) -> Question | None:
    if len(facts.placed) > _CAPTIONED or not facts.named:
        return None
    said = "; ".join(f"{facts.place(place)}: {facts.name(number)}" for place, number in facts.placed)
    return facts.ask("scene-caption", said)


Maker = Callable[[Facts], Question | None]
# weight, maker
_SINGLE: dict[str, tuple[float, Maker]] = {
    "name": (2.0, _name),
    "kind": (2.0, _kind),
    "colour": (2.0, _colour),
    "yesno-name": (2.0, _yesno_name),
    "yesno-kind": (1.0, _yesno_kind),
    "yesno-colour": (1.0, _yesno_colour),
    "caption": (1.0, _caption),
    "name-other": (1.0, _other_name),
    "yesno-other": (1.0, _other_yesno),
}
_SEVERAL: dict[str, tuple[float, Maker]] = {
    "count": (1.0, _count),
    "count-kind": (2.0, _count_kind),
    "count-name": (1.5, _count_name),
    "count-colour": (2.0, _count_colour),
    "where-name": (2.0, _where_name),
    "where-kind": (1.5, _where_kind),
    "where-colour": (1.5, _where_colour),
    "at-name": (1.5, _at_name),
    "at-kind": (1.5, _at_kind),
    "at-colour": (1.5, _at_colour),
    "occupied": (1.0, _occupied),
    "exists-name": (2.0, _exists_name),
    "exists-kind": (1.5, _exists_kind),
    "relation": (1.5, _relation),
    "compare": (1.5, _compare),
    "scene-caption": (0.7, _scene_caption),
}
TYPES = (*_SINGLE, *_SEVERAL)
CAPTIONS = ("caption", "scene-caption")
"""Types whose answers are sentences, for which an exact match asks much."""


def ask(pictures: PictureSet, scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Up to `count` different questions about a scene, of different types as far as there are any.

    Fewer where the scene answers no more; a single picture that has a name has at least one.
    """
    facts = Facts(pictures, scene, rng)
    makers = _SINGLE if scene.grid == 1 else _SEVERAL
    # the exponential races of weighted sampling without replacement
    order = sorted(makers, key=lambda name: rng.expovariate(makers[name][0]))
    found: list[Question] = []
    texts: set[str] = set()
    for _ in range(2):
        for name in order:
            if len(found) == count:
                return found
            question = makers[name][1](facts)
            if question is not None and question.text not in texts:
                found.append(question)
                texts.add(question.text)
    return found


def ask_about(pictures: PictureSet, seed: int, index: int, count: int) -> tuple[Scene, list[Question]]:
    """Scene `index` of the stream `seed` over these pictures, with up to `count` questions."""
    rng = scene_rng(seed, index)
    scene = draw_scene(pictures, rng)
    return scene, ask(pictures, scene, rng, count)
