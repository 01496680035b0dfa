/** What encoded bytes are, before anything decodes them: format, size in pixels, and whether the file is whole. */
import { PictureError } from "./errors";

export interface Sniffed {
  type: "png" | "jpeg" | "webp" | "gif" | "bmp" | "other";
  width: number;
  height: number;
  whole: boolean;
}

/** A picture with more pixels than this is refused: decoding it could exhaust a phone's memory. */
export const MOST_PIXELS = 50_000_000;

const cut = (type: Sniffed["type"]): Sniffed => ({ type, width: 0, height: 0, whole: false });

/** Look at the header. Formats that only the browser knows (AVIF, HEIC, …) are "other", of unknown size. */
export function sniff(bytes: Uint8Array): Sniffed {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const tag = (at: number, length: number) => String.fromCharCode(...bytes.subarray(at, at + length));
  try {
    if (tag(0, 4) === "\x89PNG") return { type: "png", width: view.getUint32(16), height: view.getUint32(20), whole: true };
    if (bytes[0] === 0xff && bytes[1] === 0xd8) return jpeg(bytes, view);
    if (tag(0, 4) === "RIFF" && tag(8, 4) === "WEBP") return webp(bytes, view, tag(12, 4));
    if (tag(0, 4) === "GIF8") return gif(bytes, view);
    if (tag(0, 2) === "BM") {
      const size = { width: view.getInt32(18, true), height: Math.abs(view.getInt32(22, true)) };
      return { type: "bmp", ...size, whole: view.getUint32(2, true) <= bytes.length };
    }
  } catch (error) {
    if (error instanceof RangeError) return cut("other"); // the header ends before its fields
    throw error;
  }
  return { type: "other", width: 0, height: 0, whole: true };
}

function jpeg(bytes: Uint8Array, view: DataView): Sniffed {
  let size = { width: 0, height: 0 };
  for (let at = 2; ; ) {
    while (bytes[at] === 0xff && bytes[at + 1] === 0xff) at++;
    const marker = view.getUint8(at + 1);
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      size = { width: view.getUint16(at + 7), height: view.getUint16(at + 5) };
    }
    if (marker === 0xda) {
      for (let end = bytes.length - 2; end > at; end--) {
        if (bytes[end] === 0xff && bytes[end + 1] === 0xd9) return { type: "jpeg", ...size, whole: true };
      }
      return { type: "jpeg", ...size, whole: false };
    }
    at += 2 + view.getUint16(at + 2);
  }
}

function webp(bytes: Uint8Array, view: DataView, chunk: string): Sniffed {
  const whole = view.getUint32(4, true) + 8 <= bytes.length;
  let width = 0;
  let height = 0;
  if (chunk === "VP8X") {
    width = 1 + (view.getUint32(24, true) & 0xffffff);
    height = 1 + (view.getUint32(26, true) >>> 8);
  } else if (chunk === "VP8L") {
    const bits = view.getUint32(21, true);
    width = 1 + (bits & 0x3fff);
    height = 1 + ((bits >>> 14) & 0x3fff);
  } else {
    width = view.getUint16(26, true) & 0x3fff;
    height = view.getUint16(28, true) & 0x3fff;
  }
  return { type: "webp", width, height, whole };
}

/** Only the first frame has to be there. */
function gif(bytes: Uint8Array, view: DataView): Sniffed {
  const size = { width: view.getUint16(6, true), height: view.getUint16(8, true) };
  const table = (flags: number) => (flags & 0x80 ? 3 << ((flags & 7) + 1) : 0);
  let at = 13 + table(view.getUint8(10));
  for (;;) {
    const kind = view.getUint8(at);
    if (kind === 0x3b) return { type: "gif", ...size, whole: false }; // ends without a frame
    if (kind === 0x2c) at += 11 + table(view.getUint8(at + 9));
    else at += 2;
    for (let block = view.getUint8(at); block; block = view.getUint8(at)) at += 1 + block;
    at += 1;
    if (kind === 0x2c) return { type: "gif", ...size, whole: at <= bytes.length };
  }
}

/** Refuse what is no picture, is cut short, or is too large to decode here. */
export function checkPicture(bytes: Uint8Array, name: string): Sniffed {
  const found = bytes.length ? sniff(bytes) : cut("other");
  if (!bytes.length) throw new PictureError(`“${name}” is empty, so there is nothing to see; choose another file.`);
  if (!found.whole) {
    throw new PictureError(`“${name}” is cut short or damaged, and part of it would be made up; choose a whole copy.`);
  }
  if (found.width * found.height > MOST_PIXELS) {
    throw new PictureError(
      `“${name}” has ${Math.round((found.width * found.height) / 1e6)} million pixels and ${MOST_PIXELS / 1e6} are the ` +
        "most that a phone decodes safely; scale it down first.",
    );
  }
  return found;
}
