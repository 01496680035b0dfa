/** Files that were tampered with, and browsers that lack something. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { BUNDLE, check, guesses, launch, open, pictures, untilReady, visitor } from "./harness";

let browser: Browser;
beforeAll(async () => void (browser = await launch()));
afterAll(() => browser.close());

interface Manifest {
  schema_version: string;
  variants: { target: string; precision: string; files: Record<string, string> }[];
  contract: { image: { decode: string } };
}

const manifest = JSON.parse(readFileSync(join(BUNDLE, "bundle.json"), "utf8")) as Manifest;
const model = manifest.variants.find((v) => v.target === "onnx" && v.precision === "int8")!.files;

describe("what is not what bundle.json vouches for is refused", () => {
  const flipped = (body: Buffer) => Buffer.from(body.map((byte, i) => (i === body.length >> 1 ? byte ^ 1 : byte)));
  const altered = (change: (raw: Manifest) => void) => (body: Buffer) => {
    const raw = JSON.parse(body.toString()) as Manifest;
    change(raw);
    return Buffer.from(JSON.stringify(raw));
  };
  test.each<[string, string, (body: Buffer) => Buffer | null, RegExp]>([
    ["one bit of the model", `bundle/${model["image"]}`, flipped, /sha256 .* changed or damaged/],
    ["a longer model", `bundle/${model["image"]}`, (body) => Buffer.concat([body, body]), /longer than the \d+ bytes/],
    ["a shorter model", `bundle/${model["image"]}`, (body) => body.subarray(0, 100), /sha256/],
    ["no model", `bundle/${model["image"]}`, () => null, /server answers 404/],
    ["a newer schema", "bundle/bundle.json", altered((raw) => (raw.schema_version = "1.9")), /schema version 1\.9/],
    ["another decoding", "bundle/bundle.json", altered((raw) => (raw.contract.image.decode = "v2")), /decoding 'v2'/],
    ["no ONNX file", "bundle/bundle.json", altered((raw) => (raw.variants = [])), /no ONNX variant/],
    ["no JSON", "bundle/bundle.json", () => Buffer.from("{"), /not JSON/],
  ])("%s", async (_, path, fault, message) => {
    const visit = await visitor(browser);
    visit.served.faults.set(path, fault);
    await visit.page.goto(visit.served.url);
    await visit.page.waitForSelector("#fatal:not([hidden])");
    expect(await visit.page.textContent("#fatal")).toMatch(message);
    expect(await visit.page.textContent("#status")).toBe("No model");
    await visit.close();
  });

  test("a text tower that was changed is refused when it is first needed", async () => {
    const visit = await visitor(browser);
    visit.served.faults.set(`bundle/${model["text"]}`, flipped);
    await visit.page.goto(visit.served.url);
    await untilReady(visit.page);
    await visit.page.setInputFiles("#picture-file", pictures().good[0]!);
    await expect.poll(() => visit.page.textContent("#toast")).toContain("changed or damaged");
    await visit.close();
  });

  test("a kept file that was changed on the device is fetched again", async () => {
    const { page, close } = await open(browser);
    await page.evaluate(async () => {
      const cache = await caches.open("pocketvlm-bundle");
      for (const request of await cache.keys()) {
        if (request.url.includes("by-sha256")) await cache.put(request, new Response(new Uint8Array(10)));
      }
    });
    await page.reload();
    await untilReady(page);
    const { verdict } = await check(page);
    expect(verdict).toBe("Every stage gives the recorded numbers.");
    await close();
  });
});

describe("another bundle at the same address", () => {
  const renamed = (body: Buffer) => {
    const raw = JSON.parse(body.toString()) as { files: Record<string, { sha256: string }> };
    raw.files[model["text"]!]!.sha256 = "0".repeat(64);
    return Buffer.from(JSON.stringify(raw));
  };
  const keptText = (page: Page) =>
    page.evaluate(async (wanted) => {
      const cache = await caches.open("pocketvlm-bundle");
      const manifest = (await (await cache.match(new URL("bundle/bundle.json", location.href).href))!.json()) as {
        files: Record<string, { sha256: string }>;
      };
      return manifest.files[wanted]!.sha256;
    }, model["text"]!);

  test("the one before serves offline until all of the new one is here", async () => {
    const { page, context, served, close } = await open(browser);
    await page.waitForSelector("html[data-complete]");
    await page.evaluate(() => navigator.serviceWorker.ready);
    const before = await keptText(page);
    served.faults.set("bundle/bundle.json", renamed);
    served.faults.set(`bundle/${model["text"]}`, () => null);
    await page.reload();
    await untilReady(page);
    expect(await keptText(page)).toBe(before);
    await context.setOffline(true);
    await page.reload();
    await untilReady(page);
    await page.setInputFiles("#picture-file", pictures().good[0]!);
    expect(await guesses(page)).toHaveLength(5);
    await close();
  });
});

describe("a browser or a host that lacks something", () => {
  const picture = pictures().good[0]!;

  test("a host without headers: the service worker isolates the page, and there are threads", async () => {
    const { page, close } = await open(browser, { serve: { headers: {} } });
    expect(await page.evaluate(() => crossOriginIsolated)).toBe(true);
    expect(await page.textContent("#status")).toMatch(/\d threads/);
    await close();
  });

  test("no threads: one is used, and the page says so", async () => {
    const { page, served, close } = await visitor(browser, { serve: { headers: {} } });
    served.faults.set("sw.js", () => null);
    await page.goto(served.url);
    await untilReady(page);
    expect(await page.textContent("#status")).toContain("1 thread");
    await page.setInputFiles("#picture-file", picture);
    expect(await guesses(page)).toHaveLength(5);
    await page.click('nav a[href="#model"]');
    expect(await page.textContent("#runtime-note")).toContain("no threads");
    await close();
  });

  test("no SIMD: the older runtime is used, says so, and passes the vectors", async () => {
    const old = await launch(["--js-flags=--no-enable-sse4-1"]);
    const { page, served, close } = await open(old);
    expect(await page.textContent("#status")).toContain("no SIMD");
    const { verdict } = await check(page);
    expect(verdict).toBe("Every stage gives the recorded numbers.");
    expect(await page.textContent("#runtime-note")).toContain("no WASM SIMD");
    expect(served.requests.filter((name) => name.includes("asyncify"))).toEqual([]);
    await close();
    await old.close();
  });

  test("the runtimes for GPU and for no SIMD are not fetched unless they are used", async () => {
    const { page, served, close } = await open(browser);
    await page.evaluate(() => navigator.serviceWorker.ready);
    expect(served.requests.filter((name) => /asyncify|webgpu|nosimd/.test(name))).toEqual([]);
    await close();
  });
});
