/** The model card: what the bundle says of itself, whether its files were checked, and a check in this very browser. */
import { firstFailing, type StageResult } from "../conformance";
import type { Parity } from "../contract";
import type { Engine, Opened } from "../engine";
import { sentence } from "../errors";
import type { Processor } from "../runtime";
import { byId, h, icon, megabytes } from "./dom";

const STAGES: Record<string, string> = {
  S0: "pixels",
  S1: "token ids",
  S2: "full precision",
  S3: "this precision",
  S4: "end to end",
  S5: "the task",
};
const WORDS: Record<string, string> = { pass: "passes", fail: "fails", undecided: "undecided" };

export type Reopen = (choice: { precision?: string; processor?: Processor }) => void;

export function drawCard(opened: Opened, engine: Engine, reopen: Reopen): void {
  const { manifest } = opened;
  byId("card").replaceChildren(
    heading(opened),
    parity((manifest.parity ?? []).filter((row) => row.target === "onnx")),
    runsOn(opened, reopen),
    conformance(engine),
    contract(opened),
    credits(opened),
  );
}

function heading({ manifest, precision, files }: Opened): HTMLElement {
  const bytes = Object.values(files).reduce((sum, name) => sum + (manifest.files[name]?.bytes ?? 0), 0);
  const { name, text } = manifest.contract;
  const names = new Intl.DisplayNames("en", { type: "language" });
  const languages = text.languages?.length ? ` It reads ${text.languages.map((code) => languageName(names, code)).join(", ")}.` : "";
  return h(
    "div",
    { class: "card hero" },
    h("h3", {}, name),
    h("p", { class: "quiet" }, `A vision-language model of ${megabytes(bytes)} at ${precision}.${languages}`),
    h("p", { class: "quiet" }, "Everything runs here: no picture and no word leaves this device."),
  );
}

function languageName(names: Intl.DisplayNames, code: string): string {
  try {
    return names.of(code) ?? code;
  } catch {
    return code;
  }
}

function runsOn(opened: Opened, reopen: Reopen): HTMLElement {
  const { threads, simd, processor, precision, precisions, gpu, note } = opened;
  const kind = processor === "gpu" ? "GPU (WebGPU)" : `processor, ${threads} ${threads === 1 ? "thread" : "threads"}, ${simd ? "with" : "without"} SIMD`;
  const card = h("div", { class: "card" }, h("h3", {}, "Runs on"), h("p", { id: "runs-on" }, `This device’s ${kind}.`));
  if (note) card.append(h("p", { class: "notice", id: "runtime-note" }, note));
  if (precisions.length > 1) {
    card.append(choice("Precision", precisions, precision, (picked) => reopen({ precision: picked })));
  }
  if (gpu) {
    const names: Record<string, string> = { cpu: "Processor", gpu: "GPU" };
    card.append(choice("Computed by", ["cpu", "gpu"], processor, (picked) => reopen({ processor: picked as Processor }), names));
    card.append(h("p", { class: "quiet" }, "The GPU needs a larger runtime, which is fetched when you choose it. Small int8 models are faster on the processor."));
  }
  return card;
}

function choice(title: string, options: string[], chosen: string, pick: (option: string) => void, names: Record<string, string> = {}): HTMLElement {
  const group = h("fieldset", { class: "segments" }, h("legend", {}, title));
  for (const option of options) {
    const input = h("input", { type: "radio", name: title, value: option, checked: option === chosen });
    input.addEventListener("change", () => pick(option));
    group.append(h("label", {}, input, h("span", {}, names[option] ?? option)));
  }
  return group;
}

function conformance(engine: Engine): HTMLElement {
  const list = h("ol", { class: "stages", id: "stages" });
  const verdict = h("p", { id: "verdict", role: "status" });
  const button = h("button", { id: "check", class: "button strong", type: "button" }, icon("check"), "Check this device");
  button.addEventListener("click", async () => {
    button.disabled = true;
    list.replaceChildren();
    verdict.textContent = "Checking…";
    delete verdict.dataset["kind"];
    try {
      const stages = await engine.call("conformance", {}, { progress: (stage) => list.append(stageRow(stage)) });
      const failed = firstFailing(stages);
      verdict.textContent = failed ? `Fails first at ${failed.stage}.` : "Every stage gives the recorded numbers.";
      verdict.dataset["kind"] = failed ? "fail" : "pass";
    } catch (error) {
      verdict.textContent = sentence(error);
      verdict.dataset["kind"] = "fail";
    }
    button.disabled = false;
  });
  return h(
    "div",
    { class: "card" },
    h("h3", {}, "Same numbers here?"),
    h("p", { class: "quiet" }, "The bundle brings pictures, texts and the answers that were computed where it was made. This runs them in your browser."),
    button,
    verdict,
    list,
  );
}

