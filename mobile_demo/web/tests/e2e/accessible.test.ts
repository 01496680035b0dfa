/** Every screen in both colour schemes against the rules of axe-core; touch targets; no sideways scrolling. */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import { check, guesses, launch, open, pictures } from "./harness";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const asked = process.env["ASKED"];
let browser: Browser;
beforeAll(async () => void (browser = await launch()));
afterAll(() => browser.close());

interface Axe {
  run(options: object): Promise<{ violations: { id: string; nodes: { html: string; failureSummary?: string }[] }[] }>;
}

async function rules(page: Page) {
  await page.evaluate(axe);
  const violations = async (): Promise<string[]> => {
    const found = await page.evaluate(() =>
      (globalThis as unknown as { axe: Axe }).axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"] }),
    );
    return found.violations.flatMap(({ id, nodes }) => nodes.map((node) => `${id}: ${node.html.slice(0, 160)} ${node.failureSummary ?? ""}`));
  };
  const sideways = () => page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  const small = () =>
    page.evaluate(() =>
      [...document.querySelectorAll<HTMLElement>("button, a, summary, label.button, .segments label, input:not(.unseen), textarea")]
        .filter((target) => target.checkVisibility() && !target.closest("dialog"))
        .map((target) => ({ target, box: target.getBoundingClientRect() }))
        .filter(({ box }) => box.height < 40 || box.width < 40)
        .map(({ target, box }) => `${target.outerHTML.slice(0, 80)} ${box.width} x ${box.height}`),
    );
  return { violations, sideways, small };
}

test.each(["light", "dark"] as const)("screens are accessible in %s", async (colorScheme) => {
  const { page, close } = await open(browser, { context: { colorScheme, reducedMotion: "reduce" } });
  const files = pictures();
  const { violations, sideways, small } = await rules(page);

  await page.setInputFiles("#picture-file", files.good[0]!);
  await guesses(page);
  await page.click("details summary");
  expect(await violations()).toEqual([]);
  expect(await small()).toEqual([]);
  expect(await sideways()).toBeLessThanOrEqual(0);
  await page.click('nav a[href="#search"]');
  expect(await violations()).toEqual([]);
  await page.setInputFiles("#index-files", files.good.slice(0, 4));
  await expect.poll(() => page.locator("#found li").count()).toBe(4);
  await page.fill("#query", "a bus");
  await page.press("#query", "Enter");
  await page.waitForSelector("#found .score");
  expect(await violations()).toEqual([]);
  expect(await small()).toEqual([]);
  await page.click("#found li:first-child button");
  expect(await violations()).toEqual([]);
  await page.keyboard.press("Escape");
  await check(page);
  expect(await violations()).toEqual([]);
  expect(await small()).toEqual([]);
  expect(await sideways()).toBeLessThanOrEqual(0);
  await close();
});

test.skipIf(!asked).each(["light", "dark"] as const)("the screen that answers is accessible in %s", async (colorScheme) => {
  const { bundles, answers } = JSON.parse(readFileSync(asked!, "utf8")) as { bundles: { fp32: string }; answers: { picture: string }[] };
  const { page, close } = await open(browser, { bundle: bundles.fp32, context: { colorScheme, reducedMotion: "reduce" } });
  const { violations, sideways, small } = await rules(page);
  await page.click('nav a[href="#ask"]');
  expect(await violations()).toEqual([]);
  await page.setInputFiles("#ask-file", answers[0]!.picture);
  await page.click("#describe");
  await page.waitForSelector('#answer[aria-busy="false"] .said');
  expect(await violations()).toEqual([]);
  expect(await small()).toEqual([]);
  expect(await sideways()).toBeLessThanOrEqual(0);
  await close();
});

test("everything can be reached and used with a keyboard", async () => {
  const { page, close } = await open(browser);
  const reached = new Set<string>();
  await page.evaluate(() => document.body.focus());
  for (let i = 0; i < 60; i++) {
    await page.keyboard.press("Tab");
    reached.add(await page.evaluate(() => document.activeElement?.id || document.activeElement?.textContent || ""));
  }
  for (const id of ["camera", "picture-file", "labels-reset", "label-input", "Classify", "Search", "Model"]) expect(reached).toContain(id);
  await page.focus("#label-input");
  await page.keyboard.type("zebra");
  await page.keyboard.press("Enter");
  expect(await page.locator("#labels .chip > span").last().textContent()).toBe("zebra");
  await page.locator("#labels button").last().focus();
  await page.keyboard.press("Enter");
  expect(await page.evaluate(() => document.activeElement?.getAttribute("aria-label"))).toMatch(/^Remove /);
  await close();
});
