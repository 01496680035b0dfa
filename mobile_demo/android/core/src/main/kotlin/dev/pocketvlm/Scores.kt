package dev.pocketvlm

import kotlin.math.exp
import kotlin.math.sqrt

/** `vector` at length one. */
fun normalize(vector: FloatArray): FloatArray {
    val length = sqrt(vector.sumOf { it.toDouble() * it })
    return FloatArray(vector.size) { (vector[it] / length).toFloat() }
}

fun cosine(a: DoubleArray, b: DoubleArray): Double {
    require(a.size == b.size) { "embeddings of ${a.size} and ${b.size} numbers lie in different spaces" }
    var dot = 0.0
    var aa = 0.0
    var bb = 0.0
    for (i in a.indices) {
        dot += a[i] * b[i]
        aa += a[i] * a[i]
        bb += b[i] * b[i]
    }
    return dot / sqrt(aa * bb)
}

fun cosine(a: FloatArray, b: FloatArray): Double = cosine(a.toDoubles(), b.toDoubles())

fun FloatArray.toDoubles(): DoubleArray = DoubleArray(size) { this[it].toDouble() }

/** A label's embedding: the normalised mean of its prompts' normalised embeddings. */
fun labelEmbedding(prompts: List<FloatArray>): FloatArray {
    val unit = prompts.map { normalize(it) }
    return normalize(FloatArray(unit[0].size) { i -> (unit.sumOf { it[i].toDouble() } / unit.size).toFloat() })
}

/** Zero-shot probabilities of one picture over labels; they sum to one. */
fun probabilities(image: FloatArray, labels: List<FloatArray>, logitScale: Double): DoubleArray {
    val logits = labels.map { logitScale * cosine(image, it) }
    val largest = logits.max()
    val powers = logits.map { exp(it - largest) }
    val total = powers.sum()
    return DoubleArray(powers.size) { powers[it] / total }
}

/** Indices of the best `k` of a gallery with their cosines, best first. */
fun search(query: FloatArray, gallery: List<FloatArray>, k: Int): List<Pair<Int, Double>> =
    gallery.indices.map { it to cosine(query, gallery[it]) }.sortedByDescending { it.second }.take(k)
