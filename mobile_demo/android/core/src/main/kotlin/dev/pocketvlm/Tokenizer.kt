package dev.pocketvlm

import java.text.Normalizer

/** Ranges of code points, as unicode_tables.py writes them. */
internal class CodePoints(ranges: String) {
    private val lows: IntArray
    private val highs: IntArray

    init {
        val spans = ranges.split(' ', '\n').filter { it.isNotEmpty() }.map { it.split('-') }
        lows = IntArray(spans.size) { spans[it].first().toInt(16) }
        highs = IntArray(spans.size) { spans[it].last().toInt(16) }
    }

    operator fun contains(code: Int): Boolean {
        val found = lows.binarySearch(code)
        val span = if (found >= 0) found else -found - 2
        return span >= 0 && code <= highs[span]
    }
}

/**
 * Strings to ids by a WordPiece tokenizer.json with BERT's normaliser and splitting, which is what this kit's students
 * have. Another family (BPE of an upstream CLIP, Unigram) is refused by name instead of being guessed at.
 */
class Tokenizer(json: String, private val spec: TextSpec) {
    private val vocabulary: Map<String, Int>
    private val unknown: Int
    private val prefix: String
    private val longestWord: Int
    private val added: List<Pair<String, Int>>
    private val before: IntArray
    private val after: IntArray
    private val cleanText: Boolean
    private val chinese: Boolean
    private val stripAccents: Boolean
    private val lowercase: Boolean

    init {
        val file = Fields.parse(json, "tokenizer.json")
        val model = file.fields("model")
        for ((part, kind) in KINDS) {
            val found = file.fieldsOrNull(part)?.string("type")
            if (found != kind) {
                throw PocketvlmException(
                    "the tokenizer's $part is $found and this app knows $kind; use a tokenizer library",
                )
            }
        }
        val pieces = model.fields("vocab")
        vocabulary = pieces.keys().associateWith { pieces.int(it) }
        unknown = vocabulary[model.string("unk_token")]
            ?: throw PocketvlmException("the tokenizer has no unknown token")
        prefix = model.string("continuing_subword_prefix")
        longestWord = model.int("max_input_chars_per_word")
        // the longest first, so that one token is not cut out of another
        added = file.objects("added_tokens").map { token ->
            val content = token.string("content")
            if (listOf("lstrip", "rstrip", "single_word", "normalized").any { token.bool(it) }) {
                throw PocketvlmException("the added token $content has rules that this app does not know")
            }
            content to token.int("id")
        }.sortedByDescending { it.first.length }
        val normalizer = file.fields("normalizer")
        cleanText = normalizer.bool("clean_text")
        chinese = normalizer.bool("handle_chinese_chars")
        lowercase = normalizer.bool("lowercase")
        stripAccents = if (normalizer.has("strip_accents")) normalizer.bool("strip_accents") else lowercase
        val template = file.fields("post_processor")
        val special = template.fields("special_tokens")
        val order = template.objects("single").map { it.fieldsOrNull("SpecialToken")?.string("id") }
        val ids = order.map { name -> name?.let { special.fields(it).ints("ids") } }
        val text = ids.indexOf(null)
        before = ids.subList(0, text).flatMap { it!!.toList() }.toIntArray()
        after = ids.subList(text + 1, ids.size).flatMap { it!!.toList() }.toIntArray()
    }

    /** Exactly `context_length` ids: cut on the right so that the closing token stays, padded on the right. */
    fun encode(text: String): IntArray {
        // Python counts the separators too
        if (text.all { isSpace(it.code) || it.code in 0x1c..0x1f }) {
            throw PocketvlmException("the text is empty; write a word or two")
        }
        val room = spec.contextLength - before.size - after.size
        val ids = before + ordinary(text, room).toIntArray() + after
        return IntArray(spec.contextLength) { if (it < ids.size) ids[it] else spec.padId }
    }

    private fun ordinary(text: String, room: Int): List<Int> {
        val ids = ArrayList<Int>()
        var start = 0
        var at = 0
        while (at < text.length && ids.size < room) {
            val token = added.firstOrNull { text.startsWith(it.first, at) }
            if (token == null) {
                at++
                continue
            }
            words(text.substring(start, at)).forEach { pieces(it, ids) }
            ids.add(token.second)
            at += token.first.length
            start = at
        }
        if (start < text.length) words(text.substring(start)).forEach { if (ids.size < room) pieces(it, ids) }
        return ids.take(room)
    }

    /** Normalised and split at white space and punctuation. */
    private fun words(text: String): List<IntArray> {
        val found = ArrayList<IntArray>()
        val word = ArrayList<Int>()
        fun close() {
            if (word.isNotEmpty()) found.add(word.toIntArray())
            word.clear()
        }
        for (code in normalized(text)) {
            when {
                isSpace(code) -> close()
                code in PUNCTUATION -> {
                    close()
                    found.add(intArrayOf(code))
                }
                else -> word.add(code)
            }
        }
        close()
        return found
    }

    private fun normalized(text: String): IntArray {
        var codes = text.codePoints().toArray()
        if (cleanText) codes = codes.filter { it !in CONTROL }.map { if (isSpace(it)) SPACE else it }.toIntArray()
        if (chinese) {
            codes = codes.flatMap { if (it in IDEOGRAPH) listOf(SPACE, it, SPACE) else listOf(it) }.toIntArray()
        }
        if (stripAccents) {
            val plain = String(codes, 0, codes.size)
            val apart = if (codes.all { it < 0x80 }) plain else Normalizer.normalize(plain, Normalizer.Form.NFD)
            codes = apart.codePoints().toArray().filter { it !in MARK }.toIntArray()
        }
        return if (lowercase) codes.flatMap { lower(it) }.toIntArray() else codes
    }

    // one code point at a time: a whole string's lower case would know of final sigmas
    private fun lower(code: Int): List<Int> =
        if (code == 0x130) listOf(0x69, 0x307) else listOf(Character.toLowerCase(code))

    /** The longest known pieces from the left, or one unknown token where any part is unknown. */
    private fun pieces(word: IntArray, ids: MutableList<Int>) {
        if (word.size > longestWord) {
            ids.add(unknown)
            return
        }
        val found = ArrayList<Int>()
        var start = 0
        while (start < word.size) {
            var end = word.size
            var id: Int? = null
            while (end > start) {
                val piece = String(word, start, end - start)
                id = vocabulary[if (start == 0) piece else prefix + piece]
                if (id != null) break
                end--
            }
            if (id == null) {
                ids.add(unknown)
                return
            }
            found.add(id)
            start = end
        }
        ids.addAll(found)
    }

    private fun isSpace(code: Int): Boolean = when (code) {
        in 0x09..0x0d, 0x20, 0x85, 0xa0, 0x1680, in 0x2000..0x200a, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000 -> true
        else -> false
    }

    private companion object {
        const val SPACE = 0x20
        val KINDS = listOf(
            "model" to "WordPiece",
            "normalizer" to "BertNormalizer",
            "pre_tokenizer" to "BertPreTokenizer",
            "post_processor" to "TemplateProcessing",
        )
    }
}
