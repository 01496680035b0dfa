"""Batches and losses for a student and a generative teacher with different tokenizers, for `train.train_vlm`.

    lessons = read_lessons(teacher, pixels, pairs)                  # once; later only its head is needed
    recalibrator = Recalibrator(model.config.decoder, teacher.width)
    train_vlm(model, lesson_batches(lessons, model, batch=16), lesson_pixels, training,
              loss_of=recalibrated(recalibrator, teacher.head), beside=recalibrator)

Every pair is a row of its own, since the teacher read it alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.data.scenes import scene_rng
from pocketvlm.distill.vlm.aligned import Spans, aligned_divergence, shared_spans, token_log_probabilities
from pocketvlm.distill.vlm.conversations import ConversationStream
from pocketvlm.distill.vlm.genrecal import Head, Recalibrator, recalibration
from pocketvlm.distill.vlm.teachers import answer_ends
from pocketvlm.distill.vlm.train import Loss
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.model import Rows, Vlm, rows_of
from pocketvlm.teachers.vlm.base import Pair, Scored, VlmTeacher


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A picture as the student takes it, uint8 [S, S, 3], with a question, its answer and the teacher's reading."""

    pixels: Tensor
    pair: Pair
    scored: Scored


class Lessons(NamedTuple):
    """A batch. pixels: [B, …] of the student. scored: of the teacher; spans: of the answers in both tokenizers."""

    pixels: Tensor
    scored: tuple[Scored, ...]
    spans: Spans

    @property
    def logs(self) -> Tensor:
        """[T], log-probabilities of the teacher's tokens."""
        return torch.cat([token_log_probabilities(one.logits, one.ids) for one in self.scored])


def read_lessons(
    teacher: VlmTeacher, pixels: Tensor, pairs: Sequence[Pair], *, shown: Tensor | None = None, half: bool = True
) -> list[Lesson]:
    """The teacher reads every pair once.

    Args:
        pixels: uint8 [N, H, W, 3], as the teacher takes them. shown: the same pictures as the student takes them, None
            where that is the same. half: keep logits and hidden states in float16, on the CPU.

    Raises:
        UsageError: as `VlmTeacher.read`, or another number of pictures for the student.
    """
    own = pixels if shown is None else shown
    if len(own) != len(pixels):
        raise UsageError(
            f"{len(own)} pictures for the student were given with {len(pixels)} for the teacher; they would learn of "
            "different ones, so give the same pictures in both sizes"
        )
    found = []
    for row, pair, scored in zip(own, pairs, teacher.read(pixels, pairs)):
        if half:
            scored = dataclasses.replace(
                scored,
                ids=scored.ids.cpu(),
                logits=scored.logits.half().cpu(),
                hidden=scored.hidden.half().cpu(),
                visual=scored.visual.cpu(),
            )
        found.append(Lesson(row, pair, scored))
    return found


def lesson_batches(
    lessons: Sequence[Lesson], model: Vlm, *, batch: int, seed: int = 0, device: str | torch.device = "cpu"
) -> Iterator[tuple[Lessons, Rows]]:
    """Batches without end, every lesson once before any comes again, in an order that the seed decides.

    Raises:
        UsageError: no lessons, or fewer than one to a batch.
    """
    if not lessons or batch < 1:
        raise UsageError(
            f"batches of {batch} were asked of {len(lessons)} lessons, so there is nothing to learn; give one or more "
            "of both"
        )
    tokenizer, where = model.tokenizer, torch.device(device)
    talks = [(tokenizer.question(lesson.pair[0]), tokenizer.answer(lesson.pair[1])) for lesson in lessons]
    ends = [answer_ends(model, lesson.pair[1]) for lesson in lessons]
    chosen: list[int] = []
    round_ = 0
    while True:
        while len(chosen) < batch:
            order = list(range(len(lessons)))
            scene_rng(seed, round_, "lessons").shuffle(order)
            chosen += order
            round_ += 1
        part, chosen = chosen[:batch], chosen[batch:]
        rows = rows_of([[talks[i]] for i in part], max(len(talks[i][0]) + len(talks[i][1]) - 1 for i in part))
        scored = tuple(_to(lessons[i].scored, where) for i in part)
        spans = shared_spans([ends[i] for i in part], [one.ends for one in scored]).to(where)
        yield Lessons(torch.stack([lessons[i].pixels for i in part]).to(where), scored, spans), rows.to(where)


