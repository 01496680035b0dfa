// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "PocketVLM",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [.library(name: "PocketVLM", targets: ["PocketVLM", "PocketVLMApple"])],
    targets: [
        // Foundation and CryptoKit only: contract, tokenizer, resizing, scores, conformance runner
        .target(name: "PocketVLM"),
        // ImageIO, Accelerate, Core ML: pictures in, embeddings out
        .target(name: "PocketVLMApple", dependencies: ["PocketVLM"]),
        .testTarget(name: "PocketVLMTests", dependencies: ["PocketVLM", "PocketVLMApple"]),
    ]
)
