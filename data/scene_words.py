"""What questions about scenes are worded with: English in full, and five other languages for some questions."""

from __future__ import annotations

# by grid, in reading order
PLACES = {
    2: ("top left", "top right", "bottom left", "bottom right"),
    3: (
        *("top left", "top center", "top right"),
        *("middle left", "middle center", "middle right"),
        *("bottom left", "bottom center", "bottom right"),
    ),
}
# kind -> one of them, several of them
KIND_WORDS = {
    "animal": ("an animal", "animals"),
    "building": ("a building", "buildings"),
    "clock": ("a clock", "clocks"),
    "clothing": ("a piece of clothing", "pieces of clothing"),
    "face": ("a face", "faces"),
    "food or drink": ("something to eat or drink", "things to eat or drink"),
    "hand": ("a hand", "hands"),
    "heart": ("a heart", "hearts"),
    "musical instrument": ("a musical instrument", "musical instruments"),
    "person": ("a person", "persons"),
    "plant": ("a plant", "plants"),
    "sign": ("a sign", "signs"),
    "sport": ("a sport", "sports"),
    "tool": ("a tool", "tools"),
    "vehicle": ("a vehicle", "vehicles"),
    "weather": ("a weather symbol", "weather symbols"),
}
SIDES = ("left of", "right of", "above", "below")
# several wordings of each question, one of which is drawn
ENGLISH = {
    "name": ("What is this?", "What does the picture show?"),
    "kind": ("What kind of thing is this?", "Which category does the picture belong to?"),
    "colour": ("What is the main color?", "Which color does it mainly have?"),
    "yesno-name": ('Does this show "{name}"?', 'Is this "{name}"?'),
    "yesno-kind": ("Is this {kind}?", "Does the picture show {kind}?"),
    "yesno-colour": ("Is it mainly {colour}?", "Is the main color {colour}?"),
    "caption": ("Describe the picture.", "What do you see?"),
    "count": ("How many pictures are there?", "Count the pictures."),
    "count-kind": ("How many {kinds} are there?", "Count the {kinds}."),
    "count-name": ('How many times is "{name}" shown?', 'Count "{name}".'),
    "count-colour": ("How many pictures are mainly {colour}?", "Count the {colour} pictures."),
    "where-name": ('Where is "{name}"?', 'In which place is "{name}"?'),
    "where-kind": ("Where is {kind}?", "In which place is {kind}?"),
    "where-colour": ("Where is the {colour} picture?", "Which place is mainly {colour}?"),
    "at-name": ("What is at the {place}?", "Name the picture at the {place}."),
    "at-kind": ("What kind of thing is at the {place}?", "Which category is at the {place}?"),
    "at-colour": ("What is the main color at the {place}?", "Which color is at the {place}?"),
    "occupied": ("Is there a picture at the {place}?", "Is anything at the {place}?"),
    "exists-name": ('Is there "{name}"?', 'Do you see "{name}"?'),
    "exists-kind": ("Is there {kind}?", "Do you see {kind}?"),
    "relation": ('Is "{name}" {side} "{other}"?', 'Does "{name}" lie {side} "{other}"?'),
    "compare": ("Are there more {kinds} than {others}?", "Do the {kinds} outnumber the {others}?"),
    "scene-caption": ("Describe the scene.", "What is where?"),
}
# language -> what is this, does this show, yes, no
OTHER_LANGUAGES = {
    "de": ("Was ist das?", 'Zeigt das Bild "{name}"?', "ja", "nein"),
    "es": ("¿Qué es esto?", '¿Muestra la imagen "{name}"?', "sí", "no"),
    "fr": ("Qu'est-ce que c'est ?", 'L\'image montre-t-elle "{name}" ?', "oui", "non"),
    "it": ("Che cos'è?", 'L\'immagine mostra "{name}"?', "sì", "no"),
    "pt": ("O que é isto?", 'A imagem mostra "{name}"?', "sim", "não"),
}
