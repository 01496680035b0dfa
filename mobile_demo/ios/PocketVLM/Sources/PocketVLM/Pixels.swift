/// An upright or not yet upright picture: RGB interleaved, rows from top to bottom, one byte a value.
public struct Pixels: Sendable {
    public let height: Int
    public let width: Int
    public let rgb: [UInt8]

    public init(height: Int, width: Int, rgb: [UInt8]) throws {
        if height < 1 || width < 1 || rgb.count != height * width * 3 {
            throw PocketVLMError("\(rgb.count) bytes are no picture of \(width) x \(height) RGB pixels")
        }
        self.height = height
        self.width = width
        self.rgb = rgb
    }

    /// The picture turned upright by the EXIF tag Orientation (1 to 8; anything else changes nothing).
    public func upright(_ orientation: Int) throws -> Pixels {
        if orientation < 2 || orientation > 8 { return self }
        let turned = orientation >= 5
        let h = turned ? width : height
        let w = turned ? height : width
        let flipsRows = [3, 4, 7, 8].contains(orientation)
        let flipsColumns = [2, 3, 6, 7].contains(orientation)
        var out = [UInt8](repeating: 0, count: rgb.count)
        for y in 0..<h {
            for x in 0..<w {
                // undo the mirrors first, then the transposition
                let my = flipsRows ? h - 1 - y : y
                let mx = flipsColumns ? w - 1 - x : x
                let from = (turned ? mx * width + my : my * width + mx) * 3
                let to = (y * w + x) * 3
                out[to] = rgb[from]
                out[to + 1] = rgb[from + 1]
                out[to + 2] = rgb[from + 2]
            }
        }
        return try Pixels(height: h, width: w, rgb: out)
    }

    /// Straight (not premultiplied) 16-bit RGBA over a background, by the contract's two roundings.
    public static func over(height: Int, width: Int, rgba: [UInt16], background: [Int]) throws -> Pixels {
        var out = [UInt8](repeating: 0, count: height * width * 3)
        for i in 0..<(height * width) {
            let a = eight(rgba[i * 4 + 3])
            for c in 0..<3 {
                let value = eight(rgba[i * 4 + c])
                out[i * 3 + c] = UInt8((value * a + background[c] * (255 - a) + 127) / 255)
            }
        }
        return try Pixels(height: height, width: width, rgb: out)
    }

    /// 16 bits to 8 by rounding; v * 257, which 8 bits become on the way, comes back as v.
    public static func eight(_ value: UInt16) -> Int {
        (Int(value) * 255 + 32767) / 65535
    }
}

/// To the model's input, `size` x `size`: docs/preprocessing.md section 2, integers after the weights.
public func resize(_ pixels: Pixels, _ spec: ImageSpec) throws -> Pixels {
    let size = spec.size
    let short = min(pixels.height, pixels.width)
    let long = max(pixels.height, pixels.width)
    let wide = pixels.height <= pixels.width
    switch spec.resize {
    case "squash":
        return try resample(pixels, height: size, width: size, top: 0, left: 0, rows: size, columns: size, spec.filter)
    case "crop":
        let shortTo = Int((Double(size) / spec.cropFraction).rounded(.toNearestOrEven))
        let longTo = shortTo * long / short
        let height = wide ? shortTo : longTo
        let width = wide ? longTo : shortTo
        let top = Int((Double(height - size) / 2).rounded(.toNearestOrEven))
        let left = Int((Double(width - size) / 2).rounded(.toNearestOrEven))
        return try resample(
            pixels, height: height, width: width, top: top, left: left, rows: size, columns: size, spec.filter)
    default:
        let shortTo = max(1, Int((Double(short) / (Double(long) / Double(size))).rounded(.toNearestOrEven)))
        let height = wide ? shortTo : size
        let width = wide ? size : shortTo
        let scaled = try resample(
            pixels, height: height, width: width, top: 0, left: 0, rows: height, columns: width, spec.filter)
        return try place(scaled, spec)
    }
}

