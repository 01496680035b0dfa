"""Learning across tokenizers and from visual teachers: against loops and transformers, through the loop, refusals."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import ImageRef, Sample, Turn
from pocketvlm.distill.vlm.across import (
    Lessons,
    aligned,
    heard_answers,
    heard_batches,
    lesson_batches,
    lesson_pixels,
    question_states,
    read_lessons,
    recalibrated,
)
from pocketvlm.distill.vlm.aligned import aligned_divergence, shared_spans, token_log_probabilities
from pocketvlm.distill.vlm.auxiliary import EmbeddingDistillation, info_nce, layer_states
from pocketvlm.distill.vlm.conversations import ConversationStream
from pocketvlm.distill.vlm.genrecal import Recalibrator, recalibration
from pocketvlm.distill.vlm.losses import token_divergence
from pocketvlm.distill.vlm.teachers import (
    BuiltinVlm,
    answer_ends,
    load_vlm_teacher,
    require_same_vocabulary,
    student_vocabulary,
)
from pocketvlm.distill.vlm.train import VlmTraining, train_vlm
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.students.vlm import build_vlm, save_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import VlmConfig
from pocketvlm.students.vlm.model import rows_of
from pocketvlm.teachers.vlm.base import Scored, completed

SIDE = 48
TEXTS = ["what is this", "a red dog", "ein bär und ein vogel", "blue cat yes no", "top left: bear; top right: dog"] * 4
LARGE, SMALL = train_vlm_tokenizer(TEXTS, 420, words=["bear", "vogel", "what"]), train_vlm_tokenizer(TEXTS, 330)
PAIRS = [("What is this?", "A red dog"), ("Is it?", "no"), ("Wo?", 'Ein "Bär" – 犬, ½')]


def _config(width: int, layers: int = 2) -> VlmConfig:
    decoder = {"width": width, "layers": layers, "heads": 4, "kv_heads": 2, "hidden": 2 * width, "context_length": 96}
    vision = {"backbone": "test_efficientnet", "size": SIDE}
    return VlmConfig.model_validate({"name": "tiny", "vision": vision, "connector_hidden": 32, "decoder": decoder})


def _pictures(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def teacher() -> BuiltinVlm:
    return BuiltinVlm(build_vlm(_config(64), LARGE, seed=1), "vlm:made", batch=2)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the built-in teacher ---------------------------------------------------------------------------------------------


def test_a_builtin_teacher_reads_what_its_model_gives(teacher: BuiltinVlm) -> None:
    model, pictures = teacher.model, _pictures()
    together = teacher.read(pictures, PAIRS)
    for place, (question, answer) in enumerate(PAIRS):
        talk = (model.tokenizer.question(question), model.tokenizer.answer(answer))
        rows = rows_of([[talk]], 80)
        with torch.no_grad():
            logits = model(pictures[place : place + 1], rows)
            hidden = model.hidden(pictures[place : place + 1], rows)[0]
        found = together[place]
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.hidden, hidden[: len(found.hidden)], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.visual_hidden, hidden[1 : model.prefix], rtol=1e-4, atol=1e-5)
        assert found.ids.tolist() == talk[1]
        assert len(found.hidden) == model.prefix + len(talk[0]) + len(talk[1]) - 1
        torch.testing.assert_close(teacher.head(found.answer_hidden), found.logits)
    said = teacher.answer(pictures, [question for question, _ in PAIRS], max_new_tokens=4)
    assert said == model.generate(pictures, [question for question, _ in PAIRS], max_new_tokens=4)


def test_builtin_teachers_have_names_and_refuse_what_is_no_picture_of_theirs(teacher: BuiltinVlm, tmp_path) -> None:  # type: ignore[no-untyped-def]
    save_vlm(teacher.model, tmp_path / "t")
    loaded = load_vlm_teacher(f"vlm:{tmp_path / 't'}", batch=1)
    assert loaded.fingerprint == teacher.fingerprint
    assert (loaded.vocab_size, loaded.width) == (teacher.model.tokenizer.vocab_size, 64)
    with pytest.raises(UnknownNameError, match="hf-vlm:FOLDER"):
        load_vlm_teacher("clip:x")
    with pytest.raises(UsageError, match="which only hf-vlm takes"):
        load_vlm_teacher(f"vlm:{tmp_path / 't'}", template="x")
    with pytest.raises(UsageError, match="takes 48 x 48"):
        teacher.answer(torch.zeros(1, 40, 40, 3, dtype=torch.uint8), ["What?"])
    with pytest.raises(UsageError, match="is empty"):
        teacher.read(_pictures(1), [("What?", '""')])


def test_another_vocabulary_is_refused_by_its_tokens_and_not_by_its_size(teacher: BuiltinVlm) -> None:
    same, other = build_vlm(_config(32), LARGE), build_vlm(_config(32), SMALL)
    require_same_vocabulary(same, teacher)
    with pytest.raises(UsageError, match=r"distill\.vlm\.aligned .* distill\.vlm\.genrecal"):
        require_same_vocabulary(other, teacher)
    # as many tokens, but others
    twin = train_vlm_tokenizer([text.upper().translate(str.maketrans("RD", "XZ")) for text in TEXTS], 420)
    alike = build_vlm(_config(32), twin)
    if alike.tokenizer.vocab_size == teacher.vocab_size:
        assert student_vocabulary(alike) != teacher.vocabulary
    with pytest.raises(UsageError, match="another vocabulary"):
        require_same_vocabulary(alike, teacher)
    with pytest.raises(UsageError, match=r"distill\.vlm\.aligned or distill\.vlm\.genrecal"):
        token_divergence(student=torch.zeros(2, 7), teacher=torch.zeros(2, 8))


# --- spans ------------------------------------------------------------------------------------------------------------


def _oracle_spans(own: list[int], other: list[int]) -> list[tuple[list[int], list[int]]]:
    """Token places of both for each stretch between places that both have reached."""
    reached = [end for end in dict.fromkeys(own) if end in other]
    spans, one, two = [], 0, 0
    for end in reached:
        first, second = own.index(end) + 1, other.index(end) + 1
        spans.append((list(range(one, first)), list(range(two, second))))
        one, two = first, second
    return spans


def test_characters_are_complete_with_their_last_byte() -> None:
    assert completed([(0, 1), (0, 1), (0, 1), (1, 4)], 4) == (0, 0, 1, 4, 5)
    # a token with the last byte of one character and the first of the next
    assert completed([(0, 1), (0, 2), (1, 2)], 2) == (0, 1, 2, 3)
    assert completed([(0, 4), (5, 8)], 9) == (4, 8, 10)


def test_ends_of_the_builtin_tokenizer_are_those_of_what_it_writes(teacher: BuiltinVlm) -> None:
    for _, answer in [*PAIRS, ("", "犬犬"), ("", "bären vogel"), ("", "ﬁsh ½")]:
        ends = answer_ends(teacher.model, answer)
        ids = teacher.model.tokenizer.answer(answer)
        assert len(ends) == len(ids)
        assert ends[-1] == len(answer) + 1
        assert list(ends) == sorted(ends)
        complete = {count for count in range(1, len(ids)) if ends[count - 1] > ([0, *ends])[count - 1]}
        for count in complete:
            written = teacher.model.tokenizer.decode(ids[:count])
            assert "\ufffd" not in written
            folded = teacher.model.tokenizer.decode(teacher.model.tokenizer.encode(answer[: ends[count - 1]]))
            assert written.rstrip() == folded.rstrip()


def test_spans_end_where_both_have_finished_a_character() -> None:
    cases = [
        ([3, 5, 9, 10], [5, 7, 9, 10]),
        ([1, 2, 3, 4], [3, 4]),
        ([0, 0, 1, 2, 3], [1, 1, 2, 3]),
        ([4, 5], [5]),
        ([2], [2]),
    ]
    found = shared_spans([own for own, _ in cases], [other for _, other in cases])
    expected = [span for own, other in cases for span in _oracle_spans(own, other)]
    assert found.number == len(expected)
    sides = [found.student.tolist(), found.teacher.tolist()]
    for number, tokens in enumerate(expected):
        for side in (0, 1):
            assert sides[side].count(number) == len(tokens[side]) >= 1
    assert all(side == sorted(side) for side in sides)
    assert [len(side) for side in sides] == [sum(len(case[side]) for case in cases) for side in (0, 1)]


def test_real_tokenizers_agree_at_least_where_words_end(teacher: BuiltinVlm) -> None:
    student = build_vlm(_config(32), SMALL)
    for _, answer in [*PAIRS, ("", "a red dog and a blue cat"), ("", "犬 bär")]:
        own, other = answer_ends(student, answer), answer_ends(teacher.model, answer)
        spans = shared_spans([own], [other])
        assert spans.number >= len(answer.replace(",", " ").split())
        assert set(spans.student.tolist()) == set(spans.teacher.tolist()) == set(range(spans.number))


@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_the_divergence_of_spans_is_that_of_two_outcomes(shift: float) -> None:
    ends = ([[3, 5, 9, 10], [2, 3]], [[5, 7, 9, 10], [0, 1, 2, 3]])
    spans = shared_spans(*ends)
    logits = [_random(len(spans.student), 11), _random(len(spans.teacher), 7, seed=1)]
    ids = [torch.arange(len(rows)) % 7 for rows in logits]
    # near certain of everything: products of 1 - 1e-17
    logits = [rows + shift * F.one_hot(number, rows.shape[1]) for rows, number in zip(logits, ids)]
    total, count = 0.0, 0
    place = [0, 0]
    for own, other in zip(*ends):
        for tokens in _oracle_spans(own, other):
            chances = []
            for side in (0, 1):
                product = 0.0
                for token in tokens[side]:
                    row = logits[side][place[side] + token].tolist()
                    number = int(ids[side][place[side] + token])
                    product += row[number] - math.log(sum(math.exp(value) for value in row))
                chances.append(math.exp(min(product, -1e-6)))
            q, p = chances
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            count += 1
        place = [place[0] + len(own), place[1] + len(other)]
    logs = [token_log_probabilities(rows, number) for rows, number in zip(logits, ids)]
    found = aligned_divergence(student=logs[0], teacher=logs[1], spans=spans)
    assert float(found) == pytest.approx(total / count, rel=1e-9, abs=1e-12)
    assert float(aligned_divergence(student=logs[0], teacher=logs[0], spans=spans._replace(teacher=spans.student))) == (
        pytest.approx(0, abs=1e-12)
    )


def test_gradients_of_spans_reach_the_student_and_are_numbers_everywhere() -> None:
    spans = shared_spans([[1, 2, 3, 4]], [[1, 2, 3, 4]])
    own = torch.tensor([0.0, -1e-9, -200.0, -0.7], requires_grad=True)
    other = torch.tensor([-0.5, -300.0, 0.0, -0.7], requires_grad=True)
    loss = aligned_divergence(student=own, teacher=other, spans=spans)
    loss.backward()
    assert torch.isfinite(loss)
    assert other.grad is None
    assert own.grad is not None
    assert torch.isfinite(own.grad).all()
    assert float(own.grad[2]) < 0  # more of what the teacher is sure of
    half = aligned_divergence(student=own.detach().half(), teacher=other.detach().half(), spans=spans)
    assert half.dtype == torch.float32


def test_a_merged_outcome_is_never_farther_than_the_whole_distribution() -> None:
    """With one token a span it is a lower bound of the KL over the vocabulary."""
    student, teacher = _random(6, 9) * 2, _random(6, 9, seed=1) * 2
    ids = torch.arange(6)
    ends = [list(range(1, 7))]
    merged = aligned_divergence(
        student=token_log_probabilities(student, ids),
        teacher=token_log_probabilities(teacher, ids),
        spans=shared_spans(ends, ends),
    )
    assert 0 < float(merged) < float(token_divergence(student=student, teacher=teacher))


def test_spans_of_other_texts_are_refused() -> None:
    with pytest.raises(UsageError, match="not of one text"):
        shared_spans([[2, 3]], [[2, 4]])
    with pytest.raises(UsageError, match="not of one text"):
        shared_spans([[2, 1, 3]], [[3]])
    with pytest.raises(UsageError, match="not of one text"):
        shared_spans([[]], [[3]])
    with pytest.raises(UsageError, match="1 answers of a student"):
        shared_spans([[3]], [])
    spans = shared_spans([[1, 2]], [[2]])
    with pytest.raises(UsageError, match="from the same answers"):
        aligned_divergence(student=torch.zeros(1), teacher=torch.zeros(1), spans=spans)


# --- the recalibrator -------------------------------------------------------------------------------------------------


def _recalibrator(width: int = 64) -> Recalibrator:
    return Recalibrator(_config(32).decoder, width, length=128, seed=3).double()


def test_the_recalibrator_is_two_llama_layers_between_linear_maps() -> None:
    made = _recalibrator()
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
    )
    llama = transformers.LlamaModel(config).double().eval()
    llama.norm = torch.nn.Identity()
    weights = {f"layers.{name}": value for name, value in made.blocks.state_dict().items()}
    missing, extra = llama.load_state_dict(weights, strict=False)
    assert (missing, extra) == (["embed_tokens.weight"], [])
    questions = [_random(5, 32), _random(9, 32, seed=1)]
    answers = [_random(3, 64, seed=2), _random(1, 64, seed=3)]
    with torch.no_grad():
        found = made(questions, answers)
        own = made([_random(4, 64), _random(2, 64, seed=1)], answers, projected=True)
        for question, answer, row in zip(questions, answers, found):
            joined = torch.cat([question, answer @ made.before.weight.T + made.before.bias])
            inner = llama(inputs_embeds=joined[None]).last_hidden_state[0]
            wide = inner @ made.after.weight.T + made.after.bias
            mean, spread = wide.mean(1, keepdim=True), wide.var(1, keepdim=True, correction=0)
            torch.testing.assert_close(
                row, ((wide - mean) / (spread + 1e-5).sqrt())[len(question) :], rtol=1e-6, atol=1e-6
            )
    assert [row.shape for row in found] == [row.shape for row in own] == [(3, 64), (1, 64)]
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), _recalibrator().state_dict().values()))


def _scored(count: int, answer: int, seed: int) -> Scored:
    hidden = _random(count + answer, 64, seed=seed)
    return Scored(
        ids=torch.arange(answer) + seed,
        ends=tuple(range(1, answer + 1)),
        logits=_random(answer, 13, seed=seed + 50) * 2,
        hidden=hidden,
        visual=torch.arange(1, 3),
    )


def test_recalibration_is_the_sum_over_teacher_answer_tokens() -> None:
    made, weight = _recalibrator(), _random(13, 64, seed=9)
    questions = [_random(4, 32, seed=20), _random(6, 32, seed=21)]
    teacher = [_scored(7, 3, 0), _scored(5, 2, 1)]
    found = recalibration(made, student=questions, teacher=teacher, head=lambda h: h @ weight.T)
    expected = dict.fromkeys(("answer", "divergence", "own_answer", "own_divergence"), 0.0)
    with torch.no_grad():
        for question, pair in zip(questions, teacher):
            count = len(pair.ids)
            zl = pair.hidden[-count:]
            for name, rows in (
                ("", made([question], [zl])[0]),
                ("own_", made([pair.hidden[:-count]], [zl], projected=True)[0]),
            ):
                for row, number, wanted in zip((rows @ weight.T).tolist(), pair.ids.tolist(), pair.logits.tolist()):
                    q = [math.exp(v) / sum(math.exp(w) for w in row) for v in row]
                    p = [math.exp(v) / sum(math.exp(w) for w in wanted) for v in wanted]
                    expected[f"{name}answer"] -= math.log(q[number]) / 5
                    expected[f"{name}divergence"] += sum(a * math.log(a / b) for a, b in zip(p, q)) / 5
    assert {name: float(value.detach()) for name, value in found.items()} == pytest.approx(expected)
    assert set(
        recalibration(made, student=questions, teacher=teacher, head=lambda h: h @ weight.T, regularise=False)
    ) == {
        "answer",
        "divergence",
    }


def test_recalibration_teaches_recalibrator_and_student_and_never_the_teacher() -> None:
    made, weight = _recalibrator(), _random(13, 64, seed=9)
    question = _random(4, 32).requires_grad_()
    pair = _scored(7, 3, 0)
    pair.hidden.requires_grad_()
    pair.logits.requires_grad_()
    sum(recalibration(made, student=[question], teacher=[pair], head=lambda h: h @ weight.T).values()).backward()  # type: ignore[union-attr]
    assert pair.hidden.grad is None
    assert pair.logits.grad is None
    assert question.grad is not None
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in made.parameters())


def test_sequences_that_do_not_fit_are_refused() -> None:
    made = Recalibrator(_config(32).decoder, 64, length=8)
    with pytest.raises(UsageError, match="has 9 tokens but the recalibrator has 8"):
        made([torch.zeros(6, 32)], [torch.zeros(3, 64)])
    with pytest.raises(UsageError, match="1 questions were given with 2 answers"):
        made([torch.zeros(6, 32)], [torch.zeros(3, 64)] * 2)


# --- through the loop -------------------------------------------------------------------------------------------------


def test_lessons_are_the_same_pairs_in_both_tokenizers(teacher: BuiltinVlm) -> None:
    student = build_vlm(_config(32), SMALL)
    pictures = _pictures()
    lessons = read_lessons(teacher, pictures, PAIRS)
    drawn, rows = next(lesson_batches(lessons, student, batch=5))
    assert drawn.pixels.shape == (5, SIDE, SIDE, 3)
    order = [next(i for i in range(3) if torch.equal(row, pictures[i])) for row in drawn.pixels]
    assert sorted(order[:3]) == [0, 1, 2]
    targets = [token for i in order for token in student.tokenizer.answer(PAIRS[i][1])]
    assert rows.targets.tolist() == targets
    for i, one in zip(order, drawn.scored):
        assert one.ids.tolist() == teacher.model.tokenizer.answer(PAIRS[i][1])
        torch.testing.assert_close(
            one.logits, teacher.read(pictures[i : i + 1], [PAIRS[i]])[0].logits, rtol=2e-2, atol=2e-2
        )
    hidden = student.hidden(drawn.pixels, rows)
    for i, found, whole in zip(order, question_states(hidden, rows), hidden):
        assert torch.equal(found, whole[: student.prefix + len(student.tokenizer.question(PAIRS[i][0])) - 1])
    with pytest.raises(UsageError, match="pack one pair a row"):
        question_states(hidden, rows._replace(turns=rows.turns.clamp(min=1)))
    with pytest.raises(UsageError, match="there is nothing to learn"):
        next(lesson_batches([], student, batch=2))
    with pytest.raises(UsageError, match="same pictures in both sizes"):
        read_lessons(teacher, pictures, PAIRS, shown=pictures[:2])


@pytest.mark.parametrize("kind", ["aligned", "recalibrated"])
def test_the_loop_trains_across_tokenizers(teacher: BuiltinVlm, kind: str) -> None:
    student = build_vlm(_config(32), SMALL, seed=0)
    lessons = read_lessons(teacher, _pictures(), PAIRS)
    recalibrator = Recalibrator(student.config.decoder, teacher.width) if kind == "recalibrated" else None
    before = None if recalibrator is None else recalibrator.before.weight.detach().clone()
    loss = aligned() if recalibrator is None else recalibrated(recalibrator, teacher.head)
    training = VlmTraining(steps=40, rate=3e-3, warmup=2, log_every=20)
    batches = lesson_batches(lessons, student, batch=3)
    history = train_vlm(student, batches, lesson_pixels, training, loss_of=loss, beside=recalibrator)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["token_accuracy"] > 0.5
    if recalibrator is not None:
        assert not torch.equal(recalibrator.before.weight, before)
        assert not any(weight.requires_grad for weight in teacher.model.parameters())


def test_the_teacher_changes_what_is_learnt(teacher: BuiltinVlm) -> None:
    """One step with and without it, from the same weights: other gradients, also for the recalibrated question."""
    lessons = read_lessons(teacher, _pictures(), PAIRS)
    moved = []
    student = build_vlm(_config(32), SMALL, seed=0).eval()
    recalibrator = Recalibrator(student.config.decoder, teacher.width)
    drawn, rows = next(lesson_batches(lessons, student, batch=3))
    losses = [aligned(0.0), aligned(1.0), recalibrated(recalibrator, teacher.head)]
    for loss in losses:
        student.zero_grad()
        loss(student, drawn, drawn.pixels, rows)[0].backward()
        grad = student.connector.second.weight.grad
        assert grad is not None
        moved.append(grad.clone())
    for one, two in itertools.combinations(moved, 2):
        assert not torch.allclose(one, two, rtol=1e-3)


def test_conversations_are_aligned_as_lessons_are(teacher: BuiltinVlm) -> None:
    """The same pairs by way of a stream of samples, whose teacher kept one number a token."""
    student, pictures = build_vlm(_config(32), SMALL, seed=0).eval(), _pictures()
    heard = dict(zip("abc", heard_answers(teacher, pictures, PAIRS)))
    samples = []
    for name, row, (question, answer) in zip("abc", pictures, PAIRS):
        data = io.BytesIO()
        Image.fromarray(row.numpy()).save(data, "png")
        turns = (Turn("user", question), Turn("assistant", answer))
        samples.append(Sample(name, ImageRef(data=data.getvalue()), conversation=turns))
    stream = ConversationStream(samples, student, BadSampleReport("refuse"), batch=3, seed=1)
    drawn, rows = next(heard_batches(stream, student, heard, torch.device("cpu")))
    found, _ = aligned(0.7)(student, drawn, lesson_pixels(drawn), rows)
    order = stream.chosen(0)
    lessons = read_lessons(teacher, pictures[order], [PAIRS[i] for i in order], half=False)
    ends = [answer_ends(student, PAIRS[i][1]) for i in order]
    spans = shared_spans(ends, [lesson.scored.ends for lesson in lessons])
    same = Lessons(pictures[order], tuple(lesson.scored for lesson in lessons), spans)
    expected, _ = aligned(0.7)(student, same, pictures[order], rows)
    torch.testing.assert_close(found, expected)
    assert not torch.isclose(found, aligned(0.0)(student, drawn, lesson_pixels(drawn), rows)[0])


# --- auxiliary embeddings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_predicted_embeddings_are_compared_number_by_number_and_picture_by_picture(count: int) -> None:
    made = EmbeddingDistillation(6, 5, 2, contrastive=0.3, seed=1).double()
    layers, target = [_random(count, 3, 6), _random(count, 3, 6, seed=1)], F.normalize(_random(count, 5, seed=2), dim=1)
    if count > 2:
        target[1] = target[0]  # the same picture twice
    smooth = contrastive = 0.0
    for predict, tokens in zip(made.predictors, layers):
        rows = []
        for one in tokens:
            seen = (one - one.mean(1, keepdim=True)) / (one.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
            weights = [math.exp(float((row @ predict.query).detach())) for row in seen]
            pooled = sum(w / sum(weights) * row for w, row in zip(weights, seen))
            inner = predict.first.weight @ pooled + predict.first.bias
            inner = torch.tensor(
                [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in inner.tolist()], dtype=torch.float64
            )
            rows.append((predict.second.weight @ inner + predict.second.bias).tolist())
        for row, wanted in zip(rows, target.tolist()):
            for a, b in zip(row, wanted):
                gap = abs(a - b)
                smooth += (gap**2 / 2 if gap < 1 else gap - 0.5) / (count * 5)

        def cosine(a: list[float], b: list[float]) -> float:
            return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))

        for row, wanted in zip(rows, target.tolist()):
            shares = [math.exp(math.exp(2.0) * cosine(row, other)) for other in target.tolist()]
            right = [share for share, other in zip(shares, target.tolist()) if other == wanted]
            contrastive -= math.log(sum(right) / sum(shares)) / count
    found = made(student=layers, teacher=target)
    assert float(found["smooth_l1"].detach()) == pytest.approx(smooth)
    assert float(found["contrastive"].detach()) == pytest.approx(0.3 * contrastive, abs=1e-12)


def test_the_scale_is_bounded_and_the_teacher_gets_no_gradient() -> None:
    made, wanted = _random(3, 4), _random(3, 4, seed=1)
    assert float(info_nce(made, wanted, torch.tensor(9.0))) == float(
        info_nce(made, wanted, torch.tensor(math.log(100.0) + 1))
    )
    objective = EmbeddingDistillation(6, 4, 1)
    tokens, target = torch.randn(3, 2, 6, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    sum(objective(student=[tokens], teacher=target).values()).backward()  # type: ignore[union-attr]
    assert target.grad is None
    assert tokens.grad is not None
    assert all(weight.grad is not None for weight in objective.parameters())


def test_inner_layers_are_those_of_the_last_pass_and_the_student_stays_as_it_is() -> None:
    student = build_vlm(_config(32, layers=3), SMALL).eval()
    rows = rows_of([[(student.tokenizer.question("a"), student.tokenizer.answer("b"))]] * 2, 12)
    with layer_states(student, [0, 2]) as states:
        with pytest.raises(UsageError, match="has not run"):
            states.visual(12)
        hidden = student.hidden(_pictures(2), rows)
        first, last = states.visual(12)
    torch.testing.assert_close(student.decoder.norm(last), hidden[:, 1 : student.prefix])
    assert not torch.allclose(first, last)
    objective = EmbeddingDistillation(32, 5, 2)
    sum(objective(student=[first, last], teacher=torch.randn(2, 5)).values()).backward()  # type: ignore[union-attr]
    assert student.decoder.layers[0].self_attn.q_proj.weight.grad is not None
    assert student.connector.first.weight.grad is not None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in student.modules())
    for wrong in ([], [0, 0], [3], [-1]):
        with pytest.raises(UsageError, match="different numbers from 0 to 2"), layer_states(student, wrong):
            pass
    with pytest.raises(UsageError, match="of 2 layers and width 5"):
        objective(student=[first], teacher=torch.randn(2, 5))
    with pytest.raises(UsageError, match="both of one batch"):
        objective(student=[first, last], teacher=torch.randn(3, 5))
