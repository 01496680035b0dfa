package dev.pocketvlm.app

import android.content.Context
import android.graphics.Bitmap
import android.graphics.ImageDecoder
import dev.pocketvlm.Bundle
import dev.pocketvlm.Conformance
import dev.pocketvlm.Decoder
import dev.pocketvlm.Encoder
import dev.pocketvlm.ImageSpec
import dev.pocketvlm.Pixels
import dev.pocketvlm.Png
import dev.pocketvlm.PocketvlmException
import dev.pocketvlm.Report
import dev.pocketvlm.Tokenizer
import dev.pocketvlm.resize
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** Both towers of the bundle in the app's assets. Use it from one thread. */
class PocketModel(context: Context) : Encoder, Decoder {
    val bundle: Bundle = Bundle.open(copyAssets(context))
    val precision: String
    private val spec: ImageSpec
    private val tokenizer: Tokenizer
    private val module: Module

    init {
        val variant = bundle.variants.firstOrNull { it.target == "executorch" }
            ?: throw PocketvlmException("the bundle has no ExecuTorch file; run: pocketvlm mobile prepare android")
        spec = bundle.contract.image ?: throw PocketvlmException("the model has no image tower")
        tokenizer = bundle.tokenizer()
        precision = variant.precision
        module = Module.load(bundle.file(variant.files.getValue("image")).path, Module.LOAD_MODE_MMAP)
    }

    fun embedPicture(bytes: ByteArray): FloatArray = embedFrame(decode(bytes, spec.background))

    fun embedFrame(picture: Pixels): FloatArray = embedPixels(resize(picture, spec))

    fun embedText(text: String): FloatArray = embedIds(tokenizer.encode(text))

    override fun embedPixels(pixels: Pixels): FloatArray {
        val shape = longArrayOf(1, pixels.height.toLong(), pixels.width.toLong(), 3)
        return run("encode_image", Tensor.fromBlobUnsigned(pixels.rgb, shape))
    }

    override fun embedIds(ids: IntArray): FloatArray =
        run("encode_text", Tensor.fromBlob(ids, longArrayOf(1, ids.size.toLong())))

    private fun run(method: String, input: Tensor): FloatArray =
        module.execute(method, EValue.from(input))[0].toTensor().dataAsFloatArray

    /** Upright RGB: PNG by this project's decoder, everything else by Android's, which applies EXIF itself. */
    override fun decode(bytes: ByteArray, background: IntArray): Pixels {
        if (Png.isPng(bytes)) return Png.decode(bytes, background)
        val decoded = try {
            ImageDecoder.decodeBitmap(ImageDecoder.createSource(ByteBuffer.wrap(bytes))) { decoder, info, _ ->
                if (info.size.width.toLong() * info.size.height > MOST_PIXELS) {
                    throw PocketvlmException("the picture has more than 50 million pixels; scale it down")
                }
                decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE
                decoder.isUnpremultipliedRequired = true
            }
        } catch (error: IOException) {
            throw PocketvlmException("this is no picture, or only part of one (${error.message}); take another")
        }
        val plain = decoded.config == Bitmap.Config.ARGB_8888
        val bitmap = if (plain) decoded else decoded.copy(Bitmap.Config.ARGB_8888, false)
        val rgba = ByteBuffer.allocate(bitmap.byteCount)
        bitmap.copyPixelsToBuffer(rgba)
        return Pixels.ofRgba(bitmap.height, bitmap.width, rgba.array(), background)
    }

    fun conformance(): Report = Conformance(bundle, precision, this, this).run()

    private companion object {
        const val MOST_PIXELS = 50_000_000L

        /** ExecuTorch maps a file, and assets are none: they are copied once for each bundle. */
        fun copyAssets(context: Context): File {
            val manifest = try {
                context.assets.open("bundle/bundle.json").use { it.readBytes() }
            } catch (error: IOException) {
                throw PocketvlmException("the app was built without a bundle; run: pocketvlm mobile prepare android")
            }
            val folder = File(context.filesDir, "bundle")
            val copied = File(folder, "bundle.json")
            if (copied.isFile && copied.readBytes().contentEquals(manifest)) return folder
            folder.deleteRecursively()
            copyTree(context, "bundle", folder)
            copied.writeBytes(manifest) // last: a copy that was interrupted is begun again
            return folder
        }

        fun copyTree(context: Context, asset: String, target: File) {
            val inside = context.assets.list(asset).orEmpty()
            if (inside.isNotEmpty()) {
                target.mkdirs()
                inside.forEach { copyTree(context, "$asset/$it", File(target, it)) }
            } else if (target.name != "bundle.json") {
                context.assets.open(asset).use { from -> target.outputStream().use { from.copyTo(it) } }
            }
        }
    }
}
