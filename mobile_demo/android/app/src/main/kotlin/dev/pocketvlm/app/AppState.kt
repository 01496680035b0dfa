package dev.pocketvlm.app

import android.app.Application
import android.net.Uri
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateListOf
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.setValue
import androidx.lifecycle.AndroidViewModel
import androidx.lifecycle.viewModelScope
import dev.pocketvlm.Pixels
import dev.pocketvlm.PocketvlmException
import dev.pocketvlm.Report
import dev.pocketvlm.labelEmbedding
import dev.pocketvlm.probabilities
import dev.pocketvlm.search as nearest
import java.io.IOException
import java.util.concurrent.Executors
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.delay
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

private const val TYPING_PAUSE_MS = 400L

class Photo(val uri: Uri, val embedding: FloatArray)

class Hit(val uri: Uri, val cosine: Double)

/** What the three screens share. The model has one thread; everything else is on the main thread. */
class AppState(application: Application) : AndroidViewModel(application) {
    private val worker = Executors.newSingleThreadExecutor()
    private val dispatcher = worker.asCoroutineDispatcher()
    private var labels: List<Pair<String, FloatArray>> = emptyList()
    private var labelling: Job? = null
    private val photos = mutableListOf<Photo>()

    var model by mutableStateOf<PocketModel?>(null)
        private set
    var error by mutableStateOf<String?>(null)
        private set
    var words by mutableStateOf("a cup, a plant, a face, a keyboard, a dog, something else")
        private set
    var scores by mutableStateOf<List<Pair<String, Double>>>(emptyList())
        private set
    var frameMillis by mutableStateOf(0L)
        private set
    val hits = mutableStateListOf<Hit>()
    var indexed by mutableStateOf(0)
        private set
    var report by mutableStateOf<Report?>(null)
        private set

    init {
        onModelThread {
            val loaded = PocketModel(getApplication())
            withMain {
                model = loaded
                setLabels(words)
            }
        }
    }

    /** Embedded once typing pauses, since every letter makes another label. */
    fun setLabels(text: String) {
        words = text
        labelling?.cancel()
        labelling = onModelThread {
            delay(TYPING_PAUSE_MS)
            val loaded = model ?: return@onModelThread
            val names = text.split(',', '\n').map { it.trim() }.filter { it.isNotEmpty() }.distinct()
            labels = names.map { it to labelEmbedding(listOf(loaded.embedText(it))) }
        }
    }

    /** Called by the camera on the model's thread; frames that come meanwhile are dropped. */
    fun classify(frame: Pixels) {
        val loaded = model ?: return
        val known = labels.ifEmpty { return }
        val start = System.nanoTime()
        val image = loaded.embedFrame(frame)
        val found = probabilities(image, known.map { it.second }, loaded.bundle.contract.logitScale)
        val millis = (System.nanoTime() - start) / 1_000_000
        viewModelScope.launch {
            scores = known.map { it.first }.zip(found.toList()).sortedByDescending { it.second }
            frameMillis = millis
        }
    }

    /** A photo that cannot be used is passed over; how many were, and why the first, is told at the end. */
    fun index(uris: List<Uri>) = onModelThread {
        val loaded = model ?: return@onModelThread
        val refused = mutableListOf<String>()
        for (uri in uris) {
            if (photos.any { it.uri == uri }) continue
            try {
                photos.add(Photo(uri, loaded.embedPicture(read(uri))))
                withMain { indexed = photos.size }
            } catch (problem: PocketvlmException) {
                refused.add(problem.message.orEmpty())
            } catch (problem: IOException) {
                refused.add(problem.message.orEmpty())
            }
        }
        if (refused.isNotEmpty()) {
            throw PocketvlmException("${refused.size} of the photos cannot be used; the first: ${refused[0]}")
        }
    }

    private fun read(uri: Uri): ByteArray {
        val stream = getApplication<Application>().contentResolver.openInputStream(uri)
        return (stream ?: throw IOException("it cannot be opened")).use { it.readBytes() }
    }

    fun search(text: String) = onModelThread {
        val loaded = model ?: return@onModelThread
        val found = nearest(loaded.embedText(text), photos.map { it.embedding }, 30)
        withMain {
            hits.clear()
            hits.addAll(found.map { (index, cosine) -> Hit(photos[index].uri, cosine) })
        }
    }

    fun checkConformance() = onModelThread {
        val found = model?.conformance()
        withMain { report = found }
    }

    val cameraExecutor get() = worker

    override fun onCleared() = worker.shutdown()

    private fun onModelThread(work: suspend () -> Unit): Job = viewModelScope.launch {
        try {
            withContext(dispatcher) { work() }
            error = null
        } catch (problem: PocketvlmException) {
            error = problem.message
        } catch (problem: IOException) {
            error = problem.message
        }
    }

    private suspend fun withMain(change: () -> Unit) = withContext(Dispatchers.Main) { change() }
}
