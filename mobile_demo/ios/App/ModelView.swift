import PocketVLM
import SwiftUI

/// Who the model is, what its parity check said, whose licences apply, and the conformance run on this phone.
struct ModelView: View {
    let state: AppState
    @State private var running = false

    var body: some View {
        List {
            if let bundle = state.bundle {
                Section(bundle.contract.name) {
                    Text("model \(bundle.contract.modelId)\nspace \(bundle.contract.spaceId)")
                    Text("\(bundle.contract.embedDim) numbers, pictures of \(bundle.contract.image?.size ?? 0) pixels")
                    ForEach(Array(bundle.raw.objectsOrNone("parity").enumerated()), id: \.offset) { _, row in
                        let status = row.stringOrNone("status")
                        let file = row.stringOrNone("target") + " " + row.stringOrNone("precision")
                        Text("\(light(status)) parity \(file): \(status)")
                    }
                }
                Section("Conformance") {
                    Button(running ? "Running" : "Run the conformance vectors") {
                        running = true
                        Task {
                            await state.checkConformance()
                            running = false
                        }
                    }
                    .disabled(running)
                    if let report = state.report {
                        Text(report.verdict).bold()
                        ForEach(report.stages) { stage in
                            Text("\(light(of: stage)) \(stage.name), \(stage.cases) cases")
                            ForEach(Array(stage.failures.prefix(3)) + stage.notes, id: \.self) { line in
                                Text(line).font(.footnote)
                            }
                        }
                    }
                }
                Section("Licences") {
                    ForEach(Array(bundle.raw.objectsOrNone("licences").enumerated()), id: \.offset) { _, row in
                        Text(row.stringOrNone("what") + ": " + row.stringOrNone("licence"))
                        Text(row.stringOrNone("attribution")).font(.footnote)
                    }
                }
            } else {
                Text("Loading the model")
            }
        }
    }

    private func light(_ status: String) -> String {
        status == "pass" ? "🟢" : status == "fail" ? "🔴" : "🟡"
    }

    private func light(of stage: Stage) -> String {
        stage.passed ? "🟢" : stage.failures.isEmpty ? "🟡" : "🔴"
    }
}