private func place(_ scaled: Pixels, _ spec: ImageSpec) throws -> Pixels {
    let size = spec.size
    let top = (size - scaled.height) / 2
    let left = (size - scaled.width) / 2
    var out = [UInt8](repeating: 0, count: size * size * 3)
    for i in 0..<out.count { out[i] = UInt8(spec.background[i % 3]) }
    for y in 0..<scaled.height {
        for i in 0..<(scaled.width * 3) {
            out[((top + y) * size + left) * 3 + i] = scaled.rgb[y * scaled.width * 3 + i]
        }
    }
    return try Pixels(height: size, width: size, rgb: out)
}

/// Horizontal pass, then vertical, of the window [top, left, rows, columns] of the picture scaled to height x width.
private func resample(
    _ pixels: Pixels, height: Int, width: Int, top: Int, left: Int, rows: Int, columns: Int, _ filter: String
) throws -> Pixels {
    let across = Axis(n: pixels.width, m: width, start: left, count: columns, filter: filter)
    let down = Axis(n: pixels.height, m: height, start: top, count: rows, filter: filter)
    var firstRow = Int.max
    var lastRow = 0
    for y in 0..<rows {
        firstRow = min(firstRow, down.first[y])
        lastRow = max(lastRow, down.first[y] + down.weights[y].count)
    }
    var between = [UInt8](repeating: 0, count: (lastRow - firstRow) * columns * 3)
    for y in firstRow..<lastRow {
        for x in 0..<columns {
            let start = (y * pixels.width + across.first[x]) * 3
            let at = ((y - firstRow) * columns + x) * 3
            weigh(pixels.rgb, start: start, step: 3, across.weights[x], &between, at: at)
        }
    }
    var out = [UInt8](repeating: 0, count: rows * columns * 3)
    for y in 0..<rows {
        for x in 0..<columns {
            let start = ((down.first[y] - firstRow) * columns + x) * 3
            weigh(between, start: start, step: columns * 3, down.weights[y], &out, at: (y * columns + x) * 3)
        }
    }
    return try Pixels(height: rows, width: columns, rgb: out)
}

/// One RGB output value: taps lie `step` bytes apart from `start`.
private func weigh(_ from: [UInt8], start: Int, step: Int, _ weights: [Int], _ to: inout [UInt8], at: Int) {
    for c in 0..<3 {
        var sum = 1 << 21
        var index = start + c
        for weight in weights {
            sum += weight * Int(from[index])
            index += step
        }
        to[at + c] = UInt8(min(max(sum >> 22, 0), 255))
    }
}

/// First tap and 22-bit weights of output positions start until start + count, where n samples become m.
private struct Axis {
    var first: [Int] = []
    var weights: [[Int]] = []

    init(n: Int, m: Int, start: Int, count: Int, filter: String) {
        let scale = Double(n) / Double(m)
        let stretch = max(scale, 1.0)
        let support = (filter == "bilinear" ? 1.0 : 2.0) * stretch
        let inverse = 1.0 / stretch
        for i in 0..<count {
            let center = (Double(start + i) + 0.5) * scale
            let low = max(Int(center - support + 0.5), 0)
            let high = min(Int(center + support + 0.5), n)
            var real: [Double] = []
            var total = 0.0
            for k in 0..<(high - low) {
                let weight = kernel(filter, (Double(k + low) - center + 0.5) * inverse)
                real.append(weight)
                total += weight
            }
            first.append(low)
            weights.append(
                real.map { value in
                    let weight = value / total
                    return Int(weight * 4_194_304 + (weight >= 0 ? 0.5 : -0.5))
                })
        }
    }
}

private func kernel(_ filter: String, _ position: Double) -> Double {
    let x = abs(position)
    if filter == "bilinear" { return x < 1 ? 1 - x : 0 }
    let a = -0.5
    if x < 1 { return ((a + 2) * x - (a + 3)) * x * x + 1 }
    if x < 2 { return (((x - 5) * x + 8) * x - 4) * a }
    return 0
}
