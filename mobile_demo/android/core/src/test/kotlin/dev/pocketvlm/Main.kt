package dev.pocketvlm

import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.File
import kotlin.system.exitProcess

/**
 * The runner on a computer; exits with 0 for a pass, 1 for a failing stage, 3 where cases were not run.
 *
 *     conformance BUNDLE [--decoded DIR] [--precision NAME --encoder COMMAND...]
 *     encode BUNDLE            lines of JSON strings in, lines of ids out
 *
 * ENCODER is a program that embeds: 'P' and S*S*3 bytes, or 'I' and L big-endian integers, arrive at its input; D
 * big-endian floats are expected from its output.
 */
fun main(args: Array<String>) {
    val bundle = try {
        Bundle.open(File(args[1]))
    } catch (error: PocketvlmException) {
        System.err.println(error.message)
        exitProcess(2)
    }
    if (args[0] == "encode") {
        val tokenizer = bundle.tokenizer()
        generateSequence(::readLine).forEach { println(tokenizer.encode(Json.parse(it) as String).joinToString(" ")) }
        return
    }
    fun option(name: String): String? = args.indexOf(name).let { if (it < 0) null else args[it + 1] }
    val precision = option("--precision") ?: bundle.variants.first().precision
    val command = args.indexOf("--encoder").let { if (it < 0) null else args.drop(it + 1) }
    val encoder = command?.let { ProcessEncoder(it, bundle.contract.embedDim) }
    val report = Conformance(bundle, precision, JvmDecoder(option("--decoded")?.let { File(it) }), encoder).run()
    encoder?.close()
    for (stage in report.stages) {
        val told = if (stage.failures.isNotEmpty()) "FAILS" else if (stage.notRun.isNotEmpty()) "partly" else "passes"
        println("${stage.name}: $told, ${stage.cases} cases")
        (stage.failures + stage.notRun.map { "not run: $it" } + stage.notes).forEach { println("  $it") }
    }
    println(report.verdict)
    exitProcess(if (report.firstFailing != null) 1 else if (report.notRun.isNotEmpty()) 3 else 0)
}

private class ProcessEncoder(command: List<String>, private val dim: Int) : Encoder {
    private val process = ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT).start()
    private val output = DataOutputStream(process.outputStream.buffered())
    private val input = DataInputStream(process.inputStream.buffered())

    override fun embedPixels(pixels: Pixels): FloatArray = ask('P') { output.write(pixels.rgb) }

    override fun embedIds(ids: IntArray): FloatArray = ask('I') { ids.forEach { output.writeInt(it) } }

    private fun ask(tower: Char, write: () -> Unit): FloatArray {
        output.writeByte(tower.code)
        write()
        output.flush()
        return FloatArray(dim) { input.readFloat() }
    }

    fun close() {
        output.close()
        process.waitFor()
    }
}
