// @ts-check
/**
 * What answering costs in the built app, and whether its answers are Python's. Driven by benchmarks/web_ask.py:
 * node scripts/ask.mjs --bundle DIR --pictures DIR --expected FILE --out FILE
 */
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { launch, PHONE } from "./browser.mjs";
import { median, openEngine } from "./engine.mjs";
import { serve } from "./serve.mjs";

const DIST = join(dirname(dirname(fileURLToPath(import.meta.url))), "dist");
const text = { type: /** @type {const} */ ("string"), default: "" };
const { values } = parseArgs({ options: { bundle: text, pictures: text, expected: text, out: text } });
/** @type {{ picture: string, question: string, ids: number[], fp32_ids: number[] }[]} */
const expected = JSON.parse(readFileSync(values.expected, "utf8"));
const browser = await launch();
const served = await serve(DIST, values.bundle, { pictures: values.pictures });
const engine = await openEngine(await browser.newContext(PHONE), served, DIST);
const { threads } = await engine.call("open", { base: `${served.url}bundle/`, processor: "cpu" });
const before = served.sent.length;
const since = performance.now();
await engine.call("openAnswerer");
const openMs = performance.now() - since;
const bytes = served.sent.slice(before).reduce((sum, { bytes }) => sum + bytes, 0);

/** @type {{ ids: number[], firstMs: number, tokensPerSecond: number | null }[]} */
const found = [];
for (const { picture, question } of [...expected.slice(0, 1), ...expected]) {
  found.push(
    await engine.page.evaluate(
      async ([url, asked]) => {
        const blob = await (await fetch(url)).blob();
        // @ts-ignore: put there by openEngine
        return globalThis.engine("ask", { blob, name: "picture", question: asked });
      },
      /** @type {const} */ ([`${served.url}pictures/${picture}`, question]),
    ),
  );
}
found.shift(); // the first run prepares the kernels
const same = (/** @type {"ids" | "fp32_ids"} */ key) => found.filter(({ ids }, i) => ids.join() === expected[i]?.[key].join()).length;
writeFileSync(
  values.out,
  JSON.stringify({
    browser: `Chromium ${browser.version()}`,
    threads,
    bytes_on_first_visit: bytes,
    open_ms: Math.round(openMs),
    first_token_ms_median: median(found.map(({ firstMs }) => firstMs)),
    tokens_per_second_median: median(found.map(({ tokensPerSecond }) => tokensPerSecond).filter((speed) => speed !== null)),
    answers: found.length,
    same_as_python: same("ids"),
    same_as_python_fp32: same("fp32_ids"),
  }),
);
await browser.close();
await served.close();
