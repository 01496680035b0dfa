/** What a bundle expects and promises: the part of bundle.json that this app reads. */
import { IntegrityError } from "./errors";

export interface ImageSpec {
  size: number;
  resize: "crop" | "squash" | "pad";
  filter: "bilinear" | "bicubic";
  crop_fraction: number;
  background: [number, number, number];
  decode: string;
}

export interface TextSpec {
  context_length: number;
  vocab_size: number;
  pad_id: number;
  languages: string[];
}

export interface Contract {
  kind: string;
  name: string;
  model_id: string;
  space_id: string;
  embed_dim: number;
  image: ImageSpec;
  text: TextSpec;
  logit_scale: number;
  normalized: boolean;
}

/** The folder of a model that answers in words, where the bundle brings one; `VLM_MANIFEST` is listed then. */
export const VLM = "vlm/";
export const VLM_MANIFEST = `${VLM}bundle.json`;

/** What such a model expects and promises; edge/vlm_bundle.py says what each field means. */
export interface VlmContract {
  kind: string;
  name: string;
  image: ImageSpec;
  template: { user: number; assistant: number; end: number; first_text: number; marker: string };
  prefix: number;
  context_length: number;
  vocab_size: number;
  width: number;
  tokenizer: string;
}

export interface VlmManifest {
  contract: VlmContract;
  variants: { target: string; precision: string; files: { picture: string; decoder: string } }[];
  licences?: Licence[];
}

export type Tower = "image" | "text";

export interface Variant {
  target: string;
  precision: string;
  files: Partial<Record<Tower, string>>;
  dim?: number | null;
}

export interface Parity {
  target: string;
  precision: string;
  status: string;
  message: string;
  stages: Record<string, string>;
  image?: { cosine_mean: number } | null;
  text?: { cosine_mean: number } | null;
}

export interface Licence {
  what: string;
  licence: string;
  attribution?: string;
  url?: string;
}

export interface Manifest {
  schema_version: string;
  kit_version: string;
  created: string;
  contract: Contract;
  variants: Variant[];
  files: Record<string, { sha256: string; bytes: number }>;
  tokenizer?: string;
  conformance?: string;
  parity?: Parity[];
  licences?: Licence[];
}

const SCHEMA = [1, 0] as const;

/** Read bundle.json; refuse what this app would misread. */
export function readManifest(text: string): Manifest {
  const raw = parsed(text) as Manifest;
  const contract = raw.contract;
  if (contract?.kind !== "dual" || !contract.image || !contract.text || !raw.tokenizer) {
    throw new IntegrityError(
      `The bundle holds a model of kind '${contract?.kind}' and this app shows models with a picture and a text tower; ` +
        "prepare a bundle of a dual encoder.",
    );
  }
  checkDecoding(contract.image);
  if (onnxVariants(raw).length === 0) {
    throw new IntegrityError(
      "The bundle lists no ONNX variant, which is what a browser runs; export it with the target onnx:int8.",
    );
  }
  for (const name of Object.keys(raw.files)) {
    if (/^\/|\\|:|(^|\/)\.\.(\/|$)/.test(name)) {
      throw new IntegrityError(`bundle.json names the file '${name}', which is no plain path inside the bundle.`);
    }
  }
  return raw;
}

/** Read the bundle.json of a model that answers in words. */
export function readVlmManifest(text: string): VlmManifest {
  const raw = parsed(text) as VlmManifest;
  if (raw.contract?.kind !== "vlm" || !raw.contract.image || !raw.contract.template) {
    throw new IntegrityError(
      `The bundle for questions holds a model of kind '${raw.contract?.kind}', which cannot be asked; prepare one of ` +
        "“pocketvlm vlm export”.",
    );
  }
  checkDecoding(raw.contract.image);
  if (!raw.variants.some((v) => v.target === "onnx" && v.files.picture && v.files.decoder)) {
    throw new IntegrityError("The bundle for questions lists no ONNX variant, which is what a browser runs; export it again.");
  }
  return raw;
}

function parsed(text: string): unknown {
  let raw: { schema_version?: string };
  try {
    raw = JSON.parse(text) as typeof raw;
  } catch {
    throw new IntegrityError("bundle.json is not JSON, so there is no model to load; prepare the bundle again.");
  }
  const found = String(raw?.schema_version ?? "none");
  const [major, minor] = found.split(".").map(Number);
  if (major !== SCHEMA[0] || !((minor ?? NaN) <= SCHEMA[1])) {
    throw new IntegrityError(
      `The bundle has schema version ${found} and this app reads ${SCHEMA.join(".")}; its fields could mean other ` +
        "things, so use a matching release of the app.",
    );
  }
  return raw;
}

function checkDecoding({ decode }: ImageSpec): void {
  if (decode !== "v1") {
    throw new IntegrityError(
      `The model wants image decoding '${decode}' and this app knows 'v1'; its pixels would be wrong, so use a newer ` +
        "release of the app.",
    );
  }
}

/** Variants with both towers at full width, in the bundle's order. */
export function onnxVariants(manifest: Manifest): Variant[] {
  const full = manifest.contract.embed_dim;
  return manifest.variants.filter((v) => v.target === "onnx" && v.files.image && v.files.text && (v.dim ?? full) === full);
}
