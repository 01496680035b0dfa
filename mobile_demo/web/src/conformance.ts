/** The bundle's own test vectors, run through this very app; docs/conformance.md has the format and the rules. */
import { sha256 } from "./bundle";
import { decodePicture } from "./decode";
import { IntegrityError, sentence } from "./errors";
import { cosine, type Model } from "./model";
import { resize, type Pixels } from "./resample";

export interface StageResult {
  stage: string;
  passed: boolean;
  cases: number;
  /** S0: largest difference in grey levels; S1: of ids; S3, S4: largest 1 - cosine; S5: largest loss in score */
  worst: number;
  budget: number;
  failures: string[];
  /** what is told and not judged: how far this browser's decoder of lossy pictures is from the recorded one */
  notes: string[];
}

interface ImageCase {
  name: string;
  bytes_file: string;
  lossy?: boolean;
  decoded?: { height: number; width: number; sha256: string; file?: string };
  pixels_sha256: string;
  pixels_file?: string;
  embedding: number[];
}

interface TextCase {
  name?: string;
  text: string;
  ids: number[];
  embedding: number[];
}

interface Ranking {
  query: string;
  order: string[];
  scores: number[];
}

interface Vectors {
  schema: string;
  images: ImageCase[];
  texts: TextCase[];
  refused_images?: { name: string; bytes_file: string }[];
  refused_texts?: { name: string; text: string }[];
  retrieval?: {
    k: number;
    margin: Record<string, number>;
    text_to_image: Ranking[];
    image_to_text: Ranking[];
  } | null;
  tolerance?: Record<string, number>;
}

const NEWEST = [1, 1] as const;
const LOSSY_MEAN = 8; // mean grey levels that another decoder of lossy pictures may be away
const DEFAULT_TOLERANCE: Record<string, number> = { fp32: 1e-6, fp16: 1e-4, int8: 0.02 };
const EMPTY = "there is no case, so nothing was shown";

/** Run every stage; `report` is told of each as it ends. */
export async function checkConformance(model: Model, report: (stage: StageResult) => void): Promise<StageResult[]> {
  const name = model.bundle.manifest.conformance;
  if (!name) throw new IntegrityError("The bundle has no conformance vectors, so this app cannot be checked against it.");
  const vectors = JSON.parse(await model.bundle.text(name)) as Vectors;
  const [major, minor] = String(vectors.schema).split(".").map(Number);
  if (major !== NEWEST[0] || !((minor ?? NaN) <= NEWEST[1])) {
    throw new IntegrityError(
      `The conformance vectors have schema ${vectors.schema} and this app reads ${NEWEST.join(".")}; use a newer app.`,
    );
  }
  return new Runner(model, vectors, report).run();
}

export function firstFailing(stages: readonly StageResult[]): StageResult | undefined {
  return stages.find((stage) => !stage.passed);
}

class Runner {
  private readonly rows = new Map<string, Float32Array>();
  /** recorded decodings of lossy pictures that this browser decodes otherwise, within the rule */
  private readonly otherwise = new Map<string, Pixels>();
  private readonly stages: StageResult[] = [];
  private notes: string[] = [];

  constructor(
    private readonly model: Model,
    private readonly vectors: Vectors,
    private readonly report: (stage: StageResult) => void,
  ) {}

