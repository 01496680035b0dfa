/** The user's indexed pictures, in this browser's IndexedDB: embeddings and small thumbnails, no originals. */
import { UserError } from "./errors";

export interface Entry {
  id: number;
  /** which model file made the embedding; others are never compared */
  embeddedBy: string;
  /** name, size and date of the file: the same file is not indexed twice */
  key: string;
  name: string;
  thumbnail: Blob;
  embedding: Float32Array;
}

const NAME = "pocketvlm";
const STORE = "pictures";

export class Store {
  private constructor(private readonly db: IDBDatabase) {}

  static open(): Promise<Store> {
    return new Promise((resolve, reject) => {
      const fail = () =>
        reject(new UserError("This browser keeps no data here (a private window, perhaps), so pictures cannot be indexed."));
      let request: IDBOpenDBRequest;
      try {
        request = indexedDB.open(NAME, 1);
      } catch {
        fail();
        return;
      }
      request.onupgradeneeded = () => {
        const store = request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
        store.createIndex("key", ["embeddedBy", "key"], { unique: true });
      };
      request.onsuccess = () => resolve(new Store(request.result));
      request.onerror = fail;
      request.onblocked = fail;
    });
  }

  async all(): Promise<Entry[]> {
    return settled(this.objects("readonly").getAll() as IDBRequest<Entry[]>);
  }

  async has(embeddedBy: string, key: string): Promise<boolean> {
    return (await settled(this.objects("readonly").index("key").count([embeddedBy, key]))) > 0;
  }

  async add(entry: Omit<Entry, "id">): Promise<Entry> {
    try {
      const id = (await settled(this.objects("readwrite").add(entry))) as number;
      return { ...entry, id };
    } catch (error) {
      if ((error as DOMException).name === "QuotaExceededError") {
        throw new UserError("This device has no room left for more pictures; remove some and try again.");
      }
      throw error;
    }
  }

  async remove(ids: readonly number[]): Promise<void> {
    const objects = this.objects("readwrite");
    await Promise.all(ids.map((id) => settled(objects.delete(id))));
  }

  private objects(mode: IDBTransactionMode): IDBObjectStore {
    return this.db.transaction(STORE, mode).objectStore(STORE);
  }
}

function settled<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
