import Foundation
import Observation
import PocketVLM

/// What the three screens share.
@MainActor
@Observable
final class AppState {
    private(set) var engine: Engine?
    private(set) var bundle: ModelBundle?
    private(set) var error: String?
    private(set) var scores: [Score] = []
    private(set) var milliseconds = 0.0
    private(set) var indexed = 0
    private(set) var hits: [Hit] = []
    private(set) var report: Report?
    var words = "a cup, a plant, a face, a keyboard, a dog, something else"
    private var busy = false

    func load() async {
        await attempt {
            let engine = try await Task.detached { try Engine() }.value
            try await engine.setLabels(self.words)
            self.bundle = await engine.bundle
            self.engine = engine
        }
    }

    func setLabels() async {
        await attempt { try await self.engine?.setLabels(self.words) }
    }

    /// Frames that come while one is classified are dropped.
    func classify(_ frame: Pixels) async {
        guard let engine, !busy else { return }
        busy = true
        await attempt {
            let found = try await engine.classify(frame)
            self.scores = found.scores
            self.milliseconds = found.milliseconds
        }
        busy = false
    }

    /// What is wrong with a photo that cannot be used; nil where it can be searched now.
    func add(_ photo: Data?) async -> String? {
        guard let engine else { return nil }
        guard let photo else { return "it could not be loaded" }
        do {
            indexed = try await engine.add(photo)
            return nil
        } catch {
            return error.localizedDescription
        }
    }

    func tell(refused: [String]) {
        error = refused.isEmpty ? nil : "\(refused.count) of the photos cannot be used; the first: \(refused[0])"
    }

    func find(_ text: String) async {
        guard let engine else { return }
        await attempt { self.hits = try await engine.find(text) }
    }

    func checkConformance() async {
        guard let engine else { return }
        await attempt { self.report = try await engine.conformance() }
    }

    private func attempt(_ work: @MainActor () async throws -> Void) async {
        do {
            try await work()
            error = nil
        } catch {
            self.error = error.localizedDescription
        }
    }
}
