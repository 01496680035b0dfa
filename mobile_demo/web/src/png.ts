/**
 * PNG to straight 8-bit RGB(A), exactly. A canvas would premultiply by alpha, and browsers cut 16 bits each in its own
 * way; a PNG is simple enough to be read here, so that every browser gives Python's pixels.
 */
import { PictureError } from "./errors";
import type { Pixels } from "./resample";

const PASSES = [
  [0, 0, 8, 8],
  [4, 0, 8, 8],
  [0, 4, 4, 8],
  [2, 0, 4, 4],
  [0, 2, 2, 4],
  [1, 0, 2, 2],
  [0, 1, 1, 2],
] as const;
const SAMPLES: Record<number, number> = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 };

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

function crc32(bytes: Uint8Array): number {
  let c = 0xffffffff;
  for (const byte of bytes) c = CRC[(c ^ byte) & 255]! ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

interface Header {
  width: number;
  height: number;
  depth: number;
  color: number;
  interlaced: boolean;
}

export interface Png extends Pixels {
  /** straight alpha where the picture has any transparency, else 3 channels */
  channels: 3 | 4;
  /** the raw eXIf chunk */
  exif: Uint8Array | null;
}

/** Decode the default image of a PNG. Colour profiles and gamma are ignored, as the contract says. */
export async function decodePng(bytes: Uint8Array): Promise<Png> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let header: Header | null = null;
  let palette: Uint8Array | null = null;
  let transparent: Uint8Array | null = null;
  let exif: Uint8Array | null = null;
  let ended = false;
  const data: Uint8Array<ArrayBuffer>[] = [];
  for (let at = 8; at + 12 <= bytes.length && !ended; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const body: Uint8Array<ArrayBuffer> = bytes.slice(at + 8, at + 8 + length);
    if (at + 12 + length > bytes.length) throw truncated();
    if (crc32(bytes.subarray(at + 4, at + 8 + length)) !== view.getUint32(at + 8 + length)) throw truncated();
    if (kind === "IHDR") header = readHeader(body);
    else if (kind === "PLTE") palette = body;
    else if (kind === "tRNS") transparent = body;
    else if (kind === "eXIf") exif = body;
    else if (kind === "IDAT") data.push(body);
    else if (kind === "IEND") ended = true;
    at += 12 + length;
  }
  if (!header || data.length === 0) throw truncated();
  const samples = SAMPLES[header.color]!;
  const raw = await inflate(data, rawLength(header, samples));
  const values = unfilter(raw, header, samples);
  return { ...toRgb(values, header, samples, palette, transparent), width: header.width, height: header.height, exif };
}

function truncated(): PictureError {
  return new PictureError("The PNG is cut short or damaged, and part of it would be made up; supply it whole.");
}

function readHeader(body: Uint8Array): Header {
  const view = new DataView(body.buffer, body.byteOffset, body.byteLength);
  const header = {
    width: view.getUint32(0),
    height: view.getUint32(4),
    depth: body[8]!,
    color: body[9]!,
    interlaced: body[12] === 1,
  };
  if (!header.width || !header.height || !(header.color in SAMPLES) || ![1, 2, 4, 8, 16].includes(header.depth)) {
    throw truncated();
  }
  return header;
}

/** Width and height of each pass; one pass where the file is not interlaced. */
function passes(h: Header): { x: number; y: number; dx: number; dy: number; width: number; height: number }[] {
  const grid = h.interlaced ? PASSES : ([[0, 0, 1, 1]] as const);
  return grid
    .map(([x, y, dx, dy]) => ({ x, y, dx, dy, width: Math.ceil((h.width - x) / dx), height: Math.ceil((h.height - y) / dy) }))
    .filter((p) => p.width > 0 && p.height > 0);
}

function rawLength(h: Header, samples: number): number {
  return passes(h).reduce((sum, p) => sum + p.height * (1 + Math.ceil((p.width * samples * h.depth) / 8)), 0);
}

/** Inflate no more than `length` bytes: what a bomb adds beyond the picture is never expanded. */
async function inflate(parts: Uint8Array<ArrayBuffer>[], length: number): Promise<Uint8Array> {
  const reader = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const out = new Uint8Array(length);
  let filled = 0;
  try {
    while (filled < length) {
      const { done, value } = await reader.read();
      if (done) break;
      const part = value.subarray(0, length - filled);
      out.set(part, filled);
      filled += part.length;
    }
  } catch {
    throw truncated();
  } finally {
    reader.cancel().catch(() => undefined);
  }
  if (filled < length) throw truncated();
  return out;
}

