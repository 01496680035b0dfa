"""Answers that a student draws itself, as rows to be judged by a teacher: on-policy distillation.

Agarwal et al. (GKD, arXiv:2306.13649) train a language model on its own outputs under the teacher's distributions, with
any divergence; the gradient goes through the student's distributions at the drawn tokens, never through the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pocketvlm.students.vlm.model import Rows, Vlm, rows_of
from pocketvlm.students.vlm.tokenizer import EOS, PAD

Talks = Sequence[tuple[list[int], list[int]]]


@torch.no_grad()
def sampled_answers(
    model: Vlm, seen: Tensor, questions: Sequence[tuple[int, list[int]]], *, longest: int, temperature: float, seed: int
) -> list[list[int]]:
    """One drawn answer to each question, `<EOS>` included, or cut at `longest` tokens.

    Args:
        seen: [B, ...], what the model's `picture` takes. questions: (which of B, ids of the question).
        temperature: of the softmax that tokens are drawn from. seed: equal seeds give equal answers.
    """
    # drawn on the CPU, so that no device has numbers of its own
    generator, device = torch.Generator().manual_seed(seed), model.device
    owner = torch.tensor([number for number, _ in questions], device=device)
    asked = [ids for _, ids in questions]
    width = max(map(len, asked))
    ids = torch.tensor([one + [PAD] * (width - len(one)) for one in asked], device=device)
    length = torch.tensor([model.prefix + len(one) for one in asked], device=device)
    prefix = model.picture(seen)[owner]
    x = torch.cat([prefix, model.decoder.embed_tokens(ids).to(prefix.dtype)], dim=1)
    positions = torch.arange(x.shape[1], device=device).expand(len(x), -1)
    keys, values = (part.to(x.dtype) for part in model.decoder.empty_cache(len(x)))
    hidden, keys, values = model.decoder.step(x, positions, keys, values, model.prefix - 1)
    last = hidden[torch.arange(len(x), device=device), length - 1]
    said: list[Tensor] = []
    open_ = torch.ones(len(x), dtype=torch.bool, device=device)
    room = model.config.decoder.context_length - width - model.prefix
    for step in range(min(longest, room)):
        shares = (model.decoder.logits(last).float() / temperature).softmax(dim=-1)
        token = torch.multinomial(shares.cpu(), 1, generator=generator)[:, 0].to(device)
        said.append(torch.where(open_, token, PAD))
        open_ = open_ & (token != EOS)
        if not open_.any():
            break
        x = model.decoder.embed_tokens(said[-1])[:, None].to(x.dtype)
        hidden, keys, values = model.decoder.step(x, (length + step)[:, None], keys, values)
        last = hidden[:, 0]
    rows = torch.stack(said, dim=1).tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def sampled_rows(
    model: Vlm, seen: Tensor, talks: Sequence[Talks], *, temperature: float, seed: int, longest: int = 16
) -> Rows:
    """`rows_of` the questions of these talks with drawn answers in place of theirs."""
    questions = [(number, question) for number, found in enumerate(talks) for question, _ in found]
    was, vision = model.training, model.vision.training
    model.eval()
    drawn = iter(sampled_answers(model, seen, questions, longest=longest, temperature=temperature, seed=seed))
    model.train(was)
    # which may stand still while the rest trains
    model.vision.train(vision)
    made = [[(question, next(drawn)) for question, _ in found] for found in talks]
    room = model.config.decoder.context_length - model.prefix
    width = min(room, max(sum(len(q) + len(a) - 1 for q, a in row) for row in made))
    return rows_of(made, width)
