// @ts-check
/**
 * Pictures of every screen at phone size, in light and dark, for the docs: node scripts/screenshots.mjs --bundle DIR
 * --pictures DIR --out DIR [--asked PICTURE --question TEXT]. The pictures are the user's; those in the docs are
 * OpenMoji's (CC BY-SA 4.0).
 */
import { readdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { launch, PHONE, untilReady } from "./browser.mjs";
import { serve } from "./serve.mjs";

const DIST = join(dirname(dirname(fileURLToPath(import.meta.url))), "dist");
const text = { type: /** @type {const} */ ("string"), default: "" };
const { values } = parseArgs({ options: { bundle: text, pictures: text, out: text, asked: text, question: text } });
const browser = await launch();

for (const colorScheme of /** @type {const} */ (["light", "dark"])) {
  const served = await serve(DIST, values.bundle);
  const context = await browser.newContext({ ...PHONE, colorScheme, reducedMotion: "reduce" });
  const page = await context.newPage();
  const shoot = (/** @type {string} */ name) =>
    page.screenshot({ path: join(values.out, `web-${name}-${colorScheme}.png`), scale: "device" });
  await page.goto(served.url);
  await untilReady(page);
  await page.waitForSelector("html[data-complete=true]");

  await page.click("#samples button");
  await page.waitForSelector("#guesses li");
  await page.click("#samples button"); // the second time every kernel is warm, as it is for a user
  await page.waitForTimeout(600);
  await page.evaluate(() => scrollTo(0, 0));
  await shoot("classify");

  await page.click('nav a[href="#search"]');
  const files = readdirSync(values.pictures).sort().map((name) => join(values.pictures, name));
  await page.setInputFiles("#index-files", files);
  await page.waitForFunction((count) => document.querySelectorAll("#found li").length >= count, Math.min(60, files.length), { timeout: 60_000 });
  await page.fill("#query", "an animal");
  await page.press("#query", "Enter");
  await page.waitForSelector("#found .score");
  await page.evaluate(() => /** @type {HTMLElement} */ (document.activeElement).blur());
  await page.waitForTimeout(400);
  await shoot("search");

  await page.click('nav a[href="#model"]');
  await shoot("model");
  await page.click("#check");
  await page.waitForSelector("#verdict[data-kind]", { timeout: 60_000 });
  await page.evaluate(() => {
    /** @type {HTMLElement} */ (document.activeElement).blur();
    const card = /** @type {HTMLElement} */ (document.querySelector(".card:has(#check)"));
    scrollTo(0, card.getBoundingClientRect().top + scrollY - 16);
  });
  await shoot("check");

  if (values.asked) {
    await page.click('nav a[href="#ask"]');
    await page.setInputFiles("#ask-file", values.asked);
    await page.fill("#question", values.question);
    for (const _ of [0, 1]) {
      await page.press("#question", "Enter"); // the second time it is open, and its kernels warm
      await page.waitForSelector('#answer[aria-busy="false"] .said', { timeout: 120_000 });
    }
    await page.evaluate(() => {
      /** @type {HTMLElement} */ (document.activeElement).blur();
      scrollTo(0, 0);
    });
    await shoot("ask");
  }
  await context.close();
  await served.close();
}
await browser.close();
