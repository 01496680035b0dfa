// @ts-check
/**
 * What the built app costs on one bundle, and how it agrees with Python. Driven by benchmarks/web.py:
 * node scripts/bench.mjs --bundle DIR --pictures DIR --expected FILE --out FILE
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { agree } from "./agreement.mjs";
import { launch, PHONE, untilReady } from "./browser.mjs";
import { compress } from "./compress.mjs";
import { median, openEngine } from "./engine.mjs";
import { serve } from "./serve.mjs";

const DIST = join(dirname(dirname(fileURLToPath(import.meta.url))), "dist");
const RUNS = 100;
const text = { type: /** @type {const} */ ("string"), default: "" };
const { values } = parseArgs({ options: { bundle: text, pictures: text, expected: text, out: text } });
/** @type {import("./agreement.mjs").Expected} */
const expected = JSON.parse(readFileSync(values.expected, "utf8"));
const precisions = Object.keys(expected.precisions);
const browser = await launch();

/** Bytes as sent to a new visitor until pictures can be chosen, and until everything for offline is there. */
async function firstLoad() {
  const compressed = mkdtempSync(join(tmpdir(), "web-"));
  try {
    const plain = await visit(undefined);
    for (const name of new Set(plain.requests)) {
      const file = name.startsWith("bundle/") ? join(values.bundle, name.slice(7)) : join(DIST, name || "index.html");
      await compress(file, join(compressed, `${name || "index.html"}.br`));
    }
    const { requests, ...packed } = await visit(compressed);
    return { uncompressed_bytes: plain.all_bytes, ...packed };
  } finally {
    rmSync(compressed, { recursive: true });
  }
}

/** @param {string | undefined} compressed */
async function visit(compressed) {
  const served = await serve(DIST, values.bundle, compressed ? { compressed } : {});
  const context = await browser.newContext(PHONE);
  const page = await context.newPage();
  const started = Date.now();
  await page.goto(served.url);
  await untilReady(page);
  const readyMs = Date.now() - started;
  await page.evaluate(() => navigator.serviceWorker.ready);
  await page.waitForSelector("html[data-complete=true]");
  await page.evaluate(() => navigator.serviceWorker.ready);
  const later = /text-[^/]*\.onnx$|tokenizer\.json$/;
  const all = served.sent.reduce((sum, { bytes }) => sum + bytes, 0);
  const after = served.sent.filter(({ path }) => later.test(path)).reduce((sum, { bytes }) => sum + bytes, 0);
  const found = { ready_bytes: all - after, all_bytes: all, ready_ms: readyMs, requests: [...served.requests] };
  await context.close();
  await served.close();
  return found;
}

/** Milliseconds of one picture at a time, after five that warm up. */
async function timing(/** @type {string} */ precision, /** @type {number} */ threads) {
  const served = await serve(DIST, values.bundle, { pictures: values.pictures });
  const context = await browser.newContext(PHONE);
  const engine = await openEngine(context, served, DIST);
  await engine.call("open", { base: `${served.url}bundle/`, processor: "cpu", precision, threads });
  /** @type {Record<string, number>} */
  const found = {};
  for (const { what, method, names, runs } of [
    { what: "picture", method: "embedPicture", names: expected.pictures, runs: RUNS },
    { what: "camera_frame_480", method: "embedFrame", names: ["camera.png"], runs: RUNS },
    { what: "photo_12_megapixels", method: "embedPicture", names: ["photo.jpg"], runs: 10 },
  ]) {
    /** @type {{ decode: number[], resize: number[], model: number[], all: number[] }} */
    const ms = { decode: [], resize: [], model: [], all: [] };
    let cpu = 0;
    for (let i = 0; i < runs + 5; i++) {
      if (i === 5) cpu = rendererCpuMs();
      const { decodeMs, resizeMs, modelMs } = await engine.picture(names[i % names.length] ?? "", method);
      if (i < 5) continue;
      ms.decode.push(decodeMs);
      ms.resize.push(resizeMs);
      ms.model.push(modelMs);
      ms.all.push(decodeMs + resizeMs + modelMs);
    }
    // what a busy machine does not stretch; it counts the page around the call too
    found[`${what}_cpu_ms_mean`] = round((rendererCpuMs() - cpu) / runs);
    for (const [part, all] of Object.entries(ms)) found[`${what}_${part}_ms_median`] = round(median(all));
    ms.all.sort((a, b) => a - b);
    // on a busy machine the fastest tenth is nearest to an idle one
    for (const p of [10, 95]) found[`${what}_all_ms_p${p}`] = round(ms.all[Math.floor((p * runs) / 100)] ?? NaN);
  }
  await context.close();
  await served.close();
  return { precision, threads, runs: RUNS, ...found };
}

