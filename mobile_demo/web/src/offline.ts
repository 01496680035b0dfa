/** Registering the service worker, and a reload where only it can give this page threads. */

const TRIED = "pocketvlm-isolated";

/** Returns true where the page is about to be reloaded by this. */
export async function ensureOffline(): Promise<boolean> {
  if (!("serviceWorker" in navigator) || !import.meta.env.PROD) return false;
  try {
    await navigator.serviceWorker.register("./sw.js");
    if (globalThis.crossOriginIsolated || sessionStorage.getItem(TRIED)) return false;
    // a static host sends no isolation headers: the worker adds them, from the next load on
    sessionStorage.setItem(TRIED, "1");
    await controlled();
    if (!navigator.serviceWorker.controller) return false;
    location.reload();
    return true;
  } catch {
    return false; // no storage or no worker (a private window): the app works online, on one thread
  }
}

function controlled(): Promise<void> {
  return new Promise((resolve) => {
    if (navigator.serviceWorker.controller) {
      resolve();
      return;
    }
    navigator.serviceWorker.addEventListener("controllerchange", () => resolve(), { once: true });
    setTimeout(resolve, 20_000);
  });
}
