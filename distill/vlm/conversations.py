"""Users' pictures with conversations as training batches: the same rows and the same loop as for scenes.

    samples = read_conversations("talks.jsonl", report)                      # data.conversations, LLaVA's layout
    stream = ConversationStream(samples, model, report, batch=16, seed=0)
    train_vlm(model, batches(stream, 0, device), pixels_of, VlmTraining(steps=1000))

Of a conversation of several turns every answer is learnt, each after all that was said before: `<USER>` question
`<ASSISTANT>` answer `<EOS>` `<USER>` and so on, in one row. The marker of the picture was taken out when the file was
read; the picture stands before the text. A system message is put before the first question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Sample, Turn
from pocketvlm.data.scenes import scene_rng
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.students.vlm.model import MARKER, Rows, Vlm
from pocketvlm.students.vlm.tokenizer import PAD, VlmTokenizer

# a question and its answer, as ids
Talk = list[tuple[list[int], list[int]]]


def pixels_of(drawn: Tensor) -> Tensor:
    """What a batch of `ConversationStream` shows: its pixels, as they are."""
    return drawn


def vlm_image_spec(size: int) -> ImageSpec:
    """How pictures on disk become a generative student's: whole, centred on white, `size` pixels a side."""
    return ImageSpec(size=size, resize="pad")


def talk_of(turns: Sequence[Turn], tokenizer: VlmTokenizer) -> Talk:
    """Ids of the questions and answers of a conversation, a system message before the first question.

    Raises:
        UsageError: turns that are not user and assistant by turns after an optional system message, an empty text, or
        a picture's marker in one.
    """
    first = 1 if turns and turns[0].role == "system" else 0
    texts = [turn.text for turn in turns[first:]]
    roles = [turn.role for turn in turns[first:]]
    if not texts or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UsageError(
            f"a conversation has the roles {[turn.role for turn in turns]}, and questions and answers by turns are "
            "expected; answers would be learnt as questions, so give user and assistant in turn"
        )
    if any(not text.strip() or MARKER in text for text in (*texts, *(turn.text for turn in turns[:first]))):
        raise UsageError(
            f"a conversation has an empty text or one with {MARKER} in it; take the marker out (read_conversations "
            "does), since the picture stands before the text"
        )
    if first:
        texts[0] = f"{turns[0].text}\n{texts[0]}"
    return [
        (tokenizer.question(question), tokenizer.answer(answer)) for question, answer in zip(texts[::2], texts[1::2])
    ]


def talk_rows(talks: Sequence[Talk], length: int) -> Rows:
    """One conversation a row, every turn seeing all before it; see `students.vlm.model.Rows`.

    length: T, of every row.

    Raises:
        UsageError: a conversation longer than a row (`fitting` cuts it).
    """
    ids, turns, positions = ([[filler] * length for _ in talks] for filler in (PAD, -1, 0))
    places: list[int] = []
    targets: list[int] = []
    for row, talk in enumerate(talks):
        said: list[int] = []
        for question, answer in talk:
            said += question
            first = row * length + len(said) - 1
            places += range(first, first + len(answer))
            targets += answer
            said += answer
        said = said[:-1]  # the last token is only ever predicted
        if len(said) > length:
            raise UsageError(
                f"a conversation has {len(said)} tokens but a row holds {length}; its end would be lost, so raise the "
                "length of rows or shorten it"
            )
        ids[row][: len(said)] = said
        turns[row][: len(said)] = [0] * len(said)
        positions[row][: len(said)] = range(len(said))
    return Rows(*(torch.tensor(values) for values in (ids, turns, positions, places, targets)))


def fitting(talk: Talk, length: int) -> Talk:
    """The first turns that fit into a row together; none where the first is too long."""
    used = 0
    for count, (question, answer) in enumerate(talk):
        used += len(question) + len(answer)
        if used - 1 > length:
            return talk[:count]
    return talk


class ConversationStream(IterableDataset[tuple[Tensor, Rows]]):
    """Batches without end, every sample once before any comes again, in an order that the seed decides.

    The same whatever the number of workers (`batches.batches`). Texts are cut into tokens once, here; pictures are read
    from disk when they are shown.

    Args:
        samples: with conversations, such as of `data.conversations.read_conversations` or `recorded_answers`.
        model: whose tokenizer, size of pictures and context they are for.
        report: counts "too-long-text" (the first turn does not fit; the sample is left out) and "turns-cut" (later
            ones do not; a note, never refused).
        batch: pictures to a batch; a last smaller one of a round is filled from the next. length: tokens of a row at
            most; None takes what the decoder holds beside a picture.

    Raises:
        UsageError: no sample is left, a conversation as `talk_of` refuses, or rows longer than the context.
        BadSampleError: a text that is too long, where the report refuses.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        model: Vlm,
        report: BadSampleReport,
        *,
        batch: int,
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        # the batch that it begins with, of a run that goes on
        self.first = 0
        room = model.config.decoder.context_length - model.text_start
        self.length = room if length is None else length
        if batch < 1 or not 1 <= self.length <= room:
            raise UsageError(
                f"batches of {batch} with rows of {self.length} tokens were asked for, but beside the picture the "
                f"decoder has places for {room}; give 1 or more pictures and no longer rows"
            )
        self.spec, self.batch, self.seed = vlm_image_spec(model.config.vision.size), batch, seed
        self.samples: list[Sample] = []
        self.talks: list[Talk] = []
        for sample in samples:
            whole = talk_of(sample.conversation, model.tokenizer)
            talk = fitting(whole, self.length)
            if not talk:
                tokens = len(whole[0][0]) + len(whole[0][1]) - 1
                report.add(
                    "too-long-text", sample.uid, f"its first turn has {tokens} tokens but a row holds {self.length}"
                )
                continue
            if len(talk) < len(whole):
                report.note("turns-cut", sample.uid)
            self.samples.append(sample)
            self.talks.append(talk)
        report.refuse_empty("conversations", len(self.samples))

    def __len__(self) -> int:
        """Samples of one round."""
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[Tensor, Rows]]:
        worker = get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        number += self.first
        while True:
            yield self.make(number)
            number += step

    def make(self, number: int) -> tuple[Tensor, Rows]:
        """Batch `number`: pixels uint8 [B, S, S, 3] and rows as long as its longest conversation.

        Raises:
            BadSampleError: a picture that cannot be read any more; its message names the sample.
        """
        chosen = self.chosen(number)
        pixels = np.stack([self._picture(self.samples[index]) for index in chosen])
        talks = [self.talks[index] for index in chosen]
        longest = max(sum(len(q) + len(a) for q, a in talk) - 1 for talk in talks)
        return torch.from_numpy(pixels), talk_rows(talks, longest)

    def chosen(self, number: int) -> list[int]:
        """Places in `samples` of what batch `number` shows, in its order."""
        return [self._at(number * self.batch + place) for place in range(self.batch)]

    def _picture(self, sample: Sample) -> NDArray[np.uint8]:
        try:
            return load_image(sample.image.read(), self.spec)
        except BadSampleError as error:
            raise BadSampleError(f"{sample.uid}: {error}", reason=error.reason) from error

    def _at(self, place: int) -> int:
        """The sample at a place of the endless order."""
        round_, within = divmod(place, len(self.samples))
        return self._order(round_)[within]

    def _order(self, round_: int) -> list[int]:
        known: tuple[int, list[int]] | None = getattr(self, "_known", None)
        if known is None or known[0] != round_:
            order = list(range(len(self.samples)))
            scene_rng(self.seed, round_, "conversations").shuffle(order)
            self._known = known = (round_, order)
        return known[1]
