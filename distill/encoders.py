"""Students, teachers and bundles behind the one interface that `distill.evaluate` scores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from pocketvlm.data.hard_negatives import with_hard_negatives
from pocketvlm.data.source import DataSource
from pocketvlm.distill.evaluate import DEFAULT_METRICS, Encoder, Evaluation, check_metrics, evaluate_model
from pocketvlm.distill.questions import ClassScores, only_labels
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.preprocess import load_image, stack
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.teachers.device import full_float32, pick_device

Array = NDArray[Any]


class StudentEncoder:
    """A torch student, both towers its own. Put into eval mode for each call and back afterwards."""

    def __init__(self, student: Any, *, device: torch.device | str = "cpu") -> None:
        self.student, self.device = student, torch.device(device)
        self.space_id = student.space_id or ""
        self._tokenizer = Tokenizer(student.tokenizer_json, student.text_spec)

    def embed_image(self, x: Sequence[Any], /) -> Array:
        pixels = torch.from_numpy(stack([load_image(image, self.student.image_spec) for image in x]))
        return self._run(self.student.encode_image, pixels)

    def embed_text(self, x: Sequence[str], /) -> Array:
        return self._run(self.student.encode_text, torch.from_numpy(self._tokenizer.encode(list(x))))

    def class_logits(self, x: Sequence[Any], /) -> Array:
        """float32 [N, K] of a task student, whose softmax are the probabilities of its classes."""
        student, training = self.student, self.student.training
        pixels = torch.from_numpy(stack([load_image(image, student.image_spec) for image in x]))
        student.eval()
        try:
            with torch.inference_mode(), full_float32():
                features = student.encode_image(pixels.to(self.device)).features
                return student.heads.mixed(features).float().cpu().numpy()
        finally:
            student.train(training)

    def _run(self, encode: Any, batch: torch.Tensor) -> Array:
        training = self.student.training
        self.student.eval()
        try:
            with torch.inference_mode(), full_float32():
                output = encode(batch.to(self.device)).embedding
                return torch.nn.functional.normalize(output.float(), dim=-1).cpu().numpy()
        finally:
            self.student.train(training)


def scored(student: Any, *, device: torch.device | str = "cpu") -> Encoder:
    """What is scored of a student: its towers, or the classifier that a task student is."""
    encoder = StudentEncoder(student, device=device)
    return encoder if student.heads is None else ClassScores(encoder.class_logits, student.heads.classes.labels)


class TeacherEncoder:
    """A teacher with its own preprocessing."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        self.space_id = teacher.space_id

    def embed_image(self, x: Sequence[Any], /) -> Array:
        pixels = torch.from_numpy(stack([load_image(image, self.teacher.image) for image in x]))
        with torch.inference_mode():
            return self.teacher.encode_images(pixels).embedding.float().cpu().numpy()

    def embed_text(self, x: Sequence[str], /) -> Array:
        with torch.inference_mode():
            return self.teacher.encode_texts(list(x)).embedding.float().cpu().numpy()


def read_by(encoder: Any, source: DataSource) -> DataSource:
    """`source` without the captions that the encoder's text tower would cut (`DataSource.within_context`), or, for a
    classifier, without any.

    encoder: an `EdgeModel`, a `StudentEncoder`, or a `TeacherEncoder` of a dual encoder whose tokenizer can be written
    as tokenizer.json; any other one keeps all captions.
    """
    if isinstance(encoder, ClassScores):
        return only_labels(source)
    student, tokenizer = getattr(encoder, "student", None), getattr(encoder, "tokenizer", None)
    teacher: Any = getattr(encoder, "teacher", None)
    if student is not None:
        tokenizer = Tokenizer(student.tokenizer_json, student.text_spec)
    if hasattr(teacher, "tokenizer_json"):
        with suppress(UsageError):
            tokenizer = Tokenizer(teacher.tokenizer_json(), teacher.text)
    return source if tokenizer is None else source.within_context(tokenizer)


def open_encoder(
    path: str | Path, *, backend: str = "auto", precision: str = "auto", device: str = "auto"
) -> tuple[str, Encoder]:
    """(name, encoder) of a run folder, a student folder, or a bundle (folder or .zip).

    Raises:
        UsageError: the path is none of these.
    """
    path = Path(path)
    if (path / "bundle.json").is_file() or path.suffix == ".zip":
        from pocketvlm.edge.model import EdgeModel

        model = EdgeModel.load(path, backend=backend, precision=precision)  # type: ignore[arg-type]
        name, labels = f"{model.contract.name} ({backend})", model.contract.labels
        return name, model if model.contract.kind != "classifier" else ClassScores(model.embed_image, labels)
    if (path / "student.json").is_file() or (path / "student" / "student.json").is_file():
        from pocketvlm.students import load_student

        target = pick_device(device)
        student = load_student(path).to(target)
        return student.config.name, scored(student, device=target)
    raise UsageError(
        f"{path} holds neither bundle.json nor student.json, so there is no model to score; name a bundle, a student "
        "folder, or the folder of a finished run"
    )


def evaluate_path(
    model: str | Path,
    data: Any,
    *,
    teacher: str | None = None,
    against: str | Path | None = None,
    metrics_wanted: Sequence[str] = DEFAULT_METRICS,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    allow_download: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Evaluation:
    """Score what lies at `model` on `data`, beside the teacher spec `teacher` or the model at `against`, if any.

    allow_download, trust_remote_code: of `teachers.load_teacher`, for that teacher. against: another run, student or
    bundle; both answer the same questions, without the captions that either could not read whole, and it takes the
    teacher's place in all results.
    data: a data spec, or an open source. options: `templates`, `tags`, `batch_size` of `evaluate_model`.

    Raises:
        UsageError: both a teacher and `against`, or a path that holds no model. UnknownNameError: no such metric.
    """
    from pocketvlm.data import open_data
    from pocketvlm.distill.student_teacher import open_teacher

    if teacher and against is not None:
        raise UsageError(
            f"the results were asked for beside the teacher {teacher!r} and against {str(against)!r}, and there is one "
            "column for either; run the command once for each"
        )
    wanted = check_metrics(metrics_wanted)
    name, encoder = open_encoder(model, backend=backend, precision=precision, device=device)
    source = open_data(data) if isinstance(data, str) else data
    if "hard_negatives" in wanted:
        source = with_hard_negatives(source)
    source = read_by(encoder, source)
    other: Encoder | None = None
    other_name = "teacher"
    if against is not None:
        other_name, other = open_encoder(against, backend=backend, precision=precision, device=device)
        source = read_by(other, source)
    elif teacher:
        loaded = open_teacher(
            teacher, device=device, allow_download=allow_download, trust_remote_code=trust_remote_code
        )
        other_name, other = loaded.name, TeacherEncoder(loaded)
    found = evaluate_model(
        encoder, source, teacher=other, name=name, teacher_name=other_name, metrics_wanted=wanted, **options
    )
    if against is not None:
        found.values["beside"] = f"against {other_name}"
    return found
