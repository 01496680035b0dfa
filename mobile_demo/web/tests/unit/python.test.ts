/** Cases that Python wrote (tests/mobile_demo/web_cases.py): pixels and ids must be the same to the last bit. */
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import type { ImageSpec, TextSpec } from "../../src/contract";
import { composite, orient, orientation } from "../../src/decode";
import { decodePng } from "../../src/png";
import { resize } from "../../src/resample";
import { Tokenizer } from "../../src/tokenizer";

interface Cases {
  resize: { spec: ImageSpec; width: number; height: number; pixels: string; result: string }[];
  png: { name: string; bytes: string; width: number; height: number; result: string }[];
  tokens: { spec: TextSpec; tokenizer: string; texts: string[]; ids: number[][] }[];
}

const file = process.env["PYTHON_CASES"];
const bytes = (base64: string) => new Uint8Array(Buffer.from(base64, "base64"));

test.skipIf(!file)("what Python computes is computed here", async () => {
  const cases = JSON.parse(readFileSync(file!, "utf8")) as Cases;
  for (const { spec, width, height, pixels, result } of cases.resize) {
    const found = resize({ width, height, channels: 3, data: bytes(pixels) }, spec);
    expect(differing(found, bytes(result)), `${width} x ${height} ${JSON.stringify(spec)}`).toBe(0);
  }
  for (const { name, bytes: encoded, width, height, result } of cases.png) {
    const png = await decodePng(bytes(encoded));
    const found = orient(composite(png, [255, 255, 255]), png.exif ? orientation(png.exif) : 1);
    expect([found.width, found.height], name).toEqual([width, height]);
    expect(differing(found.data, bytes(result)), name).toBe(0);
  }
  const wrong: string[] = [];
  for (const { spec, tokenizer, texts, ids } of cases.tokens) {
    const here = new Tokenizer(tokenizer, spec);
    texts.forEach((text, i) => {
      const found = [...here.encode(text)];
      if (found.join() !== ids[i]!.join()) wrong.push(`${JSON.stringify(text)}: ${found} and not ${ids[i]}`);
    });
  }
  expect(wrong).toEqual([]);
  expect(cases.resize.length).toBeGreaterThan(20);
  expect(cases.png.length).toBeGreaterThan(10);
});

function differing(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Infinity;
  let count = 0;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) count++;
  return count;
}