def lesson_pixels(drawn: Lessons | HeardBatch) -> Tensor:
    """What a batch shows."""
    return drawn.pixels


def aligned(weight: float = 1.0) -> Loss:
    """Next-token loss + `weight` x `aligned.aligned_divergence`, for `train_vlm`."""

    def loss(model: Vlm, drawn: Lessons | HeardBatch, pixels: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        logits = model(pixels, rows)
        own = token_log_probabilities(logits, rows.targets)
        return -own.mean() + weight * aligned_divergence(student=own, teacher=drawn.logs, spans=drawn.spans), logits

    return loss


def recalibrated(recalibrator: Recalibrator, head: Head, *, weight: float = 1.0, regularise: bool = True) -> Loss:
    """Next-token loss + `weight` x the terms of `genrecal.recalibration`, for `train_vlm`.

    The recalibrator belongs into `train_vlm`'s `beside`. regularise: with the paper's regulariser, which its second
    stage is not said to have.
    """

    def loss(model: Vlm, drawn: Lessons, pixels: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        hidden = model.hidden(pixels, rows)
        text = hidden[:, -rows.ids.shape[1] :]
        logits = model.decoder.logits(text.flatten(0, 1)[rows.places])
        terms = recalibration(
            recalibrator,
            student=question_states(hidden, rows),
            teacher=drawn.scored,
            head=head,
            regularise=regularise,
        )
        return F.cross_entropy(logits.float(), rows.targets) + weight * sum(terms.values()), logits

    return loss


def question_states(hidden: Tensor, rows: Rows) -> list[Tensor]:
    """Of each row the hidden states of picture and question but the last place, which predicts the answer: [Q_i, W].

    Args:
        hidden: [B, L, W] of `Vlm.hidden`, the text last; rows: one conversation of one turn in each.

    Raises:
        UsageError: rows with several conversations.
    """
    if bool((rows.turns > 0).any()):
        raise UsageError(
            "rows with several conversations were given where a teacher read each pair alone; questions would be "
            "mixed, so pack one pair a row"
        )
    length = rows.ids.shape[1]
    owner, place = rows.places // length, rows.places % length
    first = torch.full((len(hidden),), length, device=hidden.device).scatter_reduce(0, owner, place, "amin")
    before = hidden.shape[1] - length
    return [row[: before + int(end)] for row, end in zip(hidden, first.tolist())]


class Heard(NamedTuple):
    """An answer as a teacher reads it. ends: as `Scored.ends`; logs: float32 [A], log-probability of each token."""

    ends: tuple[int, ...]
    logs: Tensor


class HeardBatch(NamedTuple):
    """pixels: uint8 [B, S, S, 3]. logs: [T], of the teacher's tokens; spans: of the answers in both tokenizers."""

    pixels: Tensor
    logs: Tensor
    spans: Spans


def heard_answers(teacher: VlmTeacher, pixels: Tensor, pairs: Sequence[Pair]) -> list[Heard]:
    """What `aligned` needs of a teacher's reading: a number a token, where a `Lesson` keeps all its logits.

    Raises:
        UsageError: as `VlmTeacher.read`.
    """
    return [
        Heard(scored.ends, token_log_probabilities(scored.logits, scored.ids).detach().float().cpu())
        for scored in teacher.read(pixels, pairs)
    ]


def heard_batches(
    stream: ConversationStream, model: Vlm, heard: Mapping[str, Heard], device: torch.device
) -> Iterator[tuple[HeardBatch, Rows]]:
    """The stream's batches, of conversations of one turn, with what the teacher makes of their answers.

    heard: by uid of the stream's samples.
    """
    own = [answer_ends(model, sample.conversation[-1].text) for sample in stream.samples]
    for number in itertools.count(stream.first):
        chosen = stream.chosen(number)
        pixels, rows = stream.make(number)
        theirs = [heard[stream.samples[index].uid] for index in chosen]
        spans = shared_spans([own[index] for index in chosen], [one.ends for one in theirs])
        logs = torch.cat([one.logs for one in theirs])
        yield HeardBatch(pixels.to(device), logs.to(device), spans.to(device)), rows.to(device)


def _to(scored: Scored, device: torch.device) -> Scored:
    # half precision is for keeping only
    return dataclasses.replace(
        scored,
        ids=scored.ids.to(device),
        logits=scored.logits.to(device).float(),
        hidden=scored.hidden.to(device).float(),
        visual=scored.visual.to(device),
    )