/** Undo the row filters and the interlacing: one value per sample, as stored. */
function unfilter(raw: Uint8Array, h: Header, samples: number): Uint8Array | Uint16Array {
  const values = new (h.depth === 16 ? Uint16Array : Uint8Array)(h.width * h.height * samples);
  const unit = Math.max(1, (samples * h.depth) / 8);
  let at = 0;
  for (const pass of passes(h)) {
    const stride = Math.ceil((pass.width * samples * h.depth) / 8);
    let above: Uint8Array = new Uint8Array(stride);
    for (let row = 0; row < pass.height; row++) {
      const kind = raw[at]!;
      const line = raw.subarray(at + 1, at + 1 + stride);
      at += 1 + stride;
      undo(kind, line, above, unit);
      above = line;
      const start = ((pass.y + row * pass.dy) * h.width + pass.x) * samples;
      spread(line, values, start, pass.width, pass.dx * samples, samples, h.depth);
    }
  }
  return values;
}

function undo(kind: number, line: Uint8Array, above: Uint8Array, unit: number): void {
  if (kind > 4) throw truncated();
  for (let i = 0; i < line.length && kind > 0; i++) {
    const a = i >= unit ? line[i - unit]! : 0;
    const b = above[i]!;
    if (kind === 1) line[i]! += a;
    else if (kind === 2) line[i]! += b;
    else if (kind === 3) line[i]! += (a + b) >> 1;
    else {
      const c = i >= unit ? above[i - unit]! : 0;
      const pa = Math.abs(b - c);
      const pb = Math.abs(a - c);
      const pc = Math.abs(a + b - 2 * c);
      line[i]! += pa <= pb && pa <= pc ? a : pb <= pc ? b : c;
    }
  }
}

function spread(
  line: Uint8Array,
  values: Uint8Array | Uint16Array,
  start: number,
  width: number,
  step: number,
  samples: number,
  depth: number,
): void {
  if (depth === 8 && step === samples) {
    values.set(line.subarray(0, width * samples), start);
    return;
  }
  for (let x = 0; x < width; x++) {
    for (let s = 0; s < samples; s++) {
      const i = x * samples + s;
      const to = start + x * step + s;
      if (depth === 8) values[to] = line[i]!;
      else if (depth === 16) values[to] = (line[2 * i]! << 8) | line[2 * i + 1]!;
      else values[to] = (line[(i * depth) >> 3]! >> (8 - depth - ((i * depth) & 7))) & ((1 << depth) - 1);
    }
  }
}

function toRgb(
  values: Uint8Array | Uint16Array,
  h: Header,
  samples: number,
  palette: Uint8Array | null,
  transparent: Uint8Array | null,
): { data: Uint8Array; channels: 3 | 4 } {
  const count = h.width * h.height;
  const hasAlpha = h.color === 4 || h.color === 6 || transparent !== null;
  const channels = hasAlpha ? 4 : 3;
  if (h.color === 2 && h.depth === 8 && !hasAlpha) return { data: values as Uint8Array, channels };
  if (h.color === 6 && h.depth === 8) return { data: values as Uint8Array, channels };
  const data = new Uint8Array(count * channels);
  const top = (1 << h.depth) - 1;
  const scale = (v: number) => (h.depth === 16 ? Math.floor((v * 255 + 32767) / 65535) : h.depth === 8 ? v : (v * 255) / top);
  const key = transparent && h.color !== 3 ? keyOf(transparent, samples) : null;
  if (h.color === 3 && !palette) throw truncated();
  for (let i = 0, from = 0, to = 0; i < count; i++, from += samples, to += channels) {
    if (h.color === 3) {
      const entry = values[from]!;
      for (let c = 0; c < 3; c++) data[to + c] = palette![entry * 3 + c] ?? 0;
      if (hasAlpha) data[to + 3] = transparent?.[entry] ?? 255;
      continue;
    }
    const gray = samples < 3;
    for (let c = 0; c < 3; c++) data[to + c] = scale(values[from + (gray ? 0 : c)]!);
    if (h.color === 4 || h.color === 6) data[to + 3] = scale(values[from + samples - 1]!);
    else if (key) data[to + 3] = key.every((v, c) => values[from + c] === v) ? 0 : 255;
  }
  return { data, channels };
}

function keyOf(transparent: Uint8Array, samples: number): number[] {
  return Array.from({ length: samples }, (_, c) => ((transparent[2 * c] ?? 0) << 8) | (transparent[2 * c + 1] ?? 0));
}
