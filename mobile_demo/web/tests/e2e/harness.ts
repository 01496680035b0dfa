import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Browser, BrowserContext, BrowserContextOptions, Page } from "playwright-core";
import { launch, PHONE, untilReady } from "../../scripts/browser.mjs";
import { serve, type Served } from "../../scripts/serve.mjs";

export const DIST = join(dirname(fileURLToPath(import.meta.url)), "..", "..", "dist");
/** A prepared bundle; by default the one that the app was built with. */
export const BUNDLE = process.env["WEB_BUNDLE"] ?? join(DIST, "bundle");

export interface Visit {
  page: Page;
  context: BrowserContext;
  served: Served;
  /** what the page itself complained of */
  complaints: string[];
  /** addresses outside our server that anything asked for */
  remote: string[];
  close: () => Promise<void>;
}

type ServeOptions = Parameters<typeof serve>[2];

/** A new visitor with a phone, before the first page. */
export async function visitor(
  browser: Browser,
  options: { serve?: ServeOptions; context?: BrowserContextOptions; bundle?: string } = {},
): Promise<Visit> {
  const served = await serve(DIST, options.bundle ?? BUNDLE, options.serve);
  const context = await browser.newContext({ ...PHONE, ...options.context });
  const complaints: string[] = [];
  const remote: string[] = [];
  context.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(served.url) && !/^(blob|data):/.test(url)) remote.push(url);
  });
  context.on("weberror", (error) => complaints.push(String(error.error())));
  const page = await context.newPage();
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  const close = async () => {
    await context.close();
    await served.close();
  };
  return { page, context, served, complaints, remote, close };
}

export async function open(browser: Browser, options: Parameters<typeof visitor>[1] = {}): Promise<Visit> {
  const visit = await visitor(browser, options);
  await visit.page.goto(visit.served.url);
  await untilReady(visit.page);
  return visit;
}

export { launch, untilReady };

export async function guesses(page: Page): Promise<string[]> {
  await page.waitForSelector("#guesses .guess-label", { timeout: 20_000 });
  return page.locator("#guesses .guess-label").allTextContents();
}

/** Run the conformance check of the Model screen: the verdict, and the stages that it shows. */
export async function check(page: Page): Promise<{ verdict: string; passed: Record<string, boolean> }> {
  await page.click('nav a[href="#model"]');
  await page.click("#check");
  await page.waitForSelector("#verdict[data-kind]", { timeout: 60_000 });
  const rows = await page.locator("#stages > li").evaluateAll((list) =>
    list.map((row) => [(row as HTMLElement).dataset["stage"]!, (row as HTMLElement).dataset["passed"] === "true"] as const),
  );
  return { verdict: (await page.textContent("#verdict")) ?? "", passed: Object.fromEntries(rows) };
}

export interface Pictures {
  folder: string;
  good: string[];
  text: string;
  half: string;
}

/** Pictures out of the bundle, a text file that calls itself one, and a JPEG cut in half. */
export function pictures(): Pictures {
  const folder = mkdtempSync(join(tmpdir(), "pictures-"));
  const vectors = JSON.parse(readFileSync(join(BUNDLE, "conformance/vectors.json"), "utf8")) as {
    images: { name: string; bytes_file: string; lossy: boolean }[];
  };
  const copy = (from: string, to: string) => {
    writeFileSync(join(folder, to), readFileSync(join(BUNDLE, from)));
    return join(folder, to);
  };
  const good = vectors.images.map((c) => copy(c.bytes_file, `${c.name}${c.bytes_file.slice(c.bytes_file.lastIndexOf("."))}`));
  const text = join(folder, "letter.png");
  writeFileSync(text, "Dear reader, this is no picture.");
  const half = join(folder, "half.jpg");
  const jpeg = readFileSync(join(BUNDLE, vectors.images.find((c) => c.lossy)!.bytes_file));
  writeFileSync(half, jpeg.subarray(0, jpeg.length >> 1));
  return { folder, good, text, half };
}
