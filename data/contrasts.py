"""English words of which at most one is true of a thing: what hard negatives are made of.

A contrast is a list of families. A word may be replaced by one that shares no family with it: families hold words that
overlap in meaning or in looks ("red" and "orange", "cat" and "tiger"), so that a replacement is false and not merely
unusual. Words for more general things ("person", "animal", "bird", "child") are left out: they stay true.
"""

from __future__ import annotations

from collections.abc import Mapping

Families = tuple[tuple[str, ...], ...]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _alone(words: str) -> Families:
    return tuple((word,) for word in words.split())


def _pairs(words: str) -> list[Families]:
    return [_alone(pair.replace("/", " ")) for pair in words.split()]


_COLOURS: Families = (
    *(("red", "pink"), ("red", "orange"), ("orange", "yellow", "gold", "golden"), ("purple", "pink")),
    *(("purple", "blue"), ("brown", "red", "orange", "black"), ("gray", "grey", "silver", "black")),
    *(("gray", "grey", "silver", "white"), ("green",)),
)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ATTRIBUTES = [
    _COLOURS,
    _alone(" ".join(NUMBERS)),
    _alone(" ".join(f"{number}-thirty" for number in NUMBERS)),
    _alone("0 1 2 3 4 5 6 7 8 9"),
    _alone("1st 2nd 3rd"),
    *_pairs("left/right leftwards/rightwards left-facing/right-facing up/down upwards/downwards first/last"),
    *_pairs("open/closed raised/lowered hot/cold large/small big/small tall/short wet/dry waxing/waning"),
    *_pairs("clockwise/counterclockwise horizontal/vertical horizontally/vertically uppercase/lowercase"),
    *_pairs("increasing/decreasing wooden/metal curly/straight"),
]
_PEOPLE = [
    *_pairs("man/woman men/women boy/girl boys/girls male/female prince/princess king/queen merman/mermaid"),
    *_pairs("old/young"),
]
_OBJECTS: list[Families] = [
    (
        *(("cat", "tiger", "lion", "leopard"), ("dog", "wolf", "fox", "poodle"), ("cow", "ox", "bison", "buffalo")),
        *(("sheep", "goat", "ram", "ewe"), ("horse", "donkey", "zebra", "unicorn"), ("camel", "llama"), ("giraffe",)),
        *(
            ("mouse", "rat", "hamster", "chipmunk"),
            ("rabbit",),
            ("pig", "boar"),
            ("elephant", "mammoth"),
            ("hedgehog",),
        ),
        *(
            ("monkey", "gorilla", "orangutan"),
            ("bear", "panda", "koala"),
            ("kangaroo",),
            ("crocodile", "lizard"),
            ("hedgehog",),
        ),
        *(("duck", "goose", "swan", "chicken", "rooster", "turkey", "flamingo", "peacock", "dodo"), ("frog",)),
        *(("eagle", "owl", "parrot", "dove", "phoenix"), ("penguin",), ("snake", "worm"), ("turtle",), ("snail",)),
        *(("whale", "dolphin", "shark", "orca", "seal"), ("octopus", "squid", "jellyfish"), ("butterfly",)),
        *(("crab", "lobster", "shrimp", "scorpion"), ("ant", "beetle", "cockroach", "cricket"), ("spider",)),
        *(("bee", "honeybee", "fly", "mosquito"), ("dragon",), ("hippopotamus", "rhinoceros"), ("deer", "moose")),
    ),
    (
        *(("apple", "peach", "tomato", "cherries"), ("banana",), ("pear", "mango", "avocado"), ("lemon", "lime")),
        *(("pineapple",), ("strawberry",), ("melon", "watermelon"), ("grapes", "blueberries"), ("coconut", "kiwi")),
        *(("carrot",), ("broccoli",), ("potato",), ("onion", "garlic"), ("mushroom",), ("corn",), ("cucumber",)),
        *(("eggplant",), ("pizza",), ("taco", "burrito", "sandwich", "hamburger", "falafel"), ("sushi", "shrimp")),
        *(("cake", "cupcake", "shortcake", "pie", "waffle", "pancakes", "cookie", "doughnut"), ("popcorn",)),
        *(("bread", "bagel", "croissant", "pretzel", "baguette"), ("egg",), ("lollipop", "candy"), ("spaghetti",)),
    ),
    (
        ("car", "automobile", "taxi", "bus", "minibus", "trolleybus", "truck", "ambulance", "tractor", "van", "tram"),
        ("train", "tram", "locomotive", "metro", "monorail"),
        ("airplane", "plane", "helicopter", "rocket", "parachute"),
        ("bicycle", "bike", "motorcycle", "scooter"),
        ("ship", "boat", "ferry", "sailboat", "canoe", "speedboat"),
    ),
    (
        *(("chair", "seat", "bench", "couch", "sofa", "bed"), ("table", "desk"), ("toilet", "bathtub", "sink")),
        *(("lamp", "candle", "flashlight", "bulb"), ("clock", "watch", "stopwatch"), ("mirror", "window"), ("door",)),
        *(("laptop", "computer", "television", "tv"), ("camera",), ("telephone", "phone", "pager"), ("radio",)),
        *(("umbrella",), ("book", "books", "notebook", "ledger"), ("bottle", "jar"), ("fork", "spoon", "chopsticks")),
        *(("knife", "dagger", "axe", "razor"), ("scissors",), ("key",), ("balloon",), ("kite",), ("basket", "bucket")),
        *(("hammer", "wrench", "screwdriver", "pick"), ("ladder",), ("broom", "shovel"), ("magnet",), ("crown",)),
        *(("pen", "pencil", "crayon", "paintbrush"), ("envelope",), ("backpack", "handbag", "purse", "briefcase")),
    ),
    (
        *(("guitar", "banjo", "violin", "harp"), ("trumpet", "trombone", "saxophone"), ("drum",), ("flute",)),
        *(("accordion",), ("microphone",), ("piano",)),
    ),
    (
        *(("hat", "cap", "helmet"), ("shoe", "boot", "sandal", "shoes", "sneaker"), ("gloves", "glove"), ("scarf",)),
        *(("socks",), ("shorts", "jeans", "pants"), ("dress", "kimono", "sari"), ("coat", "jacket"), ("glasses",)),
        *(("ring",), ("necktie", "tie"), ("bikini", "swimsuit")),
    ),
    (
        *(("tree",), ("cactus",), ("rose", "tulip", "hibiscus", "hyacinth", "blossom"), ("sunflower",), ("clover",)),
        *(("mountain", "volcano"), ("beach", "island"), ("desert",), ("rainbow",), ("tornado", "cyclone")),
    ),
    (
        *(("castle",), ("church", "mosque", "synagogue", "temple"), ("hospital",), ("school",), ("hotel",), ("bank",)),
        *(("factory",), ("tent",), ("bridge",), ("fountain",), ("stadium",)),
    ),
    (
        *(("circle", "wheel"), ("square",), ("triangle",), ("diamond",), ("heart",), ("star",), ("arrow",)),
        *(("anchor",),),
    ),
    (
        *(("judge",), ("pilot",), ("farmer",), ("cook",), ("singer", "artist"), ("teacher", "student", "scientist")),
        *(("mechanic",), ("astronaut",), ("firefighter",), ("detective",), ("ninja",), ("mage", "genie"), ("fairy",)),
        *(("vampire",), ("zombie",), ("superhero", "supervillain"), ("elf",), ("clown",), ("robot",), ("ghost",)),
    ),
    _alone("soccer baseball basketball volleyball tennis badminton hockey bowling golf cricket rugby"),
]
# what a body cannot do two of at once; "standing" or "smiling" stay true of most of them
_ACTIONS: list[Families] = [
    (
        *(("running", "walking", "fencing", "dancing", "cartwheeling"), ("swimming", "surfing"), ("biking",)),
        *(("rowing",), ("climbing",), ("golfing",), ("juggling",), ("kneeling",), ("sleeping",), ("skiing",)),
    ),
]


