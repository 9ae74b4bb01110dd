"""One engine in a process of its own, which runs when told to: see benchmarks/peers.py. Imports no package of ours
unless it is asked for, since some peers live in environments of their own.

A line on standard input asks for that many runs; the answer is a line of JSON, seconds of every run.
"""

import json
import sys
import time


def torch_model(folder, compile_with=None, layout="nchw", dtype=None):
    import torch
    from torchvision.models import resnet50

    torch.set_num_threads(2)
    model = resnet50()
    model.load_state_dict(torch.load(f"{folder}.pt", weights_only=True))
    model.eval()
    if layout == "nhwc":
        model = model.to(memory_format=torch.channels_last)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    if compile_with == "inductor":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        model = torch.compile(model)

    def prepare(images):
        x = torch.from_numpy(images)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
        x = x if dtype is None else x.to(getattr(torch, dtype))

        def run():
            with torch.inference_mode():
                return model(x).float().numpy()

        if compile_with != "sparsekit":
            return run
        import sparsekit as sk

        engine = sk.compile(model, x)
        return lambda: engine(x).numpy()

    return prepare


def torch_int8(folder):
    """PyTorch's quantized kernels, calibrated on the images that are timed."""
    import warnings

    import torch
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    from torchvision.models import resnet50

    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model = resnet50()
    model.load_state_dict(torch.load(f"{folder}.pt", weights_only=True))

    def prepare(images):
        x = torch.from_numpy(images)
        with torch.inference_mode():
            observed = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (x[:4],))
            observed(x[:4])
            quantized = convert_fx(observed)

        def run():
            with torch.inference_mode():
                return quantized(x).numpy()

        return run

    return prepare


def int8_onnx(folder, images):
    """The model quantized by ONNX Runtime's tools, per channel, calibrated on a few of the images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter([{"x": images[:4]}])

        def get_next(self):
            return next(self.batches, None)

    path = f"{folder}-{len(images)}-int8.onnx"
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(f"{folder}.onnx", path, Reader(), per_channel=True, **types)
    return path


def onnxruntime_model(folder, int8=False):
    import onnxruntime

    def prepare(images):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        path = int8_onnx(folder, images) if int8 else f"{folder}.onnx"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": images})[0]

    return prepare


def openvino_model(folder, precision="f32", int8=False):
    import openvino

    def prepare(images):
        core = openvino.Core()
        model = core.read_model(int8_onnx(folder, images) if int8 else f"{folder}.onnx")
        model.reshape(list(images.shape))
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": precision}
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
    # Dense in other precisions.
    "bf16 eager": lambda folder: torch_model(folder, layout="nhwc", dtype="bfloat16"),
    "bf16 openvino": lambda folder: openvino_model(folder, precision="bf16"),
    "int8 torch": torch_int8,
    "int8 onnxruntime": lambda folder: onnxruntime_model(folder, int8=True),
    "int8 openvino": lambda folder: openvino_model(folder, int8=True),
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
