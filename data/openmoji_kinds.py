"""Kinds of things as classes of the built-in pictures: which of sixteen a code point shows, for classification.

The names of OpenMoji's pictures are all different, so that no picture of a held-out name could be of a learned class.
These kinds are coarse, made for this kit by looking at the names, and follow the rows of Unicode's charts where those
hold one kind; they are not Unicode's own groups. What belongs to none, or to several, has no kind.
"""

from __future__ import annotations

# hexadecimal code points, "A-B" for all from A to B; the first of a picture's code points decides
_KINDS = {
    "animal": "1F400-1F43C 1F43F 1F54A 1F577 1F980-1F9A9 1F9AB-1F9AE 1FAB0-1FAB3 1FABC 1FABF 1FACD-1FACF",
    "building": (
        "26E9 26EA 1F3D7 1F3D8 1F3DA 1F3DB 1F3DF-1F3E6 1F3E8-1F3ED 1F3EF 1F3F0 1F492 1F54B-1F54D 1F5FC 1F6D5 1F6D6"
    ),
    "clock": "231A 231B 23F0-23F3 1F550-1F567 1F570",
    "clothing": (
        "26D1 1F393 1F3A9 1F3BD 1F451-1F45A 1F45E-1F462 1F576 1F94B 1F97B-1F97F 1F9BA 1F9E2-1F9E6 1FA70-1FA74 1FA96"
    ),
    "face": (
        "2639 263A 1F600-1F637 1F641-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A 1F9D0 "
        "1FAE0-1FAE5 1FAE8-1FAEA"
    ),
    "food or drink": (
        "2615 1F32D-1F330 1F336 1F33D 1F345-1F373 1F375-1F37B 1F37E 1F37F 1F382 1F942 1F943 1F950-1F961 1F963-1F96F "
        "1F9C0-1F9C9 1F9CB 1FAD0-1FAD6 1FAD8 1FADA-1FADC"
    ),
    "hand": "261D 270A-270D 1F446-1F450 1F4AA 1F590 1F595 1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932 1FAF0-1FAF8",
    "heart": "2763 2764 1F493-1F49F 1F5A4 1F90D 1F90E 1F9E1 1FA75-1FA77",
    "musical instrument": "1F3B7-1F3BB 1F941 1FA87-1FA8A 1FA95 1FA97 1FA98",
    "person": (
        "1F385 1F466-1F478 1F481-1F483 1F486 1F487 1F48F 1F491 1F574 1F575 1F57A 1F645-1F647 1F64B 1F64D 1F64E "
        "1F6B6 1F926 1F930 1F931 1F934-1F937 1F977 1F9CD-1F9CF 1F9D1-1F9DD 1FAC2-1FAC5"
    ),
    "plant": "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F940 1FAB4 1FAB7 1FABB 1FABE",
    "sign": (
        "0023-0039 2194-21AA 23CF-23EF 23F8-23FA 25B6-25C0 2640-2653 26A0 26A7 26CE 26D4 27A1 2934 2935 "
        "2B05-2B07 3297-3299 1F170-1F19A 1F201-1F251 1F500-1F503 1F51F-1F524 1F53C 1F53D "
        "1F6AB 1F6AD-1F6AF 1F6B1 1F6B3 1F6B7-1F6BC 1F6BE 1F6C2-1F6C5"
    ),
    "sport": (
        "26BD 26BE 26F7-26F9 1F3BE-1F3C0 1F3C2-1F3C4 1F3C7-1F3CC 1F3CF-1F3D3 1F3F8 1F6A3 1F6B4 1F6B5 1F938-1F93E 1F945 "
        "1F94A 1F94C-1F94F"
    ),
    "tool": (
        "2692 26CF 2702 2712 1F50D 1F50E 1F527-1F52A 1F52C 1F58A-1F58D 1F5DC 1F6E0 1F9F0 1F9F7 1F9F9 1FA8F 1FA92 1FA93 "
        "1FA9A-1FA9D 1FAA0 1FAA1 1FAA3"
    ),
    "vehicle": (
        "2708 26F4 26F5 1F3CD 1F3CE 1F680-1F688 1F68A-1F68E 1F690-1F6A2 1F6A4 1F6B2 1F6E5-1F6EC 1F6F3-1F6F6 1F6F8 "
        "1F6FA 1F6FB"
    ),
    "weather": "2600 2601 2603 26C4 26C5 26C8 2744 1F300 1F301 1F308 1F31E 1F324-1F32C",
}


def _table() -> dict[int, str]:
    found: dict[int, str] = {}
    for kind, parts in _KINDS.items():
        for part in parts.split():
            first, _, last = part.partition("-")
            for point in range(int(first, 16), int(last or first, 16) + 1):
                assert found.setdefault(point, kind) == kind, f"U+{point:X} is {found[point]} and {kind}"
    return found


_KIND_OF = _table()
KINDS = tuple(sorted(_KINDS))


def kind_of(stem: str) -> str | None:
    """The kind of the picture with this file stem ("1F600"); None where it has none."""
    points = [int(part, 16) for part in stem.split("-")]
    return _KIND_OF.get(points[0])
