/** Questions about pictures, beside the answers of Python's EdgeVLM on the same files (web_cases.py wrote them). */
import { readFileSync } from "node:fs";
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { launch, open, untilReady, visitor } from "./harness";

interface Asked {
  bundles: { fp32: string; int8: string };
  answers: { picture: string; question: string; text: string; ended: boolean }[];
}

const file = process.env["ASKED"];
const { bundles, answers } = (file ? JSON.parse(readFileSync(file, "utf8")) : { bundles: {}, answers: [] }) as Asked;
let browser: Browser;
beforeAll(async () => void (browser = await launch()));
afterAll(() => browser.close());

/** Ask, and wait for the whole answer. */
async function ask(page: Page, question: string): Promise<string> {
  await page.fill("#question", question);
  await page.press("#question", "Enter");
  return answer(page);
}

async function answer(page: Page): Promise<string> {
  await page.waitForSelector('#answer[aria-busy="false"] .said', { timeout: 30_000 });
  return (await page.textContent("#answer .said"))!;
}

describe.skipIf(!file)("ask", () => {
  test("answers are Python's, also without a network", async () => {
    const { page, context, served, remote, complaints, close } = await open(browser, { bundle: bundles.fp32 });
    expect(served.requests.filter((name) => name.includes("/vlm/"))).toEqual([]);
    await page.click('nav a[href="#ask"]');
    await expect.poll(() => page.textContent("#ask-about")).toMatch(/^toy, [\d.]+ MB at fp32\./);
    for (const { picture, question, text, ended } of answers) {
      await page.setInputFiles("#ask-file", picture);
      expect(await ask(page, question), question).toBe(ended ? text : `${text} …`);
    }
    expect(new Set(answers.map(({ text }) => text)).size).toBeGreaterThan(3);
    expect(await page.textContent("#ask-time")).toMatch(/^first token [\d.]+ ms · [\d.]+ tokens\/s$/);
    await page.evaluate(() => navigator.serviceWorker.ready);
    expect(remote).toEqual([]);
    expect(complaints).toEqual([]);
    await served.close();
    await context.setOffline(true);
    await page.reload();
    await untilReady(page);
    expect(await page.isVisible("#ask")).toBe(true);
    await page.setInputFiles("#ask-photo", answers[0]!.picture);
    expect(await ask(page, answers[0]!.question)).toContain(answers[0]!.text);
    await context.close();
    await close().catch(() => undefined);
  });

  test("packed matrices answer too, a description is one touch, and an answer can be stopped", async () => {
    const { page, complaints, close } = await open(browser, { bundle: bundles.int8 });
    await page.click('nav a[href="#ask"]');
    await page.click("#describe");
    expect(await page.textContent("#toast")).toContain("no picture to ask about");
    const long = answers.find(({ ended }) => !ended)!;
    await page.setInputFiles("#ask-file", long.picture);
    await page.click("#describe");
    expect((await answer(page)).length).toBeGreaterThan(1);
    expect(await page.textContent("#answer .quiet")).toBe("Describe the picture.");
    const whole = await ask(page, long.question);
    // stopped with the first piece: what was said stays, and the next answer is whole again
    let part = whole;
    for (let tries = 0; part === whole && tries < 5; tries++) {
      await page.evaluate(() => {
        const watch = new MutationObserver(() => {
          if (!document.querySelector("#answer .said")?.textContent) return;
          watch.disconnect();
          document.getElementById("ask-stop")!.click();
        });
        watch.observe(document.getElementById("answer")!, { childList: true, subtree: true });
        document.querySelector<HTMLFormElement>("#ask-form")!.requestSubmit();
      });
      part = await answer(page);
    }
    expect(part).toMatch(/. …$/);
    expect(whole.startsWith(part.slice(0, -2))).toBe(true);
    expect(part.length).toBeLessThan(whole.length);
    expect(await ask(page, long.question)).toBe(whole);
    expect(complaints).toEqual([]);
    await close();
  });

  test("what cannot be asked is told in a sentence, and the next question works", async () => {
    const { page, close } = await open(browser, { bundle: bundles.fp32 });
    await page.click('nav a[href="#ask"]');
    const { picture, question, text } = answers[0]!;
    await page.setInputFiles("#ask-file", picture);
    for (const [given, told] of [
      ["bus ".repeat(200), "tokens and this model takes"],
      ["<image> or <image>?", "holds <image> 2 times"],
      ["   ", "question is empty"],
    ] as const) {
      await page.fill("#question", given);
      await page.press("#question", "Enter");
      await expect.poll(() => page.textContent("#toast")).toContain(told);
    }
    expect(await ask(page, question)).toContain(text);
    await close();
  });

  test("a decoder that was changed is refused by name", async () => {
    const visit = await visitor(browser, { bundle: bundles.int8 });
    const changed = "bundle/vlm/onnx/decoder-int8.onnx";
    visit.served.faults.set(changed, (body) => Buffer.from(body.map((byte, i) => (i === body.length >> 1 ? byte ^ 1 : byte))));
    await visit.page.goto(`${visit.served.url}#ask`);
    await untilReady(visit.page);
    await expect.poll(() => visit.page.textContent("#toast")).toMatch(/vlm\/onnx\/decoder-int8.onnx.*changed or damaged/);
    visit.served.faults.delete(changed);
    await visit.page.setInputFiles("#ask-file", answers[0]!.picture);
    expect((await ask(visit.page, answers[0]!.question)).length).toBeGreaterThan(1);
    await visit.close();
  });
});

test("without such a model the screen is not offered", async () => {
  const { page, close } = await open(browser);
  expect(await page.isVisible("#ask-tab")).toBe(false);
  await page.evaluate(() => (location.hash = "#ask"));
  await page.reload();
  await untilReady(page);
  expect(await page.isVisible("#classify")).toBe(true);
  expect(await page.isVisible("#ask")).toBe(false);
  await close();
});
