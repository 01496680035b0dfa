import CryptoKit
import Foundation

/// The contract's image part; docs/preprocessing.md has the arithmetic behind each field.
public struct ImageSpec {
    public let size: Int
    public let resize: String
    public let filter: String
    public let cropFraction: Double
    public let background: [Int]

    public init(_ fields: Fields) throws {
        size = try fields.int("size")
        resize = try fields.string("resize")
        filter = try fields.string("filter")
        cropFraction = try fields.double("crop_fraction")
        background = try fields.ints("background")
        let decode = try fields.string("decode")
        if decode != "v1" || !["crop", "squash", "pad"].contains(resize) || !["bilinear", "bicubic"].contains(filter) {
            throw PocketVLMError(
                "the model wants decoding '\(decode)', resize '\(resize)', filter '\(filter)'; this app knows others "
                    + "and its pixels would be wrong: update the app")
        }
    }
}

/// The contract's text part.
public struct TextSpec {
    public let contextLength: Int
    public let padId: Int

    public init(_ fields: Fields) throws {
        contextLength = try fields.int("context_length")
        padId = try fields.int("pad_id")
    }
}

/// What a model expects and promises.
public struct Contract {
    public let kind: String
    public let name: String
    public let modelId: String
    public let spaceId: String
    public let embedDim: Int
    public let image: ImageSpec?
    public let text: TextSpec?
    public let logitScale: Double

    init(_ fields: Fields) throws {
        kind = try fields.string("kind")
        name = try fields.string("name")
        modelId = try fields.string("model_id")
        spaceId = try fields.string("space_id")
        embedDim = try fields.int("embed_dim")
        image = try fields.fieldsOrNone("image").map { try ImageSpec($0) }
        text = try fields.fieldsOrNone("text").map { try TextSpec($0) }
        logitScale = try fields.double("logit_scale")
    }
}

/// One target at one precision: tower ("image", "text") to file.
public struct Variant {
    public let target: String
    public let precision: String
    public let dim: Int?
    public let files: [String: String]

    init(_ fields: Fields) throws {
        target = try fields.string("target")
        precision = try fields.string("precision")
        dim = try fields.has("dim") ? fields.int("dim") : nil
        let named = try fields.fields("files")
        var files: [String: String] = [:]
        for tower in named.keys { files[tower] = try named.string(tower) }
        self.files = files
    }
}

/// A folder that `pocketvlm mobile prepare` wrote, read only after every file matched its sha256.
public final class ModelBundle {
    public let folder: URL
    public let raw: Fields
    public let contract: Contract
    public let variants: [Variant]
    private let listed: Set<String>

    public init(_ folder: URL) throws {
        let manifest = folder.appendingPathComponent("bundle.json")
        guard let data = try? Data(contentsOf: manifest) else {
            throw PocketVLMError("there is no bundle in \(folder.path); run: pocketvlm mobile prepare ios")
        }
        raw = try Fields(data, what: "bundle.json")
        try checkVersion(try raw.string("schema_version"), minor: 0, what: "bundle")
        contract = try Contract(try raw.fields("contract"))
        variants = try raw.objects("variants").map { try Variant($0) }
        self.folder = folder
        listed = Set(try raw.fields("files").keys)
        try verify()
    }

    /// A listed file, or a folder of listed files (an .mlpackage).
    public func file(_ name: String) throws -> URL {
        if !listed.contains(name), !listed.contains(where: { $0.hasPrefix(name + "/") }) {
            throw PocketVLMError("bundle.json does not list \(name); prepare it again")
        }
        return folder.appendingPathComponent(name)
    }

    public func tokenizer() throws -> Tokenizer {
        guard let spec = contract.text else {
            throw PocketVLMError("model \(contract.name) has no text tower to ask in words")
        }
        return try Tokenizer(try Data(contentsOf: try file(try raw.string("tokenizer"))), spec: spec)
    }

    public func vectors() throws -> Fields {
        let data = try Data(contentsOf: try file(try raw.string("conformance")))
        let vectors = try Fields(data, what: "vectors.json")
        try checkVersion(try vectors.string("schema"), minor: 1, what: "conformance vectors")
        return vectors
    }

    private func verify() throws {
        for (name, value) in try raw.fields("files").pairs {
            if name.hasPrefix("/") || name.split(separator: "/").contains("..") {
                throw PocketVLMError("bundle file \(name) lies outside the bundle")
            }
            guard case .object(let entry) = value,
                case .string(let stated)? = entry.first(where: { $0.key == "sha256" })?.value,
                let data = try? Data(contentsOf: folder.appendingPathComponent(name), options: .mappedIfSafe),
                sha256(data) == stated
            else {
                throw PocketVLMError(
                    "bundle file \(name) is missing or changed, so the model may say anything; prepare it again")
            }
        }
    }
}

/// A reader of 1.m reads every 1.k with k <= m.
private func checkVersion(_ found: String, minor: Int, what: String) throws {
    let parts = found.split(separator: ".", omittingEmptySubsequences: false).map { Int($0) ?? -1 }
    if parts.count != 2 || parts[0] != 1 || parts[1] < 0 || parts[1] > minor {
        throw PocketVLMError("the \(what) has schema \(found) and this app reads 1.0 to 1.\(minor); update the app")
    }
}

public func sha256(_ data: Data) -> String {
    SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
}
