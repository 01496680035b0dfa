// @ts-check
/** Headless Chromium at phone size, from the system: nothing is downloaded. */
import { existsSync } from "node:fs";
import { chromium } from "playwright-core";

const PLACES = [process.env["CHROMIUM"], "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
export const PHONE = { viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, isMobile: true, hasTouch: true };

export function chromiumPath() {
  const found = PLACES.find((place) => place && existsSync(place));
  if (!found) {
    throw new Error("no Chromium was found, so the app cannot be tried; install it (apt-get install chromium) or set CHROMIUM to its path");
  }
  return found;
}

/** @param {string[]} [args] */
export function launch(args = []) {
  return chromium.launch({ executablePath: chromiumPath(), headless: true, args: ["--no-sandbox", ...args] });
}

/** @param {import("playwright-core").Page} page */
export async function untilReady(page, timeout = 60_000) {
  await page.waitForSelector("html[data-ready=true]", { timeout });
}
