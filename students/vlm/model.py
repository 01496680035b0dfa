"""A generative student: vision tower, connector, decoder, tokenizer; what it is trained with and how it answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.build import seeded
from pocketvlm.students.vlm.condense import check_reduction, condense, look
from pocketvlm.students.vlm.config import Reduction, VlmConfig
from pocketvlm.students.vlm.connectors import Fusion, build_connector
from pocketvlm.students.vlm.decoder import Cached, Decoder
from pocketvlm.students.vlm.dropping import Asking, layer_counts, run
from pocketvlm.students.vlm.reduce import even_places
from pocketvlm.students.vlm.tokenizer import BOS, EOS, PAD, VlmTokenizer
from pocketvlm.students.vlm.vision import VisionTower

MARKER = "<image>"


class Rows(NamedTuple):
    """Texts about B pictures, several conversations to a row, each of which sees the picture and itself alone.

    ids: int64 [B, T]. turns: int64 [B, T], which conversation of its row a token belongs to, -1 at padding.
    positions: int64 [B, T], counted from the picture's end anew for each conversation.
    places: int64 [N], the places of the flattened [B * T] whose next token belongs to an answer; targets: int64 [N],
    those tokens.
    """

    ids: Tensor
    turns: Tensor
    positions: Tensor
    places: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(*(value.to(device, non_blocking=True) for value in self))


class Seen:
    """What the tower makes of pictures, kept to be used again with other settings of what follows.

    features: [B, N, C]. scores: of the tokens, [B, N] each, by `Reduction.score`.
    """

    def __init__(self, features: Tensor, scores: dict[str, Tensor]) -> None:
        self.features, self.scores = features, scores

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, index: Sequence[int]) -> Seen:
        """Those pictures, in that order."""
        picked = list(index)
        return Seen(self.features[picked], {name: value[picked] for name, value in self.scores.items()})


class Shown(NamedTuple):
    """A picture for the decoder.

    tokens: [B, K, W]. places: int64 [B, K], rising: the position of each behind `<BOS>`, of a picture that has all its
    tokens. fused: keys and values of `Fusion.picture`, None with other connectors.
    """

    tokens: Tensor
    places: Tensor
    fused: tuple[Tensor, Tensor] | None


class Vlm(nn.Module):
    """Answers questions about one picture. Make it with `build_vlm`.

    The sequence is `<BOS>`, the picture's K tokens, the text. `<BOS>` and picture see each other both ways, as in
    PaliGemma (arXiv:2407.07726); the text is causal. With a `reduction` fewer tokens of the picture follow, and
    `picture`, `hidden`, `forward`, `prefill` and `generate` all obey it.
    """

    def __init__(self, config: VlmConfig, tokenizer: VlmTokenizer, *, load_weights: bool = True) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.vision = VisionTower(config.vision, load_weights=load_weights)
        licences = (*config.licences, *(row for row in self.vision.licences if row not in config.licences))
        self.config = config = config.model_copy(update={"vision": self.vision.config, "licences": licences})
        self.connector = build_connector(config, self.vision)
        self.decoder = Decoder(config.decoder, tokenizer.vocab_size)
        if config.decoder.context_length < 1 + self.connector.span + 8:
            raise UsageError(
                f"decoder.context_length {config.decoder.context_length} leaves no room for text after the picture's "
                f"{1 + self.connector.span} places; give {self.connector.span + 33} or more, or a smaller picture"
            )
        self.reduce_tokens(config.reduction)

    def reduce_tokens(self, reduction: Reduction | None) -> None:
        """Leave visual tokens out from now on, or none; saved with the model, and taken back by another call.

        Raises:
            UsageError: the model cannot do this (`condense.check_reduction`).
        """
        if reduction is not None:
            check_reduction(reduction, self.vision, self.connector, self.config.decoder.layers)
        self.config = self.config.model_copy(update={"reduction": reduction})

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are, and everything that is given to the model must be."""
        return self.decoder.embed_tokens.weight.device

    @property
    def reduction(self) -> Reduction | None:
        return self.config.reduction

    @property
    def counts(self) -> tuple[int, ...]:
        """Visual tokens in each layer of the decoder."""
        return layer_counts(self.reduction, self.connector.tokens, self.config.decoder.layers)

    @property
    def prefix(self) -> int:
        """Places before the text: `<BOS>` and the picture, as many as go into the decoder's first layer."""
        return 1 + self.counts[0]

    @property
    def renumbers(self) -> bool:
        """Whether tokens are turned by their place among those that are there, not among all."""
        return self.reduction is not None and self.reduction.positions == "renumbered"

    @property
    def text_start(self) -> int:
        """Position of the first token of the text; `prefix` where nothing is left out."""
        return self.prefix if self.renumbers else 1 + self.connector.span

    @property
    def back(self) -> tuple[int, ...]:
        """For each layer, how far before its position a token of the text lies in the cache (`Decoder.step`)."""
        return tuple(self.text_start - 1 - count for count in self.counts)

    def for_export(self) -> Vlm:
        """A copy that answers the same by `picture` and `Decoder.step` alone, with places as positions.

        Where a reduction keeps positions, the copy's rotary tables say at each place of the cache what is turned there,
        and its context is shorter by the tokens left out. The copy is to be lowered, not to be saved: tables are no
        weights. Where nothing has to change, the model itself.

        Raises:
            UsageError: tokens are dropped inside the decoder, the question is fused with the picture, or positions are
                kept that differ from picture to picture.
        """
        reduction = self.reduction
        moving = reduction is not None and reduction.method in ("top", "rows", "merge") and not self.renumbers
        if isinstance(self.connector, Fusion) or moving or (reduction is not None and reduction.inside):
            what = "connector 'fusion'" if reduction is None else f"reduction {reduction.method!r}"
            raise UsageError(
                f"a model with {what} and positions {'renumbered' if self.renumbers else 'kept'} is not a picture's "
                "embeddings before a decoder with places as positions, which is what is exported; answers would be "
                "others, so choose 'pool', 'even' or 'connector', or 'top', 'rows' or 'merge' with renumbered positions"
            )
        gap = self.back[0]
        if gap == 0:
            return self
        baked = copy.deepcopy(self)
        room = self.config.decoder.context_length - gap
        size = self.config.vision.size
        with torch.no_grad():
            blank = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=self.decoder.cos.device)
            places = self.show(self.look(blank)).places[0] + 1
        behind = torch.arange(self.text_start, self.config.decoder.context_length, device=places.device)
        at = torch.cat([places.new_zeros(1), places, behind])
        baked.decoder.cos, baked.decoder.sin = self.decoder.cos[at], self.decoder.sin[at]
        decoder = self.config.decoder.model_copy(update={"context_length": room})
        assert reduction is not None
        again = reduction.model_copy(update={"positions": "renumbered"})
        baked.config = self.config.model_copy(update={"decoder": decoder, "reduction": again})
        baked.decoder.config = decoder
        return baked

    def look(self, pixels: Tensor | Seen, scores: Sequence[str] | None = None) -> Seen:
        """What the tower sees of uint8 [B, S, S, 3], with the scores named; those that `reduction` needs where None.

        What was seen before is given back as it is.
        """
        if isinstance(pixels, Seen):
            return pixels
        if scores is None:
            scores = (self.reduction.score,) if self.reduction is not None and self.reduction.scored else ()
        return Seen(*look(self.vision, pixels, tuple(scores)))

    def show(self, seen: Seen, keep: int | None = None) -> Shown:
        """The visual tokens that go into the decoder; keep: another number, of a connector that gives several."""
        if keep is None:
            own = self.reduction is not None and self.reduction.method == "connector"
            keep = self.reduction.keep if own and self.reduction is not None else self.connector.tokens
        fused = None
        if isinstance(self.connector, Fusion):
            tokens, keys, values = self.connector.picture(seen.features)
            fused = (keys, values)
        else:
            tokens = self.connector(seen.features, keep)
        if self.reduction is not None and self.reduction.method != "connector":
            tokens, places = condense(self.reduction, tokens, seen.scores)
        elif self.connector.gridded and keep < self.connector.tokens:
            sides = (round(count**0.5) for count in (self.connector.tokens, keep))
            places = even_places(*sides).to(tokens.device).expand(len(tokens), -1)
        else:
            # of a fusion the tokens come behind the places that it has read
            first = self.connector.span - self.connector.tokens
            places = torch.arange(first, first + keep, device=tokens.device).expand(len(tokens), -1)
        return Shown(tokens, places, fused)

    def picture(self, pixels: Tensor | Seen) -> Tensor:
        """uint8 [B, S, S, 3] to the embeddings of the prefix, [B, 1 + K, W]."""
        return self._begun(self.show(self.look(pixels)).tokens)

    def _begun(self, tokens: Tensor) -> Tensor:
        begin = self.decoder.embed_tokens(torch.full((1, 1), BOS, device=tokens.device))
        return torch.cat([begin.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)

    def forward(self, pixels: Tensor | Seen, rows: Rows) -> Tensor:
        """Logits [N, V] of the tokens `rows.targets`."""
        hidden = self.hidden(pixels, rows)[:, -rows.ids.shape[1] :]
        return self.decoder.logits(hidden.flatten(0, 1)[rows.places])

    def hidden(self, pixels: Tensor | Seen, rows: Rows) -> Tensor:
        """Hidden states [B, 1 + K + T, W] of picture and texts, K being the visual tokens of the last layer.

        In training a connector that gives several numbers of tokens is asked for one of them, drawn from torch's
        generator, whatever number `reduction` names.

        Raises:
            UsageError: rows that are longer than the decoder's context.
        """
        sizes, drawn = self.config.connector_drawn or self.connector.sizes, None
        start = self.text_start
        if (
            self.training
            and len(self.connector.sizes) > 1
            and (self.reduction is None or self.reduction.method == "connector")
        ):
            drawn = sizes[int(torch.randint(len(sizes), ()))]
            start = 1 + self.connector.span
        room = self.config.decoder.context_length - start
        if rows.ids.shape[1] > room:
            raise UsageError(
                f"rows of {rows.ids.shape[1]} tokens were given, but beside the picture the decoder has places for "
                f"{room}; later ones would have no position, so make shorter rows or raise decoder.context_length"
            )
        order = torch.arange(rows.ids.shape[1], device=rows.ids.device)
        text = (rows.turns[:, :, None] == rows.turns[:, None, :]) & (order[:, None] >= order)
        answers = _answers(rows)
        asked = (rows.turns >= 0) & ~answers
        # a device is waited for only where something is dropped
        inside = self.reduction is not None and self.reduction.inside
        asking = _asking(rows, asked) if inside else None
        shown = self.show(self.look(pixels), drawn)
        return self._run(shown, rows.ids, rows.positions, text, asked, asking, cached=False)[0]

    def _run(
        self,
        shown: Shown,
        ids: Tensor,
        at: Tensor,
        text: Tensor,
        asked: Tensor,
        asking: Asking | None,
        *,
        cached: bool,
    ) -> Cached:
        """The decoder over picture and text. at: int64 [B, T], positions from the text's start. text: which token of
        it sees which. asked: bool [B, T], the tokens of questions."""
        words = self.decoder.embed_tokens(ids).to(shown.tokens.dtype)
        if shown.fused is not None and isinstance(self.connector, Fusion):
            words = torch.where(asked[:, :, None], self.connector.fuse(*shown.fused, words, at, text), words)
        x = torch.cat([self._begun(shown.tokens), words], dim=1)
        begin = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        positions = torch.cat([begin, shown.places + 1, at + self.text_start], dim=1)
        number = shown.tokens.shape[1]
        counts, back = self.counts, self.back
        if number != counts[0]:
            # a number drawn in training
            counts, back = (number,) * len(counts), (self.text_start - 1 - number,) * len(counts)
        method = self.reduction.method if self.reduction is not None and self.reduction.inside else ""
        return run(
            self.decoder, x, positions, text, counts, asking, back=back, method=method, renumber=self.renumbers,
            cached=cached,
        )  # fmt: skip

    def prefill(self, shown: Shown, ids: Tensor, length: Tensor) -> Cached:
        """Read picture and questions: the first step of an answer, of static shape.

        Args:
            ids: int64 [B, T], padded behind. length: int64 [B], tokens of each question.

        Returns the hidden state of each question's last token [B, W], and keys and values for `Decoder.step`, whose
        next token of row i is at position `text_start` + length[i]; pass it `back` and `renumbers`.
        """
        at = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        valid = at < length[:, None]
        asking = Asking(length[:, None] - 1, torch.ones_like(length[:, None], dtype=torch.float32), valid)
        causal = (at[:1, :, None] >= at[:1, None, :]).contiguous()
        hidden, keys, values = self._run(shown, ids, at, causal, valid, asking, cached=True)
        text = hidden[:, -ids.shape[1] :]
        last = (length - 1)[:, None, None].expand(-1, 1, text.shape[2])
        return text.gather(1, last)[:, 0], keys, values

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a question; `<image>` may stand in it once, where LLaVA's prompts have it, and is left out.

        Raises:
            UsageError: the marker twice, no question beside it, or more than the context holds with one token more.
        """
        if prompt.count(MARKER) > 1:
            raise UsageError(
                f"the prompt holds {MARKER} {prompt.count(MARKER)} times but one picture is given; write it once or "
                "not at all"
            )
        text = prompt.replace(MARKER, " ").strip()
        if not text:
            raise UsageError("the prompt asks nothing, so there is nothing to answer; write a question")
        ids = self.tokenizer.question(text)
        room = self.config.decoder.context_length - self.text_start - 1
        if len(ids) > room:
            raise UsageError(
                f"the prompt has {len(ids)} tokens but the cache holds {room} beside the picture and one token of the "
                "answer; shorten it, or raise decoder.context_length of a student to be trained"
            )
        return ids

    @torch.no_grad()
    def generate(self, pixels: Tensor | Seen, prompts: Sequence[str], *, max_new_tokens: int = 32) -> list[str]:
        """One greedy answer for each picture and prompt, over a static cache; shorter where the cache is full.

        Args:
            pixels: uint8 [B, S, S, 3], on the model's device, or what `look` saw of them. prompts: B of them.

        Raises:
            UsageError: another number of prompts than pictures, or as `prompt_ids`.
        """
        answers = self.answer_ids(pixels, prompts, max_new_tokens=max_new_tokens)
        return [self.tokenizer.decode(said[:-1] if said[-1:] == [EOS] else said) for said in answers]

    @torch.no_grad()
    def answer_ids(self, pixels: Tensor | Seen, prompts: Sequence[str], *, max_new_tokens: int = 32) -> list[list[int]]:
        """Ids of the answers of `generate`, the end token included where the model gave it."""
        if len(prompts) != len(pixels) or not prompts:
            raise UsageError(
                f"{len(prompts)} prompts were given for {len(pixels)} pictures; answers could not be told apart, so "
                "give one prompt for each picture"
            )
        asked = [self.prompt_ids(prompt) for prompt in prompts]
        device = self.decoder.embed_tokens.weight.device
        longest = max(map(len, asked))
        ids = torch.tensor([one + [PAD] * (longest - len(one)) for one in asked], device=device)
        length = torch.tensor([len(one) for one in asked], device=device)
        last, keys, values = self.prefill(self.show(self.look(pixels)), ids, length)
        said: list[Tensor] = []
        open_ = torch.ones(len(ids), dtype=torch.bool, device=device)
        room = self.config.decoder.context_length - longest - self.text_start
        for step in range(min(max_new_tokens, room)):
            token = self.decoder.logits(last).argmax(-1)
            token = torch.where(open_, token, PAD)
            said.append(token)
            open_ = open_ & (token != EOS)
            if not open_.any():
                break
            x = self.decoder.embed_tokens(token)[:, None].to(last.dtype)
            at = (self.text_start + length + step)[:, None]
            hidden, keys, values = self.decoder.step(x, at, keys, values, back=self.back, renumber=self.renumbers)
            last = hidden[:, 0]
        answers = torch.stack(said, dim=1).tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in answers]


def _answers(rows: Rows) -> Tensor:
    """bool [B, T], the tokens of answers: each is the next one of a place whose next token belongs to an answer."""
    batch, length = rows.ids.shape
    before = torch.zeros(batch * length, dtype=torch.bool, device=rows.ids.device)
    before = before.index_fill(0, rows.places, True).view(batch, length)
    follows = before[:, :-1] & (rows.turns[:, 1:] == rows.turns[:, :-1])
    return torch.cat([torch.zeros_like(before[:, :1]), follows], dim=1)


def _asking(rows: Rows, asked: Tensor) -> Asking:
    """The last tokens of all questions of a row, at equal weights, as many places as the row with most of them has."""
    last = torch.zeros_like(asked).flatten().index_fill(0, rows.places, True).view_as(asked) & asked
    weights, places = last.float().topk(max(int(last.sum(dim=1).max()), 1), dim=1)
    return Asking(places, weights / weights.sum(dim=1, keepdim=True).clamp(min=1), asked)


def build_vlm(
    config: VlmConfig, tokenizer_json: bytes, *, seed: int = 0, load_weights: bool = True, device: str = "cpu"
) -> Vlm:
    """A new model in training mode, float32.

    Args:
        tokenizer_json: of `train_vlm_tokenizer`; its vocabulary decides the size of the embedding.
        seed: equal seeds give equal weights whatever the global generators hold, and leave those untouched.
        load_weights: False leaves `vision.weights` unread (a state dict follows); of a CLIP student's tower whose
            `vision.origin` is not written yet the folder is read all the same, since it says what to build.
        device: "cpu", or "meta" for shapes without data, to count the parameters of a size.

    Raises:
        UnknownNameError: unknown timm model. UsageError: a configuration or tokenizer that cannot work.
        MissingExtraError: the package that holds the pretrained weights is absent.
        IntegrityError, VersionError: of a CLIP student's folder, as `students.load_student`.
    """
    tokenizer = VlmTokenizer(tokenizer_json)
    with seeded(seed, "vlm"), torch.device(device):
        return Vlm(config, tokenizer, load_weights=load_weights and device != "meta")


def rows_of(conversations: Sequence[Sequence[tuple[list[int], list[int]]]], length: int) -> Rows:
    """Pack one conversation after the other into rows.

    Args:
        conversations: for each picture its conversations of one question and one answer, as ids
            (`VlmTokenizer.question`, `.answer`). Those that do not fit any more are left out, but never the first.
        length: T, of every row.

    Raises:
        UsageError: a first conversation longer than a row.
    """
    # lists, because thousands of small tensors would cost more than the questions
    ids, turns, positions = ([[filler] * length for _ in conversations] for filler in (PAD, -1, 0))
    places: list[int] = []
    targets: list[int] = []
    for row, talks in enumerate(conversations):
        start = 0
        for turn, (question, answer) in enumerate(talks):
            # the last token of an answer is only ever predicted
            said = [*question, *answer[:-1]]
            end = start + len(said)
            if end > length:
                if turn == 0:
                    raise UsageError(
                        f"a question with its answer has {len(said)} tokens but a row holds {length}; nothing of it "
                        "could be learnt, so raise the length of rows or shorten the text"
                    )
                continue
            ids[row][start:end] = said
            turns[row][start:end] = [turn] * len(said)
            positions[row][start:end] = range(len(said))
            first = row * length + start + len(question) - 1
            places += range(first, first + len(answer))
            targets += answer
            start = end
    return Rows(*(torch.tensor(values) for values in (ids, turns, positions, places, targets)))
