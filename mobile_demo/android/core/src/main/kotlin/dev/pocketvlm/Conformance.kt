package dev.pocketvlm

import java.util.Locale
import kotlin.math.abs
import kotlin.math.max
import kotlin.math.sqrt

/** Encoded bytes to an upright RGB picture over `background`; PocketvlmException for what is no whole picture. */
fun interface Decoder {
    fun decode(bytes: ByteArray, background: IntArray): Pixels
}

/** This platform has no decoder for the format: the case is not run, which is another thing than passed. */
class UnsupportedFormatException(format: String) : Exception("no decoder for $format here")

/** The graphs of one variant. */
interface Encoder {
    fun embedPixels(pixels: Pixels): FloatArray
    fun embedIds(ids: IntArray): FloatArray
}

/** One stage over all cases. A stage without cases has failed; one with cases not run is not passed either. */
class Stage(
    val name: String,
    val cases: Int,
    val failures: List<String>,
    val notRun: List<String>,
    val notes: List<String>,
) {
    val passed get() = failures.isEmpty() && notRun.isEmpty()
}

class Report(val stages: List<Stage>) {
    val firstFailing: Stage? get() = stages.firstOrNull { it.failures.isNotEmpty() }
    val notRun: List<String> get() = stages.flatMap { it.notRun }.distinct()

    /** "pass", "fails at STAGE: ..." or "incomplete: ...". */
    val verdict: String get() {
        val failing = firstFailing
        return when {
            failing != null -> "fails at ${failing.name}: ${failing.failures.first()}"
            notRun.isNotEmpty() -> "incomplete: passes what ran; not run: ${notRun.joinToString("; ")}"
            else -> "pass"
        }
    }
}

