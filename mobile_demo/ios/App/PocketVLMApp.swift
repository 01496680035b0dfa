import SwiftUI

@main
@MainActor
struct PocketVLMApp: App {
    @State private var state = AppState()

    var body: some Scene {
        WindowGroup {
            TabView {
                CameraView(state: state).tabItem { Label("Camera", systemImage: "camera") }
                PhotosView(state: state).tabItem { Label("Photos", systemImage: "photo.on.rectangle") }
                ModelView(state: state).tabItem { Label("Model", systemImage: "doc.text") }
            }
            .overlay(alignment: .top) {
                if let error = state.error {
                    Text(error).padding().background(.red.opacity(0.9)).foregroundStyle(.white)
                }
            }
            .task { await state.load() }
        }
    }
}
