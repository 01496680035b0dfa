import Accelerate
import CoreGraphics
import Foundation
import ImageIO
import PocketVLM

/// Pictures by ImageIO, with the contract's arithmetic for depth, CMYK, alpha and orientation.
///
/// No colour is managed: a picture is read in its own colour space, whose channel values are what is stored.
public struct AppleDecoder: PictureDecoder {
    public init() {}

    public func decode(_ bytes: Data, background: [Int]) throws -> Pixels {
        guard let source = CGImageSourceCreateWithData(bytes as CFData, nil), CGImageSourceGetCount(source) > 0 else {
            throw PocketVLMError("this is no picture in a format that this phone knows; take another")
        }
        let properties = CGImageSourceCopyPropertiesAtIndex(source, 0, nil) as? [CFString: Any] ?? [:]
        let width = properties[kCGImagePropertyPixelWidth] as? Int ?? 0
        let height = properties[kCGImagePropertyPixelHeight] as? Int ?? 0
        if width > 0 && height > 50_000_000 / width {
            throw PocketVLMError("the picture has more than 50 million pixels; scale it down")
        }
        guard let image = CGImageSourceCreateImageAtIndex(source, 0, nil),
            CGImageSourceGetStatusAtIndex(source, 0) == .statusComplete
        else {
            throw PocketVLMError("the picture is damaged or cut short, and part of it would be made up; take another")
        }
        let rgba = try straight(image)
        let orientation = properties[kCGImagePropertyOrientation] as? Int ?? 1
        let flat = try Pixels.over(height: image.height, width: image.width, rgba: rgba, background: background)
        return try flat.upright(orientation)
    }

    /// 16-bit RGBA with straight alpha; 8 bits become v * 257.
    private func straight(_ image: CGImage) throws -> [UInt16] {
        let space = image.colorSpace?.baseColorSpace ?? image.colorSpace ?? CGColorSpaceCreateDeviceRGB()
        let count = image.width * image.height
        switch space.model {
        case .monochrome:
            let opaque = [CGImageAlphaInfo.none, .noneSkipFirst, .noneSkipLast].contains(image.alphaInfo)
            let channels = opaque ? 1 : 2
            let gray = try samples(image, space, channels: channels, alpha: opaque ? .none : .last)
            var out = [UInt16](repeating: 65535, count: count * 4)
            for i in 0..<count {
                for c in 0..<3 { out[i * 4 + c] = gray[i * channels] }
                if !opaque { out[i * 4 + 3] = gray[i * 2 + 1] }
            }
            return out
        case .cmyk:
            let ink = try samples(image, space, channels: 4, alpha: .none)
            var out = [UInt16](repeating: 65535, count: count * 4)
            for i in 0..<count {
                let light = 255 - Pixels.eight(ink[i * 4 + 3])
                for c in 0..<3 {
                    let t = Pixels.eight(ink[i * 4 + c]) * light + 128
                    out[i * 4 + c] = UInt16(max(0, light - (((t >> 8) + t) >> 8)) * 257)
                }
            }
            return out
        case .rgb:
            return try samples(image, space, channels: 4, alpha: .last)
        default:
            throw UnsupportedFormat("this colour model")
        }
    }

    private func samples(
        _ image: CGImage, _ space: CGColorSpace, channels: Int, alpha: CGImageAlphaInfo
    ) throws -> [UInt16] {
        let info = CGBitmapInfo(rawValue: alpha.rawValue | CGBitmapInfo.byteOrder16Little.rawValue)
        guard
            let format = vImage_CGImageFormat(
                bitsPerComponent: 16, bitsPerPixel: 16 * channels, colorSpace: space, bitmapInfo: info),
            var buffer = try? vImage_Buffer(cgImage: image, format: format)
        else {
            throw UnsupportedFormat("this layout of pixels")
        }
        defer { buffer.free() }
        let perRow = image.width * channels
        var out: [UInt16] = []
        out.reserveCapacity(perRow * image.height)
        for y in 0..<image.height {
            let row = buffer.data.advanced(by: y * buffer.rowBytes).assumingMemoryBound(to: UInt16.self)
            out.append(contentsOf: UnsafeBufferPointer(start: row, count: perRow))
        }
        return out
    }
}
