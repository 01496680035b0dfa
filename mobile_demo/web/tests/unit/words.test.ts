/** The model that answers: ids and text as Python has them (tests/mobile_demo/web_cases.py), packed matrices unpacked. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-web/wasm";
import { expect, test } from "vitest";
import { greatest } from "../../src/answerer";
import { unpackBlocks } from "../../src/blocks";
import { readVlmManifest, type VlmContract } from "../../src/contract";
import { Pieces, Words } from "../../src/words";

interface Asked {
  bundles: { int8: string };
  contract: VlmContract;
  tokenizer: string;
  texts: string[];
  ids: (number[] | null)[];
  decoded: { ids: number[]; text: string }[];
}

const file = process.env["ASKED"];
const asked = () => JSON.parse(readFileSync(file!, "utf8")) as Asked;

test.skipIf(!file)("prompts have Python's ids, and those that it refuses are refused", () => {
  const { contract, tokenizer, texts, ids } = asked();
  const words = new Words(tokenizer, contract);
  const found = texts.map((text) => {
    try {
      return words.promptIds(text);
    } catch {
      return null;
    }
  });
  texts.forEach((text, i) => expect(found[i], JSON.stringify(text)).toEqual(ids[i]));
  expect(ids.filter(Boolean).length).toBeGreaterThan(200);
  expect(ids.filter((row) => !row).length).toBeGreaterThan(4);
});

test.skipIf(!file)("ids have Python's text, whole and in pieces", () => {
  const { contract, tokenizer, decoded } = asked();
  const words = new Words(tokenizer, contract);
  for (const { ids, text } of decoded) {
    expect(words.decode(ids)).toBe(text);
    const pieces = new Pieces(words);
    expect(ids.map((id) => pieces.add(id)).join("") + pieces.rest()).toBe(text);
  }
});

test.skipIf(!file)("what cannot be asked says why", () => {
  const { contract, tokenizer } = asked();
  const words = new Words(tokenizer, contract);
  expect(() => words.promptIds(" ")).toThrow(/question is empty/);
  expect(() => words.promptIds("<image> or <image>?")).toThrow(/<image> 2 times/);
  expect(() => words.promptIds("bus ".repeat(200))).toThrow(/has 202 tokens and this model takes \d+; shorten it/);
  expect(() => words.promptIds("\ud800")).toThrow(/half of a character/);
  expect(() => new Words(tokenizer, { ...contract, vocab_size: 7 })).toThrow(/different vocabularies/);
  expect(() => new Words(tokenizer.replace("NFKC", "NFC"), contract)).toThrow(/another kind/);
});

test.skipIf(!file)("unpacked matrices give what the packed ones give", async () => {
  const { bundles } = asked();
  const folder = join(bundles.int8, "vlm");
  const { variants, contract } = readVlmManifest(readFileSync(join(folder, "bundle.json"), "utf8"));
  const packed = new Uint8Array(readFileSync(join(folder, variants[0]!.files.decoder)));
  ort.env.wasm.numThreads = 1;
  const logits: Float32Array[] = [];
  for (const bytes of [packed, unpackBlocks(packed)]) {
    const session = await ort.InferenceSession.create(bytes);
    const feeds: Record<string, ort.Tensor> = {
      prefix: new ort.Tensor("float32", new Float32Array(contract.width * 2).fill(0.5), [1, 2, contract.width]),
      ids: new ort.Tensor("int32", Int32Array.of(3, 300, 4), [1, 3]),
      positions: new ort.Tensor("int32", Int32Array.of(0, 1, 2, 3, 4), [5]),
    };
    for (const input of session.inputMetadata) {
      if (!input.isTensor || input.name in feeds) continue;
      const dims = input.shape.map(Number);
      feeds[input.name] = new ort.Tensor("float32", new Float32Array(dims.reduce((a, b) => a * b)), dims);
    }
    logits.push((await session.run(feeds))["logits"]!.data as Float32Array);
  }
  const [before, after] = logits as [Float32Array, Float32Array];
  expect(Math.max(...before.map((v, i) => Math.abs(v - after[i]!)))).toBeLessThan(1e-4 * Math.max(...before.map(Math.abs)));
  expect(new TextDecoder("latin1").decode(packed)).toContain("MatMulNBits");
  expect(new TextDecoder("latin1").decode(unpackBlocks(packed))).not.toContain("MatMulNBits");
  expect(() => unpackBlocks(packed.slice(0, packed.length >> 1))).toThrow(/no ONNX file/);
});

test("the first of equal logits is taken, and NaN is refused", () => {
  expect(greatest(Float32Array.of(-1, 3, 3))).toBe(1);
  expect(() => greatest(Float32Array.of(1, NaN, 2))).toThrow(/NaN or infinity/);
  expect(() => greatest(Float32Array.of(1, Infinity))).toThrow(/NaN or infinity/);
});

test("a manifest of another kind is refused", () => {
  const raw = { schema_version: "1.0", contract: { kind: "vlm", image: { decode: "v1" }, template: {} }, variants: [] };
  expect(() => readVlmManifest(JSON.stringify({ ...raw, contract: { kind: "dual" } }))).toThrow(/kind 'dual', which cannot be asked/);
  expect(() => readVlmManifest(JSON.stringify(raw))).toThrow(/no ONNX variant/);
});
