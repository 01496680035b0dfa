/** The screen that answers questions about a picture; there only where the bundle brings a model that can. */
import { VLM, VLM_MANIFEST } from "../contract";
import type { Asked, Engine, Opened } from "../engine";
import { sentence } from "../errors";
import { byId, h, icon, megabytes, milliseconds, onFiles, tell } from "./dom";

const DESCRIBE = "Describe the picture.";

export class AskScreen {
  private readonly stage = byId("ask-stage");
  private readonly picture = byId<HTMLImageElement>("ask-picture");
  private readonly answer = byId("answer");
  private readonly time = byId("ask-time");
  private readonly stopButton = byId<HTMLButtonElement>("ask-stop");
  private opened: Opened | null = null;
  private shown: File | null = null;
  private busy = false;
  private about: Promise<Asked> | null = null;

  constructor(private readonly engine: Engine) {
    byId("ask-photo-label").before(icon("camera"));
    byId("ask-picture-label").before(icon("picture"));
    byId("ask-form").querySelector("button")!.append(icon("send"));
    this.stopButton.append(icon("stop"), "Stop");
    for (const id of ["ask-photo", "ask-file"]) onFiles(byId<HTMLInputElement>(id), ([file]) => this.show(file!));
    byId("describe").addEventListener("click", () => void this.ask(DESCRIBE));
    byId("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.ask(byId<HTMLInputElement>("question").value);
    });
    this.stopButton.addEventListener("click", () => this.leave());
  }

  /** A bundle has been opened: whether it can be asked. */
  open(opened: Opened): void {
    this.opened = opened;
    this.about = null;
    const offered = VLM_MANIFEST in opened.manifest.files;
    byId("ask-tab").hidden = !offered;
    if (!offered && location.hash === "#ask") location.hash = "";
    if (offered && !byId("ask").hidden) void this.enter();
  }

  /** The user looks at this screen: its model is fetched now, and not before. */
  async enter(): Promise<void> {
    if (!this.opened || this.about) return;
    this.about = this.engine.call("openAnswerer", {});
    try {
      this.draw(await this.about);
    } catch (error) {
      this.about = null;
      tell(sentence(error), "error");
    }
  }

  /** Called when the user looks at another screen, and by the Stop button. */
  leave(): void {
    if (this.busy) void this.engine.call("stopAnswer", {});
  }

  private show(file: File): void {
    this.leave();
    this.shown = file;
    URL.revokeObjectURL(this.picture.src);
    this.picture.src = URL.createObjectURL(file);
    this.picture.hidden = false;
    this.stage.dataset["state"] = "picture";
    this.answer.replaceChildren();
    this.time.hidden = true;
  }

  private async ask(question: string): Promise<void> {
    if (this.busy) return;
    if (!this.opened || !this.shown) {
      tell(this.opened ? "There is no picture to ask about yet; choose one." : "The model is still loading; try again in a moment.");
      return;
    }
    const { shown } = this;
    const said = h("p", { class: "said" });
    this.answer.replaceChildren(h("p", { class: "quiet" }, question), said);
    this.write(true);
    try {
      const { ended, ids, firstMs, tokensPerSecond } = await this.engine.call(
        "ask",
        { blob: shown, name: shown.name, question },
        { progress: (piece) => said.append(piece) },
      );
      const pace = tokensPerSecond === null ? "" : ` · ${tokensPerSecond.toFixed(tokensPerSecond < 10 ? 1 : 0)} tokens/s`;
      this.time.textContent = ids.length || ended ? `first token ${milliseconds(firstMs)}${pace}` : "";
      this.time.hidden = !this.time.textContent || this.shown !== shown;
      if (!ended) said.append(" …");
    } catch (error) {
      this.answer.replaceChildren();
      this.time.hidden = true;
      tell(sentence(error), "error");
    }
    this.write(false);
  }

  /** A screen reader is given the answer as a whole, when it is there. */
  private write(busy: boolean): void {
    this.busy = busy;
    this.answer.ariaBusy = String(busy);
    this.stopButton.hidden = !busy;
    byId<HTMLButtonElement>("describe").hidden = busy;
  }

  private draw({ name, precision, licences }: Asked): void {
    const files = Object.entries(this.opened!.manifest.files).filter(([file]) => file.startsWith(VLM));
    const bytes = files.reduce((sum, [, file]) => sum + file.bytes, 0);
    const credits = licences.map(({ what, licence, attribution }) => `${what}: ${licence}${attribution ? `, ${attribution}` : ""}.`);
    byId("ask-about").textContent = [`${name}, ${megabytes(bytes)} at ${precision}.`, ...credits].join(" ");
  }
}
