package dev.pocketvlm

import java.io.File
import java.security.MessageDigest

/** The contract's image part; docs/preprocessing.md has the arithmetic behind each field. */
class ImageSpec(fields: Fields) {
    val size = fields.int("size")
    val resize = fields.string("resize")
    val filter = fields.string("filter")
    val cropFraction = fields.double("crop_fraction")
    val background = fields.ints("background")

    init {
        val decode = fields.string("decode")
        if (decode != "v1" || resize !in setOf("crop", "squash", "pad") || filter !in setOf("bilinear", "bicubic")) {
            throw PocketvlmException(
                "the model wants decoding '$decode', resize '$resize', filter '$filter'; this app knows others " +
                    "and its pixels would be wrong: update the app",
            )
        }
    }
}

/** The contract's text part. */
class TextSpec(fields: Fields) {
    val contextLength = fields.int("context_length")
    val vocabSize = fields.int("vocab_size")
    val padId = fields.int("pad_id")
}

/** What a model expects and promises. */
class Contract(fields: Fields) {
    val kind = fields.string("kind")
    val name = fields.string("name")
    val modelId = fields.string("model_id")
    val spaceId = fields.string("space_id")
    val embedDim = fields.int("embed_dim")
    val image = fields.fieldsOrNull("image")?.let { ImageSpec(it) }
    val text = fields.fieldsOrNull("text")?.let { TextSpec(it) }
    val logitScale = fields.double("logit_scale")
    val logitBias = fields.double("logit_bias")
}

/** One target at one precision: tower ("image", "text") to file. */
class Variant(fields: Fields) {
    val target = fields.string("target")
    val precision = fields.string("precision")
    val dim = if (fields.has("dim")) fields.int("dim") else null
    val files = fields.fields("files").let { files -> files.keys().associateWith { files.string(it) } }
}

/** A folder that `pocketvlm mobile prepare` wrote, read only after every file matched its sha256. */
class Bundle private constructor(val folder: File, val raw: Fields) {
    val contract = Contract(raw.fields("contract"))
    val variants = raw.objects("variants").map { Variant(it) }

    fun file(name: String): File {
        if (name !in raw.fields("files").keys()) {
            throw PocketvlmException("bundle.json does not list $name; prepare it again")
        }
        return File(folder, name)
    }

    fun tokenizer(): Tokenizer {
        val spec = contract.text ?: throw PocketvlmException("model ${contract.name} has no text tower to ask in words")
        return Tokenizer(file(raw.string("tokenizer")).readText(), spec)
    }

    fun vectors(): Fields {
        val vectors = Fields.parse(file(raw.string("conformance")).readText(), "vectors.json")
        checkVersion(vectors.string("schema"), minor = 1, what = "conformance vectors")
        return vectors
    }

    private fun verify() {
        val files = raw.fields("files")
        for (name in files.keys()) {
            if (name.startsWith("/") || ".." in name.split("/")) {
                throw PocketvlmException("bundle file $name lies outside the bundle")
            }
            val file = File(folder, name)
            if (!file.isFile || sha256(file.readBytes()) != files.fields(name).string("sha256")) {
                throw PocketvlmException(
                    "bundle file $name is missing or changed, so the model may say anything; prepare it again",
                )
            }
        }
    }

    companion object {
        fun open(folder: File): Bundle {
            val manifest = File(folder, "bundle.json")
            if (!manifest.isFile) {
                throw PocketvlmException("there is no bundle in $folder; run: pocketvlm mobile prepare android")
            }
            val raw = Fields.parse(manifest.readText(), "bundle.json")
            checkVersion(raw.string("schema_version"), minor = 0, what = "bundle")
            return Bundle(folder, raw).also { it.verify() }
        }

        /** A reader of 1.m reads every 1.k with k <= m. */
        private fun checkVersion(found: String, minor: Int, what: String) {
            val parts = found.split(".").map { it.toIntOrNull() ?: -1 }
            if (parts.size != 2 || parts[0] != 1 || parts[1] !in 0..minor) {
                throw PocketvlmException("the $what has schema $found, this app reads 1.0 to 1.$minor; update the app")
            }
        }
    }
}

fun sha256(bytes: ByteArray): String =
    MessageDigest.getInstance("SHA-256").digest(bytes).joinToString("") { "%02x".format(it.toInt() and 0xff) }
