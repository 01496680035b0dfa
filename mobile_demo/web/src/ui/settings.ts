/** What the app remembers between visits; it stays in this browser. */
import type { Processor } from "../runtime";

export interface Settings {
  labels: string[];
  templates: string[];
  precision: string | null;
  processor: Processor;
}

export const DEFAULTS: Settings = {
  labels: ["dog", "cat", "bird", "fish", "car", "bicycle", "bus", "boat", "tree", "flower", "fruit", "house"],
  templates: ["{}", "a picture of {}"],
  precision: null,
  processor: "cpu",
};

const KEY = "pocketvlm";

export function readSettings(): Settings {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "{}") as Partial<Settings>;
    const strings = (rows: unknown): rows is string[] => Array.isArray(rows) && rows.every((row) => typeof row === "string");
    return {
      labels: strings(kept.labels) ? kept.labels : [...DEFAULTS.labels],
      templates: strings(kept.templates) && kept.templates.length ? kept.templates : [...DEFAULTS.templates],
      precision: typeof kept.precision === "string" ? kept.precision : null,
      processor: kept.processor === "gpu" ? "gpu" : "cpu",
    };
  } catch {
    return { ...DEFAULTS };
  }
}

export function keepSettings(settings: Settings): void {
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // storage is refused: the settings live as long as the page
  }
}
