package dev.pocketvlm.app

import android.content.Context
import android.graphics.ImageDecoder
import android.net.Uri
import androidx.activity.compose.rememberLauncherForActivityResult
import androidx.activity.result.PickVisualMediaRequest
import androidx.activity.result.contract.ActivityResultContracts
import androidx.compose.foundation.Image
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.aspectRatio
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.lazy.grid.GridCells
import androidx.compose.foundation.lazy.grid.LazyVerticalGrid
import androidx.compose.foundation.lazy.grid.items
import androidx.compose.foundation.text.KeyboardActions
import androidx.compose.foundation.text.KeyboardOptions
import androidx.compose.material3.Button
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.produceState
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.ImageBitmap
import androidx.compose.ui.graphics.asImageBitmap
import androidx.compose.ui.layout.ContentScale
import androidx.compose.ui.platform.LocalContext
import androidx.compose.ui.text.input.ImeAction
import androidx.compose.ui.unit.dp
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.withContext

/** Photos picked by the user, found again in words. The index lives as long as the app; no permission is needed. */
@Composable
fun PhotosScreen(state: AppState) {
    var query by rememberSaveable { mutableStateOf("") }
    val pick = rememberLauncherForActivityResult(ActivityResultContracts.PickMultipleVisualMedia()) { state.index(it) }
    Column(Modifier.padding(16.dp)) {
        Button(onClick = { pick.launch(PickVisualMediaRequest(ActivityResultContracts.PickVisualMedia.ImageOnly)) }) {
            Text("Add photos")
        }
        Text("${state.indexed} photos can be searched", Modifier.padding(vertical = 8.dp))
        OutlinedTextField(
            query, { query = it }, Modifier.fillMaxWidth(),
            label = { Text("What is to be seen?") },
            singleLine = true,
            keyboardOptions = KeyboardOptions(imeAction = ImeAction.Search),
            keyboardActions = KeyboardActions(onSearch = { if (query.isNotBlank()) state.search(query) }),
        )
        LazyVerticalGrid(GridCells.Fixed(3), Modifier.padding(top = 8.dp)) {
            items(state.hits, key = { it.uri.toString() }) { hit ->
                Column(Modifier.padding(2.dp)) {
                    Thumbnail(hit.uri)
                    Text("%.2f".format(hit.cosine))
                }
            }
        }
    }
}

@Composable
private fun Thumbnail(uri: Uri) {
    val context = LocalContext.current
    val image by produceState<ImageBitmap?>(null, uri) {
        value = withContext(Dispatchers.IO) { thumbnail(context, uri) }
    }
    image?.let {
        Image(it, contentDescription = null, Modifier.fillMaxWidth().aspectRatio(1f), contentScale = ContentScale.Crop)
    }
}

private fun thumbnail(context: Context, uri: Uri): ImageBitmap? = runCatching {
    ImageDecoder.decodeBitmap(ImageDecoder.createSource(context.contentResolver, uri)) { decoder, info, _ ->
        decoder.setTargetSampleSize(maxOf(1, minOf(info.size.width, info.size.height) / 256))
    }.asImageBitmap()
}.getOrNull()
