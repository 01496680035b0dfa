/** Encoded pictures to RGB as the contract's decode "v1" says; the browser decodes, PNG is read by ourselves. */
import type { ImageSpec } from "./contract";
import { PictureError } from "./errors";
import { decodePng } from "./png";
import { resize, type Pixels } from "./resample";
import { checkPicture } from "./sniff";

const STRIP = 4_000_000; // pixels read back at a time; some phones cap a canvas at 16 million

/** Decode one picture to straight pixels without transparency. */
export async function decodePicture(blob: Blob, spec: ImageSpec, name = "the picture"): Promise<Pixels> {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const found = checkPicture(bytes, name);
  if (found.type === "png") {
    const png = await decodePng(bytes);
    return orient(composite(png, spec.background), png.exif ? orientation(png.exif) : 1);
  }
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(blob, {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
      imageOrientation: "from-image",
    });
  } catch {
    throw new PictureError(`“${name}” is not a picture that this browser can read; convert it to JPEG, PNG or WebP.`);
  }
  try {
    return fromBitmap(bitmap, spec);
  } finally {
    bitmap.close();
  }
}

/** Pixels of a decoded bitmap or camera frame over the background. */
export function fromBitmap(bitmap: ImageBitmap, spec: ImageSpec): Pixels {
  const { width, height } = bitmap;
  const rows = Math.max(1, Math.min(height, Math.floor(STRIP / width)));
  const canvas = new OffscreenCanvas(width, rows);
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  if (!context) throw new PictureError("This browser gives no canvas to read pixels with; use a newer one.");
  const data = new Uint8ClampedArray(width * height * 4);
  context.fillStyle = `rgb(${spec.background.join(" ")})`;
  for (let y = 0; y < height; y += rows) {
    const count = Math.min(rows, height - y);
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, y, width, count, 0, 0, width, count);
    data.set(context.getImageData(0, 0, width, count).data, y * width * 4);
  }
  return { width, height, channels: 4, data };
}

/** Decode and resize: uint8 [size, size, 3]. */
export async function loadPicture(blob: Blob, spec: ImageSpec, name?: string): Promise<Uint8Array> {
  return resize(await decodePicture(blob, spec, name), spec);
}

/** Lay straight alpha over the background in integers. */
export function composite(pixels: Pixels, background: readonly [number, number, number]): Pixels {
  if (pixels.channels === 3) return pixels;
  const { data, width, height } = pixels;
  const out = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
    const a = data[from + 3]!;
    for (let c = 0; c < 3; c++) {
      out[to + c] = Math.floor((data[from + c]! * a + background[c]! * (255 - a) + 127) / 255);
    }
  }
  return { width, height, channels: 3, data: out };
}

/** The EXIF tag Orientation (274) of a TIFF block; 1 where it is absent or damaged. */
export function orientation(exif: Uint8Array): number {
  try {
    const view = new DataView(exif.buffer, exif.byteOffset, exif.byteLength);
    const little = view.getUint16(0) === 0x4949;
    const directory = view.getUint32(4, little);
    for (let i = 0; i < view.getUint16(directory, little); i++) {
      const entry = directory + 2 + 12 * i;
      if (view.getUint16(entry, little) === 274) return view.getUint16(entry + 8, little);
    }
  } catch {
    // damaged metadata says nothing about the pixels, which are fine
  }
  return 1;
}

/** Turn or mirror as an EXIF orientation says. */
export function orient(pixels: Pixels, value: number): Pixels {
  if (!(value >= 2 && value <= 8)) return pixels;
  const { width, height, channels, data } = pixels;
  const swap = value >= 5;
  const [w, h] = swap ? [height, width] : [width, height];
  const out = new Uint8Array(data.length);
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const across = [2, 3, 6, 7].includes(value) ? w - 1 - x : x;
      const down = [3, 4, 7, 8].includes(value) ? h - 1 - y : y;
      const [fromX, fromY] = swap ? [down, across] : [across, down];
      const from = (fromY * width + fromX) * channels;
      const to = (y * w + x) * channels;
      for (let c = 0; c < channels; c++) out[to + c] = data[from + c]!;
    }
  }
  return { width: w, height: h, channels, data: out };
}
