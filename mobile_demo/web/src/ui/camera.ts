/** The live camera: one frame at a time, as fast as the model takes them. */
import { UserError } from "../errors";

export class Camera {
  private stream: MediaStream | null = null;
  private running = 0;
  private facing: "environment" | "user" = "environment";

  constructor(private readonly video: HTMLVideoElement) {}

  get on(): boolean {
    return this.stream !== null;
  }

  /** Ask for the camera and hand over square frames until `stop`. `take` closes the frame that it is given. */
  async start(take: (frame: ImageBitmap) => Promise<void>): Promise<void> {
    this.stop();
    const run = this.running;
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new UserError("This browser gives pages no camera here; choose a picture instead.");
    }
    let stream: MediaStream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({
        audio: false,
        video: { facingMode: this.facing, width: { ideal: 640 }, height: { ideal: 480 } },
      });
    } catch (error) {
      throw new UserError(reason(error));
    }
    if (run !== this.running) {
      stream.getTracks().forEach((track) => track.stop());
      return;
    }
    this.stream = stream;
    this.video.srcObject = stream;
    this.video.classList.toggle("mirrored", this.facing === "user");
    await this.video.play();
    void this.loop(run, take);
  }

  stop(): void {
    this.running++;
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    this.video.srcObject = null;
  }

  flip(): void {
    this.facing = this.facing === "user" ? "environment" : "user";
  }

  private async loop(run: number, take: (frame: ImageBitmap) => Promise<void>): Promise<void> {
    while (run === this.running) {
      await new Promise((resolve) => requestAnimationFrame(resolve));
      const { videoWidth: width, videoHeight: height } = this.video;
      if (!width || !height || run !== this.running) continue;
      const side = Math.min(width, height);
      const frame = await createImageBitmap(this.video, (width - side) >> 1, (height - side) >> 1, side, side);
      if (run !== this.running) {
        frame.close();
        return;
      }
      await take(frame);
    }
  }
}

function reason(error: unknown): string {
  const name = error instanceof DOMException ? error.name : "";
  if (name === "NotAllowedError" || name === "SecurityError") {
    return "The camera was not allowed, so nothing is seen; allow it in the browser's settings for this page, or choose a picture.";
  }
  if (name === "NotFoundError" || name === "OverconstrainedError") return "No camera was found; choose a picture instead.";
  return "The camera could not be opened (another app may be using it); close that, or choose a picture.";
}
