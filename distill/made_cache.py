"""A folder that `pocketvlm cache-teacher` made, as a run meets it: used as it is, or refused, and never added to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketvlm.data.augment import VIEW_VERSION, AugmentPolicy
from pocketvlm.data.sample import Sample
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.taps import asked_taps
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.teachers.base import TextTeacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_format import check_version, digest_names, refuse_difference
from pocketvlm.teachers.top_logits import TopLogits

MANIFEST = "teacher-cache.json"


@dataclass(frozen=True)
class MadeCaches:
    """The caches in one folder, one for each teacher.

    members: "spec", "name", "fingerprint" and "folder" of each. recipe: that of the command that made them, or None.
    """

    folder: Path
    members: tuple[dict[str, str], ...]
    recipe: dict[str, Any] | None

    @classmethod
    def find(cls, folder: str | Path | None) -> MadeCaches | None:
        """What lies in `folder`; None where `pocketvlm cache-teacher` made nothing there.

        Raises:
            IntegrityError: its manifest cannot be read. VersionError: it was written by a later release.
        """
        if folder is None:
            return None
        folder = Path(folder)
        if (folder / "cache.json").is_file():
            info = TeacherCache.open(folder).info
            return cls(folder, ({"spec": "", "name": info.name, "fingerprint": info.fingerprint, "folder": "."},), None)
        try:
            value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise IntegrityError(
                f"{folder / MANIFEST} is not JSON ({error}); delete the folder and make it anew"
            ) from error
        check_version(folder, value)
        return cls(folder, tuple(value["teachers"]), value["recipe"])

    @classmethod
    def need(cls, folder: str | Path) -> MadeCaches:
        """As `find`. Raises UsageError where there is none."""
        found = cls.find(folder)
        if found is None:
            raise UsageError(
                f"{folder} holds neither {MANIFEST} nor cache.json, so there is no teacher cache to look at; name the "
                "--out of `pocketvlm cache-teacher`"
            )
        return found

    def path(self, member: dict[str, str]) -> Path:
        """Folder of one of the members."""
        return self.folder / member["folder"]

    def of(
        self,
        recipe: Recipe,
        teacher: Any,
        samples: Sequence[Sample],
        texts: Sequence[str],
        policy: AugmentPolicy,
        grid: int,
        logits: TopLogits | None = None,
    ) -> TeacherCache:
        """The cache of `teacher`, which holds these pictures and texts in the views of the recipe.

        It may hold more of all that. grid: places in a row of the token maps that the run reads; 0: none. logits: those
        that it reads.

        Raises:
            IntegrityError: made by other weights, preprocessing or augmentation, in another dtype, or from other
                pictures; the message names what differs. UsageError: unfinished.
        """
        chosen = [m for m in self.members if m["fingerprint"] == teacher.fingerprint]
        chosen = chosen or [m for m in self.members if m["spec"] == teacher.name] or [*self.members]
        folder = self.path(chosen[0])
        cache = TeacherCache.open(folder)
        info, section = cache.info, recipe.teacher
        assert section is not None, "only a run with a teacher asks for its outputs"
        wanted: dict[str, Any] = {"fingerprint": teacher.fingerprint}
        if not isinstance(teacher, TextTeacher):
            wanted["image"] = json.loads(json.dumps(dataclasses.asdict(teacher.image)))
            if recipe.views.count > info.views:
                wanted["views"] = recipe.views.count
            if recipe.views.count > 1 and info.views > 1:
                wanted |= {"seed": recipe.views.seed, "policy": {**policy.to_dict(), "view_version": VIEW_VERSION}}
            if grid and (section.token_grid is not None or not info.token_grid):
                wanted["token_grid"] = grid
        if section.cache_dtype is not None:
            wanted["dtype"] = section.cache_dtype
        refuse_difference(folder, info.to_dict(), wanted)
        reading = features_read(recipe)
        if reading and not (info.feature_dim or info.text_feature_dim):
            raise IntegrityError(
                f"cache {folder} keeps no pooled features, which {reading[0]} reads, so it would have no target; make "
                "the cache with this recipe, or leave the objective out"
            )
        check_logits(cache, logits)
        _refuse_other_data(cache, samples, texts)
        return cache


def features_read(recipe: Recipe) -> list[str]:
    """Names of the recipe's objectives that read the teacher's pooled features."""
    from pocketvlm.distill.objectives import objective_needs

    return [s.name for s in recipe.objectives if (n := objective_needs(s.name, s.options)).features and n.teacher]


def check_logits(cache: TeacherCache, logits: TopLogits | None) -> None:
    """Raises IntegrityError, which names what differs, where other logits are kept than `logits`, which may be None."""
    if logits is None:
        return
    if not cache.info.top_logits:
        raise IntegrityError(
            f"cache {cache.folder} keeps no logits, which teacher.logits asks for, so there would be no target; make "
            "the cache with this recipe, or leave teacher.logits out"
        )
    wanted = {
        "top_logits": logits.top,
        "logit_count": len(logits.texts),
        "logit_texts": digest_names(logits.texts),
    }
    refuse_difference(cache.folder, cache.info.to_dict(), wanted)


def _refuse_other_data(cache: TeacherCache, samples: Sequence[Sample], texts: Sequence[str]) -> None:
    remedy = "make it from this run's data (`pocketvlm cache-teacher`), or leave them out of the run"
    absent = [s.uid for s in samples if s.uid not in cache]
    if absent:
        cache.check()  # a name that a flipped bit changed is absent too
        reason = cache.skipped.get(absent[0])
        why = f", which could not be decoded then ({reason})" if reason else ""
        raise IntegrityError(
            f"the teacher cache {cache.folder} was made from other data: {len(absent)} of {len(samples)} pictures are "
            f"not in it (first {absent[0]!r}{why}), so they would have no teacher; {remedy}"
        )
    missing = cache.missing_texts(texts)
    if missing:
        cache.check()
        raise IntegrityError(
            f"the teacher cache {cache.folder} was made from other data: {len(missing)} of {len(texts)} texts are not "
            f"in it (first {missing[0]!r}), so they would have no teacher; {remedy}"
        )
    changed = cache.changed(samples)
    if changed:
        raise IntegrityError(
            f"the teacher cache {cache.folder} was made from other pictures: {len(changed)} of {len(samples)} have "
            f"other bytes now (first {changed[0]!r}), so the student would be taught about other pictures; {remedy}"
        )


def check_precomputed(recipe: Recipe, cache: TeacherCache, samples: Sequence[Sample], texts: Sequence[str]) -> None:
    """Raises UsageError where embeddings on disk do not hold what the run asks about, and no model could say it."""
    if recipe.views.count > cache.info.views:
        raise UsageError(
            f"views.count is {recipe.views.count} but the embeddings on disk hold {cache.info.views} view(s), so the "
            f"teacher could not answer for the others; set views.count to {cache.info.views}"
        )
    if (taps := asked_taps(recipe).teacher) and not cache.info.token_grid:
        raise UsageError(
            f"the recipe's objectives read the teacher's {taps[0]!r} and the embeddings on disk hold no token maps, so "
            "there is nothing to learn from; use a teacher with weights, or leave these objectives out"
        )
    grid = recipe.teacher.token_grid if recipe.teacher is not None else None
    if grid not in (None, cache.info.token_grid):
        kept = cache.info.token_grid
        raise UsageError(
            f"teacher.token_grid is {grid} but the embeddings on disk keep maps of {kept} x {kept} places, and there "
            "is no model to make others; leave teacher.token_grid out"
        )
    absent = [s.uid for s in samples if s.uid not in cache]
    if absent:
        raise UsageError(
            f"{len(absent)} of {len(samples)} training pictures (first {absent[0]!r}) are not among the embeddings on "
            f"disk of {cache.info.name!r}, so they would have no teacher; add them, or leave them out of data.train"
        )
    known = set(cache.texts)
    missing = [text for text in texts if text not in known]
    if missing:
        raise UsageError(
            f"{len(missing)} training texts (first {missing[0]!r}) are not among the embeddings on disk of "
            f"{cache.info.name!r}; add them there, or leave out data.words and the captions"
        )
