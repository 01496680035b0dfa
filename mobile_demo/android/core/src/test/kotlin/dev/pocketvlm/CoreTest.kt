package dev.pocketvlm

import java.io.File
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Assert.assertTrue
import org.junit.Test

/** In Android Studio: the vectors of the bundle that `pocketvlm mobile prepare android` put into the app. */
class CoreTest {
    @Test
    fun theBundleKeepsItsVectors() {
        val bundle = Bundle.open(File("../app/src/main/assets/bundle"))
        val report = Conformance(bundle, bundle.variants.first().precision, JvmDecoder(), null).run()
        assertNull(report.verdict, report.firstFailing)
        // the JVM has no decoder for WebP; nothing else may be left out
        assertTrue(report.verdict, report.notRun.all { "WebP" in it || "CMYK" in it })
    }

    /** The worked example of docs/preprocessing.md. */
    @Test
    fun fiveSamplesBecomeTwo() {
        val line = intArrayOf(0, 50, 100, 200, 250).flatMap { value -> List(3) { value.toByte() } }.toByteArray()
        for ((filter, expected) in listOf("bilinear" to listOf(52, 186), "bicubic" to listOf(43, 195))) {
            val spec = """{"size": 2, "resize": "squash", "filter": "$filter", "crop_fraction": 1,
                "background": [0, 0, 0], "decode": "v1"}"""
            val tall = ByteArray(5 * line.size) { line[it % line.size] }
            val out = resize(Pixels(5, 5, tall), ImageSpec(Fields.parse(spec, "spec")))
            assertEquals(expected, listOf(out.rgb[0], out.rgb[3]).map { it.toInt() and 0xff })
        }
    }

    @Test
    fun probabilitiesSumToOne() {
        val found = probabilities(floatArrayOf(1f, 0f), listOf(floatArrayOf(2f, 0f), floatArrayOf(0f, 3f)), 10.0)
        assertArrayEquals(doubleArrayOf(0.9999546, 0.0000454), found, 1e-7)
    }
}
