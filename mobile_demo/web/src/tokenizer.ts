/** Strings to the ids that a text graph takes: the bundle's tokenizer.json under the contract's lengths. */
import { Tokenizer as Library } from "@huggingface/tokenizers";
import type { TextSpec } from "./contract";
import { IntegrityError, UserError } from "./errors";

/** The part of tokenizer.json in which the library differs from the one that the model was trained with. */
interface Normalizer {
  type?: string;
  lowercase?: boolean;
  handle_chinese_chars?: boolean;
  normalizers?: Normalizer[];
}

// Han characters beyond the first plane, as the original's clean-up knows them; the library sees half of each
const FAR_HAN = /[\u{20000}-\u{2A6DF}\u{2A700}-\u{2B81F}\u{2B920}-\u{2CEAF}\u{2F800}-\u{2FA1F}]/gu;

// what Python calls white space; JavaScript counts U+FEFF too and leaves out the separators below U+0020
const WHITE = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]";
const EDGES = new RegExp(`^${WHITE}+|${WHITE}+$`, "g");
const NOTHING = "There is nothing to read in an empty text; type a word.";

/** Python's `strip`. */
export const stripped = (text: string) => text.replace(EDGES, "");

export class Tokenizer {
  private readonly library: Library;
  private readonly before: number[];
  private readonly after: number[];
  private readonly lowers: boolean;
  private readonly spacesHan: boolean;

  constructor(
    json: string,
    private readonly spec: TextSpec,
  ) {
    const file = JSON.parse(json) as { normalizer?: Normalizer | null };
    const steps = file.normalizer ? [file.normalizer, ...(file.normalizer.normalizers ?? [])] : [];
    this.lowers = steps.some(({ type, lowercase }) => type === "Lowercase" || lowercase === true);
    this.spacesHan = steps.some((step) => step.handle_chinese_chars === true);
    // a file may carry its own padding and truncation; the contract alone decides both
    this.library = new Library({ ...file, padding: null, truncation: null }, {});
    const plain = this.ordinary("a");
    const full = this.library.encode("a").ids;
    const start = full.findIndex((_, i) => plain.every((id, k) => full[i + k] === id));
    if (start < 0) throw new IntegrityError("The tokenizer changes what it encloses; its ids cannot be cut to length.");
    this.before = full.slice(0, start);
    this.after = full.slice(start + plain.length);
    if (this.before.length + this.after.length >= spec.context_length) {
      throw new IntegrityError(`A context of ${spec.context_length} tokens has no room beside the special tokens.`);
    }
  }

  /** int32 [context_length]: cut so that a closing special token stays, padded on the right. */
  encode(text: string): Int32Array {
    if (!stripped(text)) throw new UserError(NOTHING);
    if (!text.isWellFormed()) throw new UserError("The text holds half of a character; type it again.");
    const room = this.spec.context_length - this.before.length - this.after.length;
    const ids = [...this.before, ...this.ordinary(text).slice(0, room), ...this.after];
    if (ids.some((id) => id >= this.spec.vocab_size)) {
      throw new IntegrityError("The tokenizer gives ids outside the model's vocabulary; it belongs to another model.");
    }
    if (ids.every((id) => id === this.spec.pad_id)) throw new UserError(NOTHING);
    return new Int32Array(this.spec.context_length).fill(this.spec.pad_id).map((pad, i) => ids[i] ?? pad);
  }

  private ordinary(text: string): number[] {
    return this.library.encode(this.mended(text), { add_special_tokens: false }).ids;
  }

  private mended(text: string): string {
    const spaced = this.spacesHan ? text.replace(FAR_HAN, " $& ") : text;
    // the original lowers letter by letter; JavaScript writes a final sigma at the end of a word
    return this.lowers ? spaced.replaceAll("Σ", "σ") : spaced;
  }
}
