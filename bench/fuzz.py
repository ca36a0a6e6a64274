"""Does any decoder crash, hang or grow on what it is fed?

    pip install atheris        # coverage-guided fuzzing for Python (libFuzzer)
    python -m bench.fuzz [--seconds 120] [--processes 2] [--only TARGET...]

Each target takes bytes and may end in the errors its docstring promises and in no other. A run starts from the kept
corpus (`bench/corpus/TARGET.json`, base64) and from well-formed examples, and keeps the inputs that reached new code;
`tests/test_fuzz.py` feeds all of them, and hypothesis's, to the same targets. Limits for one input: 5 seconds, 1 GiB.
Writes `results/fuzz.{json,md}` and the corpus.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save

from tta import protocol
from tta.auth import Clients, _zap
from tta.bundle import load_bundle
from tta.config import load_config
from tta.daemon.files import read_arrays, read_json, write_arrays, write_json
from tta.daemon.labels import LabelBuffer, Labelled
from tta.errors import ConfigError, TTAError
from tta.images import decode_picture, read_image
from tta.keys import read_key_pair, read_public_key
from tta.signatures import SigningKey, signer_of
from tta.versions import load_version

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
IMAGE_SHAPE = (4, 4, 3)
INPUT_S, INPUT_MIB = 5, 1024
MAX_LEN = 4096
VERSION_FILES = ("manifest.json", "delta.safetensors", "probe.safetensors")
MAX_KEPT_BYTES = 60_000  # inputs of a target, the shortest; those that ended it besides
PEM = (  # RFC 8410, section 10.3
    "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n"
    "-----END PRIVATE KEY-----\n"
)
SHORT_PEM = PEM.replace("K2Vw", "K2Vv")  # the same secret called one of X448, for which it is too short
CHILD = """
import sys, atheris
with atheris.instrument_imports(include=["tta", "yaml", "zipfile", "json"]):
    from bench import fuzz
fuzz.child(sys.argv[1], fuzz.Path(sys.argv[2]), float(sys.argv[3]))
"""

Json = dict[str, Any]


@lru_cache
def _folder() -> Path:
    """For the files of targets that read files; in memory where the machine has such a folder."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="tta-fuzz-", dir=memory if memory.is_dir() else None))


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def _frames(data: bytes) -> list[bytes]:
    """Frames of a message: each begins with its length in two bytes; the last is what is left."""
    frames = []
    while len(data) > 2 and len(frames) < 5:
        n = int.from_bytes(data[:2], "little")
        frames.append(data[2 : 2 + n])
        data = data[2 + n :]
    return frames


def _framed(frames: list[bytes]) -> bytes:
    return b"".join(len(f).to_bytes(2, "little") + f for f in frames)


def data_request(data: bytes) -> None:
    """A request at the server."""
    frames = _frames(data)
    protocol.request_id(frames)
    request = protocol.decode_data(frames)
    if isinstance(request, protocol.Predict) and request.dtype == protocol.PICTURES:
        for picture in protocol.split_pictures(frames, request.shape, request.sizes):
            decode_picture(picture, IMAGE_SHAPE, "crop")
    elif isinstance(request, protocol.Predict):
        protocol.decode_images(frames, request.dtype, request.shape, IMAGE_SHAPE)


def control_request(data: bytes) -> None:
    """A request at the daemon."""
    frames = _frames(data)
    protocol.request_id(frames)
    request = protocol.decode_control(frames)
    if isinstance(request, protocol.Label) and len(frames) == 2:
        protocol.decode_images(frames, request.dtype, request.shape, IMAGE_SHAPE)


def reply(data: bytes) -> None:
    """A reply at a client."""
    frames = _frames(data)
    protocol.reply_id(frames)
    header, _ = protocol.decode_reply(frames)
    protocol.reply_error(header)


@lru_cache
def _nobody() -> Clients:
    return Clients(_file("nobody.yaml", b""))


def zap(data: bytes) -> None:
    """The question of libzmq, whom to let in: nobody gets in whose key is not listed."""
    answer, turned_away = _zap(_frames(data), _nobody())
    assert answer[2] == b"400"
    assert turned_away is not None


def client_list(data: bytes) -> None:
    """The list of clients."""
    Clients(_file("clients.yaml", data))


def config(data: bytes) -> None:
    """A configuration file."""
    load_config(_file("config.yaml", data))


def keys(data: bytes) -> None:
    """A file with a key pair."""
    path = _file("some.key_secret", data)
    read_public_key(path)
    read_key_pair(path)


def signatures(data: bytes) -> None:
    """The file of signatures beside a manifest: nobody's that we know is among them."""
    assert signer_of("bundle", "ab" * 32, data, {"a": base64.b64encode(bytes(range(32))).decode()}) is None


def signing_key(data: bytes) -> None:
    """A PEM file to sign with."""
    SigningKey(_file("some.pem", data))


def sealed_json(data: bytes) -> None:
    """A JSON file of the state folder."""
    read_json(_file("state.json", data))


def sealed_arrays(data: bytes) -> None:
    """A safetensors file of the state folder."""
    read_arrays(_file("watch.safetensors", data))