  async run(): Promise<StageResult[]> {
    const { images, texts, tolerance, schema } = this.vectors;
    const complete = schema !== "1.0";
    const precision = this.model.variant.precision;
    const budget = tolerance?.[precision] ?? DEFAULT_TOLERANCE[precision] ?? DEFAULT_TOLERANCE["int8"]!;
    const recorded = images.filter((c) => c.decoded?.file);
    const withPixels = images.filter((c) => c.pixels_file);
    if (complete) {
      await this.stage("S0 decode", images, 0, (c) => this.decode(c));
      if (recorded.length || !images.length) await this.stage("S0 resize", recorded, 1, (c) => this.resized(c));
    }
    await this.stage("S0 pixels", images, 1, (c) => this.pixels(c, !complete));
    if (complete) {
      await this.stage("S0 refused", this.vectors.refused_images ?? [], 0, async (c) =>
        mustRefuse(decodePicture(await this.blob(c.bytes_file), this.model.contract.image)),
      );
    }
    await this.stage("S1 ids", texts, 0, (c) => this.ids(c));
    if (complete) {
      await this.stage("S1 refused", this.vectors.refused_texts ?? [], 0, (c) => mustRefuse(this.model.encode(c.text)));
    }
    await this.stage("S3 image graph", withPixels, budget, async (c) =>
      1 - cosine(await this.model.embedPixels(await this.recordedPixels(c)), c.embedding),
    );
    await this.stage("S3 text graph", texts, budget, async (c) =>
      1 - cosine(await this.model.embedIds(Int32Array.from(c.ids)), c.embedding),
    );
    await this.stage("S4 image", images, budget, async (c) => {
      const row = await this.model.embedPixels(resize(await this.source(c), this.model.contract.image));
      this.rows.set(`image ${c.name}`, row);
      return 1 - cosine(row, c.embedding);
    });
    await this.stage("S4 text", texts, budget, async (c) => {
      const row = await this.model.embedText(c.text);
      this.rows.set(`text ${c.name}`, row);
      return 1 - cosine(row, c.embedding);
    });
    if (complete) await this.retrieval(precision);
    return this.stages;
  }

  private async stage<C extends { name?: string; text?: string }>(
    stage: string,
    cases: readonly C[],
    budget: number,
    measure: (c: C) => Promise<number>,
  ): Promise<void> {
    const result: StageResult = { stage, passed: false, cases: cases.length, worst: 0, budget, failures: [], notes: [] };
    for (const c of cases) {
      const name = c.name ?? JSON.stringify(c.text);
      try {
        const found = await measure(c);
        if (!(found <= result.worst)) result.worst = found;
        if (!(found <= budget)) result.failures.push(`${name}: ${found.toPrecision(3)}, at most ${budget} is allowed`);
      } catch (error) {
        result.worst = NaN;
        result.failures.push(`${name}: ${sentence(error)}`);
      }
    }
    if (!cases.length) result.failures.push(EMPTY);
    result.passed = !result.failures.length;
    result.notes = this.notes;
    this.notes = [];
    this.stages.push(result);
    this.report(result);
  }

  private async decode(c: ImageCase): Promise<number> {
    const found = await this.own(c);
    const stated = c.decoded!;
    if (found.height !== stated.height || found.width !== stated.width) {
      throw new IntegrityError(
        `it decodes to ${found.width} x ${found.height} pixels and ${stated.width} x ${stated.height} are recorded`,
      );
    }
    const rgb = toRgb(found);
    if ((await sha256(rgb)) === stated.sha256) return 0;
    if (!c.lossy) throw new IntegrityError("a lossless picture is decoded otherwise");
    const kept = await this.recordedDecoding(c);
    const { mean, most } = difference(rgb, toRgb(kept));
    this.notes.push(`${c.name}: decoded otherwise, mean ${mean.toFixed(2)}, at most ${most} grey levels`);
    if (!(mean <= LOSSY_MEAN)) throw new IntegrityError(`mean ${mean.toFixed(1)} grey levels away, more than ${LOSSY_MEAN}`);
    this.otherwise.set(c.name, kept);
    return 0;
  }

  private async resized(c: ImageCase): Promise<number> {
    return this.againstPixels(c, resize(await this.recordedDecoding(c), this.model.contract.image));
  }

  private async pixels(c: ImageCase, old: boolean): Promise<number> {
    const found = await this.againstPixels(c, resize(await this.source(c), this.model.contract.image));
    // vectors of schema 1.0 do not say which pictures are lossy, nor what they decode to
    if (!old || found <= 1 || !/\.jpe?g$/.test(c.bytes_file)) return found;
    this.notes.push(`${c.name}: decoded otherwise, at most ${found} grey levels in the resized picture`);
    return found <= 4 * LOSSY_MEAN ? 0 : found;
  }

