import PocketVLM
import PocketVLMApple
import XCTest

/// On a Mac, in this folder: `swift test`. The bundle is the one that `pocketvlm mobile prepare ios` put beside.
final class ConformanceTests: XCTestCase {
    private func prepared() throws -> ModelBundle {
        let here = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        return try ModelBundle(here.appendingPathComponent("../../../bundle").standardizedFileURL)
    }

    func testTheBundleKeepsItsVectors() throws {
        let bundle = try prepared()
        let cache = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        let embedder = try CoreMLEmbedder(bundle, cache: cache)
        let runner = try Conformance(
            bundle, precision: bundle.variants[0].precision, decoder: AppleDecoder(), embedder: embedder)
        let report = try runner.run()
        for stage in report.stages { print(stage.name, stage.failures, stage.notRun, stage.notes) }
        XCTAssertEqual(report.verdict, "pass")
    }

    /// The worked example of docs/preprocessing.md.
    func testFiveSamplesBecomeTwo() throws {
        let line: [UInt8] = [0, 0, 0, 50, 50, 50, 100, 100, 100, 200, 200, 200, 250, 250, 250]
        let picture = try Pixels(height: 5, width: 5, rgb: line + line + line + line + line)
        for (filter, expected) in [("bilinear", [52, 186]), ("bicubic", [43, 195])] {
            let spec = """
                {"size": 2, "resize": "squash", "filter": "\(filter)", "crop_fraction": 1, "background": [0, 0, 0],
                "decode": "v1"}
                """
            let out = try resize(picture, try ImageSpec(try Fields(Data(spec.utf8), what: "spec")))
            XCTAssertEqual([Int(out.rgb[0]), Int(out.rgb[3])], expected)
        }
    }

    func testProbabilitiesSumToOne() {
        let found = probabilities([1, 0], [[2, 0], [0, 3]], logitScale: 10)
        XCTAssertEqual(found[0], 0.9999546, accuracy: 1e-7)
        XCTAssertEqual(found[0] + found[1], 1, accuracy: 1e-12)
    }

    func testAKeyIsItsCodePoints() throws {
        let json = #"{"\u00e9": 1, "e\u0301": 2, "\ud83d\ude00": "a\ud83d\ude00b"}"#
        let fields = try Fields(Data(json.utf8), what: "object")
        XCTAssertEqual(fields.keys.count, 3)
        XCTAssertEqual(fields.keys.map { $0.unicodeScalars.count }, [1, 2, 1])
        XCTAssertEqual(try fields.string("😀"), "a😀b")
    }
}
