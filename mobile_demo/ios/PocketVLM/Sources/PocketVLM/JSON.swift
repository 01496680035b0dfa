import Foundation

/// What a user or a file did wrong; the message says what and what to do.
public struct PocketVLMError: LocalizedError {
    public let message: String

    public init(_ message: String) {
        self.message = message
    }

    public var errorDescription: String? { message }
}

/// JSON whose objects keep every key as it was written.
///
/// Swift's dictionaries take "é" in one and in two code points for the same key; a vocabulary must not.
public indirect enum JSON {
    case object([(key: String, value: JSON)])
    case array([JSON])
    case string(String)
    case number(Double)
    case bool(Bool)
    case null

    public static func parse(_ data: Data) throws -> JSON {
        var parser = Parser(bytes: [UInt8](data))
        let value = try parser.value(depth: 0)
        parser.skipSpace()
        if parser.at != parser.bytes.count { throw parser.damaged("text after the end") }
        return value
    }

    private struct Parser {
        let bytes: [UInt8]
        var at = 0

        init(bytes: [UInt8]) {
            self.bytes = bytes
        }

        mutating func value(depth: Int) throws -> JSON {
            if depth > 64 { throw damaged("nested too deeply") }
            skipSpace()
            switch try peek() {
            case UInt8(ascii: "{"): return try object(depth: depth)
            case UInt8(ascii: "["): return try array(depth: depth)
            case UInt8(ascii: "\""): return .string(try string())
            case UInt8(ascii: "t"): return try word("true", .bool(true))
            case UInt8(ascii: "f"): return try word("false", .bool(false))
            case UInt8(ascii: "n"): return try word("null", .null)
            default: return .number(try number())
            }
        }

        private mutating func object(depth: Int) throws -> JSON {
            var found: [(key: String, value: JSON)] = []
            at += 1
            skipSpace()
            if try peek() == UInt8(ascii: "}") {
                at += 1
                return .object(found)
            }
            while true {
                skipSpace()
                let key = try string()
                skipSpace()
                try expect(UInt8(ascii: ":"))
                found.append((key: key, value: try value(depth: depth + 1)))
                skipSpace()
                if try peek() == UInt8(ascii: "}") {
                    at += 1
                    return .object(found)
                }
                try expect(UInt8(ascii: ","))
            }
        }

        private mutating func array(depth: Int) throws -> JSON {
            var found: [JSON] = []
            at += 1
            skipSpace()
            if try peek() == UInt8(ascii: "]") {
                at += 1
                return .array(found)
            }
            while true {
                found.append(try value(depth: depth + 1))
                skipSpace()
                if try peek() == UInt8(ascii: "]") {
                    at += 1
                    return .array(found)
                }
                try expect(UInt8(ascii: ","))
            }
        }

        private mutating func string() throws -> String {
            try expect(UInt8(ascii: "\""))
            var units: [UInt16] = []
            var found = ""
            var start = at
            while true {
                let byte = try peek()
                if byte == UInt8(ascii: "\"") || byte == UInt8(ascii: "\\") {
                    // escapes are UTF-16, and two of them may be one character: joined before the next plain byte
                    if at > start {
                        found += String(decoding: units, as: UTF16.self)
                        units = []
                        found += String(decoding: bytes[start..<at], as: UTF8.self)
                    }
                    at += 1
                    if byte == UInt8(ascii: "\"") { return found + String(decoding: units, as: UTF16.self) }
                    units.append(try escape())
                    start = at
                } else {
                    at += 1
                }
            }
        }

        private mutating func escape() throws -> UInt16 {
            let byte = try peek()
            at += 1
            switch byte {
            case UInt8(ascii: "b"): return 8
            case UInt8(ascii: "f"): return 12
            case UInt8(ascii: "n"): return 10
            case UInt8(ascii: "r"): return 13
            case UInt8(ascii: "t"): return 9
            case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return UInt16(byte)
            case UInt8(ascii: "u"):
                if at + 4 > bytes.count { throw damaged("cut short") }
                let digits = String(decoding: bytes[at..<(at + 4)], as: UTF8.self)
                guard let unit = UInt16(digits, radix: 16) else { throw damaged("a bad escape") }
                at += 4
                return unit
            default: throw damaged("a bad escape")
            }
        }

        private mutating func number() throws -> Double {
            let start = at
            while at < bytes.count, Parser.numeric.contains(bytes[at]) { at += 1 }
            let digits = String(decoding: bytes[start..<at], as: UTF8.self)
            guard let value = Double(digits) else { throw damaged("no value") }
            return value
        }

        private mutating func word(_ word: String, _ value: JSON) throws -> JSON {
            let expected = Array(word.utf8)
            if at + expected.count > bytes.count || Array(bytes[at..<(at + expected.count)]) != expected {
                throw damaged("no value")
            }
            at += expected.count
            return value
        }

        mutating func skipSpace() {
            while at < bytes.count, Parser.space.contains(bytes[at]) { at += 1 }
        }

        private func peek() throws -> UInt8 {
            if at >= bytes.count { throw damaged("cut short") }
            return bytes[at]
        }

        private mutating func expect(_ byte: UInt8) throws {
            if try peek() != byte { throw damaged("another character expected") }
            at += 1
        }

        func damaged(_ what: String) -> PocketVLMError {
            PocketVLMError("the JSON is damaged at byte \(at): \(what)")
        }

        private static let numeric = Set("+-.0123456789eE".utf8)
        private static let space = Set(" \t\r\n".utf8)
    }
}

