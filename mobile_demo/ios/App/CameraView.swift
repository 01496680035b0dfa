import AVFoundation
import PocketVLM
import SwiftUI

/// The camera's picture under the user's own labels.
struct CameraView: View {
    @Bindable var state: AppState
    @State private var camera = Camera()
    @State private var allowed = AVCaptureDevice.authorizationStatus(for: .video) == .authorized

    var body: some View {
        VStack(alignment: .leading) {
            if allowed {
                Viewfinder(session: camera.session)
                    .onAppear { camera.start { [state] frame in Task { await state.classify(frame) } } }
                    .onDisappear { camera.stop() }
            } else {
                Text("Frames are classified on this phone and go nowhere. Photos can be searched without the camera.")
                Button("Use the camera") {
                    Task { allowed = await AVCaptureDevice.requestAccess(for: .video) }
                }
                .buttonStyle(.borderedProminent)
            }
            TextField("Labels, by commas", text: $state.words, axis: .vertical)
                .textFieldStyle(.roundedBorder)
                .onSubmit { Task { await state.setLabels() } }
            ForEach(state.scores.prefix(5)) { score in
                ProgressView(value: score.probability) {
                    HStack {
                        Text(score.name)
                        Spacer()
                        Text(score.probability, format: .percent.precision(.fractionLength(0)))
                    }
                }
            }
            if state.milliseconds > 0 {
                Text("\(Int(state.milliseconds.rounded())) ms per frame, resizing included").font(.footnote)
            }
        }
        .padding()
    }
}

/// Frames of the back camera as pictures.
final class Camera: NSObject, AVCaptureVideoDataOutputSampleBufferDelegate {
    let session = AVCaptureSession()
    private let queue = DispatchQueue(label: "camera")
    private var onFrame: (@Sendable (Pixels) -> Void)?

    func start(_ onFrame: @escaping @Sendable (Pixels) -> Void) {
        queue.async {
            self.onFrame = onFrame
            if self.session.inputs.isEmpty { self.configure() }
            self.session.startRunning()
        }
    }

    func stop() {
        queue.async { self.session.stopRunning() }
    }

    private func configure() {
        guard let device = AVCaptureDevice.default(for: .video), let input = try? AVCaptureDeviceInput(device: device),
            session.canAddInput(input)
        else { return }
        session.sessionPreset = .vga640x480
        session.addInput(input)
        let output = AVCaptureVideoDataOutput()
        output.videoSettings = [kCVPixelBufferPixelFormatTypeKey as String: kCVPixelFormatType_32BGRA]
        output.alwaysDiscardsLateVideoFrames = true
        output.setSampleBufferDelegate(self, queue: queue)
        guard session.canAddOutput(output) else { return }
        session.addOutput(output)
        if let connection = output.connection(with: .video), connection.isVideoRotationAngleSupported(90) {
            connection.videoRotationAngle = 90
        }
    }

    func captureOutput(
        _ output: AVCaptureOutput, didOutput sampleBuffer: CMSampleBuffer, from connection: AVCaptureConnection
    ) {
        guard let buffer = CMSampleBufferGetImageBuffer(sampleBuffer) else { return }
        CVPixelBufferLockBaseAddress(buffer, .readOnly)
        defer { CVPixelBufferUnlockBaseAddress(buffer, .readOnly) }
        guard let base = CVPixelBufferGetBaseAddress(buffer) else { return }
        let width = CVPixelBufferGetWidth(buffer)
        let height = CVPixelBufferGetHeight(buffer)
        let perRow = CVPixelBufferGetBytesPerRow(buffer)
        var rgb = [UInt8](repeating: 0, count: height * width * 3)
        for y in 0..<height {
            let row = base.advanced(by: y * perRow).assumingMemoryBound(to: UInt8.self)
            for x in 0..<width {
                let to = (y * width + x) * 3
                rgb[to] = row[x * 4 + 2]
                rgb[to + 1] = row[x * 4 + 1]
                rgb[to + 2] = row[x * 4]
            }
        }
        if let frame = try? Pixels(height: height, width: width, rgb: rgb) { onFrame?(frame) }
    }
}

private struct Viewfinder: UIViewRepresentable {
    let session: AVCaptureSession

    final class PreviewView: UIView {
        override class var layerClass: AnyClass { AVCaptureVideoPreviewLayer.self }
    }

    func makeUIView(context: Context) -> PreviewView {
        let view = PreviewView()
        if let layer = view.layer as? AVCaptureVideoPreviewLayer {
            layer.session = session
            layer.videoGravity = .resizeAspectFill
        }
        return view
    }

    func updateUIView(_ view: PreviewView, context: Context) {}
}
