"""Base concepts of emoji names: which pictures show one idea and must therefore never be split between pools.

The rules read English names ("man running medium skin tone") and give a group ("running"). Folded:

* skin tones;
* gender and number of people: "man/woman/person/men/women/people X" -> X, together with a bare "X";
* direction: "X facing right", mirrored hands and magnifying glasses, "oncoming" vehicles;
* hair: "man bald", "person red hair" ... -> "person", with the bare hair swatches;
* couples and families: kisses, hearts, holding hands, all family compositions;
* age and gender words without a common stem (boy/girl/child, merman/mermaid, prince/princess, Santa/Mrs. Claus ...);
* an animal or a heavenly body and its face ("cat", "cat face");
* keycaps;
* flags that are one drawing under several names (territories under their country's flag; Chad and Romania).

Not folded: clock faces, colours, arrows, ranks, flags of different countries, and things that merely look alike.
"""

from __future__ import annotations

import re

_TONE = re.compile(r"\s*\b(?:(?:medium-)?(?:light|dark)|medium) skin tone\b,?")
_PEOPLE = re.compile(r"^(?:man|woman|person|men|women|people) (.+)$")
_FACING = " facing right"
_HAIR = frozenset({"bald", "beard", "blond hair", "curly hair", "red hair", "white hair"})
_PREFIXES = {
    "family": "family",
    "kiss": "kiss",
    "couple with heart": "couple with heart",
    "keycap": "keycap",
    "deaf": "deaf person",
    "pregnant": "pregnant person",
    "backhand index pointing": "backhand index pointing",
    "magnifying glass tilted": "magnifying glass",
}
_FOLDED = {
    "person": ("man", "woman", "person", *_HAIR),
    "child": ("boy", "girl", "child"),
    "older person": ("old man", "old woman", "older person"),
    "royalty": ("prince", "princess", "person with crown"),
    "Claus": ("Santa Claus", "Mrs. Claus", "Mx Claus"),
    "merperson": ("merman", "mermaid", "merperson"),
    "holding hands": ("woman and man holding hands",),
    "feeding baby": ("breast-feeding",),
    "restroom": ("men’s room", "women’s room", "restroom"),
    "gender sign": ("male sign", "female sign", "transgender symbol"),
    "bust in silhouette": ("bust in silhouette", "busts in silhouette"),
    "sideways hand": ("leftwards hand", "rightwards hand"),
    "pushing hand": ("leftwards pushing hand", "rightwards pushing hand"),
    "sideways fist": ("left-facing fist", "right-facing fist"),
    "baby chick": ("baby chick", "front-facing baby chick"),
    "automobile": ("oncoming automobile",),
    "bus": ("oncoming bus",),
    "police car": ("oncoming police car",),
    "taxi": ("oncoming taxi",),
    "sun": ("sun with face",),
    "flag of Australia": ("flag of Heard Island & McDonald Islands",),
    "flag of France": ("flag of Clipperton Island", "flag of St. Martin"),
    "flag of Indonesia": ("flag of Monaco",),
    "flag of Norway": ("flag of Bouvet Island", "flag of Svalbard & Jan Mayen"),
    "flag of Romania": ("flag of Chad",),
    "flag of Spain": ("flag of Ceuta & Melilla",),
    "flag of United States": ("flag of U.S. Outlying Islands",),
}
_TABLE = {name: group for group, names in _FOLDED.items() for name in names}
_TABLE |= {
    f"{thing} face": thing
    for thing in (
        *("cat", "cow", "dog", "dragon", "horse", "monkey", "mouse", "pig", "rabbit", "tiger"),
        *("full moon", "new moon", "first quarter moon", "last quarter moon"),
    )
}


def base_concept(name: str) -> str:
    """The group of a cleaned English emoji name, skin tone included or not ("man running" -> "running")."""
    name = _TONE.sub("", name).strip()
    if name in _TABLE:
        return _TABLE[name]
    for prefix, group in _PREFIXES.items():
        if name == prefix or name.startswith(prefix + " "):
            # "kiss mark" is a picture of lips, not a couple
            return name if name == "kiss mark" else group
    people = _PEOPLE.match(name)
    if people is None:
        return name
    rest = people.group(1).removesuffix(_FACING)
    return "person" if rest in _HAIR else rest
