/** The few helpers that the screens share. */

type Child = Node | string | null | false | undefined;

/** An element with attributes and children; `class` and `text` as one would expect. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, string | boolean | undefined> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child): child is Node | string => child instanceof Node || typeof child === "string"));
  return element;
}

export function byId<T extends HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return found as T;
}

export function icon(name: string): SVGSVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export const percent = (share: number) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
export const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(1)} MB`;
export const milliseconds = (ms: number) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

let timer: ReturnType<typeof setTimeout> | undefined;

/** Say something at the foot of the screen; a screen reader reads it out. */
export function tell(message: string, kind: "error" | "plain" = "plain"): void {
  const box = byId("toast");
  clearTimeout(timer);
  box.textContent = message;
  box.dataset["kind"] = kind;
  box.hidden = false;
  timer = setTimeout(() => (box.hidden = true), kind === "error" ? 9000 : 4000);
}

/** A file that the user picks; resolves with none where the dialog is dismissed. */
export function onFiles(input: HTMLInputElement, take: (files: File[]) => void): void {
  input.addEventListener("change", () => {
    const files = [...(input.files ?? [])];
    input.value = "";
    if (files.length) take(files);
  });
}
