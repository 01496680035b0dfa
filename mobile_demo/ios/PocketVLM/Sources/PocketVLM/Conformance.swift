import Foundation

/// Encoded bytes to an upright RGB picture over `background`; throws PocketVLMError for what is no whole picture.
public protocol PictureDecoder {
    func decode(_ bytes: Data, background: [Int]) throws -> Pixels
}

/// This platform has no decoder for the format: the case is not run, which is another thing than passed.
public struct UnsupportedFormat: Error {
    public let format: String

    public init(_ format: String) {
        self.format = format
    }
}

/// The graphs of one variant.
public protocol Embedder {
    func embed(pixels: Pixels) throws -> [Float]
    func embed(ids: [Int32]) throws -> [Float]
}

/// One stage over all cases. A stage without cases has failed; one with cases not run is not passed either.
public struct Stage: Identifiable, Sendable {
    public let name: String
    public let cases: Int
    public let failures: [String]
    public let notRun: [String]
    public let notes: [String]

    public var id: String { name }
    public var passed: Bool { failures.isEmpty && notRun.isEmpty }
}

public struct Report: Sendable {
    public let stages: [Stage]

    public var firstFailing: Stage? { stages.first { !$0.failures.isEmpty } }
    public var notRun: [String] { Array(Set(stages.flatMap { $0.notRun })).sorted() }

    /// "pass", "fails at STAGE: ..." or "incomplete: ...".
    public var verdict: String {
        if let failing = firstFailing { return "fails at \(failing.name): \(failing.failures[0])" }
        if !notRun.isEmpty { return "incomplete: passes what ran; not run: \(notRun.joined(separator: "; "))" }
        return "pass"
    }
}

/// Runs the vectors of a bundle as docs/conformance.md says: every stage in order, one input at a time.
public final class Conformance {
    private struct Failure: Error {
        let message: String
    }

    private let bundle: ModelBundle
    private let contract: Contract
    private let decoder: PictureDecoder
    private let embedder: Embedder?
    private let vectors: Fields
    private let complete: Bool
    private let images: [Fields]
    private let texts: [Fields]
    private let precision: String
    private let tolerance: Double
    private let dim: Int
    private var found: [String: [Double]] = [:]
    private var notes: [String] = []

    public init(_ bundle: ModelBundle, precision: String, decoder: PictureDecoder, embedder: Embedder?) throws {
        self.bundle = bundle
        self.precision = precision
        self.decoder = decoder
        self.embedder = embedder
        contract = bundle.contract
        vectors = try bundle.vectors()
        complete = try vectors.string("schema") != "1.0"
        images = try vectors.objects("images")
        texts = try vectors.objects("texts")
        let stated = try vectors.fields("tolerance")
        tolerance = try stated.double(stated.has(precision) ? precision : "int8")
        dim = bundle.variants.first { $0.precision == precision }?.dim ?? bundle.contract.embedDim
    }

    public func run() throws -> Report {
        var stages: [Stage] = []
        let words = try contract.text == nil ? nil : bundle.tokenizer()
        if let image = contract.image {
            if complete {
                var recorded: [Fields] = []
                for one in images {
                    if try one.fields("decoded").has("file") { recorded.append(one) }
                }
                stages.append(stage("S0 decode", images) { try self.decode($0, image) })
                if !recorded.isEmpty {
                    stages.append(
                        stage("S0 resize", recorded) { one in
                            try self.samePixels(one, resize(try self.recordedDecoding(one), image))
                        })
                }
            }
            stages.append(
                stage("S0 pixels", images) { one in
                    try self.samePixels(one, resize(try self.source(one, image), image))
                })
            if complete {
                stages.append(
                    stage("S0 refused", try vectors.objects("refused_images")) { one in
                        let bytes = try self.bytes(try one.string("bytes_file"))
                        try self.mustRefuse(one) { _ = try self.decoder.decode(bytes, background: image.background) }
                    })
            }
        }
        if let words {
            stages.append(
                stage("S1 ids", texts) { one in
                    let ids = try words.encode(try one.string("text")).map { Int($0) }
                    let stated = try one.ints("ids")
                    if ids != stated { throw Failure(message: "ids \(ids), recorded \(stated)") }
                })
            if complete {
                stages.append(
                    stage("S1 refused", try vectors.objects("refused_texts")) { one in
                        let text = try one.string("text")
                        try self.mustRefuse(one) { _ = try words.encode(text) }
                    })
            }
        }
        if let embedder { try graphs(&stages, embedder, contract.image, words) }
        return Report(stages: stages)
    }

