/**
 * Resizing as docs/preprocessing.md defines it: antialiased, fixed point with 22 bits, horizontal pass first.
 * Integer arithmetic only, so the result equals Python's bit for bit.
 */
import type { ImageSpec } from "./contract";

/** Straight 8-bit pixels, `channels` bytes each (3, or 4 whose last is ignored). */
export interface Pixels {
  width: number;
  height: number;
  channels: 3 | 4;
  data: Uint8Array | Uint8ClampedArray;
}

export interface Plan {
  height: number;
  width: number;
  top: number;
  left: number;
}

/** Nearest integer, the even one at exactly one half: Python's `round`. */
export function roundHalfEven(x: number): number {
  const low = Math.floor(x);
  const rest = x - low;
  if (rest !== 0.5) return rest < 0.5 ? low : low + 1;
  return low % 2 === 0 ? low : low + 1;
}

/** Size to scale to, and where the window starts in it ("crop") or where it lies on the canvas ("pad"). */
export function resizePlan(height: number, width: number, spec: ImageSpec): Plan {
  const size = spec.size;
  if (spec.resize === "squash") return { height: size, width: size, top: 0, left: 0 };
  const short = Math.min(height, width);
  const long = Math.max(height, width);
  if (spec.resize === "crop") {
    const shortTo = roundHalfEven(size / spec.crop_fraction);
    const longTo = Math.trunc((shortTo * long) / short);
    const [h, w] = height <= width ? [shortTo, longTo] : [longTo, shortTo];
    return { height: h, width: w, top: roundHalfEven((h - size) / 2), left: roundHalfEven((w - size) / 2) };
  }
  const shortTo = Math.max(1, roundHalfEven(short / (long / size)));
  const [h, w] = height <= width ? [shortTo, size] : [size, shortTo];
  return { height: h, width: w, top: Math.floor((size - h) / 2), left: Math.floor((size - w) / 2) };
}

interface Taps {
  /** first source position and number of taps of each output position */
  first: Int32Array;
  count: Int32Array;
  /** `stride` weights for each output position */
  weights: Int32Array;
  stride: number;
}

function bilinear(x: number): number {
  const d = Math.abs(x);
  return d < 1 ? 1 - d : 0;
}

function bicubic(x: number): number {
  const d = Math.abs(x);
  const a = -0.5;
  if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
  return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
}

/** Fixed-point weights of output positions `start` .. `stop - 1` when `n` samples become `m`. */
export function taps(n: number, m: number, filter: ImageSpec["filter"], start: number, stop: number): Taps {
  const [kernel, radius] = filter === "bilinear" ? [bilinear, 1] : [bicubic, 2];
  const scale = n / m;
  const stretch = Math.max(scale, 1);
  const support = radius * stretch;
  const inverse = 1 / stretch;
  const stride = Math.ceil(2 * support) + 2;
  const first = new Int32Array(stop - start);
  const count = new Int32Array(stop - start);
  const weights = new Int32Array((stop - start) * stride);
  const real = new Float64Array(stride);
  for (let i = start; i < stop; i++) {
    const center = (i + 0.5) * scale;
    const from = Math.max(Math.trunc(center - support + 0.5), 0);
    const to = Math.min(Math.trunc(center + support + 0.5), n);
    let total = 0;
    for (let k = 0; k < to - from; k++) {
      real[k] = kernel((k + from - center + 0.5) * inverse);
      total += real[k]!;
    }
    first[i - start] = from;
    count[i - start] = to - from;
    for (let k = 0; k < to - from; k++) {
      const w = real[k]! / total;
      weights[(i - start) * stride + k] = Math.trunc(w * 4194304 + (w >= 0 ? 0.5 : -0.5));
    }
  }
  return { first, count, weights, stride };
}

/** Decoded pixels to the model's input: uint8 [size, size, 3], RGB. Only what survives the crop is computed. */
export function resize(pixels: Pixels, spec: ImageSpec): Uint8Array<ArrayBuffer> {
  const plan = resizePlan(pixels.height, pixels.width, spec);
  const crop = spec.resize === "crop";
  const outH = crop ? spec.size : plan.height;
  const outW = crop ? spec.size : plan.width;
  const left = crop ? plan.left : 0;
  const top = crop ? plan.top : 0;
  const across = taps(pixels.width, plan.width, spec.filter, left, left + outW);
  const down = taps(pixels.height, plan.height, spec.filter, top, top + outH);
  const low = down.first[0]!;
  const high = down.first[outH - 1]! + down.count[outH - 1]!;
  const scaled = vertical(horizontal(pixels, across, low, high, outW), down, low, outW, outH);
  if (spec.resize !== "pad") return scaled;
  const canvas = new Uint8Array(spec.size * spec.size * 3);
  for (let i = 0; i < canvas.length; i += 3) canvas.set(spec.background, i);
  for (let y = 0; y < outH; y++) {
    canvas.set(scaled.subarray(y * outW * 3, (y + 1) * outW * 3), ((plan.top + y) * spec.size + plan.left) * 3);
  }
  return canvas;
}

function horizontal(pixels: Pixels, { first, count, weights, stride }: Taps, low: number, high: number, outW: number) {
  const { data, channels, width } = pixels;
  const rows = new Uint8ClampedArray((high - low) * outW * 3);
  let out = 0;
  for (let y = low; y < high; y++) {
    const line = y * width * channels;
    for (let x = 0; x < outW; x++) {
      let r = 2097152;
      let g = 2097152;
      let b = 2097152;
      let at = line + first[x]! * channels;
      const base = x * stride;
      const end = base + count[x]!;
      for (let k = base; k < end; k++, at += channels) {
        const w = weights[k]!;
        r = (r + w * data[at]!) | 0;
        g = (g + w * data[at + 1]!) | 0;
        b = (b + w * data[at + 2]!) | 0;
      }
      rows[out++] = r >> 22; // a clamped array clamps to 0..255
      rows[out++] = g >> 22;
      rows[out++] = b >> 22;
    }
  }
  return rows;
}

function vertical(rows: Uint8ClampedArray, { first, count, weights, stride }: Taps, low: number, outW: number, outH: number) {
  const line = outW * 3;
  const result = new Uint8ClampedArray(outH * line);
  const sums = new Int32Array(line);
  for (let y = 0; y < outH; y++) {
    sums.fill(2097152);
    for (let k = 0; k < count[y]!; k++) {
      const w = weights[y * stride + k]!;
      const at = (first[y]! - low + k) * line;
      for (let x = 0; x < line; x++) sums[x] = (sums[x]! + w * rows[at + x]!) | 0;
    }
    for (let x = 0; x < line; x++) result[y * line + x] = sums[x]! >> 22;
  }
  return new Uint8Array(result.buffer as ArrayBuffer);
}
