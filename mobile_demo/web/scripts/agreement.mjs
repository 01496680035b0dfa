// @ts-check
/**
 * The browser beside Python's onnxruntime, on the same files: what Python expects is written by benchmarks/web.py.
 *
 * @typedef {object} Expected
 * @property {string[]} labels
 * @property {string[]} templates
 * @property {string[]} pictures file names
 * @property {string[]} queries
 * @property {Record<string, { images: number[][], texts: number[][], top_labels: string[], top_five: string[][] }>} precisions
 * @property {{ kind: string, name: string, raw: string, background: string }[]} [decoders] encoded, and as Python decodes
 */
import { cosine, top } from "./engine.mjs";

/**
 * @param {Awaited<ReturnType<typeof import("./engine.mjs").openEngine>>} engine
 * @param {string} base
 * @param {Expected} expected
 * @param {string} precision
 * @param {object} [options] of `open`
 */
export async function agree(engine, base, expected, precision, options = {}) {
  const wanted = expected.precisions[precision];
  if (!wanted) throw new Error(`nothing is expected at ${precision}`);
  const opened = await engine.call("open", { base: `${base}bundle/`, processor: "cpu", precision, ...options });
  /** @type {{ name: string, embedding: number[] }[]} */
  const gallery = [];
  for (const name of expected.pictures) gallery.push({ name, embedding: (await engine.picture(name)).embedding });
  const rows = await engine.page.evaluate(
    // @ts-ignore: put there by openEngine
    async (args) => (await globalThis.engine("embedLabels", args)).map((row) => Array.from(row)),
    { labels: expected.labels, templates: expected.templates },
  );
  const labels = expected.labels.map((name, i) => ({ name, embedding: /** @type {number[]} */ (rows[i]) }));
  const texts = [];
  for (const query of expected.queries) texts.push(await engine.text(query));
  const imageCosines = gallery.map(({ embedding }, i) => cosine(embedding, wanted.images[i] ?? []));
  const textCosines = texts.map((row, i) => cosine(row, wanted.texts[i] ?? []));
  const sameLabel = gallery.filter(({ embedding }, i) => top(embedding, labels, 1)[0] === wanted.top_labels[i]).length;
  const overlaps = texts.map((row, i) => top(row, gallery, 5).filter((name) => wanted.top_five[i]?.includes(name)).length);
  const inOrder = texts.filter((row, i) => top(row, gallery, 5).join() === wanted.top_five[i]?.join()).length;
  return {
    threads: opened.threads,
    simd: opened.simd,
    pictures: gallery.length,
    queries: texts.length,
    worst_image_cosine: Math.min(...imageCosines),
    worst_text_cosine: Math.min(...textCosines),
    same_top_label: sameLabel,
    mean_top5_overlap: overlaps.reduce((a, b) => a + b, 0) / overlaps.length,
    same_top5_in_order: inOrder,
  };
}
