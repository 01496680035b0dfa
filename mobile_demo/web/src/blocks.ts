/**
 * Matrices kept in blocks of 8 or 4 bits (MatMulNBits) become plain float32 when a decoder is opened. onnxruntime-web
 * has no kernel for them and would unpack every one again for every token, which takes several times as long; so the
 * download is that of the packed file, and the memory that of the plain one. The numbers are those of the packed file.
 */
import { IntegrityError } from "./errors";

interface Field {
  number: number;
  /** of a varint */
  value: number;
  /** of bytes, else empty */
  body: Uint8Array;
  /** the field with its tag */
  whole: Uint8Array;
}

interface Node {
  inputs: string[];
  outputs: string[];
  kind: string;
  numbers: Map<string, number>;
}

const GRAPH = 7; // ModelProto.graph
const NODE = 1; // GraphProto.node
const INITIALIZER = 5; // GraphProto.initializer

/** The ONNX file with every MatMulNBits as a MatMul by the float32 [K, N] that its blocks stand for. */
export function unpackBlocks(model: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  const parts: Uint8Array[] = [];
  for (const field of fields(model)) {
    if (field.number === GRAPH) parts.push(...message(GRAPH, unpackGraph(field.body)));
    else parts.push(field.whole);
  }
  return joined(parts);
}

function unpackGraph(graph: Uint8Array): Uint8Array[] {
  const all = [...fields(graph)];
  const constants = new Map<string, Uint8Array>();
  for (const { number, body } of all) if (number === INITIALIZER) constants.set(nameOf(body), body);
  const nodes: Uint8Array[] = [];
  const made = new Map<string, Uint8Array[]>();
  const used = new Set<string>();
  for (const { number, body, whole } of all) {
    if (number !== NODE) continue;
    const node = readNode(body);
    if (node.kind === "MatMulNBits") {
      const [x, blocks, scales] = node.inputs as [string, string, string];
      const name = `${blocks}_float`;
      if (!made.has(name)) made.set(name, matrix(name, node.numbers, dataOf(constants, blocks), dataOf(constants, scales)));
      const strings = [text(1, x), text(1, name), text(2, node.outputs[0]!), text(4, "MatMul")];
      nodes.push(...message(NODE, strings.flat()));
    } else {
      nodes.push(whole);
      node.inputs.forEach((name) => used.add(name));
    }
  }
  // the token table's blocks are looked up too, so they stay beside their float32
  const others = all.filter(({ number, body }) => number !== NODE && (number !== INITIALIZER || used.has(nameOf(body))));
  return [...nodes, ...[...made.values()].flat(), ...others.map(({ whole }) => whole)];
}

/** An initializer float32 [K, N] of uint8 [N, K / size, size * bits / 8] and float32 [N, K / size]. */
function matrix(name: string, numbers: Map<string, number>, blocks: Uint8Array, scaleBytes: Uint8Array): Uint8Array[] {
  const [K, N, bits, size] = ["K", "N", "bits", "block_size"].map((key) => numbers.get(key) ?? 0) as [number, number, number, number];
  const each = Math.ceil(K / size);
  const bytes = (size * bits) / 8;
  if ((bits !== 4 && bits !== 8) || blocks.length !== N * each * bytes || scaleBytes.length !== 4 * N * each) {
    throw new IntegrityError("The decoder's packed matrices are not laid out as this app reads them; use a matching release.");
  }
  const scales = new Float32Array(scaleBytes.slice().buffer);
  const out = new Float32Array(K * N);
  const middle = 2 ** (bits - 1);
  // a few columns at a time: a whole one would touch another cache line with every number
  for (let from = 0; from < N; from += 16) {
    const to = Math.min(from + 16, N);
    for (let k = 0; k < K; k++) {
      const at = k % size;
      for (let n = from; n < to; n++) {
        const block = n * each + (k - at) / size;
        const level =
          bits === 8 ? blocks[block * bytes + at]! : (blocks[block * bytes + (at >> 1)]! >> (4 * (at & 1))) & 15;
        out[k * N + n] = (level - middle) * scales[block]!;
      }
    }
  }
  const raw = new Uint8Array(out.buffer);
  return message(INITIALIZER, [...number(1, K), ...number(1, N), ...number(2, 1), ...text(8, name), ...message(9, [raw])]);
}

function readNode(body: Uint8Array): Node {
  const node: Node = { inputs: [], outputs: [], kind: "", numbers: new Map() };
  for (const field of fields(body)) {
    if (field.number === 1) node.inputs.push(utf8(field.body));
    else if (field.number === 2) node.outputs.push(utf8(field.body));
    else if (field.number === 4) node.kind = utf8(field.body);
    else if (field.number === 5) {
      const parts = [...fields(field.body)];
      const value = parts.find((part) => part.number === 3)?.value;
      if (value !== undefined) node.numbers.set(utf8(parts.find((part) => part.number === 1)!.body), value);
    }
  }
  return node;
}

function nameOf(tensor: Uint8Array): string {
  for (const field of fields(tensor)) if (field.number === 8) return utf8(field.body);
  return "";
}

function dataOf(constants: Map<string, Uint8Array>, name: string): Uint8Array {
  for (const field of fields(constants.get(name) ?? new Uint8Array())) if (field.number === 9) return field.body;
  throw new IntegrityError("A packed matrix of the decoder lies outside its file; export the bundle again.");
}

const utf8 = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

/** The fields of one protocol buffer message. */
function* fields(bytes: Uint8Array): Generator<Field> {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      if (byte === undefined) throw new IntegrityError("The decoder's file is no ONNX file; export the bundle again.");
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const from = at;
    const tag = varint();
    let value = 0;
    let start = at;
    if ((tag & 7) === 0) value = varint();
    else {
      const length = { 1: 8, 2: -1, 5: 4 }[tag & 7] ?? NaN;
      const size = length < 0 ? varint() : length;
      start = at;
      at += size;
      if (!(at <= bytes.length)) throw new IntegrityError("The decoder's file is no ONNX file; export the bundle again.");
    }
    const body = (tag & 7) === 2 ? bytes.subarray(start, at) : bytes.subarray(0, 0);
    yield { number: tag >>> 3, value, body, whole: bytes.subarray(from, at) };
  }
}

function encoded(value: number): Uint8Array {
  const out: number[] = [];
  for (; value >= 128; value = Math.floor(value / 128)) out.push((value % 128) + 128);
  return Uint8Array.from([...out, value]);
}

const number = (field: number, value: number) => [encoded(field << 3), encoded(value)];
const text = (field: number, value: string) => message(field, [new TextEncoder().encode(value)]);

function message(field: number, parts: Uint8Array[]): Uint8Array[] {
  const size = parts.reduce((sum, part) => sum + part.length, 0);
  return [encoded((field << 3) | 2), encoded(size), ...parts];
}

function joined(parts: Uint8Array[]): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
