package dev.pocketvlm

/** What a user or a file did wrong; the message says what and what to do. */
class PocketvlmException(message: String) : Exception(message)

/**
 * JSON as plain values: Map, List, String, Double, Boolean, null.
 *
 * Android has org.json and the JVM has nothing, so this module brings its own hundred lines and runs on both.
 */
class Json private constructor(private val text: String) {
    private var at = 0

    private fun document(): Any? {
        val value = value(0)
        skipSpace()
        if (at != text.length) fail("text after the end")
        return value
    }

    private fun value(depth: Int): Any? {
        if (depth > 64) fail("nested too deeply")
        skipSpace()
        return when (peek()) {
            '{' -> readObject(depth)
            '[' -> array(depth)
            '"' -> string()
            't' -> word("true", true)
            'f' -> word("false", false)
            'n' -> word("null", null)
            else -> number()
        }
    }

    private fun readObject(depth: Int): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        at++
        skipSpace()
        if (peek() == '}') { at++; return found }
        while (true) {
            skipSpace()
            val key = string()
            skipSpace()
            expect(':')
            found[key] = value(depth + 1)
            skipSpace()
            if (peek() == '}') { at++; return found }
            expect(',')
        }
    }

    private fun array(depth: Int): List<Any?> {
        val found = ArrayList<Any?>()
        at++
        skipSpace()
        if (peek() == ']') { at++; return found }
        while (true) {
            found.add(value(depth + 1))
            skipSpace()
            if (peek() == ']') { at++; return found }
            expect(',')
        }
    }

    private fun string(): String {
        expect('"')
        val found = StringBuilder()
        while (true) {
            when (val c = next()) {
                '"' -> return found.toString()
                '\\' -> when (val escaped = next()) {
                    'b' -> found.append('\b')
                    'f' -> found.append('\u000c')
                    'n' -> found.append('\n')
                    'r' -> found.append('\r')
                    't' -> found.append('\t')
                    'u' -> {
                        if (at + 4 > text.length) fail("cut short")
                        val code = text.substring(at, at + 4).toIntOrNull(16) ?: fail("a bad escape")
                        found.append(code.toChar())
                        at += 4
                    }
                    '"', '\\', '/' -> found.append(escaped)
                    else -> fail("a bad escape")
                }
                else -> found.append(c)
            }
        }
    }

    private fun number(): Double {
        val start = at
        while (at < text.length && text[at] in "+-.0123456789eE") at++
        return text.substring(start, at).toDoubleOrNull() ?: fail("no value")
    }

    private fun word(word: String, value: Any?): Any? {
        if (!text.startsWith(word, at)) fail("no value")
        at += word.length
        return value
    }

    private fun skipSpace() {
        while (at < text.length && text[at] in " \t\r\n") at++
    }

    private fun peek(): Char = if (at < text.length) text[at] else fail("cut short")

    private fun next(): Char = peek().also { at++ }

    private fun expect(c: Char) {
        if (next() != c) fail("'$c' expected")
    }

    private fun fail(what: String): Nothing = throw PocketvlmException("the JSON is damaged at character $at: $what")

    companion object {
        fun parse(text: String): Any? = Json(text).document()
    }
}

/** Fields of a JSON object by name; a field that is absent or of another type names itself in the error. */
class Fields(private val values: Map<*, *>, private val what: String) {
    fun has(key: String): Boolean = values[key] != null
    fun string(key: String): String = get(key)
    fun int(key: String): Int = get<Double>(key).toInt()
    fun double(key: String): Double = get(key)
    fun bool(key: String): Boolean = get(key)
    fun list(key: String): List<*> = get(key)
    fun fields(key: String): Fields = Fields(get<Map<*, *>>(key), "$what.$key")
    fun fieldsOrNull(key: String): Fields? = if (has(key)) fields(key) else null
    fun objects(key: String): List<Fields> = list(key).map { Fields(it as? Map<*, *> ?: missing(key), "$what.$key") }
    fun objectsOrNone(key: String): List<Fields> = if (has(key)) objects(key) else emptyList()
    fun stringOrNone(key: String): String = if (has(key)) string(key) else ""
    fun strings(key: String): List<String> = list(key).map { it as? String ?: missing(key) }
    fun doubles(key: String): DoubleArray = list(key).map { it as? Double ?: missing(key) }.toDoubleArray()
    fun ints(key: String): IntArray = doubles(key).map { it.toInt() }.toIntArray()
    fun keys(): Set<String> = values.keys.filterIsInstance<String>().toSet()

    private inline fun <reified T> get(key: String): T = values[key] as? T ?: missing(key)

    private fun missing(key: String): Nothing =
        throw PocketvlmException("$what lacks or garbles '$key', so the bundle cannot be read; prepare it again")

    companion object {
        fun parse(text: String, what: String): Fields =
            Fields(Json.parse(text) as? Map<*, *> ?: throw PocketvlmException("$what is no JSON object"), what)
    }
}
