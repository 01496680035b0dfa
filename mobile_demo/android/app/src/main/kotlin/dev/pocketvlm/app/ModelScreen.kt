package dev.pocketvlm.app

import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier
import androidx.compose.ui.unit.dp

/** Who the model is, what its parity check said, whose licences apply, and the conformance run on this phone. */
@Composable
fun ModelScreen(state: AppState) {
    val model = state.model ?: return Text("Loading the model", Modifier.padding(16.dp))
    val contract = model.bundle.contract
    Column(Modifier.verticalScroll(rememberScrollState()).padding(16.dp)) {
        Text(contract.name, style = MaterialTheme.typography.headlineSmall)
        Text("model ${contract.modelId}\nspace ${contract.spaceId}")
        Text("${contract.embedDim} numbers, ExecuTorch ${model.precision}, pictures of ${contract.image?.size} pixels")
        for (row in model.bundle.raw.objectsOrNone("parity")) {
            val light = when (row.string("status")) { "pass" -> "🟢"; "fail" -> "🔴"; else -> "🟡" }
            Text("$light parity ${row.string("target")} ${row.string("precision")}: ${row.string("status")}")
        }
        Button(onClick = { state.checkConformance() }, Modifier.padding(vertical = 8.dp)) {
            Text("Run the conformance vectors")
        }
        state.report?.let { report ->
            Text(report.verdict, style = MaterialTheme.typography.titleMedium)
            for (stage in report.stages) {
                val light = if (stage.passed) "🟢" else if (stage.failures.isEmpty()) "🟡" else "🔴"
                Text("$light ${stage.name}, ${stage.cases} cases")
                (stage.failures.take(3) + stage.notes).forEach { Text(it, style = MaterialTheme.typography.bodySmall) }
            }
        }
        Text("Licences", Modifier.padding(top = 16.dp), style = MaterialTheme.typography.titleMedium)
        for (row in model.bundle.raw.objectsOrNone("licences")) {
            Text("${row.string("what")}: ${row.string("licence")}. ${row.stringOrNone("attribution")}")
        }
    }
}
