/** The screen's side of the worker: one promise per call. */
import type { Said } from "./answerer";
import type { StageResult } from "./conformance";
import type { Licence, Manifest, Variant } from "./contract";
import { IntegrityError, UserError } from "./errors";
import type { Processor } from "./runtime";

export interface Opened {
  manifest: Manifest;
  precisions: string[];
  precision: string;
  files: Variant["files"];
  embeddedBy: string;
  threads: number;
  simd: boolean;
  processor: Processor;
  note: string;
  gpu: boolean;
}

export interface Embedded {
  embedding: Float32Array;
  decodeMs: number;
  resizeMs: number;
  modelMs: number;
  thumbnail?: Blob;
}

/** The model that answers, once it is open. */
export interface Asked {
  name: string;
  precision: string;
  licences: Licence[];
}

export interface Loading {
  file: string;
  loaded: number;
  total: number;
}

interface Calls {
  open: [{ base: string; precision?: string | undefined; processor: Processor; threads?: number | undefined }, Opened, Loading];
  embedPicture: [{ blob: Blob; name: string; withThumbnail?: boolean }, Embedded, never];
  embedFrame: [{ frame: ImageBitmap }, Embedded, never];
  loadText: [Record<string, never>, void, never];
  embedLabels: [{ labels: readonly string[]; templates: readonly string[] }, Float32Array[], never];
  embedText: [{ text: string }, Float32Array, never];
  readFile: [{ name: string }, Blob, never];
  openAnswerer: [Record<string, never>, Asked, never];
  ask: [{ blob: Blob; name: string; question: string }, Said, string];
  stopAnswer: [Record<string, never>, void, never];
  conformance: [Record<string, never>, StageResult[], StageResult];
}

export type EngineCalls = {
  [K in keyof Calls]: (args: Calls[K][0], progress: (p: Calls[K][2]) => void) => Promise<Calls[K][1]>;
};

interface Reply {
  id: number;
  result?: unknown;
  progress?: unknown;
  error?: { name: string; message: string };
}

interface Waiting {
  resolve: (value: never) => void;
  reject: (error: Error) => void;
  progress: ((p: never) => void) | undefined;
}

export class Engine {
  private readonly worker: Worker;
  private readonly waiting = new Map<number, Waiting>();
  private last = 0;
  /** called while a tower is being fetched, also by a call that needs it for the first time */
  onLoading: ((loading: Loading) => void) | undefined;

  constructor() {
    this.worker = new Worker(new URL("./engine.worker.ts", import.meta.url), { type: "module", name: "engine" });
    this.worker.onmessage = ({ data }: MessageEvent<Reply>) => this.receive(data);
    this.worker.onerror = (event) => {
      const error = new Error(`The model's worker stopped (${event.message || "it could not be loaded"}); reload the page.`);
      for (const { reject } of this.waiting.values()) reject(error);
      this.waiting.clear();
    };
  }

  call<K extends keyof Calls>(
    method: K,
    args: Calls[K][0],
    options: { progress?: (p: Calls[K][2]) => void; transfer?: Transferable[] } = {},
  ): Promise<Calls[K][1]> {
    const id = ++this.last;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve: resolve as never, reject, progress: options.progress as never });
      this.worker.postMessage({ id, method, args }, options.transfer ?? []);
    });
  }

  private receive({ id, result, progress, error }: Reply): void {
    if (progress && typeof progress === "object" && "file" in progress) this.onLoading?.(progress as Loading);
    const call = this.waiting.get(id);
    if (!call) return;
    if (progress !== undefined) {
      call.progress?.(progress as never);
      return;
    }
    this.waiting.delete(id);
    if (error) call.reject(error.name === "IntegrityError" ? new IntegrityError(error.message) : new UserError(error.message));
    else call.resolve(result as never);
  }
}
