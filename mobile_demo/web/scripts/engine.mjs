// @ts-check
/** The built worker, driven from a bare page: the app's own decoding, resizing and model without its screens. */
import { readdirSync } from "node:fs";
import { join } from "node:path";

/**
 * @param {import("playwright-core").BrowserContext} context
 * @param {import("./serve.mjs").Served} served
 * @param {string} dist
 */
export async function openEngine(context, served, dist) {
  const worker = readdirSync(join(dist, "assets")).find((name) => name.startsWith("engine.worker"));
  const page = await context.newPage();
  await page.goto(`${served.url}icon.svg`);
  await page.evaluate((url) => {
    const engine = new Worker(url, { type: "module" });
    let last = 0;
    /** @type {Map<number, { resolve: (v: unknown) => void, reject: (e: Error) => void }>} */
    const waiting = new Map();
    engine.onmessage = ({ data }) => {
      const call = waiting.get(data.id);
      if (!call || "progress" in data) return;
      waiting.delete(data.id);
      if (data.error) call.reject(new Error(data.error.message));
      else call.resolve(data.result);
    };
    Object.assign(globalThis, {
      engine: (/** @type {string} */ method, /** @type {object} */ args) =>
        new Promise((resolve, reject) => {
          const id = ++last;
          waiting.set(id, { resolve, reject });
          engine.postMessage({ id, method, args });
        }),
    });
  }, `${served.url}assets/${worker}`);

  /** @param {string} method @param {object} [args] @returns {Promise<any>} */
  const call = (method, args = {}) =>
    // @ts-ignore: put there above
    page.evaluate(([m, a]) => globalThis.engine(m, a), /** @type {const} */ ([method, args]));

  /** @param {string} name @param {string} [method] what to call for it @returns {Promise<any>} */
  const picture = (name, method = "embedPicture") =>
    page.evaluate(
      async ([url, asked, m]) => {
        const blob = await (await fetch(url)).blob();
        const args = m === "embedFrame" ? { frame: await createImageBitmap(blob) } : { blob, name: asked };
        // @ts-ignore: put there above
        const found = await globalThis.engine(m, args);
        return { ...found, embedding: Array.from(found.embedding) };
      },
      /** @type {const} */ ([`${served.url}pictures/${encodeURIComponent(name)}`, name, method]),
    );

  /** @param {string} text @returns {Promise<number[]>} */
  const text = (text) =>
    // @ts-ignore: put there above
    page.evaluate(async (t) => Array.from(await globalThis.engine("embedText", { text: t })), text);

  return { page, call, picture, text, close: () => page.close() };
}

/** @param {ArrayLike<number>} a @param {ArrayLike<number>} b */
export function cosine(a, b) {
  let dot = 0;
  let aa = 0;
  let bb = 0;
  for (let i = 0; i < a.length; i++) {
    const [x, y] = [a[i] ?? NaN, b[i] ?? NaN];
    dot += x * y;
    aa += x * x;
    bb += y * y;
  }
  return dot / Math.sqrt(aa * bb);
}

/**
 * @template T
 * @param {ArrayLike<number>} query @param {{ name: T, embedding: ArrayLike<number> }[]} gallery @param {number} k
 */
export function top(query, gallery, k) {
  return gallery
    .map(({ name, embedding }) => ({ name, score: cosine(query, embedding) }))
    .sort((a, b) => b.score - a.score)
    .slice(0, k)
    .map(({ name }) => name);
}

/** @param {number[]} values */
export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? NaN;
}
