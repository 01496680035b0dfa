import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { defineConfig, type Plugin } from "vite";

const POLICY = [
  "default-src 'none'",
  "script-src 'self' 'wasm-unsafe-eval'",
  "worker-src 'self'",
  "style-src 'self'",
  "img-src 'self' blob:",
  "media-src 'self' blob:",
  "connect-src 'self'",
  "manifest-src 'self'",
  "base-uri 'none'",
  "form-action 'none'",
].join("; ");

// threads need the first two; a static host that cannot send them gets them from the service worker
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Content-Security-Policy": `${POLICY}; frame-ancestors 'none'`,
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
};

// large, and seldom or never used: kept for offline when they are
const SELDOM = /asyncify|webgpu|nosimd/;

interface Named {
  name?: string;
  names?: string[];
  moduleIds?: string[];
}

const chunkFileNames = ({ name, moduleIds }: Named) =>
  moduleIds?.some((id) => id.includes("ort-nosimd")) ? "assets/nosimd-[hash].js" : `assets/${name}-[hash].js`;
const assetFileNames = ({ names }: Named) =>
  names?.includes("ort-wasm.wasm") ? "assets/nosimd-[hash][extname]" : "assets/[name]-[hash][extname]";

/** The policy in the page, and in the service worker the list of what it keeps for offline. */
function progressive(): Plugin {
  return {
    name: "progressive",
    apply: "build",
    transformIndexHtml: (html) => html.replace("<!-- policy -->", `<meta http-equiv="Content-Security-Policy" content="${POLICY}" />`),
    generateBundle(_, output) {
      const worker = output["sw.js"];
      if (worker?.type !== "chunk") throw new Error("the service worker was not built");
      const built = Object.keys(output).filter((name) => name !== "sw.js" && !SELDOM.test(name));
      const still = readdirSync("public").filter((name) => name !== "bundle" && name !== "_headers");
      const files = ["./", ...built.filter((name) => name !== "index.html"), ...still];
      const digest = createHash("sha256").update(files.join("\n"));
      for (const name of still) digest.update(readFileSync(`public/${name}`));
      digest.update(readFileSync("index.html"));
      worker.code = worker.code
        .replace(/["'`]__FILES__["'`]/, () => JSON.stringify(files))
        .replace(/["'`]__POLICY__["'`]/, () => JSON.stringify(HEADERS["Content-Security-Policy"]))
        .replace("__VERSION__", digest.digest("hex").slice(0, 12));
    },
  };
}

export default defineConfig({
  base: "./",
  appType: "mpa",
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser", "development|production"] },
  plugins: [progressive()],
  worker: { format: "es", rollupOptions: { output: { chunkFileNames, assetFileNames } } },
  build: {
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rollupOptions: {
      input: { main: "index.html", sw: "src/sw.ts" },
      output: { entryFileNames: (chunk: { name: string }) => (chunk.name === "sw" ? "sw.js" : "assets/[name]-[hash].js") },
    },
  },
  server: { headers: { ...HEADERS, "Content-Security-Policy": "" } },
  preview: { headers: HEADERS },
  test: { include: ["tests/**/*.test.ts"], fileParallelism: false, testTimeout: 60_000, hookTimeout: 60_000, expect: { poll: { timeout: 15_000 } } },
} as never);