/** CPU time that all of our browser's page processes have used (Linux; 0 elsewhere). */
function rendererCpuMs() {
  if (!existsSync("/proc/self/stat")) return 0;
  let ticks = 0;
  for (const pid of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    try {
      const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ").at(-1)?.split(" ") ?? [];
      if (readFileSync(`/proc/${pid}/cmdline`, "utf8").includes("--type=renderer")) ticks += Number(fields[11]) + Number(fields[12]);
    } catch {
      // it ended meanwhile
    }
  }
  return 10 * ticks;
}

async function agreement() {
  /** @type {Record<string, unknown>} */
  const found = {};
  for (const precision of precisions) {
    const served = await serve(DIST, values.bundle, { pictures: values.pictures });
    const context = await browser.newContext(PHONE);
    const engine = await openEngine(context, served, DIST);
    const agreed = await agree(engine, served.url, expected, precision);
    const stages = await engine.call("conformance");
    found[precision] = {
      ...agreed,
      conformance: stages.map((/** @type {any} */ { stage, passed, cases, worst, budget, notes }) => ({ stage, passed, cases, worst, budget, notes })),
    };
    await context.close();
    await served.close();
  }
  return found;
}

/** How far this browser's decoders are from Python's, in grey levels, over the whole decoded pictures. */
async function decoders() {
  const served = await serve(DIST, values.bundle, { pictures: values.pictures });
  const context = await browser.newContext(PHONE);
  const page = await context.newPage();
  await page.goto(`${served.url}icon.svg`);
  /** @type {Record<string, { pictures: number, exactly_equal: number, worst_mean: number, most: number }>} */
  const found = {};
  for (const { kind, name, raw, background } of expected.decoders ?? []) {
    const { mean, most } = await page.evaluate(
      async ([url, wanted, color]) => {
        const options = /** @type {const} */ ({ colorSpaceConversion: "none", premultiplyAlpha: "none" });
        const bitmap = await createImageBitmap(await (await fetch(url)).blob(), options);
        const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
        if (!context) throw new Error("no canvas");
        context.fillStyle = color;
        context.fillRect(0, 0, bitmap.width, bitmap.height);
        context.drawImage(bitmap, 0, 0);
        const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
        const other = new Uint8Array(await (await fetch(wanted)).arrayBuffer());
        let sum = 0;
        let most = other.length === (data.length / 4) * 3 ? 0 : NaN;
        for (let i = 0, k = 0; i < data.length; i += 4, k += 3) {
          for (let c = 0; c < 3; c++) {
            const d = Math.abs((data[i + c] ?? NaN) - (other[k + c] ?? NaN));
            sum += d;
            if (!(d <= most)) most = d;
          }
        }
        return { mean: sum / other.length, most };
      },
      /** @type {const} */ ([`${served.url}pictures/${name}`, `${served.url}pictures/${raw}`, background]),
    );
    const row = (found[kind] ??= { pictures: 0, exactly_equal: 0, worst_mean: 0, most: 0 });
    row.pictures++;
    if (most === 0) row.exactly_equal++;
    row.worst_mean = Math.max(row.worst_mean, round(mean));
    row.most = Math.max(row.most, most);
  }
  await context.close();
  await served.close();
  return found;
}

const round = (/** @type {number} */ value) => Math.round(1000 * value) / 1000;
const result = {
  browser: `Chromium ${browser.version()}`,
  first_load: await firstLoad(),
  timing: /** @type {unknown[]} */ ([]),
  agreement: await agreement(),
  decoders_beside_pillow_grey_levels: await decoders(),
};
for (const precision of precisions) for (const threads of [1, 2]) result.timing.push(await timing(precision, threads));
await browser.close();
writeFileSync(values.out, JSON.stringify(result, null, 1));
