"""A teacher's answers to an evaluation, kept on disk: every check and every run that asks the same has them at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.distill.encoders import TeacherEncoder
from pocketvlm.distill.evaluate import Embedded, Questions, embed_questions
from pocketvlm.distill.progress import Reporter
from pocketvlm.edge.errors import BadSampleError, counted
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_format import digest_names
from pocketvlm.teachers.ensemble import Ensemble


def teacher_answers(
    teacher: Any,
    questions: Questions,
    root: Path,
    *,
    batch_size: int,
    say: Callable[[str], None] | None = None,
) -> Embedded:
    """The teacher's embeddings of the evaluation's pictures and texts.

    The file's name is a digest of the teacher's fingerprint, the bytes of the pictures, their uids and the texts.
    root: folder of the files. say: told when the teacher has to be asked.
    """
    pictures = hashlib.sha256()
    for sample in questions.samples:
        try:
            pictures.update(sample.image.read())
        except BadSampleError:
            continue
    key = digest_names(
        [teacher.fingerprint, pictures.hexdigest(), *(s.uid for s in questions.samples), "|", *questions.texts]
    )
    path = root / f"{slug(teacher.name)}-eval-{key[:16]}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as found:
            bad = [(str(uid), str(reason)) for uid, reason in found["bad"]]
            uids = [str(uid) for uid in found["uids"]]
            images, texts = found["images"], found["texts"]
            return Embedded(teacher.name, teacher.space_id, uids, images, texts, bad, float(teacher.logit_scale))
    if say is not None:
        asked = f"{counted(len(questions.samples), 'picture')} and {counted(len(questions.texts), 'text')}"
        say(f"teacher: answering the evaluation's {asked}")
    answers = embed_questions(TeacherEncoder(teacher), questions, name=teacher.name, batch_size=batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        uids=np.array(answers.uids, dtype=np.str_),
        images=answers.images,
        texts=answers.texts,
        bad=np.array(answers.bad, dtype=np.str_).reshape(-1, 2),
    )
    temporary.replace(path)
    return answers


def joined_answers(found: Sequence[Embedded | None], teacher: Ensemble) -> Embedded | None:
    """The answers of several teachers as one's, whose cosine is the mean of theirs; None where one has none.

    Only pictures that all of them answered for are scored.
    """
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    if len(known) == 1:
        return known[0]
    rows = [{uid: row for row, uid in enumerate(one.uids)} for one in known]
    uids = [uid for uid in known[0].uids if all(uid in places for places in rows)]
    images = [one.images[[places[uid] for uid in uids]] for one, places in zip(known, rows)]
    scales = [teacher.members[place].logit_scale for place in teacher.joint]
    return Embedded(
        " + ".join(one.name for one in known),
        teacher.space_id,
        uids,
        np.concatenate(images, axis=1) / len(known) ** 0.5,
        np.concatenate([one.texts for one in known], axis=1) / len(known) ** 0.5,
        known[0].bad,
        sum(scales) / len(scales),
    )


def slug(name: str) -> str:
    """A teacher's name as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-." else "-" for c in name)[:48].strip("-.") or "teacher"


def answers_on_disk(cache: TeacherCache, questions: Questions, report: Reporter) -> Embedded | None:
    """Precomputed embeddings of the evaluation data, where they cover it."""
    uids = [sample.uid for sample in questions.samples]
    known = set(cache.texts)
    if not all(uid in cache for uid in uids) or not known.issuperset(questions.texts):
        report.line("teacher: the embeddings on disk do not cover the evaluation data, so it is scored without them")
        return None
    info = cache.info
    images, texts = cache.image(uids).numpy(), cache.text(questions.texts).numpy()
    return Embedded(info.name, info.space_id, uids, images, texts, logit_scale=info.logit_scale)
