"""Oracles of the image-text objectives: one pair of rows at a time, in plain floats."""

from __future__ import annotations

import hashlib
import math

import torch
from objective_toys import HAS_TEXT, SEED, STEP, B, captioned, contrast, cosine, kl, project, rows, softmax, unit


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b))


def blended(weights: list[float], vectors: list[list[float]]) -> list[float]:
    return [math.fsum(w * v[k] for w, v in zip(weights, vectors)) for k in range(len(vectors[0]))]


def chances(scores: dict[int, float], count: int) -> list[float]:
    """Softmax over the columns that take part, 0 for the others."""
    found = dict(zip(scores, softmax(list(scores.values()))))
    return [found.get(j, 0.0) for j in range(count)]


def columns(i: int, groups: list[int], duplicates: str) -> tuple[list[int], list[int]]:
    """(columns that take part, right ones among them) for row i."""
    twins = [j for j in range(len(groups)) if groups[j] == groups[i]]
    if duplicates == "negatives":
        return list(range(len(groups))), [i]
    if duplicates == "positives":
        return list(range(len(groups))), twins
    return [j for j in range(len(groups)) if j == i or j not in twins], [i]


def both_ways(o, s, one):
    """one(queries, keys, groups) of pictures over captions, and of captions over pictures."""
    image, text, groups = captioned(s)
    return one(image, text, groups), one(text, image, groups)


def siglip_oracle(o, s, t):
    image, text, groups = captioned(s)
    bias = float(s.logit_bias.detach()) if o.bias is None else float(o.bias.detach())
    value = 0.0
    for i, v in enumerate(image):
        allowed, right = columns(i, groups, o.duplicates)
        for j in allowed:
            chance = 1 / (1 + math.exp(-(float(s.logit_scale) * cosine(v, text[j]) + bias)))
            value -= math.log(chance if j in right else 1 - chance)
    return value / len(image)


def multi_positive_oracle(o, s, t):
    scale = 1 / o.temperature if o.temperature else float(s.logit_scale)

    def one(queries, keys, groups):
        value = 0.0
        for i, q in enumerate(queries):
            twins = [j for j in range(len(keys)) if groups[j] == groups[i]]
            truth = [o.epsilon + (1 / len(twins) if j in twins else 0.0) for j in range(len(keys))]
            value += kl(softmax([scale * cosine(q, k) for k in keys]), truth) / len(queries)
        return value

    return sum(both_ways(o, s, one))


def cwcl_oracle(o, s, t):
    image, text, groups = captioned(s)
    trusted, others, anchors = (image, text, captioned(t)[0]) if o.side == "image" else (text, image, captioned(t)[1])
    value = contrast(others, trusted, groups, float(s.logit_scale), o.duplicates)
    for i, query in enumerate(trusted):
        weights = [0.5 + 0.5 * cosine(anchors[i], anchor) for anchor in anchors]
        p = softmax([float(s.logit_scale) * cosine(query, key) for key in others])
        value -= math.fsum(w * math.log(x) for w, x in zip(weights, p)) / sum(weights) / len(trusted)
    return value


def soft_negatives_oracle(o, s, t):
    e = o.softness * o.progress

    def one(queries, keys, groups):
        value = 0.0
        for i, q in enumerate(queries):
            allowed, right = columns(i, groups, o.duplicates)
            scores = {j: float(s.logit_scale) * cosine(q, keys[j]) for j in allowed}
            p = chances(scores, len(keys))
            w = chances({j: score for j, score in scores.items() if j not in right}, len(keys))
            for j in allowed:
                label = (1 - e) / len(right) if j in right else e * w[j]
                value -= label * math.log(p[j]) / len(queries)
        return value

    return sum(both_ways(o, s, one)) / 2


def hycd_oracle(o, s, t):
    def score(outputs, a, b):
        if not o.normalize:
            return dot(a, b) / o.temperature
        return float(outputs.logit_scale) * cosine(a, b) / o.temperature

    def one(queries, keys, their_queries, their_keys, groups):
        value = 0.0
        for i, q in enumerate(queries):
            allowed, right = columns(i, groups, o.duplicates)
            p = chances({j: score(s, q, keys[j]) for j in allowed}, len(keys))
            theirs = chances({j: score(t, their_queries[i], their_keys[j]) for j in allowed}, len(keys))
            for j in allowed:
                target = o.blend * (1 / len(right) if j in right else 0.0) + (1 - o.blend) * theirs[j]
                if target:
                    value += target * math.log(target / p[j]) / len(queries)
        return value

    image, text, groups = captioned(s)
    their_image, their_text, _ = captioned(t)
    both = one(image, text, their_image, their_text, groups) + one(text, image, their_text, their_image, groups)
    return o.temperature**2 * both / 2