    private func graphs(
        _ stages: inout [Stage], _ embedder: Embedder, _ image: ImageSpec?, _ words: Tokenizer?
    ) throws {
        let kept = images.filter { $0.has("pixels_file") }
        if image != nil {
            stages.append(
                stage("S3 image graph", kept) { one in
                    try self.near(one, try embedder.embed(pixels: try self.recordedPixels(one)))
                })
        }
        if words != nil {
            stages.append(
                stage("S3 text graph", texts) { one in
                    try self.near(one, try embedder.embed(ids: try one.ints("ids").map { Int32($0) }))
                })
        }
        if let image {
            stages.append(
                stage("S4 image", images) { one in
                    let row = try embedder.embed(pixels: try resize(try self.source(one, image), image))
                    self.found["image " + one.stringOrNone("name")] = row.map { Double($0) }
                    try self.near(one, row)
                })
        }
        if let words {
            stages.append(
                stage("S4 text", texts) { one in
                    let row = try embedder.embed(ids: try words.encode(try one.string("text")))
                    self.found["text " + one.stringOrNone("name")] = row.map { Double($0) }
                    try self.near(one, row)
                })
        }
        if complete, image != nil, words != nil { stages.append(try retrieval()) }
    }

    private func stage(_ name: String, _ cases: [Fields], _ check: (Fields) throws -> Void) -> Stage {
        var failures: [String] = []
        var notRun: [String] = []
        notes = []
        for one in cases {
            let label = ["name", "query", "text"].map { one.stringOrNone($0) }.first { !$0.isEmpty } ?? "a case"
            do {
                try check(one)
            } catch let error as UnsupportedFormat {
                notRun.append("\(label) (no decoder for \(error.format) here)")
            } catch let error as Failure {
                failures.append("\(label): \(error.message)")
            } catch {
                failures.append("\(label): \(error.localizedDescription)")
            }
        }
        if cases.isEmpty { failures.append("there is no case for this stage, so nothing was shown") }
        return Stage(name: name, cases: cases.count, failures: failures, notRun: notRun, notes: notes)
    }

    // MARK: S0

    private func decode(_ one: Fields, _ image: ImageSpec) throws {
        let own = try decoder.decode(try bytes(try one.string("bytes_file")), background: image.background)
        let stated = try one.fields("decoded")
        let height = try stated.int("height")
        let width = try stated.int("width")
        if own.height != height || own.width != width {
            throw Failure(message: "\(own.width) x \(own.height) pixels, recorded \(width) x \(height)")
        }
        if sha256(Data(own.rgb)) == (try stated.string("sha256")) { return }
        if try !one.bool("lossy") { throw Failure(message: "other pixels than recorded, and the format is lossless") }
        let other = try recordedDecoding(one).rgb
        var total = 0
        for i in 0..<other.count { total += abs(Int(own.rgb[i]) - Int(other[i])) }
        let mean = Double(total) / Double(other.count)
        notes.append("\(one.stringOrNone("name")): decoded otherwise, mean \(String(format: "%.2f", mean)) grey levels")
        if mean > 8 { throw Failure(message: "on average \(String(format: "%.1f", mean)) grey levels away") }
    }

    /// What the later stages start from: the own decoding, or the recorded one of a lossy picture decoded otherwise.
    private func source(_ one: Fields, _ image: ImageSpec) throws -> Pixels {
        let own = try decoder.decode(try bytes(try one.string("bytes_file")), background: image.background)
        if !complete { return own }
        if try !one.bool("lossy") { return own }
        let stated = try one.fields("decoded").string("sha256")
        return try sha256(Data(own.rgb)) == stated ? own : recordedDecoding(one)
    }

    private func samePixels(_ one: Fields, _ own: Pixels) throws {
        if sha256(Data(own.rgb)) == (try one.string("pixels_sha256")) { return }
        if !one.has("pixels_file") { throw Failure(message: "other pixels than recorded") }
        let other = try recordedPixels(one).rgb
        var worst = 0
        for i in 0..<other.count { worst = max(worst, abs(Int(own.rgb[i]) - Int(other[i]))) }
        throw Failure(message: "up to \(worst) of 255 away from the recorded pixels, and this arithmetic is exact")
    }