function stageRow(stage: StageResult): HTMLLIElement {
  const { stage: name, passed, cases, worst, budget, failures, notes } = stage;
  const [code, ...words] = name.split(" ");
  const number = (v: number) => (v === 0 || v >= 1 ? String(v) : v.toPrecision(2));
  const measured = /refused|decode/.test(name) ? "" : ` · worst ${number(worst)} of ${number(budget)}`;
  const row = h(
    "li",
    { "data-stage": name, "data-passed": String(passed) },
    h("span", { class: `light ${passed ? "pass" : "fail"}`, "aria-hidden": "true" }),
    h("span", { class: "stage-name" }, h("b", {}, code ?? ""), ` ${words.join(" ")}`),
    h("span", { class: "quiet" }, `${passed ? "passes" : "fails"} · ${cases} cases${measured}`),
  );
  for (const line of failures.slice(0, 5)) row.append(h("span", { class: "failure" }, line));
  if (notes.length) {
    row.append(h("details", { class: "told" }, h("summary", {}, `${notes.length} decoded otherwise than recorded`), ...notes.map((line) => h("p", { class: "quiet" }, line))));
  }
  return row;
}

function parity(rows: Parity[]): HTMLElement {
  const card = h("div", { class: "card" }, h("h3", {}, "Parity with the trained model"));
  if (!rows.length) card.append(h("p", { class: "quiet" }, "The bundle brings no parity result."));
  for (const row of rows) {
    const lights = h("ul", { class: "lights", "aria-label": `Stages of ${row.precision}` });
    for (const [stage, status] of Object.entries(row.stages)) {
      const light = h("span", { class: `light ${status}`, "aria-hidden": "true" });
      lights.append(h("li", {}, light, STAGES[stage] ?? stage, h("span", { class: "unseen" }, `: ${WORDS[status] ?? status}`)));
    }
    const cosines = [row.image && `pictures ${row.image.cosine_mean.toFixed(4)}`, row.text && `texts ${row.text.cosine_mean.toFixed(4)}`].filter(Boolean);
    card.append(
      h("div", { class: "parity" }, h("p", {}, h("b", {}, row.precision), ` ${WORDS[row.status] ?? row.status}`), lights, h("p", { class: "quiet" }, cosines.length ? `Mean cosine: ${cosines.join(", ")}.` : "")),
    );
    if (row.status !== "pass") card.lastElementChild!.append(h("details", {}, h("summary", {}, "Why"), h("p", { class: "quiet" }, row.message)));
  }
  return card;
}

function contract({ manifest, files }: Opened): HTMLElement {
  const { contract: c } = manifest;
  const list = h("dl", { class: "facts" });
  const fact = (name: string, value: string) => list.append(h("dt", {}, name), h("dd", {}, value));
  fact("Embedding", `${c.embed_dim} numbers`);
  fact("Picture", `${c.image.size} × ${c.image.size}, ${c.image.resize}, ${c.image.filter}`);
  fact("Text", `${c.text.context_length} tokens of ${c.text.vocab_size.toLocaleString("en")}`);
  fact("Logit scale", c.logit_scale.toFixed(2));
  fact("Space", c.space_id);
  for (const [tower, name] of Object.entries(files)) fact(`${tower} file`, megabytes(manifest.files[name]?.bytes ?? 0));
  fact("Made", `${manifest.created.slice(0, 10)}, pocketvlm ${manifest.kit_version}`);
  return h("div", { class: "card" }, h("h3", {}, "Contract"), list, h("p", { class: "quiet" }, "Every file was compared with the sha256 in bundle.json before it was used."));
}

function credits({ manifest }: Opened): HTMLElement {
  const list = h("ul", { class: "credits" });
  for (const { what, licence, attribution } of manifest.licences ?? []) {
    list.append(h("li", {}, h("b", {}, what), ` · ${licence}`, attribution ? h("span", { class: "quiet" }, attribution) : null));
  }
  return h("div", { class: "card" }, h("h3", {}, "Credits"), list);
}
