/** A mistake that the person at the screen can mend. The message is one sentence that says how. */
export class UserError extends Error {
  override name = "UserError";
}

/** A file is not what bundle.json vouches for, or the bundle is malformed: nothing of it is used. */
export class IntegrityError extends Error {
  override name = "IntegrityError";
}

/** A picture that cannot be used. */
export class PictureError extends UserError {
  override name = "PictureError";
}

export function sentence(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
