package dev.pocketvlm

import java.io.ByteArrayOutputStream
import java.util.zip.CRC32
import java.util.zip.DataFormatException
import java.util.zip.Inflater

/**
 * PNG to pixels by the contract's rules. Android's own decoder keeps the high byte of 16-bit samples and premultiplies
 * alpha on most paths; lossless pictures have to come out exactly.
 */
object Png {
    private val SIGNATURE = byteArrayOf(0x89.toByte(), 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a)

    fun isPng(bytes: ByteArray): Boolean = bytes.size > 8 && bytes.copyOf(8).contentEquals(SIGNATURE)

    fun decode(bytes: ByteArray, background: IntArray): Pixels {
        val chunks = chunks(bytes)
        val header = chunks["IHDR"] ?: damaged("no header")
        if (header.size != 13) damaged("its header")
        val width = int32(header, 0)
        val height = int32(header, 4)
        if (width < 1 || height < 1 || width.toLong() * height > MOST_PIXELS) damaged("a size of $width x $height")
        val depth = header[8].toInt()
        val color = header[9].toInt()
        val channels = mapOf(0 to 1, 2 to 3, 3 to 1, 4 to 2, 6 to 4)[color] ?: damaged("its colour type")
        if (depth !in DEPTHS.getValue(color)) damaged("its bit depth")
        val palette = chunks["PLTE"]
        if (color == 3 && palette == null) damaged("no palette")
        val data = chunks["IDAT"] ?: damaged("no pixels")
        val samples = samples(data, height, width, depth * channels, interlaced = header[12].toInt() == 1)
        val reader = Samples(samples, width * channels, depth)
        val key = chunks["tRNS"]
        if (key != null && color in setOf(0, 2) && key.size < 2 * channels) damaged("its transparent colour")
        val rgba = ByteArray(height * width * 4)
        val v = IntArray(channels)
        for (y in 0 until height) {
            for (x in 0 until width) {
                for (c in 0 until channels) v[c] = reader[y, x * channels + c]
                val at = (y * width + x) * 4
                if (color == 3) {
                    if (v[0] * 3 + 2 >= palette!!.size) damaged("a colour outside its palette")
                    palette.copyInto(rgba, at, v[0] * 3, v[0] * 3 + 3)
                    rgba[at + 3] = if (key != null && v[0] < key.size) key[v[0]] else -1
                    continue
                }
                for (c in 0 until 3) rgba[at + c] = eight(if (color and 2 == 2) v[c] else v[0], depth)
                rgba[at + 3] = when {
                    color >= 4 -> eight(v[channels - 1], depth)
                    key != null && (0 until channels).all { v[it] == int16(key, it * 2) } -> 0
                    else -> -1
                }
            }
        }
        return Pixels.ofRgba(height, width, rgba, background).upright(chunks["eXIf"]?.let { exifOrientation(it) } ?: 1)
    }

    private fun eight(value: Int, depth: Int): Byte {
        val most = (1 shl depth) - 1
        return (if (depth == 16) (value * 255L + 32767) / 65535 else value.toLong() * 255 / most).toInt().toByte()
    }

    /** Chunk data by type; several IDAT are one stream. Everything up to IEND has to be there. */
    private fun chunks(bytes: ByteArray): Map<String, ByteArray> {
        if (!isPng(bytes)) damaged("its signature")
        val found = HashMap<String, ByteArrayOutputStream>()
        var at = 8
        while (at + 12 <= bytes.size) {
            val length = int32(bytes, at)
            val type = String(bytes, at + 4, 4, Charsets.ISO_8859_1)
            if (length < 0 || length > bytes.size - at - 12) break
            val crc = CRC32().apply { update(bytes, at + 4, length + 4) }
            if (crc.value.toInt() != int32(bytes, at + 8 + length)) damaged("chunk $type was changed")
            if (type == "IEND") return found.mapValues { it.value.toByteArray() }
            if (type == "IDAT" || type !in found) {
                found.getOrPut(type) { ByteArrayOutputStream() }.write(bytes, at + 8, length)
            }
            at += 12 + length
        }
        damaged("it ends too early")
    }

    /** Unfiltered rows at the picture's own bit depth; an interlaced picture's seven passes are put in place. */
    private fun samples(data: ByteArray, height: Int, width: Int, bits: Int, interlaced: Boolean): Array<ByteArray> {
        val inflater = Inflater().apply { setInput(data) }
        val rows = Array(height) { ByteArray((width * bits + 7) / 8) }
        try {
            for (pass in if (interlaced) ADAM7 else WHOLE) {
                val (top, left, down, across) = pass
                val columns = (width - left + across - 1) / across
                if (columns < 1) continue
                var above = ByteArray((columns * bits + 7) / 8)
                for (y in top until height step down) {
                    val row = ByteArray(1 + above.size)
                    fill(inflater, row)
                    above = unfilter(row, above, maxOf(1, bits / 8))
                    if (across == 1) above.copyInto(rows[y]) else spread(above, rows[y], bits, left, across, columns)
                }
            }
        } catch (error: DataFormatException) {
            damaged(error.message ?: "its pixels")
        } finally {
            inflater.end()
        }
        return rows
    }

