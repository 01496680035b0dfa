import Foundation

/// `vector` at length one.
public func normalize(_ vector: [Float]) -> [Float] {
    var squares = 0.0
    for value in vector { squares += Double(value) * Double(value) }
    let length = squares.squareRoot()
    return vector.map { Float(Double($0) / length) }
}

public func cosine(_ a: [Double], _ b: [Double]) -> Double {
    precondition(a.count == b.count, "embeddings of \(a.count) and \(b.count) numbers lie in different spaces")
    var dot = 0.0
    var aa = 0.0
    var bb = 0.0
    for i in 0..<a.count {
        dot += a[i] * b[i]
        aa += a[i] * a[i]
        bb += b[i] * b[i]
    }
    return dot / (aa * bb).squareRoot()
}

public func cosine(_ a: [Float], _ b: [Float]) -> Double {
    cosine(a.map { Double($0) }, b.map { Double($0) })
}

/// A label's embedding: the normalised mean of its prompts' normalised embeddings.
public func labelEmbedding(_ prompts: [[Float]]) -> [Float] {
    var total = [Double](repeating: 0, count: prompts[0].count)
    for prompt in prompts {
        let unit = normalize(prompt)
        for i in 0..<unit.count { total[i] += Double(unit[i]) }
    }
    return normalize(total.map { Float($0 / Double(prompts.count)) })
}

/// Zero-shot probabilities of one picture over labels; they sum to one.
public func probabilities(_ image: [Float], _ labels: [[Float]], logitScale: Double) -> [Double] {
    let logits = labels.map { logitScale * cosine(image, $0) }
    let largest = logits.max() ?? 0
    let powers = logits.map { exp($0 - largest) }
    let total = powers.reduce(0, +)
    return powers.map { $0 / total }
}

/// Indices of the best `k` of a gallery with their cosines, best first.
public func search(_ query: [Float], _ gallery: [[Float]], k: Int) -> [(index: Int, cosine: Double)] {
    var found: [(index: Int, cosine: Double)] = []
    for (index, row) in gallery.enumerated() { found.append((index: index, cosine: cosine(query, row))) }
    found.sort { $0.cosine > $1.cosine }
    return Array(found.prefix(k))
}