  private async againstPixels(c: ImageCase, found: Uint8Array<ArrayBuffer>): Promise<number> {
    if (c.pixels_file) return difference(found, await this.recordedPixels(c)).most;
    return (await sha256(found)) === c.pixels_sha256 ? 0 : NaN;
  }

  private async ids(c: TextCase): Promise<number> {
    const found = await this.model.encode(c.text);
    return c.ids.length === found.length ? c.ids.filter((id, i) => id !== found[i]).length : NaN;
  }

  private async retrieval(precision: string): Promise<void> {
    const task = this.vectors.retrieval;
    const margin = task ? (task.margin[precision] ?? task.margin["int8"] ?? 0) : 0;
    const of = (way: "text_to_image" | "image_to_text", from: string, to: string) =>
      (task?.[way] ?? []).map((row) => ({ name: `${row.query} (${from} to ${to})`, row, from, to }));
    const queries = [...of("text_to_image", "text", "image"), ...of("image_to_text", "image", "text")];
    await this.stage("S5 retrieval", queries, margin, async ({ row, from, to }) => {
      const query = this.row(from, row.query);
      const found = row.order.map((name, place) => ({ place, score: cosine(query, this.row(to, name)) }));
      found.sort((a, b) => b.score - a.score);
      const best = [...row.scores].sort((a, b) => b - a);
      return Math.max(...found.slice(0, task!.k).map(({ place }, i) => best[i]! - row.scores[place]!));
    });
  }

  private row(tower: string, name: string): Float32Array {
    const row = this.rows.get(`${tower} ${name}`);
    if (!row) throw new IntegrityError(`“${name}” has no embedding, as its case broke`);
    return row;
  }

  // --- files

  private async blob(file: string): Promise<Blob> {
    return new Blob([await this.model.bundle.file(file)]);
  }

  private async own(c: ImageCase): Promise<Pixels> {
    return decodePicture(await this.blob(c.bytes_file), this.model.contract.image, c.name);
  }

  private async source(c: ImageCase): Promise<Pixels> {
    return this.otherwise.get(c.name) ?? this.own(c);
  }

  private async recordedDecoding(c: ImageCase): Promise<Pixels> {
    const { file, width, height, sha256: stated } = c.decoded!;
    if (!file) throw new IntegrityError("a lossy picture has no recorded decoding");
    const data = await this.model.bundle.file(file);
    if (data.length !== width * height * 3 || (await sha256(data)) !== stated) {
      throw new IntegrityError(`${file} is not the recorded uint8 [${height}, ${width}, 3]`);
    }
    return { width, height, channels: 3, data };
  }

  private async recordedPixels(c: ImageCase): Promise<Uint8Array> {
    const { size } = this.model.contract.image;
    const data = await this.model.bundle.file(c.pixels_file!);
    if (data.length !== size * size * 3 || (await sha256(data)) !== c.pixels_sha256) {
      throw new IntegrityError(`${c.pixels_file} is not the recorded uint8 [${size}, ${size}, 3]`);
    }
    return data;
  }
}

async function mustRefuse(attempt: Promise<unknown>): Promise<number> {
  try {
    await attempt;
  } catch {
    return 0;
  }
  throw new IntegrityError("it was taken and must be refused");
}

function toRgb({ data, channels, width, height }: Pixels): Uint8Array<ArrayBuffer> {
  const rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; to < rgb.length; from += channels, to += 3) {
    for (let c = 0; c < 3; c++) rgb[to + c] = data[from + c]!;
  }
  return rgb;
}

function difference(a: Uint8Array, b: Uint8Array): { mean: number; most: number } {
  if (a.length !== b.length) return { mean: NaN, most: NaN };
  let sum = 0;
  let most = 0;
  for (let i = 0; i < a.length; i++) {
    const d = Math.abs(a[i]! - b[i]!);
    sum += d;
    if (d > most) most = d;
  }
  return { mean: sum / a.length, most };
}
