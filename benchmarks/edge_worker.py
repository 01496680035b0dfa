"""One runtime of `benchmarks.edge` in a process of its own: pictures to embeddings, again whenever it is asked.

`python edge_worker.py KIND REQUEST.json`, where KIND is pocketvlm, fastembed or open_clip; it runs under any
interpreter that has that package. Each line on stdin names inputs of the request ("photo"); the answer is a line of
JSON with wall and processor seconds for all of them, and "save NAME" writes what was embedded last.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path


def pocketvlm_run(request):
    from pocketvlm.edge.model import EdgeModel

    model = EdgeModel.load(request["bundle"], request["backend"], request["precision"], request["threads"])
    workers = 1 if request["threads"] == 1 else None

    def embed(inputs):
        if inputs is request["inputs"].get("text"):
            return model.embed_text(inputs, batch_size=request["batch"])
        return model.embed_image(inputs, batch_size=request["batch"], workers=workers)

    return embed


def fastembed_run(request):
    import numpy
    from fastembed.image.onnx_embedding import OnnxImageEmbedding

    # the name only chooses the file name "model.onnx"; the folder is ours
    model = OnnxImageEmbedding(
        "Qdrant/clip-ViT-B-32-vision", specific_model_path=request["fastembed"], threads=request["threads"]
    )
    return lambda files: numpy.stack(list(model.embed(files, batch_size=request["batch"])))


def open_clip_run(request):
    import numpy
    import open_clip
    import torch
    from PIL import Image

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    model, _, prepare = open_clip.create_model_and_transforms(request["name"], pretrained=request["weights"])
    model.eval()

    def embed(files):
        rows = []
        for at in range(0, len(files), request["batch"]):
            batch = torch.stack([prepare(Image.open(file)) for file in files[at : at + request["batch"]]])
            with torch.inference_mode():
                rows.append(model.encode_image(batch, normalize=True).numpy())
        return numpy.concatenate(rows)

    return embed


def spent():
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def main(kind, path):
    import numpy

    request = json.loads(Path(path).read_text())
    if request["core"] is not None:
        os.sched_setaffinity(0, {request["core"]})
    run = {"pocketvlm": pocketvlm_run, "fastembed": fastembed_run, "open_clip": open_clip_run}[kind](request)
    found = None
    print("ready", flush=True)
    for line in sys.stdin:
        order = line.strip()
        if order.startswith("save "):
            numpy.save(order[5:], found)
            print("{}", flush=True)
            continue
        files = request["inputs"][order]
        wall, processor = time.perf_counter(), spent()
        found = run(files)
        answer = {"wall": time.perf_counter() - wall, "processor": spent() - processor}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
