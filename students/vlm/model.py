"""A generative student: vision tower, connector, decoder, tokenizer; what it is trained with and how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.build import seeded
from pocketvlm.students.vlm.config import VlmConfig
from pocketvlm.students.vlm.decoder import Decoder
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


class Connector(nn.Module):
    """Features [B, K, C] to decoder embeddings [B, K, W]: standardised, two layers with GELU, a learnt place each.

    LLaVA's MLP (arXiv:2310.03744) after a layer norm, because levels of several depths differ in size; the norm and
    the places are ours.
    """

    def __init__(self, width: int, hidden: int, out: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, out)
        self.places = nn.Parameter(torch.zeros(tokens, out))
        nn.init.normal_(self.places, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(self.norm(features)))) + self.places


class Vlm(nn.Module):
    """Answers questions about one picture. Make it with `build_vlm`.

    The sequence is `<BOS>`, the picture's K tokens, the text. `<BOS>` and picture see each other both ways, as in
    PaliGemma (arXiv:2407.07726); the text is causal.
    """

    def __init__(self, config: VlmConfig, tokenizer: VlmTokenizer, *, load_weights: bool = True) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = VisionTower(config.vision, load_weights=load_weights)
        self.connector = Connector(self.vision.width, config.connector_hidden, config.decoder.width, self.vision.tokens)
        self.decoder = Decoder(config.decoder, tokenizer.vocab_size)
        if config.decoder.context_length < self.prefix + 8:
            raise UsageError(
                f"decoder.context_length {config.decoder.context_length} leaves no room for text after the picture's "
                f"{self.prefix} places; give {self.prefix + 32} or more, or a smaller picture"
            )

    @property
    def prefix(self) -> int:
        """Places before the text: `<BOS>` and the picture."""
        return 1 + self.vision.tokens

    def picture(self, pixels: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to the embeddings of the prefix, [B, 1 + K, W]."""
        seen = self.connector(self.vision(pixels))
        begin = self.decoder.embed_tokens(torch.full((1, 1), BOS, device=seen.device))
        return torch.cat([begin.to(seen.dtype).expand(len(seen), -1, -1), seen], dim=1)

    def forward(self, pixels: Tensor, rows: Rows) -> Tensor:
        """Logits [N, V] of the tokens `rows.targets`."""
        hidden = self.hidden(pixels, rows)[:, self.prefix :]
        return self.decoder.logits(hidden.flatten(0, 1)[rows.places])

    def hidden(self, pixels: Tensor, rows: Rows) -> Tensor:
        """Hidden states [B, 1 + K + T, W] of picture and texts.

        Raises:
            UsageError: rows that are longer than the decoder's context.
        """
        room = self.config.decoder.context_length - self.prefix
        if rows.ids.shape[1] > room:
            raise UsageError(
                f"rows of {rows.ids.shape[1]} tokens were given, but beside the picture the decoder has places for "
                f"{room}; later ones would have no position, so make shorter rows or raise decoder.context_length"
            )
        prefix, text = self.picture(pixels), self.decoder.embed_tokens(rows.ids)
        x = torch.cat([prefix, text.to(prefix.dtype)], dim=1)
        ahead = torch.arange(self.prefix, device=x.device).expand(len(x), -1)
        positions = torch.cat([ahead, rows.positions + self.prefix], dim=1)
        return self.decoder(x, positions, self._visible(rows))

    def _visible(self, rows: Rows) -> Tensor:
        """bool [B, 1, L, L]: all see the prefix, and tokens of one conversation those before them."""
        batch, length = rows.ids.shape
        whole = self.prefix + length
        same = rows.turns[:, :, None] == rows.turns[:, None, :]
        order = torch.arange(length, device=rows.ids.device)
        visible = torch.zeros(batch, whole, whole, dtype=torch.bool, device=rows.ids.device)
        visible[:, :, : self.prefix] = True
        visible[:, self.prefix :, self.prefix :] = same & (order[:, None] >= order)
        return visible[:, None]

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
        room = self.config.decoder.context_length - self.prefix - 1
        if len(ids) > room:
            raise UsageError(
                f"the prompt has {len(ids)} tokens but the cache holds {room} beside the picture and one token of the "
                "answer; shorten it, or raise decoder.context_length of a student to be trained"
            )
        return ids

    @torch.no_grad()
    def generate(self, pixels: Tensor, prompts: Sequence[str], *, max_new_tokens: int = 32) -> list[str]:
        """One greedy answer for each picture and prompt, over a static cache; shorter where the cache is full.

        Args:
            pixels: uint8 [B, S, S, 3], on the model's device. prompts: B of them.

        Raises:
            UsageError: another number of prompts than pictures, or as `prompt_ids`.
        """
        if len(prompts) != len(pixels) or not prompts:
            raise UsageError(
                f"{len(prompts)} prompts were given for {len(pixels)} pictures; answers could not be told apart, so "
                "give one prompt for each picture"
            )
        asked = [self.prompt_ids(prompt) for prompt in prompts]
        device = self.decoder.embed_tokens.weight.device
        longest = max(map(len, asked))
        ids = torch.tensor([one + [PAD] * (longest - len(one)) for one in asked], device=device)
        length = torch.tensor([self.prefix + len(one) for one in asked], device=device)
        prefix = self.picture(pixels)
        x = torch.cat([prefix, self.decoder.embed_tokens(ids).to(prefix.dtype)], dim=1)
        positions = torch.arange(x.shape[1], device=device).expand(len(x), -1)
        keys, values = (part.to(x.dtype) for part in self.decoder.empty_cache(len(x)))
        hidden, keys, values = self.decoder.step(x, positions, keys, values, self.prefix - 1)
        last = hidden[torch.arange(len(x), device=device), length - 1]
        said: list[Tensor] = []
        open_ = torch.ones(len(x), dtype=torch.bool, device=device)
        room = self.config.decoder.context_length - longest - self.prefix
        for step in range(min(max_new_tokens, room)):
            token = self.decoder.logits(last).argmax(-1)
            token = torch.where(open_, token, PAD)
            said.append(token)
            open_ = open_ & (token != EOS)
            if not open_.any():
                break
            x = self.decoder.embed_tokens(token)[:, None].to(x.dtype)
            hidden, keys, values = self.decoder.step(x, (length + step)[:, None], keys, values)
            last = hidden[:, 0]
        answers = torch.stack(said, dim=1).tolist()
        return [self.tokenizer.decode(row[: row.index(EOS)] if EOS in row else row) for row in answers]


def build_vlm(
    config: VlmConfig, tokenizer_json: bytes, *, seed: int = 0, load_weights: bool = True, device: str = "cpu"
) -> Vlm:
    """A new model in training mode, float32.

    Args:
        tokenizer_json: of `train_vlm_tokenizer`; its vocabulary decides the size of the embedding.
        seed: equal seeds give equal weights whatever the global generators hold, and leave those untouched.
        load_weights: False leaves `vision.weights` unread (a state dict follows).
        device: "cpu", or "meta" for shapes without data, to count the parameters of a size.

    Raises:
        UnknownNameError: unknown timm model. UsageError: a configuration or tokenizer that cannot work.
        MissingExtraError: the package that holds the pretrained weights is absent.
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
