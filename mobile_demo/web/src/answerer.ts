/**
 * A model that answers questions about a picture, greedily, as edge/vlm.py does. Runs in a worker, on the processor.
 *
 * The key-value cache stays in the tensors that the graph gave and goes back in with the next token. onnxruntime-web
 * binds no memory outside a GPU, so it is copied into its heap and out again at every step.
 */
import type { InferenceSession, Tensor } from "onnxruntime-web/wasm";
import { unpackBlocks } from "./blocks";
import { readVlmManifest, VLM, VLM_MANIFEST, type VlmContract, type VlmManifest } from "./contract";
import { IntegrityError, sentence, UserError } from "./errors";
import type { Model } from "./model";
import { Pieces, Words } from "./words";

const MOST_TOKENS = 64;

export interface Said {
  /** the model ended the answer; else the cache or the limit of tokens did, or the user */
  ended: boolean;
  ids: number[];
  firstMs: number;
  /** of the tokens after the first; null where there is none */
  tokensPerSecond: number | null;
}

export class Answerer {
  private constructor(
    private readonly model: Model,
    readonly manifest: VlmManifest,
    readonly precision: string,
    private readonly picture: InferenceSession,
    private readonly decoder: InferenceSession,
    private readonly words: Words,
  ) {}

  /** Fetch and verify the files beside the model's own, and open them. */
  static async open(model: Model): Promise<Answerer> {
    const { bundle, runtime } = model;
    if (!runtime.simd) throw new UserError("This browser has no WASM SIMD, which the model that answers needs; use a newer browser.");
    const manifest = readVlmManifest(await bundle.text(VLM_MANIFEST));
    const { files, precision } = manifest.variants.find((v) => v.target === "onnx")!;
    const fetched = (name: string) => bundle.file(VLM + name, model.progress);
    const words = new Words(new TextDecoder().decode(await fetched(manifest.contract.tokenizer)), manifest.contract);
    const picture = await session(model, await fetched(files.picture));
    const decoder = await session(model, unpackBlocks(await fetched(files.decoder)));
    return new Answerer(model, manifest, precision, picture, decoder, words);
  }

  get contract(): VlmContract {
    return this.manifest.contract;
  }

  async release(): Promise<void> {
    await this.picture.release();
    await this.decoder.release();
  }

  promptIds(question: string): number[] {
    return this.words.promptIds(question);
  }

  /**
   * Write the answer to `ids` about uint8 pixels [S, S, 3]. `began`: of the call. `say` is given its pieces; `stopped`
   * is asked before every token.
   */
  async answer(
    pixels: Uint8Array,
    ids: readonly number[],
    began: number,
    say: (piece: string) => void,
    stopped: () => boolean,
  ): Promise<Said> {
    const { image, template, prefix: before, context_length, width } = this.contract;
    const shown = this.tensor("uint8", pixels, [1, image.size, image.size, 3]);
    let prefix = (await this.model.inTurn(() => this.picture.run({ pixels: shown })))["prefix"]!;
    const caches = this.emptyCaches();
    const room = Math.min(MOST_TOKENS, context_length - before - ids.length);
    const pieces = new Pieces(this.words);
    const said: number[] = [];
    let [next, place, steps, firstMs, spent, ended] = [ids, 0, 0, 0, 0, false];
    while (steps < room && !ended) {
      const since = steps ? performance.now() : began;
      // a run of the graph lets no message in, so a wish to stop is heard only here
      await pause();
      if (stopped()) break;
      const token = await this.step(prefix, next, place, caches);
      const taken = performance.now() - since;
      if (steps++) spent += taken;
      else firstMs = taken;
      ended = token === template.end;
      if (ended) break;
      said.push(token);
      const piece = pieces.add(token);
      if (piece) say(piece);
      place += prefix.dims[1]! + next.length;
      next = [token];
      prefix = this.tensor("float32", new Float32Array(), [1, 0, width]);
    }
    const piece = pieces.rest();
    if (piece) say(piece);
    return { ended, ids: said, firstMs, tokensPerSecond: steps > 1 ? (1000 * (steps - 1)) / spent : null };
  }

  /** The token that follows; the caches are replaced by those that hold the given ones too. */
  private async step(prefix: Tensor, ids: readonly number[], place: number, caches: Record<string, Tensor>): Promise<number> {
    const places = Int32Array.from({ length: prefix.dims[1]! + ids.length }, (_, i) => place + i);
    const feeds = {
      ...caches,
      prefix,
      ids: this.tensor("int32", Int32Array.from(ids), [1, ids.length]),
      positions: this.tensor("int32", places, [places.length]),
    };
    const given = await this.model.inTurn(() => this.decoder.run(feeds));
    for (const name of Object.keys(caches)) caches[name] = given[`new_${name}`]!;
    return greatest(given["logits"]!.data as Float32Array);
  }

  private emptyCaches(): Record<string, Tensor> {
    const caches: Record<string, Tensor> = {};
    for (const input of this.decoder.inputMetadata) {
      if (!input.isTensor || !/^(key|value)_\d+$/.test(input.name)) continue;
      const dims = input.shape.map(Number);
      caches[input.name] = this.tensor("float32", new Float32Array(dims.reduce((a, b) => a * b)), dims);
    }
    return caches;
  }

  private tensor(type: "uint8" | "int32" | "float32", data: Uint8Array | Int32Array | Float32Array, dims: number[]): Tensor {
    return new this.model.runtime.ort.Tensor(type as "uint8", data as Uint8Array, dims) as Tensor;
  }
}

async function session(model: Model, bytes: Uint8Array<ArrayBuffer>): Promise<InferenceSession> {
  const { ort, optimization } = model.runtime;
  try {
    return await model.inTurn(() => ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], graphOptimizationLevel: optimization }));
  } catch (error) {
    throw new UserError(`This browser's runtime cannot open the model that answers (${sentence(error)}); use a newer browser.`);
  }
}

/** The first index of the largest value. */
export function greatest(logits: Float32Array): number {
  let best = 0;
  logits.forEach((value, i) => {
    if (value > logits[best]! || Number.isNaN(value)) best = i;
  });
  if (!Number.isFinite(logits[best])) {
    throw new IntegrityError("The decoder gave NaN or infinity, so no word of it can be trusted; export the bundle at another precision.");
  }
  return best;
}

const channel = new MessageChannel();

/** Let the worker take its messages; a timer would wait four milliseconds. */
function pause(): Promise<void> {
  return new Promise((resolve) => {
    channel.port1.onmessage = () => resolve();
    channel.port2.postMessage(0);
  });
}