def rafa_oracle(o, s, t):
    width = s.image.shape[1]
    stream = int.from_bytes(hashlib.sha256(f"rafa/{SEED}/{STEP}".encode()).digest()[:7], "big")
    points = rows(torch.randn(B, width, generator=torch.Generator().manual_seed(stream)))
    found = []
    for i in range(B):
        if not HAS_TEXT[i]:
            continue
        for vector in (rows(s.image)[i], rows(s.text)[i]):
            vector = unit(vector) if o.normalize else vector
            point = [x / math.sqrt(width) for x in points[i]] if o.normalize else points[i]
            found.append(math.dist(vector, point) ** 2)
    pairs = len(found) / 2
    return sum(found) / (2 * pairs) if o.reduction == "paper" else sum(found) / (pairs * width)


def gradient_oracle(o, s, t):
    """The gradients as what the softmax expects minus what is right, one embedding at a time."""

    def one(queries, keys, groups, scale):
        count = len(queries)
        p, right = [], []
        for i, q in enumerate(queries):
            allowed, correct = columns(i, groups, o.duplicates)
            p.append(chances({j: scale * dot(q, keys[j]) for j in allowed}, count))
            right.append([1 / len(correct) if j in correct else 0.0 for j in range(count)])
        to_queries, to_keys = [], []
        for k in range(count):
            pairs = ((p[k], right[k], keys), ([row[k] for row in p], [row[k] for row in right], queries))
            for found, (chance, correct, others) in zip((to_queries, to_keys), pairs):
                expected, wanted = blended(chance, others), blended(correct, others)
                found.append([scale * (a - b) / count for a, b in zip(expected, wanted)])
        return to_queries, to_keys

    def four(image, text, groups, scale):
        image, text = [unit(v) for v in image], [unit(v) for v in text]
        return (*one(image, text, groups, scale), *one(text, image, groups, scale))

    image, text, groups = captioned(s)
    their_image, their_text, _ = captioned(t)
    scales = (1 / o.temperature,) * 2 if o.temperature else (float(s.logit_scale), float(t.logit_scale))
    own = four(project(o.image_projector, image), project(o.text_projector, text), groups, scales[0])
    value = 0.0
    for ours, theirs in zip(own, four(their_image, their_text, groups, scales[1])):
        squares = [(a - b) ** 2 for x, y in zip(ours, theirs) for a, b in zip(x, y)]
        value += math.fsum(squares) / len(squares)
    return value


def afd_oracle(o, s, t):
    image, text, groups = captioned(s)
    their_image, their_text, _ = captioned(t)
    pictures = project(o.image_projector, [unit(a) + unit(b) for a, b in zip(image, their_image)])
    captions = project(o.text_projector, [unit(a) + unit(b) for a, b in zip(text, their_text)])
    scale = math.exp(float(o.log_scale.detach()))
    first = contrast(pictures, captions, groups, scale, o.duplicates)
    return (first + contrast(captions, pictures, groups, scale, o.duplicates)) / 2


def cross_kd_oracle(o, s, t):
    scale_s, scale_t = (1 / o.temperature,) * 2 if o.temperature else (float(s.logit_scale), float(t.logit_scale))
    image, text, _ = captioned(s)
    their_image, their_text, _ = captioned(t)
    parts = (
        (project(o.image_projector, image), their_image, their_text),
        (project(o.text_projector, text), their_text, their_image),
    )
    value = 0.0
    for ours, same_side, other_side in parts:
        for query, their_query in zip(ours, same_side):
            p = softmax([scale_t * cosine(their_query, key) for key in other_side])
            value += kl(p, softmax([scale_s * cosine(query, key) for key in other_side])) / len(ours) / 2
    return value


