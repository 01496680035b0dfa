"""Learning from a teacher with another tokenizer, GenRecal-style: a recalibrator between the two hidden spaces.

GenRecal (arXiv:2506.15681 v4). Both models read the same question and answer, each in its own tokens. The recalibrator
R is given the student's hidden states of picture and question and the teacher's of the answer, and has to give hidden
states from which the teacher's own frozen head predicts the answer:

    r = R([z_student(question), z_teacher(answer)])
    L_ar = CE(head(r_answer), answer)             L_kl = KL(head(z_teacher(answer)) || head(r_answer))

R: a linear map from the teacher's width to the student's, for the teacher's part alone; two blocks of the student's own
kind, causal, with rotary positions counted anew over the joined sequence; a linear map back; a layer norm. The paper's
regulariser is the same two terms with the teacher's question in the place of the student's, through the first map.
All terms have weight 1. Losses are over the teacher's tokens alone, so nothing is aligned.

Ours: means over tokens; the hidden states are those behind the models' last norms, and the "answer" are the places that
predict its tokens, the last of the question among them; both sides' question includes the picture. The paper trains
R alone first, then R and the student's body, then the student alone; which of these a run does is the caller's choice
(`regularise`, and what its optimizer is given). What reaches the student are the gradients of its question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.distill.vlm.losses import token_divergence
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.build import seeded
from pocketvlm.students.vlm.config import DecoderConfig
from pocketvlm.students.vlm.decoder import Block
from pocketvlm.teachers.vlm.base import Scored

Head = Callable[[Tensor], Tensor]


class Recalibrator(nn.Module):
    """Hidden states of a student's question and a teacher's answer to hidden states in the teacher's space.

    Args:
        student: the decoder whose kind of block it has. width: of the teacher's hidden states. blocks: the paper's 2.
        length: of the longest joined sequence. seed: equal seeds give equal weights.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, student: DecoderConfig, width: int, *, blocks: int = 2, length: int = 1024, seed: int = 0
    ) -> None:
        super().__init__()
        with seeded(seed, "recalibrator"):
            self.before = nn.Linear(width, student.width)
            self.blocks = nn.ModuleList(Block(student) for _ in range(blocks))
            self.after = nn.Linear(student.width, width)
        self.norm = nn.LayerNorm(width)
        half = student.width // student.heads // 2
        frequency = student.rope_theta ** -(torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    def forward(
        self, questions: Sequence[Tensor], answers: Sequence[Tensor], *, projected: bool = False
    ) -> list[Tensor]:
        """Of each pair the answer's part, [A_i, width].

        Args:
            questions: [Q_i, student's width], or with `projected` [Q_i, width], the teacher's, through the first map.
            answers: [A_i, width] of the teacher.

        Raises:
            UsageError: another number of questions than answers, or one longer with its answer than `length`.
        """
        if len(questions) != len(answers) or not answers:
            raise UsageError(
                f"{len(questions)} questions were given with {len(answers)} answers; sequences would mix pictures, so "
                "give both of the same pairs"
            )
        joined = [
            torch.cat([self.before(question) if projected else question, self.before(answer)])
            for question, answer in zip(questions, answers)
        ]
        longest = max(map(len, joined))
        if longest > len(self.cos):
            raise UsageError(
                f"a question with its answer has {longest} tokens but the recalibrator has {len(self.cos)} positions; "
                "later ones would have none, so make it with a greater length"
            )
        # padding lies behind, where a causal block never looks
        x = nn.utils.rnn.pad_sequence(joined, batch_first=True)
        visible = torch.ones(longest, longest, dtype=torch.bool, device=x.device).tril()[None, None]
        cos, sin = self.cos[None, None, :longest], self.sin[None, None, :longest]
        for block in self.blocks:
            x = block(x, cos, sin, visible)
        made = self.norm(self.after(x))
        return [
            row[len(question) : len(question) + len(answer)] for row, question, answer in zip(made, questions, answers)
        ]


def recalibration(
    recalibrator: Recalibrator,
    *,
    student: Sequence[Tensor],
    teacher: Sequence[Scored],
    head: Head,
    regularise: bool = True,
) -> dict[str, Tensor]:
    """Named scalars, in nats; the loss is their sum: "answer" (L_ar) and "divergence" (L_kl), each a mean over all
    teacher answer tokens, and with `regularise` the same of the teacher's own question, "own_answer" and
    "own_divergence".

    The teacher never receives a gradient; the recalibrator and, through its question, the student do.

    Args:
        student: hidden states [Q_i, W] of picture and question, without the place that predicts the answer's first
            token. teacher: what it reads of the same pairs. head: the teacher's, `VlmTeacher.head`.

    Raises:
        UsageError: as `Recalibrator.forward`.
    """
    answers = [pair.answer_hidden.detach() for pair in teacher]
    ids = torch.cat([pair.ids for pair in teacher])
    wanted = torch.cat([pair.logits for pair in teacher])

    def terms(made: list[Tensor], name: str) -> dict[str, Tensor]:
        logits = head(torch.cat(made))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        divergence = token_divergence(student=wide, teacher=wanted, direction="forward")
        return {f"{name}answer": F.cross_entropy(wide, ids), f"{name}divergence": divergence}

    found = terms(recalibrator(student, answers), "")
    if regularise:
        own = [pair.question_hidden.detach() for pair in teacher]
        found |= terms(recalibrator(own, answers, projected=True), "own_")
    return found
