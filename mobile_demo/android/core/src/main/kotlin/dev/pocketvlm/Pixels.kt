package dev.pocketvlm

import kotlin.math.abs
import kotlin.math.max
import kotlin.math.min
import kotlin.math.round

/** An upright or not yet upright picture: RGB interleaved, rows from top to bottom, one byte a value. */
class Pixels(val height: Int, val width: Int, val rgb: ByteArray) {
    init {
        if (height < 1 || width < 1 || rgb.size != height * width * 3) {
            throw PocketvlmException("${rgb.size} bytes are no picture of $width x $height RGB pixels")
        }
    }

    /** The picture turned upright by the EXIF tag Orientation (1 to 8; anything else changes nothing). */
    fun upright(orientation: Int): Pixels {
        if (orientation !in 2..8) return this
        val turned = orientation >= 5
        val h = if (turned) width else height
        val w = if (turned) height else width
        val out = ByteArray(rgb.size)
        for (y in 0 until h) {
            for (x in 0 until w) {
                // undo the mirrors first, then the transposition
                val my = if (orientation in setOf(3, 4, 7, 8)) h - 1 - y else y
                val mx = if (orientation in setOf(2, 3, 6, 7)) w - 1 - x else x
                val from = if (turned) mx * width + my else my * width + mx
                rgb.copyInto(out, (y * w + x) * 3, from * 3, from * 3 + 3)
            }
        }
        return Pixels(h, w, out)
    }

    companion object {
        /** Straight (not premultiplied) RGBA bytes laid over a background. */
        fun ofRgba(height: Int, width: Int, rgba: ByteArray, background: IntArray): Pixels {
            val out = ByteArray(height * width * 3)
            for (i in 0 until height * width) {
                val a = rgba[i * 4 + 3].toInt() and 0xff
                for (c in 0 until 3) {
                    val value = rgba[i * 4 + c].toInt() and 0xff
                    out[i * 3 + c] = ((value * a + background[c] * (255 - a) + 127) / 255).toByte()
                }
            }
            return Pixels(height, width, out)
        }
    }
}

/** To the model's input, `size` x `size`: docs/preprocessing.md section 2, integers after the weights. */
fun resize(pixels: Pixels, spec: ImageSpec): Pixels {
    val size = spec.size
    val short = min(pixels.height, pixels.width)
    val long = max(pixels.height, pixels.width)
    val wide = pixels.height <= pixels.width
    return when (spec.resize) {
        "squash" -> resample(pixels, size, size, 0, 0, size, size, spec.filter)
        "crop" -> {
            val shortTo = round(size / spec.cropFraction).toInt()
            val longTo = (shortTo.toLong() * long / short).toInt()
            val height = if (wide) shortTo else longTo
            val width = if (wide) longTo else shortTo
            val top = round((height - size) / 2.0).toInt()
            val left = round((width - size) / 2.0).toInt()
            resample(pixels, height, width, top, left, size, size, spec.filter)
        }
        else -> {
            val shortTo = max(1, round(short / (long / size.toDouble())).toInt())
            val height = if (wide) shortTo else size
            val width = if (wide) size else shortTo
            val scaled = resample(pixels, height, width, 0, 0, height, width, spec.filter)
            place(scaled, spec)
        }
    }
}

private fun place(scaled: Pixels, spec: ImageSpec): Pixels {
    val size = spec.size
    val out = ByteArray(size * size * 3) { spec.background[it % 3].toByte() }
    val top = (size - scaled.height) / 2
    val left = (size - scaled.width) / 2
    for (y in 0 until scaled.height) {
        val row = y * scaled.width * 3
        scaled.rgb.copyInto(out, ((top + y) * size + left) * 3, row, row + scaled.width * 3)
    }
    return Pixels(size, size, out)
}

/** Horizontal pass, then vertical, of the window [top, left, rows, columns] of the picture scaled to height x width. */
private fun resample(
    pixels: Pixels, height: Int, width: Int, top: Int, left: Int, rows: Int, columns: Int, filter: String,
): Pixels {
    val across = Axis(pixels.width, width, left, columns, filter)
    val down = Axis(pixels.height, height, top, rows, filter)
    val firstRow = down.first.min()
    val lastRow = (0 until rows).maxOf { down.first[it] + down.weights[it].size }
    val between = ByteArray((lastRow - firstRow) * columns * 3)
    for (y in firstRow until lastRow) {
        for (x in 0 until columns) {
            val start = (y * pixels.width + across.first[x]) * 3
            weigh(pixels.rgb, start, 3, across.weights[x], between, ((y - firstRow) * columns + x) * 3)
        }
    }
    val out = ByteArray(rows * columns * 3)
    for (y in 0 until rows) {
        for (x in 0 until columns) {
            val start = ((down.first[y] - firstRow) * columns + x) * 3
            weigh(between, start, columns * 3, down.weights[y], out, (y * columns + x) * 3)
        }
    }
    return Pixels(rows, columns, out)
}

/** One RGB output value: taps lie `step` bytes apart from `start`. */
private fun weigh(from: ByteArray, start: Int, step: Int, weights: IntArray, to: ByteArray, at: Int) {
    for (c in 0 until 3) {
        var sum = 1 shl 21
        var index = start + c
        for (weight in weights) {
            sum += weight * (from[index].toInt() and 0xff)
            index += step
        }
        to[at + c] = (sum shr 22).coerceIn(0, 255).toByte()
    }
}

/** First tap and 22-bit weights of output positions start until start + count, where n samples become m. */
private class Axis(n: Int, m: Int, start: Int, count: Int, filter: String) {
    val first = IntArray(count)
    val weights = Array(count) { IntArray(0) }

    init {
        val scale = n.toDouble() / m
        val stretch = max(scale, 1.0)
        val support = (if (filter == "bilinear") 1.0 else 2.0) * stretch
        val inverse = 1.0 / stretch
        for (i in 0 until count) {
            val center = (start + i + 0.5) * scale
            val low = max((center - support + 0.5).toInt(), 0)
            val high = min((center + support + 0.5).toInt(), n)
            val real = DoubleArray(high - low)
            var total = 0.0
            for (k in real.indices) {
                real[k] = kernel(filter, (k + low - center + 0.5) * inverse)
                total += real[k]
            }
            first[i] = low
            weights[i] = IntArray(real.size) { k ->
                val weight = real[k] / total
                (weight * 4194304 + (if (weight >= 0) 0.5 else -0.5)).toInt()
            }
        }
    }
}

private fun kernel(filter: String, position: Double): Double {
    val x = abs(position)
    if (filter == "bilinear") return if (x < 1) 1 - x else 0.0
    val a = -0.5
    return when {
        x < 1 -> ((a + 2) * x - (a + 3)) * x * x + 1
        x < 2 -> (((x - 5) * x + 8) * x - 4) * a
        else -> 0.0
    }
}
