/** onnxruntime-web, as much of it as this browser can use. Each build is fetched only when it is the one used. */
import type * as Ort from "onnxruntime-web/wasm";
import wasmModule from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import wasmBinary from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";
import gpuModule from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import gpuBinary from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import plainBinary from "../node_modules/ort-nosimd/dist/ort-wasm.wasm?url";

export type Processor = "cpu" | "gpu";

export interface Runtime {
  ort: typeof Ort;
  processor: Processor;
  threads: number;
  simd: boolean;
  /** how far the runtime may rewrite a graph */
  optimization: "all" | "disabled";
  /** one plain sentence for the person at the screen where something is missing, else "" */
  note: string;
}

/** `i32x4.dot_i16x8_s` in a function of its own: valid only where WASM SIMD is. */
const SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 4, 1, 96, 0, 0, 3, 2, 1, 0, 10, 30, 1, 28, 0, 65, 0, 253, 15, 253, 12, 0, 0, 0, 0, 0, 0, 0,
  0, 0, 0, 0, 0, 0, 0, 0, 0, 253, 186, 1, 26, 11,
]);

export function hasSimd(): boolean {
  return WebAssembly.validate(SIMD);
}

/** Whether there is a GPU that answers; some browsers know WebGPU and have none. */
export async function hasGpu(): Promise<boolean> {
  const { gpu } = navigator as Navigator & { gpu?: { requestAdapter(): Promise<unknown> } };
  return Boolean(await gpu?.requestAdapter().catch(() => null));
}

/** More than four threads make a small model slower. */
export function threadsToUse(): number {
  return globalThis.crossOriginIsolated ? Math.max(1, Math.min(4, navigator.hardwareConcurrency || 1)) : 1;
}

const absolute = (url: string) => new URL(url, globalThis.location.href).href;

export async function loadRuntime(processor: Processor, threads = threadsToUse()): Promise<Runtime> {
  if (!hasSimd()) return loadWithoutSimd();
  if (processor === "gpu") {
    const ort = (await import("onnxruntime-web/webgpu")) as unknown as typeof Ort;
    ort.env.wasm.wasmPaths = { mjs: absolute(gpuModule), wasm: absolute(gpuBinary) };
    ort.env.wasm.numThreads = 1;
    return { ort, processor, threads: 1, simd: true, optimization: "all", note: "" };
  }
  const ort = await import("onnxruntime-web/wasm");
  ort.env.wasm.wasmPaths = { mjs: absolute(wasmModule), wasm: absolute(wasmBinary) };
  ort.env.wasm.numThreads = threads;
  const note = globalThis.crossOriginIsolated
    ? ""
    : "This page has no threads (it is not cross-origin isolated), so the model runs on one and takes longer.";
  return { ort, processor, threads, simd: true, optimization: "all", note };
}

/** The last release that had a build without SIMD. */
async function loadWithoutSimd(): Promise<Runtime> {
  const ort = (await import("ort-nosimd/wasm")) as unknown as typeof Ort;
  ort.env.wasm.wasmPaths = { "ort-wasm.wasm": absolute(plainBinary) } as never;
  ort.env.wasm.numThreads = 1;
  const note = "This browser has no WASM SIMD, so an older and slower runtime is used, on one thread.";
  // its fusions give two nodes one name and then refuse the graph
  return { ort, processor: "cpu", threads: 1, simd: false, optimization: "disabled", note };
}
