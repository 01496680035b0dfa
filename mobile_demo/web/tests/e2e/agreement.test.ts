/** The browser and Python's onnxruntime on the same files; what Python found is in EXPECTED (benchmarks/web.py). */
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { expect, test } from "vitest";
import { agree, type Expected } from "../../scripts/agreement.mjs";
import { PHONE } from "../../scripts/browser.mjs";
import { openEngine } from "../../scripts/engine.mjs";
import { serve } from "../../scripts/serve.mjs";
import { BUNDLE, DIST, launch } from "./harness";

const file = process.env["EXPECTED"];

test.skipIf(!file).each(["fp32", "int8"])("same embeddings, labels and ranks at %s", async (precision) => {
  const expected = JSON.parse(readFileSync(file!, "utf8")) as Expected;
  const browser = await launch();
  const served = await serve(DIST, BUNDLE, { pictures: join(dirname(file!), "pictures") });
  const engine = await openEngine(await browser.newContext(PHONE), served, DIST);
  const found = await agree(engine, served.url, expected, precision);
  expect(found.queries).toBe(100);
  if (precision === "fp32") {
    expect(found.worst_image_cosine).toBeGreaterThanOrEqual(0.9999);
    expect(found.worst_text_cosine).toBeGreaterThanOrEqual(0.9999);
    expect(found.same_top_label).toBe(found.pictures);
    expect(found.same_top5_in_order).toBe(found.queries);
  }
  expect(found.mean_top5_overlap).toBeGreaterThanOrEqual(4.9);
  await browser.close();
  await served.close();
});
