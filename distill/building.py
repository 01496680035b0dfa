"""The objectives of a run, built for its student and teachers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pocketvlm.distill.objectives import Widths, build_objective
from pocketvlm.distill.prepare import Prepared
from pocketvlm.distill.shares import Share, share_of
from pocketvlm.distill.taps import asked_taps, gray, tap_widths


def build_shares(prepared: Prepared) -> list[Share | None]:
    """What each of the recipe's objectives sees of the teachers; None where there is nothing for its batch."""
    ensemble, caches = prepared.teacher, {"pairs": prepared.images, "texts": prepared.words}
    return [
        share_of(ensemble, prepared.images, prepared.words, spec.batch, spec.teacher)
        if ensemble is not None and caches[spec.batch] is not None
        else None
        for spec in prepared.recipe.objectives
    ]


def build_objectives(prepared: Prepared, shares: Sequence[Share | None]) -> nn.ModuleList:
    """The recipe's objectives in order, projectors included, seeded by the run's seed and their place.

    shares: see `build_shares`.
    """
    student, (pictures, texts) = prepared.student, _feature_widths(prepared)
    taps = tap_widths(student, asked_taps(prepared.recipe), prepared.recipe.train.cut_after_block)
    built = []
    for place, spec in enumerate(prepared.recipe.objectives):
        teacher = None
        if spec.batch == "pairs":
            tower = student.text_tower
            table, blocks = tower.token.embedding_dim, len(tower.blocks)
            own = Widths(student.embed_dim, pictures, texts, taps, token_table=table, text_blocks=blocks)
        else:
            # texts take the place of pictures in the text-only batch
            own = Widths(student.embed_dim, texts)
        if (share := shares[place]) is not None:
            teacher = share.widths()
        seed = prepared.recipe.train.seed + 1000 * place
        built.append(build_objective(spec.name, student=own, teacher=teacher, seed=seed, **spec.options))
    return nn.ModuleList(built)


def _feature_widths(prepared: Prepared) -> tuple[int, int]:
    """(image, text) widths of the student's pooled features, asked of the student itself."""
    student = prepared.student
    training = student.training
    student.eval()
    with torch.no_grad():
        device = student.log_scale.device
        pictures = student.encode_image(gray(student))
        texts = student.encode_text(torch.ones(1, student.text_spec.context_length, dtype=torch.int32, device=device))
    student.train(training)
    return pictures.features.shape[-1], texts.features.shape[-1]
