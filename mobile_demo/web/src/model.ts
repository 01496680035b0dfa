/** A bundle's two towers behind the numbers that a screen needs. Runs in a worker. */
import type { InferenceSession, Tensor } from "onnxruntime-web/wasm";
import { Bundle, type Progress } from "./bundle";
import { type Contract, type Tower, type Variant } from "./contract";
import { IntegrityError, UserError } from "./errors";
import type { Runtime } from "./runtime";
import { Tokenizer } from "./tokenizer";

export class Model {
  readonly contract: Contract;
  private readonly sessions = new Map<Tower, Promise<InferenceSession>>();
  private tokenizerOnce: Promise<Tokenizer> | null = null;
  private turn: Promise<unknown> = Promise.resolve();

  constructor(
    readonly bundle: Bundle,
    readonly variant: Variant,
    readonly runtime: Runtime,
    readonly progress?: Progress,
  ) {
    this.contract = bundle.manifest.contract;
  }

  /** int8 where it is there: a quarter of the download; else the first variant. */
  static choose(all: readonly Variant[], precision?: string): Variant {
    const found = all.find((v) => v.precision === (precision ?? "int8")) ?? (precision ? undefined : all[0]);
    if (!found) {
      throw new UserError(
        `The model's ONNX files${precision ? ` at ${precision}` : ""} are not beside this app, so there is nothing to run; ` +
          "prepare the bundle again.",
      );
    }
    return found;
  }

  /** Identifies embeddings that may be compared: the space, and the file that made them. */
  get embeddedBy(): string {
    const file = this.variant.files.image!;
    return `${this.contract.space_id}/${this.bundle.manifest.files[file]!.sha256.slice(0, 16)}`;
  }

  /** float32 [n, D] as one array, of uint8 [n, S, S, 3]. */
  async embedPixels(pixels: Uint8Array, n = 1): Promise<Float32Array> {
    const { size } = this.contract.image;
    return this.run("image", "pixels", "uint8", pixels, [n, size, size, 3]);
  }

  /** float32 [n, D] as one array, of int32 [n, context_length]. */
  async embedIds(ids: Int32Array, n = 1): Promise<Float32Array> {
    return this.run("text", "ids", "int32", ids, [n, this.contract.text.context_length]);
  }

  async encode(text: string): Promise<Int32Array> {
    return (await this.tokenizer()).encode(text);
  }

  async embedText(text: string): Promise<Float32Array> {
    return this.embedIds(await this.encode(text));
  }

  /** One unit vector per label: the average over templates of normalised prompts, normalised. */
  async embedLabels(labels: readonly string[], templates: readonly string[]): Promise<Float32Array[]> {
    const rows: Float32Array[] = [];
    for (const label of labels) {
      const mean = new Float64Array(this.contract.embed_dim);
      for (const template of templates) {
        const row = unit(await this.embedText(template.replaceAll("{}", label)));
        row.forEach((v, i) => (mean[i]! += v / templates.length));
      }
      rows.push(unit(mean));
    }
    return rows;
  }

  /** Fetch the picture tower and run it once: a runtime's first run prepares its kernels. */
  async warm(): Promise<void> {
    const { size } = this.contract.image;
    await this.embedPixels(new Uint8Array(size * size * 3));
  }

  async load(tower: Tower): Promise<void> {
    await Promise.all([this.session(tower), this.tokenizer()]);
  }

  async release(): Promise<void> {
    for (const session of this.sessions.values()) await (await session).release();
    this.sessions.clear();
  }

  private tokenizer(): Promise<Tokenizer> {
    this.tokenizerOnce ??= this.bundle
      .text(this.bundle.manifest.tokenizer!)
      .then((json) => new Tokenizer(json, this.contract.text));
    return this.tokenizerOnce;
  }

  private session(tower: Tower): Promise<InferenceSession> {
    let session = this.sessions.get(tower);
    if (!session) {
      session = this.open(tower);
      // after a failure (no network, say) the next call tries again
      session.catch(() => this.sessions.delete(tower));
      this.sessions.set(tower, session);
    }
    return session;
  }

  private async open(tower: Tower): Promise<InferenceSession> {
    const bytes = await this.bundle.file(this.variant.files[tower]!, this.progress);
    const { ort, processor, optimization } = this.runtime;
    return this.inTurn(() =>
      ort.InferenceSession.create(bytes, {
        executionProviders: processor === "gpu" ? ["webgpu", "wasm"] : ["wasm"],
        graphOptimizationLevel: optimization,
      }),
    );
  }

  private async run(
    tower: Tower,
    input: string,
    type: "uint8" | "int32",
    data: Uint8Array | Int32Array,
    dims: number[],
  ): Promise<Float32Array> {
    const session = await this.session(tower);
    const result = await this.inTurn(() => {
      const tensor = new this.runtime.ort.Tensor(type, data as Uint8Array, dims) as Tensor;
      return session.run({ [input]: tensor });
    });
    const output = result["embedding"];
    if (!output) throw new IntegrityError("The graph has no output “embedding”; export the bundle again.");
    return Float32Array.from((await output.getData()) as Float32Array);
  }

  /** The runtime takes one call at a time. */
  inTurn<T>(work: () => Promise<T>): Promise<T> {
    const next = this.turn.then(work, work);
    this.turn = next.catch(() => undefined);
    return next;
  }
}

export function unit(row: ArrayLike<number>): Float32Array {
  let sum = 0;
  for (let i = 0; i < row.length; i++) sum += row[i]! * row[i]!;
  const norm = Math.sqrt(sum) || 1;
  return Float32Array.from(row, (v) => v / norm);
}

/** Cosine of two rows of any length but zero. */
export function cosine(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let dot = 0;
  let aa = 0;
  let bb = 0;
  for (let i = 0; i < a.length; i++) {
    dot += a[i]! * b[i]!;
    aa += a[i]! * a[i]!;
    bb += b[i]! * b[i]!;
  }
  return dot / Math.sqrt(aa * bb);
}

/** Softmax over labels of logit_scale * cosine; the bias cancels. */
export function probabilities(image: Float32Array, labels: readonly Float32Array[], scale: number): number[] {
  const logits = labels.map((label) => scale * cosine(image, label));
  const peak = Math.max(...logits);
  const shares = logits.map((v) => Math.exp(v - peak));
  const total = shares.reduce((a, b) => a + b, 0);
  return shares.map((v) => v / total);
}
