/** The app in headless Chromium at phone size, as its users meet it. */
import type { Browser } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { check, guesses, launch, open, pictures, untilReady, visitor } from "./harness";

let browser: Browser;
const files = pictures();
beforeAll(async () => void (browser = await launch()));
afterAll(() => browser.close());

describe("classify", () => {
  test("a picture is named among the user's own labels, which are kept", async () => {
    const { page, served, complaints, remote, close } = await open(browser);
    await page.setInputFiles("#picture-file", files.good[0]!);
    expect(await guesses(page)).toHaveLength(5);
    expect(await page.textContent("#stage-time")).toMatch(/\d ms/);
    expect(await page.textContent("#spoken")).toMatch(/, [\d.]+ %$/);
    await page.fill("#label-input", "ocean liner, dog, accordion");
    await page.click('#label-form button[type="submit"]');
    const labels = page.locator("#labels .chip > span");
    await expect.poll(() => labels.allTextContents()).toContain("accordion");
    expect((await labels.allTextContents()).filter((label) => label === "dog")).toHaveLength(1);
    await page.reload();
    await untilReady(page);
    expect(await labels.allTextContents()).toContain("ocean liner");
    await page.click("#labels-reset");
    expect(await labels.allTextContents()).not.toContain("ocean liner");
    expect(remote).toEqual([]);
    expect(complaints).toEqual([]);
    expect(served.requests.length).toBeGreaterThan(5);
    await close();
  });

  test("one label, a template without its place, a label twice: each is told", async () => {
    const { page, close } = await open(browser);
    await page.fill("#label-input", "dog");
    await page.press("#label-input", "Enter");
    expect(await page.textContent("#toast")).toContain("among the labels already");
    await page.click("details summary");
    await page.fill("#templates", "a picture");
    await page.press("#templates", "Tab");
    expect(await page.textContent("#toast")).toContain("needs {}");
    await page.setInputFiles("#picture-file", files.good[0]!);
    await guesses(page);
    while ((await page.locator("#labels .chip").count()) > 1) await page.click("#labels .chip button");
    await expect.poll(() => page.textContent("#guesses")).toContain("at least two labels");
    await close();
  });

  test("a file that is no picture and one cut short are refused, and the next one works", async () => {
    const { page, close } = await open(browser);
    await page.setInputFiles("#picture-file", files.text);
    await expect.poll(() => page.textContent("#toast")).toContain("not a picture that this browser can read");
    await page.setInputFiles("#picture-file", files.half);
    await expect.poll(() => page.textContent("#toast")).toContain("cut short");
    await page.setInputFiles("#picture-file", files.good[0]!);
    expect(await guesses(page)).toHaveLength(5);
    await close();
  });

  test("a camera that is denied is explained", async () => {
    const { page, close } = await open(browser);
    await page.click("#camera");
    await expect.poll(() => page.textContent("#toast")).toMatch(/camera was not allowed|No camera was found/);
    expect(await page.textContent("#camera")).toBe("Use camera");
    await page.setInputFiles("#picture-file", files.good[0]!);
    expect(await guesses(page)).toHaveLength(5);
    await close();
  });

  test("a live camera is named frame by frame, and stops when the user leaves", async () => {
    const withCamera = await launch(["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]);
    const { page, close } = await open(withCamera, { context: { permissions: ["camera"] } });
    await page.click("#camera");
    expect(await guesses(page)).toHaveLength(5);
    await expect.poll(() => page.textContent("#stage-time")).toMatch(/ms a frame/);
    expect(await page.textContent("#camera")).toBe("Stop");
    await page.click('nav a[href="#search"]');
    expect(await page.evaluate(() => document.querySelector("video")!.srcObject)).toBeNull();
    await close();
    await withCamera.close();
  });
});

describe("search", () => {
  test("pictures are indexed once, found by text and by picture, kept, and removed", async () => {
    const { page, remote, complaints, close } = await open(browser);
    await page.click('nav a[href="#search"]');
    const good = files.good.filter((file) => !file.includes("1x1")).slice(0, 8);
    await page.setInputFiles("#index-files", [...good, files.text, files.half]);
    const tiles = page.locator("#found li");
    await expect.poll(() => tiles.count(), { timeout: 30_000 }).toBe(good.length);
    const refused = (await page.textContent("#refused")) ?? "";
    expect(refused).toContain("letter.png");
    expect(refused).toContain("half.jpg");
    await page.setInputFiles("#index-files", good);
    await expect.poll(() => page.textContent("#refused")).toContain(`${good.length} were here already`);
    expect(await tiles.count()).toBe(good.length);

    await page.fill("#query", "a bus");
    await page.press("#query", "Enter");
    await expect.poll(() => page.textContent("#found-title")).toBe("“a bus”");
    const scores = (await page.locator("#found .score").allTextContents()).map(Number);
    expect(scores).toEqual([...scores].sort((a, b) => b - a));
    await page.setInputFiles("#query-file", good[2]!);
    const name = good[2]!.split("/").at(-1)!;
    await expect.poll(() => page.textContent("#found-title")).toBe(`Like ${name}`);
    expect(await page.getAttribute("#found li:first-child button", "aria-label")).toBe(`${name}, score 1.00`);

    await page.reload();
    await untilReady(page);
    await expect.poll(() => tiles.count()).toBe(good.length);
    await page.click("#found li:first-child button");
    await page.click("#viewer-remove");
    await expect.poll(() => tiles.count()).toBe(good.length - 1);
    page.on("dialog", (dialog) => void dialog.accept());
    await page.click("#forget");
    await expect.poll(() => tiles.count()).toBe(0);
    expect(await page.isVisible("#search-empty")).toBe(true);
    expect(remote).toEqual([]);
    expect(complaints).toEqual([]);
    await close();
  });
});

describe("model", () => {
  test("the bundle's vectors pass in the page", async () => {
    const { page, complaints, close } = await open(browser);
    const { verdict, passed } = await check(page);
    expect(Object.values(passed)).not.toContain(false);
    expect(Object.keys(passed)).toEqual(expect.arrayContaining(["S0 decode", "S0 pixels", "S1 ids", "S4 image", "S4 text", "S5 retrieval"]));
    expect(verdict).toBe("Every stage gives the recorded numbers.");
    expect(await page.textContent("#runs-on")).toContain("with SIMD");
    expect(complaints).toEqual([]);
    await close();
  });
});

describe("offline", () => {
  test("after the first load everything works without a network", async () => {
    const { page, context, served, close } = await open(browser);
    await page.setInputFiles("#picture-file", files.good[0]!);
    const before = await guesses(page);
    await page.evaluate(() => navigator.serviceWorker.ready);
    await served.close();
    await context.setOffline(true);
    await page.reload();
    await untilReady(page);
    expect(await page.evaluate(() => crossOriginIsolated)).toBe(true);
    await page.setInputFiles("#picture-file", files.good[0]!);
    expect(await guesses(page)).toEqual(before);
    await page.click('nav a[href="#search"]');
    await page.setInputFiles("#index-files", files.good.slice(0, 2));
    await expect.poll(() => page.locator("#found li").count()).toBe(2);
    await context.close();
    await close().catch(() => undefined);
  });

  test("without a network and without a first load, the reason is told", async () => {
    const visit = await visitor(browser);
    visit.served.faults.set("bundle/bundle.json", () => null);
    await visit.page.goto(visit.served.url);
    await visit.page.waitForSelector("#fatal:not([hidden])");
    expect(await visit.page.textContent("#fatal")).toContain("There is no model beside this app");
    await visit.close();
  });
});