    private fun fill(inflater: Inflater, row: ByteArray) {
        var at = 0
        while (at < row.size) {
            val count = inflater.inflate(row, at, row.size - at)
            if (count == 0) damaged("its pixels end too early")
            at += count
        }
    }

    private fun unfilter(row: ByteArray, above: ByteArray, step: Int): ByteArray {
        val out = ByteArray(above.size)
        for (i in out.indices) {
            val left = if (i >= step) out[i - step].toInt() and 0xff else 0
            val up = above[i].toInt() and 0xff
            val corner = if (i >= step) above[i - step].toInt() and 0xff else 0
            val guess = when (row[0].toInt()) {
                0 -> 0
                1 -> left
                2 -> up
                3 -> (left + up) / 2
                4 -> paeth(left, up, corner)
                else -> damaged("a row filter")
            }
            out[i] = (row[i + 1] + guess).toByte()
        }
        return out
    }

    private fun paeth(left: Int, up: Int, corner: Int): Int {
        val guess = left + up - corner
        val toLeft = Math.abs(guess - left)
        val toUp = Math.abs(guess - up)
        val toCorner = Math.abs(guess - corner)
        return if (toLeft <= toUp && toLeft <= toCorner) left else if (toUp <= toCorner) up else corner
    }

    private fun spread(from: ByteArray, to: ByteArray, bits: Int, left: Int, across: Int, columns: Int) {
        for (x in 0 until columns) {
            val target = left + x * across
            if (bits >= 8) {
                from.copyInto(to, target * bits / 8, x * bits / 8, (x + 1) * bits / 8)
            } else {
                val value = (from[x * bits / 8].toInt() shr (8 - bits - x * bits % 8)) and ((1 shl bits) - 1)
                val at = target * bits / 8
                to[at] = (to[at].toInt() or (value shl (8 - bits - target * bits % 8))).toByte()
            }
        }
    }

    private class Samples(private val rows: Array<ByteArray>, private val perRow: Int, private val depth: Int) {
        operator fun get(y: Int, i: Int): Int {
            check(i < perRow)
            val row = rows[y]
            return when (depth) {
                16 -> int16(row, i * 2)
                8 -> row[i].toInt() and 0xff
                else -> (row[i * depth / 8].toInt() shr (8 - depth - i * depth % 8)) and ((1 shl depth) - 1)
            }
        }
    }

    private fun damaged(what: String): Nothing =
        throw PocketvlmException("the PNG is damaged or cut ($what), so part of it would be made up; take another")

    private const val MOST_PIXELS = 50_000_000L
    private val DEPTHS = mapOf(0 to setOf(1, 2, 4, 8, 16), 2 to setOf(8, 16), 3 to setOf(1, 2, 4, 8), 4 to setOf(8, 16),
        6 to setOf(8, 16))
    private val WHOLE = listOf(listOf(0, 0, 1, 1))
    private val ADAM7 = listOf(
        listOf(0, 0, 8, 8), listOf(0, 4, 8, 8), listOf(4, 0, 8, 4), listOf(0, 2, 4, 4), listOf(2, 0, 4, 2),
        listOf(0, 1, 2, 2), listOf(1, 0, 2, 1),
    )
}

/** The tag Orientation in the first directory of EXIF data that starts with its TIFF header; 1 where it is damaged. */
fun exifOrientation(tiff: ByteArray): Int {
    if (tiff.size < 8) return 1
    val little = tiff[0] == 'I'.code.toByte()
    fun short(at: Int): Int {
        if (at < 0 || at + 2 > tiff.size) return 0
        return if (little) int16(byteArrayOf(tiff[at + 1], tiff[at]), 0) else int16(tiff, at)
    }
    fun long(at: Int): Int = if (little) short(at + 2) shl 16 or short(at) else short(at) shl 16 or short(at + 2)
    val directory = long(4)
    if (directory < 8 || directory > tiff.size) return 1
    for (i in 0 until short(directory)) {
        val entry = directory + 2 + i * 12
        if (short(entry) == 274) return short(entry + 8).let { if (it in 1..8) it else 1 }
    }
    return 1
}

internal fun int16(bytes: ByteArray, at: Int): Int =
    ((bytes[at].toInt() and 0xff) shl 8) or (bytes[at + 1].toInt() and 0xff)

internal fun int32(bytes: ByteArray, at: Int): Int = (int16(bytes, at) shl 16) or int16(bytes, at + 2)