def _rivals(contrasts: list[Families]) -> Mapping[str, frozenset[str]]:
    """Word -> what may replace it."""
    found: dict[str, frozenset[str]] = {}
    for families in contrasts:
        words = {word for family in families for word in family}
        for word in words:
            near = {other for family in families if word in family for other in family}
            found[word] = found.get(word, frozenset()) | (words - near)
    return found


ATTRIBUTES = _rivals(_ATTRIBUTES)
PEOPLE = _rivals(_PEOPLE)
OBJECTS = _rivals(_OBJECTS)
ACTIONS = _rivals(_ACTIONS)
# further nouns that stand in two-word names; reversed, such a name means something else or nothing
NOUNS = frozenset(OBJECTS) | _set(
    "face paper money box card button flower moon sun water fire ice rice ball house road stone snow sand film speech "
    "nose ear eye hand foot head tooth mask nut bone chart map bag cup glass bowl pot"
)
IN_BETWEEN = _set("in inside under beneath underneath behind above below")
"""Prepositions whose sides cannot be exchanged without a change of meaning ("and", "with", "near", "on" can)."""
VERBS = _set("riding holding wearing eating carrying pulling chasing feeding pushing")
"""The same, between two things that each have an article; without one, "turban wearing man" is still the man."""
ARTICLES = _set("a an the his her its their this that some")
NEGATIONS = _set("no not non without never nobody nothing")
"""What is denied of one thing is as true of another: "no bicycles" / "no cars"."""
FUNCTION_WORDS = (
    IN_BETWEEN
    | VERBS
    | ARTICLES
    | _set("and or with without on of at to from for by near over into onto through while is are as but & next")
)
