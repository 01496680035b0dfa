import PhotosUI
import SwiftUI

/// Photos picked by the user, found again in words. The index lives as long as the app; no permission is needed.
struct PhotosView: View {
    let state: AppState
    @State private var picked: [PhotosPickerItem] = []
    @State private var query = ""
    private let columns = [GridItem(.adaptive(minimum: 100))]

    var body: some View {
        NavigationStack {
            ScrollView {
                Text("\(state.indexed) photos can be searched").foregroundStyle(.secondary)
                LazyVGrid(columns: columns) {
                    ForEach(state.hits) { hit in
                        VStack {
                            Thumbnail(data: hit.data)
                            Text(hit.cosine, format: .number.precision(.fractionLength(2))).font(.caption)
                        }
                    }
                }
                .padding()
            }
            .searchable(text: $query, prompt: "What is to be seen?")
            .onSubmit(of: .search) { Task { await state.find(query) } }
            .toolbar { PhotosPicker("Add photos", selection: $picked, matching: .images) }
            .onChange(of: picked) { _, items in
                if items.isEmpty { return }
                Task {
                    picked = []
                    var refused: [String] = []
                    for item in items {
                        let data = try? await item.loadTransferable(type: Data.self)
                        if let problem = await state.add(data) { refused.append(problem) }
                    }
                    state.tell(refused: refused)
                }
            }
        }
    }
}

private struct Thumbnail: View {
    let data: Data
    @State private var image: UIImage?

    var body: some View {
        Group {
            if let image { Image(uiImage: image).resizable().scaledToFit() } else { Color.clear }
        }
        .frame(height: 100)
        .task {
            image = await UIImage(data: data)?.byPreparingThumbnail(ofSize: CGSize(width: 300, height: 300))
        }
    }
}
