package dev.pocketvlm.app

import android.Manifest
import android.content.pm.PackageManager
import androidx.activity.compose.rememberLauncherForActivityResult
import androidx.activity.result.contract.ActivityResultContracts
import androidx.camera.core.CameraSelector
import androidx.camera.core.ImageAnalysis
import androidx.camera.core.ImageProxy
import androidx.camera.core.Preview
import androidx.camera.lifecycle.ProcessCameraProvider
import androidx.camera.view.PreviewView
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.material3.Button
import androidx.compose.material3.LinearProgressIndicator
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.remember
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.platform.LocalContext
import androidx.compose.ui.unit.dp
import androidx.compose.ui.viewinterop.AndroidView
import androidx.core.content.ContextCompat
import androidx.lifecycle.compose.LocalLifecycleOwner
import dev.pocketvlm.Pixels

/** The camera's picture under the user's own labels. */
@Composable
fun CameraScreen(state: AppState) {
    val context = LocalContext.current
    val granted = ContextCompat.checkSelfPermission(context, Manifest.permission.CAMERA)
    var allowed by remember { mutableStateOf(granted == PackageManager.PERMISSION_GRANTED) }
    val ask = rememberLauncherForActivityResult(ActivityResultContracts.RequestPermission()) { allowed = it }
    Column(Modifier.padding(16.dp)) {
        if (allowed) {
            Viewfinder(state, Modifier.weight(1f).fillMaxWidth())
        } else {
            Text("Frames are classified on this phone and go nowhere. Photos can be searched without the camera.")
            Button(onClick = { ask.launch(Manifest.permission.CAMERA) }) { Text("Use the camera") }
        }
        OutlinedTextField(state.words, state::setLabels, Modifier.fillMaxWidth(), label = { Text("Labels, by commas") })
        for ((label, probability) in state.scores.take(5)) {
            Row(Modifier.fillMaxWidth().padding(top = 8.dp)) {
                Text(label, Modifier.weight(1f))
                Text("%.0f %%".format(probability * 100))
            }
            LinearProgressIndicator(progress = { probability.toFloat() }, modifier = Modifier.fillMaxWidth())
        }
        if (state.frameMillis > 0) Text("${state.frameMillis} ms per frame, resizing included")
    }
}

@Composable
private fun Viewfinder(state: AppState, modifier: Modifier) {
    val owner = LocalLifecycleOwner.current
    AndroidView(
        modifier = modifier,
        factory = { context ->
            val view = PreviewView(context)
            val future = ProcessCameraProvider.getInstance(context)
            future.addListener({
                val provider = future.get()
                val preview = Preview.Builder().build().also { it.setSurfaceProvider(view.surfaceProvider) }
                val analysis = ImageAnalysis.Builder()
                    .setBackpressureStrategy(ImageAnalysis.STRATEGY_KEEP_ONLY_LATEST)
                    .setOutputImageFormat(ImageAnalysis.OUTPUT_IMAGE_FORMAT_RGBA_8888)
                    .build()
                analysis.setAnalyzer(state.cameraExecutor) { frame -> frame.use { state.classify(it.toPixels()) } }
                provider.unbindAll()
                provider.bindToLifecycle(owner, CameraSelector.DEFAULT_BACK_CAMERA, preview, analysis)
            }, ContextCompat.getMainExecutor(context))
            view
        },
    )
}

/** Rows of a frame may be padded, and it lies as the sensor does: turned upright here as EXIF would. */
private fun ImageProxy.toPixels(): Pixels {
    val plane = planes[0]
    val row = ByteArray(plane.rowStride)
    val rgb = ByteArray(height * width * 3)
    for (y in 0 until height) {
        plane.buffer.position(y * plane.rowStride)
        plane.buffer.get(row, 0, minOf(row.size, plane.buffer.remaining()))
        for (x in 0 until width) {
            val from = x * plane.pixelStride
            row.copyInto(rgb, (y * width + x) * 3, from, from + 3)
        }
    }
    return Pixels(height, width, rgb).upright(mapOf(90 to 6, 180 to 3, 270 to 8)[imageInfo.rotationDegrees] ?: 1)
}
