import Foundation
import PocketVLM
import PocketVLMApple

/// The model, its tokenizer and the photos that can be searched. One thing at a time, off the main thread.
actor Engine {
    let bundle: ModelBundle
    private let tokenizer: Tokenizer
    private let spec: ImageSpec
    private let decoder = AppleDecoder()
    private let embedder: CoreMLEmbedder
    private var labels: [(name: String, embedding: [Float])] = []
    private var photos: [(data: Data, embedding: [Float])] = []

    init() throws {
        guard let resources = Bundle.main.resourceURL else { throw PocketVLMError("the app has no resources") }
        bundle = try ModelBundle(resources.appendingPathComponent("bundle"))
        tokenizer = try bundle.tokenizer()
        guard let image = bundle.contract.image else { throw PocketVLMError("the model has no image tower") }
        spec = image
        let cache = try FileManager.default.url(
            for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        embedder = try CoreMLEmbedder(bundle, cache: cache)
    }

    func setLabels(_ text: String) throws {
        var fresh: [(name: String, embedding: [Float])] = []
        for part in text.split(whereSeparator: { $0 == "," || $0.isNewline }) {
            let name = part.trimmingCharacters(in: .whitespaces)
            if name.isEmpty || fresh.contains(where: { $0.name == name }) { continue }
            fresh.append((name: name, embedding: labelEmbedding([try embed(text: name)])))
        }
        labels = fresh
    }

    /// Names with probabilities, the likeliest first, and the milliseconds that resizing and the model took.
    func classify(_ frame: Pixels) throws -> (scores: [Score], milliseconds: Double) {
        if labels.isEmpty { return ([], 0) }
        let start = Date()
        let row = try embedder.embed(pixels: try resize(frame, spec))
        let found = probabilities(row, labels.map { $0.embedding }, logitScale: bundle.contract.logitScale)
        let milliseconds = Date().timeIntervalSince(start) * 1000
        var scores: [Score] = []
        for (index, label) in labels.enumerated() { scores.append(Score(name: label.name, probability: found[index])) }
        scores.sort { $0.probability > $1.probability }
        return (scores, milliseconds)
    }

    /// Embeds a photo; returns how many can be searched now.
    func add(_ data: Data) throws -> Int {
        let picture = try decoder.decode(data, background: spec.background)
        photos.append((data: data, embedding: try embedder.embed(pixels: try resize(picture, spec))))
        return photos.count
    }

    func find(_ text: String) throws -> [Hit] {
        let query = try embed(text: text)
        return search(query, photos.map { $0.embedding }, k: 30).map { found in
            Hit(id: found.index, data: photos[found.index].data, cosine: found.cosine)
        }
    }

    func conformance() throws -> Report {
        let precision = bundle.variants.first { $0.target == "coreml" }?.precision ?? ""
        return try Conformance(bundle, precision: precision, decoder: decoder, embedder: embedder).run()
    }

    private func embed(text: String) throws -> [Float] {
        try embedder.embed(ids: try tokenizer.encode(text))
    }
}

struct Score: Identifiable {
    let name: String
    let probability: Double
    var id: String { name }
}

struct Hit: Identifiable {
    let id: Int
    let data: Data
    let cosine: Double
}
