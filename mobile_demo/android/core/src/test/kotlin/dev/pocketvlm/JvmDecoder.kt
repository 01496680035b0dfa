package dev.pocketvlm

import java.io.ByteArrayInputStream
import java.io.File
import javax.imageio.ImageIO
import javax.imageio.ImageReader

/**
 * A decoder for tests on a computer: PNG by this module, JPEG and GIF by the JVM. It has none for WebP and CMYK JPEG;
 * `decoded` may hold what another program made of them, named by the sha256 of their bytes: height and width as
 * big-endian integers, then RGB.
 */
class JvmDecoder(private val decoded: File? = null) : Decoder {
    override fun decode(bytes: ByteArray, background: IntArray): Pixels {
        if (Png.isPng(bytes)) return Png.decode(bytes, background)
        val elsewhere = decoded?.let { File(it, sha256(bytes)) }
        if (elsewhere != null && elsewhere.isFile) {
            val raw = elsewhere.readBytes()
            return Pixels(int32(raw, 0), int32(raw, 4), raw.copyOfRange(8, raw.size))
        }
        if (bytes.size > 12 && String(bytes, 8, 4, Charsets.ISO_8859_1) == "WEBP") {
            throw UnsupportedFormatException("WebP")
        }
        val input = ImageIO.createImageInputStream(ByteArrayInputStream(bytes))
        val reader = ImageIO.getImageReaders(input).asSequence().firstOrNull()
            ?: throw PocketvlmException("${bytes.size} bytes are no picture in a known format")
        reader.input = input
        var truncated = false
        reader.addIIOReadWarningListener { _, _ -> truncated = true }
        val pixels = try {
            read(reader, background)
        } catch (error: java.io.IOException) {
            if (error.message == "Unsupported Image Type") throw UnsupportedFormatException("CMYK ${reader.formatName}")
            throw PocketvlmException("the picture is damaged (${error.message})")
        }
        if (truncated) throw PocketvlmException("the picture is cut short")
        return pixels.upright(jpegExif(bytes)?.let { exifOrientation(it) } ?: 1)
    }

    private fun read(reader: ImageReader, background: IntArray): Pixels {
        val image = reader.read(0)
        val rgba = ByteArray(image.height * image.width * 4)
        for (y in 0 until image.height) {
            for (x in 0 until image.width) {
                val argb = image.getRGB(x, y)
                val at = (y * image.width + x) * 4
                for (c in 0 until 3) rgba[at + c] = (argb shr (16 - 8 * c)).toByte()
                rgba[at + 3] = (argb ushr 24).toByte()
            }
        }
        return Pixels.ofRgba(image.height, image.width, rgba, background)
    }

    /** The TIFF part of a JPEG's EXIF segment. */
    private fun jpegExif(bytes: ByteArray): ByteArray? {
        var at = 2
        while (at + 4 <= bytes.size && int16(bytes, at) in 0xffc0..0xfffe && int16(bytes, at) != 0xffda) {
            val length = int16(bytes, at + 2)
            if (int16(bytes, at) == 0xffe1 && length >= 16 && at + 2 + length <= bytes.size) {
                val data = bytes.copyOfRange(at + 4, at + 2 + length)
                if (String(data, 0, 4, Charsets.ISO_8859_1) == "Exif") return data.copyOfRange(6, data.size)
            }
            at += 2 + length
        }
        return null
    }
}
