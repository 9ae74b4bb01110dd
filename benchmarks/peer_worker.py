"""One engine in a process of its own, which runs when told to: see benchmarks/peers.py. Imports no package of ours
unless it is asked for, since some peers live in environments of their own.

A line on standard input asks for that many runs; the answer is a line of JSON, seconds of every run.
"""

import json
import sys
import time


def torch_model(folder, compile_with=None, layout="nchw"):
    import torch
    from torchvision.models import resnet50

    torch.set_num_threads(2)
    model = resnet50()
    model.load_state_dict(torch.load(f"{folder}.pt", weights_only=True))
    model.eval()
    if layout == "nhwc":
        model = model.to(memory_format=torch.channels_last)
    if compile_with == "inductor":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        model = torch.compile(model)

    def prepare(images):
        x = torch.from_numpy(images)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x

        def run():
            with torch.inference_mode():
                return model(x).numpy()

        if compile_with != "sparsekit":
            return run
        import sparsekit as sk

        engine = sk.compile(model, x)
        return lambda: engine(x).numpy()

    return prepare


def onnxruntime_model(folder):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(f"{folder}.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: lambda: session.run(None, {"x": images})[0]


def openvino_model(folder):
    import openvino

    def prepare(images):
        core = openvino.Core()
        model = core.read_model(f"{folder}.onnx")
        model.reshape(list(images.shape))
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(model, "CPU", settings)
        return lambda: compiled(images)[0]

    return prepare


def deepsparse_model(folder):
    from deepsparse import compile_model

    def prepare(images):
        engine = compile_model(f"{folder}.onnx", batch_size=len(images), num_cores=2)
        return lambda: engine.run([images])[0]

    return prepare


PEERS = {
    "sparsekit": lambda folder: torch_model(folder, compile_with="sparsekit"),
    "eager": torch_model,
    "channels_last": lambda folder: torch_model(folder, layout="nhwc"),
    "inductor": lambda folder: torch_model(folder, compile_with="inductor"),
    "onnxruntime": onnxruntime_model,
    "openvino": openvino_model,
    "deepsparse": deepsparse_model,
}


def main(peer, folder, batch):
    import numpy

    images = numpy.random.default_rng(0).standard_normal((int(batch), 3, 224, 224), dtype=numpy.float32)
    run = PEERS[peer](folder)(images)
    for _ in range(3):
        output = run()
    print(json.dumps(output[0][:8].tolist()), flush=True)  # for the parent to compare
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
