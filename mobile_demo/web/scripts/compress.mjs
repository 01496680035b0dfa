// @ts-check
/**
 * Write a .br beside what a server should send compressed; slow (quality 11), so results are kept by hash.
 * node scripts/compress.mjs [dist]
 */
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { brotliCompress, constants } from "node:zlib";

const HERE = dirname(dirname(fileURLToPath(import.meta.url)));
const KEPT = join(HERE, "node_modules", ".cache", "brotli");
const PACKED = /\.(html|js|mjs|css|json|webmanifest|svg|wasm|onnx)$/;
const brotli = promisify(brotliCompress);

/** @param {string} folder @returns {string[]} */
export function filesOf(folder) {
  return readdirSync(folder).flatMap((name) => {
    const path = join(folder, name);
    return statSync(path).isDirectory() ? filesOf(path) : [path];
  });
}

/** @param {string} file @param {string} to */
export async function compress(file, to) {
  if (!PACKED.test(file)) return;
  const data = readFileSync(file);
  const kept = join(KEPT, createHash("sha256").update(data).digest("hex"));
  if (!existsSync(kept)) {
    mkdirSync(KEPT, { recursive: true });
    const params = {
      [constants.BROTLI_PARAM_QUALITY]: 11,
      [constants.BROTLI_PARAM_LGWIN]: 24,
      [constants.BROTLI_PARAM_SIZE_HINT]: data.length,
    };
    writeFileSync(kept, await brotli(data, { params }));
  }
  const packed = readFileSync(kept);
  if (packed.length >= data.length) return;
  mkdirSync(dirname(to), { recursive: true });
  writeFileSync(to, packed);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const dist = process.argv[2] ?? join(HERE, "dist");
  for (const file of filesOf(dist).filter((name) => !name.endsWith(".br"))) {
    await compress(file, `${file}.br`);
    console.log(relative(dist, file));
  }
}
