// @ts-check
/** A small static server for tests and measurements: what a good host sends, and faults on request. */
import { createServer } from "node:http";
import { existsSync, readFileSync, statSync } from "node:fs";
import { extname, join, normalize } from "node:path";

const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".css": "text/css",
  ".json": "application/json",
  ".webmanifest": "application/manifest+json",
  ".wasm": "application/wasm",
  ".svg": "image/svg+xml",
  ".png": "image/png",
  ".webp": "image/webp",
  ".jpg": "image/jpeg",
};
export const ISOLATION = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

/**
 * @typedef {object} Served
 * @property {string} url
 * @property {string[]} requests paths asked for, in order
 * @property {{ path: string, bytes: number }[]} sent bodies as sent
 * @property {Map<string, (body: Buffer) => Buffer | null>} faults by path: another body, or null for 404
 * @property {() => Promise<void>} close
 */

/**
 * @param {string} root the built app
 * @param {string} bundle the folder served as /bundle/
 * @param {{ headers?: Record<string, string>, compressed?: string, pictures?: string }} [options]
 *   compressed: a folder of .br files; pictures: a folder served as /pictures/
 * @returns {Promise<Served>}
 */
export async function serve(root, bundle, { headers = ISOLATION, compressed, pictures } = {}) {
  /** @type {string[]} */
  const requests = [];
  /** @type {Served["sent"]} */
  const sent = [];
  /** @type {Served["faults"]} */
  const faults = new Map();
  const server = createServer((request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url ?? "/", "http://local").pathname)).slice(1);
    requests.push(path);
    const name = path === "" ? "index.html" : path;
    let file = join(root, name);
    if (path.startsWith("bundle/")) file = join(bundle, path.slice(7));
    else if (pictures && path.startsWith("pictures/")) file = join(pictures, path.slice(9));
    const found = existsSync(file) && statSync(file).isFile();
    const fault = faults.get(path);
    const body = found ? (fault ?? ((b) => b))(readFileSync(file)) : null;
    if (!body) {
      response.writeHead(404, { "Content-Type": "text/plain", ...headers }).end("not found");
      return;
    }
    const small = compressed && !fault ? join(compressed, `${name}.br`) : "";
    const packed = small && existsSync(small) ? readFileSync(small) : null;
    const content = packed ?? body;
    sent.push({ path, bytes: content.length });
    response.writeHead(200, {
      "Content-Type": TYPES[/** @type {keyof typeof TYPES} */ (extname(name))] ?? "application/octet-stream",
      "Cache-Control": path.startsWith("assets/") ? "public, max-age=31536000, immutable" : "no-cache",
      ...(packed ? { "Content-Encoding": "br" } : {}),
      "Content-Length": String(content.length),
      ...headers,
    });
    response.end(request.method === "HEAD" ? undefined : content);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", () => resolve(undefined)));
  const address = /** @type {import("node:net").AddressInfo} */ (server.address());
  return {
    url: `http://localhost:${address.port}/`,
    requests,
    sent,
    faults,
    close: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(() => resolve(undefined)));
    },
  };
}
