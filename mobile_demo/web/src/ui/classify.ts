/** The screen that names what a camera or a picture shows, among the user's own labels. */
import type { Embedded, Engine, Opened } from "../engine";
import { sentence } from "../errors";
import { probabilities } from "../model";
import { Camera } from "./camera";
import { byId, h, icon, milliseconds, onFiles, percent, tell } from "./dom";
import { DEFAULTS, keepSettings, type Settings } from "./settings";

const SHOWN = 5;
const MOST_LABELS = 100;

export class ClassifyScreen {
  private readonly stage = byId("stage");
  private readonly picture = byId<HTMLImageElement>("stage-picture");
  private readonly video = byId<HTMLVideoElement>("stage-video");
  private readonly cameraButton = byId<HTMLButtonElement>("camera");
  private readonly flipButton = byId<HTMLButtonElement>("flip");
  private readonly camera = new Camera(this.video);
  private opened: Opened | null = null;
  private rows: Promise<Float32Array[]> | null = null;
  private last: Embedded | null = null;
  private named = "";
  private namedAt = 0;
  private smooth = 0;

  constructor(
    private readonly engine: Engine,
    private readonly settings: Settings,
  ) {
    byId("picture-label").before(icon("picture"));
    this.flipButton.append(icon("flip"));
    byId("label-form").querySelector("button")!.append(icon("plus"));
    this.cameraButton.addEventListener("click", () => void (this.camera.on ? this.stopCamera() : this.startCamera()));
    this.flipButton.addEventListener("click", () => {
      this.camera.flip();
      void this.startCamera();
    });
    onFiles(byId<HTMLInputElement>("picture-file"), ([file]) => void this.show(file!, file!.name));
    byId("label-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.add(byId<HTMLInputElement>("label-input"));
    });
    byId("labels-reset").addEventListener("click", () => this.change({ ...DEFAULTS }));
    const templates = byId<HTMLTextAreaElement>("templates");
    templates.addEventListener("change", () => this.readTemplates(templates));
    this.drawCameraButton();
    this.drawLabels();
  }

  /** A model has been loaded: whatever was embedded by another one is embedded again. */
  async open(opened: Opened): Promise<void> {
    this.opened = opened;
    this.rows = null;
    this.last = null;
    await this.drawSamples(opened);
  }

  /** Called when the user looks at another screen. */
  leave(): void {
    if (this.camera.on) this.stopCamera();
  }

  /** Classify one picture and show it. */
  async show(blob: Blob, name: string): Promise<void> {
    if (!this.opened) {
      tell("The model is still loading; try again in a moment.");
      return;
    }
    this.stopCamera();
    try {
      this.last = await this.engine.call("embedPicture", { blob, name });
      URL.revokeObjectURL(this.picture.src);
      this.picture.src = URL.createObjectURL(blob);
      this.setStage("picture");
      await this.guess(true);
    } catch (error) {
      tell(sentence(error), "error");
    }
  }

  private async startCamera(): Promise<void> {
    if (!this.opened) {
      tell("The model is still loading; try again in a moment.");
      return;
    }
    this.smooth = 0;
    try {
      await this.camera.start((frame) => this.frame(frame));
      this.setStage("camera");
    } catch (error) {
      this.camera.stop();
      if (this.stage.dataset["state"] === "camera") this.setStage("empty");
      tell(sentence(error), "error");
    }
    this.drawCameraButton();
  }

  private stopCamera(): void {
    this.camera.stop();
    if (this.stage.dataset["state"] === "camera") this.setStage("empty");
    this.drawCameraButton();
  }

  private async frame(frame: ImageBitmap): Promise<void> {
    try {
      this.last = await this.engine.call("embedFrame", { frame }, { transfer: [frame] });
      await this.guess(false);
    } catch (error) {
      this.stopCamera();
      tell(sentence(error), "error");
    }
  }

  private labelRows(): Promise<Float32Array[]> {
    const { labels, templates } = this.settings;
    this.rows ??= this.engine.call("embedLabels", { labels, templates });
    this.rows.catch(() => (this.rows = null));
    return this.rows;
  }

  private async guess(still: boolean): Promise<void> {
    const { labels } = this.settings;
    const list = byId<HTMLOListElement>("guesses");
    if (!this.last || !this.opened) return;
    if (labels.length < 2) {
      list.replaceChildren(h("li", { class: "quiet" }, "Add at least two labels: with one, every picture would be it."));
      return;
    }
    const rows = await this.labelRows();
    if (rows.length !== labels.length || !this.last) return; // labels changed meanwhile; another call is on its way
    const { embedding, decodeMs, resizeMs, modelMs } = this.last;
    const shares = probabilities(embedding, rows, this.opened.manifest.contract.logit_scale);
    const ranked = labels.map((label, i) => ({ label, share: shares[i]! })).sort((a, b) => b.share - a.share);
    list.replaceChildren(...ranked.slice(0, SHOWN).map(({ label, share }) => guessRow(label, share)));
    const total = decodeMs + resizeMs + modelMs;
    this.smooth = this.smooth && !still ? 0.8 * this.smooth + 0.2 * total : total;
    const time = byId("stage-time");
    time.hidden = false;
    time.textContent = still
      ? `${milliseconds(total)} · model ${milliseconds(modelMs)}`
      : `${milliseconds(this.smooth)} a frame`;
    time.title = `decode ${milliseconds(decodeMs)}, resize ${milliseconds(resizeMs)}, model ${milliseconds(modelMs)}`;
    this.speak(ranked[0]!.label, ranked[0]!.share, still);
  }

  /** A live view would read without end: only a new name is spoken, at most every three seconds. */
  private speak(label: string, share: number, still: boolean): void {
    const now = performance.now();
    if (!still && (label === this.named || now - this.namedAt < 3000)) return;
    this.named = label;
    this.namedAt = now;
    byId("spoken").textContent = `${label}, ${percent(share)}`;
  }

  private add(input: HTMLInputElement): void {
    const given = input.value.split(",").map((label) => label.trim()).filter(Boolean);
    const fresh = given.filter((label, i) => !this.settings.labels.includes(label) && given.indexOf(label) === i);
    if (!given.length) return;
    if (!fresh.length) {
      tell(`“${given[0]}” is among the labels already.`);
      return;
    }
    if (this.settings.labels.length + fresh.length > MOST_LABELS) {
      tell(`${MOST_LABELS} labels are the most that are compared; remove some first.`, "error");
      return;
    }
    input.value = "";
    this.change({ labels: [...this.settings.labels, ...fresh] });
  }

  private readTemplates(area: HTMLTextAreaElement): void {
    const lines = area.value.split("\n").map((line) => line.trim()).filter(Boolean);
    const templates = [...new Set(lines)];
    if (!templates.length || templates.some((line) => !line.includes("{}"))) {
      tell("Every template needs {} where the label goes; without it all labels would read the same.", "error");
      return;
    }
    this.change({ templates });
  }

  private change(part: Partial<Pick<Settings, "labels" | "templates">>): void {
    if (part.labels) this.settings.labels = [...part.labels];
    if (part.templates) this.settings.templates = [...part.templates];
    keepSettings(this.settings);
    this.rows = null;
    this.drawLabels();
    if (this.last && !this.camera.on) this.guess(true).catch((error: unknown) => tell(sentence(error), "error"));
  }

  private drawLabels(): void {
    const list = byId("labels");
    list.replaceChildren(
      ...this.settings.labels.map((label) => {
        const remove = h("button", { type: "button", "aria-label": `Remove ${label}` }, icon("close"));
        remove.addEventListener("click", () => {
          const at = this.settings.labels.indexOf(label);
          this.change({ labels: this.settings.labels.filter((other) => other !== label) });
          // the focus goes to the neighbour, not to the top of the page
          const left = list.querySelectorAll<HTMLButtonElement>("button");
          (left[Math.min(at, left.length - 1)] ?? byId("label-input")).focus();
        });
        return h("li", { class: "chip" }, h("span", {}, label), remove);
      }),
    );
    byId<HTMLTextAreaElement>("templates").value = this.settings.templates.join("\n");
  }

  private async drawSamples({ manifest }: Opened): Promise<void> {
    const box = byId("samples");
    const names = Object.keys(manifest.files).filter((name) => /^conformance\/images\/real-[^/]*\.webp$/.test(name));
    const buttons = await Promise.all(
      names.slice(0, 8).map(async (name, i) => {
        const blob = await this.engine.call("readFile", { name });
        const picture = h("img", { src: URL.createObjectURL(blob), alt: "" });
        const button = h("button", { type: "button", "aria-label": `Sample picture ${i + 1}` }, picture);
        button.addEventListener("click", () => void this.show(blob, `sample ${i + 1}`));
        return button;
      }),
    );
    box.querySelectorAll("img").forEach((picture) => URL.revokeObjectURL(picture.src));
    box.replaceChildren(...buttons);
    box.hidden = !buttons.length;
  }

  private setStage(state: "empty" | "picture" | "camera"): void {
    this.stage.dataset["state"] = state;
    this.picture.hidden = state !== "picture";
    this.video.hidden = state !== "camera";
    if (state === "empty") {
      byId("stage-time").hidden = true;
      byId("guesses").replaceChildren();
      this.last = null;
    }
  }

  private drawCameraButton(): void {
    const on = this.camera.on;
    this.cameraButton.replaceChildren(icon(on ? "stop" : "camera"), on ? "Stop" : "Use camera");
    this.flipButton.hidden = !on;
  }
}

function guessRow(label: string, share: number): HTMLLIElement {
  const bar = h("span", { class: "bar", "aria-hidden": "true" }, h("span", {}));
  (bar.firstChild as HTMLElement).style.transform = `scaleX(${share})`;
  return h("li", {}, h("span", { class: "guess-label" }, label), h("span", { class: "guess-share" }, percent(share)), bar);
}
