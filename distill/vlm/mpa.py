"""Model Parity Aligner: learn from exactly those questions that the teacher answers and the student does not.

Penamakuri et al. (arXiv:2509.16633): a teacher writes a question with an answer for each unlabelled picture, both
models are then asked, and a sample is kept iff the written answer is a substring of the teacher's prediction and not of
the student's, after both are evened out. The student is fine-tuned on what is kept with plain cross-entropy.

Our construction: the built-in teacher only answers. Questions are therefore drawn by the grammar of scenes from facts
that the teacher gave about single pictures (`pseudo.pseudo_labelled`), the written answer follows from those facts, and
the teacher's prediction is what it says about the whole scene.
"""

from __future__ import annotations

from collections.abc import Sequence

from pocketvlm.data.exact_match import normalise_answer
from pocketvlm.distill.vlm.answer_cache import KeptAnswers
from pocketvlm.distill.vlm.evaluate import Asked
from pocketvlm.distill.vlm.scene_list import SceneList
from pocketvlm.edge.errors import UsageError


def holds(prediction: str, answer: str) -> bool:
    """Whether the answer is a substring of the prediction after `normalise_answer`; an answer of nothing never is."""
    wanted = normalise_answer(answer)
    return bool(wanted) and wanted in normalise_answer(prediction)


def is_parity_gap(answer: str, teacher: str, student: str) -> bool:
    """Whether the teacher agrees with the written answer and the student does not."""
    return holds(teacher, answer) and bool(normalise_answer(answer)) and not holds(student, answer)


def parity_gaps(scenes: SceneList, teacher: Sequence[Asked], student: Sequence[Asked]) -> tuple[SceneList, list[int]]:
    """The questions of the list that are parity gaps, with the written answers, and the numbers of their scenes.

    Args:
        teacher, student: `list_answers` of this list by both models.

    Raises:
        UsageError: answers of another list, or no gap at all.
    """
    places = [(index, place) for index, entry in enumerate(scenes.entries) for place in range(len(entry.questions))]
    same = all(
        len(said) == len(places)
        and all(
            row.scene == index and row.question == scenes.entries[index].questions[place]
            for row, (index, place) in zip(said, places)
        )
        for said in (teacher, student)
    )
    if not same:
        raise UsageError(
            f"{len(teacher)} answers of the teacher and {len(student)} of the student were given for a list of "
            f"{len(places)} questions, or for others; gaps could not be told, so ask both about this very list"
        )
    gaps = {
        pair
        for pair, ours, theirs in zip(places, student, teacher)
        if is_parity_gap(theirs.question.answer, theirs.answer, ours.answer)
    }
    if not gaps:
        raise UsageError(
            "the student answers everything that the teacher is sure of, so there is no parity gap to learn from; draw "
            "more or harder questions, or stop here"
        )
    return scenes.only(lambda index, place: (index, place) in gaps)


def kept_verdicts(scenes: SceneList, answers: KeptAnswers) -> list[Asked]:
    """In place of `list_answers` of a teacher of which only its `kept_answers` of this list are there.

    The written answer where its largest share is that answer's token at every place, given those before, and no answer
    elsewhere: what the teacher would say greedily, token for token, so that spellings which count as equal do not.
    """
    found, at = [], 0
    first = answers.tensors["ids"][:, 0].tolist()
    for index, entry in enumerate(scenes.entries):
        for question, (_, tokens) in zip(entry.questions, entry.talks):
            agrees = first[at : at + len(tokens)] == list(tokens)
            found.append(Asked(index, question, question.answer if agrees else ""))
            at += len(tokens)
    return found