/// Fields of a JSON object by name; a field that is absent or of another type names itself in the error.
public struct Fields {
    public let pairs: [(key: String, value: JSON)]
    private let what: String

    public init(_ data: Data, what: String) throws {
        guard case .object(let pairs) = try JSON.parse(data) else { throw PocketVLMError("\(what) is no JSON object") }
        self.pairs = pairs
        self.what = what
    }

    private init(pairs: [(key: String, value: JSON)], what: String) {
        self.pairs = pairs
        self.what = what
    }

    public var keys: [String] { pairs.map { $0.key } }

    public func has(_ key: String) -> Bool { value(key) != nil }

    public func string(_ key: String) throws -> String {
        guard case .string(let found)? = value(key) else { throw missing(key) }
        return found
    }

    public func stringOrNone(_ key: String) -> String {
        (try? string(key)) ?? ""
    }

    public func double(_ key: String) throws -> Double {
        guard case .number(let found)? = value(key) else { throw missing(key) }
        return found
    }

    public func int(_ key: String) throws -> Int {
        guard let found = Int(exactly: try double(key)) else { throw missing(key) }
        return found
    }

    public func bool(_ key: String) throws -> Bool {
        guard case .bool(let found)? = value(key) else { throw missing(key) }
        return found
    }

    public func fields(_ key: String) throws -> Fields {
        guard case .object(let found)? = value(key) else { throw missing(key) }
        return Fields(pairs: found, what: "\(what).\(key)")
    }

    public func fieldsOrNone(_ key: String) throws -> Fields? {
        if !has(key) { return nil }
        return try fields(key)
    }

    public func objects(_ key: String) throws -> [Fields] {
        try list(key).map { item in
            guard case .object(let found) = item else { throw missing(key) }
            return Fields(pairs: found, what: "\(what).\(key)")
        }
    }

    public func objectsOrNone(_ key: String) -> [Fields] {
        (try? objects(key)) ?? []
    }

    public func strings(_ key: String) throws -> [String] {
        try list(key).map { item in
            guard case .string(let found) = item else { throw missing(key) }
            return found
        }
    }

    public func doubles(_ key: String) throws -> [Double] {
        try list(key).map { item in
            guard case .number(let found) = item else { throw missing(key) }
            return found
        }
    }

    public func ints(_ key: String) throws -> [Int] {
        try doubles(key).map { number in
            guard let found = Int(exactly: number) else { throw missing(key) }
            return found
        }
    }

    private func list(_ key: String) throws -> [JSON] {
        guard case .array(let found)? = value(key) else { throw missing(key) }
        return found
    }

    private func value(_ key: String) -> JSON? {
        guard let found = pairs.first(where: { $0.key == key })?.value else { return nil }
        if case .null = found { return nil }
        return found
    }

    private func missing(_ key: String) -> PocketVLMError {
        PocketVLMError("\(what) lacks or garbles '\(key)', so the bundle cannot be read; prepare it again")
    }
}
