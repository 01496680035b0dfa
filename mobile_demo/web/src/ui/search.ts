/** The screen that finds the user's pictures by words or by another picture. */
import type { Engine, Opened } from "../engine";
import { sentence } from "../errors";
import { cosine } from "../model";
import { Store, type Entry } from "../store";
import { byId, h, icon, onFiles, tell } from "./dom";

const SHOWN = 60;

export class SearchScreen {
  private store: Store | null = null;
  private entries: Entry[] = [];
  private opened: Opened | null = null;
  private stopped = false;
  private busy = false;
  private viewed: Entry | null = null;
  private readonly urls = new Map<number, string>();
  private readonly viewer = byId<HTMLDialogElement>("viewer");

  constructor(private readonly engine: Engine) {
    byId("index-label").before(icon("plus"));
    byId("query-label").before(icon("picture"));
    byId("search-form").querySelector("button")!.append(icon("search"));
    onFiles(byId<HTMLInputElement>("index-files"), (files) => void this.index(files));
    onFiles(byId<HTMLInputElement>("query-file"), ([file]) => void this.byPicture(file!));
    byId("search-form").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.byText(byId<HTMLInputElement>("query").value.trim());
    });
    byId("indexing-stop").addEventListener("click", () => (this.stopped = true));
    byId("clear-query").addEventListener("click", () => this.drawAll());
    byId("forget").addEventListener("click", () => void this.forget());
    byId("viewer-close").addEventListener("click", () => this.viewer.close());
    byId("viewer-similar").addEventListener("click", () => {
      this.viewer.close();
      if (this.viewed) this.draw(this.viewed.embedding, `Like ${this.viewed.name}`);
    });
    byId("viewer-remove").addEventListener("click", () => void this.removeViewed());
  }

  async open(opened: Opened): Promise<void> {
    this.opened = opened;
    try {
      this.store ??= await Store.open();
      this.entries = await this.store.all();
      this.drawAll();
    } catch (error) {
      notice(sentence(error));
    }
  }

  private get comparable(): Entry[] {
    return this.entries.filter((entry) => entry.embeddedBy === this.opened?.embeddedBy);
  }

  /** Add what is new among the files; a bad one is named and passed over. */
  private async index(files: File[]): Promise<void> {
    const { store, opened } = this;
    if (!store || !opened || this.busy) {
      tell(this.busy ? "Pictures are being added already." : "The model is still loading; try again in a moment.");
      return;
    }
    this.busy = true;
    this.stopped = false;
    const refused: string[] = [];
    let known = 0;
    navigator.storage?.persist?.().catch(() => undefined);
    byId("indexing").hidden = false;
    try {
      for (const [i, file] of files.entries()) {
        if (this.stopped) break;
        progress(i, files.length);
        const key = `${file.name}/${file.size}/${file.lastModified}`;
        if (await store.has(opened.embeddedBy, key)) {
          known++;
          continue;
        }
        try {
          const { embedding, thumbnail } = await this.engine.call("embedPicture", {
            blob: file,
            name: file.name,
            withThumbnail: true,
          });
          const entry = { embeddedBy: opened.embeddedBy, key, name: file.name, thumbnail: thumbnail!, embedding };
          this.entries.push(await store.add(entry));
        } catch (error) {
          refused.push(sentence(error));
        }
      }
    } finally {
      this.busy = false;
      byId("indexing").hidden = true;
    }
    const rest = refused.length > 3 ? ` And ${refused.length - 3} more.` : "";
    const again = known ? `${known} ${known === 1 ? "was" : "were"} here already. ` : "";
    notice(again + refused.slice(0, 3).join(" ") + rest);
    this.drawAll();
  }

  private async byText(text: string): Promise<void> {
    if (!text) {
      this.drawAll();
      return;
    }
    await this.query(async () => ({ row: await this.engine.call("embedText", { text }), title: `“${text}”` }));
  }

  private async byPicture(file: File): Promise<void> {
    await this.query(async () => {
      const { embedding } = await this.engine.call("embedPicture", { blob: file, name: file.name });
      return { row: embedding, title: `Like ${file.name}` };
    });
  }

  private async query(embed: () => Promise<{ row: Float32Array; title: string }>): Promise<void> {
    if (!this.opened || !this.comparable.length) {
      tell(this.opened ? "There is nothing to search yet; add pictures first." : "The model is still loading.");
      return;
    }
    try {
      const { row, title } = await embed();
      this.draw(row, title);
    } catch (error) {
      tell(sentence(error), "error");
    }
  }

  private draw(row: Float32Array, title: string): void {
    const ranked = this.comparable.map((entry) => ({ entry, score: cosine(row, entry.embedding) }));
    ranked.sort((a, b) => b.score - a.score);
    this.fill(ranked.slice(0, SHOWN).map(({ entry, score }) => this.tile(entry, score)), title);
    byId("clear-query").hidden = false;
  }

  private drawAll(): void {
    const count = this.comparable.length;
    const newest = this.comparable.slice(-SHOWN).reverse();
    const others = this.entries.length - count;
    const title = count ? `${count} ${count === 1 ? "picture" : "pictures"}` : "No pictures yet";
    this.fill(newest.map((entry) => this.tile(entry)), title);
    byId("clear-query").hidden = true;
    byId("search-empty").hidden = count > 0;
    byId("forget").hidden = this.entries.length === 0;
    byId<HTMLInputElement>("query").value = "";
    if (others) {
      const some = others === 1 ? "picture was" : "pictures were";
      notice(`${others} ${some} added with another model file and cannot be compared with this one; add them again.`);
    }
  }

  private fill(tiles: HTMLLIElement[], title: string): void {
    byId("found-title").textContent = title;
    byId("found").replaceChildren(...tiles);
  }

  private tile(entry: Entry, score?: number): HTMLLIElement {
    const shown = h("img", { src: this.url(entry), alt: "", loading: "lazy" });
    const button = h("button", { type: "button", "aria-label": score === undefined ? entry.name : `${entry.name}, score ${score.toFixed(2)}` }, shown);
    if (score !== undefined) button.append(h("span", { class: "score", "aria-hidden": "true" }, score.toFixed(2)));
    button.addEventListener("click", () => this.view(entry));
    return h("li", {}, button);
  }

  private url(entry: Entry): string {
    let url = this.urls.get(entry.id);
    if (!url) this.urls.set(entry.id, (url = URL.createObjectURL(entry.thumbnail)));
    return url;
  }

  private view(entry: Entry): void {
    this.viewed = entry;
    byId<HTMLImageElement>("viewer-picture").src = this.url(entry);
    byId("viewer-name").textContent = entry.name;
    this.viewer.showModal();
  }

  private async removeViewed(): Promise<void> {
    this.viewer.close();
    if (this.viewed) await this.drop([this.viewed.id]);
  }

  private async forget(): Promise<void> {
    if (!confirm("Remove all pictures from this app? The originals stay where they are.")) return;
    notice("");
    await this.drop(this.entries.map((entry) => entry.id));
  }

  private async drop(ids: number[]): Promise<void> {
    try {
      await this.store?.remove(ids);
    } catch (error) {
      tell(sentence(error), "error");
      return;
    }
    for (const id of ids) {
      const url = this.urls.get(id);
      if (url) URL.revokeObjectURL(url);
      this.urls.delete(id);
    }
    this.entries = this.entries.filter((entry) => !ids.includes(entry.id));
    this.drawAll();
  }
}

function progress(done: number, total: number): void {
  byId<HTMLProgressElement>("indexing-bar").value = done / total;
  // a screen reader would read every step: it gets every tenth of the way
  if (total <= 10 || done % Math.ceil(total / 10) === 0) {
    byId("indexing-text").textContent = `Looking at picture ${done + 1} of ${total}`;
  }
}

function notice(message: string): void {
  const box = byId("refused");
  box.textContent = message.trim();
  box.hidden = !message.trim();
}
