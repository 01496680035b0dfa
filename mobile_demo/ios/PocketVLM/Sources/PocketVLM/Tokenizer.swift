import Foundation

/// Ranges of code points, as unicode_tables.py writes them.
struct CodePoints {
    private var lows: [UInt32] = []
    private var highs: [UInt32] = []

    init(_ ranges: String) {
        for span in ranges.split(whereSeparator: { $0 == " " || $0 == "\n" }) {
            let ends = span.split(separator: "-").compactMap { UInt32($0, radix: 16) }
            lows.append(ends[0])
            highs.append(ends[ends.count - 1])
        }
    }

    func contains(_ code: UInt32) -> Bool {
        var low = 0
        var high = lows.count
        while low < high {
            let middle = (low + high) / 2
            if lows[middle] <= code {
                low = middle + 1
            } else {
                high = middle
            }
        }
        return low > 0 && code <= highs[low - 1]
    }
}

/// Strings to ids by a WordPiece tokenizer.json with BERT's normaliser and splitting, which is what this kit's students
/// have. Another family (BPE of an upstream CLIP, Unigram) is refused by name instead of being guessed at.
///
/// Everything works on code points: Swift's Characters and Strings compare by canonical equivalence, ids do not.
public final class Tokenizer {
    private let spec: TextSpec
    private var vocabulary: [[UInt32]: Int] = [:]
    private let unknown: Int
    private let prefix: [UInt32]
    private let longestWord: Int
    private let added: [(codes: [UInt32], id: Int)]
    private var before: [Int] = []
    private var after: [Int] = []
    private let cleanText: Bool
    private let chinese: Bool
    private let stripAccents: Bool
    private let lowercase: Bool

    public init(_ json: Data, spec: TextSpec) throws {
        self.spec = spec
        let file = try Fields(json, what: "tokenizer.json")
        let kinds = [
            ("model", "WordPiece"), ("normalizer", "BertNormalizer"), ("pre_tokenizer", "BertPreTokenizer"),
            ("post_processor", "TemplateProcessing"),
        ]
        for (part, kind) in kinds {
            let found = try file.fieldsOrNone(part)?.string("type") ?? "absent"
            if found != kind {
                throw PocketVLMError(
                    "the tokenizer's \(part) is \(found) and this app knows \(kind); use a tokenizer library")
            }
        }
        let model = try file.fields("model")
        var pieces: [[UInt32]: Int] = [:]
        for (piece, value) in try model.fields("vocab").pairs {
            guard case .number(let id) = value else { throw PocketVLMError("the vocabulary has a piece without an id") }
            pieces[codePoints(piece)] = Int(id)
        }
        vocabulary = pieces
        guard let unknownId = pieces[codePoints(try model.string("unk_token"))] else {
            throw PocketVLMError("the tokenizer has no unknown token")
        }
        unknown = unknownId
        prefix = codePoints(try model.string("continuing_subword_prefix"))
        longestWord = try model.int("max_input_chars_per_word")
        var tokens: [(codes: [UInt32], id: Int)] = []
        for token in try file.objects("added_tokens") {
            let content = try token.string("content")
            for rule in ["lstrip", "rstrip", "single_word", "normalized"] {
                if try token.bool(rule) {
                    throw PocketVLMError("the added token \(content) has rules that this app does not know")
                }
            }
            tokens.append((codes: codePoints(content), id: try token.int("id")))
        }
        // the longest first, so that one token is not cut out of another
        added = tokens.sorted { $0.codes.count > $1.codes.count }
        let normalizer = try file.fields("normalizer")
        cleanText = try normalizer.bool("clean_text")
        chinese = try normalizer.bool("handle_chinese_chars")
        lowercase = try normalizer.bool("lowercase")
        stripAccents = try normalizer.has("strip_accents") ? normalizer.bool("strip_accents") : lowercase
        let template = try file.fields("post_processor")
        let special = try template.fields("special_tokens")
        var seenText = false
        for part in try template.objects("single") {
            if let name = try part.fieldsOrNone("SpecialToken")?.string("id") {
                let ids = try special.fields(name).ints("ids")
                if seenText { after += ids } else { before += ids }
            } else {
                seenText = true
            }
        }
    }

