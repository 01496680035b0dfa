"""The score sheet of one evaluation: which rows take part, and the per-query results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pocketvlm.data.sample import Sample
from pocketvlm.data.splits import group_of
from pocketvlm.distill import diagnostics, metrics
from pocketvlm.distill.questions import Array, Embedded, Questions, is_flag, prompt
from pocketvlm.edge.errors import unknown_name

DEFAULT_METRICS = ("retrieval", "zeroshot", "neighbours", "mixed")
METRICS = (
    *DEFAULT_METRICS,
    *(
        "hard_negatives",
        "hubness",
        "modality_gap",
        "calibration",
        "divergence",
        "languages",
        "robustness",
        "asymmetric",
    ),
)
KS = (1, 5, 10)
TOP = 5
FEWEST = 20
"""Fewer pictures than this give no share worth printing: the 95 % interval of a share of 19 is 45 points wide."""
RESAMPLES = 2000
"""For the intervals in eval.json; `metrics.paired_bootstrap` defaults to more."""


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """`names` as members of METRICS; "all" stands for every one.

    Raises:
        UnknownNameError: another name.
    """
    for name in names:
        if name not in METRICS and name != "all":
            raise unknown_name("metric", name, (*METRICS, "all"))
    return METRICS if "all" in names else tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class _Search:
    """Retrieval both ways. links: for each picture, its texts as places in `gallery`. x, t: their embeddings."""

    pictures: list[Sample]
    gallery: list[str]
    links: list[list[int]]
    x: Array
    t: Array
    forward: metrics.QueryResults
    reverse: metrics.QueryResults

    def summary(self) -> dict[str, dict[str, float]]:
        return {"image_to_text": self.forward.summary(KS), "text_to_image": self.reverse.summary(KS)}


class Board:
    """Scores a model, and a second one beside it, on the pictures that both could read."""

    def __init__(self, questions: Questions, model: Embedded, teacher: Embedded | None) -> None:
        self.questions, self.model, self.teacher = questions, model, teacher
        self.text_row = {text: row for row, text in enumerate(questions.texts)}
        readable = set(model.uids) & set(teacher.uids if teacher else model.uids)
        kept = [sample for sample in questions.samples if sample.uid in readable]
        self.headline = [sample for sample in kept if not is_flag(sample)]
        self.flags = [sample for sample in kept if is_flag(sample)]
        self.queries: dict[str, Array] = {}
        self.not_scored: dict[str, str] = {}
        self._group = {sample.uid: group_of(sample) for sample in kept}
        self._drawn: dict[tuple[str, str, str], Callable[[Array], float]] = {}
        self._units: dict[str, Array] = {}

    # -- what is scored ------------------------------------------------------------------------------------------

    def part(self, side: str, images: Embedded, texts: Embedded, wanted: Sequence[str]) -> dict[str, Any]:
        """All results of one pairing of towers. side: under which the per-query results are kept."""
        values: dict[str, Any] = {}
        found = self.search(images, texts, self.headline, self.questions.language)
        if "retrieval" in wanted and found:
            self._keep(side, found)
            values |= found.summary()
        zero_shot = self._classify(images, texts, side) if {"zeroshot", "calibration"} & set(wanted) else None
        if zero_shot and "zeroshot" in wanted:
            values["zero_shot"] = zero_shot[0]
        if self.questions.negatives:
            self._add(values, "hard_negatives", self._hard_negatives(side, images, texts))
        elif "hard_negatives" in wanted:
            self.not_scored["hard_negatives"] = "the data has none and its captions give none"
        if "hubness" in wanted and found:
            self._add(values, "hubness", self._hubness(side, found))
        if "modality_gap" in wanted and found:
            self._add(values, "modality_gap", self._modality_gap(side, found))
        if "calibration" in wanted:
            self._add(values, "calibration", self._calibration(side, images, found, zero_shot))
        if "languages" in wanted:
            self._add(values, "languages", self._languages(side, images, texts))
        return values

    @staticmethod
    def _add(values: dict[str, Any], name: str, found: dict[str, Any]) -> None:
        if found:
            values[name] = found

    def images(self, embedded: Embedded, samples: Sequence[Sample]) -> Array:
        row = {uid: index for index, uid in enumerate(embedded.uids)}
        return embedded.images[[row[sample.uid] for sample in samples]]

    def _texts(self, embedded: Embedded, texts: Sequence[str]) -> Array:
        return embedded.texts[[self.text_row[text] for text in texts]]

    def pairs(self, samples: Sequence[Sample], language: str) -> tuple[list[Sample], list[str], list[list[int]]]:
        """Pictures with a text in `language`, its distinct texts, and each picture's text indices."""
        pictures, links = [], []
        index: dict[str, int] = {}
        for sample in samples:
            own = dict.fromkeys(c.text for c in sample.captions if c.language == language)
            if own:
                pictures.append(sample)
                links.append([index.setdefault(text, len(index)) for text in own])
        return pictures, list(index), links

    def search(self, images: Embedded, texts: Embedded, samples: Sequence[Sample], language: str) -> _Search | None:
        """Retrieval among the pictures of `samples` that have a text in `language`; None where there is none."""
        pictures, gallery, links = self.pairs(samples, language)
        if not pictures:
            return None
        back: list[list[int]] = [[] for _ in gallery]
        for picture, indices in enumerate(links):
            for index in indices:
                back[index].append(picture)
        x, t = self.images(images, pictures), self._texts(texts, gallery)
        return _Search(
            pictures, gallery, links, x, t, metrics.retrieval(x, t, links), metrics.retrieval(t, x, back)
        )  # fmt: skip

    def _keep(self, side: str, found: _Search, suffix: str = "") -> None:
        """Per-query results for the file; `suffix` tells a language or the flags from the headline."""
        uids = np.array([sample.uid for sample in found.pictures])
        self.queries[f"image_to_text{suffix}/uid"] = uids
        self.queries[f"text_to_image{suffix}/text"] = np.array(found.gallery)
        for direction, result in (("image_to_text", found.forward), ("text_to_image", found.reverse)):
            self.queries[f"{side}/{direction}{suffix}/rank"] = result.rank
            self.queries[f"{side}/{direction}{suffix}/ap"] = result.ap
        self._units |= {f"{direction}{suffix}": units for direction, units in self.searched(found).items()}
        if not suffix:
            self.queries[f"{side}/image_to_text/top"] = diagnostics.nearest(found.x, found.t, k=TOP)

    def searched(self, found: _Search) -> dict[str, Array]:
        """Cluster ids of the queries both ways; a text belongs to the first picture that has it."""
        groups = self._groups(np.array([sample.uid for sample in found.pictures]))
        first = {index: picture for picture in reversed(range(len(found.links))) for index in found.links[picture]}
        return {"image_to_text": groups, "text_to_image": groups[[first[i] for i in range(len(found.gallery))]]}

    def _groups(self, uids: Array) -> Array:
        """What is independent of each other: base concepts, not the pictures of one."""
        return np.array([self._group[str(uid)] for uid in uids])

    def _classify(
        self, images: Embedded, texts: Embedded, side: str
    ) -> tuple[dict[str, float], metrics.QueryResults, Array, Array] | None:
        """(values, ranks, picture embeddings, class embeddings) of zero-shot classification."""
        labels, templates = self.questions.labels, self.questions.templates
        samples = [sample for sample in self.headline if sample.label]
        if len(labels) < 2 or not samples:
            return None
        classes = np.mean(
            [metrics.normalize(self._texts(texts, [prompt(t, label) for label in labels])) for t in templates], axis=0
        )
        index = {label: place for place, label in enumerate(labels)}
        x = self.images(images, samples)
        result = metrics.retrieval(x, classes, [[index[str(sample.label)]] for sample in samples])
        uids = np.array([sample.uid for sample in samples])
        self.queries["zero_shot/uid"], self._units["zero_shot"] = uids, self._groups(uids)
        self.queries[f"{side}/zero_shot/rank"] = result.rank
        values = result.summary((1, 5))
        shares = {"top-1": values["R@1"], "top-5": values["R@5"]} | {key: values[key] for key in ("queries", "gallery")}
        return shares, result, x, classes

    def _hard_negatives(self, side: str, images: Embedded, texts: Embedded) -> dict[str, Any]:
        """Share of pictures nearer to the true caption than to its hard negative, ties wrong; by kind, with counts."""
        row = {uid: index for index, uid in enumerate(images.uids)}
        asked = [(uid, negative) for uid, negative in self.questions.negatives if uid in self._group]
        x = metrics.normalize(images.images[[row[uid] for uid, _ in asked]])
        true, false = (
            metrics.normalize(self._texts(texts, rows))
            for rows in ([n.caption for _, n in asked], [n.text for _, n in asked])
        )
        right = (x * (true - false)).sum(axis=1) > metrics.TIE
        kinds = np.array([negative.kind for _, negative in asked])
        uids = np.array([uid for uid, _ in asked])
        self.queries |= {
            "hard_negatives/uid": uids,
            "hard_negatives/kind": kinds,
            "hard_negatives/caption": np.array([negative.caption for _, negative in asked]),
            "hard_negatives/text": np.array([negative.text for _, negative in asked]),
            f"{side}/hard_negatives/right": right.astype(np.float64),
        }
        self._units["hard_negatives"] = self._groups(uids)
        values: dict[str, Any] = {"queries": float(len(asked))}
        for kind in sorted(set(kinds.tolist())):
            rows = kinds == kind
            pictures = len(set(uids[rows].tolist()))
            values[f"{kind}_pictures"] = float(pictures)
            if pictures < FEWEST:
                self.not_scored[f"hard_negatives/{kind}"] = f"{pictures} pictures, fewer than {FEWEST}"
            else:
                values[kind] = float(right[rows].mean())
        return values

    def _hubness(self, side: str, found: _Search) -> dict[str, Any]:
        """Skewness of N_k over the gallery, and the share of the gallery that is nobody's neighbour."""
        values: dict[str, Any] = {}
        for direction, q, g in (("image_to_text", found.x, found.t), ("text_to_image", found.t, found.x)):
            k = min(diagnostics.HUB_K, len(g) - 1)
            if k < 1:
                continue
            near = diagnostics.nearest(q, g, k=k)
            counts = diagnostics.occurrences(near, len(g))
            values |= {f"{direction}_k": k, f"{direction}_skewness": diagnostics.skewness(counts)}
            values[f"{direction}_unreached"] = float((counts == 0).mean())
            self._drawn[side, "hubness", f"{direction}_skewness"] = partial(_skewness, near, len(g))
            self._units[f"hubness/{direction}_skewness"] = self.searched(found)[direction]
        return values

    def _modality_gap(self, side: str, found: _Search) -> dict[str, Any]:
        rows = np.array([(picture, index) for picture, own in enumerate(found.links) for index in own])
        x, t = metrics.normalize(found.x)[rows[:, 0]], metrics.normalize(found.t)[rows[:, 1]]
        gap, cosine = diagnostics.modality_gap(x, t)
        uids = np.array([found.pictures[picture].uid for picture in rows[:, 0]])
        for place, name in enumerate(("distance", "pair_cosine")):
            self._units[f"modality_gap/{name}"] = self._groups(uids)
            self._drawn[side, "modality_gap", name] = partial(_gap, x, t, place)
        return {"distance": gap, "pair_cosine": cosine, "pairs": float(len(rows))}

    def _calibration(
        self, side: str, images: Embedded, found: _Search | None,
        zero_shot: tuple[dict[str, float], metrics.QueryResults, Array, Array] | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Expected calibration errors of softmax(logit scale * cosine) over the candidates of each part."""
        scale = images.logit_scale
        if scale is None:
            self.not_scored["calibration"] = f"{images.name} names no logit scale"
            return {}
        parts: list[tuple[str, Array, Array, metrics.QueryResults]] = []
        if found:
            parts.append(("image_to_text", found.x, found.t, found.forward))
            parts.append(("text_to_image", found.t, found.x, found.reverse))
        if zero_shot:
            parts.append(("zero_shot", *zero_shot[2:], zero_shot[1]))
        units = self.searched(found) if found else {}
        if zero_shot:
            units["zero_shot"] = self._units["zero_shot"]
        values: dict[str, Any] = {"logit_scale": scale, "bins": diagnostics.BINS} if parts else {}
        for name, q, g, result in parts:
            sure, right = diagnostics.confidences(q, g, scale), result.hits(1).astype(np.float64)
            values[f"{name}_ECE"] = diagnostics.calibration_error(sure, right)
            values[f"{name}_ECE_equal_mass"] = diagnostics.calibration_error(sure, right, equal_mass=True)
            values[f"{name}_confidence"] = float(sure.mean())
            self.queries[f"{side}/{name}/confidence"] = sure
            self._units[f"calibration/{name}_ECE"] = units[name]
            self._drawn[side, "calibration", f"{name}_ECE"] = partial(diagnostics.calibration_error, sure, right)
        return values

    def _languages(self, side: str, images: Embedded, texts: Embedded) -> dict[str, Any]:
        """R@5 per language over the pictures that have a text in each, the worst one, and the Mean Rank Variance."""
        tags = self.questions.languages
        common = [s for s in self.headline if {c.language for c in s.captions} >= set(tags)]
        if len(tags) < 2 or not common:
            self.not_scored["languages"] = "no picture has texts in two or more languages, all that the data has"
            return {}
        ranks = np.empty((len(common), len(tags)), np.int64)
        for column, tag in enumerate(tags):
            found = self.search(images, texts, common, tag)
            assert found is not None, "every common picture has a text in each language"
            ranks[:, column] = found.forward.rank
        uids = np.array([sample.uid for sample in common])
        self.queries |= {"languages/uid": uids, "languages/language": np.array(tags), f"{side}/languages/rank": ranks}
        self._units["languages"] = self._groups(uids)
        recall = (ranks <= 5).mean(axis=0)
        return {
            "mean_R@5": float(recall.mean()),
            "worst_R@5": float(recall.min()),
            "worst": tags[int(recall.argmin())],
            "mean_rank_variance": float(diagnostics.rank_variances(ranks).mean()),
            "by_language": {tag: float(share) for tag, share in zip(tags, recall)},
            "queries": float(len(common)),
        }

    # -- parts that need more than one pairing ----------------------------------------------------------------------

    def neighbours(self, k: int = 10) -> dict[str, float]:
        """Mean share of each item's k nearest others on which model and teacher agree, in 0..1."""
        values = {}
        for what, model, teacher in self._both():
            shared = metrics.neighbour_overlap(model, teacher, k=k)
            self.queries[f"neighbours/{what}"] = shared
            values[f"{what}@{k}"] = float(shared.mean())
        return values

    def divergence(self) -> dict[str, Any]:
        """Mean KL(teacher || model) of the neighbour distributions, in nats."""
        values: dict[str, Any] = {}
        for what, model, teacher in self._both():
            found = diagnostics.neighbour_divergence(teacher, model)
            self.queries[f"divergence/{what}"] = found
            values[what] = float(found.mean())
        return values | {"temperature": diagnostics.NEIGHBOUR_TEMPERATURE, "direction": "KL(teacher || model)"}

    def _both(self) -> Iterator[tuple[str, Array, Array]]:
        """("images" or "texts", the model's embeddings, the teacher's), where there are at least two items."""
        assert self.teacher is not None
        if len(self.headline) > 1:
            yield "images", self.images(self.model, self.headline), self.images(self.teacher, self.headline)
        texts = self.pairs(self.headline, self.questions.language)[1]
        if len(texts) > 1:
            yield "texts", self._texts(self.model, texts), self._texts(self.teacher, texts)

    def mixed(self, wanted: Sequence[str]) -> dict[str, Any] | None:
        """Retrieval and classification across models; only where both embed into one space of one width."""
        assert self.teacher is not None
        model, teacher = self.model, self.teacher
        if not self.one_space():
            return None
        own = [name for name in wanted if name in ("retrieval", "zeroshot")]
        found = {}
        for side, images, texts in (
            ("model_image_teacher_text", model, teacher),
            ("teacher_image_model_text", teacher, model),
        ):
            found[side] = self.part(side, images, texts, own)
        return found

    def one_space(self) -> bool:
        """Whether cosines between the model's and the teacher's embeddings mean something."""
        model, teacher = self.model, self.teacher
        if teacher is None or not model.space_id or model.space_id != teacher.space_id:
            return False
        return model.images.shape[1] == teacher.texts.shape[1]

    def _sides(self) -> list[tuple[str, Embedded]]:
        return [("model", self.model)] + ([("teacher", self.teacher)] if self.teacher else [])

    def by_tag(self, tags: Sequence[str]) -> dict[str, Any]:
        """Headline results of the pictures that carry each value of a tag; the gallery stays whole."""
        samples = {sample.uid: sample for sample in self.headline}
        uids = self.queries.get("image_to_text/uid", np.array([], str))
        found: dict[str, Any] = {}
        for tag in tags:
            carried = np.array([samples[str(uid)].tags.get(tag, "") for uid in uids])
            values = sorted(set(carried.tolist()) - {""})
            if len(values) < 2:
                continue
            found[tag] = {}
            for value in values:
                rows = carried == value
                found[tag][value] = {
                    side: metrics.QueryResults(
                        self.queries[f"{side}/image_to_text/rank"][rows],
                        self.queries[f"{side}/image_to_text/ap"][rows],
                        len(self.queries["text_to_image/text"]),
                    ).summary(KS)
                    for side, _ in self._sides()
                }
                if self.teacher:
                    found[tag][value]["difference"] = self._recall_difference("image_to_text", rows)
        return found

    def robustness(self, by_tag: dict[str, Any], side: str) -> dict[str, Any]:
        """Worst and unweighted mean R@5 over the values of each tag (worst-group recall), of values with enough
        pictures."""
        values: dict[str, Any] = {}
        for tag, rows in by_tag.items():
            enough = {name: row[side]["R@5"] for name, row in rows.items() if row[side]["queries"] >= FEWEST}
            if len(enough) < 2:
                self.not_scored[f"robustness/{tag}"] = f"fewer than two values have {FEWEST} pictures"
                continue
            worst = min(enough, key=lambda name: (enough[name], name))
            values[f"{tag}_mean_R@5"] = float(np.mean(list(enough.values())))
            values |= {f"{tag}_worst_R@5": enough[worst], f"{tag}_worst": worst}
        if not by_tag:
            self.not_scored["robustness"] = "no tag has two values"
        return values

    def by_language(self) -> dict[str, Any]:
        """Retrieval among the texts of each further language."""
        found = {}
        for language in self.questions.languages:
            if language != self.questions.language and (sides := self._apart(self.headline, language, f"@{language}")):
                found[language] = sides
        return found

    def score_flags(self) -> dict[str, Any] | None:
        return self._apart(self.flags, self.questions.language, "@flags")

    def _apart(self, samples: Sequence[Sample], language: str, suffix: str) -> dict[str, Any] | None:
        sides: dict[str, Any] = {}
        for side, embedded in self._sides():
            found = self.search(embedded, embedded, samples, language)
            if found is None:
                return None
            self._keep(side, found, suffix)
            sides[side] = found.summary()
        if self.teacher:
            sides["difference"] = self._recall_difference(f"image_to_text{suffix}")
        return sides

    # -- two models beside each other --------------------------------------------------------------------------------

    def differences(self) -> dict[str, dict[str, Any]]:
        """Paired bootstrap intervals of model minus teacher for everything that both have, whole concepts resampled."""
        found: dict[str, dict[str, Any]] = {}
        for part, name, a, b, units in self._per_query():
            found.setdefault(part, {})[name] = interval(a, b, units)
        for (side, part, name), statistic in self._drawn.items():
            other = self._drawn.get(("teacher", part, name))
            if side == "model" and other is not None:
                units = self._units[f"{part}/{name}"]
                drawn = metrics.bootstrap_statistic(partial(_both_of, statistic, other), units)
                found.setdefault(part, {})[name] = drawn.to_dict()
        return found

    def keep_units(self) -> None:
        """The cluster ids beside the per-query results, for comparisons with what is scored elsewhere."""
        for part in ("image_to_text", "text_to_image", "zero_shot", "hard_negatives"):
            if part in self._units:
                self.queries[f"{part}/unit"] = self._units[part]

    def _per_query(self) -> Iterator[tuple[str, str, Array, Array, Array]]:
        """(part, metric, the model's results, the teacher's, cluster ids) of what is a mean over queries."""
        for part, ks, metric in (
            ("image_to_text", KS, "R@"),
            ("text_to_image", KS, "R@"),
            ("zero_shot", (1, 5), "top-"),
        ):
            a, b = (self.queries.get(f"{side}/{part}/rank") for side in ("model", "teacher"))
            if a is None or b is None:
                continue
            units = self._units[part]
            for k in ks:
                yield part, f"{metric}{k}", a <= k, b <= k, units
            if f"model/{part}/ap" in self.queries:
                yield part, "MAP", self.queries[f"model/{part}/ap"], self.queries[f"teacher/{part}/ap"], units
        a, b = (self.queries.get(f"{side}/hard_negatives/right") for side in ("model", "teacher"))
        if a is not None and b is not None:
            kinds = self.queries["hard_negatives/kind"]
            for kind in sorted(set(kinds.tolist())):
                rows = kinds == kind
                if f"hard_negatives/{kind}" not in self.not_scored:
                    yield "hard_negatives", kind, a[rows], b[rows], self._units["hard_negatives"][rows]
        a, b = (self.queries.get(f"{side}/languages/rank") for side in ("model", "teacher"))
        if a is not None and b is not None:
            units = self._units["languages"]
            yield "languages", "mean_R@5", (a <= 5).mean(axis=1), (b <= 5).mean(axis=1), units
            own, other = diagnostics.rank_variances(a), diagnostics.rank_variances(b)
            yield "languages", "mean_rank_variance", own, other, units

    def _recall_difference(self, part: str, rows: Array | slice = slice(None), k: int = 5) -> dict[str, Any]:
        a, b = (self.queries[f"{side}/{part}/rank"][rows] <= k for side in ("model", "teacher"))
        return {f"R@{k}": interval(a, b, self._units[part][rows])}


def _skewness(near: Array, gallery: int, weights: Array) -> float:
    return diagnostics.skewness(diagnostics.occurrences(near, gallery, weights))


def _gap(images: Array, texts: Array, place: int, weights: Array) -> float:
    return diagnostics.modality_gap(images, texts, weights)[place]


def _both_of(own: Callable[[Array], float], other: Callable[[Array], float], weights: Array) -> tuple[float, float]:
    return own(weights), other(weights)


def interval(a: Array, b: Array, units: Array) -> dict[str, float]:
    return metrics.paired_bootstrap(a, b, clusters=units, resamples=RESAMPLES).to_dict()
