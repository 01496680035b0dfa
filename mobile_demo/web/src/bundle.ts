/** The bundle beside the app: every file is hashed before it is used, and kept on the device by its hash. */
import { readManifest, type Manifest } from "./contract";
import { IntegrityError, UserError } from "./errors";

const CACHE = "pocketvlm-bundle";

export type Progress = (file: string, loaded: number, total: number) => void;

export class Bundle {
  private constructor(
    private readonly base: string,
    readonly manifest: Manifest,
    private readonly json: string,
  ) {}

  /** Read bundle.json from the network, or the copy kept from last time. */
  static async open(base: string): Promise<Bundle> {
    if (!globalThis.crypto?.subtle) {
      throw new UserError("This address is not secure, so the model could not be verified; open it over https or localhost.");
    }
    const cache = await openCache();
    const key = new URL("bundle.json", base).href;
    let text: string;
    try {
      const response = await fetch(key, { cache: "no-cache" });
      if (!response.ok || !response.headers.get("content-type")?.includes("json")) throw new Error(String(response.status));
      text = await response.text();
    } catch {
      const kept = await cache?.match(key);
      if (!kept) {
        throw new UserError(
          "There is no model beside this app; put one there with “pocketvlm mobile prepare web BUNDLE” and build again.",
        );
      }
      text = await kept.text();
    }
    const bundle = new Bundle(base, readManifest(text), text);
    // what was kept for another bundle serves on without a network until all of this one is here
    if (!(await cache?.match(key))) await bundle.settle();
    return bundle;
  }

  /** From now on this is the bundle that is used without a network; files that it does not list are dropped. */
  async settle(): Promise<void> {
    const cache = await openCache();
    if (!cache) return;
    const kept = new Response(this.json, { headers: { "content-type": "application/json" } });
    await cache.put(new URL("bundle.json", this.base).href, kept).catch(() => undefined);
    const listed = new Set(Object.values(this.manifest.files).map((f) => f.sha256));
    for (const request of await cache.keys()) {
      const hash = /by-sha256\/([0-9a-f]{64})$/.exec(request.url)?.[1];
      if (hash && !listed.has(hash)) await cache.delete(request);
    }
  }

  /** The bytes of a listed file, verified. */
  async file(name: string, progress?: Progress): Promise<Uint8Array<ArrayBuffer>> {
    const entry = this.manifest.files[name];
    if (!entry) {
      throw new IntegrityError(`The bundle does not list “${name}”, so nothing vouches for it and it stays unread.`);
    }
    const cache = await openCache();
    const key = new URL(`by-sha256/${entry.sha256}`, this.base).href;
    const kept = await cache?.match(key);
    if (kept) {
      const bytes = new Uint8Array(await kept.arrayBuffer());
      if ((await sha256(bytes)) === entry.sha256) return bytes;
      await cache?.delete(key);
    }
    const bytes = await download(new URL(name, this.base).href, name, entry.bytes, progress);
    const found = await sha256(bytes);
    if (found !== entry.sha256) {
      throw new IntegrityError(
        `“${name}” has sha256 ${found.slice(0, 16)}… and bundle.json says ${entry.sha256.slice(0, 16)}…; it was changed or ` +
          "damaged and may compute anything, so it is not used: prepare the bundle again.",
      );
    }
    // a full disk must not stop the app
    await cache?.put(key, new Response(bytes)).catch(() => undefined);
    return bytes;
  }

  async text(name: string): Promise<string> {
    return new TextDecoder().decode(await this.file(name));
  }
}

export async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
}

/** Private windows of some browsers have no cache; the app then works online only. */
async function openCache(): Promise<Cache | null> {
  return globalThis.caches ? caches.open(CACHE).catch(() => null) : null;
}

async function download(url: string, name: string, bytes: number, progress?: Progress): Promise<Uint8Array<ArrayBuffer>> {
  let response: Response;
  try {
    response = await fetch(url, { cache: "no-cache" });
  } catch {
    throw new UserError(`“${name}” could not be fetched and is not on this device yet; go online once, then try again.`);
  }
  if (!response.ok || !response.body) {
    throw new IntegrityError(`“${name}” is listed in bundle.json and the server answers ${response.status}; prepare it again.`);
  }
  // no more than the stated size is ever read, so a wrong file cannot fill the memory
  const out = new Uint8Array(bytes);
  let filled = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (filled + value.length > bytes) {
      await reader.cancel();
      throw new IntegrityError(`“${name}” is longer than the ${bytes} bytes that bundle.json states, so it is not used.`);
    }
    out.set(value, filled);
    filled += value.length;
    progress?.(name, filled, bytes);
  }
  return out.subarray(0, filled);
}
