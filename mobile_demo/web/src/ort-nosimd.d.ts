declare module "ort-nosimd/wasm" {
  export * from "onnxruntime-web/wasm";
}
