/** The service worker: offline, and a reload where only it can give this page threads. */

const TRIED = "pocketvlm-isolated";

const supported = () => "serviceWorker" in navigator && import.meta.env.PROD;

/** A host that sends no isolation headers: the worker adds them, from the next load on. True where that is now. */
export async function isolate(): Promise<boolean> {
  if (!supported() || globalThis.crossOriginIsolated) return false;
  try {
    if (sessionStorage.getItem(TRIED)) return false;
    sessionStorage.setItem(TRIED, "1");
    await navigator.serviceWorker.register("./sw.js");
    await controlled();
    if (!navigator.serviceWorker.controller) return false;
    location.reload();
    return true;
  } catch {
    return false; // no storage or no worker (a private window): the app works online, on one thread
  }
}

/** Keep the app for offline; called late, so that what it keeps is in the browser's cache already. */
export async function keepOffline(): Promise<void> {
  if (supported()) await navigator.serviceWorker.register("./sw.js").catch(() => undefined);
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
