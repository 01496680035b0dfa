/**
 * Text of a model that answers in words: questions to ids by its template, ids to text while they come.
 * The tokenizer library has no byte fallback for pieces of this kind, so both ways are written here, as Python's
 * `tokenizers` does them.
 */
import type { VlmContract } from "./contract";
import { IntegrityError, UserError } from "./errors";
import { stripped } from "./tokenizer";

interface Json {
  type?: string;
  normalizers?: Json[];
  decoders?: Json[];
  pattern?: { String?: string };
  content?: string;
  prepend_scheme?: string;
  split?: boolean;
  replacement?: string;
  unk_id?: number;
  byte_fallback?: boolean;
  vocab?: [string, number][];
}

const SPACE = "▁";
const BYTE = /^<0x([0-9A-F]{2})>$/;

export class Words {
  private readonly pieces: string[];
  private readonly ids = new Map<string, number>();
  private readonly scores: number[];
  private readonly dropped: string[];
  private readonly unknown: number;
  private readonly unknownScore: number;
  private readonly longest: number;

  constructor(
    json: string,
    private readonly contract: VlmContract,
  ) {
    const file = JSON.parse(json) as { model: Json; normalizer: Json; pre_tokenizer: Json; decoder: Json; added_tokens: unknown[] };
    const { model, normalizer, pre_tokenizer: words, decoder } = file;
    const steps = normalizer?.normalizers ?? [];
    const kinds = [model, words, normalizer, ...steps.slice(0, 2), decoder, ...(decoder?.decoders ?? [])].map((part) => part?.type).join();
    if (
      kinds !== "Unigram,Metaspace,Sequence,NFKC,Lowercase,Sequence,ByteFallback,Metaspace" ||
      !model.byte_fallback || !words.split || words.prepend_scheme !== "always" || words.replacement !== SPACE ||
      steps.slice(2).some(({ type, content }) => type !== "Replace" || content !== "") || file.added_tokens.length
    ) {
      throw new IntegrityError("The model's tokenizer is of another kind than this app reads; use a matching release of the app.");
    }
    if (model.vocab!.length !== contract.vocab_size) {
      throw new IntegrityError("The tokenizer and the decoder have different vocabularies; export the bundle again.");
    }
    this.pieces = model.vocab!.map(([piece]) => piece);
    this.scores = model.vocab!.map(([, score]) => score);
    this.pieces.forEach((piece, id) => this.ids.set(piece, id));
    this.dropped = steps.slice(2).map(({ pattern }) => pattern!.String!);
    this.unknown = model.unk_id!;
    this.unknownScore = Math.min(...this.scores) - 10;
    this.longest = Math.max(...this.pieces.map((piece) => piece.length));
  }

  /** `<USER>` question `<ASSISTANT>` as ids. */
  promptIds(question: string): number[] {
    const { template, context_length, prefix } = this.contract;
    const parts = question.split(template.marker);
    if (parts.length > 2) {
      throw new UserError(`The question holds ${template.marker} ${parts.length - 1} times but one picture is given; write it once or not at all.`);
    }
    const text = stripped(parts.join(" "));
    if (!text) throw new UserError("The question is empty, so there is nothing to answer; type one.");
    if (!text.isWellFormed()) throw new UserError("The text holds half of a character; type it again.");
    const ids = [template.user, ...this.encode(text), template.assistant];
    const most = context_length - prefix - 1;
    if (ids.length > most) {
      throw new UserError(`The question has ${ids.length} tokens and this model takes ${most}; shorten it.`);
    }
    return ids;
  }

  /** Ids of a text, none of them special. */
  encode(text: string): number[] {
    // letter by letter, as the original lowers: no final sigma
    let folded = Array.from(text.normalize("NFKC"), (letter) => letter.toLowerCase()).join("");
    for (const quote of this.dropped) folded = folded.replaceAll(quote, "");
    if (!folded) return [];
    const spaced = folded.replaceAll(" ", SPACE);
    const words = spaced.startsWith(SPACE) ? spaced : SPACE + spaced;
    return words.match(/▁[^▁]*/g)!.flatMap((word) => this.spell(word));
  }

  /** The text of ids; special ones are left out, bytes that are no UTF-8 become replacement characters. */
  decode(ids: readonly number[]): string {
    const parts: string[] = [];
    let bytes: number[] = [];
    const flush = () => {
      if (bytes.length) parts.push(fromBytes(bytes));
      bytes = [];
    };
    for (const id of ids) {
      if (id < this.contract.template.first_text) continue;
      const piece = this.pieces[id]!;
      if (this.isByte(id)) bytes.push(parseInt(piece.slice(3, 5), 16));
      else {
        flush();
        parts.push(piece);
      }
    }
    flush();
    return parts.map((part, i) => part.replaceAll(SPACE, i ? " " : "")).join("");
  }

  isByte(id: number): boolean {
    return BYTE.test(this.pieces[id]!);
  }

  /** The best sum of scores; of equal ones that whose last piece begins first, as in the original. */
  private spell(word: string): number[] {
    const best: { score: number; from: number; id: number }[] = Array(word.length + 1);
    best[0] = { score: 0, from: 0, id: -1 };
    for (let from = 0, width = 0; from < word.length; from += width) {
      width = word.codePointAt(from)! > 0xffff ? 2 : 1;
      let single = false;
      const offer = (end: number, id: number, own: number) => {
        const score = own + best[from]!.score;
        if (!best[end] || score > best[end].score) best[end] = { score, from, id };
      };
      for (let end = from + width; end <= Math.min(word.length, from + this.longest); end++) {
        const id = this.ids.get(word.slice(from, end));
        if (id === undefined) continue;
        offer(end, id, this.scores[id]!);
        single ||= end === from + width;
      }
      if (!single) offer(from + width, this.unknown, this.unknownScore);
    }
    const found: number[][] = [];
    for (let end = word.length; end > 0; end = best[end]!.from) {
      const { id, from } = best[end]!;
      found.push(id === this.unknown ? this.bytes(word.slice(from, end)) : [id]);
    }
    return found.reverse().flat();
  }

  private bytes(letter: string): number[] {
    const names = Array.from(new TextEncoder().encode(letter), (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
    const ids = names.map((name) => this.ids.get(name));
    return ids.every((id) => id !== undefined) ? ids : [this.unknown];
  }
}

/** Text of ids that come one after the other; the pieces, joined, are `Words.decode` of all. */
export class Pieces {
  private readonly ids: number[] = [];
  private sent = 0;

  constructor(private readonly words: Words) {}

  /** What can be said now. A letter spelled in bytes is held back until something else follows. */
  add(id: number): string {
    this.ids.push(id);
    return this.words.isByte(id) ? "" : this.rest();
  }

  /** All that was held back. */
  rest(): string {
    const whole = this.words.decode(this.ids);
    const piece = whole.slice(this.sent);
    this.sent = whole.length;
    return piece;
  }
}

function fromBytes(bytes: number[]): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return "\ufffd".repeat(bytes.length);
  }
}