def version(data: bytes) -> None:
    """A version's folder: manifest and delta."""
    frames = [*_frames(data), b"", b"", b""][:3]
    if not frames[0]:  # one that names the right checksums
        sha256 = {n: hashlib.sha256(f).hexdigest() for n, f in zip(VERSION_FILES[1:], frames[1:], strict=True)}
        frames[0] = _manifest(sha256)
    folder = _folder() / "000001"
    folder.mkdir(exist_ok=True)
    for name, frame in zip(VERSION_FILES, frames, strict=True):
        (folder / name).write_bytes(frame)
    load_version(folder)


def bundle(data: bytes) -> None:
    """A bundle: a zip with a manifest."""
    load_bundle(_file("model.tta", data))


def labels(data: bytes) -> None:
    """A file of labels: damaged, it is set aside and what can be read is kept."""
    path = _file("labels.sqlite", data)
    try:
        buffer = LabelBuffer(path, 100, 0.5, IMAGE_SHAPE)
    except ConfigError as error:
        raise AssertionError("no damage keeps the daemon down") from error
    buffer.count(0)
    buffer.select(0, True)
    buffer.close()
    for each in _folder().glob("labels.sqlite*"):
        each.unlink()


def image(data: bytes) -> None:
    """A picture given to `tta predict`."""
    read_image(_file("picture.png", data), IMAGE_SHAPE, "squash")


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f
    for f in (
        *(data_request, control_request, reply, zap, client_list, config, keys, signatures, signing_key),
        *(sealed_json, sealed_arrays, version, bundle, labels, image),
    )
}


def feed(name: str, data: bytes) -> None:
    """Give a target one input; the errors it promises are in order.

    Raises:
        Exception: any other.
    """
    try:
        TARGETS[name](data)
    except TTAError:
        return


@lru_cache
def examples(name: str) -> list[bytes]:
    """Well-formed inputs of a target."""
    x = np.zeros((1, *IMAGE_SHAPE), np.uint8)
    predict = protocol.Predict(id=1, dtype="uint8", shape=list(x.shape), deadline_s=1.0, key="k", client="c")
    png = _picture("PNG")
    label = protocol.Label(id=1, labels=[1], dtype="uint8", shape=list(x.shape))
    of_kind: dict[str, Callable[[], list[bytes]]] = {
        "data_request": lambda: [
            _framed(protocol.encode(predict, x)),
            _framed(
                [*protocol.encode(protocol.Predict(dtype="bytes", shape=[1], sizes=[len(png)], top_k=1)), png]
            ),
            *(
                _framed(protocol.encode(each(id="a")))
                for each in (protocol.Ready, protocol.Metadata, protocol.Cancel)
            ),
        ],
        "control_request": lambda: [
            _framed(protocol.encode(label, x)),
            _framed(protocol.encode(protocol.Label(id=2, prediction_ids=[1, 2], correct=[True, False]))),
            *(_framed(protocol.encode(each(id=3))) for each in (protocol.Ask, protocol.Rollback, protocol.Status)),
        ],
        "reply": lambda: [
            _framed(protocol.encode(protocol.error_reply(3, ConfigError("no")))),
            _framed(protocol.encode({"v": 1, "id": 1, "code": 0, "shape": [1, 2]}, np.zeros(2, np.float32))),
        ],
        "zap": lambda: [_framed([b"1.0", b"1", b"tta", b"::1", b""]), _framed([b"1.0", b"1", b"", b"", b"CURVE"])],
        "client_list": lambda: [b"a: {key: '" + b"0" * 40 + b"', roles: [label], images_s: 3}\n"],
        "config": lambda: [b"mode: off\nserver: {threads: 2}\nmonitor:\n  arl: 5000\n"],
        "keys": lambda: [b'curve\n    public-key = "' + b"0" * 40 + b'"\n    secret-key = "' + b"0" * 40 + b'"\n'],
        "signatures": lambda: [base64.b64encode(bytes(64)) + b"\n", b"a" * 88 + b"\n" + b"b" * 88, b""],
        "signing_key": lambda: [
            PEM.encode(),
            SHORT_PEM.encode(),
            b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
            b"",
        ],
        "sealed_json": lambda: [_written(lambda p: write_json(p, {"a": [1, 2], "b": {"c": "d"}}))],
        "sealed_arrays": lambda: [_written(lambda p: write_arrays(p, {"a": np.arange(4.0), "b": np.zeros(2)}))],
        "version": lambda: [
            _framed([first, save({"a": np.zeros(2, np.float32)}), save({"x": np.zeros(1), "logits": np.zeros(1)})])
            for first in (_manifest({}), b"")
        ],
        "bundle": lambda: [_zipped({"manifest.json": b'{"format": 1}'}), _zipped({"other": b"x" * 100})],
        "labels": lambda: [_some_labels()],
        "image": lambda: [_picture("PNG"), _picture("JPEG"), _picture("GIF")],
    }
    return of_kind[name]()


def _manifest(sha256: dict[str, str]) -> bytes:
    fields = {"version": 1, "bundle_sha256": "", "block": "", "start": "", "created_s": 0, "sha256": sha256}
    return msgspec.json.encode(fields)