    /// Exactly `context_length` ids: cut on the right so that the closing token stays, padded on the right.
    public func encode(_ text: String) throws -> [Int32] {
        let codes = codePoints(text)
        // Python counts the separators too
        if codes.allSatisfy({ isSpace($0) || (0x1c...0x1f).contains($0) }) {
            throw PocketVLMError("the text is empty; write a word or two")
        }
        let room = spec.contextLength - before.count - after.count
        var ids = before + ordinary(codes, room: room) + after
        while ids.count < spec.contextLength { ids.append(spec.padId) }
        return ids.map { Int32($0) }
    }

    private func ordinary(_ codes: [UInt32], room: Int) -> [Int] {
        var ids: [Int] = []
        var start = 0
        var at = 0
        while at < codes.count && ids.count < room {
            guard let token = added.first(where: { begins(codes, at: at, with: $0.codes) }) else {
                at += 1
                continue
            }
            for word in words(Array(codes[start..<at])) { split(word, into: &ids) }
            ids.append(token.id)
            at += token.codes.count
            start = at
        }
        if start < codes.count {
            for word in words(Array(codes[start...])) where ids.count < room { split(word, into: &ids) }
        }
        return Array(ids.prefix(room))
    }

    private func begins(_ codes: [UInt32], at: Int, with token: [UInt32]) -> Bool {
        if token.isEmpty || at + token.count > codes.count { return false }
        for i in 0..<token.count where codes[at + i] != token[i] { return false }
        return true
    }

    /// Normalised and split at white space and punctuation.
    private func words(_ codes: [UInt32]) -> [[UInt32]] {
        var found: [[UInt32]] = []
        var word: [UInt32] = []
        for code in normalized(codes) {
            let splits = isSpace(code)
            let stands = punctuationTable.contains(code)
            if splits || stands {
                if !word.isEmpty { found.append(word) }
                word = []
                if stands { found.append([code]) }
            } else {
                word.append(code)
            }
        }
        if !word.isEmpty { found.append(word) }
        return found
    }

    private func normalized(_ text: [UInt32]) -> [UInt32] {
        let space: UInt32 = 0x20
        var codes = text
        if cleanText {
            codes = codes.filter { !controlTable.contains($0) }.map { isSpace($0) ? space : $0 }
        }
        if chinese {
            codes = codes.flatMap { ideographTable.contains($0) ? [space, $0, space] : [$0] }
        }
        if stripAccents {
            if codes.contains(where: { $0 >= 0x80 }) {
                codes = codePoints(string(codes).decomposedStringWithCanonicalMapping)
            }
            codes = codes.filter { !markTable.contains($0) }
        }
        return lowercase ? codes.flatMap { lower($0) } : codes
    }

    /// One code point at a time: a whole string's lower case would know of final sigmas.
    private func lower(_ code: UInt32) -> [UInt32] {
        guard let scalar = Unicode.Scalar(code) else { return [code] }
        return codePoints(scalar.properties.lowercaseMapping)
    }

    /// The longest known pieces from the left, or one unknown token where any part is unknown.
    private func split(_ word: [UInt32], into ids: inout [Int]) {
        if word.count > longestWord {
            ids.append(unknown)
            return
        }
        var found: [Int] = []
        var start = 0
        while start < word.count {
            var end = word.count
            var id: Int?
            while end > start {
                let piece = Array(word[start..<end])
                id = vocabulary[start == 0 ? piece : prefix + piece]
                if id != nil { break }
                end -= 1
            }
            guard let known = id else {
                ids.append(unknown)
                return
            }
            found.append(known)
            start = end
        }
        ids += found
    }

    private func isSpace(_ code: UInt32) -> Bool {
        switch code {
        case 0x09...0x0d, 0x20, 0x85, 0xa0, 0x1680, 0x2000...0x200a, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000: return true
        default: return false
        }
    }
}

private func codePoints(_ text: String) -> [UInt32] {
    text.unicodeScalars.map { $0.value }
}

private func string(_ codes: [UInt32]) -> String {
    var scalars = String.UnicodeScalarView()
    for code in codes {
        if let scalar = Unicode.Scalar(code) { scalars.append(scalar) }
    }
    return String(scalars)
}