    private func recordedDecoding(_ one: Fields) throws -> Pixels {
        let stated = try one.fields("decoded")
        return try recorded(
            try stated.string("file"), try stated.string("sha256"), try stated.int("height"), try stated.int("width"))
    }

    private func recordedPixels(_ one: Fields) throws -> Pixels {
        let size = contract.image?.size ?? 0
        return try recorded(try one.string("pixels_file"), try one.string("pixels_sha256"), size, size)
    }

    private func recorded(_ name: String, _ digest: String, _ height: Int, _ width: Int) throws -> Pixels {
        let raw = try bytes(name)
        if sha256(raw) != digest {
            throw Failure(message: "\(name) is not what the vectors say, so nothing can be compared")
        }
        return try Pixels(height: height, width: width, rgb: [UInt8](raw))
    }

    private func mustRefuse(_ one: Fields, _ take: () throws -> Void) throws {
        do {
            try take()
        } catch is PocketVLMError {
            return
        }
        throw Failure(message: "it is taken and must be refused: \(one.stringOrNone("note"))")
    }

    private func bytes(_ name: String) throws -> Data {
        try Data(contentsOf: try bundle.file(name))
    }

    // MARK: S3 to S5

    private func near(_ one: Fields, _ row: [Float]) throws {
        if row.count != dim { throw Failure(message: "the model gives \(row.count) numbers and \(dim) are promised") }
        let own = row.map { Double($0) }
        let stated = Array(try one.doubles("embedding").prefix(dim))
        let away = contract.kind == "classifier" ? logitDistance(own, stated) : 1 - cosine(own, stated)
        // negated, so that NaN fails too
        if !(away <= tolerance) {
            throw Failure(message: String(format: "1 - cosine is %.3g, allowed %.3g", away, tolerance))
        }
    }

    private func logitDistance(_ a: [Double], _ b: [Double]) -> Double {
        var apart = 0.0
        var aa = 0.0
        var bb = 0.0
        for i in 0..<a.count {
            apart += (a[i] - b[i]) * (a[i] - b[i])
            aa += a[i] * a[i]
            bb += b[i] * b[i]
        }
        return apart / (2 * (aa * bb).squareRoot())
    }

    private func retrieval() throws -> Stage {
        guard let task = try vectors.fieldsOrNone("retrieval") else { return stage("S5 retrieval", []) { _ in } }
        let margins = try task.fields("margin")
        let margin = try margins.double(margins.has(precision) ? precision : "int8")
        let k = try task.int("k")
        let words = try task.objects("text_to_image")
        let pictures = try task.objects("image_to_text")
        var asked = 0
        return stage("S5 retrieval", words + pictures) { query in
            asked += 1
            let byWords = asked <= words.count
            try self.rank(query, byWords ? "text " : "image ", byWords ? "image " : "text ", k, margin)
        }
    }

    /// At every place of the found top k, what stands there may have scored at most `margin` less than what belongs.
    private func rank(_ query: Fields, _ from: String, _ to: String, _ k: Int, _ margin: Double) throws {
        let names = try query.strings("order")
        guard let asked = found[from + query.stringOrNone("query")] else { throw UnsupportedFormat("the query") }
        var scores: [Double] = []
        for name in names {
            guard let row = found[to + name] else { throw UnsupportedFormat(name) }
            scores.append(cosine(asked, row))
        }
        let full = dim == contract.embedDim
        let reference = try full ? query.doubles("scores") : prefixScores(query, from, to, names)
        let right = reference.sorted(by: >)
        let best = Array(names.indices.sorted { scores[$0] > scores[$1] }.prefix(k))
        var worst = 0.0
        for (place, index) in best.enumerated() { worst = max(worst, right[place] - reference[index]) }
        if !(worst <= margin) {
            throw Failure(message: String(format: "the top %d loses %.3g in score, allowed %.3g", k, worst, margin))
        }
    }

    private func prefixScores(_ query: Fields, _ from: String, _ to: String, _ names: [String]) throws -> [Double] {
        var rows: [String: [Double]] = [:]
        for (side, cases) in [("image ", images), ("text ", texts)] {
            for one in cases {
                rows[side + one.stringOrNone("name")] = Array(try one.doubles("embedding").prefix(dim))
            }
        }
        let asked = rows[from + query.stringOrNone("query")] ?? []
        return names.map { cosine(asked, rows[to + $0] ?? []) }
    }
}