/** Runs the vectors of a bundle as docs/conformance.md says: every stage in order, one input at a time. */
class Conformance(
    private val bundle: Bundle,
    private val precision: String,
    private val decoder: Decoder,
    private val encoder: Encoder?,
) {
    private class Failure(message: String) : Exception(message)

    private val contract = bundle.contract
    private val vectors = bundle.vectors()
    private val complete = vectors.string("schema") != "1.0"
    private val images = vectors.objects("images")
    private val texts = vectors.objects("texts")
    private val tolerance = vectors.fields("tolerance").let { it.double(if (it.has(precision)) precision else "int8") }
    private val dim = bundle.variants.firstOrNull { it.precision == precision }?.dim ?: contract.embedDim
    private val found = HashMap<String, DoubleArray>()
    private var notes = ArrayList<String>()

    fun run(): Report {
        val stages = ArrayList<Stage>()
        val image = contract.image
        val words = contract.text?.let { bundle.tokenizer() }
        if (image != null) {
            if (complete) {
                val recorded = images.filter { it.fields("decoded").has("file") }
                stages += stage("S0 decode", images) { decode(it, image) }
                if (recorded.isNotEmpty()) {
                    stages += stage("S0 resize", recorded) { samePixels(it, resize(recordedDecoding(it), image)) }
                }
            }
            stages += stage("S0 pixels", images) { samePixels(it, resize(source(it, image), image)) }
            if (complete) {
                stages += stage("S0 refused", vectors.objects("refused_images")) { case ->
                    mustRefuse(case) { decoder.decode(bytes(case.string("bytes_file")), image.background) }
                }
            }
        }
        if (words != null) {
            stages += stage("S1 ids", texts) { case ->
                val ids = words.encode(case.string("text"))
                val stated = case.ints("ids")
                if (!ids.contentEquals(stated)) throw Failure("ids ${ids.toList()}, recorded ${stated.toList()}")
            }
            if (complete) {
                stages += stage("S1 refused", vectors.objects("refused_texts")) { case ->
                    mustRefuse(case) { words.encode(case.string("text")) }
                }
            }
        }
        if (encoder != null) graphs(stages, encoder, image, words)
        return Report(stages)
    }

    private fun graphs(stages: MutableList<Stage>, encoder: Encoder, image: ImageSpec?, words: Tokenizer?) {
        val kept = images.filter { it.has("pixels_file") }
        if (image != null) {
            stages += stage("S3 image graph", kept) { near(it, encoder.embedPixels(recordedPixels(it))) }
        }
        if (words != null) stages += stage("S3 text graph", texts) { near(it, encoder.embedIds(it.ints("ids"))) }
        if (image != null) {
            stages += stage("S4 image", images) { case ->
                val row = encoder.embedPixels(resize(source(case, image), image))
                found["image " + case.string("name")] = row.toDoubles()
                near(case, row)
            }
        }
        if (words != null) {
            stages += stage("S4 text", texts) { case ->
                val row = encoder.embedIds(words.encode(case.string("text")))
                if (complete) found["text " + case.string("name")] = row.toDoubles()
                near(case, row)
            }
        }
        if (complete && image != null && words != null) stages += retrieval()
    }

    private fun stage(name: String, cases: List<Fields>, check: (Fields) -> Unit): Stage {
        val failures = ArrayList<String>()
        val notRun = ArrayList<String>()
        notes = ArrayList()
        for (case in cases) {
            val label = case.string(if (case.has("name")) "name" else if (case.has("text")) "text" else "query")
            try {
                check(case)
            } catch (error: UnsupportedFormatException) {
                notRun += "$label (${error.message})"
            } catch (error: Failure) {
                failures += "$label: ${error.message}"
            } catch (error: PocketvlmException) {
                failures += "$label: ${error.message}"
            }
        }
        if (cases.isEmpty()) failures += "there is no case for this stage, so nothing was shown"
        return Stage(name, cases.size, failures, notRun, notes)
    }

    // --- S0 -----------------------------------------------------------------------------------------------------

    private fun decode(case: Fields, image: ImageSpec) {
        val own = decoder.decode(bytes(case.string("bytes_file")), image.background)
        val stated = case.fields("decoded")
        val height = stated.int("height")
        val width = stated.int("width")
        if (own.height != height || own.width != width) {
            throw Failure("${own.width} x ${own.height} pixels, recorded $width x $height")
        }
        if (sha256(own.rgb) == stated.string("sha256")) return
        if (!case.bool("lossy")) throw Failure("other pixels than recorded, and the format is lossless")
        val other = recordedDecoding(case).rgb
        val total = own.rgb.indices.sumOf { abs(own.rgb.level(it) - other.level(it)).toLong() }
        val mean = total.toDouble() / own.rgb.size
        notes.add("${case.string("name")}: decoded otherwise, mean %.2f grey levels".format(Locale.ROOT, mean))
        if (mean > LOSSY_MEAN) throw Failure("on average %.1f grey levels away".format(Locale.ROOT, mean))
    }

    /** What the later stages start from: the own decoding, or the recorded one of a lossy picture decoded otherwise. */
    private fun source(case: Fields, image: ImageSpec): Pixels {
        val own = decoder.decode(bytes(case.string("bytes_file")), image.background)
        if (!complete || !case.bool("lossy")) return own
        return if (sha256(own.rgb) == case.fields("decoded").string("sha256")) own else recordedDecoding(case)
    }

    private fun samePixels(case: Fields, own: Pixels) {
        if (sha256(own.rgb) == case.string("pixels_sha256")) return
        if (!case.has("pixels_file")) throw Failure("other pixels than recorded")
        val other = recordedPixels(case).rgb
        var worst = 0
        for (i in other.indices) worst = max(worst, abs(own.rgb.level(i) - other.level(i)))
        throw Failure("up to $worst of 255 away from the recorded pixels, and this arithmetic is exact")
    }

    private fun recordedDecoding(case: Fields): Pixels {
        val stated = case.fields("decoded")
        return recorded(stated.string("file"), stated.string("sha256"), stated.int("height"), stated.int("width"))
    }

    private fun recordedPixels(case: Fields): Pixels {
        val size = contract.image!!.size
        return recorded(case.string("pixels_file"), case.string("pixels_sha256"), size, size)
    }

    private fun recorded(name: String, digest: String, height: Int, width: Int): Pixels {
        val raw = bytes(name)
        if (sha256(raw) != digest) throw Failure("$name is not what the vectors say, so nothing can be compared")
        return Pixels(height, width, raw)
    }

    private fun mustRefuse(case: Fields, take: () -> Unit) {
        try {
            take()
        } catch (refused: PocketvlmException) {
            return
        }
        throw Failure("it is taken and must be refused: ${case.string("note")}")
    }

    private fun bytes(name: String): ByteArray = bundle.file(name).readBytes()

    private fun ByteArray.level(index: Int): Int = this[index].toInt() and 0xff

    // --- S3 to S5 -----------------------------------------------------------------------------------------------

    private fun near(case: Fields, row: FloatArray) {
        val stated = case.doubles("embedding").copyOf(dim)
        if (row.size != dim) throw Failure("the model gives ${row.size} numbers and $dim are promised")
        val own = row.toDoubles()
        val away = if (contract.kind == "classifier") logitDistance(own, stated) else 1 - cosine(own, stated)
        // negated, so that NaN fails too
        if (!(away <= tolerance)) throw Failure("1 - cosine is %.3g, allowed %.3g".format(Locale.ROOT, away, tolerance))
    }

    private fun logitDistance(a: DoubleArray, b: DoubleArray): Double {
        val apart = a.indices.sumOf { (a[it] - b[it]) * (a[it] - b[it]) }
        return apart / (2 * sqrt(a.sumOf { it * it } * b.sumOf { it * it }))
    }

    private fun retrieval(): Stage {
        val task = vectors.fieldsOrNull("retrieval") ?: return stage("S5 retrieval", emptyList()) {}
        val margin = task.fields("margin").let { it.double(if (it.has(precision)) precision else "int8") }
        val words = task.objects("text_to_image").map { it to Pair("text ", "image ") }
        val pictures = task.objects("image_to_text").map { it to Pair("image ", "text ") }
        val towers = (words + pictures).associate { (query, sides) -> query to sides }
        return stage("S5 retrieval", towers.keys.toList()) { rank(it, towers.getValue(it), task.int("k"), margin) }
    }

    /** At every place of the found top k, what stands there may have scored at most `margin` less than what belongs. */
    private fun rank(query: Fields, sides: Pair<String, String>, k: Int, margin: Double) {
        val names = query.strings("order")
        val asked = found[sides.first + query.string("query")] ?: throw UnsupportedFormatException("the query")
        val scores = names.map { cosine(asked, found[sides.second + it] ?: throw UnsupportedFormatException(it)) }
        val reference = if (dim == contract.embedDim) query.doubles("scores") else prefixScores(query, sides, names)
        val right = reference.sortedDescending()
        val best = names.indices.sortedByDescending { scores[it] }.take(k)
        val worst = best.indices.maxOf { right[it] - reference[best[it]] }
        if (!(worst <= margin)) {
            throw Failure("the top $k loses %.3g in score, allowed %.3g".format(Locale.ROOT, worst, margin))
        }
    }

    private fun prefixScores(query: Fields, sides: Pair<String, String>, names: List<String>): DoubleArray {
        val rows = (images.map { "image " to it } + texts.map { "text " to it })
            .associate { (side, case) -> side + case.string("name") to case.doubles("embedding").copyOf(dim) }
        val asked = rows.getValue(sides.first + query.string("query"))
        return names.map { cosine(asked, rows.getValue(sides.second + it)) }.toDoubleArray()
    }

    private companion object {
        const val LOSSY_MEAN = 8.0
    }
}
