/** The arithmetic of docs/preprocessing.md by its own worked examples, and what files are told apart by. */
import { expect, test } from "vitest";
import { readManifest } from "../../src/contract";
import { orient, orientation } from "../../src/decode";
import { decodePng } from "../../src/png";
import { probabilities } from "../../src/model";
import { resize, resizePlan, roundHalfEven, taps } from "../../src/resample";
import { checkPicture, sniff } from "../../src/sniff";

test("weights of the worked example", () => {
  const rows = (filter: "bilinear" | "bicubic") => {
    const { first, count, weights, stride } = taps(5, 2, filter, 0, 2);
    return [0, 1].map((i) => [first[i], ...weights.subarray(i * stride, i * stride + count[i]!)]);
  };
  expect(rows("bilinear")).toEqual([
    [0, 1334551, 1715852, 953251, 190650],
    [1, 190650, 953251, 1715852, 1334551],
  ]);
  expect(rows("bicubic")).toEqual([
    [0, 1455822, 1743238, 1004169, 122286, -131211],
    [0, -131211, 122286, 1004169, 1743238, 1455822],
  ]);
});

test("values of the worked example, from three channels and from four", () => {
  const line = [0, 50, 100, 200, 250];
  const spec = { size: 2, resize: "squash", crop_fraction: 1, background: [0, 0, 0], decode: "v1" } as const;
  for (const [filter, wanted] of [
    ["bilinear", [52, 186]],
    ["bicubic", [43, 195]],
  ] as const) {
    for (const channels of [3, 4] as const) {
      // the same line twice, so that the vertical pass has nothing to do
      const data = new Uint8Array([...line, ...line].flatMap((v) => Array<number>(channels).fill(v)));
      const found = resize({ width: 5, height: 2, channels, data }, { ...spec, filter, background: [0, 0, 0] });
      expect([found[0], found[3]]).toEqual(wanted);
    }
  }
});

test("offsets round half to even", () => {
  expect([58.5, 1.5, 0.5, -0.5, 2.4].map(roundHalfEven)).toEqual([58, 2, 0, 0, 2]);
  const spec = { size: 128, resize: "crop", filter: "bilinear", crop_fraction: 1, background: [0, 0, 0], decode: "v1" } as const;
  expect(resizePlan(128, 245, { ...spec, background: [0, 0, 0] })).toEqual({ height: 128, width: 245, top: 0, left: 58 });
});

test("orientations turn as EXIF says", () => {
  const data = new Uint8Array([1, 2, 3, 4, 5, 6].flatMap((v) => [v, v, v]));
  const turned = (value: number) => {
    const { width, data: out } = orient({ width: 3, height: 2, channels: 3, data }, value);
    return [width, ...[...out].filter((_, i) => i % 3 === 0)];
  };
  expect(turned(1)).toEqual([3, 1, 2, 3, 4, 5, 6]);
  expect(turned(2)).toEqual([3, 3, 2, 1, 6, 5, 4]);
  expect(turned(3)).toEqual([3, 6, 5, 4, 3, 2, 1]);
  expect(turned(4)).toEqual([3, 4, 5, 6, 1, 2, 3]);
  expect(turned(5)).toEqual([2, 1, 4, 2, 5, 3, 6]);
  expect(turned(6)).toEqual([2, 4, 1, 5, 2, 6, 3]);
  expect(turned(7)).toEqual([2, 6, 3, 5, 2, 4, 1]);
  expect(turned(8)).toEqual([2, 3, 6, 2, 5, 1, 4]);
  expect(orientation(new Uint8Array([1, 2, 3]))).toBe(1);
});

test("what is no whole picture is refused before it is decoded", async () => {
  const png = Uint8Array.from(Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQAY3Y2wAAAAAElFTkSuQmCC", "base64"));
  expect(sniff(png)).toMatchObject({ type: "png", width: 1, height: 1, whole: true });
  await expect(decodePng(png.slice(0, 45))).rejects.toThrow(/cut short/);
  expect(() => checkPicture(new Uint8Array(), "a.jpg")).toThrow(/empty/);
  const bomb = png.slice();
  new DataView(bomb.buffer).setUint32(16, 60_000);
  new DataView(bomb.buffer).setUint32(20, 60_000);
  expect(() => checkPicture(bomb, "bomb.png")).toThrow(/3600 million pixels/);
  expect(sniff(Uint8Array.from([0xff, 0xd8, 0xff, 0xda, 0, 4, 1, 2, 3])).whole).toBe(false);
  expect(sniff(Uint8Array.from([0xff, 0xd8, 0xff])).whole).toBe(false);
  expect(sniff(new TextEncoder().encode("GIF89a")).whole).toBe(false);
});

test("a damaged PNG is refused", async () => {
  const png = Uint8Array.from(Buffer.from("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQAY3Y2wAAAAAElFTkSuQmCC", "base64"));
  png[44]! ^= 4;
  await expect(decodePng(png)).rejects.toThrow(/damaged/);
});

test("probabilities are a softmax of scaled cosines", () => {
  const found = probabilities(Float32Array.of(1, 0), [Float32Array.of(1, 0), Float32Array.of(0, 1)], 2);
  expect(found[0]).toBeCloseTo(Math.exp(2) / (Math.exp(2) + 1), 12);
});

test("a manifest with a path outside the bundle is refused", () => {
  const raw = {
    schema_version: "1.0",
    contract: { kind: "dual", embed_dim: 4, image: { decode: "v1" }, text: {} },
    tokenizer: "tokenizer.json",
    variants: [{ target: "onnx", precision: "fp32", files: { image: "a", text: "b" } }],
    files: { "../secret": {} },
  };
  expect(() => readManifest(JSON.stringify(raw))).toThrow(/no plain path/);
  expect(() => readManifest(JSON.stringify({ ...raw, files: {} }))).not.toThrow();
  expect(() => readManifest(JSON.stringify({ ...raw, contract: { kind: "classifier" } }))).toThrow(/kind 'classifier'/);
});