def vl2v_oracle(o, s, t):
    image = project(o.projector, rows(s.image))
    pictures = sum(cosine(a, b) for a, b in zip(image, rows(t.image))) / B
    captions = [cosine(image[i], rows(t.text)[i]) for i in range(B) if HAS_TEXT[i]]
    return -(o.image_share * pictures + (1 - o.image_share) * sum(captions) / len(captions))


def multi_teacher_oracle(o, s, t):
    image, text, _ = captioned(s)
    their_image, their_text, _ = captioned(t)
    widths = o.widths or [len(their_image[0])]
    value, start = 0.0, 0
    for k, width in enumerate(widths):
        scale = o.logit_scales[k] if o.logit_scales else float(t.logit_scale)
        theirs = [[v[start : start + width] for v in part] for part in (their_image, their_text)]
        start += width
        for own, teacher in (((image, text), theirs), ((text, image), theirs[::-1])):
            for i in range(len(image)):
                p = softmax([scale * cosine(teacher[0][i], key) for key in teacher[1]])
                q = softmax([float(s.logit_scale) * cosine(own[0][i], key) for key in own[1]])
                value += kl(p, q) / len(image) / 2 / len(widths)
    return value


def momentum_oracle(o, s, t):
    a = o.alpha * (min(1.0, o.progress / o.ramp) if o.ramp else 1.0)
    scale = float(s.logit_scale)
    image, text, groups = captioned(s)
    their_image, their_text, _ = captioned(t)
    value = 0.0
    for queries, their_queries, keys in ((image, their_image, their_text), (text, their_text, their_image)):
        for i, query in enumerate(queries):
            allowed, right = columns(i, groups, o.duplicates)
            p = chances({j: scale * cosine(query, keys[j]) for j in allowed}, len(keys))
            believed = chances({j: scale * cosine(their_queries[i], keys[j]) for j in allowed}, len(keys))
            for j in allowed:
                label = (1 - a) * (1 / len(right) if j in right else 0.0) + a * believed[j]
                value -= label * math.log(p[j]) / len(queries) / 2
    return value


CONTRASTIVE_CASES = [
    ("siglip", siglip_oracle, {}),
    ("siglip", siglip_oracle, {"duplicates": "positives", "bias": -1.0}),
    ("siglip", siglip_oracle, {"duplicates": "negatives", "bias": None}),
    ("multi-positive", multi_positive_oracle, {}),
    ("multi-positive", multi_positive_oracle, {"temperature": 0.5, "epsilon": 1e-3}),
    ("cwcl", cwcl_oracle, {}),
    ("cwcl", cwcl_oracle, {"side": "text", "duplicates": "negatives"}),
    ("soft-negatives", soft_negatives_oracle, {}),
    ("soft-negatives", soft_negatives_oracle, {"softness": 0.9, "duplicates": "positives"}),
    ("soft-negatives", soft_negatives_oracle, {"duplicates": "negatives"}),
    ("momentum", momentum_oracle, {}),
    ("momentum", momentum_oracle, {"alpha": 0.9, "ramp": 0.8, "duplicates": "positives"}),
    ("momentum", momentum_oracle, {"ramp": 0.0, "duplicates": "negatives"}),
    ("hycd", hycd_oracle, {}),
    ("hycd", hycd_oracle, {"blend": 0.0, "duplicates": "negatives", "temperature": 2.0}),
    ("hycd", hycd_oracle, {"normalize": False, "temperature": 3.0, "duplicates": "positives", "blend": 0.3}),
    ("rafa", rafa_oracle, {}),
    ("rafa", rafa_oracle, {"reduction": "element", "normalize": True}),
    ("gradient", gradient_oracle, {}),
    ("gradient", gradient_oracle, {"duplicates": "positives", "temperature": 0.3}),
    ("gradient", gradient_oracle, {"duplicates": "negatives"}),
    ("afd", afd_oracle, {}),
    ("afd", afd_oracle, {"logit_scale": 4.0, "duplicates": "negatives"}),
    ("cross-kd", cross_kd_oracle, {}),
    ("cross-kd", cross_kd_oracle, {"temperature": 0.3}),
    ("vl2v", vl2v_oracle, {}),
    ("vl2v", vl2v_oracle, {"image_share": 0.2}),
    ("multi-teacher", multi_teacher_oracle, {}),
    ("multi-teacher", multi_teacher_oracle, {"widths": [2, 3], "logit_scales": [3.0, 7.0]}),
]
