import CoreML
import CoreVideo
import Foundation
import PocketVLM

/// Both towers of a bundle in Core ML.
public final class CoreMLEmbedder: Embedder {
    private let image: MLModel
    private let text: MLModel

    /// Compiles the packages on first use and keeps the result in `cache`, under the hash of bundle.json, which lists
    /// the packages' own: another export of the same model is compiled again.
    public init(_ bundle: ModelBundle, cache: URL) throws {
        guard let variant = bundle.variants.first(where: { $0.target == "coreml" }),
            let imageFile = variant.files["image"], let textFile = variant.files["text"]
        else {
            throw PocketVLMError("the bundle lacks a Core ML package of a tower; run: pocketvlm mobile prepare ios")
        }
        let manifest = try Data(contentsOf: bundle.folder.appendingPathComponent("bundle.json"))
        let folder = cache.appendingPathComponent("coreml-\(sha256(manifest).prefix(16))")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        image = try CoreMLEmbedder.load(try bundle.file(imageFile), folder.appendingPathComponent("image.mlmodelc"))
        text = try CoreMLEmbedder.load(try bundle.file(textFile), folder.appendingPathComponent("text.mlmodelc"))
    }

    public func embed(pixels: Pixels) throws -> [Float] {
        try run(image, "pixels", MLFeatureValue(pixelBuffer: try pixelBuffer(pixels)))
    }

    public func embed(ids: [Int32]) throws -> [Float] {
        let array = try MLMultiArray(shape: [1, NSNumber(value: ids.count)], dataType: .int32)
        for (index, id) in ids.enumerated() { array[index] = NSNumber(value: id) }
        return try run(text, "ids", MLFeatureValue(multiArray: array))
    }

    private func run(_ model: MLModel, _ name: String, _ value: MLFeatureValue) throws -> [Float] {
        let output = try model.prediction(from: try MLDictionaryFeatureProvider(dictionary: [name: value]))
        guard let embedding = output.featureValue(for: "embedding")?.multiArrayValue else {
            throw PocketVLMError("the model gives no 'embedding'; export the bundle again")
        }
        return (0..<embedding.count).map { embedding[$0].floatValue }
    }

    /// The pixels as they are, in the layout that Core ML's image inputs take.
    private func pixelBuffer(_ pixels: Pixels) throws -> CVPixelBuffer {
        var made: CVPixelBuffer?
        CVPixelBufferCreate(nil, pixels.width, pixels.height, kCVPixelFormatType_32BGRA, nil, &made)
        guard let buffer = made else { throw PocketVLMError("there is no memory for a picture of the model's size") }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        guard let base = CVPixelBufferGetBaseAddress(buffer) else {
            throw PocketVLMError("there is no memory for a picture of the model's size")
        }
        let perRow = CVPixelBufferGetBytesPerRow(buffer)
        for y in 0..<pixels.height {
            let row = base.advanced(by: y * perRow).assumingMemoryBound(to: UInt8.self)
            for x in 0..<pixels.width {
                let from = (y * pixels.width + x) * 3
                row[x * 4] = pixels.rgb[from + 2]
                row[x * 4 + 1] = pixels.rgb[from + 1]
                row[x * 4 + 2] = pixels.rgb[from]
                row[x * 4 + 3] = 255
            }
        }
        return buffer
    }

    private static func load(_ package: URL, _ compiled: URL) throws -> MLModel {
        if !FileManager.default.fileExists(atPath: compiled.path) {
            let fresh = try MLModel.compileModel(at: package)
            try FileManager.default.moveItem(at: fresh, to: compiled)
        }
        return try MLModel(contentsOf: compiled)
    }
}
