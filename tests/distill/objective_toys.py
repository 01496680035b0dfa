"""What tests of objectives start from: two models' outputs, a built objective, and arithmetic in plain loops."""

from __future__ import annotations

import math

import torch

from pocketvlm.distill.objectives import Objective, Outputs, Widths, build_objective

B, N, D, F, K = 6, 7, 5, 4, 3
TOP = 3
HAS_TEXT = [True, True, False, True, True, True]
LABEL = [2, -1, 0, 0, -1, 1]
GROUP = [3, 1, -1, 3, 2, 0]  # rows 0 and 3 share a caption


# ------------------------------------------------------------------------------------------------ inputs


def outputs(seed: int, *, dim: int = D, features: int = F, dtype: torch.dtype = torch.float64, grad: bool = False):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        value = torch.randn(*shape, generator=g, dtype=torch.float64) * 1.7 + 0.2
        return value.to(dtype).requires_grad_(grad)

    text = draw(B, dim)
    with torch.no_grad():
        text[3] = text[0]
    found = Outputs(
        image=draw(B, dim),
        text=text,
        has_text=torch.tensor(HAS_TEXT),
        logit_scale=torch.tensor(4.0 + seed, dtype=dtype, requires_grad=grad),
        logit_bias=torch.tensor(-0.5 * seed, dtype=dtype, requires_grad=grad),
        image_features=draw(B, features),
        text_features=draw(B, features),
        bank=draw(N, dim),
        group=torch.tensor(GROUP),
        taps={"tokens": draw(B, 9, features)},
        masked_image=draw(B, dim),
    )
    words = draw(B, L, features)
    with torch.no_grad():
        words[3] = words[0]
    found.taps["text.tokens"] = words
    found.taps["text.exit.1"] = early = draw(B, dim)
    with torch.no_grad():
        early[3] = early[0]
    found.masked_words, found.token_table = draw(B, 2, features), draw(V, E)
    found.masked_pieces = torch.tensor(PIECES)
    found.regions, found.region_targets = draw(B, 3, dim), draw(B, 3, dim)
    found.region_mask = torch.tensor([[place < count for place in range(3)] for count in CELLS])
    found.class_logits, found.taught_logits = draw(B, K), draw(B, K)
    found.label = torch.tensor(LABEL)
    with torch.no_grad():  # its own three largest of the seven texts, and the rest
        pictures, texts = (torch.nn.functional.normalize(part.double(), dim=1) for part in (found.image, found.bank))
        shares = ((4.0 + seed) * pictures @ texts.T).softmax(dim=1)
        found.top_ids = shares.argsort(dim=1, descending=True)[:, :TOP]
        kept = shares.gather(1, found.top_ids)
        found.top_logits = torch.cat([kept, 1 - kept.sum(dim=1, keepdim=True)], dim=1).log().to(dtype)
    found.top_logits.requires_grad_(grad)
    found.text_mask = torch.tensor([[place < length for place in range(L)] for length in LENGTHS])
    return found


L = 5
V, E = 11, 3
PIECES = [[2, 9], [4, -1], [-1, -1], [2, 9], [0, 7], [-1, -1]]  # masked pieces of each caption
CELLS = [3, 1, 2, 3, 2, 3]  # cells of each picture
LENGTHS = [4, 2, 0, 4, 5, 1]  # real tokens of each caption; row 2 has none
TAPS = {"tokens": F, "text.tokens": F, "text.exit.1": D}
WIDTHS = Widths(D, F, F, taps=TAPS, token_table=E, text_blocks=2)
OTHER = Widths(embedding=D + 2, image_features=F + 3, text_features=F + 3, taps={"tokens": F + 3})
SEED, STEP, PROGRESS = 5, 7, 0.5  # an objective that changes during training is looked at in the middle of it


def build(name: str, teacher: Widths = WIDTHS, **options) -> Objective:
    objective = build_objective(name, student=WIDTHS, teacher=teacher, seed=SEED, **options)
    objective.at(STEP, PROGRESS)
    return objective


def total(objective, student: Outputs, teacher: Outputs) -> torch.Tensor:
    given = teacher if objective.needs.targets else None
    return sum(objective(student=student, teacher=given).values())  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ arithmetic


def rows(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.detach().double().tolist()


def unit(v: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(x * x for x in v))
    return [x / length for x in v]


def cosine(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(unit(a), unit(b)))


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(v) for v in values]
    return [w / sum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))


def huber(x: float, beta: float = 1.0) -> float:
    return x * x / (2 * beta) if abs(x) < beta else abs(x) - beta / 2


def captioned(o: Outputs) -> tuple[list, list, list]:
    keep = [i for i in range(B) if HAS_TEXT[i]]
    image, text = rows(o.image), rows(o.text)
    return [image[i] for i in keep], [text[i] for i in keep], [GROUP[i] for i in keep]


def project(projector, vectors: list[list[float]]) -> list[list[float]]:
    if not list(projector.parameters()):
        return vectors
    layers = [(rows(w), b.detach().double().tolist()) for w, b in zip(projector.weights, projector.biases)]
    for depth, (weight, bias) in enumerate(layers):
        if depth:
            vectors = [[x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in v] for v in vectors]
        vectors = [[math.fsum(w * x for w, x in zip(row, v)) + b for row, b in zip(weight, bias)] for v in vectors]
    return vectors


def contrast(queries, keys, groups, scale: float, duplicates: str) -> float:
    """Mean over queries of the cross-entropy with their own key."""
    losses = []
    for i, q in enumerate(queries):
        allowed = [j for j in range(len(keys)) if j == i or duplicates != "ignore" or groups[j] != groups[i]]
        p = dict(zip(allowed, softmax([scale * cosine(q, keys[j]) for j in allowed])))
        right = [j for j in allowed if groups[j] == groups[i]] if duplicates == "positives" else [i]
        losses.append(-sum(math.log(p[j]) for j in right) / len(right))
    return sum(losses) / len(losses)
