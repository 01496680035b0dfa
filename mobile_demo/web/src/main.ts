/** Start: threads if they can be had, the model, then the screens. */
import { VLM } from "./contract";
import { Engine, type Opened } from "./engine";
import { sentence } from "./errors";
import { isolate, keepOffline } from "./offline";
import { AskScreen } from "./ui/ask";
import { drawCard, type Reopen } from "./ui/card";
import { ClassifyScreen } from "./ui/classify";
import { byId, icon, megabytes, tell } from "./ui/dom";
import { SearchScreen } from "./ui/search";
import { keepSettings, readSettings } from "./ui/settings";

const SCREENS = ["classify", "search", "ask", "model"] as const;
const TOWERS: Record<string, string> = { image: "picture tower", text: "text tower" };

const settings = readSettings();
const engine = new Engine();
const classify = new ClassifyScreen(engine, settings);
const search = new SearchScreen(engine);
const ask = new AskScreen(engine);
let opened: Opened | null = null;

function status(text: string, kind: "busy" | "ready" | "error"): void {
  const box = byId("status");
  if (box.textContent !== text) box.textContent = text;
  box.dataset["kind"] = kind;
}

function ready(): void {
  if (!opened) return;
  const where = opened.processor === "gpu" ? "GPU" : opened.threads > 1 ? `${opened.threads} threads` : "1 thread";
  status(`On device · ${where}${opened.simd ? "" : ", no SIMD"}`, "ready");
}

engine.onLoading = ({ file, loaded, total }) => {
  const tower = Object.entries(opened?.files ?? {}).find(([, name]) => name === file)?.[0];
  const what = file.startsWith(VLM) ? "model for questions" : TOWERS[tower ?? "image"];
  if (loaded < total) status(`Loading ${what} · ${Math.floor((10 * loaded) / total)}0 % of ${megabytes(total)}`, "busy");
  else if (opened) ready();
};

async function open(): Promise<void> {
  status("Loading the model…", "busy");
  byId("fatal").hidden = true;
  try {
    opened = await engine.call("open", {
      base: new URL("bundle/", document.baseURI).href,
      precision: settings.precision ?? undefined,
      processor: settings.processor,
    });
    ready();
    drawCard(opened, engine, reopen);
    ask.open(opened);
    await Promise.all([classify.open(opened), search.open(opened)]);
    document.documentElement.dataset["ready"] = "true";
    void loadText();
  } catch (error) {
    if (settings.processor === "gpu") {
      tell(`The GPU cannot run this model here, so the processor does. (${sentence(error)})`, "error");
      settings.processor = "cpu";
      keepSettings(settings);
      return open();
    }
    const box = byId("fatal");
    box.textContent = sentence(error);
    box.hidden = false;
    status("No model", "error");
    // a choice that cannot be served must not lock the app
    settings.precision = null;
    keepSettings(settings);
  }
}

/** The text tower comes after the first screen, unless the user saves data: then with the first word that needs it. */
async function loadText(): Promise<void> {
  const { connection } = navigator as Navigator & { connection?: { saveData?: boolean } };
  if (connection?.saveData) return;
  await engine.call("loadText", {}).then(
    () => (document.documentElement.dataset["complete"] = "true"),
    () => undefined, // told when it is needed
  );
  ready();
}

const reopen: Reopen = (choice) => {
  Object.assign(settings, choice);
  keepSettings(settings);
  delete document.documentElement.dataset["ready"];
  delete document.documentElement.dataset["complete"];
  void open();
};

function showScreen(): void {
  const asked = location.hash.slice(1);
  const screen = SCREENS.find((name) => name === asked) ?? "classify";
  for (const name of SCREENS) byId(name).hidden = name !== screen;
  for (const link of document.querySelectorAll<HTMLAnchorElement>(".tabs a")) {
    if (link.hash === `#${screen}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (screen !== "classify") classify.leave();
  if (screen === "ask") void ask.enter();
  else ask.leave();
  window.scrollTo(0, 0);
}

for (const link of document.querySelectorAll<HTMLAnchorElement>(".tabs a")) link.prepend(icon(link.dataset["icon"]!));
addEventListener("hashchange", showScreen);
document.addEventListener("visibilitychange", () => document.hidden && classify.leave());
showScreen();
if (!(await isolate())) {
  await open();
  await keepOffline();
}