def _written(write: Callable[[Path], None]) -> bytes:
    path = _folder() / "example"
    write(path)
    return path.read_bytes()


def _zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _some_labels() -> bytes:
    path = _folder() / "example.sqlite"
    buffer = LabelBuffer(path, 100, 0.5, IMAGE_SHAPE)
    buffer.add([Labelled(i, i, 0, 1, 1, np.zeros(IMAGE_SHAPE, np.uint8)) for i in range(3)])
    buffer.close()
    data = path.read_bytes()
    path.unlink()
    return data


def _picture(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (3, 3), "red").save(buffer, kind)
    return buffer.getvalue()


def kept(name: str) -> list[bytes]:
    """The corpus of a target."""
    path = CORPUS / f"{name}.json"
    return [base64.b64decode(each) for each in json.loads(path.read_text())] if path.exists() else []


def child(name: str, corpus: Path, seconds: float) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    options = [
        *(name, str(corpus), f"-max_total_time={seconds:.0f}", f"-timeout={INPUT_S}"),
        *(
            f"-rss_limit_mb={INPUT_MIB}",
            f"-max_len={MAX_LEN if name != 'labels' else 65536}",
            "-print_final_stats=1",
        ),
        f"-artifact_prefix={corpus.parent}/",
    ]
    atheris.Setup(options, lambda data: feed(name, data))
    atheris.Fuzz()


def fuzz(name: str, seconds: float) -> Json:
    """Fuzz one target in a process of its own and take what it kept into the corpus."""
    with tempfile.TemporaryDirectory(prefix="tta-corpus-") as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for i, data in enumerate([*examples(name), *kept(name)]):
            (corpus / f"seed-{i}").write_bytes(data)
        argv = [sys.executable, "-c", CHILD, name, str(corpus), str(seconds)]
        done = subprocess.run(argv, cwd=HERE.parent, capture_output=True, text=True, errors="replace")
        tried = re.search(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
        peak = re.search(r"stat::peak_rss_mb:\s+(\d+)", done.stderr)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        found = sorted({p.read_bytes() for p in corpus.iterdir()}, key=lambda d: (len(d), d))
        crashes = [p.read_bytes() for p in Path(folder).iterdir() if p.is_file()]
    CORPUS.mkdir(exist_ok=True)
    sizes = np.cumsum([len(data) for data in found])
    keep = [*crashes, *(data for data, size in zip(found, sizes, strict=True) if size <= MAX_KEPT_BYTES)]
    encoded = [base64.b64encode(data).decode() for data in keep]
    (CORPUS / f"{name}.json").write_text(json.dumps(encoded, indent=0) + "\n")
    return {
        "target": name,
        "what": (TARGETS[name].__doc__ or "").strip(),
        "inputs": int(tried.group(1)) if tried else 0,
        "covered": int(covered[-1]) if covered else 0,
        "peak_mib": int(peak.group(1)) if peak else 0,
        "kept": len(keep),
        "crashes": len(crashes),
        "exit_status": done.returncode,
        "says": done.stderr[-1500:] if crashes or done.returncode else "",
    }


def table(result: Json) -> list[str]:
    """As Markdown."""
    runs = result["runs"]
    lines = [
        "# Fuzzing",
        "",
        f"{result['date']}, commit {result['commit']}, `{result['command']}`; coverage-guided (atheris), "
        f"{result['seconds']:.0f} s a target; {sum(r['inputs'] for r in runs):,} inputs, "
        f"{sum(r['crashes'] for r in runs)} crashes.",
        "",
        "| decoder | inputs tried | edges covered | peak memory, MiB | corpus | crashes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in runs:
        lines.append(
            f"| {r['target']}: {r['what'].rstrip('.')} | {r['inputs']:,} | {r['covered']} | {r['peak_mib']} | {r['kept']} "
            f"| {r['crashes']} |"
        )
    return [*lines, "", f"Limits for one input: {INPUT_S} s, {INPUT_MIB} MiB of the process."]


def main() -> int:
    """Fuzz all targets and write the report; 1 if any crashed."""
    from bench.stamp import publish, stamp

    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="for each target")
    parser.add_argument("--processes", type=int, default=2, help="targets at a time")
    parser.add_argument("--only", nargs="*", choices=sorted(TARGETS), metavar="TARGET", help="these targets only")
    arguments = parser.parse_args()
    names = arguments.only or list(TARGETS)
    runs = []
    with ThreadPoolExecutor(arguments.processes) as pool:
        for found in pool.map(lambda name: fuzz(name, arguments.seconds), names):
            runs.append(found)
            print(f"{found['target']}: {found['inputs']:,} inputs, {found['crashes']} crashes", file=sys.stderr)
            if found["says"]:
                print(found["says"], file=sys.stderr)
    result = {**stamp("python -m bench.fuzz"), "seconds": arguments.seconds, "runs": runs}
    if arguments.only:
        print("\n".join(table(result)))
    else:
        publish("fuzz", result, table(result))
    return int(any(r["crashes"] or r["exit_status"] for r in runs))


if __name__ == "__main__":
    sys.exit(main())
