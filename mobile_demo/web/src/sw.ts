/**
 * The service worker: the app works without a network after the first visit, and has threads on a static host that
 * cannot send headers. The model is not its business: the page keeps that by hash.
 */
const self_ = self as unknown as ServiceWorkerGlobalScope;
const FILES = "__FILES__" as unknown as string[];
const CACHE = "pocketvlm-app-__VERSION__";
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Content-Security-Policy": "__POLICY__",
};

self_.addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(CACHE)
      .then((cache) => cache.addAll(FILES))
      .then(() => self_.skipWaiting()),
  );
});

self_.addEventListener("activate", (event) => {
  event.waitUntil(
    caches
      .keys()
      .then((names) => Promise.all(names.filter((n) => n.startsWith("pocketvlm-app-") && n !== CACHE).map((n) => caches.delete(n))))
      .then(() => self_.clients.claim()),
  );
});

self_.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== self_.location.origin) return;
  // Chromium asks for some things only from its own cache; a service worker cannot
  if (request.cache === "only-if-cached" && request.mode !== "same-origin") return;
  if (url.href.startsWith(new URL("bundle/", self_.registration.scope).href)) return;
  event.respondWith(answer(request));
});

async function answer(request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  const page = request.mode === "navigate";
  const kept = await cache.match(page ? "./" : request, { ignoreSearch: page });
  if (kept) return withHeaders(kept);
  const response = await fetch(request);
  // names under assets/ carry a hash of what is in them
  if (response.ok && request.url.includes("/assets/")) await cache.put(request, response.clone());
  return withHeaders(response);
}

function withHeaders(response: Response): Response {
  if (response.type === "opaque" || response.type === "opaqueredirect") return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
