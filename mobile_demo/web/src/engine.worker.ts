/** The worker that decodes and runs the model, so that the screen never waits for either. */
import { Answerer } from "./answerer";
import { Bundle } from "./bundle";
import { checkConformance } from "./conformance";
import { onnxVariants } from "./contract";
import { decodePicture, fromBitmap, loadPicture } from "./decode";
import { UserError } from "./errors";
import type { Embedded, EngineCalls, Opened } from "./engine";
import { Model } from "./model";
import { resize, type Pixels } from "./resample";
import { hasGpu, loadRuntime } from "./runtime";

const THUMBNAIL = 256;
let model: Model | null = null;
let answerer: Promise<Answerer> | null = null;
let stopped = false;

function current(): Model {
  if (!model) throw new UserError("No model is loaded yet; wait until it is.");
  return model;
}

/** Opened by the first call; after a failure (no network, say) the next one tries again. */
function answering(): Promise<Answerer> {
  if (!answerer) {
    const opening = Answerer.open(current());
    opening.catch(() => answerer === opening && (answerer = null));
    answerer = opening;
  }
  return answerer;
}

async function embed(pixels: Pixels, started: number): Promise<Embedded> {
  const decoded = performance.now();
  const input = resize(pixels, current().contract.image);
  const resized = performance.now();
  const embedding = await current().embedPixels(input);
  return { embedding, decodeMs: decoded - started, resizeMs: resized - decoded, modelMs: performance.now() - resized };
}

async function thumbnail(pixels: Pixels): Promise<Blob> {
  const scale = Math.min(1, THUMBNAIL / Math.min(pixels.width, pixels.height));
  const width = Math.max(1, Math.min(4 * THUMBNAIL, Math.round(pixels.width * scale)));
  const height = Math.max(1, Math.min(4 * THUMBNAIL, Math.round(pixels.height * scale)));
  const rgba = new Uint8ClampedArray(pixels.width * pixels.height * 4).fill(255);
  const { data, channels } = pixels;
  for (let i = 0, from = 0; from < data.length; i += 4, from += channels) {
    rgba[i] = data[from]!;
    rgba[i + 1] = data[from + 1]!;
    rgba[i + 2] = data[from + 2]!;
  }
  const bitmap = await createImageBitmap(new ImageData(rgba, pixels.width, pixels.height));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d")!;
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.85 });
}

const calls: EngineCalls = {
  async open({ base, precision, processor, threads }, progress) {
    const old = model;
    const asked = answerer;
    model = answerer = null;
    await old?.release();
    await asked?.then((one) => one.release()).catch(() => undefined);
    const bundle = await Bundle.open(base);
    const variants = onnxVariants(bundle.manifest);
    const variant = Model.choose(variants, precision);
    const runtime = await loadRuntime(processor, threads);
    const next = new Model(bundle, variant, runtime, (file, loaded, total) => progress({ file, loaded, total }));
    await next.warm();
    model = next;
    const opened: Opened = {
      manifest: bundle.manifest,
      precisions: variants.map((v) => v.precision),
      precision: variant.precision,
      files: variant.files,
      embeddedBy: next.embeddedBy,
      threads: runtime.threads,
      simd: runtime.simd,
      processor: runtime.processor,
      note: runtime.note,
      gpu: await hasGpu(),
    };
    return opened;
  },

  async embedPicture({ blob, name, withThumbnail }) {
    const started = performance.now();
    const pixels = await decodePicture(blob, current().contract.image, name);
    const embedded = await embed(pixels, started);
    return withThumbnail ? { ...embedded, thumbnail: await thumbnail(pixels) } : embedded;
  },

  async embedFrame({ frame }) {
    const started = performance.now();
    try {
      return await embed(fromBitmap(frame, current().contract.image), started);
    } finally {
      frame.close();
    }
  },

  loadText: () => current().load("text"),
  embedLabels: ({ labels, templates }) => current().embedLabels(labels, templates),
  embedText: ({ text }) => current().embedText(text),
  readFile: async ({ name }) => new Blob([await current().bundle.file(name)]),
  async openAnswerer() {
    const { manifest, precision } = await answering();
    return { name: manifest.contract.name, precision, licences: manifest.licences ?? [] };
  },

  async ask({ blob, name, question }, say) {
    stopped = false;
    const opened = await answering();
    const started = performance.now();
    const ids = opened.promptIds(question);
    const pixels = await loadPicture(blob, opened.contract.image, name);
    return opened.answer(pixels, ids, started, say, () => stopped);
  },

  stopAnswer: async () => void (stopped = true),
  conformance: (_, progress) => checkConformance(current(), progress),
};

interface Request {
  id: number;
  method: keyof EngineCalls;
  args: never;
}

self.onmessage = async ({ data: { id, method, args } }: MessageEvent<Request>) => {
  try {
    const result = await calls[method](args, ((progress: unknown) => self.postMessage({ id, progress })) as never);
    self.postMessage({ id, result });
  } catch (error) {
    const { name, message } = error instanceof Error ? error : new Error(String(error));
    self.postMessage({ id, error: { name, message } });
  }
};
